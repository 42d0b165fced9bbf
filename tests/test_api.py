"""The public interface: what `speculate` touches and what it leaves alone, what `restore` puts back, and what follows the model."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import specfx
from specfx.api import engine_of
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.engines.compiled import Lowered, lower
from specfx.errors import HeadError, OptionError, Reason, UnsupportedModelError
from specfx.kernels import cpu_build

ENGINES = ("graph", "eager", "compiled")


def small() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


def wrapped(engine: str = "graph", method: str | None = "suffix", **options: Any) -> PreTrainedModel:
    mode = "sync" if engine == "compiled" else "off"
    return specfx.speculate(small(), method, engine=engine, compile=mode, **options)


def head_of(method: str | None, folder: Path) -> dict[str, Any]:
    """The options of a method: for "mtp" a head, in `folder`."""
    return {"head": save_head(MtpHead.from_target(small()), folder)} if method == "mtp" else {}


def prompt_of(seed: int = 0, length: int = 10, batch: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def stock(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return type(model).generate(model, ids, **{"max_new_tokens": 12, **kwargs})


def ours(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, **{"max_new_tokens": 12, **kwargs})


# --- what speculate touches ------------------------------------------------------------------------------------------------------------


def snapshot(model: PreTrainedModel) -> list[Any]:
    """Everything that hangs on the model, by identity, and all settings."""
    modules = [(name, type(m), {k: id(v) for k, v in m.__dict__.items()}) for name, m in model.named_modules()]
    registries = [
        (name, {k: id(v) for k, v in d.items()}) for name, m in model.named_modules() for d in (m._parameters, m._buffers, m._modules)
    ]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    weights = [(name, p.requires_grad, p.data_ptr(), p._version) for name, p in model.state_dict(keep_vars=True).items()]
    settings = [model.config.to_dict(), model.generation_config.to_dict(), model.config._attn_implementation, model.training]
    return [modules, registries, hooks, weights, settings]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_but_generate_is_touched_and_restore_puts_it_back(engine: str, instant_inductor: None) -> None:
    model = tiny_model("gpt_oss") if engine == "eager" else small()
    kind, method = type(model), type(model).generate
    before = snapshot(model)
    own = dict(model.__dict__)
    result = specfx.speculate(model, "suffix", engine=engine, compile="sync" if engine == "compiled" else "off")
    assert result is model
    model.generate(prompt_of(batch=2), max_new_tokens=4)
    assert specfx.explain(model).engine == engine
    assert type(model) is kind
    assert kind.generate is method
    assert "generate" not in kind.__dict__
    assert set(model.__dict__) - set(own) == {"generate"}
    assert specfx.restore(model) is model
    assert model.__dict__.keys() == own.keys()
    assert all(model.__dict__[k] is own[k] for k in own)
    assert snapshot(model) == before
    assert model.generate.__func__ is method
    specfx.restore(specfx.restore(model))  # again: no error
    assert snapshot(model) == before


def test_restore_frees_what_specfx_holds() -> None:
    model = wrapped()
    ours(model, prompt_of())
    engine = weakref.ref(engine_of(model))
    specfx.restore(model)
    gc.collect()
    assert engine() is None
    model = wrapped("eager")
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None, "a wrapped model dies with its last reference"


def test_speculating_nests_and_puts_back_what_was_there() -> None:
    model = small()
    with specfx.speculating(model, "suffix", engine="eager") as inner:
        assert inner is model
        first = model.generate
        with pytest.raises(ZeroDivisionError), specfx.speculating(model, None, engine="eager"):
            1 / int(specfx.explain(model).method is not None)
        assert model.generate is first
        assert specfx.explain(model).method == "suffix"
        with pytest.raises(OptionError), specfx.speculating(model, "nonsense"):
            pass
        assert model.generate is first
        with specfx.speculating(model, None, engine="eager"):
            specfx.restore(model)
        assert model.generate is first
    assert "generate" not in model.__dict__


def test_saving_a_wrapped_model_saves_the_stock_one(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "stock")
    keys = list(model.state_dict())
    specfx.speculate(model, "suffix", engine="graph", compile="off")
    ours(model, prompt_of())
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "wrapped")
    files = {f.name: f.read_bytes() for f in (tmp_path / "stock").iterdir()}
    assert {f.name: f.read_bytes() for f in (tmp_path / "wrapped").iterdir()} == files
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wrapped")
    assert torch.equal(stock(loaded, prompt_of()), ours(model, prompt_of()))


# --- options ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("sufix", {}, ["'sufix'", "None", "'suffix'", "'mtp'"]),
        ("suffix", {"max_tree_dept": 3}, ["'max_tree_dept'", "max_tree_depth", "use_tree_spec", "kv_pool", "engine"]),
        (None, {"head": "x"}, ["'head'", "num_speculative_tokens", "page_size"]),
        ("suffix", {"engine": "cuda"}, ["engine='cuda'", "auto, compiled, graph, eager"]),
        ("suffix", {"compile": True}, ["compile=True", "background, sync, off"]),
        ("suffix", {"num_speculative_tokens": 64}, ["num_speculative_tokens=64", "1..63"]),
        ("suffix", {"num_speculative_tokens": 0}, ["num_speculative_tokens=0"]),
        ("suffix", {"kv_pool": 0}, ["kv_pool=0", "auto"]),
        ("suffix", {"kv_pool": 1.5}, ["kv_pool=1.5", "fraction"]),
        ("suffix", {"page_size": 0}, ["page_size=0", ">= 1"]),
        ("suffix", {"max_spec_factor": "much"}, ["suffix", "wrong type"]),
        ("suffix", {"min_token_prob": 0}, ["min_token_prob=0"]),
        ("suffix", {"disable_passes": ["tree_mask", "tree_musk"]}, ["tree_musk", "canonicalize_attention, paged_kv, tree_mask"]),
        ("mtp", {"head": "nowhere", "num_steps": 99}, ["num_steps=99"]),
        ("mtp", {"head": "nowhere", "wiring": "vllm"}, ["wiring='vllm'", "published", "transformers"]),
    ],
)
def test_a_wrong_option_is_refused_at_once_with_what_is_known(method: Any, options: dict[str, Any], words: list[str]) -> None:
    model = small()
    with pytest.raises(OptionError) as error:
        specfx.speculate(model, method, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert isinstance(error.value, ValueError)
    assert "generate" not in model.__dict__


def test_a_refused_change_leaves_the_model_as_it_was() -> None:
    model = wrapped("eager")
    before = model.generate
    with pytest.raises(OptionError):
        specfx.speculate(model, "suffix", num_speculative_tokens=1000)
    with pytest.raises(HeadError, match="nowhere"):
        specfx.speculate(model, "mtp", head="nowhere", engine="eager")
    assert model.generate is before
    assert torch.equal(ours(model, prompt_of()), stock(model, prompt_of()))


def test_what_is_not_wrapped_can_t_be_explained() -> None:
    for question in (specfx.explain, specfx.stats, engine_of):
        with pytest.raises(OptionError, match=r"LlamaForCausalLM is not wrapped.*speculate"):
            question(small())


def test_models_that_can_t_be_wrapped() -> None:
    model = small()
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel is not a transformers model that can generate.*AutoModelForCausalLM"):
        specfx.speculate(model.model)
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        specfx.speculate(nn.Linear(2, 2))  # type: ignore[arg-type]
    model.generate = lambda *a, **k: None
    with pytest.raises(UnsupportedModelError, match="`generate` of its own"):
        specfx.speculate(model)


def test_another_method_reuses_the_engine_and_other_engines_do_not() -> None:
    model = wrapped("graph", "suffix")
    engine, wrapper = engine_of(model), model.generate
    for method, options in ((None, {}), ("suffix", {"num_speculative_tokens": 4}), ("suffix", {"max_tree_depth": 8})):
        specfx.speculate(model, method, engine="graph", compile="off", **options)
        assert engine_of(model) is engine
        assert model.generate is not wrapper
        assert specfx.explain(model).method == method
        assert specfx.stats(model).total.tokens == 0
        assert torch.equal(ours(model, prompt_of()), stock(model, prompt_of()))
    specfx.speculate(model, "suffix", engine="eager")
    assert engine_of(model).name == "eager"
    specfx.speculate(model, "suffix", engine="graph", compile="off", page_size=16)
    assert engine_of(model) is not engine
    assert specfx.explain(model).page_size == 16
    assert torch.equal(ours(model, prompt_of()), stock(model, prompt_of()))


@pytest.mark.parametrize("disabled", ["tree_mask", "epilogue", "canonicalize_attention", "paged_kv"])
def test_any_pass_can_be_switched_off(disabled: str) -> None:
    model = wrapped(disable_passes=(disabled,))
    report = specfx.explain(model)
    assert report.engine == ("graph" if disabled in ("tree_mask", "epilogue") else "eager")
    assert report.verifies == ("chains" if disabled == "tree_mask" else "trees")
    assert any(disabled in str(r) for r in (*report.refusals, *report.passes))
    assert torch.equal(ours(model, prompt_of()), stock(model, prompt_of()))


# --- explain and stats -----------------------------------------------------------------------------------------------------------------


def test_explain_as_data_and_as_text(instant_inductor: None) -> None:
    model = wrapped("graph", page_size=32)
    ours(model, prompt_of())
    model.generate(prompt_of(), max_new_tokens=2, num_beams=2)
    report = specfx.explain(model)
    assert (report.model, report.method, report.engine, report.verifies) == ("LlamaForCausalLM", "suffix", "graph", "trees")
    assert [r.name for r in report.passes][:4] == ["canonicalize_attention", "paged_kv", "tree_mask", "epilogue"]
    assert all(r.applied and r.matches for r in report.passes[:4])
    assert [r.reason for r in report.refusals] == [Reason.NOT_ACCELERATED] * len(report.stock_calls)
    assert report.stock_calls == {"beam search": 1}
    assert (report.pages_in_use, report.page_size) == (0, 32)
    assert report.pages >= 1
    assert report.seconds["capture"] > 0
    assert report.graph is None
    text = str(report)
    for words in ("LlamaForCausalLM", "'suffix'", "engine graph", "paged_kv: 1 matches", "0 in use", "1 x beam search"):
        assert words in text
    with pytest.raises(AttributeError):
        report.engine = "eager"  # type: ignore[misc]
    graph = specfx.explain(model, graph=True).graph
    assert graph is not None
    assert "tree_attention" in graph
    assert graph in str(specfx.explain(model, graph=True))
    assert specfx.explain(wrapped("eager"), graph=True).graph is None
    assert specfx.explain(wrapped("compiled")).engine == "compiled"


def test_stats_of_the_last_call_and_of_all() -> None:
    model = wrapped("graph", None)
    stats = specfx.stats(model)
    assert (stats.tokens, stats.forwards, stats.total.tokens) == (0, 0, 0)
    ours(model, prompt_of(), max_new_tokens=9)
    assert (stats.tokens, stats.forwards, stats.tokens_per_forward) == (9, 8, 1.0)
    assert (stats.last.prefills, stats.last.prompt_tokens, stats.acceptance_by_depth) == (1, 10, [])
    ours(model, prompt_of(batch=3), max_new_tokens=4)
    assert (stats.tokens, stats.forwards, stats.last.steps, stats.last.prefills) == (12, 3, 9, 3)
    assert (stats.total.tokens, stats.total.forwards, stats.total.prompt_tokens) == (21, 11, 40)
    seconds = stats.seconds
    assert set(seconds) == {"prefill", "draft", "forward", "accept", "total"}
    assert sum(s for k, s in seconds.items() if k != "total") <= seconds["total"] <= stats.total.seconds["total"]
    seen = []
    thread = threading.Thread(
        target=lambda: (seen.append(stats.tokens), ours(model, prompt_of(), max_new_tokens=2), seen.append(stats.tokens))
    )
    thread.start()
    thread.join()
    assert seen == [0, 2], "of this thread"
    assert (stats.tokens, stats.total.tokens) == (12, 23)
    assert stats.last.proposed == []


# --- copies ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "engine", "method"),
    [
        *[("deepcopy", engine, "suffix") for engine in ENGINES],
        *[("pickle", "graph", "suffix"), ("torch.save", "eager", "suffix")],
        *[("deepcopy", "graph", None), ("pickle", "eager", None), ("deepcopy", "graph", "mtp"), ("pickle", "eager", "mtp")],
    ],
)
def test_a_copy_of_a_wrapped_model_generates_and_is_independent(
    way: str, engine: str, method: str | None, instant_inductor: None, tmp_path: Path
) -> None:
    model = wrapped(engine, method, **head_of(method, tmp_path))
    expected = ours(model, prompt_of())
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert other.generate is not model.generate
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(ours(other, prompt_of()), expected)
    assert torch.equal(torch.get_rng_state(), state), "preparing engines draws no random numbers"
    report = specfx.explain(other)
    assert (report.engine, report.method) == (engine, method)
    assert engine_of(other) is not engine_of(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    changed = ours(other, prompt_of())
    assert torch.equal(changed, stock(other, prompt_of()))
    assert not torch.equal(changed, expected)
    assert torch.equal(ours(model, prompt_of()), expected)
    specfx.restore(other)
    assert specfx.explain(model).method == method
    assert "generate" not in other.__dict__


# --- weights that change ---------------------------------------------------------------------------------------------------------------


def noise(like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_place(model: PreTrainedModel) -> None:
    for p in model.parameters():
        p.mul_(1.1).add_(noise(p))


def loaded_state(model: PreTrainedModel) -> None:
    model.load_state_dict({name: t + noise(t, 1) for name, t in model.state_dict().items()})


def replaced(model: PreTrainedModel) -> None:
    old = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(old.detach() + noise(old, 2))


def replaced_module(model: PreTrainedModel) -> None:
    old = model.lm_head.weight
    model.lm_head = nn.Linear(old.shape[1], old.shape[0], bias=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(old + noise(old, 3))


def replaced_data(model: PreTrainedModel) -> None:
    for p in model.parameters():
        p.data = p.data + noise(p, 4)


def assigned_state(model: PreTrainedModel) -> None:
    model.load_state_dict({name: t + noise(t, 5) for name, t in model.state_dict().items()}, assign=True)


def training_step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(input_ids=prompt_of(2), labels=prompt_of(2)).loss.backward()
    optimizer.step()
    model.zero_grad()


def half(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


def double(model: PreTrainedModel) -> None:
    model.to(torch.float64)


def behind_the_counters(model: PreTrainedModel) -> None:
    """As adapters are merged: through `.data`, which counts no version."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3


