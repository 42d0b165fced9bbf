"""Layers that are alike become calls of one graph, so that a model of thirty layers costs the compiler one.

1. Every attention anchors a *stretch* of nodes that reaches to the same place before the next one. Of all such places the pass takes the
   one where the fewest values are alive: between two layers, that is the hidden states.
2. Stretches are alike if their nodes are, in order, with the same constants, types and symbolic sizes, and read each other and the
   outside in the same pattern: by structure, not by name. Weights, page pools and all else from outside are inputs.
3. Each kind that occurs at least twice is outlined as ``region_{k}``, and each of its stretches becomes a call of it
   (`torch.ops.higher_order.invoke_subgraph`), which Inductor lowers once. Kinds that differ (sliding and full attention, dense and
   experts) are regions of their own.

A stretch whose page pools another node also touches (a draft head's steps) stays as it is: the order of those writes is the outer graph's
to keep. Values are unchanged.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from specfx.errors import PassError
from specfx.kernels.tree_attention import tree_attention_
from specfx.passes.framework import NoMatch, Pass, PassContext, calls, graph_module

invoke = torch.ops.higher_order.invoke_subgraph


def is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int))


@dataclass
class Stretch:
    """Consecutive nodes. kinds: of nodes, as far as they are known (see `_kind`). inputs: what they read from outside, in the order of
    first use. form: equal for stretches that are alike."""

    nodes: Sequence[fx.Node]
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)
    form: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        place: dict[fx.Node, str] = {}

        def name(node: fx.Node) -> Any:
            if is_size(node):  # computed again inside, from a tensor that comes from outside
                return (str(node.target), fx.map_arg(node.args, name), str(node.meta["val"]))
            if node not in place:
                place[node] = f"in{len(self.inputs)}"
                self.inputs.append(node)
            return place[node]

        named: Any = lambda n: _Name(name(n))  # noqa: E731
        lines = []
        for i, node in enumerate(self.nodes):
            read = repr(fx.map_arg((node.args, node.kwargs), named))
            lines.append((str(node.target), read, self.kind(node)))
            place[node] = f"n{i}"
        self.form = (*lines, *map(self.kind, self.inputs))

    def kind(self, node: fx.Node) -> str:
        if node not in self.kinds:
            self.kinds[node] = _kind(node)
        return self.kinds[node]


class _Name:
    """Stands for a node in the text of its readers."""

    def __init__(self, name: Any) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


def _kind(node: fx.Node) -> str:
    def of(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {list(value.shape)} {list(value.stride())}"
        return str([of(v) for v in value]) if isinstance(value, (tuple, list)) else str(value)

    return of(node.meta.get("val"))


def _alive(nodes: Sequence[fx.Node]) -> list[int]:
    """How many of the values made before each place are read from it on."""
    place = {node: i for i, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for node, i in place.items():
        last = max((place.get(user, len(nodes) - 1) for user in node.users), default=i)
        if last > i:
            change[i + 1] += 1
            change[last + 1] -= 1
    alive, count = [], 0
    for step in change[:-1]:
        count += step
        alive.append(count)
    return alive


def _stretches(nodes: Sequence[fx.Node], lead: int, anchors: Sequence[int], known: dict[fx.Node, str]) -> list[Stretch]:
    """The stretches that begin `lead` nodes before each anchor, as long as they are alike to another. known: kinds of nodes."""
    starts = [a - lead for a in anchors]
    whole = [Stretch(nodes[a:b], known) for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True)]
    counts = Counter(s.form for s in whole)
    kinds = {s.form: len(s.nodes) for s in whole[:-1]}
    found: list[Stretch] = []
    for start, stretch in zip(starts, whole, strict=True):
        if counts[stretch.form] < 2:  # more than a layer stands before the next anchor, or behind the last one
            lengths = sorted((n for n in set(kinds.values()) if n < len(stretch.nodes)), reverse=True)
            shorter = (Stretch(nodes[start : start + n], known) for n in lengths)
            stretch = next((s for s in shorter if s.form in kinds), stretch)
        found.append(stretch)
    counts = Counter(s.form for s in found)
    return [s for s in found if counts[s.form] > 1]


def run(module: fx.GraphModule, context: PassContext) -> int:
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and not is_size(n)]
    attentions = set(calls(module, tree_attention_))
    anchors = [i for i, n in enumerate(nodes) if n in attentions]
    if len(anchors) < 2:
        raise NoMatch(f"{len(anchors)} attentions")
    alive = _alive(nodes)
    room = min(anchors[0], *(b - a - 1 for a, b in itertools.pairwise(anchors)))
    fewest = min(alive[anchors[1] - lead] for lead in range(room + 1))
    leads = [lead for lead in range(room + 1) if alive[anchors[1] - lead] == fewest]
    known: dict[fx.Node, str] = {}
    found = max((_stretches(nodes, lead, anchors, known) for lead in leads), key=lambda s: sum(len(x.nodes) for x in s))
    found = [s for s in found if _owns_its_pools(s)]
    kinds: dict[tuple[Any, ...], list[Stretch]] = defaultdict(list)
    for stretch in found:
        kinds[stretch.form].append(stretch)
    outlined = [alike for alike in kinds.values() if len(alike) > 1]
    replaced: dict[fx.Node, fx.Node] = {}
    for number, alike in enumerate(outlined):
        _outline(module, f"region_{number}", alike, replaced)
    return sum(map(len, outlined))


def _owns_its_pools(stretch: Stretch) -> bool:
    inside = set(stretch.nodes)
    pools = [pool for n in stretch.nodes if n.target is tree_attention_ for pool in n.args[8:10]]
    return all(user in inside for pool in pools for user in pool.users)  # type: ignore[union-attr]


def _outline(module: fx.GraphModule, name: str, alike: Sequence[Stretch], replaced: dict[fx.Node, fx.Node]) -> None:
    """replaced: what stands now for nodes of stretches that are calls already."""
    read_outside = [
        {i for i, node in enumerate(s.nodes) if any(user not in inside for user in node.users)} for s in alike for inside in [set(s.nodes)]
    ]
    returned = sorted(set().union(*read_outside))
    for stretch in alike:
        inputs = [replaced.get(n, n) for n in stretch.inputs]  # of the call before, say
        if stretch is alike[0]:
            setattr(module, name, graph_of(stretch.nodes, inputs, returned))
        last = stretch.nodes[-1]
        with module.graph.inserting_after(last):
            region = module.graph.get_attr(name)
        with module.graph.inserting_after(region):
            call = module.graph.call_function(invoke, (region, name, *inputs))
        call.meta["val"] = tuple(stretch.nodes[i].meta["val"] for i in returned)
        after = call
        for at, i in enumerate(returned):
            old = stretch.nodes[i]
            with module.graph.inserting_after(after):
                after = module.graph.call_function(operator.getitem, (call, at))
            after.meta["val"] = old.meta["val"]
            old.replace_all_uses_with(after)
            replaced[old] = after
        for node in reversed(stretch.nodes):
            module.graph.erase_node(node)


def graph_of(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], returned: Sequence[int]) -> fx.GraphModule:
    """A graph of its own of `nodes`, which takes `inputs` and returns the nodes at the places `returned`; sizes are computed again."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"in{i}")
        copies[node].meta["val"] = node.meta["val"]

    def copy(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in copies:
                if not is_size(source):
                    raise PassError(f"{source} is neither in the region nor an input of it")
                copy(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)

    for node in nodes:
        copy(node)
    graph.output(tuple(copies[nodes[i]] for i in returned))
    graph.output_node().meta["val"] = tuple(nodes[i].meta["val"] for i in returned)
    return graph_module({}, graph)


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    for node in calls(module, invoke):
        region: Any = getattr(module, str(node.args[0].target))  # type: ignore[union-attr]
        wanted = [n.meta["val"] for n in region.graph.find_nodes(op="placeholder")]
        given = [n.meta["val"] for n in node.args[2:]]  # type: ignore[union-attr]
        if [(w.dtype, str(w.shape)) for w in wanted] != [(g.dtype, str(g.shape)) for g in given]:
            raise PassError(f"{node} is called with other inputs than its region has")


regions = Pass("regions", run, ensures, min_matches=2, optional=True)
