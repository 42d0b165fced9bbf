"""What the frozen target says of every text, looked up once: the head's inputs and labels for as many epochs as one likes.

The rows of all texts lie one after another in flat tensors. They stay in memory, or in files that are mapped into it where they are
large. `Lookup.batches` cuts them into padded batches, another cut in each epoch, always the same for the same seed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specfx.drafters.mtp_head import MtpHead
from specfx.train.data import Text

TOP = 32
"""How many of the target's most probable tokens stand for its distribution."""
SOFT = 0.5
"""Share of the target's distribution in the label; the true token has the rest. (The same gradient as CE and KL in that ratio.)"""
_ROWS = 256
"""Rows whose logits are held at once."""


@dataclass(frozen=True)
class Batch:
    """Texts padded on the right to ``[B, T]``, with the target's view of them.

    texts: their numbers. ids ``[B, T]``; hidden ``[B, T, H]``, the LM head's inputs; length ``[B]``; base ``[N, 2]``: every (row, t)
    from which a chain is drafted (the pending token x_{t+1} belongs to the answer, and so does x_{t+2}); labels ``[B, T, TOP + 1]`` and
    weights: the soft label of x_{t+1}, whose last entry is the true token.
    """

    texts: list[int]
    ids: Tensor
    hidden: Tensor
    length: Tensor
    base: Tensor
    labels: Tensor
    weights: Tensor


class Projection:
    """Ridge regression of `eh_proj`, from the head's inputs at t to what the target's last layer got at t + 1.

    So a head starts as the target's last layer on a guess of its input, which is worth many minutes of training.
    """

    def __init__(self, head: MtpHead, embed: torch.nn.Module) -> None:
        self.head, self.embed = head, embed
        size = head.hidden_size
        self.gram = torch.zeros(2 * size, 2 * size, device=head.device)
        self.cross = torch.zeros(2 * size, size, device=head.device)

    @torch.no_grad()
    def add(self, tokens: Tensor, hidden: Tensor, below: Tensor) -> None:
        """tokens ``[N]``: x_{t+1}; hidden ``[N, H]``: h_t; below ``[N, H]``: the last layer's input at t + 1."""
        x = torch.cat([self.head.enorm(self.embed(tokens)), self.head.hnorm(hidden)], dim=-1).float()
        self.gram += x.T @ x
        self.cross += x.T @ below.float()

    @torch.no_grad()
    def fit(self) -> None:
        """Set the head's `eh_proj`."""
        ridge = 1e-4 * self.gram.diagonal().mean() * torch.eye(len(self.gram), device=self.gram.device)
        self.head.eh_proj.weight.copy_(torch.linalg.solve(self.gram + ridge, self.cross).T)


