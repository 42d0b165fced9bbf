"""Sampling: the noise, its distribution, and that one seed gives one text whatever is drafted and by whichever engine."""

from __future__ import annotations

import itertools
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import mask_words
from tiny import tiny_model
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import specfx
from specfx.drafters.mtp_files import save_draft_vocab
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.engines.stock import StockEngine
from specfx.errors import LoweringError, Reason
from specfx.kernels import cpu_build
from specfx.kernels.greedy_walk import greedy_walk, greedy_walk_reference
from specfx.kernels.keyed_sample import Draw, draw_tables, keyed_gumbel, keyed_sample, keyed_sample_reference, philox, warped
from specfx.kernels.tree_attention import tree_positions, tree_positions_reference
from specfx.runtime.choice import SequenceState, choose
from specfx.runtime.rowwise import is_pointwise, standard_warp

VOCAB = 128
LEAST = 1e-3
"""Probability below which counts are taken not to be of a distribution."""


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    try:
        cpu_build.load()
    except LoweringError as e:
        pytest.skip(str(e))


def word(value: int) -> torch.Tensor:
    return torch.tensor([value])


def random_keys(rows: int, generator: torch.Generator) -> torch.Tensor:
    keys = torch.randint(-(2**62), 2**62, (rows, 3), generator=generator)
    keys[:, 2] %= 2**20
    return keys


def plain(rows: int) -> torch.Tensor:
    """Warps that change nothing."""
    return torch.tensor([Draw(0, 0)[2:]] * rows, dtype=torch.float64)


def strange_logits(rows: int, vocabulary: int, kind: int, generator: torch.Generator) -> torch.Tensor:
    """Flat, peaked, narrow or full of ties; a fifth is -inf, of one row all."""
    logits = torch.randn(rows, vocabulary, generator=generator) * (1, 4, 10, 0.01, 1)[kind]
    if kind == 4:
        logits = torch.randint(-3, 3, (rows, vocabulary), generator=generator).float()
    logits[torch.rand(rows, vocabulary, generator=generator) < 0.2] = float("-inf")
    logits[3] = float("-inf")
    return logits


SETTINGS_OF_WARPS = (
    (0, 1, 0.7, 1.3, 1e-3, 1e-30, 1e-40, 1e-50, 100, 1e30),
    (0, 0, 1, 2, 5, 50, 1000, 10**6),
    (1, 1, 0, 0.1, 0.5, 0.9, 0.95, 0.999),
    (0, 0, 0.01, 0.05, 0.5, 1),
)


def random_warps(rows: int, generator: torch.Generator) -> torch.Tensor:
    columns = [torch.tensor(x, dtype=torch.float64)[torch.randint(len(x), (rows,), generator=generator)] for x in SETTINGS_OF_WARPS]
    return torch.stack(columns, 1)


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """The probability that counts of these `probs` lie as far off as `counts`, by the chi-square of the cells that expect more than 5."""
    expected = probs * counts.sum()
    used = expected > 5
    square = ((counts - expected)[used] ** 2 / expected[used]).sum().double()
    return float(torch.special.gammaincc((used.sum() - 1) / 2, square / 2))


@pytest.mark.parametrize(
    ("filled", "expected"),
    [(0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)), (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD))],
)
def test_philox_gives_the_published_answers(filled: int, expected: tuple[int, ...]) -> None:
    """kat_vectors of Random123."""
    assert tuple(int(w) for w in philox((word(filled),) * 4, (word(filled),) * 2)) == expected


