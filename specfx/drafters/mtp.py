"""The `mtp` drafter: a next-n head drafts a chain of tokens from the target's hidden states.

A sequence's KV in the head has one row for each *pair* (h_t, x_{t+1}) of a hidden state and the token it predicted. `accept` only
notes the pairs of what was committed; `propose` runs the head over them once, which both fills their KV rows and yields the first
drafted token. Each further token is one more step of the same layer, fed with the head's own hidden state. The rows of those steps
hold guesses and are dropped before `propose` returns, so nothing of a draft ever outlives it.

In a head of several layers, layer k makes draft step k (the last one also all later steps), over pairs of layer k - 1's hidden state
at row t and x_{t+k+1}. Its last k rows hold drafted tokens: they too are dropped, and made anew when the true tokens are known.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from specfx.drafters.mtp_head import HeadKV, load_head
from specfx.errors import Refusal
from specfx.options import MtpOptions
from specfx.runtime.tree import EMPTY_TREE, DraftTree

_ACCEPTANCE_WINDOW = 256
_ACCEPTANCE_FLOOR = 0.01


@dataclass
class _Sequence:
    """State of one sequence, in pairs (rows of the head's first layer).

    kvs: for each layer of the head. waiting: for each layer, in pieces ``[1, n, H]``, the inputs of the rows that it has not run over
    for good. tokens: the tokens that those rows are paired with, from pair `base` on; ``base + len(tokens)`` pairs are known.
    """

    prompt: Sequence[int]
    kvs: list[HeadKV]
    waiting: list[list[torch.Tensor]]
    tokens: list[int] = field(default_factory=list)
    base: int = 0
    last: torch.Tensor | None = None
    """``[1, 1, H]``: the first layer's hidden state at the last committed pair, valid while no pair waits."""
    started: bool = False
    drafted: int | None = None
    """First token of the last draft, until it is known whether it was accepted."""

    @property
    def kv(self) -> HeadKV:
        return self.kvs[0]

    @property
    def pairs(self) -> int:
        return self.base + len(self.tokens)


class MtpDrafter:
    """Drafts greedy chains of ``min(num_steps, max_nodes, budget)`` tokens with a head (`specfx.drafters.mtp_head`).

    The head is read from ``options.head``, or from the target's own checkpoint; raises `HeadError` if there is none or it doesn't fit
    `target`. Warns once if almost none of its drafts are
    accepted, which is how a head of another model shows.
    """

    name = "mtp"
    needs_hidden = True
    refusals: Sequence[Refusal] = ()

    def __init__(self, options: MtpOptions, max_nodes: int, target: nn.Module) -> None:
        self.head = load_head(options.head, target)
        self.head.try_out(target)
        self._path = options.head if options.head is not None else "in the target's checkpoint"
        self._steps = min(options.num_steps, max_nodes)
        self._sequences: dict[int, _Sequence] = {}
        self._judged = self._right = 0

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        if seq in self._sequences:
            raise ValueError(f"sequence {seq} is already in use")
        layers = self.head.chain
        self._sequences[seq] = _Sequence(list(prompt), [HeadKV() for _ in layers], [[] for _ in layers])

    def accept(self, seq: int, tokens: Sequence[int], hidden: torch.Tensor | None) -> None:
        """See `Drafter.accept`. `hidden` is copied: its buffer may be used again. Fewer rows than the prompt's are right after
        prefill (the head then sees the later part of the prompt only).

        Raises `ValueError` if `hidden` is not ``[m, H]`` with at least a row for each token.
        """
        state = self._sequences[seq]
        n = len(tokens)
        if n == 0:
            return
        if hidden is None or hidden.ndim != 2 or hidden.shape[0] < n or hidden.shape[1] != self.head.hidden_size:
            got = None if hidden is None else list(hidden.shape)
            raise ValueError(f"hidden must be [m >= {n}, {self.head.hidden_size}] for {n} tokens, got {got}")
        predicted = [int(t) for t in tokens]
        if not state.started:  # the prompt's pairs come along, once: row j predicted prompt[j + 1]
            state.started = True
            extra = min(hidden.shape[0] - n, max(len(state.prompt) - 1, 0))
            predicted = [int(t) for t in state.prompt[len(state.prompt) - extra :]] + predicted
            state.prompt = ()
        state.tokens += predicted
        rows = hidden[hidden.shape[0] - len(predicted) :].detach().to(self.head.device, self.head.dtype, copy=True)
        state.waiting[0].append(self.head.take(rows)[None])
        self._judge(state, int(tokens[0]))

    @torch.no_grad()
    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        return [self._chain(self._sequences[seq], min(self._steps, budget)) for seq, budget in zip(seqs, budgets, strict=True)]

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        self._sequences.pop(seq, None)

    def _chain(self, state: _Sequence, steps: int) -> DraftTree:
        if steps < 1 or not state.started:
            return EMPTY_TREE
        layers = self.head.chain
        tokens: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        guesses: list[torch.Tensor] = []  # inputs of the next layer's rows that hang on drafted tokens
        for i in range(steps):
            k = min(i, len(layers) - 1)
            if i == k:  # a layer's first step catches up with what was committed; its last row drafts
                hidden, guesses = self._catch_up(state, k, tokens, guesses)
            else:
                hidden = layers[k](tokens[-1], hidden, state.kvs[k])
            logits = layers[k].logits(hidden)[:, -1].float()  # [1, V]
            best, token = logits.max(dim=-1)
            tokens.append(token[None])  # stays on the device: nothing waits for it before the chain is done
            probs.append((best - logits.logsumexp(dim=-1)).exp())
        for k, kv in enumerate(state.kvs):
            kv.length = min(kv.length, max(state.pairs - k, 0))
        done = min(kv.length + k for k, kv in enumerate(state.kvs)) - state.base
        if done > 0:
            state.tokens, state.base = state.tokens[done:], state.base + done
        chain = torch.cat(tokens, dim=1)[0].tolist()
        path = torch.cat(probs).clamp(max=1.0).cumprod(0).tolist()
        state.drafted = chain[0]
        return DraftTree.chain(chain, path)

    def _catch_up(
        self, state: _Sequence, k: int, drafted: list[torch.Tensor], guesses: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run layer `k` over all rows that it lacks: (hidden state of the last row ``[1, 1, H]``, guessed inputs of layer k + 1)."""
        kv, start = state.kvs[k], state.kvs[k].length
        if start == state.pairs:  # only the first layer can have them all
            assert state.last is not None
            return state.last, []
        known = torch.tensor([state.tokens[max(start + k - state.base, 0) :]], dtype=torch.long, device=self.head.device)
        tokens = torch.cat([known, *drafted[max(k - (state.pairs - start), 0) :]], dim=1)  # row t is paired with x_{t+k+1}
        out = self.head.chain[k](tokens, torch.cat(state.waiting[k] + guesses, dim=1), kv)
        final = max(state.pairs - k, 0) - start
        rest = torch.cat(state.waiting[k], dim=1)[:, final:] if state.waiting[k] else None
        state.waiting[k] = [rest] if rest is not None and rest.shape[1] else []
        if k + 1 < len(state.kvs) and final > 0:
            state.waiting[k + 1].append(out[:, :final])
        if k == 0:
            state.last = out[:, -1:]
        return out[:, -1:], [out[:, final:]] if final < out.shape[1] else []

    def _judge(self, state: _Sequence, token: int) -> None:
        """Count whether the last draft's first token was accepted, and warn once if hardly any ever is."""
        if state.drafted is None:
            return
        self._judged += 1
        self._right += state.drafted == token
        state.drafted = None
        if self._judged == _ACCEPTANCE_WINDOW and self._right < _ACCEPTANCE_FLOOR * self._judged:
            warnings.warn(
                f"only {self._right} of {self._judged} drafts of the head {self._path} were accepted: was it trained for this model?",
                stacklevel=3,
            )
