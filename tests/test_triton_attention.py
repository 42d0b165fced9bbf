"""`specfx::tree_attention_` in Triton, without a GPU: numerics under Triton's interpreter, and compilation to a cubin.

The ordinary run compiles a thinned list of specialisations; with SPECFX_COMPILE_ALL=1 it is all that `default_config` and `candidates`
choose over `DIMS`, dtypes and capabilities. What needs a GPU: speed, races
between programs or threads, and the code that ptxas makes (the interpreter runs programs one after another, in numpy).
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import TOLERANCE, TREE, Batch, Shape, batches, bits, causal_run, dense_attention, make_batch, narrowed, tree_of
from torch import Tensor
from triton_tools import (
    INTERPRETED,
    SHARED_MEMORY,
    Launch,
    Launches,
    assert_compiles,
    compile_launch,
    compiled,
    interpreted,
    no_interpreter,
    run_interpreted,
)

from specfx.errors import LoweringError
from specfx.kernels import triton_attention, triton_common
from specfx.kernels.tree_attention import tree_attention_reference
from specfx.kernels.triton_attention import MOVES, tree_append_triton, tree_attend_triton, tree_attention_triton
from specfx.kernels.triton_config import CONFIGS, Config, candidates, default_config


@compiled
@no_interpreter
def test_the_kernels_agree_with_the_references_under_the_interpreter() -> None:
    run_interpreted(__file__, 40)


@pytest.fixture(scope="module", autouse=True)
def _scratch_is_poisoned() -> Iterator[None]:
    """Under the interpreter, memory that is allocated but not written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or INTERPRETED)
    yield
    torch.use_deterministic_algorithms(before)


@interpreted
def test_scratch_is_poisoned() -> None:
    assert torch.ones(2).new_empty(100, 100, dtype=torch.float32).isnan().all()


# --- numerics -------------------------------------------------------------------------------------------------------------------


def assert_triton_agrees(batch: Batch, config: Config | None = None) -> None:
    expected, *expected_pools = batch.run(tree_attention_reference)
    out, *pools = batch.run(functools.partial(tree_attention_triton, config=config))
    rtol, atol = TOLERANCE[batch.shape.dtype]
    assert out.dtype == batch.shape.dtype
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    for ours, theirs in zip(pools, expected_pools, strict=True):
        assert torch.equal(bits(ours), bits(theirs))


def config(block_m: int = 16, block_n: int = 16, splits: int = 1) -> Config:
    return Config(block_m, block_n, splits)


MIXED = ([37, 0, 5], [TREE, causal_run(3), []])
"""Lengths and parents of a ragged batch: a tree, a prompt, a sequence without rows."""


@interpreted
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_ragged_batch_of_each_dtype_and_split(dtype: torch.dtype, splits: int) -> None:
    assert_triton_agrees(make_batch(Shape(2, 3, 16, 8, 16, dtype=dtype), *MIXED, splits), config(splits=splits))


@interpreted
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(5, 0.0, False), (40, 1.5, False), (0, 1.5, True), (1, 0.0, True), (17, 2.0, True)]
)
def test_windows_softcaps_and_sinks(window: int, softcap: float, sinks: bool, splits: int) -> None:
    shape = Shape(1, 4, 8, 16, 16, window, softcap, sinks, torch.float32)
    assert_triton_agrees(make_batch(shape, [70, 3], [TREE, causal_run(20)], window), config(splits=splits))


@interpreted
@pytest.mark.parametrize("skip", [1, 3, 80])
def test_what_stands_before_skip_is_seen_by_none_behind_it(skip: int) -> None:
    shape = Shape(1, 4, 8, 16, 16, 40, dtype=torch.float32, skip=skip)
    assert_triton_agrees(make_batch(shape, [70, 0, 1], [TREE, TREE, causal_run(90)], skip), config(splits=2))


@interpreted
@pytest.mark.parametrize("share", [1, 3, 4, 7, 8])
def test_queries_of_a_group_share_blocks(share: int) -> None:
    assert_triton_agrees(make_batch(Shape(2, share, 8, 8, 16, 9, dtype=torch.float32), *MIXED, share), config(splits=2))


