"""The chains, their loss, the evaluation and the loop of `specfx train mtp`, in a toy language."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import counting_model, counting_texts, looked_up, random_head, unskilled
from tiny import VOCAB, tiny_model

from specfx.drafters.mtp import load_drafter
from specfx.drafters.mtp_head import MtpHead, save_head
from specfx.drafters.mtp_kv import HeadKV
from specfx.errors import OptionError
from specfx.options import MtpOptions
from specfx.train import evaluate, lookup, loop, loss

RECIPE = loop.Recipe(steps=3, epochs=4, lr=1e-2, batch_tokens=256, warm_up=5, negatives=40)


# --- loss ---------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_training_sees_what_drafting_sees() -> None:
    """From each position, the parallel chains are the drafter's steps with the true tokens."""
    head, size, steps = random_head(tiny_model("llama").double(), 0.1), 9, 4
    ids, hidden = torch.randint(VOCAB, (2, size)), torch.randn(2, size, 32).double()
    drafted = loss.chains(head, ids, hidden, steps)
    assert len(drafted) == steps
    for base in range(size - steps):
        kv = HeadKV()
        state = head(ids[:, 1 : base + 2], hidden[:, : base + 1], kv)[:, -1:]
        for k in range(1, steps + 1):
            torch.testing.assert_close(drafted[k - 1][:, base : base + 1], state, rtol=1e-5, atol=1e-5)
            if k < steps:
                state = head(ids[:, base + k + 1 : base + k + 2], state, kv)


@torch.no_grad()
def test_evaluation_counts_what_the_drafter_drafts(tmp_path: Path) -> None:
    """Acceptance by depth and tokens per forward against an `MtpDrafter` that is led along each text."""
    model = counting_model()
    head = MtpHead.from_target(model)
    for parameter in head.layer.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    texts = counting_texts(12)
    looked = looked_up(model, texts)
    projection = lookup.Projection(head, model.get_input_embeddings())
    looked.fill(model, 256, projection)
    projection.fit()
    drafter = load_drafter(MtpOptions(head=str(save_head(head, tmp_path)), num_steps=3, topk=1, min_token_prob=0), 8, model)
    reached, forwards, tokens = [0] * 4, 0, 0
    for number, text in enumerate(texts):
        ids = list(text.prompt + text.output)
        hidden = looked.hidden[looked.starts[number] : looked.starts[number + 1]]
        accepted = []
        for known in range(len(text.prompt) + 1, len(ids)):  # x_{known - 1} is pending
            drafter.add(0, ids[: known - 1])
            drafter.accept(0, ids[known - 1 : known], hidden[: known - 1])
            draft = list(drafter.propose([0], [3])[0].tokens)
            drafter.remove(0)
            right = [a == b for a, b in zip(draft, ids[known:], strict=False)]
            accepted.append([*right, False].index(False))
        for depth in range(4):
            reached[depth] += sum(n >= depth for n in accepted)
        at = 0
        while at < len(accepted):
            at, forwards = at + accepted[at] + 1, forwards + 1
        tokens += min(at, len(accepted))
    found = evaluate.evaluate(head, model, looked, 3, 256)
    assert found["all"].positions == reached[0]
    assert found["all"].by_depth == [pytest.approx(b / a) for a, b in itertools.pairwise(reached)]
    assert found["all"].tokens_per_forward == pytest.approx(tokens / forwards)
    assert 0.05 < reached[1] / reached[0] < 0.999  # something to tell apart
    assert list(found) == ["all", "even", "odd"]
    assert found["even"].positions + found["odd"].positions == reached[0]


def test_soft_cross_entropy_has_the_gradient_of_the_plain_formula() -> None:
    torch.manual_seed(0)
    hidden, weight, bias, offset = torch.randn(300, 8, requires_grad=True), torch.randn(50, 8), torch.randn(50), torch.rand(50)
    labels, label_weights = torch.randint(50, (300, 5)), torch.rand(300, 5).softmax(-1)
    value, right = loss.SoftCrossEntropy.apply(hidden, weight, bias, offset, labels, label_weights)
    logits = hidden @ weight.T + bias
    expected = -((logits + offset).log_softmax(-1).gather(1, labels) * label_weights).sum(-1).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, hidden), torch.autograd.grad(expected, hidden), rtol=1e-4, atol=1e-6)
    assert torch.equal(right, logits.argmax(-1) == labels[:, -1])


