"""Which index a catalog gets, and when a night adds to it or builds it anew: rules over counts, with no engine and no file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import InputError, ManifestError
from pipelines.manifest import ManifestObject

Kind = Literal["base", "delta"]
Action = Literal["none", "delta", "rebuild"]

METRIC = "inner_product"  # of unit vectors: the cosine
FLAT = "Flat"
# Below this many rows a list, k-means has too little to learn from and FAISS warns; above 256 it takes a sample.
MIN_ROWS_PER_LIST = 39
MAX_ROWS_PER_LIST = 256

_FACTORY = re.compile(r"Flat|IVF([1-9][0-9]{0,6}),(Flat|SQ8|SQfp16)")


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """How vectors are kept and searched: a FAISS factory string, and how many of its lists a query visits (none for Flat)."""

    factory: str
    nprobe: int | None
    dims: int

    def __post_init__(self) -> None:
        found = _FACTORY.fullmatch(self.factory)
        if not found:
            raise InputError(
                f"index factory {self.factory[:60]!r} is not one of: Flat; IVF<lists>,Flat; IVF<lists>,SQ8; IVF<lists>,SQfp16."
            )
        if self.dims < 1:
            raise InputError(f"an index of {self.dims} dimensions cannot be built. Check the tower's card.")
        if (self.nprobe is None) != (self.nlist is None):
            raise InputError(f"factory {self.factory} with nprobe {self.nprobe}: lists are probed in IVF indexes, and only there.")
        if self.nprobe is not None and self.nlist is not None and not 1 <= self.nprobe <= self.nlist:
            raise InputError(f"nprobe {self.nprobe} is not between 1 and the {self.nlist} lists of {self.factory}.")

    @property
    def nlist(self) -> int | None:
        """How many inverted lists there are; None where every vector is compared."""
        lists = self.factory.partition(",")[0].removeprefix("IVF")
        return None if self.factory == FLAT else int(lists)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One immutable FAISS index as its card describes it: its objects, and the trained template that it shares with others.

    `trained_sha256` hashes centroids and quantiser: inverted lists of two segments may be compared or merged only where it
    is equal. A delta names in `template` the base whose template it uses.
    """

    name: str
    kind: Kind
    rows: int
    spec: IndexSpec
    trained_sha256: str | None
    template: str | None
    objects: tuple[ManifestObject, ...]

    def __post_init__(self) -> None:
        if (self.trained_sha256 is None) != (self.spec.nlist is None):
            raise ManifestError(f"segment {self.name}: {self.spec.factory} with trained_sha256 {self.trained_sha256}. It is damaged.")
        if (self.kind == "delta") != (self.template is not None):
            raise ManifestError(f"segment {self.name}: kind {self.kind} with template {self.template}. A delta has one, a base has none.")

    def object(self, role: str) -> ManifestObject:
        """Return the object with this role."""
        for item in self.objects:
            if item.role == role:
                return item
        raise ManifestError(f"segment {self.name} has no `{role}` object. Build the index again.")


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """When an index is extended, and when it is built anew. Shares are of live products and of stored entries.

    A base stays Flat below `flat_below` products; `factory` overrides the choice; `recall_at_10` is what a gate asks for.
    """

    delta_until: float = 0.10
    tombstones_until: float = 0.10
    flat_below: int = 20_000
    factory: str | None = None
    recall_at_10: float = 0.97
    max_segments: int = 16

    def __post_init__(self) -> None:
        for name in ("delta_until", "tombstones_until", "recall_at_10"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"`{name}` is {value}; it is a share, from 0 to 1.")
        if self.flat_below < 0:
            raise InputError(f"`flat_below` is {self.flat_below}; it is a number of products, from 0.")
        if self.max_segments < 1:
            raise InputError(f"`max_segments` is {self.max_segments}; at least one segment is needed.")
        if self.factory is not None:
            _spec(self.factory, dims=1)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of the index tonight, and why, in words."""

    action: Action
    reason: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a night brings: new entries, older entries that it hides, entries hidden before, and products live afterwards."""

    num_added: int
    num_gone: int
    num_hidden: int
    num_live: int


