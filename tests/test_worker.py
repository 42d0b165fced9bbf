"""The process that captures and compiles in the background: what it is given, what it leaves, and every way in which it may end."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import PreTrainedModel

import specfx
from specfx.artifacts import key, skeleton, store, worker
from specfx.cache import cache_dir
from specfx.capture import clone_sharing_storage
from specfx.drafters.mtp import Drafting
from specfx.drafters.mtp_head import MtpHead
from specfx.errors import ArtifactError, Reason
from specfx.options import CommonOptions
from specfx.runtime.tree import TreeShape

OPTIONS = CommonOptions()
HERE = Path(__file__).parent
PROMPT = torch.arange(3, 15)[None]
ASKED = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}


def tiny() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2)


def assert_stocks_tokens(model: PreTrainedModel) -> None:
    assert torch.equal(model.generate(PROMPT, **ASKED), type(model).generate(model, PROMPT, **ASKED))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that keeps artifacts and finds `tiny`."""
    kept = {name: value for name, value in os.environ.items() if name != "SPECFX_NO_ARTIFACTS"}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)} | environment
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, env=kept)


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


# --- what it is given -----------------------------------------------------------------------------------------------------------


def tied() -> PreTrainedModel:
    model = tiny()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gpt2", "gemma3", "deepseek_v3", "tied"])
def test_a_skeleton_has_the_structure_and_no_weights(name: str) -> None:
    model = tied() if name == "tied" else tiny_model(name)
    data = skeleton.dumps(model, [model])
    other = skeleton.loads(data)
    assert key.graph_key(other, OPTIONS) == key.graph_key(model, OPTIONS)
    for weight in model.state_dict().values():
        flat = weight.flatten()
        assert flat[: min(len(flat), 16)].numpy().tobytes() not in data or not flat.any() or len(flat) < 8


def test_a_skeleton_of_a_head_refers_to_its_target() -> None:
    model = tiny()
    head = MtpHead.from_target(model)
    head.restrict(torch.arange(0, 90, 3))
    drafting = Drafting(head, TreeShape(2, 2, 4))
    model = clone_sharing_storage(model)  # as it is sent; the head refers to the modules of the original
    there, part = skeleton.loads(skeleton.dumps((model, drafting), [model, drafting.head]))
    assert key.graph_key(there, OPTIONS, part) == key.graph_key(model, OPTIONS, drafting)


# --- how it ends ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known_to_inductor() -> None:
    """Inductor has the two layers of `tiny()` in its own cache, so that it answers a process that asks for them soon."""
    code = """
        import torch
        torch.set_num_threads(1)
        import specfx
        from tiny import tiny_model
        specfx.speculate(tiny_model("llama", num_hidden_layers=2), "suffix", compile="sync")
    """
    done = run_python(code, SPECFX_NO_ARTIFACTS="1")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child is ended for want of a processor, which other tests may need as well."""
    monkeypatch.setattr(worker, "_PRIORITIES", ("nice", "nice"))


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started."""
    started = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: Any, **options: Any) -> None:
            super().__init__(command, **options)
            if "specfx.artifacts.worker" in command:
                started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    return started


def forbid_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specfx.engines.choose.rewrite", lambda *arguments: pytest.fail("captured"))
    monkeypatch.setattr("specfx.engines.ladder.lower", lambda *arguments: pytest.fail("compiled"))


