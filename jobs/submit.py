"""The same command on a Ray cluster: its code and its configuration go through Ray's Jobs API, and the job is followed.

What goes is the code of this very installation, the configuration as it is written, and files named on the command line.
Secrets stay: `${NAME}` is replaced on the cluster, from the cluster's environment, and no variable is sent but for places.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.cluster import PACKAGES, check_secure, host_of, is_loopback
from jobs.config import FILE_NAME, Layer, described
from jobs.logs import event
from jobs.settings import SECTIONS
from pipelines.errors import CatalogEmbedError, ClusterError, InputError

INTERRUPTED = 14

_PREFIX = "catalog-embed-"
# Begins the lines of the job's stdout, which Ray's log has in one stream with its stderr.
_MARK = "\x1e"
# Begins the line with the exit code of the command, which a job that was stopped and ended by itself tells nowhere else.
_CODE = "\x1d"
_LOOK_EVERY_S = 1.0
# A head that is busy, or a port-forward that is made anew, answers late.
_SILENCE_S = 120.0
_AGENT_S = 60.0
_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
# Ray kills a job three seconds after it asked it to stop, too soon to record the run and to end its lease.
_STOP_S = 60
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
# Settings that are places, and what they are where nothing is written.
_PLACES: Mapping[str, str | None] = {
    "source.path": None,
    "store.root": "index",
    "tower.path": None,
    "publish.metrics": None,
    "judgments.path": None,
    "judgments.queries": None,
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command to submit: `front` stands before the subcommand's name, `files` are copied beside the configuration."""

    name: str
    project: str
    config: Path
    layer: Layer = field(repr=False)
    front: Sequence[str] = ()
    arguments: Sequence[str] = ()
    files: Mapping[str, Path] = field(default_factory=dict)


def submit(address: str, command: Command, *, insecure: bool) -> int:
    """Run a command on the cluster behind an address of its dashboard; return the exit code that the command had there."""
    if "@" in address:
        raise InputError("the address of the cluster holds credentials. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN instead.")
    check_secure(address, insecure=insecure)
    if not is_loopback(host_of(address)):
        event("submit.places", address=address, advice="the catalog, the store and the tower must be where all nodes see them")
        if address.startswith("http://"):
            event(
                "submit.unencrypted", level="warning", address=address, advice="the token travels in clear; use https, or a private network"
            )
    client = _client(address)
    submission = f"{_PREFIX}{command.name}-{secrets.token_hex(6)}"
    with tempfile.TemporaryDirectory(prefix="catalog-embed-") as name, _interrupts() as interrupts:
        folder = Path(name)
        _fill(folder, command)
        job = {
            "entrypoint": entrypoint(command),
            "submission_id": submission,
            "runtime_env": {"working_dir": str(folder), "env_vars": variables(command)},
            "metadata": {"project": command.project, "command": command.name},
        }
        _asked(address, lambda: _accepted(lambda: client.submit_job(**job)))
        event("job.submitted", job=submission, address=address)
        return _follow(address, client, submission, interrupts)


def entrypoint(command: Command) -> str:
    """Return what the shell of the cluster runs. The folder it starts in comes first on Python's path, before an installed copy."""
    words = ["python", "-m", "jobs.cli", *command.front, "-c", FILE_NAME, command.name, *command.arguments]
    found = "python -c 'import importlib.util as u, sys; sys.exit(u.find_spec(\"ray\") is None)'"
    advice = "error: the python on the PATH of the Ray head has no ray. Start ray with the bin folder of its own environment on the PATH."
    # Results come last, and marked, so that the reader of the one log can give them to its own stdout; then the exit code.
    return (
        f"{found} || {{ echo {shlex.quote(advice)} >&2; exit 1; }}; out=$(mktemp); {shlex.join(words)} > $out; code=$?; "
        f"sed 's/^/{_MARK}/' $out; rm -f $out; printf '{_CODE}%s\\n' $code; exit $code"
    )


def variables(command: Command) -> Mapping[str, str]:
    """Return the job's environment: where the configuration's relative places are, as they are written."""
    found = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}
    for key, default in _PLACES.items():
        value = command.layer.get(key)
        written = value.written if value is not None else default
        if not isinstance(written, str) or (value is not None and value.origin == "command line"):
            continue
        if "://" in written or written.startswith("${"):
            if value is not None and value.origin.startswith("environment"):
                found[_variable(key)] = json.dumps(written)
            continue
        found[_variable(key)] = json.dumps(str((command.config.parent / written).resolve()))
    for key, value in command.layer.items():
        if not value.origin.startswith("environment") or key in _PLACES:
            continue
        if any("****" in shown for _, shown, _ in described({key: value}, SECTIONS)):
            advice = "it is a secret: set it on the cluster, or write `${NAME}` into the configuration"
            event("submit.stays", level="warning", variable=_variable(key), advice=advice)
        else:
            found[_variable(key)] = json.dumps(value.written)
    return found


