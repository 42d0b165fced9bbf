"""The `specfx::` operator library and how an op is registered.

Every op has, in this order: a schema, a fake (shapes for tracing), a plain-PyTorch reference (the specification, registered for every
device), and faster kernels that replace the reference where they can be built. `REFERENCES` maps each op to its reference, so that a
graph can be run on the specification alone (the graph engine and the acceptance gate do that).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("specfx", "DEF")

REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""Op -> its reference implementation."""


def define_op(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register an op by its schema (``name(args) -> result``) with its reference and fake; returns the overload."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.needs_exact_strides)  # kernels get the layouts that were traced, in compiled code too
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"specfx::{name}", fake)
    op = getattr(torch.ops.specfx, name).default
    REFERENCES[op] = reference
    return op
