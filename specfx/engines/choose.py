"""Which engine serves a model: chosen once, fastest first, each proven against the stock model before its output counts.

    capture -> rewrite passes -> gate on the references -> graph engine -> Inductor -> gate -> compiled engine

Where a stage fails, its typed reason is recorded and the last engine that was proven serves; if there is none, the eager engine does.
With ``compile="background"`` the graph engine serves until the compiled one is ready, and the switch happens between two calls.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import fx
from transformers import PreTrainedModel

from specfx import gate
from specfx.capture import Fingerprint, capture, clone_sharing_storage
from specfx.engines.base import Engine
from specfx.engines.compiled import CompiledEngine
from specfx.engines.eager import EagerEngine
from specfx.engines.paged import PagedEngine, graph_engine, on_references
from specfx.errors import CaptureError, GateError, LoweringError, PassError, Reason, Refusal, SpecfxError
from specfx.kernels import cpu_build
from specfx.options import CommonOptions
from specfx.passes.framework import PassContext, PassRecord, run_passes
from specfx.passes.pack_linears import pack_linears
from specfx.passes.pipeline import LOWERING, REWRITE

log = logging.getLogger("specfx")

_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (CaptureError, Reason.CAPTURE_FAILED),
    (PassError, Reason.PASS_FAILED),
    (GateError, Reason.GATE_FAILED),
    (LoweringError, Reason.LOWERING_FAILED),
)


_compiling: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_SECONDS_TO_LEAVE = 10.0


@atexit.register
def _leave() -> None:
    """Make compiling threads end: one that the interpreter kills inside torch's C++ would abort the process."""
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    for thread in list(_compiling):
        while thread.is_alive() and thread.ident is not None and time.monotonic() < deadline:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            thread.join(0.1)


