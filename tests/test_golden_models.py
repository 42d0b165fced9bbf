# ruff: noqa: E501
"""What the rewrite does to tiny models of five families, layer by layer, and that the normal form in which it is told is one.

Accept new texts with EXPECTTEST_ACCEPT=1.
"""

from __future__ import annotations

import functools
import re

import torch
from expecttest import assert_expected_inline
from micro import trace
from tiny import tiny_model
from torch import Tensor, fx, nn

from specfx.capture import capture
from specfx.kernels.attention import attention
from specfx.kernels.tree_attention import tree_attention_
from specfx.passes.framework import PassContext, calls, copy_module, run_passes
from specfx.passes.pack_linears import pack_linears
from specfx.passes.pipeline import REWRITE
from specfx.passes.printer import difference, normal_form


@functools.cache
def captured(name: str) -> fx.GraphModule:
    return capture(tiny_model(name, num_hidden_layers=3) if name == "llama" else tiny_model(name))


@functools.cache
def rewritten(name: str) -> fx.GraphModule:
    result = run_passes(captured(name), REWRITE, PassContext())
    assert result.failed is None
    return result.module


def test_normal_form_of_llama() -> None:
    assert_expected_inline(
        normal_form(rewritten("llama")),
        """\
inputs:
  input_ids: i64[1, s0]
  page_table: i32[s1, s2]
  lengths: i32[s1]
  row_starts: i32[s1 + 1]
  moves: i64[2, s3]
  k_pages_0..2: f32[s4, 64, 2, 8]
  v_pages_0..2: f32[s4, 64, 2, 8]
  tree_mask: i64[s0]
  logit_rows: i64[s5]
  keys: i64[s5, 3]
  warp: f64[s5, 4]
nodes:
  %0: f32[1, s0, 32] = aten.embedding(model.model.embed_tokens.weight f32[128, 32], input_ids)
  %1: i64[1, s0] = specfx.tree_positions(tree_mask, lengths, row_starts, input_ids)
  %2: i64[1, s0, 1] = aten.unsqueeze(%1, 2)
  %3: f32[1, s0, 1] = aten.to(%2, f32)
  %4: f32[4] = aten.to(model.model.rotary_emb.inv_freq f32[4], device, f32)
  %5: f32[1, s0, 4] = aten.mul(%3, %4)
  %6: f32[1, s0, 8] = aten.cat([%5, %5], -1)
  %7: f32[1, s0, 8] = aten.cos(%6)
  %8: f32[1, s0, 8] = aten.mul(%7, 1)
  %9: f32[1, s0, 8] = aten.to(%8, f32)
  %10: f32[1, s0, 8] = aten.sin(%6)
  %11: f32[1, s0, 8] = aten.mul(%10, 1)
  %12: f32[1, s0, 8] = aten.to(%11, f32)
layers 0..2 (3 alike), in0 = %0, then the layer before's %57, in1 = %9, in2 = %12, k_pages_a = k_pages_0..2, v_pages_a = v_pages_0..2:
  %0: f32[1, s0, 32] = aten.to(in0, f32)
  %1: f32[1, s0, 32] = aten.pow(%0, 2)
  %2: f32[1, s0, 1] = aten.mean(%1, [-1], True)
  %3: f32[1, s0, 1] = aten.add(%2, 1e-06)
  %4: f32[1, s0, 1] = aten.rsqrt(%3)
  %5: f32[1, s0, 32] = aten.mul(%0, %4)
  %6: f32[1, s0, 32] = aten.to(%5, f32)
  %7: f32[1, s0, 32] = aten.mul(*.input_layernorm.weight f32[32], %6)
  %8: f32[1, s0, 32] = aten.linear(%7, *.self_attn.q_proj.weight f32[32, 32])
  %9: f32[1, s0, 4, 8] = aten.view(%8, [1, s0, -1, 8])
  %10: f32[1, 4, s0, 8] = aten.transpose(%9, 1, 2)
  %11: f32[1, s0, 16] = aten.linear(%7, *.self_attn.k_proj.weight f32[16, 32])
  %12: f32[1, s0, 2, 8] = aten.view(%11, [1, s0, -1, 8])
  %13: f32[1, 2, s0, 8] = aten.transpose(%12, 1, 2)
  %14: f32[1, s0, 16] = aten.linear(%7, *.self_attn.v_proj.weight f32[16, 32])
  %15: f32[1, s0, 2, 8] = aten.view(%14, [1, s0, -1, 8])
  %16: f32[1, 2, s0, 8] = aten.transpose(%15, 1, 2)
  %17: f32[1, 1, s0, 8] = aten.unsqueeze(in1, 1)
  %18: f32[1, 1, s0, 8] = aten.unsqueeze(in2, 1)
  %19: f32[1, 4, s0, 8] = aten.mul(%10, %17)
  %20: f32[1, 4, s0, 4] = aten.slice(%10, 3, 0, 4)
  %21: f32[1, 4, s0, 4] = aten.slice(%10, 3, 4, end)
  %22: f32[1, 4, s0, 4] = aten.neg(%21)
  %23: f32[1, 4, s0, 8] = aten.cat([%22, %20], -1)
  %24: f32[1, 4, s0, 8] = aten.mul(%23, %18)
  %25: f32[1, 4, s0, 8] = aten.add(%19, %24)
  %26: f32[1, 2, s0, 8] = aten.mul(%13, %17)
  %27: f32[1, 2, s0, 4] = aten.slice(%13, 3, 0, 4)
  %28: f32[1, 2, s0, 4] = aten.slice(%13, 3, 4, end)
  %29: f32[1, 2, s0, 4] = aten.neg(%28)
  %30: f32[1, 2, s0, 8] = aten.cat([%29, %27], -1)
  %31: f32[1, 2, s0, 8] = aten.mul(%30, %18)
  %32: f32[1, 2, s0, 8] = aten.add(%26, %31)
  %33: f32[1, s0, 4, 8] = aten.transpose(%25, 1, 2)
  %34: f32[s0, 4, 8] = aten.select(%33, 0, 0)
  %35: f32[1, s0, 2, 8] = aten.transpose(%32, 1, 2)
  %36: f32[s0, 2, 8] = aten.select(%35, 0, 0)
  %37: f32[1, s0, 2, 8] = aten.transpose(%16, 1, 2)
  %38: f32[s0, 2, 8] = aten.select(%37, 0, 0)
  %39: f32[s0, 4, 8] = specfx.tree_attention_(%34, %36, %38, tree_mask, page_table, lengths, row_starts, moves, k_pages_a, v_pages_a, 0.353553)
  %40: f32[1, s0, 4, 8] = aten.unsqueeze(%39, 0)
  %41: f32[1, s0, 32] = aten.reshape(%40, [1, s0, -1])
  %42: f32[1, s0, 32] = aten.linear(%41, *.self_attn.o_proj.weight f32[32, 32])
  %43: f32[1, s0, 32] = aten.add(%0, %42)
  %44: f32[1, s0, 32] = aten.to(%43, f32)
  %45: f32[1, s0, 32] = aten.pow(%44, 2)
  %46: f32[1, s0, 1] = aten.mean(%45, [-1], True)
  %47: f32[1, s0, 1] = aten.add(%46, 1e-06)
  %48: f32[1, s0, 1] = aten.rsqrt(%47)
  %49: f32[1, s0, 32] = aten.mul(%44, %48)
  %50: f32[1, s0, 32] = aten.to(%49, f32)
  %51: f32[1, s0, 32] = aten.mul(*.post_attention_layernorm.weight f32[32], %50)
  %52: f32[1, s0, 64] = aten.linear(%51, *.mlp.gate_proj.weight f32[64, 32])
  %53: f32[1, s0, 64] = aten.silu(%52)
  %54: f32[1, s0, 64] = aten.linear(%51, *.mlp.up_proj.weight f32[64, 32])
  %55: f32[1, s0, 64] = aten.mul(%53, %54)
  %56: f32[1, s0, 32] = aten.linear(%55, *.mlp.down_proj.weight f32[32, 64])
  %57: f32[1, s0, 32] = aten.add(%44, %56)
nodes:
  %13: f32[1, s0, 32] = aten.to(layer2.%57, f32)
  %14: f32[1, s0, 32] = aten.pow(%13, 2)
  %15: f32[1, s0, 1] = aten.mean(%14, [-1], True)
  %16: f32[1, s0, 1] = aten.add(%15, 1e-06)
  %17: f32[1, s0, 1] = aten.rsqrt(%16)
  %18: f32[1, s0, 32] = aten.mul(%13, %17)
  %19: f32[1, s0, 32] = aten.to(%18, f32)
  %20: f32[1, s0, 32] = aten.mul(model.model.norm.weight f32[32], %19)
  %21: f32[1, s5, 32] = aten.index_select(%20, 1, logit_rows)
  %22: f32[1, s5, 32] = aten.alias(%21)
  %23: f32[1, s5, 128] = aten.linear(%22, model.lm_head.weight f32[128, 32])
  %24: f32[s5, 128] = aten.select(%23, 0, 0)
  %25: i64[s5] = specfx.keyed_sample(%24, keys, warp)
return (%23, %20, %25)""",
    )


