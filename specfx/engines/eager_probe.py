"""What can the eager engine verify on this model? Found out by the acceptance gate, on a few random tokens.

1. By name: models whose output depends on how far the drafts reach, or whose recurrent states aren't in the cache, are refused.
2. Chains and batches; with recurrent states, rejections in many ways. If they fail: "nothing".
3. Trees. If they fail, or there are recurrent states (which pass from row to row, through siblings too): "chains".

Every cause of failure, exceptions too, ends up in a `Refusal`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specfx import gate
from specfx.engines.eager_past import Past
from specfx.errors import GateError, Reason, Refusal

if TYPE_CHECKING:
    from specfx.engines.eager import EagerEngine

STAGE = "eager engine"
"""The stage that the refusals name."""


def probe(engine: EagerEngine) -> tuple[str, list[Refusal]]:
    """("trees" | "chains" | "nothing", the reasons why not more). Never raises."""
    states = ""
    try:
        assert engine.model is not None
        has_states = Past(engine.model.config).has_states
        if (states := gate.recurrent_layers(engine.model.config)) and not has_states:
            raise GateError(f"layers of type {states} keep a state outside the cache")
        gate.refuse_by_name(engine.model.config, states=has_states)
        engine.verifies = "chains"
        gate.check(engine, engine.model, states=has_states)
    except Exception as error:
        cause = cause_of(error)
        if states and engine.verifies == "chains" and isinstance(error, GateError):
            cause += f" (layers of type {states}: some models drop their state where several rows come behind it)"
        return "nothing", [Refusal(STAGE, Reason.CHAINS_UNVERIFIABLE, cause)]
    if has_states:
        return "chains", [Refusal(STAGE, Reason.RECURRENT_STATES, f"layers of type {states}")]
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
