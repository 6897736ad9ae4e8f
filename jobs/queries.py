"""Queries for a shop that has none: written from its products, with grades that are derived, and said to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from encoder.examples import JUDGMENTS, keys_of
from encoder.synthetic import QueryWriter, Seq2SeqWriter, TemplateWriter
from jobs.material import grades_of, made_folder, products_of
from jobs.settings import Settings
from pipelines.errors import InputError

_BY_TITLE = ("{brand} {vertical}", "{vertical}")


@dataclass(frozen=True, kw_only=True)
class QueryRequest:
    """Who writes (templates over columns, or a seq2seq model), for how many products, and how many queries for each."""

    templates: Sequence[str] = ()
    category: str = "vertical"
    seq2seq: Path | None = None
    prompt: str | None = None
    most: int | None = None
    per_product: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seq2seq is not None and self.templates:
            raise InputError("--template and --seq2seq are two writers. Give one of them.")
        if self.seq2seq is None and self.prompt is not None:
            raise InputError("--prompt is what a --seq2seq model is asked. Give the model too.")


def written(settings: Settings, request: QueryRequest, out: Path) -> dict[str, int | str]:
    """Write queries and derived grades as judgments; return how many there are, and that the grades are derived."""
    products = _texts(products_of(settings))
    if request.category not in products.column_names:
        raise InputError(f"the products have no column `{request.category}` for --category; they have {', '.join(products.column_names)}.")
    chosen = products
    if request.most is not None and request.most < products.num_rows:
        keys = keys_of(f"write {request.seed}", products["locale"], products["product_id"])
        chosen = products.take(pa.array(np.sort(np.argsort(keys, kind="stable")[: request.most])))
    found = _writer(settings, request, products).write(chosen)
    if not found.num_rows:
        raise InputError("no query was written: the products lack the columns of the templates, or the model answered nothing of use.")
    made_folder(out.parent)
    pq.write_table(found.select(JUDGMENTS.names), out, compression="zstd")
    queries = found.group_by(["locale", "query_id"]).aggregate([]).num_rows
    return {"queries": queries, "judgments": found.num_rows, "out": str(out), "grades": "derived"}


def _writer(settings: Settings, request: QueryRequest, products: pa.Table) -> QueryWriter:
    grades = grades_of(settings)
    if request.seq2seq is not None:
        prompt = request.prompt or Seq2SeqWriter.prompt
        return Seq2SeqWriter(directory=request.seq2seq, prompt=prompt, per_product=request.per_product, grades=grades, seed=request.seed)
    templates = tuple(request.templates) or tuple(text for text in _BY_TITLE if "{brand}" not in text or "brand" in products.column_names)
    return TemplateWriter(templates=templates, per_product=request.per_product, category=request.category, grades=grades, seed=request.seed)


def _texts(products: pa.Table) -> pa.Table:
    """Return the columns that a template can name, as texts."""
    kept = {}
    for name in products.column_names:
        column = products[name]
        if pa.types.is_map(column.type) or pa.types.is_nested(column.type):
            continue
        kept[name] = column.cast(pa.string()).fill_null("") if not pa.types.is_string(column.type) else column.fill_null("")
    return pa.table(kept)
