"""The suffix drafter against an oracle that knows no automaton: it looks every context up by scanning the stream."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specfx.drafters import suffix
from specfx.drafters.suffix import SuffixDrafter, SuffixIndex
from specfx.options import SuffixOptions
from specfx.runtime.tree import EMPTY_TREE, DraftTree

Stream = list[int]

DEFAULTS = SuffixOptions()


# The oracle. A context is a tuple of tokens; everything is looked up in the whole stream, every time.


def ends_of(stream: Stream, context: tuple[int, ...]) -> set[int]:
    """Where `context` ends (exclusive) in `stream`, the live occurrence at its end included."""
    return {end for end in range(len(context), len(stream) + 1) if tuple(stream[end - len(context) : end]) == context}


def followers_of(stream: Stream, context: tuple[int, ...]) -> dict[int, list[int]]:
    """What followed `context`: token -> the positions at which it did."""
    followers: dict[int, list[int]] = {}
    for end in sorted(ends_of(stream, context) - {len(stream)}):
        followers.setdefault(stream[end], []).append(end)
    return followers


def longest_followed(stream: Stream, context: tuple[int, ...]) -> tuple[int, ...]:
    return next(context[i:] for i in range(len(context) + 1) if i == len(context) or followers_of(stream, context[i:]))


def levels_of(stream: Stream, context: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The contexts that take part in the estimate, longest first: each occurs in more places than the one before."""
    levels: list[tuple[int, ...]] = []
    context = longest_followed(stream, context)
    while context and len(levels) < suffix.LEVELS and len(followers_of(stream, context)) <= suffix.MAX_FOLLOWERS:
        levels.append(context)
        ends = ends_of(stream, context)
        while context and ends_of(stream, context) == ends:
            context = context[1:]
    return levels


def probability(stream: Stream, levels: list[tuple[int, ...]], token: int) -> float:
    """Interpolated PPM, straight from the formula in the module's docstring."""
    if not levels:
        return 0.0
    followers = followers_of(stream, levels[0])
    total = sum(len(ends) for ends in followers.values())
    doubt = suffix.DOUBT / len(levels[0])
    return (len(followers.get(token, [])) + doubt * probability(stream, levels[1:], token)) / (total + doubt)


def oracle(stream: Stream, options: SuffixOptions, budget: int) -> DraftTree:
    depth_limit = options.max_tree_depth
    start = longest_followed(stream, tuple(stream[-depth_limit:]))
    max_depth = int(options.max_spec_factor * len(start) + options.max_spec_offset)
    nodes: list[tuple[int, int, float]] = []
    frontier: list[tuple[float, int, int, tuple[int, ...], int]] = []  # path probability, token, parent, context, depth
    expand = [(1.0, start, -1, 0)]
    while True:
        path, context, parent, depth = expand.pop()
        children = []
        levels = levels_of(stream, context)
        for token in {t for level in levels for t in followers_of(stream, level)} if depth < max_depth else ():
            prob = path * probability(stream, levels, token)
            if prob >= options.min_token_prob:
                level = next(level for level in levels if token in followers_of(stream, level))
                recency = followers_of(stream, level)[token][-1]
                children.append((-prob, -recency, (prob, token, parent, (*level, token)[-depth_limit:], depth + 1)))
        children.sort()
        frontier += [child for *_, child in (children if options.use_tree_spec else children[:1])]
        if not frontier or len(nodes) >= budget:
            break
        best = max(frontier, key=lambda candidate: candidate[0])  # the first of equals
        frontier.remove(best)
        prob, token, parent, context, depth = best
        nodes.append((token, parent, prob))
        expand.append((prob, context, len(nodes) - 1, depth))
    tokens, parents, probs = zip(*nodes, strict=True) if nodes else ((), (), ())
    return DraftTree(tokens, parents, probs)


def drafter_after(stream: Stream, options: SuffixOptions = DEFAULTS, prompt: int = 1, max_nodes: int = 63) -> SuffixDrafter:
    drafter = SuffixDrafter(options, max_nodes)
    drafter.add(0, stream[:prompt])
    drafter.accept(0, stream[prompt:], None)
    return drafter


def draft(stream: Stream, options: SuffixOptions = DEFAULTS, budget: int = 16) -> DraftTree:
    return drafter_after(stream, options).propose([0], [budget])[0]


tokens = st.integers(0, 4)
random_streams = st.lists(tokens, max_size=60)
constant_streams = st.builds(lambda n: [7] * n, st.integers(0, 60))
periodic_streams = st.builds(
    lambda period, times, rest: period * times + rest,
    st.lists(tokens, min_size=1, max_size=9),
    st.integers(1, 6),
    st.lists(tokens, max_size=4),
)


