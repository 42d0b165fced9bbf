"""The paged KV pool: who owns which page, where each sequence stands, and what the next step must move.

One page number stands for the same page in every layer's pair of pools. A sequence reserves all pages that it can need when it is
added, so a step never fails for want of memory. A forward writes its rows behind the committed tokens; `commit` keeps an accepted path of
them by noting *moves*, which the next forward's fused op carries out (in order, so overlapping moves are safe); rows not kept are
simply overwritten later. Sizes: "auto" grows on demand, a number of pages or a fraction of the free memory is a hard bound. What a forward
must be told (page tables, moves) is made on the host; the engine brings it to the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specfx.errors import KVPoolError


@dataclass(frozen=True)
class LayerShape:
    """One layer's keys or values: heads, width of a head, dtype."""

    heads: int
    width: int
    dtype: torch.dtype

    @property
    def bytes_a_token(self) -> int:
        return self.heads * self.width * self.dtype.itemsize


@dataclass
class _Sequence:
    """State of one sequence. fresh: rows of the last forward that are neither committed nor rolled back."""

    pages: list[int]
    length: int = 0
    fresh: int = 0
    moves: list[tuple[int, int]] = field(default_factory=list)


def free_memory(device: torch.device) -> int:
    """Bytes that a pool could take on `device` now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch's allocator for such needs
        return torch.cuda.mem_get_info(device)[0] + unused
    import os

    with open("/proc/meminfo") as f:
        available = next((int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable")), None)
    return available if available is not None else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


class KVPool:
    """Pages of all layers on one device. pools: tensors ``[N, page_size, heads, width]``, in the order of `shapes`."""

    def __init__(self, shapes: Sequence[LayerShape], page_size: int, size: str | int | float, device: torch.device) -> None:
        self.shapes, self.page_size, self.device = tuple(shapes), page_size, device
        self.page_bytes = page_size * sum(s.bytes_a_token for s in shapes)
        self.limit: int | None = None
        if isinstance(size, float):
            self.limit = int(free_memory(device) * size) // self.page_bytes
        elif isinstance(size, int):
            self.limit = size
        self.pages = 0
        self.pools: list[Tensor] = [torch.empty(0, page_size, s.heads, s.width, dtype=s.dtype, device=device) for s in shapes]
        self._free: list[int] = []
        self._scratch: list[int] = []
        self._sequences: dict[int, _Sequence] = {}
        self._tables: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def pages_in_use(self) -> int:
        return self.pages - len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def add(self, seq: int, capacity: int) -> None:
        """Reserve pages for `capacity` tokens. Raises `KVPoolError` (nothing changed) or `ValueError` for an id in use."""
        if seq in self._sequences:
            raise ValueError(f"sequence {seq} exists already")
        need = self.pages_for(capacity)
        if need > len(self._free):
            self._grow(self.pages_in_use + need)
        self._sequences[seq] = _Sequence([self._free.pop() for _ in range(need)])
        self._tables = None

    def _grow(self, pages: int) -> None:
        if self.limit is not None and pages > self.limit:
            raise KVPoolError(
                f"the KV pool holds {self.limit} pages of {self.page_size} tokens, {pages} are needed ({self.pages_in_use} in use); "
                "raise kv_pool, or ask for fewer tokens or sequences at a time"
            )
        target = pages if self.limit is not None else max(pages, self.pages + self.pages // 2)
        self._free.extend(reversed(self._allocate(target - self.pages)))
        self.pages = target

    def scratch(self, tokens: int) -> list[int]:
        """Pages with room for `tokens` that belong to no sequence and may be written by anyone; beside the pool's size, always the
        same ones. Raises `KVPoolError` if there is no memory for them."""
        if (missing := self.pages_for(tokens) - len(self._scratch)) > 0:
            self._scratch += self._allocate(missing)
        return self._scratch

    def _allocate(self, more: int) -> range:
        """Make room for so many more pages in every layer; their numbers."""
        present = self.pages + len(self._scratch)
        target = present + more
        missing = more * self.page_bytes
        if missing > free_memory(self.device):
            raise KVPoolError(f"the KV pool needs {missing >> 20} MiB more on {self.device}, {free_memory(self.device) >> 20} MiB are free")
        try:
            for i in range(len(self.pools)):  # one by one: two copies of all pools may not fit
                new = torch.zeros(target, *self.pools[i].shape[1:], dtype=self.pools[i].dtype, device=self.device)
                new[:present] = self.pools[i]
                self.pools[i] = new
        except RuntimeError as e:
            self.pools = [pool[:present] for pool in self.pools]
            raise KVPoolError(f"the KV pool can't grow to {target} pages of {self.page_bytes} bytes on {self.device}: {e}") from e
        return range(present, target)

    def remove(self, seq: int) -> None:
        """Give the pages of `seq` back; unknown ids are ignored."""
        sequence = self._sequences.pop(seq, None)
        if sequence is not None:
            self._free.extend(reversed(sequence.pages))
            self._tables = None

    def length(self, seq: int) -> int:
        return self._sequences[seq].length

    def page_table(self, seqs: Sequence[int]) -> Tensor:
        """int32 ``[S, P]``, on the host; short ones padded with page 0 (never read)."""
        key = tuple(seqs)
        if self._tables is None or self._tables[0] != key:
            width = max(len(self._sequences[s].pages) for s in seqs)
            rows = [self._sequences[s].pages + [0] * (width - len(self._sequences[s].pages)) for s in seqs]
            self._tables = (key, torch.tensor(rows, dtype=torch.int32, device="cpu"))
        return self._tables[1]

    def begin(self, seqs: Sequence[int], counts: Sequence[int]) -> Tensor:
        """A forward of `counts` new rows starts: checks the room, rolls uncommitted rows back, hands out the moves ``[2, M]`` to do
        first (on the host).

        Raises `KVPoolError` (nothing changed) if a sequence would outgrow its reservation.
        """
        for seq, count in zip(seqs, counts, strict=True):
            sequence = self._sequences[seq]
            if sequence.length + count > len(sequence.pages) * self.page_size:
                room = len(sequence.pages) * self.page_size
                raise KVPoolError(f"sequence {seq} reserved {room} tokens, {sequence.length} + {count} rows don't fit")
        moves: list[tuple[int, int]] = []
        for seq, count in zip(seqs, counts, strict=True):
            sequence = self._sequences[seq]
            moves += sequence.moves
            sequence.moves, sequence.fresh = [], count
        return torch.tensor(moves or [(-1, -1)], dtype=torch.int64, device="cpu").t().contiguous()

    def commit(self, seq: int, rows: Sequence[int]) -> None:
        """Keep the ascending `rows` of the last forward. Raises `ValueError` for rows that it did not have."""
        sequence, rows = self._sequences[seq], list(rows)
        if rows != sorted(set(rows)) or (rows and not 0 <= rows[0] <= rows[-1] < sequence.fresh):
            raise ValueError(f"rows {rows} are not an ascending path among the {sequence.fresh} rows of the last forward of {seq}")
        start = sequence.length
        sequence.moves += [(self._slot(sequence, start + row), self._slot(sequence, start + i)) for i, row in enumerate(rows) if row != i]
        sequence.length, sequence.fresh = start + len(rows), 0

    def _slot(self, sequence: _Sequence, position: int) -> int:
        return sequence.pages[position // self.page_size] * self.page_size + position % self.page_size

    def lengths(self, seqs: Iterable[int]) -> list[int]:
        return [self._sequences[s].length for s in seqs]
