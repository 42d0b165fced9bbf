"""A stitched head drafts only where a draft is asked for: behind text that it can't foretell its steps would cost a fifth of a forward.

What the draft alone needs, its steps behind the walks' ends (of the first, all that is behind its attention) and what else serves nothing
but them, becomes one branch of a `torch.ops.higher_order.cond` over the new input ``drafting`` (bool scalar, on the host); the other branch
hands back an empty draft (tokens and parents -1, no probability). The keys and values of every forward's pairs are still written, so the
head's are whole when drafting begins again.

A draft's first step also moves the head's keys and values of the accepted path to their places. So a forward that verifies a tree with
branches has to draft (`specfx.engines.paged.PagedEngine.bind` sees to it).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from specfx.errors import PassError
from specfx.kernels.greedy_walk import greedy_walk
from specfx.passes.framework import (
    NoMatch,
    Pass,
    PassContext,
    add_placeholder,
    calls,
    fake_input,
    fake_mode_of,
    graph_module,
    insert_call,
    is_impure,
    placeholder,
)
from specfx.passes.regions import Stretch, graph_of, is_size

aten = torch.ops.aten
DRAFTING = "drafting"
_cond = torch.ops.higher_order.cond


def run(module: fx.GraphModule, context: PassContext) -> int:
    walks, ids = calls(module, greedy_walk), placeholder(module, "input_ids")
    if not walks or ids is None:
        raise NoMatch("no head is stitched in")
    if ids.meta["val"].device.type != "cpu":
        raise NoMatch("a step that is recorded as a CUDA graph has no branches")
    output = module.graph.output_node()
    results: Any = output.args[0]
    draft = results[3:6]
    steps = _steps(module, walks[0], draft)
    asked = add_placeholder(module, DRAFTING, fake_input(module, (), torch.bool, torch.device("cpu")))
    stretch = Stretch(steps)
    made, nothing = graph_of(stretch.nodes, stretch.inputs, [steps.index(node) for node in draft]), _nothing(module, stretch.inputs, draft)
    module.draft = made
    module.no_draft = nothing
    with module.graph.inserting_after(steps[-1]):
        branches = [module.graph.get_attr(name) for name in ("no_draft", "draft")]
    with module.graph.inserting_after(branches[0]):
        call = module.graph.call_function(_cond, (asked, branches[1], branches[0], tuple(stretch.inputs)))
    call.meta["val"] = tuple(node.meta["val"] for node in draft)
    with module.graph.inserting_before(output):
        for at, node in enumerate(draft):
            part = module.graph.call_function(operator.getitem, (call, at))
            part.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(part)
    for node in reversed(steps):
        module.graph.erase_node(node)
    return len(steps)


def _steps(module: fx.GraphModule, walk: fx.Node, draft: list[fx.Node]) -> list[fx.Node]:
    """What nothing but the draft needs, in order: the head's steps, which stand behind the hidden states at the walks' ends (rows of
    `leaf`), and what is computed for them alone and writes nothing."""
    (leaf,) = (node for node in walk.users if node.target is operator.getitem and node.args[1] == 0)
    behind, steps = set[fx.Node](), set[fx.Node]()
    for node in module.graph.nodes:
        if node not in leaf.users and any(source in leaf.users or source in behind for source in node.all_input_nodes):
            behind.add(node)
    for node in reversed(module.graph.nodes):
        may = node.op == "call_function" and not is_size(node) and (node in behind or not is_impure(node))
        if may and (node in draft or (node.users and all(user in steps for user in node.users))):
            steps.add(node)
    apart = {node for node in steps if node.target is operator.getitem and node.args[0] not in steps}  # branches take no tuples
    return [node for node in module.graph.nodes if node in steps - apart]


def _nothing(module: fx.GraphModule, inputs: list[fx.Node], draft: list[fx.Node]) -> fx.GraphModule:
    """The other branch: takes the same inputs, and returns no draft in the shapes of one."""
    graph = fx.Graph()
    copies = [graph.placeholder(f"in{i}") for i in range(len(inputs))]
    for copy, node in zip(copies, inputs, strict=True):
        copy.meta["val"] = node.meta["val"]
    sequences = str(draft[0].meta["val"].shape[0])
    found = ((c, d) for c in copies for d, size in enumerate(c.meta["val"].shape) if str(size) == sequences)
    source, dimension = next(found, (None, 0))
    if source is None:
        raise PassError("no input of the draft tells how many sequences there are")
    with fake_mode_of(module):
        size, outputs = insert_call(graph, aten.sym_size.int, source, dimension), []
        for like in (node.meta["val"] for node in draft):
            value = -1 if like.dtype == torch.int64 else -float("inf")
            outputs.append(insert_call(graph, aten.full.default, [size, like.shape[1]], value, dtype=like.dtype, device=like.device))
    graph.output(tuple(outputs))
    return graph_module({}, graph)


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    if len(calls(module, _cond)) != 1:
        raise PassError("the draft must be made in one branch")
    made, nothing = ([(v.dtype, str(v.shape)) for v in _results(getattr(module, name))] for name in ("draft", "no_draft"))
    if made != nothing:
        raise PassError(f"the branches return different things: {made} and {nothing}")


def _results(branch: Any) -> list[torch.Tensor]:
    return [node.meta["val"] for node in branch.graph.output_node().args[0]]


draft_on_demand = Pass("draft_on_demand", run, ensures, optional=True)
