"""Memory on huge pages, for weights that every step reads from end to end.

With pages of 4 KiB the processor looks up an address for every four kilobytes of weights, and stops fetching ahead where a page ends.
Where the system grants larger pages (Linux, transparent huge pages "madvise" or "always") a block of memory lies on pages of 2 MiB;
elsewhere it is ordinary memory.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20
_CHUNK = 32 * _PAGE
"""Bytes that are reserved at least: tensors behind each other share the pages. What is not written takes no memory."""

_lock = threading.Lock()
_chunk: weakref.ref[mmap.mmap] | None = None
"""Where the next tensor goes if there is room. It lives as long as a tensor in it."""
_used = 0


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """``[count]`` numbers of `dtype`, zeros as yet, in a storage of their own. Raises `OSError` where there is no memory."""
    global _chunk, _used
    if count == 0:
        return torch.empty(0, dtype=dtype)
    size = -(-count * dtype.itemsize // 64) * 64
    with _lock:
        chunk = None if _chunk is None else _chunk()
        if chunk is None or _used + size > len(chunk):
            chunk = mmap.mmap(-1, max(_CHUNK, size) + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a system without huge pages: this is ordinary memory then
                    chunk.madvise(mmap.MADV_HUGEPAGE)
            _chunk, _used = weakref.ref(chunk), -torch.frombuffer(chunk, dtype=torch.uint8).data_ptr() % _PAGE
        offset, _used = _used, _used + size
        return torch.frombuffer(chunk, dtype=dtype, count=count, offset=offset)
