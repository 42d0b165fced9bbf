"""The rewritten graph against the stock model run without a cache, at sizes that were not traced; and capture's promises.

Every row of every forward (ragged batches, long runs, chains, trees behind paths with gaps) is compared with what the stock model says
of the tokens from the start of the sequence to that row.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from torch import Tensor, fx
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from specfx import gate
from specfx.capture import Fingerprint, capture, clone_sharing_storage
from specfx.engines.base import Rows
from specfx.engines.paged import PagedEngine, graph_engine, on_references
from specfx.errors import CaptureError, GateError, LoweringError
from specfx.kernels import cpu_build
from specfx.kernels.attention import attention
from specfx.passes.framework import PassContext, calls, run_passes
from specfx.passes.pipeline import REWRITE
from specfx.runtime.tree import DraftTree

FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "gpt_oss", "gpt_neox", "deepseek_v3", "qwen3_moe", "gptj", "falcon")
PAGE = 16
TOLERANCE = 1e-4
"""Of the root mean square of the difference, relative to the spread of the row (float32)."""


@functools.cache
def stock_and_graph(name: str) -> tuple[PreTrainedModel, fx.GraphModule]:
    model = tiny_model(name)
    result = run_passes(capture(model), REWRITE, PassContext(page_size=PAGE))
    assert result.failed is None, result.failed
    return model, result.module


def kernels() -> None:
    """The C++ kernels take the ops' places, where they can be built."""
    with contextlib.suppress(LoweringError):
        cpu_build.load()


