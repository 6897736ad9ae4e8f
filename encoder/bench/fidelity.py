"""Are the vectors right, before it counts how fast they come: each compared with the model run on one text at a time in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from encoder.bench.corpus import Corpus
from encoder.bench.padded import Forward
from encoder.bench.workbench import Texts, Vectors, Workbench

# The lowest cosine that is still the same vector.
LEAST_COSINES = {torch.float32: 0.9999, torch.bfloat16: 0.999, torch.float16: 0.999}
# These witnesses read the tower by themselves: where one differs from ours, somebody is wrong about the tower.
WITNESSES = ("sentence-transformers",)


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Cosines of a rival's vectors with the reference, one by one, and the lowest with ours."""

    least: float
    mean: float
    least_with_ours: float

    def facts(self) -> dict[str, float]:
        """Return the numbers for a report."""
        return {"min": round(self.least, 7), "mean": round(self.mean, 7), "min_with_ours": round(self.least_with_ours, 7)}


def sample(corpus: Corpus, texts: int) -> Texts:
    """Return texts of all lengths, the shortest and the longest among them, in an order that is not theirs."""
    order = np.argsort(corpus.lengths, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(texts, len(order))).round().astype(int))]
    return [corpus.texts[row] for row in np.sort(chosen)]


def reference(bench: Workbench, texts: Texts) -> Vectors:
    """Return the vectors of texts, each run alone, in float32."""
    forward = Forward(bench, dtype=torch.float32)
    return np.concatenate([forward.embed(forward.tokenize([text])) for text in texts])


def compare(vectors: Vectors, wanted: Vectors, ours: Vectors) -> Fidelity:
    """Return how near vectors are to the reference and to ours. What is not finite is as far as can be."""
    if vectors.shape != wanted.shape:
        return Fidelity(least=-1.0, mean=-1.0, least_with_ours=-1.0)
    cosines, with_ours = cosine(vectors, wanted), cosine(vectors, ours)
    return Fidelity(least=float(cosines.min()), mean=float(cosines.mean()), least_with_ours=float(with_ours.min()))


def cosine(one: Vectors, other: Vectors) -> Any:
    """Return the cosine of each pair of rows, in float64."""
    left, right = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (left * right).sum(1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))
    return np.where(np.isfinite(found), found, -1.0)


def between_texts(vectors: Vectors) -> float:
    """Return the mean cosine of different texts: near 1, a cosine near 1 would prove nothing."""
    return float(cosine(vectors, np.roll(vectors, 1, axis=0)).mean())


def complaints(found: Mapping[str, Fidelity], *, ours: str, dtype: torch.dtype) -> list[str]:
    """Return what is wrong: ours below the bound, or a witness that disagrees with ours."""
    least = LEAST_COSINES[dtype]
    wrong = []
    if ours in found and not found[ours].least >= least:
        wrong.append(f"ours differs from the reference: cosine {found[ours].least:.6f}, the least is {least}")
    differing = [name for name in WITNESSES if name in found and not found[name].least_with_ours >= least]
    return wrong + [f"ours and {name} differ: cosine {found[name].least_with_ours:.6f}, the least is {least}" for name in differing]
