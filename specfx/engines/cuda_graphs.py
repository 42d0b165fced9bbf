"""CUDA graphs: on a GPU the whole step is recorded once for each of a few sizes, and then replayed by one launch.

A step of a small model is hundreds of kernels, each shorter than its launch. A recorded graph has fixed shapes and addresses, so:

* **Sizes.** A step is padded to one of a few sizes (`specfx.engines.padding`), which is recorded when it is first met. Prompts are not
  replayed: a sequence of more than `MAX_ROWS` rows, or more than `MOST_ROWS` rows together, goes to the call itself, whose launches are
  hidden behind its work.
* **Static inputs.** Whatever `PagedEngine.bind` makes on the host is padded there, packed into one buffer of bytes, and copied to the
  device by one copy, always to the same place (`specfx.engines.transfer`). The tails of a head of several layers, which are on the
  device already, are copied there. Weights and page pools are read where they are; when the pools have moved (they grow between
  calls) all recordings are dropped.
* **Outputs** of a replay are slices of static tensors, overwritten by the next one, as `RowsOutput` allows.
* **Memory.** All graphs of an engine share one memory pool: of each only the inputs and outputs stay allocated, so their intermediate
  values may overlap. That is safe because replays run one after another, and nothing of a replay but its outputs is read later.
* **Recording** runs the call twice for warming up (kernels are compiled and tuned at a first call), then once more while the stream
  is captured, always on dummy sequences alone, so nothing live is touched. It happens in the thread that generates, never while
  another thread of specfx compiles. If it fails the engine goes on without graphs, with a typed reason and the remedy.
* **Tuning.** With ``max_autotune`` the compiled engine's call is compiled anew for each size before it is recorded, with the sizes fixed
  and blocks chosen by measuring (`CompiledEngine.tuned`): a minute or more at the first step of a size. What it computes is compared with
  the call's own outputs; where it differs or does not compile, the call itself is recorded, with a typed reason.

The primitive that records is an argument of `Replayed`, so that all but it is tested without a GPU.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specfx import _compat
from specfx.engines import transfer
from specfx.engines.compiled import CompiledEngine
from specfx.engines.padding import KNOWN_INPUTS, Arrays, Sizes, fill, inputs_like, nothing, sizes_for
from specfx.engines.paged import Call, PagedEngine
from specfx.errors import KVPoolError, LoweringError, Reason, Refusal
from specfx.gate import TOLERANCES, row_error
from specfx.kernels.greedy_walk import greedy_walk
from specfx.kernels.keyed_sample import keyed_sample
from specfx.kernels.tree_attention import tree_attention_, tree_parents, tree_positions
from specfx.passes.framework import calls
from specfx.passes.mtp_head import TAILS
from specfx.runtime.tree import MAX_ROWS

log = logging.getLogger("specfx")

MOST_ROWS = 1024
"""Rows of one replay: with more a step is bound by arithmetic, and padding would cost more than launches."""
MOST_GRAPHS = 64
"""Recordings that an engine keeps; the least recently used is dropped."""
WARM_UPS = 2
_READS_BACK = (tree_attention_, tree_positions, tree_parents, greedy_walk, keyed_sample)
"""Ops whose references read tensors on the host, which a recording can't."""

Recorder = Callable[[Callable[[], Sequence[Tensor]]], tuple[Callable[[], None], Sequence[Tensor]]]
"""Takes a function without arguments; returns one that does the same work again, on the same memory, and the outputs."""


@dataclass(frozen=True)
class _Recording:
    """buffer: bytes of all inputs on the host; arrays: views of them. inputs: the static buffer on the device that it is copied to.
    tails: a static input, if the graph has it (those of padding stay zero)."""

    buffer: Tensor
    arrays: Arrays
    inputs: Tensor
    tails: Tensor | None
    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


