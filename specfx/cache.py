"""Where specfx keeps files between runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def cache_dir() -> Path:
    """``$SPECFX_CACHE``, else ``$XDG_CACHE_HOME/specfx``, else ``~/.cache/specfx``."""
    if root := os.environ.get("SPECFX_CACHE"):
        return Path(root)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "specfx"


@contextmanager
def replacing(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends well: nobody sees half of it. Until then its name begins with that of
    `path` and ends with `suffix`. Raises `OSError`; whatever is raised, no file is left."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=suffix, delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
