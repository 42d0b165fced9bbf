"""The stored artifacts of one structure: looked up, bound to a model's weights, and kept.

What can't be used or kept is no error of the user's call: it is recorded with its reason, and the artifact is built anew or not kept.
Set ``SPECFX_NO_ARTIFACTS=1`` to neither read nor write any.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, fx
from transformers import PreTrainedModel

from specfx import _compat
from specfx.artifacts import graphs, key, store
from specfx.drafters.mtp import Drafting
from specfx.engines.compiled import Lowered
from specfx.errors import ArtifactError, Reason, Refusal
from specfx.options import CommonOptions
from specfx.passes.framework import PassRecord, place_of
from specfx.passes.pack_linears import packed

log = logging.getLogger("specfx")
T = TypeVar("T")


@dataclass(frozen=True)
class _StoredGraph:
    graph: graphs.GraphData
    records: tuple[PassRecord, ...]


@dataclass(frozen=True)
class _StoredLowered:
    """packs: whether linears could be packed where it was lowered."""

    graph: graphs.GraphData
    inductor: bytes
    records: tuple[PassRecord, ...]
    packs: bool


def in_use() -> bool:
    """Whether artifacts are read and written at all."""
    return os.environ.get("SPECFX_NO_ARTIFACTS", "0") in ("", "0")


class Shelf:
    """The artifacts for `model` under `options`, with the head of `drafting` stitched in if there is one. refuse: told of what went wrong.

    The models given later may be clones of `model`, with weights in the same places.
    """

    def __init__(
        self, model: PreTrainedModel, options: CommonOptions, drafting: Drafting | None, refuse: Callable[[Refusal], None]
    ) -> None:
        self.graph_name = self.lowered_name = ""
        self._drafting, self._refuse = drafting, refuse

        def name() -> str:
            try:
                return key.graph_key(model, options, drafting)
            except Exception as e:  # attributes of a model are anybody's code
                raise ArtifactError(f"{type(model).__name__} can't be described: {type(e).__name__}: {e}") from e

        self._known = True
        graph = self._tried(name, Reason.NOT_STORED)
        self._known = graph is not None
        if graph is not None:
            self.graph_name, self.lowered_name = f"{graph}.graph", f"{key.lowered_key(graph, options)}.lowered"

    def graph(self, model: PreTrainedModel) -> tuple[fx.GraphModule, tuple[PassRecord, ...]] | None:
        """The rewritten graph over the weights of `model`, and what the passes did; None if there is none that can be used."""

        def load() -> tuple[fx.GraphModule, tuple[PassRecord, ...]] | None:
            stored: _StoredGraph | None = store.read(self.graph_name)
            return None if stored is None else (self._decode(stored.graph, model), stored.records)

        return self._tried(load, Reason.ARTIFACT_UNUSABLE, self.graph_name)

    def records(self) -> tuple[PassRecord, ...]:
        """What the passes did to the rewritten graph that is stored."""
        stored: _StoredGraph | None = self._tried(lambda: store.read(self.graph_name), Reason.ARTIFACT_UNUSABLE)
        return () if stored is None else stored.records

    def keep_graph(self, module: fx.GraphModule, records: tuple[PassRecord, ...], model: PreTrainedModel) -> None:
        """Keep a rewritten graph of `model`."""
        self._tried(
            lambda: store.write(self.graph_name, _StoredGraph(graphs.encode(module, self._places(model)), records)), Reason.NOT_STORED
        )

    def has_lowered(self) -> bool:
        """Whether there seems to be a lowered graph."""
        return self._known and store.exists(self.lowered_name)

    def lowered(self, model: PreTrainedModel, packs: bool) -> Lowered | None:
        """The lowered graph over the weights of `model`, which are packed now; None if there is none that can be used. packs: whether
        linears can be packed here."""

        def load() -> Lowered | None:
            stored: _StoredLowered | None = store.read(self.lowered_name)
            if stored is None or stored.packs != packs:
                return None
            module = self._decode(stored.graph, model)
            try:
                call = _compat.load_artifact(stored.inductor, module)
            except Exception as e:  # Inductor's, of another making or without its files
                raise ArtifactError(f"Inductor's artifact can't be loaded: {type(e).__name__}: {' '.join(str(e).split())[:400]}") from e
            return Lowered(module, call, stored.records)

        return self._tried(load, Reason.ARTIFACT_UNUSABLE, self.lowered_name)

    def keep_lowered(self, lowered: Lowered, model: PreTrainedModel, packs: bool) -> None:
        """Keep what was compiled of a graph of `model`."""

        def keep() -> None:
            data = graphs.encode(lowered.module, self._places(model))
            try:
                inductor = lowered.call.to_bytes()
            except Exception as e:  # an artifact of a kind that Inductor's own cache can't keep either
                raise ArtifactError(f"Inductor's artifact can't be kept: {type(e).__name__}: {e}") from e
            store.write(self.lowered_name, _StoredLowered(data, inductor, lowered.records, packs))

        self._tried(keep, Reason.NOT_STORED)

    def discard_graph(self) -> None:
        """Delete the rewritten graph: it was found to be wrong."""
        self._tried(lambda: store.discard(self.graph_name), Reason.ARTIFACT_UNUSABLE)

    def discard_lowered(self) -> None:
        """Delete the lowered graph: it was found to be wrong."""
        self._tried(lambda: store.discard(self.lowered_name), Reason.ARTIFACT_UNUSABLE)

    def _tried(self, action: Callable[[], T], reason: Reason, damaged: str | None = None) -> T | None:
        """What `action` returns, or None where it can't be done, recorded with its reason. damaged: to be deleted then."""
        if not (self._known and in_use()):
            return None
        try:
            try:
                return action()
            except ArtifactError:
                if damaged is not None:
                    store.discard(damaged)
                raise
        except ArtifactError as e:
            refusal = Refusal("artifacts", reason, str(e))
            log.warning("specfx: %s", refusal)
            self._refuse(refusal)
            return None

    def _decode(self, data: graphs.GraphData, model: PreTrainedModel) -> fx.GraphModule:
        return graphs.decode(data, self._tensors(model), model.device, packed)

    def _tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """All parameters and buffers by name, those of a head behind those of the model."""
        parts = {"model": model} | ({} if self._drafting is None else {"head": self._drafting.head})
        return {
            f"{part}.{name}": tensor.detach()
            for part, module in parts.items()
            for tensors in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
            for name, tensor in tensors
        }

    def _places(self, model: PreTrainedModel) -> graphs.Places:
        """The first of the names under which each tensor goes."""
        return {place_of(tensor): name for name, tensor in reversed(self._tensors(model).items())}
