"""The MTP head as a file, and the drafter against an oracle that recomputes everything without a KV cache."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specfx.drafters.mtp import load_drafter
from specfx.drafters.mtp_head import PREFIX, MtpHead, load_head, save_head
from specfx.drafters.mtp_kv import HeadKV
from specfx.errors import HeadError
from specfx.options import MtpOptions
from specfx.runtime.tree import EMPTY_TREE, DraftTree

SHIPPED = Path(__file__).parent.parent / "examples" / "smollm2_mtp_head"
VOCAB = 97


def tiny_config(kind=LlamaConfig, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return kind(**{"vocab_size": VOCAB, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0, **sizes, **changes})


def tiny_target(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**changes)).to(dtype).eval()


def random_head(target, seed=1):
    """A head whose weights are all away from their initial values."""
    head = MtpHead.from_target(target)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return head


@pytest.fixture
def target():
    return tiny_target()


@pytest.fixture
def path(target, tmp_path):
    return save_head(random_head(target), tmp_path / "head")


def drafter_for(target, path, num_steps=3, max_nodes=63):
    return load_drafter(MtpOptions(head=path, num_steps=num_steps, topk=1, min_token_prob=0), max_nodes, target)


def rotate(x, positions, theta=10000.0):
    """RoPE on ``[T, heads, D]``, written out anew."""
    dim = x.shape[-1]
    angles = positions[:, None].float() / theta ** (torch.arange(0, dim, 2).float() / dim)
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin


def head_by_hand(w, target, tokens, hidden):
    """The head over whole ``[T]`` tokens and ``[T, H]`` hidden states, from the file's weights and no module of specfx."""
    config = target.config
    n, dim = len(tokens), config.head_dim

    def norm(x, name):
        return w[PREFIX + name + ".weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)

    def linear(x, name):
        return x @ w[PREFIX + name + ".weight"].T

    z = linear(torch.cat([norm(target.model.embed_tokens.weight[tokens], "enorm"), norm(hidden, "hnorm")], -1), "eh_proj")
    x = norm(z, "input_layernorm")
    q, k, v = (linear(x, f"self_attn.{p}_proj").view(n, -1, dim) for p in "qkv")
    q, k = rotate(q, torch.arange(n)), rotate(k, torch.arange(n))
    groups = config.num_attention_heads // config.num_key_value_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * dim**-0.5
    scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    z = z + linear(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(n, -1), "self_attn.o_proj")
    x = norm(z, "post_attention_layernorm")
    z = z + linear(torch.nn.functional.silu(linear(x, "mlp.gate_proj")) * linear(x, "mlp.up_proj"), "mlp.down_proj")
    return norm(z, "shared_head.norm")


@torch.no_grad()
def oracle(w, target, tokens, hidden, steps):
    """The chain after all of `tokens` ``[L]`` with `hidden` ``[L - 1, H]``: (tokens, path probabilities)."""
    pairs, rows = list(tokens[1:]), hidden
    chain, path, total = [], [], 1.0
    for _ in range(steps):
        g = head_by_hand(w, target, pairs, rows)[-1:]
        probs = (g @ target.lm_head.weight.T).softmax(-1)[0]
        token = int(probs.argmax())
        total *= float(probs[token])
        chain.append(token)
        path.append(total)
        pairs, rows = [*pairs, token], torch.cat([rows, g])
    return chain, path


@torch.no_grad()
def true_hidden(target, tokens):
    return target.model(torch.tensor([tokens])).last_hidden_state[0]


def run(target, drafter, oracle_weights, commits, prompt, rng, budget=8, steps=3, seq=0):
    """Drive one sequence through `commits` (tokens committed per step) and compare each draft with the oracle's."""
    known = list(prompt)
    drafter.add(seq, prompt)
    trees = []
    for i, n in enumerate([1, *commits]):
        known += [rng.randrange(VOCAB) for _ in range(n)]
        hidden = true_hidden(target, known[:-1])
        drafter.accept(seq, known[-n:], hidden if i == 0 else hidden[-n:])
        (tree,) = drafter.propose([seq], [budget])
        chain, probs = oracle(oracle_weights, target, known, hidden, min(steps, budget))
        assert list(tree.tokens) == chain
        assert tree.is_chain
        torch.testing.assert_close(torch.tensor(tree.probs), torch.tensor(probs), rtol=1e-3, atol=1e-6)
        trees.append(tree)
    return trees


def test_head_survives_saving_and_loading_bit_for_bit(target, tmp_path):
    head = random_head(target)
    for where in (tmp_path / "folder", tmp_path / "deep" / "one.safetensors"):
        file = save_head(head, where, {"made_by": "a test"})
        for given in (file, file.parent, str(file)):
            loaded = load_head(given, target)
            assert loaded.state_dict().keys() == head.state_dict().keys()
            assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), head.state_dict().values(), strict=True))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_file_has_deepseek_names_and_only_the_heads_own_weights(target, path):
    names = set(load_file(path))
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    assert names == {PREFIX + n for n in own | set(target.model.layers[0].state_dict())}


