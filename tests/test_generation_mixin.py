"""transformers' own generation tests, with specfx switched on.

Re-expressed after `GenerationTesterMixin` and `GenerationIntegrationTests` of transformers (tests/generation/test_utils.py, copyright The
HuggingFace Team, Apache-2.0; neither the wheel nor the source distribution holds it): those that apply to decoder-only models, under their
names there. Each call is made to the wrapped model and to a stock one of the same weights. Where transformers checks shapes, the values are
compared as well, and what is not accelerated must say so in the report.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_generate import tokenizer
from tiny import VOCAB, tiny_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkDetector,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

import specfx
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.errors import Reason

NAMES = ("llama", "qwen3", "gemma3", "gpt_oss", "qwen3_moe")
METHODS = (None, "suffix", "mtp")
CELLS = [(name, method) for name in NAMES for method in METHODS if (name, method) != ("gemma3", "mtp")]
"""gemma3's layers can't be run as a head."""
PROMPT, NEW, PAD = 14, 8, 0
PROCESSORS = {"bad_words_ids": [[1, 0]], "repetition_penalty": 1.2, "remove_invalid_values": True}
SAMPLING = PROCESSORS | {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7}
DICT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}

By = str | list[str] | None


@dataclass
class Pair:
    """A wrapped model and a stock one of the same weights."""

    name: str
    method: str | None
    model: PreTrainedModel
    stock: PreTrainedModel

    def ours(self, by_stock: By = None, **arguments: Any) -> Any:
        """What the wrapped model makes of a call. by_stock: the reasons why that is left to stock; None: it is accelerated."""
        before = specfx.explain(self.model).stock_calls
        torch.manual_seed(0)
        try:
            return self.model.generate(**{"max_new_tokens": NEW, **arguments})
        finally:
            reasons = [by_stock] if isinstance(by_stock, str) else by_stock or []
            assert sorted(specfx.explain(self.model).stock_calls - before) == sorted(reasons)

    def theirs(self, **arguments: Any) -> Any:
        torch.manual_seed(0)
        return self.stock.generate(**{"max_new_tokens": NEW, **arguments})

    def both(self, by_stock: By = None, **arguments: Any) -> tuple[Any, Any]:
        """What both make of a call, which is the same."""
        ours, theirs = self.ours(by_stock, **arguments), self.theirs(**arguments)
        assert type(ours) is type(theirs)
        assert torch.equal(tokens(ours), tokens(theirs))
        if not isinstance(ours, torch.Tensor):
            assert ours.keys() == theirs.keys()
            assert_close(ours.get("scores"), theirs.get("scores"))
            assert_close(ours.get("logits"), theirs.get("logits"))
        return ours, theirs

    def both_raise(self, error: type[Exception], by_stock: By = None, **arguments: Any) -> str:
        with pytest.raises(error) as theirs:
            self.theirs(**arguments)
        with pytest.raises(error) as ours:
            self.ours(by_stock, **arguments)
        assert str(ours.value) == str(theirs.value)
        return str(ours.value)


def tokens(output: Any) -> torch.Tensor:
    return getattr(output, "sequences", output)


def assert_close(ours: Any, theirs: Any) -> None:
    """Tensors, or nested tuples of them."""
    assert type(ours) is type(theirs)
    if isinstance(ours, tuple):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)
    elif ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[PreTrainedModel, PreTrainedModel]]:
    return {}


@pytest.fixture(scope="module")
def wrapped(request: pytest.FixtureRequest, models: Any, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, method = request.param
    if name not in models:
        models[name] = tiny_model(name), tiny_model(name)
    model, stock = models[name]
    options = {"head": save_head(MtpHead.from_target(stock), tmp_path_factory.mktemp("head"))} if method == "mtp" else {}
    specfx.speculate(model, method, engine="graph", compile="off", page_size=8, **options)
    return Pair(name, method, model, stock)


def on(cells: list[tuple[str, str | None]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("wrapped", cells, indirect=True, scope="module", ids=lambda cell: "-".join(map(str, cell)))


every_family = on(CELLS)
one_family = on([cell for cell in CELLS if cell[0] == "llama"])
"""For what stock does by itself, and for what doesn't depend on a model's layers."""


@pytest.fixture
def pair(wrapped: Pair) -> Iterator[Pair]:
    """And afterwards no page is in use, and the engine is the one it was."""
    for model in (wrapped.model, wrapped.stock):
        model.generation_config = GenerationConfig()
    yield wrapped
    report = specfx.explain(wrapped.model)
    if report.pages_in_use:
        gc.collect()
        report = specfx.explain(wrapped.model)
    assert (report.engine, report.pages_in_use) == ("graph", 0)
    assert all(r.reason is Reason.NOT_ACCELERATED for r in report.refusals if r.stage == "generate")


def inputs(batch: int = 2, length: int = PROMPT, seed: int = 0) -> dict[str, torch.Tensor]:
    """Text that repeats, so that something can be drafted."""
    half = torch.randint(1, VOCAB, (batch, -(-length // 2)), generator=torch.Generator().manual_seed(seed))
    ids = half.repeat(1, 2)[:, :length]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_steps(steps: Any, batch: int, count: int) -> None:
    assert isinstance(steps, tuple)
    assert [step.shape for step in steps] == [(batch, VOCAB)] * count


# --- GenerationTesterMixin: greedy and sampled decoding --------------------------------------------------------------------------------


@every_family
def test_greedy_generate(pair: Pair) -> None:
    ours, _ = pair.both(**inputs(), **PROCESSORS)
    assert ours.shape == (2, PROMPT + NEW)


@every_family
@pytest.mark.parametrize("use_cache", [False, True])
def test_greedy_generate_dict_outputs(use_cache: bool, pair: Pair) -> None:
    ours, _ = pair.both(**inputs(), **PROCESSORS, **DICT, use_cache=use_cache)
    assert isinstance(ours, GenerateDecoderOnlyOutput)
    assert ours.sequences.shape == (2, PROMPT + NEW)
    check_steps(ours.scores, 2, NEW)
    check_steps(ours.logits, 2, NEW)
    assert (ours.past_key_values is None) == (not use_cache)


@every_family
@pytest.mark.parametrize("use_cache", [False, True])
def test_attentions_and_hidden_states_come_from_stock(use_cache: bool, pair: Pair) -> None:
    """The other half of ``test_greedy_generate_dict_outputs`` there."""
    pair.model.set_attn_implementation("eager")
    pair.stock.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    ours, theirs = pair.both("output_attentions, output_hidden_states", **inputs(), **DICT, **asked, use_cache=use_cache)
    assert len(ours.hidden_states) == len(ours.attentions) == NEW
    for step, (hidden, attentions) in enumerate(zip(ours.hidden_states, ours.attentions, strict=True)):
        rows = 1 if use_cache and step else PROMPT + step
        assert {h.shape for h in hidden} == {(2, rows, pair.model.config.hidden_size)}
        assert {a.shape[:3] for a in attentions} == {(2, pair.model.config.num_attention_heads, rows)}
    assert_close(ours.hidden_states, theirs.hidden_states)
    one, _ = pair.both("output_hidden_states", **inputs(), return_dict_in_generate=True, output_hidden_states=True)
    assert one.attentions is None


@every_family
@pytest.mark.parametrize("returned", [1, 2])
def test_sample_generate(returned: int, pair: Pair) -> None:
    """Its text for a seed is not stock's, but one, and it is drawn from what the processors leave."""
    got = pair.ours(**inputs(), **SAMPLING, num_return_sequences=returned)
    assert got.shape == (2 * returned, PROMPT + NEW)
    assert torch.equal(got[:, :PROMPT], inputs()["input_ids"].repeat_interleave(returned, 0))
    assert torch.equal(got, pair.ours(**inputs(), **SAMPLING, num_return_sequences=returned))
    pair.both(**inputs(), **SAMPLING | {"top_k": 1}, num_return_sequences=returned)  # of one token there is nothing to draw


