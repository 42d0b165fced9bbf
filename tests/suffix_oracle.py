"""What the suffix drafter has to do, worked out without an automaton: all that is kept is where every context ends, everything else is
looked up by scanning. Slow, and short enough to be believed.

1. `Contexts`: the suffix tree (counts, followers, matches), as one dict;
2. `Model`: the cells, weights and biases, and how they learn;
3. `Oracle`: requests, the cache of outputs with its eviction, and what a draft tree must look like;
4. `Twin`: a drafter and its oracle, which are told the same and compared after every call.

Two things aren't documented and therefore not the oracle's to decide: in which order the model learns from the candidates of one token
(the drafter's own order is taken over, once it is known to be the same candidates), and which of several continuations that are equally
probable *and* equally recent is drafted first (any of them is right).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from unittest import mock

import numpy as np
from streams import Stream

from specfx.drafters import suffix_model
from specfx.drafters.suffix import SuffixDrafter
from specfx.options import SuffixOptions
from specfx.runtime.tree import DraftTree

Context = tuple[int, ...]

TOLERANCE = 1e-12


# --- contexts ---------------------------------------------------------------------------------------------------------------------


class Contexts:
    """All contexts of up to ``depth + 1`` tokens of some streams: where each ends (stream, tokens up to there), and its latest stamp."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.streams: dict[int, Stream] = {}
        self.ends: defaultdict[Context, set[tuple[int, int]]] = defaultdict(set)
        self.last: dict[Context, int] = {}

    def append(self, stream: int, token: int, stamp: int = 0) -> None:
        text = self.streams.setdefault(stream, [])
        text.append(token)
        for length in range(1, min(len(text), self.depth + 1) + 1):
            context = tuple(text[-length:])
            self.ends[context].add((stream, len(text)))
            self.last[context] = stamp

    def extend(self, stream: int, text: Sequence[int], stamp: int = 0, step: int = 0) -> None:
        for i, token in enumerate(text):
            self.append(stream, token, stamp + i * step)

    def remove(self, stream: int) -> None:
        """The stream is gone. Stamps stay, but contexts that now end in the same places have one, that of the longest."""
        self.streams.pop(stream, None)
        for context in list(self.ends):
            self.ends[context] = {end for end in self.ends[context] if end[0] != stream}
            if not self.ends[context]:
                del self.ends[context], self.last[context]
        for context in sorted(self.ends, key=len, reverse=True):
            if context[1:] in self.ends and self.ends[context[1:]] == self.ends[context]:
                self.last[context[1:]] = self.last[context]

    def count(self, context: Context) -> int:
        return len(self.ends[context]) if context in self.ends else 0

    def followers(self, context: Context) -> Counter[int]:
        """How often each token came after `context`, which may be of up to `depth` tokens."""
        assert 0 < len(context) <= self.depth
        ends = self.ends.get(context, ())
        return Counter(self.streams[stream][end] for stream, end in ends if end < len(self.streams[stream]))

    def matched(self, context: Context, token: int) -> Context:
        """The longest known suffix of `context` and `token`."""
        context = (*context, token)[-self.depth - 1 :]
        return self.known(context)

    def known(self, context: Context) -> Context:
        """The longest suffix that occurs."""
        return next((context[i:] for i in range(len(context)) if context[i:] in self.ends), ())

    def followed(self, context: Context) -> Context:
        """The longest suffix of at most `depth` tokens that something came after."""
        context = context[-self.depth :]
        return next((context[i:] for i in range(len(context)) if self.followers(context[i:])), ())

    @property
    def classes(self) -> int:
        """Sets of places where contexts end, that of the empty context included: the least states that an automaton can have."""
        return len({frozenset(ends) for ends in self.ends.values()}) + 1


# --- the model --------------------------------------------------------------------------------------------------------------------

NODES = 63
"""The largest draft that there is."""


def bucket(bounds: Sequence[float], x: float) -> int:
    """How many of the `bounds` lie below `x`."""
    return bisect_left(bounds, x)


