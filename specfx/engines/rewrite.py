"""From a model to its rewritten graph, unproven: capture and the rewrite passes, and a draft head stitched behind it."""

from __future__ import annotations

from torch import fx
from transformers import PreTrainedModel

from specfx.capture import capture
from specfx.drafters.mtp import Drafting
from specfx.engines.drafting import capture_drafting
from specfx.errors import PassError
from specfx.options import CommonOptions
from specfx.passes.framework import PassContext, PassRecord, run_passes
from specfx.passes.pipeline import DRAFTING, REWRITE
from specfx.timing import told

Rewritten = tuple[fx.GraphModule, tuple[PassRecord, ...]]
"""A rewritten graph, and what the passes did."""


def rewrite(model: PreTrainedModel, options: CommonOptions, seconds: dict[str, float]) -> Rewritten:
    """The graph of `model`, which may lack a pass (see `require_kv`). seconds: gets those of capture and passes. Raises `CaptureError`."""
    with told(seconds, "capture"):
        captured = capture(model)
    with told(seconds, "passes"):
        disabled = [p for p in options.disable_passes if p in {q.name for q in REWRITE}]
        result = run_passes(captured, REWRITE, PassContext(options.page_size), disabled)
    return result.module, result.records


def stitch(module: fx.GraphModule, options: CommonOptions, drafting: Drafting) -> Rewritten:
    """`module` with the head behind it. Raises `CaptureError`, `PassError`."""
    part = capture_drafting(drafting, options.page_size)
    disabled = [p.name for p in DRAFTING if p.name in options.disable_passes]
    result = run_passes(module, DRAFTING, PassContext(options.page_size, drafting=part), disabled)
    if result.failed is not None and (refused := result.failed.refusal) is not None:
        raise PassError(refused.detail)
    return result.module, result.records


def require_kv(module: fx.GraphModule, records: tuple[PassRecord, ...]) -> None:
    """Raise `PassError` for a rewritten graph without a KV: what a switched-off or failed pass may have cost."""
    names = {str(n.target) for n in module.graph.nodes if n.op == "placeholder"}
    if not {"input_ids", "lengths", "k_pages_0"} <= names:
        failed = next((r for r in records if not r.applied), records[-1])
        raise PassError(f"{failed.name}: {failed.refusal.detail if failed.refusal else 'did not apply'}")
