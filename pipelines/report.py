"""Plans as a person reads them: plain text of a fixed layout, no colour, no terminal needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from zoneinfo import ZoneInfo

from pipelines.layout import byte_size, counted, duration, millions, printable, short
from pipelines.normalize.reasons import REASONS
from pipelines.plan import Guard, Plan

# Reasons that are found after normalising, where two rows or a whole text are known, or a tower has failed on it.
LATE_REASONS: Mapping[str, tuple[str, str]] = {
    "empty_text": ("the template renders to nothing", "Fill a field that the template reads, or exclude the row."),
    "duplicate_id": ("another row has the same id, is equally new and says something else", "Keep one row for each id."),
    "embed_failed": (
        "the tower raised an error on this text alone",
        "Look at the text with `explain`; `backfill --reason embed_failed` tries again.",
    ),
    "embed_killed": (
        "this text alone ended the worker that embedded it",
        "Look for a huge or odd text; `backfill --reason embed_killed` tries again.",
    ),
    "embed_not_finite": ("the vector of this text is not finite, or all zeros", "Try float32, then `backfill --reason embed_not_finite`."),
}

_SAMPLE_CHARACTERS = 120


def plan_text(plan: Plan, *, explain: bool = False, samples: Mapping[str, Sequence[tuple[str, str]]] | None = None) -> str:
    """Lay a plan out on a screen."""
    lines = [*_head(plan), *_body(plan), *_guards(plan)]
    if samples:
        lines += ["", "Samples"]
        lines += [
            f"  {action:<8}  {printable(name)}  {short(text, _SAMPLE_CHARACTERS)}".rstrip()
            for action, items in samples.items()
            for name, text in items
        ]
    if explain:
        lines += ["", *_explained(plan)]
    return "\n".join(lines) + "\n"


def _head(plan: Plan) -> Iterator[str]:
    title = f"Plan  {plan.alias}  {plan.base or '(nothing published)'} -> (new)"
    yield f"{title:<52}rows read {plan.rows.read:,}"
    tz = ZoneInfo(plan.zone)
    since = "beginning" if plan.window.since is None else _local(plan.window.since, tz)
    back = f" (lookback {duration(plan.lookback_s)})" if plan.window.since is not None and plan.lookback_s else ""
    yield f"  window    {since} .. {_local(plan.window.until, tz)} {plan.zone}{back}"
    yield f"  source    {plan.source.kind} {printable(plan.source.address)}, {counted(len(plan.source.objects), 'object')}, {byte_size(plan.source.bytes)}, pin {plan.source.digest[:12]}"


def _body(plan: Plan) -> Iterator[str]:
    actions, rows, embedding = plan.actions, plan.rows, plan.embedding
    share = f" ({actions.delete / plan.base_live:.2%})" if plan.base_live else ""
    yield f"  products  + {actions.add:,} new   ~ {actions.text:,} text   . {actions.attr:,} attributes only   - {actions.delete:,} deleted{share}   = {actions.same:,} same"
    yield f"  rows      {rows.live:,} live   {rows.deleted:,} tombstones   {rows.duplicate:,} duplicates   {rows.quarantined:,} quarantined"
    if embedding.rows:
        saved = embedding.rows - embedding.texts
        yield f"  embed     {counted(embedding.texts - embedding.reused, 'text')} ({saved:,} identical, {embedding.reused:,} embedded before), about {millions(embedding.tokens)} tokens"
    else:
        yield "  embed     nothing: no forward pass"
    if not plan.deletes_checked:
        yield f"  WARNING   deletes: NOT CHECKED (--deletes {plan.deletes}); products that vanished from the feed stay in the index"
    if plan.unseen:
        yield f"  WARNING   {counted(plan.unseen, 'product')} in the catalog but in neither the window nor the index; run `plan --since beginning`"
    for note in plan.notes:
        yield f"  note      {note}"
    if not actions.changed and not plan.failed:
        yield "  nothing to do: the index is in step with the catalog"


def _guards(plan: Plan) -> Iterator[str]:
    if not plan.failed:
        yield f"  guards    {len(plan.guards)} passed: {', '.join(guard.name for guard in plan.guards)}"
    for guard in plan.failed:
        yield f"  GUARD     {guard.name}: {_measured(guard)}, limit {_limit(guard)} (exit {guard.exit_code}). {guard.advice}"


def _explained(plan: Plan) -> Iterator[str]:
    yield "Explained"
    yield f"  template  {printable(plan.template)}"
    yield f"            digest {plan.template_digest[:12]}; a product is embedded again only when its rendered text changes"
    yield f"  columns   schema digest {plan.schema_digest[:12]}; a change of filter columns alone rewrites no vector"
    yield f"  deletes   {_deletes(plan)}"
    if plan.newest is not None:
        yield f"  newest    {_local(plan.newest, ZoneInfo(plan.zone))} {plan.zone}"
    for guard in plan.guards:
        yield f"  guard     {guard.name}: {_measured(guard)}, limit {_limit(guard)}: {'passed' if guard.passed else 'FAILED'}"
    if plan.rejected:
        yield "  quarantined rows, by reason"
        yield from _reasons(plan.rejected)
    if plan.repaired:
        yield "  repaired cells, by reason"
        yield from _reasons(plan.repaired)


def _reasons(counts: Mapping[str, int]) -> Iterator[str]:
    for code, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        known = REASONS.get(code)
        meaning, advice = (known.meaning, known.advice) if known else LATE_REASONS[code]
        yield f"    {count:>9,}  {code}: {meaning}. {advice}"


def _deletes(plan: Plan) -> str:
    if plan.deletes == "off":
        return "off: nothing is deleted, tombstones included"
    if plan.deletes == "tombstones":
        return "tombstones only: a product that vanishes from the feed stays"
    return (
        "whole catalog read: absent products and tombstones go"
        if plan.window.full
        else "window read and all ids scanned: absent products and tombstones go"
    )


def _measured(guard: Guard) -> str:
    return duration(guard.measured) if guard.name == "freshness" else f"{guard.measured:.4%}"


def _limit(guard: Guard) -> str:
    return duration(guard.limit) if guard.name == "freshness" else f"{guard.limit:.4%}"


def _local(moment: datetime, tz: ZoneInfo) -> str:
    return moment.astimezone(tz).strftime("%Y-%m-%d %H:%M%z")
