"""One next-n (MTP) head, as a module beside its target and as a file.

A head is the multi-token-prediction module of DeepSeek-V3 (2024, section 2.2). With the target's hidden state h_t (the LM head's
input at position t) and the next token x_{t+1}::

    z = eh_proj([enorm(embed(x_{t+1})) ; hnorm(h_t)])  ->  one decoder layer with its own KV  ->  norm  ->  LM head  ->  x_{t+2}

For the second draft step and on, the head's own hidden state (after its norm) takes the place of h. Embedding and LM head are the
target's own modules, referred to and never registered, so that `state_dict` holds the head's weights alone; the decoder layer is a
copy, so nothing that happens to a head can reach its target.

The file is one safetensors file with DeepSeek's names, as SGLang's NextN export writes them: ``model.layers.0.`` and then
``enorm.weight``, ``hnorm.weight``, ``eh_proj.weight``, ``shared_head.norm.weight`` and the decoder layer's own names. It is read
strictly, because a head with a missing or misread weight still drafts: it is only never right.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from specfx.errors import HeadError

PREFIX = "model.layers.0."
_OWN = {"enorm.": "enorm.", "hnorm.": "hnorm.", "eh_proj.": "eh_proj.", "norm.": "shared_head.norm."}
"""What stands beside the decoder layer: prefix in `MtpHead` -> prefix in the file (after `PREFIX`)."""


class HeadKV:
    """KV of a head's one layer for one sequence, or for a batch in step: rows ``0 .. length - 1`` are in use.

    Decoder layers see it as their cache (`update` is all of that interface that they use). Rows are written into preallocated
    ``[B, KV heads, capacity, D]`` tensors that grow by doubling; `length` may be set back, which forgets the rows beyond it.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, KV heads, n, D]`` and return views of all rows, the new ones included."""
        end = self.length + keys.shape[2]
        self._keys = self._room(self._keys, keys, end)
        self._values = self._room(self._values, values, end)
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def get_seq_length(self, *_: object) -> int:
        return self.length

    def _room(self, old: torch.Tensor | None, new: torch.Tensor, rows: int) -> torch.Tensor:
        if old is not None and old.shape[2] >= rows:
            return old
        batch, heads, _, dim = new.shape
        grown = new.new_empty(batch, heads, max(256, 2 * rows), dim)
        if old is not None:
            grown[:, :, : self.length] = old[:, :, : self.length]
        return grown


class MtpHead(nn.Module):
    """A next-n head and the parts of its target that it shares.

    Build one with `from_target` (fresh) or `load_head` (trained). Its layer attends to the whole context, whatever window the
    target's layers have. Greedy drafts don't depend on scalings that a target applies to its logits, their probabilities do.
    """

    def __init__(
        self, layer: Any, norm: Any, enorm: nn.Module, hnorm: nn.Module, rotary: nn.Module, embed: nn.Module, lm_head: nn.Module
    ) -> None:
        super().__init__()
        hidden_size = norm.weight.shape[0]
        like = norm.weight
        self.enorm, self.hnorm = enorm, hnorm
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False, device=like.device, dtype=like.dtype)
        self.layer = layer
        self.norm = norm
        self._eager = layer.self_attn.config._attn_implementation == "eager"
        # In a tuple nn.Module does not register them: the first two are the target's, and the frequencies must stay float32 in `.to()`.
        self._unregistered = (embed, lm_head, rotary)

    @classmethod
    def from_target(cls, target: nn.Module) -> MtpHead:
        """A fresh head for `target`, initialised from its last decoder layer and final norm.

        `eh_proj` starts as the identity on the (normalised) hidden state plus a tenth of the embedding. The weights have the
        target's dtype and device and don't require grad. Raises `HeadError` if the target isn't built like Llama.
        """
        decoder, embed, lm_head = _parts(target)
        layer = copy.deepcopy(decoder.layers[-1])
        for module in layer.modules():  # hooks belong to the target (offload, output capture), not to the copy
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
                hooks.clear()
            if hasattr(module, "layer_idx"):
                module.layer_idx = 0
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
            if hasattr(module, "config"):  # a copy too; whatever runs the target's attention, this layer's is stock
                module.config._attn_implementation = "sdpa" if getattr(target, "_supports_sdpa", False) else "eager"
        head = cls(
            layer=layer,
            norm=copy.deepcopy(decoder.norm),
            enorm=_identity_norm(decoder.norm),
            hnorm=_identity_norm(decoder.norm),
            rotary=copy.deepcopy(decoder.rotary_emb),  # dynamic kinds of RoPE change their buffers
            embed=embed,
            lm_head=lm_head,
        )
        with torch.no_grad():
            weight = head.eh_proj.weight
            eye = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
            weight.copy_(torch.cat([0.1 * eye, eye], dim=1))
        return head.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.eh_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.eh_proj.weight.device

    @property
    def hidden_size(self) -> int:
        return self.eh_proj.out_features

    def forward(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        kv: HeadKV | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states ``[B, T, H]`` (after the head's norm) from pairs of `tokens` ``[B, T]`` and `hidden` ``[B, T, H]``.

        Row i pairs ``hidden[:, i]`` with the token that it predicted; the result predicts the token after that. The rows follow
        those in `kv` and are appended to it. `positions` ``[B or 1, T]`` default to the rows' indices in `kv` (vLLM's choice: under RoPE
        only differences count). `mask` (True: may be seen), ``[B or 1, 1, T, length + T]``, defaults to causal.
        """
        past = kv.length if kv is not None else 0
        n = tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + n, device=tokens.device)[None]
        if mask is None and n > 1 and (past or self._eager):  # sdpa knows the plain causal triangle without a mask
            mask = torch.ones(n, past + n, dtype=torch.bool, device=tokens.device).tril(past)[None, None]
        if mask is not None and self._eager:
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        embedded = self._unregistered[0](tokens)
        z = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        z = self.layer(
            z,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=kv,
            use_cache=kv is not None,
            position_embeddings=self._unregistered[2](z, positions),
        )
        return self.norm(z[0] if isinstance(z, tuple) else z)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The target's LM head on this head's hidden states: ``[..., H]`` -> ``[..., V]``."""
        return self._unregistered[1](hidden)

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """The head's weights under the names of the file; the tensors are the parameters themselves."""
        return {PREFIX + _file_name(name): tensor for name, tensor in self.state_dict().items()}


