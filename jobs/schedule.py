"""`schedule`: the nightly run as files that cron, Airflow, Dagster or Kubernetes starts, filled in from the project.

The templates are plain files below infra/, each valid as it stands. What is filled in is quoted for where it lands.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any, Literal

from jobs.config import Value, described, read_file
from jobs.kuberay import Overlay, advice, overlay
from jobs.settings import SECTIONS, Settings
from pipelines.errors import InputError
from pipelines.layout import printable
from pipelines.window import resolve

INFRA = Path(__file__).resolve().parent.parent / "infra"
# Written last: it tells this command's files, as they were written, from anybody else's.
RECORD = ".catalog-embed-schedule.json"
# Airflow and Dagster try a held lease again; cron starts a command once.
CRON_WAIT = "1h"

Scheduler = Literal["kuberay", "cron", "airflow", "dagster"]

_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, 12), ("day of the week", 0, 6))
_ITEM = re.compile(r"(?:\*|([0-9]{1,2})(?:-([0-9]{1,2}))?)(?:/([0-9]{1,2}))?")
_REFERENCE = re.compile(r"\$\{(\w+)\}")
_OVERRIDE = re.compile(r"environment (CATALOG_EMBED_\w+)")
_PLACEHOLDER = re.compile(r'"\$(\w+)"')


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is asked for: which run, when, and by which scheduler."""

    to: Scheduler
    config: Path
    target: str | None = None
    at: str = "0 2 * * *"
    since: str = "last"
    image: str | None = None
    namespace: str | None = None
    allow_local: bool = False

    def __post_init__(self) -> None:
        check_cron(self.at)
        if self.to != "kuberay" and (self.image or self.namespace or self.allow_local):
            raise InputError(f"--image, --namespace and --allow-local are for --to kuberay, not for {self.to}.")


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """Files by their name below the folder, the command to type next, and what a person has to know."""

    to: Scheduler
    files: Mapping[str, bytes]
    then: str
    variables: tuple[str, ...]
    notes: tuple[str, ...]


def emit(settings: Settings, schedule: Schedule) -> Emitted:
    """Return the files that a scheduler needs to start this project's nightly run."""
    makers: dict[Scheduler, Callable[[Settings, Schedule], tuple[dict[str, bytes], str]]] = {
        "cron": _cron,
        "airflow": _airflow,
        "dagster": _dagster,
        "kuberay": _kuberay,
    }
    # A word that is not understood is found now, and not at two at night.
    resolve(schedule.since, now=datetime.now(tz=settings.zone), tz=settings.zone, lookback=settings.plan.lookback, watermark=None)
    files, then = makers[schedule.to](settings, schedule)
    return Emitted(to=schedule.to, files=files, then=then, variables=variables(settings), notes=tuple(_notes(settings, schedule)))


def check_cron(at: str) -> None:
    """Refuse what one of the four schedulers would read in another way, or not at all."""
    parts = at.split()
    if len(parts) != len(_FIELDS) or "\n" in at:
        raise InputError(f"--at {at!r} is not five fields in one line: minute, hour, day, month, day of the week, such as `0 2 * * *`.")
    for part, (name, least, most) in zip(parts, _FIELDS, strict=True):
        for item in part.split(","):
            found = _ITEM.fullmatch(item)
            first, last, step = (int(text) if text else None for text in found.groups()) if found else (None, None, 0)
            inside = all(least <= number <= most for number in (first, last) if number is not None)
            if step == 0 or not inside or (first is not None and last is not None and first > last):
                raise InputError(
                    f"--at {at!r}: `{item}` is no {name}. Write numbers from {least} to {most}, ranges `a-b`, steps `*/n`, or `*`."
                )


def variables(settings: Settings) -> tuple[str, ...]:
    """Return the names of the environment variables that the configuration reads."""
    written = (value.written for value in settings.origins.values())
    return tuple(sorted({name for raw in written for text in _texts(raw) for name in _REFERENCE.findall(text)}))


def literal_secrets(config: Path) -> list[str]:
    """Return the keys whose value `doctor` would mask, of all targets: what must not be copied to where others read it."""
    data = read_file(config)
    targets = data.pop("targets", None)
    found = []
    for front, sections in (("", data), *((f"targets.{name}.", content) for name, content in _items(targets))):
        layer = {
            f"{section}.{key}": Value(raw=raw, origin="", written=raw)
            for section, content in _items(sections)
            for key, raw in _items(content)
        }
        found += [f"{front}{key}" for key, shown, _ in described(layer, SECTIONS) if "****" in shown]
        found += [f"{front}{key}" for key, value in layer.items() if any(re.search(r"://[^/\s$]*@", text) for text in _texts(value.raw))]
    return found


