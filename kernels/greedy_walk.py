"""`specfx::greedy_walk`: which rows of each sequence's tree the target agrees with, found inside the graph.

From a sequence's first row the walk goes to the child whose token was chosen behind its parent, for as long as there is one (greedy
verification: Leviathan et al., 2023; of trees: Miao et al., 2023). The rows of a prompt are a chain in which every token was "chosen".

The sampled walk is this op too. A token's noise belongs to its place in its sequence and not to the draw (`keyed_sample`), so the choice
behind a row does not depend on whether the walk comes there: draw behind all rows at once, with the key's position being the row's
standing position (`tree_positions`) plus one, and walk along what was drawn. That commits what drawing token by token would.

==============  =================  ===================================================================================
argument        shape              meaning
==============  =================  ===================================================================================
input_ids       int64 ``[1, T]``   the token of each row
chosen          int64 ``[T]``      the token chosen behind each row
tree_mask, page_table, lengths, row_starts  as in `specfx.kernels.tree_attention`
==============  =================  ===================================================================================

Returns ``leaf`` int64 ``[S]``, the walk's last row (counted over all sequences); ``lengths`` int32 ``[S]`` with the walked rows
committed; ``moves`` int64 ``[2, T]``, the slots from and to which their keys and values have to be moved for that, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfx.kernels.library import define_op
from specfx.kernels.tree_attention import MASK_BITS


def greedy_walk_reference(
    input_ids: Tensor, chosen: Tensor, tree_mask: Tensor | None, page_table: Tensor, lengths: Tensor, row_starts: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification; see the module's docstring."""
    tokens, choices, starts, old = input_ids[0].tolist(), chosen.tolist(), row_starts.tolist(), lengths.tolist()
    masks = None if tree_mask is None else tree_mask.tolist()
    leaves, new = [], []
    moves = [[-1] * len(tokens), [-1] * len(tokens)]
    for s, length in enumerate(old):
        begin, rows = starts[s], starts[s + 1] - starts[s]
        walked = [0]
        for row in range(1, rows):
            parent = row - 1
            if masks is not None and rows <= MASK_BITS:
                parent = (masks[begin + row] & ((1 << row) - 1)).bit_length() - 1
            if parent == walked[-1] and tokens[begin + row] == choices[begin + parent]:
                walked.append(row)
        for place, row in enumerate(walked):
            if place != row:
                moves[0][begin + row], moves[1][begin + row] = (
                    int(page_table[s, position // page_size]) * page_size + position % page_size
                    for position in (length + row, length + place)
                )
        leaves.append(begin + walked[-1])
        new.append(length + len(walked))
    device = input_ids.device
    return (
        torch.tensor(leaves, dtype=torch.int64, device=device),
        torch.tensor(new, dtype=torch.int32, device=device),
        torch.tensor(moves, dtype=torch.int64, device=device),
    )


def _fake(
    input_ids: Tensor, chosen: Tensor, tree_mask: Tensor | None, page_table: Tensor, lengths: Tensor, row_starts: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(lengths, dtype=torch.int64),
        torch.empty_like(lengths),
        input_ids.new_empty(2, input_ids.shape[1]),
    )


greedy_walk = define_op(
    "greedy_walk(Tensor input_ids, Tensor chosen, Tensor? tree_mask, Tensor page_table, Tensor lengths, Tensor row_starts, int page_size) "
    "-> (Tensor leaf, Tensor new_lengths, Tensor moves)",
    reference=greedy_walk_reference,
    fake=_fake,
)
