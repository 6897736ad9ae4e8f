"""Fault tools: fail points that count, kill or raise, children that die for real, and a proxy that loses answers.

A point is what `Store` reaches: `<step>:<key class>:before|torn|after`, or a plain name. A counting run lists them in
order; a `Strike` then hits the n-th of the same run.
"""

from __future__ import annotations

import errno
import http.client
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, NoReturn
from urllib.parse import urlsplit

Mode = Literal["kill", "vanish", "ENOSPC", "EIO"]

CHILD_LIMIT_S = 30


class Vanished(BaseException):
    """Stands for the death of the process where a real one is not possible: nothing in the product catches it."""


@dataclass
class Recorder:
    """Writes down every point that is reached."""

    points: list[str] = field(default_factory=list)

    def reach(self, point: str) -> None:
        self.points.append(point)


@dataclass
class Strike:
    """Hits the point with number `nth` (from 0), once."""

    nth: int
    mode: Mode
    reached: int = 0

    def reach(self, point: str) -> None:
        number, self.reached = self.reached, self.reached + 1
        if number == self.nth:
            strike(self.mode, point)


@dataclass
class StrikeAt:
    """Hits every time a named point is reached."""

    point: str
    mode: Mode

    def reach(self, point: str) -> None:
        if point == self.point:
            strike(self.mode, point)


def strike(mode: Mode, point: str) -> NoReturn:
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "vanish":
        raise Vanished(point)
    raise OSError(getattr(errno, mode), os.strerror(getattr(errno, mode)), point)


def strikes(points: list[str]) -> Iterator[tuple[int, Mode]]:
    """Every fault that makes sense at every point: death anywhere; a full disk before or within a step; EIO also after it."""
    for nth, point in enumerate(points):
        yield nth, "kill"
        phase = point.rpartition(":")[2]
        if phase in ("before", "torn"):
            yield nth, "ENOSPC"
        if phase in ("before", "torn", "after"):
            yield nth, "EIO"


def in_child(work: Callable[[], object], *, failures: tuple[type[BaseException], ...] = ()) -> int:
    """Run work in a forked child. Return 0, 3 for one of `failures`, 4 for any other error, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_LIMIT_S)
        try:
            work()
        except failures:
            os._exit(3)
        except BaseException:  # noqa: BLE001 - the child reports by exit status, and must never return into pytest
            os._exit(4)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def under(mode: Mode, work: Callable[[], object], *, failures: tuple[type[BaseException], ...]) -> int:
    """Run work that a fault will hit: in a child if it kills, else here. Return what `in_child` does."""
    if mode == "kill":
        return in_child(work, failures=failures)
    try:
        work()
    except failures:
        return 3
    return 0


Rule = Literal["pass", "ignore_condition", "lose_answer", "refuse"]


class Proxy:
    """An HTTP proxy on loopback in front of an S3 endpoint. `rule` decides what happens to requests that write."""

    def __init__(self, endpoint: str) -> None:
        self.rule: Rule = "pass"
        self.lose = 0  # how many answers to conditional writes are still to be lost
        self.lost = 0
        self._target = urlsplit(endpoint).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815 - the names that http.server calls

            def log_message(self, *args: object) -> None:
                """Stay quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        conditional = request.command == "PUT" and request.headers.get("If-None-Match") == "*"
        if conditional and self.rule == "refuse":
            request.close_connection = True
            return
        headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
        if self.rule == "ignore_condition":
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        upstream = http.client.HTTPConnection(self._target, timeout=20)
        upstream.request(request.command, request.path, body=body, headers=headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if conditional and self.rule == "lose_answer" and self.lose > 0:
            self.lose -= 1
            self.lost += 1
            request.close_connection = True
            return
        request.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                request.send_header(name, value)
        request.send_header("Content-Length", answer.getheader("Content-Length", "0") if request.command == "HEAD" else str(len(content)))
        request.end_headers()
        request.wfile.write(content)
