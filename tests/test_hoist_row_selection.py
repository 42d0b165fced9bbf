"""Selecting rows early computes what selecting them late does, on those rows alone; and where rows depend on others it stays late."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from test_passes import after, refused
from torch import Tensor, fx, nn
from torch.nn.functional import gelu, silu, softmax

from specfx.errors import Reason
from specfx.passes.framework import calls, is_impure
from specfx.passes.hoist_row_selection import hoist_row_selection
from specfx.passes.printer import difference

aten = torch.ops.aten
WIDTH, HEADS = 8, 2
Layer = Callable[["Selecting", Tensor], Tensor]


class Selecting(nn.Module):
    """``(x [1, T, WIDTH], rows [S]) -> what `layer` makes of x, at `rows```, and what `beside` makes of it."""

    def __init__(self, layer: Layer, beside: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH, bias=False)
            self.weight = nn.Parameter(torch.rand(WIDTH))
        self.requires_grad_(False)
        self.layer, self.beside = layer, beside

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        made = self.layer(self, x)
        selected = made[0].index_select(0, rows)
        return (selected,) if self.beside is None else (selected, self.beside(made))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(silu(self.up(x)))

    def norm(self, x: Tensor) -> Tensor:
        wide = x.double()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def selecting(layer: Layer, beside: Callable[[Tensor], Tensor] | None = None) -> fx.GraphModule:
    rows, chosen = torch.export.Dim("rows", min=2, max=1 << 20), torch.export.Dim("chosen", min=1, max=1 << 20)
    example = torch.rand(1, 7, WIDTH), torch.tensor([4, 0, 2])
    with torch.no_grad():
        program = torch.export.export(Selecting(layer, beside), example, dynamic_shapes=({1: rows}, {0: chosen}), strict=False)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.graph.eliminate_dead_code(is_impure_node=is_impure)  # export's checks of dtypes
    module.recompile()
    return module


def heads(x: Tensor) -> Tensor:
    """``[1, HEADS, T, WIDTH / HEADS]``, as for an attention."""
    return x.view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(1, -1, WIDTH)


ROWWISE: dict[str, Layer] = {
    "mlp": lambda m, x: m.mlp(x),
    "a decoder layer's end": lambda m, x: m.norm(x + m.mlp(m.norm(x))),
    "heads and back": lambda m, x: merged(heads(m.mlp(x)) * 2),
    "heads before": lambda m, x: m.mlp(merged(heads(x) + heads(x.neg()))),
    "a tensor for all rows": lambda m, x: m.mlp(x) * m.weight + m.weight.sum(),
    "parts side by side": lambda m, x: m.down(torch.cat([x, gelu(m.mlp(x)), x], -1)),
    "a part of each row": lambda m, x: m.down(m.up(x)[..., 1:].pow(2).sum(-1, keepdim=True) * m.up(x)),
    "softmax of each row": lambda m, x: m.down(softmax(m.up(x), -1)),
    "another dimension": lambda m, x: m.mlp(x.unsqueeze(1))[:, 0],
    "a type like another's": lambda m, x: m.mlp(x.double().type_as(x)),
}


def mean_added(m: Selecting, x: Tensor) -> Tensor:
    return x + x.mean(1, keepdim=True)


MIXING: dict[str, Layer] = {
    "sums over rows": lambda m, x: x.cumsum(1),
    "softmax over rows": lambda m, x: softmax(x, 1),
    "their mean": mean_added,
    "turned over": lambda m, x: x.flip(1),
    "attention": lambda m, x: softmax(x @ x.transpose(1, 2), -1) @ x,
    "rows and columns": lambda m, x: ((s := x @ x.transpose(1, 2)) + s.transpose(1, 2)) @ x,
    "each with each": lambda m, x: ((v := x[..., 0]) * v.transpose(0, 1)).sum(-1, keepdim=True)[None] * x + v.unsqueeze(2),
    "written in place": lambda m, x: (y := x.clone()).add_(1) * y.flip(1),
    "random": lambda m, x: torch.nn.functional.dropout(x, 0.5, True) * 0 + x,
}


def assert_same(before: fx.GraphModule, hoisted: fx.GraphModule) -> None:
    for rows, count in ((7, 3), (2, 1), (40, 40), (5, 11)):
        generator = torch.Generator().manual_seed(rows)
        x, chosen = torch.rand(1, rows, WIDTH, generator=generator), torch.randint(rows, (count,), generator=generator)
        for got, expected in zip(hoisted(x, chosen), before(x, chosen), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def sizes_of_linears(module: fx.GraphModule) -> set[str]:
    return {str(node.meta["val"].shape[-2]) for node in calls(module, aten.linear.default)}


@pytest.mark.parametrize("name", ROWWISE)
def test_what_treats_each_row_by_itself_runs_on_the_selected_rows(name: str) -> None:
    before = selecting(ROWWISE[name])
    hoisted = after(before, hoist_row_selection)
    selected = str(hoisted.graph.output_node().args[0][0].meta["val"].shape[0])  # type: ignore[index, union-attr]
    assert sizes_of_linears(hoisted) == {selected} != sizes_of_linears(before)
    assert all(source.op == "placeholder" for node in calls(hoisted, aten.index_select.default) for source in node.all_input_nodes)
    assert_same(before, hoisted)


@pytest.mark.parametrize("name", MIXING)
def test_it_goes_no_further_than_what_mixes_rows(name: str) -> None:
    for layer in (lambda m, x: MIXING[name](m, m.mlp(x)), lambda m, x: MIXING[name](m, x)):
        assert "0 matches" in refused(hoist_row_selection, selecting(layer), reason=Reason.NOTHING_TO_DO)
    before = selecting(lambda m, x: m.mlp(MIXING[name](m, m.mlp(x))))
    hoisted = after(before, hoist_row_selection)
    assert len(sizes_of_linears(hoisted)) == 2
    assert name == "random" or assert_same(before, hoisted) is None


@pytest.mark.parametrize("beside", [lambda made: made, lambda made: made.sum(1)], ids=["all rows", "their sum"])
def test_what_others_read_too_stays(beside: Callable[[Tensor], Tensor]) -> None:
    assert "0 matches" in refused(hoist_row_selection, selecting(Selecting.mlp, beside), reason=Reason.NOTHING_TO_DO)


def test_without_linears_it_does_not_pay() -> None:
    assert "0 matches" in refused(hoist_row_selection, selecting(Selecting.norm), reason=Reason.NOTHING_TO_DO)


def test_the_difference() -> None:
    before = selecting(lambda m, x: x + m.mlp(x.cumsum(1)))
    assert_expected_inline(
        difference(before, after(before, hoist_row_selection)),
        """\
@ nodes
-  %1: f32[1, s0, 24] = aten.linear(%0, up.weight f32[24, 8], up.bias f32[24])
-  %2: f32[1, s0, 24] = aten.silu(%1)
-  %3: f32[1, s0, 8] = aten.linear(%2, down.weight f32[8, 24])
-  %4: f32[1, s0, 8] = aten.add(x, %3)
-  %5: f32[s0, 8] = aten.select(%4, 0, 0)
-  %6: f32[s1, 8] = aten.index_select(%5, 0, rows)
-return (%6)
+  %a0: f32[1, s1, 8] = aten.index_select(%0, 1, rows)
+  %a1: f32[1, s1, 24] = aten.linear(%a0, up.weight f32[24, 8], up.bias f32[24])
+  %a2: f32[1, s1, 24] = aten.silu(%a1)
+  %a3: f32[1, s1, 8] = aten.linear(%a2, down.weight f32[8, 24])
+  %a4: f32[1, s1, 8] = aten.index_select(x, 1, rows)
+  %a5: f32[1, s1, 8] = aten.add(%a4, %a3)
+  %a6: f32[s1, 8] = aten.select(%a5, 0, 0)
+return (%a6)""",
    )
