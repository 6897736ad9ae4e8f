"""What sentence-transformers wrote in a directory, read strictly and without loading anything.

Only data is allowed in: safetensors and JSON, of model types and modules on a list. Whatever could run code, and whatever
would be encoded otherwise than it was trained, is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from encoder.architectures import ARCHITECTURES, Architecture
from encoder.errors import TowerError

Pooling = Literal["mean", "cls", "last"]

MODEL_TYPES = tuple(ARCHITECTURES)
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Whatever transformers may read to build a tokenizer.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "tekken.json",
)

_VOCABULARIES = {"tokenizer.json", "vocab.json"}
_CODE = {".py", ".pyc", ".so", ".dll", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
_POOLING: Mapping[str, Pooling] = {
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_DOCUMENT_PROMPTS, _QUERY_PROMPTS = ("document", "passage", "corpus"), ("query",)
_HARMLESS_ARGUMENTS = {"add_pooling_layer", "attn_implementation", "dtype", "torch_dtype", "trust_remote_code"}
_UNUSED_FEATURES = ("processing_kwargs", "query_length", "document_length", "query_expansion")
# The one value of a setting of config.json that is carried out, and is meant where the setting is absent.
_AS_TRAINED: Mapping[str, Any] = {
    "position_embedding_type": "absolute",
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,  # a pack is no multiple of it
    "return_dict": True,
}
# Scalings of rotary positions that give a token the same angle whatever else is in its batch: not dynamic, not longrope.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_MAX_JSON_BYTES = 64 * 1024 * 1024
_MAX_FILES = 1000


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the configuration files say. `names` are the files that the tower needs; `own_tokens` of `most_tokens` are read."""

    model_path: str
    model_type: str
    pooling: Pooling
    full_dims: int
    own_tokens: int
    most_tokens: int
    document_prompt: str
    query_prompt: str
    lowercase: bool
    names: tuple[str, ...]


def read_layout(directory: Path) -> Layout:
    """Read and check the configuration files of a tower."""
    if not (directory / "modules.json").is_file():
        raise TowerError(f"{directory}: no modules.json. A tower is a directory that `SentenceTransformer.save` wrote.")
    _refuse_code(directory)
    model_path, pooling_path, normalize_path = _modules(directory)
    folder = directory / model_path
    config = _json(folder / "config.json")
    sentence = _optional_json(folder / "sentence_bert_config.json")
    named = _optional_json(directory / "config_sentence_transformers.json")
    model_type = _model_type(config, named, directory)
    architecture = ARCHITECTURES[model_type]
    _refuse_settings(config, architecture, directory)
    _refuse_features(sentence, directory)
    full_dims = _whole(config, architecture.width, None, directory)
    document_prompt, query_prompt = _prompts(named, directory)
    own_tokens, most_tokens = _tokens(architecture, config, sentence, _optional_json(folder / "tokenizer_config.json"), directory)
    names = [PurePosixPath(model_path, name) for name in ("config.json", "sentence_bert_config.json", *_weights(folder), *TOKENIZER)]
    names += [PurePosixPath("modules.json"), PurePosixPath("config_sentence_transformers.json")]
    names += [PurePosixPath(path, "config.json") for path in (pooling_path, normalize_path) if path]
    return Layout(
        model_path=model_path,
        model_type=model_type,
        pooling=_pooling(directory / pooling_path / "config.json", full_dims, prompted=bool(document_prompt or query_prompt)),
        full_dims=full_dims,
        own_tokens=own_tokens,
        most_tokens=most_tokens,
        document_prompt=document_prompt,
        query_prompt=query_prompt,
        lowercase=bool(sentence.get("do_lower_case")),
        names=tuple(sorted({str(name) for name in names if (directory / name).is_file()})),
    )


def parse_json(data: bytes, where: str, *, kind: type = dict) -> Any:
    """Read small JSON that names no code to load."""
    if len(data) > _MAX_JSON_BYTES:
        raise TowerError(f"{where} has {len(data)} bytes, which is no configuration. Save the tower again.")
    try:
        tree = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TowerError(f"{where} is not readable as JSON: {str(error)[:200]}. Save the tower again.") from error
    if not isinstance(tree, kind):
        raise TowerError(f"{where}: expected a JSON {kind.__name__}, found {type(tree).__name__}. Save the tower again.")
    if isinstance(tree, dict) and "auto_map" in tree:
        raise TowerError(f"{where} has an auto_map: the model brings its own code, which is never run here. Choose another model.")
    return tree


