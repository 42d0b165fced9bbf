"""What is kept on disk: names that change with everything that matters, files that are whole or absent, graphs that come back as they
were, and models that start from them with stock `generate`'s tokens."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import PreTrainedModel

import specfx
from specfx import _compat, cli
from specfx.api import engine_of
from specfx.artifacts import graphs, key, store
from specfx.cache import cache_dir
from specfx.capture import capture
from specfx.drafters.mtp import Drafting
from specfx.drafters.mtp_head import MtpHead
from specfx.errors import ArtifactError, Reason
from specfx.kernels import cpu_build
from specfx.options import CommonOptions
from specfx.passes.framework import PassContext, place_of, run_passes
from specfx.passes.pack_linears import packed
from specfx.passes.pipeline import REWRITE
from specfx.passes.printer import normal_form
from specfx.runtime.tree import TreeShape

OPTIONS = CommonOptions()
HERE = Path(__file__).parent
PROMPT = torch.arange(3, 15)[None]


def tiny(**settings: Any) -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2, **settings)


def generated(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(specfx's, stock's) greedy tokens."""
    asked = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
    return model.generate(PROMPT, **asked), type(model).generate(model, PROMPT, **asked)


def assert_serves(model: PreTrainedModel, engine: str) -> specfx.report.Report:
    ours, stock = generated(model)
    assert torch.equal(ours, stock)
    report = specfx.explain(model)
    assert (report.engine, dict(report.stock_calls)) == (engine, {}), str(report)
    return report


# --- keys -----------------------------------------------------------------------------------------------------------------------


