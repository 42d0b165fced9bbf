"""What can the eager engine verify on this model? Found out by the acceptance gate, on a few random tokens.

1. By name: models whose past can't be cut (recurrent state), or whose output depends on how far the drafts reach, are refused.
2. Chains and batches. If they fail: "nothing".
3. Trees. If they fail: "chains".

Every cause of failure, exceptions too, ends up in a `Refusal`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specfx import gate
from specfx.errors import GateError, Reason, Refusal

if TYPE_CHECKING:
    from specfx.engines.eager import EagerEngine

STAGE = "eager engine"
"""The stage that the refusals name."""


def probe(engine: EagerEngine) -> tuple[str, list[Refusal]]:
    """("trees" | "chains" | "nothing", the reasons why not more). Never raises."""
    try:
        assert engine.model is not None
        gate.refuse_by_name(engine.model.config)
        engine.verifies = "chains"
        gate.check(engine, engine.model)
    except Exception as error:
        return "nothing", [Refusal(STAGE, Reason.CHAINS_UNVERIFIABLE, cause_of(error))]
    try:
        engine.verifies = "trees"
        gate.check(engine, engine.model)
    except Exception as error:
        return "chains", [Refusal(STAGE, Reason.TREES_UNVERIFIABLE, cause_of(error))]
    return "trees", []


def cause_of(error: Exception) -> str:
    """One line for a refusal; what specfx says itself needs no type before it."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, GateError) and text else f"{type(error).__name__}: {text}"
