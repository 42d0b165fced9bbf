"""The paged KV pool against a plain list of values for each sequence, and under a real graph with everything stale set to NaN."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny import VOCAB, tiny_model
from torch import Tensor, fx

from specfx.capture import capture
from specfx.engines.base import Rows
from specfx.engines.paged import PagedEngine, graph_engine, on_references
from specfx.errors import KVPoolError, LoweringError
from specfx.kernels import cpu_build
from specfx.passes.framework import PassContext, run_passes
from specfx.passes.pipeline import REWRITE
from specfx.runtime import kv_pool
from specfx.runtime.kv_pool import KVPool, LayerShape
from specfx.runtime.tree import DraftTree

CPU = torch.device("cpu")
SHAPES = (LayerShape(2, 3, torch.float32), LayerShape(2, 5, torch.bfloat16))
NAN = float("nan")


def pool_of(size: str | int | float = "auto", page_size: int = 4) -> KVPool:
    return KVPool(SHAPES, page_size, size, CPU)


def state_of(pool: KVPool) -> object:
    """Everything that a refused call must leave as it was."""
    sequences = {seq: (list(s.pages), s.length, s.fresh, list(s.moves)) for seq, s in pool._sequences.items()}
    return pool.pages, pool.pages_in_use, sequences, [(p.data_ptr(), p.shape) for p in pool.pools]


def slots_of(pool: KVPool, seq: int, tokens: int) -> list[int]:
    table = pool.page_table([seq])[0].tolist()
    return [table[i // pool.page_size] * pool.page_size + i % pool.page_size for i in range(tokens)]


class CtrlC:
    """A trace function: raises at the n-th line (from 0) that is run of the files whose names end with one of `ends`."""

    def __init__(self, at: int, *ends: str) -> None:
        self.at, self.ends, self.lines, self.raised = at, ends, 0, False

    def __call__(self, frame: Any, event: str, argument: Any) -> CtrlC | None:
        if not frame.f_code.co_filename.endswith(self.ends):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at + 1:
                self.raised = True
                raise KeyboardInterrupt
        return self

    def during(self, work: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(before)


# --- reservation and growth -----------------------------------------------------------------------------------------------------


def test_a_sequence_reserves_all_its_pages_when_it_is_added() -> None:
    pool = pool_of()
    assert (pool.pages, pool.pages_in_use) == (0, 0)
    pool.add(0, 9)
    assert pool.pages_in_use == 3
    pool.add(1, 8)
    assert pool.pages_in_use == 5
    pool.begin([0, 1], [12, 8])
    for seq, count in ((0, 13), (1, 9)):
        with pytest.raises(KVPoolError, match=f"sequence {seq} reserved"):
            pool.begin([seq], [count])


def test_a_sequence_is_extended_behind_what_it_holds() -> None:
    pool = pool_of()
    pool.add(0, 9)
    pool.add(1, 20, 0, 8)
    pages = pool.page_table([0])[0].tolist()
    pool.begin([0], [9])
    pool.commit(0, [0, 2, 8])
    pool.extend(0, 21)
    assert pool.page_table([0])[0, :3].tolist() == pages
    assert pool.page_table([0]).shape == (1, 6)
    assert not set(pool.page_table([0])[0, 3:].tolist()) & {*pages, *pool.page_table([1])[0].tolist()}
    assert pool.begin([0], [21 - 3]).shape == (2, 2)
    before = state_of(pool)
    pool.extend(0, 21)
    assert state_of(pool) == before
    for seq in (0, 1):
        pool.remove(seq)
    assert pool.pages_in_use == 0


def test_an_id_in_use_is_refused_and_an_unknown_one_ignored() -> None:
    pool = pool_of()
    pool.add(7, 5)
    before = state_of(pool)
    with pytest.raises(ValueError, match="7 exists"):
        pool.add(7, 5)
    pool.remove(8)
    assert state_of(pool) == before
    pool.remove(7)
    pool.remove(7)
    assert pool.pages_in_use == 0


def test_no_page_belongs_to_two_sequences() -> None:
    pool = pool_of()
    for seq in range(5):
        pool.add(seq, 11)
    pages = pool.page_table(range(5)).flatten().tolist()
    assert len(set(pages)) == 15
    assert set(pages) <= set(range(pool.pages))


def test_growth_keeps_what_the_pools_hold() -> None:
    pool = pool_of()
    pool.add(0, 12)
    for p in pool.pools:
        p.copy_(torch.randn_like(p, dtype=torch.float32))
    before, table = [p.clone() for p in pool.pools], pool.page_table([0]).clone()
    pool.add(1, 100)
    assert pool.pages >= 28
    for old, new, shape in zip(before, pool.pools, SHAPES, strict=True):
        assert torch.equal(new[: len(old)], old)
        assert new.shape == (pool.pages, 4, shape.heads, shape.width)
        assert new.dtype == shape.dtype
        assert new.is_contiguous()
    assert torch.equal(pool.page_table([0]), table)


def test_an_automatic_pool_grows_by_half_at_least_so_that_many_small_adds_copy_little() -> None:
    pool = pool_of()
    growths = 0
    for seq in range(200):
        before = pool.pages
        pool.add(seq, 4)
        growths += pool.pages != before
    assert growths < 16


def test_a_fixed_pool_refuses_what_does_not_fit_and_changes_nothing() -> None:
    pool = pool_of(5)
    pool.add(0, 9)
    pool.begin([0], [6])
    pool.commit(0, [0, 2, 5])
    before = state_of(pool)
    with pytest.raises(KVPoolError, match=r"holds 5 pages of 4 tokens, 6 are needed \(3 in use\).*kv_pool"):
        pool.add(1, 12)
    assert state_of(pool) == before
    pool.add(1, 8)
    assert (pool.pages, pool.pages_in_use) == (5, 5)
    pool.remove(0)
    pool.add(2, 12)  # freed pages serve again
    assert (pool.pages, pool.pages_in_use) == (5, 5)


def test_a_fraction_bounds_the_pool_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = 4 * (2 * 3 * 4 + 2 * 5 * 2)
    monkeypatch.setattr(kv_pool, "free_memory", lambda device: 100 * page_bytes)
    pool = pool_of(0.25)
    assert (pool.page_bytes, pool.limit) == (page_bytes, 25)
    pool.add(0, 100)
    with pytest.raises(KVPoolError, match="holds 25 pages"):
        pool.add(1, 1)


def test_a_pool_that_outgrows_the_memory_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    pool.add(0, 40)
    before = state_of(pool)
    monkeypatch.setattr(kv_pool, "free_memory", lambda device: 10 * pool.page_bytes)
    with pytest.raises(KVPoolError, match="MiB more on cpu"):
        pool.add(1, 4 * 11)
    assert state_of(pool) == before


@pytest.mark.parametrize(("free", "pages"), [(2, 12), (3, 12), (6, 14), (100, 15)])
def test_a_pool_grows_by_half_if_that_leaves_half_of_the_memory_free(free: int, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    pool.add(0, 40)
    monkeypatch.setattr(kv_pool, "free_memory", lambda device: free * pool.page_bytes)
    pool.extend(0, 48)
    assert (pool.pages, pool.pages_in_use) == (pages, 12)


def test_memory_that_runs_out_in_the_middle_of_growth_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    pool.add(0, 40)
    pool.pools[0].fill_(3.0)
    zeros = torch.zeros

    def failing(*sizes: int, dtype: torch.dtype, **more: object) -> Tensor:
        if dtype == torch.bfloat16:
            raise torch.OutOfMemoryError("out of memory")
        return zeros(*sizes, dtype=dtype, **more)

    monkeypatch.setattr(torch, "zeros", failing)
    with pytest.raises(KVPoolError, match=r"can't grow to .* out of memory"):
        pool.add(1, 400)
    monkeypatch.undo()
    assert (pool.pages, pool.pages_in_use, [len(p) for p in pool.pools]) == (10, 10, [10, 10])
    assert pool.pools[0].eq(3.0).all()
    assert pool.pools[0].is_contiguous()
    pool.add(1, 400)
    assert {len(p) for p in pool.pools} == {pool.pages}
    assert pool.pools[0][:10].eq(3.0).all()


def test_free_memory_is_read_from_the_machine() -> None:
    assert 1 << 20 < kv_pool.free_memory(CPU) < 1 << 50


# --- commit, moves, rollback ----------------------------------------------------------------------------------------------------


def test_commit_moves_the_kept_rows_that_do_not_lie_where_they_belong() -> None:
    pool = pool_of()
    pool.add(0, 30)
    assert pool.begin([0], [3]).tolist() == [[-1], [-1]]
    pool.commit(0, range(3))
    pool.begin([0], [8])
    pool.commit(0, [0, 2, 3, 7])
    assert pool.length(0) == 7
    slots = slots_of(pool, 0, 11)
    assert pool.begin([0], [1]).t().tolist() == [[slots[5], slots[4]], [slots[6], slots[5]], [slots[10], slots[6]]]
    pool.commit(0, [0])
    assert pool.begin([0], [1]).tolist() == [[-1], [-1]]  # handed out once


@pytest.mark.parametrize("rows", [[3], [-1], [1, 0], [0, 0], [0, 1, 2, 3]])
def test_commit_refuses_rows_that_are_no_path_of_the_last_forward(rows: list[int]) -> None:
    pool = pool_of()
    pool.add(0, 30)
    pool.begin([0], [3])
    before = state_of(pool)
    with pytest.raises(ValueError, match="ascending path among the 3 rows"):
        pool.commit(0, rows)
    assert state_of(pool) == before


def test_rows_are_committed_once() -> None:
    pool = pool_of()
    pool.add(0, 30)
    pool.begin([0], [4])
    pool.commit(0, [0, 2])
    with pytest.raises(ValueError, match="among the 0 rows"):
        pool.commit(0, [0])
    pool.commit(0, [])  # keeps nothing more, and does not forget what is still to be moved
    slots = slots_of(pool, 0, 3)
    assert pool.begin([0], [1]).t().tolist() == [[slots[2], slots[1]]]


def test_a_forward_without_a_commit_is_rolled_back_by_the_next() -> None:
    pool = pool_of()
    pool.add(0, 8)
    for _ in range(3):
        pool.begin([0], [8])  # would outgrow the reservation if anything had stayed
    assert pool.length(0) == 0
    pool.commit(0, range(8))
    assert pool.length(0) == 8


def test_a_refused_forward_loses_no_moves() -> None:
    pool = pool_of()
    pool.add(0, 8)
    pool.add(1, 8)
    pool.begin([0], [5])
    pool.commit(0, [0, 4])
    before = state_of(pool)
    with pytest.raises(KVPoolError, match="sequence 1"):
        pool.begin([0, 1], [1, 9])
    assert state_of(pool) == before


# --- against a plain list -------------------------------------------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """Each sequence is a list of numbers. The pool's tensor is written as the op writes it: moves in order, then rows appended."""

    LIMIT: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.pool = KVPool((LayerShape(1, 1, torch.float64),), 3, self.LIMIT or "auto", CPU)
        self.capacity: dict[int, int] = {}
        self.kept: dict[int, list[float]] = {}
        self.fresh: dict[int, list[float]] = {}
        self.ids, self.values = 0, 0.0

    @property
    def pages(self) -> dict[int, int]:
        return {seq: -(-capacity // 3) for seq, capacity in self.capacity.items()}

    @rule(capacity=st.integers(0, 20))
    def add(self, capacity: int) -> None:
        self._add(capacity, None, 0)

    def _add(self, capacity: int, source: int | None, shared: int) -> bool:
        self.ids += 1
        shares = 0 if source is None else min(shared, self.pool._final(source)) // 3
        if self.LIMIT is not None and self.pool.pages_in_use + -(-capacity // 3) - shares > self.LIMIT:
            before = state_of(self.pool)
            with pytest.raises(KVPoolError):
                self.pool.add(self.ids, capacity, source, shared)
            assert state_of(self.pool) == before
            return False
        self.pool.add(self.ids, capacity, source, shared)
        self.capacity[self.ids], self.kept[self.ids], self.fresh[self.ids] = capacity, [], []
        return True

    @precondition(lambda self: self.capacity)
    @rule(data=st.data(), capacity=st.integers(0, 30))
    def extend(self, data: st.DataObject, capacity: int) -> None:
        seq = data.draw(st.sampled_from(sorted(self.capacity)))
        before = state_of(self.pool)
        more = -(-capacity // 3) - self.pages[seq]
        if self.LIMIT is not None and more > 0 and self.pool.pages_in_use + more > self.LIMIT:
            with pytest.raises(KVPoolError):
                self.pool.extend(seq, capacity)
            assert state_of(self.pool) == before
            return
        self.pool.extend(seq, capacity)
        if more <= 0:
            assert state_of(self.pool) == before
        self.capacity[seq] = max(self.capacity[seq], capacity)

    @precondition(lambda self: self.capacity)
    @rule(data=st.data(), more=st.integers(0, 9), gone=st.booleans())
    def add_with_a_common_prefix(self, data: st.DataObject, more: int, gone: bool) -> None:
        """Its source may have moves to do, may go before it is inherited from, and goes on afterwards."""
        source = data.draw(st.sampled_from(sorted(self.capacity)))
        shared = data.draw(st.integers(0, len(self.kept[source])))
        if not self._add(shared + more, source, shared):
            return
        new, prefix = self.ids, self.kept[source][:shared]
        if gone:
            prefix = prefix[: self.pool._sequences[new].common * 3]
            self.pool.remove(source)
            self._forget(source)
        else:
            with pytest.raises(ValueError, match="has not inherited"):
                self.pool.begin([new], [1])
        assert self.pool.inherit(new) == len(prefix)
        self.kept[new] = list(prefix)
        self._forward([new], [data.draw(st.integers(0, self.pages[new] * 3 - len(prefix)))])

    def _forget(self, seq: int) -> None:
        for state in (self.capacity, self.kept, self.fresh):
            del state[seq]

    @precondition(lambda self: self.capacity)
    @rule(data=st.data())
    def forward(self, data: st.DataObject) -> None:
        seqs = data.draw(st.lists(st.sampled_from(sorted(self.capacity)), unique=True, min_size=1))
        self._forward(seqs, [data.draw(st.integers(0, self.pages[s] * 3 - len(self.kept[s]))) for s in seqs])

    def _forward(self, seqs: list[int], counts: list[int]) -> None:
        flat = self.pool.pools[0].view(-1)
        for source, target in self.pool.begin(seqs, counts).t().tolist():
            if source >= 0:
                flat[target] = flat[source]
        for seq, count in zip(seqs, counts, strict=True):
            start = len(self.kept[seq])
            slots = slots_of(self.pool, seq, start + count)
            assert flat[slots[:start]].tolist() == self.kept[seq]
            self.fresh[seq] = [self.values + i for i in range(count)]
            self.values += count
            flat[slots[start:]] = torch.tensor(self.fresh[seq], dtype=torch.float64)

    @precondition(lambda self: self.capacity)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.capacity)))
        rows = [row for row in range(len(self.fresh[seq])) if data.draw(st.booleans())]
        self.pool.commit(seq, rows)
        self.kept[seq] += [self.fresh[seq][row] for row in rows]
        self.fresh[seq] = []

    @precondition(lambda self: self.capacity)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.capacity)))
        before = self.pages[seq]
        self.pool.trim(seq)
        self.capacity[seq], self.fresh[seq] = len(self.pool._sequences[seq].pages) * 3, []
        assert -(-len(self.kept[seq]) // 3) <= self.pages[seq] <= before
        if not self.pool._sequences[seq].moves:
            assert self.pages[seq] == -(-len(self.kept[seq]) // 3)

    @precondition(lambda self: self.capacity)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.capacity)))
        self.pool.remove(seq)
        self._forget(seq)

    @invariant()
    def every_page_is_free_or_has_its_users(self) -> None:
        """Of several users each has committed the whole page."""
        users: dict[int, list[bool]] = {}
        for seq, s in self.pool._sequences.items():
            for i, page in enumerate(s.pages):
                users.setdefault(page, []).append(len(self.kept[seq]) >= 3 * (i + 1))
        assert sorted([*users, *self.pool._free]) == list(range(self.pool.pages))
        assert self.pool.pages_in_use == len(users)
        assert all(len(full) == 1 or all(full) for full in users.values())
        assert self.LIMIT is None or self.pool.pages <= self.LIMIT
        assert [self.pool.length(seq) for seq in self.kept] == [len(kept) for kept in self.kept.values()]

    def teardown(self) -> None:
        if self.capacity:
            self._forward(list(self.capacity), [0] * len(self.capacity))  # reads all that was kept
        for seq in self.capacity:
            self.pool.remove(seq)
        assert self.pool.pages_in_use == 0


