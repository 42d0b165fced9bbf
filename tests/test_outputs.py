"""What `generate` returns besides tokens, against stock: scores, logits, and the cache of a conversation."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation import GenerateDecoderOnlyOutput

import specfx
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.runtime import decode

ENGINES = ("graph", "eager")
METHODS = (None, "suffix", "mtp")
PAD = 0


def prompt_of(length: int = 20, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def stock(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    return type(model).generate(model, *args, **kwargs)


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], PreTrainedModel]:
    return {}


@pytest.fixture
def wrap(models: dict[tuple[str, str], PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``wrap(engine, method)``: each engine is prepared once."""

    def wrapped(engine: str = "graph", method: str | None = "suffix", name: str = "llama", **options: Any) -> PreTrainedModel:
        if (engine, name) not in models:
            models[engine, name] = tiny_model(name)
        model = models[engine, name]
        model.generation_config = GenerationConfig()
        if method == "mtp":
            options["head"] = save_head(MtpHead.from_target(model), tmp_path_factory.mktemp("head"))
        specfx.speculate(model, method, engine=engine, compile="off", page_size=8, **options)
        assert specfx.explain(model).engine == engine
        return model

    return wrapped


def assert_ours(model: PreTrainedModel, pages: bool = True) -> None:
    gc.collect()
    report = specfx.explain(model)
    assert not report.stock_calls
    assert not pages or report.pages_in_use == 0


@pytest.fixture(autouse=True)
def _share_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "FEWEST_SHARED", 1)


# --- scores and logits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}, {"suppress_tokens": [5, 6]}], ids=str)
def test_scores_and_logits_are_stocks(engine: str, method: str | None, settings: dict[str, Any], wrap: Any) -> None:
    """Also of rows that ended early, over whose padding stock runs on."""
    model = wrap(engine, method)
    free = stock(model, prompt_of(batch=3), max_new_tokens=30, pad_token_id=PAD, **settings)[:, 20:].tolist()
    eos = [free[0][5], free[1][11]]
    for batch, more in ((1, {}), (3, {}), (3, {"eos_token_id": eos})):
        arguments = {"max_new_tokens": 24, "pad_token_id": PAD, "return_dict_in_generate": True, **settings, **more}
        for asked in ({"output_scores": True}, {"output_logits": True}, {"output_scores": True, "output_logits": True}):
            got = model.generate(prompt_of(batch=batch), use_cache=False, **arguments, **asked)
            expected = stock(model, prompt_of(batch=batch), use_cache=False, **arguments, **asked)
            assert isinstance(got, GenerateDecoderOnlyOutput)
            assert torch.equal(got.sequences, expected.sequences)
            assert got.keys() == expected.keys()
            for name in ("scores", "logits"):
                ours, theirs = getattr(got, name), getattr(expected, name)
                assert (ours is None) == (theirs is None)
                for a, b in zip(ours or (), theirs or (), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        if eos in more.values():
            assert len({len(set(row)) for row in got.sequences.tolist()}) > 1, "rows ended at different times"
    del got
    assert_ours(model)


def test_transition_scores(wrap: Any) -> None:
    model = wrap()
    arguments = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
    got, expected = model.generate(prompt_of(), **arguments), stock(model, prompt_of(), **arguments)
    torch.testing.assert_close(
        model.compute_transition_scores(got.sequences, got.scores, normalize_logits=True),
        model.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True),
        rtol=1e-3,
        atol=1e-3,
    )


