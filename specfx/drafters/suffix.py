"""``method="suffix"``: draft what followed whenever a text said what this one says now.

After SuffixDecoding (Oliaro et al., 2024). Four parts, each of which knows only those before it:

1. `suffix_tree`: what followed every context of some token streams, with counts, grown and shrunk token by token;
2. `suffix_model`: how probable each continuation is, judging by two such trees, and the draft tree that follows from it;
3. `suffix_cache`: the tree of earlier outputs, shared by all requests, bounded, saved and loaded;
4. `SuffixDrafter`, here: a tree for each request, and the calls of the runtime.
"""

from __future__ import annotations

import functools
import logging
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specfx.drafters import suffix_model as kernels
from specfx.drafters._jit import COMPILED, view
from specfx.drafters.suffix_cache import OutputCache, read
from specfx.drafters.suffix_tree import SuffixTree
from specfx.errors import Reason, Refusal, SuffixCacheError
from specfx.options import SuffixOptions
from specfx.runtime.tree import EMPTY_TREE, DraftTree

log = logging.getLogger("specfx")

LARGEST_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class SuffixStatistics:
    """requests: running. outputs, tokens: earlier and running outputs in the cache. evicted: outputs taken out so far. request_bytes,
    cache_bytes: memory of the requests' own trees, and of the cache."""

    requests: int
    outputs: int
    tokens: int
    evicted: int
    request_bytes: int
    cache_bytes: int


class _Request:
    """State of one request. fields: the int32 array that `suffix_model` works on. serial: a copy of its `SERIAL`, for quick reading.
    written: the output, which the cache keeps too."""

    def __init__(self, depth: int, length: int, ends: Sequence[int]) -> None:
        self.tree = SuffixTree(depth, length + 1024)  # an answer's worth of room, so that it seldom has to grow in the middle of one
        fields = np.zeros(kernels.ENDS + len(ends), dtype=np.int32)
        fields[kernels.SERIAL] = -1
        fields[kernels.ENDS :] = ends
        self.fields = view(fields)
        self.output = self.fields[kernels.OUTPUT : kernels.OUTPUT + 2]
        self.match = self.fields[kernels.MATCH : kernels.MATCH + 2]
        self.serial = -1
        self.written = array("i")

    def forget_output(self) -> None:
        """The cache no longer records the output, and has no place for it in its tree."""
        self.serial = self.fields[kernels.SERIAL] = -1
        self.output[0] = self.output[1] = 0


