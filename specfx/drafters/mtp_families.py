"""MTP heads of published checkpoints as data: one table of families, and the finding and reading of a head's weights.

1. `FAMILIES` says of each family where the weights of a head lie in a checkpoint, what they are called, and how the head is wired.
2. `find_head` opens a checkpoint (its index only), picks the family by ``config.model_type`` and lists the head's weights.
3. `FoundHead.read` reads exactly those tensors, once, under the names of `specfx.drafters.mtp_head.MtpHead`; what is missing,
   misshapen or left over is found there, by comparison with the module.

Names are those of the published checkpoints; sources of the wiring are transformers' `MtpModel` (5.23) and vLLM's ``*_mtp.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from specfx.drafters.mtp_files import TRAIN, checkpoint_folder, model_types, read_config, read_tensor, text_fields, weight_files
from specfx.errors import HeadError

_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Wiring:
    """How one step of a head is run, where families differ; the defaults are DeepSeek-V3's.

    hidden_first: the projection takes ``[hidden; embedding]``. takes_raw: it is fed the target's hidden state from before the final
    norm. feeds_raw: and, from the second step on, its own from before its norm (the norm is then part of `MtpHead.logits`).
    zero_first: the embedding in the pair at position 0 is zero. streams: hidden states are the hyper-connection streams of a token, of
    which each is projected and added to the projected embedding; the head's own ``hc_head`` makes one of them before its norm.
    bare_embedding: a token's row of the embedding matrix is taken without the norm that ends the target's embedding.
    """

    hidden_first: bool = False
    takes_raw: bool = False
    feeds_raw: bool = False
    zero_first: bool = False
    streams: bool = False
    bare_embedding: bool = False


_DEEPSEEK_PARTS = {"enorm": "{layer}enorm.", "hnorm": "{layer}hnorm.", "eh_proj": "{layer}eh_proj.", "norm": "{layer}shared_head.norm."}
_FINAL_LAYERNORM = _DEEPSEEK_PARTS | {"norm": "{layer}final_layernorm."}
_QWEN_PARTS = {"enorm": "mtp.pre_fc_norm_embedding.", "hnorm": "mtp.pre_fc_norm_hidden.", "eh_proj": "mtp.fc.", "norm": "mtp.norm."}
_STREAM_PARTS = {part: "{layer}" + part + "." for part in ("enorm", "hnorm", "e_proj", "h_proj")}
_APPENDED = ("model.layers.{n}.", "model.language_model.layers.{n}.")


@dataclass(frozen=True)
class Family:
    """One family of heads.

    In templates ``{i}`` is the head's layer, ``{n}`` the number of the target's layers plus ``i``, ``{layer}`` the layer's prefix (of a
    run of sublayers ``{i}`` counts these, ``{layer}`` is the first one's and ``{last}`` the last one's).

    layer: prefixes of layer i's weights, of which a checkpoint has one. parts: what stands beside the decoder layer, prefix in `MtpHead`
    -> prefix in the checkpoint (no ``norm``: the family has no final norm; ``head``: an LM head of its own); the first ends where the
    second does, before a dot or an underscore. root: all names that
    belong to heads, if they aren't just the layers'. ignored: copies of what the target shares. strip: infixes without meaning.
    renames: a decoder layer's names that differ from the target's layers'. count: the config's field for the number of layers; absent,
    there are `default`, or as many as the checkpoint holds. stated: parts that are there only if a field of the config is true. run: the
    config's fields that list the sublayers that are one layer of the head together. kinds: the config's fields that list the target's
    kinds of layer -> the kind of the head's. converted_as: the model type whose names
    transformers converts, for a target of one that has none converted. norm, rotary: the target's final norm, and whether its layers
    take rotary positions. divisor: the config's field for what the target divides the LM head's input by. in_transformers: the wiring of
    transformers' `MtpModel`, where that is another one (`as_wired`).
    """

    name: str
    model_types: tuple[str, ...]
    layer: tuple[str, ...] = _APPENDED
    parts: Mapping[str, str] = field(default_factory=lambda: _DEEPSEEK_PARTS)
    root: str | None = None
    ignored: tuple[str, ...] = ("{layer}embed_tokens.", "{layer}shared_head.head.")
    strip: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    count: str | None = "num_nextn_predict_layers"
    default: int | None = None
    stated: Mapping[str, str] = field(default_factory=dict)
    run: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    converted_as: str | None = None
    norm: str = "norm"
    rotary: bool = True
    divisor: str | None = None
    wiring: Wiring = Wiring()
    in_transformers: Wiring | None = None


FAMILIES: tuple[Family, ...] = (
    Family("DeepSeek-V3", ("deepseek_v3", "deepseek_v32")),
    # vLLM feeds a GLM head its own hidden state from before the norm.
    Family("GLM-4.5", ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm_ocr", "glm_ocr_text"), wiring=Wiring(feeds_raw=True)),
    Family("Qwen3-Next", ("qwen3_next",), layer=("mtp.layers.{i}.",), parts=_QWEN_PARTS, root="mtp.", ignored=(), default=1),
    Family(
        "Qwen3.5",
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        layer=("mtp.layers.{i}.",),
        parts=_QWEN_PARTS,
        root="mtp.",
        ignored=(),
        count="mtp_num_hidden_layers",
    ),
    Family("EXAONE-MoE", ("exaone_moe",), layer=("mtp.layers.{i}.",), parts=_QWEN_PARTS, root="mtp.", ignored=()),
    Family(
        "Mellum",
        ("mellum",),
        layer=("mtp.layers.{i}.",),
        parts=_QWEN_PARTS,
        root="mtp.",
        ignored=(),
        kinds={"layer_types": "sliding_attention", "mlp_layer_types": "sparse"},
    ),
    Family(
        "MiMo-7B",
        ("mimo",),
        layer=("model.mtp_layers.{i}.",),
        parts={
            "enorm": "{layer}token_layernorm.",
            "hnorm": "{layer}hidden_layernorm.",
            "eh_proj": "{layer}input_proj.",
            "norm": "{layer}final_layernorm.",
        },
        root="model.mtp_layers.",
        ignored=(),
        wiring=Wiring(hidden_first=True, zero_first=True),
    ),
    Family(
        "MiMo-V2",
        ("mimo_v2_flash", "mimo_v2"),
        layer=("model.mtp.layers.{i}.",),
        parts=_FINAL_LAYERNORM,
        root="model.mtp.",
        ignored=(),
        renames=(("pre_mlp_layernorm.", "post_attention_layernorm."),),
        count=None,
    ),
    Family(
        "ERNIE-4.5",
        ("ernie4_5_moe",),
        layer=("model.mtp_block.{i}.",),
        parts={"enorm": "model.mtp_emb_norm.{i}.", "hnorm": "model.mtp_hidden_norm.{i}.", "eh_proj": "model.mtp_linear_proj.{i}."},
        root="model.mtp_",
        ignored=(),
        wiring=Wiring(zero_first=True),
    ),
    Family(
        "LongCat",
        ("longcat_flash",),
        layer=("model.mtp.layers.{i}.",),
        parts={"enorm": "{layer}enorm.m.", "hnorm": "{layer}hnorm.m.", "eh_proj": "{layer}eh_proj.", "norm": "model.mtp.norm."},
        root="model.mtp.",
        ignored=("model.mtp.embed_tokens.",),
        strip=("transformer_layer.",),
        count=None,
        default=1,
    ),
    Family(
        "Step-3.5",
        ("step3p5", "step3p7"),
        parts=_DEEPSEEK_PARTS | {"head": "{layer}shared_head.output."},
        ignored=("{layer}embed_tokens.",),
        strip=("transformer.",),
        default=3,
        wiring=Wiring(takes_raw=True, feeds_raw=True),
        in_transformers=Wiring(),
    ),
    Family("Bailing", ("bailing_hybrid",), parts=_FINAL_LAYERNORM),
    Family("HY-V3", ("hy_v3",), parts=_FINAL_LAYERNORM, wiring=Wiring(zero_first=True)),
    Family(
        "Nemotron-H",
        ("nemotron_h",),
        layer=("mtp.layers.{i}.",),
        parts=_DEEPSEEK_PARTS | {"norm": "{last}final_layernorm."},
        root="mtp.",
        ignored=(),
        run=("mtp_hybrid_override_pattern", "mtp_layers_block_type"),
        norm="norm_f",
        rotary=False,
    ),
    # vLLM and SGLang embed with the target's own norm, as the checkpoint was trained; transformers 5.23 leaves it out. The head's own
    # LM heads, for Step-3.5, and the hidden states before the norm it leaves out too.
    Family(
        "Inkling",
        ("inkling_mm_model", "inkling", "inkling_text"),
        layer=("model.mtp.layers.{i}.",),
        parts={
            "enorm": "{layer}embed_norm.",
            "hnorm": "{layer}hidden_norm.",
            "eh_proj": "{layer}input_proj.",
            "norm": "model.mtp.chain_norm.",
        },
        root="model.mtp.",
        ignored=(),
        strip=("transformer_block.",),
        count="num_mtp_layers",
        stated={"norm": "chain_hidden_post_norm"},
        converted_as="inkling_mm_model",
        rotary=False,
        divisor="logits_mup_width_multiplier",
        wiring=Wiring(hidden_first=True),
        in_transformers=Wiring(hidden_first=True, bare_embedding=True),
    ),
    # Wiring of the checkpoint's own inference code. Its compress_ratios end with a 0 for the head: a window, and no compressed rows.
    Family(
        "DeepSeek-V4",
        ("deepseek_v4",),
        layer=("mtp.{i}.",),
        parts=_STREAM_PARTS | {"norm": "{layer}norm.", "hc_head.hc": "{layer}hc_head_"},
        root="mtp.",
        ignored=("{layer}emb.tok_emb.", "{layer}head."),
        kinds={"layer_types": "sliding_attention", "mlp_layer_types": "moe"},
        wiring=Wiring(feeds_raw=True, streams=True),
    ),
)

PLAIN = Family("specfx", (), layer=("model.layers.{i}.",), root="", ignored=())
"""Heads that specfx trains: DeepSeek's names and wiring, at layer 0, as in a NextN export."""


