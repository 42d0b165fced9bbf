"""`specfx::greedy_walk`, `specfx::tree_positions` and `specfx::tree_parents` in Triton; the specifications are in `greedy_walk.py` and
`tree_attention.py`.

One program a sequence, and nothing read back to the host. A tree is at most 64 rows, so a program has all of it in registers and walks
it step by step; in a causal run it looks for the first token that was not chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfx.errors import LoweringError
from specfx.kernels.greedy_walk import greedy_walk
from specfx.kernels.tree_attention import tree_parents, tree_positions
from specfx.kernels.triton_common import jit, mask_words, ones, register_on_cuda, require, tl

BLOCK = 256
"""Rows of a causal run at a time."""


@jit
def _bit_length(x):
    """Of an int32 taken as unsigned: the place of its highest bit, counted from 1; 0 has none."""
    for shift in tl.static_range(5):
        x |= x >> (1 << shift)
    return ones(x)


@jit
def _positions(tree_mask, lengths, row_starts, out, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (S). out: ``[T]``."""
    sequence = tl.program_id(0)
    begin = tl.load(row_starts + sequence)
    rows, length = tl.load(row_starts + sequence + 1) - begin, tl.load(lengths + sequence)
    for at in range(0, rows, BLOCK):
        row = at + tl.arange(0, BLOCK)
        depth = row
        if HAS_MASK:
            low, high = mask_words(tree_mask + begin, row, (row < rows) & (rows <= 64), rows)
            depth = tl.where(rows <= 64, ones(low) + ones(high) - 1, row)
        tl.store(out + begin + row, (length + depth).to(tl.int64), mask=row < rows)


@jit
def _parent(tree_mask, row, inside):
    """Of each row of a tree, the highest bit below its own; -1 if there is none."""
    low, high = mask_words(tree_mask, row, inside, row)
    return tl.where(high != 0, 32 + _bit_length(high), _bit_length(low)) - 1


