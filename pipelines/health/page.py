"""A report as one page of HTML that needs nothing else: no script, no file, no network. Every text of the catalog is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipelines.health.churn import CAME, WENT, Churn, Moved
from pipelines.health.indexes import Bar, FaissHealth, LanceHealth, Lists
from pipelines.health.measuring import Compared, Report
from pipelines.health.parity import Mean, Parity
from pipelines.health.text import moves_text
from pipelines.layout import byte_size, short

# The page asks browsers to load nothing and run nothing, whatever is in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --bar: #3b6ea8; --line: #8884 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; margin: .5rem 0 1rem }
th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
td.n { text-align: right; font-variant-numeric: tabular-nums }
dt { font-weight: 600; float: left; clear: left; width: 8rem } dd { margin-left: 8.5rem }
svg text { font: 11px system-ui, sans-serif; fill: currentColor } svg rect { fill: var(--bar) }
.wrong { color: #b3261e } .right { color: #2e7d32 } .note { color: #8a6100 } small { opacity: .75 }
"""
_NAME = 120
_ROW, _LABEL, _WIDTH = 18, 110, 420

Cell = str | int | float


def page(report: Report) -> str:
    """Return the whole page."""
    title = f"Index report {report.generation}"
    sections = (_head, _faiss, _lance, _agreement, _since)
    body = "\n".join(piece for section in sections for piece in section(report))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _head(report: Report) -> Iterator[str]:
    yield f"<h1>Index report {_text(report.generation)}</h1>"
    facts = {
        "made": f"{report.created_at:%Y-%m-%d %H:%M} UTC",
        "products": f"{report.live:,}",
        "tower": report.tower[:12],
        "plan": ", ".join(f"{name} {count:,}" for name, count in report.planned.items()),
        "compared with": report.compared.generation if report.compared else "nothing",
    }
    yield _facts(facts)
    yield from _notes(report.notes)
    yield _table(("bytes", ""), [(kind, byte_size(size)) for kind, size in report.bytes.items()])


def _faiss(report: Report) -> Iterator[str]:
    index, use = report.faiss, report.faiss.use
    yield "<h2>FAISS</h2>"
    facts = {"index": index.factory or "none: no product is live"}
    if use is not None:
        facts |= {"made": use.action, "asked for by": use.trigger or "the night's own changes", "reason": use.reason}
    if index.lists:
        facts["a query"] = f"visits {index.nprobe:,} of {index.lists.count:,} lists; refine {index.refine}"
    if use is not None and use.recall is not None:
        facts["tuned"] = f"recall {use.recall:.4f}" + (f" for a target of {use.target:.4g}" if use.target is not None else "")
    facts["entries"] = f"{index.entries:,}: {index.live:,} live, {index.entries - index.live:,} hidden by tombstones"
    yield _facts(facts)
    yield _segments(index)
    if index.lists:
        yield from _lists(index.lists, "Lists by size, in multiples of the average")
    if index.drift:
        rows = [("now", index.drift.now), ("after training", index.drift.trained), ("deltas alone", index.drift.deltas)]
        yield "<h3>Drift</h3><p>How far live entries lie from their centroids: one minus the cosine, on average.</p>"
        shown = [(name, f"{value:.4f}", _times(index, value)) for name, value in rows if value is not None]
        yield _table(("entries", "distance", "against training"), shown)


def _segments(index: FaissHealth) -> str:
    rows = [(item.name, item.kind, item.live, item.dead, byte_size(item.bytes), *_spread(index, item.spread)) for item in index.segments]
    return _table(("segment", "kind", "live", "dead", "bytes", "distance", "against training"), rows)


def _spread(index: FaissHealth, spread: float | None) -> tuple[str, str]:
    return ("", "") if spread is None else (f"{spread:.4f}", _times(index, spread))


def _times(index: FaissHealth, spread: float) -> str:
    times = index.drift.times(spread) if index.drift else None
    return "" if times is None else f"{times:.2f} times"


def _lists(lists: Lists, title: str) -> Iterator[str]:
    facts = {"lists": f"{lists.count:,}, {lists.mean:,.1f} entries on average, largest {lists.largest:,}"}
    if lists.empty is not None:
        facts["empty"] = f"{lists.empty:,}"
    if lists.quantiles:
        facts["quantiles"] = ", ".join(f"{share} {size:,}" for share, size in lists.quantiles.items())
    trained = f", {lists.trained_imbalance:.2f} after training" if lists.trained_imbalance is not None else ""
    facts["imbalance"] = f"{lists.imbalance:.2f}{trained}"
    yield _facts(facts)
    yield _histogram(lists.bars, title)


def _lance(report: Report) -> Iterator[str]:
    table = report.lance
    yield "<h2>Lance</h2>"
    facts = {"made": f"{table.use.action}: {table.use.reason}"} if table.use else {}
    facts["table"] = f"version {table.version}: {table.rows:,} rows, {table.deleted_rows:,} deleted, {table.fragments:,} fragments"
    facts["bytes"] = f"data {byte_size(table.data_bytes)}, indexes {byte_size(table.index_bytes)}"
    facts["vector index"] = _pieces(table)
    yield _facts(facts)
    if table.lists:
        yield from _lists(table.lists, "Partitions by their rows")


def _pieces(table: LanceHealth) -> str:
    if table.kind is None:
        return "none, every row is compared"
    return f"{table.kind} in {len(table.piece_rows):,} pieces; {table.unindexed:,} rows are in none"


