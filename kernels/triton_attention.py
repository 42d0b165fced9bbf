"""`specfx::tree_attention_` in Triton. The specification is `specfx.kernels.tree_attention`; the op is two or three launches:

1. `_move` (only if there are moves): last step's accepted nodes go to their places. It can't share a launch with what follows, whose
   programs read the moved slots in no order. A program has one head of K or V; it loads a block of moved rows, waits, and stores them,
   which is the same as one by one, in order, unless a move of the block reads or overwrites what an earlier one wrote: then it does go
   one by one. (An accepted path never makes it: its sources ascend and lie behind their targets.)
2. `_attend`: flash-decoding (Dao et al., 2023). Programs are (block of queries, KV head, part of the prefix). The queries of a block
   are rows of one sequence times the query heads that share the KV head, packed in the M dimension of the products, since the rows of
   a tree alone would not fill them. The parts of the prefix are read from the pages (paged KV: vLLM, Kwon et al., 2023); the last part
   also has the new rows, which it reads from the op's inputs under the tree mask, a word of 64 ancestor bits for each row (SpecInfer,
   Miao et al., 2023), or as a causal run. Further programs of the same launch append the new rows to the pages: they write slots at
   positions >= length, the others read slots at positions < length.
3. `_merge` (only if the prefix is split): the parts' outputs, float32, are summed with weights from their log-sum-exps.

A batch is ragged and its bounds are on the device. The grid depends on what the host knows (numbers of rows, sequences and heads, and
the `Config`), so that the launches can be captured in a CUDA graph: a program finds its sequence by scanning `row_starts`, programs
that turn out to have no work exit at once.

Hazards. Pages hold anything, also NaN, where no committed token is: loads are masked by position with 0 in place of what is masked,
in V too, for a weight of 0 times NaN is NaN. Sums are float32; products of float32 are IEEE, not TF32. Offsets into pools and rows are
64-bit. A part that has no keys leaves only a log-sum-exp of -inf, and its scratch is not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfx.errors import LoweringError
from specfx.kernels.tree_attention import tree_append_, tree_attention_
from specfx.kernels.triton_attend import append_rows, attend_rows, block_rows, find_block
from specfx.kernels.triton_common import LOG2E, REGISTERS, interpreted, jit, power_of_two, register_on_cuda, require, tl
from specfx.kernels.triton_config import Config, default_config, device_properties

MOVES = 32
"""Moved rows that a program of `_move` holds at a time."""
APPENDED = 32
"""New rows that a program of `_append` has."""


# --- kernels --------------------------------------------------------------------------------------------------------------------


@jit
def _move(
    moves,
    k_pages,
    v_pages,
    count,
    move_s,
    move_m,
    GROUPS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (KV heads, 2). moves: ``[2, count]`` with strides (move_s, move_m); the pools as ``[slots, GROUPS, D]``."""
    if tl.program_id(1) == 0:
        _move_head(moves, k_pages + tl.program_id(0) * DK, count, move_s, move_m, GROUPS * DK, DK, BLOCK, BLOCK_DK)
    else:
        _move_head(moves, v_pages + tl.program_id(0) * DV, count, move_s, move_m, GROUPS * DV, DV, BLOCK, BLOCK_DV)