def exported(family: Family) -> Family:
    """`family` under the names of a NextN export: those of `PLAIN`, with the family's own wiring."""
    parts = {part: _EXPORTED_PARTS[part] for part in family.parts}
    return dataclasses.replace(family, layer=PLAIN.layer, parts=parts, root="", ignored=(), strip=(), renames=(), count=None, default=None)


def as_wired(family: Family, wiring: str) -> Family:
    """`family` with the wiring that `MtpOptions.wiring` names: the "published" one (vLLM's and SGLang's), or that of "transformers",
    which runs every head with the target's LM head, whether or not the checkpoint has one of its own."""
    if wiring == "published" or family.in_transformers is None:
        return family
    parts = {own: template for own, template in family.parts.items() if own != "head"}
    unused = tuple(template for own, template in family.parts.items() if own == "head")
    return dataclasses.replace(family, parts=parts, ignored=family.ignored + unused, wiring=family.in_transformers)


_EXPORTED_PARTS = (
    _DEEPSEEK_PARTS
    | _STREAM_PARTS
    | {"norm": "{last}shared_head.norm.", "head": "{layer}shared_head.head.", "hc_head.hc": "{layer}hc_head_"}
)
_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def run_kinds(family: Family, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of the sublayers that are one layer of a head of `family`; one, without a name, where layers have no sublayers.

    Raises `HeadError` if the config doesn't list them.
    """
    if not family.run:
        return ("",)
    listed = next((value for name in family.run if (value := config.get(name))), None)
    kinds = tuple(_PATTERN.get(kind, kind) for kind in listed) if isinstance(listed, (str, list, tuple)) else ()
    if not kinds:
        raise HeadError(f"the config of a {family.name} model doesn't list a head's sublayers: it needs {' or '.join(family.run)}")
    return kinds


def family_of(model_types: Iterable[str | None]) -> Family | None:
    """The family of the first of `model_types` that has one."""
    return next((family for t in model_types for family in FAMILIES if t in family.model_types), None)


@dataclass(frozen=True)
class FoundHead:
    """A head's place: its `family`, the folder or file `where`, and for each of its layers the names.

    layers: for each layer, name in `MtpHead` -> name in the checkpoint; the decoder layer's start with ``layer.`` (and the sublayer's
    number, in a run) and are as the checkpoint has them (experts apart, say). prefixes: of each layer in the checkpoint, of a run each
    sublayer's. left_over: names under the head's prefix that the family doesn't know. files: the file of each name.
    """

    family: Family
    where: Path
    layers: tuple[Mapping[str, str], ...]
    prefixes: tuple[tuple[str, ...], ...]
    left_over: tuple[str, ...]
    files: Mapping[str, Path]

    def read(self) -> list[dict[str, torch.Tensor]]:
        """The tensors of each layer; each is read once, and nothing else is.

        Raises `HeadError` for a file that can't be read, and for weights that aren't plain floating point (fp8, integers), by name.
        """
        wanted: dict[Path, list[str]] = {}
        for name in dict.fromkeys(n for layer in self.layers for n in layer.values()):
            wanted.setdefault(self.files[name], []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        strange: dict[str, str] = {}
        for file, names in wanted.items():
            try:
                with safe_open(file, framework="pt") as f:
                    strange |= {n: kind for n in names if (kind := f.get_slice(n).get_dtype()) not in _FLOATS}
                    if not strange:
                        tensors |= {n: read_tensor(f, n) for n in names}
            except (SafetensorError, OSError) as e:
                raise HeadError(f"the head {file} can't be read as safetensors: {e}") from e
        if strange:
            kinds = ", ".join(f"{name} ({kind})" for name, kind in strange.items())
            raise HeadError(f"the head {self.where} holds weights that are not floating point: {kinds}. Save it as bfloat16 or float32.")
        return [{part: tensors[name] for part, name in layer.items()} for layer in self.layers]

    def shape(self, name: str) -> list[int]:
        """The shape of one of the checkpoint's tensors, which isn't read."""
        with safe_open(self.files[name], framework="pt") as f:
            return list(f.get_slice(name).get_shape())

    def stored_name(self, layer: int, part: str) -> str:
        """What `part` (a name in `MtpHead`) of a layer is called in the checkpoint, also if it isn't there."""
        if part in self.layers[layer]:
            return self.layers[layer][part]
        return stored_name(self.family, self.prefixes[layer], layer, part)


