"""Tiny random-weight towers in sentence-transformers layout, made in milliseconds and without torch.

Each has a real tokenizer and the weights of a real architecture, so that whatever opens a tower can open these. Word
embeddings are large and the layers small: texts that share words are near each other, as in a trained tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tests.tower_tokenizers import TOKENIZERS, WORDS, Kind

__all__ = ["DECODERS", "KINDS", "WORDS", "Kind", "Pooling", "tiny_tower"]

Pooling = Literal["mean", "cls", "lasttoken"]
Weights = dict[str, npt.NDArray[np.float32]]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Those with causal attention, whose last token has read the whole text.
DECODERS: tuple[Kind, ...] = ("qwen2", "qwen3", "llama", "mistral")
HEAD_DIMS = 16
WINDOW = 8  # so short that the sliding window shows in ordinary texts


def tiny_tower(
    directory: Path,
    *,
    kind: Kind = "bert",
    dims: int = 32,
    seed: int = 0,
    layers: int = 2,
    pooling: Pooling = "mean",
    max_tokens: int = 128,
    prompts: Mapping[str, str] | None = None,
    default_prompt: str | None = None,
    normalize: bool = True,
    shards: int = 1,
) -> Path:
    """Write a tower and return its directory. Equal arguments give equal bytes; `dims` is a multiple of 16."""
    assert dims % HEAD_DIMS == 0, f"dims={dims} is no multiple of {HEAD_DIMS}"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, tokenizer_config = TOKENIZERS[kind]()
    tokenizer.save(str(directory / "tokenizer.json"))
    config, weights = _MODELS[kind](_Draws(seed), tokenizer.get_vocab_size(), dims, layers, max_tokens)
    _write(directory / "tokenizer_config.json", {"model_max_length": max_tokens, **tokenizer_config})
    _write(directory / "config.json", {"dtype": "float32", "transformers_version": "5.23.0", **config})
    _write_weights(directory, weights, shards)
    _write(directory / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    named = {"prompts": dict(prompts or {}), "default_prompt_name": default_prompt, "similarity_fn_name": "cosine"}
    _write(directory / "config_sentence_transformers.json", named)
    modes = {f"pooling_mode_{mode}": mode == _MODES[pooling] for mode in (*_MODES.values(), "max_tokens")}
    (directory / "1_Pooling").mkdir(exist_ok=True)
    _write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": dims, **modes, "include_prompt": True})
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (path, name) in enumerate(modules)
    ]
    _write(directory / "modules.json", listed)
    return directory


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Return texts of no to 39 words that the towers know."""
    draws = np.random.default_rng(seed)
    return [" ".join(draws.choice(WORDS, size=int(draws.integers(0, 40)))) for _ in range(count)]


_MODES: Mapping[Pooling, str] = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}


