from __future__ import annotations

import socket
import time

import pytest

from jobs.cluster import _check_reachable, connected
from pipelines.errors import InputError


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_where_nobody_listens_fails_in_seconds(address: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InputError, match="--ray-address local"):
        _check_reachable(address)
    assert time.monotonic() - begin < 6


@pytest.mark.parametrize("address", ["", "localhost", "ray://host", "host:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="is no Ray address"):
        _check_reachable(address)


def test_an_address_where_somebody_listens_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        _check_reachable(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_that_is_connected_already_is_used_and_left_running() -> None:
    import ray

    with connected("local"):
        pass
    assert ray.is_initialized()
