"""`specfx train mtp` as a whole: what it leaves behind, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import counting_model, counting_texts, write
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from specfx import cli, models
from specfx.bench.prompts import Prompt
from specfx.drafters.mtp_head import MtpHead, load_head, save_head
from specfx.errors import HeadError
from specfx.train import data, loop, mtp, plot

# --- the command ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = counting_model()
    monkeypatch.setattr(models, "load", lambda name, dtype: (copy.deepcopy(model).to(dtype), None))
    return model


def command(tmp_path: Path, *extra: str) -> list[str]:
    arguments = ["train", "mtp", "--model", "m", "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    return [*arguments, "--dtype", "float32", "--threads", "1", "--batch-tokens", "256", *extra]


@pytest.mark.usefixtures("target")
def test_texts_that_answer_prompts_of_the_evaluation_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Words:
        def decode(self, ids: Any) -> str:
            return " ".join(f"number{i}" for i in ids)

    texts, jobs = counting_texts(120), list[mtp.Job]()
    texts = [data.Text(tuple(range(5 * i, 5 * i + 8)), text.output, text.category) for i, text in enumerate(texts)]
    monkeypatch.setattr(models, "load_tokenizer", lambda name: Words())
    monkeypatch.setattr(mtp, "train_head", jobs.append)
    write(tmp_path / "data.jsonl", texts)
    (tmp_path / "evaluation.jsonl").write_text(json.dumps({"prompt": "Count: " + Words().decode(texts[3].prompt)}))
    monkeypatch.setattr(data, "usable", lambda texts, longest, vocabulary: texts)
    assert cli.main(command(tmp_path, "--exclude", str(tmp_path / "evaluation.jsonl"))) == 0
    (job,) = jobs
    assert {*job.texts, *job.held_out} == {*texts} - {texts[3]}
    assert "1 of 120 texts answer prompts of" in capsys.readouterr().out


@pytest.mark.usefixtures("target")
def test_the_command_leaves_a_head_its_record_and_a_picture(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data.jsonl", counting_texts(120))
    arguments = command(tmp_path, "--epochs", "1", "--draft-vocab", "100")
    step, calls = loop.Trainer._step, []

    def breaks(trainer: loop.Trainer) -> dict[str, Any]:
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(mtp, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop.Trainer, "_step", breaks)
    assert cli.main(arguments) == 130
    assert cli.main(arguments) == 2  # --resume, or another folder
    assert cli.main([*arguments, "--lr", "0.1", "--resume"]) == 2
    assert cli.main([*arguments, "--resume"]) == 0
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "draft_vocab.safetensors", "training.json", "training.png"}
    shown = capsys.readouterr()
    assert "resumed at step 3" in shown.out
    assert "depth 3" in shown.out
    assert "give --resume" in shown.err
    assert "lr was 0.0005, is 0.1" in shown.err
    record = json.loads((out / "training.json").read_text())
    assert record["curves"][0]["step"] == 1
    assert record["recipe"]["epochs"] == 1
    assert record["evaluation"]["after"]["all"]["by_depth"][0] > 0.9
    assert {"even", "odd"} <= set(record["evaluation"]["after"])
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert 0 < record["draft_vocab"]["coverage"] <= 1
    tokens = load_file(out / "draft_vocab.safetensors")["draft_vocab"]
    assert len(tokens) == 100
    assert torch.equal(tokens, tokens.unique())
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert load_head(out, target).dtype == torch.float32
    assert cli.main(arguments) == 2  # nothing overwrites a finished head
    assert "finished head" in capsys.readouterr().err
    further = command(tmp_path, "--epochs", "0.2", "--draft-vocab", "0", "--start", str(out), "--out", str(tmp_path / "further"))
    assert cli.main(further) == 0
    again = json.loads((tmp_path / "further" / "training.json").read_text())
    assert again["evaluation"]["before"] == record["evaluation"]["after"]
    assert again["target"]["start"] == str(out)
    assert not torch.equal(load_head(tmp_path / "further", target).eh_proj.weight, load_head(out, target).eh_proj.weight)


@pytest.mark.usefixtures("target", "instant_inductor")
def test_without_matplotlib_there_is_one_line_and_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with --prompts, the target writes the data."""
    prompts = [Prompt(i, "all", text.prompt) for i, text in enumerate(counting_texts(60))]
    monkeypatch.setattr(plot, "available", lambda: False)
    monkeypatch.setattr(models, "load_tokenizer", lambda name: None)
    monkeypatch.setattr("specfx.bench.prompts.read_prompts", lambda *_, **__: prompts)
    extra = ["--prompts", "p", "--max-new-tokens", "6", "--minutes", "0.01", "--draft-vocab", "0"]
    assert cli.main(command(tmp_path, *extra)) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.safetensors", "training.json"}
    assert capsys.readouterr().err.count("matplotlib") == 1


def test_bad_input_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main(command(tmp_path)) == 2
    assert "data.jsonl" in capsys.readouterr().err
    (tmp_path / "data.jsonl").write_text("\n")
    assert cli.main(command(tmp_path)) == 2
    assert "holds no text" in capsys.readouterr().err
    write(tmp_path / "data.jsonl", counting_texts(100))
    (tmp_path / "file").write_text("")
    assert cli.main([*command(tmp_path), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "can't be written" in capsys.readouterr().err
    assert cli.main([*command(tmp_path), "--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err
    for extra in (["--steps", "0"], ["--epochs", "1", "--minutes", "1"], ["--lr", "0"], ["--draft-vocab", "-1"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(command(tmp_path, *extra))
        assert exit_.value.code == 2


@pytest.mark.usefixtures("target")
def test_data_of_another_model_or_with_nothing_to_hold_out_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data.jsonl", counting_texts(100, vocab=500))
    assert cli.main(command(tmp_path)) == 2
    assert "another model" in capsys.readouterr().err
    write(tmp_path / "data.jsonl", data.split(counting_texts(100))[0])
    assert cli.main(command(tmp_path)) == 2
    assert "to hold out" in capsys.readouterr().err


def test_a_model_that_cannot_have_a_head_is_refused() -> None:
    with pytest.raises(HeadError, match="GPT2"):
        mtp.new_head(tiny_model("gpt2"))


def test_only_a_head_like_its_own_is_trained_further(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(HeadError, match="nothing"):
        mtp.trained_head(model, str(tmp_path / "nothing"))
    head = MtpHead.from_target(model)
    save_head(head, tmp_path / "one")
    assert len(mtp.trained_head(model, str(tmp_path / "one")).chain) == 1
    head.further.append(MtpHead.from_target(model))
    save_head(head, tmp_path / "two")
    with pytest.raises(HeadError, match="2 layers"):
        mtp.trained_head(model, str(tmp_path / "two"))
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "config.json").write_text('{"model_type": "deepseek_v3", "num_hidden_layers": 1, "num_nextn_predict_layers": 1}')
    save_file({"model.layers.1.shared_head.norm.weight": torch.ones(8)}, tmp_path / "family" / "model.safetensors")
    with pytest.raises(HeadError, match="family DeepSeek"):
        mtp.trained_head(model, str(tmp_path / "family"))


def test_thinned_curves_keep_their_means_and_their_end() -> None:
    curves = [{"step": i, "seconds": i, "lr": 0.1, "loss": [float(i)], "accepted": [0.5]} for i in range(1, 11)]
    thin = mtp.thinned(curves, 4)
    assert [entry["loss"] for entry in thin] == [[2.0], [5.0], [8.0], [10.0]]
    assert thin[-1]["step"] == 10
    assert mtp.thinned([], 4) == []
