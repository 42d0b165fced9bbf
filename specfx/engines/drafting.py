"""A next-n head's part of a decode step, as a graph of its own that the `mtp_head` pass stitches behind the target's.

What is traced is a few lines around `specfx.drafters.mtp_tree.draft`, so the graph drafts what the eager reference drafts:

1. The pairs (hidden state, chosen token) of *all* rows of the forward go through each layer of the head as one more decoder layer, with the
   target's tree mask and page table: the head's KV are further layers of the pool, and are rolled back with it.
2. `specfx::greedy_walk` finds the rows that the choices accept. A layer's first draft step moves their keys and values to their
   places, so the next forward has nothing to move in it (where it makes no step behind the pairs, that is left to the next forward).
3. Behind each walk's last row the tree is drafted. Its rows stand in the pages behind the committed ones, where the next forward's
   overwrite them.

Layer k > 0 pairs the token chosen behind a row with what layer k - 1 made of the row *above* it. So its row at position p is the pair
number p - k; it is stored at p all the same, and the first k positions, which stand for no pair, are skipped by its attention. The row
above a sequence's first row was committed in an earlier forward: what the layers made of that one, the sequence's *tail*, goes from
call to call.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface, PreTrainedConfig

from specfx.capture import make_traceable, refuse_strange_attention, shared_storage
from specfx.drafters.mtp import Drafting
from specfx.drafters.mtp_head import MtpHead
from specfx.drafters.mtp_tree import draft
from specfx.errors import CaptureError
from specfx.kernels.greedy_walk import greedy_walk
from specfx.kernels.tree_attention import tree_attention_, tree_parents, tree_positions
from specfx.passes.mtp_head import TAILS
from specfx.runtime.tree import TreeShape

HEAD_ATTENTION = "specfx_head_attention"


class _Bound(threading.local):
    """What the layer that is being run attends over; without pages it is only asked for the shapes of its keys and values."""

    pages: tuple[Tensor, Tensor] | None = None
    metadata: tuple[Tensor, ...] = ()
    window: int = 0
    skip: int = 0
    seen: list[Tensor]


_bound = _Bound()


@contextmanager
def _attending(pools: Sequence[Tensor], metadata: tuple[Tensor, ...], window: int, skip: int) -> Iterator[None]:
    """Within the block a layer attends over the first two of `pools`."""
    _bound.pages, _bound.metadata, _bound.window, _bound.skip = (pools[0], pools[1]), metadata, window, skip
    try:
        yield
    finally:
        _bound.pages = None


def _head_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, over pages. The window is the head's, whatever the layer says (as in `MtpHead`)."""
    refuse_strange_attention(module, attention_mask, more)
    if _bound.pages is None:
        _bound.seen += [key, value]
        return query.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[3]), None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rows = [x.transpose(1, 2)[0] for x in (query, key, value)]
    out = tree_attention_(*rows, *_bound.metadata, *_bound.pages, scale, _bound.window, softcap or 0.0, s_aux, _bound.skip)
    return out[None], None


class _DraftStep(nn.Module):
    """What is traced.

    Inputs as in `specfx.kernels.tree_attention`, and next_ids ``[T]``: the token behind each row, -1 where the target chooses it; hidden
    ``[1, T, H]`` and choice ``[R]`` (of the rows `logit_rows`) of the target; tails ``[S, layers - 1, H]``, None with one layer; pools: k
    and v pages of each layer. Outputs as `draft`'s and, with several layers, the new tails.
    """

    def __init__(self, head: MtpHead, shape: TreeShape, page_size: int) -> None:
        super().__init__()
        self.head, self.shape, self.page_size = head, shape, page_size
        shared = [part for layer in head.chain for part in layer._unregistered if isinstance(part, nn.Module)]
        self.shared = nn.ModuleList(shared)  # what is not registered would be copied

    def forward(
        self,
        input_ids: Tensor,
        next_ids: Tensor,
        hidden: Tensor,
        choice: Tensor,
        logit_rows: Tensor,
        tree_mask: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        row_starts: Tensor,
        moves: Tensor,
        tails: Tensor | None,
        *pools: Tensor,
    ) -> tuple[Tensor, ...]:
        layers = self.head.chain[: self.shape.num_steps]
        known = next_ids.index_select(0, logit_rows)
        chosen = next_ids.index_copy(0, logit_rows, torch.where(known < 0, choice, known))
        leaf, committed, own_moves = greedy_walk(input_ids, chosen, tree_mask, page_table, lengths, row_starts, self.page_size)
        nothing = torch.full((2, 1), -1, dtype=torch.int64, device=input_ids.device)

        def over(k: int, tokens: Tensor, fed: Tensor, positions: Tensor, metadata: tuple[Tensor, ...]) -> Tensor:
            """Layer `k` over rows ``[1, T]`` that stand at `positions`: the pairs k places before."""
            pairs = (positions - k).clamp(min=0) if k else positions
            with _attending(pools[2 * k :], metadata, layers[k].window or 0, k):
                return layers[k].over(tokens, fed, pairs, None, None)

        positions = tree_positions(tree_mask, lengths, row_starts, input_ids)
        fed, made, new_tails = self.head.take(hidden), [], []
        read = chosen[None].clamp(min=0)  # -1 where nothing could be drawn, of which the host makes an error
        for k in range(len(layers)):
            drafts = k > 0 or (len(layers) == 1 and self.shape.num_steps > 1)
            pairs = over(k, read, fed, positions, (tree_mask, page_table, lengths, row_starts, nothing if drafts else moves))
            made.append(pairs[0].index_select(0, leaf)[:, None])
            if k + 1 < len(layers):
                assert tails is not None
                new_tails.append(made[k])
                fed = torch.cat([tails[:, k], pairs[0]]).index_select(0, tree_parents(tree_mask, row_starts, input_ids))[None]
        waiting = [[own_moves] for _ in layers]

        def step(k: int, tokens: Tensor, hidden: Tensor, masks: Tensor) -> Tensor:
            sequences, rows = tokens.shape
            starts = torch.arange(sequences + 1, dtype=torch.int32, device=tokens.device) * rows
            flat, mask = tokens.reshape(1, -1), masks.reshape(-1)
            positions = tree_positions(mask, committed, starts, flat)
            metadata = (mask, page_table, committed, starts, waiting[k].pop() if waiting[k] else nothing)
            return over(k, flat, hidden.reshape(1, -1, hidden.shape[2]), positions, metadata).view(sequences, rows, -1)

        drafted = draft(made, step, [layer.draft_logits for layer in layers], self.head.draft_ids, self.shape)
        return drafted if tails is None else (*drafted, torch.cat(new_tails, 1))


