# ruff: noqa: E501
"""Layers that are alike become calls of one region: which, by structure alone, and that nothing changes by it.

Accept new golden texts with EXPECTTEST_ACCEPT=1.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from test_lowering import exercise
from test_passes import refused
from tiny import tiny_model
from torch import fx

from specfx.capture import capture
from specfx.engines.paged import PagedEngine
from specfx.errors import PassError, Reason
from specfx.kernels.tree_attention import tree_attention_
from specfx.passes.framework import PassContext, attribute, calls, copy_module, run_passes
from specfx.passes.pipeline import REWRITE
from specfx.passes.regions import invoke, regions

aten = torch.ops.aten
CONTEXT = PassContext(page_size=16)
ALTERNATING = ["sliding_attention", "full_attention"]


@functools.cache
def rewritten(name: str, layers: int, alternating: bool = False) -> fx.GraphModule:
    kinds = {"layer_types": ALTERNATING * (layers // 2)} if alternating else {}
    result = run_passes(capture(tiny_model(name, num_hidden_layers=layers, **kinds)), REWRITE, CONTEXT)
    assert result.failed is None
    return result.module


def outlined(module: fx.GraphModule) -> fx.GraphModule:
    result = run_passes(module, (regions,), CONTEXT)
    assert [str(r.refusal) for r in result.records if r.refusal is not None] == []
    return result.module


def called(module: fx.GraphModule) -> list[str]:
    return [str(n.args[1]) for n in calls(module, invoke)]


def test_two_layers_of_llama_are_two_calls_of_one_region() -> None:
    """Its inputs: hidden states, weights, sine and cosine, what attention needs; input_ids for the number of rows."""
    module = outlined(rewritten("llama", 2))
    text = [f"{n.args[1]}({', '.join(a.name.removeprefix('model_model_') for a in n.args[2:])})" for n in calls(module, invoke)]
    ops = Counter(str(n.target) for n in module.region_0.graph.nodes if n.op == "call_function")
    text += [f"{count} {op}" for op, count in ops.items() if not op.startswith(("aten.slice", "aten.add", "aten.mul", "aten.to"))]
    assert_expected_inline(
        "\n".join(text),
        """\
