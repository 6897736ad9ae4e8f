# ruff: noqa: N803, N806, N815 - tensors carry their shape in their names
from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encoder.errors import EncoderError
from encoder.losses import (
    Loss,
    cosines,
    false_negatives_QM,
    masked_infonce,
    matryoshka,
    multiclass_circle,
    nested_cosines,
    ordinal_supcon,
    roar,
)

TARGETS = (0.1, 0.3, 0.45, 0.8)
Naive = tuple[float, float]
Row = list[tuple[float, int]]  # the scores and grades of one query, padding left out


@dataclass(frozen=True)
class Groups:
    """Random own documents of some queries, padded; bystanders with holes; one-grade, one-document and empty rows among them."""

    scores_QN: Tensor
    grades_QN: Tensor
    valid_QN: Tensor
    others_QU: Tensor

    def rows(self, scores_QN: Tensor | None = None) -> list[Row]:
        table = (self.scores_QN if scores_QN is None else scores_QN).tolist()
        places = zip(table, self.grades_QN.tolist(), self.valid_QN.tolist(), strict=True)
        return [[(s, g) for s, g, ok in zip(*row, strict=True) if ok and g >= 0] for row in places]

    def others(self) -> list[list[float]]:
        return [[s for s in row if s > -math.inf] for row in self.others_QU.tolist()]


@st.composite
def groups(draw: st.DrawFn) -> Groups:
    draws = random.Random(draw(st.integers(0, 2**32)))
    queries, width, others = draws.randint(1, 4), draws.randint(1, 6), draws.randint(0, 4)
    # Few different scores: ties are common.
    scores = [[draws.choice([-0.4, 0.0, 0.25, 0.3, 0.31, draws.uniform(-1, 1)]) for _ in range(width)] for _ in range(queries)]
    palettes = [draws.choice([[0, 1, 2, 3], [2], [0, 3], [-1, 1, 2], [-1]]) for _ in range(queries)]
    grades = [[draws.choice(palette) for _ in range(width)] for palette in palettes]
    lengths = [draws.choice([0, 1, width, width]) for _ in range(queries)]
    strangers = [[draws.choice([-math.inf, draws.uniform(-1, 1)]) for _ in range(others)] for _ in range(queries)]
    return Groups(
        scores_QN=torch.tensor(scores, dtype=torch.float64),
        grades_QN=torch.tensor(grades, dtype=torch.int8),
        valid_QN=torch.arange(width) < torch.tensor(lengths)[:, None],
        others_QU=torch.tensor(strangers, dtype=torch.float64).reshape(queries, others),
    )


def lse(values: Iterable[float]) -> float:
    listed = list(values)
    top = max(listed, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(value - top) for value in listed))


def softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def naive_infonce(
    scores: list[list[float]], positive: list[int], excluded: list[list[bool]], judged: list[list[bool]], **how: Any
) -> Naive:
    num = count = 0.0
    for row, own, out, known in zip(scores, positive, excluded, judged, strict=True):
        if own < 0:
            continue
        negatives = [j for j in range(len(row)) if j != own and not out[j]]
        delta, share = how["delta"], how["max_mask_frac"]
        masked = [j for j in negatives if delta is not None and not known[j] and row[j] > row[own] + delta]
        if share is not None and len(masked) > share * len(negatives):
            masked = []
        kept = [row[own], *(row[j] for j in negatives if j not in masked)]
        num += lse(s / how["tau"] for s in kept) - row[own] / how["tau"]
        count += 1
    return num, count


def naive_supcon(rows: list[Row], others: list[list[float]], *, tau: float, weights: Sequence[float]) -> Naive:
    num = count = 0.0
    for row, strangers in zip(rows, others, strict=True):
        for t in range(1, len(weights) + 1):
            above = [s for s, g in row if g >= t]
            below = [s for s, g in row if g < t] + strangers
            if above and below:
                n = lse(s / tau for s in below)
                num += weights[t - 1] * sum(softplus(n - s / tau) for s in above) / len(above)
                count += weights[t - 1]
    return num, count


