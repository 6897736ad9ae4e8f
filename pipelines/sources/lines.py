"""Line-oriented files as blocks of whole records: decompressed with a guard, cut where a record ends, broken lines apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import pyarrow as pa

from pipelines.sources.batches import Expansion

READ_BYTES = 4 << 20
# A record beyond this is no product: its first line is given up, and reading goes on after it.
LONGEST_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}


def compression(file: pa.NativeFile) -> str | None:
    """Return the codec that a file's first bytes announce; names lie more often."""
    file.seek(0)
    start = file.read(2)
    file.seek(0)
    return _MAGIC.get(start)


def chunks(file: pa.NativeFile, *, name: str, max_expansion: int) -> Iterator[bytes]:
    """Stream a file's bytes without a byte-order mark, decompressed where it is gzip or zstd; stop a decompression bomb."""
    codec = compression(file)
    meter = Expansion(name=name, stored_bytes=file.size(), max_expansion=max_expansion)
    with nullcontext(file) if codec is None else pa.CompressedInputStream(file, codec) as stream:
        first = stream.read(READ_BYTES)
        yield first.removeprefix(_BOM)
        while chunk := stream.read(READ_BYTES):
            meter.count(len(chunk))
            yield chunk


def piece(file: pa.NativeFile, *, start: int, stop: int) -> Iterator[bytes]:
    """Stream the lines of a plain file that begin in the half-open byte range, whole."""
    # The line that spans `start` belongs to the range before; from one byte earlier, it ends at the first line end.
    position = max(start - 1, 0)
    skipping = start > 0
    file.seek(0)
    if not skipping and file.read(len(_BOM)) == _BOM:
        position = len(_BOM)
    file.seek(position)
    while chunk := file.read(READ_BYTES):
        begin = position
        position += len(chunk)
        if skipping:
            newline = chunk.find(b"\n")
            if newline < 0:
                if position >= stop:
                    return
                continue
            if begin + newline + 1 >= stop:
                return
            chunk, begin, skipping = chunk[newline + 1 :], begin + newline + 1, False
        end = chunk.find(b"\n", max(stop - 1 - begin, 0)) + 1
        if end:
            yield chunk[:end]
            return
        yield chunk


def records(stream: Iterable[bytes], *, masked: Callable[[bytes], bytes] = bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """Cut a stream into blocks of whole records with their masks, and single lines that cannot be read (no mask).

    `masked` returns a text of the same length in which only the line ends between records are left.
    """
    rest, skipping = b"", False
    for chunk in stream:
        if skipping:
            _, newline, tail = chunk.partition(b"\n")
            rest, skipping = tail, not newline
        else:
            rest += chunk
        while rest:
            mask = masked(rest)
            cut = mask.rfind(b"\n") + 1
            if cut:
                yield rest[:cut], mask[:cut]
                rest = rest[cut:]
            if len(rest) <= LONGEST_BYTES:
                break
            line, newline, rest = rest.partition(b"\n")
            yield line, None
            skipping = not newline
    while rest:
        text = rest if rest.endswith(b"\n") else rest + b"\n"
        mask = masked(text)
        cut = mask.rfind(b"\n") + 1
        if cut:
            yield text[:cut], mask[:cut]
            rest = text[cut:]
        else:
            line, _, rest = text.partition(b"\n")
            yield line, None