def length_bucket(length: int) -> int:
    return bucket((0, 1, 2, 4, 8, 16, 32), length)


def total_bucket(total: int) -> int:
    return bucket((1, 2, 4, 8, 32), total)


def share_bucket(count: int, total: int) -> int:
    share = Fraction(count, total)
    if share in (0, 1):
        return 6 * int(share)
    if share <= Fraction(1, 4):
        return 1 if share <= Fraction(1, 10) else 2
    if share < Fraction(1, 2):
        return 3
    return 4 if share < Fraction(4, 5) else 5


def streak_bucket(streak: int) -> int:
    return bucket((0, 1, 2, 4, 8), streak)


@dataclass(frozen=True)
class Slot:
    """A context that has something to say: what followed it."""

    context: Context
    followers: Counter[int]

    @property
    def total(self) -> int:
        return self.followers.total()


@dataclass(frozen=True)
class Views:
    """What both trees know of a text: up to two slots each, the longest context first."""

    local: list[Slot]
    world: list[Slot]
    stamps: dict[Context, int]
    """Most recent stamps of the local tree."""

    @classmethod
    def of(cls, local: Contexts, world: Contexts, here: Context, there: Context) -> Views:
        return cls(list(slots(local, here)), list(slots(world, there)), local.last)

    def candidates(self) -> set[int]:
        """Tokens that followed a slot's context in at least a twentieth of the cases, unless too many did."""
        likely = [
            {token for token, n in slot.followers.items() if n * suffix_model.MIN_SHARE >= slot.total}
            for slot in (*self.local, *self.world)
        ]
        return set().union(*(tokens for tokens in likely if len(tokens) <= suffix_model.MAX_LIKELY))

    def cells(self, token: int) -> list[tuple[int, tuple[int, int, int, int]]]:
        """What the slots say of a token: (slot, cell), of those that have anything to say."""
        numbered = [*enumerate(self.local), *enumerate(self.world, start=2)]
        return [
            (i, (i, length_bucket(len(s.context)), total_bucket(s.total), share_bucket(s.followers[token], s.total))) for i, s in numbered
        ]

    def last(self, token: int) -> int:
        """When the text's own longest context that knows `token` was last followed by it; -1 if none was."""
        return next((self.stamps[*slot.context, token] for slot in self.local if token in slot.followers), -1)

    @property
    def weights(self) -> int:
        """The set of weights for the lengths of the longest contexts."""
        here, there = (min(length_bucket(len(slots[0].context)), 4) if slots else 0 for slots in (self.local, self.world))
        return here * 5 + there


def slots(contexts: Contexts, context: Context) -> Iterator[Slot]:
    """The longest suffix that was followed, and the next shorter one that was followed more often."""
    before, found = 0, 0
    for i in range(len(context)):
        if len(context) - i > contexts.depth:
            continue
        slot = Slot(context[i:], contexts.followers(context[i:]))
        if len(slot.followers) > suffix_model.MAX_FOLLOWERS or found == 2:
            return
        if slot.total > before:
            yield slot
            before, found = slot.total, found + 1


