"""Batches: rows of unequal lengths and ends, prefixes that are stored once, budgets that are shared, long prompts in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from transformers import PreTrainedModel

import specfx
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.engines.base import Engine, Rows
from specfx.errors import KVPoolError

PAD = 0
PAGE = 8


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded(*prompts: list[int]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def stock(model: PreTrainedModel, **kwargs: Any) -> torch.Tensor:
    return type(model).generate(model, pad_token_id=PAD, **kwargs)


Wrap = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def wrap(tmp_path_factory: pytest.TempPathFactory) -> Wrap:
    """``wrap(engine, method)``: each engine is prepared once."""
    models = {engine: tiny_model("llama") for engine in ("graph", "eager")}
    head = save_head(MtpHead.from_target(models["graph"]), tmp_path_factory.mktemp("head"))

    def wrapped(engine: str = "graph", method: str | None = "suffix", **options: Any) -> PreTrainedModel:
        options |= {"head": head} if method == "mtp" else {}
        return specfx.speculate(models[engine], method, engine=engine, compile="off", page_size=PAGE, **options)

    return wrapped


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[tuple[list[Rows], int]]]:
    """The forwards of a block: their rows, and the pages in use at each."""
    wrapper: Any = model.generate
    engine: Engine = wrapper.ready().engine
    forward, seen = engine.forward, []

    def watching(batch: Any) -> Any:
        seen.append((list(batch), specfx.explain(model).pages_in_use))
        return forward(batch)

    engine.forward = watching  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del engine.forward  # type: ignore[attr-defined]
    assert specfx.explain(model).pages_in_use == 0
    assert not specfx.explain(model).stock_calls


# --- what rows have in common ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "suffix", "mtp"])
@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_a_common_prefix_is_prefilled_and_stored_once(engine: str, method: str | None, wrap: Wrap) -> None:
    model = wrap(engine, method)
    system, other = prompt_of(36), prompt_of(30, 9)
    tails = [prompt_of(n, 10 + n) for n in (5, 9, 3, 7)]
    call = padded(*(system + tail for tail in tails), other)
    expected = stock(model, **call, max_new_tokens=8)
    with watched(model) as seen:
        assert torch.equal(model.generate(**call, max_new_tokens=8, pad_token_id=PAD), expected)
    last = specfx.stats(model).last
    again = 3 if (engine, method) == ("graph", "mtp") else 0  # the head's row of the last common token is not common
    assert last.prompt_tokens == len(system) + sum(map(len, tails)) + len(other) + again
    assert last.reused_tokens == 3 * len(system) - again
    if engine == "graph" and method is None:
        rooms = [-(-(len(p) + 8 + 16) // PAGE) for p in (*(system + t for t in tails), other)]
        assert seen[0][1] == sum(rooms) - 3 * (len(system) // PAGE)


@pytest.mark.parametrize("method", [None, "suffix", "mtp"])
@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("length", [4 * PAGE, 4 * PAGE + 5])
def test_returned_sequences_share_their_prompt(length: int, engine: str, method: str | None, wrap: Wrap) -> None:
    model = wrap(engine, method)
    ids = torch.tensor([prompt_of(length)])
    alone = []
    for n in (6, 1):
        torch.manual_seed(4)
        alone.append(model.generate(ids, max_new_tokens=10, do_sample=True, num_return_sequences=n))
        if n == 6:
            prefilled = length + 5 if (engine, method) == ("graph", "mtp") else length
            assert specfx.stats(model).last.prompt_tokens == prefilled
    assert torch.equal(alone[0][:1], alone[1])
    assert len({tuple(row) for row in alone[0].tolist()}) == 6
    got = model.generate(**padded(ids[0].tolist(), prompt_of(20, 5), ids[0].tolist()), max_new_tokens=10, pad_token_id=PAD)
    assert torch.equal(got, stock(model, **padded(ids[0].tolist(), prompt_of(20, 5), ids[0].tolist()), max_new_tokens=10))


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_a_row_that_ends_at_its_first_token_leaves_the_prefix_to_the_others(engine: str, wrap: Wrap) -> None:
    model = wrap(engine)
    prompt, others = prompt_of(37), [prompt_of(n, n) for n in (4, 6)]
    call = padded(prompt, prompt, *(prompt + other for other in others))
    first = int(stock(model, **call, max_new_tokens=1)[0, -1])
    for new in (1, 12):
        expected = stock(model, **call, max_new_tokens=new, eos_token_id=first)
        with watched(model):
            assert torch.equal(model.generate(**call, max_new_tokens=new, eos_token_id=first, pad_token_id=PAD), expected)


def test_a_pool_that_holds_the_batch_only_because_it_shares() -> None:
    """40 tokens of prompt, 4 new ones and a tree: 8 pages a row, of which 5 are common."""
    prompt, model = prompt_of(40), tiny_model("llama")
    for rows, fits in ((4, True), (5, False)):
        wrapped = specfx.speculate(model, None, engine="graph", compile="off", page_size=PAGE, kv_pool=5 + 3 * 4)
        call = padded(*[prompt] * rows)
        if fits:
            assert torch.equal(wrapped.generate(**call, max_new_tokens=4, pad_token_id=PAD), stock(wrapped, **call, max_new_tokens=4))
        else:
            with pytest.raises(KVPoolError):
                wrapped.generate(**call, max_new_tokens=4, pad_token_id=PAD)
        assert specfx.explain(wrapped).pages_in_use == 0


# --- many rows -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "suffix"])
def test_64_rows_of_unequal_prompts_whose_pages_go_as_they_end(method: str | None, wrap: Wrap) -> None:
    model = wrap("graph", method)
    call = padded(*(prompt_of(1 + i * 7 % 50, i) for i in range(64)))
    free = stock(model, **call, max_new_tokens=24)[:, -24:]
    eos = free[:, 6:].flatten().bincount().topk(3).indices.tolist()
    expected = stock(model, **call, max_new_tokens=24, eos_token_id=eos)
    ends = {next((i for i, t in enumerate(row) if t in eos), 24) for row in expected[:, -24:].tolist()}
    assert len(ends) > 5
    with watched(model) as seen:
        assert torch.equal(model.generate(**call, max_new_tokens=24, eos_token_id=eos, pad_token_id=PAD), expected)
    steps = [(len(batch), pages) for batch, pages in seen if not batch[0].last_only]
    assert len(seen) - len(steps) < 8, "prompts are run together"
    assert steps[0][0] > steps[-1][0]
    for (rows, pages), (fewer, left) in itertools.pairwise(steps):
        assert (fewer < rows) == (left < pages), "a sequence that ends frees its pages before the next forward"


# --- long prompts ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_a_long_prompt_is_run_in_pieces_and_tells_how_far_it_is(engine: str, wrap: Wrap) -> None:
    told: list[tuple[int, int]] = []
    model = wrap(engine, "suffix", prefill_callback=lambda done, total: told.append((done, total)))
    long, short = prompt_of(300), prompt_of(20, 3)
    with watched(model) as seen:
        got = model.generate(torch.tensor([long]), max_new_tokens=6, prefill_chunk_size=128)
    assert torch.equal(got, stock(model, input_ids=torch.tensor([long]), max_new_tokens=6))
    assert told == [(128, 300), (256, 300), (300, 300)]
    assert [batch[0].count for batch, _ in seen[:3]] == [128, 128, 44]
    told.clear()
    call = padded(long, short, long[:290] + short)
    assert torch.equal(model.generate(**call, max_new_tokens=6, pad_token_id=PAD), stock(model, **call, max_new_tokens=6))
    assert told == [(320, 630), (610, 630), (630, 630)]  # what the third has in common with the first is not run


def test_a_callback_that_raises_in_a_long_prompt(wrap: Wrap) -> None:
    def callback(done: int, total: int) -> None:
        if done > 200:
            raise KeyboardInterrupt

    model = wrap("graph", "suffix", prefill_callback=callback)
    ids = torch.tensor([prompt_of(300)])
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=6, prefill_chunk_size=128)
    assert specfx.explain(model).pages_in_use == 0
    model = wrap("graph", "suffix")
    assert torch.equal(model.generate(ids, max_new_tokens=6), stock(model, input_ids=ids, max_new_tokens=6))
    with pytest.raises(specfx.errors.OptionError, match="prefill_callback=3: must be callable"):
        wrap(prefill_callback=3)
