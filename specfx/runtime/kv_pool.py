"""The paged KV pool: who owns which page, where each sequence stands, and what the next step must move.

One page number stands for the same page in every layer's pair of pools. A sequence reserves pages when it is added: all that it can need,
if they are to be had, so that no step fails for want of memory; else it is extended as it grows. A forward writes its rows behind the
committed tokens; `commit` keeps an accepted path of them by noting *moves*, which the next forward's fused op carries out (in order, so
overlapping moves are safe); rows not kept are simply overwritten later. Sizes: "auto" grows on demand, a number of pages or a fraction of
the free memory is a hard bound. What a forward must be told (page tables, moves) is made on the host; the engine brings it to the device.

Sequences that begin with the same tokens share the full pages of them: a sequence writes behind its committed tokens only, so a full page
into which nothing is to be moved is never written again. Of what comes after those, a sequence has a copy of its own (`inherit`).
"""

from __future__ import annotations

from collections import Counter
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
    """State of one sequence. fresh: rows of the last forward that are neither committed nor rolled back. source, shared: the sequence
    whose first `shared` tokens are this one's too, until `inherit`. common: pages that are the source's too."""

    pages: list[int]
    length: int = 0
    fresh: int = 0
    moves: list[tuple[int, int]] = field(default_factory=list)
    source: int | None = None
    shared: int = 0
    common: int = 0


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
        self._users: dict[int, int] = {}  # of each page that is in use
        self._sequences: dict[int, _Sequence] = {}
        self._tables: tuple[tuple[int, ...], Tensor] | None = None
        self._whole = True  # False while pages change hands: Ctrl-C in between leaves it so

    @property
    def pages_in_use(self) -> int:
        self._settle()
        return self.pages - len(self._free)

    def _settle(self) -> None:
        """Count pages again by what the sequences hold, if they changed hands when something interrupted."""
        if not self._whole:
            self._users = dict(Counter(page for sequence in self._sequences.values() for page in sequence.pages))
            taken = self._users.keys() | self._scratch
            self._free = [page for page in reversed(range(self.pages + len(self._scratch))) if page not in taken]
            self._tables, self._whole = None, True

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def add(self, seq: int, capacity: int, source: int | None = None, shared: int = 0) -> None:
        """Reserve pages for `capacity` tokens. source: a sequence whose first `shared` tokens, present or to come, `seq` begins with;
        then `inherit` must follow. Raises `KVPoolError` (nothing changed) or `ValueError` for an id in use."""
        if seq in self._sequences:
            raise ValueError(f"sequence {seq} exists already")
        common = [] if source is None else self._sequences[source].pages[: min(shared, self._final(source)) // self.page_size]
        need = self.pages_for(capacity) - len(common)
        self._require(need)
        self._whole = False
        pages = common + [self._free.pop() for _ in range(need)]
        for page in pages:
            self._users[page] = self._users.get(page, 0) + 1
        self._sequences[seq] = _Sequence(pages, source=source, shared=shared, common=len(common))
        self._tables, self._whole = None, True

    def extend(self, seq: int, capacity: int) -> None:
        """Reserve pages for `capacity` tokens of `seq` in all, if it has fewer. Raises `KVPoolError` (nothing changed)."""
        sequence = self._sequences[seq]
        need = self.pages_for(capacity) - len(sequence.pages)
        if need > 0:
            self._require(need)
            self._whole = False
            pages = [self._free.pop() for _ in range(need)]
            self._users |= dict.fromkeys(pages, 1)
            sequence.pages += pages
            self._tables, self._whole = None, True

    def inherit(self, seq: int) -> int:
        """`seq` begins with what its source, if it was given one, holds by now; how many tokens that is. A forward of `seq` must follow
        before its source goes: moves are inherited too. Raises `ValueError` if the source lacks some of the tokens."""
        sequence = self._sequences[seq]
        if sequence.source is None:
            return sequence.length
        source = self._sequences.get(sequence.source)
        if source is None or source.length < sequence.shared:
            raise ValueError(f"sequence {seq} begins with {sequence.shared} tokens of {sequence.source}, which were never committed there")
        if self._final(sequence.source) < sequence.common * self.page_size:
            raise ValueError(f"sequence {sequence.source} is to move tokens into pages that sequence {seq} shares")
        with torch.inference_mode():  # where pools may have been made, and may be written whichever way they were
            for i in range(sequence.common, self.pages_for(sequence.shared)):
                rows = min(self.page_size, sequence.shared - i * self.page_size)
                for pool in self.pools:
                    pool[sequence.pages[i], :rows] = pool[source.pages[i], :rows]
        for start, end in source.moves:
            if (position := self._position(source, end)) < sequence.shared:
                sequence.moves.append((start, self._slot(sequence, position)))
        sequence.length, sequence.source = sequence.shared, None
        return sequence.length

    def _require(self, more: int) -> None:
        """Have so many free pages."""
        if (in_use := self.pages_in_use) + more > self.pages:
            self._grow(in_use + more)

    def _grow(self, pages: int) -> None:
        if self.limit is not None and pages > self.limit:
            raise KVPoolError(
                f"the KV pool holds {self.limit} pages of {self.page_size} tokens, {pages} are needed ({self.pages_in_use} in use); "
                "raise kv_pool, or ask for fewer tokens or sequences at a time"
            )
        target = pages
        if self.limit is None:  # by half, so that it does not grow often, but not by more than half of what would be left
            left = free_memory(self.device) // self.page_bytes - (pages - self.pages)
            target = max(pages, min(self.pages + self.pages // 2, pages + left // 2))
        more = self._allocate(target - self.pages)
        self._whole = False
        self._free.extend(reversed(more))
        self.pages += len(more)
        self._whole = True

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
                new[:present] = self.pools[i][:present]  # it may have grown before an interruption
                self.pools[i] = new
        except RuntimeError as e:
            self.pools = [pool[:present] for pool in self.pools]
            raise KVPoolError(f"the KV pool can't grow to {target} pages of {self.page_bytes} bytes on {self.device}: {e}") from e
        return range(present, target)

    def remove(self, seq: int) -> None:
        """Give the pages of `seq` back that no other sequence uses; unknown ids are ignored."""
        sequence = self._sequences.get(seq)
        if sequence is None:
            return
        self._settle()
        for heir in self._sequences.values():  # what it shares it keeps, if that is written
            if heir.source == seq and (full := heir.common * self.page_size) <= min(sequence.length, self._final(seq)):
                heir.length, heir.source = full, None
        self._whole = False
        del self._sequences[seq]
        self._give_back(sequence.pages)

    def trim(self, seq: int) -> None:
        """Give back the pages behind what is committed or still to be moved; rows of the last forward are rolled back."""
        sequence = self._sequences[seq]
        used = max([sequence.length, *(self._position(sequence, start) + 1 for start, _ in sequence.moves)])
        kept = self.pages_for(used)
        self._settle()
        self._whole = False
        pages, sequence.pages, sequence.fresh = sequence.pages[kept:], sequence.pages[:kept], 0
        self._give_back(pages)

    def _give_back(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                self._free.append(page)
        self._tables, self._whole = None, True

    def _final(self, seq: int) -> int:
        """Positions below this one hold what they will always hold, once they are committed."""
        sequence = self._sequences[seq]
        return min((self._position(sequence, end) for _, end in sequence.moves), default=len(sequence.pages) * self.page_size)

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
            if sequence.source is not None:
                raise ValueError(f"sequence {seq} has not inherited from {sequence.source} yet")
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

    def _position(self, sequence: _Sequence, slot: int) -> int:
        page, offset = divmod(slot, self.page_size)
        return sequence.pages.index(page) * self.page_size + offset

    def lengths(self, seqs: Iterable[int]) -> list[int]:
        return [self._sequences[s].length for s in seqs]
