"""The engines over one graph, from the first that can serve to the fastest: each proven before it takes over, between two calls.

Until there is one, the stock `generate` serves.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx
from transformers import PreTrainedModel

from specfx.artifacts.shelf import Shelf
from specfx.capture import Fingerprint
from specfx.engines import cuda_graphs, transfer
from specfx.engines.base import Engine
from specfx.engines.compiled import CompiledEngine, lower
from specfx.engines.paged import PagedEngine
from specfx.engines.stock import StockEngine
from specfx.errors import CaptureError, GateError, LoweringError, PassError, Reason, Refusal, SpecfxError
from specfx.options import CommonOptions
from specfx.passes.framework import PassContext, PassRecord
from specfx.passes.pack_linears import pack_linears
from specfx.runtime.budget import Budget
from specfx.runtime.held import Keeper
from specfx.timing import told

log = logging.getLogger("specfx")

Prove = Callable[[Engine, PreTrainedModel, bool], None]
"""Raises `GateError` for an engine that differs from the stock model; the flag: whether the stock model's windows are to be shrunken."""

_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (CaptureError, Reason.CAPTURE_FAILED),
    (PassError, Reason.PASS_FAILED),
    (GateError, Reason.GATE_FAILED),
    (LoweringError, Reason.LOWERING_FAILED),
)

_working: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_SECONDS_TO_LEAVE = 10.0


@atexit.register
def _leave() -> None:
    """Make compiling threads end: one that the interpreter kills inside torch's C++ would abort the process."""
    deadline = time.monotonic() + _SECONDS_TO_LEAVE
    for thread in list(_working):
        while thread.is_alive() and thread.ident is not None and time.monotonic() < deadline:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            thread.join(0.1)


def refusal_of(stage: str, error: Exception, remedy: str = "", reason: Reason | None = None) -> Refusal:
    """The typed reason for what `error` cost; it is logged as well."""
    reason = reason or next((r for kind, r in _REASONS if isinstance(error, kind)), Reason.LOWERING_FAILED)
    detail = str(error) if isinstance(error, SpecfxError) and str(error) else f"{type(error).__name__}: {error}"
    refusal = Refusal(stage, reason, detail, remedy)
    log.warning("specfx: %s", refusal)
    return refusal


@dataclass(frozen=True)
class Job:
    """What a compiled engine is made from. packs: whether linears can be packed. stock: a clone of the model, sharing its weights.
    draft_rows: of a stitched head. shelf: where artifacts of this graph are."""

    options: CommonOptions
    packs: bool
    stock: PreTrainedModel
    draft_rows: int
    shelf: Shelf


