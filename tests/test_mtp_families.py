"""MTP heads of published families: tiny checkpoints written with exactly their names, found, read strictly, drafted with and exported.

The checkpoints are written by hand from `CASES` (the names of `../shared/mtp-families.md`) and know nothing of the table in specfx.
Families that transformers has are tested on their own architecture; MiMo-7B, GLM-OCR and Step-3.5 (without images) on a Qwen whose
``model_type`` is patched.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import _MOE, _SIZES, VOCAB, WINDOW, tiny_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import specfx
from specfx.cli import main
from specfx.drafters import mtp_families
from specfx.drafters.mtp import load_drafter
from specfx.drafters.mtp_export import export_nextn
from specfx.drafters.mtp_families import find_head
from specfx.drafters.mtp_head import MtpHead, load_head, save_head
from specfx.drafters.mtp_kv import HeadKV
from specfx.errors import HeadError, Reason
from specfx.options import MtpOptions

DEEPSEEK = {"enorm": "{layer}enorm", "hnorm": "{layer}hnorm", "proj": "{layer}eh_proj", "norm": "{layer}shared_head.norm"}
QWEN = {"enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden", "proj": "mtp.fc", "norm": "mtp.norm"}
COPIES = {"{layer}embed_tokens": "embed", "{layer}shared_head.head": "head"}
_ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_NO_HEAD_DIM = {k: v for k, v in _SIZES.items() if k != "head_dim"}
_DEEPSEEK_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint. layer: prefix of layer i. rename: (in the module, in the file) for the decoder layer's names. dense: its
    MLP is that of the target's layer 0. layers: how many. run: the kinds of the sublayers that are one layer; `layer` counts those."""

    model: str
    settings: dict[str, Any]
    layer: str = "model.layers.{n}."
    parts: dict[str, str] = field(default_factory=lambda: DEEPSEEK)
    copies: dict[str, str] = field(default_factory=lambda: COPIES)
    rename: tuple[tuple[str, str], ...] = ()
    dense: bool = False
    layers: int = 1
    run: tuple[str, ...] = ("",)
    model_type: str | None = None
    stock: bool = False

    def prefix(self, first: int, i: int) -> str:
        """Of what belongs to the head's layer i, or to its first sublayer; `first` layers are the target's."""
        return self.layer.format(n=first + i, i=i * len(self.run))


def _final(layer: str) -> dict[str, str]:
    return {"enorm": layer + "enorm", "hnorm": layer + "hnorm", "proj": layer + "eh_proj", "norm": layer + "final_layernorm"}


_SPARSE = {"index_topk": 4, "index_n_heads": 16, "index_head_dim": 16, "num_key_value_heads": 4, "first_k_dense_replace": 1}
_INKLING = (
    {k: v for k, v in _SIZES.items() if k != "tie_word_embeddings"}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 1, "swa_head_dim": 8, "sliding_window_size": 32, "local_layer_ids": [0]}
    | {"d_rel": 4, "rel_extent": 12, "log_scaling_n_floor": 4, "logits_mup_width_multiplier": 3.0, "unpadded_vocab_size": VOCAB - 8}
    | {"mlp_layer_types": ["dense", "sparse"], "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"n_shared_experts": 1}
)
INKLING_NAMES = (
    ("self_attn.q_proj", "attn.wq_du"),
    ("self_attn.k_proj", "attn.wk_dv"),
    ("self_attn.v_proj", "attn.wv_dv"),
    ("self_attn.r_proj", "attn.wr_du"),
    ("self_attn.o_proj", "attn.wo_ud"),
    ("self_attn.k_sconv.conv1d", "attn.k_sconv"),
    ("self_attn.v_sconv.conv1d", "attn.v_sconv"),
    ("self_attn.", "attn."),
    ("attn_sconv.conv1d", "attn_sconv"),
    ("mlp_sconv.conv1d", "mlp_sconv"),
    ("mlp.down_proj", "mlp.w2_md"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "mlp_norm"),
)


def _inkling(layers: int, chained: bool, local: list[int], **settings: Any) -> Case:
    heads = {"num_mtp_layers": layers, "chain_hidden_post_norm": chained, "mtp_local_layer_ids": local}
    parts = {"enorm": "{layer}embed_norm", "hnorm": "{layer}hidden_norm", "proj": "{layer}input_proj"}
    images = {
        "text_config": _INKLING | heads,
        "vision_config": {"patch_size": 2, "hidden_size": 16, "num_hidden_layers": 4, "temporal_patch_size": 2},
        "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 4},
    }
    return Case(
        "inkling_mm_model" if chained else "inkling_text",
        images if chained else _INKLING | heads,
        layer="model.mtp.layers.{i}.",
        parts=parts | ({"norm": "model.mtp.chain_norm"} if chained else {}),
        copies={},
        rename=tuple((ours, f"transformer_block.{theirs}") for ours, theirs in INKLING_NAMES),
        layers=layers,
        stock=True,
    )


def _nemotron(*run: str, layers: int = 1) -> Case:
    return Case(
        "nemotron_h",
        {k: v for k, v in _SIZES.items() if k != "num_hidden_layers"}
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8}
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"moe_shared_expert_intermediate_size": 24, "moe_latent_size": 16, "routed_scaling_factor": 2.5}
        | {"num_nextn_predict_layers": layers, "mtp_layers_block_type": list(run)},
        layer="mtp.layers.{i}.",
        parts=_final("{layer}") | {"norm": "{last}final_layernorm"},
        copies={},
        layers=layers,
        run=run,
    )