def naive_roar(rows: list[Row], others: list[list[float]], *, tau: float, margin: float = 0.0, form: str = "odds") -> Naive:
    num = count = 0.0
    for row, strangers in zip(rows, others, strict=True):
        present = sorted({g for _, g in row})
        for low, high in itertools.pairwise(present):
            count += 1
            pairs = [(a, b) for a, (_, g) in enumerate(row) if g == high for b, (_, h) in enumerate(row) if h == low]
            for a, b in pairs:
                levels = [row[x][0] / tau for x in (a, b)]
                if form == "odds":
                    rest = [lse([row[k][0] / tau for k in range(len(row)) if k != x] + [s / tau for s in strangers]) for x in (a, b)]
                    levels = [level - less for level, less in zip(levels, rest, strict=True)]
                num += softplus(-(levels[0] - levels[1] - margin)) / len(pairs)
    return num, count


def naive_circle(rows: list[Row], *, targets: Sequence[float], mu: float, gamma: float, alphas: list[Row] | None = None) -> Naive:
    """`alphas` are the rows that the stopped-gradient factors read; finite differences must not move them."""
    num = count = 0.0
    for row, fixed in zip(rows, alphas or rows, strict=True):
        for v in range(len(targets)):
            for u in range(v + 1, len(targets)):
                width, omega = targets[u] - targets[v], 1.0 if u - v == 1 else 0.5
                both = [((s - targets[v]) / width, (f - targets[v]) / width, g) for (s, g), (f, _) in zip(row, fixed, strict=True)]
                good = [-gamma * max(0, 1 + mu - min(f, 1)) * (min(s, 1) - 1 + mu) for s, f, g in both if g == u]
                bad = [gamma * max(0, max(f, 0) + mu) * (max(s, 0) - mu) for s, f, g in both if g == v]
                if good and bad:
                    num += omega * softplus(lse(good) + lse(bad))
                    count += omega
    return num, count


