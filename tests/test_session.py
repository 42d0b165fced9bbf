"""The runtime over a fake target and fake drafters: whatever is drafted, the output is plain decoding's, and all are told the truth."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specfx.drafters.base import NoDrafter
from specfx.engines.base import Rows, RowsOutput
from specfx.errors import KVPoolError
from specfx.runtime import session
from specfx.runtime.session import PIECE, Arrival, Committed, Processor, Runtime
from specfx.runtime.stats import STAGES, CallStats
from specfx.runtime.tree import EMPTY_TREE, DraftTree

VOCAB = 6
"""So few that random drafts are often right."""
PROPERTY = settings(max_examples=150, deadline=None)


# --- a target that is a hash of the prefix --------------------------------------------------------------------------------------


def encode(prefix: Sequence[int]) -> int:
    """48 bits that tell prefixes apart (exact in float64)."""
    return int.from_bytes(hashlib.blake2b(bytes(prefix), digest_size=6).digest(), "big")


def logits_after(prefix: Sequence[int]) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(encode(prefix)))


def next_token(prefix: Sequence[int], seen: Sequence[int] | None = None, processor: Processor | None = None) -> int:
    scores = logits_after(prefix)
    if processor is not None:
        scores = processor(torch.tensor([list(prefix if seen is None else seen)]), scores[None])[0]
    return int(scores.argmax())


def plain(
    prompt: Sequence[int], n: int, ends: Sequence[int] = (), processor: Processor | None = None, seen: Sequence[int] | None = None
) -> list[int]:
    """Plain decoding: what every other test compares with."""
    tokens, shown = list(prompt), list(prompt if seen is None else seen)
    while len(tokens) < len(prompt) + n:
        token = next_token(tokens, shown, processor)
        tokens.append(token)
        shown.append(token)
        if token in ends:
            break
    return tokens[len(prompt) :]


@dataclass
class FakeEngine:
    """The engine protocol over that target, with each rule of the protocol asserted. raises: verb -> calls before it raises."""

    verifies: str = "trees"
    tells_hidden: bool = True
    raises: dict[str, int] = field(default_factory=dict)
    name: str = "fake"
    max_rows: int = 512
    drafts: bool = False
    kept: dict[int, list[int]] = field(default_factory=dict)
    capacity: dict[int, int] = field(default_factory=dict)
    fresh: dict[int, list[list[int]]] = field(default_factory=dict)
    batches: list[list[Rows]] = field(default_factory=list)

    def _maybe_raise(self, verb: str) -> None:
        if verb in self.raises:
            self.raises[verb] -= 1
            if self.raises[verb] < 0:
                raise ZeroDivisionError(verb)

    def add(self, seq: int, capacity: int) -> None:
        self._maybe_raise("add")
        assert seq not in self.kept
        self.kept[seq], self.capacity[seq], self.fresh[seq] = [], capacity, []

    def extend(self, seq: int, capacity: int) -> None:
        self.capacity[seq] = max(self.capacity[seq], capacity)

    def forward(self, batch: Sequence[Rows]) -> list[RowsOutput]:
        self._maybe_raise("forward")
        assert len({rows.seq for rows in batch}) == len(batch)
        self.batches.append(list(batch))
        outputs = []
        for rows in batch:
            kept = self.kept[rows.seq]
            assert rows.count
            assert len(kept) + rows.count <= self.capacity[rows.seq], "outgrows its reservation"
            prefixes = [[*kept, *rows.tokens[: i + 1]] for i in range(len(rows.tokens))]
            if rows.tree is not None:
                assert self.verifies == "trees" or rows.tree.is_chain
                for token, parent in zip(rows.tree.tokens, rows.tree.parents, strict=True):
                    prefixes.append([*prefixes[parent + 1], token])
            self.fresh[rows.seq] = prefixes
            logits = torch.stack([logits_after(p) for p in (prefixes[-1:] if rows.last_only else prefixes)])
            hidden = torch.tensor([[encode(p), len(p)] for p in prefixes], dtype=torch.float64)
            outputs.append(RowsOutput(logits.argmax(-1).tolist(), logits, hidden if self.tells_hidden else None))
        return outputs

    def commit(self, seq: int, rows: Sequence[int]) -> None:
        self._maybe_raise("commit")
        for row in rows:
            prefix = self.fresh[seq][row]
            assert prefix[:-1] == self.kept[seq], "not a path"
            self.kept[seq] = prefix
        self.fresh[seq] = []

    def remove(self, seq: int) -> None:
        for state in (self.kept, self.capacity, self.fresh):
            state.pop(seq, None)

    def length(self, seq: int) -> int:
        return len(self.kept[seq])


Policy = Callable[[list[int], int, random.Random], DraftTree]
"""(all that is known of a sequence, budget, randomness) -> a proposal."""


@dataclass
class FakeDrafter:
    """Proposes by a policy, and checks what it is told against the target itself."""

    policy: Policy
    needs_hidden: bool = True
    tells_hidden: bool = True
    raises: dict[str, int] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    name: str = "fake"
    known: dict[int, list[int]] = field(default_factory=dict)
    prompts: dict[int, int] = field(default_factory=dict)
    ends: dict[int, list[int]] = field(default_factory=dict)
    on_trial: bool = False
    beside: FakeDrafter | None = None
    ended: dict[int, list[int]] = field(default_factory=dict)  # all that was known of a sequence when it went
    proposals: list[tuple[list[int], int, DraftTree]] = field(default_factory=list)

    _maybe_raise = FakeEngine._maybe_raise

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int] = ()) -> None:
        self._maybe_raise("add")
        assert seq not in self.known
        if self.beside is not None:
            self.beside.add(seq, prompt, ends)
        self.known[seq], self.prompts[seq], self.ends[seq] = list(prompt), len(prompt), list(ends)

    def accept(self, seq: int, tokens: Sequence[int], hidden: Tensor | None, drafted: DraftTree | None = None) -> None:
        self._maybe_raise("accept")
        if self.beside is not None:
            self.beside.accept(seq, tokens, hidden)
        known = self.known[seq]
        first = len(known) == self.prompts[seq]
        known += tokens
        assert len(tokens) == 1 or not first
        if not (self.needs_hidden and self.tells_hidden):
            assert hidden is None
            return
        assert hidden is not None
        rows = self.prompts[seq] if first else len(tokens)
        before = [known[: len(known) - rows + i] for i in range(rows)]  # row i predicted the token behind before[i]
        assert hidden.tolist() == [[encode(prefix), len(prefix)] for prefix in before]

    def propose(self, seqs: Sequence[int], budgets: Sequence[int]) -> list[DraftTree]:
        self._maybe_raise("propose")
        trees = [self.policy(self.known[seq], budget, self.rng) for seq, budget in zip(seqs, budgets, strict=True)]
        self.proposals += [(list(self.known[s]), b, t) for s, b, t in zip(seqs, budgets, trees, strict=True)]
        return trees

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        if self.beside is not None:
            self.beside.remove(seq, last)
        known = self.known.pop(seq, None)
        if known is None:
            assert not last, "the last tokens of a sequence that is not known"
        else:
            self.ended[seq] = [*known, *last]


def nothing(known: list[int], budget: int, rng: random.Random) -> DraftTree:
    return EMPTY_TREE


def oracle(known: list[int], budget: int, rng: random.Random) -> DraftTree:
    """The plain continuation."""
    return DraftTree.chain(plain(known, budget))


def wrong(known: list[int], budget: int, rng: random.Random) -> DraftTree:
    """A chain whose first token the target never chooses; the rest would be right behind it."""
    if budget == 0:
        return EMPTY_TREE
    token = (next_token(known) + 1) % VOCAB
    return DraftTree.chain([token, *plain([*known, token], budget - 1)])


def half_right(known: list[int], budget: int, rng: random.Random) -> DraftTree:
    """A chain that leaves the plain continuation somewhere."""
    tokens = plain(known, budget)
    at = rng.randrange(budget + 1)
    return DraftTree.chain([t if i < at else (t + 1) % VOCAB for i, t in enumerate(tokens)])


def bushy(known: list[int], budget: int, rng: random.Random) -> DraftTree:
    """A random tree, nodes in random order, often with the plain continuation in it."""
    tokens: list[int] = []
    parents: list[int] = []
    paths = [list(known)]
    for _ in range(rng.randint(0, budget)):
        parent = rng.randrange(len(paths))
        right = next_token(paths[parent])
        token = right if rng.random() < 0.6 else rng.randrange(VOCAB)
        if (parent - 1, token) not in zip(parents, tokens, strict=True):
            tokens.append(token)
            parents.append(parent - 1)
            paths.append([*paths[parent], token])
    return DraftTree(tuple(tokens), tuple(parents), tuple(1.0 / len(path) for path in paths[1:]))


POLICIES = (nothing, oracle, wrong, half_right, bushy)


def never(token: int) -> bool:
    return False


def finish(runtime: Runtime, *firsts: Committed) -> dict[int, list[int]]:
    """Step until all have ended; what was committed, by sequence."""
    generated = {first.seq: list(first.tokens) for first in firsts}
    while runtime.sequences:
        for committed in runtime.step():
            generated[committed.seq] += committed.tokens
    return generated


def assert_empty(engine: FakeEngine, drafter: FakeDrafter, runtime: Runtime) -> None:
    assert not engine.kept
    assert not drafter.known
    assert not runtime.sequences


# --- the output is plain decoding's ---------------------------------------------------------------------------------------------

prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[list[int], int, list[int], int]]:
    """(prompt, max_new_tokens, end tokens, step at which it comes) of some sequences."""
    ends = st.lists(st.integers(0, VOCAB - 1), max_size=1)
    return draw(st.lists(st.tuples(prompts, st.integers(1, 20), ends, st.integers(0, 4)), min_size=1, max_size=4))


@PROPERTY
@given(
    asked=requests(),
    policy=st.sampled_from(POLICIES),
    beside=st.sampled_from((None, *POLICIES)),
    max_nodes=st.integers(1, 12),
    verifies=st.sampled_from(["trees", "chains"]),
    tells_hidden=st.booleans(),
    needs_hidden=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_is_plain_decodings_whatever_is_drafted(
    asked: list[tuple[list[int], int, list[int], int]],
    policy: Policy,
    beside: Policy | None,
    max_nodes: int,
    verifies: str,
    tells_hidden: bool,
    needs_hidden: bool,
    seed: int,
) -> None:
    """Sequences come at different steps, end at end tokens or after `max_new_tokens`, and the drafter learns exactly what was committed."""
    engine = FakeEngine(verifies, tells_hidden)
    drafter = FakeDrafter(policy, needs_hidden, tells_hidden, rng=random.Random(seed))
    if beside is not None:
        drafter.beside = FakeDrafter(beside, needs_hidden, tells_hidden, rng=random.Random(seed + 1))
    runtime = Runtime(engine, drafter, max_nodes, CallStats())
    expected: dict[int, list[int]] = {}
    generated: dict[int, list[int]] = {}
    offered: dict[int, list[int]] = {}
    prompted: dict[int, list[int]] = {}
    for step in range(100):
        coming = [(prompt, n, ends, []) for prompt, n, ends, at in asked if at == step]
        arrivals = [
            Arrival(prompt, n, lambda token, told=told, ends=ends: told.append(token) or token in ends, ends=ends)
            for prompt, n, ends, told in coming
        ]
        firsts = runtime.admit(arrivals)
        for first, (prompt, n, ends, told) in zip(firsts, coming, strict=True):
            assert drafter.ends[first.seq] == ends
            prompted[first.seq] = prompt
            expected[first.seq] = plain(prompt, n, ends)
            generated[first.seq], offered[first.seq] = list(first.tokens), told
            assert first.finished == (len(expected[first.seq]) == 1)
        active = set(runtime.sequences)
        results = runtime.step()
        assert {r.seq for r in results} == active
        for result in results:
            assert result.tokens
            generated[result.seq] += result.tokens
            assert result.finished == (generated[result.seq] == expected[result.seq])
        assert set(engine.kept) == set(drafter.known) == set(runtime.sequences)
        for seq, state in runtime.sequences.items():
            assert state.tokens == drafter.known[seq]
            assert engine.kept[seq] == state.tokens[:-1]
        if step >= 4 and not runtime.sequences:
            break
    assert generated == expected
    assert offered == expected  # the stop function was called once with each token, in order
    assert drafter.ended == {seq: prompted[seq] + tokens for seq, tokens in expected.items()}
    assert_empty(engine, drafter, runtime)
    if drafter.beside is not None:
        assert drafter.beside.ended == drafter.ended
        assert_empty(engine, drafter.beside, runtime)


@pytest.mark.parametrize("n", [1, 2, 3, 20])
@pytest.mark.parametrize("policy", [nothing, oracle, half_right])
def test_the_drafter_is_told_how_a_sequence_ended_once_and_at_its_end(policy: Policy, n: int) -> None:
    """`remove` brings the last tokens, which `accept` has not: drafts are no use behind the end, but the text is to those that come."""
    engine, drafter = FakeEngine(), FakeDrafter(policy)
    accepted: list[int] = []
    accept, remove = drafter.accept, drafter.remove
    removed: list[tuple[int, list[int]]] = []
    drafter.accept = lambda seq, tokens, hidden, drafted: (accepted.extend(tokens), accept(seq, tokens, hidden, drafted))[1]
    drafter.remove = lambda seq, last=(): (removed.append((seq, list(last))), remove(seq, last))[1]
    runtime = Runtime(engine, drafter, 5, CallStats())
    first = runtime.add([1, 2], n, never, ends=[4, 5])
    generated = finish(runtime, first)[first.seq]
    ((seq, last),) = removed
    assert seq == first.seq
    assert last
    assert accepted + last == generated == plain([1, 2], n)
    assert drafter.ends == {first.seq: [4, 5]}
    assert drafter.ended == {first.seq: [1, 2, *generated]}


def test_a_sequence_that_is_given_up_ends_with_nothing() -> None:
    drafter = FakeDrafter(half_right)
    runtime = Runtime(FakeEngine(), drafter, 5, CallStats())
    first = runtime.add([1, 2], 20, never)
    runtime.step()
    known = list(drafter.known[first.seq])
    runtime.close()
    assert drafter.ended == {first.seq: known}


def test_without_a_drafter_every_forward_gives_one_token() -> None:
    engine, stats = FakeEngine(), CallStats()
    runtime = Runtime(engine, NoDrafter(), 5, stats)
    first = runtime.add([1, 2, 3], 20, never)
    assert finish(runtime, first)[first.seq] == plain([1, 2, 3], 20)
    assert (stats.tokens, stats.forwards, stats.steps, stats.tokens_per_forward) == (20, 19, 19, 1.0)
    assert (stats.acceptance_by_depth, stats.drafted_nodes) == ([], 0)


@pytest.mark.parametrize("n", range(1, 14))
@pytest.mark.parametrize("max_nodes", [1, 4, 40])
def test_no_token_more_than_asked_for_and_no_node_that_could_not_be_used(n: int, max_nodes: int) -> None:
    engine, drafter = FakeEngine(), FakeDrafter(oracle)
    runtime = Runtime(engine, drafter, max_nodes, CallStats())
    first = runtime.add([1, 2], n, never)
    assert finish(runtime, first)[first.seq] == plain([1, 2], n)
    for known, budget, _ in drafter.proposals:
        assert budget == min(max_nodes, n - (len(known) - 2) - 1)
    assert_empty(engine, drafter, runtime)


def test_an_end_token_in_the_middle_of_an_accepted_run_ends_the_sequence_there() -> None:
    prompt = next(p for p in ([a, b] for a in range(VOCAB) for b in range(VOCAB)) if len(set(plain(p, 8))) > 3)
    continuation = plain(prompt, 12)
    for end in set(continuation[1:]):
        engine, drafter = FakeEngine(), FakeDrafter(oracle)
        runtime = Runtime(engine, drafter, 40, CallStats())
        first = runtime.add(prompt, 50, lambda token, end=end: token == end)
        generated = finish(runtime, first)[first.seq]
        assert generated == plain(prompt, 50, [end])
        assert generated.count(end) == 1
        assert_empty(engine, drafter, runtime)


def test_sequences_that_end_at_different_times_do_not_disturb_each_other() -> None:
    engine, drafter, stats = FakeEngine(), FakeDrafter(bushy), CallStats()
    runtime = Runtime(engine, drafter, 6, stats)
    asked = {tuple([i, i + 1]): n for i, n in enumerate((1, 3, 30, 11))}
    firsts = [runtime.add(prompt, n, never) for prompt, n in asked.items()]
    generated = finish(runtime, *firsts)
    assert list(generated.values()) == [plain(prompt, n) for prompt, n in asked.items()]
    sizes = [len(batch) for batch in engine.batches[len(asked) :]]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (3, 1)
    assert_empty(engine, drafter, runtime)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12])
def test_a_long_prompt_is_prefilled_in_chunks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PREFILL_CHUNK", 4)
    prompt = [i % VOCAB for i in range(length)]
    engine, drafter, stats = FakeEngine(), FakeDrafter(half_right), CallStats()
    runtime = Runtime(engine, drafter, 5, stats)
    first = runtime.add(prompt, 9, never)
    assert [rows.tokens for (rows,) in engine.batches] == [prompt[i : i + 4] for i in range(0, length, 4)]
    assert all(rows.last_only for (rows,) in engine.batches)
    assert finish(runtime, first)[first.seq] == plain(prompt, 9)
    assert (stats.prefills, stats.prompt_tokens) == (1, length)


def test_an_engine_that_verifies_chains_is_given_the_most_probable_chain() -> None:
    tree = DraftTree(tokens=(1, 2, 3, 4), parents=(-1, -1, 1, 0), probs=(0.3, 0.7, 0.6, 0.2))
    engine = FakeEngine("chains")
    runtime = Runtime(engine, FakeDrafter(lambda *_: tree), 9, CallStats())
    runtime.add([1], 30, never)
    runtime.step()
    assert engine.batches[-1][0].tree == DraftTree.chain([2, 3], [0.7, 0.6])


def test_a_step_without_sequences_does_nothing() -> None:
    engine = FakeEngine()
    stats = CallStats()
    assert Runtime(engine, FakeDrafter(oracle), 5, stats).step() == []
    assert (engine.batches, stats.forwards) == ([], 0)


# --- processors -----------------------------------------------------------------------------------------------------------------


@dataclass
class Recorder:
    """A logits processor that forbids the last two tokens, and keeps what it was shown."""

    prefixes: list[list[int]] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == scores.shape[0] == 1
        assert scores.dtype == torch.float32
        self.prefixes.append(input_ids[0].tolist())
        self.scores.append(scores[0].clone())
        scores[0, [t for t in self.prefixes[-1][-2:] if t < VOCAB]] = float("-inf")
        return scores


@PROPERTY
@given(
    prompt=prompts,
    n=st.integers(1, 20),
    policy=st.sampled_from(POLICIES),
    ends=st.lists(st.integers(0, VOCAB - 1), max_size=1),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_processor_sees_each_prefix_once_and_in_order(
    prompt: list[int], n: int, policy: Policy, ends: list[int], padding: int, seed: int
) -> None:
    """The caller's row, padding included, and the committed tokens: exactly what plain decoding would show, with the target's scores."""
    seen = [VOCAB] * padding + prompt
    reference, processor = Recorder(), Recorder()
    expected = plain(prompt, n, ends, reference, seen)
    engine, drafter = FakeEngine(), FakeDrafter(policy, rng=random.Random(seed))
    runtime = Runtime(engine, drafter, 7, CallStats())
    first = runtime.add(prompt, n, lambda token: token in ends, processor, seen)
    assert finish(runtime, first)[first.seq] == expected
    assert processor.prefixes == reference.prefixes == [seen + expected[:i] for i in range(len(expected))]
    assert all(torch.equal(a, b) for a, b in zip(processor.scores, reference.scores, strict=True))
    assert_empty(engine, drafter, runtime)


def test_sequences_with_and_without_a_processor_share_a_step() -> None:
    runtime = Runtime(FakeEngine(), FakeDrafter(bushy), 7, CallStats())
    firsts = [runtime.add([1, 2], 15, never, Recorder()), runtime.add([1, 2], 15, never)]
    assert list(finish(runtime, *firsts).values()) == [plain([1, 2], 15, processor=Recorder()), plain([1, 2], 15)]


# --- faults ---------------------------------------------------------------------------------------------------------------------


def decode(runtime: Runtime, count: int, stop: Callable[[int], bool], processor: Processor | None = None) -> None:
    """As the decode loop drives it: whatever happens, `close`."""
    try:
        for i in range(count):
            runtime.add([i, 1, 2], 25, stop, processor)
        while runtime.sequences:
            runtime.step()
    finally:
        runtime.close()


@pytest.mark.parametrize("after", [0, 1, 2, 4])
@pytest.mark.parametrize(
    ("where", "verb"),
    [
        *[("engine", verb) for verb in ("add", "forward", "commit")],
        *[("drafter", verb) for verb in ("add", "accept", "propose")],
        *[("stop", ""), ("processor", "")],
    ],
)
def test_an_exception_anywhere_leaves_no_sequence_behind(where: str, verb: str, after: int) -> None:
    engine, drafter = FakeEngine(), FakeDrafter(half_right)
    calls = 0

    def failing(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > after:
            raise ZeroDivisionError(where)
        return False if where == "stop" else arguments[1]

    if where in ("engine", "drafter"):
        (engine if where == "engine" else drafter).raises = {verb: after}
    runtime = Runtime(engine, drafter, 5, CallStats())
    count = after + 1 if verb == "add" else 2
    with pytest.raises(ZeroDivisionError):
        decode(runtime, count, failing if where == "stop" else never, failing if where == "processor" else None)
    assert_empty(engine, drafter, runtime)
    engine.raises, drafter.raises = {}, {}
    first = runtime.add([3, 1], 9, never)  # and everything serves again
    assert finish(runtime, first)[first.seq] == plain([3, 1], 9)


@pytest.mark.parametrize(("where", "verb"), [("engine", "forward"), ("engine", "commit"), ("drafter", "add"), ("drafter", "accept")])
def test_a_failed_add_leaves_the_other_sequences_running(where: str, verb: str) -> None:
    engine, drafter = FakeEngine(), FakeDrafter(bushy)
    runtime = Runtime(engine, drafter, 5, CallStats())
    first = runtime.add([1, 2], 20, never)
    (engine if where == "engine" else drafter).raises = {verb: 0}
    with pytest.raises(ZeroDivisionError):
        runtime.add([4, 4], 20, never)
    engine.raises, drafter.raises = {}, {}
    assert set(engine.kept) == set(drafter.known) == set(runtime.sequences) == {first.seq}
    assert finish(runtime, first)[first.seq] == plain([1, 2], 20)


@PROPERTY
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    chunk=st.integers(1, 12),
    needs_hidden=st.booleans(),
)
def test_prompts_share_forwards_of_as_many_rows_as_one_may_take(lengths: list[int], chunk: int, needs_hidden: bool) -> None:
    engine, drafter, stats, told = FakeEngine(), FakeDrafter(half_right, needs_hidden), CallStats(), []
    runtime = Runtime(engine, drafter, 5, stats, progress=told.append, chunk=chunk)
    prompts = [[i % VOCAB] * n for i, n in enumerate(lengths)]
    firsts = runtime.admit([Arrival(prompt, 9, never) for prompt in prompts])
    forwards: list[list[int]] = []
    for n in lengths:
        while n:
            if not forwards or sum(forwards[-1]) == chunk:
                forwards.append([])
            forwards[-1].append(min(n, chunk - sum(forwards[-1])))
            n -= forwards[-1][-1]
    assert [[rows.count for rows in batch] for batch in engine.batches] == forwards
    assert all(rows.last_only for batch in engine.batches for rows in batch)
    assert told == [sum(rows) for rows in forwards]
    assert (stats.prefills, stats.prompt_tokens) == (len(lengths), sum(lengths))
    assert list(finish(runtime, *firsts).values()) == [plain(prompt, 9) for prompt in prompts]


@pytest.mark.parametrize(("where", "verb"), [("engine", "add"), ("engine", "commit"), ("drafter", "add"), ("drafter", "accept")])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_of_sequences_that_come_together_all_are_admitted_or_none(where: str, verb: str, after: int) -> None:
    engine, drafter = FakeEngine(), FakeDrafter(bushy)
    runtime = Runtime(engine, drafter, 5, CallStats())
    first = runtime.add([1, 2], 20, never)
    (engine if where == "engine" else drafter).raises = {verb: after}
    with pytest.raises(ZeroDivisionError):
        runtime.admit([Arrival([i], 20, never) for i in range(3)])
    engine.raises, drafter.raises = {}, {}
    assert set(engine.kept) == set(drafter.known) == set(runtime.sequences) == {first.seq}
    assert runtime.admit([]) == []
    assert finish(runtime, first)[first.seq] == plain([1, 2], 20)


def test_a_full_pool_refuses_a_sequence_before_the_drafter_hears_of_it() -> None:
    class Full(FakeEngine):
        def add(self, seq: int, capacity: int) -> None:
            raise KVPoolError(f"{capacity}")

    drafter = FakeDrafter(oracle)
    runtime = Runtime(Full(), drafter, 5, CallStats())
    with pytest.raises(KVPoolError, match="28"):  # prompt, new tokens, and a tree with its pending token
        runtime.add([1, 2], 20, never)
    assert not drafter.prompts
    assert not runtime.sequences


@dataclass
class Bounded(FakeEngine):
    """It has room for so many tokens of all sequences."""

    tokens: int = 0

    def add(self, seq: int, capacity: int) -> None:
        self._require(capacity)
        super().add(seq, capacity)

    def extend(self, seq: int, capacity: int) -> None:
        self._require(capacity - self.capacity[seq])
        super().extend(seq, capacity)

    def _require(self, more: int) -> None:
        if sum(self.capacity.values()) + more > self.tokens:
            raise KVPoolError("full")


@pytest.mark.parametrize("policy", [nothing, oracle, bushy])
def test_sequences_that_grow_get_room_when_they_need_it(policy: Policy) -> None:
    """Two long ones and a short one, beside one that they can do without."""
    engine, drafter = Bounded(tokens=1300), FakeDrafter(policy)
    engine.add(-1, 400)
    lengths = {1: 700, 2: 5, 3: 300}

    def ending(n: int) -> Callable[[int], bool]:
        count = itertools.count(1)
        return lambda token: next(count) == n

    def make_room() -> bool:
        there = -1 in engine.kept
        engine.remove(-1)
        return there

    runtime = Runtime(engine, drafter, 5, CallStats(), make_room)
    seqs = [runtime.reserve(1, 10**9, grows=True) for _ in lengths]
    firsts = runtime.admit([Arrival([i], 10**9, ending(n), seq=seq) for seq, (i, n) in zip(seqs, lengths.items(), strict=True)])
    assert all(engine.capacity[seq] == 1 + PIECE + 6 for seq in seqs)
    assert -1 in engine.kept  # there was no need yet
    assert list(finish(runtime, *firsts).values()) == [plain([i], n) for i, n in lengths.items()]
    assert_empty(engine, drafter, runtime)


def test_a_sequence_that_grows_has_no_more_room_than_it_may_need() -> None:
    engine = Bounded(tokens=27)
    runtime = Runtime(engine, FakeDrafter(oracle), 5, CallStats())
    seq = runtime.reserve(1, 20, grows=True)
    assert engine.capacity[seq] == 27
    assert finish(runtime, runtime.add([1], 20, never, seq=seq))[seq] == plain([1], 20)


def test_a_text_that_outgrows_the_memory_is_an_error_and_leaves_nothing_behind() -> None:
    engine, drafter = Bounded(tokens=800), FakeDrafter(nothing)
    runtime = Runtime(engine, drafter, 5, CallStats())
    with pytest.raises(KVPoolError, match="full"):  # not even its beginning fits
        runtime.reserve(700, 10**9, grows=True)
    first = runtime.add([1], 10**9, never, seq=runtime.reserve(1, 10**9, grows=True))
    with pytest.raises(KVPoolError, match=r"no room for a text of more than \d+ tokens: full"):
        finish(runtime, first)
    assert_empty(engine, drafter, runtime)


def test_what_is_asked_of_a_kept_sequence_has_room_too() -> None:
    engine = Bounded(tokens=2000)
    runtime = Runtime(engine, FakeDrafter(nothing), 5, CallStats())
    first = runtime.add([1], 10**9, lambda token: True, seq=runtime.reserve(1, 10**9, grows=True), keep=True)
    assert first.finished
    after = [3] * 900
    assert torch.equal(runtime.logits_on(first.seq, after)[-1], logits_after([1, *first.tokens, *after]))
    runtime.close()
    assert not engine.kept


def test_close_and_remove_free_sequences_that_have_not_ended() -> None:
    engine, drafter = FakeEngine(), FakeDrafter(bushy)
    runtime = Runtime(engine, drafter, 5, CallStats())
    firsts = [runtime.add([i], 40, never) for i in range(3)]
    runtime.step()
    runtime.remove(firsts[0].seq)
    runtime.remove(firsts[0].seq)
    assert set(engine.kept) == set(drafter.known) == {firsts[1].seq, firsts[2].seq}
    runtime.close()
    runtime.close()
    assert_empty(engine, drafter, runtime)


# --- statistics -----------------------------------------------------------------------------------------------------------------


def accepted_depth(known: list[int], tree: DraftTree) -> int:
    """Tokens of the tree on the plain continuation of `known`."""
    nodes, node, depth = dict(zip(zip(tree.parents, tree.tokens, strict=True), range(len(tree)), strict=True)), -1, 0
    while (node := nodes.get((node, next_token(known)), -2)) >= 0:
        known, depth = [*known, tree.tokens[node]], depth + 1
    return depth


@pytest.mark.parametrize("policy", [half_right, bushy, wrong, oracle])
def test_statistics_count_what_was_drafted_and_accepted(policy: Policy) -> None:
    engine, drafter, stats = FakeEngine(), FakeDrafter(policy), CallStats()
    runtime = Runtime(engine, drafter, 6, stats)
    generated = finish(runtime, *[runtime.add([i, 3, 2], n, never) for i, n in enumerate((40, 25, 60))])
    assert stats.tokens == sum(map(len, generated.values())) == 125
    assert (stats.prefills, stats.prompt_tokens) == (3, 9)
    steps = engine.batches[3:]
    assert stats.forwards == len(steps)
    assert stats.steps == sum(map(len, steps)) == len(drafter.proposals)
    assert stats.tokens_per_forward == (125 - 3) / stats.steps
    assert stats.drafted_nodes == sum(len(tree) for _, _, tree in drafter.proposals)
    outcomes = [(max(tree.depths()), accepted_depth(known, tree)) for known, _, tree in drafter.proposals]
    assert sum(depth + 1 for _, depth in outcomes) == 125 - 3
    deepest = max(depth for depth, _ in outcomes)
    assert stats.proposed == [sum(p > d for p, _ in outcomes) for d in range(deepest)]
    assert stats.accepted == [sum(a > d for _, a in outcomes) for d in range(deepest)]
    assert stats.acceptance_by_depth == [a / p for a, p in zip(stats.accepted, stats.proposed, strict=True)]
    if policy is oracle:
        assert set(stats.acceptance_by_depth) == {1.0}
    if policy is wrong:
        assert set(stats.acceptance_by_depth) == {0.0}
        assert stats.tokens_per_forward == 1.0


def test_seconds_are_booked_to_their_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the fakes advance: target forwards, drafting and learning, nothing else."""
    now = 0.0
    monkeypatch.setattr("specfx.timing.time.perf_counter", lambda: now)

    def taking(seconds: float, verb: Callable[..., object]) -> Callable[..., object]:
        def timed(*arguments: object) -> object:
            nonlocal now
            now += seconds
            return verb(*arguments)

        return timed

    engine, drafter, stats = FakeEngine(), FakeDrafter(half_right), CallStats()
    drafter.propose, drafter.accept = taking(1.0, drafter.propose), taking(100.0, drafter.accept)
    engine.forward, engine.commit = taking(10_000.0, engine.forward), taking(0.01, engine.commit)
    runtime = Runtime(engine, drafter, 6, stats)
    finish(runtime, runtime.add([1, 2], 30, never))
    accepts = stats.steps  # one after the prefill and after each step but the last
    assert set(stats.seconds) == set(STAGES)
    assert stats.seconds["prefill"] == pytest.approx(10_000.01)
    assert stats.seconds["forward"] == pytest.approx(10_000.0 * stats.forwards)
    assert stats.seconds["draft"] == pytest.approx(1.0 * stats.forwards + 100.0 * accepts)
    assert stats.seconds["accept"] == pytest.approx(0.01 * stats.steps)
