"""The public interface: one line makes `model.generate` speculative, one puts it back.

`speculate` puts an instance-level `generate` (`specfx.generate.SpeculativeGenerate`) beside the model's class method and touches nothing
else: the class, the weights and the configuration stay stock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from specfx.drafters.base import Drafter
from specfx.drafters.make import make_drafter
from specfx.engines.base import Engine
from specfx.engines.choose import Prepared, kv_pool, packed_bytes
from specfx.errors import OptionError, Reason, Refusal, SpecfxError, UnsupportedModelError
from specfx.generate import SpeculativeGenerate
from specfx.options import CommonOptions, parse
from specfx.report import Report
from specfx.runtime.page_cache import PageCache
from specfx.runtime.stats import Stats
from specfx.support import require_plain_model


def speculate(model: PreTrainedModel, method: str | None = None, **options: Any) -> PreTrainedModel:
    """Make `model.generate` speculative and return the same object.

    method: None (plain decoding through specfx's engine), "suffix" (what followed earlier in prompt, output and earlier outputs), or
    "mtp" (next-n heads, from the model's own checkpoint or from ``head=PATH``). options: see `specfx.options` for the common ones and
    those of each method.
    Calling it again changes method and options; engines already prepared are kept where the options allow.

    Raises `OptionError` for a wrong method or option, `HeadError` for a head that doesn't fit, `UnsupportedModelError` for models
    that can't be wrapped. Models that can't be captured don't raise: they fall back to another engine, see `explain`.
    """
    common, own = parse(method, options)
    require_plain_model(model)
    previous = _wrapper_of(model)
    if previous is None and "generate" in model.__dict__:
        name = type(model).__name__
        raise UnsupportedModelError(f"this {name} has a `generate` of its own on the instance, which specfx won't replace: delete it first")
    drafter = make_drafter(own, common, model)
    prepared = None
    if (
        previous is not None
        and previous.prepared is not None
        and _same_engine(previous.common, common)
        and previous.prepared.is_current(model)
    ):
        prepared = previous.prepared
    with torch.autocast(model.device.type, enabled=False):  # what is captured and proven under it would be another model
        wrapper = SpeculativeGenerate(model, method, options, common, drafter, prepared or Prepared(model, common))
        wrapper.ready()
    model.__dict__["generate"] = wrapper
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Put `model.generate` back exactly as `speculate` found it, and free what specfx holds. No error if nothing was wrapped."""
    if _wrapper_of(model) is not None:
        del model.__dict__["generate"]
    return model


@contextmanager
def speculating(model: PreTrainedModel, method: str | None = None, **options: Any) -> Iterator[PreTrainedModel]:
    """``with specfx.speculating(model, "suffix"): model.generate(...)``. What was there before is there after."""
    before = model.__dict__.get("generate")
    speculate(model, method, **options)
    try:
        yield model
    finally:
        if before is None:
            restore(model)
        else:
            model.__dict__["generate"] = before


def explain(model: PreTrainedModel, graph: bool = False) -> Report:
    """What was decided about `model`, as data; prints as text. graph: include the rewritten graph in normal form.

    Raises `OptionError` if `speculate` was not called on it.
    """
    wrapper = _require_wrapper(model)
    ladder, prepared, drafter = wrapper.as_it_is(), wrapper.prepared, wrapper.drafter
    assert prepared is not None
    assert drafter is not None
    engine = ladder.engine
    if prepared.lock.acquire(blocking=False):  # else a call is running, which has done it
        try:
            ladder.keeper.collect()
        finally:
            prepared.lock.release()
    pages, in_use, page_size = kv_pool(engine)
    waiting = [r for r in (ladder.compiling, prepared.apart(drafter.drafting)) if r is not None]
    refusals = [*prepared.refusals, *ladder.refusals, *waiting, *drafter.refusals]
    refusals += [Refusal("generate", Reason.NOT_ACCELERATED, reason) for reason in wrapper.stock_calls]
    text = None
    if graph and (module := prepared.graph(model, drafter.drafting)) is not None:
        from specfx.passes.printer import normal_form

        text = normal_form(module)
    return Report(
        model=type(model).__name__,
        method=wrapper.method,
        engine=engine.name,
        verifies=engine.verifies,
        passes=(*prepared.records, *ladder.records),
        refusals=tuple(refusals),
        stock_calls=Counter(wrapper.stock_calls),
        packed_bytes=packed_bytes(engine),
        pages=pages,
        pages_in_use=in_use,
        page_size=page_size,
        seconds=prepared.seconds | ladder.seconds | wrapper.first_call,
        graph=text,
    )


def stats(model: PreTrainedModel) -> Stats:
    """Counters of this thread's last call (`last`, and as attributes) and of all calls since `speculate` (`total`)."""
    return _require_wrapper(model).stats


def drafter_of(model: PreTrainedModel) -> Drafter:
    """The drafter that serves `model`: ``drafter_of(model).save(path)`` keeps what a `SuffixDrafter` has learned, say
    (``.beside.save`` of one beside a head)."""
    wrapper = _require_wrapper(model)
    wrapper.ready()
    assert wrapper.drafter is not None
    return wrapper.drafter


def engine_of(model: PreTrainedModel) -> Engine:
    """The engine that serves the next call (for benchmarks and tests)."""
    return _require_wrapper(model).ready().engine


def _wrapper_of(model: PreTrainedModel) -> SpeculativeGenerate | None:
    wrapper = model.__dict__.get("generate")
    return wrapper if isinstance(wrapper, SpeculativeGenerate) else None


def _require_wrapper(model: PreTrainedModel) -> SpeculativeGenerate:
    wrapper = _wrapper_of(model)
    if wrapper is None:
        raise OptionError(f"this {type(model).__name__} is not wrapped: call specfx.speculate(model, ...) first")
    return wrapper


def _same_engine(a: CommonOptions, b: CommonOptions) -> bool:
    fields = ("engine", "compile", "kv_pool", "page_size", "disable_passes", "cuda_graphs", "max_autotune")
    return all(getattr(a, f) == getattr(b, f) for f in fields)


__all__ = ["PageCache", "SpecfxError", "drafter_of", "engine_of", "explain", "restore", "speculate", "speculating", "stats"]
