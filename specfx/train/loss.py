"""The chains that a head drafts in training, and their loss.

From every position of every answer at once, K tokens are drafted, each step fed with its own hidden state and the true token: what the
drafter does as long as its drafts are right. The loss of step k is cross-entropy with a soft label and weighs ``decay ** (k - 1)``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specfx.drafters.mtp_head import MtpHead
from specfx.drafters.mtp_kv import HeadKV
from specfx.train.lookup import Batch

_ROWS = 256
"""Rows whose logits are held at once, on a CPU; a GPU takes 16 times as many."""


class ChainKV(HeadKV):
    """Keys of all steps so far side by side, differentiable: what one chain drafted from every position at once would see."""

    def __init__(self) -> None:
        super().__init__()
        self.key_blocks: list[Tensor] = []
        self.value_blocks: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.key_blocks.append(keys)
        self.value_blocks.append(values)
        return torch.cat(self.key_blocks, dim=2), torch.cat(self.value_blocks, dim=2)


def chains(head: MtpHead, ids: Tensor, hidden: Tensor, steps: int) -> list[Tensor]:
    """Hidden states ``[B, T, H]`` of each step when the true tokens are drafted from every position t.

    ids ``[B, T]``, hidden ``[B, T, H]`` of the target. Step k pairs x_{t+k} with the step before's hidden state, at position t + k - 1.
    It sees the first step's rows up to t, which stand for committed pairs, and of the later steps only its own chain's: what the
    drafter's KV holds then. (Step k of position t is of use where t + k lies inside the text.)
    """
    size, device = ids.shape[1], ids.device
    kv = ChainKV()
    result: list[Tensor] = []
    blocks = [torch.ones(size, size, dtype=torch.bool, device=device).tril()]
    for k in range(1, steps + 1):
        tokens = F.pad(ids[:, k:], (0, min(k, size)))
        mask = torch.cat(blocks, dim=1)[None, None]
        hidden = head(tokens, hidden, kv, torch.arange(k - 1, k - 1 + size, device=device)[None], mask)
        result.append(hidden)
        blocks.append(torch.eye(size, dtype=torch.bool, device=device))
    return result


class SoftCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy between soft labels and the LM head's softmax, without ever holding more than a few rows of logits.

    hidden ``[N, H]``, weight ``[V, H]``, bias ``[V]``, offset ``[V]`` (added too, but not in looking for the best token), labels and
    label_weights ``[N, C]`` (each row of weights sums to 1; the last label is the true token). Returns the loss and ``[N]``: whether the
    true token is the best of all V.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, labels: Tensor, label_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=hidden.device)
        grads, right = [], []
        rows = _ROWS if hidden.device.type == "cpu" else 16 * _ROWS
        for h, y, w in zip(hidden.split(rows), labels.split(rows), label_weights.split(rows), strict=True):
            logits = (h.to(weight.dtype) @ weight.T).float().add_(bias)
            right.append(logits.argmax(-1) == y[:, -1])
            logits += offset
            logits -= logits.logsumexp(dim=-1, keepdim=True)
            loss -= (logits.gather(1, y) * w).sum()
            grads.append((logits.exp_().scatter_add_(1, y, -w).to(weight.dtype) @ weight).float())
        ctx.save_for_backward(torch.cat(grads) / len(hidden))
        ctx.dtype = hidden.dtype
        correct = torch.cat(right)
        ctx.mark_non_differentiable(correct)
        return loss / len(hidden), correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (ctx.saved_tensors[0] * grad).to(ctx.dtype), None, None, None, None, None


class Vocabulary:
    """Rows of the frozen LM head that a batch's loss is taken over: those of its labels, and `negatives` others for all the rest.

    The drawn ones get an offset that makes them stand for all that were not drawn. ``negatives=None`` takes the whole LM head, where
    the arithmetic is cheap (a GPU).
    """

    def __init__(self, lm_head: Any, dtype: torch.dtype, negatives: int | None) -> None:
        self.weight = lm_head.weight.detach().to(dtype)
        bias = getattr(lm_head, "bias", None)
        self.bias = torch.zeros(len(self.weight), device=self.weight.device) if bias is None else bias.detach().float()
        self.negatives = negatives

    def sample(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(weight ``[U, H]``, bias ``[U]``, offset ``[U]``, the batch's labels as indices into U)."""
        if self.negatives is None:
            return self.weight, self.bias, torch.zeros_like(self.bias), batch.labels.long()
        own, labels = batch.labels.long().unique(return_inverse=True)
        others = torch.ones(len(self.weight), dtype=torch.bool, device=own.device)
        others[own] = False
        rest = others.nonzero()[:, 0]
        drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: self.negatives].to(rest.device)]
        used = torch.cat([own, drawn])
        offset = torch.zeros(len(used), device=own.device)
        if len(drawn):
            offset[len(own) :] = math.log(len(rest) / len(drawn))
        return self.weight[used], self.bias[used], offset, labels


def chain_loss(head: MtpHead, batch: Batch, vocabulary: Vocabulary, steps: int, decay: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss to minimise, losses by step ``[K]``, acceptance by depth ``[K]``: shares of positions where steps 1 .. k were all right)."""
    drafted = chains(head, batch.ids, batch.hidden, steps)
    weight, bias, offset, labels = vocabulary.sample(batch, seed)
    b, t = batch.base.unbind(1)
    total = torch.zeros((), device=batch.ids.device)
    alive = torch.ones(len(b), dtype=torch.bool, device=batch.ids.device)
    losses, accepted = [], []
    for k, hidden in enumerate(drafted, start=1):
        inside = t + k + 1 < batch.length[b]
        row, at = b[inside], t[inside]
        if not len(row):  # no answer is this long
            break
        loss, right = SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden[row, at], weight, bias, offset, labels[row, at + k], batch.weights[row, at + k].float()
        )
        total = total + decay ** (k - 1) * loss
        alive = alive.masked_scatter(inside, alive[inside] & right) & inside
        losses.append(loss.detach())
        accepted.append(alive.float().mean())
    return total, torch.stack(losses), torch.stack(accepted)
