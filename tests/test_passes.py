# ruff: noqa: E501
"""Each pass on models of a few lines: the difference it makes (accept new ones with EXPECTTEST_ACCEPT=1), and what it refuses, and why.

In the golden texts ``-`` stands in the normal form of the graph before only, ``+`` in that of the graph after (`specfx.passes.printer`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from micro import HEADS, SCALE, WIDTH, OneAttention, causal, one_attention, trace
from torch import Tensor, fx, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from specfx.errors import Reason
from specfx.kernels.attention import attention
from specfx.kernels.keyed_sample import Draw, draw_tables, keyed_sample_reference
from specfx.kernels.packed_linear import unpack
from specfx.passes.canonicalize_attention import canonicalize_attention
from specfx.passes.epilogue import epilogue
from specfx.passes.framework import Pass, PassContext, calls, run_passes
from specfx.passes.materialize_shared import materialize_shared
from specfx.passes.pack_linears import pack_linears, repack
from specfx.passes.paged_kv import paged_kv
from specfx.passes.printer import difference, normal_form
from specfx.passes.tree_mask import tree_mask

CONTEXT = PassContext(page_size=16)
PACKING = PassContext(page_size=16, pack=True)


def after(module: fx.GraphModule, *passes: Pass, context: PassContext = CONTEXT) -> fx.GraphModule:
    result = run_passes(module, [dataclasses.replace(p, requires=()) for p in passes], context)
    assert [str(r.refusal) for r in result.records if r.refusal is not None] == []
    return result.module


def snapshot(module: fx.GraphModule) -> list[tuple[object, ...]]:
    return [(n, n.op, n.name, n.target, n.args, n.kwargs, dict(n.meta)) for n in module.graph.nodes]


def refused(p: Pass, module: fx.GraphModule, context: PassContext = CONTEXT, reason: Reason = Reason.PASS_FAILED) -> str:
    """Why `p` refuses `module`, of which it must leave each node as it was."""
    nodes, code, weights = snapshot(module), module.code, dict(module.state_dict(keep_vars=True))
    result = run_passes(module, [dataclasses.replace(p, requires=())], context)
    (record,) = result.records
    assert result.module is module
    assert snapshot(module) == nodes
    assert module.code == code
    assert module.state_dict(keep_vars=True).keys() == weights.keys()
    assert not record.applied
    assert record.difference == {}
    assert record.nodes_before == record.nodes_after == len(nodes)
    assert record.refusal is not None
    assert record.refusal.reason is reason
    assert p.name in record.refusal.stage
    return record.refusal.detail.removeprefix("PassError: ")


def marked(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    return attention(q, k, v, SCALE).transpose(1, 2)


# --- canonicalize_attention


def test_causal_sdpa_becomes_the_marker() -> None:
    graph = one_attention(lambda q, k, v, ids, positions: scaled_dot_product_attention(q, k, v, is_causal=True))
    assert_expected_inline(
        difference(graph, after(graph, canonicalize_attention)),
        """\
@ nodes
-  %12: f32[1, 2, s0, 4] = aten.scaled_dot_product_attention(%7, %9, %11, None, 0, True)
-  %13: f32[1, s0, 2, 4] = aten.transpose(%12, 1, 2)
+  %a0: f32[1, s0, 2, 4] = specfx.attention(%7, %9, %11, 0.5)
+  %a1: f32[1, 2, s0, 4] = aten.transpose(%a0, 1, 2)
+  %13: f32[1, s0, 2, 4] = aten.transpose(%a1, 1, 2)""",
    )


def test_sdpa_with_grouped_queries_keeps_its_scale_and_its_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        k, v = k[:, :1], v[:, :1]
        return scaled_dot_product_attention(q, k, v, attn_mask=causal(position_ids), scale=0.125, enable_gqa=True)

    graph = one_attention(attend)
    assert_expected_inline(
        difference(graph, after(graph, canonicalize_attention)),
        """\