def test_rewrite_of_llama() -> None:
    assert_expected_inline(
        difference(captured("llama"), rewritten("llama")),
        """\
@ inputs
-  position_ids: i64[1, s0]
+  page_table: i32[s1, s2]
+  lengths: i32[s1]
+  row_starts: i32[s1 + 1]
+  moves: i64[2, s3]
+  k_pages_0..2: f32[s4, 64, 2, 8]
+  v_pages_0..2: f32[s4, 64, 2, 8]
+  tree_mask: i64[s0]
+  logit_rows: i64[s5]
+  keys: i64[s5, 3]
+  warp: f64[s5, 4]
@ nodes
-  %1: i64[1, s0, 1] = aten.unsqueeze(position_ids, 2)
+  %a0: i64[1, s0] = specfx.tree_positions(tree_mask, lengths, row_starts, input_ids)
+  %1: i64[1, s0, 1] = aten.unsqueeze(%a0, 2)
@ nodes
-layers 0..2 (3 alike), in0 = %0, then the layer before's %50, in1 = %8, in2 = %11:
+layers 0..2 (3 alike), in0 = %0, then the layer before's %50, in1 = %8, in2 = %11, k_pages_a = k_pages_0..2, v_pages_a = v_pages_0..2:
@ layers 0..2 (3 alike)
-  %33: f32[1, s0, 4, 8] = specfx.attention(%25, %32, %16, 0.353553)
-  %34: f32[1, s0, 32] = aten.reshape(%33, [1, s0, -1])
+  %a0: f32[1, s0, 4, 8] = aten.transpose(%25, 1, 2)
+  %a1: f32[s0, 4, 8] = aten.select(%a0, 0, 0)
+  %a2: f32[1, s0, 2, 8] = aten.transpose(%32, 1, 2)
+  %a3: f32[s0, 2, 8] = aten.select(%a2, 0, 0)
+  %a4: f32[1, s0, 2, 8] = aten.transpose(%16, 1, 2)
+  %a5: f32[s0, 2, 8] = aten.select(%a4, 0, 0)
+  %a6: f32[s0, 4, 8] = specfx.tree_attention_(%a1, %a3, %a5, tree_mask, page_table, lengths, row_starts, moves, k_pages_a, v_pages_a, 0.353553)
+  %a7: f32[1, s0, 4, 8] = aten.unsqueeze(%a6, 0)
+  %34: f32[1, s0, 32] = aten.reshape(%a7, [1, s0, -1])
@ nodes
-  %20: f32[1, s0, 32] = aten.alias(%19)
-  %21: f32[1, s0, 128] = aten.linear(%20, model.lm_head.weight f32[128, 32])
-return (%21, %20)
+  %a1: f32[1, s5, 32] = aten.index_select(%19, 1, logit_rows)
+  %20: f32[1, s5, 32] = aten.alias(%a1)
+  %21: f32[1, s5, 128] = aten.linear(%20, model.lm_head.weight f32[128, 32])
+  %a2: f32[s5, 128] = aten.select(%21, 0, 0)
+  %a3: i64[s5] = specfx.keyed_sample(%a2, keys, warp)
+return (%21, %19, %a3)""",
    )


