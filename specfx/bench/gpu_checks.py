"""The checks of `specfx.bench.gpu`: ops against their references, compiled code against them, replays, and whole outputs."""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from specfx import _compat
from specfx.bench import equal, random_models
from specfx.bench.calls import STOCK, Arm, end_tokens_of, start
from specfx.bench.generate import parse_arms
from specfx.bench.gpu import Row, Settings
from specfx.bench.paged_batches import Batch, Shape, make, uniform
from specfx.bench.prompts import Prompt
from specfx.engines import cuda_graphs
from specfx.engines.base import Rows
from specfx.engines.choose import Prepared
from specfx.engines.paged import graph_engine
from specfx.errors import Refusal
from specfx.kernels import cpu_build, inductor_attention, triton_kernels
from specfx.kernels.greedy_walk import greedy_walk, greedy_walk_reference
from specfx.kernels.keyed_sample import Draw, draw_tables, keyed_gumbel, keyed_sample, keyed_sample_reference, warped
from specfx.kernels.tree_attention import tree_attention_, tree_attention_reference, tree_positions, tree_positions_reference
from specfx.options import CommonOptions
from specfx.runtime.tree import DraftTree

TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.float16: (4e-3, 2e-3), torch.bfloat16: (3.2e-2, 8e-3)}
"""(relative, absolute): four roundings of the dtype; in float32, sums of thousands of terms in another order."""
ENGINE_TOLERANCE = 1e-3
"""Of float32 logits of a padded and an unpadded step, absolute: products of other shapes add in other orders."""
_TEXTS = (
    "The history of the steam engine begins with",
    "def fibonacci(n):\n    ",
    "List the numbers from one to thirty: one, two, three,",
    "Repeat after me: the quick brown fox jumps over the lazy dog. The quick brown fox",
)


def register(device: str) -> None:
    """Put the device's kernels behind the ops. Raises `LoweringError`."""
    if device == "cuda":
        triton_kernels.register()
    else:
        cpu_build.load()


# --- kernels --------------------------------------------------------------------------------------------------------------------


def attention_shapes(settings: Settings) -> list[Shape]:
    """The grid: all widths and dtypes, each with other heads, page sizes, windows, caps, sinks and mixes of sequences in turn."""
    mixes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((1000, 0, 65, 300), (8, 3, 64, 1)),
        ((5, 700), (200, 70)),
        ((8192,), (16,)),
        ((130,) * 9, (4,) * 9),
        ((0,), (1,)),
    ]
    heads, pages = [(8, 4), (3, 3), (2, 1), (1, 7), (2, 8)], [64, 16, 256, 128, 32]
    windows, softcaps = [0, 17, 0, 400], [0.0, 0.0, 20.0]
    widths = [(128, 128), (64, 64), (80, 80), (96, 96), (192, 128), (256, 256)]
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    if settings.quick:
        widths, dtypes, mixes = widths[:2], dtypes[::2], mixes[:3]
    if settings.device == "cpu":  # whose reference takes its time
        widths, mixes = [(64, 64), (24, 16)], [((70, 0, 33), (8, 3, 64)), ((5,), (70,))]
    choices: list[list[Any]] = [heads, pages, windows, softcaps, [False, False, False, True]]
    turns = zip(*[itertools.cycle(each) for each in choices], strict=True)
    shapes = []
    for (dk, dv), dtype, (lengths, rows) in itertools.product(widths, dtypes, mixes):
        (groups, share), page_size, window, softcap, sinks = next(turns)
        shapes.append(Shape(lengths, rows, groups, share, dk, dv, page_size, window, softcap, sinks, dtype))
    return shapes


def kernels(settings: Settings) -> Iterator[Row]:
    """Every op against its reference on the same device."""
    register(settings.device)
    device = torch.device(settings.device)
    for i, shape in enumerate(attention_shapes(settings)):
        batch = make(shape, device, seed=i, moves=i % 4)
        yield compare_attention(f"tree_attention_: {shape}", batch, tree_attention_)
        if i % 5 == 0:
            without = Batch(shape, batch.tensors | {"tree_mask": None}, batch.constants)
            yield compare_attention(f"tree_attention_, causal: {shape}", without, tree_attention_)
    yield from walks(settings, device)
    yield from samples(settings, device)


