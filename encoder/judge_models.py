"""Judges that run here: any sequence classifier of transformers, and cross-encoders trained from the weights of a tower.

A cross-encoder reads query and product together, so it grades better than the tower that it is made from, and is far too
slow to search with: it grades what mining found. Axes: B pairs of a batch, G levels.
"""

# ruff: noqa: N803, N806 - arrays carry their shape in their names

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError

from encoder.architectures import ARCHITECTURES
from encoder.errors import EncoderError, TowerError
from encoder.judge import THREE_LEVELS, Agreement, Guideline, Pair, Verdict, agreement
from encoder.layout import TOKENIZER, parse_json
from encoder.loading import choose_device, quiet

RECORD = "judge.json"
FORMAT_VERSION = 1

_MOST_TOKENS = 512
_BUDGET = 8192  # tokens of a batch, padding included
_CANNOT = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """How a classifier is read: its labels, lowest level first, if config.json does not name them as the guideline does.

    `cuts` makes levels of a model with one output, such as a reranker: the level is how many cuts its output passes.
    """

    labels: tuple[str, ...] | None = None
    cuts: tuple[float, ...] | None = None
    max_tokens: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.cuts is not None and (list(self.cuts) != sorted(set(self.cuts)) or not np.isfinite(self.cuts).all()):
            raise TowerError(f"cuts are {self.cuts}. Give finite numbers, each larger than the one before.")
        if self.max_tokens is not None and not 8 <= self.max_tokens <= _MOST_TOKENS:  # noqa: PLR2004  two texts and three special tokens
            raise TowerError(f"max_tokens is {self.max_tokens}. Give 8 to {_MOST_TOKENS}, or leave it out.")


class ClassifierJudge:
    """A judge that is a directory of transformers: config.json with the labels, safetensors, and a tokenizer."""

    def __init__(self, directory: Path, options: ClassifierOptions | None = None, *, guideline: Guideline = THREE_LEVELS) -> None:
        self.directory, self.guideline = directory, guideline
        self.options = options or ClassifierOptions()
        record = _record(directory)
        self.device = choose_device(self.options.device)
        self._model = _model(directory).to(self.device).eval()
        self.max_tokens = _room(self._model.config, self.options.max_tokens or int(record.get("max_tokens", 256)))
        self._tokenizer = _tokenizer(directory)
        self._order = _order(self._model.config, self.options, guideline, directory)
        files = _files_digest(directory)
        if record and record["files"] != files:
            raise TowerError(f"{directory}: the files are not those that {RECORD} tells of. Train the judge again, or take a good copy.")
        facts = [FORMAT_VERSION, files, self._order, self.options.cuts, self.max_tokens, asdict(guideline)]
        self.version = f"{self._model.config.model_type}-{_digest(facts)[:16]}"

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Return one verdict for each pair, in order; pairs of about the same length run together."""
        verdicts: dict[int, Verdict] = {}
        with torch.inference_mode():
            for rows, inputs in _batches(self._tokenizer, pairs, self.max_tokens):
                logits_BG = self._model(**_on(inputs, self.device)).logits.float().cpu()
                verdicts |= zip(rows, self._verdicts(logits_BG), strict=True)
        return [verdicts[number] for number in range(len(pairs))]

    def _verdicts(self, logits_BG: torch.Tensor) -> list[Verdict]:
        if not torch.isfinite(logits_BG).all():
            raise EncoderError(f"{self.directory}: the judge's outputs are no numbers. Its weights are damaged: take a good copy.")
        if self.options.cuts is not None:
            passed = torch.searchsorted(torch.tensor(self.options.cuts), logits_BG[:, 0].contiguous())
            return [Verdict(grade=level) for level in passed.tolist()]
        chances = torch.softmax(logits_BG[:, list(self._order)].double(), dim=1).tolist()
        return [Verdict(grade=max(range(len(row)), key=row.__getitem__), probabilities=tuple(row)) for row in chances]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a cross-encoder is trained. `class_weights` weighs rare levels up, so that each counts alike in the loss."""

    epochs: int = 2
    max_steps: int | None = None
    batch_pairs: int = 32
    lr: float = 3e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    held_out: float = 0.1
    max_tokens: int = 192
    class_weights: bool = True
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        whole = min(self.epochs, self.batch_pairs, 1 if self.max_steps is None else self.max_steps) >= 1
        shares = 0 <= self.warmup < 1 and 0 <= self.held_out < 1
        if not (whole and shares and self.lr > 0 and self.weight_decay >= 0 and 8 <= self.max_tokens <= _MOST_TOKENS):  # noqa: PLR2004  see above
            raise EncoderError(f"{self} cannot be: counts are 1 or more, shares lie in [0, 1), and max_tokens in 8 to {_MOST_TOKENS}.")


