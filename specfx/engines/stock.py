"""What stands where an engine will be, while the first one is being prepared: the stock `generate` serves all calls."""

from __future__ import annotations

from collections.abc import Sequence

from specfx.engines.base import Rows, RowsOutput


class StockEngine:
    """`specfx.engines.base.Engine` that verifies nothing, so that nobody gives it a sequence."""

    name = "stock"
    verifies = "nothing"
    drafts = False
    max_rows = 1

    def add(self, seq: int, capacity: int, source: int | None = None, shared: int = 0) -> None:
        raise NotImplementedError

    def extend(self, seq: int, capacity: int) -> None:
        raise NotImplementedError

    def inherit(self, seq: int) -> int:
        raise NotImplementedError

    def forward(self, batch: Sequence[Rows]) -> list[RowsOutput]:
        raise NotImplementedError

    def commit(self, seq: int, rows: Sequence[int]) -> None:
        raise NotImplementedError

    def trim(self, seq: int) -> None:
        raise NotImplementedError

    def remove(self, seq: int) -> None:
        """There is none."""

    def length(self, seq: int) -> int:
        raise NotImplementedError
