"""The bench commands' parts on fakes: prompts, tables, JSON, ratios, and the judgement of differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import specfx
from specfx import demo
from specfx.bench import calls, equal, forward, generate, prompts, report
from specfx.engines.base import Rows, RowsOutput
from specfx.errors import OptionError
from specfx.runtime.stats import CallStats

VOCABULARY = 32


class WordTokenizer:
    """A word is a token: its length."""

    chat_template: str | None = None
    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [len(word) for word in text.split()])

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt
        assert not tokenize
        return " ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <assistant>"


class CountingModel:
    """Its greedy continuation counts up from the last prompt token; `generate` is the class's, as in transformers."""

    device = torch.device("cpu")

    def generate(self, ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        return torch.cat([ids, ids[:, -1:] + torch.arange(1, max_new_tokens + 1)], dim=1)


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, dict[str, Any]]]:
    """`specfx.speculate` and `specfx.stats` replaced by fakes; returns the calls to `speculate`."""
    calls = []

    def speculate(model: Any, method: str | None, **options: Any) -> Any:
        calls.append((method, options))
        stock = type(model).generate
        shift = 0 if method is None else 1  # "suffix" errs in its last token
        model.generate = lambda ids, **rest: stock(model, ids, **rest) + torch.tensor([0] * (ids.shape[1] + 3) + [shift])
        return model

    last = CallStats(proposed=[4, 2], accepted=[2, 1])
    numbers = SimpleNamespace(tokens=4, forwards=2, tokens_per_forward=2.0, last=last, seconds={"total": 1.0})
    monkeypatch.setattr(specfx, "speculate", speculate, raising=False)
    monkeypatch.setattr(specfx, "stats", lambda _: numbers, raising=False)
    return calls


