"""A tower opened for training: its texts as padded chunks, its vectors with a graph, and a way back to an ordinary tower.

What it encodes in evaluation mode is what `Encoder` makes of the tower that `save` writes. Shapes: B texts of a chunk, T
tokens of the longest, D dimensions of the model. Padding stands on the right.
"""

# ruff: noqa: N806, N815 - tensors carry their shape in their names

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from encoder.architectures import ARCHITECTURES
from encoder.errors import EncoderError, TowerError
from encoder.layout import WEIGHTS, WEIGHTS_INDEX
from encoder.loading import choose_device, load_model
from encoder.pooling import pool
from encoder.registry import AS_SAVED, CARD, RECORD, TowerCard, TowerOptions, read_card
from encoder.tokens import Kind, Tokenizer

Precision = Literal["float32", "bfloat16"]

_ENCODE_TEXTS = 64


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters beside the linear layers; `targets` names layers by their last words, or all of them.

    They begin as no change at all. `seed` draws their first halves, so that every process begins alike.
    """

    rank: int = 32
    alpha: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise EncoderError(f"The adapters have rank {self.rank} and alpha {self.alpha}. Give 1 or more of each.")
        if not 0 <= self.dropout < 1:
            raise EncoderError(f"The dropout of the adapters is {self.dropout}. Give a number from 0 to below 1.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Texts of near lengths that run together; `rows` says where they stand among those that were given."""

    rows: Tensor
    ids_BT: Tensor
    lengths_B: Tensor
    tokens: int


