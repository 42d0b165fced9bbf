"""Sequences that outlive their call, so that a later one goes on from their keys and values: who holds them, and how they are given up.

`Held` is a handle on sequences that stay in an engine. They are never changed: whoever goes on from them begins sequences of its own
that share their pages. They go when the last reference to the handle does (in any thread: the engine is told at the next `collect`),
when their memory is needed for something else, and when the weights change.
"""

from __future__ import annotations

import weakref
from collections import deque

from specfx.engines.base import Engine


class Held:
    """Sequences `seqs` of one engine with their `texts`: tokens, of which the engine holds all or all but the last."""

    def __init__(self, keeper: Keeper, sequences: dict[int, list[int]]) -> None:
        self.seqs, self.texts = tuple(sequences), tuple(sequences.values())
        self._keeper = weakref.ref(keeper)
        weakref.finalize(self, keeper.unclaimed.append, self.seqs)

    def is_in(self, keeper: Keeper) -> bool:
        """Whether the sequences are still there, in the engine of `keeper`."""
        return self._keeper() is keeper and self.seqs in keeper.held


class Keeper:
    """State of one engine: what it holds for later calls, the oldest first. `unclaimed` may be added to from any thread; the rest is used
    by whoever has the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.held: dict[tuple[int, ...], None] = {}
        self.unclaimed: deque[tuple[int, ...]] = deque()
        self._weights: object = None

    def hold(self, sequences: dict[int, list[int]]) -> Held:
        held = Held(self, sequences)
        self.held[held.seqs] = None
        return held

    def collect(self) -> None:
        """Free what nobody refers to any more."""
        while self.unclaimed:
            self._give_up(self.unclaimed.popleft())

    def make_room(self, but: Held | None = None) -> bool:
        """Free the oldest sequences held, other than `but`; False if there are none."""
        oldest = next((seqs for seqs in self.held if but is None or seqs != but.seqs), None)
        if oldest is not None:
            self._give_up(oldest)
        return oldest is not None

    def follow(self, weights: object) -> None:
        """Keys and values of other weights than `weights` are of no use."""
        if weights != self._weights:
            for seqs in list(self.held):
                self._give_up(seqs)
            self._weights = weights

    def _give_up(self, seqs: tuple[int, ...]) -> None:
        if self.held.pop(seqs, seqs) is None:
            for seq in seqs:
                self.engine.remove(seq)
