"""What a run starts from: the live generation, the one that it extends, how well that one finds, and the next one's number."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from pipelines.errors import AlreadyExists, NotFound
from pipelines.gates import from_json
from pipelines.manifest import Manifest, canonical
from pipelines.publish import current, next_generation, open_manifest
from pipelines.storage import Store


def heads(store: Store, alias: str, tower: str) -> tuple[Manifest | None, Manifest | None, int]:
    """Return the live generation, the newest good generation of this tower to extend, and the number of the last log entry."""
    entry = current(store, alias)
    live = open_manifest(store, entry) if entry else None
    seq = entry.seq if entry else 0
    return live, live if live is not None and live.tower == tower else _newest_of(store, tower), seq


def _newest_of(store: Store, tower: str) -> Manifest | None:
    """Return the newest generation of a tower that is whole and passed its gates, published or not."""
    keys = [info.key for info in store.list("generations") if info.key.endswith("/manifest.json")]
    for key in sorted(keys, reverse=True):
        manifest = Manifest.from_json(store.get(key), where=store.uri(key))
        if manifest.tower == tower and not manifest.failed_gates and manifest.table is not None:
            return manifest
    return None


def take_generation(store: Store, run_id: str) -> str:
    """Take the next generation id, so that a run of another tower, which may go on beside this one, takes another."""
    while True:
        generation = next_generation(store)
        with suppress(AlreadyExists):
            store.put_if_absent(f"generations/{generation}/begun.json", canonical({"run_id": run_id}))
            return generation


def recall_of(store: Store, manifest: Manifest | None) -> Mapping[str, float]:
    """Return the recall that a generation's gates measured, by index; nothing where it is not known."""
    if manifest is None:
        return {}
    with suppress(NotFound):
        gates = from_json(store.get(f"generations/{manifest.generation}/gates.json"), where=f"gates of {manifest.generation}")
        found = {gate.name.removeprefix("recall_"): gate.measured for gate in gates if gate.name in ("recall_faiss", "recall_lance")}
        return {name: value for name, value in found.items() if isinstance(value, float)}
    return {}
