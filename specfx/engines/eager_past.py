"""The past of one sequence in the eager engine: keys and values and, where the model has them, recurrent and convolutional states.

Keys and values of rejected rows are cut off. A state that has seen a row can't forget it, so with states:

1. Before a forward the states are copied: the states alone, whose size doesn't grow with the text, and no keys or values.
2. If all rows of the forward are committed, the states are right as they are, and the copies go.
3. If not, the copies take the states' place, keys and values are cut to the same point, and the committed rows are left *unfed*: the
   next forward takes them again, before its own rows. So a rejection costs some rows of the next forward, and no forward.
4. Where `MOST_UNFED` tokens or more are unfed, they get a forward of their own before the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

MOST_UNFED = 16
"""Unfed tokens that are fed by themselves. If a forward of one row takes as long as 50 more rows, and two rows are committed at a time,
``sqrt(2 * 2 * 50)`` is best."""
_STATE = ("conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")
"""Attributes of a cache layer with state (transformers 5.23): dicts, by the number of the state."""


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache whose attention layers are full, also those with a sliding window; with the model's layers of states."""
    types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    kinds = (DYNAMIC_LAYER_TYPE_MAPPING.get(name, DynamicLayer) for name in types)
    if not any(issubclass(kind, LinearAttentionCacheLayerMixin) for kind in kinds):
        return DynamicCache()
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer):
            cache.layers[i] = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[i] = DynamicLayer()
    return cache


def state_layers(cache: DynamicCache) -> list[LinearAttentionCacheLayerMixin]:
    """The layers that hold recurrent or convolutional states."""
    return [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]


class Snapshot:
    """Copies of the states of a cache; nothing else of it."""

    @torch.no_grad()
    def __init__(self, cache: DynamicCache) -> None:
        self.saved = [(layer, {name: _copied(getattr(layer, name)) for name in _STATE}) for layer in state_layers(cache)]

    def put_back(self) -> None:
        """The copies become the states, and belong to the cache from now on."""
        for layer, values in self.saved:
            for name, value in values.items():
                setattr(layer, name, value)


def _copied(states: dict[int, Any]) -> dict[int, Any]:
    return {i: value.clone() if isinstance(value, torch.Tensor) else value for i, value in states.items()}


class Past:
    """State of one sequence. length: committed tokens. rows: tokens of a forward's rows that are not committed yet. unfed: the last of
    the committed tokens, as far as the cache doesn't hold them (none without states). source, shared: as in `Engine.add`.

    cache: holds the committed tokens but the unfed ones; after a forward, also these and the rows.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.cache = new_cache(config)
        self.has_states = bool(state_layers(self.cache))
        self.length = 0
        self.rows: list[int] = []
        self.unfed: list[int] = []
        self.source: int | None = None
        self.shared = 0
        self._snapshot: Snapshot | None = None

    @property
    def held(self) -> int:
        """Committed tokens that the cache holds."""
        return self.length - len(self.unfed)

    @torch.inference_mode()
    def copy_beginning(self, other: Past, tokens: int) -> None:
        """Begin with copies of the first `tokens` committed tokens' keys and values, or with as many as `other` has; with nothing where
        there are states, which can't be cut."""
        if self.has_states:
            return
        self.length = min(tokens, other.length)
        layers: list[Any] = other.cache.layers
        for i, layer in enumerate(layers):
            if getattr(layer, "keys", None) is not None:  # else it shares the keys of another
                self.cache.update(*(x[..., : self.length, :].clone() for x in (layer.keys, layer.values)), i)

    def begin(self) -> None:
        """Before a forward of the unfed tokens and new rows: keep what undoes it."""
        if self.has_states:
            self._snapshot = Snapshot(self.cache)

    def fed(self) -> None:
        """After a forward of which all is committed: the cache holds all committed tokens."""
        self.unfed, self._snapshot = [], None

    def roll_back(self) -> None:
        """Forget the last forward as far as it isn't committed, also one that failed half way."""
        self.commit(())

    @torch.inference_mode()
    def commit(self, rows: Sequence[int]) -> None:
        """Keep these of the uncommitted rows, ascending, behind the committed tokens."""
        tokens = [self.rows[row] for row in rows]
        if not self.has_states:
            self._cut(rows)
        elif tokens and len(tokens) == len(self.rows):
            self.fed()
        else:
            if self._snapshot is not None:
                self._snapshot.put_back()
                self._snapshot = None
            self._cut(())
            self.unfed += tokens
        self.length += len(tokens)
        self.rows = []

    def _cut(self, rows: Sequence[int]) -> None:
        """Cut keys and values to the tokens that the cache holds and, behind them, these rows."""
        held = self.held
        end = held + len(rows)
        if end == 0:
            self.cache = new_cache(self.config)  # a forward that failed half way may have left layers of any length
        layers: list[Any] = self.cache.layers
        for layer in layers:
            if getattr(layer, "keys", None) is None:  # a layer that holds states alone, or shares the keys of another
                continue
            if list(rows) != list(range(len(rows))):  # a tree's path with gaps: move it together
                source = torch.tensor(rows, device=layer.keys.device) + held
                layer.keys[..., held:end, :] = layer.keys[..., source, :]
                layer.values[..., held:end, :] = layer.values[..., source, :]
            layer.keys, layer.values = layer.keys[..., :end, :], layer.values[..., :end, :]
