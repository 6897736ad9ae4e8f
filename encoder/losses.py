"""Losses over cosines: pure functions, each a sum and a count, so that parts of a batch and processes add up.

Never a mean: a mean of means is wrong as soon as the counts differ. All is computed in float32 or better, and no form uses
an epsilon or a clamp. A grade is a whole number, larger is better; -1 and an invalid place are left out, whatever they hold.
Shapes: Q queries, M documents of the whole batch, N own documents of a query, U documents of the batch that it does not
know, T thresholds, K = N, and one more where there are bystanders, D dimensions.
"""

# ruff: noqa: N802, N803, N806 - tensors carry their shape in their names

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional

from encoder.errors import EncoderError

Loss: TypeAlias = tuple[Tensor, Tensor]  # a sum and a count
Form = Literal["odds", "bt"]
Denominator = Literal["group", "batch"]


def masked_infonce(
    scores_QM: Tensor,
    positive_Q: Tensor,
    *,
    tau: float,
    delta: float | None,
    exclude_QM: Tensor | None = None,
    judged_QM: Tensor | None = None,
    max_mask_frac: float | None = None,
) -> Loss:
    """Return the cross-entropy of each query's positive among all documents but the excluded and the likely false negatives.

    `positive_Q` is a column, -1 where a query has none: such a row is not counted. A `delta` of None switches the mask off.
    """
    scores_QM = _wide(scores_QM)
    masks = {"exclude_QM": exclude_QM, "judged_QM": judged_QM}
    kept_QM = negatives_QM(scores_QM, positive_Q, exclude_QM=exclude_QM)
    kept_QM &= ~false_negatives_QM(scores_QM, positive_Q, delta=delta, max_mask_frac=max_mask_frac, **masks)
    # A row that is not counted keeps all its columns: log_softmax of nothing is NaN, also in the gradient.
    kept_QM |= _positives_QM(scores_QM, positive_Q) | (positive_Q < 0)[:, None]
    logits_QM = (scores_QM / tau).masked_fill(~kept_QM, -math.inf)
    num = functional.cross_entropy(logits_QM, positive_Q, ignore_index=-1, reduction="sum")
    return num, (positive_Q >= 0).sum().to(num.dtype)


def negatives_QM(scores_QM: Tensor, positive_Q: Tensor, *, exclude_QM: Tensor | None = None) -> Tensor:
    """Return which documents stand against the positive of a query before any mask: none where it has no positive."""
    negatives = ~_positives_QM(scores_QM, positive_Q) & (positive_Q >= 0)[:, None]
    return negatives if exclude_QM is None else negatives & ~exclude_QM


def false_negatives_QM(
    scores_QM: Tensor,
    positive_Q: Tensor,
    *,
    delta: float | None,
    exclude_QM: Tensor | None = None,
    judged_QM: Tensor | None = None,
    max_mask_frac: float | None = None,
) -> Tensor:
    """Return which unjudged negatives beat the positive by more than `delta`, in cosine, and so are likely not negative.

    A row that would lose more than `max_mask_frac` of its negatives loses none: there it is the positive that is bad.
    """
    if delta is None:
        return torch.zeros_like(scores_QM, dtype=torch.bool)
    scores_QM = _wide(scores_QM.detach())
    own_Q1 = scores_QM.gather(1, positive_Q.clamp(min=0)[:, None])
    candidates_QM = negatives_QM(scores_QM, positive_Q, exclude_QM=exclude_QM)
    masked_QM = candidates_QM & (scores_QM > own_Q1 + delta)
    if judged_QM is not None:
        masked_QM &= ~judged_QM
    if max_mask_frac is not None:
        masked_QM &= (masked_QM.sum(dim=1) <= max_mask_frac * candidates_QM.sum(dim=1))[:, None]
    return masked_QM


