"""A head and the suffix drafter together, after ArcticInference's ``enable_suffix_decoding``.

The head knows how texts go on, the suffix drafter what this text, and earlier ones, said before. Arctic takes the suffix draft where its
score is the higher one, else the head's; here the runtime makes one tree of both (`specfx.runtime.tree.merged`), and what of it is
verified is the budget's to say. Suffix drafts cost next to nothing, so they are made in every step; the head's while they pay beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specfx.drafters.mtp import MtpDrafter
from specfx.drafters.suffix import SuffixDrafter
from specfx.runtime.tree import DraftTree


class CombinedDrafter:
    """`specfx.drafters.base.Drafter`: proposes what `head` drafts, beside which `suffix` is to be asked; both learn what is accepted."""

    name = "mtp+suffix"
    needs_hidden = True

    def __init__(self, head: MtpDrafter, suffix: SuffixDrafter) -> None:
        self.head, self.beside = head, suffix
        self.drafting, self.refusals = head.drafting, head.refusals

    @property
    def on_trial(self) -> bool:
        return self.head.on_trial

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        self.head.add(seq, prompt, ends)
        self.beside.add(seq, prompt, ends)

    def accept(self, seq: int, tokens: Sequence[int], hidden: torch.Tensor | None, drafted: DraftTree | None = None) -> None:
        self.head.accept(seq, tokens, hidden, drafted)
        self.beside.accept(seq, tokens)

    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        return self.head.propose(seqs, budgets)

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        self.head.remove(seq, last)
        self.beside.remove(seq, last)