@interpreted
@pytest.mark.parametrize("widths", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (6, 5)], ids=str)
def test_head_dims_that_are_no_powers_of_two(widths: tuple[int, int]) -> None:
    assert_triton_agrees(make_batch(Shape(1, 2, *widths, 16, dtype=torch.float32), [20], [TREE], 0), config(splits=2))


@interpreted
@pytest.mark.parametrize(("page_size", "block_n"), [(16, 32), (32, 16), (256, 32), (48, 16), (48, 32), (5, 16), (1, 64)])
@pytest.mark.parametrize("window", [0, 11])
def test_page_sizes(page_size: int, block_n: int, window: int) -> None:
    shape = Shape(1, 2, 8, 8, page_size, window, dtype=torch.float32)
    assert_triton_agrees(make_batch(shape, [83, 300, 16], [TREE, [-1], [-1, 0]], page_size), config(16, block_n, 3))


@interpreted
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("window", [0, 30])
def test_runs_of_more_than_64_rows_are_causal(window: int, mask: bool) -> None:
    shape = Shape(1, 3, 8, 8, 16, window, dtype=torch.float32)
    assert_triton_agrees(make_batch(shape, [40, 7], [causal_run(65), causal_run(130)], 1, mask), config(64, 32))


@interpreted
@pytest.mark.parametrize("rows", [31, 32, 33, 63, 64])
@pytest.mark.parametrize("window", [0, 3])
def test_all_64_bits_of_a_mask_word_count(rows: int, window: int) -> None:
    shape = Shape(1, 1, 8, 8, 16, window, dtype=torch.float32)
    assert_triton_agrees(make_batch(shape, [20], [tree_of(rows, window)], rows), config(32, 16))


@interpreted
def test_bits_above_a_sequences_rows_are_not_read() -> None:
    batch = make_batch(Shape(1, 2, 8, 8, 16, 3, dtype=torch.float32), [20], [TREE], 0)
    expected = batch.run(tree_attention_reference)[0]
    batch.arguments["tree_mask"] |= ~0xFF
    torch.testing.assert_close(batch.run(functools.partial(tree_attention_triton, config=config()))[0], expected)


@interpreted
@pytest.mark.parametrize("sequences", [128, 129])
def test_programs_find_their_sequence_among_many(sequences: int) -> None:
    parents = [[], [-1], [-1, 0, 0]]
    shape = Shape(1, 1, 4, 4, 16, dtype=torch.float32)
    lengths = [s % 2 for s in range(sequences)]
    some = [parents[2] if s in (0, 126, 127, 128, sequences - 2) else [] for s in range(sequences)]
    assert_triton_agrees(make_batch(shape, lengths, some, 0), config())


@interpreted
def test_a_batch_without_rows_only_moves() -> None:
    batch = make_batch(Shape(1, 2, 8, 8, 16, dtype=torch.float32), [20, 5], [[], []], 0, mask=False)
    batch.arguments["moves"] = torch.tensor([[batch.slots[0][7]], [batch.slots[0][3]]])
    assert_triton_agrees(batch)


def moved(batch: Batch, moves: list[tuple[int, int]]) -> Batch:
    batch.arguments["moves"] = torch.tensor(moves or [(-1, -1)]).t()  # not contiguous
    return batch


@interpreted
def test_an_accepted_path_moves_before_it_is_read() -> None:
    batch = make_batch(Shape(2, 2, 8, 4, 16, dtype=torch.float32), [40, 33], [TREE, TREE], 0)
    (a, b), gone = batch.slots, [(-1, -1)]
    paths = [(a[32], a[30]), (a[35], a[31]), *gone, (a[37], a[32]), *gone, (b[20], b[19]), (b[21], b[20]), (b[24], b[21])]
    assert_triton_agrees(moved(batch, paths), config())


@interpreted
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_moves_are_done_in_order(data: st.DataObject) -> None:
    batch = make_batch(Shape(2, 1, 4, 8, 16, dtype=torch.float16), [30], [[]], 0, mask=False)
    slot = st.sampled_from(batch.slots[0][: data.draw(st.sampled_from([3, 30]))])
    moves = st.lists(st.one_of(st.just((-1, -1)), st.tuples(slot, slot)), max_size=2 * MOVES + 3)
    assert_triton_agrees(moved(batch, data.draw(moves)))


