"""`specfx bench replay`: how far drafts reach on recorded text. No model runs: a draft is walked against what was written next.

1. The continuations of a stream (`specfx.bench.traces`) are replayed in order with one drafter.
2. For each *step* a method drafts, the recorded text decides which nodes are accepted, and these and the next token are committed. That
   is what greedy decoding does if the model writes the recorded text. The continuation's first token is given: it comes from prefill.
3. Three tables: each method on each stream; steps by the length of the context that the draft came from; and, for our drafter,
   *reliability*: of nodes estimated at p, what share was accepted, with the expected calibration error (Naeini et al., 2015).
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from specfx.bench import arctic, report
from specfx.bench.traces import Stream, read_stream
from specfx.drafters.suffix import SuffixDrafter
from specfx.errors import OptionError
from specfx.options import SuffixOptions
from specfx.runtime.tree import MAX_ROWS, DraftTree

OURS = "suffix, tree"
"""The method that the table by match length and the one of reliability are about."""
PEER = f"{arctic.NAME}, chain"
"""The peer as it comes."""


# The walk.


class Method(Protocol):
    """A way to draft, for many sequences; as `Drafter`, except that `propose` also returns the length of the context it drafted from."""

    name: str

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int]) -> None: ...

    def accept(self, seq: int, tokens: Sequence[int]) -> None: ...

    def propose(self, seq: int) -> tuple[DraftTree, int]: ...

    def remove(self, seq: int, last: Sequence[int]) -> None: ...


class SuffixMethod:
    """Ours: one `SuffixDrafter`, drafts of at most `budget` nodes."""

    def __init__(self, name: str, budget: int, options: SuffixOptions) -> None:
        self.name, self.budget = name, budget
        self._drafter = SuffixDrafter(options, budget)

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int]) -> None:
        self._drafter.add(seq, prompt, ends)

    def accept(self, seq: int, tokens: Sequence[int]) -> None:
        self._drafter.accept(seq, tokens)

    def propose(self, seq: int) -> tuple[DraftTree, int]:
        match = self._drafter.match_length(seq)
        return self._drafter.propose([seq], [self.budget])[0], match

    def remove(self, seq: int, last: Sequence[int]) -> None:
        self._drafter.remove(seq, last)


def methods(budget: int, peer: bool) -> list[Method]:
    """What is compared at a budget of so many nodes."""
    found: list[Method] = [
        SuffixMethod(OURS, budget, SuffixOptions()),
        SuffixMethod("suffix, chain", budget, SuffixOptions(use_tree_spec=False)),
    ]
    if peer:
        found += [arctic.ArcticMethod(PEER, budget, tree=False), arctic.ArcticMethod(f"{arctic.NAME}, tree", budget, tree=True)]
    return found


def fates(tree: DraftTree, future: Sequence[int]) -> list[bool | None]:
    """Whether each node is accepted if `future` is what comes; None where it ends before the node could be compared."""
    depths = tree.depths()
    found: list[bool | None] = []
    for node, parent in enumerate(tree.parents):
        fate: bool | None = True if parent < 0 else found[parent]
        if fate:
            place = depths[node + 1] - 1
            fate = tree.tokens[node] == future[place] if place < len(future) else None
        found.append(fate)
    return found


@dataclass
class Tally:
    """Sums over steps. tokens: accepted ones and the target's own."""

    steps: int = 0
    tokens: int = 0
    proposed: int = 0
    accepted: int = 0

    def add(self, tokens: int, proposed: int, accepted: int) -> None:
        self.steps += 1
        self.tokens += tokens
        self.proposed += proposed
        self.accepted += accepted

    @property
    def tokens_per_step(self) -> float | None:
        return self.tokens / self.steps if self.steps else None

    @property
    def accepted_per_step(self) -> float | None:
        return self.accepted / self.steps if self.steps else None

    @property
    def proposed_per_accepted(self) -> float | None:
        return self.proposed / self.accepted if self.accepted else None

    def as_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "tokens_per_step": self.tokens_per_step,
            "accepted_per_step": self.accepted_per_step,
            "proposed_per_accepted": self.proposed_per_accepted,
        }


BINS = 10


@dataclass
class Reliability:
    """Nodes whose fate is known, by estimated path probability, in bins ``[0, 0.1), [0.1, 0.2), ... [0.9, 1]``. nodes: how many in each.
    estimated, accepted: sums of estimates, and how many were accepted. unknown: nodes that the recorded text ends before."""

    nodes: list[int] = field(default_factory=lambda: [0] * BINS)
    estimated: list[float] = field(default_factory=lambda: [0.0] * BINS)
    accepted: list[int] = field(default_factory=lambda: [0] * BINS)
    unknown: int = 0

    def add(self, prob: float, fate: bool | None) -> None:
        if fate is None:
            self.unknown += 1
            return
        place = min(int(prob * BINS), BINS - 1)
        self.nodes[place] += 1
        self.estimated[place] += prob
        self.accepted[place] += fate

    @property
    def error(self) -> float | None:
        """Expected calibration error: how far a bin's mean estimate is from its accepted share, in the mean over nodes."""
        total = sum(self.nodes)
        return sum(abs(e - a) for e, a in zip(self.estimated, self.accepted, strict=True)) / total if total else None


MATCH_LENGTHS = ("0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33+")
_LONGEST = (0, 1, 2, 4, 8, 16, 32)


