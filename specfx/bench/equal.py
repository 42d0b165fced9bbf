"""`specfx bench equal`: is the output of every method, on every engine and batch size, stock `generate`'s, token for token?

The reference of a batch is stock `generate` on the same left-padded batch. Where an output differs, only its first difference says
anything; there the stock logits of the two candidates (the token that stock chose, and the other) are computed anew, by one stock
forward without a cache over the common prefix alone. The difference is *explained* if their gap is within what arithmetic of this
precision leaves open:

* float32: the gap is at most the **measured error** at this position: the largest difference, over the vocabulary, between those
  stock logits and (a) the engine's own, from a fresh prefill of the prefix, or (b) the stock model's own, from a cached step. Neither
  goes through the drafts and commits under test, so a wrong cache can't excuse itself. And an error above ``2**-14`` of the largest
  logit is no rounding: it is reported as a fault and explains nothing.
* bfloat16 and float16: the gap is at most ``4 * u * |logit|`` of the larger candidate, ``u`` = ``2**-8`` (bfloat16) or ``2**-11``
  (float16), the unit round-off. Four, because two logits are each rounded once in two computations; the rounding inside the layers,
  which is larger, isn't counted.

An output that ends early with no token that differs is never explained.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specfx.bench import report
from specfx.bench.calls import STOCK, Arm, end_tokens_of, generate, start
from specfx.bench.generate import parse_arms
from specfx.bench.prompts import Prompt, read_prompts
from specfx.errors import OptionError
from specfx.options import ENGINES

if TYPE_CHECKING:
    import torch

    from specfx.engines.base import Engine

ERROR_LIMIT = 2.0**-14
"""A float32 engine's error may be this share of the largest logit; above it, it is a fault."""
ROUNDINGS = 4
"""In 16-bit precisions: how many roundings of the larger logit may separate the candidates."""
UNIT_ROUND_OFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
_PROBE_SEQUENCE = 1_000_000_007  # far from the ids that the runtime hands out


@dataclass(frozen=True)
class Difference:
    """The first difference of one output. position: index of the new token. Logits, gap and allowed are None if a length differs."""

    prompt: int
    category: str
    method: str
    engine: str
    batch_size: int
    position: int
    stock_token: int | None
    other_token: int | None
    stock_logit: float | None = None
    other_logit: float | None = None
    gap: float | None = None
    allowed: float | None = None

    @property
    def explained(self) -> bool:
        return self.gap is not None and self.allowed is not None and self.gap <= self.allowed

    def __str__(self) -> str:
        place = f"line {self.prompt} ({self.category}), {self.method}, {self.engine}, batch {self.batch_size}, new token {self.position}"
        if self.gap is None:
            return f"{place}: FAULT: one output ends, stock has {self.stock_token}, the other {self.other_token}"
        judged = "near tie" if self.explained else "FAULT"
        return (
            f"{place}: {judged}: stock {self.stock_token} ({self.stock_logit:.6g}), other {self.other_token} ({self.other_logit:.6g}), "
            f"gap {self.gap:.3g}, allowed {self.allowed:.3g}"
        )