@st.composite
def nested_streams(draw: st.DrawFn) -> Stream:
    """Repeats of repeats: each round appends a slice of what is there, sometimes with one token changed (an edit)."""
    stream = draw(st.lists(tokens, min_size=2, max_size=6))
    while len(stream) < 40:
        start = draw(st.integers(0, len(stream) - 1))
        piece = stream[start : start + draw(st.integers(1, 12))]
        if draw(st.booleans()):
            piece[draw(st.integers(0, len(piece) - 1))] = draw(tokens)
        stream = stream + piece
    return stream


streams = st.one_of(random_streams, constant_streams, periodic_streams, nested_streams())
option_sets = st.builds(
    SuffixOptions,
    max_tree_depth=st.sampled_from([2, 3, 5, 64]),
    max_spec_factor=st.sampled_from([0.5, 1.0, 2.0]),
    max_spec_offset=st.sampled_from([-1.0, 0.0, 2.5]),
    min_token_prob=st.sampled_from([0.02, 0.2, 0.6]),
    use_tree_spec=st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(stream=streams, options=option_sets, budget=st.integers(0, 12), data=st.data())
def test_proposal_is_the_oracles(stream: Stream, options: SuffixOptions, budget: int, data: st.DataObject) -> None:
    """Exactly: tokens, parents and probabilities, however the stream was cut into prompt and accepted tokens."""
    cuts = [*sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=3))), len(stream)]
    drafter = SuffixDrafter(options, max_nodes=63)
    drafter.add(0, stream[: cuts[0]])
    for start, end in itertools.pairwise(cuts):
        drafter.accept(0, stream[start:end], None)
    assert drafter.propose([0], [budget]) == [oracle(stream, options, budget)]


@settings(max_examples=20, deadline=None)
@given(stream=nested_streams(), options=option_sets)
def test_proposal_is_the_oracles_after_every_token(stream: Stream, options: SuffixOptions) -> None:
    drafter = SuffixDrafter(options, max_nodes=63)
    drafter.add(0, [])
    for n, token in enumerate(stream, start=1):
        drafter.accept(0, [token], None)
        assert drafter.propose([0], [5]) == [oracle(stream[:n], options, 5)]


@settings(max_examples=100, deadline=None)
@given(stream=streams, max_context=st.sampled_from([2, 4, 64]))
def test_every_context_is_counted_exactly(stream: Stream, max_context: int) -> None:
    """Each context of up to ``max_context + 1`` tokens, with the place of its last occurrence; in at most two states a token."""
    index = SuffixIndex(max_context)
    index.extend(stream)
    assert len(index.link) <= 2 * len(stream) + 1
    contexts = {tuple(stream[i:j]) for i in range(len(stream)) for j in range(i + 1, min(i + max_context + 1, len(stream)) + 1)}
    for context in contexts:
        state = suffix.ROOT
        for token in context:
            state = index.follow[state][token]
        ends = ends_of(stream, context)
        assert (index.count[state], index.last_end[state]) == (len(ends), max(ends))
        assert index.total(state) == len(ends - {len(stream)})


@settings(max_examples=200, deadline=None)
@given(stream=streams, options=option_sets, budget=st.integers(0, 63), max_nodes=st.integers(1, 63))
def test_proposals_keep_their_limits(stream: Stream, options: SuffixOptions, budget: int, max_nodes: int) -> None:
    tree = drafter_after(stream, options, max_nodes=max_nodes).propose([0], [budget])[0]
    assert len(tree) <= min(budget, max_nodes)
    assert all(options.min_token_prob <= p <= 1 for p in tree.probs)
    assert list(tree.probs) == sorted(tree.probs, reverse=True)
    assert all(tree.probs[i] <= tree.probs[p] for i, p in enumerate(tree.parents) if p >= 0)
    assert options.use_tree_spec or tree.is_chain
    assert set(tree.tokens) <= set(stream)


@pytest.mark.parametrize("stream", [[1, 2, 1, 3, 1, 4, 1, 5, 1], [1, 2] * 4 + [1, 3, 1, 4, 1]])
def test_contexts_with_too_many_followers_predict_nothing(monkeypatch: pytest.MonkeyPatch, stream: Stream) -> None:
    options = SuffixOptions(min_token_prob=0.01)
    assert len(draft(stream, options)) > 0
    followers = len(set(stream)) - 1  # of 1, the live context
    monkeypatch.setattr(suffix, "MAX_FOLLOWERS", followers)
    assert draft(stream, options) == oracle(stream, options, 16) != EMPTY_TREE
    monkeypatch.setattr(suffix, "MAX_FOLLOWERS", followers - 1)
    assert draft(stream, options) == oracle(stream, options, 16) == EMPTY_TREE


