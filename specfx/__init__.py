"""specfx: speculative decoding for Hugging Face models as a graph rewrite. Same tokens, fewer forwards."""

from pathlib import Path as _Path

_here = _Path(__file__).parent
if not (_here / "kernels").is_dir():
    # A checkout (editable install, or on PYTHONPATH): `passes/` and `kernels/` stand beside `specfx/`. A wheel has them inside.
    # They have no `__init__.py`, so that `import kernels` from the checkout's root still finds another package of that name.
    __path__.append(str(_here.parent))