@dataclass
class Outcome:
    """One method on one stream. by_match: by length of the context drafted from, as in `MATCH_LENGTHS`."""

    stream: str
    budget: int
    method: str
    total: Tally = field(default_factory=Tally)
    by_match: list[Tally] = field(default_factory=lambda: [Tally() for _ in MATCH_LENGTHS])
    reliability: Reliability = field(default_factory=Reliability)

    def as_dict(self) -> dict[str, Any]:
        return {
            "stream": self.stream,
            "budget": self.budget,
            "method": self.method,
            **self.total.as_dict(),
            "by_match": {name: tally.as_dict() for name, tally in zip(MATCH_LENGTHS, self.by_match, strict=True)},
            "reliability": {**dataclasses.asdict(self.reliability), "expected_calibration_error": self.reliability.error},
        }


def replay(method: Method, stream: Stream, budget: int) -> Outcome:
    """Draft and walk through all traces, in order."""
    outcome = Outcome(stream.name, budget, method.name)
    for seq, trace in enumerate(stream.traces):
        text = trace.continuation
        method.add(seq, trace.context, trace.ends)
        fresh, position = text[:1], 1
        while position < len(text):
            method.accept(seq, fresh)
            tree, match = method.propose(seq)
            fate = fates(tree, text[position : position + MAX_ROWS])
            accepted = fate.count(True)
            fresh = text[position : position + accepted + 1]
            position += len(fresh)
            for tally in (outcome.total, outcome.by_match[bisect_left(_LONGEST, match)]):
                tally.add(len(fresh), len(tree), accepted)
            for prob, known in zip(tree.probs, fate, strict=True):
                outcome.reliability.add(prob, known)
        method.remove(seq, fresh)
    return outcome


# The command.


def method_table(outcomes: Sequence[Outcome]) -> str:
    """One row for each method on each stream."""
    header = ("stream", "budget", "method", "steps", "tokens/step", "accepted/step", "proposed/accepted")
    return report.table(header, [(o.stream, str(o.budget), o.method, *_cells(o.total, tokens=True)) for o in outcomes])


def match_table(ours: Outcome, peer: Outcome | None) -> str:
    """Steps by length of the context that each method drafted from."""
    columns = ("steps", "accepted/step", "proposed/accepted")
    shown = [ours] if peer is None else [ours, peer]
    header = ("match length", *[column if i else f"{o.method}: {column}" for o in shown for i, column in enumerate(columns)])
    rows = [(name, *[cell for o in shown for cell in _cells(o.by_match[i])]) for i, name in enumerate(MATCH_LENGTHS)]
    return report.table(header, rows)


def reliability_table(found: Reliability) -> str:
    """Nodes by estimated path probability."""
    rows = []
    for i, (nodes, estimated, accepted) in enumerate(zip(found.nodes, found.estimated, found.accepted, strict=True)):
        if nodes:
            label = f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}"
            rows.append((label, str(nodes), f"{estimated / nodes:.3f}", f"{accepted / nodes:.3f}"))
    rows.append(("all", str(sum(found.nodes)), "error", report.number(found.error, 3)))
    return report.table(("estimated", "nodes", "mean estimate", "share accepted"), rows)


def _cells(tally: Tally, tokens: bool = False) -> list[str]:
    each = [report.number(tally.accepted_per_step), report.number(tally.proposed_per_accepted)]
    return [str(tally.steps), *([report.number(tally.tokens_per_step)] if tokens else []), *each]


def parse_numbers(option: str, text: str, least: int, most: int) -> list[int]:
    """``"15,32"`` as ints in ``least .. most``, each once. Raises `OptionError`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and least <= int(part) <= most for part in parts):
        raise OptionError(f"{option}={text!r}: must be ints in {least}..{most}, as in 15,32")
    return list(dict.fromkeys(map(int, parts)))


def run(*, traces: list[str], model: str, budget: str, limit: int | None, peer: bool, json: str | None) -> int:
    """The command. Returns 0."""
    budgets = parse_numbers("budget", budget, 1, MAX_ROWS - 1)
    from specfx import models

    with report.Progress(f"loading the tokenizer of {model}"):
        tokenizer = models.load_tokenizer(model)
    with report.Progress("reading the traces"):
        streams = [read_stream(path, tokenizer, limit) for path in traces]
    absence = arctic.absence(peer)
    outcomes = []
    for stream in streams:
        for nodes in budgets:
            with report.Progress(f"{stream.name}: {len(stream.traces)} continuations, {stream.tokens} tokens, budget {nodes}"):
                outcomes += [replay(method, stream, nodes) for method in methods(nodes, absence is None)]
    print(method_table(outcomes))
    for ours in outcomes:
        if ours.method == OURS:
            others = [o for o in outcomes if o.method == PEER and (o.stream, o.budget) == (ours.stream, ours.budget)]
            print(f"\n{ours.stream}, budget {ours.budget}\n\n{match_table(ours, others[0] if others else None)}")
            print(f"\n{OURS}: nodes by estimated path probability ({ours.reliability.unknown} past the end of the text left out)\n")
            print(reliability_table(ours.reliability))
    if absence is not None:
        print(f"\n{absence}")
    if json is not None:
        results = {
            "bench": "replay",
            "model": model,
            "options": str(SuffixOptions()),
            "peer": arctic.facts(peer),
            "streams": [{"name": s.name, "continuations": len(s.traces), "tokens": s.tokens} for s in streams],
            "results": [outcome.as_dict() for outcome in outcomes],
        }
        report.write_json(json, results)
    return 0
