"""Which generations readers have open: a pin for each, which ends by itself, and which no collection passes over."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from pipelines.errors import InputError, NotFound
from pipelines.leases import CLOCK_SKEW, MAX_LEASE_BYTES, READERS, Clock, aware
from pipelines.manifest import FORMAT_VERSION, Parser, canonical, check_generation, generation_id, moment, parse, text
from pipelines.storage import Store

_PARSERS: Mapping[str, Parser[Any]] = {"generation": generation_id, "name": text, "until": moment}


def pin_reader(store: Store, generation: str, *, ttl: timedelta, name: str, clock: Clock) -> str:
    """Keep a generation from being collected for `ttl`, and return the key of the pin. Pin first, then open the manifest."""
    folder = f"leases/{READERS}/{check_generation(generation)}"
    now = aware(clock)
    for key, _, until in _readers(store, folder):
        if until + CLOCK_SKEW + timedelta(days=1) < now:  # left by readers that died
            store.delete(key)
    key = f"{folder}/{secrets.token_hex(16)}.json"
    store.put(key, _reader(generation, name=name, until=now + ttl))
    return key


def renew_reader(store: Store, key: str, *, ttl: timedelta, clock: Clock) -> None:
    """Extend a reader's pin by `ttl` from now. One that is gone is an error: the generation may be gone with it."""
    tree = _read_reader(store, _reader_key(key))
    store.put(key, _reader(tree["generation"], name=tree["name"], until=aware(clock) + ttl))


def release_reader(store: Store, key: str) -> None:
    """Drop a reader's pin."""
    store.delete(_reader_key(key))


def read_pins(store: Store, now: datetime, *, skew: timedelta = CLOCK_SKEW) -> frozenset[str]:
    """Return the generations that a reader may have open."""
    return frozenset(generation for _, generation, until in _readers(store, f"leases/{READERS}") if now < until + skew)


def _readers(store: Store, folder: str) -> Iterator[tuple[str, str, datetime]]:
    for info in store.list(folder):
        with contextlib.suppress(NotFound):  # released since the listing
            tree = _read_reader(store, info.key)
            yield info.key, tree["generation"], tree["until"]


def _reader(generation: str, *, name: str, until: datetime) -> bytes:
    return canonical({"format_version": FORMAT_VERSION, "generation": generation, "name": name, "until": until.isoformat()})


def _read_reader(store: Store, key: str) -> dict[str, Any]:
    return parse(store.get(key), where=store.uri(key), limit_bytes=MAX_LEASE_BYTES, parsers=_PARSERS, build=dict[str, Any])


def _reader_key(key: str) -> str:
    if not key.startswith(f"leases/{READERS}/"):
        raise InputError(f"{key[:80]!r} is no pin of a reader. Pass the key that `pin_reader` returned.")
    return key
