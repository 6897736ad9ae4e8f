from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.config import FILE_NAME, read_file
from jobs.settings import SECTIONS, Settings, load
from pipelines.errors import InputError
from tests.towers import tiny_tower

MINIMAL = "project: shop\nsource: { type: parquet, path: catalog/, attributes: attributes }\n"


def written(folder: Path, text: str) -> Path:
    path = folder / FILE_NAME
    path.write_text(text)
    return path


def settings(folder: Path, text: str = MINIMAL, **how: Any) -> Settings:
    return load(written(folder, text), **how)


def origins(loaded: Settings) -> dict[str, tuple[str, str]]:
    return {key: (value, origin) for key, value, origin in loaded.describe()}


def test_a_minimal_file_is_enough_and_the_rest_are_defaults(tmp_path: Path) -> None:
    loaded = settings(tmp_path)
    assert loaded.project.timezone == "UTC"
    assert loaded.limits.max_delete_ratio == 0.05
    assert origins(loaded)["gates.max_delete_ratio"] == ("0.05", "default")


def test_relative_places_are_relative_to_the_file(tmp_path: Path) -> None:
    loaded = settings(tmp_path, MINIMAL + "store: { root: index }\n")
    assert loaded.source.path == str(tmp_path / "catalog")
    assert loaded.store.root == str(tmp_path / "index")


def test_layers_win_in_order_and_every_value_knows_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        MINIMAL
        + "gates: { max_delete_ratio: 0.1, quarantine_ratio: 0.2 }\nplan: { lookback: 2h }\ntargets: { dev: { gates: { quarantine_ratio: 0.3 }, plan: { lookback: 3h } } }\n"
    )
    monkeypatch.setenv("CATALOG_EMBED_PLAN__LOOKBACK", "4h")
    loaded = settings(tmp_path, text, target="dev", overrides={"ray.address": "auto", "plan.threads": None})
    found = origins(loaded)
    path = tmp_path / FILE_NAME
    assert found["gates.max_delete_ratio"] == ("0.1", str(path))
    assert found["gates.quarantine_ratio"] == ("0.3", f"{path} target dev")
    assert found["plan.lookback"] == ("4h", "environment CATALOG_EMBED_PLAN__LOOKBACK")
    assert found["ray.address"] == ("auto", "command line")
    assert found["plan.threads"][1] == "default"
    assert loaded.plan.lookback.total_seconds() == 4 * 3600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("projct: shop\n", "Did you mean `project`"),
        (MINIMAL + "gate: {}\n", "Did you mean `gates`"),
        (MINIMAL + "gates: { max_delete_ration: 0.1 }\n", "Did you mean `max_delete_ratio`"),
        (MINIMAL + "gates: 3\n", "needs `key: value` lines"),
        (MINIMAL + "gates: { max_delete_ratio: five }\n", "must be a number"),
        (MINIMAL + "gates: { max_delete_ratio: 5 }\n", "Five percent is 0.05"),
        (MINIMAL + "gates: { max_delete_ratio: true }\n", "must be a number"),
        (MINIMAL + "plan: { lookback: soon }\n", "no length of time"),
        (MINIMAL + "plan: { deletes: maybe }\n", "must be one of: auto"),
        (MINIMAL + "plan: { memory_mb: 1.5 }\n", "must be a whole number"),
        (MINIMAL + "timezone: Europe/Berln\n", "unknown time zone"),
        (MINIMAL + 'document: { template: "{{ titel | lowr }}" }\n', "Did you mean `lower`"),
        (MINIMAL + "document: { filters: { price: money } }\n", "unknown type `money`"),
        (MINIMAL + "document: { filters: [price] }\n", "must be a mapping"),
        (MINIMAL + "document: { filters: { id: string } }\n", "reserved column"),
        (MINIMAL + "publish: { alias: [prod] }\n", "must be a text"),
        ("project: a\nproject: b\n", "line 2: `project` is given twice"),
        ("project: &a shop\ntimezone: *a\n", "aliases"),
        ("project: [unclosed\n", "not valid YAML"),
        ("- just\n- a list\n", "holds no settings"),
        ("", "holds no settings"),
        ("project: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("source: { type: parquet, path: x }\n", "`.project` is missing|`project` is missing"),
        ("project: shop\nsource: { type: parquet, path: x }\n", "does not say where they are"),
        ("project: shop\nsource: { type: parqet, path: x }\n", "Did you mean `parquet`|parqet"),
        ("project: shop\nsource: { type: parquet, path: '${NOT_THERE}' }\n", "`NOT_THERE`, which is not set"),
        ("project: shop\nsource: { type: parquet, path: x, deleted: is_active }\n", "column: ..., equals: ..."),
    ],
)
def test_a_mistake_is_refused_with_its_place_and_advice(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(tmp_path, text)


def test_a_missing_file_names_init(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="catalog-embed init"):
        load(tmp_path / "nowhere.yaml")


def test_an_unknown_target_or_variable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no target `live`\. Known: dev"):
        settings(tmp_path, MINIMAL + "targets: { dev: {} }\n", target="live")
    monkeypatch.setenv("CATALOG_EMBED_GATES__MAX_DELET_RATIO", "0.5")
    with pytest.raises(InputError, match="Did you mean `CATALOG_EMBED_GATES__MAX_DELETE_RATIO`"):
        settings(tmp_path)


def test_an_alias_bomb_and_a_huge_file_are_refused_before_they_expand(tmp_path: Path) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    with pytest.raises(InputError, match="aliases"):
        read_file(written(tmp_path, bomb))
    with pytest.raises(InputError, match="larger than 1 MB"):
        read_file(written(tmp_path, "project: " + "x" * (1 << 20)))


def test_a_mapping_laid_over_another_keeps_its_other_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = MINIMAL.replace(" }", ", completeness: { min_rows_ratio: 0.97 } }")
    monkeypatch.setenv("CATALOG_EMBED_SOURCE__COMPLETENESS", "{ max_age: 26h }")
    loaded = settings(tmp_path, text)
    assert (loaded.limits.min_rows_ratio, loaded.limits.max_age_s) == (0.97, 26 * 3600)
    assert "over" in origins(loaded)["source.completeness"][1]


def test_secrets_are_never_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", "canary-one")
    text = (
        "project: shop\nsource: { type: parquet, path: s3://bucket/x, attributes: a }\n"
        "store: { root: s3://bucket/index, options: { access_key_id: '${SHOP_KEY}', secret_access_key: canary-three, session_token: canary-four, region: eu-1 } }\n"
    )
    loaded = settings(tmp_path, text)
    assert loaded.store.options["access_key_id"] == "canary-one"
    told = repr(list(loaded.describe())) + repr(loaded)
    assert "canary" not in told
    assert "eu-1" in told


def test_credentials_in_an_address_are_refused_without_being_repeated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds credentials") as refused:
        settings(tmp_path, "project: shop\nsource: { type: parquet, path: s3://user:canary@bucket/x }\n")
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://h/db?user=u&password=canary",
        "host=h password=canary",
        "postgresql://u:can/canary@h/db",
        "postgresql://u:a@canary@h/db",
    ],
)
def test_the_address_of_a_database_is_masked_whole(tmp_path: Path, uri: str) -> None:
    text = f"project: shop\nsource: {{ type: sql, uri: '{uri}', table: p, attributes: a, options: {{}} }}\n"
    assert "canary" not in repr(list(settings(tmp_path, text).describe()))