class Prepared:
    """The engines of one model, and how they came about. State; `engine` is the one that serves the next call."""

    def __init__(self, model: PreTrainedModel, options: CommonOptions) -> None:
        self.options = options
        self.lock = threading.RLock()  # held while a call uses the engines, whichever wrapper it came through
        self.fingerprint = Fingerprint.of(model)
        self.refusals: list[Refusal] = []
        self.records: tuple[PassRecord, ...] = ()
        self.seconds: dict[str, float] = {}
        self.module: fx.GraphModule | None = None
        self._packs = False
        self._engine: Engine | None = None
        self._ready: CompiledEngine | None = None
        self._compile_started = 0.0
        self._thread: threading.Thread | None = None
        _check_pass_names(options.disable_passes)
        if options.engine != "eager":
            self._prepare_graph(model)
        if self._engine is None:
            with self._timed("eager"):
                eager = EagerEngine(model)
            self.refusals += eager.refusals
            self._engine = eager
        elif options.engine in ("auto", "compiled") and options.compile != "off":
            stock = clone_sharing_storage(model)
            if options.compile == "sync":
                self._compile(stock)
            else:
                self._thread = threading.Thread(target=self._compile, args=(stock,), name="specfx-compile", daemon=True)
                _compiling.add(self._thread)
                self._compile_started = time.perf_counter()
                self._thread.start()

    @property
    def engine(self) -> Engine:
        """The engine for the next call: a compiled one that has become ready takes over here."""
        ready = self._ready
        if ready is not None:
            if ready.packed_at != self.fingerprint:
                ready.refresh()
            self._engine, self._ready = ready, None
        assert self._engine is not None
        return self._engine

    @property
    def compiling(self) -> Refusal | None:
        """Why the compiled engine does not serve yet: it is being built. None if it is not being built."""
        if self._thread is None or not self._thread.is_alive():
            return None
        seconds = time.perf_counter() - self._compile_started
        detail = f"being built in the background for {seconds:.0f} s"
        return Refusal("compiled engine", Reason.ENGINE_NOT_READY, detail, 'wait, or compile="sync"')

    def wait(self) -> None:
        """Until a background compilation has ended."""
        if self._thread is not None:
            self._thread.join()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = time.perf_counter() - started

    def _refuse(self, stage: str, error: Exception, remedy: str = "", reason: Reason | None = None) -> None:
        reason = reason or next((r for kind, r in _REASONS if isinstance(error, kind)), Reason.LOWERING_FAILED)
        detail = str(error) if isinstance(error, SpecfxError) and str(error) else f"{type(error).__name__}: {error}"
        refusal = Refusal(stage, reason, detail, remedy)
        self.refusals.append(refusal)
        log.warning("specfx: %s", refusal)

    def _prepare_graph(self, model: PreTrainedModel) -> None:
        options = self.options
        try:
            gate.refuse_by_name(model.config)
            with self._timed("capture"):
                captured = capture(model)
            with self._timed("passes"):
                context = PassContext(options.page_size)
                rewrite = [p for p in options.disable_passes if p in {q.name for q in REWRITE}]
                result = run_passes(captured, REWRITE, context, rewrite)
            self.records = result.records
            if not _serves(result.module):
                failed = result.failed or result.records[-1]
                raise PassError(f"{failed.name}: {failed.refusal.detail if failed.refusal else 'did not apply'}")
            self.refusals += [r.refusal for r in result.records if r.refusal is not None]
            self._load_kernels(model.device)
            if model.device.type != "cpu" and options.engine == "auto":
                raise LoweringError(f"specfx's ops have no kernels for {model.device.type} yet, and their references are slow")
            with self._timed("gate"):
                stock = clone_sharing_storage(model)
                shrunken = gate.with_shrunken_windows(result.module)
                for call in (on_references(shrunken), shrunken):
                    _prove(PagedEngine("graph", shrunken, call, "auto", model.device), stock)
            self.module = result.module
            self._engine = graph_engine(result.module, options.kv_pool, model.device)
        except Exception as e:  # nothing that goes wrong here may cost the user more than the engine
            self._refuse("graph engine", e)

    def _load_kernels(self, device: torch.device) -> None:
        """Replace the ops' references by kernels where they can be built; where not, the references stay in force."""
        if device.type != "cpu":
            return
        try:
            with self._timed("kernels"):
                self._packs = cpu_build.load().packs
        except LoweringError as e:
            self._refuse("CPU kernels", e, "install a C++ compiler (g++) or set CXX")

    def _compile(self, stock: PreTrainedModel) -> None:
        assert self.module is not None
        context = PassContext(self.options.page_size, self._packs)
        try:
            packed_at = Fingerprint.of(stock)
            with self._timed("compile"):
                compiled = CompiledEngine(self.module, context, self.options.disable_passes, "auto", stock.device)
            with self._timed("first use"):
                while True:  # once, but again if the weights change meanwhile
                    if (now := Fingerprint.of(stock)) != packed_at:
                        compiled.refresh()
                        packed_at = now
                    try:
                        _prove(compiled, stock, shrink_windows=False)
                        break
                    except GateError:
                        if Fingerprint.of(stock) == packed_at:
                            raise
            compiled.resize_pool(self.options.kv_pool)
            compiled.packed_at = packed_at
        except GateError as e:
            self._refuse("compiled engine", e, reason=Reason.COMPILED_DIFFERS)
            return
        except Exception as e:  # in a thread of its own nobody would hear of it
            self._refuse("compiled engine", e)
            return
        for refusal in (r.refusal for r in compiled.records):
            if refusal is not None and refusal.reason is not Reason.NOTHING_TO_DO:
                packing = refusal.stage == f"pass {pack_linears.name}" and refusal.reason is Reason.PASS_FAILED
                self.refusals.append(replace(refusal, reason=Reason.WEIGHTS_NOT_PACKED) if packing else refusal)
        self.records += compiled.records
        self._ready = compiled

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the weights still lie where they were captured; values changed in place are followed. False: prepare anew."""
        now = Fingerprint.of(model)
        if now.storage != self.fingerprint.storage:
            return False
        if now.values != self.fingerprint.values:
            self.fingerprint = now
            if isinstance(self._engine, CompiledEngine):
                self._engine.refresh()
                self._engine.packed_at = now
        return True


def _prove(engine: Engine, stock: PreTrainedModel, shrink_windows: bool = True) -> None:
    """`gate.check`, for engines that may fail in any way. Raises `GateError`."""
    try:
        gate.check(engine, stock, shrink_windows)
    except GateError:
        raise
    except Exception as e:
        raise GateError(f"{type(e).__name__}: {' '.join(str(e).split())[:400]}") from e


def _serves(module: fx.GraphModule) -> bool:
    """Whether the rewritten graph has a KV: what a switched-off or failed pass may have cost."""
    names = {str(n.target) for n in module.graph.nodes if n.op == "placeholder"}
    return {"input_ids", "lengths", "k_pages_0"} <= names


def _check_pass_names(disabled: tuple[str, ...]) -> None:
    names = [p.name for p in (*REWRITE, *LOWERING)]
    unknown = [d for d in disabled if d not in names]
    if unknown:
        from specfx.errors import OptionError

        raise OptionError(f"disable_passes: no pass is named {', '.join(unknown)}; the passes are {', '.join(names)}")


def packed_bytes(engine: Engine) -> int:
    """Memory of the packed copy of the weights."""
    if not isinstance(engine, CompiledEngine):
        return 0
    buffers = dict(engine.module.named_buffers())
    return sum(buffers[name].numel() * buffers[name].element_size() for name in engine.module.meta.get("packed", {}))


def kv_pool(engine: Engine) -> tuple[int, int, int]:
    """(pages, pages in use, tokens a page) of the engine's pool; zeros for an engine without one."""
    if not isinstance(engine, PagedEngine):
        return 0, 0, 0
    return engine.pool.pages, engine.pool.pages_in_use, engine.pool.page_size
