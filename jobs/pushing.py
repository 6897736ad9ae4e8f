"""Metrics at a Pushgateway, for runs that no textfile outlives: one group for a project and an alias, never one for a run.

A run replaces its group whole, on top of what was read back from it: so counters add up, lasting gauges stay, and a gate
that failed last night does not fail for ever, as it would where only what is new is pushed. Whatever goes wrong is one
`GatewayError` within seconds, and nothing is pushed: it is for a warning, and changes no outcome.
"""

from __future__ import annotations

import base64
import os
import re
import ssl
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from pipelines.errors import CatalogEmbedError, InputError
from pipelines.layout import short
from pipelines.metrics import Key, carried, parse_prometheus, render_prometheus, shown

JOB = "catalog_embed"
USER, PASSWORD = "CATALOG_EMBED_PUSHGATEWAY_USER", "CATALOG_EMBED_PUSHGATEWAY_PASSWORD"

TIMEOUT_S = 5.0
# A gateway is shared: this is some hundred thousand series of others.
MAX_GATEWAY_BYTES = 32 * 1024 * 1024
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_BAD_REQUEST = 400


class GatewayError(CatalogEmbedError):
    """The gateway did not take the metrics."""


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """Where metrics are pushed, and as whom. `labels` are the group, beside the job."""

    address: str
    labels: Mapping[str, str]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        check_address(self.address)
        if (self.user is None) != (self.password is None) or ":" in (self.user or ""):
            raise InputError(f"set both {USER} and {PASSWORD}, or neither; a user's name holds no colon.")

    @property
    def group(self) -> str:
        """The address of the group."""
        pairs = "/".join(_segment(name, value) for name, value in {"job": JOB, **self.labels}.items())
        return f"{self.address.rstrip('/')}/metrics/{pairs}"


def open_gateway(address: str, labels: Mapping[str, str]) -> Gateway:
    """Return a gateway with the credentials of the environment."""
    return Gateway(address=address, labels=labels, user=os.environ.get(USER) or None, password=os.environ.get(PASSWORD) or None)


def check_address(address: str) -> str:
    """Return an address that metrics may be pushed to, or raise an `InputError` that shows no credential."""
    advice = "Write `publish: { pushgateway: http://host:9091 }`."
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"`pushgateway` is no address. {advice}") from None
    if "@" in address or parts.query or parts.fragment:
        raise InputError(f"`pushgateway` holds credentials or a query. {advice} Credentials belong into {USER} and {PASSWORD}.")
    if parts.scheme not in {"http", "https"} or not host or not address.isascii() or not address.isprintable() or " " in address:
        raise InputError(f"`pushgateway` is {short(address, 80)!r}, and no http or https address. {advice}")
    return address


def push_run(gateway: Gateway, values: Mapping[Key, float]) -> None:
    """Put a run's metrics on top of those of the runs before it."""
    seen = _asked(gateway, "GET", f"{gateway.address.rstrip('/')}/metrics").decode("utf-8", "replace")
    # The gateway gives every group an instance, an empty one where none was pushed.
    previous = parse_prometheus(seen, labels={**gateway.labels, "job": JOB, "instance": ""})
    _asked(gateway, "PUT", gateway.group, render_prometheus(carried(previous, values)))


def push_values(gateway: Gateway, values: Mapping[Key, float]) -> None:
    """Set single metrics, and leave the others of the group as they are."""
    _asked(gateway, "POST", gateway.group, render_prometheus(values))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another address, which the answer names, gets no credentials."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the redirect is an error like any other status."""


def _asked(gateway: Gateway, method: str, url: str, body: str | None = None) -> bytes:
    """Send one request and return the answer, in a bounded time."""
    headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    if gateway.user is not None:
        pair = f"{gateway.user}:{gateway.password}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    # The address was checked to be http or https, and no redirect leads away from it.
    request = urllib.request.Request(url, data=None if body is None else body.encode(), headers=headers, method=method)  # noqa: S310
    answered: list[bytes | Exception] = []

    def ask() -> None:
        try:
            answered.append(_answer(request, gateway.timeout_s))
        except (OSError, HTTPException, ValueError) as error:
            answered.append(error)

    # A socket's limit starts again with every byte, and looking a name up has none: so the whole of it has one here.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * gateway.timeout_s)
    found = answered[0] if answered else TimeoutError(f"no answer within {2 * gateway.timeout_s:g} s")
    if isinstance(found, Exception):
        raise GatewayError(
            f"{method} {gateway.address} failed: {_reason(found)}. The run is not touched; see whether the gateway is up."
        ) from None
    return found


def _answer(request: urllib.request.Request, timeout_s: float) -> bytes:
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=ssl.create_default_context()))
    with opener.open(request, timeout=timeout_s) as response:
        data: bytes = response.read(MAX_GATEWAY_BYTES + 1)
    if len(data) > MAX_GATEWAY_BYTES:
        raise ValueError(f"it holds more than {MAX_GATEWAY_BYTES >> 20} MiB of metrics")
    return data


def _reason(error: Any) -> str:
    """Say what failed, without what the other side wrote: it may repeat what it was sent. Only refused metrics are explained."""
    if not isinstance(error, HTTPError):
        return short(str(getattr(error, "reason", error)) or type(error).__name__, 200)
    with error:
        told = error.read(500).decode("utf-8", "replace") if error.code == _BAD_REQUEST else ""
    return f"status {error.code}{': ' + short(' '.join(told.split()), 200) if told and 'Basic' not in told else ''}"


def _segment(name: str, value: str) -> str:
    """Return a label as a part of a path; a value that a path cannot hold travels in base64."""
    value = shown(value)
    if _PLAIN.fullmatch(value) and set(value) != {"."}:
        return f"{name}/{value}"
    return f"{name}@base64/{base64.urlsafe_b64encode(value.encode()).decode() or '='}"