def test_rewrite_of_qwen3() -> None:
    assert_expected_inline(
        difference(captured("qwen3"), rewritten("qwen3")),
        """\
@ inputs
-  position_ids: i64[1, s0]
+  page_table: i32[s1, s2]
+  lengths: i32[s1]
+  row_starts: i32[s1 + 1]
+  moves: i64[2, s3]
+  k_pages_0..1: f32[s4, 64, 2, 8]
+  v_pages_0..1: f32[s4, 64, 2, 8]
+  tree_mask: i64[s0]
+  logit_rows: i64[s5]
+  keys: i64[s5, 3]
+  warp: f64[s5, 4]
@ nodes
-  %1: i64[1, s0, 1] = aten.unsqueeze(position_ids, 2)
+  %a0: i64[1, s0] = specfx.tree_positions(tree_mask, lengths, row_starts, input_ids)
+  %1: i64[1, s0, 1] = aten.unsqueeze(%a0, 2)
@ nodes
-layers 0..1 (2 alike), in0 = %0, then the layer before's %66, in1 = %8, in2 = %11:
+layers 0..1 (2 alike), in0 = %0, then the layer before's %66, in1 = %8, in2 = %11, k_pages_a = k_pages_0..1, v_pages_a = v_pages_0..1:
@ layers 0..1 (2 alike)
-  %49: f32[1, s0, 4, 8] = specfx.attention(%41, %48, %32, 0.353553)
-  %50: f32[1, s0, 32] = aten.reshape(%49, [1, s0, -1])
+  %a0: f32[1, s0, 4, 8] = aten.transpose(%41, 1, 2)
+  %a1: f32[s0, 4, 8] = aten.select(%a0, 0, 0)
+  %a2: f32[1, s0, 2, 8] = aten.transpose(%48, 1, 2)
+  %a3: f32[s0, 2, 8] = aten.select(%a2, 0, 0)
+  %a4: f32[1, s0, 2, 8] = aten.transpose(%32, 1, 2)
+  %a5: f32[s0, 2, 8] = aten.select(%a4, 0, 0)
+  %a6: f32[s0, 4, 8] = specfx.tree_attention_(%a1, %a3, %a5, tree_mask, page_table, lengths, row_starts, moves, k_pages_a, v_pages_a, 0.353553)
+  %a7: f32[1, s0, 4, 8] = aten.unsqueeze(%a6, 0)
+  %50: f32[1, s0, 32] = aten.reshape(%a7, [1, s0, -1])
@ nodes
-  %20: f32[1, s0, 32] = aten.alias(%19)
-  %21: f32[1, s0, 128] = aten.linear(%20, model.lm_head.weight f32[128, 32])
-return (%21, %20)
+  %a1: f32[1, s5, 32] = aten.index_select(%19, 1, logit_rows)
+  %20: f32[1, s5, 32] = aten.alias(%a1)
+  %21: f32[1, s5, 128] = aten.linear(%20, model.lm_head.weight f32[128, 32])
+  %a2: f32[s5, 128] = aten.select(%21, 0, 0)
+  %a3: i64[s5] = specfx.keyed_sample(%a2, keys, warp)
+return (%21, %19, %a3)""",
    )


