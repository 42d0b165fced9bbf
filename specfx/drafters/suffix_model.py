"""How probable is each continuation of a text, judging by two suffix trees; and the draft tree that follows from it.

The *local* tree holds this request (prompt and output), the *global* one earlier outputs. A context is known to each by the longest
suffix of the text that it has seen followed, and by the next shorter one that was followed more often: four `SLOTS` that have something
to say. For a token, a slot says (length of the context, how often it was followed, in what share of that by the token), each in a few
buckets: a *cell*. The estimate is that of PAQ (Mahoney, 2005), whose mixing of contexts is the best that is known for predicting text:

1. Each cell knows how often its verdict came true, and adapts. It starts from ``(n + DOUBT * 0.03) / (total + DOUBT)``,
   ``DOUBT = 0.25 / length``: one observation after one token counts for little, after twenty for nearly everything.
2. The cells' log odds are added with weights that are learned by gradient descent on the coding cost; there is a set of weights for each
   pair of (local length, global length), since what the slots are worth depends on both.
3. A bias for the *streak*, the number of tokens that were just predicted right, adapts to how well the text is going.

Every accepted token teaches the model once (`_learn`), whether it was drafted or not, so the estimates describe the text and not the
drafting; `reliability` in `specfx bench replay` shows that of nodes estimated at p about p are accepted. Prompts don't teach: they are
another author's text, and taught it worse. One model serves all requests of a drafter.

A draft tree is grown best-first: take the continuation with the highest path probability, move both cursors over it, push what may follow.
Among equals, the one seen more recently comes first.
"""

from __future__ import annotations

import math

import numpy as np

from specfx.drafters._jit import jit
from specfx.drafters.suffix_tree import (
    COUNT,
    E_TARGET,
    E_TOKEN,
    LAST,
    LINK,
    LONGEST,
    MORE,
    NEXT,
    ROOT,
    TARGET,
    TOKEN,
    append,
    at,
    follow,
    followed,
    matched,
)

SLOTS = 4  # local longest, local next, global longest, global next
LENGTHS = 8
TOTALS = 6
SHARES = 7
CELLS = SLOTS * LENGTHS * TOTALS * SHARES
SETS = 25
STREAKS = 6

RATE = 0.03
"""Learning rate of the weights."""
SLOWEST = 255.0
"""A cell adapts as the mean of what it saw, but never slower than this many observations' mean."""
PRIOR = 8.0
"""Observations that a cell's start counts for."""
MAX_FOLLOWERS = 32
"""A context that more different tokens followed predicts none of them, and would be slow to scan: it and all shorter ones are left out."""
MIN_SHARE = 20
"""A token that followed a context less often than 1 in this many times is no candidate."""
MAX_LIKELY = 6
"""A context with more followers of at least that share offers none of them."""
MAX_CANDIDATES = SLOTS * MAX_LIKELY
MAX_NODES = 64

# The model: one float64 array.
PROB = 0  # of each cell
SEEN = PROB + CELLS  # observations of each cell
ODDS = SEEN + CELLS  # log odds of PROB
WEIGHTS = ODDS + CELLS  # SETS x (SLOTS + 1): one for each slot, and a bias
STREAK_BIAS = WEIGHTS + SETS * (SLOTS + 1)
MODEL = STREAK_BIAS + STREAKS

# A request: one int32 array.
TAIL = 0  # cursor: end of the text in the local tree
OUTPUT = 2  # cursor: end of the output in the global tree; the output's first token comes after the root
MATCH = 4  # cursor: longest suffix of the text that the global tree knows
STREAK = 6
POSITION = 7  # tokens of the text
SERIAL = 8  # of the output in the global tree; -1: it isn't recorded
STAGE = 9  # how far `accept` is with the token at hand
ENDS = 10  # from here: the tokens that end the text

