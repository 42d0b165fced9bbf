"""Random calls, one after another on the same wrapped models, some interrupted: no page is lost and no result is wrong.

60 calls by default, 500 and more with ``SPECFX_LONG=1``.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, tiny_model
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import specfx
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.runtime import decode

LONG = bool(os.environ.get("SPECFX_LONG"))
EXAMPLES = 500 if LONG else 60
PAD = 0
WAYS = [(engine, method) for engine in ("graph", "eager") for method in (None, "suffix", "mtp", "mtp and suffix")]


class Interrupted(BaseException):
    """Not an `Exception`, as Ctrl-C is not."""


@dataclass(frozen=True)
class Fault:
    """Something that raises at its n-th call."""

    where: str
    at: int
    error: type[BaseException]


@dataclass(frozen=True)
class Call:
    """One random call. lengths: of the rows' new tokens. options: of `generate`. sampled: by this seed, or greedily (None)."""

    way: tuple[str, str | None]
    lengths: list[int]
    new: int
    options: dict[str, Any]
    sampled: int | None
    fault: Fault | None
    goes_on: bool


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([1.1, 1.5]),
        "no_repeat_ngram_size": st.integers(2, 3),
        "suppress_tokens": st.just([5, 6, 7]),
        "bad_words_ids": st.just([[8], [9, 10]]),
        "eos_token_id": st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=12, unique=True),
        "min_new_tokens": st.integers(1, 6),
        "return_dict_in_generate": st.booleans(),
        "output_scores": st.just(True),
        "use_cache": st.booleans(),
        "num_beams": st.just(2),
        "prefill_chunk_size": st.integers(3, 30),
    },
)
SAMPLING = st.fixed_dictionaries(
    {}, optional={"temperature": st.sampled_from([0.5, 1.5]), "top_k": st.integers(2, 40), "top_p": st.sampled_from([0.5, 0.9])}
)
FAULTS = st.builds(
    Fault,
    st.sampled_from(["streamer", "processor", "criterion", "forward", "commit", "add", "propose", "accept"]),
    st.integers(0, 9),
    st.sampled_from([KeyboardInterrupt, torch.OutOfMemoryError, Interrupted, RuntimeError]),
)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    sampled = draw(st.none() | st.integers(0, 9))
    options = draw(OPTIONS)
    if sampled is not None:
        options = {k: v for k, v in options.items() if k != "num_beams"} | draw(SAMPLING)
        options["num_return_sequences"] = draw(st.integers(1, 3))
    if options.get("num_beams") or options.get("prefill_chunk_size"):
        options.pop("use_cache", None)
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    fault = draw(st.none() | st.none() | FAULTS)
    return Call(draw(st.sampled_from(WAYS)), lengths, draw(st.integers(1, 20)), options, sampled, fault, draw(st.booleans()))


class Raises:
    """Counts its calls and raises at one of them."""

    def __init__(self, fault: Fault) -> None:
        self.left, self.error, self.raised = fault.at, fault.error, False

    def count(self) -> None:
        self.left -= 1
        if self.left < 0 and not self.raised:
            self.raised = True
            raise self.error("on purpose")

    def wrapping(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count()
            return verb(*args, **kwargs)

        return counted


class Streamer(Raises, BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        self.count()

    def end(self) -> None:
        self.count()


@contextmanager
def faulty(model: PreTrainedModel, fault: Fault | None, arguments: dict[str, Any]) -> Iterator[Raises | None]:
    """Put the fault in its place, and take it out."""
    if fault is None:
        yield None
        return
    raises = Raises(fault)
    wrapper: Any = model.generate
    place: Any = None
    if fault.where == "streamer":
        arguments["streamer"] = raises = Streamer(fault)
    elif fault.where == "processor":
        arguments["logits_processor"] = [raises.wrapping(lambda ids, scores: scores)]
    elif fault.where == "criterion":
        arguments["stopping_criteria"] = [raises.wrapping(lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool))]
    else:
        place = wrapper.ready().engine if fault.where in ("forward", "commit", "add") else wrapper.drafter
        setattr(place, fault.where, raises.wrapping(getattr(place, fault.where)))
    try:
        yield raises
    finally:
        if place is not None:
            delattr(place, fault.where)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, PreTrainedModel]:
    made: dict[Any, PreTrainedModel] = {"stock": tiny_model("llama")}
    head = save_head(MtpHead.from_target(made["stock"]), tmp_path_factory.mktemp("head"))
    for engine, method in WAYS:
        options = {} if method in (None, "suffix") else {"head": head, "enable_suffix_decoding": method != "mtp"}
        own = "mtp" if options else method
        made[engine, method] = specfx.speculate(tiny_model("llama"), own, engine=engine, compile="off", page_size=8, **options)
    made["reference"] = specfx.speculate(tiny_model("llama"), None, engine="graph", compile="off", page_size=8)
    return made


