"""The ops: their registrations, the references against dense formulations, and the C++ kernels against the references."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specfx.kernels import cpu_build
from specfx.kernels.attention import attention, attention_reference
from specfx.kernels.greedy_walk import greedy_walk
from specfx.kernels.keyed_sample import keyed_sample
from specfx.kernels.library import REFERENCES
from specfx.kernels.materialize import materialize
from specfx.kernels.packed_linear import can_pack, pack, packed_linear, packed_linear_reference, unpack
from specfx.kernels.tree_attention import (
    tree_append_,
    tree_attention_,
    tree_attention_reference,
    tree_parents,
    tree_parents_reference,
    tree_positions,
    tree_positions_reference,
)

PROPERTY = settings(max_examples=60, deadline=None)
NAN = float("nan")


@pytest.fixture(scope="module")
def packs(kernels: cpu_build.CpuKernels) -> None:
    if not kernels.packs:
        pytest.skip("this CPU has no kernel for packed linears")


# --- a ragged batch over paged KV -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """heads, groups: of queries and of keys. dk, dv: widths of keys and values."""

    groups: int = 1
    share: int = 1
    dk: int = 8
    dv: int = 8
    page_size: int = 4
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = torch.float64
    skip: int = 0

    @property
    def heads(self) -> int:
        return self.groups * self.share


@dataclass
class Batch:
    """Inputs of one call. past: keys and values of the committed tokens, by sequence. slots: where each sequence's tokens lie, committed
    ones first. parents: of each row, by sequence; None is a causal run."""

    shape: Shape
    parents: list[list[int]]
    past: list[tuple[Tensor, Tensor]]
    slots: list[list[int]]
    arguments: dict[str, Tensor | None]
    constants: dict[str, float | int | Tensor | None]

    def run(self, op: object) -> tuple[Tensor, Tensor, Tensor]:
        """(output, key pages, value pages) of a call on copies of the pools."""
        pools = {name: self.arguments[name].clone() for name in ("k_pages", "v_pages")}
        out = op(**{**self.arguments, **pools}, **self.constants)
        return out, pools["k_pages"], pools["v_pages"]

    @property
    def rows(self) -> list[slice]:
        starts = self.arguments["row_starts"].tolist()
        return [slice(a, b) for a, b in itertools.pairwise(starts)]


def causal_run(rows: int) -> list[int]:
    return list(range(-1, rows - 1))


def path_to(parents: Sequence[int], row: int) -> list[int]:
    """`row` and its ancestors, followed one by one."""
    path = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path


def mask_words(parents: Sequence[int]) -> list[int]:
    words = [sum(1 << r for r in path_to(parents, row)) for row in range(len(parents))]
    return [word - (1 << 64) if word >> 63 else word for word in words]


def make_batch(
    shape: Shape, lengths: Sequence[int], parents: Sequence[Sequence[int]], seed: int, mask: bool = True, spare_pages: int = 2
) -> Batch:
    """Random tensors; pages in random order; every slot that holds no committed token is NaN, and rows of the page table are padded
    with a page of NaN. Sequences of more than 64 rows get garbage as their mask."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(shape.dtype)

    size, counts = shape.page_size, [len(p) for p in parents]
    needs = [-(-(length + count) // size) for length, count in zip(lengths, counts, strict=True)]
    pages = sum(needs) + spare_pages
    order = torch.randperm(pages, generator=generator).tolist()
    k_pages = torch.full((pages, size, shape.groups, shape.dk), NAN, dtype=shape.dtype)
    v_pages = torch.full((pages, size, shape.groups, shape.dv), NAN, dtype=shape.dtype)
    table, past, slots = [], [], []
    for length, count, need in zip(lengths, counts, needs, strict=True):
        own = [order.pop() for _ in range(need)]
        table.append(own)
        slots.append([own[i // size] * size + i % size for i in range(length + count)])
        past.append((random(length, shape.groups, shape.dk), random(length, shape.groups, shape.dv)))
        k_pages.flatten(0, 1)[slots[-1][:length]] = past[-1][0]
        v_pages.flatten(0, 1)[slots[-1][:length]] = past[-1][1]
    width, poison = max(needs), order[0] if order else 0
    total = sum(counts)
    starts = [sum(counts[:s]) for s in range(len(counts) + 1)]
    words = [w for p in parents for w in (mask_words(p) if len(p) <= 64 else [0x5A5A5A5A] * len(p))]
    arguments: dict[str, Tensor | None] = {
        "q": random(total, shape.heads, shape.dk),
        "k": random(total, shape.groups, shape.dk),
        "v": random(total, shape.groups, shape.dv),
        "tree_mask": torch.tensor(words) if mask else None,
        "page_table": torch.tensor([own + [poison] * (width - len(own)) for own in table], dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "row_starts": torch.tensor(starts, dtype=torch.int32),
        "moves": torch.tensor([[-1], [-1]]),
        "k_pages": k_pages,
        "v_pages": v_pages,
    }
    sinks = random(shape.heads) if shape.sinks else None
    constants = {"scale": 0.7 * shape.dk**-0.5, "window": shape.window, "softcap": shape.softcap, "sinks": sinks, "skip": shape.skip}
    return Batch(shape, [list(p) for p in parents], past, slots, arguments, constants)


def dense_attention(batch: Batch) -> Tensor:
    """The op's output without pages, bit masks or groups: repeated heads and one dense mask of standing positions a sequence."""
    shape, sinks = batch.shape, batch.constants["sinks"]
    outputs = []
    for (past_k, past_v), parents, here in zip(batch.past, batch.parents, batch.rows, strict=True):
        length, rows = past_k.shape[0], len(parents)
        keys = torch.cat([past_k, batch.arguments["k"][here]]).repeat_interleave(shape.share, 1).transpose(0, 1)
        values = torch.cat([past_v, batch.arguments["v"][here]]).repeat_interleave(shape.share, 1).transpose(0, 1)
        queries = batch.arguments["q"][here].transpose(0, 1)
        stands = list(range(length)) + [length + len(path_to(parents, row)) - 1 for row in range(rows)]
        mask = torch.zeros(rows, length + rows, dtype=torch.bool)
        for row in range(rows):
            for j in [*range(length), *(length + r for r in path_to(parents, row))]:
                near = not shape.window or stands[j] > stands[length + row] - shape.window
                mask[row, j] = near and not stands[j] < shape.skip <= stands[length + row]
        scale = batch.constants["scale"]
        if shape.softcap or sinks is not None:
            logits = torch.einsum("htd,hld->htl", queries, keys) * scale
            if shape.softcap:
                logits = torch.tanh(logits / shape.softcap) * shape.softcap
            weights = torch.exp(logits) * mask
            extra = torch.exp(sinks)[:, None, None] if sinks is not None else 0.0
            out = torch.einsum("htl,hld->htd", weights / (weights.sum(-1, keepdim=True) + extra), values)
        else:
            out = F.scaled_dot_product_attention(queries[None], keys[None], values[None], mask[None, None], scale=scale)[0]
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_pools_hold_the_new_rows_and_nothing_else(batch: Batch, k_pages: Tensor, v_pages: Tensor) -> None:
    for name, after in (("k", k_pages), ("v", v_pages)):
        expected = batch.arguments[f"{name}_pages"].clone()
        for (past, _), slots, here in zip(batch.past, batch.slots, batch.rows, strict=True):
            expected.flatten(0, 1)[slots[past.shape[0] :]] = batch.arguments[name][here]
        assert torch.equal(bits(after), bits(expected))


# --- the references -------------------------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn, tiles: bool = False) -> Batch:
    """tiles: of widths and page sizes that the CPU's tile unit takes."""
    shape = Shape(
        groups=draw(st.integers(1, 3)),
        share=draw(st.sampled_from([1, 3, 4, 7, 8])),
        dk=draw(st.sampled_from([32, 64, 96] if tiles else [1, 4, 6])),
        dv=draw(st.sampled_from([16, 64, 80] if tiles else [1, 4, 5])),
        page_size=draw(st.sampled_from([16, 48] if tiles else [1, 2, 5, 16])),
        window=draw(st.sampled_from([0, 0, 1, 2, 5, 30])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        sinks=draw(st.booleans()),
        skip=draw(st.sampled_from([0, 0, 1, 2, 7])),
    )
    sequences = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 70 if tiles else 20), min_size=sequences, max_size=sequences))
    mask = draw(st.booleans())
    parents = []
    for _ in range(sequences):
        if mask and draw(st.booleans()):
            count = draw(st.integers(0, 14))
            parents.append([-1] + [draw(st.integers(0, row)) for row in range(count)])
        else:
            parents.append(causal_run(draw(st.sampled_from([1, 2, 9, 66]))))
    return make_batch(shape, lengths, parents, draw(st.integers(0, 1000)), mask, draw(st.integers(0, 3)))


@PROPERTY
@given(batch=batches())
def test_tree_attention_reference_is_attention_under_a_dense_mask(batch: Batch) -> None:
    out, k_pages, v_pages = batch.run(tree_attention_reference)
    torch.testing.assert_close(out, dense_attention(batch), rtol=1e-9, atol=1e-9)
    assert_pools_hold_the_new_rows_and_nothing_else(batch, k_pages, v_pages)


@PROPERTY
@given(batch=batches())
def test_rows_stand_at_their_depth_behind_the_committed_tokens(kernels: cpu_build.CpuKernels, batch: Batch) -> None:
    ids = torch.zeros(1, batch.rows[-1].stop, dtype=torch.int64)
    arguments = (batch.arguments["tree_mask"], batch.arguments["lengths"], batch.arguments["row_starts"], ids)
    expected = [
        past.shape[0] + len(path_to(parents, row)) - 1
        for (past, _), parents in zip(batch.past, batch.parents, strict=True)
        for row in range(len(parents))
    ]
    assert tree_positions_reference(*arguments).tolist() == [expected]
    assert tree_positions(*arguments).tolist() == [expected]


@PROPERTY
@given(batch=batches())
def test_rows_hang_on_their_parents_and_first_rows_on_what_was_committed_last(batch: Batch) -> None:
    ids = torch.zeros(1, batch.rows[-1].stop, dtype=torch.int64)
    arguments = (batch.arguments["tree_mask"], batch.arguments["row_starts"], ids)
    expected = [
        s if parent < 0 else len(batch.parents) + here.start + parent
        for s, (parents, here) in enumerate(zip(batch.parents, batch.rows, strict=True))
        for parent in parents
    ]
    assert tree_parents_reference(*arguments).tolist() == expected


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("share", [1, 7])
def test_the_marker_is_causal_attention(share: int, window: int) -> None:
    q, k, v = (torch.randn(2, h, 9, d, dtype=torch.float64) for h, d in ((2 * share, 6), (2, 6), (2, 5)))
    i = torch.arange(9)
    mask = (i[None] <= i[:, None]) & ((i[None] > i[:, None] - window) if window else True)
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), mask, scale=0.3)
    torch.testing.assert_close(attention_reference(q, k, v, 0.3, window), expected.transpose(1, 2))


def test_the_marker_takes_softcap_and_sinks_as_tree_attention_does() -> None:
    batch = make_batch(Shape(2, 4, softcap=1.5, sinks=True, window=4), [0], [causal_run(11)], 0)
    q, k, v = (batch.arguments[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
    constants = {name: value for name, value in batch.constants.items() if name != "skip"}
    out = attention_reference(q, k, v, **constants)
    torch.testing.assert_close(out[0], dense_attention(batch))


# --- registrations --------------------------------------------------------------------------------------------------------------


def opcheck_cases() -> dict[torch._ops.OpOverload, list[tuple[object, ...]]]:
    """Arguments to check each op with."""
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 4)
    cases: dict[torch._ops.OpOverload, list[tuple[object, ...]]] = {op: [] for op in REFERENCES}
    cases[attention] = [(q, k, v, 0.3), (q, k, v, 0.3, 3, 2.0, torch.randn(6))]
    tree = [-1, 0, 0, 1, 2, 4]
    for shape, mask in ((Shape(2, 3, 8, 4), True), (Shape(1, 4, window=3, softcap=2.0, sinks=True, skip=2), False)):
        shape = dataclasses.replace(shape, dtype=torch.float32)
        batch = make_batch(shape, [5, 0], [tree if mask else causal_run(6), causal_run(4)], 0, mask)
        for name in ("k_pages", "v_pages"):  # what opcheck compares must be equal to itself
            batch.arguments[name].nan_to_num_()
        words, table, lengths, starts = (batch.arguments[name] for name in ("tree_mask", "page_table", "lengths", "row_starts"))
        ids, chosen = torch.arange(10)[None] % 3, torch.arange(1, 11) % 3
        cases[tree_attention_].append((*batch.arguments.values(), *batch.constants.values()))
        cases[tree_append_].append(tuple(x for name, x in batch.arguments.items() if name not in ("q", "tree_mask")))
        cases[tree_positions].append((words, lengths, starts, ids))
        cases[greedy_walk].append((ids, chosen, words, table, lengths, starts, shape.page_size))
        cases[tree_parents].append((words, starts, ids))
    weight, x = pack(torch.randn(70, 64).bfloat16()), torch.randn(2, 3, 64).bfloat16()
    cases[packed_linear] = [(x, weight, None, 70), (x, weight, torch.randn(70).bfloat16(), 70)]
    warp = torch.tensor([[0.0, 0, 1, 0], [1, 0, 1, 0], [0.7, 5, 0.9, 0.1]], dtype=torch.float64)
    cases[keyed_sample] = [(torch.randn(3, 10, dtype=dtype), torch.arange(9).view(3, 3), warp) for dtype in (torch.float32, torch.bfloat16)]
    cases[materialize] = [(x,), (x.transpose(0, 1),)]
    return cases


def opcheck_all() -> None:
    """All of opcheck's tests apply: schema (mutation, aliasing), autograd registration, fake tensors, AOT dispatch with dynamic sizes."""
    for op, cases in opcheck_cases().items():
        assert cases, f"{op} is not checked"
        for case in cases:
            torch.library.opcheck(op, case)


def test_every_op_passes_opcheck(kernels: cpu_build.CpuKernels) -> None:
    names = {name.rpartition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("specfx::")}
    assert names == {op._schema.name.rpartition("::")[2] for op in REFERENCES}
    opcheck_all()


# --- the C++ kernels ------------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 4e-3)}
"""rtol (two roundings of the dtype), atol."""
TREE = [-1, 0, 0, 1, 1, 2, 2, 3]


def tree_of(rows: int, seed: int = 0) -> list[int]:
    """A random tree with a deep path; row 63, if any, is on it (the sign bit of a mask word)."""
    generator = torch.Generator().manual_seed(seed)
    return [-1] + [row - 1 if row % 3 else int(torch.randint(row, (1,), generator=generator)) for row in range(1, rows)]


def assert_kernel_agrees(batch: Batch) -> None:
    expected, *expected_pools = batch.run(tree_attention_reference)
    out, *pools = batch.run(tree_attention_)
    rtol, atol = TOLERANCE[batch.shape.dtype]
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    for ours, theirs in zip(pools, expected_pools, strict=True):
        assert torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("widths", [(8, 8), (64, 64), (80, 80), (96, 96), (192, 128)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 64, 65, 130])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("kernels")
def test_tree_attention_kernel_agrees_with_the_reference(dtype: torch.dtype, rows: int, widths: tuple[int, int]) -> None:
    for share, window, softcap, sinks in ((1, 0, 0.0, False), (3, 5, 0.0, True), (7, 40, 1.5, False)):
        shape = Shape(2, share, *widths, 16, window, softcap, sinks, dtype)
        parents = tree_of(rows) if rows <= 64 else causal_run(rows)
        assert_kernel_agrees(make_batch(shape, [70, 0, 700], [parents, TREE, TREE], rows))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("share", [1, 4, 8])
@pytest.mark.usefixtures("kernels")
def test_without_a_mask_the_kernel_takes_causal_runs(share: int, dtype: torch.dtype) -> None:
    runs = [causal_run(n) for n in (1, 7, 64, 130)]
    for window in (0, 9):
        assert_kernel_agrees(make_batch(Shape(2, share, 16, 8, 5, window, dtype=dtype), [0, 200, 3, 1], runs, share, mask=False))


def narrowed(batch: Batch, dtype: torch.dtype) -> Batch:
    narrow = lambda values: {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in values.items()}  # noqa: E731
    shape = dataclasses.replace(batch.shape, dtype=dtype)
    return dataclasses.replace(batch, shape=shape, arguments=narrow(batch.arguments), constants=narrow(batch.constants))


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_kernel_agrees_on_random_batches(kernels: cpu_build.CpuKernels, batch: Batch) -> None:
    assert_kernel_agrees(narrowed(batch, torch.float32))


@settings(max_examples=80, deadline=None)
@given(batch=batches(tiles=True))
def test_kernel_agrees_on_random_batches_for_tiles(kernels: cpu_build.CpuKernels, batch: Batch) -> None:
    assert_kernel_agrees(narrowed(batch, torch.bfloat16))


@pytest.mark.usefixtures("kernels")
def test_large_logits_and_hidden_rows_make_no_nan() -> None:
    """Scores far apart, infinitely hidden rows and sinks that outweigh everything stay finite."""
    for factor in (1e-3, 1.0, 300.0):
        batch = make_batch(Shape(1, 4, 16, 16, 4, 3, 0.0, True, torch.float32), [9], [TREE], 1)
        batch.arguments["q"].mul_(factor)
        assert_kernel_agrees(batch)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [4, 5])
def test_a_value_that_is_infinite_is_so_alone(length: int, dtype: torch.dtype) -> None:
    """Also behind the last key, where products in pairs have no second one."""
    batch = make_batch(Shape(1, 2, 32, 32, dtype=dtype), [length], [[-1]], 2)
    batch.arguments["v"][-1, :, 0] = torch.inf
    out, *_ = batch.run(tree_attention_)
    expected, *_ = batch.run(tree_attention_reference)
    assert expected.isinf().any()
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def _moved(batch: Batch, moves: list[tuple[int, int]]) -> Batch:
    batch.arguments["moves"] = torch.tensor(moves).t().contiguous()
    return batch


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("op", [tree_attention_reference, tree_attention_], ids=["reference", "kernel"])
def test_moves_are_done_in_order_before_all_else(op: object, dtype: torch.dtype, kernels: cpu_build.CpuKernels) -> None:
    """Slots are followed in a list, move by move: paths that close up, chains of moves, a slot written twice, empty moves between."""
    batch = make_batch(Shape(2, 3, dtype=dtype), [12, 7], [TREE, causal_run(3)], 3)
    a, b = batch.slots
    for moves in (
        [(a[3], a[2]), (a[4], a[3]), (a[6], a[4]), (a[9], a[5])],  # an accepted path: each target was a source before
        [(-1, -1), (a[0], a[1]), (a[1], a[2]), (-1, -1), (b[6], b[0]), (a[2], a[3])],  # a chain: the first value goes all the way
        [(a[5], a[1]), (a[7], a[1]), (a[1], b[2])],
        [(a[4], a[4])],
    ):
        order = list(range(batch.arguments["k_pages"].flatten(0, 1).shape[0]))
        for source, target in moves:
            if source >= 0:
                order[target] = order[source]
        expected = {name: batch.arguments[name].flatten(0, 1)[order].view_as(batch.arguments[name]) for name in ("k_pages", "v_pages")}
        before = dataclasses.replace(batch, arguments={**batch.arguments, **expected, "moves": torch.tensor([[-1], [-1]])})
        out, k_pages, v_pages = _moved(batch, moves).run(op)
        plain, *pools = before.run(op)
        assert torch.equal(out, plain)
        assert torch.equal(bits(k_pages), bits(pools[0]))
        assert torch.equal(bits(v_pages), bits(pools[1]))


@pytest.mark.parametrize("op", [tree_attention_reference, tree_attention_], ids=["reference", "kernel"])
def test_a_whole_page_moved_at_once_keeps_every_slot(op: object, kernels: cpu_build.CpuKernels) -> None:
    batch = make_batch(Shape(2, 2, page_size=16, dtype=torch.float32), [40], [causal_run(5)], 3)
    slots = batch.slots[0]
    _, k_pages, _ = _moved(batch, [(slots[i + 1], slots[i]) for i in range(39)]).run(op)
    assert torch.equal(k_pages.flatten(0, 1)[slots[:39]], batch.past[0][0][1:])


@pytest.mark.usefixtures("kernels")
def test_the_kernel_reads_and_writes_strided_rows() -> None:
    """Rows may be views of one fused projection."""
    batch = make_batch(Shape(2, 2, dtype=torch.float32), [9], [TREE], 5)
    expected, *_ = batch.run(tree_attention_)
    fused = torch.cat([batch.arguments[name].flatten(1) for name in ("q", "k", "v")], 1)
    q, k, v = (part.unflatten(1, (-1, 8)) for part in fused.split([32, 16, 16], 1))
    assert not q.is_contiguous()
    batch.arguments |= {"q": q, "k": k, "v": v}
    assert torch.equal(batch.run(tree_attention_)[0], expected)


def _transposed(pages: Tensor) -> Tensor:
    return pages.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("op", [tree_attention_reference, tree_attention_], ids=["reference", "kernel"])
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("q", Tensor.bfloat16),
        ("k", Tensor.bfloat16),
        ("v", Tensor.double),
        ("k_pages", Tensor.bfloat16),
        ("v_pages", Tensor.bfloat16),
        ("k_pages", _transposed),
        ("v_pages", _transposed),
        ("k", lambda k: k[..., :-1]),
        ("v", lambda v: v.repeat(1, 2, 1)),
        ("tree_mask", Tensor.int),
        ("lengths", Tensor.long),
        ("page_table", Tensor.long),
        ("row_starts", Tensor.long),
        ("page_table", lambda t: t.repeat_interleave(2, 1)[:, ::2]),
        ("tree_mask", lambda m: m.repeat_interleave(2)[::2]),
    ],
)
def test_wrong_dtypes_and_layouts_raise(op: object, name: str, spoil: object, kernels: cpu_build.CpuKernels) -> None:
    """What would be misread in memory is refused. The reference is looser about what it can read rightly."""
    batch = make_batch(Shape(2, 2, dtype=torch.float32), [9, 3], [TREE, causal_run(2)], 5)
    expected = batch.run(op)
    arguments = {**batch.arguments, name: spoil(batch.arguments[name])}
    if op is tree_attention_reference and name in ("q", "tree_mask", "lengths", "page_table", "row_starts"):
        out = tree_attention_reference(**arguments, **batch.constants)
        torch.testing.assert_close(out.float(), expected[0], rtol=2e-2, atol=2e-2)
        return
    before = bits(arguments["k_pages"]).clone()
    with pytest.raises((RuntimeError, IndexError)):
        op(**arguments, **batch.constants)
    if op is tree_attention_:
        assert torch.equal(bits(arguments["k_pages"]), before), "refused after the pool was written"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("q", lambda q: q.repeat(1, 1, 2), "queries .* don't fit"),
        ("q", lambda q: q[:, :3], "queries .* don't fit"),
        ("v_pages", lambda v: v[:-1], "queries .* don't fit"),
        ("v_pages", lambda v: v[:, :-1].contiguous(), "queries .* don't fit"),
        ("q", lambda q: q[:-1], "has 10 rows, there are 9 queries"),
        ("k", lambda k: k[:-1], "has 10 rows, .* 9 keys"),
        ("v", lambda v: v[:-1], "has 10 rows, .* 9 keys"),
        ("tree_mask", lambda mask: mask[:-1], "has 10 rows, .* and 9 words of the mask"),
        ("page_table", lambda table: table[:, :1].contiguous(), "sequence 0 has 17 tokens, the page table room for 4"),
        ("page_table", lambda table: table[:1], "2 sequences"),
        ("lengths", lambda lengths: lengths[:1], "1 sequences"),
    ],
)
def test_shapes_that_would_be_read_beyond_their_end_are_refused(name: str, spoil: Callable[[Tensor], Tensor], message: str) -> None:
    batch = make_batch(Shape(2, 2, dtype=torch.float32), [9, 3], [TREE, causal_run(2)], 5)
    batch.run(tree_attention_)
    before = bits(batch.arguments["k_pages"]).clone()
    with pytest.raises(RuntimeError, match=message):
        tree_attention_(**batch.arguments | {name: spoil(batch.arguments[name])}, **batch.constants)
    assert torch.equal(bits(batch.arguments["k_pages"]), before), "refused after the pool was written"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mask", [True, False])
