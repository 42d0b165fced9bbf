"""`specfx::tree_attention_`: append to paged KV, move last step's accepted nodes, attend under a tree mask. One op, in place.

One fused op, because separate append and attend ops on one tensor make Inductor clone the cache (DESIGN, measured). A batch is
*flat and ragged*: the rows of all sequences stand behind each other without padding.

=============  =================  ====================================================================================
argument       shape              meaning
=============  =================  ====================================================================================
q, k           ``[T, H*, Dk]``    rows of all sequences, ``Hq`` a multiple of ``Hkv``
v              ``[T, Hkv, Dv]``   ``Dv`` may differ from ``Dk`` (MLA)
tree_mask      int64 ``[T]``      bit ``j`` of a row: row ``j`` of the same sequence is visible (itself and its ancestors).
                                  Not read for a sequence of more than 64 rows, nor if None: it is a causal run.
page_table     int32 ``[S, P]``   page numbers of each sequence, in order of position
lengths        int32 ``[S]``      committed tokens of each sequence: its new rows are appended from this position on
row_starts     int32 ``[S + 1]``  rows of sequence ``s`` are ``row_starts[s] : row_starts[s + 1]``
moves          int64 ``[2, M]``   slots (page * page_size + offset) from, to; done in order before all else, both
                                  negative: nothing. Compacts the accepted path of the last step.
k_pages        ``[N, ps, Hkv, D]``  the pools, written in place
=============  =================  ====================================================================================

Row ``i`` of a sequence is stored at position ``lengths[s] + i`` but *stands* at ``lengths[s] + depth``, where depth is the number of
its ancestors; a sliding window is measured between standing positions. What stands before position ``skip`` is seen by none that stands
behind it (a layer of a draft head whose first rows stand for nothing). Ancestor masks after SpecInfer (Miao et al., 2023),
paged KV after vLLM (Kwon et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specfx.kernels.attention import masked_attention
from specfx.kernels.library import define_op

MASK_BITS = 64


def _ancestors(tree_mask: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """bool ``[rows, rows]``: which rows of one sequence see which."""
    if tree_mask is None or rows > MASK_BITS:
        return torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    return (tree_mask[:, None] >> torch.arange(rows, device=device)) & 1 != 0


def tree_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    row_starts: Tensor,
    moves: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    skip: int = 0,
) -> Tensor:
    """The specification; see the module's table. Returns ``[T, Hq, Dv]``."""
    tree_append_reference(k, v, page_table, lengths, row_starts, moves, k_pages, v_pages)
    flat_k, flat_v = k_pages.flatten(0, 1), v_pages.flatten(0, 1)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for here, length, slots in _places(page_table, lengths, row_starts, k_pages.shape[1]):
        rows = here.stop - here.start
        ancestors = _ancestors(None if tree_mask is None else tree_mask[here], rows, q.device)
        visible = torch.cat([ancestors.new_ones(rows, length), ancestors], 1)
        standing = torch.cat([torch.arange(length, device=q.device), length + ancestors.sum(1) - 1])
        if window:
            visible &= standing[None, :] > standing[length:, None] - window
        visible &= (standing[None, :] >= skip) | (standing[length:, None] < skip)
        out[here] = masked_attention(q[here], flat_k[slots], flat_v[slots], visible, scale, softcap, sinks)
    return out


def tree_append_reference(
    k: Tensor, v: Tensor, page_table: Tensor, lengths: Tensor, row_starts: Tensor, moves: Tensor, k_pages: Tensor, v_pages: Tensor
) -> None:
    """What the op does to the pools: moves, then appends."""
    flat_k, flat_v = (pages.view(-1, *pages.shape[2:]) for pages in (k_pages, v_pages))  # never a copy
    for source, target in moves.t().tolist():
        if source >= 0:
            flat_k[target], flat_v[target] = flat_k[source], flat_v[source]
    for here, length, slots in _places(page_table, lengths, row_starts, k_pages.shape[1]):
        flat_k[slots[length:]], flat_v[slots[length:]] = k[here], v[here]