def test_live_suffix_does_not_count_itself() -> None:
    """``1 2`` was followed once, by 3: one observation in favour and none against, though it occurs twice."""
    tree = draft([1, 2, 3, 1, 2])
    assert tree.tokens[0] == 3
    assert tree.probs[0] == 1 / (1 + suffix.DOUBT / 2)


def test_longer_matches_are_trusted_more() -> None:
    probs = []
    for match in (1, 2, 4, 8, 16, 64):
        context = list(range(100, 100 + match))
        probs.append(draft([*context, 9, 8, *context], SuffixOptions(min_token_prob=0.01)).probs[0])
    assert probs == sorted(set(probs))
    assert probs[0] < 0.4
    assert probs[-1] > 0.95


def test_a_longer_context_overrules_a_more_frequent_short_one() -> None:
    stream = [5, 1, 6, 5, 1, 6, 5, 1, 6, *range(10, 20), 1, 7, 2, *range(10, 20), 1]
    assert draft(stream).tokens[0] == 7


def test_the_more_recent_of_two_equals_comes_first() -> None:
    tree = draft([1, 2, 3, 1, 2, 4, 1, 2], SuffixOptions(min_token_prob=0.1))
    assert tree.parents[:2] == (-1, -1)
    assert tree.tokens[:2] == (4, 3)


def test_a_copy_is_drafted_as_one_long_chain() -> None:
    source = random.Random(0).sample(range(1000), 100)
    tree = draft([*source, 5000, *source[:32]], budget=16)
    assert tree.is_chain
    assert list(tree.tokens) == source[32:48]


def test_a_changed_token_costs_one_step_of_a_copy() -> None:
    """After an edit inside a copy the draft comes back as soon as the text does."""
    source = random.Random(1).sample(range(1000), 100)
    tree = draft([*source, 5000, *source[:40], 7777, *source[41:43]], budget=8)
    assert list(tree.tokens[:2]) == source[43:45]


def test_periodic_text_is_drafted_beyond_its_end() -> None:
    assert draft([1, 2, 3] * 20, budget=12).tokens == (1, 2, 3) * 4
    assert draft([4] * 80, budget=30).tokens == (4,) * 30


@pytest.mark.parametrize("stream", [[], [1], [1, 2, 3, 4]])
def test_nothing_is_drafted_when_nothing_repeats(stream: Stream) -> None:
    assert draft(stream) == EMPTY_TREE


@pytest.mark.parametrize("budget", [0, -1])
def test_nothing_is_drafted_without_a_budget(budget: int) -> None:
    assert draft([1, 2, 3] * 5, budget=budget) == EMPTY_TREE


def test_drafts_are_limited_by_the_length_of_the_match() -> None:
    stream = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    for factor, offset, depth in [(1.0, 0.0, 2), (2.0, 0.0, 4), (1.5, 0.6, 3), (0.0, 1.0, 1), (0.0, 0.0, 0)]:
        options = SuffixOptions(max_spec_factor=factor, max_spec_offset=offset, min_token_prob=0.01)
        assert max(draft(stream, options).depths()) == depth


def test_sequences_know_nothing_of_each_other() -> None:
    drafter = SuffixDrafter(SuffixOptions(), max_nodes=63)
    drafter.add(0, [1, 2, 3, 9, 1, 2, 3])
    drafter.add(1, [1, 2, 3])
    drafter.add(2, [1, 2, 3, 8, 1, 2, 3])
    trees = drafter.propose([2, 1, 0], [1, 4, 1])
    assert [tree.tokens for tree in trees] == [(8,), (), (9,)]


def test_proposing_changes_nothing() -> None:
    drafter = drafter_after([1, 2, 3, 1, 2, 4] * 4)
    assert drafter.propose([0], [16]) == drafter.propose([0], [16])


def test_an_id_in_use_is_refused_and_free_again_after_removal() -> None:
    drafter = drafter_after([1, 2, 3] * 4)
    with pytest.raises(ValueError, match="sequence 0 is in use"):
        drafter.add(0, [1])
    drafter.remove(0)
    drafter.remove(0)  # unknown ids are ignored
    drafter.add(0, [1, 2])
    assert drafter.propose([0], [16]) == [EMPTY_TREE]


def test_a_prompt_that_cannot_be_read_leaves_the_id_free() -> None:
    drafter = SuffixDrafter(SuffixOptions(), max_nodes=63)
    with pytest.raises(ValueError, match="token"):
        drafter.add(0, [1, "token"])  # type: ignore[list-item]
    drafter.add(0, [1])