def test_rewrite_of_gemma3() -> None:
    """Its layers differ in window and rotary embedding."""
    assert_expected_inline(
        difference(captured("gemma3"), rewritten("gemma3")),
        """\
@ inputs
-  position_ids: i64[1, s0]
+  page_table: i32[s1, s2]
+  lengths: i32[s1]
+  row_starts: i32[s1 + 1]
+  moves: i64[2, s3]
+  k_pages_0..1: f32[s4, 64, 2, 8]
+  v_pages_0..1: f32[s4, 64, 2, 8]
+  tree_mask: i64[s0]
+  logit_rows: i64[s5]
+  keys: i64[s5, 3]
+  warp: f64[s5, 4]
@ nodes
-  %3: i64[1, s0, 1] = aten.unsqueeze(position_ids, 2)
+  %a0: i64[1, s0] = specfx.tree_positions(tree_mask, lengths, row_starts, input_ids)
+  %3: i64[1, s0, 1] = aten.unsqueeze(%a0, 2)
@ nodes
-  %14: i64[1, s0, 1] = aten.unsqueeze(position_ids, 2)
+  %14: i64[1, s0, 1] = aten.unsqueeze(%a0, 2)
@ nodes
-layer 0, in0 = %2, in1 = %10, in2 = %13:
+layer 0, in0 = %2, in1 = %10, in2 = %13, k_pages_a = k_pages_0, v_pages_a = v_pages_0:
@ layer 0
-  %55: f32[1, s0, 4, 8] = specfx.attention(%47, %54, %18, 0.353553, 8)
-  %56: f32[1, s0, 32] = aten.reshape(%55, [1, s0, -1])
+  %a0: f32[1, s0, 4, 8] = aten.transpose(%47, 1, 2)
+  %a1: f32[s0, 4, 8] = aten.select(%a0, 0, 0)
+  %a2: f32[1, s0, 2, 8] = aten.transpose(%54, 1, 2)
+  %a3: f32[s0, 2, 8] = aten.select(%a2, 0, 0)
+  %a4: f32[1, s0, 2, 8] = aten.transpose(%18, 1, 2)
+  %a5: f32[s0, 2, 8] = aten.select(%a4, 0, 0)
+  %a6: f32[s0, 4, 8] = specfx.tree_attention_(%a1, %a3, %a5, tree_mask, page_table, lengths, row_starts, moves, k_pages_a, v_pages_a, 0.353553, 8)
+  %a7: f32[1, s0, 4, 8] = aten.unsqueeze(%a6, 0)
+  %56: f32[1, s0, 32] = aten.reshape(%a7, [1, s0, -1])
@ layer 0
-layer 1, in0 = the layer before's %94, in1 = %21, in2 = %24:
+layer 1, in0 = the layer before's %94, in1 = %21, in2 = %24, k_pages_a = k_pages_1, v_pages_a = v_pages_1:
@ layer 1
-  %55: f32[1, s0, 4, 8] = specfx.attention(%47, %54, %18, 0.353553)
-  %56: f32[1, s0, 32] = aten.reshape(%55, [1, s0, -1])
+  %a0: f32[1, s0, 4, 8] = aten.transpose(%47, 1, 2)
+  %a1: f32[s0, 4, 8] = aten.select(%a0, 0, 0)
+  %a2: f32[1, s0, 2, 8] = aten.transpose(%54, 1, 2)
+  %a3: f32[s0, 2, 8] = aten.select(%a2, 0, 0)
+  %a4: f32[1, s0, 2, 8] = aten.transpose(%18, 1, 2)
+  %a5: f32[s0, 2, 8] = aten.select(%a4, 0, 0)
+  %a6: f32[s0, 4, 8] = specfx.tree_attention_(%a1, %a3, %a5, tree_mask, page_table, lengths, row_starts, moves, k_pages_a, v_pages_a, 0.353553)
+  %a7: f32[1, s0, 4, 8] = aten.unsqueeze(%a6, 0)
+  %56: f32[1, s0, 32] = aten.reshape(%a7, [1, s0, -1])
@ nodes
-  %35: f32[1, s0, 32] = aten.alias(%34)
-  %36: f32[1, s0, 128] = aten.linear(%35, model.lm_head.weight f32[128, 32])
-return (%36, %35)
+  %a1: f32[1, s5, 32] = aten.index_select(%34, 1, logit_rows)
+  %35: f32[1, s5, 32] = aten.alias(%a1)
+  %36: f32[1, s5, 128] = aten.linear(%35, model.lm_head.weight f32[128, 32])
+  %a2: f32[s5, 128] = aten.select(%36, 0, 0)
+  %a3: i64[s5] = specfx.keyed_sample(%a2, keys, warp)
+return (%36, %34, %a3)""",
    )


