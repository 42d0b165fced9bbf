"""What goes wrong ends in a typed error or a recorded fallback, and afterwards the model generates as stock and no page is lost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from tiny import CONTEXT, VOCAB, tiny_model
from torch import fx, nn
from transformers import PreTrainedModel

import specfx
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.engines import rewrite
from specfx.errors import (
    HeadError,
    KVPoolError,
    OptionError,
    PassError,
    PromptError,
    Reason,
    SpecfxError,
    UnsupportedModelError,
)
from specfx.kernels.tree_attention import tree_attention_
from specfx.passes.framework import Pass, PassContext, calls

ENGINES = ("graph", "eager")


def prompt_of(length: int = 10, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def stock(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return type(model).generate(model, ids, **{"max_new_tokens": 12, **kwargs})


def wrapped(engine: str = "graph", method: str | None = "suffix", **options: Any) -> PreTrainedModel:
    model = tiny_model("llama", num_hidden_layers=1)
    return specfx.speculate(model, method, **{"engine": engine, "compile": "off", **options})


@functools.cache
def soundness() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompts, and what a fresh stock model makes of them."""
    fresh = tiny_model("llama", num_hidden_layers=1)
    return [(ids, stock(fresh, ids)) for ids in (prompt_of(seed=3), prompt_of(7, seed=4, batch=3))]


def assert_sound(model: PreTrainedModel, engine: str | None = None) -> None:
    """Through the wrapper and without it the model generates as a fresh stock one, and nothing of a failed call is left."""
    wrapper: Any = model.generate
    for ids, expected in soundness():
        assert torch.equal(model.generate(ids, max_new_tokens=12), expected)
    report = specfx.explain(model)
    assert report.pages_in_use == 0
    assert engine in (None, report.engine), str(report)
    if hasattr(wrapper.ready().engine, "_sequences"):
        assert not wrapper.ready().engine._sequences
    if hasattr(wrapper.drafter, "_indexes"):
        assert not wrapper.drafter._indexes
    specfx.restore(model)
    assert "generate" not in model.__dict__
    for ids, expected in soundness():
        assert torch.equal(model.generate(ids, max_new_tokens=12), expected)


def assert_refused(model: PreTrainedModel, stage: str, reason: Reason, words: str) -> None:
    """The fallback stands in the report, with its cause."""
    report = specfx.explain(model)
    found = [r for r in report.refusals if r.stage == stage]
    assert [r.reason for r in found] == [reason], str(report)
    assert words in found[0].detail
    assert str(found[0]) in str(report)


# --- preparation -----------------------------------------------------------------------------------------------------------------------


def passes_with(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[..., int] | None = None, **changes: Any) -> None:
    """Put another `run` into the rewrite pass called `name`."""
    replaced = tuple(dataclasses.replace(p, run=run or p.run, **changes) if p.name == name else p for p in rewrite.REWRITE)
    assert replaced != rewrite.REWRITE
    monkeypatch.setattr(rewrite, "REWRITE", replaced)


def raising(module: fx.GraphModule, context: PassContext) -> int:
    module.graph.erase_node(module.graph.output_node())  # half of a rewrite, and then:
    raise ZeroDivisionError("in the middle of a pass")


@pytest.mark.parametrize("name", [p.name for p in rewrite.REWRITE])
def test_a_pass_that_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes_with(monkeypatch, name, raising)
    model = wrapped()
    record = next(r for r in specfx.explain(model).passes if r.name == name)
    assert not record.applied
    assert record.refusal is not None
    assert record.refusal.detail == "ZeroDivisionError: in the middle of a pass"
    needed = name in ("canonicalize_attention", "paged_kv")
    if needed:
        assert_refused(model, "graph engine", Reason.PASS_FAILED, name)
    assert_sound(model, "eager" if needed else "graph")


