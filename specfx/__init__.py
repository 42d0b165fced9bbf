"""specfx: speculative decoding for Hugging Face models as a graph rewrite. Same tokens, fewer forwards."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from specfx.api import PageCache, drafter_of, explain, restore, speculate, speculating, stats
    from specfx.errors import SpecfxError

_here = _Path(__file__).parent
if not (_here / "kernels").is_dir():
    # A checkout (editable install, or on PYTHONPATH): `passes/` and `kernels/` stand beside `specfx/`. A wheel has them inside.
    # They have no `__init__.py`, so that `import kernels` from the checkout's root still finds another package of that name.
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
__all__ = ["PageCache", "SpecfxError", "drafter_of", "explain", "restore", "speculate", "speculating", "stats"]


def __getattr__(name: str) -> object:
    """The public functions, loaded at first use: importing specfx loads neither torch nor transformers."""
    if name in __all__:
        from specfx import api

        return getattr(api, name)
    raise AttributeError(f"module 'specfx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
