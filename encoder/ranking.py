"""What ranks products for a query, and in which order: exact search over the full catalog, ties broken by product id.

Axes: Q queries, P products, D dimensions, K ranks kept, C candidates, N pairs.
"""

# ruff: noqa: N803, N806, N815 - arrays carry their shape in their names

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from encoder.errors import EncoderError
from encoder.examples import Ints, keys_of

Scores: TypeAlias = npt.NDArray[np.float32]

NO_PRODUCT = 0  # the key of padding; no product has it

_NOTHING = np.iinfo(np.int64).min  # ranks below every score
_LOW32 = 0xFFFFFFFF
_QUERY_BLOCK, _PRODUCT_BLOCK = 256, 16_384  # 32 MB of float64 scores at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalog:
    """The products that are searched: `places_P` is the order of (product_id, locale), which breaks ties."""

    ids: pa.StringArray
    locales: pa.StringArray
    keys_P: Ints
    places_P: Ints

    @classmethod
    def of(cls, products: pa.Table) -> Catalog:
        """Read the identities of a product table; rows stay in their order."""
        ids, locales = products["product_id"].combine_chunks(), products["locale"].combine_chunks()
        # The zero character sorts below all others: `a` of any locale stays before `ab`.
        unique = pc.binary_join_element_wise(ids, locales, "\0")
        keys_P = keys_of("product", locales, ids)
        if np.unique(keys_P).size < keys_P.size:
            raise EncoderError(f"{keys_P.size - np.unique(keys_P).size} products are there twice. Give each (locale, product_id) once.")
        return cls(ids=unique, locales=locales, keys_P=keys_P, places_P=places(unique))

    def rows(self, locale: str) -> Ints:
        """Return the rows of one locale."""
        return np.flatnonzero(pc.equal(self.locales, locale).to_numpy(zero_copy_only=False))

    def run(self, query_ids: Iterable[str], rows_QK: Ints, scores_QK: Scores) -> Run:
        """Return a run from rows of this catalog, -1 as padding."""
        real_QK = rows_QK >= 0
        return Run(
            query_ids=tuple(query_ids),
            keys_QK=np.where(real_QK, self.keys_P[rows_QK], NO_PRODUCT),
            places_QK=np.where(real_QK, self.places_P[rows_QK], -1),
            scores_QK=np.where(real_QK, scores_QK, -np.inf).astype(np.float32),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """The products that a system ranked for each query, best first; key 0, place -1 and score -inf are padding on the right."""

    query_ids: tuple[str, ...]
    keys_QK: Ints
    places_QK: Ints
    scores_QK: Scores

    def __post_init__(self) -> None:
        if not self.keys_QK.shape == self.places_QK.shape == self.scores_QK.shape or len(self.keys_QK) != len(self.query_ids):
            shapes = (self.keys_QK.shape, self.places_QK.shape, self.scores_QK.shape)
            raise EncoderError(f"A run of {len(self.query_ids)} queries has keys, places and scores of {shapes}: they must agree.")
        if len(set(self.query_ids)) < len(self.query_ids):
            raise EncoderError(
                f"{len(self.query_ids) - len(set(self.query_ids))} query ids are there twice in a run. Rank each query once."
            )
        packed_QK = np.where(self.keys_QK == NO_PRODUCT, _NOTHING, pack(self.scores_QK, self.places_QK))
        falls_QK = (packed_QK[:, 1:] < packed_QK[:, :-1]) | (packed_QK[:, 1:] == _NOTHING)
        sorted_QK = np.sort(self.keys_QK, axis=1)
        twice_QK = (sorted_QK[:, 1:] == sorted_QK[:, :-1]) & (sorted_QK[:, 1:] != NO_PRODUCT)
        if not falls_QK.all() or twice_QK.any():
            row = int(np.flatnonzero(~falls_QK.all(axis=1) | twice_QK.any(axis=1))[0])
            raise EncoderError(
                f"The run of query {self.query_ids[row]!r} is not in order, or has a product twice. "
                "Give falling scores, ties by product id, padding last: `rank` and `Bm25.top` do."
            )

    def __len__(self) -> int:
        return len(self.query_ids)

    @classmethod
    def joined(cls, runs: Sequence[Run]) -> Run:
        """Return the runs of different queries, a locale each for instance, as one."""
        return cls(
            query_ids=tuple(query for run in runs for query in run.query_ids),
            keys_QK=np.concatenate([run.keys_QK for run in runs]),
            places_QK=np.concatenate([run.places_QK for run in runs]),
            scores_QK=np.concatenate([run.scores_QK for run in runs]),
        )


def places(ids: pa.Array | Sequence[str]) -> Ints:
    """Return the place of each id when all are sorted; equal ids keep their order."""
    order_P = np.asarray(pc.sort_indices(ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())).to_numpy(), np.int64)
    places_P = np.empty_like(order_P)
    places_P[order_P] = np.arange(order_P.size)
    return places_P


