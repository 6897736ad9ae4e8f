"""What a stage of training computes: from the keys of a batch and its vectors to sums and counts that processes add up.

Queries stay where they are; the documents of all processes stand against them. So with W processes the loss is
`W * sum(weight * num / all_reduce_sum(count))`, and the mean of its gradients is that of one process with the whole batch.
Shapes: Q queries here, M documents of all processes, N own documents of a query, L known labels, P pairs of a document and
a query that owns it, K any keys, D dimensions.
"""

# ruff: noqa: N803, N806, N815 - tensors carry their shape in their names

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from encoder.errors import EncoderError
from encoder.examples import Batch
from encoder.losses import (
    Denominator,
    Form,
    Loss,
    check_targets,
    false_negatives_QM,
    masked_infonce,
    matryoshka,
    multiclass_circle,
    negatives_QM,
    nested_cosines,
    ordinal_supcon,
    roar,
)

Name = Literal["infonce", "supcon", "roar", "circle"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The losses of a stage with their weights, as in `{infonce: 1.0, roar: 0.1}`, and what each of them is told.

    `positive` is the lowest relevant grade. `tau`, `delta` (None: no mask) and `max_mask_frac` belong to InfoNCE, `tau` also
    to SupCon with its `thresholds` weights; `tau_a`, `margin`, `form` and `denominator` to ROAR; the rest to the circle loss.
    `dims` are Matryoshka lengths below the full one, which is always among them.
    """

    parts: Mapping[Name, float] = field(default_factory=lambda: {"infonce": 1.0})
    positive: int = 2
    tau: float = 0.02
    delta: float | None = 0.1
    max_mask_frac: float | None = 0.05
    thresholds: tuple[float, ...] | None = None
    tau_a: float = 0.01
    margin: float = 0.0
    form: Form = "odds"
    denominator: Denominator = "group"
    targets: tuple[float, ...] | None = None
    mu: float = 0.25
    gamma: float = 64.0
    omega: tuple[float, ...] | None = None
    dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        known = get_args(Name)
        if not self.parts or any(name not in known for name in self.parts) or not all(weight > 0 for weight in self.parts.values()):
            raise EncoderError(f"The losses are {dict(self.parts)}. Give one or more of {', '.join(known)}, each with a weight above 0.")
        if self.positive < 1:
            raise EncoderError(f"positive is {self.positive}. Give the lowest relevant grade, 1 or more: grade 0 is never relevant.")
        for name, value in (("tau", self.tau), ("tau_a", self.tau_a), ("gamma", self.gamma), ("mu", self.mu)):
            if not value > 0:
                raise EncoderError(f"{name} is {value}. Give a number above 0.")
        if self.max_mask_frac is not None and not 0 < self.max_mask_frac <= 1:
            raise EncoderError(f"max_mask_frac is {self.max_mask_frac}. Give a share above 0 and at most 1, or none.")
        if any(dims < 1 for dims in self.dims):
            raise EncoderError(f"dims are {list(self.dims)}. Give numbers of dimensions, 1 or more.")
        for name, weights in (("thresholds", self.thresholds), ("omega", self.omega)):
            if weights is not None and not (all(weight >= 0 for weight in weights) and any(weights)):
                raise EncoderError(f"{name} are {list(weights)}. Give weights of 0 or more, not all of them 0.")
        self._check_graded()

    def _check_graded(self) -> None:
        """Refuse what cannot be meant for ROAR or for the circle loss."""
        if self.form not in get_args(Form) or self.denominator not in get_args(Denominator):
            raise EncoderError(f"form is {self.form!r}, denominator {self.denominator!r}: {get_args(Form)} and {get_args(Denominator)}.")
        if self.form == "bt" and self.denominator == "batch":
            raise EncoderError("Form `bt` has no denominator. Choose form `odds`, or denominator `group`.")
        if self.targets is not None:
            check_targets(self.targets)
        elif "circle" in self.parts:
            raise EncoderError("The circle loss needs targets: a cosine for each grade, lowest first. Measure them on dev data.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Keys:
    """The keys of this process's queries, and those of the documents that stand against them.

    `owned_P` is a column, `owner_P` the key of a query that owns it; together they stand for the rows of all processes.
    """

    query_Q: Tensor
    own_QN: Tensor
    grades_QN: Tensor
    labels_QL: Tensor
    label_grades_QL: Tensor
    product_M: Tensor
    group_M: Tensor
    owned_P: Tensor
    owner_P: Tensor

    def __len__(self) -> int:
        return len(self.query_Q)

    def take(self, rows: slice) -> Keys:
        """Return the keys of some of the queries, against the same documents."""
        names = ("query_Q", "own_QN", "grades_QN", "labels_QL", "label_grades_QL")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


@dataclass(frozen=True, kw_only=True, eq=False)
class Exclusions:
    """Which documents are no negatives of a query, which are judged ones, and which the query knows nothing about."""

    exclude_QM: Tensor
    judged_QM: Tensor
    unlabelled_QM: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """One part of the loss on this process: a sum with its gradient, the count that divides it, and its weight."""

    num: Tensor
    count: Tensor
    weight: float


def keys_of(batch: Batch, device: torch.device | str = "cpu") -> Keys:
    """Return the keys of a batch as tensors, its own documents alone standing against its queries."""
    rows_P, places_P = np.nonzero(batch.own_QN >= 0)
    arrays = {
        "query_Q": batch.query_key_Q,
        "own_QN": batch.own_QN,
        "grades_QN": batch.grades_QN,
        "labels_QL": batch.labels_QL,
        "label_grades_QL": batch.label_grades_QL,
        "product_M": batch.product_key_M,
        "group_M": batch.group_key_M,
        "owned_P": batch.own_QN[rows_P, places_P],
        "owner_P": batch.query_key_Q[rows_P],
    }
    return Keys(**{name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()})


def against_all(keys: Keys, *, gather: Callable[[Tensor], Tensor], offset: int) -> Keys:
    """Return the keys with the documents of all processes; those of this one begin at column `offset`.

    `gather` concatenates the rows of all processes in the order of their ranks, and is called by all alike.
    """
    return replace(
        keys,
        own_QN=torch.where(keys.own_QN >= 0, keys.own_QN + offset, keys.own_QN),
        product_M=gather(keys.product_M),
        group_M=gather(keys.group_M),
        owned_P=gather(keys.owned_P + offset),
        owner_P=gather(keys.owner_P),
    )


def exclusions(keys: Keys, *, positive: int) -> Exclusions:
    """Compare the keys: what is, or may well be, relevant to a query is never its negative.

    Excluded are the documents that it knows to be relevant, wherever they stand; the variants of its own relevant documents;
    and what another row with the same query owns. A document known to be worse is judged, and so exempt from the mask.
    """
    wide = keys.product_M.shape[0]
    own_QN = torch.where(keys.own_QN >= 0, keys.own_QN, wide)  # padding goes to a column that is cut off
    own_QM = torch.zeros((len(keys), wide + 1), dtype=torch.bool, device=own_QN.device).scatter_(1, own_QN, value=True)[:, :wide]
    known_QM = _known_grades(keys)
    groups_U, group_M = keys.group_M.unique(return_inverse=True)
    groups_QN = keys.group_M[keys.own_QN.clamp(min=0)]
    relevant_QN = (keys.own_QN >= 0) & (keys.grades_QN >= positive)
    family_QM = _marked(groups_U, groups_QN, relevant_QN.to(torch.int8), empty=0)[:, group_M] > 0
    excluded_QM = (known_QM >= positive) | family_QM | (_owned_by_twins(keys) & ~own_QM)
    known = known_QM >= 0
    return Exclusions(exclude_QM=excluded_QM, judged_QM=known & (known_QM < positive), unlabelled_QM=~(excluded_QM | own_QM | known))


def terms(objective: Objective, queries_QD: Tensor, documents_MD: Tensor, keys: Keys) -> tuple[dict[str, Term], dict[str, Loss]]:
    """Return the parts of the loss by name, and numbers to log, each as a sum and a count to be added up over processes.

    Vectors are of unit length, `documents_MD` in the order of the keys. Masks are decided here, once, from the full vectors:
    `mask_rate` is of the negatives, `rows_masked` of the queries with a positive.
    """
    if queries_QD.shape[0] != len(keys) or documents_MD.shape[0] != keys.product_M.shape[0]:
        have = f"{queries_QD.shape[0]} queries and {documents_MD.shape[0]} documents"
        raise EncoderError(f"There are vectors of {have}, but keys of {len(keys)} and {keys.product_M.shape[0]}. Gather both alike.")
    nested = nested_cosines(queries_QD, documents_MD, dims=objective.dims)
    masks = exclusions(keys, positive=objective.positive)
    logged: dict[str, Loss] = {}
    losses: dict[str, Callable[[Tensor], Loss]] = {}
    if "infonce" in objective.parts:
        losses["infonce"], logged = _infonce(objective, nested[0], keys, masks)
    losses["supcon"] = partial(_supcon, objective, keys, masks)
    losses["roar"] = partial(_roar, objective, keys, masks)
    losses["circle"] = partial(_circle, objective, keys)
    found = {name: matryoshka(losses[name], nested) for name in objective.parts}
    return {name: Term(num=num, count=count, weight=objective.parts[name]) for name, (num, count) in found.items()}, logged


def _infonce(objective: Objective, full_QM: Tensor, keys: Keys, masks: Exclusions) -> tuple[Callable[[Tensor], Loss], dict[str, Loss]]:
    """Return InfoNCE with its mask decided from the full vectors, and what the mask takes away."""
    relevant_Q = (keys.own_QN[:, 0] >= 0) & (keys.grades_QN[:, 0] >= objective.positive)
    positive_Q = torch.where(relevant_Q, keys.own_QN[:, 0], -1)
    known = {"exclude_QM": masks.exclude_QM, "judged_QM": masks.judged_QM}
    masked_QM = false_negatives_QM(full_QM, positive_Q, delta=objective.delta, max_mask_frac=objective.max_mask_frac, **known)
    candidates_QM = negatives_QM(full_QM, positive_Q, exclude_QM=masks.exclude_QM)
    logged = {
        "mask_rate": (masked_QM.sum().float(), candidates_QM.sum().float()),
        "rows_masked": (masked_QM.any(dim=1).sum().float(), relevant_Q.sum().float()),
    }
    excluded_QM = masks.exclude_QM | masked_QM
    return partial(masked_infonce, positive_Q=positive_Q, tau=objective.tau, delta=None, exclude_QM=excluded_QM), logged


def _supcon(objective: Objective, keys: Keys, masks: Exclusions, scores_QM: Tensor) -> Loss:
    scores_QN, valid_QN = _own(scores_QM, keys)
    strangers_QM = scores_QM.masked_fill(~masks.unlabelled_QM, -torch.inf)
    weights = objective.thresholds
    return ordinal_supcon(scores_QN, keys.grades_QN, valid_QN, tau=objective.tau, weights=weights, unlabelled_QU=strangers_QM)


def _roar(objective: Objective, keys: Keys, masks: Exclusions, scores_QM: Tensor) -> Loss:
    scores_QN, valid_QN = _own(scores_QM, keys)
    batch = objective.denominator == "batch"
    return roar(
        scores_QN,
        keys.grades_QN,
        valid_QN,
        tau=objective.tau_a,
        margin=objective.margin,
        form=objective.form,
        denominator=objective.denominator,
        bystanders_QU=scores_QM.detach().masked_fill(~masks.unlabelled_QM, -torch.inf) if batch else None,
    )


def _circle(objective: Objective, keys: Keys, scores_QM: Tensor) -> Loss:
    scores_QN, valid_QN = _own(scores_QM, keys)
    shape = {"mu": objective.mu, "gamma": objective.gamma}
    return multiclass_circle(scores_QN, keys.grades_QN, valid_QN, targets=objective.targets or (), omega=objective.omega, **shape)


def _own(scores_QM: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Return the scores of the own documents of each query, and which places hold one."""
    return scores_QM.gather(1, keys.own_QN.clamp(min=0)), keys.own_QN >= 0


def _known_grades(keys: Keys) -> Tensor:
    """Return what each query knows about each document, -1 for nothing. Of two labels of one product the better one holds."""
    products_U, product_M = keys.product_M.unique(return_inverse=True)
    own_QN = torch.where(keys.own_QN >= 0, keys.product_M[keys.own_QN.clamp(min=0)], 0)
    labels_QK = torch.cat([keys.labels_QL, own_QN], dim=1)
    grades_QK = torch.cat([keys.label_grades_QL, keys.grades_QN], dim=1)
    return _marked(products_U, labels_QK, grades_QK, empty=-1)[:, product_M]


def _marked(sorted_U: Tensor, keys_QK: Tensor, values_QK: Tensor, *, empty: int) -> Tensor:
    """Return for each row the highest value under each of the sorted keys, `empty` where it names none.

    A search in sorted keys: comparing each label with each document takes Q * L * M.
    """
    places_QK = _places(sorted_U, keys_QK)
    marked_QU = torch.full((len(keys_QK), len(sorted_U) + 1), empty, dtype=torch.int8, device=keys_QK.device)
    return marked_QU.scatter_reduce_(1, places_QK, values_QK.to(torch.int8), reduce="amax")[:, :-1]


def _owned_by_twins(keys: Keys) -> Tensor:
    """Return which documents belong to a row with the same query, here or in another process."""
    queries_V, query_Q = keys.query_Q.unique(return_inverse=True)
    owned_VM = torch.zeros((len(queries_V) + 1, keys.product_M.shape[0]), dtype=torch.bool, device=query_Q.device)
    owned_VM[_places(queries_V, keys.owner_P), keys.owned_P] = True
    return owned_VM[query_Q]


def _places(sorted_U: Tensor, keys_K: Tensor) -> Tensor:
    """Return where each key stands among the sorted ones, and their number for a key that is not there."""
    places_K = torch.searchsorted(sorted_U, keys_K.contiguous()).clamp(max=len(sorted_U) - 1)
    return torch.where(sorted_U[places_K] == keys_K, places_K, len(sorted_U))