def ordinal_supcon(
    scores_QN: Tensor,
    grades_QN: Tensor,
    valid_QN: Tensor,
    *,
    tau: float,
    weights: Sequence[float] | None = None,
    unlabelled_QU: Tensor | None = None,
) -> Loss:
    """Return, at each boundary between grades, how far every document above it stands over all below it.

    Documents above do not compete with each other. `weights` has one number for each boundary, lowest first;
    `unlabelled_QU` are scores that stand below every boundary, -inf where there is no such document.
    """
    judged_QN, logits_QN = _judged(scores_QN, grades_QN, valid_QN, tau=tau)
    highest = _highest(grades_QN, judged_QN)
    if weights is not None and highest > len(weights):
        raise EncoderError(f"A document has grade {highest}, but {len(weights)} thresholds have weights. Give {highest} weights.")
    weights_T = logits_QN.new_tensor(weights if weights is not None else [1.0] * max(highest, 0))
    above_TQN = grades_QN >= torch.arange(1, len(weights_T) + 1, device=grades_QN.device)[:, None, None]
    below_TQN, above_TQN = ~above_TQN & judged_QN, above_TQN & judged_QN
    rivals_TQ = _logsumexp(logits_QN.expand(below_TQN.shape), below_TQN)
    if unlabelled_QU is not None:
        strangers_Q = _logsumexp(_wide(unlabelled_QU) / tau, unlabelled_QU > -math.inf)
        both_TQ2 = torch.stack([rivals_TQ, strangers_Q.expand(rivals_TQ.shape)], dim=-1)
        rivals_TQ = _logsumexp(both_TQ2, both_TQ2 > -math.inf)
    active_TQ = (rivals_TQ > -math.inf) & above_TQN.any(dim=-1)
    share_TQN = above_TQN / above_TQN.sum(dim=-1, keepdim=True).clamp(min=1)
    gaps_TQN = rivals_TQ.masked_fill(~active_TQ, 0.0)[:, :, None] - logits_QN
    losses_TQ = (functional.softplus(gaps_TQN) * share_TQN).sum(dim=-1)
    return (losses_TQ * active_TQ * weights_T[:, None]).sum(), (active_TQ * weights_T[:, None]).sum()


def roar(
    scores_QN: Tensor,
    grades_QN: Tensor,
    valid_QN: Tensor,
    *,
    tau: float,
    margin: float = 0.0,
    form: Form = "odds",
    denominator: Denominator = "group",
    bystanders_QU: Tensor | None = None,
) -> Loss:
    """Return how well the log odds of a better grade exceed those of the next grade that the query has.

    `bt` is Bradley-Terry: logits in the place of log odds. `bystanders_QU` are scores of other documents, -inf for none;
    they enlarge the denominator and get no gradient, else each misordered pair would push unrelated documents up.
    """
    _check_roar(form, denominator, bystanders_QU)
    judged_QN, logits_QN = _judged(scores_QN, grades_QN, valid_QN, tau=tau)
    pairs_QNN, transitions_Q = _consecutive(grades_QN, judged_QN)
    levels_QN = logits_QN
    if form == "odds":
        rest_Q = None
        if bystanders_QU is not None:
            rest_Q = _logsumexp(_wide(bystanders_QU.detach()) / tau, bystanders_QU > -math.inf)
        # A document alone has infinite odds; its group has no transition.
        levels_QN = logits_QN - _leave_one_out(logits_QN, judged_QN, rest_Q).masked_fill((transitions_Q == 0)[:, None], 0.0)
    ahead_QNN = levels_QN[:, :, None] - levels_QN[:, None, :]
    return (pairs_QNN * functional.softplus(margin - ahead_QNN)).sum(), transitions_Q.sum().to(logits_QN.dtype)