@dataclass(frozen=True)
class Comparison:
    """All prompts with one method on one engine at one batch size. served: the engine that really served."""

    method: str
    engine: str
    served: str
    batch_size: int
    prompts: int
    identical: int
    differences: tuple[Difference, ...]
    stock_calls: int = 0
    """Calls that went to the stock method: they prove nothing."""

    @property
    def holds(self) -> bool:
        return self.served == self.engine and self.stock_calls == 0 and all(d.explained for d in self.differences)


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token that differs (the shorter length if one is the beginning of the other); None if they are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def stock_logits(model: Any, prefix: Sequence[int]) -> torch.Tensor:
    """``[V]`` float32 logits after `prefix`, by one stock forward without a cache."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(prefix)], device=model.device), use_cache=False).logits[0, -1].float().cpu()


def stock_cached_logits(model: Any, prefix: Sequence[int]) -> torch.Tensor:
    """The same by a cached step: the prefix without its last token first, then that one."""
    import torch

    if len(prefix) < 2:
        return stock_logits(model, prefix)
    ids = torch.tensor([list(prefix)], device=model.device)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        return model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1].float().cpu()


def engine_logits(engine: Engine, prefix: Sequence[int]) -> torch.Tensor:
    """The same by a fresh prefill of an engine, as a sequence of its own."""
    from specfx.engines.base import Rows

    engine.add(_PROBE_SEQUENCE, len(prefix) + 1)
    try:
        (output,) = engine.forward([Rows(_PROBE_SEQUENCE, list(prefix), last_only=True)])
        return output.logits[-1].float().cpu().clone()
    finally:
        engine.remove(_PROBE_SEQUENCE)


def measured_error(model: Any, engine: Engine | None, prefix: Sequence[int]) -> float:
    """The float32 error that the module's docstring defines; 0 where it exceeds `ERROR_LIMIT`, so that it explains nothing."""
    reference = stock_logits(model, prefix)
    others = [stock_cached_logits(model, prefix)]
    if engine is not None and engine.verifies != "nothing":
        others.append(engine_logits(engine, prefix))
    error = max((other - reference).abs().max().item() for other in others)
    if error <= ERROR_LIMIT * reference.abs().max().item():
        return error
    print(f"FAULT: logits differ by {error:.3g} after a prefix of {len(prefix)} tokens", file=sys.stderr, flush=True)
    return 0.0


def analyse(
    prompt: Prompt,
    stock: Sequence[int],
    other: Sequence[int],
    *,
    method: str,
    engine: str,
    batch_size: int,
    logits_of: Callable[[Sequence[int]], torch.Tensor],
    error_of: Callable[[Sequence[int]], float],
    dtype: str,
) -> Difference | None:
    """The first difference of `other` from `stock` (new tokens, cut by `until_end`), judged; None if there is none.

    logits_of: stock logits ``[V]`` after a prefix. error_of: the measured error there (asked in float32 alone).
    """
    position = first_difference(stock, other)
    if position is None:
        return None
    chosen = stock[position] if position < len(stock) else None
    taken = other[position] if position < len(other) else None
    found = Difference(prompt.number, prompt.category, method, engine, batch_size, position, chosen, taken)
    if chosen is None or taken is None:
        return found
    prefix = [*prompt.tokens, *stock[:position]]
    logits = logits_of(prefix)
    first, second = logits[chosen].item(), logits[taken].item()
    unit = UNIT_ROUND_OFF.get(dtype)
    allowed = error_of(prefix) if unit is None else ROUNDINGS * unit * max(abs(first), abs(second))
    return dataclasses.replace(found, stock_logit=first, other_logit=second, gap=abs(first - second), allowed=allowed)