def test_kernels_of_positions_and_parents_agree_with_the_references(mask: bool) -> None:
    parents = [tree_of(64), causal_run(70), TREE] if mask else [causal_run(n) for n in (64, 70, 1)]
    batch = make_batch(Shape(), [5, 0, 1000], parents, 0, mask)
    ids = torch.zeros(1, batch.rows[-1].stop, dtype=torch.int64)
    arguments = (batch.arguments["tree_mask"], batch.arguments["lengths"], batch.arguments["row_starts"], ids)
    assert torch.equal(tree_positions(*arguments), tree_positions_reference(*arguments))
    mask_words, _, *rest = arguments
    assert torch.equal(tree_parents(mask_words, *rest), tree_parents_reference(mask_words, *rest))


def test_several_threads_give_what_one_gives(kernels: cpu_build.CpuKernels) -> None:
    shapes = (Shape(3, 4, 16, 16, dtype=torch.float32), Shape(3, 4, 64, 64, 16, dtype=torch.bfloat16))
    batches = [make_batch(shape, [700, 30, 0], [tree_of(4), causal_run(65), TREE], 5) for shape in shapes]
    x, weight = torch.randn(40, 64).bfloat16(), pack(torch.randn(200, 64).bfloat16())
    ones = [batch.run(tree_attention_)[0] for batch in batches]
    linear = packed_linear(x, weight, None, 200) if kernels.packs else None
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for batch, one in zip(batches, ones, strict=True):
            assert torch.equal(batch.run(tree_attention_)[0], one)
    torch.set_num_threads(2)
    if linear is not None:
        assert torch.equal(packed_linear(x, weight, None, 200), linear)


