"""What users do to a model and to a call that a drop-in must not miss: the result is stock's, whatever it is, accelerated or not."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_generate import stock, tokenizer
from tiny import CONTEXT, tiny_model
from torch import distributed as dist
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import MaxLengthCriteria, RepetitionPenaltyLogitsProcessor, StopStringCriteria, stopping_criteria

import specfx
from specfx.engines.stock import StockEngine
from specfx.errors import KVPoolError, Reason, UnsupportedModelError
from specfx.runtime import kv_pool

IDS = torch.arange(1, 11)[None]
ENGINES = ("graph", "eager")


def wrapped(model: PreTrainedModel | None = None, method: str | None = "suffix", engine: str = "graph") -> PreTrainedModel:
    return specfx.speculate(model or tiny_model("llama"), method, engine=engine, compile="off")


@pytest.fixture(scope="module")
def prepared() -> Callable[..., PreTrainedModel]:
    """For tests that leave the model as it was."""
    models = {engine: tiny_model("llama") for engine in ENGINES}

    def again(engine: str = "graph", method: str | None = "suffix") -> PreTrainedModel:
        models[engine].generation_config = GenerationConfig()
        return wrapped(models[engine], method, engine)

    return again


def assert_as_stock(model: PreTrainedModel, reason: str | None = None, **kwargs: Any) -> None:
    """The call gives stock's tokens; accelerated, or (reason) handed over."""
    before = specfx.explain(model).stock_calls
    assert torch.equal(model.generate(IDS, max_new_tokens=8, **kwargs), stock(model, IDS, max_new_tokens=8, **kwargs))
    reasons = list(specfx.explain(model).stock_calls - before)
    assert len(reasons) == (reason is not None), reasons
    assert reason is None or reason in reasons[0]


@contextmanager
def waiting_for_an_engine(model: PreTrainedModel) -> Iterator[None]:
    """Stock serves `model`."""
    keeper = model.generate.ready().keeper
    engine, keeper.engine = keeper.engine, StockEngine()
    try:
        yield
    finally:
        keeper.engine = engine


# --- models that were changed by hand ----------------------------------------------------------------------------------------------------


def _hook(module: torch.nn.Module) -> Callable[[], None]:
    return module.register_forward_hook(lambda module, inputs, output: output * 2).remove


def _pre_hook(module: torch.nn.Module) -> Callable[[], None]:
    return module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)).remove


def _forward(module: torch.nn.Module) -> Callable[[], None]:
    old = module.forward

    @functools.wraps(old)
    def steered(x: torch.Tensor) -> torch.Tensor:
        return old(x) * 2

    module.forward = steered  # type: ignore[method-assign]
    return lambda: vars(module).pop("forward")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [_hook, _pre_hook, _forward])
def test_hooks_and_forwards_take_part_as_long_as_they_are_there(change: Callable[..., Callable[[], None]], engine: str) -> None:
    model = tiny_model("llama")
    plain = stock(model, IDS, max_new_tokens=8)
    undo = change(model.model.layers[0].mlp)
    assert not torch.equal(stock(model, IDS, max_new_tokens=8), plain)
    wrapped(model, engine=engine)  # prepared while it is there
    assert_as_stock(model, "module 'model.layers.0.mlp'")
    undo()
    assert torch.equal(model.generate(IDS, max_new_tokens=8), plain)
    assert_as_stock(model)
    change(model.model.layers[0].mlp)  # and again, after the engines were prepared
    assert_as_stock(model, "module 'model.layers.0.mlp'")


def test_hooks_on_all_modules_take_part() -> None:
    model = wrapped()
    seen: list[str] = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    try:
        assert_as_stock(model, "forward hooks on all modules")
    finally:
        hook.remove()
    assert "LlamaMLP" in seen


@pytest.mark.parametrize("engine", ENGINES)
def test_what_transformers_hangs_on_a_model_is_no_hindrance(engine: str) -> None:
    """Its hooks that collect hidden states stay once they were asked for."""
    model = wrapped(engine=engine)
    model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert_as_stock(model)
    wrapped(model, "suffix", engine)
    assert_as_stock(model)


class Tripled(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] * 3
        return inputs


def test_a_class_that_prepares_its_inputs_itself_is_stocks() -> None:
    model = tiny_model("llama")
    plain = stock(model, IDS, max_new_tokens=8)
    model.__class__ = Tripled
    wrapped(model)
    assert not torch.equal(stock(model, IDS, max_new_tokens=8), plain)
    assert_as_stock(model, "prepare_inputs_for_generation")


def test_a_model_without_weights_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_model("llama").config)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        specfx.speculate(model)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_without_weights_can_be_replaced(engine: str) -> None:
    model = wrapped(engine=engine)
    plain = model.generate(IDS, max_new_tokens=8)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    assert_as_stock(model)
    assert not torch.equal(model.generate(IDS, max_new_tokens=8), plain)


