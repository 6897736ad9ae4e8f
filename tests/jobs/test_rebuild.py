"""`rebuild`: what is damaged or lost comes back from the vector log, without a forward pass."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.errors import CatalogEmbedError
from pipelines.publish import current, open_manifest
from pipelines.reader import open_generation
from pipelines.storage import Store
from tests.jobs.commands import SECOND, THIRD, Command, commands

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def shop(tmp_path: Path, two_nights: Path) -> Path:
    shutil.copytree(two_nights.parent, tmp_path / "shop")
    return tmp_path / "shop" / "catalog-embed.yaml"


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], shop: Path) -> Command:
    return commands(capfd, shop)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def damage_segment(root: Path) -> None:
    flip(next(root.glob("segments/*-base/index.faiss")))


def lose_table(root: Path) -> None:
    for table in root.glob("tables/*.lance"):
        shutil.rmtree(table)


@pytest.mark.parametrize("harm", [damage_segment, lose_table])
def test_what_is_damaged_comes_back_from_the_log_with_the_same_content(command: Command, shop: Path, harm: object) -> None:
    root = shop.parent / "index"
    store = Store.open(root)
    entry = current(store, "prod")
    assert entry is not None
    before = open_manifest(store, entry)
    with open_generation(root, reload_s=None) as reader:
        answers = reader.search([1.0] * 16, 20).to_pydict()
    assert callable(harm)
    harm(root)
    with pytest.raises(CatalogEmbedError):
        open_generation(root, reload_s=None)
    ended = command("rebuild", "--output", "json")
    assert ended.code == 0, ended.err
    assert (ended.json["outcome"], ended.json["base"], ended.json["generation"]) == ("published", SECOND, THIRD)
    assert "embedded_texts" not in ended.json["actual"]
    entry = current(store, "prod")
    assert entry is not None
    after = open_manifest(store, entry)
    assert before.table is not None
    assert after.table is not None
    assert after.table.rows_digest == before.table.rows_digest
    assert (after.parts, after.window, after.parent) == (before.parts, before.window, SECOND)
    with open_generation(root, reload_s=None, verify="full") as reader:
        assert reader.search([1.0] * 16, 20).to_pydict() == answers


def test_a_damaged_log_is_not_built_upon(command: Command, shop: Path) -> None:
    root = shop.parent / "index"
    flip(next(root.glob("vectors/*/part-00000.parquet")))
    ended = command("rebuild")
    assert ended.code == 1
    assert "part-00000.parquet" in ended.err
    entry = current(Store.open(root), "prod")
    assert entry is not None
    assert entry.generation == SECOND


def test_a_night_after_a_rebuild_extends_it(command: Command, shop: Path) -> None:
    lose_table(shop.parent / "index")
    assert command("rebuild").code == 0
    ended = command("run", "--since", "beginning", "--output", "json")
    assert ended.code == 0, ended.err
    assert ended.json["outcome"] == "nothing"
    assert ended.json["base"] == THIRD