def _agreement(report: Report) -> Iterator[str]:
    if report.parity is None:
        return
    yield f"<h2>Recall and parity</h2><p>Asked with {report.questions:,} of {report.questions_total:,} {_text(report.asked)}.</p>"
    rows: list[tuple[Cell, ...]] = [(engine, *_mean(mean), "as asked") for engine, mean in report.recall.items()]
    rows += [(engine, *_mean(mean), "moved to where shoppers ask from") for engine, mean in report.border_recall.items()]
    rows.append(("same in both", *_mean(report.parity.overlap), "as asked"))
    yield _table(("recall at 10", "mean", "standard error", "queries", ""), rows)
    yield _histogram(_tenths(report.parity.tenths), "Queries by how many of ten answers are the same in FAISS and Lance")
    yield from _disagreements(report, report.parity)


def _disagreements(report: Report, parity: Parity) -> Iterator[str]:
    for query in parity.worst:
        recall = ", ".join(f"{engine} {value:.1f}" for engine, value in query.recall.items())
        yield f"<h3>{_named(report, query.query)}</h3><p>{query.overlap:.0%} the same; recall {_text(recall)}</p>"
        yield "<table><tr><th>found only by</th><th>place</th><th>exact search</th><th>product</th></tr>"
        for product in query.products:
            word = "right" if product.right else "wrong"
            yield f'<tr><td>{_text(product.engine)}</td><td class="n">{product.rank}</td><td class="{word}">{word}</td><td>{_named(report, product.id)}</td></tr>'
        yield "</table>"


def _since(report: Report) -> Iterator[str]:
    compared = report.compared
    if compared is None:
        return
    yield f"<h2>Against {_text(compared.generation)}</h2>"
    yield _facts({"made": f"{compared.created_at:%Y-%m-%d %H:%M} UTC", "products": f"{compared.live:,}"})
    yield from _notes(compared.notes)
    if compared.centroids:
        yield _facts({"centroids": moves_text(compared.centroids)})
    if compared.churn:
        yield from _churn(report, compared, compared.churn)


def _churn(report: Report, compared: Compared, churn: Churn) -> Iterator[str]:
    mean, error, count = _mean(churn.overlap)
    yield f"<p>{mean} of the answers stayed (standard error {error}); {churn.changed:,} of {count:,} queries changed.</p>"
    yield _histogram(_tenths(churn.tenths), "Queries by how many of ten answers stayed")
    reasons = [("came", CAME[reason], count) for reason, count in churn.came.items()]
    reasons += [("went", WENT[reason], count) for reason, count in churn.went.items()]
    yield _table(("", "reason", "products"), reasons)
    for query in churn.worst:
        yield f"<h3>{_named(report, query.query)}</h3><p>{query.overlap:.0%} stayed</p>"
        yield "<table><tr><th></th><th>place</th><th>product</th><th>reason</th></tr>"
        yield from _moved(report, "went", query.went, WENT, compared.generation)
        yield from _moved(report, "came", query.came, CAME, report.generation)
        yield "</table>"


def _moved(report: Report, word: str, moved: Sequence[Moved], meanings: Mapping[str, str], where: str) -> Iterator[str]:
    for product in moved:
        cells = f'<td>{word}</td><td class="n">{product.rank} in {_text(where)}</td><td>{_named(report, product.id)}</td>'
        yield f"<tr>{cells}<td>{_text(meanings[product.reason])}</td></tr>"


def _tenths(tenths: Sequence[int]) -> list[Bar]:
    return [Bar(label=str(share), count=count) for share, count in enumerate(tenths)]


def _histogram(bars: Sequence[Bar], title: str) -> str:
    """Draw bars from left to right, one a row, each with its label and its count."""
    most = max((bar.count for bar in bars), default=0) or 1
    rows = []
    for number, bar in enumerate(bars):
        top, width = number * _ROW, _WIDTH * bar.count / most
        rows.append(f'<text x="{_LABEL - 8}" y="{top + 13}" text-anchor="end">{_text(bar.label)}</text>')
        rows.append(f'<rect x="{_LABEL}" y="{top + 3}" width="{width:.1f}" height="{_ROW - 5}"/>')
        rows.append(f'<text x="{_LABEL + width + 5:.1f}" y="{top + 13}">{bar.count:,}</text>')
    size = f'width="{_LABEL + _WIDTH + 80}" height="{len(bars) * _ROW + 4}"'
    return (
        f'<figure><figcaption>{_text(title)}</figcaption><svg role="img" aria-label="{_text(title)}" {size}>{"".join(rows)}</svg></figure>'
    )


def _facts(facts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in facts.items() if value)}</dl>"


def _notes(notes: Iterable[str]) -> Iterator[str]:
    for note in notes:
        yield f'<p class="note">{_text(note)}</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    lines = ["".join(f"<th>{_text(name)}</th>" for name in head)]
    lines += ["".join(_cell(value) for value in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(value: Cell) -> str:
    return f"<td>{_text(value)}</td>" if isinstance(value, str) else f'<td class="n">{value:,}</td>'


def _named(report: Report, name: str) -> str:
    """Show a product or a query; `bdi` keeps a text that runs from right to left from turning what is beside it."""
    label = report.labels.get(name)
    return f"<bdi>{_text(name)}</bdi>" + (f" <small><bdi>{_text(label)}</bdi></small>" if label else "")


def _mean(mean: Mean) -> tuple[str, str, int]:
    return f"{mean.mean:.4f}", f"{mean.error:.4f}", mean.queries


def _text(text: str) -> str:
    """Make a text harmless: what is not printable is spelled out, what means something in HTML is escaped."""
    return html.escape(short(text, _NAME * 4), quote=True)
