"""Recurrent and convolutional states in the eager engine: what is copied, put back and fed again, and what the gate would notice."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_eager_engine import Greedy, prompt_of, stock_greedy
from tiny import FORGETFUL_NAMES, RECURRENT_NAMES, VOCAB, tiny_model
from transformers import DynamicCache, PreTrainedModel

import specfx
from specfx import gate
from specfx.drafters.base import NoDrafter
from specfx.engines import eager_past
from specfx.engines.base import Rows
from specfx.engines.eager import EagerEngine
from specfx.engines.eager_past import MOST_UNFED, Past, Snapshot, state_layers
from specfx.errors import GateError, Reason
from specfx.runtime import session
from specfx.runtime.stats import CallStats
from specfx.runtime.tree import EMPTY_TREE, DraftTree

HIDDEN_IS_THE_HEADS_INPUT = tuple(name for name in RECURRENT_NAMES if name != "inkling")
"""Inkling scales its hidden states before the head."""


def states(cache: DynamicCache) -> list[torch.Tensor]:
    """All of a cache's states, in order."""
    return [
        t for layer in state_layers(cache) for held in (layer.conv_states, layer.recurrent_states) for t in held.values() if t is not None
    ]


def keys(cache: DynamicCache) -> list[torch.Tensor]:
    return [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]


def chain(*tokens: int) -> DraftTree:
    return DraftTree.chain(tokens)