def test_rewrite_of_mistral() -> None:
    assert_expected_inline(
        difference(captured("mistral"), rewritten("mistral")),
        """\
@ inputs
-  position_ids: i64[1, s0]
+  page_table: i32[s1, s2]
+  lengths: i32[s1]
+  row_starts: i32[s1 + 1]
+  moves: i64[2, s3]
+  k_pages_0..1: f32[s4, 64, 2, 8]
+  v_pages_0..1: f32[s4, 64, 2, 8]
+  tree_mask: i64[s0]
+  logit_rows: i64[s5]
+  keys: i64[s5, 3]
+  warp: f64[s5, 4]
@ nodes
-  %1: i64[1, s0, 1] = aten.unsqueeze(position_ids, 2)
+  %a0: i64[1, s0] = specfx.tree_positions(tree_mask, lengths, row_starts, input_ids)
+  %1: i64[1, s0, 1] = aten.unsqueeze(%a0, 2)
@ nodes
-layers 0..1 (2 alike), in0 = %0, then the layer before's %50, in1 = %8, in2 = %11:
+layers 0..1 (2 alike), in0 = %0, then the layer before's %50, in1 = %8, in2 = %11, k_pages_a = k_pages_0..1, v_pages_a = v_pages_0..1:
@ layers 0..1 (2 alike)
-  %33: f32[1, s0, 4, 8] = specfx.attention(%25, %32, %16, 0.353553, 8)
-  %34: f32[1, s0, 32] = aten.reshape(%33, [1, s0, -1])
+  %a0: f32[1, s0, 4, 8] = aten.transpose(%25, 1, 2)
+  %a1: f32[s0, 4, 8] = aten.select(%a0, 0, 0)
+  %a2: f32[1, s0, 2, 8] = aten.transpose(%32, 1, 2)
+  %a3: f32[s0, 2, 8] = aten.select(%a2, 0, 0)
+  %a4: f32[1, s0, 2, 8] = aten.transpose(%16, 1, 2)
+  %a5: f32[s0, 2, 8] = aten.select(%a4, 0, 0)
+  %a6: f32[s0, 4, 8] = specfx.tree_attention_(%a1, %a3, %a5, tree_mask, page_table, lengths, row_starts, moves, k_pages_a, v_pages_a, 0.353553, 8)
+  %a7: f32[1, s0, 4, 8] = aten.unsqueeze(%a6, 0)
+  %34: f32[1, s0, 32] = aten.reshape(%a7, [1, s0, -1])
@ nodes
-  %20: f32[1, s0, 32] = aten.alias(%19)
-  %21: f32[1, s0, 128] = aten.linear(%20, model.lm_head.weight f32[128, 32])
-return (%21, %20)
+  %a1: f32[1, s5, 32] = aten.index_select(%19, 1, logit_rows)
+  %20: f32[1, s5, 32] = aten.alias(%a1)
+  %21: f32[1, s5, 128] = aten.linear(%20, model.lm_head.weight f32[128, 32])
+  %a2: f32[s5, 128] = aten.select(%21, 0, 0)
+  %a3: i64[s5] = specfx.keyed_sample(%a2, keys, warp)
+return (%21, %19, %a3)""",
    )


