"""`specfx::keyed_sample` in Triton; the specification is in `keyed_sample.py`.

A row's vocabulary is cut into parts, a program each, so that the few rows of a step fill a GPU: `_draw` finds the best entry of each
part, `_best` the best part. The noise's bits are the reference's, and its logarithms are libdevice's, right to one unit in the last
place: an approximate one (`lg2.approx`) would give garbage where u is close to 1, that is, for the largest noise.

What the warpers keep of a row is all that stands behind one place in the order (value, entry), its *cut*. `_cut` finds it, a program a row,
by bisection of the values, taken as integers in the same order: each of the 32 passes over the vocabulary counts entries (top-k) or adds
up probabilities (top-p). Rows that are greedy, or drawn from the whole distribution, return at once, so nothing is read back to the host
to leave them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfx.errors import LoweringError
from specfx.kernels.keyed_sample import keyed_sample
from specfx.kernels.triton_common import REGISTERS, jit, power_of_two, register_on_cuda, require, tl

PART = 8192
"""Entries of the vocabulary that a program of `_draw` looks at."""
BLOCK = 1024
"""How many of them at a time."""
CUT_BLOCK = 2048
"""How many `_cut` looks at, at a time."""


@jit
def _order(x):
    """Floats as int32 in the same order; -0 is 0. `_value` is the inverse."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def _value(order):
    order = order.to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@jit
def _scores(logits, v, vocabulary, temperature):
    """Logits by the temperature; it is 0 for a greedy row, whose logits are as they were."""
    x = tl.load(logits + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
    warm = tl.where(temperature == 0, 1.0, temperature)
    return tl.where(temperature == 0, x, tl.minimum(tl.div_rn(x, tl.zeros_like(x) + warm), 3.4028234663852886e38))


@jit
def _mass(x, top):
    """Probabilities in the units of the specification."""
    return (tl.exp(x.to(tl.float64) - top.to(tl.float64)) * 1099511627776.0).to(tl.int64)


@jit
def _mass_from(logits, vocabulary, temperature, top, low, high, BLOCK: tl.constexpr):
    """The mass of all entries from `low` to `high`, both counted, in `_order`, and how many they are."""
    mass, entries = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int32)
    for at in range(0, vocabulary, BLOCK):
        v = at + tl.arange(0, BLOCK)
        x = _scores(logits, v, vocabulary, temperature)
        order = _order(x).to(tl.int64)
        inside = (v < vocabulary) & (order >= low) & (order <= high)
        mass += tl.where(inside, _mass(x, top), 0)
        entries += inside.to(tl.int32)
    return tl.sum(mass), tl.sum(entries)


@jit
def _equals_from(logits, vocabulary, temperature, order, first, BLOCK: tl.constexpr):
    """How many entries from `first` on are at `order`."""
    entries = tl.zeros([BLOCK], tl.int32)
    for at in range(0, vocabulary, BLOCK):
        v = at + tl.arange(0, BLOCK)
        same = _order(_scores(logits, v, vocabulary, temperature)) == order
        entries += (same & (v >= first) & (v < vocabulary)).to(tl.int32)
    return tl.sum(entries)


