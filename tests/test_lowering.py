"""What Inductor makes of a rewritten graph: no copy of the cache, one artifact for all shapes, and no stale one."""

from __future__ import annotations

import ast
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import PreTrainedModel

import specfx
from specfx import _compat
from specfx.capture import capture
from specfx.engines.base import Rows
from specfx.engines.choose import Prepared
from specfx.engines.compiled import CompiledEngine, lower
from specfx.engines.paged import PagedEngine, graph_engine
from specfx.errors import Reason
from specfx.kernels import cpu_build
from specfx.kernels.tree_attention import tree_attention_
from specfx.options import CommonOptions
from specfx.passes.framework import PassContext, calls, copy_module, run_passes
from specfx.passes.pipeline import REWRITE
from specfx.runtime.tree import DraftTree

CPU = torch.device("cpu")
CONTEXT = PassContext(page_size=16)


@pytest.fixture(scope="module", autouse=True)
def _fresh_inductor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An Inductor cache of this module's own, and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def graph(model: PreTrainedModel) -> fx.GraphModule:
    result = run_passes(capture(model), REWRITE, CONTEXT)
    assert result.failed is None
    return result.module


@pytest.fixture(scope="module")
def compiled(graph: fx.GraphModule, kernels: cpu_build.CpuKernels) -> tuple[CompiledEngine, str]:
    """The compiled engine in float32, and its wrapper code."""
    engine, (code,) = run_and_get_code(lambda: CompiledEngine(lower(graph, CONTEXT, ()), "auto", CPU))
    return engine, code


# --- the generated code ---------------------------------------------------------------------------------------------------------


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name)


def attention_calls(code: str) -> list[ast.Call]:
    return [n for n in ast.walk(ast.parse(code)) if _is_call(n, "tree_attention_.default")]


def functions(code: str) -> dict[str, ast.FunctionDef]:
    """The wrapper's `call`, and the regions and branches that it calls."""
    found = {n.name: n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef)}
    return {name: f for name, f in found.items() if name == "call" or name.startswith(("repeated_subgraph", "true_graph", "false_graph"))}


def _statements(function: ast.FunctionDef) -> list[ast.stmt]:
    compound = (ast.FunctionDef, ast.With, ast.If, ast.For, ast.Try)
    return [n for n in ast.walk(function) if isinstance(n, ast.stmt) and not isinstance(n, compound)]


def statements(code: str) -> list[ast.stmt]:
    """What `call` and the regions do, statement by statement."""
    return [s for function in functions(code).values() for s in _statements(function)]


def region_calls(code: str) -> list[tuple[str, list[str]]]:
    """(region, arguments) of each call of one."""
    lists = (s for s in _statements(functions(code)["call"]) if isinstance(s, ast.Assign) and isinstance(s.value, ast.List))
    named = ((ast.unparse(s.targets[0]).removesuffix("_args"), [ast.unparse(e) for e in s.value.elts]) for s in lists)  # type: ignore[attr-defined]
    return [(name, arguments) for name, arguments in named if name in functions(code)]


def _parameters(function: ast.FunctionDef) -> list[str]:
    (unpacking,) = (s for s in _statements(function) if isinstance(s, ast.Assign) and ast.unparse(s.value) == "args")
    return [ast.unparse(e) for e in unpacking.targets[0].elts]  # type: ignore[attr-defined]


def page_counts(code: str, pools: set[str]) -> set[str]:
    """The wrapper's names for the number of pages, which only pools have."""
    names: set[str] = set()
    for s in statements(code):
        if isinstance(s, ast.Assign) and ast.unparse(s.value) in {f"{pool}_size[0]" for pool in pools}:
            names |= _names(s.targets[0])
        if isinstance(s, ast.Expr) and _is_call(s.value, "assert_size_stride") and _names(s.value.args[0]) & pools:
            names |= _names(s.value.args[1])
    return names


def pool_traffic(code: str, pools: set[str]) -> list[str]:
    """Statements that touch a pool (an input's name), or a size that only a pool has, other than to pass the pool to the attention op:
    allocations, copies, views, kernels that read or write it."""
    sizes = page_counts(code, pools)
    assert sizes, "the number of pages is not dynamic"
    traffic = []
    for s in statements(code):
        text = ast.unparse(s)
        unpacks = isinstance(s, ast.Assign) and (text.endswith(" = args") or text.endswith("_1.size()") or "_size[" in text)
        hands_on = isinstance(s, ast.Assign) and isinstance(s.value, ast.List) and text.partition("_args = ")[0] in functions(code)
        checks = isinstance(s, ast.Delete) or (isinstance(s, ast.Expr) and _is_call(s.value, "assert_size_stride"))
        attends = isinstance(s, (ast.Assign, ast.Expr)) and _is_call(s.value, "tree_attention_.default")
        if not (unpacks or hands_on or checks or attends) and _names(s) & (pools | sizes):
            traffic.append(text)
    return traffic