def _file(folder: Path, *records: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_every_form_of_prompt_is_read(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        {"prompt": "a bb"},
        {"question": "a bb"},
        {"turns": ["a bb", "later"], "category": "math"},
        {"messages": [{"role": "user", "content": "a bb"}, {"role": "assistant", "content": "no"}]},
        "",
        {"text": "a bb"},
    )
    tokenizer = WordTokenizer()
    assert [p.tokens for p in prompts.read_prompts(path, tokenizer)] == [(1, 1, 2)] * 5
    tokenizer.chat_template = "yes"
    found = prompts.read_prompts(path, tokenizer)
    assert [p.tokens for p in found] == [(6, 1, 2, 11)] * 4 + [(1, 1, 2)]  # "<user>" and "<assistant>"; text is never wrapped
    assert [p.category for p in found] == ["all", "all", "math", "all", "all"]
    assert [p.number for p in found] == [1, 2, 3, 4, 6]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 1: not JSON"),
        ([1], "expected a JSON object"),
        ({"answer": "x"}, "among answer"),
        ({"turns": []}, "no usable"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no usable"),
        ("", "holds no prompt"),
    ],
)
def test_unusable_lines_are_named(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        prompts.read_sources(_file(tmp_path, record))


def test_missing_prompt_file_is_an_option_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        prompts.read_sources(tmp_path / "none.jsonl")


def test_selection_spreads_over_categories_and_leaves_long_prompts_out(tmp_path: Path) -> None:
    records = [{"prompt": "w " * n, "category": c} for c, n in [("a", 1), ("a", 2), ("a", 3), ("b", 9), ("b", 4), ("c", 5)]]
    path, tokenizer = _file(tmp_path, *records), WordTokenizer()

    def chosen(**options: Any) -> list[tuple[str, int]]:
        return [(p.category, len(p.tokens) - 1) for p in prompts.read_prompts(path, tokenizer, **options)]

    assert chosen(limit=4, spread=True, max_prompt_tokens=8) == [("a", 1), ("c", 5), ("a", 2), ("b", 4)]
    assert chosen(per_category=1) == [("a", 1), ("b", 9), ("c", 5)]
    with pytest.raises(OptionError, match="--max-prompt-tokens"):
        chosen(max_prompt_tokens=1)


def test_table_is_aligned() -> None:
    assert report.table(("method", "x"), [("none", "10.5"), ("suffix-tree", "9")]).splitlines() == [
        "method          x",
        "-----------  ----",
        "none         10.5",
        "suffix-tree     9",
    ]


def test_json_says_where_its_figures_come_from(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    report.write_json(path, {"bench": "generate"})
    written = json.loads(path.read_text())
    assert written["bench"] == "generate"
    environment = written["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["cpu"]
    assert environment["command"][0] == "specfx"
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]


def test_progress_tells_the_end_of_what_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), report.Progress("compiling"):
        raise KeyError
    first, last = capsys.readouterr().err.splitlines()
    assert first == "compiling ..."
    assert last.startswith("compiling: failed after ")


def test_head_goes_to_mtp_alone_and_none_options_are_left_out() -> None:
    arms = generate.parse_arms("none, suffix,mtp,none", head="h", engine="graph", num_speculative_tokens=None)
    assert arms == [
        calls.Arm("stock"),
        calls.Arm("none", None, {"engine": "graph"}),
        calls.Arm("suffix", "suffix", {"engine": "graph"}),
        calls.Arm("mtp", "mtp", {"head": "h", "engine": "graph"}),
    ]


def test_a_method_may_bring_its_own_options() -> None:
    stock, *arms = generate.parse_arms(
        "mtp:topk=1,mtp:enable_suffix_decoding=true:draft_vocab=some/path,suffix:use_tree_spec=False", head="h"
    )
    assert stock.is_stock
    assert [(a.name, a.method, a.options) for a in arms] == [
        ("mtp:topk=1", "mtp", {"head": "h", "topk": 1}),
        (
            "mtp:enable_suffix_decoding=true:draft_vocab=some/path",
            "mtp",
            {"head": "h", "enable_suffix_decoding": True, "draft_vocab": "some/path"},
        ),
        ("suffix:use_tree_spec=False", "suffix", {"use_tree_spec": False}),
    ]
    with pytest.raises(OptionError, match="'topk' is not an option"):
        generate.parse_arms("mtp:topk")
    with pytest.raises(OptionError, match="no option 'topk'"):
        generate.parse_arms("suffix:topk=1")


def test_measurement_compares_each_method_with_stock(wrapped: list[tuple[str | None, dict[str, Any]]]) -> None:
    model, arms = CountingModel(), generate.parse_arms("none,suffix", engine="graph")
    chosen = [prompts.Prompt(7, "a", (1, 2, 3)), prompts.Prompt(8, "b", (4, 5))]
    measured = generate.measure(model, chosen, arms, max_new_tokens=4)
    assert [(m.prompt, m.arm, m.same_as_stock, m.tokens) for m in measured] == [
        (number, arm, same, 4) for number in (7, 8) for arm, same in [("stock", True), ("none", True), ("suffix", False)]
    ]
    assert [m.forwards for m in measured[:3]] == [None, 2, 2]
    # The arms take turns in going first.
    assert [method for method, _ in wrapped] == [None, "suffix", None, "suffix"]
    assert all(options == {"compile": "sync", "engine": "graph"} for _, options in wrapped)


def test_a_batch_is_measured_as_one_call_and_sampled_outputs_are_not_compared(wrapped: list[tuple[str | None, dict[str, Any]]]) -> None:
    model, arms = CountingModel(), generate.parse_arms("none,suffix")
    chosen = [prompts.Prompt(7, "a", (1, 2, 3)), prompts.Prompt(8, "b", (4, 5)), prompts.Prompt(9, "b", (6,))]
    how: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 2}
    measured = generate.measure(model, chosen, arms, **how, end_tokens=[5])
    # 1 2 3 goes on with 4 5, 4 5 with 6 7 8 9 (suffix: 6 7 8 10), 6 with 7 8 9 10
    assert [(m.prompt, m.arm, m.prompt_tokens, m.tokens, m.same_as_stock) for m in measured] == [
        (number, arm, read, written, same or (number == 7 and arm == "none"))
        for number, read, written in ((7, 5, 6), (9, 1, 4))
        for arm, same in (("stock", True), ("none", True), ("suffix", False))
    ]
    assert {m.category for m in measured} == {"all"}
    sampled = generate.measure(model, chosen, arms, **how, temperature=1.5)
    assert all(m.same_as_stock is None for m in sampled)
    summaries = generate.summarise(sampled)
    assert all(s.same_as_stock is None for s in summaries)
    assert generate.summary_table({"all": summaries}).count("%") == 0


