"""Every private torch API that specfx uses, each with the versions it was read in (torch 2.11 to 2.13)."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.custom_graph_pass import CustomGraphPass

import specfx

_fresh = itertools.count()


def new_fake_mode() -> torch._subclasses.FakeTensorMode:
    """A fake mode with a shape environment of its own, as `torch.export` makes one."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def describe_symbol(environment: Any, symbol: Any) -> tuple[int, int | None, int | None]:
    """The value that is assumed of a backed symbol, and the ends of its range, None for none (`backed_var_to_val`, `var_to_range`)."""
    ends = environment.var_to_range[symbol]
    lower, upper = (int(end) if end.is_Integer else None for end in (ends.lower, ends.upper))
    return int(environment.backed_var_to_val[symbol]), lower, upper


def size_of(mode: torch._subclasses.FakeTensorMode, expression: Any, hint: int) -> int | torch.SymInt:
    """A size that is an expression over symbols of `mode` (`create_symintnode`)."""
    environment = mode.shape_env
    assert environment is not None
    size: int | torch.SymInt = environment.create_symintnode(expression, hint=hint)
    return size


def new_dynamic_size(
    mode: torch._subclasses.FakeTensorMode, hint: int = 5, lower: int | None = None, upper: int | None = None
) -> torch.SymInt:
    """A new backed symbolic size in `mode`'s shape environment (`ShapeEnv.create_symbol`, read in 2.13). lower, upper: its range, where
    it is another than torch gives to sizes."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    environment = mode.shape_env
    assert environment is not None
    source = ConstantSource(f"specfx_size_{next(_fresh)}")
    symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size = environment.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    if lower is not None:
        from torch.utils._sympy.numbers import int_oo
        from torch.utils._sympy.value_ranges import ValueRanges

        environment.var_to_range[symbol] = ValueRanges(lower, int_oo if upper is None else upper)
    return size


def lazy_graph_module(root: torch.nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A graph module that makes its Python code when it is first called or looked at (`_LazyGraphModule`)."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


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


@functools.cache
def hold_device_guard() -> None:
    """Keep torch from crashing where it was built for CUDA and there is no GPU: the first fake mode sets a device guard that belongs to
    its thread, and once that thread has ended the next one crashes (`_ensureCUDADeviceGuardSet`; seen in 2.11, its code is the same in
    2.13). So a thread that never ends sets it."""
    if torch.version.cuda is None or torch.cuda.is_available() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        return
    done = threading.Event()

    def stay() -> None:
        torch._C._ensureCUDADeviceGuardSet()
        done.set()
        threading.Event().wait()

    threading.Thread(target=stay, name="specfx-device-guard", daemon=True).start()
    done.wait()


def forward_hooks(module: torch.nn.Module) -> list[Any]:
    """All that runs before or behind a module's `forward` (``_forward_hooks``, ``_forward_pre_hooks``)."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def remove_forward_hooks(module: torch.nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Remove the unwanted ones of `forward_hooks`."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if unwanted(hook)]:
            del hooks[key]


def has_global_forward_hooks() -> bool:
    """Whether anything runs before or behind the `forward` of every module (`register_module_forward_hook` and its like)."""
    from torch.nn.modules import module

    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def triton_version() -> str:
    """Of the Triton that Inductor uses, empty without one."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def inductor_settings() -> str:
    """All of Inductor's settings that its own cache key holds, as they are now (`save_config_portable`)."""
    return str(sorted(config.save_config_portable().items(), key=str))


def trust_cpu_flags() -> None:
    """From now on Inductor takes the vector instructions that the CPU says it has, without most of the test programs by which it finds out
    whether compiler and loader agree (six seconds; `VecISA.check_build`). For a process that only compiles, and whose compiler has just
    built kernels with these instructions for this CPU; AMX for fp16, which those don't have, is still tried."""
    from torch._inductor.cpu_vec_isa import VecAMX, VecISA

    tried = VecISA.check_build

    def check_build(self: Any, code: str) -> bool:
        return code != VecAMX._amx_fp16_code or tried(self, code)

    VecISA.check_build = check_build  # type: ignore[method-assign]


def precompile_cpp_header() -> None:
    """Have the header of Inductor's C++ kernels compiled, which the first of them would wait for (`CppCodeCache.load_async`)."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    CppPythonBindingsCodeCache.load_pybinding_async([], 'extern "C" void kernel() {}')  # itself compiled only when it is called


def sources_hash() -> str:
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
        return sources_hash()


class Artifact:
    """A graph that Inductor compiled, over the weights of one module: called with the graph's inputs."""

    def __init__(self, compiled: Any, module: fx.GraphModule) -> None:
        from specfx.passes.framework import attribute

        self.compiled = compiled
        self._held = [attribute(module, name) for name in _weights(module)]

    def __call__(self, *inputs: Any) -> Any:
        return self.compiled([*self._held, *inputs])

    def to_bytes(self) -> bytes:
        """For `load_artifact`, as Inductor's own cache keeps it (`FxGraphCache._save_graph`)."""
        kept = copy.copy(self.compiled)
        kept.prepare_for_serialization()
        kept._fx_graph_cache_debug_lines = []
        libraries = _libraries(self.compiled.current_callable)
        return pickle.dumps((kept, libraries, pick_vec_isa() if libraries else None))


