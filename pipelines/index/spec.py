"""What an index is: how its vectors are kept, how it is asked, and what one of its segments consists of. No engine, no file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pipelines.errors import InputError, ManifestError
from pipelines.manifest import ManifestObject

Kind = Literal["base", "delta"]

METRIC = "inner_product"  # of unit vectors: the cosine
FLAT = "Flat"
# Below this many rows a list, k-means has too little to learn from and FAISS warns.
MIN_ROWS_PER_LIST = 39

_FACTORY = re.compile(
    r"Flat|IVF(?P<lists>[1-9][0-9]{0,6})(?:_HNSW(?P<graph>[1-9][0-9]?))?,"
    r"(?P<codes>Flat|SQ8|SQfp16|PQ[1-9][0-9]{0,3}x4fs|RaBitQ[2-8]?fs)(?:,Refine\((?P<refine>SQ8|SQfp16)\))?"
)
_FORMS = (
    "Flat, or IVF<lists>[_HNSW<links>],<codes>[,Refine(SQ8|SQfp16)] with codes Flat, SQ8, SQfp16, PQ<parts>x4fs, RaBitQfs or RaBitQ<2-8>fs"
)
_BYTES_A_NUMBER: Mapping[str, int] = {"Flat": 4, "SQ8": 1, "SQfp16": 2}
# What an entry takes beside its code: its position in a list.
_POSITION_BYTES = 8
_MOST_DIMS_A_PART = 15


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """How vectors are kept, as a FAISS factory string.

    Lists hold codes; with `Refine(...)`, what the codes find is scored again by finer codes. `fs` codes are stored one
    after the other, and laid out for fast scans when a reader opens them.
    """

    factory: str
    dims: int

    def __post_init__(self) -> None:
        check_factory(self.factory)
        if self.dims < 1:
            raise InputError(f"an index of {self.dims} dimensions cannot be built. Check the tower's card.")
        if self.parts is not None and self.dims % self.parts:
            raise InputError(f"{self.factory}: {self.dims} dimensions cannot be cut into {self.parts} equal parts. Choose a divisor.")
        if self.parts is not None and self.dims // self.parts > _MOST_DIMS_A_PART:
            # Wider parts are encoded in batches, and a code would depend on its neighbours.
            raise InputError(f"{self.factory}: one of 16 values for {self.dims // self.parts} numbers is too coarse. Cut into more parts.")

    @property
    def nlist(self) -> int | None:
        """How many inverted lists there are; None where every vector is compared."""
        lists = self._piece("lists")
        return int(lists) if lists else None

    @property
    def graph(self) -> int | None:
        """How many links a centroid has in the graph that finds the nearest lists; None where all centroids are compared."""
        links = self._piece("graph")
        return int(links) if links else None

    @property
    def codes(self) -> str:
        """How a list keeps a vector: `Flat`, `SQ8`, `SQfp16`, `PQ48x4`, `RaBitQ`, `RaBitQ4`."""
        return FLAT if self.factory == FLAT else (self._piece("codes") or "").removesuffix("fs")

    @property
    def refine(self) -> str | None:
        """How vectors are kept a second time, for the final score; None where the codes decide."""
        return self._piece("refine")

    @property
    def fast(self) -> bool:
        """Whether a reader lays the codes out for fast scans."""
        return (self._piece("codes") or "").endswith("fs")

    @property
    def parts(self) -> int | None:
        """Into how many parts product codes cut a vector."""
        codes = self.codes
        return int(codes.removeprefix("PQ").removesuffix("x4")) if codes.startswith("PQ") else None

    @property
    def template(self) -> str:
        """The factory of what is trained and stored: without the layout of a reader, and without the finer codes."""
        if self.nlist is None:
            return FLAT
        graph = f"_HNSW{self.graph}" if self.graph else ""
        return f"IVF{self.nlist}{graph},{self.codes}"

    @property
    def code_bytes(self) -> int:
        """How many bytes an entry's code takes in a list."""
        codes = self.codes
        if codes in _BYTES_A_NUMBER:
            return _BYTES_A_NUMBER[codes] * self.dims
        if self.parts is not None:
            return (self.parts + 1) // 2
        # One bit a number with two factors; each further bit a number takes a plane of bits, and two more factors once.
        bits = int(codes.removeprefix("RaBitQ") or 1)
        return (self.dims + 7) // 8 + 8 + ((self.dims * (bits - 1) + 7) // 8 + 12 if bits > 1 else 0)

    @property
    def entry_bytes(self) -> int:
        """How many bytes of a reader's memory one product takes: code, position, finer code, and its place in the id map."""
        finer = _BYTES_A_NUMBER[self.refine] * self.dims if self.refine else 0
        return self.code_bytes + finer + (_POSITION_BYTES if self.nlist else 0)

    def _piece(self, name: str) -> str | None:
        return _parsed(self.factory)[name]


def check_factory(factory: str) -> None:
    """Raise `InputError` where this is no factory of ours, for vectors of any dimensions."""
    if _FACTORY.fullmatch(factory) is None:
        raise InputError(f"index {factory[:60]!r} is none that is known. Write {_FORMS}.")


@cache
def _parsed(factory: str) -> Mapping[str, str | None]:
    found = _FACTORY.fullmatch(factory)
    assert found is not None
    return found.groupdict()


@dataclass(frozen=True, kw_only=True)
class Search:
    """How an index is asked: how many lists a query visits, and how many answers for each one wanted are scored again."""

    nprobe: int = 1
    refine: int = 1

    def __post_init__(self) -> None:
        if self.nprobe < 1 or self.refine < 1:
            raise InputError(f"a search visits at least one list and keeps at least one answer, not {self.nprobe} and {self.refine}.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a template was trained on, for comparison with later nights: rows, their spread, and how unequal their lists were.

    `sha256` hashes centroids and quantisers. Lists of two segments mean the same only where it is equal.
    """

    sha256: str
    rows: int
    spread: float
    imbalance: float


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One immutable FAISS index as its card describes it: its objects, and the trained template that it shares with others.

    A delta names in `template` the base whose trained template it uses. `spread` is the mean distance (one minus the
    cosine) of its entries from their centroids.
    """

    name: str
    kind: Kind
    rows: int
    spec: IndexSpec
    template: str | None
    trained: Training | None
    spread: float
    objects: tuple[ManifestObject, ...]

    def __post_init__(self) -> None:
        if (self.trained is None) != (self.spec.nlist is None):
            raise ManifestError(f"segment {self.name}: {self.spec.factory} with the training {self.trained}. It is damaged.")
        if (self.kind == "delta") != (self.template is not None):
            raise ManifestError(f"segment {self.name}: kind {self.kind} with template {self.template}. A delta has one, a base has none.")

    def object(self, role: str) -> ManifestObject:
        """Return the object with this role."""
        for item in self.objects:
            if item.role == role:
                return item
        raise ManifestError(f"segment {self.name} has no `{role}` object. Build the index again.")