def choose(rows: int, dims: int, *, flat_below: int = 20_000, override: str | None = None) -> IndexSpec:
    """Choose the index for this many rows: exact below a size, lists of one-byte codes above.

    An override that has too few rows to train falls back to Flat, which is exact.
    """
    if override is not None:
        spec = _spec(override, dims=dims)
        return spec if rows >= (spec.nlist or 0) * MIN_ROWS_PER_LIST else _spec(FLAT, dims=dims)
    nlist = 2 ** round(math.log2(math.sqrt(max(rows, 1))))
    if rows < max(flat_below, nlist * MIN_ROWS_PER_LIST):
        return _spec(FLAT, dims=dims)
    return _spec(f"IVF{nlist},SQ8", dims=dims)


def decide(segments: Sequence[Segment], change: Change, *, options: RefreshOptions, dims: int) -> Decision:
    """Say whether the index stays, gets a delta, or is rebuilt. The first rule that holds decides."""
    base = next((segment for segment in segments if segment.kind == "base"), None)
    if not change.num_live:
        return Decision(action="rebuild" if segments else "none", reason="no product is live")
    if base is None:
        return Decision(action="rebuild", reason="there is no base segment yet")
    if misfit := _misfit(base.spec, change, options, dims=dims):
        return Decision(action="rebuild", reason=misfit)
    if not change.num_added and not change.num_gone:
        return Decision(action="none", reason="no vector is new and none is gone")
    if worn := _worn(segments, change, options):
        return Decision(action="rebuild", reason=worn)
    return Decision(action="delta", reason=f"{change.num_added} entries are new and {change.num_gone} are hidden, within the limits")


def _misfit(spec: IndexSpec, change: Change, options: RefreshOptions, *, dims: int) -> str | None:
    """Say why the base is of the wrong type. The factor of two each way keeps a catalog at the border from alternating."""
    if spec.dims != dims:
        return f"the base has {spec.dims} dimensions and the tower {dims}"
    wanted = choose(change.num_live, dims, flat_below=options.flat_below, override=options.factory).factory
    if options.factory is not None:
        return f"the base is {spec.factory} and the configuration asks for {wanted}" if spec.factory != wanted else None
    if spec.factory == FLAT and wanted != FLAT and change.num_live >= 2 * options.flat_below:
        return f"{change.num_live} products are live, twice what a Flat base is for ({options.flat_below})"
    if spec.factory != FLAT and change.num_live < options.flat_below // 2:
        return f"{change.num_live} products are live, less than half of what {spec.factory} is for ({options.flat_below})"
    return None


def _worn(segments: Sequence[Segment], change: Change, options: RefreshOptions) -> str | None:
    """Say which limit of an incremental index is passed."""
    fresh = change.num_added + sum(segment.rows for segment in segments if segment.kind == "delta")
    if fresh > options.delta_until * change.num_live:
        return f"delta segments would hold {fresh} of {change.num_live} live products, more than {options.delta_until:.0%}"
    hidden = change.num_hidden + change.num_gone
    entries = change.num_added + sum(segment.rows for segment in segments)
    if hidden > options.tombstones_until * entries:
        return f"tombstones would hide {hidden} of {entries} entries, more than {options.tombstones_until:.0%}"
    count = len(segments) + bool(change.num_added)
    return f"there would be {count} segments, more than {options.max_segments}" if count > options.max_segments else None


def _spec(factory: str, *, dims: int) -> IndexSpec:
    """Return a factory with the probes that suit it: a quarter of few lists, 64 of more, a 32nd of very many."""
    lists = _FACTORY.fullmatch(factory)
    if not lists or not lists[1]:
        return IndexSpec(factory=factory, nprobe=None, dims=dims)
    nlist = int(lists[1])
    return IndexSpec(factory=factory, nprobe=max(1, min(nlist // 4, 64), nlist // 32), dims=dims)