class Model:
    """Probability, observations and log odds of every cell; weights of the slots; biases of the streaks."""

    def __init__(self, start: np.ndarray) -> None:
        shape = (suffix_model.SLOTS, suffix_model.LENGTHS, suffix_model.TOTALS, suffix_model.SHARES)
        cells, sets = math.prod(shape), suffix_model.SETS * (suffix_model.SLOTS + 1)
        prob, seen, odds, weights, streaks = np.split(start.copy(), np.cumsum([cells, cells, cells, sets]))
        self.prob, self.seen, self.odds = prob.reshape(shape), seen.reshape(shape), odds.reshape(shape)
        self.weights, self.streaks = weights.reshape(suffix_model.SETS, suffix_model.SLOTS + 1), streaks

    def array(self) -> np.ndarray:
        return np.concatenate([part.ravel() for part in (self.prob, self.seen, self.odds, self.weights, self.streaks)])

    def estimate(self, views: Views, token: int, streak: int) -> float:
        weights = self.weights[views.weights]
        odds = weights[-1] + self.streaks[streak_bucket(streak)]
        for i, cell in views.cells(token):
            odds += weights[i] * self.odds[cell]
        return float(1 / (1 + math.exp(-min(max(odds, -12), 12))))

    def learn(self, views: Views, order: Sequence[int], token: int, streak: int) -> int:
        """`token` came where the candidates were those of `order`. Returns the streak after it."""
        weights, guesses = self.weights[views.weights], {}
        for candidate in order:
            guesses[candidate] = self.estimate(views, candidate, streak)
            error = suffix_model.RATE * ((candidate == token) - guesses[candidate])
            for i, cell in views.cells(candidate):
                weights[i] += error * self.odds[cell]
            weights[-1] += error
            self.streaks[streak_bucket(streak)] += error
        for candidate in order:
            for _, cell in views.cells(candidate):
                self.seen[cell] = min(self.seen[cell] + 1, suffix_model.SLOWEST)
                self.prob[cell] += ((candidate == token) - self.prob[cell]) / (self.seen[cell] + 0.5)
                p = min(max(self.prob[cell], 0.001), 0.999)
                self.odds[cell] = math.log(p / (1 - p))
        return streak + 1 if guesses and max(guesses, key=lambda t: guesses[t]) == token else 0


# --- the drafter ------------------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """match: the longest suffix of the text that the cache knows, as far as it was followed. serial: of its output; None: not recorded."""

    local: Contexts
    ends: Sequence[int]
    match: Context = ()
    serial: int | None = None
    streak: int = 0

    @property
    def text(self) -> Stream:
        return self.local.streams.setdefault(0, [])

    @property
    def tail(self) -> Context:
        return tuple(self.text[-self.local.depth - 1 :])


@dataclass
class Node:
    """A continuation that may be drafted."""

    prob: float
    last: int
    token: int
    parent: int
    depth: int
    here: Context
    there: Context

    @property
    def rank(self) -> tuple[float, int]:
        return self.prob, self.last