def write(emitted: Emitted, out: Path) -> list[Path]:
    """Write the files into a folder that is new, empty, or as this command left it; anything else there is left alone."""
    try:
        return _write(emitted.files, out, emitted.to)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or out}: {error.strerror or error}. Choose a folder that you may write to."
        ) from error


def _write(files: Mapping[str, bytes], out: Path, to: Scheduler) -> list[Path]:
    old = _recorded(out / RECORD) or {"to": to, "files": {}}
    if old["to"] != to:
        raise InputError(f"{out} holds what was written for {old['to']}. Choose another folder for {to}; nothing was written.")
    before: dict[str, str] = old["files"]
    kept = set()
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if name == RECORD or (path.is_dir() and not path.is_symlink()):
            continue
        # A run that was killed in the middle has written some of the new files, and no new record.
        expected = {before.get(name), _sha256(files[name]) if name in files else None}
        if path.is_symlink() or _sha256(path.read_bytes()) not in expected:
            raise InputError(
                f"{path} {'was changed since `schedule` wrote it' if name in before else 'was not written by `schedule`'}. "
                "Choose a new folder for --out, or move that file away; nothing was written."
            )
        kept.add(name)
    for name in kept - files.keys():
        (out / name).unlink()
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    new = {"to": to, "files": {name: _sha256(data) for name, data in sorted(files.items())}}
    (out / RECORD).write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
    return [out / name for name in files]


