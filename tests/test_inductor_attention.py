"""The Inductor lowering of `specfx::tree_attention_`, without a GPU: Inductor makes code for fake tensors on a device that is described
to it, nothing is measured, and what it makes is compiled to a cubin and run under Triton's interpreter."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import TREE, Shape, causal_run, make_batch, mask_words, tree_of
from torch import Tensor, fx
from torch._inductor import config, scheduler
from torch._inductor.codecache import PyCodeCache
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.select_algorithm import AlgorithmSelectorCache, ExternKernelCaller, TritonTemplateCaller
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton_tools import SHARED_MEMORY, Launch, assert_compiles, compile_launch, compiled, no_interpreter

from specfx import _compat
from specfx.kernels import inductor_attention, triton_attend
from specfx.kernels.inductor_attention import EXAMPLES, example, source, tried
from specfx.kernels.tree_attention import tree_attention_, tree_attention_reference
from specfx.kernels.triton_config import candidates, default_config

triton = pytest.importorskip("triton")
pytestmark = compiled


@dataclass
class Gpu:
    """A GPU that isn't there. offered: what there was to choose from, by the last lowering. made: the inputs to measure with, by number.
    prefer: whether a choice is the one to take."""

    capability: int
    offered: list[Any]
    made: dict[int, Callable[[Any], Tensor]]
    prefer: Callable[[Any], bool]

    def code(
        self, shape: Shape, rows: int, sequences: int, mask: bool = True, device: str = "cuda", symbolic: bool = False, fused: bool = False
    ) -> str:
        """What Inductor makes of the op and a relu behind it, over 64 pages a sequence. fused: q, k and v are parts of one tensor."""
        mode = FakeTensorMode(shape_env=ShapeEnv())
        with mode:
            new = functools.partial(torch.empty, device=device)
            ints = functools.partial(new, dtype=torch.int32)
            tensors: list[Any] = [
                *(new(rows, heads, width, dtype=shape.dtype) for heads, width in self.rows_of(shape)),
                new(rows, dtype=torch.int64) if mask else None,
                *(ints(sequences, 64), ints(sequences), ints(sequences + 1), new(2, rows, dtype=torch.int64)),
                *(new(100, shape.page_size, shape.groups, width, dtype=shape.dtype) for width in (shape.dk, shape.dv)),
                new(shape.heads, dtype=shape.dtype) if shape.sinks else None,
            ]
            if symbolic:
                size = _compat.new_dynamic_size(mode, rows)
                for at, own in enumerate(tensors[:4]):
                    tensors[at] = new((size, *own.shape[1:]), dtype=own.dtype)
            if fused:
                tensors[:3] = [new(rows, shape.heads + 2 * shape.groups, shape.dk, dtype=shape.dtype)]
        graph = fx.Graph()
        *nodes, sinks = (None if x is None else graph.placeholder(f"x{at}") for at, x in enumerate(tensors))
        if fused:
            ends = [0, shape.heads, shape.heads + shape.groups, shape.heads + 2 * shape.groups]
            nodes[:1] = [graph.call_function(torch.ops.aten.slice.Tensor, (nodes[0], 1, a, b)) for a, b in itertools.pairwise(ends)]
        call = graph.call_function(tree_attention_, (*nodes, 0.7 * shape.dk**-0.5, shape.window, shape.softcap, sinks, shape.skip))
        relu = graph.call_function(torch.ops.aten.relu.default, (call,))
        graph.output((relu,))
        inputs = [x for x in tensors if x is not None]
        module = fx.GraphModule({}, graph)
        with mode:
            for node, x in zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True):
                node.meta["val"] = x
            call.meta["val"] = relu.meta["val"] = new(inputs[0].shape[0], shape.heads, shape.dv, dtype=shape.dtype)
        lowering = GraphLowering(module, example_inputs=inputs, shape_env=mode.shape_env, is_inference=True)
        with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            return lowering.codegen()[0].value

    @staticmethod
    def rows_of(shape: Shape) -> list[tuple[int, int]]:
        return [(shape.heads, shape.dk), (shape.groups, shape.dk), (shape.groups, shape.dv)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    from triton.backends.compiler import GPUTarget

    gpu = Gpu(90, [], {}, lambda choice: isinstance(choice, TritonTemplateCaller))

    def described(cls: type, device: torch.device) -> DeviceProperties:
        return DeviceProperties(
            "cuda", 0, 132, gpu.capability, gpu.capability // 10, 65536, max_threads_per_multi_processor=2048, warp_size=32
        )

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(
            major=gpu.capability // 10, minor=0, multi_processor_count=132, shared_memory_per_block_optin=SHARED_MEMORY[gpu.capability]
        )

    def measured(
        self: Any, name: str, inputs: list[Any], layout: Any, made: dict[int, Any], key: str, choices: list[Any], *more: Any, **named: Any
    ) -> dict[Any, float]:
        gpu.offered, gpu.made = choices, made
        return {choice: float(not gpu.prefer(choice)) for choice in choices}

    monkeypatch.setattr(DeviceProperties, "create", classmethod(described))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(scheduler, "has_triton", lambda *more: True)
    monkeypatch.setattr(AlgorithmSelectorCache, "do_autotuning", measured)
    monkeypatch.setattr(AlgorithmSelectorCache, "make_precompile_fn", lambda *more, **named: None)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", gpu.capability, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    inductor_attention.register()
    inductor_attention.register()
    with config.patch(max_autotune=True, compile_threads=1):
        yield gpu
    triton.runtime.driver._active = before


LLAMA = Shape(8, 4, 128, 128, 64, dtype=torch.bfloat16)
APPEND, WHOLE = "torch.ops.specfx.tree_append_.default(", "torch.ops.specfx.tree_attention_.default("
PLAIN = "extern_kernels.specfx_tree_attend("


ON_CPU = SimpleNamespace(get_device=lambda: torch.device("cpu"))
"""Stands for an IR node."""


def kernel_of(code: str) -> str:
    """The source of the one Triton kernel in Inductor's code."""
    (kernel,) = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL)
    return str(kernel)


