"""`specfx demo`: SmolLM2-135M-Instruct on four prompts, stock `generate` against specfx with each method.

The prompts show where speculation pays: a chat answer repeats little of what came before, an edit of given code, an extraction to
JSON and an agent that restates its plan copy most of it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specfx.bench import report
from specfx.bench.calls import STOCK, Arm
from specfx.bench.generate import NONE, Measurement, measure, parse_arms, warm_up
from specfx.bench.prompts import Source, encode
from specfx.errors import SpecfxError
from specfx.models import SMOLLM2, load_smollm2

HEAD_FOLDER = Path(__file__).resolve().parent.parent / "examples" / "smollm2_mtp_head"
"""Where a checkout has the head that was trained for SmolLM2; an installed wheel has none."""

_SCRIPT = """```python
import csv


def read_orders(path):
    orders = []
    with open(path) as order_file:
        for name, price, quantity in csv.reader(order_file):
            orders.append((name, float(price), int(quantity)))
    return orders


def total(orders, tax_rate):
    subtotal = 0
    for name, price, quantity in orders:
        subtotal = subtotal + price * quantity
    return subtotal + subtotal * tax_rate


orders = read_orders("orders.csv")
print(total(orders, tax_rate=0.08))
```"""

_LIST = """name: Zoe Adams, email: zoe@example.com, city: Zurich
name: Yann Petit, email: yann@example.org, city: Lyon
name: Xenia Novak, email: xenia@example.net, city: Prague"""
_LIST_AS_JSON = """[
  {"name": "Zoe Adams", "email": "zoe@example.com", "city": "Zurich"},
  {"name": "Yann Petit", "email": "yann@example.org", "city": "Lyon"},
  {"name": "Xenia Novak", "email": "xenia@example.net", "city": "Prague"}
]"""
_NEW_LIST = """name: Alice Johnson, email: alice@example.com, city: Amsterdam
name: Bob Martinez, email: bob@example.org, city: Barcelona
name: Carla Rossi, email: carla@example.net, city: Milan
name: David Chen, email: david@example.com, city: Singapore
name: Emma Larsen, email: emma@example.org, city: Copenhagen"""

_STEPS = (
    "1. Open src/orders.py and find the function total",
    "2. Rename the function total to order_total in src/orders.py",
    "3. Update the import in src/report.py",
    "4. Update the import in tests/test_orders.py",
    "5. Run pytest tests/test_orders.py",
)


def _plan(done: int) -> str:
    return "\n".join(["Plan:", *[f"[{'x' if i < done else ' '}] {step}" for i, step in enumerate(_STEPS)]])


def _chat(*contents: str) -> tuple[dict[str, str], ...]:
    """User and assistant in turn."""
    return tuple({"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents))


SOURCES = (
    Source(1, "chat answer", _chat("Explain in a few sentences why the sky is blue during the day and red at sunset.")),
    Source(
        2,
        "code edit",
        _chat(
            "Write a Python script that reads orders from a CSV file and prints their total with tax.",
            _SCRIPT,
            "Rename the function total to order_total. Show the complete script again.",
        ),
    ),
    Source(
        3, "JSON extraction", _chat(f"Convert this list to JSON:\n\n{_LIST}", _LIST_AS_JSON, f"Convert this list to JSON:\n\n{_NEW_LIST}")
    ),
    Source(
        4,
        "agent plan",
        _chat(
            f"You fix a repository step by step. Before each step repeat the plan with finished steps marked [x].\n\n{_plan(0)}",
            f"{_plan(1)}\n\nStep 1: open src/orders.py",
            "The file src/orders.py is open. The function total is in line 10. Go on.",
            f"{_plan(2)}\n\nStep 2: replace total with order_total in src/orders.py",
            "The function is renamed in src/orders.py. Go on.",
        ),
    ),
)

_FOOTNOTE = """\
Greedy decoding, whole calls with prefill. "none" is specfx without drafts. In bfloat16 two tokens can be tied within
rounding; another kernel may then choose the other one, and the text goes on differently from there. In float32 such
ties are very rare: `specfx demo --dtype float32`."""


def result_table(measurements: Sequence[Measurement]) -> str:
    """One line for each prompt and method."""
    stock = {m.prompt: m.tokens_per_second for m in measurements if m.arm == STOCK}
    rows = [
        (
            m.category if m.arm == STOCK else "",
            m.arm,
            str(m.tokens),
            f"{m.tokens_per_second:.1f}",
            f"{m.tokens_per_second / stock[m.prompt]:.2f}x",
            report.number(m.tokens_per_forward),
            "" if m.arm == STOCK else "yes" if m.same_as_stock else "no",
        )
        for m in measurements
    ]
    return report.table(("prompt", "method", "tokens", "tokens/s", "speed-up", "tokens/forward", "same output"), rows)


def run(*, head: str | None, max_new_tokens: int, dtype: str, engine: str, threads: int | None, json: str | None) -> int:
    """The command. Returns 0."""
    head_path = head if head is not None else str(HEAD_FOLDER) if HEAD_FOLDER.is_dir() else None
    with_head = ",mtp,mtp:enable_suffix_decoding=true" if head_path else ""
    arms = parse_arms(f"{NONE},suffix{with_head}", head=head_path, engine=engine)
    with report.Progress("importing torch and transformers"):
        import torch
        import transformers

        import specfx
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    report.set_threads(threads)
    with report.Progress(f"loading SmolLM2-135M-Instruct ({SMOLLM2}, {dtype})"):
        model, tokenizer = load_smollm2(getattr(torch, dtype))
    if head_path is None:
        print(f'method "mtp" is skipped: {HEAD_FOLDER} is not there; give a head with --head PATH', file=sys.stderr)
    ready = _ready_arms(model, tokenizer, arms, max_new_tokens, required=head is not None)
    measurements = measure(model, [encode(source, tokenizer) for source in SOURCES], ready, max_new_tokens=max_new_tokens)
    explanation = specfx.explain(model)
    print(f"\n{result_table(measurements)}\n")
    print(f"engine: {explanation.engine}, passes: {len(explanation.passes)}, refusals: {len(explanation.refusals)}")
    for refusal in explanation.refusals:
        print(f"  {refusal}")
    print(f"\n{_FOOTNOTE}")
    if json is not None:
        results = {
            "bench": "demo",
            "model": SMOLLM2,
            "dtype": dtype,
            "engine": explanation.engine,
            "refusals": [str(refusal) for refusal in explanation.refusals],
            "measurements": [{**dataclasses.asdict(m), "tokens_per_second": m.tokens_per_second} for m in measurements],
        }
        report.write_json(json, results)
    return 0


def _ready_arms(model: Any, tokenizer: Any, arms: Sequence[Arm], max_new_tokens: int, required: bool) -> list[Arm]:
    """The arms that start. The checkout's own head may not fit the chosen dtype; one that the user gave must."""
    ready = []
    for arm in arms:
        try:
            warm_up(model, tokenizer, [arm], max_new_tokens)
        except SpecfxError as e:
            if arm.method != "mtp" or required:
                raise
            print(f'method "mtp" is skipped: {e}', file=sys.stderr)
        else:
            ready.append(arm)
    return ready
