"""How much of what was drafted is worth verifying: one budget for all sequences of a step.

A forward of n rows takes ``fixed + each * n`` seconds, fitted to the forwards that were run; a row is taken to cost what it surely costs
(two standard errors less than the best guess), so that on a busy machine nothing is left out for noise. A node brings a token with the
probability that its path is accepted: the drafter's estimate, times how much of the drafter's estimates has come true lately. Of all
nodes of all sequences the most probable are verified, as many as give the most tokens per second. So where rows cost, unlikely nodes are
left out, wherever they hang; and where drafts fail, decoding is plain, but for a probe now and then to see whether they still do. Forwards
that all have as many rows don't tell what a row costs: then one of them is plain now and then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from specfx.runtime.tree import EMPTY_TREE, DraftTree

_MEMORY = 0.98
"""Weight that an observation keeps when the next one comes: the last fifty count."""
_FEWEST = 16
"""Forwards to see before anything is left out."""
_PROBE = 32
"""One step in so many verifies all that was drafted."""
_LEAST_VARIANCE = 0.1
"""Of the rows of forwards; with less, what a row costs can't be told."""
_EXPECTED = 4.0
"""Accepted tokens that the drafter is believed to have foretold rightly before it began."""


class Budget:
    """State: what forwards have cost, and how drafts have fared."""

    def __init__(self) -> None:
        self._steps = self._forwards = 0
        self._weight = self._rows = self._seconds = self._squares = self._products = self._spread = 0.0
        self._expected = self._accepted = _EXPECTED

    def note_forward(self, rows: int, seconds: float) -> None:
        if self._forwards >= _FEWEST:
            seconds = min(seconds, 3 * self._cost(rows))  # something else went on
        self._forwards += 1
        self._weight = _MEMORY * self._weight + 1.0
        self._rows = _MEMORY * self._rows + rows
        self._seconds = _MEMORY * self._seconds + seconds
        self._squares = _MEMORY * self._squares + rows * rows
        self._products = _MEMORY * self._products + rows * seconds
        self._spread = _MEMORY * self._spread + seconds**2

    def note_draft(self, tree: DraftTree, accepted: int) -> None:
        self._expected = _MEMORY * self._expected + sum(tree.probs)
        self._accepted = _MEMORY * self._accepted + accepted

    @property
    def trust(self) -> float:
        """Accepted tokens for each that the drafter expected."""
        return self._accepted / self._expected

    @property
    def _variance(self) -> float:
        return self._squares / self._weight - (self._rows / self._weight) ** 2

    def _fit(self) -> tuple[float, float]:
        """(fixed, each) by least squares, `each` cautiously."""
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._variance
        if variance < 1e-9:
            return seconds, 0.0
        each = (self._products / self._weight - rows * seconds) / variance
        unexplained = max(0.0, self._spread / self._weight - seconds * seconds - each * each * variance)
        each -= 2 * math.sqrt(unexplained / (self._weight * variance))
        each = min(max(0.0, each), seconds / rows)
        return seconds - each * rows, each

    def _cost(self, rows: int) -> float:
        fixed, each = self._fit()
        return fixed + each * rows

    def share(self, trees: Sequence[DraftTree]) -> list[DraftTree]:
        """Of each tree the part that is worth verifying."""
        self._steps += 1
        nodes = sorted((-p, s, i) for s, tree in enumerate(trees) for i, p in enumerate(tree.probs))  # parents before children
        if not nodes or self._forwards < _FEWEST or self._steps % _PROBE == 0:
            return list(trees)
        if (self._steps - 1) % _PROBE == _FEWEST and self._variance < _LEAST_VARIANCE:
            return [EMPTY_TREE] * len(trees)
        fixed, each = self._fit()
        trust, gain = self.trust, float(len(trees))
        best, taken = gain / (fixed + each * len(trees)), 0
        for count, (negative, _, _) in enumerate(nodes, start=1):
            gain -= trust * negative
            rate = gain / (fixed + each * (len(trees) + count))
            if rate > best:
                best, taken = rate, count
        if taken == len(nodes):
            return list(trees)
        kept: list[list[int]] = [[] for _ in trees]
        for _, s, i in sorted(nodes[:taken], key=lambda node: node[1:]):
            kept[s].append(i)
        return [tree.part(nodes) for tree, nodes in zip(trees, kept, strict=True)]
