"""Calls that end half way, by Ctrl-C, an error of the caller's code, a closed streamer or a lack of memory: all pages come back, the
drafter forgets the sequences, and the next calls are right, with every draft method and on the same prepared engine."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_generate import tokenizer
from test_kv_pool import CtrlC
from tiny import VOCAB, tiny_model
from transformers import PreTrainedModel, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import specfx
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.runtime import decode
from specfx.runtime.session import Runtime

CELLS = [(engine, method) for engine in ("graph", "eager") for method in (None, "suffix", "mtp")]
NEW = 12
SAMPLED = {"do_sample": True, "temperature": 1.3, "max_new_tokens": NEW}


def prompt_of(batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Text that repeats, so that something is drafted; rows begin alike, so that they share pages."""
    half = torch.randint(1, VOCAB, (batch, 8), generator=torch.Generator().manual_seed(seed))
    half[:, :5] = half[:1, :5]
    return half.repeat(1, 2)


def sampled(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(1)
    return model.generate(prompt_of(2), **SAMPLED)


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """Of a fresh stock model the greedy texts, and of method None the sampled one."""
    fresh = tiny_model("llama", num_hidden_layers=1)
    greedy = [fresh.generate(prompt_of(batch, 3), max_new_tokens=NEW) for batch in (1, 3)]
    return [*greedy, sampled(specfx.speculate(fresh, None, engine="graph", compile="off"))]


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: "-".join(map(str, cell)))
def wrapped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    engine, method = request.param
    model = tiny_model("llama", num_hidden_layers=1)
    options: dict[str, Any] = {"max_cached_requests": 0} if method == "suffix" else {}  # else the next call takes a step or two
    if method == "mtp":
        options["head"] = save_head(MtpHead.from_target(model), tmp_path_factory.mktemp("head"))
    return specfx.speculate(model, method, engine=engine, compile="off", page_size=8, **options)


@pytest.fixture
def model(wrapped: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, expected: list[torch.Tensor]) -> Any:
    """Afterwards nothing is left of the calls, and the model generates as a fresh one."""
    monkeypatch.setattr(decode, "FEWEST_SHARED", 1)
    engine = specfx.explain(wrapped).engine
    yield wrapped
    assert_nothing_left(wrapped)
    got = [wrapped.generate(prompt_of(batch, 3), max_new_tokens=NEW) for batch in (1, 3)]
    for a, b in zip([*got, sampled(wrapped)], expected, strict=True):
        assert torch.equal(a, b)
    assert_nothing_left(wrapped)
    report = specfx.explain(wrapped)
    assert report.engine == engine
    assert not report.stock_calls


def assert_nothing_left(model: PreTrainedModel) -> None:
    wrapper: Any = model.generate
    engine, drafter = wrapper.ready().engine, wrapper.drafter
    assert specfx.explain(model).pages_in_use == 0
    assert not (engine._sequences if engine.name == "eager" else engine.pool._sequences)
    if wrapper.method is not None:
        assert not (drafter._requests if wrapper.method == "suffix" else drafter._sequences)


ABORTS = (KeyboardInterrupt, torch.OutOfMemoryError)


class Nth:
    """Calls `verb`, and at the n-th call (from 0) raises: before it, or after it."""

    def __init__(self, verb: Callable[..., Any], n: int, error: Callable[[], BaseException], after: bool = False) -> None:
        self.verb, self.left, self.error, self.after = verb, n, error, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == -1 and not self.after:
            raise self.error()
        result = self.verb(*args, **kwargs)
        if self.left == -1:
            raise self.error()
        return result


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("Tried to allocate 20.00 GiB on purpose")


aborted = pytest.mark.parametrize("error", [KeyboardInterrupt, out_of_memory], ids=["ctrl-c", "out of memory"])


class Failing(BaseStreamer):
    """Raises at the n-th token (0: at the prompt), or at the end."""

    def __init__(self, n: int | None, error: BaseException) -> None:
        self.left, self.error = n, error

    def put(self, value: torch.Tensor) -> None:
        if self.left == 0:
            raise self.error
        self.left = None if self.left is None else self.left - 1

    def end(self) -> None:
        raise self.error


# --- the caller's code -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 6, None])
def test_a_streamer_that_raises(n: int | None, model: PreTrainedModel) -> None:
    with pytest.raises(BrokenPipeError, match="gone"):
        model.generate(prompt_of(), max_new_tokens=NEW, streamer=Failing(n, BrokenPipeError("gone")))


