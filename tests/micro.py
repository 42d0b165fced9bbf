"""Models of a few lines, exported as `specfx.capture` exports real ones: one attention between an embedding and a head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

VOCAB, WIDTH, HEADS = 16, 8, 2
SCALE = 0.5
"""1 / sqrt(WIDTH / HEADS)."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(q, k, v, input_ids, position_ids) -> out``, all but the last two ``[1, HEADS, T, WIDTH // HEADS]``."""


def trace(model: nn.Module) -> fx.GraphModule:
    """`model` as one FX graph over ``(input_ids, position_ids)``, both int64 ``[1, T]`` with T dynamic."""
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    example = torch.arange(7)[None]
    with torch.no_grad():
        program = torch.export.export(
            model, (example, example.clone()), dynamic_shapes={"input_ids": {1: rows}, "position_ids": {1: rows}}, strict=False
        )
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.recompile()
    return module


class OneAttention(nn.Module):
    """``(input_ids, position_ids) -> (logits, hidden)`` around one attention."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.requires_grad_(False)
        self.attend = attend

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        q, k, v = (y.view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        hidden = self.attend(q, k, v, input_ids, position_ids).transpose(1, 2).reshape(x.shape) + x
        return self.head(hidden), hidden


def causal(position_ids: Tensor) -> Tensor:
    """bool ``[1, 1, T, T]``: True where a key is visible, from the positions, as transformers makes its masks."""
    return position_ids[:, None, None, :] <= position_ids[:, None, :, None]


def one_attention(attend: Attend) -> fx.GraphModule:
    return trace(OneAttention(attend))
