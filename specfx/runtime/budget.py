"""How much of what was drafted is worth verifying, and whether the next draft is worth making: one budget for all sequences of a step.

What a row and a draft cost is told from the forwards that were run (`specfx.runtime.costs`). A node brings a token with the probability
that its path is accepted: the drafter's estimate, times how much of the drafter's estimates has come true lately.

1. **Verify**: of all nodes of all sequences the most probable are verified, as many as give the most tokens per second. So where rows cost,
   unlikely nodes are left out, wherever they hang. A batch is done when its last sequence is: tokens of the sequences that are behind
   count more (`urgency`).
2. **Draft**: a draft is made as long as the seconds that drafts have saved lately exceed those that one takes. Else decoding is plain, but
   for a probe now and then that is verified whole: soon, then ever more rarely. One that has saved its cost is followed by another at once.

Forwards that are all alike don't tell what a row costs, or a draft: then, and where it is doubtful whether a draft pays, some are run
without, to see.
"""

from __future__ import annotations

from collections.abc import Sequence

from specfx.runtime.costs import MEMORY, Costs
from specfx.runtime.tree import EMPTY_TREE, DraftTree

_FEWEST = 16
"""Forwards to see before nodes are left out."""
_FEWEST_RESTED = 8
"""Forwards to see before drafts are."""
_PROBE = 32
"""One step in so many drafts at all, and verifies all that was drafted where nothing seems worth it."""
_LEAST_VARIANCE = 0.1
"""Of the rows of forwards; with less, what a row costs can't be told."""
_VAGUE = 0.15
"""Of the time of a forward: with more doubt about what all its drafted rows cost, a forward without them is run to see."""
_LOOK = 8
"""One step in so many may be such a forward, where more than twice as many rows are at stake."""
_SEE = 16
"""One step in so many makes no draft where it is doubtful whether drafts pay."""
_CHEAP = 0.04
"""Of the time of a forward: drafts that surely cost less are always made (or the first tokens of each copied passage would be missed)."""
_PROBES = 0.02
"""Of the time: what probes may cost."""
_EXPECTED = 2.0
"""Accepted tokens that the drafter is believed to have foretold rightly before it began."""
_VALUE_MEMORY = 0.85
"""As `MEMORY`, of what a draft saves."""
_OTHER = 1.25
"""Times as many sequences: then a draft is worth something else."""
_URGENT = 2.0
"""A sequence with half as many steps to go as the last one counts ``2 ** -_URGENT`` as much."""


class Budget:
    """State: what forwards have cost, and how drafts have fared."""

    def __init__(self) -> None:
        self._costs = Costs()
        self._steps = 0
        self._apart = 0.0  # seconds of a draft that is not part of a forward
        self._expected = self._accepted = _EXPECTED
        self._value: float | None = None  # seconds that a draft saves
        self._valued = 0  # with so many sequences
        self._probing = self._hopeful = False
        self._shared = self._verified = 0  # sequences and drafted rows of the last step
        self._gained: int | None = None  # tokens that its drafts have brought; None where none was verified
        self._rested, self._pause = 0, _PROBE // 8

    def note_forward(self, rows: int, seconds: float, drafted: bool = False) -> None:
        """A forward of `rows` rows, which made the next draft or did not, took `seconds`."""
        self._costs.note(rows, seconds, drafted)

    def note_drafting(self, seconds: float) -> None:
        """Drafting for a step took `seconds` beside the forward."""
        self._apart = _VALUE_MEMORY * self._apart + (1 - _VALUE_MEMORY) * seconds if self._apart else seconds

    def note_draft(self, tree: DraftTree, accepted: int, without: int | None = 0) -> None:
        """Of a verified `tree` so many nodes were accepted. without: and so many without the draft that `wants` was asked about; None if
        there was none."""
        expected = sum(tree.probs)
        self._expected = MEMORY * self._expected + expected
        self._accepted = MEMORY * self._accepted + accepted
        if without is not None:
            self._gained = (self._gained or 0) + accepted - without

    @property
    def trust(self) -> float:
        """Accepted tokens for each that the drafter expected."""
        return self._accepted / self._expected

    def _vague(self, nodes: int) -> bool:
        """Whether it is too uncertain what this many more rows cost, and now is the time to see."""
        alike = self._costs.rows_variance < _LEAST_VARIANCE
        if alike and (self._steps - 1) % _PROBE == _FEWEST:
            return True
        dear = self._costs.fit().each_doubt * nodes > _VAGUE * self._costs.mean
        return nodes > 2 * _LOOK and self._steps % _LOOK == 0 and (alike or dear)

    def wants(self, within: bool, sequences: int = 1) -> bool:
        """Whether a draft is worth making. To be asked once for each step. within: it would be part of a forward. sequences: of the step;
        what a draft saves is seen anew when they are many more or fewer than before."""
        if not 1 / _OTHER < sequences / max(self._valued, 1) < _OTHER:
            self._value, self._valued = None, sequences
        self._steps += 1
        self._probing |= self._steps % _PROBE == 0
        gained, self._gained = self._gained, None
        if self._costs.forwards < _FEWEST_RESTED or self._value is None:
            return True
        fit, typical = self._costs.fit(), self._costs.mean
        cost, doubt = (fit.drafting, fit.drafting_doubt) if within else (self._apart, 0.0)
        longest = max(_PROBE, int(cost / (_PROBES * typical)))
        if gained is not None:
            plain = self._costs.of(self._shared, False)
            self._hopeful = gained / self._shared * plain - fit.each * self._verified > max(cost, 0.5 * plain / self._shared)
        pays = self._value > cost or cost + doubt < _CHEAP * typical or self._hopeful
        unsure = doubt > 0 and self._value < cost + doubt and self._steps % _SEE == 0
        if pays and not unsure:
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
        kept = self._share(trees, urgency, others)
        self._shared, self._verified = len(trees), sum(map(len, kept))
        return kept

    def _share(self, trees: Sequence[DraftTree], urgency: Sequence[float] | None, others: Sequence[DraftTree] | None) -> list[DraftTree]:
        nodes, taken = self._ranked(trees, urgency), 0
        if self._costs.forwards:
            taken, saved = self._worth(trees, nodes, urgency)
            if others is not None:
                if any(map(len, others)):
                    saved = max(0.0, saved - self._worth(others, self._ranked(others, urgency), urgency)[1])
                self._value = saved if self._value is None else _VALUE_MEMORY * self._value + (1 - _VALUE_MEMORY) * saved
        if not nodes or self._costs.forwards < _FEWEST:
            return list(trees)
        if others is not None:
            probing, self._probing = self._probing, False
            futile = (self._value or 0.0) < _CHEAP * self._costs.mean  # lately
            if not taken and (probing or (self._hopeful and futile)):
                return list(trees)
        if self._vague(taken):
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
        trust, each, plain = self.trust, self._costs.fit().each, max(self._costs.of(len(trees), False), 1e-9)
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
