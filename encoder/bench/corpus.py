"""Product texts to measure with: words, repeats and lengths like a shop's, drawn by seed and cut to measure in tokens.

Lengths are those that a tower reads: each word's tokens are measured with its tokenizer, and words are put together until
the drawn length is reached. What came out is counted again, and reported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from encoder.errors import EncoderError
from encoder.tokens import Tokenizer

MEDIAN_TOKENS, P95_TOKENS, DUPLICATES = 45, 180, 0.08
# Longer texts are cut here, so that towers of longer reach are measured on the same lengths.
MOST_TOKENS = 512
FIXED_LENGTHS = (32, 64, 128, 256)
POOL_WORDS = 4000

_SIGMA = math.log(P95_TOKENS / MEDIAN_TOKENS) / 1.6449  # the 95th percentile is so many deviations above the middle
_SHORTEST = 6
_BASE = """
the a and for with of in on to by is from new set pack pair pieces size colour black white red blue green grey pink silver gold
small medium large mens womens kids cotton leather steel wood plastic glass wool linen rubber aluminium wireless usb bluetooth
charger cable phone laptop case cover shoe shoes shirt jacket dress jeans boots trainers bag hat gloves scarf watch ring lamp chair
table desk bed sofa shelf mirror kitchen knife pan pot cup mug plate bottle garden tool drill hammer paint brush toy game puzzle
book pen paper inch cm mm kg litre brand light heavy waterproof outdoor indoor travel sport running football camping summer winter
""".split()  # noqa: SIM905 - one word a line would be a page
_HEADS = ("bra", "cor", "del", "fen", "gal", "hor", "jun", "kel", "lum", "mar", "nor", "pol", "quin", "ras", "sol", "tor", "ul", "vel")
_TAILS = ("a", "da", "en", "ix", "line", "mo", "nix", "on", "que", "ra", "sen", "tex", "us", "wood")


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Texts in the order of a catalog, and how many tokens each has."""

    name: str
    texts: list[str]
    lengths: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Return the tokens of all texts."""
        return int(self.lengths.sum())

    @property
    def duplicates(self) -> float:
        """Return the share of texts that repeat an earlier one."""
        return 1 - len(set(self.texts)) / max(1, len(self.texts))

    def first(self, count: int) -> Corpus:
        """Return the first texts: the order is random, so they are a fair sample."""
        return self if count >= len(self.texts) else Corpus(name=self.name, texts=self.texts[:count], lengths=self.lengths[:count])

    def unique_lengths(self) -> npt.NDArray[np.int64]:
        """Return the lengths of the texts, each different text once."""
        firsts = {text: number for number, text in reversed(list(enumerate(self.texts)))}
        return self.lengths[sorted(firsts.values())]

    def facts(self) -> dict[str, Any]:
        """Return what was really drawn."""
        low, median, p95, high = (int(np.percentile(self.lengths, share, method="nearest")) for share in (0, 50, 95, 100))
        return {
            "name": self.name,
            "texts": len(self.texts),
            "tokens": self.tokens,
            "min": low,
            "median": median,
            "p95": p95,
            "max": high,
            "duplicates": round(self.duplicates, 4),
            "bytes": sum(len(text.encode()) for text in self.texts),
        }


def vocabulary(size: int) -> list[str]:
    """Return words of a shop, the frequent ones first: words, names, sizes and model numbers. A longer list begins like a shorter one."""
    return list(itertools.islice(_different(_words()), size))


def make_corpus(tokenizer: Tokenizer, *, name: str, texts: int, seed: int = 0) -> Corpus:
    """Draw a corpus: `mixed` has a shop's lengths and repeats; a number is the length of every text, and none repeats."""
    if name != "mixed" and not (name.isdigit() and int(name) >= _SHORTEST):
        raise EncoderError(f"lengths are {name!r}. Choose mixed, or a number of tokens from {_SHORTEST} up, such as 128.")
    draws = np.random.default_rng([seed, texts, *name.encode()])
    different = texts - round(texts * DUPLICATES) if name == "mixed" else texts
    most = min(tokenizer.card.max_tokens, MOST_TOKENS)
    if name == "mixed":
        wanted = np.rint(draws.lognormal(math.log(MEDIAN_TOKENS), _SIGMA, different)).astype(np.int64)
        wanted = np.clip(wanted, _SHORTEST, most)
    else:
        wanted = np.full(different, min(int(name), tokenizer.card.max_tokens))
    written = _write(tokenizer, wanted, draws)
    repeated = [written[number] for number in draws.integers(0, max(1, different), texts - different)]
    shuffled = [*written, *repeated]
    shuffled = [shuffled[number] for number in draws.permutation(texts)]
    return Corpus(name=name, texts=shuffled, lengths=tokenizer.tokenize(shuffled).lengths)


def queries(count: int, *, seed: int = 0) -> list[str]:
    """Return what people type into a shop's search: two to eight words."""
    draws = np.random.default_rng([seed, count])
    words = vocabulary(400)
    return [" ".join(draws.choice(words, size=int(draws.integers(2, 9)))) for _ in range(count)]


def _different(words: Iterator[str]) -> Iterator[str]:
    seen: set[str] = set()
    for word in words:
        if word not in seen:
            seen.add(word)
            yield word


def _words() -> Iterator[str]:
    yield from _BASE
    names = list(itertools.product(_HEADS, ("", *_HEADS), _TAILS))
    for number in range(len(names)):
        head, middle, tail = names[number * 1009 % len(names)]  # a prime step visits each once, in a mixed order
        yield head + middle + tail
        if number % 4 == 0:
            yield f"{number % 97 + 2}{('mm', 'cm', 'kg', 'ml', 'w')[number % 5]}"
            yield f"{head}-{number * 37 % 9973:04d}"
    yield from (f"item{number}" for number in itertools.count())


def _write(tokenizer: Tokenizer, wanted: npt.NDArray[np.int64], draws: np.random.Generator) -> list[str]:
    """Return a text of each number of tokens, all different as far as so few tokens allow."""
    words = vocabulary(POOL_WORDS)
    empty = int(tokenizer.tokenize([""]).lengths[0])
    firsts = tokenizer.tokenize(words).lengths - empty  # the first word of a text has no space before it
    costs = tokenizer.tokenize([f"{words[0]} {word}" for word in words]).lengths - empty - firsts[0]
    fillers = np.flatnonzero(costs == 1)
    openers = np.flatnonzero(firsts <= _SHORTEST - empty)
    if not fillers.size or not openers.size:
        raise EncoderError("The tokenizer makes several tokens of every word, so that no text can be cut to measure. Choose another tower.")
    weights = 1 / (np.arange(len(words)) + 20.0)  # the rule of Zipf, less steep at its head
    stream = draws.choice(len(words), size=1 << 20, p=weights / weights.sum())
    texts, seen = [], set()
    for length in wanted:
        for _ in range(20):
            opener = int(draws.choice(openers))
            room = int(length) - empty - int(firsts[opener])
            start = int(draws.integers(0, stream.size - MOST_TOKENS))
            drawn = stream[start : start + room]
            reached = costs[drawn].cumsum()
            kept = int(np.searchsorted(reached, room, side="right"))
            rest = room - (int(reached[kept - 1]) if kept else 0)
            text = " ".join(words[number] for number in (opener, *drawn[:kept], *draws.choice(fillers, size=rest)))
            if text not in seen:
                break
        seen.add(text)
        texts.append(text)
    return texts