def capture_drafting(drafting: Drafting, page_size: int) -> fx.GraphModule:
    """The graph of `drafting`; placeholders are named as the arguments of `_DraftStep.forward`, outputs as `draft`'s.

    Raises `CaptureError`.
    """
    head, shape = _clone(drafting.head), drafting.shape
    layers = head.chain[: shape.num_steps]
    like: dict[str, Any] = {"device": head.device}
    one = torch.zeros(1, 1, dtype=torch.long, **like)
    try:
        _bound.seen = []
        with torch.no_grad():
            for layer in layers:
                layer.over(one, torch.zeros(1, 1, head.hidden_size, dtype=head.dtype, **like), one, None, None)
    except Exception as e:  # layers are the families' code
        raise CaptureError(f"the head's layer can't be driven by itself: {type(e).__name__}: {e}") from e
    sequences, rows, reads = 3, 11, 7
    ints = lambda *size: torch.zeros(size, dtype=torch.int32, **like)  # noqa: E731
    longs = lambda *size: torch.zeros(size, dtype=torch.int64, **like)  # noqa: E731
    inputs = {
        "input_ids": longs(1, rows),
        "next_ids": longs(rows),
        "hidden": torch.zeros(1, rows, head.hidden_size, dtype=head.dtype, **like),
        "choice": longs(reads),
        "logit_rows": longs(reads),
        "tree_mask": longs(rows),
        "page_table": ints(sequences, 4),
        "lengths": ints(sequences),
        "row_starts": ints(sequences + 1),
        "moves": longs(2, 5),
        TAILS: torch.zeros(sequences, len(layers) - 1, head.hidden_size, dtype=head.dtype, **like) if len(layers) > 1 else None,
    }
    pools = [torch.zeros(6, page_size, x.shape[1], x.shape[3], dtype=x.dtype, **like) for x in _bound.seen]
    t, s = torch.export.Dim("rows", min=1, max=1 << 20), torch.export.Dim("sequences", min=1, max=1 << 16)
    r, p, m, n = (torch.export.Dim(name, min=1, max=1 << 30) for name in ("reads", "width", "moved", "pages"))
    dynamic: dict[str, Any] = {name: {0: t} for name in ("next_ids", "tree_mask")} | {name: {1: t} for name in ("input_ids", "hidden")}
    dynamic |= {"choice": {0: r}, "logit_rows": {0: r}, "page_table": {0: s, 1: p}, "lengths": {0: s}, "row_starts": {0: s + 1}}
    dynamic |= {"moves": {1: m}, TAILS: {0: s} if len(layers) > 1 else None, "pools": tuple({0: n} for _ in pools)}
    step = _DraftStep(head, shape, page_size)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(step, (*inputs.values(), *pools), dynamic_shapes=dynamic, strict=False)
    except CaptureError:
        raise
    except Exception as e:  # torch.export raises many kinds; all mean the same here
        raise CaptureError(f"the head: {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}") from e
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for i, node in enumerate(placeholders[len(inputs) :]):
        node.target = node.name = f"{'kv'[i % 2]}_pages_{i // 2}"
    if len(layers) == 1:  # exported as a placeholder without a value
        module.graph.erase_node(placeholders[len(inputs) - 1])
    module.recompile()
    return module


def _clone(head: MtpHead) -> MtpHead:
    """A copy that shares the storage of all weights, the target's included, and attends over pages."""
    AttentionInterface.register(HEAD_ATTENTION, _head_attention)
    memo = shared_storage(head)
    for layer in head.chain:
        memo |= {id(b): b for b in (layer.draft_ids, layer.draft_weight, layer.draft_bias) if b is not None}
        for shared in layer._unregistered:
            if isinstance(shared, nn.Module):
                memo |= shared_storage(shared)
    clone = copy.deepcopy(head, memo)
    for module in clone.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            make_traceable(config, HEAD_ATTENTION)
    return clone
