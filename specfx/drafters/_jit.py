"""Compiles small integer functions with Numba where it is installed; without it they run as plain Python.

`jit` decorates a function that reads and writes arrays element by element; `view` gives the form of a NumPy array that such functions
are to be called with: the array itself for compiled code, a memoryview for Python, which reads plain ints from it several times faster.
Set ``SPECFX_NO_JIT=1`` to run as Python although Numba is there.

Compiled code is cached under `cache_dir`, in a folder named after the sources of all drafters: Numba itself looks only at the file that a
function stands in, and would serve a caller's old code after a callee in another file has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specfx.cache import cache_dir

COMPILED = False
if os.environ.get("SPECFX_NO_JIT", "0") in ("", "0"):
    try:
        import numba
    except ImportError:
        pass
    else:
        COMPILED = True


def _cache_folder() -> Path:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return cache_dir() / "numba" / digest.hexdigest()[:16]


if COMPILED:
    _config: Any = numba.config
    _folder = str(_cache_folder())
    _options: dict[str, Any] = {
        "cache": True,
        "nogil": True,
        "error_model": "numpy",
        # No reference counts on the arrays that the functions hand to each other, which cost more than all the rest. A function that
        # would need them (one that makes or slices an array) fails to compile. Numba marks the option as its own (read in 0.68).
        "_nrt": False,
    }

    def jit(function: Callable[..., Any]) -> Any:
        """`function`, compiled at its first call with each set of argument types."""
        configured, _config.CACHE_DIR = _config.CACHE_DIR, _folder  # read when the decorator runs, and only then
        try:
            return numba.njit(**_options)(function)
        finally:
            _config.CACHE_DIR = configured

else:

    def jit(function: Callable[..., Any]) -> Any:
        """`function` as it is."""
        return function


def view(array: Any) -> Any:
    """A one-dimensional NumPy array as `jit` functions are to be given it; it shares the array's memory."""
    return array if COMPILED else memoryview(array)
