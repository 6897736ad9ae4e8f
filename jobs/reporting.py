"""How an index stands, for a person: one generation measured, compared with another, as text, data or a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.inspect import named, require_store
from jobs.settings import Settings
from pipelines.errors import InputError, ManifestError, StoreError
from pipelines.health import Asking, Report, Subject, measure, page, read_texts
from pipelines.manifest import Manifest
from pipelines.publish import history, read_manifest
from pipelines.storage import Store


def report(
    settings: Settings, generation: str | None, *, against: str | None, queries: Path | None, samples: int | None, top: int
) -> Report:
    """Measure a generation, or the live one, and compare it with another: its parent, or what was live before it, unless one is named."""
    store = require_store(settings)
    asking = Asking(samples=samples or settings.gates.samples, top=top)
    if queries is not None:
        texts, total = read_texts(queries, asking.samples)
        asking = Asking(texts=texts, texts_total=total, samples=asking.samples, top=top)
    manifest = named(settings, generation)
    now = Subject.of(store, manifest, settings.store.options)
    if against is not None:
        if against == manifest.generation:
            raise InputError(
                f"{against} cannot be compared with itself. Name another with `--against`; `catalog-embed generations` lists them."
            )
        return measure(now, Subject.of(store, read_manifest(store, against), settings.store.options), asking)
    before, notes = _before(settings, store, manifest)
    return measure(now, before, asking, notes=notes, strict=False)


def write_page(found: Report, path: Path) -> None:
    """Write the report as one page of HTML."""
    try:
        path.write_text(page(found), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Name a file in a folder that is there.") from error


def _before(settings: Settings, store: Store, manifest: Manifest) -> tuple[Subject | None, Sequence[str]]:
    """Return the generation to compare with where none was named, if it is still kept, and why not where it is not."""
    name = manifest.parent or _live_before(settings, store, manifest.generation)
    if name is None:
        return None, ["no generation came before, so there is nothing to compare with"]
    try:
        return Subject.of(store, read_manifest(store, name), settings.store.options), []
    except (StoreError, ManifestError) as error:
        return None, [f"not compared with {name}: {error}"]


def _live_before(settings: Settings, store: Store, generation: str) -> str | None:
    """Return what the alias named last before a generation: before it came, or where it is live, before it became so."""
    names = [entry.generation for entry in history(store, settings.publish.alias)]
    end = len(names) if names[-1:] == [generation] else names.index(generation) if generation in names else 0
    others = [name for name in names[:end] if name != generation]
    return others[-1] if others else None