def pools_in(code: str) -> list[str]:
    """The pools that attention calls are given, as written: in `call` itself, in regions, and what `call` hands to regions for those."""
    pools = []
    for name, function in functions(code).items():
        calls_here = [n for n in ast.walk(function) if _is_call(n, "tree_attention_.default")]
        own = [ast.unparse(argument) for call in calls_here for argument in call.args[8:10]]  # type: ignore[attr-defined]
        pools += own
        for region, arguments in region_calls(code):
            if region == name:
                pools += [arguments[_parameters(function).index(pool)] for pool in own]
    return pools


def test_the_generated_code_makes_no_copy_of_the_cache(compiled: tuple[CompiledEngine, str]) -> None:
    """Both layers are calls of one region, each on inputs of the artifact as they are; nothing else touches them or is as large as they."""
    _, code = compiled
    assert len(attention_calls(code)) == 1
    assert [name for name, _ in region_calls(code)] == ["repeated_subgraph0"] * 2
    pools = pools_in(code)
    assert len([pool for pool in set(pools) if pool.startswith("arg")]) == 4
    assert all(pool.isidentifier() and "arg" in pool for pool in pools), pools
    assert pool_traffic(code, set(pools)) == []


def test_the_check_for_copies_finds_a_clone(graph: fx.GraphModule, compiled: tuple[CompiledEngine, str]) -> None:
    """A graph that also returns what a pool held before: the copy's allocation and its kernel are both found."""
    bad = copy_module(graph)
    pool = next(n for n in bad.graph.nodes if n.target == "k_pages_0")
    output = bad.graph.output_node()
    with bad.graph.inserting_before(calls(bad, tree_attention_)[0]):
        clone = bad.graph.call_function(torch.ops.aten.clone.default, (pool,))
    clone.meta["val"] = pool.meta["val"].clone()
    output.args = ((*output.args[0], clone),)
    bad.recompile()
    examples = [n.meta["val"] for n in bad.graph.nodes if n.op == "placeholder"]
    _, (code,) = run_and_get_code(lambda: _compat.inductor_compile(bad, examples, {}))
    traffic = pool_traffic(code, set(pools_in(code)))
    assert any("empty_strided_cpu" in line for line in traffic), traffic
    assert any("cpp_fused" in line for line in traffic), traffic


@pytest.mark.parametrize(
    "line",
    [
        "buf90 = empty_strided_cpu(({pages}, 16, 2, 8), (256, 16, 8, 1), torch.float32)",
        "buf90 = empty_strided_cpu((256*{pages}, ), (1, ), torch.float32)",
        "buf90.copy_({pool})",
        "cpp_fused_clone_9({pool}, buf90, 7)",
        "buf90 = torch.ops.aten.clone.default({pool})",
        "buf90 = reinterpret_tensor({pool}, (7, 4), (4, 1), 0)",
        "return (buf90, {pool}, )",
    ],
)
@pytest.mark.parametrize("at", [0, -1])
def test_the_check_for_copies_finds_any_use_of_a_pool_or_of_its_size(line: str, at: int, compiled: tuple[CompiledEngine, str]) -> None:
    _, code = compiled
    pool = pools_in(code)[at]
    (pages, *_) = page_counts(code, set(pools_in(code)))
    place = "tree_attention_.default(" if pool.startswith("repeated") else " = repeated_subgraph0("
    anchor = next(text for text in code.splitlines() if place in text)
    line = line.format(pool=pool, pages=pages)
    spoilt = code.replace(anchor, f"{anchor[: len(anchor) - len(anchor.lstrip())]}{line}\n{anchor}")
    assert pool_traffic(spoilt, set(pools_in(code))) == [ast.unparse(ast.parse(line))]


