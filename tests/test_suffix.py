"""The suffix drafter as the runtime drives it: what it drafts in examples that a reader can follow, that any other story goes as the oracle
says, and that nothing it is told (too late, twice, or from several threads) leaves it in a bad state."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import suffix_scenario
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from streams import ROOT, Stream, kinds, long_streams, streams, tokens, words
from suffix_oracle import NODES, Contexts, Twin
from suffix_reader import assert_cursors_are_places, assert_exact, locate

from specfx.cache import cache_dir
from specfx.drafters import _jit, suffix, suffix_cache, suffix_model, suffix_tree
from specfx.drafters.suffix import SuffixDrafter
from specfx.errors import Reason
from specfx.options import SuffixOptions
from specfx.runtime.tree import EMPTY_TREE, DraftTree

DEFAULTS = SuffixOptions()
LARGEST = 2**31 - 1


def draft(text: Stream, options: SuffixOptions = DEFAULTS, budget: int = 16, ends: Stream = (), earlier: Stream = ()) -> DraftTree:  # type: ignore[assignment]
    """What is drafted after `text`, a prompt, when `earlier` was another request's output."""
    twin = Twin(options)
    if earlier:
        twin.add(1, [])
        twin.remove(1, earlier)
    twin.add(0, text, ends)
    return twin.propose([0], [budget])[0]


# --- drafts that a reader can follow ----------------------------------------------------------------------------------------------


def test_a_repeated_passage_is_drafted_as_a_chain() -> None:
    passage = list(range(100, 200))
    tree = draft([*passage, 5, *passage[:32]])
    assert len(tree) >= 4
    assert tree == DraftTree.chain(passage[32 : 32 + len(tree)], tree.probs)
    assert tree.probs[0] > 0.65


def test_two_continuations_make_a_branch() -> None:
    """After ``1 2`` came 3 twice and 4 once; each is followed by what followed it then."""
    tree = draft([1, 2, 3, 30, 1, 2, 3, 30, 1, 2, 4, 40, 1, 2], SuffixOptions(min_token_prob=0.02))
    roots = {token: i for i, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)) if parent < 0}
    assert tree.tokens[0] == 3
    assert set(roots) == {3, 4}
    assert tree.tokens[tree.parents.index(roots[3])] == 30
    assert tree.tokens[tree.parents.index(roots[4])] == 40
    assert tree.probs[roots[3]] > tree.probs[roots[4]]


def test_without_trees_the_likelier_branch_is_drafted() -> None:
    text = [1, 2, 3, 30, 1, 2, 3, 30, 1, 2, 4, 40, 1, 2]
    tree = draft(text, SuffixOptions(min_token_prob=0.02, use_tree_spec=False))
    assert tree.is_chain
    assert tree.tokens[:2] == (3, 30)


def test_the_more_recent_of_two_equals_comes_first() -> None:
    for first, second in ((3, 4), (4, 3)):
        tree = draft([1, 2, first, 1, 2, second, 1, 2], SuffixOptions(min_token_prob=0.02))
        assert tree.tokens[:2] == (second, first)
        assert tree.probs[0] == tree.probs[1]


def test_the_live_suffix_does_not_count_itself() -> None:
    """A long context that occurs for the second time was followed once: that speaks for what followed, and nothing against it."""
    context = list(range(100, 130))
    tree = draft([*context, 7, *context])
    assert tree.tokens[0] == 7
    assert tree.probs[0] > 0.65


def test_a_changed_token_costs_one_step_of_a_copy() -> None:
    """After an edit inside a copy the draft comes back as soon as the text does."""
    passage = list(range(100, 200))
    assert draft([*passage, 5, *passage[:40], 7, *passage[41:43]]).tokens[:2] == tuple(passage[43:45])


def test_periodic_text_is_drafted_beyond_its_end() -> None:
    assert draft([1, 2, 3] * 20, budget=12).tokens == (1, 2, 3) * 4
    assert draft([4] * 80, budget=12).tokens == (4,) * 12


