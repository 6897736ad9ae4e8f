"""The local half of the store: objects are files that we write, fsync and link ourselves.

A reader sees a whole object or none, `create` loses to whoever was first, and what was acknowledged survives a power
loss. Every step that changes the disk passes a named fail point, before and after.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pipelines.errors import AlreadyExists, InputError, NotFound, StoreError

CHUNK_BYTES = 4 * 1024 * 1024
TEMPORARY = ".tmp-"

Data = bytes | Path
Digest = tuple[int, str]
"""Size in bytes and sha256 in hex of what was written."""

_ADVICE = {
    errno.ENOSPC: "The disk is full: free space, then run again; nothing published has changed.",
    errno.EDQUOT: "The quota is used up: free space, then run again; nothing published has changed.",
    errno.EFBIG: "The file exceeds the size limit of this process (`ulimit -f`) or of the file system.",
    errno.EACCES: "Check the owner and the mode of the folder.",
    errno.EROFS: "The file system is mounted read-only.",
    errno.EIO: "The disk reports an input/output error: check it before running again.",
    errno.ENOTSUP: "Put-if-absent needs hard links here: use a file system that has them, or an object store.",
}
_ADVICE[errno.EPERM] = _ADVICE[errno.ENOTSUP]  # what link() answers on FAT and some network shares


class Faults(Protocol):
    """What a test passes in to kill, tear or fail a step. A point is `<step>:<key class>:before|torn|after`, or a plain name."""

    def reach(self, point: str) -> None:
        """Return at once, raise, or never return."""
        ...


@dataclass(frozen=True)
class NoFaults:
    """The faults of production: none."""

    def reach(self, point: str) -> None:
        """Do nothing."""


NO_FAULTS = NoFaults()


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What a listing or a head says about an object. `modified` is the store's own clock, and no part of what the object is."""

    key: str
    size: int
    modified: datetime | None = field(default=None, compare=False)


@contextlib.contextmanager
def step(faults: Faults, name: str) -> Iterator[None]:
    """Pass the fail points before and after one change."""
    faults.reach(f"{name}:before")
    yield
    faults.reach(f"{name}:after")


def key_class(key: str) -> str:
    """Return what kind of object a key names, for fail points: its first folder, or `manifest`."""
    return "manifest" if key.endswith("/manifest.json") else key.split("/", 1)[0]


