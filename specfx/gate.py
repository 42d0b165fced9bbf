"""The acceptance gate: a graph that exports is not a graph that is right.

Before an engine serves, it is compared with the stock eager model, run without any cache on the tokens from the start to each row:

* **single**: one row on an empty sequence (1 x 1);
* **chains**: a prompt, a chain of drafts of which some are kept, a forward that is rolled back, single tokens;
* **batch**: two sequences of unequal lengths in one ragged forward;
* **choices**: of such a batch, the tokens behind all rows, drawn for one sequence, against those of the op's reference;
* **long**: a causal run of more rows than a tree mask has bits and a page has tokens, and a chain behind it;
* **trees**: a branching tree, a path with gaps committed (so keys and values are moved), another tree behind it;
* **states**: for models with recurrent states, a prompt in two pieces, then chains of which all drafts, some or none are kept.

Sliding windows are shrunken to a few tokens on both sides, so that these short prompts cross them. No global random state is used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import fx
from transformers import PreTrainedConfig, PreTrainedModel

from specfx.drafters.mtp import Drafting, MtpDrafter
from specfx.engines.base import Engine, Rows, draws_of
from specfx.errors import GateError
from specfx.kernels.keyed_sample import Draw, keyed_sample_reference
from specfx.kernels.tree_attention import tree_attention_
from specfx.passes.framework import calls, copy_module
from specfx.runtime.tree import DraftTree

TOLERANCES = {torch.float64: 1e-4, torch.float32: 3e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative error of a row of logits (see `row_error`), by the model's dtype. Measured on SmolLM2-135M: rounding makes 3e-6,
6e-3 and 4e-2 in float32, float16 and bfloat16; one cell of the mask too many makes 0.3 in its row, in any of them."""
FAST_MATMUL_TOLERANCE = 2e-2
"""The same for float32 models when torch was told to multiply in less (`torch.set_float32_matmul_precision`)."""
DRAFT_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 1.0}
"""Largest difference between the logarithms of a path's probabilities, drafted in the graph and in eager PyTorch."""
PROBE_WINDOW = 4
"""Tokens of sliding windows and attention chunks during the comparison."""
PROMPT = 11
LONG = 80
PARENTS = ((-1, -1, 0, 1, 1, 4, 2, 5), (-1, 0, 0, -1, 3, 2))
"""Two trees: on the first, the path of rows 0, 2, 5, 6, 8 is committed, and the second hangs behind it."""
PATH = (0, 2, 5, 6, 8)
DRAW = Draw(seed=1 << 40 | 5, sequence=1, temperature=1.2, top_k=200, top_p=0.97, min_p=1e-4)
"""How tokens are drawn where draws are compared: everything that `specfx::keyed_sample` knows takes part."""
SINGLE = 16
"""Tokens that go one by one behind a prompt."""
STEPS = ((4, 4), (1, 1), (6, 5), (6, 0), (6, 6), (6, 5), (6, 5), (6, 5), (6, 2), (1, 1))
"""Rows of chains, and how many of them are committed; enough in succession not wholly for committed rows to be fed again by themselves."""
_WINDOW_ARGUMENT = 11
_STATELESS = {"attention", "moe", "mlp", "dummy"}
"""Layer types whose names don't end in attention and that keep no state."""


def check(engine: Engine, stock: PreTrainedModel, shrink_windows: bool = True, states: bool = False) -> None:
    """All comparisons that `engine.verifies` calls for. Raises `GateError` at the first difference; leaves no sequence behind.

    stock: a clone of the user's model (its config is changed meanwhile). shrink_windows: False for an engine whose windows are fixed.
    states: whether the engine puts recurrent states back.
    """
    tokens = random_tokens(stock, PROMPT + 21)
    windows = shrunken_windows(stock) if shrink_windows else _nothing()
    with windows:
        if engine.verifies != "nothing":
            check_single(engine, stock, tokens)
            check_chains(engine, stock, tokens)
            check_batch(engine, stock, tokens)
            check_choices(engine, tokens)
            check_long(engine, stock, tokens)
            if states:
                check_states(engine, stock, tokens)
        if engine.verifies == "trees":
            check_trees(engine, stock, tokens)


