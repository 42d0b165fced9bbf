"""The suffix tree against a scan of all its streams: what it counts, what it takes out again, and what it costs."""

from __future__ import annotations

import itertools
import random
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import Stream, blocks, byte_stream, fibonacci, kinds, long_streams, streams, thue_morse
from suffix_oracle import Context, Contexts
from suffix_reader import assert_exact, assert_within_its_arena, field, followers, links, locate

from specfx.drafters import suffix_tree
from specfx.drafters._jit import view
from specfx.drafters.suffix_tree import SuffixTree

LARGEST = 2**31 - 1
depths = st.sampled_from([1, 2, 3, 5, 64])


def int32(tokens: Stream | Context) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def fill(tree: SuffixTree) -> Stream:
    """Fill the tree's arena: a stream takes the free edges, and the tree believes that there is no room behind (there is, so that a mistake
    destroys nothing). Returns the stream."""
    tree.grow()
    cursor, filler = new_cursor(), []
    while tree.arena[suffix_tree.FREE_EDGE] >= 0:  # every new token is one more follower of the root
        filler.append(LARGEST - len(filler))
        tree.extend(cursor, int32(filler[-1:]))
    tree.arena[suffix_tree.CAP_STATES] = tree.arena[suffix_tree.TOP_STATE]
    tree.arena[suffix_tree.CAP_EDGES] = tree.arena[suffix_tree.TOP_EDGE]
    return filler


def new_cursor(state: int = suffix_tree.ROOT, length: int = 0) -> Any:
    return view(int32([state, length]))


def grown(depth: int, *texts: Stream, room: int = 1) -> SuffixTree:
    """A tree over some streams, made with so little room that it has to grow."""
    tree = SuffixTree(depth, room)
    for text in texts:
        tree.extend(new_cursor(), int32(text))
    return tree


# --- growth -----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(texts=st.lists(streams, min_size=1, max_size=4), depth=depths, seed=st.integers(0, 99))
def test_every_context_of_interleaved_streams_is_counted_exactly(texts: list[Stream], depth: int, seed: int) -> None:
    tree, contexts, rng = SuffixTree(depth, 1), Contexts(depth), random.Random(seed)
    cursors, rest, stamp = [new_cursor() for _ in texts], [list(text) for text in texts], 0
    while any(rest):
        i = rng.choice([i for i, left in enumerate(rest) if left])
        n, step = rng.randint(1, 6), rng.randint(0, 2)
        piece, rest[i] = rest[i][:n], rest[i][n:]
        tree.extend(cursors[i], int32(piece), stamp, step)
        contexts.extend(i, piece, stamp, step)
        stamp += n * step
    assert_exact(tree, contexts)


@kinds(400)
@pytest.mark.parametrize("depth", [2, 9])
def test_long_streams_are_counted_exactly(stream: Stream, depth: int) -> None:
    tree, contexts = SuffixTree(depth, 1), Contexts(depth)
    cursor = new_cursor()
    tree.extend(cursor, int32(stream), 5, 3)
    contexts.extend(0, stream, 5, 3)
    assert_exact(tree, contexts)
    assert list(cursor) == [locate(tree, tuple(stream[-depth - 1 :])), depth + 1]


@kinds(150)
def test_long_contexts_are_counted_exactly(stream: Stream) -> None:
    tree, contexts = grown(64, stream, stream[70:], stream[:70]), Contexts(64)
    for i, text in enumerate((stream, stream[70:], stream[:70])):
        contexts.extend(i, text)
    assert_exact(tree, contexts)


def test_thousands_of_tokens_are_counted_exactly() -> None:
    text = byte_stream("tests/test_session.py", 5000)
    contexts = Contexts(3)
    contexts.extend(0, text)
    assert_exact(grown(3, text), contexts)


