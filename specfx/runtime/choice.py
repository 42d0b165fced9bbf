"""The target's own choice of the next token where processors of the caller's have a say in it, or the caller wants to see what it was of.

All other choices are the engine's (`specfx.engines.base.RowsOutput.choice`). Here they are made row by row of a walk, when they are asked
for: by then the tokens up to the row are committed, so a logits processor sees exactly the prefixes that plain decoding would show it, and
none behind the end. All sequences of a step are asked together, so what looks at scores alone and the drawing of tokens run once for all
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specfx.kernels.keyed_sample import Draw, draw_tables, keyed_sample

Processor = Callable[[Tensor, Tensor], Tensor]
"""A logits processor: ``(input_ids [B, L], scores [B, V] float32) -> scores``."""


@dataclass
class Record:
    """What a caller asked to be told: for each new token the target's logits and, processed, its scores; float32 ``[V]``. warpers: the
    processors that the draw stands for, which are needed for the scores alone."""

    warpers: Processor | None = None
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


@dataclass
class SequenceState:
    """State of one sequence. tokens: prompt and all committed tokens; the last one is pending (its forward has not happened).
    seen: what logits processors are shown (the caller's row, padding included, and all committed tokens), on the caller's `device`.
    draw: how its tokens are drawn from what `processor` makes of the logits; None: the best is taken. pointwise: its processor looks at
    scores alone, and at each row of them by itself. keep: its keys and values stay when it has ended. pace: tokens a step lately."""

    id: int
    tokens: list[int]
    seen: list[int]
    remaining: int
    stop: Callable[[int], bool]
    processor: Processor | None = None
    device: torch.device | None = None
    draw: Draw | None = None
    pointwise: bool = False
    keep: bool = False
    record: Record | None = None
    pace: float = 1.0

    @property
    def engine_draw(self) -> Draw | None:
        """How the engine is to draw its tokens."""
        return self.draw if self.processor is None else None


class AsDrawn:
    """A logits processor behind which the best token is the one that an engine would draw: what stock's greedy decoding is given where it
    serves a sampled call while the engine is still being prepared, so that the text is the engine's.

    processors: of the call. seed, warp: see `Draw`; a warp of None is for processors that a draw does not know. pads: columns of padding
    before each row. scores: if they are wanted, what the processors made of each step's scores ``[B, V]``, as stock would show them.
    """

    def __init__(self, processors: Processor, seed: int, warp: dict[str, Any] | None, pads: Sequence[int], record: bool) -> None:
        self.processors, self.warps, self.pads = processors, warp is not None, pads
        self.draws = [Draw(seed, i, **(warp or {})) for i in range(len(pads))]
        self.scores: list[Tensor] | None = [] if record else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        processed = scores
        if self.scores is not None or not self.warps:
            processed = self.processors(input_ids, scores.clone())
        if self.scores is not None:
            self.scores.append(processed.clone())
        keys, warp = draw_tables(self.draws, [input_ids.shape[1] - pad for pad in self.pads])
        tokens = keyed_sample(scores if self.warps else processed, keys.to(scores.device), warp.to(scores.device))
        require_drawn(tokens.tolist())
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def require_drawn(tokens: Sequence[int]) -> None:
    """Raise stock's error where there was nothing to draw (`keyed_sample` answers -1)."""
    if min(tokens, default=0) < 0:
        raise RuntimeError(
            "probability tensor contains either `inf`, `nan` or element < 0: the model's or a processor's scores can't be drawn from"
        )


def next_tokens(sequences: Sequence[SequenceState], scores: Sequence[Tensor]) -> list[int]:
    """The next token of each of `sequences`, chosen from its scores ``[V]``, all on one device: what an engine would choose. Raises
    `RuntimeError` where there is nothing to draw."""
    rows = torch.stack(list(scores))
    best = rows.argmax(-1)  # not the op's, which is in float32: a processor may have answered in float64
    if all(s.draw is None for s in sequences):
        greedy: list[int] = best.tolist()
        return greedy
    keys, warp = (x.to(rows.device) for x in draw_tables([s.draw for s in sequences], [len(s.tokens) for s in sequences]))
    tokens: list[int] = torch.where(warp[:, 0] == 0, best, keyed_sample(rows, keys, warp)).tolist()
    require_drawn(tokens)
    return tokens


def choose(sequences: Sequence[SequenceState], logits: Sequence[Tensor]) -> list[int]:
    """The token behind the tokens of each of `sequences`, given the target's ``[V]`` logits there.

    A drawn token depends on nothing but its prefix, its logits and its draw (`specfx.kernels.keyed_sample`), whoever is asked beside it.
    """
    scores = [row.to(sequence.device, torch.float32, copy=True) for sequence, row in zip(sequences, logits, strict=True)]
    for sequence, row in zip(sequences, scores, strict=True):
        if sequence.record is not None:
            sequence.record.logits.append(row.clone())
    together: dict[tuple[int, torch.device | None], list[int]] = {}
    for i, sequence in enumerate(sequences):
        if sequence.processor is not None and sequence.pointwise:
            together.setdefault((id(sequence.processor), sequence.device), []).append(i)
        elif sequence.processor is not None:
            seen = torch.tensor([sequence.seen], device=sequence.device)
            scores[i] = sequence.processor(seen, scores[i][None])[0]
    for places in together.values():
        processor = sequences[places[0]].processor
        assert processor is not None
        rows = torch.stack([scores[i] for i in places])
        for i, row in zip(places, processor(rows.new_empty(len(places), 0, dtype=torch.long), rows).unbind(0), strict=True):
            scores[i] = row
    for sequence, row in zip(sequences, scores, strict=True):
        if (record := sequence.record) is not None:
            shown = row if record.warpers is None else record.warpers(row.new_empty(1, 0, dtype=torch.long), row[None].clone())[0]
            record.scores.append(shown.clone())
    return next_tokens(sequences, scores)
