"""Typed, validated options of `specfx.speculate`: common ones, and a set for each method.

A method's class is the only place that lists what it accepts; `parse` tells a caller who misspells one which there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specfx.errors import OptionError
from specfx.runtime.tree import MAX_ROWS, TreeShape

ENGINES = ("auto", "compiled", "graph", "eager")
COMPILE_MODES = ("background", "sync", "off")
AUTOMATIC_TOPK = 4
AUTOMATIC_DRAFT_TOKENS = 8
"""Trees of `MtpOptions` where nothing is asked for."""


def _check(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise OptionError(f"{name}={value!r}: {rule}")


@dataclass(frozen=True)
class CommonOptions:
    """Options of every method.

    engine: which engine to prefer; "auto" takes the compiled one. An engine that can't be had, or not yet, is stood in for by the next
    (compiled, graph, eager), with the reason in the report (but a batch goes to stock then, not to the eager engine, which runs its
    sequences one after another); `kv_pool`, `page_size`, `disable_passes` and `cuda_graphs` are of the first
    two. compile: "background" returns at once: the stock `generate` serves until the compiled engine is ready (on a GPU, and with
    SPECFX_NO_ARTIFACTS, the graph engine does); "sync" waits in `speculate`; "off" never compiles. num_speculative_tokens: most
    nodes of a draft tree, ``1 .. 63`` (15 and the pending token fill one tile of 16 rows).
    kv_pool: size of the KV page pool: "auto" (room for the prompt and `max_new_tokens` at once or, if that is more than there is, as the
    text grows), an int (pages), or a float in (0, 1) (fraction of free memory). page_size: tokens a page. disable_passes: names of passes
    to leave out. cuda_graphs: on a GPU, replay steps as CUDA graphs. max_autotune: compile each size of those steps by itself, tuned by
    measuring, which takes a minute or more when it is first met. prefill_callback: called with (tokens done, tokens of all prompts of the
    call) after each piece of a prompt.
    """

    engine: str = "auto"
    compile: str = "background"
    num_speculative_tokens: int = 15
    kv_pool: str | int | float = "auto"
    page_size: int = 64
    disable_passes: tuple[str, ...] = ()
    cuda_graphs: bool = True
    max_autotune: bool = False
    prefill_callback: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        _check(self.engine in ENGINES, "engine", self.engine, f"must be one of {', '.join(ENGINES)}")
        _check(self.compile in COMPILE_MODES, "compile", self.compile, f"must be one of {', '.join(COMPILE_MODES)}")
        contradiction = self.engine == "compiled" and self.compile == "off"
        _check(not contradiction, "compile", self.compile, 'engine="compiled" needs compile="sync" or "background"')
        n = self.num_speculative_tokens
        _check(isinstance(n, int) and 1 <= n < MAX_ROWS, "num_speculative_tokens", n, f"must be an int in 1..{MAX_ROWS - 1}")
        pool = self.kv_pool
        ok = pool == "auto" or (type(pool) is int and pool > 0) or (type(pool) is float and 0 < pool < 1)
        _check(ok, "kv_pool", pool, 'must be "auto", a number of pages (int > 0), or a fraction of free memory (0 < float < 1)')
        _check(type(self.page_size) is int and self.page_size >= 1, "page_size", self.page_size, "must be an int >= 1")
        named = not isinstance(self.disable_passes, str) and all(isinstance(p, str) for p in self.disable_passes)
        _check(named, "disable_passes", self.disable_passes, "must be a sequence of names of passes")
        _check(
            self.prefill_callback is None or callable(self.prefill_callback), "prefill_callback", self.prefill_callback, "must be callable"
        )
        object.__setattr__(self, "disable_passes", tuple(self.disable_passes))
        _check(isinstance(self.cuda_graphs, bool), "cuda_graphs", self.cuda_graphs, "must be True or False")
        _check(isinstance(self.max_autotune, bool), "max_autotune", self.max_autotune, "must be True or False")


@dataclass(frozen=True)
class NoneOptions:
    """``method=None``: plain decoding, nothing to set."""


@dataclass(frozen=True)
class SuffixOptions:
    """``method="suffix"``, named as in ArcticInference where they mean the same.

    max_tree_depth: longest context that is matched, ``1 .. 2048``. max_spec_factor, max_spec_offset: a draft continues at most
    ``factor * match + offset`` tokens (default: as far as it is probable). min_token_prob: a node is drafted only if its estimated path
    probability is at least this. use_tree_spec: trees, or the most probable chain. max_cached_requests: earlier outputs to draft from
    (-1: as many as fit, 0: none). max_cached_tokens: tokens of them, about 60 bytes each. cache: a file of `SuffixDrafter.save` to
    start from.
    """

    max_tree_depth: int = 64
    max_spec_factor: float = math.inf
    max_spec_offset: float = 0.0
    min_token_prob: float = 0.13
    use_tree_spec: bool = True
    max_cached_requests: int = -1
    max_cached_tokens: int = 1_000_000
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        depth = self.max_tree_depth
        _check(type(depth) is int and 1 <= depth <= 2048, "max_tree_depth", depth, "must be an int in 1..2048")
        _check(self.max_spec_factor >= 0, "max_spec_factor", self.max_spec_factor, "must be >= 0")
        _check(math.isfinite(self.max_spec_offset), "max_spec_offset", self.max_spec_offset, "must be finite")
        _check(isinstance(self.use_tree_spec, bool), "use_tree_spec", self.use_tree_spec, "must be True or False")
        _check(0 < self.min_token_prob <= 1, "min_token_prob", self.min_token_prob, "must be in (0, 1]")
        requests, tokens = self.max_cached_requests, self.max_cached_tokens
        _check(type(requests) is int and requests >= -1, "max_cached_requests", requests, "must be an int >= 0, or -1 for no limit")
        _check(type(tokens) is int and 0 <= tokens < 2**24, "max_cached_tokens", tokens, f"must be an int in 0..{2**24 - 1}")


@dataclass(frozen=True)
class MtpOptions:
    """``method="mtp"``, named as in SGLang.

    head: path of a head's safetensors file, of the folder that holds it, of a NextN export, or of a checkpoint with a head; None looks in
    the model's own checkpoint. num_steps: how many tokens deep the head drafts (its last layer is used recursively, so this may exceed
    its number of layers). topk: how many tokens are followed at each step; 1 drafts a chain. num_draft_tokens: most tokens of a tree,
    the pending one included. None for either: what pays on the device at hand, within `num_speculative_tokens`. draft_vocab: a file of
    tokens to draft, as `specfx train mtp` writes it; "auto" takes the one beside the head, if there is one; None drafts all tokens.
    min_token_prob: a node is verified only if the head finds its path at least this probable. wiring: "published" runs a head as vLLM and
    SGLang do; "transformers" as `generate(use_mtp=True)` does, which differs for Step-3.5 (the target's LM head for every layer, hidden
    states after the final norm) and Inkling (the embedding without its norm). enable_suffix_decoding: what the suffix drafter finds is
    verified too, in one tree with the head's drafts.
    """

    head: str | Path | None = None
    num_steps: int = 3
    topk: int | None = None
    num_draft_tokens: int | None = None
    draft_vocab: str | Path | None = "auto"
    min_token_prob: float = 0.02
    wiring: str = "published"
    enable_suffix_decoding: bool = False

    def __post_init__(self) -> None:
        along = self.enable_suffix_decoding
        _check(isinstance(along, bool), "enable_suffix_decoding", along, "must be True or False")
        _check(self.wiring in ("published", "transformers"), "wiring", self.wiring, 'must be "published" or "transformers"')
        steps, topk, most = self.num_steps, self.topk, self.num_draft_tokens
        _check(type(steps) is int and 1 <= steps < MAX_ROWS, "num_steps", steps, f"must be an int in 1..{MAX_ROWS - 1}")
        _check(topk is None or (type(topk) is int and 1 <= topk <= MAX_ROWS), "topk", topk, f"must be an int in 1..{MAX_ROWS}, or None")
        if topk is not None:
            _check(steps * topk <= MAX_ROWS, "topk", topk, f"num_steps * topk must not exceed {MAX_ROWS}")
        _check(0 <= self.min_token_prob < 1, "min_token_prob", self.min_token_prob, "must be in [0, 1)")
        ok = most is None or (type(most) is int and 2 <= most <= MAX_ROWS)
        _check(ok, "num_draft_tokens", most, f"must be an int in 2..{MAX_ROWS}, or None")

    def shape(self, max_nodes: int, chains_only: bool = False) -> TreeShape:
        """The trees to draft: at most `max_nodes` nodes each."""
        topk = 1 if chains_only else self.topk if self.topk is not None else min(AUTOMATIC_TOPK, MAX_ROWS // self.num_steps)
        most = self.num_draft_tokens or (self.num_steps + 1 if topk == 1 else AUTOMATIC_DRAFT_TOKENS)
        return TreeShape(self.num_steps, topk, min(most, max_nodes + 1))


METHODS: dict[str | None, type] = {None: NoneOptions, "suffix": SuffixOptions, "mtp": MtpOptions}


def parse(method: str | None, options: dict[str, Any]) -> tuple[CommonOptions, Any]:
    """Split and validate keyword options. Raises `OptionError` for an unknown method, an unknown option or a bad value."""
    if method not in METHODS:
        known = ", ".join(repr(m) for m in METHODS)
        raise OptionError(f"unknown method {method!r}: choose one of {known}")
    common_names = {f.name for f in dataclasses.fields(CommonOptions)}
    own_names = {f.name for f in dataclasses.fields(METHODS[method])}
    unknown = sorted(set(options) - common_names - own_names)
    if unknown:
        known = ", ".join(sorted(own_names) + sorted(common_names))
        raise OptionError(f"method {method!r} has no option {', '.join(map(repr, unknown))}; it knows: {known}")
    try:
        common = CommonOptions(**{k: v for k, v in options.items() if k in common_names})
        own = METHODS[method](**{k: v for k, v in options.items() if k in own_names})
    except TypeError as e:
        raise OptionError(f"an option of method {method!r} has the wrong type: {e}") from e
    return common, own
