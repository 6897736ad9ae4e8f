"""Where a training run stands, on disk: weights and moments as safetensors, the rest as JSON, made whole by one rename.

A checkpoint says of which run it is. It goes on to the bit as if the process had never died, or it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from encoder.errors import EncoderError

FORMAT_VERSION = 1

_WEIGHTS, _MOMENTS, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: steps done, of which `bad_steps` changed nothing because a number was not finite."""

    step: int = 0
    bad_steps: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """What a checkpoint holds: the trained weights by name, their optimizer, and the plain data that names the run."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    identity: Mapping[str, Any]


def newest(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if (path / _STATE).is_file()]
    return max(found, default=None, key=lambda path: path.name)


def place(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"{_PREFIX}{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(path.name.removeprefix(_PREFIX))


def write(folder: Path, learner: Learner, progress: Progress, *, keep: int) -> Path:
    """Write a checkpoint, then drop all but the last `keep`. One that is there already stays: equal runs give equal ones."""
    target = place(folder, progress.step)
    fresh = folder / f".{target.name}.new"
    for left in folder.glob(f".{_PREFIX}*.new"):  # of a process that died here
        shutil.rmtree(left)
    if not target.exists():
        fresh.mkdir(parents=True)
        weights = {name: weight.detach().cpu().contiguous() for name, weight in learner.parameters.items()}
        save_file(weights, fresh / _WEIGHTS)
        save_file(_moments(learner), fresh / _MOMENTS)
        state = {
            "format_version": FORMAT_VERSION,
            "progress": asdict(progress),
            "identity": learner.identity,
            "files": {name: _sha256(fresh / name) for name in (_WEIGHTS, _MOMENTS)},
        }
        (fresh / _STATE).write_text(json.dumps(state, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        for name in (_WEIGHTS, _MOMENTS, _STATE):
            _sync(fresh / name)
        _sync(fresh)
        fresh.rename(target)
        _sync(folder)
    older = sorted(path for path in folder.glob(f"{_PREFIX}*") if path.name < target.name)
    for path in older[: len(older) - keep + 1]:
        shutil.rmtree(path)
    return target


def restore(path: Path, learner: Learner) -> Progress:
    """Put a checkpoint into the weights and the optimizer. One of another run, or a damaged one, changes nothing."""
    state = _state(path)
    _refuse_another(path, state["identity"], _plain(learner.identity))
    for name, expected in state["files"].items():
        if (found := _sha256(path / name)) != expected:
            raise EncoderError(f"{path / name}: expected sha256 {expected}, found {found}. Delete {path}: an older one will do.")
    try:
        weights, moments = load_file(path / _WEIGHTS), load_file(path / _MOMENTS)
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"{path} cannot be read: {str(error)[:200]}. Delete it: an older one will do.") from error
    if weights.keys() != learner.parameters.keys():
        odd = sorted(weights.keys() ^ learner.parameters.keys())
        raise EncoderError(f"{path} has other weights than the model: {', '.join(odd)[:300]}. Give another work folder.")
    with torch.no_grad():
        for name, weight in learner.parameters.items():
            weight.copy_(weights[name])
    _load_moments(learner, moments)
    return Progress(**state["progress"])


def _moments(learner: Learner) -> dict[str, Tensor]:
    """Return the state of the optimizer: `<what>/<weight>`. A weight that never had a gradient has none."""
    return {
        f"{what}/{name}": value.detach().cpu().contiguous()
        for name, weight in learner.parameters.items()
        for what, value in learner.optimizer.state.get(weight, {}).items()
    }


def _load_moments(learner: Learner, moments: Mapping[str, Tensor]) -> None:
    """Hand the state over under the numbers that the optimizer gives its weights."""
    names = {id(weight): name for name, weight in learner.parameters.items()}
    order = [names[id(weight)] for group in learner.optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        what, _, name = key.partition("/")
        state.setdefault(order.index(name), {})[what] = value
    learner.optimizer.load_state_dict({**learner.optimizer.state_dict(), "state": state})


def _refuse_another(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compare what names the run; every difference is told."""
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if names:
        odd = "; ".join(f"{name} is {str(there.get(name))[:100]} there and {str(here.get(name))[:100]} here" for name in names)
        raise EncoderError(f"{path} is of another run: {odd}. Give the old values to go on with it, or another work folder to begin anew.")


def _state(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if tree["format_version"] != FORMAT_VERSION:
            raise EncoderError(
                f"{path}: format_version is {str(tree['format_version'])[:40]}, this version reads {FORMAT_VERSION}. Delete it."
            )
        return {"identity": dict(tree["identity"]), "files": dict(tree["files"]), "progress": dict(tree["progress"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(f"{path / _STATE} cannot be read: {str(error)[:200]}. Delete {path}: an older one will do.") from error


def _plain(tree: Any) -> Any:
    """Return a tree as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(tree))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "no such file"


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