def launch_of(kernel: str, dtype: torch.dtype) -> Launch:
    module = PyCodeCache.load(kernel)
    (tuner,) = (x for name, x in vars(module).items() if name.startswith("triton_tem"))
    types = {"PAGE_TABLE": torch.int32, "LENGTHS": torch.int32, "ROW_STARTS": torch.int32, "TREE_MASK": torch.int64}
    arguments: dict[str, Any] = {p.name: torch.empty(1, dtype=types.get(p.name[4:], dtype), device="meta") for p in tuner.fn.params}
    options = {name: int(re.search(rf"{name}=(\d+)", kernel).group(1)) for name in ("num_warps", "num_stages")}
    return tuner.fn, arguments | options


# --- what the op becomes --------------------------------------------------------------------------------------------------------


def test_the_op_becomes_an_append_and_a_template_with_what_follows_in_its_epilogue(gpu: Gpu) -> None:
    code = gpu.code(LLAMA, 16, 1)
    assert WHOLE not in code
    assert code.index(APPEND) < code.index("triton_tem_fused_0.run(")
    assert "triton_helpers.maximum" in kernel_of(code)
    assert code.count(".run(") == 1


def test_the_plain_kernels_are_choices_too(gpu: Gpu) -> None:
    gpu.prefer = lambda choice: isinstance(choice, ExternKernelCaller) and choice.kwargs["config"][2] == 8
    code = gpu.code(LLAMA, 16, 1)
    call = code[code.index(PLAIN) :].splitlines()[0]
    assert code.index(APPEND) < code.index(PLAIN)
    assert re.search(r"config=\(\d+, \d+, 8, \d+, \d+\)", call), call
    assert "has_mask=True" in call
    kinds = [type(choice) for choice in gpu.offered]
    assert kinds.count(TritonTemplateCaller) >= 4
    assert kinds.count(ExternKernelCaller) > kinds.count(TritonTemplateCaller)
    assert len(kinds) < 50  # each takes seconds to compile
    cuts = {choice.kwargs["config"] for choice in gpu.offered if isinstance(choice, ExternKernelCaller)}
    made = {at: make(ON_CPU).shape for at, make in gpu.made.items()}
    assert made == {3: (1, 64), 4: (1,), 5: (2,), 8: (16,)}  # as the template's inputs are numbered
    assert len(cuts) == kinds.count(ExternKernelCaller)
    assert {len({cut[at] for cut in cuts}) > 1 for at in range(5)} == {True}, "blocks, splits, warps and stages are all tried"


