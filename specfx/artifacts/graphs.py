"""A rewritten graph as plain data, and back.

Kept of a graph: its nodes with their fake values, symbolic sizes as expressions over the graph's symbols (of which value, range and
name are kept), and the layer that a node belongs to. Weights stand in it by name; what has no name and is small is kept with its values;
packed weights are named by what they are packed from, and regions are graphs themselves. Back again, the graph lives in a fake mode of
its own, whose symbols have the ranges of the old ones.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from specfx import _compat
from specfx.errors import ArtifactError
from specfx.passes.framework import attribute, fake_mode_of, graph_module, place_of

LARGEST_CONSTANT = 1 << 20
"""Bytes of a tensor without a name that is kept with its values."""

Places = Mapping[tuple[Any, ...], str]
"""`place_of` a weight -> its name."""


@dataclass(frozen=True)
class _Node:
    index: int


@dataclass(frozen=True)
class _Size:
    """A symbolic size."""

    expression: sympy.Expr


@dataclass(frozen=True)
class _Tensor:
    """A fake tensor."""

    dtype: torch.dtype
    size: tuple[int | _Size, ...]
    stride: tuple[int | _Size, ...]
    device: torch.device


@dataclass(frozen=True)
class _Weight:
    name: str


@dataclass(frozen=True)
class _Packed:
    """Packed from these weights."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class _Graph:
    """nodes: (op, name, target, args, kwargs, fake value, layer) each. attributes: what its get_attr nodes read."""

    nodes: tuple[tuple[Any, ...], ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class GraphData:
    """symbols: by name, the value that was assumed, and the range. graph: pickled, ops by name."""

    symbols: dict[str, tuple[int, int | None, int | None]]
    graph: bytes


def encode(module: fx.GraphModule, places: Places) -> GraphData:
    """`module` as data. Raises `ArtifactError` for a graph that holds what can't be kept."""
    encoder = _Encoder(places)
    graph = encoder.graph(module)
    environment = fake_mode_of(module).shape_env
    symbols = {str(s): _compat.describe_symbol(environment, s) for s in sorted(encoder.symbols, key=str)}
    stream = io.BytesIO()
    try:
        _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(graph)
    except Exception as e:  # whatever pickling raises
        raise ArtifactError(f"the graph can't be pickled: {type(e).__name__}: {e}") from e
    return GraphData(symbols, stream.getvalue())


def decode(
    data: GraphData, weights: Mapping[str, Tensor], device: torch.device, pack: Callable[[tuple[Tensor, ...]], Tensor]
) -> fx.GraphModule:
    """The graph over these `weights`, on `device`. pack: makes packed weights. Raises `ArtifactError`."""
    try:
        mode = _compat.new_fake_mode()
        sizes = {name: _compat.new_dynamic_size(mode, *symbol) for name, symbol in data.symbols.items()}
        return _Decoder(mode, sizes, data.symbols, weights, device, pack).graph(_Unpickler(io.BytesIO(data.graph)).load())
    except Exception as e:  # data of another making
        raise ArtifactError(f"a stored graph can't be rebuilt: {type(e).__name__}: {e}") from e


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch._ops.OpOverload):
            return ("op", value._schema.name, value._overloadname)
        if isinstance(value, torch._ops.HigherOrderOperator):
            return ("higher order", value.name())
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, key: Any) -> Any:
        if key[0] == "higher order":
            return getattr(torch.ops.higher_order, key[1])
        namespace, _, name = key[1].partition("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), key[2])


class _Encoder:
    """symbols: all that were met."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.symbols: set[sympy.Symbol] = set()

    def graph(self, module: fx.GraphModule) -> _Graph:
        index: dict[fx.Node, Any] = {node: _Node(i) for i, node in enumerate(module.graph.nodes)}
        nodes = []
        for node in module.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), index.__getitem__)
            target = str(node.target) if node.op in ("placeholder", "get_attr", "output") else node.target
            nodes.append((node.op, node.name, target, args, kwargs, self.value(node.meta.get("val")), _layer(node)))
        packed = module.meta.get("packed", {})
        names = dict.fromkeys(str(n.target) for n in module.graph.find_nodes(op="get_attr"))
        return _Graph(tuple(nodes), {name: self.attribute(attribute(module, name), packed.get(name)) for name in names})

    def attribute(self, value: Any, packed_from: Sequence[Tensor] | None) -> Any:
        if isinstance(value, fx.GraphModule):
            return self.graph(value)
        if not isinstance(value, Tensor):
            raise ArtifactError(f"the graph holds a {type(value).__name__}")
        if packed_from is not None:
            return _Packed(tuple(self._places[place_of(weight)] for weight in packed_from))
        if (name := self._places.get(place_of(value))) is not None:
            return _Weight(name)
        if value.numel() * value.element_size() > LARGEST_CONSTANT:
            raise ArtifactError(f"the graph holds a tensor {list(value.shape)} that is no weight of the model")
        return value.detach().cpu().clone()

    def value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            sizes, strides = (tuple(map(self.value, x)) for x in (value.shape, value.stride()))
            return _Tensor(value.dtype, sizes, strides, value.device)
        if isinstance(value, torch.SymInt):
            expression = value.node.expr
            self.symbols |= expression.free_symbols
            return _Size(expression)
        if isinstance(value, (tuple, list)):
            return tuple(map(self.value, value))
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ArtifactError(f"a node's value is a {type(value).__name__}")


class _Decoder:
    """sizes: the symbols of the new fake mode, by the names of the old ones."""

    def __init__(
        self,
        mode: FakeTensorMode,
        sizes: Mapping[str, torch.SymInt],
        symbols: Mapping[str, tuple[int, int | None, int | None]],
        weights: Mapping[str, Tensor],
        device: torch.device,
        pack: Callable[[tuple[Tensor, ...]], Tensor],
    ) -> None:
        self._mode, self._weights, self._device, self._pack = mode, weights, device, pack
        self._new = {name: size.node.expr for name, size in sizes.items()}
        self._hints = {self._new[name]: symbol[0] for name, symbol in symbols.items()}
        self._made: dict[sympy.Expr, Any] = {}

    def graph(self, data: _Graph) -> fx.GraphModule:
        graph = fx.Graph()
        made: list[fx.Node] = []
        for op, name, target, args, kwargs, value, layer in data.nodes:
            node = graph.create_node(op, target, self._arguments(args, made), self._arguments(kwargs, made), name)
            node.meta["val"] = self.value(value)
            if layer is not None:
                node.meta["nn_module_stack"] = {layer: (layer, None)}
            made.append(node)
        packed: dict[str, tuple[Tensor, ...]] = {}
        attributes: dict[str, Any] = {}
        for name, kept in data.attributes.items():
            if isinstance(kept, _Packed):
                packed[name] = tuple(self._weights[n] for n in kept.names)
                attributes[name] = self._pack(packed[name])
            elif isinstance(kept, _Graph):
                attributes[name] = self.graph(kept)
            else:
                attributes[name] = self._weights[kept.name] if isinstance(kept, _Weight) else kept.to(self._device)
        module = graph_module(attributes, graph)
        if packed:
            module.meta["packed"] = packed
        return module

    def _arguments(self, value: Any, made: Sequence[fx.Node]) -> Any:
        if isinstance(value, _Node):
            return made[value.index]
        if isinstance(value, (tuple, list)):
            return type(value)(self._arguments(v, made) for v in value)
        if isinstance(value, dict):
            return {k: self._arguments(v, made) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._arguments(v, made) for v in (value.start, value.stop, value.step)))
        return value

    def value(self, value: Any) -> Any:
        if isinstance(value, _Tensor):
            sizes, strides = ([self.value(x) for x in xs] for xs in (value.size, value.stride))
            with self._mode:
                return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        if isinstance(value, _Size):
            if value.expression not in self._made:
                expression = value.expression.xreplace({s: self._new[str(s)] for s in value.expression.free_symbols})
                self._made[value.expression] = _compat.size_of(self._mode, expression, int(expression.xreplace(self._hints)))
            return self._made[value.expression]
        return tuple(map(self.value, value)) if isinstance(value, tuple) else value


def _layer(node: fx.Node) -> str | None:
    """Path of the innermost module that `node` was traced in."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else None
