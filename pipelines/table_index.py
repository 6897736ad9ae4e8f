"""The vector index of the table on a night: measured, and mended as far as the measurement asks for it.

What the refresh extended is searched for held-out vectors. Where it finds too little, the same run goes on: more
partitions, then one piece instead of many, then new partitions. What is still too little after that is for the gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipelines.build import Build
from pipelines.contracts import LANCE_INDEX, IndexUse
from pipelines.index.tuning import Exam
from pipelines.manifest import Manifest
from pipelines.stores import lance
from pipelines.table_tuning import NPROBES, Tuning, tune
from pipelines.truth import Truth

# A night may search so many times the partitions that were enough after training, before it trains anew.
_PATIENCE = 2
_FEW = "so few products are compared one by one"


def settle(build: Build, state: lance.IndexState, truth: Truth) -> tuple[lance.IndexState, IndexUse]:
    """Return the state to publish, and how the table's vector index came about and is asked."""
    if lance.VECTOR_INDEX not in state.deltas:
        return state, IndexUse(action="none", trigger=None, reason=_FEW)
    exam, target, use = truth.probe, build.refresh.recall_at_10, _done(state)
    before = _before(build.base) if lance.VECTOR_INDEX not in state.built else None
    if before is None:
        return state, _trained(use, _tuned(build, state, exam, target=target, nprobes=NPROBES), target=target)
    needed = before.needs(target)
    asked = {"nprobes": [before.search["nprobes"]], "refines": [before.search["refine"]]}
    now = _tuned(build, state, exam, target=needed, margin=0.0, **asked)
    kept = replace(use, search=before.search, recall=now.recall, target=target, trained_recall=before.trained_recall)
    if now.reached:
        return state, kept
    words = f"recall {now.recall:.4f} at {now.nprobes} partitions is below {needed:g}"
    return _mended(build, state, exam, replace(kept, trigger="recall", reason=words), needed=needed)


def _mended(build: Build, state: lance.IndexState, exam: Exam, use: IndexUse, *, needed: float) -> tuple[lance.IndexState, IndexUse]:
    """Search more partitions; fold and search; train anew and search: until enough is found, or all is done."""
    some = [count for count in NPROBES if count <= max(use.search["trained_nprobes"] * _PATIENCE, min(NPROBES))]
    found = _tuned(build, state, exam, target=needed, nprobes=some)
    if not found.reached and state.deltas[lance.VECTOR_INDEX] > 1:
        state, use = lance.fold_vector_index(build.table_uri, build.options, at=state.version), replace(use, action="fold")
        found = _tuned(build, state, exam, target=needed, nprobes=some)
    if found.reached:
        return state, replace(use, search={**use.search, "nprobes": found.nprobes, "refine": found.refine}, recall=found.recall)
    state = lance.retrain_vector_index(build.table_uri, build.spec, build.options, at=state.version, workers=build.workers)
    target = build.refresh.recall_at_10
    found = _tuned(build, state, exam, target=target, nprobes=NPROBES)
    return state, _trained(replace(use, action="rebuild"), found, target=target)


def _trained(use: IndexUse, found: Tuning, *, target: float) -> IndexUse:
    search = {"nprobes": found.nprobes, "refine": found.refine, "trained_nprobes": found.nprobes}
    return replace(use, search=search, recall=found.recall, target=target, trained_recall=found.recall)


def _tuned(build: Build, state: lance.IndexState, exam: Exam, *, target: float, nprobes: Sequence[int], **how: Any) -> Tuning:
    """Find the fastest search of a version that finds enough, among these numbers of partitions."""
    searcher = lance.TableSearcher(build.table_uri, state.version, build.options)
    return tune(searcher.nearest, exam, target=target, nprobes=nprobes, **how)


def _before(base: Manifest | None) -> IndexUse | None:
    """Return how the base's index is asked, where that is known."""
    use = base.indexes.get(LANCE_INDEX) if base else None
    return use if use is not None and {"nprobes", "refine", "trained_nprobes"} <= use.search.keys() else None


def _done(state: lance.IndexState) -> IndexUse:
    """Say what the refresh did to the vector index."""
    pieces = state.deltas[lance.VECTOR_INDEX]
    if lance.VECTOR_INDEX in state.built:
        return IndexUse(action="built", trigger=None, reason="the table had no vector index, or had outgrown it")
    if lance.VECTOR_INDEX in state.folded:
        return IndexUse(action="fold", trigger="segments", reason="it consisted of too many pieces")
    return IndexUse(action="delta" if pieces > 1 else "none", trigger=None, reason=f"it consists of {pieces} pieces")
