"""A value that many layers read is computed once, not inlined into each reader.

Finds results of sine and cosine that, through pointwise ops and casts, end in a node with at least `READERS` users (rotary embeddings: two
nodes that every layer reads), and puts `specfx::materialize` behind it. Values are unchanged.
"""

from __future__ import annotations

import torch
from torch import fx

from specfx.errors import PassError
from specfx.kernels.materialize import materialize
from specfx.passes.framework import Pass, PassContext, calls, insert_call

aten = torch.ops.aten
READERS = 4
_COSTLY = (aten.sin.default, aten.cos.default)
_POINTWISE = (aten.mul.Tensor, aten.mul.Scalar, aten.to.dtype, aten._to_copy.default, aten.unsqueeze.default, aten.alias.default)


def _shared(node: fx.Node) -> fx.Node | None:
    """The node behind `node` that many read; None if the value is not shared."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target not in _POINTWISE:
            return None
        node = user
    return node if len(node.users) >= READERS else None


def run(module: fx.GraphModule, context: PassContext) -> int:
    shared = {s: None for node in calls(module, *_COSTLY) if (s := _shared(node)) is not None}
    for node in shared:
        readers = list(node.users)
        with module.graph.inserting_after(node):
            copy = insert_call(module.graph, materialize, node)
        for reader in readers:
            reader.replace_input_with(node, copy)
    return len(shared)


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    for node in calls(module, materialize):
        if len(node.users) < READERS or len(node.all_input_nodes[0].users) != 1:
            raise PassError("a materialised value is not the one that its readers read")


materialize_shared = Pass("materialize_shared", run, ensures, optional=True)