def test_rewrite_of_gpt_oss() -> None:
    """Windows in every other layer, sinks in all."""
    assert_expected_inline(
        difference(captured("gpt_oss"), rewritten("gpt_oss")),
        """\
@ inputs
-  position_ids: i64[1, s0]
+  page_table: i32[s1, s2]
+  lengths: i32[s1]
+  row_starts: i32[s1 + 1]
+  moves: i64[2, s3]
+  k_pages_0..1: f32[s4, 64, 2, 8]
+  v_pages_0..1: f32[s4, 64, 2, 8]
+  tree_mask: i64[s0]
+  logit_rows: i64[s5]
+  keys: i64[s5, 3]
+  warp: f64[s5, 4]
@ nodes
-  %1: i64[1, s0, 1] = aten.unsqueeze(position_ids, 2)
+  %a0: i64[1, s0] = specfx.tree_positions(tree_mask, lengths, row_starts, input_ids)
+  %1: i64[1, s0, 1] = aten.unsqueeze(%a0, 2)
@ nodes
-layer 0, in0 = %0, in1 = %7, in2 = %10:
+layer 0, in0 = %0, in1 = %7, in2 = %10, k_pages_a = k_pages_0, v_pages_a = v_pages_0:
@ layer 0
-  %39: f32[1, s0, 4, 8] = specfx.attention(%28, %38, %16, 0.353553, 8, 0, *.self_attn.sinks f32[4])
-  %40: f32[1, s0, 32] = aten.reshape(%39, [1, s0, -1])
+  %a0: f32[1, s0, 4, 8] = aten.transpose(%28, 1, 2)
+  %a1: f32[s0, 4, 8] = aten.select(%a0, 0, 0)
+  %a2: f32[1, s0, 2, 8] = aten.transpose(%38, 1, 2)
+  %a3: f32[s0, 2, 8] = aten.select(%a2, 0, 0)
+  %a4: f32[1, s0, 2, 8] = aten.transpose(%16, 1, 2)
+  %a5: f32[s0, 2, 8] = aten.select(%a4, 0, 0)
+  %a6: f32[s0, 4, 8] = specfx.tree_attention_(%a1, %a3, %a5, tree_mask, page_table, lengths, row_starts, moves, k_pages_a, v_pages_a, 0.353553, 8, 0, *.self_attn.sinks f32[4])
+  %a7: f32[1, s0, 4, 8] = aten.unsqueeze(%a6, 0)
+  %40: f32[1, s0, 32] = aten.reshape(%a7, [1, s0, -1])
@ layer 0
-layer 1, in0 = the layer before's %87, in1 = %7, in2 = %10:
+layer 1, in0 = the layer before's %87, in1 = %7, in2 = %10, k_pages_a = k_pages_1, v_pages_a = v_pages_1:
@ layer 1
-  %39: f32[1, s0, 4, 8] = specfx.attention(%28, %38, %16, 0.353553, 0, 0, *.self_attn.sinks f32[4])
-  %40: f32[1, s0, 32] = aten.reshape(%39, [1, s0, -1])
+  %a0: f32[1, s0, 4, 8] = aten.transpose(%28, 1, 2)
+  %a1: f32[s0, 4, 8] = aten.select(%a0, 0, 0)
+  %a2: f32[1, s0, 2, 8] = aten.transpose(%38, 1, 2)
+  %a3: f32[s0, 2, 8] = aten.select(%a2, 0, 0)
+  %a4: f32[1, s0, 2, 8] = aten.transpose(%16, 1, 2)
+  %a5: f32[s0, 2, 8] = aten.select(%a4, 0, 0)
+  %a6: f32[s0, 4, 8] = specfx.tree_attention_(%a1, %a3, %a5, tree_mask, page_table, lengths, row_starts, moves, k_pages_a, v_pages_a, 0.353553, 0, 0, *.self_attn.sinks f32[4])
+  %a7: f32[1, s0, 4, 8] = aten.unsqueeze(%a6, 0)
+  %40: f32[1, s0, 32] = aten.reshape(%a7, [1, s0, -1])
@ nodes
-  %19: f32[1, s0, 32] = aten.alias(%18)
-  %20: f32[1, s0, 128] = aten.linear(%19, model.lm_head.weight f32[128, 32])
-return (%20, %19)
+  %a1: f32[1, s5, 32] = aten.index_select(%18, 1, logit_rows)
+  %19: f32[1, s5, 32] = aten.alias(%a1)
+  %20: f32[1, s5, 128] = aten.linear(%19, model.lm_head.weight f32[128, 32])
+  %a2: f32[s5, 128] = aten.select(%20, 0, 0)
+  %a3: i64[s5] = specfx.keyed_sample(%a2, keys, warp)
+return (%20, %18, %a3)""",
    )