@ nodes
-  %14: i64[1, 1, s0] = aten.unsqueeze(position_ids, 1)
-  %15: i64[1, 1, 1, s0] = aten.unsqueeze(%14, 2)
-  %16: i64[1, 1, s0] = aten.unsqueeze(position_ids, 1)
-  %17: i64[1, 1, s0, 1] = aten.unsqueeze(%16, 3)
-  %18: bool[1, 1, s0, s0] = aten.le(%15, %17)
-  %19: f32[1, 2, s0, 4] = aten.scaled_dot_product_attention(%7, %12, %13, %18, scale=0.125, enable_gqa=True)
-  %20: f32[1, s0, 2, 4] = aten.transpose(%19, 1, 2)
+  %a0: f32[1, s0, 2, 4] = specfx.attention(%7, %12, %13, 0.125)
+  %a1: f32[1, 2, s0, 4] = aten.transpose(%a0, 1, 2)
+  %20: f32[1, s0, 2, 4] = aten.transpose(%a1, 1, 2)""",
    )


def additive(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    mask = torch.where(causal(position_ids), 0.0, torch.finfo(torch.float32).min)
    return torch.softmax(q @ k.transpose(-1, -2) * SCALE + mask, -1, dtype=torch.float32).to(q.dtype) @ v


def test_written_out_attention_with_an_additive_mask_becomes_the_marker() -> None:
    graph = one_attention(additive)
    assert_expected_inline(
        difference(graph, after(graph, canonicalize_attention)),
        """\
@ nodes
-  %12: i64[1, 1, s0] = aten.unsqueeze(position_ids, 1)
-  %13: i64[1, 1, 1, s0] = aten.unsqueeze(%12, 2)
-  %14: i64[1, 1, s0] = aten.unsqueeze(position_ids, 1)
-  %15: i64[1, 1, s0, 1] = aten.unsqueeze(%14, 3)
-  %16: bool[1, 1, s0, s0] = aten.le(%13, %15)
-  %17: f32[1, 1, s0, s0] = aten.where(%16, 0, -3.40282e+38)
@ nodes
-  %19: f32[1, 2, s0, s0] = aten.matmul(%7, %18)
-  %20: f32[1, 2, s0, s0] = aten.mul(%19, 0.5)
-  %21: f32[1, 2, s0, s0] = aten.add(%20, %17)
-  %22: f32[1, 2, s0, s0] = aten.softmax(%21, -1, f32)
-  %23: f32[1, 2, s0, s0] = aten.to(%22, f32)
-  %24: f32[1, 2, s0, 4] = aten.matmul(%23, %11)
-  %25: f32[1, s0, 2, 4] = aten.transpose(%24, 1, 2)
+  %a0: f32[1, 2, s0, 4] = aten.transpose(%18, -1, -2)
+  %a1: f32[1, s0, 2, 4] = specfx.attention(%7, %a0, %11, 0.5)
+  %a2: f32[1, 2, s0, 4] = aten.transpose(%a1, 1, 2)
+  %25: f32[1, s0, 2, 4] = aten.transpose(%a2, 1, 2)""",
    )


def filled(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).masked_fill(~causal(position_ids), float("-inf"))
    return dropout(torch.softmax(scores / 4.0, -1), 0.1, training=False) @ v


def test_written_out_attention_with_masked_fill_becomes_the_marker() -> None:
    graph = one_attention(filled)
    assert_expected_inline(
        difference(graph, after(graph, canonicalize_attention)),
        """\
