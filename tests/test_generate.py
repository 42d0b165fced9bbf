"""`model.generate` with specfx against `model.generate` without: the same call, the same tokens, on tiny models of five families.

The draft methods rarely guess a random model's text, so acceptance is tested with an `Oracle`: a drafter that knows the text stock
generates, hides it among wrong siblings, and goes on beyond the token at which the call must end.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import specfx
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.errors import HeadError
from specfx.runtime.tree import EMPTY_TREE, DraftTree

NAMES = ("llama", "qwen3", "gemma3", "mistral", "gpt_oss")
CASES = [(name, engine) for name in NAMES for engine in ("graph", "eager")] + [("llama", "compiled")]
PAD = 0


Wrap = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session")
def wrap() -> Wrap:
    """``wrap(name, engine, method, **options)``: one model for each name and engine, prepared once and wrapped anew each time."""
    made: dict[tuple[str, str], PreTrainedModel] = {}

    def wrapped(name: str = "llama", engine: str = "graph", method: str | None = None, **options: Any) -> PreTrainedModel:
        model = made.get((name, engine))
        if model is None:
            model = made[name, engine] = tiny_model(name)
        model.generation_config = GenerationConfig()
        mode = "sync" if engine == "compiled" else "off"
        specfx.speculate(model, method, engine=engine, compile=mode, **options)
        report = specfx.explain(model)
        assert (report.engine, report.verifies) == (engine, "trees"), str(report)
        return model

    return wrapped


@pytest.fixture(scope="session")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random MTP head of each family, as files."""
    paths = {}
    for name in NAMES:
        head = MtpHead.from_target(tiny_model(name))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in head.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        paths[name] = str(save_head(head, tmp_path_factory.mktemp(name)))
    return paths


