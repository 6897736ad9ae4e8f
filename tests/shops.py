"""A project with a sample catalog and a tiny tower, and the nights that it is run for."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.config import FILE_NAME
from jobs.nightly import Night, run_night
from jobs.project import CATALOG, make_project
from jobs.records import Record
from jobs.settings import load
from pipelines.sample.spec import SampleSpec, day
from tests.towers import tiny_tower


def make_shop(
    directory: Path, *, products: int = 300, seed: int = 7, night: int = 0, tower: bool = True, **yaml_overrides: dict[str, Any]
) -> Path:
    """Make a shop, or move the catalog of one that is there to a night; return the path of its configuration.

    Overrides are sections, merged key by key: `make_shop(folder, embed={"vector": "float16"})`.
    """
    config = directory / FILE_NAME
    made = config.exists()
    make_project(directory, spec=SampleSpec(seed=seed, products=products), night=night)
    if tower and not made:
        tiny_tower(directory / "tower")
        configure(config, tower={"path": "tower"}, embed={"threads": 1})
    configure(config, **yaml_overrides)
    return config


def configure(config: Path, **sections: dict[str, Any]) -> None:
    """Change settings in a configuration, key by key."""
    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    for section, values in sections.items():
        data[section] = data.get(section, {}) | values
    config.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def read_catalog(config: Path) -> pa.Table:
    """Return the whole catalog of a shop."""
    return pq.read_table(config.parent / CATALOG / "part-00000.parquet")


def write_catalog(config: Path, rows: pa.Table) -> None:
    """Put these rows in the place of the catalog."""
    pq.write_table(rows, config.parent / CATALOG / "part-00000.parquet")


def closing(night: int) -> datetime:
    """Return the moment at which a night is run: two hours after the day of its changes."""
    return day(night + 1) + timedelta(hours=2)


def run(config: Path, *, at: int | None = None, **night: Any) -> Record:
    """Run a night in this process; `at` says which night of the sample it is, else the clock does."""
    if at is not None:
        night.setdefault("now", closing(at))
    return run_night(load(config), Night(**night))
