"""A next-n head, the acceptance of the last draft and the drafting of the next are stitched behind the target's hidden states.

The context brings the head's part as a graph of its own (`PassContext.drafting`, see `specfx.engines.drafting`). Its inputs are bound
by name: the target's ``hidden`` and ``choice``, the inputs that the target's graph has already, one more pair of page pools for each layer,
and the new input ``next_ids`` (int64 ``[T]``: the token behind each row where it is known, -1 where the target's choice is). Weights that
both have are read once. Output: ``(logits, hidden, choice, draft tokens [S, N], parents [S, N], log-probabilities of the paths [S, N])``. A
head of L > 1 layers also has an input and a last output ``tails`` ``[S, L - 1, H]``: the second goes into the sequences' next forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from specfx.errors import PassError
from specfx.kernels.greedy_walk import greedy_walk
from specfx.kernels.tree_attention import tree_attention_
from specfx.passes.framework import (
    Pass,
    PassContext,
    add_placeholder,
    attribute,
    calls,
    fake_input,
    fake_mode_of,
    new_size,
    place_of,
    placeholder,
)

NEXT_IDS, TAILS = "next_ids", "tails"


def run(module: fx.GraphModule, context: PassContext) -> int:
    head = context.drafting
    output = module.graph.output_node()
    results: Any = output.args[0]
    if head is None:
        raise PassError("there is no head to stitch")
    if len(results) != 3:
        raise PassError("the graph must return (logits, hidden, choice): the epilogue pass did not run")
    ids = placeholder(module, "input_ids")
    assert ids is not None
    mode, device, layer = fake_mode_of(module), ids.meta["val"].device, len(calls(module, tree_attention_))
    like = placeholder(module, "k_pages_0")
    pages = new_size(mode) if like is None else like.meta["val"].shape[0]
    bound: dict[str, fx.Node] = {"hidden": results[1], "choice": results[2]}
    bound[NEXT_IDS] = add_placeholder(module, NEXT_IDS, fake_input(module, (ids.meta["val"].shape[1],), torch.int64, device))
    if (tails := placeholder(head, TAILS)) is not None:
        sequences = _input(module, "lengths").meta["val"].shape[0]
        value = tails.meta["val"]
        bound[TAILS] = add_placeholder(module, TAILS, fake_input(module, (sequences, *value.shape[1:]), value.dtype, device))
    for node in head.graph.find_nodes(op="placeholder"):
        kind, _, number = str(node.target).rpartition("_")
        if kind in ("k_pages", "v_pages"):
            value, name = node.meta["val"], f"{kind}_{layer + int(number)}"
            bound[node.target] = add_placeholder(module, name, fake_input(module, (pages, *value.shape[1:]), value.dtype, device))
    known = {place_of(attribute(module, str(n.target))): n for n in module.graph.find_nodes(op="get_attr")}
    new: dict[fx.Node, Any] = {}
    stitched = 0
    with module.graph.inserting_before(output):
        for node in head.graph.nodes:
            if node.op == "placeholder":
                new[node] = bound.get(node.target) or _input(module, node.target)
            elif node.op == "get_attr":
                new[node] = _weight(module, head, node, known)
            elif node.op == "call_function":
                copied = module.graph.node_copy(node, lambda n: new[n])
                args, kwargs = fx.map_arg((copied.args, copied.kwargs), lambda n: n.meta["val"])
                with mode:  # some make tensors out of nothing
                    copied.meta["val"] = node.target(*args, **kwargs)
                new[node] = copied
                stitched += 1
            elif node.op == "output":
                output.args = ((*results, *fx.map_arg(node.args[0], lambda n: new[n])),)
            else:
                raise PassError(f"the head's graph has a node of kind {node.op}")
    return stitched


def _input(module: fx.GraphModule, name: str) -> fx.Node:
    node = placeholder(module, name)
    if node is None:
        raise PassError(f"the head needs {name}, which the graph does not have")
    return node


def _weight(module: fx.GraphModule, head: fx.GraphModule, node: fx.Node, known: dict[tuple[Any, ...], fx.Node]) -> fx.Node:
    """The head's weight in the target's graph, which may know it already under another name."""
    tensor = attribute(head, str(node.target))
    if (there := known.get(place_of(tensor))) is not None:
        return there
    name = "mtp_" + str(node.target).replace(".", "_")
    module.register_buffer(name, tensor.detach(), persistent=False)
    result = module.graph.get_attr(name)
    result.meta["val"] = fake_mode_of(module).from_tensor(tensor.detach(), static_shapes=True)
    return result


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    results = [n.meta["val"] for n in module.graph.output_node().args[0]]  # type: ignore[union-attr, misc]
    if len(results) != 6 + (placeholder(module, TAILS) is not None) or len({tuple(map(str, r.shape)) for r in results[3:6]}) != 1:
        raise PassError(f"wrong outputs: {[tuple(r.shape) for r in results]}")
    if len(calls(module, greedy_walk)) != 1:
        raise PassError("the graph must accept the last draft exactly once")


mtp_head = Pass("mtp_head", run, ensures, optional=True)
