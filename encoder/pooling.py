"""From token states to one unit vector for a text, in float32 whatever the model computes in.

Shapes: B texts, T tokens of the longest, D dimensions of the model, K dimensions kept. Padding stands on the right.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their names

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def pool(states_BTD: Tensor, lengths_B: Tensor, *, mode: Literal["mean", "cls", "last"]) -> Tensor:
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


def shorten(vectors_BD: Tensor, *, dims: int) -> Tensor:
    """Return the first dimensions of each vector, at unit length. A zero vector stays zero."""
    return functional.normalize(vectors_BD[:, :dims].float(), dim=-1)
