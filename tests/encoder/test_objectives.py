# ruff: noqa: N806 - tensors carry their shape in their names
from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encoder.errors import EncoderError
from encoder.examples import Batch
from encoder.losses import cosines, masked_infonce, roar
from encoder.objectives import Exclusions, Keys, Name, Objective, Term, against_all, exclusions, keys_of, terms

POSITIVE = 2
ALL: dict[Name, float] = {"infonce": 1.0, "supcon": 0.5, "roar": 0.1, "circle": 0.2}
TARGETS = (0.0, 0.2, 0.4, 0.8)
DIMS = 12


def a_batch(draws: random.Random, *, queries: int, documents: int, width: int, labels: int) -> Batch:
    """Return a batch with few different keys, so that products, families and queries meet by chance, within it and beyond."""
    own_QN = np.full((queries, width), -1, np.int64)
    grades_QN = np.full((queries, width), -1, np.int8)
    products = [draws.randint(1, 2 * documents) for _ in range(documents)]
    for row in range(queries):
        chosen = draws.sample(range(documents), draws.randint(0, min(width, documents)))
        grades = sorted((draws.randint(-1, 3) for _ in chosen), reverse=True)
        own_QN[row, : len(chosen)], grades_QN[row, : len(chosen)] = chosen, grades
    labels_QL = np.array([[draws.choice([0, draws.randint(1, 2 * documents)]) for _ in range(labels)] for _ in range(queries)])
    graded_QL = np.array([[draws.randint(0, 3) if key else -1 for key in row] for row in labels_QL])
    return Batch(
        queries=("",) * queries,
        documents=("",) * documents,
        own_QN=own_QN,
        grades_QN=grades_QN,
        query_key_Q=np.array([draws.randint(1, queries + 1) for _ in range(queries)], np.int64),
        product_key_M=np.array(products, np.int64),
        group_key_M=np.array([draws.choice([product, 100 + product % 3]) for product in products], np.int64),
        labels_QL=labels_QL.astype(np.int64).reshape(queries, labels),
        label_grades_QL=graded_QL.astype(np.int8).reshape(queries, labels),
    )


def padded(first: Any, second: Any, empty: int) -> Any:
    width = max(first.shape[1], second.shape[1])
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=empty) for part in (first, second)])


def together(first: Batch, second: Batch) -> Batch:
    """Return the two batches as one process would hold them."""
    later = np.where(second.own_QN >= 0, second.own_QN + len(first.documents), -1)
    return Batch(
        queries=first.queries + second.queries,
        documents=first.documents + second.documents,
        own_QN=padded(first.own_QN, later, -1),
        grades_QN=padded(first.grades_QN, second.grades_QN, -1),
        query_key_Q=np.concatenate([first.query_key_Q, second.query_key_Q]),
        product_key_M=np.concatenate([first.product_key_M, second.product_key_M]),
        group_key_M=np.concatenate([first.group_key_M, second.group_key_M]),
        labels_QL=padded(first.labels_QL, second.labels_QL, 0),
        label_grades_QL=padded(first.label_grades_QL, second.label_grades_QL, -1),
    )


def as_processes(first: Batch, second: Batch) -> list[Keys]:
    """Return the keys of two processes that have gathered each other's documents."""
    keys = [keys_of(first), keys_of(second)]
    offsets = [0, len(first.documents)]
    moved = [against_all(key, gather=lambda rows: rows, offset=offset) for key, offset in zip(keys, offsets, strict=True)]
    found = []
    for key, offset in zip(keys, offsets, strict=True):
        gathered = iter([torch.cat([getattr(each, name) for each in moved]) for name in ("product_M", "group_M", "owned_P", "owner_P")])
        found.append(against_all(key, gather=lambda _, pieces=gathered: next(pieces), offset=offset))  # type: ignore[misc]
    return found


def two_batches(seed: int) -> tuple[Batch, Batch]:
    draws = random.Random(seed)
    shapes = [{"queries": draws.randint(1, 4), "documents": draws.randint(2, 7), "width": draws.randint(1, 4)} for _ in range(2)]
    first, second = (a_batch(draws, labels=draws.randint(0, 3), **shape) for shape in shapes)
    return first, second


def naive_exclusions(batch: Batch) -> Exclusions:
    shape = (len(batch.queries), len(batch.documents))
    exclude, judged, unlabelled = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    product, group = batch.product_key_M.tolist(), batch.group_key_M.tolist()
    own = [
        [(j, g) for j, g in zip(*row, strict=True) if j >= 0] for row in zip(batch.own_QN.tolist(), batch.grades_QN.tolist(), strict=True)
    ]
    for i in range(shape[0]):
        labels = list(zip(batch.labels_QL[i].tolist(), batch.label_grades_QL[i].tolist(), strict=True))
        labels += [(product[j], g) for j, g in own[i]]
        relevant = [j for j, g in own[i] if g >= POSITIVE]
        for j in range(shape[1]):
            is_own = any(k == j for k, _ in own[i])
            known = max([g for key, g in labels if key == product[j]], default=-1)
            same_family = any(group[j] == group[k] or product[j] == product[k] for k in relevant)
            twins = [r for r in range(shape[0]) if r != i and batch.query_key_Q[r] == batch.query_key_Q[i]]
            same_query = not is_own and any(k == j for r in twins for k, _ in own[r])
            exclude[i, j] = known >= POSITIVE or same_family or same_query
            judged[i, j] = 0 <= known < POSITIVE
            unlabelled[i, j] = not exclude[i, j] and not is_own and known < 0
    return Exclusions(exclude_QM=exclude, judged_QM=judged, unlabelled_QM=unlabelled)


