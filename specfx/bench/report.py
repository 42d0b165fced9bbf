"""What the bench commands print and write: an aligned table, a JSON file that says where its figures come from, and progress."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from specfx.timing import progress


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first is left-aligned, the others are right-aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def line_text(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *[cell.rjust(width) for cell, width in others]]).rstrip()

    return "\n".join([line_text(lines[0]), "  ".join("-" * width for width in widths), *map(line_text, lines[1:])])


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A cell: fixed digits, or a dash where there is no figure."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def median(values: Iterable[float | None]) -> float | None:
    """Median of the figures there are; None if there is none."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def set_threads(threads: int | None) -> int:
    """Use `threads` CPU threads in torch, by default all cores this process may run on; returns how many."""
    import torch

    count = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.set_num_threads(count)
    return count


def environment() -> dict[str, Any]:
    """The date, the machine, the versions and the command line: what a figure means nothing without."""
    import importlib.metadata

    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "specfx")},
        "command": ["specfx", *sys.argv[1:]],
    }


def write_json(path: str | Path, results: dict[str, Any]) -> None:
    """`results` with the environment they were measured in, replaced at once so that a reader never sees half of it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, target)


def _cpu_model() -> str:
    """The processor's name; a virtual machine may give only a vague one, so family, model and stepping stand with it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']}, stepping {facts['stepping']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


class Progress(logging.Handler):
    """``with Progress("loading"):`` tells on stderr what is going on and, at the end, how long it took.

    On a terminal the line counts the seconds while it waits; elsewhere (a log) it is written once at the start and once at the end. The
    stages of preparing an engine (`specfx.timing.progress`) are shown with it.
    """

    def __init__(self, label: str) -> None:
        super().__init__(logging.INFO)
        self.label, self.stage = label, ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self._start = time.perf_counter()
        self._level, progress.propagate = progress.level, False
        progress.setLevel(logging.INFO)
        progress.addHandler(self)
        if sys.stderr.isatty():
            self._thread = threading.Thread(target=self._count, daemon=True)
            self._thread.start()
        else:
            print(f"{self.label} ...", file=sys.stderr, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        progress.removeHandler(self)
        progress.setLevel(self._level)
        progress.propagate = True
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        seconds = time.perf_counter() - self._start
        outcome = "failed after" if kind is not None else "done in"
        print(f"{self._line_start()}{self.label}: {outcome} {seconds:.1f} s", file=sys.stderr, flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        self.stage = f", {record.getMessage()}"
        if not sys.stderr.isatty():
            print(f"  {record.getMessage()}", file=sys.stderr, flush=True)

    def _line_start(self) -> str:
        return "\r\x1b[K" if sys.stderr.isatty() else ""

    def _count(self) -> None:
        while True:
            seconds = time.perf_counter() - self._start
            print(f"\r\x1b[K{self.label} ... {seconds:.0f} s{self.stage}", end="", file=sys.stderr, flush=True)
            if self._done.wait(0.5):  # twice a second: the waiting must not disturb what is measured
                return
