"""`specfx bench generate`: whole `generate` calls of the stock model and of each method, on the user's model and prompts.

For each prompt all arms run one after another in one process, in an order that rotates from prompt to prompt, after a warm-up of
each. So a ratio compares runs that are seconds apart, and the medians are taken over ratios, not over speeds. Times are of whole
calls, prefill included. The stock arm is the class's own `generate` on the same object.

With a batch size, prompts go together in calls of so many, and a call counts as one prompt that is as long as all of them. With a
temperature tokens are sampled, each call from a seed of its own; then outputs are not compared: stock draws from other noise. Random
prompts are random tokens, whose continuations nobody can guess.
"""

from __future__ import annotations

import ast
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specfx.bench import report
from specfx.bench.calls import STOCK, Arm, end_tokens_of, generate, start
from specfx.bench.prompts import UNCATEGORISED, Prompt, random_tokens, read_prompts
from specfx.errors import OptionError
from specfx.options import parse
from specfx.runtime.stats import CallStats

NONE = "none"
_DEPTHS = 5  # of acceptance that the table shows
_WARM_UP_TEXT = "one two three four five six seven eight nine ten, " * 6


@dataclass(frozen=True)
class Measurement:
    """One arm on one call, named by its first prompt. prompt_tokens, tokens: of all its prompts. seconds: the whole call, the median over
    repeats. same_as_stock: None if sampled. forwards and tokens_per_forward: None for stock."""

    prompt: int
    category: str
    arm: str
    prompt_tokens: int
    tokens: int
    seconds: float
    same_as_stock: bool | None
    forwards: int | None = None
    tokens_per_forward: float | None = None
    proposed: list[int] | None = None
    accepted: list[int] | None = None
    seconds_by_stage: dict[str, float] | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Summary:
    """One arm over many prompts. Ratios are medians of per-prompt ratios of tokens per second; None where there is nothing to compare."""

    arm: str
    prompts: int
    tokens_per_second: float
    over_stock: float | None
    over_none: float | None
    lowest_over_none: float | None
    tokens_per_forward: float | None
    acceptance_by_depth: list[float] | None
    """Of the drafts that were so deep, the share in which a token of this depth was accepted."""
    same_as_stock: float | None


def parse_arms(methods: str, **options: Any) -> list[Arm]:
    """The stock arm and one for each of ``"none,suffix,mtp:topk=1:num_steps=4,..."``, a method and options of its own.

    Options that are None are left out and `head` goes to ``"mtp"`` alone. Raises `OptionError` before anything is loaded.
    """
    given = {name: value for name, value in options.items() if value is not None}
    arms = [Arm(STOCK)]
    for name in dict.fromkeys(part.strip() for part in methods.split(",")):
        first, *settings = name.split(":")
        method = None if first == NONE else first
        own = {key: value for key, value in given.items() if key != "head" or method == "mtp"}
        own |= dict(_setting(text) for text in settings)
        parse(method, own)
        arms.append(Arm(name, method, own))
    return arms


