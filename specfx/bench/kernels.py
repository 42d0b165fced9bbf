"""`specfx bench kernels`: the CPU's tree attention against what Inductor makes of the best plain-PyTorch form.

The plain forms (`specfx.bench.paged_batches`) append the new rows, gather each sequence's pages by index and attend with a mask, through
torch's fused attention or a written-out softmax; each is compiled once with dynamic shapes. All forms write pools of their own with the
same content, run one after another in turn, and must give the same numbers before they are timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from specfx.bench import report
from specfx.errors import OptionError
from specfx.runtime.tree import MAX_ROWS

if TYPE_CHECKING:
    import torch

    from specfx.bench.paged_batches import Batch, Shape

OURS = "specfx"
AGREES = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of any form from the reference, absolute: values are near 1. (A plain form rounds probabilities to 16 bits.)"""
_WARM_UPS = 3


def shapes(batches: str, contexts: str, rows: str, heads: str, dtype: str) -> list[Shape]:
    """The grid. heads: ``"9/3x64"``, query heads / KV heads x width. Raises `OptionError`."""
    import torch

    from specfx.bench.paged_batches import uniform

    queries, groups, width = _heads(heads)
    numbers = [_numbers(name, text) for name, text in (("batches", batches), ("contexts", contexts), ("rows", rows))]
    if max(numbers[2]) > MAX_ROWS:
        raise OptionError(f"rows={rows!r}: a tree has at most {MAX_ROWS} rows")
    like: dict[str, Any] = {"groups": groups, "share": queries // groups, "dk": width, "dv": width, "dtype": getattr(torch, dtype)}
    return [uniform(b, c, r, **like) for b, c, r in itertools.product(*numbers)]


def compiled_forms() -> dict[str, Callable[..., torch.Tensor]]:
    """The plain forms through Inductor, for all shapes."""
    import torch

    from specfx.bench.paged_batches import PLAIN_FORMS

    return {name: torch.compile(form, dynamic=True) for name, form in PLAIN_FORMS.items()}


def calls_of(batch: Batch, plain: Mapping[str, Callable[..., torch.Tensor]]) -> dict[str, Callable[[], torch.Tensor]]:
    """Each form as a call without arguments, on pools of its own; ours first."""
    from specfx.bench.paged_batches import plain_arguments
    from specfx.kernels.tree_attention import tree_attention_

    own = batch.with_own_pools()
    calls: dict[str, Callable[[], torch.Tensor]] = {OURS: lambda: own.run(tree_attention_)}
    for name, form in plain.items():
        arguments = plain_arguments(batch.with_own_pools())
        calls[name] = lambda form=form, arguments=arguments: form(*arguments)  # type: ignore[misc]
    return calls


def check(batch: Batch, calls: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    """Largest difference of each form from the reference. Raises `OptionError` for one that computes something else."""
    from specfx.kernels.tree_attention import tree_attention_reference

    expected = batch.with_own_pools().run(tree_attention_reference).float()
    errors = {name: (call().float() - expected).abs().max().item() for name, call in calls.items()}
    limit = AGREES[str(batch.shape.dtype).removeprefix("torch.")]
    if wrong := {name: error for name, error in errors.items() if not error <= limit}:
        raise OptionError(f"{batch.shape}: {wrong} away from the reference, more than {limit}")
    return errors


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each in turn, after a few that don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-_WARM_UPS, repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def run(*, batches: str, contexts: str, rows: str, heads: str, dtype: str, repeats: int, threads: int | None, json: str | None) -> int:
    """The command. Returns 0 if ours is no slower than the best plain form in any shape (by medians of ratios), else 1."""
    grid = shapes(batches, contexts, rows, heads, dtype)
    import torch
    import torch._dynamo

    from specfx.bench.paged_batches import make
    from specfx.kernels import cpu_build

    used = report.set_threads(threads)
    cpu_build.load()
    plain = compiled_forms()
    measured: list[dict[str, Any]] = []
    # Sizes of 1 get artifacts of their own; a form must never fall back to eager unnoticed.
    no_fallback = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with report.Progress(f"{len(grid)} shapes, {used} threads"), torch.no_grad(), no_fallback:
        for shape in grid:
            batch = make(shape, torch.device("cpu"), free=0.0)
            calls = calls_of(batch, plain)
            errors = check(batch, calls)
            seconds = interleaved(calls, repeats)
            ratios = {name: statistics.median(a / b for a, b in zip(seconds[name], seconds[OURS], strict=True)) for name in plain}
            medians = {name: statistics.median(taken) for name, taken in seconds.items()}
            measured.append({"shape": str(shape), "errors": errors, "medians": medians, "seconds": seconds, "over_specfx": ratios})
            if json is not None:
                report.write_json(json, {"bench": "kernels", "threads": used, "shapes": measured})
    print(table(measured))
    slower = [m["shape"] for m in measured if min(m["over_specfx"].values()) < 1]
    print("no plain form is faster anywhere" if not slower else f"a plain form is faster in {len(slower)} of {len(measured)} shapes")
    return 1 if slower else 0


def table(measured: list[dict[str, Any]]) -> str:
    """Microseconds of each form, and how many times as long as ours the best plain one takes."""
    names = list(measured[0]["medians"])
    header = ("us, medians", *names, "best plain over specfx")
    lines = []
    for m in measured:
        cells = [f"{m['medians'][name] * 1e6:.1f}" for name in names]
        lines.append((m["shape"], *cells, f"{min(m['over_specfx'].values()):.2f}"))
    return report.table(header, lines)


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"{name}={text!r}: must be ints > 0, as in 1,8")
    return [int(part) for part in parts]


def _heads(text: str) -> tuple[int, int, int]:
    try:
        counts, width = text.split("x")
        queries, groups = counts.split("/")
        found = int(queries), int(groups), int(width)
        if min(found) > 0 and found[0] % found[1] == 0:
            return found
    except ValueError:
        pass
    raise OptionError(f"heads={text!r}: must be query heads / KV heads x width, as in 9/3x64, the first a multiple of the second")
