"""Commands in this process, as a person or a scheduler starts them, and the shop with two nights behind it that they are tried on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs.cli import main
from pipelines.storage import Store
from tests.shops import configure, make_shop, read_catalog, run, write_catalog

PRODUCTS = 300
FIRST, SECOND, THIRD, FOURTH, FIFTH = (f"g{number:06d}" for number in range(1, 6))
# Beside the sample's products: one whose texts are full of control characters, and one that has none and is rejected.
HOSTILE, TEXTLESS = "HOSTILE-1", "EMPTY-1"
LIVE = PRODUCTS + 1
# A product that no early night touches.
UNCHANGED = "CE-00000001"
ESCAPES = "\x1b[2J\x1b]0;owned\x07 ' \" <script>alert(1)</script> \u202e{{ title }} =cmd|' /C calc'!A0"
# Whatever a project asks of its tower, its readers must ask too.
DIMS, MAX_TOKENS = 16, 64


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Ended]


def commands(capfd: pytest.CaptureFixture[str], config: Path) -> Command:
    """Return what runs commands of a project."""

    def command(*arguments: object, front: tuple[object, ...] = ("-q",)) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in (*front, "-c", config, *arguments)])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err, err
        return Ended(int(done.value.code or 0), out, err)

    return command


def store_of(config: Path) -> Store:
    """Open the store of a shop."""
    return Store.open(config.parent / "index")


def make_two_nights(folder: Path) -> Path:
    """Make a shop whose SECOND generation is live, and return its configuration."""
    tower = {"dims": DIMS, "max_tokens": MAX_TOKENS}
    config = make_shop(folder / "shop", products=PRODUCTS, gates={"quarantine_ratio": 0.02})
    configure(config, tower=tower)
    for night in (0, 1):
        make_shop(config.parent, night=night)
        add_odd_products(config)
        assert run(config, at=night).facts.outcome == "published"
    return config


def add_odd_products(config: Path) -> None:
    """Put a product without a text and one with a hostile text into the catalog."""
    rows = read_catalog(config)
    plain = rows.filter(pc.equal(rows["sku"], UNCHANGED)).to_pylist()[0]
    hostile = plain | {"sku": HOSTILE, "title": ESCAPES, "brand": ESCAPES, "description": ESCAPES}
    empty: dict[str, Any] = {"title": "", "description": None, "brand": None, "category": None, "attributes": []}
    textless = plain | {"sku": TEXTLESS, **empty}
    write_catalog(config, pa.concat_tables([rows, pa.Table.from_pylist([hostile, textless], schema=rows.schema)]))
