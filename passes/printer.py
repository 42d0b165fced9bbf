"""A graph as text that stays the same when nothing that matters has changed: what golden tests compare and `explain` shows.

`normal_form` prints the live nodes in order, one a line. Values are numbered, sizes are renamed ``s0, s1, ..`` by first appearance and
written where they are used, weights stand in their users' arguments. Names that torch made up, overloads, devices, addresses, asserts
and dead code are left out. Decoder layers (found through ``meta["nn_module_stack"]``) are blocks with a numbering of their own:
what comes from outside is ``in0, in1, ..`` and ``k_pages_a, ..``, bound in the block's first line, so that equal layers print once.

`difference` keeps the numbers of the graph before for the nodes that a pass left alone; new ones are ``%a0, %a1, ..``.
"""

from __future__ import annotations

import difflib
import itertools
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from specfx.passes.framework import is_impure

_DTYPE = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c", "bool": "bool"}
_SYMBOL = re.compile(r"\b[suz][a-z]*\d+\b")
_FIRST_NUMBER = re.compile(r"^(?:.*?\.)?(\d+)(?=\.|$)")
_NUMBERED = re.compile(r"^(\w*_)(\d+)(.*)$")
_BEFORE = "the layer before's "


@dataclass
class _Block:
    """A run of nodes: one layer, or (path "") what lies between two. inputs: its names for what comes from outside."""

    path: str
    nodes: list[fx.Node] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return int(self.path.rpartition(".")[2])


def normal_form(module: fx.GraphModule, collapse: bool = True) -> str:
    """The text of `module`; with `collapse` consecutive layers that are the same are printed once."""
    return "\n".join(_Printer(module, collapse, {}, {}).lines)


def difference(before: fx.GraphModule, after: fx.GraphModule, collapse: bool = True) -> str:
    """What stands in the normal form of only one of them (``-`` before, ``+`` after), by block. Empty if there is no difference."""
    symbols: dict[str, str] = {}
    old = _Printer(before, collapse, symbols, {})
    new = _Printer(after, collapse, symbols, {node.name: name for node, (_, name) in old.names.items()})
    text: list[str] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old.lines, new.lines, autojunk=False).get_opcodes():
        if kind != "equal":
            headings = [line for line in new.lines[: max(k, 1)] if not line.startswith(" ") and line not in new.lines[k:m]]
            text += ["@ " + headings[-1].partition(",")[0].rstrip(":")] if headings else []
            text += [f"-{line}" for line in old.lines[i:j]] + [f"+{line}" for line in new.lines[k:m]]
    return "\n".join(text)


class _Printer:
    """State of one printing. symbols and known (names by node) are shared by the two sides of a difference."""

    def __init__(self, module: fx.GraphModule, collapse: bool, symbols: dict[str, str], known: dict[str, str]) -> None:
        self.module, self.collapse, self.symbols, self.known = module, collapse, symbols, known
        self.names: dict[fx.Node, tuple[_Block, str]] = {}
        self.taken: set[str] = set()  # names between layers
        self.lines = ["inputs:", *(f"  {line}" for line in self._placeholders())]
        runs: list[list[_Block]] = []
        previous = None
        for block in _blocks(_live(module), collapse):
            self._print(block, previous)
            previous = block
            if runs and _alike([*runs[-1], block]):
                runs[-1].append(block)
            else:
                runs.append([block])
        for run in runs:
            self.lines += [_heading(run), *(f"  {line}" for line in run[0].lines)]
        output = module.graph.output_node().args[0]
        self.lines.append(f"return {self._argument(output, lambda n: self._reference(n, _Block(''), None))}")

    def _placeholders(self) -> list[str]:
        families: dict[tuple[str, str], list[str]] = {}
        for node in self.module.graph.find_nodes(op="placeholder"):
            numbered = _NUMBERED.match(str(node.target)) if self.collapse else None
            stem = numbered[1] if numbered else str(node.target)
            families.setdefault((stem, self._type(node.meta.get("val"))), []).append(str(node.target))
        return [f"{_sequence(names)}: {kind}" for (_, kind), names in families.items()]

    def _print(self, block: _Block, previous: _Block | None) -> None:
        def reference(node: fx.Node) -> str:
            return self._reference(node, block, previous)

        taken: set[str] = set() if block.path else self.taken
        for node in block.nodes:
            candidates = (f"%{'a' if self.known else ''}{i}" for i in itertools.count())
            name = next(c for c in (self.known.get(node.name), *itertools.islice(candidates, len(taken) + 1)) if c and c not in taken)
            taken.add(name)
            self.names[node] = (block, name)
            arguments = [self._argument(a, reference) for a in node.args]
            arguments += [f"{key}={self._argument(value, reference)}" for key, value in node.kwargs.items()]
            block.lines.append(f"{name}: {self._type(node.meta.get('val'))} = {_short(node.target)}({', '.join(arguments)})")

    def _reference(self, node: fx.Node, block: _Block, previous: _Block | None) -> str:
        value = node.meta.get("val")
        if _is_size(value):
            return self._symbolic(value)
        if node.op == "placeholder":
            name = str(node.target)
            return self._input(block, name) if block.path and _NUMBERED.match(name) else name
        if node.op == "get_attr":
            name, kind = str(node.target), self._type(value if value is not None else _attribute(self.module, str(node.target)))
            if block.path and _NUMBERED.match(name):
                return self._input(block, f"{name} {kind}")
            if block.path and name.startswith(block.path + "."):
                name = f"*{name[len(block.path) :]}"
            return f"{name} {kind}"
        owner, name = self.names[node]
        if owner is block or not (owner.path or block.path):
            return name
        if not block.path:
            return f"layer{owner.number}.{name}"
        return self._input(block, name if not owner.path else f"{_BEFORE}{name}" if owner is previous else f"layer{owner.number}.{name}")

    def _input(self, block: _Block, binding: str) -> str:
        """The name under which `block` reads what `binding` says; of numbered names the number is a letter, as it varies by layer."""
        numbered = _NUMBERED.match(binding)
        stem = numbered[1] if numbered else "in"
        if binding not in block.inputs:
            order = sum(name.startswith(stem) for name in block.inputs.values())
            block.inputs[binding] = f"{stem}{string.ascii_letters[order] if numbered else order}"
        return block.inputs[binding]

    def _argument(self, value: Any, reference: Callable[[fx.Node], str]) -> str:
        if isinstance(value, fx.Node):
            return reference(value)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self._argument(v, reference) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, torch.dtype):
            return _dtype(value)
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, float):
            return f"{value:.6g}"
        if isinstance(value, int) and value == (1 << 63) - 1:
            return "end"
        return self._symbolic(value) if isinstance(value, torch.SymInt) else str(value)

    def _symbolic(self, value: Any) -> str:
        return _SYMBOL.sub(lambda m: self.symbols.setdefault(m[0], f"s{len(self.symbols)}"), str(value))

    def _type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{_dtype(value.dtype)}[{', '.join(self._symbolic(s) for s in value.shape)}]"
        return f"({', '.join(map(self._type, value))})" if isinstance(value, (list, tuple)) else "?"


