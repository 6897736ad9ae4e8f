"""The record of a run: its events and its state, kept in the store whatever the run came to, and its metrics, told beside it."""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.logs import LogLines, event
from jobs.pushing import open_gateway, push_run, push_values
from jobs.settings import Settings
from jobs.watching import Beacon
from pipelines.errors import AlreadyExists, CatalogEmbedError, LeaseHeld, ManifestError, NotFound, StoreError
from pipelines.gates import verdicts
from pipelines.generation import Ran
from pipelines.layout import run_of
from pipelines.manifest import Manifest
from pipelines.metrics import Key, carried, read_textfile, render_prometheus, write_textfile
from pipelines.plan import Plan
from pipelines.storage import Store
from pipelines.summary import RunFacts, cost_of, metrics_of
from pipelines.telemetry import Listener, Recorder, error_text

INTERRUPTED = 14
WORK_FORMAT = 2


class Record:
    """One run, from its first event to its last."""

    def __init__(self, store: Store, settings: Settings, *, command: str, recorder: Recorder, run_id: str, now: datetime) -> None:
        self.store, self.recorder, self.run_id = store, recorder, run_id
        self.ran: Ran | None = None
        self._settings = settings
        self.facts = RunFacts(
            run_id=run_id, command=command, alias=settings.publish.alias, outcome="failed", exit_code=1, started_at=now, ended_at=now
        )

    def planned(self, plan: Plan) -> None:
        """Note what the run is about to do."""
        actions, embedding = plan.actions, plan.embedding
        counts = {"add": actions.add, "text": actions.text, "attr": actions.attr, "delete": actions.delete}
        texts = {"texts": embedding.texts - embedding.reused, "reused": embedding.reused, "tokens": embedding.tokens}
        self.facts = replace(self.facts, base=plan.base, planned=counts | texts)
        self.recorder.event("run.planned", base=plan.base or "none", plan=counts)

    def resume(self, work: str, *, into: str, intent: str | None = None) -> str:
        """Return the name under which this very work was begun before, or `into`: its parts are where they were left.

        Where other runs have left parts since, the work is dealt out anew around them, so it is another run's; what the
        earlier one paid for is copied. Work with an `intent`, to make vectors again, goes on with a run that was cut off, and
        never with one that was finished.
        """
        parts = [info.key for info in self.store.list("vectors") if info.key.rpartition("/")[2].startswith("part-")]
        if intent is not None:
            mine = self.begun(intent)
            parts = [key for key in parts if key.split("/")[1] in mine]
        for run_id, found in self._works():
            if found == _begun(work, parts, run_id, intent) and not (intent and self._finished(run_id)):
                self.recorder.event("run.resumed", earlier=run_id)
                return run_id
        self.store.put(f"runs/{into}/work.json", json.dumps(_begun(work, parts, into, intent)).encode())
        return into

    def begun(self, intent: str | None) -> frozenset[str]:
        """Return the runs that have begun to make the same vectors again."""
        return frozenset(run_id for run_id, found in self._works() if intent is not None and found.get("intent") == intent)

    def settle(self, intent: str | None) -> None:
        """Forget who began this: a generation has it, and who asks for it from now on wants it once more."""
        keys = [f"runs/{run_id}/work.json" for run_id in self.begun(intent)]
        for key in keys:
            self.store.delete(key)

    def waits(self, why: str) -> None:
        """Tell that another run has to end first."""
        self.recorder.event("lease.waits", why=why)

    def _works(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for info in self.store.list("runs"):
            if info.key.endswith("/work.json"):
                with suppress(NotFound):  # settled since the listing
                    yield info.key.split("/")[1], json.loads(self.store.get(info.key))

    def _finished(self, run_id: str) -> bool:
        """Say whether a generation was written from a run's parts."""
        keys = [info.key for info in self.store.list("generations") if info.key.endswith("/manifest.json")]
        return any(Manifest.from_json(self.store.get(key), where=self.store.uri(key)).run_id == run_id for key in keys)

    def ended(self, ran: Ran) -> None:
        """Note what the run came to."""
        self.ran = ran
        embedded, plan = ran.embedded, ran.plan
        actual = {"read": plan.rows.read, "quarantined": sum(ran.quarantined.values())}
        if ran.generation is not None and embedded is not None:
            actions = plan.actions
            actual |= {"add": actions.add, "text": actions.text, "attr": actions.attr, "delete": actions.delete}
            actual |= {"texts": embedded.texts, "reused": plan.embedding.reused, "tokens": embedded.tokens}
            actual |= {"embedded_texts": embedded.texts, "embedded_tokens": embedded.tokens}
            actual |= {"halvings": embedded.halvings}
        price = self._settings.embed.cost_per_hour
        seconds = embedded.seconds if embedded else 0.0
        self.facts = replace(
            self.facts,
            outcome=ran.outcome,
            exit_code=ran.exit_code,
            generation=ran.generation,
            actual=actual,
            quarantined=ran.quarantined,
            retries={"embed": embedded.retries} if embedded and embedded.retries else {},
            index_action=ran.index.action if ran.index else None,
            index_reason=ran.index.reason if ran.index else None,
            guards={guard.name: guard.passed for guard in (*plan.guards, *ran.guards)},
            gates=verdicts(ran.gates),
            recall=ran.recall,
            bytes_written=ran.bytes_written,
            generation_bytes=ran.bytes_total or None,
            alias_seq=ran.entry.seq if ran.entry else None,
            in_step=ran.in_step,
            held=ran.held,
            error="; ".join(f"guard {guard.name}: {guard.advice}" for guard in ran.guards) or None,
            actor_s=seconds,
            actor_wait_s=embedded.waited if embedded else None,
            cost=cost_of(seconds, per_hour=price) if embedded else None,
            currency=self._settings.embed.currency if price is not None else "",
        )
        self.recorder.event("run.ended", outcome=ran.outcome, generation=ran.generation or "none", exit_code=ran.exit_code)

    def close(self, events: Path) -> None:
        """Write events, state and metrics. What cannot be written is told and changes no outcome."""
        self.facts = replace(self.facts, ended_at=datetime.now(tz=UTC), stages=self.recorder.stages)
        kept: Mapping[str, Callable[[], object]] = {
            "record.unwritten": lambda: self._keep(events),
            "metrics.unwritten": lambda: _write_run(self._settings, metrics_of(self.facts)),
            "metrics.unpushed": lambda: _push_run(self._settings, metrics_of(self.facts)),
        }
        # Each by itself: when the store is down, the metrics are what tells of it.
        for name, keep in kept.items():
            try:
                keep()
            except CatalogEmbedError as error:
                self.recorder.event(name, level="warning", error=error_text(error))

    def _keep(self, events: Path) -> None:
        if events.exists():
            self.store.put(f"runs/{self.run_id}/events.jsonl", self.recorder.finished())
        self.store.put(f"runs/{self.run_id}/state.json", self.facts.to_json())


def metric_labels(settings: Settings) -> dict[str, str]:
    """Return what tells this project's metrics from another's."""
    return {"project": settings.project.project, "alias": settings.publish.alias}


def note_metrics(settings: Settings, values: Mapping[Key, float]) -> None:
    """Set single metrics, in the textfile and at the gateway, and leave the others as they are."""
    place, gateway, labels = settings.publish.metrics, settings.publish.pushgateway, metric_labels(settings)
    if place is not None:
        write_textfile(Path(place), render_prometheus(read_textfile(Path(place), labels=labels) | dict(values), labels=labels))
    if gateway is not None:
        try:
            push_values(open_gateway(gateway, labels), values)
        except CatalogEmbedError as error:
            event("metrics.unpushed", level="warning", error=error_text(error))


def _write_run(settings: Settings, values: Mapping[Key, float]) -> None:
    place, labels = settings.publish.metrics, metric_labels(settings)
    if place is not None:
        before = read_textfile(Path(place), labels=labels)
        write_textfile(Path(place), render_prometheus(carried(before, values), labels=labels))


def _push_run(settings: Settings, values: Mapping[Key, float]) -> None:
    if settings.publish.pushgateway is not None:
        push_run(open_gateway(settings.publish.pushgateway, metric_labels(settings)), values)


def _beside(parts: Sequence[str], run_id: str) -> str:
    """Hash which parts there are beside those of a run."""
    return hashlib.sha256("\n".join(key for key in parts if not key.startswith(f"vectors/{run_id}/")).encode()).hexdigest()


def _begun(work: str, parts: Sequence[str], run_id: str, intent: str | None) -> dict[str, Any]:
    """Return what `work.json` says of work that was begun under a name."""
    return {"format": WORK_FORMAT, "work": work, "beside": _beside(parts, run_id), "intent": intent}


def new_run_id(now: datetime) -> str:
    """Return a name that sorts by time and that no other run has."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


@contextmanager
def open_record(settings: Settings, *, command: str, listeners: Sequence[Listener] = ()) -> Iterator[Record]:
    """Record a run while the block runs; an error is recorded and goes on."""
    now = datetime.now(tz=UTC)
    run_id = new_run_id(now)
    store = Store.open(settings.store.root, options=settings.store.options)
    with tempfile.TemporaryDirectory(prefix="catalog-embed-") as folder:
        events = Path(folder) / "events.jsonl"
        recorder = Recorder(
            run_id,
            path=events,
            listeners=[LogLines(), Beacon(settings.store.root, settings.store.options, run_id=run_id, command=command), *listeners],
        )
        record = Record(store, settings, command=command, recorder=recorder, run_id=run_id, now=now)
        try:
            yield record
        except (LeaseHeld, AlreadyExists) as error:
            record.facts = replace(record.facts, exit_code=error.exit_code, lease_conflicts=1, error=error_text(error))
            raise
        except KeyboardInterrupt:
            record.facts = replace(record.facts, outcome="interrupted", exit_code=INTERRUPTED)
            raise
        except Exception as error:
            record.facts = replace(record.facts, exit_code=getattr(error, "exit_code", 1), error=error_text(error))
            raise
        finally:
            record.close(events)


def all_runs(store: Store) -> Mapping[str, RunFacts | None]:
    """Return the state of every run by its id, oldest first; None for one whose state cannot be read: it was killed, or still runs."""
    found: dict[str, RunFacts | None] = {}
    for info in store.list("runs"):
        run_id = run_of(info.key.split("/")[1])
        found.setdefault(run_id, None)
        if info.key.endswith("/state.json"):
            with suppress(NotFound, StoreError, ManifestError):
                found[run_id] = RunFacts.from_json(store.get(info.key), where=store.uri(info.key))
    return dict(sorted(found.items()))
