"""What `specfx.explain(model)` returns: everything that was decided about a model, as data and as readable text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from specfx.errors import Refusal
from specfx.passes.framework import PassRecord


@dataclass(frozen=True)
class Report:
    """engine: "compiled", "graph", "eager", or "stock" while the first is being prepared; verifies: "trees", "chains" or "nothing" (then
    stock `generate` serves).

    passes: one record each, in order. refusals: why faster paths were not taken. stock_calls: how many `generate` calls went to the stock
    method, by reason. packed_bytes: memory of the packed weights. pages, pages_in_use: the KV pool. seconds: preparation by stage,
    and the first call.
    graph: the rewritten graph in normal form (only with ``graph=True``).
    """

    model: str
    method: str | None
    engine: str
    verifies: str
    passes: tuple[PassRecord, ...]
    refusals: tuple[Refusal, ...]
    stock_calls: Counter[str]
    packed_bytes: int
    pages: int
    pages_in_use: int
    page_size: int
    seconds: dict[str, float]
    graph: str | None = None

    def __str__(self) -> str:
        lines = [f"specfx on {self.model}: method {self.method!r}, engine {self.engine}, verifies {self.verifies}"]
        if self.seconds:
            lines.append("prepared in " + ", ".join(f"{stage} {s:.1f} s" for stage, s in self.seconds.items()))
        if self.pages:
            lines.append(f"KV pool: {self.pages} pages of {self.page_size} tokens, {self.pages_in_use} in use")
        if self.packed_bytes:
            lines.append(f"packed copy of the weights: {self.packed_bytes / 2**20:.0f} MiB")
        sections = [
            ("passes", self.passes),
            ("refusals", self.refusals),
            ("calls served by stock generate", sorted(self.stock_calls.items())),
        ]
        for title, entries in sections:
            if entries:
                lines.append(f"{title}:")
                lines += [f"  {e[1]} x {e[0]}" if isinstance(e, tuple) else f"  {e}" for e in entries]
        if self.graph is not None:
            lines += ["graph:", self.graph]
        return "\n".join(lines)