def test_pools_are_written_in_place(compiled: tuple[CompiledEngine, str]) -> None:
    engine, _ = compiled
    engine.add(0, 40)
    try:
        before = [(p.data_ptr(), p.clone()) for p in engine.pool.pools]
        engine.forward([Rows(0, range(20))])
        slots = engine.pool.page_table([0])[0].tolist()
        for (address, old), new in zip(before, engine.pool.pools, strict=True):
            assert new.data_ptr() == address
            assert not torch.equal(new[slots[0]], old[slots[0]])
            assert not torch.equal(new[slots[1], :4], old[slots[1], :4])
            assert torch.equal(new[slots[1], 4:], old[slots[1], 4:])
            assert torch.equal(new[slots[2]], old[slots[2]])
    finally:
        engine.remove(0)


# --- one artifact for all shapes ------------------------------------------------------------------------------------------------


def assert_engines_agree(ours: PagedEngine, theirs: PagedEngine, batch: list[Rows], tolerance: float) -> None:
    """Both engines forward `batch`; the largest relative error of a row of logits and of hidden states is below `tolerance`."""
    for a, b in zip(ours.forward(batch), theirs.forward(batch), strict=True):
        assert a.hidden is not None
        assert b.hidden is not None
        assert a.logits.shape == b.logits.shape
        assert a.hidden.shape == b.hidden.shape
        for x, y in ((a.logits, b.logits), (a.hidden, b.hidden)):
            error = ((x - y).float().norm(dim=-1) / y.float().norm(dim=-1)).max()
            assert error < tolerance
        if tolerance < 1e-3:
            assert a.choice == b.choice == a.logits.argmax(-1).tolist()


def tree(rng: random.Random, nodes: int) -> DraftTree:
    return DraftTree(tuple(rng.sample(range(VOCAB), nodes)), tuple(rng.randrange(-1, i) for i in range(nodes)), (1.0,) * nodes)


def exercise(ours: PagedEngine, theirs: PagedEngine, tolerance: float) -> None:
    """Rows 1, 5, 17, 63 and 70, one to three sequences in a forward, trees with moved rows, pools that grow on the way."""
    rng = random.Random(0)
    both = (ours, theirs)
    lengths = {0: 70, 1: 1, 2: 5}
    pages = set()
    for seq, length in lengths.items():
        for engine in both:
            engine.add(seq, 200 * (seq + 1))
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        assert_engines_agree(ours, theirs, [Rows(seq, prompt, last_only=seq == 0)], tolerance)
        for engine in both:
            engine.commit(seq, range(length))
        pages.add(ours.pool.pages)
    assert len(pages) == 3
    for seqs, nodes in (([0], 0), ([1, 0], 4), ([2, 0, 1], 16), ([1, 2], 62), ([0, 1, 2], 0), ([2], 4)):
        batch = [Rows(seq, [rng.randrange(VOCAB)], tree(rng, nodes)) for seq in seqs]
        assert_engines_agree(ours, theirs, batch, tolerance)
        for rows in batch:
            path, row = [], rng.randrange(nodes + 1)
            while row > 0:
                path.insert(0, row)
                row = rows.tree.parents[row - 1] + 1  # type: ignore[union-attr]
            for engine in both:
                engine.commit(rows.seq, [0, *path])
    for seq in lengths:
        for engine in both:
            engine.remove(seq)


def test_one_artifact_serves_all_shapes(
    graph: fx.GraphModule, compiled: tuple[CompiledEngine, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = compiled
    before = dict(counters["inductor"])
    monkeypatch.setattr(_compat, "inductor_compile", None)
    exercise(engine, graph_engine(graph, "auto", CPU), 1e-4)
    assert dict(counters["inductor"]) == before


def test_the_artifact_reads_the_models_own_weights(
    model: PreTrainedModel, graph: fx.GraphModule, compiled: tuple[CompiledEngine, str]
) -> None:
    """In float32 nothing is packed: a weight that changes in place is followed without anybody's doing."""
    engine, other = compiled[0], graph_engine(graph, "auto", CPU)
    batch = [Rows(0, [3, 1, 4, 1, 5])]
    for e in (engine, other):
        e.add(0, 16)
    before = engine.forward(batch)[0].logits.clone()
    weights = [model.lm_head.weight, model.model.layers[1].self_attn.k_proj.weight, model.model.layers[0].input_layernorm.weight]
    saved = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.5)
        assert_engines_agree(engine, other, batch, 1e-4)
        assert not torch.allclose(engine.forward(batch)[0].logits, before, rtol=0.1)
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, saved, strict=True):
                weight.copy_(old)
        engine.remove(0)


# --- the cache key --------------------------------------------------------------------------------------------------------------


