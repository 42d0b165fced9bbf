"""The compiled engine: the rewritten graph, lowered for the machine at hand by Inductor.

1. The lowering passes run: linears are packed (`pack_linears`), a stitched head's draft becomes a branch (`draft_on_demand`), layers that
   are alike become calls of one graph (`regions`).
2. Inductor compiles one artifact for all numbers of rows, sequences and pages, each kind of layer once. Weights, packed weights and page
   pools are its inputs, so it holds no copy of them, and the pools are written in place.

On a GPU, steps that are recorded as CUDA graphs may have artifacts of their own (`CompiledEngine.tuned`): their sizes are fixed, so
Inductor can measure which blocks are fastest, those of the template of `specfx.kernels.inductor_attention` among them.

Inductor's cache key knows neither our ops nor our kernels; `_compat.inductor_compile` puts a hash of their sources into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from specfx import _compat
from specfx.capture import Fingerprint
from specfx.engines.paged import Call, PagedEngine
from specfx.errors import LoweringError
from specfx.passes.framework import PassContext, PassRecord, copy_module, run_passes
from specfx.passes.pack_linears import repack
from specfx.passes.pipeline import LOWERING

_INDUCTOR = {"size_asserts": False, "alignment_asserts": False, "emulate_precision_casts": True}
"""Inputs are bound by `PagedEngine` alone; checking each of several hundred at every call costs a tenth of a small model's step. Rounding
to 16 bits between ops is kept where fusion would skip it: it costs nothing here, and keeps closer to the stock model's numbers.
(The number of threads goes in by name too: kernels are generated for it, and Inductor's cache key does not hold it otherwise.)"""


@dataclass(frozen=True)
class Lowered:
    """A graph as the lowering passes leave it, what Inductor made of it, and what the passes did."""

    module: fx.GraphModule
    call: Any
    records: tuple[PassRecord, ...]


def lower(module: fx.GraphModule, context: PassContext, disabled: tuple[str, ...]) -> Lowered:
    """Run the lowering passes but those `disabled`, and Inductor. Raises `LoweringError` if Inductor fails."""
    lowered = run_passes(module, LOWERING, context, [d for d in disabled if d in {p.name for p in LOWERING}])
    # A copy even where no pass applied: tracing puts stand-ins in the places of its weights, while the graph engine may be running.
    own = copy_module(module) if lowered.module is module else lowered.module
    return Lowered(own, _inductor(own, _examples(own)), lowered.records)


def _examples(module: fx.GraphModule) -> list[Any]:
    return [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]


def _inductor(module: fx.GraphModule, examples: Sequence[Any], **settings: Any) -> _compat.Artifact:
    try:
        return _compat.inductor_compile(module, examples, _INDUCTOR | {"cpp.threads": torch.get_num_threads(), **settings})
    except Exception as e:  # Inductor and the C++ compiler behind it raise many kinds
        raise LoweringError(f"Inductor: {type(e).__name__}: {' '.join(str(e).split())[:400]}") from e


class CompiledEngine(PagedEngine):
    """`PagedEngine` over an Inductor artifact. lowered: what it calls, and what the lowering passes did."""

    def __init__(self, lowered: Lowered, pool_size: str | int | float, device: torch.device, draft_rows: int = 0) -> None:
        super().__init__("compiled", lowered.module, lowered.call, pool_size, device, draft_rows)
        self.lowered = lowered
        self.packed_at: Fingerprint | None = None  # the weights that the packed ones are of

    def tuned(self, inputs: Sequence[Tensor]) -> Call:
        """What `direct` does, for inputs of exactly the sizes of these, by what measures fastest. Raises `LoweringError`."""
        mode = _examples(self.module)[0].fake_mode
        with mode:
            examples = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs]
        return _inductor(self.module, examples, max_autotune=True)

    def refresh(self) -> None:
        """Follow in-place changes of the weights: pack them again. The other weights are the model's own."""
        repack(self.module)
