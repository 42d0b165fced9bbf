"""What `specfx train mtp` trains on: texts, the draft vocabulary, and what the target says of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import counting_model, counting_texts, looked_up, unskilled, write
from tiny import VOCAB, tiny_model

from specfx.bench.prompts import Prompt
from specfx.errors import OptionError
from specfx.runtime.session import Runtime
from specfx.train import data, evaluate, lookup, vocabulary
from specfx.train.data import Text

QUESTION = (
    "Mary buys 3 bags of M&Ms. The first bag has 300 M&Ms in it. The second bag has 12 more. The third bag has half as many. How many?"
)

# --- data -------------------------------------------------------------------------------------------------------------------------


def test_split_is_disjoint_and_does_not_move_when_the_data_grows() -> None:
    texts = counting_texts(400)
    few, many = data.split(texts[:150]), data.split(random.Random(1).sample(texts, 400))
    assert set(few[0]) <= set(many[0])
    assert set(few[1]) <= set(many[1])
    assert not {t.prompt for t in many[0]} & {t.prompt for t in many[1]}
    assert 8 <= len(many[1]) <= 40


def test_data_is_read_up_to_a_line_that_is_still_being_written(tmp_path: Path) -> None:
    texts = [Text((1, 2), (3, 4), "a"), Text((5,), (6, 7, 8), "b")]
    path = write(tmp_path / "data.jsonl", [*texts, Text((1, 2), (9, 9))])
    with path.open("a") as file:
        file.write('{"prompt": [1, 2')
    assert data.read_texts(path) == texts  # each prompt once


@pytest.mark.parametrize("line", ["[1]", "{}", '{"prompt": "hello", "output": [1]}', '{"prompt": [1.5], "output": [1]}', '{"prompt": [1'])
def test_broken_data_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", counting_texts(2))
    path.write_text(path.read_text() + line + "\n" + path.read_text())
    with pytest.raises(OptionError, match="line 3"):
        data.read_texts(path)


@pytest.mark.parametrize(
    "record", [{"turns": ["x", QUESTION]}, {"messages": [{"role": "user", "content": QUESTION}]}, {"prompt": QUESTION}]
)
def test_prompts_to_evaluate_on_are_recognised_in_any_template(record: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "evaluation.jsonl"
    file.write_text(json.dumps(record) + "\n" + json.dumps({"question": "Why?"}))
    runs = data.runs_of(file)
    assert data.shares_a_run(f"<|user|>\n{QUESTION.upper()}<|end|>", runs)
    assert data.shares_a_run("Well: " + QUESTION.replace(" ", "\n  ")[10:] + " Explain.", runs)
    assert not data.shares_a_run(QUESTION[:45] + " and something else altogether, which nobody has asked before", runs)
    file.write_text(json.dumps({"answer": QUESTION}))
    with pytest.raises(OptionError, match="line 1: no 'prompt'"):
        data.runs_of(file)


def test_texts_are_cut_and_those_of_another_vocabulary_refused() -> None:
    texts = [Text((1, 2, 3), (4, 5, 6, 7)), Text((1,), (2,)), Text((1, 2, 3, 4), (5, 6))]
    assert data.usable(texts, 5, 8) == [Text((1, 2, 3), (4, 5))]
    with pytest.raises(OptionError, match="token 7"):
        data.usable(texts, 5, 7)


@pytest.mark.usefixtures("instant_inductor")
def test_answers_are_stock_greedy_ones_and_go_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [3, 17]
    pick = random.Random(0)
    prompts = [Prompt(i, f"kind {i % 2}", tuple(pick.randrange(VOCAB) for _ in range(pick.randint(1, 9)))) for i in range(7)]
    path, step = tmp_path / "new" / "data.jsonl", Runtime.step
    steps = iter(range(12))

    def breaks(runtime: Runtime) -> Any:
        if next(steps, None) is None:
            raise ZeroDivisionError
        return step(runtime)

    monkeypatch.setattr(Runtime, "step", breaks)
    with pytest.raises(ZeroDivisionError):
        data.write_answers(model, prompts, path, 10, live=2)
    monkeypatch.setattr(Runtime, "step", step)
    first = path.read_text()
    assert 0 < len(first.splitlines()) < len(prompts)
    path.write_text(first + '{"prompt": [1, 2')  # the power failed
    data.write_answers(model, prompts, path, 10, live=2)
    assert path.read_text().startswith(first)
    assert data.write_answers(model, prompts, path, 10) == 0
    assert "generate" not in model.__dict__
    texts = {text.prompt: text for text in data.read_texts(path)}
    assert len(path.read_text().splitlines()) == len(texts) == len({p.tokens for p in prompts})
    for prompt in prompts:
        ids = torch.tensor([prompt.tokens])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0)
        assert list(texts[prompt.tokens].output) == expected[0, ids.shape[1] :].tolist()
        assert texts[prompt.tokens].category == prompt.category


# --- draft vocabulary ---------------------------------------------------------------------------------------------------------------


def test_draft_vocabulary_is_the_most_frequent_tokens_and_the_special_ones_that_occur() -> None:
    pick = random.Random(2)
    texts = [Text((99,), tuple(int(pick.expovariate(0.1)) for _ in range(30))) for _ in range(10)]
    outputs = [token for text in texts for token in text.output]
    rare = Counter(outputs).most_common()[-1][0]
    chosen = vocabulary.select(texts, 12, always=[rare, 5000])
    by_hand = sorted(set(outputs) - {rare}, key=lambda t: (-outputs.count(t), t))[:11]
    assert chosen.tolist() == sorted([rare, *by_hand])
    assert chosen.dtype == torch.int64
    assert vocabulary.coverage(chosen, texts) == pytest.approx(sum(t in chosen.tolist() for t in outputs) / len(outputs))
    assert vocabulary.select(texts, 10_000).tolist() == sorted(set(outputs))


# --- look-up ------------------------------------------------------------------------------------------------------------------------


def test_lookup_holds_what_the_target_says_of_each_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny_model("llama"), counting_texts(9)
    inside = looked_up(model, texts)
    monkeypatch.setattr(lookup, "_physical_memory", lambda: 0)
    on_disk = lookup.Lookup(texts, 32, model.dtype, tmp_path).fill(model, 100)
    assert len(list(tmp_path.iterdir())) == 3
    groups = inside.batches(100, seed=3)
    assert groups == on_disk.batches(100, seed=3) != inside.batches(100, seed=4)
    assert sorted(number for group in groups for number in group) == list(range(9))
    for group in groups:
        batch = inside.batch(group)
        assert len(group) == 1 or batch.ids.numel() <= 100
        for row, number in enumerate(group):
            text = texts[number]
            ids = torch.tensor([text.prompt + text.output])
            with torch.no_grad():
                hidden = model.model(ids).last_hidden_state[0]
                logits = model.lm_head(hidden)
            size, first = len(text), len(text.prompt) - 1
            torch.testing.assert_close(batch.hidden[row, :size], hidden, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(on_disk.batch(group).hidden[row, :size], hidden, rtol=1e-4, atol=1e-5)
            assert batch.base[batch.base[:, 0] == row, 1].tolist() == list(range(first, size - 2))
            top = logits[first : size - 1].topk(lookup.TOP)
            assert torch.equal(batch.labels[row, first : size - 1, : lookup.TOP].long(), top.indices)
            assert batch.labels[row, first : size - 1, -1].tolist() == list(text.output)
            torch.testing.assert_close(batch.weights[row, first].float()[:-1], 0.5 * top.values[0].softmax(-1), rtol=1e-2, atol=1e-3)
    on_disk.close()
    assert not list(tmp_path.iterdir())


def test_least_squares_give_the_heads_layer_the_input_it_knows() -> None:
    model = counting_model()
    head = unskilled(model)
    projection = lookup.Projection(head, model.get_input_embeddings())
    looked = looked_up(model, counting_texts(60), projection=projection)
    poor = evaluate.evaluate(head, model, looked, 3, 256)[evaluate.ALL]
    projection.fit()
    good = evaluate.evaluate(head, model, looked, 3, 256)[evaluate.ALL]
    assert (poor.by_depth[0] or 0) < 0.1
    assert (good.by_depth[0] or 0) > 0.95