@pytest.mark.parametrize("case", ["not tuned", "rows unknown", "on the CPU"])
def test_elsewhere_the_op_stays_one_call(case: str, gpu: Gpu) -> None:
    with config.patch(max_autotune=case != "not tuned", cpp_wrapper=False):
        code = gpu.code(LLAMA, 16, 1, symbolic=case == "rows unknown", device="cpu" if case == "on the CPU" else "cuda")
    assert WHOLE in code
    assert APPEND not in code
    assert not gpu.offered


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_lowering_is_registered_where_a_graph_for_cuda_is_compiled(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(inductor_attention, "register", lambda: calls.append("registered"))
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", lambda module, examples: calls.append("compiled"))
    with FakeTensorMode(shape_env=ShapeEnv()):
        example = torch.empty(3, device=device)
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    _compat.inductor_compile(fx.GraphModule({}, graph), [example], {})
    assert calls == (["registered"] if device == "cuda" else []) + ["compiled"]


def test_every_size_has_a_few_configurations(gpu: Gpu) -> None:
    for (dk, dv), (rows, sequences), dtype in itertools.product(
        [(64, 64), (80, 80), (192, 128), (256, 256)], [(1, 1), (16, 1), (64, 8), (2048, 1), (512, 64)], [torch.bfloat16, torch.float32]
    ):
        configs = tried(torch.device("cuda"), (rows, sequences, 8, 4), dk, dv, dtype, 128, 64)
        assert 2 <= len(configs) <= 40
        default = default_config(max(dk, dv), dtype, rows, sequences, 64, groups=8, share=4, pages=128, capability=90)
        assert configs[0] == default
        whole = {dataclasses.replace(c, SPLITS=1) for c in configs}
        assert whole - {dataclasses.replace(default, SPLITS=1)} <= set(candidates(dk, dv, dtype, SHARED_MEMORY[90]))
        assert (max(c.SPLITS for c in configs) > 1) == (rows <= 64)


@pytest.mark.parametrize(
    ("rows", "sequences", "width", "pages"), [(16, 1, 64, 100), (7, 3, 2, 5), (70, 1, 3, 3), (64, 1, 2, 9), (4, 4, 8, 20)]
)
def test_what_is_measured_with_is_valid(rows: int, sequences: int, width: int, pages: int) -> None:
    table, lengths, starts, mask = (example(ON_CPU, name, rows, sequences, width, pages, 16) for name in EXAMPLES)
    assert (table.shape, table.dtype) == ((sequences, width), torch.int32)
    assert ((table >= 0) & (table < pages)).all()
    assert len(table.unique()) == min(pages, table.numel())
    counts = starts.diff()
    assert (starts[0], starts[-1], starts.dtype, lengths.dtype) == (0, rows, torch.int32, torch.int32)
    assert counts.min() >= rows // sequences
    assert ((lengths >= 0) & (lengths + counts <= width * 16)).all() or rows > width * 16
    if rows <= 64:
        assert mask.tolist() == [word for n in counts.tolist() for word in mask_words(causal_run(n))]


# --- the kernel that is made ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "shape", "rows", "at"),
    [
        (80, LLAMA, 16, 1),
        (80, Shape(4, 7, 64, 64, 16, 512, 30.0, True, torch.float16), 8, 2),
        (90, LLAMA, 16, 0),
        (90, LLAMA, 16, 2),
        (90, Shape(8, 4, 256, 256, 64, dtype=torch.bfloat16), 1, 1),
        (90, Shape(8, 4, 80, 80, 64, 512, 30.0, True, torch.float32), 4, 0),
        (90, Shape(8, 4, 80, 80, 64, 512, 30.0, True, torch.float32), 4, 1),
    ],
    ids=str,
)
def test_templates_compile_within_the_limits_of_the_card(capability: int, shape: Shape, rows: int, at: int, gpu: Gpu) -> None:
    gpu.capability = capability
    gpu.prefer = lambda choice: choice is templates(gpu)[at]
    assert_compiles([launch_of(kernel_of(gpu.code(shape, rows, 1)), shape.dtype)], capability)


def templates(gpu: Gpu) -> list[Any]:
    return [choice for choice in gpu.offered if isinstance(choice, TritonTemplateCaller)]


