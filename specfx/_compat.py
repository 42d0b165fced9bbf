"""Every private torch API that specfx uses, each with the versions it was read in (torch 2.11 to 2.13)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
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


def symbolic_shapes() -> contextlib.AbstractContextManager[Any]:
    """A block in which ops on fake tensors compute symbolic sizes also where their C++ asks for numbers, as `torch.export` does it
    (`enable_python_dispatcher`; `aten.matmul` needs it in 2.11, not in 2.13)."""
    from torch._dispatch.python import enable_python_dispatcher

    manager: contextlib.AbstractContextManager[Any] = enable_python_dispatcher()
    return manager


def has_kernel(op: torch._ops.OpOverload, device: torch.device) -> bool:
    """Whether `op` has a kernel of its own for `device`, beside its reference for all (`_dispatch_has_kernel_for_dispatch_key`)."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), device.type.upper()))


def end_failed_capture(device: torch.device, pool: Any) -> None:
    """Tell torch's allocator that a failed capture into `pool` is over: ``capture_end`` raises before it does (read in 2.11)."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):  # raised where it was told already
        torch._C._cuda_endAllocateToPool(index, pool)


def run_and_get_code(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """What `call` returns, and the sources that Inductor made meanwhile (read in 2.11 and 2.13)."""
    from torch._inductor.utils import run_and_get_code

    result, codes = run_and_get_code(call, *args, **kwargs)
    return result, list(codes)


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
    """Lower a graph module with mutable inputs through AOTAutograd and Inductor (`compile_fx`, read in 2.13)."""
    with torch.no_grad(), config.patch({"post_grad_custom_post_pass": _SourcesKey(), **options}):
        compiled: Any = compile_fx(module, list(example_inputs))
    return compiled


def weight_conversions() -> tuple[Any, Any, Any, Any] | None:
    """transformers' renaming and fusing of weights on loading: ``(get_model_conversion_mapping, WeightConverter, WeightRenaming,
    rename_source_key)``; None where it has none. Read in 5.17 and 5.23."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return None
    return get_model_conversion_mapping, WeightConverter, WeightRenaming, rename_source_key
