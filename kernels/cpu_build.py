"""Builds the C++ kernels of this folder once per machine and loads them; without a compiler the references stay in force.

The library is cached on disk under a hash of its sources, compiler, flags, torch version and CPU, and written by an atomic rename,
so that processes that start at once don't disturb each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from specfx.cache import cache_dir
from specfx.errors import LoweringError

_SOURCE = Path(__file__).parent / "cpu" / "ops.cpp"
_SOURCES = (_SOURCE, *sorted(_SOURCE.parent.glob("*.h")))


@dataclass(frozen=True)
class CpuKernels:
    """What was loaded. packs: whether `specfx::packed_linear` has a kernel here (AMX or AVX-512 BF16)."""

    path: Path
    packs: bool


def _command() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    libraries = Path(torch.__file__).parent / "lib"
    return [
        os.environ.get("CXX", "g++"),
        # No -ffast-math: it would link start-up code that flushes denormals in the whole process.
        *["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"],
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-DAT_PARALLEL_OPENMP=1",
        *[f"-I{p}" for p in include_paths()],
        *[str(_SOURCE), f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"],
    ]


def cpu_flags() -> str:
    """The CPU's instruction sets: a library built with -march=native for one CPU must not be loaded on another."""
    info = Path("/proc/cpuinfo")
    flags = next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "") if info.exists() else ""
    return f"{platform.machine()} {platform.processor()} {flags}"


_outcome: CpuKernels | LoweringError | None = None


def load() -> CpuKernels:
    """Build if need be, and load, once for the process. Raises `LoweringError` (no compiler, a build that fails, a cache folder that
    can't be written), the same again if asked again; the references then stay in force."""
    global _outcome
    if _outcome is None:
        try:
            _outcome = _load()
        except LoweringError as e:
            _outcome = e
        except OSError as e:
            _outcome = LoweringError(f"the CPU kernels can't be stored in or loaded from {cache_dir()}: {e}; set SPECFX_CACHE")
    if isinstance(_outcome, LoweringError):
        raise _outcome
    return _outcome


def _load() -> CpuKernels:
    command = _command()
    key = hashlib.sha256("\0".join([*(s.read_text() for s in _SOURCES), *command, torch.__version__, cpu_flags()]).encode()).hexdigest()[
        :20
    ]
    path = cache_dir() / f"cpu-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / "ops.so"
            try:
                subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
            except FileNotFoundError as e:
                raise LoweringError(f"no C++ compiler: {e.filename} not found; install g++ or set CXX") from e
            except subprocess.CalledProcessError as e:
                raise LoweringError(f"the CPU kernels don't build: {e.stderr[-2000:]}") from e
            built.replace(path)
    torch.ops.load_library(str(path))
    return CpuKernels(path, packs=ctypes.CDLL(str(path)).specfx_has_packed_linear() == 1)
