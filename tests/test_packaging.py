"""What an installed specfx holds and claims: `specfx.passes` and `specfx.kernels`, and no global name but `specfx`."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORT_SECONDS = 1.0
"""The project's rule: what `import specfx` may cost beyond torch and transformers."""


def _python(code: str, cwd: Path, *arguments: str, path: str | None = None) -> str:
    """Run `code` in a fresh interpreter; returns its output. path: PYTHONPATH, none by default."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _modules(folder: str) -> list[str]:
    """Names of the modules in `passes` or `kernels` of the checkout."""
    return sorted(f"specfx.{folder}.{file.stem}" for file in (ROOT / folder).glob("*.py") if file.stem != "__init__")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout to build from: a build leaves traces in its source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("specfx", "passes", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a wheel of the copy was installed."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_wheel_holds_every_source_file(source: Path, installed: Path) -> None:
    expected = {file.relative_to(source) for file in (source / "specfx").rglob("*.py")} | {Path("specfx/py.typed")}
    for folder in ("passes", "kernels"):
        for suffix in ("*.py", "*.cpp", "*.h"):
            expected |= {Path("specfx") / file.relative_to(source) for file in (source / folder).rglob(suffix)}
    missing = sorted(str(file) for file in expected if not (installed / file).is_file())
    assert not missing, f"not in the wheel (add the folder to pyproject's packages or package-data): {missing}"


def test_wheel_claims_no_global_name_but_specfx(installed: Path) -> None:
    names = {entry.name for entry in installed.iterdir() if not entry.name.endswith(".dist-info") and entry.name != "bin"}
    assert names == {"specfx"}


def test_wheel_imports_from_where_it_is(installed: Path) -> None:
    code = """
import importlib, sys
import specfx
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), module.__file__
assert specfx.__file__.startswith(sys.argv[1]), specfx.__file__
"""
    _python(code, Path("/"), str(installed), *_modules("kernels"), *_modules("passes"), path=str(installed))


def test_checkout_imports_from_elsewhere() -> None:
    """The editable install: every module is found from any folder, and is the checkout's."""
    code = """
import importlib, importlib.util, sys
for name in sys.argv[2:]:
    assert importlib.util.find_spec(name).origin.startswith(sys.argv[1]), name
importlib.import_module(sys.argv[2])
"""
    _python(code, Path("/"), str(ROOT), *_modules("kernels"), *_modules("passes"))


def test_checkout_neither_hides_nor_is_hidden_by_packages_called_kernels_and_passes(tmp_path: Path) -> None:
    """transformers imports a package `kernels` of its own; in the checkout's root, where ours lies, it must find that one."""
    for name in ("kernels", "passes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'someone else, {name}'\n")
    code = """
import importlib, sys
assert sys.path[0] == ""  # the checkout's root comes first
sys.path.append(sys.argv[2])
import kernels, passes
assert kernels.OWNER == "someone else, kernels" and passes.OWNER == "someone else, passes"
for name in sys.argv[3:]:
    assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name
assert sys.modules["kernels"].OWNER == "someone else, kernels"
"""
    _python(code, ROOT, str(ROOT), str(tmp_path), *_modules("kernels")[:1], *_modules("passes")[:1])


def test_checkout_alone_is_not_taken_for_the_kernels_package_of_transformers() -> None:
    code = "from transformers.utils.import_utils import is_kernels_available as known; print(known())"
    assert _python(code, ROOT) == _python(code, Path("/"))


def test_import_changes_nothing() -> None:
    code = """
import json, logging, os, torch, transformers, warnings
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def state():
    return [
        torch.get_default_dtype(), torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
        sorted(ALL_ATTENTION_FUNCTIONS.keys()), sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys()), transformers.GenerationMixin.generate,
        logging.getLogger().handlers, logging.getLogger().level, warnings.filters, dict(os.environ), os.getcwd(),
    ]

before = [repr(value) for value in state()]
import specfx
for name in getattr(specfx, "__all__", ()):
    getattr(specfx, name)  # loads what is loaded lazily
print(json.dumps([old + " -> " + repr(new) for old, new in zip(before, state()) if old != repr(new)]))
"""
    assert json.loads(_python(code, Path("/"))) == []


def test_import_is_quick() -> None:
    code = """
import time, torch, transformers
began = time.perf_counter()
import specfx
print(time.perf_counter() - began)
"""
    assert statistics.median(float(_python(code, Path("/"))) for _ in range(3)) < IMPORT_SECONDS
