"""One copy to the device and one back a step, however many tensors a forward takes and gives.

On a GPU every small copy costs more than its bytes, and every copy back waits for the device. So the inputs that change from step to
step (a few small integer tensors) lie behind each other in one buffer of bytes, each at a multiple of `ALIGNMENT`, and what the host
has to know of the outputs comes back in one buffer too. On the CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton and Inductor make slower code for pointers that are less aligned, or copy the tensor first."""
_WIDEST = 8
"""Bytes of the widest dtype: all that a view on the host needs, and what int64 tensors keep to without padding."""


def pack(tensors: Sequence[Tensor], alignment: int = ALIGNMENT) -> Tensor:
    """The bytes of `tensors`, all on one device, behind each other, each at a multiple of `alignment`: uint8 ``[B]``."""
    pieces: list[Tensor] = []
    for tensor in tensors:
        if pieces and (odd := -pieces[-1].numel() % alignment):
            pieces.append(pieces[-1].new_zeros(odd))
        pieces.append(tensor.contiguous().view(-1).view(torch.uint8))
    return torch.cat(pieces)


def views(buffer: Tensor, like: Sequence[Tensor], alignment: int = ALIGNMENT) -> list[Tensor]:
    """The tensors in a buffer that `pack` made of tensors with the shapes and dtypes of `like`."""
    found, at = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        found.append(buffer[at : at + size].view(tensor.dtype).view(tensor.shape))
        at += size + -size % alignment
    return found


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors on `device`, by one copy; as they are if that is the CPU."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    return views(pack(tensors).to(device), tensors)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device on the host, by one copy, which waits for them; as they are if that is the CPU."""
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors)
    return views(pack(tensors, _WIDEST).cpu(), tensors, _WIDEST)


def uploading(call: Callable[..., Sequence[Tensor]], device: torch.device) -> Callable[..., Sequence[Tensor]]:
    """`call`, whose inputs lie on `device`, for inputs of which some are still on the host."""
    if device.type == "cpu":
        return call

    def with_inputs_there(*inputs: Tensor) -> Sequence[Tensor]:
        moved = iter(to_device([x for x in inputs if x.device.type == "cpu"], device))
        return call(*[next(moved) if x.device.type == "cpu" else x for x in inputs])

    return with_inputs_there


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A block in which `device` is the current one of its kind: Triton launches its kernels there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