def check(loss: Callable[[Tensor], Loss], naive: Callable[[Tensor], Naive], scores: Tensor) -> None:
    """Compare value, count and gradient; the gradient with central differences of the naive form at a few places."""
    leaf = scores.clone().requires_grad_()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        num, count = loss(leaf)
        num.backward()
    want_num, want_count = naive(scores)
    assert num.shape == count.shape == ()
    assert not count.requires_grad
    assert count.item() == pytest.approx(want_count)
    assert num.item() == pytest.approx(want_num, rel=1e-7, abs=1e-7)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    for place in range(0, scores.numel(), max(1, scores.numel() // 4)):
        step = torch.zeros(scores.numel(), dtype=torch.float64)
        step[place] = 1e-6
        ends = [naive(scores + sign * step.view_as(scores))[0] for sign in (1, -1)]
        assert leaf.grad.view(-1)[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), delta=st.sampled_from([None, -0.3, 0.0, 0.1]), share=st.sampled_from([None, 0.05, 0.5]))
def test_infonce_is_its_double_loop(seed: int, delta: float | None, share: float | None) -> None:
    draws = torch.Generator().manual_seed(seed)
    scores_QM = torch.rand((4, 6), generator=draws, dtype=torch.float64) * 0.9
    positive_Q = torch.randint(-1, 6, (4,), generator=draws)
    exclude_QM, judged_QM = (torch.rand((4, 6), generator=draws) < share for share in (0.3, 0.4))
    exclude_QM[0] = True
    how: dict[str, Any] = {"tau": 0.05, "delta": delta, "max_mask_frac": share}
    masks = (exclude_QM.tolist(), judged_QM.tolist())
    # The mask is decided from similarities without a gradient, so differences keep it: no score here stands on its border.
    check(
        lambda leaf: masked_infonce(leaf, positive_Q, exclude_QM=exclude_QM, judged_QM=judged_QM, **how),
        lambda moved: naive_infonce(moved.tolist(), positive_Q.tolist(), *masks, **how),
        scores_QM,
    )


@settings(deadline=None, max_examples=30)
@given(data=groups(), tau=st.sampled_from([0.05, 0.3]), strangers=st.booleans(), weights=st.sampled_from([None, (1.0, 0.5, 2.0)]))
def test_supcon_is_its_double_loop(data: Groups, tau: float, *, strangers: bool, weights: tuple[float, ...] | None) -> None:
    unlabelled = data.others_QU if strangers else None
    others = data.others() if strangers else [[] for _ in data.rows()]
    check(
        lambda leaf: ordinal_supcon(leaf, data.grades_QN, data.valid_QN, tau=tau, weights=weights, unlabelled_QU=unlabelled),
        lambda moved: naive_supcon(data.rows(moved), others, tau=tau, weights=weights or (1.0, 1.0, 1.0)),
        data.scores_QN,
    )


@settings(deadline=None, max_examples=30)
@given(data=groups(), tau=st.sampled_from([0.02, 0.3]), margin=st.sampled_from([0.0, 0.7]), kind=st.sampled_from(["odds", "bt", "batch"]))
def test_roar_is_its_double_loop(data: Groups, tau: float, margin: float, kind: str) -> None:
    batch = kind == "batch"
    others = data.others() if batch else [[] for _ in data.rows()]
    how: dict[str, Any] = {"tau": tau, "margin": margin, "form": "bt" if kind == "bt" else "odds"}
    extra: dict[str, Any] = {"denominator": "batch", "bystanders_QU": data.others_QU} if batch else {}
    check(
        lambda leaf: roar(leaf, data.grades_QN, data.valid_QN, **how, **extra),
        lambda moved: naive_roar(data.rows(moved), others, **how),
        data.scores_QN,
    )


@settings(deadline=None, max_examples=30)
@given(data=groups(), mu=st.sampled_from([0.25, 0.4]), gamma=st.sampled_from([8.0, 64.0]))
def test_circle_is_its_double_loop(data: Groups, mu: float, gamma: float) -> None:
    # Off the corners of the clamps, where there is no derivative.
    scores_QN = data.scores_QN + 0.0123
    how: dict[str, Any] = {"targets": TARGETS, "mu": mu, "gamma": gamma}
    check(
        lambda leaf: multiclass_circle(leaf, data.grades_QN, data.valid_QN, **how),
        lambda moved: naive_circle(data.rows(moved), alphas=data.rows(scores_QN), **how),
        scores_QN,
    )


LOSSES: dict[str, Callable[[Groups], Loss]] = {
    "supcon": lambda data: ordinal_supcon(data.scores_QN, data.grades_QN, data.valid_QN, tau=0.05),
    "roar": lambda data: roar(data.scores_QN, data.grades_QN, data.valid_QN, tau=0.05),
    "bt": lambda data: roar(data.scores_QN, data.grades_QN, data.valid_QN, tau=0.05, form="bt"),
    "circle": lambda data: multiclass_circle(data.scores_QN, data.grades_QN, data.valid_QN, targets=TARGETS),
}


def shifted(data: Groups, by: float) -> Groups:
    return Groups(data.scores_QN + by, data.grades_QN, data.valid_QN, data.others_QU)


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=30)
@given(data=groups(), cut=st.integers(0, 4))
def test_sums_and_counts_add_up_over_any_split_of_the_queries(name: str, data: Groups, cut: int) -> None:
    tensors = (data.scores_QN, data.grades_QN, data.valid_QN, data.others_QU)
    parts = [Groups(*(tensor[rows] for tensor in tensors)) for rows in (slice(cut), slice(cut, None))]
    pieces = [LOSSES[name](part) for part in parts if part.scores_QN.shape[0]]
    whole = LOSSES[name](data)
    for place in (0, 1):
        assert sum(piece[place].item() for piece in pieces) == pytest.approx(whole[place].item(), abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(data=groups(), by=st.floats(-0.5, 0.5))
def test_relative_losses_do_not_notice_a_shift_of_all_scores(data: Groups, by: float) -> None:
    for name in ("supcon", "roar", "bt"):
        assert LOSSES[name](shifted(data, by))[0].item() == pytest.approx(LOSSES[name](data)[0].item(), rel=1e-7, abs=1e-7)
    positive_Q = torch.zeros(len(data.scores_QN), dtype=torch.int64)
    nums = [masked_infonce(scores, positive_Q, tau=0.05, delta=None)[0].item() for scores in (data.scores_QN, data.scores_QN + by)]
    assert nums[0] == pytest.approx(nums[1], rel=1e-7, abs=1e-7)


def test_circle_notices_a_shift_of_all_scores() -> None:
    data = group([(0.4, 3), (0.3, 0)])
    assert abs(LOSSES["circle"](shifted(data, 0.1))[0].item() - LOSSES["circle"](data)[0].item()) > 0.1


def group(*rows: Row, dtype: torch.dtype = torch.float64) -> Groups:
    return Groups(
        scores_QN=torch.tensor([[s for s, _ in row] for row in rows], dtype=dtype),
        grades_QN=torch.tensor([[g for _, g in row] for row in rows], dtype=torch.int8),
        valid_QN=torch.ones((len(rows), len(rows[0])), dtype=torch.bool),
        others_QU=torch.zeros((len(rows), 0), dtype=dtype),
    )


def gap_of(num: float) -> float:
    """Return the Delta of one pair from its loss softplus(-Delta)."""
    return -math.log(math.expm1(num))


@settings(deadline=None)
@given(scores=st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=6), swap=st.booleans())
def test_the_log_odds_ratio_of_a_pair_is_one_to_two_logit_differences(scores: list[float], *, swap: bool) -> None:
    # One document of grade 1 and one of grade 0; the others (unjudged here) stand in the denominator alone.
    tau, (a, b) = 0.2, (1, 0) if swap else (0, 1)
    z = [score / tau for score in scores]
    data = group([(scores[a], 1), (scores[b], 0)])
    rest = torch.tensor([scores[2:]], dtype=torch.float64).reshape(1, -1)
    num, _ = roar(data.scores_QN, data.grades_QN, data.valid_QN, tau=tau, denominator="batch", bystanders_QU=rest)
    delta, dz, r = gap_of(num.item()), z[a] - z[b], sum(math.exp(x) for x in z[2:])
    assert delta == pytest.approx(dz + math.log((math.exp(z[a]) + r) / (math.exp(z[b]) + r)), abs=1e-9)
    assert abs(dz) - 1e-9 <= abs(delta) <= 2 * abs(dz) + 1e-9
    assert delta * dz >= -1e-12
    if len(scores) == 2:
        assert delta == pytest.approx(2 * dz, abs=1e-9)
    bt, _ = roar(data.scores_QN, data.grades_QN, data.valid_QN, tau=tau, form="bt")
    assert gap_of(bt.item()) == pytest.approx(dz, abs=1e-9)


