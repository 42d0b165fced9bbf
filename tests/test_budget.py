"""What is verified of the drafts of a step, under costs and fortunes that the tests choose."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_session import FakeDrafter, FakeEngine, finish, never, oracle, plain, wrong
from tiny import VOCAB, tiny_model

import specfx
from specfx.drafters.mtp_files import save_draft_vocab
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.runtime import budget
from specfx.runtime.budget import Budget
from specfx.runtime.session import Runtime
from specfx.runtime.stats import CallStats
from specfx.runtime.tree import EMPTY_TREE, DraftTree, merged


def told(fixed: float, each: float, forwards: int = 40, noise: float = 0.0) -> Budget:
    """A budget that has seen forwards of 1 to 16 rows at this cost."""
    rng, made = random.Random(0), Budget()
    for i in range(forwards):
        rows = 1 + i * 7 % 16
        made.note_forward(rows, (fixed + each * rows) * (1 + noise * rng.uniform(-1, 1)))
    return made


def random_tree(rng: random.Random, nodes: int) -> DraftTree:
    parents = [rng.randrange(-1, i) for i in range(nodes)]
    probs: list[float] = []
    for parent in parents:
        probs.append(rng.random() * (probs[parent] if parent >= 0 else 1.0))
    return DraftTree(tuple(range(nodes)), tuple(parents), tuple(probs))


@pytest.mark.parametrize("seed", range(20))
def test_the_nodes_with_the_most_tokens_per_second_are_verified(seed: int) -> None:
    rng = random.Random(seed)
    fixed, each = rng.uniform(0.5, 20), rng.uniform(0.01, 2)
    trees = [random_tree(rng, rng.randrange(8)) for _ in range(rng.randint(1, 4))]
    got = told(fixed, each).share(trees)
    every = sorted((p for tree in trees for p in tree.probs), reverse=True)

    def rate(probs: list[float]) -> float:
        return (len(trees) + sum(probs)) / (fixed + each * (len(trees) + len(probs)))

    best = max((every[:n] for n in range(len(every) + 1)), key=rate)
    assert sorted((p for tree in got for p in tree.probs), reverse=True) == best
    for whole, part in zip(trees, got, strict=True):
        paths = [path_of(whole, i) for i in range(len(whole))]
        assert all(path_of(part, i) in paths for i in range(len(part)))
        DraftTree(part.tokens, part.parents, part.probs)  # keeps the rules


def path_of(tree: DraftTree, node: int) -> tuple[int, ...]:
    return () if node < 0 else (*path_of(tree, tree.parents[node]), tree.tokens[node])


def test_rows_that_cost_nothing_are_all_used_and_dear_ones_only_where_they_are_sure() -> None:
    trees = [DraftTree.chain([1, 2, 3], [0.9, 0.5, 0.02]), DraftTree.chain([4, 5], [0.3, 0.1]), EMPTY_TREE]
    assert told(10, 0).share(trees) == trees
    assert list(map(len, told(10, 1).share(trees))) == [2, 1, 0]
    assert list(map(len, told(5, 10).share(trees))) == [1, 0, 0]
    assert list(map(len, told(1, 10).share(trees))) == [0, 0, 0]
    assert list(map(len, told(10, 1, noise=0.1).share(trees))) == [2, 1, 0]


def test_nothing_is_left_out_before_something_is_known() -> None:
    trees = [DraftTree.chain([1, 2, 3], [0.9, 0.5, 0.001])]
    assert Budget().share(trees) == trees
    assert told(1, 10, forwards=budget._FEWEST - 1).share(trees) == trees


def test_where_all_forwards_have_as_many_rows_a_plain_one_tells_what_a_row_costs() -> None:
    """Of drafts that are never right, one step in `_PROBE` is left; if they are right, one step in some is plain, and fewer with time."""
    for accepted in (0, 3):
        made, verified = Budget(), []
        for _ in range(400):
            assert made.wants(within=False), "drafts that cost nothing"
            (tree,) = made.share([DraftTree.chain([1, 2, 3], [0.9, 0.9, 0.9])])
            made.note_forward(1 + len(tree), 10 + 1.0 * (1 + len(tree)))
            if len(tree):
                made.note_draft(tree, accepted)
            verified.append(len(tree))
        first = budget._FEWEST
        assert verified[: first + 1] == [3] * first + [0]
        if accepted:
            assert verified.count(3) > 0.98 * len(verified)
        else:
            assert sum(n > 0 for n in verified[40:]) <= 360 // budget._PROBE + 1


@pytest.mark.parametrize("new", [True, False])
def test_a_draft_that_tells_no_more_than_the_one_beside_it_is_not_made(new: bool) -> None:
    """The other one is verified all the while, and a draft that tells more is made all the while."""
    made, other = Budget(), DraftTree.chain([1, 2, 3], [0.9, 0.8, 0.7])
    ours = DraftTree.chain([1, 2, 3, 4, 5, 6], [0.9, 0.8, 0.7, 0.6, 0.6, 0.6]) if new else DraftTree.chain([1, 2], [0.9, 0.8])
    drafted = []
    for _ in range(400):
        drafted.append(made.wants(within=False))
        if drafted[-1]:
            made.note_drafting(1.0)
        (tree,) = made.share([merged(ours, other, 15) if drafted[-1] else other], None, [other] if drafted[-1] else None)
        made.note_forward(1 + len(tree), 10 + 0.2 * (1 + len(tree)))
        if len(tree):
            accepted = len(tree) * 3 // 4
            made.note_draft(tree, accepted, min(accepted, 3) if drafted[-1] else None)
        assert len(tree) >= 3 or len(drafted) % budget._PROBE in (budget._FEWEST + 1, 0), len(drafted)
    assert sum(drafted) > 390 if new else sum(drafted) < 60


def batch_step(made: Budget, sequences: int, prob: float, right: int, drafting: float, drafted: list[bool]) -> None:
    """A step of a batch: a forward takes 10 seconds, a row 0.2 and a draft `drafting`. Each sequence's draft is a token of probability
    `prob`; the last `right` sequences' are right. drafted: whether each step so far drafted; this one is added."""
    drafted.append(made.wants(True, sequences))
    trees = [DraftTree.chain([1], [prob])] * sequences if drafted[-2:-1] == [True] else []
    kept = made.share(trees or [EMPTY_TREE] * sequences, None, () if trees else None)
    for i, tree in enumerate(kept):
        if len(tree):
            made.note_draft(tree, int(i >= sequences - right))
    rows = sequences + sum(map(len, kept))
    made.note_forward(rows, 10 + 0.2 * rows + drafting * drafted[-1], drafted[-1])


