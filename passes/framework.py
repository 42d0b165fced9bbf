"""The pass framework: what a pass is, and the runner that never leaves a half-rewritten graph.

A pass is a function ``(graph module, context) -> matches`` with a name, what it requires (names of passes that must have run before),
what it ensures (a check that raises `PassError`), and how many matches it expects. The runner knows no pass by name. It hands each
pass a *copy* of the graph and takes the copy only if the pass returned, matched enough, left a well-formed graph and its `ensures`
holds; so a failing pass costs nothing but its record. Each run leaves one frozen `PassRecord`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from specfx.errors import PassError, Reason, Refusal


class NoMatch(PassError):
    """A pass found too little to do."""


@dataclass(frozen=True)
class PassContext:
    """What passes may know beside the graph. page_size: tokens a KV page. pack: whether the CPU kernel for packed linears is there.
    drafting: the graph of a head's part of the step, if one is to be stitched in."""

    page_size: int = 64
    pack: bool = False
    drafting: fx.GraphModule | None = None


@dataclass(frozen=True)
class Pass:
    """One rewrite. `optional` passes may fail or be switched off and the graph still serves; the others are needed."""

    name: str
    run: Callable[[fx.GraphModule, PassContext], int]
    ensures: Callable[[fx.GraphModule, PassContext], None]
    requires: tuple[str, ...] = ()
    min_matches: int = 1
    optional: bool = False


@dataclass(frozen=True)
class PassRecord:
    """What one pass did. `difference` counts ops added (positive) and removed (negative) by name."""

    name: str
    applied: bool
    matches: int
    nodes_before: int
    nodes_after: int
    seconds: float
    difference: dict[str, int] = field(default_factory=dict)
    refusal: Refusal | None = None

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.name}: not applied ({self.refusal.reason.value}: {self.refusal.detail})"
        return f"{self.name}: {self.matches} matches, {self.nodes_before} -> {self.nodes_after} nodes, {self.seconds:.2f} s"


@dataclass(frozen=True)
class PipelineResult:
    """The rewritten graph and the records; `failed` is the first record of a needed pass that was not applied, or None."""

    module: fx.GraphModule
    records: tuple[PassRecord, ...]
    failed: PassRecord | None

    def applied(self, name: str) -> bool:
        return any(r.name == name and r.applied for r in self.records)


def attribute(module: torch.nn.Module, name: str) -> Any:
    """What a ``get_attr`` node with target `name` reads."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where and how `tensor` lies in memory: equal for two objects that are the same weight."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def graph_module(root: torch.nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """As `fx.GraphModule`, but its Python code is made when it is first called, which most graphs never are."""
    from specfx._compat import lazy_graph_module

    return lazy_graph_module(root, graph)


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with a graph and submodules of its own and the same weights (shared, not copied).

    Submodules of its own, because tracing one copy puts stand-ins in the places of its weights, while another may be running.
    """
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output(result)
    old, new = module.graph.output_node(), graph.output_node()
    new.meta = dict(old.meta)
    copy = graph_module({str(n.target): attribute(module, str(n.target)) for n in graph.find_nodes(op="get_attr")}, graph)
    copy.meta = dict(module.meta)
    return copy


def _ops(module: fx.GraphModule) -> Counter[str]:
    return Counter(f"{n.op}" if n.op != "call_function" else str(n.target) for n in module.graph.nodes)