def test_roar_sees_a_misordered_pair_at_tau_001_in_float32() -> None:
    data = group([(0.1, 1), (0.5, 0)], dtype=torch.float32)
    leaf = data.scores_QN.requires_grad_()
    num, count = roar(leaf, data.grades_QN, data.valid_QN, tau=0.01)
    num.backward()
    assert num.dtype == count.dtype == torch.float32
    assert num.item() == pytest.approx(80, rel=1e-5)
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[pytest.approx(-200, rel=1e-4), pytest.approx(200, rel=1e-4)]]


@pytest.mark.parametrize("gap", [0.05, 0.2, 0.9, 1.9])
def test_roar_in_float32_is_roar_in_float64_where_one_document_holds_all_the_probability(gap: float) -> None:
    wide = group([(gap - 0.95, 0), (-0.95, 1), (-0.9, 2), (-0.93, 3), (-0.95, 3)])
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = wide.scores_QN.to(dtype).requires_grad_()
        num, _ = roar(leaf, wide.grades_QN, wide.valid_QN, tau=0.01)
        num.backward()
        assert leaf.grad is not None
        found.append([num.item(), *leaf.grad[0].tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-3)
    assert found[1][0] == pytest.approx(naive_roar(wide.rows(), [[]], tau=0.01)[0], rel=1e-9)


@pytest.mark.parametrize("row", [[(0.2, 2), (0.4, 2)], [(0.2, 3), (float("nan"), -1)], [(float("nan"), -1), (0.1, -1)]])
def test_groups_without_two_grades_count_nothing_and_have_a_gradient_of_zero(row: Row) -> None:
    for loss in LOSSES.values():
        data = group(row)
        leaf = data.scores_QN.requires_grad_()
        num, count = loss(Groups(leaf, data.grades_QN, data.valid_QN, data.others_QU))
        num.backward()
        assert (num.item(), count.item()) == (0.0, 0.0)
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [[0.0, 0.0]]


def test_bystanders_get_no_gradient_and_soften_the_odds() -> None:
    data = group([(0.1, 1), (0.5, 0)])
    bystanders_QU = torch.tensor([[0.5, 0.6, -math.inf]], dtype=torch.float64, requires_grad=True)
    leaf = data.scores_QN.requires_grad_()
    num, _ = roar(leaf, data.grades_QN, data.valid_QN, tau=0.1, denominator="batch", bystanders_QU=bystanders_QU)
    num.backward()
    assert bystanders_QU.grad is None
    assert num.item() < roar(leaf, data.grades_QN, data.valid_QN, tau=0.1)[0].item()


def test_a_slope_of_bradley_terry_is_one_and_of_odds_two_in_a_group_of_two() -> None:
    for form, slope in (("bt", 1.0), ("odds", 2.0)):
        data = group([(-0.9, 1), (0.9, 0)])
        leaf = data.scores_QN.requires_grad_()
        roar(leaf, data.grades_QN, data.valid_QN, tau=0.01, form=form)[0].backward()  # type: ignore[arg-type]
        assert leaf.grad is not None
        assert leaf.grad[0].tolist() == pytest.approx([-100 * slope, 100 * slope])


@settings(deadline=None)
@given(scores=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=2, max_size=8))
def test_circle_with_targets_0_and_1_is_the_original_circle_loss(scores: Row) -> None:
    data, mu, gamma = group(scores), 0.25, 32.0
    num, count = multiclass_circle(data.scores_QN, data.grades_QN, data.valid_QN, targets=(0.0, 1.0), mu=mu, gamma=gamma)
    positives, negatives = [[s for s, g in scores if g == grade] for grade in (1, 0)]
    # Sun et al. 2020, equation 6: optima 1 + m and -m, margins 1 - m and m.
    pull = sum(math.exp(-gamma * max(1 + mu - s, 0) * (s - (1 - mu))) for s in positives)
    push = sum(math.exp(gamma * max(s + mu, 0) * (s - mu)) for s in negatives)
    assert count.item() == bool(positives and negatives)
    assert num.item() == pytest.approx(math.log1p(pull * push), rel=1e-7, abs=1e-7)


