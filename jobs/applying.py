"""Carry out a saved plan, if the catalog and the published generation are still those that it was made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jobs.nightly import Bases, Night, Work, open_bases, plan_request, started
from jobs.records import Record
from jobs.settings import Settings
from pipelines.errors import InputError, PlanError, SourceMoved
from pipelines.generation import Located
from pipelines.plan import Plan
from pipelines.planning import PLAN_FILES, PlanRequest, file_sha256
from pipelines.schema import PUBLISHED
from pipelines.spool import Spool
from pipelines.stores.lance import read_published


def apply_plan(settings: Settings, night: Night, directory: Path) -> Record:
    """Carry out the plan that `plan --out` saved in a folder."""
    directory = directory.resolve()
    plan = read_plan(directory)
    with started(settings, night) as work:
        bases = open_bases(settings, night)
        request = plan_request(settings, night, bases)
        request = replace(request, window=plan.window, deletes=plan.deletes, normalizing=settings.normalizing(plan.window))
        _check(plan, bases, request)
        now = work.source.snapshot()
        if now != plan.source:
            raise SourceMoved(f"the catalog changed since the plan was made ({'; '.join(plan.source.moved(now)[:3])}). Plan again.")
        work.finish(
            Located(
                plan=plan,
                changes=directory / "changes.parquet",
                quarantine=directory / "quarantine.parquet",
                previous=_previous(work, bases),
                base=bases.extended,
                parent=bases.live.generation if bases.live else None,
                seq=bases.seq,
            ),
            request,
        )
    return work.record


def read_plan(directory: Path) -> Plan:
    """Read a saved plan; all of its files must be there."""
    missing = [name for name in ("plan.json", *PLAN_FILES) if not (directory / name).is_file()]
    if missing:
        raise InputError(f"{directory} holds no whole plan: {', '.join(missing)} is missing. Save one with `plan --out`.")
    path = directory / "plan.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not readable as JSON. Plan again with `plan --out`.") from error
    plan = Plan.from_json(data, where=str(path))
    said = data.get("files")
    changed = [name for name in PLAN_FILES if not isinstance(said, dict) or file_sha256(directory / name) != said.get(name)]
    if changed:
        raise PlanError(f"{directory}: {' and '.join(changed)} changed since the plan was saved. Plan again with `plan --out`.")
    return plan


def _check(plan: Plan, bases: Bases, request: PlanRequest) -> None:
    """Refuse a plan that was made from something else than what is there now."""
    base = bases.extended.generation if bases.extended else None
    pairs = {
        "the alias": (plan.alias, request.alias),
        "the published generation": (plan.base, base),
        "the tower": (plan.tower, request.tower),
        "the template": (plan.template_digest, request.template.digest),
        "the filter columns": (plan.schema_digest, request.normalizing.schema.digest),
    }
    changed = [f"{name} ({str(then)[:16]} -> {str(now)[:16]})" for name, (then, now) in pairs.items() if then != now]
    if changed:
        raise PlanError(f"the plan no longer fits: {', '.join(changed)} changed since it was made. Plan again.")


def _previous(work: Work, bases: Bases) -> Sequence[Path]:
    """Spool the published state once more: the plan keeps changes alone."""
    spool = Spool(work.folder, "previous", PUBLISHED)
    if bases.extended is not None and bases.extended.table is not None:
        table = bases.extended.table
        uri, options = work.options.store.uri(table.uri), work.options.options
        for rows in read_published(uri, version=table.version, options=options):
            spool.add(rows)
    return spool.close()
