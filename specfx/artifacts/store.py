"""The files of the artifacts: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specfx.cache import cache_dir, replacing
from specfx.errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows: two processes may do the same work at once
    fcntl = None  # type: ignore[assignment]

_MAGIC = b"specfx artifact 1\n"
_DIGEST = hashlib.sha256().digest_size
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Stored:
    """One file: its name, and its size in bytes."""

    name: str
    bytes: int


def folder() -> Path:
    """Where artifacts are kept."""
    return cache_dir() / "artifacts"


def exists(name: str) -> bool:
    """Whether there is an artifact `name`; reading it may still fail."""
    return (folder() / name).is_file()


def read(name: str) -> Any:
    """The content of the artifact `name`, or None if there is none. Raises `ArtifactError` for one that is damaged or can't be read; a
    damaged one is deleted."""
    path = folder() / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ArtifactError(f"{path} can't be read: {e}; it is built anew") from e
    body = data[len(_MAGIC) + _DIGEST :]
    try:
        if not data.startswith(_MAGIC) or data[len(_MAGIC) : len(_MAGIC) + _DIGEST] != hashlib.sha256(body).digest():
            raise ValueError("its checksum is wrong")
        return pickle.loads(body)
    except Exception as e:  # whatever unpickling raises
        discard(name)
        raise ArtifactError(f"{path} is damaged ({type(e).__name__}: {e}); it is built anew") from e


def write(name: str, content: Any) -> None:
    """Keep `content` as the artifact `name`, in place of one that is there. Raises `ArtifactError`."""
    stream = io.BytesIO()
    try:
        pickle.dump(content, stream, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as e:  # whatever pickling raises
        raise ArtifactError(f"{name} can't be pickled: {type(e).__name__}: {e}") from e
    body = stream.getvalue()
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with replacing(folder() / name, _PARTIAL) as file:
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)
    except OSError as e:
        raise ArtifactError(f"{name} can't be kept in {folder()}: {e}; set SPECFX_CACHE") from e


def discard(name: str) -> None:
    """Delete the artifact `name`, if it is there and may be deleted."""
    try:
        (folder() / name).unlink(missing_ok=True)
    except OSError as e:
        raise ArtifactError(f"{folder() / name} can't be used, and can't be deleted: {e}") from e


@contextmanager
def alone(name: str) -> Iterator[None]:
    """A block that one process at a time is in, for each `name`; the lock of a process that dies is free. Raises `ArtifactError`."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        file = (folder() / f"{name}.lock{_PARTIAL}").open("w")
    except OSError as e:
        raise ArtifactError(f"nothing can be kept in {folder()}: {e}; set SPECFX_CACHE") from e
    with file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stored() -> list[Stored]:
    """All artifacts, by name. (Files that a killed process left half-written are not among them.)"""
    if not folder().is_dir():
        return []
    return [Stored(path.name, path.stat().st_size) for path in sorted(folder().iterdir()) if path.suffix != _PARTIAL]


def clear() -> list[Stored]:
    """Delete all artifacts and what killed processes left; returns the artifacts."""
    gone = stored()
    if folder().is_dir():
        for path in folder().iterdir():
            path.unlink(missing_ok=True)
    return gone
