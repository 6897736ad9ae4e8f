"""Vectors for texts, or for their token ids, whatever a text does to the tower: raise, give no number, or kill the worker.

A text that raises is found by halving, one that gives no finite vector is tried once more alone. A text that kills the
worker is found by a durable note of what is being tried: whoever finds a note of a dead worker goes on in small steps
from there. Only the texts that failed alone are given up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import isqrt
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from encoder.errors import TowerError
from encoder.tokens import Tokens
from pipelines.errors import AlreadyExists, CatalogEmbedError, EmbedError
from pipelines.storage import Store

FAILED, NOT_FINITE, KILLED = "embed_failed", "embed_not_finite", "embed_killed"

Range = tuple[int, int]
Floats = npt.NDArray[np.float32]
# What is embedded in ranges: texts, or the ids that were made of them elsewhere.
Batch: TypeAlias = Sequence[str] | Tokens

# One poison text costs four deaths: in the part, in a step, and twice alone. Five of them in one part are still found.
MAX_ATTEMPTS = 20
_DEATHS_ALONE = 2
# A tower that cannot embed this cannot embed anything.
_CONTROL = "a"


class TextEncoder(Protocol):
    """What is used of `encoder.inference.Encoder`."""

    tokens_encoded: int
    halvings: int

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return one vector for each text."""
        ...

    def encode_tokens(self, tokens: Tokens) -> Floats:
        """Return one vector for each text, given by its ids."""
        ...


class WorkerBroken(Exception):
    """The tower worked, and now fails on every text: this process is lost, another may go on."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What is known of a part whose vectors are being made.

    `running` is the range of texts that was being tried when this was written (None: all of them at once), `suspects`
    are ranges in which a worker died, `deaths` counts them for texts that were tried alone.
    """

    key: str
    session: str
    number: int = 1
    careful: bool = False
    running: Range | None = None
    suspects: tuple[Range, ...] = ()
    deaths: Mapping[int, int] = field(default_factory=dict)

    @property
    def killers(self) -> set[int]:
        """Texts that are not tried again."""
        return {index for index, count in self.deaths.items() if count >= _DEATHS_ALONE}

    def steps(self, count: int) -> list[Range]:
        """Return the ranges to try, without the killers: what is most suspect comes first, so that it costs little."""
        if not self.careful:
            return [(0, count)] if count else []
        alone = list(dict.fromkeys([*sorted(self.deaths), *(index for begin, end in self.suspects for index in range(begin, end))]))
        left = sorted(set(range(count)) - set(alone))
        size = max(1, isqrt(count))
        # Steps are ranges: they break where a text is tried alone.
        breaks = [0, *(place + 1 for place, (one, other) in enumerate(pairwise(left)) if other != one + 1), len(left)]
        runs = [left[begin:end] for begin, end in pairwise(breaks) if begin < end]
        steps = [(run[place], run[min(place + size, len(run)) - 1] + 1) for run in runs for place in range(0, len(run), size)]
        return [(index, index + 1) for index in alone if index not in self.killers] + steps

    def after_death(self) -> Attempt:
        """Return the attempt that follows when this one's worker is gone."""
        suspects, deaths = self.suspects, dict(self.deaths)
        if self.running is not None:
            begin, end = self.running
            if end - begin > 1:
                suspects = (*suspects, self.running)
            else:
                deaths[begin] = deaths.get(begin, 0) + 1
        return replace(self, number=self.number + 1, careful=True, running=None, suspects=suspects, deaths=deaths)

    def to_json(self) -> bytes:
        """Return the note's bytes: numbers and hashes, never text."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Attempt:
        """Read back what `to_json` wrote."""
        tree = json.loads(data)
        tree["running"] = tuple(tree["running"]) if tree["running"] else None
        tree["suspects"] = tuple((begin, end) for begin, end in tree["suspects"])
        tree["deaths"] = {int(index): count for index, count in tree["deaths"].items()}
        return cls(**tree)


class Note:
    """The durable note of one part's attempt, `runs/<run>/attempts/part-00007.json`. Costs one small write and one delete."""

    def __init__(self, store: Store, place: str) -> None:
        self._store = store
        self._place = place

    def begin(self, *, key: str, session: str) -> Attempt:
        """Write the note, and return how to go on: all at once, or carefully after a dead worker. Raise after too many."""
        attempt = Attempt(key=key, session=session)
        try:
            self._store.put_if_absent(self._place, attempt.to_json())
        except AlreadyExists:
            before = Attempt.from_json(self._store.get(self._place))
        else:
            return attempt
        if before.key == key:
            attempt = before.after_death()
            # Deaths of an earlier run count for texts, not against this run.
            attempt = attempt if before.session == session else replace(attempt, session=session, number=1)
        if attempt.number > MAX_ATTEMPTS:
            raise EmbedError(
                f"workers died {MAX_ATTEMPTS} times on one part ({self._place}), which is more than single rows explain. "
                "Look for the out-of-memory killer; use fewer actors or a smaller token budget, and run again to resume."
            )
        self._store.put(self._place, attempt.to_json())
        return attempt

    def running(self, attempt: Attempt, step: Range) -> None:
        """Note what is tried next."""
        self._store.put(self._place, replace(attempt, running=step).to_json())

    def end(self) -> None:
        """Remove the note: the part is stored."""
        self._store.delete(self._place)


