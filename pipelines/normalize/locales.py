"""Locales as BCP 47 tags: `de_DE.UTF-8` becomes `de-DE`; what is no tag becomes the default, and is counted."""

from __future__ import annotations

import re
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.normalize.sanitize import as_mask
from pipelines.normalize.scalars import count, text

# language[-Script][-REGION][-variants], with the separators and the suffixes that POSIX writes.
TAG = re.compile(
    r"\s*(?P<language>[A-Za-z]{2,3})(?:[-_](?P<script>[A-Za-z]{4}))?(?:[-_](?P<region>[A-Za-z]{2}|[0-9]{3}))?"
    r"(?P<rest>(?:[-_][A-Za-z0-9]{1,8}){0,4})(?:\.[A-Za-z0-9-]{1,20})?(?:@[A-Za-z0-9]{1,20})?\s*",
    re.ASCII,
)


def canonical_locale(tag: str) -> str | None:
    """Return the tag in its usual spelling, or None if it is none."""
    match = TAG.fullmatch(tag)
    if match is None:
        return None
    parts = [match["language"].lower()]
    parts += [match["script"].title()] if match["script"] else []
    parts += [match["region"].upper()] if match["region"] else []
    return "-".join(parts) + match["rest"].lower().replace("_", "-")


def locales(column: pa.Array, *, default: str, repaired: Counter[str]) -> pa.StringArray:
    """Return a column of canonical tags without nulls."""
    coded = text(column, scalar=None, repaired=repaired).dictionary_encode()
    # A catalog has few locales, so each distinct spelling is read once.
    given = [value.decode("utf-8", "replace") for value in coded.dictionary.to_pylist()]
    tags = [canonical_locale(value) if value.strip() else default for value in given]
    spellings = pa.array([tag or default for tag in tags], pa.string())
    bad = pa.array([tag is None for tag in tags], pa.bool_())
    respelled = pa.array(
        [tag is not None and tag != value and bool(value.strip()) for tag, value in zip(tags, given, strict=True)], pa.bool_()
    )
    count("bad_locale", int(as_mask(bad.take(coded.indices)).sum()), repaired)
    count("locale_form", int(as_mask(respelled.take(coded.indices)).sum()), repaired)
    return pc.fill_null(spellings.take(coded.indices), default)
