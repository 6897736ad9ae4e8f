"""What is shipped for Prometheus, Grafana and the Prometheus operator holds together, by their own tools."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.metrics import METRICS, PREFIX, render_prometheus
from pipelines.summary import RunFacts, metrics_of
from pipelines.telemetry import StageTime

ROOT = Path(__file__).parent.parent.parent
HERE = ROOT / "infra" / "monitoring"
RULES, CASES = HERE / "prometheus-rules.yaml", HERE / "prometheus-rules.test.yaml"
DASHBOARD = HERE / "grafana-dashboard.json"
METRIC = re.compile(rf"\b{PREFIX}\w+")

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool on PATH: install Debian's prometheus")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on PATH")

NOON = datetime(2026, 11, 4, 12, tzinfo=UTC)
# A run that measured everything there is.
FACTS = RunFacts(
    run_id="r",
    command="run",
    alias="prod",
    outcome="published",
    exit_code=0,
    started_at=NOON,
    ended_at=NOON,
    stages=(StageTime(name="embed", seconds=60.0, rows=1000, tokens=90_000),),
    actual={"read": 5000, "embedded_texts": 1000, "reused": 10, "delete": 3, "halvings": 1},
    quarantined={"null_id": 2},
    retries={"embed": 1},
    guards={"deletes": True},
    gates={"churn": "warned"},
    recall={"faiss": 0.97},
    generation_bytes=10**9,
    orphan_bytes=10**6,
    alias_seq=7,
    lease_conflicts=1,
    actor_s=50.0,
    actor_wait_s=10.0,
    cost=0.1,
)


def promtool(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=120, cwd=cwd)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in load(RULES)["groups"] for rule in group["rules"]}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield every expression of the dashboard with its place, its variables filled in as Grafana does."""
    for panel in panels():
        for target in panel["targets"]:
            filled = target["expr"].replace("$project", "shop").replace("$alias", "prod").replace("$__range", "1h")
            assert "$" not in filled
            yield f"{panel['title']} {target['refId']}", filled


def cases_of(alert: str) -> list[dict[str, Any]]:
    return [case for test in load(CASES)["tests"] for case in test["alert_rule_test"] if case["alertname"] == alert]


@needs_promtool
def test_rules_and_scrape_jobs_are_valid(tmp_path: Path) -> None:
    for arguments in (("check", "rules", RULES), ("check", "config", HERE / "prometheus.yaml")):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_and_keep_silent_as_their_cases_say() -> None:
    done = promtool("test", "rules", CASES.name, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", sorted(alerts()))
def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not(alert: str) -> None:
    assert {bool(case["exp_alerts"]) for case in cases_of(alert)} == {True, False}


@needs_promtool
@pytest.mark.parametrize("broken", ["vector(1)", "vector(0) > 1"])
def test_cases_notice_every_alert_that_fires_always_or_never(tmp_path: Path, broken: str) -> None:
    """One run for all alerts: each has to be among what failed."""
    rules = load(RULES)
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = broken
            rule.pop("for", None)
    (tmp_path / RULES.name).write_text(yaml.safe_dump(rules))
    shutil.copy(CASES, tmp_path)
    done = promtool("test", "rules", CASES.name, cwd=tmp_path)
    assert done.returncode != 0
    assert set(re.findall(r"alertname: ?(\w+)", done.stdout + done.stderr)) == set(alerts())


@pytest.mark.parametrize("alert", sorted(alerts()))
def test_every_alert_says_what_is_wrong_and_where_to_read_on(alert: str) -> None:
    rule = alerts()[alert]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    place, anchor = rule["annotations"]["runbook_url"].split("#")
    # As GitHub makes anchors of headings.
    headings = re.findall(r"^#+ (.+)$", (ROOT / place).read_text(), re.MULTILINE)
    assert anchor == alert.lower()
    assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_alerts_and_panels_ask_for_metrics_and_labels_that_a_run_leaves() -> None:
    texts = [*(rule["expr"] for rule in alerts().values()), *(text for _, text in expressions())]
    for text in texts:
        for name in METRIC.findall(text):
            assert name.removeprefix(PREFIX) in METRICS, text
        for name, matchers in re.findall(rf"{PREFIX}(\w+)\{{([^}}]*)\}}", text):
            asked = set(re.findall(r"(\w+)\s*[=!]~?", matchers))
            assert asked <= {*METRICS[name].labels, "project", "alias"}, text


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name.removeprefix(PREFIX) for _, text in expressions() for name in METRIC.findall(text)}
    assert shown == set(METRICS)