def tensors(found: Exclusions) -> list[list[list[bool]]]:
    return [mask.tolist() for mask in (found.exclude_QM, found.judged_QM, found.unlabelled_QM)]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_exclusions_are_those_of_a_plain_loop_over_the_keys(seed: int) -> None:
    batch = together(*two_batches(seed))
    assert tensors(exclusions(keys_of(batch), positive=POSITIVE)) == tensors(naive_exclusions(batch))


def unit(rows: int, seed: int) -> Tensor:
    numbers = torch.randn((rows, DIMS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(numbers, dim=-1)


def total(found: list[dict[str, Term]]) -> Tensor:
    """Return the mean over processes of `W * sum(weight * num / count of all)`, which averaging the gradients makes of it."""
    world = len(found)
    losses = []
    for term in found:
        pieces = [part.weight * part.num / sum(each[name].count for each in found).clamp(min=1) for name, part in term.items()]
        losses.append(world * torch.stack(pieces).sum())
    return torch.stack(losses).mean()


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**32),
    how=st.fixed_dictionaries(
        {"delta": st.sampled_from([None, 0.1]), "denominator": st.sampled_from(["group", "batch"]), "dims": st.sampled_from([(), (4, 8)])}
    ),
)
def test_two_processes_with_gathered_documents_are_one_process(seed: int, how: dict[str, Any]) -> None:
    first, second = two_batches(seed)
    objective = Objective(parts=ALL, tau=0.1, tau_a=0.1, targets=TARGETS, **how)
    sides = [(len(first.queries) + len(second.queries), seed), (len(first.documents) + len(second.documents), seed + 1)]
    leaves = [[unit(*side).requires_grad_() for side in sides] for _ in range(2)]
    one, logged = terms(objective, leaves[0][0], leaves[0][1], keys_of(together(first, second)))
    rows = (slice(len(first.queries)), slice(len(first.queries), None))
    parts = [terms(objective, leaves[1][0][row], leaves[1][1], keys) for row, keys in zip(rows, as_processes(first, second), strict=True)]
    for name, term in one.items():
        assert sum(part[name].num.item() for part, _ in parts) == pytest.approx(term.num.item(), abs=1e-9)
        assert sum(part[name].count.item() for part, _ in parts) == pytest.approx(term.count.item(), abs=1e-9)
    for name, sums in logged.items():
        assert [sum(part[name][place].item() for _, part in parts) for place in (0, 1)] == [number.item() for number in sums]
    total([one]).backward()
    total([part for part, _ in parts]).backward()
    for alone, apart in zip(*leaves, strict=True):
        assert alone.grad is not None
        assert apart.grad is not None
        assert torch.allclose(alone.grad, apart.grad, atol=1e-9)


def example() -> Batch:
    """Two queries: 0 owns an E, a C and an I; 1 owns an E, which is a variant of the E of query 0, and an S."""
    return Batch(
        queries=("red mug", "mug"),
        documents=("mug red", "saucer", "lamp", "mug blue", "cup"),
        own_QN=np.array([[0, 1, 2], [3, 4, -1]]),
        grades_QN=np.array([[3, 1, 0], [3, 2, -1]], np.int8),
        query_key_Q=np.array([11, 12]),
        product_key_M=np.array([1, 2, 3, 4, 5]),
        group_key_M=np.array([90, 2, 3, 90, 5]),
        labels_QL=np.array([[1, 2, 3, 5], [4, 5, 2, 0]]),
        label_grades_QL=np.array([[3, 1, 0, 0], [3, 2, 1, -1]], np.int8),
    )


def test_exclusions_of_the_example_are_as_the_rules_say() -> None:
    found = exclusions(keys_of(example()), positive=POSITIVE)
    assert found.exclude_QM.int().tolist() == [[1, 0, 0, 1, 0], [1, 0, 0, 1, 1]], "variants, and the other positive of query 1"
    assert found.judged_QM.int().tolist() == [[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]]
    assert found.unlabelled_QM.int().tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]