@pytest.mark.parametrize("text", [[], [1], [1, 2, 3, 4], list(range(500))])
def test_nothing_is_drafted_when_nothing_repeats(text: Stream) -> None:
    assert draft(text) == EMPTY_TREE


def test_nothing_is_drafted_after_an_end() -> None:
    """Another text went on behind its end (a conversation does), this one won't."""
    text = [1, 2, 3, 0, 9, 8, 1, 2]
    assert draft(text).tokens == (3, 0, 9, 8, 1, 2)[: len(draft(text))]
    assert draft(text, ends=[0, 77]).tokens == (3, 0)
    assert 9 in draft(text, ends=[77]).tokens


def test_what_another_request_wrote_is_drafted() -> None:
    passage = list(range(100, 200))
    tree = draft([5, *passage[:10]], earlier=passage)
    assert tree == DraftTree.chain(passage[10 : 10 + len(tree)], tree.probs)
    assert len(tree) > 4


def test_what_was_given_to_another_request_is_not() -> None:
    """Outputs are shared, prompts are not."""
    twin = Twin(DEFAULTS)
    twin.add(1, [1, 2, 3, 4, 5])
    twin.remove(1, [6])
    twin.add(0, [1, 2, 3])
    assert twin.propose([0], [9]) == [EMPTY_TREE]


def test_own_text_and_earlier_outputs_are_one_proposal() -> None:
    """Both know that 3 follows ``1 2``, and then disagree: one node for the 3, two below it."""
    tree = draft([1, 2, 3, 4, 9, 1, 2], SuffixOptions(min_token_prob=0.02), earlier=[8, 1, 2, 3, 5, 7])
    assert (tree.tokens[0], tree.parents[1:].count(-1)) == (3, 0)
    below = {token for token, parent in zip(tree.tokens, tree.parents, strict=True) if parent == 0}
    assert below == {4, 5}


def test_evidence_from_both_is_stronger_than_from_either() -> None:
    mine, others = [6, 1, 2, 3, 4, 5, 9, 1, 2, 3], [8, 1, 2, 3, 4, 5]
    both = draft(mine, earlier=others).probs[0]
    assert both > draft(mine).probs[0]
    assert both > draft([9, 1, 2, 3], earlier=others).probs[0]


def test_a_request_knows_the_outputs_of_those_that_still_run() -> None:
    twin = Twin(DEFAULTS)
    twin.add(0, [])
    twin.add(1, [])
    twin.accept(0, [1, 2, 3, 4, 5, 6, 7, 8])
    twin.accept(1, [1, 2, 3, 4])
    assert twin.propose([1], [2])[0].tokens == (5, 6)


@pytest.mark.parametrize("budget", [0, -1])
def test_nothing_is_drafted_without_a_budget(budget: int) -> None:
    assert draft([1, 2, 3] * 5, budget=budget) == EMPTY_TREE


def test_drafts_are_limited_by_the_length_of_the_match() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    for factor, offset, depth in [(1.0, 0.0, 2), (2.0, 0.0, 4), (1.5, 0.6, 3), (0.0, 1.0, 1), (0.0, 0.0, 0), (1.0, -5.0, 0)]:
        options = SuffixOptions(max_spec_factor=factor, max_spec_offset=offset, min_token_prob=0.01)
        assert max(draft(text, options).depths()) == depth


def test_no_draft_is_larger_than_the_largest() -> None:
    drafter = SuffixDrafter(DEFAULTS, 7)
    drafter.add(0, [4] * 30)
    assert len(drafter.propose([0], [20])[0]) == 7
    assert len(drafter.propose([0], [3])[0]) == 3


def test_the_longest_context_is_as_long_as_the_option_says() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5]
    for depth in (1, 3, 5, 64):
        drafter = SuffixDrafter(SuffixOptions(max_tree_depth=depth), 15)
        drafter.add(0, text)
        assert drafter.match_length(0) == min(depth, 5)