def test_sampled_scores_are_those_that_were_drawn_from(wrap: Any) -> None:
    model = wrap()
    torch.manual_seed(5)
    got = model.generate(
        prompt_of(batch=2), max_new_tokens=12, do_sample=True, top_k=3, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt_of(batch=2), max_new_tokens=12, do_sample=True, top_k=3), got.sequences), (
        "asking changes nothing"
    )
    tokens = got.sequences[:, 20:]
    for step, (scores, logits) in enumerate(zip(got.scores, got.logits, strict=True)):
        assert (scores.isfinite().sum(-1) == 3).all()
        assert scores.gather(1, tokens[:, step : step + 1]).isfinite().all()
        with torch.no_grad():
            raw = model(got.sequences[:, : 20 + step]).logits[:, -1]
        torch.testing.assert_close(logits, raw, rtol=1e-3, atol=1e-3)
    plain = model.generate(prompt_of(), max_new_tokens=12, output_scores=True)  # without return_dict there is nothing to put them in
    assert torch.equal(plain, stock(model, prompt_of(), max_new_tokens=12))


def test_a_criterion_is_shown_the_scores(wrap: Any) -> None:
    def stop(ids: torch.Tensor, scores: Any, shown: list[int]) -> torch.Tensor:
        shown.append(len(scores))
        return ids[:, -1] == scores[-1].argmax(-1) if len(scores) == 5 else torch.zeros(1, dtype=torch.bool)

    model = wrap()
    for generate in (model.generate, lambda *a, **k: stock(model, *a, **k)):
        shown: list[int] = []
        criteria = [lambda ids, scores, shown=shown: stop(ids, scores, shown)]
        out = generate(
            prompt_of(), max_new_tokens=12, return_dict_in_generate=True, output_scores=True, use_cache=False, stopping_criteria=criteria
        )
        assert shown == [1, 2, 3, 4, 5]
        assert out.sequences.shape[1] == 25


# --- conversations ---------------------------------------------------------------------------------------------------------------------


