"""A judge says how well a product answers a query: the contract, the guideline it follows, and a memory of what it said.

A judge is trusted as far as it agrees with people (`agreement`): measure that before its grades train a tower. Judges are
in encoder/judge_models.py and encoder/judge_endpoint.py; anything with this face will do.

Levels are a judge's grades: whole numbers, larger is better, 0 is the worst.
"""

# ruff: noqa: N803, N806, N815 - arrays carry their shape in their names

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encoder.errors import EncoderError
from encoder.examples import Grades

# What a judge said of pairs that nobody had judged. `grade` is on the scale of the judgments, not of the judge.
JUDGED = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("locale", pa.string(), nullable=False),
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("grade", pa.int8(), nullable=False),
        pa.field("confidence", pa.float32()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
    ]
)

Floats: TypeAlias = npt.NDArray[np.float64]

_BUSY_S = 60.0
_TABLE = """CREATE TABLE IF NOT EXISTS verdicts (
    judge TEXT NOT NULL, query TEXT NOT NULL, text_sha256 TEXT NOT NULL,
    grade INTEGER NOT NULL, probabilities TEXT NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (judge, query, text_sha256)) WITHOUT ROWID"""


@dataclass(frozen=True, kw_only=True)
class Guideline:
    """What each level means, lowest first, and the rules that decide the hard cases. Changing a word makes another judge."""

    names: tuple[str, ...]
    meanings: tuple[str, ...]
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(self.names) != len(self.meanings) or len(set(self.names)) != len(self.names):  # noqa: PLR2004  one level says nothing
            raise EncoderError(f"A guideline has levels {self.names} and {len(self.meanings)} meanings. Give two or more names, each once.")

    def text(self) -> str:
        """Return it as a person or a language model reads it, best level first."""
        levels = [
            f"{number} = {name}: {meaning}"
            for number, (name, meaning) in reversed(list(enumerate(zip(self.names, self.meanings, strict=True))))
        ]
        return "\n".join([*levels, *(f"- {rule}" for rule in self.rules)])

    def to_grades(self, grades: Grades) -> tuple[int, ...]:
        """Return the grade that each level stands for on another scale.

        The worst is the lowest and the best the best. What lies between becomes the lowest relevant grade: to call a complement
        a substitute keeps it from being a negative, while to call a substitute a complement would train the tower against it.
        """
        if len(self.names) == len(grades.names):
            return tuple(range(len(self.names)))
        return (0, *(min(grades.positive, grades.best),) * (len(self.names) - 2), grades.best)

    def from_grades(self, grades: Grades) -> tuple[int, ...]:
        """Return the level that each grade of another scale stands for: E is exact, S and C are partial, I is irrelevant."""
        if len(self.names) == len(grades.names):
            return tuple(range(len(self.names)))
        top = len(self.names) - 1
        if top != 2:  # noqa: PLR2004  of more levels nobody said which grade is which
            raise EncoderError(f"{len(self.names)} levels do not map on {len(grades.names)} grades by themselves. Map the grades first.")
        return (0, *(1,) * (len(grades.names) - 2), top)


THREE_LEVELS = Guideline(
    names=("irrelevant", "partial", "exact"),
    meanings=(
        "The product does not serve the need behind the query, or only shares words with it.",
        (
            "The product serves the need in part: a shopper might take it instead (a substitute) or buy it along (a complement), "
            "but it misses something that the query asked for."
        ),
        "The product is what the query asks for, and meets every requirement that the query states.",
    ),
    rules=(
        "Judge the product against the words of the query, not its quality, price or popularity.",
        (
            "Brand: if the query names a brand, maker or product line, another brand is at most partial. A compatible part "
            "'for' that brand is exact only if the query asks for a compatible part."
        ),
        (
            "Numbers: sizes, capacities, counts, model numbers and versions in the query must match. Another size, another "
            "model or the preceding generation is at most partial; '2 x 500 ml' equals '1 l' only if the query asks for an amount."
        ),
        (
            "Accessories: an accessory, spare part, refill or case for the thing asked for is at most partial, and so is the thing "
            "itself when the accessory was asked for."
        ),
        (
            "Attributes: colour, material, gender, age group and compatibility in the query must be met. One that the text of the "
            "product contradicts makes it at most partial; one that the text merely does not mention does not count against it."
        ),
        "Negations ('without', 'sugar-free', 'not wireless') are requirements: a product that breaks one is at most partial.",
        "A broad query ('gift for dad', 'shoes') is met exactly by any product of the kind asked for.",
        "Spelling mistakes and other languages do not matter: judge what the shopper meant.",
        "If two levels seem equally right, give the lower one.",
    ),
)


