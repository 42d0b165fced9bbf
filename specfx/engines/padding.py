"""Steps of any size padded to a few: what a recorded step (`specfx.engines.cuda_graphs`) is given.

* **Sizes.** The numbers of rows, sequences, page-table columns and moves are rounded up (`sizes_for`): rows to powers of two up to 64 and
  multiples of 64 beyond, sequences to powers of two (or one more, see below), columns and moves to powers of two.
* **Padding.** The rows that are missing belong to dummy sequences, at least one (unless the numbers fit exactly), each with at least one
  row and no more than `MAX_ROWS`. They stand behind the live ones: `row_starts` covers them, `lengths` says 0, their page tables name
  scratch pages that no sequence owns (`KVPool.scratch`), and their masks let a row see its sequence's first row and itself. So what
  padding writes and reads is in the scratch pages, and live rows neither see it nor are seen; what a live row's output is made of is
  the same as without padding. Moves are padded with "nothing" (-1). `logit_rows` is a permutation of all rows, those asked for
  first; behind the others nothing is drawn (`warp` is 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specfx.engines.paged import as_int64
from specfx.kernels.triton_common import power_of_two
from specfx.passes.epilogue import KEYS, WARP
from specfx.passes.mtp_head import NEXT_IDS
from specfx.runtime.tree import MAX_ROWS

_LEAST_MOVES = 32
_TAILS = {"input_ids": 0, "position_ids": 0, "lengths": 0, "moves": -1, NEXT_IDS: 1}
"""What stands behind the live values. The token behind each dummy row (1) is none that they hold (0): a walk of theirs ends at once."""
KNOWN_INPUTS = {"input_ids", "position_ids", "page_table", "lengths", "row_starts", "moves", "tree_mask"}
KNOWN_INPUTS |= {"logit_rows", KEYS, WARP, NEXT_IDS}
"""All inputs of a step that are made on the host."""

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Sizes:
    """The shape of one recording: rows and sequences with padding, columns of the page table, moves."""

    rows: int
    sequences: int
    columns: int
    moves: int


def _padded_rows(rows: int) -> int:
    return power_of_two(rows) if rows <= MAX_ROWS else -(-rows // MAX_ROWS) * MAX_ROWS


def sizes_for(rows: int, sequences: int, columns: int, moves: int, scratch_pages: int = 1) -> Sizes:
    """The recording that serves a forward of `rows` rows of `sequences` sequences, each of at most `MAX_ROWS` rows."""
    padded = power_of_two(sequences)
    if padded > sequences or rows != _padded_rows(rows):
        if padded == sequences:
            padded += 1
        rows = _padded_rows(rows + padded - sequences)
    return Sizes(rows, padded, power_of_two(columns, power_of_two(scratch_pages)), power_of_two(moves, _LEAST_MOVES))


def dummy_rows(rows: int, sequences: int) -> list[int]:
    """How many of `rows` rows each of so many dummy sequences takes: as evenly as can be."""
    return [rows // sequences + (i < rows % sequences) for i in range(sequences)]


_STAR = np.array([as_int64(1 | 1 << row) for row in range(MAX_ROWS)])
"""Masks of a tree of depth one: no dummy row stands further than position 1, whatever positions the model knows."""


def fill(out: Arrays, given: Arrays, scratch: Sequence[int]) -> None:
    """Write the inputs of `PagedEngine.bind` (all but the pools) into `out`, arrays of one recording's sizes, and dummies behind them."""
    ends = given["row_starts"]
    sequences, rows = len(ends) - 1, int(ends[-1])
    dummies = len(out["lengths"]) - sequences
    counts = dummy_rows(out["input_ids"].shape[1] - rows, dummies) if dummies else []
    for name, x in given.items():
        to = out[name]
        if name in _TAILS:
            to[..., : x.shape[-1]] = x
            to[..., x.shape[-1] :] = _TAILS[name]
        elif name == "row_starts":
            to[: sequences + 1] = x
            to[sequences + 1 :] = rows + np.cumsum(counts, dtype=to.dtype)
        elif name == "tree_mask":
            to[:rows] = x
            at = rows
            for count in counts:
                to[at : at + count] = _STAR[:count]
                at += count
        elif name in (KEYS, WARP):
            to[: len(x)] = x
            to[len(x) :] = 0
        elif name == "page_table":
            to[:sequences, : x.shape[1]] = x
            to[:sequences, x.shape[1] :] = 0
            to[sequences:] = scratch[0]
            to[sequences:, : len(scratch)] = scratch
        else:
            assert name == "logit_rows"
            to[: len(x)] = x
            others = np.ones(len(to), dtype=bool)
            others[x] = False
            to[len(x) :] = np.flatnonzero(others)


def inputs_like(sizes: Sizes, names: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of these names and sizes; what they hold is not said."""
    rows, sequences = sizes.rows, sizes.sequences
    shapes = {
        **{"input_ids": (1, rows), "position_ids": (1, rows), "page_table": (sequences, sizes.columns)},
        **{"lengths": (sequences,), "row_starts": (sequences + 1,), "moves": (2, sizes.moves)},
        **{KEYS: (rows, 3), WARP: (rows, 4)},
    }
    dtypes = dict.fromkeys(("page_table", "lengths", "row_starts"), torch.int32) | {WARP: torch.float64}
    return {name: torch.empty(shapes.get(name, (rows,)), dtype=dtypes.get(name, torch.int64), device="cpu") for name in names}


def nothing(names: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of a batch without sequences; filled up, it is dummies alone."""
    return {name: torch.zeros_like(x) for name, x in inputs_like(Sizes(0, 0, 0, 0), names).items()}
