"""Seconds by stage, for the report, and the log that the command line's display of what is going on follows."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

progress = logging.getLogger("specfx.progress")
"""Each stage of preparing an engine, when it begins and when it has ended, at level INFO: nothing that a library shows by itself."""


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds that the block takes to those of a stage."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


@contextmanager
def told(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """`timed`, for a stage that somebody may be waiting for: `progress` tells of it."""
    before = seconds.get(stage, 0.0)
    progress.info("%s ...", stage)
    with timed(seconds, stage):
        yield
    progress.info("%s: %.1f s", stage, seconds[stage] - before)