@jit
def _move_head(moves, slots, count, move_s, move_m, SLOT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    lane, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    for first in range(0, count, BLOCK):
        m = first + lane
        source = tl.load(moves + m * move_m, mask=m < count, other=-1)
        target = tl.load(moves + move_s + m * move_m, mask=m < count, other=-1)
        written = target[None, :]  # does an earlier move of this block write what a later one reads or writes?
        earlier = (lane[None, :] < lane[:, None]) & (written >= 0)
        depends = tl.sum((earlier & ((source[:, None] == written) | (target[:, None] == written))).to(tl.int32))
        if depends == 0:
            mask = (source >= 0)[:, None] & (d < D)[None, :]
            rows = tl.load(slots + source[:, None] * SLOT + d[None, :], mask=mask)
            tl.debug_barrier()  # all of the block is read before any of it is written
            tl.store(slots + target[:, None] * SLOT + d[None, :], rows, mask=mask)
            tl.debug_barrier()  # and written before the next one is read
        else:
            for i in range(first, tl.minimum(first + BLOCK, count)):
                origin = tl.load(moves + i * move_m)
                row = tl.load(slots + origin * SLOT + d, mask=(origin >= 0) & (d < D))
                tl.debug_barrier()
                tl.store(slots + tl.load(moves + move_s + i * move_m) * SLOT + d, row, mask=(origin >= 0) & (d < D))
                tl.debug_barrier()


@jit
def _attend(
    q,
    k,
    v,
    out,
    logs,
    tree_mask,
    page_table,
    lengths,
    row_starts,
    k_pages,
    v_pages,
    sinks,
    scale,
    cap,
    window,
    skip,
    sequences,
    total_rows,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    table_s,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (blocks of queries, KV heads, SPLITS + 1). out: ``[T, Hq, DV]``, or float32 ``[SPLITS, T, Hq, DV]`` with logs
    ``[SPLITS, T, Hq]`` (base 2) if the prefix is split. scale, cap: see the launcher. x_t, x_h: strides of rows and heads."""
    block, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)

    sequence, row0, rows, length, first_query = find_block(block, lengths, row_starts, sequences, SHARE, BLOCK_M)
    if first_query >= rows * SHARE:
        return

    row, at_row, head, live = block_rows(first_query, row0, rows, group, SHARE, BLOCK_M)
    table = page_table + sequence.to(tl.int64) * table_s
    if split == SPLITS:
        new = live & ((first_query + tl.arange(0, BLOCK_M)) % SHARE == 0)
        append_rows(
            k, v, k_pages, v_pages, table, row, at_row, new, length, group, k_t, k_h, v_t, v_h,
            GROUPS, DK, DV, PAGE_SIZE, BLOCK_DK, BLOCK_DV,
        )  # fmt: skip
        return

    acc, log = attend_rows(
        q, k, v, tree_mask, table, k_pages, v_pages, sinks, scale, cap, window, skip,
        first_query, row0, rows, length, row, at_row, head, live, group, split, q_t, q_h, k_t, k_h, v_t, v_h,
        GROUPS, SHARE, DK, DV, PAGE_SIZE, HAS_MASK, HAS_WINDOW, HAS_SKIP, HAS_SOFTCAP, HAS_SINKS, WIDE,
        BLOCK_M, BLOCK_N, BLOCK_DK, BLOCK_DV, SPLITS,
    )  # fmt: skip
    dv = tl.arange(0, BLOCK_DV)
    mask = live[:, None] & (dv < DV)[None, :]
    at = at_row * (GROUPS * SHARE) + head
    if SPLITS > 1:
        at += split.to(tl.int64) * total_rows * (GROUPS * SHARE)
        tl.store(logs + at, log, mask=live)
        mask &= (log > float("-inf"))[:, None]
    at_out = at[:, None] * DV + dv[None, :]  # summed before the pointer: otherwise the largest blocks spill
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=mask)


@jit
def _append(
    k, v, page_table, lengths, row_starts, k_pages, v_pages, sequences, k_t, k_h, v_t, v_h, table_s,
    GROUPS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, KV heads). What the further programs of `_attend` do, by itself."""
    block, group = tl.program_id(0), tl.program_id(1)
    sequence, row0, rows, length, first_row = find_block(block, lengths, row_starts, sequences, 1, BLOCK_M)
    if first_row >= rows:
        return
    row, at_row, _, new = block_rows(first_row, row0, rows, group, 1, BLOCK_M)
    table = page_table + sequence.to(tl.int64) * table_s
    append_rows(
        k, v, k_pages, v_pages, table, row, at_row, new, length, group, k_t, k_h, v_t, v_h, GROUPS, DK, DV, PAGE_SIZE, BLOCK_DK, BLOCK_DV
    )


@jit
def _merge(parts, logs, out, heads_of_all, DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr):
    """Grid (T * Hq). parts: float32 ``[SPLITS, T * Hq, DV]``, logs: ``[SPLITS, T * Hq]``, out: ``[T * Hq, DV]``."""
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    here = tl.program_id(0).to(tl.int64)
    at = s.to(tl.int64) * heads_of_all + here
    log = tl.load(logs + at, mask=s < SPLITS, other=float("-inf"))
    weight = tl.exp2(log - tl.max(log))
    used = (weight > 0)[:, None] & (d < DV)[None, :]
    part = tl.load(parts + at[:, None] * DV + d[None, :], mask=used, other=0.0)
    merged = tl.sum(part * weight[:, None], 0) / tl.sum(weight)
    tl.store(out + here * DV + d, merged.to(out.dtype.element_ty), mask=d < DV)


_INTERPRETED = interpreted(_attend)


# --- launcher -------------------------------------------------------------------------------------------------------------------


def tree_attention_triton(
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
    config: Config | None = None,
) -> Tensor:
    """`specfx.kernels.tree_attention`'s op. config: `default_config`'s if None. Raises `LoweringError`."""
    require(_attend, q)
    _check(q, k, v, k_pages, v_pages)
    _launch_move(moves, k_pages, v_pages)
    return _launch_attend(
        q, k, v, tree_mask, page_table, lengths, row_starts, k_pages, v_pages, scale, window, softcap, sinks, skip, config, append=True
    )


def tree_append_triton(
    k: Tensor, v: Tensor, page_table: Tensor, lengths: Tensor, row_starts: Tensor, moves: Tensor, k_pages: Tensor, v_pages: Tensor
) -> None:
    """`specfx.kernels.tree_attention`'s `tree_append_`. Raises `LoweringError`."""
    require(_append, k)
    _check(k, k, v, k_pages, v_pages)
    _launch_move(moves, k_pages, v_pages)
    rows, groups, dk = k.shape
    if rows == 0:
        return
    k, v, page_table = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v, page_table))
    _append[(rows // APPENDED + lengths.shape[0], groups)](
        k, v, page_table, lengths.contiguous(), row_starts.contiguous(), k_pages, v_pages, lengths.shape[0],
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), page_table.stride(0),
        GROUPS=groups, DK=dk, DV=v.shape[2], PAGE_SIZE=k_pages.shape[1],
        BLOCK_M=APPENDED, BLOCK_DK=power_of_two(dk), BLOCK_DV=power_of_two(v.shape[2]), num_warps=4,
    )  # fmt: skip


