"""Text repair, column by column: bytes of any origin in, clean UTF-8 in NFC out, every repair counted by cell.

Clean cells cost one table look-up per byte. Only cells with a suspicious byte are decoded, and only those with a suspicious
character meet a regular expression or the normaliser. Cleaning clean text changes nothing and counts nothing.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Bytes = npt.NDArray[np.uint8]
Bounds = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Ranges = tuple[tuple[int, int], ...]

# By length of a character in bytes, less one: the mark of its first byte, that byte's payload, the bits of bytes not its own.
LEADS, PAYLOADS, UNREAD = (
    np.array([0x00, 0xC0, 0xE0, 0xF0]),
    np.array([0x7F, 0x1F, 0x0F, 0x07], np.int32),
    np.array([18, 12, 6, 0], np.int32),
)
CONTINUATION = 0x80  # the upper two bits of every byte of a character but its first
CONTROL, BIDI, ZERO_WIDTH, SPACE, COMPOSE = 1, 2, 4, 8, 16

CONTROLS: Ranges = ((0x00, 0x08), (0x0E, 0x1F), (0x7F, 0x84), (0x86, 0x9F))
BIDIS: Ranges = ((0x061C, 0x061C), (0x200E, 0x200F), (0x202A, 0x202E), (0x2066, 0x2069))
# U+200C and U+200D stay: they change the meaning of Persian and Indic words and hold emoji together.
ZERO_WIDTHS: Ranges = (
    (0x00AD, 0x00AD),
    (0x180E, 0x180E),
    (0x200B, 0x200B),
    (0x2060, 0x2064),
    (0x206A, 0x206F),
    (0xFEFF, 0xFEFF),
    (0xFFF9, 0xFFFB),
    (0xE0000, 0xE007F),
)
SPACES: Ranges = (
    (0x09, 0x0D),
    (0x85, 0x85),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
)
# Ranges that NFC never touches and that nothing composes with, so text made of them needs no normaliser.
# A test derives this from the Unicode database; what is left out is merely slower.
COMPOSED: Ranges = (
    (0x0000, 0x02FF),
    (0x0388, 0x0482),
    (0x048A, 0x052F),
    (0x05D0, 0x05EA),
    (0x0620, 0x064A),
    (0x0671, 0x06D5),
    (0x0E01, 0x0E37),
    (0x1E00, 0x1EFF),
    (0x2002, 0x20CF),
    (0x2100, 0x2125),
    (0x212C, 0x2328),
    (0x232B, 0x2ADB),
    (0x3000, 0x3029),
    (0x3030, 0x3098),
    (0x309B, 0xA48F),
    (0xAC00, 0xD7A3),
    (0xFE30, 0xFFFF),
    (0x1F000, 0x1FAFF),
    (0x20000, 0x2EBE0),
)


def character_class(ranges: Ranges, also: str = "") -> str:
    """Spell code point ranges as an RE2 character class."""
    return "[" + also + "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges) + "]"


STRIPPED = (
    (CONTROL, "control_characters", character_class(CONTROLS) + "+"),
    (BIDI, "bidi_controls", character_class(BIDIS) + "+"),
    (ZERO_WIDTH, "zero_width", character_class(ZERO_WIDTHS) + "+"),
)
SPACE_RUN = character_class(SPACES, also=" ") + "+"

# Strict UTF-8 over bytes (RFC 3629): no overlong forms, no surrogates, nothing above U+10FFFF.
BROKEN_ROWS = 512  # broken cells are few: look for them in stretches of this many rows
VALID_UTF8 = (
    r"\A(?:[\x00-\x7F]|[\xC2-\xDF][\x80-\xBF]|\xE0[\xA0-\xBF][\x80-\xBF]|[\xE1-\xEC\xEE\xEF][\x80-\xBF]{2}|\xED[\x80-\x9F][\x80-\xBF]"
    r"|\xF0[\x90-\xBF][\x80-\xBF]{2}|[\xF1-\xF3][\x80-\xBF]{3}|\xF4[\x80-\x8F][\x80-\xBF]{2})*\z"
)


def clean_text(column: pa.Array, *, max_bytes: int, repaired: Counter[str]) -> pa.StringArray:
    """Return a binary column as clean text; an empty cell becomes null. Adds what it repaired to `repaired`."""
    if len(column) == column.null_count:
        return pa.nulls(len(column), pa.string())
    cells = decode(column, repaired)
    data, bounds = cell_bytes(cells)
    found = _suspicions(data, bounds)
    touched = found != 0
    if touched.any():
        cells = replace(cells, touched, _scrub(cells.filter(touched), found[touched], repaired))
        data, bounds = cell_bytes(cells)
    lengths = np.diff(bounds)
    long = lengths > max_bytes
    if long.any():
        repaired["long_text"] += int(long.sum())
        cells = replace(cells, long, _cut(cells.filter(long), max_bytes))
    empty = lengths == 0
    return pc.if_else(empty, pa.scalar(None, pa.string()), cells) if empty.any() else cells


def decode(column: pa.Array, repaired: Counter[str]) -> pa.StringArray:
    """Return a binary column as valid UTF-8 with nothing under its nulls; each broken sequence becomes U+FFFD."""
    cells = column
    if column.null_count and np.diff(cell_bytes(column)[1])[column.is_null().to_numpy(zero_copy_only=False)].any():
        # Not with a null scalar, for which Arrow clears the validity bits and keeps the bytes.
        cells = pc.if_else(column.is_valid(), column, pa.nulls(len(column), column.type))
    broken = _broken(cells, rows=(len(cells), BROKEN_ROWS))
    if not broken.any():
        return cells.view(pa.string())
    repaired["invalid_utf8"] += int(broken.sum())
    # Broken cells are few and need a real decoder, so these are decoded one by one.
    fixed = [cell.decode("utf-8", "replace").encode() for cell in cells.filter(broken).to_pylist()]
    return replace(cells, broken, pa.array(fixed, cells.type)).view(pa.string())


def _broken(cells: pa.BinaryArray, *, rows: tuple[int, ...]) -> Mask:
    """Mark cells that are not UTF-8: Arrow checks stretches of so many rows, and only what it refuses meets the pattern."""
    if not rows:
        return ~as_mask(pc.match_substring_regex(cells, VALID_UTF8), null=True)
    broken = np.zeros(len(cells), np.bool_)
    for start in range(0, len(cells), rows[0]):
        stretch = cells.slice(start, rows[0])
        try:
            stretch.cast(pa.string())
        except pa.ArrowInvalid:
            broken[start : start + rows[0]] = _broken(stretch, rows=rows[1:])
    return broken


def cell_bytes(cells: pa.Array) -> tuple[Bytes, Bounds]:
    """View a string or binary array as its bytes and the n + 1 bounds of its cells; slices are honoured."""
    if len(cells) == 0:
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, values = cells.buffers()
    bounds = np.frombuffer(offsets, np.int32)[cells.offset : cells.offset + len(cells) + 1].astype(np.int64)
    data = np.empty(0, np.uint8) if values is None else np.frombuffer(values, np.uint8)[bounds[0] : bounds[-1]]
    return data, bounds - bounds[0]


def as_mask(booleans: pa.Array, *, null: bool = False) -> Mask:
    """Return an Arrow boolean array as a numpy mask, nulls as given."""
    mask: Mask = booleans.fill_null(null).to_numpy(zero_copy_only=False)
    return mask


def replace(cells: pa.Array, mask: Mask, replacements: pa.Array) -> pa.Array:
    """Return `cells` with the masked ones replaced, in order."""
    return replacements if mask.all() else pc.replace_with_mask(cells, pa.array(mask), replacements)


@functools.cache
def _tables() -> tuple[bytes, Mask, Bytes]:
    """Return which first bytes and which pairs of first and second byte need a look, and the class of every code point."""
    classes = np.full(0x110000, COMPOSE, np.uint8)
    for first, last in COMPOSED:
        classes[first : last + 1] = 0
    for bit, ranges in ((CONTROL, CONTROLS), (BIDI, BIDIS), (ZERO_WIDTH, ZERO_WIDTHS), (SPACE, SPACES)):
        for first, last in ranges:
            classes[first : last + 1] |= bit
    points = np.flatnonzero(classes)
    length = np.digitize(points, (0x80, 0x800, 0x10000))
    leads = LEADS[length] | points >> 6 * length
    pairs = np.zeros((256, 256), np.bool_)
    pairs[leads, CONTINUATION | points >> 6 * np.maximum(length - 1, 0) & 0x3F] = True
    pairs[leads[length == 0]] = True
    return pairs.any(axis=1).tobytes(), pairs.ravel(), classes


def _suspicions(data: Bytes, bounds: Bounds) -> Bytes:
    """Return, for every cell, the classes of the characters that it may have to lose or change."""
    flags, pairs, classes = _tables()
    found = np.zeros(len(bounds) - 1, np.uint8)
    positions = np.flatnonzero(np.frombuffer(data.tobytes().translate(flags), np.bool_))
    if len(positions):
        seconds = data[np.minimum(positions + 1, len(data) - 1)]
        positions = positions[pairs[data[positions].astype(np.uint16) << 8 | seconds]]
    if len(positions):
        kinds = classes[_code_points(data, positions)]
        for bit in (CONTROL, BIDI, ZERO_WIDTH, SPACE, COMPOSE):
            hits = positions[kinds & bit != 0]
            if len(hits):
                found[_owners(hits, bounds)] |= bit
    blank = data == ord(" ")
    runs = np.flatnonzero(blank[1:] & blank[:-1])
    if len(runs):
        found[_owners(runs, bounds)] |= SPACE
    full = np.flatnonzero(bounds[1:] > bounds[:-1])
    found[full[blank[bounds[full]] | blank[bounds[full + 1] - 1]]] |= SPACE
    return found


def _owners(positions: npt.NDArray[np.int64], bounds: Bounds) -> Mask:
    """Mark the cells that hold at least one of the sorted byte positions."""
    before = np.searchsorted(positions, bounds)
    return np.asarray(before[1:] > before[:-1])


def _code_points(data: Bytes, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Decode the characters that start at these positions of valid UTF-8."""
    lead = data[positions].astype(np.int32)
    one, two, three = (data[np.minimum(positions + step, len(data) - 1)].astype(np.int32) & 0x3F for step in (1, 2, 3))
    length = np.digitize(lead, (0x80, 0xE0, 0xF0))
    points: npt.NDArray[np.int32] = ((lead & PAYLOADS[length]) << 18 | one << 12 | two << 6 | three) >> UNREAD[length]
    return points