class BoundedPoolMachine(PoolMachine):
    LIMIT = 12


TestPool = PoolMachine.TestCase
TestBoundedPool = BoundedPoolMachine.TestCase
TestPool.settings = TestBoundedPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


# --- under a graph --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def graph(request: pytest.FixtureRequest) -> fx.GraphModule:
    result = run_passes(capture(tiny_model(request.param)), REWRITE, PassContext(page_size=4))
    assert result.failed is None
    return result.module


@pytest.fixture(params=["references", "kernels"])
def new_engine(graph: fx.GraphModule, request: pytest.FixtureRequest) -> Callable[[], PagedEngine]:
    """Engines over the graph on the ops' references, and on the C++ kernels."""
    if request.param == "references":
        references: Any = on_references(graph)
        return lambda: PagedEngine("graph", graph, references, "auto", CPU)
    try:
        cpu_build.load()
    except LoweringError as e:
        pytest.skip(str(e))
    return lambda: graph_engine(graph, "auto", CPU)


def poison(engine: PagedEngine) -> None:
    """NaN into every slot whose content no later forward may read: all but the committed rows, where they lie now."""
    live: set[int] = set()
    for seq, sequence in engine.pool._sequences.items():
        at = {slot: slot for slot in slots_of(engine.pool, seq, sequence.length)}
        at |= {target: source for source, target in sequence.moves}
        live |= set(at.values())
    for pages in engine.pool.pools:
        flat = pages.flatten(0, 1)
        stale = torch.tensor([slot not in live for slot in range(len(flat))])
        flat[stale] = NAN