@dataclass
class Oracle:
    """Requests, and the outputs that they share: a queue of serials, each with its tokens (in `world`) and its credit."""

    options: SuffixOptions
    requests: dict[int, Request] = field(default_factory=dict)
    queue: list[int] = field(default_factory=list)
    credits: dict[int, int] = field(default_factory=dict)
    evicted: int = 0

    def __post_init__(self) -> None:
        self.world = Contexts(self.options.max_tree_depth)
        self.model = Model(suffix_model.new_model())

    # The cache.

    @property
    def tokens(self) -> int:
        return sum(len(self.output(serial)) for serial in self.queue)

    def output(self, serial: int) -> Stream:
        return self.world.streams.get(serial, [])

    def evict_one(self) -> bool:
        running = {request.serial for request in self.requests.values()}
        if running >= set(self.queue):
            return False
        while True:
            first = self.queue.pop(0)
            if first not in running and self.credits[first] == 0:
                break
            self.queue.append(first)
            if first not in running:
                self.credits[first] //= 2
        self.world.remove(first)
        self.evicted += 1
        for request in self.requests.values():
            request.match = self.world.known(request.match)
        return True

    def make_room(self, n: int) -> bool:
        while self.tokens + n > self.options.max_cached_tokens:
            if not self.evict_one():
                return False
        return True

    def end(self, request: Request) -> None:
        """The request records no longer; an output without tokens isn't kept."""
        if request.serial is not None and not self.output(request.serial):
            self.queue.remove(request.serial)
        request.serial = None

    def rebuilt(self) -> None:
        """The tree was grown anew, in the order of the queue."""
        before, self.world = self.world, Contexts(self.options.max_tree_depth)
        for serial in self.queue:
            self.world.extend(serial, before.streams.get(serial, []), serial)
        for request in self.requests.values():
            request.match = () if request.serial is None else tuple(self.output(request.serial)[-self.world.depth - 1 :])

    def evict(self, max_tokens: int) -> None:
        while self.tokens > max_tokens and self.evict_one():
            pass

    # Requests.

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int]) -> None:
        request = self.requests[seq] = Request(Contexts(self.options.max_tree_depth), ends)
        request.local.extend(0, prompt, 1, 1)
        room = self.options.max_cached_tokens > 0
        while room and 0 <= self.options.max_cached_requests <= len(self.queue):
            room = self.evict_one()
        if room:
            request.serial = max(self.credits, default=-1) + 1
            self.queue.append(request.serial)
            self.credits[request.serial] = 0
        for token in prompt[-self.options.max_tree_depth :]:
            request.match = self.world.matched(request.match, token)

    def accept(self, seq: int, tokens: Sequence[int], orders: Iterator[list[int]]) -> None:
        """orders: the drafter's candidates after each token, in its order, with anything behind them."""
        request = self.requests[seq]
        if request.serial is not None and not self.make_room(len(tokens)):
            self.end(request)
        for token in tokens:
            views = Views.of(request.local, self.world, request.tail, request.match)
            candidates = views.candidates()
            order = next(orders)[: len(candidates)]
            assert set(order) == candidates
            request.streak = self.model.learn(views, order, token, request.streak)
            self.credit(request, views, token)
            request.local.append(0, token, len(request.text) + 1)
            if request.serial is not None:
                self.world.append(request.serial, token, request.serial)
            request.match = self.world.matched(request.match, token)

    def credit(self, request: Request, views: Views, token: int) -> None:
        """To the output that last went on with `token`, if the cache knew a longer context than the text itself."""
        if views.world and len(views.world[0].context) > max((len(slot.context) for slot in views.local), default=0):
            context = (*views.world[0].context, token)
            author = self.world.last.get(context)
            if author in self.queue and author != request.serial:
                self.credits[author] += 1

    def remove(self, seq: int, last: Sequence[int], orders: Iterator[list[int]]) -> None:
        if seq in self.requests:
            self.accept(seq, last, orders)
            self.end(self.requests.pop(seq))

    # Drafts.

    def match_length(self, request: Request) -> int:
        return max(len(request.local.followed(request.tail)), len(self.world.followed(request.match)))

    def children(self, request: Request, parent: Node | None, index: int, limit: int) -> list[Node]:
        """What may follow a node (None: the text) and is probable enough."""
        if parent is None:
            parent = Node(1.0, 0, -1, -1, 0, request.tail, request.match)
        elif parent.token in request.ends:
            return []
        if parent.depth >= limit:
            return []
        views = Views.of(request.local, self.world, parent.here, parent.there)
        nodes = []
        for token in views.candidates():
            prob = parent.prob * self.model.estimate(views, token, request.streak + parent.depth)
            if prob >= self.options.min_token_prob:
                here, there = request.local.matched(parent.here, token), self.world.matched(parent.there, token)
                nodes.append(Node(prob, views.last(token), token, index, parent.depth + 1, here, there))
        return nodes

    def verify(self, seq: int, tree: DraftTree, budget: int, max_nodes: int) -> None:
        """Assert that `tree` is the draft: at each step the best of all that may be drafted, by probability, then by recency."""
        options, request = self.options, self.requests[seq]
        DraftTree(tree.tokens, tree.parents, tree.probs)  # keeps the rules of trees
        limit = budget = min(budget, max_nodes)
        if options.max_spec_factor < math.inf:
            limit = min(budget, int(options.max_spec_factor * self.match_length(request) + options.max_spec_offset))
        frontier = self.children(request, None, -1, limit) if budget > 0 else []
        for i, (token, parent, prob) in enumerate(zip(tree.tokens, tree.parents, tree.probs, strict=True)):
            assert i < budget
            chosen = [node for node in frontier if (node.token, node.parent) == (token, parent)]
            assert chosen, f"node {i} of {tree} is no continuation that may be drafted: {frontier}"
            node, best = chosen[0], max(frontier, key=lambda node: node.rank)
            assert abs(node.prob - prob) < TOLERANCE
            assert node.prob > best.prob - TOLERANCE, f"node {i} of {tree} is drafted before {best}"
            assert node.prob != best.prob or node.last == best.last, f"node {i} of {tree} is drafted before the more recent {best}"
            frontier = [other for other in frontier if other is not node] if options.use_tree_spec else []
            frontier += self.children(request, node, i, limit)
        if len(tree) < budget:
            left = [node for node in frontier if node.prob > options.min_token_prob + TOLERANCE]
            assert not left, f"{tree} lacks {left}"