@interpreted
def test_moves_of_many_sequences_in_several_blocks() -> None:
    batch = make_batch(Shape(1, 1, 8, 8, 16, dtype=torch.float32), [30] * 9, [[]] * 9, 0, mask=False)
    moves = [(own[10 + 2 * i], own[10 + i]) for own in batch.slots for i in range(1, 10)]
    assert len(moves) > 2 * MOVES
    assert_triton_agrees(moved(batch, moves))


@interpreted
@pytest.mark.parametrize("order", ["rows", "heads"])
def test_rows_may_be_slices_of_a_fused_projection_or_transposed(order: str) -> None:
    batch = make_batch(Shape(2, 3, 8, 8, 16, dtype=torch.float32), *MIXED, 0)
    names = ["q", "k", "v"]
    if order == "rows":
        fused = torch.cat([batch.arguments[n].flatten(1) for n in names], 1)
        for name, part in zip(names, fused.split([6 * 8, 2 * 8, 2 * 8], 1), strict=True):
            batch.arguments[name] = part.unflatten(1, (-1, 8))
            assert not batch.arguments[name].is_contiguous()
    else:
        for name in names:
            batch.arguments[name] = batch.arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    assert_triton_agrees(batch, config())
    batch.arguments["v"] = batch.arguments["v"].transpose(0, 2).contiguous().transpose(0, 2)  # no stride is 1 where it should be
    batch.arguments["page_table"] = batch.arguments["page_table"].t().contiguous().t()
    assert_triton_agrees(batch, config())


@interpreted
@pytest.mark.parametrize("splits", [1, 3])
def test_blocks_before_the_window_are_not_read(splits: int) -> None:
    batch = make_batch(Shape(1, 1, 8, 8, 16, 16, dtype=torch.float32), [100], [TREE], 0)
    expected = batch.run(tree_attention_reference)[0]
    for name in ("k_pages", "v_pages"):
        batch.arguments[name].flatten(0, 1)[batch.slots[0][:80]] = float("nan")  # the root stands at 100 and sees 85 and on
    out = batch.run(functools.partial(tree_attention_triton, config=config(splits=splits)))[0]
    torch.testing.assert_close(out, expected)


@interpreted
def test_new_rows_before_the_window_are_not_read() -> None:
    batch = make_batch(Shape(1, 1, 8, 8, 16, 8, dtype=torch.float32), [30], [causal_run(70)], 0)
    expected = batch.run(tree_attention_reference)[0]
    batch.arguments["k"][:16] = batch.arguments["v"][:16] = float("nan")
    out = batch.run(functools.partial(tree_attention_triton, config=config()))[0]
    torch.testing.assert_close(out[32:], expected[32:])


@interpreted
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("mask", [True, False])
def test_append_and_attend_apart_are_the_op(mask: bool, splits: int) -> None:
    shape = Shape(2, 3, 20, 8, 16, 30, 1.5, True, torch.float32)
    batch = make_batch(shape, [40, 33, 7], [TREE if mask else causal_run(8), causal_run(70), []], 0, mask)
    batch.arguments["k"], batch.arguments["page_table"] = (
        batch.arguments[name].transpose(-1, 0).contiguous().transpose(-1, 0) for name in ("k", "page_table")
    )
    moved(batch, [(batch.slots[0][32], batch.slots[0][30]), (-1, -1), (batch.slots[0][35], batch.slots[0][31])])
    expected, *expected_pools = batch.run(tree_attention_reference)
    given = dict(batch.arguments)
    pools = [given[name].clone() for name in ("k_pages", "v_pages")]
    tree_append_triton(*(given[name] for name in ("k", "v", "page_table", "lengths", "row_starts", "moves")), *pools)
    for ours, theirs in zip(pools, expected_pools, strict=True):
        assert torch.equal(bits(ours), bits(theirs))
    before = [*batch.arguments.values()][:7]
    out = tree_attend_triton(*before, *pools, **batch.constants, config=config(splits=splits))
    torch.testing.assert_close(out, expected)
    assert all(torch.equal(bits(ours), bits(theirs)) for ours, theirs in zip(pools, expected_pools, strict=True))