def stored_name(family: Family, prefixes: tuple[str, ...], i: int, part: str) -> str:
    """What `part` of a head's layer `i` is called in a checkpoint of `family` whose (sub)layers have these `prefixes`."""
    for own, template in family.parts.items():
        if part.startswith(own + template[-1]):
            return _fill(template, prefixes, i) + part[len(own) + 1 :]
    rest = part.removeprefix("layer.")
    place, _, after = rest.partition(".") if family.run else ("0", "", rest)
    return prefixes[int(place)] + after


def find_head(target: Any, path: str | Path | None = None, wiring: str = "published") -> FoundHead:
    """Where the head for `target` is: in `path`, or in the target's own checkpoint (``config._name_or_path``: a folder, or a model
    in the Hub's cache), to be run with `wiring` (`as_wired`).

    `path` is a safetensors file or a folder with a head of specfx, an exported NextN folder, or a checkpoint of a known family.
    Reads names only. Raises `HeadError` if there is no head.
    """
    if path is not None:
        return find_head_in(Path(path), wiring)[0]
    config = target.config.to_dict() | {"model_type": target.config.model_type}
    name = target.config._name_or_path
    family = family_of(model_types(config))
    if family is None:
        raise HeadError(f"{name!r} is of model type {config['model_type']!r}, which has no MTP head that specfx knows; {_known()}. {TRAIN}")
    place = checkpoint_folder(name, getattr(target.config, "_commit_hash", None))
    return locate(as_wired(family, wiring), place, weight_files(place), config)