class Replayed:
    """`PagedEngine.call` by replaying recordings of `call`; same inputs, same outputs. State.

    call: takes the graph's inputs in the order of `names`, on `device`. scratch: the pages for padding. new_recorder: makes a
    `Recorder`, whose recordings share memory. refuse: called once with the reason if recording fails; then `call` serves alone. tune:
    makes what does the same as `call` for inputs of the sizes of these; raises `LoweringError`.
    """

    def __init__(
        self,
        call: Call,
        names: Sequence[str],
        device: torch.device,
        scratch: Callable[[], Sequence[int]],
        new_recorder: Callable[[], Recorder],
        refuse: Callable[[Refusal], None],
        tune: Callable[[Sequence[Tensor]], Call] | None = None,
    ) -> None:
        self._tune = tune
        self._call, self._direct = call, transfer.uploading(call, device)
        self._names, self._device, self._scratch = list(names), device, scratch
        self._new_recorder, self._refuse = new_recorder, refuse
        self._changing = [name for name in names if name in KNOWN_INPUTS]
        self._record: Recorder | None = None
        self._recordings: OrderedDict[Sizes, _Recording] = OrderedDict()
        self._pools: tuple[tuple[int, int], ...] = ()
        self._given_up = False

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        given = dict(zip(self._names, inputs, strict=True))
        sizes = None if self._given_up else self._sizes(given)
        if sizes is None:
            return self._direct(*inputs)
        pools, tails = [x for name, x in given.items() if name not in KNOWN_INPUTS and name != TAILS], given.get(TAILS)
        if (recording := self._recording(sizes, pools, tails)) is None:
            return self._direct(*inputs)
        fill(recording.arrays, {name: given[name].numpy() for name in self._changing}, self._scratch())
        recording.inputs.copy_(recording.buffer, non_blocking=True)  # done before the forward has returned, which waits for its tokens
        if tails is not None and recording.tails is not None:
            recording.tails[: len(tails)].copy_(tails)
        recording.replay()
        sequences, rows = given["lengths"].shape[0], given["input_ids"].shape[1]
        reads = given["logit_rows"].shape[0] if "logit_rows" in given else rows
        logits, hidden, *rest = recording.outputs
        return (logits[:, :reads], hidden[:, :rows], *[x[:reads] for x in rest[:1]], *[x[:sequences] for x in rest[1:]])

    @property
    def latest(self) -> Callable[[], None] | None:
        """The last replay once more, on the same inputs (for benchmarks); None if there is none."""
        return next(reversed(self._recordings.values())).replay if self._recordings else None

    def _sizes(self, given: dict[str, Tensor]) -> Sizes | None:
        """None for a forward that is not replayed."""
        starts, columns = given["row_starts"].numpy(), given["page_table"].shape[1]
        if np.diff(starts).max() > MAX_ROWS:
            return None
        sizes = sizes_for(int(starts[-1]), len(starts) - 1, columns, given["moves"].shape[1], len(self._scratch()))
        return sizes if sizes.rows <= MOST_ROWS else None

    def _recording(self, sizes: Sizes, pools: Sequence[Tensor], tails: Tensor | None) -> _Recording | None:
        """Of this size, made now if there is none. None if that fails, or has failed."""
        places = tuple((x.data_ptr(), x.shape[0]) for x in pools)  # not the pools: they are to be freed when others take their places
        if places != self._pools:
            self._recordings.clear()
            self._record, self._pools = None, places
        if sizes in self._recordings:
            self._recordings.move_to_end(sizes)
            return self._recordings[sizes]
        try:
            recording = self._new(sizes, pools, tails)
        except Exception as e:  # whatever it is, the call itself still serves
            self._recordings.clear()
            self._record, self._given_up = None, True
            self._refuse(not_recorded(f"recording {sizes} failed: {_causes(e)}"))
            return None
        while len(self._recordings) >= MOST_GRAPHS:
            self._recordings.popitem(last=False)
        self._recordings[sizes] = recording
        return recording

    def _new(self, sizes: Sizes, pools: Sequence[Tensor], tails: Tensor | None) -> _Recording:
        if self._record is None:
            self._record = self._new_recorder()
        like = inputs_like(sizes, self._changing)
        buffer = transfer.pack(list(like.values()))
        arrays = {name: x.numpy() for name, x in zip(like, transfer.views(buffer, list(like.values())), strict=True)}
        fill(arrays, {name: x.numpy() for name, x in nothing(self._changing).items()}, self._scratch())
        static = buffer.to(self._device, copy=True)
        changing, others = iter(transfer.views(static, list(like.values()))), iter(pools)
        if tails is not None:
            tails = tails.new_zeros(sizes.sequences, *tails.shape[1:])
        inputs: list[Any] = [next(changing) if name in KNOWN_INPUTS else tails if name == TAILS else next(others) for name in self._names]
        call = self._call if self._tune is None else self._tuned(self._tune, inputs)
        replay, outputs = self._record(lambda: call(*inputs))
        return _Recording(buffer, arrays, static, tails, replay, tuple(outputs))

    def _tuned(self, tune: Callable[[Sequence[Tensor]], Call], inputs: Sequence[Tensor]) -> Call:
        """The call for `inputs`, dummies, if one can be had that computes the same; else the call itself, and no more are tried."""
        try:
            tuned = tune(inputs)
            expected = self._call(*inputs)[0].clone()
            worst = row_error(tuned(*inputs)[0], expected).max().item()
            if worst <= TOLERANCES.get(expected.dtype, TOLERANCES[torch.bfloat16]):
                return tuned
            reason, detail = Reason.COMPILED_DIFFERS, f"logits differ from those of the untuned step by {worst:.1e} (relative)"
        except LoweringError as e:
            reason, detail = Reason.LOWERING_FAILED, str(e)
        self._tune = None
        self._refuse(Refusal("tuned steps", reason, detail, "steps are recorded untuned; max_autotune=False asks for that"))
        return self._call


