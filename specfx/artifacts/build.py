"""What the compiling process makes: the rewritten graph and the lowered one, unproven."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from transformers import PreTrainedModel

from specfx.artifacts import store
from specfx.artifacts.shelf import Shelf
from specfx.drafters.mtp import Drafting
from specfx.engines.compiled import lower
from specfx.engines.rewrite import Rewritten, require_kv, rewrite, stitch
from specfx.errors import ArtifactError, Refusal
from specfx.options import CommonOptions
from specfx.passes.framework import PassContext
from specfx.timing import told


def artifacts(
    model: PreTrainedModel,
    options: CommonOptions,
    drafting: Drafting | None,
    names: tuple[str, str],
    warm_up: Callable[[], None],
    packs: Future[bool],
) -> dict[str, float]:
    """Put the artifacts of `model` on its shelf and return the seconds of each stage. names: of the rewritten and of the lowered graph,
    as the process that asks for them knows them. packs: whether linears can be packed here.

    Raises `ArtifactError` if they would have other names here or can't be kept, and what capture and compiler raise.
    """
    problems: list[Refusal] = []
    seconds: dict[str, float] = {}
    shelf = Shelf(model, options, drafting, problems.append)
    if (shelf.graph_name, shelf.lowered_name) != names:
        raise ArtifactError("the model's structure or the settings look different there")
    with _beside(warm_up), store.alone(shelf.lowered_name):
        if shelf.has_lowered():  # another process was quicker
            return seconds
        module, records = _graph(model, options, Shelf(model, options, None, problems.append), seconds)
        if drafting is not None:
            with told(seconds, "stitching"):
                module, records = stitch(module, options, drafting)
        shelf.keep_graph(module, records, model)
        with told(seconds, "kernels"):
            pack = packs.result()
        with told(seconds, "compile"):
            lowered = lower(module, PassContext(options.page_size, pack), options.disable_passes)
        shelf.keep_lowered(lowered, model, pack)
    if problems:
        raise ArtifactError("; ".join(problem.detail for problem in problems))
    return seconds


@contextmanager
def _beside(warm_up: Callable[[], None]) -> Iterator[None]:
    """A block beside which another process runs `warm_up`, whose code goes to a cache of its own on the disk. (Where that fails, the
    process that asks compiles it.)"""
    process = multiprocessing.get_context("fork").Process(target=warm_up)
    process.start()
    try:
        yield
    finally:
        process.join()


def _graph(model: PreTrainedModel, options: CommonOptions, shelf: Shelf, seconds: dict[str, float]) -> Rewritten:
    """The graph without a head, from the shelf or made and put there."""
    stored = shelf.graph(model)
    if stored is None:
        stored = rewrite(model, options, seconds)
        require_kv(*stored)
        shelf.keep_graph(*stored, model)
    return stored
