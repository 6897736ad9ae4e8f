"""Graded judgments from files: our own layout, ESCI's and WANDS', as Parquet, CSV or TSV, also compressed with gzip.

A row is either read or refused by its number: what a policy or a filter takes away is counted (`left_out`).
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from encoder.errors import EncoderError
from encoder.examples import ESCI, JUDGMENTS, Grades

Conflicts = Literal["refuse", "highest", "lowest"]

# The scale of WANDS, and of relevance guidelines with three levels: E is exact, S and C are partial, I is irrelevant.
THREE_LEVELS = Grades(names=("irrelevant", "partial", "exact"), positive=2)

# A label as published -> the names that it may have on the scale, the first that is there counts.
_LABELS = {
    "exact": ("e", "exact"),
    "substitute": ("s", "partial"),
    "complement": ("c", "partial"),
    "irrelevant": ("i", "irrelevant"),
    "partial": ("partial", "s"),
}
_LABELS |= {name[0]: _LABELS[name] for name in ("exact", "substitute", "complement", "irrelevant")}
_GRADE_COLUMNS = ("grade", "esci_label", "label")
_LOCALE_COLUMNS = ("locale", "product_locale")
_LEFT_OUT = b"left_out"
_LAYOUTS = "query_id, query, locale, product_id, grade (ours); query_id, query, product_locale, product_id, esci_label (ESCI); query_id, product_id, label with a queries file (WANDS)"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a file of judgments is understood.

    `columns` maps our names to those of the file, such as {"product_id": "sku"}; `labels` maps labels or numbers of the file to names of the scale, before the known ones; `where` keeps the rows with
    these values, such as {"split": "train"}; `conflicts` says which grade holds where one product has several for a query.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    conflicts: Conflicts = "refuse"

    def __post_init__(self) -> None:
        if self.conflicts not in get_args(Conflicts):
            raise EncoderError(f"conflicts is {self.conflicts!r}. Choose one of {', '.join(get_args(Conflicts))}.")


AS_PUBLISHED = Reading()


def read_judgments(
    path: Path, *, queries: Path | None = None, grades: Grades = ESCI, locale: str = "", reading: Reading = AS_PUBLISHED
) -> pa.Table:
    """Read judgments as `JUDGMENTS`, in the order of the file; `locale` holds where the file names none.

    The texts of the queries come from the queries file if there is one, else from the file itself.
    """
    table = _renamed(_read(path), reading.columns, path)
    rows = pa.array(np.arange(1, len(table) + 1))  # as a person counts them, the header aside
    kept = _where(table, reading.where, path)
    if not pc.any(kept, min_count=0).as_py():
        raise EncoderError(f"{path} has no judgment{f' with {dict(reading.where)}' if reading.where else ''}. Give another file or filter.")
    filtered = len(table) - pc.sum(kept).as_py()
    table, rows = table.filter(kept), rows.filter(kept)
    columns = {name: _texts(table, name, path, rows) for name in ("query_id", "product_id")}
    named = next((name for name in _LOCALE_COLUMNS if name in table.column_names), None)
    columns["locale"] = _texts(table, named, path, rows) if named else pa.array([locale] * len(table), pa.string())
    columns["query"] = _texts(table, "query", path, rows) if queries is None else _query_texts(columns["query_id"], queries, path)
    columns["grade"] = _grades(table, grades, reading.labels, path, rows)
    judgments = pa.table([columns[name] for name in JUDGMENTS.names], schema=JUDGMENTS)
    judgments, counts = _settled(judgments, reading.conflicts, path)
    return judgments.replace_schema_metadata({_LEFT_OUT: json.dumps({"filtered": filtered, **counts})})


def left_out(judgments: pa.Table) -> dict[str, int]:
    """Return how many rows `read_judgments` left out: by the filter, as repeats, and as the other side of a conflict."""
    return dict(json.loads((judgments.schema.metadata or {}).get(_LEFT_OUT, b"{}")))


def _read(path: Path) -> pa.Table:
    """Read a file; every column of a text file is a string, because 007 is a product id."""
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if not path.is_file():
        raise EncoderError(f"{path} is no file. Give a Parquet, CSV or TSV file.")
    try:
        if kind in {".parquet", ".pq"}:
            return pq.read_table(path)
        if kind not in {".csv", ".tsv", ".txt"}:
            raise EncoderError(f"{path}: {kind or 'no suffix'} is not known. Give .parquet, .csv or .tsv, also with .gz behind.")
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            line = file.readline()
        # WANDS calls its files .csv and separates them by tabs.
        delimiter = "\t" if "\t" in line else ","
        names = next(csv.reader([line], delimiter=delimiter), [])
        convert = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""])
        return pa_csv.read_csv(path, parse_options=pa_csv.ParseOptions(delimiter=delimiter), convert_options=convert)
    except (pa.ArrowException, OSError, UnicodeDecodeError, EOFError) as error:
        raise EncoderError(f"{path} cannot be read: {str(error)[:200]}. Check that it is a whole {kind} file.") from error


def _renamed(table: pa.Table, columns: Mapping[str, str], path: Path) -> pa.Table:
    """Give columns our names; one of the file that already has such a name gives way."""
    if lacking := [name for name in columns.values() if name not in table.column_names]:
        raise EncoderError(f"{path} has no column {', '.join(lacking)}; it has {', '.join(table.column_names)}. Correct `columns`.")
    kept = [name for name in table.column_names if name not in columns or name in columns.values()]
    ours = {theirs: name for name, theirs in columns.items()}
    return table.select(kept).rename_columns([ours.get(name, name) for name in kept])


def _where(table: pa.Table, where: Mapping[str, str], path: Path) -> pa.ChunkedArray | pa.Array:
    """Return which rows have the wanted values."""
    kept = pa.array(np.ones(len(table), bool))
    for name, value in where.items():
        _require(table, name, path)
        kept = pc.and_(kept, pc.fill_null(pc.equal(table[name].cast(pa.string()), value), fill_value=False))
    return kept


def _texts(table: pa.Table, name: str, path: Path, rows: pa.Array) -> pa.ChunkedArray:
    """Return a column as strings; a null or a blank text is refused."""
    _require(table, name, path)
    column = table[name].cast(pa.string())
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), fill_value=True)
    if pc.any(blank, min_count=0).as_py():
        raise EncoderError(f"{path}: {name} is empty in {_places(rows.filter(blank))}. Fill or delete them.")
    return column


def _query_texts(ids: pa.ChunkedArray, queries: Path, path: Path) -> pa.Array:
    """Return the text of each judgment's query from the queries file."""
    table = _read(queries)
    rows = pa.array(np.arange(1, len(table) + 1))
    known, texts = (_texts(table, name, queries, rows).combine_chunks() for name in ("query_id", "query"))
    if pc.count_distinct(known).as_py() < len(known):
        raise EncoderError(f"{queries}: {len(known) - pc.count_distinct(known).as_py()} query ids occur twice. Keep one row of each.")
    at = pc.index_in(ids, value_set=known)
    if at.null_count:
        lacking = pc.unique(ids.filter(pc.is_null(at))).to_pylist()
        raise EncoderError(f"{queries} lacks {len(lacking)} queries of {path}, such as {', '.join(lacking[:5])}. Give the file that fits.")
    return texts.take(at.combine_chunks())


