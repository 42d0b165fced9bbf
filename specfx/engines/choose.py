"""Which engine serves a model: chosen once, fastest first, each proven against the stock model before its output counts.

    capture -> rewrite passes -> gate on the references -> graph engine -> Inductor -> gate -> compiled engine

Where a stage fails, its typed reason is recorded and the last engine that was proven serves; if there is none, the eager engine does.
With ``compile="background"`` the graph engine serves until the compiled one is ready, and the switch happens between two calls. On a GPU
the engine that serves when nothing is being compiled replays its steps as CUDA graphs, proven like the rest.

What a process before this one captured and compiled for a model of the same structure is taken from the disk (`specfx.artifacts`). Where
the compiled engine can be had so, it is loaded and proven alone; but a model with sliding windows, which the compiled engine's comparison
is too short to cross, has its graph proven first.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from specfx import gate
from specfx.artifacts.shelf import Shelf
from specfx.capture import Fingerprint, capture, clone_sharing_storage
from specfx.drafters.mtp import Drafting
from specfx.engines.base import Engine
from specfx.engines.compiled import CompiledEngine
from specfx.engines.drafting import capture_drafting
from specfx.engines.eager import EagerEngine
from specfx.engines.ladder import Job, Ladder, Prove, refusal_of, timed
from specfx.engines.paged import PagedEngine, graph_engine, on_references
from specfx.errors import GateError, LoweringError, OptionError, PassError, Reason, Refusal
from specfx.kernels import cpu_build, triton_kernels
from specfx.options import CommonOptions
from specfx.passes.framework import PassContext, PassRecord, run_passes
from specfx.passes.mtp_head import mtp_head
from specfx.passes.pipeline import DRAFTING, LOWERING, REWRITE

Rewritten = tuple[fx.GraphModule, tuple[PassRecord, ...]]
"""A rewritten graph, and what the passes did."""


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
        self._graph_tried = False
        self._packs: bool | None = None
        self._ladders: dict[tuple[Any, ...] | None, Ladder] = {}
        self._apart: dict[tuple[Any, ...], Refusal] = {}
        self._eager: Ladder | None = None
        _check_pass_names(options.disable_passes)
        if options.engine == "eager":
            self._fall_back(model)
            return
        try:
            gate.refuse_by_name(model.config)
        except GateError as e:
            self.refusals.append(refusal_of("graph engine", e))
            self._fall_back(model)
            return
        if not self._compiles:
            self._prepare_graph(model)

    @property
    def _compiles(self) -> bool:
        return self.options.engine in ("auto", "compiled") and self.options.compile != "off"

    def ladder(self, model: PreTrainedModel, drafting: Drafting | None = None) -> Ladder:
        """The engines that serve `model` now, with a head stitched in where that can be done; else the drafter drafts beside them."""
        with self.lock:
            ladder = self._ladder(model, drafting)
            ladder.follow(self.fingerprint)
            if self.options.cuda_graphs and model.device.type == "cuda":
                ladder.replay(functools.partial(clone_sharing_storage, model))
            return ladder

    def apart(self, drafting: Drafting | None) -> Refusal | None:
        """Why a head is not part of the graph, if it was to be."""
        return None if drafting is None or not self._apart else self._apart.get(drafting.key)

    def graph(self, model: PreTrainedModel, drafting: Drafting | None) -> fx.GraphModule | None:
        """The rewritten graph that the ladder for `drafting` is over; None if there is none."""
        with self.lock:
            ladder = self._ladder(model, drafting)
            if ladder.module is None and ladder is not self._eager:  # its engine came from an artifact
                stitched = None if drafting is None or drafting.key in self._apart else drafting
                if (stored := self._shelf(model, stitched).graph(model)) is not None:
                    ladder.module = stored[0]
            return ladder.module

    def _ladder(self, model: PreTrainedModel, drafting: Drafting | None) -> Ladder:
        if self._eager is not None:
            return self._eager
        key = None if drafting is None or drafting.key in self._apart else drafting.key
        if key not in self._ladders:
            ladder = self._from_artifact(model, drafting if key is not None else None)
            if ladder is None:
                self._prepare_graph(model)
                if self.module is None:
                    return self._fall_back(model)
                ladder = self._plain(model) if drafting is None or key is None else self._stitched(model, drafting)
            if ladder is None:  # the head stays apart
                return self._ladder(model, None)
            self._ladders[key] = ladder
        return self._ladders[key]

    def _fall_back(self, model: PreTrainedModel) -> Ladder:
        with timed(self.seconds, "eager"):
            eager = EagerEngine(model)
        self.refusals += eager.refusals
        self._eager = Ladder(eager)
        return self._eager

    def _shelf(self, model: PreTrainedModel, drafting: Drafting | None) -> Shelf:
        return Shelf(model, self.options, drafting, self.refusals.append)

    def _job(self, model: PreTrainedModel, drafting: Drafting | None) -> Job:
        rows = 0 if drafting is None else drafting.shape.rows
        return Job(self.options, bool(self._packs), clone_sharing_storage(model), rows, self._shelf(model, drafting))

    def _from_artifact(self, model: PreTrainedModel, drafting: Drafting | None) -> Ladder | None:
        """A ladder with the compiled engine from an artifact alone, or None."""
        if not self._compiles or gate.has_windows(model) or not self._shelf(model, drafting).has_lowered():
            return None
        try:
            self._load_kernels(model.device)
        except LoweringError:  # recorded when the graph is prepared
            return None
        prove = functools.partial(_prove, drafting=drafting)
        return Ladder.from_artifact(self._job(model, drafting), prove, self.refusals.append)

    def _plain(self, model: PreTrainedModel) -> Ladder:
        """A ladder over the graph without a head."""
        assert self.module is not None
        ladder = Ladder(graph_engine(self.module, self.options.kv_pool, model.device), self.module, _prove)
        if self._compiles:
            ladder.compile(self._job(model, None))
        return ladder

    def _stitched(self, model: PreTrainedModel, drafting: Drafting) -> Ladder | None:
        """A ladder with the head in its graph, or None: then `apart` tells the reason."""
        assert self.module is not None
        stage, key = "mtp drafting", drafting.key
        if mtp_head.name in self.options.disable_passes:
            self._apart[key] = Refusal(stage, Reason.SWITCHED_OFF, f"{mtp_head.name} is named in disable_passes")
            return None
        rows, plain = drafting.shape.rows, self.module
        prove = functools.partial(_prove, drafting=drafting)
        try:
            module, records = self._proven(model, drafting, lambda: self._stitch(plain, drafting), prove)
        except Exception as e:  # drafting beside the graph is slower, not wrong
            self._apart[key] = refusal_of(stage, e, reason=Reason.DRAFTING_APART)
            return None
        ladder = Ladder(graph_engine(module, self.options.kv_pool, model.device, rows), module, prove)
        ladder.records = records
        if self._compiles:
            ladder.compile(self._job(model, drafting))
        return ladder

    def _stitch(self, module: fx.GraphModule, drafting: Drafting) -> Rewritten:
        """`module` with the head behind it, and what the pass did. Raises `CaptureError`, `PassError`."""
        part = capture_drafting(drafting, self.options.page_size)
        result = run_passes(module, DRAFTING, PassContext(self.options.page_size, drafting=part))
        if (refused := result.records[-1].refusal) is not None:
            raise PassError(refused.detail)
        return result.module, result.records

    def _prepare_graph(self, model: PreTrainedModel) -> None:
        """The rewritten graph, proven, as `module`; else why there is none."""
        if self._graph_tried:
            return
        self._graph_tried = True
        try:
            self._load_kernels(model.device)
            module, self.records = self._proven(model, None, lambda: self._capture(model), _prove)
            self.refusals += [r.refusal for r in self.records if r.refusal is not None]
            self.module = module
        except Exception as e:  # nothing that goes wrong here may cost the user more than the engine
            self.refusals.append(refusal_of("graph engine", e))

    def _proven(self, model: PreTrainedModel, drafting: Drafting | None, make: Callable[[], Rewritten], prove: Prove) -> Rewritten:
        """The graph from its artifact, or else what `make` makes; proven. Raises as `make` does, and `GateError`."""
        rows = 0 if drafting is None else drafting.shape.rows

        def check(module: fx.GraphModule) -> None:
            with timed(self.seconds, "gate" if drafting is None else "gate of the head"):
                stock, shrunken = clone_sharing_storage(model), gate.with_shrunken_windows(module)
                for call in (on_references(shrunken), shrunken):
                    prove(PagedEngine("graph", shrunken, call, "auto", model.device, rows), stock, True)

        shelf = self._shelf(model, drafting)
        with timed(self.seconds, "load"):
            stored = shelf.graph(model)
        if stored is not None:
            try:
                check(stored[0])
                return stored
            except GateError as e:
                shelf.discard_graph()
                self.refusals.append(refusal_of("artifacts", e, reason=Reason.ARTIFACT_UNUSABLE))
        made = make()
        check(made[0])
        shelf.keep_graph(*made, model)
        return made

    def _capture(self, model: PreTrainedModel) -> Rewritten:
        """The rewritten graph, and what the passes did. Raises `CaptureError`, `PassError`."""
        with timed(self.seconds, "capture"):
            captured = capture(model)
        with timed(self.seconds, "passes"):
            rewrite = [p for p in self.options.disable_passes if p in {q.name for q in REWRITE}]
            result = run_passes(captured, REWRITE, PassContext(self.options.page_size), rewrite)
        if not _serves(result.module):
            self.records = result.records
            failed = result.failed or result.records[-1]
            raise PassError(f"{failed.name}: {failed.refusal.detail if failed.refusal else 'did not apply'}")
        return result.module, result.records

    def _load_kernels(self, device: torch.device) -> None:
        """Replace the ops' references by kernels where they can be had; where not, the references stay in force.

        Raises `LoweringError` where they would serve, much too slowly, an engine that nobody asked for by name.
        """
        if self._packs is not None:
            return
        try:
            with timed(self.seconds, "kernels"):
                if device.type == "cpu":
                    self._packs = cpu_build.load().packs
                elif device.type == "cuda":
                    triton_kernels.register()
                    self._packs = False
                else:
                    raise LoweringError(f"specfx's ops have no kernels for {device.type}")
        except LoweringError as e:
            if device.type == "cpu":
                self.refusals.append(refusal_of("CPU kernels", e, "install a C++ compiler (g++) or set CXX"))
            elif self.options.engine == "auto":
                raise LoweringError(f"{e}; the ops' references are slow on {device.type}: engine='graph' takes them all the same") from e
            else:
                self.refusals.append(refusal_of(f"{device.type} kernels", e, "the ops' references serve, slowly", Reason.NO_KERNEL))
            self._packs = False

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the weights still lie where they were captured; values changed in place are followed. False: prepare anew."""
        now = Fingerprint.of(model)
        if now.storage != self.fingerprint.storage:
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


def _serves(module: fx.GraphModule) -> bool:
    """Whether the rewritten graph has a KV: what a switched-off or failed pass may have cost."""
    names = {str(n.target) for n in module.graph.nodes if n.op == "placeholder"}
    return {"input_ids", "lengths", "k_pages_0"} <= names


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
