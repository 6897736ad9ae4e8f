"""From token states to one unit vector for a text, in float32 whatever the model computes in.

Shapes: B texts, T tokens of the longest, D dimensions of the model, K dimensions kept. Padding stands on the right; in
a pack there is none, and T is the tokens of all texts.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their names

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from encoder.attention import Spans
from encoder.layout import Pooling


def pool(states_BTD: Tensor, lengths_B: Tensor, *, mode: Pooling) -> Tensor:
    """Return one vector for each text: the mean of its tokens, its first or its last."""
    if mode == "cls":
        return states_BTD[:, 0].float()
    if mode == "last":
        rows_B = torch.arange(len(lengths_B), device=states_BTD.device)
        return states_BTD[rows_B, (lengths_B - 1).clamp(min=0)].float()
    padding_BT = torch.arange(states_BTD.shape[1], device=states_BTD.device) >= lengths_B[:, None]
    # Filled, not multiplied: a padded position may hold anything, and NaN times zero is NaN.
    sums_BD = states_BTD.float().masked_fill(padding_BT[:, :, None], 0.0).sum(dim=1)
    return sums_BD / lengths_B[:, None].clamp(min=1)


def pool_packed(states_TD: Tensor, spans: Spans, *, mode: Pooling) -> Tensor:
    """Return one vector for each text of a pack."""
    ends_B = spans.boundaries
    if mode == "cls":
        return states_TD[ends_B[:-1]].float()
    if mode == "last":
        return states_TD[ends_B[1:] - 1].float()
    if spans.varlen:
        return torch.segment_reduce(states_TD.float(), "mean", offsets=ends_B.long(), axis=0, unsafe=True)
    sizes = [texts * length for texts, length in spans.runs]
    runs = zip(states_TD.split(sizes), spans.runs, strict=True)
    return torch.cat([run_TD.float().unflatten(0, (texts, length)).mean(dim=1) for run_TD, (texts, length) in runs])


def shorten(vectors_BD: Tensor, *, dims: int) -> Tensor:
    """Return the first dimensions of each vector, at unit length. A zero vector stays zero."""
    return functional.normalize(vectors_BD[:, :dims].float(), dim=-1)