def multiclass_circle(
    scores_QN: Tensor,
    grades_QN: Tensor,
    valid_QN: Tensor,
    *,
    targets: Sequence[float],
    mu: float = 0.25,
    gamma: float = 64.0,
    omega: Sequence[float] | None = None,
) -> Loss:
    """Return the circle loss of each pair of grades, its cosines scaled so that the two targets are 0 and 1.

    `omega` weighs a pair by the distance of its grades, from 1 on; the default is 1 for neighbours and 0.5 for the others.
    This is the only loss here that notices when all cosines of a query shift.
    """
    check_targets(targets)
    if omega is not None and len(omega) != len(targets) - 1:
        raise EncoderError(
            f"omega has {len(omega)} weights, but {len(targets)} grades have {len(targets) - 1} distances. Give one for each."
        )
    judged_QN = valid_QN & (grades_QN >= 0)
    highest = _highest(grades_QN, judged_QN)
    if highest >= len(targets):
        raise EncoderError(f"A document has grade {highest}, but there are {len(targets)} targets. Give a target for every grade.")
    scores_QN = _wide(scores_QN).masked_fill(~judged_QN, 0.0)
    sums, counts = [], []
    for low, high in combinations(range(len(targets)), 2):
        scaled_QN = (scores_QN - targets[low]) / (targets[high] - targets[low])
        good_QN, bad_QN = scaled_QN.clamp(max=1.0), scaled_QN.clamp(min=0.0)
        is_good_QN, is_bad_QN = judged_QN & (grades_QN == high), judged_QN & (grades_QN == low)
        pull_QN = -gamma * (1.0 + mu - good_QN.detach()).relu() * (good_QN - (1.0 - mu))
        push_QN = gamma * (bad_QN.detach() + mu).relu() * (bad_QN - mu)
        present_Q = is_good_QN.any(dim=1) & is_bad_QN.any(dim=1)
        sums_Q = _logsumexp(pull_QN, is_good_QN) + _logsumexp(push_QN, is_bad_QN)
        weight = (1.0 if high - low == 1 else 0.5) if omega is None else omega[high - low - 1]
        losses_Q = functional.softplus(sums_Q.masked_fill(~present_Q, 0.0)) * present_Q
        sums.append(weight * losses_Q.sum())
        counts.append(weight * present_Q.sum().to(losses_Q.dtype))
    return torch.stack(sums).sum(), torch.stack(counts).sum()


def check_targets(targets: Sequence[float]) -> None:
    """Refuse target cosines that do not rise from grade to grade."""
    if len(targets) < 2 or not all(low < high for low, high in pairwise(targets)):  # noqa: PLR2004  a pair of grades
        raise EncoderError(f"The targets are {list(targets)}. Give two or more cosines, each above the one before.")


def cosines(queries_QD: Tensor, documents_MD: Tensor) -> Tensor:
    """Return the products of unit vectors in float32 or better, also under autocast."""
    with torch.autocast(device_type=queries_QD.device.type, enabled=False):
        return _wide(queries_QD) @ _wide(documents_MD).T


def nested_cosines(queries_QD: Tensor, documents_MD: Tensor, *, dims: Sequence[int] = ()) -> list[Tensor]:
    """Return the cosines of the full vectors, then of their first dimensions for each of `dims`, at unit length again."""
    full = queries_QD.shape[1]
    if any(not 1 <= kept <= full for kept in dims):
        raise EncoderError(f"Matryoshka dimensions are {list(dims)}, but a vector has {full}. Give numbers from 1 to {full}.")
    shorter = sorted(set(dims) - {full}, reverse=True)
    pieces = [[functional.normalize(_wide(side[:, :kept]), dim=-1) for side in (queries_QD, documents_MD)] for kept in shorter]
    return [cosines(queries_QD, documents_MD), *(cosines(queries_Qd, documents_Md) for queries_Qd, documents_Md in pieces)]


def matryoshka(loss: Callable[[Tensor], Loss], nested: Sequence[Tensor]) -> Loss:
    """Return one loss over all lengths of a vector. Its masks must be decided before, from the full vectors.

    Sums and counts both add up, so the quotient is a mean over lengths and a rate tuned without it stays right.
    """
    sums, counts = zip(*(loss(scores_QM) for scores_QM in nested), strict=True)
    return torch.stack(sums).sum(), torch.stack(counts).sum()


def _wide(numbers: Tensor) -> Tensor:
    return numbers if numbers.dtype == torch.float64 else numbers.float()