def test_packing_of_llama() -> None:
    graph = capture(tiny_model("llama").to(torch.bfloat16))
    packed = run_passes(graph, (pack_linears,), PassContext(pack=True))
    assert packed.records[0].matches == 2 * 7 + 1
    assert_expected_inline(
        difference(graph, packed.module),
        """\
@ nodes
-layers 0..1 (2 alike), in0 = %0, then the layer before's %50, in1 = %8, in2 = %11:
+layers 0..1 (2 alike), in0 = %0, then the layer before's %50, packed_a = packed_0, 4 bf16[2, 1, 16, 32, 2], in1 = %8, in2 = %11, packed_b = packed_1, 5 bf16[1, 1, 16, 32, 2], packed_c = packed_2, 6 bf16[4, 1, 16, 32, 2], packed_d = packed_3, 7 bf16[1, 2, 16, 32, 2]:
@ layers 0..1 (2 alike)
-  %8: bf16[1, s0, 32] = aten.linear(%7, *.self_attn.q_proj.weight bf16[32, 32])
-  %9: bf16[1, s0, 4, 8] = aten.view(%8, [1, s0, -1, 8])
+  %a0: bf16[1, s0, 64] = specfx.packed_linear(%7, packed_a, None, 64)
+  %a1: bf16[1, s0, 32] = aten.slice(%a0, -1, 0, 32)
+  %a2: bf16[1, s0, 16] = aten.slice(%a0, -1, 32, 48)
+  %a3: bf16[1, s0, 16] = aten.slice(%a0, -1, 48, 64)
+  %9: bf16[1, s0, 4, 8] = aten.view(%a1, [1, s0, -1, 8])
@ layers 0..1 (2 alike)
-  %11: bf16[1, s0, 16] = aten.linear(%7, *.self_attn.k_proj.weight bf16[16, 32])
-  %12: bf16[1, s0, 2, 8] = aten.view(%11, [1, s0, -1, 8])
+  %12: bf16[1, s0, 2, 8] = aten.view(%a2, [1, s0, -1, 8])
@ layers 0..1 (2 alike)
-  %14: bf16[1, s0, 16] = aten.linear(%7, *.self_attn.v_proj.weight bf16[16, 32])
-  %15: bf16[1, s0, 2, 8] = aten.view(%14, [1, s0, -1, 8])
+  %15: bf16[1, s0, 2, 8] = aten.view(%a3, [1, s0, -1, 8])
@ layers 0..1 (2 alike)
-  %35: bf16[1, s0, 32] = aten.linear(%34, *.self_attn.o_proj.weight bf16[32, 32])
-  %36: bf16[1, s0, 32] = aten.add(in0, %35)
+  %a4: bf16[1, s0, 32] = specfx.packed_linear(%34, packed_b, None, 32)
+  %36: bf16[1, s0, 32] = aten.add(in0, %a4)
@ layers 0..1 (2 alike)
-  %45: bf16[1, s0, 64] = aten.linear(%44, *.mlp.gate_proj.weight bf16[64, 32])
-  %46: bf16[1, s0, 64] = aten.silu(%45)
-  %47: bf16[1, s0, 64] = aten.linear(%44, *.mlp.up_proj.weight bf16[64, 32])
-  %48: bf16[1, s0, 64] = aten.mul(%46, %47)
-  %49: bf16[1, s0, 32] = aten.linear(%48, *.mlp.down_proj.weight bf16[32, 64])
-  %50: bf16[1, s0, 32] = aten.add(%36, %49)
+  %a5: bf16[1, s0, 128] = specfx.packed_linear(%44, packed_c, None, 128)
+  %a6: bf16[1, s0, 64] = aten.slice(%a5, -1, 0, 64)
+  %a7: bf16[1, s0, 64] = aten.slice(%a5, -1, 64, 128)
+  %46: bf16[1, s0, 64] = aten.silu(%a6)
+  %48: bf16[1, s0, 64] = aten.mul(%46, %a7)
+  %a8: bf16[1, s0, 32] = specfx.packed_linear(%48, packed_d, None, 32)
+  %50: bf16[1, s0, 32] = aten.add(%36, %a8)
@ nodes
-  %21: bf16[1, s0, 128] = aten.linear(%20, model.lm_head.weight bf16[128, 32])
-return (%21, %20)
+  %a0: bf16[1, s0, 128] = specfx.packed_linear(%20, packed_8 bf16[4, 1, 16, 32, 2], None, 128)
+return (%a0, %20)""",
    )


