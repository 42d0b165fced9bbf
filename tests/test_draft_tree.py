"""`DraftTree` against brute force: paths are followed node by node, nothing is shared between nodes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specfx.runtime.tree import EMPTY_TREE, MAX_ROWS, DraftTree, merged


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 20) -> DraftTree:
    parents: list[int] = []
    tokens: list[int] = []
    probs: list[float] = []
    for _ in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.integers(-1, len(parents) - 1))
        siblings = {t for p, t in zip(parents, tokens, strict=True) if p == parent}
        tokens.append(draw(st.integers(0, 30).filter(lambda t, taken=siblings: t not in taken)))
        probs.append((probs[parent] if parent >= 0 else 1.0) * draw(st.floats(0, 1)))
        parents.append(parent)
    return DraftTree(tuple(tokens), tuple(parents), tuple(probs))


def path_of(tree: DraftTree, row: int) -> list[int]:
    """Rows from the pending token (row 0) down to `row`."""
    path = [row]
    while path[0] != 0:
        path.insert(0, tree.parents[path[0] - 1] + 1)
    return path


@given(tree=trees(), tokens=st.lists(st.integers(0, 30), max_size=6), data=st.data())
def test_what_a_tree_foretold_is_its_longest_path_along_a_text(tree: DraftTree, tokens: list[int], data: st.DataObject) -> None:
    if len(tree):
        row = data.draw(st.integers(0, len(tree)))
        tokens = [tree.tokens[r - 1] for r in path_of(tree, row)[1:]] + tokens
    paths = by_path(tree)
    assert tree.foretold(tokens) == max((n for n in range(1, len(tokens) + 1) if tuple(tokens[:n]) in paths), default=0)


def by_path(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """The probability of each node by the tokens that lead to it."""
    return {tuple(tree.tokens[row - 1] for row in path_of(tree, i + 1)[1:]): p for i, p in enumerate(tree.probs)}


@given(first=trees(), second=trees(), most=st.integers(0, 40))
def test_merged_trees_hold_the_paths_of_both(first: DraftTree, second: DraftTree, most: int) -> None:
    whole = {path: max(by_path(t).get(path, 0.0) for t in (first, second)) for path in by_path(first) | by_path(second)}
    tree = merged(first, second, most)
    DraftTree(tree.tokens, tree.parents, tree.probs)  # keeps the rules
    kept = by_path(tree)
    assert len(kept) == len(tree) == min(most, len(whole))
    assert kept.items() <= whole.items()
    assert sorted(kept.values(), reverse=True) == sorted(whole.values(), reverse=True)[:most]
    assert all(kept[path] <= kept.get(path[:-1], 1.0) for path in kept)


# a (row 1) -> b (2), c (3); d (4) beside a; e (5) below c
BRANCHING = DraftTree(tokens=(10, 11, 12, 13, 14), parents=(-1, 0, 0, -1, 2), probs=(0.9, 0.5, 0.4, 0.1, 0.3))


def test_rows_see_exactly_themselves_and_their_ancestors() -> None:
    assert BRANCHING.ancestor_masks() == [0b1, 0b11, 0b111, 0b1011, 0b10001, 0b101011]
    assert BRANCHING.depths() == [0, 1, 2, 2, 1, 3]


@given(tree=trees())
def test_masks_and_depths_follow_the_paths(tree: DraftTree) -> None:
    paths = [path_of(tree, row) for row in range(len(tree) + 1)]
    assert tree.ancestor_masks() == [sum(1 << row for row in path) for path in paths]
    assert tree.depths() == [len(path) - 1 for path in paths]


@given(tree=trees(), data=st.data())
def test_walk_takes_the_longest_path_the_target_agrees_with(tree: DraftTree, data: st.DataObject) -> None:
    """Of all rows whose whole path was chosen by the target, the walk ends at the deepest, and visits its path."""
    targets = data.draw(st.lists(st.integers(0, 30), min_size=len(tree) + 1, max_size=len(tree) + 1))
    for row in range(1, len(tree) + 1):  # make agreement likely
        if data.draw(st.booleans()):
            targets[tree.parents[row - 1] + 1] = tree.tokens[row - 1]
    paths = [path_of(tree, row) for row in range(len(tree) + 1)]
    agreed = [path for path in paths if all(targets[a] == tree.tokens[b - 1] for a, b in itertools.pairwise(path))]
    assert tree.walk(targets) == max(agreed, key=len)


def test_walk_ends_where_no_child_holds_the_targets_choice() -> None:
    targets = [10, 12, 0, 14, 0, 99]
    rows = BRANCHING.walk(targets)
    assert rows == [0, 1, 3, 5]
    assert [targets[row] for row in rows] == [10, 12, 14, 99]  # three accepted drafts and the bonus token
    assert BRANCHING.walk([99, 12, 0, 14, 0, 99]) == [0]
    assert BRANCHING.walk([13, 10, 0, 0, 11, 0]) == [0, 4]  # a leaf: row 1's children are not row 4's


def test_an_empty_tree_is_the_pending_token_alone() -> None:
    assert EMPTY_TREE == DraftTree() == DraftTree.chain([])
    assert len(EMPTY_TREE) == 0
    assert EMPTY_TREE.is_chain
    assert EMPTY_TREE.ancestor_masks() == [1]
    assert EMPTY_TREE.depths() == [0]
    assert EMPTY_TREE.walk([5]) == [0]


@given(tree=trees(), n=st.integers(0, 25))
def test_truncation_keeps_the_first_nodes(tree: DraftTree, n: int) -> None:
    short = tree.truncated(n)
    assert short == DraftTree(tree.tokens[:n], tree.parents[:n], tree.probs[:n])
    assert len(short) == min(n, len(tree))
    assert short.ancestor_masks() == tree.ancestor_masks()[: len(short) + 1]
    assert short.depths() == tree.depths()[: len(short) + 1]


@given(tree=trees(), least=st.floats(0, 1))
def test_pruning_keeps_exactly_the_paths_that_are_probable_enough(tree: DraftTree, least: float) -> None:
    def paths(t: DraftTree) -> dict[tuple[int, ...], float]:
        return {tuple(t.tokens[row - 1] for row in path_of(t, i + 1)[1:]): p for i, p in enumerate(t.probs)}

    pruned = tree.pruned(least)
    assert paths(pruned) == {path: p for path, p in paths(tree).items() if p >= least}
    assert pruned == DraftTree(pruned.tokens, pruned.parents, pruned.probs)  # keeps the rules


def test_truncation_beyond_the_end_is_the_tree_itself() -> None:
    assert BRANCHING.truncated(5) is BRANCHING
    assert BRANCHING.truncated(63) is BRANCHING


@given(tokens=st.lists(st.integers(0, 9), max_size=MAX_ROWS - 1))
def test_a_chain_is_causal(tokens: list[int]) -> None:
    tree = DraftTree.chain(tokens)
    assert tree.is_chain
    assert tree.tokens == tuple(tokens)
    assert tree.probs == (1.0,) * len(tokens)
    assert tree.depths() == list(range(len(tokens) + 1))
    assert tree.ancestor_masks() == [2 ** (row + 1) - 1 for row in range(len(tokens) + 1)]


def test_a_chain_takes_path_probabilities() -> None:
    assert DraftTree.chain([4, 5], [0.5, 0.25]) == DraftTree((4, 5), (-1, 0), (0.5, 0.25))
    with pytest.raises(ValueError, match="differ in length"):
        DraftTree.chain([4, 5], [0.5])


@given(tree=trees())
def test_only_trees_without_branches_are_chains(tree: DraftTree) -> None:
    assert tree.is_chain == (max(tree.depths()) == len(tree))


def test_masks_of_the_largest_tree_fit_one_word() -> None:
    masks = DraftTree.chain(range(MAX_ROWS - 1)).ancestor_masks()
    assert len(masks) == MAX_ROWS
    assert masks[-1] == 2**64 - 1
    assert all(0 <= mask < 2**64 for mask in masks)


@pytest.mark.parametrize(
    ("tokens", "parents", "probs", "message"),
    [
        ((1, 2), (-1,), (1.0, 1.0), "differ in length: 2, 1, 2"),
        ((1,), (-1,), (), "differ in length: 1, 1, 0"),
        ((), (-1,), (), "differ in length: 0, 1, 0"),
        ((1,), (0,), (1.0,), "before its child"),  # its own parent
        ((1, 2), (1, -1), (1.0, 1.0), "before its child"),  # the parent comes later
        ((1,), (-2,), (1.0,), "before its child"),
        ((1, 1), (-1, -1), (0.5, 0.5), "two siblings"),
        ((1, 2, 2), (-1, 0, 0), (0.5, 0.2, 0.2), "two siblings"),
        ((1,) * MAX_ROWS, tuple(range(-1, MAX_ROWS - 1)), (1.0,) * MAX_ROWS, "at most 63 nodes, got 64"),
    ],
)
def test_broken_trees_are_refused(tokens: tuple[int, ...], parents: tuple[int, ...], probs: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftTree(tokens, parents, probs)


def test_the_same_token_may_stand_below_different_parents() -> None:
    tree = DraftTree((1, 2, 1, 1), (-1, -1, 0, 1), (0.5, 0.5, 0.2, 0.2))
    assert tree.walk([2, 0, 1, 0, 9]) == [0, 2, 4]