def with_other_values(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def test_a_key_names_the_structure_and_not_the_values() -> None:
    model, other = tiny(), tiny()
    with_other_values(other)
    other.config._name_or_path = "elsewhere"
    other.generation_config.max_new_tokens = 7
    specfx.speculate(other, compile="off")
    assert key.graph_key(model, OPTIONS) == key.graph_key(other, OPTIONS) == key.graph_key(model, OPTIONS)


def other_constant(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def other_class(model: Any) -> None:
    class Other(type(model.model.norm)):  # type: ignore[misc]
        pass

    model.model.norm.__class__ = Other


def other_forward(model: Any) -> None:
    norm = model.model.norm
    norm.forward = lambda x: x * 2


def tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def one_more_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.zeros(model.lm_head.out_features))


def other_strides(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()


def other_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


def other_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def other_config(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


def other_dtype(model: Any) -> None:
    model.bfloat16()


CHANGES = (
    *(other_constant, other_class, other_forward, tied, one_more_bias, other_strides, other_buffer, other_activation, other_config),
    other_dtype,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_each_part_of_the_structure_changes_the_key(change: Callable[[Any], None]) -> None:
    model = tiny()
    before = key.graph_key(model, OPTIONS)
    change(model)
    assert key.graph_key(model, OPTIONS) != before


def test_options_versions_sources_and_the_machine_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    seen = [key.graph_key(model, o) for o in (OPTIONS, replace(OPTIONS, page_size=16), replace(OPTIONS, disable_passes=("tree_mask",)))]
    assert key.graph_key(model, replace(OPTIONS, num_speculative_tokens=3, compile="sync", disable_passes=("regions",))) == seen[0]
    head = MtpHead.from_target(model)
    shapes = [TreeShape(2, 1, 3), TreeShape(2, 2, 4)]
    seen += [key.graph_key(model, OPTIONS, Drafting(head, shape)) for shape in shapes]
    for target, name, value in (
        (_compat, "sources_hash", lambda: "others"),
        (_compat, "triton_version", lambda: "0.1"),
        (cpu_build, "cpu_flags", lambda: "a CPU"),
        (key.importlib.metadata, "version", lambda name: "0.0"),  # type: ignore[attr-defined]
        (key.platform, "python_version", lambda: "4.0"),  # type: ignore[attr-defined]
        (specfx, "__version__", "9.9"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, value)
            seen.append(key.graph_key(model, OPTIONS))
    assert len(set(seen)) == len(seen)


def test_threads_and_settings_of_the_compiler_change_the_key_of_the_lowered_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [
        key.lowered_key("g", OPTIONS),
        key.lowered_key("h", OPTIONS),
        key.lowered_key("g", replace(OPTIONS, disable_passes=("regions",))),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    seen.append(key.lowered_key("g", OPTIONS))
    torch.set_num_threads(threads)
    with torch._inductor.config.patch(epilogue_fusion=not torch._inductor.config.epilogue_fusion):
        seen.append(key.lowered_key("g", OPTIONS))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    seen.append(key.lowered_key("g", OPTIONS))
    assert len(set(seen)) == len(seen)


def test_another_process_finds_the_same_keys() -> None:
    names = ("llama", "gpt_oss", "gpt2", "gemma3", "deepseek_v3")
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from specfx.artifacts import key
        from specfx.options import CommonOptions
        from tiny import tiny_model
        print(*[key.graph_key(tiny_model(name), CommonOptions()) for name in sys.argv[2:]])
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(HERE), *names], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [key.graph_key(tiny_model(name), OPTIONS) for name in names]


# --- files ----------------------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_and_cleared(artifacts: Path) -> None:
    assert store.read("a") is None
    store.write("a", {"x": torch.arange(3)})
    store.write("b", 1)
    assert torch.equal(store.read("a")["x"], torch.arange(3))
    (artifacts / "b.xyz.partial").write_bytes(b"of a process that was killed")
    assert [s.name for s in store.stored()] == ["a", "b"]
    assert [s.name for s in store.clear()] == ["a", "b"]
    assert not list(artifacts.iterdir())


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:10], lambda b: b"", lambda b: b[:-3] + b"xyz", lambda b: b"\0" + b])
def test_a_damaged_file_is_told_once_and_deleted(damage: Callable[[bytes], bytes], artifacts: Path) -> None:
    store.write("a", list(range(100)))
    (artifacts / "a").write_bytes(damage((artifacts / "a").read_bytes()))
    with pytest.raises(ArtifactError, match="damaged"):
        store.read("a")
    assert store.read("a") is None


def test_what_can_t_be_pickled_or_written_leaves_no_file(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="pickled"):
        store.write("a", lambda: 0)
    artifacts.parent.joinpath("file").write_text("")
    monkeypatch.setenv("SPECFX_CACHE", str(artifacts.parent / "file"))
    with pytest.raises(ArtifactError, match="SPECFX_CACHE"):
        store.write("a", 1)
    monkeypatch.undo()
    assert not artifacts.exists() or not list(artifacts.iterdir())


def _write_often(number: int) -> None:
    for i in range(200):
        store.write("shared", [number, i] + [number] * 20_000)


def test_two_processes_that_write_at_once_and_one_that_is_killed_leave_a_whole_file(artifacts: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(n,)) for n in range(2)]
    for writer in writers:
        writer.start()
    seen = 0
    while writers[1].is_alive():
        content = store.read("shared")  # raises if it is not whole
        if content is not None:
            assert set(content[2:]) == {content[0]}
            seen += 1
        if seen == 20 and writers[0].is_alive():
            writers[0].kill()
    for writer in writers:
        writer.join(60)
    assert seen
    assert writers[0].exitcode in (0, -signal.SIGKILL)
    assert writers[1].exitcode == 0
    assert store.read("shared")[0] in (0, 1)


# --- graphs ---------------------------------------------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gpt2", "gemma3", "deepseek_v3"])
def test_a_graph_comes_back_as_it_was(name: str) -> None:
    model = tiny_model(name)
    module = run_passes(capture(model), REWRITE, PassContext()).module
    tensors = weights_of(model)
    data = graphs.encode(module, {place_of(t): n for n, t in reversed(tensors.items())})
    back = graphs.decode(data, tensors, torch.device("cpu"), packed)
    assert normal_form(back) == normal_form(module)
    for a, b in zip(module.graph.nodes, back.graph.nodes, strict=True):
        assert (a.op, a.name) == (b.op, b.name)
    ranges = [
        sorted((str(v.lower), str(v.upper)) for v in n.meta["val"].fake_mode.shape_env.var_to_range.values())
        for m in (module, back)
        for n in m.graph.find_nodes(op="placeholder")[:1]
    ]
    assert set(ranges[1]) <= set(ranges[0])


def test_a_graph_with_a_large_tensor_that_is_no_weight_is_not_kept() -> None:
    model = tiny()
    module = run_passes(capture(model), REWRITE, PassContext()).module
    places = {place_of(t): n for n, t in weights_of(model).items()}
    module.model.lm_head.weight = nn.Parameter(torch.zeros(1 << 19, 2), requires_grad=False)
    with pytest.raises(ArtifactError, match="no weight of the model"):
        graphs.encode(module, places)


# --- models that start from artifacts -------------------------------------------------------------------------------------------


def forbid_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specfx.engines.rewrite.capture", lambda model: pytest.fail("captured"))


def forbid_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_capture(monkeypatch)
    monkeypatch.setattr("specfx.engines.ladder.lower", lambda *arguments: pytest.fail("compiled"))


def test_what_was_prebuilt_is_what_a_start_takes(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line shows the stages while they go on; a library shows none."""
    monkeypatch.setattr("specfx.models.load", lambda name, dtype: (tiny().to(dtype), None))
    threads = str(torch.get_num_threads())
    assert cli.main(["cache", "prebuild", "--model", "tiny", "--methods", "suffix", "--dtype", "float32", "--threads", threads]) == 0
    told = capsys.readouterr()
    assert "suffix: engine compiled" in told.out
    assert "2 new artifacts" in told.out
    stages = [line.strip() for line in told.err.splitlines() if line.startswith("  ")]
    assert [stage for stage in stages if stage.endswith(" ...")] == [f"{s} ..." for s in STAGES_OF_A_START]
    forbid_compiling(monkeypatch)
    model = specfx.speculate(tiny(), "suffix", compile="sync")
    assert engine_of(model).name == "compiled"
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("  ")] == []


STAGES_OF_A_START = ("kernels", "load", "capture", "passes", "gate", "compile", "first use")


def test_a_second_model_of_the_structure_takes_the_graph_and_proves_it(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = specfx.speculate(tiny(), "suffix", compile="off")
    assert_serves(first, "graph")
    forbid_capture(monkeypatch)
    second = tiny()
    with_other_values(second)
    report = assert_serves(specfx.speculate(second, "suffix", compile="off"), "graph")
    assert {"load", "gate"} <= set(report.seconds)
    assert "capture" not in report.seconds
    assert report.passes == specfx.explain(first).passes
    assert specfx.explain(second, graph=True).graph == specfx.explain(first, graph=True).graph


def test_a_stored_graph_that_the_gate_rejects_is_captured_anew(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny(hidden_act="relu")
    specfx.speculate(other, compile="off")
    (wrong,) = artifacts.iterdir()
    wrong.rename(artifacts / f"{key.graph_key(tiny(), OPTIONS)}.graph")
    report = assert_serves(specfx.speculate(tiny(), compile="off"), "graph")
    assert [r.reason for r in report.refusals] == [Reason.ARTIFACT_UNUSABLE]
    assert "differ from the stock model" in report.refusals[0].detail
    forbid_capture(monkeypatch)
    assert not assert_serves(specfx.speculate(tiny(), compile="off"), "graph").refusals


def test_a_damaged_artifact_is_built_anew_and_told(artifacts: Path) -> None:
    specfx.speculate(tiny(), compile="off")
    (file,) = artifacts.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    report = assert_serves(specfx.speculate(tiny(), compile="off"), "graph")
    assert [r.reason for r in report.refusals] == [Reason.ARTIFACT_UNUSABLE]
    assert "capture" in report.seconds
    assert store.read(file.name) is not None


def test_a_folder_that_can_t_be_written_costs_nothing_but_the_artifact(artifacts: Path) -> None:
    artifacts.write_text("a file where the folder should be")
    report = assert_serves(specfx.speculate(tiny(), compile="off"), "graph")
    assert {r.reason for r in report.refusals} <= {Reason.NOT_STORED, Reason.ARTIFACT_UNUSABLE}
    assert report.refusals


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the artifacts of `tiny()`, compiled in another process."""
    root = tmp_path_factory.mktemp("compiled")
    for there in (f for pattern in ("cpu-*.so", "numba") for f in cache_dir().glob(pattern)):
        (root / there.name).symlink_to(there)
    done = run_python(
        """
        import sys, torch
        torch.set_num_threads(1)
        import specfx
        from tiny import tiny_model
        model = specfx.speculate(tiny_model("llama", num_hidden_layers=2), "suffix", compile="sync")
        assert specfx.explain(model).engine == "compiled", specfx.explain(model)
        """,
        SPECFX_CACHE=str(root),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(file.suffix for file in (root / "artifacts").iterdir()) == [".graph", ".lowered"]
    return root


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that keeps artifacts and finds `tiny`."""
    kept = {name: value for name, value in os.environ.items() if name != "SPECFX_NO_ARTIFACTS"}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)} | environment
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=kept)


@pytest.fixture
def ready(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifacts folder of a copy of `compiled`, in use."""
    shutil.copytree(compiled, tmp_path / "cache", symlinks=True)
    monkeypatch.delenv("SPECFX_NO_ARTIFACTS")
    monkeypatch.setenv("SPECFX_CACHE", str(tmp_path / "cache"))
    return store.folder()


def test_a_warm_start_neither_captures_nor_compiles(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_compiling(monkeypatch)
    monkeypatch.setattr("specfx.engines.choose.on_references", lambda module: pytest.fail("the graph engine was proven"))
    model = tiny()
    with_other_values(model)
    report = assert_serves(specfx.speculate(model, "suffix", compile="sync"), "compiled")
    assert set(report.seconds) == {"kernels", "load", "first use", "first call", "first token"}
    assert [r.name for r in report.passes][-1] == "regions"
    assert "specfx.tree_attention_" in str(specfx.explain(model, graph=True).graph)


def test_changed_weights_are_followed_after_a_warm_start(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_compiling(monkeypatch)
    model = specfx.speculate(tiny(), "suffix", compile="sync")
    before, _ = generated(model)
    with_other_values(model)
    assert_serves(model, "compiled")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    assert_serves(model, "compiled")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # prepared anew
    assert_serves(model, "compiled")
    assert not torch.equal(generated(model)[0], before)


def test_a_stored_artifact_that_is_wrong_is_compiled_anew(ready: Path, monkeypatch: pytest.MonkeyPatch, instant_inductor: None) -> None:
    load = _compat.load_artifact

    def wrong(data: bytes, module: Any) -> Callable[..., Any]:
        call = load(data, module)
        return lambda *inputs: (call(*inputs)[0].roll(1, -1), *call(*inputs)[1:])

    monkeypatch.setattr(_compat, "load_artifact", wrong)
    report = assert_serves(specfx.speculate(tiny(), "suffix", compile="sync"), "compiled")
    assert Reason.ARTIFACT_UNUSABLE in {r.reason for r in report.refusals}
    assert not list(ready.glob("*.lowered"))  # what stands in for Inductor here can't be kept


def test_an_artifact_of_inductor_that_can_t_be_loaded_is_compiled_anew(
    ready: Path, monkeypatch: pytest.MonkeyPatch, instant_inductor: None
) -> None:
    monkeypatch.setattr(_compat, "load_artifact", lambda *arguments: 1 / 0)
    report = assert_serves(specfx.speculate(tiny(), "suffix", compile="sync"), "compiled")
    assert "ZeroDivisionError" in str(next(r for r in report.refusals if r.reason is Reason.ARTIFACT_UNUSABLE))


def test_a_model_with_windows_has_its_graph_proven_even_when_it_starts_warm(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, instant_inductor: None
) -> None:
    proven = []
    monkeypatch.setattr("specfx.engines.choose._prove", lambda engine, *rest, **more: proven.append(engine.name))
    monkeypatch.setattr("specfx.artifacts.shelf.Shelf.has_lowered", lambda self: True)
    specfx.speculate(tiny_model("mistral"), compile="sync")
    assert proven[:2] == ["graph", "graph"]


def test_a_warm_start_needs_no_files_of_inductor_s(ready: Path, tmp_path: Path) -> None:
    """Its cache folder is empty, and no compiler runs: the libraries come with the artifact."""
    done = run_python(
        """
        import sys, torch
        from torch._inductor.cpp_builder import CppBuilder
        torch.set_num_threads(1)
        CppBuilder.build = lambda self: sys.exit("compiled")
        import specfx
        from tiny import tiny_model
        model = specfx.speculate(tiny_model("llama", num_hidden_layers=2), "suffix", compile="sync")
        print(specfx.explain(model))
        """,
        SPECFX_CACHE=str(ready.parent),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "empty"),
    )
    assert done.returncode == 0, done.stderr
    assert "engine compiled" in done.stdout
    assert Reason.ARTIFACT_UNUSABLE.value not in done.stdout, done.stdout


def test_the_command_line_tells_of_them_and_deletes_them(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "info"]) == 0
    told = capsys.readouterr().out
    assert str(ready) in told
    assert "1 rewritten graphs" in told
    assert "1 lowered graphs" in told
    assert cli.main(["cache", "clear"]) == 0
    assert "deleted: 1 rewritten graphs" in capsys.readouterr().out
    assert not list(ready.iterdir())