@jit
def _parents(tree_mask, row_starts, out, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (S). out: ``[T]``."""
    sequence, sequences = tl.program_id(0), tl.num_programs(0)
    begin = tl.load(row_starts + sequence)
    rows = tl.load(row_starts + sequence + 1) - begin
    for at in range(0, rows, BLOCK):
        row = at + tl.arange(0, BLOCK)
        parent = row - 1
        if HAS_MASK:
            parent = tl.where(rows <= 64, _parent(tree_mask + begin, row, (row < rows) & (rows <= 64)), parent)
        place = tl.where(parent < 0, sequence, sequences + begin + parent)
        tl.store(out + begin + row, place.to(tl.int64), mask=row < rows)


@jit
def _walk(
    tokens,
    chosen,
    tree_mask,
    page_table,
    lengths,
    row_starts,
    leaf,
    new_lengths,
    moves,
    total_rows,
    table_s,
    PAGE_SIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S). moves: ``[2, T]``; the last program also clears those of rows that belong to no sequence."""
    sequence = tl.program_id(0)
    begin, end = tl.load(row_starts + sequence), tl.load(row_starts + sequence + 1)
    rows, length = end - begin, tl.load(lengths + sequence)
    last = tl.full([], 0, tl.int32)
    walked = tl.full([], 1, tl.int32)
    tree = False
    if HAS_MASK:
        tree = rows <= 64
        if tree:
            row = tl.arange(0, 64)
            parent = _parent(tree_mask + begin, row, row < rows)
            inside = (row < rows) & (parent >= 0)
            token = tl.load(tokens + begin + row, mask=inside, other=0)
            right = inside & (token == tl.load(chosen + begin + parent, mask=inside, other=0))
            place = tl.full([64], 0, tl.int32)  # of a walked row, behind the committed tokens
            child = tl.min(tl.where(right & (parent == 0), row, 64))
            while child < 64:
                place = tl.where(row == child, walked, place)
                last = child
                walked += 1
                child = tl.min(tl.where(right & (parent == last), row, 64))
            moved = (place > 0) & (place != row)
            table = page_table + sequence.to(tl.int64) * table_s
            for side in tl.static_range(2):
                position = length + (row if side == 0 else place)
                page = tl.load(table + position // PAGE_SIZE, mask=moved, other=0).to(tl.int64)
                slot = tl.where(moved, page * PAGE_SIZE + position % PAGE_SIZE, -1)
                tl.store(moves + side * total_rows + begin + row, slot, mask=row < rows)
    if not tree:
        wrong = tl.maximum(rows, 1)
        for at in range(0, rows, BLOCK):
            row = at + tl.arange(0, BLOCK)
            inside = (row > 0) & (row < rows)
            token = tl.load(tokens + begin + row, mask=inside, other=0)
            right = token == tl.load(chosen + begin + row - 1, mask=inside, other=0)
            wrong = tl.minimum(wrong, tl.min(tl.where(inside & (right == 0), row, rows)))
            for side in tl.static_range(2):
                tl.store(moves + side * total_rows + begin + row, tl.full([BLOCK], -1, tl.int64), mask=row < rows)
        last, walked = wrong - 1, wrong
    tl.store(leaf + sequence, (begin + last).to(tl.int64))
    tl.store(new_lengths + sequence, length + walked)
    if sequence == tl.num_programs(0) - 1:
        for at in range(end, total_rows, BLOCK):
            row = at + tl.arange(0, BLOCK)
            for side in tl.static_range(2):
                tl.store(moves + side * total_rows + row, tl.full([BLOCK], -1, tl.int64), mask=row < total_rows)


def greedy_walk_triton(
    input_ids: Tensor, chosen: Tensor, tree_mask: Tensor | None, page_table: Tensor, lengths: Tensor, row_starts: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`specfx.kernels.greedy_walk`'s op. Raises `LoweringError`."""
    require(_walk, input_ids)
    _check(input_ids=(input_ids, torch.int64), chosen=(chosen, torch.int64), tree_mask=(tree_mask, torch.int64))
    _check(page_table=(page_table, torch.int32), lengths=(lengths, torch.int32), row_starts=(row_starts, torch.int32))
    rows, sequences = input_ids.shape[1], lengths.shape[0]
    leaf, new_lengths = input_ids.new_empty(sequences), torch.empty_like(lengths)
    moves = input_ids.new_empty(2, rows)
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    _walk[(sequences,)](
        input_ids.contiguous(), chosen.contiguous(), None if tree_mask is None else tree_mask.contiguous(),
        page_table, lengths.contiguous(), row_starts.contiguous(), leaf, new_lengths, moves, rows, page_table.stride(0),
        PAGE_SIZE=page_size, HAS_MASK=tree_mask is not None, BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return leaf, new_lengths, moves


def tree_positions_triton(tree_mask: Tensor | None, lengths: Tensor, row_starts: Tensor, input_ids: Tensor) -> Tensor:
    """`specfx.kernels.tree_attention`'s `tree_positions`. Raises `LoweringError`."""
    require(_positions, input_ids)
    _check(tree_mask=(tree_mask, torch.int64), lengths=(lengths, torch.int32), row_starts=(row_starts, torch.int32))
    out = torch.empty_like(input_ids, dtype=torch.int64, memory_format=torch.contiguous_format)
    _positions[(lengths.shape[0],)](
        None if tree_mask is None else tree_mask.contiguous(), lengths.contiguous(), row_starts.contiguous(), out,
        HAS_MASK=tree_mask is not None, BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return out


def tree_parents_triton(tree_mask: Tensor | None, row_starts: Tensor, input_ids: Tensor) -> Tensor:
    """`specfx.kernels.tree_attention`'s `tree_parents`. Raises `LoweringError`."""
    require(_parents, input_ids)
    _check(tree_mask=(tree_mask, torch.int64), row_starts=(row_starts, torch.int32))
    out = input_ids.new_empty(input_ids.shape[1], dtype=torch.int64)
    _parents[(row_starts.shape[0] - 1,)](
        None if tree_mask is None else tree_mask.contiguous(), row_starts.contiguous(), out,
        HAS_MASK=tree_mask is not None, BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return out


def _check(**tensors: tuple[Tensor | None, torch.dtype]) -> None:
    for name, (x, dtype) in tensors.items():
        if x is not None and x.dtype != dtype:
            raise LoweringError(f"a Triton kernel was given {name} of {x.dtype}: cast it to {dtype}")


def register() -> None:
    """Make these the ops' kernels on CUDA devices; again: nothing. Raises `LoweringError` (no Triton, no CUDA device)."""
    register_on_cuda(greedy_walk, greedy_walk_triton)
    register_on_cuda(tree_positions, tree_positions_triton)
    register_on_cuda(tree_parents, tree_parents_triton)
