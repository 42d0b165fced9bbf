"""Every private torch API that specfx uses, each with the versions it was read in (torch 2.11 to 2.13)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

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


def inductor_compile(module: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Lower a graph module with mutable inputs through AOTAutograd and Inductor (`compile_fx`, read in 2.13)."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad(), config.patch(options):
        return compile_fx(module, list(example_inputs))