def test_a_hand_counted_tree() -> None:
    """``1 2 1 2 3``: the end of ``1 2`` is followed by 1 and by 3, each once; that of ``2 1`` by 2."""
    tree = grown(2, [1, 2, 1, 2, 3])
    assert followers(tree, locate(tree, (1, 2))) == followers(tree, locate(tree, (2,))) == {1: 1, 3: 1}
    assert followers(tree, locate(tree, (2, 1))) == {2: 1}
    assert field(tree, locate(tree, (1, 2)), suffix_tree.COUNT) == 2
    assert locate(tree, (2,)) == locate(tree, (1, 2))  # both end after the second and the fourth token
    assert locate(tree, (1,)) != locate(tree, (2, 1))  # the first token is a 1 without a 2 before it
    assert locate(tree, (1, 3)) == locate(tree, (3, 1)) == -1


@pytest.mark.parametrize("first", [0, LARGEST - 999])
def test_any_token_id_will_do(first: int) -> None:
    """Hundreds of followers of one context, the largest ids among them."""
    text = [token for i in range(1000) for token in (7, first + i if i % 2 else LARGEST - i)]
    contexts = Contexts(1)
    contexts.extend(0, text)
    tree = grown(1, text)
    assert_exact(tree, contexts)
    tree.remove(int32(text), [])
    assert (tree.states, tree.arena[suffix_tree.LIVE_EDGES]) == (1, 0)


@settings(max_examples=300, deadline=None)
@given(text=streams, other=streams, depth=depths)
def test_what_matches_is_the_longest_known_suffix(text: Stream, other: Stream, depth: int) -> None:
    tree, contexts = grown(depth, text), Contexts(depth)
    contexts.extend(0, text)
    state, length = suffix_tree.ROOT, 0
    for n, token in enumerate(other, start=1):
        state, length = suffix_tree.matched(tree.view, state, length, token)
        known = contexts.known(tuple(other[max(0, n - depth - 1) : n]))
        assert (state, length) == (locate(tree, known), len(known))
        followed = contexts.followed(known)
        assert suffix_tree.followed(tree.view, state, length) == (locate(tree, followed), len(followed))


@settings(max_examples=100, deadline=None)
@given(text=streams, depth=depths, more=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_what_a_full_arena_has_no_room_for_is_not_begun(text: Stream, depth: int, more: Stream) -> None:
    """`append` says so and changes nothing; `extend` makes room and goes on."""
    tree, cursor, contexts = SuffixTree(depth, 1), new_cursor(), Contexts(depth)
    tree.extend(cursor, int32(text))
    for name, live in ((suffix_tree.CAP_STATES, suffix_tree.LIVE_STATES), (suffix_tree.CAP_EDGES, suffix_tree.LIVE_EDGES)):
        tree.grow()
        tree.arena[name] = tree.arena[live]
        arena, tail = tree.arena.copy(), list(cursor)
        if not suffix_tree.append(tree.view, cursor, 0, more[0], 1):
            assert np.array_equal(tree.arena, arena)
            assert list(cursor) == tail
        else:  # an edge was not needed
            assert name == suffix_tree.CAP_EDGES
            text, more = [*text, more[0]], [*more[1:], 0]
    tree.extend(cursor, int32(more))
    contexts.extend(0, text + more)
    tree.grow()
    assert_exact(tree, contexts, stamped=False)


@pytest.mark.parametrize("followers", [10, 100, 1000])
def test_a_context_with_very_many_followers_can_be_split(followers: int) -> None:
    """All of them are copied at once, more than the arena grows by in ordinary life."""
    star = [token for i in range(followers) for token in (1, 2, 1000 + i)]
    contexts = Contexts(1)
    for i, text in enumerate((star, [3, 2])):
        contexts.extend(i, text)
    assert_exact(grown(1, star, [3, 2]), contexts)


# --- removal ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=600, deadline=None)
@given(texts=st.lists(streams, min_size=2, max_size=5), other=streams, depth=depths, seed=st.integers(0, 99))
def test_removed_streams_leave_the_automaton_of_the_others(texts: list[Stream], other: Stream, depth: int, seed: int) -> None:
    """Some streams grow while others end and are taken out, in any order. Whatever happens, the tails of growing streams and the matches of
    another text stay right."""
    tree, contexts, rng = SuffixTree(depth, 1), Contexts(depth), random.Random(seed)
    growing = dict.fromkeys(range(len(texts)), 0)
    cursors = [new_cursor() for _ in texts]
    ended: list[int] = []
    match, state, length, at_ = (), suffix_tree.ROOT, 0, 0
    for stamp in itertools.count():
        choice = rng.random()
        if choice < 0.5 and growing:
            i = rng.choice(list(growing))
            piece = texts[i][growing[i] : growing[i] + rng.randint(1, 9)]
            tree.extend(cursors[i], int32(piece), stamp)
            contexts.extend(i, piece, stamp)
            growing[i] += len(piece)
            if growing[i] == len(texts[i]):
                del growing[i]
                ended.append(i)
        elif choice < 0.7 and at_ < len(other):
            state, length = suffix_tree.matched(tree.view, state, length, other[at_])
            match = contexts.matched(match, other[at_])
            at_ += 1
        elif ended:
            i = ended.pop(rng.randrange(len(ended)))
            following = new_cursor(state, length)
            tails = [list(cursors[j]) for j in growing]
            tree.remove(int32(texts[i]), [following, *(cursors[j] for j in growing)])
            contexts.remove(i)
            assert all(list(cursors[j]) == tail for j, tail in zip(growing, tails, strict=True))
            state, length = following
            match = contexts.known(match)
            assert_exact(tree, contexts)
        elif not growing:
            break
        for j in growing:
            tail = tuple(texts[j][: growing[j]][-depth - 1 :])
            assert list(cursors[j]) == [locate(tree, tail), len(tail)]
        assert length == len(match)
        assert suffix_tree.shortened(tree.view, state, length, length)[0] == locate(tree, match)
    assert (tree.states, tree.arena[suffix_tree.LIVE_EDGES]) == (1, 0)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(streams, min_size=2, max_size=4), depth=depths)