@pytest.mark.parametrize("vocabulary", [1, 5, 128, 49152])
def test_the_kernel_draws_what_the_reference_draws(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits, keys = 4 * torch.randn(24, vocabulary, generator=generator), random_keys(24, generator)
    logits[:12, 1::3] = float("-inf")
    drawn = keyed_sample(logits, keys, plain(24))
    assert torch.equal(drawn, keyed_sample_reference(logits, keys, plain(24)))
    assert not (drawn[:12] % 3 == 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", range(5))
def test_the_kernel_warps_as_the_reference_warps(kind: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(kind)
    for vocabulary in (1, 7, 64, 65, 400, 1023, 3000, 33_000):
        logits = strange_logits(32, vocabulary, kind, generator).to(dtype)
        keys, warp = random_keys(32, generator), random_warps(32, generator)
        assert torch.equal(keyed_sample(logits, keys, warp), keyed_sample_reference(logits, keys, warp))
        strided = (x.t().contiguous().t() for x in (logits, keys, warp))
        assert torch.equal(keyed_sample(*strided), keyed_sample_reference(logits, keys, warp))


draws = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, 12), st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), st.sampled_from([0, 0.1, 0.5])
)
rows_of_logits = st.lists(st.sampled_from([-math.inf, -8.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0]), min_size=9, max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(draws, rows_of_logits, st.integers(0, 2**62)), min_size=1, max_size=6))
def test_whatever_the_logits_and_settings_the_kernel_draws_what_the_reference_draws(rows: list[Any]) -> None:
    warp, logits = torch.tensor([row[0] for row in rows], dtype=torch.float64), torch.tensor([row[1] for row in rows])
    keys = torch.tensor([[row[2], 3, i] for i, row in enumerate(rows)])
    drawn = keyed_sample(logits, keys, warp)
    assert torch.equal(drawn, keyed_sample_reference(logits, keys, warp))
    greedy = warp[:, 0] == 0
    assert torch.equal(drawn[greedy], logits[greedy].argmax(-1))


def test_greedy_rows_take_the_first_of_equals_and_strange_numbers_as_argmax_does() -> None:
    logits = torch.zeros(4, 40_000)
    logits[1, [39_999, 20_000, 5]] = 1.0
    logits[2, [7, 30_000]] = torch.tensor([math.inf, math.nan])
    logits[3] = -math.inf
    for dtype in (torch.float32, torch.bfloat16):
        chosen = keyed_sample(logits.to(dtype), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.float64))
        assert chosen.tolist() == [0, 5, 30_000, 0] == logits.argmax(-1).tolist()
    drawn = keyed_sample(logits, random_keys(4, torch.Generator().manual_seed(0)), torch.tensor([[1, 9, 0.5, 0.1]] * 4).double())
    assert drawn.tolist() == [*drawn[:2].tolist(), -1, -1], "where stock raises"
    assert drawn[0] >= 0
    assert drawn[1] >= 0


def stock_warpers(draw: Draw) -> LogitsProcessorList:
    """As `_get_logits_processor` makes and orders them."""
    config = GenerationConfig(do_sample=True, temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p, min_p=draw.min_p or None)
    return tiny_model("llama")._get_logits_processor(config, input_ids_seq_length=3)


WARPS = (
    Draw(7, 1, temperature=0.7),
    Draw(7, 1, top_k=5),
    Draw(7, 1, top_p=0.9),
    Draw(7, 1, min_p=0.1),
    Draw(7, 1, temperature=1.9, top_k=30, top_p=0.6),
    Draw(7, 1, temperature=0.4, top_p=0.95, min_p=0.02),
    Draw(7, 1, temperature=1.2, top_k=40, top_p=0.8, min_p=0.05),
    Draw(7, 1, top_p=0.0),
    Draw(7, 1, top_k=1000),
)


@pytest.mark.parametrize("draw", WARPS, ids=str)
def test_warps_are_those_of_transformers(draw: Draw) -> None:
    """The same entries with the same scores, but where a sum of probabilities is as close to top-p as float32 rounds. (Which of equals
    go is open in transformers: its sort is not stable.)"""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 200, generator=generator)
    logits[:100, ::3] = -math.inf
    logits[100:200] = logits[100:200].round()  # ties
    _, warp = draw_tables([draw] * 400, [3] * 400)
    expected, actual = stock_warpers(draw)(torch.zeros(400, 3), logits.clone()), warped(logits, warp)
    untied = torch.arange(400) // 100 != 1
    differ = ((expected != actual).any(1) & untied) | (expected.sort(1).values != actual.sort(1).values).any(1)
    assert differ.sum() <= 2
    assert torch.equal((expected.isinf().sum(1) - actual.isinf().sum(1))[differ].abs(), torch.ones(int(differ.sum()), dtype=torch.long))