FOLLOWED = (in_place, loaded_state, training_step, behind_the_counters)
"""Changes that the prepared engine follows."""
PREPARED_ANEW = (replaced, replaced_module, replaced_data, assigned_state, half, double)
"""Changes after which engines are prepared anew."""


@pytest.mark.parametrize("engine", ENGINES)
def test_changed_weights_are_followed(engine: str, instant_inductor: None) -> None:
    model, fresh = wrapped(engine), small()
    text, serving = ours(model, prompt_of()), engine_of(model)
    for change in (*FOLLOWED, *PREPARED_ANEW):
        change(model)
        change(fresh)
        expected = stock(fresh, prompt_of())
        if change not in (half, double):
            assert not torch.equal(expected, text), change.__name__
        assert_same_up_to_rounding(fresh, text := ours(model, prompt_of()), expected)
        assert (engine_of(model) is serving) == (change in FOLLOWED), change.__name__
        serving = engine_of(model)
        assert serving.name == engine
        assert all(p.requires_grad for p in model.parameters())


def test_packed_weights_follow_what_is_merged_into_them(instant_inductor: None) -> None:
    if not cpu_build.load().packs:
        pytest.skip("this CPU has no kernel for packed linears")
    model = specfx.speculate(tiny_model("llama").to(torch.bfloat16), None, engine="compiled", compile="sync")
    assert specfx.explain(model).packed_bytes > 0
    fresh = tiny_model("llama").to(torch.bfloat16)
    before = ours(model, prompt_of())
    behind_the_counters(model)
    behind_the_counters(fresh)
    specfx.speculate(model, "suffix", engine="compiled", compile="sync")  # the prepared engine is kept, its packed weights are not
    after = ours(model, prompt_of())
    assert not torch.equal(after, before)
    assert_same_up_to_rounding(fresh, after, stock(fresh, prompt_of()))