class Mirror:
    """An engine and, for each sequence, the tokens that it must behave as if it had read. Checks each forward row by row."""

    def __init__(self, name: str, references: bool) -> None:
        self.model, module = stock_and_graph(name)
        if not references:
            kernels()
        call = on_references(module) if references else module
        self.engine = PagedEngine("graph", module, call, "auto", torch.device("cpu"))
        self.committed: dict[int, list[int]] = {}
        self.last: dict[int, tuple[list[int], list[int]]] = {}
        self.random = random.Random(name)

    def tokens(self, n: int) -> list[int]:
        return self.random.sample(range(VOCAB), n)

    def add(self, *seqs: int) -> None:
        for seq in seqs:
            self.engine.add(seq, 160)
            self.committed[seq] = []

    def forward(self, *batch: Rows) -> None:
        for rows, output in zip(batch, self.engine.forward(batch), strict=True):
            tree = rows.tree or DraftTree()
            tokens = [*rows.tokens, *tree.tokens]
            parents = [*range(-1, len(rows.tokens) - 1), *(p + len(rows.tokens) for p in tree.parents)]
            self.last[rows.seq] = tokens, parents
            read = [len(tokens) - 1] if rows.last_only else range(len(tokens))
            expected = self.stock(self.committed[rows.seq], tokens, parents)[list(read)]
            error = gate.row_error(output.logits, expected)
            assert error.max() < TOLERANCE, f"sequence {rows.seq}: {error}"
            assert output.choice == output.logits.argmax(-1).tolist()
            assert output.hidden is not None
            assert len(output.hidden) == len(tokens)

    @torch.no_grad()
    def stock(self, before: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        logits: dict[int, Tensor] = {}
        for leaf in sorted(set(range(len(tokens))) - set(parents)):
            path = [leaf]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            ids = torch.tensor([[*before, *(tokens[row] for row in path)]])
            logits |= dict(zip(path, self.model(input_ids=ids, use_cache=False).logits[0][-len(path) :], strict=True))
        return torch.stack([logits[row] for row in range(len(tokens))])

    def commit(self, seq: int, rows: Sequence[int]) -> None:
        self.engine.commit(seq, rows)
        self.committed[seq] += [self.last[seq][0][row] for row in rows]

    def tree(self, *parents: int) -> DraftTree:
        return DraftTree(tuple(self.tokens(len(parents))), parents, (1.0,) * len(parents))


@pytest.mark.parametrize("references", [True, False], ids=["references", "kernels"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_equals_the_stock_model(name: str, references: bool) -> None:
    m = Mirror(name, references)
    lengths = {0: 1, 1: 13, 2: 70}
    m.add(*lengths)
    # three prompts in one ragged forward, one of more rows than a mask has bits
    m.forward(*(Rows(seq, m.tokens(n), last_only=seq == 1) for seq, n in lengths.items()))
    for seq, n in lengths.items():
        m.commit(seq, range(n))
    # a chain, a branching tree and a single token side by side
    branching = m.tree(-1, -1, 0, 1, 1, 4, 2, 5, 7, -1)
    m.forward(Rows(0, m.tokens(1), DraftTree.chain(m.tokens(6))), Rows(2, m.tokens(1), branching), Rows(1, m.tokens(1)))
    m.commit(0, (0, 1, 2))
    m.commit(1, (0,))
    m.commit(2, (0, 2, 5, 6, 8, 9))  # a path with gaps: keys and values are moved
    # trees behind all of that, in another order; the first forward of sequence 2 is never committed
    m.forward(Rows(2, m.tokens(1), m.tree(-1, 0, 0)))
    m.forward(Rows(2, m.tokens(1), m.tree(-1, 0, 0, -1, 3, 2)), Rows(0, m.tokens(1), m.tree(-1, -1, -1)))
    m.commit(2, (0, 4, 5))
    m.commit(0, (0, 3))
    m.forward(*(Rows(seq, m.tokens(1)) for seq in (0, 1, 2)))
    # a long run behind what is there, and a sequence that takes over the pages of another
    m.forward(Rows(1, m.tokens(66)))
    m.commit(1, range(66))
    m.engine.remove(2)
    m.add(3)
    m.forward(Rows(3, m.tokens(70)), Rows(1, m.tokens(1), DraftTree.chain(m.tokens(20))))
    for seq in (0, 1, 3):
        m.engine.remove(seq)
    assert m.engine.pool.pages_in_use == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_rows_of_a_batch_are_as_alone(name: str) -> None:
    _, module = stock_and_graph(name)
    engine = graph_engine(module, "auto", torch.device("cpu"))
    prompts = [[5], list(range(13)), list(range(30, 100))]
    together = {}
    with gate.sequences(engine, 0, 1, 2):
        for seq, output in enumerate(engine.forward([Rows(s, p) for s, p in enumerate(prompts)])):
            together[seq] = output.logits.clone()
    for seq, prompt in enumerate(prompts):
        with gate.sequences(engine, seq):
            torch.testing.assert_close(engine.forward([Rows(seq, prompt)])[0].logits, together[seq], rtol=1e-4, atol=1e-4)


# --- capture


def facts(model: PreTrainedModel) -> list[object]:
    """What must not change about the user's model."""
    return [
        [(n, p.data_ptr(), p._version, p.requires_grad, p.dtype) for n, p in model.named_parameters()],
        [(n, b.data_ptr(), b._version) for n, b in model.named_buffers()],
        [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for n, m in model.named_modules()],
        model.config.to_dict(),
        model.config._attn_implementation,
        getattr(model.config, "_experts_implementation", None),
        sorted(model.__dict__),
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize(("name", "training"), [("llama", True), ("gpt_oss", False), ("falcon", True), ("mamba", False)])
def test_capture_leaves_the_model_untouched(name: str, training: bool) -> None:
    model = tiny_model(name).train(training)
    next(model.parameters()).requires_grad_(False)
    before, fingerprint = facts(model), Fingerprint.of(model)
    if name == "mamba":
        with pytest.raises(CaptureError):
            capture(model)
    else:
        capture(model)
    assert facts(model) == before
    assert Fingerprint.of(model) == fingerprint


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_the_graph_shares_the_models_storage(name: str) -> None:
    model = tiny_model(name)
    graph = capture(model)
    ours = {p.data_ptr() for p in model.parameters()}
    weights = dict(graph.named_parameters())
    used = [str(n.target) for n in graph.graph.find_nodes(op="get_attr") if str(n.target) in weights]
    assert len(used) == len(ours)
    assert {weights[name].data_ptr() for name in used} == ours
    assert not any(weights[name].requires_grad for name in used)


def test_a_clone_shares_storage_and_nothing_else() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    clone = clone_sharing_storage(model)
    assert clone.config is not model.config
    assert not {id(m) for m in clone.modules()} & {id(m) for m in model.modules()}
    assert {n: p.data_ptr() for n, p in clone.named_parameters()} == {n: p.data_ptr() for n, p in model.named_parameters()}
    assert clone.lm_head.weight is clone.model.embed_tokens.weight
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in clone.parameters())


def test_a_fingerprint_notices_changed_weights() -> None:
    model = tiny_model("llama")
    before = Fingerprint.of(model)
    assert Fingerprint.of(model) == before
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    changed = Fingerprint.of(model)
    assert changed.storage == before.storage
    assert changed.values != before.values
    assert Fingerprint.of(model.to(torch.float64)).storage != before.storage


def passing(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> PreTrainedModel:
    """A model whose attention is given further keyword arguments."""
    original = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", lambda self, *a, **k: original(self, *a, **k, **arguments))
    return tiny_model("llama")


def test_the_marker_refuses_an_unknown_argument_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = passing(monkeypatch, position_bias=torch.zeros(4))
    # what the marker refuses is captured with attention written out, where all that it does shows
    assert not calls(capture(model), attention)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", None)
    with pytest.raises(CaptureError, match="attention of LlamaAttention takes position_bias, which the marker can't carry; with"):
        capture(model)


def test_an_unknown_argument_that_is_none_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(calls(capture(passing(monkeypatch, position_bias=None)), attention)) == 2


def test_the_marker_refuses_attention_that_is_not_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.is_causal = False
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", None)
    with pytest.raises(CaptureError, match="attention of LlamaAttention is not causal"):
        capture(model)


def test_models_that_cannot_be_captured_are_refused_with_the_cause() -> None:
    with pytest.raises(CaptureError, match="Llama4ForCausalLM"):
        capture(tiny_model("llama4"))
    with pytest.raises(CaptureError, match="MambaForCausalLM"):
        capture(tiny_model("mamba"))


def test_recurrent_layers_are_refused_by_name() -> None:
    for name in ("qwen3_next", "jamba"):
        with pytest.raises(GateError, match=r"layers of type .* keep a state that this engine can't put back"):
            gate.refuse_by_name(tiny_model(name).config)