def test_fresh_head_starts_from_the_targets_last_layer(target):
    weights = MtpHead.from_target(target).checkpoint()
    assert torch.equal(weights[PREFIX + "self_attn.q_proj.weight"], target.model.layers[-1].self_attn.q_proj.weight)
    assert torch.equal(weights[PREFIX + "shared_head.norm.weight"], target.model.norm.weight)
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_casting_a_head_keeps_its_rotary_frequencies(target):
    head = random_head(target)
    tokens, hidden = torch.randint(VOCAB, (1, 5)), torch.randn(1, 5, 32)
    positions = torch.arange(1000, 1005)[None]
    before = head(tokens, hidden, positions=positions)
    torch.testing.assert_close(head.to(torch.bfloat16).float()(tokens, hidden, positions=positions), before, rtol=0.1, atol=0.2)
    assert {p.dtype for p in head.state_dict().values()} == {torch.float32}
    assert all(b.dtype == torch.float32 for b in head._unregistered[2].buffers())
    assert not list(head.buffers())


def test_shards_in_a_folder_are_one_head(target, path, tmp_path):
    weights = load_file(path)
    names = sorted(weights)
    (tmp_path / "shards").mkdir()
    for i, part in enumerate((names[:5], names[5:])):
        save_file({n: weights[n] for n in part}, tmp_path / "shards" / f"part-{i}.safetensors")
    loaded = load_head(tmp_path / "shards", target).checkpoint()
    assert all(torch.equal(loaded[n], weights[n]) for n in names)
    save_file({names[0]: weights[names[0]]}, tmp_path / "shards" / "part-9.safetensors")
    with pytest.raises(HeadError, match=rf"{names[0]} twice"):
        load_head(tmp_path / "shards", target)


def test_head_of_another_width_names_weights_and_both_shapes(path):
    with pytest.raises(HeadError) as caught:
        load_head(path, tiny_target(hidden_size=64))
    text = str(caught.value)
    assert f"{PREFIX}eh_proj.weight is [32, 64] in the file, [64, 128] for this target" in text
    assert str(path) in text


@pytest.mark.parametrize("name", ["enorm.weight", "self_attn.k_proj.weight", "shared_head.norm.weight"])
def test_missing_weight_is_named(target, path, name):
    weights = load_file(path)
    shape = list(weights.pop(PREFIX + name).shape)
    save_file(weights, path)
    with pytest.raises(HeadError) as caught:
        load_head(path, target)
    assert f"missing {PREFIX}{name} {shape}" in str(caught.value)


def test_left_over_weight_is_named(target, path):
    save_file(load_file(path) | {"model.layers.1.enorm.weight": torch.ones(32)}, path)
    with pytest.raises(HeadError, match=r"left over model\.layers\.1\.enorm\.weight \[32\]"):
        load_head(path, target)


