"""The eager engine against the stock model, on tiny random models of many families."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from tiny import FORGETFUL_NAMES, RECURRENT_NAMES, TINY_NAMES, VOCAB, tiny_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

import specfx.engines.eager as eager
from specfx.engines.base import Rows
from specfx.engines.eager import EagerEngine
from specfx.errors import LoweringError, Reason
from specfx.kernels import cpu_build
from specfx.kernels.keyed_sample import Draw, draw_tables, keyed_sample_reference
from specfx.runtime.tree import DraftTree

CHAINS_ONLY = ("bloom", "mpt")
SERVED_NAMES = tuple(name for name in TINY_NAMES if name not in FORGETFUL_NAMES)
NEW_TOKENS = 64


def prompt_of(seed: int, n: int = 13) -> list[int]:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def stock_greedy(model: PreTrainedModel, prompt: list[int], n: int = NEW_TOKENS) -> list[int]:
    return model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)[0, len(prompt) :].tolist()


def random_tree(rng: random.Random, true: list[int], size: int) -> DraftTree:
    """A random branching tree in random order, in which the true continuation is often found for a few tokens."""
    tokens: list[int] = []
    parents: list[int] = []
    right = [-1]  # the nodes that continue the true text, the pending token first
    for _ in range(size):
        depth = len(right) - 1
        if rng.random() < 0.4 and depth < len(true):
            parent, token = right[-1], true[depth]
        else:
            parent, token = rng.randrange(-1, len(tokens)), rng.randrange(VOCAB)
        if (parent, token) in zip(parents, tokens, strict=True):
            continue
        tokens.append(token)
        parents.append(parent)
        if parent == right[-1] and depth < len(true) and token == true[depth]:
            right.append(len(tokens) - 1)
    return DraftTree(tuple(tokens), tuple(parents), (1.0,) * len(tokens))


def random_chain(rng: random.Random, true: list[int], size: int) -> DraftTree:
    right = rng.randrange(size + 1)
    return DraftTree.chain([*true[:right], *(rng.randrange(VOCAB) for _ in range(size - right))])


class Greedy:
    """A greedy speculative loop over one sequence of an engine, with drafts made from the answer `expected`."""

    def __init__(self, engine: EagerEngine, seq: int, prompt: list[int], expected: list[int], seed: int = 0) -> None:
        self.engine, self.seq, self.expected, self.rng = engine, seq, expected, random.Random(seed)
        self.steps = self.gaps = 0
        engine.add(seq, len(prompt) + len(expected))
        (output,) = engine.forward([Rows(seq, prompt, last_only=True)])
        engine.commit(seq, range(len(prompt)))
        self.out = list(output.choice)

    def step(self) -> None:
        draft = random_tree if self.engine.verifies == "trees" else random_chain
        tree = draft(self.rng, self.expected[len(self.out) :], self.rng.randrange(9))
        (output,) = self.engine.forward([Rows(self.seq, self.out[-1:], tree)])
        rows = tree.walk(output.choice)
        self.engine.commit(self.seq, rows)
        self.out += [output.choice[row] for row in rows]
        self.steps += 1
        self.gaps += rows != list(range(len(rows)))

    def run(self) -> list[int]:
        while len(self.out) < len(self.expected):
            self.step()
        return self.out[: len(self.expected)]


@pytest.mark.parametrize("name", TINY_NAMES)
def test_what_each_family_verifies(name: str) -> None:
    engine = EagerEngine(tiny_model(name))
    if name in FORGETFUL_NAMES:
        assert engine.verifies == "nothing"
        assert [refusal.reason for refusal in engine.refusals] == [Reason.CHAINS_UNVERIFIABLE]
        assert "chain: logits differ from the stock model's" in engine.refusals[0].detail
        assert "some models drop their state where several rows come behind it" in engine.refusals[0].detail
    elif name in RECURRENT_NAMES:
        assert engine.verifies == "chains"
        assert [refusal.reason for refusal in engine.refusals] == [Reason.RECURRENT_STATES]
    elif name in CHAINS_ONLY:  # ALiBi: positions are places in the cache, which a tree's siblings shift
        assert engine.verifies == "chains"
        assert [refusal.reason for refusal in engine.refusals] == [Reason.TREES_UNVERIFIABLE]
        assert "position_ids" in engine.refusals[0].detail
        with pytest.raises(ValueError, match="verifies chains"):
            engine.forward([Rows(0, [1], DraftTree((1, 2), (-1, -1), (1.0, 1.0)))])
    else:
        assert (engine.verifies, engine.refusals) == ("trees", [])


@pytest.mark.parametrize("name", SERVED_NAMES)
def test_greedy_decoding_with_random_drafts_gives_the_tokens_of_stock_generate(name: str) -> None:
    model, prompt = tiny_model(name), prompt_of(1)
    expected = stock_greedy(model, prompt)
    loop = Greedy(EagerEngine(model), 0, prompt, expected)
    assert loop.run() == expected
    assert loop.steps < NEW_TOKENS * 0.8, "the drafts were meant to be accepted now and then"
    assert loop.gaps > 0 or loop.engine.verifies == "chains", "no path with a gap was ever committed"
    assert len(set(expected)) > 8, "a model whose output never varies tests little"


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2", "bloom"])
def test_rejected_rows_leave_no_trace(name: str) -> None:
    model, prompt = tiny_model(name), prompt_of(2)
    engine = EagerEngine(model)
    engine.add(0, 64)
    engine.forward([Rows(0, prompt_of(3))])  # rolled back: the next forward comes without a commit
    engine.forward([Rows(0, prompt)])
    engine.commit(0, range(len(prompt)))
    engine.forward([Rows(0, [1], DraftTree.chain([2, 3, 4]))])
    engine.commit(0, [0, 1])
    engine.forward([Rows(0, [5], DraftTree.chain([6, 7]))])
    engine.commit(0, [])
    if engine.verifies == "trees":
        engine.forward([Rows(0, [3], DraftTree((9, 10, 11, 12), (-1, -1, 1, 0), (1.0,) * 4))])
        engine.commit(0, [0, 2, 3])
        prompt = [*prompt, 1, 2, 3, 10, 11]
    else:
        prompt = [*prompt, 1, 2]
    assert engine.length(0) == len(prompt)
    (used,) = engine.forward([Rows(0, [20, 21])])

    fresh = EagerEngine(model)
    fresh.add(7, 64)
    fresh.forward([Rows(7, prompt)])
    fresh.commit(7, range(len(prompt)))
    (clean,) = fresh.forward([Rows(7, [20, 21])])
    torch.testing.assert_close(used.logits, clean.logits, rtol=1e-4, atol=1e-4)
    shapes = [tuple(layer.keys.shape) for layer in engine._sequences[0].cache.layers]
    assert shapes == [tuple(layer.keys.shape) for layer in fresh._sequences[7].cache.layers]


def test_interleaved_sequences_do_not_see_each_other() -> None:
    model = tiny_model("gemma3")
    engine = EagerEngine(model)
    prompts = {4: prompt_of(4), 9: prompt_of(9, 21)}
    loops = {seq: Greedy(engine, seq, prompt, stock_greedy(model, prompt), seed=seq) for seq, prompt in prompts.items()}
    while any(len(loop.out) < NEW_TOKENS for loop in loops.values()):
        for loop in loops.values():
            loop.step()
    for loop in loops.values():
        assert loop.out[:NEW_TOKENS] == loop.expected
    outputs = engine.forward([Rows(seq, loop.out[-1:]) for seq, loop in loops.items()])
    for (seq, loop), output in zip(loops.items(), outputs, strict=True):
        expected = model(torch.tensor([[*prompts[seq], *loop.out]]), use_cache=False).logits[0, -1:]
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)


def test_remove_frees_the_cache_and_the_id() -> None:
    engine = EagerEngine(tiny_model("llama"))
    assert not engine._sequences, "the probe left sequences behind"
    engine.add(0, 16)
    engine.forward([Rows(0, [1, 2, 3])])
    engine.commit(0, [0, 1, 2])
    keys = weakref.ref(engine._sequences[0].cache.layers[0].keys)
    engine.remove(0)
    engine.remove(0)  # unknown ids are ignored
    gc.collect()
    assert keys() is None
    engine.add(0, 16)
    assert engine.length(0) == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "phi3", "bloom", "mamba", "qwen3_next"])
def test_the_users_model_is_untouched(name: str) -> None:
    model = tiny_model(name).train()
    model.generation_config.max_length = 33
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {key: (tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.clone()) for key, tensor in tensors.items()}
    settings = (
        model.config.to_dict(),
        model.config._attn_implementation,
        [id(module.config) for module in model.modules() if hasattr(module, "config")],
    )
    random_state = torch.get_rng_state()

    engine = EagerEngine(model)
    if engine.verifies != "nothing":
        Greedy(engine, 0, prompt_of(5), [0] * 8).run()

    assert torch.equal(random_state, torch.get_rng_state())
    assert settings == (
        model.config.to_dict(),
        model.config._attn_implementation,
        [id(module.config) for module in model.modules() if hasattr(module, "config")],
    )
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert after.keys() == before.keys()
    for key, (pointer, version, grad, value) in before.items():
        assert (after[key].data_ptr(), after[key]._version, after[key].requires_grad) == (pointer, version, grad), key
        assert torch.equal(after[key], value), key
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    if engine.model is not None:
        shared = {parameter.data_ptr() for parameter in engine.model.parameters()}
        assert shared <= {parameter.data_ptr() for parameter in model.parameters()}, "the clone must share its weights"
        assert not any(module._forward_pre_hooks for module in engine.model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "bloom", *(n for n in RECURRENT_NAMES if n != "inkling")])
def test_hidden_is_the_heads_input_of_all_rows(name: str) -> None:
    model, prompt = tiny_model(name), prompt_of(6)
    engine = EagerEngine(model)
    engine.add(0, 32)
    (last,) = engine.forward([Rows(0, prompt, last_only=True)])
    (every,) = engine.forward([Rows(0, prompt)])
    assert last.logits.shape == (1, VOCAB)
    assert every.logits.shape == (len(prompt), VOCAB)
    assert last.choice == every.choice[-1:]
    assert every.choice == every.logits.argmax(-1).tolist()
    stock = model(torch.tensor([prompt]), use_cache=False, output_hidden_states=True).hidden_states[-1][0]
    for output in (last, every):
        torch.testing.assert_close(output.hidden, stock, rtol=1e-4, atol=1e-4)


def test_misuse_is_refused() -> None:
    engine = EagerEngine(tiny_model("llama"))
    engine.add(0, 16)
    with pytest.raises(ValueError, match="exists already"):
        engine.add(0, 16)
    with pytest.raises(ValueError, match="once in a forward"):
        engine.forward([Rows(0, [1]), Rows(0, [2])])
    with pytest.raises(ValueError, match="rows of the last forward"):
        engine.commit(0, [0])
    engine.forward([Rows(0, [1, 2, 3])])
    for rows in ([0, 3], [1, 0], [-1], [1, 1]):
        with pytest.raises(ValueError, match="ascending path"):
            engine.commit(0, rows)
    engine.commit(0, [0, 1, 2])
    assert engine.length(0) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_the_probe_passes_rounding_and_fails_a_wrong_mask(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name).to(dtype)
    assert EagerEngine(model).verifies == "trees"
    right = eager.TreeMasks.__call__

    def too_much_seen(self: eager.TreeMasks, tree: DraftTree, past: int) -> torch.Tensor | dict[str, torch.Tensor]:
        masks = right(self, tree, past)
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            if dtype == torch.float32:  # one cell
                mask[0, 0, -1, past + 1] = 0
            else:  # rows see all rows before them
                mask[0, 0, :, past:] = mask[0, 0, :, past:].triu(1)
        return masks

    monkeypatch.setattr(eager.TreeMasks, "__call__", too_much_seen)
    engine = EagerEngine(model)
    assert engine.verifies == "chains"
    assert engine.refusals[0].reason is Reason.TREES_UNVERIFIABLE
    assert "differ from the stock model's" in engine.refusals[0].detail


@pytest.mark.parametrize("window", [8, 4096])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss", "llama4"])
def test_the_probe_crosses_windows_of_any_size(name: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "attention_chunk_size" if name == "llama4" else "sliding_window"
    model = tiny_model(name, **{key: window})
    engine = EagerEngine(model)
    assert engine.verifies == "trees"
    assert getattr(engine.model.config, key) == window

    def windows_forgotten(self: eager.TreeMasks, tree: DraftTree, past: int) -> torch.Tensor | dict[str, torch.Tensor]:
        full = all_full(tree, past)
        return dict.fromkeys(self.kinds, full) if self.by_type else full

    all_full = eager.TreeMasks(tiny_model("llama"))
    right = eager.TreeMasks.__call__
    monkeypatch.setattr(eager.TreeMasks, "__call__", lambda self, *args: (right if self is all_full else windows_forgotten)(self, *args))
    assert EagerEngine(model).verifies == "chains"


@pytest.mark.parametrize(
    ("name", "overrides", "level", "cause"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "nothing", "rope_type='dynamic'"),
        ("llama", {"window_size": 256}, "chains", "config.window_size=256"),
        ("llama", {"sliding_window": 8}, "trees", ""),  # Llama's code asks for no window
        (
            "qwen3",
            {"layer_types": ["sliding_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 8},
            "trees",
            "",
        ),
    ],
)
def test_what_few_tokens_cannot_show_is_decided_by_name(name: str, overrides: dict, level: str, cause: str) -> None:
    engine = EagerEngine(tiny_model(name, **overrides))
    assert engine.verifies == level
    assert cause in " ".join(map(str, engine.refusals))


def test_longrope_is_refused_only_if_its_switch_can_be_reached() -> None:
    for reach, level in ((128, "nothing"), (512, "trees")):
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
        model = tiny_model("llama", rope_parameters=rope | {"original_max_position_embeddings": reach})
        assert EagerEngine(model).verifies == level


def test_an_encoder_decoder_is_refused_with_a_reason() -> None:
    config = AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    engine = EagerEngine(AutoModelForSeq2SeqLM.from_config(config))
    assert engine.verifies == "nothing"
    assert "encoder-decoder" in str(engine.refusals[0])


def test_a_model_that_cannot_be_cloned_or_run_is_refused_with_the_exceptions_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no such thing")

    model = tiny_model("llama")
    with monkeypatch.context() as patch:
        patch.setattr(eager, "clone_sharing_storage", broken)
        engine = EagerEngine(model)
    assert (engine.verifies, engine.model) == ("nothing", None)
    assert "RuntimeError: no such thing" in engine.refusals[0].detail
    monkeypatch.setattr(type(model), "forward", broken)
    engine = EagerEngine(model)
    assert engine.verifies == "nothing"
    assert "RuntimeError: no such thing" in engine.refusals[0].detail


def test_an_attention_that_takes_no_masks_is_replaced_on_the_clone_only() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("flex_attention")
    engine = EagerEngine(model)
    assert engine.verifies == "trees"
    assert engine.model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "flex_attention"


def test_a_sequence_begins_with_what_another_holds() -> None:
    model = tiny_model("gemma3")
    engine = EagerEngine(model)
    text = [9, 3, 7, 5, 2, 6, 4, 8, 1, 12, 14]
    engine.add(0, 40)
    engine.forward([Rows(0, text[:-1])])
    engine.commit(0, range(10))
    for seq, shared in ((1, 9), (2, 10), (3, 40)):
        engine.add(seq, 40, 0, shared)
        taken = engine.inherit(seq)
        assert taken == engine.length(seq) == min(shared, 10)
        (output,) = engine.forward([Rows(seq, [*text[taken:], 77])])
        torch.testing.assert_close(output.logits[-1], model(torch.tensor([[*text, 77]])).logits[0, -1], rtol=1e-4, atol=1e-4)
    engine.add(4, 40, 0, 5)
    engine.remove(0)
    assert engine.inherit(4) == engine.length(4) == 0
    engine.add(5, 40)
    assert engine.inherit(5) == 0


def test_tokens_are_drawn_at_the_places_that_rows_stand_at() -> None:
    engine, draw = EagerEngine(tiny_model("llama")), Draw(3, 1, temperature=1.4, top_k=30, top_p=0.9, min_p=0.001)
    engine.add(0, 40)
    (output,) = engine.forward([Rows(0, [5, 6, 7, 8], last_only=True, draw=draw)])
    assert output.choice == keyed_sample_reference(output.logits, *draw_tables([draw], [4])).tolist()
    engine.commit(0, range(4))
    tree = DraftTree((1, 2, 3, 4), (-1, -1, 0, 2), (1.0,) * 4)
    (output,) = engine.forward([Rows(0, [9], tree, draw=draw)])
    expected = keyed_sample_reference(output.logits, *draw_tables([draw] * 5, [5, 6, 6, 7, 8]))
    assert output.choice == expected.tolist() != output.logits.argmax(-1).tolist()


def test_without_a_kernel_tokens_are_drawn_all_the_same_and_the_report_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise LoweringError("no C++ compiler")

    monkeypatch.setattr(cpu_build, "load", fail)
    engine = EagerEngine(tiny_model("llama"))
    assert [(r.stage, r.reason, r.detail) for r in engine.refusals] == [("sampling kernel", Reason.NO_KERNEL, "no C++ compiler")]
    assert engine.verifies == "trees"
