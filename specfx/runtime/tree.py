"""The draft tree: what a drafter proposes and one target forward verifies.

Nodes are the drafted tokens, in an order where a parent comes before its children. The root of every tree is the *pending*
token: the last token committed, whose own forward has not happened yet. It is not a node here; parent ``-1`` means it.

When a tree is forwarded, the pending token is row 0 and node ``i`` is row ``i + 1``. `ancestor_masks` and `depths` describe those
rows: row ``i`` may see row ``j`` exactly if bit ``j`` of its mask is set (itself and its ancestors; after Miao et al.,
SpecInfer, 2023), and its position is the pending token's position plus its depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_ROWS = 64
"""Rows of one tree that an ancestor mask of one int64 word can describe, the pending token included."""


@dataclass(frozen=True)
class DraftTree:
    """A proposal of ``n`` drafted tokens.

    tokens: ``[n]`` token ids. parents: ``[n]`` index of each node's parent, ``-1`` for the pending token. probs: ``[n]`` estimated
    probability that the node *and all its ancestors* are accepted (never above its parent's). Siblings hold different tokens.

    Raises `ValueError` when those rules are broken or the tree has more than ``MAX_ROWS - 1`` nodes.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    probs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if not n == len(self.parents) == len(self.probs):
            raise ValueError(f"tokens, parents and probs differ in length: {n}, {len(self.parents)}, {len(self.probs)}")
        if n > MAX_ROWS - 1:
            raise ValueError(f"a draft tree holds at most {MAX_ROWS - 1} nodes, got {n}")
        if any(not -1 <= p < i for i, p in enumerate(self.parents)):
            raise ValueError(f"each parent must come before its child: {self.parents}")
        if len(set(zip(self.parents, self.tokens, strict=True))) != n:
            raise ValueError("two siblings hold the same token")

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int], probs: Sequence[float] | None = None) -> DraftTree:
        """A tree without branches; `probs` (path probabilities) default to 1."""
        n = len(tokens)
        return cls(tuple(tokens), tuple(range(-1, n - 1)), tuple(probs) if probs is not None else (1.0,) * n)

    @classmethod
    def unchecked(cls, tokens: tuple[int, ...], parents: tuple[int, ...], probs: tuple[float, ...]) -> DraftTree:
        """A tree that is known to keep the rules, made without looking at them again (a fifth of the time)."""
        tree = object.__new__(cls)
        tree.__dict__.update(tokens=tokens, parents=parents, probs=probs)
        return tree

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self) - 1))

    def best_chain(self) -> DraftTree:
        """The path from the root to the leaf that is most probable, the longest among equals."""
        if self.is_chain:
            return self
        leaves = set(range(len(self))) - set(self.parents)
        depths = self.depths()
        node = max(leaves, key=lambda i: (self.probs[i], depths[i + 1]))
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        path.reverse()
        return DraftTree.chain([self.tokens[i] for i in path], [self.probs[i] for i in path])

    def truncated(self, n: int) -> DraftTree:
        """The first `n` nodes (a tree again, since parents come first)."""
        return self if n >= len(self) else DraftTree(self.tokens[:n], self.parents[:n], self.probs[:n])

    def likeliest(self, n: int) -> DraftTree:
        """The `n` most probable nodes, of equals the earlier ones (a tree again, since no node is more probable than its parent)."""
        if n >= len(self):
            return self
        return self.part(sorted(sorted(range(len(self)), key=lambda i: (-self.probs[i], i))[:n]))

    def pruned(self, probability: float) -> DraftTree:
        """The nodes that are at least so probable (a tree again, since no node is more probable than its parent)."""
        return self.part([i for i, p in enumerate(self.probs) if p >= probability])

    def part(self, kept: Sequence[int]) -> DraftTree:
        """The ascending nodes `kept`, with each of which its parent must be."""
        if len(kept) == len(self):
            return self
        place = {-1: -1} | {node: i for i, node in enumerate(kept)}
        tokens, probs = tuple(self.tokens[i] for i in kept), tuple(self.probs[i] for i in kept)
        return DraftTree.unchecked(tokens, tuple(place[self.parents[i]] for i in kept), probs)

    def ancestor_masks(self) -> list[int]:
        """``[n + 1]`` bit masks over rows, as non-negative Python ints below ``2**(n + 1)``; row 0 is the pending token."""
        masks = [1]
        for i, p in enumerate(self.parents):
            masks.append(masks[p + 1] | 1 << (i + 1))
        return masks

    def depths(self) -> list[int]:
        """``[n + 1]`` depth of every row; the pending token has depth 0."""
        depths = [0]
        for p in self.parents:
            depths.append(depths[p + 1] + 1)
        return depths

    def children(self) -> dict[tuple[int, int], int]:
        """Of each row that has some: (row, token) -> the child's row."""
        return {(p + 1, t): i + 1 for i, (p, t) in enumerate(zip(self.parents, self.tokens, strict=True))}

    def foretold(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` in a row are nodes of the tree, from the root."""
        children, row = self.children(), 0
        for count, token in enumerate(tokens):
            if (row := children.get((row, token), -1)) < 0:
                return count
        return len(tokens)

    def walk(self, targets: Sequence[int]) -> list[int]:
        """Rows visited when the target chooses ``targets[row]`` after each row (``[n + 1]``).

        Starts at row 0 and goes to the child that holds the target's choice for as long as there is one. The tokens committed
        are ``[targets[r] for r in rows]``: the accepted drafts and, last, the bonus token.
        """
        children, rows = self.children(), [0]
        while (row := children.get((rows[-1], int(targets[rows[-1]])))) is not None:
            rows.append(row)
        return rows


EMPTY_TREE = DraftTree()


def merged(first: DraftTree, second: DraftTree, most: int) -> DraftTree:
    """The paths of both trees, of which the `most` most probable nodes stay. A path of both is as probable as the surer tree finds it."""
    if not len(first) or not len(second):
        return (first if len(first) else second).likeliest(most)
    tokens, parents, probs = list(first.tokens), list(first.parents), list(first.probs)
    nodes = {(parent, token): i for i, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
    place = {-1: -1}
    for i, (token, parent, prob) in enumerate(zip(second.tokens, second.parents, second.probs, strict=True)):
        place[i] = at = nodes.setdefault((place[parent], token), len(tokens))
        if at == len(tokens):
            tokens.append(token)
            parents.append(place[parent])
            probs.append(prob)
        probs[at] = max(probs[at], prob)
    return DraftTree.unchecked(tuple(tokens), tuple(parents), tuple(probs)).likeliest(most)


@dataclass(frozen=True)
class TreeShape:
    """SGLang's ``num_steps``, ``topk`` and ``num_draft_tokens`` (the pending token counts as one of them)."""

    num_steps: int
    topk: int
    num_draft_tokens: int

    @property
    def candidates(self) -> int:
        """Tokens that are proposed."""
        return self.topk + (self.num_steps - 1) * self.topk**2

    @property
    def nodes(self) -> int:
        """Nodes of every tree."""
        return min(self.num_draft_tokens - 1, self.candidates)

    @property
    def rows(self) -> int:
        """Most rows of one step."""
        return (self.num_steps - 1) * self.topk
