"""The target's own choice of the next token: of the processed logits the best one, or one drawn with the noise of its place.

Choices are made row by row of a walk, when they are asked for: by then the tokens up to the row are committed, so a logits processor sees
exactly the prefixes that plain decoding would show it, and none behind the end. All sequences of a step are asked together, so what looks
at scores alone (temperature, top-k, top-p) and the drawing of tokens run once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specfx.kernels.keyed_sample import keyed_sample

Processor = Callable[[Tensor, Tensor], Tensor]
"""A logits processor: ``(input_ids [B, L], scores [B, V] float32) -> scores``."""


@dataclass
class Record:
    """What a caller asked to be told: for each new token the target's logits and, processed, its scores; float32 ``[V]``."""

    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


@dataclass
class SequenceState:
    """State of one sequence. tokens: prompt and all committed tokens; the last one is pending (its forward has not happened).
    seen: what logits processors are shown (the caller's row, padding included, and all committed tokens), on the caller's `device`.
    key: (seed, number of the sequence in its call) of the noise that its tokens are drawn with, None for greedy decoding. pointwise: its
    processor looks at scores alone, and at each row of them by itself. keep: its keys and values stay when it has ended."""

    id: int
    tokens: list[int]
    seen: list[int]
    remaining: int
    stop: Callable[[int], bool]
    processor: Processor | None = None
    device: torch.device | None = None
    key: tuple[int, int] | None = None
    pointwise: bool = False
    keep: bool = False
    record: Record | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its next token is the argmax of the logits as they are."""
        return self.processor is None and self.key is None


def choose(sequences: Sequence[SequenceState], logits: Sequence[Tensor]) -> list[int]:
    """The token behind the tokens of each of `sequences`, given the target's ``[V]`` logits there.

    A drawn token depends on nothing but its prefix, its logits and its key (`specfx.kernels.keyed_sample`), whoever is asked beside it.
    """
    scores: list[Tensor] = [torch.empty(0)] * len(sequences)
    together: dict[tuple[int, torch.device | None], list[int]] = {}
    for i, sequence in enumerate(sequences):
        if sequence.pointwise or sequence.processor is None:
            together.setdefault((id(sequence.processor), sequence.device), []).append(i)
        else:
            seen = torch.tensor([sequence.seen], device=sequence.device)
            scores[i] = sequence.processor(seen, logits[i][None].to(sequence.device, torch.float32, copy=True))[0]
    for places in together.values():
        first = sequences[places[0]]
        rows = torch.stack([logits[i] for i in places]).to(first.device, torch.float32)
        if first.processor is not None:
            rows = first.processor(rows.new_empty(len(places), 0, dtype=torch.long), rows)
        for i, row in zip(places, rows.unbind(0), strict=True):
            scores[i] = row
    for sequence, raw, row in zip(sequences, logits, scores, strict=True):
        if sequence.record is not None:
            sequence.record.logits.append(raw.to(sequence.device, torch.float32, copy=True))
            sequence.record.scores.append(row.clone())
    tokens = [0] * len(sequences)
    for drawn in (False, True):
        places = [i for i, sequence in enumerate(sequences) if (sequence.key is not None) == drawn]
        if not places:
            continue
        rows = torch.stack([scores[i] for i in places])
        keys = [[*sequence.key, len(sequence.tokens)] for sequence in (sequences[i] for i in places) if sequence.key is not None]
        best = keyed_sample(rows.float(), torch.tensor(keys, device=rows.device)) if drawn else rows.argmax(-1)
        for i, token in zip(places, best.tolist(), strict=True):
            tokens[i] = token
    return tokens