# Scratch of one call: an int32 array ...
CANDIDATES = 0
CANDIDATE_CELLS = CANDIDATES + MAX_CANDIDATES  # MAX_CANDIDATES x SLOTS; -1: the slot has nothing to say
CANDIDATE_LAST = CANDIDATE_CELLS + MAX_CANDIDATES * SLOTS
VIEWS = CANDIDATE_LAST + MAX_CANDIDATES  # SLOTS x 3: state, length, total; total 0: none
FRONTIER = VIEWS + SLOTS * 3  # MAX_NODES x 8: token, parent, depth, last, local place, global place
FRONTIER_ROW = 8
NODES = FRONTIER + MAX_NODES * FRONTIER_ROW  # tokens, then parents, of the draft
SCRATCH = NODES + 2 * MAX_NODES
# ... and a float64 array.
NODE_PROB = MAX_NODES  # after the path probabilities of the frontier
SCRATCH_PROB = 2 * MAX_NODES


# Buckets.


@jit
def length_bucket(length: int) -> int:
    """0 for none, then 1, 2, 3-4, 5-8, 9-16, 17-32, more."""
    if length <= 2:
        return length
    if length <= 4:
        return 3
    if length <= 8:
        return 4
    if length <= 16:
        return 5
    return 6 if length <= 32 else 7


@jit
def total_bucket(total: int) -> int:
    """1, 2, 3-4, 5-8, 9-32, more."""
    if total <= 2:
        return total - 1
    if total <= 4:
        return 2
    if total <= 8:
        return 3
    return 4 if total <= 32 else 5


@jit
def share_bucket(count: int, total: int) -> int:
    """Of the followers: none, up to a tenth, a quarter, below a half, below four fifths, below all, all."""
    if count == 0:
        return 0
    if count == total:
        return 6
    if count * 10 <= total:
        return 1
    if count * 4 <= total:
        return 2
    if count * 2 < total:
        return 3
    return 4 if count * 5 < total * 4 else 5


@jit
def streak_bucket(streak: int) -> int:
    """0, 1, 2, 3-4, 5-8, more."""
    if streak <= 2:
        return streak
    if streak <= 4:
        return 3
    return 4 if streak <= 8 else 5


@jit
def cell_of(slot: int, length: int, total: int, count: int) -> int:
    return ((slot * LENGTHS + length_bucket(length)) * TOTALS + total_bucket(total)) * SHARES + share_bucket(count, total)


def new_model() -> np.ndarray:
    """The model before it has learned anything: float64 ``[MODEL]``."""
    lengths = (0.5, 1.0, 2.0, 3.5, 6.0, 12.0, 24.0, 48.0)
    totals = (1.0, 2.0, 3.5, 6.0, 16.0, 64.0)
    shares = (0.02, 0.07, 0.18, 0.4, 0.65, 0.88, 0.97)
    length, total, share = np.meshgrid(lengths, totals, shares, indexing="ij")
    doubt = 0.25 / length
    probs = np.clip((share * total + 0.03 * doubt) / (total + doubt), 0.01, 0.99).ravel()
    model = np.zeros(MODEL)
    model[PROB:SEEN] = np.tile(probs, SLOTS)
    model[SEEN:ODDS] = PRIOR
    model[ODDS:WEIGHTS] = np.log(model[PROB:SEEN] / (1 - model[PROB:SEEN]))
    model[WEIGHTS:STREAK_BIAS] = np.tile([0.3, 0.3, 0.3, 0.3, 0.0], SETS)
    return model


# The estimate.


@jit
def total_followed(a, state: int) -> int:
    """How often the contexts of `state` were followed; -1 if by more than `MAX_FOLLOWERS` tokens."""
    s = at(state)
    if a[s + TOKEN] < 0:
        return 0
    total = a[at(a[s + TARGET]) + COUNT]
    edge = a[s + MORE]
    left = MAX_FOLLOWERS - 1
    while edge >= 0:
        if left == 0:
            return -1
        left -= 1
        total += a[at(a[edge + E_TARGET]) + COUNT]
        edge = a[edge + NEXT]
    return total