@dataclass(frozen=True, kw_only=True)
class TrainedJudge:
    """What training gave: the judge's version, the data by digest, and how it agrees with the pairs that were held out."""

    version: str
    data_digest: str
    steps: int
    trained_pairs: int
    held_out_pairs: int
    first_loss: float
    last_loss: float
    agreement: Agreement | None


def train_cross_encoder(
    base: Path,
    pairs: Sequence[Pair],
    levels: Sequence[int],
    *,
    target: Path,
    options: TrainingOptions | None = None,
    guideline: Guideline = THREE_LEVELS,
) -> TrainedJudge:
    """Train a judge from the weights of a tower (or any encoder of transformers) and write it to `target`.

    Queries are held out whole. The agreement is of the judge as it was written, opened again.
    """
    options = options or TrainingOptions()
    count = len(guideline.names)
    if len(pairs) != len(levels) or any(not 0 <= level < count for level in levels):
        raise EncoderError(f"{len(levels)} levels for {len(pairs)} pairs: give one from 0 to {count - 1} for each pair.")
    if target.exists():
        raise EncoderError(f"{target} exists. Name a directory that does not.")
    held = [_held_out(pair.query, options) for pair in pairs]
    kept = [number for number, out in enumerate(held) if not out]
    if len({levels[number] for number in kept}) < 2:  # noqa: PLR2004  one level teaches nothing
        raise EncoderError(f"{len(kept)} of {len(pairs)} pairs are left to train on, of one level or none. Give more judged queries.")
    folder = _folder(base)
    own = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
    taught = [(pairs[number], levels[number]) for number in kept]
    losses = _written(folder, taught, own, options, guideline)
    facts = {"format_version": FORMAT_VERSION, "max_tokens": options.max_tokens, "files": _files_digest(own)}
    data_digest = _digest([[pair.query, pair.text, int(level)] for pair, level in zip(pairs, levels, strict=True)])
    (own / RECORD).write_bytes(_json(facts))
    judge = ClassifierJudge(own, ClassifierOptions(device=options.device), guideline=guideline)
    out = [number for number in range(len(pairs)) if held[number]]
    said = agreement(judge, [pairs[number] for number in out], [levels[number] for number in out]) if out else None
    trained = TrainedJudge(
        version=judge.version,
        data_digest=data_digest,
        steps=len(losses),
        trained_pairs=len(kept),
        held_out_pairs=len(out),
        first_loss=losses[0],
        last_loss=losses[-1],
        agreement=said,
    )
    (own / RECORD).write_bytes(_json({**facts, "base_files": _files_digest(folder), "options": asdict(options), **asdict(trained)}))
    own.rename(target)
    return trained


def _written(folder: Path, taught: Sequence[tuple[Pair, int]], own: Path, options: TrainingOptions, guideline: Guideline) -> list[float]:
    """Train a model, write it as transformers does, and return the loss of each step. The caller's random state stays as it was."""
    devices: list[int] | None = [] if choose_device(options.device).type == "cpu" else None  # None: all of them
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(options.seed)
        model, tokenizer = _model(folder, fresh_head=guideline), _tokenizer(folder)
        model.config.pad_token_id = tokenizer.pad_token_id  # a decoder finds the last token of a text by it
        options = replace(options, max_tokens=_room(model.config, options.max_tokens))
        losses = _fit(model, tokenizer, [pair for pair, _ in taught], [level for _, level in taught], options)
    with quiet():
        model.cpu().save_pretrained(own, safe_serialization=True)
        tokenizer.save_pretrained(own)
    return losses


