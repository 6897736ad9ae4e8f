"""Fixtures that more than one test module needs: an S3 server on loopback, and one quiet local Ray."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Set before anything imports boto3, obstore or ray: tests never speak to a real cloud, and Ray reports nothing.
os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true")
os.environ.update(RAY_USAGE_STATS_ENABLED="0", LANCE_LOG="error")


@dataclass(frozen=True)
class S3Server:
    """An S3-compatible server on loopback."""

    endpoint: str

    @property
    def options(self) -> dict[str, str]:
        """Storage options in the spelling that the configuration uses."""
        return {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
            "allow_http": "true",
        }

    def client(self) -> Any:
        """Return a boto3 client, the independent witness of what was written."""
        import boto3

        return boto3.client("s3", endpoint_url=self.endpoint)

    def bucket(self) -> str:
        """Create a fresh bucket and return its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One moto server for the whole session; every test takes its own bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}")
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One quiet local Ray for the whole session: starting one costs seconds."""
    from jobs.cluster import connected

    with connected("local"):
        yield


@pytest.fixture(scope="session")
def two_nights(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a shop whose second generation is live, for tests that only look: copy it to change it."""
    from tests.jobs.commands import make_two_nights

    return make_two_nights(tmp_path_factory.mktemp("two-nights"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: other numbers of them add in another order, and tiny matrices gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
