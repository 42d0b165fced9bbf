"""`specfx::keyed_sample`: the target's choice behind each row, the best token or one drawn with keyed noise from the warped distribution.

The draw is a Gumbel argmax (Gumbel, 1954): ``argmax(logits + g)`` with independent Gumbel noise g has the softmax's distribution. The
noise of vocabulary entry v is a pure function of the seed, the number of the sequence in its call, the position of the drawn token in
its sequence, and v. So one seed gives one text, whatever is drafted, in whichever order rows are verified, and whoever shares the batch.

Bits come from Philox4x32-10 (Salmon et al., SC 2011): key = the seed's two words, counter = (v // 4, position, the sequence's two words),
and entry v takes word v % 4. Its upper 23 bits, plus a half, over 2**23 are u in (0, 1), and g = -log(-log u).

Before the draw come transformers' standard warpers, in transformers' order and sense (its `TemperatureLogitsWarper` and so on): logits are
divided by the temperature; those below the k-th largest go (top-k; equals of it stay); then the least probable whose probabilities add
up to no more than 1 - p (top-p; of equals, where transformers leaves it open, those with the lower numbers first; the last of all never);
then those less than min-p times as probable as the best. Probabilities are counted in units of 2**-40 of the best one's, rounded down:
their sums are exact, whichever way they are added up, so every kernel keeps the same entries.

=========  ===================  ===================================================================================
argument   shape                meaning
=========  ===================  ===================================================================================
logits     floating ``[R, V]``  of any scale, taken as float32; -inf is never drawn, and nothing of a row with inf or NaN
keys       int64 ``[R, 3]``     seed, sequence, position (below 2**32) of each row's draw
warp       float64 ``[R, 4]``   temperature (0: the argmax of the logits, no draw), top-k (0: all), top-p (1: all),
                                min-p (0: all)
=========  ===================  ===================================================================================

Returns int64 ``[R]``, -1 where there was a draw and nothing could be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specfx.kernels.library import define_op

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
MASS = 2.0**40
"""The probability of a row's best entry, in the units in which probabilities are added up."""
LARGEST = torch.finfo(torch.float32).max
"""Logits that overflow when they are divided by a low temperature stay at this: they are equals, not NaN."""


class Draw(NamedTuple):
    """How the tokens of one sequence are drawn: the first two columns of its rows' keys, and their warp."""

    seed: int
    sequence: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def draw_tables(draws: Sequence[Draw | None], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`keys` and `warp` of rows, on the host, given each row's draw (None: the argmax) and the position of the token behind it."""
    keys, warp = torch.zeros(len(draws), 3, dtype=torch.int64), torch.zeros(len(draws), 4, dtype=torch.float64)
    if drawn := [i for i, draw in enumerate(draws) if draw is not None]:
        rows = [(*draw, position) for draw, position in zip(draws, positions, strict=True) if draw is not None]
        keys[drawn] = torch.tensor([(row[0], row[1], row[-1]) for row in rows])
        warp[drawn] = torch.tensor([row[2:-1] for row in rows], dtype=torch.float64)
    return keys, warp


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on words held in int64 tensors that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wrap modulo 2**64, which leaves the right bits
        c0, c1, c2, c3 = (second >> 32 & _WORD) ^ c1 ^ k0, second & _WORD, (first >> 32 & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def keyed_gumbel(keys: Tensor, vocabulary: int) -> Tensor:
    """The noise of each row, float32 ``[R, vocabulary]``."""
    seed, sequence, position = (column[:, None] for column in keys.unbind(1))
    block = torch.arange(-(-vocabulary // 4), device=keys.device)[None]
    counter = (block, position & _WORD, sequence & _WORD, sequence >> 32 & _WORD)
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32 & _WORD)), dim=-1)
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    return -(-uniform.log()).log().flatten(1)[:, :vocabulary]


def warped(logits: Tensor, warp: Tensor) -> Tensor:
    """What tokens are drawn from: float32 ``[R, V]``, -inf for all that the warpers take out. Rows of temperature 0 must not be given."""
    temperature, top_k, top_p, min_p = warp[:, :, None].unbind(1)
    scores = (logits.float() / temperature.float()).clamp(max=LARGEST)
    if not ((top_k > 0) | (top_p < 1) | (min_p > 0)).any():
        return scores
    vocabulary = logits.shape[1]
    values, order = scores.sort(dim=1, stable=True)  # the least probable first
    mass = ((values.double() - values[:, -1:].double()).exp() * MASS).long()
    size = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary).long()
    removed = values < values.gather(1, vocabulary - size)
    below = mass.masked_fill(removed, 0).cumsum(1)
    removed |= (top_p < 1) & (below <= ((1 - top_p) * below[:, -1:]).long())
    removed |= mass < min_p * MASS
    removed[:, -1] = False
    return scores.masked_fill(removed.scatter(1, order, removed), float("-inf"))


def keyed_sample_reference(logits: Tensor, keys: Tensor, warp: Tensor) -> Tensor:
    """The specification; see the module's docstring."""
    chosen = logits.float().argmax(-1)
    drawn = warp[:, 0].float().nonzero()[:, 0]
    if len(drawn):
        left = warped(logits[drawn], warp[drawn])
        best = (left + keyed_gumbel(keys[drawn], logits.shape[1])).argmax(-1)
        chosen[drawn] = torch.where((logits[drawn].float().amax(-1) < torch.inf) & (left.amax(-1) > -torch.inf), best, -1)
    return chosen


def _fake(logits: Tensor, keys: Tensor, warp: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


keyed_sample = define_op("keyed_sample(Tensor logits, Tensor keys, Tensor warp) -> Tensor", reference=keyed_sample_reference, fake=_fake)
