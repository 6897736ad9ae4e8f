"""`schedule`: what it writes says what the project says, runs as it is quoted, and never takes the place of another's file."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import jobs.schedule
from jobs.cli import cli
from jobs.config import read_file
from jobs.schedule import RECORD, Emitted, Schedule, check_cron, emit, write
from jobs.settings import load
from pipelines.errors import InputError
from pipelines.pool import PoolOptions, pool
from tests.jobs.commands import commands

ROOT = Path(__file__).parents[2]
BASE = ROOT / "infra" / "kuberay" / "base"
HOSTILE = 'it\'s 50% "$(touch owned)" `id` ;# ü\u202e\n\\'
# A path can hold all of that but what no line of text can show.
HOSTILE_FOLDER = 'it\'s 50% "$(touch owned)" `id` ;& %% ü\\%\\'
CODES = (0, 1, 2, 10, 11, 12, 13, 14)

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on PATH, so nothing renders the overlay")


def configure(folder: Path, **changes: Any) -> Path:
    """Write a configuration whose places are addresses, with changes of whole sections."""
    data = read_file(BASE / "catalog-embed.yaml") | {"timezone": "America/St_Johns"} | changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "catalog-embed.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    return path


def made(config: Path, to: Any, **options: Any) -> Emitted:
    return emit(load(config, target=options.get("target")), Schedule(to=to, config=config, **options))


def the_file(emitted: Emitted) -> str:
    (data,) = emitted.files.values()
    return data.decode()


def parsed(command: list[str]) -> click.Context:
    """Let the real command line parse a command, without carrying it out."""
    assert Path(command[0]).name == "catalog-embed"
    front = cli.make_context("catalog-embed", command[1:])
    name, found, rest = cli.resolve_command(front, [*front._protected_args, *front.args])
    assert found is not None
    return found.make_context(name, rest, parent=front)


def constants(text: str) -> dict[str, Any]:
    """Read the constants at the top of a Python file without running it."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


def line_of(text: str) -> tuple[str, str]:
    """Return the times and the command of a crontab's last line."""
    fields = text.rstrip("\n").splitlines()[-1].split(" ", 5)
    command = fields[5]
    assert not re.search(r"(?<!\\)%", command), "cron ends a command at a bare percent sign"
    return " ".join(fields[:5]), command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose program folder has an odd name, with a `catalog-embed` that writes down how it was called."""
    programs = tmp_path / HOSTILE_FOLDER
    programs.mkdir()
    program = programs / "catalog-embed"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_crontab_line_runs_the_exact_command_through_sh_whatever_the_paths_hold(here: Path) -> None:
    config = configure(here / HOSTILE_FOLDER / "shop", project=HOSTILE, targets={"it's": {"publish": {"alias": "live"}}})
    text = the_file(made(config, "cron", at="5 1 * * 1-5", target="it's"))
    times, command = line_of(text)
    assert times == "5 1 * * 1-5"
    assert "\nCRON_TZ=America/St_Johns\n" in text
    # cronie and Debian's cron hand \\% over as %, busybox and older ones as it is.
    for handed in (command.replace(r"\%", "%"), command):
        subprocess.run(["/bin/sh", "-c", handed], check=True, cwd=here)
    called, again = (config.parent / "catalog-embed-nightly.log").read_text().splitlines()
    assert called == again
    argv = json.loads(called)
    assert argv[1:] == ["-c", str(config), "--target", "it's", "run", "--since", "last", "--wait", "1h"]
    assert parsed(argv).parent is not None
    assert not list(here.rglob("owned"))


def test_only_the_last_lines_of_a_crontab_are_no_comment(here: Path) -> None:
    text = the_file(made(configure(here / "shop", project=HOSTILE), "cron"))
    zone, line = (line for line in text.splitlines() if not line.startswith("#"))
    assert zone == "CRON_TZ=America/St_Johns"
    assert line.startswith("0 2 * * * ")


@pytest.mark.parametrize("to", ["airflow", "dagster"])
def test_python_files_differ_from_their_template_in_four_constants_only(here: Path, to: str) -> None:
    config = configure(here / HOSTILE_FOLDER / "shop", project=HOSTILE)
    emitted = made(config, to, at="5 1 * * 1-5", since="yesterday")
    text = the_file(emitted)
    (template,) = (ROOT / "infra" / to).glob("*.py")
    before, after = template.read_text().splitlines(), text.splitlines()
    assert len(before) == len(after)
    assert {line.split(" = ")[0] for line, other in zip(before, after, strict=True) if line != other} == {
        "NAME",
        "TIMEZONE",
        "AT",
        "COMMAND",
    }
    found = constants(text)
    assert (found["TIMEZONE"], found["AT"]) == ("America/St_Johns", "5 1 * * 1-5")
    assert parsed(found["COMMAND"]).params["since"] == "yesterday"
    assert found["COMMAND"][2] == str(config)
    assert re.fullmatch(r"\w+" if to == "dagster" else r"[\w.-]+", found["NAME"])
    assert all(re.fullmatch(r"\w+\.py", name) for name in emitted.files)
    assert "\u202e" not in text


def test_two_projects_never_share_a_name(here: Path) -> None:
    names = {
        constants(the_file(made(configure(here / "shop", project=name), "airflow")))["NAME"]
        for name in ("shop", "Shop", "sh op", "sh/op", "sh-op", "魚", "鳥")
    }
    assert len(names) == 7


def exit_code_rows() -> dict[int, str]:
    """Return what docs/operations.md advises for every exit code."""
    text = (ROOT / "docs" / "operations.md").read_text().split("## Exit codes")[1].split("\n## ")[0]
    return {int(code): advice for code, advice in re.findall(r"^\| (\d+) \|[^|]*\|([^|]*)\|$", text, flags=re.MULTILINE)}


STAND_INS = {
    "airflow/__init__.py": "",
    "airflow/sdk/__init__.py": """
