"""Steps replayed as CUDA graphs, without a GPU: padding, static inputs, what is recorded when, and what happens when it fails.

`Recorded` stands in for `torch.cuda.CUDAGraph`: it runs the recorded function again on its static inputs and copies the results to
the static outputs, and, as graphs that share memory may, overwrites the outputs of all other recordings.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_api import prompt_of
from test_mtp_graph import DRIVES, drive, stitched
from tiny import VOCAB, tiny_model
from torch import Tensor, fx

import specfx
from specfx import _compat, gate
from specfx.capture import capture
from specfx.engines import cuda_graphs, transfer
from specfx.engines.base import Rows
from specfx.engines.choose import Ladder, Prepared
from specfx.engines.compiled import CompiledEngine, Lowered
from specfx.engines.cuda_graphs import CudaRecorder, replay
from specfx.engines.padding import Sizes, dummy_rows, fill, inputs_like, sizes_for
from specfx.engines.paged import PagedEngine, graph_engine, on_references
from specfx.errors import LoweringError, Reason, Refusal
from specfx.kernels import cpu_build, triton_kernels
from specfx.kernels.keyed_sample import Draw
from specfx.options import CommonOptions
from specfx.passes.framework import PassContext, run_passes
from specfx.passes.pack_linears import pack_linears
from specfx.passes.pipeline import LOWERING, REWRITE
from specfx.runtime.kv_pool import KVPool, LayerShape
from specfx.runtime.tree import MAX_ROWS, DraftTree

CPU = torch.device("cpu")
PAGE_SIZE = 4
NAN = float("nan")


class Recorded:
    """A `Recorder`. sizes: rows of each recording, in order; replays: how many there were. fails_at: the recording that fails."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.sizes: list[int] = []
        self.replays = 0
        self.fails_at = fails_at
        self._outputs: list[Sequence[Tensor]] = []

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        outputs = [x.clone() for x in run()]
        if self.fails_at == len(self.sizes):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.sizes.append(outputs[1].shape[1])
        self._outputs.append(outputs)

        def again() -> None:
            self.replays += 1
            for others in self._outputs:
                for x in others:
                    x.fill_(NAN if x.is_floating_point() else 1 << 40)
            for static, new in zip(outputs, run(), strict=True):
                static.copy_(new)

        return again, outputs


def rewritten(name: str = "llama", disabled: Sequence[str] = (), **settings: Any) -> fx.GraphModule:
    return run_passes(capture(tiny_model(name, **settings)), REWRITE, PassContext(PAGE_SIZE), disabled).module


def replaying(module: fx.GraphModule, recorder: Recorded, refusals: list[Refusal] | None = None, references: bool = False) -> PagedEngine:
    call: Any = on_references(module) if references else module
    engine = PagedEngine("graph", module, call, "auto", CPU)
    replay(engine, ([] if refusals is None else refusals).append, lambda: recorder)
    return engine


# --- sizes ----------------------------------------------------------------------------------------------------------------------


counts_of_batches = st.lists(st.integers(1, MAX_ROWS), min_size=1, max_size=20)


@given(counts=counts_of_batches, columns=st.integers(1, 300), moves=st.integers(1, 300), scratch=st.integers(1, 70))
def test_padding_fills_whole_dummy_sequences_of_at_most_64_rows(counts: list[int], columns: int, moves: int, scratch: int) -> None:
    sizes = sizes_for(sum(counts), len(counts), columns, moves, scratch)
    dummies, rows = sizes.sequences - len(counts), sizes.rows - sum(counts)
    assert (dummies == 0) == (rows == 0)
    if dummies:
        assert all(1 <= n <= MAX_ROWS for n in dummy_rows(rows, dummies))
        assert sum(dummy_rows(rows, dummies)) == rows
    assert all(1 <= n <= MAX_ROWS for n in dummy_rows(sizes.rows, sizes.sequences))  # what is recorded is dummies alone
    assert sizes.columns >= max(columns, scratch)
    assert sizes.moves >= moves


