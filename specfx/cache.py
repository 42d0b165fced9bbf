"""Where specfx keeps files between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$SPECFX_CACHE``, else ``$XDG_CACHE_HOME/specfx``, else ``~/.cache/specfx``."""
    if root := os.environ.get("SPECFX_CACHE"):
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "specfx"