@jit
def _look(a, state: int, length: int, slot: int, ints) -> None:
    """Fill the two slots of one tree with what it knows of a place."""
    ints[VIEWS + slot * 3 + 2] = 0
    ints[VIEWS + slot * 3 + 5] = 0
    state, length = followed(a, state, length)
    before = 0
    end = slot + 2
    while state != ROOT and slot < end:
        total = total_followed(a, state)
        if total < 0:
            return
        if total != before:  # else it is the same occurrences again
            v = VIEWS + slot * 3
            ints[v] = state
            ints[v + 1] = length
            ints[v + 2] = total
            before = total
            slot += 1
        state = a[at(state) + LINK]
        length = a[at(state) + LONGEST]


@jit
def _followers(a, slot: int, token: int, ints) -> int:
    """The state that a slot's context and `token` lead to, or -1."""
    v = VIEWS + slot * 3
    return follow(a, ints[v], token) if ints[v + 2] > 0 else -1


@jit
def _cell(slot: int, count: int, ints) -> int:
    """What a slot says of a token that followed its context `count` times; -1 if it has nothing to say."""
    v = VIEWS + slot * 3
    return cell_of(slot, ints[v + 1], ints[v + 2], count) if ints[v + 2] > 0 else -1


@jit
def _candidate(local, world, token: int, n: int, ints) -> int:
    """Add `token` to the `n` candidates, if it is new, with what each slot says of it. Returns how many there are."""
    for i in range(n):
        if ints[CANDIDATES + i] == token:
            return n
    ints[CANDIDATES + n] = token
    cells = CANDIDATE_CELLS + n * SLOTS
    last = -1
    for slot in range(2):
        target = _followers(local, slot, token, ints)
        ints[cells + slot] = _cell(slot, local[at(target) + COUNT] if target >= 0 else 0, ints)
        if target >= 0 and last < 0:
            last = local[at(target) + LAST]
    for slot in range(2, SLOTS):
        target = _followers(world, slot, token, ints)
        ints[cells + slot] = _cell(slot, world[at(target) + COUNT] if target >= 0 else 0, ints)
    ints[CANDIDATE_LAST + n] = last
    return n + 1


@jit
def _likely(a, state: int, total: int) -> int:
    """Followers that have at least a share of 1 in `MIN_SHARE`."""
    s = at(state)
    n = 1 if a[at(a[s + TARGET]) + COUNT] * MIN_SHARE >= total else 0
    edge = a[s + MORE]
    while edge >= 0:
        if a[at(a[edge + E_TARGET]) + COUNT] * MIN_SHARE >= total:
            n += 1
        edge = a[edge + NEXT]
    return n


@jit
def _gather(a, slot: int, local, world, n: int, ints) -> int:
    """Make what is likely to follow the context of a slot of the tree `a` candidates, unless it is just about anything."""
    v = VIEWS + slot * 3
    total = ints[v + 2]
    if total == 0 or _likely(a, ints[v], total) > MAX_LIKELY:
        return n
    s = at(ints[v])
    if a[at(a[s + TARGET]) + COUNT] * MIN_SHARE >= total:
        n = _candidate(local, world, a[s + TOKEN], n, ints)
    edge = a[s + MORE]
    while edge >= 0:
        if a[at(a[edge + E_TARGET]) + COUNT] * MIN_SHARE >= total:
            n = _candidate(local, world, a[edge + E_TOKEN], n, ints)
        edge = a[edge + NEXT]
    return n


@jit
def candidates(local, world, local_state: int, local_length: int, world_state: int, world_length: int, ints) -> int:
    """Everything that may follow a pair of places, into `ints`. Returns how many candidates."""
    _look(local, local_state, local_length, 0, ints)
    _look(world, world_state, world_length, 2, ints)
    n = _gather(local, 0, local, world, 0, ints)
    n = _gather(local, 1, local, world, n, ints)
    n = _gather(world, 2, local, world, n, ints)
    return _gather(world, 3, local, world, n, ints)


@jit
def weight_set(ints) -> int:
    """Where the weights begin that go with the lengths of the contexts."""
    local = length_bucket(ints[VIEWS + 1]) if ints[VIEWS + 2] > 0 else 0
    world = length_bucket(ints[VIEWS + 7]) if ints[VIEWS + 8] > 0 else 0
    return WEIGHTS + (min(local, 4) * 5 + min(world, 4)) * (SLOTS + 1)