def test_in_a_batch_a_few_right_drafts_are_no_reason_to_go_on() -> None:
    """Eight sequences, and drafts of 4 seconds that bring one of them a token, though half of what was foretold: not worth a draft. For a
    sequence alone a token is worth one."""
    counts = {}
    for sequences in (8, 1):
        made, drafted = Budget(), list[bool]()
        for _ in range(300):
            batch_step(made, sequences, 0.25 if sequences > 1 else 1.0, 1, 4, drafted)
        counts[sequences] = sum(drafted[50:])
    assert counts[8] < 25
    assert counts[1] > 240


def test_what_a_draft_saves_is_seen_anew_when_sequences_have_ended() -> None:
    """As the batch above, whose drafts don't pay; the one that is left when the seven others end has drafts that do."""
    made, drafted = Budget(), list[bool]()
    for step in range(330):
        batch_step(made, 8 if step < 300 else 1, 0.5, 1, 2, drafted)
    assert sum(drafted[100:300]) < 40
    assert sum(drafted[300:]) > 25


@pytest.mark.parametrize("within", [True, False])
def test_drafts_that_cost_more_than_they_save_are_not_made_and_made_again_when_they_do(within: bool) -> None:
    """A forward takes 10 seconds and a draft 2: of drafts that bring 0.05 tokens probes are left, of such that bring one, all are made."""
    made, drafted = Budget(), list[bool]()
    for step in range(600):
        bad, ready = step < 300, drafted[-1] if within and drafted else True
        wanted = made.wants(within)
        tree = DraftTree.chain([1, 2], [0.8, 0.6])
        if (ready if within else wanted) and len(made.share([tree])[0]):
            made.note_draft(tree, (step % 20 == 0) if bad else 1)
        if not within and wanted:
            made.note_drafting(2.0)
        made.note_forward(3, 10 + 2 * (wanted and within), within and wanted)
        drafted.append(wanted)
    assert all(drafted[: budget._FEWEST_RESTED])
    assert sum(drafted[30:300]) < 27
    assert sum(drafted[100:300]) > 5
    assert sum(drafted[450:600]) > 130


