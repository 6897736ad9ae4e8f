"""The gradient of one step, over all processes: direct, or with a gradient cache where the graph of a batch has no room.

The cache embeds the texts without a graph, takes the loss on their vectors, and embeds again chunk by chunk, each chunk
with the gradient of its vectors. Every chunk has its own seed, so dropout drops the same again, and both ways agree.
Shapes: Q queries here, M documents here, S documents of all processes, D dimensions, R rows of any of them.
"""

# ruff: noqa: N803, N806 - tensors carry their shape in their names

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.errors import EncoderError
from encoder.examples import Batch
from encoder.gathering import World
from encoder.objectives import Keys, Objective, Term, against_all, keys_of, terms
from encoder.trainable import Chunk, Trainable


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What the random numbers of a step hang on, and nothing else: a resumed run draws what it would have drawn."""

    seed: int
    step: int
    rank: int

    def of_chunk(self, number: int) -> int:
        """Return the seed of one chunk."""
        digest = hashlib.blake2b(f"{self.seed} {self.step} {self.rank} {number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a step says of itself, the same in every process: the loss, its terms as means, other numbers, sizes."""

    loss: float
    terms: Mapping[str, float]
    logged: Mapping[str, float]
    queries: int
    tokens: int


def step_gradients(
    trainable: Trainable, batch: Batch, objective: Objective, *, draw: Draw, chunk_texts: int, cached: bool, world: World
) -> Found:
    """Add the gradient of a batch to the weights, as if one process had all of it."""
    if not batch.queries or not batch.documents:
        raise EncoderError(f"Step {draw.step} has {len(batch.queries)} queries and {len(batch.documents)} documents. Give some of both.")
    keys = _gathered(keys_of(batch, trainable.device), world)
    query_chunks = trainable.chunks(batch.queries, kind="query", size=chunk_texts)
    document_chunks = trainable.chunks(batch.documents, kind="document", size=chunk_texts)
    with torch.set_grad_enabled(not cached):
        queries_QD = _embedded(trainable, query_chunks, draw, first=0)
        documents_MD = _embedded(trainable, document_chunks, draw, first=len(query_chunks))
    if cached:
        queries_QD.requires_grad_()
        documents_MD.requires_grad_()
    found, logged = terms(objective, queries_QD, world.gather_with_grad(documents_MD), keys)
    loss, means = combined(found, world)
    loss.backward()
    if cached:
        _replay(trainable, query_chunks, queries_QD.grad, draw, first=0)
        _replay(trainable, document_chunks, documents_MD.grad, draw, first=len(query_chunks))
    world.average_gradients(list(trainable.parameters.values()))
    tokens = sum(chunk.tokens for chunk in (*query_chunks, *document_chunks))
    sizes = {"queries": torch.tensor(float(len(batch.queries))), "tokens": torch.tensor(float(tokens))}
    sums = _summed({**logged, **{name: (size, torch.tensor(0.0)) for name, size in sizes.items()}}, world, trainable.device)
    return Found(
        loss=sum(found[name].weight * mean for name, mean in means.items()),
        terms=means,
        logged={name: _ratio(*sums[name]) for name in logged},
        queries=int(sums["queries"][0]),
        tokens=int(sums["tokens"][0]),
    )


def combined(found: Mapping[str, Term], world: World) -> tuple[Tensor, dict[str, float]]:
    """Return what to differentiate here, and the mean of each term over all processes.

    loss = W * sum of weight * num / (count of all processes): the mean of the gradients over W processes is then that of
    one process with all rows, however the counts are spread. A term that counts nothing anywhere adds nothing.
    """
    device = next(iter(found.values())).num.device
    sums = _summed({name: (term.num, term.count) for name, term in found.items()}, world, device)
    loss = torch.zeros((), device=device)
    for name, term in found.items():
        _, count = sums[name]
        loss = loss + (world.size * term.weight / count if count else 0.0) * term.num
    return loss, {name: _ratio(num, count) for name, (num, count) in sums.items()}


def _gathered(keys: Keys, world: World) -> Keys:
    """Return the keys with the documents of all processes standing against the queries of this one."""
    if world.size == 1:
        return keys
    sizes = world.sizes(len(keys.product_M), device=keys.product_M.device)
    return against_all(keys, gather=world.gather, offset=sum(sizes[: world.rank]))


def _summed(pairs: Mapping[str, tuple[Tensor, Tensor]], world: World, device: torch.device) -> dict[str, tuple[float, float]]:
    """Add up pairs of a sum and a count over the processes, all in one call."""
    if not pairs:
        return {}
    flat = torch.stack([number.detach().to(device, torch.float32) for pair in pairs.values() for number in pair])
    rows = world.all_reduce_sum(flat).view(-1, 2).tolist()
    return {name: (float(num), float(count)) for name, (num, count) in zip(pairs, rows, strict=True)}


def _ratio(num: float, count: float) -> float:
    """Return a mean; that of nothing is 0, unless the sum is not finite: then it says so."""
    return num / count if count else num * 0.0


def _embedded(trainable: Trainable, chunks: Sequence[Chunk], draw: Draw, *, first: int) -> Tensor:
    """Return the vectors of chunks, in the order of their texts."""
    pieces = []
    for number, chunk in enumerate(chunks, first):
        torch.manual_seed(draw.of_chunk(number))
        pieces.append(trainable.embed(chunk))
    rows_R = torch.cat([chunk.rows for chunk in chunks])
    return torch.cat(pieces)[torch.argsort(rows_R)]


def _replay(trainable: Trainable, chunks: Sequence[Chunk], gradients_RD: Tensor | None, draw: Draw, *, first: int) -> None:
    """Embed again with a graph, one chunk at a time, and hand the gradient of its vectors down to the weights."""
    if gradients_RD is None:
        return
    for number, chunk in enumerate(chunks, first):
        torch.manual_seed(draw.of_chunk(number))
        trainable.embed(chunk).backward(gradients_RD[chunk.rows])
