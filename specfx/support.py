"""Which models can be wrapped at all, and which calls of a wrapped one are no longer those of its class. What can be wrapped but not
captured is no matter of this module: it falls back."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from specfx import _compat
from specfx.errors import UnsupportedModelError

_STEPS_OF_GENERATE = ("_sample", "_prefill", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


def changed_by_hand(model: PreTrainedModel) -> str | None:
    """What makes this model's generation another than that of transformers' class of it: hooks, a `forward` of an instance's own,
    a step of `generate` that a class outside transformers defines. None if nothing does."""
    for name in _STEPS_OF_GENERATE:
        step = getattr(model, name, None)
        if step is not None and not is_libraries(step):
            return f"a {name} of the model's own"
    if _compat.has_global_forward_hooks():
        return "forward hooks on all modules"
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if not all(map(is_libraries, _compat.forward_hooks(module))):
            return f"a forward hook on {where}"
        own = vars(module).get("forward")
        if own is not None and not is_libraries(own) and not hasattr(module, "_hf_hook"):
            return f"a forward of its own on {where}"
    return None


def is_libraries(function: Any) -> bool:
    """Whether a function, and all that it wraps, is defined in transformers or torch."""
    while function is not None:
        names = getattr(getattr(function, "__func__", function), "__globals__", {})
        if names.get("__name__", "").split(".")[0] not in ("transformers", "torch"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def require_plain_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for what is known to break: named, with the remedy."""
    name = type(model).__name__
    modules = list(model.named_modules())
    if getattr(model, "peft_config", None) or any(type(m).__module__.startswith("peft.") for _, m in modules):
        raise UnsupportedModelError(f"{name} carries a PEFT adapter: merge it first (model.merge_and_unload())")
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise UnsupportedModelError(f"{name} is not a transformers model that can generate: load one with AutoModelForCausalLM")
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} can't generate: load it with AutoModelForCausalLM")
    hooked = next((n for n, m in modules if hasattr(m, "_hf_hook")), None)
    parameters = list(model.named_parameters())
    devices = {p.device for _, p in parameters}
    if any(device.type == "meta" for device in devices):
        raise UnsupportedModelError(f"{name} has no weights yet (they are on the meta device): load them first")
    if hooked is not None or len(devices) > 1:
        where = f"module {hooked or 'root'!r} has an offload hook" if hooked is not None else f"weights on {', '.join(map(str, devices))}"
        raise UnsupportedModelError(f"{name} is spread over devices ({where}): load it on one device, without device_map")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False):
        method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
        raise UnsupportedModelError(f"{name} is quantised ({method}): load it dequantised")
    for parameter_name, parameter in parameters:
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise UnsupportedModelError(f"{name} is tensor-parallel ({parameter_name} is a DTensor): load it without tp_plan")
        if not parameter.is_floating_point():
            raise UnsupportedModelError(f"{name} is quantised ({parameter_name} is {parameter.dtype}): load it dequantised")