def test_absent_or_unreadable_file_is_named(target, tmp_path):
    for absent in (tmp_path / "nowhere", tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(HeadError) as caught:
            load_head(absent, target)
        assert str(absent) in str(caught.value)
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(HeadError, match=r"broken\.safetensors"):
        load_head(tmp_path / "broken.safetensors", target)


def test_head_of_another_precision_is_cast_with_a_warning(path):
    with pytest.warns(UserWarning, match=r"stored as float32 .* bfloat16"):
        head = load_head(path, tiny_target(dtype=torch.bfloat16))
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_head(path, tiny_target())


def test_head_that_is_not_finite_after_the_cast_is_refused(target, path):
    weights = load_file(path)
    weights[PREFIX + "mlp.up_proj.weight"][0, 0] = 1e30
    save_file(weights, path)
    load_head(path, target)
    with pytest.raises(HeadError, match=r"not finite as torch\.float16: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_head(path, tiny_target(dtype=torch.float16))


def test_integer_weights_are_refused(target, path):
    weights = load_file(path)
    weights[PREFIX + "enorm.weight"] = weights[PREFIX + "enorm.weight"].to(torch.int8)
    save_file(weights, path)
    with pytest.raises(HeadError, match="floating point"):
        load_head(path, target)


def test_target_that_is_not_llama_like_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(HeadError, match=r"GPT2LMHeadModel .* not built like Llama"):
        MtpHead.from_target(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB)))


def test_target_is_untouched_and_not_part_of_the_head(path):
    target = tiny_target(attn_implementation="eager")
    before = copy.deepcopy(target.state_dict())
    drafter = drafter_for(target, path)
    run(target, drafter, load_file(path), [2], [1, 2, 3], random.Random(0))
    after = target.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.requires_grad for p in target.parameters())
    assert target.config._attn_implementation == "eager"
    assert target.model.layers[-1].self_attn.layer_idx == 1
    shared = {p.data_ptr() for p in target.parameters()}
    assert not shared & {p.data_ptr() for p in drafter.head.parameters()}
    assert sum(p.numel() for p in drafter.head.parameters()) == sum(w.numel() for w in load_file(path).values())


@pytest.mark.parametrize("commits", [*itertools.product((1, 2, 4), repeat=3), (3, 1, 4, 2, 1, 1, 4, 3)])
def test_drafts_equal_a_recomputation_from_scratch(target, path, commits):
    rng = random.Random(str(commits))
    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 7, 40)))]
    run(target, drafter_for(target, path), load_file(path), commits, prompt, rng)


def test_drafts_equal_a_recomputation_beyond_the_first_kv_buffer(target, path):
    rng = random.Random(5)
    run(target, drafter_for(target, path, num_steps=7), load_file(path), [3, 1], [rng.randrange(VOCAB) for _ in range(250)], rng, steps=7)


def test_eager_attention_gives_the_same_drafts(target, path, monkeypatch):
    monkeypatch.setattr(type(target), "_supports_sdpa", False)
    drafter = drafter_for(target, path)
    assert drafter.head.layer.self_attn.config._attn_implementation == "eager"
    run(target, drafter, load_file(path), [2, 4, 1], [5, 6, 7, 8], random.Random(3))


def test_interleaved_sequences_do_not_mix(target, path):
    drafter, weights = drafter_for(target, path), load_file(path)
    rng = random.Random(11)
    known = {s: [rng.randrange(VOCAB) for _ in range(3 + 2 * s)] for s in range(3)}
    for s in known:
        drafter.add(s, known[s])
    for i in range(4):
        for s in known:
            n = 1 if i == 0 else rng.randint(1, 4)
            known[s] += [rng.randrange(VOCAB) for _ in range(n)]
            drafter.accept(s, known[s][-n:], true_hidden(target, known[s][:-1])[-(n if i else 10**6) :])
        trees = drafter.propose([2, 0, 1], [3, 2, 1])
        for s, budget, tree in zip([2, 0, 1], [3, 2, 1], trees, strict=True):
            assert list(tree.tokens) == oracle(weights, target, known[s], true_hidden(target, known[s][:-1]), budget)[0]