def test_a_pass_that_does_not_ensure_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def ensures(module: fx.GraphModule, context: PassContext) -> None:
        raise PassError("a marker is left")

    passes_with(monkeypatch, "paged_kv", ensures=ensures)
    model = wrapped()
    assert_refused(model, "graph engine", Reason.PASS_FAILED, "a marker is left")
    assert_sound(model, "eager")


def scaled_logits(module: fx.GraphModule) -> None:
    """A wrong number: the LM head's input is perturbed."""
    linear = [n for n in module.graph.nodes if n.op == "call_function" and "linear" in str(n.target)][-1]
    with module.graph.inserting_before(linear):
        linear.replace_input_with(linear.args[0], module.graph.call_function(torch.sin, (linear.args[0],)))


def not_a_number(module: fx.GraphModule) -> None:
    linear = next(n for n in module.graph.nodes if n.op == "call_function" and "linear" in str(n.target))
    with module.graph.inserting_before(linear):
        linear.replace_input_with(linear.args[0], module.graph.call_function(torch.div, (linear.args[0], 0.0)))


def wrong_shape(module: fx.GraphModule) -> None:
    """A graph that can't even run."""
    linear = [n for n in module.graph.nodes if n.op == "call_function" and "linear" in str(n.target)][-1]
    with module.graph.inserting_before(linear):
        linear.replace_input_with(linear.args[0], module.graph.call_function(torch.flatten, (linear.args[0],)))


def other_window(module: fx.GraphModule) -> None:
    """Right for short prompts: an attention window that the model doesn't have."""
    for node in calls(module, tree_attention_):
        node.args = (*node.args[:11], 64)