@dataclass(frozen=True)
class Pair:
    """What a judge sees: a query, and the text of a product."""

    query: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge says: a level, how probable it holds each level (empty where it does not say), and why (or nothing)."""

    grade: int
    probabilities: tuple[float, ...] = ()
    reason: str = ""

    @property
    def confidence(self) -> float | None:
        """Return the probability of its level, where the judge gives any."""
        return self.probabilities[self.grade] if self.probabilities else None


class Judge(Protocol):
    """Grades pairs. `version` changes with whatever changes its answers: weights, model name, prompt, guideline."""

    @property
    def version(self) -> str:
        """Name the judge; its verdicts are kept under this name."""
        ...

    @property
    def guideline(self) -> Guideline:
        """Return the levels that its grades count."""
        ...

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Return one verdict for each pair, in order; all or an error."""
        ...


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Verdicts as a table, and how many pairs could not be asked about because no product has their key."""

    judged: pa.Table
    without_text: int


def ask(judge: Judge, unknown: pa.Table, products: pa.Table, *, grades: Grades) -> Judging:
    """Put unknown pairs (query_id, query, locale, product_id) to a judge, with the texts of the products."""
    keys = ["locale", "product_id"]
    texts = products.select([*keys, "text"])
    if texts.group_by(keys).aggregate([([], "count_all")]).num_rows != texts.num_rows:
        raise EncoderError("A product stands twice in the products table. Keep one row for each (locale, product_id).")
    asked = unknown.select(["query_id", "query", *keys]).join(texts, keys, join_type="inner")
    asked = asked.sort_by([(name, "ascending") for name in ("query_id", *keys)])  # a join has no order
    pairs = [Pair(query, text) for query, text in zip(asked["query"].to_pylist(), asked["text"].to_pylist(), strict=True)]
    verdicts = checked(judge.judge(pairs), len(pairs), judge.guideline, judge.version)
    scale = judge.guideline.to_grades(grades)
    columns = [
        *(asked[name] for name in ("query_id", "query", *keys)),
        [scale[verdict.grade] for verdict in verdicts],
        [verdict.confidence for verdict in verdicts],
        [verdict.reason for verdict in verdicts],
        [judge.version] * len(verdicts),
    ]
    judged = pa.table(dict(zip(JUDGED.names, columns, strict=True)), schema=JUDGED)
    return Judging(judged=judged, without_text=unknown.num_rows - judged.num_rows)


class CachedJudge:
    """A judge that is asked about a pair once. What it says is kept in one SQLite file, which any process may share.

    Verdicts are committed slice by slice: a crash costs the slice that was out. Where two processes judge the same pair at
    once, the first answer stays, and both return it.
    """

    def __init__(self, judge: Judge, path: Path, *, slice_pairs: int = 256) -> None:
        if slice_pairs < 1:
            raise EncoderError(f"slice_pairs is {slice_pairs}. Give 1 or more.")
        self.path = path
        self.hits = 0
        self.misses = 0
        self._judge, self._slice_pairs = judge, slice_pairs
        self._counting = threading.Lock()
        with self._open() as database:
            database.execute(_TABLE)

    @property
    def version(self) -> str:
        """Return the version of the judge behind it."""
        return self._judge.version

    @property
    def guideline(self) -> Guideline:
        """Return the guideline of the judge behind it."""
        return self._judge.guideline

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Return kept verdicts, and ask for those that are missing: each different pair once."""
        version = self.version
        keys = [(version, pair.query, hashlib.sha256(pair.text.encode("utf-8", "surrogatepass")).hexdigest()) for pair in pairs]
        wanted = dict(zip(keys, pairs, strict=True))
        known = self._kept(wanted)
        missing = [key for key in wanted if key not in known]
        with self._counting:
            self.misses += len(missing)
            self.hits += len(pairs) - len(missing)
        for start in range(0, len(missing), self._slice_pairs):
            part = missing[start : start + self._slice_pairs]
            verdicts = checked(self._judge.judge([wanted[key] for key in part]), len(part), self.guideline, version)
            self._keep(part, verdicts)
            known |= self._kept(part)
        return [known[key] for key in keys]

    def _kept(self, keys: Sequence[tuple[str, str, str]] | dict[tuple[str, str, str], Pair]) -> dict[tuple[str, str, str], Verdict]:
        found = {}
        with self._open() as database:
            for key in keys:
                question = "SELECT grade, probabilities, reason FROM verdicts WHERE judge = ? AND query = ? AND text_sha256 = ?"
                row = database.execute(question, key).fetchone()
                if row is not None:
                    found[key] = self._verdict(*row)
        return found

    def _verdict(self, grade: int, probabilities: str, reason: str) -> Verdict:
        try:
            verdict = Verdict(grade=grade, probabilities=tuple(json.loads(probabilities)), reason=reason)
            return checked([verdict], 1, self.guideline, self.version)[0]
        except (ValueError, TypeError, EncoderError) as error:
            raise EncoderError(
                f"{self.path}: a kept verdict cannot be read ({str(error)[:200]}). Delete the file: it is made anew."
            ) from error

    def _keep(self, keys: Sequence[tuple[str, str, str]], verdicts: Sequence[Verdict]) -> None:
        rows = [
            (*key, verdict.grade, json.dumps(verdict.probabilities), verdict.reason) for key, verdict in zip(keys, verdicts, strict=True)
        ]
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", rows)
            database.execute("COMMIT")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the file for one piece of work. The rollback journal, not WAL: it is safe on network drives too."""
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)) as database:
                yield database
        except sqlite3.Error as error:
            advice = "If it is no cache of verdicts, or is damaged, name another file"
            raise EncoderError(f"{self.path}: the cache of verdicts cannot be used ({error}). {advice}.") from error


def checked(verdicts: list[Verdict], count: int, guideline: Guideline, version: str) -> list[Verdict]:
    """Return verdicts as they are, if there is one for each pair and every grade is a level of the guideline."""
    levels = len(guideline.names)
    if len(verdicts) != count:
        raise EncoderError(f"Judge {version} gave {len(verdicts)} verdicts for {count} pairs. It must give one for each, in order.")
    for verdict in verdicts:
        fits = type(verdict.grade) is int and 0 <= verdict.grade < levels
        if not fits or len(verdict.probabilities) not in {0, levels}:
            raise EncoderError(f"Judge {version} gave {verdict!r}, and its guideline has the levels 0 to {levels - 1}. Mend the judge.")
    return verdicts


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How a judge and people agree. Rows of `confusion_GG` are what people said, columns what the judge said.

    Intervals are 95 % percentile intervals of a bootstrap over queries: pairs of one query are not independent. A number that
    is undefined (nobody used that level) is None.
    """

    version: str
    names: tuple[str, ...]
    pairs: int
    queries: int
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    within_one: float | None
    kappa: float | None
    kappa_interval: tuple[float, float] | None
    precision: tuple[float | None, ...]
    recall: tuple[float | None, ...]
    confusion_GG: tuple[tuple[int, ...], ...]

    def to_json(self) -> bytes:
        """Return the canonical bytes."""
        return json.dumps(self.__dict__, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    def to_text(self) -> str:
        """Return it for a person: the numbers, then the table of what was said."""

        def shown(value: float | None, interval: tuple[float, float] | None = None) -> str:
            span = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
            return "undefined" if value is None else f"{value:.3f}{span}"

        width = max(12, *(len(name) + 2 for name in self.names))
        lines = [
            f"judge {self.version}: {self.pairs} pairs of {self.queries} queries",
            f"accuracy         {shown(self.accuracy, self.accuracy_interval)}",
            f"within one       {shown(self.within_one)}",
            f"quadratic kappa  {shown(self.kappa, self.kappa_interval)}",
            "people \\ judge".ljust(width + 4) + "".join(name.rjust(width) for name in (*self.names, "recall")),
        ]
        for name, row, recall in zip(self.names, self.confusion_GG, self.recall, strict=True):
            lines.append(name.ljust(width + 4) + "".join(str(count).rjust(width) for count in row) + shown(recall).rjust(width))
        lines.append("precision".ljust(width + 4) + "".join(shown(value).rjust(width) for value in self.precision))
        return "\n".join(lines)


def agreement(judge: Judge, pairs: Sequence[Pair], levels: Sequence[int], *, resamples: int = 1000, seed: int = 0) -> Agreement:
    """Put pairs that people graded (as levels of the judge's guideline) to a judge, and compare."""
    said = [verdict.grade for verdict in checked(judge.judge(pairs), len(pairs), judge.guideline, judge.version)]
    names = judge.guideline.names
    if len(levels) != len(pairs) or any(not 0 <= level < len(names) for level in levels):
        raise EncoderError(f"{len(levels)} levels for {len(pairs)} pairs: give one from 0 to {len(names) - 1} for each pair.")
    _, query_P = np.unique(np.array([pair.query for pair in pairs], dtype=object), return_inverse=True)
    queries = int(query_P.max(initial=-1)) + 1
    counts_QGG = np.zeros((queries, len(names), len(names)), np.int64)
    np.add.at(counts_QGG, (query_P, np.asarray(levels, np.int64), np.asarray(said, np.int64)), 1)
    total_GG = counts_QGG.sum(axis=0)
    accuracy, within, kappa = (_optional(values[0]) for values in _numbers(total_GG[None]))
    spans = _intervals(counts_QGG, resamples, seed)
    hits_G, given_G, true_G = np.diag(total_GG), total_GG.sum(axis=0), total_GG.sum(axis=1)
    return Agreement(
        version=judge.version,
        names=names,
        pairs=len(pairs),
        queries=queries,
        accuracy=accuracy,
        accuracy_interval=spans[0],
        within_one=within,
        kappa=kappa,
        kappa_interval=spans[2],
        precision=tuple(int(hit) / int(count) if count else None for hit, count in zip(hits_G, given_G, strict=True)),
        recall=tuple(int(hit) / int(count) if count else None for hit, count in zip(hits_G, true_G, strict=True)),
        confusion_GG=tuple(tuple(row) for row in total_GG.tolist()),
    )


def _numbers(counts_RGG: npt.NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """Return accuracy, share within one level, and quadratic kappa of each table; NaN where undefined."""
    levels = np.arange(counts_RGG.shape[-1])
    gap_GG = np.abs(levels[:, None] - levels[None, :])
    total_R = counts_RGG.sum(axis=(1, 2))
    expected_RGG = counts_RGG.sum(axis=2)[:, :, None] * counts_RGG.sum(axis=1)[:, None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = np.trace(counts_RGG, axis1=1, axis2=2) / total_R
        within = (counts_RGG * (gap_GG <= 1)).sum(axis=(1, 2)) / total_R
        # kappa = 1 - observed / expected disagreement, each weighed by the squared gap
        kappa = 1 - total_R * (counts_RGG * gap_GG**2).sum(axis=(1, 2)) / (expected_RGG * gap_GG**2).sum(axis=(1, 2))
    return accuracy, within, kappa


def _intervals(counts_QGG: npt.NDArray[np.int64], resamples: int, seed: int) -> list[tuple[float, float] | None]:
    queries, levels, _ = counts_QGG.shape
    if not queries or not resamples:
        return [None, None, None]
    draws = np.random.default_rng(seed)
    flat = counts_QGG.reshape(queries, -1)
    # One resample at a time: a thousand of 100,000 queries at once would be 800 MB.
    tables = [np.bincount(draws.integers(0, queries, queries), minlength=queries) @ flat for _ in range(resamples)]
    drawn = _numbers(np.stack(tables).reshape(-1, levels, levels))
    defined = [values[np.isfinite(values)] for values in drawn]
    return [(float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))) if values.size else None for values in defined]


def _optional(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
