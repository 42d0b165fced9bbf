"""What a suffix drafter thinks of a continuation: worked out by hand where that is possible, measured where it isn't.

That all of it (cells, weights, learning, drafting) is exactly what the oracle makes of it stands in `test_suffix`.
"""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import suffix_oracle
from streams import Stream, kinds
from suffix_oracle import Twin

from specfx.drafters import suffix_model
from specfx.drafters.suffix_model import (
    CELLS,
    LENGTHS,
    MAX_CANDIDATES,
    MAX_FOLLOWERS,
    MAX_LIKELY,
    MODEL,
    ODDS,
    PROB,
    SEEN,
    SHARES,
    SLOTS,
    STREAK_BIAS,
    STREAKS,
    TOTALS,
    WEIGHTS,
    new_model,
)
from specfx.options import SuffixOptions
from specfx.runtime.tree import EMPTY_TREE

NEXT = SuffixOptions(min_token_prob=1e-6, max_spec_factor=0, max_spec_offset=1)
"""Draft all that may come next, and nothing behind it."""


def drafting(text: Stream, options: SuffixOptions = NEXT, prompt: int = -1) -> Twin:
    """A request with this text, `prompt` tokens of it not its own (-1: all)."""
    twin = Twin(options)
    prompt = len(text) if prompt < 0 else prompt
    twin.add(0, text[:prompt])
    twin.accept(0, text[prompt:])
    return twin


def continuations(twin: Twin, seq: int = 0) -> dict[int, float]:
    """Probability of each token that may come next."""
    (tree,) = twin.propose([seq], [63])
    return dict(zip(tree.tokens, tree.probs, strict=True))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


ONCE = suffix_model.cell_of(0, 1, 1, 1)
"""The cell of a token that followed a context of one token once, as the only one."""
WEIGHTS_OF_ONE = WEIGHTS + 1 * 5 * (SLOTS + 1)
"""The weights for a local context of one token and no global one."""


# --- buckets and cells ------------------------------------------------------------------------------------------------------------


def test_buckets_are_those_of_their_docstrings() -> None:
    for length in range(100):
        assert suffix_model.length_bucket(length) == suffix_oracle.length_bucket(length)
        assert suffix_model.streak_bucket(length) == suffix_oracle.streak_bucket(length)
    for total in range(1, 100):
        assert suffix_model.total_bucket(total) == suffix_oracle.total_bucket(total)
        for count in range(total + 1):
            assert suffix_model.share_bucket(count, total) == suffix_oracle.share_bucket(count, total)


def test_every_verdict_has_a_cell_of_its_own() -> None:
    lengths, totals = (0, 1, 2, 3, 5, 9, 17, 33), (1, 2, 3, 5, 9, 100)
    counts = {1: (0, 1), 100: (0, 1, 25, 49, 79, 99, 100)}
    cells = [
        suffix_model.cell_of(slot, length, total, count)
        for slot, length, total in itertools.product(range(SLOTS), lengths, totals)
        for count in counts.get(total, (0, total))
    ]
    assert len(set(cells)) == len(cells)
    assert min(cells) == 0
    assert max(cells) == SLOTS * LENGTHS * TOTALS * SHARES - 1 == CELLS - 1
    assert suffix_model.share_bucket(3, 4) == 4  # the last of the shares


def test_a_new_model_trusts_long_contexts_and_many_observations() -> None:
    model = new_model()
    prob = model[PROB:SEEN].reshape(SLOTS, LENGTHS, TOTALS, SHARES)
    assert model.shape == (MODEL,)
    assert all(np.array_equal(prob[0], prob[slot]) for slot in range(1, SLOTS))
    assert (np.diff(prob[0], axis=-1) > 0).all()  # the larger its share, the more probable
    certain = prob[0, 1:, :, 6]  # the only token that followed
    assert (np.diff(certain, axis=0) > 0).all()  # the longer the context, the more it is believed
    assert (np.diff(certain, axis=1) > 0).all()  # and so the more often it was seen
    assert certain[0, 0] < 0.9 < certain[4, 0]
    assert model[ODDS:WEIGHTS] == pytest.approx(np.log(model[PROB:SEEN] / (1 - model[PROB:SEEN])))
    assert set(model[SEEN:ODDS]) == {suffix_model.PRIOR}
    weights = model[WEIGHTS:STREAK_BIAS].reshape(suffix_model.SETS, SLOTS + 1)
    assert (weights == weights[0]).all()
    assert weights[0].tolist() == [*weights[0, :2], *weights[0, :2], 0]  # both trees count alike
    assert model[STREAK_BIAS:].tolist() == [0] * STREAKS