@every_family
def test_sample_generate_dict_output(pair: Pair) -> None:
    got = pair.ours(**inputs(), **SAMPLING, **DICT, num_return_sequences=2, use_cache=False)
    check_steps(got.scores, 4, NEW)
    check_steps(got.logits, 4, NEW)
    for step, scores in enumerate(got.scores):
        drawn = got.sequences[:, PROMPT + step, None]
        assert scores.gather(1, drawn).isfinite().all()
        assert (scores.isfinite().sum(-1) <= SAMPLING["top_k"]).all()
        assert not (got.sequences[:, PROMPT + step - 1 : PROMPT + step + 1] == torch.tensor([1, 0])).all(-1).any()


@one_family
def test_generate_without_input_ids(pair: Pair) -> None:
    ours, _ = pair.both(bos_token_id=1)
    assert ours.shape == (1, 1 + NEW)
    assert "bos_token_id" in pair.both_raise(ValueError)


@every_family
def test_left_padding_compatibility(pair: Pair) -> None:
    """Padding by 32 changes nothing, and rows of other lengths neither."""
    plain, _ = pair.both(**inputs(), **DICT)
    more = {name: torch.nn.functional.pad(t, (32, 0), value=PAD) for name, t in inputs().items()}
    padded, _ = pair.both(**more, **DICT, pad_token_id=PAD)
    assert torch.equal(padded.sequences[:, 32:], plain.sequences)
    assert_close(padded.scores, plain.scores)
    ragged = {"input_ids": more["input_ids"][:, 30:].clone(), "attention_mask": more["attention_mask"][:, 30:].clone()}
    ragged["attention_mask"][0, :9] = 0
    ragged["input_ids"][0, :9] = PAD
    text, _ = pair.both(**ragged, pad_token_id=PAD)
    alone, _ = pair.both(input_ids=ragged["input_ids"][:1, 9:])
    assert torch.equal(text[:1, 9:], alone)


