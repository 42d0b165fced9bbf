"""`python -m specfx.bench.gpu` and `specfx bench kernels`: what can be held without a GPU, and that the checks are real ones."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from torch import Tensor

from specfx.bench import gpu, gpu_checks, gpu_times, kernels, paged_batches, random_models
from specfx.bench.gpu import Row, Settings
from specfx.bench.paged_batches import PLAIN_FORMS, Shape, make, plain_arguments, uniform
from specfx.engines.choose import Prepared
from specfx.engines.paged import PagedEngine
from specfx.errors import OptionError
from specfx.kernels import cpu_build
from specfx.kernels.tree_attention import tree_attention_, tree_attention_reference
from specfx.options import CommonOptions
from specfx.runtime.tree import DraftTree

CPU = torch.device("cpu")
ON_CPU = Settings("cpu", quick=True)


# --- sections -------------------------------------------------------------------------------------------------------------------


def good(settings: Settings) -> Iterator[Row]:
    yield Row("one", True, {"error": 0.25})
    yield Row("two", None, {"us": 12.0, "of copy": 0.5})


def bad(settings: Settings) -> Iterator[Row]:
    yield Row("three", False, {"error": 7.0})
    raise ZeroDivisionError("after the first row")


def test_a_section_that_raises_keeps_its_rows_and_its_traceback() -> None:
    parts: list[int] = []
    result = gpu.run_section(bad, ON_CPU, lambda part: parts.append(len(part["rows"])))
    assert [row["what"] for row in result["rows"]] == ["three"]
    assert result["error"].startswith("Traceback")
    assert "ZeroDivisionError: after the first row" in result["error"]
    assert parts == [1, 1]
    sections = {"good": gpu.run_section(good, ON_CPU, lambda part: None), "bad": result}
    assert gpu.failures(sections) == ["bad: three: error 7", "bad: ZeroDivisionError: after the first row"]
    text = gpu.summary(sections)
    assert text.splitlines()[2].split() == ["good", "1", "1", "0", "0", "yes"]
    assert text.splitlines()[3].split() == ["bad", "1", "0", "1", "0", "NO"]
    assert text.splitlines()[-1].split() == ["two", "12", "0.5"]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "specfx.bench.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=400)


def test_without_a_gpu_it_refuses_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path / "out.json")]) == 2
    assert "sees no CUDA device: run this on a machine with an NVIDIA GPU" in capsys.readouterr().err
    assert gpu.main(["--out", "x", "--sections", "kernels,nonsense"]) == 2
    assert "unknown nonsense; choose from kernels" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_all_sections_can_be_loaded() -> None:
    assert all(callable(gpu.function_of(name)) for name in gpu.SECTIONS)


@pytest.mark.parametrize(
    ("child", "timeout", "words"),
    [
        ("import os; print('about to die', flush=True); os.abort()", 60.0, ["ended with status -6", "about to die"]),
        ("import time; time.sleep(60)", 1.0, ["stopped after 1 s"]),
    ],
)
def test_a_section_that_crashes_or_hangs_is_recorded(child: str, timeout: float, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu._run
    monkeypatch.setattr(gpu, "_run", lambda command, timeout: real([sys.executable, "-c", child], timeout))
    result = gpu.run_apart("kernels", [], timeout)
    assert result["rows"] == []
    assert all(word in result["error"] for word in words)


def test_the_script_runs_its_kernel_checks_on_the_cpu_in_a_process_apart(tmp_path: Path, kernels: cpu_build.CpuKernels) -> None:
    out = tmp_path / "out.json"
    done = run_script("--device", "cpu", "--quick", "--sections", "kernels,attention", "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "all checks passed" in done.stdout
    written = json.loads(out.read_text())
    assert set(written["sections"]) == {"kernels"}  # timings are for GPUs
    rows = written["sections"]["kernels"]["rows"]
    assert len(rows) >= 30
    assert all(row["ok"] for row in rows)
    assert written["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert written["settings"] == {"device": "cpu", "quick": True, "model": None, "head": None}


def test_a_wrong_kernel_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make(Shape((37, 5), (8, 3), 2, 3, 16, 16, 16, dtype=torch.float32), CPU, moves=2)

    def off_by_one(**arguments: Any) -> Tensor:
        return tree_attention_(**arguments | {"lengths": arguments["lengths"] - 1})

    def without_moves(**arguments: Any) -> Tensor:
        return tree_attention_(**arguments | {"moves": torch.full((2, 1), -1)})

    def garbage(**arguments: Any) -> Tensor:
        return tree_attention_(**arguments) * float("nan")

    assert gpu_checks.compare_attention("", batch, tree_attention_).ok
    assert [gpu_checks.compare_attention("", batch, op).ok for op in (off_by_one, without_moves, garbage)] == [False] * 3
    monkeypatch.setattr(gpu_checks, "greedy_walk", lambda ids, *more: (torch.zeros(1), torch.zeros(1), torch.zeros(1)))
    monkeypatch.setattr(gpu_checks, "keyed_sample", lambda logits, keys, warp: logits.argmax(-1))
    assert all(row.ok is False for row in gpu_checks.walks(ON_CPU, CPU) if row.what.startswith("greedy_walk"))
    assert any(row.ok is False for row in gpu_checks.samples(ON_CPU, CPU))


def test_the_grid_covers_what_was_asked() -> None:
    shapes = gpu_checks.attention_shapes(Settings())
    assert {(s.dk, s.dv) for s in shapes} == {(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)}
    assert {s.dtype for s in shapes} == {torch.float16, torch.bfloat16, torch.float32}
    assert {s.share for s in shapes} == {1, 3, 4, 7, 8}
    assert {16, 64, 256} <= {s.page_size for s in shapes}
    assert any(s.window for s in shapes)
    assert any(s.softcap for s in shapes)
    assert any(s.sinks for s in shapes)
    assert any(max(s.rows) > 64 for s in shapes)
    assert any(len(set(s.rows)) > 1 for s in shapes)
    assert len(gpu_checks.attention_shapes(Settings(quick=True))) < len(shapes) / 4


def test_compiled_checks_compare_what_inductor_made(monkeypatch: pytest.MonkeyPatch, kernels: cpu_build.CpuKernels) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("specfx._compat.run_and_get_code", lambda call, **arguments: (call(**arguments), ["triton_tem_fused"]))
    rows = list(gpu_checks.compiled(ON_CPU))
    assert [(row.ok, row.figures["through"]) for row in rows] == [(True, "template")] * 4
    monkeypatch.setattr("specfx._compat.run_and_get_code", lambda call, **arguments: (call(**arguments), ["specfx.tree_attention_"]))
    monkeypatch.setattr(gpu_checks.inductor_attention, "register", lambda: None)
    rows = list(gpu_checks.compiled(ON_CPU))
    assert [(row.ok, row.figures["through"]) for row in rows] == [(True, "a call"), (False, "a call")] * 2


def test_replays_are_checked_step_by_step(kernels: cpu_build.CpuKernels) -> None:
    rows = list(gpu_checks.replays(ON_CPU))
    assert len(rows) == 12
    assert all(row.ok for row in rows)
    assert "CUDA" in rows[-1].figures["refusals"]  # on a CPU nothing can be recorded, and that is said


def test_outputs_that_differ_from_stock_fail(monkeypatch: pytest.MonkeyPatch, kernels: cpu_build.CpuKernels) -> None:
    monkeypatch.setattr(random_models, "tiny_llama", lambda device, dtype: tiny_model("llama", vocab_size=random_models.TINY_VOCABULARY))
    assert all(row.ok for row in gpu_checks.equality(ON_CPU))
    real = DraftTree.children
    monkeypatch.setattr(DraftTree, "children", lambda tree: {(row, t): child for (row, _), child in real(tree).items() for t in range(999)})
    wrong = [row for row in gpu_checks.equality(ON_CPU) if "suffix" in row.what]
    assert any(row.ok is False for row in wrong)


# --- forms of the attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        uniform(1, 20, 1, groups=1, share=1, dk=8, dv=8, page_size=4, dtype=torch.float32),
        uniform(3, 37, 8, groups=2, share=3, dk=16, dv=16, page_size=16, dtype=torch.float32),
        Shape((37, 0, 5), (64,) * 3, 2, 4, 8, 16, 16, dtype=torch.float32),
    ],
    ids=str,
)
def test_every_form_computes_the_same_attention(shape: Shape) -> None:
    batch = make(shape, CPU, free=0.0)
    expected = batch.with_own_pools().run(tree_attention_reference)
    for name, form in PLAIN_FORMS.items():
        own = batch.with_own_pools()
        torch.testing.assert_close(form(*plain_arguments(own)), expected, rtol=1e-5, atol=1e-5, msg=name)
        appended = batch.with_own_pools()
        appended.run(tree_attention_reference)
        assert all(a.equal(b) for a, b in zip(own.pools, appended.pools, strict=True))
    for name, call in gpu_times.attention_forms(batch.with_own_pools(), compiled=False).items():
        torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-5, msg=name)


def test_batches_have_trees_in_scattered_pages_and_poison_where_nothing_is() -> None:
    shape = Shape((9, 0), (5, 3), 1, 2, 4, 4, 4, dtype=torch.float32)
    batch = make(shape, CPU, moves=2)
    x = batch.tensors
    assert x["row_starts"].tolist() == [0, 5, 8]
    assert x["tree_mask"].tolist()[0] == 1
    assert all(word >> row & 1 for row, word in enumerate(x["tree_mask"].tolist()[:5]))
    table, k_pages = x["page_table"].tolist(), x["k_pages"].flatten(0, 1)
    own = [table[0][i // 4] * 4 + i % 4 for i in range(9)]
    assert k_pages[own].isfinite().all()
    assert k_pages.isnan().any(-1).any(-1).sum() == len(k_pages) - 9
    assert (x["moves"][:, 0] == -1).all()
    assert set(x["moves"][:, 1:].flatten().tolist()) <= set(own)
    assert shape.prefix_bytes == 9 * 8 * 4
    assert str(shape) == "context 9+0, rows 5+3, 2/1 heads of 4, pages of 4, float32"
    assert len(set(paged_batches.tree_masks(random.Random(0), 64))) == 64


# --- steps ----------------------------------------------------------------------------------------------------------------------


def test_a_step_is_timed_from_a_context_and_leaves_no_sequence(kernels: cpu_build.CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_times, "_REPEATS", 3)
    model = tiny_model("llama")
    engine = Prepared(model, CommonOptions(engine="graph", compile="off")).ladder(model).engine
    assert isinstance(engine, PagedEngine)
    figures = gpu_times.step_figures(engine, 2, 8, reading=1e-3, context=40)
    assert figures["ms"] is not None
    assert figures["of reading"] == pytest.approx(figures["ms"])
    assert figures["replay alone, ms"] is None
    assert engine.pool.pages_in_use == 0
    assert gpu_times.stock_step(model, context=40) > 0


def test_the_weights_of_a_step_are_all_but_an_embedding_that_is_looked_up_in() -> None:
    tied, apart = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama")
    sizes = [sum(p.numel() * 4 for p in model.parameters()) for model in (tied, apart)]
    assert gpu_times.weight_bytes(tied) == sizes[0]
    assert gpu_times.weight_bytes(apart) == sizes[1] - VOCAB * 32 * 4


# --- specfx bench kernels ---------------------------------------------------------------------------------------------------------


def bench_kernels(**options: Any) -> int:
    defaults: dict[str, Any] = {"batches": "1,2", "contexts": "20", "rows": "1,8", "heads": "4/2x16", "dtype": "float32", "repeats": 2}
    return kernels.run(**defaults | {"threads": 1, "json": None} | options)


def test_kernels_are_timed_in_turn_beside_plain_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu_build.load()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    out = tmp_path / "out.json"
    code = bench_kernels(json=str(out))
    written = json.loads(out.read_text())
    assert [m["shape"].split(", ")[:2] for m in written["shapes"]][:2] == [
        ["context 20x1", "rows 1x1"],
        ["context 20x1", "rows 8x1"],
    ]
    for m in written["shapes"]:
        assert set(m["medians"]) == {"specfx", *PLAIN_FORMS}
        assert all(len(taken) == 2 for taken in m["seconds"].values())
        assert max(m["errors"].values()) < 1e-5
    assert code == int(any(min(m["over_specfx"].values()) < 1 for m in written["shapes"]))
    assert "best plain over specfx" in capsys.readouterr().out


def test_a_form_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_build.load()
    monkeypatch.setattr(kernels, "compiled_forms", lambda: {"wrong": lambda q, *more: torch.zeros_like(q)})
    with pytest.raises(OptionError, match=r"'wrong': .* away from the reference"):
        bench_kernels()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": "65"}, "at most 64 rows"),
        ({"contexts": "1k"}, "contexts='1k': must be ints"),
        ({"heads": "4/3x16"}, "heads='4/3x16': must be query heads"),
        ({"heads": "4"}, "heads='4': must be query heads"),
    ],
)
def test_wrong_grids_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        bench_kernels(**options)
