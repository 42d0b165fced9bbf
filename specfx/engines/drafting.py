"""A next-n head's part of a decode step, as a graph of its own that the `mtp_head` pass stitches behind the target's.

What is traced is a few lines around `specfx.drafters.mtp_tree.draft`, so the graph drafts what the eager reference drafts:

1. The pairs (hidden state, chosen token) of *all* rows of the forward go through the head as one more decoder layer, with the target's
   tree mask, positions and page table: the head's KV is one more layer of the pool, and is rolled back with it.
2. `specfx::greedy_walk` finds the rows that greedy decoding accepts. The first draft step moves their keys and values to their places,
   so the next forward has nothing to move in this layer (with one step only, that is left to it).
3. Behind each walk's last row the tree is drafted. Its rows stand in the pages behind the committed ones, where the next forward's
   overwrite them.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
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
from specfx.kernels.tree_attention import tree_attention_, tree_positions
from specfx.runtime.tree import TreeShape

HEAD_ATTENTION = "specfx_head_attention"


class _Bound(threading.local):
    """What the layer that is being run attends over; without pages it is only asked for the shapes of its keys and values."""

    pages: tuple[Tensor, Tensor] | None = None
    metadata: tuple[Tensor, ...] = ()
    window: int = 0
    seen: tuple[Tensor, Tensor]


_bound = _Bound()


@contextmanager
def _attending(pages: tuple[Tensor, Tensor], metadata: tuple[Tensor, ...], window: int) -> Iterator[None]:
    _bound.pages, _bound.metadata, _bound.window = pages, metadata, window
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
        _bound.seen = key, value
        return query.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[3]), None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rows = [x.transpose(1, 2)[0] for x in (query, key, value)]
    out = tree_attention_(*rows, *_bound.metadata, *_bound.pages, scale, _bound.window, softcap or 0.0, s_aux)
    return out[None], None


class _DraftStep(nn.Module):
    """What is traced. Inputs as in `specfx.kernels.tree_attention`, and next_ids ``[T]``: the token behind each row, -1 where the target
    chooses it; hidden ``[1, T, H]`` and argmax ``[R]`` (of the rows `logit_rows`) of the target."""

    def __init__(self, head: MtpHead, shape: TreeShape, page_size: int) -> None:
        super().__init__()
        self.head, self.shape, self.page_size = head, shape, page_size
        embed, lm_head, rotary, final_norm = head._unregistered  # what is not registered would be copied
        self.embed, self.lm_head, self.rotary, self.final_norm = embed, lm_head, rotary, final_norm

    def forward(
        self,
        input_ids: Tensor,
        next_ids: Tensor,
        hidden: Tensor,
        argmax: Tensor,
        logit_rows: Tensor,
        tree_mask: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        row_starts: Tensor,
        moves: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
    ) -> tuple[Tensor, ...]:
        head, pages, window = self.head, (k_pages, v_pages), self.head.window or 0
        known = next_ids.index_select(0, logit_rows)
        chosen = next_ids.index_copy(0, logit_rows, torch.where(known < 0, argmax, known))
        leaf, committed, own_moves = greedy_walk(input_ids, chosen, tree_mask, page_table, lengths, row_starts, self.page_size)
        nothing = torch.full((2, 1), -1, dtype=torch.int64, device=input_ids.device)
        first_moves = moves if self.shape.num_steps == 1 else nothing
        positions = tree_positions(tree_mask, lengths, row_starts, input_ids)
        with _attending(pages, (tree_mask, page_table, lengths, row_starts, first_moves), window):
            pairs = head.over(chosen[None], head.take(hidden), positions, None, None)
        waiting = [own_moves]

        def step(tokens: Tensor, hidden: Tensor, masks: Tensor) -> Tensor:
            sequences, rows = tokens.shape
            starts = torch.arange(sequences + 1, dtype=torch.int32, device=tokens.device) * rows
            flat, mask = tokens.reshape(1, -1), masks.reshape(-1)
            positions = tree_positions(mask, committed, starts, flat)
            with _attending(pages, (mask, page_table, committed, starts, waiting.pop() if waiting else nothing), window):
                out = head.over(flat, hidden.reshape(1, -1, hidden.shape[2]), positions, None, None)
            return out.view(sequences, rows, -1)

        return draft(pairs[0].index_select(0, leaf)[:, None], step, head.draft_logits, head.draft_ids, self.shape)


def capture_drafting(drafting: Drafting, page_size: int) -> fx.GraphModule:
    """The graph of `drafting`; placeholders are named as the arguments of `_DraftStep.forward`, outputs as `draft`'s.

    Raises `CaptureError`.
    """
    head, shape = _clone(drafting.head), drafting.shape
    if len(head.chain) > 1:
        raise CaptureError(f"a head of {len(head.chain)} layers is not stitched into the graph")
    like: dict[str, Any] = {"device": head.device}
    one = torch.zeros(1, 1, dtype=torch.long, **like)
    try:
        with torch.no_grad():
            head.over(one, torch.zeros(1, 1, head.hidden_size, dtype=head.dtype, **like), one, None, None)
    except Exception as e:  # layers are the families' code
        raise CaptureError(f"the head's layer can't be driven by itself: {type(e).__name__}: {e}") from e
    sequences, rows, reads = 3, 11, 7
    ints = lambda *size: torch.zeros(size, dtype=torch.int32, **like)  # noqa: E731
    longs = lambda *size: torch.zeros(size, dtype=torch.int64, **like)  # noqa: E731
    inputs = {
        "input_ids": longs(1, rows),
        "next_ids": longs(rows),
        "hidden": torch.zeros(1, rows, head.hidden_size, dtype=head.dtype, **like),
        "argmax": longs(reads),
        "logit_rows": longs(reads),
        "tree_mask": longs(rows),
        "page_table": ints(sequences, 4),
        "lengths": ints(sequences),
        "row_starts": ints(sequences + 1),
        "moves": longs(2, 5),
        **{
            f"{name}_pages": torch.zeros(6, page_size, x.shape[1], x.shape[3], dtype=x.dtype, **like)
            for name, x in zip("kv", _bound.seen, strict=True)
        },
    }
    t, s = torch.export.Dim("rows", min=1, max=1 << 20), torch.export.Dim("sequences", min=1, max=1 << 16)
    r, p, m, n = (torch.export.Dim(name, min=1, max=1 << 30) for name in ("reads", "width", "moved", "pages"))
    dynamic: dict[str, Any] = {name: {0: t} for name in ("next_ids", "tree_mask")} | {name: {1: t} for name in ("input_ids", "hidden")}
    dynamic |= {"argmax": {0: r}, "logit_rows": {0: r}, "page_table": {0: s, 1: p}, "lengths": {0: s}, "row_starts": {0: s + 1}}
    dynamic |= {"moves": {1: m}, "k_pages": {0: n}, "v_pages": {0: n}}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(_DraftStep(head, shape, page_size), tuple(inputs.values()), dynamic_shapes=dynamic, strict=False)
    except CaptureError:
        raise
    except Exception as e:  # torch.export raises many kinds; all mean the same here
        raise CaptureError(f"the head: {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}") from e
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def _clone(head: MtpHead) -> MtpHead:
    """A copy that shares the storage of all weights, the target's included, and attends over pages."""
    AttentionInterface.register(HEAD_ATTENTION, _head_attention)
    memo = shared_storage(head) | {id(b): b for b in (head.draft_ids, head.draft_weight, head.draft_bias) if b is not None}
    for shared in head._unregistered:
        if isinstance(shared, nn.Module):
            memo |= shared_storage(shared)
    clone = copy.deepcopy(head, memo)
    for module in clone.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            make_traceable(config, HEAD_ATTENTION)
    return clone
