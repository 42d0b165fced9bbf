"""The timings of `specfx.bench.gpu`: the attention against other forms of it, and whole steps against reading the weights.

Times of kernels are medians of `triton.testing.do_bench` (which clears the L2 cache before each run) over replays of a CUDA graph, so
that launching costs no form anything. Those of steps are medians of wall time with the device idle before and after, host work included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from specfx.bench import random_models
from specfx.bench.gpu import Row, Settings
from specfx.bench.gpu_checks import register
from specfx.bench.paged_batches import Batch, flex_attention_call, make, plain_arguments, sdpa_form, uniform
from specfx.engines.base import Rows
from specfx.engines.choose import Prepared
from specfx.engines.cuda_graphs import CudaRecorder, Replayed
from specfx.engines.paged import PagedEngine
from specfx.kernels.tree_attention import tree_attention_
from specfx.options import CommonOptions
from specfx.runtime.tree import DraftTree

COPY_BYTES = 1 << 30
"""Of the copy that tells what the memory gives."""
MOST_GATHERED = 24 << 30
"""Bytes of keys and values beyond which the form that gathers them is left out."""
_SEQUENCE = 1_000_000_009  # far from the ids that the runtime hands out
_PREFILL = 512
_REPEATS = 50


def median_seconds(call: Callable[[], Any]) -> float:
    """Of `call` on the GPU."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=200, return_mode="median")) / 1e3