class Calls:
    """Counts the rows of each call of an engine's model; `fail` names a module before which the next call raises."""

    def __init__(self, engine: EagerEngine) -> None:
        self.rows: list[int] = []
        self.fail: torch.nn.Module | None = None
        engine.model.register_forward_pre_hook(self._count, with_kwargs=True)
        for module in engine.model.modules():
            module.register_forward_pre_hook(self._fail)

    def _count(self, _module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self.rows.append(kwargs["input_ids"].shape[1])

    def _fail(self, module: torch.nn.Module, _args: Any) -> None:
        if module is self.fail:
            self.fail = None
            raise KeyboardInterrupt


# --- against stock ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT_NAMES)
def test_generate_equals_stock(name: str) -> None:
    """Batches of one and three; prompts shorter and longer than a draft; drafts that are rejected, then (the same call again) accepted."""
    model = tiny_model(name)
    for method in (None, "suffix"):
        specfx.speculate(model, method, engine="eager")
        for batch, length in ((1, 2), (1, 40), (3, 12)):
            prompt = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
            arguments = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
            expected = type(model).generate(model, prompt, **arguments)
            for attempt in range(2):
                assert torch.equal(model.generate(prompt, **arguments), expected), (method, batch, length, attempt)
            stats = specfx.stats(model)
            assert stats.tokens == batch * 40
            assert stats.tokens_per_forward > 3 if method else stats.tokens_per_forward == 1
    report = specfx.explain(model)
    assert (report.engine, report.verifies, report.stock_calls) == ("eager", "chains", {})
    assert [r.reason for r in report.refusals] == [Reason.RECURRENT_STATES]
    assert "chains" in str(report)


def test_left_padded_rows_equal_stock() -> None:
    model = specfx.speculate(tiny_model("qwen3_next"), "suffix", engine="eager")
    prompt = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(prompt)
    mask[1, :15] = mask[2, :19] = 0
    arguments = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(prompt, attention_mask=mask, **arguments)
    for row, seen in zip(ours, mask, strict=True):
        alone = type(model).generate(model, row[:20][seen.bool()][None], **arguments)
        assert row[20:].tolist() == alone[0, int(seen.sum()) :].tolist()


@pytest.mark.parametrize("name", FORGETFUL_NAMES)
def test_models_that_forget_their_state_go_to_stock_with_a_reason(name: str) -> None:
    model, prompt = tiny_model(name), torch.tensor([prompt_of(1)])
    specfx.speculate(model, "suffix", engine="eager")
    assert torch.equal(model.generate(prompt, max_new_tokens=8), type(model).generate(model, prompt, max_new_tokens=8))
    report = specfx.explain(model)
    assert report.verifies == "nothing"
    assert dict(report.stock_calls) == {"no engine can verify drafts on this model": 1}
    assert [r.reason for r in report.refusals] == [Reason.CHAINS_UNVERIFIABLE, Reason.NOT_ACCELERATED]


def test_a_callers_mamba_cache_is_filled_by_stock() -> None:
    model, prompt = tiny_model("mamba2"), torch.tensor([prompt_of(1)])
    specfx.speculate(model, "suffix", engine="eager")
    cache = DynamicCache(config=model.config)
    model.generate(prompt, max_new_tokens=4, cache_params=cache)
    assert all(bool(t.any()) for t in states(cache))
    assert dict(specfx.explain(model).stock_calls) == {"cache_params given by the caller": 1}


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("name", RECURRENT_NAMES)
def test_a_prompt_in_chunks_leaves_the_states_of_one_prefill(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny_model(name), prompt_of(3, 37)
    engine = EagerEngine(model)
    engine.add(0, 64)
    (whole,) = engine.forward([Rows(0, prompt)])
    engine.commit(0, range(37))
    engine.add(1, 64)
    pieces = []
    for start in range(0, 37, chunk):
        pieces.append(engine.forward([Rows(1, prompt[start : start + chunk])])[0])
        engine.commit(1, range(len(pieces[-1].choice)))
    torch.testing.assert_close(torch.cat([p.logits for p in pieces]), whole.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cat([p.hidden for p in pieces]), whole.hidden, rtol=1e-3, atol=1e-3)
    for one, other in zip(states(engine._sequences[0].cache), states(engine._sequences[1].cache), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)

    monkeypatch.setattr(session, "PREFILL_CHUNK", chunk)
    specfx.speculate(model, "suffix", engine="eager")
    ids = torch.tensor([prompt])
    assert torch.equal(model.generate(ids, max_new_tokens=24), type(model).generate(model, ids, max_new_tokens=24))


# --- rejections ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT_NAMES)
def test_rejected_rows_leave_no_trace(name: str) -> None:
    model, prompt = tiny_model(name), prompt_of(2)
    engine = EagerEngine(model)
    engine.add(0, 64)
    engine.forward([Rows(0, prompt_of(3))])  # rolled back: the next forward comes without a commit
    engine.forward([Rows(0, prompt)])
    engine.commit(0, range(len(prompt)))
    before = [t.clone() for t in states(engine._sequences[0].cache)]
    engine.forward([Rows(0, [5], chain(6, 7))])
    engine.commit(0, [])
    assert all(torch.equal(a, b) for a, b in zip(before, states(engine._sequences[0].cache), strict=True))
    assert {k.shape[-2] for k in keys(engine._sequences[0].cache)} <= {len(prompt)}
    engine.forward([Rows(0, [1], chain(2, 3, 4))])
    engine.commit(0, [0, 1])
    engine.forward([Rows(0, [8], chain(9))])  # rolled back: 1 and 2 must be fed again once more
    engine.forward([Rows(0, [3])])
    engine.commit(0, [0])
    text = [*prompt, 1, 2, 3]
    assert engine.length(0) == len(text)
    (used,) = engine.forward([Rows(0, [20, 21])])

    engine.add(7, 64)
    engine.forward([Rows(7, text)])
    engine.commit(7, range(len(text)))
    (clean,) = engine.forward([Rows(7, [20, 21])])
    torch.testing.assert_close(used.logits, clean.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(used.hidden, clean.hidden, rtol=1e-3, atol=1e-3)
    for one, other in zip(states(engine._sequences[0].cache), states(engine._sequences[7].cache), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert [k.shape for k in keys(engine._sequences[0].cache)] == [k.shape for k in keys(engine._sequences[7].cache)]


@pytest.mark.parametrize("name", HIDDEN_IS_THE_HEADS_INPUT)
def test_hidden_states_behind_a_rejection_are_those_of_the_rows(name: str) -> None:
    """What an MTP drafter is given: of the rows of this forward, not of those that were fed again before them."""
    model, text = tiny_model(name), prompt_of(4)
    engine = EagerEngine(model)
    engine.add(0, 64)
    engine.forward([Rows(0, text)])
    engine.commit(0, range(len(text)))
    for step in range(8):
        drafts = prompt_of(10 + step, 6)
        (output,) = engine.forward([Rows(0, drafts[:1], chain(*drafts[1:]))])
        stock = model(torch.tensor([[*text, *drafts]]), use_cache=False, output_hidden_states=True).hidden_states[-1][0, len(text) :]
        assert output.hidden.shape == (6, 32)
        assert output.logits.shape == (6, VOCAB)
        torch.testing.assert_close(output.hidden, stock, rtol=1e-3, atol=1e-3)
        kept = (3, 6, 1, 5, 4, 5, 5, 2)[step]
        engine.commit(0, range(kept))
        text += drafts[:kept]


class Partly(NoDrafter):
    """Drafts the right answer with a wrong token somewhere, in branching trees, and keeps the hidden states that it is given."""

    needs_hidden = True
    on_trial = False

    def __init__(self, answer: list[int]) -> None:
        self.answer, self.known, self.rng = answer, 0, random.Random(0)
        self.hidden: list[torch.Tensor] = []

    def accept(self, seq: int, tokens: Any, hidden: torch.Tensor | None, drafted: DraftTree | None = None) -> None:
        self.known += len(tokens)
        self.hidden.append(hidden.clone())

    def propose(self, seqs: Any, budgets: Any) -> list[DraftTree]:
        rest = self.answer[self.known :][: min(7, budgets[0])]
        if len(rest) < 3:
            return [EMPTY_TREE]
        wrong = self.rng.randrange(1, len(rest) - 1)
        tokens = [(t + (i == wrong)) % VOCAB for i, t in enumerate(rest)]
        sibling = (tokens[0] + 7) % VOCAB
        return [DraftTree((*tokens[:-1], sibling), (*range(-1, len(tokens) - 2), -1), (*[0.9**i for i in range(1, len(tokens))], 0.1))]


@pytest.mark.parametrize("name", HIDDEN_IS_THE_HEADS_INPUT)
def test_a_drafter_is_given_the_hidden_states_of_all_committed_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the runtime: a prompt in chunks, trees that become chains, rejections, tokens that are fed again."""
    model, prompt = tiny_model(name), prompt_of(3, 23)
    answer = stock_greedy(model, prompt, 48)
    engine, stats = EagerEngine(model), CallStats()
    calls = Calls(engine)
    monkeypatch.setattr(session, "PREFILL_CHUNK", 6)
    runtime = session.Runtime(engine, drafter := Partly(answer), 8, stats)
    got = list(runtime.add(prompt, 48, lambda token: False).tokens)
    while runtime.sequences:
        (committed,) = runtime.step()
        got += committed.tokens
    assert got == answer
    assert stats.forwards < 30
    assert len(calls.rows) > 4 + stats.forwards, "unfed tokens had no forward of their own"
    hidden = torch.cat(drafter.hidden)
    text = torch.tensor([[*prompt, *answer]])
    stock = model(text, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
    assert len(hidden) > len(prompt) + 40
    torch.testing.assert_close(hidden, stock[: len(hidden)], rtol=1e-3, atol=1e-3)


def test_sampling_draws_the_same_text_whatever_is_drafted() -> None:
    texts = set()
    for method in (None, "suffix", "suffix"):
        model = specfx.speculate(tiny_model("qwen3_next"), method, engine="eager")
        torch.manual_seed(3)
        ids = model.generate(torch.tensor([prompt_of(1)] * 2), max_new_tokens=40, do_sample=True, temperature=0.2, pad_token_id=0)
        texts.add(tuple(ids.flatten().tolist()))
        assert not specfx.explain(model).stock_calls
    assert len(texts) == 1


def test_a_rejection_costs_rows_and_no_forward_until_many_are_unfed() -> None:
    engine = EagerEngine(tiny_model("qwen3_next"))
    calls = Calls(engine)
    engine.add(0, 256)
    engine.forward([Rows(0, prompt_of(1))])
    engine.commit(0, range(13))
    for kept in (4, 3, 0, 4, 2, 3, 1, 4, 1):
        engine.forward([Rows(0, [1], chain(2, 3, 4))])
        engine.commit(0, range(kept))
    engine.forward([Rows(0, [1])])
    assert calls.rows == [13, 4, 4, 4 + 3, 4 + 3, 4, 4 + 2, 4 + 5, 4 + 6, 4, 1 + 1]


def test_unfed_tokens_are_bounded() -> None:
    """Of chains of nine rows eight are kept: two make 16, which get a forward of their own."""
    engine = EagerEngine(tiny_model("qwen3_next"))
    calls = Calls(engine)
    engine.add(0, 256)
    engine.forward([Rows(0, prompt_of(1))])
    engine.commit(0, range(13))
    for _ in range(5):
        engine.forward([Rows(0, [1], chain(*range(2, 10)))])
        engine.commit(0, range(8))
    assert MOST_UNFED == 16
    assert calls.rows == [13, 9, 9 + 8, 16, 9, 9 + 8, 16, 9]
    assert engine.length(0) == 13 + 5 * 8


def test_plain_decoding_feeds_no_token_twice() -> None:
    model = specfx.speculate(tiny_model("qwen3_next"), None, engine="eager")
    calls = Calls(specfx.api.engine_of(model))
    model.generate(torch.tensor([prompt_of(1)]), max_new_tokens=12)
    assert calls.rows == [13, *[1] * 11]


# --- interruptions ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT_NAMES)
def test_an_interrupted_forward_leaves_the_states_right(name: str) -> None:
    """Before any module, in a prefill, behind rejections, and in the forward of the unfed tokens alone."""
    model, prompt = tiny_model(name), prompt_of(6)
    expected, rng = stock_greedy(model, prompt, 40), random.Random(0)
    engine = EagerEngine(model)
    calls = Calls(engine)
    modules = [m for m in engine.model.modules() if m is not engine.model and not isinstance(m, torch.nn.ModuleList)]
    engine.add(0, 64)
    interrupted = fed_alone = 0

    def forward(rows: Rows) -> list[int]:
        nonlocal interrupted, fed_alone
        for _ in range(2):
            calls.fail, calls.rows = rng.choice(modules), []
            try:
                output = engine.forward([rows])[0]
            except KeyboardInterrupt:
                interrupted += 1
                fed_alone += len(calls.rows) == 1 and len(engine._sequences[0].unfed) >= MOST_UNFED
            else:
                break
        else:
            calls.fail = None
            output = engine.forward([rows])[0]
        calls.fail = None
        return output.choice

    out = forward(Rows(0, prompt, last_only=True))
    engine.commit(0, range(len(prompt)))
    while len(out) < 40:
        rest = expected[len(out) :]
        right = min(len(rest), rng.choice((1, 2, 6)))
        tree = chain(*rest[:right], (rest[right] + 1) % VOCAB if right < len(rest) else 0)
        argmax = forward(Rows(0, out[-1:], tree))
        rows = tree.walk(argmax)
        engine.commit(0, rows)
        out += [argmax[row] for row in rows]
    assert out[:40] == expected
    assert interrupted > 5
    assert fed_alone > 0


def test_an_interrupted_call_is_followed_by_a_right_one() -> None:
    model = specfx.speculate(tiny_model("qwen3_next"), "suffix", engine="eager")
    ids = torch.tensor([prompt_of(1)])
    expected = type(model).generate(model, ids, max_new_tokens=24)

    def stop(seen: torch.Tensor, _scores: Any) -> torch.Tensor:
        if seen.shape[1] == 20:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=24, stopping_criteria=[stop])
    assert not specfx.api.engine_of(model)._sequences
    assert torch.equal(model.generate(ids, max_new_tokens=24), expected)


# --- memory ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECURRENT_NAMES)
def test_a_snapshot_holds_the_states_and_no_keys(name: str) -> None:
    engine = EagerEngine(tiny_model(name))
    engine.add(0, 512)
    sizes = set()
    for seed in range(3):
        engine.forward([Rows(0, prompt_of(seed, 50))])
        engine.commit(0, range(50))
        assert engine._sequences[0]._snapshot is None, "the states are right as they are"
        engine.forward([Rows(0, [1, 2, 3])])
        past = engine._sequences[0]
        copies = [t for _, values in past._snapshot.saved for held in values.values() for t in held.values() if isinstance(t, torch.Tensor)]
        sizes.add(sum(t.numel() for t in copies))
        assert sorted(t.shape for t in copies) == sorted(t.shape for t in states(past.cache))
        assert not {t.data_ptr() for t in copies} & {t.data_ptr() for t in (*states(past.cache), *keys(past.cache))}
        engine.commit(0, [0])
        assert past._snapshot is None, "it has become the cache's"
        assert {t.data_ptr() for t in copies} == {t.data_ptr() for t in states(past.cache)}
    assert len(sizes) == 1, "its size doesn't grow with the text"


def test_a_model_without_states_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_past, "Snapshot", lambda cache: pytest.fail("copied"))
    for name in ("llama", "gemma3", "gpt_oss"):
        assert EagerEngine(tiny_model(name)).verifies == "trees"


def test_windows_are_kept_whole() -> None:
    """A sliding window beside a state: all keys stay, so that rows of any forward can be cut off."""
    engine = EagerEngine(tiny_model("inkling"))
    engine.add(0, 64)
    engine.forward([Rows(0, prompt_of(1, 30))])
    engine.commit(0, range(30))
    assert {k.shape[-2] for k in keys(engine._sequences[0].cache)} == {30}
    assert len(keys(engine._sequences[0].cache)) == 2


# --- what the gate notices -------------------------------------------------------------------------------------------------------------


def not_put_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Snapshot, "put_back", lambda self: None)


def not_copied(patch: pytest.MonkeyPatch) -> None:
    """The snapshot is a reference, which the forward changes in place."""
    patch.setattr(eager_past, "_copied", dict)


def only(kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Only the states of this kind are put back."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(eager_past, "_STATE", tuple(name for name in eager_past._STATE if kind in name or name == "has_previous_state"))

    return mutate


def not_fed_again(patch: pytest.MonkeyPatch) -> None:
    commit = Past.commit

    def forgetting(self: Past, rows: Any) -> None:
        commit(self, rows)
        self.length -= len(self.unfed)
        self.unfed = []

    patch.setattr(Past, "commit", forgetting)


def fed_without_a_forward(patch: pytest.MonkeyPatch) -> None:
    """The forward of the unfed tokens alone is left out."""
    call = EagerEngine._call
    patch.setattr(EagerEngine, "_call", lambda self, past, tokens, *rest: call(self, past, tokens, *rest) if tokens else None)


def keys_not_cut(patch: pytest.MonkeyPatch) -> None:
    cut = Past._cut
    patch.setattr(Past, "_cut", lambda self, rows: None if self.held else cut(self, rows))


def all_rows_kept(patch: pytest.MonkeyPatch) -> None:
    """A chain's states are taken as right whatever was committed of it."""
    commit = Past.commit

    def keeping(self: Past, rows: Any) -> None:
        commit(self, range(len(self.rows)) if rows else ())

    patch.setattr(Past, "commit", keeping)


def states_of_one_sequence(patch: pytest.MonkeyPatch) -> None:
    """All sequences share the layers with states."""
    new, shared = eager_past.new_cache, []

    def sharing(config: Any) -> DynamicCache:
        cache = new(config)
        shared[:] = shared or [layer for layer in cache.layers if not hasattr(layer, "keys")]
        layers = iter(shared)
        cache.layers = [layer if hasattr(layer, "keys") else next(layers) for layer in cache.layers]
        return cache

    patch.setattr(eager_past, "new_cache", sharing)


MUTATIONS = {
    "states not put back": not_put_back,
    "states not copied": not_copied,
    "convolutions not put back": only("recurrent"),
    "recurrent states not put back": only("conv"),
    "accepted tokens not fed again": not_fed_again,
    "unfed tokens forgotten when there are many": fed_without_a_forward,
    "keys not cut": keys_not_cut,
    "rejected rows kept": all_rows_kept,
    "sequences share states": states_of_one_sequence,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
def test_the_gate_notices(name: str, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[mutation](monkeypatch)
    engine = EagerEngine(tiny_model(name))
    assert engine.verifies == "nothing"
    assert [r.reason for r in engine.refusals] == [Reason.CHAINS_UNVERIFIABLE]
    assert not engine._sequences


def state_dropped(model: PreTrainedModel, when: Callable[[int, int], bool], patch: pytest.MonkeyPatch) -> None:
    """The model forgets its recurrent states before a forward of which `when` (its rows, tokens before it) is true."""
    forward = type(model).forward

    def forgetting(self: Any, input_ids: torch.Tensor, past_key_values: Any = None, **rest: Any) -> Any:
        if past_key_values is not None and (past := past_key_values.get_seq_length()) and when(input_ids.shape[1], past):
            for layer in state_layers(past_key_values):
                for state in layer.recurrent_states.values():
                    state.zero_()
        return forward(self, input_ids=input_ids, past_key_values=past_key_values, **rest)

    patch.setattr(type(model), "forward", forgetting)


@pytest.mark.parametrize(
    ("where", "when"),
    [
        ("chain", lambda rows, past: rows > 1 and past >= gate.PROMPT),
        ("second piece of a prompt", lambda rows, past: past == 4),
        ("single tokens", lambda rows, past: rows == 1 and past == gate.PROMPT + 7),
        ("1 rows behind 31 tokens", lambda rows, past: rows == 1 and past == gate.PROMPT + gate.SINGLE + 4),
    ],
)
def test_each_forward_behind_a_state_is_compared(where: str, when: Callable[[int, int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_next")
    with monkeypatch.context() as patch:
        state_dropped(model, lambda rows, past: False, patch)
        assert EagerEngine(model).verifies == "chains", "the wrapper itself changes nothing"
    state_dropped(model, when, monkeypatch)
    assert f"{where}: logits differ from the stock model's by" in EagerEngine(model).refusals[0].detail


def test_a_model_that_computes_one_row_otherwise_than_several_is_refused() -> None:
    """Nemotron-H: with a least time step, drafted rows would be given other logits than stock's single tokens."""
    engine = EagerEngine(tiny_model("nemotron_h", time_step_min=0.001))
    assert engine.verifies == "nothing"
    assert "single tokens: logits differ" in engine.refusals[0].detail


def test_the_gate_feeds_unfed_tokens_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EagerEngine(tiny_model("qwen3_next"))
    alone, call = list[int](), engine._call
    monkeypatch.setattr(
        engine, "_call", lambda past, tokens, *rest: (tokens or alone.append(len(past.unfed)), call(past, tokens, *rest))[1]
    )
    gate.check_states(engine, engine.model, gate.random_tokens(engine.model, gate.PROMPT + 21))
    assert alone == [17]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECURRENT_NAMES)
def test_the_probe_passes_rounding(name: str, dtype: torch.dtype) -> None:
    assert EagerEngine(tiny_model(name).to(dtype)).verifies == "chains"


def test_states_outside_the_cache_are_refused_by_name() -> None:
    model = tiny_model("llama")
    model.config.layer_types = ["recurrent", "full_attention"]
    engine = EagerEngine(model)
    assert engine.verifies == "nothing"
    assert "layers of type recurrent keep a state outside the cache" in engine.refusals[0].detail


def test_engines_that_cannot_put_states_back_refuse_them_by_name() -> None:
    for name in RECURRENT_NAMES:
        config = tiny_model(name).config
        gate.refuse_by_name(config, states=True)
        with pytest.raises(GateError, match="keep a state that this engine can't put back"):
            gate.refuse_by_name(config)


def test_a_tree_is_refused_with_the_reason() -> None:
    engine = EagerEngine(tiny_model("qwen3_next"))
    engine.add(0, 16)
    with pytest.raises(ValueError, match=r"verifies chains: .*states pass from row to row"):
        engine.forward([Rows(0, [1], DraftTree((1, 2), (-1, -1), (1.0, 1.0)))])


def test_interleaved_sequences_do_not_see_each_other() -> None:
    model = tiny_model("nemotron_h")
    engine = EagerEngine(model)
    prompts = {4: prompt_of(4, 2), 9: prompt_of(9, 21)}
    loops = {seq: Greedy(engine, seq, prompt, stock_greedy(model, prompt), seed=seq) for seq, prompt in prompts.items()}
    while any(len(loop.out) < len(loop.expected) for loop in loops.values()):
        for loop in loops.values():
            loop.step()
    for loop in loops.values():
        assert loop.out[: len(loop.expected)] == loop.expected
