"""A run that dies: at every point where it writes, as a process, with a worker, with a node. Readers are safe, and a re-run finishes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pytest

from pipelines.errors import StoreError
from pipelines.stores.lance import read_rows
from tests.disturbed import (
    DIMS,
    ROOT,
    Camera,
    Content,
    Shop,
    base_shop,
    bury,
    busy_night,
    content,
    later_night,
    quiet_night,
    unbuilt,
)
from tests.faults import Recorder, Strike
from tests.shops import configure


@pytest.fixture
def shop(ray_cluster: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(Path(shutil.copytree(base_shop(tmp_path_factory), tmp_path / "shop")))


def survived(shop: Shop, picture: Path, *, before: Content | None, after: Content) -> list[str]:
    """Return what is wrong with the store that a death leaves, or with the run after it."""
    shop.put(picture)
    bury(shop)
    wrong = []
    found = content(shop) if shop.store.head("aliases/prod/00000001.json") else None
    published = found == after
    if not published and found != before:
        wrong.append("readers see neither the old nor the new generation")
    durable, texts = shop.parts(), shop.durable_texts()
    rerun = shop.run()
    if rerun.facts.outcome != ("nothing" if published else "published"):
        wrong.append(f"the re-run ended as {rerun.facts.outcome}: {rerun.facts.error or rerun.facts.gates}")
    elif content(shop) != after:
        wrong.append(f"after the re-run readers see {content(shop)}")
    if len(shop.moves()) != (1 if before is None else 2):
        wrong.append(f"the alias moved to {shop.moves()}")
    if any(shop.store.get(key) != data for key, data in durable.items()):
        wrong.append("a durable part was made again")
    if shop.durable_texts() - texts != rerun.facts.actual.get("texts", 0):
        wrong.append("texts of durable parts were embedded again")
    return wrong


def test_a_death_anywhere_in_a_night_leaves_the_alias_readable_and_a_rerun_converges(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(shop)
    shop.write(quiet_night(shop.rows()))
    camera = Camera(shop.index, tmp_path / "album")
    with pytest.MonkeyPatch.context() as patched:
        camera.watch_table(patched)
        assert shop.run(camera).facts.outcome == "published"
    after = content(shop)
    assert after != before
    wrong = {name: found for name, picture in camera.pictures.items() if (found := survived(shop, picture, before=before, after=after))}
    with capsys.disabled():
        print(f"\na night without texts: {len(camera.points)} points, {len(camera.pictures)} states of the store, {len(wrong)} wrong")
    assert wrong == {}
    assert len(camera.pictures) > 20


def test_after_a_death_the_next_night_takes_another_catalog(shop: Shop, tmp_path: Path) -> None:
    rows, index = shop.rows(), Path(shutil.copytree(shop.index, tmp_path / "before"))
    shop.write(later_night(rows))
    assert shop.run().facts.outcome == "published"
    wanted = content(shop)
    shop.put(index)
    shop.write(quiet_night(rows))
    camera = Camera(shop.index, tmp_path / "album")
    shop.run(camera)
    shop.write(later_night(rows))
    ends = (
        "run.applied",
        "sync:tables:before",
        "link:segments:after",
        "link:generations:after",
        "link:manifest:after",
        "link:aliases:after",
    )
    pictures = camera.of(*ends)
    assert len(pictures) >= len(ends)
    for name, picture in pictures.items():
        shop.put(picture)
        bury(shop)
        assert shop.run().facts.outcome == "published", name
        assert content(shop) == wanted, name


def test_a_death_while_texts_are_embedded_repeats_no_durable_part(shop: Shop, tmp_path: Path) -> None:
    before = content(shop)
    configure(shop.config, embed={"part_rows": 5})
    shop.write(busy_night(shop.rows()))
    camera = Camera(shop.index, tmp_path / "album")
    first = shop.run(camera)
    after, texts = content(shop), first.facts.actual["texts"]
    assert texts == 48
    parts = [name for name in camera.pictures if name.endswith("run.part:embed")]
    assert len(parts) > 2
    for name in (parts[0], parts[len(parts) // 2], parts[-1]):
        assert survived(shop, camera.pictures[name], before=before, after=after) == [], name


def test_a_death_in_the_very_first_run_leaves_nothing_published_and_a_rerun_converges(shop: Shop, tmp_path: Path) -> None:
    shutil.rmtree(shop.index)
    shop.index.mkdir()
    camera = Camera(shop.index, tmp_path / "album")
    assert shop.run(camera).facts.outcome == "published"
    after = content(shop)
    for name, picture in camera.of("run.indexed", "link:manifest:after").items():
        assert survived(shop, picture, before=None, after=after) == [], name


def test_a_full_or_failing_disk_ends_the_run_with_an_error_and_a_rerun_converges(shop: Shop, tmp_path: Path) -> None:
    before, index = content(shop), Path(shutil.copytree(shop.index, tmp_path / "before"))
    shop.write(quiet_night(shop.rows()))
    recorder = Recorder()
    shop.run(recorder)
    after = content(shop)
    first = {point: recorder.points.index(point) for point in dict.fromkeys(recorder.points) if point.endswith(":torn")}
    assert {point.split(":")[1] for point in first} == {"leases", "runs", "vectors", "segments", "generations", "manifest", "aliases"}
    for point, nth in first.items():
        shop.put(index)
        with pytest.raises(StoreError, match="The disk is full: free space"):
            shop.run(Strike(nth, "ENOSPC"))
        assert content(shop) == before, point
        assert shop.run().facts.outcome == "published", point
        assert content(shop) == after, point
    shop.put(index)
    # The entry of the alias is there, and the disk says that it is not.
    assert shop.run(Strike(recorder.points.index("link:aliases:after"), "EIO")).facts.outcome == "published"
    assert content(shop) == after
    assert shop.moves() == ["g000001", "g000002"]


# Real deaths: a driver, a worker, a node. What they leave is compared with a run that nobody disturbed.


def wait_for(what: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not what():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.02)


def begun(shop: Shop, run: subprocess.Popen[str], parts: int) -> bool:
    """Return whether a command has made so many parts, or has ended."""
    return run.poll() is not None or len(shop.parts()) >= parts


def gone(family: list[int]) -> bool:
    """Return whether processes have ended, and with them every tower below this one."""
    return not any(psutil.pid_exists(pid) for pid in family) and not towers_below(os.getpid())


def towers_below(pid: int) -> list[psutil.Process]:
    """Return the worker processes below a process that hold a tower."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "MapBatches(Tower)" in " ".join(child.cmdline()):
                found.append(child)
    return found


