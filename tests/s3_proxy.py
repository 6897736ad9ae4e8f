"""A proxy in front of an S3 server that fails by a plan: errors, cut bodies, answers lost after the commit, delays.

A plan says, for each request, what goes wrong with it. Requests are told apart by what they ask for and by who asks:
obstore and Lance (`rust`), pyarrow (`arrow`), or boto3 (`boto`), which is our witness and is never hit.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from tests.faults import Proxy

# 500 and slow_down answer in the server's place; cut sends half of the body; lost carries out and hangs up; hang never answers.
Fault = Literal["500", "slow_down", "cut", "lost", "delay"]
DELAY_S = 0.2
_BODY = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>{}</Message><RequestId>1</RequestId></Error>"
_ERRORS = {
    "500": (500, _BODY.format("InternalError", "We encountered an internal error. Please try again.")),
    "slow_down": (503, _BODY.format("SlowDown", "Please reduce your request rate.")),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request, and its place among the requests of its kind."""

    kind: str
    client: str
    key: str
    number: int
    signer: str


Plan = Callable[[Asked], Fault | None]


class S3Proxy(Proxy):
    """Forwards to an S3 endpoint and lets a plan spoil what it wants. `seen` and `hit` count requests by client and kind."""

    def __init__(self, endpoint: str, plan: Plan | None = None) -> None:
        super().__init__(endpoint)
        self.plan = plan
        self.seen: Counter[tuple[str, str]] = Counter()
        self.hit: Counter[tuple[str, str, Fault]] = Counter()
        self.signers: set[str] = set()
        self._counting = threading.Lock()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self._counting:
            asked = self._asked(request)
            fault = self.plan(asked) if self.plan and asked.client != "boto" else None
            if fault:
                self.hit[asked.client, asked.kind, fault] += 1
        if fault in _ERRORS:
            status, text = _ERRORS[fault]
            self._answer(request, status, [("Content-Type", "application/xml")], text.encode())
            return
        if fault == "delay":
            time.sleep(DELAY_S)
        status, headers, content = self._forwarded(request, body)
        if fault == "lost":
            request.close_connection = True
            return
        self._answer(request, status, headers, content, cut=fault == "cut")

    def _asked(self, request: BaseHTTPRequestHandler) -> Asked:
        kind, agent = _kind(request), request.headers.get("User-Agent", "").lower()
        client = "boto" if "boto" in agent else "arrow" if "aws-sdk-cpp" in agent else "rust"
        self.seen[client, kind] += 1
        found = re.search(r"Credential=([^/]+)/", request.headers.get("Authorization", ""))
        signer = found[1] if found else "nobody"
        self.signers |= {signer}
        return Asked(kind=kind, client=client, key=urlsplit(request.path).path, number=self.seen[client, kind], signer=signer)

    def _forwarded(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
        upstream = http.client.HTTPConnection(self._target, timeout=20)
        try:
            upstream.request(request.command, request.path, body=body, headers=headers)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _answer(
        self, request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False
    ) -> None:
        request.send_response_only(status)
        said = dict(headers).get("Content-Length", "0")
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                request.send_header(name, value)
        request.send_header("Content-Length", said if request.command == "HEAD" else str(len(content)))
        # One write for head and body: two small ones wait 40 ms for each other on loopback.
        request._headers_buffer.append(b"\r\n")  # type: ignore[attr-defined]
        head = b"".join(request._headers_buffer)  # type: ignore[attr-defined]
        request._headers_buffer = []  # type: ignore[attr-defined]
        shown = b"" if request.command == "HEAD" else content
        request.close_connection |= cut
        request.wfile.write(head + (shown[: len(shown) // 2] if cut else shown))


def every(nth: int, faults: Sequence[Fault], *, only: Callable[[Asked], bool] = lambda _: True) -> Plan:
    """Spoil every `nth` request of each kind and client, with the next of the faults that make sense for it."""
    turns: Counter[tuple[str, str]] = Counter()

    def plan(asked: Asked) -> Fault | None:
        if asked.number % nth or not only(asked):
            return None
        turn, turns[asked.client, asked.kind] = turns[asked.client, asked.kind], turns[asked.client, asked.kind] + 1
        fault = faults[turn % len(faults)]
        return "lost" if fault == "cut" and asked.kind == "head" else fault

    return plan


def first(count: int, fault: Fault, *, only: Callable[[Asked], bool]) -> Plan:
    """Spoil the first requests that are meant."""
    left = [count]

    def plan(asked: Asked) -> Fault | None:
        if not left[0] or not only(asked):
            return None
        left[0] -= 1
        return fault

    return plan


def _kind(request: BaseHTTPRequestHandler) -> str:
    query = parse_qs(urlsplit(request.path).query, keep_blank_values=True)
    method = request.command
    if method == "PUT":
        return "part" if "partNumber" in query else "create" if request.headers.get("If-None-Match") == "*" else "put"
    if method == "POST":
        return "begin" if "uploads" in query else "complete" if "uploadId" in query else "delete"
    if method == "GET":
        return "list" if "list-type" in query or "prefix" in query else "range" if request.headers.get("Range") else "get"
    return method.lower()