@jit
def estimate(model, i: int, weights: int, streak: int, ints) -> float:
    """Probability that candidate `i` comes next."""
    odds = model[weights + SLOTS] + model[STREAK_BIAS + streak_bucket(streak)]
    for slot in range(SLOTS):
        cell = ints[CANDIDATE_CELLS + i * SLOTS + slot]
        if cell >= 0:
            odds += model[weights + slot] * model[ODDS + cell]
    return 1.0 / (1.0 + math.exp(-min(max(odds, -12.0), 12.0)))


@jit
def _learn(local, world, request, token: int, model, ints) -> None:
    """Teach the model that `token` came next."""
    n = candidates(local, world, request[TAIL], request[TAIL + 1], request[MATCH], request[MATCH + 1], ints)
    if n == 0:
        request[STREAK] = 0
        return
    weights = weight_set(ints)
    streak = request[STREAK]
    bias = STREAK_BIAS + streak_bucket(streak)
    best, guess = 0.0, -1
    for i in range(n):
        p = estimate(model, i, weights, streak, ints)
        if p > best:
            best, guess = p, ints[CANDIDATES + i]
        error = ((1.0 if ints[CANDIDATES + i] == token else 0.0) - p) * RATE
        for slot in range(SLOTS):
            cell = ints[CANDIDATE_CELLS + i * SLOTS + slot]
            if cell >= 0:
                model[weights + slot] += error * model[ODDS + cell]
        model[weights + SLOTS] += error
        model[bias] += error
    for i in range(n):
        truth = 1.0 if ints[CANDIDATES + i] == token else 0.0
        for slot in range(SLOTS):
            cell = ints[CANDIDATE_CELLS + i * SLOTS + slot]
            if cell >= 0:
                seen = min(model[SEEN + cell] + 1.0, SLOWEST)
                p = model[PROB + cell]
                p += (truth - p) / (seen + 0.5)
                model[SEEN + cell] = seen
                model[PROB + cell] = p
                p = min(max(p, 0.001), 0.999)
                model[ODDS + cell] = math.log(p / (1.0 - p))
    request[STREAK] = streak + 1 if guess == token else 0


@jit
def _credit(world, request, token: int, ledger, ints) -> None:
    """Credit the output that the global tree last saw continue with `token`, where it knew the text better than the local one."""
    if ints[VIEWS + 8] == 0 or (ints[VIEWS + 2] > 0 and ints[VIEWS + 1] >= ints[VIEWS + 7]):
        return
    target = follow(world, ints[VIEWS + 6], token)
    if target >= 0:
        serial = world[at(target) + LAST]
        half = len(ledger) // 2
        place = serial & (half - 1)
        if ledger[place] == serial and serial != request[SERIAL]:
            ledger[half + place] += 1


# Stages of a token in `accept`.
NEW = 0
LEARNED = 1
IN_LOCAL = 2


@jit
def accept(local, world, request, tokens, start: int, n: int, model, ledger, ints) -> int:
    """``tokens[start:n]`` were committed: learn from them, and move the request over them.

    ledger: int32 ``[2 * 2^k]``, the serials of recorded outputs and then their credits, both at ``serial % 2^k``. Returns `n`, or the
    index of the token that a tree has no room for (`STAGE` tells which tree): call again from there when it has grown.
    """
    for i in range(start, n):
        token = tokens[i]
        if request[STAGE] == NEW:
            _learn(local, world, request, token, model, ints)
            _credit(world, request, token, ledger, ints)
            request[STAGE] = LEARNED
        if request[STAGE] == LEARNED:
            if not append(local, request, TAIL, token, request[POSITION] + 1):
                return i
            request[POSITION] += 1
            request[STAGE] = IN_LOCAL
        if request[SERIAL] >= 0 and not append(world, request, OUTPUT, token, request[SERIAL]):
            return i
        request[MATCH], request[MATCH + 1] = matched(world, request[MATCH], request[MATCH + 1], token)
        request[STAGE] = NEW
    return n