# --- any story, as the oracle says ------------------------------------------------------------------------------------------------

option_sets = st.builds(
    SuffixOptions,
    max_tree_depth=st.sampled_from([1, 2, 3, 8, 64]),
    max_spec_factor=st.sampled_from([float("inf"), float("inf"), 0.5, 2.0]),
    max_spec_offset=st.sampled_from([-1.0, 0.0, 2.5]),
    min_token_prob=st.sampled_from([0.02, 0.12, 0.4]),
    use_tree_spec=st.booleans(),
    max_cached_requests=st.sampled_from([-1, -1, 0, 1, 3]),
    max_cached_tokens=st.sampled_from([0, 10, 40, 10**6, 10**6]),
)


class Story(RuleBasedStateMachine):
    """Requests come, write (words of their own, or something that was written before), are drafted for, and go, while outputs are
    evicted. `Twin` compares after every call."""

    @initialize(options=option_sets, compact=st.sampled_from([1, 30, 4096]))
    def begin(self, options: SuffixOptions, compact: int) -> None:
        self.compact = mock.patch.object(suffix_cache, "_COMPACT_FROM", compact)
        self.compact.start()
        self.twin = Twin(options)
        self.written: list[Stream] = [[0]]

    def teardown(self) -> None:
        if hasattr(self, "compact"):
            assert_exact(self.twin.drafter.cache.tree, self.twin.oracle.world, stamped=False)
            self.compact.stop()

    @property
    def running(self) -> list[int]:
        return list(self.twin.oracle.requests)

    @rule(seq=st.integers(0, 3), prompt=streams, ends=st.lists(tokens, max_size=2))
    def add(self, seq: int, prompt: Stream, ends: Stream) -> None:
        if seq in self.running:
            with pytest.raises(ValueError, match=f"sequence {seq} is in use"):
                self.twin.drafter.add(seq, prompt)
        else:
            self.twin.add(seq, prompt, ends)
            self.written.append(prompt or [0])

    @rule(which=st.integers(0, 3), text=st.lists(tokens, max_size=9))
    def accept(self, which: int, text: Stream) -> None:
        if self.running:
            self.twin.accept(self.running[which % len(self.running)], text)
            self.written.append(text or [0])

    @rule(which=st.integers(0, 3), source=st.integers(0, 99), start=st.integers(0, 99), n=st.integers(1, 20), at_once=st.booleans())
    def accept_copy(self, which: int, source: int, start: int, n: int, at_once: bool) -> None:
        text = self.written[-1 - source % len(self.written)]
        copy = text[start % len(text) :][:n]
        for piece in [copy] if at_once else [[token] for token in copy]:
            self.accept(which, piece)

    @rule(budget=st.sampled_from([0, 1, 3, 8, NODES]))
    def propose(self, budget: int) -> None:
        self.twin.propose(self.running, [max(budget - i, 0) for i in range(len(self.running))])

    @rule(seq=st.integers(0, 4), last=st.lists(tokens, max_size=4))
    def remove(self, seq: int, last: Stream) -> None:
        self.twin.remove(seq, last)  # ignored for the unknown

    @rule(max_tokens=st.sampled_from([0, 10, 50]))
    def evict(self, max_tokens: int) -> None:
        self.twin.evict(max_tokens)
        assert_exact(self.twin.drafter.cache.tree, self.twin.oracle.world, stamped=False)

    @invariant()
    def all_cursors_are_places_in_the_tree(self) -> None:
        if hasattr(self, "twin"):
            assert_cursors_are_places(self.twin.drafter)


TestAnyStory = Story.TestCase
TestAnyStory.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


@kinds(240)
@pytest.mark.parametrize("options", [DEFAULTS, SuffixOptions(max_tree_depth=3, min_token_prob=0.05)], ids=["defaults", "short contexts"])
def test_long_texts_are_drafted_as_the_oracle_says(stream: Stream, options: SuffixOptions) -> None:
    """Two requests that copy from themselves and from each other."""
    twin, rng = Twin(options), random.Random(len(stream))
    twin.add(0, stream[:40])
    twin.add(1, [])
    at = 40
    while at < len(stream):
        n = rng.randint(1, 5)
        twin.accept(rng.randrange(2), stream[at : at + n])
        twin.propose([0, 1], [8, NODES])
        at += n