@one_family
def test_generate_methods_with_logits_to_keep(pair: Pair) -> None:
    for kept in (0, 1):
        pair.both(**inputs(), logits_to_keep=kept)


# --- GenerationTesterMixin: caches -----------------------------------------------------------------------------------------------------


def assert_equal_caches(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert type(a) is type(b)
        assert_close((a.keys, a.values), (b.keys, b.values))


@every_family
@pytest.mark.parametrize("padded", [False, True])
def test_past_key_values_format(padded: bool, pair: Pair) -> None:
    """What is handed back is a cache of the stock model's own shapes and numbers."""
    given = inputs()
    if padded:
        given["attention_mask"][0, :3] = 0
    ours, theirs = pair.both(**given, return_dict_in_generate=True)
    assert isinstance(ours.past_key_values, DynamicCache)
    text = pair.model.config
    assert len(ours.past_key_values) == text.num_hidden_layers
    full = ours.past_key_values.layers[-1]  # of the families with windows, the last layer has none
    assert full.keys.shape == full.values.shape == (2, text.num_key_value_heads, PROMPT + NEW - 1, text.head_dim)
    for a, b in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        start = max(0, 3 - (PROMPT + NEW - 1 - b.keys.shape[2])) if padded else 0  # what padding is given is nobody's concern
        assert_close((a.keys[1], a.values[1]), (b.keys[1], b.values[1]))
        assert_close((a.keys[0, :, start:], a.values[0, :, start:]), (b.keys[0, :, start:], b.values[0, :, start:]))


@every_family
@pytest.mark.parametrize("padded", [False, True])
def test_generate_continue_from_past_key_values(padded: bool, pair: Pair) -> None:
    """Eight tokens at once are five, and three more from the cache of those; only the new ones are run."""
    given = inputs(length=24)
    if padded:
        given["attention_mask"][0, :3] = 0
    whole, _ = pair.both(**given, return_dict_in_generate=True)
    first, _ = pair.both(**given, return_dict_in_generate=True, max_new_tokens=5)
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 5), value=1)
    arguments = {"input_ids": first.sequences, "attention_mask": mask, "max_new_tokens": 3, "return_dict_in_generate": True}
    rest = pair.ours(**arguments, past_key_values=first.past_key_values)
    assert specfx.stats(pair.model).last.prompt_tokens == (4 if pair.method == "mtp" else 2)
    assert torch.equal(rest.sequences, whole.sequences)
    if not padded:
        assert_equal_caches(rest.past_key_values, whole.past_key_values)


