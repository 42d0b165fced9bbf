# ruff: noqa: E501
"""A head stitched into the target's graph: what the pass adds, that it drafts what the eager drafter drafts whatever was accepted, and
that a graph which drafts anything else does not serve.

Accept new golden texts with EXPECTTEST_ACCEPT=1.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import random_head
from expecttest import assert_expected_inline
from test_lowering import attention_calls, pool_traffic, pools_in
from test_passes import refused
from tiny import VOCAB, tiny_model
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import specfx
from specfx.api import engine_of
from specfx.capture import capture
from specfx.drafters.mtp import Drafting, MtpDrafter
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.engines import drafting as stitching
from specfx.engines.base import Engine, Rows, RowsOutput
from specfx.engines.compiled import CompiledEngine
from specfx.engines.paged import PagedEngine, graph_engine
from specfx.errors import KVPoolError, Reason
from specfx.kernels import cpu_build
from specfx.kernels.greedy_walk import greedy_walk
from specfx.kernels.packed_linear import packed_linear
from specfx.kernels.tree_attention import tree_attention_
from specfx.passes import mtp_head as mtp_head_pass
from specfx.passes.draft_on_demand import DRAFTING as DRAFTING_INPUT
from specfx.passes.draft_on_demand import draft_on_demand
from specfx.passes.framework import PassContext, calls, run_passes
from specfx.passes.mtp_head import mtp_head
from specfx.passes.pack_linears import pack_linears
from specfx.passes.pipeline import DRAFTING, REWRITE
from specfx.passes.printer import difference
from specfx.runtime.session import Runtime
from specfx.runtime.stats import CallStats
from specfx.runtime.tree import EMPTY_TREE, DraftTree, TreeShape

CPU = torch.device("cpu")


@functools.cache
def counting(name: str) -> PreTrainedModel:
    """A target that mostly writes the token of its last input plus 7: its layers add a little, which often decides otherwise."""
    model: Any = tiny_model(name)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.06)
            layer.mlp.down_proj.weight.mul_(0.06)
        model.lm_head.weight.copy_(torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1).roll(7, dims=0))
    return model


def counting_head(model: PreTrainedModel, noise: float = 0.15) -> MtpHead:
    """A head that has learned as much, not too well."""
    head, generator = MtpHead.from_target(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = head.eh_proj.weight
        eye = torch.eye(weight.shape[0])
        weight.copy_(torch.cat([eye, 0 * eye], 1) + noise * torch.randn(weight.shape, generator=generator))
    return head


@functools.cache
def rewritten(name: str, page_size: int) -> tuple[PreTrainedModel, fx.GraphModule]:
    model = tiny_model(name)
    result = run_passes(capture(model), REWRITE, PassContext(page_size))
    assert result.failed is None
    return model, result.module


@functools.cache
def stitched(
    name: str, page_size: int, shape: TreeShape, window: int | None = None, draft_vocab: bool = False, layers: int = 1
) -> tuple[Any, ...]:
    """(target, head, the graph before, the graph after). window: of the head's last layer."""
    model, module = rewritten(name, page_size)
    head = random_head(model, layers=layers)
    head.chain[-1].window = window
    if draft_vocab:
        head.restrict(torch.arange(3, VOCAB, 3))
    part = stitching.capture_drafting(Drafting(head, shape), page_size)
    result = run_passes(module, DRAFTING, PassContext(page_size, drafting=part))
    refusals = [r.refusal for r in result.records if r.refusal is not None]
    assert [str(r) for r in refusals if layers == 1 or r.reason is not Reason.NOTHING_TO_DO] == []
    return model, head, module, result.module


# --- the pass -------------------------------------------------------------------------------------------------------------------