def run_passes(module: fx.GraphModule, passes: Sequence[Pass], context: PassContext, disabled: Sequence[str] = ()) -> PipelineResult:
    """Run `passes` in order. `module` itself is not changed. Raises `PassError` only for a wrong name in `disabled`."""
    unknown = sorted(set(disabled) - {p.name for p in passes})
    if unknown:
        raise PassError(f"no pass is named {', '.join(unknown)}; the passes are {', '.join(p.name for p in passes)}")
    records: list[PassRecord] = []
    done: set[str] = set()
    for p in passes:
        before, started = _ops(module), time.perf_counter()
        matches, refusal, trial = 0, None, module
        missing = [r for r in p.requires if r not in done]
        if p.name in disabled:
            refusal = Refusal(f"pass {p.name}", Reason.SWITCHED_OFF, "named in disable_passes")
        elif missing:
            refusal = Refusal(f"pass {p.name}", Reason.PASS_FAILED, f"needs {', '.join(missing)}, which did not run")
        else:
            try:
                trial, matches = _try(p, module, context)
            except NoMatch as e:
                refusal = Refusal(f"pass {p.name}", Reason.NOTHING_TO_DO if p.optional else Reason.PASS_FAILED, str(e))
            except Exception as e:  # a pass is somebody's code: whatever it raises, the graph stays as it was
                refusal = Refusal(f"pass {p.name}", Reason.PASS_FAILED, f"{type(e).__name__}: {e}")
        if refusal is None:
            module = trial
            done.add(p.name)
        after = _ops(module)
        difference = {k: after[k] - before[k] for k in sorted(before | after) if after[k] != before[k]}
        seconds = time.perf_counter() - started
        records.append(PassRecord(p.name, refusal is None, matches, before.total(), after.total(), seconds, difference, refusal))
    optional = {p.name for p in passes if p.optional}
    failed = next((r for r in records if not r.applied and r.name not in optional), None)
    return PipelineResult(module, tuple(records), failed)


def _try(p: Pass, module: fx.GraphModule, context: PassContext) -> tuple[fx.GraphModule, int]:
    from specfx._compat import symbolic_shapes

    trial = copy_module(module)
    with symbolic_shapes():
        matches = p.run(trial, context)
    if matches < p.min_matches:
        raise NoMatch(f"{matches} matches, at least {p.min_matches} expected")
    trial.graph.eliminate_dead_code(is_impure_node=is_impure)
    trial.graph.lint()
    p.ensures(trial, context)
    trial.recompile()
    return trial, matches


def is_impure(node: fx.Node) -> bool:
    """Whether `node` must stay although nobody reads it."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def calls(module: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    """All calls of any of `targets`, in graph order."""
    return [n for n in module.graph.nodes if n.op == "call_function" and n.target in targets]


def fake_mode_of(module: fx.GraphModule) -> torch._subclasses.FakeTensorMode:
    """The fake mode in which the graph was traced."""
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    raise PassError("the graph carries no fake values")


def placeholder(module: fx.GraphModule, name: str) -> fx.Node | None:
    """The placeholder called `name`, or None."""
    return next((n for n in module.graph.nodes if n.op == "placeholder" and n.target == name), None)


def add_placeholder(module: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    """Append a graph input after the present ones. `value` becomes its ``meta["val"]`` and must be of the graph's own fake mode."""
    last = [n for n in module.graph.nodes if n.op == "placeholder"][-1]
    with module.graph.inserting_after(last):
        node = module.graph.placeholder(name)
    node.meta["val"] = value
    return node


def fake_input(
    module: fx.GraphModule, shape: Sequence[int | torch.SymInt | None], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A fake tensor of the graph's own mode; a size of None becomes a new dynamic size."""
    mode = fake_mode_of(module)
    with mode:
        sizes = [new_size(mode) if s is None else s for s in shape]
        return torch.empty(sizes, dtype=dtype, device=device)


def new_size(mode: torch._subclasses.FakeTensorMode) -> torch.SymInt:
    """A new dynamic size of `mode`, hint 5."""
    from specfx._compat import new_dynamic_size

    return new_dynamic_size(mode)


def insert_call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call at the graph's insertion point whose ``meta["val"]`` is computed from its arguments' by running the fake op."""
    node = graph.call_function(target, args, kwargs)
    unwrap = lambda n: n.meta["val"]  # noqa: E731
    fake_args, fake_kwargs = fx.map_arg(args, unwrap), fx.map_arg(kwargs, unwrap)
    node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node