@interpreted
def test_default_configs_run() -> None:
    for dtype, rows in itertools.product(TOLERANCE, (1, 40)):
        assert_triton_agrees(make_batch(Shape(1, 4, 16, 16, 64, 20, dtype=dtype), [300], [tree_of(rows)], rows))


@interpreted
@settings(max_examples=15, deadline=None)
@given(batch=batches(), cut=st.sampled_from([(64, 16, 1), (64, 32, 2), (16, 64, 1), (128, 16, 3)]))
def test_triton_is_attention_under_a_dense_mask(batch: Batch, cut: tuple[int, int, int]) -> None:
    out = narrowed(batch, torch.float32).run(functools.partial(tree_attention_triton, config=config(*cut)))[0]
    torch.testing.assert_close(out.double(), dense_attention(batch), rtol=2e-5, atol=2e-5)


# --- refusals and configurations ------------------------------------------------------------------------------------------------


@compiled
def test_a_tensor_on_the_cpu_is_refused() -> None:
    batch = make_batch(Shape(dtype=torch.float32), [3], [[-1]], 0)
    with pytest.raises(LoweringError, match="tensor on cpu"):
        batch.run(tree_attention_triton)


@compiled
def test_without_triton_the_module_imports_and_its_use_is_refused() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from specfx.kernels import triton_attention as t; from specfx.errors import LoweringError\n"
        "x = torch.zeros(1, 1, 8)\n"
        "try: t.tree_attention_triton(x, x, x, None, x, x, x, x, x, x, 1.0)\n"
        "except LoweringError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Triton is not installed" in done.stdout


REGISTER = """
import sys, torch
{before}
from specfx.errors import LoweringError
from specfx.kernels import greedy_walk, keyed_sample, triton_kernels
has = lambda op: torch._C._dispatch_has_kernel_for_dispatch_key("specfx::" + op, "CUDA")
ops = ["tree_attention_", "tree_append_", "tree_positions", "greedy_walk", "keyed_sample"]
try:
    triton_kernels.register()
    triton_kernels.register()
except LoweringError as e:
    print(e)
print(*map(has, ops))
"""


