"""Towers of known shapes with random weights, made on the spot: speed depends on the shape, not on what the weights know.

Each has a working tokenizer whose words are those of the corpus, and is a directory as sentence-transformers writes it.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from encoder.bench.corpus import vocabulary
from encoder.errors import TowerError
from encoder.registry import default_tower

Kind = Literal["bert", "qwen3"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of an architecture; `words` of the tokenizer are whole tokens, `stored` is the number format of the weights."""

    kind: Kind
    layers: int
    dims: int
    inner: int
    heads: int
    kv_heads: int
    head_dims: int
    vocabulary: int
    max_tokens: int
    words: int
    stored: torch.dtype = torch.float32


_BF16 = torch.bfloat16
SHAPES: Mapping[str, Shape] = {
    "minilm": Shape(
        kind="bert", layers=6, dims=384, inner=1536, heads=12, kv_heads=12, head_dims=32, vocabulary=30522, max_tokens=256, words=3600
    ),
    "e5-base": Shape(
        kind="bert", layers=12, dims=768, inner=3072, heads=12, kv_heads=12, head_dims=64, vocabulary=30522, max_tokens=512, words=3600
    ),
    "qwen3-0.6b": Shape(
        kind="qwen3",
        layers=28,
        dims=1024,
        inner=3072,
        heads=16,
        kv_heads=8,
        head_dims=128,
        vocabulary=151_669,
        max_tokens=512,
        words=3600,
        stored=_BF16,
    ),
    "tiny": Shape(kind="bert", layers=2, dims=32, inner=64, heads=2, kv_heads=2, head_dims=16, vocabulary=4000, max_tokens=512, words=3000),
    "tiny-qwen3": Shape(
        kind="qwen3", layers=2, dims=32, inner=64, heads=2, kv_heads=1, head_dims=16, vocabulary=20_000, max_tokens=512, words=3000
    ),
}

# A shard of a large tower; small enough to be written from memory without doubling it.
_SHARD_BYTES = 512 * 1024 * 1024


@contextmanager
def open_tower(name: str) -> Iterator[tuple[Path, str]]:
    """Give a tower's directory and what it is: an installed one, a shape made for the time of the block, or a path."""
    if name == "minilm" and (installed := _installed()) is not None:
        yield installed, "all-MiniLM-L6-v2, installed, its real weights"
        return
    shape = SHAPES.get(name)
    if shape is None:
        if not Path(name).is_dir():
            raise TowerError(
                f"--tower {name}: no such directory, and no shape of that name. Choose from {', '.join(SHAPES)}, or give a path."
            )
        yield Path(name), f"{name}, its real weights"
        return
    with tempfile.TemporaryDirectory(prefix="encoder-bench-") as folder:
        write_tower(Path(folder), shape)
        yield Path(folder), f"the shape of {name}, random weights"


def _installed() -> Path | None:
    """Return the tower of the package; a bare machine has none, the shape takes its place, and the label says so."""
    try:
        return default_tower()
    except TowerError:
        return None


