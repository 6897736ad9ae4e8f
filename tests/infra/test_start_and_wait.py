"""start-and-wait.sh against a stand-in for kubectl that answers as a cluster would; the script and its processes are real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.infra.manifests import KUBERAY

SCRIPT = KUBERAY / "base" / "start-and-wait.sh"
MANIFEST = KUBERAY / "base" / "nightly-rayjob.yaml"
JOB = "catalog-embed-nightly-29384756"
RUNNING = "Running|RUNNING||"
SUCCEEDED = "Complete|SUCCEEDED||Job finished successfully."

# Answers of `create` and `get` come one after the other, the last one for ever; `!text` is an error on stderr.
KUBECTL = """#!{python}
import json, os, pathlib, sys, yaml
here = pathlib.Path(__file__).parent.parent
words = sys.argv[1:]
with (here / "calls.jsonl").open("a") as log:
    log.write(json.dumps(words) + "\\n")
if "patch" in words:
    if os.environ.get("REAL_KUBECTL"):
        os.execv(os.environ["REAL_KUBECTL"], ["kubectl", *words])
    assert "--local" in words, "nothing may be patched in the cluster"
    data = yaml.safe_load(pathlib.Path(words[words.index("--filename") + 1]).read_text())
    data["metadata"].update(json.loads(words[words.index("--patch") + 1])["metadata"])
    print(yaml.safe_dump(data))
    raise SystemExit(0)
verb = "create" if "create" in words else "get"
if verb == "create":
    (here / "created.yaml").write_text(pathlib.Path(words[words.index("--filename") + 1]).read_text())
answers = json.loads((here / (verb + ".json")).read_text())
if len(answers) > 1:
    (here / (verb + ".json")).write_text(json.dumps(answers[1:]))
if answers[0].startswith("!"):
    sys.exit(answers[0][1:])
sys.stdout.write(answers[0])
"""


@dataclass(frozen=True, kw_only=True)
class Night:
    """A folder with a cluster's answers, and the script run against them."""

    folder: Path

    def answers(self, *, create: list[str], get: list[str]) -> None:
        (self.folder / "create.json").write_text(json.dumps(create))
        (self.folder / "get.json").write_text(json.dumps(get))

    def start(self, manifest: Path = MANIFEST, /, **environment: str) -> subprocess.Popen[str]:
        names = {"JOB_NAME": JOB, "JOB_UID": "u-1", "NAMESPACE": "shop", "POLL_S": "0.02", "MISSES": "4"} | environment
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(SCRIPT), str(manifest)],
            env={**os.environ, **names, "PATH": path, "TMPDIR": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, **environment: str) -> tuple[int, str]:
        process = self.start(**environment)
        out, errors = process.communicate(timeout=60)
        return process.returncode, out + errors

    def calls(self, verb: str) -> list[list[str]]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [words for words in map(json.loads, lines) if verb in words]

    @property
    def created(self) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = yaml.safe_load((self.folder / "created.yaml").read_text())
        return found


@pytest.fixture
def night(tmp_path: Path) -> Night:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL.format(python=sys.executable))
    program.chmod(0o755)
    return Night(folder=tmp_path)


def test_a_night_that_succeeds_exits_0_and_tells_each_state_once(night: Night) -> None:
    night.answers(create=[f"rayjob.ray.io/{JOB}-run\n"], get=["|||", "Initializing|||", RUNNING, RUNNING, RUNNING, SUCCEEDED])
    code, told = night.run()
    assert code == 0, told
    assert told.count("Running RUNNING") == 1
    assert all(words[:2] == ["--namespace", "shop"] for words in night.calls("create") + night.calls("get"))


@pytest.mark.parametrize("patched_by", ["stand-in", "kubectl"])
def test_the_rayjob_belongs_to_its_job_and_never_bears_its_name(night: Night, patched_by: str) -> None:
    real = shutil.which("kubectl") or ""
    if patched_by == "kubectl" and not real:
        pytest.skip("kubectl is not installed: its `patch --local` is not tried")
    night.answers(create=[f"rayjob.ray.io/{JOB}-run\n"], get=[SUCCEEDED])
    assert night.run(REAL_KUBECTL=real if patched_by == "kubectl" else "")[0] == 0
    created = night.created
    assert created["metadata"]["name"] == f"{JOB}-run", "KubeRay names the Job that submits like the RayJob"
    assert created["metadata"]["ownerReferences"] == [{"apiVersion": "batch/v1", "kind": "Job", "name": JOB, "uid": "u-1"}]
    assert created["spec"] == yaml.safe_load(MANIFEST.read_text())["spec"]


