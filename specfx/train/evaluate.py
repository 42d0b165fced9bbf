"""How far a head's drafts are right, on texts that it was not trained on.

The texts are greedy answers of the target, so one parallel pass tells what greedy decoding would accept: the chain from a position is
right exactly as long as its tokens are the text's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from specfx.bench.report import table
from specfx.drafters.mtp_head import MtpHead
from specfx.train.lookup import Batch, Lookup
from specfx.train.loss import chains

ALL = "all"
"""The row over all categories."""


@dataclass(frozen=True)
class Acceptance:
    """Of one category. by_depth: share of right tokens at each depth, given that those before were right (None if none ever was).
    tokens_per_forward: of greedy decoding over these texts, the bonus token included. positions: from which a chain was drafted."""

    texts: int
    positions: int
    by_depth: list[float | None]
    tokens_per_forward: float

    def record(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    head: MtpHead, target: Any, lookup: Lookup, steps: int, batch_tokens: int, vocabulary: Tensor | None = None
) -> dict[str, Acceptance]:
    """Acceptance by category, `ALL` first. vocabulary: ``[N]`` ids, if drafts are to be made of these tokens alone."""
    lm_head = target.get_output_embeddings()
    weight, bias = lm_head.weight, getattr(lm_head, "bias", None)
    ids = None if vocabulary is None else vocabulary.to(weight.device)
    if ids is not None:
        weight, bias = weight[ids], None if bias is None else bias[ids]
    counts: dict[str, _Count] = {}
    for group in lookup.batches(batch_tokens, None):
        batch = lookup.batch(group, weight.device)
        run = _accepted(head, batch, steps, weight, bias, ids)
        for row, number in enumerate(group):
            lengths = run[batch.base[:, 0] == row].tolist()
            for name in dict.fromkeys((ALL, lookup.texts[number].category)):
                counts.setdefault(name, _Count([0] * (steps + 1))).add(lengths)
    return {name: counts[name].acceptance() for name in sorted(counts, key=lambda name: (name != ALL, name))}


def as_table(results: dict[str, Acceptance]) -> str:
    """One line for each category."""
    depths = len(next(iter(results.values())).by_depth)
    header = ["held-out texts", "texts", *[f"depth {k}" for k in range(1, depths + 1)], "tokens/forward"]
    return table(
        header,
        [
            [name, str(a.texts), *["-" if share is None else f"{share:.3f}" for share in a.by_depth], f"{a.tokens_per_forward:.2f}"]
            for name, a in results.items()
        ],
    )


def _accepted(head: MtpHead, batch: Batch, steps: int, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    """``[N]``: how many of the drafted tokens are right, from each position of `batch.base`, up to the first wrong one."""
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype != torch.float32):
        drafted = chains(head, batch.ids, batch.hidden, steps)
    b, t = batch.base.unbind(1)
    right = torch.zeros(len(b), steps, dtype=torch.bool, device=weight.device)
    rows = 256 if weight.device.type == "cpu" else 4096
    for k, hidden in enumerate(drafted, start=1):
        parts = [torch.nn.functional.linear(h.to(weight.dtype), weight, bias).argmax(-1) for h in hidden[b, t].split(rows)]
        guess = torch.cat(parts) if ids is None else ids[torch.cat(parts)]
        true = batch.ids[b, (t + k + 1).clamp(max=batch.ids.shape[1] - 1)]
        right[:, k - 1] = (t + k + 1 < batch.length[b]) & (guess == true)
    return right.long().cumprod(dim=1).sum(dim=1)


@dataclass
class _Count:
    """State of one category. reached[k]: positions with k or more right tokens."""

    reached: list[int]
    texts: int = 0
    forwards: int = 0
    tokens: int = 0

    def add(self, accepted: list[int]) -> None:
        """One text: the number of right tokens from each of its positions, walked as the decode loop would."""
        self.texts += 1
        for depth in range(len(self.reached)):
            self.reached[depth] += sum(n >= depth for n in accepted)
        at = 0
        while at < len(accepted):
            at += accepted[at] + 1
            self.forwards += 1
        self.tokens += min(at, len(accepted))  # no bonus token after the end

    def acceptance(self) -> Acceptance:
        shares = [after / before if before else None for before, after in zip(self.reached, self.reached[1:], strict=False)]
        return Acceptance(self.texts, self.reached[0], shares, self.tokens / max(self.forwards, 1))