def write_tower(directory: Path, shape: Shape, *, seed: int = 0) -> None:
    """Write a tower of random weights. Equal arguments give equal bytes."""
    tokenizer, tokenizer_config = (_wordpiece if shape.kind == "bert" else _byte_pairs)(shape.words)
    if tokenizer.get_vocab_size() > shape.vocabulary:
        raise TowerError(f"A tokenizer of {tokenizer.get_vocab_size()} tokens does not fit the vocabulary of {shape.vocabulary}.")
    tokenizer.save(str(directory / "tokenizer.json"))
    config, weights = (_bert if shape.kind == "bert" else _qwen3)(shape)
    named: dict[str, Any] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    pooling = "lasttoken" if shape.kind == "qwen3" else "mean_tokens"
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "lasttoken", "max_tokens")}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"} for n, (path, kind) in enumerate(modules)
    ]
    (directory / "1_Pooling").mkdir()
    _json(directory / "tokenizer_config.json", {"model_max_length": shape.max_tokens, **tokenizer_config})
    _json(directory / "config.json", {**config, "dtype": str(shape.stored).removeprefix("torch.")})
    _json(directory / "sentence_bert_config.json", {"max_seq_length": shape.max_tokens, "do_lower_case": False})
    _json(directory / "config_sentence_transformers.json", named)
    _json(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": shape.dims, **modes, "include_prompt": True})
    _json(directory / "modules.json", listed)
    _write_weights(directory, weights, stored=shape.stored, seed=seed)


def _json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _write_weights(directory: Path, weights: Mapping[str, tuple[int, ...]], *, stored: torch.dtype, seed: int) -> None:
    """Draw the weights and write them, a shard in memory at a time."""
    shards: list[list[str]] = [[]]
    room = _SHARD_BYTES
    sizes = {name: math.prod(shape) * stored.itemsize for name, shape in weights.items()}
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(name)
        room -= size
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        drawn = {name: _draw(name, weights[name], generator).to(stored) for name in names}
        save_file(drawn, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _json(directory / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files})


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw one tensor: a layer keeps the size of what passes through it, and words weigh more than positions."""
    if "norm" in name.lower():
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0) + 0.05 * torch.randn(shape, generator=generator)
    if "embed" in name:
        return torch.randn(shape, generator=generator) * (1.0 if "words" in name or "word_" in name or "tokens" in name else 0.1)
    scale = 0.02 if len(shape) == 1 else 1 / math.sqrt(shape[1])
    return torch.randn(shape, generator=generator) * scale


def _bert(shape: Shape) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.dims,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.max_tokens,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    dims, inner = shape.dims, shape.inner
    weights: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (shape.vocabulary, dims),
        "embeddings.position_embeddings.weight": (shape.max_tokens, dims),
        "embeddings.token_type_embeddings.weight": (2, dims),
        "embeddings.LayerNorm.weight": (dims,),
        "embeddings.LayerNorm.bias": (dims,),
    }
    linears = {f"attention.{name}": (dims, dims) for name in ("self.query", "self.key", "self.value", "output.dense")}
    linears |= {"intermediate.dense": (inner, dims), "output.dense": (dims, inner)}
    for layer in (f"encoder.layer.{number}" for number in range(shape.layers)):
        for name, (out, into) in linears.items():
            weights |= {f"{layer}.{name}.weight": (out, into), f"{layer}.{name}.bias": (out,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            weights |= {f"{layer}.{name}.weight": (dims,), f"{layer}.{name}.bias": (dims,)}
    return config, weights


def _qwen3(shape: Shape) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.dims,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dims,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.max_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    dims, inner, wide, narrow = shape.dims, shape.inner, shape.heads * shape.head_dims, shape.kv_heads * shape.head_dims
    weights: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (shape.vocabulary, dims), "norm.weight": (dims,)}
    parts: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (wide, dims),
        "self_attn.k_proj": (narrow, dims),
        "self_attn.v_proj": (narrow, dims),
        "self_attn.o_proj": (dims, wide),
        "self_attn.q_norm": (shape.head_dims,),
        "self_attn.k_norm": (shape.head_dims,),
        "input_layernorm": (dims,),
        "post_attention_layernorm": (dims,),
        "mlp.gate_proj": (inner, dims),
        "mlp.up_proj": (inner, dims),
        "mlp.down_proj": (dims, inner),
    }
    for number in range(shape.layers):
        weights |= {f"layers.{number}.{name}.weight": size for name, size in parts.items()}
    return config, weights


def _wordpiece(words: int) -> tuple[Tokenizer, dict[str, Any]]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    joined = [f"##{letter}" for letter in letters if letter.isalnum()]
    pieces = dict.fromkeys([*special, *letters, *joined, *(word for word in vocabulary(words) if word.isalpha())])
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return tokenizer, {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}


def _byte_pairs(words: int) -> tuple[Tokenizer, dict[str, Any]]:
    """Make byte-level BPE whose merges spell the words, with a space before them, letter by letter."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges: dict[tuple[str, str], None] = {}
    pieces = dict.fromkeys([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    for word in (word for word in vocabulary(words) if word.isalpha()):
        for end in range(1, len(word) + 1):
            merges["Ġ" + word[: end - 1], word[end - 1]] = None
            pieces["Ġ" + word[:end]] = None
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, list(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    ends = processors.TemplateProcessing(single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), ends])
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": None, "bos_token": None}
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "padding_side": "left", "add_prefix_space": False, **names}
