"""`specfx::keyed_sample`: tokens drawn from logits with noise that is keyed by (seed, sequence, position).

The draw is a Gumbel argmax (Gumbel, 1954): ``argmax(logits + g)`` with independent Gumbel noise g has the softmax's distribution. The
noise of vocabulary entry v is a pure function of the seed, the number of the sequence in its call, the position of the drawn token in
its sequence, and v. So one seed gives one text, whatever is drafted, in whichever order rows are verified, and whoever shares the batch.

Bits come from Philox4x32-10 (Salmon et al., SC 2011): key = the seed's two words, counter = (v // 4, position, the sequence's two words),
and entry v takes word v % 4. Its upper 23 bits, plus a half, over 2**23 are u in (0, 1), and g = -log(-log u).

=========  ==================  =====================================================================
argument   shape               meaning
=========  ==================  =====================================================================
logits     float32 ``[R, V]``  of any scale; -inf is never drawn
keys       int64 ``[R, 3]``    seed, sequence, position (below 2**32) of each row's draw
=========  ==================  =====================================================================

Returns int64 ``[R]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfx.kernels.library import define_op

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


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


def keyed_sample_reference(logits: Tensor, keys: Tensor) -> Tensor:
    """The specification; see the module's docstring."""
    return (logits + keyed_gumbel(keys, logits.shape[1])).argmax(-1)


def _fake(logits: Tensor, keys: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


keyed_sample = define_op("keyed_sample(Tensor logits, Tensor keys) -> Tensor", reference=keyed_sample_reference, fake=_fake)
