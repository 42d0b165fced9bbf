"""Every error and every recorded reason of specfx, in one place.

Two kinds of "no" exist and both are typed:

* an **error** (a subclass of `SpecfxError`) is raised before any work is lost: it names the cause, the value and the remedy;
* a **refusal** (`Refusal`) is recorded, not raised: a stage could not be done *and proven right*, so a slower path was taken.
  Refusals stand in `specfx.explain(model).refusals`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class SpecfxError(Exception):
    """Base of every error that specfx raises on purpose."""


class OptionError(SpecfxError, ValueError):
    """An unknown method or option, or a value out of range."""


class UnsupportedModelError(SpecfxError):
    """The model can't be wrapped (adapters, offload hooks, tensor parallelism, no `generate`)."""


class PromptError(SpecfxError, ValueError):
    """The prompt is empty, or longer than the model's context."""


class ModelFileError(SpecfxError, FileNotFoundError):
    """A model's files can't be found, downloaded or read."""


class KVPoolError(SpecfxError, MemoryError):
    """The KV page pool can't hold what was asked of it."""


class HeadError(SpecfxError, ValueError):
    """A draft head is missing, misshapen, incomplete, or of another precision than its target."""


class SuffixCacheError(SpecfxError, ValueError):
    """A saved suffix cache can't be read or written, is damaged, or belongs to another model."""


class PassError(SpecfxError):
    """An FX pass can't be applied; the runner rolls the graph back."""


class CaptureError(SpecfxError):
    """The model can't be captured as one FX graph."""


class GateError(SpecfxError):
    """A rewritten or compiled graph disagrees with the stock model."""


class LoweringError(SpecfxError):
    """Inductor or the CPU kernel build failed."""


class ArtifactError(SpecfxError):
    """A stored artifact can't be used, or one can't be stored."""


class Reason(enum.Enum):
    """Why a faster path was not taken."""

    CAPTURE_FAILED = "capture failed"
    PASS_FAILED = "a pass failed"
    NOTHING_TO_DO = "a pass found nothing to do"
    GATE_FAILED = "the rewritten graph differs from the stock model"
    LOWERING_FAILED = "lowering failed"
    NO_KERNEL = "no kernel for this device"
    COMPILED_DIFFERS = "the compiled artifact differs from the graph engine"
    TREES_UNVERIFIABLE = "this model can't verify draft trees"
    RECURRENT_STATES = "this model's states pass from row to row, so its drafts are chains"
    CHAINS_UNVERIFIABLE = "this model can't verify draft chains"
    NOT_ACCELERATED = "this call is not accelerated"
    ENGINE_NOT_READY = "the engine is still being built"
    ONE_BY_ONE = "the eager engine would run the sequences of a batch one after another"
    SWITCHED_OFF = "switched off by the user"
    DRAFTS_CHAINS = "this head drafts chains only"
    DRAFTING_APART = "drafting is not part of the graph"
    HEAD_UNFED = "no engine hands out what this head is fed"
    NO_NUMBA = "Numba is not installed"
    WEIGHTS_NOT_PACKED = "weights not packed"
    ARTIFACT_UNUSABLE = "a stored artifact can't be used"
    WORKER_FAILED = "the process that compiles in the background failed, so this one does it"
    NOT_STORED = "an artifact can't be stored"
    NOT_RECORDED = "steps are not replayed as CUDA graphs"


@dataclass(frozen=True)
class Refusal:
    """A recorded reason: `stage` is what was tried, `detail` the cause, `remedy` what the user can do (may be empty)."""

    stage: str
    reason: Reason
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.stage}: {self.reason.value}: {self.detail}"
        return f"{text} (remedy: {self.remedy})" if self.remedy else text
