"""Every private torch API that specfx uses, each with the versions it was read in (torch 2.11 to 2.13)."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
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
    """Lower a graph of functional ATen ops and ops of specfx: decomposed by `make_fx`, then `compile_fx_inner` (read in 2.13).

    AOTAutograd has nothing to do here (no gradients, no aliases, and the only inputs that change are those of ops that say so), would
    take a third of the time, and can't make ops that write into their inputs functional within a region.
    """
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs):
        from specfx.kernels import inductor_attention

        inductor_attention.register()
    from torch._guards import TracingContext, tracing
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    from specfx.passes.framework import attribute

    weights = {str(n.target): n.meta["val"] for n in module.graph.find_nodes(op="get_attr") if isinstance(n.meta.get("val"), torch.Tensor)}
    fakes = [*weights.values(), *example_inputs]
    mode = fakes[-1].fake_mode
    lifted = _with_weights_as_inputs(module, tuple(weights))
    patched = config.patch({"post_grad_custom_post_pass": _SourcesKey(), **options})
    with torch.no_grad(), patched, tracing(TracingContext(mode)):  # its cache keeps a region one graph, whatever it is called on
        with mode, symbolic_shapes():
            traced = make_fx(lifted, decomposition_table=select_decomp_table())(*fakes)
        with V.set_fake_mode(mode):
            compiled: Any = compile_fx_inner(traced, fakes)
    held = [attribute(module, name) for name in weights]
    return lambda *inputs: compiled([*held, *inputs])


def _with_weights_as_inputs(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A copy in which these attributes are the first placeholders."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    weights = {name: graph.placeholder(f"weight_{i}") for i, name in enumerate(names)}
    for node in module.graph.nodes:
        lifted = node.op == "get_attr" and node.target in weights
        new[node] = weights[str(node.target)] if lifted else graph.node_copy(node, new.__getitem__)
    return fx.GraphModule(module, graph)


# --- Inductor lowerings and templates (all read in 2.13; where 2.11 differs, it says so) -----------------------------------------


def lower_on_cuda(op: torch._ops.OpOverload, lower: Callable[..., Any]) -> None:
    """Let Inductor lower `op` by ``lower(*args, **kwargs)`` where its first argument is on a CUDA device and the answer is not None;
    else it calls the op, as without this (`register_lowering`, `FallbackKernel`)."""
    from torch._inductor.lowering import fallback_handler, register_lowering

    call_op = fallback_handler(op)

    def lowering(first: Any, *args: Any, **kwargs: Any) -> Any:
        lowered = lower(first, *args, **kwargs) if first.get_device().type == "cuda" else None
        return call_op(first, *args, **kwargs) if lowered is None else lowered

    register_lowering(op, type_promotion_kind=None)(lowering)


def emit_call(op: torch._ops.OpOverload, *args: Any) -> None:
    """A call of an op that only mutates, in the code that is being made (`FallbackKernel`)."""
    from torch._inductor.ir import FallbackKernel

    FallbackKernel.create(op, *args)


def triton_template(name: str, grid: Callable[..., tuple[Any, Any, Any]], source: str) -> Any:
    """`TritonTemplate` over a grid function ``(*call_sizes, meta)`` of ints or symbols."""
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    return TritonTemplate(name=name, grid=SymbolicGridFn(grid), source=source)


def extern_choice(function: Callable[..., torch.Tensor]) -> Any:
    """A plain function as a choice beside templates. Generated code finds it by its name, so it is made in each process."""
    from torch._inductor.select_algorithm import ExternKernelChoice

    return ExternKernelChoice(function, has_out_variant=False)


def tuning() -> bool:
    """Whether Inductor may measure choices in the compilation that is going on."""
    return bool(config.max_autotune)


def realized(x: Any) -> Any:
    """An IR node as a buffer (or a view of one) whose last dimension is dense."""
    from torch._inductor.ir import ExternKernel

    return ExternKernel.require_stride1(ExternKernel.realize_input(x))


def is_static(x: Any) -> bool:
    """Whether no size of an IR node is a symbol."""
    return all(isinstance(n, int) or n.is_number for n in x.get_size())


def hinted_sizes(x: Any) -> list[int]:
    """The sizes of an IR node, symbols at the values that tuning assumes."""
    from torch._inductor.virtualized import V

    sizevars: Any = V.graph.sizevars
    hint = sizevars.optimization_hint if hasattr(sizevars, "optimization_hint") else sizevars.size_hint  # 2.11
    return [int(hint(n)) for n in x.get_size()]


def contiguous_output(like: Any, size: list[Any]) -> Any:
    """The layout of a result on the device and of the dtype of an IR node."""
    from torch._inductor.ir import FixedLayout, FlexibleLayout

    return FixedLayout(like.get_device(), like.get_dtype(), size, FlexibleLayout.contiguous_strides(size))


def fastest(name: str, choices: list[Any], inputs: list[Any], layout: Any, examples: Mapping[int, Callable[[Any], torch.Tensor]]) -> Any:
    """The result of the choice that measures fastest. examples: makes the input of that number for the measurement."""
    from torch._inductor.select_algorithm import autotune_select_algorithm

    chosen = autotune_select_algorithm(name, choices, inputs, layout, input_gen_fns=dict(examples))
    return chosen[0] if isinstance(chosen, tuple) else chosen  # 2.11 returns the node alone


def weight_conversions() -> tuple[Any, Any, Any, Any, Any] | None:
    """transformers' renaming and fusing of weights on loading: ``(get_model_conversion_mapping, get_checkpoint_conversion_mapping,
    WeightConverter, WeightRenaming, rename_source_key)``; None where it has none. Read in 5.17 and 5.23."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return None
    return get_model_conversion_mapping, get_checkpoint_conversion_mapping, WeightConverter, WeightRenaming, rename_source_key