def _scrub(cells: pa.StringArray, found: Bytes, repaired: Counter[str]) -> pa.StringArray:
    """Strip, squeeze, then compose: stripping can bring a letter and its accent together, composing makes nothing to strip."""
    for bit, reason, pattern in STRIPPED:
        hit = found & bit != 0
        if hit.any():
            repaired[reason] += int(hit.sum())
            cells = replace(cells, hit, pc.replace_substring_regex(cells.filter(hit), pattern, ""))
    hit = found & ~np.uint8(COMPOSE) != 0
    if hit.any():
        before = cells.filter(hit)
        after = pc.ascii_trim(pc.replace_substring_regex(before, SPACE_RUN, " "), " ")
        cells = replace(cells, hit, _counted(before, after, "whitespace", repaired))
    hit = found & COMPOSE != 0
    if hit.any():
        before = cells.filter(hit)
        cells = replace(cells, hit, _counted(before, pc.utf8_normalize(before, "NFC"), "not_nfc", repaired))
    return cells


def _counted(before: Any, after: Any, reason: str, repaired: Counter[str]) -> pa.StringArray:
    """Add the number of cells that changed to `repaired`, and return the changed column."""
    changed = pc.sum(pc.not_equal(before, after)).as_py() or 0
    if changed:
        repaired[reason] += changed
    return after


def _cut(cells: pa.StringArray, max_bytes: int) -> pa.StringArray:
    """Cut cells that are longer than `max_bytes` at the last character boundary within it, and trim what then ends in a space."""
    data, bounds = cell_bytes(cells)
    ends = bounds[:-1] + max_bytes
    for _ in range(3):
        ends -= data[ends] & 0xC0 == CONTINUATION
    back = bounds[:-1] + max_bytes - ends
    raw = cells.cast(pa.binary())
    for step in range(4):
        mask = back == step
        if mask.any():
            raw = replace(raw, mask, pc.binary_slice(raw.filter(mask), 0, max_bytes - step))
    return pc.ascii_rtrim(raw.cast(pa.string()), " ")
