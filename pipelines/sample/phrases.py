"""Sentence patterns turned into one Arrow dictionary: every phrase is rendered once, and a row only needs its number."""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.sample.assortment import CATEGORIES, CATEGORY_OF_NOUN, NOUNS
from pipelines.sample.draws import Codes
from pipelines.sample.sentences import ENDINGS, GENERAL, OPENERS, SHORT_OPENERS, TITLES
from pipelines.sample.stories import STORIES
from pipelines.sample.vocabulary import BRANDS, COLORS, EN, LANGUAGES, Texts

# What a row chooses, and the slots that show the choice. Other slots follow from the noun alone.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "material": ("material", "Material"),
    "feature": ("feature", "Feature", "featured", "Featured"),
    "color": ("color",),
    "brand": ("brand",),
}


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """Rendered phrases. The number of one is `base[language, noun, pattern]` plus a step per choice."""

    strings: pa.StringArray
    base: Codes
    steps: Codes

    @property
    def patterns(self) -> int:
        """How many patterns there are for each noun."""
        return int(self.base.shape[2])

    def numbers(self, language: Codes, noun: Codes, pattern: Codes, choices: npt.NDArray[np.int64]) -> Codes:
        """Return the number of every row's phrase; `choices` has a column per entry of `CHOICES`."""
        found: Codes = self.base[language, noun, pattern] + np.einsum("ij,ij->i", self.steps[language, noun, pattern], choices)
        return found


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _title_case(text: str) -> str:
    """Capitalise every word, as English shops do in titles; hyphenated words once."""
    return " ".join(_capital(word) for word in text.split(" "))


def _slots(language: int, noun: int, choice: Mapping[str, int]) -> dict[str, str]:
    """Return the text of every slot for one noun and one choice of each kind."""
    category, thing = CATEGORIES[CATEGORY_OF_NOUN[noun]], NOUNS[noun]
    material, feature = category.materials[choice["material"]], category.features[choice["feature"]]
    slots = thing.slots(language) | {
        "material": material.plain(language),
        "feature": feature.predicative(language, thing),
        "featured": feature.attributive(language, thing),
        "color": COLORS[choice["color"]].plain(language),
        "brand": BRANDS[choice["brand"]],
    }
    capital = _title_case if language == EN else _capital
    return slots | {
        "Noun": capital(slots["noun"]),
        "Material": capital(slots["material"]),
        "Featured": capital(slots["featured"]),
        "Feature": _capital(slots["feature"]),
        "This": _capital(slots["this"]),
    }


def _limits(noun: int) -> dict[str, int]:
    category = CATEGORIES[CATEGORY_OF_NOUN[noun]]
    return {"material": len(category.materials), "feature": len(category.features), "color": len(COLORS), "brand": len(BRANDS)}


def _render(pattern: str, language: int, noun: int, varying: Sequence[str]) -> Iterator[str]:
    """Yield the pattern's text for every combination of the choices that it shows, the last choice fastest."""
    limits = _limits(noun)
    for combination in itertools.product(*(range(limits[name]) for name in varying)):
        choice = dict.fromkeys(CHOICES, 0) | dict(zip(varying, combination, strict=True))
        yield pattern.format_map(_slots(language, noun, choice))


def compile_phrases(patterns: Mapping[int, Sequence[Texts]]) -> Phrases:
    """Render the patterns of every category (same number for each) for all nouns, languages and choices that they show."""
    count = len(patterns[0])
    base = np.zeros((len(LANGUAGES), len(NOUNS), count), dtype=np.int64)
    steps = np.zeros((len(LANGUAGES), len(NOUNS), count, len(CHOICES)), dtype=np.int64)
    strings: list[str] = []
    known: dict[tuple[str, int, int], int] = {}
    for language, noun, number in itertools.product(range(len(LANGUAGES)), range(len(NOUNS)), range(count)):
        pattern = patterns[CATEGORY_OF_NOUN[noun]][number][language]
        shown = {name for _, name, _, _ in string.Formatter().parse(pattern) if name}
        varying = [name for name, slots in CHOICES.items() if shown.intersection(slots)]
        # A text without a word that depends on the noun is rendered once for all nouns, or once per category.
        depends = noun if shown - {"material", "Material", "color", "brand"} else -1
        scope = depends if depends >= 0 else (len(NOUNS) + CATEGORY_OF_NOUN[noun] if "material" in varying else -1)
        key = (pattern, language, scope)
        if key not in known:
            known[key] = len(strings)
            strings += _render(pattern, language, noun, varying)
        base[language, noun, number] = known[key]
        step = 1
        for name in reversed(varying):
            steps[language, noun, number, list(CHOICES).index(name)] = step
            step *= _limits(noun)[name]
    return Phrases(strings=pa.array(strings, pa.string()), base=base, steps=steps)


def _everywhere(patterns: Sequence[Texts]) -> dict[int, Sequence[Texts]]:
    return dict.fromkeys(range(len(CATEGORIES)), patterns)


@functools.cache
def titles() -> Phrases:
    """Return what stands before the model name."""
    return compile_phrases(_everywhere(TITLES))


@functools.cache
def endings() -> Phrases:
    """Return what stands behind the model name."""
    return compile_phrases(_everywhere(ENDINGS))


@functools.cache
def descriptions() -> Phrases:
    """Return all sentences of descriptions: openers, short openers, general ones, then those of the category."""
    shared = (*OPENERS, *SHORT_OPENERS, *GENERAL)
    return compile_phrases({number: (*shared, *STORIES[category.name[EN]]) for number, category in enumerate(CATEGORIES)})