import logging
class BaseOperator:
    def __init__(self, **options): self.options, self.log = options, logging.getLogger("task")
class DAG:
    def __init__(self, **options): self.options = options
    def __enter__(self): return self
    def __exit__(self, *_): pass
""",
    "airflow/sdk/exceptions.py": "class AirflowException(Exception): pass\nclass AirflowFailException(AirflowException): pass\n",
    "pendulum.py": "def datetime(*_, tz): return tz\n",
    "dagster.py": """
import logging
class OpExecutionContext: log = logging.getLogger("op")
class DefaultScheduleStatus: RUNNING = "RUNNING"
class Failure(Exception):
    def __init__(self, description, allow_retries): super().__init__(description); self.allow_retries = allow_retries
class RetryRequested(Exception):
    def __init__(self, max_retries, seconds_to_wait): self.max_retries = max_retries
def op(**_): return lambda function: function
job = op
def Definitions(**options): return options
def ScheduleDefinition(**options): return options
""",
}
# Only what the two schedulers do with an exception is stood in for: the command runs, and ends, for real.
TRY_AIRFLOW = """
def end(command):
    try: m.CatalogEmbed(command=command, task_id="run").execute({})
    except m.AirflowFailException: return "fail"
    except m.AirflowException: return "retry"
    return "done"
"""
TRY_DAGSTER = """
def end(command):
    m.COMMAND = command
    try: m.run_command(m.OpExecutionContext())
    except m.RetryRequested as error: assert error.max_retries; return "retry"
    except m.Failure as error: assert error.allow_retries is False; return "fail"
    return "done"