def vectors(shop: Shop) -> npt.NDArray[np.float32]:
    """Return the vectors of what is live, in the order of the ids."""
    table = shop.live().table
    assert table is not None
    rows = pa.concat_tables(read_rows(shop.store.uri(table.uri), version=table.version, columns=["id", "vector"], options={})).sort_by("id")
    flat: npt.NDArray[np.float32] = rows.column("vector").combine_chunks().flatten().to_numpy()
    return flat.reshape(-1, DIMS)


def test_a_killed_and_an_interrupted_command_repeat_no_durable_part(
    ray_cluster: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import ray

    whole, shop, texts = Shop(base_shop(tmp_path_factory)), unbuilt(tmp_path, part_rows=4), 0
    elsewhere = ray.get_runtime_context().gcs_address
    # Killed, the command leaves a cluster to itself; interrupted as on a terminal, the cluster is its own and ends with it.
    for signaled, parts, address, expected in ((signal.SIGKILL, 6, elsewhere, -signal.SIGKILL), (signal.SIGINT, 15, "local", 14)):
        with shop.started("--progress", "none", "--ray-address", address) as run:
            wait_for(partial(begun, shop, run, parts))
            family = [run.pid, *(child.pid for child in psutil.Process(run.pid).children(recursive=True))]
            os.killpg(run.pid, signaled)
            _, said = run.communicate(timeout=120)
        assert run.returncode == expected, said
        wait_for(partial(gone, family))
        assert shop.store.head("aliases/prod/00000001.json") is None
        assert texts < shop.durable_texts() < whole.durable_texts()
        texts = shop.durable_texts()
    assert said.endswith("interrupted; nothing was published. Start the command again.\n")
    last = shop.run()
    assert (last.facts.outcome, len(shop.moves())) == ("published", 1)
    assert last.facts.actual["texts"] == whole.durable_texts() - texts
    assert len({key.split("/")[1] for key in shop.parts()}) == 1
    assert content(shop) == content(whole)


def test_a_killed_worker_changes_nothing(ray_cluster: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole, shop, killed = Shop(base_shop(tmp_path_factory)), unbuilt(tmp_path, part_rows=4), []

    def kill() -> None:
        wait_for(lambda: len(shop.parts()) >= 3)
        for worker in towers_below(os.getpid()):
            worker.kill()
            killed.append(worker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    record = shop.run()
    killer.join()
    assert killed
    assert record.facts.outcome == "published"
    assert content(shop) == content(whole)
    np.testing.assert_allclose(vectors(shop), vectors(whole), atol=1e-5)


_NODES = """
import os, sys, threading
os.environ.update(RAY_health_check_period_ms="500", RAY_health_check_failure_threshold="3", RAY_health_check_initial_delay_ms="500")
from pathlib import Path
from ray.cluster_utils import Cluster
from tests.disturbed import Shop
from tests.shops import configure
from tests.jobs.test_run_crash import towers_below, wait_for
shop = Shop(Path(sys.argv[1]))
small = {"num_cpus": 2, "object_store_memory": 128 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=small | {"num_cpus": 0})
nodes = [cluster.add_node(**small) for _ in range(2)]
configure(shop.config, ray={"address": cluster.address})
lost = []
def lose():
    wait_for(lambda: len(shop.parts()) >= 3)
    for node in nodes:
        if towers_below(node.all_processes["raylet"][0].process.pid):
            cluster.remove_node(node, allow_graceful=False)
            lost.append(node)
            return
losing = threading.Thread(target=lose)
losing.start()
print(shop.run().facts.outcome)
losing.join()
print(len(lost))
cluster.shutdown()
"""


def test_a_lost_node_changes_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> None:
    whole, shop = Shop(base_shop(tmp_path_factory)), unbuilt(tmp_path, part_rows=4)
    command = [sys.executable, "-c", _NODES, str(shop.folder)]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)
    assert run.stdout.splitlines()[-2:] == ["published", "1"], run.stderr[-4000:]
    assert content(shop) == content(whole)
    np.testing.assert_allclose(vectors(shop), vectors(whole), atol=1e-5)
