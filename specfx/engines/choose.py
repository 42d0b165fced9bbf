"""Which engine serves a model: chosen once, fastest first, each proven against the stock model before its output counts.

    capture -> rewrite passes -> gate on the references -> graph engine -> Inductor -> gate -> compiled engine

Where a stage fails, its typed reason is recorded and the last engine that was proven serves; if there is none, the eager engine does.
With ``compile="background"`` the graph engine serves until the compiled one is ready, and the switch happens between two calls. On a GPU
the engine that serves when nothing is being compiled replays its steps as CUDA graphs, proven like the rest.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from specfx import gate
from specfx.capture import Fingerprint, capture, clone_sharing_storage
from specfx.drafters.mtp import Drafting
from specfx.engines import cuda_graphs, transfer
from specfx.engines.base import Engine
from specfx.engines.compiled import CompiledEngine
from specfx.engines.drafting import capture_drafting
from specfx.engines.eager import EagerEngine
from specfx.engines.paged import PagedEngine, graph_engine, on_references
from specfx.errors import CaptureError, GateError, LoweringError, PassError, Reason, Refusal, SpecfxError
from specfx.kernels import cpu_build, triton_kernels
from specfx.options import CommonOptions
from specfx.passes.framework import PassContext, PassRecord, run_passes
from specfx.passes.mtp_head import mtp_head
from specfx.passes.pack_linears import pack_linears
from specfx.passes.pipeline import DRAFTING, LOWERING, REWRITE
from specfx.runtime.held import Keeper

log = logging.getLogger("specfx")

_REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (CaptureError, Reason.CAPTURE_FAILED),
    (PassError, Reason.PASS_FAILED),
    (GateError, Reason.GATE_FAILED),
    (LoweringError, Reason.LOWERING_FAILED),
)


Prove = Callable[[Engine, PreTrainedModel, bool], None]
"""Raises `GateError` for an engine that differs from the stock model; the flag: whether the stock model's windows are to be shrunken."""

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


class Ladder:
    """The engines over one graph: the first serves at once, the compiled one when it is ready. State; `engine` serves the next call.

    refusals, records, seconds: of the compiled engine. module: the graph, None for an engine without one. prove: see `_prove`.
    """

    def __init__(self, engine: Engine, module: fx.GraphModule | None = None, prove: Prove | None = None) -> None:
        self.engine, self.module, self._prove = engine, module, prove
        self.keeper = Keeper(engine)
        self.refusals: list[Refusal] = []
        self.records: tuple[PassRecord, ...] = ()
        self.seconds: dict[str, float] = {}
        self._ready: CompiledEngine | None = None
        self._started = 0.0
        self._thread: threading.Thread | None = None
        self._replaying: Engine | None = None  # the engine of which steps are replayed, or were to be

    def compile(self, options: CommonOptions, packs: bool, stock: PreTrainedModel, draft_rows: int) -> None:
        """Build the compiled engine, now or in a thread, as the options say."""
        arguments = (options, packs, stock, draft_rows)
        if options.compile == "sync":
            self._compile(*arguments)
        elif options.compile == "background":
            self._thread = threading.Thread(target=self._compile, args=arguments, name="specfx-compile", daemon=True)
            _compiling.add(self._thread)
            self._started = time.perf_counter()
            self._thread.start()

    def follow(self, weights: Fingerprint) -> None:
        """A compiled engine that has become ready takes over, and packs the weights again if they have changed in place."""
        if self._ready is not None:
            self.engine, self._ready = self._ready, None
            self.keeper = Keeper(self.engine)
        self.keeper.follow(weights)
        if isinstance(self.engine, CompiledEngine) and self.engine.packed_at != weights:
            self.engine.refresh()
            self.engine.packed_at = weights

    def replay(self, new_stock: Callable[[], PreTrainedModel], new_recorder: Callable[[], cuda_graphs.Recorder] | None = None) -> None:
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
            cuda_graphs.replay(engine, self.refusals.append, new_recorder)
            with _timed(self.seconds, "CUDA graphs"):
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

    def _compile(self, options: CommonOptions, packs: bool, stock: PreTrainedModel, draft_rows: int) -> None:
        assert self.module is not None
        assert self._prove is not None
        context = PassContext(options.page_size, packs)
        try:
            packed_at = Fingerprint.of(stock)
            # (In a thread of its own, the current GPU is the first one.)
            with _timed(self.seconds, "compile"), transfer.on_device(stock.device):
                compiled = CompiledEngine(self.module, context, options.disable_passes, "auto", stock.device, draft_rows)
            with _timed(self.seconds, "first use"), transfer.on_device(stock.device):
                while True:  # once, but again if the weights change meanwhile
                    if (now := Fingerprint.of(stock)) != packed_at:
                        compiled.refresh()
                        packed_at = now
                    try:
                        self._prove(compiled, stock, False)
                        break
                    except GateError:
                        if Fingerprint.of(stock) == packed_at:
                            raise
            compiled.resize_pool(options.kv_pool)
            compiled.packed_at = packed_at
        except GateError as e:
            self.refusals.append(_refusal("compiled engine", e, reason=Reason.COMPILED_DIFFERS))
            return
        except Exception as e:  # in a thread of its own nobody would hear of it
            self.refusals.append(_refusal("compiled engine", e))
            return
        for refusal in (r.refusal for r in compiled.records):
            if refusal is not None and refusal.reason is not Reason.NOTHING_TO_DO:
                packing = refusal.stage == f"pass {pack_linears.name}" and refusal.reason is Reason.PASS_FAILED
                self.refusals.append(replace(refusal, reason=Reason.WEIGHTS_NOT_PACKED) if packing else refusal)
        self.records += compiled.records
        self._ready = compiled


