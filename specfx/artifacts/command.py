"""`specfx cache info|clear|prebuild`: what is kept on disk, away with it, and artifacts for a model before anybody waits for them."""

from __future__ import annotations

import sys
from typing import Any

from specfx.artifacts import store

_KINDS = {".graph": "rewritten graphs", ".lowered": "lowered graphs with Inductor's artifacts"}


def run(*, action: str, **options: Any) -> int:
    """The command `action`. Returns 0, and 1 if `prebuild` built nothing."""
    if action == "prebuild":
        return prebuild(**options)
    found = store.clear() if action == "clear" else store.stored()
    print(store.folder())
    for suffix, kind in _KINDS.items():
        files = [file for file in found if file.name.endswith(suffix)]
        print(f"{'deleted: ' if action == 'clear' else ''}{len(files)} {kind}, {sum(f.bytes for f in files) / 2**20:.1f} MiB")
    return 0


def prebuild(*, model: str, methods: str, head: str | None, dtype: str, threads: int | None) -> int:
    """Capture and compile `model` for each of `methods`, as a first `speculate` with the same threads would."""
    from specfx.bench import report
    from specfx.bench.generate import parse_arms, start

    arms = parse_arms(methods, head=head)[1:]
    import torch

    import specfx
    from specfx import models

    report.set_threads(threads)
    with report.Progress(f"loading {model}"):
        target, _ = models.load(model, getattr(torch, dtype))
    before, compiled = set(store.stored()), True
    for arm in arms:
        with report.Progress(f"{arm.name}: capture, gate, compile"):
            start(target, arm)
        explanation = specfx.explain(target)
        compiled &= explanation.engine == "compiled"
        seconds = ", ".join(f"{stage} {s:.1f} s" for stage, s in explanation.seconds.items())
        print(f"{arm.name}: engine {explanation.engine} ({seconds})")
        for refusal in explanation.refusals:
            print(f"  {refusal}", file=sys.stderr)
    new = [file for file in store.stored() if file not in before]
    print(f"{len(new)} new artifacts, {sum(file.bytes for file in new) / 2**20:.1f} MiB, in {store.folder()}")
    return 0 if compiled else 1
