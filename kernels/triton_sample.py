"""`specfx::keyed_sample` in Triton; the specification is in `keyed_sample.py`.

A row's vocabulary is cut into parts, a program each, so that the few rows of a step fill a GPU: `_draw` finds the best entry of each
part, `_best` the best part. The noise's bits are the reference's, and its logarithms are libdevice's, right to one unit in the last
place: an approximate one (`lg2.approx`) would give garbage where u is close to 1, that is, for the largest noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfx.errors import LoweringError
from specfx.kernels.keyed_sample import keyed_sample
from specfx.kernels.triton_common import jit, power_of_two, register_on_cuda, require, tl

PART = 8192
"""Entries of the vocabulary that a program of `_draw` looks at."""
BLOCK = 1024
"""How many of them at a time."""


@jit
def _draw(logits, keys, scores, entries, vocabulary, logits_r, keys_r, keys_c, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (R, parts). scores: float32 ``[R, parts]``, the best of each part; entries: int32 ``[R, parts]``, where it is. logits_r,
    keys_r, keys_c: strides."""
    at_row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = keys + at_row * keys_r
    seed, sequence, position = tl.load(key), tl.load(key + keys_c), tl.load(key + 2 * keys_c)
    low, high, place = _word(sequence), _word(sequence >> 32), _word(position)
    zero = tl.full([BLOCK // 4], 0, tl.uint32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at = tl.full([BLOCK], 0, tl.int32)
    for at in range(part * PART, tl.minimum((part + 1) * PART, vocabulary), BLOCK):
        counter = (at // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, counter, zero + place, zero + low, zero + high)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
        v = at + tl.arange(0, BLOCK)
        score = tl.load(logits + at_row * logits_r + v, mask=v < vocabulary, other=float("-inf")) - tl.log(-tl.log(uniform))
        best_at = tl.where(score > best, v, best_at)
        best = tl.maximum(score, best)
    top = tl.max(best)
    here = at_row * tl.num_programs(1) + part
    tl.store(scores + here, top)
    tl.store(entries + here, tl.min(tl.where(best == top, best_at, vocabulary)))


@jit
def _word(x):
    return (x & 0xFFFFFFFF).to(tl.uint32)


@jit
def _best(scores, entries, out, parts, BLOCK: tl.constexpr):
    """Grid (R). The entry of the best part, the first one of equals."""
    part, here = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64) * parts
    score = tl.load(scores + here + part, mask=part < parts, other=float("-inf"))
    first = tl.min(tl.where((score == tl.max(score)) & (part < parts), part, BLOCK))
    tl.store(out + tl.program_id(0), tl.load(entries + here + first).to(tl.int64))


def keyed_sample_triton(logits: Tensor, keys: Tensor) -> Tensor:
    """`specfx.kernels.keyed_sample`'s op. Raises `LoweringError`."""
    require(_draw, logits)
    if logits.dtype != torch.float32 or keys.dtype != torch.int64 or keys.shape != (logits.shape[0], 3):
        raise LoweringError(
            "specfx::keyed_sample: logits must be float32 [R, V] and keys int64 [R, 3], not "
            f"{logits.dtype} {tuple(logits.shape)} and {keys.dtype} {tuple(keys.shape)}"
        )
    rows, vocabulary = logits.shape
    out = logits.new_empty(rows, dtype=torch.int64)
    if rows == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    parts = -(-vocabulary // PART)
    scores = logits.new_empty(rows, parts)
    entries = logits.new_empty(rows, parts, dtype=torch.int32)
    _draw[(rows, parts)](
        logits, keys, scores, entries, vocabulary, logits.stride(0), keys.stride(0), keys.stride(1), PART=PART, BLOCK=BLOCK, num_warps=4
    )
    _best[(rows,)](scores, entries, out, parts, BLOCK=power_of_two(parts), num_warps=1)
    return out


def register() -> None:
    """Make this the op's kernel on CUDA devices; again: nothing. Raises `LoweringError` (no Triton, no CUDA device)."""
    register_on_cuda(keyed_sample, keyed_sample_triton)
