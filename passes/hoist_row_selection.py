"""Rows that nobody reads are not computed: ``index_select(f(x), rows)`` becomes ``f(index_select(x, rows))``.

A stitched head runs its layer on the pairs of all rows, since it needs the keys and values of each, but it drafts behind the last row of
each walk only. From that selection the pass goes back through everything that treats each row by itself: pointwise ops, linears,
reductions over other dimensions, and changes of shape that keep the rows. It stops at what mixes rows (attention), at what others read too,
and at ops that it doesn't know, and selects there. So of a prompt of a thousand tokens the head's output projection and MLP see one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from specfx.errors import PassError
from specfx.passes.framework import Pass, PassContext, calls, insert_call, is_impure

aten = torch.ops.aten

Inputs = dict[fx.Node, int]
"""The inputs of a node that have its rows, with the dimension in which each has them."""


def _pointwise(node: fx.Node, dim: int) -> Inputs | None:
    """Inputs are aligned from the right, as broadcasting does; those that lack the rows are the same for all."""
    rows, inputs = str(_shape(node)[dim]), Inputs()
    for source in node.all_input_nodes:
        shape = _shape(source)
        at = len(shape) - (len(_shape(node)) - dim)
        if at < 0 or str(shape[at]) == "1":
            continue
        if str(shape[at]) != rows:
            return None
        inputs[source] = at
    return inputs


def _linear(node: fx.Node, dim: int) -> Inputs | None:
    return {_source(node): dim} if dim < len(_shape(node)) - 1 else None


def _reduction(node: fx.Node, dim: int) -> Inputs | None:
    """Over some dimensions, which stay as ones."""
    over, *keep = node.args[1:]
    dims = over if isinstance(over, (list, tuple)) else [over]
    rank = len(_shape(_source(node)))
    return {_source(node): dim} if keep[:1] == [True] and all(d % rank != dim for d in dims) else None  # type: ignore[operator]


def _beside(node: fx.Node, dim: int) -> Inputs | None:
    """Along one other dimension."""
    along = _dimension(node, 1, node) if len(node.args) > 1 else 0
    return dict.fromkeys(node.all_input_nodes, dim) if along != dim else None


def _select(node: fx.Node, dim: int) -> Inputs | None:
    return {_source(node): dim + (_dimension(node, 1, _source(node)) <= dim)}


def _unsqueeze(node: fx.Node, dim: int) -> Inputs | None:
    new = _dimension(node, 1, node)
    return {_source(node): dim - (new < dim)} if new != dim else None


def _transpose(node: fx.Node, dim: int) -> Inputs | None:
    a, b = _dimension(node, 1, node), _dimension(node, 2, node)
    return {_source(node): {a: b, b: a}.get(dim, dim)}


def _view(node: fx.Node, dim: int) -> Inputs | None:
    """The rows stay a dimension of their own, the only one whose size is not known yet, if as much stands before them as did."""
    new, old = _shape(node), _shape(_source(node))
    if not all(isinstance(size, int) for i, size in enumerate(new) if i != dim):
        return None
    before = _product(new[:dim])
    for at, size in enumerate(old):
        if str(size) == str(new[dim]) and str(_product(old[:at])) == str(before):
            return {_source(node): at}
    return None


_VIEWS = (aten.view.default, aten.reshape.default)
_KNOWN: dict[Any, Callable[[fx.Node, int], Inputs | None]] = {
    aten.linear.default: _linear,
    aten.mean.dim: _reduction,
    aten.sum.dim_IntList: _reduction,
    aten.cat.default: _beside,
    aten.slice.Tensor: _beside,
    aten.softmax.int: _beside,
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    aten.transpose.int: _transpose,
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys((aten.to.dtype, aten.type_as.default, aten.alias.default, aten.clone.default, aten.detach.default), _pointwise),
}


def _shape(node: fx.Node) -> Sequence[Any]:
    return node.meta["val"].shape


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _dimension(node: fx.Node, argument: int, of: fx.Node) -> int:
    """Which one of those of `of` an argument of `node` names, from 0."""
    dimension: Any = node.args[argument]
    return dimension % len(_shape(of))


def _product(sizes: Sequence[Any]) -> Any:
    product = 1
    for size in sizes:
        product = product * size
    return product


def _inputs(node: fx.Node, dim: int) -> Inputs | None:
    """None for what does not treat each row by itself, as far as is known."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    sizes = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.Tensor)]
    if node.target in _KNOWN:
        return _KNOWN[node.target](node, dim) if not sizes or node.target in _VIEWS else None
    tags = getattr(node.target, "tags", ())
    known = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags and not is_impure(node)
    return _pointwise(node, dim) if known and not sizes else None


def _region(select: fx.Node) -> tuple[dict[fx.Node, Inputs], Inputs]:
    """What can be computed on the rows of `select` alone, with the inputs of each node, and in which dimension all these have the rows."""
    source, rows = _source(select), select.args[2]
    dims, region = Inputs({source: _dimension(select, 1, source)}), dict[fx.Node, Inputs]()
    whole, node = set[fx.Node](), select.prev
    while node.op != "root":
        if node in dims and node not in whole and all(user is select or user in region for user in node.users):
            inputs = _inputs(node, dims[node])
            if inputs and rows not in inputs and all(dims.get(n, at) == at for n, at in inputs.items()):
                region[node] = inputs
                dims |= inputs
                whole |= set(node.all_input_nodes) - inputs.keys()
        node = node.prev
    return region, dims


def _pays(region: dict[fx.Node, Inputs]) -> bool:
    return any(node.target is aten.linear.default for node in region)


def _hoist(module: fx.GraphModule, select: fx.Node) -> None:
    region, dims = _region(select)
    rows = select.args[2]
    chosen: dict[fx.Node, fx.Node] = {}
    with module.graph.inserting_before(select):
        for node in reversed(region):
            for source, dim in region[node].items():
                if source not in chosen:
                    chosen[source] = insert_call(module.graph, aten.index_select.default, source, dim, rows)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, own=region[node]: chosen[n] if n in own else n)  # type: ignore[misc]
            if node.target in _VIEWS:
                args = (args[0], [-1 if i == dims[node] else size for i, size in enumerate(_shape(node))])
            chosen[node] = insert_call(module.graph, node.target, *args, **kwargs)
    select.replace_all_uses_with(chosen[_source(select)])
    module.graph.erase_node(select)
    for node in region:
        module.graph.erase_node(node)


def run(module: fx.GraphModule, context: PassContext) -> int:
    worth = [select for select in calls(module, aten.index_select.default) if _pays(_region(select)[0])]
    for select in worth:
        _hoist(module, select)
    return len(worth)


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    late = [select.name for select in calls(module, aten.index_select.default) if _pays(_region(select)[0])]
    if late:
        raise PassError(f"rows are still selected behind linears that nobody else reads: {', '.join(late)}")


hoist_row_selection = Pass("hoist_row_selection", run, ensures, requires=("mtp_head",), optional=True)