@pytest.mark.parametrize("corrupt", [scaled_logits, not_a_number, wrong_shape, other_window], ids=lambda c: c.__name__)
def test_a_pass_that_corrupts_the_graph_is_refused_by_the_gate(
    corrupt: Callable[[fx.GraphModule], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(module: fx.GraphModule, context: PassContext) -> int:
        corrupt(module)
        return 1

    broken = Pass("broken", run, lambda module, context: None)
    monkeypatch.setattr(rewrite, "REWRITE", (*rewrite.REWRITE, broken))
    model = wrapped()
    assert next(r for r in specfx.explain(model).passes if r.name == "broken").applied
    assert_refused(model, "graph engine", Reason.GATE_FAILED, "" if corrupt is not wrong_shape else "Error")
    assert_sound(model, "eager")


def failing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("broken on purpose\nand a second line")


def test_export_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", failing)
    model = wrapped("auto")
    assert_refused(model, "graph engine", Reason.CAPTURE_FAILED, "broken on purpose")
    assert_sound(model, "eager")


@pytest.mark.parametrize("mode", ["sync", "background"])
def test_inductor_failing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specfx._compat.inductor_compile", failing)
    model = wrapped("auto", compile=mode)
    model.generate.ready().wait()
    assert_refused(model, "compiled engine", Reason.LOWERING_FAILED, "Inductor: RuntimeError: broken on purpose")
    assert_sound(model, "graph")


@pytest.mark.parametrize("wrong", ["numbers", "raises", "shape"])
def test_an_artifact_that_is_wrong_is_never_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(module: fx.GraphModule, examples: Any, options: Any) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            logits, hidden, *rest = module(*inputs)
            if wrong == "numbers":
                return logits.roll(1, -1), hidden, *rest
            return failing() if wrong == "raises" else (logits[:, :, 1:], hidden, *rest)

        return call

    monkeypatch.setattr("specfx._compat.inductor_compile", compile)
    model = wrapped("auto", compile="sync")
    assert_refused(model, "compiled engine", Reason.COMPILED_DIFFERS, "RuntimeError" if wrong == "raises" else "logits")
    assert_sound(model, "graph")


def test_kernels_that_don_t_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Any:
        raise specfx.errors.LoweringError("no C++ compiler: g++ not found")

    monkeypatch.setattr("specfx.kernels.cpu_build.load", load)
    model = wrapped()
    assert_refused(model, "CPU kernels", Reason.LOWERING_FAILED, "no C++ compiler")
    assert "remedy: install a C++ compiler" in str(specfx.explain(model))
    assert_sound(model, "graph")


# --- options, heads and models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [("eagle", {}, "unknown method 'eagle'.*'suffix', 'mtp'"), ("suffix", {"heads": 3}, "no option 'heads'.*max_tree_depth.*kv_pool")],
)
def test_an_unknown_method_or_option(method: str, options: dict[str, Any], words: str) -> None:
    model = wrapped()
    with pytest.raises(OptionError, match=words):
        specfx.speculate(model, method, **options)
    assert_sound(model, "graph")


def test_a_head_of_the_wrong_width(tmp_path: Path) -> None:
    wide = tiny_model("llama", hidden_size=64, head_dim=16)
    path = save_head(MtpHead.from_target(wide), tmp_path)
    model = wrapped()
    with pytest.raises(HeadError, match=r"eh_proj.weight is \[64, 128\] in the file, \[32, 64\] for this target.*Train a head"):
        specfx.speculate(model, "mtp", head=path, engine="graph", compile="off")
    assert_sound(model, "graph")


@contextmanager
def unsupported(model: Any, words: str) -> Iterator[None]:
    """`speculate` refuses the model and leaves it as it is; what the block does then makes it stock again."""
    with pytest.raises(UnsupportedModelError, match=words):
        specfx.speculate(model, "suffix", engine="eager")
    assert "generate" not in model.__dict__
    yield
    fresh = tiny_model("llama", num_hidden_layers=1)
    specfx.speculate(fresh, "suffix", engine="eager")
    assert_sound(fresh)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def test_a_peft_model() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", num_hidden_layers=1)
    adapted = get_peft_model(model, lora())
    expected = adapted.generate(input_ids=prompt_of(), max_new_tokens=12)
    with unsupported(adapted, r"PeftModel\w* carries a PEFT adapter: merge it first"):
        pass
    with unsupported(model, "carries a PEFT adapter: merge it first"):
        pass
    assert torch.equal(adapted.generate(input_ids=prompt_of(), max_new_tokens=12), expected)
    merged = adapted.merge_and_unload()  # the remedy
    specfx.speculate(merged, "suffix", engine="graph", compile="off")
    assert specfx.explain(merged).engine == "graph"
    assert torch.equal(merged.generate(prompt_of(), max_new_tokens=12), stock(merged, prompt_of()))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_that_comes_after_speculate(engine: str) -> None:
    """Refused by name or followed, never ignored."""
    torch.manual_seed(0)
    model = wrapped(engine)
    before = model.generate(prompt_of(), max_new_tokens=12)
    get_peft_model(model, lora())
    with pytest.raises(UnsupportedModelError, match="carries a PEFT adapter: merge it first"):
        model.generate(prompt_of(), max_new_tokens=12)
    specfx.restore(model)
    assert not torch.equal(model.generate(prompt_of(), max_new_tokens=12), before)


def test_a_model_with_offload_hooks() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    add_hook_to_module(model.model.layers[0].mlp, AlignDevicesHook(execution_device="cpu"))
    with unsupported(model, r"module 'model.layers.0.mlp' has an offload hook.*load it on one device"):
        remove_hook_from_module(model, recurse=True)
    specfx.speculate(model, "suffix", engine="graph", compile="off")
    add_hook_to_module(model.model.layers[0].mlp, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(UnsupportedModelError, match="has an offload hook"):
        model.generate(prompt_of(), max_new_tokens=4)
    remove_hook_from_module(model, recurse=True)
    assert_sound(model, "graph")


def test_a_quantised_model() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    linear = model.model.layers[0].mlp.up_proj
    weight = linear.weight
    linear.weight = nn.Parameter(weight.detach().round().to(torch.int8), requires_grad=False)
    with unsupported(model, r"quantised \(model.layers.0.mlp.up_proj.weight is torch.int8\): load it dequantised"):
        linear.weight = weight


class DTensor(nn.Parameter):
    """Named as torch's distributed tensor, which a tensor-parallel model's weights are."""


def test_a_tensor_parallel_model_is_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    linear = model.model.layers[0].mlp.up_proj
    weight = linear.weight
    linear.weight = DTensor(weight.detach(), requires_grad=False)
    with unsupported(model, r"tensor-parallel \(model.layers.0.mlp.up_proj.weight is a DTensor\): load it without tp_plan"):
        linear.weight = weight


def test_a_quantised_model_is_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
    with unsupported(model, r"is quantised \(gptq\): load it dequantised"):
        del model.hf_quantizer


# --- calls -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["graph", "compiled"])
def test_a_pool_too_small_for_a_prompt(engine: str, instant_inductor: None) -> None:
    model = wrapped(engine, kv_pool=1, compile="sync")
    assert specfx.explain(model).engine == engine
    with pytest.raises(KVPoolError, match=r"holds 1 pages of 64 tokens, 2 are needed.*raise kv_pool"):
        model.generate(prompt_of(100), max_new_tokens=4)
    assert specfx.explain(model).pages_in_use == 0
    with pytest.raises(KVPoolError, match=r"2 are needed \(1 in use\)"):  # the first row fits, the second doesn't
        model.generate(prompt_of(batch=2), max_new_tokens=4)
    assert specfx.explain(model).pages_in_use == 0
    assert torch.equal(model.generate(prompt_of(), max_new_tokens=12), stock(model, prompt_of()))
    specfx.speculate(model, "suffix", engine=engine, compile="sync", kv_pool=3)  # the remedy
    assert_sound(model, engine)
    model = wrapped(engine, kv_pool=0.001, compile="sync")
    assert_sound(model, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_longer_than_the_context(engine: str) -> None:
    model = wrapped(engine)
    for length in (CONTEXT, CONTEXT + 9):
        with pytest.raises(PromptError, match=rf"the prompt has {length} tokens, the model's context {CONTEXT}: shorten the prompt"):
            model.generate(prompt_of(length), max_new_tokens=4)
    with pytest.raises(PromptError):
        model.generate(inputs=prompt_of(CONTEXT), max_new_tokens=4)
    ids = prompt_of(CONTEXT - 3)
    assert torch.equal(model.generate(ids, max_new_tokens=3), stock(model, ids, max_new_tokens=3))
    assert_sound(model, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_prompt(engine: str) -> None:
    model = wrapped(engine)
    for ids in (torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int64)):
        with pytest.raises(PromptError, match=r"the prompt is empty \(input_ids of shape .*\): give at least one token"):
            model.generate(ids, max_new_tokens=4)
    with pytest.raises(PromptError, match="the prompt is empty"):
        model.generate(prompt_of(batch=2), attention_mask=torch.tensor([[1] * 10, [0] * 10]), max_new_tokens=4)
    assert_sound(model, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_beams(engine: str) -> None:
    model = wrapped(engine)
    expected = stock(model, prompt_of(), num_beams=4)
    assert torch.equal(model.generate(prompt_of(), max_new_tokens=12, num_beams=4), expected)
    assert specfx.explain(model).stock_calls == {"beam search": 1}
    assert_sound(model, engine)


def test_a_call_that_transformers_itself_refuses() -> None:
    model = wrapped()
    for arguments in ({"nonsense": 1}, {"num_return_sequences": 2}, {"max_new_tokens": -1}):
        with pytest.raises(ValueError) as ours:  # noqa: PT011
            model.generate(prompt_of(), **arguments)
        with pytest.raises(ValueError) as theirs:  # noqa: PT011
            type(model).generate(model, prompt_of(), **arguments)
        assert str(ours.value) == str(theirs.value)
    assert_sound(model, "graph")


def test_every_error_is_specfxs_own() -> None:
    for error in (OptionError, UnsupportedModelError, PromptError, KVPoolError, HeadError, PassError):
        assert issubclass(error, SpecfxError)
