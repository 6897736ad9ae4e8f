"""The tower under test and what every rival is made from: one card, one device, one number format, as many threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from encoder.architectures import ARCHITECTURES
from encoder.bench.corpus import Corpus
from encoder.errors import EncoderError
from encoder.inference import EncodeOptions, Encoder
from encoder.loading import choose_device, choose_dtype, load_model
from encoder.registry import Dtype, TowerOptions

Vectors = npt.NDArray[np.float32]
Texts = list[str]
Run = Callable[[Texts], Vectors]


class SkippedError(EncoderError):
    """A rival cannot take part here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured and how long. None: what suits the device.

    `slow_texts` is the part of the corpus that rivals without look-ahead run: in corpus order any part is a fair sample.
    `pilot_texts` is the part on which batch sizes are compared, `warm_texts` the part that everyone runs before. `peak` is the
    device's promised TFLOP/s, `pace` whether our encoder is calibrated first.
    """

    rounds: int = 3
    device: str = "auto"
    dtype: Dtype = "auto"
    threads: int | None = None
    rivals: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] | None = None
    slow_texts: int | None = None
    pilot_texts: int | None = None
    warm_texts: int | None = None
    sample_texts: int = 200
    queries: int = 100
    limit: str = "auto"
    matrix_size: int = 8192
    peak: float | None = None
    pace: Literal["measured", "usual"] = "measured"
    ray: bool = False


@dataclass
class Workbench:
    """Models of one tower, each loaded when a rival first asks for it, and kept for the next corpus."""

    directory: Path
    label: str
    options: BenchOptions
    corpus: Corpus | None = None
    _kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tower = TowerOptions(dtype=self.options.dtype)
        self.device = choose_device(self.options.device)
        self.dtype = choose_dtype(self.options.dtype, self.device)
        self.threads = self.options.threads or torch.get_num_threads()
        self.ours = self.encoder("auto")
        self.card = self.ours.card

    @property
    def on_cuda(self) -> bool:
        """Say whether the device is an NVIDIA GPU."""
        return bool(self.device.type == "cuda")

    @property
    def causal(self) -> bool:
        """Say whether a token sees only what is before it."""
        return bool(ARCHITECTURES[self.card.model_type].causal)

    def encoder(self, engine: Any) -> Encoder:
        """Return our encoder with an engine."""
        options = EncodeOptions(device=str(self.device), threads=self.threads, engine=engine)
        return self.keep(f"encoder {engine}", lambda: Encoder(self.directory, tower=self.tower, options=options))  # type: ignore[no-any-return]

    def model(self, dtype: torch.dtype | None = None) -> Any:
        """Return the model as transformers loads it, in the number format of the run unless told otherwise."""
        wanted = dtype or self.dtype
        return self.keep(f"model {wanted}", lambda: load_model(self.directory, self.card, dtype=wanted, attention="sdpa").to(self.device))

    def tokenizer(self) -> Any:
        """Return the tokenizer as transformers loads it, padding on the right."""

        def load() -> Any:
            folder = self.directory / self.card.model_path
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            tokenizer.padding_side = "right"
            return tokenizer

        return self.keep("tokenizer", load)

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what was made under a name, and make it the first time."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def pilot(self) -> Texts:
        """Return the texts on which settings are compared."""
        assert self.corpus is not None
        return self.corpus.texts[: self.options.pilot_texts or (20_480 if self.on_cuda else 1024)]


@dataclass(frozen=True, kw_only=True)
class Started:
    """A rival that is ready: how it runs texts, with what settings, and the seconds of its last run where it counts them itself."""

    run: Run
    settings: Mapping[str, Any]
    own_clock: Callable[[], float] | None = None


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A name in the table, and how it starts.

    `ahead`: it looks further than a block of texts. `here`: it runs in this process. `once`: it runs identical texts once.
    """

    label: str
    start: Callable[[Workbench], Started]
    ahead: bool = True
    here: bool = True
    once: bool = False


def library(name: str) -> Any:
    """Import a rival's library; where it is absent, the rival is."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SkippedError(f"{name} cannot be imported: {str(error)[:120]}") from error