@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_is_drafted_for_as_the_oracle_says(seed: int) -> None:
    """Three at a time, all about the same texts, in a cache that holds a few of them."""
    rng = random.Random(seed)
    texts = [
        words("examples/edit_and_extract.jsonl", 400),
        words("tests/suffix_oracle.py", 300, 500),
        words("tests/suffix_oracle.py", 300, 700),
    ]
    twin = Twin(SuffixOptions(max_tree_depth=(4, 16, 64)[seed], max_cached_tokens=250))
    rest: dict[int, Stream] = {}
    for seq in itertools.count():
        text, at = texts[rng.randrange(3)], rng.randrange(200)
        twin.add(seq, text[at : at + rng.randrange(40)], text[:1])
        rest[seq] = text[at + 40 :][: rng.randint(1, 60)]
        while len(rest) == 3 or (rest and seq == 15):
            one = rng.choice(list(rest))
            n = rng.randint(1, 6)
            if n >= len(rest[one]):
                twin.remove(one, rest.pop(one))
            else:
                twin.accept(one, rest[one][:n])
                rest[one] = rest[one][n:]
                twin.propose(list(rest), [rng.randint(0, 15) for _ in rest])
        if seq == 15:
            break
    assert twin.oracle.evicted > 3


@kinds(150)
def test_a_batch_is_drafted_as_one_by_one(stream: Stream) -> None:
    drafter = SuffixDrafter(DEFAULTS, NODES)
    for seq in range(5):
        drafter.add(seq, stream[: 30 * seq])
        drafter.accept(seq, stream[30 * seq : 30 * seq + 40])
    seqs, budgets = [3, 0, 4, 1, 2], [5, 63, 0, 9, 1]
    trees = drafter.propose(seqs, budgets)
    assert trees == [drafter.propose([seq], [budget])[0] for seq, budget in zip(seqs, budgets, strict=True)]
    assert any(len(tree) > 1 for tree in trees)
    assert drafter.propose([], []) == []


# --- what it is told --------------------------------------------------------------------------------------------------------------


def test_an_id_in_use_is_refused_and_free_again_after_removal() -> None:
    twin = Twin(DEFAULTS)
    twin.add(0, [1, 2, 3] * 4)
    with pytest.raises(ValueError, match="sequence 0 is in use"):
        twin.drafter.add(0, [1])
    assert twin.propose([0], [3])[0].tokens == (1, 2, 3)  # it is still the first one
    twin.remove(0)
    twin.remove(0)  # unknown ids are ignored
    twin.remove(77, [1, 2])
    twin.add(0, [1, 2])
    assert twin.propose([0], [16]) == [EMPTY_TREE]


@pytest.mark.parametrize("wrong", [-1, LARGEST + 1, 2**40, 2**63, 2**80, "token", None])
def test_what_is_no_token_is_refused_and_leaves_the_id_free(wrong: Any) -> None:
    drafter = SuffixDrafter(DEFAULTS, NODES)
    with pytest.raises((ValueError, TypeError) if wrong is None else ValueError):
        drafter.add(0, [1, wrong])
    assert drafter.statistics().requests == drafter.statistics().outputs == 0
    drafter.add(0, [1])


def test_the_largest_tokens_are_drafted() -> None:
    passage = [LARGEST - i for i in range(30)]
    twin = Twin(DEFAULTS)
    twin.add(0, [*passage, 0, *passage[:10]], [LARGEST])
    twin.accept(0, passage[10:12])
    assert twin.propose([0], [5])[0].tokens == tuple(passage[12:17])
    twin.remove(0, passage[12:])
    twin.add(1, passage[:20])
    assert twin.propose([1], [3])[0].tokens == tuple(passage[20:23])