def test_one_sequence_of_up_to_64_rows_has_few_sizes_and_exact_ones_have_no_dummies() -> None:
    sizes = {rows: sizes_for(rows, 1, 1, 1) for rows in range(1, 65)}
    assert sizes[8] == Sizes(8, 1, 1, 32)
    assert sizes[5] == sizes[7] == Sizes(8, 2, 1, 32)
    assert sizes[16] == Sizes(16, 1, 1, 32)
    assert sizes[17].rows == 32
    assert len(set(sizes.values())) == 7 + 5


def test_batches_are_rounded_up() -> None:
    assert sizes_for(8, 8, 5, 40) == Sizes(8, 8, 8, 64)
    assert sizes_for(5, 5, 1, 1) == Sizes(8, 8, 1, 32)
    assert sizes_for(11, 8, 1, 1) == Sizes(16, 9, 1, 32)
    assert sizes_for(100, 7, 1, 1) == Sizes(128, 8, 1, 32)
    assert sizes_for(300, 32, 1, 1) == Sizes(320, 33, 1, 32)


# --- padded inputs --------------------------------------------------------------------------------------------------------------


def padded(given: dict[str, Tensor], sizes: Sizes, scratch: Sequence[int]) -> dict[str, Tensor]:
    """Filled into arrays that hold something else before."""
    out = {name: x.fill_(0x5A5A5A5A) for name, x in inputs_like(sizes, list(given)).items()}
    fill({name: x.numpy() for name, x in out.items()}, {name: x.numpy() for name, x in given.items()}, scratch)
    assert {name: x.dtype for name, x in out.items()} == {name: x.dtype for name, x in given.items()}
    return out


def a_tree(tokens: Sequence[int], parents: Sequence[int]) -> DraftTree:
    return DraftTree(tuple(tokens), tuple(parents), (1.0,) * len(tokens))


def test_padding_stands_behind_what_is_live_and_names_scratch_pages_alone() -> None:
    engine = graph_engine(rewritten(), "auto", CPU)
    engine.add(0, 9)
    engine.add(1, 4)
    batch = [Rows(0, [7], a_tree([5, 6, 9], [-1, -1, 0])), Rows(1, [1, 2, 3], last_only=True)]
    given = {name: x for name, x in engine.bind(batch).items() if name not in engine.pool_names}
    out = padded(given, Sizes(16, 4, 4, 32), [90, 91])
    assert out["input_ids"].tolist() == [[7, 5, 6, 9, 1, 2, 3] + [0] * 9]
    assert out["row_starts"].tolist() == [0, 4, 7, 12, 16]
    assert out["lengths"].tolist() == [0, 0, 0, 0]
    assert out["page_table"][:2, :3].equal(given["page_table"])
    assert out["page_table"][2:].tolist() == [[90, 91, 90, 90]] * 2
    assert out["tree_mask"].tolist()[7:] == [1, 3, 5, 9, 17, 1, 3, 5, 9]
    assert out["logit_rows"].tolist()[:5] == given["logit_rows"].tolist() == [0, 1, 2, 3, 6]
    assert sorted(out["logit_rows"].tolist()) == list(range(16))
    assert out["moves"].shape == (2, 32)
    assert out["moves"].eq(-1).all()
    assert not set(out["input_ids"][0, 7:].tolist()) & set(out["next_ids"][7:].tolist())


def test_an_exact_fit_is_left_as_it_is() -> None:
    engine = graph_engine(rewritten(), "auto", CPU)
    engine.add(0, 4)
    given = {name: x for name, x in engine.bind([Rows(0, [7, 8])]).items() if name not in engine.pool_names}
    out = padded(given, Sizes(2, 1, 1, 1), [9])
    assert all(out[name].equal(x) for name, x in given.items())


# --- replays of a real graph ----------------------------------------------------------------------------------------------------


