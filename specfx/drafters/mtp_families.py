"""MTP heads of published checkpoints as data: one table of families, and the finding and reading of a head's weights.

1. `FAMILIES` says of each family where the weights of a head lie in a checkpoint, what they are called, and how the head is wired.
2. `find_head` opens a checkpoint (its index only), picks the family by ``config.model_type`` and lists the head's weights.
3. `FoundHead.read` reads exactly those tensors, once, under the names of `specfx.drafters.mtp_head.MtpHead`; what is missing,
   misshapen or left over is found there, by comparison with the module.

Names are those of the published checkpoints; sources of the wiring are transformers' `MtpModel` (5.23) and vLLM's ``*_mtp.py``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from specfx.errors import HeadError

TRAIN = "Train one with `specfx train mtp` and give its path as head=."
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Wiring:
    """How one step of a head is run, where families differ; the defaults are DeepSeek-V3's.

    hidden_first: the projection takes ``[hidden; embedding]``. takes_raw: it is fed the target's hidden state from before the final
    norm. feeds_raw: and, from the second step on, its own from before its norm (the norm is then part of `MtpHead.logits`).
    zero_first: the embedding in the pair at position 0 is zero.
    """

    hidden_first: bool = False
    takes_raw: bool = False
    feeds_raw: bool = False
    zero_first: bool = False


_DEEPSEEK_PARTS = {"enorm": "{layer}enorm.", "hnorm": "{layer}hnorm.", "eh_proj": "{layer}eh_proj.", "norm": "{layer}shared_head.norm."}
_FINAL_LAYERNORM = _DEEPSEEK_PARTS | {"norm": "{layer}final_layernorm."}
_QWEN_PARTS = {"enorm": "mtp.pre_fc_norm_embedding.", "hnorm": "mtp.pre_fc_norm_hidden.", "eh_proj": "mtp.fc.", "norm": "mtp.norm."}
_APPENDED = ("model.layers.{n}.", "model.language_model.layers.{n}.")


@dataclass(frozen=True)
class Family:
    """One family of heads.

    In templates ``{i}`` is the head's layer, ``{n}`` the number of the target's layers plus ``i``, ``{layer}`` the layer's prefix.

    layer: prefixes of layer i's weights, of which a checkpoint has one. parts: what stands beside the decoder layer, name in `MtpHead`
    -> prefix in the checkpoint (no ``norm``: the family has no final norm; ``head``: an LM head of its own). root: all names that
    belong to heads, if they aren't just the layers'. ignored: copies of what the target shares. strip: infixes without meaning.
    renames: a decoder layer's names that differ from the target's layers'. count: the config's field for the number of layers; absent,
    there are `default`, or as many as the checkpoint holds. refusal: why a head of this family can't be drafted with.
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
    wiring: Wiring = Wiring()
    refusal: str | None = None


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
    Family("Mellum", ("mellum",), layer=("mtp.layers.{i}.",), parts=_QWEN_PARTS, root="mtp.", ignored=()),
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
    ),
    Family("Bailing", ("bailing_hybrid",), parts=_FINAL_LAYERNORM),
    Family("HY-V3", ("hy_v3",), parts=_FINAL_LAYERNORM, wiring=Wiring(zero_first=True)),
    Family(
        "Nemotron-H",
        ("nemotron_h",),
        layer=("mtp.layers.{i}.",),
        root="mtp.",
        refusal="its steps are runs of attention and MoE sublayers, which aren't built yet",
    ),
    Family(
        "DeepSeek-V4",
        ("deepseek_v4",),
        layer=("mtp.{i}.",),
        root="mtp.",
        refusal="it takes the hyper-connection streams from before hc_head, which no engine hands out yet",
    ),
    Family(
        "Inkling",
        ("inkling_mm_model", "inkling", "inkling_text"),
        layer=("model.mtp.layers.{i}.",),
        root="model.mtp.",
        count="num_mtp_layers",
        refusal="its layers hold the state of short convolutions, which can't be rolled back yet",
    ),
)

PLAIN = Family("specfx", (), layer=("model.layers.{i}.",), root="", ignored=())
"""Heads that specfx trains: DeepSeek's names and wiring, at layer 0, as in a NextN export."""


