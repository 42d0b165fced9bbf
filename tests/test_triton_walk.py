"""`specfx::greedy_walk`, `specfx::tree_positions` and `specfx::keyed_sample` in Triton, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_mtp_tree import Walk, make_walk, walks
from test_sampling import assert_the_sampled_walk_is_sampling_token_by_token, plain, random_keys, random_warps, strange_logits
from torch import Tensor
from triton_tools import Launch, Launches, assert_compiles, compile_launch, compiled, interpreted, no_interpreter, run_interpreted

from specfx.errors import LoweringError
from specfx.kernels import triton_sample, triton_walk
from specfx.kernels.greedy_walk import greedy_walk_reference
from specfx.kernels.keyed_sample import keyed_sample_reference, philox
from specfx.kernels.tree_attention import tree_parents_reference, tree_positions_reference
from specfx.kernels.triton_common import jit, tl
from specfx.kernels.triton_sample import CUT_BLOCK, PART, keyed_sample_triton
from specfx.kernels.triton_walk import greedy_walk_triton, tree_parents_triton, tree_positions_triton


@compiled
@no_interpreter
def test_the_kernels_agree_with_the_references_under_the_interpreter() -> None:
    run_interpreted(__file__, 12)


# --- the walk -------------------------------------------------------------------------------------------------------------------


def assert_triton_agrees(arguments: tuple[Any, ...]) -> None:
    for ours, theirs in zip(greedy_walk_triton(*arguments), greedy_walk_reference(*arguments), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    ids, _, mask, _, lengths, starts, _ = arguments
    assert torch.equal(tree_positions_triton(mask, lengths, starts, ids), tree_positions_reference(mask, lengths, starts, ids))
    assert torch.equal(tree_parents_triton(mask, starts, ids), tree_parents_reference(mask, starts, ids))


@interpreted
@settings(max_examples=60, deadline=None)
@given(walk=walks())
def test_random_trees_are_walked_as_the_reference_does(walk: Walk) -> None:
    assert_triton_agrees(walk.arguments)


@interpreted
@pytest.mark.parametrize("rows", [31, 32, 33, 63, 64])
def test_all_64_bits_of_a_mask_word_count(rows: int) -> None:
    for seed in range(3):
        assert_triton_agrees(make_walk([("tree", rows, 5), ("tree", 3, 0), ("chain", rows, 9)], 16, True, 1.0, seed).arguments)


@interpreted
@pytest.mark.parametrize("mask", [True, False])
def test_long_runs_are_walked_to_the_first_wrong_token(mask: bool) -> None:
    arguments = make_walk([("chain", 700, 5), ("chain", 256, 0), ("chain", 257, 1), ("chain", 600, 1)], 16, mask, 1.0, 0).arguments
    for wrong in (299, 700 + 254, 956 + 255):
        arguments[1][wrong] = 99
    leaf, lengths, moves = greedy_walk_triton(*arguments)
    assert leaf.tolist() == [299, 954, 1211, 1812]
    assert lengths.tolist() == [305, 255, 257, 601]
    assert (moves == -1).all()
    assert_triton_agrees(arguments)


@interpreted
def test_rows_of_no_sequence_move_nothing_and_bits_above_a_sequences_rows_are_not_read() -> None:
    ids, chosen, mask, *more = make_walk([("tree", 9, 5), ("tree", 12, 3)], 4, True, 1.0, 1).arguments
    mask[:9] |= ~0x1FF
    padded = (torch.cat([ids, ids[:, :19]], 1), torch.cat([chosen, chosen[:19]]), torch.cat([mask, mask[:19]]), *more)
    for ours, theirs in zip(greedy_walk_triton(*padded), greedy_walk_reference(*padded), strict=True):
        assert torch.equal(ours, theirs)


@interpreted
def test_sequences_without_rows_and_tensors_that_are_not_contiguous() -> None:
    ids, chosen, mask, table, lengths, _, size = make_walk([("tree", 9, 5), ("tree", 12, 3)], 4, True, 1.0, 1).arguments
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (ids, chosen, mask, table)]
    starts = torch.tensor([0, 0, 9, 9, 21, 21], dtype=torch.int32)
    four = torch.tensor([0, 0, 1, 1, 1])
    assert_triton_agrees((*strided[:3], strided[3][four], lengths[four], starts, size))


# --- samples --------------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("vocabulary", [1, 5, 128, PART, PART + 1, 2 * PART + 4000])
def test_the_kernel_draws_what_the_reference_draws(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits, keys = 4 * torch.randn(6, vocabulary, generator=generator), random_keys(6, generator)
    logits[:3, 1::3] = float("-inf")
    warp = plain(6)
    warp[2, 0] = 0.0
    expected = keyed_sample_reference(logits, keys, warp)
    assert torch.equal(keyed_sample_triton(logits, keys, warp), expected)
    assert torch.equal(keyed_sample_triton(*(x.t().contiguous().t() for x in (logits, keys, warp))), expected)
    assert keyed_sample_triton(logits[:0], keys[:0], warp[:0]).shape == (0,)


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_warps_as_the_reference_warps(kind: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(kind)
    logits = strange_logits(6, [37, CUT_BLOCK + 1, 100, 5, 300][kind], kind, generator).to(dtype)
    keys, warp = random_keys(6, generator), random_warps(6, generator)
    assert torch.equal(keyed_sample_triton(logits, keys, warp), keyed_sample_reference(logits, keys, warp))


@jit
def _philox(counter, seed, out):
    at = tl.arange(0, 64)
    c0, c1, c2, c3 = (tl.load(counter + i * 64 + at).to(tl.uint32) for i in tl.static_range(4))
    for i, word in enumerate(tl.philox(tl.load(seed), c0, c1, c2, c3)):
        tl.store(out + i * 64 + at, word.to(tl.int64))


@interpreted
def test_tritons_philox_is_the_references_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(2**32, (4, 64), generator=generator)
    for seed in (0, -1, 2**62 + 12345, -(2**61) + 7):
        out = torch.empty(4, 64, dtype=torch.int64)
        _philox[(1,)](counter, torch.tensor([seed]), out)
        words = torch.tensor([seed]) & 0xFFFFFFFF, torch.tensor([seed]) >> 32 & 0xFFFFFFFF
        assert torch.equal(out, torch.stack(philox(tuple(counter), words)))


@interpreted
def test_sampling_behind_all_rows_and_walking_is_sampling_token_by_token() -> None:
    ops = (keyed_sample_triton, greedy_walk_triton, tree_positions_triton)
    assert sum(assert_the_sampled_walk_is_sampling_token_by_token(seed, *ops) for seed in range(5)) > 20


# --- refusals and compilation ---------------------------------------------------------------------------------------------------


def test_what_would_be_misread_is_refused() -> None:
    walk = list(make_walk([("tree", 9, 5)], 4, True, 1.0, 1).arguments)
    walk[4] = walk[4].long()
    with pytest.raises(LoweringError, match=r"lengths of torch.int64|on cpu"):
        greedy_walk_triton(*walk)
    with pytest.raises(LoweringError, match=r"warp float64 \[R, 4\]|on cpu"):
        keyed_sample_triton(torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.int64), plain(2).float())
    with pytest.raises(LoweringError, match=r"2 rows of logits, .*warp \(3, 4\)|on cpu"):
        keyed_sample_triton(torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.int64), plain(3))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Launch]]:
    """Runs the launchers on tensors without data (reading one would raise), and returns what they launch."""
    noted: list[Launch] = []
    names = {triton_walk: ("_walk", "_positions", "_parents"), triton_sample: ("_cut", "_draw", "_best")}
    for module, name in ((module, name) for module, own in names.items() for name in own):
        monkeypatch.setattr(module, name, Launches(getattr(module, name), noted))
        monkeypatch.setattr(module, "require", lambda kernel, on: None)

    def run(mask: bool, page_size: int) -> list[Launch]:
        longs = lambda *size: torch.empty(size, dtype=torch.int64, device="meta")  # noqa: E731
        ints = lambda *size: torch.empty(size, dtype=torch.int32, device="meta")  # noqa: E731
        words: Tensor | None = longs(48) if mask else None
        greedy_walk_triton(longs(1, 48), longs(48), words, ints(3, 20), ints(3), ints(4), page_size)
        tree_positions_triton(words, ints(3), ints(4), longs(1, 48))
        tree_parents_triton(words, ints(4), longs(1, 48))
        keyed_sample_triton(torch.empty(48, 49152, device="meta"), longs(48, 3), torch.empty(48, 4, dtype=torch.float64, device="meta"))
        return noted

    return run


@compiled
@pytest.mark.parametrize(("capability", "mask", "page_size"), [(80, True, 64), (90, True, 48), (90, False, 64)])
def test_the_kernels_compile_and_do_not_spill(capability: int, mask: bool, page_size: int, launches: Callable[..., list[Launch]]) -> None:
    launched = launches(mask, page_size)
    assert [kernel.__name__ for kernel, _ in launched] == ["_walk", "_positions", "_parents", "_cut", "_draw", "_best"]
    assert_compiles(launched, capability)


@compiled
def test_the_noise_takes_no_approximate_logarithm(launches: Callable[..., list[Launch]]) -> None:
    (draw,) = (launch for launch in launches(True, 64) if launch[0].__name__ == "_draw")
    assert "lg2.approx" not in compile_launch(*draw, 90).ptx
