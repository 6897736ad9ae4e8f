"""Which Ray does the work, always by an explicit address: without one Ray joins whatever cluster it finds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.errors import ClusterError, InputError

# Shared memory for blocks in flight. Ray's default is a third of the machine.
_LOCAL_OBJECT_STORE_BYTES = 512 << 20
_REACH_S = 5.0
_ANSWER_S = 120.0
_START = (
    "Use `--ray-address local`, or start the cluster first; one that wants a token wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here, too."
)
_SAME = "Install the same version everywhere, or submit the command with `--ray-address http://host:8265`, which brings its code along."
# What a job that is submitted brings along.
PACKAGES = ("encoder", "pipelines", "jobs")


@contextmanager
def connected(address: str, *, verbose: bool = False, insecure: bool = False, wait_s: float | None = None) -> Iterator[None]:
    """Use the cluster at `address` (`local`, `auto` or `host:port`) until the block ends.

    `local` starts a private cluster and ends it; a cluster found running, or already connected to, is left alone. One
    that is not on loopback and lets everybody in is refused, unless `insecure`. Nodes are waited for up to `wait_s`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray starts its processes by fork and exec at once, which is what Lance does not know when it warns.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    import ray  # noqa: PLC0415  half a second that `--help` need not pay

    if ray.is_initialized():
        _set_limits()
        yield
        return
    _check_reachable(address, insecure=insecure)
    quiet = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    local = {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES} if address == "local" else {}
    # Ray answers SIGTERM with its own exit; whoever started this process has the say.
    ended = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **quiet, **local)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ended)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"cannot reach Ray at `{address}`: {error}. {_START}") from error
    try:
        _quieten(verbose=verbose)
        _set_limits()
        if address != "local":
            check_secure(ray.get_runtime_context().gcs_address, insecure=insecure)
            _check_code()
            _await_cpu(wait_s)
        yield
    finally:
        ray.shutdown()


@contextmanager
def natives_silenced() -> Iterator[None]:
    """Keep lines that C++ code writes to stderr itself off the screen while the block runs; Python's own stay.

    They go to a file that is removed at the end: where native code ends the process, its last words are left there.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    before = sys.stderr
    said, name = tempfile.mkstemp(prefix="catalog-embed-native-", suffix=".log")
    with os.fdopen(said, "wb") as file, os.fdopen(os.dup(kept), "w", buffering=1, errors="backslashreplace") as stream:
        os.dup2(file.fileno(), 2)
        sys.stderr = stream
        try:
            yield
        finally:
            sys.stderr = before
            os.dup2(kept, 2)
            os.close(kept)
            Path(name).unlink(missing_ok=True)


def check_secure(address: str, *, insecure: bool) -> None:
    """Refuse a cluster that everybody on its network may give work to: whoever can, runs code on all of its nodes."""
    host = host_of(address)
    if insecure or is_loopback(host) or os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return
    raise InputError(
        f"`{address}` is not on loopback, and RAY_AUTH_MODE is not `token`, so everybody who reaches it runs code there. Start the cluster "
        "with RAY_AUTH_MODE=token and set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) here too, or give --insecure-cluster."
    )


def host_of(address: str) -> str:
    """Return the host of an address, with or without a scheme and a port."""
    return urlsplit(address if "://" in address else f"//{address}").hostname or ""


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, seen from nowhere else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_reachable(address: str, *, insecure: bool) -> None:
    """Fail in seconds where nobody listens; Ray itself would wait for minutes."""
    if address.startswith("ray://"):
        raise InputError(
            f"`{address}` is an address of Ray Client, which the work of this pipeline does not go through. "
            "Give http://host:8265, which sends the whole command to the cluster, or host:port on one of its nodes."
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        if address not in ("local", "auto"):
            raise InputError(f"`{address}` is no Ray address. Use local, auto, host:port or http://host:8265.")
        return
    check_secure(address, insecure=insecure)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ClusterError(f"cannot reach Ray at `{address}`: {error}. {_START}") from error


def _set_limits() -> None:
    """Let a run wait for the cluster as long as it has to, and let no block fail in silence."""
    import ray.data  # noqa: PLC0415  a second that `--help` need not pay

    context = ray.data.DataContext.get_current()
    # Ray Data 2.60 gives up after half an hour without a block, which a part on a CPU or a wait for nodes may take.
    context.execution_no_progress_timeout_s = -1
    context.wait_for_min_actors_s = -1
    context.max_errored_blocks = 0


def _check_code() -> None:
    """Refuse nodes that run other code than this process: their vectors would be of another program.

    Ray itself refuses nodes and drivers of another Ray or Python.
    """
    import ray  # noqa: PLC0415  as above
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415  as above

    here = running_code()
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            on_it = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[ray.remote(running_code).options(num_cpus=0, max_retries=1, scheduling_strategy=on_it).remote()] = node[
                "NodeManagerHostname"
            ]
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    if late:
        raise ClusterError(f"the Ray node {asked[late[0]]} did not start a worker in {_ANSWER_S:g} s. Look at its log.")
    for reference in done:
        try:
            there = ray.get(reference)
        except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
            continue  # it went while it was asked
        except ray.exceptions.RayError as error:
            raise InputError(
                f"the Ray node {asked[reference]} cannot run catalog-embed: {str(error).splitlines()[-1][:200]}. {_SAME}"
            ) from error
        if there != here:
            raise InputError(f"the Ray node {asked[reference]} runs {there}, and this process {here}. {_SAME}")


def running_code() -> str:
    """Name the program that runs here: versions, and a hash over its modules."""
    import ray  # noqa: PLC0415  as above

    found = hashlib.sha256()
    for package in PACKAGES:
        folder = Path(__file__).parents[1] / package
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{path.relative_to(folder.parent)}\n".encode() + path.read_bytes())
    python = ".".join(map(str, sys.version_info[:2]))
    return f"catalog-embed {importlib.metadata.version('catalog-embed')} (code {found.hexdigest()[:12]}), Ray {ray.__version__}, Python {python}"


def _await_cpu(wait_s: float | None) -> None:
    """Wait until a task can run at all: the nodes of a cluster that grows by itself may all have gone."""
    from pipelines.capacity import Patience, Waiting, wait_for  # noqa: PLC0415  it loads ray

    def tell(told: Waiting) -> None:
        # Nothing is recorded yet, so no observer hears of it.
        logging.getLogger("catalog_embed").info("capacity.waiting", extra={"fields": told.facts})

    if wait_s is not None:
        wait_for(lambda: ({"CPU": 1.0}, True), Patience(limit_s=wait_s, tell=tell))


def _quieten(*, verbose: bool) -> None:
    """Keep Ray Data's own reports off the screen unless they were asked for."""
    import ray.data  # noqa: PLC0415  a second that `--help` need not pay

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    if not verbose:
        # Ray Data logs the traceback of every failing task; what failed is raised to the caller anyway.
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
