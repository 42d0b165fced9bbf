"""Batches over paged KV for benchmarks of `specfx::tree_attention_`, on any device, and the same attention in plain PyTorch.

The plain forms do what the op does for a batch in which all sequences have equally many rows (their lengths may differ), without
window, softcap or sinks: append the new keys and values to the pages, gather the pages of each sequence, and attend under a mask.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specfx.runtime.tree import MAX_ROWS


@dataclass(frozen=True)
class Shape:
    """Of one call. lengths: committed tokens by sequence. rows: new rows by sequence, a random tree each (a causal run where there are
    more than a mask has bits). groups: KV heads; share: query heads of each."""

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    groups: int = 8
    share: int = 4
    dk: int = 128
    dv: int = 128
    page_size: int = 64
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def prefix_bytes(self) -> int:
        """Of the committed keys and values."""
        return sum(self.lengths) * self.groups * (self.dk + self.dv) * self.dtype.itemsize

    def __str__(self) -> str:
        counts = lambda n: f"{n[0]}x{len(n)}" if len(set(n)) == 1 else "+".join(map(str, n))  # noqa: E731
        extra = [f"window {self.window}"] * bool(self.window) + ["softcap"] * bool(self.softcap) + ["sinks"] * self.sinks
        heads = f"{self.groups * self.share}/{self.groups} heads of {self.dk}" + (f"/{self.dv}" if self.dv != self.dk else "")
        parts = [f"context {counts(self.lengths)}", f"rows {counts(self.rows)}", heads, f"pages of {self.page_size}", *extra]
        return ", ".join([*parts, str(self.dtype).removeprefix("torch.")])


@dataclass(frozen=True)
class Batch:
    """Arguments of a call. tensors: by the op's names, the pools too; the mask may be None. constants: scale, window, softcap, sinks."""

    shape: Shape
    tensors: dict[str, Any]
    constants: dict[str, Any]

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        return self.tensors["k_pages"], self.tensors["v_pages"]

    def run(self, op: Callable[..., Tensor]) -> Tensor:
        return op(**self.tensors, **self.constants)

    def with_own_pools(self) -> Batch:
        """The same arguments with copies of the pools, which a call writes."""
        return replace(self, tensors=self.tensors | {name: self.tensors[name].clone() for name in ("k_pages", "v_pages")})


def tree_masks(pick: random.Random, rows: int) -> list[int]:
    """Ancestor masks of a random tree of so many rows (row 0 is its root), as int64 words."""
    masks = [1]
    for row in range(1, rows):
        masks.append(masks[pick.randrange(row)] | 1 << row)
    return [m - (1 << 64) if m >> 63 else m for m in masks]


