"""What the tower reads: a template, parsed once, rendered over Arrow columns without a Python step per row.

    {{ title }} | {{ brand | prefix("by ") }} | {{ attributes | pairs(12) }} | {{ description | tokens(96) }}

A field that is empty takes the text before it along, so no separator is left hanging; text before the first field and
after the last one stays. Filters: `lower`, `default("x")`, `prefix("x")`, `suffix("x")`, `tokens(n)`, and `pairs(n)`
on attributes. docs/formats.md defines the result byte by byte.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import InputError
from pipelines.schema import ATTRIBUTES

TEMPLATE_VERSION = 1

_PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_STEP = re.compile(r"""\s*([A-Za-z_]\w*)\s*(?:\(\s*(?:(\d{1,6})|"([^"]*)")?\s*\))?\s*""")


@dataclass(frozen=True, kw_only=True)
class Filter:
    """One step behind a `|`: its name and its argument, a number, a text or none."""

    name: str
    argument: int | str | None


@dataclass(frozen=True, kw_only=True)
class Field:
    """One placeholder: the literal before it, the column, and what is done to it."""

    before: str
    name: str
    filters: tuple[Filter, ...]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A parsed template. `prefix` and `suffix` surround every text that is not empty."""

    source: str
    prefix: str
    fields: tuple[Field, ...]
    suffix: str

    @property
    def text_fields(self) -> tuple[str, ...]:
        """Columns that the template reads, once each, in order, attributes aside."""
        return tuple(dict.fromkeys(field.name for field in self.fields if field.name != ATTRIBUTES))

    @property
    def uses_attributes(self) -> bool:
        """Whether the attribute map is part of the text."""
        return any(field.name == ATTRIBUTES for field in self.fields)

    @property
    def digest(self) -> str:
        """Hash of the language version and the source: part of the tower's fingerprint."""
        return hashlib.sha256(f"catalog-embed template {TEMPLATE_VERSION}\n{self.source}".encode()).hexdigest()


def parse(source: str) -> Template:
    """Parse a template; every mistake is an `InputError` that shows where it is."""
    parts = _PLACEHOLDER.split(source)
    literals, expressions = parts[0::2], parts[1::2]
    for literal in literals:
        if "{{" in literal or "}}" in literal:
            raise InputError(f"template: unbalanced braces near `{literal.strip()[:60]}`. A field is written `{{{{ title }}}}`.")
    if not expressions:
        raise InputError(
            f"template `{source[:60]}` names no field, so every product would read the same. Write `{{{{ title }}}}` for a field."
        )
    fields = tuple(
        _parse_field(before=literals[i] if i else "", expression=expression, source=source) for i, expression in enumerate(expressions)
    )
    return Template(source=source, prefix=literals[0], fields=fields, suffix=literals[-1])


def _parse_field(*, before: str, expression: str, source: str) -> Field:
    """Read `name | filter(argument) | ...`; a `|` inside quotes is text."""
    steps: list[Filter] = []
    position = 0
    while True:
        match = _STEP.match(expression, position)
        if match is None or (match.end() < len(expression) and expression[match.end()] != "|"):
            raise InputError(f"template: cannot read `{{{{{expression}}}}}` at `{expression[position:].strip()}` in `{source[:80]}`.")
        number = match.group(2)
        steps.append(Filter(name=match.group(1), argument=int(number) if number is not None else match.group(3)))
        if match.end() == len(expression):
            break
        position = match.end() + 1
    name, filters = steps[0].name, tuple(steps[1:])
    if steps[0].argument is not None:
        raise InputError(f"template: `{name}` is a field and takes no argument. Filters go behind a `|`.")
    _check_filters(name, filters)
    return Field(before=before, name=name, filters=filters)


