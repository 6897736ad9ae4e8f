"""One small face over a local directory, s3://, gs:// and az://: keys in, verified bytes out.

`put_if_absent` lets exactly one writer win, and `probe` refuses a store that does not keep this. What was written once
is known by size and sha256, and is read back verified. Credentials stay out of messages and reprs.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
import obstore.exceptions as obstore_errors
import obstore.store

from pipelines.contracts import ObjectRef
from pipelines.disk import CHUNK_BYTES, NO_FAULTS, TEMPORARY, Data, Digest, Disk, Faults, ObjectInfo, key_class, pieces, step
from pipelines.errors import AlreadyExists, CorruptObject, InputError, NotFound, StoreError

MAX_KEY_CHARS = 512
# An object store takes a conditional put as one request, so the bytes pass through memory. Larger files go through `put`.
MAX_CONDITIONAL_BYTES = 256 * 1024 * 1024

_SEGMENT = re.compile(r"[A-Za-z0-9._=-]+")
_SECRET_NAME = re.compile(r"(?i)key|secret|token|password|credential")
_BUCKET_SCHEMES = ("s3", "gs", "az")
_CLIENT_FLAGS = frozenset({"allow_http", "allow_invalid_certificates", "http1_only", "http2_only"})
_CLIENT_OPTIONS = _CLIENT_FLAGS | {
    "connect_timeout",
    "read_timeout",
    "timeout",
    "proxy_url",
    "proxy_excludes",
    "root_certificate",
    "user_agent",
}
# obstore ends every request after 30 s unless told otherwise, which a healthy read of a large file exceeds.
_CLIENT_DEFAULTS = {"connect_timeout": "10s", "read_timeout": "120s", "timeout": "1h"}
# A store that says SlowDown may say so for many seconds. obstore draws each pause between 0.1 s and `base` times the last
# one, so that with its own base of 2 the pauses hardly grow: ten retries were over after 2.3 s; with 3 they take about 20.
_RETRY = {"max_retries": 10, "retry_timeout": timedelta(minutes=3), "backoff": {"base": 3}}
# obstore repeats a request that failed or got no answer, but not one whose answer broke off: that is left to us.
_BROKEN_OFF = "request or response body error"
# What is left of a multi-part upload whose last answer broke off: obstore abandons it, and finds that it is complete.
_ABANDONED = "Error performing DELETE"
_PAUSES_S = (0.1, 0.5, 2.0)
_PARALLEL_HEADS = 16
_LIST_FROM = 64  # above this many objects of one folder, a listing (1,000 a request) is cheaper than asking for each


T = TypeVar("T")


class Store:
    """An open root. Picklable, so that it travels to workers; safe to share between threads."""

    def __init__(self, backend: Disk | Bucket, *, reopen: tuple[str, Mapping[str, str], Faults]) -> None:
        self._backend = backend
        self._reopen = reopen
        self._faults = reopen[2]

    @classmethod
    def open(cls, url: str | Path, *, options: Mapping[str, str] | None = None, faults: Faults = NO_FAULTS) -> Self:
        """Open a root without touching it. `options` are obstore's (endpoint, region, access_key_id, allow_http, ...)."""
        root = _clean_url(str(url))
        backend: Disk | Bucket
        if root.startswith(tuple(f"{scheme}://" for scheme in _BUCKET_SCHEMES)):
            backend = Bucket(root, options or {}, faults)
        else:
            backend = Disk(Path(root), faults)
        return cls(backend, reopen=(root, dict(options or {}), faults))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopened, self._reopen)

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    @property
    def root(self) -> str:
        """The root as an absolute path or URL, without credentials."""
        return self._reopen[0]

    def uri(self, key: str = "") -> str:
        """Return where an object is, as engines want it: an absolute path or a URL."""
        return self._backend.uri(_checked(key)) if key else self.root

    def failpoint(self, name: str) -> None:
        """Mark a named moment between two writes, where a test may stop the process."""
        self._faults.reach(name)

    def put(self, key: str, data: Data) -> ObjectRef:
        """Write an object, from bytes or a file, over whatever is there."""
        size, sha256 = self._backend.write(_checked(key), _readable(data), create=False)
        return ObjectRef(key=key, size=size, sha256=sha256)

    def put_if_absent(self, key: str, data: Data) -> ObjectRef:
        """Write an object that must not exist yet, or raise `AlreadyExists`. Of any number of racers exactly one returns.

        A `StoreError` leaves the outcome unknown (the answer may be lost after the commit), and a retry below us can
        turn our own success into `AlreadyExists`: whoever must know reads the object and compares.
        """
        size, sha256 = self._backend.write(_checked(key), _readable(data), create=True)
        return ObjectRef(key=key, size=size, sha256=sha256)

    def get(self, key: str) -> bytes:
        """Return a whole object."""
        return b"".join(self._backend.chunks(_checked(key)))

    def get_range(self, key: str, *, start: int, length: int) -> bytes:
        """Return exactly `length` bytes from `start`; an object that ends earlier is corrupt."""
        if start < 0 or length < 0:
            raise InputError(f"{self.uri(key)}: a range starts at 0 or later and has a length, not start={start}, length={length}.")
        found = self._backend.read_range(_checked(key), start=start, length=length) if length else b""
        if len(found) != length:
            raise CorruptObject(f"{self.uri(key)}: wanted {length} bytes from {start}, found {len(found)}. {_DAMAGED}")
        return found

    def read_verified(self, ref: ObjectRef) -> bytes:
        """Return a whole object whose size and sha256 are as recorded."""
        data = self.get(ref.key)
        self._compare(ref, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        return data

    def verify(self, ref: ObjectRef) -> None:
        """Raise unless size and sha256 are as recorded; the object streams through, and is never held whole."""
        sha, size = hashlib.sha256(), 0
        for piece in self._backend.chunks(_checked(ref.key)):
            sha.update(piece)
            size += len(piece)
        self._compare(ref, size=size, sha256=sha.hexdigest())

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object below the folder `prefix`, sorted by key. A listing is never the truth about a generation."""
        folder = prefix.strip("/")
        return iter(sorted(self._backend.list(_checked(folder) if folder else ""), key=lambda info: info.key))

    def head(self, key: str) -> ObjectInfo | None:
        """Return size and last change of an object, or None when there is none."""
        return self._backend.head(_checked(key))

    def sizes(self, keys: Iterable[str]) -> Mapping[str, int]:
        """Return the size of each object that exists. Costs requests by the folder, not by the object, where many share one."""
        folders = defaultdict(set)
        for key in keys:
            folders[_checked(key).rpartition("/")[0]].add(key)
        found: dict[str, int] = {}
        single: set[str] = set()
        for folder, members in folders.items():
            if len(members) >= _LIST_FROM and isinstance(self._backend, Bucket):
                found |= {info.key: info.size for info in self._backend.list(folder) if info.key in members}
            else:
                single |= members
        if isinstance(self._backend, Disk):
            heads = [self._backend.head(key) for key in single]
        else:
            with ThreadPoolExecutor(max_workers=_PARALLEL_HEADS) as pool:
                heads = [*pool.map(self._backend.head, single)]
        return found | {info.key: info.size for info in heads if info}

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        self._backend.delete(_checked(key))

    def sync(self, keys: Iterable[str]) -> None:
        """Make these objects survive a power loss, whoever wrote them. Free on object stores."""
        if isinstance(self._backend, Disk):
            self._backend.sync(tuple(_checked(key) for key in keys))

    def sweep_temporaries(self, *, older_than_s: float) -> int:
        """Remove the temporary files that killed writers left on a local disk, and return how many."""
        return self._backend.sweep(older_than_s=older_than_s) if isinstance(self._backend, Disk) else 0

    def probe(self) -> str | None:
        """Raise unless put-if-absent holds here. Return the probe's key when a writer without delete rights must leave it."""
        key = f"probe/{secrets.token_hex(12)}"
        first, second = secrets.token_bytes(16), secrets.token_bytes(16)
        # Nobody else knows this key: an object that is there already is ours, from a request whose answer was lost.
        with contextlib.suppress(AlreadyExists):
            self.put_if_absent(key, first)
        try:
            self.put_if_absent(key, second)
        except AlreadyExists:
            if self.get(key) != first:
                raise StoreError(f"{self.root} returned other bytes than were written to {key}. Do not publish to this store.") from None
        else:
            raise StoreError(
                f"{self.root} ignores put-if-absent: a second conditional write to {key} succeeded, so two runs could both publish. "
                "Use a store that honours `If-None-Match: *` (AWS S3, GCS, Azure, current MinIO, a local disk)."
            )
        try:
            self.delete(key)
        except StoreError:
            return key
        return None

    def _compare(self, ref: ObjectRef, *, size: int, sha256: str) -> None:
        if size != ref.size:
            raise CorruptObject(f"{self.uri(ref.key)}: expected {ref.size} bytes, found {size}. {_DAMAGED}")
        if sha256 != ref.sha256:
            raise CorruptObject(f"{self.uri(ref.key)}: expected sha256 {ref.sha256}, found {sha256}. {_DAMAGED}")


_DAMAGED = "The object was damaged after it was written: run `catalog-embed rollback`, or restore it from a copy."


def _reopened(url: str, options: Mapping[str, str], faults: Faults) -> Store:
    return Store.open(url, options=options, faults=faults)


def _clean_url(url: str) -> str:
    """Return an absolute path, or a bucket URL without trailing slash; refuse whatever may carry a credential."""
    if "://" not in url:
        return str(Path(url).absolute())
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.scheme not in ("file", *_BUCKET_SCHEMES):
        raise InputError(f"store {shown}: unknown scheme `{parts.scheme}`. Use a path (or file://), s3://, gs:// or az://.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(f"store {shown}: the address carries a user, query or fragment. Credentials belong in the store's options.")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"store {shown}: file:// names host `{parts.netloc}`. Write file:///absolute/path.")
        return str(Path(unquote(parts.path)).absolute())
    if not parts.netloc:
        raise InputError(f"store {shown}: no bucket. Write {parts.scheme}://bucket/prefix.")
    return shown.rstrip("/")


def _checked(key: str) -> str:
    """Return a key that can be no path out of the root, no option, and nobody's temporary file."""
    for segment in key.split("/"):
        if not _SEGMENT.fullmatch(segment) or segment in (".", "..") or segment.startswith(TEMPORARY):
            raise InputError(
                f"key {key[:80]!r}: {segment[:80]!r} is no segment of a key. Use letters, digits and . _ = - between single slashes."
            )
    if len(key) > MAX_KEY_CHARS:
        raise InputError(f"key {key[:80]!r}... has {len(key)} characters, more than {MAX_KEY_CHARS}. Shorten the names.")
    return key


def _readable(data: Data) -> Data:
    if isinstance(data, Path) and not data.is_file():
        raise NotFound(f"{data} is not a file, so it cannot be stored. Check the step that should have written it.")
    return data


class Bucket:
    """A bucket and a prefix. Atomicity and durability are the store's; here are its errors translated, and its secrets kept."""

    def __init__(self, url: str, options: Mapping[str, str], faults: Faults) -> None:
        self._url = url
        self._faults = faults
        self._secrets = [value for name, value in options.items() if value and _SECRET_NAME.search(name)]
        client: dict[str, Any] = _CLIENT_DEFAULTS | {name: value for name, value in options.items() if name in _CLIENT_OPTIONS}
        client |= {name: client[name].lower() in ("true", "1", "yes") for name in _CLIENT_FLAGS & client.keys()}
        config = {name: value for name, value in options.items() if name not in _CLIENT_OPTIONS}
        build: Callable[..., Any] = obstore.store.from_url  # typed per store upstream; our options come from a file
        try:
            self._store = build(url, config=config, client_options=client, retry_config=_RETRY)
        except (obstore_errors.BaseError, ValueError, TypeError) as error:
            # `from None`, here and below: the cause's text may repeat the value of an option or a signed address.
            raise InputError(
                f"cannot open {url}: {self._scrubbed(error)} Check the store's options ({', '.join(sorted(options))})."
            ) from None

    def uri(self, key: str) -> str:
        """Return the object's URL."""
        return f"{self._url}/{key}"

    def write(self, key: str, data: Data, *, create: bool) -> Digest:
        """Store the object whole; with `create`, raise `AlreadyExists` when there is one."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        if create and size > MAX_CONDITIONAL_BYTES:
            limit = f"{MAX_CONDITIONAL_BYTES >> 20} MiB"
            raise InputError(
                f"{self.uri(key)}: {size} bytes exceed {limit}, the limit of put-if-absent. Use `put`, under a key of this run."
            )
        with self._explained("write", key), step(self._faults, f"put:{key_class(key)}"):
            if isinstance(data, Path) and size > CHUNK_BYTES and not create:
                return _repeated(lambda: self._uploaded(key, data), signs=(_BROKEN_OFF, _ABANDONED))
            content = data.read_bytes() if isinstance(data, Path) else data
            obstore.put(self._store, key, content, mode="create" if create else "overwrite", use_multipart=False)
        return len(content), hashlib.sha256(content).hexdigest()

    def _uploaded(self, key: str, path: Path) -> Digest:
        """Store a large file in parts."""
        sha, counted = hashlib.sha256(), _Counted()
        obstore.put(self._store, key, counted.through(pieces(path), sha))
        return counted.size, sha.hexdigest()

    def chunks(self, key: str) -> Iterator[bytes]:
        """Stream the object from its start."""
        with self._explained("read", key):
            for piece in obstore.get(self._store, key).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(piece)

    def read_range(self, key: str, *, start: int, length: int) -> bytes:
        """Return `length` bytes from `start`, or what there is."""
        with self._explained("read", key):
            return bytes(obstore.get_range(self._store, key, start=start, length=length))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object below the folder `prefix`."""
        with self._explained("list", prefix):
            found = _repeated(lambda: [item for page in obstore.list(self._store, prefix or None) for item in page])
        yield from (ObjectInfo(key=item["path"], size=item["size"], modified=item["last_modified"]) for item in found)

    def head(self, key: str) -> ObjectInfo | None:
        """Return size and time, or None when there is no object."""
        try:
            with self._explained("look at", key):
                found = obstore.head(self._store, key)
                return ObjectInfo(key=key, size=found["size"], modified=found["last_modified"])
        except NotFound:
            return None

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        # S3 says yes to a missing key, GCS and Azure say no; ours is yes.
        with contextlib.suppress(NotFound), self._explained("delete", key), step(self._faults, f"delete:{key_class(key)}"):
            _repeated(lambda: obstore.delete(self._store, key))

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Turn what obstore raises into our errors, with what to do next."""
        try:
            yield
        except (obstore_errors.AlreadyExistsError, obstore_errors.PreconditionError):
            raise AlreadyExists(f"{self.uri(key)} exists already: another run wrote it first.") from None
        except FileNotFoundError as error:
            if verb == "write":
                raise StoreError(f"cannot write {self.uri(key)}: {self._scrubbed(error)} Check that the bucket exists.") from None
            raise NotFound(f"{self.uri(key)} does not exist.") from None
        except (obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError) as error:
            raise StoreError(f"may not {verb} {self.uri(key)}: {self._scrubbed(error)} Check the credentials and their rights.") from None
        except (obstore_errors.BaseError, OSError) as error:
            if "416 Range Not Satisfiable" in str(error):
                raise CorruptObject(f"{self.uri(key)} ends before the wanted range starts. {_DAMAGED}") from None
            advice = "Check bucket, endpoint, network and credentials, then run again."
            raise StoreError(f"cannot {verb} {self.uri(key)}: {self._scrubbed(error)} {advice}") from None

    def _scrubbed(self, error: BaseException) -> str:
        """Return the first line of a message, without queries, user parts or the value of any secret option."""
        first = (str(error).splitlines() or [type(error).__name__])[0]
        for secret in self._secrets:
            first = first.replace(secret, "***")
        first = re.sub(r"\?\S*", "", re.sub(r"(\w+://)[^/@\s]*@", r"\1", first))[:400]
        return first if first.endswith(".") else f"{first}."


def _repeated(work: Callable[[], T], *, signs: tuple[str, ...] = (_BROKEN_OFF,)) -> T:
    """Do what may be done twice, and again where the answer broke off."""
    for pause_s in _PAUSES_S:
        try:
            return work()
        except (obstore_errors.BaseError, OSError) as error:
            if not any(sign in str(error) for sign in signs):
                raise
        time.sleep(pause_s)
    return work()


class _Counted:
    """Counts and hashes a stream that someone else consumes."""

    size = 0

    def through(self, stream: Iterator[bytes], sha: Any) -> Iterator[bytes]:
        for piece in stream:
            self.size += len(piece)
            sha.update(piece)
            yield piece
