"""What the processes of one training run tell each other; alone, nothing. The process group is made by whoever starts them.

Rows are gathered with their gradient: each process scores its own queries against the documents of all, and what the others
find out about its documents comes back. Shapes: M rows here, W processes, S rows of all, D dimensions.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their names

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from encoder.errors import EncoderError

# Gradients travel in pieces of so many numbers: one call for each small weight costs more than the copy.
_BUCKET_NUMBERS = 16 * 1024 * 1024


@dataclass(frozen=True)
class World:
    """This process among `size`. With a size of 1 every method returns at once what it was given."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise EncoderError(f"The rank is {self.rank} of {self.size} processes. Ranks count from 0.")

    @classmethod
    def distributed(cls) -> World:
        """Return this process in the default process group, which somebody else has made."""
        if not (dist.is_available() and dist.is_initialized()):
            raise EncoderError("There is no process group. Start the training inside one, or train alone.")
        return cls(rank=dist.get_rank(), size=dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Say whether this process writes what there is one of."""
        return self.rank == 0

    def all_reduce_sum(self, numbers: Tensor) -> Tensor:
        """Return the sum over all processes, without a gradient."""
        total = numbers.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier()

    def sizes(self, rows: int, *, device: torch.device) -> list[int]:
        """Return how many rows each process has, this one having `rows`."""
        if self.size == 1:
            return [rows]
        counts_W = torch.zeros(self.size, dtype=torch.int64, device=device)
        counts_W[self.rank] = rows
        dist.all_reduce(counts_W)
        return [int(count) for count in counts_W.tolist()]

    def gather(self, rows_M: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their ranks, without a gradient. Their numbers may differ."""
        return rows_M if self.size == 1 else _gathered(self, rows_M.detach(), self.sizes(len(rows_M), device=rows_M.device))

    def gather_with_grad(self, rows_MD: Tensor) -> Tensor:
        """Return the rows of all processes; the gradient of a row is the sum of what every process finds."""
        if self.size == 1:
            return rows_MD
        gathered: Tensor = _Gather.apply(rows_MD, self, self.sizes(len(rows_MD), device=rows_MD.device))
        return gathered

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace the gradients by their mean over the processes, as DDP does. One that no process has stays absent."""
        if self.size == 1 or not parameters:
            return
        device = parameters[0].device
        # A process whose loss does not reach a weight still takes part, with zeros: else the others would wait for it.
        present = self.all_reduce_sum(torch.tensor([float(weight.grad is not None) for weight in parameters], device=device))
        reached = [weight for weight, count in zip(parameters, present.tolist(), strict=True) if count]
        for weight in reached:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        for bucket in _buckets(reached):
            flat = torch.cat([weight.grad.reshape(-1) for weight in bucket])
            dist.all_reduce(flat)
            pieces = (flat / self.size).split([weight.numel() for weight in bucket])
            for weight, piece in zip(bucket, pieces, strict=True):
                weight.grad.copy_(piece.view_as(weight))


alone = World()


class _Gather(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """All rows forward; backward the sum over the processes of the gradients of the own rows."""

    @staticmethod
    def forward(context: Any, rows_MD: Tensor, world: World, sizes: list[int]) -> Tensor:
        context.world, context.start, context.rows = world, sum(sizes[: world.rank]), len(rows_MD)
        return _gathered(world, rows_MD, sizes)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total_SD = context.world.all_reduce_sum(gradients[0].contiguous())
        return total_SD[context.start : context.start + context.rows], None, None


def _gathered(world: World, rows_M: Tensor, sizes: list[int]) -> Tensor:
    """Gather rows padded to the longest process, and cut the padding: all_gather wants equal shapes."""
    padded = rows_M.new_zeros((max(sizes), *rows_M.shape[1:]))
    padded[: len(rows_M)] = rows_M
    pieces = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


def _buckets(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the weights in runs of one number format and device, and of a bounded size."""
    buckets: list[list[Tensor]] = []
    room, kind = 0, None
    for weight in weights:
        if kind != (weight.dtype, weight.device) or weight.numel() > room:
            buckets.append([])
            room, kind = _BUCKET_NUMBERS, (weight.dtype, weight.device)
        buckets[-1].append(weight)
        room -= weight.numel()
    return buckets