def test_the_graph_draws_what_it_knows_and_nothing_else() -> None:
    for draw in WARPS:
        found = standard_warp(stock_warpers(draw))
        assert found is not None
        assert Draw(7, 1, **found) == draw
    assert standard_warp(LogitsProcessorList()) == {}
    temperature, top_k = TemperatureLogitsWarper(0.5), TopKLogitsWarper(3)

    class Own(TemperatureLogitsWarper):
        pass

    for others in (
        [top_k, temperature],  # another order
        [temperature, temperature],
        [temperature, Recorder()],
        [Own(0.5)],
        [TopKLogitsWarper(3, filter_value=-100.0)],
        [TopPLogitsWarper(0.5, min_tokens_to_keep=2)],
        [MinPLogitsWarper(0.5, min_tokens_to_keep=2)],
    ):
        assert standard_warp(LogitsProcessorList(others)) is None


def test_a_row_depends_on_its_own_key_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, keys = torch.randn(8, 50, generator=generator), random_keys(8, generator)
    alone = torch.cat([keyed_sample(logits[i : i + 1], keys[i : i + 1], plain(1)) for i in range(8)])
    assert torch.equal(keyed_sample(logits, keys, plain(8)), alone)
    noise = keyed_gumbel(keys[:1], 50)
    for column in range(3):
        other = keys[:1].clone()
        other[0, column] += 1
        assert not torch.isclose(keyed_gumbel(other, 50), noise).any(), column
    assert torch.equal(keyed_gumbel(keys[:1], 33), noise[:, :33])


@pytest.mark.parametrize("varied", [0, 1, 2])
def test_draws_over_any_part_of_the_key_have_the_softmax_distribution(varied: int) -> None:
    n, generator = 200_000, torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(20, generator=generator)
    keys = torch.tensor([[5, 6, 7]]).repeat(n, 1)
    keys[:, varied] = torch.arange(n)
    counts = torch.bincount(keyed_sample(logits.expand(n, 20).contiguous(), keys, plain(n)), minlength=20)
    assert p_value(counts, logits.softmax(0)) > LEAST
    wrong = (logits + torch.linspace(0, 0.1, 20)).softmax(0)
    assert p_value(counts, wrong) < LEAST  # the measure would see a difference of a tenth


# --- the sampled walk -----------------------------------------------------------------------------------------------------------


def scores_behind(prefix: tuple[int, ...]) -> torch.Tensor:
    """Logits ``[6]`` of a language model of sorts: random, and a function of the whole prefix."""
    return 2 * torch.randn(6, generator=torch.Generator().manual_seed(hash(prefix) % 2**60))


def assert_the_sampled_walk_is_sampling_token_by_token(
    seed: int, sample: Callable[..., Any], walk: Callable[..., Any], positions: Callable[..., Any]
) -> int:
    """Three sequences with random trees, in which about every second choice is drafted. Returns the length of all walks."""
    rng = random.Random(seed)
    draw = lambda prefix, s: int(keyed_sample_reference(scores_behind(prefix)[None], torch.tensor([[seed, s, len(prefix)]]), plain(1)))  # noqa: E731
    tokens, rows, words, keys, prefixes, committed = [], [], [], [], [], []
    lengths = [rng.randrange(5) for _ in range(3)]
    for s, length in enumerate(lengths):
        parents = [-1, *(rng.randrange(max(0, row - 3), row) for row in range(1, 12))]
        own = [tuple(rng.randrange(6) for _ in range(length + 1))]
        children: dict[tuple[int, ...], int] = {}
        for row, parent in enumerate(parents[1:], 1):
            above = own[parent]
            right = draw(above, s)
            free = [t for t in range(6) if (*above, t) not in children]
            own.append((*above, right if right in free and rng.random() < 0.5 else rng.choice(free)))
            children[own[-1]] = row
        text = own[0]
        while (*text, draw(text, s)) in children:
            text = (*text, draw(text, s))
        committed.append(len(text) - len(own[0]) + 1)
        tokens += [prefix[-1] for prefix in own]
        words += mask_words(parents)
        rows.append(len(parents))
        keys += [[seed, s]] * len(parents)
        prefixes += own
    starts, table = torch.tensor([0, *itertools.accumulate(rows)]).int(), torch.arange(3 * 8).view(3, 8).int()
    ids, mask, before = torch.tensor([tokens]), torch.tensor(words), torch.tensor(lengths).int()
    places = positions(mask, before, starts, ids)[0] + 1
    scores = torch.stack([scores_behind(prefix) for prefix in prefixes])
    chosen = sample(scores, torch.cat([torch.tensor(keys), places[:, None]], 1), plain(len(prefixes)))
    _, after, _ = walk(ids, chosen, mask, table, before, starts, 4)
    assert (after - before).tolist() == committed
    return sum(committed)


