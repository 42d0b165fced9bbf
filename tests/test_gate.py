"""The gate refuses every graph and engine that is subtly wrong: each case changes one thing that a rewrite could get wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, fx
from transformers import PreTrainedModel

from specfx import gate
from specfx.capture import capture, clone_sharing_storage
from specfx.engines.base import Rows
from specfx.engines.paged import PagedEngine, on_references
from specfx.errors import GateError
from specfx.kernels.keyed_sample import keyed_sample
from specfx.kernels.tree_attention import tree_attention_, tree_positions
from specfx.passes.framework import PassContext, calls, copy_module, insert_call, run_passes
from specfx.passes.pipeline import REWRITE

aten = torch.ops.aten
TREE_MASK, LENGTHS, MOVES, SCALE, WINDOW, SOFTCAP, SINKS = 3, 5, 7, 10, 11, 12, 13
"""Positions among the arguments of `tree_attention_`."""


@functools.cache
def rewritten(name: str, window: int | None = None) -> tuple[PreTrainedModel, fx.GraphModule]:
    model = tiny_model(name) if window is None else tiny_model(name, sliding_window=window)
    result = run_passes(capture(model), REWRITE, PassContext(page_size=16))
    assert result.failed is None
    return clone_sharing_storage(model), result.module


def engine_of(module: fx.GraphModule) -> PagedEngine:
    """As `specfx.engines.choose` makes the engine that it shows to the gate."""
    shrunken = gate.with_shrunken_windows(module)
    return PagedEngine("graph", shrunken, on_references(shrunken), "auto", torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2", "falcon"])
def test_the_rewritten_graph_passes(name: str) -> None:
    stock, module = rewritten(name)
    engine, windows = engine_of(module), gate.windows_of(module)
    gate.check(engine, stock)
    assert engine.pool.pages_in_use == 0
    assert gate.windows_of(module) == windows
    assert getattr(stock.config, "sliding_window", None) in (None, 0, 8)


Mutation = Callable[[fx.GraphModule], None]


def put(node: fx.Node, argument: int, value: object) -> None:
    """Set an argument that may have been left to its default."""
    node.args = (*node.args, *(0, 0.0, None)[len(node.args) - WINDOW :])
    node.update_arg(argument, value)


def setting(argument: int, value: object, layer: int = -1) -> Mutation:
    """`argument` of one attention becomes `value`."""

    def mutate(module: fx.GraphModule) -> None:
        put(calls(module, tree_attention_)[layer], argument, value)

    return mutate


def for_all(argument: int, value: object) -> Mutation:
    def mutate(module: fx.GraphModule) -> None:
        for node in calls(module, tree_attention_):
            put(node, argument, value)

    return mutate


def scaled(module: fx.GraphModule) -> None:
    node = calls(module, tree_attention_)[0]
    node.update_arg(SCALE, 0.9 * node.args[SCALE])


def positions(compute: Callable[[fx.Graph, fx.Node], fx.Node]) -> Mutation:
    """The positions are replaced by what `compute` makes of them."""

    def mutate(module: fx.GraphModule) -> None:
        (node,) = calls(module, tree_positions)
        with module.graph.inserting_after(node):
            node.replace_all_uses_with(new := compute(module.graph, node), delete_user_cb=lambda user: user.name not in new.meta["own"])

    return mutate


def shifted(graph: fx.Graph, node: fx.Node) -> fx.Node:
    new = insert_call(graph, aten.add.Scalar, node, 1)
    new.meta["own"] = {new.name}
    return new


def by_row(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Positions of a run, where those of a tree are due: computed without the mask."""
    new = graph.node_copy(node)
    new.update_arg(0, None)
    new.meta["own"] = {new.name}
    return new


def swapped_pools(module: fx.GraphModule) -> None:
    first, second = calls(module, tree_attention_)
    second.update_arg(8, first.args[8])


def last_row_only(module: fx.GraphModule) -> None:
    """Every row of logits is that of the first row read."""
    (node,) = calls(module, aten.index_select.default)
    rows = node.args[2]
    with module.graph.inserting_before(node):
        node.replace_input_with(rows, insert_call(module.graph, aten.mul.Scalar, rows, 0))


CORRUPTED: dict[str, tuple[str, Mutation]] = {
    "wrong scale in one layer": ("llama", scaled),
    "tree mask ignored in all layers": ("llama", for_all(TREE_MASK, None)),
    "tree mask ignored in the last layer": ("llama", setting(TREE_MASK, None)),
    "window dropped": ("mistral", for_all(WINDOW, 0)),
    "window dropped in one layer": ("mistral", setting(WINDOW, 0)),
    "window off by one": ("mistral", setting(WINDOW, 3)),
    "window in the wrong layer": ("gemma3", setting(WINDOW, 8)),
    "window dropped beside full layers": ("gpt_oss", setting(WINDOW, 0, layer=0)),
    "softcap dropped": ("gemma2", setting(SOFTCAP, 0.0)),
    "softcap doubled": ("gemma2", setting(SOFTCAP, 10.0)),
    "sinks dropped": ("gpt_oss", setting(SINKS, None)),
    "positions off by one": ("gpt2", positions(shifted)),
    "positions of siblings in a row": ("llama", positions(by_row)),
    "positions of siblings in a row, learned": ("gpt2", positions(by_row)),
    "layers share keys": ("llama", swapped_pools),
    "logits of the wrong row": ("llama", last_row_only),
}