@one_family
def test_generate_continue_with_the_new_tokens_alone(pair: Pair) -> None:
    """Stock takes a mask that is longer than the new tokens for those of the cache; that call is left to it."""
    given = inputs(batch=1)
    turns: list[torch.Tensor] = []
    for generate, model in ((pair.ours, pair.model), (pair.theirs, pair.stock)):
        first = generate(**given, return_dict_in_generate=True)
        ids = torch.cat([first.sequences[:, -1:], inputs(1, 5, seed=2)["input_ids"]], 1)
        mask = torch.ones(1, PROMPT + NEW + 5, dtype=torch.long)
        more = {"by_stock": "an attention mask that is not of the input_ids' shape"} if model is pair.model else {}
        turns.append(generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **more))
    assert torch.equal(*turns)


@one_family
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_from_inputs_embeds(num_beams: int, pair: Pair) -> None:
    given, embed = inputs(), pair.stock.get_input_embeddings()
    ids = given.pop("input_ids")
    embeds = embed(ids).detach()
    arguments = {**given, **DICT, "num_beams": num_beams, "min_new_tokens": NEW}
    plain, _ = pair.both(None if num_beams == 1 else "beam search", input_ids=ids, **arguments)
    same, _ = pair.both("inputs_embeds", input_ids=ids, inputs_embeds=embeds, **arguments)
    assert torch.equal(same.sequences, plain.sequences)
    noise = torch.rand(embeds.shape, generator=torch.Generator().manual_seed(0))
    other, _ = pair.both("inputs_embeds", input_ids=ids, inputs_embeds=noise, **arguments)
    assert not any(torch.allclose(a, b) for a, b in zip(same.scores, other.scores, strict=True))
    alone, _ = pair.both("inputs_embeds", inputs_embeds=embeds, **arguments)
    assert torch.equal(alone.sequences, same.sequences[:, PROMPT:])


@one_family
def test_lengths_if_input_embeds(pair: Pair) -> None:
    """``test_max_length_if_input_embeds`` and ``test_min_length_if_input_embeds``."""
    ids = inputs(1)["input_ids"]
    embeds = pair.stock.get_input_embeddings()(ids).detach()
    ends = list(range(VOCAB - 8))
    for lengths in ({"max_length": 20}, {"max_length": 20, "min_length": 18, "eos_token_id": ends}):
        by_ids, _ = pair.both(input_ids=ids, max_new_tokens=None, **lengths)
        by_embeds, _ = pair.both("inputs_embeds", inputs_embeds=embeds, max_new_tokens=None, **lengths)
        assert by_ids.shape[1] == PROMPT + by_embeds.shape[1] == (19 if "min_length" in lengths else 20)


@one_family
def test_generate_continue_from_inputs_embeds(pair: Pair) -> None:
    """A cache that stock filled from embeddings goes back to stock, which goes on from it."""
    embed, ids = pair.stock.get_input_embeddings(), inputs(1)["input_ids"]
    texts = []
    for generate, by in ((pair.ours, {"by_stock": "inputs_embeds"}), (pair.theirs, {})):
        embeds = embed(ids).detach()
        first = generate(inputs_embeds=embeds, max_new_tokens=3, return_dict_in_generate=True, **by)
        more = torch.cat([embeds, embed(first.sequences).detach()], 1)
        texts.append(generate(inputs_embeds=more, past_key_values=first.past_key_values, max_new_tokens=4, **by))
    assert torch.equal(*texts)


@one_family
def test_generate_with_static_cache(pair: Pair) -> None:
    ours, _ = pair.both("cache_implementation='static'", **inputs(), **DICT, cache_implementation="static")
    assert isinstance(ours.past_key_values, StaticCache)
    dynamic, _ = pair.both(**inputs(), **DICT)
    assert torch.equal(ours.sequences, dynamic.sequences)
    embeds = pair.stock.get_input_embeddings()(inputs()["input_ids"]).detach()
    pair.both("inputs_embeds", inputs_embeds=embeds, cache_implementation="static", return_dict_in_generate=True)
    other = "past_key_values that other code has filled or changed, or of another kind than a DynamicCache"
    texts = [
        generate(**inputs(), past_key_values=StaticCache(config=pair.stock.config, max_cache_len=PROMPT + NEW), **by)
        for generate, by in ((pair.ours, {"by_stock": other}), (pair.theirs, {}))
    ]
    assert torch.equal(*texts)


@every_family
def test_prefill_chunking(pair: Pair) -> None:
    whole, _ = pair.both(**inputs())
    chunked, _ = pair.both(**inputs(), prefill_chunk_size=5)
    assert torch.equal(whole, chunked)