def test_the_mask_drops_what_beats_the_positive_and_spares_the_judged_and_the_positive_itself() -> None:
    scores_QM = torch.tensor([[0.3, 0.6, 0.6, 0.35, 0.1]])
    positive_Q = torch.tensor([0])
    judged_QM = torch.tensor([[False, False, True, False, False]])
    masked = false_negatives_QM(scores_QM, positive_Q, delta=0.1, judged_QM=judged_QM)
    assert masked.tolist() == [[False, True, False, False, False]]
    masked = false_negatives_QM(scores_QM, positive_Q, delta=-0.5, judged_QM=judged_QM, exclude_QM=torch.ones_like(judged_QM))
    assert not masked.any(), "what is excluded needs no mask"
    masked = false_negatives_QM(scores_QM, positive_Q, delta=-0.5, judged_QM=judged_QM)
    assert masked.tolist() == [[False, True, False, True, True]], "below zero all unjudged go, the positive never"
    num, count = masked_infonce(scores_QM, positive_Q, tau=0.1, delta=-0.5)
    assert (num.item(), count.item()) == (0.0, 1.0), "no surviving negative is a loss of 0, and counts"


def test_a_row_that_would_lose_too_many_negatives_loses_none() -> None:
    scores_QM = torch.zeros((2, 21))
    scores_QM[0, 1], scores_QM[1, 1:3] = 0.9, 0.9
    positive_Q = torch.tensor([0, 0])
    masked = false_negatives_QM(scores_QM, positive_Q, delta=0.1, max_mask_frac=0.05)
    assert masked.sum(dim=1).tolist() == [1, 0], "1 of 20 is 5 %, 2 of 20 are more"