def test_a_chain_of_two_steps_is_stitched_behind_llama() -> None:
    """The target's weights and page table are read again, the head has one more pair of pools, and the walk's moves go into step two."""
    _, _, before, after = stitched("llama", 16, TreeShape(2, 1, 3))
    telling = re.compile(
        r"inputs|pages|next_ids|specfx\.|aten\.(linear\(.*(eh_proj|lm_head)|index_\w+|where|max|cat\(.* 1\))|getitem|return"
    )
    lines = [line for line in difference(before, after).splitlines() if telling.search(line)]
    assert_expected_inline(
        "\n".join(lines),
        """\
@ inputs
-  k_pages_0..1: f32[s4, 16, 2, 8]
-  v_pages_0..1: f32[s4, 16, 2, 8]
+  k_pages_0..2: f32[s4, 16, 2, 8]
+  v_pages_0..2: f32[s4, 16, 2, 8]
@ inputs
+  next_ids: i64[s0]
+  %a0: i64[s5] = aten.index_select(next_ids, 0, logit_rows)
-return (%23, %20, %25)
+  %a2: i64[s5] = aten.where(%a1, %25, %a0)
+  %a3: i64[s0] = aten.index_copy(next_ids, 0, logit_rows, %a2)
+  %a6: i64[1, s0] = specfx.tree_positions(tree_mask, lengths, row_starts, input_ids)
+  %a7: (i64[s1], i32[s1], i64[2, s0]) = specfx.greedy_walk(input_ids, %a3, tree_mask, page_table, lengths, row_starts, 16)
+  %a8: i64[s1] = getitem(%a7, 0)
+  %a9: i32[s1] = getitem(%a7, 1)
+  %a10: i64[2, s0] = getitem(%a7, 2)
+  %a29: f32[1, s0, 32] = aten.linear(%a28, mtp_head_eh_proj_weight f32[32, 64])
+  %a69: f32[s0, 4, 8] = specfx.tree_attention_(%a64, %a66, %a68, tree_mask, page_table, lengths, row_starts, %a11, k_pages_2, v_pages_2, 0.353553)
+  %a70: f32[s1, 4, 8] = aten.index_select(%a69, 0, %a8)
+  %a74: f32[1, s1, 32] = aten.index_select(%a30, 1, %a8)
+  %a0: f32[s1, 1, 128] = aten.linear(in0, model.lm_head.weight f32[128, 32])
+  %a101: (f32[s1, 1, 1], i64[s1, 1, 1]) = aten.max(%a100, -1, True)
+  %a102: i64[s1, 1, 1] = getitem(%a101, 1)
+  %a112: i64[1, s1] = specfx.tree_positions(%a109, %a9, %a111, %a104)
+  %a113: f32[s1, 1, 1] = getitem(%a101, 0)
+  %a139: f32[1, s1, 32] = aten.linear(%a138, mtp_head_eh_proj_weight f32[32, 64])
+  %a179: f32[s1, 4, 8] = specfx.tree_attention_(%a174, %a176, %a178, %a109, page_table, %a9, %a111, %a10, k_pages_2, v_pages_2, 0.353553)
+  %a0: f32[s1, 1, 128] = aten.linear(in0, model.lm_head.weight f32[128, 32])
+  %a209: (f32[s1, 1, 1], i64[s1, 1, 1]) = aten.max(%a208, -1, True)
+  %a210: f32[s1, 1, 1] = getitem(%a209, 0)
+  %a211: i64[s1, 1, 1] = getitem(%a209, 1)
+  %a224: i64[s1, 2] = aten.cat([%a103, %a219], 1)
+  %a225: i64[s1, 2] = aten.cat([%a119, %a223], 1)
+  %a226: f32[s1, 2] = aten.cat([%a117, %a220], 1)
+return (%23, %20, %25, %a224, %a225, %a226)""",
    )


def test_a_second_layer_is_fed_what_the_first_made_of_the_row_above() -> None:
    """Its first position is skipped (the last argument), its tails come and go, and it moves the walked rows in the draft step."""
    _, _, before, after = stitched("llama", 4, TreeShape(2, 1, 3), None, False, 2)
    telling = re.compile(r"inputs|pages_\d\.|tails|specfx\.|aten\.(linear\(.*(eh_proj|lm_head)|index_select|cat\(.* [01]\))|return")
    lines = [line for line in difference(before, after).splitlines() if telling.search(line)]
    assert_expected_inline(
        "\n".join(lines),
        """\
@ inputs
-  k_pages_0..1: f32[s4, 4, 2, 8]
-  v_pages_0..1: f32[s4, 4, 2, 8]
+  k_pages_0..3: f32[s4, 4, 2, 8]
+  v_pages_0..3: f32[s4, 4, 2, 8]
@ inputs
+  tails: f32[s1, 1, 32]
+  %a0: i64[s5] = aten.index_select(next_ids, 0, logit_rows)
-return (%23, %20, %25)
+  %a6: i64[1, s0] = specfx.tree_positions(tree_mask, lengths, row_starts, input_ids)
+  %a8: (i64[s1], i32[s1], i64[2, s0]) = specfx.greedy_walk(input_ids, %a3, tree_mask, page_table, lengths, row_starts, 4)
+  %a29: f32[1, s0, 32] = aten.linear(%a28, mtp_head_eh_proj_weight f32[32, 64])
+  %a69: f32[s0, 4, 8] = specfx.tree_attention_(%a64, %a66, %a68, tree_mask, page_table, lengths, row_starts, moves, k_pages_2, v_pages_2, 0.353553)
+  %a97: f32[s1, 32] = aten.index_select(%a96, 0, %a11)
+  %a99: f32[s1, 32] = aten.select(tails, 1, 0)
+  %a102: i64[s0] = specfx.tree_parents(tree_mask, row_starts, input_ids)
+  %a103: f32[s0, 32] = aten.index_select(%a101, 0, %a102)
+  %a39: f32[s0, 4, 8] = specfx.tree_attention_(%a34, %a36, %a38, tree_mask, page_table, lengths, row_starts, in3, k_pages_a, v_pages_a, 0.353553, 0, 0, None, 1)
+  %a0: f32[s1, 1, 128] = aten.linear(in0, model.lm_head.weight f32[128, 32])
+  %a121: i64[1, s1] = specfx.tree_positions(%a118, %a9, %a120, %a111)
+  %a39: f32[s1, 4, 8] = specfx.tree_attention_(%a34, %a36, %a38, in3, page_table, in4, in5, in6, k_pages_a, v_pages_a, 0.353553, 0, 0, None, 1)
+  %a0: f32[s1, 1, 128] = aten.linear(in0, model.lm_head.weight f32[128, 32])
+  %a149: i64[s1, 2] = aten.cat([%a110, %a144], 1)
+  %a150: i64[s1, 2] = aten.cat([%a130, %a148], 1)
+  %a151: f32[s1, 2] = aten.cat([%a128, %a145], 1)
+  %a152: f32[s1, 1, 32] = aten.cat([%a98], 1)
+return (%23, %20, %25, %a149, %a150, %a151, %a152)""",
    )


