"""What no encoder can pass: the time of a model's own matrix products, measured on this machine and nothing else done.

On a CPU the products are run, as packs of the engine's size and in the fastest way that torch has. On an accelerator
their operations are counted, and set against the rate that the device reaches on one large product.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from encoder.fast_linear import FastLinear, available

Lengths = npt.NDArray[np.int64]
Product = Callable[[Tensor], Tensor]
# A pack: how many texts of which length.
Runs = list[tuple[int, int]]

# Packs on which the ways are compared before the rounds.
_TRIAL_PACKS = 12


@dataclass(frozen=True, kw_only=True)
class Work:
    """The matrix products of a model: sizes of its linear layers (out, in), and of attention in each layer.

    `windows` has one entry for each attention layer: how many tokens a token sees at most, or None for all of its text.
    """

    linears: tuple[tuple[int, int], ...]
    heads: int
    head_dims: int
    windows: tuple[int | None, ...]
    causal: bool

    @property
    def linear_parameters(self) -> int:
        """Return the weights of all linear layers, biases not counted."""
        return sum(out * into for out, into in self.linears)

    def flops(self, lengths: Lengths) -> float:
        """Return the operations that texts of these lengths take, half of the square where a token sees only what is before it."""
        tokens = lengths.astype(np.float64)
        seen = sum(float((tokens * np.minimum(tokens, window or np.inf)).sum()) for window in self.windows)
        attention = 4 * self.heads * self.head_dims * seen * (0.5 if self.causal else 1.0)
        return 2.0 * self.linear_parameters * float(tokens.sum()) + attention


def work_of(model: nn.Module, *, causal: bool) -> Work:
    """Walk a model as transformers loads it. A pooler, which reads one token of a text, must not be in it."""
    config: Any = model.config
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heads = int(config.num_attention_heads)
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    window = getattr(config, "local_attention", None) or getattr(config, "sliding_window", None)
    return Work(
        linears=tuple((linear.out_features, linear.in_features) for linear in linears),
        heads=heads,
        head_dims=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        causal=causal,
    )


def matrix_rate(device: torch.device, dtype: torch.dtype, *, size: int = 8192, seconds: float = 1.0) -> float:
    """Return the operations a second of one large square product: warmed up, then the best of as many as the time allows."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    best, begin = float("inf"), time.perf_counter()
    rounds = 0
    while rounds < 3 or time.perf_counter() - begin < seconds:  # noqa: PLR2004 - the first ones warm up
        synchronise(device)
        started = time.perf_counter()
        for _ in range(4):
            torch.matmul(one, other, out=product)
        synchronise(device)
        best = min(best, (time.perf_counter() - started) / 4)
        rounds += 1
    return 2 * size**3 / best


def synchronise(device: torch.device) -> None:
    """Wait for what was started on a device; on a CPU everything is done when it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the products are run: weights as they are or in oneDNN's order, packs side by side in lanes of some threads."""

    prepacked: bool
    lanes: int
    threads: int

    def __str__(self) -> str:
        kernel = "oneDNN, weights reordered" if self.prepacked else "F.linear"
        return f"{kernel}, {self.lanes} x {self.threads} threads"