def cache_events(module: fx.GraphModule) -> tuple[int, int]:
    """(misses, hits) of Inductor's graph cache when `module` is compiled again."""
    names = ("fxgraph_cache_miss", "fxgraph_cache_hit")
    before = [counters["inductor"][name] for name in names]
    lower(module, CONTEXT, ())
    misses, hits = (counters["inductor"][name] - n for name, n in zip(names, before, strict=True))
    return misses, hits


def test_changed_sources_are_not_served_by_an_old_artifact(graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "sources_hash", lambda: "of some sources")
    assert cache_events(graph) == (1, 0)
    assert cache_events(graph) == (0, 1)
    monkeypatch.setattr(_compat, "sources_hash", lambda: "of changed sources")
    assert cache_events(graph) == (1, 0)
    monkeypatch.setattr(_compat, "sources_hash", lambda: "of some sources")
    assert cache_events(graph) == (0, 1)


def test_the_hash_of_the_sources_covers_every_pass_and_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(specfx.__file__).parent.parent
    inside = Path(specfx.__file__).parent  # a wheel
    for name in ("passes", "kernels"):
        source = inside / name if (inside / name).is_dir() else root / name
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(specfx, "__path__", [str(tmp_path)])
    seen = {_compat.sources_hash()}
    files = [f for f in sorted(tmp_path.rglob("*")) if f.is_file()]
    assert {"tree_mask.py", "tree_attention.py", "ops.cpp", "triton_attend.py", "inductor_attention.py"} <= {f.name for f in files}
    for file in files:
        file.write_bytes(file.read_bytes() + b"\n")
        now = _compat.sources_hash()
        assert now not in seen, file.name
        seen.add(now)


# --- packed weights -------------------------------------------------------------------------------------------------------------


def test_packed_weights_are_used_and_follow_the_model(kernels: cpu_build.CpuKernels) -> None:
    """bfloat16, where weights are packed: every linear is a packed one, the output is the graph engine's within rounding, pools are not
    copied, and after an in-place change `Prepared.ladder` packs again."""
    if not kernels.packs:
        pytest.skip("this CPU has no kernel for packed linears")
    model = tiny_model("llama", initializer_range=0.2).bfloat16()
    options = CommonOptions(engine="compiled", compile="sync", page_size=16)
    prepared = Prepared(model, options)
    ladder, codes = run_and_get_code(lambda: prepared.ladder(model))
    assert not {"compiled engine", "pass pack_linears"} & {refusal.stage for refusal in [*prepared.refusals, *ladder.refusals]}
    engine = ladder.engine
    assert isinstance(engine, CompiledEngine)
    code = codes[-1]
    assert code.count("torch.ops.specfx.packed_linear.default(") == 4 + 1  # qkv, o, gate and up, down of the layers' region; the LM head
    assert len(region_calls(code)) == 2
    assert "extern_kernels.mm" not in code
    assert pool_traffic(code, set(pools_in(code))) == []
    assert prepared.module is not None
    graph = graph_engine(prepared.module, "auto", CPU)
    exercise(engine, graph, 0.1)

    batch = [Rows(0, [3, 1, 4, 1, 5])]
    for e in (engine, graph):
        e.add(0, 16)
    stale = engine.forward(batch)[0].logits.clone()
    assert prepared.is_current(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(-2)
        model.lm_head.weight.mul_(-1)
    assert torch.equal(engine.forward(batch)[0].logits, stale)  # packed weights are a copy
    assert prepared.is_current(model)
    assert prepared.ladder(model).engine is engine
    assert_engines_agree(engine, graph, batch, 0.1)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
    engine.refresh()
    assert_engines_agree(engine, graph, batch, 0.1)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert not prepared.is_current(model)  # other storage: to be prepared anew


# --- faults ---------------------------------------------------------------------------------------------------------------------


def test_when_inductor_fails_the_graph_engine_serves(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no C++ compiler to be found")

    monkeypatch.setattr(_compat, "inductor_compile", failing)
    prompt = torch.tensor([[5, 3, 5, 3, 5, 3, 5]])
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)
    specfx.speculate(model, method="suffix", compile="sync", page_size=16)
    try:
        report = specfx.explain(model)
        assert report.engine == "graph"
        (refusal,) = [r for r in report.refusals if r.stage == "compiled engine"]
        assert refusal.reason is Reason.LOWERING_FAILED
        assert "no C++ compiler to be found" in refusal.detail
        assert torch.equal(model.generate(prompt, max_new_tokens=24, do_sample=False), expected)
    finally:
        specfx.restore(model)