@compiled
@pytest.mark.parametrize(
    ("before", "printed"),
    [
        ("torch.cuda.is_available = lambda: True", "True"),
        ("torch.cuda.is_available = lambda: False", "Triton kernels need a CUDA device"),
        ("sys.modules['triton'] = None", "Triton is not installed"),
    ],
)
def test_registered_they_are_the_ops_kernels_on_cuda(before: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", REGISTER.format(before=before)], capture_output=True, text=True, check=True)
    *refused, registered = done.stdout.splitlines()
    assert set(registered.split()) == {str(not refused)}
    assert done.stdout.startswith(printed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 1, 8, dtype=torch.float64)}, "no Triton kernel for torch.float64"),
        ({"k": torch.zeros(1, 1, 8, dtype=torch.float16)}, "a pool is not"),
        ({"k": torch.zeros(1, 1, 4)}, "don't fit"),
        ({"v_pages": torch.zeros(8, 4, 1, 3).transpose(1, 3)[:, :4, :, :]}, "don't fit"),
        ({"v_pages": torch.zeros(3, 1, 4, 8).transpose(1, 2)[:, :, :, :]}, None),
        ({"v_pages": torch.zeros(3, 4, 1, 16)[..., ::2]}, "must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str | None) -> None:
    batch = make_batch(Shape(dtype=torch.float32), [3], [[-1]], 0)
    inputs = [{**batch.arguments, **change}[name] for name in ("q", "k", "v", "k_pages", "v_pages")]
    if message is None:
        triton_attention._check(*inputs)
    else:
        with pytest.raises(LoweringError, match=message):
            triton_attention._check(*inputs)


def test_the_default_config_fills_the_gpu_without_cutting_short_prefixes() -> None:
    default = functools.partial(default_config, 128, torch.bfloat16, groups=8, share=4)
    assert default(16, 1, 64, pages=64).SPLITS == 16
    assert default(16, 1, 64, pages=2).SPLITS == 1  # 128 tokens
    assert default(16 * 32, 32, 64, pages=64).SPLITS == 1  # enough programs without
    assert default(1, 1, 64).BLOCK_M == 16
    assert default(4096, 1, 64, pages=64) == Config(128, 32, 1, 8, 2)


# --- compilation ----------------------------------------------------------------------------------------------------------------

DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (16, 16)]
EVERYTHING = {"window": 512, "softcap": 30.0, "sinks": True, "skip": 2}
ROWS = [1, 8, 16, 2048]
"""Rows of one sequence: with four heads a group they take each BLOCK_M that there is."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Launch]]:
    """Runs the launcher on tensors without data, as on a GPU of that capability, and returns its (kernel, arguments)."""
    noted: list[Launch] = []
    for name in ("_move", "_attend", "_merge"):
        monkeypatch.setattr(triton_attention, name, Launches(getattr(triton_attention, name), noted))
    monkeypatch.setattr(triton_attention, "require", lambda kernel, on: None)

    def run(
        capability: int, dims: tuple[int, int], dtype: torch.dtype, rows: int, mask: bool = True, page_size: int = 64,
        window: int = 0, softcap: float = 0.0, sinks: bool = False, skip: int = 0, share: int = 4, config: Config | None = None,
    ) -> list[Launch]:  # fmt: skip
        monkeypatch.setattr(triton_attention, "device_properties", lambda device: {"capability": capability, "processors": 132})
        noted.clear()
        new = functools.partial(torch.empty, device="meta")
        integers = functools.partial(new, dtype=torch.int32)
        groups, (dk, dv) = 8, dims
        tree_attention_triton(
            new(rows, groups * share, dk, dtype=dtype), new(rows, groups, dk, dtype=dtype), new(rows, groups, dv, dtype=dtype),
            new(rows, dtype=torch.int64) if mask else None, integers(1, 4096 // page_size), integers(1), integers(2),
            new(2, 16, dtype=torch.int64), new(128, page_size, groups, dk, dtype=dtype), new(128, page_size, groups, dv, dtype=dtype),
            dk**-0.5, window, softcap, new(groups * share, dtype=dtype) if sinks else None, skip, config,
        )  # fmt: skip
        return list(noted)

    return run


def all_defaults() -> Iterator[tuple[int, tuple[int, int], torch.dtype, int, dict[str, Any]]]:
    """Left out: extras one by one, group sizes and page sizes other than these, and most of float16, whose code is bfloat16's."""
    extras = [{}, {"page_size": 16, "share": 7, **EVERYTHING}]
    for case in itertools.product(SHARED_MEMORY, DIMS, [torch.bfloat16, torch.float32], ROWS, extras):
        if case[2] == torch.bfloat16 or case[3] == 1 or (case[3] == 2048 and case[1][0] <= 64):  # float32 has few sizes of blocks
            yield case
    for capability, rows in itertools.product(SHARED_MEMORY, ROWS):
        yield capability, (128, 128), torch.float16, rows, {"mask": False}


THINNED = [
    (80, (64, 64), torch.bfloat16, 2048, {"mask": False}),
    (80, (128, 128), torch.bfloat16, 1, {}),
    (80, (128, 128), torch.bfloat16, 2048, {}),
    (80, (128, 128), torch.float16, 16, EVERYTHING),
    (80, (80, 80), torch.bfloat16, 2048, {"page_size": 16}),
    (80, (96, 96), torch.bfloat16, 8, {}),
    (80, (256, 256), torch.bfloat16, 16, {}),
    (80, (128, 128), torch.float32, 8, {}),
    (90, (128, 128), torch.bfloat16, 1, EVERYTHING),
    (90, (128, 128), torch.bfloat16, 16, {"page_size": 16}),
    (90, (128, 128), torch.bfloat16, 2048, EVERYTHING),
    (90, (192, 128), torch.float16, 16, {"share": 1}),
    (90, (256, 256), torch.float32, 8, EVERYTHING),
]
"""Of `all_defaults`: each dtype, each of the widest heads and blocks, both ways to read a page, with and without extras."""