def test_stock_serves_until_the_compiled_engine_takes_over(
    known_to_inductor: None,
    artifacts: Path,
    unhurried: None,
    children: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_capture(monkeypatch)  # in this process
    model = specfx.speculate(tiny(), "suffix")
    report = specfx.explain(model)
    assert (report.engine, report.verifies) == ("stock", "nothing")
    assert Reason.ENGINE_NOT_READY in {r.reason for r in report.refusals}
    seen = set()

    def over() -> bool:
        assert_stocks_tokens(model)
        seen.add(engine := specfx.explain(model).engine)
        return engine != "stock" or model.generate.ready().compiling is None

    until(over)
    model.generate.ready().wait()
    assert_stocks_tokens(model)
    report = specfx.explain(model)
    assert report.engine == "compiled", str(report)
    assert Reason.WORKER_FAILED not in {r.reason for r in report.refusals}, str(report)
    assert seen <= {"stock", "compiled"}
    assert {"worker", "worker's capture", "worker's compile", "load", "first use"} <= set(report.seconds)
    assert sum(report.stock_calls.values()) >= 1
    assert [child.returncode for child in children] == [0]  # waited for, no zombie
    again = specfx.speculate(tiny(), "suffix")  # warm: no process
    again.generate.ready().wait()
    assert_stocks_tokens(again)
    assert specfx.explain(again).engine == "compiled"
    assert len(children) == 1


def test_a_call_under_way_is_not_disturbed_by_the_switch(known_to_inductor: None, artifacts: Path, unhurried: None) -> None:
    model = specfx.speculate(tiny(), "suffix")
    waited = []

    def wait(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        if ids.shape[1] == PROMPT.shape[1] + 4 and not waited:  # in mid-generation
            waited.append(True)
            until(lambda: model.generate.ready().compiling is None)
        return torch.zeros(1, dtype=torch.bool)

    assert torch.equal(model.generate(PROMPT, stopping_criteria=[wait], **ASKED), type(model).generate(model, PROMPT, **ASKED))
    assert waited
    assert_stocks_tokens(model)
    report = specfx.explain(model)
    assert report.engine == "compiled"
    assert Reason.WORKER_FAILED not in {r.reason for r in report.refusals}, str(report)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("-c", "import sys; sys.stdin.buffer.read(); sys.exit('no such luck')"), "no such luck"),
        (("-c", "import sys; sys.exit('at once')"), "at once"),
        (("-c", """print('{"error": "of another kind"}')"""), "of another kind"),
        (("-c", "import os; os.kill(os.getpid(), 9)"), "-9"),
    ],
)
def test_where_the_process_fails_this_one_does_it(
    command: tuple[str, ...], told: str, artifacts: Path, monkeypatch: pytest.MonkeyPatch, instant_inductor: None
) -> None:
    monkeypatch.setattr(worker, "_COMMAND", command)
    model = specfx.speculate(tiny(), "suffix")
    assert_stocks_tokens(model)
    model.generate.ready().wait()
    assert_stocks_tokens(model)
    report = specfx.explain(model)
    assert report.engine == "compiled"
    (refusal,) = [r for r in report.refusals if r.reason is Reason.WORKER_FAILED]
    assert told in refusal.detail


WORK = """
import os, sys, time
sys.stdin.buffer.read()
idle = os.environ["SPECFX_PRIORITY"] == "idle"
{}
print('{{"seconds": {{"' + os.environ["SPECFX_PRIORITY"] + '": 1}}}}')
"""