def test_weights_that_target_and_head_share_are_read_from_one_place() -> None:
    _, head, before, after = stitched("llama", 16, TreeShape(2, 1, 3))
    places, old = ([t.data_ptr() for t in (*m.parameters(), *m.buffers())] for m in (after, before))
    assert len(places) == len(set(places))
    assert {p.data_ptr() for p in head.parameters()} | set(old) <= set(places)


def test_without_a_head_there_is_nothing_to_stitch() -> None:
    assert "there is no head to stitch" in refused(mtp_head, rewritten("llama", 16)[1])


@functools.cache
def one_step_of_llama() -> fx.GraphModule:
    return stitching.capture_drafting(Drafting(random_head(rewritten("llama", 16)[0]), TreeShape(1, 1, 2)), 16)


@pytest.mark.parametrize(
    ("left_out", "reason"), [("epilogue", "the epilogue pass did not run"), ("tree_mask", "the head needs tree_mask, which the graph does")]
)
def test_a_graph_that_lacks_what_the_head_needs_is_refused(left_out: str, reason: str) -> None:
    model = rewritten("llama", 16)[0]
    part = one_step_of_llama()
    module = run_passes(capture(model), REWRITE, PassContext(16), [left_out]).module
    assert reason in refused(mtp_head, module, PassContext(16, drafting=part))


def test_weights_that_several_steps_use_are_packed_once(kernels: cpu_build.CpuKernels) -> None:
    if not kernels.packs:
        pytest.skip("this CPU has no kernel for packed linears")
    model = tiny_model("llama", initializer_range=0.2).bfloat16()
    part = stitching.capture_drafting(Drafting(MtpHead.from_target(model), TreeShape(2, 2, 6)), 16)
    result = run_passes(capture(model), (*REWRITE, *DRAFTING, pack_linears), PassContext(16, pack=True, drafting=part))
    assert result.failed is None
    linears = calls(result.module, packed_linear)
    weights = {str(n.args[1].target) for n in linears}  # type: ignore[union-attr]
    assert len(linears) == 2 * 4 + 1 + 2 * 6  # a step: eh_proj, four of its layer, the LM head
    assert weights == set(result.module.meta["packed"])
    assert len(weights) == 2 * 4 + 1 + 5  # the LM head is the target's


# --- stitched against eager -----------------------------------------------------------------------------------------------------


