"""Reads a suffix tree's arena, as little as tests need of it, and compares it with the oracle's contexts."""

from __future__ import annotations

from suffix_oracle import Context, Contexts

from specfx.drafters import suffix_tree
from specfx.drafters.suffix import SuffixDrafter
from specfx.drafters.suffix_tree import SuffixTree, at


def locate(tree: SuffixTree, context: Context) -> int:
    """The state of a context, walked to from the root; -1 if it doesn't occur."""
    state = suffix_tree.ROOT
    for token in context:
        state = suffix_tree.follow(tree.view, state, token)
        if state < 0:
            break
    return state


def field(tree: SuffixTree, state: int, name: int) -> int:
    return int(tree.arena[at(state) + name])


def links(tree: SuffixTree, state: int) -> int:
    """States from here to the root: each gets one more count when its context occurs again."""
    n = 0
    while state != suffix_tree.ROOT:
        state, n = field(tree, state, suffix_tree.LINK), n + 1
    return n


def edges_of(tree: SuffixTree, state: int) -> list[int]:
    """Where the edges of a state's further followers are."""
    edges, edge = [], field(tree, state, suffix_tree.MORE)
    while edge >= 0:
        edges.append(edge)
        edge = int(tree.arena[edge + suffix_tree.NEXT])
    return edges


def followers(tree: SuffixTree, state: int) -> dict[int, int]:
    """token -> count, as a reader of the tree finds them: the state's own, then the edges."""
    if field(tree, state, suffix_tree.TOKEN) < 0:
        assert not edges_of(tree, state)
        return {}
    found = [(field(tree, state, suffix_tree.TOKEN), field(tree, state, suffix_tree.TARGET))]
    for edge in edges_of(tree, state):
        assert tree.arena[edge + suffix_tree.OWNER] == state
        found.append((int(tree.arena[edge + suffix_tree.E_TOKEN]), int(tree.arena[edge + suffix_tree.E_TARGET])))
    assert len(dict(found)) == len(found)
    assert all(suffix_tree.follow(tree.view, state, token) == target for token, target in found)
    return {token: field(tree, target, suffix_tree.COUNT) for token, target in found}


def assert_exact(tree: SuffixTree, contexts: Contexts, stamped: bool = True) -> None:
    """Each context has its count, its latest stamp and its followers; and no two states stand for contexts that end in the same places."""
    states = {locate(tree, context) for context in contexts.ends} | {suffix_tree.ROOT}
    assert min(states) >= 0
    assert followers(tree, suffix_tree.ROOT) == {context[0]: contexts.count(context) for context in contexts.ends if len(context) == 1}
    for context in contexts.ends:
        state = locate(tree, context)
        assert field(tree, state, suffix_tree.COUNT) == contexts.count(context), context
        assert not stamped or field(tree, state, suffix_tree.LAST) == contexts.last[context], context
        if len(context) <= contexts.depth:
            assert followers(tree, state) == dict(contexts.followers(context)), context
    assert tree.states == len(states) == contexts.classes
    assert tree.arena[suffix_tree.LIVE_EDGES] == sum(len(edges_of(tree, state)) for state in states)
    assert_within_its_arena(tree)


def assert_cursors_are_places(drafter: SuffixDrafter) -> None:
    """What the cache moves along when it takes an output out: states that there are, and contexts that they stand for."""
    tree = drafter.cache.tree
    for state, length in drafter._cursors():
        assert 0 <= state < tree.top
        assert state == suffix_tree.ROOT or field(tree, state, suffix_tree.COUNT) > 0
        assert 0 <= length <= field(tree, state, suffix_tree.LONGEST)


def assert_within_its_arena(tree: SuffixTree) -> None:
    a = tree.arena
    assert a[suffix_tree.LIVE_STATES] <= a[suffix_tree.TOP_STATE] <= a[suffix_tree.CAP_STATES]
    assert a[suffix_tree.LIVE_EDGES] <= a[suffix_tree.TOP_EDGE] <= a[suffix_tree.CAP_EDGES]
