"""What a forward costs: ``fixed + each * rows`` seconds, and ``drafting`` more if it makes the next draft.

Told by how the seconds change from one forward to the next (least squares over the differences): a machine that slows down for a while, or
a context that grows, costs every forward the same and is no cost of rows or drafts. What a draft costs is supposed at first (a Gaussian
prior), and believed the better the more often drafting began or paused.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 0.98
"""Weight that an observation keeps when the next one comes: the last fifty count."""
_SUPPOSED = 0.2
"""Of the time of a forward: what a draft is taken to cost at first."""
_UNSURE = 0.1
"""Of the time of a forward: the standard deviation of that."""
_NOISE = 0.02
"""Of the time of a forward: what neighbours are taken to differ by at first, with the weight of `_NOISY` differences."""
_NOISY = 2.0
_FEWEST = 16
"""Forwards after which one that takes three times as long as it should is taken for held up by something else."""


@dataclass(frozen=True)
class Cost:
    """Seconds. each: of a row, cautiously: two standard errors less than the best guess; on a busy machine no row is left out for noise.
    each_doubt, drafting_doubt: two standard errors."""

    fixed: float
    each: float
    drafting: float
    each_doubt: float
    drafting_doubt: float


class Costs:
    """State: sums over the forwards and over the differences between neighbours."""

    def __init__(self) -> None:
        self.forwards = 0
        self._weight = self._seconds = self._rows = self._rows2 = self._drafted = 0.0
        self._last: tuple[int, float, bool] | None = None
        self._pairs = self._rr = self._rd = self._dd = self._rs = self._ds = self._ss = 0.0  # of differences: rows, drafted, seconds
        self._noise: float | None = None  # variance of the seconds of a difference
        self._cost: Cost | None = None

    def note(self, rows: int, seconds: float, drafted: bool) -> None:
        """A forward of `rows` rows, which made the next draft or did not, took `seconds`."""
        if self.forwards >= _FEWEST:
            seconds = min(seconds, 3 * self.of(rows, drafted))
        self.forwards += 1
        self._weight = MEMORY * self._weight + 1
        self._seconds = MEMORY * self._seconds + seconds
        self._rows = MEMORY * self._rows + rows
        self._rows2 = MEMORY * self._rows2 + rows**2
        self._drafted = MEMORY * self._drafted + drafted
        if self._last is not None:
            r, s, d = rows - self._last[0], seconds - self._last[1], drafted - self._last[2]
            self._pairs = MEMORY * self._pairs + 1
            self._rr, self._rd, self._dd = MEMORY * self._rr + r * r, MEMORY * self._rd + r * d, MEMORY * self._dd + d * d
            self._rs, self._ds, self._ss = MEMORY * self._rs + r * s, MEMORY * self._ds + d * s, MEMORY * self._ss + s * s
        self._last, self._cost = (rows, seconds, drafted), None

    @property
    def mean(self) -> float:
        """Of a forward; never zero, whatever the clock says."""
        return max(self._seconds / self._weight, 1e-9) if self._weight else 1e-9

    @property
    def rows_variance(self) -> float:
        """Of the rows of forwards. With little, what a row costs can't be told."""
        return self._rows2 / self._weight - (self._rows / self._weight) ** 2

    def of(self, rows: int, drafted: bool) -> float:
        """Seconds of such a forward."""
        cost = self.fit()
        return cost.fixed + cost.each * rows + cost.drafting * drafted

    def fit(self) -> Cost:
        """As of now. What can't be told of a row's cost is zero (and part of `fixed`)."""
        if self._cost is not None:
            return self._cost
        mean = self.mean
        usual = (_NOISE * mean) ** 2
        noise = usual if self._noise is None else self._noise
        belief = noise / (_UNSURE * mean) ** 2
        dd, ds = self._dd + belief, self._ds + belief * _SUPPOSED * mean
        determinant = self._rr * dd - self._rd**2
        if self._rr > 1e-9:
            each, drafting = (dd * self._rs - self._rd * ds) / determinant, (self._rr * ds - self._rd * self._rs) / determinant
            each_spread, drafting_spread = dd / determinant, self._rr / determinant
        else:
            each, drafting, each_spread, drafting_spread = 0.0, ds / dd, 0.0, 1 / dd
        left = self._ss - 2 * (each * self._rs + drafting * self._ds)
        left += each**2 * self._rr + 2 * each * drafting * self._rd + drafting**2 * self._dd
        self._noise = noise = (max(left, 0.0) + _NOISY * usual) / (self._pairs + _NOISY)
        each_doubt, drafting_doubt = 2 * (noise * each_spread) ** 0.5, 2 * (noise * drafting_spread) ** 0.5
        rows, drafted = (self._rows / self._weight, self._drafted / self._weight) if self._weight else (1.0, 0.0)
        each, drafting = min(max(0.0, each - each_doubt), mean / rows), max(0.0, drafting)
        self._cost = Cost(mean - each * rows - drafting * drafted, each, drafting, each_doubt, drafting_doubt)
        return self._cost