def test_sampled_vocabulary_is_the_whole_one_where_all_is_drawn() -> None:
    model = tiny_model("llama")
    looked, head = looked_up(model, counting_texts(6)), random_head(model)
    batch = looked.batch([0, 1, 2, 3, 4, 5])
    vocabularies = [loss.Vocabulary(model.lm_head, torch.float32, negatives) for negatives in (None, 10_000)]
    found = [loss.chain_loss(head, batch, vocabulary_, 3, 0.6, seed=1) for vocabulary_ in vocabularies]
    for whole, sampled in zip(*found, strict=True):
        torch.testing.assert_close(whole, sampled)
    total, losses, accepted = found[0]
    torch.testing.assert_close(total, losses[0] + 0.6 * losses[1] + 0.36 * losses[2])
    assert accepted.tolist() == sorted(accepted.tolist(), reverse=True)


# --- loop ---------------------------------------------------------------------------------------------------------------------------


def test_loss_falls_and_acceptance_rises_in_a_language_that_can_be_learned() -> None:
    model = counting_model(32)
    texts = counting_texts(120, vocab=32)
    looked, others = looked_up(model, texts[:100]), looked_up(model, texts[100:])
    head = unskilled(model)
    before = evaluate.evaluate(head, model, others, 3, 256)["all"]
    trainer = loop.Trainer(head, model, looked, loop.Recipe(epochs=12, lr=1e-2, batch_tokens=256, warm_up=5, negatives=None))
    entries = list(trainer.run())
    after = evaluate.evaluate(trainer.finish(), model, others, 3, 256)["all"]
    assert all(last < 0.9 * first for first, last in zip(entries[0]["loss"], entries[-1]["loss"], strict=True))
    assert entries[-1]["accepted"][0] > entries[0]["accepted"][0] + 0.5
    assert (after.by_depth[0] or 0) > (before.by_depth[0] or 0) + 0.5
    assert after.tokens_per_forward > before.tokens_per_forward + 0.5
    assert len(entries) == trainer.total
    assert not any(p.requires_grad for p in head.parameters())


def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    model = counting_model()
    looked = looked_up(model, counting_texts(40))

    def trainer() -> loop.Trainer:
        return loop.Trainer(unskilled(model), model, looked, RECIPE)

    whole = trainer()
    loop.train(whole, tmp_path / ".", {}, 1e9)
    assert whole.per_epoch > 1
    (tmp_path / "checkpoint.pt").unlink()
    assert loop.read_checkpoint(tmp_path, RECIPE, {}) is None
    parts = trainer()
    for _, entry in zip(range(whole.per_epoch + 2), parts.run(), strict=False):
        assert entry["loss"] == whole.curves[entry["step"] - 1]["loss"]
    parts.save(tmp_path, {"data": "x"})
    state = loop.read_checkpoint(tmp_path, RECIPE, {"data": "x"})
    assert state is not None
    resumed = trainer()
    resumed.load(state)
    assert 0 < resumed.step < (whole.total or 0)
    loop.train(resumed, tmp_path, {}, 0.0)
    for name, weight in whole.head.state_dict().items():
        assert torch.equal(weight, resumed.head.state_dict()[name]), name
    assert [entry["loss"] for entry in resumed.curves] == [entry["loss"] for entry in whole.curves]


@pytest.mark.parametrize(("recipe", "about"), [({"lr": 1.0}, {}), ({"seed": 2}, {}), ({}, {"data": "other"})])
def test_a_checkpoint_of_another_run_is_refused(recipe: dict[str, Any], about: dict[str, str], tmp_path: Path) -> None:
    model = counting_model()
    loop.Trainer(unskilled(model), model, looked_up(model, counting_texts(5)), RECIPE).save(tmp_path, {"data": "x"})
    with pytest.raises(OptionError, match=f"{next(iter(recipe | about))} was"):
        loop.read_checkpoint(tmp_path, loop.Recipe(**{**RECIPE.__dict__, **recipe}), {"data": "x", **about})
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(OptionError, match="can't be read"):
        loop.read_checkpoint(tmp_path, RECIPE, {"data": "x"})


def test_minutes_set_the_length_and_the_learning_rate() -> None:
    model = counting_model()
    recipe = loop.Recipe(**{**RECIPE.__dict__, "minutes": 0.5 / 60, "warm_up": 1})
    trainer = loop.Trainer(unskilled(model), model, looked_up(model, counting_texts(40)), recipe)
    entries = list(trainer.run())
    assert 0.5 <= trainer.seconds < 5
    assert entries[0]["lr"] == recipe.lr > entries[-1]["lr"]
