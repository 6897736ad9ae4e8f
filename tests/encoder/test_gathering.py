"""Two real processes over gloo against one: `python -m tests.encoder.test_gathering FOLDER` is what each of them runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from encoder.errors import EncoderError
from encoder.examples import Batch
from encoder.gathering import World, _buckets, alone
from encoder.gradients import Draw, step_gradients
from encoder.objectives import Objective
from encoder.trainable import Trainable
from tests.towers import WORDS, tiny_tower

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 2
# The second process has fewer queries, fewer documents, and grades of another kind: every count differs.
QUERIES = (5, 2)
OBJECTIVE = Objective(parts={"infonce": 1.0, "roar": 0.1, "supcon": 0.5}, tau=0.05, tau_a=0.05, delta=0.1)


def batch_of(queries: int, *, seed: int, documents_each: int = 3) -> Batch:
    """Return a batch of random texts; its first documents carry the highest grades."""
    draws = np.random.default_rng(seed)
    texts = [" ".join(draws.choice(WORDS, size=int(draws.integers(2, 9)))) for _ in range(queries * (documents_each + 1))]
    own = np.arange(queries * documents_each).reshape(queries, documents_each)
    keys = draws.integers(1, 1 << 62, size=queries * (documents_each + 1))
    grades = np.tile(np.arange(documents_each, 0, -1), (queries, 1)).astype(np.int8)
    return Batch(
        queries=tuple(texts[:queries]),
        documents=tuple(texts[queries:]),
        own_QN=own,
        grades_QN=grades,
        query_key_Q=keys[:queries],
        product_key_M=keys[queries:],
        group_key_M=keys[queries:],
        labels_QL=keys[queries:][own],
        label_grades_QL=grades,
    )


def joined(parts: list[Batch]) -> Batch:
    """Return the batch that one process would have."""
    first = parts[0]
    wide = max(part.own_QN.shape[1] for part in parts)
    starts = np.cumsum([0, *(len(part.documents) for part in parts)])

    def padded(array: Any, fill: int) -> Any:
        return np.pad(array, ((0, 0), (0, wide - array.shape[1])), constant_values=fill)

    own = [padded(np.where(part.own_QN >= 0, part.own_QN + start, -1), -1) for part, start in zip(parts, starts, strict=False)]
    return Batch(
        queries=sum((part.queries for part in parts), ()),
        documents=sum((part.documents for part in parts), ()),
        own_QN=np.concatenate(own),
        grades_QN=np.concatenate([padded(part.grades_QN, -1) for part in parts]),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("query_key_Q", "product_key_M", "group_key_M")},
        labels_QL=np.concatenate([padded(part.labels_QL, 0) for part in parts]),
        label_grades_QL=np.concatenate([padded(part.label_grades_QL, -1) for part in parts]).astype(first.label_grades_QL.dtype),
    )


def parts() -> list[Batch]:
    return [batch_of(queries, seed=rank, documents_each=3 - rank) for rank, queries in enumerate(QUERIES)]


def opened(tower: Path) -> Trainable:
    trainable = Trainable.open(tower, device="cpu")
    trainable.model.eval()  # without dropout, which draws anew in every process
    return trainable


def gradients(trainable: Trainable, batch: Batch, world: World, *, cached: bool = False) -> tuple[dict[str, torch.Tensor], Any]:
    trainable.model.zero_grad(set_to_none=True)
    draw = Draw(seed=0, step=0, rank=world.rank)
    found = step_gradients(trainable, batch, OBJECTIVE, draw=draw, chunk_texts=4, cached=cached, world=world)
    return {name: weight.grad.clone() for name, weight in trainable.parameters.items() if weight.grad is not None}, found


def child(folder: Path, rank: int) -> None:
    """Do in one of two processes what the tests look at."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    world = World.distributed()
    rows = torch.arange(float((rank + 1) * 3)).reshape(rank + 1, 3).requires_grad_()
    gathered = world.gather_with_grad(rows)
    (gathered * (rank + 1)).pow(2).sum().backward()
    assert rows.grad is not None
    trainable = opened(folder / "tower")
    save_file({"rows": rows.detach(), "gathered": gathered.detach(), "rows_grad": rows.grad}, folder / f"rows-{rank}")
    for cached in (False, True):
        found_gradients, found = gradients(trainable, parts()[rank], world, cached=cached)
        save_file(found_gradients, folder / f"gradients-{rank}-{cached}")
        said = {"loss": found.loss, "terms": dict(found.terms), "logged": dict(found.logged), "queries": found.queries}
        (folder / f"said-{rank}-{cached}").write_text(json.dumps(said))
    # A weight that one process alone reaches, and one that neither does.
    lonely, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    if rank == 1:
        lonely.grad = torch.full((2,), 4.0)
    world.average_gradients([lonely, unused])
    assert lonely.grad is not None
    save_file({"lonely": lonely.grad}, folder / f"lonely-{rank}")
    assert unused.grad is None
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    tiny_tower(folder / "tower", kind="bert")
    command = [sys.executable, "-m", "tests.encoder.test_gathering", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_gathered_row_takes_the_gradients_of_all_processes(two: Path) -> None:
    found = [load_file(two / f"rows-{rank}") for rank in range(SIZE)]
    everything = torch.cat([part["rows"] for part in found])
    for part in found:
        assert torch.equal(part["gathered"], everything)
        # d/dx of (1x)^2 + (2x)^2
        assert torch.equal(part["rows_grad"], 10 * part["rows"])


@pytest.fixture(scope="module")
def one(two: Path) -> tuple[dict[str, torch.Tensor], Any]:
    return gradients(opened(two / "tower"), joined(parts()), alone)


@pytest.mark.parametrize("cached", [False, True])
def test_two_processes_have_the_gradient_of_one_though_their_counts_differ(
    two: Path, one: tuple[dict[str, torch.Tensor], Any], *, cached: bool
) -> None:
    expected, whole = one
    for rank in range(SIZE):
        found = load_file(two / f"gradients-{rank}-{cached}")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        said = json.loads((two / f"said-{rank}-{cached}").read_text())
        assert said["queries"] == whole.queries == sum(QUERIES)
        assert said["loss"] == pytest.approx(whole.loss, rel=1e-5)
        for kind in ("terms", "logged"):
            assert said[kind] == pytest.approx(dict(getattr(whole, kind)), rel=1e-5), kind


def test_the_mean_of_two_local_losses_is_another_gradient(two: Path, one: tuple[dict[str, torch.Tensor], Any]) -> None:
    # Without this the test above could pass for counts that happen to be equal.
    trainable = opened(two / "tower")
    local = [gradients(trainable, part, alone)[0] for part in parts()]
    name = "encoder.layer.1.output.dense.weight"
    assert not torch.allclose((local[0][name] + local[1][name]) / 2, one[0][name], rtol=1e-2)


def test_a_weight_that_one_process_reaches_is_averaged_and_one_that_none_does_stays_absent(two: Path) -> None:
    for rank in range(SIZE):
        assert load_file(two / f"lonely-{rank}")["lonely"].tolist() == [2.0, 2.0]


@given(st.lists(st.integers(1, 40_000_000), max_size=8))
def test_buckets_hold_every_weight_once_and_in_order(sizes: list[int]) -> None:
    weights = [torch.empty(size, device="meta") for size in sizes]
    buckets = _buckets(weights)
    assert [weight for bucket in buckets for weight in bucket] == weights or [id(weight) for bucket in buckets for weight in bucket] == [
        id(weight) for weight in weights
    ]
    assert all(len(bucket) == 1 or sum(weight.numel() for weight in bucket) <= 16 * 1024 * 1024 for bucket in buckets)


def test_alone_nothing_is_copied() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert alone.gather_with_grad(rows) is rows
    assert alone.sizes(2, device=rows.device) == [2]


def test_a_process_group_that_is_not_there_is_asked_for() -> None:
    with pytest.raises(EncoderError, match="no process group"):
        World.distributed()
    with pytest.raises(EncoderError, match="rank is 2 of 2"):
        World(rank=2, size=2)


if __name__ == "__main__":
    # Forked before torch starts a thread: one import serves both processes.
    torch.set_num_threads(1)
    opened(Path(sys.argv[1]) / "tower")
    other = os.fork()
    child(Path(sys.argv[1]), rank=0 if other else 1)
    if other:
        _, status = os.waitpid(other, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