def tree_attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    row_starts: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    skip: int = 0,
    config: Config | None = None,
) -> Tensor:
    """The op's output alone: nothing is moved or appended, and of the pools only what is committed is read. Raises `LoweringError`."""
    require(_attend, q)
    _check(q, k, v, k_pages, v_pages)
    return _launch_attend(
        q, k, v, tree_mask, page_table, lengths, row_starts, k_pages, v_pages, scale, window, softcap, sinks, skip, config, append=False
    )


def _launch_move(moves: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    if moves.shape[1] > 0:
        _, _, groups, dk = k_pages.shape
        dv = v_pages.shape[3]
        _move[(groups, 2)](
            moves, k_pages, v_pages, moves.shape[1], moves.stride(0), moves.stride(1),
            GROUPS=groups, DK=dk, DV=dv, BLOCK=MOVES, BLOCK_DK=power_of_two(dk), BLOCK_DV=power_of_two(dv), num_warps=4,
        )  # fmt: skip


def logit_factors(scale: float, softcap: float) -> tuple[float, float]:
    """What the kernels take as scale and cap: logits in base 2, and softcap * tanh(x * scale / softcap) as
    cap - 2 cap / (1 + exp2(x * 2 log2(e) scale / softcap))."""
    return LOG2E * scale * (2 / softcap if softcap else 1), LOG2E * softcap


def _launch_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree_mask: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    row_starts: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    skip: int,
    config: Config | None,
    append: bool,
) -> Tensor:
    rows, heads, groups, dk, dv = q.shape[0], q.shape[1], k.shape[1], k.shape[2], v.shape[2]
    out = q.new_empty(rows, heads, dv)
    if rows == 0:
        return out
    page_size, sequences = k_pages.shape[1], lengths.shape[0]
    if config is None:
        config = default_config(
            max(dk, dv), q.dtype, rows, sequences, page_size,
            groups=groups, share=heads // groups, pages=page_table.shape[1], **device_properties(q.device),
        )  # fmt: skip
    split = config.SPLITS > 1
    parts = q.new_empty(config.SPLITS, rows, heads, dv, dtype=torch.float32) if split else out
    logs = q.new_empty(config.SPLITS, rows, heads, dtype=torch.float32) if split else out
    q, k, v, page_table = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, page_table))
    blocks = rows * (heads // groups) // config.BLOCK_M + sequences
    _attend[(blocks, groups, config.SPLITS + append)](
        q, k, v, parts, logs,
        tree_mask if tree_mask is None else tree_mask.contiguous(),
        page_table, lengths.contiguous(), row_starts.contiguous(), k_pages, v_pages,
        sinks if sinks is None else sinks.contiguous(), *logit_factors(scale, softcap),
        window, skip, sequences, rows, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), page_table.stride(0),
        GROUPS=groups, SHARE=heads // groups, DK=dk, DV=dv, PAGE_SIZE=page_size,
        HAS_MASK=tree_mask is not None, HAS_WINDOW=window > 0, HAS_SKIP=skip > 0, HAS_SOFTCAP=softcap != 0,
        HAS_SINKS=sinks is not None,
        WIDE=_INTERPRETED,
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_DK=power_of_two(dk, 16), BLOCK_DV=power_of_two(dv, 16),
        SPLITS=config.SPLITS, num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=REGISTERS,
    )  # fmt: skip
    if split:
        _merge[(rows * heads,)](
            parts, logs, out, rows * heads,
            DV=dv, SPLITS=config.SPLITS, BLOCK_DV=power_of_two(dv), BLOCK_S=power_of_two(config.SPLITS), num_warps=2,
        )  # fmt: skip
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise LoweringError(f"specfx::tree_attention_ has no Triton kernel for {q.dtype}: use float16, bfloat16 or float32")
    if any(x.dtype != q.dtype for x in (k, v, k_pages, v_pages)):
        raise LoweringError(f"specfx::tree_attention_: q is {q.dtype}, k, v or a pool is not: cast them, or make pools of that dtype")
    if k.shape[1:] != k_pages.shape[2:] or v.shape[1:] != v_pages.shape[2:] or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, k_pages, v_pages))
        raise LoweringError(f"specfx::tree_attention_: q, k, v and the pools don't fit each other: {shapes}")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise LoweringError("specfx::tree_attention_: pools must be contiguous")


def register() -> None:
    """Make these the ops' kernels on CUDA devices; again: nothing. Raises `LoweringError` (no Triton, no CUDA device)."""
    register_on_cuda(tree_attention_, tree_attention_triton)
    register_on_cuda(tree_append_, tree_append_triton)