def _causes(error: BaseException | None) -> str:
    """`error` and what it was raised in the wake of, the first cause first: a capture that is ended after a failure fails as well."""
    found: list[str] = []
    while error is not None:
        found.insert(0, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        error = error.__cause__ or error.__context__
    return "; then ".join(found)


def not_recorded(detail: str) -> Refusal:
    """The reason why steps are launched kernel by kernel; it is logged as well."""
    remedy = "every step launches its kernels one by one, right but slower; cuda_graphs=False asks for that"
    refusal = Refusal("CUDA graphs", Reason.NOT_RECORDED, detail, remedy)
    log.warning("specfx: %s", refusal)
    return refusal


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace for each stream that it was used on."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """The `Recorder` of a CUDA device: `torch.cuda.CUDAGraph`s that share a memory pool, captured on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _recording_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: another thread of the user's may allocate meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()
        except BaseException:  # ending an invalid capture raises again, before the stream is put back
            torch.cuda.set_stream(current)
            _compat.end_failed_capture(self._device, self._pool)
            raise
        return graph.replay, outputs


def replay(
    engine: PagedEngine,
    refuse: Callable[[Refusal], None],
    new_recorder: Callable[[], Recorder] | None = None,
    max_autotune: bool = False,
) -> None:
    """Let `engine`, which holds no sequence, replay recordings of its call. new_recorder: of CUDA graphs if None. max_autotune: of calls
    that are tuned for each size, if it is a compiled one.

    Raises `LoweringError` if that can't be.
    """
    unknown = [name for name in engine.inputs if name not in (*KNOWN_INPUTS, TAILS) and name not in engine.pool_names]
    if unknown:
        raise LoweringError(f"the graph has inputs whose padding is not known: {', '.join(unknown)}")
    if new_recorder is None:
        new_recorder = functools.partial(CudaRecorder, engine.device)
        reading = sorted({op.name() for op in _READS_BACK if calls(engine.module, op) and not _compat.has_kernel(op, engine.device)})
        if reading:
            raise LoweringError(f"{', '.join(reading)} run on their references, which read tensors back: they have no kernel here")
    tokens = MAX_ROWS + engine.draft_rows
    try:
        engine.reserve_scratch(tokens)
    except KVPoolError as e:
        raise LoweringError(f"no room for the pages of padding: {e}") from e
    tune = engine.tuned if max_autotune and isinstance(engine, CompiledEngine) else None
    engine.call = Replayed(engine.direct, engine.inputs, engine.device, lambda: engine.pool.scratch(tokens), new_recorder, refuse, tune)


def stop_replaying(engine: PagedEngine) -> None:
    """Let `engine` call what it would have recorded."""
    engine.call = transfer.uploading(engine.direct, engine.device)
