"""`PageCache`: the `past_key_values` of accelerated calls.

To transformers it is a `DynamicCache`; its keys and values stand in the engine's pages (`specfx.runtime.held`). Given to a call that goes
on from its text, only the new tokens are run. A call is never answered from anything but its own `input_ids`: where those differ from the
cached text, or the pages have gone, they are run again.

Code that looks at the cache's layers (a model's own `forward`, the stock `generate`) finds them as the stock model would have filled them:
they are computed then, in one forward over the text. If it changes them, the cache is an ordinary `DynamicCache` from then on.

An empty `DynamicCache` that a caller brings has a `PageCache` beside it (`beside`), and is filled at the end of each call by one forward of
the stock model over the new text.
"""

from __future__ import annotations

import copy
import inspect
import weakref
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
def _run(model: PreTrainedModel, sequences: Tensor, mask: Tensor | None, cache: DynamicCache) -> None:
    """Have `model` fill `cache` with what it lacks of `sequences`, but for the last token."""
    ids, known = sequences[:, :-1].to(model.device), cache.get_seq_length()
    more: dict[str, Any] = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    if mask is not None:
        more["attention_mask"] = mask = mask[:, :-1].to(ids)
        if "position_ids" in inspect.signature(model.forward).parameters:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, known:]
    if known < ids.shape[1]:
        inputs = model.prepare_inputs_for_generation(
            ids[:, known:], past_key_values=cache, is_first_iteration=not known, use_cache=True, **more
        )
        model(**inputs, return_dict=True)


class PageCache(DynamicCache):
    """See the module's docstring. ``PageCache()`` is empty; the first call that is given it fills it."""

    def __init__(self) -> None:
        self.text: _Text | None = None
        self._layers: list[Any] = []
        self._computed: list[tuple[Tensor, int]] | None = None
        super().__init__()

    def fill(self, model: PreTrainedModel, sequences: Tensor, mask: Tensor | None, held: Held | None) -> None:
        """From now on the cache of `sequences` ``[B, L]``, which a call of `model` returned. mask: of the prompts, ``[B, <= L]``."""
        if mask is not None:
            more = mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])
            mask = torch.cat([mask, more], 1)
        self.text, self._layers, self._computed = _Text(model, sequences, mask, held), [], None

    @property
    def held(self) -> Held | None:
        return None if self.text is None else self.text.held

    @property
    def is_changed(self) -> bool:
        """Whether other code has filled or changed the layers, which are then all that the cache is."""
        if self._computed is None:
            return bool(self._layers)
        return not _are_equal(_marks(self._layers), self._computed)

    def is_of(self, sequences: Tensor, mask: Tensor | None) -> bool:
        """Whether `sequences` ``[B, L]`` (and their mask) begin with all that is cached."""
        text = self.text
        if text is None:
            return True
        if sequences.shape[0] != text.sequences.shape[0] or (mask is None) != (text.mask is None):
            return False
        n = text.length
        same = mask is None or text.mask is None or torch.equal(mask[:, :n], text.mask[:, :n])
        return same and torch.equal(sequences[:, :n], text.sequences[:, :n])

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        if self.text is not None and self._computed is None:
            cache = DynamicCache(config=self.text.model.config.get_text_config(decoder=True))
            _run(self.text.model, self.text.sequences, self.text.mask, cache)
            self._layers = list(cache.layers)
            self._computed = _marks(self._layers)
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.text is not None and self._computed is None:
            return self.text.length
        return super().get_seq_length(layer_idx)

    def __len__(self) -> int:
        if self.text is not None and self._computed is None:
            return int(self.text.model.config.get_text_config(decoder=True).num_hidden_layers)
        return super().__len__()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_seq_length()} tokens)"

    def __deepcopy__(self, memo: dict[int, Any]) -> PageCache:
        new = memo[id(self)] = PageCache()
        if self.is_changed or self.text is None:
            new._layers = copy.deepcopy(self._layers, memo)
        else:  # pages that are held are never changed: they serve both
            new.text = self.text
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _with_layers, (self.layers,)


_beside: weakref.WeakKeyDictionary[DynamicCache, tuple[PageCache, list[tuple[Tensor, int]]]] = weakref.WeakKeyDictionary()
"""State: what stands beside a caller's own cache, and how its tensors looked then."""


def beside(cache: Any) -> PageCache | None:
    """`cache` itself, or what stands beside a `DynamicCache` that is empty or that specfx has filled last. None for any other."""
    if isinstance(cache, PageCache):
        return None if cache.is_changed else cache
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    if not cache.get_seq_length():
        return PageCache()
    pages, marks = _beside.get(cache, (None, []))
    return pages if _are_equal(_marks(cache.layers), marks) else None


def fill(cache: DynamicCache, pages: PageCache, model: PreTrainedModel, sequences: Tensor, mask: Tensor | None, held: Held) -> None:
    """`cache`, and what stands beside it, are from now on the cache of `sequences`; see `PageCache.fill`."""
    pages.fill(model, sequences, mask, held)
    if cache is not pages:
        assert pages.text is not None
        _run(model, sequences, pages.text.mask, cache)
        _beside[cache] = pages, _marks(cache.layers)


def note_stocks(cache: Any, model: PreTrainedModel, sequences: Tensor, mask: Tensor | None) -> None:
    """`cache` is what a call of the stock `generate` filled, which returned `sequences`: calls that go on from it may be accelerated."""
    if isinstance(cache, PageCache):
        cache.fill(model, sequences, mask, None)
    elif type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == sequences.shape[1] - 1:
        pages = PageCache()
        pages.fill(model, sequences, mask, None)
        _beside[cache] = pages, _marks(cache.layers)


def _with_layers(layers: list[Any]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache


def _marks(layers: list[Any]) -> list[tuple[Tensor, int]]:
    """The tensors of `layers`, and how often each was written."""
    tensors = [t for layer in layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return [(t, 0 if t.is_inference() else t._version) for t in tensors]


def _are_equal(marks: list[tuple[Tensor, int]], others: list[tuple[Tensor, int]]) -> bool:
    return len(marks) == len(others) and all(a is b and m == n for (a, m), (b, n) in zip(marks, others, strict=True))