def test_an_error_about_a_variable_does_not_show_what_it_stood_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_SECRET", "canary")
    for section in ("store: { options: '${SHOP_SECRET}' }", "gates: { max_delete_ratio: '${SHOP_SECRET}' }"):
        with pytest.raises(InputError) as refused:
            settings(tmp_path, MINIMAL + section + "\n")
        assert "canary" not in str(refused.value)
    monkeypatch.setenv("CATALOG_EMBED_STORE__OPTIONS", "{secret_access_key: canary")
    with pytest.raises(InputError) as refused:
        settings(tmp_path)
    assert "canary" not in str(refused.value)


def test_a_column_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="maps `titel`, which neither"):
        settings(tmp_path, MINIMAL.replace(" }", ", columns: { titel: name } }"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("lanes: 0", "`lanes` is at least 1, not 0"),
        ("token_budget: -1", "`token_budget` is at least 1, not -1"),
        ("gpus_per_actor: -0.5", "`gpus_per_actor` is a number from 0, not -0.5"),
        ("gpus_per_actor: 1.5", "`gpus_per_actor` is a share of a GPU or a whole number of them, not 1.5"),
        ("tokenize: later", "auto, ahead, actor"),
        ("lane: 2", "Did you mean `lanes`"),
    ],
)
def test_an_embed_setting_that_no_run_could_use_is_refused_on_loading(tmp_path: Path, given: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        settings(tmp_path, MINIMAL + f"embed: {{ {given} }}\n")


def test_what_the_embed_section_says_reaches_the_run(tmp_path: Path) -> None:
    from jobs.nightly import Night, make_space, open_store, run_options
    from pipelines.build import EmbedOptions

    said: dict[str, Any] = {
        "part_rows": 5000,
        "actors": 3,
        "gpus_per_actor": 0.5,
        "token_budget": 2048,
        "threads": 7,
        "lanes": 2,
        "tokenize": "ahead",
    }
    loaded = settings(tmp_path, MINIMAL + f"tower: {{ path: {tiny_tower(tmp_path / 'tower')} }}\nembed: {json.dumps(said)}\n")
    store = open_store(loaded)
    assert run_options(loaded, store, make_space(loaded, store), Night()).embedding == EmbedOptions(**said)


def test_every_option_of_every_section_is_described(tmp_path: Path) -> None:
    from dataclasses import fields

    wanted = {
        f"{section}.{item.name}".removeprefix(".") for section, owners in SECTIONS.items() for owner in owners for item in fields(owner)
    }
    assert origins(settings(tmp_path)).keys() == wanted


def test_configuration_values_are_yaml_in_the_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATALOG_EMBED_DOCUMENT__FILTERS", "{ price: float }")
    assert dict(settings(tmp_path).document.filters) == {"price": "float"}
    monkeypatch.setenv("CATALOG_EMBED_DOCUMENT__FILTERS", "{ price: ")
    with pytest.raises(InputError, match="is not a value"):
        settings(tmp_path)