@pytest.mark.parametrize("case", CORRUPTED)
def test_a_corrupted_graph_is_refused(case: str) -> None:
    name, mutate = CORRUPTED[case]
    stock, module = rewritten(name)
    # The mutation comes after the windows have been shrunken, as if the rewrite itself were wrong.
    shrunken = gate.with_shrunken_windows(module)
    mutate(shrunken)
    shrunken.graph.lint()
    shrunken.recompile()
    engine = PagedEngine("graph", shrunken, on_references(shrunken), "auto", torch.device("cpu"))
    with pytest.raises(GateError, match="logits differ from the stock model's by"):
        gate.check(engine, stock)
    assert engine.pool.pages_in_use == 0


def zeroed(argument: int) -> Mutation:
    """An argument of the op that chooses is all zeros."""

    def mutate(module: fx.GraphModule) -> None:
        (node,) = calls(module, keyed_sample)
        with module.graph.inserting_before(node):
            node.update_arg(argument, insert_call(module.graph, aten.zeros_like.default, node.args[argument]))

    return mutate


def reversed_choices(module: fx.GraphModule) -> None:
    (node,) = calls(module, keyed_sample)
    with module.graph.inserting_after(node):
        node.replace_all_uses_with(new := insert_call(module.graph, aten.flip.default, node, [0]), lambda user: user is not new)


@pytest.mark.parametrize("mutate", [zeroed(1), zeroed(2), reversed_choices], ids=["noise without keys", "no draws", "another row's"])
def test_a_graph_that_chooses_other_tokens_is_refused(mutate: Mutation) -> None:
    stock, module = rewritten("llama")
    shrunken = gate.with_shrunken_windows(module)
    mutate(shrunken)
    shrunken.recompile()
    engine = PagedEngine("graph", shrunken, on_references(shrunken), "auto", torch.device("cpu"))
    with pytest.raises(GateError, match=r"choices: \[.*\] behind the rows, expected \["):
        gate.check(engine, stock)
    assert engine.pool.pages_in_use == 0


class Wrong(PagedEngine):
    """An engine over a right graph that binds or commits something wrong."""

    def __init__(self, module: fx.GraphModule, wrong: str) -> None:
        shrunken = gate.with_shrunken_windows(module)
        super().__init__("wrong", shrunken, on_references(shrunken), "auto", torch.device("cpu"))
        self.wrong = wrong

    def bind(self, batch: Sequence[Rows]) -> dict[str, Tensor]:
        inputs = super().bind(batch)
        if self.wrong == "moves ignored":
            inputs["moves"] = torch.full((2, 1), -1)
        elif self.wrong == "moves reversed":
            inputs["moves"] = inputs["moves"].flip(0)
        elif self.wrong == "lengths off by one":
            inputs["lengths"] = (inputs["lengths"] - 1).clamp(min=0)
        elif self.wrong == "every node sees its siblings":
            inputs["tree_mask"] = inputs["tree_mask"] | inputs["tree_mask"].roll(1)
        elif self.wrong == "sequences share a table" and len(batch) > 1:
            inputs["page_table"] = inputs["page_table"][:1].expand(len(batch), -1).contiguous()
        elif self.wrong == "not a number":
            inputs["k_pages_0"].fill_(float("nan"))
        return inputs

    def commit(self, seq: int, rows: Sequence[int]) -> None:
        if self.wrong == "rollback forgotten":
            rows = range(rows[-1] + 1) if len(rows) > 1 else range(self.pool._sequences[seq].fresh)
        super().commit(seq, rows)


WRONG = (
    *("moves ignored", "moves reversed", "lengths off by one", "every node sees its siblings", "sequences share a table"),
    *("rollback forgotten", "not a number"),
)


@pytest.mark.parametrize("wrong", WRONG)
def test_an_engine_that_keeps_the_wrong_books_is_refused(wrong: str) -> None:
    stock, module = rewritten("llama")
    gate.check(Wrong(module, ""), stock)
    engine = Wrong(module, wrong)
    with pytest.raises(GateError, match="logits differ"):
        gate.check(engine, stock)
    assert engine.pool.pages_in_use == 0


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_window_of_4096_is_crossed_all_the_same(name: str) -> None:
    stock, module = rewritten(name, 4096)
    assert max(gate.windows_of(module)) == 4096
    gate.check(engine_of(module), stock)
    assert stock.config.sliding_window == 4096
    without = copy_module(module)
    for_all(WINDOW, 0)(without)
    with pytest.raises(GateError, match="logits differ"):
        gate.check(engine_of(without), stock)


def test_without_shrinking_a_dropped_window_of_4096_would_pass() -> None:
    """Why windows are shrunken: the comparison's prompts are short."""
    stock, module = rewritten("mistral", 4096)
    without = copy_module(module)
    for_all(WINDOW, 0)(without)
    without.recompile()
    gate.check(PagedEngine("graph", without, on_references(without), "auto", torch.device("cpu")), stock, shrink_windows=False)


def test_weights_other_than_the_captured_ones_are_refused() -> None:
    _, module = rewritten("llama")
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(GateError, match="logits differ"):
        gate.check(engine_of(module), clone_sharing_storage(other))


def test_the_gate_uses_no_global_random_state() -> None:
    stock, module = rewritten("llama")
    before = torch.get_rng_state()
    gate.check(engine_of(module), stock)
    assert torch.equal(torch.get_rng_state(), before)


def test_rope_that_depends_on_the_length_is_refused_by_name() -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(GateError, match="rope_type='dynamic'"):
        gate.refuse_by_name(model.config)
    gate.refuse_by_name(tiny_model("llama").config)