def _refuse_code(directory: Path) -> None:
    """Refuse whatever could run code, and links that lead out of the directory."""
    found, inside = 0, directory.resolve()
    for folder, folders, names in os.walk(directory):
        for path in (Path(folder, name) for name in (*folders, *names)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise TowerError(f"{path} is a link out of the tower. Copy the directory with its links followed (`cp -rL`).")
            if path.suffix.lower() in _CODE:
                advice = "A tower holds safetensors and JSON only: save the model as safetensors, and take this file away"
                raise TowerError(f"{path} is, or could hold, code. {advice}.")
            if path.name == "adapter_config.json":
                raise TowerError(f"{path} is of an adapter. Merge it into its model (`merge_and_unload`), and save that.")
            if path.suffix == ".json" and path.name not in _VOCABULARIES and path.is_file():
                parse_json(path.read_bytes(), str(path), kind=object)
        found += len(names)
        if found > _MAX_FILES:
            raise TowerError(f"{directory} holds more than {_MAX_FILES} files: it is no tower. Give the directory with modules.json.")


def _modules(directory: Path) -> tuple[str, str, str]:
    """Return the folders of the transformer, the pooling and the normalisation, which may be absent."""
    path = directory / "modules.json"
    try:
        modules = [(str(item["type"]), str(item["path"])) for item in sorted(_json(path, kind=list), key=lambda item: item["idx"])]
    except (KeyError, TypeError) as error:
        raise TowerError(f"{path} is not a list of modules: {str(error)[:200]}. Save the tower again.") from error
    kinds = [kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        allowed = "Transformer and Pooling of sentence-transformers, then Normalize or nothing"
        raise TowerError(f"{path}: the modules are {', '.join(kinds)[:500]}. Allowed are {allowed}.")
    for _, folder in modules:
        if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts or "\\" in folder:
            raise TowerError(f"{path} names the folder {folder[:200]!r}, which is outside the tower.")
    folders = [folder for _, folder in modules] + [""]
    return folders[0], folders[1], folders[2]


def _model_type(config: dict[str, Any], named: dict[str, Any], directory: Path) -> str:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise TowerError(f"{directory}: model_type is {str(model_type)[:80]!r}. Allowed are {', '.join(MODEL_TYPES)}.")
    if config.get("quantization_config"):
        raise TowerError(f"{directory}: the weights are quantized. Save the tower with plain weights.")
    if (kind := named.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise TowerError(f"{directory} is a {str(kind)[:80]}, and a tower is a SentenceTransformer: one dense vector for a text.")
    return str(model_type)


def _refuse_settings(config: dict[str, Any], architecture: Architecture, directory: Path) -> None:
    """Refuse settings of the model that are not carried out here, or by which a vector would depend on the texts beside it."""
    allowed = {**_AS_TRAINED, "is_causal": architecture.causal} | ({} if architecture.causal else {"is_decoder": False})
    for name, value in allowed.items():
        if config.get(name) not in (None, value):
            raise TowerError(f"{directory}: config.json sets {name} to {str(config[name])[:80]!r}. Allowed is {str(value).lower()}.")
    if architecture.positions != "rotary":
        return
    for name in ("rope_scaling", "rope_parameters"):
        for kind in _rope_types(config.get(name)):
            if kind not in _ROPE_TYPES:
                advice = f"which is not supported here. Allowed are {', '.join(_ROPE_TYPES)}"
                raise TowerError(f"{directory}: config.json sets {name} to the type {kind[:80]!r}, {advice}.")


def _rope_types(setting: Any) -> set[str]:
    """Return the types of a rotary setting, which is one for all layers or one for each kind of layer."""
    if not isinstance(setting, dict):
        return {"default"} if setting is None else {str(setting)}
    nested = [part for part in setting.values() if isinstance(part, dict)]
    return {str(part.get("rope_type") or part.get("type") or "default") for part in nested or [setting]}


def _refuse_features(sentence: dict[str, Any], directory: Path) -> None:
    """Refuse settings of the transformer module that would change the vectors and are not carried out here."""
    given = {
        name
        for key in ("model", "tokenizer", "processor", "config")
        for form in ("args", "kwargs")
        for name in sentence.get(f"{key}_{form}") or {}
    }
    unknown = sorted(given - _HARMLESS_ARGUMENTS) + [name for name in _UNUSED_FEATURES if sentence.get(name)]
    if sentence.get("transformer_task", "feature-extraction") != "feature-extraction":
        unknown.append("transformer_task")
    text = (sentence.get("modality_config") or {}).get("text") or {"method": "forward", "method_output_name": "last_hidden_state"}
    if text != {"method": "forward", "method_output_name": "last_hidden_state"}:
        unknown.append("modality_config")
    if unknown:
        raise TowerError(f"{directory}: sentence_bert_config.json sets {', '.join(unknown)[:300]}, which is not supported here.")


def _pooling(path: Path, full_dims: int, *, prompted: bool) -> Pooling:
    config = _json(path)
    mode = config.get("pooling_mode") or [name for name in config if name.startswith("pooling_mode_") and config[name]] or "mean"
    modes = [mode] if isinstance(mode, str) else [str(name) for name in mode]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise TowerError(f"{path}: the pooling is {', '.join(modes)[:200]}. Allowed is one of mean, cls and lasttoken.")
    if prompted and config.get("include_prompt", True) is not True:
        raise TowerError(f"{path}: include_prompt is false. Pooling without the tokens of the prompt is not supported here.")
    dims = config.get("embedding_dimension", config.get("word_embedding_dimension", full_dims))
    if dims != full_dims:
        raise TowerError(f"{path}: the pooling is for {str(dims)[:40]} dimensions, and the model has {full_dims}.")
    return _POOLING[modes[0]]


def _prompts(named: dict[str, Any], directory: Path) -> tuple[str, str]:
    """Return the document and the query prompt.

    The first that is not empty counts: sentence-transformers 6 writes an empty `document` beside the `passage` of E5. A
    default prompt that belongs to neither side counts for both.
    """
    prompts, default = named.get("prompts") or {}, named.get("default_prompt_name")
    where = f"{directory / 'config_sentence_transformers.json'}"
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise TowerError(f"{where}: the prompts are not texts by name. Save the tower again.")
    if default is not None and default not in prompts:
        raise TowerError(f"{where}: the default prompt {str(default)[:80]!r} is not among the prompts. Save the tower again.")
    neutral = prompts[default] if default and default not in (*_DOCUMENT_PROMPTS, *_QUERY_PROMPTS) else None
    document, query = ([prompts[name] for name in names if prompts.get(name)] for names in (_DOCUMENT_PROMPTS, _QUERY_PROMPTS))
    return (document or [neutral or ""])[0], (query or [neutral or ""])[0]


def _tokens(
    architecture: Architecture, config: dict[str, Any], sentence: dict[str, Any], tokenizer: dict[str, Any], directory: Path
) -> tuple[int, int]:
    """Return how many tokens of a text are read, special ones included, as sentence-transformers decides it; and how many could be."""
    table = architecture.positions != "rotary"
    positions = _whole(config, "max_position_embeddings", 512 if table else None, directory)
    positions -= architecture.first_position(_whole(config, "pad_token_id", 1, directory))
    if sentence.get("max_seq_length") is None:
        own = min(_whole(tokenizer, "model_max_length", positions, directory), positions)
    else:
        own = _whole(sentence, "max_seq_length", None, directory)
    # Rotary positions have no end, and a longer setting is their author's.
    own = min(own, positions) if table else own
    return own, max(own, positions)


def _weights(folder: Path) -> list[str]:
    """Return the names of the weights, and of the index where they are in shards."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        raise TowerError(f"{folder}: no {WEIGHTS}. Save the model as safetensors (`save_pretrained`).")
    placed = _json(folder / WEIGHTS_INDEX).get("weight_map")
    shards = sorted({str(name) for name in placed.values()}) if isinstance(placed, dict) else []
    for name in shards or [""]:
        if PurePosixPath(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise TowerError(f"{folder / WEIGHTS_INDEX} names {name[:200]!r}, which is no safetensors file beside it.")
    return [*shards, WEIGHTS_INDEX]


def _whole(tree: dict[str, Any], name: str, default: int | None, directory: Path) -> int:
    value = tree.get(name)
    value = default if value is None else value
    # `model_max_length` of a tokenizer without a limit is 1e30, with or without a point.
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
        raise TowerError(f"{directory}: {name} is {str(value)[:40]!r}, not a whole number. Save the tower again.")
    return int(value)


def _optional_json(path: Path) -> dict[str, Any]:
    return _json(path) if path.is_file() else {}


def _json(path: Path, *, kind: type = dict) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TowerError(f"{path} cannot be read ({error.strerror}). Save the tower again with sentence-transformers.") from error
    return parse_json(data, str(path), kind=kind)
