"""The instance-level `generate`: decides whether a call can be accelerated, and has the stock `generate` prepare it.

transformers drops some arguments on the way to a custom decoding method; what it drops (the streamer, the tokenizer for stop strings) is
bound here. Then the stock `generate` runs with `specfx.runtime.decode.speculative_decode` as its decoding method.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import threading
from collections import Counter
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMixin, GenerationMode, StopStringCriteria
from transformers.generation.utils import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from specfx.drafters.base import Drafter
from specfx.drafters.make import make_drafter, warm_up
from specfx.engines.choose import Ladder, Prepared
from specfx.errors import OptionError, PromptError
from specfx.options import CommonOptions, parse
from specfx.runtime import page_cache
from specfx.runtime.decode import speculative_decode
from specfx.runtime.stats import CallStats, Stats
from specfx.support import changed_by_hand, require_plain_model

log = logging.getLogger("specfx")


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
        self.first_call: dict[str, float] = {}
        self.lock = threading.RLock()
        self._ladder: Ladder | None = None
        self.__doc__, self.__name__ = type(model).generate.__doc__, "generate"
        self.__signature__ = inspect.signature(functools.partial(type(model).generate, model))

    def __deepcopy__(self, memo: dict[int, Any]) -> SpeculativeGenerate:
        model = memo.get(id(self.model))
        if model is None:  # the wrapper alone is copied: it still serves the same model
            return self
        return SpeculativeGenerate(model, self.method, copy.deepcopy(self.options, memo), self.common, None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.model, self.method, self.options)

    def ready(self) -> Ladder:
        """The engines (and the drafter), prepared now if need be: after a copy, or when the weights have been moved or replaced."""
        with self.lock, torch.autocast(self.model.device.type, enabled=False):
            if self.prepared is None or not self.prepared.is_current(self.model):
                if self.prepared is not None:
                    log.warning("specfx: weights or modules of %s have been replaced; preparing anew", type(self.model).__name__)
                self.prepared, self.drafter = Prepared(self.model, self.common), None
            if self.drafter is None:
                self.drafter = make_drafter(parse(self.method, self.options)[1], self.common, self.model)
            self._ladder = self.prepared.ladder(self.model, self.drafter.drafting, functools.partial(warm_up, self.drafter.name))
            return self._ladder

    def as_it_is(self) -> Ladder:
        """What `ready` gives, but without waiting for a call that is running: that has made it ready."""
        if self._ladder is not None and self.prepared is not None:
            if not self.prepared.lock.acquire(blocking=False):
                return self._ladder
            self.prepared.lock.release()
        return self.ready()

    def _stock(self, reason: str) -> None:
        if reason not in self.stock_calls:
            log.warning("specfx: served by the stock generate: %s", reason)
        self.stock_calls[reason] += 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        stock = functools.partial(type(model).generate, model)
        kwargs = _as_keywords(model, args, kwargs)
        config = _generation_config(model, kwargs)
        call = CallStats()
        reason = _not_ours(model, config, kwargs)
        if reason is not None:
            self._stock(reason)
            try:
                with call.timed("total"):
                    return stock(**kwargs)
            finally:
                self.stats.record(call)
        require_plain_model(model)  # adapters and hooks may have come since
        _check_prompt(model, kwargs)
        kwargs = _bind_stop_strings(config, kwargs)
        kwargs.pop("custom_generate", None)
        ladder = self.ready()
        assert self.prepared is not None
        with self.prepared.lock:
            assert self.drafter is not None
            ladder.keeper.collect()
            decode = functools.partial(
                speculative_decode,
                keeper=ladder.keeper,
                drafter=self.drafter,
                max_nodes=self.common.num_speculative_tokens,
                budget=ladder.budgets[self.drafter.name],
                stats=call,
                record_stock=self._stock,
                streamer=kwargs.get("streamer"),
                prefill_callback=self.common.prefill_callback,
                cache=kwargs.get("past_key_values"),
                one_by_one=self.common.engine == "eager",
                grows=self.common.kv_pool == "auto",
            )
            try:
                with call.timed("total"):
                    return stock(**kwargs, custom_generate=_as_method(decode))
            finally:
                self.stats.record(call)
                if not self.first_call:
                    self.first_call = {"first call": call.seconds["total"]}
                if call.prefills and "first token" not in self.first_call:  # of the first call that stock did not serve
                    self.first_call["first token"] = call.seconds["prefill"]


def _as_method(decode: Any) -> Any:
    """A plain function: transformers looks at a decoding method's parameters to find arguments of its own, and must find none."""

    def decoding_method(model: PreTrainedModel, input_ids: torch.Tensor, **prepared: Any) -> Any:
        return decode(model, input_ids, **prepared)

    return decoding_method


