"""The decode loop behind `model.generate`: transformers prepares, this decodes, stock takes what is not accelerated.

transformers calls `speculative_decode` in the place of its own `_sample`, with inputs, logits processors and stopping criteria prepared.
The loop adds one sequence for each row of the batch (left padding is cut off: batches are ragged inside), steps them until all have
ended, and lays the tokens out as stock does. A call that would not give stock's result, or that no engine can verify, is handed to
the stock `_sample` with the reason recorded.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from specfx.drafters.base import Drafter
from specfx.engines.base import Engine
from specfx.errors import KVPoolError, Reason
from specfx.kernels.keyed_sample import Draw
from specfx.runtime import page_cache
from specfx.runtime.budget import Budget
from specfx.runtime.choice import AsDrawn, Record
from specfx.runtime.held import Held, Keeper
from specfx.runtime.page_cache import PageCache
from specfx.runtime.rowwise import ROWWISE_CRITERIA, ROWWISE_PROCESSORS, Stop, is_pointwise, of_row, standard_warp
from specfx.runtime.session import PIECE, Arrival, Runtime
from specfx.runtime.stats import CallStats

_KNOWN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "cache_params", "use_cache", "logits_to_keep", "cache_position"}
NOTHING_VERIFIED = "no engine can verify drafts on this model"
_ENDLESS = 1 << 40
"""Tokens that no text has."""
_FOR_WANT_OF_AN_ENGINE = (Reason.ENGINE_NOT_READY.value, Reason.ONE_BY_ONE.value, NOTHING_VERIFIED)
"""Reasons for which a call goes to stock that an engine might have served: drawn as an engine draws."""
FEWEST_SHARED = 16
"""Tokens that a prompt must have in common with another sequence to share its memory: copying the rest of a page costs as much as running
about so many."""


def stock_reason(
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    engine: Engine,
    drafter: Drafter,
    inputs: dict[str, Any],
    cache: DynamicCache | None = None,
    pages: PageCache | None = None,
    one_by_one: bool = True,
) -> str | None:
    """Why this call goes to the stock method; None if it is accelerated. one_by_one: whether a batch may go to an engine that runs its
    sequences one after another."""
    if any(refusal.reason is Reason.HEAD_UNFED for refusal in drafter.refusals):
        return Reason.HEAD_UNFED.value
    if config.return_dict_in_generate:
        asked = [n for n in ("output_attentions", "output_hidden_states") if getattr(config, n, False)]
        if asked:
            return ", ".join(asked)
    if config.cache_implementation is not None:
        return f"cache_implementation={config.cache_implementation!r}"
    if getattr(inputs.get("cache_params"), "_is_user_defined", False):  # Mamba's; a cache of the caller's is there to be filled
        return "cache_params given by the caller"
    mask = inputs.get("attention_mask")
    if pages is not None and pages is not cache and not pages.is_of(input_ids, mask):
        return "input_ids that don't go on from past_key_values"
    unknown = sorted(k for k, v in inputs.items() if k not in _KNOWN_INPUTS and not (v is None or (isinstance(v, dict) and not v)))
    if unknown:
        return f"model inputs {', '.join(unknown)}"
    if mask is not None and bool(((mask != 0) & (mask != 1)).any()):  # stock counts positions by adding it up
        return "an attention mask of other values than 0 and 1"
    if type(config.use_cache) is not bool:
        return f"use_cache={config.use_cache!r}"
    kept = inputs.get("logits_to_keep")
    if kept is not None and (type(kept) is not int or kept < 0):
        return f"logits_to_keep={kept!r}"
    if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
        return "an attention mask that is not left padding"
    if mask is not None and not bool(mask.any(-1).all()):
        return "a row of padding only"
    if input_ids.shape[0] > 1:
        other = [type(p).__name__ for p in processors if type(p) not in ROWWISE_PROCESSORS]
        other += [type(c).__name__ for c in criteria if type(c) not in ROWWISE_CRITERIA]
        if other:
            return f"{', '.join(other)} may look across the rows of a batch"
        if streamer is not None:
            return "a streamer over a batch"
        ending = [type(c).__name__ for c in criteria if isinstance(c, (MaxTimeCriteria, StopStringCriteria))]
        if ending and not any(isinstance(c, EosTokenCriteria) for c in criteria):  # then stock's rows go on until all have ended
            return f"{', '.join(ending)} over a batch without an end token"
    # Last, so that a call that will always be stock's is so from the beginning, drawn as stock draws.
    if engine.name == "stock":
        return Reason.ENGINE_NOT_READY.value
    if engine.verifies == "nothing":
        return NOTHING_VERIFIED
    if engine.name == "eager" and not one_by_one and input_ids.shape[0] > 1:
        return Reason.ONE_BY_ONE.value
    return None


def speculative_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    keeper: Keeper,
    drafter: Drafter,
    max_nodes: int,
    budget: Budget,
    stats: CallStats,
    record_stock: Callable[[str], None],
    streamer: BaseStreamer | None = None,
    prefill_callback: Callable[[int, int], None] | None = None,
    cache: DynamicCache | None = None,
    one_by_one: bool = True,
    grows: bool = True,
    **inputs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """A decoding method for `generate` on the engine of `keeper`; input_ids ``[B, L]`` -> ``[B, L + new]``.

    cache: the caller's, which `page_cache.beside` accepts; it is filled. one_by_one: as in `stock_reason`. grows: whether texts are begun
    for which there is not enough memory if they become as long as they may.
    Greedy: token for token what stock decoding gives. Sampling: one draw from torch's default generator seeds the call, also where stock
    serves it for want of an engine.
    """
    config, engine, pages = generation_config, keeper.engine, page_cache.beside(cache)
    asked = (input_ids, logits_processor, stopping_criteria, config, streamer)
    reason = stock_reason(*asked, engine, drafter, inputs, cache, pages, one_by_one)
    if reason is not None:
        record_stock(reason)
        stock = functools.partial(type(model)._sample, model, input_ids, streamer=streamer, **inputs)
        if reason in _FOR_WANT_OF_AN_ENGINE and config.do_sample:
            pads = _paddings(input_ids, inputs.get("attention_mask"))
            output = _drawn_by_stock(stock, pads, logits_processor, stopping_criteria, config)
        else:
            output = stock(logits_processor=logits_processor, stopping_criteria=stopping_criteria, generation_config=config)
        if reason in _FOR_WANT_OF_AN_ENGINE:  # a chat goes on with the engine when there is one
            sequences = output if isinstance(output, Tensor) else output.sequences
            kept = cache if cache is not None else getattr(output, "past_key_values", None)
            page_cache.note_stocks(kept, model, sequences, inputs.get("attention_mask"))
        return output
    mask = inputs.get("attention_mask")
    rows: list[list[int]] = input_ids.tolist()
    pads = _paddings(input_ids, mask)
    prompts = [row[pad:] for row, pad in zip(rows, pads, strict=True)]
    lengths = [criterion for criterion in stopping_criteria if type(criterion) is MaxLengthCriteria]
    limit = math.ceil(min([_ENDLESS, *(float(criterion.max_length) for criterion in lengths)]))
    seed = _seed() if config.do_sample else None
    recorded = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    warp = None if seed is None else standard_warp(logits_processor)
    records = [Record(None if warp is None else logits_processor) if recorded else None for _ in rows]
    if pages is None and config.return_dict_in_generate and config.use_cache is not False:
        cache = pages = PageCache()
    progress = _Progress(prefill_callback, sum(map(len, prompts)))
    runtime = Runtime(engine, drafter, max_nodes, stats, progress=progress, chunk=config.prefill_chunk_size, budget=budget)
    generated: dict[int, list[int]] = {}
    try:
        seqs = _reserve(runtime, keeper, prompts, limit - input_ids.shape[1], None if pages is None else pages.held, grows)
        arrivals = [
            Arrival(
                prompt,
                limit - len(row),
                stop := Stop(row, stopping_criteria, input_ids.device, record, streamer),
                None if warp is not None else of_row(logits_processor, i),
                seen=row,
                seq=seq,
                device=input_ids.device,
                ends=sorted(stop.ends),
                draw=None if seed is None else Draw(seed, i, **(warp or {})),
                pointwise=is_pointwise(logits_processor),
                keep=recorded or pages is not None,
                record=record,
            )
            for i, (row, prompt, seq, record) in enumerate(zip(rows, prompts, seqs, records, strict=True))
        ]
        for first in runtime.admit(arrivals):
            generated[first.seq] = list(first.tokens)
        while runtime.sequences:
            for committed in runtime.step():
                generated[committed.seq] += committed.tokens
        sequences = _lay_out(input_ids, list(generated.values()), config)
        for criterion in lengths:  # which warns of a text that is longer than the model's context
            criterion(sequences[:, :-1], None)
        if recorded:
            _record_padding(runtime, logits_processor, sequences, generated, records)
        if cache is not None and pages is not None:
            for seq in seqs:
                engine.trim(seq)
            page_cache.fill(cache, pages, model, sequences, mask, keeper.hold({seq: runtime.kept.pop(seq) for seq in seqs}))
    finally:
        runtime.close()
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=_by_step([r.scores for r in records if r is not None]) if config.output_scores else None,
        logits=_by_step([r.logits for r in records if r is not None]) if config.output_logits else None,
        past_key_values=cache,
    )


def _seed() -> int:
    """Of a sampled call."""
    return int(torch.randint(torch.iinfo(torch.int64).max, ()))


def _paddings(input_ids: Tensor, mask: Tensor | None) -> list[int]:
    """Columns of padding in each row."""
    paddings: list[int] = [0] * len(input_ids) if mask is None else (mask == 0).sum(-1).tolist()
    return paddings


def _drawn_by_stock(
    stock: Callable[..., GenerateDecoderOnlyOutput | Tensor],
    pads: list[int],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
) -> GenerateDecoderOnlyOutput | Tensor:
    """A sampled call by stock's forwards and an engine's draws."""
    drawn = AsDrawn(processors, _seed(), standard_warp(processors), pads, bool(config.return_dict_in_generate and config.output_scores))

    def shown_scores(criterion: Any) -> Any:
        def judge(input_ids: Tensor, scores: Any, **more: Any) -> Any:
            return criterion(input_ids, None if drawn.scores is None else tuple(drawn.scores), **more)

        return criterion if type(criterion) in ROWWISE_CRITERIA else judge

    greedy = copy.copy(config)
    greedy.do_sample = False
    output = stock(
        logits_processor=LogitsProcessorList([drawn]),
        stopping_criteria=StoppingCriteriaList(map(shown_scores, criteria)),
        generation_config=greedy,
    )
    if drawn.scores is not None:
        assert not isinstance(output, Tensor)
        output.scores = tuple(drawn.scores)
    return output


class _Progress:
    """Tells a callback how many tokens of all prompts are done."""

    def __init__(self, callback: Callable[[int, int], None] | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, tokens: int) -> None:
        self.done += tokens
        if self.callback is not None:
            self.callback(self.done, self.total)


def _reserve(runtime: Runtime, keeper: Keeper, prompts: list[list[int]], room: int, held: Held | None, grows: bool) -> list[int]:
    """Room for all rows, `room` new tokens each; if `grows`, and that is more than there is, for the first of them. A row shares the memory
    of what it has in common with a held sequence or an earlier row.

    Sequences that are held for later calls go where the memory is needed, those of `held` last. Raises `KVPoolError`.
    """
    if held is not None and not held.is_in(keeper):
        held = None
    but_held = functools.partial(keeper.make_room, held)
    ways: list[tuple[Held | None, bool, Callable[[], bool]]] = [(held, grows, but_held), (None, grows, keeper.make_room)]
    if grows and room > PIECE:
        ways.insert(0, (held, False, lambda: False))
    for i, (beginning, growing, runtime.make_room) in enumerate(ways, start=1):
        try:
            return _reserve_rows(runtime, keeper.engine, prompts, room, beginning, growing)
        except KVPoolError:
            if i == len(ways):
                raise
            runtime.close()
    raise AssertionError


def _reserve_rows(runtime: Runtime, engine: Engine, prompts: list[list[int]], room: int, held: Held | None, grows: bool) -> list[int]:
    known = {} if held is None else {s: t[: engine.length(s)] for s, t in zip(held.seqs, held.texts, strict=True)}
    seqs: list[int] = []
    for i, prompt in enumerate(prompts):
        source: int | None = None
        if i and prompt == prompts[i - 1]:
            shared, source = len(prompt), seqs[-1]
        else:
            shared = 0
            for seq, text in known.items():  # rather an early one, which need not be waited for
                if (common := _common(text, prompt[:-1])) >= shared + FEWEST_SHARED:
                    shared, source = common, seq
        seqs.append(runtime.reserve(len(prompt), room, source, shared, grows))
        known[seqs[-1]] = prompt
    return seqs


def _common(a: list[int], b: list[int]) -> int:
    """Tokens that both begin with."""
    if not a or not b or a[0] != b[0]:
        return 0
    low, high = 1, min(len(a), len(b))  # slices are compared at the speed of C
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _record_padding(
    runtime: Runtime, processors: LogitsProcessorList, sequences: Tensor, generated: dict[int, list[int]], records: Sequence[Record | None]
) -> None:
    """Rows that ended early have scores behind their end too: stock runs on over their padding."""
    texts: list[list[int]] = sequences.tolist()
    width = max(map(len, generated.values()))
    for i, ((seq, tokens), text, record) in enumerate(zip(generated.items(), texts, records, strict=True)):
        if record is None or len(tokens) == width:
            continue
        end = len(text) - width + len(tokens)
        processor = of_row(processors, i)
        for place, raw in enumerate(runtime.logits_on(seq, text[end:-1]), start=end):
            raw = raw.to(sequences.device, torch.float32, copy=True)
            record.logits.append(raw)
            record.scores.append(raw if processor is None else processor(sequences[i : i + 1, :place], raw[None].clone())[0])


def _by_step(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """For each step the rows ``[B, V]``."""
    return tuple(torch.stack(step) for step in zip(*rows, strict=True))


def _lay_out(input_ids: Tensor, generated: list[list[int]], config: GenerationConfig) -> Tensor:
    """Rows that ended early are filled with the pad token, as in stock, whose tokens are int64 whatever the prompt's are."""
    width = max(map(len, generated))
    pad = 0
    if any(len(g) < width for g in generated):
        pad_tensor = getattr(config, "_pad_token_tensor", None)
        if pad_tensor is None:
            raise ValueError("`pad_token_id` must be set for a batch whose rows may end at different lengths")
        pad = int(pad_tensor)
    new = torch.tensor([g + [pad] * (width - len(g)) for g in generated], device=input_ids.device)
    return torch.cat([input_ids, new], dim=-1)
