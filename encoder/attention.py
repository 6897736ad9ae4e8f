"""One attention function for all models: texts end to end in one row, each seeing itself alone, without padding.

Registered with transformers under `PACKED`; a model calls it instead of its own. The boundaries come as the keyword
argument `spans`, which models hand down untouched. On a CPU, texts of one length are a dense block; on CUDA,
`varlen_attn` takes the boundaries.

Shapes: T tokens, H heads (G of keys and values), C channels of a head; a run is N texts of L tokens.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their names

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

PACKED = "catalog_embed_packed"

# `varlen_attn` is flash attention.
VARLEN_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spans:
    """Where the texts of a pack are: runs of equal lengths, and boundaries on the device. `varlen` says which is used."""

    runs: tuple[tuple[int, int], ...]
    boundaries: Tensor
    longest: int
    varlen: bool


def register() -> None:
    """Make the function known to transformers. Its masks are none at all: the spans say it."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)


def packed_attention(  # noqa: PLR0917 - the signature is that of transformers
    module: torch.nn.Module,
    query_1HTC: Tensor,
    key_1GTC: Tensor,
    value_1GTC: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    *,
    spans: Spans,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return what each token reads from its own text, shaped (1, T, H, C)."""
    assert attention_mask is None, "masks are left to the spans"
    assert dropout == 0.0, "this is for inference"
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    scale = query_1HTC.shape[-1] ** -0.5 if scaling is None else scaling
    run = _varlen if spans.varlen else _by_runs
    return run(query_1HTC, key_1GTC, value_1GTC, spans, scale=scale, causal=causal, window=sliding_window), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _varlen(
    query_1HTC: Tensor, key_1GTC: Tensor, value_1GTC: Tensor, spans: Spans, *, scale: float, causal: bool, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  its import registers operators

    # A window of W reaches W - 1 tokens back, and as far ahead where the model looks ahead.
    reach = -1 if window is None else window - 1
    query_THC, key_TGC, value_TGC = (states[0].transpose(0, 1) for states in (query_1HTC, key_1GTC, value_1GTC))
    ends_B = spans.boundaries
    states_THC: Tensor = varlen_attn(
        query_THC,
        key_TGC,
        value_TGC,
        ends_B,
        ends_B,
        spans.longest,
        spans.longest,
        scale=scale,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=query_THC.shape[1] != key_TGC.shape[1],
    )
    return states_THC.unsqueeze(0)


def _by_runs(
    query_1HTC: Tensor, key_1GTC: Tensor, value_1GTC: Tensor, spans: Spans, *, scale: float, causal: bool, window: int | None
) -> Tensor:
    heads, tokens, channels = query_1HTC.shape[1:]
    groups = heads // key_1GTC.shape[1]
    if groups > 1:
        key_1GTC, value_1GTC = (states.repeat_interleave(groups, dim=1) for states in (key_1GTC, value_1GTC))
    blocks = []
    start = 0
    for texts, length in spans.runs:
        end = start + texts * length
        query_NHLC, key_NHLC, value_NHLC = (
            states[0, :, start:end].unflatten(1, (texts, length)).transpose(0, 1) for states in (query_1HTC, key_1GTC, value_1GTC)
        )
        block_NHLC = _alone(query_NHLC, key_NHLC, value_NHLC, scale=scale, causal=causal, window=window)
        blocks.append(block_NHLC.transpose(1, 2).reshape(texts * length, heads, channels))
        start = end
    assert start == tokens, f"the spans hold {start} tokens of {tokens}"
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).unsqueeze(0)


def _alone(query_NHLC: Tensor, key_NHLC: Tensor, value_NHLC: Tensor, *, scale: float, causal: bool, window: int | None) -> Tensor:
    """Return what the tokens of each text read, all texts being of one length."""
    length = query_NHLC.shape[2]
    if window is None or length <= window:
        return functional.scaled_dot_product_attention(query_NHLC, key_NHLC, value_NHLC, is_causal=causal, scale=scale)
    places_L = torch.arange(length)
    behind_LL = places_L[:, None] - places_L
    seen_LL = (behind_LL < window) & ((behind_LL >= 0) if causal else (behind_LL > -window))
    return functional.scaled_dot_product_attention(query_NHLC, key_NHLC, value_NHLC, attn_mask=seen_LL, scale=scale)
