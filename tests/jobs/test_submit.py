"""The same command through Ray's Jobs API: what travels, what stays, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.config import Layer, Value
from jobs.submit import Command, _fill, entrypoint, variables
from tests.cluster import Loopback, free_port, loopback
from tests.jobs.commands import commands
from tests.shops import closing, make_shop, read_catalog, write_catalog

CANARY = "canary-4711"
NOW = ("--now", closing(0).isoformat())


def command_of(config: Path, layer: Layer, **changed: Any) -> Command:
    return Command(**{"name": "run", "project": "shop", "config": config, "layer": layer, **changed})


def written(**values: str) -> Layer:
    return {name.replace("__", "."): Value(raw="expanded", written=text, origin="the file") for name, text in values.items()}


def test_relative_places_become_those_of_this_machine_and_addresses_stay(tmp_path: Path) -> None:
    layer = written(source__path="catalog", tower__path="/towers/t1", publish__metrics="${METRICS}/m.prom")
    found = variables(command_of(tmp_path / "catalog-embed.yaml", layer))
    places = {name: json.loads(value) for name, value in found.items() if name.startswith("CATALOG_EMBED_")}
    assert places == {
        "CATALOG_EMBED_SOURCE__PATH": str(tmp_path / "catalog"),
        "CATALOG_EMBED_STORE__ROOT": str(tmp_path / "index"),
        "CATALOG_EMBED_TOWER__PATH": "/towers/t1",
    }
    assert not [name for name in variables(command_of(tmp_path / "c.yaml", written(store__root="s3://b/index"))) if "STORE" in name]


def test_settings_of_the_environment_travel_but_for_secrets(tmp_path: Path) -> None:
    layer = {
        "store.root": Value(raw="s3://b/x", written="s3://b/x", origin="environment CATALOG_EMBED_STORE__ROOT"),
        "publish.alias": Value(raw="test", written="test", origin="environment CATALOG_EMBED_PUBLISH__ALIAS"),
        "source.completeness": Value(
            raw={"max_age": "1h"}, written={"max_age": "1h"}, origin="environment CATALOG_EMBED_SOURCE__COMPLETENESS"
        ),
        "store.options": Value(raw={"secret": CANARY}, written={"secret": CANARY}, origin="environment CATALOG_EMBED_STORE__OPTIONS"),
    }
    found = variables(command_of(tmp_path / "c.yaml", layer))
    assert found["CATALOG_EMBED_STORE__ROOT"] == '"s3://b/x"'
    assert found["CATALOG_EMBED_PUBLISH__ALIAS"] == '"test"', "a run that was to publish elsewhere must not publish to prod"
    assert json.loads(found["CATALOG_EMBED_SOURCE__COMPLETENESS"]) == {"max_age": "1h"}
    assert CANARY not in str(found)


def test_a_configuration_with_a_secret_in_clear_is_not_copied_to_a_cluster(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make_shop(tmp_path / "shop", products=20, tower=False, store={"options": {"secret_access_key": CANARY}})
    refused = commands(capfd, config)("run", "--ray-address", "http://127.0.0.1:9")
    assert refused.code == 2
    assert "store.options" in refused.err
    assert "${NAME}" in refused.err
    assert CANARY not in refused.err


def test_arguments_reach_the_command_as_they_are() -> None:
    words = ["--where=brand = 'A & B' and price < 8; rm -rf $HOME", "--", "a b"]
    command = command_of(Path("c.yaml"), {}, name="backfill", arguments=words)
    shown = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    script = entrypoint(command).replace("python -m jobs.cli", shown)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    out = subprocess.run(["sh", "-c", script], check=False, capture_output=True, text=True, env={"PATH": path}).stdout
    result, code, _ = out.split("\n")
    assert json.loads(result.removeprefix("\x1e")) == ["-c", "catalog-embed.yaml", "backfill", *words]
    assert code == "\x1d0", "a job that was stopped as it ended tells its exit code nowhere else"
    nowhere = subprocess.run(["sh", "-c", entrypoint(command)], check=False, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert nowhere.returncode == 1
    assert "the python on the PATH of the Ray head has no ray" in nowhere.stderr


def test_code_version_and_files_travel_and_the_configuration_is_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_SECRET", CANARY)
    config = tmp_path / "shop.yaml"
    config.write_text("project: shop\nstore: { options: { secret: '${SHOP_SECRET}' } }\n")
    (tmp_path / "mine.txt").write_text("p1\n")
    folder = tmp_path / "job"
    folder.mkdir()
    _fill(folder, command_of(config, {}, files={"ids.txt": tmp_path / "mine.txt"}))
    assert "${SHOP_SECRET}" in (folder / "catalog-embed.yaml").read_text()
    assert (folder / "ids.txt").read_text() == "p1\n"
    assert (folder / "jobs" / "cli" / "__main__.py").exists()
    assert not list(folder.rglob("__pycache__"))
    assert CANARY.encode() not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Loopback]:
    with loopback(cpus=2, dashboard=True) as found:
        yield found


@pytest.fixture(scope="module")
def shop(cluster: Loopback, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, str, str]]:
    """A shop whose first night was run as a job."""
    config = make_shop(tmp_path_factory.mktemp("submitted") / "shop", products=80, gates={"samples": 16})
    return config, cluster.command(config, "run", "--ray-address", cluster.url, "--output", "json", *NOW, SHOP_SECRET=CANARY)


def test_a_job_does_what_the_command_does_and_its_result_is_all_of_stdout(shop: tuple[Path, tuple[int, str, str]]) -> None:
    config, (code, out, err) = shop
    assert code == 0, err[-3000:]
    assert json.loads(out)["outcome"] == "published"
    assert "job.submitted" in err
    assert "embed       done" in err
    assert (config.parent / "index" / "generations").is_dir()


def test_the_exit_code_of_the_job_is_that_of_the_command(shop: tuple[Path, Any], cluster: Loopback, tmp_path: Path) -> None:
    config = Path(shutil.copytree(shop[0].parent, tmp_path / "shop")) / shop[0].name
    address = ("--ray-address", cluster.url, *NOW)
    ids = tmp_path / "ids"
    ids.write_text("CE-00000001\nCE-00000002\n")
    code, out, err = cluster.command(config, "backfill", "--ids", f"@{ids}", "--dry-run", "--output", "json", *address)
    assert code == 0, err[-3000:]
    assert sum(json.loads(out)["actions"].values()) - json.loads(out)["actions"]["same"] == 2
    write_catalog(config, read_catalog(config).slice(0, 40))
    code, out, err = cluster.command(config, "plan", "--since", "beginning", "--detailed-exitcode", *address)
    assert code == 12, err[-3000:]
    assert "cut short" in out


def test_an_interrupt_stops_the_job_and_leaves_what_is_published(cluster: Loopback, tmp_path: Path) -> None:
    config = make_shop(tmp_path / "shop", products=2000, embed={"part_rows": 20})
    process = cluster.start_command(config, "run", "--ray-address", cluster.url, *NOW)
    assert process.stderr is not None
    seen = ""
    while "embed       started" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 14, err[-3000:]
    assert "job.stopping" in err
    assert not list((config.parent / "index").glob("log/*"))
    leases = [json.loads(path.read_text()) for path in (config.parent / "index" / "leases").rglob("*") if path.is_file()]
    assert leases
    assert all(lease["released"] for lease in leases)


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}, "RAY_AUTH_TOKEN"), ({"RAY_AUTH_TOKEN": "f" * 32}, "refuses the token")],
)
def test_without_the_token_nothing_is_submitted(cluster: Loopback, tmp_path: Path, environment: dict[str, Any], said: str) -> None:
    config = make_shop(tmp_path / "shop", products=5)
    code, _, err = cluster.command(config, "plan", "--ray-address", cluster.url, **environment)
    assert (code, said in err) == (2, True), err
    assert cluster.token not in err
    assert "f" * 32 not in err


def test_a_dashboard_that_is_not_there_is_said_in_seconds(cluster: Loopback, tmp_path: Path) -> None:
    config = make_shop(tmp_path / "shop", products=5)
    code, _, err = cluster.command(config, "plan", "--ray-address", f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert "cannot reach the Jobs API" in err


def test_places_of_this_machine_do_not_go_to_another(tmp_path: Path, cluster: Loopback) -> None:
    config = make_shop(tmp_path / "shop", products=5)
    code, _, err = cluster.command(config, "plan", "--out", tmp_path / "plan", "--ray-address", "http://head.example:8265")
    assert code == 2
    assert "is a place of this machine" in err
    code, _, err = cluster.command(config, "plan", "--ray-address", "http://head.example:8265", RAY_AUTH_MODE="disabled")
    assert code == 2
    assert "--insecure-cluster" in err
