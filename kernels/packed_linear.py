"""`specfx::packed_linear`: a linear layer over a weight packed once for the CPU's bfloat16 instructions (AMX tiles, AVX-512 vectors).

A CPU step is bound by reading the weights. Packed in the order in which they are loaded, they stream at memory speed, and the rows
of a draft tree share each load: 16 rows cost little more than one on tiles, 12 on vectors. The packed weight is an ordinary tensor and an
ordinary graph input, so compiled artifacts do not hold it.

Layout (K the input width, a multiple of 32; N the output width, padded with zeros to a multiple of 32):
``[N / 32, K / 32, 16, 32, 2]``, that is: column block, row block, pair of k, column, member of the pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfx.kernels.library import define_op

BLOCK = 32


def can_pack(weight: Tensor) -> bool:
    """Whether `weight` ``[N, K]`` has a packed form: bfloat16 on the CPU, K a multiple of 32."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.dim() == 2 and weight.shape[1] % BLOCK == 0


def pack(weight: Tensor) -> Tensor:
    """``[N, K]`` bfloat16 -> the packed layout (a copy)."""
    n, k = weight.shape
    pairs = torch.nn.functional.pad(weight, (0, 0, 0, -n % BLOCK)).view(torch.int32)  # both members of a pair move as one number
    blocks = pairs.view(-1, BLOCK, k // BLOCK, 16)  # column block, column, row block, pair
    return blocks.permute(0, 2, 3, 1).contiguous().view(weight.dtype).view(-1, k // BLOCK, 16, BLOCK, 2)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: ``[n, K]``."""
    blocks = packed.permute(0, 3, 1, 2, 4)
    return blocks.reshape(packed.shape[0] * BLOCK, packed.shape[1] * BLOCK)[:n]


def packed_linear_reference(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """x ``[..., K]`` @ weight.T (+ bias ``[n]``) -> ``[..., n]``."""
    return torch.nn.functional.linear(x, unpack(packed, n), bias)


def _fake(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


packed_linear = define_op(
    "packed_linear(Tensor x, Tensor packed, Tensor? bias, int n) -> Tensor",
    reference=packed_linear_reference,
    fake=_fake,
)
