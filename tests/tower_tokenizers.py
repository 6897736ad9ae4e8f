"""Tokenizers of the tiny towers: the real algorithms, with a vocabulary of words that product texts use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

Kind = Literal["bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "electra", "modernbert", "qwen2", "qwen3", "llama", "mistral"]

WORDS = """
the a and for with of in on to by is from black white red blue green grey pink silver gold small medium large mens womens kids
cotton leather steel wood plastic glass wool linen rubber aluminium wireless usb bluetooth charger cable phone laptop case cover
shoe shoes shirt jacket dress jeans boots trainers bag hat gloves scarf watch ring lamp chair table desk bed sofa shelf mirror
kitchen knife pan pot cup mug plate bottle garden tool drill hammer paint brush toy game puzzle book pen paper pack set of pieces
inch cm mm kg litre size colour brand new light heavy waterproof outdoor indoor travel sport running football camping summer winter
""".split()  # noqa: SIM905 - one word a line would be a page

_BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}


def _wordpiece(*special: str) -> tuple[Tokenizer, dict[str, Any]]:
    special = special or _BERT_SPECIAL
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    joined = [f"##{letter}" for letter in letters if letter.isalnum()]
    pieces = dict.fromkeys([*special, *letters, *joined, *WORDS])
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(list(special))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return tokenizer, {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}


def _distilbert() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer, config = _wordpiece()
    return tokenizer, {**config, "tokenizer_class": "DistilBertTokenizer"}


def _mpnet() -> tuple[Tokenizer, dict[str, Any]]:
    """Make the word pieces of BERT between the special tokens of RoBERTa."""
    tokenizer, config = _wordpiece("<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>")
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return tokenizer, {**config, **_ROBERTA_NAMES, "tokenizer_class": "MPNetTokenizer", "mask_token": "<mask>"}


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


def _roberta() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = _byte_pairs(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return tokenizer, {"tokenizer_class": "RobertaTokenizer", "unk_token": "<unk>", "mask_token": "<mask>", **_ROBERTA_NAMES}


def _modernbert() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = _byte_pairs(list(_BERT_SPECIAL))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True, **names, **inputs}


def _qwen() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = _byte_pairs(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    ends = processors.TemplateProcessing(single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), ends])
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": None, "bos_token": None}
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "padding_side": "left", "add_prefix_space": False, **names}


def _llama() -> tuple[Tokenizer, dict[str, Any]]:
    """Make pieces with a space before them, and bytes for the rest, between a first and a last token, as in E5-Mistral."""
    special = ["<unk>", "<s>", "</s>"]
    merges: dict[tuple[str, str], None] = {}
    pieces = dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))])
    for word in WORDS:
        for end in range(1, len(word) + 1):
            merges["▁" + word[: end - 1], word[end - 1]] = None
            pieces["▁" + word[:end]] = None
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> <s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(special)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return tokenizer, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True, "padding_side": "left", **names}


TOKENIZERS: Mapping[Kind, Callable[[], tuple[Tokenizer, dict[str, Any]]]] = {
    "bert": _wordpiece,
    "roberta": _roberta,
    "xlm-roberta": _unigram,
    "mpnet": _mpnet,
    "distilbert": _distilbert,
    "electra": _wordpiece,
    "modernbert": _modernbert,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "llama": _llama,
    "mistral": _llama,
}
