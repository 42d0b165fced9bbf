"""Logits only where they are read, and the target's choice inside the graph.

The LM head runs on the rows named by the new graph input ``logit_rows`` (int64 ``[R]``), so a prefill of a thousand rows computes one
row of logits; the graph also returns the ``choice`` (int64 ``[R]``) behind each of them: the argmax over the float32 logits, as in stock
greedy decoding, or a token drawn from them, warped, as the new inputs ``keys`` and ``warp`` say (see `specfx.kernels.keyed_sample`).
Output: ``(logits [1, R, V], hidden [1, T, H], choice [R])``.
"""

from __future__ import annotations

import torch
from torch import fx

from specfx.errors import PassError
from specfx.kernels.keyed_sample import keyed_sample
from specfx.passes.framework import Pass, PassContext, add_placeholder, fake_input, insert_call, placeholder

aten = torch.ops.aten
KEYS, WARP = "keys", "warp"
_VIEWS = (aten.alias.default, aten.clone.default, aten.detach.default)


def _between(hidden: fx.Node, logits: fx.Node) -> list[fx.Node]:
    """The nodes that lie on a path from `hidden` to `logits`, in graph order; raises if one of them knows the number of rows."""
    downstream: list[fx.Node] = []
    reached = {hidden}
    for node in hidden.graph.nodes:
        if node.op == "call_function" and any(a in reached for a in node.all_input_nodes):
            reached.add(node)
            downstream.append(node)
        if node is logits:
            break
    needed = {logits}
    for node in reversed(downstream):
        if node in needed:
            needed.update(node.all_input_nodes)
    path = [n for n in downstream if n in needed]
    for node in path:
        for other in node.all_input_nodes:
            value = other.meta.get("val")
            if other not in reached and not isinstance(value, torch.Tensor):
                raise PassError(f"{node.target} between the hidden states and the logits depends on the number of rows")
    return path


def run(module: fx.GraphModule, context: PassContext) -> int:
    ids = placeholder(module, "input_ids")
    output = module.graph.output_node()
    if ids is None or len(output.args[0]) != 2:  # type: ignore[arg-type]
        raise PassError("expected a graph from input_ids to (logits, hidden)")
    logits, hidden = output.args[0]  # type: ignore[misc]
    while hidden.target in _VIEWS:  # a clone or alias beside the path to the logits would hide it
        hidden = hidden.args[0]
    path = _between(hidden, logits)
    if not path:
        raise PassError("the logits are not computed from the hidden states")
    device = ids.meta["val"].device
    rows = add_placeholder(module, "logit_rows", fake_input(module, (None,), torch.int64, device))
    count = rows.meta["val"].shape[0]
    keys = add_placeholder(module, KEYS, fake_input(module, (count, 3), torch.int64, device))
    warp = add_placeholder(module, WARP, fake_input(module, (count, 4), torch.float64, device))
    with module.graph.inserting_before(path[0]):
        selected = insert_call(module.graph, aten.index_select.default, hidden, 1, rows)
    for node in path:
        node.replace_input_with(hidden, selected)
        node.meta["val"] = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]), **fx.map_arg(node.kwargs, lambda n: n.meta["val"]))  # type: ignore[operator]
    with module.graph.inserting_before(output):
        choice = insert_call(module.graph, keyed_sample, insert_call(module.graph, aten.select.int, logits, 0, 0), keys, warp)
    output.args = ((logits, hidden, choice),)
    return 1


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    logits, hidden, choice = (n.meta["val"] for n in module.graph.output_node().args[0])  # type: ignore[union-attr]
    if logits.shape[1] != choice.shape[0] or hidden.shape[:2] != placeholder(module, "input_ids").meta["val"].shape:  # type: ignore[union-attr]
        raise PassError(f"wrong shapes: logits {tuple(logits.shape)}, hidden {tuple(hidden.shape)}, choice {tuple(choice.shape)}")


epilogue = Pass("epilogue", run, ensures)
