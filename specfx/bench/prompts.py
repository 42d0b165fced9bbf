"""Prompts of a JSON Lines file as token ids: plain text, chats, questions and Spec-Bench turns.

A line is one of::

    {"messages": [{"role": ..., "content": ...}, ...]}   a chat; trailing assistant messages are what the model is to write
    {"turns": ["...", ...], "category": "..."}           Spec-Bench; its first turn
    {"prompt": "..."}  or  {"question": "..."}           one user message
    {"text": "..."}                                      continued as it stands, never put into a chat template

Messages go through the tokenizer's chat template; where there is none they are joined as plain text. A `category` is kept.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specfx.errors import OptionError

UNCATEGORISED = "all"


@dataclass(frozen=True)
class Prompt:
    """One prompt. tokens: ``[P]`` ids, the chat template included. number: its line in the file, from 1."""

    number: int
    category: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A line before tokenisation: either `messages` or `text` is set."""

    number: int
    category: str
    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None


def read_records(option: str, path: str | Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with its line's number, from 1, and the name of that place for error messages.

    option: what the file was given as. Raises `OptionError` for a missing file or a broken line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise OptionError(f"{option}={str(path)!r}: {getattr(e, 'strerror', None) or e}; give a JSON Lines file") from e
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise OptionError(f"{where}: not JSON ({e}); each line must be one JSON object") from e
        if not isinstance(record, dict):
            raise OptionError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield number, where, record


def chat_of(record: dict[str, Any]) -> list[dict[str, str]] | None:
    """The `messages` of a record, with role and content only; None if it has no usable ones."""
    messages = record.get("messages")
    if isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
        return [{"role": str(m["role"]), "content": m["content"]} for m in messages]
    return None


def read_sources(path: str | Path) -> list[Source]:
    """All prompts of a file. Raises `OptionError` for a missing file, a broken line, or one of no known form."""
    sources = [_source(record, number, where) for number, where, record in read_records("prompts", path)]
    if not sources:
        raise OptionError(f"prompts={str(path)!r}: the file holds no prompt")
    return sources


def encode(source: Source, tokenizer: Any) -> Prompt:
    """Token ids of one prompt."""
    if source.text is not None:
        tokens = tokenizer(source.text).input_ids
    elif getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(source.messages), add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False).input_ids  # the template writes its own
    else:
        tokens = tokenizer("\n\n".join(message["content"] for message in source.messages)).input_ids
    return Prompt(source.number, source.category, tuple(tokens))


def read_prompts(
    path: str | Path,
    tokenizer: Any,
    *,
    limit: int | None = None,
    per_category: int | None = None,
    max_prompt_tokens: int | None = None,
    spread: bool = False,
) -> list[Prompt]:
    """Prompts of a file, in its order.

    Prompts longer than `max_prompt_tokens` are left out (half a chat is not a prompt). `per_category` takes the first so many of each
    category, `limit` the first so many of all; with `spread` the categories take turns, so that `limit` covers all of them.
    Raises `OptionError` if none is left.
    """
    sources = read_sources(path)
    kept: list[Prompt] = []
    taken: dict[str, int] = {}
    for source in round_robin(sources) if spread else sources:
        if limit is not None and len(kept) == limit:
            break
        if per_category is not None and taken.get(source.category, 0) == per_category:
            continue
        prompt = encode(source, tokenizer)
        if not prompt.tokens or (max_prompt_tokens is not None and len(prompt.tokens) > max_prompt_tokens):
            continue
        kept.append(prompt)
        taken[source.category] = taken.get(source.category, 0) + 1
    if not kept:
        raise OptionError(f"no prompt of {path} has 1 to {max_prompt_tokens} tokens: raise --max-prompt-tokens")
    return kept


def random_tokens(count: int, vocabulary: int, length: int = 64) -> list[Prompt]:
    """`count` prompts of `length` random tokens, the same each time."""
    pick = random.Random(0)
    return [Prompt(i + 1, "random tokens", tuple(pick.randrange(vocabulary) for _ in range(length))) for i in range(count)]


def round_robin(sources: Iterable[Source]) -> list[Source]:
    """One of each category in turn, the categories in the order in which they first appear."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.category, []).append(source)
    longest = max((len(group) for group in groups.values()), default=0)
    return [group[turn] for turn in range(longest) for group in groups.values() if turn < len(group)]


def _source(record: dict[str, Any], number: int, where: str) -> Source:
    category = str(record.get("category", UNCATEGORISED))
    if isinstance(text := record.get("text"), str):
        return Source(number, category, text=text)
    chat = chat_of(record) or []
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if chat:
        return Source(number, category, messages=tuple(chat))
    turns = record.get("turns")
    content = turns[0] if isinstance(turns, list) and turns else record.get("prompt", record.get("question"))
    if isinstance(content, str):
        return Source(number, category, messages=({"role": "user", "content": content},))
    raise OptionError(f"{where}: no usable 'prompt', 'text', 'messages', 'turns' or 'question' among {', '.join(sorted(record))}")