def load_artifact(data: bytes, module: fx.GraphModule) -> Artifact:
    """What `Artifact.to_bytes` made, over the weights of a `module` with the same graph (`FxGraphCache.cache_hit_post_compile`)."""
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.output_code import CompiledFxGraphConstants

    _prepare_lowerings(n.meta["val"] for n in module.graph.find_nodes(op="placeholder"))
    compiled, libraries, instructions = pickle.loads(data)
    _put_libraries(libraries)
    constants = CompiledFxGraphConstants()
    with _without_compiler(instructions):
        compiled, _ = FxGraphCache.cache_hit_post_compile(compiled, {}, constants)
    if compiled is None:
        raise OSError("Inductor's cache folder can't be written")
    compiled.post_compile([], constants, compiled.fx_kwargs)
    return Artifact(compiled, module)


def _libraries(function: Any) -> dict[str, bytes]:
    """The C++ libraries that generated code calls, by their paths below Inductor's cache folder."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    root = Path(cache_dir())
    modules = (getattr(value, "__self__", None) for value in getattr(function, "__globals__", {}).values())
    files = {Path(file) for module in modules if isinstance(file := getattr(module, "__file__", None), str)}
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(files) if f.suffix == ".so" and f.is_relative_to(root)}


@contextlib.contextmanager
def _without_compiler(instructions: Any) -> Iterator[None]:
    """A block in which Inductor finds C++ libraries by the names that it gave them, without the test programs by which it finds out what
    vector instructions the CPU has (a second or two; they ran when the artifact was made, on a CPU with the same features) and without
    preparing headers. instructions: what `pick_vec_isa` found then; None if there are no libraries."""
    if instructions is None:
        yield
        return
    chosen = mock.patch("torch._inductor.codecache.pick_vec_isa", return_value=instructions)
    with chosen, mock.patch("torch._inductor.codecache._precompile_header", return_value=None):
        yield


def _put_libraries(libraries: Mapping[str, bytes]) -> None:
    """Put the libraries where Inductor looks for them, unless they are there."""
    from torch._inductor.codecache import write_atomic
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name, content in libraries.items():
        path = Path(cache_dir()) / name
        if not path.exists():
            write_atomic(str(path), content, make_dirs=True)


def _weights(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The fake values of the tensors that a module's graph reads as attributes."""
    return {str(n.target): n.meta["val"] for n in module.graph.find_nodes(op="get_attr") if isinstance(n.meta.get("val"), torch.Tensor)}


def _prepare_lowerings(inputs: Iterable[Any]) -> None:
    """For inputs on a GPU: Inductor lowers our ops by templates there, and its code finds them by name."""
    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs):
        from specfx.kernels import inductor_attention

        inductor_attention.register()


def inductor_compile(module: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]) -> Artifact:
    """Lower a graph of functional ATen ops and ops of specfx: decomposed by `make_fx`, then `compile_fx_inner` (read in 2.13).

    AOTAutograd has nothing to do here (no gradients, no aliases, and the only inputs that change are those of ops that say so), would
    take a third of the time, and can't make ops that write into their inputs functional within a region.
    """
    _prepare_lowerings(example_inputs)
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner  # a second to import: not before it is needed
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    weights = _weights(module)
    fakes = [*weights.values(), *example_inputs]
    mode = fakes[-1].fake_mode
    lifted = _with_weights_as_inputs(module, tuple(weights))
    patched = config.patch({"post_grad_custom_post_pass": _SourcesKey(), **options})
    with torch.no_grad(), patched, tracing(TracingContext(mode)):  # its cache keeps a region one graph, whatever it is called on
        with mode, symbolic_shapes():
            traced = make_fx(lifted, decomposition_table=select_decomp_table())(*fakes)
        with V.set_fake_mode(mode):
            return Artifact(compile_fx_inner(traced, fakes), module)


def _with_weights_as_inputs(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A copy in which these attributes are the first placeholders."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    weights = {name: graph.placeholder(f"weight_{i}") for i, name in enumerate(names)}
    for node in module.graph.nodes:
        lifted = node.op == "get_attr" and node.target in weights
        new[node] = weights[str(node.target)] if lifted else graph.node_copy(node, new.__getitem__)
    return lazy_graph_module(module, graph)


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