@dataclass(frozen=True, kw_only=True)
class Forwarded:
    """A vector for every text, zero where `failed` says why there is none."""

    vectors: Floats
    failed: Mapping[int, str]


def embed_texts(encoder: TextEncoder, batch: Batch, *, dims: int, limit: int, note: Note, attempt: Attempt) -> Forwarded:
    """Embed what can be embedded; give up when more than `limit` texts fail, because then it is not the texts."""
    work = _Work(encoder, batch, dims=dims, limit=limit)
    for index in sorted(attempt.killers):
        work.give_up(index, KILLED)
    for step in attempt.steps(len(batch)):
        if attempt.careful:
            note.running(attempt, step)
        work.embed(*step)
    return Forwarded(vectors=work.vectors, failed=work.failed)


def check_alive(encoder: TextEncoder, *, dims: int) -> None:
    """Raise unless the tower embeds one word; asked once when it is opened, and warms it up."""
    try:
        vector = encoder.encode([_CONTROL])
    except (TowerError, CatalogEmbedError):
        raise
    except Exception as error:
        raise EmbedError(
            f"the tower fails on the text {_CONTROL!r} ({_shown(error)}: {str(error)[:200]}). Check it with `catalog-embed doctor`."
        ) from error
    if vector.shape != (1, dims) or not _usable(vector).all():
        raise EmbedError(f"the tower gives no finite vector of {dims} numbers for the text {_CONTROL!r}. Check its weights and `dims`.")


class _Work:
    """The texts of one part on their way."""

    def __init__(self, encoder: TextEncoder, batch: Batch, *, dims: int, limit: int) -> None:
        self._encoder = encoder
        self._batch = batch
        self._limit = limit
        self._error = "no finite vector"
        self.vectors: Floats = np.zeros((len(batch), dims), np.float32)
        self.failed: dict[int, str] = {}

    def embed(self, begin: int, end: int) -> None:
        """Embed a range of texts; halve it where it raises, try single texts again where a vector is unusable."""
        try:
            vectors = self._encode(begin, end)
        except (TowerError, CatalogEmbedError):
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, the question is which text does it
            self._error = _shown(error)
        else:
            self._keep(begin, end, vectors)
            return
        if end - begin == 1:
            self._check_worker()
            self.give_up(begin, FAILED)
            return
        middle = (begin + end) // 2
        self.embed(begin, middle)
        self.embed(middle, end)

    def _encode(self, begin: int, end: int) -> Floats:
        if isinstance(self._batch, Tokens):
            return self._encoder.encode_tokens(self._batch[begin:end])
        return self._encoder.encode(self._batch[begin:end])

    def give_up(self, index: int, reason: str) -> None:
        """Record a text that gets no vector."""
        self.failed[index] = reason
        if len(self.failed) > self._limit:
            raise EmbedError(
                f"{len(self.failed)} texts of one part cannot be embedded ({self._error}), so it is not the texts. "
                "Check the tower with `catalog-embed doctor`, and run again to resume."
            )

    def _keep(self, begin: int, end: int, vectors: Floats) -> None:
        if vectors.shape != (end - begin, self.vectors.shape[1]):
            raise EmbedError(f"the tower gave {vectors.shape} numbers for {end - begin} texts of {self.vectors.shape[1]}. Check `dims`.")
        usable = _usable(vectors)
        if usable.all():
            self.vectors[begin:end] = vectors
            return
        self.vectors[begin:end][usable] = vectors[usable]
        for index in np.flatnonzero(~usable) + begin:
            if end - begin == 1:
                self.give_up(int(index), NOT_FINITE)
            else:
                self.embed(int(index), int(index) + 1)

    def _check_worker(self) -> None:
        """Tell a bad text from a bad process: after some errors of a GPU every call fails."""
        try:
            self._encoder.encode([_CONTROL])
        except Exception as error:
            raise WorkerBroken(_shown(error)) from error


def _usable(vectors: Floats) -> npt.NDArray[np.bool_]:
    """Say which vectors are finite and not zero."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    usable: npt.NDArray[np.bool_] = np.isfinite(squares) & (squares > 0)
    # Squares of float32 may overflow, or vanish, where the vector does not; wider numbers take twenty times as long.
    doubtful = np.flatnonzero(~usable)
    norms = np.linalg.norm(vectors[doubtful].astype(np.float64), axis=1)
    usable[doubtful] = np.isfinite(norms) & (norms > 0)
    return usable


def _shown(error: BaseException) -> str:
    """Return an error's type alone: messages may repeat the text."""
    return type(error).__name__
