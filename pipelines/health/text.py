"""A report as a person reads it on a terminal: plain text of a fixed layout, catalog texts made harmless."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipelines.health.churn import CAME, WENT, CentroidMoves, Churn, Moved
from pipelines.health.indexes import Bar, FaissHealth, LanceHealth, Lists
from pipelines.health.measuring import Compared, Report
from pipelines.health.parity import Mean, Parity
from pipelines.layout import byte_size, counted, printable, short

_NAME, _BAR, _SEGMENTS = 60, 30, 40


def report_text(report: Report) -> str:
    """Lay a report out on a screen."""
    sections = (_head, _faiss, _lance, _agreement, _since)
    return "".join(f"{printable(line.rstrip())}\n" for section in sections for line in section(report))


def _head(report: Report) -> Iterator[str]:
    against = f"  against {report.compared.generation}" if report.compared else ""
    yield f"Report  {report.generation}{against}  {counted(report.live, 'product')}  made {report.created_at:%Y-%m-%d %H:%M} UTC  tower {report.tower[:12]}"
    if report.planned:
        yield f"  plan      {', '.join(f'{name} {count:,}' for name, count in report.planned.items())}"
    yield f"  bytes     {', '.join(f'{kind} {byte_size(size)}' for kind, size in report.bytes.items())}"
    for note in report.notes:
        yield f"  note      {note}"


def _faiss(report: Report) -> Iterator[str]:
    index, use = report.faiss, report.faiss.use
    yield "FAISS"
    if use is None:
        yield "  made      not recorded: the generation is of an older catalog-embed"
    else:
        yield f"  made      {use.action}{f', asked for by {use.trigger}' if use.trigger else ''}: {use.reason}"
    yield f"  index     {index.factory or 'none: no product is live'}{_asked(index)}"
    if use is not None and use.recall is not None:
        goal = f" for a target of {use.target:.4g}" if use.target is not None else ""
        yield f"  tuned     recall {use.recall:.4f}{goal}, on vectors held out of the training"
    dead = index.entries - index.live
    yield f"  segments  {counted(len(index.segments), 'segment')}, {index.entries:,} entries: {index.live:,} live, {dead:,} hidden by tombstones"
    for segment in index.segments[:_SEGMENTS]:
        spread = f"  spread {segment.spread:.4f}{_times(index, segment.spread)}" if segment.spread is not None else ""
        yield f"            {segment.kind:<5}  {segment.live:>12,} live  {segment.dead:>10,} dead  {byte_size(segment.bytes):>9}{spread}  {segment.name}"
    if len(index.segments) > _SEGMENTS:
        yield f"            and {len(index.segments) - _SEGMENTS} more; `--output json` lists all"
    if index.lists:
        yield from _lists(index.lists, "lists")
    if index.drift:
        deltas = f"; deltas alone {index.drift.deltas:.4f}{_times(index, index.drift.deltas)}" if index.drift.deltas is not None else ""
        yield f"  drift     entries lie {index.drift.now:.4f} from their centroids{_times(index, index.drift.now)}, {index.drift.trained:.4f} after training{deltas}"


def _asked(index: FaissHealth) -> str:
    if index.factory is None:
        return ""
    if index.lists is None:
        return ", every vector is compared"
    refine = f", and {index.refine} times as many answers as wanted are scored again" if "Refine" in index.factory else ""
    return f", a query visits {index.nprobe:,} of {index.lists.count:,} lists{refine}"


def _times(index: FaissHealth, spread: float) -> str:
    times = index.drift.times(spread) if index.drift else None
    return f" ({times:.2f}x)" if times is not None else ""


def _lists(lists: Lists, label: str) -> Iterator[str]:
    trained = f", {lists.trained_imbalance:.2f} after training" if lists.trained_imbalance is not None else ""
    empty = f", {lists.empty:,} empty" if lists.empty is not None else ""
    yield f"  {label:<8}  {lists.count:,}, {lists.mean:,.1f} entries on average, largest {lists.largest:,}{empty}; imbalance {lists.imbalance:.2f}{trained}"
    if lists.quantiles:
        yield f"            quantiles {', '.join(f'{share} {size:,}' for share, size in lists.quantiles.items())}"
    yield f"            {'size, in multiples of the average' if lists.quantiles else 'rows of a partition'}, and how many have it:"
    yield from _bars(lists.bars)


def _bars(bars: Sequence[Bar]) -> Iterator[str]:
    most = max((bar.count for bar in bars), default=0)
    for bar in bars:
        if bar.count:
            yield f"            {bar.label:>14}  {bar.count:>8,}  {'#' * max(1, round(_BAR * bar.count / most))}"


def _lance(report: Report) -> Iterator[str]:
    table = report.lance
    yield "Lance"
    if table.use is not None:
        yield f"  made      {table.use.action}{f', asked for by {table.use.trigger}' if table.use.trigger else ''}: {table.use.reason}"
    yield f"  table     version {table.version}, {table.rows:,} rows and {table.deleted_rows:,} deleted in {counted(table.fragments, 'fragment')}, data {byte_size(table.data_bytes)}, indexes {byte_size(table.index_bytes)}"
    yield f"  index     {_vector_index(table)}"
    if table.use is not None and table.use.search:
        recall = f", recall {table.use.recall:.4f} when tuned" if table.use.recall is not None else ""
        yield f"  asked     {', '.join(f'{name} {value}' for name, value in table.use.search.items())}{recall}"
    if table.lists:
        yield from _lists(table.lists, "lists")


def _vector_index(table: LanceHealth) -> str:
    if table.kind is None:
        return "none, every row is compared"
    pieces = ", ".join(f"{rows:,}" for rows in table.piece_rows[:_SEGMENTS])
    behind = f", {table.unindexed:,} rows are in none" if table.unindexed else ""
    return f"{table.kind} in {counted(len(table.piece_rows), 'piece')} of {pieces} rows{behind}"


def _agreement(report: Report) -> Iterator[str]:
    if report.parity is None:
        return
    chosen = f" of {report.questions_total:,}" if report.questions_total > report.questions else ""
    yield f"Asked with {report.questions:,}{chosen} {report.asked}"
    yield f"  recall    {_means(report.recall)} at 10, against exact search"
    if report.border_recall:
        yield f"            {_means(report.border_recall)} on vectors moved to where shoppers ask from"
    parity = report.parity
    yield f"  parity    {_mean(parity.overlap)} of the answers are the same in FAISS and Lance; {parity.differing:,} of {parity.overlap.queries:,} queries differ"
    yield from _bars(_tenths(parity.tenths))
    yield from _disagreements(report, parity)


def _tenths(tenths: Sequence[int]) -> list[Bar]:
    return [Bar(label=f"{share} of 10", count=count) for share, count in enumerate(tenths)][::-1]


def _disagreements(report: Report, parity: Parity) -> Iterator[str]:
    for query in parity.worst:
        recall = ", ".join(f"{engine} {value:.1f}" for engine, value in query.recall.items())
        yield f"  differs   {query.overlap:.0%} the same, right: {recall}   {_named(report, query.query)}"
        for product in query.products:
            yield f"            {product.engine:<5} only  #{product.rank:<2}  {'right' if product.right else 'wrong'}  {_named(report, product.id)}"


def _since(report: Report) -> Iterator[str]:
    compared = report.compared
    if compared is None:
        return
    yield f"Against {compared.generation}, made {compared.created_at:%Y-%m-%d %H:%M} UTC with {counted(compared.live, 'product')}"
    for note in compared.notes:
        yield f"  note      {note}"
    if compared.centroids:
        yield f"  centroids {moves_text(compared.centroids)}"
    if compared.churn:
        yield from _churn(report, compared, compared.churn)


def moves_text(moves: CentroidMoves) -> str:
    """Say how far centroids moved."""
    if moves.same:
        return f"the same {moves.now:,} lists, none moved"
    looked = f"{moves.followed:,} of {moves.before:,}" if moves.followed < moves.before else f"{moves.before:,}"
    if moves.mean is None or moves.largest is None:
        return f"trained anew, {looked} lists before and {moves.now:,} now: none has a counterpart"
    far = f"moved {moves.mean:.4f} on average, {moves.largest:.4f} at most"
    return (
        f"trained anew, {looked} lists before and {moves.now:,} now: {moves.matched:,} with a counterpart {far}; {moves.lost:,} have none"
    )


def _churn(report: Report, compared: Compared, churn: Churn) -> Iterator[str]:
    yield f"  answers   {_mean(churn.overlap)} of the answers stayed; {churn.changed:,} of {churn.overlap.queries:,} queries changed"
    yield from _bars(_tenths(churn.tenths))
    for word, counts, meanings in (("came", churn.came, CAME), ("went", churn.went, WENT)):
        for reason, count in counts.items():
            yield f"  {word:<8}  {count:>8,}  {meanings[reason]}"
    for query in churn.worst:
        yield f"  changed   {query.overlap:.0%} stayed   {_named(report, query.query)}"
        yield from _moved(report, "-", query.went, WENT, compared.generation)
        yield from _moved(report, "+", query.came, CAME, report.generation)


def _moved(report: Report, sign: str, moved: Sequence[Moved], meanings: Mapping[str, str], where: str) -> Iterator[str]:
    for product in moved:
        yield f"            {sign} #{product.rank:<2} in {where}  {_named(report, product.id)}: {meanings[product.reason]}"


def _named(report: Report, name: str) -> str:
    label = report.labels.get(name)
    return short(name, _NAME) + (f" ({short(label, _NAME)})" if label else "")


def _means(means: Mapping[str, Mean]) -> str:
    return ", ".join(f"{name} {_mean(mean)}" for name, mean in means.items())


def _mean(mean: Mean) -> str:
    return f"{mean.mean:.4f} +- {mean.error:.4f}"