def test_a_streamer_to_a_closed_file(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    streamer = TextStreamer(tokenizer(), skip_prompt=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(ValueError, match="closed file"):
            model.generate(prompt_of(), max_new_tokens=NEW, streamer=streamer)


def in_a_thread(model: PreTrainedModel, streamer: TextIteratorStreamer) -> tuple[threading.Thread, list[Any]]:
    """A call, and where its result or its error is put."""
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append(model.generate(prompt_of(seed=3), max_new_tokens=NEW, streamer=streamer))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, outcome


def test_a_reader_that_leaves_early(model: PreTrainedModel, expected: list[torch.Tensor]) -> None:
    """Nobody is told; the call goes on to its end."""
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
    thread, outcome = in_a_thread(model, streamer)
    assert next(piece for piece in streamer if piece)
    thread.join(60)
    assert torch.equal(outcome[0], expected[0])


def test_an_iterator_streamer_that_is_closed_half_way(model: PreTrainedModel) -> None:
    class Closed(TextIteratorStreamer):
        pieces = 0

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.pieces += bool(text)
            if self.pieces == 4:
                super().on_finalized_text("", stream_end=True)
                raise ConnectionResetError("the reader has gone")
            super().on_finalized_text(text, stream_end)

    streamer = Closed(tokenizer(), skip_prompt=True, timeout=60)
    thread, outcome = in_a_thread(model, streamer)
    assert len([piece for piece in streamer if piece]) == 3
    thread.join(60)
    assert isinstance(outcome[0], ConnectionResetError)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("where", ["stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"])
def test_a_callback_that_is_interrupted(where: str, n: int, model: PreTrainedModel) -> None:
    plain: dict[str, Callable[..., Any]] = {
        "stopping_criteria": lambda ids, scores: torch.zeros(1, dtype=torch.bool),
        "logits_processor": lambda ids, scores: scores,
        "prefix_allowed_tokens_fn": lambda batch, ids: list(range(VOCAB)),
    }
    callback: Any = Nth(plain[where], n, KeyboardInterrupt)
    prefills = specfx.stats(model).total.prefills
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt_of(), max_new_tokens=NEW, **{where: callback if where.startswith("prefix") else [callback]})
    assert callback.left == -1
    assert specfx.stats(model).total.prefills == prefills + (n > 0 or where == "stopping_criteria"), "an interrupted call counts too"


# --- the engine and the drafter --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
@aborted
@pytest.mark.parametrize("verb", ["add", "inherit", "forward", "commit"])
def test_an_engine_step_that_is_interrupted(
    verb: str, error: Callable[[], BaseException], sampling: dict[str, Any], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch of two: while it makes room, in either prompt, and in the first and a later step; before the engine's work or after it."""
    serving = specfx.api.engine_of(model)
    for n in {"add": (0, 1), "inherit": (0,)}.get(verb, (0, 1, 2, 4)):
        for after in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(serving, verb, Nth(getattr(serving, verb), n, error, after))
                with pytest.raises(ABORTS, match="" if error is KeyboardInterrupt else "on purpose"):
                    model.generate(prompt_of(2), max_new_tokens=NEW, **sampling)
            assert_nothing_left(model)


@aborted
@pytest.mark.parametrize("verb", ["add", "propose", "accept"])
def test_a_drafter_that_is_interrupted(
    verb: str, error: Callable[[], BaseException], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = specfx.drafter_of(model)
    for n in (0, 1) if verb == "add" else (0, 1, 3):
        for after in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(drafter, verb, Nth(getattr(drafter, verb), n, error, after))
                with pytest.raises(ABORTS):
                    model.generate(prompt_of(2), max_new_tokens=NEW)
            assert_nothing_left(model)


def test_ctrl_c_by_signal(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the terminal sends it, in the middle of a forward."""
    serving, calls = specfx.api.engine_of(model), []
    forward = serving.forward

    def signalled(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(batch)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have had it ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(serving, "forward", signalled)
            with pytest.raises(KeyboardInterrupt):
                model.generate(prompt_of(), max_new_tokens=NEW)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == 3


def test_ctrl_c_once_more_while_the_call_is_tidied_up(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any line of that but the first, which begins it."""
    close, at, second = Runtime.close, 1, CtrlC(0)
    while at == 1 or second.raised:
        second = CtrlC(at, "session.py", "kv_pool.py", "paged.py", "eager.py", "mtp.py", "suffix.py")
        with monkeypatch.context() as patch:
            patch.setattr(Runtime, "close", lambda runtime, second=second: second.during(lambda: close(runtime)))
            with pytest.raises((BrokenPipeError, KeyboardInterrupt)):
                model.generate(prompt_of(), max_new_tokens=NEW, streamer=Failing(3, BrokenPipeError("gone")))
        assert_nothing_left(model)
        at += 1
    assert at > 8


def test_an_interrupted_call_leaves_a_conversation_as_it_was(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages stay, and the next turn goes on from them."""
    cache = specfx.PageCache()
    text = model.generate(prompt_of(), max_new_tokens=NEW, past_key_values=cache)
    longer = torch.cat([text, prompt_of(seed=1)], 1)
    whole = type(model).generate(model, longer, max_new_tokens=NEW)
    pages, serving = specfx.explain(model).pages_in_use, specfx.api.engine_of(model)
    for n in (0, 2):
        with monkeypatch.context() as patch:
            patch.setattr(serving, "forward", Nth(serving.forward, n, KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                model.generate(longer, max_new_tokens=NEW, past_key_values=cache)
        assert specfx.explain(model).pages_in_use == pages
    assert torch.equal(model.generate(longer, max_new_tokens=NEW, past_key_values=cache), whole)
    assert specfx.stats(model).last.reused_tokens >= text.shape[1] - 2
    del cache
    model.generate(prompt_of(), max_new_tokens=1)  # the engine hears of it at the next call
