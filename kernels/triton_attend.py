"""What the programs of tree attention do, in functions that the plain kernels (`triton_attention.py`) and Inductor's template
(`inductor_attention.py`) share. Their arguments are named as there.
"""

from __future__ import annotations

from specfx.kernels.triton_common import jit, mask_words, ones, tl


@jit
def find_block(block, lengths, row_starts, sequences, SHARE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The block's sequence, the first of its rows, their number, its committed tokens, and the block's first query; that is not one of
    the sequence's ``rows * SHARE`` if the block has no work."""
    # Sequence s has the blocks from row_starts[s] * SHARE // BLOCK_M + s on: as many as it needs, or one more.
    count = tl.full([], 0, tl.int32)
    for first_s in range(0, sequences, 128):
        s = first_s + tl.arange(0, 128)
        start = tl.load(row_starts + s, mask=s < sequences, other=0)
        count += tl.sum(((start * SHARE // BLOCK_M + s <= block) & (s < sequences)).to(tl.int32))
    sequence = count - 1
    row0 = tl.load(row_starts + sequence).to(tl.int32)
    rows = tl.load(row_starts + sequence + 1).to(tl.int32) - row0
    length = tl.load(lengths + sequence).to(tl.int32)
    first_query = (block - row0 * SHARE // BLOCK_M - sequence) * BLOCK_M
    return sequence, row0, rows, length, first_query


@jit
def block_rows(first_query, row0, rows, group, SHARE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each query of a block: its row in the sequence and over all, its head, and whether there is such a query."""
    query = first_query + tl.arange(0, BLOCK_M)
    row = query // SHARE
    return row, (row0 + row).to(tl.int64), group * SHARE + query % SHARE, query < rows * SHARE


@jit
def append_rows(
    k, v, k_pages, v_pages, table, row, at_row, new, length, group, k_t, k_h, v_t, v_h,
    GROUPS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Writes those rows that are `new` to their slots, for the KV head `group`."""
    dk, dv = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    position = length + row
    page = tl.load(table + position // PAGE_SIZE, mask=new, other=0).to(tl.int64)
    slot = ((page * PAGE_SIZE + position % PAGE_SIZE) * GROUPS + group)[:, None]
    mask_k, mask_v = new[:, None] & (dk < DK)[None, :], new[:, None] & (dv < DV)[None, :]
    new_k = tl.load(k + at_row[:, None] * k_t + group * k_h + dk[None, :], mask=mask_k)
    tl.store(k_pages + slot * DK + dk[None, :], new_k, mask=mask_k)
    new_v = tl.load(v + at_row[:, None] * v_t + group * v_h + dv[None, :], mask=mask_v)
    tl.store(v_pages + slot * DV + dv[None, :], new_v, mask=mask_v)


@jit
def _dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a @ b. WIDE: in float32 (Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers)."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def _fold(acc, top, total, q, k, v, visible, scale, cap, HAS_SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    """One more block of keys k ``[DK, N]`` and values v ``[N, DV]`` in the running softmax: acc ``[M, DV]``, its weights' sum `total`
    and the largest logit `top` (base 2), ``[M]``."""
    scores = _dot(q, k, tl.zeros(visible.shape, tl.float32), WIDE) * scale
    if HAS_SOFTCAP:
        scores = cap - 2 * cap / (1 + tl.exp2(scores))  # cap * tanh
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a query may have seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    acc = _dot(weights.to(v.dtype), v, acc * shrink[:, None], WIDE)
    return acc, higher, total * shrink + tl.sum(weights, 1)


@jit
def attend_rows(
    q, k, v, tree_mask, table, k_pages, v_pages, sinks, scale, cap, window, skip,
    first_query, row0, rows, length, row, at_row, head, live, group, split, q_t, q_h, k_t, k_h, v_t, v_h,
    GROUPS: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Attention of a block's queries over part `split` of the prefix, the last one with the new rows: float32 ``[BLOCK_M, BLOCK_DV]``,
    and its log-sum-exp ``[BLOCK_M]`` in base 2, -inf where there was no key."""
    n, dk, dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    depth = row
    tree = False
    if HAS_MASK:
        tree = rows <= 64
        low_word, high_word = mask_words(tree_mask + row0, row, live, rows)
        depth = tl.where(tree, ones(low_word) + ones(high_word) - 1, row)

    oldest = 0  # no query of this block sees a key that stands before it
    if HAS_WINDOW:
        oldest = tl.maximum(length + tl.min(tl.where(live, depth, rows)) - window + 1, 0)
    low = tl.minimum(oldest, length) // BLOCK_N * BLOCK_N
    a_split = tl.cdiv(tl.cdiv(length - low, BLOCK_N), SPLITS) * BLOCK_N
    begin = low + split * a_split
    end = tl.minimum(begin + a_split, length)

    queries = tl.load(
        q + at_row[:, None] * q_t + head.to(tl.int64)[:, None] * q_h + dk[None, :], mask=live[:, None] & (dk < DK)[None, :], other=0.0
    )
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # a logit without a value, in the last part
        last = split == SPLITS - 1
        top = tl.where(last, tl.load(sinks + head).to(tl.float32) * 1.4426950408889634, top)  # log2(e)
        total = tl.where(last, 1.0, total)

    for at in range(begin, end, BLOCK_N):  # committed tokens
        position = at + n
        inside = position < length
        if PAGE_SIZE % BLOCK_N == 0:  # in one page: 64-bit offsets for the block, 32-bit ones in it
            slot = (tl.load(table + at // PAGE_SIZE).to(tl.int64) * PAGE_SIZE + at % PAGE_SIZE) * GROUPS + group
            k_at = (k_pages + slot * DK) + (n[None, :] * (GROUPS * DK) + dk[:, None])
            v_at = (v_pages + slot * DV) + (n[:, None] * (GROUPS * DV) + dv[None, :])
        else:
            page = tl.load(table + position // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
            slot = (page * PAGE_SIZE + position % PAGE_SIZE) * GROUPS + group
            k_at = k_pages + slot[None, :] * DK + dk[:, None]
            v_at = v_pages + slot[:, None] * DV + dv[None, :]
        keys = tl.load(k_at, mask=inside[None, :] & (dk < DK)[:, None], other=0.0)
        values = tl.load(v_at, mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
        visible = tl.broadcast_to(inside[None, :], [BLOCK_M, BLOCK_N])
        if HAS_WINDOW:
            visible &= position[None, :] > (length + depth - window)[:, None]
        if HAS_SKIP:
            visible &= (position >= skip)[None, :] | (length + depth < skip)[:, None]
        acc, top, total = _fold(acc, top, total, queries, keys, values, visible, scale, cap, HAS_SOFTCAP, WIDE)

    if split == SPLITS - 1:  # new rows
        begin = tl.maximum(oldest - length, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum((first_query + BLOCK_M - 1) // SHARE + 1, rows)
        if HAS_MASK:
            begin, end = tl.where(tree, 0, begin), tl.where(tree, rows, end)
        for at in range(begin, end, BLOCK_N):
            j = at + n
            inside = j < rows
            first_row = (row0 + at).to(tl.int64)
            k_at = (k + first_row * k_t + group * k_h) + (n[None, :] * k_t + dk[:, None])
            v_at = (v + first_row * v_t + group * v_h) + (n[:, None] * v_t + dv[None, :])
            keys = tl.load(k_at, mask=inside[None, :] & (dk < DK)[:, None], other=0.0)
            values = tl.load(v_at, mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
            visible = j[None, :] <= row[:, None]
            depth_j = j
            if HAS_MASK:
                word = tl.where((j < 32)[None, :], low_word[:, None], high_word[:, None])
                visible = tl.where(tree, ((word >> (j & 31)[None, :]) & 1) != 0, visible)
                if HAS_WINDOW or HAS_SKIP:
                    low_j, high_j = mask_words(tree_mask + row0, j, inside, rows)
                    depth_j = tl.where(tree, ones(low_j) + ones(high_j) - 1, j)
            visible &= inside[None, :]
            if HAS_WINDOW:
                visible &= depth_j[None, :] > (depth - window)[:, None]
            if HAS_SKIP:
                visible &= (length + depth_j >= skip)[None, :] | (length + depth < skip)[:, None]
            acc, top, total = _fold(acc, top, total, queries, keys, values, visible, scale, cap, HAS_SOFTCAP, WIDE)

    return acc / tl.where(total > 0, total, 1.0)[:, None], top + tl.log2(total)