def compare_attention(what: str, batch: Batch, op: Callable[..., Tensor]) -> Row:
    """One call on copies of the pools: outputs within the tolerance, pools bit for bit. Free pages are NaN: none may leak."""
    theirs, ours = batch.with_own_pools(), batch.with_own_pools()
    expected, actual = theirs.run(tree_attention_reference), ours.run(op)
    relative, absolute = TOLERANCES[batch.shape.dtype]
    error = (actual.float() - expected.float()).abs()
    close = bool((error <= absolute + relative * expected.float().abs()).all())  # NaN is not
    same = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(ours.pools, theirs.pools, strict=True))
    return Row(what, close and same, {"largest error": error.max().item(), "pools equal": same})


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def walks(settings: Settings, device: torch.device) -> Iterator[Row]:
    """`tree_positions` and `greedy_walk` on random trees, prompts among them."""
    pick = random.Random(0)
    for i in range(4 if settings.quick else 20):
        sequences = pick.choice([1, 2, 8, 65])
        rows = tuple(pick.choice([1, 2, 9, 33, 64, 100]) for _ in range(sequences))
        lengths = tuple(pick.randrange(300) for _ in range(sequences))
        shape = Shape(lengths, rows, 1, 1, 16, 16, pick.choice([16, 64]), dtype=torch.float32)
        x = make(shape, device, seed=i).tensors
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, (1, sum(rows)), generator=generator).to(device)
        chosen = torch.randint(3, (sum(rows),), generator=generator).to(device)  # three tokens: every third child is right
        for masks, how in ((x["tree_mask"], "trees"), (None, "chains")):
            lengths_, starts = x["lengths"], x["row_starts"]
            same = torch.equal(tree_positions(masks, lengths_, starts, ids), tree_positions_reference(masks, lengths_, starts, ids))
            yield Row(f"tree_positions, {how}, {sequences} sequences, {sum(rows)} rows", same)
            arguments: Any = (ids, chosen, masks, x["page_table"], lengths_, starts, shape.page_size)
            pairs = zip(greedy_walk(*arguments), greedy_walk_reference(*arguments), strict=True)
            same = all(torch.equal(a, b) for a, b in pairs)
            yield Row(f"greedy_walk, {how}, {sequences} sequences, {sum(rows)} rows", same)


