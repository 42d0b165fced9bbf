"""Memory for packed weights."""

from __future__ import annotations

import copy
import gc
import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from specfx.kernels import huge_pages


def test_tensors_lie_behind_each_other_in_storages_of_their_own_and_keep_what_is_written() -> None:
    counts = [1, 64, 1000, 3_000_000]
    made = [huge_pages.empty(n, torch.bfloat16).fill_(i + 1) for i, n in enumerate(counts)]
    assert [t.shape[0] for t in made] == counts
    assert len({t.untyped_storage().data_ptr() for t in made}) == len(made)
    assert all(t.data_ptr() % 64 == 0 for t in made)
    assert all(bool((t == i + 1).all()) for i, t in enumerate(made))
    assert made[1].data_ptr() - made[0].data_ptr() == 64
    assert huge_pages.empty(0, torch.float32).shape == (0,)
    own = copy.deepcopy(made[2])
    own.zero_()
    assert bool((made[2] == 3).all())


def test_a_tensor_larger_than_a_chunk_has_its_own() -> None:
    large = huge_pages.empty(huge_pages._CHUNK + 1, torch.uint8)
    large[-1] = 7
    assert large.data_ptr() % huge_pages._PAGE == 0
    assert int(large[-1]) == 7
    assert int(large[0]) == 0


def test_memory_is_given_back_with_the_last_tensor_in_it() -> None:
    first, second = (huge_pages.empty(huge_pages._CHUNK // 2 + 1, torch.uint8) for _ in range(2))  # in two chunks
    assert huge_pages._chunk is not None
    chunk = weakref.ref(huge_pages._chunk())
    del first
    gc.collect()
    assert chunk() is not None
    del second
    gc.collect()
    assert chunk() is None
    assert huge_pages.empty(8, torch.uint8).tolist() == [0] * 8


def test_threads_get_memory_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: huge_pages.empty(1000, torch.int64).fill_(i), range(200)))
    assert all(bool((t == i).all()) for i, t in enumerate(made))


def test_without_huge_pages_it_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_chunk", None)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)  # no such advice: EINVAL
    assert bool((huge_pages.empty(100, torch.float32).fill_(2) == 2).all())
    monkeypatch.setattr(huge_pages, "_chunk", None)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert bool((huge_pages.empty(100, torch.float32).fill_(3) == 3).all())
