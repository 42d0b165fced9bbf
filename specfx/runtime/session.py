"""The runtime: sequences come, step together, and go. One `generate` call, a batch and a server are the same code.

A step is the whole of speculative decoding (Leviathan et al., 2023; trees after SpecInfer, Miao et al., 2023):

1. **draft**: the drafter proposes a token tree for each sequence;
2. **verify**: one target forward over all trees, each hanging on its sequence's pending token;
3. **walk**: from the root to the child that holds the target's own choice, for as long as there is one. The last choice, which
   no child holds, is the bonus token: a step commits at least one token, and exactly those that plain decoding would have chosen;
4. **commit**: the engine keeps the walked rows, the drafter learns them, the bonus token is the next pending one.

Where tokens are sampled, the target's choice behind a row is drawn from its own distribution with noise that belongs to the token's
place in its sequence. So every draft method, none included, gives the same text for the same seed, and the distribution is the target's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specfx.drafters.base import Drafter
from specfx.engines.base import Engine, Rows, RowsOutput
from specfx.kernels.keyed_sample import keyed_sample
from specfx.runtime.stats import CallStats
from specfx.runtime.tree import DraftTree

PREFILL_CHUNK = 512
"""Rows of a prompt that one forward takes."""

Processor = Callable[[Tensor, Tensor], Tensor]
"""A logits processor: ``(input_ids [1, L], scores [1, V] float32) -> scores``."""

_ids = itertools.count()


@dataclass
class SequenceState:
    """State of one sequence. tokens: prompt and all committed tokens; the last one is pending (its forward has not happened).
    seen: what logits processors are shown (the caller's row, padding included, and all committed tokens), on the caller's `device`.
    key: (seed, number of the sequence in its call) of the noise that its tokens are drawn with, None for greedy decoding."""

    id: int
    tokens: list[int]
    seen: list[int]
    remaining: int
    stop: Callable[[int], bool]
    processor: Processor | None
    device: torch.device | None
    key: tuple[int, int] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its next token is the argmax of the logits as they are."""
        return self.processor is None and self.key is None


@dataclass(frozen=True)
class Committed:
    """What a step gave one sequence: its new tokens, and whether it has ended (then it is already removed)."""

    seq: int
    tokens: list[int]
    finished: bool


class _Choices:
    """The target's choice after each row of a walk, made when asked for: by then the tokens up to the row are committed, so a processor
    sees exactly the prefixes that plain decoding would show it, and none behind the end."""

    def __init__(self, sequence: SequenceState, output: RowsOutput) -> None:
        self.sequence, self.output = sequence, output
        self.made: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.output.argmax)

    def __getitem__(self, row: int) -> int:
        if row not in self.made:
            self.made[row] = choose(self.sequence, self.output.logits[row])
        return self.made[row]


def choose(sequence: SequenceState, logits: Tensor) -> int:
    """The token after the sequence's tokens: of the processed logits the best one, or one drawn with the noise of its place.

    logits: ``[V]``. The drawn token depends on nothing but the prefix, the logits and the key (`specfx.kernels.keyed_sample`).
    """
    scores = logits[None].to(sequence.device, torch.float32)
    if sequence.processor is not None:
        scores = sequence.processor(torch.tensor([sequence.seen], device=sequence.device), scores)
    if sequence.key is None:
        return int(scores.argmax(-1))
    return int(keyed_sample(scores.float(), torch.tensor([[*sequence.key, len(sequence.tokens)]], device=scores.device)))