@pytest.mark.parametrize("reference", [True, False], ids=["references", "kernels"])
def test_sampling_behind_all_rows_and_walking_is_sampling_token_by_token(reference: bool) -> None:
    ops = (
        (keyed_sample_reference, greedy_walk_reference, tree_positions_reference)
        if reference
        else (keyed_sample, greedy_walk, tree_positions)
    )
    assert sum(assert_the_sampled_walk_is_sampling_token_by_token(seed, *ops) for seed in range(20)) > 90


# --- generate ------------------------------------------------------------------------------------------------------------------


class Recorder(LogitsProcessor):
    """Bans the token before, and notes what it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, ...]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shown += [tuple(row) for row in input_ids.tolist()]
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))


def prompts(batch: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, 10), generator=torch.Generator().manual_seed(3))


def sampled(model: PreTrainedModel, ids: torch.Tensor, seed: int = 0, new: int = 24, **options: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.generate(ids, max_new_tokens=new, do_sample=True, **options)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", initializer_range=0.2)


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"top_k": 0},
    "cold": lambda: {"temperature": 0.3},
    "hot": lambda: {"temperature": 1.7, "top_k": 0},
    "top k, top p": lambda: {"top_k": 12, "top_p": 0.8},
    "min p, typical": lambda: {"min_p": 0.05, "typical_p": 0.9},
    "penalties": lambda: {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "words": lambda: {"bad_words_ids": [[3], [4, 5]], "suppress_tokens": [7, 8], "min_new_tokens": 4},
    "constrained": lambda: {"prefix_allowed_tokens_fn": lambda batch, ids: [int(ids[-1] + d) % VOCAB for d in (1, 2, 3, 5)]},
    "custom": lambda: {"logits_processor": LogitsProcessorList([Recorder()])},
}


BOTH = {"enable_suffix_decoding": True}


@dataclass
class Outcome:
    """Of one way to generate. texts: of each setting, with two seeds; batches: of sequences a, b, c, then a, d, c, then a alone."""

    texts: dict[str, list[tuple[int, ...]]]
    accepted: dict[str, int]
    batches: list[torch.Tensor]


@pytest.fixture(scope="module")
def outcomes(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every draft method with two engines; each engine is prepared once."""
    head, ids, result = save_head(MtpHead.from_target(model), tmp_path_factory.mktemp("head")), prompts(4), {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*began with a right token")
        for engine in ("graph", "eager"):
            for method, options in (
                (None, {}),
                ("suffix", {"min_token_prob": 0.01}),
                ("mtp", {"head": head}),
                ("mtp", BOTH | {"head": head}),
            ):
                outcome = result[f"{method}{' and suffix' if BOTH.items() <= options.items() else ''}, {engine}"] = Outcome({}, {}, [])
                with specfx.speculating(model, method, engine=engine, compile="off", **options):
                    for name, settings in SETTINGS.items():
                        outcome.texts[name] = [tuple(sampled(model, ids[:1], seed, **settings())[0].tolist()) for seed in (0, 1)]
                        outcome.accepted[name] = sum(specfx.stats(model).last.accepted)
                    outcome.batches += [sampled(model, ids[rows]) for rows in ([0, 1, 2], [0, 3, 2], [0])]
                    assert not specfx.explain(model).stock_calls
    waiting = result["None, stock while there is no engine"] = Outcome({}, {}, [])
    with waiting_for_an_engine(model):
        for name, settings in SETTINGS.items():
            waiting.texts[name] = [tuple(sampled(model, ids[:1], seed, **settings())[0].tolist()) for seed in (0, 1)]
        waiting.batches += [sampled(model, ids[rows]) for rows in ([0, 1, 2], [0, 3, 2], [0])]
    return result


@contextmanager
def waiting_for_an_engine(model: PreTrainedModel) -> Iterator[None]:
    """Stock serves."""
    with specfx.speculating(model, None, engine="graph", compile="off"):
        model.generate.ready().keeper.engine = StockEngine()
        yield
        assert list(specfx.explain(model).stock_calls) == [Reason.ENGINE_NOT_READY.value]


@pytest.mark.parametrize("name", SETTINGS)
def test_one_seed_gives_one_text_with_every_method_and_engine(name: str, outcomes: dict[str, Outcome]) -> None:
    texts = {way: outcome.texts[name] for way, outcome in outcomes.items()}
    assert len(set(map(tuple, texts.values()))) == 1, texts
    first, second = next(iter(texts.values()))
    assert first != second


def test_drafts_take_part(outcomes: dict[str, Outcome]) -> None:
    assert max(outcomes["suffix, graph"].accepted.values()) > 0


def test_neighbours_in_a_batch_change_nothing(outcomes: dict[str, Outcome]) -> None:
    for way, outcome in outcomes.items():
        first, second, alone = outcome.batches
        assert torch.equal(first[0], alone[0]), way
        assert torch.equal(first[[0, 2]], second[[0, 2]]), way
        assert not torch.equal(first[1], second[1])


def test_padding_and_returned_sequences(model: PreTrainedModel) -> None:
    """Positions are counted without padding; each returned sequence has a noise of its own."""
    ids = prompts()
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1), torch.tensor([[0] * 3 + [1] * 10])
    with specfx.speculating(model, "suffix", engine="graph", compile="off"):
        alone = sampled(model, ids)
        assert torch.equal(sampled(model, padded, attention_mask=mask)[0, 3:], alone[0])
        several = sampled(model, ids, num_return_sequences=3)
        assert torch.equal(several[0], alone[0])
        assert len({tuple(row) for row in several.tolist()}) == 3
        torch.manual_seed(0)
        assert not torch.equal(
            model.generate(ids, max_new_tokens=24, do_sample=True), model.generate(ids, max_new_tokens=24, do_sample=True)
        )


