"""Training on the workers of a Ray cluster: one process group, every worker one process of it. Ray Train's only home."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from encoder.errors import EncoderError
from encoder.gathering import World
from pipelines.errors import CatalogEmbedError, InputError

# A worker that dies takes the group along; the group begins again at the last checkpoint.
_FAILURES = 3
REFUSED = "refused.txt"


def on_workers(attend: Callable[[World], object], workers: int, *, work: Path) -> None:
    """Call a function on so many workers at once, each as one process of a group. All of them must see `work`.

    What it refuses is not tried again, and raised here as an InputError.
    """
    import ray  # noqa: PLC0415  seconds that others do without
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError  # noqa: PLC0415  as above
    from ray.train.torch import TorchTrainer  # noqa: PLC0415  as above

    work.mkdir(parents=True, exist_ok=True)
    refused = work.resolve() / REFUSED
    refused.unlink(missing_ok=True)

    def loop(_: dict[str, Any]) -> None:
        if refused.exists():
            return
        try:
            attend(World.distributed())
        except (EncoderError, CatalogEmbedError) as error:
            refused.write_text(str(error), encoding="utf-8")
            # Raised all the same: others may wait for this process, and the group has to be taken down.
            raise

    trainer = TorchTrainer(
        loop,
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=ray.cluster_resources().get("GPU", 0) > 0),
        run_config=RunConfig(name="fleet", storage_path=str(work.resolve() / "ray"), failure_config=FailureConfig(max_failures=_FAILURES)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise EncoderError(
            f"The workers failed {_FAILURES + 1} times, the last time with: {str(error).strip().splitlines()[-1][:300]}. "
            f"Look at the workers' logs; the same command goes on at the last checkpoint in {work}."
        ) from error
    if refused.exists():
        raise InputError(refused.read_text(encoding="utf-8"))
