"""`specfx::materialize`: a copy that the compiler can't see through, so that what stands before it is computed once.

Inductor inlines cheap-looking pointwise values into every kernel that reads them. For rotary embeddings that means sines and cosines
again for each head of each layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfx.kernels.library import define_op


def materialize_reference(x: Tensor) -> Tensor:
    """x, any shape -> a contiguous copy."""
    return x.clone(memory_format=torch.contiguous_format)


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


materialize = define_op("materialize(Tensor x) -> Tensor", reference=materialize_reference, fake=_fake)
