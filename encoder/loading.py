"""The model of a tower, loaded by a class from a list: safetensors only, no code of its own, no network, nothing printed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging

from encoder.architectures import ARCHITECTURES
from encoder.errors import TowerError
from encoder.registry import Dtype, TowerCard

_AMPERE = (8, 0)
_DEVICES = "auto, cpu, cuda, cuda:<number> or mps"


def choose_device(name: str) -> torch.device:
    """Return the device of this name; `auto` takes an accelerator where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TowerError(f"device is {name!r}. Choose {_DEVICES}.") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in there:
        raise TowerError(f"device is {name!r}. Choose {_DEVICES}.")
    if (device.index or 0) >= there[device.type]:
        raise TowerError(
            f"device is {name!r}, and there are {there[device.type]} of that kind here. Choose auto or cpu, or mend the driver."
        )
    return device


def choose_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """Return the number format of the model; `auto` is bfloat16 on a CUDA device that has it, and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and has_flash(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def gpu_count() -> int:
    """Return how many CUDA devices this machine has."""
    return int(torch.cuda.device_count())


def has_flash(device: torch.device) -> bool:
    """Say whether a CUDA device multiplies bfloat16 and runs flash attention: from Ampere on."""
    return bool(torch.cuda.get_device_capability(device) >= _AMPERE)


def load_model(directory: Path, card: TowerCard, *, dtype: torch.dtype, attention: str) -> Any:
    """Return the model of a tower in evaluation mode, every weight of it read from the files."""
    architecture = ARCHITECTURES[card.model_type]
    folder = directory / card.model_path
    try:
        with quiet():
            config = getattr(transformers, architecture.config_class).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model, report = getattr(transformers, architecture.model_class).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,  # named, because a configuration could name a kernel to download
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **architecture.arguments,
            )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise TowerError(f"{folder}: the model cannot be loaded: {str(error)[:500]}. Save the tower again.") from error
    absent = sorted(str(name) for kind in ("missing_keys", "mismatched_keys", "error_msgs") for name in report.get(kind) or ())
    if absent:
        raise TowerError(f"{folder}: the weights lack or misfit {', '.join(absent)[:500]}. They are not of this config.json.")
    return model.eval().requires_grad_(requires_grad=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing its bar and its report of unused weights, and leave its settings as they were."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