def test_infonce_and_roar_of_the_example_read_the_columns_that_they_should() -> None:
    queries_QD, documents_MD = unit(2, 5), unit(5, 6)
    scores_QM = cosines(queries_QD, documents_MD)
    found, _ = terms(Objective(parts={"infonce": 1.0, "roar": 0.1}, delta=None), queries_QD, documents_MD, keys_of(example()))
    kept = [torch.tensor([[0, 1, 2, 4]]), torch.tensor([[3, 1, 2]])]
    rows = [masked_infonce(scores_QM[[i]].gather(1, columns), torch.tensor([0]), tau=0.02, delta=None) for i, columns in enumerate(kept)]
    assert found["infonce"].num.item() == pytest.approx(sum(num.item() for num, _ in rows))
    assert found["infonce"].count.item() == 2
    graded = [(scores_QM[[0]][:, [0, 1, 2]], [[3, 1, 0]]), (scores_QM[[1]][:, [3, 4]], [[3, 2]])]
    pairs = [roar(s, torch.tensor(g), torch.ones_like(s, dtype=torch.bool), tau=0.01) for s, g in graded]
    assert found["roar"].num.item() == pytest.approx(sum(num.item() for num, _ in pairs))
    assert (found["roar"].count.item(), found["roar"].weight) == (3, 0.1)


def test_a_query_without_a_relevant_document_is_no_row_of_infonce_and_still_one_of_roar() -> None:
    batch = replace(example(), grades_QN=np.array([[3, 1, 0], [1, 0, -1]], np.int8), labels_QL=np.zeros((2, 4), np.int64))
    found, logged = terms(Objective(parts={"infonce": 1.0, "roar": 0.1}), unit(2, 5), unit(5, 6), keys_of(batch))
    assert (found["infonce"].count.item(), found["roar"].count.item()) == (1, 3)
    assert (logged["rows_masked"][1].item(), logged["mask_rate"][1].item()) == (1, 3)


def test_masks_of_all_lengths_are_those_of_the_full_vectors() -> None:
    # Over 2 dimensions the stranger beats the positive by far; over all 4 it does not, and so stays a negative everywhere.
    batch = example()
    keys = keys_of(batch)
    queries_QD = torch.tensor([[0.1, 0.0, 0.995, 0.0], [0.1, 0.0, 0.995, 0.0]])
    documents_MD = torch.nn.functional.normalize(
        torch.tensor([[0.0, 1, 5, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 5, 0], [0, 0, 0, 1]]), dim=-1
    )
    full, logged = terms(Objective(delta=0.1, max_mask_frac=None, dims=(2,)), queries_QD, documents_MD, keys)
    unmasked, _ = terms(Objective(delta=None, dims=(2,)), queries_QD, documents_MD, keys)
    assert logged["mask_rate"][0].item() == 0
    assert full["infonce"].num.item() == unmasked["infonce"].num.item()


def test_logged_mask_numbers_are_sums_and_counts() -> None:
    keys = keys_of(example())
    queries_QD = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    documents_MD = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    _, logged = terms(Objective(max_mask_frac=None), queries_QD, documents_MD, keys)
    # Query 0 has judged the lamp; query 1 has not, and loses it of its two negatives.
    assert {name: (num.item(), count.item()) for name, (num, count) in logged.items()} == {"mask_rate": (1, 5), "rows_masked": (1, 2)}


def test_some_of_the_queries_against_the_same_documents_add_up_to_all() -> None:
    objective, keys = Objective(parts=ALL, targets=TARGETS), keys_of(example())
    queries_QD, documents_MD = unit(2, 5), unit(5, 6)
    whole, _ = terms(objective, queries_QD, documents_MD, keys)
    pieces = [terms(objective, queries_QD[rows], documents_MD, keys.take(rows))[0] for rows in (slice(1), slice(1, 2))]
    for name, term in whole.items():
        assert sum(piece[name].num.item() for piece in pieces) == pytest.approx(term.num.item())


def test_vectors_that_do_not_fit_the_keys_are_refused() -> None:
    with pytest.raises(EncoderError, match="2 queries and 4 documents, but keys of 2 and 5"):
        terms(Objective(), unit(2, 0), unit(4, 1), keys_of(example()))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"parts": {}}, "one or more of infonce, supcon"),
        ({"parts": {"triplet": 1.0}}, "triplet"),
        ({"parts": {"infonce": 0.0}}, "weight above 0"),
        ({"parts": {"circle": 1.0}}, "needs targets"),
        ({"targets": (0.3, 0.2)}, "each above the one before"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"tau_a": float("nan")}, "tau_a is nan"),
        ({"positive": 0}, "grade 0 is never relevant"),
        ({"max_mask_frac": 1.5}, "max_mask_frac is 1.5"),
        ({"dims": (0,)}, "1 or more"),
        ({"thresholds": (0.0, 0.0)}, "not all of them 0"),
        ({"omega": (1.0, -1.0)}, "weights of 0 or more"),
        ({"form": "sigmoid"}, "sigmoid"),
        ({"form": "bt", "denominator": "batch"}, "no denominator"),
    ],
)
def test_an_objective_that_cannot_be_meant_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(EncoderError, match=says):
        Objective(**wrong)


def test_keys_do_not_change_the_batch_that_they_come_from() -> None:
    batch, untouched = example(), example()
    terms(Objective(parts=ALL, targets=TARGETS), unit(2, 0), unit(5, 1), keys_of(batch))
    for name in ("own_QN", "grades_QN", "labels_QL", "label_grades_QL", "product_key_M"):
        assert (getattr(batch, name) == getattr(untouched, name)).all()