# --- calls -------------------------------------------------------------------------------------------------------------------------------


class Early(MaxLengthCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.max_length - 3)


class AcrossRows(RepetitionPenaltyLogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - 20 * torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[1]).sum(0)


def test_what_is_derived_from_a_known_criterion_or_processor_is_asked(prepared: Any) -> None:
    model = prepared()
    assert_as_stock(model, stopping_criteria=[Early(18)])
    assert model.generate(IDS, max_new_tokens=8, stopping_criteria=[Early(18)]).shape[1] == 15
    several = torch.cat([IDS, IDS + 7])
    asked: dict[str, Any] = {"max_new_tokens": 8, "logits_processor": [AcrossRows(1.1)]}
    assert torch.equal(model.generate(several, **asked), stock(model, several, **asked))
    assert any("AcrossRows" in reason for reason in specfx.explain(model).stock_calls)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", [None, "suffix"])
@pytest.mark.parametrize("how", ["nan", "inf", "processor"])
def test_what_cannot_be_drawn_is_an_error_as_in_stock(how: str, method: str | None, engine: str) -> None:
    model = wrapped(method=method, engine=engine)
    asked: dict[str, Any] = {"max_new_tokens": 4}
    if how == "processor":
        asked["logits_processor"] = [lambda ids, scores: torch.full_like(scores, -torch.inf)]
    else:
        weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        weight[7] = float("nan") if how == "nan" else 1e38
        model.lm_head.weight = weight
    for generate in (functools.partial(stock, model), model.generate):
        with pytest.raises(RuntimeError, match="probability tensor contains either `inf`, `nan` or element < 0"):
            generate(IDS, do_sample=True, **asked)
    assert torch.equal(model.generate(IDS, **asked), stock(model, IDS, **asked)), "greedy"
    assert specfx.explain(model).pages_in_use == 0


def test_nothing_to_draw_behind_a_prompt_is_an_error_while_there_is_no_engine(prepared: Any) -> None:
    model = prepared()
    with waiting_for_an_engine(model), pytest.raises(RuntimeError, match="probability tensor"):
        model.generate(IDS, max_new_tokens=4, do_sample=True, logits_processor=[lambda ids, scores: scores * 0 - torch.inf])


@pytest.mark.parametrize("as_config", [False, True])
def test_stop_strings_of_a_call_beside_the_models(as_config: bool, prepared: Any) -> None:
    model = prepared()
    model.generation_config.stop_strings = ["<99>"]
    asked: dict[str, Any] = {"generation_config": GenerationConfig(stop_strings=["<73>"])} if as_config else {"stop_strings": ["<73>"]}
    assert_as_stock(model, "stop_strings in the model's generation_config", tokenizer=tokenizer(), **asked)


def test_stop_strings_beside_a_criterion_of_the_callers(prepared: Any) -> None:
    model = prepared()
    text = stock(model, IDS, max_new_tokens=8)[0, 10:].tolist()
    words = tokenizer()
    asked = {"stop_strings": [f"<{text[1]}>"], "tokenizer": words}
    assert_as_stock(model, stopping_criteria=[StopStringCriteria(words, [f"<{text[4]}>"])], **asked)


@pytest.mark.parametrize("method", [None, "suffix"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("length", [5.0, 5.5, torch.tensor(5)], ids=str)
def test_lengths_of_other_types(length: Any, engine: str, method: str | None, prepared: Any) -> None:
    model = prepared(engine, method)
    assert torch.equal(model.generate(IDS, max_new_tokens=length), stock(model, IDS, max_new_tokens=length))
    assert not specfx.explain(model).stock_calls


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"use_cache": None}, "use_cache=None"),
        ({"use_cache": 0}, "use_cache=0"),
        ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep=tensor([0])"),
        ({"attention_mask": torch.full_like(IDS, 2)}, "an attention mask of other values than 0 and 1"),
    ],
    ids=["cache", "no cache", "logits", "mask"],
)
def test_settings_that_mean_something_odd_to_stock(asked: dict[str, Any], reason: str, prepared: Any) -> None:
    model = prepared()
    assert_as_stock(model, reason, **asked)
    assert not torch.equal(stock(model, IDS, max_new_tokens=8, **asked), stock(model, IDS, max_new_tokens=8)), "not odd any more"


def test_a_mask_that_is_longer_than_the_prompt_is_stocks(prepared: Any) -> None:
    model = prepared()
    asked = {"bos_token_id": 3, "attention_mask": torch.tensor([[0, 0, 0, 1]]), "max_new_tokens": 8}
    assert torch.equal(model.generate(**asked), stock(model, **asked))
    assert list(specfx.explain(model).stock_calls) == ["an attention mask that is not of the input_ids' shape"]


