"""How texts are put into packs: sorted by length, end to end, a budget of tokens each. Pure NumPy.

A pack holds whole texts, the longest first, so that texts of one length stand side by side: they are a dense block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from encoder.tokens import Tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """Texts that run as one: which they are, how long each is, and their ids end to end."""

    rows: npt.NDArray[np.intp]
    lengths: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]

    def size(self, *, padding: bool) -> int:
        """Return how many tokens are run, padding counted where there is any."""
        return len(self.rows) * int(self.lengths[0]) if padding else len(self.ids)

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Return how many texts of which length follow each other."""
        breaks = np.flatnonzero(np.diff(self.lengths)) + 1
        starts = np.concatenate([[0], breaks])
        counts = np.diff(np.append(starts, len(self.lengths)))
        return tuple(zip(counts.tolist(), self.lengths[starts].tolist(), strict=True))

    @property
    def boundaries(self) -> npt.NDArray[np.int32]:
        """Return where each text begins, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    def positions(self, *, after: int | None = None) -> npt.NDArray[np.int64]:
        """Return the position of each token in its text: from 0, or behind a padding id, which stands on itself uncounted."""
        if after is None:
            return np.arange(len(self.ids)) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        counted = self.ids != after
        seen = np.cumsum(counted)
        before = np.append(0, seen)[self.boundaries[:-1]]
        return after + np.where(counted, seen - np.repeat(before, self.lengths), 0)

    def padded(self, *, pad_id: int) -> npt.NDArray[np.int32]:
        """Return the ids as one matrix, padded on the right."""
        inside = np.arange(self.lengths[0]) < self.lengths[:, None]
        ids = np.full(inside.shape, pad_id, np.int32)
        ids[inside] = self.ids
        return ids


class Window:
    """Texts sorted by length, cut into packs from the longest on. A text without a token counts as one of padding."""

    def __init__(self, tokens: Tokens, *, pad_id: int) -> None:
        lengths = np.maximum(tokens.lengths, 1)
        self._order = np.argsort(-lengths, kind="stable")  # what does not fit in memory shows at once
        self._lengths = lengths[self._order]
        self._ends = np.cumsum(self._lengths)
        starts = self._ends - self._lengths
        places = np.arange(self._ends[-1] if len(tokens) else 0) + np.repeat(tokens.offsets[:-1][self._order] - starts, self._lengths)
        empty = np.repeat(tokens.lengths[self._order] == 0, self._lengths)
        places[empty] = 0
        source = tokens.ids if tokens.ids.size else np.full(1, pad_id, np.int32)
        self._ids = source[places]
        self._ids[empty] = pad_id

    def __len__(self) -> int:
        return len(self._order)

    @property
    def tokens(self) -> int:
        """Return how many tokens all texts have."""
        return len(self._ids)

    def cut(self, start: int, *, budget: int, padding: bool) -> int:
        """Return where the pack that begins at a text ends: one text or more, within the budget. Padding may count."""
        if padding:
            return min(len(self), start + max(1, budget // int(self._lengths[start])))
        before = int(self._ends[start] - self._lengths[start])
        return max(start + 1, int(np.searchsorted(self._ends, before + budget, side="right")))

    def pack(self, start: int, end: int) -> Pack:
        """Return the texts from one place in the order to another."""
        before = int(self._ends[start] - self._lengths[start])
        return Pack(rows=self._order[start:end], lengths=self._lengths[start:end], ids=self._ids[before : int(self._ends[end - 1])])