class Prepared:
    """All engines of one model, and how they came about. State.

    A ladder of engines is built when it is first asked for: one over the graph as the rewrite passes leave it, and one for each draft
    head that is stitched into it.
    """

    def __init__(self, model: PreTrainedModel, options: CommonOptions) -> None:
        self.options = options
        self.lock = threading.RLock()  # held while a call uses the engines, whichever wrapper it came through
        self.fingerprint = Fingerprint.of(model)
        self.refusals: list[Refusal] = []
        self.records: tuple[PassRecord, ...] = ()
        self.seconds: dict[str, float] = {}
        self.module: fx.GraphModule | None = None
        self._packs = False
        self._ladders: dict[tuple[Any, ...] | None, Ladder] = {}
        self._apart: dict[tuple[Any, ...], Refusal] = {}
        _check_pass_names(options.disable_passes)
        if options.engine != "eager":
            self._prepare_graph(model)
        if self.module is None:
            with _timed(self.seconds, "eager"):
                eager = EagerEngine(model)
            self.refusals += eager.refusals
            self._ladders[None] = Ladder(eager)

    def ladder(self, model: PreTrainedModel, drafting: Drafting | None = None) -> Ladder:
        """The engines that serve `model` now, with a head stitched in where that can be done; else the drafter drafts beside them."""
        with self.lock:
            key = None if drafting is None or self.module is None else drafting.key
            if key is not None and key not in self._ladders and key not in self._apart:
                assert drafting is not None
                self._stitch(model, drafting, key)
            if key in self._apart:
                key = None
            if key not in self._ladders:
                assert self.module is not None
                self._ladders[key] = Ladder(graph_engine(self.module, self.options.kv_pool, model.device), self.module, _prove)
                self._compile(self._ladders[key], model, 0)
            ladder = self._ladders[key]
            ladder.follow(self.fingerprint)
            if self.options.cuda_graphs and model.device.type == "cuda":
                ladder.replay(functools.partial(clone_sharing_storage, model))
            return ladder

    def apart(self, drafting: Drafting | None) -> Refusal | None:
        """Why a head is not part of the graph, if it was to be."""
        return None if drafting is None or not self._apart else self._apart.get(drafting.key)

    def _stitch(self, model: PreTrainedModel, drafting: Drafting, key: tuple[Any, ...]) -> None:
        """A ladder with the head in its graph, or the reason why there is none."""
        assert self.module is not None
        stage = "mtp drafting"
        try:
            if mtp_head.name in self.options.disable_passes:
                self._apart[key] = Refusal(stage, Reason.SWITCHED_OFF, f"{mtp_head.name} is named in disable_passes")
                return
            part = capture_drafting(drafting, self.options.page_size)
            result = run_passes(self.module, DRAFTING, PassContext(self.options.page_size, drafting=part))
            if (refused := result.records[-1].refusal) is not None:
                raise PassError(refused.detail)
            rows = drafting.shape.rows
            prove = functools.partial(_prove, drafting=drafting)
            shrunken = gate.with_shrunken_windows(result.module)
            for call in (on_references(shrunken), shrunken):
                prove(PagedEngine("graph", shrunken, call, "auto", model.device, rows), clone_sharing_storage(model), True)
        except Exception as e:  # drafting beside the graph is slower, not wrong
            self._apart[key] = _refusal(stage, e, reason=Reason.DRAFTING_APART)
            return
        ladder = Ladder(graph_engine(result.module, self.options.kv_pool, model.device, rows), result.module, prove)
        ladder.records = result.records
        self._ladders[key] = ladder
        self._compile(ladder, model, rows)

    def _compile(self, ladder: Ladder, model: PreTrainedModel, draft_rows: int) -> None:
        if self.options.engine in ("auto", "compiled") and self.options.compile != "off":
            ladder.compile(self.options, self._packs, clone_sharing_storage(model), draft_rows)

    def _prepare_graph(self, model: PreTrainedModel) -> None:
        options = self.options
        try:
            gate.refuse_by_name(model.config)
            with _timed(self.seconds, "capture"):
                captured = capture(model)
            with _timed(self.seconds, "passes"):
                context = PassContext(options.page_size)
                rewrite = [p for p in options.disable_passes if p in {q.name for q in REWRITE}]
                result = run_passes(captured, REWRITE, context, rewrite)
            self.records = result.records
            if not _serves(result.module):
                failed = result.failed or result.records[-1]
                raise PassError(f"{failed.name}: {failed.refusal.detail if failed.refusal else 'did not apply'}")
            self.refusals += [r.refusal for r in result.records if r.refusal is not None]
            self._load_kernels(model.device)
            with _timed(self.seconds, "gate"):
                stock = clone_sharing_storage(model)
                shrunken = gate.with_shrunken_windows(result.module)
                for call in (on_references(shrunken), shrunken):
                    _prove(PagedEngine("graph", shrunken, call, "auto", model.device), stock)
            self.module = result.module
        except Exception as e:  # nothing that goes wrong here may cost the user more than the engine
            self.refusals.append(_refusal("graph engine", e))

    def _load_kernels(self, device: torch.device) -> None:
        """Replace the ops' references by kernels where they can be had; where not, the references stay in force.

        Raises `LoweringError` where they would serve, much too slowly, an engine that nobody asked for by name.
        """
        try:
            with _timed(self.seconds, "kernels"):
                if device.type == "cpu":
                    self._packs = cpu_build.load().packs
                elif device.type == "cuda":
                    triton_kernels.register()
                else:
                    raise LoweringError(f"specfx's ops have no kernels for {device.type}")
        except LoweringError as e:
            if device.type == "cpu":
                self.refusals.append(_refusal("CPU kernels", e, "install a C++ compiler (g++) or set CXX"))
            elif self.options.engine == "auto":
                raise LoweringError(f"{e}; the ops' references are slow on {device.type}: engine='graph' takes them all the same") from e
            else:
                self.refusals.append(_refusal(f"{device.type} kernels", e, "the ops' references serve, slowly", Reason.NO_KERNEL))

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the weights still lie where they were captured; values changed in place are followed. False: prepare anew."""
        now = Fingerprint.of(model)
        if now.storage != self.fingerprint.storage:
            return False
        self.fingerprint = now
        return True


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - started


def _refusal(stage: str, error: Exception, remedy: str = "", reason: Reason | None = None) -> Refusal:
    """The typed reason for what `error` cost; it is logged as well."""
    reason = reason or next((r for kind, r in _REASONS if isinstance(error, kind)), Reason.LOWERING_FAILED)
    detail = str(error) if isinstance(error, SpecfxError) and str(error) else f"{type(error).__name__}: {error}"
    refusal = Refusal(stage, reason, detail, remedy)
    log.warning("specfx: %s", refusal)
    return refusal


def _prove(engine: Engine, stock: PreTrainedModel, shrink_windows: bool = True, drafting: Drafting | None = None) -> None:
    """`gate.check` (and `gate.check_drafts`), for engines that may fail in any way. Raises `GateError`."""
    try:
        gate.check(engine, stock, shrink_windows)
        if drafting is not None:
            gate.check_drafts(engine, drafting, gate.random_tokens(stock, gate.PROMPT + 1), shrink_windows)
    except GateError:
        raise
    except Exception as e:
        raise GateError(f"{type(e).__name__}: {' '.join(str(e).split())[:400]}") from e


def _serves(module: fx.GraphModule) -> bool:
    """Whether the rewritten graph has a KV: what a switched-off or failed pass may have cost."""
    names = {str(n.target) for n in module.graph.nodes if n.op == "placeholder"}
    return {"input_ids", "lengths", "k_pages_0"} <= names


def _check_pass_names(disabled: tuple[str, ...]) -> None:
    names = [p.name for p in (*REWRITE, *DRAFTING, *LOWERING)]
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