def _live(module: fx.GraphModule) -> list[fx.Node]:
    """The calls that the output needs, or that write to something, in order; without sizes, which are written where they are used."""
    live: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node in live or is_impure(node):
            live.update([node, *node.all_input_nodes])
    return [n for n in module.graph.nodes if n in live and n.op.startswith("call") and not _is_size(n.meta.get("val"))]


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt))


def _blocks(nodes: Sequence[fx.Node], split: bool) -> list[_Block]:
    paths = [_layer(n) if split else "" for n in nodes]
    last = -1
    for i, path in enumerate(paths):  # what stands between nodes of one layer belongs to it
        if path:
            if last >= 0 and paths[last] == path:
                paths[last:i] = [path] * (i - last)
            last = i
    blocks: list[_Block] = []
    for node, path in zip(nodes, paths, strict=True):
        if not blocks or blocks[-1].path != path:
            blocks.append(_Block(path))
        blocks[-1].nodes.append(node)
    for i, block in enumerate(blocks):
        if not block.path and not any(map(is_impure, block.nodes)):
            block.nodes = _by_demand(block.nodes, [n for later in blocks[i + 1 :] if later.path for n in later.nodes])
    return blocks


def _by_demand(nodes: Sequence[fx.Node], readers: Sequence[fx.Node]) -> list[fx.Node]:
    """`nodes` in the order in which layers need them: transformers computes Gemma's two rotary tables in the order of a set."""
    ordered: dict[fx.Node, None] = {}
    members = set(nodes)

    def visit(node: fx.Node) -> None:
        if node in members and node not in ordered:
            for needed in node.all_input_nodes:
                visit(needed)
            ordered[node] = None

    for node in (*(n for reader in readers for n in reader.all_input_nodes), *nodes):
        visit(node)
    return list(ordered)


def _layer(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    found = _FIRST_NUMBER.match(list(stack.values())[-1][0])
    return found[0] if found else ""


def _alike(run: Sequence[_Block]) -> bool:
    """Whether the last block of `run` goes on as those before it: the next number, the same text, inputs of the same kind."""
    a, b = run[-2:]
    if not a.path or b.path != f"{a.path.rpartition('.')[0]}.{a.number + 1}" or a.lines != b.lines:
        return False
    return all(_sequence(bindings) for bindings in zip(*(block.inputs for block in run), strict=True))


def _sequence(names: Sequence[str]) -> str:
    """What one input is from layer to layer, in words; empty if there is no rule."""
    if len(set(names)) == 1:
        return names[0]
    if len(set(names[1:])) == 1 and names[1].startswith(_BEFORE):
        return f"{names[0]}, then {names[1]}"
    found = [m for m in map(_NUMBERED.match, names) if m]
    numbers = [int(m[2]) for m in found]
    if len(found) != len(names) or len({(m[1], m[3]) for m in found}) != 1 or len({y - x for x, y in itertools.pairwise(numbers)}) != 1:
        return ""
    few, dense = len(numbers) < 3, numbers[1] == numbers[0] + 1
    rest = f"..{numbers[-1]}" if dense else f", {numbers[1]}" if few else f", {numbers[1]}..{numbers[-1]}"
    return f"{names[0][: found[0].end(2)]}{rest}{found[0][3]}"


def _heading(run: Sequence[_Block]) -> str:
    first = run[0]
    if not first.path:
        return "nodes:"
    title = f"layer {first.number}" if len(run) == 1 else f"layers {first.number}..{run[-1].number} ({len(run)} alike)"
    bindings = zip(*(block.inputs for block in run), strict=True)
    return ", ".join([title, *(f"{name} = {_sequence(b)}" for name, b in zip(first.inputs.values(), bindings, strict=True))]) + ":"


def _short(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(target, "__name__", str(target))


def _dtype(dtype: torch.dtype) -> str:
    return re.sub("[a-z]+", lambda m: _DTYPE.get(m[0], m[0]), str(dtype).removeprefix("torch."), count=1)


def _attribute(module: fx.GraphModule, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
