"""Suffix decoding: draft what followed earlier in this request whenever the text said what it says now.

After SuffixDecoding (Oliaro et al., 2024), over the prompt and output of one request. Two parts:

1. `SuffixIndex` is a suffix automaton (Blumer et al., 1985) grown token by token. One *state* stands for all contexts that end at the
   same positions of the stream; its transitions are the tokens that ever followed, its *link* leads to the next shorter context that
   also ends elsewhere. Two columns are added: how often a context occurred and where it ended last. An appended token changes them for
   the suffixes of the stream only. Those of up to ``max_context + 1`` tokens are kept (no draft asks for longer ones), so that a token
   costs O(1) amortised plus one hop for each of them with a different count: one or two on ordinary text, ``max_context`` on constant text.

2. `SuffixDrafter` starts at the longest context that was ever followed by something and grows the tree best-first: take the
   continuation with the highest path probability, follow its transition, push what followed there.

The probability that `token` comes next is estimated as in PPM (Cleary and Witten, 1984; interpolated), from the longest context to
shorter ones, ``LEVELS`` of them. A context of `length` tokens, `total` times followed, ``n`` times by `token`::

    P(token) = (n + doubt * P_shorter(token)) / (total + doubt)        doubt = DOUBT / length

so one observation after 1 token counts for little, and after 20 tokens for nearly everything. The occurrence at the end of the stream
was followed by nothing yet: it is not in `total`. Among equally probable continuations the more recent one comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

import torch

from specfx.options import SuffixOptions
from specfx.runtime.tree import EMPTY_TREE, DraftTree

LEVELS = 3
"""Contexts that take part in one estimate: the longest one, and the next shorter ones that say something different."""

DOUBT = 2.0
"""Strength of the doubt in a context of one token, in observations; see the formula above.

A compromise, from replays: a node estimated at 0.55 was accepted 24 times in 100 in agent traces, 35 in GSM8K solutions, and 67 in edited
code. Doubt that was learned from the request's own hits drafted no better for the same number of nodes, so it is a constant.
"""

MAX_FOLLOWERS = 64
"""A context that this many different tokens followed predicts none of them, and would be slow to scan: it is left out."""

ROOT = 0
"""The state of the empty context."""


class SuffixIndex:
    """Every context of one stream of tokens, how often it occurred and what followed it. All columns are indexed by state.

    A *place* below is a pair (state, length): the context of `length` tokens that `state` stands for.
    """

    def __init__(self, max_context: int) -> None:
        self.max_context = max_context
        self.size = 0
        self.follow: list[dict[int, int]] = [{}]  # token -> state of the context with the token appended
        self.link: list[int] = [-1]  # state of the longest context that ends at more positions
        self.longest: list[int] = [0]  # tokens of the state's longest context
        self.count: list[int] = [0]  # occurrences; right for contexts of up to max_context + 1 tokens
        self.last_end: list[int] = [0]  # end (exclusive) of the most recent occurrence; right as far as `count`
        self._whole = ROOT  # state of the whole stream
        self._tail = ROOT  # place of the last `max_context + 1` tokens
        self._tail_length = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append `tokens`."""
        for token in tokens:
            self._append(int(token))

    def tail(self) -> tuple[int, int]:
        """The place of the stream's last `max_context` tokens (fewer, if it is shorter)."""
        return self._shortened(self._tail, self._tail_length, self.max_context)

    def total(self, state: int) -> int:
        """How often the contexts of `state` were followed by a token; the occurrence at the end of the stream was not."""
        return self.count[state] - (self.last_end[state] == self.size)

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """The place reached when `token` follows that one."""
        return self._shortened(self.follow[state][token], length + 1, self.max_context)

    def _shortened(self, state: int, length: int, limit: int) -> tuple[int, int]:
        """The place of the last `limit` tokens of a place; `length` is at most ``limit + 1``, so one link is enough."""
        length = min(length, limit)
        link = self.link[state]
        return (link, length) if state != ROOT and length <= self.longest[link] else (state, length)

    def _new_state(self, longest: int, follow: dict[int, int], link: int, count: int) -> int:
        self.longest.append(longest)
        self.follow.append(follow)
        self.link.append(link)
        self.count.append(count)
        self.last_end.append(0)  # the tail sets it
        return len(self.link) - 1

    def _append(self, token: int) -> None:
        follow, link, longest = self.follow, self.link, self.longest
        self.size += 1
        # The automaton itself: Blumer's online construction.
        new = self._new_state(self.size, {}, ROOT, 0)
        state = self._whole
        while state != -1 and token not in follow[state]:
            follow[state][token] = new
            state = link[state]
        if state != -1:
            target = follow[state][token]
            if longest[target] != longest[state] + 1:
                # From now on the shorter contexts of `target` end at more positions than its longer ones: they get a state of their own.
                short = self._new_state(longest[state] + 1, dict(follow[target]), link[target], self.count[target])
                while state != -1 and follow[state].get(token) == target:
                    follow[state][token] = short
                    state = link[state]
                link[target] = short
                target = short
            link[new] = target
        self._whole = new
        # The tail moves by one token, and all its suffixes occurred once more. (If its state was just split, both halves lead on alike.)
        tail, self._tail_length = self._shortened(follow[self._tail][token], self._tail_length + 1, self.max_context + 1)
        self._tail = tail
        count, last_end, size = self.count, self.last_end, self.size
        while tail != ROOT:
            count[tail] += 1
            last_end[tail] = size
            tail = link[tail]