def _grades(table: pa.Table, scale: Grades, labels: Mapping[str, str], path: Path, rows: pa.Array) -> pa.Array:
    """Return the grades: numbers as they are, labels by name."""
    name = next((name for name in _GRADE_COLUMNS if name in table.column_names), None)
    if name is None:
        raise EncoderError(f"{path} has the columns {', '.join(table.column_names)}, and no grade. Known are {_LAYOUTS}.")
    values = table[name]
    if pa.types.is_floating(values.type):
        values = _whole(values, path, name, rows)
    values = _texts(pa.table({name: values}), name, path, rows).combine_chunks().dictionary_encode()
    known = _known_labels(scale, labels)
    found = [known.get(text.strip().casefold()) for text in values.dictionary.to_pylist()]
    unknown = [text for text, grade in zip(values.dictionary.to_pylist(), found, strict=True) if grade is None]
    if unknown:
        bad = pc.is_in(values.cast(pa.string()), value_set=pa.array(unknown))
        raise EncoderError(
            f"{path}: {name} is {', '.join(map(repr, unknown[:5]))} in {_places(rows.filter(bad))}. "
            f"Known are {', '.join(known)}: mend the rows, or map them with `labels`."
        )
    return pa.array(found, pa.int8()).take(values.indices)


def _known_labels(scale: Grades, labels: Mapping[str, str]) -> dict[str, int]:
    """Return the grade of each known label, folded: what the caller maps, names and numbers of the scale, published labels."""
    names = {name.casefold(): grade for grade, name in enumerate(scale.names)}
    known = {label: names[name] for label, choices in _LABELS.items() for name in choices[::-1] if name in names}
    known |= {str(grade): grade for grade in range(scale.best + 1)} | names
    for label, name in labels.items():
        if name.casefold() not in names:
            raise EncoderError(f"labels maps {label!r} to {name!r}. The scale has {', '.join(scale.names)}.")
        known[label.strip().casefold()] = names[name.casefold()]
    return known


