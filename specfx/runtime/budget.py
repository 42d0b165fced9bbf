"""How much of what was drafted is worth verifying, and whether the next draft is worth making: one budget for all sequences of a step.

A forward of n rows takes ``fixed + each * n`` seconds, and ``drafting`` more if the next draft is part of it; fitted to the forwards that
were run. A row is taken to cost what it surely costs (two standard errors less than the best guess), so that on a busy machine nothing is
left out for noise. A node brings a token with the probability that its path is accepted: the drafter's estimate, times how much of the
drafter's estimates has come true lately.

1. **Verify**: of all nodes of all sequences the most probable are verified, as many as give the most tokens per second. So where rows cost,
   unlikely nodes are left out, wherever they hang. A batch is done when its last sequence is: tokens of the sequences that are behind
   count more (`urgency`).
2. **Draft**: a draft is made as long as the seconds that drafts have saved lately exceed those that one takes. Else decoding is plain, but
   for a probe now and then that is verified whole: soon, then ever more rarely. One that comes true is followed by another at once.

Forwards that are all alike don't tell what a row costs, or a draft: then some are run without, to see.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specfx.runtime.tree import EMPTY_TREE, DraftTree

_MEMORY = 0.98
"""Weight that an observation keeps when the next one comes: the last fifty count."""
_FEWEST = 16
"""Forwards to see before nodes are left out."""
_FEWEST_RESTED = 8
"""Forwards to see before drafts are."""
_PROBE = 32
"""One step in so many verifies all that was drafted, and drafts at all."""
_LEAST_VARIANCE = 0.1
"""Of the rows of forwards; with less, what a row costs can't be told."""
_VAGUE = 0.15
"""Of the time of a forward: with more doubt about what all its drafted rows cost, a forward without them is run to see."""
_LOOK = 8
"""One step in so many may be such a forward, where more than twice as many rows are at stake."""
_LEAST_SEEN = 3.0
"""Forwards with and without a draft, by their weight; with less, what a draft costs can't be told."""
_SUPPOSED = 0.2
"""Of the time of a forward: what a draft is taken to cost until that could be told once."""
_CHEAP = 0.04
"""Of the time of a forward: drafts that cost less are always made (or the first tokens of each copied passage would be missed)."""
_PROBES = 0.02
"""Of the time: what probes may cost."""
_EXPECTED = 2.0
"""Accepted tokens that the drafter is believed to have foretold rightly before it began."""
_VALUE_MEMORY = 0.85
"""As `_MEMORY`, of what a draft saves."""
_URGENT = 4.0
"""A sequence with half as many steps to go as the last one counts ``2 ** -_URGENT`` as much."""


