"""The `mtp` drafter: a next-n head drafts a tree (or a chain) of tokens from the target's hidden states.

A sequence's KV in the head has one row for each *pair* (h_t, x_{t+1}) of a hidden state and the token it predicted. `accept` only
notes the pairs of what was committed; `propose` runs the head over them once, which both fills their KV rows and yields the first
drafted tokens. The further steps (`specfx.drafters.mtp_tree`) run the same layer, fed with the head's own hidden states. The rows of
those steps hold guesses and are dropped before `propose` returns, so nothing of a draft ever outlives it.

That is the reference. Where the head could be stitched into the target's graph (`specfx.engines.drafting`), the forward that verified
the last draft has made the next one already: `accept` is handed it, and `propose` hands it on.

In a head of several layers, layer k makes draft step k (the last one also all later steps), over pairs of layer k - 1's hidden state
at row t and x_{t+k+1}. Its last k rows hold drafted tokens: they too are dropped, and made anew when the true tokens are known. Such
heads draft chains, and so do those whose layers have convolutions over the rows before (Inkling).
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from specfx.drafters.mtp_head import MtpHead, load_head
from specfx.drafters.mtp_kv import HeadKV
from specfx.drafters.mtp_tree import draft, trees
from specfx.errors import Reason, Refusal
from specfx.options import MtpOptions
from specfx.runtime.tree import EMPTY_TREE, DraftTree, TreeShape

_JUDGED = 64
_TOO_FEW = 2
"""With fewer right first tokens in the last `_JUDGED` drafts than this, drafting stops: no head of this model is wrong that often."""
_AGAIN = (4, 16)
"""It begins again with so many right among the last so many."""
_PROBE = 16
"""While it rests, one step in so many drafts all the same, to see."""


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
    ready: DraftTree | None = None
    """The draft that the graph has made."""
    drafted: int | None = None
    """Most probable first token of the last draft, until it is known whether it was right."""

    @property
    def kv(self) -> HeadKV:
        return self.kvs[0]

    @property
    def pairs(self) -> int:
        return self.base + len(self.tokens)


@dataclass(frozen=True, eq=False)
class Drafting:
    """What can be stitched into the target's graph: a head of one layer, and the shape of its trees."""

    head: MtpHead
    shape: TreeShape

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for heads with equal weights and equal trees (weights are told apart by up to 64 numbers of each)."""
        digest = hashlib.blake2b(digest_size=16)
        ids = {} if self.head.draft_ids is None else {"draft_ids": self.head.draft_ids}
        for name, tensor in (self.head.state_dict() | ids).items():
            flat = tensor.detach().reshape(-1)
            digest.update(f"{name} {list(tensor.shape)} {flat[:: max(1, len(flat) // 64)].tolist()}".encode())
        return self.shape, self.head.wiring, self.head.window, digest.digest()


def load_drafter(options: MtpOptions, max_nodes: int, target: nn.Module) -> MtpDrafter:
    """The drafter of `options`, of at most `max_nodes` nodes a tree. The head is read from ``options.head``, or from the target's own
    checkpoint; raises `HeadError` if there is none or it doesn't fit `target`."""
    head = load_head(options.head, target, options.draft_vocab)
    head.try_out(target)
    layers = len(head.chain)
    chains_only = layers > 1 or head.recurrent
    shape = options.shape(max_nodes, chains_only)
    if head.draft_ids is not None:
        shape = replace(shape, topk=min(shape.topk, len(head.draft_ids)))
    origin = f"{options.head}" if options.head else "in the target's checkpoint"
    drafter = MtpDrafter(head, shape, origin, options.min_token_prob)
    if chains_only and (options.topk or 1) > 1:
        which = f"of {layers} layers" if layers > 1 else "with convolutions"
        detail = f"a head {which} drafts chains: topk={options.topk} is taken as 1"
        drafter.refusals.append(Refusal("mtp trees", Reason.DRAFTS_CHAINS, detail, "topk=1"))
    return drafter


