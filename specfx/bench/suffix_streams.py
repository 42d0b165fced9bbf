"""The texts that `specfx bench suffix` runs on. What a suffix tree costs hangs on how its text repeats, so there are several kinds:

- phrases: 40 phrases of 5 to 20 tokens, drawn at random;
- random: tokens drawn at random, so that next to nothing repeats;
- periodic: 50 random tokens, repeated;
- constant: one token, repeated;
- traces: pieces of recorded text, which has to be given (`specfx.bench.traces`).

`warm_up` runs a drafter on some of them before anything is measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from specfx.bench import report
from specfx.bench.traces import Stream, read_stream
from specfx.drafters.suffix import SuffixDrafter
from specfx.errors import OptionError
from specfx.options import SuffixOptions

KINDS = ("phrases", "random", "periodic", "constant", "traces")
VOCABULARY = 49152
"""Of the made-up streams: as many as SmolLM2 has."""
EARLIER_TOKENS = 500
"""Tokens of an earlier request, whose output is in the cache."""

Texts = Callable[[int], list[int]]
"""Gives another stream of so many tokens at each call."""


def choose_kinds(streams: str | None, has_traces: bool) -> list[str]:
    """``"phrases,random"`` as a list; None is all that there is a source for. Raises `OptionError`."""
    if streams is None:
        return [kind for kind in KINDS if kind != "traces" or has_traces]
    kinds = list(dict.fromkeys(part.strip() for part in streams.split(",")))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise OptionError(f"streams={streams!r}: unknown {', '.join(map(repr, unknown))}; choose from {','.join(KINDS)}")
    if "traces" in kinds and not has_traces:
        raise OptionError(f"streams={streams!r}: traces need --traces FILE.jsonl and --model NAME")
    return kinds


def make_texts(kind: str, written: Sequence[int] = ()) -> Texts:
    """Streams of one kind, the same in every run. written: the recorded text of the kind traces."""
    draw = random.Random(0)
    phrases = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(5, 20))] for _ in range(40)]

    def text(n: int) -> list[int]:
        if kind == "traces":
            start = draw.randrange(len(written) - n + 1)
            return list(written[start : start + n])
        if kind == "random":
            return [draw.randrange(VOCABULARY) for _ in range(n)]
        if kind == "phrases":
            tokens: list[int] = []
            while len(tokens) < n:
                tokens += draw.choice(phrases)
            return tokens[:n]
        block = [draw.randrange(VOCABULARY) for _ in range(50 if kind == "periodic" else 1)]
        return (block * (n // len(block) + 1))[:n]

    return text


def read_text(paths: Sequence[str], model: str) -> list[int]:
    """All traces of these files, with the tokenizer of a model."""
    from specfx import models

    with report.Progress(f"reading the traces with the tokenizer of {model}"):
        tokenizer = models.load_tokenizer(model)
        return whole_text([read_stream(path, tokenizer) for path in paths])


def whole_text(streams: Sequence[Stream]) -> list[int]:
    """All traces one after another, each chat once, as its last trace has it."""
    pieces: list[tuple[int, ...]] = [()]
    for stream in streams:
        for trace in stream.traces:
            text = trace.context + trace.continuation
            if pieces[-1] == text[: len(pieces[-1])]:
                pieces.pop()
            pieces.append(text)
    return [token for piece in pieces for token in piece]


def warm_up(budget: int) -> None:
    """Every call once on a drafter of its own: compiles, or loads what was compiled before."""
    drafter = SuffixDrafter(SuffixOptions(), budget)
    for seq, text in enumerate((make_texts("phrases")(600), make_texts("random")(600))):
        drafter.add(seq, text[:100])
        for token in text[100:]:
            drafter.accept(seq, [token])
            drafter.propose([seq], [budget])
        drafter.match_length(seq)
        drafter.remove(seq, text[:1])
    drafter.evict()