def test_rejected_drafts_leave_no_trace(target, path):
    """Proposing often, seldom or with other budgets changes nothing of a later draft."""
    rng = random.Random(2)
    known = [rng.randrange(VOCAB) for _ in range(9)]
    quiet, busy = drafter_for(target, path), drafter_for(target, path, num_steps=6)
    for drafter in (quiet, busy):
        drafter.add(0, known)
    for i, n in enumerate((1, 2, 4, 1)):
        known += [rng.randrange(VOCAB) for _ in range(n)]
        hidden = true_hidden(target, known[:-1])[0 if i == 0 else -n :]
        for drafter in (quiet, busy):
            drafter.accept(0, known[-n:], hidden)
        for budget in (6, 1, 0, 4):
            busy.propose([0], [budget])
        assert busy._sequences[0].kvs[0].length == len(known) - 1
    assert quiet.propose([0], [3])[0].tokens == busy.propose([0], [3])[0].tokens


def test_hidden_buffer_may_be_overwritten_after_accept(target, path):
    known = [4, 8, 15, 16, 23]
    trees = []
    for spoil in (False, True):
        drafter = drafter_for(target, path)
        drafter.add(0, known[:-1])
        hidden = true_hidden(target, known[:-1])
        drafter.accept(0, known[-1:], hidden)
        if spoil:
            hidden.fill_(7)
        trees.append(drafter.propose([0], [3])[0])
    assert trees[0] == trees[1]


def test_budget_and_limits_bound_the_chain(target, path):
    for num_steps, max_nodes, budget, expected in ((3, 63, 63, 3), (3, 63, 2, 2), (9, 4, 63, 4), (3, 63, 0, 0)):
        drafter = drafter_for(target, path, num_steps, max_nodes)
        drafter.add(0, [1, 2])
        assert drafter.propose([0], [budget]) == [drafter.propose([0], [0])[0]]  # nothing known yet, nothing proposed
        drafter.accept(0, [3], true_hidden(target, [1, 2]))
        assert len(drafter.propose([0], [budget])[0]) == expected