def random_tree(pick: random.Random, nodes: int) -> DraftTree:
    parents = [pick.randrange(-1, i) for i in range(nodes)]
    tokens = pick.sample(range(VOCAB), nodes)
    return a_tree(tokens, parents)


def random_rows(pick: random.Random, seq: int, prompt: bool, trees: bool) -> Rows:
    draw = Draw(5, seq, 1.5, 20, 0.9, 0.01) if seq % 2 else None
    if prompt:
        return Rows(seq, [pick.randrange(VOCAB) for _ in range(pick.choice([1, 3, 30, 64, 70]))], last_only=pick.random() < 0.5, draw=draw)
    nodes = pick.choice([0, 0, 1, 3, 7, 15, 20])
    tree = random_tree(pick, nodes) if trees else DraftTree.chain(pick.sample(range(VOCAB), nodes))
    return Rows(seq, [pick.randrange(VOCAB)], tree, draw=draw)


def path_in(pick: random.Random, rows: Rows) -> list[int]:
    """Rows to commit: all of a prompt, or a path of the tree."""
    if rows.tree is None:
        return list(range(rows.count))
    path, row = [0], 0
    while children := [i + 1 for i, parent in enumerate(rows.tree.parents) if parent + 1 == row]:
        if pick.random() < 0.3:
            break
        row = pick.choice(children)
        path.append(row)
    return path


