"""The attention of packs against the definition: every text alone, every head alone, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encoder.attention import Spans, packed_attention
from encoder.pooling import pool, pool_packed

RUNS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=4, unique_by=lambda run: run[1])


def spans_of(runs: list[tuple[int, int]], *, varlen: bool = False) -> Spans:
    lengths = torch.tensor([0] + [length for count, length in runs for _ in range(count)])
    boundaries = lengths.cumsum(0).to(torch.int32)
    return Spans(runs=tuple(runs), boundaries=boundaries, longest=int(lengths.max()), varlen=varlen)


def states(runs: list[tuple[int, int]], *, heads: int, groups: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(count * length for count, length in runs)
    made = [torch.randn(1, tokens, count, 8, generator=generator) for count in (heads, groups, groups)]
    return [one.transpose(1, 2).to(dtype) for one in made]


def reference(query: Tensor, key: Tensor, value: Tensor, spans: Spans, *, scale: float, causal: bool, window: int | None) -> Tensor:
    heads, groups = query.shape[1], key.shape[1]
    out = torch.zeros(query.shape[2], heads, query.shape[3], dtype=torch.float64)
    ends = spans.boundaries.tolist()
    for begin, end in itertools.pairwise(ends):
        for head in range(heads):
            group = head // (heads // groups)
            for place in range(begin, end):
                seen = [
                    other
                    for other in range(begin, end)
                    if (not causal or other <= place) and (window is None or abs(place - other) < window)
                ]
                scores = (key[0, group, seen].double() @ query[0, head, place].double()) * scale
                out[place, head] = scores.softmax(0) @ value[0, group, seen].double()
    return out[None]


def module(*, causal: bool) -> torch.nn.Module:
    one = torch.nn.Module()
    one.is_causal = causal
    return one


@settings(max_examples=60, deadline=None)
@given(runs=RUNS, groups=st.sampled_from([1, 2, 4]), causal=st.booleans(), window=st.none() | st.integers(1, 6), seed=st.integers(0, 99))
def test_a_text_sees_itself_alone(runs: list[tuple[int, int]], groups: int, causal: bool, window: int | None, seed: int) -> None:
    query, key, value = states(runs, heads=4, groups=groups, seed=seed)
    spans = spans_of(runs)
    found, weights = packed_attention(module(causal=causal), query, key, value, None, scaling=0.5, sliding_window=window, spans=spans)
    assert weights is None
    assert found.shape == (1, query.shape[2], 4, 8)
    wanted = reference(query, key, value, spans, scale=0.5, causal=causal, window=window)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_long_texts_and_short_ones_agree_with_the_definition_and_the_usual_scale() -> None:
    runs = [(1, 205), (2, 200), (3, 2)]
    query, key, value = states(runs, heads=2, groups=2, seed=1)
    found, _ = packed_attention(module(causal=False), query, key, value, None, spans=spans_of(runs))
    wanted = reference(query, key, value, spans_of(runs), scale=1 / math.sqrt(8), causal=False, window=None)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_number_formats_stay_near(dtype: torch.dtype) -> None:
    runs = [(3, 9), (2, 4)]
    query, key, value = states(runs, heads=4, groups=2, seed=3, dtype=dtype)
    found, _ = packed_attention(module(causal=True), query, key, value, None, spans=spans_of(runs))
    wanted = reference(query, key, value, spans_of(runs), scale=1 / math.sqrt(8), causal=True, window=None)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)


def varlen_by_definition(  # noqa: PLR0917 - the signature is torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of `varlen_attn`, which runs on CUDA alone: boundaries, (left, right) windows, grouped heads."""
    assert cu_seq_q.dtype == torch.int32
    assert cu_seq_q.equal(cu_seq_k)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = torch.empty_like(query)
    repeats = query.shape[1] // key.shape[1]
    for begin, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        ahead = torch.arange(end - begin)[None] - torch.arange(end - begin)[:, None]
        left, right = (side if side >= 0 else end - begin for side in window_size)
        scores = torch.einsum("qhc,khc->hqk", query[begin:end], key[begin:end].repeat_interleave(repeats, 1)) * scale
        scores = scores.masked_fill((ahead < -left) | (ahead > right), -torch.inf)
        out[begin:end] = torch.einsum("hqk,khc->qhc", scores.softmax(-1), value[begin:end].repeat_interleave(repeats, 1))
    return out


@settings(max_examples=40, deadline=None)
@given(runs=RUNS, groups=st.sampled_from([1, 4]), causal=st.booleans(), window=st.none() | st.integers(1, 6))
def test_what_cuda_is_asked_for_is_the_same(runs: list[tuple[int, int]], groups: int, causal: bool, window: int | None) -> None:
    query, key, value = states(runs, heads=4, groups=groups, seed=0)
    asked: dict[str, Any] = {"scaling": 0.5, "sliding_window": window}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_definition)
        found, _ = packed_attention(module(causal=causal), query, key, value, None, spans=spans_of(runs, varlen=True), **asked)
    wanted, _ = packed_attention(module(causal=causal), query, key, value, None, spans=spans_of(runs), **asked)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
@pytest.mark.parametrize("varlen", [False, True])
def test_packs_are_pooled_as_padded_texts_are(mode: Any, varlen: bool) -> None:
    runs = [(2, 5), (1, 3), (3, 1)]
    spans = spans_of(runs, varlen=varlen)
    lengths = spans.boundaries.diff().long()
    packed = torch.randn(int(lengths.sum()), 16, generator=torch.Generator().manual_seed(0))
    matrix = torch.nn.utils.rnn.pad_sequence(packed.split(lengths.tolist()), batch_first=True, padding_value=torch.nan)
    torch.testing.assert_close(pool_packed(packed, spans, mode=mode), pool(matrix, lengths, mode=mode), atol=1e-6, rtol=1e-6)