def test_end_tokens_in_a_list_of_lists(prepared: Any) -> None:
    end = stock(prepared(), IDS, max_new_tokens=8)[0, 14].item()
    assert_as_stock(prepared(), eos_token_id=[[end]])


def test_continuous_batching_is_stocks(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(model: Any, inputs: list[list[int]], **more: Any) -> dict[str, Any]:  # transformers' own takes a minute to begin
        return {f"req_{i}": SimpleNamespace(prompt_ids=ids, generated_tokens=[7, 9]) for i, ids in enumerate(inputs)}

    monkeypatch.setattr(LlamaForCausalLM, "generate_batch", batch)
    assert_as_stock(prepared(), "continuous batching", cache_implementation="paged")


@pytest.fixture
def a_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_processes_that_must_stay_in_step_do(prepared: Any, a_process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared()
    assert_as_stock(model, "synced_gpus", synced_gpus=True)
    monkeypatch.setattr(model, "_is_fsdp_managed_module", True, raising=False)  # as sharding does
    assert_as_stock(model)  # by one process
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: None)
    assert_as_stock(model, "synced_gpus")
    assert_as_stock(model, synced_gpus=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("token", [-1, 128])
def test_tokens_outside_the_vocabulary_are_the_error_that_they_are_in_stock(token: int, engine: str, prepared: Any) -> None:
    model = prepared(engine)
    ids = IDS.clone()
    ids[0, 3] = token
    for generate in (functools.partial(stock, model), model.generate):
        with pytest.raises(IndexError):
            generate(ids, max_new_tokens=4)
    assert_as_stock(model)


def test_a_prompt_of_three_dimensions_is_the_error_that_it_is_in_stock(prepared: Any) -> None:
    model = prepared()
    errors = []
    for generate in (functools.partial(stock, model), model.generate):
        with pytest.raises(Exception, match=r".") as raised:
            generate(IDS[None], max_new_tokens=4)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


def test_text_for_a_model_that_also_takes_images_is_accelerated() -> None:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122}
    text = tiny_model("gemma3")
    config = Gemma3Config(text_config=text.config.to_dict(), vision_config=vision, tie_word_embeddings=False, **tokens)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.generation_config = GenerationConfig()
    wrapped(model)
    assert_as_stock(model)
    assert len(set(model.generate(IDS, max_new_tokens=8)[0, 10:].tolist())) > 3
    image = torch.tensor([[5, 121, 120, 120, 120, 120, 122, 3]])
    asked = {"max_new_tokens": 8, "pixel_values": torch.ones(1, 3, 28, 28), "token_type_ids": (image == 120).long()}
    assert torch.equal(model.generate(image, **asked), stock(model, image, **asked))
    assert any("model inputs" in reason for reason in specfx.explain(model).stock_calls)


def test_explain_does_not_wait_for_a_call_that_is_running(prepared: Any) -> None:
    model = prepared()
    begun, goes_on, told = threading.Event(), threading.Event(), threading.Event()

    def judge(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        begun.set()
        goes_on.wait(60)
        return torch.zeros(len(ids), dtype=torch.bool)

    def look() -> None:
        assert specfx.explain(model).engine == "graph"
        told.set()

    call = threading.Thread(target=model.generate, args=(IDS,), kwargs={"max_new_tokens": 4, "stopping_criteria": [judge]})
    call.start()
    assert begun.wait(60)
    looking = threading.Thread(target=look)
    looking.start()
    looked = told.wait(30)
    goes_on.set()
    call.join()
    looking.join()
    assert looked


# --- before and after an engine is ready --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"logits_processor": [lambda ids, scores: scores]}, {"cache_implementation": "dynamic"}], ids=["p", "c"])
def test_a_sampled_call_that_is_always_stocks_is_so_from_the_beginning(asked: dict[str, Any], prepared: Any) -> None:
    model = prepared()
    several = torch.cat([IDS, IDS + 7])

    def text(generate: Callable[..., torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(0)
        return generate(several, max_new_tokens=8, do_sample=True, **asked)

    with waiting_for_an_engine(model):
        before = text(model.generate)
    assert torch.equal(text(model.generate), before)
    assert torch.equal(before, text(functools.partial(stock, model)))


@pytest.mark.parametrize("kind", [specfx.PageCache, DynamicCache, None])
def test_a_chat_that_began_without_an_engine_goes_on_with_it(kind: Any, prepared: Any) -> None:
    model = prepared()
    cache = None if kind is None else kind()
    with waiting_for_an_engine(model):
        first = model.generate(IDS, max_new_tokens=6, past_key_values=cache, return_dict_in_generate=True)
    cache = first.past_key_values
    calls = specfx.explain(model).stock_calls
    text = first.sequences
    for _ in range(2):
        longer = torch.cat([text, IDS + 20], 1)
        text = model.generate(longer, max_new_tokens=6, past_key_values=cache)
        assert torch.equal(text, stock(model, longer, max_new_tokens=6))
    assert specfx.explain(model).stock_calls == calls
    assert specfx.stats(model).last.reused_tokens == longer.shape[1] - 11


# --- more tokens than there is memory for ------------------------------------------------------------------------------------------------


def latest(text: list[int]) -> int:
    """The token of `text` that is last to come up in it."""
    return max(set(text), key=text.index)


@pytest.mark.parametrize("method", [None, "suffix"])
@pytest.mark.parametrize("most", [float("inf"), 10**12], ids=str)
def test_texts_that_may_become_longer_than_the_memory_is(most: Any, method: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is taken as they grow. They end behind the model's context, which is warned of as in stock."""
    model = wrapped(method=method)
    two = torch.cat([IDS, IDS + 20])
    ends = [latest(row.tolist()) for row in stock(model, two, max_new_tokens=900)[:, 10:]]
    asked = {"max_new_tokens": most, "eos_token_id": ends, "pad_token_id": 0}
    warned: list[str] = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", warned.append)
    expected = stock(model, two, **asked)
    assert expected.shape[1] > CONTEXT
    assert torch.equal(model.generate(two, **asked), expected)
    assert not specfx.explain(model).stock_calls
    assert specfx.explain(model).pages_in_use == 0
    assert warned[0] == warned[-1]


def test_a_chat_that_may_become_longer_than_the_memory_is_keeps_its_pages(prepared: Any) -> None:
    model, cache = prepared(), DynamicCache()
    text = model.generate(IDS, max_new_tokens=10**12, past_key_values=cache, stopping_criteria=[lambda ids, scores: ids.shape[1] > 400])
    asked = {"max_new_tokens": 10**12, "stopping_criteria": [lambda ids, scores: ids.shape[1] > 800]}
    longer = torch.cat([text, IDS], 1)
    assert torch.equal(model.generate(longer, past_key_values=cache, **asked), stock(model, longer, **asked))
    assert specfx.stats(model).last.reused_tokens == text.shape[1] - 1


def test_a_text_that_outgrows_the_memory_is_an_error_and_the_next_call_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped()
    pool = model.generate.ready().engine.pool
    monkeypatch.setattr(kv_pool, "free_memory", lambda device: 20 * pool.page_bytes - pool.pages * pool.page_bytes)
    with pytest.raises(KVPoolError, match="no room for a text of more than"):
        model.generate(IDS, max_new_tokens=10**12)
    with pytest.raises(KVPoolError, match="MiB more"):
        model.generate(IDS.repeat(6, 1) + torch.arange(6)[:, None], max_new_tokens=10**12)
    assert specfx.explain(model).pages_in_use == 0
    assert_as_stock(model)


# --- batches where no engine takes them whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "graph"])
def test_the_eager_engine_takes_a_batch_only_if_it_is_asked_for_by_name(engine: str) -> None:
    """One after another, the sequences would take longer than stock takes for all."""
    model = wrapped(tiny_model("qwen3_next"), engine=engine)
    two = torch.cat([IDS, IDS + 20])
    first = {"attention_mask": torch.ones_like(two), "pad_token_id": 0}
    first["attention_mask"][1, :3] = 0
    assert_as_stock(model)
    assert specfx.explain(model).engine == "eager"
    for asked in ({"inputs": two, **first}, {"inputs": IDS, "do_sample": True, "num_return_sequences": 2, "top_k": 1}):
        expected = stock(model, **asked, max_new_tokens=8)
        assert torch.equal(model.generate(**asked, max_new_tokens=8), expected)
    assert specfx.explain(model).stock_calls == {Reason.ONE_BY_ONE.value: 2}
    specfx.speculate(model, "suffix", engine="eager")
    assert torch.equal(model.generate(two, **first, max_new_tokens=8), stock(model, two, **first, max_new_tokens=8))
    assert not specfx.explain(model).stock_calls


def test_a_batch_that_no_engine_takes_whole_is_drawn_as_an_engine_draws() -> None:
    model, texts = tiny_model("qwen3_next"), []
    two = torch.cat([IDS, IDS + 20])
    for engine in ("auto", "eager"):
        wrapped(model, engine=engine)
        cache = DynamicCache(config=model.config)
        torch.manual_seed(5)
        texts.append(model.generate(two, do_sample=True, max_new_tokens=8, past_key_values=cache))
        longer = torch.cat([texts[-1], two + 9], 1)
        texts[-1] = model.generate(longer, do_sample=True, max_new_tokens=8, past_key_values=cache)
        assert set(specfx.explain(model).stock_calls) == ({Reason.ONE_BY_ONE.value} if engine == "auto" else set())
    assert torch.equal(*texts)
