"""Pushed metrics, against the real gateway on loopback, and against servers that misbehave."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.pushing import JOB, Gateway, GatewayError, check_address, open_gateway, push_run, push_values
from jobs.records import note_metrics, open_record
from jobs.settings import Settings, load
from pipelines.errors import InputError, StoreError
from pipelines.metrics import Key, parse_prometheus, read_textfile
from pipelines.telemetry import Event
from tests.shops import configure, make_shop

LABELS = {"project": "shop", "alias": "prod"}
HOSTILE = 'a/b "c"\n..\\ \u00fc'
SECRET = "hunter2-canary"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def gateway_address() -> Iterator[str]:
    binary = shutil.which("prometheus-pushgateway") or shutil.which("pushgateway")
    if binary is None:
        pytest.skip("no pushgateway on PATH: install Debian's prometheus-pushgateway")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([binary, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "the gateway ended"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def gateway(gateway_address: str, request: pytest.FixtureRequest) -> Gateway:
    """A group of its own for every test."""
    return Gateway(address=gateway_address, labels={**LABELS, "project": request.node.name})


@contextmanager
def server(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[str]]]:
    """Serve whatever `answer` does, and note what was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline()
            if self.parse_request():
                asked.append(f"{self.command} {self.path} {self.headers.get('Authorization', '-')}")
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer(self)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving.daemon_threads = True
    thread = threading.Thread(target=serving.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{serving.server_port}", asked
    finally:
        serving.shutdown()
        thread.join()
        serving.server_close()


def status(code: int, body: bytes = b"", **headers: str) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def key(name: str, *labels: str) -> Key:
    return name, labels


def held(gateway: Gateway) -> dict[Key, float]:
    """Read what the gateway shows of a group, as Prometheus would scrape it."""
    with urllib.request.urlopen(f"{gateway.address}/metrics") as response:  # noqa: S310  loopback
        return parse_prometheus(response.read().decode(), labels={**gateway.labels, "job": JOB, "instance": ""})


def test_failed_night_keeps_what_lasts_adds_what_counts_and_drops_the_gates_of_the_night_before(gateway: Gateway) -> None:
    first = {
        key("last_success_timestamp_seconds"): 1_762_222_395.25,
        key("run_exit_code"): 0.0,
        key("gate_result", "churn"): 0.0,
        key("rows_quarantined", HOSTILE): 3.0,
        key("runs_total", "published"): 1.0,
    }
    push_run(gateway, first)
    assert held(gateway).items() >= {name: value for name, value in first.items() if name[1] != (HOSTILE,)}.items()
    push_run(gateway, {key("run_exit_code"): 1.0, key("runs_total", "failed"): 1.0})
    push_run(gateway, {key("run_exit_code"): 1.0, key("runs_total", "failed"): 1.0})
    assert held(gateway) == {
        key("last_success_timestamp_seconds"): 1_762_222_395.25,
        key("run_exit_code"): 1.0,
        key("runs_total", "published"): 1.0,
        key("runs_total", "failed"): 2.0,
    }


def test_single_metric_is_set_and_the_others_stay(gateway: Gateway) -> None:
    push_run(gateway, {key("run_exit_code"): 0.0, key("orphan_bytes"): 5.0})
    push_values(gateway, {key("orphan_bytes"): 7.0})
    assert held(gateway) == {key("run_exit_code"): 0.0, key("orphan_bytes"): 7.0}


@pytest.mark.parametrize("odd", [HOSTILE, "a/b", "..", "", "x" * 300, "http://other:1/metrics"])
def test_group_of_an_odd_name_is_found_again_and_is_one(gateway: Gateway, odd: str) -> None:
    group = Gateway(address=gateway.address, labels={"project": odd, "alias": gateway.labels["project"]})
    for total in (1.0, 2.0):
        push_run(group, {key("runs_total", "built"): 1.0})
        assert held(group) == {key("runs_total", "built"): total}


def test_groups_of_two_projects_do_not_mix(gateway: Gateway) -> None:
    other = Gateway(address=gateway.address, labels={**gateway.labels, "alias": "staging"})
    push_run(gateway, {key("runs_total", "built"): 1.0})
    push_run(other, {key("runs_total", "failed"): 1.0})
    assert held(gateway) == {key("runs_total", "built"): 1.0}
    assert held(other) == {key("runs_total", "failed"): 1.0}


def test_run_is_no_part_of_the_group_so_the_gateway_does_not_grow(gateway: Gateway) -> None:
    for _ in range(3):
        push_run(gateway, {key("run_exit_code"): 0.0})
    with urllib.request.urlopen(f"{gateway.address}/api/v1/metrics") as response:  # noqa: S310  loopback
        groups = [group["labels"] for group in json.load(response)["data"]]
    assert groups.count({"job": JOB, "instance": "", **gateway.labels}) + groups.count({"job": JOB, **gateway.labels}) == 1


def test_refused_metrics_are_explained(gateway: Gateway) -> None:
    odd = Gateway(address=gateway.address, labels={"0bad": "x"})
    with pytest.raises(GatewayError, match=r"PUT http://127\.0\.0\.1:\d+ failed: status 400: .*0bad.* run is not touched"):
        push_run(odd, {key("run_exit_code"): 0.0})


def test_server_that_fails_or_is_not_there_is_one_error_and_nothing_is_pushed() -> None:
    with server(status(500, b"stack trace")) as (address, asked):
        with pytest.raises(GatewayError, match=r"GET http://127\.0\.0\.1:\d+ failed: status 500\. "):
            push_run(Gateway(address=address, labels=LABELS), {key("run_exit_code"): 1.0})
        # What the group held is not known, so it is not replaced.
        assert [line.split()[0] for line in asked] == ["GET"]
    with pytest.raises(GatewayError, match="Connection refused"):
        push_values(Gateway(address=address, labels=LABELS), {key("orphan_bytes"): 1.0})


@pytest.mark.parametrize("drip", [False, True])
def test_server_that_hangs_or_drips_is_given_up(*, drip: bool) -> None:
    over = threading.Event()

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not over.wait(0.1):
            if drip:
                try:
                    handler.wfile.write(b"#\n")
                except OSError:
                    return

    with server(answer) as (address, _):
        began = time.monotonic()
        with pytest.raises(GatewayError, match=r"timed out|no answer within 1 s"):
            push_run(Gateway(address=address, labels=LABELS, timeout_s=0.5), {key("run_exit_code"): 1.0})
        assert time.monotonic() - began < 3
        over.set()


def test_redirect_is_not_followed_and_gets_no_credentials() -> None:
    with server(status(200)) as (other, asked_there), server(status(302, Location=f"{other}/metrics")) as (address, asked):
        with pytest.raises(GatewayError, match="status 302"):
            push_run(Gateway(address=address, labels=LABELS, user="u", password=SECRET), {key("run_exit_code"): 1.0})
        assert len(asked) == 1
        assert asked_there == []


def test_credentials_of_the_environment_are_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALOG_EMBED_PUSHGATEWAY_USER", "pusher")
    monkeypatch.setenv("CATALOG_EMBED_PUSHGATEWAY_PASSWORD", SECRET)
    with server(status(200)) as (address, asked):
        push_run(open_gateway(address, LABELS), {key("run_exit_code"): 1.0})
    assert [line.split()[2:] for line in asked] == [["Basic", "cHVzaGVyOmh1bnRlcjItY2FuYXJ5"]] * 2
    assert SECRET not in repr(open_gateway(address, LABELS))

    def echo(handler: http.server.BaseHTTPRequestHandler) -> None:
        status(400, f"you sent {handler.headers['Authorization']}".encode())(handler)

    with server(echo) as (address, _), pytest.raises(GatewayError, match="status 400") as failed:
        push_run(open_gateway(address, LABELS), {key("run_exit_code"): 1.0})
    assert "cHVzaGVy" not in str(failed.value)
    monkeypatch.delenv("CATALOG_EMBED_PUSHGATEWAY_USER")
    with pytest.raises(InputError, match="set both CATALOG_EMBED_PUSHGATEWAY_USER and") as alone:
        open_gateway(address, LABELS)
    assert SECRET not in str(alone.value)


@pytest.mark.parametrize(
    "address",
    [
        f"http://pusher:{SECRET}@gateway:9091",
        f"https://gateway/?token={SECRET}",
        f"http://gateway#{SECRET}",
        "file:///etc/passwd",
        "ftp://gateway",
        "gateway:9091",
        "http://",
        "http://gateway:port",
        "http://gate way",
        "http://gateway\n:9091",
        "http://[::1",
        "",
    ],
)
def test_address_that_is_none_or_holds_credentials_is_refused_when_the_configuration_is_read(tmp_path: Path, address: str) -> None:
    config = make_shop(tmp_path, tower=False, publish={"pushgateway": address})
    with pytest.raises(InputError, match="pushgateway") as refused:
        load(config)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("address", ["http://gateway:9091", "https://ops.example.com/push/", "http://[::1]:9091"])
def test_plain_addresses_are_taken(address: str) -> None:
    assert check_address(address) == address


@pytest.fixture
def shop(tmp_path: Path, gateway: Gateway) -> Settings:
    config = make_shop(tmp_path, tower=False, publish={"pushgateway": gateway.address, "metrics": "shop.prom"})
    return load(config)


def group_of(settings: Settings) -> Gateway:
    assert settings.publish.pushgateway is not None
    return Gateway(address=settings.publish.pushgateway, labels={"project": settings.project.project, "alias": settings.publish.alias})


def test_run_leaves_the_same_metrics_in_the_textfile_and_at_the_gateway(shop: Settings) -> None:
    for _ in range(2):
        with pytest.raises(StoreError), open_record(shop, command="run"):
            raise StoreError("the disk is full")
    note_metrics(shop, {key("orphan_bytes"): 12.0})
    group = group_of(shop)
    assert shop.publish.metrics is not None
    left = read_textfile(Path(shop.publish.metrics), labels=group.labels)
    assert left[key("run_exit_code")] == 1.0
    assert left[key("runs_total", "failed")] == 2.0
    assert left[key("orphan_bytes")] == 12.0
    assert held(group) == left


class Heard:
    """Keeps the names of warnings."""

    def __init__(self) -> None:
        self.warnings: dict[str, str] = {}

    def on_event(self, event: Event) -> None:
        if event.level == "warning":
            self.warnings[event.name] = str(event.fields)

    def on_progress(self, progress: object) -> None:
        pass


def test_gateway_that_is_down_is_a_warning_and_the_rest_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with server(status(500)) as (address, _):
        settings = load(make_shop(tmp_path, tower=False, publish={"pushgateway": address, "metrics": "shop.prom"}))
        heard = Heard()
        with open_record(settings, command="run", listeners=[heard]) as record:
            pass
        assert heard.warnings.keys() == {"metrics.unpushed"}
        assert "status 500" in heard.warnings["metrics.unpushed"]
        assert record.store.get(f"runs/{record.run_id}/state.json")
        note_metrics(settings, {key("orphan_bytes"): 12.0})
        assert "metrics.unpushed" in caplog.text
    assert (tmp_path / "shop.prom").read_text().count("orphan_bytes") == 3


def test_store_that_takes_no_record_still_leaves_the_metrics_that_tell_of_it(shop: Settings) -> None:
    heard = Heard()
    with open_record(shop, command="run", listeners=[heard]) as record:
        # A file stands where the folder of runs should be.
        Path(shop.store.root).mkdir(parents=True, exist_ok=True)
        (Path(shop.store.root) / "runs").write_text("")
    assert heard.warnings.keys() == {"record.unwritten"}
    assert held(group_of(shop))[key("run_exit_code")] == record.facts.exit_code


def test_textfile_that_cannot_be_written_hinders_no_push(shop: Settings, tmp_path: Path) -> None:
    configure(tmp_path / "catalog-embed.yaml", publish={"metrics": "absent/shop.prom"})
    settings = load(tmp_path / "catalog-embed.yaml")
    heard = Heard()
    before = held(group_of(settings)).get(key("runs_total", "failed"), 0.0)
    with open_record(settings, command="run", listeners=[heard]):
        pass
    assert heard.warnings.keys() == {"metrics.unwritten"}
    assert held(group_of(settings))[key("runs_total", "failed")] == before + 1
