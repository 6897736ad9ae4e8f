"""How a table is opened, and what its errors become: messages with an address, values and an advice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import lance
from lance.commit import CommitConflictError

from pipelines.errors import AlreadyExists, CatalogEmbedError, NotFound, StoreError

T = TypeVar("T")

STORAGE_VERSION = "2.2"  # the newest file format that lancedb 0.40 reads
# What the engine raises: a lost commit race is an OSError from some of its operations, and from others a class of its own.
_ENGINE_ERRORS = (OSError, ValueError, RuntimeError, CommitConflictError)
_ATTEMPTS = 6
_PAUSE_S = 0.05
_RETRYABLE = ("retryable commit conflict", "too many concurrent writers", "please retry")
# Lance repeats a request that failed or got no answer, but not a listing whose answer broke off.
_BROKEN_OFF = "request or response body error"
# Lance gives up after 3 retries, six times over: 5 s of SlowDown. With 10 they last about 20 s, as ours do.
_CLIENT = {"client_max_retries": "10", "client_retry_timeout": "180"}


def engine_options(uri: str, options: Mapping[str, str]) -> dict[str, str] | None:
    """Return what Lance is told about a store: its options, and how patient to be; nothing about a local disk.

    Credentials that the options leave out are Lance's to find: the environment, shared files, web identity, the machine's role.
    """
    return _CLIENT | dict(options) if "://" in uri else None


def open_table(uri: str, *, options: Mapping[str, str], version: int | None = None) -> Any:
    """Open one version of a table, or the latest."""
    which = "" if version is None else f" at version {version}"
    try:
        return steady(lambda: lance.dataset(uri, version=version, storage_options=engine_options(uri, options)))
    except _ENGINE_ERRORS as error:
        if "was not found" in str(error) or "not found" in str(error).lower():
            raise NotFound(f"there is no table {uri}{which}. `catalog-embed rebuild` makes it anew from the vector log.") from error
        raise StoreError(f"cannot open table {uri}{which}: {first_line(error)}. Check the store's options and rights.") from error


def latest(uri: str, *, options: Mapping[str, str]) -> Any | None:
    """Open the latest version, or return None when no version was ever committed."""
    try:
        return open_table(uri, options=options)
    except NotFound:
        return None


@contextlib.contextmanager
def explained(what: str, uri: str) -> Iterator[None]:
    """Turn what Lance and Arrow raise into our errors."""
    try:
        yield
    except _ENGINE_ERRORS as error:
        if isinstance(error, CatalogEmbedError):
            raise
        raise StoreError(
            f"cannot {what} table {uri}: {first_line(error)}. If it is damaged, `catalog-embed rebuild` makes it anew."
        ) from error


def committed(uri: str, *, options: Mapping[str, str], work: Callable[[Any], T]) -> T:
    """Do one commit on the latest version, and again where another commit came between; Lance leaves this to its caller."""
    for attempt in range(1, _ATTEMPTS + 1):
        dataset = open_table(uri, options=options)
        before = int(dataset.version)
        try:
            return work(dataset)
        except _ENGINE_ERRORS as error:
            if attempt == _ATTEMPTS or not (_conflict(error) or (_broken_off(error) and _version(uri, options) == before)):
                raise
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


def steady(work: Callable[[], T]) -> T:
    """Do what may be done twice, and again where an answer broke off."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return work()
        except _ENGINE_ERRORS as error:
            if attempt == _ATTEMPTS or not _broken_off(error):
                raise
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


def _conflict(error: BaseException) -> bool:
    return any(sign in str(error).lower() for sign in _RETRYABLE)


def _broken_off(error: BaseException) -> bool:
    return _BROKEN_OFF in str(error)


def _version(uri: str, options: Mapping[str, str]) -> int:
    return int(open_table(uri, options=options).version)


@dataclass
class Line:
    """One writer's versions, each of which follows the one before; without a `version` to start from, nothing is compared.

    A lease cannot stop a process that slept and goes on. Its commits are found here, before rows of two runs mix.
    """

    uri: str
    options: Mapping[str, str]
    version: int | None

    def commit(self, work: Callable[[Any], T]) -> T:
        """Do one commit, and raise where it is not the only one since the last."""
        self.check()
        done = committed(self.uri, options=self.options, work=work)
        self.check(commits=1)
        return done

    def check(self, *, commits: int = 0) -> None:
        """Raise unless the latest version is this line's, or at most `commits` of its own after that."""
        if self.version is None:
            return
        found = _version(self.uri, self.options)
        if not self.version <= found <= self.version + commits:
            raise AlreadyExists(
                f"table {self.uri} is at version {found} where this run expects {self.version + commits}: another run writes it at the "
                "same time. Nothing was published; run again when that run has ended."
            )
        self.version = found


def first_line(error: BaseException) -> str:
    """Return the first line of a message, cut short."""
    return str(error).strip().split("\n", maxsplit=1)[0][:300].rstrip(".")
