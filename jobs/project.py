"""`init`: a project in a folder, with a sample catalog that is made on the spot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jobs.config import FILE_NAME
from pipelines.errors import InputError
from pipelines.sample.catalog import write
from pipelines.sample.queries import write_queries
from pipelines.sample.spec import SampleSpec

CATALOG = "catalog"
# Says that the catalog beside it is a sample, which may be replaced.
SAMPLE_MARK = "_SAMPLE"

CONFIGURATION = """\
# catalog-embed project. `catalog-embed doctor` prints every setting with its value and origin.
project: "{name}"
timezone: Europe/Berlin

source:
  type: parquet
  path: catalog/
  id: sku
  locale: lang
  updated_at: modified_at
  deleted: {{ column: is_active, equals: false }}
  attributes: attributes
  completeness: {{ min_rows_ratio: 0.97 }}

document:
  template: "{{{{ title }}}} | {{{{ brand }}}} | {{{{ category }}}} | {{{{ attributes | pairs(12) }}}} | {{{{ description | tokens(96) }}}}"
  filters: {{ title: string, brand: string, category: string, size: string, price: float, in_stock: bool, rating: float, weight_g: int }}

# Grades of products for queries: what `train`, `eval`, `mine`, `judge` and `calibrate` read.
judgments:
  path: judgments.parquet
  queries: queries.parquet
  columns: {{ product_id: sku }}
  vertical: category
  licence: made up with the sample catalog

store: {{ root: index }}
plan: {{ lookback: 6h }}
gates: {{ max_delete_ratio: 0.05, quarantine_ratio: 0.0005 }}
publish: {{ alias: prod }}
ray: {{ address: local }}
"""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What `init` did."""

    directory: Path
    existed: bool
    products_from_night: int | None
    spec: SampleSpec


def make_project(directory: Path, *, spec: SampleSpec, night: int | None) -> Made:
    """Make a project, or move the sample catalog of one that is there to a night; anything else there is left alone."""
    try:
        return _make(directory, spec=spec, night=night)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or directory}: {error.strerror or error}. Choose a folder that you may write to."
        ) from error


def _make(directory: Path, *, spec: SampleSpec, night: int | None) -> Made:
    configuration = directory / FILE_NAME
    mark = directory / CATALOG / SAMPLE_MARK
    existed = configuration.exists()
    if existed and night is None:
        return Made(directory=directory, existed=True, products_from_night=None, spec=spec)
    # A mark without a configuration is what an interrupted `init` left, and is finished.
    if not existed and directory.exists() and any(directory.iterdir()) and not mark.exists():
        raise InputError(f"{directory} is not empty and holds no {FILE_NAME}. Choose a new folder; nothing was written.")
    if existed and not mark.exists():
        raise InputError(f"{directory / CATALOG} was not made by `init`, so it is not moved to night {night}. Nothing was written.")
    mark.parent.mkdir(parents=True, exist_ok=True)
    if existed:
        spec = SampleSpec(**json.loads(mark.read_text(encoding="utf-8")))
    mark.write_text(json.dumps({"seed": spec.seed, "products": spec.products}) + "\n", encoding="utf-8")
    write(directory / CATALOG, spec, night=night or 0)
    write_queries(directory, spec, night=night or 0)
    if not existed:
        configuration.write_text(CONFIGURATION.format(name=_name(directory)), encoding="utf-8")
    return Made(directory=directory, existed=existed, products_from_night=night or 0, spec=spec)


def _name(directory: Path) -> str:
    """Return the folder's name as a plain YAML word."""
    kept = "".join(char for char in directory.resolve().name if char.isascii() and (char.isalnum() or char in "-_"))
    return kept if kept[:1].isalpha() else f"shop-{kept}".rstrip("-")