class Products:
    """A model's matrix products on a CPU, run in packs of texts sorted by length. The numbers in them do not matter.

    No text may be longer than the budget.
    """

    def __init__(self, model: nn.Module, work: Work, *, budget: int, threads: int) -> None:
        self.work, self.budget, self.threads = work, budget, threads
        self._layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.dtype = self._layers[0].weight.dtype
        widths = {layer.in_features for layer in self._layers}
        self._inputs = {into: torch.randn(budget, into).to(self.dtype) for into in widths}
        self.states = torch.randn(budget * work.heads * work.head_dims).to(self.dtype)
        self._plain: list[tuple[int, Product]] = [(layer.in_features, _linear(layer.weight, layer.bias)) for layer in self._layers]
        # The very layers that the encoder runs, without what it fuses into them.
        fast = self._layers if available(self.dtype) else []
        self._reordered: list[tuple[int, Product]] = [(layer.in_features, FastLinear(layer)) for layer in fast]

    def ways(self) -> list[Way]:
        """Return every way that this build of torch has."""
        kernels = (False, True) if self._reordered else (False,)
        lanes = sorted(lanes for lanes in {1, 2, 4, 8, self.threads} if lanes <= self.threads)
        return [Way(prepacked=kernel, lanes=lane, threads=max(1, self.threads // lane)) for kernel in kernels for lane in lanes]

    def choose(self, lengths: Lengths, *, prepacked: bool | None = None) -> tuple[Way, dict[str, float]]:
        """Return the fastest way, of one kernel or of all, and the seconds of each on some packs."""
        packs = self.packs(lengths)
        step = max(1, len(packs) // max(_TRIAL_PACKS, 2 * self.threads))
        sample = packs[::step]
        ways = [way for way in self.ways() if prepacked is None or way.prepacked == prepacked]
        seconds: dict[str, float] = {}
        for way, _ in itertools.product(ways, range(2)):  # twice, since the first run of a way pays for its memory
            begin = time.perf_counter()
            self._run(sample, way)
            seconds[str(way)] = min(seconds.get(str(way), float("inf")), time.perf_counter() - begin)
        return min(ways, key=lambda way: seconds[str(way)]), {name: round(value, 4) for name, value in seconds.items()}

    def packs(self, lengths: Lengths) -> list[Runs]:
        """Return packs as runs: how many texts of which length."""
        packs: list[Runs] = [[]]
        room = self.budget
        for length, run in itertools.groupby(np.sort(lengths)[::-1].tolist()):
            left = len(list(run))
            while left:
                if room < length:
                    packs.append([])
                    room = self.budget
                texts = min(left, room // length)
                packs[-1].append((texts, length))
                room -= texts * length
                left -= texts
        return packs

    def run(self, lengths: Lengths, way: Way) -> None:
        """Run the products of texts of these lengths."""
        self._run(self.packs(lengths), way)

    def _run(self, packs: Sequence[Runs], way: Way) -> None:
        before = torch.get_num_threads()
        try:
            left = deque(packs)
            if way.lanes == 1:
                torch.set_num_threads(way.threads)
                _Lane(self, way)(left)
                return
            with ThreadPoolExecutor(way.lanes, initializer=torch.set_num_threads, initargs=(way.threads,)) as pool:
                for lane in [pool.submit(_Lane(self, way), left) for _ in range(way.lanes)]:
                    lane.result()
        finally:
            torch.set_num_threads(before)

    def layers(self, way: Way) -> list[tuple[int, Product]]:
        """Return the linear layers of a way, each with the width of its input."""
        return self._reordered if way.prepacked else self._plain

    def input(self, tokens: int, into: int) -> Tensor:
        """Return that many rows of some width."""
        return self._inputs[into][:tokens]


class _Lane:
    """One thread's run of packs, with memory for scores that is kept from pack to pack."""

    def __init__(self, products: Products, way: Way) -> None:
        self._products, self._layers = products, products.layers(way)
        self._scores = torch.empty(0, dtype=products.dtype)

    def __call__(self, left: deque[Runs]) -> None:
        """Take packs until none is left."""
        with torch.inference_mode(), contextlib.suppress(IndexError):
            while True:
                self._run(left.popleft())

    def _run(self, pack: Runs) -> None:
        tokens = sum(texts * length for texts, length in pack)
        for into, layer in self._layers:
            layer(self._products.input(tokens, into))
        for window in self._products.work.windows:
            for texts, length in pack:
                self._attend(texts, length, window)

    def _attend(self, texts: int, length: int, window: int | None) -> None:
        work = self._products.work
        seen = min(length, window or length)
        seen = (seen + 1) // 2 if work.causal else seen
        blocks, dims = texts * work.heads, work.head_dims
        query = self._products.states[: blocks * length * dims].view(blocks, length, dims)
        key = self._products.states[: blocks * seen * dims].view(blocks, seen, dims)
        if self._scores.numel() < blocks * length * seen:
            self._scores = torch.empty(blocks * length * seen, dtype=self._products.dtype)
        scores = self._scores[: blocks * length * seen].view(blocks, length, seen)
        torch.bmm(query, key.transpose(1, 2), out=scores)
        torch.bmm(scores, key)


def _linear(weight: Tensor, bias: Tensor | None) -> Product:
    def product(states: Tensor) -> Tensor:
        return functional.linear(states, weight, bias)

    return product
