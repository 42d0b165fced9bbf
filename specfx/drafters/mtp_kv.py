"""What a draft head remembers of a sequence: keys and values, an indexer's keys, and the inputs of short convolutions.

Decoder layers see a `HeadKV` as transformers' cache; its methods are all of that interface that the families' layers use. Every kind of
state is kept by row, so that going back to an earlier row needs nothing but a smaller `length`.
"""

from __future__ import annotations

import torch

_BACK = 128
"""Rows that a convolution can go back: twice the rows of the largest draft."""


class HeadKV:
    """The state of a head's one layer for one sequence, or for a batch in step: rows ``0 .. length - 1`` are in use.

    A layer's methods write the rows of one forward behind `length` and leave it where it is; who runs the layer moves it on. It may be
    set back, which forgets the rows beyond it: any number of them, or `_BACK` where the layer has convolutions, of whose inputs only
    the last are kept.
    """

    def __init__(self) -> None:
        self.length = 0
        self._rows: dict[tuple[str, int], torch.Tensor] = {}
        self._inputs: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}  # first row that is kept, inputs [B, C, rows]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int = 0, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``[B, KV heads, n, D]`` and return views of all rows, the new ones included."""
        return self._write(("keys", layer_idx), keys, 2), self._write(("values", layer_idx), values, 2)

    def update_indexer(self, keys: torch.Tensor, layer_idx: int = 0) -> torch.Tensor:
        """The same for the keys ``[B, n, D]`` by which sparse attention (DSA) picks the rows that it looks at."""
        return self._write(("indexer", layer_idx), keys, 1)

    def update_conv_state(
        self, inputs: torch.Tensor, layer_idx: int = 0, state_idx: int = 0, conv_kernel_size: int = 1, **_: object
    ) -> torch.Tensor:
        """Write a causal convolution's inputs ``[B, C, n]``; returns them behind the ``conv_kernel_size - 1`` before them (fewer at the
        start of the sequence). Raises `ValueError` if `length` was set back further than inputs are kept."""
        reach = conv_kernel_size - 1
        first, kept = self._inputs.get((layer_idx, state_idx), (0, inputs[..., :0]))
        known = self.length - first
        if known < min(reach, self.length) or known > kept.shape[-1]:
            raise ValueError(f"a convolution can't go on from row {self.length}: inputs are kept of rows {first}..{first + kept.shape[-1]}")
        kept = torch.cat([kept[..., :known], inputs], dim=-1)
        drop = max(0, kept.shape[-1] - reach - _BACK)
        self._inputs[layer_idx, state_idx] = first + drop, kept[..., drop:]
        return kept[..., max(0, known - reach) :]

    def get_conv_state(self, *_: object, **__: object) -> None:
        """No state to be updated in place: the layer takes `update_conv_state` for single rows too."""

    def has_previous_state(self, *_: object) -> bool:
        """What transformers 5.17 asks instead of `get_conv_state`."""
        return False

    def get_seq_length(self, *_: object) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the next row as transformers' `MtpCache` counts it: layer k is k + 1 tokens ahead of the target."""
        return self.length + layer_idx + 1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(rows with `query_length` more, position of the first), as in `MtpCache`."""
        return self.length + query_length, layer_idx + 1

    def _write(self, name: tuple[str, int], new: torch.Tensor, dim: int) -> torch.Tensor:
        """`new` into preallocated rows, which grow by doubling."""
        rows, end = self._rows.get(name), self.length + new.shape[dim]
        if rows is None or rows.shape[dim] < end:
            shape = list(new.shape)
            shape[dim] = max(256, 2 * end)
            grown = new.new_empty(shape)
            if rows is not None:
                grown.narrow(dim, 0, self.length).copy_(rows.narrow(dim, 0, self.length))
            rows = self._rows[name] = grown
        rows.narrow(dim, self.length, new.shape[dim]).copy_(new)
        return rows.narrow(dim, 0, end)
