"""`python -m encoder.bench`: measure this encoder against its rivals and its limit, and say what was measured.

Needs torch, transformers, tokenizers, safetensors, numpy and pyarrow; a rival whose library is absent is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from encoder.bench.contest import contest
from encoder.bench.corpus import FIXED_LENGTHS, make_corpus
from encoder.bench.machine import facts
from encoder.bench.report import chart, table
from encoder.bench.rivals import RIVALS
from encoder.bench.towers import SHAPES, open_tower
from encoder.bench.workbench import BenchOptions, Workbench
from encoder.errors import EncoderError
from encoder.inference import EncodeOptions
from encoder.loading import choose_device, quiet
from encoder.registry import Dtype
from encoder.tokens import Tokenizer

SUITE = ("minilm", "e5-base", "qwen3-0.6b")
LENGTHS = ("mixed", *map(str, FIXED_LENGTHS))
_TEXTS = {"cuda": 200_000}
_CPU_TEXTS = 3000
_FORMAT = "encoder-bench 1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code: 0, or 1 where vectors are wrong."""
    asked = _parser().parse_args(arguments)
    threads = torch.get_num_threads()
    try:
        _check(asked)
        with quiet():
            _run(asked)
    except EncoderError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    finally:
        torch.set_num_threads(threads)
    return 0


def _run(asked: argparse.Namespace) -> None:
    options = _options(asked)
    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine, results = facts(device), list[dict[str, Any]]()
    texts = asked.texts or _TEXTS.get(device.type, _CPU_TEXTS)
    _say(f"{machine['cpu']}, {machine['cpu_capability']}, {machine['threads']} threads, load {machine['load_1m']}")
    for name in SUITE if asked.suite else (asked.tower,):
        with open_tower(name) as (directory, label):
            bench = Workbench(directory=directory, label=label, options=options)
            for lengths in LENGTHS if asked.suite else asked.lengths:
                corpus = make_corpus(Tokenizer(directory, card=bench.card), name=lengths, texts=texts, seed=asked.seed)
                results.append(contest(bench, corpus, say=_say))
                _say("\n" + table(results[-1]))
                _write(asked.out, machine, results)  # a run that is cut short keeps what it has


def _write(out: Path | None, machine: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the results and their chart beside them."""
    if out is None:
        return
    tree = {"format": _FORMAT, "machine": machine, "results": results}
    out.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    out.with_suffix(".svg").write_text(chart(results, machine=machine), encoding="utf-8")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _options(asked: argparse.Namespace) -> BenchOptions:
    return BenchOptions(
        rounds=asked.rounds,
        device=asked.device,
        dtype=asked.dtype,
        threads=asked.threads,
        rivals=tuple(asked.rivals or ()),
        batch_sizes=tuple(asked.batch_sizes) if asked.batch_sizes else None,
        slow_texts=asked.slow_texts,
        pilot_texts=asked.pilot_texts,
        warm_texts=asked.warm_texts,
        sample_texts=asked.sample_texts,
        queries=asked.queries,
        limit=asked.limit,
        matrix_size=asked.matrix_size,
        peak=asked.peak,
        pace=asked.pace,
        ray=asked.ray,
    )


def _check(asked: argparse.Namespace) -> None:
    """Refuse what cannot be run, before anything is loaded."""
    unknown = [name for name in asked.rivals or () if name not in RIVALS]
    if unknown:
        raise EncoderError(f"--rivals {', '.join(unknown)}: no such rival. Choose from {', '.join(RIVALS)}.")
    for name in ("texts", "rounds", "threads", "slow_texts", "pilot_texts", "sample_texts", "queries", "matrix_size"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise EncoderError(f"--{name.replace('_', '-')} is {value}. Give 1 or more.")
    EncodeOptions(threads=asked.threads)  # refuses more than there can be
    if asked.seed < 0 or (asked.warm_texts or 0) < 0 or any(size < 1 for size in asked.batch_sizes or ()):
        raise EncoderError("--seed and --warm-texts are 0 or more, --batch-sizes 1 or more.")
    if asked.peak is not None and asked.peak <= 0:
        raise EncoderError(f"--peak is {asked.peak:g}. Give the device's TFLOP/s.")
    if not asked.lengths:
        raise EncoderError(f"--lengths names nothing. Choose from {', '.join(LENGTHS)}, or give a number of tokens.")
    if asked.out is not None:
        _check_out(asked.out)


def _check_out(out: Path) -> None:
    """Refuse a place that cannot be written now, and not when everything is measured."""
    if out.suffix != ".json":
        raise EncoderError(f"--out is {out}. Name a file that ends in .json; the chart goes beside it as .svg.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = out.exists()
        out.open("a", encoding="utf-8").close()
        if not kept:
            out.unlink()
    except OSError as error:
        raise EncoderError(f"--out {out} cannot be written ({error.strerror}). Name another place.") from error


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in _names(text)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m encoder.bench", description=(__doc__ or "").partition("\n")[0].partition(": ")[2])
    tower = f"a directory, or a shape made on the spot: {', '.join(SHAPES)}. minilm is the installed one where it is"
    parser.add_argument("--tower", default="minilm", help=f"{tower} (default: minilm)")
    parser.add_argument("--suite", action="store_true", help=f"run {', '.join(SUITE)} on every length")
    parser.add_argument(
        "--lengths", type=_names, default=["mixed"], help=f"comma list of {', '.join(LENGTHS)}, or other numbers of tokens (default: mixed)"
    )
    parser.add_argument("--texts", type=int, help=f"texts of the corpus (default: {_CPU_TEXTS:,}; {_TEXTS['cuda']:,} on CUDA)")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus")
    parser.add_argument("--rounds", type=int, default=3, help="how often everyone runs (default: 3)")
    parser.add_argument("--rivals", type=_names, help=f"comma list of {', '.join(RIVALS)} (default: all; ours always runs)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<number> or mps")
    parser.add_argument("--dtype", default="auto", choices=get_args(Dtype), help="auto: bfloat16 on CUDA, else float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--batch-sizes", type=_numbers, help="comma list that sentence-transformers may choose from")
    parser.add_argument("--slow-texts", type=int, help="texts for those that work in corpus order (default: 600; 20,000 on CUDA)")
    parser.add_argument("--pilot-texts", type=int, help="texts on which batch sizes are compared (default: 1,024; 20,480 on CUDA)")
    parser.add_argument("--warm-texts", type=int, help="texts that everyone runs before the rounds (default: 0; 20,000 on CUDA)")
    parser.add_argument("--sample-texts", type=int, default=200, help="texts whose vectors are compared (default: 200)")
    parser.add_argument("--queries", type=int, default=100, help="queries for the latency (default: 100)")
    parser.add_argument(
        "--limit", default="auto", choices=("auto", "products", "counted"), help="products: run them; counted: against one large product"
    )
    parser.add_argument("--matrix-size", type=int, default=8192, help="of the large product (default: 8192)")
    parser.add_argument("--peak", type=float, help="TFLOP/s that the device is said to have")
    parser.add_argument("--pace", default="measured", choices=("measured", "usual"), help="of ours: calibrated first, or as it comes")
    parser.add_argument("--ray", action="store_true", help="also start Ray and run its own map_batches")
    parser.add_argument("--out", type=Path, help="write this JSON file, and an SVG chart beside it")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    raise SystemExit(main())