def _fit(model: Any, tokenizer: Any, pairs: Sequence[Pair], levels: Sequence[int], options: TrainingOptions) -> list[float]:
    """Minimise cross-entropy with AdamW, the rate rising and then falling in lines, and return the loss of each step."""
    device = choose_device(options.device)
    model.to(device).train()
    level_B = np.asarray(levels, np.int64)
    weights = torch.tensor(_weights(level_B, model.config.num_labels, even=options.class_weights), device=device)
    steps = options.epochs * -(-len(pairs) // options.batch_pairs)
    steps = min(steps, options.max_steps or steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    rising = max(1, round(options.warmup * steps))
    pace = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising)))
    losses: list[float] = []
    for step, rows in zip(range(steps), _rounds(pairs, options), strict=False):
        inputs = _tokenized(tokenizer, [pairs[row] for row in rows], options.max_tokens)
        logits_BG = model(**_on(inputs, device)).logits.float()
        loss = torch.nn.functional.cross_entropy(logits_BG, torch.tensor(level_B[rows], device=device), weight=weights)
        optimizer.zero_grad()
        loss.backward()
        size = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(loss) or not torch.isfinite(size):
            raise EncoderError(f"Step {step}: the loss is {loss.item()} and the gradient {size.item()}. Lower lr, now {options.lr}.")
        optimizer.step()
        pace.step()
        losses.append(loss.item())
    return losses