def replay_seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Of the kernels of `call`."""
    again, _outputs = CudaRecorder(device)(lambda: (call(),))  # the outputs must live as long as the graph
    return median_seconds(again)


def copy_bandwidth(size: int) -> float:
    """Bytes a second of a copy of `size` bytes within the device, read and written bytes both counted."""
    source = torch.empty(size // 8, dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source))


def attention_forms(batch: Batch, compiled: bool = True) -> dict[str, Callable[[], Tensor]]:
    """Each form as a call without arguments, on the same keys and values. What FlexAttention is spared: see `flex_attention_call`."""
    arguments = plain_arguments(batch)
    forms: dict[str, Callable[[], Tensor]] = {"specfx": lambda: batch.run(tree_attention_)}
    forms["flex"] = flex_attention_call(batch, compiled)
    if batch.shape.prefix_bytes <= MOST_GATHERED:
        forms["gather + sdpa"] = lambda: sdpa_form(*arguments)
    return forms


def attention(settings: Settings) -> Iterator[Row]:
    """Batches of 1, 8, 64, contexts of 1k, 8k, 32k, trees of 1, 8, 32 rows (the pending token is one), heads as in Llama 3.1 8B."""
    register(settings.device)
    device = torch.device(settings.device)
    peak = copy_bandwidth(COPY_BYTES)
    yield Row("copy of 1 GiB", None, {"GB/s": peak / 1e9})
    grid = [(b, c, r) for b in (1, 8, 64) for c in (1024, 8192, 32768) for r in (1, 8, 32)]
    for sequences, context, rows in [(1, 1024, 8), (8, 8192, 8)] if settings.quick else grid:
        torch._dynamo.reset()
        batch = make(uniform(sequences, context, rows), device, free=0.0)
        seconds: dict[str, float | None] = dict.fromkeys(("specfx", "flex", "gather + sdpa"))
        failed = []
        for name, call in attention_forms(batch).items():
            try:
                seconds[name] = replay_seconds(call, device)
            except Exception as e:  # of one form: the others are still to be measured
                failed.append(f"{name}: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
        size = batch.shape.prefix_bytes
        copy = 2 * size / copy_bandwidth(size)  # of as many bytes: a copy reads and writes each
        ours = seconds["specfx"]
        figures: dict[str, Any] = {f"{name}, us": t and t * 1e6 for name, t in seconds.items()}
        figures |= {
            "copy, us": copy * 1e6,
            "GB/s": ours and size / ours / 1e9,
            "of copy bandwidth": ours and size / ours / (2 * size / copy),
            "over flex": ours and seconds["flex"] and seconds["flex"] / ours,
            "failed": "; ".join(failed) or None,
        }
        yield Row(f"batch {sequences}, context {context}, {rows} rows", None if ours else False, figures)
        del batch, call


# --- whole steps ----------------------------------------------------------------------------------------------------------------


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads whole: all but an embedding that is only looked up in."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    looked_up = embedding.data_ptr() if embedding.data_ptr() != head.data_ptr() else 0
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters() if p.data_ptr() != looked_up}
    return sum(weights.values())


def steps(settings: Settings) -> Iterator[Row]:
    """One sequence at a context of 1024 and a batch of 8: seconds of a forward of 1, 8, 17 rows each, and of its replay alone."""
    device = torch.device(settings.device)
    peak = copy_bandwidth(COPY_BYTES)
    for name, model in _models(settings, device):
        reading = weight_bytes(model) / peak
        prepared = Prepared(model, CommonOptions(compile="sync"))
        engine = prepared.ladder(model).engine
        refusals = [*prepared.refusals, *prepared.ladder(model).refusals]
        facts = {"engine": engine.name, "weights, MB": weight_bytes(model) / 1e6, "reading them, ms": reading * 1e3}
        facts |= {f"{stage}, s": seconds for stage, seconds in (prepared.seconds | prepared.ladder(model).seconds).items()}
        replaying = isinstance(engine, PagedEngine) and isinstance(engine.call, Replayed)
        facts["refusals"] = "; ".join(map(str, refusals)) or None
        yield Row(f"{name} is compiled and replayed", engine.name == "compiled" and replaying and not refusals, facts)
        if not isinstance(engine, PagedEngine):
            continue
        for sequences, rows in ((1, 1), (1, 8), (1, 17), (8, 1), (8, 8)):
            yield Row(f"{name}: {sequences} sequences, {rows} rows each", None, step_figures(engine, sequences, rows, reading))
        yield Row(f"{name}: stock, one token", None, {"ms": stock_step(model) * 1e3})
        del engine, prepared, model
        torch.cuda.empty_cache()


def step_figures(engine: PagedEngine, sequences: int, rows: int, reading: float, context: int = 1024) -> dict[str, float | None]:
    """Of forwards that are never committed, each rolling the last one back."""
    seqs = range(_SEQUENCE, _SEQUENCE + sequences)
    try:
        for seq in seqs:
            engine.add(seq, context + rows)
            for start in range(0, context, _PREFILL):
                count = min(_PREFILL, context - start)
                engine.forward([Rows(seq, [7] * count, last_only=True)])
                engine.commit(seq, range(count))
        batch = [Rows(seq, [7], DraftTree.chain([8] * (rows - 1))) for seq in seqs]
        for _ in range(3):
            engine.forward(batch)
        seconds = statistics.median(_timed(lambda: engine.forward(batch)) for _ in range(_REPEATS))
        again = engine.call.latest if isinstance(engine.call, Replayed) else None
        replayed = None if again is None else median_seconds(again)
    finally:
        for seq in seqs:
            engine.remove(seq)
    return {
        "ms": seconds * 1e3,
        "of reading": seconds / reading,
        "replay alone, ms": None if replayed is None else replayed * 1e3,
        "replay of reading": None if replayed is None else replayed / reading,
    }


def stock_step(model: Any, context: int = 1024) -> float:
    """Seconds of a cached step of one token of the stock model (the cache grows by one with each)."""
    ids = torch.full((1, context), 7, device=model.device)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        one = ids[:, :1]
        return statistics.median(_timed(lambda: model(input_ids=one, past_key_values=cache, use_cache=True)) for _ in range(_REPEATS))


def _models(settings: Settings, device: torch.device) -> Iterator[tuple[str, Any]]:
    if settings.model is not None:
        from specfx import models

        yield settings.model, models.load(settings.model, torch.bfloat16)[0].to(device)
    layers = 4 if settings.quick else 32
    yield f"Llama 8B shape, {layers} layers", random_models.llama_8b(device, torch.bfloat16, layers)


def _timed(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
