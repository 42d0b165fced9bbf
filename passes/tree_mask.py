"""Causal order becomes "ancestors in the draft tree", and positions come from depth.

Adds the graph input ``tree_mask`` (int64 ``[T]``, bit words over the rows of the same sequence) to every `specfx::tree_attention_`,
and computes ``position_ids`` in the graph, where it was an input, as ``length + depth``.
"""

from __future__ import annotations

import torch
from torch import fx

from specfx.errors import PassError
from specfx.kernels.tree_attention import tree_attention_, tree_positions
from specfx.passes.framework import Pass, PassContext, add_placeholder, calls, fake_input, insert_call, placeholder


def run(module: fx.GraphModule, context: PassContext) -> int:
    ids, positions = placeholder(module, "input_ids"), placeholder(module, "position_ids")
    lengths, row_starts = placeholder(module, "lengths"), placeholder(module, "row_starts")
    if ids is None or positions is None or lengths is None or row_starts is None:
        raise PassError("the graph has no input_ids, position_ids, lengths or row_starts")
    rows = ids.meta["val"].shape[1]
    mask = add_placeholder(module, "tree_mask", fake_input(module, (rows,), torch.int64, ids.meta["val"].device))
    attentions = calls(module, tree_attention_)
    for node in attentions:
        node.update_arg(3, mask)
    last = [n for n in module.graph.nodes if n.op == "placeholder"][-1]
    with module.graph.inserting_after(last):
        computed = insert_call(module.graph, tree_positions, mask, lengths, row_starts, ids)
    positions.replace_all_uses_with(computed)
    module.graph.erase_node(positions)
    return len(attentions)


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    if placeholder(module, "position_ids") is not None:
        raise PassError("positions are still an input")
    if any(not isinstance(n.args[3], fx.Node) for n in calls(module, tree_attention_)):
        raise PassError("an attention has no tree mask")


tree_mask = Pass("tree_mask", run, ensures, requires=("paged_kv",))
