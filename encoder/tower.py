"""The forward pass of a tower: a pack of token ids in, unit vectors out, packed or padded.

Packed, the texts of a pack run end to end in one row and none pays for the longest. Padded, they run as a matrix with a
mask, as any other tool runs them: for models that cannot be packed, and as the twin that the packed way is compared with.
"""

# ruff: noqa: N806 - tensors carry their shape in their names

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from encoder.architectures import ARCHITECTURES
from encoder.attention import PACKED, VARLEN_DTYPES, Spans, register
from encoder.errors import TowerError
from encoder.fast_linear import quicken
from encoder.loading import choose_device, choose_dtype, has_flash, load_model
from encoder.memory import footprint
from encoder.packing import Pack
from encoder.pooling import pool, pool_packed, shorten
from encoder.registry import TowerCard

Way = Literal["packed", "padded"]


class Tower:
    """The model, the pooling and the truncation of a card, on one device. `plain` leaves its layers as they were loaded."""

    def __init__(self, directory: Path, card: TowerCard, *, device: str = "auto", way: Way | None = None, plain: bool = False) -> None:
        self.card = card
        self.device = choose_device(device)
        self.dtype = choose_dtype(card.dtype, self.device)
        self._architecture = ARCHITECTURES[card.model_type]
        best = self._best_way()
        self.way: Way = way or best
        if way == "packed" and best == "padded":
            raise TowerError(
                f"{card.model_type} models in {str(self.dtype).removeprefix('torch.')} cannot be packed on {self.device}. "
                "Leave the engine to `auto`, which pads them."
            )
        register()
        attention = PACKED if self.way == "packed" else "sdpa" if self._architecture.packs else "eager"
        self.model = load_model(directory, card, dtype=self.dtype, attention=attention).to(self.device)
        self.vocabulary: int = self.model.get_input_embeddings().num_embeddings
        self._padding_id = self._architecture.padding_id(self.model.config.pad_token_id)
        self.footprint = footprint(self.model, dtype=self.dtype, scores_of=0 if self._architecture.packs else card.max_tokens)
        self._options: dict[str, Any] = {"use_cache": False} if self._architecture.cached else {}
        self.varlen = self.device.type == "cuda"
        if not plain and self.device.type == "cpu":
            quicken(self.model, dtype=self.dtype)

    def _best_way(self) -> Way:
        """Pack where the model and the device allow it; on CUDA that takes flash attention, and so a short number format."""
        flash = self.device.type == "cuda" and self.dtype in VARLEN_DTYPES and has_flash(self.device)
        packs = self._architecture.packs and (self.device.type == "cpu" or flash)
        return "packed" if packs else "padded"

    def __call__(self, pack: Pack, *, pad_id: int) -> Tensor:
        """Return one vector for each text of a pack, on the device; on CUDA before it is computed."""
        vectors_BD = self._packed(pack) if self.way == "packed" else self._padded(pack, pad_id)
        return shorten(vectors_BD, dims=self.card.dims)

    def _packed(self, pack: Pack) -> Tensor:
        ids_1T, positions_1T = self._sent(pack.ids).long()[None], self._sent(pack.positions(after=self._padding_id))[None]
        boundaries = self._sent(pack.boundaries)
        spans = Spans(runs=pack.runs, boundaries=boundaries, longest=int(pack.lengths[0]), varlen=self.varlen)
        states_1TD = self.model(input_ids=ids_1T, position_ids=positions_1T, spans=spans, **self._options).last_hidden_state
        return pool_packed(states_1TD[0], spans, mode=self.card.pooling)

    def _padded(self, pack: Pack, pad_id: int) -> Tensor:
        ids_BT, lengths_B = self._sent(pack.padded(pad_id=pad_id)).long(), self._sent(pack.lengths)
        mask_BT = torch.arange(ids_BT.shape[1], device=self.device) < lengths_B[:, None]
        states_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT.long(), **self._options).last_hidden_state
        return pool(states_BTD, lengths_B, mode=self.card.pooling)

    def _sent(self, array: Any) -> Tensor:
        """Return an array on the device. Pinned memory lets the host go on while it is copied."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)