def random_draft(rng: random.Random, nodes: int) -> DraftTree:
    parents = [rng.randrange(-1, i) for i in range(nodes)]
    return DraftTree(tuple(rng.sample(range(VOCAB), nodes)), tuple(parents), (1.0,) * nodes)


def random_path(rng: random.Random, tree: DraftTree) -> list[int]:
    """Rows from the pending token down to a random row."""
    row, path = rng.randrange(len(tree) + 1), []
    while row > 0:
        path.insert(0, row)
        row = tree.parents[row - 1] + 1
    return [0, *path]


def causal_logits(engine: PagedEngine, tokens: list[int]) -> Tensor:
    """Logits after each of `tokens`, computed in one causal forward in `engine`."""
    engine.add(99, len(tokens))
    try:
        return engine.forward([Rows(99, tokens)])[0].logits.clone()
    finally:
        engine.remove(99)


@pytest.mark.parametrize("seed", range(3))
def test_rejected_nodes_leave_no_trace_in_later_logits(new_engine: Callable[[], PagedEngine], seed: int) -> None:
    """Three sequences, random trees, random paths kept, forwards rolled back, sequences that come and go; all that is stale is NaN.
    Each row's logits are those of a causal forward over its path alone."""
    rng = random.Random(seed)
    engine, fresh = new_engine(), new_engine()
    kept: dict[int, list[int]] = {}
    for step in range(14):
        if len(kept) < 3 and step % 3 == 0:
            engine.add(step, 80)
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 8))]
            engine.forward([Rows(step, prompt, last_only=True)])
            engine.commit(step, range(len(prompt)))
            kept[step] = prompt
            poison(engine)
        seqs = rng.sample(sorted(kept), rng.randint(1, len(kept)))
        trees = {seq: random_draft(rng, rng.randrange(12)) for seq in seqs}
        pending = {seq: rng.randrange(VOCAB) for seq in seqs}
        outputs = engine.forward([Rows(seq, [pending[seq]], trees[seq]) for seq in seqs])
        for seq, output in zip(seqs, outputs, strict=True):
            path = random_path(rng, trees[seq])
            tokens = [pending[seq], *(trees[seq].tokens[row - 1] for row in path[1:])]
            assert output.logits.isfinite().all()
            expected = causal_logits(fresh, kept[seq] + tokens)[len(kept[seq]) :]
            torch.testing.assert_close(output.logits[path], expected, rtol=1e-3, atol=1e-3)
            if rng.random() < 0.75:  # else never committed
                engine.commit(seq, path)
                kept[seq] += tokens
        assert [engine.length(seq) for seq in kept] == [len(tokens) for tokens in kept.values()]
        if rng.random() < 0.2:
            gone = rng.choice(sorted(kept))
            engine.remove(gone)
            del kept[gone]
            if not kept:
                engine.add(100 + step, 80)
                kept[100 + step] = []
        poison(engine)
    for seq in kept:
        engine.remove(seq)
    assert engine.pool.pages_in_use == 0