@jit
def _cut(logits, warp, cuts, firsts, vocabulary, logits_r, warp_r, warp_c, BLOCK: tl.constexpr):
    """Grid (R). cuts: float32 ``[R]``; firsts: int32 ``[R]``. Kept is what is greater than the cut, and of its equals the entries from
    the first on. logits_r, warp_r, warp_c: strides."""
    row = tl.program_id(0).to(tl.int64)
    logits, warp = logits + row * logits_r, warp + row * warp_r
    temperature, top_k = tl.load(warp).to(tl.float32), tl.load(warp + warp_c)
    top_p, min_p = tl.load(warp + 2 * warp_c), tl.load(warp + 3 * warp_c)
    limited = (top_k > 0) & (top_k < vocabulary)
    cut, first = tl.full([], -2139095041, tl.int64), tl.full([], 0, tl.int32)  # -inf
    if (temperature != 0) & (limited | (top_p < 1) | (min_p > 0)):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for at in range(0, vocabulary, BLOCK):
            best = tl.maximum(best, _scores(logits, at + tl.arange(0, BLOCK), vocabulary, temperature))
        top = tl.max(best)
        highest = _order(top).to(tl.int64)
        if limited:  # the largest value that so many are not below
            high = highest
            for _ in range(32):
                middle = (cut + high + 1) >> 1
                _, entries = _mass_from(logits, vocabulary, temperature, top, middle, highest, BLOCK)
                enough = entries >= top_k
                cut, high = tl.where(enough, middle, cut), tl.where(enough, high, middle - 1)
        if top_p < 1:  # the smallest value above which there is less than what is wanted
            total, _ = _mass_from(logits, vocabulary, temperature, top, cut, highest, BLOCK)
            wanted = tl.maximum(total - ((1 - top_p) * total.to(tl.float64)).to(tl.int64), 1)
            high = highest
            for _ in range(32):
                middle = (cut + high) >> 1
                above, _ = _mass_from(logits, vocabulary, temperature, top, middle + 1, highest, BLOCK)
                cut, high = tl.where(above < wanted, cut, middle + 1), tl.where(above < wanted, middle, high)
                cut = tl.minimum(cut, high)
            above, _ = _mass_from(logits, vocabulary, temperature, top, cut + 1, highest, BLOCK)
            equal, equals = _mass_from(logits, vocabulary, temperature, top, cut, cut, BLOCK)
            kept = tl.cdiv(wanted - above, tl.maximum(equal // tl.maximum(equals, 1), 1))
            if kept < equals:
                last = vocabulary - 1
                for _ in range(32):
                    middle = (first + last + 1) >> 1
                    enough = _equals_from(logits, vocabulary, temperature, cut, middle, BLOCK) >= kept
                    first, last = tl.where(enough, middle, first), tl.where(enough, last, middle - 1)
        if min_p > 0:  # the smallest value that is so probable
            low, high = tl.minimum(cut, highest), highest
            for _ in range(32):
                middle = (low + high) >> 1
                enough = _mass(_value(middle), top).to(tl.float64) >= min_p * 1099511627776.0
                low, high = tl.where(enough, low, tl.minimum(middle + 1, high)), tl.where(enough, middle, high)
            first = tl.where(low > cut, 0, first)
            cut = tl.maximum(cut, low)
    tl.store(cuts + row, _value(cut))
    tl.store(firsts + row, first)


@jit
def _draw(
    logits, keys, warp, cuts, firsts, scores, entries, vocabulary, logits_r, keys_r, keys_c, warp_r, PART: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (R, parts). scores: float32 ``[R, parts]``, the best of each part, NaN if a drawn one has a logit that is NaN or inf; entries:
    int32 ``[R, parts]``, where it is. logits_r, keys_r, keys_c, warp_r: strides."""
    at_row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = keys + at_row * keys_r
    seed, sequence, position = tl.load(key), tl.load(key + keys_c), tl.load(key + 2 * keys_c)
    temperature = tl.load(warp + at_row * warp_r).to(tl.float32)
    cut, first = tl.load(cuts + at_row), tl.load(firsts + at_row)
    low, high, place = _word(sequence), _word(sequence >> 32), _word(position)
    zero = tl.full([BLOCK // 4], 0, tl.uint32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = tl.full([BLOCK], 0, tl.int32)
    strange = tl.full([BLOCK], 0, tl.int32)
    for at in range(part * PART, tl.minimum((part + 1) * PART, vocabulary), BLOCK):
        v = at + tl.arange(0, BLOCK)
        score = _scores(logits + at_row * logits_r, v, vocabulary, temperature)
        if temperature != 0:
            logit = tl.load(logits + at_row * logits_r + v, mask=v < vocabulary, other=0.0).to(tl.float32)
            strange |= ((logit != logit) | (logit == float("inf"))).to(tl.int32)
            counter = (at // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
            w0, w1, w2, w3 = tl.philox(seed, counter, zero + place, zero + low, zero + high)
            words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
            kept = (score > cut) | ((score == cut) & (v >= first))
            score = tl.where(kept, score - tl.log(-tl.log(uniform)), float("-inf"))
        best_at = tl.where(score > best, v, best_at)
        best = tl.maximum(score, best)
    top = tl.max(best)
    here = at_row * tl.num_programs(1) + part
    tl.store(scores + here, tl.where(tl.max(strange) > 0, float("nan"), top))
    tl.store(entries + here, tl.min(tl.where(best == top, best_at, vocabulary)))


@jit
def _word(x):
    return (x & 0xFFFFFFFF).to(tl.uint32)


@jit
def _best(scores, entries, warp, out, parts, warp_r, BLOCK: tl.constexpr):
    """Grid (R). The entry of the best part, the first one of equals; -1 if it was to be drawn and a part is NaN or none has anything.
    warp_r: stride."""
    part, here = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64) * parts
    score = tl.load(scores + here + part, mask=part < parts, other=float("-inf"))
    first = tl.min(tl.where((score == tl.max(score)) & (part < parts), part, parts - 1))
    nothing = (tl.max((score != score).to(tl.int32)) > 0) | (tl.max(score) == float("-inf"))
    drawn = tl.load(warp + tl.program_id(0).to(tl.int64) * warp_r).to(tl.float32) != 0
    tl.store(out + tl.program_id(0), tl.where(drawn & nothing, -1, tl.load(entries + here + first).to(tl.int64)))


def keyed_sample_triton(logits: Tensor, keys: Tensor, warp: Tensor) -> Tensor:
    """`specfx.kernels.keyed_sample`'s op. Raises `LoweringError`."""
    require(_draw, logits)
    rows, vocabulary = logits.shape
    if not logits.is_floating_point() or keys.dtype != torch.int64 or warp.dtype != torch.float64:
        raise LoweringError(
            "specfx::keyed_sample: logits must be floating [R, V], keys int64 [R, 3] and warp float64 [R, 4], not "
            f"{logits.dtype}, {keys.dtype} and {warp.dtype}"
        )
    if keys.shape != (rows, 3) or warp.shape != (rows, 4):
        raise LoweringError(f"specfx::keyed_sample: {rows} rows of logits, keys {tuple(keys.shape)}, warp {tuple(warp.shape)}")
    out = logits.new_empty(rows, dtype=torch.int64)
    if rows == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    parts = -(-vocabulary // PART)
    scores = logits.new_empty(rows, parts, dtype=torch.float32)
    entries = logits.new_empty(rows, parts, dtype=torch.int32)
    cuts, firsts = logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int32)
    stride, warp_strides = logits.stride(0), (warp.stride(0), warp.stride(1))
    _cut[(rows,)](logits, warp, cuts, firsts, vocabulary, stride, *warp_strides, BLOCK=CUT_BLOCK, num_warps=8, maxnreg=REGISTERS)
    strides = (stride, keys.stride(0), keys.stride(1), warp.stride(0))
    _draw[(rows, parts)](logits, keys, warp, cuts, firsts, scores, entries, vocabulary, *strides, PART=PART, BLOCK=BLOCK, num_warps=4)
    _best[(rows,)](scores, entries, warp, out, parts, warp.stride(0), BLOCK=power_of_two(parts), num_warps=1)
    return out


def register() -> None:
    """Make this the op's kernel on CUDA devices; again: nothing. Raises `LoweringError` (no Triton, no CUDA device)."""
    register_on_cuda(keyed_sample, keyed_sample_triton)
