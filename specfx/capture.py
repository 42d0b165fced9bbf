"""Capture: a stock causal LM becomes one FX graph, and the user's object is never touched.

Stages:

1. `clone_sharing_storage` makes a shallow clone: modules and configs of its own, parameters and buffers in the original's storage.
2. On the clone, every attention goes through transformers' `AttentionInterface` to the marker `specfx::attention`. The name is left out
   of the mask registry, so transformers passes no mask; what arrives as keyword arguments is carried along or refused.
3. `torch.export` traces ``(input_ids [1, T], position_ids [1, T]) -> (logits [1, T, V], hidden [1, T, H])`` with T dynamic, without a
   cache. `hidden` is the LM head's input, taken by a hook on the clone.

The batch dimension is 1 by design: batches are flat and ragged (`specfx.kernels.tree_attention`), all sequences' rows behind each other.
So there is no padding to compute, and one dynamic dimension to guard instead of two.

`Fingerprint` tells later whether the weights are still those that were captured.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from specfx import _compat
from specfx.errors import CaptureError
from specfx.kernels.attention import attention
from specfx.support import is_libraries

MARKER = "specfx_marker"

_HARMLESS_ARGUMENTS = {
    *{"position_ids", "cache_position", "use_cache", "return_dict", "output_attentions", "output_hidden_states"},
    *{"output_router_logits", "logits_to_keep", "num_items_in_batch", "dropout", "is_causal", "past_key_values"},
}


def clone_sharing_storage(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class with modules and configs of its own whose parameters (`requires_grad` False) and saved buffers share
    storage with the original's; in eval mode. Buffers that are not saved are copied: some rotary embeddings rewrite theirs in `forward`."""
    memo = shared_storage(model)
    wrapper = model.__dict__.get("generate")
    if wrapper is not None:  # specfx's own instance-level `generate` is not part of the stock model
        memo[id(wrapper)] = None
    clone = copy.deepcopy(model, memo)
    clone.__dict__.pop("generate", None)
    for module in clone.modules():  # what a user hangs on the model is no part of it (`specfx.support.changed_by_hand`)
        module.__dict__.pop("forward", None)
        _compat.remove_forward_hooks(module, lambda hook: not is_libraries(hook))
    return clone.eval()


def shared_storage(module: nn.Module) -> dict[int, Any]:
    """A `deepcopy` memo by which a copy of `module` shares the storage of its parameters (`requires_grad` False) and saved buffers."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    for part in module.modules():
        memo |= {id(b): b for name, b in part._buffers.items() if b is not None and name not in part._non_persistent_buffers_set}
    return memo


@dataclass(frozen=True)
class Fingerprint:
    """What modules a model is made of, where every parameter and saved buffer lies, and what it holds, at one moment.

    `values` has a version counter and up to 64 numbers of each: changes through ``.data`` (as adapters are merged) go round the counters,
    and inference tensors have none.
    """

    modules: tuple[type, ...]
    storage: tuple[tuple[int, torch.dtype, torch.device, torch.Size], ...]
    values: tuple[tuple[int, ...], bytes]

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        tensors = list(model.state_dict(keep_vars=True).values())
        storage = tuple((t.data_ptr(), t.dtype, t.device, t.shape) for t in tensors)
        versions = tuple(0 if t.is_inference() else t._version for t in tensors)
        samples = defaultdict[tuple[torch.device, torch.dtype], list[Tensor]](list)
        for t in tensors:
            flat = t.detach().reshape(-1)
            samples[t.device, t.dtype].append(flat[:: max(1, flat.numel() // 64)])
        # one copy from the device for each dtype
        numbers = b"".join(torch.cat(alike).view(torch.uint8).cpu().numpy().tobytes() for alike in samples.values())
        return cls(tuple(map(type, model.modules())), storage, (versions, numbers))


def refuse_strange_attention(module: nn.Module, mask: Tensor | None, more: dict[str, Any]) -> None:
    """Raise `CaptureError` for an attention that is not causal over all rows, or takes arguments `more` that mean something."""
    unknown = sorted(name for name, value in more.items() if value is not None and name not in _HARMLESS_ARGUMENTS)
    if unknown:
        raise CaptureError(f"attention of {type(module).__name__} takes {', '.join(unknown)}, which the marker can't carry")
    if mask is not None:
        raise CaptureError(f"attention of {type(module).__name__} is given a mask of its own")
    if more.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise CaptureError(f"attention of {type(module).__name__} is not causal")


def _marker_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query ``[B, Hq, T, D]``, key and value ``[B, Hkv, T, D]`` -> ``[B, T, Hq, D]``."""
    refuse_strange_attention(module, attention_mask, more)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return attention(query, key, value, scale, sliding_window or 0, softcap or 0.0, s_aux), None


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    return [config, *(c for v in vars(config).values() if isinstance(v, PretrainedConfig) for c in _configs(v))]


def make_traceable(config: PretrainedConfig, attention_implementation: str) -> None:
    """Set, on a clone's config, the attention to trace through and the form of experts that can be exported."""
    config._attn_implementation = attention_implementation
    if hasattr(config, "num_experts") or hasattr(config, "num_local_experts"):
        config._experts_implementation = "batched_mm"


class _Forward(nn.Module):
    """What is exported: ``(input_ids, position_ids) -> (logits, hidden)``."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.hidden: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.hidden = args[0]

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True).logits
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        return logits, hidden


def capture(model: PreTrainedModel, example_rows: int = 7) -> fx.GraphModule:
    """The model as one FX graph of aten ops and attention markers; weights are attributes that share the model's storage.

    Models that never ask the attention interface come out with attention written out in aten ops and masks of their own making; the
    canonicalise pass recognises those. Placeholders ``input_ids``, ``position_ids`` (int64 ``[1, T]``, T dynamic); output
    ``(logits, hidden)``. Raises `CaptureError` with the cause.
    """
    if model.config.is_encoder_decoder:
        raise CaptureError("encoder-decoder models are not captured")
    AttentionInterface.register(MARKER, _marker_attention)
    try:
        return _export(model, MARKER, example_rows)
    except CaptureError as marked:
        try:
            return _export(model, "eager", example_rows)
        except CaptureError as e:
            raise CaptureError(f"{marked}; with attention written out: {e}") from e


def _export(model: PreTrainedModel, attention_implementation: str, example_rows: int) -> fx.GraphModule:
    clone = clone_sharing_storage(model)
    if clone.get_output_embeddings() is None:
        raise CaptureError(f"{type(model).__name__} has no output embeddings")
    for config in _configs(clone.config):
        make_traceable(config, attention_implementation)
    example = torch.arange(example_rows, device=model.device)[None]
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                _Forward(clone),
                (example % model.config.get_text_config().vocab_size, example),
                dynamic_shapes={"input_ids": {1: rows}, "position_ids": {1: rows}},
                strict=False,
            )
            if attention_implementation != MARKER:  # written-out attention may work in place
                program = program.run_decompositions({})
    except CaptureError:
        raise
    except Exception as e:  # torch.export raises many kinds; all mean the same here
        raise CaptureError(f"{type(model).__name__}: {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}") from e
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    if attention_implementation == MARKER and not module.graph.find_nodes(op="call_function", target=attention):
        raise CaptureError(f"{type(model).__name__} does not ask transformers' attention interface")
    module.graph.set_codegen(fx.graph.CodeGen())
    module.recompile()
    return module