def exported(family: Family) -> Family:
    """`family` under the names of a NextN export: those of `PLAIN`, with the family's own wiring."""
    parts = {part: _EXPORTED_PARTS[part] for part in family.parts}
    return dataclasses.replace(family, layer=PLAIN.layer, parts=parts, root="", ignored=(), strip=(), renames=(), count=None, default=None)


_EXPORTED_PARTS = _DEEPSEEK_PARTS | {"head": "{layer}shared_head.head."}


def family_of(model_types: Iterable[str | None]) -> Family | None:
    """The family of the first of `model_types` that has one."""
    return next((family for t in model_types for family in FAMILIES if t in family.model_types), None)


@dataclass(frozen=True)
class FoundHead:
    """A head's place: its `family`, the folder or file `where`, and for each of its layers the names.

    layers: for each layer, name in `MtpHead` -> name in the checkpoint; the decoder layer's start with ``layer.`` and are as the
    checkpoint has them (experts apart, say). prefixes: of each layer in the checkpoint. left_over: names under the head's prefix that
    the family doesn't know. files: the file of each name.
    """

    family: Family
    where: Path
    layers: tuple[Mapping[str, str], ...]
    prefixes: tuple[str, ...]
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
        own, _, rest = part.partition(".")
        template = "{layer}" if own == "layer" else self.family.parts[own]
        return template.format(layer=self.prefixes[layer], i=layer) + rest


def read_tensor(file: Any, name: str) -> torch.Tensor:
    """One tensor of an open safetensors file: every weight of a head comes through here."""
    return file.get_tensor(name)


def find_head(target: Any, path: str | Path | None = None) -> FoundHead:
    """Where the head for `target` is: in `path`, or in the target's own checkpoint (``config._name_or_path``: a folder, or a model
    in the Hub's cache).

    `path` is a safetensors file or a folder with a head of specfx, an exported NextN folder, or a checkpoint of a known family.
    Reads names only. Raises `HeadError` if there is no head or it is of a family that can't be drafted with.
    """
    if path is not None:
        return find_head_in(Path(path))[0]
    config = target.config.to_dict() | {"model_type": target.config.model_type}
    name = target.config._name_or_path
    family = family_of(_model_types(config))
    if family is None:
        raise HeadError(f"{name!r} is of model type {config['model_type']!r}, which has no MTP head that specfx knows; {_known()}. {TRAIN}")
    place = checkpoint_folder(name, getattr(target.config, "_commit_hash", None))
    return locate(family, place, _files(place), config)


def find_head_in(place: Path) -> tuple[FoundHead, dict[str, Any]]:
    """The head in a file or folder, and the ``config.json`` beside it (empty where there is none). Raises `HeadError`."""
    files, config = _files(place), _config(place)
    family = family_of(_model_types(config))
    if family is not None and any(str(a).endswith("NextN") for a in config.get("architectures") or ()):
        return locate(exported(family), place, files, config), config
    if family is None or PLAIN.layer[0].format(i=0) + "eh_proj.weight" in files:
        return locate(PLAIN, place, files, {}), config
    return locate(family, place, files, config), config


def locate(family: Family, place: Path, files: Mapping[str, Path], config: Mapping[str, Any]) -> FoundHead:
    """The head of `family` among the names in `files`. Raises `HeadError` if there is none."""
    if family.refusal is not None:
        raise HeadError(f"heads of {family.name} can't be drafted with: {family.refusal}. {TRAIN}")
    text = _text(config)
    first = int(text.get("num_hidden_layers") or text.get("num_layers") or 0)

    def prefix(template: str, i: int) -> str:
        return template.format(i=i, n=first + i)

    template = next((t for t in family.layer if any(name.startswith(prefix(t, 0)) for name in files)), family.layer[0])
    held = 0
    mark = family.parts["eh_proj"] + "weight" if family is PLAIN else "{layer}"  # a stray weight makes no layer of a trained head
    while any(name.startswith(mark.format(layer=prefix(template, held))) for name in files):
        held += 1
    stated = text.get(family.count) if family.count is not None else None
    n = stated if isinstance(stated, int) else family.default if family.default is not None else held
    if family is PLAIN:
        n = max(held, 1)
    if n == 0 or (held == 0 and family is not PLAIN):
        raise HeadError(
            f"{place} holds no MTP head: no weight of the {len(files)} there starts with {prefix(template, 0)} "
            f"({family.name}, {family.count or 'layers'}={stated}); {_known()}. {TRAIN}"
        )
    if family.root is not None:
        names = [name for name in files if name.startswith(family.root)]
    else:
        roots = tuple(prefix(template, i) for i in range(max(n, held)))
        names = [name for name in files if name.startswith(roots)]
    layers: list[dict[str, str]] = []
    known: set[str] = set()
    for i in range(n):
        layer = prefix(template, i)
        found, ignored = _assign(family, names, layer, i)
        layers.append(found)
        known |= ignored | set(found.values())
    prefixes = tuple(prefix(template, i) for i in range(n))
    return FoundHead(family, place, tuple(layers), prefixes, tuple(name for name in names if name not in known), files)


