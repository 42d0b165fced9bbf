"""The runner: whatever a pass does, the graph is either rewritten wholly or as it was, and a record says which and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from micro import one_attention
from torch import Tensor, fx

from specfx.errors import PassError, Reason
from specfx.kernels.attention import attention
from specfx.passes.framework import Pass, PassContext, calls, copy_module, run_passes
from specfx.passes.printer import difference, normal_form

CONTEXT = PassContext()


def marked(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    return attention(q, k, v, 0.5).transpose(1, 2)


@pytest.fixture
def graph() -> fx.GraphModule:
    return one_attention(marked)


def nothing(module: fx.GraphModule, context: PassContext) -> None:
    """An `ensures` that holds always."""


def double_scale(module: fx.GraphModule, context: PassContext) -> int:
    for node in calls(module, attention):
        node.update_arg(3, 2 * node.args[3])
    return 1


def raising(module: fx.GraphModule, context: PassContext) -> int:
    double_scale(module, context)
    node = calls(module, attention)[0]
    node.replace_all_uses_with(node.args[0])
    module.graph.erase_node(node)
    module.register_buffer("half_done", torch.zeros(1))
    raise KeyError("half done")


def unordered(module: fx.GraphModule, context: PassContext) -> int:
    node = calls(module, attention)[0]
    node.replace_input_with(node.args[0], module.graph.output_node().args[0][0])
    return 1


def unmet(module: fx.GraphModule, context: PassContext) -> None:
    raise PassError("the scale is wrong")


DOUBLE = Pass("double", double_scale, nothing)


def state(module: fx.GraphModule) -> list[tuple[object, ...]]:
    return [(n, n.name, n.target, n.args, n.kwargs, dict(n.meta)) for n in module.graph.nodes]


@pytest.mark.parametrize(
    ("run", "ensures", "detail"),
    [
        (raising, nothing, "KeyError: 'half done'"),
        (double_scale, unmet, "PassError: the scale is wrong"),
        (unordered, nothing, "RuntimeError: Argument "),
        (lambda module, context: 0, nothing, "0 matches, at least 1 expected"),
    ],
    ids=["raises", "ensures fails", "ill-formed graph", "too few matches"],
)
def test_a_pass_that_fails_leaves_no_trace(
    graph: fx.GraphModule, run: Callable[..., int], ensures: Callable[..., None], detail: str
) -> None:
    before, code, weights = state(graph), graph.code, dict(graph.named_parameters())
    buffers = dict(graph.named_buffers())
    result = run_passes(graph, [Pass("bad", run, ensures)], CONTEXT)
    (record,) = result.records
    assert record.refusal is not None
    assert record.refusal.reason is Reason.PASS_FAILED
    assert record.refusal.detail.startswith(detail)
    assert (record.applied, record.matches, record.difference) == (False, 0, {})
    assert result.failed is record
    assert result.module is graph
    assert state(graph) == before
    assert graph.code == code
    assert {n: p.data_ptr() for n, p in graph.named_parameters()} == {n: p.data_ptr() for n, p in weights.items()}
    assert dict(graph.named_buffers()).keys() == buffers.keys()


def test_a_failure_undoes_one_pass_only(graph: fx.GraphModule) -> None:
    result = run_passes(graph, [DOUBLE, Pass("bad", raising, nothing), dataclasses.replace(DOUBLE, name="again")], CONTEXT)
    assert [r.applied for r in result.records] == [True, False, True]
    assert calls(result.module, attention)[0].args[3] == 2.0
    assert calls(graph, attention)[0].args[3] == 0.5


def test_the_given_graph_is_never_rewritten(graph: fx.GraphModule) -> None:
    before = state(graph)
    result = run_passes(graph, [DOUBLE], CONTEXT)
    assert state(graph) == before
    assert "specfx.attention" in difference(graph, result.module)


def test_a_pass_waits_for_what_it_requires(graph: fx.GraphModule) -> None:
    needs = dataclasses.replace(DOUBLE, name="needs", requires=("double", "other"))
    result = run_passes(graph, [DOUBLE, needs], CONTEXT)
    refusal = result.records[1].refusal
    assert refusal is not None
    assert refusal.reason is Reason.PASS_FAILED
    assert refusal.detail == "needs other, which did not run"
    assert calls(result.module, attention)[0].args[3] == 1.0


def test_a_pass_that_failed_does_not_satisfy_a_requirement(graph: fx.GraphModule) -> None:
    needs = dataclasses.replace(DOUBLE, requires=("bad",))
    result = run_passes(graph, [Pass("bad", raising, nothing), needs], CONTEXT)
    assert not result.applied("double")
    assert result.failed is result.records[0]
    assert result.module is graph


def test_a_pass_can_be_switched_off_by_name(graph: fx.GraphModule) -> None:
    result = run_passes(graph, [DOUBLE], CONTEXT, disabled=["double"])
    refusal = result.records[0].refusal
    assert refusal is not None
    assert refusal.reason is Reason.SWITCHED_OFF
    assert result.module is graph
    assert str(result.records[0]) == "double: not applied (switched off by the user: named in disable_passes)"


def test_an_unknown_name_is_an_error_that_lists_the_passes(graph: fx.GraphModule) -> None:
    with pytest.raises(PassError, match="no pass is named duoble; the passes are double"):
        run_passes(graph, [DOUBLE], CONTEXT, disabled=["duoble"])


def test_an_optional_pass_may_fail(graph: fx.GraphModule) -> None:
    result = run_passes(graph, [Pass("bad", raising, nothing, optional=True)], CONTEXT)
    assert result.failed is None
    assert not result.records[0].applied


def test_records_are_frozen_and_say_what_changed(graph: fx.GraphModule) -> None:
    def add_clone(module: fx.GraphModule, context: PassContext) -> int:
        node = calls(module, attention)[0]
        with module.graph.inserting_after(node):
            clone = module.graph.call_function(torch.ops.aten.clone.default, (node,))
        clone.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)
        return 3

    (record,) = run_passes(graph, [Pass("clone", add_clone, nothing)], CONTEXT).records
    assert record.applied
    assert record.matches == 3
    assert record.difference["aten.clone.default"] == 1
    assert record.seconds > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.matches = 0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        DOUBLE.name = "other"  # type: ignore[misc]


def test_a_copy_shares_weights_and_nothing_else(graph: fx.GraphModule) -> None:
    copy = copy_module(graph)
    weights = dict(graph.named_parameters()) | dict(graph.named_buffers())
    copied = dict(copy.named_parameters()) | dict(copy.named_buffers())
    used = {str(n.target) for n in graph.graph.find_nodes(op="get_attr")}
    assert used <= copied.keys()
    assert all(copied[name].data_ptr() == weights[name].data_ptr() for name in used)
    assert not set(copy.graph.nodes) & set(graph.graph.nodes)
    assert normal_form(copy) == normal_form(graph)
    assert [n.name for n in copy.graph.nodes] == [n.name for n in graph.graph.nodes]
    double_scale(copy, CONTEXT)
    calls(copy, attention)[0].meta["note"] = 1
    assert calls(graph, attention)[0].args[3] == 0.5
    assert "note" not in calls(graph, attention)[0].meta


def test_dead_code_goes_and_writes_stay(graph: fx.GraphModule) -> None:
    def add_dead(module: fx.GraphModule, context: PassContext) -> int:
        node = calls(module, attention)[0]
        with module.graph.inserting_after(node):
            module.graph.call_function(torch.ops.aten.cos.default, (node,))
            module.graph.call_function(torch.ops.aten.mul_.Scalar, (node, 2.0))
        return 1

    rewritten = run_passes(graph, [Pass("dead", add_dead, nothing)], CONTEXT).module
    assert not calls(rewritten, torch.ops.aten.cos.default)
    assert len(calls(rewritten, torch.ops.aten.mul_.Scalar)) == 1