def _rebuild(model: PreTrainedModel, method: str | None, options: dict[str, Any]) -> SpeculativeGenerate:
    return SpeculativeGenerate(model, method, options, parse(method, options)[0], None, None)


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
    if torch.is_autocast_enabled(model.device.type):
        return "torch.autocast"
    if model.training and any(map(_drops_out, model.modules())):
        return "training mode with dropout"
    if (changed := changed_by_hand(model)) is not None:
        return changed
    for name in ("custom_generate", "assistant_model", "inputs_embeds", "negative_prompt_ids", "prompt_lookup_num_tokens"):
        if kwargs.get(name) is not None:
            return name
    if kwargs.get("position_ids") is not None:
        return "position_ids given by the caller"
    if kwargs.get("cache_implementation") == "paged":
        return "cache_implementation='paged': continuous batching"
    if _in_lockstep(model, kwargs.get("synced_gpus")):
        return "synced_gpus: every process must run as many forwards"
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if cache is not None and page_cache.beside(cache) is None:
        return "past_key_values that other code has filled or changed, or of another kind than a DynamicCache"
    if cache is not None and config.use_cache is False:
        return "past_key_values with use_cache=False"
    prompt = kwargs.get("input_ids", kwargs.get("inputs"))
    if isinstance(prompt, torch.Tensor) and (strange := _strange_prompt(model, prompt)) is not None:
        return strange
    if isinstance(mask, torch.Tensor) and (prompt is None or (isinstance(prompt, torch.Tensor) and mask.shape != prompt.shape)):
        return "an attention mask that is not of the input_ids' shape"
    # Where the call has its own, transformers would still take the model's on the way to a decoding method, without a tokenizer.
    if model.generation_config.stop_strings is not None and config.stop_strings is not None:
        return "stop_strings in the model's generation_config"
    for name in ("use_mtp", "token_healing"):
        if getattr(config, name, None):
            return name
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return str(mode.value).replace("_", " ")
    return None


def _in_lockstep(model: PreTrainedModel, synced_gpus: bool | None) -> bool:
    """Whether `generate` keeps several processes in step: asked for, or needed, since each holds a part of the weights."""
    if synced_gpus is not None:
        return synced_gpus
    sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return sharded and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _drops_out(module: nn.Module) -> bool:
    """Whether a module's output is random while it trains: `nn.Dropout`, and rates that are handed to functions."""
    rates = [rate for name, rate in vars(module).items() if "drop" in name and isinstance(rate, float)]
    return module.training and any(rate > 0 for rate in [*rates, module.p if isinstance(module, nn.Dropout) else 0.0])


def _strange_prompt(model: PreTrainedModel, prompt: torch.Tensor) -> str | None:
    """What of a prompt is stock's to judge."""
    if prompt.dtype not in (torch.int32, torch.int64):
        return f"input_ids of {prompt.dtype}"
    if prompt.dim() > 2:
        return f"input_ids of {prompt.dim()} dimensions"
    vocabulary = getattr(getattr(model.get_input_embeddings(), "weight", None), "shape", (None,))[0]
    if prompt.numel() and (int(prompt.min()) < 0 or (vocabulary is not None and int(prompt.max()) >= vocabulary)):
        return "token ids outside the vocabulary"
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
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):  # else transformers takes the caller's own
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
    kwargs.pop("stop_strings", None)
    return kwargs
