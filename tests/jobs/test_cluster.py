from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from jobs.cluster import _check_reachable, check_secure, connected
from jobs.sections import Cluster, Embedding
from pipelines.errors import ClusterError, InputError


def test_an_address_where_nobody_listens_fails_in_seconds() -> None:
    begin = time.monotonic()
    with pytest.raises(ClusterError, match="--ray-address local"):
        _check_reachable("127.0.0.1:1", insecure=False)
    assert time.monotonic() - begin < 6


@pytest.mark.parametrize("address", ["", "localhost", "host:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="is no Ray address"):
        _check_reachable(address, insecure=False)


def test_ray_client_is_refused_with_the_address_to_use_instead() -> None:
    with pytest.raises(InputError, match="http://host:8265"):
        _check_reachable("ray://127.0.0.1:10001", insecure=False)


@pytest.mark.parametrize(
    "address", ["10.1.2.3:6379", "head.example:6379", "[2001:db8::1]:6379", "http://head.example:8265", "127.0.0.1.example:6379"]
)
def test_a_cluster_on_a_network_is_refused_without_a_token_or_a_word(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(InputError, match=r"RAY_AUTH_MODE=token .* --insecure-cluster"):
        check_secure(address, insecure=False)
    check_secure(address, insecure=True)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match="everybody who reaches it runs code there"):
        check_secure(address, insecure=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_secure(address, insecure=False)


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "127.8.8.8:1", "localhost:6379", "[::1]:6379", "https://localhost:8265"])
def test_loopback_needs_no_token(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check_secure(address, insecure=False)


def test_only_a_cluster_that_may_grow_is_waited_for() -> None:
    assert Cluster().wait_s is None
    assert Cluster(address="auto").wait_s == 12 * 3600
    assert Cluster(address="auto", wait=timedelta(0)).wait_s is None


@pytest.mark.parametrize("resources", [{"CPU": 1.0}, {"GPU": 1.0}, {"embedder": 0.0}, {"embedder": -1.0}, {"embedder": float("inf")}])
def test_resources_that_are_none_of_a_node_are_refused(resources: dict[str, float]) -> None:
    with pytest.raises(InputError, match="embedder: 1"):
        Embedding(resources=resources)


def test_an_address_where_somebody_listens_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        _check_reachable(f"127.0.0.1:{server.getsockname()[1]}", insecure=False)


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_is_connected_already_is_used_and_left_running() -> None:
    import ray

    with connected("local"):
        pass
    assert ray.is_initialized()


@pytest.mark.usefixtures("ray_cluster")
def test_no_limit_of_ray_data_ends_a_run_that_waits_and_no_block_fails_in_silence() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    assert (context.execution_no_progress_timeout_s, context.wait_for_min_actors_s, context.max_errored_blocks) == (-1, -1, 0)


@pytest.mark.parametrize("end", ["", "os._exit(2)"])
def test_native_lines_stay_off_the_screen_and_are_left_where_native_code_ends_the_process(tmp_path: Path, end: str) -> None:
    program = (
        "import os, sys\n"
        "from jobs.cluster import natives_silenced\n"
        "with natives_silenced():\n"
        "    os.write(2, b'last words of a library\\n')\n"
        "    print('ours', file=sys.stderr)\n"
        f"    {end or 'pass'}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.stderr == "ours\n"
    assert [path.read_text() for path in tmp_path.glob("catalog-embed-native-*.log")] == (["last words of a library\n"] if end else [])