def kept(engine: PagedEngine, seq: int) -> list[Tensor]:
    """Keys and values at the committed positions of `seq`, with its moves done."""
    pool, found = engine.pool, []
    table = pool.page_table([seq])[0].tolist()
    state = pool._sequences[seq]
    slots = [table[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(state.length)]
    moved = {target: source for source, target in state.moves}
    for pages in pool.pools:
        found.append(pages.flatten(0, 1)[[moved.get(slot, slot) for slot in slots]])
    return found


def poison_free_pages(engine: PagedEngine) -> None:
    for pages in engine.pool.pools:
        pages[engine.pool._free] = NAN


def free_pages_are_poison(engine: PagedEngine) -> bool:
    return all(bool(pages[engine.pool._free].isnan().all()) for pages in engine.pool.pools)


CASES: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "llama on the references": ("llama", (), True),
    "llama": ("llama", (), False),
    "gemma2, windows": ("gemma2", (), False),
    "gpt2, positions from a table": ("gpt2", (), False),
    "chains": ("llama", ("tree_mask",), False),
    "logits of all rows": ("qwen3", ("epilogue",), False),
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_the_unpadded_ones(case: str, kernels: cpu_build.CpuKernels) -> None:
    """Random ragged batches with commits, sequences that come and go, and a growing pool: same numbers, same KV, nothing else written."""
    name, disabled, references = CASES[case]
    module = rewritten(name, disabled)
    recorder, pick = Recorded(), random.Random(case)
    refusals: list[Refusal] = []
    theirs = PagedEngine("graph", module, on_references(module) if references else module, "auto", CPU)  # type: ignore[arg-type]
    ours = replaying(module, recorder, refusals, references)
    active: dict[int, bool] = {}
    forwards, longer = 0, 0
    for step in range(40):
        if not active or (len(active) < 7 and pick.random() < 0.4):
            for engine in (ours, theirs):
                engine.add(step, 400)
            active[step] = True
            poison_free_pages(ours)
        if len(active) > 3 and pick.random() < 0.2:
            gone = pick.choice(list(active))
            for engine in (ours, theirs):
                engine.remove(gone)
            poison_free_pages(ours)
            del active[gone]
        seqs = pick.sample(list(active), pick.randint(1, len(active)))
        batch = [random_rows(pick, seq, active[seq], ours.verifies == "trees") for seq in seqs]
        batch = [r for r in batch if ours.length(r.seq) + r.count <= 400]
        if not batch:
            continue
        forwards += 1
        longer += any(r.count > MAX_ROWS for r in batch)
        outputs = [(x.choice, x.logits.clone(), x.hidden) for x in ours.forward(batch)]
        for (choice, logits, hidden), expected in zip(outputs, theirs.forward(batch), strict=True):
            assert choice == expected.choice
            torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(hidden, expected.hidden, rtol=1e-5, atol=1e-5)
            assert logits.shape == expected.logits.shape
        for rows in batch:
            if pick.random() < 0.9:  # else rolled back
                path = path_in(pick, rows)
                ours.commit(rows.seq, path)
                theirs.commit(rows.seq, path)
                active[rows.seq] = False
        for seq in active:
            for a, b in zip(kept(ours, seq), kept(theirs, seq), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert free_pages_are_poison(ours)
    assert refusals == []
    assert longer > 0
    assert recorder.replays == forwards - longer
    assert len(recorder.sizes) < recorder.replays


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_live_rows_are_bit_equal_where_arithmetic_does_not_depend_on_the_number_of_rows(name: str) -> None:
    """One row at a time goes through every product, so that what padding changes can only be what is attended to."""

    class OneByOne(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
                *bias, rows, weight = args
                return torch.cat([function(*bias, row, weight, **(kwargs or {})) for row in rows.split(1)])
            return function(*args, **(kwargs or {}))

    module = rewritten(name)
    theirs = PagedEngine("graph", module, on_references(module), "auto", CPU)
    ours = replaying(module, Recorded(), references=True)
    pick = random.Random(0)
    for engine in (ours, theirs):
        for seq in range(3):
            engine.add(seq, 100)
    with OneByOne():
        for step in range(4):
            batch = [random_rows(pick, seq, False, True) for seq in range(3) if step == 0 or pick.random() < 0.7]
            for got, expected in zip(ours.forward(batch), theirs.forward(batch), strict=True):
                assert got.logits.equal(expected.logits)
                assert got.hidden is not None
                assert got.hidden.equal(expected.hidden)
            for rows in batch:
                path = path_in(pick, rows)
                ours.commit(rows.seq, path)
                theirs.commit(rows.seq, path)


@pytest.mark.parametrize("case", DRIVES)
def test_a_stitched_head_drafts_the_same_in_replays(case: str, kernels: cpu_build.CpuKernels) -> None:
    model, head, _, module = stitched(*DRIVES[case])
    shape = DRIVES[case][2]
    recorder = Recorded()
    refusals: list[Refusal] = []
    engine = graph_engine(module, "auto", CPU, shape.rows)
    replay(engine, refusals.append, lambda: recorder)
    drive(engine, model, head, shape)  # against the eager drafter and stock greedy decoding
    assert refusals == []
    assert recorder.replays > 5
    assert engine.pool.pages_in_use == 0


def test_a_size_is_recorded_once_and_again_when_the_pools_have_moved() -> None:
    recorder = Recorded()
    engine = replaying(rewritten(), recorder)
    engine.add(0, 20)
    for _ in range(3):
        engine.forward([Rows(0, [3, 1, 4])])
    assert (len(recorder.sizes), recorder.replays) == (1, 3)
    engine.forward([Rows(0, [3])])
    assert recorder.sizes == [4, 1]
    before = [p.data_ptr() for p in engine.pool.pools]
    engine.add(1, 4000)
    assert before != [p.data_ptr() for p in engine.pool.pools]
    engine.forward([Rows(0, [3])])
    assert recorder.sizes == [4, 1, 1]


def test_the_least_recently_used_recording_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 2)
    recorder = Recorded()
    engine = replaying(rewritten(), recorder)
    engine.add(0, 100)
    for rows in (1, 2, 1, 4, 1, 2):
        engine.forward([Rows(0, [3] * rows)])
    assert recorder.sizes == [1, 2, 4, 2]


@pytest.mark.parametrize("fails_at", [0, 1])
def test_where_recording_fails_the_call_itself_serves_and_says_why_once(fails_at: int) -> None:
    module, refusals = rewritten(), []
    theirs, ours = graph_engine(module, "auto", CPU), replaying(module, Recorded(fails_at), refusals)
    for engine in (ours, theirs):
        engine.add(0, 100)
        engine.forward([Rows(0, [3, 1, 4])])
        engine.commit(0, range(3))
    poison_free_pages(ours)
    for tokens in ([2], [2, 7, 1, 8, 2], [2, 8]):
        (got,), (expected,) = ours.forward([Rows(0, tokens)]), theirs.forward([Rows(0, tokens)])
        assert got.choice == expected.choice
        torch.testing.assert_close(got.logits, expected.logits)
    assert free_pages_are_poison(ours)
    (refusal,) = refusals
    assert refusal.stage == "CUDA graphs"
    assert refusal.reason is Reason.NOT_RECORDED
    assert "RuntimeError: operation not permitted when stream is capturing" in refusal.detail
    assert "cuda_graphs=False" in refusal.remedy


def lowered_engine(tune: Any = None) -> CompiledEngine:
    """A compiled engine without Inductor; `tune` takes the place of its `tuned`."""
    module = run_passes(rewritten(num_hidden_layers=1), LOWERING, PassContext(PAGE_SIZE)).module
    engine = CompiledEngine(Lowered(module, module, ()), "auto", CPU)
    if tune is not None:
        engine.tuned = lambda inputs: tune(engine, inputs)  # type: ignore[method-assign]
    return engine


def test_tuned_steps_have_fixed_sizes_and_are_the_untuned_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def lower(module: fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]) -> Any:
        asked.append(options)
        assert all(isinstance(n, int) for x in examples for n in x.shape)
        return inductor(module, examples, options | {"max_autotune": False})  # measures what this machine's Inductor has beside C++

    inductor = _compat.inductor_compile
    monkeypatch.setattr(_compat, "inductor_compile", lower)
    refusals: list[Refusal] = []
    recorder, theirs, ours = Recorded(), lowered_engine(), lowered_engine()
    replay(ours, refusals.append, lambda: recorder, max_autotune=True)
    for engine in (ours, theirs):
        engine.add(0, 20)
    (got,), (expected,) = (engine.forward([Rows(0, [3, 1, 4, 1])]) for engine in (ours, theirs))
    torch.testing.assert_close(got.logits, expected.logits)
    assert [options["max_autotune"] for options in asked] == [True]
    assert (refusals, recorder.replays) == ([], 1)


@pytest.mark.parametrize("reason", [Reason.COMPILED_DIFFERS, Reason.LOWERING_FAILED])
def test_where_tuning_fails_untuned_steps_are_recorded(reason: Reason) -> None:
    tried: list[int] = []

    def tune(engine: CompiledEngine, inputs: Sequence[Tensor]) -> Any:
        tried.append(1)
        if reason is Reason.LOWERING_FAILED:
            raise LoweringError("no configuration fits")
        return lambda *inputs: [out * 1.5 for out in engine.direct(*inputs)]

    refusals: list[Refusal] = []
    recorder, theirs, ours = Recorded(), lowered_engine(), lowered_engine(tune)
    replay(ours, refusals.append, lambda: recorder, max_autotune=True)
    for engine in (ours, theirs):
        engine.add(0, 20)
    for tokens in ([3, 1, 4, 1], [5], [9, 2]):
        (got,), (expected,) = (engine.forward([Rows(0, tokens)]) for engine in (ours, theirs))
        torch.testing.assert_close(got.logits, expected.logits)
    assert (recorder.replays, len(tried)) == (3, 1)
    (refusal,) = refusals
    assert (refusal.stage, refusal.reason) == ("tuned steps", reason)
    assert "max_autotune=False" in refusal.remedy


def test_engines_that_are_not_compiled_are_not_tuned() -> None:
    recorder, engine = Recorded(), graph_engine(rewritten(num_hidden_layers=1), "auto", CPU)
    replay(engine, [].append, lambda: recorder, max_autotune=True)
    engine.add(0, 20)
    engine.forward([Rows(0, [3])])
    assert recorder.replays == 1


def test_more_rows_than_a_replay_takes_go_to_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_ROWS", 64)
    recorder = Recorded()
    engine = replaying(rewritten(), recorder)
    for seq in range(3):
        engine.add(seq, 100)
    engine.forward([Rows(seq, [3] * 20) for seq in range(3)])
    engine.forward([Rows(seq, [3] * 30) for seq in range(3)])
    engine.forward([Rows(0, [3] * 65)])
    assert recorder.replays == 1


# --- what is refused before anything is recorded ----------------------------------------------------------------------------------


def test_an_input_whose_padding_is_not_known_is_refused() -> None:
    engine = graph_engine(rewritten(), "auto", CPU)
    engine.inputs.append("cross_attention_states")
    before = engine.call
    with pytest.raises(LoweringError, match="cross_attention_states"):
        replay(engine, [].append, Recorded)
    assert engine.call is before


def test_ops_that_read_back_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "has_kernel", lambda op, device: "positions" in op.name())
    with pytest.raises(LoweringError, match=r"^specfx::keyed_sample, specfx::tree_attention_ run on their references"):
        replay(graph_engine(rewritten(), "auto", CPU), [].append)


