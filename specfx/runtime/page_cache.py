"""`PageCache`: the `past_key_values` of accelerated calls.

To transformers it is a `DynamicCache`; its keys and values stand in the engine's pages (`specfx.runtime.held`). Given to a call that goes
on from its text, only the new tokens are run. A call is never answered from anything but its own `input_ids`: where those differ from the
cached text, or the pages have gone, they are run again.

Code that looks at the cache's layers (a model's own `forward`, the stock `generate`) finds them as the stock model would have filled them:
they are computed then, in one forward over the text. If it changes them, the cache is an ordinary `DynamicCache` from then on.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specfx.runtime.held import Held


@dataclass(frozen=True)
class _Text:
    """What a cache is of: sequences ``[B, L]``, of which all but the last token are cached, and their mask (None: no padding)."""

    model: PreTrainedModel
    sequences: Tensor
    mask: Tensor | None
    held: Held | None

    @property
    def length(self) -> int:
        return self.sequences.shape[1] - 1

    @torch.no_grad()
    def layers(self) -> list[Any]:
        model, ids = self.model, self.sequences[:, :-1].to(self.model.device)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        more: dict[str, Any] = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        if self.mask is not None:
            more["attention_mask"] = mask = self.mask[:, :-1].to(ids)
            if "position_ids" in inspect.signature(model.forward).parameters:
                more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache, is_first_iteration=True, use_cache=True, **more)
        model(**inputs, return_dict=True)
        return list(cache.layers)


class PageCache(DynamicCache):
    """See the module's docstring. ``PageCache()`` is empty; the first call that is given it fills it."""

    def __init__(self) -> None:
        self._text: _Text | None = None
        self._layers: list[Any] = []
        self._computed: list[tuple[Tensor, int]] | None = None
        super().__init__()

    def fill(self, model: PreTrainedModel, sequences: Tensor, mask: Tensor | None, held: Held | None) -> None:
        """From now on the cache of `sequences` ``[B, L]``, which a call of `model` returned. mask: of the prompts, ``[B, <= L]``."""
        if mask is not None:
            more = mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])
            mask = torch.cat([mask, more], 1)
        self._text, self._layers, self._computed = _Text(model, sequences, mask, held), [], None

    @property
    def held(self) -> Held | None:
        return None if self._text is None else self._text.held

    @property
    def is_changed(self) -> bool:
        """Whether other code has filled or changed the layers, which are then all that the cache is."""
        if self._computed is None:
            return bool(self._layers)
        now = _marks(self._layers)
        return len(now) != len(self._computed) or any(a is not b or m != n for (a, m), (b, n) in zip(now, self._computed, strict=True))

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        if self._text is not None and self._computed is None:
            self._layers = self._text.layers()
            self._computed = _marks(self._layers)
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self._text is not None and self._computed is None:
            return self._text.length
        return super().get_seq_length(layer_idx)

    def __len__(self) -> int:
        if self._text is not None and self._computed is None:
            return int(self._text.model.config.get_text_config(decoder=True).num_hidden_layers)
        return super().__len__()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_seq_length()} tokens)"

    def __deepcopy__(self, memo: dict[int, Any]) -> PageCache:
        new = memo[id(self)] = PageCache()
        if self.is_changed or self._text is None:
            new._layers = copy.deepcopy(self._layers, memo)
        else:  # pages that are held are never changed: they serve both
            new._text = self._text
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _with_layers, (self.layers,)


def _with_layers(layers: list[Any]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache


def _marks(layers: list[Any]) -> list[tuple[Tensor, int]]:
    """The tensors of `layers`, and how often each was written."""
    tensors = [t for layer in layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return [(t, 0 if t.is_inference() else t._version) for t in tensors]
