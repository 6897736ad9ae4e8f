"""Files of a catalog on local disk or in a bucket: found in sorted order, pinned by size and etag, opened only as pinned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipelines.contracts import PinnedObject
from pipelines.errors import InputError, SourceError, SourceMoved
from pipelines.sources.spec import suggest

S3 = "s3://"
_OPTIONS = ("endpoint", "region", "access_key_id", "secret_access_key", "session_token", "allow_http", "anonymous")
# Arrow tries 3 times in 2 s and waits 1 s for a connection. Seven tries last through about 20 s of SlowDown (measured: 23 s; eight take a minute).
_TRIES, _CONNECT_S, _SILENT_S = 7, 10, 60
# A bucket answers a HEAD in tens of milliseconds, mostly waiting.
_HEADS_AT_ONCE = 16
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The local disk, or a bucket service with its options. Picklable: a worker opens its own connections."""

    remote: bool
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def filesystem(self) -> fs.FileSystem:
        """Arrow's view of the place, made once per process."""
        return _connect(self.options) if self.remote else fs.LocalFileSystem()

    def key(self, name: str) -> str:
        """Return the path that the filesystem understands."""
        return name.removeprefix(S3) if self.remote else name


def locate(path: str, options: Mapping[str, str]) -> tuple[Place, str]:
    """Return where a configured path is, and the path in its full spelling."""
    scheme, mark, _ = path.partition("://")
    if not mark:
        if options:
            raise InputError(f"`source.options` are for buckets, but `source.path` is local: {path}.")
        return Place(remote=False), str(Path(path).expanduser().absolute())
    if scheme != "s3":
        raise InputError(f"`source.path` {path}: `{scheme}://` is not supported. Use a local path or s3://.")
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise InputError(f"`source.options.{unknown[0]}` is unknown.{suggest(unknown[0], _OPTIONS)}")
    return Place(remote=True, options=tuple(sorted(options.items()))), path.rstrip("/")


@lru_cache(maxsize=8)
def _connect(options: tuple[tuple[str, str], ...]) -> fs.FileSystem:
    """Open an S3 connection; without keys, AWS's default credential chain finds them."""
    given = dict(options)
    endpoint = given.get("endpoint", "")
    scheme, _, host = endpoint.rpartition("://")
    if scheme == "http" and given.get("allow_http", "").lower() != "true":
        raise InputError(f"`source.options.endpoint` {endpoint} is not encrypted. Use https, or set `allow_http: true`.")
    arguments: dict[str, Any] = {
        "access_key": given.get("access_key_id"),
        "secret_key": given.get("secret_access_key"),
        "session_token": given.get("session_token"),
        "region": given.get("region"),
        "connect_timeout": _CONNECT_S,
        "request_timeout": _SILENT_S,
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES),
        "anonymous": given.get("anonymous", "").lower() == "true",
    }
    if host:
        arguments |= {"endpoint_override": host, "scheme": scheme or "https"}
    return fs.S3FileSystem(**arguments)


def find(place: Place, path: str) -> tuple[PinnedObject, ...]:
    """Pin every file under a path: one file, a folder, or a pattern with `*`, `?`, `[...]` and `**`; hidden ones never."""
    with ThreadPoolExecutor(_HEADS_AT_ONCE) as pool:
        try:
            pins = tuple(pool.map(lambda name: pin(place, name), _names(place, path)))
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{path} cannot be listed: {error}. Check the address, the rights and the network.") from error
    if not pins:
        raise SourceError(f"{path}: nothing to read. Looked for a file, a folder of files, or a pattern's matches, hidden files aside.")
    return pins


def _names(place: Place, path: str) -> list[str]:
    """Return the full names of the files under a path, sorted."""
    system, key = place.filesystem, place.key(path)
    here = system.get_file_info(key)
    if here.type == fs.FileType.File:
        return [path]
    wild = _WILD.search(key)
    if wild and here.type == fs.FileType.NotFound:
        folder, pattern = key[: wild.start()].rpartition("/")[0], _pattern(key)
        deep = "/" in key[wild.start() :]
    else:
        folder, pattern, deep = key, re.compile(r".*", re.DOTALL), True
    infos = system.get_file_info(fs.FileSelector(folder, recursive=deep, allow_not_found=True))
    files = (info.path for info in infos if info.type == fs.FileType.File)
    shown = (name for name in files if pattern.fullmatch(name) and not _hidden(name.removeprefix(folder)))
    return sorted((S3 if place.remote else "") + name for name in shown)


def _hidden(inside: str) -> bool:
    """Whether a path below the folder names a marker, a checksum or another thing that is no data."""
    return any(part.startswith(("_", ".")) for part in PurePosixPath(inside.lstrip("/")).parts)


def _pattern(glob: str) -> re.Pattern[str]:
    """Translate a glob; `*` stays within one folder and `**/` spans any number of them."""
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", glob)
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    spelled = (known.get(part) or (f"[{part[1:-1].replace('!', '^', 1)}]" if part.startswith("[") else re.escape(part)) for part in parts)
    return re.compile("".join(spelled), re.DOTALL)


def pin(place: Place, name: str) -> PinnedObject:
    """Look at one file: its size and, in a bucket, its ETag; on disk, the time of its last change and its inode."""
    if not place.remote:
        stat = Path(name).stat()
        return PinnedObject(name=name, size=stat.st_size, etag=f"{stat.st_mtime_ns}-{stat.st_ino}")
    with place.filesystem.open_input_file(place.key(name)) as file:
        return _pin_open(name, file)


def _pin_open(name: str, file: pa.NativeFile) -> PinnedObject:
    return PinnedObject(name=name, size=file.size(), etag=file.metadata().get("ETag", b"").decode().strip('"'))


@contextmanager
def opened(place: Place, name: str, *, expected: PinnedObject | None) -> Iterator[pa.NativeFile]:
    """Open a file for reading, and refuse it if it is not the pinned one, before and after reading.

    Without `expected` the file is immutable by its table's promise, and only its absence is a move.
    """
    try:
        with place.filesystem.open_input_file(place.key(name)) as file:
            # On disk the name is looked at after the file was opened: a replacement in between is noticed either way.
            if expected is not None and expected != (_pin_open(name, file) if place.remote else pin(place, name)):
                raise _moved(name)
            yield file
        if expected is not None and expected != pin(place, name):
            raise _moved(name)
    except FileNotFoundError as error:
        raise SourceMoved(f"{name} is gone since the catalog was pinned. Plan again.") from error
    except (OSError, pa.ArrowException) as error:
        if expected is not None and _changed(place, expected):
            raise _moved(name) from error
        raise SourceError(f"{name} cannot be read: {error}. Check that the file is whole and that `source.type` fits it.") from error


def _moved(name: str) -> SourceMoved:
    return SourceMoved(f"{name} changed since the catalog was pinned. Plan again.")


def _changed(place: Place, expected: PinnedObject) -> bool:
    """Whether a file that failed to read is no longer the pinned one; a place that does not answer proves nothing."""
    try:
        return pin(place, expected.name) != expected
    except FileNotFoundError:
        return True
    except (OSError, pa.ArrowException):
        return False
