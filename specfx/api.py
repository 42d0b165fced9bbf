"""The public interface: one line makes `model.generate` speculative, one puts it back.

`speculate` puts an instance-level `generate` (a `SpeculativeGenerate`) beside the model's class method and touches nothing else: the class,
the weights and the configuration stay stock. `SpeculativeGenerate` decides whether a call can be accelerated, binds what transformers
drops on the way to a custom decoding method (the streamer, the tokenizer for stop strings), and calls the stock `generate` with
`specfx.runtime.decode.speculative_decode` as its decoding method.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMixin, GenerationMode, StopStringCriteria

from specfx.drafters.base import Drafter, NoDrafter
from specfx.engines.base import Engine
from specfx.engines.choose import Prepared, kv_pool, packed_bytes
from specfx.errors import OptionError, PromptError, SpecfxError, UnsupportedModelError
from specfx.options import CommonOptions, MtpOptions, SuffixOptions, parse
from specfx.report import Report
from specfx.runtime.decode import speculative_decode
from specfx.runtime.stats import CallStats, Stats

log = logging.getLogger("specfx")


def speculate(model: PreTrainedModel, method: str | None = None, **options: Any) -> PreTrainedModel:
    """Make `model.generate` speculative and return the same object.

    method: None (plain decoding through specfx's engine), "suffix" (continuations seen before in prompt and output), or "mtp" (a
    DeepSeek-V3-style next-n head, ``head=PATH``). options: see `specfx.options` for the common ones and those of each method.
    Calling it again changes method and options; engines already prepared are kept where the options allow.

    Raises `OptionError` for a wrong method or option, `HeadError` for a head that doesn't fit, `UnsupportedModelError` for models
    that can't be wrapped. Models that can't be captured don't raise: they fall back to another engine, see `explain`.
    """
    common, own = parse(method, options)
    _require_plain_model(model)
    drafter = _make_drafter(method, common, own, model)
    previous = _wrapper_of(model)
    prepared = None
    if (
        previous is not None
        and previous.prepared is not None
        and _same_engine(previous.common, common)
        and previous.prepared.is_current(model)
    ):
        prepared = previous.prepared
    wrapper = SpeculativeGenerate(model, method, options, common, drafter, prepared or Prepared(model, common))
    model.__dict__["generate"] = wrapper
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Put `model.generate` back exactly as `speculate` found it, and free what specfx holds. No error if nothing was wrapped."""
    if _wrapper_of(model) is not None:
        del model.__dict__["generate"]
    return model


@contextmanager
def speculating(model: PreTrainedModel, method: str | None = None, **options: Any) -> Iterator[PreTrainedModel]:
    """``with specfx.speculating(model, "suffix"): model.generate(...)``. What was there before is there after."""
    before = model.__dict__.get("generate")
    speculate(model, method, **options)
    try:
        yield model
    finally:
        if before is None:
            restore(model)
        else:
            model.__dict__["generate"] = before


def explain(model: PreTrainedModel, graph: bool = False) -> Report:
    """What was decided about `model`, as data; prints as text. graph: include the rewritten graph in normal form.

    Raises `OptionError` if `speculate` was not called on it.
    """
    wrapper = _require_wrapper(model)
    prepared = wrapper.ready()
    engine = prepared.engine
    pages, in_use, page_size = kv_pool(engine)
    text = None
    if graph and prepared.module is not None:
        from specfx.passes.printer import normal_form

        text = normal_form(prepared.module)
    return Report(
        model=type(model).__name__,
        method=wrapper.method,
        engine=engine.name,
        verifies=engine.verifies,
        passes=prepared.records,
        refusals=tuple(prepared.refusals),
        stock_calls=Counter(wrapper.stock_calls),
        packed_bytes=packed_bytes(engine),
        pages=pages,
        pages_in_use=in_use,
        page_size=page_size,
        seconds=dict(prepared.seconds),
        graph=text,
    )


def stats(model: PreTrainedModel) -> Stats:
    """Counters of this thread's last call (`last`, and as attributes) and of all calls since `speculate` (`total`)."""
    return _require_wrapper(model).stats


def engine_of(model: PreTrainedModel) -> Engine:
    """The engine that serves the next call (for benchmarks and tests)."""
    return _require_wrapper(model).ready().engine


