"""Who takes part: ways to turn texts into vectors, each started on the same tower, device, number format and threads.

A rival's library is imported when it starts. One that is not installed, or fails, is left out with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from encoder.bench.frameworks import daft, onnx_runtime, ray_data
from encoder.bench.limits import synchronise
from encoder.bench.padded import SORTED_BUDGETS, Forward, in_order, sorted_by_length
from encoder.bench.workbench import Rival, SkippedError, Started, Texts, Vectors, Workbench, library
from encoder.calibration import calibrate

# The recipe of Ray Data's documentation, and what Daft does.
RAY_BLOCK, DAFT_CHUNK = 100, 64
LOOP_BATCH = 32
_BATCH_SIZES = (16, 32, 64, 128, 256)
_CUDA_BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
# A batch size this much slower than the best so far ends the search: larger ones pad more.
_HOPELESS = 1.5


def ours(bench: Workbench) -> Started:
    """Return our encoder as a nightly run has it: at the pace that was best on this machine, unless told otherwise."""
    encoder = bench.ours
    if bench.options.pace == "measured":
        bench.keep("pace", lambda: calibrate(encoder))
    settings = {
        "pace": bench.options.pace,
        "engine": encoder.engine,
        "token_budget": encoder.token_budget,
        "lanes": encoder.lanes,
        "threads": bench.threads,
    }
    return Started(run=encoder.encode, settings=settings)


def padded_twin(bench: Workbench) -> Started:
    """Return our encoder with the engine that pads."""
    encoder = bench.encoder("padded")
    return Started(run=encoder.encode, settings={"engine": encoder.engine, "token_budget": encoder.token_budget, "lanes": encoder.lanes})


def sentence_transformers(bench: Workbench) -> Started:
    """Return sentence-transformers on the whole corpus at once, with the batch size that was best on a part of it."""
    run = _sentence_transformers(bench)
    pilot, seconds = bench.pilot(), dict[int, float]()
    for size in bench.options.batch_sizes or (_CUDA_BATCH_SIZES if bench.on_cuda else _BATCH_SIZES):
        try:
            if bench.on_cuda:
                run(pilot, batch_size=size)  # the first run of a size pays for its memory
            begin = time.perf_counter()
            run(pilot, batch_size=size)
        except torch.OutOfMemoryError:
            break
        synchronise(bench.device)
        seconds[size] = time.perf_counter() - begin
        if seconds[size] > _HOPELESS * min(seconds.values()):
            break
    if not seconds:
        raise SkippedError("No batch size fits in memory")
    best = min(seconds, key=lambda size: seconds[size])
    tried = {str(size): round(len(pilot) / value, 1) for size, value in seconds.items()}
    return Started(run=lambda texts: run(texts, batch_size=best), settings={"batch_size": best, "tried_texts_per_s": tried})


def in_blocks(block: int) -> Callable[[Workbench], Started]:
    """Return sentence-transformers called on a block of texts at a time, each call with its own default batch size."""

    def start(bench: Workbench) -> Started:
        encode = _sentence_transformers(bench)

        def run(texts: Texts) -> Vectors:
            return np.concatenate([encode(texts[start : start + block], batch_size=LOOP_BATCH) for start in range(0, len(texts), block)])

        return Started(run=run, settings={"block": block, "batch_size": LOOP_BATCH})

    return start


def plain_loop(bench: Workbench) -> Started:
    """Return the loop that everybody writes first: batches in corpus order, padded to their longest."""
    forward = Forward(bench)
    return Started(run=lambda texts: in_order(forward, texts, batch_size=LOOP_BATCH), settings={"batch_size": LOOP_BATCH})


def sorted_loop(bench: Workbench) -> Started:
    """Return padded batches of texts sorted by length, within a budget of tokens."""
    forward = Forward(bench)
    budget = SORTED_BUDGETS.get(bench.device.type, SORTED_BUDGETS["cuda"])
    return Started(run=lambda texts: sorted_by_length(forward, texts, budget=budget), settings={"padded_tokens": budget})


def _sentence_transformers(bench: Workbench) -> Callable[..., Vectors]:
    """Return `SentenceTransformer.encode` with what makes it comparable: unit vectors, the document prompt, no bar."""
    module = library("sentence_transformers")

    def load() -> Any:
        return module.SentenceTransformer(
            str(bench.directory),
            device=str(bench.device),
            model_kwargs={"dtype": bench.dtype},
            truncate_dim=bench.card.dims,
            local_files_only=True,
            trust_remote_code=False,
        )

    model = bench.keep("sentence-transformers", load)
    prompt = bench.card.document_prompt or None

    def encode(texts: Texts, *, batch_size: int) -> Vectors:
        found = model.encode(texts, batch_size=batch_size, prompt=prompt, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)

    return encode


OURS, BASELINES = "ours", ("sentence-transformers", "sorted-loop")
RIVALS: dict[str, Rival] = {
    OURS: Rival(label="ours", start=ours, once=True),
    "padded": Rival(label="ours, padded twin", start=padded_twin, once=True),
    "sentence-transformers": Rival(label="sentence-transformers, whole corpus, best batch size", start=sentence_transformers),
    "sorted-loop": Rival(label="transformers, length-sorted, padded", start=sorted_loop),
    "plain-loop": Rival(label="transformers, corpus order, batches of 32", start=plain_loop, ahead=False),
    "ray-blocks": Rival(label="sentence-transformers on blocks of 100, as Ray documents", start=in_blocks(RAY_BLOCK), ahead=False),
    "daft-chunks": Rival(label="sentence-transformers on chunks of 64, as Daft does", start=in_blocks(DAFT_CHUNK), ahead=False),
    "onnx": Rival(label="ONNX Runtime, length-sorted", start=onnx_runtime),
    "daft": Rival(label="Daft itself, embed_text, loading counted", start=daft, ahead=False, here=False),
    "ray": Rival(label="Ray Data itself, batches of 100, its start not counted", start=ray_data, ahead=False, here=False),
}
