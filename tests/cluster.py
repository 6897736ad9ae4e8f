"""A Ray cluster on loopback whose nodes are processes of their own, with token authentication; ended by their own handles."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).parents[1]
_STORE_BYTES = 100 << 20
# A node that is gone is noticed in some five seconds instead of fifteen; one that is only slow must not be taken for dead.
_FAST_DEATH = {"health_check_initial_delay_ms": 3000, "health_check_period_ms": 1000, "health_check_timeout_ms": 10000}
_READY_S = 60.0


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Node:
    """One `ray start --block`, the first of its process group, and everything that it started."""

    process: subprocess.Popen[bytes]

    def family(self) -> list[psutil.Process]:
        """Return the node's processes, grandchildren included."""
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def kill(self) -> None:
        """End the node at once, as the loss of its machine would."""
        family = self.family()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=30)
        psutil.wait_procs(family, timeout=10)


@dataclass
class Loopback:
    """A cluster that grows and shrinks by hand."""

    folder: Path
    port: int
    dashboard: int | None
    token: str
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        assert self.dashboard is not None
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def environment(self) -> dict[str, str]:
        """What every process of the cluster, and every driver, has to be started with."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CATALOG_EMBED_"))}
        fast = {f"RAY_{name}": str(value) for name, value in _FAST_DEATH.items()}
        return (
            mine
            | fast
            | {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": self.token,
                "RAY_USAGE_STATS_ENABLED": "0",
                "LANCE_LOG": "error",
                "PYTHONPATH": str(ROOT),
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            }
        )

    def start(self, *, cpus: float, head: bool = False, resources: Mapping[str, float] | None = None, **environment: str) -> Node:
        """Start a node, and return when it has joined."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", "127.0.0.1"]
        command += [f"--num-cpus={cpus:g}", "--num-gpus=0", f"--resources={json.dumps(dict(resources or {}))}"]
        command += [f"--object-store-memory={_STORE_BYTES}", "--disable-usage-stats"]
        # Ray's own choice for these is the same in every cluster of a machine.
        for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port"):
            command.append(f"--{name}={free_port()}")
        if head:
            command += [
                "--head",
                f"--port={self.port}",
                f"--ray-client-server-port={free_port()}",
                f"--temp-dir={self.folder}",
                f"--include-dashboard={self.dashboard is not None}",
            ]
            command += [f"--dashboard-port={self.dashboard}"] if self.dashboard is not None else []
        else:
            command += [f"--address={self.address}"]
        log = (self.folder.with_name(f"{self.folder.name}-{len(self.nodes)}.log")).open("wb")
        with log:
            process = subprocess.Popen(command, env=self.environment | environment, stdout=log, stderr=log, start_new_session=True)
        node = Node(process)
        self.nodes.append(node)
        self._ready(node, head=head, log=Path(log.name))
        return node

    def _ready(self, node: Node, *, head: bool, log: Path) -> None:
        deadline = time.monotonic() + _READY_S
        while b"Ray runtime started" not in log.read_bytes():
            assert node.process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        while head and self.dashboard is not None:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.dashboard), timeout=1).close()
                return
            assert time.monotonic() < deadline, "the dashboard did not start"
            time.sleep(0.1)

    def remove(self, node: Node) -> None:
        """Kill a node."""
        node.kill()
        self.nodes.remove(node)

    def start_command(self, config: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Start a command of catalog-embed as a driver of this cluster."""
        command = [sys.executable, "-m", "jobs.cli", "-c", str(config), *map(str, arguments)]
        own = self.environment | environment
        return subprocess.Popen(command, cwd=config.parent, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start_python(self, code: str, *arguments: object, stderr: IO[str]) -> subprocess.Popen[str]:
        """Start a driver of the cluster."""
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def command(self, config: Path, *arguments: object, timeout: float = 120, **environment: str) -> tuple[int, str, str]:
        """Run a command of catalog-embed to its end; return its exit code, stdout and stderr."""
        process = self.start_command(config, *arguments, **environment)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, out, err


@contextmanager
def loopback(*, cpus: float = 0, dashboard: bool = False) -> Iterator[Loopback]:
    """Start a head, and end it with all nodes that joined it."""
    # Sockets of Ray are below this folder, and the name of a socket is at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ce-", dir="/tmp"))
    cluster = Loopback(folder=folder / "r", port=free_port(), dashboard=free_port() if dashboard else None, token=secrets.token_hex(16))
    try:
        cluster.start(cpus=cpus, head=True)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


def facts_of(out: str) -> Any:
    """Return what a command printed with --output json."""
    return json.loads(out)
