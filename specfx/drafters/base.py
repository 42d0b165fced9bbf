"""What a drafter is: it knows tokens and trees, never FX, engines or the decode loop.

Life of a sequence, as the runtime drives it::

    drafter.add(seq, prompt, ends)                 # x_0 .. x_{P-1}, and the tokens that end the sequence
    drafter.accept(seq, [x_P], hidden[P, H])       # after prefill: one new token, hidden rows of the whole prompt
    while not done:
        tree = drafter.propose([seq], [budget])[0] # continuations of everything known so far
        drafter.accept(seq, new_tokens, hidden)    # n accepted tokens (bonus included), hidden [n, H]
    drafter.remove(seq, last)                      # with the last tokens, which `accept` was not told
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from specfx.errors import Refusal
from specfx.runtime.tree import EMPTY_TREE, DraftTree


class Drafter(Protocol):
    """Proposes draft trees for sequences and learns from what was accepted."""

    name: str
    needs_hidden: bool
    """Whether `accept` must be given the target's hidden states (else it gets None)."""

    @property
    def on_trial(self) -> bool:
        """Whether drafts of greedy text are wanted although they don't seem to pay: it is still to be seen whether they ever come true."""

    @property
    def beside(self) -> Drafter | None:
        """A drafter whose drafts cost next to nothing and are verified in one tree with this one's, also while this one rests. It is told
        by this one what comes, and asked by the runtime."""

    @property
    def drafting(self) -> Any:
        """The part of this drafter that can be stitched into the target's graph (`specfx.drafters.mtp.Drafting`), or None."""

    @property
    def refusals(self) -> Sequence[Refusal]:
        """What the drafter can't do as fast as it could, for the report."""

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        """A new sequence with its prompt. ends: tokens that end it, after which nothing is worth drafting. Raises `ValueError` if `seq`
        is already in use."""

    def accept(self, seq: int, tokens: Sequence[int], hidden: torch.Tensor | None, drafted: DraftTree | None = None) -> None:
        """`tokens` ``[n]`` were committed after all that was known.

        `hidden` ``[m, H]``, ``m >= n``: the target's hidden states (the LM head's inputs) at the ``m`` positions just before the
        last committed token, so row ``m - 1`` predicted ``tokens[-1]``. ``m > n`` only after prefill, where the prompt's rows come too.
        drafted: what the target's graph has drafted behind `tokens`, where the drafter's model is a part of it; then without `hidden`.
        """

    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        """One tree for each of `seqs`, of at most ``budgets[i]`` nodes; an empty tree where nothing is worth verifying."""

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        """Forget `seq`, after the tokens `last` with which it ended. Unknown ids are ignored, so that clean-up after a failure is
        always safe."""


class NoDrafter:
    """``method=None``: plain decoding through the same loop, the honest baseline."""

    name = "none"
    needs_hidden = False
    on_trial = False
    beside = None
    drafting = None
    refusals: Sequence[Refusal] = ()

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        pass

    def accept(self, seq: int, tokens: Sequence[int], hidden: torch.Tensor | None, drafted: DraftTree | None = None) -> None:
        pass

    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        return [EMPTY_TREE] * len(seqs)

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        pass