@ nodes
-  %13: f32[1, 2, s0, s0] = aten.matmul(%7, %12)
-  %14: i64[1, 1, s0] = aten.unsqueeze(position_ids, 1)
-  %15: i64[1, 1, 1, s0] = aten.unsqueeze(%14, 2)
-  %16: i64[1, 1, s0] = aten.unsqueeze(position_ids, 1)
-  %17: i64[1, 1, s0, 1] = aten.unsqueeze(%16, 3)
-  %18: bool[1, 1, s0, s0] = aten.le(%15, %17)
-  %19: bool[1, 1, s0, s0] = aten.bitwise_not(%18)
-  %20: f32[1, 2, s0, s0] = aten.masked_fill(%13, %19, -inf)
-  %21: f32[1, 2, s0, s0] = aten.div(%20, 4)
-  %22: f32[1, 2, s0, s0] = aten.softmax(%21, -1)
-  %23: f32[1, 2, s0, s0] = aten.dropout(%22, 0.1, False)
-  %24: f32[1, 2, s0, 4] = aten.matmul(%23, %11)
-  %25: f32[1, s0, 2, 4] = aten.transpose(%24, 1, 2)
+  %a0: f32[1, 2, s0, 4] = aten.transpose(%12, -1, -2)
+  %a1: f32[1, s0, 2, 4] = specfx.attention(%7, %a0, %11, 0.25)
+  %a2: f32[1, 2, s0, 4] = aten.transpose(%a1, 1, 2)
+  %25: f32[1, s0, 2, 4] = aten.transpose(%a2, 1, 2)""",
    )


def chosen(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    rows = input_ids.shape[1]
    visible = torch.ones(rows, rows, dtype=torch.bool).tril()
    return torch.softmax(torch.where(visible, q @ k.transpose(-1, -2) * SCALE, -1e9), -1) @ v


def test_written_out_attention_with_where_becomes_the_marker() -> None:
    graph = one_attention(chosen)
    assert_expected_inline(
        difference(graph, after(graph, canonicalize_attention)),
        """\