def test_a_night_that_fails_exits_1_and_tells_why(night: Night) -> None:
    message = (
        "Job entrypoint command failed with exit code 12, last available logs (truncated to 20,000 chars):\nguard completeness | 0.4\n"
    )
    night.answers(create=[f"rayjob.ray.io/{JOB}-run\n"], get=[RUNNING, f"Failed|FAILED|AppFailed|{message}"])
    code, told = night.run()
    assert code == 1
    assert "guard completeness | 0.4" in told
    assert "AppFailed" in told
    assert "ended with 12: see Exit codes in docs/operations.md" in told


@pytest.mark.parametrize(
    "end", ["Complete|STOPPED||stopped by somebody", "ValidationFailed||ValidationFailed|no such field", "Failed||DeadlineExceeded|late"]
)
def test_no_other_end_is_a_success(night: Night, end: str) -> None:
    night.answers(create=[f"rayjob.ray.io/{JOB}-run\n"], get=[end])
    code, told = night.run()
    assert code == 1
    assert end.rpartition("|")[2] in told


def test_a_refused_rayjob_exits_1_at_once(night: Night) -> None:
    night.answers(create=['!Error from server (Forbidden): rayjobs.ray.io is forbidden: User "x" cannot create'], get=[SUCCEEDED])
    code, told = night.run()
    assert code == 1
    assert "cannot create" in told
    assert len(night.calls("create")) == 1


def test_a_lost_answer_makes_no_second_rayjob(night: Night) -> None:
    there = f'!Error from server (AlreadyExists): rayjobs.ray.io "{JOB}-run" already exists'
    night.answers(create=["!Unable to connect to the server: EOF", there], get=[RUNNING, SUCCEEDED])
    code, told = night.run()
    assert code == 0, told
    assert "is there already" in told
    assert night.calls("get")[0][-4:-2] == ["rayjob", f"{JOB}-run"]


def test_without_a_job_the_name_is_made_up_and_nothing_is_tried_twice(night: Night) -> None:
    night.answers(create=["!Unable to connect to the server: EOF"], get=[SUCCEEDED])
    code, _ = night.run(JOB_NAME="", JOB_UID="")
    assert code == 75
    assert len(night.calls("create")) == 1
    assert "name" not in night.created["metadata"]
    assert night.created["metadata"]["generateName"] == "catalog-embed-nightly-"


def test_an_api_server_that_stumbles_costs_nothing(night: Night) -> None:
    away = "!Error from server (ServiceUnavailable): try later"
    night.answers(create=[f"rayjob.ray.io/{JOB}-run\n"], get=[RUNNING, away, away, away, RUNNING, away, away, away, SUCCEEDED])
    assert night.run()[0] == 0


def test_an_api_server_that_stays_away_is_left_to_the_next_pod(night: Night) -> None:
    night.answers(create=[f"rayjob.ray.io/{JOB}-run\n"], get=["!Unable to connect to the server: i/o timeout"])
    code, told = night.run()
    assert code == 75
    assert "(4 of 4)" in told


def test_a_deleted_rayjob_exits_1(night: Night) -> None:
    night.answers(create=[f"rayjob.ray.io/{JOB}-run\n"], get=[RUNNING, '!Error from server (NotFound): rayjobs.ray.io "x" not found'])
    code, told = night.run()
    assert code == 1
    assert "was deleted" in told


def test_a_stuck_night_is_waited_for_until_sigterm_which_ends_the_wait_and_not_the_rayjob(night: Night) -> None:
    night.answers(create=[f"rayjob.ray.io/{JOB}-run\n"], get=["Initializing|||"])
    process = night.start(POLL_S="60")
    try:
        deadline = time.monotonic() + 30
        while not (night.folder / "calls.jsonl").exists() or not night.calls("get"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143
    assert time.monotonic() - began < 5, "a pod has fifteen seconds"
    assert f"RayJob {JOB}-run goes on" in errors
    assert not [words for words in map(json.loads, (night.folder / "calls.jsonl").read_text().splitlines()) if "delete" in words]


def test_a_missing_manifest_is_a_wrong_usage(night: Night) -> None:
    process = night.start(night.folder / "none.yaml")
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 2
    assert "no manifest" in errors