def test_removal_undoes_growth_whatever_the_order(texts: list[Stream], depth: int) -> None:
    """What is left is as large as if only the last stream had ever been there."""
    for order in itertools.permutations(range(len(texts))):
        tree = grown(depth, *texts)
        for i in order[:-1]:
            tree.remove(int32(texts[i]), [])
        alone = grown(depth, texts[order[-1]])
        names = [suffix_tree.LIVE_STATES, suffix_tree.LIVE_EDGES]
        assert tree.arena[names].tolist() == alone.arena[names].tolist()


@pytest.mark.parametrize("depth", [2, 20])
def test_long_streams_are_removed_exactly(depth: int) -> None:
    texts = list(long_streams(200).values())
    random.Random(depth).shuffle(texts)
    tree, contexts = grown(depth, *texts), Contexts(depth)
    for i, text in enumerate(texts):
        contexts.extend(i, text)
    for i, text in enumerate(texts):
        tree.remove(int32(text), [])
        contexts.remove(i)
        assert_exact(tree, contexts)


@settings(max_examples=150, deadline=None)
@given(depth=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_removal_needs_no_more_room_than_there_is(depth: int, seed: int) -> None:
    """Two states become one while no edge is free."""
    rng = random.Random(seed)
    texts = [[rng.choice((0, rng.randrange(1, 9))) for _ in range(rng.randint(1, 30))] for _ in range(rng.randint(2, 8))]
    tree = grown(depth, *texts)
    while texts:
        filler = fill(tree)
        tree.remove(int32(texts.pop()), [])
        assert_within_its_arena(tree)
        tree.remove(int32(filler), [])


def test_a_state_with_many_followers_becomes_part_of_another_in_a_full_arena() -> None:
    star = [token for i in range(100) for token in (1, 2, 1000 + i)]
    tree, contexts = grown(1, star, [3, 2]), Contexts(1)
    contexts.extend(0, star)
    contexts.extend(1, fill(tree))
    tree.remove(int32([3, 2]), [])
    assert_exact(tree, contexts)


@pytest.mark.parametrize("depth", [1, 4, 64])
def test_memory_is_used_again(depth: int) -> None:
    """Streams come and go, never more than five at once: after a round of all, nothing is as large as to need more."""
    texts = [text[i : i + 120] for i in range(0, 240, 60) for text in long_streams(400).values()]
    tree: SuffixTree = SuffixTree(depth, 1)
    sizes = []
    for _ in range(4):
        for i, text in enumerate(texts):
            tree.extend(new_cursor(), int32(text))
            if tree.states > 1 and (i >= 5 or sizes):
                tree.remove(int32(texts[i - 5]), [])
        sizes.append((tree.top, int(tree.arena[suffix_tree.TOP_EDGE]), len(tree.arena), tree.nbytes))
    assert sizes[1] == sizes[2] == sizes[3]


def test_a_cursor_moves_from_ended_contexts_to_what_still_occurs() -> None:
    tree = grown(4, [1, 2, 3, 4], [9, 3, 4])
    cursor = new_cursor(locate(tree, (1, 2, 3, 4)), 4)
    tree.remove(int32([1, 2, 3, 4]), [cursor])
    assert list(cursor) == [locate(tree, (3, 4)), 2]
    tree.remove(int32([9, 3, 4]), [cursor])
    assert list(cursor) == [suffix_tree.ROOT, 0]


# --- cost -------------------------------------------------------------------------------------------------------------------------


@kinds(3000)
@pytest.mark.parametrize("depth", [4, 64])
def test_a_token_costs_two_states_and_three_edges_at_most(stream: Stream, depth: int) -> None:
    """At every length, and no more than ``depth + 1`` counts."""
    tree, cursor = SuffixTree(depth, 1), new_cursor()
    for n in range(100, len(stream) + 1, 100):
        tree.extend(cursor, int32(stream[n - 100 : n]))
        assert tree.states <= 2 * n + 1
        assert tree.arena[suffix_tree.LIVE_EDGES] <= 3 * n
        assert links(tree, cursor[0]) <= depth + 1
        assert tree.nbytes <= 4 * (64 + n * (2 * suffix_tree.STATE + 3 * suffix_tree.EDGE) + 16 * (n + 64))


def test_the_arena_grows_by_a_part_of_its_size() -> None:
    """So that moving it costs a token no more the longer the text gets: some twenty times from one token to twenty thousand."""
    rng, grow, sizes = random.Random(0), SuffixTree.grow, []

    def counted(tree: SuffixTree) -> None:
        grow(tree)
        sizes.append(len(tree.arena))

    with mock.patch.object(SuffixTree, "grow", counted):
        grown(8, [rng.randrange(300) for _ in range(20_000)])
    assert 5 < len(sizes) < 30
    assert all(larger > 1.2 * smaller for smaller, larger in itertools.pairwise(sizes))


@pytest.mark.parametrize("period", [1, 2, 7, 50])
def test_a_periodic_text_costs_nothing_more_once_it_has_repeated(period: int) -> None:
    depth = 64
    tree, cursor, sizes = SuffixTree(depth, 1), new_cursor(), []
    for n in (1000, 10_000, 50_000):
        tree.extend(cursor, np.resize(np.arange(period, dtype=np.int32), n))
        sizes.append((tree.top, tree.nbytes, links(tree, cursor[0])))
        cursor = new_cursor()
    assert sizes[0] == sizes[1] == sizes[2]
    assert tree.states <= depth + 2 + period


@pytest.mark.parametrize("word", [fibonacci, thue_morse, blocks])
def test_nested_repeats_cost_less_a_token_the_longer_they_get(word) -> None:  # type: ignore[no-untyped-def]
    """There are only so many contexts of 65 tokens in such words."""
    sizes = {n: grown(64, word(n)) for n in (2000, 4000, 20_000)}
    assert sizes[20_000].states <= sizes[4000].states * 1.1
    assert sizes[20_000].nbytes <= sizes[2000].nbytes * 4
