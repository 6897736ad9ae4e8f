"""One tower and one corpus: everyone started, checked, and run in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from encoder.bench.corpus import Corpus
from encoder.bench.fidelity import between_texts, compare, complaints, reference, sample
from encoder.bench.latency import latency
from encoder.bench.limits import Products, Work, matrix_rate, work_of
from encoder.bench.rivals import OURS, RIVALS
from encoder.bench.rounds import Entrant, alternate, reason
from encoder.bench.table import LIMIT_BEST, LIMIT_LINEAR, Line, Outcome, result
from encoder.bench.workbench import SkippedError, Started, Workbench
from encoder.errors import EncoderError

Say = Callable[[str], None]


class UnfaithfulError(EncoderError):
    """The vectors are not those of the model: their speed means nothing."""


def contest(bench: Workbench, corpus: Corpus, *, say: Say) -> dict[str, Any]:
    """Check and measure everyone on a corpus, and return the result as plain data. Wrong vectors of ours end it."""
    bench.corpus = corpus
    facts = corpus.facts()
    lengths = f"median {facts['median']}, p95 {facts['p95']}, {facts['duplicates']:.1%} repeated"
    say(f"\n{bench.label}\n{facts['name']}: {facts['texts']:,} texts, {facts['tokens']:,} tokens, {lengths}")
    lines, left_out, spread = _start(bench, corpus, say)
    _warm_up(bench, corpus, lines)
    work = work_of(bench.model(), causal=bench.causal)
    entrants = {name: _entrant(bench, corpus, name, line.started) for name, line in lines.items()}
    limits, ways = _limits(bench, corpus, work)
    entrants |= limits
    rounds = alternate(entrants, rounds=bench.options.rounds, threads=bench.threads, device=bench.device, say=say)
    outcome = Outcome(
        bench=bench,
        corpus=corpus,
        lines=lines,
        left_out=left_out,
        entrants=entrants,
        rounds=rounds,
        work=work,
        rate=_rate(bench),
        ways=ways,
    )
    return result(outcome) | {"between_texts": round(spread, 4), "latency": latency(bench)}


def _start(bench: Workbench, corpus: Corpus, say: Say) -> tuple[dict[str, Line], dict[str, dict[str, str]], float]:
    """Start everyone that was asked for and compare their vectors; those that cannot are returned with their reasons."""
    texts = sample(corpus, bench.options.sample_texts)
    wanted = reference(bench, texts)
    lines: dict[str, Line] = {}
    left_out: dict[str, dict[str, str]] = {}
    ours = wanted
    for name in dict.fromkeys([OURS, *(bench.options.rivals or RIVALS)]):
        try:
            started = RIVALS[name].start(bench)
            vectors = started.run(texts)
        except SkippedError as error:
            left_out[name] = {"status": "skipped", "reason": str(error)}
        except Exception as error:
            if name == OURS:
                raise
            left_out[name] = {"status": "failed", "reason": reason(error)}
        else:
            ours = vectors if name == OURS else ours
            lines[name] = Line(started=started, fidelity=compare(vectors, wanted, ours))
        said = left_out.get(name)
        say(f"  {name}: {said['status']}, {said['reason']}" if said else f"  {name}: cosine {lines[name].fidelity.least:.6f} at least")
    wrong = complaints({name: line.fidelity for name, line in lines.items()}, ours=OURS, dtype=bench.dtype)
    if wrong:
        raise UnfaithfulError(f"{bench.label}: {'; '.join(wrong)}. Nothing was timed: mend the encoder first.")
    return lines, left_out, between_texts(wanted)


def _warm_up(bench: Workbench, corpus: Corpus, lines: dict[str, Line]) -> None:
    """Let everyone allocate, and choose kernels, before it counts. On a CPU the comparison of vectors was enough of that."""
    texts = corpus.texts[: (20_000 if bench.on_cuda else 0) if bench.options.warm_texts is None else bench.options.warm_texts]
    for name, line in lines.items() if texts else ():
        if RIVALS[name].here:
            line.started.run(texts if RIVALS[name].ahead else texts[: max(1, len(texts) // 10)])


def _entrant(bench: Workbench, corpus: Corpus, name: str, started: Started) -> Entrant:
    """Return a rival with its share of the corpus: a part for those that never look ahead of a block."""
    most = bench.options.slow_texts or (20_000 if bench.on_cuda else 600)
    part = corpus if RIVALS[name].ahead else corpus.first(most)
    return Entrant(
        run=lambda: started.run(part.texts), texts=len(part.texts), tokens=part.tokens, here=RIVALS[name].here, own_clock=started.own_clock
    )


def _limits(bench: Workbench, corpus: Corpus, work: Work) -> tuple[dict[str, Entrant], dict[str, Any]]:
    """Return the products alone as entrants: as the model has them, and the fastest way. On CUDA they are counted instead."""
    if not _runs_products(bench):
        return {}, {}
    budget = max(bench.ours.token_budget, int(corpus.lengths.max()))
    products = Products(bench.model(), work, budget=budget, threads=bench.threads)
    found, ways = {}, {}
    for name, prepacked in ((LIMIT_LINEAR, False), (LIMIT_BEST, None)):
        way, seconds = products.choose(corpus.lengths, prepacked=prepacked)
        ways[name] = {"way": str(way), "pack_tokens": budget, "trial_s": seconds}
        found[name] = Entrant(
            run=lambda way=way: products.run(corpus.lengths, way),  # type: ignore[misc]
            texts=len(corpus.texts),
            tokens=corpus.tokens,
        )
    return found, ways


def _runs_products(bench: Workbench) -> bool:
    return bench.options.limit == "products" or (bench.options.limit == "auto" and bench.device.type == "cpu")


def _rate(bench: Workbench) -> float | None:
    """Return the rate of one large product, measured once for the device and number format."""
    if _runs_products(bench):
        return None
    return float(bench.keep("rate", lambda: matrix_rate(bench.device, bench.dtype, size=bench.options.matrix_size)))
