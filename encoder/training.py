"""The training loop: it may die at any step and goes on to the bit where its last checkpoint stands.

Nothing that decides a step lives in the process: batches, dropout and learning rate are functions of the seed, the step
and the rank. It runs as a plain process, or as one of a process group that somebody else has made.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from encoder import checkpoints
from encoder.checkpoints import Learner, Progress
from encoder.curves import METRICS, append_line, drop_lines_after, read_lines
from encoder.errors import EncoderError
from encoder.examples import Batch
from encoder.gathering import World, alone
from encoder.gradients import Draw, Found, step_gradients
from encoder.objectives import Objective
from encoder.trainable import Trainable

CHECKPOINTS = "checkpoints"

Evaluate: TypeAlias = Callable[[int], Mapping[str, float]]
OnStep: TypeAlias = Callable[[Mapping[str, Any]], None]

# What may differ when a run goes on: it decides what is written and when, not what is learned.
FREE = {"log_every", "evaluate_every", "save_every", "keep"}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to learn. `recipe` is the caller's digest of the data and settings that the batches come from.

    The learning rate rises over `warmup_share` of the steps, then falls as a cosine to `floor_share` of itself. Texts run
    in padded chunks of `chunk_texts`; `cached` keeps the graph of one chunk at a time, for about a third more time.
    `max_bad_steps` steps whose loss or gradient is not finite may be left out; an `..._every` of 0 is never.
    """

    steps: int
    lr: float = 2e-5
    warmup_share: float = 0.1
    floor_share: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    chunk_texts: int = 64
    cached: bool = False
    max_bad_steps: int = 0
    recipe: str = ""
    log_every: int = 10
    evaluate_every: int = 0
    save_every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        least = {"steps": 1, "chunk_texts": 1, "log_every": 1, "keep": 1, "max_bad_steps": 0, "evaluate_every": 0, "save_every": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise EncoderError(f"{name} is {getattr(self, name)}. Give {low} or more.")
        for name in ("warmup_share", "floor_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise EncoderError(f"{name} is {getattr(self, name)}. Give a share from 0 to 1.")
        for name, none in (("lr", False), ("clip", False), ("weight_decay", True)):
            value = getattr(self, name)
            if not (0 < value < math.inf or (none and value == 0)):
                raise EncoderError(f"{name} is {value}. Give a finite number above 0{', or 0' if none else ''}.")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to: steps done and left out, where it began, its last logged line and its last checkpoint."""

    steps: int
    bad_steps: int
    resumed_from: int
    last: Mapping[str, Any]
    checkpoint: Path


def learning_rate(step: int, options: TrainOptions) -> float:
    """Return the learning rate of a step, counted from 0."""
    warmup = math.ceil(options.warmup_share * options.steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, options.steps - warmup)
    return options.lr * (options.floor_share + (1 - options.floor_share) * (1 + math.cos(math.pi * share)) / 2)


def train(
    trainable: Trainable,
    batches: Callable[[int], Batch],
    objective: Objective,
    options: TrainOptions,
    *,
    work: Path,
    world: World = alone,
    on_step: OnStep | None = None,
    evaluate: Evaluate | None = None,
) -> Outcome:
    """Train to the last step, from the newest checkpoint in `work`, a folder that all processes see.

    `batches` gives the batch of a step for this rank. `on_step` hears of every step, `evaluate` answers with numbers for
    the log, in every process. An interrupt (ctrl-C) saves a checkpoint and is raised again.
    """
    run = _Run(trainable, objective, options, work=work, world=world)
    devices = [trainable.device] if trainable.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        run.resume()
        started = run.progress.step
        try:
            while run.progress.step < options.steps:
                line = run.advance(batches)
                if options.evaluate_every and run.due(options.evaluate_every) and evaluate is not None:
                    with trainable.evaluating():
                        line.update({name: float(value) for name, value in evaluate(run.progress.step).items()})
                run.log()
                if options.save_every and run.due(options.save_every):
                    run.save()
                if on_step is not None:
                    on_step(line)
        except KeyboardInterrupt:
            run.log()
            run.save()
            raise
    return run.outcome(started)


class _Run:
    """One process of one run, between its checkpoints."""

    def __init__(self, trainable: Trainable, objective: Objective, options: TrainOptions, *, work: Path, world: World) -> None:
        self._trainable, self._objective, self._options, self._world = trainable, objective, options, world
        self._folder, self._metrics = Path(work) / CHECKPOINTS, Path(work) / METRICS
        self._parameters = trainable.parameters
        self._learner = Learner(
            parameters=self._parameters,
            optimizer=_optimizer(self._parameters, options),
            identity=_identity(trainable, objective, options, world),
        )
        self.progress = Progress()
        self._line: dict[str, Any] | None = None
        self._since, self._queries, self._tokens = time.perf_counter(), 0, 0

    def resume(self) -> None:
        """Go back to the newest checkpoint that the leading process sees, and forget what was logged past it."""
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        found = checkpoints.newest(self._folder)
        step = 0 if found is None else checkpoints.step_of(found)
        agreed = self._world.all_reduce_sum(torch.tensor(step if self._world.leads else 0, device=self._trainable.device))
        if int(agreed):
            self.progress = checkpoints.restore(checkpoints.place(self._folder, int(agreed)), self._learner)
        if self._world.leads:
            drop_lines_after(self._metrics, self.progress.step)

    def advance(self, batches: Callable[[int], Batch]) -> dict[str, Any]:
        """Take one step and return what there is to say of it."""
        step, options = self.progress.step, self._options
        optimizer = self._learner.optimizer
        optimizer.zero_grad(set_to_none=True)
        found = step_gradients(
            self._trainable,
            batches(step),
            self._objective,
            draw=Draw(seed=options.seed, step=step, rank=self._world.rank),
            chunk_texts=options.chunk_texts,
            cached=options.cached,
            world=self._world,
        )
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), options.clip))
        rate = learning_rate(step, options)
        bad = not (math.isfinite(found.loss) and math.isfinite(norm))
        if bad and self.progress.bad_steps >= options.max_bad_steps:
            raise EncoderError(self._complaint(found, norm))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with _undisturbed():  # half an update would be no state to save
            if not bad:
                optimizer.step()
            self.progress = Progress(step=step + 1, bad_steps=self.progress.bad_steps + bad)
            self._line = self._said(found, norm=norm, rate=rate)
        return self._line

    def due(self, every: int) -> bool:
        """Say whether something is due that happens every so many steps, and after the last one."""
        return self.progress.step % every == 0 or self.progress.step == self._options.steps

    def log(self) -> None:
        """Write down the last step, once, if its turn has come, or if there is more to say of it than usual."""
        with _undisturbed():
            line, self._line = self._line, None
            if line is None or not self._tells(line):
                return
            self._since, self._queries, self._tokens = time.perf_counter(), 0, 0
            if self._world.leads:
                append_line(self._metrics, line)

    def save(self) -> None:
        """Write a checkpoint of the steps done, if any; the leading process alone does."""
        if self._world.leads and self.progress.step:
            checkpoints.write(self._folder, self._learner, self.progress, keep=self._options.keep)

    def outcome(self, started: int) -> Outcome:
        """Save what is not yet saved, wait for the others, and say what came of it."""
        self.save()
        self._world.all_reduce_sum(torch.zeros(1, device=self._trainable.device))
        lines = read_lines(self._metrics)
        return Outcome(
            steps=self.progress.step,
            bad_steps=self.progress.bad_steps,
            resumed_from=started,
            last=lines[-1] if lines else {},
            checkpoint=checkpoints.place(self._folder, self.progress.step),
        )

    def _tells(self, line: Mapping[str, Any]) -> bool:
        often = (self._options.log_every, self._options.evaluate_every)
        return "bad_steps" in line or any(every and self.due(every) for every in often)

    def _said(self, found: Found, *, norm: float, rate: float) -> dict[str, Any]:
        self._queries += found.queries
        self._tokens += found.tokens
        elapsed_s = max(time.perf_counter() - self._since, 1e-9)
        line: dict[str, Any] = {
            "step": self.progress.step,
            "loss": found.loss,
            **found.terms,
            **found.logged,
            "lr": rate,
            "grad_norm": norm,
        }
        if not (math.isfinite(found.loss) and math.isfinite(norm)):
            line["bad_steps"] = self.progress.bad_steps
        return {**line, "pairs_per_s": self._queries / elapsed_s, "tokens_per_s": self._tokens / elapsed_s}

    def _complaint(self, found: Found, norm: float) -> str:
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in found.terms.items())
        good = checkpoints.newest(self._folder)
        return (
            f"Step {self.progress.step + 1}: the loss is {found.loss:.6g} ({numbers}) and the norm of the gradient {norm:.6g}; "
            f"left out before: {self.progress.bad_steps}. The last good checkpoint is {good or 'none'}. Lower lr or raise tau, "
            "look at the batch of this step, or allow max_bad_steps."
        )


def _optimizer(parameters: Mapping[str, Tensor], options: TrainOptions) -> torch.optim.Optimizer:
    """Return AdamW. Matrices decay; biases and norms, which have one axis, do not."""
    matrices, others = ([weight for weight in parameters.values() if (weight.ndim > 1) is matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # One kernel for all: on one CPU core 19 ms a step for the 22 M weights of MiniLM, and 112 ms weight by weight.
    fused = all(weight.device.type in {"cpu", "cuda"} for weight in parameters.values())
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr, fused=fused)


def _identity(trainable: Trainable, objective: Objective, options: TrainOptions, world: World) -> dict[str, Any]:
    """Return what a checkpoint must have in common with this run, flat, so that a refusal can name the difference."""
    chosen = {item.name: getattr(options, item.name) for item in fields(options) if item.name not in FREE}
    aims = {f"objective.{item.name}": getattr(objective, item.name) for item in fields(objective)}
    tree = {**chosen, **aims, **trainable.identity(), "processes": world.size}
    return dict(json.loads(json.dumps(tree, default=str)))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep an interrupt waiting until the end of the block. Other threads than the main one never see any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if waiting:
        signal.raise_signal(signal.SIGINT)
