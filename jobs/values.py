"""One configured value into the type that its owner declares, or an error that shows where it stands."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, timedelta
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pipelines.errors import InputError
from pipelines.window import span


def convert(raw: Any, *, owner: type, name: str, where: str) -> Any:
    """Return `raw` as the type of the owner's field."""
    return _convert(raw, _hints(owner)[name], where)


@cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def _convert(raw: Any, kind: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(raw, get_args(kind), where)
    if origin is Literal:
        if raw not in get_args(kind):
            raise InputError(f"`{where}` is `{raw}`, but must be one of: {', '.join(map(str, get_args(kind)))}.")
        return raw
    if origin in (Mapping, dict) or kind is Mapping:
        return _convert_mapping(raw, get_args(kind) or (str, Any), where)
    if origin in (tuple, list):
        if not isinstance(raw, list):
            raise InputError(f"`{where}` must be a list: `[a, b]`, not `{raw}`.")
        return tuple(_convert(item, get_args(kind)[0], where) for item in raw)
    if is_dataclass(kind):
        return _convert_dataclass(raw, kind, where)
    return _convert_scalar(raw, kind, where)


def _convert_union(raw: Any, kinds: tuple[Any, ...], where: str) -> Any:
    if raw is None and type(None) in kinds:
        return None
    wanted = [kind for kind in kinds if kind is not type(None)]
    exact = [kind for kind in wanted if isinstance(kind, type) and type(raw) is kind]
    if exact:
        return raw
    problems = []
    for kind in wanted:
        try:
            return _convert(raw, kind, where)
        except InputError as error:
            problems.append(error)
    raise problems[0]


def _convert_mapping(raw: Any, kinds: tuple[Any, ...], where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InputError(f"`{where}` must be a mapping: `{{ key: value }}`, not `{raw}`.")
    return {str(key): _convert(item, kinds[1], f"{where} {key}") for key, item in raw.items()}


def _convert_dataclass(raw: Any, kind: Any, where: str) -> Any:
    names = [item.name for item in fields(kind)]
    if not isinstance(raw, dict) or any(key not in names for key in raw):
        raise InputError(f"`{where}` must be `{{ {', '.join(f'{name}: ...' for name in names)} }}`, not `{raw}`.")
    values = {key: _convert(item, _hints(kind)[key], f"{where} {key}") for key, item in raw.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"`{where}` is incomplete: it must be `{{ {', '.join(f'{name}: ...' for name in names)} }}`.") from error


def _convert_scalar(raw: Any, kind: Any, where: str) -> Any:
    if kind is Any:
        return raw
    if kind is date:
        return _day(raw, where)
    if kind is timedelta:
        try:
            return span(str(raw))
        except InputError as error:
            raise InputError(f"`{where}`: {error}") from error
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if type(raw) is kind:
        return raw
    if kind is str and isinstance(raw, int | float) and not isinstance(raw, bool):
        return str(raw)
    raise InputError(f"`{where}` is `{raw}`, but must be {_NAMES.get(kind, str(kind))}.")


_NAMES: dict[Any, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _day(raw: Any, where: str) -> date:
    """Read a day; YAML has made a date of it already where it is written plainly."""
    if type(raw) is date:
        return raw
    try:
        return date.fromisoformat(raw)
    except (TypeError, ValueError) as error:
        raise InputError(f"`{where}` must be a day such as 2026-12-31, not `{raw}`.") from error