@ nodes
-  %12: bool[s0, s0] = aten.ones([s0, s0], dtype=bool, device=device, pin_memory=False)
-  %13: bool[s0, s0] = aten.tril(%12)
@ nodes
-  %15: f32[1, 2, s0, s0] = aten.matmul(%7, %14)
-  %16: f32[1, 2, s0, s0] = aten.mul(%15, 0.5)
-  %17: f32[1, 2, s0, s0] = aten.where(%13, %16, -1e+09)
-  %18: f32[1, 2, s0, s0] = aten.softmax(%17, -1)
-  %19: f32[1, 2, s0, 4] = aten.matmul(%18, %11)
-  %20: f32[1, s0, 2, 4] = aten.transpose(%19, 1, 2)
+  %a0: f32[1, 2, s0, 4] = aten.transpose(%14, -1, -2)
+  %a1: f32[1, s0, 2, 4] = specfx.attention(%7, %a0, %11, 0.5)
+  %a2: f32[1, 2, s0, 4] = aten.transpose(%a1, 1, 2)
+  %20: f32[1, s0, 2, 4] = aten.transpose(%a2, 1, 2)""",
    )


@pytest.mark.parametrize("attend", [additive, filled, chosen])
def test_the_marker_computes_what_was_written_out(attend: Callable[..., Tensor]) -> None:
    graph = one_attention(attend)
    rewritten = after(graph, canonicalize_attention)
    for rows in (1, 3, 12):
        inputs = torch.arange(rows)[None] % 5, torch.arange(rows)[None]
        torch.testing.assert_close(rewritten(*inputs), graph(*inputs))


def test_markers_are_left_alone() -> None:
    graph = one_attention(marked)
    assert difference(graph, after(graph, canonicalize_attention)) == ""


def written_out(mask: Callable[[Tensor, Tensor], Tensor], fill: float = float("-inf")) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        bias = mask(input_ids, position_ids)
        scores = q @ k.transpose(-1, -2) * SCALE
        scores = torch.where(bias, scores, fill) if bias.dtype == torch.bool else scores + bias
        return torch.softmax(scores, -1) @ v

    return attend


def distance(position_ids: Tensor) -> Tensor:
    return position_ids[:, None, :, None] - position_ids[:, None, None, :]


def alibi(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    return torch.where(causal(position_ids), -slopes * distance(position_ids), float("-inf"))


REFUSED_ATTENTION: dict[str, tuple[Callable[..., Tensor], str]] = {
    "no mask": (lambda q, k, v, i, p: scaled_dot_product_attention(q, k, v), "attention without a mask is bidirectional"),
    "written out without a mask": (
        lambda q, k, v, i, p: torch.softmax(q @ k.transpose(-1, -2), -1) @ v,
        "attention without a mask is bidirectional",
    ),
    "all visible": (
        written_out(lambda i, p: distance(p) > -(1 << 30)),
        "an attention mask is not the causal one (checked at length 5)",
    ),
    "ALiBi": (written_out(alibi), "an attention mask carries a bias (ALiBi or learned positions)"),
    "a short window": (
        written_out(lambda i, p: causal(p) & (distance(p) < 4)),
        "an attention mask is not the causal one (checked at length 5)",
    ),
    "a long window": (
        written_out(lambda i, p: causal(p) & (distance(p) < 1024)),
        "an attention mask is not the causal one (checked at length 1100)",
    ),
    "strictly causal": (
        written_out(lambda i, p: distance(p) > 0),
        "an attention mask is not the causal one (checked at length 1)",
    ),
    "mask from the tokens": (
        written_out(lambda i, p: causal(p) & (i != 3)[:, None, None, :]),
        "an attention mask depends on the values of input_ids",
    ),
    "fill that hides nothing": (
        written_out(lambda i, p: causal(p), fill=0.0),
        "attention with aten.where.ScalarOther between its two matmuls is not known",
    ),
    "softcap written out": (
        lambda q, k, v, i, p: torch.softmax(torch.tanh(q @ k.transpose(-1, -2)).masked_fill(~causal(p), -1e9), -1) @ v,
        "attention with aten.tanh.default between its two matmuls is not known",
    ),
    "softmax over the queries": (
        lambda q, k, v, i, p: torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~causal(p), -1e9), -2) @ v,
        "attention whose softmax is not over its last dimension is not known",
    ),
    "heads in the batch": (
        lambda q, k, v, i, p: (torch.softmax((q[0] @ k[0].transpose(-1, -2)).masked_fill(~causal(p)[0], -1e9), -1) @ v[0])[None],
        "attention over 3 dimensions is not known",
    ),
    "dropout in SDPA": (
        lambda q, k, v, i, p: scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1),
        "attention drops out: the model is in training mode",
    ),
    "dropout written out": (
        lambda q, k, v, i, p: dropout(torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~causal(p), -1e9), -1), 0.1) @ v,
        "attention drops out: the model is in training mode",
    ),
    "no attention": (lambda q, k, v, i, p: q + k + v, "0 matches, at least 1 expected"),
}


@pytest.mark.parametrize("name", REFUSED_ATTENTION)
def test_attention_that_is_not_plainly_causal_is_refused(name: str) -> None:
    attend, reason = REFUSED_ATTENTION[name]
    assert refused(canonicalize_attention, one_attention(attend)) == reason


# --- paged_kv


def test_the_marker_becomes_the_stateful_op_over_a_pool_of_its_own() -> None:
    graph = one_attention(marked)
    assert_expected_inline(
        difference(graph, after(graph, paged_kv)),
        """\
