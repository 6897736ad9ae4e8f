from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from pipelines.errors import InputError
from pipelines.index import choosing
from pipelines.index.choosing import (
    Budget,
    choose_spec,
    first_search,
    fitting,
    goal_of,
    memory_bytes,
    predicted_ms,
    predicted_recall,
    ranked,
)
from pipelines.index.spec import IndexSpec, Search

ROWS = (1, 100, 3_000, 20_000, 100_000, 1_000_000, 30_000_000)
DIMS = 384

# 100,000 products, 500 real queries: recall and the median ms of a single query.
MEASURED = {
    ("IVF256,SQ8", 8, 1): (0.9226, 0.146),
    ("IVF256,SQ8", 32, 1): (0.9712, 0.580),
    ("IVF256,SQ8", 64, 1): (0.9870, 1.139),
    ("IVF256,Flat", 64, 1): (0.9936, 2.017),
    ("IVF1024,SQ8", 64, 1): (0.9818, 0.371),
    ("IVF1024,SQ8,Refine(SQfp16)", 64, 2): (0.9882, 0.378),
    ("IVF256,RaBitQfs,Refine(SQ8)", 32, 10): (0.9684, 0.327),
    ("IVF256,RaBitQfs,Refine(SQfp16)", 64, 10): (0.9906, 0.400),
    ("IVF256,RaBitQfs", 64, 1): (0.7768, 0.456),
    ("IVF1024,RaBitQfs,Refine(SQfp16)", 64, 5): (0.9838, 0.225),
    ("IVF256,PQ48x4fs,Refine(SQfp16)", 64, 20): (0.9050, 0.183),
    ("IVF256,PQ48x4fs,Refine(SQ8)", 16, 5): (0.7828, 0.062),
}


def spec_of(factory: str) -> IndexSpec:
    return IndexSpec(factory=factory, dims=DIMS)


@pytest.mark.parametrize(("asked", "measured"), MEASURED.items(), ids=lambda item: str(item[0]))
def test_predictions_agree_with_the_measured_curves(asked: tuple[str, int, int], measured: tuple[float, float]) -> None:
    # Coarse codes miss some of the answers that lists miss too: there the two shares are less than independent.
    factory, nprobe, refine = asked
    search = Search(nprobe=nprobe, refine=refine)
    assert predicted_recall(spec_of(factory), search) == pytest.approx(measured[0], abs=0.02 + 0.15 * (1 - measured[0]))
    assert 0.4 <= predicted_ms(spec_of(factory), 100_000, search) / measured[1] <= 2.5


def test_fitted_probes_agree_with_those_that_queries_took() -> None:
    for (_, nlist), taken in choosing.MEASURED_PROBES.items():
        spec = spec_of(f"IVF{nlist},Flat")
        for share, probes in zip(choosing.PROBES, taken, strict=True):
            predicted = first_search(spec, 100_000, share).nprobe
            assert abs(predicted - probes) <= max(3, 0.25 * probes), (nlist, share)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("share", [120, 300, 900])
@pytest.mark.parametrize("recall", [0.9, 0.97])
def test_no_choice_is_past_the_budget(n: int, share: int, recall: float) -> None:
    budget = Budget(recall=recall, memory_bytes=share * n, latency_ms=20.0)
    try:
        choices = ranked(n, DIMS, budget)
    except InputError:
        return
    for choice in choices:
        assert choice.memory_bytes == memory_bytes(choice.spec, n) <= share * n
        assert choice.latency_ms == predicted_ms(choice.spec, n, choice.search) <= 20.0
        assert choice.recall >= goal_of(choice.spec, recall) - 1e-9 >= recall - 1e-9
        assert fitting(choice.spec, n) == choice.spec


@pytest.mark.parametrize("n", ROWS[3:])
def test_a_larger_budget_never_gives_a_much_slower_index(n: int) -> None:
    times = [choices(n, memory_bytes=share * n)[0].latency_ms for share in (320, 600, 900, 1700, 4000)]
    for tight, loose in pairwise(times):
        # Indexes within a half of each other count as equally fast.
        assert loose <= tight * 1.5 + 1e-9
    assert times[-1] < times[0]


@pytest.mark.parametrize("n", ROWS[3:])
def test_more_recall_takes_more_time(n: int) -> None:
    fastest = [min(choice.latency_ms for choice in choices(n, recall=recall)) for recall in (0.8, 0.9, 0.95, 0.97, 0.99)]
    assert fastest == sorted(fastest)