def test_a_dear_draft_is_probed_more_rarely() -> None:
    """Probes cost no more than a fiftieth of the time."""
    made, seconds = Budget(), 0.0
    for step in range(4000):
        if made.wants(within=False):
            seconds += 100.0 * (step > 200)
            made.note_drafting(100.0)
            made.share([DraftTree.chain([1], [0.9])])
            made.note_draft(DraftTree.chain([1], [0.9]), 0)
        made.note_forward(1, 10.0)
    assert 0 < seconds < 0.03 * 3800 * 10


def test_a_clock_that_stands_still_stops_nothing() -> None:
    made = Budget()
    for step in range(100):
        made.wants(within=bool(step % 2))
        made.note_drafting(0.0)
        assert len(made.share([DraftTree.chain([1], [0.9])])) == 1
        made.note_forward(1 + step % 3, 0.0, bool(step % 2))


def test_the_last_sequence_of_a_batch_counts_most() -> None:
    assert budget.urgency([100, 50, 100], [1.0, 1.0, 2.0]) == [1.0, 0.5**budget._URGENT, 0.5**budget._URGENT]
    assert budget.urgency([0, 1], [1.0, 1.0])[0] > 0
    trees = [DraftTree.chain([1, 2], [0.9, 0.8]), DraftTree.chain([3, 4], [0.5, 0.4])]
    assert list(map(len, told(10, 3).share(trees))) == [2, 0]
    assert list(map(len, told(10, 3).share(trees, [0.1, 1.0]))) == [0, 2]


def test_on_a_busy_machine_nothing_is_left_out_for_noise() -> None:
    trees = [DraftTree.chain([1, 2, 3], [0.9, 0.5, 0.02])]
    rng = random.Random(1)
    for _ in range(20):
        noisy = Budget()
        for _ in range(40):
            noisy.note_forward(rng.randint(1, 6), 10 + rng.expovariate(0.2))
        assert noisy._costs.fit().each < 1
        kept = noisy.share(trees)[0]
        assert len(kept) >= 2


def test_a_forward_that_something_else_has_held_up_counts_little() -> None:
    held_up = told(10, 1)
    held_up.note_forward(3, 1e6)
    assert held_up._costs.of(8, False) < 30


def costing(monkeypatch: pytest.MonkeyPatch, engine: Any, fixed: float, each: float) -> None:
    """A clock that only forwards advance."""
    now, forward = 0.0, engine.forward
    monkeypatch.setattr("specfx.runtime.session.time.perf_counter", lambda: now)

    def timed(batch: list) -> list:
        nonlocal now
        now += fixed + each * sum(rows.count for rows in batch)
        return forward(batch)

    engine.forward = timed


def test_where_drafts_fail_decoding_is_plain_within_tens_of_tokens_and_drafts_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = {"policy": wrong}
    engine, stats = FakeEngine(), CallStats()
    drafter = FakeDrafter(lambda known, budget, rng: turn["policy"](known, min(budget, rng.randint(0, 4)), rng))
    costing(monkeypatch, engine, 10, 0.5)
    runtime = Runtime(engine, drafter, 8, stats, budget=Budget())
    first = runtime.add([1, 2], 400, never)
    text, drafted = list(first.tokens), []
    while len(text) < 200:
        before = stats.drafted_nodes
        text += runtime.step()[0].tokens
        drafted.append(stats.drafted_nodes - before)
    assert sum(drafted[:20]) > 20
    assert sum(n > 0 for n in drafted[60:]) <= len(drafted[60:]) / budget._PROBE + 1, "but for probes"
    assert sum(n > 0 for n in drafted[60:]) >= 2
    turn["policy"] = oracle
    while runtime.sequences:
        before = stats.drafted_nodes
        text += runtime.step()[0].tokens
        drafted.append(stats.drafted_nodes - before)
    assert sum(n > 0 for n in drafted[-12:]) > 6
    assert text == plain([1, 2], 400)


