"""The record of a trained tower: where it comes from, as `training.json` beside it says. It decides no vector."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoder.errors import TowerError
from encoder.registry import RECORD


def read_record(tower: Path) -> Mapping[str, Any] | None:
    """Return the record of a tower's training, or None where it has none."""
    path = tower / RECORD
    return parse_record(path.read_bytes() if path.is_file() else None, str(tower))


def parse_record(data: bytes | None, place: str) -> Mapping[str, Any] | None:
    """Return what a record says, which must be a mapping."""
    if data is None:
        return None
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise bad_record(place, str(error)) from error
    if not isinstance(tree, dict):
        raise bad_record(place, f"it holds a {type(tree).__name__}")
    return tree


def recorded_split(record: Mapping[str, Any] | None, place: str) -> Mapping[str, Any] | None:
    """Return the shares and the seed by which a record says that queries were split, or None where it does not say."""
    if record is None or "recipe" not in record:  # a stage in a work folder does not know of the split
        return None
    try:
        told = record["data"]["split"]["by"]
        return {"dev": float(told["dev"]), "test": float(told["test"]), "seed": int(told["seed"])}
    except (KeyError, TypeError, ValueError) as error:
        raise bad_record(place, f"{type(error).__name__}: {error}") from error


def bad_record(place: str, why: str) -> TowerError:
    """Return the error of a record that cannot be understood."""
    return TowerError(f"{place}/{RECORD} is not as `train` writes it ({why[:200]}). It tells where the tower comes from: take a good copy.")