# --- estimates --------------------------------------------------------------------------------------------------------------------


def test_one_observation_after_one_token_by_hand() -> None:
    """``1 2 1``: 1 was followed once, by 2. Only the local slot for the longest context has anything to say."""
    start = new_model()
    assert continuations(drafting([1, 2, 1])) == {2: pytest.approx(logistic(start[WEIGHTS_OF_ONE] * start[ODDS + ONCE]))}


def test_the_live_suffix_does_not_count_itself() -> None:
    """The long context at the end occurs twice and was followed once: one observation in favour, and none against."""
    context = list(range(100, 140))
    (p,) = continuations(drafting([*context, 7, *context])).values()
    assert p > 0.65


def test_longer_matches_are_trusted_more() -> None:
    probs = []
    for match in (1, 2, 3, 5, 9, 17, 33):
        context = list(range(100, 100 + match))
        (p,) = continuations(drafting([*context, 9, 8, *context])).values()
        probs.append(p)
    assert probs == sorted(set(probs))


def test_a_longer_context_overrules_a_more_frequent_short_one() -> None:
    text = [5, 1, 6, 5, 1, 6, 5, 1, 6, *range(10, 20), 1, 7, 2, *range(10, 20), 1]
    probs = continuations(drafting(text))
    assert probs[7] > 2 * probs[6] > 0


def test_a_context_without_news_is_no_second_opinion() -> None:
    """All suffixes of ``1 2 3`` were followed once, and in the same place: only the longest has a slot."""
    with_one = continuations(drafting([1, 2, 3, 4, 1, 2, 3]))
    assert with_one == continuations(drafting([1, 2, 3, 4, 5, 1, 2, 3]))
    assert continuations(drafting([1, 2, 3, 4, 3, 4, 1, 2, 3]))[4] > with_one[4]  # 3 alone was followed twice


def test_rare_followers_are_no_candidates() -> None:
    """A token in 19 followed 1 once, in 20 once: still one in twenty; then no longer."""
    for others in (18, 19, 20):
        text = [1, 5] + [token for i in range(others) for token in (1000 + i, 1, 6)] + [9, 1]
        assert (5 in continuations(drafting(text))) == (others < 20)


def test_a_context_with_too_many_followers_predicts_nothing() -> None:
    for followers in (MAX_FOLLOWERS, MAX_FOLLOWERS + 1):
        text = [token for i in range(followers) for token in (1, 2, 1000 + i)] + [1]
        star = [*text, 2]  # 2 was followed by that many tokens: each too rare, unless it comes often
        often = [1, 2, 1000] * 30 + star
        assert continuations(drafting(text))[2] > 0.5
        assert (1000 in continuations(drafting(often))) == (followers <= MAX_FOLLOWERS)


def test_a_context_that_just_about_anything_follows_offers_nothing() -> None:
    for followers in (MAX_LIKELY, MAX_LIKELY + 1):
        text = [token for i in range(followers) for token in (2, 1000 + i)] + [2]
        assert len(continuations(drafting(text))) == (followers if followers <= MAX_LIKELY else 0)


def test_as_many_candidates_as_there_can_be() -> None:
    """Two contexts with as many followers each as may be likely, in the text and, other ones, in an earlier output."""
    each = range(MAX_LIKELY)

    def stars(first: int) -> Stream:
        """After ``8 9`` each of some tokens comes once; after 9 alone, each of some others comes often, and those too rarely."""
        rare = [token for i in each for token in (8, 9, first + i)]
        return rare + [token for _ in range(20) for i in each for token in (7, 9, first + 100 + i)]

    twin = Twin(NEXT)
    twin.drafter.add(0, [])
    twin.drafter.accept(0, stars(3000))
    twin.drafter.remove(0)
    twin.drafter.add(1, [*stars(1000), 8, 9])
    (tree,) = twin.drafter.propose([1], [63])
    roots = [token for token, parent in zip(tree.tokens, tree.parents, strict=True) if parent < 0]
    assert sorted(roots) == [first + i for first in (1000, 1100, 3000, 3100) for i in each]
    assert len(roots) == MAX_CANDIDATES
    twin.drafter.accept(1, [1000])
    assert np.isfinite(twin.drafter._model).all()


