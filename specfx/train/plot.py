"""The curves of a training run as a picture. Needs matplotlib (the extra `train`), which nothing else of specfx does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

FILE = "training.png"
_BLUE, _ORANGE, _GREEN = "#4c72b0", "#dd8452", "#55a868"


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write_plot(folder: Path, curves: list[dict[str, Any]], before: list[float | None], after: list[float | None]) -> Path:
    """Loss and running acceptance by step, the learning rate, and acceptance by depth on held-out texts before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, accepted, lr, depth = figure.subplots(2, 2).flat
    steps = [entry["step"] for entry in curves]
    for axes, key, title in ((loss, "loss", "loss by draft step"), (accepted, "accepted", "training positions with steps 1..k right")):
        for k in range(max((len(entry[key]) for entry in curves), default=0)):
            values = [entry[key][k] if k < len(entry[key]) else float("nan") for entry in curves]
            (line,) = axes.plot(steps, smoothed(values), label=f"step {k + 1}")
            axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.5)
        axes.set(title=title, xlabel="optimizer step")
        axes.legend()
    accepted.set_ylim(0, 1)
    lr.plot(steps, [entry["lr"] for entry in curves], color=_GREEN)
    lr.set(title="learning rate", xlabel="optimizer step")
    for offset, values, label, color in ((-0.2, before, "before training", _BLUE), (0.2, after, "after", _ORANGE)):
        depth.bar([k + offset for k in range(1, len(values) + 1)], [v or 0 for v in values], 0.4, label=label, color=color)
    depth.set(title="held-out texts: acceptance by depth", xlabel="depth", ylim=(0, 1), xticks=range(1, len(after) + 1))
    depth.legend()
    figure.savefig(folder / FILE, dpi=110)
    return folder / FILE


def smoothed(values: list[float], memory: float = 0.95) -> list[float]:
    """Exponential moving average without a bias towards the first value; nan is passed over."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        if value == value:
            total, weight = memory * total + (1 - memory) * value, memory * weight + 1 - memory
        result.append(total / weight if weight else float("nan"))
    return result