CHOSEN = list(all_defaults()) if os.environ.get("SPECFX_COMPILE_ALL") else THINNED


@compiled
@pytest.mark.parametrize(("capability", "dims", "dtype", "rows", "extras"), CHOSEN, ids=str)
def test_default_configs_compile_and_do_not_spill(
    capability: int, dims: tuple[int, int], dtype: torch.dtype, rows: int, extras: dict[str, Any], launches: Callable[..., Any]
) -> None:
    launched = launches(capability, dims, dtype, rows, **extras)
    assert len(launched) == (3 if rows < 2048 else 2)
    assert_compiles(launched, capability)


def all_candidates() -> Iterator[tuple[int, tuple[int, int], torch.dtype, Config]]:
    for capability, dims, dtype in itertools.product(SHARED_MEMORY, DIMS[:-1], [torch.bfloat16, torch.float32]):
        for chosen in candidates(*dims, dtype, SHARED_MEMORY[capability]):
            yield capability, dims, dtype, chosen


SOME_CANDIDATES = [
    (80, (64, 64), torch.bfloat16, Config(128, 64, 1, 8, 3)),
    (90, (128, 128), torch.bfloat16, Config(64, 128, 1, 8, 2)),
    (90, (256, 256), torch.bfloat16, Config(64, 32, 1, 4, 3)),
]


@compiled
@pytest.mark.parametrize(
    ("capability", "dims", "dtype", "chosen"), list(all_candidates()) if os.environ.get("SPECFX_COMPILE_ALL") else SOME_CANDIDATES, ids=str
)
def test_candidates_compile_within_their_bound_of_shared_memory(
    capability: int, dims: tuple[int, int], dtype: torch.dtype, chosen: Config, launches: Callable[..., Any]
) -> None:
    assert chosen in CONFIGS
    launched = [x for x in launches(capability, dims, dtype, 16, config=chosen) if x[0].__name__ == "_attend"]
    assert compile_launch(*launched[0], capability).shared <= chosen.shared_memory(*dims, dtype) <= SHARED_MEMORY[capability]


@compiled
@pytest.mark.parametrize(("capability", "dims"), [(80, (128, 128)), (90, (192, 128)), (90, (80, 80))])
def test_the_append_by_itself_compiles(capability: int, dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Launch] = []
    for name in ("_move", "_append"):
        monkeypatch.setattr(triton_attention, name, Launches(getattr(triton_attention, name), noted))
    monkeypatch.setattr(triton_attention, "require", lambda kernel, on: None)
    new = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    integers = functools.partial(new, dtype=torch.int32)
    k, v = (new(48, 8, width) for width in dims)
    pools = (new(128, 64, 8, width) for width in dims)
    tree_append_triton(k, v, integers(3, 64), integers(3), integers(4), new(2, 16, dtype=torch.int64), *pools)
    assert [kernel.__name__ for kernel, _ in noted] == ["_move", "_append"]
    assert_compiles(noted, capability)


@compiled
def test_a_block_of_moves_is_read_before_it_is_written(launches: Callable[..., Any]) -> None:
    kernel, arguments = launches(90, (64, 64), torch.bfloat16, 1)[0]
    assert kernel.__name__ == "_move"
    ptx = compile_launch(kernel, arguments, 90).ptx
    marks = {"ld.global.v4": "L", "st.global.v4": "S", "bar.sync": "B"}  # the moved rows are what is read 16 bytes at a time
    order = "".join(marks[found] for found in re.findall(r"ld\.global\.v4|st\.global\.v4|bar\.sync", ptx))
    assert re.fullmatch(r"(B*L+BS+B)+B*", order), order


@compiled
def test_the_grid_does_not_depend_on_what_is_on_the_device(launches: Callable[..., Any]) -> None:
    launches(90, (128, 128), torch.bfloat16, 16)  # tensors without data: reading one would raise


def test_every_head_dim_has_candidates() -> None:
    for dims, dtype, bytes_ in itertools.product(DIMS, TOLERANCE, [99 * 1024, *SHARED_MEMORY.values()]):
        assert len(candidates(*dims, dtype, bytes_)) >= 2
    assert triton_common.power_of_two(80) == 128
