"""Training on the workers of a Ray cluster: one process group, every worker one process of it. Ray Train's only home."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from encoder.gathering import World
from encoder.loading import gpu_count

# A worker that dies takes the group along; the group begins again at the last checkpoint.
_FAILURES = 3


def on_workers(attend: Callable[[World], object], workers: int, *, work: Path) -> None:
    """Call a function on so many workers at once, each as one process of a group. All of them must see `work`."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415  seconds that other commands do without
    from ray.train.torch import TorchTrainer  # noqa: PLC0415  as above

    def loop(_: dict[str, Any]) -> None:
        attend(World.distributed())

    trainer = TorchTrainer(
        loop,
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu_count() > 0),
        run_config=RunConfig(name="fleet", storage_path=str(work.resolve() / "ray"), failure_config=FailureConfig(max_failures=_FAILURES)),
    )
    trainer.fit()
