"""CSV files: Arrow parses blocks of whole records, and a block that it refuses is split until only broken records are out.

Every value arrives as text, or as bytes where it is not UTF-8. An unquoted empty field is null; `""` is the empty text.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO

import pyarrow as pa
import pyarrow.csv as arrow_csv

from pipelines.contracts import PinnedObject, Shard, Window
from pipelines.errors import InputError
from pipelines.sources.batches import emit
from pipelines.sources.files import FileSource
from pipelines.sources.lines import chunks, records
from pipelines.sources.objects import Place, opened
from pipelines.sources.projection import Projection, broken_rows
from pipelines.sources.spec import SourceSpec


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How records look: a delimiter, and double quotes that only open at the start of a field."""

    delimiter: str = ","

    def masked(self, text: bytes) -> bytes:
        """Return the text with quoted fields crossed out up to a NUL, so that line ends and delimiters left in it are real."""
        text = text.replace(b"\0", b"x")
        if b'"' not in text:
            return text
        mark = re.escape(self.delimiter.encode())
        quoted = rb"(\A|[\r\n]|" + mark + rb')("[^"]*(?:""[^"]*)*(?:"|\Z))'
        return re.sub(quoted, lambda match: match[1] + b"x" * (len(match[2]) - 1) + b"\0", text)

    def torn(self, mask: bytes) -> bool:
        """Whether text follows a closing quote: most likely a stray quote swallowed lines up to the next quoted field."""
        return re.search(rb"\0[^\r\n" + re.escape(self.delimiter.encode()) + rb"]", mask) is not None

    def split(self, block: bytes, mask: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Return the records of a block with their masks; blank lines are none."""
        position = 0
        for line in mask.split(b"\n"):
            record = block[position : position + len(line) + 1]
            position += len(line) + 1
            if record.strip(b"\r\n"):
                yield record, line

    def fits(self, mask: bytes, *, fields: int) -> bool:
        """Whether a record has the right number of fields, and no text beside its quotes."""
        return mask.count(self.delimiter.encode()) + 1 == fields and not self.torn(mask)


@dataclass(frozen=True, kw_only=True)
class CsvShard:
    """One CSV file. It is not split: only reading from the start tells whether a line end is inside quotes."""

    place: Place
    pinned: PinnedObject
    projection: Projection
    window: Window | None
    dialect: Dialect
    max_expansion: int

    @property
    def name(self) -> str:
        """The file."""
        return self.pinned.name

    def open(self) -> Iterator[pa.RecordBatch]:
        """Stream the window's rows; broken records come as rows of their own after the block that held them."""
        with opened(self.place, self.pinned.name, expected=self.pinned) as file:
            yield from emit(self._batches(file), projection=self.projection, window=self.window)

    def _batches(self, file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
        header: list[str] | None = None
        stream = chunks(file, name=self.name, max_expansion=self.max_expansion)
        for block, mask in records(stream, masked=self.dialect.masked):
            start = 0
            if header is None:
                header, start = _header(block, mask or block, dialect=self.dialect, name=self.name)
            broken: list[bytes] = []
            if mask is not None and header:
                yield from self._parse(block[start:], mask[start:], header, broken)
            elif block[start:].strip():
                broken = [block[start:]]
            if broken:
                yield broken_rows(broken)

    def _parse(self, block: bytes, mask: bytes, header: Sequence[str], broken: list[bytes]) -> Iterator[pa.RecordBatch]:
        """Parse a block at once, or without the records that stop it; those end in `broken`, line by line."""
        if not block.strip(b"\r\n"):
            return
        batches = None if self.dialect.torn(mask) else self._attempt(block, header)
        if batches is None:
            good = []
            for record, inner in self.dialect.split(block, mask):
                if self.dialect.fits(inner, fields=len(header)):
                    good.append(record)
                else:
                    broken += _lines(record)
            batches = self._bisect(good, header, broken)
        yield from batches

    def _bisect(self, good: list[bytes], header: Sequence[str], broken: list[bytes]) -> list[pa.RecordBatch]:
        """Parse records that have the right number of fields; halve where Arrow still objects."""
        batches = self._attempt(b"".join(good), header) if good else []
        if batches is not None:
            return batches
        if len(good) == 1:
            broken += _lines(good[0])
            return []
        half = len(good) // 2
        return self._bisect(good[:half], header, broken) + self._bisect(good[half:], header, broken)

    def _attempt(self, block: bytes, header: Sequence[str]) -> list[pa.RecordBatch] | None:
        """Return what Arrow reads from whole records, or None where it objects to one of them."""
        wanted = [header.index(name) for name in self.projection.wanted(header)]
        try:
            table = _table(block, fields=len(header), wanted=wanted, dialect=self.dialect)
        except pa.ArrowInvalid:
            return None
        names = [header[index] for index in wanted]
        return [pa.RecordBatch.from_arrays([_as_text(column) for column in batch.columns], names=names) for batch in table.to_batches()]


def _table(block: bytes, *, fields: int, wanted: Sequence[int], dialect: Dialect) -> pa.Table:
    """Parse whole records; columns are named by their position, because headers repeat names."""
    names = [str(index) for index in range(fields)]
    chosen = [str(index) for index in wanted]
    return arrow_csv.read_csv(
        pa.BufferReader(block),
        read_options=arrow_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(block) + 1),
        parse_options=arrow_csv.ParseOptions(delimiter=dialect.delimiter, newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            check_utf8=False,
            include_columns=chosen,
            column_types=dict.fromkeys(chosen, pa.binary()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


def _as_text(column: pa.Array) -> pa.Array:
    """Return bytes as text; all of a batch's column stays bytes where one value is not UTF-8."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        return column


def _lines(record: bytes) -> list[bytes]:
    """Return the lines of a broken record: a stray quote swallows its neighbours, and each of them must be seen."""
    return [line for line in re.split(rb"[\r\n]+", record) if line]


def _header(block: bytes, mask: bytes, *, dialect: Dialect, name: str) -> tuple[list[str], int]:
    """Return the names of the first record, and where the next one starts."""
    if block.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{name} is UTF-16. Export it as UTF-8.")
    start = len(block) - len(block.lstrip(b"\r\n"))
    end = mask.find(b"\n", start) + 1 or len(block)
    line = block[start:end].decode("utf-8", "replace").rstrip("\r\n")
    # `newline` as csv wants it: line ends inside a quoted name stay as they are.
    return next(csv.reader(StringIO(line, newline=""), delimiter=dialect.delimiter), []), end


@dataclass(frozen=True, kw_only=True)
class CsvFormat:
    """Knows header lines."""

    dialect: Dialect
    max_expansion: int

    def names(self, place: Place, pinned: PinnedObject) -> Sequence[str]:
        """Return the names in the header; none for an empty file."""
        with opened(place, pinned.name, expected=pinned) as file:
            stream = chunks(file, name=pinned.name, max_expansion=self.max_expansion)
            block, mask = next(records(stream, masked=self.dialect.masked), (b"", b""))
            return _header(block, mask or block, dialect=self.dialect, name=pinned.name)[0]

    def shards(self, place: Place, pinned: PinnedObject, *, projection: Projection, window: Window | None) -> Sequence[Shard]:
        """Return the file as one shard."""
        shard = CsvShard(
            place=place, pinned=pinned, projection=projection, window=window, dialect=self.dialect, max_expansion=self.max_expansion
        )
        return [shard]


def make(spec: SourceSpec, projection: Projection) -> FileSource:
    """Return a catalog of CSV files."""
    return FileSource(spec, projection, CsvFormat(dialect=Dialect(delimiter=spec.delimiter or ","), max_expansion=spec.max_expansion))