@ inputs
+  page_table: i32[s1, s2]
+  lengths: i32[s1]
+  row_starts: i32[s1 + 1]
+  moves: i64[2, s3]
+  k_pages_0: f32[s4, 16, 2, 4]
+  v_pages_0: f32[s4, 16, 2, 4]
@ nodes
-  %12: f32[1, s0, 2, 4] = specfx.attention(%7, %9, %11, 0.5)
-  %13: f32[1, 2, s0, 4] = aten.transpose(%12, 1, 2)
+  %a0: f32[1, s0, 2, 4] = aten.transpose(%7, 1, 2)
+  %a1: f32[s0, 2, 4] = aten.select(%a0, 0, 0)
+  %a2: f32[1, s0, 2, 4] = aten.transpose(%9, 1, 2)
+  %a3: f32[s0, 2, 4] = aten.select(%a2, 0, 0)
+  %a4: f32[1, s0, 2, 4] = aten.transpose(%11, 1, 2)
+  %a5: f32[s0, 2, 4] = aten.select(%a4, 0, 0)
+  %a6: f32[s0, 2, 4] = specfx.tree_attention_(%a1, %a3, %a5, None, page_table, lengths, row_starts, moves, k_pages_0, v_pages_0, 0.5)
+  %a7: f32[1, s0, 2, 4] = aten.unsqueeze(%a6, 0)
+  %13: f32[1, 2, s0, 4] = aten.transpose(%a7, 1, 2)""",
    )


def test_window_softcap_and_sinks_are_carried_over() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        out = attention(q, k, v, 0.25, 8, 5.0, torch.tensor([0.5, 1.0]))
        return attention(q, out.transpose(1, 2), v, 0.25, 4).transpose(1, 2)

    rewritten = after(one_attention(attend), paged_kv)
    assert_expected_inline(
        "\n".join(line for line in normal_form(rewritten).splitlines() if "pages" in line),
        """\
  k_pages_0..1: f32[s4, 16, 2, 4]
  v_pages_0..1: f32[s4, 16, 2, 4]
  %20: f32[s0, 2, 4] = specfx.tree_attention_(%15, %17, %19, None, page_table, lengths, row_starts, moves, k_pages_0, v_pages_0, 0.25, 8, 5, %13)
  %29: f32[s0, 2, 4] = specfx.tree_attention_(%24, %26, %28, None, page_table, lengths, row_starts, moves, k_pages_1, v_pages_1, 0.25, 4)""",
    )


class Batch(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.attend, self.rows = OneAttention(marked), rows

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(input_ids[:1], position_ids[:1])


def test_a_graph_over_a_batch_is_refused() -> None:
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    example = torch.arange(14).view(2, 7) % 16
    program = torch.export.export(Batch(2), (example, example.clone()), dynamic_shapes=({1: rows}, {1: rows}), strict=False)
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    assert refused(paged_kv, graph) == "the graph's input_ids must be [1, T]: batches are flat"


def renamed(module: fx.GraphModule, old: str, new: str) -> fx.GraphModule:
    for node in module.graph.find_nodes(op="placeholder"):
        node.target = new if node.target == old else node.target
    module.recompile()
    return module


def test_a_graph_without_input_ids_is_refused() -> None:
    graph = renamed(one_attention(marked), "input_ids", "inputs_embeds")
    assert refused(paged_kv, graph) == "the graph's input_ids must be [1, T]: batches are flat"


def test_a_graph_without_markers_gets_no_pools() -> None:
    assert refused(paged_kv, one_attention(lambda q, k, v, i, p: q + v)) == "0 matches, at least 1 expected"


# --- tree_mask


def placed(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    turn = torch.cos(position_ids.to(q.dtype))[:, None, :, None]
    return marked(q * turn, k * turn, v, input_ids, position_ids)


def test_order_and_positions_come_from_the_tree() -> None:
    graph = after(one_attention(placed), paged_kv)
    assert_expected_inline(
        difference(graph, after(graph, tree_mask)),
        """\