# --- the normal form itself


class Layer(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(8, width, bias=False)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        return torch.cat([self.linear(x), x], -1)[..., :8] * place


class Layers(nn.Module):
    """`widths` of the layers; `places`: which of two values each layer takes beside its input."""

    def __init__(self, widths: tuple[int, ...], places: tuple[int, ...]) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(16, 8), places
        self.layers = nn.ModuleList(Layer(w) for w in widths)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x, places = self.embed(input_ids), (position_ids.cos()[..., None], position_ids.sin()[..., None])
        for layer, place in zip(self.layers, self.places, strict=True):
            x = layer(x, places[place])
        return x


def headings(module: fx.GraphModule) -> list[str]:
    return [line for line in normal_form(module).splitlines() if line.startswith("layer")]


def test_equal_layers_print_once() -> None:
    assert headings(trace(Layers((4, 4, 4), (0, 0, 0)))) == ["layers 0..2 (3 alike), in0 = %0, then the layer before's %3, in1 = %2:"]


def test_layers_of_other_shapes_print_apart() -> None:
    assert [h.partition(",")[0] for h in headings(trace(Layers((4, 4, 2), (0, 0, 0))))] == ["layers 0..1 (2 alike)", "layer 2"]


def test_layers_that_read_other_values_print_apart() -> None:
    assert [h.rpartition(", ")[2] for h in headings(trace(Layers((4, 4, 4), (0, 1, 1))))] == ["in1 = %2:", "in1 = %4:"]


def test_without_collapsing_every_node_has_a_line() -> None:
    text = normal_form(trace(Layers((4, 4), (0, 0))), collapse=False)
    assert headings(trace(Layers((4, 4), (0, 0)))) != []
    assert "layers.1.linear.weight f32[4, 8]" in text
    assert [line.strip().partition(":")[0] for line in text.splitlines() if " = " in line] == [f"%{i}" for i in range(3 + 2 * 4)]


def test_the_form_depends_on_no_names_of_nodes_or_symbols() -> None:
    graph = rewritten("llama")
    other = copy_module(graph)
    for i, node in enumerate(other.graph.nodes):
        if node.op == "call_function":
            node.name = f"renamed_{i}"
    assert normal_form(other) == normal_form(graph)
    again = run_passes(capture(tiny_model("llama", num_hidden_layers=3)), REWRITE, PassContext()).module
    assert normal_form(again) == normal_form(graph)


def test_the_form_holds_no_addresses_devices_paths_or_asserts() -> None:
    for name in ("llama", "gpt_oss"):
        text = normal_form(captured(name)) + normal_form(rewritten(name))
        assert not re.search(r"0x|cpu|cuda|/|assert|\.default|s\d\d", text)


def test_a_change_in_one_layer_shows_and_parts_the_layers() -> None:
    other = copy_module(rewritten("llama"))
    calls(other, tree_attention_)[1].update_arg(10, 0.25)
    text = normal_form(other)
    assert [h.partition(",")[0] for h in text.splitlines() if h.startswith("layer")] == ["layer 0", "layer 1", "layer 2"]
    assert ", 0.25)" in difference(rewritten("llama"), other)


def test_each_layer_has_its_own_pages() -> None:
    other = copy_module(rewritten("llama"))
    first, second, _ = calls(other, tree_attention_)
    second.update_arg(8, first.args[8])
    assert "k_pages_a = k_pages_0..2, v_pages_a = v_pages_0..2:" in normal_form(rewritten("llama"))
    assert "layers 0..1 (2 alike)" in normal_form(other)
    assert "k_pages_a = k_pages_0, v_pages_a = v_pages_0..1:" in normal_form(other)


def test_equal_graphs_have_no_difference() -> None:
    assert difference(captured("llama"), copy_module(captured("llama"))) == ""
    assert len(calls(captured("llama"), attention)) == 3
