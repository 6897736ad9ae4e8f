"""The registry of towers: those of the store and those in folders, where they come from, and which generations they made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.records import bad_record, parse_record, read_record
from encoder.registry import CARD, RECORD, TowerCard, read_card
from jobs.inspect import generations
from jobs.nightly import open_store, tower_options
from jobs.settings import Settings
from pipelines.layout import printable_lines
from pipelines.storage import Store


@dataclass(frozen=True, kw_only=True)
class KnownTower:
    """A tower: where it is, what it is, what its record says of its training, and the generations that it made."""

    fingerprint: str
    place: str
    model_type: str
    dims: int
    max_tokens: int
    generations: tuple[str, ...]
    live: bool
    trained: Mapping[str, Any] | None


def towers_known(settings: Settings, directories: Sequence[Path] = ()) -> list[KnownTower]:
    """Return the towers of the store, then those of the folders."""
    made: dict[str, list[str]] = {}
    live = set()
    local = "://" not in settings.store.root and not Path(settings.store.root).exists()
    for item in () if local else generations(settings):
        if item.manifest is not None:
            made.setdefault(item.manifest.tower, []).append(item.name)
            live |= {item.manifest.tower} if item.standing.startswith("live") else set()
    found = [] if local else list(_of_store(open_store(settings)))
    found += [_of_folder(settings, directory) for directory in directories]
    return [
        KnownTower(
            fingerprint=card.fingerprint,
            place=place,
            model_type=card.model_type,
            dims=card.dims,
            max_tokens=card.max_tokens,
            generations=tuple(made.get(card.fingerprint, ())),
            live=card.fingerprint in live,
            trained=_summary(record, place),
        )
        for card, place, record in found
    ]


def towers_text(found: Sequence[KnownTower]) -> str:
    """Return a line or two for each tower."""
    lines = []
    for tower in found:
        used = f"{len(tower.generations)} generations, the last {tower.generations[-1]}" if tower.generations else "no generation"
        lines.append(
            f"{tower.fingerprint[:12]}  {tower.model_type}, {tower.dims} dims, {tower.max_tokens} tokens  {used}{'  LIVE' if tower.live else ''}"
        )
        lines.append(f"  {tower.place}")
        if tower.trained:
            said = tower.trained
            lines.append(
                f"  {said['recipe']}, stage {said['stage']}, from {said['base'][:12]} on {said['trained_at']}, data {said['data'][:12]}, licence {said['licence']}"
            )
            lines += [f"    test {name}: {text}" for name, text in said["test"].items()]
    return printable_lines(lines) if lines else "no tower yet. `catalog-embed run` installs the configured one, `train` makes another.\n"


def _of_store(store: Store) -> Iterator[tuple[TowerCard, str, Mapping[str, Any] | None]]:
    for info in store.list("towers"):
        folder, _, name = info.key.rpartition("/")
        if name == CARD and folder.count("/") == 1:
            record = store.get(f"{folder}/{RECORD}") if store.head(f"{folder}/{RECORD}") else None
            yield TowerCard.from_json(store.get(info.key)), store.uri(folder), parse_record(record, store.uri(folder))


def _of_folder(settings: Settings, directory: Path) -> tuple[TowerCard, str, Mapping[str, Any] | None]:
    return read_card(directory, tower_options(settings)), str(directory), read_record(directory)


def _summary(record: Mapping[str, Any] | None, place: str) -> Mapping[str, Any] | None:
    """Return what a line or two can say of a record."""
    if not record or "recipe" not in record:  # of a stage in a work folder, or of a tower made elsewhere
        return None
    try:
        return _told(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise bad_record(place, f"{type(error).__name__}: {error}") from error


def _told(record: Mapping[str, Any]) -> Mapping[str, Any]:
    chosen = record["chosen"]["stage"]
    return {
        "recipe": record["recipe"]["name"],
        "stage": chosen,
        "base": record["base"],
        "trained_at": record["trained_at"],
        "data": record["data"]["digest"],
        "licence": ", ".join(dict.fromkeys(item["licence"] for item in record["data"]["projects"])),
        "test": _changes(record["test"], chosen),
    }


def _changes(board: Mapping[str, Any] | None, system: str) -> dict[str, str]:
    """Say how the tower differs from its base on the test side, metric by metric where that is certain."""
    found = {}
    for cell in board["cells"] if board else ():
        gap = cell["difference"]
        if cell["system"] == system and not cell["stratum"] and gap and gap["low"] is not None and gap["low"] * gap["high"] > 0:
            found[cell["metric"]] = f"{cell['estimate']['mean']:.3f} ({gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}])"
    return found
