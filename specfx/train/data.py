"""What a head is trained on: prompts and the target's own greedy answers, in a file that grows as the target writes.

A data file is JSON Lines, one text a line::

    {"prompt": [ids], "output": [ids], "category": "..."}

`write_answers` adds to it what is missing, `read_texts` reads it, `split` sets texts aside for the evaluation. A head learns to draft
what its target writes, so the texts are the target's, not anybody's: self-distillation, as in FastMTP (2025).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specfx.bench.prompts import UNCATEGORISED, Prompt, chat_of, read_records
from specfx.errors import KVPoolError, OptionError, UnsupportedModelError

LIVE = 24
"""Sequences that are answered together: enough rows for one reading of the weights to serve many, and few enough for their KV."""
SHARED_RUN = 50
"""Characters that an excluded prompt and a text must have in common."""
HELD_OUT = 20
"""One prompt in so many is never trained on."""


@dataclass(frozen=True)
class Text:
    """A prompt and the answer to it, as token ids."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]
    category: str = UNCATEGORISED

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)


def read_texts(path: str | Path) -> list[Text]:
    """All texts of a data file, each prompt once (its first answer). A last line that was cut off in writing is left out.

    Raises `OptionError`, which names the line, for a file that can't be read or holds anything else, and for one without a text.
    """
    texts = list(_texts(path))
    if not texts:
        raise OptionError(f"data={str(path)!r}: the file holds no text; give --prompts as well, and the model writes some")
    return texts


def split(texts: Iterable[Text], one_in: int = HELD_OUT) -> tuple[list[Text], list[Text]]:
    """(to train on, held out). A hash of the prompt decides, so a file that grows never moves a text from one side to the other."""
    train: list[Text] = []
    held_out: list[Text] = []
    for text in texts:
        (held_out if _hash(text.prompt) % one_in == 0 else train).append(text)
    return train, held_out


def usable(texts: Iterable[Text], longest: int, vocabulary: int) -> list[Text]:
    """The texts from which anything can be drafted (two or more output tokens), cut to `longest` tokens.

    Raises `OptionError` if a token is not one of the `vocabulary` first ids: then another model wrote the text.
    """
    kept = []
    for text in texts:
        top, bottom = max(text.prompt + text.output, default=0), min(text.prompt + text.output, default=0)
        if top >= vocabulary or bottom < 0:
            token = top if top >= vocabulary else bottom
            raise OptionError(f"data: token {token} is not in the model's vocabulary of {vocabulary}: it was written by another model")
        output = text.output[: max(longest - len(text.prompt), 0)]
        if text.prompt and len(output) >= 2:
            kept.append(Text(text.prompt, output, text.category))
    return kept


def runs_of(path: str | Path) -> frozenset[str]:
    """All runs of `SHARED_RUN` characters in the prompts (every turn, every message) of a JSON Lines file, to be kept out of training.

    Only letters and digits count, in lower case, so that another template or layout hides nothing. Raises `OptionError`.
    """
    runs: set[str] = set()
    for _, where, record in read_records("exclude", path):
        turns, chat = record.get("turns"), chat_of(record) or []
        texts = [*(turns if isinstance(turns, list) else []), *(message["content"] for message in chat)]
        texts += [text for key in ("prompt", "question", "text") if isinstance(text := record.get(key), str)]
        if not texts:
            raise OptionError(f"{where}: no 'prompt', 'text', 'messages', 'turns' or 'question' among {', '.join(sorted(record))}")
        runs.update(run for text in texts for run in _runs(str(text)))
    return frozenset(runs)


def shares_a_run(text: str, runs: frozenset[str]) -> bool:
    """Whether `text` has one of `runs`: the same question, then, or a part of it."""
    return not runs.isdisjoint(_runs(text))


def _runs(text: str) -> Iterator[str]:
    plain = re.sub(r"\W+", " ", text.lower()).strip()
    return (plain[i : i + SHARED_RUN] for i in range(max(1, len(plain) - SHARED_RUN + 1)))