def _check_filters(field: str, filters: tuple[Filter, ...]) -> None:
    """Refuse unknown filters, wrong arguments, and attributes that are not turned into text."""
    for step in filters:
        if step.name not in _FILTERS:
            near = difflib.get_close_matches(step.name, _FILTERS, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise InputError(f"template: unknown filter `{step.name}` on `{field}`.{hint} Known: {', '.join(sorted(_FILTERS))}.")
        wanted = _FILTERS[step.name].argument
        found = type(step.argument)
        if found is not wanted or (wanted is int and not step.argument):
            form = {int: "a number above 0", str: "a text in double quotes", type(None): "no argument"}[wanted]
            raise InputError(f"template: filter `{step.name}` on `{field}` takes {form}.")
    first = filters[0].name if filters else None
    if field == ATTRIBUTES and first != "pairs":
        raise InputError("template: `attributes` is a map, so it starts with `pairs(n)`: `{{ attributes | pairs(12) }}`.")
    if any(step.name == "pairs" for step in (filters[1:] if field == ATTRIBUTES else filters)):
        raise InputError(f"template: `pairs` works on `attributes` only, once, as the first filter; it stands on `{field}`.")


def render(template: Template, products: pa.Table) -> pa.StringArray:
    """Return the text of every product, in order; empty where every field is empty."""
    pieces: list[pa.Array] = []
    started = pa.repeat(pa.scalar(value=False), products.num_rows)
    for field in template.fields:
        value = _field_text(field, products)
        present = _present(value)
        pieces += [_where(pc.and_(started, present), field.before), value]
        started = pc.or_(started, present)
    return pc.binary_join_element_wise(_where(started, template.prefix), *pieces, _where(started, template.suffix), "")


def _where(condition: pa.BooleanArray, literal: str) -> pa.StringArray:
    """Return the literal in the rows where the condition holds, and nothing in the others."""
    return pa.array(["", literal]).take(condition.cast(pa.int8()))


def _field_text(field: Field, products: pa.Table) -> pa.StringArray:
    """Return one placeholder's text for every row: never null, empty where there is nothing to say."""
    column = products.column(field.name).combine_chunks()
    for step in field.filters:
        column = _FILTERS[step.name].apply(column, step.argument)
    return pc.fill_null(column, "") if column.null_count else column


def _pairs(attributes: pa.MapArray, limit: int) -> pa.StringArray:
    """Join the first `limit` attributes as `key: value, key: value`. Normalising has sorted the keys."""
    offsets = np.frombuffer(attributes.buffers()[1], dtype=np.int32)[attributes.offset : attributes.offset + len(attributes) + 1]
    keep = np.minimum(np.diff(offsets), limit)
    keep[attributes.is_null().to_numpy(zero_copy_only=False)] = 0
    starts = np.zeros(len(attributes) + 1, dtype=np.int32)
    np.cumsum(keep, out=starts[1:])
    keys, items = attributes.keys, attributes.items
    if len(keys) != starts[-1] or (len(offsets) and offsets[0]):
        # Positions of the kept pairs: their place in the row, moved to where the row begins in the source.
        wanted = np.arange(starts[-1], dtype=np.int32) + np.repeat(offsets[:-1] - starts[:-1], keep)
        keys, items = keys.take(pa.array(wanted)), items.take(pa.array(wanted))
    pairs = pc.binary_join_element_wise(keys, items, ": ")
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(starts), pairs), ", ")


_SPACE, _WORD, _MARK, _WIDE, _TAIL = range(5)


def _byte_classes() -> npt.NDArray[np.uint8]:
    """Classify every UTF-8 byte: white space, part of a word, a mark of its own, a wide character, a continuation."""
    classes = np.full(256, _WORD, dtype=np.uint8)
    classes[:0x21] = _SPACE
    classes[[byte for byte in range(0x21, 0x7F) if not chr(byte).isalnum()]] = _MARK
    classes[0x80:0xC0] = _TAIL
    classes[0xE2] = _MARK
    classes[0xE3:0xF5] = _WIDE
    return classes


_CLASSES = _byte_classes()
# A word counts one token for every started 6 characters; docs/experiments.md says how near this comes to WordPiece.
_WORD_CHARACTERS = 6


