"""The main job on the real model: SmolLM2-135M-Instruct, float32, greedy, against stock `generate`, token for token.

`specfx bench equal` does the same over many more prompts; these are a few, short enough for the ordinary test run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_budget import costing

import specfx
from specfx import models
from specfx.api import engine_of

PROMPTS = (
    "Write the days of the week as a JSON list, then write the same list again.",
    "Explain briefly what a suffix tree is.",
)
HEAD = Path(__file__).resolve().parent.parent / "examples" / "smollm2_mtp_head"
NEW_TOKENS = 48
METHODS = {"none": (None, {}), "suffix": ("suffix", {}), "mtp": ("mtp", {"head": HEAD})}


@pytest.fixture(scope="module")
def smollm2():
    return models.load_smollm2(torch.float32)


@pytest.fixture(scope="module")
def stock(smollm2):
    """What the stock model says, before specfx has touched anything: for each prompt alone, and for both as one padded batch."""
    model, tokenizer = smollm2
    return {batch: [generate(model, tokenizer, prompts) for prompts in split(batch)] for batch in (1, 2)}


def split(batch: int) -> list[tuple[str, ...]]:
    return [(p,) for p in PROMPTS] if batch == 1 else [PROMPTS]


def generate(model, tokenizer, prompts, new_tokens=NEW_TOKENS):
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True) for p in prompts]
    inputs = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left")
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)


@pytest.mark.parametrize("engine", ["eager", "graph", "compiled"])
def test_every_method_gives_the_tokens_of_stock_generate(smollm2, stock, engine):
    model, tokenizer = smollm2
    try:
        for method, options in METHODS.values():
            specfx.speculate(model, method, engine=engine, compile="off" if engine == "graph" else "sync", **options)
            report = specfx.explain(model)
            assert report.engine == engine, str(report)
            assert report.verifies == "trees"
            for batch, expected in stock.items():
                for prompts, tokens in zip(split(batch), expected, strict=True):
                    assert torch.equal(generate(model, tokenizer, prompts), tokens), (method, batch, prompts)
            if method == "suffix":
                assert specfx.stats(model).total.accepted[0] > 0
            assert not specfx.explain(model).stock_calls
            assert specfx.explain(model).pages_in_use == 0
    finally:
        specfx.restore(model)
    assert torch.equal(generate(model, tokenizer, PROMPTS[:1]), stock[1][0])


def test_drafts_that_repeat_the_prompt_save_forwards(smollm2):
    model, tokenizer = smollm2
    text = "The cat sat on the mat. The dog sat on the log. " * 8
    inputs = tokenizer(text, return_tensors="pt")
    with specfx.speculating(model, "suffix", engine="graph"):
        model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        assert specfx.stats(model).tokens_per_forward > 2


def test_a_head_with_shuffled_weights_is_noticed_within_one_generation(smollm2, tmp_path, monkeypatch):
    """It brings one warning that names the likely causes, and drafting stops: forwards verify a lone token again. (By a clock on which a
    row costs a twentieth of a forward.)"""
    model, tokenizer = smollm2
    weights, generator = load_file(HEAD / "model.safetensors"), torch.Generator().manual_seed(0)
    shuffled = {name: w.flatten()[torch.randperm(w.numel(), generator=generator)].view(w.shape) for name, w in weights.items()}
    save_file(shuffled, tmp_path / "model.safetensors")
    with specfx.speculating(model, "mtp", head=tmp_path, engine="graph", compile="off", topk=1, min_token_prob=0):
        costing(monkeypatch, engine_of(model), 10, 0.5)
        monkeypatch.setattr("specfx.runtime.budget._FEWEST", 16)
        with pytest.warns(UserWarning, match="drafting stops.*another model.*mixed up"):
            tokens = generate(model, tokenizer, PROMPTS[1:], 96)
        stats = specfx.stats(model).last
    assert 0 < stats.proposed[0] < 48 < stats.forwards
    assert torch.equal(tokens, generate(model, tokenizer, PROMPTS[1:], 96))


def test_a_chat_prefills_only_what_is_new():
    """Four turns, bfloat16: the template's text of earlier turns is what was generated, so it is found in the pages."""
    model, tokenizer = models.load_smollm2(torch.bfloat16)
    questions = ("Name three fruits.", "Which of them is the largest?", "And the sweetest?", "Thank you. Say goodbye.")
    with specfx.speculating(model, "suffix", engine="graph", compile="off"):
        messages, cache, known = [], specfx.PageCache(), 0
        for question in questions:
            messages.append({"role": "user", "content": question})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            length = inputs["input_ids"].shape[1]
            out = model.generate(**inputs, max_new_tokens=24, do_sample=False, past_key_values=cache, pad_token_id=tokenizer.eos_token_id)
            last = specfx.stats(model).last
            assert last.reused_tokens == known
            assert last.prompt_tokens == length - known
            messages.append({"role": "assistant", "content": tokenizer.decode(out[0, length:], skip_special_tokens=True)})
            following = tokenizer.apply_chat_template(messages, tokenize=False)
            again = tokenizer(following, add_special_tokens=False)["input_ids"]
            cached = out[0, :-1].tolist()
            known = next((i for i, (a, b) in enumerate(zip(cached, again, strict=False)) if a != b), min(len(cached), len(again)))
            assert known >= length, "all of the prompt, and as much of the answer as the tokenizer writes the same way again"
        assert not specfx.explain(model).stock_calls
