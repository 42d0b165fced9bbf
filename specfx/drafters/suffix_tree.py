"""A suffix tree over token streams with exact counts: grown token by token, shrunk stream by stream.

It is the depth-capped *suffix automaton* (Blumer et al., 1985; its link tree is the suffix tree of the reversed streams) of any number of
streams. A *context* is a run of up to ``depth + 1`` tokens that occurs in a stream. A *state* stands for all contexts that end at the same
positions. Its followers are the tokens that came after those contexts, each with the state of the context that it completes; its *link*
is the state of the longest context that ends in more places. So the counts of everything that ever followed a context are one hop away,
and the next shorter context that says something different is one link away.

A *place* is (state, length): the context of `length` tokens that the state stands for. A *cursor* is a place that is kept from call to
call: the end of a growing stream (its tail), or the longest known context of a text that is being matched. Moving either by one token is
O(1) amortised; nothing is ever looked up from the root. Counts are kept for every context at once, so a token also adds one to each state
on its link path: two to five on ordinary text, never more than ``depth + 1``, whatever the length of the stream.

`remove_stream` takes a stream out again, token by token from its end, which undoes `append` exactly: contexts that no longer occur lose
their state, and two states whose contexts now end at the same positions become one. What is left is the automaton of the other streams as
if the stream had never been there (except `LAST`, the most recent stamp, which isn't rewound).

Everything lives in one int32 array, the *arena*::

    header | states, STATE ints each | edges, EDGE ints each | hash table of edges

A state holds its first follower itself; the further ones are edges, chained from the state and found by (state, token) in the hash table.
The functions are compiled by Numba where it is installed (see `_jit`); without it the same code runs as Python, on a memoryview.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np

from specfx.drafters._jit import jit, view

# Header.
DEPTH = 0  # longest context whose followers are kept
LIVE_STATES = 1
TOP_STATE = 2  # states ever handed out
FREE_STATE = 3  # head of the list of states to hand out again, chained through LINK; -1: none
CAP_STATES = 4
LIVE_EDGES = 5
TOP_EDGE = 6
FREE_EDGE = 7
CAP_EDGES = 8
EDGES = 9  # where the edges begin
SLOTS = 10  # where the hash table begins
MASK = 11  # its size - 1
LIMBO = 12  # head of the list of states that ended in `remove_stream`, chained through TARGET; -1: none
HEADER = 16

# A state.
LINK = 0
LONGEST = 1
COUNT = 2  # occurrences of its contexts; 0: the state has ended
LAST = 3  # stamp of the most recent occurrence
TOKEN = 4  # first follower; -1: none
TARGET = 5
MORE = 6  # first edge of the other followers; -1: none
CHILDREN = 7  # states that link here; MERGED: it ended by becoming part of `KIN`
KIN = 8  # xor of those states: the child, if it is the only one
STATE = 9

# An edge.
OWNER = 0
E_TOKEN = 1
E_TARGET = 2
NEXT = 3
EDGE = 4

ROOT = 0
MERGED = -1


@jit
def at(state: int) -> int:
    """Where a state begins in the arena."""
    return HEADER + state * STATE


# Followers.


@jit
def _slot(a, state: int, token: int) -> int:
    h = (state * 0x9E3779B1) ^ (token * 0x85EBCA77)
    return (h ^ (h >> 17) ^ (h >> 31)) & a[MASK]


@jit
def _lookup(a, state: int, token: int) -> int:
    """The offset of an edge, or -1."""
    mask, slots = a[MASK], a[SLOTS]
    h = _slot(a, state, token)
    while True:
        edge = a[slots + h]
        if edge < 0 or (a[edge + OWNER] == state and a[edge + E_TOKEN] == token):
            return edge
        h = (h + 1) & mask


@jit
def follow(a, state: int, token: int) -> int:
    """The state of the context with `token` appended, or -1."""
    s = at(state)
    if a[s + TOKEN] == token:
        return a[s + TARGET]
    if a[s + MORE] < 0:
        return -1
    edge = _lookup(a, state, token)
    return a[edge + E_TARGET] if edge >= 0 else -1


@jit
def _hash(a, edge: int) -> None:
    mask, slots = a[MASK], a[SLOTS]
    h = _slot(a, a[edge + OWNER], a[edge + E_TOKEN])
    while a[slots + h] >= 0:
        h = (h + 1) & mask
    a[slots + h] = edge


@jit
def _unhash(a, edge: int) -> None:
    """Take an edge out of the hash table and close the gap (Knuth's algorithm R: no tombstones)."""
    mask, slots = a[MASK], a[SLOTS]
    gap = _slot(a, a[edge + OWNER], a[edge + E_TOKEN])
    while a[slots + gap] != edge:
        gap = (gap + 1) & mask
    h = gap
    while True:
        h = (h + 1) & mask
        other = a[slots + h]
        if other < 0:
            break
        home = _slot(a, a[other + OWNER], a[other + E_TOKEN])
        if ((h - home) & mask) >= ((h - gap) & mask):
            a[slots + gap] = other
            gap = h
    a[slots + gap] = -1


@jit
def _add_follower(a, state: int, token: int, target: int) -> None:
    s = at(state)
    if a[s + TOKEN] < 0:
        a[s + TOKEN] = token
        a[s + TARGET] = target
        return
    edge = a[FREE_EDGE]
    if edge >= 0:
        a[FREE_EDGE] = a[edge + NEXT]
    else:
        edge = a[EDGES] + a[TOP_EDGE] * EDGE
        a[TOP_EDGE] += 1
    a[LIVE_EDGES] += 1
    a[edge + OWNER] = state
    a[edge + E_TOKEN] = token
    a[edge + E_TARGET] = target
    a[edge + NEXT] = a[s + MORE]
    a[s + MORE] = edge
    _hash(a, edge)


@jit
def _redirect(a, state: int, token: int, target: int) -> None:
    s = at(state)
    if a[s + TOKEN] == token:
        a[s + TARGET] = target
    else:
        a[_lookup(a, state, token) + E_TARGET] = target


@jit
def _free_edge(a, edge: int) -> None:
    _unhash(a, edge)
    a[edge + NEXT] = a[FREE_EDGE]
    a[FREE_EDGE] = edge
    a[LIVE_EDGES] -= 1


@jit
def _remove_follower(a, state: int, token: int) -> None:
    s = at(state)
    if a[s + TOKEN] == token:
        edge = a[s + MORE]
        if edge < 0:
            a[s + TOKEN] = -1
            return
        a[s + TOKEN] = a[edge + E_TOKEN]
        a[s + TARGET] = a[edge + E_TARGET]
        a[s + MORE] = a[edge + NEXT]
    else:
        edge = _lookup(a, state, token)
        link = s + MORE
        while a[link] != edge:
            link = a[link] + NEXT
        a[link] = a[edge + NEXT]
    _free_edge(a, edge)


@jit
def _drop_followers(a, state: int) -> None:
    s = at(state)
    edge = a[s + MORE]
    while edge >= 0:
        following = a[edge + NEXT]
        _free_edge(a, edge)
        edge = following
    a[s + TOKEN] = -1
    a[s + MORE] = -1


@jit
def _copy_followers(a, source: int, destination: int) -> None:
    s, d = at(source), at(destination)
    a[d + TOKEN] = a[s + TOKEN]
    a[d + TARGET] = a[s + TARGET]
    edge = a[s + MORE]
    while edge >= 0:
        _add_follower(a, destination, a[edge + E_TOKEN], a[edge + E_TARGET])
        edge = a[edge + NEXT]


@jit
def _move_followers(a, source: int, destination: int) -> None:
    """Hand the followers of `source` to `destination`, which must have none. Needs no room."""
    s, d = at(source), at(destination)
    a[d + TOKEN] = a[s + TOKEN]
    a[d + TARGET] = a[s + TARGET]
    edge = a[s + MORE]
    a[s + TOKEN] = -1
    a[s + MORE] = -1
    while edge >= 0:
        following = a[edge + NEXT]
        _unhash(a, edge)
        a[edge + OWNER] = destination
        a[edge + NEXT] = a[d + MORE]
        a[d + MORE] = edge
        _hash(a, edge)
        edge = following


@jit
def _extra_followers(a, state: int) -> int:
    n = 0
    edge = a[at(state) + MORE]
    while edge >= 0:
        n += 1
        edge = a[edge + NEXT]
    return n


# States and places.


@jit
def _new_state(a, longest: int) -> int:
    state = a[FREE_STATE]
    if state >= 0:
        a[FREE_STATE] = a[at(state) + LINK]
    else:
        state = a[TOP_STATE]
        a[TOP_STATE] += 1
    a[LIVE_STATES] += 1
    s = at(state)
    a[s + LINK] = ROOT
    a[s + LONGEST] = longest
    a[s + COUNT] = 0
    a[s + LAST] = 0
    a[s + TOKEN] = -1
    a[s + TARGET] = -1
    a[s + MORE] = -1
    a[s + CHILDREN] = 0
    a[s + KIN] = 0
    return state


@jit
def shortened(a, state: int, length: int, limit: int) -> tuple[int, int]:
    """The place of the last `limit` tokens of a place. (Also mends one whose state was split since it was kept.)"""
    length = min(length, limit)
    while state != ROOT:
        link = a[at(state) + LINK]
        if length > a[at(link) + LONGEST]:
            break
        state = link
    return state, length


@jit
def matched(a, state: int, length: int, token: int) -> tuple[int, int]:
    """The place of the longest known suffix of a place's context with `token` appended."""
    state, length = shortened(a, state, length, a[DEPTH])
    while state >= 0:
        target = follow(a, state, token)
        if target >= 0:
            return target, length + 1
        state = a[at(state) + LINK]
        if state >= 0:
            length = a[at(state) + LONGEST]
    return ROOT, 0


@jit
def followed(a, state: int, length: int) -> tuple[int, int]:
    """The longest suffix of a place, of at most `DEPTH` tokens, that was ever followed by a token; (ROOT, 0) if there is none."""
    state, length = shortened(a, state, length, a[DEPTH])
    while state != ROOT and a[at(state) + TOKEN] < 0:
        state = a[at(state) + LINK]
        length = a[at(state) + LONGEST]
    return state, length


# Growth.


@jit
def _split(a, source: int, token: int, target: int, longest: int) -> int:
    """Give the contexts of `target` of up to `longest` tokens a state of their own; `source` is the longest that leads to them."""
    short = _new_state(a, longest)
    s, t = at(short), at(target)
    link = a[t + LINK]
    a[s + LINK] = link
    a[s + COUNT] = a[t + COUNT]
    a[s + CHILDREN] = 1
    a[s + KIN] = target
    a[t + LINK] = short
    a[at(link) + KIN] ^= target ^ short
    if longest == a[DEPTH]:  # what is left of `target` is too long a context to have followers
        _move_followers(a, target, short)
    else:
        _copy_followers(a, target, short)
    while source >= 0 and follow(a, source, token) == target:
        _redirect(a, source, token, short)
        source = a[at(source) + LINK]
    return short


@jit
def append(a, cursors, at_: int, token: int, stamp: int) -> bool:
    """Append `token` to the stream whose tail is the cursor ``cursors[at_ : at_ + 2]``, which is moved. False, with nothing done, if the
    arena is too small."""
    state, length = shortened(a, cursors[at_], cursors[at_ + 1], a[DEPTH])
    new = 0  # contexts that `token` never followed
    source, target = state, -1
    while source >= 0:
        target = follow(a, source, token)
        if target >= 0:
            break
        new += 1
        source = a[at(source) + LINK]
    split = False
    longest = 0
    edges = new
    if target >= 0:
        longest = (length if source == state else a[at(source) + LONGEST]) + 1
        split = a[at(target) + LONGEST] > longest
        if split:
            edges += _extra_followers(a, target) + 1
    if a[LIVE_STATES] + 2 > a[CAP_STATES] or a[LIVE_EDGES] + edges > a[CAP_EDGES]:
        return False
    tail = ROOT
    if new > 0:
        tail = _new_state(a, length + 1)
        for _ in range(new):
            _add_follower(a, state, token, tail)
            state = a[at(state) + LINK]
    if split:
        target = _split(a, source, token, target, longest)
    if new == 0:
        tail = target
    else:
        link = max(target, ROOT)
        a[at(tail) + LINK] = link
        a[at(link) + CHILDREN] += 1
        a[at(link) + KIN] ^= tail
    cursors[at_] = tail
    cursors[at_ + 1] = length + 1
    while tail != ROOT:
        s = at(tail)
        a[s + COUNT] += 1
        a[s + LAST] = stamp
        tail = a[s + LINK]
    return True


@jit
def append_all(a, cursor, tokens, start: int, end: int, stamp: int, step: int) -> int:
    """Append ``tokens[start:end]``, with stamps that grow by `step`. Returns where it stopped: `end`, or where the arena was full."""
    for i in range(start, end):
        if not append(a, cursor, 0, tokens[i], stamp + (i - start) * step):
            return i
    return end


# Removal.


@jit
def _end(a, state: int, merged: bool) -> None:
    """The state ends; it stays readable in limbo until `sweep`, so that cursors can be moved on."""
    s = at(state)
    _drop_followers(a, state)
    a[s + COUNT] = 0
    if merged:
        a[s + CHILDREN] = MERGED
    a[s + TARGET] = a[LIMBO]
    a[LIMBO] = state


@jit
def remove_stream(a, tokens, n: int, path) -> None:
    """Take the stream ``tokens[:n]`` out of the tree. path: int32 ``[n]``, scratch. Then `resolve` every cursor, and `sweep`."""
    depth = a[DEPTH]
    state, length = ROOT, 0
    for i in range(n):
        state, length = shortened(a, state, length, depth)
        state = follow(a, state, tokens[i])
        length += 1
        path[i] = state
    for i in range(n - 1, -1, -1):
        token = tokens[i]
        state = path[i]
        while state != ROOT:
            a[at(state) + COUNT] -= 1
            state = a[at(state) + LINK]
        source = ROOT
        if i > 0:
            source, _ = shortened(a, path[i - 1], min(i, depth), depth)
        state = path[i]
        while state != ROOT and a[at(state) + COUNT] == 0:
            link = a[at(state) + LINK]
            while source >= 0 and follow(a, source, token) == state:
                _remove_follower(a, source, token)
                source = a[at(source) + LINK]
            a[at(link) + CHILDREN] -= 1
            a[at(link) + KIN] ^= state
            _end(a, state, False)
            state = link
        if state == ROOT or a[at(state) + CHILDREN] != 1:
            continue
        child = a[at(state) + KIN]
        if a[at(child) + COUNT] != a[at(state) + COUNT]:
            continue
        # The contexts of `state` now end where those of its only child do: they are one state again.
        link = a[at(state) + LINK]
        while source >= 0 and follow(a, source, token) == state:
            _redirect(a, source, token, child)
            source = a[at(source) + LINK]
        a[at(child) + LINK] = link
        a[at(link) + KIN] ^= state ^ child
        if a[at(state) + LONGEST] == depth:  # the child was too long a context to have followers; else both have the same
            _move_followers(a, state, child)
        _end(a, state, True)


@jit
def resolve(a, cursor) -> None:
    """Move a cursor (int32 ``[2]``) off states that have ended, to the longest suffix that still occurs."""
    state, length = cursor[0], cursor[1]
    while state != ROOT and a[at(state) + COUNT] == 0:
        if a[at(state) + CHILDREN] == MERGED:
            state = a[at(state) + KIN]
        else:
            state = a[at(state) + LINK]
            length = min(length, a[at(state) + LONGEST])
    cursor[0] = state
    cursor[1] = length


@jit
def sweep(a) -> None:
    """Hand the ended states back."""
    state = a[LIMBO]
    while state >= 0:
        s = at(state)
        following = a[s + TARGET]
        a[s + LINK] = a[FREE_STATE]
        a[FREE_STATE] = state
        a[LIVE_STATES] -= 1
        state = following
    a[LIMBO] = -1


def _new_arena(states: int, edges: int) -> np.ndarray:
    """An empty arena with room for so many states and edges."""
    slots = 1 << (edges * 3 // 2).bit_length()
    first_edge = HEADER + states * STATE
    first_slot = first_edge + edges * EDGE
    # Zeros of its own mapping: memory that is not written yet costs nothing, and all of it goes back when the arena goes.
    arena = np.frombuffer(mmap.mmap(-1, 4 * (first_slot + slots)), dtype=np.int32)
    arena[[CAP_STATES, CAP_EDGES, EDGES, SLOTS, MASK]] = states, edges, first_edge, first_slot, slots - 1
    arena[first_slot:] = -1
    return arena


@jit
def _rehash(a) -> None:
    """Fill an empty hash table with all edges in use."""
    for state in range(a[TOP_STATE]):
        edge = a[at(state) + MORE]
        while edge >= 0:
            _hash(a, edge)
            edge = a[edge + NEXT]


class SuffixTree:
    """An arena that grows as its streams do. view: the arena as the functions above take it.

    depth: tokens of the longest context whose followers are kept, at least 1. tokens: how many to make room for at first.
    """

    def __init__(self, depth: int, tokens: int = 64) -> None:
        arena = _new_arena(2 * tokens + 16, tokens + 64)
        arena[DEPTH] = depth
        arena[[FREE_STATE, FREE_EDGE, LIMBO]] = -1
        _new_state(view(arena), 0)
        arena[at(ROOT) + LINK] = -1
        self.view: Any = view(arena)

    @property
    def arena(self) -> np.ndarray:
        """The arena as an array, int32."""
        return np.asarray(self.view)

    def grow(self) -> None:
        """Make room for half as much again, which is always room for a token more: what a split copies are followers that the root
        has, too, so they are at most half of all edges."""
        old = self.arena
        states, edges, depth = int(old[TOP_STATE]), int(old[TOP_EDGE]), int(old[DEPTH])
        new = _new_arena(states * 3 // 2 + 64, edges * 3 // 2 + 64 + depth)
        moved = int(new[EDGES] - old[EDGES])
        for field in (DEPTH, LIVE_STATES, TOP_STATE, FREE_STATE, LIVE_EDGES, TOP_EDGE, FREE_EDGE, LIMBO):
            new[field] = old[field]
        if new[FREE_EDGE] >= 0:
            new[FREE_EDGE] += moved
        rows = new[HEADER : HEADER + states * STATE].reshape(-1, STATE)
        rows[:] = old[HEADER : HEADER + states * STATE].reshape(-1, STATE)
        rows[rows[:, MORE] >= 0, MORE] += moved
        rows = new[new[EDGES] : new[EDGES] + edges * EDGE].reshape(-1, EDGE)
        rows[:] = old[old[EDGES] : old[EDGES] + edges * EDGE].reshape(-1, EDGE)
        rows[rows[:, NEXT] >= 0, NEXT] += moved
        viewed = view(new)
        _rehash(viewed)
        self.view = viewed  # at once: an interruption leaves the old one

    def extend(self, cursor: Any, tokens: np.ndarray, stamp: int = 0, step: int = 0) -> None:
        """Append `tokens` (int32 ``[n]``) to the stream whose tail is `cursor`; each is stamped with `step` more than the one before."""
        done, n, viewed = 0, len(tokens), view(tokens)
        while (stop := append_all(self.view, cursor, viewed, done, n, stamp + done * step, step)) < n:
            done = stop
            self.grow()

    def remove(self, tokens: np.ndarray, cursors: Iterable[Any]) -> None:
        """Take the stream `tokens` (int32 ``[n]``) out again. cursors: all that are kept; they are moved to what still occurs."""
        n = len(tokens)
        remove_stream(self.view, view(tokens), n, view(np.empty(n, dtype=np.int32)))
        for cursor in cursors:
            resolve(self.view, cursor)
        sweep(self.view)

    @property
    def states(self) -> int:
        """States in use."""
        return int(self.arena[LIVE_STATES])

    @property
    def top(self) -> int:
        """States that were ever in use at once: what memory is there for."""
        return int(self.arena[TOP_STATE])

    @property
    def nbytes(self) -> int:
        """Memory that the arena has written to."""
        header = self.arena[:HEADER]
        return 4 * int(HEADER + STATE * header[TOP_STATE] + EDGE * header[TOP_EDGE] + header[MASK] + 1)
