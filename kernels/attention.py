"""`specfx::attention`: the functional marker that every form of causal self-attention becomes.

A captured model is full of attention in one form or another; the canonicalise pass turns each into this one op, and later passes
look for nothing else. It is a specification, not something to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfx.kernels.library import define_op


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """Softmax attention of one sequence, in float32 (or wider): the arithmetic that all attention references share.

    q: ``[T, Hq, Dk]``, k: ``[L, Hkv, Dk]``, v: ``[L, Hkv, Dv]``, visible: bool ``[T, L]``; ``Hq`` is a multiple of ``Hkv`` (grouped
    queries are never materialised as repeats). softcap: logits become ``softcap * tanh(logits / softcap)`` if not 0 (Gemma-2).
    sinks: ``[Hq]`` extra logits that take probability and give nothing (GPT-OSS). Returns ``[T, Hq, Dv]`` in q's dtype.
    """
    rows, heads, groups = q.shape[0], q.shape[1], k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).view(rows, groups, heads // groups, q.shape[2])
    scores = torch.einsum("tghd,lgd->tghl", grouped, k.to(wide)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    if sinks is not None:
        extra = sinks.to(wide).view(1, groups, heads // groups, 1).expand(rows, -1, -1, 1)
        probs = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    else:
        probs = torch.softmax(scores, -1)
    out = torch.einsum("tghl,lgd->tghd", probs, v.to(wide))
    return out.reshape(rows, heads, v.shape[2]).to(q.dtype)


def causal_mask(rows: int, window: int, device: torch.device) -> Tensor:
    """bool ``[rows, rows]``: row t sees ``j <= t`` and, with a sliding window, ``j > t - window`` (window 0: none)."""
    t = torch.arange(rows, device=device)
    visible = t[None, :] <= t[:, None]
    return visible & (t[None, :] > t[:, None] - window) if window else visible


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """Causal self-attention. q: ``[B, Hq, T, Dk]``, k: ``[B, Hkv, T, Dk]``, v: ``[B, Hkv, T, Dv]`` -> ``[B, T, Hq, Dv]``."""
    visible = causal_mask(q.shape[2], window, q.device)
    rows = [
        masked_attention(q[b].transpose(0, 1), k[b].transpose(0, 1), v[b].transpose(0, 1), visible, scale, softcap, sinks)
        for b in range(q.shape[0])
    ]
    return torch.stack(rows)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


attention = define_op(
    "attention(Tensor q, Tensor k, Tensor v, float scale, int window=0, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    reference=attention_reference,
    fake=_fake,
)