def test_two_wrappers_of_one_engine_take_turns() -> None:
    model = wrapped("graph", None)
    first = model.generate
    specfx.speculate(model, "suffix", engine="graph", compile="off")
    second = model.generate
    assert first is not second
    assert first.prepared is second.prepared
    prompts = [prompt_of(seed, 8 + seed) for seed in range(4)]
    expected = [stock(model, p, max_new_tokens=40) for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: (first, second)[i % 2](prompts[i], max_new_tokens=40), range(4)))
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_a_call_that_stock_serves_leaves_statistics_of_its_own() -> None:
    model = wrapped("graph")
    ours(model, prompt_of())
    assert specfx.stats(model).tokens > 0
    model.generate(prompt_of(), max_new_tokens=4, num_beams=2)
    assert specfx.stats(model).tokens == 0
    assert specfx.stats(model).seconds["total"] > 0


@torch.no_grad()
def assert_same_up_to_rounding(model: PreTrainedModel, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, or in bfloat16 at the first difference a near-tie of stock's own logits."""
    if torch.equal(got, expected):
        return
    assert model.dtype == torch.bfloat16, (got, expected)
    at = int((got != expected).nonzero()[0, 1])
    logits = model(expected[:, :at]).logits[0, -1].float()
    gap = (logits[expected[0, at]] - logits[got[0, at]]).abs()
    assert gap <= 0.05 * logits.std(), (got, expected, gap)


def test_the_real_artifact_in_bfloat16_follows_its_weights() -> None:
    """Packed weights are copies: they are packed anew when the originals change in place."""
    model = small().to(torch.bfloat16)
    specfx.speculate(model, "suffix", engine="compiled", compile="sync")
    report = specfx.explain(model)
    assert report.engine == "compiled", str(report)
    assert bool(report.packed_bytes) == cpu_build.load().packs, str(report)
    assert_same_up_to_rounding(model, ours(model, prompt_of()), stock(model, prompt_of()))
    engine = engine_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise(p).to(p.dtype))
    assert_same_up_to_rounding(model, ours(model, prompt_of(), max_new_tokens=24), stock(model, prompt_of(), max_new_tokens=24))
    assert engine_of(model) is engine


