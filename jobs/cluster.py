"""Which Ray does the work, always by an explicit address: without one Ray joins whatever cluster it finds."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import InputError

# Shared memory for blocks in flight. Ray's default is a third of the machine.
_LOCAL_OBJECT_STORE_BYTES = 512 << 20
_REACH_S = 5.0


@contextmanager
def connected(address: str, *, verbose: bool = False) -> Iterator[None]:
    """Use the cluster at `address` (`local`, `auto`, `host:port`, `ray://host:port`) until the block ends.

    `local` starts a private cluster and ends it; a cluster found running, or already connected to, is left alone.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray starts its processes by fork and exec at once, which is what Lance does not know when it warns.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    import ray  # noqa: PLC0415  half a second that `--help` need not pay

    if ray.is_initialized():
        yield
        return
    _check_reachable(address)
    quiet = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    local = {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES} if address == "local" else {}
    # Ray answers SIGTERM with its own exit; whoever started this process has the say.
    ended = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **quiet, **local)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ended)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot reach Ray at `{address}`: {error}. Use `--ray-address local`, or start the cluster first.") from error
    try:
        _quieten(verbose=verbose)
        yield
    finally:
        ray.shutdown()


@contextmanager
def natives_silenced() -> Iterator[None]:
    """Keep lines that C++ code writes to stderr itself off the screen while the block runs; Python's own stay."""
    sys.stderr.flush()
    kept = os.dup(2)
    before = sys.stderr
    with Path(os.devnull).open("wb") as nowhere, os.fdopen(os.dup(kept), "w", buffering=1, errors="backslashreplace") as stream:
        os.dup2(nowhere.fileno(), 2)
        sys.stderr = stream
        try:
            yield
        finally:
            sys.stderr = before
            os.dup2(kept, 2)
            os.close(kept)


def _check_reachable(address: str) -> None:
    """Fail in seconds where nobody listens; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        if address not in ("local", "auto"):
            raise InputError(f"`{address}` is no Ray address. Use local, auto, host:port or ray://host:port.")
        return
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise InputError(f"cannot reach Ray at `{address}`: {error}. Use `--ray-address local`, or start the cluster first.") from error


def _quieten(*, verbose: bool) -> None:
    """Keep Ray Data's own reports off the screen unless they were asked for."""
    import logging  # noqa: PLC0415  with ray

    import ray.data  # noqa: PLC0415  a second that `--help` need not pay

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    if not verbose:
        # Ray Data logs the traceback of every failing task; what failed is raised to the caller anyway.
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