"""


def scheduled(folder: Path, text: str, body: str) -> Any:
    """Run an emitted file beside the stand-ins, and return what the body prints as JSON."""
    for name, content in STAND_INS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "m.py").write_text(text)
    (folder / "attempt.py").write_text(f"import json, os, signal, sys, threading, time\nimport m\n{body}")
    done = subprocess.run([sys.executable, "attempt.py"], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("to", "attempt"), [("airflow", TRY_AIRFLOW), ("dagster", TRY_DAGSTER)])
def test_every_exit_code_is_treated_as_the_manual_advises(tmp_path: Path, to: str, attempt: str) -> None:
    text = the_file(made(configure(tmp_path / "shop"), to))
    body = f'{attempt}\nprint(json.dumps({{code: end(["sh", "-c", f"exit {{code}}"]) for code in {CODES}}} | {{"killed": end(["sh", "-c", "kill -9 $$"])}}))'
    found = scheduled(tmp_path, text, body)
    rows = exit_code_rows()
    assert set(rows) == {*CODES, 3}, "a new exit code needs a treatment by the schedulers"
    wanted = {
        str(code): "done" if code == 0 else "retry" if re.search("wait for it|start the command again", rows[code]) else "fail"
        for code in CODES
    }
    assert found == wanted | {"killed": "retry"}
    assert wanted["11"] == wanted["14"] == "retry"
    assert set(constants(text)["MEANINGS"]) == {*CODES} - {0}


# Writes that it was asked to end, as a run does that releases its lease.
SLOW = ["sh", "-c", "trap 'echo released > released; exit 14' TERM; echo up > up; while :; do sleep 0.05; done"]


def test_airflow_ends_the_run_with_its_task_and_lets_it_release_its_lease(tmp_path: Path) -> None:
    text = the_file(made(configure(tmp_path / "shop"), "airflow"))
    body = f"""
task = m.CatalogEmbed(command={SLOW!r}, task_id="run")
def stop():
    while not os.path.exists("up"): time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda *_: task.on_kill())
threading.Thread(target=stop).start()
try: task.execute({{}})
except m.AirflowException as error: print(json.dumps([type(error).__name__, str(error), open("released").read()]))
"""
    name, said, released = scheduled(tmp_path, text, body)
    assert (name, released) == ("AirflowException", "released\n")
    assert "14" in said


def test_dagster_ends_a_run_at_its_deadline_and_lets_it_release_its_lease(tmp_path: Path) -> None:
    text = the_file(made(configure(tmp_path / "shop"), "dagster"))
    body = f"""
