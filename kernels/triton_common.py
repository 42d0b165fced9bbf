"""What the Triton kernels share: the import, which may fail, the words of a tree mask, and the answer to a call that can't be served.

A module of kernels imports `triton` and `tl` from here and decorates with `jit`, so that it can be imported where there is no Triton;
its launchers call `require` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specfx.errors import LoweringError

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has wheels for Linux only
    triton = tl = None

REGISTERS = 255
"""Of a thread: all that it can address. Left to itself, ptxas spills a few bytes to fit one more program on a processor."""
LOG2E = math.log2(math.e)
"""Softmax in base 2: the hardware has exp2, not exp."""

NO_TRITON = "Triton is not installed: pip install triton (Linux), or use the reference or C++ kernels"


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton (`require` keeps it from being launched)."""
    return function if triton is None else triton.jit(function)


@jit
def mask_words(tree_mask, row, mask, below):
    """The ancestors of each row that are numbered below `below`, as two int32 words of 32 bits (64-bit shifts are slow and take twice
    the registers)."""
    one = tl.full([], 1, tl.int64)
    bits = tl.where(below < 64, (one << tl.minimum(below, 63)) - 1, -one)
    word = tl.load(tree_mask + row, mask=mask, other=0) & bits
    return word.to(tl.int32), (word >> 32).to(tl.int32)


@jit
def ones(x):
    """How many bits of an int32 are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` runs on the CPU (TRITON_INTERPRET=1 when it was decorated)."""
    return triton is not None and not isinstance(kernel, triton.JITFunction)


def require(kernel: Any, on: Tensor) -> None:
    """Raises `LoweringError` unless `kernel` can be launched on the device of `on`."""
    if triton is None:
        raise LoweringError(NO_TRITON)
    if not on.is_cuda and not interpreted(kernel):
        raise LoweringError(
            f"a Triton kernel was called on a tensor on {on.device}: move it to a CUDA device, use the reference or C++ kernels, "
            "or set TRITON_INTERPRET=1 before Python starts (slow, for tests)"
        )


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


_registered: set[torch._ops.OpOverload] = set()


def register_on_cuda(op: torch._ops.OpOverload, kernel: Callable[..., Any]) -> None:
    """Make `kernel` the implementation of `op` on CUDA devices, once for the process. Raises `LoweringError` where it could not run."""
    if triton is None:
        raise LoweringError(NO_TRITON)
    if not torch.cuda.is_available():
        raise LoweringError("Triton kernels need a CUDA device and this torch sees none: install a CUDA build of torch, or run on the CPU")
    if op not in _registered:
        torch.library.impl(op.name(), "cuda", kernel)
        _registered.add(op)