class SuffixDrafter:
    """Drafts trees of at most `max_nodes` nodes from each request's own text and from earlier outputs.

    vocab_size: of the target's tokens; a saved cache must have the same. All calls may come from any thread.
    """

    name = "suffix"
    needs_hidden = False
    beside = None
    on_trial = False
    drafting = None

    def __init__(self, options: SuffixOptions, max_nodes: int, vocab_size: int = LARGEST_TOKEN + 1) -> None:
        self.options, self.max_nodes, self.vocab_size = options, max_nodes, vocab_size
        self.cache = self._new_cache()
        self._whole = True  # False while the trees are being changed: a call that was interrupted leaves it so
        self._model = kernels.new_model()
        self._model_view = view(self._model)
        self._requests: dict[int, _Request] = {}
        self._lock = threading.RLock()
        self._ints = view(np.zeros(kernels.SCRATCH, dtype=np.int32))
        self._floats = view(np.zeros(kernels.SCRATCH_PROB))
        self._tokens = view(np.zeros(64, dtype=np.int32))
        if options.cache is not None:
            self.load(options.cache)

    @property
    def refusals(self) -> list[Refusal]:
        """What is slower than it could be."""
        if COMPILED:
            return []
        return [Refusal("suffix drafter", Reason.NO_NUMBA, "it runs as plain Python, some fifty times slower", "pip install numba")]

    def _new_cache(self) -> OutputCache:
        options = self.options
        return OutputCache(options.max_tree_depth, options.max_cached_tokens, options.max_cached_requests, self._cursors, self._match_again)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around every change of the trees (`accept` does the same in place). One that was interrupted (Ctrl-C, no memory) costs the
        earlier outputs, never a right result."""
        with self._lock:
            if not self._whole:
                self._recover()
            self._whole = False
            yield
            self._whole = True

    def _recover(self) -> None:
        log.warning("specfx: the suffix drafter was interrupted; it forgets the earlier outputs and goes on")
        self.cache = self._new_cache()
        for request in self._requests.values():
            request.forget_output()
            request.fields[kernels.STAGE] = kernels.NEW
            request.match[0] = request.match[1] = 0
        self._whole = True

    # The calls of the runtime: see `Drafter`.

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        tokens = _as_tokens(prompt)
        request = _Request(self.options.max_tree_depth, len(tokens), ends)
        with self._lock:
            if seq in self._requests:
                raise ValueError(f"sequence {seq} is in use: remove it before it is added again")
            with self._changing():
                fields = request.fields
                request.tree.extend(fields[kernels.TAIL : kernels.TAIL + 2], tokens, 1, 1)
                fields[kernels.POSITION] = len(tokens)
                self._requests[seq] = request
                request.serial, request.written = self.cache.start(request.output)
                fields[kernels.SERIAL] = request.serial
                known = tokens[-self.options.max_tree_depth :]
                kernels.match_all(self.cache.tree.view, fields, view(known), 0, len(known))

    def accept(self, seq: int, tokens: Sequence[int], hidden: torch.Tensor | None = None, drafted: DraftTree | None = None) -> None:
        with self._lock:
            request, cache, n = self._requests[seq], self.cache, len(tokens)
            fields = request.fields
            if n == 1:  # the common case, and the one in which every call counts
                self._tokens[0] = tokens[0]
            else:
                self._hold(tokens)
            if not self._whole:
                self._recover()
                cache = self.cache
            self._whole = False
            if request.serial >= 0:
                if cache.tokens + n > cache.max_tokens and not cache.make_room(n):
                    self._stop_recording(request)
                else:
                    request.written.extend(tokens)
                    cache.tokens += n
            done = 0
            while (
                done := kernels.accept(
                    request.tree.view, cache.tree.view, fields, self._tokens, done, n, self._model_view, cache.ledger, self._ints
                )
            ) < n:
                (cache.tree if fields[kernels.STAGE] == kernels.IN_LOCAL else request.tree).grow()
            self._whole = True

    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        with self._lock:
            return [self._draft(self._requests[seq], min(budget, self.max_nodes)) for seq, budget in zip(seqs, budgets, strict=True)]

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        with self._lock:
            request = self._requests.get(seq)
            if request is None:
                return
            if last:
                self.accept(seq, last)
            with self._changing():
                del self._requests[seq]
                if request.serial >= 0:
                    self.cache.end(request.serial)

    # Beyond them.

    def match_length(self, seq: int) -> int:
        """Tokens of the longest suffix of a request's text that was ever followed by something, here or in earlier outputs."""
        with self._lock:
            request = self._requests[seq]
            return int(kernels.match_length(request.tree.view, self.cache.tree.view, request.fields))

    def statistics(self) -> SuffixStatistics:
        """What the drafter holds."""
        with self._lock:
            return SuffixStatistics(
                requests=len(self._requests),
                outputs=len(self.cache),
                tokens=self.cache.tokens,
                evicted=self.cache.evicted,
                request_bytes=sum(request.tree.nbytes for request in self._requests.values()),
                cache_bytes=self.cache.nbytes,
            )

    def evict(self, max_tokens: int = 0) -> int:
        """Forget the least useful earlier outputs until at most `max_tokens` tokens are left; running ones stay. Returns how many went."""
        with self._changing():
            return self.cache.evict(max_tokens)

    def save(self, path: str | Path) -> None:
        """Write the earlier outputs and what was learned to an ``npz`` file. Raises `SuffixCacheError` if it can't be written."""
        with self._lock:
            self.cache.save(path, self._model, self.vocab_size)

    def load(self, path: str | Path) -> None:
        """Continue from a file of `save`. Raises `SuffixCacheError`, with nothing changed, for one that is damaged or another model's,
        and while requests are running."""
        content = read(path, self.vocab_size)
        with self._lock:
            if self._requests:
                raise SuffixCacheError(f"{len(self._requests)} requests are running: load the suffix cache before or after them")
            with self._changing():
                self.cache.adopt(content)
                self._model[:] = content["model"]

    # Parts.

    def _hold(self, tokens: Sequence[int]) -> None:
        """Put `tokens` where the compiled code reads them."""
        if len(tokens) > len(self._tokens):
            self._tokens = view(np.zeros(2 * len(tokens), dtype=np.int32))
        for i, token in enumerate(tokens):
            self._tokens[i] = token

    def _stop_recording(self, request: _Request) -> None:
        self.cache.end(request.serial)
        request.forget_output()

    def _draft(self, request: _Request, budget: int) -> DraftTree:
        options, local, world = self.options, request.tree.view, self.cache.tree.view
        depth = budget
        if options.max_spec_factor < float("inf"):
            match = kernels.match_length(local, world, request.fields)
            depth = min(budget, int(options.max_spec_factor * match + options.max_spec_offset))
        if depth <= 0:
            return EMPTY_TREE
        n = kernels.propose(
            local,
            world,
            request.fields,
            self._model_view,
            budget,
            depth,
            options.min_token_prob,
            options.use_tree_spec,
            self._ints,
            self._floats,
        )
        if n == 0:
            return EMPTY_TREE
        tokens, parents = kernels.NODES, kernels.NODES + kernels.MAX_NODES
        return DraftTree.unchecked(
            tuple(self._ints[tokens : tokens + n].tolist()),
            tuple(self._ints[parents : parents + n].tolist()),
            tuple(self._floats[kernels.NODE_PROB : kernels.NODE_PROB + n].tolist()),
        )

    def _cursors(self) -> Iterable[Any]:
        for request in self._requests.values():
            yield request.output
            yield request.match

    def _match_again(self) -> None:
        """The cache's tree has been built anew: it is matched from the output alone, the prompt is not looked up again."""
        for request in self._requests.values():
            request.match[0], request.match[1] = request.output if request.serial >= 0 else (0, 0)


def _as_tokens(tokens: Sequence[int]) -> np.ndarray:
    """Token ids as int32. Raises `ValueError` for one below 0 or above `LARGEST_TOKEN`."""
    try:
        array = np.asarray(tokens, dtype=np.int64)
    except OverflowError as e:
        raise ValueError(f"token ids must be in 0..{LARGEST_TOKEN}: {e}") from e
    if array.size and not 0 <= array.min() <= array.max() <= LARGEST_TOKEN:
        raise ValueError(f"token ids must be in 0..{LARGEST_TOKEN}, got {array.min()}..{array.max()}")
    return array.astype(np.int32)


@functools.cache
def prepare() -> None:
    """Have all code compiled (8 s, once on a machine) or loaded (0.2 s) now rather than in the middle of a generation."""
    drafter = SuffixDrafter(SuffixOptions(max_cached_tokens=8), 1)
    for seq in range(2):
        drafter.add(seq, [1, 2, 1])
        drafter.accept(seq, [2, 1, 2])
        drafter.propose([seq], [1])
        drafter.match_length(seq)
        drafter.remove(seq, [1])
    drafter.evict()
