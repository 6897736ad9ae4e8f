"""A small shop, the night that comes to it, and what must hold whatever disturbs that night."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.nightly import Night, run_night
from jobs.records import Record
from jobs.settings import load
from pipelines.disk import NO_FAULTS, TEMPORARY, Faults
from pipelines.leases import LeaseEntry
from pipelines.manifest import Manifest
from pipelines.publish import current, history, open_manifest
from pipelines.reader import open_generation
from pipelines.storage import Store
from pipelines.stores.lance import opening
from pipelines.stores.parquet import decode
from tests.shops import make_shop

PRODUCTS, DIMS = 120, 32
Row = dict[str, Any]
TEXT_FIELDS = ("title", "brand", "category", "attributes", "description", "lang")
ROOT = Path(__file__).parent.parent
GATES = {"quarantine_ratio": 0.05, "max_delete_ratio": 0.1, "samples": 16}


@dataclass(frozen=True)
class Shop:
    """A project, its catalog in one file, and its store."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "catalog-embed.yaml"

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def store(self) -> Store:
        return Store.open(self.index)

    @property
    def _catalog(self) -> Path:
        return self.folder / "catalog" / "part-00000.parquet"

    def rows(self) -> list[Row]:
        found: list[Row] = pq.read_table(self._catalog).to_pylist()
        return found

    def write(self, rows: list[Row]) -> None:
        pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(self._catalog)), self._catalog)

    def put(self, index: Path) -> None:
        """Put a copied store in the place of the shop's."""
        shutil.rmtree(self.index, ignore_errors=True)
        shutil.copytree(index, self.index)

    def run(self, faults: Faults = NO_FAULTS, **night: Any) -> Record:
        """Run a whole read in this process. These faults hit the driver's store; that of the workers has none."""
        with faulty(faults):
            return run_night(load(self.config), Night(**{"since": "beginning"} | night))

    @contextmanager
    def started(self, *arguments: str) -> Iterator[Popen[str]]:
        """Run the command line as a process group of its own, and leave nothing of it."""
        command = [sys.executable, "-m", "jobs.cli", "-c", str(self.config), "run", "--since", "beginning", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with Popen(command, cwd=self.folder, env=environment, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as run:
            try:
                yield run
            finally:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)

    def live(self) -> Manifest:
        entry = current(self.store, "prod")
        assert entry is not None
        return open_manifest(self.store, entry)

    def moves(self) -> list[str]:
        """Return the generations that the alias named, in order."""
        return [entry.generation for entry in history(self.store, "prod")]

    def parts(self) -> dict[str, bytes]:
        """Return every durable part, by its key."""
        return {info.key: self.store.get(info.key) for info in self.store.list("vectors") if "/part-" in info.key}

    def durable_texts(self) -> int:
        """Return how many different texts have a vector in a durable part."""
        found = [decode(data, columns=["text_hash", "vector"], where=key) for key, data in self.parts().items()]
        return len({text for table in found for text in table.filter(table["vector"].is_valid())["text_hash"].to_pylist()})


def unbuilt(folder: Path, *, part_rows: int) -> Shop:
    """Return a shop with the catalog that all shops here begin with, and no store."""
    return Shop(make_shop(folder / "shop", products=PRODUCTS, gates=GATES, embed={"part_rows": part_rows, "actors": 1}).parent)


_made: list[Path] = []


def base_shop(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a shop with one published generation, built once for all tests."""
    if not _made:
        shop = unbuilt(factory.mktemp("shop"), part_rows=16)
        assert shop.run().facts.outcome == "published"
        _made.append(shop.folder)
    return _made[0]


def quiet_night(rows: list[Row]) -> list[Row]:
    """Change a catalog in every way that needs no forward pass: new and edited products have texts that are known."""
    edited = [dict(row) for row in rows]
    for row in edited[:12]:
        row["price"] = (row["price"] or 1.0) + 1.0
    edited[20] |= {name: rows[30][name] for name in TEXT_FIELDS}
    added = [dict(rows[number]) | {"sku": f"CE-NEW-{number}"} for number in (40, 41)]
    return [*edited[:-3], *added, dict(rows[50]) | {"sku": " "}]


def later_night(rows: list[Row]) -> list[Row]:
    """Take back all of the quiet night, and change other things: nothing of a dead run may be left."""
    edited = [dict(row) for row in rows]
    edited[22] |= {name: rows[33][name] for name in TEXT_FIELDS}
    edited[23]["price"] = 77.0
    return [*edited[:60], *edited[61:]]


def busy_night(rows: list[Row]) -> list[Row]:
    """A quiet night, and 48 products whose text was never seen."""
    edited = quiet_night(rows)
    for number in range(40, 88):
        edited[number]["title"] = f"{rows[number]['title']} waterproof {number}"
    return edited


@dataclass(frozen=True, kw_only=True)
class Content:
    """What readers see: the rows of the table, and which products the index finds."""

    digest: str | None
    counts: dict[str, int]
    found: tuple[str, ...]


def content(shop: Shop) -> Content:
    """Read what is live with every byte checked; both engines must find the same products, each once."""
    manifest = shop.live()
    assert manifest.table is not None
    live = manifest.counts["live"]
    with open_generation(shop.index, reload_s=None, verify="full") as reader:
        found = reader.search(query(), live + 10).column("id").to_pylist()
        exact = reader.search(query(), live + 10, engine="lance").column("id").to_pylist()
    assert sorted(found) == sorted(exact)
    assert len(set(found)) == len(found) == live
    return Content(digest=manifest.table.rows_digest, counts=dict(manifest.counts), found=tuple(sorted(found)))


def query() -> npt.NDArray[np.float32]:
    """Return a vector to search for."""
    vector = np.random.default_rng(3).standard_normal(DIMS).astype(np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def bury(shop: Shop) -> None:
    """Make every lease look as one of a process that is gone, and whose number another process has now."""
    for info in shop.store.list("leases"):
        entry = LeaseEntry.from_json(shop.store.get(info.key), where=info.key)
        tree = json.loads(entry.to_json()) | {"started": entry.started + 1}
        shop.store.put(info.key, json.dumps(tree).encode())


@dataclass
class Camera:
    """Copies the store wherever it differs from the last copy: what the death of the process at that point leaves behind."""

    root: Path
    album: Path
    points: list[str] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)
    _last: dict[str, tuple[int, int]] | None = None

    def reach(self, point: str) -> None:
        self.points.append(point)
        if (seen := dict(self._seen())) != self._last:
            self._last = seen
            name = f"{len(self.points):03d} {point}"
            self.pictures[name] = Path(shutil.copytree(self.root, self.album / f"{len(self.pictures):03d}", copy_function=_copied))

    def _seen(self) -> Iterator[tuple[str, tuple[int, int]]]:
        # A temporary file is nothing that anyone reads: it is in the picture where something else changed.
        for path in self.root.rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file() and TEMPORARY not in path.name:
                    yield str(path), (path.stat().st_mtime_ns, path.stat().st_size)

    def watch_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take a picture after every commit to the table as well: Lance writes past our store."""
        inner = opening.committed

        def watched(uri: str, **how: Any) -> Any:
            done = inner(uri, **how)
            self.reach("table.committed")
            return done

        monkeypatch.setattr(opening, "committed", watched)

    def of(self, *ends: str) -> dict[str, Path]:
        """Return the first and the last picture at each of these points."""
        found: dict[str, Path] = {}
        for end in ends:
            names = [name for name in self.pictures if name.endswith(end)]
            found |= {name: self.pictures[name] for name in (*names[:1], *names[-1:])}
        return found


def _copied(source: str, target: str) -> None:
    # Workers go on writing while the driver is looked at.
    with suppress(FileNotFoundError):
        shutil.copy2(source, target)


@dataclass
class Meanwhile:
    """Does something the first time that a point is reached."""

    point: str
    work: Callable[[], object]
    done: bool = False

    def reach(self, point: str) -> None:
        if point == self.point and not self.done:
            self.done = True
            self.work()


class _Opener:
    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def open(self, url: str | Path, *, options: Any = None) -> Store:
        return Store.open(url, options=options, faults=self._faults)


@contextmanager
def faulty(faults: Faults) -> Iterator[None]:
    """Give the stores that runs open in the block these faults. A run that has begun keeps its own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jobs.records.Store", _Opener(faults))
        yield


def now() -> datetime:
    return datetime.now(tz=UTC)