# --- GenerationTesterMixin: decoding methods that are left to stock --------------------------------------------------------------------


@one_family
@pytest.mark.parametrize("returned", [1, 2])
def test_beam_search_generate(returned: int, pair: Pair) -> None:
    beams = {"num_beams": 2, "num_return_sequences": returned, "length_penalty": 2.0}
    pair.both("beam search", **inputs(), **PROCESSORS, **beams)
    ours, _ = pair.both("beam search", **inputs(), **PROCESSORS, **DICT, **beams)
    assert isinstance(ours, GenerateBeamDecoderOnlyOutput)
    assert (ours.sequences_scores < 0).all()


@one_family
def test_beam_sample_generate(pair: Pair) -> None:
    """With stock's own random numbers."""
    pair.both("beam sample", **inputs(), **SAMPLING, num_beams=2)


@one_family
@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_decoding(do_sample: bool, pair: Pair) -> None:
    """By another model, and by the same one, wrapped as it is: its calls as an assistant are stock's as well."""
    other = tiny_model(
        pair.name, num_hidden_layers=1, **({"layer_types": ["full_attention"]} if pair.name in ("gemma3", "gpt_oss") else {})
    )
    arguments = {**inputs(1), **DICT, "do_sample": do_sample}
    ours, _ = pair.both("assistant_model", **arguments, assistant_model=other)
    reasons = ["assistant_model", "position_ids given by the caller"]
    theirs = pair.theirs(**arguments, assistant_model=pair.stock)
    assert torch.equal(pair.ours(reasons, **arguments, assistant_model=pair.model).sequences, theirs.sequences)
    if not do_sample:
        assert torch.equal(ours.sequences, pair.ours(**arguments).sequences)


@one_family
def test_an_assistant_that_is_wrapped(pair: Pair) -> None:
    """Its calls as an assistant are stock's, and its own wrapper says so."""
    arguments = inputs(1)
    expected = pair.theirs(**arguments, assistant_model=tiny_model("gpt2"))
    assistant = specfx.speculate(tiny_model("gpt2"), "suffix", engine="eager")
    assert torch.equal(pair.ours("assistant_model", **arguments, assistant_model=assistant), expected)
    assert set(specfx.explain(assistant).stock_calls) == {"position_ids given by the caller"}


@one_family
def test_prompt_lookup_decoding_matches_greedy_search(pair: Pair) -> None:
    greedy, _ = pair.both(**inputs(1))
    looked_up, _ = pair.both("prompt_lookup_num_tokens", **inputs(1), prompt_lookup_num_tokens=2)
    assert torch.equal(greedy, looked_up)