def test_moves_wait_for_the_next_forward_of_their_own_sequence(new_engine: Callable[[], PagedEngine]) -> None:
    """A tree is accepted with gaps; another sequence goes on, a third makes the pool grow; then the first goes on as if alone."""
    rng = random.Random(0)
    engine, fresh = new_engine(), new_engine()
    engine.add(0, 40)
    engine.add(1, 40)
    tree = DraftTree((1, 2, 3, 4, 5), (-1, -1, 0, 1, 3), (1.0,) * 5)
    engine.forward([Rows(0, [9], tree), Rows(1, [8, 7])])
    engine.commit(0, [0, 2, 4, 5])
    engine.commit(1, [0, 1])
    poison(engine)
    for _ in range(2):
        engine.forward([Rows(1, [rng.randrange(VOCAB)])])
        engine.commit(1, [0])
    engine.add(2, 400)
    engine.forward([Rows(2, [5] * 70, last_only=True)])
    poison(engine)
    (output,) = engine.forward([Rows(0, [6])])
    torch.testing.assert_close(output.logits, causal_logits(fresh, [9, 2, 4, 5, 6])[-1:], rtol=1e-3, atol=1e-3)


def test_a_forward_that_does_not_fit_changes_nothing(new_engine: Callable[[], PagedEngine]) -> None:
    engine = new_engine()
    engine.add(0, 8)
    engine.forward([Rows(0, [1, 2, 3, 4, 5])])
    engine.commit(0, [0, 2, 4])
    before, pools = state_of(engine.pool), [p.clone() for p in engine.pool.pools]
    with pytest.raises(KVPoolError, match="reserved 8 tokens, 3 \\+ 6 rows"):
        engine.forward([Rows(0, [1, 2, 3, 4, 5, 6])])
    assert state_of(engine.pool) == before
    assert all(torch.equal(a, b) for a, b in zip(engine.pool.pools, pools, strict=True))


