"""The runtime: sequences come, step together, and go. One `generate` call, a batch and a server are the same code.

A step is the whole of speculative decoding (Leviathan et al., 2023; trees after SpecInfer, Miao et al., 2023):

1. **draft**: the drafter proposes a token tree for each sequence;
2. **verify**: one target forward over all trees, each hanging on its sequence's pending token;
3. **walk**: from the root to the child that holds the target's own choice, for as long as there is one. The last choice, which
   no child holds, is the bonus token: a step commits at least one token, and exactly those that plain decoding would have chosen;
4. **commit**: the engine keeps the walked rows, the drafter learns them, the bonus token is the next pending one.

Where tokens are sampled, the target's choice behind a row is drawn from its own distribution with noise that belongs to the token's
place in its sequence. So every draft method, none included, gives the same text for the same seed, and the distribution is the target's.
The engine draws behind all rows, whether the walk comes there or not; only where the caller's logits processors have to be asked is the
choice made here, at the rows that the walk visits (`specfx.runtime.choice`).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specfx.drafters.base import Drafter
from specfx.engines.base import Engine, Rows, RowsOutput
from specfx.errors import KVPoolError
from specfx.kernels.keyed_sample import Draw
from specfx.runtime.budget import Budget, urgency
from specfx.runtime.choice import Processor, Record, SequenceState, choose, next_tokens, require_drawn
from specfx.runtime.stats import CallStats
from specfx.runtime.tree import EMPTY_TREE, DraftTree, merged

PREFILL_CHUNK = 512
"""Rows of prompts that one forward takes, if nothing else is asked for. Short prompts share it, and with it the reading of the weights."""

PIECE = 256
"""New tokens for which a sequence that grows has room at first, and gets more each time."""

_ids = itertools.count()


@dataclass(frozen=True)
class Committed:
    """What a step gave one sequence: its new tokens, and whether it has ended (then it is already removed)."""

    seq: int
    tokens: list[int]
    finished: bool


@dataclass(frozen=True)
class Arrival:
    """A sequence that is to be added.

    stop: called once with each new token, in order; True ends the sequence there. seen: None stands for the prompt. seq: an id from
    `Runtime.reserve`, else one is reserved. ends: tokens after which `stop` is True, for the drafter. record: where logits and scores are
    put. For the others see `SequenceState`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop: Callable[[int], bool]
    processor: Processor | None = None
    seen: Sequence[int] | None = None
    seq: int | None = None
    device: torch.device | None = None
    ends: Sequence[int] = ()
    draw: Draw | None = None
    pointwise: bool = False
    keep: bool = False
    record: Record | None = None

    def state(self, seq: int) -> SequenceState:
        """The sequence `seq` that it becomes."""
        return SequenceState(
            seq,
            list(self.prompt),
            list(self.prompt if self.seen is None else self.seen),
            self.max_new_tokens,
            self.stop,
            self.processor,
            self.device,
            self.draw,
            self.pointwise,
            self.keep,
            self.record,
        )


@dataclass
class _Walk:
    """State of the walk of one sequence through what was verified. rows, tokens: visited rows, and the target's choice behind each."""

    sequence: SequenceState
    tree: DraftTree
    output: RowsOutput
    rows: list[int] = field(default_factory=lambda: [0])
    tokens: list[int] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self._children = self.tree.children()

    def go(self, token: int, finished: bool) -> bool:
        """The target chose `token` behind the last row, which ends the sequence or not. False where the walk ends."""
        self.tokens.append(token)
        self.finished = finished
        child = None if finished else self._children.get((self.rows[-1], token))
        if child is not None:
            self.rows.append(child)
        return child is not None


@dataclass
class _Prompt:
    """A prompt that is being run. left: tokens yet to come. output: behind the rows of its last forward. hidden: of all its forwards."""

    sequence: SequenceState
    left: int
    output: RowsOutput = field(init=False)
    hidden: list[Tensor] = field(default_factory=list)


