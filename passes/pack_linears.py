"""Linear layers read weights that were packed once for the CPU's bfloat16 instructions; layers that share an input become one.

`aten.linear` over a bf16 weight becomes `specfx::packed_linear`; query, key and value (or gate and up) projections of one input are
packed behind each other and computed in one call, their outputs taken apart as views; weights that are used several times (by the steps
of a draft head) are packed once. The packed weight is an attribute
``packed_{i}``; the module remembers in ``meta["packed"]`` what weights it was made of, so that `repack` can follow changes in place.
Graphs over the same weights (one without a draft head, one with it) share the packed ones.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from specfx.errors import PassError
from specfx.kernels import huge_pages
from specfx.kernels.packed_linear import can_pack, pack, packed_linear
from specfx.passes.framework import NoMatch, Pass, PassContext, attribute, calls, insert_call, place_of, placeholder

aten = torch.ops.aten


_alive: weakref.WeakValueDictionary[tuple[Any, ...], Tensor] = weakref.WeakValueDictionary()
"""Packed weights of living modules, by where their sources lie. (The modules hold the sources too, so no other tensor can lie there.)"""


def _fused(weights: tuple[Tensor, ...]) -> Tensor:
    return pack(torch.cat(weights))


def packed(weights: tuple[Tensor, ...]) -> Tensor:
    """The packed form of `weights` as they are now, in the tensor that other modules have of them, if any."""
    key = tuple(map(place_of, weights))
    present, shared = _fused(weights), _alive.get(key)
    if shared is None:
        _alive[key] = shared = huge_pages.empty(present.numel(), present.dtype).view(present.shape).copy_(present)
    elif not torch.equal(shared, present):  # the weights were changed in place, and nobody has packed them since
        shared.copy_(present)
    return shared


def repack(module: fx.GraphModule) -> None:
    """Pack again, in place, from the present values of the weights."""
    with torch.no_grad():
        for name, weights in module.meta.get("packed", {}).items():
            attribute(module, name).copy_(_fused(weights))


def _packable(node: fx.Node, module: fx.GraphModule) -> bool:
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr" and can_pack(attribute(module, str(weight.target)))):
        return False
    return bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")


def run(module: fx.GraphModule, context: PassContext) -> int:
    ids = placeholder(module, "input_ids")
    if ids is not None and (device := ids.meta["val"].device.type) != "cpu":
        raise NoMatch(f"weights are packed for the CPU's bfloat16 instructions; on {device} they are read as they lie")
    if not context.pack:
        raise PassError("no kernel for packed linears here (needs a CPU with AMX or AVX-512 BF16 and a C++ compiler)")
    groups: dict[tuple[fx.Node, bool], list[fx.Node]] = defaultdict(list)
    for node in calls(module, aten.linear.default):
        if _packable(node, module):
            groups[node.args[0], len(node.args) > 2 and node.args[2] is not None].append(node)  # type: ignore[index]
    if not groups:
        raise PassError("no linear has a bfloat16 weight on the CPU whose input width is a multiple of 32")
    made_of: dict[str, tuple[Tensor, ...]] = {}
    names: dict[tuple[str, ...], str] = {}
    for (x, biased), nodes in groups.items():
        targets = tuple(str(n.args[1].target) for n in nodes)  # type: ignore[union-attr]
        widths = [n.meta["val"].shape[-1] for n in nodes]
        if targets not in names:
            names[targets] = name = f"packed_{len(names)}"
            made_of[name] = tuple(attribute(module, target) for target in targets)
            module.register_buffer(name, packed(made_of[name]), persistent=False)
        name = names[targets]
        weight = attribute(module, name)
        stack = nodes[0].meta.get("nn_module_stack")
        # The input of the group is computed before its first member, and so are the weights (attributes of the graph).
        with module.graph.inserting_before(nodes[0]):
            constant = module.graph.get_attr(name)
            constant.meta["val"] = x.meta["val"].fake_mode.from_tensor(weight, static_shapes=True)
            biases = [module.graph.node_copy(n.args[2]) for n in nodes] if biased else []  # type: ignore[arg-type]
            bias = None if not biases else biases[0] if len(biases) == 1 else insert_call(module.graph, aten.cat.default, biases)
            new = [insert_call(module.graph, packed_linear, x, constant, bias, sum(widths))]
            parts = new if len(nodes) == 1 else []
            if len(nodes) > 1:
                offset = 0
                for width in widths:
                    parts.append(insert_call(module.graph, aten.slice.Tensor, new[0], -1, offset, offset + width))
                    offset += width
        for node, part in zip(nodes, parts, strict=True):
            if stack is not None:
                part.meta["nn_module_stack"] = new[0].meta["nn_module_stack"] = stack
            node.replace_all_uses_with(part)
            module.graph.erase_node(node)
    module.meta["packed"] = made_of
    return sum(map(len, groups.values()))


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    left = [n for n in calls(module, aten.linear.default) if _packable(n, module)]
    if left:
        raise PassError(f"{len(left)} linears were left unpacked")


pack_linears = Pass("pack_linears", run, ensures, optional=True)
