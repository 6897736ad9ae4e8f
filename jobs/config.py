"""`catalog-embed.yaml` and the environment, merged into the dataclasses that own the options, with the origin of every value.

Later layers win: the owner's default, the file, the chosen target, `CATALOG_EMBED_SECTION__KEY`, the command line;
mappings are merged key by key.
A key that nobody owns is an error that names the nearest one. `${NAME}` is replaced from the environment only.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from jobs.values import convert
from pipelines.errors import InputError

FILE_NAME = "catalog-embed.yaml"
MAX_BYTES = 1 << 20

_REFERENCE = re.compile(r"\$\{(\w*)\}")
# Shown inside `options`; every other option of a service is masked, and so is an address of a database.
_SHOWN_OPTIONS = frozenset({"region", "endpoint", "allow_http", "bucket", "timeout", "connect_timeout", "virtual_hosted_style_request"})
_SECRET_KEYS = frozenset({"uri"})
_ENVIRONMENT = "CATALOG_EMBED_"


@dataclass(frozen=True, kw_only=True)
class Value:
    """One configured value, where it comes from, and how it was written before `${NAME}` was replaced."""

    raw: Any
    origin: str
    written: Any = None


Layer = dict[str, Value]


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases (a 300-byte file could expand to gigabytes) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise InputError(f"line {self.line + 1}: YAML aliases (`*name`) are not allowed. Write the value out.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT002  the base class has it so
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise InputError(f"line {node.value[index][0].start_mark.line + 1}: `{key}` is given twice. Keep one of them.")
        return super().construct_mapping(node, deep=deep)


def read_file(path: Path) -> dict[str, Any]:
    """Read a configuration file as plain data."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MB; that is no configuration.")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # noqa: S506  a SafeLoader, made stricter
    except FileNotFoundError as error:
        raise InputError(
            f"no configuration at {path}. Run `catalog-embed init DIR` to make a project, or point to one with --config."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}. Check that it is a readable UTF-8 text file.") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {_one_line(error)[:300]}. Check the indentation and the quotes there.") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no settings. It should begin with `project: name`.")
    return data


def layers(*, path: Path, target: str | None, overrides: Mapping[str, Any], sections: Mapping[str, tuple[type, ...]]) -> Layer:
    """Merge file, target, environment and command line into one flat layer of `section.key` values."""
    data = read_file(path)
    targets = data.pop("targets", None) or {}
    merged = _flatten(data, origin=str(path), sections=sections)
    if target is not None:
        if not isinstance(targets, dict) or target not in targets:
            raise InputError(f"{path}: there is no target `{target}`. {_suggest(target, targets)}")
        if not isinstance(targets[target], dict):
            raise InputError(f"{path}: target `{target}` holds sections, so it needs `section: {{ key: value }}` lines below it.")
        merged = _over(merged, _flatten(targets[target], origin=f"{path} target {target}", sections=sections))
    merged = _over(merged, _from_environment(os.environ, sections))
    merged = _over(merged, {key: Value(raw=raw, origin="command line") for key, raw in overrides.items() if raw is not None})
    return {key: _expanded(key, value) for key, value in merged.items()}


def build(owner: type, section: str, layer: Layer) -> Any:
    """Make an owner's dataclass from the layer's values in a section; whatever is missing keeps the owner's default."""
    chosen = {}
    for item in fields(owner):
        key = f"{section}.{item.name}"
        if key in layer:
            chosen[item.name] = _converted(layer[key], owner, item.name, where=f"{key} ({layer[key].origin})")
        elif item.default is MISSING and item.default_factory is MISSING and item.init:
            raise InputError(f"`{key}` is missing. Add it to the configuration: `{section}: {{ {item.name}: ... }}`.")
    try:
        return owner(**chosen)
    except InputError as error:
        raise InputError(f"`{section}`: {error}") from error


def _converted(value: Value, owner: type, name: str, *, where: str) -> Any:
    try:
        return convert(value.raw, owner=owner, name=name, where=where)
    except InputError:
        if value.raw == value.written and name not in {"options", *_SECRET_KEYS}:
            raise
        # The message would show what a variable stood for.
        raise InputError(f"`{where}` has the wrong form; it is not shown, because it may be secret.") from None


def described(layer: Layer, sections: Mapping[str, tuple[type, ...]]) -> Iterator[tuple[str, str, str]]:
    """Yield every option as (key, value, origin), defaults included; secrets are masked."""
    for section, owners in sections.items():
        for owner in owners:
            for item in fields(owner):
                key = f"{section}.{item.name}"
                if key in layer:
                    yield key, _shown(layer[key].written, name=item.name), layer[key].origin
                else:
                    yield key, _shown(_default(item), name=item.name), "default"