@jit
def match_all(world, request, tokens, start: int, n: int) -> None:
    """Move the match of a request over ``tokens[start:n]``."""
    for i in range(start, n):
        request[MATCH], request[MATCH + 1] = matched(world, request[MATCH], request[MATCH + 1], tokens[i])


# The draft.


@jit
def _better(prob: float, last: int, other_prob: float, other_last: int) -> bool:
    return prob > other_prob or (prob == other_prob and last > other_last)


@jit
def _ends(request, token: int) -> bool:
    for i in range(ENDS, len(request)):  # noqa: SIM110 (Numba knows no any())
        if request[i] == token:
            return True
    return False


@jit
def match_length(local, world, request) -> int:
    """Tokens of the longest suffix of the text that either tree has seen followed."""
    _, here = followed(local, request[TAIL], request[TAIL + 1])
    _, there = followed(world, request[MATCH], request[MATCH + 1])
    return max(here, there)


@jit
def propose(local, world, request, model, budget: int, max_depth: int, min_prob: float, tree: bool, ints, floats) -> int:
    """Draft at most `budget` nodes, no deeper than `max_depth`, none with a path probability below `min_prob`.

    Their tokens are left at ``ints[NODES:]``, their parents at ``ints[NODES + MAX_NODES:]``, their path probabilities at
    ``floats[NODE_PROB:]``, parents before children. Not `tree`: only the most probable continuation of each node. Returns how many.
    """
    n, size = 0, 0  # nodes drafted, and in the frontier
    node, depth, path = -1, 0, 1.0
    local_state, local_length = request[TAIL], request[TAIL + 1]
    world_state, world_length = request[MATCH], request[MATCH + 1]
    while True:
        if depth < max_depth and n < budget and not (node >= 0 and _ends(request, ints[NODES + node])):
            count = candidates(local, world, local_state, local_length, world_state, world_length, ints)
            weights = weight_set(ints)
            only = -1
            for i in range(count):
                prob = path * estimate(model, i, weights, request[STREAK] + depth, ints)
                if prob < min_prob:
                    continue
                last = ints[CANDIDATE_LAST + i]
                place = size
                if not tree and only >= 0:
                    place = only
                elif size >= budget - n:  # more than can be drafted: the worst gives way
                    place = 0
                    for j in range(1, size):
                        row, worst = FRONTIER + j * FRONTIER_ROW, FRONTIER + place * FRONTIER_ROW
                        if _better(floats[place], ints[worst + 3], floats[j], ints[row + 3]):
                            place = j
                if place < size and not _better(prob, last, floats[place], ints[FRONTIER + place * FRONTIER_ROW + 3]):
                    continue
                if place == size:
                    size += 1
                only = place
                row = FRONTIER + place * FRONTIER_ROW
                token = ints[CANDIDATES + i]
                floats[place] = prob
                ints[row] = token
                ints[row + 1] = node
                ints[row + 2] = depth + 1
                ints[row + 3] = last
                ints[row + 4], ints[row + 5] = matched(local, local_state, local_length, token)
                ints[row + 6], ints[row + 7] = matched(world, world_state, world_length, token)
        if size == 0 or n == budget:
            return n
        best = 0
        for j in range(1, size):
            if _better(floats[j], ints[FRONTIER + j * FRONTIER_ROW + 3], floats[best], ints[FRONTIER + best * FRONTIER_ROW + 3]):
                best = j
        row = FRONTIER + best * FRONTIER_ROW
        node, depth, path = n, ints[row + 2], floats[best]
        local_state, local_length, world_state, world_length = ints[row + 4], ints[row + 5], ints[row + 6], ints[row + 7]
        ints[NODES + n] = ints[row]
        ints[NODES + MAX_NODES + n] = ints[row + 1]
        floats[NODE_PROB + n] = path
        n += 1
        size -= 1
        if best < size:  # the last one takes its place
            floats[best] = floats[size]
            for k in range(FRONTIER_ROW):
                ints[row + k] = ints[FRONTIER + size * FRONTIER_ROW + k]