class Budget:
    """State: what forwards have cost, and how drafts have fared."""

    def __init__(self) -> None:
        self._steps = self._forwards = 0
        self._normal = np.zeros((3, 3))  # of least squares over (1, rows, drafted), and seconds
        self._seconds = np.zeros(3)
        self._squares = 0.0
        self._apart = 0.0  # seconds of a draft that is not part of a forward
        self._within: float | None = None  # and of one that is
        self._expected = self._accepted = _EXPECTED
        self._value: float | None = None  # seconds that a draft saves
        self._probing = self._hopeful = False
        self._rested, self._pause = 0, _PROBE // 8
        self._fitted: tuple[float, float, float] | None = None
        self._doubt = 0.0  # of `each` in the last fit, two standard errors

    def note_forward(self, rows: int, seconds: float, drafted: bool = False) -> None:
        """A forward of `rows` rows, which made the next draft or did not, took `seconds`."""
        if self._forwards >= _FEWEST:
            seconds = min(seconds, 3 * self._cost(rows, drafted))  # something else went on
        self._forwards, self._fitted = self._forwards + 1, None
        x = np.array([1.0, rows, drafted])
        self._normal = _MEMORY * self._normal + np.outer(x, x)
        self._seconds = _MEMORY * self._seconds + seconds * x
        self._squares = _MEMORY * self._squares + seconds**2

    def note_drafting(self, seconds: float) -> None:
        """Drafting for a step took `seconds` beside the forward."""
        self._apart = _VALUE_MEMORY * self._apart + (1 - _VALUE_MEMORY) * seconds if self._apart else seconds

    def note_draft(self, tree: DraftTree, accepted: int, without: int | None = 0) -> None:
        """Of a verified `tree` so many nodes were accepted. without: and so many without the draft that `wants` was asked about; None if
        there was none."""
        expected = sum(tree.probs)
        self._expected = _MEMORY * self._expected + expected
        self._accepted = _MEMORY * self._accepted + accepted
        if without is not None:
            self._hopeful = accepted - without > max(0.5, expected / 2)

    @property
    def trust(self) -> float:
        """Accepted tokens for each that the drafter expected."""
        return self._accepted / self._expected

    @property
    def _mean(self) -> float:
        """Seconds of a forward; never zero, whatever the clock says."""
        return max(float(self._seconds[0] / self._normal[0, 0]), 1e-9)

    @property
    def _variance(self) -> float:
        """Of the rows of forwards."""
        weight, rows = self._normal[0, :2]
        return float(self._normal[1, 1] / weight - (rows / weight) ** 2)

    @property
    def _tells_drafting(self) -> bool:
        drafted = self._normal[0, 2]
        return bool(min(drafted, self._normal[0, 0] - drafted) >= _LEAST_SEEN)

    def _fit(self) -> tuple[float, float, float]:
        """(fixed, each, drafting) by least squares, `each` cautiously. What can't be told is zero (and part of `fixed`)."""
        if self._fitted is not None:
            return self._fitted
        told = [0] + [1] * (self._variance > 1e-9) + [2] * self._tells_drafting
        normal, seconds, weight = self._normal[np.ix_(told, told)], self._seconds[told], self._normal[0, 0]
        inverse = np.linalg.pinv(normal)
        solution = inverse @ seconds
        unexplained = max(0.0, float(self._squares - solution @ seconds)) / weight
        fit = np.zeros(3)
        fit[told] = solution
        fit[2] = max(0.0, fit[2])
        if 1 in told:
            spread = float(inverse[told.index(1), told.index(1)])
            mean, (_, rows, drafted) = self._mean, self._normal[0] / weight
            self._doubt = 2 * (unexplained * spread) ** 0.5
            fit[1] = min(max(0.0, fit[1] - self._doubt), mean / rows)
            fit[0] = mean - fit[1] * rows - fit[2] * drafted
        self._fitted = float(fit[0]), float(fit[1]), float(fit[2])
        return self._fitted

    def _vague(self, nodes: int) -> bool:
        """Whether it is too uncertain what this many more rows cost, and now is the time to see."""
        if self._variance < _LEAST_VARIANCE and (self._steps - 1) % _PROBE == _FEWEST:
            return True
        dear = self._doubt * nodes > _VAGUE * self._mean
        return nodes > 2 * _LOOK and self._steps % _LOOK == 0 and (self._variance < _LEAST_VARIANCE or dear)

    def _cost(self, rows: int, drafted: bool) -> float:
        fixed, each, drafting = self._fit()
        return fixed + each * rows + drafting * drafted

    def wants(self, within: bool) -> bool:
        """Whether a draft is worth making. To be asked once for each step. within: it would be part of a forward."""
        self._steps += 1
        self._probing |= self._steps % _PROBE == 0
        if self._forwards < _FEWEST_RESTED or self._value is None:
            return True
        drafting, typical = self._fit()[2], self._mean
        if self._tells_drafting:
            self._within = drafting
        cost = self._apart if not within else _SUPPOSED * typical if self._within is None else self._within
        unseen = within and self._within is None and self._value < typical / 2 and self._steps % _PROBE < _LEAST_SEEN + 1
        longest = max(_PROBE, int(cost / (_PROBES * typical)))
        pays = self._value > cost or cost < _CHEAP * typical or (self._hopeful and cost < typical)
        if pays and not unseen:
            self._rested, self._pause = 0, longest // 8
            return True
        self._rested += 1
        if self._rested < self._pause:
            return False
        self._rested, self._pause, self._probing = 0, min(2 * self._pause, longest), True
        return True

    def share(
        self, trees: Sequence[DraftTree], urgency: Sequence[float] | None = None, others: Sequence[DraftTree] | None = ()
    ) -> list[DraftTree]:
        """Of each tree the part that is worth verifying. urgency: what a token of each sequence counts, 1 for None. others: the trees that
        there would be without the draft that `wants` was asked about; None if these are they, () if there would be none."""
        nodes, taken = self._ranked(trees, urgency), 0
        if self._forwards:
            taken, saved = self._worth(trees, nodes, urgency)
            if others is not None:
                if any(map(len, others)):
                    saved -= self._worth(others, self._ranked(others, urgency), urgency)[1]
                self._value = saved if self._value is None else _VALUE_MEMORY * self._value + (1 - _VALUE_MEMORY) * saved
        if not nodes or self._forwards < _FEWEST:
            return list(trees)
        if others is not None and (self._probing or (self._hopeful and not taken)):
            self._probing = False
            return list(trees)
        if self._vague(len(nodes)):
            return [EMPTY_TREE] * len(trees)
        if taken == len(nodes):
            return list(trees)
        kept: list[list[int]] = [[] for _ in trees]
        for _, s, i in sorted(nodes[:taken], key=lambda node: node[1:]):
            kept[s].append(i)
        return [tree.part(part) for tree, part in zip(trees, kept, strict=True)]

    def _ranked(self, trees: Sequence[DraftTree], urgency: Sequence[float] | None) -> list[tuple[float, int, int]]:
        """(- what it brings, tree, node) of all nodes, the best first, parents before children."""
        counts = urgency or [1.0] * len(trees)
        return sorted(
            (-p * count, s, i) for s, (tree, count) in enumerate(zip(trees, counts, strict=True)) for i, p in enumerate(tree.probs)
        )

    def _worth(
        self, trees: Sequence[DraftTree], nodes: Sequence[tuple[float, int, int]], urgency: Sequence[float] | None
    ) -> tuple[int, float]:
        """How many of `nodes` give the most tokens per second, and the seconds that they save."""
        fixed, each, _ = self._fit()
        trust, plain = self.trust, max(fixed + each * len(trees), 1e-9)
        gain = alone = float(len(trees) if urgency is None else sum(urgency))
        best, taken, saved = gain / plain, 0, 0.0
        for count, (negative, _, _) in enumerate(nodes, start=1):
            gain -= trust * negative
            rate = gain / (plain + each * count)
            if rate > best:
                best, taken, saved = rate, count, (gain / alone - 1) * plain - each * count
        return taken, saved


def urgency(remaining: Sequence[int], pace: Sequence[float]) -> list[float]:
    """What a token of each sequence counts, 1 for the one that will be last. remaining: tokens to go at most; pace: tokens a step."""
    steps = [count / speed for count, speed in zip(remaining, pace, strict=True)]
    longest = max(max(steps), 1.0)
    return [max(s / longest, 1e-3) ** _URGENT for s in steps]
