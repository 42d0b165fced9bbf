"""The peer that the suffix drafter is measured beside: `SuffixDecodingCache` of ArcticInference (Snowflake, Apache-2.0), in C++.

It is no dependency. Where it is missing the benches say so in one line and go on without it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np

from specfx.runtime.tree import DraftTree

NAME = "Arctic"
PACKAGE = "arctic-inference"
INSTALL = f"pip install --no-deps {PACKAGE}==0.3.0"
DEPTH = 64
"""Its `max_tree_depth`, and the longest context it is given: its default and ours."""


def cache_class() -> Any | None:
    """`SuffixDecodingCache`, or None where it isn't installed."""
    try:
        from arctic_inference.suffix_decoding.cache import SuffixDecodingCache
    except ImportError:
        return None
    return SuffixDecodingCache


def facts(wanted: bool = True) -> dict[str, Any] | None:
    """Name and version for the JSON; None if it doesn't run."""
    return {"package": PACKAGE, "version": importlib.metadata.version(PACKAGE)} if wanted and cache_class() is not None else None


def absence(wanted: bool = True) -> str | None:
    """The line that says why the peer doesn't run; None if it does."""
    if not wanted:
        return f"{NAME}: left out (--no-peer)"
    return None if cache_class() is not None else f"{NAME}: not installed, so not measured beside ({INSTALL})"


class ArcticMethod:
    """It, called as `specfx.bench.replay` calls its methods: default options, drafts of at most `budget` tokens, one cache for all."""

    def __init__(self, name: str, budget: int, tree: bool) -> None:
        make = cache_class()
        assert make is not None, INSTALL
        self.name, self.budget, self.tree = name, budget, tree
        self._cache = make(max_tree_depth=DEPTH)
        self._tails: dict[int, list[int]] = {}

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int]) -> None:
        self._cache.start_request(seq, np.asarray(prompt, dtype=np.int32))
        self._tails[seq] = list(prompt[-DEPTH:])

    def accept(self, seq: int, tokens: Sequence[int]) -> None:
        self._cache.add_active_response(seq, list(tokens))
        self._tails[seq] = [*self._tails[seq], *tokens][-DEPTH:]

    def propose(self, seq: int) -> tuple[DraftTree, int]:
        context = np.asarray(self._tails[seq], dtype=np.int32)
        draft = self._cache.speculate(seq, context, max_spec_tokens=self.budget, use_tree_spec=self.tree)
        # An empty draft's match_len is whatever was tried last, often 63 (0.3.0).
        return DraftTree(tuple(draft.token_ids), tuple(draft.parents), tuple(draft.probs)), draft.match_len if draft.token_ids else 0

    def remove(self, seq: int, last: Sequence[int]) -> None:
        if last:
            self._cache.add_active_response(seq, list(last))
        self._cache.stop_request(seq)
        del self._tails[seq]
