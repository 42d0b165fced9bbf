"""How a next-n head drafts a tree, in tensors alone: the same lines are the eager reference and what is traced into the graph.

The tree grows level by level (EAGLE-2, Li et al., 2024, as in SGLang). The `topk` best tokens behind the last committed one are the
first frontier. At each further step every token of the frontier proposes its `topk` best, and the `topk` most probable paths of all
are the next frontier. Of all that were proposed, the ``num_draft_tokens - 1`` most probable paths are the tree. ``topk=1`` is a chain.

A step runs the head over the rows of *all* frontiers so far, the last one's `topk` being new: nothing of a draft then has to stand
in the head's KV from one step to the next, and with few rows the time is that of reading the weights once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specfx.runtime.tree import DraftTree, TreeShape

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(tokens [S, R], hidden [S, R, H], tree_mask int64 [S, R]) -> [S, R, H]``: the head over R rows behind each sequence's committed
pairs. Bit j of a row's mask: it sees row j (itself and its ancestors)."""


def draft(hidden: Tensor, step: Step, logits: Callable[[Tensor], Tensor], ids: Tensor | None, shape: TreeShape) -> tuple[Tensor, ...]:
    """Trees of `shape` behind S sequences.

    hidden ``[S, 1, H]``: the head's hidden state at each sequence's last committed pair. logits: ``[S, R, H] -> [S, R, V]``; ids ``[V]``
    the tokens that they are of, None for ``0 .. V - 1``. Returns tokens and parents (-1: the pending token), int64 ``[S, nodes]``, in an
    order where parents come first, and the logarithms of the path probabilities, float32 ``[S, nodes]``.
    """
    k, sequences = shape.topk, hidden.shape[0]
    token, score = _best(logits(hidden), ids, k)  # [S, 1, k]
    tokens, scores, parents = [token[:, 0]], [score[:, 0]], [torch.full_like(token[:, 0], -1)]
    frontier = torch.arange(k, device=hidden.device).expand(sequences, k)  # numbers of the frontier's candidates
    rows_tokens, rows_hidden = tokens[0], hidden.expand(-1, k, -1)
    rows_mask = torch.bitwise_left_shift(torch.ones_like(frontier), frontier)
    for d in range(1, shape.num_steps):
        out = step(rows_tokens, rows_hidden, rows_mask)[:, -k:]
        token, score = _best(logits(out), ids, k)  # [S, k, k]
        score = score + scores[-1].gather(1, frontier - (0 if d == 1 else k + (d - 2) * k * k))[..., None]
        tokens.append(token.flatten(1))
        scores.append(score.flatten(1))
        parents.append(frontier[..., None].expand(-1, -1, k).flatten(1))
        if d == shape.num_steps - 1:
            break
        chosen = scores[-1].topk(k, dim=1).indices if k > 1 else torch.zeros_like(frontier)
        above = chosen // k  # places in the frontier before
        frontier = chosen + (k + (d - 1) * k * k)
        own = torch.arange(d * k, (d + 1) * k, device=hidden.device)
        mask = rows_mask[:, -k:].gather(1, above) | torch.bitwise_left_shift(torch.ones_like(own), own)
        rows_tokens = torch.cat([rows_tokens, tokens[-1].gather(1, chosen)], 1)
        rows_hidden = torch.cat([rows_hidden, out.gather(1, above[..., None].expand(-1, -1, out.shape[2]))], 1)
        rows_mask = torch.cat([rows_mask, mask], 1)
    return _select(torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(scores, 1), shape.nodes)


def _best(logits: Tensor, ids: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k best tokens of each row and the logarithms of their probabilities, ``[S, R, k]``."""
    logits = logits.float()
    if k == 1:
        best, token = logits.max(dim=-1, keepdim=True)
    else:
        best, token = logits.topk(k, dim=-1)
    score = (best - logits.logsumexp(dim=-1, keepdim=True)).clamp(max=0.0)
    return (token if ids is None else ids[token]), score


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