def test_no_room_for_scratch_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specfx.runtime.kv_pool.free_memory", lambda device: 0)
    with pytest.raises(LoweringError, match="no room for the pages of padding"):
        replay(graph_engine(rewritten(), "auto", CPU), [].append, Recorded)


def test_a_machine_without_cuda_records_nothing_and_serves(kernels: cpu_build.CpuKernels) -> None:
    refusals: list[Refusal] = []
    engine = graph_engine(rewritten(), "auto", CPU)
    replay(engine, refusals.append)
    engine.add(0, 8)
    assert len(engine.forward([Rows(0, [3, 1])])[0].choice) == 2
    assert [r.reason for r in refusals] == [Reason.NOT_RECORDED]


# --- the ladder -----------------------------------------------------------------------------------------------------------------


def prepared(**options: Any) -> tuple[Any, Prepared, Ladder]:
    model = tiny_model("llama", num_hidden_layers=1)
    prepared = Prepared(model, CommonOptions(engine="graph", compile="off", page_size=PAGE_SIZE, **options))
    return model, prepared, prepared.ladder(model)


@pytest.mark.parametrize("pool", ["auto", 9])
def test_an_engine_is_proven_again_with_its_replays(pool: Any) -> None:
    model, _, ladder = prepared(kv_pool=pool)
    recorder = Recorded()
    for _ in range(2):
        ladder.replay(lambda: model, lambda: recorder)
    assert recorder.replays > 10
    assert ladder.refusals == []
    assert ladder.engine.pool.pages_in_use == 0
    assert ladder.engine.pool.limit == (None if pool == "auto" else pool)
    ladder.engine.add(0, 9 * PAGE_SIZE)  # scratch pages are beside the pool's size
    replays = recorder.replays
    ladder.engine.forward([Rows(0, [1])])
    assert recorder.replays == replays + 1


