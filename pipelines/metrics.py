"""Every metric of a run, as data, and the Prometheus text format: rendered, read back, carried from run to run.

A nightly batch is not scraped; it leaves a file for the node exporter's textfile collector, or pushes to a gateway. Gauges
tell of the last run. Counters add up over runs. Lasting gauges survive a run that did not measure them, so that a failed
night cannot erase when the last good one was.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.errors import InputError
from pipelines.layout import short

PREFIX = "catalog_embed_"

# A metric without its prefix, and the values of its labels in the order of the registry.
Key = tuple[str, tuple[str, ...]]

MAX_TEXTFILE_BYTES = 4 * 1024 * 1024
_MAX_LABEL_CHARACTERS = 120
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\.)*)"(?:,|$)')
_ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric's name without prefix, what it says, and its labels."""

    name: str
    help: str
    type: Literal["gauge", "counter"] = "gauge"
    labels: tuple[str, ...] = ()
    lasting: bool = False


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="last_success_timestamp_seconds", help="When a run last published, or found nothing to do.", lasting=True),
        Metric(name="last_run_timestamp_seconds", help="When the last run ended, however it ended."),
        Metric(name="last_publish_seq", help="Number of the alias log entry that readers open.", lasting=True),
        Metric(name="run_exit_code", help="Exit code of the last run."),
        Metric(name="run_seconds", help="Seconds that the last run spent, by stage; `total` is the whole run.", labels=("stage",)),
        Metric(name="rows_read", help="Catalog rows that the last run read."),
        Metric(name="rows_embedded", help="Texts that the last run embedded."),
        Metric(name="rows_skipped", help="Texts that the last run did not embed, because they had been embedded before."),
        Metric(name="rows_quarantined", help="Rows that the last run rejected, by reason.", labels=("reason",)),
        Metric(name="rows_deleted", help="Products that the last run deleted."),
        Metric(name="embed_rows_per_second", help="Texts a second of the last run's embed stage.", lasting=True),
        Metric(name="embed_tokens_per_second", help="Tokens a second of the last run's embed stage.", lasting=True),
        Metric(name="embed_busy_ratio", help="Share of their time that the last run's actors spent in forward passes."),
        Metric(name="embed_cost", help="Cost of the last run's forward passes, in the configured currency."),
        Metric(name="guard_result", help="Guards of the last plan: 1 passed, 0 tripped.", labels=("guard",)),
        Metric(name="gate_result", help="Gates of the last candidate: 1 passed, 0.5 warned, 0 failed.", labels=("gate",)),
        Metric(name="recall_at_10", help="Measured recall at 10, by index.", labels=("index",), lasting=True),
        Metric(name="generation_bytes", help="Bytes that the last built generation refers to.", lasting=True),
        Metric(name="orphan_bytes", help="Bytes in the store that no generation refers to.", lasting=True),
        Metric(name="runs_total", help="Runs by outcome.", type="counter", labels=("outcome",)),
        Metric(name="gpu_seconds_total", help="Seconds that actors spent in forward passes.", type="counter"),
        Metric(name="lease_conflicts_total", help="Times that another run held the lease or published first.", type="counter"),
        Metric(name="oom_halvings_total", help="Batches that were halved because memory ran out.", type="counter"),
        Metric(name="retries_total", help="Attempts that were repeated, by kind.", type="counter", labels=("kind",)),
    )
}


def render_prometheus(values: Mapping[Key, float], *, labels: Mapping[str, str] | None = None) -> str:
    """Return the text format, in the order of the registry; `labels` are put on every sample. Unknown metrics are a KeyError."""
    unknown = sorted({name for name, _ in values} - METRICS.keys())
    if unknown:
        raise KeyError(f"{unknown[0]} is no metric; METRICS has {', '.join(METRICS)}")
    constant = dict(sorted((labels or {}).items()))
    lines: list[str] = []
    for metric in METRICS.values():
        found: dict[str, float] = {}
        for (name, given), value in values.items():
            if name == metric.name:
                # Two values that are shown alike are one sample, with both counts in it.
                labelled = _labelled(metric, given, constant)
                found[labelled] = found.get(labelled, 0.0) + value
        if found:
            name = PREFIX + metric.name
            lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.type}"]
            lines += [f"{name}{labelled} {_number(value)}" for labelled, value in sorted(found.items())]
    return "".join(f"{line}\n" for line in lines)


def parse_prometheus(text: str, *, labels: Mapping[str, str] | None = None) -> dict[Key, float]:
    """Read back what `render_prometheus` wrote under the same `labels`; lines of others are passed over."""
    constant = {name: shown(value) for name, value in (labels or {}).items()}
    found = {}
    for line in text.split("\n"):
        match = _SAMPLE.fullmatch(line)
        metric = METRICS.get(match[1].removeprefix(PREFIX)) if match else None
        given = _labels_of(match[2] or "") if match else None
        if match is None or metric is None or given is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if given.keys() == {*metric.labels, *constant} and all(given[name] == constant[name] for name in constant):
            found[metric.name, tuple(given[name] for name in metric.labels)] = value
    return found


def carried(previous: Mapping[Key, float], values: Mapping[Key, float]) -> dict[Key, float]:
    """Return this run's values on top of an earlier run's: counters added, lasting gauges kept where not measured anew."""
    measured = {name for name, _ in values}
    kept = {
        key: value
        for key, value in previous.items()
        if METRICS[key[0]].type == "counter" or (METRICS[key[0]].lasting and key[0] not in measured)
    }
    added = {key: value + kept.get(key, 0.0) if METRICS[key[0]].type == "counter" else value for key, value in values.items()}
    return kept | added


def shown(value: str) -> str:
    """Return a label's value without control characters and of a bounded length: reasons and kinds may come from data."""
    return short(value, _MAX_LABEL_CHARACTERS)


def read_textfile(path: Path, *, labels: Mapping[str, str] | None = None) -> dict[Key, float]:
    """Return the values of an earlier run; nothing where there was none, or where the file is not ours."""
    try:
        with path.open("rb") as file:
            return parse_prometheus(file.read(MAX_TEXTFILE_BYTES).decode("utf-8", "replace"), labels=labels)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unusable(path, error) from error


def write_textfile(path: Path, text: str) -> None:
    """Replace a file in one step, readable for the collector, which runs as another user."""
    try:
        # The collector reads *.prom: the name of the temporary file must not match.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8"))
                os.fchmod(file.fileno(), 0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(f"the metrics file {path} cannot be used: {error.strerror or error}. Name a file in a folder that you may write to.")


def _labelled(metric: Metric, given: tuple[str, ...], constant: Mapping[str, str]) -> str:
    assert len(given) == len(metric.labels), f"{metric.name} has labels {metric.labels}, not the {len(given)} values {given}"
    assert not constant.keys() & set(metric.labels), f"{metric.name} has a label of its own among {sorted(constant)}"
    pairs: Iterable[tuple[str, str]] = [*constant.items(), *zip(metric.labels, given, strict=True)]
    assert all(_LABEL_NAME.fullmatch(name) for name, _ in pairs), pairs
    return "{" + ",".join(f'{name}="{_escaped(shown(value))}"' for name, value in pairs) + "}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _labels_of(text: str) -> dict[str, str] | None:
    """Read the inside of the braces, or None where it has another form."""
    found = dict(_pairs(text))
    return found if ",".join(f'{name}="{_escaped(value)}"' for name, value in found.items()) == text.removesuffix(",") else None


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for match in _LABEL.finditer(text):
        yield match[1], re.sub(r"\\.", lambda escape: _ESCAPES.get(escape[0], escape[0]), match[2])


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))