class Ladder:
    """The engines over one graph. State; `engine` serves the next call.

    budgets: by drafter, what was learned of its drafts on the engine that serves. refusals, records, seconds: of the compiled engine.
    module: the graph, None for an engine without one, or one from an artifact.
    """

    def __init__(self) -> None:
        self.engine: Engine = StockEngine()
        self.module: fx.GraphModule | None = None
        self.keeper = Keeper(self.engine)
        self.budgets: defaultdict[str, Budget] = defaultdict(Budget)
        self.refusals: list[Refusal] = []
        self.records: tuple[PassRecord, ...] = ()
        self.seconds: dict[str, float] = {}
        self._prove: Prove | None = None
        self._latest: Engine = self.engine
        self._started = 0.0
        self._thread: threading.Thread | None = None
        self._replaying: Engine | None = None  # the engine of which steps are replayed, or were to be

    def put(self, engine: Engine, module: fx.GraphModule | None = None, prove: Prove | None = None) -> None:
        """An engine that serves from the next call on; it is proven. module: its graph, if others are to be made of that."""
        self.module, self._prove, self._latest = module, prove, engine

    def begin(self, work: Callable[[], None]) -> None:
        """Run `work`, which puts engines here, in a thread."""

        def guarded() -> None:
            try:
                work()
            except Exception as e:  # in a thread of its own nobody would hear of it
                self.refusals.append(refusal_of("engine", e))

        self._thread = threading.Thread(target=guarded, name="specfx-compile", daemon=True)
        _working.add(self._thread)
        self._started = time.perf_counter()
        self._thread.start()

    def load(self, job: Job, prove: Prove, refuse: Callable[[Refusal], None]) -> bool:
        """Put the compiled engine here, from its artifact alone. False if there is none that can be used, or (recorded) that is right."""
        packed_at = Fingerprint.of(job.stock)
        with told(self.seconds, "load"), transfer.on_device(job.stock.device):
            lowered = job.shelf.lowered(job.stock, job.packs)
            if lowered is None:
                return False
            compiled = CompiledEngine(lowered, "auto", job.stock.device, job.draft_rows)
        try:
            self._try_out(compiled, job, packed_at, prove)
        except Exception as e:  # then everything is made here, and what goes wrong again recorded as what it is
            job.shelf.discard_lowered()
            refuse(refusal_of("artifacts", e, reason=Reason.ARTIFACT_UNUSABLE))
            return False
        self._record(compiled)
        self.put(compiled, None, prove)
        return True

    def compile(self, job: Job) -> None:
        """Make the compiled engine of the graph: now, or in a thread, as the options say."""
        if job.options.compile == "sync" or threading.current_thread() is self._thread:
            self._compile(job)
        else:
            self.begin(lambda: self._compile(job))

    def follow(self, weights: Fingerprint) -> None:
        """An engine that has become ready takes over; a compiled one packs the weights again if they have changed in place."""
        if self.engine is not self._latest:
            self.engine = self._latest
            self.keeper = Keeper(self.engine)
            self.budgets.clear()
        self.keeper.follow(weights)
        if isinstance(self.engine, CompiledEngine) and self.engine.packed_at != weights:
            self.engine.refresh()
            self.engine.packed_at = weights

    def replay(
        self,
        new_stock: Callable[[], PreTrainedModel],
        new_recorder: Callable[[], cuda_graphs.Recorder] | None = None,
        max_autotune: bool = False,
    ) -> None:
        """Let the engine that serves replay its steps, once for each engine, unless another is being compiled (its thread would disturb
        the recording). What is wrong or can't be recorded is not replayed."""
        if self._replaying is self.engine or self.compiling is not None or not isinstance(self.engine, PagedEngine):
            return
        assert self._prove is not None
        self._replaying = engine = self.engine
        limit = engine.pool.limit
        try:
            if limit is not None:
                engine.resize_pool("auto")
            cuda_graphs.replay(engine, self.refusals.append, new_recorder, max_autotune)
            with told(self.seconds, "CUDA graphs"):
                self._prove(engine, new_stock(), False)
        except SpecfxError as e:
            cuda_graphs.stop_replaying(engine)
            self.refusals.append(cuda_graphs.not_recorded(str(e)))
        finally:
            if limit is not None:
                engine.resize_pool(limit)

    @property
    def compiling(self) -> Refusal | None:
        """Why the compiled engine does not serve yet: it is being built. None if it is not being built."""
        if self._thread is None or not self._thread.is_alive():
            return None
        seconds = time.perf_counter() - self._started
        detail = f"being built in the background for {seconds:.0f} s"
        return Refusal("compiled engine", Reason.ENGINE_NOT_READY, detail, 'wait, or compile="sync"')

    def wait(self) -> None:
        """Until a background compilation has ended."""
        if self._thread is not None:
            self._thread.join()

    def _compile(self, job: Job) -> None:
        assert self.module is not None
        assert self._prove is not None
        context = PassContext(job.options.page_size, job.packs)
        try:
            packed_at = Fingerprint.of(job.stock)
            # (In a thread of its own, the current GPU is the first one.)
            with told(self.seconds, "compile"), transfer.on_device(job.stock.device):
                lowered = job.shelf.lowered(job.stock, job.packs)
                kept = lowered is not None
                lowered = lowered or lower(self.module, context, job.options.disable_passes)
                compiled = CompiledEngine(lowered, "auto", job.stock.device, job.draft_rows)
            self._try_out(compiled, job, packed_at, self._prove)
        except GateError as e:
            job.shelf.discard_lowered()
            self.refusals.append(refusal_of("compiled engine", e, reason=Reason.COMPILED_DIFFERS))
            return
        except Exception as e:  # in a thread of its own nobody would hear of it
            self.refusals.append(refusal_of("compiled engine", e))
            return
        self._record(compiled)
        self._latest = compiled
        if not kept:
            job.shelf.keep_lowered(lowered, job.stock, job.packs)

    def _try_out(self, compiled: CompiledEngine, job: Job, packed_at: Fingerprint, prove: Prove) -> None:
        """Prove the engine, whose weights were packed when they were `packed_at`, and give it its pool. Raises `GateError`."""
        with told(self.seconds, "first use"), transfer.on_device(job.stock.device):
            while True:  # once, but again if the weights change meanwhile
                if (now := Fingerprint.of(job.stock)) != packed_at:
                    compiled.refresh()
                    packed_at = now
                try:
                    prove(compiled, job.stock, False)
                    break
                except GateError:
                    if Fingerprint.of(job.stock) == packed_at:
                        raise
        compiled.resize_pool(job.options.kv_pool)
        compiled.packed_at = packed_at

    def _record(self, compiled: CompiledEngine) -> None:
        """What the lowering passes did, and why some did not."""
        records = compiled.lowered.records
        for refusal in (r.refusal for r in records):
            if refusal is not None and refusal.reason is not Reason.NOTHING_TO_DO:
                packing = refusal.stage == f"pass {pack_linears.name}" and refusal.reason is Reason.PASS_FAILED
                self.refusals.append(replace(refusal, reason=Reason.WEIGHTS_NOT_PACKED) if packing else refusal)
        self.records += records
