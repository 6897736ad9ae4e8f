"""A tower goes into the store once, and comes back as it was, whatever happens to the copy."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from encoder.calibration import Calibration
from encoder.engine import Pace
from encoder.registry import TowerCard, TowerOptions, read_card
from pipelines.errors import CorruptObject, InputError
from pipelines.storage import Store
from pipelines.towers import bring, fetch, install, open_encoder
from tests.towers import tiny_tower

if TYPE_CHECKING:
    from tests.conftest import S3Server


@pytest.fixture
def tower(tmp_path: Path) -> tuple[Path, TowerCard]:
    directory = tiny_tower(tmp_path / "tower")
    return directory, read_card(directory, TowerOptions(template_digest="t"))


def test_installing_twice_changes_nothing_and_a_damaged_file_is_refused(tmp_path: Path, tower: tuple[Path, TowerCard]) -> None:
    directory, card = tower
    store = Store.open(tmp_path / "store")
    objects = install(store, directory, card)
    assert {item.key.split("/", 2)[2] for item in objects} == {"card.json", *(item.name for item in card.files)}
    assert {item.role for item in objects} == {"tower"}
    assert install(store, directory, card) == objects
    path = Path(store.uri(objects[0].key))
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CorruptObject):
        install(store, directory, card)
    with pytest.raises(CorruptObject):
        fetch(store, objects)


def test_a_file_that_changes_while_it_is_installed_is_taken_back(tmp_path: Path, tower: tuple[Path, TowerCard]) -> None:
    directory, card = tower
    store = Store.open(tmp_path / "store")
    (directory / card.files[0].name).write_text("{}")
    with pytest.raises(CorruptObject, match="changed while it was copied"):
        install(store, directory, card)
    assert store.head(f"towers/{card.fingerprint[:16]}/{card.files[0].name}") is None


def test_a_local_store_is_read_in_place_and_gives_the_same_tower(tmp_path: Path, tower: tuple[Path, TowerCard]) -> None:
    directory, card = tower
    store = Store.open(tmp_path / "store")
    found = fetch(store, install(store, directory, card))
    assert found == tmp_path / "store" / "towers" / card.fingerprint[:16]
    assert read_card(found) == card


def test_a_bucket_is_copied_once_however_many_ask_and_a_damaged_copy_is_replaced(
    tmp_path: Path, tower: tuple[Path, TowerCard], s3: S3Server
) -> None:
    directory, card = tower
    store = Store.open(f"s3://{s3.bucket()}/root", options=s3.options)
    objects = install(store, directory, card)
    cache = tmp_path / "cache"

    def race() -> list[Path]:
        found: list[Path] = []
        racers = [threading.Thread(target=lambda: found.append(fetch(store, objects, cache))) for _ in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        return found

    first = race()
    (first[0] / "model.safetensors").write_bytes(b"")
    second = race()
    (first[0] / "extra.py").touch()
    third = race()
    assert first == second == third == [first[0]] * 4
    assert read_card(first[0]) == card
    assert [path.name for path in cache.iterdir()] == [first[0].name]


def test_a_bucket_that_holds_other_bytes_is_refused(tmp_path: Path, tower: tuple[Path, TowerCard], s3: S3Server) -> None:
    directory, card = tower
    store = Store.open(f"s3://{s3.bucket()}/root", options=s3.options)
    objects = install(store, directory, card)
    large = max(objects, key=lambda item: item.size)
    data = bytearray(store.get(large.key))
    data[-1] ^= 1
    store.put(large.key, bytes(data))
    with pytest.raises(CorruptObject):
        fetch(store, objects, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(InputError, match="below one folder"):
        fetch(store, [*objects, replace(objects[0], key="towers/other/x")])


def test_a_tower_is_opened_at_the_pace_that_is_kept_or_tried_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tiny_tower(tmp_path / "tower")
    monkeypatch.setattr("pipelines.towers.machine_folder", lambda: tmp_path)
    odd = Calibration(pace=Pace(token_budget=777), tokens_per_s=2.0, usual_tokens_per_s=1.0, seconds=1.0)
    monkeypatch.setattr("encoder.calibration.measure", lambda _: odd)
    opened: Any = {"tower": TowerOptions(), "fingerprint": read_card(place).fingerprint}
    assert open_encoder(place, **opened).token_budget == 1024
    assert open_encoder(place, **opened, calibrate=True, token_budget=99).token_budget == 99
    assert open_encoder(place, **opened).token_budget == 1024
    assert open_encoder(place, **opened, calibrate=True).token_budget == 777
    assert open_encoder(place, **opened).token_budget == 777
    assert open_encoder(place, **opened, lanes=1).token_budget == 1024


def test_a_tower_in_a_bucket_is_brought_once_and_again_when_it_changes(tmp_path: Path, tower: tuple[Path, TowerCard], s3: S3Server) -> None:
    directory, card = tower
    url, cache = f"s3://{s3.bucket()}/towers/shop", tmp_path / "cache"
    with pytest.raises(InputError, match=r"tower\.path.*holds no file"):
        bring(url, s3.options, cache)
    store = Store.open(url, options=s3.options)
    for path in directory.rglob("*"):
        if path.is_file():
            store.put(str(path.relative_to(directory)), path)
    brought = bring(url, s3.options, cache)
    assert read_card(brought, TowerOptions(template_digest="t")).fingerprint == card.fingerprint
    assert bring(url, s3.options, cache) == brought
    assert list(cache.iterdir()) == [brought]
    store.put("README.md", b"exported anew")
    assert bring(url, s3.options, cache) != brought