def save_head(head: MtpHead, path: str | Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a head and return the file's path.

    `path` ends with ``.safetensors``, or is a folder (made if need be) that gets a ``model.safetensors``. `metadata` goes into the
    file's header.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        file = file / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.checkpoint().items()}
    save_file(weights, file, metadata={"format": "pt", **(metadata or {})})
    return file


def load_head(path: str | Path, target: nn.Module) -> MtpHead:
    """Read a head for `target` from a safetensors file, or from the folder that holds one (or its shards).

    Raises `HeadError`, which names every weight in question with both shapes, if the file lacks a weight, has one too many or one of
    another shape, or if a weight is not finite in the target's dtype. A head of another precision is cast, with a warning.
    """
    found = _read(Path(path))
    head = MtpHead.from_target(target)
    expected = head.checkpoint()
    problems = [f"missing {name} {_shape(tensor)}" for name, tensor in expected.items() if name not in found]
    problems += [f"left over {name} {_shape(tensor)}" for name, tensor in found.items() if name not in expected]
    problems += [
        f"{name} is {_shape(found[name])} in the file, {_shape(tensor)} for this target"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        raise HeadError(f"the head {path} does not fit {type(target).__name__}: {'; '.join(problems)}. Train a head for this target.")
    strange = {str(t.dtype): name for name, t in found.items() if not t.dtype.is_floating_point}
    if strange:
        raise HeadError(f"the head {path} holds weights that are not floating point: {strange}. Save it as bfloat16 or float32.")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])
    broken = [name for name, tensor in expected.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise HeadError(f"the head {path} is not finite as {head.dtype}: {', '.join(broken)}. Use a head or target of another precision.")
    stored = {t.dtype for t in found.values()} - {head.dtype}
    if stored:
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in stored))
        warnings.warn(f"the head {path} is stored as {kinds} and was cast to its target's {head.dtype}".replace("torch.", ""), stacklevel=2)
    return head


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        whole = path / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise HeadError(f"no head at {path}: give a .safetensors file or a folder that holds one (see examples/train_mtp_head.py)")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                part = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise HeadError(f"the head {file} can't be read as safetensors: {e}") from e
        twice = sorted(weights.keys() & part.keys())
        if twice:
            raise HeadError(f"the head {path} holds {', '.join(twice)} twice (again in {file.name}): keep one head in a folder")
        weights |= part
    return weights


def _parts(target: Any) -> tuple[Any, nn.Module, nn.Module]:
    """(decoder, embedding, LM head) of a Llama-like target."""
    decoder: Any = target.get_decoder() if hasattr(target, "get_decoder") else None
    lacking = [name for name in ("layers", "norm", "rotary_emb") if getattr(decoder, name, None) is None]
    embed, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    lacking += [name for name, module in (("input embeddings", embed), ("LM head", lm_head)) if module is None]
    if not lacking:
        layer = decoder.layers[-1]
        takes = inspect.signature(layer.forward).parameters
        lacking = [f"a layer that takes {name}" for name in ("position_embeddings", "past_key_values") if name not in takes]
        lacking += ["self-attention in its last layer"] if not hasattr(layer, "self_attn") else []
        lacking += [f"floating-point {n}" for n, p in layer.named_parameters() if not p.dtype.is_floating_point]
    if lacking:
        raise HeadError(f"{type(target).__name__} can't have an MTP head: it is not built like Llama (lacks {', '.join(lacking)})")
    return decoder, embed, lm_head


def _identity_norm(norm: Any) -> nn.Module:
    """A copy of `norm` with the weights of a fresh one: ones, or zeros where the class multiplies by ``1 + weight`` (Gemma)."""
    fresh = type(norm)(norm.weight.shape[0])
    result = copy.deepcopy(norm)
    with torch.no_grad():
        result.weight.copy_(fresh.weight)
    return result


def _file_name(name: str) -> str:
    for own, stored in _OWN.items():
        if name.startswith(own):
            return stored + name.removeprefix(own)
    return name.removeprefix("layer.")


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
