"""Every private torch API that specfx uses, each with the versions it was read in (torch 2.11 to 2.13)."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import specfx

_fresh = itertools.count()


def new_dynamic_size(mode: torch._subclasses.FakeTensorMode, hint: int = 5) -> torch.SymInt:
    """A new backed symbolic size in `mode`'s shape environment (`ShapeEnv.create_symbol`, read in 2.13)."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    environment = mode.shape_env
    assert environment is not None
    source = ConstantSource(f"specfx_size_{next(_fresh)}")
    symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size = environment.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def _sources_hash() -> str:
    """Of everything that decides what an artifact does and that Inductor does not know."""
    root = Path(__file__).parent
    folders = [Path(p) / name for p in specfx.__path__ for name in ("passes", "kernels")]
    files = sorted(f for folder in folders for pattern in ("*.py", "cpu/*") for f in folder.glob(pattern))
    return hashlib.sha256(b"".join(f.read_bytes() for f in [*files, root / "_compat.py"])).hexdigest()


class _SourcesKey(CustomGraphPass):
    """A pass that does nothing but put a hash of specfx's sources into Inductor's cache key, which knows neither ops nor kernels."""

    def __call__(self, graph: fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return _sources_hash()


def inductor_compile(module: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Lower a graph of functional ATen ops and ops of specfx: decomposed by `make_fx`, then `compile_fx_inner` (read in 2.13).

    AOTAutograd has nothing to do here (no gradients, no aliases, and the only inputs that change are those of ops that say so), would
    take a third of the time, and can't make ops that write into their inputs functional within a region.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    weights = {str(n.target): n.meta["val"] for n in module.graph.find_nodes(op="get_attr") if isinstance(n.meta.get("val"), torch.Tensor)}
    fakes = [*weights.values(), *example_inputs]
    mode = fakes[-1].fake_mode
    lifted = _with_weights_as_inputs(module, tuple(weights))
    patched = config.patch({"post_grad_custom_post_pass": _SourcesKey(), **options})
    with torch.no_grad(), patched, tracing(TracingContext(mode)):  # its cache keeps a region one graph, whatever it is called on
        with mode:
            traced = make_fx(lifted, decomposition_table=select_decomp_table())(*fakes)
        with V.set_fake_mode(mode):
            compiled: Any = compile_fx_inner(traced, fakes)
    held = [functools.reduce(getattr, name.split("."), module) for name in weights]
    return lambda *inputs: compiled([*held, *inputs])


def _with_weights_as_inputs(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A copy in which these attributes are the first placeholders."""
    graph, new = fx.Graph(), {}
    weights = {name: graph.placeholder(f"weight_{i}") for i, name in enumerate(names)}
    for node in module.graph.nodes:
        lifted = node.op == "get_attr" and node.target in weights
        new[node] = weights[str(node.target)] if lifted else graph.node_copy(node, new.__getitem__)
    return fx.GraphModule(module, graph)


def weight_conversions() -> tuple[Any, Any, Any, Any, Any] | None:
    """transformers' renaming and fusing of weights on loading: ``(get_model_conversion_mapping, get_checkpoint_conversion_mapping,
    WeightConverter, WeightRenaming, rename_source_key)``; None where it has none. Read in 5.17 and 5.23."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return None
    return get_model_conversion_mapping, get_checkpoint_conversion_mapping, WeightConverter, WeightRenaming, rename_source_key