@pytest.mark.parametrize("window", [0, 150])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("kernels")
def test_a_rows_attention_depends_on_nothing_else_in_the_forward(dtype: torch.dtype, window: int) -> None:
    """Bit for bit: so a draft that is accepted changes no later token, nor does a batch."""
    batch = make_batch(Shape(2, 3, 64, 64, 16, window, dtype=dtype), [300, 511, 40], [causal_run(n) for n in (5, 30, 1)], 3)
    together = batch.run(tree_attention_)[0]
    starts = batch.arguments["row_starts"].tolist()
    for sequence, first in enumerate(starts[:-1]):
        for rows in {1, starts[sequence + 1] - first}:
            alone = dataclasses.replace(batch, arguments=dict(batch.arguments))
            for name in ("q", "k", "v", "tree_mask"):
                alone.arguments[name] = batch.arguments[name][first : first + rows]
            for name in ("page_table", "lengths"):
                alone.arguments[name] = batch.arguments[name][sequence : sequence + 1]
            alone.arguments["row_starts"] = torch.tensor([0, rows], dtype=torch.int32)
            assert torch.equal(alone.run(tree_attention_)[0], together[first : first + rows])


# --- packed linear --------------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 100), blocks=st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_unpack_is_the_inverse_of_pack(n: int, blocks: int) -> None:
    weight = torch.randn(n, blocks * 32).bfloat16()
    packed = pack(weight)
    assert packed.shape == (-(-n // 32), blocks, 16, 32, 2)
    assert torch.equal(unpack(packed, n), weight)
    assert not unpack(packed, packed.shape[0] * 32)[n:].any()


def test_what_can_be_packed() -> None:
    assert can_pack(torch.empty(5, 64, dtype=torch.bfloat16))
    assert not can_pack(torch.empty(5, 64))
    assert not can_pack(torch.empty(5, 48, dtype=torch.bfloat16))
    assert not can_pack(torch.empty(2, 5, 64, dtype=torch.bfloat16))
    assert not can_pack(torch.empty(5, 64, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (31, 64), (32, 32), (33, 96), (70, 128), (576, 1536)])
@pytest.mark.usefixtures("packs")
def test_packed_linear_kernel_agrees_with_the_reference(n: int, k: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k, generator=generator).bfloat16()
    bias = torch.randn(n, generator=generator).bfloat16() if biased else None
    packed = pack(weight)
    for rows in (*range(1, 18), 25, 31, 32, 33, 40, 48, 49, 64, 70, 100, 400):
        x = torch.randn(rows, k, generator=generator).bfloat16()
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        out = packed_linear(x, packed, bias, n)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-4 * k**0.5)
        torch.testing.assert_close(packed_linear_reference(x, packed, bias, n).double(), exact, rtol=2**-7, atol=1e-2)


@pytest.mark.usefixtures("packs")
def test_packed_linear_takes_inputs_of_any_rank_and_layout() -> None:
    weight = torch.randn(40, 64).bfloat16()
    packed = pack(weight)
    x = torch.randn(3, 5, 128).bfloat16()[..., ::2]
    out = packed_linear(x, packed, None, 40)
    assert out.shape == (3, 5, 40)
    assert torch.equal(out.flatten(0, 1), packed_linear(x.reshape(15, 64), packed, None, 40))
    assert torch.equal(packed_linear(x[0, 0], packed, None, 40), out[0, 0])
    assert packed_linear(x[:0], packed, None, 40).shape == (0, 5, 40)


@pytest.mark.usefixtures("packs")
def test_packed_linear_refuses_what_it_would_misread() -> None:
    packed, x = pack(torch.randn(40, 64).bfloat16()), torch.randn(2, 64).bfloat16()
    for arguments in (
        (x.float(), packed, None, 40),
        (x, packed, torch.zeros(39), 40),
        (x[:, :32], packed, None, 40),
        (x, packed.half(), None, 40),
        (x, packed, None, 65),
        (x, packed, None, 32),
        (x, packed.transpose(-1, -2), None, 40),
    ):
        with pytest.raises(RuntimeError):
            packed_linear(*arguments)


# --- building -------------------------------------------------------------------------------------------------------------------


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter that can import this module."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


WITHOUT_COMPILER = """
import os, torch
from specfx.cache import cache_dir
from specfx.errors import LoweringError
from specfx.kernels import cpu_build
for compiler in ("/bin/false", "/nowhere/g++"):
    os.environ["CXX"] = compiler
    cpu_build._outcome = None  # forget the failure before
    try:
        cpu_build.load()
    except LoweringError as e:
        print(e)
print(sorted(p.name for p in cache_dir().iterdir()))
torch.set_num_threads(1)
import test_kernels
test_kernels.opcheck_all()
assert not torch._C._dispatch_has_kernel_for_dispatch_key("specfx::tree_attention_", "CPU")
batch = test_kernels.make_batch(test_kernels.Shape(2, 3), [9], [test_kernels.TREE], 0)
torch.testing.assert_close(batch.run(test_kernels.tree_attention_)[0], test_kernels.dense_attention(batch))
print("references serve")
"""


def test_without_a_working_compiler_the_references_serve(tmp_path: Path) -> None:
    """A failing and a missing compiler are each a `LoweringError`, leave nothing behind, and the ops pass opcheck on their references."""
    failing, missing, left, served = finish(python(WITHOUT_COMPILER, SPECFX_CACHE=str(tmp_path))).splitlines()
    assert "don't build" in failing
    assert "/nowhere/g++ not found" in missing
    assert "CXX" in missing
    assert left == "[]"
    assert served == "references serve"


OTHER_FORM = """
import ctypes, sys, torch, test_kernels
from specfx.kernels import cpu_build
kernels = cpu_build.load()
assert kernels.packs
products = [0]
def on_tiles():  # which form it was that ran
    if sys.argv[1] == "emulated":
        products.append(ctypes.CDLL(str(kernels.path)).products_on_emulated_tiles())
        assert products[-1] > products[-2]
for n, k, biased in ((33, 96, True), (70, 128, False)):
    test_kernels.test_packed_linear_kernel_agrees_with_the_reference(n, k, biased)
    on_tiles()
rows = [test_kernels.TREE, test_kernels.causal_run(1), test_kernels.tree_of(20)]
for sizes, window in (((2, 3, 64, 64, 16), 0), ((1, 4, 32, 48, 16), 7)):
    shape = test_kernels.Shape(*sizes, window=window, dtype=torch.bfloat16)
    batch = test_kernels.make_batch(shape, [70, 3, 1100], rows, 0)
    got, expected = batch.run(test_kernels.tree_attention_)[0], test_kernels.dense_attention(batch)
    torch.testing.assert_close(got.float(), expected.float(), rtol=0.02, atol=0.02)
    on_tiles()
test_kernels.test_a_rows_attention_depends_on_nothing_else_in_the_forward(torch.bfloat16, 0)
print("served")
"""


def test_the_form_for_other_cpus_serves(kernels: cpu_build.CpuKernels, tmp_path: Path) -> None:
    """On a CPU that has tiles, the build that leaves them out; on one that has none, the build for tiles, which are emulated. (All other
    tests are of the form for this CPU.)"""
    if not kernels.packs:
        pytest.skip("this CPU has no bfloat16 vectors, which both forms need")
    emulated = "amx_bf16" not in cpu_build.cpu_flags()
    options = f"-include {Path(__file__).parent / 'emulated_tiles.h'}" if emulated else "-mno-amx-tile -mno-amx-bf16"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" {options}\n')
    compiler.chmod(0o755)
    process = python(OTHER_FORM, "emulated" if emulated else "", SPECFX_CACHE=str(tmp_path / "cache"), CXX=str(compiler))
    assert finish(process) == "served\n"


LOAD = "from specfx.kernels import cpu_build; print(cpu_build.load().path)"


def test_processes_build_at_once_and_later_ones_load_what_was_built(tmp_path: Path) -> None:
    """A compiler that counts its calls: two processes that start at once may both build, a later one doesn't. (Unoptimised: faster.)"""
    compiler, calls, cache = tmp_path / "compiler", tmp_path / "calls", tmp_path / "cache"
    compiler.write_text(f'#!/bin/sh\necho >> {calls}\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    environment = {"SPECFX_CACHE": str(cache), "CXX": str(compiler)}
    both = [python(LOAD, **environment) for _ in range(2)]
    paths = {finish(process) for process in both}
    built = len(calls.read_text().splitlines())
    assert built in (1, 2)
    assert {finish(python(LOAD, **environment))} == paths
    assert len(calls.read_text().splitlines()) == built
    (library,) = cache.iterdir()  # one library and no half-built one
    assert paths == {f"{library}\n"}