class Truth:
    """What the target says behind prompts, from stock `generate`."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int) -> None:
        self.tokens = {i: self.of(model, prompt, count) for i, prompt in enumerate(prompts)}

    @staticmethod
    def of(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
        stock = functools.partial(type(model).generate, model)
        return stock(torch.tensor([list(prompt)]), max_new_tokens=count, do_sample=False)[0].tolist()


def grafted(tree: DraftTree, right: Sequence[int], rng: random.Random) -> DraftTree:
    """`tree` with the path of tokens `right`, each behind a wrong sibling (where the tree doesn't have it already)."""
    nodes = list(zip(tree.tokens, tree.parents, strict=True))
    at = -1
    for token in right:
        place = next((i for i, node in enumerate(nodes) if node == (token, at)), None)
        if place is None:
            taken = {t for t, parent in nodes if parent == at} | {token}
            nodes.append((rng.choice([t for t in range(VOCAB) if t not in taken]), at))
            place = len(nodes)
            nodes.append((token, at))
        at = place
    return DraftTree(tuple(t for t, _ in nodes), tuple(p for _, p in nodes), (1.0,) * len(nodes))


def through_a_later_sibling(tree: DraftTree, rows: Sequence[int]) -> bool:
    return any(tree.parents[row - 1] in tree.parents[: row - 1] for row in rows if row)


def drive(engine: Engine, model: PreTrainedModel, head: MtpHead, shape: TreeShape, steps: int = 6, rests: bool = False) -> list[DraftTree]:
    """Three ragged sequences step by step: each of the engine's drafts must be the eager drafter's. Returns them.

    Prompts: more rows than a mask has bits in one forward, several chunks, one token. In each step the draft, cut short, is verified with a
    part of the truth grafted on, so that paths of all lengths with gaps are accepted; some forwards are never committed. rests: between
    them are forwards, of chains, that are not asked for a draft.
    """
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (70, 23, 1)]
    truth = Truth(model, prompts, 9 * steps).tokens
    done = {seq: len(prompt) for seq, prompt in enumerate(prompts)}  # tokens known, the pending one not counted
    reference, drafted, depths, siblings, moved = MtpDrafter(head, shape), [], [], 0, 0
    latest: dict[int, DraftTree] = {}

    def compare(seq: int, output: RowsOutput) -> None:
        assert output.draft is not None
        (expected,) = reference.propose([seq], [63])
        assert (output.draft.tokens, output.draft.parents) == (expected.tokens, expected.parents)
        assert output.draft.probs == pytest.approx(expected.probs, abs=1e-4)
        assert len(output.draft) == shape.nodes
        latest[seq] = output.draft
        drafted.append(output.draft)

    def rest() -> None:
        chains = {seq: DraftTree.chain([*truth[seq][done[seq] + 1 :][: rng.randrange(2)], rng.randrange(VOCAB)]) for seq in range(3)}
        batch = [Rows(seq, truth[seq][done[seq] : done[seq] + 1], chain, drafts=False) for seq, chain in chains.items()]
        for seq, output in enumerate(engine.forward(batch)):
            assert output.draft is EMPTY_TREE
            assert output.hidden is not None
            walked = chains[seq].walk(output.choice)
            tokens = [output.choice[row] for row in walked]
            engine.commit(seq, walked)
            done[seq] += len(tokens)
            reference.accept(seq, tokens, output.hidden[walked])
            latest[seq] = EMPTY_TREE

    for seq, prompt in enumerate(prompts):
        engine.add(seq, len(prompt) + 9 * steps + 20)
        reference.add(seq, prompt)
        size, hidden = 7 if seq == 1 else 100, []
        for start in range(0, len(prompt), size):
            rows = Rows(seq, prompt[start : start + size], last_only=True, following=next(iter(prompt[start + size :]), None))
            (output,) = engine.forward([rows])
            engine.commit(seq, range(rows.count))
            assert output.hidden is not None
            hidden.append(output.hidden.clone())
        assert output.choice == truth[seq][len(prompt) : len(prompt) + 1]
        reference.accept(seq, output.choice, torch.cat(hidden))
        compare(seq, output)
    for step in range(steps):
        if rests:
            for _ in range(step % 3):
                rest()
        batch = []
        for seq in rng.sample(range(3), 3):
            right = truth[seq][done[seq] + 1 :][: rng.randrange(5)]
            tree = grafted(latest[seq].truncated(rng.randrange(6)), right, rng)
            batch.append(Rows(seq, truth[seq][done[seq] : done[seq] + 1], tree))
        if step % 2:  # rolled back
            engine.forward([Rows(rows.seq, [rng.randrange(VOCAB)], rows.tree) for rows in batch[:2]])
        for rows, output in zip(batch, engine.forward(batch), strict=True):
            assert rows.tree is not None
            assert output.hidden is not None
            seq, walked = rows.seq, rows.tree.walk(output.choice)
            tokens = [output.choice[row] for row in walked]
            assert tokens == truth[seq][done[seq] + 1 :][: len(tokens)]
            engine.commit(seq, walked)
            done[seq] += len(tokens)
            reference.accept(seq, tokens, output.hidden[walked])
            compare(seq, output)
            depths.append(len(walked) - 1)
            siblings += through_a_later_sibling(rows.tree, walked) and len(walked) > 2
            moved += walked != list(range(len(walked)))
    assert max(depths) >= 3
    assert depths.count(0) >= 1
    assert siblings >= 4
    assert moved >= siblings
    for seq in range(3):
        engine.remove(seq)
    return drafted


DRIVES: dict[str, tuple[Any, ...]] = {
    "llama, trees": ("llama", 4, TreeShape(3, 2, 8)),
    "llama, a chain in large pages": ("llama", 16, TreeShape(2, 1, 3)),
    "qwen3, one step": ("qwen3", 16, TreeShape(1, 4, 4)),
    "qwen3, draft vocabulary": ("qwen3", 16, TreeShape(2, 3, 9), None, True),
    "gemma2, windows of target and head": ("gemma2", 4, TreeShape(2, 4, 12), 5),
    "llama, two layers": ("llama", 4, TreeShape(2, 1, 3), None, False, 2),
    "llama, three layers, window, five steps": ("llama", 16, TreeShape(5, 2, 10), 4, True, 3),
    "qwen3, four layers of which three are used": ("qwen3", 16, TreeShape(3, 3, 9), None, False, 4),
}


@pytest.mark.parametrize("case", DRIVES)
def test_stitched_drafts_are_the_eager_drafters(case: str, kernels: cpu_build.CpuKernels) -> None:
    model, head, _, module = stitched(*DRIVES[case])
    shape = DRIVES[case][2]
    engine = graph_engine(module, "auto", CPU, shape.rows)
    drive(engine, model, head, shape)
    assert engine.pool.pages_in_use == 0


def on_demand(module: fx.GraphModule) -> fx.GraphModule:
    result = run_passes(module, (draft_on_demand,), PassContext())
    assert [str(r.refusal) for r in result.records if r.refusal is not None] == []
    return result.module


@pytest.mark.parametrize("case", DRIVES)
def test_drafts_are_made_where_they_are_asked_for(case: str, kernels: cpu_build.CpuKernels) -> None:
    """Rests leave the head's keys and values whole; the next draft is the eager drafter's, who never rests."""
    model, head, _, module = stitched(*DRIVES[case])
    shape = DRIVES[case][2]
    for graph in (module, on_demand(module)):
        drive(graph_engine(graph, "auto", CPU, shape.rows), model, head, shape, rests=True)


