"""Testing Triton kernels without a GPU: numerics under Triton's interpreter, and compilation to a cubin.

Triton decides at import whether kernels are interpreted, so what is marked `interpreted` is run by one test of its file, in a process of
its own (or by `TRITON_INTERPRET=1 pytest FILE`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run in a process of its own")
compiled = pytest.mark.skipif(INTERPRETED, reason="not under TRITON_INTERPRET=1")
no_interpreter = pytest.mark.skipif(
    triton.__version__ < "3.7" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
    reason="Triton 3.6 interprets loops with NumPy < 2.4 only",
)


def run_interpreted(file: str, least: int) -> None:
    """Runs the tests of `file` that need the interpreter; at least so many must be there and pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= least


SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may take, by capability."""
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
TYPES[torch.float64] = "*fp64"

Launch = tuple[Any, dict[str, Any]]
"""A kernel and the arguments that it is launched with."""


class Launches:
    """Stands for a kernel and notes what it is launched with."""

    def __init__(self, kernel: Any, into: list[Launch]) -> None:
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(type(n) is int for n in grid)
        names = [p.name for p in self.kernel.params]
        return lambda *positional, **named: self.into.append((self.kernel, {**dict(zip(names, positional, strict=False)), **named}))


@dataclass(frozen=True)
class Compiled:
    """shared, spills: in bytes."""

    shared: int
    registers: int
    spills: int
    ptx: str


def compile_launch(kernel: Any, arguments: dict[str, Any], capability: int) -> Compiled:
    """The specialisation that this launch would compile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
    for at, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif parameter.is_constexpr or value is None or (value == 1 and type(value) is int):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (signature[parameter.name] == "i32" and value % 16 == 0):
            attributes[at,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = binary.asm["ptx"]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    if not ptxas.exists():
        pytest.skip(f"this build of Triton has no {ptxas}")
    command = [str(ptxas), "-v", "--gpu-name", architecture, "-o", os.devnull, "/dev/stdin"]
    report = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
    return Compiled(binary.metadata.shared, int(re.search(r"Used (\d+) registers", report).group(1)), spills, ptx)


def assert_compiles(launched: list[Launch], capability: int) -> None:
    for kernel, arguments in launched:
        code = compile_launch(kernel, arguments, capability)
        print(f"sm_{capability} {kernel.__name__} {code.registers} registers, {code.spills} bytes spilled, {code.shared} bytes shared")
        assert code.shared <= SHARED_MEMORY[capability]
        assert code.spills == 0, f"{code.spills} bytes spilled with {code.registers} registers"