def _positives_QM(scores_QM: Tensor, positive_Q: Tensor) -> Tensor:
    return torch.arange(scores_QM.shape[1], device=scores_QM.device) == positive_Q[:, None]


def _judged(scores_QN: Tensor, grades_QN: Tensor, valid_QN: Tensor, *, tau: float) -> tuple[Tensor, Tensor]:
    """Return which places count, and the logits with zero in the others: padding may hold anything, also NaN."""
    judged_QN = valid_QN & (grades_QN >= 0)
    return judged_QN, _wide(scores_QN).masked_fill(~judged_QN, 0.0) / tau


def _highest(grades_QN: Tensor, judged_QN: Tensor) -> int:
    return int(grades_QN.masked_fill(~judged_QN, -1).max()) if grades_QN.numel() else -1


def _logsumexp(values: Tensor, keep: Tensor) -> Tensor:
    """Return the logsumexp of the kept values along the last dimension: -inf, with a gradient of zero, where there are none."""
    empty = ~keep.any(dim=-1, keepdim=True)
    # Zeros in the place of an empty row: the gradient of a logsumexp over nothing but -inf is NaN.
    sums = values.masked_fill(~keep, -math.inf).masked_fill(empty, 0.0).logsumexp(dim=-1)
    return sums.masked_fill(empty.squeeze(-1), -math.inf)


def _leave_one_out(logits_QN: Tensor, judged_QN: Tensor, rest_Q: Tensor | None) -> Tensor:
    """Return for each document the logsumexp of all others of its group, and of the bystanders.

    Each is summed on its own: the whole less the own part cancels to nothing where one document holds all the probability.
    """
    width = logits_QN.shape[1]
    others_QNK = judged_QN[:, None, :] & ~torch.eye(width, dtype=torch.bool, device=logits_QN.device)
    logits_QNK = logits_QN[:, None, :].expand(others_QNK.shape)
    if rest_Q is not None:
        rest_QN1 = rest_Q[:, None, None].expand(-1, width, 1)
        logits_QNK, others_QNK = torch.cat([logits_QNK, rest_QN1], dim=-1), torch.cat([others_QNK, rest_QN1 > -math.inf], dim=-1)
    return _logsumexp(logits_QNK, others_QNK)


def _consecutive(grades_QN: Tensor, judged_QN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of each pair (better, worse) of consecutive present grades, and the transitions of each query.

    The weights of one transition add up to 1. All pairs at once: on one busy core ROAR of
    64 queries with 20 documents takes 2 ms with its gradient, and 800 ms in a loop over queries and documents.
    """
    known_QN = grades_QN.masked_fill(~judged_QN, -1)
    below_QNN = (known_QN[:, :, None] > known_QN[:, None, :]) & judged_QN[:, None, :]
    next_QN = known_QN[:, None, :].expand(below_QNN.shape).masked_fill(~below_QNN, -1).amax(dim=-1)
    pairs_QNN = below_QNN & (known_QN[:, None, :] == next_QN[:, :, None])
    same_QNN = (known_QN[:, :, None] == known_QN[:, None, :]) & judged_QN[:, None, :]
    sizes_QNN = same_QNN.sum(dim=-1)[:, :, None] * pairs_QNN.sum(dim=-1)[:, :, None]
    first_QN = ~same_QNN.tril(diagonal=-1).any(dim=-1)
    return pairs_QNN / sizes_QNN.clamp(min=1), (first_QN & pairs_QNN.any(dim=-1)).sum(dim=1)


def _check_roar(form: Form, denominator: Denominator, bystanders_QU: Tensor | None) -> None:
    if form not in get_args(Form) or denominator not in get_args(Denominator):
        raise EncoderError(f"form is {form!r}, denominator {denominator!r}. Choose {get_args(Form)} and {get_args(Denominator)}.")
    if (denominator == "batch") != (bystanders_QU is not None):
        raise EncoderError("The denominator `batch` and the bystanders belong together. Give both or neither.")
    if form == "bt" and denominator == "batch":
        raise EncoderError("Bradley-Terry has no denominator. Choose form `odds`, or denominator `group`.")
