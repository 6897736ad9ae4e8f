"""The pace that suits a tower on this machine: tried out for some seconds, and kept for the next time.

Which pack fits the cache, and whether packs side by side beat threads inside one, is a matter of the processor, the tower
and its number format: measured, not known. What is kept is named for all three; nobody need ever delete it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from encoder.engine import Pace
from encoder.inference import Encoder
from encoder.tokens import Tokens

FORMAT_VERSION = 1

_CPU_BUDGETS = (512, 1024, 2048)
_CUDA_BUDGETS = (8192, 16384, 32768, 65536, 131072)
# A trial is so long that a pause of the machine does not decide it, and all are over before a nightly run would notice.
_TRIAL_S = 0.3
_MOST_S = 6.0
_ROUNDS = 2
# Below this a difference is noise, and the usual pace stays. Fewer lanes suffer more where others use the machine too, and a
# trial does not know who else will.
_WORTH, _WORTH_LANES = 1.03, 1.1
# No pack is larger; what is kept and says otherwise is damaged.
_MOST_TOKENS = 1 << 20
# Lengths of product texts: half below 45 tokens, one in twenty above 180.
_MEDIAN_TOKENS, _SPREAD = 45, 0.84


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A pace, and the tokens a second that were measured with it and with the usual one."""

    pace: Pace
    tokens_per_s: float
    usual_tokens_per_s: float
    seconds: float
    kept: bool = False


def calibrate(encoder: Encoder, *, cache: Path | None = None, fresh: bool = False) -> Calibration:
    """Set the encoder to its best pace and return it: the one that is kept for this machine, or measured now and kept."""
    path = cache / f"pace-{_key(encoder)}.json" if cache is not None else None
    found = _kept(path, encoder) if path is not None and not fresh else None
    if found is None:
        found = measure(encoder)
        if path is not None:
            _keep(path, found)
    encoder.pace = found.pace
    return found


def recall(encoder: Encoder, *, cache: Path) -> bool:
    """Set the encoder to the pace that is kept for this machine; say whether there is one."""
    found = _kept(cache / f"pace-{_key(encoder)}.json", encoder)
    if found is not None:
        encoder.pace = found.pace
    return found is not None


def measure(encoder: Encoder, *, most_s: float = _MOST_S) -> Calibration:
    """Try paces in turn and return the fastest; the usual one unless another is clearly faster."""
    began = time.perf_counter()
    usual = encoder.pace
    try:
        chosen, best = usual, {usual: _rate(encoder, usual, tokens=1)}  # warms up as well
        for others, worth in ((_lanes, _WORTH_LANES), (_budgets, _WORTH)):
            for pace in [chosen, *others(encoder, chosen)] * _ROUNDS:
                if time.perf_counter() - began < most_s:
                    best[pace] = max(best.get(pace, 0.0), _rate(encoder, pace, tokens=int(best[usual] * _TRIAL_S)))
            fastest = max(best, key=lambda pace: best[pace])
            chosen = fastest if best[fastest] > worth * best[chosen] else chosen
    finally:
        encoder.pace = usual
    seconds = time.perf_counter() - began
    return Calibration(pace=chosen, tokens_per_s=best[chosen], usual_tokens_per_s=best[usual], seconds=seconds)


def _lanes(encoder: Encoder, usual: Pace) -> Iterator[Pace]:
    """Yield other ways to share the threads: in whole parts, from one lane to one lane each."""
    if not _on_cpu(encoder):
        return
    count = 1
    while count <= usual.threads:
        if count != usual.lanes and usual.threads % count == 0:
            yield replace(usual, lanes=count)
        count *= 2


def _budgets(encoder: Encoder, pace: Pace) -> Iterator[Pace]:
    """Yield other budgets; on a GPU none that memory has no room for."""
    if _on_cpu(encoder):
        budgets: tuple[int, ...] = _CPU_BUDGETS
    else:
        budgets = tuple(budget for budget in _CUDA_BUDGETS if encoder.fits(budget))
    yield from (replace(pace, token_budget=budget) for budget in budgets if budget != pace.token_budget)


def _rate(encoder: Encoder, pace: Pace, *, tokens: int) -> float:
    """Return the tokens a second of a pace, over so many tokens, and a pack for each lane; 0 where memory has no room for it."""
    size = max(tokens, pace.token_budget * pace.lanes)
    texts = sample(size, vocabulary=encoder.vocabulary, max_tokens=encoder.card.max_tokens)
    encoder.pace = pace
    start, halvings = time.perf_counter(), encoder.halvings
    encoder.encode_tokens(texts)
    return texts.ids.size / (time.perf_counter() - start) if encoder.halvings == halvings else 0.0


def sample(count: int, *, vocabulary: int, max_tokens: int) -> Tokens:
    """Return about so many tokens, in texts as long as those of products. Always the same."""
    draws = np.random.default_rng(0)
    texts = max(4, count // _MEDIAN_TOKENS)
    lengths = np.exp(draws.normal(np.log(_MEDIAN_TOKENS), _SPREAD, texts)).astype(np.int64).clip(2, max_tokens)
    lengths = lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), count)))]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(ids=draws.integers(0, vocabulary, int(offsets[-1]), dtype=np.int32), offsets=offsets)


def _on_cpu(encoder: Encoder) -> bool:
    return bool(torch.device(encoder.device).type == "cpu")


def _key(encoder: Encoder) -> str:
    """Name the machine, the tower and how it runs."""
    device = torch.device(encoder.device)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    facts = [FORMAT_VERSION, processor, torch.__version__, encoder.fingerprint, encoder.dtype, encoder.engine, device.type]
    if device.type == "cpu":
        facts += [torch.backends.cpu.get_cpu_capability(), os.cpu_count(), encoder.pace.threads]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _kept(path: Path, encoder: Encoder) -> Calibration | None:
    """Return what was kept, or nothing: a file that is no calibration of this encoder is measured anew."""
    try:
        tree = json.loads(path.read_bytes())
        pace = Pace(**{name: int(tree["pace"][name]) for name in ("token_budget", "lanes")}, threads=encoder.pace.threads)
        rates = {name: float(tree[name]) for name in ("tokens_per_s", "usual_tokens_per_s", "seconds")}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    believable = pace.lanes <= pace.threads and pace.token_budget <= _MOST_TOKENS and all(0 < rate < math.inf for rate in rates.values())
    return Calibration(pace=pace, kept=True, **rates) if believable and encoder.fits(pace.token_budget) else None


def _keep(path: Path, found: Calibration) -> None:
    """Write it whole or not at all. It is a convenience: where it cannot be written, it is measured again."""
    data = json.dumps(asdict(found) | {"format_version": FORMAT_VERSION}, sort_keys=True).encode()
    own = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        own.write_bytes(data)
        own.replace(path)
    except OSError:
        own.unlink(missing_ok=True)