class Trainable:
    """A model with gradients, in training mode. Its weights are float32, but for a bfloat16 base under adapters."""

    def __init__(self, directory: Path, card: TowerCard, model: Any, *, precision: Precision, lora: Lora | None) -> None:
        self.directory = directory
        self.card = card
        self.model = model
        self.precision = precision
        self.lora = lora
        self.device = next(model.parameters()).device
        self._tokenizer = Tokenizer(directory, card=card)
        self._options: dict[str, Any] = {"use_cache": False} if ARCHITECTURES[card.model_type].cached else {}

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        options: TowerOptions = AS_SAVED,
        device: str = "auto",
        dtype: Precision = "float32",
        lora: Lora | None = None,
        checkpointing: bool = False,
    ) -> Trainable:
        """Open a tower. `bfloat16` computes in it over float32 weights; `checkpointing` computes layers twice to save memory."""
        if dtype not in get_args(Precision):
            raise TowerError(f"dtype is {dtype!r}. Choose one of {', '.join(get_args(Precision))}.")
        directory = Path(directory)
        card = read_card(directory, options)
        base = torch.bfloat16 if lora is not None and dtype == "bfloat16" else torch.float32
        attention = "sdpa" if ARCHITECTURES[card.model_type].packs else "eager"
        model = load_model(directory, card, dtype=base, attention=attention).to(choose_device(device))
        if lora is None:
            model.requires_grad_(requires_grad=True)
        else:
            _adapt(model, lora)
        if checkpointing:
            _checkpointed(model, card)
        model.train()
        return cls(directory, card, model, precision=dtype, lora=lora)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the weights that are trained, by their names."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def identity(self) -> dict[str, Any]:
        """Return what decides how training goes on from here, as plain data."""
        lora = None if self.lora is None else {**asdict(self.lora), "targets": str(self.lora.targets)}
        return {"tower": self.card.fingerprint, "precision": self.precision, "lora": lora}

    def chunks(self, texts: Sequence[str], *, kind: Kind, size: int) -> list[Chunk]:
        """Return the texts as padded chunks, the longest first, on the device."""
        tokens = self._tokenizer.tokenize(texts, kind=kind)
        order = np.argsort(-tokens.lengths, kind="stable")
        found = []
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            part = tokens.take(rows)
            ids_BT = np.full((len(rows), max(1, int(part.lengths[0]))), self._tokenizer.pad_id, np.int64)
            ids_BT[np.arange(ids_BT.shape[1]) < part.lengths[:, None]] = part.ids
            found.append(Chunk(rows=self._sent(rows), ids_BT=self._sent(ids_BT), lengths_B=self._sent(part.lengths), tokens=len(part.ids)))
        return found

    def embed(self, chunk: Chunk) -> Tensor:
        """Return the unit vectors of a chunk, of all dimensions and in float32, with their graph."""
        mask_BT = torch.arange(chunk.ids_BT.shape[1], device=self.device) < chunk.lengths_B[:, None]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            states_BTD = self.model(input_ids=chunk.ids_BT, attention_mask=mask_BT.long(), **self._options).last_hidden_state
        return functional.normalize(pool(states_BTD, chunk.lengths_B, mode=self.card.pooling), dim=-1)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout off and gradients away for a while."""
        before = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(before)

    def encode(self, texts: Sequence[str], *, kind: Kind = "document") -> npt.NDArray[np.float32]:
        """Return the vectors of texts as the model is now, in order: for measuring between two steps."""
        vectors = np.zeros((len(texts), self.card.full_dims), np.float32)
        with self.evaluating():
            for chunk in self.chunks(texts, kind=kind, size=_ENCODE_TEXTS):
                vectors[chunk.rows.cpu().numpy()] = self.embed(chunk).cpu().numpy()
        return vectors

    def save(self, target: Path, *, record: Mapping[str, Any] | None = None) -> TowerCard:
        """Write an ordinary tower, adapters merged, in one rename; return its card. A tower that is there is replaced.

        The settings are those of the tower that was opened. `record` goes beside them as JSON and decides nothing.
        """
        target = Path(target)
        if target.exists() and not (target / "modules.json").is_file() and any(target.iterdir()):
            raise TowerError(f"{target} holds something that is no tower. Give an empty or a new folder.")
        fresh, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
        shutil.rmtree(fresh, ignore_errors=True)
        for file in self.card.files:
            if PurePosixPath(file.name).suffix != ".safetensors" and PurePosixPath(file.name).name not in {WEIGHTS_INDEX, CARD}:
                (fresh / file.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.directory / file.name, fresh / file.name)
        save_file(self._weights(), fresh / self.card.model_path / WEIGHTS, metadata={"format": "pt"})
        if record is not None:
            (fresh / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        read_card(fresh)
        _sync(fresh)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        return read_card(target)

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights under the names of a plain model, what the adapters add included."""
        added = {name: module for name, module in self.model.named_modules() if hasattr(module, "get_delta_weight")}
        weights = {}
        for name, value in self.model.state_dict().items():
            if ".lora_" in name:
                continue
            plain = name.replace(".base_layer.", ".")
            owner = plain.removesuffix(".weight")
            merged = value.float() + added[owner].get_delta_weight("default").float() if plain != owner and owner in added else value
            weights[plain] = merged.detach().to(value.dtype).cpu().contiguous().clone()
        return self._pooler(without=weights) | weights

    def _pooler(self, *, without: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the unused pooler of the files: who opens them with another class would miss it, and draw one at random."""
        found = {}
        for file in self.card.files:
            if file.name.endswith(".safetensors"):
                with safe_open(self.directory / file.name, framework="pt") as weights:
                    for name in weights.keys():  # noqa: SIM118  not a mapping
                        _, word, rest = str(name).rpartition("pooler.")
                        if word and word + rest not in without:
                            found[word + rest] = weights.get_tensor(name)
        return found

    def _sent(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device)


def _adapt(model: Any, lora: Lora) -> None:
    """Put adapters into a model; they are all that is trained, in float32."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415  seconds, and full training does without

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none")
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise TowerError(f"The adapters do not fit the model: {str(error)[:300]}. Name layers of it, or give all-linear.") from error
    for name, weight in model.named_parameters():
        weight.requires_grad_(requires_grad=".lora_" in name)
        if weight.requires_grad:
            weight.data = weight.data.float()


def _checkpointed(model: Any, card: TowerCard) -> None:
    """Let the layers forget what they computed, and compute it again on the way back."""
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the name that transformers 5.3 knows as well
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise TowerError(
            f"{card.model_type} models cannot compute layers twice ({str(error)[:200]}). Open without checkpointing."
        ) from error
    model.config.use_cache = False  # in memory only; else transformers says at every start that it does so itself


def _sync(folder: Path) -> None:
    """Bring the files of a folder to the disk, so that a rename never names what is not there."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