class Runtime:
    """Sequences over one engine and one drafter. Not thread-safe: the caller holds the engine."""

    def __init__(self, engine: Engine, drafter: Drafter, max_nodes: int, stats: CallStats) -> None:
        self.engine, self.drafter, self.max_nodes, self.stats = engine, drafter, max_nodes, stats
        self.sequences: dict[int, SequenceState] = {}
        self._reserved: set[int] = set()

    def reserve(self, prompt_length: int, max_new_tokens: int) -> int:
        """An id with room for a sequence that `add` brings later. Raises `KVPoolError` with nothing done."""
        seq = next(_ids)
        self.engine.add(seq, prompt_length + max_new_tokens + self.max_nodes + 1)
        self._reserved.add(seq)
        return seq

    def add(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        stop: Callable[[int], bool],
        processor: Processor | None = None,
        seen: Sequence[int] | None = None,
        seq: int | None = None,
        device: torch.device | None = None,
        ends: Sequence[int] = (),
        key: tuple[int, int] | None = None,
    ) -> Committed:
        """Prefill a new sequence and commit its first token.

        stop: called once with each new token, in order; True ends the sequence there. seq: an id from `reserve`, else one is
        reserved now. device: where the processor is shown the tokens. ends: tokens after which `stop` is True, for the drafter. key: see
        `SequenceState`.
        Raises `KVPoolError` before anything is done, and leaves nothing behind whatever it raises.
        """
        seq = self.reserve(len(prompt), max_new_tokens) if seq is None else seq
        sequence = SequenceState(seq, list(prompt), list(prompt if seen is None else seen), max_new_tokens, stop, processor, device, key)
        try:
            self.drafter.add(seq, prompt, ends)
            self.sequences[seq] = sequence
            with self.stats.timed("prefill"):
                output, hidden = self._prefill(sequence, prompt)
            token = output.argmax[-1] if sequence.is_plain else choose(sequence, output.logits[-1])
            self.stats.prefills += 1
            self.stats.prompt_tokens += len(prompt)
            return self._committed(sequence, [token], hidden, self._draft_of(sequence, output), self._append(sequence, token))
        except BaseException:
            self.remove(seq)
            raise

    def _prefill(self, sequence: SequenceState, prompt: Sequence[int]) -> tuple[RowsOutput, Tensor | None]:
        hidden: list[Tensor] = []
        size = min(PREFILL_CHUNK, self.engine.max_rows)
        for start in range(0, len(prompt), size):
            chunk, end = prompt[start : start + size], start + size
            following = prompt[end] if end < len(prompt) else None
            output = self.engine.forward([Rows(sequence.id, chunk, last_only=True, following=following)])[0]
            self.engine.commit(sequence.id, range(len(chunk)))
            if (part := self._hidden_for(sequence, output)) is not None:
                hidden.append(part.clone())  # the next forward may overwrite it
        return output, torch.cat(hidden) if hidden else None

    def _draft_of(self, sequence: SequenceState, output: RowsOutput) -> DraftTree | None:
        """The draft that the engine made: it hangs on the greedy choice."""
        return output.draft if self.drafter.needs_hidden and sequence.is_plain else None

    def _hidden_for(self, sequence: SequenceState, output: RowsOutput) -> Tensor | None:
        """The hidden states, for a drafter that needs them and that the engine has not drafted for."""
        return output.hidden if self.drafter.needs_hidden and self._draft_of(sequence, output) is None else None

    def step(self) -> list[Committed]:
        """One step of every sequence; see the module's docstring. Whatever it raises, all sequences are removed: none is half done."""
        try:
            return self._step(list(self.sequences.values()))
        except BaseException:
            self.close()
            raise

    def _step(self, active: list[SequenceState]) -> list[Committed]:
        if not active:
            return []
        with self.stats.timed("draft"):
            budgets = [min(self.max_nodes, s.remaining - 1) for s in active]
            trees = self.drafter.propose([s.id for s in active], budgets)
            if self.engine.verifies != "trees":
                trees = [tree.best_chain() for tree in trees]
        with self.stats.timed("forward"):
            outputs = self.engine.forward([Rows(s.id, s.tokens[-1:], tree) for s, tree in zip(active, trees, strict=True)])
        self.stats.forwards += 1
        committed = []
        for sequence, tree, output in zip(active, trees, outputs, strict=True):
            with self.stats.timed("accept"):
                choices: Sequence[int] = output.argmax if sequence.is_plain else _Choices(sequence, output)  # type: ignore[assignment]
                rows: list[int] = []
                tokens: list[int] = []
                finished = False
                for row in tree.visit(choices):
                    rows.append(row)
                    tokens.append(choices[row])
                    if finished := self._append(sequence, tokens[-1]):
                        break
                self.engine.commit(sequence.id, rows)
                self.stats.steps += 1
                if len(tree):
                    self.stats.count_draft(max(tree.depths()), len(rows) - 1, len(tree))
                hidden = self._hidden_for(sequence, output)
                hidden = hidden[rows] if hidden is not None else None
            committed.append(self._committed(sequence, tokens, hidden, self._draft_of(sequence, output), finished))
        return committed

    def _append(self, sequence: SequenceState, token: int) -> bool:
        """Commit one token; whether it ends the sequence."""
        sequence.tokens.append(token)
        sequence.seen.append(token)
        sequence.remaining -= 1
        return sequence.stop(token) or sequence.remaining <= 0

    def _committed(
        self, sequence: SequenceState, tokens: list[int], hidden: Tensor | None, draft: DraftTree | None, finished: bool
    ) -> Committed:
        """Tell the drafter, or free the sequence that has ended."""
        self.stats.tokens += len(tokens)
        if finished:
            self.remove(sequence.id, tokens)
        else:
            with self.stats.timed("draft"):
                self.drafter.accept(sequence.id, tokens, hidden, draft)
        return Committed(sequence.id, tokens, finished)

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        """Free everything of `seq`, which ended with the tokens `last`; unknown ids are ignored."""
        self.sequences.pop(seq, None)
        self._reserved.discard(seq)
        self.engine.remove(seq)
        self.drafter.remove(seq, last)

    def close(self) -> None:
        """Remove all sequences: what an interrupted call does."""
        for seq in [*self.sequences, *self._reserved]:
            self.remove(seq)
