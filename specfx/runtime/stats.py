"""What a `generate` call did, in numbers: counted by the runtime, read through `specfx.stats(model)`."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from specfx.timing import timed

STAGES = ("prefill", "draft", "forward", "accept", "total")


@dataclass
class CallStats:
    """Counters of one call, or of many added up. A call that the stock method served has its total time and nothing else.

    tokens: new tokens. forwards: target forwards of decode steps (a batch is one forward). prefills: prompts; prompt_tokens: their tokens
    that were run, reused_tokens: those found in the memory of an earlier turn or of another row. steps: decode steps counted for each
    sequence. proposed, accepted: drafted tokens by depth (index 0: first drafted token). seconds: wall time by stage; "forward" is the
    target, "draft" the drafter, "accept" walking, committing and bookkeeping, "total" the whole call.
    """

    tokens: int = 0
    forwards: int = 0
    steps: int = 0
    prefills: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    drafted_nodes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that one target forward gives a sequence, bonus included (the acceptance length); prefill is left out."""
        return (self.tokens - self.prefills) / self.steps if self.steps else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Of the steps that drafted to this depth, the share in which a token of this depth was accepted."""
        return [a / p for a, p in zip(self.accepted, self.proposed, strict=True)]

    def count_draft(self, proposed_depth: int, accepted_depth: int, nodes: int) -> None:
        missing = proposed_depth - len(self.proposed)
        if missing > 0:
            self.proposed += [0] * missing
            self.accepted += [0] * missing
        for d in range(proposed_depth):
            self.proposed[d] += 1
            self.accepted[d] += d < accepted_depth
        self.drafted_nodes += nodes

    def timed(self, stage: str) -> AbstractContextManager[None]:
        return timed(self.seconds, stage)

    def add(self, other: CallStats) -> None:
        for name in ("tokens", "forwards", "steps", "prefills", "prompt_tokens", "reused_tokens", "drafted_nodes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        depth = max(len(self.proposed), len(other.proposed))
        for name in ("proposed", "accepted"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, [sum(x[d] for x in (mine, theirs) if d < len(x)) for d in range(depth)])
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds


class Stats:
    """Statistics of a wrapped model: `last` is this thread's last call, `total` all calls since `speculate`.

    The counters of `last` are also attributes of this object.
    """

    def __init__(self) -> None:
        self.total = CallStats()
        self._last = threading.local()
        self._lock = threading.Lock()

    @property
    def last(self) -> CallStats:
        return getattr(self._last, "value", None) or CallStats()

    def record(self, call: CallStats) -> None:
        self._last.value = call
        with self._lock:
            self.total.add(call)

    @property
    def tokens(self) -> int:
        return self.last.tokens

    @property
    def forwards(self) -> int:
        return self.last.forwards

    @property
    def tokens_per_forward(self) -> float:
        return self.last.tokens_per_forward

    @property
    def acceptance_by_depth(self) -> list[float]:
        return self.last.acceptance_by_depth

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self.last.seconds)
