"""A real PostgreSQL for the session: made in a temporary folder, on a free loopback port, stopped by its own handle."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_MISSING = "PostgreSQL is not installed: apt-get install postgresql"
PASSWORD = "canary-pa55word"


def _binaries() -> Path | None:
    """Return the folder of the newest installed server."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    on_path = shutil.which("initdb")
    folders = [*reversed(debian), *([Path(on_path).parent] if on_path else [])]
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


def _identity() -> dict[str, Any]:
    """Return how to start a process that is not root, which the server refuses to be."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL refuses to run as root, and there is no user `postgres` or `nobody`")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(uri: str, server: subprocess.Popen[bytes], log: Path) -> None:
    from adbc_driver_manager import Error
    from adbc_driver_postgresql import dbapi

    for _ in range(200):
        try:
            dbapi.connect(uri).close()
        except Error:
            if server.poll() is not None:
                break
            time.sleep(0.05)
        else:
            return
    pytest.fail(f"PostgreSQL did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Return the URI of a running server, with a password in it that must show nowhere."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip(_MISSING)
    identity = _identity()
    # Not pytest's tmp_path: its parents are closed to other users.
    home = Path(tempfile.mkdtemp(prefix="catalog-pg-"))
    home.chmod(0o755)
    data, log, secret = home / "data", home / "log", home / "secret"
    data.mkdir()
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    if identity:
        os.chown(data, identity["user"], identity["group"])
    initdb: list[str | Path] = [
        binaries / "initdb",
        "-D",
        data,
        "-A",
        "scram-sha-256",
        "-U",
        "shop",
        "--pwfile",
        secret,
        "-E",
        "UTF8",
        "--locale=C",
        "--no-sync",
    ]
    subprocess.run(initdb, check=True, capture_output=True, cwd=home, **identity)
    port = _free_port()
    with log.open("wb") as sink:
        command: list[str | Path] = [binaries / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", data, "-F"]
        server: subprocess.Popen[bytes] = subprocess.Popen(command, stdout=sink, stderr=sink, cwd=home, **identity)
    uri = f"postgresql://shop:{PASSWORD}@127.0.0.1:{port}/postgres"
    try:
        _wait(uri, server, log)
        yield uri
    finally:
        # SIGINT is PostgreSQL's fast shutdown; SIGTERM would wait for open connections.
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        shutil.rmtree(home)
