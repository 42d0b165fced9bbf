"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specfx.artifacts import store
from specfx.cache import cache_dir
from specfx.errors import LoweringError
from specfx.kernels import cpu_build

os.environ["SPECFX_NO_ARTIFACTS"] = "1"  # every test captures and compiles for itself; `artifacts` brings them back

LARGE = ("test_smollm2",)
"""Test files of the real model: they start first, and threads help there. Tiny models run faster on one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LARGE)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    if request.module.__name__ not in LARGE or "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _verify_whatever_is_drafted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out of a draft, and whether one is made, depends on how long forwards take; only results may be asserted then."""
    if request.module.__name__ not in ("test_budget", "test_random_calls"):
        monkeypatch.setattr("specfx.runtime.budget._FEWEST", 10**9)
        monkeypatch.setattr("specfx.runtime.budget._FEWEST_RESTED", 10**9)


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Artifacts are kept, below a new cache folder that has the compiled kernels of the old one. Returns their folder."""
    for there in (f for pattern in ("cpu-*.so", "numba") for f in cache_dir().glob(pattern)):
        (tmp_path / there.name).symlink_to(there)
    monkeypatch.delenv("SPECFX_NO_ARTIFACTS")
    monkeypatch.setenv("SPECFX_CACHE", str(tmp_path))
    return store.folder()


@pytest.fixture
def instant_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled engine without Inductor: its artifact is the lowered graph, run as it is."""
    monkeypatch.setattr("specfx._compat.inductor_compile", lambda module, examples, options: module)


@pytest.fixture(scope="module")
def kernels() -> cpu_build.CpuKernels:
    """The CPU kernels, loaded; a test that asks for them is skipped where they can't be built."""
    try:
        return cpu_build.load()
    except LoweringError as e:
        pytest.skip(str(e))