region_0(to_4, layers_0_input_layernorm_weight, layers_0_self_attn_q_proj_weight, input_ids, layers_0_self_attn_k_proj_weight, layers_0_self_attn_v_proj_weight, to_2, to_3, tree_mask, page_table, lengths, row_starts, moves, k_pages_0, v_pages_0, layers_0_self_attn_o_proj_weight, layers_0_post_attention_layernorm_weight, layers_0_mlp_gate_proj_weight, layers_0_mlp_up_proj_weight, layers_0_mlp_down_proj_weight)
region_0(getitem, layers_1_input_layernorm_weight, layers_1_self_attn_q_proj_weight, input_ids, layers_1_self_attn_k_proj_weight, layers_1_self_attn_v_proj_weight, to_2, to_3, tree_mask, page_table, lengths, row_starts, moves, k_pages_1, v_pages_1, layers_1_self_attn_o_proj_weight, layers_1_post_attention_layernorm_weight, layers_1_mlp_gate_proj_weight, layers_1_mlp_up_proj_weight, layers_1_mlp_down_proj_weight)
2 aten.pow.Tensor_Scalar
2 aten.mean.dim
2 aten.rsqrt.default
7 aten.linear.default
1 aten.sym_size.int
3 aten.view.default
6 aten.transpose.int
3 aten.unsqueeze.default
2 aten.neg.default
2 aten.cat.default
3 aten.select.int
1 specfx.tree_attention_.default
1 aten.reshape.default
1 aten.silu.default""",
    )


@pytest.mark.parametrize(
    ("name", "layers", "alternating", "expected"),
    [
        ("llama", 3, False, ["region_0"] * 3),
        ("gemma3", 4, True, ["region_0", "region_1"] * 2),
        ("gpt_oss", 4, True, ["region_0", "region_1"] * 2),
        ("deepseek_v3", 3, False, ["region_0"] * 2),  # the first layer's MLP is dense
        ("smollm3", 2, False, None),  # one has rotary positions, one has none
        ("gpt2", 3, False, ["region_0"] * 3),
    ],
)
def test_each_kind_of_layer_is_a_region(name: str, layers: int, alternating: bool, expected: list[str] | None) -> None:
    module = rewritten(name, layers, alternating)
    if expected is None:
        assert "at least 2 expected" in refused(regions, module, CONTEXT, Reason.NOTHING_TO_DO)
        return
    after = outlined(module)
    assert called(after) == expected
    own = len(calls(after, tree_attention_))
    assert own + len(expected) == layers
    pools = [a.name for n in calls(after, invoke) for a in n.args if isinstance(a, fx.Node) and "_pages_" in a.name]
    assert len(pools) == len(set(pools)) == 2 * len(expected)


def test_structure_decides_not_names() -> None:
    module = copy_module(rewritten("llama", 3))
    for i, node in enumerate(module.graph.nodes):
        node.meta.pop("nn_module_stack", None)
        if node.op == "call_function":
            node.name = f"x{random.Random(i).randrange(10**9)}"
    assert called(outlined(module)) == ["region_0"] * 3


@pytest.mark.parametrize(("name", "layers", "alternating"), [("llama", 3, False), ("gemma3", 4, True), ("deepseek_v3", 3, False)])
def test_a_graph_with_regions_gives_the_same_numbers(name: str, layers: int, alternating: bool) -> None:
    before = rewritten(name, layers, alternating)
    engines = []
    for module in (outlined(before), before):
        call: Any = module
        engines.append(PagedEngine("graph", module, call, "auto", torch.device("cpu")))
    exercise(engines[0], engines[1], 1e-6)


def one_constant(module: fx.GraphModule) -> None:
    """The second of three layers gets another epsilon."""
    epsilons = [n for n in calls(module, aten.add.Tensor) if isinstance(n.args[1], float)]
    epsilons[2].update_arg(1, 1e-3)


def one_reader_more(module: fx.GraphModule) -> None:
    """What the second layer's attention gives is read by another node of it as well."""
    attention = calls(module, tree_attention_)[1]
    users = list(attention.users)
    with module.graph.inserting_after(attention):
        more = module.graph.call_function(aten.neg.default, (attention,))
    more.meta["val"] = attention.meta["val"]
    for user in users:
        user.replace_input_with(attention, more)


def one_pool_read_elsewhere(module: fx.GraphModule) -> None:
    pool = next(n for n in module.graph.nodes if n.target == "k_pages_1")
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        read = module.graph.call_function(aten.select.int, (pool, 0, 0))
    read.meta["val"] = pool.meta["val"].select(0, 0)
    output.args = ((*output.args[0], read),)  # type: ignore[misc]


@pytest.mark.parametrize("change", [one_constant, one_reader_more, one_pool_read_elsewhere])
def test_a_layer_that_differs_stays_as_it_is(change: Any) -> None:
    module = copy_module(rewritten("llama", 3))
    change(module)
    after = outlined(module)
    assert called(after) == ["region_0"] * 2
    (left,) = calls(after, tree_attention_)
    assert left.args[8].name == "k_pages_1"  # type: ignore[union-attr]


def test_a_single_layer_is_no_region() -> None:
    assert "1 attentions" in refused(regions, rewritten("llama", 1), CONTEXT, Reason.NOTHING_TO_DO)


def test_a_call_with_other_inputs_than_its_region_has_is_refused() -> None:
    module = outlined(rewritten("llama", 2))
    call = calls(module, invoke)[1]
    weights = [i for i, a in enumerate(call.args) if isinstance(a, fx.Node) and a.op == "get_attr" and "weight" in a.name]
    wide = next(i for i in weights if attribute(module, str(call.args[i].target)).shape == (64, 32))  # type: ignore[union-attr]
    narrow = next(i for i in weights if attribute(module, str(call.args[i].target)).shape == (16, 32))  # type: ignore[union-attr]
    call.update_arg(wide, call.args[narrow])
    with pytest.raises(PassError, match="other inputs than its region has"):
        regions.ensures(module, CONTEXT)