def _variable(key: str) -> str:
    return f"CATALOG_EMBED_{key.replace('.', '__')}".upper()


def _fill(folder: Path, command: Command) -> None:
    """Put the code, its version, the configuration and the named files into a folder."""
    home = Path(__file__).resolve().parents[1]
    for package in (*PACKAGES, "infra"):
        if (home / package).is_dir():
            shutil.copytree(home / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    version = importlib.metadata.version("catalog-embed")
    info = folder / f"catalog_embed-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: catalog-embed\nVersion: {version}\n", encoding="utf-8")
    shutil.copyfile(command.config, folder / FILE_NAME)
    for name, path in command.files.items():
        shutil.copyfile(path, folder / name)


def _client(address: str) -> Any:
    """Open the Jobs API, or say why it cannot be spoken to."""
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415  half a second that `--help` need not pay

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # An address in the environment would win over the one that was asked for.
    kept = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        return _asked(address, lambda: JobSubmissionClient(address))
    finally:
        os.environ.update(kept)


def _accepted(send: Callable[[], Any]) -> Any:
    """Send a job; a head that has only just started has no agent yet that takes it."""
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            return send()
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_EVERY_S)


def _asked(address: str, ask: Callable[[], Any]) -> Any:
    """Ask the cluster for something; what goes wrong on the way is said in our words."""
    import ray.exceptions  # noqa: PLC0415  as above
    import requests  # noqa: PLC0415  as above

    try:
        return ask()
    except ray.exceptions.AuthenticationError as error:
        raise InputError(
            f"the cluster at `{address}` refuses the token ({str(error).splitlines()[0]}). Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the token of the cluster; on Kubernetes it is in the cluster's Secret, under auth_token."
        ) from None
    except (ConnectionError, OSError, requests.exceptions.RequestException) as error:
        raise ClusterError(
            f"cannot reach the Jobs API at `{address}`: {type(error).__name__}. Give the address of the dashboard, such as http://host:8265, "
            "and open a port-forward where it is not reachable from here."
        ) from error
    except RuntimeError as error:
        raise ClusterError(f"the cluster at `{address}` did not take the job: {str(error).strip().splitlines()[-1][:300]}.") from error


def _follow(address: str, client: Any, submission: str, interrupts: Sequence[int]) -> int:
    """Show the job's output as it comes, and return its exit code. Ctrl-C stops the job, a second one only this process."""
    told: list[int] = []
    reader = threading.Thread(target=_show, args=(client, submission, told), daemon=True)
    reader.start()
    stopped, heard = False, time.monotonic()
    while True:
        try:
            info = client.get_job_info(submission)
            heard = time.monotonic()
            if str(getattr(info.status, "value", info.status)) in _ENDED:
                break
            if interrupts and not stopped:
                client.stop_job(submission)
                stopped = True
                event("job.stopping", job=submission, advice="interrupt again to leave it to itself")
        except (OSError, RuntimeError) as error:
            if time.monotonic() - heard > _SILENCE_S:
                raise CatalogEmbedError(
                    f"nothing was heard of the job {submission} at `{address}` for {_SILENCE_S:g} s ({type(error).__name__}). It may go on: "
                    "look at Ray's dashboard and at `catalog-embed status`."
                ) from error
        if len(interrupts) > 1:
            return INTERRUPTED
        time.sleep(_LOOK_EVERY_S)
    reader.join(timeout=_LOOK_EVERY_S * 10)
    if told:
        return told[-1]
    if stopped:
        return INTERRUPTED
    if info.driver_exit_code is None:
        why = str(info.message)[:300]
        raise CatalogEmbedError(f"the job {submission} ended without an exit code: {why}. Look at its log in Ray's dashboard.")
    return int(info.driver_exit_code)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Count Ctrl-C and SIGTERM in this block, in which they end nothing."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda given, _: seen.append(given)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(client: Any, submission: str, told: list[int]) -> None:
    """Write the job's results to stdout and the rest of its log to stderr, a line at a time; keep the exit code that it tells."""

    async def tail() -> None:
        rest = ""
        async for chunk in client.tail_job_logs(submission):
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                if line.startswith(_CODE) and line[1:].isdecimal():
                    told.append(int(line[1:]))
                else:
                    _write(line + "\n")
        _write(rest)

    try:
        asyncio.run(tail())
    except Exception as error:  # noqa: BLE001  the job goes on, and its exit code is asked for apart
        event("job.log_lost", level="warning", job=submission, error=error)


def _write(line: str) -> None:
    stream = sys.stdout if line.startswith(_MARK) else sys.stderr
    stream.write(line.removeprefix(_MARK))
    stream.flush()
