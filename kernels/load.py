"""Kernels in the place of the ops' references, whatever the device."""

from __future__ import annotations

import torch

from specfx.errors import LoweringError
from specfx.kernels import cpu_build, triton_kernels


def load(device: torch.device) -> bool:
    """Have the ops run by kernels on `device`; again: nothing. Whether linear weights can be packed there.

    Raises `LoweringError` where there are none or they can't be built; the references then stay in force.
    """
    if device.type == "cpu":
        return cpu_build.load().packs
    if device.type == "cuda":
        triton_kernels.register()
        return False
    raise LoweringError(f"specfx's ops have no kernels for {device.type}")
