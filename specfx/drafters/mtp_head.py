"""One next-n (MTP) head, as a module beside its target and as a file.

A head is the multi-token-prediction module of DeepSeek-V3 (2024, section 2.2). With the target's hidden state h_t (the LM head's
input at position t) and the next token x_{t+1}::

    z = eh_proj([enorm(embed(x_{t+1})) ; hnorm(h_t)])  ->  one decoder layer with its own KV  ->  norm  ->  LM head  ->  x_{t+2}

For the second draft step and on, the head's own hidden state (after its norm) takes the place of h. Embedding and LM head are the
target's own modules, referred to and never registered, so that `state_dict` holds the head's weights alone; the decoder layer is a
copy, so nothing that happens to a head can reach its target. Published families differ in names and wiring: `mtp_families` has the
table, `mtp_layers` builds their decoder layers from the target's.

The file is one safetensors file with DeepSeek's names, as SGLang's NextN export writes them: ``model.layers.0.`` and then
``enorm.weight``, ``hnorm.weight``, ``eh_proj.weight``, ``shared_head.norm.weight`` and the decoder layer's own names. It is read
strictly, because a head with a missing or misread weight still drafts: it is only never right.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from specfx.drafters.mtp_families import PLAIN, Family, Wiring, find_head
from specfx.drafters.mtp_files import DRAFT_VOCAB, read_draft_vocab
from specfx.drafters.mtp_kv import HeadKV
from specfx.drafters.mtp_layers import TargetParts, family_layer, own_copy, target_parts, to_target_names
from specfx.errors import HeadError

PREFIX = "model.layers.0."
_OWN = {"enorm.": "enorm.", "hnorm.": "hnorm.", "eh_proj.": "eh_proj.", "norm.": "shared_head.norm."}
"""What stands beside the decoder layer: prefix in `MtpHead` -> prefix in the file (after `PREFIX`)."""


class MtpHead(nn.Module):
    """A next-n head and the parts of its target that it shares.

    A head with several layers is its first one and, in `further`, those of the later draft steps, each an `MtpHead` itself: step k
    is made by ``chain[min(k, len(chain) - 1)]``. Layer k runs over pairs of layer k - 1's hidden state at row t and the token
    x_{t+k+1}; each has a KV of its own (as in transformers' `MtpModel` and vLLM).

    Build one with `from_target` (fresh) or `load_head` (trained). Its layer attends to the whole context, whatever window the
    target's layers have, unless its family says otherwise (`window`). Greedy drafts don't depend on scalings that a target applies
    to its logits, their probabilities do; of these only `divisor` is followed.
    """

    def __init__(
        self,
        layer: Any,
        norm: Any,
        enorm: nn.Module,
        hnorm: nn.Module,
        rotary: nn.Module | None,
        embed: nn.Module,
        lm_head: nn.Module,
        wiring: Wiring = Wiring(),  # noqa: B008 (frozen)
        final_norm: Any = None,
        own_head: bool = False,
        hc_head: Any = None,
    ) -> None:
        super().__init__()
        weight: torch.Tensor = hnorm.weight  # type: ignore[assignment]
        hidden_size, like = weight.shape[0], {"device": weight.device, "dtype": weight.dtype}
        self.enorm, self.hnorm = enorm, hnorm
        self.streams = 1
        """Hyper-connection streams of a token, that lie in a hidden state one behind the other."""
        if wiring.streams:
            like["dtype"] = embed.weight.dtype  # type: ignore[assignment]  # such a target keeps its norms in float32
            self.e_proj = nn.Linear(hidden_size, hidden_size, bias=False, **like)
            self.h_proj = nn.Linear(hidden_size, hidden_size, bias=False, **like)
            self.hc_head, self.streams = hc_head, hc_head.hc_mult
        else:
            self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False, **like)
        self.layer = layer
        self.norm = norm
        if own_head:
            self.head = nn.Linear(hidden_size, lm_head.weight.shape[0], bias=False, **like)  # type: ignore
            lm_head = self.head
        self.further = nn.ModuleList()
        self.wiring = wiring
        self.window: int | None = None
        self.rope_type: str | None = None
        self.divisor = 1.0
        """The target divides the LM head's input by this."""
        self.vocabulary: int = lm_head.weight.shape[0]  # type: ignore
        """Tokens that the LM head has logits for; its rows beyond them are padding."""
        self.recurrent = any(isinstance(module, nn.Conv1d) for module in layer.modules())
        """Rows must follow each other: convolutions look at the rows before, whoever's they are, so the head drafts chains."""
        self.draft_ids: torch.Tensor | None
        """``[N]``: the tokens that are drafted, or None for all."""
        self.draft_weight: torch.Tensor
        self.draft_bias: torch.Tensor | None
        for name in ("draft_ids", "draft_weight", "draft_bias"):
            self.register_buffer(name, None, persistent=False)
        self._eager = any(getattr(getattr(m, "config", None), "_attn_implementation", None) == "eager" for m in layer.modules())
        self._indexed = any(hasattr(module, "indexer") for module in layer.modules())  # it picks rows by its mask, and needs one
        # In a tuple nn.Module does not register them: they are the target's, or the head's own once more, and the frequencies must stay
        # float32 in `.to()`.
        self._unregistered = (embed, lm_head, rotary, final_norm)

    @classmethod
    def from_target(cls, target: nn.Module) -> MtpHead:
        """A fresh head for `target`, initialised from its last decoder layer and final norm.

        `eh_proj` starts as the identity on the (normalised) hidden state plus a tenth of the embedding. The weights have the
        target's dtype and device and don't require grad. Raises `HeadError` if the target isn't built like Llama.
        """
        parts = target_parts(target)
        head = cls._around(own_copy(parts.layer, target), target, parts, PLAIN)
        with torch.no_grad():
            weight = head.eh_proj.weight
            eye = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
            weight.copy_(torch.cat([0.1 * eye, eye], dim=1))
        return head.requires_grad_(False).eval()

    @classmethod
    def for_family(cls, target: nn.Module, family: Family, layers: Sequence[Mapping[str, torch.Tensor]]) -> MtpHead:
        """A head of `family` with a layer for each of `layers`, whose names and shapes decide between a target's kinds of layer.

        Its weights are still those of the target's layers, or random.
        """
        parts = target_parts(target, family)
        text = parts.decoder.config
        steps = []
        for i, weights in enumerate(layers):
            layer, kind, window = family_layer(target, parts, family, i, weights)
            step = cls._around(layer, target, parts, family)
            step.window = window
            if parts.rotary is not None and "layer_type" in inspect.signature(type(parts.rotary).forward).parameters:
                # DeepSeek-V4's layers know by another name what they take
                step.rope_type = getattr(getattr(layer, "self_attn", None), "rope_layer_type", kind)
            step.divisor = getattr(text, family.divisor) if family.divisor else 1.0
            step.vocabulary = min(step.vocabulary, getattr(text, "unpadded_vocab_size", None) or step.vocabulary)
            steps.append(step)
        steps[0].further.extend(steps[1:])
        return steps[0].requires_grad_(False).eval()

    @classmethod
    def _around(cls, layer: Any, target: nn.Module, parts: TargetParts, family: Family) -> MtpHead:
        return cls(
            layer=layer,
            norm=copy.deepcopy(parts.norm) if "norm" in family.parts else nn.Identity(),
            enorm=_identity_norm(parts.norm),
            hnorm=_identity_norm(parts.norm),
            rotary=copy.deepcopy(parts.rotary),  # dynamic kinds of RoPE change their buffers
            embed=parts.embed,
            lm_head=parts.lm_head,
            wiring=family.wiring,
            final_norm=parts.norm,
            own_head="head" in family.parts,
            hc_head=copy.deepcopy(parts.decoder.hc_head) if family.wiring.streams else None,
        )

    @property
    def chain(self) -> list[MtpHead]:
        """The head's layers, the first one (itself) included."""
        return [self, *self.further]  # type: ignore[list-item]

    @property
    def dtype(self) -> torch.dtype:
        return self._proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._proj.weight.device

    @property
    def hidden_size(self) -> int:
        """Numbers in a hidden state, all its streams together."""
        return self._proj.out_features * self.streams

    @property
    def _proj(self) -> nn.Linear:
        return self.h_proj if self.wiring.streams else self.eh_proj

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the first layer is fed for the target's hidden states (the LM head's inputs), ``[..., H]`` -> ``[..., H]``.

        A family that wants them from before the final norm gets them up to a factor for each row, which `hnorm` takes out again.
        """
        if self.divisor != 1:
            hidden = hidden * self.divisor
        if not self.wiring.takes_raw:
            return hidden
        scale = self._unregistered[3](torch.ones_like(hidden[..., :1, :]))  # the norm's weight: its input has unit mean square
        return hidden / scale

    def forward(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        kv: HeadKV | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states ``[B, T, H]`` (H: `hidden_size`) for `logits` and for the next step, from pairs of `tokens` ``[B, T]`` and
        `hidden` ``[B, T, H]``.

        Row i pairs ``hidden[:, i]`` with the token that it predicted; the result (after the head's norm, unless the family feeds on
        what is before it) predicts the token after that. The rows follow those in `kv` and are appended to it. `positions`
        ``[B or 1, T]`` default to the rows' indices in `kv` (vLLM's choice: under RoPE only differences count). `mask` (True: may be
        seen), ``[B or 1, 1, T, length + T]``, defaults to causal.
        """
        if kv is None and self.recurrent:
            kv = HeadKV()  # its layer asks it for the positions
        past = kv.length if kv is not None else 0
        n = tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + n, device=tokens.device)[None]
        narrow = self.window is not None and past + n > self.window
        if mask is None and (
            narrow or self._indexed or (n > 1 and (past or self._eager))
        ):  # sdpa knows the plain causal triangle without a mask
            mask = torch.ones(n, past + n, dtype=torch.bool, device=tokens.device).tril(past)[None, None]
            if narrow:
                assert self.window is not None
                mask = mask.triu(past - self.window + 1)
        if mask is not None and self._eager:
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        return self.over(tokens, hidden, positions, mask, kv)

    def over(
        self, tokens: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, kv: HeadKV | None
    ) -> torch.Tensor:
        """`forward` with nothing decided here: positions ``[B or 1, T]``, and the mask that the layer's attention takes."""
        embed: Any
        embed, _, rotary, _ = self._unregistered
        embedded = nn.functional.embedding(tokens, embed.weight) if self.wiring.bare_embedding else embed(tokens)
        if self.wiring.zero_first:
            embedded = embedded.masked_fill((positions == 0)[..., None], 0)
        z = self._joined(embedded, hidden)
        rotation = {}
        if rotary is not None:
            # transformers 5.17 wants Qwen3.5's positions in time, height and width, which are equal for text
            grid = positions.expand(3, *positions.shape) if hasattr(rotary, "mrope_section") else positions
            angles = rotary(z, grid, *([self.rope_type] if self.rope_type else []))
            rotation["position_embeddings"] = {self.rope_type: angles} if self.wiring.streams else angles
        z = self.layer(z, attention_mask=mask, position_ids=positions, past_key_values=kv, use_cache=kv is not None, **rotation)
        if kv is not None:
            kv.length += tokens.shape[1]
        z = z[0] if isinstance(z, tuple) else z
        z = z.flatten(2) if self.wiring.streams else z
        return z if self.wiring.feeds_raw else self.norm(z)

    def _joined(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The decoder layer's input ``[B, T, H]``, or ``[B, T, S, H]`` for S streams ``[B, T, S * H]``."""
        if self.wiring.streams:
            each = self.h_proj(self.hnorm(hidden.unflatten(-1, (self.streams, -1))))
            return each + self.e_proj(self.enorm(embedded))[..., None, :]
        halves = [self.enorm(embedded), self.hnorm(hidden)]
        return self.eh_proj(torch.cat(halves[::-1] if self.wiring.hidden_first else halves, dim=-1))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The LM head on this layer's hidden states: ``[..., hidden_size]`` -> ``[..., V]``. It is the target's, or the layer's own."""
        logits = self._unregistered[1](self._headed(hidden))
        return logits if logits.shape[-1] == self.vocabulary else logits[..., : self.vocabulary]

    def draft_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`logits` of the draft vocabulary alone, ``[..., N]``, if there is one (`restrict`)."""
        if self.draft_ids is None:
            return self.logits(hidden)
        return torch.nn.functional.linear(self._headed(hidden), self.draft_weight, self.draft_bias)

    def _headed(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.wiring.streams:  # hc_head takes [B, T, S, H]
            hidden = self.hc_head(hidden.reshape(1, -1, self.streams, self._proj.out_features)).reshape(*hidden.shape[:-1], -1)
        hidden = self.norm(hidden) if self.wiring.feeds_raw else hidden
        return hidden if self.divisor == 1 else hidden / self.divisor

    @torch.no_grad()
    def restrict(self, ids: torch.Tensor) -> None:
        """Draft these tokens alone (``[N]`` int64, each once): the LM head's rows of them are copied into a small one, which does not
        follow later changes of the LM head.

        Raises `HeadError` for ids that are not of the target's vocabulary.
        """
        size = self.vocabulary
        fits = ids.dim() == 1 and ids.dtype == torch.int64 and 0 < len(ids) == len(ids.unique()) and 0 <= ids.min() <= ids.max() < size
        if not fits:
            raise HeadError(f"a draft vocabulary must be different int64 ids [N] below {size}, got {ids.dtype} {_shape(ids)}")
        chosen = ids.sort().values.to(self.device)
        for step in self.chain:
            own: Any = step._unregistered[1]
            step.draft_ids = chosen
            if step is not self and own is self._unregistered[1]:  # one copy for all layers
                step.draft_weight, step.draft_bias = self.draft_weight, self.draft_bias
                continue
            bias = getattr(own, "bias", None)
            step.draft_weight, step.draft_bias = own.weight[chosen], None if bias is None else bias[chosen]

    @torch.no_grad()
    def try_out(self, target: nn.Module) -> None:
        """Run each layer once, before any work is lost: not every family's layers can be driven from outside their model.

        Raises `HeadError`.
        """
        try:
            for step in self.chain:
                tokens = torch.zeros(1, 2, dtype=torch.long, device=self.device)
                step(tokens, torch.zeros(1, 2, self.hidden_size, dtype=self.dtype, device=self.device), HeadKV())
        except Exception as e:
            raise HeadError(f"the layers of {type(target).__name__} can't be run as an MTP head: {type(e).__name__}: {e}") from e

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """The head's weights under the names of the file; the tensors are the parameters themselves."""
        return {
            f"model.layers.{i}." + _file_name(name): tensor
            for i, step in enumerate(self.chain)
            for name, tensor in step.state_dict().items()
            if not name.startswith("further.")
        }


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


def load_head(path: str | Path | None, target: nn.Module, draft_vocab: str | Path | None = None, wiring: str = "published") -> MtpHead:
    """Read a head for `target` from a safetensors file, from the folder that holds one (or its shards), from an exported NextN folder
    or the checkpoint of a known family; None looks in the target's own checkpoint (`specfx.drafters.mtp_families.find_head`).
    draft_vocab: a file of `save_draft_vocab`, or the folder that holds it; "auto": the one beside the head, if there is one. wiring: as in
    `MtpOptions`.

    Raises `HeadError`, which names every weight in question with both shapes, if a weight is missing, left over or of another shape,
    or not finite in the target's dtype. A head of another precision is cast, with a warning.
    """
    found = find_head(target, path, wiring)
    where = found.where
    stored = [to_target_names(target, found.family, weights, where) for weights in found.read()]
    if found.family is PLAIN:
        head = MtpHead.from_target(target)
        head.further.extend(MtpHead.from_target(target) for _ in stored[1:])
    else:
        head = MtpHead.for_family(target, found.family, stored)
    expected = [{n: t for n, t in step.state_dict().items() if not n.startswith("further.")} for step in head.chain]
    problems: list[str] = []
    for i, (have, want) in enumerate(zip(stored, expected, strict=True)):
        named = functools.partial(found.stored_name, i)
        problems += [f"missing {named(part)} {_shape(tensor)}" for part, tensor in want.items() if part not in have]
        problems += [f"left over {named(part)} {_shape(tensor)}" for part, tensor in have.items() if part not in want]
        problems += [
            f"{named(part)} is {_shape(have[part])} in the file, {_shape(tensor)} for this target"
            for part, tensor in want.items()
            if part in have and have[part].shape != tensor.shape
        ]
    problems += [f"left over {name} {found.shape(name)}" for name in found.left_over]
    if problems:
        raise HeadError(f"the head {where} does not fit {type(target).__name__}: {'; '.join(problems)}. Train a head for this target.")
    broken, casts = [], set()
    with torch.no_grad():
        for i, (have, want) in enumerate(zip(stored, expected, strict=True)):
            for part, tensor in want.items():
                tensor.copy_(have[part])
                casts |= {have[part].dtype} - {tensor.dtype}
                if not torch.isfinite(tensor).all():
                    broken.append(found.stored_name(i, part))
    if broken:
        raise HeadError(f"the head {where} is not finite as {head.dtype}: {', '.join(broken)}. Use a head or target of another precision.")
    if casts:
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in casts))
        warnings.warn(
            f"the head {where} is stored as {kinds} and was cast to its target's {head.dtype}".replace("torch.", ""), stacklevel=2
        )
    beside = where if where.is_dir() else where.parent
    if draft_vocab == "auto":
        draft_vocab = beside / DRAFT_VOCAB if (beside / DRAFT_VOCAB).exists() else None
    if draft_vocab is not None:
        head.restrict(read_draft_vocab(draft_vocab))
    return head


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
