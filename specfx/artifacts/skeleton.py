"""A model without its weights, as bytes for another process: classes, configuration, and tensors of which only the form is kept.

Small tensors that a capture takes up as constants keep their values: buffers that are not saved, and plain attributes. What was one weight
in two places is one there too, so the structure has the same key (`specfx.artifacts.key`).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from specfx.artifacts.graphs import LARGEST_CONSTANT
from specfx.passes.framework import place_of


def dumps(content: Any, modules: Iterable[nn.Module]) -> bytes:
    """`content`, which holds `modules`, pickled without their weights. Raises whatever pickling raises."""
    stream = io.BytesIO()
    _Pickler(stream, modules).dump(content)
    return stream.getvalue()


def loads(data: bytes) -> Any:
    """What `dumps` was given; weights are of any value. Raises whatever unpickling raises."""
    return _Unpickler(io.BytesIO(data)).load()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, modules: Iterable[nn.Module]) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._weights = {place_of(p) for module in modules for p in module.parameters()}
        for module in modules:
            for part in module.modules():
                saved = (b for name, b in part._buffers.items() if name not in part._non_persistent_buffers_set)
                self._weights |= {place_of(b) for b in saved if b is not None}
        self._objects: dict[int, int] = {}
        self._places: dict[Any, int] = {}
        self._alive: list[Tensor] = []  # an id is of one object only while that is alive

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if place_of(value) not in self._weights and value.numel() * value.element_size() <= LARGEST_CONSTANT:
            return None
        self._alive.append(value)
        number = self._objects.setdefault(id(value), len(self._objects))
        place = self._places.setdefault(place_of(value), len(self._places))
        form = (value.dtype, tuple(value.shape), value.stride(), value.device)
        return number, place, form, isinstance(value, nn.Parameter)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._objects: dict[int, Tensor] = {}
        self._places: dict[int, Tensor] = {}

    def persistent_load(self, key: Any) -> Tensor:
        number, place, (dtype, shape, stride, device), is_parameter = key
        if place not in self._places:
            self._places[place] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        if number not in self._objects:
            tensor = self._places[place]
            self._objects[number] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        return self._objects[number]