@pytest.mark.parametrize("shared", [3, 4, 7, 8, 9])
def test_a_common_prefix_is_stored_once_and_read_by_all(new_engine: Callable[[], PagedEngine], shared: int) -> None:
    """Pages are of 4 tokens. The source has accepted a tree with gaps that is still to be moved together, and then goes on."""
    engine, fresh = new_engine(), new_engine()
    engine.add(0, 40)
    engine.forward([Rows(0, [9, 3, 7, 5, 2])])
    engine.commit(0, range(5))
    engine.forward([Rows(0, [6], DraftTree((1, 2, 3, 4, 5), (-1, -1, 0, 1, 3), (1.0,) * 5))])
    engine.commit(0, [0, 2, 4, 5])
    text = [9, 3, 7, 5, 2, 6, 2, 4, 5]
    before = engine.pool.pages_in_use
    engine.add(1, 20, 0, shared)
    assert engine.pool.pages_in_use == before + 5 - (shared >= 4), "the second page is still to be written by moves"
    assert engine.inherit(1) == engine.length(1) == shared
    for seq, known in ((1, text[:shared]), (0, text), (1, [*text[:shared], 11])):
        (output,) = engine.forward([Rows(seq, [11])])
        torch.testing.assert_close(output.logits, causal_logits(fresh, [*known, 11])[-1:], rtol=1e-3, atol=1e-3)
        engine.commit(seq, [0])
    engine.remove(0)
    poison(engine)
    (output,) = engine.forward([Rows(1, [12])])
    torch.testing.assert_close(output.logits, causal_logits(fresh, [*text[:shared], 11, 11, 12])[-1:], rtol=1e-3, atol=1e-3)
    engine.remove(1)
    assert engine.pool.pages_in_use == 0