def pieces(data: Data) -> Iterator[bytes]:
    """Cut an object in pieces of bounded size; more than one byte gives at least two pieces, so that a write can tear."""
    size = data.stat().st_size if isinstance(data, Path) else len(data)
    bound = max(1, min(CHUNK_BYTES, (size + 1) // 2))
    if isinstance(data, bytes):
        yield from (data[start : start + bound] for start in range(0, size, bound))
        return
    with data.open("rb") as stream:
        while piece := stream.read(bound):
            yield piece


class Disk:
    """A directory. A temporary file in the same folder is filled and fsynced, then linked (`create`) or renamed over the old."""

    def __init__(self, root: Path, faults: Faults) -> None:
        self._root = Path(os.path.realpath(root))
        self._faults = faults

    def uri(self, key: str) -> str:
        """Return the absolute path; the empty key is the root."""
        return str(self._root / key)

    def write(self, key: str, data: Data, *, create: bool) -> Digest:
        """Store the object whole and durably; with `create`, raise `AlreadyExists` when there is one."""
        path, kind = self._path(key), key_class(key)
        if create and path.exists():  # spares writing a large file for nothing; the link decides
            raise AlreadyExists(f"{path} exists already: another run wrote it first.")
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        with self._explained("write", path):
            self._make_folder(path.parent, kind)
            try:
                digest = self._fill(temporary, data, kind)
                self._place(temporary, path, kind, create=create)
            finally:
                # The write has succeeded or failed by now. A leftover is invisible, and swept later.
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            self._sync_folder(path.parent, kind)
        return digest

    def chunks(self, key: str) -> Iterator[bytes]:
        """Stream the object from its start."""
        path = self._path(key)
        with self._explained("read", path), path.open("rb") as stream:
            while piece := stream.read(CHUNK_BYTES):
                yield piece

    def read_range(self, key: str, *, start: int, length: int) -> bytes:
        """Return `length` bytes from `start`, or what there is."""
        path = self._path(key)
        with self._explained("read", path), path.open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object below the folder `prefix`, in any order, without temporary files."""
        top, below_root = self._path(prefix), len(str(self._root)) + 1
        folders = [str(top)]
        with self._explained("list", top):
            while folders:
                for entry in _entries(folders.pop()):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file() and not entry.name.startswith(TEMPORARY):
                        # What goes away before its stat is being deleted, and no longer there to report.
                        with contextlib.suppress(FileNotFoundError):
                            yield _info(entry.path[below_root:], entry.stat())

    def head(self, key: str) -> ObjectInfo | None:
        """Return size and time, or None when there is no object."""
        path = self._path(key)
        try:
            with self._explained("look at", path):
                found = path.stat()
        except NotFound:
            return None
        return _info(key, found) if stat.S_ISREG(found.st_mode) else None

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        path, kind = self._path(key), key_class(key)
        with self._explained("delete", path):
            if path.is_file():
                with step(self._faults, f"delete:{kind}"):
                    path.unlink(missing_ok=True)
                self._sync_folder(path.parent, kind)

    def sync(self, keys: tuple[str, ...]) -> None:
        """Make objects that anyone wrote survive a power loss: fsync the files, then every folder up to the root."""
        folders: dict[Path, str] = {}
        for key in keys:
            path, kind = self._path(key), key_class(key)
            with self._explained("fsync", path), step(self._faults, f"sync:{kind}"):
                _fsync(path)
            folders.setdefault(path.parent, kind)
        for folder, kind in [*folders.items()]:
            folders |= {above: kind for above in folder.parents if above.is_relative_to(self._root)}
        for folder in sorted(folders, key=lambda path: -len(path.parts)):
            with self._explained("fsync", folder):
                self._sync_folder(folder, folders[folder])

    def sweep(self, *, older_than_s: float) -> int:
        """Remove temporary files that dead writers left, and return how many."""
        swept = 0
        with self._explained("sweep", self._root):
            for path in self._root.rglob(f"{TEMPORARY}*"):
                with contextlib.suppress(FileNotFoundError):  # its writer lives, and has just finished
                    if path.is_file() and time.time() - path.stat().st_mtime >= older_than_s:
                        path.unlink()
                        swept += 1
        return swept

    def _path(self, key: str) -> Path:
        path = f"{self._root}/{key}"
        if os.path.realpath(path) != path:  # a link somewhere on the way, which may stay inside
            real = Path(os.path.realpath(path))
            if not real.is_relative_to(self._root):
                raise InputError(f"key {key!r} leads out of {self._root} through a symbolic link. Remove the link.")
        return Path(path)

    def _make_folder(self, folder: Path, kind: str) -> None:
        if folder.is_dir():
            return
        self._make_folder(folder.parent, kind)
        with step(self._faults, f"mkdir:{kind}"):
            folder.mkdir(exist_ok=True)
        self._sync_folder(folder.parent, kind)

    def _fill(self, temporary: Path, data: Data, kind: str) -> Digest:
        sha, size = hashlib.sha256(), 0
        with step(self._faults, f"create:{kind}"):
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(handle, "wb", buffering=0) as stream:
            with step(self._faults, f"write:{kind}"):
                for piece in pieces(data):
                    _write_all(stream.fileno(), piece)
                    sha.update(piece)
                    if not size:
                        self._faults.reach(f"write:{kind}:torn")
                    size += len(piece)
            with step(self._faults, f"fsync:{kind}"):
                os.fsync(stream.fileno())
        return size, sha.hexdigest()

    def _place(self, temporary: Path, path: Path, kind: str, *, create: bool) -> None:
        if not create:
            with step(self._faults, f"replace:{kind}"):
                temporary.replace(path)
            return
        try:
            with step(self._faults, f"link:{kind}"):
                os.link(temporary, path)
        except FileExistsError:
            raise AlreadyExists(f"{path} exists already: another run wrote it first.") from None
        with step(self._faults, f"unlink:{kind}"):
            temporary.unlink()

    def _sync_folder(self, folder: Path, kind: str) -> None:
        with step(self._faults, f"fsync_folder:{kind}"):
            _fsync(folder)

    @contextlib.contextmanager
    def _explained(self, verb: str, path: Path) -> Iterator[None]:
        """Turn what the operating system raises into our errors, with what to do next."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            if verb == "write":
                raise StoreError(f"cannot write {path}: {error.strerror}. Check that nothing else changes {self._root}.") from error
            raise NotFound(f"{path} does not exist.") from error
        except OSError as error:
            code = error.errno or 0
            advice = _ADVICE.get(code, "Check the disk and the rights, then run again.")
            raise StoreError(f"cannot {verb} {path}: {errno.errorcode.get(code, code)} ({error.strerror}). {advice}") from error


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [*entries]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key=key, size=found.st_size, modified=datetime.fromtimestamp(found.st_mtime, UTC))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(handle, view) :]  # a nearly full disk may take less than it was given
