"""`specfx bench suffix --memory`: bytes a token of the suffix drafter, beside ArcticInference's, as the system sees them.

A drafter's own count leaves out what its allocator takes. So it is resident memory, before and after half a million tokens went into
request trees (half prompt, half output) or into the cache (outputs of 500 tokens), and how much stays after everything is evicted. Each
figure is from a fresh process that has the token ids in memory and has used a drafter before the first reading (``/proc/self/statm``;
after garbage collection). Memory that the C library keeps after it was freed counts, except in the last column, which is read after
``malloc_trim``.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

import numpy as np

from specfx.bench import arctic, report
from specfx.bench.suffix_streams import EARLIER_TOKENS, make_texts, warm_up
from specfx.drafters.suffix import SuffixDrafter
from specfx.errors import OptionError
from specfx.options import SuffixOptions

TOKENS = 500_000
ROW = 2000
"""Tokens of a request."""
ACCEPTED = 8
"""Tokens of its output that it is given at a time."""
OURS, CACHE, REQUESTS = "ours", "cache", "requests"

Held = tuple[int | None, Callable[[], Any]]
"""Bytes by the drafter's own count, and what takes everything out again."""


def run(kinds: Sequence[str], written: Sequence[int], peer: bool) -> list[dict[str, Any]]:
    """Measure on each kind of stream and print. Returns what goes into the JSON."""
    found = []
    for kind in kinds:
        with report.Progress(f"memory, {kind}"):
            found += measure(kind, written, peer)
    print(table(found))
    return found


def measure(kind: str, written: Sequence[int], peer: bool, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """`occupy` for each side and each kind of tree, in processes of their own."""
    if not Path("/proc/self/statm").exists():
        raise OptionError("memory=True: resident memory is read from /proc, which this system doesn't have")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.npy")
        np.save(path, make_rows(kind, written, tokens))
        for what in (REQUESTS, CACHE):
            for side in (OURS, arctic.NAME)[: 1 + peer]:
                code = f"from {__name__} import occupy; occupy({path!r}, {side!r}, {what!r})"
                done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
                found.append({"stream": kind, "side": side, "tree": what, **loads(done.stdout)})
    return found


def make_rows(kind: str, written: Sequence[int], tokens: int) -> np.ndarray:
    """Streams of 2,000 tokens, ``tokens`` in all at least: int32 ``[R, 2000]``. Copies of the traces differ in all their token ids."""
    if kind != "traces":
        texts = make_texts(kind)
        return np.array([texts(ROW) for _ in range(-(-tokens // ROW))], dtype=np.int32)
    text = np.array(written, dtype=np.int32)
    copies = -(-max(tokens, ROW) // len(text))
    ids = np.concatenate([text + copy * (int(text.max()) + 1) for copy in range(copies)])
    return ids[: len(ids) // ROW * ROW].reshape(-1, ROW)


def occupy(path: str, side: str, what: str) -> None:
    """To be run in a fresh process: reads rows from `path`, puts them into a cache or into request trees, takes them out, and prints
    bytes more than before: ``bytes`` with all tokens in, ``own`` by the drafter's own count, ``left`` with all out, ``trimmed`` when the
    allocator has handed back to the system what it can."""
    rows = np.load(path)
    rows.sum()
    hold = _hold_ours if side == OURS else _hold_theirs
    warm_up(32)
    hold(rows[:2], what)[1]()
    before = _resident_bytes()
    own, forget = hold(rows, what)
    full = _resident_bytes()
    forget()
    left = _resident_bytes()
    trimmed = _resident_bytes() - before if _trim() else None
    print(dumps({"tokens": rows.size, "bytes": full - before, "own": own, "left": left - before, "trimmed": trimmed}))


def _resident_bytes() -> int:
    """Memory of this process that is in RAM, without garbage."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _trim() -> bool:
    """Have glibc hand free memory back to the system. False with another C library."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return False
    trim(0)
    return True


def _hold_ours(rows: np.ndarray, what: str) -> Held:
    drafter = SuffixDrafter(SuffixOptions(max_cached_tokens=rows.size, max_cached_requests=-1 if what == CACHE else 0), 32)
    if what == CACHE:
        for seq, row in enumerate(rows.reshape(-1, EARLIER_TOKENS)):
            drafter.add(seq, [])
            drafter.remove(seq, row.tolist())
        return drafter.statistics().cache_bytes, drafter.evict
    for seq, row in enumerate(rows):
        text = row.tolist()
        drafter.add(seq, text[: ROW // 2])
        for start in range(ROW // 2, ROW, ACCEPTED):
            drafter.accept(seq, text[start : start + ACCEPTED])

    def forget() -> None:
        for seq in range(len(rows)):
            drafter.remove(seq)

    return drafter.statistics().request_bytes, forget


def _hold_theirs(rows: np.ndarray, what: str) -> Held:
    make = arctic.cache_class()
    assert make is not None, arctic.INSTALL
    cache = make(max_tree_depth=arctic.DEPTH, max_cached_requests=-1 if what == CACHE else 0)
    if what == CACHE:
        outputs = rows.reshape(-1, EARLIER_TOKENS)
        for seq, row in enumerate(outputs):
            cache.start_request(seq, [])
            cache.add_active_response(seq, row)
            cache.stop_request(seq)
        return None, lambda: [cache.evict_cached_response(seq) for seq in range(len(outputs))]
    for seq, row in enumerate(rows):
        cache.start_request(seq, row[: ROW // 2])
        for start in range(ROW // 2, ROW, ACCEPTED):
            cache.add_active_response(seq, row[start : start + ACCEPTED])
    return None, lambda: [cache.stop_request(seq) for seq in range(len(rows))]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Bytes a token, and what is left of them when all is out again."""
    header = ("bytes a token", "of", "tree", "tokens", "resident", "own count", "left after eviction", "and a trim")
    lines = []
    for row in rows:
        each = [row[name] / row["tokens"] if row[name] is not None else None for name in ("bytes", "own", "left", "trimmed")]
        lines.append((row["stream"], row["side"], row["tree"], str(row["tokens"]), *[report.number(value, 1) for value in each]))
    return report.table(header, lines)
