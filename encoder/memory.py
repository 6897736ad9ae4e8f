"""How much memory a tower takes: predicted from its shape before anything runs, so that a pack is cut to what is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# At the widest point of a layer these are alive: input, residual, query, key, value and what was read; and the widest
# product with its activation, twice where a gate goes with it.
_NARROW, _WIDE = 6, 3
# Scores, their bias and their softmax.
_SCORES = 3
_POOLED_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of the weights, and of what one token needs on its way through."""

    weights: int
    per_token: int

    def of_pack(self, tokens: int) -> int:
        """Return the most that a pack takes beside the weights."""
        return tokens * self.per_token


def footprint(model: Any, *, dtype: torch.dtype, scores_of: int = 0) -> Footprint:
    """Return the footprint of a model as it was loaded; `scores_of`: tokens of the longest text, where all its scores are held."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    width: int = model.get_input_embeddings().embedding_dim
    widest = max((layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)), default=width)
    scores = _SCORES * model.config.num_attention_heads * scores_of
    return Footprint(weights=weights, per_token=dtype.itemsize * (_NARROW * width + _WIDE * widest + scores) + _POOLED_BYTES * width)


def free_bytes(device: torch.device) -> int | None:
    """Return what a GPU has left; nothing is known of other devices."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
