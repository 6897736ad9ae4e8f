"""What training and evaluation read: the catalog's texts by the very template that indexing renders, and judgments beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from encoder.examples import JUDGMENTS, PRODUCTS, Grades, keys_of
from encoder.judgments import Reading, read_judgments
from jobs.nightly import open_source_of
from jobs.settings import Settings
from pipelines.contracts import Window
from pipelines.errors import InputError
from pipelines.normalize import NormalizeOptions, normalize
from pipelines.schema import DELETED, ID, LOCALE, UPDATED_AT
from pipelines.text import render


def grades_of(settings: Settings) -> Grades:
    """Return the scale of the project's judgments."""
    judged = settings.judgments
    return Grades(names=judged.grades, positive=judged.grades.index(judged.positive))


def products_of(settings: Settings) -> pa.Table:
    """Read the whole catalog once: a row for each live product, as PRODUCTS has them, the columns of the catalog behind.

    Of rows with one id the newest counts, and of equally old ones the last, as in the index.
    """
    window = Window(since=None, until=datetime.now(tz=UTC))
    options, template = settings.normalizing(window), settings.template
    columns = {name: getattr(settings.judgments, name) for name in ("group", "vertical")}
    for role, name in columns.items():
        if name is not None and name not in options.schema.fields:
            raise InputError(
                f"`judgments: {role}` is `{name}`, which is no column of a product. Add it to `document: filters`; "
                f"there are: {', '.join(options.schema.fields)}."
            )
    tables = []
    for batch in _batches(settings, window, options):
        texts = render(template, batch)
        known = {"locale": batch[LOCALE], "product_id": batch[ID], "text": texts}
        known |= {role: _words(batch, name) for role, name in columns.items()}
        more = {name: batch[name] for name in batch.column_names if name not in {ID, LOCALE, DELETED, UPDATED_AT, *known}}
        table = pa.table({name: known[name] for name in PRODUCTS.names} | more | {UPDATED_AT: batch[UPDATED_AT], DELETED: batch[DELETED]})
        tables.append(table.filter(pc.or_(pc.greater(pc.binary_length(texts), 0), batch[DELETED])))
    if not tables:
        raise InputError(f"the catalog at {settings.source.path} has no product. Look with `catalog-embed plan --since beginning`.")
    return _newest(pa.concat_tables(tables)).combine_chunks()


def judgments_of(settings: Settings, products: pa.Table, *, path: Path | None = None, queries: Path | None = None) -> pa.Table:
    """Read judgments, the configured ones unless others are given; without locales of their own they take the products'."""
    judged = settings.judgments
    place = path or (Path(judged.path) if judged.path else None)
    if place is None:
        raise InputError("there are no judgments: give --judgments FILE, or set `judgments: { path: ... }` in the configuration.")
    asked = queries or (Path(judged.queries) if judged.queries and path is None else None)
    reading = Reading(columns=judged.columns, labels=judged.labels, where=judged.where, conflicts=judged.conflicts)
    table = read_judgments(place, queries=asked, grades=grades_of(settings), reading=reading)
    if not pc.any(pc.not_equal(table["locale"], "")).as_py():
        table = _with_locales(table, products)
    locales = table.group_by("query_id").aggregate([("locale", "count_distinct")])
    if several := locales.filter(pc.greater(locales["locale_count_distinct"], 1))["query_id"].to_pylist():
        raise InputError(
            f"{place}: {len(several)} query ids have products of more than one locale, {several[0]!r} for one, and a query is answered from "
            "those of one. Give each locale's query its own id, or leave those products out."
        )
    judged_keys, known_keys = (keys_of("product", side["locale"], side["product_id"]) for side in (table, products))
    if not np.isin(judged_keys, known_keys).any():
        raise InputError(
            f"none of {table.num_rows} judged products of {place} is among the {products.num_rows} of the catalog, "
            f"{table['product_id'][0].as_py()!r} for one. Check its ids and locales, and `judgments: columns`."
        )
    return table


def read_table(path: Path, what: str, columns: Sequence[str] = ()) -> pa.Table:
    """Read a file that another command wrote, or an export, as Parquet or CSV; a column that is wanted and lacking is refused."""
    if not path.is_file():
        raise InputError(f"{path} is no file. Give the {what}, as Parquet or .csv.")
    try:
        # 007 is an id, in a text file as well.
        ids = pa_csv.ConvertOptions(column_types=dict.fromkeys(("query_id", "query", "locale", "product_id"), pa.string()))
        table = pa_csv.read_csv(path, convert_options=ids) if path.suffix == ".csv" else pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as {what}: {str(error)[:200]}. Give a whole Parquet file, or a .csv.") from error
    if lacking := [name for name in columns if name not in table.column_names]:
        raise InputError(f"{path} is no file of {what}: it lacks {', '.join(lacking)}, and has {', '.join(table.column_names)}.")
    return table


def made_folder(path: Path) -> Path:
    """Make a folder, if it is not there, before anything is computed that shall go into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}. Choose a folder that you may write to.") from error
    return path


def _batches(settings: Settings, window: Window, options: NormalizeOptions) -> Iterator[pa.Table]:
    """Yield normalised batches of the whole source."""
    for shard in open_source_of(settings).read(window):
        row = 0
        for batch in shard.open():
            yield normalize(batch, options, shard=shard.name, first_row=row).products.combine_chunks()
            row += batch.num_rows


def _newest(table: pa.Table) -> pa.Table:
    """Keep one row of each id, and none of deleted products."""
    numbered = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    order = pc.sort_indices(numbered, sort_keys=[("product_id", "ascending"), (UPDATED_AT, "ascending", "at_start"), ("row", "ascending")])
    ordered = numbered.take(order)
    ids = ordered["product_id"].combine_chunks()
    last = pa.concat_arrays([pc.not_equal(ids[:-1], ids[1:]), pa.array([True])])
    kept = ordered.filter(pc.and_(last, pc.invert(ordered[DELETED].combine_chunks()))).sort_by("row")
    return kept.drop_columns(["row", UPDATED_AT, DELETED])


def _words(batch: pa.Table, name: str | None) -> pa.Array:
    """Return a column as words, empty where there is nothing."""
    if name is None:
        return pa.repeat("", batch.num_rows)
    return pc.fill_null(batch[name].combine_chunks().cast(pa.string()), "")


def _with_locales(judgments: pa.Table, products: pa.Table) -> pa.Table:
    """Give judgments the locales of their products; what no product has is given that of its query, and is counted as missing later."""
    at = pc.index_in(judgments["product_id"].combine_chunks(), products["product_id"].combine_chunks())
    found = products["locale"].combine_chunks().take(at)
    # Not "": a query is one query in one language, and a judgment of another locale would make it two.
    own = {query: locale for query, locale in zip(judgments["query_id"].to_pylist(), found.to_pylist(), strict=True) if locale is not None}
    rest = pa.array([own.get(query, "") for query in judgments["query_id"].to_pylist()], pa.string())
    locale = pc.coalesce(found, rest)
    return judgments.set_column(judgments.schema.get_field_index("locale"), "locale", locale).select(JUDGMENTS.names)
