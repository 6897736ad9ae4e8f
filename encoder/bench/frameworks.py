"""Rivals that bring a runtime of their own: ONNX Runtime, Ray Data and Daft. None is needed, each is used where it is installed."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder.bench.padded import SORTED_BUDGETS, Forward, padded, pooled, sorted_by_length
from encoder.bench.workbench import SkippedError, Started, Texts, Vectors, Workbench, library

RAY_BLOCK = 100


def onnx_runtime(bench: Workbench) -> Started:
    """Return the model exported to ONNX and run by its runtime, on texts sorted by length."""
    runtime = library("onnxruntime")
    for name in ("onnx", "onnxscript"):
        library(name)
    if bench.dtype != torch.float32:
        raise SkippedError(f"The exported model is float32, and this run is {bench.dtype}".replace("torch.", ""))
    provider = "CUDAExecutionProvider" if bench.on_cuda else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise SkippedError(f"This onnxruntime has no {provider}")
    forward = bench.keep("onnx", lambda: _OnnxForward(bench, runtime, provider))
    budget = SORTED_BUDGETS.get(bench.device.type, SORTED_BUDGETS["cuda"])
    return Started(
        run=lambda texts: sorted_by_length(forward, texts, budget=budget), settings={"padded_tokens": budget, "provider": provider}
    )


class _LastStates(torch.nn.Module):  # type: ignore[misc]  # torch is read without its types
    """A model whose inputs and output are plain tensors, which is what an export wants."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states of the last layer."""
        states: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).last_hidden_state
        return states


class _OnnxForward(Forward):
    """The same texts and the same pooling around a session of ONNX Runtime."""

    def __init__(self, bench: Workbench, runtime: Any, provider: str) -> None:
        super().__init__(bench)
        settings = runtime.SessionOptions()
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.intra_op_num_threads = bench.threads
        settings.log_severity_level = 3
        ids, mask = torch.ones(2, 8, dtype=torch.int64, device=bench.device), torch.ones(2, 8, dtype=torch.int64, device=bench.device)
        shape = {0: torch.export.Dim("texts", min=1, max=1 << 16), 1: torch.export.Dim("tokens", min=2, max=bench.card.max_tokens)}
        with tempfile.TemporaryDirectory(prefix="encoder-bench-onnx-") as folder:
            target = Path(folder, "model.onnx")
            module = _LastStates(self._model, self._options).eval()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    module,
                    (ids, mask),
                    str(target),
                    input_names=["input_ids", "attention_mask"],
                    output_names=["states"],
                    dynamic_shapes={"input_ids": shape, "attention_mask": shape},
                    dynamo=True,
                    verbose=False,
                )
            self._session = runtime.InferenceSession(str(target), settings, providers=[provider])

    def embed(self, ids: list[list[int]]) -> Vectors:
        """Return the vectors of one padded batch."""
        rows, mask = padded(ids, pad_id=self._pad)
        states = self._session.run(None, {"input_ids": rows.numpy(), "attention_mask": mask.numpy()})[0]
        return pooled(torch.from_numpy(states), mask, mode=self._card.pooling, dims=self._card.dims)


class SentenceTransformerUDF:
    """The class of Ray Data's recipe: a model in an actor, called on a batch of rows."""

    def __init__(self, directory: str, device: str, dtype: str, threads: int, prompt: str | None) -> None:
        torch.set_num_threads(threads)
        module = library("sentence_transformers")
        self._model = module.SentenceTransformer(
            directory, device=device, model_kwargs={"dtype": getattr(torch, dtype)}, local_files_only=True, trust_remote_code=False
        )
        self._prompt = prompt

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the vectors of a batch of rows, and when it was begun and done."""
        begin = time.time()
        vectors = self._model.encode(list(batch["text"]), prompt=self._prompt, normalize_embeddings=True, show_progress_bar=False)
        found = {"row": batch["row"], "vector": np.asarray(vectors, np.float32)}
        return found | {"begin": np.full(len(vectors), begin), "end": np.full(len(vectors), time.time())}


def ray_data(bench: Workbench) -> Started:
    """Return `map_batches` of Ray Data's documentation in one actor: batches of 100 rows, NumPy in and out.

    Its time is from the first batch to the last: on a short corpus the start of an actor would be most of it.
    """
    if not bench.options.ray:
        raise SkippedError("Not asked for: give --ray")
    ray = library("ray")
    data = library("ray.data")
    library("sentence_transformers")
    span = [0.0]

    def run(texts: Texts) -> Vectors:
        if not ray.is_initialized():
            # The actor finds this package where this process found it.
            root = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": str(bench.threads)}}
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=root)
            data.DataContext.get_current().enable_progress_bars = False
        rows = data.from_items([{"row": row, "text": text} for row, text in enumerate(texts)])
        arguments = (str(bench.directory), str(bench.device), str(bench.dtype).removeprefix("torch."), bench.threads)
        mapped = rows.map_batches(
            SentenceTransformerUDF,
            fn_constructor_args=(*arguments, bench.card.document_prompt or None),
            batch_size=RAY_BLOCK,
            compute=data.ActorPoolStrategy(size=1),
            num_gpus=1 if bench.on_cuda else 0,
        )
        vectors = np.empty((len(texts), bench.card.dims), np.float32)
        begin, end = float("inf"), 0.0
        for batch in mapped.iter_batches(batch_size=None, batch_format="numpy"):
            vectors[batch["row"]] = np.stack(batch["vector"])
            begin, end = min(begin, batch["begin"].min()), max(end, batch["end"].max())
        span[0] = float(end - begin)
        return vectors

    return Started(run=run, settings={"batch_size": RAY_BLOCK, "actors": 1}, own_clock=lambda: span[0])


def daft(bench: Workbench) -> Started:
    """Return Daft's own `embed_text` with the tower's directory as its model."""
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    module, functions = library("daft"), library("daft.functions")
    library("sentence_transformers")
    if bench.card.document_prompt:
        raise SkippedError("embed_text has no prompt, and this tower has one")

    def run(texts: Texts) -> Vectors:
        frame = module.from_pydict({"row": list(range(len(texts))), "text": texts})
        embedded = functions.embed_text(module.col("text"), provider="transformers", model=str(bench.directory))
        found = frame.with_column("vector", embedded).sort("row").to_arrow()
        lists = found.column("vector").combine_chunks()
        lists = getattr(lists, "storage", lists)  # an extension type of Daft's around lists of one size
        vectors = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(len(texts), -1)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    return Started(run=run, settings={"provider": "transformers"})
