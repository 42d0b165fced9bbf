"""The training loop: AdamW with a warm-up and a cosine, over float32 weights, with bfloat16 arithmetic where the target has it.

Batches, their order and the drawn negatives are functions of the seed and the number of the step, so the weights, the optimizer and
that number are all that a checkpoint holds: a run that is taken up again ends with the weights of one that was never interrupted
(where `--minutes` sets the length, with those of a run that took the same time).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from specfx.drafters.mtp_head import MtpHead
from specfx.errors import OptionError
from specfx.train.lookup import Lookup
from specfx.train.loss import Vocabulary, chain_loss

CHECKPOINT = "checkpoint.pt"
_LONGEST_WARM_UP = 0.05
"""Share of a run: a short one warms up in fewer steps than its recipe says."""


@dataclass(frozen=True)
class Recipe:
    """All that decides about the outcome, apart from model and data.

    steps: K. decay: the loss of step k weighs ``decay ** (k - 1)``. epochs: used if `minutes` is None. negatives: tokens of the
    vocabulary drawn for a batch's loss besides its own; None: the whole vocabulary.
    """

    steps: int = 3
    decay: float = 0.6
    epochs: float = 4.0
    minutes: float | None = None
    lr: float = 5e-4
    batch_tokens: int = 3072
    warm_up: int = 30
    last_lr: float = 0.02
    """The cosine ends at this share of `lr`."""
    weight_decay: float = 0.01
    clip: float = 1.0
    negatives: int | None = 8192
    seed: int = 0


class Trainer:
    """State of a training run. `head` is made float32 and trainable; `finish` gives it back in the target's dtype."""

    def __init__(self, head: MtpHead, target: Any, lookup: Lookup, recipe: Recipe) -> None:
        self.head, self.lookup, self.recipe = head.float().requires_grad_(True).train(), lookup, recipe
        self.dtype = next(target.parameters()).dtype
        self.mixed = self.dtype != torch.float32
        self.vocabulary = Vocabulary(target.get_output_embeddings(), torch.bfloat16 if self.mixed else torch.float32, recipe.negatives)
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
        self.step = 0
        self.seconds = 0.0
        self.curves: list[dict[str, Any]] = []
        """One entry a step: step, seconds, tokens, lr, loss by step, and
        accepted: shares of positions whose drafts 1 .. k are all right (over the sampled vocabulary)."""
        self._epoch = -1
        self._groups: list[list[int]] = []
        self.per_epoch = len(lookup.batches(recipe.batch_tokens, self._seed(0)))

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None where time decides."""
        return None if self.recipe.minutes is not None else max(1, round(self.recipe.epochs * self.per_epoch))

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        total = self.total
        return self.step / total if total is not None else self.seconds / (60 * (self.recipe.minutes or 1))

    def run(self) -> Iterator[dict[str, Any]]:
        """Train to the end; yields each step's entry of `curves`."""
        while self.progress < 1:
            began = time.perf_counter()
            entry = self._step()
            self.seconds += time.perf_counter() - began
            entry["seconds"] = round(self.seconds, 2)
            self.curves.append(entry)
            yield entry

    def finish(self) -> MtpHead:
        return self.head.to(self.dtype).requires_grad_(False).eval()

    def _step(self) -> dict[str, Any]:
        recipe = self.recipe
        batch = self.lookup.batch(self._group(), self.head.device)
        cosine = 0.5 * (1 + math.cos(math.pi * min(self.progress, 1.0)))
        warm = min(1.0, max((self.step + 1) / recipe.warm_up, self.progress / _LONGEST_WARM_UP))
        lr = recipe.lr * warm * (recipe.last_lr + (1 - recipe.last_lr) * cosine)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        with torch.autocast(self.head.device.type, torch.bfloat16, enabled=self.mixed):
            loss, losses, accepted = chain_loss(self.head, batch, self.vocabulary, recipe.steps, recipe.decay, self._seed(self.step))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), recipe.clip)
        self.optimizer.step()
        self.step += 1
        figures = {"loss": losses.tolist(), "accepted": accepted.tolist()}
        return {"step": self.step, "tokens": len(batch.base), "lr": lr, **figures}

    def _group(self) -> list[int]:
        """The texts of the next step. Epochs differ a little in their number of batches; each step's place is counted in the first's."""
        epoch, place = divmod(self.step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._groups = epoch, self.lookup.batches(self.recipe.batch_tokens, self._seed(epoch))
        return self._groups[place % len(self._groups)]

    def _seed(self, number: int) -> int:
        return (self.recipe.seed << 32) + number

    # --- checkpoints ---

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Replace the checkpoint in `folder` at once: nobody ever sees half of one. about: what `read_checkpoint` compares."""
        partial = folder / (CHECKPOINT + ".partial")
        state = {"about": {**about, **asdict(self.recipe)}, "step": self.step, "seconds": self.seconds, "curves": self.curves}
        torch.save({**state, "head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}, partial)
        os.replace(partial, folder / CHECKPOINT)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `read_checkpoint` returned."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curves = state["step"], state["seconds"], state["curves"]


def read_checkpoint(folder: Path, recipe: Recipe, about: dict[str, Any]) -> dict[str, Any] | None:
    """What `Trainer.save` wrote in `folder`; None if there is nothing. Raises `OptionError` if it is broken, or of another run."""
    file = folder / CHECKPOINT
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        there = state["about"]
    except Exception as e:  # pickle, zip and torch each have their own
        raise OptionError(f"resume: {file} can't be read ({type(e).__name__}): delete it to begin anew") from e
    here = {**about, **asdict(recipe)}
    differing = [f"{key} was {there.get(key)!r}, is {here[key]!r}" for key in here if here[key] != there.get(key)]
    if differing:
        raise OptionError(f"resume: {file} is of another run: {'; '.join(differing)}. Give its options and data, or another --out")
    return state


def train(trainer: Trainer, folder: Path, about: dict[str, Any], checkpoint_seconds: float) -> None:
    """Run to the end with a progress bar, a checkpoint every so often and one at the end.

    The bar shows running means: loss by step, and acceptance at each depth given that the drafts before were right, as the evaluation
    does (but over the sampled vocabulary and on what is trained on).
    """
    from tqdm import tqdm

    total = trainer.total
    saved = trainer.seconds
    began, tokens = trainer.seconds, 0
    smooth: dict[str, list[float]] = {}
    with tqdm(total=total, initial=trainer.step, desc="training", unit="step", file=sys.stderr, mininterval=2.0) as bar:
        for entry in trainer.run():
            tokens += entry["tokens"]
            for key in ("loss", "accepted"):
                old = smooth.setdefault(key, entry[key])
                smooth[key] = [0.95 * a + 0.05 * b for a, b in zip(old, entry[key], strict=False)] or entry[key]
            rate = tokens / max(trainer.seconds - began, 1e-9)
            by_depth = [now / max(before, 1e-9) for before, now in zip([1.0, *smooth["accepted"]], smooth["accepted"], strict=False)]
            losses, accepted = (" ".join(f"{x:.3f}" for x in values) for values in (smooth["loss"], by_depth))
            left = "" if total is not None else f", {100 * min(trainer.progress, 1):.0f} %"
            bar.set_postfix_str(f"loss {losses}, accepted {accepted}, {rate:.0f} tokens/s{left}", refresh=False)
            bar.update()
            if trainer.seconds - saved >= checkpoint_seconds:
                saved = trainer.seconds
                trainer.save(folder, about)
    trainer.save(folder, about)