def choices(
    n: int, *, recall: float = 0.97, memory_bytes: int | None = None, latency_ms: float | None = None
) -> tuple[choosing.Choice, ...]:
    return ranked(n, DIMS, Budget(recall=recall, memory_bytes=memory_bytes, latency_ms=latency_ms))


def test_a_time_limit_is_kept_or_refused() -> None:
    assert all(choice.latency_ms <= 0.5 for choice in choices(1_000_000, latency_ms=0.5))
    with pytest.raises(InputError, match=r"0\.001 ms"):
        choices(1_000_000, latency_ms=0.001)


def test_each_choice_has_finer_codes_than_the_one_before() -> None:
    for n in ROWS[3:]:
        found = choices(n)
        assert len({choice.spec.factory for choice in found}) == len(found) > 1
        missed = [1 - predicted_recall(choice.spec, Search(nprobe=choice.spec.nlist or 1, refine=5)) for choice in found]
        assert all(later < earlier for earlier, later in pairwise(missed))


def test_few_vectors_are_compared_one_by_one_as_long_as_they_are_in_the_cache() -> None:
    assert choose_spec(10_000, DIMS).factory == "Flat"
    assert choose_spec(12_000, DIMS).nlist
    assert choose_spec(5_000, 2 * DIMS).factory == "Flat"
    assert choose_spec(12_000, 2 * DIMS).nlist
    assert choose_spec(1, 2).factory == "Flat"


def test_the_tightest_memory_gives_codes_of_few_bits_and_no_second_vectors() -> None:
    tight = choose_spec(100_000, DIMS, memory_bytes=300 * 100_000)
    assert tight.refine is None
    assert tight.codes.startswith("RaBitQ")
    loose = choose_spec(100_000, DIMS, memory_bytes=1000 * 100_000)
    assert loose.refine is not None


def test_many_lists_are_found_by_a_graph() -> None:
    assert choose_spec(1_000_000, DIMS).graph is None
    assert choose_spec(100_000_000, DIMS).graph is not None


def test_a_budget_that_nothing_fits_says_what_the_nearest_take() -> None:
    with pytest.raises(InputError) as failed:
        choose_spec(1_000_000, DIMS, recall=0.97, memory_bytes=150_000_000)
    words = str(failed.value)
    assert "no index of 1,000,000 vectors of 384 dimensions has a recall of 0.97, 150 MB" in words
    assert "The smallest that finds enough: IVF" in words
    assert "The most that the memory allows: IVF" in words
    assert "MB and" in words
    assert "Raise the budget" in words
    # What the message names really is enough.
    told = re.search(r"The smallest that finds enough: \S+ takes ([0-9.e+]+) MB", words)
    assert told
    smallest = float(told[1])
    assert choose_spec(1_000_000, DIMS, recall=0.97, memory_bytes=math.ceil(smallest * 1.01e6))


@pytest.mark.parametrize("wrong", [{"recall": 1.1}, {"recall": -0.1}, {"memory_bytes": 0}, {"latency_ms": -1.0}])
def test_a_budget_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Budget(**wrong)  # type: ignore[arg-type]


def test_lists_that_cannot_be_trained_become_flat() -> None:
    wanted = spec_of("IVF100,SQ8")
    assert fitting(wanted, 3_900) == wanted
    assert fitting(wanted, 3_899) == spec_of("Flat")
    assert fitting(spec_of("Flat"), 0) == spec_of("Flat")


def test_a_margin_is_kept_below_what_the_codes_can_do() -> None:
    assert goal_of(spec_of("IVF256,Flat"), 0.97) == pytest.approx(0.985)
    assert goal_of(spec_of("IVF256,SQ8"), 0.97) == pytest.approx(0.9815)
    assert goal_of(spec_of("IVF256,PQ48x4fs"), 0.97) == 0.97
    assert goal_of(spec_of("Flat"), 1.0) == 1.0


@pytest.mark.parametrize("factory", ["Flat", "IVF1024,RaBitQ7fs", "IVF4096_HNSW32,PQ64x4fs,Refine(SQ8)"])
def test_the_work_of_a_search_rises_with_all_that_it_does(factory: str) -> None:
    spec = spec_of(factory)
    asked = [Search(nprobe=nprobe, refine=refine) for nprobe, refine in ((1, 1), (8, 1), (8, 5), (64, 5), (64, 50))]
    times = [predicted_ms(spec, 200_000, search) for search in asked]
    assert times == sorted(times)
    assert predicted_ms(spec, 200_000, asked[0]) < predicted_ms(spec, 2_000_000, asked[0])
