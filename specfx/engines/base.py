"""What an engine is: it holds the keys and values of sequences and runs the target over new rows of them.

The runtime needs five verbs and knows nothing else::

    engine.add(seq, capacity, source, shared)  # room for `capacity` tokens, or KVPoolError
    engine.extend(seq, capacity)  # more room, where not all could be had at once
    engine.inherit(seq)                        # its first tokens are those of `source`: they need no forward of their own
    out = engine.forward([Rows(seq, ...)])     # one target forward over all given rows of all given sequences
    engine.commit(seq, rows)                   # of the last forward, these rows of `seq` stay in its KV; the rest is rolled back
    engine.remove(seq)                         # all its memory is free again

Three engines exist: `compiled` and `graph` (the rewritten FX graph over a paged pool) and `eager` (the stock model with a cache of
its own). Which one serves a model is chosen once, with typed reasons, in `specfx.engines.choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specfx.kernels.keyed_sample import Draw, draw_tables
from specfx.runtime.tree import DraftTree


@dataclass(frozen=True)
class Rows:
    """New rows of one sequence for one forward.

    tokens: a causal run of token ids (a prompt, or just the pending token), at positions ``length .. length + n - 1`` where
    ``length`` is the number of tokens already committed to the engine for this sequence. tree: if given, `tokens` is exactly the
    one pending token and the tree's nodes are appended as further rows (row ``i + 1`` is node ``i``).
    last_only: compute logits only for the last row (a prefill). following: the token behind the last row where it is known (the rest
    of a prompt), for an engine that drafts. draw: how the token behind each row is drawn; None: it is the most probable one.
    drafts: whether an engine that drafts is asked for the next draft; of several sequences one that asks is enough. It drafts behind
    trees with branches unasked.
    """

    seq: int
    tokens: Sequence[int]
    tree: DraftTree | None = None
    last_only: bool = False
    following: int | None = None
    draw: Draw | None = None
    drafts: bool = True

    def __post_init__(self) -> None:
        if self.tree is not None and len(self.tokens) != 1:
            raise ValueError(f"a tree hangs on one pending token, got {len(self.tokens)} tokens")

    @property
    def count(self) -> int:
        return len(self.tokens) + (len(self.tree) if self.tree is not None else 0)

    @property
    def reads(self) -> int:
        """Rows whose logits are computed."""
        return 1 if self.last_only else self.count


def draws_of(batch: Sequence[Rows], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`keys` and `warp` of `specfx::keyed_sample`, on the host, for the rows of `batch` whose logits are read. lengths: tokens that each
    sequence has committed."""
    draws: list[Draw | None] = []
    positions: list[int] = []
    for rows, length in zip(batch, lengths, strict=True):
        draws += [rows.draw] * rows.reads
        depths: Sequence[int] = range(rows.count) if rows.draw is None or rows.tree is None else rows.tree.depths()
        positions += [length + depth + 1 for depth in depths[-rows.reads :]]
    return draw_tables(draws, positions)


@dataclass(frozen=True)
class RowsOutput:
    """What the target says of one sequence's rows.

    choice: ``[n]`` (``[1]`` if `last_only`) the token that the target chooses behind each row, as `Rows.draw` says, ints.
    logits: ``[n | 1, V]``, the model's dtype. hidden: ``[rows, H]``, the LM head's inputs, for *all* rows (also with `last_only`);
    None if the engine can't tell. Logits and hidden may be views that the next forward overwrites. draft: the next draft, from an
    engine that drafts; it hangs on the choice behind the last row of a walk along the choices, and is empty where none was asked for.
    """

    choice: list[int]
    logits: Tensor
    hidden: Tensor | None
    draft: DraftTree | None = None


class Engine(Protocol):
    name: str
    """"compiled", "graph", "eager", or "stock" where one of them is still to come."""
    verifies: str
    """What it can verify: "trees", "chains" or "nothing" (then the stock `generate` serves the call)."""

    drafts: bool
    """Whether a draft head is part of its graph; then each output brings the next draft."""

    max_rows: int
    """Most rows of a causal run that one forward should take, for its memory's sake."""

    def add(self, seq: int, capacity: int, source: int | None = None, shared: int = 0) -> None:
        """Reserve room for `capacity` tokens of a new sequence. Raises `KVPoolError` before anything is changed.

        source: another sequence, whose first `shared` tokens, present or to come, the new one begins with."""

    def extend(self, seq: int, capacity: int) -> None:
        """Reserve room for `capacity` tokens of `seq` in all. Raises `KVPoolError` before anything is changed."""

    def inherit(self, seq: int) -> int:
        """Commit to `seq`, once and before its first forward, what of its `source` it can take over; how many tokens that is, at most
        `shared`. The next forward must be one of `seq`, before its source is removed. Without a source: 0."""

    def forward(self, batch: Sequence[Rows]) -> list[RowsOutput]:
        """One target forward. Each sequence appears at most once. Nothing is committed until `commit`."""

    def commit(self, seq: int, rows: Sequence[int]) -> None:
        """Keep exactly `rows` of the last forward of `seq`, an ascending path; the others leave no trace.

        A second `forward` of a sequence without a `commit` in between rolls the first one back entirely.
        """

    def trim(self, seq: int) -> None:
        """Give back the room that `seq` has not used: no forward of it follows, others may still begin with its tokens."""

    def remove(self, seq: int) -> None:
        """Free everything of `seq`. Unknown ids are ignored."""

    def length(self, seq: int) -> int:
        """Tokens committed for `seq`."""