def _whole(values: pa.ChunkedArray, path: Path, name: str, rows: pa.Array) -> pa.ChunkedArray:
    broken = pc.fill_null(pc.not_equal(values, pc.floor(values)), fill_value=False)
    if pc.any(broken, min_count=0).as_py():
        raise EncoderError(f"{path}: {name} is no whole number in {_places(rows.filter(broken))}. A grade is a whole number.")
    return values.cast(pa.int64())


def _settled(judgments: pa.Table, conflicts: Conflicts, path: Path) -> tuple[pa.Table, dict[str, int]]:
    """Return one judgment for each query and product, at its first place, and what was left out for it."""
    key = ["locale", "query_id", "product_id"]
    numbered = judgments.append_column("row", pa.array(np.arange(len(judgments))))
    texts = judgments.group_by(["locale", "query_id"]).aggregate([("query", "count_distinct")])
    several = texts.filter(pc.greater(texts["query_count_distinct"], 1))
    if len(several):
        ids = ", ".join(several["query_id"].to_pylist()[:5])
        raise EncoderError(f"{path}: {len(several)} query ids have different texts, such as {ids}. Give each query its own id.")
    groups = numbered.group_by(key, use_threads=False).aggregate([("row", "min"), ("grade", "min"), ("grade", "max")]).sort_by("row_min")
    differ = pc.not_equal(groups["grade_min"], groups["grade_max"])
    count = pc.sum(differ, min_count=0).as_py()
    if count and conflicts == "refuse":
        such = "; ".join(f"{row['query_id']} / {row['product_id']}" for row in groups.filter(differ).slice(0, 3).to_pylist())
        raise EncoderError(
            f"{path}: {count} products have different grades for one query ({such}). Mend them, or choose conflicts='highest'."
        )
    grade = groups["grade_min" if conflicts == "lowest" else "grade_max"]
    settled = judgments.take(groups["row_min"])
    settled = settled.set_column(JUDGMENTS.get_field_index("grade"), JUDGMENTS.field("grade"), grade)
    return settled, {"repeated": len(judgments) - len(settled), "conflicting": count}


def _require(table: pa.Table, name: str, path: Path) -> None:
    if name not in table.column_names:
        raise EncoderError(f"{path} lacks {name}; it has {', '.join(table.column_names)}. Known are {_LAYOUTS}.")


def _places(rows: pa.ChunkedArray | pa.Array) -> str:
    listed = ", ".join(map(str, rows[:5].to_pylist()))
    return f"{len(rows)} rows ({listed}{', ...' if len(rows) > 5 else ''})"  # noqa: PLR2004  five are enough to find the cause