@ inputs
-  position_ids: i64[1, s0]
@ inputs
+  tree_mask: i64[s0]
@ nodes
+  %a0: i64[1, s0] = specfx.tree_positions(tree_mask, lengths, row_starts, input_ids)
@ nodes
-  %12: f32[1, s0] = aten.to(position_ids, f32)
+  %12: f32[1, s0] = aten.to(%a0, f32)
@ nodes
-  %24: f32[s0, 2, 4] = specfx.tree_attention_(%19, %21, %23, None, page_table, lengths, row_starts, moves, k_pages_0, v_pages_0, 0.5)
+  %24: f32[s0, 2, 4] = specfx.tree_attention_(%19, %21, %23, tree_mask, page_table, lengths, row_starts, moves, k_pages_0, v_pages_0, 0.5)""",
    )


def test_without_a_kv_there_is_no_tree() -> None:
    assert refused(tree_mask, one_attention(placed)) == "the graph has no input_ids, position_ids, lengths or row_starts"


def test_without_positions_as_an_input_there_is_no_tree() -> None:
    graph = renamed(after(one_attention(placed), paged_kv), "position_ids", "cache_position")
    assert refused(tree_mask, graph) == "the graph has no input_ids, position_ids, lengths or row_starts"


# --- epilogue


class Head(nn.Module):
    """`head(linear, hidden, input_ids) -> logits` behind an embedding."""

    def __init__(self, head: Callable[[nn.Linear, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16)
        self.requires_grad_(False)
        self.head = head

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(input_ids)
        return self.head(self.linear, hidden, input_ids), hidden


def test_logits_are_computed_for_the_rows_that_are_read() -> None:
    graph = trace(Head(lambda linear, hidden, ids: 30 * torch.tanh(linear(hidden) / 30)))
    assert_expected_inline(
        difference(graph, after(graph, epilogue)),
        """\
@ inputs
+  logit_rows: i64[s1]
+  keys: i64[s1, 3]
+  warp: f64[s1, 4]
@ nodes
-  %1: f32[1, s0, 16] = aten.linear(%0, linear.weight f32[16, 8], linear.bias f32[16])
-  %2: f32[1, s0, 16] = aten.div(%1, 30)
-  %3: f32[1, s0, 16] = aten.tanh(%2)
-  %4: f32[1, s0, 16] = aten.mul(%3, 30)
-return (%4, %0)
+  %a0: f32[1, s1, 8] = aten.index_select(%0, 1, logit_rows)
+  %1: f32[1, s1, 16] = aten.linear(%a0, linear.weight f32[16, 8], linear.bias f32[16])
+  %2: f32[1, s1, 16] = aten.div(%1, 30)
+  %3: f32[1, s1, 16] = aten.tanh(%2)
+  %4: f32[1, s1, 16] = aten.mul(%3, 30)
+  %a1: f32[s1, 16] = aten.select(%4, 0, 0)
+  %a2: i64[s1] = specfx.keyed_sample(%a1, keys, warp)
+return (%4, %0, %a2)""",
    )


def test_the_selected_rows_are_those_of_the_whole() -> None:
    graph = trace(Head(lambda linear, hidden, ids: 30 * torch.tanh(linear(hidden) / 30)))
    ids, rows = torch.arange(9)[None], torch.tensor([8, 2])
    logits, hidden = graph(ids, ids)
    keys, warp = draw_tables([None, Draw(1, 2, temperature=1.5, top_k=9)], [0, 4])
    some, all_hidden, choice = after(graph, epilogue)(ids, ids, rows, keys, warp)
    torch.testing.assert_close(some, logits[:, rows])
    torch.testing.assert_close(all_hidden, hidden)
    assert torch.equal(choice, keyed_sample_reference(logits[0, rows], keys, warp))
    assert choice[0] == logits[0, 8].argmax()


REFUSED_HEADS: dict[str, tuple[Callable[[nn.Linear, Tensor, Tensor], Tensor], str]] = {
    "a size between hidden and logits": (
        lambda linear, hidden, ids: linear(hidden.reshape(ids.shape[1], WIDTH))[None],
        "aten.reshape.default between the hidden states and the logits depends on the number of rows",
    ),
    "logits from elsewhere": (
        lambda linear, hidden, ids: linear(torch.ones(1, ids.shape[1], WIDTH)),
        "the logits are not computed from the hidden states",
    ),
}


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_a_head_that_knows_more_than_its_row_is_refused(name: str) -> None:
    head, reason = REFUSED_HEADS[name]
    assert refused(epilogue, trace(Head(head))) == reason


def test_a_head_that_adds_something_for_each_row_is_refused() -> None:
    graph = trace(Head(lambda linear, hidden, ids: linear(hidden) + ids[:, :, None]))
    assert "RuntimeError" in refused(epilogue, graph)


def test_a_graph_without_hidden_states_is_refused() -> None:
    graph = trace(Head(lambda linear, hidden, ids: linear(hidden)))
    output = graph.graph.output_node()
    output.args = (output.args[0][:1],)  # type: ignore[index]
    graph.recompile()
    assert refused(epilogue, graph) == "expected a graph from input_ids to (logits, hidden)"


# --- materialize_shared


class Rotary(nn.Module):
    """`readers` layers that turn by the same cosine, and one sine that is read once."""

    def __init__(self, readers: int) -> None:
        super().__init__()
        self.embed, self.readers = nn.Embedding(16, WIDTH), readers
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        angle = position_ids.to(torch.float32)[..., None]
        x, turn = self.embed(input_ids) + angle.sin(), angle.cos() * 0.5
        for _ in range(self.readers):
            x = x * turn
        return x


def test_a_value_that_many_read_is_materialised() -> None:
    graph = trace(Rotary(4))
    assert_expected_inline(
        difference(graph, after(graph, materialize_shared)),
        """\
