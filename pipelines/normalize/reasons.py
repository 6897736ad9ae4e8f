"""Why a row is quarantined or a cell repaired: every reason code, what it means and what to do. Data only.

A `quarantine` reason rejects its row; a `repair` reason changes one cell and is counted. Nothing else may happen to a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Reason:
    """What happens, what it means, and what the owner of the catalog can do about it."""

    action: Literal["quarantine", "repair"]
    meaning: str
    advice: str


# Quarantine reasons come first, the most severe first: a row carries the first that holds.
REASONS: Mapping[str, Reason] = {
    "malformed_row": Reason("quarantine", "the source could not parse this line", "Fix the line in the feed; the excerpt shows its bytes."),
    "null_id": Reason("quarantine", "the id is missing", "Give every product an id, or map `source.columns.id`."),
    "id_wrong_type": Reason(
        "quarantine", "the id is a fraction, a boolean, a date or a nested value", "Export ids as text or as integers."
    ),
    "invalid_utf8_id": Reason("quarantine", "the id is not UTF-8", "Export the feed as UTF-8."),
    "empty_id": Reason("quarantine", "the id is empty or only white space", "Give every product an id."),
    "long_id": Reason("quarantine", "the id is longer than `max_id_bytes`", "Shorten the id, or raise the limit."),
    "control_id": Reason("quarantine", "the id holds control, bidi or zero-width characters", "Remove them: two ids may look the same."),
    "unsafe_id": Reason(
        "quarantine",
        "the id holds a path separator, quote, angle bracket, white space or `..`, or starts with a dash",
        "Clean the ids; or, if such ids are meant (Shopify GIDs, URLs), set `unsafe_ids: accept`.",
    ),
    "no_text": Reason("quarantine", "every text field is empty, so there is nothing to embed", "Fill the title, or exclude the row."),
    "id_from_float": Reason(
        "repair", "a whole number stored as a float or a decimal became integer text", "Export ids as text or as integers."
    ),
    "invalid_utf8": Reason("repair", "bytes that are not UTF-8 became U+FFFD", "Export the feed as UTF-8, not Latin-1."),
    "control_characters": Reason("repair", "C0 and C1 control characters were removed", "Clean the field at its origin."),
    "bidi_controls": Reason(
        "repair", "bidirectional control characters were removed", "Clean the field; they can reorder what people see."
    ),
    "zero_width": Reason("repair", "invisible characters (BOM, U+200B, soft hyphen, tags) were removed", "Clean the field at its origin."),
    "whitespace": Reason(
        "repair", "runs of white space became one space and the ends were trimmed", "Nothing, unless the count surprises."
    ),
    "not_nfc": Reason("repair", "the text was composed to Unicode NFC", "Nothing: both forms look the same."),
    "long_text": Reason("repair", "text was cut at `max_text_bytes`, at a character boundary", "Check for documents pasted into a field."),
    "text_from_scalar": Reason("repair", "a number, boolean or date in a text column became text", "Export the column as text."),
    "wrong_type": Reason(
        "repair", "a value whose type cannot be converted became null", "Change the column's type, or map another column."
    ),
    "number_from_text": Reason("repair", "text such as `12.99` became a number", "Export the column as a number."),
    "bad_number": Reason(
        "repair", "text that is no number, or a fraction where an integer is due, became null", "Export plain numbers: `1299.00`."
    ),
    "not_finite": Reason("repair", "NaN or an infinity became null", "Export a missing number as null."),
    "negative_number": Reason(
        "repair", "a negative number in a column that allows none became null", "Correct it, or change `non_negative`."
    ),
    "integer_overflow": Reason("repair", "an integer that does not fit 64 bits became null", "Use a float or a string filter."),
    "bool_from_other": Reason("repair", "`yes`, `no`, `0`, `1`, ... became a boolean", "Export the column as a boolean."),
    "bad_bool": Reason("repair", "a value that is no boolean became null", "Export true, false or null."),
    "timestamp_from_number": Reason(
        "repair", "epoch seconds, ms, us or ns (by magnitude) became a timestamp", "Export ISO 8601 with a zone."
    ),
    "naive_timestamp": Reason("repair", "a time without a zone was read as UTC", "Export a zone: a wrong one shifts the watermark."),
    "bad_timestamp": Reason(
        "repair", "an unreadable time became null; with a null `updated_at` the row is always re-read", "Export ISO 8601 with a zone."
    ),
    "ancient_timestamp": Reason("repair", "an `updated_at` before 1970 became null", "Export a missing time as null, not as a sentinel."),
    "future_timestamp": Reason(
        "repair", "an `updated_at` after the run's start was set to that start", "Check the clock and the zone of the exporter."
    ),
    "timestamp_overflow": Reason("repair", "a time outside years 1 to 9999 became null", "Check the unit of the column."),
    "locale_form": Reason("repair", "a locale was respelled, such as `en_us` to `en-US`", "Nothing."),
    "bad_locale": Reason("repair", "a locale that is no language tag became the default", "Export BCP 47 tags such as `de-CH`."),
    "bad_attributes": Reason(
        "repair", "attributes that are no flat object became null", "Export a JSON object, a map, or `attributes.<key>` columns."
    ),
    "nested_attribute": Reason(
        "repair", "an attribute whose value is a list or an object was dropped", "Flatten it into keys with scalar values."
    ),
    "nameless_attribute": Reason("repair", "an attribute with an empty name was dropped", "Name the attribute."),
    "duplicate_attribute": Reason("repair", "a key came twice in one row: the last value won", "Export each key once."),
    "too_many_attributes": Reason("repair", "a row kept the first `max_attributes` keys in byte order", "Drop keys, or raise the limit."),
}

QUARANTINE_REASONS: tuple[str, ...] = tuple(code for code, reason in REASONS.items() if reason.action == "quarantine")
