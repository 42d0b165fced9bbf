"""Which engine serves a model: chosen once, fastest first, each proven against the stock model before its output counts.

    capture -> rewrite passes -> gate on the references -> graph engine -> Inductor -> gate -> compiled engine

Where a stage fails, its typed reason is recorded and the last engine that was proven serves; if there is none, the eager engine does.
On a GPU the engine that serves when nothing is being compiled replays its steps as CUDA graphs, proven like the rest.

What a process before this one captured and compiled for a model of the same structure is taken from the disk (`specfx.artifacts`). Where
the compiled engine can be had so, it is loaded and proven alone; but a model with sliding windows, which the compiled engine's comparison
is too short to cross, has its graph proven first.

With ``compile="background"`` the stock `generate` serves until an engine is ready, and the switch happens between two calls. A process of
its own captures and compiles, and puts artifacts on the disk (`specfx.artifacts.worker`); a thread of this one takes and proves them. Where
that can't be done (no artifacts, a GPU), capture happens at once, the graph engine serves, and the thread compiles; where the process
fails, the thread does all.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from specfx import _compat, gate
from specfx.artifacts import shelf, worker
from specfx.artifacts.shelf import Shelf
from specfx.capture import Fingerprint, clone_sharing_storage
from specfx.drafters.mtp import Drafting
from specfx.engines.base import Engine
from specfx.engines.compiled import CompiledEngine
from specfx.engines.eager import EagerEngine
from specfx.engines.ladder import Job, Ladder, Prove, refusal_of
from specfx.engines.paged import PagedEngine, graph_engine, on_references
from specfx.engines.rewrite import Rewritten, require_kv, rewrite, stitch
from specfx.errors import ArtifactError, GateError, LoweringError, OptionError, Reason, Refusal
from specfx.kernels.load import load
from specfx.options import CommonOptions
from specfx.passes.framework import PassRecord
from specfx.passes.mtp_head import mtp_head
from specfx.passes.pipeline import DRAFTING, LOWERING, REWRITE
from specfx.timing import told

_GRACE = 0.25
"""Seconds between `speculate` and the start of the process that compiles, which reads much from the disk: a first token comes before."""


def _nothing() -> None:
    pass


class Prepared:
    """All engines of one model, and how they came about. State.

    A ladder of engines is built when it is first asked for: one over the graph as the rewrite passes leave it, and one for each draft
    head that is stitched into it.
    """

    def __init__(self, model: PreTrainedModel, options: CommonOptions) -> None:
        _compat.hold_device_guard()
        self.options = options
        self.lock = threading.RLock()  # held while a call uses the engines, whichever wrapper it came through, and while a model is traced
        self.fingerprint = Fingerprint.of(model)
        self.refusals: list[Refusal] = []
        self.records: tuple[PassRecord, ...] = ()
        self.seconds: dict[str, float] = {}
        self.module: fx.GraphModule | None = None
        self._graph_lock = threading.Lock()  # held while the graph without a head is made
        self._graph_tried = False
        self._packs: bool | None = None
        self._ladders: dict[tuple[Any, ...] | None, Ladder] = {}
        self._apart: dict[tuple[Any, ...], Refusal] = {}
        self._eager: Ladder | None = None
        self._compiles = options.engine in ("auto", "compiled") and options.compile != "off"
        self._aside = self._compiles and options.compile == "background" and shelf.in_use() and model.device.type == "cpu"
        _check_pass_names(options.disable_passes)
        if options.engine != "eager":
            try:
                gate.refuse_by_name(model.config)
            except GateError as e:
                self.refusals.append(refusal_of("graph engine", e))
            else:
                if not self._compiles:
                    self._prepare_graph(model)
                return
        self._fall_back(Ladder(), model)

    def ladder(self, model: PreTrainedModel, drafting: Drafting | None = None, warm_up: Callable[[], None] = _nothing) -> Ladder:
        """The engines that serve `model` now, with a head stitched in where that can be done; else the drafter drafts beside them.
        warm_up: compiles the drafter's own code, if that is still to be done; picklable."""
        with self.lock:
            ladder = self._ladder(model, drafting, warm_up)
            ladder.follow(self.fingerprint)
            if ladder.engine.name != "stock":
                warm_up()
            if self.options.cuda_graphs and model.device.type == "cuda":
                ladder.replay(functools.partial(clone_sharing_storage, model), max_autotune=self.options.max_autotune)
            return ladder

    def apart(self, drafting: Drafting | None) -> Refusal | None:
        """Why a head is not part of the graph, if it was to be."""
        return None if drafting is None or not self._apart else self._apart.get(drafting.key)

    def graph(self, model: PreTrainedModel, drafting: Drafting | None) -> fx.GraphModule | None:
        """The rewritten graph that the ladder for `drafting` is over; None if there is none."""
        with self.lock:
            ladder = self._ladder(model, drafting, _nothing)
            if ladder.module is None and isinstance(ladder.engine, PagedEngine):  # it came from an artifact
                stitched = None if drafting is None or drafting.key in self._apart else drafting
                if (stored := self._shelf(model, stitched).graph(model)) is not None:
                    ladder.module = stored[0]
            return ladder.module

    def _ladder(self, model: PreTrainedModel, drafting: Drafting | None, warm_up: Callable[[], None]) -> Ladder:
        if self._eager is not None:
            return self._eager
        wanted = None if drafting is None or drafting.key in self._apart else drafting
        key = None if wanted is None else wanted.key
        if key not in self._ladders:
            ladder = self._ladders[key] = Ladder()
            if self._aside:  # (on a clone, since the user's model may be changed or go meanwhile)
                self._build_aside(ladder, clone_sharing_storage(model), wanted, warm_up)
            else:
                self._build(ladder, model, wanted)
        return self._eager or self._ladders[None if key in self._apart else key]

    def _build_aside(self, ladder: Ladder, model: PreTrainedModel, drafting: Drafting | None, warm_up: Callable[[], None]) -> None:
        """Put engines on `ladder` in a thread, after another process has made the artifacts that are missing."""
        place = self._shelf(model, drafting)
        order: bytes | None = None

        def failed(error: ArtifactError) -> None:
            self.refusals.append(refusal_of("worker", error, reason=Reason.WORKER_FAILED))

        if not place.has_lowered():
            try:  # here, so that the thread has nothing to do but wait while stock serves
                order = worker.order_of(model, self.options, drafting, place, warm_up)
            except ArtifactError as e:
                failed(e)

        def work() -> None:
            if order is not None:
                time.sleep(_GRACE)
                try:
                    with told(ladder.seconds, "worker"):
                        spent = worker.fill(order)
                    ladder.seconds |= {f"worker's {stage}": seconds for stage, seconds in spent.items()}
                except ArtifactError as e:
                    failed(e)
            warm_up()
            self._build(ladder, model, drafting)

        ladder.begin(work)

    def _build(self, ladder: Ladder, model: PreTrainedModel, drafting: Drafting | None) -> None:
        """Put engines on `ladder`: the compiled one from its artifact alone, or those over a proven graph, or the eager one."""
        if self._load(ladder, model, drafting):
            return
        self._prepare_graph(model)
        if self.module is None:
            self._fall_back(ladder, model)
        elif drafting is None:
            self._climb(ladder, model, self.module, None, _prove)
        elif not self._climb_stitched(ladder, model, self.module, drafting):  # the head stays apart
            plain = self._ladders.setdefault(None, ladder)
            if plain is ladder:
                self._build(ladder, model, None)

    def _fall_back(self, ladder: Ladder, model: PreTrainedModel) -> None:
        with told(self.seconds, "eager"):
            eager = EagerEngine(model)
        self.refusals += eager.refusals
        ladder.put(eager)
        self._eager = ladder

    def _load(self, ladder: Ladder, model: PreTrainedModel, drafting: Drafting | None) -> bool:
        """Whether the compiled engine could be had from its artifact alone; it is on `ladder` then."""
        place = self._shelf(model, drafting)
        if not self._compiles or gate.has_windows(model) or not place.has_lowered():
            return False
        try:
            self._need_kernels(model.device)
        except LoweringError:  # recorded when the graph is prepared
            return False
        job = self._job(model, drafting, place)
        if not ladder.load(job, functools.partial(_prove, drafting=drafting), self.refusals.append):
            return False
        self.records = (place if drafting is None else self._shelf(model, None)).records()
        if drafting is not None:
            ladder.records = (*place.records(), *ladder.records)
        return True

    def _climb(self, ladder: Ladder, model: PreTrainedModel, module: fx.GraphModule, drafting: Drafting | None, prove: Prove) -> None:
        """The engines over `module`, which is proven."""
        rows = 0 if drafting is None else drafting.shape.rows
        ladder.put(graph_engine(module, self.options.kv_pool, model.device, rows), module, prove)
        if self._compiles:
            ladder.compile(self._job(model, drafting, self._shelf(model, drafting)))

    def _climb_stitched(self, ladder: Ladder, model: PreTrainedModel, plain: fx.GraphModule, drafting: Drafting) -> bool:
        """The engines over `plain` with the head stitched in; False if that can't be done: then `apart` tells the reason."""
        stage, key = "mtp drafting", drafting.key
        if mtp_head.name in self.options.disable_passes:
            self._apart[key] = Refusal(stage, Reason.SWITCHED_OFF, f"{mtp_head.name} is named in disable_passes")
            return False
        prove = functools.partial(_prove, drafting=drafting)
        try:
            module, ladder.records = self._proven(model, drafting, lambda: stitch(plain, self.options, drafting), prove)
        except Exception as e:  # drafting beside the graph is slower, not wrong
            self._apart[key] = refusal_of(stage, e, reason=Reason.DRAFTING_APART)
            return False
        self._climb(ladder, model, module, drafting, prove)
        return True

    def _prepare_graph(self, model: PreTrainedModel) -> None:
        """The rewritten graph, proven, as `module`; else why there is none."""
        with self._graph_lock:
            if self._graph_tried:
                return
            try:
                self._need_kernels(model.device)
                module, self.records = self._proven(model, None, lambda: self._rewrite(model), _prove)
                self.refusals += [r.refusal for r in self.records if r.refusal is not None]
                self.module = module
            except Exception as e:  # nothing that goes wrong here may cost the user more than the engine
                self.refusals.append(refusal_of("graph engine", e))
            finally:
                self._graph_tried = True

    def _rewrite(self, model: PreTrainedModel) -> Rewritten:
        made = rewrite(model, self.options, self.seconds)
        self.records = made[1]  # also of a graph that comes to nothing
        require_kv(*made)
        return made

    def _proven(self, model: PreTrainedModel, drafting: Drafting | None, make: Callable[[], Rewritten], prove: Prove) -> Rewritten:
        """The graph from its artifact, or else what `make` makes; proven. Raises as `make` does, and `GateError`."""
        rows = 0 if drafting is None else drafting.shape.rows

        def check(module: fx.GraphModule) -> None:
            with told(self.seconds, "gate"):
                stock, shrunken = clone_sharing_storage(model), gate.with_shrunken_windows(module)
                for call in (on_references(shrunken), shrunken):
                    prove(PagedEngine("graph", shrunken, call, "auto", model.device, rows), stock, True)

        place = self._shelf(model, drafting)
        with told(self.seconds, "load"):
            stored = place.graph(model)
        if stored is not None:
            try:
                check(stored[0])
                return stored
            except GateError as e:
                place.discard_graph()
                self.refusals.append(refusal_of("artifacts", e, reason=Reason.ARTIFACT_UNUSABLE))
        with self.lock:  # tracing changes what transformers does in other threads
            made = make()
        check(made[0])
        place.keep_graph(*made, model)
        return made

    def _shelf(self, model: PreTrainedModel, drafting: Drafting | None) -> Shelf:
        return Shelf(model, self.options, drafting, self.refusals.append)

    def _job(self, model: PreTrainedModel, drafting: Drafting | None, place: Shelf) -> Job:
        rows = 0 if drafting is None else drafting.shape.rows
        return Job(self.options, bool(self._packs), clone_sharing_storage(model), rows, place)

    def _need_kernels(self, device: torch.device) -> None:
        """`_load_kernels`, once."""
        if self._packs is None:
            self._load_kernels(device)

    def _load_kernels(self, device: torch.device) -> None:
        """Replace the ops' references by kernels where they can be had; where not, the references stay in force.

        Raises `LoweringError` where they would serve, much too slowly, an engine that nobody asked for by name.
        """
        try:
            with told(self.seconds, "kernels"):
                self._packs = load(device)
        except LoweringError as e:
            if device.type == "cpu":
                self.refusals.append(refusal_of("CPU kernels", e, "install a C++ compiler (g++) or set CXX"))
            elif self.options.engine == "auto":
                raise LoweringError(f"{e}; the ops' references are slow on {device.type}: engine='graph' takes them all the same") from e
            else:
                self.refusals.append(refusal_of(f"{device.type} kernels", e, "the ops' references serve, slowly", Reason.NO_KERNEL))
            self._packs = False

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the modules are of the kinds that were captured, and the weights lie where they did; values changed in place are
        followed. False: prepare anew."""
        now = Fingerprint.of(model)
        if (now.modules, now.storage) != (self.fingerprint.modules, self.fingerprint.storage):
            return False
        self.fingerprint = now
        return True


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


def _check_pass_names(disabled: tuple[str, ...]) -> None:
    names = [p.name for p in (*REWRITE, *DRAFTING, *LOWERING)]
    unknown = [d for d in disabled if d not in names]
    if unknown:
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
