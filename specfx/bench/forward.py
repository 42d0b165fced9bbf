"""`specfx bench forward`: what one target forward costs, and what a decode step costs besides.

Forwards: a stock eager cached step of one token, and the engine's forward of 1, 8, 16, ... rows (a pending token and a chain of
drafts), all at the same context. One of each in turn, so that a ratio compares neighbours in time; medians over the repeats. An engine
with a draft head in its graph is measured beside the one without: the difference is what drafting costs.

Steps: `generate` calls with each method from a prompt of the same context; from their statistics, the share of a step's time that
is spent outside the forward (drafting, acceptance, bookkeeping). Prefill is left out of both sides.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specfx.bench import report
from specfx.bench.calls import generate, start
from specfx.bench.generate import NONE, parse_arms
from specfx.errors import OptionError, UnsupportedModelError
from specfx.runtime.tree import MAX_ROWS, DraftTree

if TYPE_CHECKING:
    from specfx.engines.base import Engine

STOCK_STEP = "stock, 1 token"
_SEQUENCE = 1_000_000_009  # far from the ids that the runtime hands out
_WARM_UPS = 3


def stock_step(model: Any, context: Sequence[int], token: int) -> Callable[[], float]:
    """A function that runs one stock cached step of `token` after `context` and returns its seconds."""
    import torch

    with torch.no_grad():
        filled = model(input_ids=torch.tensor([list(context)], device=model.device), use_cache=True).past_key_values
    ids = torch.tensor([[token]], device=model.device)

    def step() -> float:
        cache = copy.deepcopy(filled)  # a step appends to its cache; each starts from the same context
        with torch.no_grad():
            return _timed(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True))

    return step


def engine_step(engine: Engine, token: int, rows: int) -> Callable[[], float]:
    """The same for an engine's forward of `rows` rows. Nothing is committed, so each forward rolls the last one back."""
    from specfx.engines.base import Rows

    tree = DraftTree.chain([token] * (rows - 1))
    batch = [Rows(_SEQUENCE, [token], tree=tree)]
    return lambda: _timed(lambda: engine.forward(batch))


def interleaved(steps: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, one of each in turn, after a few that don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-_WARM_UPS, repeats):
        for name, step in steps.items():
            taken = step()
            if repeat >= 0:
                seconds[name].append(taken)
    return seconds


def outside_share(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of `stats.seconds`: the shares of decoding (the total without prefill) outside the forward, in drafting, and in acceptance."""
    decoding = seconds["total"] - seconds.get("prefill", 0.0)
    if decoding <= 0:
        return {"outside": 0.0, "draft": 0.0, "accept": 0.0}
    shares = {stage: seconds.get(stage, 0.0) / decoding for stage in ("forward", "draft", "accept")}
    return {"outside": 1 - shares["forward"], "draft": shares["draft"], "accept": shares["accept"]}


def run(
    *,
    model: str,
    methods: str,
    head: str | None,
    engine: str,
    context: int,
    rows: str,
    repeats: int,
    max_new_tokens: int,
    dtype: str,
    threads: int | None,
    json: str | None,
) -> int:
    """The command. Returns 0."""
    counts = parse_rows(rows)
    arms = parse_arms(methods, head=head, engine=engine)[1:]
    import torch

    import specfx
    from specfx import models
    from specfx.api import engine_of
    from specfx.engines.base import Rows

    report.set_threads(threads)
    with report.Progress(f"loading {model}"):
        target, tokenizer = models.load(model, getattr(torch, dtype))
    text = "The quick brown fox jumps over the lazy dog near the river bank. "
    tokens = tokenizer(text * (1 + context // 8)).input_ids
    prompt, token = tokens[:context], tokens[context]

    steps_of: dict[str, Any] = {}
    engines: dict[str, Engine] = {}
    for arm in [*arms, *parse_arms(NONE, engine=engine)[1:]]:
        with report.Progress(f"{arm.name}: capture, compile, decode"):
            for _ in range(2):  # the first call warms up; each begins with a drafter that has seen nothing
                start(target, arm)
                generate(target, arm, [prompt], max_new_tokens)
            stats = specfx.stats(target)
            steps_of[arm.name] = {
                "seconds": dict(stats.seconds),
                "share": outside_share(stats.seconds),
                "tokens_per_forward": stats.tokens_per_forward,
            }
        served, explanation = engine_of(target), specfx.explain(target)
        if served.verifies == "nothing":
            raise UnsupportedModelError(f"{model}: no engine serves it, so there is no forward to measure; {explanation}")
        engines[f"{arm.name}, {served.name}" if served.drafts else served.name] = served
    plain = explanation.engine
    try:
        for served in engines.values():
            served.add(_SEQUENCE, context + max(counts) + 1)
            served.forward([Rows(_SEQUENCE, prompt, last_only=True)])
            served.commit(_SEQUENCE, range(context))
        steps = {STOCK_STEP: stock_step(target, prompt, token)}
        steps.update({f"{name}, {n} rows": engine_step(served, token, n) for name, served in engines.items() for n in counts})
        with report.Progress(f"forwards, {repeats} of each"):
            seconds = interleaved(steps, repeats)
    finally:
        for served in engines.values():
            served.remove(_SEQUENCE)

    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    first = medians[f"{plain}, {counts[0]} rows"]
    drafting = {
        f"{name}, {n} rows": statistics.median(
            (with_head - without) / step
            for with_head, without, step in zip(
                *(seconds[f"{e}, {r} rows"] for e, r in ((name, n), (plain, n), (plain, counts[0]))), strict=True
            )
        )
        for name, served in engines.items()
        if served.drafts
        for n in counts
    }
    lines = [
        (name, f"{value * 1e3:.2f}", f"{value / medians[STOCK_STEP]:.3f}", f"{value / first:.3f}", f"{min(seconds[name]) * 1e3:.2f}")
        for name, value in medians.items()
    ]
    print(report.table((f"forward at context {context}", "median ms", "of stock", f"of {counts[0]} rows", "least ms"), lines))
    print()
    if drafting:
        header = ("drafting in the graph", f"of a forward of {counts[0]} rows")
        print(report.table(header, [(name, f"{share:.1%}") for name, share in drafting.items()]))
        print()
    shares = [
        (name, *[f"{step['share'][part]:.1%}" for part in ("outside", "draft", "accept")], report.number(step["tokens_per_forward"]))
        for name, step in steps_of.items()
    ]
    print(report.table(("share of a decode step", "outside the forward", "draft", "accept", "tokens/forward"), shares))
    if json is not None:
        results = {
            "bench": "forward",
            "model": model,
            "dtype": dtype,
            "context": context,
            "repeats": repeats,
            "engine": plain,
            "drafting": drafting,
            "median_seconds": medians,
            "seconds": seconds,
            "steps": steps_of,
        }
        report.write_json(json, results)
    return 0


def parse_rows(rows: str) -> list[int]:
    """``"1,8,16"`` as ints in ``1 .. 64``. Raises `OptionError`."""
    parts = [part.strip() for part in rows.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= MAX_ROWS for part in parts):
        raise OptionError(f"rows={rows!r}: must be ints in 1..{MAX_ROWS}, as in 1,8,16")
    return [int(part) for part in parts]


def _timed(call: Callable[[], Any]) -> float:
    import torch

    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
