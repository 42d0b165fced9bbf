"""All Triton kernels of this folder, registered at once: after `register()` the `specfx::` ops run on CUDA devices without reading
anything back to the host, so that a step can be captured in a CUDA graph. (The Inductor lowering is registered where Inductor is
called, in `specfx._compat`.)
"""

from __future__ import annotations

from specfx.kernels import triton_attention, triton_sample, triton_walk


def register() -> None:
    """Make the Triton kernels the ops' implementations on CUDA devices; again: nothing.

    Raises `LoweringError` (no Triton, or torch sees no CUDA device), with nothing registered; the references then stay in force.
    """
    for kernels in (triton_attention, triton_walk, triton_sample):
        kernels.register()