STREAMS = 3
V4_NAMES = (
    ("self_attn.sinks", "attn.attn_sink"),
    ("self_attn.q_a_proj", "attn.wq_a"),
    ("self_attn.q_a_norm", "attn.q_norm"),
    ("self_attn.q_b_proj", "attn.wq_b"),
    ("self_attn.kv_proj", "attn.wkv"),
    ("self_attn.kv_norm", "attn.kv_norm"),
    ("self_attn.o_a_proj", "attn.wo_a"),
    ("self_attn.o_b_proj", "attn.wo_b"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("attn_hc.", "hc_attn_"),
    ("ffn_hc.", "hc_ffn_"),
    ("mlp.gate.e_score_correction_bias", "ffn.gate.bias"),
    ("mlp.gate.weight", "ffn.gate.weight"),
    ("mlp.shared_experts.gate_proj", "ffn.shared_experts.w1"),
    ("mlp.shared_experts.down_proj", "ffn.shared_experts.w2"),
    ("mlp.shared_experts.up_proj", "ffn.shared_experts.w3"),
)


def _v4(*kinds: str, layers: int = 1) -> Case:
    return Case(
        "deepseek_v4",
        {k: v for k, v in _NO_HEAD_DIM.items() if k != "intermediate_size"}
        | {"num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8}
        | {"layer_types": list(kinds), "sliding_window": WINDOW, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hash_layers": 1, "swiglu_limit": 2.0}
        | {"hc_mult": STREAMS, "hc_sinkhorn_iters": 3, "num_nextn_predict_layers": layers},
        layer="mtp.{i}.",
        parts={part: "{layer}" + part for part in ("enorm", "hnorm", "e_proj", "h_proj", "norm")}
        | {f"hc_{part}": "{layer}hc_head_" + part for part in ("fn", "base", "scale")},
        copies={},
        rename=V4_NAMES,
        layers=layers,
    )


CASES: dict[str, Case] = {
    "deepseek_v3": Case("deepseek_v3", {"num_key_value_heads": 4, "first_k_dense_replace": 1}, stock=True),
    "deepseek_v3, two layers": Case(
        "deepseek_v3", {"num_key_value_heads": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 2}, layers=2, stock=True
    ),
    "glm4_moe": Case("glm4_moe", _SIZES | _DEEPSEEK_MOE | {"n_shared_experts": 1, "first_k_dense_replace": 1}, stock=True),
    "glm4_moe_lite": Case("glm4_moe_lite", _NO_HEAD_DIM | _MLA | _DEEPSEEK_MOE | {"num_key_value_heads": 4, "n_shared_experts": 1}),
    "deepseek_v32": Case("deepseek_v32", _NO_HEAD_DIM | _MLA | _DEEPSEEK_MOE | _SPARSE),
    "glm_moe_dsa": Case("glm_moe_dsa", _NO_HEAD_DIM | _MLA | _DEEPSEEK_MOE | _SPARSE | {"indexer_types": ["full", "shared"]}),
    "glm_ocr": Case("qwen3", {"num_nextn_predict_layers": 1}, layer="model.language_model.layers.{n}.", model_type="glm_ocr_text"),
    "qwen3_next": Case("qwen3_next", {}, layer="mtp.layers.{i}.", parts=QWEN, copies={}),
    "qwen3_5": Case(
        "qwen3_5_text",
        _SIZES | _LINEAR | {"layer_types": ["linear_attention", "full_attention"], "mtp_num_hidden_layers": 1},
        layer="mtp.layers.{i}.",
        parts=QWEN,
        copies={},
    ),
    "exaone_moe": Case(
        "exaone_moe",
        _SIZES | _MOE | _ALTERNATING | {"num_shared_experts": 1, "num_nextn_predict_layers": 1},
        layer="mtp.layers.{i}.",
        parts=QWEN,
        copies={},
        rename=(("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),),
    ),
    "mellum": Case(
        "mellum",
        _SIZES | _MOE | _ALTERNATING | {"num_mtp_layers": 1, "mtp_layer_types": ["sliding_attention"], "mtp_mlp_layer_types": ["sparse"]},
        layer="mtp.layers.{i}.",
        parts=QWEN,
        copies={},
        stock=True,
    ),
    "mimo": Case(
        "qwen2",
        {"num_nextn_predict_layers": 1},
        layer="model.mtp_layers.{i}.",
        parts={
            "enorm": "{layer}token_layernorm",
            "hnorm": "{layer}hidden_layernorm",
            "proj": "{layer}input_proj",
            "norm": "{layer}final_layernorm",
        },
        copies={},
        model_type="mimo",
    ),
    "mimo_v2": Case(
        "mimo_v2_flash",
        _SIZES | _ALTERNATING | {k: v for k, v in _DEEPSEEK_MOE.items() if "group" not in k} | {"v_head_dim": 8},
        layer="model.mtp.layers.{i}.",
        parts=_final("{layer}"),
        copies={},
        rename=(("post_attention_layernorm", "pre_mlp_layernorm"), ("self_attn.sinks", "self_attn.attention_sink_bias")),
        dense=True,
        layers=3,
    ),
    "ernie4_5_moe": Case(
        "ernie4_5_moe",
        _NO_HEAD_DIM
        | {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1, "num_nextn_predict_layers": 1},
        layer="model.mtp_block.{i}.",
        parts={"enorm": "model.mtp_emb_norm.{i}", "hnorm": "model.mtp_hidden_norm.{i}", "proj": "model.mtp_linear_proj.{i}"},
        copies={},
        dense=True,
    ),
    "longcat_flash": Case(
        "longcat_flash",
        {k: v for k, v in _NO_HEAD_DIM.items() if k not in ("intermediate_size", "num_hidden_layers", "num_key_value_heads")}
        | _MLA
        | {"num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 2}
        | {"moe_topk": 2, "head_dim": 8},
        layer="model.mtp.layers.{i}.",
        parts={"enorm": "{layer}enorm.m", "hnorm": "{layer}hnorm.m", "proj": "{layer}eh_proj", "norm": "model.mtp.norm"},
        copies={"model.mtp.embed_tokens": "embed"},
        rename=(("mlp.", "transformer_layer.mlp."),),
    ),
    "step3p7": Case(
        "step3p7",
        {
            "text_config": _SIZES
            | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "share_expert_dim": 32}
            | {"sliding_window": WINDOW, "num_nextn_predict_layers": 3, "pad_token_id": 0}
            | {"layer_types": ["full_attention", *["sliding_attention"] * 2, *["full_attention"] * 2]}
            | {"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "dense"]},
            "vision_config": {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14},
        },
        parts={
            "enorm": "{layer}enorm",
            "hnorm": "{layer}hnorm",
            "proj": "{layer}eh_proj",
            "norm": "{layer}transformer.shared_head.norm",
            "output": "{layer}transformer.shared_head.output",
        },
        copies={"{layer}embed_tokens": "embed"},
        layers=3,
        stock=True,
    ),
    "step3p5": Case(
        "qwen3",
        {"num_nextn_predict_layers": 3},
        parts=DEEPSEEK | {"output": "{layer}shared_head.output"},
        copies={"{layer}embed_tokens": "embed"},
        layers=3,
        model_type="step3p5",
    ),
    "bailing_hybrid": Case(
        "bailing_hybrid",
        _SIZES
        | _MLA
        | {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "layer_group_size": 2}
        | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_shared_experts": 1}
        | {"mtp_layer_types": ["full_attention"], "mtp_mlp_layer_types": ["sparse"]},
        parts=_final("{layer}"),
        rename=(
            ("self_attn.o_proj", "attention.dense"),
            ("self_attn.", "attention."),
            ("mlp.gate.e_score_correction_bias", "mlp.gate.expert_bias"),
        ),
        stock=True,
    ),
    "hy_v3": Case(
        "hy_v3",
        _SIZES | _MOE | {"num_shared_experts": 1, "num_nextn_predict_layers": 1},
        parts=_final("{layer}"),
        rename=(
            ("mlp.gate.weight", "mlp.router.gate.weight"),
            ("mlp.e_score_correction_bias", "mlp.expert_bias"),
            ("mlp.shared_experts.", "mlp.shared_mlp."),
        ),
    ),
    "nemotron_h": _nemotron("full_attention", "moe"),
    "nemotron_h, two steps": _nemotron("full_attention", "moe", "full_attention", "mlp", layers=2),
    "inkling": _inkling(8, True, [0, 2]),
    "inkling_text": _inkling(2, False, [1]),
    "deepseek_v4": _v4("heavily_compressed_attention", "compressed_sparse_attention"),
    "deepseek_v4, windows": _v4("sliding_attention", "sliding_attention", layers=2),
}
NOT_SERVED = {"deepseek_v32", "glm_moe_dsa", "deepseek_v4", "deepseek_v4, windows"}
"""Models whose `generate` stays stock's: an indexer's keys, or compressed rows and streams that no engine hands out."""
STOCK = [name for name, case in CASES.items() if case.stock]


def target_of(case: Case) -> PreTrainedModel:
    """The tiny target, deterministic."""
    try:
        model = tiny_model(case.model, **case.settings)
    except KeyError:
        if case.model not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {case.model}")
        config = AutoConfig.for_model(case.model, **case.settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            kind = AutoModelForImageTextToText if "text_config" in case.settings else AutoModelForCausalLM
            model = kind.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.2 * torch.randn_like(p)) if p.ndim == 1 else p.copy_(0.3 * torch.randn_like(p))
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    if case.model_type is not None:
        model.config.model_type = case.model_type
    return model


def decoder_layer(case: Case, target: PreTrainedModel, i: int) -> dict[str, torch.Tensor]:
    """Names and shapes of the decoder layer of the head's layer i, as the target's modules have them."""
    layers = target.get_decoder().layers
    if case.model == "nemotron_h":
        config = copy.deepcopy(target.config)
        config.layers_block_type = list(case.run)
        blocks = [type(layers[0])(config, place) for place in range(len(case.run))]
        return {f"{place}.{n}": t for place, block in enumerate(blocks) for n, t in block.state_dict().items()}
    if case.model == "glm_moe_dsa":  # an indexer of its own, and experts
        own, experts = layers[0].state_dict(), layers[1].state_dict()
        return {n: t for n, t in experts.items() if "self_attn" not in n} | {n: t for n, t in own.items() if "self_attn" in n}
    if case.model == "longcat_flash":
        pieces = {
            "self_attn": layers[0].self_attn[0],
            "mlp": layers[0].mlps[0],
            "input_layernorm": layers[0].input_layernorm[0],
            "post_attention_layernorm": layers[0].post_attention_layernorm[0],
        }
        return {f"{name}.{n}": t for name, piece in pieces.items() for n, t in piece.state_dict().items()}
    if case.model == "deepseek_v4":  # a window and experts, whatever the target's layers have
        config = copy.deepcopy(target.config)
        config.layer_types, config.mlp_layer_types = ["sliding_attention"], ["moe"]
        return type(layers[-1])(config, 0).state_dict()
    if case.stock:
        return type(layers[-1])(target.config.get_mtp_config(), i).state_dict()
    found = layers[-1].state_dict()
    if case.dense:
        found = {n: t for n, t in found.items() if not n.startswith("mlp.")}
        found |= {n: t for n, t in layers[0].state_dict().items() if n.startswith("mlp.")}
    return found


def published(case: Case, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A module's tensor under the names that published checkpoints have: experts one by one."""
    if case.model == "deepseek_v4" and ".experts." in name:
        pieces = {"w1": tensor.chunk(2, dim=1)[0], "w3": tensor.chunk(2, dim=1)[1]} if "gate_up" in name else {"w2": tensor}
        return {f"ffn.experts.{e}.{kind}.weight": t[e] for kind, t in pieces.items() for e in range(len(tensor))}
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        if case.model == "step3p7":
            return {"moe.gate_proj.weight": gate, "moe.up_proj.weight": up}
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}{e}.{kind}_proj.weight": t[e] for kind, t in (("gate", gate), ("up", up)) for e in range(len(tensor))}
    if name.endswith("experts.down_proj"):
        if case.model == "step3p7":
            return {"moe.down_proj.weight": tensor}
        return {f"{name.removesuffix('down_proj')}{e}.down_proj.weight": t for e, t in enumerate(tensor)}
    if name.endswith("experts.up_proj"):
        return {f"{name.removesuffix('up_proj')}{e}.up_proj.weight": t for e, t in enumerate(tensor)}
    if case.model == "step3p7":
        for ours, theirs in (
            ("mlp.gate.weight", "moe.gate.weight"),
            ("mlp.gate.e_score_correction_bias", "moe.router_bias"),
            ("mlp.shared_experts.", "share_expert."),
        ):
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    for ours, theirs in case.rename:
        if name.startswith(ours):
            return {theirs + name.removeprefix(ours): tensor}
    return {name: tensor}


def checkpoint(case: Case, target: PreTrainedModel) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """(the head's weights as published, for each layer the same under the names of `MtpHead`)."""
    generator = torch.Generator().manual_seed(11)
    size, first = target.get_input_embeddings().weight.shape[1], target.config.get_text_config().num_hidden_layers
    vectors: dict[str, torch.Tensor] = {}

    def random(shape: Any, scale: float = 0.2, around: float = 0.0) -> torch.Tensor:
        return around + scale * torch.randn(shape, generator=generator)

    weights: dict[str, torch.Tensor] = {}
    truth: list[dict[str, torch.Tensor]] = []
    for i in range(case.layers):
        layer = case.prefix(first, i)
        last = case.layer.format(n=first + i, i=(i + 1) * len(case.run) - 1)
        own: dict[str, torch.Tensor] = {}
        shapes = {"enorm": (size,), "hnorm": (size,), "proj": (size, 2 * size), "norm": (size,), "output": (VOCAB, size)}
        shapes |= {"e_proj": (size, size), "h_proj": (size, size)}
        shapes |= {"hc_fn": (STREAMS, STREAMS * size), "hc_base": (STREAMS,), "hc_scale": (1,)}
        for part, template in case.parts.items():
            end = "" if part.startswith("hc_") else ".weight"
            name = template.format(layer=layer, last=last, i=i) + end
            vectors.setdefault(name, random(shapes[part], 0.2, 1.0 if part.endswith(("norm", "scale")) else 0.0))
            weights[name] = vectors[name]
            own[{"proj": "eh_proj", "output": "head"}.get(part, part if end else f"hc_head.{part}") + end] = vectors[name]
        for name, like in decoder_layer(case, target, i).items():
            tensor = random(like.shape, 0.2, 1.0 if name.endswith("norm.weight") else 0.0)
            own["layer." + name] = tensor
            prefix = layer
            if case.run != ("",):
                place, _, name = name.partition(".")
                prefix = case.layer.format(i=i * len(case.run) + int(place))
            weights |= {prefix + n: t.clone().contiguous() for n, t in published(case, name, tensor).items()}
        if case.model.startswith("inkling"):  # rows of the two by turns
            gate, up = (weights.pop(f"{layer}mlp.{kind}_proj.weight") for kind in ("gate", "up"))
            weights[f"{layer}transformer_block.mlp.w13_dn.weight"] = torch.stack([gate, up], dim=1).flatten(0, 1)
            weights[f"{layer}transformer_block.mlp.global_scale"] = weights.pop(f"{layer}mlp.global_scale")
        for template, what in case.copies.items():
            shared = target.get_input_embeddings() if what == "embed" else target.get_output_embeddings()
            weights[template.format(layer=layer, i=i) + ".weight"] = shared.weight.detach().clone()
        truth.append(own)
    return weights, truth


def write(folder: Path, target: PreTrainedModel, weights: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A checkpoint folder of `target` and its head, sharded so that the last shards have the head; the target then names it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = target.config.to_dict() | {"model_type": target.config.model_type, "architectures": [type(target).__name__]}
    if "mtp_layers_block_type" in config:
        config["mtp_hybrid_override_pattern"] = config.pop("mtp_layers_block_type") and target.config.mtp_hybrid_override_pattern
    if config["model_type"] == "inkling_mm_model":  # as published
        heads = {"num_nextn_predict_layers": "num_mtp_layers", "local_layer_ids": "mtp_local_layer_ids"}
        heads |= {"chain_hidden_post_norm": "chain_hidden_post_norm"}
        config["mtp_config"] = {theirs: config["text_config"].pop(ours) for theirs, ours in heads.items()}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    body = {"model.embed_tokens.weight": target.get_input_embeddings().weight.detach().clone(), "model.norm.weight": torch.ones(32)}
    if shards == 1:
        save_file(body | weights, folder / "model.safetensors")
    else:
        names, index = sorted(weights), {}
        for s, part in enumerate([body, *({n: weights[n] for n in names[s :: shards - 1]} for s in range(shards - 1))]):
            file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
            save_file(part, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    target.config._name_or_path = str(folder)
    return folder


@dataclass
class Made:
    case: Case
    target: PreTrainedModel
    folder: Path
    weights: dict[str, torch.Tensor]
    truth: list[dict[str, torch.Tensor]]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    def made(name: str, shards: int = 1, dtype: torch.dtype = torch.float32) -> Made:
        case = CASES[name]
        target = target_of(case)
        weights, truth = checkpoint(case, target)
        folder = write(tmp_path / "checkpoint", target, {n: t.to(dtype) for n, t in weights.items()}, shards)
        return Made(case, target, folder, weights, truth)

    return made


def states(head: MtpHead) -> list[dict[str, torch.Tensor]]:
    return [{n: t for n, t in step.state_dict().items() if not n.startswith("further.")} for step in head.chain]


def same(found: list[dict[str, torch.Tensor]], truth: list[dict[str, torch.Tensor]]) -> bool:
    assert [step.keys() for step in found] == [step.keys() for step in truth]
    return all(torch.equal(a[n], b[n]) for a, b in zip(found, truth, strict=True) for n in b)


@torch.no_grad()
def true_hidden(target: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """What the head is given: the LM head's inputs ``[T, H]``, or the streams that DeepSeek-V4 makes them of, ``[T, S * H]``."""
    if target.config.model_type == "deepseek_v4":
        streams: list[torch.Tensor] = []
        hook = target.get_decoder().hc_head.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
        target.get_decoder()(input_ids=torch.tensor([tokens]), use_cache=False)
        hook.remove()
        return streams[0][0].flatten(1)
    hidden = target.get_decoder()(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    return hidden / getattr(target.config.get_text_config(), "logits_mup_width_multiplier", 1)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_lands_where_it_belongs(name: str, make: Callable[..., Made]) -> None:
    made = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = load_head(None, made.target)
    assert len(head.chain) == made.case.layers
    assert same(states(head), made.truth)
    assert same(states(load_head(made.folder, made.target)), made.truth)


@pytest.mark.parametrize("revision", [None, "abc"])
def test_a_hub_id_is_looked_for_in_the_cache(revision: str | None, make: Callable[..., Made], tmp_path: Path, monkeypatch: Any) -> None:
    """As `from_pretrained("org/name")` leaves it: a snapshot under the cache, and the revision in the config. Nothing is downloaded."""
    made = make("mimo", shards=3)
    cached = tmp_path / "hub" / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    made.folder.rename(cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    made.target.config._name_or_path, made.target.config._commit_hash = "org/name", revision
    assert same(states(load_head(None, made.target)), made.truth)
    made.target.config._name_or_path = "org/other"
    with pytest.raises(HeadError, match="'org/other' is no folder and not in the Hub's cache"):
        load_head(None, made.target)


@pytest.mark.parametrize("name", CASES)
def test_drafts_equal_a_recomputation_without_kv(name: str, make: Callable[..., Made]) -> None:
    """Layer k over all rows, recomputed at every draft; commits of several sizes, more steps than layers."""
    target = make(name).target
    drafter = load_drafter(MtpOptions(num_steps=4, topk=1, min_token_prob=0), 63, target)
    head, generator = drafter.head, torch.Generator().manual_seed(3)
    known = torch.randint(VOCAB, (11,), generator=generator).tolist()
    drafter.add(0, known)
    for i, n in enumerate((1, 1, 3, 2, 5, 1)):
        known += torch.randint(VOCAB, (n,), generator=generator).tolist()
        hidden = true_hidden(target, known[:-1])
        drafter.accept(0, known[-n:], hidden if i == 0 else hidden[-n:])
        for budget in (2, 4) if i % 2 else (4,):
            tree = drafter.propose([0], [budget])[0]
            assert list(tree.tokens) == recomputed(head, known, hidden, budget), (i, budget)


@torch.no_grad()
def recomputed(head: MtpHead, known: list[int], hidden: torch.Tensor, steps: int) -> list[int]:
    rows, chain = head.take(hidden)[None], list[int]()
    for k in range(steps):
        layer = head.chain[min(k, len(head.chain) - 1)]
        if k < len(head.chain):
            tokens = (known + chain)[k + 1 :]
        else:  # the last layer, once more: a row behind those that it has
            tokens, rows = [*tokens, chain[-1]], torch.cat([fed, out[:, -1:]], dim=1)  # noqa: F821
        fed = rows
        out = layer(torch.tensor([tokens]), fed)
        chain.append(int(layer.logits(out[:, -1]).argmax()))
        rows = out
    return chain


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_stock(name: str, make: Callable[..., Made]) -> None:
    """Chains and trees, one sequence and three; heads of one layer and of several are a part of the graph, but for Inkling's."""
    target = make(name).target
    for shape in ({"topk": 1}, {"topk": 3, "num_draft_tokens": 8, "min_token_prob": 0}):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*began with a right token")  # random heads
            specfx.speculate(target, "mtp", engine="graph", compile="off", **shape)
            apart = [r for r in specfx.explain(target).refusals if r.reason is Reason.DRAFTING_APART]
            assert bool(apart) == name.startswith("inkling"), apart
            if specfx.explain(target).engine == "eager":  # asked for by name, it takes batches too
                specfx.speculate(target, "mtp", engine="eager", **shape)
            for batch in (1, 3):
                prompts = torch.randint(VOCAB, (batch, 12), generator=torch.Generator().manual_seed(7))
                arguments = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(prompts), "pad_token_id": 0}
                stock = type(target).generate(target, prompts, **arguments)
                assert torch.equal(target.generate(prompts, **arguments), stock), str(specfx.explain(target))
                assert (specfx.stats(target).last.drafted_nodes == 0) == (name in NOT_SERVED), str(specfx.explain(target))


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_one_pass_through_the_layers_is_transformers_mtp_model(name: str, make: Callable[..., Made]) -> None:
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    made = make(name)
    target, n = made.target, made.case.layers
    drafter = load_drafter(MtpOptions(num_steps=n, topk=1, min_token_prob=0, wiring="transformers"), 63, target)
    head = drafter.head
    stock = MtpModel(target, n).eval()
    for i, step in enumerate(made.truth):
        layer = stock.layers[i]
        layer.mtp_block.load_state_dict({n.removeprefix("layer."): t for n, t in step.items() if n.startswith("layer.")})
        norm = layer.post_norm if stock.use_post_norm else getattr(stock, "shared_post_norm", None)
        for part, module in (("enorm", layer.enorm), ("hnorm", layer.hnorm), ("eh_proj", layer.eh_proj), ("norm", norm)):
            assert (module is None) == (part + ".weight" not in step)
            if module is not None:
                module.weight.copy_(step[part + ".weight"])
    known = torch.randint(VOCAB, (3 * WINDOW,), generator=torch.Generator().manual_seed(2)).tolist()
    given = true_hidden(target, known[:-1])
    hidden = target.get_decoder()(input_ids=torch.tensor([known[:-1]]), use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(head.take(given), hidden)
    ids, positions = torch.tensor([known[1:]]), torch.arange(1, len(known))[None]
    cache = MtpCache(config=target.config.get_mtp_config())
    tokens, _, _ = stock(ids, hidden[None], attention_mask=None, position_ids=positions, mtp_cache=cache)
    drafter.add(0, known[:-1])
    drafter.accept(0, known[-1:], given)
    assert list(drafter.propose([0], [n])[0].tokens) == tokens[0].tolist()
    cache, ours, theirs = MtpCache(config=target.config.get_mtp_config()), hidden[None], hidden[None]
    for i, step in enumerate(head.chain):
        theirs = stock.forward_layer(i, theirs, positions, cache, input_ids=ids)
        ours = step(ids, ours)
        torch.testing.assert_close(step.norm(ours) if step.wiring.feeds_raw else ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.logits(ours), stock._project_to_logits(theirs), rtol=1e-4, atol=1e-4)
        ids, positions = torch.cat([ids[:, 1:], tokens[:, i : i + 1]], dim=1), positions + 1


@torch.no_grad()
def test_drafts_of_a_whole_generation_are_transformers(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate(use_mtp=True)` reads the same weights from the same names, and drafts the same tokens at every step: rejected drafts
    leave as little behind in our rows, convolutions' inputs included, as in transformers' cropped cache."""
    from transformers.generation.candidate_generator import MTPCandidateGenerator

    monkeypatch.setitem(CASES, "small", _inkling(2, True, [0]))  # transformers wants no more layers in the head than in the target
    made = make("small", shards=3)
    target, steps, stock = made.target, list[tuple[list[int], list[int]]](), MTPCandidateGenerator.get_candidates

    def recorded(self: Any, input_ids: torch.Tensor, **named: Any) -> Any:
        found = stock(self, input_ids, **named)
        models.append(self.mtp_model)
        if not named["is_first_iteration"]:  # the first call only fetches the target's hidden states
            steps.append((input_ids[0].tolist(), found[0][0, input_ids.shape[1] :].tolist()))
        return found

    models: list[Any] = []
    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", recorded)
    prompt = torch.randint(VOCAB - 8, (1, 7), generator=torch.Generator().manual_seed(6))
    output = target.generate(prompt, max_new_tokens=20, do_sample=False, use_mtp=True, pad_token_id=0)[0].tolist()
    assert output == type(target).generate(target, prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
    drafter = load_drafter(MtpOptions(num_steps=2, min_token_prob=0, wiring="transformers"), 63, target)
    for step, layer in zip(drafter.head.chain, models[0].layers, strict=True):
        theirs = {"layer." + n: t for n, t in layer.mtp_block.state_dict().items()}
        theirs |= {f"{part}.weight": getattr(layer, part).weight for part in ("enorm", "hnorm", "eh_proj")}
        assert same(states(step)[:1], [theirs | {"norm.weight": models[0].shared_post_norm.weight}])
    hidden, seen = true_hidden(target, output), prompt.shape[1]
    drafter.add(0, output[:seen])
    assert len(steps) > 8
    for known, candidates in steps:
        assert known == output[: len(known)]
        first = 0 if seen == prompt.shape[1] else seen - 1
        drafter.accept(0, known[seen:], hidden[first : len(known) - 1])
        seen = len(known)
        (tree,) = drafter.propose([0], [2])
        assert list(tree.tokens) == candidates, len(known)


def hosted(name: str, target: PreTrainedModel, head: MtpHead) -> torch.nn.Module:
    """A model of the target's class whose only layer is the head's, with an identity for its final norm."""
    decoder = target.get_decoder()
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers, config.mlp_layer_types = 1, ["dense" if name == "inkling" else "sparse"]
    config.layer_types = ["hybrid_sliding" if name == "inkling" else "indexed_attention"]
    if name == "glm_moe_dsa":
        config.indexer_types = ["full"]
    model = type(decoder)(config).eval()
    model.layers[0].load_state_dict(head.layer.state_dict())
    model.norm = torch.nn.Identity()
    return model


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "inkling"])
@torch.no_grad()
def test_layer_sees_what_it_would_in_its_targets_model(name: str, make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse attention's pick of 4 rows, and Inkling's window and convolutions: in one forward, and row by row with a KV."""
    if name == "inkling":
        settings = CASES[name].settings | {"text_config": CASES[name].settings["text_config"] | {"sliding_window_size": WINDOW}}
        monkeypatch.setitem(CASES, name, replace(CASES[name], settings=settings))
    target = make(name).target
    head, n = load_head(None, target), 3 * WINDOW
    seen: dict[str, torch.Tensor] = {}
    head.layer.register_forward_pre_hook(lambda _, inputs: seen.update(z=inputs[0]))
    head.norm = torch.nn.Identity()
    tokens, hidden = torch.randint(VOCAB, (1, n)), torch.randn(1, n, 32)
    whole = head(tokens, hidden)
    expected = hosted(name, target, head)(inputs_embeds=seen["z"], use_cache=False).last_hidden_state
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    kv, at = HeadKV(), 0
    for step in (9, 1, 1, 2, 5, 6):
        head(torch.randint(VOCAB, (1, 3)), torch.randn(1, 3, 32), kv)  # guesses, which leave no trace
        kv.length = at
        part = head(tokens[:, at : at + step], hidden[:, at : at + step], kv)
        torch.testing.assert_close(part, expected[:, at : at + step], rtol=1e-4, atol=1e-4)
        at += step
    assert (head.window == WINDOW) == (name == "inkling")


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "nemotron_h", "deepseek_v4"])
@torch.no_grad()
def test_a_trees_paths_are_chains(name: str, make: Callable[..., Made]) -> None:
    """Each node's probability is that of its path, drafted alone."""
    target = make(name).target
    drafter = load_drafter(MtpOptions(num_steps=3, topk=3, num_draft_tokens=12, min_token_prob=0), 63, target)
    known = torch.randint(VOCAB, (14,), generator=torch.Generator().manual_seed(4)).tolist()
    hidden = true_hidden(target, known[:-1])
    drafter.add(0, known[:-1])
    drafter.accept(0, known[-1:], hidden)
    (tree,) = drafter.propose([0], [11])
    assert len(tree) == 11
    assert not tree.is_chain
    for node in range(len(tree)):
        path, at = list[int](), node
        while at >= 0:
            path, at = [tree.tokens[at], *path], tree.parents[at]
        tokens, rows, prob = known[1:], hidden[None], 1.0
        for token in path:
            out = drafter.head(torch.tensor([tokens]), rows)
            prob *= float(drafter.head.logits(out)[0, -1].softmax(-1)[token])
            tokens, rows = [*tokens, token], torch.cat([rows, out[:, -1:]], dim=1)
        assert tree.probs[node] == pytest.approx(prob, rel=1e-3), node


@torch.no_grad()
def test_nemotrons_run_of_sublayers_is_attention_and_experts(make: Callable[..., Made]) -> None:
    """Written out from the published weights alone: attention without positions, then experts behind a latent projection."""
    made = make("nemotron_h")
    config, weights = made.target.config, made.weights
    tokens, hidden = torch.randint(VOCAB, (9,)), torch.randn(9, 32)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"mtp.layers.{name}.weight"].T

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return weights[f"mtp.layers.{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.layer_norm_epsilon)

    embedded = made.target.get_input_embeddings().weight[tokens]
    z = linear(torch.cat([norm(embedded, "0.enorm"), norm(hidden, "0.hnorm")], -1), "0.eh_proj")
    x = norm(z, "0.norm")
    q, k, v = (linear(x, f"0.mixer.{p}_proj").view(9, -1, 8) for p in "qkv")
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))
    z = z + linear(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(9, -1), "0.mixer.o_proj")
    x = norm(z, "1.norm")
    sigmoid = linear(x, "1.mixer.gate").sigmoid()
    chosen = (sigmoid + weights["mtp.layers.1.mixer.gate.e_score_correction_bias"]).topk(2).indices
    share = torch.zeros_like(sigmoid).scatter(1, chosen, sigmoid.gather(1, chosen))
    share = 2.5 * share / share.sum(-1, keepdim=True)
    latent = linear(x, "1.mixer.fc1_latent_proj")
    experts = [linear(linear(latent, f"1.mixer.experts.{e}.up_proj").relu() ** 2, f"1.mixer.experts.{e}.down_proj") for e in range(4)]
    routed = linear(torch.einsum("te,teh->th", share, torch.stack(experts, 1)), "1.mixer.fc2_latent_proj")
    z = z + routed + linear(linear(x, "1.mixer.shared_experts.up_proj").relu() ** 2, "1.mixer.shared_experts.down_proj")
    out = load_head(None, made.target)(tokens[None], hidden[None])[0]
    torch.testing.assert_close(out, norm(z, "1.final_layernorm"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kinds", "message"), [(["linear_attention", "moe"], "sublayers of type linear_attention"), ([], "needs mtp_hyb")])
def test_a_run_that_cannot_be_built_is_refused(kinds: list[str], message: str, make: Callable[..., Made]) -> None:
    made = make("nemotron_h")
    made.target.config.mtp_layers_block_type = kinds
    with pytest.raises(HeadError, match=message):
        load_head(None, made.target)


def test_sparse_attention_without_an_indexer_of_its_own_is_refused(make: Callable[..., Made]) -> None:
    """A head's layer that would look at the rows that the target's last layer picked, which no engine hands out."""
    made = make("glm_moe_dsa")
    resave(made.folder, lambda w: [w.pop(n) for n in list(w) if "indexer" in n])
    with pytest.raises(HeadError, match="Shared DSA layers require top-k indices from a previous full indexer layer"):
        specfx.speculate(made.target, "mtp")


def test_a_head_with_convolutions_drafts_chains(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "one", _inkling(1, False, []))
    drafter = load_drafter(MtpOptions(num_steps=4, topk=3, min_token_prob=0), 63, make("one").target)
    assert drafter.shape.topk == 1
    (refusal,) = (r for r in drafter.refusals if r.reason is Reason.DRAFTS_CHAINS)
    assert refusal.detail == "a head with convolutions drafts chains: topk=3 is taken as 1"


@pytest.mark.parametrize("name", ["inkling", "nemotron_h"])
def test_no_fresh_head_is_made_for_targets_that_are_not_llama_like(name: str) -> None:
    with pytest.raises(HeadError, match=r"not built like Llama .*rotary_emb"):
        MtpHead.from_target(target_of(CASES[name]))


@torch.no_grad()
def test_hidden_state_from_before_the_norm_reaches_hnorm(make: Callable[..., Made]) -> None:
    """Step takes it; what comes out of hnorm is the same as if the engine had handed it out."""
    target = make("step3p7").target
    head, tokens = load_head(None, target), list(range(20))
    raw: list[torch.Tensor] = []
    hook = target.get_decoder().norm.register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0]))
    normed = true_hidden(target, tokens)
    hook.remove()
    torch.testing.assert_close(head.hnorm(head.take(normed)), head.hnorm(raw[0][0]), rtol=1e-4, atol=1e-4)


def v4_step(made: Made, tokens: torch.Tensor, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(streams ``[T, S * H]``, logits ``[T, V]``) of a DeepSeek-V4 head over tokens ``[T]`` and streams ``[T, S * H]``, written out from
    the published weights alone."""
    config, weights = made.target.config, made.weights
    n, groups, limit, eps = len(tokens), config.o_groups, config.swiglu_limit, config.rms_norm_eps

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"mtp.0.{name}.weight"].T

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return weights[f"mtp.0.{name}.weight"] * unit(x)

    def rotated(x: torch.Tensor, way: int) -> torch.Tensor:  # [T, heads, D], the last 8 of D in pairs
        angles = torch.arange(n)[:, None] * config.rope_theta ** -(torch.arange(0, 8, 2) / 8)
        turned = torch.view_as_complex(x[..., -8:].unflatten(-1, (4, 2)).contiguous()) * torch.exp(way * 1j * angles)[:, None]
        return torch.cat([x[..., :-8], torch.view_as_real(turned).flatten(-2)], -1)

    def attention(x: torch.Tensor) -> torch.Tensor:
        q = rotated(unit(linear(norm(linear(x, "attn.wq_a"), "attn.q_norm"), "attn.wq_b").view(n, 4, 16)), 1)
        kv = rotated(norm(linear(x, "attn.wkv"), "attn.kv_norm")[:, None], 1)[:, 0]
        seen = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - WINDOW)
        scores = (torch.einsum("ihd,jd->hij", q, kv) / 4).masked_fill(~seen, float("-inf"))
        sinks = weights["mtp.0.attn.attn_sink"][:, None, None].expand(-1, n, 1)
        shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        out = rotated(torch.einsum("hij,jd->ihd", shares, kv), -1).reshape(n, groups, -1)
        lowered = torch.einsum("tgd,grd->tgr", out, weights["mtp.0.attn.wo_a.weight"].unflatten(0, (groups, -1)))
        return linear(lowered.flatten(1), "attn.wo_b")

    def expert(x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up = linear(x, f"{name}.w1").clamp(max=limit), linear(x, f"{name}.w3").clamp(-limit, limit)
        return linear(torch.nn.functional.silu(gate) * up, f"{name}.w2")

    def experts(x: torch.Tensor) -> torch.Tensor:
        scores = torch.nn.functional.softplus(linear(x, "ffn.gate")).sqrt()
        chosen = (scores + weights["mtp.0.ffn.gate.bias"]).topk(2).indices
        share = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        share = config.routed_scaling_factor * share / share.sum(-1, keepdim=True)
        routed = torch.stack([expert(x, f"ffn.experts.{e}") for e in range(4)], 1)
        return torch.einsum("te,teh->th", share, routed) + expert(x, "ffn.shared_experts")

    def connected(x: torch.Tensor, kind: str, block: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        fn, base, scale = (weights[f"mtp.0.hc_{kind}_{part}"] for part in ("fn", "base", "scale"))
        raw = (unit(x.flatten(1)) @ fn.T).split([STREAMS, STREAMS, STREAMS**2], -1)
        pre, post, comb = (a * b + c for a, b, c in zip(raw, scale, base.split([STREAMS, STREAMS, STREAMS**2]), strict=True))
        comb = comb.view(n, STREAMS, STREAMS).softmax(-1) + config.hc_eps
        comb = comb / (comb.sum(-2, keepdim=True) + config.hc_eps)
        for _ in range(config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + config.hc_eps)
            comb = comb / (comb.sum(-2, keepdim=True) + config.hc_eps)
        out = block(norm(torch.einsum("ts,tsh->th", pre.sigmoid() + config.hc_eps, x), f"{kind}_norm"))
        return 2 * post.sigmoid()[..., None] * out[:, None] + torch.einsum("tij,tih->tjh", comb, x)

    embedded = linear(norm(made.target.get_input_embeddings().weight[tokens], "enorm"), "e_proj")
    z = linear(norm(streams.unflatten(-1, (STREAMS, -1)), "hnorm"), "h_proj") + embedded[:, None]
    z = connected(connected(z, "attn", attention), "ffn", experts)
    fn, base, scale = (weights[f"mtp.0.hc_head_{part}"] for part in ("fn", "base", "scale"))
    shares = (unit(z.flatten(1)) @ fn.T * scale + base).sigmoid() + config.hc_eps
    final = norm(torch.einsum("ts,tsh->th", shares, z), "norm")
    return z.flatten(1), final @ made.target.get_output_embeddings().weight.T


@pytest.mark.parametrize("name", ["deepseek_v4", "deepseek_v4, windows"])
@torch.no_grad()
def test_deepseek_v4s_step_is_that_of_its_weights(name: str, make: Callable[..., Made]) -> None:
    """Streams and logits, beyond the window: in one forward, row by row behind guesses that leave no trace, and fed with its own."""
    made, n = make(name), 3 * WINDOW
    head, tokens = load_head(None, made.target), torch.randint(VOCAB, (n + 3,), generator=torch.Generator().manual_seed(8))
    assert (head.window, head.hidden_size, head.recurrent) == (WINDOW, STREAMS * 32, False)
    given = true_hidden(made.target, tokens[:n].tolist())
    expected, logits = v4_step(made, tokens[1 : n + 1], given)
    whole = head(tokens[None, 1 : n + 1], given[None])
    torch.testing.assert_close(whole[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.logits(whole)[0], logits, rtol=1e-4, atol=1e-3)
    kv = HeadKV()
    for at, step in ((0, 9), (9, 1), (10, 1), (11, 2), (13, 5), (18, 6)):
        head(torch.randint(VOCAB, (1, 3)), torch.randn(1, 3, STREAMS * 32), kv)
        kv.length = at
        part = head(tokens[None, at + 1 : at + step + 1], given[None, at : at + step], kv)
        torch.testing.assert_close(part[0], expected[at : at + step], rtol=1e-4, atol=1e-4)
    for guesses in (tokens[n + 1 :], tokens[n + 1 :].flip(0)):
        kv.length, fed, rows = n, whole[:, -1:], given
        for k, guess in enumerate(guesses):
            fed, rows = head(guess[None, None], fed, kv), torch.cat([rows, fed[0]])
            expected, logits = v4_step(made, torch.cat([tokens[1 : n + 1], guesses[: k + 1]]), rows)
            torch.testing.assert_close(fed[0], expected[-1:], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(head.logits(fed)[0], logits[-1:], rtol=1e-4, atol=1e-3)


def test_streams_are_not_the_lm_heads_input(make: Callable[..., Made]) -> None:
    """Which is all that engines hand out: where one could verify drafts, `generate` is still stock's, and says why."""
    target = make("deepseek_v4, windows").target
    drafter = load_drafter(MtpOptions(), 63, target)
    drafter.add(0, [1, 2, 3])
    with pytest.raises(ValueError, match=r"hidden must be \[m >= 1, 96\] for 1 tokens, got \[3, 32\]"):
        drafter.accept(0, [4], torch.zeros(3, 32))
    specfx.speculate(target, "mtp", engine="graph", compile="off")
    prompt = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(target.generate(prompt, **arguments), type(target).generate(target, prompt, **arguments))
    report = specfx.explain(target)
    assert report.verifies == "trees"
    assert dict(report.stock_calls) == {"no engine hands out what this head is fed": 1}
    (refusal,) = (r for r in report.refusals if r.reason is Reason.HEAD_UNFED)
    assert "3 hyper-connection streams" in refusal.detail


@torch.no_grad()
def test_a_deepseek_v4_head_has_its_targets_precisions(make: Callable[..., Made]) -> None:
    """As transformers loads it in bfloat16: norms, sinks, the router's bias and hyper-connections stay float32."""
    target = make("deepseek_v4").target.bfloat16()
    for name, parameter in (*target.named_parameters(), *target.named_buffers()):
        if any(part in name.split(".") for part in target._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.float()
    with pytest.warns(UserWarning, match="stored as float32 and was cast"):
        drafter = load_drafter(MtpOptions(num_steps=3, topk=1, min_token_prob=0), 63, target)
    kinds = {name: tensor.dtype for name, tensor in drafter.head.state_dict().items()}
    for name, kind in kinds.items():
        assert kind == (torch.float32 if "hc" in name or name.endswith(("norm.weight", "sinks", "bias")) else torch.bfloat16), name
    drafter.add(0, [1, 2, 3])
    drafter.accept(0, [4], true_hidden(target, [1, 2, 3]))
    assert len(drafter.propose([0], [3])[0]) == 3


@pytest.mark.parametrize("part", ["hc_head_scale", "hc_attn_fn", "attn.attn_sink", "e_proj.weight"])
def test_deepseek_v4s_own_parts_are_read_strictly(part: str, make: Callable[..., Made]) -> None:
    made = make("deepseek_v4")
    """Those that transformers renames are called by their names there."""
    name = f"mtp.0.{part}"
    ours = {"hc_attn_fn": "mtp.0.attn_hc.fn", "attn.attn_sink": "mtp.0.self_attn.sinks"}.get(part, name)
    shape = list(made.weights[name].shape)
    resave(made.folder, lambda w: w.update({name: torch.ones(*shape, 2)}))
    with pytest.raises(HeadError) as caught:
        load_head(None, made.target)
    assert f"{ours} is {[*shape, 2]} in the file, {shape} for this target" in str(caught.value)
    resave(made.folder, lambda w: (w.pop(name), w.update({name + "_inv": torch.ones(shape)})))
    with pytest.raises(HeadError) as caught:
        load_head(None, made.target)
    assert f"missing {ours} {shape}" in str(caught.value)
    assert "left over" in str(caught.value)


HIDDEN_FIRST, NO_NORM, ZERO_FIRST, GEMMA = (
    {"mimo", "inkling", "inkling_text"},
    {"ernie4_5_moe", "inkling_text"},
    {"mimo", "ernie4_5_moe", "hy_v3"},
    {"qwen3_next", "qwen3_5", "step3p7"},
)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("deepseek_v4")])
@torch.no_grad()
def test_wiring_is_the_familys(name: str, make: Callable[..., Made]) -> None:
    """What goes into the decoder layer and what becomes of its output, written out from the checkpoint's weights."""
    made = make(name)
    head, weights = load_head(None, made.target), made.truth[0]
    tokens, hidden = torch.randint(VOCAB, (1, 6)), torch.randn(1, 6, 32)
    seen: dict[str, torch.Tensor] = {}
    head.layer.register_forward_pre_hook(lambda _, inputs: seen.update(z=inputs[0]))
    head.layer.register_forward_hook(lambda _, inputs, out: seen.update(out=out[0] if isinstance(out, tuple) else out))

    def norm(x: torch.Tensor, part: str) -> torch.Tensor:
        weight = weights[part + ".weight"] + (1 if name in GEMMA else 0)
        config = made.target.config.get_text_config()
        eps = config.layer_norm_epsilon if name.startswith("nemotron_h") else config.rms_norm_eps
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    logits = head.logits(head(tokens, hidden))
    embedded = made.target.get_input_embeddings()(tokens).clone()  # with the target's own norm, where it has one
    if name in ZERO_FIRST:
        embedded[:, 0] = 0
    halves = [norm(embedded, "enorm"), norm(hidden, "hnorm")]
    z = torch.cat(halves[::-1] if name in HIDDEN_FIRST else halves, -1) @ weights["eh_proj.weight"].T
    torch.testing.assert_close(seen["z"], z, rtol=1e-4, atol=1e-4)
    out = seen["out"] if name in NO_NORM else norm(seen["out"], "norm")
    vocabulary = weights["head.weight"] if "output" in made.case.parts else made.target.get_output_embeddings().weight
    divisor, size = (3, VOCAB - 8) if name.startswith("inkling") else (1, VOCAB)
    torch.testing.assert_close(logits, out / divisor @ vocabulary[:size].T, rtol=1e-4, atol=1e-3)
    fed = seen["out"] if name.startswith(("glm", "step")) or name in NO_NORM else out
    torch.testing.assert_close(head(tokens, hidden), fed, rtol=1e-4, atol=1e-4)


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_missing_weights_are_named(name: str, make: Callable[..., Made]) -> None:
    made = make(name)
    stored = case_name(made, "hnorm")
    attention = next(n for n in made.weights if n.endswith(("o_proj.weight", "dense.weight", "wo_ud.weight", "wo_b.weight")))
    resave(made.folder, lambda w: [w.pop(n) for n in (stored, attention)])
    with pytest.raises(HeadError) as caught:
        load_head(None, made.target)
    assert f"missing {stored} [32]" in str(caught.value)
    assert ("o_b_proj.weight" if name.startswith("deepseek_v4") else "o_proj.weight") in str(caught.value)
    assert str(made.folder) in str(caught.value)


def case_name(made: Made, part: str) -> str:
    first = made.target.config.get_text_config().num_hidden_layers
    return made.case.parts[part].format(layer=made.case.prefix(first, 0), i=0) + ".weight"


@pytest.mark.parametrize("name", CASES)
def test_left_over_weights_are_named(name: str, make: Callable[..., Made]) -> None:
    made = make(name)
    first = made.target.config.get_text_config().num_hidden_layers
    stranger = made.case.prefix(first, 0) + "stranger.weight"
    resave(made.folder, lambda w: w.update({stranger: torch.ones(3)}))
    with pytest.raises(HeadError, match=rf"left over {stranger} \[3\]"):
        load_head(None, made.target)


def test_misshapen_weights_are_named_with_both_shapes(make: Callable[..., Made]) -> None:
    made = make("deepseek_v3")
    name = case_name(made, "proj")
    resave(made.folder, lambda w: w.update({name: torch.ones(32, 32)}))
    with pytest.raises(HeadError, match=rf"{name} is \[32, 32\] in the file, \[32, 64\] for this target"):
        load_head(None, made.target)


@pytest.mark.parametrize("gone", [("down_proj",), ("gate_proj", "up_proj", "down_proj"), ("up_proj",)])
def test_a_missing_expert_is_an_error(gone: tuple[str, ...], make: Callable[..., Made]) -> None:
    made = make("deepseek_v3")
    resave(made.folder, lambda w: [w.pop(f"model.layers.2.mlp.experts.1.{kind}.weight") for kind in gone])
    with pytest.raises(HeadError, match=r"mlp\.experts"):
        load_head(None, made.target)


def test_weights_of_a_further_layer_are_left_over(make: Callable[..., Made]) -> None:
    made = make("deepseek_v3, two layers")
    made.target.config.num_nextn_predict_layers = 1
    with pytest.raises(HeadError, match=r"left over model\.layers\.3\.enorm\.weight"):
        load_head(None, made.target)


def test_a_layer_that_the_config_promises_is_missed(make: Callable[..., Made]) -> None:
    made = make("deepseek_v3")
    made.target.config.num_nextn_predict_layers = 2
    with pytest.raises(HeadError, match=r"missing model\.layers\.3\.enorm\.weight"):
        load_head(None, made.target)


def test_fp8_and_integer_weights_are_refused_by_name(make: Callable[..., Made]) -> None:
    made = make("deepseek_v3")
    name = case_name(made, "proj")
    resave(made.folder, lambda w: w.update({name: w[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(HeadError, match=rf"not floating point: {name} \(F8_E4M3\)"):
        load_head(None, made.target)


def test_another_precision_is_cast_with_a_warning(make: Callable[..., Made]) -> None:
    made = make("qwen3_next", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="stored as bfloat16 and was cast to its target's float32"):
        load_head(None, made.target)


def test_a_cast_that_loses_a_weight_is_refused(make: Callable[..., Made]) -> None:
    made = make("qwen3_next")
    resave(made.folder, lambda w: w.update({"mtp.fc.weight": w["mtp.fc.weight"] * 1e6}))
    with pytest.raises(HeadError, match=r"not finite as torch\.float16: mtp\.fc\.weight"):
        load_head(None, made.target.half())


def test_only_the_heads_tensors_are_read_and_once(make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("deepseek_v3", shards=4)
    read: list[str] = []
    real = mtp_families.read_tensor
    monkeypatch.setattr(mtp_families, "read_tensor", lambda file, name: read.append(name) or real(file, name))
    (made.folder / "model-00001-of-00004.safetensors").unlink()  # nothing of the head is in it
    assert same(states(load_head(None, made.target)), made.truth)
    copies = {n for n in made.weights if n.endswith(("embed_tokens.weight", "shared_head.head.weight"))}
    assert sorted(read) == sorted(made.weights.keys() - copies)


def test_a_checkpoint_without_a_head_says_where_it_looked(make: Callable[..., Made]) -> None:
    made = make("deepseek_v3")
    resave(made.folder, lambda w: [w.pop(n) for n in made.weights])
    with pytest.raises(HeadError, match=r"no MTP head.*model\.layers\.2\..*DeepSeek-V3.*specfx train mtp") as caught:
        specfx.speculate(made.target, "mtp")
    assert str(made.folder) in str(caught.value)


def test_a_model_type_without_heads_says_which_have_them(tmp_path: Path) -> None:
    target = tiny_model("llama")
    for place in ("", str(tmp_path), "someone/unknown"):
        target.config._name_or_path = place
        with pytest.raises(HeadError, match=r"'llama'.*Qwen3-Next.*specfx train mtp"):
            specfx.speculate(target, "mtp")


def test_a_model_made_from_nothing_has_no_checkpoint() -> None:
    target = tiny_model("deepseek_v3")
    for place in ("", "someone/unknown", "/nowhere/at all"):
        target.config._name_or_path = place
        with pytest.raises(HeadError, match="no checkpoint to look for an MTP head in"):
            find_head(target)


@pytest.mark.parametrize("name", CASES)
def test_export_loads_back_equal(name: str, make: Callable[..., Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(name, shards=3)
    out = tmp_path / "nextn"
    assert main(["export-nextn", str(made.folder), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert config["architectures"] == [type(made.target).__name__ + "NextN"]
    (file,) = out.glob("*.safetensors")
    exported = load_file(file)
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == exported.keys()
    count = made.case.layers * len(made.case.run)
    assert all(n.startswith(tuple(f"model.layers.{i}." for i in range(count))) for n in exported)
    assert not any("embed_tokens" in n for n in exported)
    shutil.rmtree(made.folder)
    head = load_head(out, made.target)
    assert same(states(head), made.truth)
    family = mtp_families.family_of([made.target.config.model_type])
    assert head.wiring == family.wiring
    others = load_head(out, made.target, wiring="transformers")
    assert others.wiring == (family.in_transformers or family.wiring)
    assert same(states(others), [{n: t for n, t in step.items() if not n.startswith("head.")} for step in made.truth])


def test_deepseek_export_has_sglangs_names(make: Callable[..., Made], tmp_path: Path) -> None:
    made = make("deepseek_v3")
    out = export_nextn(made.target, tmp_path / "nextn")
    weights = load_file(out / "model-00001-of-00001.safetensors")
    expected = {n.replace("model.layers.2.", "model.layers.0.") for n in made.weights}
    assert weights.keys() == {n for n in expected if not n.endswith(("embed_tokens.weight", "shared_head.head.weight"))}
    assert json.loads((out / "config.json").read_text())["architectures"] == ["DeepseekV3ForCausalLMNextN"]


def test_export_refuses_what_it_would_lose(make: Callable[..., Made], tmp_path: Path) -> None:
    made = make("qwen3_next")
    with pytest.raises(HeadError, match="isn't an empty folder"):
        export_nextn(made.folder, made.folder)
    resave(made.folder, lambda w: w.update({"mtp.stranger": torch.ones(1)}))
    with pytest.raises(HeadError, match=r"mtp\.stranger"):
        export_nextn(made.folder, tmp_path / "nextn")
    with pytest.raises(HeadError, match="nothing to export"):
        export_nextn(save_head(MtpHead.from_target(made.target), tmp_path / "own").parent, tmp_path / "nextn")


def test_a_trained_head_is_preferred_to_the_checkpoints_own(make: Callable[..., Made], tmp_path: Path) -> None:
    made = make("deepseek_v3")
    head = MtpHead.from_target(made.target)
    loaded = load_head(save_head(head, tmp_path / "own"), made.target)
    assert same(states(loaded), states(head))
    assert not same(states(loaded), made.truth)