class SuffixDrafter:
    """``method="suffix"``: drafts trees of at most `max_nodes` nodes from the request's own prompt and output."""

    name = "suffix"
    needs_hidden = False

    def __init__(self, options: SuffixOptions, max_nodes: int) -> None:
        self.options = options
        self.max_nodes = max_nodes
        self._indexes: dict[int, SuffixIndex] = {}
        self._doubts = [0.0, *(DOUBT / length for length in range(1, options.max_tree_depth + 1))]

    def add(self, seq: int, prompt: Sequence[int]) -> None:
        if seq in self._indexes:
            raise ValueError(f"sequence {seq} is in use: remove it before it is added again")
        index = SuffixIndex(self.options.max_tree_depth)
        index.extend(prompt)
        self._indexes[seq] = index

    def accept(self, seq: int, tokens: Sequence[int], hidden: torch.Tensor | None) -> None:
        self._indexes[seq].extend(tokens)

    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        return [self._draft(self._indexes[seq], min(budget, self.max_nodes)) for seq, budget in zip(seqs, budgets, strict=True)]

    def remove(self, seq: int) -> None:
        self._indexes.pop(seq, None)

    def _draft(self, index: SuffixIndex, budget: int) -> DraftTree:
        options = self.options
        state, length = self._followed(index, *index.tail())
        max_depth = int(options.max_spec_factor * length + options.max_spec_offset)
        if state == ROOT or budget <= 0 or max_depth <= 0:
            return EMPTY_TREE
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        # Heap entries: (-path probability, serial number, token, parent, state, length, depth); the serial number breaks ties.
        heap: list[tuple[float, int, int, int, int, int, int]] = []
        serial, node, depth, path = 0, -1, 0, 1.0
        while True:
            if depth < max_depth and len(tokens) < budget:
                ranked = self._continuations(index, state, length, path)
                for prob, token, child, child_length in ranked if options.use_tree_spec else ranked[:1]:
                    heappush(heap, (-prob, serial, token, node, child, child_length, depth + 1))
                    serial += 1
            if not heap or len(tokens) >= budget:
                break
            negative, _, token, parent, state, length, depth = heappop(heap)
            path, node = -negative, len(tokens)
            tokens.append(token)
            parents.append(parent)
            probs.append(path)
        return DraftTree(tuple(tokens), tuple(parents), tuple(probs)) if tokens else EMPTY_TREE

    @staticmethod
    def _followed(index: SuffixIndex, state: int, length: int) -> tuple[int, int]:
        """The longest suffix of a place that was ever followed by a token."""
        while state != ROOT and not index.follow[state]:
            state = index.link[state]
            length = index.longest[state]
        return state, length

    def _continuations(self, index: SuffixIndex, state: int, length: int, path: float) -> list[tuple[float, int, int, int]]:
        """(path probability, token, state, length) of the continuations of a place that are probable enough to draft, best first.

        `path` is the path probability of the place itself.
        """
        levels: list[tuple[int, int]] = []
        state, length = self._followed(index, state, length)
        while state != ROOT and len(levels) < LEVELS and len(index.follow[state]) <= MAX_FOLLOWERS:
            levels.append((state, length))
            state = index.link[state]
            length = index.longest[state]
        estimate: dict[int, float] = {}
        for state, length in reversed(levels):
            doubt = self._doubts[length]
            scale = index.total(state) + doubt
            shorter, estimate = estimate, {token: doubt * prob / scale for token, prob in estimate.items()}
            for token, child in index.follow[state].items():
                estimate[token] = (index.count[child] + doubt * shorter.get(token, 0.0)) / scale
        likely = []
        for token, prob in estimate.items():
            if path * prob >= self.options.min_token_prob:
                state, length = next(level for level in levels if token in index.follow[level[0]])
                recency = index.last_end[index.follow[state][token]]
                likely.append((path * prob, recency, token, *index.step(state, length, token)))
        likely.sort(reverse=True)
        return [(prob, token, state, length) for prob, _, token, state, length in likely]