def test_replaced_weights_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = wrapped("eager")
    replaced(model)
    with caplog.at_level(logging.WARNING, "specfx"):
        ours(model, prompt_of())
        ours(model, prompt_of())
    assert [r.message for r in caplog.records if "replaced" in r.message] == [
        "specfx: weights or modules of LlamaForCausalLM have been replaced; preparing anew"
    ]


# --- threads and compilation in the background -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "method"), [("graph", "suffix"), ("eager", "suffix"), ("graph", None), ("graph", "mtp"), ("eager", "mtp")]
)
def test_two_threads_generate_at_once(engine: str, method: str | None, tmp_path: Path) -> None:
    model, other = (wrapped(engine, method, **head_of(method, tmp_path)) for _ in range(2))
    ids = [prompt_of(seed, length=5 + seed, batch=1 + seed % 2) for seed in range(8)]
    expected = [stock(model, i, max_new_tokens=10 + n) for n, i in enumerate(ids)]
    wrong: list[Any] = []

    def work(first: int) -> None:
        try:
            for n in itertools.chain(range(first, 8, 2), range(first, 8, 2)):
                target = model if n % 4 < 2 else other
                if not torch.equal(ours(target, ids[n], max_new_tokens=10 + n), expected[n]):
                    wrong.append(n)
                if specfx.stats(target).tokens != expected[n].numel() - ids[n].numel():
                    wrong.append(("stats", n))
        except BaseException as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong
    total = specfx.stats(model).total.tokens + specfx.stats(other).total.tokens
    assert total == 2 * sum(e.numel() - i.numel() for e, i in zip(expected, ids, strict=True))
    assert specfx.explain(model).pages_in_use == 0