def _token_starts(data: npt.NDArray[np.uint8], row_starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the byte positions where estimated tokens begin."""
    classes = _CLASSES[data]
    characters = np.flatnonzero(classes != _TAIL)
    classes = classes[characters]
    word = classes == _WORD
    begins = word.copy()
    begins[1:] &= ~word[:-1]
    rows = np.searchsorted(characters, row_starts)
    rows = rows[rows < len(characters)]
    begins[rows] = word[rows]
    position = np.arange(len(characters), dtype=np.int32)
    age = position - np.maximum.accumulate(np.where(begins, position, 0))
    starts: npt.NDArray[np.int64] = characters[(word & (age % _WORD_CHARACTERS == 0)) | (classes == _MARK) | (classes == _WIDE)]
    return starts


def _text_bytes(texts: pa.StringArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the rows' bytes, without copying, and the offsets of rows in them."""
    offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    data = texts.buffers()[2]
    every = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)
    return every[offsets[0] : offsets[-1]], offsets - offsets[0]


def estimate_tokens(texts: pa.StringArray) -> npt.NDArray[np.int32]:
    """Estimate each text's tokens without a tokenizer: words by length, marks and wide characters one each."""
    if not len(texts):
        return np.zeros(0, dtype=np.int32)
    data, offsets = _text_bytes(texts)
    starts = _token_starts(data, offsets[:-1])
    return np.diff(np.searchsorted(starts, offsets)).astype(np.int32)


def _cut_tokens(texts: pa.StringArray, limit: int) -> pa.StringArray:
    """Cut every text before its estimated token `limit + 1`; white space at the cut goes too."""
    # No token is shorter than a byte, so short rows need no count.
    rows = np.flatnonzero(pc.fill_null(pc.greater(pc.binary_length(texts), limit), fill_value=False).to_numpy(zero_copy_only=False))
    if not len(rows):
        return texts
    data, offsets = _text_bytes(texts.take(pa.array(rows)))
    starts = _token_starts(data, offsets[:-1])
    first = np.searchsorted(starts, offsets)
    over = np.flatnonzero(np.diff(first) > limit)
    if not len(over):
        return texts
    begins = offsets[over]
    lengths = starts[first[over] + limit] - begins
    kept = np.zeros(len(over) + 1, dtype=np.int32)
    np.cumsum(lengths, out=kept[1:])
    body = data[np.arange(kept[-1], dtype=np.int64) + np.repeat(begins - kept[:-1], lengths)]
    cut = pa.StringArray.from_buffers(len(over), pa.py_buffer(kept), pa.py_buffer(body))
    cut_rows = np.zeros(len(texts), dtype=bool)
    cut_rows[rows[over]] = True
    return pc.replace_with_mask(texts, pa.array(cut_rows), pc.utf8_rtrim_whitespace(cut))


def _lower(texts: pa.StringArray, _: None) -> pa.StringArray:
    """Lower-case by Unicode's simple mapping."""
    return pc.utf8_lower(texts)


def _default(texts: pa.StringArray, value: str) -> pa.StringArray:
    """Use `value` where a text is missing or empty."""
    return pc.if_else(_present(texts), texts, value)


def _prefix(texts: pa.StringArray, value: str) -> pa.StringArray:
    """Put `value` before a text that is there."""
    return pc.if_else(_present(texts), pc.binary_join_element_wise(value, texts, "", null_handling="emit_null"), "")


def _suffix(texts: pa.StringArray, value: str) -> pa.StringArray:
    """Put `value` behind a text that is there."""
    return pc.if_else(_present(texts), pc.binary_join_element_wise(texts, value, "", null_handling="emit_null"), "")


def _present(texts: pa.StringArray) -> pa.BooleanArray:
    return pc.fill_null(pc.greater(pc.binary_length(texts), 0), fill_value=False)


@dataclass(frozen=True)
class _FilterRule:
    """How a filter works on a column, and the type of its argument."""

    apply: Callable[..., pa.Array]
    argument: type


_FILTERS: Mapping[str, _FilterRule] = {
    "lower": _FilterRule(_lower, type(None)),
    "default": _FilterRule(_default, str),
    "prefix": _FilterRule(_prefix, str),
    "suffix": _FilterRule(_suffix, str),
    "tokens": _FilterRule(_cut_tokens, int),
    "pairs": _FilterRule(_pairs, int),
}