def write_answers(model: Any, prompts: Sequence[Prompt], path: str | Path, max_new_tokens: int, live: int = LIVE) -> int:
    """Append the model's greedy answers to those of `prompts` that `path` has no answer for; returns the number of new tokens.

    Sequences come and go over specfx's fastest engine, `live` at a time, and each answer is written when it is finished: whatever
    ends this, a second call goes on where it ended. Raises `OptionError` if `path` can't be written.
    """
    import torch
    from tqdm import tqdm

    import specfx
    from specfx.api import engine_of
    from specfx.drafters.base import NoDrafter
    from specfx.runtime.session import Runtime
    from specfx.runtime.stats import CallStats

    file = Path(path)
    done = {text.prompt for text in _texts(file)} if file.exists() else set()
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    waiting = {p.tokens: p for p in reversed(prompts) if p.tokens not in done and len(p.tokens) + 2 <= context}
    if not waiting:
        return 0
    ends = end_tokens(model)
    with specfx.speculating(model, None, compile="sync"):
        engine = engine_of(model)
        if engine.verifies == "nothing":
            raise UnsupportedModelError(f"{type(model).__name__} can't be run by specfx: write the answers some other way, and give --data")
        runtime = Runtime(engine, NoDrafter(), 1, CallStats())
        active: dict[int, tuple[Prompt, list[int]]] = {}
        written = 0
        try:
            with _appending(file) as out, torch.no_grad(), tqdm(total=len(waiting), desc="answers", unit="text") as bar:
                queue = [waiting[tokens] for tokens in waiting]  # reversed: the first prompt is popped first
                while queue or active:
                    while queue and len(active) < live:
                        prompt = queue[-1]
                        room = min(max_new_tokens, context - len(prompt.tokens))
                        try:
                            first = runtime.add(prompt.tokens, room, ends.__contains__)
                        except KVPoolError:
                            if not active:
                                raise
                            break  # when one has ended there is room again
                        queue.pop()
                        active[first.seq] = (prompt, [])
                        written += _take(first, active, out, bar)
                    for committed in runtime.step():
                        written += _take(committed, active, out, bar)
                    seconds = bar.format_dict["elapsed"]
                    bar.set_postfix_str(f"{written} tokens, {written / max(seconds, 1e-9):.0f} tokens/s", refresh=False)
        finally:
            runtime.close()
    return written


def end_tokens(model: Any) -> set[int]:
    """The tokens after which the model's `generate` stops."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return set() if ends is None else {int(ends)} if isinstance(ends, int) else {int(end) for end in ends}


def _take(committed: Any, active: dict[int, tuple[Prompt, list[int]]], out: Any, bar: Any) -> int:
    """Note what a step committed of a sequence, and write it down if it has ended; the number of tokens."""
    prompt, tokens = active[committed.seq]
    tokens += committed.tokens
    if committed.finished:
        del active[committed.seq]
        out.write(json.dumps({"prompt": list(prompt.tokens), "output": tokens, "category": prompt.category}) + "\n")
        out.flush()
        bar.update()
    return len(committed.tokens)


def _appending(file: Path) -> Any:
    """The file, opened behind its last whole line. Raises `OptionError`."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+b")
        handle.seek(0)
        whole = handle.read().rfind(b"\n") + 1
        handle.truncate(whole)
        handle.close()
        return file.open("a", encoding="utf-8")
    except OSError as e:
        raise OptionError(f"data={str(file)!r}: can't be written ({e.strerror or e}); give a file in a folder of yours") from e


def _texts(path: str | Path) -> Iterator[Text]:
    seen: set[tuple[int, ...]] = set()
    for _, where, record in _whole_records(path):
        prompt, output = (_ids(record.get(key), key, where) for key in ("prompt", "output"))
        if prompt not in seen:
            seen.add(prompt)
            yield Text(prompt, output, str(record.get("category", UNCATEGORISED)))


def _whole_records(path: str | Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """`read_records`, but a broken last line without its line end is no error: the writer was interrupted, or is still at it."""
    read = 0
    try:
        for record in read_records("data", path):
            read = record[0]
            yield record
    except OptionError:
        if not _only_cut_off(path, read):
            raise


def _only_cut_off(path: str | Path, read: int) -> bool:
    """Whether all that the file holds after its first `read` lines is a last line that has no end."""
    try:
        rest = Path(path).read_text(encoding="utf-8").split("\n")[read:]
    except (OSError, UnicodeDecodeError):
        return False
    return len(rest) >= 1 and not any(line.strip() for line in rest[:-1]) and not rest[-1].rstrip().endswith("}")


def _ids(value: object, key: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise OptionError(f"{where}: {key!r} must be a list of token ids, got {str(value)[:40]!r}; --prompts takes prompts as text")
    return tuple(value)


def _hash(tokens: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, tokens)).encode(), digest_size=8).digest(), "big")
