"""The functional attention marker becomes the stateful `specfx::tree_attention_` over paged KV.

Each marker gets a pair of page pools of its own as graph inputs (``k_pages_{i}``, ``v_pages_{i}``, in graph order), and all share
``page_table``, ``lengths``, ``row_starts`` and ``moves`` (see `specfx.kernels.tree_attention`). Rows of a sequence are still a causal
run here; the tree-mask pass changes that. Scale, sliding window, softcap and sinks are carried over as they are.
"""

from __future__ import annotations

import torch
from torch import fx

from specfx.errors import PassError
from specfx.kernels.attention import attention
from specfx.kernels.tree_attention import tree_attention_
from specfx.passes.framework import Pass, PassContext, add_placeholder, calls, fake_input, fake_mode_of, insert_call, new_size, placeholder

aten = torch.ops.aten


def run(module: fx.GraphModule, context: PassContext) -> int:
    markers = calls(module, attention)
    ids = placeholder(module, "input_ids")
    if ids is None or ids.meta["val"].shape[0] != 1:
        raise PassError("the graph's input_ids must be [1, T]: batches are flat")
    device = ids.meta["val"].device
    sequences = new_size(fake_mode_of(module))
    shared = {
        "page_table": fake_input(module, (sequences, None), torch.int32, device),
        "lengths": fake_input(module, (sequences,), torch.int32, device),
        "row_starts": fake_input(module, (sequences + 1,), torch.int32, device),
        "moves": fake_input(module, (2, None), torch.int64, device),
    }
    metadata = [add_placeholder(module, name, value) for name, value in shared.items()]
    pages = new_size(fake_mode_of(module))
    for i, marker in enumerate(markers):
        q, k, v, *constants = marker.args
        pools = []
        for name, source in (("k", k), ("v", v)):
            value = source.meta["val"]  # type: ignore[union-attr]
            shape = (pages, context.page_size, value.shape[1], value.shape[3])
            pools.append(add_placeholder(module, f"{name}_pages_{i}", fake_input(module, shape, value.dtype, device)))
        before = set(module.graph.nodes)
        with module.graph.inserting_before(marker):
            rows = [
                insert_call(module.graph, aten.select.int, insert_call(module.graph, aten.transpose.int, x, 1, 2), 0, 0) for x in (q, k, v)
            ]
            out = insert_call(module.graph, tree_attention_, *rows, None, *metadata, *pools, *constants)
            result = insert_call(module.graph, aten.unsqueeze.default, out, 0)
        for node in module.graph.nodes:
            if node not in before and "nn_module_stack" in marker.meta:
                node.meta["nn_module_stack"] = marker.meta["nn_module_stack"]
        marker.replace_all_uses_with(result)
        module.graph.erase_node(marker)
    return len(markers)


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    if calls(module, attention):
        raise PassError("an attention marker was left without a KV")
    pools = [a for n in calls(module, tree_attention_) for a in n.args[8:10]]
    if len(set(pools)) != len(pools):
        raise PassError("two attentions share a page pool")


paged_kv = Pass("paged_kv", run, ensures, requires=("canonicalize_attention",))
