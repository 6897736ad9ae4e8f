"""Training on two workers of a real Ray, on CPUs over gloo: what they learn together, and what happens when one of them dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from encoder.curves import METRICS, read_lines
from encoder.errors import EncoderError
from encoder.gathering import World
from jobs.fleet import REFUSED, on_workers
from jobs.settings import load
from jobs.train import Lesson, School, train_tower
from pipelines.errors import InputError
from tests.shops import make_shop

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS, WORKERS = 4, 2
STAGE = {
    "name": "pairs",
    "objective": {"parts": {"infonce": 1.0}, "tau": 0.05},
    "batch": {"queries": 8},
    "train": {"steps": STEPS, "lr": 0.003, "save_every": 1, "log_every": 1},
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shop that is not published: training needs its catalog and its judgments only."""
    config = make_shop(tmp_path_factory.mktemp("fleet") / "shop", products=120)
    (config.parent / "quick.yaml").write_text(yaml.safe_dump({"seed": 1, "stages": [STAGE]}))
    return config


def lesson(shop: Path, name: str, **how: Any) -> Lesson:
    return Lesson(recipe=str(shop.parent / "quick.yaml"), target=shop.parent / name, pool=0, device="cpu", **how)


def twice(attend: Callable[..., None], mark: Path) -> Callable[..., None]:
    """Follow the recipe undisturbed in one folder, then in the other, where the second process dies once, after the second step."""

    def attended(school: School, world: World) -> None:
        def told(_: str, line: Any) -> None:
            if world.rank == 1 and line["step"] == 2 and not mark.exists():
                mark.write_text("died")
                os.kill(os.getpid(), signal.SIGKILL)

        attend(replace(school, work=school.work / "whole"), world)
        attend(school, world, told)

    return attended


def test_two_workers_train_one_tower_whether_or_not_one_of_them_dies(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, work = shop.parent / "died", shop.parent / "together.work"
    work.mkdir()
    (work / REFUSED).write_text("of a run before, and no reason not to begin")
    monkeypatch.setattr(School, "attend", twice(School.attend, mark))
    found = train_tower(load(shop), lesson(shop, "together", workers=WORKERS))
    assert mark.exists(), "nobody was killed, so this shows nothing"
    (stage,) = found.stages
    assert (stage.record["processes"], stage.record["steps"]) == (WORKERS, STEPS)
    # A step takes the queries of both: twice as many as one process would have seen.
    assert stage.record["epochs"] == pytest.approx(STEPS * 8 * WORKERS / stage.record["queries"], rel=0.2)
    assert [line["step"] for line in read_lines(stage.tower.parent / METRICS)] == list(range(1, STEPS + 1))
    (whole,) = (work / "whole").glob("pairs/*/tower/model.safetensors")
    assert (stage.tower / "model.safetensors").read_bytes() == whole.read_bytes()


def test_what_workers_refuse_comes_back_in_words(tmp_path: Path) -> None:
    def fail(_: World) -> None:
        raise EncoderError("the shelf is empty. Fill it.")

    with pytest.raises(InputError, match=r"^the shelf is empty\. Fill it\.$"):
        on_workers(fail, WORKERS, work=tmp_path)