class _Draws:
    """Random tensors, each from its own name, so that adding one changes no other."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, name: str, *shape: int, std: float = 0.1) -> npt.NDArray[np.float32]:
        draws = np.random.default_rng([self.seed, *name.encode()])
        return (draws.standard_normal(shape) * std).astype(np.float32)


def _write(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _write_weights(directory: Path, weights: Weights, shards: int) -> None:
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    files = {name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: weights[name] for name in names if files[name] == file}, directory / file, metadata={"format": "pt"})
    total = sum(weight.nbytes for weight in weights.values())
    _write(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def _norm(draws: _Draws, name: str, dims: int, *, bias: bool) -> Weights:
    weights = {f"{name}.weight": 1 + draws(f"{name}.weight", dims)}
    return weights | ({f"{name}.bias": draws(f"{name}.bias", dims)} if bias else {})


def _linear(draws: _Draws, name: str, out: int, into: int, *, bias: bool) -> Weights:
    weights = {f"{name}.weight": draws(f"{name}.weight", out, into)}
    return weights | ({f"{name}.bias": draws(f"{name}.bias", out)} if bias else {})


def _bert(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int, *, first: int = 0) -> tuple[dict[str, Any], Weights]:
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": dims,
        "num_hidden_layers": layers,
        "num_attention_heads": dims // HEAD_DIMS,
        "intermediate_size": 2 * dims,
        "max_position_embeddings": max_tokens + first,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    weights = {
        "embeddings.word_embeddings.weight": draws("words", vocabulary, dims, std=1.0),
        "embeddings.position_embeddings.weight": draws("positions", max_tokens + first, dims),
        "embeddings.token_type_embeddings.weight": draws("types", 2, dims),
        **_norm(draws, "embeddings.LayerNorm", dims, bias=True),
    }
    for layer in (f"encoder.layer.{number}" for number in range(layers)):
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            weights |= _linear(draws, f"{layer}.{name}", dims, dims, bias=True)
        weights |= _norm(draws, f"{layer}.attention.output.LayerNorm", dims, bias=True)
        weights |= _linear(draws, f"{layer}.intermediate.dense", 2 * dims, dims, bias=True)
        weights |= _linear(draws, f"{layer}.output.dense", dims, 2 * dims, bias=True)
        weights |= _norm(draws, f"{layer}.output.LayerNorm", dims, bias=True)
    return config, weights | _linear(draws, "pooler.dense", dims, dims, bias=True)  # real ones carry it too, unused


def _roberta(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    # Positions begin after the padding id, 1.
    config, weights = _bert(draws, vocabulary, dims, layers, max_tokens, first=2)
    weights["embeddings.token_type_embeddings.weight"] = weights["embeddings.token_type_embeddings.weight"][:1].copy()
    special = {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5}
    return {**config, "architectures": ["RobertaModel"], "model_type": "roberta", **special}, weights


def _xlm_roberta(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    config, weights = _roberta(draws, vocabulary, dims, layers, max_tokens)
    return {**config, "architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta"}, weights


def _mpnet(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    config, weights = _roberta(draws, vocabulary, dims, layers, max_tokens)
    del config["type_vocab_size"], weights["embeddings.token_type_embeddings.weight"]
    names = {
        ".attention.self.query.": ".attention.attn.q.",
        ".attention.self.key.": ".attention.attn.k.",
        ".attention.self.value.": ".attention.attn.v.",
        ".attention.output.dense.": ".attention.attn.o.",
        ".attention.output.LayerNorm.": ".attention.LayerNorm.",
    }
    weights = _renamed(weights, names) | {"encoder.relative_attention_bias.weight": draws("distances", 32, dims // HEAD_DIMS, std=1.0)}
    return {**config, "architectures": ["MPNetModel"], "model_type": "mpnet", "relative_attention_num_buckets": 32}, weights


def _distilbert(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    _, weights = _bert(draws, vocabulary, dims, layers, max_tokens)
    names = {
        "encoder.layer.": "transformer.layer.",
        ".attention.self.query.": ".attention.q_lin.",
        ".attention.self.key.": ".attention.k_lin.",
        ".attention.self.value.": ".attention.v_lin.",
        ".attention.output.dense.": ".attention.out_lin.",
        ".attention.output.LayerNorm.": ".sa_layer_norm.",
        ".intermediate.dense.": ".ffn.lin1.",
        ".output.dense.": ".ffn.lin2.",
        ".output.LayerNorm.": ".output_layer_norm.",
    }
    weights = {name: weight for name, weight in weights.items() if "token_type" not in name and "pooler" not in name}
    config = {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": vocabulary,
        "dim": dims,
        "n_layers": layers,
        "n_heads": dims // HEAD_DIMS,
        "hidden_dim": 2 * dims,
        "max_position_embeddings": max_tokens,
        "activation": "gelu",
        "sinusoidal_pos_embds": False,
        "pad_token_id": 0,
    }
    return config, _renamed(weights, names)


def _electra(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    # The words are half as wide as the layers, as in electra-small.
    config, weights = _bert(draws, vocabulary, dims, layers, max_tokens)
    weights = {name: weight for name, weight in weights.items() if "pooler" not in name}
    weights = {name: weight[..., : dims // 2].copy() if name.startswith("embeddings.") else weight for name, weight in weights.items()}
    weights |= _linear(draws, "embeddings_project", dims, dims // 2, bias=True)
    return {**config, "architectures": ["ElectraModel"], "model_type": "electra", "embedding_size": dims // 2}, weights


def _renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    """Return the weights with pieces of their names replaced, one after the other."""
    renamed = {}
    for old, weight in weights.items():
        new = old
        for piece, replacement in names.items():
            new = new.replace(piece, replacement)
        renamed[new] = weight
    return renamed


def _modernbert(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    config = {
        "architectures": ["ModernBertModel"],
        "model_type": "modernbert",
        "vocab_size": vocabulary,
        "hidden_size": dims,
        "num_hidden_layers": layers,
        "num_attention_heads": dims // HEAD_DIMS,
        "intermediate_size": 2 * dims,
        "max_position_embeddings": max_tokens,
        "global_attn_every_n_layers": 2,
        "local_attention": WINDOW,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    weights = {"embeddings.tok_embeddings.weight": draws("words", vocabulary, dims, std=1.0)}
    weights |= _norm(draws, "embeddings.norm", dims, bias=False)
    for number in range(layers):
        layer = f"layers.{number}"
        weights |= _norm(draws, f"{layer}.attn_norm", dims, bias=False) if number else {}
        weights |= _linear(draws, f"{layer}.attn.Wqkv", 3 * dims, dims, bias=False)
        weights |= _linear(draws, f"{layer}.attn.Wo", dims, dims, bias=False)
        weights |= _norm(draws, f"{layer}.mlp_norm", dims, bias=False)
        weights |= _linear(draws, f"{layer}.mlp.Wi", 4 * dims, dims, bias=False)
        weights |= _linear(draws, f"{layer}.mlp.Wo", dims, 2 * dims, bias=False)
    return config, weights | _norm(draws, "final_norm", dims, bias=False)


def _qwen3(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    heads = dims // HEAD_DIMS  # of queries; there is one of keys and values
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": dims,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIMS,
        "intermediate_size": 2 * dims,
        "max_position_embeddings": max_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    weights = {"embed_tokens.weight": draws("words", vocabulary, dims, std=1.0)}
    for layer in (f"layers.{number}" for number in range(layers)):
        for name, out in (("q_proj", heads * HEAD_DIMS), ("k_proj", HEAD_DIMS), ("v_proj", HEAD_DIMS)):
            weights |= _linear(draws, f"{layer}.self_attn.{name}", out, dims, bias=False)
        weights |= _linear(draws, f"{layer}.self_attn.o_proj", dims, heads * HEAD_DIMS, bias=False)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            weights |= _norm(draws, f"{layer}.{name}", HEAD_DIMS, bias=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights |= _norm(draws, f"{layer}.{name}", dims, bias=False)
        for name, out, into in (("gate_proj", 2 * dims, dims), ("up_proj", 2 * dims, dims), ("down_proj", dims, 2 * dims)):
            weights |= _linear(draws, f"{layer}.mlp.{name}", out, into, bias=False)
    return config, weights | _norm(draws, "norm", dims, bias=False)


def _qwen2(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    config, weights = _qwen3(draws, vocabulary, dims, layers, max_tokens)
    weights = {name: weight for name, weight in weights.items() if "q_norm" not in name and "k_norm" not in name}
    for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        bias = name.replace("weight", "bias")
        weights[bias] = draws(bias, weights[name].shape[0])
    config = {name: value for name, value in config.items() if name not in {"head_dim", "attention_bias"}}
    # The last layer looks a few tokens back, the first ones at all.
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": layers - 1}
    return {**config, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **window}, weights


def _llama(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    config, weights = _qwen3(draws, vocabulary, dims, layers, max_tokens)
    weights = {name: weight for name, weight in weights.items() if "q_norm" not in name and "k_norm" not in name}
    del config["use_sliding_window"]
    special = {"bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0, "mlp_bias": False}
    return {**config, "architectures": ["LlamaModel"], "model_type": "llama", **special}, weights


def _mistral(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    config, weights = _llama(draws, vocabulary, dims, layers, max_tokens)
    del config["mlp_bias"], config["attention_bias"]
    return {**config, "architectures": ["MistralModel"], "model_type": "mistral", "sliding_window": WINDOW}, weights


_MODELS: Mapping[Kind, Callable[[_Draws, int, int, int, int], tuple[dict[str, Any], Weights]]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _xlm_roberta,
    "mpnet": _mpnet,
    "distilbert": _distilbert,
    "electra": _electra,
    "modernbert": _modernbert,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "llama": _llama,
    "mistral": _mistral,
}
