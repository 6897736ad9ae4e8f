"""The text-bearing columns of a range of rows: title, description and attributes, by number from rendered dictionaries."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.sample import phrases
from pipelines.sample.assortment import CATEGORIES
from pipelines.sample.draws import Codes, Ids, below, bits
from pipelines.sample.life import Life
from pipelines.sample.sentences import OPENERS, SHORT_OPENERS
from pipelines.sample.traits import Traits
from pipelines.sample.vocabulary import COLOR, COLORS, FEATURE, LANGUAGES, MATERIAL, MODELS, ORIGIN, WARRANTY, Attribute

# Wanted tokens below which a product has no description, or only a short one; what a text without further sentences
# takes; and what each further sentence adds. Measured over the rendered text, as words x 1.3.
NO_DESCRIPTION, SHORT_DESCRIPTION, BEFORE_SENTENCES, PER_SENTENCE = 12, 40, 45, 15
# Color, material and feature are always there; the category's two details, origin and warranty may be.
ALWAYS, OPTIONAL = 3, 4
ORDERS = 64


@dataclass(frozen=True, kw_only=True)
class AttributeWords:
    """Attribute names and values as dictionaries: where each [language, category, slot] begins, and how many values it has."""

    names: pa.StringArray
    values: pa.StringArray
    first: Codes
    counts: Codes


def wording(seed: int, ids: Ids, rows: Traits, life: Life) -> tuple[pa.StringArray, pa.StringArray, pa.MapArray]:
    """Return title, description (null where there is none) and attributes of every row."""
    drawn = bits(seed, "words", rows.head)
    sentences = _sentence_counts(rows.tokens)
    # A product without description can only have its title edited.
    retitled = life.titles + np.where(sentences == 0, life.descriptions, 0)
    return (
        _titles(rows, below(drawn, 0, 4) + retitled),
        _descriptions(rows, drawn, sentences, life.descriptions),
        _attributes(seed, ids, rows),
    )


def _titles(rows: Traits, pattern: Codes) -> pa.StringArray:
    """Join noun phrase, model name and ending; neighbouring patterns never give the same title."""
    before, after = phrases.titles(), phrases.endings()
    pattern = pattern % before.patterns
    model = pa.array(rows.model * 1000 + rows.model_number)
    return pc.binary_join_element_wise(
        before.strings.take(pa.array(before.numbers(rows.language, rows.noun, pattern, rows.choices))),
        _models().take(model),
        after.strings.take(pa.array(after.numbers(rows.language, rows.noun, pattern, rows.choices))),
        "",
    )


@functools.cache
def _models() -> pa.StringArray:
    return pa.array([f" {name} {number}" for name in MODELS for number in range(1000)])


def _sentence_counts(tokens: Codes) -> Codes:
    further = np.maximum(0, tokens - BEFORE_SENTENCES + PER_SENTENCE // 2) // PER_SENTENCE
    most = phrases.descriptions().patterns - len(OPENERS) - len(SHORT_OPENERS)
    return np.where(tokens < NO_DESCRIPTION, 0, 1 + np.minimum(further, most))


def _descriptions(rows: Traits, drawn: Ids, sentences: Codes, edits: Codes) -> pa.StringArray:
    """Join an opener and further sentences, none twice; each edit replaces the opener by the next one."""
    pool = phrases.descriptions()
    openers = len(OPENERS) + len(SHORT_OPENERS)
    stories = pool.patterns - openers
    opener = (below(drawn, 0, len(OPENERS)) + edits) % len(OPENERS)
    short = len(OPENERS) + opener % len(SHORT_OPENERS)
    opener = np.where(rows.tokens < SHORT_DESCRIPTION, short, opener)
    offsets = np.zeros(len(sentences) + 1, dtype=np.int32)
    np.cumsum(sentences, out=offsets[1:])
    row = np.repeat(np.arange(len(sentences)), sentences)
    place = np.arange(offsets[-1], dtype=np.int64) - offsets[row]
    start, step = below(drawn, 16, stories), 1 + below(drawn, 32, stories - 1)
    pattern = np.where(place == 0, opener[row], openers + (start[row] + place * step[row]) % stories)
    numbers = pool.numbers(rows.language[row], rows.noun[row], pattern, rows.choices[row])
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), pool.strings.take(pa.array(numbers))), " ")
    return pc.if_else(pa.array(sentences > 0), joined, pa.scalar(None, pa.string()))


def _attributes(seed: int, ids: Ids, rows: Traits) -> pa.MapArray:
    """Build the attribute maps: what is in them follows the family head, the order in which it stands follows the row."""
    words, slots = _attribute_words(), ALWAYS + OPTIONAL
    what, which, order = bits(seed, "details", rows.head), bits(seed, "detail slots", rows.head), bits(seed, "attribute order", ids)
    details = [below(what, 16 * (slot - ALWAYS), words.counts[rows.category, slot]) for slot in range(ALWAYS, slots)]
    values = np.column_stack([rows.choices[:, [2, 0, 1]], *details])
    # Well described products have more attributes too.
    level = np.where(rows.tokens < SHORT_DESCRIPTION, 0, np.where(rows.tokens < 2 * SHORT_DESCRIPTION, 1, 2))
    present = _presence()[below(which, 0, OPTIONAL), level + below(which, 16, OPTIONAL - 1)]
    permutation = _orders()[below(order, 0, ORDERS)]
    kept = np.take_along_axis(present, permutation, axis=1)
    offsets = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum(kept.sum(axis=1), out=offsets[1:])
    row, slots_kept = np.nonzero(kept)[0], permutation[kept]
    language, category = rows.language[row], rows.category[row]
    names = (language * len(CATEGORIES) + category) * slots + slots_kept
    numbers = words.first[language, category, slots_kept] + values[row, slots_kept]
    return pa.MapArray.from_arrays(pa.array(offsets), words.names.take(pa.array(names)), words.values.take(pa.array(numbers)))


@functools.cache
def _presence() -> np.ndarray[tuple[int, int, int], np.dtype[np.bool_]]:
    """Map [first optional slot, number of optional slots] to the slots that are filled."""
    table = np.ones((OPTIONAL, OPTIONAL + 1, ALWAYS + OPTIONAL), dtype=np.bool_)
    for start, count, slot in itertools.product(range(OPTIONAL), range(OPTIONAL + 1), range(OPTIONAL)):
        table[start, count, ALWAYS + slot] = (slot - start) % OPTIONAL < count
    return table


@functools.cache
def _orders() -> Codes:
    """Return the orders in which attributes may stand."""
    slots = ALWAYS + OPTIONAL
    drawn = bits(0, "orders", np.arange(ORDERS * slots, dtype=np.uint64)).reshape(ORDERS, slots)
    return np.argsort(drawn, axis=1, kind="stable").astype(np.int64)


@functools.cache
def _attribute_words() -> AttributeWords:
    """Write out all names and values, in every language, in the order of slots."""
    names: list[str] = []
    values: list[str] = []
    first = np.zeros((len(LANGUAGES), len(CATEGORIES), ALWAYS + OPTIONAL), dtype=np.int64)
    counts = np.zeros((len(CATEGORIES), ALWAYS + OPTIONAL), dtype=np.int64)
    for language, (number, category) in itertools.product(range(len(LANGUAGES)), enumerate(CATEGORIES)):
        fixed = ((COLOR, COLORS), (MATERIAL, category.materials), (FEATURE, category.features))
        filled = [(name[language], [word.plain(language) for word in group]) for name, group in fixed]
        details: tuple[Attribute, ...] = (*category.details, ORIGIN, WARRANTY)
        filled += [(detail.name[language], [value[language] for value in detail.values]) for detail in details]
        for slot, (name, texts) in enumerate(filled):
            names.append(name)
            first[language, number, slot] = len(values)
            counts[number, slot] = len(texts)
            values += texts
    return AttributeWords(names=pa.array(names), values=pa.array(values), first=first, counts=counts)
