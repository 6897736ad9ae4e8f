"""`doctor`: is everything there that a run needs? Every check reports, whether it passed or not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from encoder.errors import TowerError
from encoder.registry import read_card
from jobs.nightly import tower_directory, tower_options
from jobs.settings import Settings
from pipelines.contracts import Window
from pipelines.errors import CatalogEmbedError
from pipelines.pool import PoolOptions, pool
from pipelines.publish import current
from pipelines.sources import open_source
from pipelines.storage import Store
from pipelines.towers import machine_folder

PACKAGES = ("ray", "torch", "transformers", "pyarrow", "duckdb", "pylance", "lancedb", "faiss-cpu", "obstore", "numpy", "click")

_FREE_BYTES = 2 << 30
_MIB = 1 << 20
_UNIT = 1e-3


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that a run needs, and what was found."""

    name: str
    passed: bool
    found: str


def examine(settings: Settings, *, fresh: bool = False) -> Iterator[Check]:
    """Look at the machine, the configuration, the source and the store; write nothing but a probe that is removed, and a pace."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield Check(name="packages", passed=True, found=f"python {platform.python_version()}, {versions}")
    yield _run("template", lambda: f"reads {', '.join(settings.template.text_fields)}; digest {settings.template.digest[:12]}")
    yield _run("time zone", lambda: f"{settings.project.timezone}, now {datetime.now(tz=settings.zone):%Y-%m-%d %H:%M%z}")
    yield _run("tower", lambda: _look_at_tower(settings))
    yield _run("engine", lambda: _look_at_engine(settings, fresh=fresh))
    yield _run("source", lambda: _look_at_source(settings))
    yield _run("store", lambda: _look_at_store(settings))
    yield _disk(settings)
    yield _memory(settings)


def _run(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name=name, passed=True, found=look())
    except (CatalogEmbedError, TowerError) as error:
        return Check(name=name, passed=False, found=str(error))


def _look_at_tower(settings: Settings) -> str:
    """Hash the tower as a run would, and let it embed one text."""
    from encoder.inference import Encoder  # noqa: PLC0415  torch loads only where a text is embedded

    directory = tower_directory(settings)
    card = read_card(directory, tower_options(settings))
    vector = Encoder(directory, tower=tower_options(settings)).encode(["a product"])[0]
    if not abs(float((vector * vector).sum()) - 1.0) < _UNIT:
        raise TowerError(f"the tower in {directory} gives no unit vector for a plain text. Check its weights.")
    return (
        f"{card.model_type}, {card.pooling} pooling, {card.dims} dimensions, {card.max_tokens} tokens; fingerprint {card.fingerprint[:12]}"
    )


def _look_at_engine(settings: Settings, *, fresh: bool) -> str:
    """Try how fast the tower embeds here, and keep the best pace for the runs of this machine."""
    from encoder.calibration import calibrate  # noqa: PLC0415  torch loads only where a text is embedded
    from encoder.inference import EncodeOptions, Encoder  # noqa: PLC0415

    embed = settings.embed
    options = EncodeOptions(token_budget=embed.token_budget, threads=_threads(settings), lanes=embed.lanes)
    encoder = Encoder(tower_directory(settings), tower=tower_options(settings), options=options)
    if embed.token_budget is None and embed.lanes is None:
        found = calibrate(encoder, cache=machine_folder(), fresh=fresh)
        how = f"{found.tokens_per_s:,.0f} tokens/s, " + ("kept from an earlier trial" if found.kept else f"tried for {found.seconds:.0f} s")
    else:
        how = "as configured, not tried"
    pace, room = encoder.pace, encoder.footprint
    return (
        f"{encoder.engine} on {encoder.device} in {encoder.dtype}: lanes {pace.lanes}, threads {pace.threads}, packs of "
        f"{pace.token_budget:,} tokens ({how}); {room.weights / _MIB:.0f} MiB of weights, up to "
        f"{room.of_pack(pace.token_budget) / _MIB:.0f} MiB a lane"
    )


def _threads(settings: Settings) -> int:
    """Return the threads that an actor of a run has, so that what is kept is what a run looks for."""
    from encoder.loading import gpu_count  # noqa: PLC0415

    embed = settings.embed
    machine = {"CPU": float(os.cpu_count() or 1), "GPU": float(gpu_count())}
    actors = embed.actors if settings.ray.address == "local" else None  # how many of a cluster's come here is not known
    wanted = PoolOptions(actors=actors, gpus_per_actor=embed.gpus_per_actor, threads=embed.threads, tokenize=embed.tokenize)
    return pool([machine], wanted, parts=sys.maxsize).threads


def _look_at_source(settings: Settings) -> str:
    """Pin the source, and read the first batch so that a wrong mapping shows here and not at night."""
    source = open_source(settings.source, columns=settings.columns_read, fields=settings.schema.fields)
    pin = source.snapshot()
    shards = source.read(Window(since=None, until=datetime.now(tz=UTC)))
    first = next((batch for shard in shards[:1] for batch in shard.open()), None)
    columns = ", ".join(first.schema.names) if first is not None else "no rows"
    return f"{pin.kind} {pin.address}: {len(pin.objects)} objects, {pin.bytes:,} bytes, {len(shards)} shards; reads {columns}"


def _look_at_store(settings: Settings) -> str:
    """Prove that the store keeps the promise that publishing rests on."""
    store = Store.open(settings.store.root, options=settings.store.options)
    store.probe()
    entry = current(store, settings.publish.alias)
    live = f"alias {settings.publish.alias} names {entry.generation}" if entry else f"alias {settings.publish.alias} names nothing yet"
    return f"{settings.store.root} keeps put-if-absent; {live}"


def _disk(settings: Settings) -> Check:
    """A local store and the spill of a diff need room."""
    place = Path(settings.store.root) if "://" not in settings.store.root else Path.cwd()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return Check(
        name="disk", passed=free > _FREE_BYTES, found=f"{free / 1e9:.1f} GB free at {place}; a run wants {_FREE_BYTES / 1e9:.1f} GB"
    )


def _memory(settings: Settings) -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = settings.plan.memory_mb << 20
    return Check(name="memory", passed=total > 2 * wanted, found=f"{total / 1e9:.1f} GB; the diff may use {wanted / 1e9:.1f} GB")