def _over(below: Layer, above: Layer) -> Layer:
    """Lay one layer over another; mappings are merged key by key, so that changing one keeps the others."""
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        if under is not None and isinstance(under.raw, dict) and isinstance(value.raw, dict):
            merged[key] = Value(raw=under.raw | value.raw, origin=f"{value.origin} over {under.origin}")
        else:
            merged[key] = value
    return merged


def _flatten(data: Mapping[str, Any], *, origin: str, sections: Mapping[str, tuple[type, ...]]) -> Layer:
    layer: Layer = {}
    for section, content in data.items():
        if section in _keys(sections, ""):
            layer[f".{section}"] = Value(raw=content, origin=origin)
            continue
        if section not in sections or section == "":
            raise InputError(
                f"{origin}: unknown key `{section}`. {_suggest(str(section), [*filter(None, sections), *_keys(sections, ''), 'targets'])}"
            )
        if not isinstance(content, dict):
            raise InputError(f"{origin}: `{section}` holds settings, so it needs `key: value` lines below it, not `{content}`.")
        for key, raw in content.items():
            if key not in _keys(sections, section):
                raise InputError(f"{origin}: unknown key `{section}.{key}`. {_suggest(str(key), _keys(sections, section))}")
            layer[f"{section}.{key}"] = Value(raw=raw, origin=origin)
    return layer


def _from_environment(environment: Mapping[str, str], sections: Mapping[str, tuple[type, ...]]) -> Layer:
    """Read `CATALOG_EMBED_SOURCE__PATH` as `source.path`. Variables of single options belong to the command line."""
    layer: Layer = {}
    for name, text in environment.items():
        if not name.startswith(_ENVIRONMENT) or "__" not in name:
            continue
        section, _, key = name.removeprefix(_ENVIRONMENT).lower().partition("__")
        if section not in sections or key not in _keys(sections, section):
            known = [f"{_ENVIRONMENT}{s}__{k}".upper() for s in sections if s for k in _keys(sections, s)]
            raise InputError(f"environment variable {name} sets nothing. {_suggest(name, known)}")
        layer[f"{section}.{key}"] = Value(raw=_parsed(name, text), origin=f"environment {name}")
    return layer


def _parsed(name: str, text: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506  a SafeLoader, made stricter
    except (yaml.YAMLError, InputError, RecursionError):
        raise InputError(f"environment variable {name} is not a value. Write it as YAML, such as 5, text or {{ key: value }}.") from None


def _expanded(key: str, value: Value) -> Value:
    """Replace `${NAME}` from the environment. What is shown later is the name, never what it stood for."""

    def one(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise InputError(
                f"`{key}` ({value.origin}) needs the environment variable `{name or '?'}`, which is not set. Export it, then try again."
            )
        return os.environ[name]

    return Value(raw=_map_texts(value.raw, lambda text: _REFERENCE.sub(one, text)), origin=value.origin, written=value.raw)


def _map_texts(raw: Any, change: Callable[[str], str]) -> Any:
    if isinstance(raw, str):
        return change(raw)
    if isinstance(raw, dict):
        return {key: _map_texts(item, change) for key, item in raw.items()}
    if isinstance(raw, list):
        return [_map_texts(item, change) for item in raw]
    return raw


def _shown(raw: Any, *, name: str) -> str:
    """Show a value on one line, with whatever may be a credential masked."""
    if isinstance(raw, Mapping):
        shown = {key: item if name != "options" or key in _SHOWN_OPTIONS or _is_reference(item) else "****" for key, item in raw.items()}
        return "{" + ", ".join(f"{key}: {item}" for key, item in shown.items()) + "}"
    if name in _SECRET_KEYS and raw is not None and not _is_reference(raw):
        return "****"
    return ("-" if raw is None else str(raw)).replace("\n", " ")


def _is_reference(raw: Any) -> bool:
    return isinstance(raw, str) and _REFERENCE.fullmatch(raw) is not None


def _default(item: Any) -> Any:
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else "(required)"


def _keys(sections: Mapping[str, tuple[type, ...]], section: str) -> list[str]:
    return [item.name for owner in sections.get(section, ()) for item in fields(owner)]


def _suggest(word: str, known: Iterable[Any]) -> str:
    names = sorted(str(name) for name in known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(names) or 'none'}."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as one block, as a person would."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def as_yaml(data: Mapping[str, Any]) -> str:
    """Write data as a person would have it."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)