def test_a_rest_runs_none_of_the_drafts_steps(kernels: cpu_build.CpuKernels) -> None:
    """But behind a tree with branches, whose accepted rows a draft's first step moves, they run unasked."""
    _, _, _, module = stitched(*DRIVES["llama, trees"])
    branch = on_demand(module)
    ran: list[bool] = []
    assert branch.code  # made now, and then the parts': a module whose code is made in a call is called twice
    for name in ("draft", "no_draft"):
        part = getattr(branch, name)
        assert part.code
        part.register_forward_pre_hook(lambda *_, name=name: ran.append(name == "draft"))
    engine = graph_engine(branch, "auto", CPU, 16)
    engine.add(0, 60)
    engine.forward([Rows(0, [1, 2, 3], last_only=True, drafts=False)])
    engine.commit(0, range(3))
    for tree, asked in itertools.product((None, DraftTree.chain([4, 5]), DraftTree((4, 5), (-1, -1), (0.5, 0.5))), (False, True)):
        (output,) = engine.forward([Rows(0, [7], tree, drafts=asked)])
        assert output.draft is not None
        assert (len(output.draft) > 0) == ran[-1] == (asked or (tree is not None and not tree.is_chain))
    assert ran == [False, False, True, False, True, True, True]


def test_the_steps_of_a_draft_become_a_branch() -> None:
    _, _, before, module = stitched("llama", 16, TreeShape(2, 1, 3))
    after = on_demand(module)
    lines = difference(module, after).splitlines()
    assert_expected_inline(
        "\n".join(line for line in lines if line.startswith("+")),
        """\
+  drafting: bool[]
+  %a0: (i64[s1, 2], i64[s1, 2], f32[s1, 2]) = cond(drafting, draft ?, no_draft ?, (input_ids, %29, tree_mask, page_table, lengths, row_starts, %95, mtp_head_layer_self_attn_o_proj_weight f32[32, 32], %56, mtp_head_layer_post_attention_layernorm_weight f32[32], mtp_head_layer_mlp_gate_proj_weight f32[64, 32], mtp_head_layer_mlp_up_proj_weight f32[64, 32], mtp_head_layer_mlp_down_proj_weight f32[32, 64], mtp_head_norm_weight f32[32], model.lm_head.weight f32[128, 32], model.model.embed_tokens.weight f32[128, 32], mtp_head_enorm_weight f32[32], mtp_head_hnorm_weight f32[32], mtp_head_eh_proj_weight f32[32, 64], layer2.%2, mtp_head_layer_input_layernorm_weight f32[32], mtp_head_layer_self_attn_q_proj_weight f32[32, 32], mtp_head_layer_self_attn_k_proj_weight f32[16, 32], mtp_head_layer_self_attn_v_proj_weight f32[16, 32], k_pages_2, v_pages_2))
+  %a1: i64[s1, 2] = getitem(%a0, 0)
+  %a2: i64[s1, 2] = getitem(%a0, 1)
+  %a3: f32[s1, 2] = getitem(%a0, 2)
+return (%25, %22, %27, %a1, %a2, %a3)""",
    )
    assert len(calls(after, tree_attention_)) == len(calls(before, tree_attention_)) + 1  # the pairs
    assert len(calls(after.draft, tree_attention_)) == 1  # type: ignore[arg-type]
    assert calls(after.no_draft, tree_attention_) == []  # type: ignore[arg-type]


def test_the_only_step_of_a_head_becomes_a_branch_behind_its_keys_and_values() -> None:
    after = on_demand(stitched(*DRIVES["qwen3, one step"])[3])
    assert len(calls(after.draft, torch.ops.aten.linear.default)) == 5  # type: ignore[arg-type]  # behind the attention, which is of all pairs
    assert calls(after.draft, tree_attention_) == calls(after.no_draft, tree_attention_) == []  # type: ignore[arg-type]


def test_where_there_is_no_head_there_is_no_branch() -> None:
    assert "no head is stitched in" in refused(draft_on_demand, rewritten("llama", 16)[1], reason=Reason.NOTHING_TO_DO)