class SpeculativeGenerate:
    """The instance-level `generate`. State of a wrapped model: options, drafter, prepared engines, statistics.

    A deep copy or a pickle holds the method and the options only; the copy prepares engines of its own at its first call.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | None,
        options: dict[str, Any],
        common: CommonOptions,
        drafter: Drafter | None,
        prepared: Prepared | None,
    ) -> None:
        self.model, self.method, self.options, self.common = model, method, options, common
        self.drafter, self.prepared = drafter, prepared
        self.stats = Stats()
        self.stock_calls: Counter[str] = Counter()
        self.lock = threading.RLock()
        self.__doc__ = type(model).generate.__doc__

    def __deepcopy__(self, memo: dict[int, Any]) -> SpeculativeGenerate:
        model = memo.get(id(self.model))
        if model is None:  # the wrapper alone is copied: it still serves the same model
            return self
        return SpeculativeGenerate(model, self.method, copy.deepcopy(self.options, memo), self.common, None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.model, self.method, self.options)

    def ready(self) -> Prepared:
        """The engines (and the drafter), prepared now if need be: after a copy, or when the weights have been moved or replaced."""
        with self.lock:
            if self.prepared is None or not self.prepared.is_current(self.model):
                if self.prepared is not None:
                    log.warning("specfx: the weights of %s have been replaced; preparing anew", type(self.model).__name__)
                self.prepared, self.drafter = Prepared(self.model, self.common), None
            if self.drafter is None:
                self.drafter = _make_drafter(self.method, *parse(self.method, self.options), self.model)
            return self.prepared

    def _stock(self, reason: str) -> None:
        if reason not in self.stock_calls:
            log.warning("specfx: served by the stock generate: %s", reason)
        self.stock_calls[reason] += 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        stock = functools.partial(type(model).generate, model)
        kwargs = _as_keywords(model, args, kwargs)
        config = _generation_config(model, kwargs)
        reason = _not_ours(model, config, kwargs)
        if reason is not None:
            self._stock(reason)
            return stock(**kwargs)
        _require_plain_model(model)  # adapters and hooks may have come since
        _check_prompt(model, kwargs)
        kwargs = _bind_stop_strings(config, kwargs)
        kwargs.pop("custom_generate", None)
        with self.lock:
            prepared = self.ready()
            assert self.drafter is not None
            call = CallStats()
            decode = functools.partial(
                speculative_decode,
                engine=prepared.engine,
                drafter=self.drafter,
                max_nodes=self.common.num_speculative_tokens,
                stats=call,
                record_stock=self._stock,
                streamer=kwargs.get("streamer"),
            )
            try:
                with call.timed("total"):
                    return stock(**kwargs, custom_generate=_as_method(decode))
            finally:
                self.stats.record(call)


def _as_method(decode: Any) -> Any:
    """A plain function: transformers looks at a decoding method's parameters to find arguments of its own, and must find none."""

    def decoding_method(model: PreTrainedModel, input_ids: torch.Tensor, **prepared: Any) -> Any:
        return decode(model, input_ids, **prepared)

    return decoding_method


def _rebuild(model: PreTrainedModel, method: str | None, options: dict[str, Any]) -> SpeculativeGenerate:
    return SpeculativeGenerate(model, method, options, parse(method, options)[0], None, None)


def _wrapper_of(model: PreTrainedModel) -> SpeculativeGenerate | None:
    wrapper = model.__dict__.get("generate")
    return wrapper if isinstance(wrapper, SpeculativeGenerate) else None


def _require_wrapper(model: PreTrainedModel) -> SpeculativeGenerate:
    wrapper = _wrapper_of(model)
    if wrapper is None:
        raise OptionError(f"this {type(model).__name__} is not wrapped: call specfx.speculate(model, ...) first")
    return wrapper


def _same_engine(a: CommonOptions, b: CommonOptions) -> bool:
    fields = ("engine", "compile", "kv_pool", "page_size", "disable_passes")
    return all(getattr(a, f) == getattr(b, f) for f in fields)


def _make_drafter(method: str | None, common: CommonOptions, own: Any, model: PreTrainedModel) -> Drafter:
    if isinstance(own, SuffixOptions):
        from specfx.drafters.suffix import SuffixDrafter

        return SuffixDrafter(own, common.num_speculative_tokens)
    if isinstance(own, MtpOptions):
        from specfx.drafters.mtp import MtpDrafter

        return MtpDrafter(own, common.num_speculative_tokens, model)
    return NoDrafter()