@pytest.mark.parametrize("method", ["suffix", "mtp"])
@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_every_method_is_plain_where_its_drafts_fail_and_drafts_again_where_they_come_true(
    engine: str, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model first never chooses what is drafted, then always. mtp: a head that drafts 7 and 8 alone. suffix: random text of few tokens,
    and then a constant one."""
    model, rows = tiny_model("llama"), torch.tensor([7, 8])
    options: dict[str, Any] = {}
    if method == "mtp":
        options = {"head": save_head(MtpHead.from_target(model), tmp_path), "num_steps": 2}
        save_draft_vocab(rows, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[rows] = 0
    specfx.speculate(model, method, engine=engine, compile="off", **options)
    serving, drafter = specfx.api.engine_of(model), specfx.drafter_of(model)
    costing(monkeypatch, serving, 10, 1)
    verified: list[int] = []
    offered: list[int] = []
    forward, propose = serving.forward, drafter.propose

    def noted(batch: list[Any]) -> Any:
        verified.extend(len(rows.tree) for rows in batch if rows.tree is not None)
        return forward(batch)

    def offering(*args: Any) -> list[DraftTree]:
        trees = propose(*args)
        offered.extend(map(len, trees))
        return trees

    monkeypatch.setattr(serving, "forward", noted)
    monkeypatch.setattr(drafter, "propose", offering)
    hot = {"do_sample": True, "temperature": 3.0, "suppress_tokens": list(range(16, VOCAB))} if method == "suffix" else {}
    torch.manual_seed(0)
    model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=180, **hot)
    assert sum(verified[:20]) > 10
    later, probes = verified[60:], (len(verified) - 60) // budget._PROBE + 1
    assert sum(n > 0 for n in offered[60:]) > probes
    assert sum(n > 0 for n in later) <= probes + 2, "one that comes true by chance is followed by another"
    assert sum(10 + 1 + n for n in later) < 1.05 * sum(10 + 1 for _ in later), "seconds, beside plain decoding"
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[rows] = 9 * torch.tensor([[1.0], [-1.0]]) * torch.ones(32)
    verified.clear()
    model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=300, **hot)
    assert specfx.api.engine_of(model) is serving
    assert sum(n > 0 for n in verified[-12:]) > 8
    assert specfx.stats(model).last.tokens_per_forward > 1.3


def test_a_batch_verifies_where_the_gain_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sequences, one is easy to foretell and one is not; both end as they should."""
    engine, stats = FakeEngine(), CallStats()

    def policy(known: list[int], most: int, rng: random.Random) -> DraftTree:
        tree, sure = (oracle, 0.9) if known[0] == 1 else (wrong, 0.05)
        chain = tree(known, min(most, rng.randint(1, 6)), rng)
        return DraftTree.chain(chain.tokens, list(itertools.accumulate([sure] * len(chain), lambda a, b: a * b)))

    costing(monkeypatch, engine, 5, 1)
    runtime = Runtime(engine, FakeDrafter(policy), 8, stats, budget=Budget())
    asked = {(1, 1): 150, (2, 1): 40}
    firsts = [runtime.add(list(p), n, never) for p, n in asked.items()]
    generated = finish(runtime, *firsts)
    assert [generated[f.seq] for f in firsts] == [plain(p, n) for p, n in asked.items()]
    sizes = [tuple(rows.count for rows in batch) for batch in engine.batches if len(batch) == 2][20:]
    assert sum(a for a, _ in sizes) > 2 * len(sizes)
    assert sum(b for _, b in sizes) < 1.3 * len(sizes)