def _places(page_table: Tensor, lengths: Tensor, row_starts: Tensor, page_size: int) -> Iterator[tuple[slice, int, Tensor]]:
    """Of each sequence: its rows, its committed tokens, and the slots of those and of the rows behind them."""
    starts = row_starts.tolist()
    for s, length in enumerate(lengths.tolist()):
        here = slice(starts[s], starts[s + 1])
        position = torch.arange(length + here.stop - here.start, device=page_table.device)
        yield here, length, page_table[s].long()[position // page_size] * page_size + position % page_size


def _tree_attention_fake(q: Tensor, k: Tensor, v: Tensor, *metadata_caches_constants: object, **more: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def tree_positions_reference(tree_mask: Tensor | None, lengths: Tensor, row_starts: Tensor, input_ids: Tensor) -> Tensor:
    """Standing positions of all rows, int64 ``[1, T]`` (`input_ids` ``[1, T]`` gives T and the device)."""
    starts = row_starts.tolist()
    parts = []
    for s, length in enumerate(lengths.tolist()):
        here = slice(starts[s], starts[s + 1])
        mask = None if tree_mask is None else tree_mask[here]
        parts.append(length + _ancestors(mask, here.stop - here.start, input_ids.device).sum(1) - 1)
    return torch.cat(parts)[None]


def _tree_positions_fake(tree_mask: Tensor | None, lengths: Tensor, row_starts: Tensor, input_ids: Tensor) -> Tensor:
    return torch.empty_like(input_ids, dtype=torch.int64)


def tree_parents_reference(tree_mask: Tensor | None, row_starts: Tensor, input_ids: Tensor) -> Tensor:
    """What each row hangs on, int64 ``[T]``: row ``p`` as ``S + p`` (over all sequences), and for the first row of sequence s just
    ``s``, so that it indexes a list of what was last committed of each sequence, followed by the rows."""
    starts = row_starts.tolist()
    sequences = len(starts) - 1
    parts = []
    for s in range(sequences):
        rows = starts[s + 1] - starts[s]
        mask = None if tree_mask is None else tree_mask[starts[s] : starts[s + 1]]
        above = _ancestors(mask, rows, input_ids.device).tril(-1)
        place = (
            torch.where(above, torch.arange(rows, device=input_ids.device), -1).amax(1) if rows else above.new_empty(0, dtype=torch.int64)
        )
        parts.append(torch.where(place < 0, s, sequences + starts[s] + place))
    return torch.cat(parts)


def _tree_parents_fake(tree_mask: Tensor | None, row_starts: Tensor, input_ids: Tensor) -> Tensor:
    return input_ids.new_empty(input_ids.shape[1], dtype=torch.int64)


tree_attention_ = define_op(
    "tree_attention_(Tensor q, Tensor k, Tensor v, Tensor? tree_mask, Tensor page_table, Tensor lengths, Tensor row_starts, Tensor moves, "
    "Tensor(a!) k_pages, Tensor(b!) v_pages, float scale, int window=0, float softcap=0.0, Tensor? sinks=None, int skip=0) "
    "-> Tensor",
    reference=tree_attention_reference,
    fake=_tree_attention_fake,
)

tree_append_ = define_op(
    "tree_append_(Tensor k, Tensor v, Tensor page_table, Tensor lengths, Tensor row_starts, Tensor moves, Tensor(a!) k_pages, "
    "Tensor(b!) v_pages) -> ()",
    reference=tree_append_reference,
    fake=lambda *arguments: None,
)
"""The part of `tree_attention_` that writes, for a lowering that attends in a kernel of its own."""

tree_positions = define_op(
    "tree_positions(Tensor? tree_mask, Tensor lengths, Tensor row_starts, Tensor input_ids) -> Tensor",
    reference=tree_positions_reference,
    fake=_tree_positions_fake,
)

tree_parents = define_op(
    "tree_parents(Tensor? tree_mask, Tensor row_starts, Tensor input_ids) -> Tensor",
    reference=tree_parents_reference,
    fake=_tree_parents_fake,
)