def pack(scores: Scores, places: Ints) -> Ints:
    """Return one whole number for score and place: larger is ranked higher, so that sorting it breaks ties by place."""
    bits = (np.asarray(scores, np.float32) + np.float32(0)).view(np.int32)  # adding zero makes -0 a 0
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)  # the bits of negative floats rise as the numbers fall
    return (rising << 32) | (_LOW32 - places)


def unpack(packed: Ints) -> tuple[Scores, Ints]:
    """Return what `pack` was given; -inf and -1 for what ranks below every score."""
    rising = (packed >> 32).astype(np.int32)
    scores = (rising ^ ((rising >> 31) & 0x7FFFFFFF)).view(np.float32)
    real = packed != _NOTHING
    return np.where(real, scores, np.float32(-np.inf)), np.where(real, _LOW32 - (packed & _LOW32), -1)


def best(packed_QC: Ints, k: int) -> Ints:
    """Return the k largest of each row, in order, padded where there are fewer."""
    if packed_QC.shape[1] < k:
        packed_QC = np.pad(packed_QC, ((0, 0), (0, k - packed_QC.shape[1])), constant_values=_NOTHING)
    return np.sort(np.partition(packed_QC, packed_QC.shape[1] - k, axis=1)[:, packed_QC.shape[1] - k :], axis=1)[:, ::-1]


def rank(queries_QD: Scores, products_PD: Scores, ids: pa.Array | Sequence[str], k: int) -> tuple[Ints, Scores]:
    """Return the rows and dot products of the k best products for each query, ties by id; -1 and -inf where there are fewer.

    Products are multiplied in float64 and rounded once, so that equal vectors tie wherever they stand: blocks of float32
    differ in the last bit with the place of a row in its block.
    """
    _check_vectors(queries_QD, products_PD)
    if k < 1 or len(ids) != len(products_PD):
        raise EncoderError(f"k is {k}, and {len(ids)} ids name {len(products_PD)} products. Give k from 1 and one id for each product.")
    places_P = places(ids)
    found_QK = np.full((len(queries_QD), k), _NOTHING)
    for begin in range(0, len(products_PD), _PRODUCT_BLOCK):
        block_DP = products_PD[begin : begin + _PRODUCT_BLOCK].astype(np.float64).T
        for first in range(0, len(queries_QD), _QUERY_BLOCK):
            rows = slice(first, first + _QUERY_BLOCK)
            scores_QP = (queries_QD[rows].astype(np.float64) @ block_DP).astype(np.float32)
            packed_QP = pack(scores_QP, places_P[begin : begin + _PRODUCT_BLOCK])
            found_QK[rows] = best(np.concatenate([found_QK[rows], best(packed_QP, k)], axis=1), k)
    scores_QK, places_QK = unpack(found_QK)
    row_of_P = np.append(np.argsort(places_P), -1)  # the last answers for padding
    return row_of_P[places_QK], scores_QK


def pair_scores(queries_QD: Scores, products_PD: Scores, query_N: Ints, product_N: Ints) -> Scores:
    """Return the dot products of pairs of rows, equal to those of `rank`."""
    _check_vectors(queries_QD, products_PD)
    scores_N = np.empty(len(query_N), np.float32)
    for begin in range(0, len(query_N), _PRODUCT_BLOCK):
        rows = slice(begin, begin + _PRODUCT_BLOCK)
        scores_N[rows] = np.einsum(
            "nd,nd->n", queries_QD[query_N[rows]].astype(np.float64), products_PD[product_N[rows]].astype(np.float64)
        )
    return scores_N


def _check_vectors(queries_QD: Scores, products_PD: Scores) -> None:
    if queries_QD.ndim != 2 or products_PD.ndim != 2 or queries_QD.shape[1] != products_PD.shape[1]:  # noqa: PLR2004  a matrix
        raise EncoderError(f"Queries are {queries_QD.shape} and products {products_PD.shape}. Give matrices of as many dimensions.")
    if not (np.isfinite(queries_QD).all() and np.isfinite(products_PD).all()):
        raise EncoderError("Some vectors are not finite. Encode the texts again, and look at the tower if that does not help.")