@ nodes
-  %7: f32[1, s0, 8] = aten.mul(%4, %6)
-  %8: f32[1, s0, 8] = aten.mul(%7, %6)
-  %9: f32[1, s0, 8] = aten.mul(%8, %6)
-  %10: f32[1, s0, 8] = aten.mul(%9, %6)
+  %a0: f32[1, s0, 1] = specfx.materialize(%6)
+  %7: f32[1, s0, 8] = aten.mul(%4, %a0)
+  %8: f32[1, s0, 8] = aten.mul(%7, %a0)
+  %9: f32[1, s0, 8] = aten.mul(%8, %a0)
+  %10: f32[1, s0, 8] = aten.mul(%9, %a0)""",
    )


def test_a_value_that_few_read_is_inlined_as_before() -> None:
    assert refused(materialize_shared, trace(Rotary(3)), reason=Reason.NOTHING_TO_DO) == "0 matches, at least 1 expected"


# --- pack_linears


class Linears(nn.Module):
    """Three linears on one input, of which one has a bias, two with a bias behind them, and one that is too narrow to be packed."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.q, self.k, self.b = nn.Embedding(16, 32), nn.Linear(32, 32, False), nn.Linear(32, 8, False), nn.Linear(32, 32)
            self.gate, self.up, self.narrow, self.head = nn.Linear(32, 40), nn.Linear(32, 24), nn.Linear(24, 16), nn.Linear(32, 16, False)
        self.to(dtype).requires_grad_(False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        y = self.q(x) * self.k(x).sum(-1, keepdim=True) + self.b(x)
        hidden = y + self.narrow(self.gate(y)[..., :24] * self.up(y)).repeat(1, 1, 2)
        return self.head(hidden), hidden


def test_linears_that_share_an_input_are_packed_behind_each_other() -> None:
    graph = trace(Linears())
    assert_expected_inline(
        difference(graph, after(graph, pack_linears, context=PACKING)),
        """\
@ nodes
-  %1: bf16[1, s0, 32] = aten.linear(%0, q.weight bf16[32, 32])
-  %2: bf16[1, s0, 8] = aten.linear(%0, k.weight bf16[8, 32])
-  %3: bf16[1, s0, 1] = aten.sum(%2, [-1], True)
-  %4: bf16[1, s0, 32] = aten.mul(%1, %3)
-  %5: bf16[1, s0, 32] = aten.linear(%0, b.weight bf16[32, 32], b.bias bf16[32])
-  %6: bf16[1, s0, 32] = aten.add(%4, %5)
-  %7: bf16[1, s0, 40] = aten.linear(%6, gate.weight bf16[40, 32], gate.bias bf16[40])
-  %8: bf16[1, s0, 24] = aten.slice(%7, 2, 0, 24)
-  %9: bf16[1, s0, 24] = aten.linear(%6, up.weight bf16[24, 32], up.bias bf16[24])
-  %10: bf16[1, s0, 24] = aten.mul(%8, %9)
+  %a0: bf16[1, s0, 40] = specfx.packed_linear(%0, packed_0 bf16[2, 1, 16, 32, 2], None, 40)
+  %a1: bf16[1, s0, 32] = aten.slice(%a0, -1, 0, 32)
+  %a2: bf16[1, s0, 8] = aten.slice(%a0, -1, 32, 40)
+  %3: bf16[1, s0, 1] = aten.sum(%a2, [-1], True)
+  %4: bf16[1, s0, 32] = aten.mul(%a1, %3)
+  %a3: bf16[1, s0, 32] = specfx.packed_linear(%0, packed_1 bf16[1, 1, 16, 32, 2], b.bias bf16[32], 32)
+  %6: bf16[1, s0, 32] = aten.add(%4, %a3)
+  %a4: bf16[64] = aten.cat([gate.bias bf16[40], up.bias bf16[24]])
+  %a5: bf16[1, s0, 64] = specfx.packed_linear(%6, packed_2 bf16[2, 1, 16, 32, 2], %a4, 64)
+  %a6: bf16[1, s0, 40] = aten.slice(%a5, -1, 0, 40)
+  %a7: bf16[1, s0, 24] = aten.slice(%a5, -1, 40, 64)
+  %8: bf16[1, s0, 24] = aten.slice(%a6, 2, 0, 24)
+  %10: bf16[1, s0, 24] = aten.mul(%8, %a7)
@ nodes
-  %14: bf16[1, s0, 16] = aten.linear(%13, head.weight bf16[16, 32])
-return (%14, %13)
+  %a8: bf16[1, s0, 16] = specfx.packed_linear(%13, packed_3 bf16[1, 1, 16, 32, 2], None, 16)
+return (%a8, %13)""",
    )


def test_packed_linears_compute_the_same_and_follow_their_weights() -> None:
    model = Linears()
    graph = trace(model)
    packed = after(graph, pack_linears, context=PACKING)
    inputs = torch.arange(9)[None], torch.arange(9)[None]
    torch.testing.assert_close(packed(*inputs), graph(*inputs))
    with torch.no_grad():
        model.k.weight.mul_(2)
    repack(packed)
    torch.testing.assert_close(packed(*inputs), graph(*inputs))
    assert torch.equal(unpack(packed.packed_0, 40)[32:], model.k.weight)


def test_graphs_over_the_same_weights_share_the_packed_ones() -> None:
    model = Linears()
    graph = trace(model)
    first, second = (after(graph, pack_linears, context=PACKING) for _ in range(2))
    assert first.packed_0 is second.packed_0
    assert first.packed_1 is not trace_and_pack().packed_1  # another model's
    with torch.no_grad():
        model.k.weight.mul_(2)
    third = after(graph, pack_linears, context=PACKING)  # packs what is there now, for all
    assert third.packed_0 is first.packed_0
    assert torch.equal(unpack(first.packed_0, 40)[32:], model.k.weight)


def trace_and_pack() -> fx.GraphModule:
    return after(trace(Linears()), pack_linears, context=PACKING)


def test_without_the_kernel_nothing_is_packed() -> None:
    reason = "no kernel for packed linears here (needs a CPU with AMX or AVX-512 BF16 and a C++ compiler)"
    assert refused(pack_linears, trace(Linears()), CONTEXT) == reason


def test_float32_weights_are_not_packed() -> None:
    assert refused(pack_linears, trace(Linears(torch.float32)), PACKING).startswith("no linear has a bfloat16 weight")


def test_packing_is_optional() -> None:
    result = run_passes(trace(Linears()), (pack_linears,), CONTEXT)
    assert result.failed is None
    assert not result.applied("pack_linears")


def test_all_passes_in_a_row_leave_one_attention_for_each() -> None:
    rewritten = after(one_attention(filled), canonicalize_attention, paged_kv, tree_mask, epilogue)
    (node,) = calls(rewritten, torch.ops.specfx.tree_attention_.default)
    assert node.args[10] == 0.25
    assert node.meta["val"].shape[1:] == (HEADS, WIDTH // HEADS)