def _require_plain_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for what is known to break: named, with the remedy."""
    name = type(model).__name__
    if getattr(model, "peft_config", None) or any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise UnsupportedModelError(f"{name} carries a PEFT adapter: merge it first (model.merge_and_unload())")
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise UnsupportedModelError(f"{name} is not a transformers model that can generate: load one with AutoModelForCausalLM")
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} can't generate: load it with AutoModelForCausalLM")
    other = model.__dict__.get("generate")
    if other is not None and not isinstance(other, SpeculativeGenerate):
        raise UnsupportedModelError(f"this {name} has a `generate` of its own on the instance, which specfx won't replace: delete it first")
    hooked = next((n for n, m in model.named_modules() if hasattr(m, "_hf_hook")), None)
    devices = {p.device for p in model.parameters()}
    if hooked is not None or len(devices) > 1:
        where = f"module {hooked or 'root'!r} has an offload hook" if hooked is not None else f"weights on {', '.join(map(str, devices))}"
        raise UnsupportedModelError(f"{name} is spread over devices ({where}): load it on one device, without device_map")
    for parameter_name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise UnsupportedModelError(f"{name} is tensor-parallel ({parameter_name} is a DTensor): load it without tp_plan")
        if not parameter.is_floating_point():
            raise UnsupportedModelError(f"{name} is quantised ({parameter_name} is {parameter.dtype}): load it dequantised")


def _as_keywords(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name. Raises `TypeError` where the stock `generate` would."""
    signature = inspect.signature(type(model).generate)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):  # a class that hands all on to transformers
        signature = inspect.signature(GenerationMixin.generate)
    bound = signature.bind(model, *args, **kwargs).arguments
    named: dict[str, Any] = {}
    for name, value in list(bound.items())[1:]:
        named |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


def _generation_config(model: PreTrainedModel, kwargs: dict[str, Any]) -> GenerationConfig:
    """The configuration as `generate` will see it: keyword arguments over the one passed over the model's."""
    return model._prepare_generation_config(
        kwargs.get("generation_config"), **{k: v for k, v in kwargs.items() if k != "generation_config"}
    )[0]


def _not_ours(model: PreTrainedModel, config: GenerationConfig, kwargs: dict[str, Any]) -> str | None:
    """Why a call goes to the stock `generate` before anything is prepared; None if it may be ours."""
    for name in ("custom_generate", "assistant_model", "inputs_embeds", "negative_prompt_ids", "prompt_lookup_num_tokens"):
        if kwargs.get(name) is not None:
            return name
    for name in ("position_ids", "past_key_values"):  # a cache of the caller's is there to be filled
        if kwargs.get(name) is not None:
            return f"{name} given by the caller"
    if model.generation_config.stop_strings is not None and config.stop_strings == model.generation_config.stop_strings:
        return "stop_strings in the model's generation_config"
    if getattr(config, "use_mtp", False):
        return "use_mtp"
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return str(mode.value).replace("_", " ")
    return None


def _check_prompt(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raise `PromptError` for an empty prompt, or one that leaves no room for a token in the model's context."""
    prompt = kwargs.get("input_ids")
    if prompt is None:
        prompt = kwargs.get("inputs")
    if not isinstance(prompt, torch.Tensor):
        return
    mask = kwargs.get("attention_mask")
    if prompt.numel() == 0 or (mask is not None and mask.shape == prompt.shape and not bool(mask.any(-1).all())):
        raise PromptError(f"the prompt is empty (input_ids of shape {list(prompt.shape)}): give at least one token in each row")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = prompt.shape[-1] if mask is None or mask.shape != prompt.shape else int(mask.sum(-1).max())
    if isinstance(context, int) and longest >= context:
        raise PromptError(f"the prompt has {longest} tokens, the model's context {context}: shorten the prompt")


def _bind_stop_strings(config: GenerationConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """transformers drops the tokenizer on the way to a custom decoding method: build the stop-string criterion here."""
    strings = config.stop_strings
    if strings is None:
        return kwargs
    tokenizer = kwargs.get("tokenizer")
    if tokenizer is None:
        raise OptionError("stop_strings need the tokenizer: pass tokenizer=... to generate")
    kwargs = dict(kwargs)
    given = kwargs.get("generation_config")
    if given is not None and given.stop_strings is not None:
        kwargs["generation_config"] = copy.deepcopy(given)
        kwargs["generation_config"].stop_strings = None
    criteria = kwargs.get("stopping_criteria") or []
    kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
    kwargs.pop("stop_strings", None)
    return kwargs


__all__ = ["SpecfxError", "engine_of", "explain", "restore", "speculate", "speculating", "stats"]