@needs_promtool
def test_every_panel_shows_something_of_a_run_that_measured_everything(tmp_path: Path) -> None:
    measured = metrics_of(FACTS)
    assert {name for name, _ in measured} == set(METRICS)
    samples = [line for line in render_prometheus(measured, labels={"project": "shop", "alias": "prod"}).splitlines() if line[0] != "#"]
    places = {f"Panel{number}": found for number, found in enumerate(expressions())}
    rules = [{"alert": name, "expr": f"count({text}) > 0"} for name, (_, text) in places.items()]
    series = [{"series": left, "values": f"{value}+0x20"} for left, _, value in (line.rpartition(" ") for line in samples)]

    def missed(alias: str) -> set[str]:
        given = [{**item, "series": item["series"].replace('"prod"', f'"{alias}"')} for item in series]
        tests = [{"alertname": name, "eval_time": "10m", "exp_alerts": [{"exp_labels": {}}]} for name in places]
        case = {"rule_files": ["rules.yaml"], "tests": [{"interval": "1m", "input_series": given, "alert_rule_test": tests}]}
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
        (tmp_path / "case.yaml").write_text(yaml.safe_dump(case))
        done = promtool("test", "rules", "case.yaml", cwd=tmp_path)
        found = set(re.findall(r"alertname: ?(\w+)", done.stdout + done.stderr))
        assert (done.returncode == 0) == (not found), done.stdout + done.stderr
        return found

    assert {places[name][0] for name in missed("prod")} == set()
    # Another alias is another dashboard: so the test can fail, and no panel mixes the two.
    assert missed("staging") == set(places)


@needs_promtool
def test_alerts_are_silent_after_a_good_night(tmp_path: Path) -> None:
    now = replace(FACTS, started_at=datetime.fromtimestamp(0, UTC), ended_at=datetime.fromtimestamp(0, UTC), orphan_bytes=0)
    values = {key: value for key, value in metrics_of(now).items() if key[0] != "rows_quarantined"}
    samples = [line for line in render_prometheus(values, labels={"project": "shop", "alias": "prod"}).splitlines() if line[0] != "#"]
    series = [{"series": left, "values": f"{value}+0x1440"} for left, _, value in (line.rpartition(" ") for line in samples)]
    tests = [{"alertname": name, "eval_time": "24h", "exp_alerts": []} for name in alerts()]
    case = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "5m",
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": tests}],
    }
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(case))
    done = promtool("test", "rules", tmp_path / "case.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_every_expression_of_the_dashboard_parses(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": text} for number, (_, text) in enumerate(expressions())]
    assert len(rules) > 20
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", tmp_path / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_can_be_imported_anywhere() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"] == "catalog-embed"
    assert "id" not in board
    variables = {item["name"]: item for item in board["templating"]["list"]}
    assert list(variables) == ["datasource", "project", "alias"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    sources = [item["datasource"] for item in (variables["project"], variables["alias"])]
    sources += [item["datasource"] for panel in panels() for item in (panel, *panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    for name in ("project", "alias"):
        asked = METRIC.findall(variables[name]["definition"])
        assert [item.removeprefix(PREFIX) for item in asked] == ["last_run_timestamp_seconds"]


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@needs_kubectl
def test_kustomization_gives_the_monitors_and_the_dashboard_whole() -> None:
    done = subprocess.run(["kubectl", "kustomize", HERE], capture_output=True, text=True, check=True, timeout=60)
    objects = list(yaml.safe_load_all(done.stdout))
    assert sorted((item["kind"], item["metadata"]["name"]) for item in objects) == [
        ("ConfigMap", "catalog-embed-dashboard"),
        ("PodMonitor", "catalog-embed-ray-head"),
        ("PodMonitor", "catalog-embed-ray-workers"),
    ]
    board = next(item for item in objects if item["kind"] == "ConfigMap")
    assert board["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert board["data"] == {"catalog-embed.json": DASHBOARD.read_text()}


def test_monitors_select_every_pod_of_kuberay_by_its_kind_and_port() -> None:
    monitors = list(yaml.safe_load_all((HERE / "pod-monitor.yaml").read_text()))
    ports = {
        monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"]: [point["port"] for point in monitor["spec"]["podMetricsEndpoints"]]
        for monitor in monitors
    }
    assert ports == {"head": ["metrics", "as-metrics", "dash-metrics"], "worker": ["metrics"]}
    for monitor in monitors:
        assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
        for point in monitor["spec"]["podMetricsEndpoints"]:
            assert [item["targetLabel"] for item in point["relabelings"]] == ["ray_io_cluster"]


def test_command_of_the_readme_wraps_the_rules_for_the_operator() -> None:
    blocks = re.findall(r"```sh\n(.+?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert "kubectl apply -f -" in blocks[0]
    done = subprocess.run(
        ["sh", "-c", blocks[0].replace("kubectl apply -f -", "cat")], capture_output=True, text=True, check=True, cwd=HERE
    )
    made = yaml.safe_load(done.stdout)
    assert (made["apiVersion"], made["kind"], made["spec"]) == ("monitoring.coreos.com/v1", "PrometheusRule", load(RULES))


def test_readme_lists_every_file() -> None:
    listed = set(re.findall(r"^\| `(\S+)` \|", (HERE / "README.md").read_text(), re.MULTILINE))
    assert listed | {"README.md"} == {path.name for path in HERE.iterdir()}
