"""The decode loop behind `model.generate`: transformers prepares, this decodes, stock takes what is not accelerated.

transformers calls `speculative_decode` in the place of its own `_sample`, with inputs, logits processors and stopping criteria prepared.
The loop adds one sequence for each row of the batch (left padding is cut off: batches are ragged inside), steps them until all have
ended, and lays the tokens out as stock does. A call that would not give stock's result, or that no engine can verify, is handed to
the stock `_sample` with the reason recorded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
    logits_process,
)
from transformers.generation.streamers import BaseStreamer

from specfx.drafters.base import Drafter
from specfx.engines.base import Engine
from specfx.runtime.session import Committed, Runtime
from specfx.runtime.stats import CallStats

_KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "cache_params", "use_cache", "logits_to_keep", "cache_position"}
_ROWWISE_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
_ROWWISE_PROCESSORS = tuple(
    getattr(logits_process, name)
    for name in (
        *("RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor", "SequenceBiasLogitsProcessor"),
        *(
            "MinLengthLogitsProcessor",
            "MinNewTokensLengthLogitsProcessor",
            "ForcedBOSTokenLogitsProcessor",
            "ForcedEOSTokenLogitsProcessor",
        ),
        *("SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "LogitNormalization", "InfNanRemoveLogitsProcessor"),
        *("ExponentialDecayLengthPenalty", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
        *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper"),
    )
)
"""Processors that treat each row by itself, so that rows of a batch may be at different lengths."""


def stock_reason(
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    engine: Engine,
    inputs: dict[str, Any],
) -> str | None:
    """Why this call goes to the stock method; None if it is accelerated."""
    if engine.verifies == "nothing":
        return "no engine can verify drafts on this model"
    if config.return_dict_in_generate:
        asked = [n for n in ("output_scores", "output_logits", "output_attentions", "output_hidden_states") if getattr(config, n, False)]
        if asked:
            return ", ".join(asked)
        if config.use_cache is not False:  # stock hands its cache back, and pages are none
            return "return_dict_in_generate with past_key_values (pass use_cache=False if you don't need them)"
    if config.cache_implementation is not None:
        return f"cache_implementation={config.cache_implementation!r}"
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return "past_key_values from an earlier call"
    if getattr(inputs.get("cache_params"), "_is_user_defined", False):  # Mamba's; a cache of the caller's is there to be filled
        return "cache_params given by the caller"
    unknown = sorted(k for k, v in inputs.items() if v is not None and k not in _KNOWN_INPUTS)
    if unknown:
        return f"model inputs {', '.join(unknown)}"
    mask = inputs.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
        return "an attention mask that is not left padding"
    if mask is not None and not bool(mask.any(-1).all()):
        return "a row of padding only"
    if input_ids.shape[0] > 1:
        other = [type(p).__name__ for p in processors if not isinstance(p, _ROWWISE_PROCESSORS)]
        other += [type(c).__name__ for c in criteria if not isinstance(c, _ROWWISE_CRITERIA)]
        if other:
            return f"{', '.join(other)} may look across the rows of a batch"
        if streamer is not None:
            return "a streamer over a batch"
        ending = [type(c).__name__ for c in criteria if isinstance(c, (MaxTimeCriteria, StopStringCriteria))]
        if ending and not any(isinstance(c, EosTokenCriteria) for c in criteria):  # then stock's rows go on until all have ended
            return f"{', '.join(ending)} over a batch without an end token"
    return None


def _of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList | None:
    """The processors for one row of the batch; None if there are none. The repetition penalty holds the padding of every row."""
    own = LogitsProcessorList()
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor) and len(ignored) > 1:
            processor = copy.copy(processor)
            processor.prompt_ignore_length = ignored[row : row + 1]
        own.append(processor)
    return own or None


class _Stop:
    """The stopping criteria of one row: called with each new token in order; True ends the row after it.

    End tokens and lengths are compared as ints; any other criterion sees the row ``[1, L]`` with the token appended, as in stock.
    """

    def __init__(self, row: Sequence[int], criteria: StoppingCriteriaList, device: torch.device) -> None:
        self.ends: set[int] = set()
        self.lengths: list[int] = []
        self.others = []
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.ends.update(criterion.eos_token_id.tolist())
            elif isinstance(criterion, MaxLengthCriteria):
                self.lengths.append(criterion.max_length)
            else:
                self.others.append(criterion)
        self.row, self.device = list(row), device

    def __call__(self, token: int) -> bool:
        self.row.append(token)
        done = token in self.ends or any(len(self.row) >= length for length in self.lengths)
        if self.others:
            ids = torch.tensor([self.row], device=self.device)
            done |= any([bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in self.others])
        return done


def speculative_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    engine: Engine,
    drafter: Drafter,
    max_nodes: int,
    stats: CallStats,
    record_stock: Callable[[str], None],
    streamer: BaseStreamer | None = None,
    **inputs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """A decoding method for `generate`; input_ids ``[B, L]`` -> ``[B, L + new]``.

    Greedy: token for token what stock decoding gives. Sampling: one draw from torch's default generator seeds the call.
    """
    reason = stock_reason(input_ids, logits_processor, stopping_criteria, generation_config, streamer, engine, inputs)
    if reason is not None:
        record_stock(reason)
        return type(model)._sample(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=streamer,
            **inputs,
        )
    mask = inputs.get("attention_mask")
    rows: list[list[int]] = input_ids.tolist()
    pads = [0] * len(rows) if mask is None else (mask == 0).sum(-1).tolist()
    limit = min((c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)), default=None)
    if limit is None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or input_ids.shape[1] + 1024
    seed = int(torch.randint(torch.iinfo(torch.int64).max, ())) if generation_config.do_sample else None
    runtime = Runtime(engine, drafter, max_nodes, stats)
    generated: dict[int, list[int]] = {}
    try:
        seqs = [runtime.reserve(len(row) - pad, limit - len(row)) for row, pad in zip(rows, pads, strict=True)]
        for i, (row, pad, seq) in enumerate(zip(rows, pads, seqs, strict=True)):
            stop = _Stop(row, stopping_criteria, input_ids.device)
            processor = _of_row(logits_processor, i)
            first = runtime.add(
                row[pad:],
                limit - len(row),
                stop,
                processor,
                seen=row,
                seq=seq,
                device=input_ids.device,
                ends=sorted(stop.ends),
                key=None if seed is None else (seed, i),
            )
            generated[first.seq] = list(first.tokens)
            _stream(streamer, first)
        while runtime.sequences:
            for committed in runtime.step():
                generated[committed.seq] += committed.tokens
                _stream(streamer, committed)
    finally:
        runtime.close()
    if streamer is not None:
        streamer.end()
    sequences = _lay_out(input_ids, list(generated.values()), generation_config)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences


def _stream(streamer: BaseStreamer | None, committed: Committed) -> None:
    if streamer is not None:
        for token in committed.tokens:
            streamer.put(torch.tensor([token]))


def _lay_out(input_ids: Tensor, generated: list[list[int]], config: GenerationConfig) -> Tensor:
    """Rows that ended early are filled with the pad token, as in stock."""
    width = max(map(len, generated))
    pad = 0
    if any(len(g) < width for g in generated):
        pad_tensor = getattr(config, "_pad_token_tensor", None)
        if pad_tensor is None:
            raise ValueError("`pad_token_id` must be set for a batch whose rows may end at different lengths")
        pad = int(pad_tensor)
    new = torch.tensor([g + [pad] * (width - len(g)) for g in generated], dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, new], dim=-1)