def recurrent_layers(config: PreTrainedConfig) -> str:
    """The types of the layers that keep a state, joined; empty if there are none, or the config doesn't tell."""
    text = config.get_text_config(decoder=True)
    layers = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    return ", ".join(sorted({kind for kind in layers if not kind.endswith("attention") or kind.startswith("linear")} - _STATELESS))


def refuse_by_name(config: PreTrainedConfig, states: bool = False) -> None:
    """Raise `GateError` for what a comparison on few tokens can't find or would only find as an obscure failure.

    states: whether the engine puts recurrent states back.
    """
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise GateError("encoder-decoder models are not supported")
    if not states and (recurrent := recurrent_layers(config)):
        raise GateError(f"layers of type {recurrent} keep a state that this engine can't put back")
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind, original = str(parameters.get("rope_type")), parameters.get("original_max_position_embeddings")
        reach = getattr(text, "max_position_embeddings", None)
        if "dynamic" in kind or (kind == "longrope" and not (original and reach and reach <= original)):
            raise GateError(f"rope_type={kind!r} rotates all rows by the furthest position, so drafts would change the verified rows")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def windows_of(module: fx.GraphModule) -> list[int]:
    """The sliding window of each attention of a rewritten graph, 0 for none."""
    return [int(n.args[_WINDOW_ARGUMENT]) if len(n.args) > _WINDOW_ARGUMENT else 0 for n in calls(module, tree_attention_)]  # type: ignore[call-overload]