def test_drafting_is_deterministic(target, path):
    runs = [run(target, drafter_for(target, path), load_file(path), [2, 1, 4], [3, 1, 4, 1, 5], random.Random(9)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_adding_twice_raises_and_removing_the_unknown_is_ignored(target, path):
    drafter = drafter_for(target, path)
    drafter.add(7, [1])
    with pytest.raises(ValueError, match="7 is already in use"):
        drafter.add(7, [1])
    drafter.remove(7)
    drafter.remove(7)
    drafter.remove(1234)
    drafter.add(7, [1])


@pytest.mark.parametrize("hidden", [None, torch.zeros(1, 32), torch.zeros(2, 16), torch.zeros(1, 2, 32)])
def test_wrong_hidden_states_are_refused(target, path, hidden):
    drafter = drafter_for(target, path)
    drafter.add(0, [1, 2, 3])
    with pytest.raises(ValueError, match=r"hidden must be \[m >= 2, 32\]"):
        drafter.accept(0, [4, 5], hidden)


@pytest.mark.parametrize(("first", "judged", "right"), [(None, 16, 0), (20, 16, 0), (3, 26, 1)])
def test_a_head_that_is_never_right_is_reported(target, path, first, judged, right):
    """It is on trial until something is right, or it is clear that nothing will be. first: the one draft that is right."""
    drafter = drafter_for(target, path, num_steps=1)
    drafter.add(0, [1])
    drafter.accept(0, [2], torch.zeros(1, 32))

    def step(right):
        token = drafter.propose([0], [1])[0].tokens[0]
        drafter.accept(0, [token if right else (token + 1) % VOCAB], torch.zeros(1, 32))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(judged - 1):
            step(right=i == first)
            assert drafter.on_trial
    with pytest.warns(UserWarning, match=f"of the last {judged} drafts .* {right} began with a right token.*another model.*mixed up"):
        step(right=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        for _ in range(64):
            step(right=False)
        assert not drafter.on_trial


def test_a_head_that_was_right_is_reported_only_after_many_wrong_drafts(target, path):
    drafter, tree = drafter_for(target, path), DraftTree((5,), (-1,), (0.5,))
    drafter.add(0, [1, 2])
    drafter.accept(0, [3], None, tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for token in [5, 5, *[9] * 46]:
            drafter.accept(0, [token], None, tree)
    assert not drafter.on_trial
    with pytest.warns(UserWarning, match="of the last 48 drafts .* 1 began"):
        drafter.accept(0, [9], None, tree)


@pytest.mark.parametrize("token", [5, 7])
def test_a_draft_is_right_if_one_of_its_first_tokens_is(target, path, token):
    drafter = drafter_for(target, path)
    drafter.add(0, [1, 2])
    for _ in range(3):
        assert drafter.on_trial
        drafter.accept(0, [token], None, DraftTree((5, 6, 7), (-1, 0, -1), (0.5, 0.4, 0.2)))
    assert not drafter.on_trial


def test_a_draft_from_the_graph_is_handed_on_and_judged(target, path):
    drafter, tree = drafter_for(target, path), DraftTree((5, 6, 7), (-1, 0, -1), (0.5, 0.4, 0.2))
    drafter.add(0, [1, 2])
    drafter.accept(0, [3], None, tree)
    assert drafter.propose([0], [8]) == [tree]
    assert drafter.propose([0], [2])[0] == tree.truncated(2)
    for _ in range(8):
        drafter.accept(0, [9], None, tree)
        drafter.accept(0, [9], None, EMPTY_TREE)  # no draft was asked for
        assert drafter.propose([0], [8]) == [EMPTY_TREE]
    for _ in range(7):
        drafter.accept(0, [9], None, tree)
    assert drafter.on_trial
    with pytest.warns(UserWarning, match="drafting stops"):
        drafter.accept(0, [9], None, tree)
    assert not drafter.on_trial


def test_kv_rows_survive_growth_and_going_back():
    kv, rows = HeadKV(), torch.randn(1, 2, 700, 4)
    kv.update(rows[:, :, :3], rows[:, :, :3])
    kv.length = 3
    kv.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
    kv.update(rows[:, :, 3:400], rows[:, :, 3:400])
    kv.length = 400
    keys, values = kv.update(rows[:, :, 400:], rows[:, :, 400:])
    assert torch.equal(keys, rows)
    assert torch.equal(values, rows)


def test_convolution_inputs_are_kept_as_far_as_drafts_reach():
    """The three inputs before each row, also after going back; further back than is kept is an error, not other numbers."""
    kv, inputs = HeadKV(), torch.randn(2, 5, 900)
    for at, n in ((0, 1), (1, 1), (2, 300), (302, 4)):
        got = kv.update_conv_state(inputs[..., at : at + n], 0, state_idx=1, conv_kernel_size=4)
        assert torch.equal(got, inputs[..., max(0, at - 3) : at + n])
        kv.length = at + n
    for back in (2, 63, 128):
        kv.length = 306 - back
        assert torch.equal(kv.update_conv_state(inputs[..., :2], 0, 1, 4)[..., :3], inputs[..., 303 - back : 306 - back])
        kv.length += 2
        kv.update_conv_state(inputs[..., kv.length : 306], 0, 1, 4)
        kv.length = 306
    kv.length = 100
    with pytest.raises(ValueError, match="can't go on from row 100: inputs are kept of rows"):
        kv.update_conv_state(inputs[..., :1], 0, 1, 4)


def test_other_llama_like_layers_draft_the_same_with_and_without_kv():
    """Qwen3 (norms on queries and keys) through the same generic layer call."""
    torch.manual_seed(3)
    target = Qwen3ForCausalLM(tiny_config(Qwen3Config)).eval()
    head = random_head(target)
    tokens, hidden = torch.randint(VOCAB, (1, 12)), torch.randn(1, 12, 32)
    whole, kv = head(tokens, hidden), HeadKV()
    parts = [head(tokens[:, a:b], hidden[:, a:b], kv) for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="no shipped head in this checkout")
def test_shipped_head_fits_smollm2():
    """Against SmolLM2-135M's config with random weights and a small vocabulary, so without the model."""
    config = LlamaConfig(
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"vocab_size": 64, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "pad_token_id": 0},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = load_head(SHIPPED, LlamaForCausalLM(config).to(torch.bfloat16))
    assert head.hidden_size == 576