class Oracle:
    """Drafts what stock generates, `texts` (prompt and output, without padding), between wrong siblings; now and then a wrong turn."""

    name = "oracle"
    needs_hidden = False
    on_trial = False
    beside = None
    drafting = None
    refusals = ()

    def __init__(self, texts: Sequence[Sequence[int]], wrong_every: int = 3) -> None:
        self.texts, self.wrong_every, self.asked = [list(t) for t in texts], wrong_every, 0
        self.known: dict[int, list[int]] = {}

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        self.known[seq] = list(prompt)

    def accept(self, seq: int, tokens: Sequence[int], hidden: Any, drafted: Any = None) -> None:
        self.known[seq] += tokens

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        self.known.pop(seq, None)

    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        return [self._tree(self.known[seq], budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def _tree(self, known: list[int], budget: int) -> DraftTree:
        text = next((t for t in self.texts if t[: len(known)] == known), None)
        self.asked += 1
        if text is None or self.asked % 5 == 0:
            return EMPTY_TREE
        tokens: list[int] = []
        parents: list[int] = []
        right = -1
        for depth, token in enumerate(text[len(known) : len(known) + 6]):
            if len(tokens) + 2 > budget:
                break
            if self.asked % self.wrong_every == 0 and depth == 2:
                token = (token + 7) % VOCAB
            tokens += [(token + 1) % VOCAB, token]
            parents += [right, right]
            right = len(tokens) - 1
        return DraftTree(tuple(tokens), tuple(parents), (1.0,) * len(tokens))


def stock(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """What the class's own `generate` gives."""
    return type(model).generate(model, *args, **kwargs)


def prompt_of(length: int = 10, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(*lengths: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths, left-padded with `PAD`, and their mask."""
    width = max(lengths)
    ids = prompt_of(width, seed, len(lengths))
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, PAD), mask.long()


def give_oracle(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Oracle:
    """Make `model` draft with an oracle that knows its greedy text for each row, well beyond where the tests end it."""
    texts = []
    for i, row in enumerate(ids):
        prompt = row if mask is None else row[mask[i].bool()]
        texts.append(stock(model, prompt[None], max_new_tokens=64, do_sample=False, **kwargs)[0].tolist())
    wrapper: Any = model.generate
    wrapper.drafter = Oracle(texts)
    return wrapper.drafter


def assert_nothing_left(model: PreTrainedModel) -> None:
    assert specfx.explain(model).pages_in_use == 0


def assert_ours(model: PreTrainedModel) -> None:
    """No call since `speculate` went to the stock method, and no page is lost."""
    assert not specfx.explain(model).stock_calls
    assert_nothing_left(model)


def assert_stock(model: PreTrainedModel, reason: str) -> None:
    """The last call went to the stock method, for this reason."""
    report = specfx.explain(model)
    assert any(reason in r for r in report.stock_calls), report.stock_calls
    assert reason in str(report)
    assert_nothing_left(model)


def first_at(text: Sequence[int], minimum: int) -> tuple[int, int]:
    """(index, token) of the first token of `text` from `minimum` on that occurs nowhere before it."""
    return next((i, t) for i, t in enumerate(text) if i >= minimum and t not in text[:i])


# --- the same tokens -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "suffix", "mtp"])
@pytest.mark.parametrize(("name", "engine"), CASES)
def test_greedy_equals_stock(name: str, engine: str, method: str | None, wrap: Wrap, heads: dict[str, str]) -> None:
    if (name, method) == ("gemma3", "mtp"):
        with pytest.raises(HeadError, match="can't be run as an MTP head"):
            wrap(name, engine, method, head=heads[name])
        return
    model = wrap(name, engine, method, **({"head": heads[name]} if method == "mtp" else {}))
    ids = prompt_of()
    assert torch.equal(model.generate(ids, max_new_tokens=32), stock(model, ids, max_new_tokens=32))
    assert specfx.stats(model).tokens == 32
    ids, mask = padded(9, 4, 13)
    expected = stock(model, ids, attention_mask=mask, max_new_tokens=20, pad_token_id=PAD)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=20, pad_token_id=PAD), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=20, pad_token_id=PAD), expected), "mask inferred from the pad token"
    assert_ours(model)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_accepted_trees_equal_stock(name: str, engine: str, wrap: Wrap) -> None:
    model = wrap(name, engine)
    ids = prompt_of(12, seed=1)
    give_oracle(model, ids)
    assert torch.equal(model.generate(ids, max_new_tokens=48), stock(model, ids, max_new_tokens=48))
    assert specfx.stats(model).tokens_per_forward > 2
    ids, mask = padded(5, 12, 8)
    give_oracle(model, ids, mask)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=32)
    assert torch.equal(got, stock(model, ids, attention_mask=mask, max_new_tokens=32))
    assert specfx.stats(model).tokens_per_forward > 2
    assert_ours(model)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_a_prompt_of_several_chunks_equals_stock(
    name: str, engine: str, wrap: Wrap, monkeypatch: pytest.MonkeyPatch, heads: dict[str, str]
) -> None:
    monkeypatch.setattr("specfx.runtime.session.PREFILL_CHUNK", 8)
    model = wrap(name, engine, "suffix") if name == "gemma3" else wrap(name, engine, "mtp", head=heads[name])
    for length in (8, 9, 27):
        ids = prompt_of(length, seed=length)
        assert torch.equal(model.generate(ids, max_new_tokens=8), stock(model, ids, max_new_tokens=8))
    assert_ours(model)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_new_tokens(n: int, wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of()
    assert torch.equal(model.generate(ids, max_new_tokens=n), stock(model, ids, max_new_tokens=n))


def test_a_prompt_of_one_token(wrap: Wrap) -> None:
    for method in (None, "suffix"):
        model = wrap(method=method)
        assert torch.equal(model.generate(prompt_of(1), max_new_tokens=8), stock(model, prompt_of(1), max_new_tokens=8))


def test_one_draft_token_and_the_most(wrap: Wrap) -> None:
    ids = prompt_of(20)
    for n in (1, 63):
        model = wrap(num_speculative_tokens=n)
        oracle = give_oracle(model, ids)
        assert torch.equal(model.generate(ids, max_new_tokens=40), stock(model, ids, max_new_tokens=40))
        assert oracle.asked


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_inference_mode_and_then_none(engine: str) -> None:
    """Page pools made under `inference_mode` serve a call without it, and the other way round."""
    model = specfx.speculate(tiny_model("llama"), "suffix", engine=engine, compile="off")
    expected = stock(model, prompt_of(), max_new_tokens=12)
    with torch.inference_mode():
        assert torch.equal(model.generate(prompt_of(), max_new_tokens=12), expected)
    assert torch.equal(model.generate(prompt_of(), max_new_tokens=12), expected)
    long = prompt_of(150)
    with torch.inference_mode():  # the pool grows
        got = model.generate(long, max_new_tokens=12)
    assert torch.equal(got, stock(model, long, max_new_tokens=12))
    assert torch.equal(model.generate(long, max_new_tokens=12), got)


# --- where a call ends -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["graph", "eager", "compiled"])
@pytest.mark.parametrize("oracle", [False, True])
def test_eos(engine: str, oracle: bool, wrap: Wrap) -> None:
    model = wrap("llama", engine, "suffix")
    ids = prompt_of()
    text = stock(model, ids, max_new_tokens=48)[0, 10:].tolist()
    if oracle:
        give_oracle(model, ids)
    for minimum in (0, 1, 2, 3, 4, 5, 6, 15):
        at, eos = first_at(text, minimum)
        got = model.generate(ids, max_new_tokens=48, eos_token_id=eos)
        assert got[0, 10:].tolist() == text[: at + 1]
        assert torch.equal(got, stock(model, ids, max_new_tokens=48, eos_token_id=[eos, VOCAB - 1, eos]))
        assert specfx.stats(model).tokens == at + 1
    assert_ours(model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("oracle", [False, True])
def test_rows_end_at_different_times(name: str, engine: str, oracle: bool, wrap: Wrap) -> None:
    model = wrap(name, engine, "suffix")
    ids, mask = padded(9, 3, 12)
    free = stock(model, ids, attention_mask=mask, max_new_tokens=40)[:, 12:].tolist()
    if oracle:
        give_oracle(model, ids, mask)
    eos = [first_at(free[0], 4)[1], first_at(free[1], 11)[1]]
    arguments = {"attention_mask": mask, "max_new_tokens": 40, "eos_token_id": eos, "pad_token_id": PAD}
    expected = stock(model, ids, **arguments)
    ends = {next((i for i, t in enumerate(row) if t in eos), None) for row in free}
    assert len(ends) > 1
    assert torch.equal(model.generate(ids, **arguments), expected)
    arguments.pop("pad_token_id")  # then the end token pads
    assert torch.equal(model.generate(ids, **arguments), stock(model, ids, **arguments))
    assert_ours(model)


@pytest.mark.parametrize("oracle", [False, True])
def test_max_length_and_the_models_own_settings(oracle: bool, wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of()
    if oracle:
        give_oracle(model, ids)
    for length in range(11, 20):
        assert torch.equal(model.generate(ids, max_length=length), stock(model, ids, max_length=length))
        assert specfx.stats(model).tokens == length - 10
    model.generation_config.max_new_tokens = 5
    assert model.generate(ids).shape == (1, 15)
    model.generation_config = GenerationConfig()
    assert torch.equal(model.generate(ids), stock(model, ids))  # transformers' default length
    assert_ours(model)


def tokenizer() -> PreTrainedTokenizerFast:
    """Token i is written ``<i>``."""
    vocabulary = {f"<{i}>": i for i in range(VOCAB - 1)} | {"abcdef": VOCAB - 1}  # transformers' stop strings need that word
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", unk_token="<0>", padding_side="left")


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("as_config", [None, "keyword", "positional", "model"])
def test_stop_strings(oracle: bool, as_config: str | None, wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of()
    text = stock(model, ids, max_new_tokens=48)[0, 10:].tolist()
    if oracle:
        give_oracle(model, ids)
    for at in (2, 3, 4, 5, 9):
        string = f"{text[at - 1]}> <{text[at]}"  # begins and ends within tokens
        config = GenerationConfig(max_new_tokens=48, stop_strings=[string, "never"])
        if as_config is None:
            args, kwargs = (ids,), {"max_new_tokens": 48, "stop_strings": string}
        elif as_config == "keyword":
            args, kwargs = (ids,), {"generation_config": config}
        elif as_config == "positional":
            args, kwargs = (ids, config), {}
        else:
            args, kwargs = (ids,), {}
            model.generation_config = config
        expected = stock(model, *args, **kwargs, tokenizer=tokenizer())
        assert expected.shape[1] <= 10 + at + 1
        assert torch.equal(model.generate(*args, **kwargs, tokenizer=tokenizer()), expected)
        assert config.stop_strings == [string, "never"]
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(*args, **kwargs)
    assert_nothing_left(model)
    if as_config != "model":
        assert_ours(model)


def test_stop_strings_over_a_batch(wrap: Wrap) -> None:
    """Stock pads a row that a stop string ended only if there is an end token; else the row goes on until all have ended."""
    model = wrap(method="suffix")
    ids, mask = padded(9, 4, 12)
    text = stock(model, ids, attention_mask=mask, max_new_tokens=24)[:, 12:].tolist()
    string, eos = f"<{text[0][3]}> <{text[0][4]}>", first_at(text[1], 10)[1]
    for more in ({"eos_token_id": eos, "pad_token_id": PAD}, {"pad_token_id": PAD}, {}):
        arguments = {"attention_mask": mask, "max_new_tokens": 24, "stop_strings": string, "tokenizer": tokenizer(), **more}
        assert torch.equal(model.generate(ids, **arguments), stock(model, ids, **arguments))
        assert bool(specfx.explain(model).stock_calls) == ("eos_token_id" not in more)


@pytest.mark.parametrize("batch", [1, 3])
def test_max_time(batch: int, wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of(batch=batch)
    assert torch.equal(model.generate(ids, max_new_tokens=200, max_time=0.0), stock(model, ids, max_new_tokens=200, max_time=0.0))
    full = stock(model, ids, max_new_tokens=400)
    started = time.monotonic()
    got = model.generate(ids, max_new_tokens=400, max_time=0.1)
    assert time.monotonic() - started < 5
    assert got.shape[0] == batch
    assert got.shape[1] > 10
    assert torch.equal(got, full[:, : got.shape[1]])
    assert_nothing_left(model)


class StopAt(StoppingCriteria):
    """Ends a row at a given token; keeps what it was shown."""

    def __init__(self, token: int, as_bool: bool = False) -> None:
        self.token, self.as_bool = token, as_bool
        self.shown: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.shown.append(input_ids.tolist())
        done = input_ids[:, -1] == self.token
        return bool(done.all()) if self.as_bool else done


@pytest.mark.parametrize("oracle", [False, True])
def test_custom_stopping_criteria_are_shown_what_stock_shows(oracle: bool, wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of()
    text = stock(model, ids, max_new_tokens=48)[0, 10:].tolist()
    if oracle:
        give_oracle(model, ids)
    for minimum in (0, 1, 2, 3, 8, 20):
        at, token = first_at(text, minimum)
        ours, theirs = StopAt(token), StopAt(token)
        expected = stock(model, ids, max_new_tokens=48, stopping_criteria=StoppingCriteriaList([theirs]))
        assert torch.equal(model.generate(ids, max_new_tokens=48, stopping_criteria=StoppingCriteriaList([ours])), expected)
        assert expected.shape[1] == 10 + at + 1
        assert ours.shown == theirs.shown
        assert torch.equal(model.generate(ids, None, None, [StopAt(token)], max_new_tokens=48), expected), "positionally"
    assert_ours(model)


def test_custom_stopping_criteria_over_a_batch_go_to_stock(wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of(batch=3)
    token = int(stock(model, ids, max_new_tokens=8)[1, 14])
    ours, theirs = StopAt(token), StopAt(token)
    expected = stock(model, ids, max_new_tokens=12, stopping_criteria=[theirs])
    assert torch.equal(model.generate(ids, max_new_tokens=12, stopping_criteria=[ours]), expected)
    assert ours.shown == theirs.shown
    assert_stock(model, "StopAt may look across the rows of a batch")


# --- logits processors -----------------------------------------------------------------------------------------------------------------

PROCESSORS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[36], [9, 73], [62, 62, 62]]},
    {"suppress_tokens": [53, 62, 98], "begin_suppress_tokens": [21, 22]},
    {"sequence_bias": {(70,): 6.0, (9, 36): -8.0}},
    {"min_new_tokens": 9, "eos_token_id": [9, 53, 62]},
    {"forced_eos_token_id": 3, "forced_bos_token_id": 4},
    {"exponential_decay_length_penalty": (4, 1.6), "eos_token_id": 77},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "renormalize_logits": True, "remove_invalid_values": True},
)


@pytest.mark.parametrize("settings", PROCESSORS, ids=lambda s: next(iter(s)))
@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_logits_processors(settings: dict[str, Any], engine: str, wrap: Wrap) -> None:
    model = wrap("llama", engine, "suffix")
    arguments = {"max_new_tokens": 24, "pad_token_id": PAD, **settings}
    ids, mask = padded(9, 4, 12)
    expected_one, expected = stock(model, ids[2:], **arguments), stock(model, ids, attention_mask=mask, **arguments)
    for oracle in (False, True):
        if oracle:
            wrapper: Any = model.generate
            rows = [row[int((m == 0).sum()) :].tolist() for row, m in zip(expected, mask, strict=True)]
            wrapper.drafter = Oracle([expected_one[0].tolist(), *rows])
        assert torch.equal(model.generate(ids[2:], **arguments), expected_one)
        assert torch.equal(model.generate(ids, attention_mask=mask, **arguments), expected)
    assert_ours(model)


class Recorder(LogitsProcessor):
    """Forbids a token after another, and keeps every prefix that it was shown."""

    def __init__(self) -> None:
        self.prefixes: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert scores.dtype == torch.float32
        assert scores.shape == (input_ids.shape[0], VOCAB)
        self.prefixes += input_ids.tolist()
        scores = scores.clone()
        scores[:, int(input_ids[0, -1]) * 5 % VOCAB] += 9.0
        return scores


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("minimum", [None, 0, 2, 3, 4, 9])
def test_a_processor_sees_the_prefixes_that_stock_shows_it(oracle: bool, minimum: int | None, wrap: Wrap) -> None:
    """Also none beyond the end of the text: a grammar's processor may raise there."""
    model = wrap(method="suffix")
    ids = prompt_of()
    text = stock(model, ids, max_new_tokens=40, logits_processor=LogitsProcessorList([Recorder()]))[0].tolist()
    if oracle:
        wrapper: Any = model.generate
        wrapper.drafter = Oracle([text])
    eos = None if minimum is None else first_at(text[10:], minimum)[1]
    ours, theirs = Recorder(), Recorder()
    expected = stock(model, ids, max_new_tokens=30, eos_token_id=eos, logits_processor=LogitsProcessorList([theirs]))
    assert torch.equal(model.generate(ids, max_new_tokens=30, eos_token_id=eos, logits_processor=LogitsProcessorList([ours])), expected)
    assert ours.prefixes == theirs.prefixes
    assert_ours(model)


def test_a_processor_and_a_criterion_take_turns_as_in_stock(wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of()
    orders = []
    text = stock(model, ids, max_new_tokens=40)[0].tolist()
    for generate in (lambda *a, **k: stock(model, *a, **k), model.generate):
        order: list[tuple[str, int]] = []

        def process(ids: torch.Tensor, scores: torch.Tensor, order: list[tuple[str, int]] = order) -> torch.Tensor:
            order.append(("process", ids.shape[1]))
            return scores

        def stop(ids: torch.Tensor, scores: Any, order: list[tuple[str, int]] = order) -> torch.Tensor:
            order.append(("stop", ids.shape[1]))
            return torch.zeros(1, dtype=torch.bool)

        wrapper: Any = model.generate
        wrapper.drafter = Oracle([text])
        generate(ids, max_new_tokens=20, logits_processor=[process], stopping_criteria=StoppingCriteriaList([stop]))
        orders.append(order)
    assert orders[0] == orders[1]
    assert specfx.stats(model).tokens_per_forward > 1.5


def test_a_custom_processor_over_a_batch_goes_to_stock(wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of(batch=3)
    expected = stock(model, ids, max_new_tokens=12, logits_processor=LogitsProcessorList([Recorder()]))
    assert torch.equal(model.generate(ids, max_new_tokens=12, logits_processor=LogitsProcessorList([Recorder()])), expected)
    assert_stock(model, "Recorder may look across the rows of a batch")


def test_prefix_allowed_tokens(wrap: Wrap) -> None:
    model = wrap(method="suffix")
    allowed = lambda batch, ids: [int(ids[-1]) // 2, int(ids[-1] + 40 + batch) % VOCAB, 5, 90]  # noqa: E731
    for ids in (prompt_of(), prompt_of(batch=2)):
        expected = stock(model, ids, max_new_tokens=20, prefix_allowed_tokens_fn=allowed)
        assert torch.equal(model.generate(ids, max_new_tokens=20, prefix_allowed_tokens_fn=allowed), expected)
    assert_ours(model)


# --- streamers -------------------------------------------------------------------------------------------------------------------------


class Recording(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ends
        self.puts.append(value.clone())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("oracle", [False, True])
def test_a_streamer_gets_what_stock_gives_it(engine: str, oracle: bool, wrap: Wrap) -> None:
    model = wrap("llama", engine, "suffix")
    ids = prompt_of()
    eos = first_at(stock(model, ids, max_new_tokens=48)[0, 10:].tolist(), 9)[1]
    if oracle:
        give_oracle(model, ids)
    for end in (None, eos):
        ours, theirs = Recording(), Recording()
        out = model.generate(ids, max_new_tokens=24, eos_token_id=end, streamer=ours)
        stock(model, ids, max_new_tokens=24, eos_token_id=end, streamer=theirs)
        assert [p.tolist() for p in ours.puts] == [p.tolist() for p in theirs.puts]
        assert [p.shape for p in ours.puts] == [p.shape for p in theirs.puts]
        assert torch.equal(ours.puts[0], ids)
        assert torch.cat([p.flatten() for p in ours.puts]).tolist() == out[0].tolist()
        assert ours.ends == theirs.ends == 1
    positional = Recording()
    model.generate(ids, None, None, None, None, None, None, positional, max_new_tokens=4)
    assert len(positional.puts) == 5
    assert_ours(model)


def test_criteria_and_processors_can_tell_what_the_streamer_has_got(wrap: Wrap) -> None:
    """Both are asked about a token when all before it are streamed."""
    model, ids = wrap(method="suffix"), prompt_of()
    give_oracle(model, ids)
    seen: dict[bool, list[int]] = {}
    for ours in (True, False):
        streamer, lengths = Recording(), list[int]()

        def note(input_ids: torch.Tensor, scores: Any, streamer: Recording = streamer, lengths: list[int] = lengths) -> Any:
            lengths.append(len(streamer.puts))
            return scores if isinstance(scores, torch.Tensor) else len(streamer.puts) == 12

        generate = model.generate if ours else functools.partial(stock, model)
        generate(ids, max_new_tokens=24, streamer=streamer, logits_processor=[note], stopping_criteria=[note])
        seen[ours] = lengths
    assert seen[True] == seen[False] == [n for n in range(1, 13) for _ in range(2)]
    assert_ours(model)


def test_a_streamer_over_a_batch_goes_to_stock(wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of(batch=2)
    ours, theirs = Recording(), Recording()
    expected = stock(model, ids, max_new_tokens=8, streamer=theirs)
    assert torch.equal(model.generate(ids, max_new_tokens=8, streamer=ours), expected)
    assert [p.tolist() for p in ours.puts] == [p.tolist() for p in theirs.puts]
    assert ours.ends == 1
    assert_stock(model, "a streamer over a batch")


def test_text_streamers(wrap: Wrap, capsys: pytest.CaptureFixture[str]) -> None:
    model = wrap(method="suffix")
    ids, words = prompt_of(), tokenizer()
    give_oracle(model, ids)
    stock(model, ids, max_new_tokens=20, streamer=TextStreamer(words, skip_prompt=True))
    expected = capsys.readouterr().out
    model.generate(ids, max_new_tokens=20, streamer=TextStreamer(words, skip_prompt=True))
    assert capsys.readouterr().out == expected != ""
    streamer = TextIteratorStreamer(words, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={"max_new_tokens": 20, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join(30)
    assert text == expected.removesuffix("\n")
    assert_ours(model)


# --- how a call is written -------------------------------------------------------------------------------------------------------------


def test_every_way_to_pass_the_prompt_and_the_configuration(wrap: Wrap) -> None:
    model = wrap(method="suffix")
    ids = prompt_of()
    expected = stock(model, ids, max_new_tokens=12, repetition_penalty=1.3)
    config = GenerationConfig(max_new_tokens=12, repetition_penalty=1.3)
    before = config.to_dict()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((ids, config), {}),
        ((ids,), {"generation_config": config}),
        ((), {"inputs": ids, "generation_config": config}),
        ((), {"input_ids": ids, "generation_config": config}),
        ((), {"input_ids": ids, "max_new_tokens": 12, "repetition_penalty": 1.3}),
        ((ids, config, None, None), {"attention_mask": torch.ones_like(ids)}),
        ((ids, config), {"use_cache": False}),
        ((ids, config), {"use_cache": True, "attention_mask": None, "streamer": None, "custom_generate": None}),
    ]
    for args, kwargs in calls:
        assert torch.equal(model.generate(*args, **kwargs), expected), kwargs.keys()
    assert config.to_dict() == before
    assert_ours(model)
    with pytest.raises(TypeError):
        model.generate(ids, inputs=ids)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(ids, nonsense=3)


def test_a_configuration_object_is_completed_from_the_models(wrap: Wrap) -> None:
    """What the object leaves open comes from ``model.generation_config``, as in stock: here beams and an end token."""
    model = wrap(method="suffix")
    ids = prompt_of()
    model.generation_config.num_beams = 2
    config = GenerationConfig(max_new_tokens=8)
    assert torch.equal(model.generate(ids, config), stock(model, ids, config))
    assert_stock(model, "beam search")
    model = wrap(method="suffix")
    model.generation_config.eos_token_id = int(stock(model, ids, max_new_tokens=8)[0, 13])
    assert torch.equal(model.generate(ids, config), stock(model, ids, config))
    assert_ours(model)


def test_pipeline(wrap: Wrap) -> None:
    model, words = wrap(method="suffix"), tokenizer()
    text = " ".join(f"<{t}>" for t in prompt_of()[0].tolist())
    pipe = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    got = pipe([text, text + " <9>"], max_new_tokens=12, do_sample=False, batch_size=2)
    assert specfx.stats(model).tokens == 24
    specfx.restore(model)
    assert got == pipe([text, text + " <9>"], max_new_tokens=12, do_sample=False, batch_size=2)


# --- what is handed to stock -----------------------------------------------------------------------------------------------------------


def test_a_greedy_call_leaves_the_random_state_alone(wrap: Wrap) -> None:
    model = wrap(method="suffix")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model.generate(prompt_of(), max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), before)


HANDED_OVER: dict[str, tuple[Callable[[PreTrainedModel], dict[str, Any]], str]] = {
    "beams": (lambda m: {"num_beams": 4}, "beam search"),
    "attentions": (lambda m: {"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
    "hidden": (lambda m: {"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    "cache": (lambda m: {"past_key_values": DynamicCache(offloading=False), "use_cache": False}, "past_key_values with use_cache=False"),
    "static": (lambda m: {"cache_implementation": "static"}, "static"),
    "assistant": (lambda m: {"assistant_model": tiny_model("llama", num_hidden_layers=1)}, "assistant_model"),
    "lookup": (lambda m: {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "positions": (lambda m: {"position_ids": torch.arange(10)[None] + 3}, "position_ids"),
    "embeds": (lambda m: {"inputs_embeds": m.get_input_embeddings()(prompt_of())}, "inputs_embeds"),
    "holes": (lambda m: {"attention_mask": torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 1, 1]])}, "an attention mask that is not left padding"),
    "right": (lambda m: {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])}, "an attention mask that is not left padding"),
}


@pytest.mark.parametrize("case", HANDED_OVER)
def test_what_is_not_accelerated_goes_to_stock_with_its_reason(case: str, wrap: Wrap) -> None:
    make, reason = HANDED_OVER[case]
    model = wrap(method="suffix")
    ids = None if case == "embeds" else prompt_of()
    expected = stock(model, ids, max_new_tokens=10, **make(model))
    got = model.generate(ids, max_new_tokens=10, **make(model))
    for a, b in zip((got, expected), (expected, got), strict=True):
        a, b = getattr(a, "sequences", a), getattr(b, "sequences", b)
        assert torch.equal(a, b)
    assert_stock(model, reason)


def test_a_users_own_decoding_method_is_called(wrap: Wrap) -> None:
    model = wrap(method="suffix")
    assert model.generate(prompt_of(), custom_generate=lambda model, input_ids, **kw: input_ids + 1).equal(prompt_of() + 1)
    assert_stock(model, "custom_generate")


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_under_autocast_calls_are_stocks_and_engines_are_prepared_without(engine: str) -> None:
    model = tiny_model("llama")
    expected = model.generate(prompt_of(), max_new_tokens=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        specfx.speculate(model, "suffix", engine=engine, compile="off")
        assert torch.equal(model.generate(prompt_of(), max_new_tokens=10), stock(model, prompt_of(), max_new_tokens=10))
        assert_stock(model, "torch.autocast")
        with torch.no_grad():
            model.lm_head = torch.nn.Linear(32, VOCAB, bias=False).requires_grad_(False)
            model.lm_head.weight.copy_(tiny_model("llama").lm_head.weight)
        assert specfx.explain(model).engine == engine, "prepared anew"
    before = specfx.explain(model).stock_calls
    assert torch.equal(model.generate(prompt_of(), max_new_tokens=10), expected)
    assert specfx.explain(model).stock_calls == before
    assert not [r for r in specfx.explain(model).refusals if r.stage != "generate"]


@pytest.mark.parametrize(("name", "dropout"), [("llama", {"attention_dropout": 0.4}), ("gpt2", {"resid_pdrop": 0.4})])
def test_training_with_dropout_is_stocks(name: str, dropout: dict[str, float]) -> None:
    model = specfx.speculate(tiny_model(name, **dropout), "suffix", engine="graph", compile="off")
    expected = stock(model, prompt_of(), max_new_tokens=20)
    assert torch.equal(model.generate(prompt_of(), max_new_tokens=20), expected)
    assert_ours(model)
    model.train()
    texts = []
    for generate in (model.generate, lambda *a, **k: stock(model, *a, **k)):
        torch.manual_seed(1)
        texts.append(generate(prompt_of(), max_new_tokens=20))
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], expected)
    assert_stock(model, "training mode with dropout")


def test_training_without_dropout_is_accelerated() -> None:
    model = specfx.speculate(tiny_model("llama").train(), "suffix", engine="graph", compile="off")
    assert torch.equal(model.generate(prompt_of(), max_new_tokens=20), stock(model, prompt_of(), max_new_tokens=20))
    assert_ours(model)


def test_prompts_of_other_types(wrap: Wrap) -> None:
    """int32 becomes int64, as in stock; what stock refuses is refused."""
    model, cache = wrap(method="suffix"), specfx.PageCache()
    text = model.generate(prompt_of(20).int(), max_new_tokens=6, past_key_values=cache)
    expected = stock(model, prompt_of(20).int(), max_new_tokens=6)
    assert text.dtype == expected.dtype == torch.int64
    assert torch.equal(text, expected)
    longer = torch.cat([text, prompt_of(5)], 1)
    got = model.generate(longer.int(), max_new_tokens=6, past_key_values=cache)
    assert torch.equal(got, stock(model, longer, max_new_tokens=6))
    assert specfx.stats(model).last.reused_tokens == 25
    del cache
    assert_ours(model)
    with pytest.raises(RuntimeError, match="indices"):
        model.generate(prompt_of(20).float(), max_new_tokens=6)
    assert_stock(model, "input_ids of torch.float32")
