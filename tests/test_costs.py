"""What forwards are told to cost, under clocks that the tests choose."""

from __future__ import annotations

import random

import pytest

from specfx.runtime.costs import Costs


def told(rows_of: object, drafted_of: object, each: float, drafting: float, drift: float, noise: float, forwards: int, seed: int) -> Costs:
    """After forwards of 10 seconds and their rows and drafts; `drift` more seconds with each."""
    rng, made = random.Random(seed), Costs()
    for i in range(forwards):
        rows, drafted = rows_of(rng, i), drafted_of(rng, i)  # type: ignore[operator]
        made.note(rows, 10 + each * rows + drafting * drafted + drift * i + rng.gauss(0, noise), drafted)
    return made


@pytest.mark.parametrize("drift", [0.0, 0.05, -0.03])
@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_slows_down_is_no_cost_of_drafts_or_rows(seed: int, drift: float) -> None:
    """Drafting pauses once for thirty forwards. (Levels would say that the draft costs what the machine lost meanwhile.)"""
    made = told(lambda rng, i: rng.randint(1, 8), lambda rng, i: not 20 <= i < 50, 0.1, 2.0, drift, 0.05, 80, seed)
    cost = made.fit()
    assert cost.drafting == pytest.approx(2.0, abs=0.2)
    assert cost.each == pytest.approx(0.1, abs=0.03)
    assert cost.each <= 0.1 + 0.01, "cautiously"
    assert made.of(8, True) - made.of(1, False) == pytest.approx(2.7, abs=0.3)


def test_a_draft_is_supposed_to_cost_a_fifth_until_it_is_told() -> None:
    always = told(lambda rng, i: 3, lambda rng, i: True, 0.0, 2.0, 0.0, 0.1, 40, 0).fit()
    assert always.drafting == pytest.approx(0.2 * 12, rel=0.01)
    assert always.drafting_doubt > 1.0
    assert always.each == 0
    rested = told(lambda rng, i: 3, lambda rng, i: i % 10 > 0, 0.0, 0.5, 0.0, 0.1, 40, 0).fit()
    assert rested.drafting == pytest.approx(0.5, abs=0.2)
    assert rested.drafting_doubt < 0.3


def test_where_rows_and_drafts_come_and_go_together_the_supposition_divides_the_cost() -> None:
    made = told(lambda rng, i: 1 + 4 * (i % 2), lambda rng, i: bool(i % 2), 0.25, 2.0, 0.0, 0.0, 60, 0)
    cost = made.fit()
    assert 4 * cost.each + cost.drafting == pytest.approx(3.0, abs=1.2)
    assert cost.each_doubt > 0.1
    assert made.of(5, True) - made.of(1, False) == pytest.approx(3.0, abs=1.2)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_cost_of_rows(seed: int) -> None:
    rng, made = random.Random(seed), Costs()
    for _ in range(60):
        made.note(rng.randint(1, 6), 10 + rng.expovariate(0.3), False)
    assert made.fit().each < 0.5


def test_what_something_else_held_up_counts_little() -> None:
    made = told(lambda rng, i: 1 + i % 4, lambda rng, i: i % 5 > 0, 0.2, 1.0, 0.0, 0.02, 40, 0)
    before = made.mean
    made.note(2, 1e6, True)
    assert made.mean < 1.1 * before
    assert made.fit().drafting < 3.0