def samples(settings: Settings, device: torch.device) -> Iterator[Row]:
    """`keyed_sample`: the same tokens, but where two scores are equal within the rounding of two logarithms. Rows are greedy, drawn from
    all, and warped, in turn."""
    draws = [None, Draw(0, 0), Draw(0, 0, top_k=50), Draw(0, 0, 1.5, top_p=0.9), Draw(0, 0, min_p=0.02), Draw(0, 0, 0.8, 40, 0.95, 0.01)]
    for vocabulary, rows in itertools.product((6, 1000, 49152, 128256), (1, 16) if settings.quick else (1, 16, 200)):
        generator = torch.Generator().manual_seed(vocabulary + rows)
        logits = (torch.randn(rows, vocabulary, generator=generator) * 3).to(device)
        logits[:, vocabulary // 2] = float("-inf")
        keys = torch.randint(1 << 31, (rows, 3), generator=generator).to(device)
        keys[:, 0] += 1 << 61
        warp = draw_tables([draws[row % len(draws)] for row in range(rows)], [0] * rows)[1].to(device)
        actual, expected = keyed_sample(logits, keys, warp), keyed_sample_reference(logits, keys, warp)
        greedy = warp[:, :1] == 0
        scores = warped(logits, torch.where(greedy, warp.new_tensor([1, 0, 1, 0]), warp)) + keyed_gumbel(keys, vocabulary) * ~greedy
        gap = scores.gather(1, expected[:, None]) - scores.gather(1, actual[:, None])
        different = int((actual != expected).sum())
        yield Row(f"keyed_sample, {rows} rows of {vocabulary}", gap.max().item() < 1e-4, {"near ties": different, "gap": gap.max().item()})


# --- compiled -------------------------------------------------------------------------------------------------------------------


def compiled(settings: Settings) -> Iterator[Row]:
    """The op as Inductor lowers it against the reference: as a call, for all sizes, and tuned for fixed ones (there through a template,
    or the plain kernel if that measures faster)."""
    register(settings.device)
    inductor_attention.register()
    device = torch.device(settings.device)
    shapes = [uniform(b, c, r, dtype=dtype) for b, c, r in ((1, 1000, 16), (8, 300, 5)) for dtype in (torch.bfloat16, torch.float32)]
    shapes += [Shape((300, 20), (64, 3), 3, 3, 64, 64, 16, 50, 20.0, True, torch.float16), uniform(1, 50, 200)]
    for (i, shape), fixed in itertools.product(enumerate(shapes[:2] if settings.quick else shapes), (False, True)):
        batch = make(shape, device, seed=i, moves=i % 3)
        torch._dynamo.reset()
        call: Any = torch.compile(lambda **x: tree_attention_(**x) * 1.0, dynamic=not fixed, options={"max_autotune": fixed})
        codes: list[str] = []

        def kept(call: Any = call, codes: list[str] = codes, **arguments: Any) -> Tensor:
            out, found = _compat.run_and_get_code(call, **arguments)
            codes.extend(found)
            return out

        row = compare_attention(f"{'tuned' if fixed else 'all sizes'}: {shape}", batch, kept)
        took = [how for how, name in (("template", "triton_tem"), ("kernel", "specfx_tree_attend")) if any(name in c for c in codes)]
        yield Row(row.what, row.ok and bool(took or not fixed), {**row.figures, "through": ", ".join(took) or "a call"})


# --- replays --------------------------------------------------------------------------------------------------------------------


def replays(settings: Settings) -> Iterator[Row]:
    """Steps of a tiny Llama, ragged batches of trees that are partly accepted, replayed and launched directly, side by side."""
    register(settings.device)
    device = torch.device(settings.device)
    model = random_models.tiny_llama(device, torch.float32)
    prepared = Prepared(model, CommonOptions(engine="graph", compile="off", cuda_graphs=False))
    yield Row("a graph of the tiny Llama", prepared.module is not None, {"refusals": "; ".join(map(str, prepared.refusals)) or None})
    if prepared.module is None:
        return
    refusals: list[Refusal] = []
    ours, theirs = (graph_engine(prepared.module, "auto", device) for _ in range(2))
    cuda_graphs.replay(ours, refusals.append)
    pick = random.Random(0)
    seqs = range(5)
    for engine in (ours, theirs):
        for seq in seqs:
            engine.add(seq, 2000)
    batch = [Rows(seq, [pick.randrange(random_models.TINY_VOCABULARY) for _ in range(3 + 70 * seq)]) for seq in seqs]
    for step in range(10 if settings.quick else 40):
        worst, same = 0.0, True
        got = [(x.choice, x.logits.clone()) for x in ours.forward(batch)]
        for (choice, logits), expected in zip(got, theirs.forward(batch), strict=True):
            worst = max(worst, (logits - expected.logits).abs().max().item())
            same &= choice == expected.choice
        yield Row(f"step {step}: rows {[r.count for r in batch]}", worst <= ENGINE_TOLERANCE, {"largest error": worst, "same tokens": same})
        for rows in batch:
            kept = list(range(rows.count)) if rows.tree is None else _path(pick, rows.tree)
            ours.commit(rows.seq, kept)
            theirs.commit(rows.seq, kept)
        batch = [_tree_rows(pick, seq) for seq in pick.sample(seqs, pick.randint(1, len(seqs)))]
    refused = "; ".join(map(str, refusals)) or None
    yield Row("all sizes were recorded", not refusals if device.type == "cuda" else bool(refusals), {"refusals": refused})


def _tree_rows(pick: random.Random, seq: int) -> Rows:
    nodes = pick.choice([0, 1, 3, 7, 16, 40])
    tokens = tuple(pick.sample(range(random_models.TINY_VOCABULARY), nodes))
    tree = DraftTree(tokens, tuple(pick.randrange(-1, i) for i in range(nodes)), (1.0,) * nodes)
    return Rows(seq, [pick.randrange(random_models.TINY_VOCABULARY)], tree)


def _path(pick: random.Random, tree: DraftTree) -> list[int]:
    path = [0]
    while (children := [i + 1 for i, parent in enumerate(tree.parents) if parent + 1 == path[-1]]) and pick.random() < 0.8:
        path.append(pick.choice(children))
    return path


# --- whole outputs --------------------------------------------------------------------------------------------------------------


ENGINES = (("graph", False), ("compiled", False), ("compiled", True), ("eager", False))
"""Engine, and whether each size of its replayed steps is tuned."""


def equality(settings: Settings) -> Iterator[Row]:
    """Greedy float32 outputs of every engine and method, batches of 1 and 4 (tuned steps: one method, batches of 1), against stock
    `generate`; near ties are judged as `specfx bench equal` does."""
    import specfx
    from specfx.api import engine_of
    from specfx.drafters.mtp_head import MtpHead, save_head

    device = torch.device(settings.device)
    model, prompts = _model_and_prompts(settings, device)
    new_tokens = 24 if settings.quick or device.type == "cpu" else 128
    end_tokens = end_tokens_of(model)
    stock = {size: equal.outputs_of(model, Arm(STOCK), prompts, size, new_tokens, 0, end_tokens) for size in (1, 4)}
    with tempfile.TemporaryDirectory() as folder:
        head = settings.head or str(save_head(MtpHead.from_target(model), folder))
        for engine, tuned in (("graph", False),) if device.type == "cpu" else ENGINES:
            mode, methods = (
                "sync" if engine == "compiled" else "off",
                "mtp:min_token_prob=0" if tuned else "none,suffix,mtp:min_token_prob=0",
            )
            for arm in parse_arms(methods, head=head, engine=engine, compile=mode, max_autotune=tuned)[1:]:
                start(model, arm)
                for size in (1,) if tuned else (1, 4):
                    outputs = equal.outputs_of(model, arm, prompts, size, new_tokens, 0, end_tokens)
                    explanation, served = specfx.explain(model), engine_of(model)
                    error_of = functools.partial(equal.measured_error, model, served)
                    how: dict[str, Any] = {"method": arm.name, "engine": engine, "batch_size": size, "dtype": "float32"}
                    how |= {"logits_of": functools.partial(equal.stock_logits, model), "error_of": error_of}
                    found = [equal.analyse(*triple, **how) for triple in zip(prompts, stock[size], outputs, strict=True)]
                    differences = [d for d in found if d is not None]
                    refused = [r for r in explanation.refusals if device.type == "cuda" and engine != "eager"]
                    right = explanation.engine == engine and not explanation.stock_calls and all(d.explained for d in differences)
                    figures = {
                        "identical": f"{len(prompts) - len(differences)}/{len(prompts)}",
                        "served by": explanation.engine,
                        "tokens a forward": specfx.stats(model).tokens_per_forward,
                        "differences": "; ".join(map(str, differences)) or None,
                        "refusals": "; ".join(map(str, refused)) or None,
                    }
                    yield Row(f"{engine}{', tuned' if tuned else ''}, {arm.name}, batch {size}", right and not refused, figures)


def _model_and_prompts(settings: Settings, device: torch.device) -> tuple[Any, list[Prompt]]:
    if settings.model is None:
        pick = random.Random(1)
        tokens: Sequence[Sequence[int]] = [[pick.randrange(random_models.TINY_VOCABULARY) for _ in range(n)] for n in (5, 90, 1, 33)]
        model = random_models.tiny_llama(device, torch.float32)
    else:
        from specfx import models

        model, tokenizer = models.load(settings.model, torch.float32)
        model, tokens = model.to(device), [tokenizer(text).input_ids for text in _TEXTS]
    return model, [Prompt(i, "all", tuple(t)) for i, t in enumerate(tokens)]