class Lookup:
    """The target's view of `texts`; see the module's docstring. folder: where large tensors are kept as files, and removed by `close`."""

    def __init__(self, texts: Sequence[Text], hidden_size: int, dtype: torch.dtype, folder: Path | None = None) -> None:
        self.texts = texts
        self.starts = [0]
        for text in texts:
            self.starts.append(self.starts[-1] + len(text))
        rows = self.starts[-1]
        self._files: list[Path] = []
        self._folder = folder if rows * (hidden_size * dtype.itemsize + 6 * (TOP + 1)) > _physical_memory() / 4 else None
        self.ids = torch.tensor([token for text in texts for token in text.prompt + text.output])
        self.hidden = self._new("hidden", (rows, hidden_size), dtype)
        self.labels = self._new("labels", (rows, TOP + 1), torch.int32)
        self.weights = self._new("weights", (rows, TOP + 1), torch.bfloat16)

    def _new(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if self._folder is None:
            return torch.zeros(shape, dtype=dtype)
        self._files.append(self._folder / f"lookup.{name}.bin")
        self._files[-1].unlink(missing_ok=True)
        return torch.from_file(str(self._files[-1]), shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)

    def close(self) -> None:
        """Remove the files, if there are any."""
        for file in self._files:
            file.unlink(missing_ok=True)

    @property
    def output_tokens(self) -> int:
        return sum(len(text.output) for text in self.texts)

    @torch.no_grad()
    def fill(self, target: Any, batch_tokens: int, projection: Projection | None = None, progress: Any = None) -> Lookup:
        """One forward of the target over each text. progress: called with the number of tokens done."""
        below: list[Tensor] = []
        decoder, lm_head = target.get_decoder(), target.get_output_embeddings()
        hook = decoder.layers[-1].register_forward_pre_hook(
            lambda _, args, kwargs: below.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        try:
            for group in self._groups(sorted(range(len(self.texts)), key=lambda i: len(self.texts[i])), batch_tokens):
                index, length = self._index(group)
                ids = self.ids[index].to(target.device)
                mask = (torch.arange(ids.shape[1]) < length[:, None]).to(target.device, torch.long)
                below.clear()
                hidden = decoder(ids, attention_mask=mask, use_cache=False).last_hidden_state
                for row, number in enumerate(group):
                    self.hidden[self.starts[number] : self.starts[number + 1]] = hidden[row, : len(self.texts[number])].cpu()
                self._label(group, ids, hidden, lm_head)
                if projection is not None:
                    b, t = self._base(group).to(target.device).unbind(1)
                    projection.add(ids[b, t + 1], hidden[b, t], below[0][b, t + 1])
                if progress is not None:
                    progress(int(length.sum()))
        finally:
            hook.remove()
        return self

    def _label(self, group: list[int], ids: Tensor, hidden: Tensor, lm_head: Any) -> None:
        """Soft labels at the answers' positions, and at the prompt's last one."""
        where = torch.tensor([(b, t) for b, i in enumerate(group) for t in range(len(self.texts[i].prompt) - 1, len(self.texts[i]) - 1)])
        rows = torch.tensor([self.starts[i] for i in group])[where[:, 0]] + where[:, 1]
        size = _ROWS if ids.device.type == "cpu" else 16 * _ROWS
        for part, row in zip(where.to(ids.device).split(size), rows.split(size), strict=True):
            b, t = part.unbind(1)
            values, tokens = lm_head(hidden[b, t]).float().topk(TOP, dim=-1)
            true = torch.full((len(b), 1), 1 - SOFT, device=ids.device)
            self.labels[row] = torch.cat([tokens, ids[b, t + 1, None]], dim=1).int().cpu()
            self.weights[row] = torch.cat([SOFT * values.softmax(-1), true], dim=1).bfloat16().cpu()

    def batches(self, batch_tokens: int, seed: int | None) -> list[list[int]]:
        """Groups of text numbers, each at most `batch_tokens` when padded. With a seed the cut and the order are random."""
        if seed is None:
            return self._groups(sorted(range(len(self.texts)), key=lambda i: len(self.texts[i])), batch_tokens)
        pick = random.Random(seed)
        jitter = [len(text) * pick.uniform(0.9, 1.1) for text in self.texts]
        groups = self._groups(sorted(range(len(self.texts)), key=jitter.__getitem__), batch_tokens)
        pick.shuffle(groups)
        return groups

    def batch(self, group: list[int], device: torch.device | str = "cpu") -> Batch:
        """The texts of `group` as a batch on `device`."""
        index, length = self._index(group)
        parts = (self.ids[index], self.hidden[index], length, self._base(group), self.labels[index], self.weights[index])
        return Batch(group, *(part.to(device, non_blocking=True) for part in parts))

    def _groups(self, order: Sequence[int], batch_tokens: int) -> list[list[int]]:
        groups: list[list[int]] = []
        longest = 0
        for number in order:
            longest = max(longest, len(self.texts[number])) if groups else len(self.texts[number])
            if groups and (len(groups[-1]) + 1) * longest <= batch_tokens:
                groups[-1].append(number)
            else:
                groups.append([number])
                longest = len(self.texts[number])
        return groups

    def _index(self, group: list[int]) -> tuple[Tensor, Tensor]:
        """Rows ``[B, T]`` of the flat tensors (the padding repeats the last), and lengths ``[B]``."""
        length = torch.tensor([len(self.texts[i]) for i in group])
        within = torch.minimum(torch.arange(int(length.max()))[None], length[:, None] - 1)
        return torch.tensor([self.starts[i] for i in group])[:, None] + within, length

    def _base(self, group: list[int]) -> Tensor:
        return torch.tensor([(b, t) for b, i in enumerate(group) for t in range(len(self.texts[i].prompt) - 1, len(self.texts[i]) - 2)])


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