def test_sampled_calls_are_seeded_and_draw_from_the_whole_vocabulary() -> None:
    seen: list[dict[str, Any]] = []

    class Noting(CountingModel):
        def generate(self, ids: torch.Tensor, max_new_tokens: int, **how: Any) -> torch.Tensor:
            seen.append({**how, "noise": int(torch.randint(1 << 40, ()))})
            return super().generate(ids, max_new_tokens)

    for seed in (3, 3, 4):
        calls.generate(Noting(), calls.Arm("stock"), [(1,), (2, 3)], 2, temperature=1.5, seed=seed, pad=9)
    assert {k: seen[0][k] for k in ("do_sample", "temperature", "top_k", "top_p")} == {
        **{"do_sample": True, "temperature": 1.5},
        **{"top_k": 0, "top_p": 1.0},
    }
    assert seen[0]["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert seen[0]["noise"] == seen[1]["noise"] != seen[2]["noise"]


def test_random_prompts_are_the_same_each_time() -> None:
    made = prompts.random_tokens(3, 100)
    assert made == prompts.random_tokens(3, 100)
    assert [len(p.tokens) for p in made] == [64] * 3
    assert len({p.tokens for p in made}) == 3
    assert max(max(p.tokens) for p in made) < 100


def test_summary_takes_medians_of_ratios() -> None:
    speeds = {"stock": (10, 20, 10), "none": (20, 60, 40), "suffix": (40, 60, 30)}
    measured = [
        generate.Measurement(
            prompt, "c", arm, 5, 1, 1 / speed[prompt], arm != "suffix", *((10 * (prompt + 1), 2.0) if arm == "suffix" else ())
        )
        for prompt in range(3)
        for arm, speed in speeds.items()
    ]
    stock, none, suffix = generate.summarise(measured)
    assert (stock.over_stock, stock.over_none) == pytest.approx((1, 0.5), abs=0.2)
    assert none.over_stock == pytest.approx(3)
    assert (suffix.over_stock, suffix.over_none, suffix.lowest_over_none) == pytest.approx((3, 1, 0.75))
    assert (suffix.tokens_per_forward, suffix.same_as_stock, none.tokens_per_forward) == (2.0, 0, None)
    text = generate.summary_table({"all": [stock, none, suffix], **generate.by_category(measured)})
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
    assert "yes" not in demo.result_table(measured).splitlines()[4]


@pytest.mark.parametrize(
    ("left", "right", "position"), [([1, 2], [1, 2], None), ([1, 2, 3], [1, 4, 3], 1), ([1, 2], [1], 1), ([], [5], 0), ([], [], None)]
)
def test_first_difference(left: list[int], right: list[int], position: int | None) -> None:
    assert equal.first_difference(left, right) == position


def test_padding_after_the_end_token_does_not_count() -> None:
    assert calls.until_end([5, 2, 2, 2], [2]) == [5, 2]
    assert calls.until_end([5, 6], [2]) == [5, 6]


def test_batches_are_padded_on_the_left() -> None:
    ids, mask = calls.left_padded([[5], [6, 7]], pad=0)
    assert ids.tolist() == [[0, 5], [6, 7]]
    assert mask.tolist() == [[0, 1], [1, 1]]


def _analyse(stock: Sequence[int], other: Sequence[int], logits: dict[int, float], error: float, dtype: str) -> equal.Difference | None:
    def logits_of(prefix: Sequence[int]) -> torch.Tensor:
        assert list(prefix) == [9, 9, *stock[: len(prefix) - 2]]  # the common prefix, prompt included
        values = torch.zeros(VOCABULARY)
        for token, value in logits.items():
            values[token] = value
        return values

    prompt = prompts.Prompt(1, "c", (9, 9))
    return equal.analyse(
        prompt, stock, other, method="suffix", engine="graph", batch_size=1, logits_of=logits_of, error_of=lambda _: error, dtype=dtype
    )


def test_equal_outputs_need_no_analysis() -> None:
    assert _analyse([1, 2], [1, 2], {}, 0.0, "float32") is None


@pytest.mark.parametrize(("gap", "explained"), [(0.5e-4, True), (2e-4, False)])
def test_float32_difference_is_explained_by_the_measured_error(gap: float, explained: bool) -> None:
    found = _analyse([1, 2, 3], [1, 4, 3], {2: 10 + gap, 4: 10.0}, 1e-4, "float32")
    assert found is not None
    assert (found.position, found.stock_token, found.other_token, found.explained) == (1, 2, 4, explained)
    assert found.gap == pytest.approx(gap, rel=0.05)
    assert ("near tie" in str(found)) is explained


@pytest.mark.parametrize(("gap", "explained"), [(0.25, True), (0.375, False)])
def test_bfloat16_difference_is_explained_by_four_roundings_of_the_logit(gap: float, explained: bool) -> None:
    found = _analyse([2], [4], {2: 16 + gap, 4: 16.0}, 0.0, "bfloat16")
    assert found is not None
    assert found.explained is explained
    assert found.allowed == pytest.approx(4 * 2**-8 * (16 + gap))


def test_output_that_merely_ends_is_never_explained() -> None:
    found = _analyse([1, 2], [1], {}, 1.0, "float32")
    assert found is not None
    assert not found.explained
    assert "FAULT" in str(found)


def test_comparison_fails_if_another_engine_served() -> None:
    assert equal.Comparison("none", "graph", "graph", 1, 2, 2, ()).holds
    assert not equal.Comparison("none", "compiled", "graph", 1, 2, 2, ()).holds
    text = equal.comparison_table([equal.Comparison("none", "graph", "graph", 1, 2, 2, ())])
    assert "2 (100%)" in text


class LogitsModel:
    """Logits are the last token in one-hot, times 10; with a cache, off by `cached_error`."""

    device = torch.device("cpu")

    def __init__(self, cached_error: float = 0.0) -> None:
        self.cached_error = cached_error

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, past_key_values: Any = None) -> SimpleNamespace:
        logits = torch.nn.functional.one_hot(input_ids, VOCABULARY).float() * 10
        return SimpleNamespace(logits=logits + (self.cached_error if past_key_values else 0.0), past_key_values=[1])


