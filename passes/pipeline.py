"""The passes of specfx in the order in which they run. Every one can be switched off by name."""

from __future__ import annotations

from specfx.passes.canonicalize_attention import canonicalize_attention
from specfx.passes.draft_on_demand import draft_on_demand
from specfx.passes.epilogue import epilogue
from specfx.passes.framework import Pass
from specfx.passes.hoist_row_selection import hoist_row_selection
from specfx.passes.materialize_shared import materialize_shared
from specfx.passes.mtp_head import mtp_head
from specfx.passes.pack_linears import pack_linears
from specfx.passes.paged_kv import paged_kv
from specfx.passes.regions import regions
from specfx.passes.tree_mask import tree_mask

REWRITE: tuple[Pass, ...] = (canonicalize_attention, paged_kv, tree_mask, epilogue)
"""What makes a stock graph speculative: shared by the graph and the compiled engine."""

DRAFTING: tuple[Pass, ...] = (mtp_head, hoist_row_selection)
"""What makes it draft as well, where there is a head to stitch."""

LOWERING: tuple[Pass, ...] = (materialize_shared, pack_linears, draft_on_demand, regions)
"""What the compiled engine adds for the machine at hand."""