@pytest.mark.parametrize("settings", [{"temperature": 0.7, "top_k": 20}, {"repetition_penalty": 1.3, "temperature": 0.7}], ids=str)
def test_what_is_told_of_scores_is_the_same_while_there_is_no_engine(settings: dict[str, Any], model: PreTrainedModel) -> None:
    """In a batch with padding, to the caller and to a criterion that looks at scores."""
    ids = prompts(2)
    ids[1, :3] = 0
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    told: dict[str, list[float]] = {"waiting": [], "ready": []}

    def outcome(now: str, rows: slice) -> Any:
        def look(ids: torch.Tensor, scores: tuple[torch.Tensor, ...]) -> torch.Tensor:
            told[now].append(float(scores[-1].max()))
            return torch.zeros(len(ids), dtype=torch.bool)

        criteria = {"stopping_criteria": StoppingCriteriaList([look])} if rows == slice(1) else {}
        asked: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        return sampled(model, ids[rows], attention_mask=mask[rows], pad_token_id=0, **asked, **settings, **criteria)

    found = {}
    for rows in (slice(1), slice(2)):
        with waiting_for_an_engine(model):
            found["waiting"] = outcome("waiting", rows)
        with specfx.speculating(model, "suffix", engine="graph", compile="off"):
            found["ready"] = outcome("ready", rows)
        assert torch.equal(found["waiting"].sequences, found["ready"].sequences)
        for name in ("scores", "logits"):
            assert len(found["waiting"][name]) == len(found["ready"][name]) == 24
            torch.testing.assert_close(found["waiting"][name], found["ready"][name], rtol=1e-4, atol=1e-4)
    assert told["waiting"] == pytest.approx(told["ready"], rel=1e-4)