@one_family
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"penalty_alpha": 0.6, "top_k": 5}, "contrastive search"),
        ({"dola_layers": "low"}, "dola generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 2.0}, "group beam search"),
        ({"num_beams": 4, "force_words_ids": [[3]]}, "constrained beam search"),
        ({"num_beams": 4, "constraints": [object()]}, "constrained beam search"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_decoding_methods_that_transformers_has_moved_out(asked: dict[str, Any], reason: str, pair: Pair) -> None:
    """``test_contrastive_generate`` and others: they are repositories now, and stock says how to ask for them."""
    assert "trust_remote_code" in pair.both_raise(ValueError, reason, **inputs(1), **asked)


# --- GenerationIntegrationTests --------------------------------------------------------------------------------------------------------


@one_family
def test_custom_stopping_criteria(pair: Pair) -> None:
    def at_18(ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        return ids.shape[-1] >= 18

    for length, expected in ((20, 18), (16, 16)):
        ours, _ = pair.both(**inputs(1), stopping_criteria=StoppingCriteriaList([at_18]), max_length=length, max_new_tokens=None)
        assert ours.shape == (1, expected)
    ours, _ = pair.both(**inputs(), stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(PROMPT + 3)]), max_new_tokens=None)
    assert ours.shape == (2, PROMPT + 3)
    ours, _ = pair.both("function may look across the rows of a batch", **inputs(), stopping_criteria=StoppingCriteriaList([at_18]))
    assert ours.shape == (2, 18)


@one_family
def test_per_row_stopping_criteria(pair: Pair) -> None:
    """A stop string ends the row that it stands in; the rest is padded."""
    free = pair.theirs(**inputs())
    string = f"<{int(free[0, PROMPT + 2])}>"
    ours, _ = pair.both(**inputs(), eos_token_id=127, suppress_tokens=[127], pad_token_id=PAD, stop_strings=[string], tokenizer=tokenizer())
    assert ours[0, PROMPT + 3 :].tolist() == [PAD] * (NEW - 3)
    assert torch.equal(ours[1], free[1])
    pair.both(**inputs(1), stop_strings=[string, "never"], tokenizer=tokenizer())
    with pytest.raises(ValueError, match="tokenizer"):
        pair.ours(**inputs(1), stop_strings=[string])


@one_family
def test_max_time(pair: Pair) -> None:
    for limit in (0.0, 100.0):
        pair.both(**inputs(1), max_time=limit)
        pair.both(**inputs(), max_time=limit, eos_token_id=127, pad_token_id=PAD)


@every_family
@pytest.mark.parametrize("do_sample", [False, True])
def test_eos_token_id_int_and_list(do_sample: bool, pair: Pair) -> None:
    """``..._greedy_search`` and ``..._top_k_top_sampling``: one end token, and a list of others besides."""
    arguments = SAMPLING if do_sample else {}
    free = pair.ours(**inputs(1), **arguments)[0, PROMPT:].tolist()
    at = next(i for i in range(2, NEW) if free[i] not in free[:i])
    for end in (free[at], [free[at], 127]):
        got = pair.ours(**inputs(1), **arguments, eos_token_id=end, pad_token_id=PAD)
        assert got[0, PROMPT:].tolist() == free[: at + 1]
        if not do_sample:
            pair.both(**inputs(), eos_token_id=end, pad_token_id=PAD)


@one_family
def test_max_new_tokens_and_max_length(pair: Pair) -> None:
    """Each alone, from the model's configuration, and neither."""
    for lengths, expected in (({"max_new_tokens": 3}, 3), ({"max_new_tokens": None, "max_length": 20}, 6)):
        assert pair.both(**inputs(), **lengths)[0].shape[1] == PROMPT + expected
    assert pair.both(**inputs(), max_new_tokens=None)[0].shape[1] > PROMPT
    for model in (pair.model, pair.stock):
        model.generation_config.max_length = 17
    assert pair.both(**inputs(), max_new_tokens=None)[0].shape[1] == 17


@one_family
def test_validate_generation_inputs(pair: Pair) -> None:
    """What stock refuses is refused with its words."""
    for wrong in (
        {"nonsense": 1},
        {"num_return_sequences": 2},
        {"max_new_tokens": 0},
        {"max_new_tokens": None, "max_length": PROMPT},
        {"do_sample": True, "temperature": 0.0},
        {"token_type_ids": torch.zeros(2, PROMPT, dtype=torch.long)},
    ):
        pair.both_raise(ValueError, **inputs(), **wrong)


@one_family
def test_custom_logits_processor(pair: Pair) -> None:
    """One beside those that the arguments make."""

    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, ids[:, -3:], float("-inf"))

    pair.both(**inputs(1), repetition_penalty=1.3, logits_processor=LogitsProcessorList([forbid]))
    pair.both("function may look across the rows of a batch", **inputs(), logits_processor=LogitsProcessorList([forbid]))


@every_family
def test_logits_processor_not_inplace(pair: Pair) -> None:
    greedy = pair.ours(**inputs(), **DICT)
    assert all(torch.equal(a, b) for a, b in zip(greedy.scores, greedy.logits, strict=True))
    for asked in ({"do_sample": True, "temperature": 0.5}, {"suppress_tokens": [5]}):
        processed = pair.ours(**inputs(), **DICT, **asked)
        assert not any(torch.equal(a, b) for a, b in zip(processed.scores, processed.logits, strict=True))
        assert all(step.isfinite().all() for step in processed.logits)


@every_family
@pytest.mark.parametrize("normalize", [False, True])
def test_transition_scores(normalize: bool, pair: Pair) -> None:
    ours, theirs = pair.both(**inputs(), **DICT)
    got = pair.model.compute_transition_scores(ours.sequences, ours.scores, normalize_logits=normalize)
    assert got.shape == (2, NEW)
    assert_close(got, pair.stock.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=normalize))
    greatest = torch.stack([s.log_softmax(-1) if normalize else s for s in ours.scores], 1).amax(-1)
    assert_close(got, greatest)


