"""The files of a checkpoint: where it is, which weight lies in which safetensors file, and its config; and that of a draft vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from specfx.errors import HeadError

TRAIN = "Train one with `specfx train mtp` and give its path as head=."
DRAFT_VOCAB = "draft_vocab.safetensors"
"""File beside a head's `model.safetensors`; its one tensor is ``draft_vocab``: ``[N]`` int64."""


def read_tensor(file: Any, name: str) -> torch.Tensor:
    """One tensor of an open safetensors file: every weight of a head comes through here."""
    return file.get_tensor(name)


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


def weight_files(place: Path) -> dict[str, Path]:
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


def read_config(place: Path) -> dict[str, Any]:
    """The config.json at `place`, empty where there is none."""
    file = place / "config.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError) as e:
        raise HeadError(f"the config {file} can't be read: {e}") from e


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model. Inkling's config has those of the heads apart, in ``mtp_config``."""
    inner, heads = config.get("text_config"), config.get("mtp_config")
    text = inner if isinstance(inner, dict) else config
    if not isinstance(heads, dict):
        return text
    return {"num_mtp_layers": heads.get("num_nextn_predict_layers"), **heads, **{k: v for k, v in text.items() if v is not None}}


def model_types(config: Mapping[str, Any]) -> tuple[str | None, ...]:
    """The whole model's and the language model's, if they are named."""
    return config.get("model_type"), text_fields(config).get("model_type")


def save_draft_vocab(ids: torch.Tensor, folder: str | Path) -> Path:
    """Write the tokens that a head drafts, ``[N]`` int64, as `DRAFT_VOCAB` in `folder`."""
    file = Path(folder) / DRAFT_VOCAB
    save_file({"draft_vocab": ids.contiguous()}, file, metadata={"format": "pt"})
    return file


def read_draft_vocab(path: str | Path) -> torch.Tensor:
    """What `save_draft_vocab` wrote in a file, or in a folder: ``[N]`` int64. Raises `HeadError`."""
    file = Path(path) / DRAFT_VOCAB if Path(path).is_dir() else Path(path)
    try:
        return load_file(file)["draft_vocab"]
    except (OSError, SafetensorError, KeyError) as e:
        raise HeadError(f"the draft vocabulary {file} can't be read ({e!r}): give a file that `specfx train mtp` wrote") from e