def test_requests_may_end_at_any_time() -> None:
    """Right after they came, before they wrote, with their last tokens or without."""
    twin = Twin(DEFAULTS)
    twin.add(0, [])
    twin.remove(0)
    twin.add(1, [1, 2, 3])
    twin.remove(1)
    twin.add(2, [])
    assert twin.propose([2], [9]) == [EMPTY_TREE]
    twin.remove(2, [1, 2, 3, 4])
    twin.add(3, [1, 2])
    twin.accept(3, [])
    twin.accept(3, [3])
    twin.remove(3)
    twin.add(4, [])
    twin.accept(4, [1, 2, 3])
    assert twin.propose([4], [1])[0].tokens == (4,)  # of request 2, which told it only at its end
    assert twin.drafter.cache.output(twin.drafter.cache.serials[0]) == [1, 2, 3, 4]


def test_numpy_and_torch_like_integers_are_tokens() -> None:
    drafter = SuffixDrafter(DEFAULTS, NODES)
    drafter.add(0, np.array([1, 2, 3, 1, 2]))  # type: ignore[arg-type]
    drafter.accept(0, tuple(np.array([3, 1])))
    assert drafter.propose([0], [2])[0].tokens == (2, 3)
    assert all(type(token) is int for token in drafter.propose([0], [2])[0].tokens)


def test_statistics_tell_what_is_held() -> None:
    drafter = SuffixDrafter(DEFAULTS, NODES)
    empty = drafter.statistics()
    drafter.add(0, list(range(1000)))
    drafter.accept(0, list(range(500)))
    running = drafter.statistics()
    assert (running.requests, running.outputs, running.tokens, running.evicted) == (1, 1, 500, 0)
    assert running.request_bytes > 1500 * 40
    assert running.cache_bytes > empty.cache_bytes + 500 * 40
    drafter.remove(0)
    ended = drafter.statistics()
    assert (ended.requests, ended.outputs, ended.tokens, ended.request_bytes) == (0, 1, 500, 0)
    assert ended.cache_bytes == running.cache_bytes
    drafter.evict()
    assert (drafter.statistics().outputs, drafter.statistics().tokens, drafter.statistics().evicted) == (0, 0, 1)


# --- whoever calls, and however it ends -------------------------------------------------------------------------------------------


def contexts_of(drafter: SuffixDrafter) -> Contexts:
    contexts = Contexts(drafter.cache.depth)
    for serial in drafter.cache.serials:
        contexts.extend(serial, drafter.cache.output(serial))
    return contexts


def test_several_threads_may_use_one_drafter(tmp_path: Path) -> None:
    """Each has its own requests; one saves and evicts all the while."""
    drafter = SuffixDrafter(SuffixOptions(max_tree_depth=6, max_cached_tokens=1500), 15)
    texts = list(long_streams(150).values())
    failures: list[BaseException] = []
    done = threading.Event()

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:
            failures.append(e)

    def serve(first: int) -> None:
        rng = random.Random(first)
        for seq in range(first, first + 40):
            text, at = texts[rng.randrange(len(texts))], rng.randrange(90)
            drafter.add(seq, text[: rng.randrange(30)])
            for _ in range(rng.randint(1, 15)):
                n = rng.randint(1, 4)
                drafter.accept(seq, text[at : at + n])
                at += n
                (tree,) = drafter.propose([seq], [9])
                DraftTree(tree.tokens, tree.parents, tree.probs)
                assert set(tree.tokens) <= {token for text in texts for token in text}
            drafter.remove(seq, text[at : at + 1])

    def disturb() -> None:
        for i in itertools.count():
            drafter.save(tmp_path / "cache")
            drafter.evict(300 * (i % 5))
            drafter.statistics()
            if done.wait(0.001):
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [threading.Thread(target=guarded, args=(lambda first=1000 * i: serve(first),)) for i in range(4)]
        other = threading.Thread(target=guarded, args=(disturb,))
        for thread in (*workers, other):
            thread.start()
        for worker in workers:
            worker.join()
        done.set()
        other.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    statistics = drafter.statistics()
    assert statistics.requests == 0
    assert statistics.evicted > 0
    assert statistics.tokens == sum(len(drafter.cache.output(serial)) for serial in drafter.cache.serials)
    assert_exact(drafter.cache.tree, contexts_of(drafter), stamped=False)
    assert np.isfinite(drafter._model).all()
    SuffixDrafter(SuffixOptions(cache=tmp_path / "cache"), 15)