def test_a_source_that_lacks_what_is_shared(new_engine: Callable[[], PagedEngine]) -> None:
    engine = new_engine()
    engine.add(0, 12)
    engine.add(1, 12, 0, 9)  # to come
    with pytest.raises(ValueError, match="1 begins with 9 tokens of 0, which were never committed there"):
        engine.inherit(1)
    engine.forward([Rows(0, [9, 3, 7, 5, 2])])
    engine.commit(0, range(5))
    engine.remove(0)
    with pytest.raises(ValueError, match="never committed"):
        engine.inherit(1)
    engine.remove(1)
    assert engine.pool.pages_in_use == 0


def test_each_sequence_appears_once_in_a_forward(new_engine: Callable[[], PagedEngine]) -> None:
    engine = new_engine()
    engine.add(0, 8)
    with pytest.raises(ValueError, match="once"):
        engine.forward([Rows(0, [1]), Rows(0, [2])])


@pytest.mark.parametrize("size", ["auto", 60])
def test_an_interruption_at_any_line_loses_no_page(size: str | int) -> None:
    at, interrupt = 0, CtrlC(0)
    while not at or interrupt.raised:
        pool = pool_of(size)

        def work(pool: KVPool = pool) -> None:
            pool.add(0, 9)
            pool.begin([0], [5])
            pool.commit(0, [0, 2, 4])
            pool.add(1, 30, 0, 3)
            pool.inherit(1)
            pool.trim(0)
            pool.remove(0)
            pool.add(2, 100)
            pool.remove(1)

        interrupt = CtrlC(at, "kv_pool.py")
        with suppress(KeyboardInterrupt):
            interrupt.during(work)
        for seq in (0, 1, 2):
            pool.remove(seq)
        assert pool.pages_in_use == 0
        if size == "auto":  # it still grows
            pool.add(3, (pool.pages + 1) * pool.page_size)
            pool.remove(3)
        count = pool.pages if size == "auto" else 60
        pool.add(3, count * pool.page_size)
        assert sorted(pool.page_table([3])[0].tolist()) == list(range(count))
        assert all(len(tensor) >= count for tensor in pool.pools)
        pool.remove(3)
        assert pool.pages_in_use == 0
        at += 1
    assert at > 80


def test_a_pool_that_was_interrupted_while_it_grew_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of()
    pool.add(0, 8)
    for tensor in pool.pools:
        tensor.fill_(7)
    zeros, calls = torch.zeros, []

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return zeros(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.add(1, 80)
    pool.add(1, 80)
    assert all((tensor[:2] == 7).all() for tensor in pool.pools)
    assert len({len(tensor) for tensor in pool.pools}) == 1