class MtpDrafter:
    """Drafts trees of `shape` with `head` (`specfx.drafters.mtp_head`), which messages call `origin`; nodes whose path is less probable
    than `floor` are not handed on.

    Where almost none of its drafts are right, which is how a head of another model shows, it warns once and stops drafting, but for a
    probe now and then.
    """

    name = "mtp"
    needs_hidden = True

    def __init__(self, head: MtpHead, shape: TreeShape, origin: str = "given", floor: float = 0.0) -> None:
        self.head, self.shape, self._origin, self._floor = head, shape, origin, floor
        self.refusals: list[Refusal] = []
        self.drafting = Drafting(head, shape) if len(head.chain) == 1 else None
        if self.drafting is None:
            detail = f"a head of {len(head.chain)} layers is run beside the graph, in eager PyTorch"
            self.refusals.append(Refusal("mtp drafting", Reason.DRAFTING_APART, detail))
        self._sequences: dict[int, _Sequence] = {}
        self._right: deque[bool] = deque(maxlen=_JUDGED)
        self._rests, self._warned, self._steps_rested = False, False, 0

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        if seq in self._sequences:
            raise ValueError(f"sequence {seq} is already in use")
        layers = self.head.chain
        self._sequences[seq] = _Sequence(list(prompt), [HeadKV() for _ in layers], [[] for _ in layers])

    def accept(self, seq: int, tokens: Sequence[int], hidden: torch.Tensor | None, drafted: DraftTree | None = None) -> None:
        """See `Drafter.accept`. `hidden` is copied: its buffer may be used again. Fewer rows than the prompt's are right after
        prefill (the head then sees the later part of the prompt only). A sequence that was once given `drafted` must always be.

        Raises `ValueError` if `hidden` is not ``[m, H]`` with at least a row for each token.
        """
        state = self._sequences[seq]
        n = len(tokens)
        if n == 0:
            return
        self._judge(state, int(tokens[0]))
        if drafted is not None:
            state.ready = drafted
            state.drafted = drafted.tokens[0] if len(drafted) else None
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

    @torch.no_grad()
    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        if self._rests:
            self._steps_rested += 1
            if self._steps_rested % _PROBE:
                return [EMPTY_TREE] * len(seqs)
        return [self._draft(self._sequences[seq], budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        self._sequences.pop(seq, None)

    def _draft(self, state: _Sequence, budget: int) -> DraftTree:
        if state.ready is not None:
            return state.ready.pruned(self._floor).truncated(budget)
        if budget < 1 or not state.started:
            return EMPTY_TREE
        tree = self._tree(state) if len(self.head.chain) == 1 else self._chain(state, min(self.shape.num_steps, self.shape.nodes))
        state.drafted = tree.tokens[0]
        return tree.pruned(self._floor).truncated(budget)

    def _tree(self, state: _Sequence) -> DraftTree:
        """The one layer of the head, used for every step."""
        hidden, _ = self._catch_up(state, 0, [], [])
        state.tokens, state.base = [], state.kv.length

        def step(tokens: torch.Tensor, hidden: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
            return self._behind(state.kv, tokens, hidden, masks)

        return trees(draft(hidden, step, self.head.draft_logits, self.head.draft_ids, self.shape))[0]

    @torch.no_grad()
    def scores(self, seq: int, tree: DraftTree) -> torch.Tensor:
        """Logarithms of the path probabilities that the head gives the nodes of `tree`, ``[n]``, whoever drafted it. (One layer only.)"""
        state, device = self._sequences[seq], self.head.device
        leaf, _ = self._catch_up(state, 0, [], [])
        state.tokens, state.base = [], state.kv.length
        tokens, parents = torch.tensor([tree.tokens], device=device), torch.tensor(tree.parents, device=device)
        masks = torch.tensor([[m >> 1 for m in tree.ancestor_masks()[1:]]], device=device)
        behind = leaf.expand(-1, len(tree), -1)  # each node's parent's hidden state; one level more is right in each round
        for _ in range(max(tree.depths()) - 1):
            out = self._behind(state.kv, tokens, behind, masks)
            behind = torch.where((parents < 0)[None, :, None], leaf, out[:, parents.clamp(min=0)])
        shares = self.head.draft_logits(behind)[0].float().log_softmax(-1)
        places = tokens[0] if self.head.draft_ids is None else torch.searchsorted(self.head.draft_ids, tokens[0])
        own = shares.gather(1, places[:, None])[:, 0].tolist()
        paths: list[float] = []
        for share, parent in zip(own, tree.parents, strict=True):
            paths.append(share + (paths[parent] if parent >= 0 else 0.0))
        return torch.tensor(paths)

    def _behind(self, kv: HeadKV, tokens: torch.Tensor, hidden: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The head over a tree's rows ``[1, R]`` behind the committed pairs, which leave no trace in `kv`."""
        start, rows = kv.length, tokens.shape[1]
        index = torch.arange(rows, device=tokens.device)
        ancestors = (masks[0][:, None] >> index) & 1 != 0
        positions = start + ancestors.sum(1) - 1
        visible = torch.cat([ancestors.new_ones(rows, start), ancestors], 1)
        if self.head.window is not None:
            standing = torch.cat([torch.arange(start, device=tokens.device), positions])
            visible &= standing > positions[:, None] - self.head.window
        out = self.head(tokens, hidden, kv, positions[None], visible[None, None])
        kv.length = start
        return out

    def _chain(self, state: _Sequence, steps: int) -> DraftTree:
        """Several layers, one for each of the first steps."""
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
            logits = layers[k].draft_logits(hidden)[:, -1].float()  # [1, V]
            best, token = logits.max(dim=-1)
            token = token if self.head.draft_ids is None else self.head.draft_ids[token]
            tokens.append(token[None])  # stays on the device: nothing waits for it before the chain is done
            probs.append((best - logits.logsumexp(dim=-1)).exp())
        for k, kv in enumerate(state.kvs):
            kv.length = min(kv.length, max(state.pairs - k, 0))
        done = min(kv.length + k for k, kv in enumerate(state.kvs)) - state.base
        if done > 0:
            state.tokens, state.base = state.tokens[done:], state.base + done
        chain = torch.cat(tokens, dim=1)[0].tolist()
        path = torch.cat(probs).clamp(max=1.0).cumprod(0).tolist()
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
        """Note whether the last draft's first token was right, and stop or begin drafting accordingly."""
        if state.drafted is None:
            return
        self._right.append(state.drafted == token)
        state.drafted = None
        if self._rests:
            needed, among = _AGAIN
            self._rests = sum(list(self._right)[-among:]) < needed
        elif len(self._right) == _JUDGED and sum(self._right) < _TOO_FEW:
            self._rests, self._steps_rested = True, 0
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"of the last {_JUDGED} drafts of the head {self._origin}, {sum(self._right)} began with the right token, so drafting "
                    "stops, but for a probe now and then. Likely causes: the head was trained for another model or another revision of "
                    "it; its weights were mixed up or never trained; the text is of a kind that it has never seen. Try another head=, or "
                    "`specfx train mtp`",
                    stacklevel=3,
                )
