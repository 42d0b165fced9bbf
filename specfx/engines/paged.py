"""The engine over a rewritten graph: packs ragged rows into the graph's flat inputs, and unpacks what it returns.

`PagedEngine` serves two of the three engines, which differ only in what is called: the graph run node by node as it is ("graph"), or
the artifact that Inductor made of it ("compiled"). The acceptance gate calls a third thing: the graph on the ops' references. Inputs
are bound by the names of the graph's placeholders, so passes may be switched off: without the tree mask the engine verifies chains,
without the epilogue it selects logits and makes the choices itself. With a head stitched in (`mtp_head`), outputs bring the next
draft where it is asked for.

What changes from step to step is bound on the host; `call` brings it to the device (`specfx.engines.transfer`), or copies it into the
static inputs of a CUDA graph (`specfx.engines.cuda_graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from specfx.drafters.mtp_tree import trees
from specfx.engines import transfer
from specfx.engines.base import Rows, RowsOutput, draws_of
from specfx.kernels.keyed_sample import keyed_sample
from specfx.kernels.library import REFERENCES
from specfx.passes.draft_on_demand import DRAFTING
from specfx.passes.epilogue import KEYS, WARP
from specfx.passes.framework import calls, copy_module, placeholder
from specfx.passes.mtp_head import NEXT_IDS, TAILS
from specfx.runtime.kv_pool import KVPool, LayerShape
from specfx.runtime.tree import EMPTY_TREE, MAX_ROWS, DraftTree

aten = torch.ops.aten
_MOST_ROWS = 4096
_GATHERED_BYTES = 1 << 30

Call = Callable[..., Sequence[Tensor]]


def on_references(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every specfx op replaced by its reference: the specification, run as it is."""
    module = copy_module(module)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in REFERENCES:
            node.target = REFERENCES[node.target]
    module.recompile()
    return module