def make(shape: Shape, device: torch.device, seed: int = 0, free: float = float("nan"), moves: int = 0) -> Batch:
    """Random values; pages in random order. free: what stands wherever no committed token does (an op must not read it). moves: random
    ones among the committed slots, in ascending chains as an accepted path makes them."""
    pick, size = random.Random(seed), shape.page_size
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32).to(shape.dtype)

    needs = [-(-(length + rows) // size) for length, rows in zip(shape.lengths, shape.rows, strict=True)]
    order = list(range(sum(needs) + 1))  # and one that nobody owns
    pick.shuffle(order)
    spare, width = order.pop(), max(needs)
    table = torch.full((len(needs), width), spare, dtype=torch.int32)
    for s, need in enumerate(needs):
        table[s, :need] = torch.tensor([order.pop() for _ in range(need)], dtype=torch.int32)
    pages = sum(needs) + 1
    pools = {
        "k_pages": torch.full((pages, size, shape.groups, shape.dk), free, dtype=shape.dtype, device=device),
        "v_pages": torch.full((pages, size, shape.groups, shape.dv), free, dtype=shape.dtype, device=device),
    }
    slots: list[list[int]] = []
    for s, length in enumerate(shape.lengths):
        position = torch.arange(length)
        place = table[s].long()[position // size] * size + position % size
        slots.append(place.tolist())
        for pool in pools.values():
            pool.flatten(0, 1)[place.to(device)] = normal(length, *pool.shape[2:])
    total = sum(shape.rows)
    masks = [w for rows in shape.rows for w in (tree_masks(pick, rows) if rows <= MAX_ROWS else [0] * rows)]
    pairs = [(-1, -1)]
    for own in slots if moves else []:
        last = len(own) - 2 * moves
        pairs += [(own[last + 2 * i + 1], own[last + i]) for i in range(moves) if last >= 0]
    starts = torch.tensor([0, *shape.rows]).cumsum(0, dtype=torch.int32)
    host = {
        "tree_mask": torch.tensor(masks, dtype=torch.int64),
        "page_table": table,
        "lengths": torch.tensor(shape.lengths, dtype=torch.int32),
        "row_starts": starts,
        "moves": torch.tensor(pairs, dtype=torch.int64).t().contiguous(),
    }
    tensors = {
        "q": normal(total, shape.groups * shape.share, shape.dk),
        "k": normal(total, shape.groups, shape.dk),
        "v": normal(total, shape.groups, shape.dv),
        **{name: x.to(device) for name, x in host.items()},
        **pools,
    }
    sinks = normal(shape.groups * shape.share) if shape.sinks else None
    constants = {"scale": shape.dk**-0.5, "window": shape.window, "softcap": shape.softcap, "sinks": sinks}
    return Batch(shape, tensors, constants)


def uniform(batch: int, context: int, rows: int, **shape: Any) -> Shape:
    """A batch of equal sequences."""
    return Shape((context,) * batch, (rows,) * batch, **shape)


# --- plain PyTorch --------------------------------------------------------------------------------------------------------------


def append_and_gather(k: Tensor, v: Tensor, page_table: Tensor, lengths: Tensor, k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
    """Write the new rows into the pages; all keys and values of the page table, ``[S, P * page_size, H, D]`` each."""
    size, rows = k_pages.shape[1], k.shape[0] // lengths.shape[0]
    position = lengths.long()[:, None] + torch.arange(rows, device=k.device)
    slots = (page_table.long().gather(1, position // size) * size + position % size).flatten()
    k_pages.view(-1, *k.shape[1:]).index_copy_(0, slots, k)
    v_pages.view(-1, *v.shape[1:]).index_copy_(0, slots, v)
    table = page_table.long()
    return k_pages[table].flatten(1, 2), v_pages[table].flatten(1, 2)


def visible(tree_mask: Tensor, lengths: Tensor, columns: int) -> Tensor:
    """bool ``[S, R, columns]``: which positions a row sees."""
    masks = tree_mask.view(lengths.shape[0], -1, 1)
    row = torch.arange(columns, device=lengths.device) - lengths.long()[:, None, None]  # of the sequence, where not negative
    return (row < 0) | ((row < masks.shape[1]) & ((masks >> row.clamp(0, MAX_ROWS - 1)) & 1 != 0))


def _grouped(q: Tensor, tree_mask: Tensor, lengths: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The query heads of a group as further rows, so that no key is repeated, ``[S, G, share * R, D]``, and their mask."""
    sequences, groups = lengths.shape[0], keys.shape[2]
    share = q.shape[1] // groups
    grouped = q.view(sequences, q.shape[0] // sequences, groups, share, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return grouped, visible(tree_mask, lengths, keys.shape[1])[:, None].repeat(1, 1, share, 1)


def _flat(out: Tensor, q: Tensor) -> Tensor:
    """What `_grouped` rows gave, ``[T, Hq, D]``."""
    sequences, groups = out.shape[:2]
    return out.view(sequences, groups, q.shape[1] // groups, -1, out.shape[3]).permute(0, 3, 1, 2, 4).reshape(q.shape[0], q.shape[1], -1)


def sdpa_form(
    q: Tensor, k: Tensor, v: Tensor, tree_mask: Tensor, page_table: Tensor, lengths: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float
) -> Tensor:
    """torch's fused attention over the gathered pages."""
    keys, values = append_and_gather(k, v, page_table, lengths, k_pages, v_pages)
    grouped, mask = _grouped(q, tree_mask, lengths, keys)
    out = F.scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), mask, scale=scale)
    return _flat(out, q)


def softmax_form(
    q: Tensor, k: Tensor, v: Tensor, tree_mask: Tensor, page_table: Tensor, lengths: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float
) -> Tensor:
    """The same written out: products, a masked softmax, products."""
    keys, values = append_and_gather(k, v, page_table, lengths, k_pages, v_pages)
    grouped, mask = _grouped(q, tree_mask, lengths, keys)
    scores = torch.matmul(grouped, keys.permute(0, 2, 3, 1)).float() * scale
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
    return _flat(torch.matmul(probs, values.transpose(1, 2)), q)


PLAIN_FORMS: dict[str, Callable[..., Tensor]] = {"gather + sdpa": sdpa_form, "gather + softmax": softmax_form}


def plain_arguments(batch: Batch) -> tuple[Any, ...]:
    """Of a plain form, in order."""
    names = ("q", "k", "v", "tree_mask", "page_table", "lengths", "k_pages", "v_pages")
    return (*[batch.tensors[name] for name in names], batch.constants["scale"])


def flex_attention_call(batch: Batch, compiled: bool) -> Callable[[], Tensor]:
    """FlexAttention over the same keys and values, made contiguous beforehand with the new rows in their places, and a block mask made
    beforehand: what it does when all that paging and trees cost it is given for free. Returns ``[T, Hq, Dv]``."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    x, own = batch.tensors, batch.with_own_pools().tensors
    keys, values = append_and_gather(x["k"], x["v"], x["page_table"], x["lengths"], own["k_pages"], own["v_pages"])
    lengths, sequences = x["lengths"].long(), x["lengths"].shape[0]
    rows, longest = x["q"].shape[0] // sequences, int(lengths.max()) + x["q"].shape[0] // sequences
    keys, values = (y[:, :longest].transpose(1, 2).contiguous() for y in (keys, values))
    queries = x["q"].view(sequences, rows, x["q"].shape[1], -1).transpose(1, 2).contiguous()
    masks = x["tree_mask"].view(sequences, rows)

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        row = kv - lengths[b]
        return (row < 0) | ((row < rows) & ((masks[b, q] >> row.clamp(0, MAX_ROWS - 1)) & 1 != 0))

    blocks = create_block_mask(mask, sequences, None, rows, longest, device=str(x["q"].device))
    attend: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def call() -> Tensor:
        out = attend(queries, keys, values, block_mask=blocks, scale=batch.constants["scale"], enable_gqa=batch.shape.share > 1)
        return out.transpose(1, 2).reshape(x["q"].shape[0], x["q"].shape[1], -1)

    return call