def with_shrunken_windows(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a rewritten graph whose sliding windows are `PROBE_WINDOW` at most."""
    module = copy_module(module)
    for node, window in zip(calls(module, tree_attention_), windows_of(module), strict=True):
        if window > PROBE_WINDOW:
            node.update_arg(_WINDOW_ARGUMENT, PROBE_WINDOW)
    module.recompile()
    return module


def has_windows(model: PreTrainedModel) -> bool:
    """Whether `shrunken_windows` has anything to shrink."""
    return bool(_windows(model))


def _windows(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str, int]]:
    """Each window and chunk above `PROBE_WINDOW`: the config that has it, its name there, and its tokens."""
    configs = {
        id(module.config): module.config for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)
    }
    text = model.config.get_text_config(decoder=True)
    found = []
    for config in {**configs, id(text): text}.values():
        for key in ("sliding_window", "attention_chunk_size"):
            size = None if getattr(config, "is_heterogeneous", False) else getattr(config, key, None)
            if type(size) is int and size > PROBE_WINDOW:
                found.append((config, key, size))
    return found


@contextmanager
def shrunken_windows(model: PreTrainedModel) -> Iterator[None]:
    """Set `sliding_window` and `attention_chunk_size`, where the configs of this clone have them, to `PROBE_WINDOW`; then back."""
    saved = _windows(model)
    try:
        for config, key, _ in saved:
            setattr(config, key, PROBE_WINDOW)
        yield
    finally:
        for config, key, size in saved:
            setattr(config, key, size)


@contextmanager
def sequences(engine: Engine, *seqs: int, capacity: int = 96) -> Iterator[None]:
    """These sequences exist within the block, and are gone after it."""
    try:
        for seq in seqs:
            engine.add(seq, capacity)
        yield
    finally:
        for seq in seqs:
            engine.remove(seq)


def check_single(engine: Engine, stock: PreTrainedModel, tokens: Sequence[int]) -> None:
    """One row on an empty sequence."""
    with sequences(engine, -1):
        _compare(engine, stock, "one row", Rows(-1, tokens[:1]), [])


def check_chains(engine: Engine, stock: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Prefill, chains, rollbacks and single tokens, each row against the stock model."""
    prompt, drafts = list(tokens[:PROMPT]), tokens[PROMPT:]
    with sequences(engine, -1):
        _compare(engine, stock, "prefill", Rows(-1, prompt, last_only=True), [])
        engine.commit(-1, range(PROMPT))
        _compare(engine, stock, "chain", Rows(-1, drafts[:1], DraftTree.chain(drafts[1:6])), prompt)
        engine.commit(-1, (0, 1, 2))
        kept = [*prompt, *drafts[:3]]
        engine.forward([Rows(-1, drafts[8:9], DraftTree.chain(drafts[9:14]))])  # never committed
        _compare(engine, stock, "chain after a rollback", Rows(-1, drafts[14:15], DraftTree.chain(drafts[15:18])), kept)
        engine.commit(-1, (0,))
        _compare(engine, stock, "single token", Rows(-1, drafts[18:19]), [*kept, drafts[14]])


def check_batch(engine: Engine, stock: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Two sequences of unequal lengths in one forward."""
    befores = [list(tokens[:PROMPT]), list(tokens[PROMPT : PROMPT + 3])]
    with sequences(engine, -1, -2):
        engine.forward([Rows(-1, befores[0]), Rows(-2, befores[1])])
        for seq, before in zip((-1, -2), befores, strict=True):
            engine.commit(seq, range(len(before)))
        batch = [Rows(-1, tokens[14:15], DraftTree.chain(tokens[15:17])), Rows(-2, tokens[17:18])]
        for rows, output, before in zip(batch, engine.forward(batch), befores, strict=True):
            _judge(stock, "batch", rows, output.logits, before)


def check_choices(engine: Engine, tokens: Sequence[int]) -> None:
    """What is chosen behind the rows of two sequences, greedy and drawn, is what the engine's own logits call for. Raises `GateError`."""
    with sequences(engine, -1, -2):
        for rows in (Rows(-1, tokens[:3], last_only=True, draw=DRAW), Rows(-2, tokens[3:8], last_only=True)):
            engine.forward([rows])
            engine.commit(rows.seq, range(rows.count))
        batch = [Rows(-1, tokens[8:9], DraftTree.chain(tokens[9:12]), draw=DRAW), Rows(-2, tokens[12:13], DraftTree.chain(tokens[13:15]))]
        outputs = engine.forward(batch)
        logits = torch.cat([output.logits for output in outputs]).cpu()
        expected = keyed_sample_reference(logits, *draws_of(batch, [3, 5])).tolist()
        actual = [token for output in outputs for token in output.choice]
    if actual != expected:
        raise GateError(f"choices: {actual} behind the rows, expected {expected}")


def check_long(engine: Engine, stock: PreTrainedModel, tokens: Sequence[int]) -> None:
    """A run of `LONG` rows on an empty sequence, a chain behind it; left out for models whose context is shorter."""
    context = getattr(stock.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(context, int) and context < 2 * LONG:
        return
    prompt = [*tokens, *reversed(tokens), *tokens][:LONG]
    with sequences(engine, -1, capacity=2 * LONG):
        for start in range(0, LONG, engine.max_rows):
            rows = Rows(-1, prompt[start : start + engine.max_rows])
            _compare(engine, stock, "long run", rows, prompt[:start])
            engine.commit(-1, range(rows.count))
        _compare(engine, stock, "chain behind a long run", Rows(-1, tokens[:1], DraftTree.chain(tokens[1:4])), prompt)


def check_states(engine: Engine, stock: PreTrainedModel, tokens: Sequence[int]) -> None:
    """A prompt in two pieces, tokens one by one, then chains of which all, some or none of the rows are committed."""
    kept, drafts = list(tokens[:PROMPT]), [*tokens[PROMPT:], *reversed(tokens), *tokens]
    with sequences(engine, -1):
        engine.forward([Rows(-1, kept[:4], last_only=True)])
        engine.commit(-1, range(4))
        _compare(engine, stock, "second piece of a prompt", Rows(-1, kept[4:], last_only=True), kept[:4])
        engine.commit(-1, range(PROMPT - 4))
        logits = []
        for token in drafts[:SINGLE]:  # models have other code for these
            logits.append(engine.forward([Rows(-1, [token])])[0].logits)
            engine.commit(-1, (0,))
        _judge(stock, "single tokens", Rows(-1, drafts[:SINGLE]), torch.cat(logits), kept)
        kept, drafts = [*kept, *drafts[:SINGLE]], drafts[SINGLE:]
        for rows, committed in STEPS:
            chain = Rows(-1, drafts[:1], DraftTree.chain(drafts[1:rows]))
            _compare(engine, stock, f"{rows} rows behind {len(kept)} tokens", chain, kept)
            engine.commit(-1, range(committed))
            kept, drafts = [*kept, *drafts[:committed]], drafts[max(committed, 1) :]


def check_trees(engine: Engine, stock: PreTrainedModel, tokens: Sequence[int]) -> None:
    """A tree, a committed path with gaps, a tree behind it, each row against the stock model."""
    prompt, pending, drafts = list(tokens[:PROMPT]), tokens[PROMPT], list(tokens[PROMPT + 1 :])
    first, second = (DraftTree(tuple(drafts[:8]), PARENTS[0], (1.0,) * 8), DraftTree(tuple(drafts[8:14]), PARENTS[1], (1.0,) * 6))
    with sequences(engine, -1):
        engine.forward([Rows(-1, prompt, last_only=True)])
        engine.commit(-1, range(PROMPT))
        _compare(engine, stock, "tree", Rows(-1, [pending], first), prompt)
        engine.commit(-1, PATH[:-1])
        path = [pending, *(first.tokens[row - 1] for row in PATH[1:-1])]
        rows = Rows(-1, [first.tokens[PATH[-1] - 1]], second)
        _compare(engine, stock, "tree after a path with gaps", rows, [*prompt, *path])


def check_drafts(engine: Engine, drafting: Drafting, tokens: Sequence[int], shrink_window: bool) -> None:
    """The drafts of an engine with a head in its graph: behind a prompt in two pieces, and behind trees of which a part was accepted,
    of a greedy sequence first, then as if it were sampled.

    The head in eager PyTorch scores the same trees over the same hidden states; it must find the same probabilities, and no better
    first token. Raises `GateError`.
    """
    head = copy.copy(drafting.head)
    if shrink_window and head.window is not None:
        head.window = min(head.window, PROBE_WINDOW)
    prompt, reference = list(tokens[:PROMPT]), MtpDrafter(head, drafting.shape)
    with sequences(engine, -1):
        first = engine.forward([Rows(-1, prompt[:4], last_only=True, following=prompt[4])])[0]
        engine.commit(-1, range(4))
        assert first.hidden is not None
        before = first.hidden.clone()
        output = engine.forward([Rows(-1, prompt[4:], last_only=True)])[0]
        engine.commit(-1, range(PROMPT - 4))
        assert output.hidden is not None
        reference.add(-1, prompt)
        reference.accept(-1, output.choice, torch.cat([before, output.hidden]))
        for step in range(4):
            pending, tree, draw = output.choice[-1], output.draft, None if step == 0 else DRAW
            if tree is None or len(tree) != drafting.shape.nodes:
                raise GateError(f"a draft of {drafting.shape.nodes} nodes was expected, got {tree}")
            _judge_draft(reference, tree, drafting.head.dtype)
            if step == 3:
                break
            if step == 1:  # one token for certain, whatever the head is worth
                tree = _with_right_token(engine, pending, tree, draw)
            output = engine.forward([Rows(-1, [pending], tree, draw=draw)])[0]
            rows = tree.walk(output.choice)
            engine.commit(-1, rows)
            assert output.hidden is not None
            reference.accept(-1, [output.choice[row] for row in rows], output.hidden[rows])
            output = replace(output, choice=[output.choice[rows[-1]]])


def _with_right_token(engine: Engine, pending: int, tree: DraftTree, draw: Draw | None) -> DraftTree:
    """`tree` behind which hangs, as one more branch where it isn't there, what the target will choose first (a forward finds out)."""
    right = engine.forward([Rows(-1, [pending], draw=draw)])[0].choice[0]
    if any(token == right and parent < 0 for token, parent in zip(tree.tokens, tree.parents, strict=True)):
        return tree
    return DraftTree((*tree.tokens, right), (*tree.parents, -1), (*tree.probs, 0.0))


def _judge_draft(reference: MtpDrafter, tree: DraftTree, dtype: torch.dtype) -> None:
    expected = reference.scores(-1, tree)
    actual = torch.tensor(tree.probs).log()
    tolerance = DRAFT_TOLERANCES.get(dtype, DRAFT_TOLERANCES[torch.bfloat16])
    worst = (actual - expected).abs().max().item()
    best = reference.scores(-1, DraftTree.chain(reference.propose([-1], [1])[0].tokens)).item()
    if not (worst <= tolerance and expected[0].item() >= best - tolerance):  # NaN fails too
        raise GateError(
            f"drafts: log-probabilities differ by {worst:.1e} from the eager head's, whose first token has {best:.3f} against "
            f"{expected[0].item():.3f}; above {tolerance:.0e}"
        )


def row_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """``[n]`` root mean square of the difference of rows ``[n, V]``, relative to the spread of `expected`; a row's constant is ignored."""
    difference = actual.double() - expected.double()
    return difference.std(-1, correction=0) / expected.double().std(-1, correction=0)


def _compare(engine: Engine, stock: PreTrainedModel, what: str, rows: Rows, before: list[int]) -> None:
    """Run `rows` behind the committed tokens `before` and compare each row with the stock model."""
    _judge(stock, what, rows, engine.forward([rows])[0].logits, before)


def _judge(stock: PreTrainedModel, what: str, rows: Rows, actual: torch.Tensor, before: list[int]) -> None:
    tree = rows.tree or DraftTree()
    parents = [*range(-1, len(rows.tokens) - 1), *(parent + len(rows.tokens) for parent in tree.parents)]
    tokens = [*rows.tokens, *tree.tokens]
    expected: dict[int, torch.Tensor] = {}
    for leaf in sorted(set(range(len(tokens))) - set(parents)):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        logits = _stock_logits(stock, [*before, *(tokens[row] for row in path)])[-len(path) :]
        expected.update(zip(path, logits, strict=True))
    reference = torch.stack([expected[row] for row in ([len(tokens) - 1] if rows.last_only else range(len(tokens)))])
    if actual.shape != reference.shape:
        raise GateError(f"{what}: logits of shape {list(actual.shape)}, expected {list(reference.shape)}")
    worst = row_error(actual, reference).max().item()
    tolerance = TOLERANCES.get(stock.dtype, TOLERANCES[torch.bfloat16])
    if stock.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        tolerance = FAST_MATMUL_TOLERANCE
    if not worst <= tolerance:  # NaN fails too
        raise GateError(f"{what}: logits differ from the stock model's by {worst:.1e} (relative), above {tolerance:.0e}")


@torch.no_grad()
def _stock_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """``[n, V]`` from one forward without a cache, as anyone would call it."""
    return model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False, return_dict=True).logits[0]


def random_tokens(model: PreTrainedModel, n: int) -> list[int]:
    """`n` different ids, the same each time, without those that the config gives a meaning (padding, images)."""
    config = model.config.get_text_config(decoder=True)
    special = {
        value for key, value in {**model.config.to_dict(), **config.to_dict()}.items() if key.endswith("_token_id") and type(value) is int
    }
    ids = torch.randint(config.vocab_size, (8 * n,), generator=torch.Generator().manual_seed(0)).tolist()
    return [token for token in dict.fromkeys(ids) if token not in special][:n]