@one_family
def test_cfg_mixin(pair: Pair) -> None:
    """Classifier-free guidance: a processor that runs the model itself, on a text of its own that grows by each token."""
    guided, _ = pair.both(**inputs(1), guidance_scale=1.5)
    assert not torch.equal(guided, pair.theirs(**inputs(1)))
    pair.both("negative_prompt_ids", **inputs(1), guidance_scale=1.5, negative_prompt_ids=inputs(1, 4, seed=1)["input_ids"])
    pair.both("UnbatchedClassifierFreeGuidanceLogitsProcessor may look across the rows of a batch", **inputs(), guidance_scale=1.5)


@one_family
def test_green_red_watermark_generation(pair: Pair) -> None:
    settings = {"bias": 9.0, "context_width": 1, "seeding_scheme": "selfhash", "greenlist_ratio": 0.25}
    marked, _ = pair.both(**inputs(1), watermarking_config=WatermarkingConfig(**settings), max_new_tokens=20)
    pair.both(**inputs(1), watermarking_config=settings)
    config = copy.copy(pair.stock.config)
    config.bos_token_id = PAD  # the detector asks for one
    detector = WatermarkDetector(model_config=config, device="cpu", watermarking_config=settings)
    plain = pair.ours(**inputs(1), max_new_tokens=20)
    assert detector(marked[:, PROMPT:], return_dict=True).prediction.tolist() == [True]
    assert detector(plain[:, PROMPT:], return_dict=True).prediction.tolist() == [False]


@one_family
def test_synthid_text_watermark(pair: Pair) -> None:
    """A processor with a state, which counts on being shown each prefix once, in order."""

    def settings() -> SynthIDTextWatermarkingConfig:
        return SynthIDTextWatermarkingConfig(keys=[10, 20, 30], ngram_len=3, context_history_size=64)

    pair.both(**inputs(1), watermarking_config=settings(), max_new_tokens=16)
    drawn = [pair.ours(**inputs(1), watermarking_config=settings(), do_sample=True) for _ in range(2)]
    assert torch.equal(*drawn)


@one_family
def test_custom_generate(pair: Pair) -> None:
    """``test_custom_generate_callable``: a decoding method of the caller's."""

    def last_token_twice(model: PreTrainedModel, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
        assert generation_config.max_new_tokens == NEW
        return torch.cat([input_ids, input_ids[:, -1:]], 1)

    ours, _ = pair.both("custom_generate", **inputs(), custom_generate=last_token_twice)
    assert ours.shape == (2, PROMPT + 1)


@one_family
def test_generate_with_and_without_position_ids(pair: Pair) -> None:
    without, _ = pair.both(**inputs())
    positions = torch.arange(PROMPT)[None].expand(2, -1)
    given, _ = pair.both("position_ids given by the caller", **inputs(), position_ids=positions)
    assert torch.equal(without, given)


@one_family
def test_text_generation_pipeline(pair: Pair) -> None:
    """``test_stop_sequence_stopping_criteria`` and the pipeline's own tests: one text, several, in batches, and a stop string."""
    words = tokenizer()
    text = " ".join(f"<{t}>" for t in inputs(1)["input_ids"][0].tolist())
    made: dict[str, Callable[..., Any]] = {
        kind: pipeline("text-generation", model=model, tokenizer=words, device="cpu")
        for kind, model in (("ours", pair.model), ("theirs", pair.stock))
    }
    stop = f"<{int(pair.theirs(**inputs(1))[0, PROMPT + 3])}>"
    for prompt, options in (
        (text, {}),
        (text, {"return_full_text": False}),
        ([text, text + " <9>"], {"batch_size": 2}),
        (text, {"stop_strings": [stop], "tokenizer": words}),
    ):
        before = specfx.explain(pair.model).stock_calls
        outs = {kind: pipe(prompt, max_new_tokens=NEW, do_sample=False, **options) for kind, pipe in made.items()}
        assert outs["ours"] == outs["theirs"]
        assert specfx.explain(pair.model).stock_calls == before
        assert specfx.stats(pair.model).last.tokens in (NEW, 2 * NEW, 4)