def test_the_mask_sends_no_gradient() -> None:
    scores_QM = torch.tensor([[0.3, 0.6, 0.2]], requires_grad=True)
    masked_infonce(scores_QM, torch.tensor([0]), tau=0.1, delta=0.1)[0].backward()
    assert scores_QM.grad is not None
    assert scores_QM.grad[0, 1] == 0
    assert scores_QM.grad[0, 2] > 0


def test_bad_arguments_are_refused_with_their_values() -> None:
    data = group([(0.4, 3), (0.3, 0)])
    three = (data.scores_QN, data.grades_QN, data.valid_QN)
    for targets in ((0.1, 0.1), (0.5, 0.2, 0.9), (0.5,), (0.1, float("nan"))):
        with pytest.raises(EncoderError, match="each above the one before"):
            multiclass_circle(*three, targets=targets)
    with pytest.raises(EncoderError, match="grade 3, but there are 2 targets"):
        multiclass_circle(*three, targets=(0.1, 0.5))
    with pytest.raises(EncoderError, match="3 distances"):
        multiclass_circle(*three, targets=TARGETS, omega=(1.0,))
    with pytest.raises(EncoderError, match="grade 3, but 2 thresholds"):
        ordinal_supcon(*three, tau=0.1, weights=(1.0, 1.0))
    with pytest.raises(EncoderError, match="both or neither"):
        roar(*three, tau=0.1, denominator="batch")
    with pytest.raises(EncoderError, match="no denominator"):
        roar(*three, tau=0.1, form="bt", denominator="batch", bystanders_QU=data.others_QU)
    with pytest.raises(EncoderError, match="sigmoid"):
        roar(*three, tau=0.1, form="sigmoid")  # type: ignore[arg-type]


def unit(rows: int, dims: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn((rows, dims), generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_matryoshka_of_the_full_length_is_the_plain_loss_and_of_others_the_sum_over_them() -> None:
    queries_QD, documents_MD, positive_Q = unit(5, 16, 0), unit(7, 16, 1), torch.arange(5)

    def loss(scores_QM: Tensor) -> Loss:
        return masked_infonce(scores_QM, positive_Q, tau=0.05, delta=None)

    plain = loss(cosines(queries_QD, documents_MD))
    for dims in ((), (16,), (16, 16)):
        assert matryoshka(loss, nested_cosines(queries_QD, documents_MD, dims=dims)) == plain
    nested = nested_cosines(queries_QD, documents_MD, dims=(4, 8))
    by_hand = [torch.cosine_similarity(queries_QD[0, :kept], documents_MD[0, :kept], dim=0).item() for kept in (16, 8, 4)]
    assert [scores[0, 0].item() for scores in nested] == pytest.approx(by_hand, abs=1e-6)
    num, count = matryoshka(loss, nested)
    assert num.item() == pytest.approx(sum(loss(scores)[0].item() for scores in nested))
    assert count.item() == 15
    with pytest.raises(EncoderError, match="has 16"):
        nested_cosines(queries_QD, documents_MD, dims=(32,))


def test_cosines_are_float32_under_autocast() -> None:
    queries_QD, documents_MD = unit(3, 64, 0), unit(4, 64, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores_QM = cosines(queries_QD, documents_MD)
        assert scores_QM.dtype == torch.float32
    assert torch.equal(scores_QM, queries_QD @ documents_MD.T)
    assert cosines(queries_QD.double(), documents_MD.double()).dtype == torch.float64
