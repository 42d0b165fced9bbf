"""transformers' logits processors and stopping criteria, taken apart by row: rows of a batch end, and go on, each by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria, logits_process
from transformers.generation.streamers import BaseStreamer

from specfx.runtime.choice import Record


def _processors(*names: str) -> tuple[type, ...]:
    return tuple(getattr(logits_process, name) for name in names)


STANDARD_WARPERS = {
    logits_process.TemperatureLogitsWarper: "temperature",
    logits_process.TopKLogitsWarper: "top_k",
    logits_process.TopPLogitsWarper: "top_p",
    logits_process.MinPLogitsWarper: "min_p",
}
"""What draws in the graph: the warpers that `specfx::keyed_sample` knows, in its order, and what it and they call their settings."""
ROWWISE_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
POINTWISE_PROCESSORS = _processors(
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper"),
    *("EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization", "InfNanRemoveLogitsProcessor", "SuppressTokensLogitsProcessor"),
)
"""Processors that look at scores alone, at each row by itself: rows at different places may be processed together."""
ROWWISE_PROCESSORS = POINTWISE_PROCESSORS + _processors(
    *("RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor", "SequenceBiasLogitsProcessor"),
    *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor"),
    *("SuppressTokensAtBeginLogitsProcessor", "ExponentialDecayLengthPenalty", "PrefixConstrainedLogitsProcessor"),
)
"""Processors that treat each row by itself, so that rows of a batch may be at different lengths."""


def standard_warp(processors: LogitsProcessorList) -> dict[str, Any] | None:
    """The settings of `processors` by their names in `specfx.kernels.keyed_sample.Draw`; None if a draw does not know what they do."""
    kinds, known = [type(p) for p in processors], list(STANDARD_WARPERS)
    if any(kind not in known for kind in kinds) or kinds != sorted(set(kinds), key=known.index):
        return None
    if any(getattr(p, "filter_value", -torch.inf) != -torch.inf or getattr(p, "min_tokens_to_keep", 1) != 1 for p in processors):
        return None
    return {STANDARD_WARPERS[kind]: getattr(p, STANDARD_WARPERS[kind]) for kind, p in zip(kinds, processors, strict=True)}


def is_pointwise(processors: LogitsProcessorList) -> bool:
    return all(type(p) in POINTWISE_PROCESSORS for p in processors)


def of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList | None:
    """The processors for one row of the batch; None if there are none."""
    own = LogitsProcessorList([_for_row(p, row) for p in processors])
    return processors or None if all(a is b for a, b in zip(own, processors, strict=True)) else own


def _for_row(processor: Any, row: int) -> Any:
    """The repetition penalty holds the padding of every row; a function of allowed tokens is told the row's number."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor) and len(ignored) > 1:
        processor = copy.copy(processor)
        processor.prompt_ignore_length = ignored[row : row + 1]
    elif row and isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed, processor = processor._prefix_allowed_tokens_fn, copy.copy(processor)
        processor._prefix_allowed_tokens_fn = lambda batch, ids: allowed(row, ids)
    return processor


class Stop:
    """The stopping criteria of one row: called with each new token in order; True ends the row after it.

    End tokens and lengths are compared as ints; any other criterion sees the row ``[1, L]`` with the token appended and the scores that
    were recorded. Then the token goes to the streamer. All as in stock.
    """

    def __init__(
        self,
        row: Sequence[int],
        criteria: StoppingCriteriaList,
        device: torch.device,
        record: Record | None = None,
        streamer: BaseStreamer | None = None,
    ) -> None:
        self.ends: set[int] = set()
        self.lengths: list[int] = []
        self.others = []
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:  # what is derived from it may judge otherwise
                self.ends.update(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxLengthCriteria:
                self.lengths.append(criterion.max_length)
            else:
                self.others.append(criterion)
        self.row, self.device, self.record, self.streamer = list(row), device, record, streamer

    def __call__(self, token: int) -> bool:
        self.row.append(token)
        done = token in self.ends or any(len(self.row) >= length for length in self.lengths)
        if self.others:
            ids = torch.tensor([self.row], device=self.device)
            scores = None if self.record is None else tuple(s[None] for s in self.record.scores)
            done |= any([bool(torch.as_tensor(criterion(ids, scores)).all()) for criterion in self.others])
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        return done