class Conversations:
    """State between calls: of each way a text ``[1, L]`` and the cache that a call returned with it."""

    def __init__(self) -> None:
        self.of: dict[Any, tuple[torch.Tensor, Any]] = {}
        self.faults = self.finished = self.resumed = 0


@pytest.fixture(autouse=True)
def _share_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "FEWEST_SHARED", 1)


@pytest.fixture(scope="module")
def conversations() -> Conversations:
    return Conversations()


def prompt_of(call: Call, text: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Rows that repeat themselves, one of them in a conversation; with `text`, it goes on from that."""
    lengths = call.lengths[:1] if call.goes_on else call.lengths
    generator, width = torch.Generator().manual_seed(sum(call.lengths)), max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for i, length in enumerate(lengths):
        half = torch.randint(1, VOCAB, (-(-length // 2),), generator=generator)
        ids[i, width - length :], mask[i, width - length :] = half.repeat(2)[:length], 1
    if text is not None:
        ids = torch.cat([text, ids], 1)
        mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask}


PHASES = (Phase.explicit, Phase.generate, *([Phase.shrink] if LONG else []))


@pytest.mark.timeout(3600 if LONG else 600)
@settings(max_examples=EXAMPLES, phases=PHASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_random_calls(call: Call, models: dict[Any, PreTrainedModel], conversations: Conversations) -> None:
    model, options, text, cache = models[call.way], dict(call.options), None, None
    if call.goes_on:
        text, cache = conversations.of.pop(call.way, (None, None))
        if text is None or text.shape[1] > 300:
            text, cache = None, specfx.PageCache()
        for name in ("num_beams", "num_return_sequences", "use_cache"):
            options.pop(name, None)
    arguments = {**prompt_of(call, text), **options, "max_new_tokens": call.new, "pad_token_id": PAD, "do_sample": call.sampled is not None}
    before = sum(specfx.explain(model).stock_calls.values())
    given = arguments | ({} if cache is None else {"past_key_values": cache})
    failure, out = None, None
    with faulty(model, call.fault, given) as raises:
        torch.manual_seed(call.sampled or 0)
        try:
            out = model.generate(**given)
        except BaseException as error:  # what it was is asked below
            failure = repr(error)
    assert (failure is not None) == (raises is not None and raises.raised) or (failure is not None and "streamer" in given), failure
    if out is not None:
        plain = getattr(out, "sequences", out)
        by_stock = call.sampled is None or sum(specfx.explain(model).stock_calls.values()) > before
        torch.manual_seed(call.sampled or 0)
        expected = models["stock" if by_stock else "reference"].generate(**arguments | {"return_dict_in_generate": False})
        assert torch.equal(plain, expected), call
        conversations.finished += 1
        conversations.resumed += specfx.stats(model).last.reused_tokens > 0 and text is not None
        text = plain
    else:
        conversations.faults += 1
    if cache is not None and not cache.is_changed and cache.get_seq_length():
        conversations.of[call.way] = text, cache
    del out, cache, arguments, given
    gc.collect()
    assert_pages(model, *call.way, conversations)


def assert_pages(model: PreTrainedModel, engine: str, method: str | None, conversations: Conversations) -> None:
    """Those of the conversation, if there is one, and no more."""
    _, cache = conversations.of.get((engine, method), (None, None))
    in_use, wrapper = specfx.explain(model).pages_in_use, model.generate
    assert len(wrapper.ready().engine._sequences if engine == "eager" else wrapper.ready().engine.pool._sequences) == (cache is not None)
    if engine == "graph":
        needed = 0 if cache is None else -(-cache.get_seq_length() // 8)
        assert needed <= in_use <= needed + 2 * (needed > 0), "what is still to be moved may lie behind the text"


def test_the_random_calls_met_every_case(models: dict[Any, PreTrainedModel], conversations: Conversations) -> None:
    """And when the conversations have gone, so have all pages."""
    if not conversations.finished:
        pytest.skip("the random calls did not run")
    assert conversations.faults >= EXAMPLES // 30
    assert conversations.resumed >= EXAMPLES // 30
    conversations.of.clear()
    gc.collect()
    for engine, method in WAYS:
        model = models[engine, method]
        assert specfx.explain(model).pages_in_use == 0
        assert not model.generate.ready().keeper.held