class Gate:
    """Makes the compiled engine wait until `open` is set, and then fail if told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.started, self.open = threading.Event(), threading.Event()
        gate = self

        def waiting(*args: Any) -> Lowered:
            gate.started.set()
            assert gate.open.wait(60)
            if error is not None:
                raise error
            return lower(*args)

        monkeypatch.setattr("specfx.engines.ladder.lower", waiting)


def test_a_background_compilation_takes_over_between_two_calls(monkeypatch: pytest.MonkeyPatch, instant_inductor: None) -> None:
    gate = Gate(monkeypatch)
    model = specfx.speculate(small(), "suffix")
    expected = stock(model, prompt_of())
    assert gate.started.wait(60)
    assert specfx.explain(model).engine == "graph"
    assert torch.equal(ours(model, prompt_of()), expected)
    specfx.speculate(model, None)  # another method: the compilation goes on
    used = []

    def stop(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        if ids.shape[1] == 14:  # in mid-generation
            gate.open.set()
            model.generate.ready().wait()
        used.append(specfx.explain(model).pages_in_use)
        return torch.zeros(1, dtype=torch.bool)

    assert torch.equal(ours(model, prompt_of(), stopping_criteria=[stop]), expected)
    assert torch.equal(ours(model, prompt_of()), expected)
    assert specfx.explain(model).engine == "compiled"
    assert engine_of(model).name == "compiled"
    assert "graph" not in {r.reason.name for r in specfx.explain(model).refusals}
    assert specfx.explain(model).pages_in_use == 0


def test_a_background_compilation_that_fails_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, ZeroDivisionError("no such luck"))
    model = specfx.speculate(small(), "suffix")
    gate.open.set()
    model.generate.ready().wait()
    report = specfx.explain(model)
    assert report.engine == "graph"
    assert any(r.stage == "compiled engine" and "no such luck" in r.detail for r in report.refusals)
    assert torch.equal(ours(model, prompt_of()), stock(model, prompt_of()))


def test_weights_may_change_while_it_compiles(monkeypatch: pytest.MonkeyPatch, instant_inductor: None) -> None:
    gate = Gate(monkeypatch)
    model = specfx.speculate(small(), "suffix")
    assert gate.started.wait(60)
    in_place(model)
    threading.Timer(0.2, gate.open.set).start()
    for _ in range(2):
        assert torch.equal(ours(model, prompt_of()), stock(model, prompt_of()))
    model.generate.ready().wait()
    replaced(model)  # and replaced ones begin a new compilation
    for _ in range(2):
        assert torch.equal(ours(model, prompt_of()), stock(model, prompt_of()))


def test_compile_off_never_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specfx._compat.inductor_compile", lambda *a: pytest.fail("compiled"))
    assert specfx.explain(specfx.speculate(small(), compile="off")).engine == "graph"


def test_a_process_may_end_while_it_compiles() -> None:
    code = """
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        torch.set_num_threads(1)
        import specfx
        from tiny import tiny_model
        model = specfx.speculate(tiny_model("llama"), "suffix", compile="background")
        ids = torch.arange(10)[None]
        assert torch.equal(model.generate(ids, max_new_tokens=8), type(model).generate(model, ids, max_new_tokens=8))
        print("compiling" if model.generate.ready().compiling else "compiled")
    """
    # a fresh cache, so that there is something to compile
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == "compiling"
