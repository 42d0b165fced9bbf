"""Models x draft methods x engines x options of `generate`: greedy calls give stock's tokens in float32, sampled ones the same text for the
same seed whatever is drafted and by whichever engine. The compiled engine runs its lowered graph as it is (`instant_inductor`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import specfx
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.runtime import decode

NAMES = ("llama", "qwen3", "gemma3", "gpt_oss", "qwen3_moe")
ENGINES = ("graph", "eager", "compiled")
METHODS = (None, "suffix", "mtp", "mtp and suffix")
PAD = 0


def prompts(*lengths: int, seed: int = 0) -> dict[str, Any]:
    """Left-padded, with text that repeats, so that something can be drafted."""
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        half = torch.randint(1, VOCAB, (-(-length // 2),), generator=generator)
        ids[i, width - length :], mask[i, width - length :] = half.repeat(2)[:length], 1
    return {"inputs": ids, "attention_mask": mask}


class Forbid(LogitsProcessor):
    """Forbids the tokens three and five places ago: what it does depends on the prefix."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids[:, [-3, -5]], float("-inf"))


class Sum(StoppingCriteria):
    """Ends a text whose tokens have a certain sum."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, 10:].sum(-1) % 11 == 7


def allowed(batch: int, ids: torch.Tensor) -> list[int]:
    return [int(ids[-1] + batch + d) % VOCAB for d in (1, 2, 3, 5, 8)]


class Streamed(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


Call = Callable[[], dict[str, Any]]
ONE, THREE = (14,), (9, 14, 4)
GREEDY: dict[str, Call] = {
    "one": lambda: prompts(*ONE),
    "batch": lambda: prompts(*THREE),
    "ends": lambda: {**prompts(*THREE, seed=2), "eos_token_id": list(range(1, VOCAB, 9))},
    "penalties": lambda: {**prompts(*THREE), "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "words": lambda: {**prompts(*THREE), "bad_words_ids": [[3], [4, 5]], "suppress_tokens": [7], "min_new_tokens": 5, "eos_token_id": 9},
    "forced": lambda: {**prompts(*THREE), "forced_eos_token_id": 5, "sequence_bias": {(70,): 5.0}},
    "allowed": lambda: {**prompts(*THREE), "prefix_allowed_tokens_fn": allowed},
    "processor": lambda: {**prompts(*ONE), "logits_processor": LogitsProcessorList([Forbid()])},
    "criterion": lambda: {**prompts(*ONE), "stopping_criteria": [Sum()]},
    "scores": lambda: {**prompts(*THREE), "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}
SAMPLED: dict[str, Call] = {
    "plain": lambda: {**prompts(*ONE), "top_k": 0},
    "hot": lambda: {**prompts(*THREE), "temperature": 1.4, "top_p": 0.9},
    "cold": lambda: {**prompts(*THREE), "temperature": 0.4, "min_p": 0.02, "typical_p": 0.95},
    "penalties": lambda: {**prompts(*ONE), "repetition_penalty": 1.3, "top_k": 9},
    "allowed": lambda: {**prompts(*ONE), "prefix_allowed_tokens_fn": allowed},
    "returned": lambda: {**prompts(*ONE), "num_return_sequences": 3},
}


def call(model: PreTrainedModel, generate: Any, make: Call, **more: Any) -> Any:
    torch.manual_seed(17)
    return generate(**make(), max_new_tokens=20, pad_token_id=PAD, **more)


@pytest.fixture(scope="module")
def stock() -> Callable[[str, str], Any]:
    """What the stock method makes of each model's greedy calls."""
    models = {name: tiny_model(name) for name in NAMES}
    return functools.cache(lambda name, case: call(models[name], models[name].generate, GREEDY[case]))


@pytest.fixture(scope="module")
def sampled() -> Callable[[str, str], torch.Tensor]:
    """Each model's sampled texts without drafts, by the graph engine."""
    models = {name: specfx.speculate(tiny_model(name), None, engine="graph", compile="off") for name in NAMES}
    return functools.cache(lambda name, case: call(models[name], models[name].generate, SAMPLED[case], do_sample=True))


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, str], PreTrainedModel]:
    return {}


@pytest.fixture
def model(
    request: pytest.FixtureRequest,
    made: dict[tuple[str, str], PreTrainedModel],
    tmp_path_factory: pytest.TempPathFactory,
    instant_inductor: None,
) -> PreTrainedModel:
    name, engine, method = request.param
    model = made.setdefault((name, engine), tiny_model(name))
    options: dict[str, Any] = {}
    if method in ("mtp", "mtp and suffix"):
        options = {"head": save_head(MtpHead.from_target(model), tmp_path_factory.mktemp("head"))}
        options["enable_suffix_decoding"], method = method != "mtp", "mtp"
    specfx.speculate(model, method, engine=engine, compile="sync" if engine == "compiled" else "off", page_size=8, **options)
    assert specfx.explain(model).engine == engine
    return model


def cells() -> list[Any]:
    """gemma3's layers can't be run as a head."""
    found = [(n, e, m) for n in NAMES for e in ENGINES for m in METHODS if n != "gemma3" or m in (None, "suffix")]
    return [pytest.param(cell, cell[0], id="-".join(map(str, cell))) for cell in found]


@pytest.mark.parametrize(("model", "name"), cells(), indirect=["model"])
def test_every_option_gives_what_stock_gives(
    model: PreTrainedModel, name: str, stock: Any, sampled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "FEWEST_SHARED", 1)
    for case, make in GREEDY.items():
        got, expected = call(model, model.generate, make), stock(name, case)
        assert torch.equal(getattr(got, "sequences", got), getattr(expected, "sequences", expected)), case
        for kind in ("scores", "logits"):
            for a, b in zip(getattr(got, kind, None) or (), getattr(expected, kind, None) or (), strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
        del got
    for case, make in SAMPLED.items():
        assert torch.equal(call(model, model.generate, make, do_sample=True), sampled(name, case)), case
    streamer = Streamed()
    call(model, model.generate, GREEDY["one"], streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == stock(name, "one")[0].tolist()
    cache = specfx.PageCache()
    text = call(model, model.generate, GREEDY["one"], past_key_values=cache)
    longer = torch.cat([text, prompts(5, seed=3)["inputs"]], 1)
    got = model.generate(longer, max_new_tokens=12, past_key_values=cache)
    assert specfx.stats(model).last.reused_tokens >= text.shape[1] - 2
    del cache
    assert torch.equal(got, type(model).generate(model, longer, max_new_tokens=12))
    report = specfx.explain(model)
    assert not report.stock_calls
    assert report.pages_in_use == 0


def test_the_texts_that_are_compared_are_many(stock: Any, sampled: Any) -> None:
    """They differ from each other, and end where the options say."""
    for name in NAMES:
        texts = {case: tuple(stock(name, case)[-1].tolist()) for case in GREEDY if case != "scores"}
        assert len(set(texts.values())) > 5
        assert len({tuple(sampled(name, case)[0].tolist()) for case in SAMPLED}) >= 4
    assert any(stock(name, "ends").shape[1] < 34 for name in NAMES)
    assert any(stock(name, "criterion").shape[1] < 34 for name in NAMES)
