"""From a method's options to its drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from specfx.drafters.base import Drafter, NoDrafter
from specfx.options import CommonOptions, MtpOptions, SuffixOptions

if TYPE_CHECKING:
    from specfx.drafters.suffix import SuffixDrafter

SUFFIX = "suffix"


def make_drafter(own: Any, common: CommonOptions, model: PreTrainedModel) -> Drafter:
    """The drafter that the method's options `own` describe, for the target `model`. Raises `HeadError` for a head that doesn't fit,
    `SuffixCacheError` for a suffix cache that can't be loaded."""
    if isinstance(own, SuffixOptions):
        return _suffix_drafter(own, common, model)
    if isinstance(own, MtpOptions):
        from specfx.drafters.mtp import load_drafter

        head = load_drafter(own, common.num_speculative_tokens, model)
        if not own.enable_suffix_decoding:
            return head
        from specfx.drafters.combined import CombinedDrafter

        return CombinedDrafter(head, _suffix_drafter(SuffixOptions(), common, model))
    return NoDrafter()


def _suffix_drafter(own: SuffixOptions, common: CommonOptions, model: PreTrainedModel) -> SuffixDrafter:
    from specfx.drafters.suffix import SuffixDrafter

    return SuffixDrafter(own, common.num_speculative_tokens, model.config.get_text_config().vocab_size)


def warm_up(name: str) -> None:
    """Compile or load the code of the drafter `name` now rather than in the middle of a generation."""
    if SUFFIX in name:
        from specfx.drafters.suffix import prepare

        prepare()
