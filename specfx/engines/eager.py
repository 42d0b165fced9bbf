"""The eager engine: the stock model itself, used where no captured graph was proven right.

Every sequence has a cache of its own in which all attention layers are full, also those with a sliding window: the rows of a tree that
were not chosen can then be taken out again. Recurrent and convolutional states are put back instead, so a model that has them
verifies chains (`specfx.engines.eager_past`). Sequences run one after another.

A causal run (a prompt, a chain of drafts) goes through the model with no mask given, so that transformers builds its own. The rows of
a branching tree need a 4-D mask, which transformers hands to the layers as it is: `TreeMasks` therefore knows windows and chunks,
and gives one mask for each layer type where the model takes them so. What a model can verify is not assumed but found out once, by
`specfx.engines.eager_probe`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from specfx.capture import clone_sharing_storage
from specfx.engines.base import Rows, RowsOutput, draws_of
from specfx.engines.eager_past import MOST_UNFED, Past
from specfx.engines.eager_probe import STAGE, cause_of, probe
from specfx.errors import LoweringError, Reason, Refusal
from specfx.kernels.keyed_sample import keyed_sample
from specfx.kernels.load import load
from specfx.runtime.tree import EMPTY_TREE, DraftTree

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_KNOWN_WINDOWS = {"sliding_window", "max_window_layers", "attention_chunk_size"}


class EagerEngine:
    """`specfx.engines.base.Engine` over a clone of `model` that shares its weights; `model` itself is never modified.

    verifies: "trees", "chains" or "nothing", as found by a probe at construction. refusals: why it isn't more, one for each level
    that failed. model: the clone, None if there could be none. Construction doesn't raise for any `PreTrainedModel`.
    """

    name = "eager"
    max_rows = 4096

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: PreTrainedModel | None = None
        self.verifies = "nothing"
        self.drafts = False
        self.refusals: list[Refusal] = []
        self._sequences: dict[int, Past] = {}
        try:
            self.model = clone_sharing_storage(model)
            _use_maskable_attention(self.model)
            takes = inspect.signature(self.model.forward).parameters
            self._takes_positions = "position_ids" in takes
            self._cache_name = "cache_params" if "cache_params" in takes else "past_key_values"
            self._head = self.model.get_output_embeddings()
            self._device = self.model.device
        except Exception as error:
            self.refusals.append(Refusal(STAGE, Reason.CHAINS_UNVERIFIABLE, f"the model can't be cloned: {cause_of(error)}"))
            return
        self.verifies, self.refusals = probe(self)
        self._sequences.clear()
        try:  # for the choices: their reference sorts the vocabulary behind every row
            load(self._device)
        except LoweringError as error:
            self.refusals.append(Refusal("sampling kernel", Reason.NO_KERNEL, str(error), "tokens are drawn by the reference, slowly"))

    def add(self, seq: int, capacity: int, source: int | None = None, shared: int = 0) -> None:
        """Begin sequence `seq`. Its cache grows as it must, so `capacity` (tokens) reserves nothing. Raises `ValueError` for a used id."""
        if seq in self._sequences:
            raise ValueError(f"sequence {seq} exists already; remove it before its id is used again")
        assert self.model is not None
        past = self._sequences[seq] = Past(self.model.config)
        past.source, past.shared = source, shared

    def extend(self, seq: int, capacity: int) -> None:
        """As `add`: nothing is reserved."""

    def inherit(self, seq: int) -> int:
        """See `Engine.inherit`. The keys and values are copied; a source that has gone, or that has states, leaves nothing."""
        past = self._sequences[seq]
        source = None if past.source is None else self._sequences.get(past.source)
        if source is not None:
            past.copy_beginning(source, past.shared)
        return past.length

    def trim(self, seq: int) -> None:
        self._sequences[seq].roll_back()

    def remove(self, seq: int) -> None:
        self._sequences.pop(seq, None)

    def length(self, seq: int) -> int:
        return self._sequences[seq].length

    def commit(self, seq: int, rows: Sequence[int]) -> None:
        """See `Engine.commit`. Raises `ValueError` if `rows` aren't ascending rows of the last forward."""
        past, rows = self._sequences[seq], list(rows)
        if rows != sorted(set(rows)) or (rows and not 0 <= rows[0] <= rows[-1] < len(past.rows)):
            raise ValueError(f"rows {rows} are not an ascending path among the {len(past.rows)} rows of the last forward of {seq}")
        past.commit(rows)

    def forward(self, batch: Sequence[Rows]) -> list[RowsOutput]:
        """See `Engine.forward`. Raises `ValueError` for a branching tree on a model that can only verify chains."""
        if len({rows.seq for rows in batch}) != len(batch):
            raise ValueError("each sequence may appear once in a forward")
        if self.verifies != "trees" and any(_branches(rows) for rows in batch):
            raise ValueError(f"this engine verifies {self.verifies}: {'; '.join(map(str, self.refusals))}")
        return [self.run(rows) for rows in batch]

    @cached_property
    def _tree_masks(self) -> TreeMasks:
        assert self.model is not None
        if not self._takes_positions:  # with few tokens the error can be too small to be seen
            raise NotImplementedError("the model takes no position_ids, so the rows of a tree can't be placed by their depth")
        return TreeMasks(self.model)

    @torch.no_grad()
    def run(self, rows: Rows) -> RowsOutput:
        """The forward of one sequence's rows, whatever `verifies` says (the probe calls this)."""
        past, tree = self._sequences[rows.seq], rows.tree or EMPTY_TREE
        past.roll_back()
        if len(past.unfed) >= MOST_UNFED:
            self._call(past, [], [], 1)
            past.fed()
        depths = tree.depths() if rows.tree is not None else list(range(rows.count))
        mask = self._tree_masks(tree, past.length) if _branches(rows) else None
        keys, warp = (table.to(self._device) for table in draws_of([rows], [past.length]))
        tokens = [*rows.tokens, *tree.tokens]
        logits, hidden = self._call(past, tokens, depths, rows.reads, mask)
        past.rows = tokens
        return RowsOutput(keyed_sample(logits, keys, warp).tolist(), logits, hidden)

    def _call(
        self, past: Past, tokens: Sequence[int], depths: Sequence[int], read: int, mask: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model over the unfed tokens and `tokens`, at `depths` behind the committed ones: logits of the last `read` of them
        (``[read, V]``), hidden states of `tokens` (``[n, H]``, None if the model's head can't be found)."""
        assert self.model is not None
        inputs: dict[str, Any] = {"input_ids": torch.tensor([[*past.unfed, *tokens]], device=self._device)}
        if self._takes_positions:
            positions = [*range(past.held, past.length), *(past.length + depth for depth in depths)]
            inputs["position_ids"] = torch.tensor([positions], device=self._device)
        if mask is not None:
            inputs["attention_mask"] = mask
        head = _HeadInput(read)
        hook = self._head.register_forward_pre_hook(head) if self._head is not None else None
        past.begin()
        try:
            output = self.model(**inputs, **{self._cache_name: past.cache}, use_cache=True, return_dict=True)
        finally:
            if hook is not None:
                hook.remove()
        n = len(past.unfed) + len(tokens)
        hidden = head.value[0, len(past.unfed) :] if head.value is not None and head.value.shape[:2] == (1, n) else None
        return output.logits[0, -read:], hidden


class _HeadInput:
    """A forward pre-hook of the LM head: keeps its input in `value`, and lets only the last `read` rows through."""

    def __init__(self, read: int) -> None:
        self.read = read
        self.value: torch.Tensor | None = None

    def __call__(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.value = args[0]
        return (args[0][:, -self.read :], *args[1:]) if args[0].ndim == 3 else None


def _branches(rows: Rows) -> bool:
    return rows.tree is not None and not rows.tree.is_chain


def _use_maskable_attention(model: PreTrainedModel) -> None:
    """Set the clone to an attention that takes 4-D masks: the one it has if that is "sdpa" or "eager", else one of these."""
    if model.config.get_text_config(decoder=True)._attn_implementation in ("sdpa", "eager"):
        return
    model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")


class TreeMasks:
    """Makes the additive masks of draft trees for one model.

    kinds: its kinds of attention layers. by_type: whether it takes a dict of masks, one for each kind (else there is one kind).
    Raises `NotImplementedError` if the model has layers of another kind.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config.get_text_config(decoder=True)
        self.kinds, self.by_type = _layer_kinds(model)

    def __call__(self, tree: DraftTree, past: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks for the rows of `tree` behind `past` committed tokens: ``[1, 1, n, past + n]`` of the model's dtype (0 or its lowest).

        A row sees the committed tokens, its ancestors and itself. Of those, at position ``p``, a layer with a sliding window sees
        positions above ``p - window``, one with chunks those in the chunk of ``p``.
        """
        ancestors = torch.tensor([[mask >> row & 1 for row in range(len(tree) + 1)] for mask in tree.ancestor_masks()], dtype=torch.bool)
        seen = torch.cat([torch.ones(len(tree) + 1, past, dtype=torch.bool), ancestors], dim=1)
        query = torch.tensor(tree.depths())[:, None] + past
        key = torch.cat([torch.arange(past), query[:, 0]])[None]
        masks = {}
        for kind in self.kinds:
            visible = seen
            if kind == SLIDING:
                visible = seen & (key > query - self.config.sliding_window)
            elif kind == CHUNKED:
                visible = seen & (key // self.config.attention_chunk_size == query // self.config.attention_chunk_size)
            mask = torch.zeros(visible.shape, dtype=self.model.dtype).masked_fill_(~visible, torch.finfo(self.model.dtype).min)
            masks[kind] = mask[None, None].to(self.model.device)
        return masks if self.by_type else masks[self.kinds[0]]


def _layer_kinds(model: PreTrainedModel) -> tuple[list[str], bool]:
    """See `TreeMasks`."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_heterogeneous", False):
        raise NotImplementedError("the layers have configurations of their own (per_layer_config)")
    for key, value in config.to_dict().items():
        if _names_a_window(key, value) and not (key in _KNOWN_WINDOWS or key.endswith("_pattern")):
            raise NotImplementedError(f"config.{key}={value} may limit attention in a way that tree masks don't know")
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    listed = set(getattr(config, "layer_types", None) or ())
    if unknown := listed - {FULL, SLIDING, CHUNKED}:
        raise NotImplementedError(f"layers of type {', '.join(sorted(unknown))}")
    sources = [_forward_source(cls) for cls in {type(module) for module in model.modules()}]
    if any(re.search(r"isinstance\([^\n]*attention_mask, dict\)", source) for source in sources):
        return sorted(listed | {FULL} | ({SLIDING} if window else set())), True
    if len(listed) > 1:
        raise NotImplementedError(f"layers of types {', '.join(sorted(listed))}, but the model takes one mask for all")
    stored = any(_names_a_window(key, value) for module in model.modules() for key, value in vars(module).items())
    for kind, size, maker in ((SLIDING, window, "create_sliding_window_causal_mask"), (CHUNKED, chunk, "create_chunked_causal_mask")):
        if size and (stored or any(maker in source for source in sources)):
            return [kind], False
    return [FULL], False  # also where the config names a window that the model's code never asks for


def _names_a_window(key: str, value: Any) -> bool:
    return ("window" in key or "chunk" in key) and type(value) is int and value > 0


def _forward_source(cls: type[torch.nn.Module]) -> str:
    """The source of `forward`, to recognise transformers' idioms in: a model asks if its mask is a dict, or makes a windowed one."""
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError):  # a class without source: it gets one mask, and the probe tells whether that is right
        return ""
