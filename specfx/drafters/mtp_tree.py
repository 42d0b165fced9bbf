"""How a next-n head drafts a tree, in tensors alone: the same lines are the eager reference and what is traced into the graph.

The tree grows level by level (EAGLE-2, Li et al., 2024, as in SGLang). The `topk` best tokens behind the last committed one are the
first frontier. At each further step every token of the frontier proposes its `topk` best, and the `topk` most probable paths of all
are the next frontier. Of all that were proposed, the ``num_draft_tokens - 1`` most probable paths are the tree. ``topk=1`` is a chain.

A step runs one layer over the rows of *all* frontiers so far, the last one's `topk` being new: nothing of a draft then has to stand
in the head's KV from one step to the next, and with few rows the time is that of reading the weights once.

In a head of several layers, layer k makes draft step k, the last one also all later steps. Layer 0 is fed the target's hidden states; each
further one what the layer before it made of the row above, and the last one, where it is used again, its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specfx.runtime.tree import DraftTree, TreeShape

Step = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``(layer, tokens [S, R], hidden [S, R, H], tree_mask int64 [S, R]) -> [S, R, H]``: a layer over R rows behind each sequence's committed
pairs. Bit j of a row's mask: it sees row j (itself and its ancestors)."""
_GROUP = 64
"""Entries of a row of logits whose greatest stands for them where the best tokens are looked for."""
Logits = Callable[[Tensor], Tensor]
"""``[S, R, H] -> [S, R, V]``."""


def draft(hidden: Sequence[Tensor], step: Step, logits: Sequence[Logits], ids: Tensor | None, shape: TreeShape) -> tuple[Tensor, ...]:
    """Trees of `shape` behind S sequences.

    hidden: of each layer the hidden state ``[S, 1, H]`` at the sequence's last committed row. logits: of each layer; ids ``[V]`` the tokens
    that they are of, None for ``0 .. V - 1``. Returns tokens and parents (-1: the pending token), int64 ``[S, nodes]``, in an order where
    parents come first, and the logarithms of the path probabilities, float32 ``[S, nodes]``.
    """
    k, sequences, last = shape.topk, hidden[0].shape[0], len(hidden) - 1
    token, score = _best(logits[0](hidden[0]), ids, k)  # [S, 1, k]
    tokens, scores, parents = [token[:, 0]], [score[:, 0]], [torch.full_like(token[:, 0], -1)]
    frontier = torch.arange(k, device=hidden[0].device).expand(sequences, k)  # numbers of the frontier's candidates
    rows_tokens = tokens[0]
    rows_mask = torch.bitwise_left_shift(torch.ones_like(frontier), frontier)
    rows_above = torch.zeros_like(frontier)  # each row's parent: 0 is what was last committed, r + 1 is row r
    fed = out = hidden[0].expand(-1, k, -1)
    for d in range(1, shape.num_steps):
        layer = min(d, last)
        if 1 < d <= last:
            fed = _rows(torch.cat([hidden[d - 1], out], 1), rows_above)
        elif d > 1:
            fed = torch.cat([fed, _rows(out, rows_above[:, -k:] - 1)], 1)
        out = step(layer, rows_tokens, fed, rows_mask)
        token, score = _best(logits[layer](out[:, -k:]), ids, k)  # [S, k, k]
        score = score + scores[-1].gather(1, frontier - (0 if d == 1 else k + (d - 2) * k * k))[..., None]
        tokens.append(token.flatten(1))
        scores.append(score.flatten(1))
        parents.append(frontier[..., None].expand(-1, -1, k).flatten(1))
        if d == shape.num_steps - 1:
            break
        chosen = scores[-1].topk(k, dim=1).indices if k > 1 else torch.zeros_like(frontier)
        above = chosen // k  # places in the frontier before
        frontier = chosen + (k + (d - 1) * k * k)
        own = torch.arange(d * k, (d + 1) * k, device=chosen.device)
        mask = rows_mask[:, -k:].gather(1, above) | torch.bitwise_left_shift(torch.ones_like(own), own)
        rows_tokens = torch.cat([rows_tokens, tokens[-1].gather(1, chosen)], 1)
        rows_above = torch.cat([rows_above, above + (1 + (d - 1) * k)], 1)
        rows_mask = torch.cat([rows_mask, mask], 1)
    return _select(torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(scores, 1), shape.nodes)


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    """``[S, N, H]``, ``[S, R] -> [S, R, H]``."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))


def _best(logits: Tensor, ids: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k best tokens of each row and the logarithms of their probabilities, ``[S, R, k]``."""
    logits = logits.float()
    if k == 1:
        best, token = logits.max(dim=-1, keepdim=True)
    else:
        best, token = _top(logits, k)
    score = (best - logits.logsumexp(dim=-1, keepdim=True)).clamp(max=0.0)
    return (token if ids is None else ids[token]), score


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` of the last dimension; on a CPU, where that takes long, among the k groups alone that have the greatest maxima: no entry
    of another group is greater than the k-th."""
    entries = logits.shape[-1]
    if logits.device.type != "cpu" or entries % _GROUP or entries < 16 * _GROUP or k > 8:
        return logits.topk(k, dim=-1)
    grouped = logits.unflatten(-1, (entries // _GROUP, _GROUP))
    group = grouped.amax(dim=-1).topk(k, dim=-1).indices  # [S, R, k]
    best, place = grouped.gather(-2, group[..., None].expand(-1, -1, -1, _GROUP)).flatten(-2).topk(k, dim=-1)
    return best, group.gather(-1, place // _GROUP) * _GROUP + place % _GROUP


def _select(tokens: Tensor, parents: Tensor, scores: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `nodes` most probable candidates, in their order. A path is never more probable than its parent, and goes after it in a tie."""
    if nodes == tokens.shape[1]:
        return tokens, parents, scores
    ranked = torch.argsort(scores, dim=1, descending=True, stable=True)
    kept = torch.zeros_like(tokens).scatter_(1, ranked[:, :nodes], 1)
    place = kept.cumsum(1) - 1  # of each kept candidate in the tree
    chosen = ranked[:, :nodes].sort(dim=1).values
    above = parents.gather(1, chosen)
    above = torch.where(above < 0, above, place.gather(1, above.clamp(min=0)))
    return tokens.gather(1, chosen), above, scores.gather(1, chosen)


def trees(drafted: tuple[Tensor, ...]) -> list[DraftTree]:
    """What `draft` returned, as one `DraftTree` for each sequence."""
    tokens, parents, scores = drafted
    probs = scores.exp()
    rows = zip(tokens.tolist(), parents.tolist(), probs.tolist(), strict=True)
    return [DraftTree.unchecked(tuple(t), tuple(p), tuple(q)) for t, p, q in rows]