def test_replays_that_are_wrong_never_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, ladder = prepared()
    real = cuda_graphs.fill

    def wrong(out: Any, given: Any, scratch: Sequence[int]) -> None:
        real(out, given, scratch)
        out["tree_mask"][:] = -1

    monkeypatch.setattr(cuda_graphs, "fill", wrong)
    ladder.replay(lambda: model, Recorded)
    (refusal,) = ladder.refusals
    assert refusal.reason is Reason.NOT_RECORDED
    assert "logits differ from the stock model's" in refusal.detail
    gate.check(ladder.engine, model, False)


def test_nothing_is_recorded_while_another_engine_is_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, ladder = prepared()
    recorder = Recorded()
    waiting = Refusal("compiled engine", Reason.ENGINE_NOT_READY, "")
    monkeypatch.setattr(Ladder, "compiling", property(lambda self: waiting))
    ladder.replay(lambda: model, lambda: recorder)
    assert recorder.sizes == []
    monkeypatch.setattr(Ladder, "compiling", None)
    ladder.replay(lambda: model, lambda: recorder)
    assert recorder.sizes


@pytest.mark.parametrize("method", [None, "suffix"])
def test_generate_is_stocks_in_replays(method: str | None, kernels: cpu_build.CpuKernels) -> None:
    model = tiny_model("llama")
    ids = prompt_of(length=20, batch=3)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    recorder = Recorded()
    with specfx.speculating(model, method, engine="graph", compile="off"):
        model.generate.ready().replay(lambda: tiny_model("llama"), lambda: recorder)
        before = recorder.replays
        assert model.generate(ids, max_new_tokens=40, do_sample=False).equal(expected)
        assert recorder.replays - before >= specfx.stats(model).last.forwards
        assert specfx.explain(model).refusals == ()