def find_head_in(place: Path, wiring: str = "published") -> tuple[FoundHead, dict[str, Any]]:
    """The head in a file or folder, and the ``config.json`` beside it (empty where there is none). Raises `HeadError`."""
    files, config = weight_files(place), read_config(place)
    family = family_of(model_types(config))
    if family is not None and any(str(a).endswith("NextN") for a in config.get("architectures") or ()):
        return locate(as_wired(exported(family), wiring), place, files, config), config
    if family is None or PLAIN.layer[0].format(i=0) + "eh_proj.weight" in files:
        return locate(PLAIN, place, files, {}), config
    return locate(as_wired(family, wiring), place, files, config), config


def locate(family: Family, place: Path, files: Mapping[str, Path], config: Mapping[str, Any]) -> FoundHead:
    """The head of `family` among the names in `files`. Raises `HeadError` if there is none."""
    text = text_fields(config)
    first = int(text.get("num_hidden_layers") or text.get("num_layers") or 0)
    size = len(run_kinds(family, text))
    if family.stated:
        parts = {part: name for part, name in family.parts.items() if part not in family.stated or text.get(family.stated[part])}
        family = dataclasses.replace(family, parts=parts)

    def prefix(template: str, i: int) -> str:
        return template.format(i=i, n=first + i)

    template = next((t for t in family.layer if any(name.startswith(prefix(t, 0)) for name in files)), family.layer[0])
    held = 0
    mark = family.parts["eh_proj"] + "weight" if family is PLAIN else "{layer}"  # a stray weight makes no layer of a trained head
    while any(name.startswith(mark.format(layer=prefix(template, held))) for name in files):
        held += 1
    held = -(-held // size)
    stated = text.get(family.count) if family.count is not None else None
    n = stated if isinstance(stated, int) else family.default if family.default is not None else held
    if family is PLAIN:
        n = max(held, 1)
    if n == 0 or (held == 0 and family is not PLAIN):
        raise HeadError(
            f"{place} holds no MTP head: no weight of the {len(files)} there starts with {prefix(template, 0)} "
            f"({family.name}, {family.count or 'layers'}={stated}); {_known()}. {TRAIN}"
        )
    prefixes = [tuple(prefix(template, i * size + place) for place in range(size)) for i in range(max(n, held))]
    if family.root is not None:
        names = [name for name in files if name.startswith(family.root)]
    else:
        names = [name for name in files if name.startswith(tuple(p for layer in prefixes for p in layer))]
    layers: list[dict[str, str]] = []
    known: set[str] = set()
    for i in range(n):
        found, ignored = _assign(family, names, prefixes[i], i)
        layers.append(found)
        known |= ignored | set(found.values())
    return FoundHead(family, place, tuple(layers), tuple(prefixes[:n]), tuple(name for name in names if name not in known), files)


def _fill(template: str, prefixes: tuple[str, ...], i: int) -> str:
    return template.format(layer=prefixes[0], last=prefixes[-1], i=i)


def _assign(family: Family, names: Iterable[str], prefixes: tuple[str, ...], i: int) -> tuple[dict[str, str], set[str]]:
    """(name in `MtpHead` -> name in the checkpoint, ignored names) of one layer."""
    parts = {own: _fill(template, prefixes, i) for own, template in family.parts.items()}
    ignored = tuple(_fill(template, prefixes, i) for template in family.ignored)
    found: dict[str, str] = {}
    skipped: set[str] = set()
    for name in names:
        plain = name
        for infix in family.strip:
            plain = plain.replace(f".{infix}", ".")
        own = next((own for own, prefix in parts.items() if plain.startswith(prefix)), None)
        place = next((k for k, prefix in enumerate(prefixes) if plain.startswith(prefix)), None)
        if plain.startswith(ignored) and ignored:
            skipped.add(name)
        elif own is not None:
            found[own + plain[len(parts[own]) - 1 :]] = name
        elif place is not None:
            rest = plain.removeprefix(prefixes[place])
            for old, new in family.renames:
                rest = new + rest.removeprefix(old) if rest.startswith(old) else rest
            found["layer." + (f"{place}." if family.run else "") + rest] = name
    return found, skipped


def _known() -> str:
    return "known families: " + ", ".join(f.name for f in FAMILIES)