class Runtime:
    """Sequences over one engine and one drafter. Not thread-safe: the caller holds the engine.

    make_room: frees memory of the engine that no sequence needs; False if there is none. progress: told of each piece of a prompt,
    in tokens. chunk: rows of prompts that one forward takes. budget: decides how much of a draft is verified; None: all.
    kept: state; sequences that have ended and whose keys and values stay, with their tokens, until somebody takes them or `close`.
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter,
        max_nodes: int,
        stats: CallStats,
        make_room: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda tokens: None,
        chunk: int | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.engine, self.drafter, self.max_nodes, self.stats = engine, drafter, max_nodes, stats
        self.make_room, self.progress, self.chunk = make_room, progress, min(chunk or PREFILL_CHUNK, engine.max_rows)
        self.budget = budget
        self.sequences: dict[int, SequenceState] = {}
        self.kept: dict[int, list[int]] = {}
        self._reserved: dict[int, int | None] = {}  # with their sources
        self._rooms: dict[int, int] = {}  # tokens for which a sequence that grows has room
        self._last: tuple[list[int], RowsOutput, Tensor | None]  # of the prompt that was prefilled last
        self._drafted = True  # whether the last forward was asked for a draft
        self._others: dict[int, DraftTree] | None = None  # what would be verified without the drafter's drafts; None where there are none

    def reserve(self, prompt_length: int, max_new_tokens: int, source: int | None = None, shared: int = 0, grows: bool = False) -> int:
        """An id with room for a sequence that `add` brings later. Raises `KVPoolError` with nothing done.

        grows: there is room for the prompt and `PIECE` new tokens; more comes when it is needed, or a step raises `KVPoolError`.
        source: a sequence of this engine with whose first `shared` tokens the prompt begins; they are not run again. `shared` is less than
        `prompt_length`, or `source` is a sequence of the same prompt, which is added just before this one.
        """
        seq, capacity = next(_ids), prompt_length + min(max_new_tokens, PIECE if grows else max_new_tokens) + self.max_nodes + 1
        shares = () if source is None else (source, shared)
        self._reserved[seq] = source  # before there is room to give back: Ctrl-C may come at any time
        try:
            self._with_room(lambda: self.engine.add(seq, capacity, *shares))
        except KVPoolError:
            del self._reserved[seq]
            raise
        if grows:
            self._rooms[seq] = capacity
        return seq

    def _with_room(self, take: Callable[[], None]) -> None:
        """Do what takes memory; other sequences of the engine go for it, if need be."""
        while True:
            try:
                return take()
            except KVPoolError:
                if not self.make_room():
                    raise

    def _extend(self, seq: int, length: int) -> None:
        """Give `seq` room for `length` tokens. Raises `KVPoolError`."""
        if self._rooms.get(seq, length) < length:
            try:
                self._with_room(lambda: self.engine.extend(seq, length + PIECE))
            except KVPoolError as e:
                raise KVPoolError(f"no room for a text of more than {self._rooms[seq]} tokens: {e}") from e
            self._rooms[seq] = length + PIECE

    def add(self, *arguments: Any, **options: Any) -> Committed:
        """`admit` of one sequence; arguments, options: of its `Arrival`."""
        return self.admit([Arrival(*arguments, **options)])[0]

    def admit(self, arrivals: Sequence[Arrival]) -> list[Committed]:
        """Prefill new sequences, in order, and commit the first token of each.

        Raises `KVPoolError` before anything is done, and leaves nothing of them behind whatever it raises.
        """
        coming: dict[int, Arrival] = {}
        try:
            for arrival in arrivals:
                seq = self.reserve(len(arrival.prompt), arrival.max_new_tokens) if arrival.seq is None else arrival.seq
                coming[seq] = arrival
            return list(self._start(coming))
        except BaseException:
            for seq in [*coming, *(arrival.seq for arrival in arrivals if arrival.seq is not None)]:
                self.remove(seq)
            raise

    def _start(self, coming: dict[int, Arrival]) -> Iterator[Committed]:
        """Prefill. A forward takes as many rows of the prompts, in order, as it may; who begins with tokens of another waits for them."""
        waiting, running = deque(coming), list[_Prompt]()  # of those that are running, only the last can be left half done
        while waiting or running:
            with self.stats.timed("prefill"):
                room = self.chunk - sum(prompt.left for prompt in running)
                while waiting and room > 0 and self._reserved[waiting[0]] not in [prompt.sequence.id for prompt in running]:
                    seq = waiting.popleft()
                    running.append(self._begin(seq, coming[seq]))
                    room -= running[-1].left
                self._prefill(running)
                done, running = [prompt for prompt in running if not prompt.left], [prompt for prompt in running if prompt.left]
            tokens = self._choose([p.sequence for p in done], [p.output for p in done], [-1] * len(done))
            self.stats.prefills += len(done)
            for prompt, token in zip(done, tokens, strict=True):
                sequence, states = prompt.sequence, torch.cat(prompt.hidden) if prompt.hidden else None
                ended = self._append(sequence, token)
                yield self._committed(sequence, [token], states, self._draft_of(sequence, prompt.output), ended)

    def _begin(self, seq: int, arrival: Arrival) -> _Prompt:
        self.drafter.add(seq, arrival.prompt, arrival.ends)
        self.sequences[seq] = sequence = arrival.state(seq)
        known = self.engine.inherit(seq) if self._reserved.pop(seq) is not None else 0
        self.stats.reused_tokens += known
        if known:
            self.progress(known)
        prompt = _Prompt(sequence, len(sequence.tokens) - known)
        if not prompt.left:  # it is that of the sequence that came before
            before, prompt.output, last = self._last
            assert before == sequence.tokens
            if sequence.engine_draw is not None:  # with noise of its own
                prompt.output = replace(prompt.output, choice=next_tokens([sequence], [prompt.output.logits[-1]]))
            prompt.hidden = [] if last is None else [last]
        return prompt

    def _prefill(self, prompts: list[_Prompt]) -> None:
        """One forward of what is left of `prompts`, as far as it takes so many rows."""
        batch, room = dict[int, Rows](), self.chunk
        for prompt in prompts:
            sequence, start = prompt.sequence, len(prompt.sequence.tokens) - prompt.left
            if prompt.left:
                end = start + min(prompt.left, room)
                following = sequence.tokens[end] if end < len(sequence.tokens) else None
                draw = sequence.engine_draw if following is None else None
                batch[sequence.id] = Rows(sequence.id, sequence.tokens[start:end], last_only=True, following=following, draw=draw)
                room -= end - start
        if not batch:
            return
        outputs = dict(zip(batch, self.engine.forward(list(batch.values())), strict=True))
        for prompt in prompts:
            if (rows := batch.get(prompt.sequence.id)) is not None:
                prompt.output = outputs[rows.seq]
                self.engine.commit(rows.seq, range(rows.count))
                prompt.left -= rows.count
                if (part := self._hidden_for(prompt.sequence, prompt.output)) is not None:
                    prompt.hidden.append(part.clone())  # the next forward may overwrite it
                if not prompt.left:
                    output = replace(prompt.output, logits=prompt.output.logits[-1:].clone())
                    self._last = list(prompt.sequence.tokens), output, prompt.hidden[-1][-1:] if prompt.hidden else None
        rows_run = sum(rows.count for rows in batch.values())
        self.stats.prompt_tokens += rows_run
        self.progress(rows_run)

    def _draft_of(self, sequence: SequenceState, output: RowsOutput) -> DraftTree | None:
        """The draft that the engine made: it hangs on the engine's choice."""
        return output.draft if self.drafter.needs_hidden and sequence.processor is None else None

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
        for sequence in active:
            self._extend(sequence.id, len(sequence.tokens) + self.max_nodes)
        trees, wanted = self._drafts(active)
        started = time.perf_counter()
        with self.stats.timed("forward"):
            batch = [Rows(s.id, s.tokens[-1:], tree, draw=s.engine_draw, drafts=wanted) for s, tree in zip(active, trees, strict=True)]
            outputs = self.engine.forward(batch)
        self.stats.forwards += 1
        if self.budget is not None:
            self.budget.note_forward(len(trees) + sum(map(len, trees)), time.perf_counter() - started, wanted)
        with self.stats.timed("accept"):
            walks = [_Walk(*walk) for walk in zip(active, trees, outputs, strict=True)]
            going = walks
            while going:  # a row of each at a time
                tokens = self._choose([w.sequence for w in going], [w.output for w in going], [w.rows[-1] for w in going])
                going = [w for w, token in zip(going, tokens, strict=True) if w.go(token, self._append(w.sequence, token))]
        return [self._accept(walk) for walk in walks]

    def _drafts(self, active: list[SequenceState]) -> tuple[list[DraftTree], bool]:
        """What is to be verified of each sequence's draft, and whether this step's forward makes the next one."""
        within = self.engine.drafts and self.drafter.needs_hidden and any(s.processor is None for s in active)
        wanted = self.budget is None or self.budget.wants(within, len(active))
        if self.drafter.on_trial and any(s.draw is None for s in active):  # what is drawn at random tells little of a drafter
            wanted = True
        drafted = self._drafted if within else wanted
        chains = self.engine.verifies != "trees" or (within and not wanted)  # behind branches the engine would draft (`Rows.drafts`)
        ids, most = [s.id for s in active], [min(self.max_nodes, s.remaining - 1) for s in active]
        trees = others = [EMPTY_TREE] * len(active)
        with self.stats.timed("draft"):
            if self.drafter.beside is not None:
                trees = others = [tree.best_chain() if chains else tree for tree in self.drafter.beside.propose(ids, most)]
            if drafted:
                started = time.perf_counter()
                trees = [merged(*drafts) for drafts in zip(self.drafter.propose(ids, most), others, most, strict=True)]
                if chains:
                    trees = [tree.best_chain() for tree in trees]
                if self.budget is not None:
                    self.budget.note_drafting(time.perf_counter() - started)
            if self.budget is not None and (drafted or self.drafter.beside is not None):
                counts = urgency([s.remaining for s in active], [s.pace for s in active])
                trees = self.budget.share(trees, counts, others if drafted else None)
        self._drafted, self._others = within and wanted, dict(zip(ids, others, strict=True)) if drafted else None
        return trees, self._drafted

    def _choose(self, sequences: list[SequenceState], outputs: list[RowsOutput], rows: list[int]) -> list[int]:
        """The target's choice behind one row of each sequence."""
        tokens = [output.choice[row] for output, row in zip(outputs, rows, strict=True)]
        places = [i for i, sequence in enumerate(sequences) if sequence.record is not None or sequence.processor is not None]
        if places:
            chosen = choose([sequences[i] for i in places], [outputs[i].logits[rows[i]] for i in places])
            for i, token in zip(places, chosen, strict=True):
                tokens[i] = token
        require_drawn(tokens)
        return tokens

    def _accept(self, walk: _Walk) -> Committed:
        sequence, tree, output = walk.sequence, walk.tree, walk.output
        with self.stats.timed("accept"):
            self.engine.commit(sequence.id, walk.rows)
            self.stats.steps += 1
            sequence.pace += (len(walk.tokens) - sequence.pace) / 16
            if len(tree):
                self.stats.count_draft(max(tree.depths()), len(walk.rows) - 1, len(tree))
                if self.budget is not None:
                    without = None if self._others is None else self._others[sequence.id].foretold(walk.tokens[:-1])
                    self.budget.note_draft(tree, len(walk.rows) - 1, without)
            hidden = self._hidden_for(sequence, output)
            hidden = hidden[walk.rows] if hidden is not None else None
        return self._committed(sequence, walk.tokens, hidden, self._draft_of(sequence, output), walk.finished)

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
        if not finished:
            with self.stats.timed("draft"):
                self.drafter.accept(sequence.id, tokens, hidden, draft)
        elif sequence.keep:
            del self.sequences[sequence.id]
            self.kept[sequence.id] = sequence.tokens
            self.drafter.remove(sequence.id, tokens)
        else:
            self.remove(sequence.id, tokens)
        return Committed(sequence.id, tokens, finished)

    def logits_on(self, seq: int, tokens: Sequence[int]) -> Tensor:
        """The target's logits ``[n + 1, V]`` behind a kept sequence and behind each of `tokens` after it."""
        kept, logits = self.kept[seq][:-1], []
        rows = [self.kept[seq][-1], *tokens]
        for start in range(0, len(rows), self.chunk):
            chunk = rows[start : start + self.chunk]
            self._extend(seq, self.engine.length(seq) + len(chunk))
            logits.append(self.engine.forward([Rows(seq, chunk)])[0].logits.clone())
            self.engine.commit(seq, range(len(chunk)))
        self.kept[seq] = kept + rows
        return torch.cat(logits)

    def remove(self, seq: int, last: Sequence[int] = ()) -> None:
        """Free everything of `seq`, which ended with the tokens `last`; unknown ids are ignored."""
        self.engine.remove(seq)
        self.drafter.remove(seq, last)
        self.sequences.pop(seq, None)
        self.kept.pop(seq, None)
        self._reserved.pop(seq, None)
        self._rooms.pop(seq, None)

    def close(self) -> None:
        """Remove all sequences: what an interrupted call does."""
        try:
            self._remove_all()
        except BaseException:  # Ctrl-C once more
            self._remove_all()
            raise

    def _remove_all(self) -> None:
        for seq in {*self.sequences, *self._reserved, *self.kept}:
            self.remove(seq)