try: m.exit_code({SLOW!r}, deadline_s=1.0)
except m.Failure as error: print(json.dumps([error.allow_retries, open("released").read()]))
"""
    assert scheduled(tmp_path, text, body) == [False, "released\n"]


@pytest.mark.parametrize("at", ["0 2 * * *", "*/15 * * * *", "0,30 1-5 1 1-12/2 0-6", "59 23 31 12 6"])
def test_times_that_all_schedulers_read_alike_are_taken(at: str) -> None:
    check_cron(at)


@pytest.mark.parametrize(
    "at",
    [
        *("", "@daily", "0 2 * *", "0 2 * * * *", "60 2 * * *", "0 24 * * *", "0 2 0 * *", "0 2 * 13 *", "0 2 * * 7", "0 2 * * sun"),
        *("5-1 2 * * *", "*/0 2 * * *", "0 2 * * *\n", "0 2 * * $(id)", "% 2 * * *", ", 2 * * *"),
    ],
)
def test_times_that_a_scheduler_would_refuse_or_read_otherwise_are_refused(at: str) -> None:
    with pytest.raises(InputError, match="--at"):
        check_cron(at)


def test_writing_twice_changes_nothing_and_a_changed_project_replaces_its_own_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = configure(tmp_path / "shop", project="one")
    first = write(made(config, "cron"), out)
    before = {path: path.read_bytes() for path in out.rglob("*")}
    assert write(made(config, "cron"), out) == first
    assert {path: path.read_bytes() for path in out.rglob("*")} == before
    write(made(configure(tmp_path / "shop", project="two"), "cron"), out)
    assert sorted(path.name for path in out.iterdir()) == [RECORD, "catalog-embed-two.crontab"]


@pytest.mark.parametrize("kind", ["foreign", "changed", "link", "other"])
def test_a_file_of_somebody_else_is_never_touched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    config = configure(tmp_path / "shop")
    (file,) = write(made(config, "cron"), out)
    if kind == "foreign":
        (out / "notes.txt").write_text("mine")
    elif kind == "changed":
        file.write_text(file.read_text() + "0 5 * * * mine\n")
    elif kind == "link":
        elsewhere = tmp_path / "elsewhere"
        file.rename(elsewhere)
        file.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in out.rglob("*")}
    with pytest.raises(InputError, match="nothing was written"):
        write(made(config, "airflow" if kind == "other" else "cron", at="0 4 * * *"), out)
    assert {path: path.read_bytes() for path in out.rglob("*")} == before


def test_a_writing_that_was_killed_is_finished_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = configure(tmp_path / "shop")
    (file,) = write(made(config, "cron"), out)
    later = made(config, "cron", at="0 4 * * *")
    file.write_bytes(the_file(later).encode())
    write(later, out)
    assert "0 4 * * *" in file.read_text()


def test_places_of_this_machine_are_refused_for_pods_all_at_once(tmp_path: Path) -> None:
    source = read_file(BASE / "catalog-embed.yaml")["source"] | {"path": "catalog/"}
    config = configure(tmp_path / "shop", source=source, store={"root": "/data/index"}, tower={"path": "file:///towers/one"})
    with pytest.raises(InputError, match=r"source\.path.*store\.root.*tower\.path"):
        made(config, "kuberay")
    with pytest.raises(InputError, match=r"source\.path") as caught:
        made(config, "kuberay", allow_local=True)
    assert "store.root" not in str(caught.value)
    config = configure(tmp_path / "shop", source=source | {"path": "/data/catalog"}, store={"root": "/data/index"})
    assert made(config, "kuberay", allow_local=True).files["catalog-embed.yaml"] == config.read_bytes()
    config = configure(tmp_path / "shop", store={})
    with pytest.raises(InputError, match=r"store\.root"):
        made(config, "kuberay", allow_local=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"store": {"root": "s3://shop/index", "options": {"secret_access_key": "canary-5511"}}},
        {"targets": {"odd": 5, "prod": {"store": {"options": {"token": "canary-5511"}}}}},
        {"targets": {"prod": {"source": {"uri": "postgresql://reader:canary-5511@db/shop"}}}},
        {"targets": {"prod": {"store": {"root": "https://reader:canary-5511@store/index"}}}},
    ],
)
def test_a_secret_in_the_configuration_is_refused_and_not_shown(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"\$\{NAME\}") as caught:
        made(configure(tmp_path / "shop", **changes), "kuberay")
    assert "canary-5511" not in str(caught.value)


def test_names_of_variables_are_told_and_their_values_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", "canary-5511")
    config = configure(tmp_path / "shop", store={"root": "s3://shop/index", "options": {"secret_access_key": "${SHOP_KEY}"}})
    for to in ("kuberay", "cron", "airflow", "dagster"):
        emitted = made(config, to)
        assert emitted.variables == ("SHOP_KEY",)
        assert any("SHOP_KEY" in note for note in emitted.notes)
        assert all(b"canary" not in data for data in emitted.files.values())
    assert b"SHOP_KEY" in made(config, "kuberay").files["kustomization.yaml"]


def test_what_only_this_shell_overrides_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALOG_EMBED_EMBED__ACTORS", "3")
    assert any("CATALOG_EMBED_EMBED__ACTORS" in note for note in made(configure(tmp_path / "shop"), "cron").notes)


@needs_kubectl
def test_the_overlay_renders_with_the_project_in_every_place(tmp_path: Path) -> None:
    config = configure(tmp_path / "shop", targets={"prod": {"publish": {"alias": "live"}}})
    image = "registry.example.com:5000/team/ce:1.2"
    options: dict[str, Any] = {"at": "30 3 * * 1-5", "image": image, "namespace": "shop-night", "target": "prod", "since": "2d"}
    write(made(config, "kuberay", **options), tmp_path / "out")
    rendered = subprocess.run(["kubectl", "kustomize", tmp_path / "out"], capture_output=True, check=True).stdout
    found = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(rendered)}
    assert {item["metadata"].get("namespace", "shop-night") for item in found.values()} == {"shop-night"}
    night = found["CronJob", "catalog-embed-nightly"]["spec"]
    assert (night["schedule"], night["timeZone"]) == ("30 3 * * 1-5", "America/St_Johns")
    assert night["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["image"] == image
    assert found["ConfigMap", "catalog-embed-config"]["data"]["catalog-embed.yaml"] == config.read_text()
    scripts = found["ConfigMap", "catalog-embed-nightly"]["data"]
    assert scripts["start-and-wait.sh"] == (BASE / "start-and-wait.sh").read_text()
    job = yaml.safe_load(scripts["nightly-rayjob.yaml"])
    command = parsed(shlex.split(job["spec"]["entrypoint"]))
    assert command.parent is not None
    assert (command.parent.params["target"], command.params["since"]) == ("prod", "2d")
    images = re.findall(r"image: (\S+)", scripts["nightly-rayjob.yaml"])
    assert set(images) == {image, f"{image}-gpu"}


def test_a_digest_is_the_image_of_all_pods(tmp_path: Path) -> None:
    image = f"registry.example.com/ce@sha256:{'0' * 64}"
    files = made(configure(tmp_path / "shop"), "kuberay", image=image).files
    assert set(re.findall(r"image: (\S+)", files["nightly-rayjob.yaml"].decode())) == {image}
    assert yaml.safe_load(files["kustomization.yaml"])["images"][0]["digest"] == f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    "embed",
    [
        {},
        {"actors": 3, "threads": 6},
        {"actors": 2, "resources": {"embedder": 1}},
        {"gpus_per_actor": 1, "actors": 4},
        {"gpus_per_actor": 0.5, "actors": 5, "resources": {"embedder": 1}, "threads": 3},
        {"gpus_per_actor": 0.2, "actors": 5, "threads": 2},
        {"gpus_per_actor": 4, "actors": 2, "resources": {"embedder": 2}},
    ],
)
def test_the_workers_hold_the_actors_that_the_configuration_asks_for(tmp_path: Path, embed: dict[str, Any]) -> None:
    job = yaml.safe_load(made(configure(tmp_path / "shop", embed=embed), "kuberay").files["nightly-rayjob.yaml"])
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    nodes = []
    for group in groups:
        given = group["template"]["spec"]["containers"][0]["resources"]
        counted = {name: float(amount) for name, amount in group["resources"].items()}
        assert counted["CPU"] == float(given["requests"]["cpu"])
        assert counted.get("GPU", 0.0) == float(given["limits"].get("nvidia.com/gpu", 0))
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        nodes += [counted] * group["maxReplicas"]
    found = pool(nodes, PoolOptions(**embed), parts=1000)
    assert found.actors == embed.get("actors", found.actors)
    assert found.gpus == embed.get("gpus_per_actor", 0)
    assert found.cpus >= min(found.threads, 2)
    if found.gpus:
        # The GPU workers stand last. No more of them than are asked for: one less does not hold the actors.
        with pytest.raises(InputError, match="actors"):
            pool(nodes[:-1], PoolOptions(**embed), parts=1000)


def test_a_missing_template_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.schedule, "INFRA", tmp_path / "infra")
    with pytest.raises(InputError, match="Install catalog-embed again"):
        made(configure(tmp_path / "shop"), "cron")


@pytest.mark.parametrize(
    "options",
    [{"image": "a b"}, {"image": "x:1; id"}, {"image": "-x"}, {"namespace": "Shop"}, {"namespace": "a/b"}, {"since": "tomorow"}],
)
def test_odd_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--"):
        made(configure(tmp_path / "shop"), "kuberay", **options)


def test_the_command_prints_one_file_or_writes_a_folder_and_says_what_to_type(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = commands(capfd, configure(tmp_path / "shop"))
    printed = run("schedule", "--to", "cron")
    assert printed.code == 0
    assert printed.out == the_file(made(tmp_path / "shop" / "catalog-embed.yaml", "cron"))
    out = tmp_path / "my files"
    told = run("schedule", "--to", "kuberay", "--out", out)
    assert told.code == 0
    assert told.out.splitlines()[-1] == f"next: kubectl apply -k '{out}'"
    data = run("schedule", "--to", "kuberay", "--out", out, "--output", "json").json
    assert all(Path(name).is_file() for name in data["files"])
    assert data["next"] == f"kubectl apply -k '{out}'"
    assert run("schedule", "--to", "kuberay").code == 2
    assert run("schedule", "--to", "cron", "--namespace", "x").code == 2
    assert run("schedule", "--to", "cron", "--at", "0 2 * *").code == 2
