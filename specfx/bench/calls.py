"""One call of `generate` by one arm, timed: what the benches have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STOCK = "stock"


@dataclass(frozen=True)
class Arm:
    """One way to generate: the stock model, or a method with its options."""

    name: str
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_stock(self) -> bool:
        return self.name == STOCK


def start(model: Any, arm: Arm) -> None:
    """Make `model.generate` the arm's. Stock needs nothing: it is called past the wrapper."""
    import specfx

    if not arm.is_stock:
        specfx.speculate(model, arm.method, **{"compile": "sync", **arm.options})


def generate(
    model: Any,
    arm: Arm,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    seed: int = 0,
    pad: int = 0,
    end_tokens: Sequence[int] = (),
) -> tuple[list[list[int]], float]:
    """New tokens of each prompt of one batch, up to its end token, and the seconds of the call. The arm must have been started.

    temperature: of sampling from the whole vocabulary, after seeding torch; None: greedy.
    """
    import torch

    ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts, pad))
    call = type(model).generate.__get__(model) if arm.is_stock else model.generate
    how: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        torch.manual_seed(seed)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    _synchronize()
    began = time.perf_counter()
    output = call(ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **how)
    _synchronize()
    seconds = time.perf_counter() - began
    return [until_end(row, end_tokens) for row in output[:, ids.shape[1] :].tolist()], seconds


def until_end(tokens: Sequence[int], end_tokens: Sequence[int]) -> list[int]:
    """Tokens up to the first end token, that one included: what follows in a batch is padding."""
    for index, token in enumerate(tokens):
        if token in end_tokens:
            return list(tokens[: index + 1])
    return list(tokens)


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``[B, P]`` of prompts of unequal length."""
    import torch

    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def end_tokens_of(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