class ProbeEngine:
    """Keeps count of sequences; its logits are `LogitsModel`'s, off by `error`."""

    name, verifies = "graph", "trees"

    def __init__(self, error: float = 0.0) -> None:
        self.error = error
        self.sequences: dict[int, int] = {}
        self.forwards: list[int] = []

    def add(self, seq: int, capacity: int) -> None:
        self.sequences[seq] = capacity

    def forward(self, batch: Sequence[Rows]) -> list[RowsOutput]:
        (rows,) = batch
        self.forwards.append(rows.count)
        logits = LogitsModel()(torch.tensor([list(rows.tokens)]), use_cache=False).logits[0, -1:] + self.error
        return [RowsOutput(logits.argmax(-1).tolist(), logits, None)]

    def commit(self, seq: int, rows: Sequence[int]) -> None: ...

    def remove(self, seq: int) -> None:
        self.sequences.pop(seq, None)

    def length(self, seq: int) -> int:
        return 0


def test_measured_error_is_the_larger_of_the_engines_and_the_caches() -> None:
    engine = ProbeEngine(2e-4)
    assert equal.measured_error(LogitsModel(1e-4), engine, [1, 2, 3]) == pytest.approx(2e-4, rel=0.01)
    assert equal.measured_error(LogitsModel(3e-4), engine, [1, 2, 3]) == pytest.approx(3e-4, rel=0.01)
    assert equal.measured_error(LogitsModel(1e-4), None, [1, 2, 3]) == pytest.approx(1e-4, rel=0.01)
    assert engine.sequences == {}  # the probe leaves no sequence behind


def test_error_too_large_for_rounding_explains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert equal.measured_error(LogitsModel(), ProbeEngine(0.1), [1, 2, 3]) == 0
    assert "FAULT" in capsys.readouterr().err


def test_forward_bench_takes_turns_and_asks_for_the_rows_named() -> None:
    engine = ProbeEngine()
    steps = {f"{n}": forward.engine_step(engine, 3, n) for n in (1, 8)}
    seconds = forward.interleaved(steps, repeats=2)
    assert {name: len(taken) for name, taken in seconds.items()} == {"1": 2, "8": 2}
    assert engine.forwards[-4:] == [1, 8, 1, 8]


def test_stock_step_starts_each_time_from_the_same_cache() -> None:
    seen = []

    class Model:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, use_cache: bool, past_key_values: list[int] | None = None) -> SimpleNamespace:
            cache = past_key_values if past_key_values is not None else []
            seen.append(len(cache))
            cache.extend(input_ids[0].tolist())
            return SimpleNamespace(past_key_values=cache)

    step = forward.stock_step(Model(), [1, 2, 3], 4)
    step()
    step()
    assert seen == [0, 3, 3]


def test_share_outside_the_forward_leaves_prefill_out() -> None:
    share = forward.outside_share({"total": 3.0, "prefill": 1.0, "forward": 1.8, "draft": 0.1, "accept": 0.05})
    assert share == pytest.approx({"outside": 0.1, "draft": 0.05, "accept": 0.025})


def test_demo_prompts_are_chats_that_end_with_the_user() -> None:
    assert [source.category for source in demo.SOURCES] == ["chat answer", "code edit", "JSON extraction", "agent plan"]
    assert all(source.messages[-1]["role"] == "user" for source in demo.SOURCES)


def test_demo_skips_the_checkouts_head_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from specfx.errors import HeadError

    def warm_up(model: Any, tokenizer: Any, arms: Sequence[calls.Arm], max_new_tokens: int) -> None:
        if arms[0].method == "mtp":
            raise HeadError("float32 head, bfloat16 target")

    monkeypatch.setattr(demo, "warm_up", warm_up)
    arms = generate.parse_arms("none,mtp", head="h")
    assert [arm.name for arm in demo._ready_arms(None, None, arms, 4, required=False)] == ["stock", "none"]
    assert "float32 head" in capsys.readouterr().err
    with pytest.raises(HeadError):
        demo._ready_arms(None, None, arms, 4, required=True)
