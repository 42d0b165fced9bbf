"""`specfx bench suffix --soak N`: whether the suffix drafter's cache still counts right after it has evicted for a long time.

N tokens through a cache of 50,000, several requests at a time, of all kinds of stream; now and then contexts are counted both in the tree
and by scanning the outputs that the cache says it holds. They must never differ.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from specfx.bench import report
from specfx.bench.suffix_streams import VOCABULARY, Texts, make_texts
from specfx.drafters.suffix import SuffixDrafter
from specfx.drafters.suffix_tree import COUNT, ROOT, SuffixTree, at, matched
from specfx.options import SuffixOptions
from specfx.runtime.tree import DraftTree

BOUND = 50_000
"""Tokens of the cache."""
LONGEST_PROMPT, LONGEST_OUTPUT = 200, 1500
LONGEST = LONGEST_PROMPT + LONGEST_OUTPUT
"""Tokens of a request."""


def run(kinds: Sequence[str], written: Sequence[int], tokens: int) -> dict[str, Any]:
    """Soak and print. Returns what goes into the JSON."""
    with report.Progress(f"soak, {tokens} tokens, cache of {BOUND}"):
        states = Soak([make_texts(kind, written) for kind in kinds], BOUND).run(tokens)
    print(table(states))
    return {"bound": BOUND, "streams": list(kinds), "states": [asdict(state) for state in states]}


def count_in_tree(tree: SuffixTree, context: Sequence[int]) -> int:
    """How often a context of 1 to ``depth + 1`` tokens occurs, as the tree has it."""
    state, length = ROOT, 0
    for token in context:
        state, length = matched(tree.view, state, length, token)
    return int(tree.view[at(state) + COUNT]) if length == len(context) else 0


def count_in_text(text: np.ndarray, context: Sequence[int]) -> int:
    """How often a context occurs in `text`, int32 ``[N]``, by looking everywhere."""
    places = np.arange(len(text) - len(context) + 1)
    for i, token in enumerate(context):
        places = places[text[places + i] == token]
    return len(places)


@dataclass(frozen=True)
class SoakState:
    """Of a soak at some moment. outputs, held: outputs and tokens in the cache. arena_bytes: memory that its tree has written to."""

    tokens: int
    seconds: float
    evicted: int
    outputs: int
    held: int
    arena_bytes: int
    compared: int
    mismatches: int


class Soak:
    """Some running requests on one drafter with a small cache.

    texts: kinds of stream, drawn from in turn. bound: tokens of the cache. A request has a prompt of up to 200 tokens and writes up to
    1,500, one to eight at a time, drafting in between; now and then half the cache is evicted at once.
    """

    RUNNING = 8
    SAMPLES = 100

    def __init__(self, texts: Sequence[Texts], bound: int) -> None:
        self.drafter = SuffixDrafter(SuffixOptions(max_cached_tokens=bound), 32)
        self.tokens = self.compared = self.mismatches = 0
        self._texts, self._bound, self._draw = texts, bound, random.Random(0)
        self._next = 0
        self._left: dict[int, list[int]] = {}  # of each running request, what it is still to write
        self._written: list[list[int]] = []  # by the last requests that ended

    def run(self, tokens: int, checks: int = 200) -> list[SoakState]:
        """Write so many tokens, and check `checks` times. Returns the states at 10, 50 and 100 %."""
        began = time.perf_counter()
        states = []
        for check in range(1, checks + 1):
            while self.tokens < tokens * check // checks:
                self._step()
            self.check()
            if check in (-(-checks // 10), -(-checks // 2), checks):
                states.append(self._state(time.perf_counter() - began))
        return states

    def check(self) -> None:
        """Compare counts of contexts that the cache holds, of some it may have lost, and of some that never were."""
        cache, draw = self.drafter.cache, self._draw
        outputs = [cache.output(serial) for serial in cache.serials]
        text = np.array([token for output in outputs for token in [*output, -1]], dtype=np.int32)  # no context holds -1
        self._note(cache.tokens == len(text) - len(outputs))
        sources = [output for output in [*outputs, *self._written] if output]
        for _ in range(self.SAMPLES):
            source = draw.choice(sources)
            length = min(draw.choice((1, 2, 3, 8, draw.randint(1, cache.depth + 1))), len(source))
            start = draw.randrange(len(source) - length + 1)
            context = source[start : start + length]
            if draw.random() < 0.1:
                context[draw.randrange(length)] = draw.randrange(VOCABULARY)
            self._note(count_in_tree(cache.tree, context) == count_in_text(text, context))

    def _note(self, same: bool) -> None:
        self.compared += 1
        self.mismatches += not same

    def _state(self, seconds: float) -> SoakState:
        cache = self.drafter.cache
        bytes_ = cache.tree.nbytes
        return SoakState(self.tokens, seconds, cache.evicted, len(cache), cache.tokens, bytes_, self.compared, self.mismatches)

    def _step(self) -> None:
        draw, drafter = self._draw, self.drafter
        if len(self._left) < self.RUNNING:
            self._start()
        seq = draw.choice(list(self._left))
        new = self._left[seq][: draw.randint(1, 8)]
        del self._left[seq][: len(new)]
        self.tokens += len(new)
        if self._left[seq]:
            drafter.accept(seq, new)
            draft = drafter.propose([seq], [32])[0]
            DraftTree(draft.tokens, draft.parents, draft.probs)  # raises if it isn't one
        else:
            drafter.remove(seq, new)
            del self._left[seq]
        if draw.random() < 1 / self._bound:  # after some four times as many tokens
            drafter.evict(self._bound // 2)

    def _start(self) -> None:
        prompt, output = self._draw.randint(0, LONGEST_PROMPT), self._draw.randint(1, LONGEST_OUTPUT)
        text = self._texts[self._next % len(self._texts)](prompt + output)
        self.drafter.add(self._next, text[:prompt])
        self._left[self._next] = text[prompt:]
        self._written = [*self._written[-2 * self.RUNNING :], text[prompt:]]
        self._next += 1


def table(states: Sequence[SoakState]) -> str:
    """One row for each moment."""
    header = ("tokens", "seconds", "evicted outputs", "outputs held", "tokens held", "arena MB", "counts compared", "mismatches")
    rows = []
    for s in states:
        counts = map(str, (s.evicted, s.outputs, s.held))
        rows.append((str(s.tokens), f"{s.seconds:.1f}", *counts, f"{s.arena_bytes / 1e6:.2f}", str(s.compared), str(s.mismatches)))
    return report.table(header, rows)
