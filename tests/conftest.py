"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from specfx.errors import LoweringError
from specfx.kernels import cpu_build

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
    """What is left out of a draft depends on how long forwards take; only results may be asserted then."""
    if request.module.__name__ not in ("test_budget", "test_random_calls"):
        monkeypatch.setattr("specfx.runtime.budget._FEWEST", 10**9)


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