@pytest.mark.parametrize("rows", [1, 16, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_choice_of_the_template_compiles(capability: int, dims: tuple[int, int], dtype: torch.dtype, rows: int, gpu: Gpu) -> None:
    """All that may be measured for heads, dtypes and sizes, some 370, within shared memory; the first, which is cut as the default
    configuration is, spills no register. (Measuring disposes of others that do.)"""
    gpu.capability = capability
    shape = Shape(8, 4, *dims, 64, dtype=dtype)
    for at in itertools.count():
        gpu.prefer = lambda choice, at=at: choice is templates(gpu)[at]
        made = compile_launch(*launch_of(kernel_of(gpu.code(shape, rows, 1)), dtype), capability)
        assert made.shared <= SHARED_MEMORY[capability]
        if at == 0:
            default = default_config(max(dims), dtype, rows, 1, 64, groups=8, share=4, pages=64, capability=capability)
            cut = dataclasses.asdict(default).items() - {("SPLITS", default.SPLITS)}
            assert all(f"{name}={value}" in templates(gpu)[0].description for name, value in cut)
            assert made.spills == 0
        if at + 1 == len(templates(gpu)):
            break


RUN = """
import pickle, re, sys, torch
from pathlib import Path
for path in sys.argv[1:]:
    inputs, expected, grid = pickle.loads(Path(path).with_suffix(".pkl").read_bytes())
    text = Path(path).read_text()
    plain = Path(path).with_suffix(".plain.py")
    plain.write_text(re.sub(r"@triton_heuristics.template\\\\(.*?\\\\n\\\\)\\\\n(?=@triton.jit)", "", text, flags=re.DOTALL))
    space = {}
    exec(compile(plain.read_text(), plain, "exec"), space)
    (kernel,) = (x for name, x in space.items() if name.startswith("triton_tem"))
    out = torch.full_like(expected, float("nan"))
    kernel[grid](*(inputs.get(name[4:], out) for name in kernel.arg_names))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    print("agrees")
"""


@no_interpreter
def test_templates_agree_with_the_reference_under_the_interpreter(gpu: Gpu, tmp_path: Path) -> None:
    """float32, since the interpreter has no products of bfloat16. The relu in the epilogue is checked along."""
    shapes = [
        Shape(2, 3, 16, 16, 16),
        Shape(1, 4, 8, 16, 16, 9, 1.5, True),
        Shape(2, 1, 20, 20, 48, 0, 0.0, True),
        Shape(1, 2, 16, 16, 16, 40),
    ]
    files = []
    for at, shape in enumerate(dataclasses.replace(shape, dtype=torch.float32) for shape in shapes):
        mask, fused = at != 3, at == 0
        trees = [TREE, tree_of(33), [-1]] if mask else [causal_run(n) for n in (70, 3, 1)]
        batch = make_batch(shape, [70, 0, 33], trees, at, mask)
        code = gpu.code(shape, batch.arguments["q"].shape[0], 3, mask, fused=fused)
        grid = re.search(r"triton_tem_fused_0\.run\(.*, (\d+), (\d+), (\d+), stream", code)
        expected = batch.run(tree_attention_reference)[0].relu()
        batch.arguments["page_table"] = torch.nn.functional.pad(table := batch.arguments["page_table"], (0, 64 - table.shape[1]))
        inputs = {name.upper(): x for name, x in (batch.arguments | {"sinks": batch.constants["sinks"]}).items()}
        if fused:  # the one argument bears one of the names
            inputs |= dict.fromkeys("QKV", torch.cat([inputs[name] for name in "QKV"], 1))
        files.append(tmp_path / f"kernel{at}.py")
        files[-1].write_text(kernel_of(code))
        files[-1].with_suffix(".pkl").write_bytes(pickle.dumps((inputs, expected, tuple(map(int, grid.groups())))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = tmp_path / "run.py"
    script.write_text(RUN.replace("\\\\", "\\"))
    done = subprocess.run([sys.executable, script, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["agrees"] * len(files)


def test_the_templates_text_changes_with_the_functions_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor knows compiled kernels and measured choices by that text."""
    before = source(True, False)
    assert source(True, False) == before
    read = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: read(module) + ("# changed" if module is triton_attend else ""))
    assert source(True, False) != before
