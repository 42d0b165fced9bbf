"""The decoder layer of an MTP head, made from its target: which layer class, which kind of attention and MLP, which weight names.

A head's layer is one more layer of the target's class. Where transformers knows the family (`PreTrainedConfig.get_mtp_config`), it is
built from that config, as in transformers' `MtpModel`. Elsewhere it is put together from the target's own parts: a copy of its last
attention layer, whose attention and MLP are exchanged for those of another layer if that is what the checkpoint's names and shapes ask
for (a dense MLP in a model of experts, say). In Nemotron-H, whose layers are either attention or MLP, a step is a run of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specfx._compat import weight_conversions
from specfx.drafters.mtp_families import PLAIN, Family, run_kinds
from specfx.errors import HeadError

_SLIDING = ("sliding_attention", "hybrid_sliding")


@dataclass(frozen=True)
class TargetParts:
    """What a head takes from its target. layer: the last one with attention, `index` its place; rotary: None in families whose layers
    take no rotary positions; the others as their names say."""

    decoder: Any
    layer: Any
    index: int
    norm: Any
    rotary: Any
    embed: nn.Module
    lm_head: nn.Module


def target_parts(target: Any, family: Family = PLAIN) -> TargetParts:
    """The parts of a Llama-like target, or of one of `family`. Raises `HeadError`, which says what is lacking, for any other."""
    decoder: Any = target.get_decoder() if hasattr(target, "get_decoder") else None
    wanted = ["layers", family.norm, *(["rotary_emb"] if family.rotary else [])]
    lacking = [name for name in wanted if getattr(decoder, name, None) is None]
    embed, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    lacking += [name for name, module in (("input embeddings", embed), ("LM head", lm_head)) if module is None]
    index = -1
    if not lacking and not family.run:
        kinds = layer_kinds(decoder)
        index = max((i for i, kind in enumerate(kinds) if kind != "linear_attention"), default=len(kinds) - 1)
        layer = decoder.layers[index]
        attention = getattr(layer, "self_attn", None)
        takes = {**inspect.signature(layer.forward).parameters}
        if any(p.kind is p.VAR_KEYWORD for p in takes.values()) and isinstance(attention, nn.Module):  # handed on
            takes |= inspect.signature(attention.forward).parameters
        wanted = ["past_key_values", *(["position_embeddings"] if family.rotary else [])]
        lacking = [f"a layer that takes {name}" for name in sorted(wanted, reverse=True) if name not in takes]
        lacking += ["self-attention in its last layer"] if attention is None else []
        lacking += [f"floating-point {n}" for n, p in layer.named_parameters() if not p.dtype.is_floating_point]
    if lacking:
        raise HeadError(f"{type(target).__name__} can't have an MTP head: it is not built like Llama (lacks {', '.join(lacking)})")
    rotary = decoder.rotary_emb if family.rotary else None
    return TargetParts(decoder, decoder.layers[index], index, getattr(decoder, family.norm), rotary, embed, lm_head)


def layer_kinds(decoder: Any) -> list[str]:
    """Each layer's kind of attention, as the config's ``layer_types`` has it."""
    stated = getattr(getattr(decoder, "config", None), "layer_types", None) or ()
    return [stated[i] if i < len(stated) else "full_attention" for i in range(len(decoder.layers))]


def own_copy(layer: Any, target: Any) -> Any:
    """A copy of the target's `layer` that shares nothing with it: no hooks, no cache index, no captured attention."""
    return _alone(copy.deepcopy(layer), target)


def _alone(layer: Any, target: Any, place: int = 0) -> Any:
    """`layer` without hooks; `place` is the number by which it calls its cache."""
    for module in layer.modules():  # hooks belong to the target (offload, output capture), not to the copy
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
            hooks.clear()
        if hasattr(module, "layer_idx"):
            module.layer_idx = place
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
        if hasattr(module, "config"):  # a copy too; whatever runs the target's attention, this layer's is stock
            softcap = getattr(module.config, "attn_logit_softcapping", None)  # SDPA leaves it out (5.17 let it serve Gemma-2 all the same)
            module.config._attn_implementation = "sdpa" if getattr(target, "_supports_sdpa", False) and not softcap else "eager"
    return layer


def family_layer(
    target: Any, parts: TargetParts, family: Family, i: int, weights: Mapping[str, torch.Tensor]
) -> tuple[Any, str, int | None]:
    """Layer `i` of a head: (module, kind of attention, window). `weights` have the names of `MtpHead`, as `to_target_names` gives them.

    Raises `HeadError` for a run of sublayers with a recurrent state.
    """
    if family.run:
        return _run(target, parts, family), "full_attention", None
    place = 0
    if family.kinds:
        config = copy.deepcopy(parts.decoder.config)
        for name, listed in family.kinds.items():
            setattr(config, name, [listed])
        layer, kind = _like_targets(type(parts.layer)(config, 0), parts), family.kinds["layer_types"]
        return _alone(layer, target), kind, config.sliding_window if kind in _SLIDING else None
    try:
        config = target.config.get_mtp_config()
        layer = _like_targets(type(parts.layer)(config, i), parts)
        kind = (getattr(config, "layer_types", None) or ["full_attention"] * (i + 1))[i]
        place = i  # where transformers builds the layer it counts positions by it (`HeadKV.get_query_offset`)
    except (AttributeError, IndexError, ValueError):  # transformers has no such config, or not for this family
        layer, kind = _from_parts(target, parts, {n.removeprefix("layer."): t for n, t in weights.items() if n.startswith("layer.")})
        config = parts.decoder.config
    return _alone(layer, target, place), kind, getattr(config, "sliding_window", None) if kind in _SLIDING else None