def _rounds(pairs: Sequence[Pair], options: TrainingOptions) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the rows of batches, epoch after epoch: texts of one length together, so that little is padding."""
    lengths = np.array([len(pair.query) + len(pair.text) for pair in pairs])
    draws = np.random.default_rng(options.seed)
    for _ in range(options.epochs):
        order = draws.permutation(len(pairs))
        batches = []
        for start in range(0, len(order), 50 * options.batch_pairs):
            near = order[start : start + 50 * options.batch_pairs]
            near = near[np.argsort(lengths[near], kind="stable")]
            batches += [near[begin : begin + options.batch_pairs] for begin in range(0, len(near), options.batch_pairs)]
        yield from (batches[number] for number in draws.permutation(len(batches)))


def _weights(level_B: npt.NDArray[np.int64], levels: int, *, even: bool) -> npt.NDArray[np.float32]:
    """Return the weight of each level: n / (levels that occur * n of the level), or 1."""
    counts_G = np.bincount(level_B, minlength=levels)
    if not even:
        return np.ones(levels, np.float32)
    return np.asarray(counts_G.sum() / (np.count_nonzero(counts_G) * np.maximum(counts_G, 1)), np.float32)


def _held_out(query: str, options: TrainingOptions) -> bool:
    digest = hashlib.blake2b(f"{options.seed}\x1f{query}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < options.held_out * 2**64


def _folder(base: Path) -> Path:
    """Return where the transformer of a tower lies: the first module of modules.json, or the directory itself."""
    path = base / "modules.json"
    if not path.is_file():
        return base
    modules = parse_json(path.read_bytes(), str(path), kind=list)
    first = modules[0].get("path", "") if modules and isinstance(modules[0], dict) else ""
    if not isinstance(first, str) or Path(first).is_absolute() or ".." in Path(first).parts:
        raise TowerError(f"{path}: the first module lies in {str(first)[:100]!r}, outside the tower. Export the tower again.")
    return base / first


def _model(folder: Path, *, fresh_head: Guideline | None = None) -> Any:
    """Return a sequence classifier, every weight from the files; `fresh_head` allows a new head and names its labels."""
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").exists():
        raise TowerError(f"{folder} has no config.json, or is an adapter. Give the directory of a whole model, its adapter merged.")
    parse_json((folder / "config.json").read_bytes(), str(folder / "config.json"))  # refuses a model that brings code
    named: dict[str, Any] = {}
    if fresh_head is not None:
        names = dict(enumerate(fresh_head.names))
        named = {"num_labels": len(names), "id2label": names, "label2id": {name: number for number, name in names.items()}}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **named)
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",  # named, because a configuration could name a kernel to download; all have this one
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=False,
            )
    except _CANNOT as error:
        raise TowerError(
            f"{folder}: no classifier can be made of it: {str(error)[:300]}. Give a directory that transformers saved."
        ) from error
    lacking = sorted(str(name) for kind in ("missing_keys", "mismatched_keys", "error_msgs") for name in report.get(kind) or ())
    head = set() if fresh_head is None else _head(model)
    if absent := [name for name in lacking if name not in head]:
        raise TowerError(f"{folder}: the weights lack or misfit {', '.join(absent)[:300]}. A tower is no judge: train one from it.")
    return model


def _room(config: Any, wanted: int) -> int:
    """Return how many tokens of a pair are read: not more than a model has learned positions for."""
    known = ARCHITECTURES.get(config.model_type)
    places = getattr(config, "max_position_embeddings", None)
    if not isinstance(places, int) or known is None or known.positions == "rotary":
        return wanted
    return min(wanted, places - known.first_position(config.pad_token_id))


def _head(model: Any) -> set[str]:
    """Return the names of weights that a tower need not bring: the classifier, and the pooler in front of it."""
    inside = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(inside) or name.startswith(f"{inside}pooler.")}


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, use_fast=True)
    except _CANNOT as error:
        raise TowerError(f"{folder}: the tokenizer cannot be read: {str(error)[:300]}. Save it again beside the model.") from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise TowerError(f"{folder}: the tokenizer is slow, or has no padding token. Save it with tokenizer.json and a pad_token.")
    return tokenizer


def _order(config: Any, options: ClassifierOptions, guideline: Guideline, directory: Path) -> tuple[int, ...]:
    """Return which output is which level."""
    if options.cuts is not None:
        if config.num_labels != 1 or len(options.cuts) != len(guideline.names) - 1:
            told = f"{len(options.cuts)} cuts for {len(guideline.names)} levels and a model of {config.num_labels} outputs"
            raise TowerError(f"{directory}: {told}. Cuts are for one output, and one fewer than the levels.")
        return (0,)
    outputs = {str(name).casefold(): number for number, name in config.id2label.items()}
    wanted = [name.casefold() for name in options.labels or guideline.names]
    if sorted(outputs) != sorted(wanted) or len(wanted) != len(guideline.names):
        advice = "Give labels (its own names, lowest level first), or cuts if it has one output"
        raise TowerError(f"{directory}: the outputs are {', '.join(outputs)[:200]}, the levels {', '.join(wanted)}. {advice}.")
    return tuple(outputs[name] for name in wanted)


def _batches(tokenizer: Any, pairs: Sequence[Pair], max_tokens: int) -> Iterator[tuple[list[int], Any]]:
    """Yield the numbers and the inputs of pairs, long ones first: the first batch shows whether memory suffices."""
    lengths = [len(pair.query) + len(pair.text) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda number: -lengths[number])
    while order:
        # A token is three letters or more in the languages that shops write; where it is not, the batch is a little larger.
        longest = min(max_tokens, lengths[order[0]] // 3 + 8)
        rows, order = order[: max(1, _BUDGET // longest)], order[max(1, _BUDGET // longest) :]
        yield rows, _tokenized(tokenizer, [pairs[row] for row in rows], max_tokens)


def _tokenized(tokenizer: Any, pairs: Sequence[Pair], max_tokens: int) -> Any:
    queries, texts = [pair.query for pair in pairs], [pair.text for pair in pairs]
    # longest_first: the product text is cut, and the query only if it is the longer one.
    return tokenizer(queries, texts, padding=True, truncation="longest_first", max_length=max_tokens, return_tensors="pt")


def _on(inputs: Any, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    if not path.is_file():
        return {}
    record: dict[str, Any] = parse_json(path.read_bytes(), str(path))
    if record.get("format_version") != FORMAT_VERSION or type(record.get("max_tokens")) is not int or "files" not in record:
        raise TowerError(f"{path} is not as training writes it. Train the judge again, or upgrade.")
    return record


def _files_digest(directory: Path) -> str:
    """Hash the files that decide an answer: configuration, weights and tokenizer."""
    names = sorted(path.name for path in directory.iterdir() if path.suffix == ".safetensors" or path.name in {"config.json", *TOKENIZER})
    digests = []
    for name in names:
        with (directory / name).open("rb") as file:
            digests.append([name, hashlib.file_digest(file, "sha256").hexdigest()])
    return _digest(digests)


def _digest(tree: Any) -> str:
    return hashlib.sha256(_json(tree)).hexdigest()


def _json(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