def run(
    *,
    model: str,
    prompts: str,
    methods: str,
    head: str | None,
    engines: str,
    batch_sizes: str,
    num_speculative_tokens: int | None,
    max_new_tokens: int,
    max_prompt_tokens: int,
    count: int,
    dtype: str,
    threads: int | None,
    json: str | None,
) -> int:
    """The command. Returns 0 if everything holds, else 1."""
    engine_names, sizes = _engine_names(engines), _sizes(batch_sizes)
    arms = {name: parse_arms(methods, head=head, engine=name, num_speculative_tokens=num_speculative_tokens)[1:] for name in engine_names}
    import torch

    import specfx
    from specfx import models
    from specfx.api import engine_of

    report.set_threads(threads)
    with report.Progress(f"loading {model}"):
        target, tokenizer = models.load(model, getattr(torch, dtype))
    chosen = read_prompts(prompts, tokenizer, limit=count, max_prompt_tokens=max_prompt_tokens, spread=True)
    end_tokens = end_tokens_of(target)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end_tokens or [0])[0]

    stock: dict[int, list[list[int]]] = {}
    for size in sizes:
        with report.Progress(f"stock, batch {size}, {len(chosen)} prompts"):
            stock[size] = outputs_of(target, Arm(STOCK), chosen, size, max_new_tokens, pad, end_tokens)
    comparisons: list[Comparison] = []
    # Prefixes of near ties repeat from engine to engine and method to method.
    known_logits: dict[tuple[int, ...], torch.Tensor] = {}

    def logits_of(prefix: Sequence[int]) -> torch.Tensor:
        key = tuple(prefix)
        if key not in known_logits:
            known_logits[key] = stock_logits(target, prefix)
        return known_logits[key]

    def results() -> dict[str, Any]:
        return {
            "bench": "equal",
            "model": model,
            "dtype": dtype,
            "prompts": [{"line": p.number, "category": p.category, "tokens": len(p.tokens)} for p in chosen],
            "comparisons": [{**dataclasses.asdict(c), "holds": c.holds} for c in comparisons],
        }

    for engine_name in engine_names:
        for arm in arms[engine_name]:
            start(target, arm)
            for size in sizes:
                with report.Progress(f"{arm.name}, {engine_name}, batch {size}"):
                    outputs = outputs_of(target, arm, chosen, size, max_new_tokens, pad, end_tokens)
                explanation = specfx.explain(target)
                served, by_stock = str(explanation.engine), sum(explanation.stock_calls.values())
                found = [
                    analyse(
                        prompt,
                        expected,
                        output,
                        method=arm.name,
                        engine=engine_name,
                        batch_size=size,
                        logits_of=logits_of,
                        error_of=lambda prefix: measured_error(target, engine_of(target), prefix),
                        dtype=dtype,
                    )
                    for prompt, expected, output in zip(chosen, stock[size], outputs, strict=True)
                ]
                differences = tuple(d for d in found if d is not None)
                identical = len(chosen) - len(differences)
                comparisons.append(Comparison(arm.name, engine_name, served, size, len(chosen), identical, differences, by_stock))
                for difference in differences:
                    print(difference, file=sys.stderr, flush=True)
                if json is not None:
                    report.write_json(json, results())
    print(comparison_table(comparisons))
    for difference in (d for c in comparisons for d in c.differences):
        print(difference)
    holds = all(c.holds for c in comparisons)
    print("every output is stock's, near ties aside" if holds else "SOME OUTPUTS DIFFER, or an engine did not serve a call")
    return 0 if holds else 1


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """One line for each method, engine and batch size."""
    header = ("engine", "method", "batch", "served by", "prompts", "identical", "near ties", "faults")
    rows = [
        (
            c.engine,
            c.method,
            str(c.batch_size),
            c.served,
            str(c.prompts),
            f"{c.identical} ({c.identical / c.prompts:.0%})",
            str(sum(d.explained for d in c.differences)),
            str(sum(not d.explained for d in c.differences)),
        )
        for c in comparisons
    ]
    return report.table(header, rows)


def outputs_of(
    model: Any, arm: Arm, prompts: Sequence[Prompt], size: int, max_new_tokens: int, pad: int, end_tokens: Sequence[int]
) -> list[list[int]]:
    batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    how: dict[str, Any] = {"pad": pad, "end_tokens": end_tokens}
    return [row for batch in batches for row in generate(model, arm, [p.tokens for p in batch], max_new_tokens, **how)[0]]


def _engine_names(engines: str) -> list[str]:
    names = [part.strip() for part in engines.split(",")]
    known = [name for name in ENGINES if name != "auto"]
    if unknown := [name for name in names if name not in known]:
        raise OptionError(f"engines={engines!r}: unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    return names


def _sizes(batch_sizes: str) -> list[int]:
    parts = [part.strip() for part in batch_sizes.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"batch_sizes={batch_sizes!r}: must be ints > 0, as in 1,4")
    return [int(part) for part in parts]
