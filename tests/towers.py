"""Tiny random-weight towers in sentence-transformers layout, made in milliseconds and without torch.

Each has a real tokenizer and the weights of a real architecture, so that whatever opens a tower can open these. Word
embeddings are large and the layers small: texts that share words are near each other, as in a trained tower.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

Kind = Literal["bert", "xlm-roberta", "modernbert", "qwen3"]
Pooling = Literal["mean", "cls", "lasttoken"]
Weights = dict[str, npt.NDArray[np.float32]]
KINDS: tuple[Kind, ...] = ("bert", "xlm-roberta", "modernbert", "qwen3")

WORDS = """
the a and for with of in on to by is from black white red blue green grey pink silver gold small medium large mens womens kids
cotton leather steel wood plastic glass wool linen rubber aluminium wireless usb bluetooth charger cable phone laptop case cover
shoe shoes shirt jacket dress jeans boots trainers bag hat gloves scarf watch ring lamp chair table desk bed sofa shelf mirror
kitchen knife pan pot cup mug plate bottle garden tool drill hammer paint brush toy game puzzle book pen paper pack set of pieces
inch cm mm kg litre size colour brand new light heavy waterproof outdoor indoor travel sport running football camping summer winter
""".split()  # noqa: SIM905 - one word a line would be a page
HEAD_DIMS = 16


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
    tokenizer, tokenizer_config = _TOKENIZERS[kind]()
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


def _xlm_roberta(draws: _Draws, vocabulary: int, dims: int, layers: int, max_tokens: int) -> tuple[dict[str, Any], Weights]:
    # Positions begin after the padding id, 1.
    config, weights = _bert(draws, vocabulary, dims, layers, max_tokens, first=2)
    weights["embeddings.token_type_embeddings.weight"] = weights["embeddings.token_type_embeddings.weight"][:1].copy()
    special = {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5}
    return {**config, "architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", **special}, weights


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
        "local_attention": 8,  # so short that the sliding window shows in ordinary texts
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
    heads = dims // HEAD_DIMS
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


def _wordpiece() -> tuple[Tokenizer, dict[str, Any]]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    joined = [f"##{letter}" for letter in letters if letter.isalnum()]
    pieces = dict.fromkeys([*special, *letters, *joined, *WORDS])
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return tokenizer, {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}


def _unigram() -> tuple[Tokenizer, dict[str, Any]]:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = [chr(code) for code in range(33, 127)]
    pieces = [(piece, 0.0) for piece in special] + [("▁", -4.0)] + [(letter, -8.0) for letter in letters]
    pieces += [(f"▁{word}", -6.0) for word in dict.fromkeys(WORDS)] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([*special, "<mask>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    return tokenizer, {"tokenizer_class": "XLMRobertaTokenizer", "mask_token": "<mask>", **names}


def _byte_pairs(special: list[str]) -> Tokenizer:
    """Make byte-level BPE whose merges spell the words, with a space before them, letter by letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    pieces = dict.fromkeys([*special, *letters])
    for word in WORDS:
        for end in range(1, len(word) + 1):
            merges["Ġ" + word[: end - 1], word[end - 1]] = None
            pieces["Ġ" + word[:end]] = None
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _modernbert_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = _byte_pairs(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True, **names, **inputs}


def _qwen3_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = _byte_pairs(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    ends = processors.TemplateProcessing(single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), ends])
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": None, "bos_token": None}
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "padding_side": "left", "add_prefix_space": False, **names}


_TOKENIZERS: Mapping[Kind, Callable[[], tuple[Tokenizer, dict[str, Any]]]] = {
    "bert": _wordpiece,
    "xlm-roberta": _unigram,
    "modernbert": _modernbert_tokenizer,
    "qwen3": _qwen3_tokenizer,
}
_MODELS: Mapping[Kind, Callable[[_Draws, int, int, int, int], tuple[dict[str, Any], Weights]]] = {
    "bert": _bert,
    "xlm-roberta": _xlm_roberta,
    "modernbert": _modernbert,
    "qwen3": _qwen3,
}
