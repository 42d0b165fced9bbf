"""The `mtp` drafter: a next-n head drafts a tree (or a chain) of tokens from the target's hidden states.

A sequence's KV in the head has one row for each *pair* (h_t, x_{t+1}) of a hidden state and the token it predicted. `accept` only
notes the pairs of what was committed; `propose` runs the head over them once, which both fills their KV rows and yields the first
drafted tokens. The further steps (`specfx.drafters.mtp_tree`) run the same layer, fed with the head's own hidden states. The rows of
those steps hold guesses and are dropped before `propose` returns, so nothing of a draft ever outlives it.

That is the reference. Where the head could be stitched into the target's graph (`specfx.engines.drafting`), the forward that verified
the last draft has made the next one already: `accept` is handed it, and `propose` hands it on.

Layer k of a head of several layers has pairs of layer k - 1's hidden state at row t and x_{t+k+1}: of n committed pairs it has n - k,
and its rows of a draft stand behind those. Heads whose layers have convolutions over the rows before (Inkling) draft chains, beside
the graph.
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

_RECENT = 48
_TOO_FEW = {16: 0, 26: 1, _RECENT: 1}
"""With no more than so many right at the first token, of the first 16 or 26 drafts or of the last 48, there is a warning: a head of this
model that is right three times in ten fails in four cases of a thousand at first, and practically never later."""


@dataclass
class _Sequence:
    """State of one sequence, in pairs (rows of the head's first layer).

    kvs: for each layer of the head. waiting: for each layer, in pieces ``[1, n, H]``, the inputs of the rows that it has not run over
    for good. tokens: the tokens that those rows are paired with, from pair `base` on; ``base + len(tokens)`` pairs are known.
    last: for each layer its hidden state ``[1, 1, H]`` at its last committed pair, valid while no pair waits.
    """

    prompt: Sequence[int]
    kvs: list[HeadKV]
    waiting: list[list[torch.Tensor]]
    last: list[torch.Tensor]
    tokens: list[int] = field(default_factory=list)
    base: int = 0
    started: bool = False
    ready: DraftTree | None = None
    """The draft that the graph has made."""
    drafted: frozenset[int] | None = None
    """First tokens of the last draft, until it is known whether one was right."""

    @property
    def pairs(self) -> int:
        return self.base + len(self.tokens)


@dataclass(frozen=True, eq=False)
class Drafting:
    """What can be stitched into the target's graph: a head, and the shape of its trees."""

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
    device = next(target.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a layer is made with random weights, then read
        head = load_head(options.head, target, options.draft_vocab, options.wiring)
    head.try_out(target)
    shape = options.shape(max_nodes, chains_only=head.recurrent)
    if head.draft_ids is not None:
        shape = replace(shape, topk=min(shape.topk, len(head.draft_ids)))
    origin = f"{options.head}" if options.head else "in the target's checkpoint"
    drafter = MtpDrafter(head, shape, origin, options.min_token_prob)
    if head.recurrent and (options.topk or 1) > 1:
        detail = f"a head with convolutions drafts chains: topk={options.topk} is taken as 1"
        drafter.refusals.append(Refusal("mtp trees", Reason.DRAFTS_CHAINS, detail, "topk=1"))
    return drafter


class MtpDrafter:
    """Drafts trees of `shape` with `head` (`specfx.drafters.mtp_head`), which messages call `origin`; nodes whose path is less probable
    than `floor` are not handed on.

    Where almost none of its drafts are right, which is how a head of another model shows, it warns once. (Whether drafting pays is the
    budget's to see.)
    """

    name = "mtp"
    needs_hidden = True
    beside = None

    def __init__(self, head: MtpHead, shape: TreeShape, origin: str = "given", floor: float = 0.0) -> None:
        self.head, self.shape, self._origin, self._floor = head, shape, origin, floor
        self.layers = head.chain[: shape.num_steps]
        self.refusals: list[Refusal] = []
        self.drafting = None if head.recurrent or head.wiring.streams else Drafting(head, shape)
        if head.recurrent:
            detail = "a head with convolutions is run beside the graph, in eager PyTorch"
            self.refusals.append(Refusal("mtp drafting", Reason.DRAFTING_APART, detail))
        if head.wiring.streams:
            detail = (
                f"its layer takes the target's {head.streams} hyper-connection streams of each token; engines hand out what the LM head is "
                "given, where hc_head has made one of them, and the streams can't be told from that"
            )
            self.refusals.append(Refusal("mtp drafting", Reason.HEAD_UNFED, detail))
        self._sequences: dict[int, _Sequence] = {}
        self._right: deque[bool] = deque(maxlen=_RECENT)
        self._warned = False

    @property
    def on_trial(self) -> bool:
        """Almost none of its drafts was right yet, and they are too few to tell."""
        return not self._warned and len(self._right) < _RECENT and sum(self._right) <= max(_TOO_FEW.values())

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        if seq in self._sequences:
            raise ValueError(f"sequence {seq} is already in use")
        nothing = torch.zeros(1, 1, self.head.hidden_size, dtype=self.head.dtype, device=self.head.device)
        n = len(self.layers)
        self._sequences[seq] = _Sequence(list(prompt), [HeadKV() for _ in range(n)], [[] for _ in range(n)], [nothing] * n)

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
            state.drafted = _first_tokens(drafted)
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
        return [self._draft(self._sequences[seq], budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        self._sequences.pop(seq, None)

    def _draft(self, state: _Sequence, budget: int) -> DraftTree:
        if state.ready is not None:
            return state.ready.pruned(self._floor).truncated(budget)
        if budget < 1 or not state.started:
            return EMPTY_TREE
        tree = self._tree(state)
        state.drafted = _first_tokens(tree)
        return tree.pruned(self._floor).truncated(budget)

    def _tree(self, state: _Sequence) -> DraftTree:
        self._catch_up(state)
        logits = [layer.draft_logits for layer in self.layers]
        return trees(draft(state.last, functools.partial(self._behind, state), logits, self.head.draft_ids, self.shape))[0]

    @torch.no_grad()
    def scores(self, seq: int, tree: DraftTree) -> torch.Tensor:
        """Logarithms of the path probabilities that the head gives the nodes of `tree`, ``[n]``, whoever drafted it."""
        state, device, last = self._sequences[seq], self.head.device, len(self.layers) - 1
        self._catch_up(state)
        tokens, parents = torch.tensor([tree.tokens], device=device), torch.tensor(tree.parents, device=device)
        masks = torch.tensor([[m >> 1 for m in tree.ancestor_masks()[1:]]], device=device)
        depths = torch.tensor(tree.depths()[1:], device=device)

        def above(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:  # each node's parent's hidden state
            return torch.where((parents < 0)[None, :, None], first, rest[:, parents.clamp(min=0)])

        made = [above(state.last[0], state.last[0].expand(-1, len(tree), -1))]  # by each layer, at each node's parent
        for k in range(1, last + 1):
            made.append(above(state.last[k], self._behind(state, k, tokens, made[-1], masks)))
        for _ in range(max(tree.depths()) - 1):  # the last layer again, fed with its own: one level more is right in each round
            fed = torch.where((depths <= last)[None, :, None], made[last - 1] if last else made[0], made[last])
            out = self._behind(state, last, tokens, fed, masks)
            made[last] = above(state.last[last], out)
        paths: list[float] = []
        for node, parent in enumerate(tree.parents):
            layer = min(int(depths[node]) - 1, last)
            shares = self.layers[layer].draft_logits(made[layer][:, node])[0].float().log_softmax(-1)
            ids = self.head.draft_ids
            share = shares[tokens[0, node] if ids is None else torch.searchsorted(ids, tokens[0, node])].item()
            paths.append(share + (paths[parent] if parent >= 0 else 0.0))
        return torch.tensor(paths)

    def _behind(self, state: _Sequence, k: int, tokens: torch.Tensor, hidden: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Layer `k` over a tree's rows ``[1, R]`` behind the committed pairs, which leave no trace. (See `Step`.)"""
        layer, kv = self.layers[k], state.kvs[k]
        start, rows = kv.length, tokens.shape[1]
        ancestors = (masks[0][:, None] >> torch.arange(rows, device=tokens.device)) & 1 != 0
        levels = ancestors.sum(1) - max(k - state.pairs, 0)  # behind fewer than k pairs the first levels stand for nothing
        real = (levels > 0).nonzero()[:, 0]
        positions = start + levels[real] - 1
        visible = torch.cat([ancestors.new_ones(len(real), start), ancestors[real][:, real]], 1)
        if layer.window is not None:
            standing = torch.cat([torch.arange(start, device=tokens.device), positions])
            visible &= standing > positions[:, None] - layer.window
        out = layer(tokens[:, real], hidden[:, real], kv, positions[None], visible[None, None])
        kv.length = start
        return torch.zeros_like(hidden).index_copy(1, real, out)

    def _catch_up(self, state: _Sequence) -> None:
        """Run each layer over the pairs that were committed since."""
        for k, (layer, kv) in enumerate(zip(self.layers, state.kvs, strict=True)):
            count = max(state.pairs - k, 0) - kv.length
            if count <= 0:
                continue
            tokens = torch.tensor([state.tokens[kv.length + k - state.base :]], dtype=torch.long, device=self.head.device)
            waiting = torch.cat(state.waiting[k], dim=1)
            out = layer(tokens, waiting[:, :count], kv)
            state.waiting[k] = [waiting[:, count:]] if count < waiting.shape[1] else []
            state.last[k] = out[:, -1:]
            if k + 1 < len(self.layers):
                state.waiting[k + 1].append(out)
        state.tokens, state.base = [], state.pairs

    def _judge(self, state: _Sequence, token: int) -> None:
        """Note whether a first token of the last draft was right, and warn if almost none was."""
        if state.drafted is None:
            return
        self._right.append(token in state.drafted)
        state.drafted = None
        count = len(self._right)
        if not self._warned and sum(self._right) <= _TOO_FEW.get(count, -1):
            self._warned = True
            warnings.warn(
                f"of the last {count} drafts of the head {self._origin}, {sum(self._right)} began with a right token, so drafting "
                "stops, but for a probe now and then. Likely causes: the head was trained for another model or another revision of "
                "it; its weights were mixed up or never trained; the text is of a kind that it has never seen. Try another head=, or "
                "`specfx train mtp`",
                stacklevel=3,
            )


def _first_tokens(tree: DraftTree) -> frozenset[int] | None:
    """None of an empty tree."""
    return frozenset(token for token, parent in zip(tree.tokens, tree.parents, strict=True) if parent < 0) or None
