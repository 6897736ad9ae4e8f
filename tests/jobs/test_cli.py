"""The command line as a person or a scheduler uses it: real projects, real files, exit codes and streams."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from pipelines.sample.nights import changes
from pipelines.sample.spec import SampleSpec, day
from tests.conftest import S3Server
from tests.publishing import publish_catalog

pytestmark = pytest.mark.usefixtures("ray_cluster")

PRODUCTS = 1500
SPEC = SampleSpec(products=PRODUCTS)


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Ran(int(done.value.code or 0), out, err)

    return run


@pytest.fixture
def shop(run: Run, tmp_path: Path) -> Path:
    """A fresh project with a small sample catalog; returns its configuration."""
    assert run("init", "shop", "--products", PRODUCTS).code == 0
    return tmp_path / "shop" / "catalog-embed.yaml"


def at(night: int) -> str:
    """The small hours after a night's changes."""
    return (day(night + 1) + timedelta(hours=2)).isoformat()


def edit(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


def test_a_first_plan_adds_the_whole_sample_catalog(run: Run, shop: Path) -> None:
    found = run("-c", shop, "plan", "--since", "beginning", "--output", "json")
    assert found.code == 0, found.err
    assert found.json["actions"]["add"] == found.json["rows"]["read"] == PRODUCTS
    assert found.json["rows"]["quarantined"] == 0
    assert 0 < found.json["embedding"]["texts"] < PRODUCTS
    assert not (shop.parent / "index").exists()


def test_the_plan_after_every_night_is_the_truth_about_that_night(run: Run, shop: Path) -> None:
    for night in (1, 2, 3):
        publish_catalog(shop, now=day(night) + timedelta(hours=2))
        assert run("init", shop.parent, "--products", PRODUCTS, "--night", night).code == 0
        truth = changes(SPEC, night=night).to_pydict()
        wanted = dict(zip(truth["sku"], truth["action"], strict=True))
        assert set(wanted.values()) == {"add", "text", "attr", "delete"}
        for since in ("beginning", "last", "yesterday"):
            out = shop.parent / f"plan-{night}-{since}"
            found = run("-c", shop, "plan", "--since", since, "--now", at(night), "--out", out, "--output", "json")
            assert found.code == 0, found.err
            table = pq.read_table(out / "changes.parquet").to_pydict()
            assert dict(zip(table["id"], table["action"], strict=True)) == wanted
            assert found.json["unseen"] == 0


def test_a_changed_template_or_filter_reads_everything_whatever_since_says(run: Run, shop: Path) -> None:
    publish_catalog(shop, now=day(1))
    edit(shop, "{{ title }} |", "{{ title }} /")
    found = run("-c", shop, "plan", "--since", "last", "--now", at(1))
    assert found.code == 12
    assert f"+ {PRODUCTS:,} new" in found.out
    assert "note      the template changed since g000001: every text is embedded into a space of its own" in found.out
    assert "GUARD     tower" in found.out
    edit(shop, "{{ title }} /", "{{ title }} |")
    edit(shop, "size: string, ", "")
    assert run("-c", shop, "plan", "--output", "json").json["actions"]["attr"] == PRODUCTS


def test_completeness_is_measured_for_narrow_windows_too(run: Run, shop: Path) -> None:
    publish_catalog(shop, now=day(1))
    catalog = shop.parent / "catalog" / "part-00000.parquet"
    table = pq.read_table(catalog)
    pq.write_table(table.slice(0, int(table.num_rows * 0.96)), catalog)
    found = run("-c", shop, "plan", "--since", "last", "--now", at(1))
    assert found.code == 12
    assert "GUARD     completeness: 96.0000%" in found.out


def test_a_corrupt_file_is_one_line_of_error(run: Run, shop: Path) -> None:
    catalog = shop.parent / "catalog" / "part-00000.parquet"
    data = bytearray(catalog.read_bytes())
    data[600:1400] = bytes(800)
    catalog.write_bytes(data)
    command = [sys.executable, "-m", "jobs.cli", "-q", "-c", str(shop), "plan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 3, done.stderr


def test_catalog_and_store_on_s3_give_the_same_plan(run: Run, shop: Path, s3: S3Server) -> None:
    bucket = s3.bucket()
    options = json.dumps(s3.options)
    edit(shop, "path: catalog/", f"path: s3://{bucket}/catalog/\n  options: {options}")
    edit(shop, "store: { root: index }", f"store: {{ root: s3://{bucket}/index, options: {options} }}")
    for night in (0, 1):
        assert run("init", shop.parent, "--products", PRODUCTS, "--night", night).code == 0
        s3.client().upload_file(str(shop.parent / "catalog" / "part-00000.parquet"), bucket, "catalog/part-00000.parquet")
        if night == 0:
            publish_catalog(shop, now=day(1) + timedelta(hours=2))
    truth = changes(SPEC, night=1)["action"].to_pylist()
    found = run("-c", shop, "plan", "--now", at(1), "--output", "json")
    assert found.code == 0, found.err
    assert {action: found.json["actions"][action] for action in set(truth)} == {action: truth.count(action) for action in set(truth)}
    assert run("-c", shop, "doctor").code == 0


def test_a_night_without_changes_has_nothing_to_do_and_nothing_to_embed(run: Run, shop: Path) -> None:
    publish_catalog(shop, now=day(1))
    found = run("-c", shop, "plan", "--now", at(0), "--detailed-exitcode")
    assert found.code == 0
    assert "no forward pass" in found.out
    assert "nothing to do" in found.out


def test_prices_alone_cost_no_forward_pass(run: Run, shop: Path) -> None:
    publish_catalog(shop, now=day(1))
    catalog = shop.parent / "catalog" / "part-00000.parquet"
    table = pq.read_table(catalog)
    cents = pa.array([price + 1 for price in table["price"].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("price"), "price", cents), catalog)
    found = run("-c", shop, "plan", "--since", "beginning", "--output", "json").json
    assert found["actions"]["attr"] == table.num_rows
    assert found["embedding"] == {"rows": 0, "texts": 0, "reused": 0, "tokens": 0}


def test_detailed_exitcode_tells_changes_apart(run: Run, shop: Path) -> None:
    assert run("-c", shop, "plan", "--detailed-exitcode").code == 3


def test_explain_and_sample_show_reasons_and_ids(run: Run, shop: Path) -> None:
    found = run("-c", shop, "plan", "--explain", "--sample", 2)
    assert "Explained" in found.out
    assert "digest" in found.out
    lines = [line.split(maxsplit=2) for line in found.out.splitlines() if line.startswith("  add")]
    assert len(lines) == 2
    assert all(" | " in text for _, _, text in lines)
    samples = run("-c", shop, "plan", "--sample", 2, "--output", "json").json["samples"]
    assert [sample["id"] for sample in samples["add"]] == [name for _, name, _ in lines]
    assert all(" | " in sample["text"] for sample in samples["add"])


def test_jsonl_is_one_line(run: Run, shop: Path) -> None:
    found = run("-c", shop, "plan", "--output", "jsonl")
    assert found.out.count("\n") == 1
    assert json.loads(found.out)["format"] == 1


def test_a_truncated_feed_trips_the_guards_with_12(run: Run, shop: Path) -> None:
    publish_catalog(shop, now=day(1))
    catalog = shop.parent / "catalog" / "part-00000.parquet"
    table = pq.read_table(catalog)
    pq.write_table(table.slice(0, table.num_rows // 2), catalog)
    found = run("-c", shop, "plan", "--since", "beginning", "--now", at(0))
    assert found.code == 12
    assert "GUARD     deletes" in found.out
    assert "GUARD     completeness" in found.out


def test_an_empty_catalog_trips_completeness_even_on_the_first_day(run: Run, shop: Path) -> None:
    catalog = shop.parent / "catalog" / "part-00000.parquet"
    pq.write_table(pq.read_table(catalog).slice(0, 0), catalog)
    found = run("-c", shop, "plan")
    assert found.code == 12
    assert "The feed is empty or cut short" in found.out


def test_a_stale_feed_trips_freshness(run: Run, shop: Path) -> None:
    edit(shop, "min_rows_ratio: 0.97", "min_rows_ratio: 0.97, max_age: 26h")
    assert run("-c", shop, "plan", "--now", at(-1)).code == 0
    assert run("-c", shop, "plan", "--now", at(3)).code == 12


def test_a_poisoned_feed_trips_the_quarantine_with_13_and_saves_the_rows(run: Run, shop: Path) -> None:
    catalog = shop.parent / "catalog" / "part-00000.parquet"
    table = pq.read_table(catalog)
    names = [None if index < 5 else name for index, name in enumerate(table["sku"].to_pylist())]
    pq.write_table(table.set_column(0, "sku", pa.array(names, pa.string())), catalog)
    found = run("-c", shop, "plan", "--explain", "--out", "saved")
    assert found.code == 13
    assert "5  null_id" in found.out
    assert pq.read_table("saved/quarantine.parquet")["reason"].to_pylist() == ["null_id"] * 5


def test_repeated_rows_trip_the_duplicates_guard(run: Run, shop: Path) -> None:
    catalog = shop.parent / "catalog" / "part-00000.parquet"
    pq.write_table(pq.read_table(catalog), catalog.with_name("part-99999.parquet"))
    found = run("-c", shop, "plan")
    assert found.code == 12
    assert "GUARD     duplicates" in found.out


def test_init_leaves_a_project_alone_and_refuses_what_it_did_not_make(run: Run, shop: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in shop.parent.rglob("*") if path.is_file()}
    assert "nothing was changed" in run("init", shop.parent).out
    assert {path: path.read_bytes() for path in shop.parent.rglob("*") if path.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    refused = run("init", tmp_path / "mine")
    assert (refused.code, refused.out) == (2, "")
    assert "is not empty" in refused.err
    (shop.parent / "catalog" / "_SAMPLE").unlink()
    assert run("init", shop.parent, "--night", 1).code == 2


def test_a_night_keeps_the_seed_and_size_of_the_sample(run: Run, tmp_path: Path) -> None:
    run("init", "no", "--products", 200, "--seed", 3)
    assert "200 products as of night 1 (seed 3)" in run("init", "no", "--night", 1).out
    assert run("-c", "no/catalog-embed.yaml", "plan", "--output", "json").json["actions"]["add"] in range(195, 206)


def test_an_interrupted_init_is_finished_by_the_next(run: Run, shop: Path) -> None:
    before = shop.read_bytes()
    shop.unlink()
    assert run("init", shop.parent, "--products", PRODUCTS).code == 0
    assert shop.read_bytes() == before


def test_init_below_a_file_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = run("init", tmp_path / "file" / "shop")
    assert refused.code == 2
    assert "Choose a folder" in refused.err


def test_init_takes_paths_with_spaces_and_other_scripts(run: Run) -> None:
    assert run("init", "mein Läden 店", "--products", 20).code == 0
    assert run("-c", "mein Läden 店/catalog-embed.yaml", "plan", "--output", "json").json["actions"]["add"] == 20


def test_an_error_cannot_move_the_cursor(run: Run, shop: Path) -> None:
    edit(shop, "path: catalog/", 'path: "else\\e[2Jwhere"')
    found = run("-c", shop, "plan")
    assert found.code == 1
    assert "\x1b" not in found.err
    assert "else\\x1b[2Jwhere" in found.err
    assert "\x1b" not in run("-c", shop, "doctor").out


def test_init_makes_the_same_bytes_twice(run: Run, shop: Path, tmp_path: Path) -> None:
    run("init", "again", "--products", PRODUCTS)
    for path in (tmp_path / "again" / "catalog").iterdir():
        assert path.read_bytes() == (shop.parent / "catalog" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--explain"], "`catalog-embed plan --explain ...`"),
        (["--since", "yesterday", "plan"], "stands before the subcommand `plan`"),
        (["plan", "-c", "x.yaml"], "`catalog-embed -c ... plan`"),
        (["plan", "--target", "dev"], "`catalog-embed --target ... plan`"),
        (["plann"], "No such command"),
        (["plan", "--sinse", "1d"], "No such option"),
        (["plan", "--now", "2026-01-01T00:00"], "has no zone"),
        (["plan", "--now", "noon"], "is no ISO-8601 time"),
        (["plan", "--deletes", "all"], "Invalid value"),
        (["-c", "nowhere.yaml", "plan"], "catalog-embed init"),
        (["plan"], "no configuration at catalog-embed.yaml"),
    ],
)
def test_wrong_usage_exits_2_with_advice_and_no_traceback(run: Run, arguments: list[str], message: str) -> None:
    found = run(*arguments)
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert "Traceback" not in found.err


def test_errors_show_a_traceback_only_with_vv(run: Run, shop: Path) -> None:
    edit(shop, "path: catalog/", "path: elsewhere/")
    plain, verbose = run("-c", shop, "plan"), run("-vv", "-c", shop, "plan")
    assert plain.code == verbose.code == 1
    assert plain.err.count("\n") <= 2
    assert "elsewhere" in plain.err
    assert "Traceback" not in plain.err
    assert "Traceback" in verbose.err


def test_a_plan_is_never_saved_over_anything_and_says_so_before_it_works(run: Run, shop: Path, tmp_path: Path) -> None:
    assert run("-c", shop, "plan", "--out", "saved").code == 0
    again = run("-c", shop, "plan", "--out", "saved")
    assert (again.code, again.out) == (2, "")
    assert "is not empty" in again.err
    assert "plan.started" not in again.err
    (tmp_path / "file").touch()
    assert run("-c", shop, "plan", "--out", "file/below").code == 2


def test_a_catalog_without_update_times_is_read_whole_every_night(run: Run, shop: Path) -> None:
    edit(shop, "  updated_at: modified_at\n", "")
    publish_catalog(shop, now=day(1))
    found = run("-c", shop, "plan", "--output", "json")
    assert found.code == 0, found.err
    assert found.json["rows"]["read"] == PRODUCTS
    assert run("-c", shop, "plan", "--since", "1d").code == 2


def test_a_mapped_column_that_is_not_there_is_named_with_the_nearest(run: Run, shop: Path) -> None:
    edit(shop, "id: sku", "id: skuu")
    found = run("-c", shop, "plan")
    assert found.code == 2
    assert "`sku`" in found.err


def test_doctor_passes_on_a_fresh_project_and_shows_origins(run: Run, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALOG_EMBED_PLAN__LOOKBACK", "9h")
    found = run("-c", shop, "doctor")
    assert found.code == 0, found.out
    assert "9h  (environment CATALOG_EMBED_PLAN__LOOKBACK)" in found.out
    assert f"prod  ({shop})" in found.out
    assert "(default)" in found.out
    assert "put-if-absent" in found.out
    assert re.search(r"engine +packed on cpu in float32: lanes \d+, threads \d+, packs of [\d,]+ tokens \([\d,]+ tokens/s, ", found.out)
    assert list((shop.parent / "index").rglob("*.json")) == []


def test_doctor_tries_the_pace_anew_when_asked_and_not_where_it_is_configured(run: Run, shop: Path) -> None:
    assert "tokens/s, tried for" in run("-c", shop, "doctor", "--calibrate").out
    assert "tokens/s, kept from an earlier trial" in run("-c", shop, "doctor").out
    with shop.open("a") as file:
        file.write("embed: { lanes: 1, token_budget: 256 }\n")
    assert "lanes 1, " in (found := run("-c", shop, "doctor").out)
    assert "packs of 256 tokens (as configured, not tried)" in found


def test_doctor_reports_every_failure_and_exits_1(run: Run, shop: Path) -> None:
    edit(shop, "path: catalog/", "path: elsewhere/")
    (shop.parent / "index").write_text("a file where the store should be")
    found = run("-c", shop, "doctor", "--output", "json")
    assert found.code == 1
    assert {check["name"] for check in found.json["checks"] if not check["passed"]} == {"source", "store"}


def test_secrets_stay_out_of_everything_that_is_printed_or_saved(run: Run, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_SECRET", "canary-1")
    edit(
        shop, "store: { root: index }", "store: { root: index, options: { secret_access_key: '${SHOP_SECRET}', session_token: canary-2 } }"
    )
    for arguments in (["doctor"], ["-v", "plan", "--explain", "--out", "saved"], ["plan", "--output", "json"]):
        front = ["-v"] if arguments[0] == "-v" else []
        found = run(*front, "-c", shop, *arguments[len(front) :])
        assert "canary" not in found.out + found.err
    assert not any(b"canary" in path.read_bytes() for path in Path("saved").iterdir())


def test_options_come_from_the_environment_too(run: Run, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALOG_EMBED_PLAN_OUTPUT", "json")
    monkeypatch.setenv("CATALOG_EMBED_CONFIG", str(shop))
    assert run("plan").json["alias"] == "prod"


def test_logs_go_to_stderr_and_quiet_silences_them(run: Run, shop: Path) -> None:
    assert "plan.started" in run("-c", shop, "plan").err
    assert run("-q", "-c", shop, "plan").err == ""


def test_a_terminal_interrupt_ends_with_14_and_leaves_nothing(shop: Path) -> None:
    command = [sys.executable, "-m", "jobs.cli", "-c", str(shop), "plan"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 14
    assert "Start the command again" in err


def test_the_driver_does_not_grow_with_the_catalog(run: Run, tmp_path: Path) -> None:
    counts = (60_000, 300_000)
    for products in counts:
        assert run("init", tmp_path / str(products), "--products", products).code == 0
    script = (
        "import sys; from pathlib import Path; from jobs.cluster import connected; from jobs.nightly import Night, planned;"
        "from jobs.settings import load; from tests.memory import watched\n"
        "with connected('local'):\n"
        "    for folder in sys.argv[1:]:\n"
        "        settings = load(Path(folder) / 'catalog-embed.yaml', overrides={'plan.memory_mb': 64})\n"
        "        with watched() as peak, planned(settings, Night(since='beginning')) as night:\n"
        "            pass\n"
        "        print(night.result.plan.rows.live, peak[0])"
    )
    folders = [str(tmp_path / str(products)) for products in counts]
    done = subprocess.run(
        [sys.executable, "-c", script, *folders], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    (small, before_mb), (large, after_mb) = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    assert (small, large) == counts
    # The 240,000 products more are 135 MB in Arrow; the join keeps to 64 MB, and Arrow and DuckDB to pools of their own.
    assert after_mb - before_mb < 115, (before_mb, after_mb)


def test_sigterm_ends_a_command_that_was_started_with_ctrl_c_ignored() -> None:
    """As everything is that a script starts in its background."""
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from jobs.cli import _end_as_interrupted\n"
        "_end_as_interrupted()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.pause()\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(14)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 14