@pytest.mark.parametrize(
    ("work", "finished"),
    [
        ("time.sleep(600 * idle)", "nice"),
        ("while time.process_time() < 0.5: pass\ntime.sleep(0.3)", "idle"),
        ("time.sleep(0.3)", "idle"),  # ready before anybody looks
    ],
    ids=["starved", "at work", "short"],
)
def test_an_idle_process_that_comes_to_little_is_followed_by_one_that_takes_its_share(
    work: str, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_COMMAND", ("-c", WORK.format(work)))
    monkeypatch.setattr(worker, "SECONDS_IDLE", 5.0 if "while" not in work and finished == "idle" else 0.5)
    monkeypatch.setattr(worker, "_STARVED", 0.05)  # other tests run beside this one
    assert worker.fill(b"") == {finished: 1}


@pytest.mark.parametrize(("passes", "times"), [(True, 2), (False, 1)])
def test_a_process_that_failed_by_what_may_pass_is_followed_by_another(
    passes: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = f"""
import os, sys
from specfx.artifacts import worker
def build(*told):
    with open({str(tmp_path / "children")!r}, "a") as file:
        print(os.environ["SPECFX_PRIORITY"], file=file)
    raise {"ImportError" if passes else "ArithmeticError"}("told")
worker._build = build
worker.main()
"""
    monkeypatch.setattr(worker, "_COMMAND", ("-c", fails))
    with pytest.raises(ArtifactError, match="told"):
        worker.fill(pickle.dumps(((), b"")))
    assert (tmp_path / "children").read_text().split() == ["idle", "nice"][:times]


def test_where_no_process_can_be_started_this_one_does_it(artifacts: Path, monkeypatch: pytest.MonkeyPatch, instant_inductor: None) -> None:
    monkeypatch.setattr(sys, "executable", str(artifacts / "nothing"))
    model = specfx.speculate(tiny(), None)
    model.generate.ready().wait()
    assert_stocks_tokens(model)
    report = specfx.explain(model)
    assert report.engine == "compiled"
    assert "no process can be started" in str(next(r for r in report.refusals if r.reason is Reason.WORKER_FAILED))


def test_a_model_that_can_t_be_pickled_is_built_here(artifacts: Path, instant_inductor: None) -> None:
    model = tiny()
    model.model.norm.extra = lambda x: x
    specfx.speculate(model, None)
    model.generate.ready().wait()
    assert_stocks_tokens(model)
    report = specfx.explain(model)
    assert report.engine == "compiled"
    assert "can't be sent" in str(next(r for r in report.refusals if r.reason is Reason.WORKER_FAILED))


def test_capture_failing_everywhere_leaves_the_eager_engine(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_COMMAND", ("-c", "import sys; sys.exit('no')"))
    monkeypatch.setattr(torch.export, "export", lambda *arguments, **more: 1 / 0)
    model = specfx.speculate(tiny(), None)
    model.generate.ready().wait()
    assert_stocks_tokens(model)
    report = specfx.explain(model)
    assert report.engine == "eager"
    assert {Reason.WORKER_FAILED, Reason.CAPTURE_FAILED} <= {r.reason for r in report.refusals}


def test_a_process_killed_while_it_compiles_leaves_nothing_broken(
    artifacts: Path, unhurried: None, children: list[subprocess.Popen[bytes]], instant_inductor: None
) -> None:
    model = specfx.speculate(tiny(), None)
    until(lambda: any(file.name.endswith(".graph") for file in store.stored()))  # it has captured, and compiles
    children[0].kill()
    model.generate.ready().wait()
    assert_stocks_tokens(model)
    report = specfx.explain(model)
    assert report.engine == "compiled"
    assert Reason.WORKER_FAILED in {r.reason for r in report.refusals}
    for file in store.stored():
        assert store.read(file.name) is not None
    assert children[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "pass"])
def test_the_process_finishes_what_its_parent_does_not_live_to_see(end: str, known_to_inductor: None, artifacts: Path) -> None:
    done = run_python(
        f"""
        import os, subprocess, time, torch
        torch.set_num_threads(1)
        import specfx
        from specfx.artifacts import worker
        from tiny import tiny_model
        worker._PRIORITIES = ("nice",)
        class Popen(subprocess.Popen):
            def __init__(self, command, **options):
                super().__init__(command, **options)
                print(self.pid, flush=True)
        subprocess.Popen = Popen
        model = specfx.speculate(tiny_model("llama", num_hidden_layers=2), "suffix")
        print(specfx.explain(model).engine, flush=True)
        while not os.path.isdir(os.environ["SPECFX_CACHE"] + "/artifacts"):
            time.sleep(0.1)
        {end}
        """,
        SPECFX_CACHE=str(cache_dir()),
    )
    assert done.returncode == (-signal.SIGKILL if "kill" in end else 0), done.stderr
    assert "stock" in done.stdout
    child = next(int(line) for line in done.stdout.splitlines() if line.isdigit())
    until(lambda: any(file.name.endswith(".lowered") for file in store.stored()))
    until(lambda: not alive(child))
    model = specfx.speculate(tiny(), "suffix", compile="sync")
    assert "capture" not in specfx.explain(model).seconds
    assert specfx.explain(model).engine == "compiled"
    assert_stocks_tokens(model)


def test_a_child_that_was_left_alone_ends() -> None:
    code = "from specfx.artifacts import worker; worker.SECONDS_ALONE = 0.2; worker._notice_parent(-1)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 1


def _hold(name: str, path: Path) -> None:
    with store.alone(name):
        began = time.monotonic()
        time.sleep(0.3)
        with path.open("a") as file:
            file.write(f"{began} {time.monotonic()}\n")


def test_two_processes_do_not_build_the_same_at_once(artifacts: Path) -> None:
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=_hold, args=("name", artifacts.parent / "times")) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    times = sorted(tuple(map(float, line.split())) for line in (artifacts.parent / "times").read_text().splitlines())
    assert len(times) == 3
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(times))


def test_early_refusals_are_raised_or_recorded_at_once(artifacts: Path, children: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(specfx.errors.OptionError):
        specfx.speculate(tiny(), None, disable_passes=("nonsense",))
    recurrent = specfx.speculate(tiny_model("qwen3_next"), None)
    report = specfx.explain(recurrent)
    assert report.engine == "eager"
    assert Reason.GATE_FAILED in {r.reason for r in report.refusals}
    assert not children