# --- both -------------------------------------------------------------------------------------------------------------------------


class Twin:
    """A drafter and its oracle. Every call goes to both, and leaves them with the same model, the same outputs in the same order, and the
    same credits."""

    def __init__(self, options: SuffixOptions, max_nodes: int = NODES) -> None:
        self.drafter = SuffixDrafter(options, max_nodes)
        self.oracle = Oracle(options)
        self.orders: list[list[int]] = []

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        self.drafter.add(seq, prompt, ends)
        self.oracle.add(seq, prompt, ends)
        self.compare()

    def accept(self, seq: int, tokens: Sequence[int]) -> None:
        with self._listening():
            self.drafter.accept(seq, tokens, None)
        self.oracle.accept(seq, tokens, iter(self.orders))
        self.compare()

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        with self._listening():
            self.drafter.remove(seq, last)
        self.oracle.remove(seq, last, iter(self.orders))
        self.compare()

    def evict(self, max_tokens: int) -> None:
        tree, before = self.drafter.cache.tree, self.oracle.evicted
        went = self.drafter.evict(max_tokens)
        self.oracle.evict(max_tokens)
        assert went == self.oracle.evicted - before
        if self.drafter.cache.tree is not tree:
            self.oracle.rebuilt()
        self.compare()

    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        """The drafts, each known to be right."""
        trees = self.drafter.propose(seqs, budgets)
        for seq, budget, tree in zip(seqs, budgets, trees, strict=True):
            self.oracle.verify(seq, tree, budget, self.drafter.max_nodes)
            assert self.drafter.match_length(seq) == self.oracle.match_length(self.oracle.requests[seq])
        self.compare()  # proposing changes nothing
        return trees

    def compare(self) -> None:
        drafter, cache, oracle = self.drafter, self.drafter.cache, self.oracle
        np.testing.assert_allclose(drafter._model, oracle.model.array(), rtol=0, atol=TOLERANCE)
        assert [cache.output(serial) for serial in cache.serials] == [oracle.output(serial) for serial in oracle.queue]
        assert [cache.credit(serial) for serial in cache.serials] == [oracle.credits[serial] for serial in oracle.queue]
        statistics = drafter.statistics()
        assert (statistics.requests, statistics.outputs, statistics.tokens, statistics.evicted) == (
            len(oracle.requests),
            len(oracle.queue),
            oracle.tokens,
            oracle.evicted,
        )

    def _listening(self) -> mock._patch:
        """Have the drafter learn token by token, and keep in `orders` which candidates it saw."""
        accept, self.orders = suffix_model.accept, []

        def one_by_one(local, world, request, tokens, start, n, model, ledger, ints):  # type: ignore[no-untyped-def]
            for i in range(start, n):
                fresh = request[suffix_model.STAGE] == suffix_model.NEW
                stopped = accept(local, world, request, tokens, i, i + 1, model, ledger, ints)
                if fresh:
                    first = suffix_model.CANDIDATES
                    self.orders.append([int(t) for t in ints[first : first + suffix_model.MAX_CANDIDATES]])
                if stopped == i:
                    return i
            return n

        return mock.patch.object(suffix_model, "accept", one_by_one)
