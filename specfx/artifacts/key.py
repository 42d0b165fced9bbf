"""The name of an artifact: a hash of all that decides what it is, and of no weight's value.

A model is described module by module: classes (with the code of their `forward`), plain attributes, configurations, and name, dtype,
shape, strides and sharing of each parameter and buffer. Tensors that a capture takes up as constants (buffers that are not saved,
tensors held as plain attributes) count with their values.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import specfx
from specfx import _compat
from specfx.artifacts.graphs import LARGEST_CONSTANT
from specfx.drafters.mtp import Drafting
from specfx.kernels import cpu_build
from specfx.options import CommonOptions
from specfx.passes.framework import place_of
from specfx.passes.pipeline import DRAFTING, LOWERING, REWRITE

_NOT_STRUCTURE = {
    *{"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "_is_hf_initialized"},
    *{"generate", "generation_config", "name_or_path", "warnings_issued", "_tp_size", "_tp_plan", "_ep_plan", "_pp_plan"},
}
"""Attributes of modules that say nothing of what a capture of it looks like (parameters and so on are described apart)."""
_NOT_CONFIGURATION = {"_name_or_path", "transformers_version"}


def graph_key(model: PreTrainedModel, options: CommonOptions, drafting: Drafting | None = None) -> str:
    """Of the graph as the rewrite passes leave it; with a head to be stitched in, of the stitched one."""
    rewriting = sorted({p.name for p in (*REWRITE, *DRAFTING)} & set(options.disable_passes))
    parts = [_model(model, drafting), _sources(), *_environment(model.device), str(options.page_size), str(rewriting)]
    return _digest(parts)


def lowered_key(graph: str, options: CommonOptions) -> str:
    """Of what is lowered from the graph with the key `graph`, with as many threads as torch has now."""
    lowering = sorted({p.name for p in LOWERING} & set(options.disable_passes))
    instructions = os.environ.get("ATEN_CPU_CAPABILITY", "")
    settings = (torch.get_num_threads(), instructions, torch.get_float32_matmul_precision(), _compat.inductor_settings())
    return _digest([graph, str(lowering), *map(str, settings)])


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _environment(device: torch.device) -> list[str]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions |= {"specfx": specfx.__version__, "python": platform.python_version(), "triton": _compat.triton_version()}
    gpu = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}" if device.type == "cuda" else ""
    return [json.dumps(versions, sort_keys=True), device.type, gpu, cpu_build.cpu_flags(), str(torch.get_default_dtype())]


def _sources() -> str:
    """Of passes and kernels, and of all that captures, stitches, binds and stores."""
    root = Path(specfx.__file__).parent
    files = [root / "capture.py", *(f for part in ("artifacts", "engines", "drafters", "runtime") for f in (root / part).glob("*.py"))]
    return hashlib.sha256(b"".join([_compat.sources_hash().encode(), *(f.read_bytes() for f in sorted(files))])).hexdigest()


def _model(model: PreTrainedModel, drafting: Drafting | None) -> str:
    description = _Description()
    text = description.of(model)
    if drafting is not None:
        text += f" {drafting.shape} {drafting.head.wiring} {description.of(drafting.head)}"
    return text


class _Description:
    """Text of modules and their attributes, the same in every process. State: what was described already, so that sharing shows."""

    def __init__(self) -> None:
        self._places: dict[tuple[Any, ...], int] = {}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is of one object only while that is alive

    def of(self, value: Any) -> str:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)):
            return repr(value)
        if isinstance(value, type):
            return _class(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.ModuleType):
            return value.__name__
        if id(value) in self._seen:
            return f"<{self._seen[id(value)]}>"
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}({', '.join(map(self.of, value))})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self.of(k)}: {self.of(v)}' for k, v in value.items())}}}"
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(map(self.of, value)))}}}"
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            return f"{self._tensor(value)} {_values(value)}"
        if isinstance(value, PretrainedConfig):
            return _configuration(value)
        return self._object(value)

    def _module(self, module: nn.Module) -> str:
        saved = {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
        tensors = {name: t for name, t in [*module._parameters.items(), *saved.items()] if t is not None}
        lines = [_class(type(module)), self._code_of(type(module).forward)]
        lines += [f"{name} = {self._tensor(tensor)}" for name, tensor in tensors.items()]
        lines += [f"{name} = {self.of(t)} (not saved)" for name, t in module._buffers.items() if name not in tensors]
        lines += [f"{name} = {self.of(v)}" for name, v in sorted(vars(module).items()) if name not in _NOT_STRUCTURE]
        lines += [f"{name}: {self.of(child)}" for name, child in module._modules.items()]
        return f"({'; '.join(lines)})"

    def _tensor(self, tensor: Tensor) -> str:
        """Form and sharing; no values."""
        shared = self._places.setdefault((tensor.device, *place_of(tensor)), len(self._places))
        return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device.type} #{shared}"

    def _object(self, value: Any) -> str:
        if isinstance(value, functools.partial):
            return f"partial({self.of(value.func)}, {self.of(value.args)}, {self.of(value.keywords)})"
        if isinstance(value, types.MethodType):
            return f"method({self._code_of(value.__func__)} of {self.of(value.__self__)})"
        if isinstance(value, types.FunctionType):
            return self._code_of(value)
        attributes = getattr(value, "__dict__", None)
        return f"{_class(type(value))} {self.of(attributes)}"

    def _code_of(self, function: Any) -> str:
        """Of a Python function: its name and its compiled code, with what decorators wrap."""
        texts = []
        while function is not None:
            code = getattr(function, "__code__", None)
            cells = [c.cell_contents for c in getattr(function, "__closure__", None) or () if _filled(c)]
            plain = [self.of(c) for c in cells if isinstance(c, (bool, int, float, str, type(None)))]
            texts.append(f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')} {self.of(code)} {plain}")
            function = getattr(function, "__wrapped__", None)
        return " of ".join(texts)

    def _code(self, code: types.CodeType) -> str:
        constants = [self.of(c) for c in code.co_consts if isinstance(c, (types.CodeType, bool, int, float, str, type(None)))]
        return hashlib.sha256(f"{code.co_code.hex()} {code.co_names} {constants}".encode()).hexdigest()


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _configuration(config: PretrainedConfig) -> str:
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_CONFIGURATION}
    implementations = [getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation")]
    return f"{_class(type(config))} {json.dumps(values, sort_keys=True, default=str)} {implementations}"


def _values(tensor: Tensor) -> str:
    """Of a tensor that a graph may take up as a constant; larger ones are kept by name or not at all."""
    if tensor.numel() * tensor.element_size() > LARGEST_CONSTANT:
        return ""
    flat = tensor.detach().reshape(-1).contiguous()
    return hashlib.sha256(flat.cpu().view(torch.uint8).numpy().tobytes()).hexdigest() if flat.numel() else ""