def most_rows(module: fx.GraphModule) -> int:
    """Rows for which gathered expert weights (a copy for each row and expert that it chose) stay within `_GATHERED_BYTES`."""
    ids = placeholder(module, "input_ids")
    assert ids is not None
    rows = ids.meta["val"].shape[1].node.expr
    widest = 1
    for node in calls(module, aten.index.Tensor, aten.index_select.default):
        source, value = node.args[0], node.meta["val"]
        if isinstance(source, fx.Node) and source.op == "get_attr" and value.dim() == 3 and isinstance(value.shape[0], torch.SymInt):
            experts_a_row = sympy.simplify(value.shape[0].node.expr / rows)
            if experts_a_row.is_number:
                widest = max(widest, int(experts_a_row) * value.shape[1] * value.shape[2] * value.element_size())
    return max(1, min(_MOST_ROWS, _GATHERED_BYTES // widest))


def as_int64(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _host(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def _drafts(batch: Sequence[Rows]) -> bool:
    """Whether the next draft is made: where it is asked for, and behind trees with branches (`specfx.passes.draft_on_demand`)."""
    return any(rows.drafts or (rows.tree is not None and not rows.tree.is_chain) for rows in batch)


class PagedEngine:
    """`specfx.engines.base.Engine` over a graph that the paged-KV pass has rewritten. call: takes the graph's inputs in order, on
    `device`; it is kept as the attribute `direct`, beside the attribute `call`, which takes what `bind` makes.

    draft_rows: rows behind the committed ones that a stitched head's draft steps need.
    """

    def __init__(
        self, name: str, module: fx.GraphModule, call: Call, pool_size: str | int | float, device: torch.device, draft_rows: int = 0
    ) -> None:
        self.name, self.module, self.direct = name, module, call
        self.call = transfer.uploading(call, device)
        self.draft_rows = draft_rows
        inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.inputs = [str(n.target) for n in inputs]
        self.verifies = "trees" if "tree_mask" in self.inputs else "chains"
        pools = [n for n in inputs if n.target.startswith(("k_pages_", "v_pages_"))]
        shapes = [LayerShape(n.meta["val"].shape[2], n.meta["val"].shape[3], n.meta["val"].dtype) for n in pools]
        self.pool_names = [str(n.target) for n in pools]
        self.pool = KVPool(shapes, pools[0].meta["val"].shape[1], pool_size, device)
        self._selects = "logit_rows" in self.inputs
        self.drafts = NEXT_IDS in self.inputs
        self.device = device
        self._scratch_tokens = 0
        tails = placeholder(module, TAILS)
        self._no_tail = None if tails is None else torch.zeros(tails.meta["val"].shape[1:], dtype=tails.meta["val"].dtype, device=device)
        self._tails: dict[int, Tensor] = {}  # as of the last commit
        self._new_tails: dict[int, Tensor] = {}  # as of the last forward
        self.max_rows = most_rows(module)

    def resize_pool(self, size: str | int | float) -> None:
        """A new, empty pool; sequences in the old one are lost."""
        self.pool = KVPool(self.pool.shapes, self.pool.page_size, size, self.device)
        self.pool.scratch(self._scratch_tokens)

    def reserve_scratch(self, tokens: int) -> None:
        """Let this pool and all later ones have pages that no sequence owns (see `KVPool.scratch`)."""
        self.pool.scratch(tokens)
        self._scratch_tokens = tokens

    def add(self, seq: int, capacity: int, source: int | None = None, shared: int = 0) -> None:
        # the stitched head's row of the last shared token is paired with the token behind it, which may not be shared
        self.pool.add(seq, capacity + self.draft_rows, source, max(0, shared - self.drafts))

    def extend(self, seq: int, capacity: int) -> None:
        self.pool.extend(seq, capacity + self.draft_rows)

    def inherit(self, seq: int) -> int:
        return self.pool.inherit(seq)

    def trim(self, seq: int) -> None:
        self.pool.trim(seq)

    def remove(self, seq: int) -> None:
        self.pool.remove(seq)
        self._tails.pop(seq, None)
        self._new_tails.pop(seq, None)

    def length(self, seq: int) -> int:
        return self.pool.length(seq)

    def commit(self, seq: int, rows: Sequence[int]) -> None:
        self.pool.commit(seq, rows)
        if rows and seq in self._new_tails:
            self._tails[seq] = self._new_tails.pop(seq)

    def bind(self, batch: Sequence[Rows]) -> dict[str, Tensor]:
        """The graph's inputs for `batch`, by name; all but the pools are on the host."""
        seqs, counts = [r.seq for r in batch], [r.count for r in batch]
        if len(set(seqs)) != len(seqs):
            raise ValueError("each sequence may appear once in a forward")
        tokens: list[int] = []
        masks: list[int] = []
        positions: list[int] = []
        starts = [0]
        logit_rows: list[int] = []
        next_ids: list[int] = []
        for rows, count in zip(batch, counts, strict=True):
            tokens += rows.tokens
            next_ids += [*rows.tokens[1:], -1 if rows.following is None else rows.following]
            next_ids += [-1] * (count - len(rows.tokens))
            if rows.tree is not None:
                if self.verifies != "trees" and not rows.tree.is_chain:
                    raise ValueError("this engine verifies chains only: the tree_mask pass did not run")
                tokens += rows.tree.tokens
                masks += map(as_int64, rows.tree.ancestor_masks())
            elif count <= MAX_ROWS:
                masks += [as_int64((2 << i) - 1) for i in range(count)]
            else:
                masks += [0] * count
            length = self.pool.length(rows.seq)
            positions += range(length, length + count)
            starts.append(starts[-1] + count)
            logit_rows += range(starts[-1] - rows.reads, starts[-1])
        lengths = self.pool.lengths(seqs)
        keys, warp = draws_of(batch, lengths)
        moves = self.pool.begin(seqs, counts)
        tails = {} if self._no_tail is None else {TAILS: torch.stack([self._tails.get(seq, self._no_tail) for seq in seqs])}
        return {
            "input_ids": _host(tokens)[None],
            "position_ids": _host(positions)[None],
            "page_table": self.pool.page_table(seqs),
            "lengths": _host(lengths, torch.int32),
            "row_starts": _host(starts, torch.int32),
            "moves": moves,
            "tree_mask": _host(masks),
            "logit_rows": _host(logit_rows),
            KEYS: keys,
            WARP: warp,
            NEXT_IDS: _host(next_ids),
            **({DRAFTING: torch.tensor(_drafts(batch))} if DRAFTING in self.inputs else {}),
            **tails,
            **dict(zip(self.pool_names, self.pool.pools, strict=True)),
        }

    @torch.no_grad()
    def forward(self, batch: Sequence[Rows]) -> list[RowsOutput]:
        inputs = self.bind(batch)
        with transfer.on_device(self.device):
            logits, hidden, *rest = self.call(*[inputs[name] for name in self.inputs])
            logits, hidden = logits[0], hidden[0]
            if not self._selects:
                logits = logits[inputs["logit_rows"].to(self.device)]
                rest = [keyed_sample(logits, inputs[KEYS].to(self.device), inputs[WARP].to(self.device))]
            if self._no_tail is not None:
                self._new_tails |= zip([rows.seq for rows in batch], rest[4].clone(), strict=True)
            chosen, *drafted = transfer.to_host(rest[:4])
        choice: list[int] = chosen.tolist()
        drafts: Sequence[DraftTree | None] = [EMPTY_TREE if self.drafts else None] * len(batch)
        if self.drafts and _drafts(batch):
            drafts = trees(tuple(drafted))
        outputs, row, read = [], 0, 0
        for rows, draft in zip(batch, drafts, strict=True):
            count, reads = rows.count, rows.reads
            outputs.append(RowsOutput(choice[read : read + reads], logits[read : read + reads], hidden[row : row + count], draft))
            row, read = row + count, read + reads
        return outputs


def graph_engine(module: fx.GraphModule, pool_size: str | int | float, device: torch.device, draft_rows: int = 0) -> PagedEngine:
    """The engine that runs `module` as it is."""
    runnable: Any = module
    return PagedEngine("graph", module, runnable, pool_size, device, draft_rows)