def test_processors_see_each_prefix_once_and_in_order(model: PreTrainedModel) -> None:
    for method in (None, "suffix"):
        recorder = Recorder()
        with specfx.speculating(model, method, engine="graph", compile="off"):
            text = sampled(model, prompts(), logits_processor=LogitsProcessorList([recorder]))[0].tolist()
        assert recorder.shown == [tuple(text[:n]) for n in range(10, len(text))]


DISTRIBUTIONS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.6, "top_p": 0.95}, {"temperature": 1.6, "top_p": 0.8})
SMALL, USED = 40, 4
"""Entries of the vocabulary (the gate needs some), and of those the first few that may be drawn."""
OTHERS = list(range(USED, SMALL))
LONG = bool(os.environ.get("SPECFX_LONG"))


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=SMALL, initializer_range=0.2)


@pytest.mark.timeout(3600 if LONG else 600)
@pytest.mark.parametrize("method", [None, "suffix", "mtp"])
def test_texts_have_the_distribution_of_the_model(method: str | None, small: PreTrainedModel, tmp_path: Path) -> None:
    """20,000 continuations of four tokens for each method (of mtp, whose drafts of sampled texts are made one by one, a quarter; of each
    and each setting as many with ``SPECFX_LONG=1``), against the exact distribution: the stock model's, through the same processors."""
    n = 20_000 if LONG else 1_667 if method == "mtp" else 6_667
    options = {"head": save_head(MtpHead.from_target(small), tmp_path), "num_steps": 1} if method == "mtp" else {}
    if method == "mtp":
        save_draft_vocab(torch.arange(USED), tmp_path)  # so that something right is drafted, if not at the first guess
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    with specfx.speculating(small, method, engine="graph", compile="off", page_size=8, **options):
        for seed, settings in enumerate(DISTRIBUTIONS):
            exact, other = (
                text_shares(small, ids, s) for s in (settings, settings | {"temperature": 1.5 * settings.get("temperature", 1)})
            )
            counts = torch.zeros(USED**4, dtype=torch.long)
            torch.manual_seed(seed)
            for _ in range(4):
                out = small.generate(
                    ids, max_new_tokens=4, do_sample=True, top_k=0, suppress_tokens=OTHERS, num_return_sequences=-(-n // 4), **settings
                )
                counts += torch.bincount(as_numbers(out[:, 5:]), minlength=USED**4)
            assert method is None or sum(specfx.stats(small).last.accepted) > n // 40
            assert not specfx.explain(small).stock_calls
            assert not counts[exact == 0].any()
            assert p_value(counts, exact) > LEAST
            assert p_value(counts, other) < LEAST, "a higher temperature would be seen"


def as_numbers(texts: torch.Tensor) -> torch.Tensor:
    return (texts * USED ** torch.arange(texts.shape[1] - 1, -1, -1)).sum(1)


def text_shares(model: PreTrainedModel, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The distribution of the next four tokens, ``[USED ** 4]``."""
    exact = torch.ones(1)
    for _ in range(4):
        exact = (exact[:, None] * shares(model, ids, settings)[:, :USED]).flatten()
        ids = torch.cat([ids.repeat_interleave(USED, 0), torch.arange(USED).repeat(len(ids))[:, None]], 1)
    return exact


@torch.no_grad()
def shares(model: PreTrainedModel, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The distribution of the next token of each row, ``[B, V]``."""
    config = model._prepare_generation_config(None, do_sample=True, top_k=0, suppress_tokens=OTHERS, **settings)[0]
    logits = model(ids).logits[:, -1].float()
    return model._get_logits_processor(config, input_ids_seq_length=ids.shape[1])(ids, logits).softmax(-1)


WARPED: tuple[dict[str, Any], ...] = ({"temperature": 0.8, "top_k": 5}, {"temperature": 1.5, "top_k": 9, "top_p": 0.6, "min_p": 0.05})


@pytest.mark.parametrize("method", [None, "suffix", "mtp"])
def test_texts_drawn_in_the_graph_have_the_distribution_of_the_model(method: str | None, small: PreTrainedModel, tmp_path: Path) -> None:
    """3,000 continuations of three tokens for each method and setting, 1,000 of mtp (20,000 with ``SPECFX_LONG=1``)."""
    n = 20_000 if LONG else 1_000 if method == "mtp" else 3_000
    options = {"head": save_head(MtpHead.from_target(small), tmp_path), "min_token_prob": 0} if method == "mtp" else {}
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    with specfx.speculating(small, method, engine="graph", compile="off", page_size=8, **options):
        for seed, settings in enumerate(WARPED):
            exact, other = (three_shares(small, ids, settings | {"temperature": t * settings["temperature"]}) for t in (1, 2))
            torch.manual_seed(seed)
            call = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": n // 4, "pad_token_id": 0} | settings
            outputs = [small.generate(ids, **call) for _ in range(4)]
            assert method is None or sum(specfx.stats(small).last.accepted) > 0
            numbers = (torch.cat(outputs)[:, 5:] * torch.tensor([SMALL**2, SMALL, 1])).sum(1)
            counts = torch.bincount(numbers, minlength=SMALL**3)
            assert not counts[exact == 0].any()
            assert p_value(counts, exact) > LEAST
            assert p_value(counts, other) < LEAST, "a higher temperature would be seen"


@torch.no_grad()
def three_shares(model: PreTrainedModel, ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The distribution of the next three tokens, by transformers' warpers, ``[SMALL ** 3]``."""
    warpers = stock_warpers(Draw(0, 0, **settings))
    exact = torch.ones(1)
    for _ in range(3):
        exact = (exact[:, None] * warpers(ids, model(ids).logits[:, -1].float()).softmax(-1)).flatten()
        ids = torch.cat([ids.repeat_interleave(SMALL, 0), torch.arange(SMALL).repeat(len(ids))[:, None]], 1)
    return exact


# --- all sequences of a step together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hot", "cold", "top k, top p", "min p, typical"])
def test_what_looks_at_scores_alone_gives_each_row_what_it_gives_it_alone(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    model = tiny_model("llama")
    settings = SETTINGS[name]() | {"epsilon_cutoff": 0.001, "eta_cutoff": 0.002, "renormalize_logits": True, "suppress_tokens": [4]}
    config = model._prepare_generation_config(None, do_sample=True, **settings)[0]
    processor = model._get_logits_processor(config, input_ids_seq_length=3)
    assert is_pointwise(processor)
    assert not is_pointwise(LogitsProcessorList([*processor, Recorder()]))
    sequences = [
        SequenceState(i, list(range(3 + i)), [], 9, lambda t: False, processor, torch.device("cpu"), Draw(7, i), pointwise=True)
        for i in range(24)
    ]
    logits = list(3 * torch.randn(24, 4096, generator=generator))
    alone = [choose([s], [row])[0] for s, row in zip(sequences, logits, strict=True)]
    assert choose(sequences, logits) == alone
    for sequence in sequences:
        sequence.pointwise = False
    assert choose(sequences, logits) == alone
    for i, sequence in enumerate(sequences):  # and beside others of another kind
        sequence.pointwise, sequence.draw = i % 2 == 0, Draw(7, i) if i % 3 else None
    assert [t for i, t in enumerate(choose(sequences, logits)) if i % 3] == [t for i, t in enumerate(alone) if i % 3]


def test_standard_processors_run_once_for_all_sequences_of_a_step(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[int] = []
    process = LogitsProcessorList.__call__

    def counting(self: Any, ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        shapes.append(len(scores))
        return process(self, ids, scores, **more)

    monkeypatch.setattr(LogitsProcessorList, "__call__", counting)
    with specfx.speculating(model, None, engine="graph", compile="off"):
        sampled(model, prompts(4), new=5, temperature=0.7, top_p=0.9, min_p=0.01)
        assert not shapes, "the graph warps"
        sampled(model, prompts(4), new=5, temperature=0.7, typical_p=0.9)
        assert shapes == [4] * 5
        shapes.clear()
        sampled(model, prompts(4), new=5, repetition_penalty=1.3)
        assert shapes == [1] * 20
