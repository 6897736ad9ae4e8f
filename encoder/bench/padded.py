"""Padded batches through a model of transformers, pooling written out: nothing of our own encoder is in it.

Run one text at a time in float32, this is the reference that every vector is compared with.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from encoder.bench.workbench import Texts, Vectors, Workbench

# Padded tokens in a batch of sorted texts: on a CPU they stay in its cache.
SORTED_BUDGETS = {"cpu": 1536, "cuda": 65536}


class Embedder(Protocol):
    """Texts to ids, and ids of one batch to vectors."""

    def tokenize(self, texts: Texts, *, prompt: str | None = None) -> list[list[int]]:
        """Return the ids of texts."""
        ...

    def embed(self, ids: list[list[int]]) -> Vectors:
        """Return the vectors of one padded batch."""
        ...


class Forward:
    """A model and a tokenizer of transformers, as their documentation uses them."""

    def __init__(self, bench: Workbench, *, dtype: torch.dtype | None = None) -> None:
        self._card, self._device = bench.card, bench.device
        self._model, self._tokenizer = bench.model(dtype), bench.tokenizer()
        self._options = {"use_cache": False} if bench.causal else {}
        self._pad = int(self._tokenizer.pad_token_id or 0)

    def tokenize(self, texts: Texts, *, prompt: str | None = None) -> list[list[int]]:
        """Return the ids of texts, the document prompt before each unless another is given."""
        before = self._card.document_prompt if prompt is None else prompt
        prompted = [before + text for text in texts]
        prompted = [text.lower() for text in prompted] if self._card.lowercase else prompted
        return list(self._tokenizer(prompted, truncation=True, max_length=self._card.max_tokens)["input_ids"])

    def embed(self, ids: list[list[int]]) -> Vectors:
        """Return the vectors of one padded batch."""
        rows, mask = (tensor.to(self._device) for tensor in padded(ids, pad_id=self._pad))
        with torch.inference_mode():
            states = self._model(input_ids=rows, attention_mask=mask, **self._options).last_hidden_state
            return pooled(states, mask, mode=self._card.pooling, dims=self._card.dims)


def in_order(forward: Embedder, texts: Texts, *, batch_size: int) -> Vectors:
    """Return the vectors of texts in batches as they come."""
    starts = range(0, len(texts), batch_size)
    return np.concatenate([forward.embed(forward.tokenize(texts[start : start + batch_size])) for start in starts])


def sorted_by_length(forward: Embedder, texts: Texts, *, budget: int) -> Vectors:
    """Return the vectors of texts in batches of near lengths, within a budget of padded tokens."""
    ids = forward.tokenize(texts)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    found = []
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, budget // max(1, len(ids[order[start]])))]
        found.append(forward.embed([ids[row] for row in rows]))
        start += len(rows)
    vectors = np.concatenate(found)
    vectors[order] = vectors.copy()
    return vectors


def padded(ids: list[list[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the ids of a batch as one matrix, and its mask."""
    longest = max(1, *(len(row) for row in [*ids, []]))
    rows = [row + [pad_id] * (longest - len(row)) for row in ids]
    return torch.tensor(rows), torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])


def pooled(states: Tensor, mask: Tensor, *, mode: str, dims: int) -> Vectors:
    """Return unit vectors of texts that are padded on the right, in float32."""
    states = states.float()
    if mode == "cls":
        rows = states[:, 0]
    elif mode == "last":
        rows = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    else:
        weights = mask.unsqueeze(-1).float()
        rows = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return np.asarray(torch.nn.functional.normalize(rows[:, :dims], dim=1).cpu().numpy(), np.float32)
