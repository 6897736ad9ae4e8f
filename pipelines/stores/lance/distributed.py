"""The vector index of a table past one process: partitions trained once, a segment for each group of fragments, one commit.

Nothing is in the table until that commit: a dead worker's segment is a file that no version names, which a sweep removes.
The partitions depend on the rows alone and the vectors are kept whole, so any number of workers, and any groups, give
the same answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.contracts import Spread, one_by_one
from pipelines.errors import StoreError
from pipelines.schema import VECTOR
from pipelines.stores.lance.opening import Line, explained, open_table
from pipelines.stores.lance.reading import fragment_groups

Floats = npt.NDArray[np.float32]

KIND = "IVF_FLAT"
# What Lance aims at for this kind; past so many partitions, training them costs more than their size saves.
_PARTITION_ROWS, _MOST_PARTITIONS = 4096, 1 << 14
_SAMPLES_EACH, _SAMPLE_BYTES, _BLOCK_BYTES = 256, 1 << 30, 64 << 20
# Twelve rounds came within 0.5 % of the error after 25, and to that of Lance's own training (its result is never twice the same).
_ROUNDS = 12


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who builds the segments of a big table, how many at a time, and how many rows one of them covers.

    A segment of 400,000 vectors of 384 numbers took 0.7 GiB of a worker's memory, one of 200,000 took 0.55, and its
    disk holds the vectors of the group once more.
    """

    spread: Spread = one_by_one
    in_flight: int = 4
    group_rows: int = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every worker of one build is told. The version is the one that the commit follows."""

    uri: str
    version: int
    options: Mapping[str, str]
    name: str
    metric: str
    centroids: Floats


def build_segments(line: Line, *, name: str, metric: str, most_pieces: int, workers: Workers) -> None:
    """Build the index in segments on workers, join them to at most `most_pieces`, and commit it in place of the old one."""
    dataset = open_table(line.uri, options=line.options)
    line = Line(line.uri, line.options, version=dataset.version) if line.version is None else line
    line.check()
    with explained("train the partitions of", line.uri):
        centroids = _trained(dataset, metric)
    job = _Job(uri=line.uri, version=int(dataset.version), options=dict(line.options), name=name, metric=metric, centroids=centroids)
    groups = fragment_groups(line.uri, version=job.version, rows=workers.group_rows, options=line.options)
    segments = _in_order(workers.spread(_segment, ((job, group) for group in groups), in_flight=workers.in_flight))
    shares = np.array_split(np.arange(len(segments)), min(most_pieces, len(segments)))
    joined = ((job, [segments[at] for at in share.tolist()]) for share in shares)
    pieces = _in_order(workers.spread(_joined, joined, in_flight=workers.in_flight))
    _check_cover(dataset, pieces)
    line.commit(lambda latest: latest.commit_existing_index_segments(name, VECTOR, pieces))


def _segment(job: _Job, fragments: Sequence[int]) -> Any:
    """Build the segment of a few fragments, on a worker, and return what the commit needs to know of it."""
    dataset = open_table(job.uri, version=job.version, options=job.options)
    partitions, dims = job.centroids.shape
    with explained(f"index {len(fragments)} fragments of", job.uri):
        return dataset.create_index_uncommitted(
            VECTOR,
            KIND,
            name=job.name,
            metric=job.metric,
            replace=True,
            fragment_ids=[*fragments],
            num_partitions=partitions,
            ivf_centroids=pa.FixedSizeListArray.from_arrays(pa.array(job.centroids.ravel()), dims),
        )


def _joined(job: _Job, segments: Sequence[Any]) -> Any:
    """Make one segment of several, on a worker."""
    if len(segments) == 1:
        return segments[0]
    dataset = open_table(job.uri, version=job.version, options=job.options)
    with explained(f"join {len(segments)} index segments of", job.uri):
        return dataset.merge_existing_index_segments([*segments])


def _in_order(segments: Iterable[Any]) -> list[Any]:
    """Return segments in the order of their fragments, whatever the order in which workers finished."""
    return sorted(segments, key=lambda segment: min(segment.fragment_ids))


def _check_cover(dataset: Any, pieces: Sequence[Any]) -> None:
    """Raise unless every fragment is in exactly one piece."""
    covered = sorted(number for piece in pieces for number in piece.fragment_ids)
    wanted = sorted(fragment.fragment_id for fragment in dataset.get_fragments())
    if covered != wanted:
        raise StoreError(
            f"the workers indexed {len(covered)} fragments of table {dataset.uri}, which has {len(wanted)}. Run again; nothing was published."
        )


def _trained(dataset: Any, metric: str) -> Floats:
    """Return the centres of the partitions: k-means over an even sample, from an even start, so that a re-run gives the same."""
    rows, dims = dataset.count_rows(), dataset.schema.field(VECTOR).type.list_size
    partitions = min(_MOST_PARTITIONS, max(1, rows // _PARTITION_ROWS))
    wanted = min(rows, _SAMPLES_EACH * partitions, max(partitions, _SAMPLE_BYTES // (4 * dims)))
    vectors = dataset.take(_evenly(rows, wanted).tolist(), columns=[VECTOR]).column(VECTOR).combine_chunks()
    sample = np.asarray(vectors.values).reshape(len(vectors), dims).astype(np.float32)
    sample = _of_unit_length(sample)
    centres = sample[_evenly(wanted, partitions)]
    for _ in range(_ROUNDS):
        centres = _moved(sample, centres)
    # By inner product a long centre would draw vectors from nearer ones.
    return _of_unit_length(centres) if metric == "dot" else centres


def _moved(sample: Floats, centres: Floats) -> Floats:
    """Return the means of what is nearest to each centre; the centre of nothing goes to where the error is largest."""
    nearest, error = _assigned(sample, centres)
    sizes = np.bincount(nearest, minlength=len(centres))
    held = np.flatnonzero(sizes)
    starts = np.concatenate([[0], np.cumsum(sizes[held])[:-1]])
    means = np.add.reduceat(sample[np.argsort(nearest, kind="stable")], starts, axis=0)
    moved = np.empty_like(centres)
    moved[held] = means / sizes[held, None]
    empty = np.flatnonzero(sizes == 0)
    moved[empty] = sample[np.argsort(-error, kind="stable")[: len(empty)]]
    return moved


def _assigned(sample: Floats, centres: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return for each vector its nearest centre and the squared distance, less its own length, in blocks of bounded memory."""
    nearest = np.empty(len(sample), np.int64)
    error = np.empty(len(sample), np.float32)
    halves = (centres**2).sum(axis=1) / 2
    block = max(1, _BLOCK_BYTES // (4 * len(centres)))
    for start in range(0, len(sample), block):
        part = slice(start, start + block)
        closeness = sample[part] @ centres.T - halves
        nearest[part] = closeness.argmax(axis=1)
        error[part] = -2 * closeness.max(axis=1)
    return nearest, error


def _of_unit_length(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = vectors / np.maximum(lengths, np.float32(1e-12))
    return unit


def _evenly(total: int, wanted: int) -> npt.NDArray[np.int64]:
    """Return so many different positions below `total`, at even distances."""
    return np.arange(wanted, dtype=np.int64) * total // wanted