def _setting(text: str) -> tuple[str, Any]:
    """``"topk=1"`` as ``("topk", 1)``: a Python literal (true and false in lower case too), or else a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"methods: {text!r} is not an option; write NAME=VALUE behind the method, as in mtp:topk=1")
    try:
        return name, ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
    except (ValueError, SyntaxError):
        return name, value


def warm_up(model: Any, tokenizer: Any, arms: Sequence[Arm], max_new_tokens: int) -> None:
    """Each arm once on a text of its own, not a measured one: captures, compiles, and fills caches."""
    tokens = tokenizer(_WARM_UP_TEXT).input_ids
    for arm in arms:
        with report.Progress(f"{arm.name}: first call" if arm.is_stock else f"{arm.name}: capture, compile, first call"):
            start(model, arm)
            generate(model, arm, [tokens], max_new_tokens)


def measure(
    model: Any,
    prompts: Sequence[Prompt],
    arms: Sequence[Arm],
    *,
    max_new_tokens: int,
    repeats: int = 1,
    batch_size: int = 1,
    temperature: float | None = None,
    end_tokens: Sequence[int] = (),
) -> list[Measurement]:
    """Every arm on every batch of prompts, interleaved. The first of `arms` must be stock: greedy outputs are compared with its."""
    results = []
    batches = [prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
    for index, batch in enumerate(batches):
        outputs: dict[str, list[list[int]]] = {}
        seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        statistics_of: dict[str, Any] = {}
        for repeat in range(repeats):
            turn = (index + repeat) % len(arms)
            for arm in [*arms[turn:], *arms[:turn]]:
                start(model, arm)
                how: dict[str, Any] = {"temperature": temperature, "seed": index, "end_tokens": end_tokens}
                outputs[arm.name], taken = generate(model, arm, [prompt.tokens for prompt in batch], max_new_tokens, **how)
                seconds[arm.name].append(taken)
                statistics_of[arm.name] = None if arm.is_stock else _statistics(model)
        for arm in arms:
            output = outputs[arm.name]
            results.append(
                Measurement(
                    prompt=batch[0].number,
                    category=batch[0].category if batch_size == 1 else UNCATEGORISED,
                    arm=arm.name,
                    prompt_tokens=sum(len(prompt.tokens) for prompt in batch),
                    tokens=sum(map(len, output)),
                    seconds=statistics.median(seconds[arm.name]),
                    same_as_stock=output == outputs[arms[0].name] if temperature is None else None,
                    **(statistics_of[arm.name] or {}),
                )
            )
        speeds = ", ".join(f"{m.arm} {m.tokens_per_second:.1f}" for m in results[-len(arms) :])
        print(f"call {index + 1}/{len(batches)} ({results[-1].category}), tokens/s: {speeds}", file=sys.stderr, flush=True)
    return results


def ratios(measurements: Sequence[Measurement], arm: str, base: str) -> list[float]:
    """Tokens per second of `arm` over those of `base`, one ratio for each prompt on which both ran."""
    base_speed = {m.prompt: m.tokens_per_second for m in measurements if m.arm == base}
    return [m.tokens_per_second / base_speed[m.prompt] for m in measurements if m.arm == arm and m.prompt in base_speed]


def summarise(measurements: Sequence[Measurement]) -> list[Summary]:
    """One summary for each arm, in order of first appearance."""
    summaries = []
    for name in dict.fromkeys(m.arm for m in measurements):
        own = [m for m in measurements if m.arm == name]
        over_none = ratios(measurements, name, NONE)
        forwards = sum(m.forwards or 0 for m in own)
        # Weighted by forwards, so that it is tokens over forwards of all prompts together.
        per_forward = sum((m.tokens_per_forward or 0.0) * (m.forwards or 0) for m in own) / forwards if forwards else None
        summaries.append(
            Summary(
                arm=name,
                prompts=len(own),
                tokens_per_second=statistics.median(m.tokens_per_second for m in own),
                over_stock=report.median(ratios(measurements, name, STOCK)),
                over_none=report.median(over_none),
                lowest_over_none=min(over_none, default=None),
                tokens_per_forward=per_forward,
                acceptance_by_depth=_acceptance(own),
                same_as_stock=None if any(m.same_as_stock is None for m in own) else sum(bool(m.same_as_stock) for m in own) / len(own),
            )
        )
    return summaries


def _acceptance(measurements: Sequence[Measurement]) -> list[float] | None:
    total = CallStats()
    for m in measurements:
        total.add(CallStats(proposed=m.proposed or [], accepted=m.accepted or []))
    return total.acceptance_by_depth or None


def by_category(measurements: Sequence[Measurement]) -> dict[str, list[Summary]]:
    """`summarise` for each category."""
    return {
        category: summarise([m for m in measurements if m.category == category])
        for category in dict.fromkeys(m.category for m in measurements)
    }


def summary_table(groups: dict[str, list[Summary]]) -> str:
    """Groups of summaries as one table."""
    header = (
        "group",
        "method",
        "prompts",
        "tokens/s",
        "over stock",
        "over none",
        "lowest",
        "tokens/forward",
        "accepted by depth",
        "same output",
    )
    rows = [
        (
            group,
            s.arm,
            str(s.prompts),
            report.number(s.tokens_per_second, 1),
            report.number(s.over_stock, 2, "x"),
            report.number(s.over_none, 2, "x"),
            report.number(s.lowest_over_none, 2, "x"),
            report.number(s.tokens_per_forward),
            " ".join(f"{share:.2f}" for share in (s.acceptance_by_depth or [])[:_DEPTHS]) or "-",
            "-" if s.same_as_stock is None else f"{s.same_as_stock:.0%}",
        )
        for group, summaries in groups.items()
        for s in summaries
    ]
    return report.table(header, rows)


def run(
    *,
    model: str,
    prompts: str | None,
    random_prompts: int | None,
    methods: str,
    head: str | None,
    engine: str,
    num_speculative_tokens: int | None,
    max_new_tokens: int,
    max_prompt_tokens: int,
    limit: int | None,
    per_category: int | None,
    repeats: int,
    batch_size: int,
    temperature: float | None,
    dtype: str,
    threads: int | None,
    json: str | None,
) -> int:
    """The command. Returns 0."""
    arms = parse_arms(methods, head=head, engine=engine, num_speculative_tokens=num_speculative_tokens)
    import torch

    import specfx
    from specfx import models

    report.set_threads(threads)
    with report.Progress(f"loading {model}"):
        target, tokenizer = models.load(model, getattr(torch, dtype))
    if prompts is None:
        chosen = random_tokens(random_prompts or 0, target.config.get_text_config().vocab_size)
    else:
        chosen = read_prompts(
            prompts, tokenizer, limit=limit, per_category=per_category, max_prompt_tokens=max_prompt_tokens, spread=limit is not None
        )
    warm_up(target, tokenizer, arms, max_new_tokens)
    how: dict[str, Any] = {"repeats": repeats, "batch_size": batch_size, "temperature": temperature, "end_tokens": end_tokens_of(target)}
    measurements = measure(target, chosen, arms, max_new_tokens=max_new_tokens, **how)
    overall, categories = summarise(measurements), by_category(measurements)
    groups = {"all": overall, **(categories if len(categories) > 1 else {})}
    print(summary_table(groups))
    explanation = specfx.explain(target)
    print(f"\nengine: {explanation.engine}")
    for refusal in explanation.refusals:
        print(f"refused: {refusal}")
    if json is not None:
        results = {
            "bench": "generate",
            "model": model,
            "dtype": dtype,
            "batch_size": batch_size,
            "temperature": temperature,
            "engine": explanation.engine,
            "refusals": [str(refusal) for refusal in explanation.refusals],
            "summary": {group: [dataclasses.asdict(s) for s in summaries] for group, summaries in groups.items()},
            "measurements": [{**dataclasses.asdict(m), "tokens_per_second": m.tokens_per_second} for m in measurements],
        }
        report.write_json(json, results)
    return 0


def _statistics(model: Any) -> dict[str, Any]:
    """The part of `specfx.stats` that a measurement keeps, of the call just made."""
    import specfx

    stats = specfx.stats(model)
    return {
        "forwards": stats.forwards,
        "tokens_per_forward": stats.tokens_per_forward,
        "proposed": list(stats.last.proposed),
        "accepted": list(stats.last.accepted),
        "seconds_by_stage": dict(stats.seconds),
    }