# --- wiring on a CUDA device ------------------------------------------------------------------------------------------------------


def test_without_kernels_auto_takes_no_references_on_a_gpu_and_a_named_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def register() -> None:
        raise LoweringError("Triton is not installed: pip install triton (Linux)")

    monkeypatch.setattr(triton_kernels, "register", register)
    _, prepared_, _ = prepared()
    prepared_._packs = None  # as if none had been looked for
    prepared_._load_kernels(torch.device("cuda"))
    assert [(r.stage, r.reason) for r in prepared_.refusals] == [("cuda kernels", Reason.NO_KERNEL)]
    prepared_.options, prepared_._packs = CommonOptions(), None
    with pytest.raises(LoweringError, match=r"pip install triton.*engine='graph' takes them"):
        prepared_._load_kernels(torch.device("cuda"))
    with pytest.raises(LoweringError, match="no kernels for mps"):
        prepared_._load_kernels(torch.device("mps"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_kernels_are_not_registered_where_there_is_no_gpu() -> None:
    with pytest.raises(LoweringError, match="CUDA"):
        triton_kernels.register()


def test_weights_on_a_gpu_are_not_packed() -> None:
    module = rewritten()
    next(n for n in module.graph.nodes if n.target == "input_ids").meta["val"] = torch.empty(1, 7, device="meta", dtype=torch.int64)
    result = run_passes(module, (pack_linears,), PassContext(PAGE_SIZE, pack=True))
    (record,) = result.records
    assert record.refusal is not None
    assert record.refusal.reason is Reason.NOTHING_TO_DO
    assert "on meta they are read as they lie" in record.refusal.detail


def test_cuda_graphs_can_be_switched_off() -> None:
    assert CommonOptions().cuda_graphs
    with pytest.raises(specfx.errors.OptionError, match="cuda_graphs"):
        CommonOptions(cuda_graphs="no")  # type: ignore[arg-type]


class FakeCuda:
    """`torch.cuda`, as far as `CudaRecorder` uses it; what it is asked to do is noted. `graph` takes what the real one takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
        monkeypatch.setattr(cuda_graphs, "_recording_stream", cuda_graphs._recording_stream.__wrapped__)
        self.log: list[str] = []
        self.fails = fails
        real = inspect.signature(torch.cuda.graph.__init__)

        class Stream:
            def __init__(self, device: Any = None) -> None:
                pass

            def wait_stream(self, other: Any) -> None:
                pass

        @contextlib.contextmanager
        def stream(stream: Any) -> Iterator[None]:
            self.log.append("side stream")
            yield
            self.log.append("main stream")

        @contextlib.contextmanager
        def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
            bound = real.bind(None, *args, **kwargs).arguments
            self.log.append(f"capture {bound['capture_error_mode']} {bound['pool']}")
            try:
                yield
            finally:
                if self.fails:
                    raise RuntimeError("the capture is not valid")
            self.log.append("captured")

        class Graph:
            replay = lambda graph: self.log.append("replay")  # noqa: E731

        fakes = {"Stream": Stream, "stream": stream, "graph": graph, "CUDAGraph": Graph, "synchronize": lambda device: None}
        fakes |= {"set_stream": lambda stream: self.log.append("stream put back")}
        fakes |= {"graph_pool_handle": lambda: "pool", "current_stream": lambda device: Stream()}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(_compat, "end_failed_capture", lambda device, pool: self.log.append(f"ended {pool}"))

    def run(self) -> list[Tensor]:
        self.log.append("run")
        if self.fails and self.log[-2].startswith("capture"):
            raise RuntimeError("a sync while capturing")
        return []


def test_a_recording_warms_up_on_a_side_stream_and_captures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch, fails=False)
    again, _ = CudaRecorder(torch.device("cuda"))(fake.run)
    again()
    warm = ["side stream", *["run"] * cuda_graphs.WARM_UPS, "main stream"]
    assert fake.log == [*warm, "capture thread_local pool", "run", "captured", "replay"]


def test_a_failed_capture_is_ended_its_stream_put_back_and_its_first_cause_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="not valid") as raised:
        CudaRecorder(torch.device("cuda"))(fake.run)
    assert fake.log[-3:] == ["run", "stream put back", "ended pool"]
    assert cuda_graphs._causes(raised.value) == "RuntimeError: a sync while capturing; then RuntimeError: the capture is not valid"


# --- transfer -------------------------------------------------------------------------------------------------------------------


dtypes = st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.bool])


@settings(deadline=None)
@given(shapes=st.lists(st.tuples(dtypes, st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=8))
def test_packed_tensors_come_out_as_they_went_in_and_are_aligned(shapes: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = [torch.randint(0, 2, size).to(dtype).t() if len(size) == 2 else torch.randint(0, 2, size).to(dtype) for dtype, size in shapes]
    buffer = transfer.pack(tensors)
    found = transfer.views(buffer, tensors)
    assert buffer.numel() <= sum(x.numel() * x.element_size() + transfer.ALIGNMENT for x in tensors)
    for x, y in zip(tensors, found, strict=True):
        assert x.dtype == y.dtype
        assert x.equal(y)
        assert (y.data_ptr() - buffer.data_ptr()) % transfer.ALIGNMENT == 0 or y.numel() == 0


def test_only_what_is_on_the_host_is_uploaded() -> None:
    seen: list[Tensor] = []
    pool = torch.empty(3, device="meta")
    call = transfer.uploading(lambda *inputs: seen.extend(inputs) or inputs, torch.device("meta"))
    call(torch.zeros(2, 3, dtype=torch.int64), pool, torch.zeros(4, dtype=torch.int32))
    assert [(x.device.type, tuple(x.shape), x.dtype) for x in seen] == [
        ("meta", (2, 3), torch.int64),
        ("meta", (3,), torch.float32),
        ("meta", (4,), torch.int32),
    ]
    assert seen[1] is pool
    assert transfer.uploading(call, CPU) is call


def test_scratch_pages_stay_the_same_while_the_pool_grows_and_are_nobodys() -> None:
    pool = KVPool([LayerShape(1, 1, torch.float32)], 4, 6, CPU)
    pool.add(0, 8)
    pool.pools[0][:] = 7
    pages = list(pool.scratch(5))
    assert len(pages) == 2
    pool.add(1, 16)
    assert pool.scratch(5) == pages
    assert pool.pages == pool.pages_in_use == 6
    owned = pool.page_table([0, 1]).flatten().tolist()
    assert not set(owned[:2] + owned[4:]) & set(pages)
    assert pool.pools[0].shape[0] == 8
    assert pool.pools[0][owned[:2]].eq(7).all()
    with pytest.raises(specfx.errors.KVPoolError):
        pool.add(2, 1)
