"""One query at a time: what a search waits for, ours against the bare model and tokenizer of transformers, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from encoder.bench.corpus import queries
from encoder.bench.padded import Forward
from encoder.bench.workbench import Workbench

_WARM_UP = 5


def latency(bench: Workbench) -> dict[str, Any]:
    """Return the median and the 95th percentile of both, in milliseconds, and ours as a share of the bare one."""
    forward, prompt = Forward(bench), bench.card.query_prompt
    ways: dict[str, Callable[[str], object]] = {
        "ours": lambda text: bench.ours.encode([text], kind="query"),
        "bare": lambda text: forward.embed(forward.tokenize([text], prompt=prompt)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number, text in enumerate(queries(bench.options.queries + _WARM_UP)):
        for name in list(ways) if number % 2 else reversed(list(ways)):
            begin = time.perf_counter()
            ways[name](text)  # the vector is on the host when it returns
            if number >= _WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    found: dict[str, Any] = {"queries": bench.options.queries}
    for name, times in seconds.items():
        p50, p95 = np.percentile(times, [50, 95]) * 1000
        found[name] = {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3)}
    found["ratio"] = {name: round(found["ours"][name] / found["bare"][name], 3) for name in ("p50_ms", "p95_ms")}
    return found
