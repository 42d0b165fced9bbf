"""All Triton kernels of this folder, registered at once: after `register()` the `specfx::` ops run on CUDA devices without reading
anything back to the host, so that a step can be captured in a CUDA graph."""

from __future__ import annotations

import functools

import torch

from specfx.errors import LoweringError
from specfx.kernels import triton_attention
from specfx.kernels.triton_common import triton


@functools.cache
def register() -> None:
    """Make the Triton kernels the ops' implementations on CUDA devices; again: nothing.

    Raises `LoweringError` (no Triton, or torch sees no CUDA device), with nothing registered; the references then stay in force.
    """
    if triton is None:
        raise LoweringError("Triton is not installed: pip install triton (Linux)")
    if not torch.cuda.is_available():
        raise LoweringError("torch sees no CUDA device: check the driver with nvidia-smi, and that torch was built for CUDA")
    triton_attention.register()