def _recorded(record: Path) -> dict[str, Any] | None:
    try:
        old: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return {"to": str(old["to"]), "files": dict(old["files"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record} is not as `schedule` wrote it. Choose a new folder for --out; nothing was written.") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def template(name: str) -> Path:
    """Return a file or folder below infra/."""
    path = INFRA / name
    if not path.exists():
        raise InputError(f"{path} is missing, which `schedule` fills in. Install catalog-embed again, or run it from a whole checkout.")
    return path


def _cron(settings: Settings, schedule: Schedule) -> tuple[dict[str, bytes], str]:
    log = schedule.config.resolve().parent / "catalog-embed-nightly.log"
    words = " ".join(map(_for_cron, [*_command(schedule), "--wait", CRON_WAIT]))
    text = Template(template("cron/crontab").read_text(encoding="utf-8")).substitute(
        project=printable(settings.project.project),
        variables=", ".join(variables(settings)) or "none",
        timezone=settings.project.timezone,
        at=schedule.at,
        command=f"{words} >> {_for_cron(_plain(log))} 2>&1",
    )
    name = f"catalog-embed-{_slug(settings.project.project)}.crontab"
    # `crontab FILE` alone would replace the other lines of this user.
    return {name: text.encode()}, f"(crontab -l; cat {{out}}/{name}) | crontab -"


def _for_cron(word: str) -> str:
    """Quote a word for sh, and percent signs for cron, which ends a command at them, inside quotes too.

    The backslash stands outside of quotes: some crons take it away and some leave it to sh.
    """
    return r"\%".join(shlex.quote(part) if part else "" for part in word.split("%"))


def _airflow(settings: Settings, schedule: Schedule) -> tuple[dict[str, bytes], str]:
    name = f"catalog-embed-{_slug(settings.project.project)}"
    file = f"{name.replace('-', '_')}.py"
    text = _python("airflow/catalog_embed_nightly.py", settings, schedule, name)
    return {file: text}, f'cp {{out}}/{file} "$(airflow config get-value core dags_folder)" && airflow dags unpause {name}'


def _dagster(settings: Settings, schedule: Schedule) -> tuple[dict[str, bytes], str]:
    # Dagster's names know no dash.
    name = f"catalog_embed_{_slug(settings.project.project).replace('-', '_')}"
    text = _python("dagster/catalog_embed_nightly.py", settings, schedule, name)
    return {f"{name}.py": text}, f"dagster dev -f {{out}}/{name}.py"


def _python(path: str, settings: Settings, schedule: Schedule, name: str) -> bytes:
    """Replace the quoted placeholders of a template by Python literals; `repr` escapes what cannot be seen."""
    values = {"name": name, "timezone": settings.project.timezone, "at": schedule.at, "command": _command(schedule)}
    text = template(path).read_text(encoding="utf-8")
    return _PLACEHOLDER.sub(lambda match: repr(values[match.group(1)]), text).encode()


def _command(schedule: Schedule) -> list[str]:
    """Return the nightly command with absolute paths: a scheduler has another folder and another PATH."""
    beside = Path(sys.executable).parent / "catalog-embed"
    program = str(beside) if beside.exists() else shutil.which("catalog-embed")
    if program is None:
        raise InputError(f"there is no `catalog-embed` in {beside.parent} nor on PATH. Install the package: `pip install catalog-embed`.")
    target = [] if schedule.target is None else ["--target", schedule.target]
    return [_plain(Path(program).absolute()), "-c", _plain(schedule.config.resolve()), *target, "run", "--since", schedule.since]


def _plain(path: Path) -> str:
    """Return a path that can stand on one line of a text file."""
    text = str(path)
    if not all(char.isprintable() for char in text):
        raise InputError(f"the path {printable(text)} holds characters that no scheduler's file can hold. Move or rename the folder.")
    return text


def _kuberay(settings: Settings, schedule: Schedule) -> tuple[dict[str, bytes], str]:
    secrets = literal_secrets(schedule.config)
    if secrets:
        raise InputError(
            f"{schedule.config} holds what may be secrets, and a ConfigMap is no place for them: {', '.join(sorted(set(secrets)))}. "
            "Write them as `${NAME}`, and put NAME into a Secret."
        )
    base = template("kuberay/base")
    files = {f"base/{path.relative_to(base).as_posix()}": path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()}
    _check_places(settings, allow_local=schedule.allow_local)
    files["catalog-embed.yaml"] = schedule.config.read_bytes()
    return files | overlay(base, _overlay(settings, schedule)), "kubectl apply -k {out}"


def _overlay(settings: Settings, schedule: Schedule) -> Overlay:
    return Overlay(
        at=schedule.at,
        timezone=settings.project.timezone,
        since=schedule.since,
        target=schedule.target,
        image=schedule.image,
        namespace=schedule.namespace,
        embed=settings.embed,
        variables=variables(settings),
    )


def _check_places(settings: Settings, *, allow_local: bool) -> None:
    """Refuse places that a pod does not see, all at once."""
    places = {
        "source.path": settings.source.path,
        "store.root": settings.store.root,
        "tower.path": settings.tower.path,
        "publish.metrics": settings.publish.metrics,
    }
    wrong = []
    for key, place in places.items():
        if place is None or ("://" in place and not place.startswith("file:")):
            continue
        given = settings.origins[key].raw if key in settings.origins else None
        # A relative place would lie beside the configuration, which is a read-only ConfigMap there.
        if not (allow_local and given is not None and Path(str(given)).is_absolute()):
            wrong.append(f"`{key}` ({place})")
    if wrong:
        raise InputError(
            f"pods do not see folders of this machine: {', '.join(wrong)}. Use s3://, gs:// or az://; "
            "or an absolute path in the image or on a volume, with --allow-local."
        )


def _notes(settings: Settings, schedule: Schedule) -> Iterator[str]:
    """Say what the scheduled run needs, or will not have although this command had it."""
    overrides = sorted({name for value in settings.origins.values() for name in _OVERRIDE.findall(value.origin)})
    if overrides:
        yield f"set in this shell only, so the scheduled run does not have it: {', '.join(overrides)}"
    names = variables(settings)
    if schedule.to == "kuberay":
        yield from advice(_overlay(settings, schedule))
    elif names:
        yield f"the configuration reads {', '.join(names)}: the scheduler has to set them"


def _slug(project: str) -> str:
    """Return a name that all schedulers take; two projects never share one."""
    kept = re.sub("[^a-z0-9]+", "-", project.lower()).strip("-")[:40]
    return kept if kept == project else f"{kept}-{zlib.crc32(project.encode('utf-8', 'surrogatepass')):08x}".lstrip("-")


def _texts(raw: Any) -> Iterator[str]:
    if isinstance(raw, str):
        yield raw
    elif isinstance(raw, Mapping):
        for item in raw.values():
            yield from _texts(item)
    elif isinstance(raw, list | tuple):
        for item in raw:
            yield from _texts(item)


def _items(raw: Any) -> list[tuple[Any, Any]]:
    """Return what a mapping holds; a target that nobody chose was never checked for being one."""
    return list(raw.items()) if isinstance(raw, Mapping) else []