@pytest.mark.parametrize("case", ["llama, trees", "qwen3, one step"])
def test_a_pool_of_just_the_pages_that_are_needed_suffices(case: str, kernels: cpu_build.CpuKernels) -> None:
    """To the last token: what a sequence reserves has room for the rows that drafting needs."""
    _, page_size, shape, *_ = DRIVES[case]
    model, head, _, module = stitched(*DRIVES[case])
    prompts, count, most = [[5] * 70, [9, 8, 7]], 25, 15
    need = sum(-(-(len(p) + count + most + 1 + shape.rows) // page_size) for p in prompts)
    for pages in (need, need - 1):
        engine = graph_engine(module, pages, CPU, shape.rows)
        runtime = Runtime(engine, MtpDrafter(head, shape), most, CallStats())
        generated = {}
        try:
            for i, prompt in enumerate(prompts):
                if pages < need and i == 1:
                    with pytest.raises(KVPoolError, match=f"holds {pages} pages"):
                        runtime.add(prompt, count, lambda token: False)
                else:
                    first = runtime.add(prompt, count, lambda token: False)
                    generated[first.seq] = [*prompt, *first.tokens]
            while runtime.sequences:
                for committed in runtime.step():
                    generated[committed.seq] += committed.tokens
        finally:
            runtime.close()
        assert list(generated.values()) == [Truth.of(model, p, count) for p in prompts[: len(generated)]]
        assert len(generated) == (2 if pages == need else 1)
        assert engine.pool.pages_in_use == 0


# --- generate -------------------------------------------------------------------------------------------------------------------


def watch(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[DraftTree, list[int]]]:
    """(tree, committed rows) of each step from now on."""
    seen: list[tuple[DraftTree, list[int]]] = []
    latest: dict[int, Rows] = {}
    forward, commit = engine.forward, engine.commit

    def watched_forward(batch: Sequence[Rows]) -> list[RowsOutput]:
        latest.update({rows.seq: rows for rows in batch})
        return forward(batch)

    def watched_commit(seq: int, rows: Sequence[int]) -> None:
        commit(seq, rows)
        tree = latest[seq].tree
        if tree is not None:
            seen.append((tree, list(rows)))

    monkeypatch.setattr(engine, "forward", watched_forward)
    monkeypatch.setattr(engine, "commit", watched_commit)
    return seen


def padded_batch() -> dict[str, Tensor]:
    """Prompts of 80, 30 and 1 tokens."""
    ids = torch.randint(1, VOCAB, (3, 80), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(80)[None] >= torch.tensor([[0], [50], [79]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


class Interrupt(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Any:
        if input_ids.shape[1] > 12:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "page_size", "shape"), [("llama", 4, (2, 4, 12)), ("qwen3", 16, (3, 2, 8)), ("mistral", 4, (2, 3, 8))], ids=lambda x: str(x)
)
def test_generate_is_stocks_while_the_graph_drafts(
    name: str, page_size: int, shape: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: cpu_build.CpuKernels
) -> None:
    model, batch = counting(name), padded_batch()
    settings: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0}
    monkeypatch.setattr("specfx.runtime.session.PREFILL_CHUNK", 7)
    expected = model.generate(**batch, **settings)
    penalised = model.generate(**batch, **settings, repetition_penalty=1.3)
    assert not torch.equal(expected, penalised)
    steps, topk, most = shape
    file = save_head(counting_head(model), tmp_path)
    options: dict[str, Any] = {"num_steps": steps, "topk": topk, "num_draft_tokens": most, "page_size": page_size, "engine": "graph"}
    with specfx.speculating(model, "mtp", head=file, min_token_prob=0, **options):
        engine = engine_of(model)
        assert specfx.explain(model).refusals == ()
        assert engine.drafts
        with monkeypatch.context() as patch:
            seen = watch(engine, patch)
            eager: list[int] = []
            patch.setattr(MtpDrafter, "_tree", lambda self, state: eager.append(1))
            assert torch.equal(model.generate(**batch, **settings), expected)
            assert eager == []  # all drafts came from the graph
        deep = [(tree, rows) for tree, rows in seen if len(rows) > 2]
        assert len(deep) >= 5
        assert any(rows != list(range(len(rows))) for _, rows in deep)
        assert any(through_a_later_sibling(tree, rows) for tree, rows in deep)
        assert specfx.stats(model).last.tokens_per_forward > 1.3
        with monkeypatch.context() as patch:
            drafts: list[int] = []
            real = MtpDrafter._tree
            patch.setattr(MtpDrafter, "_tree", lambda self, state: drafts.append(1) or real(self, state))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a penalised text is not what the head has learned
                assert torch.equal(model.generate(**batch, **settings, repetition_penalty=1.3), penalised)
            assert drafts  # those of the graph hang on the unpenalised choice
        with pytest.raises(KeyboardInterrupt):
            model.generate(torch.tensor([[3, 1, 4]]), **settings, stopping_criteria=StoppingCriteriaList([Interrupt()]))
        assert specfx.explain(model).pages_in_use == 0
        assert torch.equal(model.generate(**batch, **settings), expected)
        assert specfx.explain(model).pages_in_use == 0


def test_a_sampled_step_is_one_call_of_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: cpu_build.CpuKernels) -> None:
    """With transformers' standard warpers nothing is asked of the host, and the head's drafts hang on what was drawn."""
    model, batch = counting("llama"), padded_batch()
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    settings |= {"pad_token_id": 0}
    texts: dict[Any, Tensor] = {}
    for method, options in ((None, {}), ("mtp", {"head": save_head(counting_head(model), tmp_path), "min_token_prob": 0})):
        with specfx.speculating(model, method, engine="graph", compile="off", **options), monkeypatch.context() as patch:
            engine, count, call = engine_of(model), Counter[str](), engine_of(model).call
            patch.setattr(MtpDrafter, "_tree", lambda self, state, count=count: count.update(["drafts of the host"]))
            patch.setattr(LogitsProcessorList, "__call__", lambda self, ids, scores, count=count: count.update(["processors"]))
            patch.setattr(engine, "call", lambda *inputs, call=call, count=count: count.update(["graph"]) or call(*inputs))
            torch.manual_seed(3)
            texts[method] = model.generate(**batch, **settings)
            last = specfx.stats(model).last
            assert count == {"graph": last.forwards + 1}  # one for all prompts
    assert torch.equal(texts[None], texts["mtp"])
    assert last.tokens_per_forward > 1.1
    assert not torch.equal(texts[None], model.generate(**batch, **settings | {"do_sample": False}))


@pytest.mark.parametrize(("switched_off", "reason"), [("mtp_head", Reason.SWITCHED_OFF), ("epilogue", Reason.DRAFTING_APART)])
def test_where_the_head_is_not_stitched_the_drafter_drafts_beside_the_graph(
    switched_off: str, reason: Reason, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = counting("llama"), padded_batch()
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**batch, **settings)
    file = save_head(counting_head(model), tmp_path)
    with specfx.speculating(model, "mtp", head=file, engine="graph", page_size=16, disable_passes=(switched_off,)):
        refusals = {r.stage: r for r in specfx.explain(model).refusals}
        assert refusals["mtp drafting"].reason is reason
        engine = engine_of(model)
        assert not engine.drafts
        assert engine.verifies == "trees"
        seen = watch(engine, monkeypatch)
        assert torch.equal(model.generate(**batch, **settings), expected)
        assert any(through_a_later_sibling(tree, rows) for tree, rows in seen)


# --- the gate -------------------------------------------------------------------------------------------------------------------

Sabotage = Callable[[pytest.MonkeyPatch], None]


def instead_of_the_walk(change: Callable[..., tuple[Tensor, ...]]) -> Sabotage:
    """change: ``(leaf, lengths, moves, the op's arguments) -> (leaf, lengths, moves)``."""
    return lambda patch: patch.setattr(stitching, "greedy_walk", lambda *a: change(*greedy_walk(*a), *a))


def instead_of_the_step(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Sabotage:
    """change: of a step's ``(tokens, hidden, masks)``."""
    real = stitching.draft
    return lambda patch: patch.setattr(
        stitching, "draft", lambda hidden, step, *more: real(hidden, lambda layer, *rows: step(layer, *change(*rows)), *more)
    )


def instead_of_the_draft(change: Callable[..., tuple[Tensor, ...]]) -> Sabotage:
    """change: ``(tokens, parents, scores) -> the same``."""
    real = stitching.draft
    return lambda patch: patch.setattr(stitching, "draft", lambda *a: change(*real(*a)))


def own_bits(masks: Tensor) -> Tensor:
    return torch.bitwise_left_shift(torch.ones_like(masks), torch.arange(masks.shape[1]))


def instead_of_attending(change: Callable[..., tuple[Any, ...]]) -> Sabotage:
    """change: ``(pools, metadata, window, skip) -> the same``."""
    real = stitching._attending
    return lambda patch: patch.setattr(stitching, "_attending", lambda *a: real(*change(*a)))


def without_moves(pools: Any, metadata: tuple[Tensor, ...], *more: int) -> tuple[Any, ...]:
    return pools, (*metadata[:4], torch.full_like(metadata[4], -1)), *more


def own_rows_above(patch: pytest.MonkeyPatch) -> None:
    def itself(tree_mask: Tensor, row_starts: Tensor, input_ids: Tensor) -> Tensor:
        return torch.arange(input_ids.shape[1]) + row_starts.shape[0] - 1

    patch.setattr(stitching, "tree_parents", itself)


def tails_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = PagedEngine.bind
    patch.setattr(PagedEngine, "bind", lambda self, batch: {n: 0 * x if n == "tails" else x for n, x in real(self, batch).items()})


def tails_too_early(patch: pytest.MonkeyPatch) -> None:
    def bind(self: Any, batch: Sequence[Rows]) -> dict[str, Tensor]:
        self._tails |= self._new_tails
        return real(self, batch)

    real = PagedEngine.bind
    patch.setattr(PagedEngine, "bind", bind)


def permuted_weight(patch: pytest.MonkeyPatch) -> None:
    real = mtp_head_pass._weight

    def weight(module: fx.GraphModule, head: fx.GraphModule, node: fx.Node, known: Any) -> fx.Node:
        result = real(module, head, node, known)
        if "k_proj" in str(node.target):
            tensor = getattr(module, str(result.target))
            setattr(module, str(result.target), tensor.roll(1, 0))
        return result

    patch.setattr(mtp_head_pass, "_weight", weight)


def rest_of_the_prompt_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = PagedEngine.bind
    patch.setattr(PagedEngine, "bind", lambda self, batch: real(self, [replace(rows, following=None) for rows in batch]))


SHAPES: dict[int, dict[str, int]] = {
    1: {"num_steps": 1, "topk": 3, "num_draft_tokens": 4},
    2: {"num_steps": 2, "topk": 2, "num_draft_tokens": 5},
    3: {"num_steps": 3, "topk": 1, "num_draft_tokens": 4},
    4: {"num_steps": 4, "topk": 2, "num_draft_tokens": 8},
}
"""By number of steps; a head of four steps has two layers."""
SABOTAGES: dict[str, tuple[int, Sabotage | None]] = {
    "nothing": (3, None),
    "nothing, one step": (1, None),
    "a window that the head does not have": (1, instead_of_attending(lambda pools, metadata, window, skip: (pools, metadata, 3, skip))),
    "ancestors not seen": (3, instead_of_the_step(lambda tokens, hidden, masks: (tokens, hidden, own_bits(masks)))),
    "fed with the wrong hidden states": (3, instead_of_the_step(lambda tokens, hidden, masks: (tokens, hidden.roll(1, 1), masks))),
    "a weight permuted": (1, permuted_weight),
    "moves dropped": (2, instead_of_the_walk(lambda leaf, lengths, moves, *a: (leaf, lengths, torch.full_like(moves, -1)))),
    "moves dropped, one step": (1, instead_of_attending(without_moves)),
    "nothing walked": (2, instead_of_the_walk(lambda leaf, lengths, moves, *a: (a[5][:-1].long(), lengths, moves))),
    "drafted rows over the walked ones": (2, instead_of_the_walk(lambda leaf, lengths, moves, *a: (leaf, a[4], moves))),
    "the rest of the prompt forgotten": (1, rest_of_the_prompt_forgotten),
    "too confident": (1, instead_of_the_draft(lambda tokens, parents, scores: (tokens, parents, 0.9 * scores))),
    "nothing, two layers": (4, None),
    "the first position seen": (4, instead_of_attending(lambda pools, metadata, window, skip: (pools, metadata, window, 0))),
    "the row itself taken for the one above": (4, own_rows_above),
    "tails forgotten": (4, tails_forgotten),
    "tails of forwards that were not committed": (4, tails_too_early),
    "never the best token": (1, instead_of_the_draft(lambda tokens, parents, scores: (127 - tokens, parents, scores))),
}


@pytest.fixture(scope="module")
def served(kernels: cpu_build.CpuKernels) -> Iterator[PreTrainedModel]:
    """A model whose engines are prepared once, to have heads stitched to them."""
    model = specfx.speculate(tiny_model("llama"), engine="graph", page_size=16)
    yield model
    specfx.restore(model)


@pytest.mark.parametrize("case", SABOTAGES)
def test_a_graph_that_drafts_anything_else_does_not_serve(
    case: str, served: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused for what it drafts, and tokens are stock's whatever happens."""
    steps, sabotage = SABOTAGES[case]
    noise = 0.2 + 0.001 * list(SABOTAGES).index(case)  # each case has a head of its own
    head = random_head(served, noise, layers=2 if steps == 4 else 1)
    file = save_head(head, tmp_path)
    if sabotage is not None:
        sabotage(monkeypatch)
    specfx.speculate(served, "mtp", head=file, engine="graph", page_size=16, **SHAPES[steps])
    refusals = specfx.explain(served).refusals
    assert engine_of(served).drafts is (sabotage is None)
    if sabotage is None:
        assert refusals == ()
    else:
        (refusal,) = refusals
        assert refusal.reason is Reason.DRAFTING_APART
        assert "drafts: log-probabilities differ by" in refusal.detail
    prompt = torch.tensor([[5, 3, 9, 1]])
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert served.generate(prompt, **settings)[0].tolist() == Truth.of(served, prompt[0].tolist(), 12)


# --- compiled -------------------------------------------------------------------------------------------------------------------


def test_the_compiled_engine_drafts_the_same_and_copies_no_pool(tmp_path: Path, kernels: cpu_build.CpuKernels) -> None:
    model, shape = tiny_model("llama", num_hidden_layers=1), TreeShape(2, 1, 3)
    file = save_head(random_head(model), tmp_path / "head")
    options: dict[str, Any] = {"num_steps": 2, "topk": 1, "page_size": 16, "engine": "compiled", "compile": "sync"}
    _, codes = run_and_get_code(lambda: specfx.speculate(model, "mtp", head=file, **options))
    wrapper: Any = model.generate
    ladder, drafter = wrapper.ready(), wrapper.drafter
    assert {r.reason for r in specfx.explain(model).refusals} <= {Reason.WEIGHTS_NOT_PACKED}  # they are float32
    assert isinstance(ladder.engine, CompiledEngine)
    assert ladder.engine.drafts
    (code,) = codes
    assert len(attention_calls(code)) == 1 + 2 == len(calls(ladder.module, tree_attention_))
    pools = pools_in(code)
    assert len(set(pools)) == 2 * 2 + 2  # the draft's step is a branch, which is handed the head's
    assert all(pool.startswith(("arg", "true_graph_0_arg")) and pool.isidentifier() for pool in pools), pools
    assert pool_traffic(code, set(pools)) == []
    assert DRAFTING_INPUT in ladder.engine.inputs
    ours = drive(ladder.engine, model, drafter.head, shape, rests=True)
    theirs = drive(graph_engine(ladder.module, "auto", CPU, shape.rows), model, drafter.head, shape, rests=True)
    for a, b in itertools.zip_longest(ours, theirs):
        assert (a.tokens, a.parents) == (b.tokens, b.parents)
        assert a.probs == pytest.approx(b.probs, abs=1e-4)
    prompt = [5, 3, 9, 1]
    assert model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0].tolist() == Truth.of(model, prompt, 30)
