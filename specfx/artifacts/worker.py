"""Capture and compilation in a process of their own, so that `generate` never waits for Python's lock.

The parent calls `fill` (in a thread). The child gets the model's structure on its standard input (`specfx.artifacts.skeleton`), runs at
low priority, puts the artifacts on the shelf, and proves nothing: whoever takes them does. It says how it ended in one line of JSON.

* It is a process group of its own, which the terminal's Ctrl-C does not reach, but of the parent's session: Linux weighs sessions against
  each other as equals, however nice their processes are, and an op of the parent waits for its slowest thread. For that reason it also
  takes no processor that anybody else wants: merely nice, it made single tokens of the parent wait for 0.1 to 0.3 s.
* While a program generates without a pause on all processors, such a child comes to little. After `SECONDS_IDLE` it is ended then, and
  another begins that takes its share: whoever works that long without a pause gains more by the compiled engine than that costs.
  Another begins too where the first one failed by what may pass, as an import that fails once in hundreds, or memory that is short.
* A child whose parent is gone goes on for at most `SECONDS_ALONE`: what it finishes, the next process finds.
* Two children that build the same wait for each other; the second finds the work done.
* Models on a GPU are not built so: the child would need room there for another copy of the weights.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from specfx.errors import ArtifactError, LoweringError, SpecfxError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specfx.artifacts.shelf import Shelf
    from specfx.drafters.mtp import Drafting
    from specfx.options import CommonOptions

SECONDS_ALONE = 60.0
SECONDS_IDLE = 20.0
_STARVED = 0.3
"""Of a processor, on average: a child that got less comes to little."""
_PRIORITIES = ("idle", "nice")
"""Of one child after the other."""
_NICE = {"idle": 10, "nice": 5}
"""Of a child, by what the environment's SPECFX_PRIORITY says."""
_COMMAND = ("-P", "-m", "specfx.artifacts.worker")


def order_of(model: PreTrainedModel, options: CommonOptions, drafting: Drafting | None, shelf: Shelf, warm_up: Callable[[], None]) -> bytes:
    """What the child is told. warm_up: what else is to be compiled, picklable. Raises `ArtifactError`."""
    import torch

    from specfx.artifacts import skeleton

    try:
        settings = (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision())
        parts = [model] if drafting is None else [model, drafting.head]
        structure = skeleton.dumps((model, options, drafting, (shelf.graph_name, shelf.lowered_name), warm_up), parts)
        return pickle.dumps((settings, structure))
    except Exception as e:  # attributes of a model are anybody's
        raise ArtifactError(f"{type(model).__name__} can't be sent to another process: {type(e).__name__}: {e}") from e


def fill(order: bytes) -> dict[str, float]:
    """Have the artifacts built that `order` is of, wait, and return the seconds of each stage.

    Raises `ArtifactError` with what went wrong; where this process is ending, the child is left to itself.
    """
    outcome = None
    for priority in _PRIORITIES:
        outcome = _child(order, priority)
        if outcome is not None and not outcome.get("may pass"):
            break
    assert outcome is not None  # only an idle one is ended
    if "error" in outcome:
        raise ArtifactError(f"the process that compiles: {outcome['error']}")
    seconds: dict[str, float] = outcome["seconds"]
    return seconds


def _child(order: bytes, priority: str) -> dict[str, Any] | None:
    """How a child says that it ended; None if it was idle and got too little of a processor. Raises `ArtifactError` if it says nothing."""
    paths = [os.getcwd() if path == "" else path for path in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SPECFX_PARENT": str(os.getpid()), "SPECFX_PRIORITY": priority}
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as complaints:
        try:
            child = subprocess.Popen(
                [sys.executable, *_COMMAND],
                stdin=subprocess.PIPE,
                stdout=told,
                stderr=complaints,
                env=environment,
                process_group=0,
            )
        except OSError as e:
            raise ArtifactError(f"no process can be started: {e}") from e
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # a child that ended already tells why below
            child.stdin.write(order)
        started, looked = time.monotonic(), False
        while child.poll() is None:  # not `wait`, which nothing could interrupt
            time.sleep(0.05)
            if not looked and priority == "idle" and (passed := time.monotonic() - started) > SECONDS_IDLE:
                looked = True
                if _cpu_seconds(child.pid) < _STARVED * passed:
                    os.killpg(child.pid, signal.SIGKILL)  # files appear whole, locks go with their holder
                    child.wait()
                    return None
        told.seek(0)
        complaints.seek(0)
        lines = told.read().decode(errors="replace").splitlines()
        try:
            outcome: dict[str, Any] = json.loads(lines[-1])
        except (IndexError, ValueError):
            last = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ArtifactError(f"the process that compiles ended with {child.returncode}: {' '.join(last)}") from None
    return outcome


def _cpu_seconds(pid: int) -> float:
    """What a process took of processors; infinite where nobody tells."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:  # another system, or it has just ended
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: see proc(5)


def main() -> None:
    """The child."""
    order = sys.stdin.buffer.read()
    answer = os.dup(1)
    os.dup2(2, 1)  # what compilers print is not the answer
    gc.disable()  # a tenth of the time of tracing; this process is short
    priority = os.environ["SPECFX_PRIORITY"]
    os.nice(_NICE[priority])
    if priority == "idle" and hasattr(os, "SCHED_IDLE"):  # Linux
        with contextlib.suppress(OSError):  # in a sandbox that forbids it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    threading.Thread(target=_notice_parent, args=(int(os.environ["SPECFX_PARENT"]),), daemon=True).start()
    try:
        outcome: dict[str, Any] = {"seconds": _build(*pickle.loads(order))}
    except SpecfxError as e:
        outcome = {"error": str(e)}
    except Exception as e:  # told to the parent, which then does it itself
        may_pass = isinstance(e, (ImportError, OSError, MemoryError))
        outcome = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:400]}", "may pass": may_pass}
    os.write(answer, json.dumps(outcome).encode() + b"\n")


def _notice_parent(parent: int) -> None:
    """End this process `SECONDS_ALONE` after its parent has. (Files appear whole, so any moment will do.)"""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(SECONDS_ALONE)
    os._exit(1)


def _build(settings: tuple[Any, ...], structure: bytes) -> dict[str, float]:
    """Fill the shelf. Raises `SpecfxError` and what compilers raise."""
    import torch

    threads, dtype, precision = settings
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    with ThreadPoolExecutor(1) as aside:
        packs = aside.submit(_packs)  # a C++ compiler works beside all that follows
        aside.submit(_precompile_header)
        from specfx.artifacts import build, skeleton

        model, options, drafting, names, warm_up = skeleton.loads(structure)
        return build.artifacts(model, options, drafting, names, warm_up, packs)


def _packs() -> bool:
    """Whether linears can be packed here, now that the kernels are built."""
    from specfx.kernels import cpu_build

    try:
        packs = cpu_build.load().packs
    except LoweringError:  # found again, and recorded, by the process that asks
        return False
    if packs:
        from specfx import _compat

        _compat.trust_cpu_flags()
    return packs


def _precompile_header() -> None:
    """Inductor waits for it, and meets it again if it fails."""
    from specfx import _compat

    _compat.precompile_cpp_header()


if __name__ == "__main__":
    main()