def turn(text: torch.Tensor, seed: int, length: int = 9) -> torch.Tensor:
    return torch.cat([text, prompt_of(length, seed, len(text))], 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_conversation_prefills_only_what_is_new(engine: str, method: str | None, batch: int, wrap: Any) -> None:
    model = wrap(engine, method)
    text, cache = prompt_of(batch=batch), None
    for number in range(4):
        expected = stock(model, text, max_new_tokens=11)
        out = model.generate(text, max_new_tokens=11, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        assert cache is None or out.past_key_values is cache
        cache = out.past_key_values
        assert isinstance(cache, DynamicCache)
        assert cache.get_seq_length() == expected.shape[1] - 1
        last, new = specfx.stats(model).last, text.shape[1] if number == 0 else 10
        again = batch if method == "mtp" and engine == "graph" and number else 0  # the head's last pair
        assert last.prompt_tokens == new * batch + again
        assert last.reused_tokens == text.shape[1] * batch - last.prompt_tokens
        if engine == "graph":
            assert specfx.explain(model).pages_in_use == batch * -(-cache.get_seq_length() // 8) or method is not None
        text = turn(expected, number)
    del out, cache
    assert_ours(model)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_cache_of_the_callers_is_filled(engine: str, wrap: Any) -> None:
    model = wrap(engine)
    cache = specfx.PageCache()
    first = model.generate(prompt_of(), max_new_tokens=6, past_key_values=cache)
    assert torch.equal(first, stock(model, prompt_of(), max_new_tokens=6))
    assert cache.get_seq_length() == 25
    second = model.generate(turn(first, 1), max_new_tokens=6, past_key_values=cache)
    assert torch.equal(second, stock(model, turn(first, 1), max_new_tokens=6))
    assert specfx.stats(model).last.reused_tokens == 25
    assert cache.get_seq_length() == second.shape[1] - 1
    del cache
    assert_ours(model)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("configured", [False, True])
def test_an_ordinary_cache_of_the_callers_is_filled_as_stock_fills_it(
    configured: bool, batch: int, name: str, engine: str, wrap: Any
) -> None:
    model = wrap(engine, "suffix", name)
    ours, theirs = (DynamicCache(**({"config": model.config} if configured else {})) for _ in range(2))
    text, mask = prompt_of(batch=batch), torch.ones(batch, 20, dtype=torch.long)
    mask[0, :4] = batch == 1
    for number in range(3):
        arguments = {"max_new_tokens": 7, "attention_mask": mask, "pad_token_id": PAD, "return_dict_in_generate": number == 1}
        got = model.generate(text, past_key_values=ours, **arguments)
        expected = stock(model, text, past_key_values=theirs, **arguments)
        if number == 1:
            assert got.past_key_values is ours
            got, expected = got.sequences, expected.sequences
        assert torch.equal(got, expected)
        assert ours.get_seq_length() == theirs.get_seq_length() == got.shape[1] - 1
        assert specfx.stats(model).last.reused_tokens == (0 if number == 0 else int(mask.sum()) - 10 * batch)
        for (k, v, *_), (j, w, *_) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(k, j, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-3)
        text = turn(got, number)
        mask = torch.cat([mask, mask.new_ones(batch, text.shape[1] - mask.shape[1])], 1)
    assert not specfx.explain(model).stock_calls
    other = prompt_of(60, 5, batch)  # not what the cache is of: what that gives is stock's affair
    assert torch.equal(
        model.generate(other, past_key_values=ours, max_new_tokens=3), stock(model, other, past_key_values=theirs, max_new_tokens=3)
    )
    assert any("input_ids that don't go on from past_key_values" in r for r in specfx.explain(model).stock_calls)
    del ours
    gc.collect()
    assert specfx.explain(model).pages_in_use == 0


def test_an_ordinary_cache_that_other_code_has_used_is_stocks(wrap: Any) -> None:
    model = wrap()
    caches = [DynamicCache(), DynamicCache()]
    text = model.generate(prompt_of(), max_new_tokens=6, past_key_values=caches[0])
    stock(model, prompt_of(), max_new_tokens=6, past_key_values=caches[1])
    assert not specfx.explain(model).stock_calls
    for cache in caches:
        cache.crop(-5)
    longer = turn(text, 1)
    got = model.generate(longer, max_new_tokens=6, past_key_values=caches[0])
    assert torch.equal(got, stock(model, longer, max_new_tokens=6, past_key_values=caches[1]))
    static = StaticCache(config=model.config, max_cache_len=99)
    assert torch.equal(model.generate(text, max_new_tokens=6, past_key_values=static), stock(model, text, max_new_tokens=6))
    (calls,) = specfx.explain(model).stock_calls.values()
    assert calls == 2


def conversation(model: PreTrainedModel, **more: Any) -> tuple[torch.Tensor, Any]:
    out = model.generate(prompt_of(), max_new_tokens=6, return_dict_in_generate=True, **more)
    return out.sequences, out.past_key_values


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_never_changes_what_a_prompt_means(engine: str, wrap: Any) -> None:
    """What differs from the cached text is run again."""
    model = wrap(engine)
    text, cache = conversation(model)
    for prompt, reused in (
        (text, 25),  # nothing new: the last token is run
        (text[:, :-1], 24),
        (text[:, :10], 9),
        (torch.cat([text[:, :12], prompt_of(30, 7)], 1), 12),
        (prompt_of(40, 8), 0),
    ):
        copied = copy.deepcopy(cache)
        got = model.generate(prompt, max_new_tokens=6, past_key_values=copied)
        assert torch.equal(got, stock(model, prompt, max_new_tokens=6))
        assert specfx.stats(model).last.reused_tokens == reused
        assert copied.get_seq_length() == got.shape[1] - 1
    assert cache.get_seq_length() == 25
    del cache, copied
    assert_ours(model)


def test_branches_of_a_conversation_share_its_pages(wrap: Any) -> None:
    model = wrap()
    text, cache = conversation(model)
    branches = [copy.deepcopy(cache) for _ in range(3)]
    before = specfx.explain(model).pages_in_use
    for seed, branch in enumerate(branches):
        assert torch.equal(
            model.generate(turn(text, seed), max_new_tokens=6, past_key_values=branch), stock(model, turn(text, seed), max_new_tokens=6)
        )
        assert specfx.stats(model).last.reused_tokens == 25
    assert specfx.explain(model).pages_in_use <= before + 3 * 3, "three full pages are shared"
    del cache, branches, branch
    assert_ours(model)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_stock_code_finds_the_layers_that_it_would_have_filled(engine: str, name: str, wrap: Any) -> None:
    model = wrap(engine, "suffix", name)
    mask = torch.tensor([[0] * 5 + [1] * 15, [1] * 20])
    for ids, more in ((prompt_of(), {}), (prompt_of(batch=2), {"attention_mask": mask})):
        arguments = {"max_new_tokens": 6, "return_dict_in_generate": True, **more}
        ours, theirs = model.generate(ids, **arguments), stock(model, ids, **arguments)
        a, b = ours.past_key_values, theirs.past_key_values
        assert len(a) == len(b)
        for (k, v, *_), (j, w, *_) in zip(a, b, strict=True):
            torch.testing.assert_close(k, j, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(v, w, rtol=1e-3, atol=1e-3)
        assert not a.is_changed
        text = turn(ours.sequences, 3)
        if more:
            more["attention_mask"] = torch.cat([mask, torch.ones(2, text.shape[1] - 20, dtype=torch.long)], 1)
        expected = stock(model, text, max_new_tokens=6, past_key_values=b, **more)
        assert torch.equal(stock(model, text, max_new_tokens=6, past_key_values=copy.deepcopy(a), **more), expected)
        assert torch.equal(model.generate(text, max_new_tokens=6, past_key_values=a, **more), expected)
        assert specfx.stats(model).last.reused_tokens > 25 * len(ids) - 6, "to be looked at does a cache no harm"
    del a, ours
    assert_ours(model)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_that_other_code_has_changed_is_stocks(engine: str, wrap: Any) -> None:
    model = wrap(engine)
    text, cache = conversation(model)
    expected = stock(model, turn(text, 1), max_new_tokens=6)
    got = stock(model, turn(text, 1), max_new_tokens=6, past_key_values=cache)
    assert torch.equal(got, expected)
    assert cache.is_changed
    assert cache.get_seq_length() == got.shape[1] - 1
    longer = turn(got, 2)
    assert torch.equal(model.generate(longer, max_new_tokens=6, past_key_values=cache), stock(model, longer, max_new_tokens=6))
    assert any("past_key_values that other code has filled or changed" in r for r in specfx.explain(model).stock_calls)
    text, cache = conversation(wrap(engine))
    with torch.no_grad():
        model(text[:, -1:], past_key_values=cache)
    assert cache.get_seq_length() == 26
    assert cache.is_changed


def test_calls_that_stock_serves_go_on_from_a_cache_too(wrap: Any) -> None:
    model = wrap()
    text, cache = conversation(model)
    for more, prompt in (
        ({"num_beams": 2}, turn(text, 1)),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, turn(text, 1)),
        ({"attention_mask": torch.ones(1, 34, dtype=torch.long)}, turn(text, 1)[:, 25:]),  # the new tokens alone
    ):
        given = copy.deepcopy(cache)
        theirs = stock(model, prompt_of(), max_new_tokens=6, return_dict_in_generate=True).past_key_values
        if "num_beams" in more:
            given.batch_repeat_interleave(2)
            theirs.batch_repeat_interleave(2)
        got = model.generate(prompt, max_new_tokens=6, past_key_values=given, **more)
        expected = stock(model, prompt, max_new_tokens=6, past_key_values=theirs, **more)
        assert torch.equal(getattr(got, "sequences", got), getattr(expected, "sequences", expected))
    assert sum(specfx.explain(model).stock_calls.values()) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_pages_that_have_gone_are_filled_again(engine: str) -> None:
    """After new weights, a new engine, `restore`, on another model: never a wrong text."""
    model = specfx.speculate(tiny_model("llama"), "suffix", engine=engine, compile="off")
    text, cache = conversation(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    longer = turn(text, 1)
    for prepare in (lambda: None, lambda: specfx.speculate(model, None, engine=engine, compile="off", page_size=16), lambda: model.float()):
        prepare()
        got = model.generate(longer, max_new_tokens=6, past_key_values=copy.deepcopy(cache))
        assert torch.equal(got, stock(model, longer, max_new_tokens=6))
        assert specfx.stats(model).last.reused_tokens == 0
    other = specfx.speculate(tiny_model("llama", num_hidden_layers=1), None, engine=engine, compile="off")
    assert torch.equal(
        other.generate(longer, max_new_tokens=6, past_key_values=copy.deepcopy(cache)), stock(other, longer, max_new_tokens=6)
    )
    specfx.restore(model)
    assert torch.equal(model.generate(longer, max_new_tokens=6, past_key_values=cache), stock(model, longer, max_new_tokens=6))


def test_a_conversation_gives_its_pages_up_where_they_are_needed() -> None:
    model = specfx.speculate(tiny_model("llama"), "suffix", engine="graph", compile="off", page_size=8, kv_pool=12)
    text, cache = conversation(model)
    assert specfx.explain(model).pages_in_use == 4
    other = prompt_of(60, 4)
    assert torch.equal(model.generate(other, max_new_tokens=6), stock(model, other, max_new_tokens=6))
    assert specfx.explain(model).pages_in_use == 0
    got = model.generate(turn(text, 1), max_new_tokens=6, past_key_values=cache)
    assert torch.equal(got, stock(model, turn(text, 1), max_new_tokens=6))
    assert specfx.stats(model).last.reused_tokens == 0
    longest = turn(got, 2, 32)  # the conversation's own pages and new ones don't fit together
    assert torch.equal(model.generate(longest, max_new_tokens=4, past_key_values=cache), stock(model, longest, max_new_tokens=4))
    with pytest.raises(specfx.errors.KVPoolError):
        model.generate(prompt_of(90), max_new_tokens=6, past_key_values=cache)
    del cache
    assert_ours(model)


def test_a_call_that_fails_leaves_the_conversation_as_it_was(wrap: Any) -> None:
    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 38:
            raise BrokenPipeError
        return scores

    model = wrap()
    text, cache = conversation(model)
    before = specfx.explain(model).pages_in_use
    with pytest.raises(BrokenPipeError):
        model.generate(turn(text, 1), max_new_tokens=6, past_key_values=cache, logits_processor=[process])
    assert (specfx.explain(model).pages_in_use, cache.get_seq_length()) == (before, 25)
    got = model.generate(turn(text, 1), max_new_tokens=6, past_key_values=cache)
    assert torch.equal(got, stock(model, turn(text, 1), max_new_tokens=6))
    assert specfx.stats(model).last.reused_tokens == 25
    del cache
    assert_ours(model)


def test_a_pickled_cache_is_an_ordinary_one(wrap: Any) -> None:
    model = wrap()
    text, cache = conversation(model)
    loaded = pickle.loads(pickle.dumps(cache))
    assert type(loaded) is DynamicCache
    assert loaded.get_seq_length() == cache.get_seq_length() == 25
    longer = turn(text, 1)
    assert torch.equal(stock(model, longer, max_new_tokens=6, past_key_values=loaded), stock(model, longer, max_new_tokens=6))


def test_a_sampled_conversation_has_one_text_with_and_without_pages(wrap: Any) -> None:
    model = wrap()
    text, cache = conversation(model)
    texts = []
    for more in ({}, {"past_key_values": cache}):
        torch.manual_seed(3)
        texts.append(model.generate(turn(text, 1), max_new_tokens=12, do_sample=True, **more))
    assert torch.equal(*texts)
    assert specfx.stats(model).last.reused_tokens == 25
