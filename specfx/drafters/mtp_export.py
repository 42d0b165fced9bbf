"""NextN export: a checkpoint's MTP heads alone, as SGLang's export of a DeepSeek checkpoint writes them.

The folder holds one safetensors file with its index, and a ``config.json`` with one hidden layer and the architecture
``<X>ForCausalLMNextN``. Layer i of the heads is ``model.layers.{i}.``; what stands beside the decoder layer has DeepSeek's names, the
decoder layer the checkpoint's own. Embedding and LM head stay with the target, unless a family has LM heads of its own.
`specfx.drafters.mtp_head.load_head` reads such a folder; ``model_type`` in its config says how the head is wired.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from specfx.drafters.mtp_families import PLAIN, FoundHead, exported, find_head_in, stored_name
from specfx.drafters.mtp_files import checkpoint_folder
from specfx.errors import HeadError

_FILE = "model-00001-of-00001.safetensors"


def export_nextn(target: Any, out: str | Path) -> Path:
    """Write the heads of `target` (a model, a checkpoint's folder, or an id in the Hub's cache) into the folder `out`; returns it.

    Weights keep their dtype and are those of the checkpoint, not of the module. Raises `HeadError` if there is no head, if the
    checkpoint has weights under its prefix that the family doesn't know, or if `out` holds anything.
    """
    config = getattr(target, "config", None)
    name = target if config is None else config._name_or_path
    place = checkpoint_folder(name, getattr(config, "_commit_hash", None))
    found, settings = find_head_in(place)
    if found.family is PLAIN:
        raise HeadError(f"the checkpoint {place} has no config.json of a family with MTP heads: there is nothing to export")
    if found.left_over:
        raise HeadError(f"{place} has weights that {found.family.name} doesn't know: {', '.join(found.left_over)}")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HeadError(f"{folder} exists and isn't an empty folder: name a new one")
    weights = {}
    for i, tensors in enumerate(found.read()):
        for part, tensor in tensors.items():
            weights[_exported_name(found, i, part)] = tensor.contiguous().clone()  # shared by layers, they are written twice
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / _FILE, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(weights), _FILE)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(_nextn_config(settings, len(found.layers)), indent=2) + "\n")
    return folder


def _exported_name(found: FoundHead, i: int, part: str) -> str:
    size = len(found.prefixes[i])
    prefixes = tuple(PLAIN.layer[0].format(i=i * size + place) for place in range(size))
    return stored_name(exported(found.family), prefixes, i, part)


def _nextn_config(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """`config` with one hidden layer, `layers` heads and the architecture's name with ``NextN`` behind it."""
    architecture = (config.get("architectures") or ["ForCausalLM"])[0]
    own: dict[str, Any] = {"num_hidden_layers": 1, "num_nextn_predict_layers": layers}
    if isinstance(inner := config.get("text_config"), dict):
        own["text_config"] = inner | own
    return config | own | {"architectures": [architecture + "NextN"]}


def run(model: str, out: str) -> int:
    """The command ``specfx export-nextn``."""
    folder = export_nextn(model, out)
    print(f"wrote {folder}")
    return 0