def test_an_id_that_two_threads_add_at_once_is_given_to_one() -> None:
    drafter = SuffixDrafter(SuffixOptions(), 15)
    inside, refused = threading.Event(), []

    def second() -> None:
        inside.wait(10)
        with pytest.raises(ValueError, match="in use"):
            drafter.add(7, [1])
        refused.append(True)

    thread = threading.Thread(target=second)
    thread.start()
    changing = drafter._changing

    def slow_changing() -> Any:
        inside.set()
        time.sleep(0.2)  # the first call is past its check: the second must wait for it
        return changing()

    with mock.patch.object(drafter, "_changing", slow_changing):
        drafter.add(7, [1])
    thread.join(10)
    assert refused == [True]
    drafter.remove(7)
    assert drafter.statistics().requests == drafter.statistics().outputs == 0


@pytest.mark.parametrize("interrupted", ["specfx.drafters.suffix_model.accept", "specfx.drafters.suffix_cache.OutputCache.make_room"])
@pytest.mark.parametrize("next_call", ["remove", "accept"])
def test_an_interrupted_call_costs_the_earlier_outputs_and_nothing_else(interrupted: str, next_call: str) -> None:
    drafter = SuffixDrafter(SuffixOptions(max_cached_tokens=300), 15)
    for seq in range(3):
        drafter.add(seq, [])
        drafter.accept(seq, [1, 2, 3, 4, 5] * 20)
    drafter.remove(2)
    with mock.patch(interrupted, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        drafter.accept(0, [1, 2])
    if next_call == "remove":  # as the runtime does; but another thread may come first
        drafter.remove(0)
    drafter.accept(1, [1, 2, 3])
    drafter.remove(0)
    assert drafter.propose([1], [4])[0].tokens == (4, 5, 1, 2)
    assert drafter.statistics().tokens == 0
    assert_cursors_are_places(drafter)
    twin = Twin(SuffixOptions(max_cached_tokens=300))
    twin.drafter, twin.oracle.model = drafter, type(twin.oracle.model)(drafter._model)
    drafter.remove(1)
    for seq in range(3, 9):  # and all is as if it had just begun
        twin.add(seq, [7, 8, 9])
        twin.accept(seq, [1, 2, 3, seq] * 20)
        twin.propose([seq], [15])
        twin.remove(seq, [5])
    assert_exact(drafter.cache.tree, twin.oracle.world, stamped=False)


# --- compiled or not --------------------------------------------------------------------------------------------------------------


def scenario(**environment: str) -> dict[str, Any]:
    """The scenario, told by another process."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "suffix_scenario.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_plain_python_drafts_the_same() -> None:
    """Where Numba is missing (or switched off) everything is slower and nothing is different; the report says so."""
    here, plain = json.loads(json.dumps(suffix_scenario.story())), scenario(SPECFX_NO_JIT="1")
    assert len(here["drafts"]) == len(plain["drafts"]) > 500
    for (tokens_, parents, probs), (plain_tokens, plain_parents, plain_probs) in zip(here["drafts"], plain["drafts"], strict=True):
        assert (tokens_, parents) == (plain_tokens, plain_parents)
        np.testing.assert_allclose(probs, plain_probs, rtol=0, atol=1e-12)
    assert plain["refusals"] == [Reason.NO_NUMBA.name]
    assert here["refusals"] == ([] if _jit.COMPILED else [Reason.NO_NUMBA.name])


@pytest.mark.skipif(not _jit.COMPILED, reason="Numba is not installed, or switched off")
def test_compiled_code_is_kept_in_a_folder_of_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba would go on using a function's old code after another file, with what it calls, has changed."""
    for function in (suffix_tree.append, suffix_model.propose):
        assert Path(function.stats.cache_path).is_relative_to(_jit._folder)
    assert Path(_jit._folder).parent == cache_dir() / "numba"
    shutil.copytree(Path(_jit.__file__).parent, tmp_path / "drafters", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(_jit, "__file__", str(tmp_path / "drafters" / "_jit.py"))
    monkeypatch.setenv("SPECFX_CACHE", str(tmp_path / "cache"))
    folders = [_jit._cache_folder()]
    assert folders[0].is_relative_to(tmp_path / "cache")
    for name in ("suffix_tree.py", "suffix_model.py", "_jit.py"):
        source = tmp_path / "drafters" / name
        source.write_text(source.read_text() + "# changed\n")
        folders.append(_jit._cache_folder())
    assert len(set(folders)) == 4
    source.write_text(source.read_text().removesuffix("# changed\n"))
    assert _jit._cache_folder() == folders[2]


# --- soak -------------------------------------------------------------------------------------------------------------------------


def test_sixty_thousand_tokens_in_a_small_cache() -> None:
    """Four requests at a time write copies, edits and news. The counts stay exact, and the memory is what it was in the first half."""
    rng = random.Random(0)
    source = words("tests/test_kernels.py", 6000) + [token + 5000 for token in words("tests/suffix_oracle.py", 6000)]
    drafter = SuffixDrafter(SuffixOptions(max_cached_tokens=2000, max_tree_depth=16), 15)
    rest: dict[int, Stream] = {}
    written = drafted = 0
    sizes: list[tuple[int, int]] = []
    for seq in itertools.count():
        at = rng.choice((0, 600, 6500, rng.randrange(11_000)))
        drafter.add(seq, source[at : at + rng.randint(0, 60)], [source[0]])
        rest[seq] = [token if rng.random() > 0.05 else rng.randrange(20_000) for token in source[at + 30 : at + 30 + rng.randint(1, 250)]]
        while len(rest) == 4:
            one = rng.choice(list(rest))
            n = rng.randint(1, 8)
            written += min(n, len(rest[one]))
            if n >= len(rest[one]):
                drafter.remove(one, rest.pop(one))
            else:
                drafter.accept(one, rest[one][:n])
                rest[one] = rest[one][n:]
                drafted += len(drafter.propose([one], [15])[0])
        if seq % 10 == 9:
            tree = drafter.cache.tree
            sizes.append((tree.nbytes, len(tree.arena)))
            assert drafter.cache.tokens <= 2000
            contexts = contexts_of(drafter)
            for context in rng.sample(sorted(contexts.ends), 200):
                place = locate(tree, context)
                assert tree.arena[suffix_tree.at(place) + suffix_tree.COUNT] == contexts.count(context)
        if seq % 50 == 49:
            drafter.evict(rng.choice((0, 500, 1500)))
        if written > 60_000:
            break
    assert_exact(drafter.cache.tree, contexts_of(drafter), stamped=False)
    assert drafted > 5000
    assert drafter.statistics().evicted > 100
    first, later = sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]
    for early, late in zip(map(max, zip(*first, strict=True)), map(max, zip(*later, strict=True)), strict=True):
        assert late <= 1.1 * early


def test_preparing_compiles_everything_that_is_called() -> None:
    """No call of the runtime has to wait for the compiler afterwards."""
    suffix.prepare()
    if not _jit.COMPILED:
        return
    functions = (suffix_model.accept, suffix_model.propose, suffix_model.match_all, suffix_model.match_length, suffix_tree.remove_stream)
    before = [len(function.signatures) for function in functions]
    assert min(before) >= 1
    suffix_scenario.story()
    assert [len(function.signatures) for function in functions] == before