# --- learning ---------------------------------------------------------------------------------------------------------------------


def test_one_lesson_by_hand() -> None:
    """``1 2 1`` goes on with 2, as the only candidate said: its cell moves by one observation's part, and with it weight and biases."""
    twin = drafting([1, 2, 1])
    model, start = twin.drafter._model, new_model()
    (p,) = continuations(twin).values()
    twin.accept(0, [2])
    error = suffix_model.RATE * (1 - p)
    assert model[SEEN + ONCE] == suffix_model.PRIOR + 1
    assert model[PROB + ONCE] == pytest.approx(start[PROB + ONCE] + (1 - start[PROB + ONCE]) / (suffix_model.PRIOR + 1.5))
    assert logistic(model[ODDS + ONCE]) == pytest.approx(model[PROB + ONCE])
    assert model[WEIGHTS_OF_ONE] == pytest.approx(start[WEIGHTS_OF_ONE] + error * start[ODDS + ONCE])
    assert model[WEIGHTS_OF_ONE + SLOTS] == model[STREAK_BIAS] == pytest.approx(error)
    assert (model != start).sum() == 6
    assert suffix_model.streak_bucket(1) == 1  # right once: the next lesson is about another bias
    twin.accept(0, [1])
    assert model[STREAK_BIAS + 1] != 0


def test_prompts_do_not_teach_and_neither_does_drafting() -> None:
    twin = Twin(NEXT)
    twin.add(0, [1, 2, 3] * 20)
    twin.propose([0], [63])
    twin.remove(0)
    assert np.array_equal(twin.drafter._model, new_model())


def test_a_token_that_nothing_was_said_of_teaches_nothing_and_ends_the_streak() -> None:
    twin = drafting([1, 2, 3] * 4, prompt=3)
    request = twin.drafter._requests[0].fields
    assert request[suffix_model.STREAK] > 3
    twin.accept(0, [50])  # expected was 1
    assert request[suffix_model.STREAK] == 0
    model = twin.drafter._model.copy()
    twin.accept(0, [51])  # after 50 there is nothing to expect
    assert np.array_equal(twin.drafter._model, model)


def test_text_that_goes_well_is_drafted_further() -> None:
    """Without any change of what is known of the continuation: only the streak and what was learned differ."""
    copy = list(range(100, 140))
    fresh = continuations(drafting([*copy, *copy[:5]]))[105]
    assert continuations(drafting([*copy, *copy[:5]], prompt=40))[105] > fresh


def test_a_model_learns_what_a_source_is_like() -> None:
    """After 1, a 2 comes three times of four, else one of ten others. What is estimated is what happens, within a few hundred tokens."""
    rng, text = random.Random(0), [1]
    for _ in range(600):
        text += [2 if rng.random() < 0.75 else rng.randrange(10, 20), 1]
    twin = drafting(text[:1], SuffixOptions(max_tree_depth=2))
    estimates: list[float] = []
    twin.drafter.accept(0, text[1:801], None)
    for at in range(801, len(text), 2):
        (tree,) = twin.drafter.propose([0], [1])
        estimates.append(tree.probs[0])
        assert tree.tokens == (2,)
        twin.drafter.accept(0, text[at : at + 2], None)
    came = text[801::2].count(2) / len(estimates)
    assert abs(np.mean(estimates) - came) < 0.04


def test_the_model_serves_all_requests() -> None:
    """What one request has taught is known to the next."""
    twin = Twin(SuffixOptions(max_cached_requests=0, min_token_prob=1e-6))
    twin.add(0, [1, 2, 1])
    before = continuations(twin)
    twin.add(1, [])
    twin.accept(1, [*range(30), 1] * 8)
    assert continuations(twin)[2] != before[2]


@kinds(200)
def test_accepting_at_once_is_accepting_one_by_one(stream: Stream) -> None:
    together, single = Twin(SuffixOptions()).drafter, Twin(SuffixOptions()).drafter
    for drafter in (together, single):
        drafter.add(0, stream[:50])
    together.accept(0, stream[50:150])
    for token in stream[50:150]:
        single.accept(0, [token])
    together.remove(0, stream[150:])
    single.accept(0, stream[150:])
    single.remove(0)
    assert np.array_equal(together._model, single._model)
    for drafter in (together, single):
        drafter.add(1, stream[60:90])
    assert together.propose([1], [20]) == single.propose([1], [20]) != [EMPTY_TREE]