def _like_targets(layer: Any, parts: TargetParts) -> Any:
    """`layer` on the target's device and in its precision; what the target keeps in another (a router's bias in float32) has that."""
    layer.to(parts.norm.weight)
    precise = {name: tensor.dtype for like in parts.decoder.layers for name, tensor in like.state_dict().items()}
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        tensor.data = tensor.data.to(precise.get(name, tensor.dtype))
    return layer


class SublayerRun(nn.ModuleList):
    """Layers of one part each (attention or MLP) that are one step of a head together."""

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """``[B, T, H]`` -> ``[B, T, H]``; the keyword arguments are each layer's."""
        for layer in self:
            hidden = layer(hidden, **arguments)
        return hidden


def _run(target: Any, parts: TargetParts, family: Family) -> SublayerRun:
    config = copy.deepcopy(parts.decoder.config)
    kinds = run_kinds(family, config.to_dict())
    if recurrent := sorted({kind for kind in kinds if kind not in ("full_attention", "moe", "mlp")}):
        state = "hold a state that can't be rolled back"
        raise HeadError(f"heads of {family.name} with sublayers of type {', '.join(recurrent)} can't be drafted with: they {state}")
    config.layers_block_type = list(kinds)
    layers = [_like_targets(type(parts.layer)(config, place), parts) for place in range(len(kinds))]
    return SublayerRun(_alone(layer, target, place) for place, layer in enumerate(layers))


def _from_parts(target: Any, parts: TargetParts, weights: Mapping[str, torch.Tensor]) -> tuple[Any, str]:
    kinds = layer_kinds(parts.decoder)
    if isinstance(parts.layer.self_attn, nn.ModuleList):
        return _single(parts.layer), kinds[parts.index]
    layer, kind = copy.deepcopy(parts.layer), kinds[parts.index]
    for child in ("self_attn", "mlp"):
        shapes = {n.removeprefix(f"{child}."): t.shape for n, t in weights.items() if n.startswith(f"{child}.")}
        for j in reversed(range(len(kinds))):
            module = getattr(parts.decoder.layers[j], child, None)
            fits = module is not None and kinds[j] != "linear_attention" if child == "self_attn" else module is not None
            if fits and module is not None and {n: t.shape for n, t in module.state_dict().items()} == shapes:
                setattr(layer, child, copy.deepcopy(module))
                kind = kinds[j] if child == "self_attn" else kind
                break
    return layer, kind


class PreNormLayer(nn.Module):
    """The plain decoder layer ``z + attention(norm(z))``, ``z + mlp(norm(z))``."""

    def __init__(self, self_attn: nn.Module, mlp: nn.Module, input_layernorm: nn.Module, post_attention_layernorm: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm, self.post_attention_layernorm = input_layernorm, post_attention_layernorm

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """``[B, T, H]`` -> ``[B, T, H]``; the keyword arguments are the attention's."""
        hidden = hidden + self.self_attn(hidden_states=self.input_layernorm(hidden), **arguments)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def _single(layer: Any) -> PreNormLayer:
    """Of a LongCat layer (two attentions, two dense MLPs beside the experts) the first sublayer, as DeepSeek's dense layer."""
    first = (layer.self_attn[0], layer.mlps[0], layer.input_layernorm[0], layer.post_attention_layernorm[0])
    return PreNormLayer(*(copy.deepcopy(module) for module in first))


def to_target_names(target: Any, family: Family, weights: Mapping[str, torch.Tensor], where: Path) -> dict[str, torch.Tensor]:
    """A layer's weights under the names of the target's modules: experts fused, attention renamed, as transformers does on loading.

    `weights` have the names of `MtpHead`; those that don't start with ``layer.``, and those that the target's layers know, are kept.
    Raises `HeadError` if weights that belong together don't fit together.
    """
    loading = weight_conversions()
    if loading is None:
        return dict(weights)
    get_model_conversion_mapping, get_checkpoint_conversion_mapping, WeightConverter, WeightRenaming, rename_source_key = loading
    decoder = target.get_decoder()
    known = {name for layer in decoder.layers for name in layer.state_dict()}
    stem = next(name for name, module in target.named_modules() if module is decoder) + ".layers.0."
    transforms = get_model_conversion_mapping(target, add_legacy=False) or get_checkpoint_conversion_mapping(family.converted_as) or []
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    result: dict[str, torch.Tensor] = {}
    collected: dict[str, Any] = {}
    for name in sorted(weights, key=_numbers_apart):
        tail = name.removeprefix("layer.")
        if tail == name or tail in known:
            result[name] = weights[name]
            continue
        renamed, pattern = rename_source_key(stem + tail, renamings, converters)
        if pattern is None:
            result["layer." + renamed.rpartition("layers.0.")[2]] = weights[name]
        else:
            converter = collected.setdefault(renamed, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(renamed, stem + tail, pattern, weights[name])
    for renamed, converter in collected.items():
        try:
            made = converter.convert(renamed, model=target, config=target.config)
        except Exception as e:
            raise HeadError(f"the head {where} does not fit {type(target).__name__}: {renamed} can't be put together: {e}") from e
        for full, tensor in made.items():
            result["layer." + full.rpartition("layers.0.")[2]] = tensor[0] if isinstance(tensor, list) else tensor
    return result


def _numbers_apart(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
