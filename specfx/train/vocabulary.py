"""Which tokens a draft head need know: a small LM head makes a draft step cheap (FR-Spec, 2025; FastMTP, 2025).

A draft of a token outside is never made, so what counts is the share of the target's own tokens that lie inside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from specfx.train.data import Text


def select(texts: Iterable[Text], size: int, always: Iterable[int] = ()) -> torch.Tensor:
    """``[N]`` ascending ids, N <= size: those of `always` that occur at all, then the most frequent of the outputs.

    Of equally frequent tokens the lower id goes first. `always` is for end and other special tokens; where `size` is too small for
    them, the most frequent of them are taken. N < size if the texts have no more tokens.
    """
    counts = count(texts)
    special = set(always)
    ranked = sorted(counts, key=lambda token: (token not in special, -counts[token], token))
    return torch.tensor(sorted(ranked[:size]), dtype=torch.int64)


def coverage(vocabulary: torch.Tensor, texts: Iterable[Text]) -> float:
    """Share of the output tokens of `texts` that lie in `vocabulary`; 0 if there are none."""
    counts, inside = count(texts), set(vocabulary.tolist())
    total = sum(counts.values())
    return sum(n for token, n in counts.items() if token in inside) / total if total else 0.0


def count(texts: Iterable[Text]) -> Counter[int]:
    """How often each token occurs in the outputs."""
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.output)
    return counts