def _assign(family: Family, names: Iterable[str], layer: str, i: int) -> tuple[dict[str, str], set[str]]:
    """(name in `MtpHead` -> name in the checkpoint, ignored names) of one layer."""
    parts = {own: template.format(layer=layer, i=i) for own, template in family.parts.items()}
    ignored = tuple(template.format(layer=layer, i=i) for template in family.ignored)
    found: dict[str, str] = {}
    skipped: set[str] = set()
    for name in names:
        plain = name
        for infix in family.strip:
            plain = plain.replace(f".{infix}", ".")
        own = next((own for own, prefix in parts.items() if plain.startswith(prefix)), None)
        if plain.startswith(ignored) and ignored:
            skipped.add(name)
        elif own is not None:
            found[f"{own}." + plain.removeprefix(parts[own])] = name
        elif plain.startswith(layer):
            rest = plain.removeprefix(layer)
            for old, new in family.renames:
                rest = new + rest.removeprefix(old) if rest.startswith(old) else rest
            found["layer." + rest] = name
    return found, skipped


def checkpoint_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name` itself, or a Hub id's snapshot in the cache. Downloads nothing. Raises `HeadError`."""
    folder = Path(name)
    if str(name) and folder.exists():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "model.safetensors.index.json", "model.safetensors"):
        try:
            cached = try_to_load_from_cache(str(name), file, revision=revision) if str(name) else None
        except HFValidationError:
            break
        if isinstance(cached, str):
            return Path(cached).parent
    raise HeadError(f"no checkpoint to look for an MTP head in: {str(name)!r} is no folder and not in the Hub's cache. {TRAIN}")


def _files(place: Path) -> dict[str, Path]:
    """The file of each weight at `place`, from the index where there is one."""
    index = place / "model.safetensors.index.json"
    if index.is_file():
        try:
            weights = json.loads(index.read_text())["weight_map"]
        except (OSError, ValueError, KeyError) as e:
            raise HeadError(f"the index {index} can't be read: {type(e).__name__}: {e}") from e
        return {name: place / file for name, file in weights.items()}
    whole = place / "model.safetensors"
    if place.is_dir():
        shards: Sequence[Path] = [whole] if whole.is_file() else sorted(place.glob("*.safetensors"))
    else:
        shards = [place] if place.is_file() else []
    if not shards:
        raise HeadError(f"no head at {place}: give a .safetensors file or a folder that holds one (see `specfx train mtp --help`)")
    files: dict[str, Path] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as f:
                names = list(f.keys())
        except (SafetensorError, OSError) as e:
            raise HeadError(f"the head {shard} can't be read as safetensors: {e}") from e
        twice = sorted(files.keys() & set(names))
        if twice:
            raise HeadError(f"the head {place} holds {', '.join(twice)} twice (again in {shard.name}): keep one head in a folder")
        files |= dict.fromkeys(names, shard)
    return files


def _config(place: Path) -> dict[str, Any]:
    """The config.json at `place`, empty where there is none."""
    file = place / "config.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError) as e:
        raise HeadError(f"the config {file} can't be read: {e}") from e


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _model_types(config: Mapping[str, Any]) -> tuple[str | None, ...]:
    return config.get("model_type"), _text(config).get("model_type")


def _known() -> str:
    return "known families: " + ", ".join(f.name for f in FAMILIES if f.refusal is None)
