"""Recorded text to draft against: contexts, and the *continuations* that a model (or a person) wrote after them.

Read from JSON Lines files. One file is one *stream*: its traces in order, so that earlier continuations are what later ones can be drafted
from. A line is one of::

    {"messages": [{"role": ..., "content": ...}, ...]}   a chat; each assistant message continues all before it
    {"question": "...", "solutions": ["...", ...]}       each solution answers the question, put as a user message
    {"question": "...", "answer": "..."}                 the same with one
    {"prompt": "...", "canonical_solution": "..."}       continues the prompt as it stands, outside the chat template
    {"prompt": "...", "completion": "..."}               the same

Messages go through the tokenizer's chat template; where there is none they are joined as plain text. Each message is tokenised by itself,
so context, continuation and what comes next are the same tokens from turn to turn. A continuation ends with the token that ends a turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from specfx.bench.prompts import chat_of, read_records
from specfx.errors import OptionError


@dataclass(frozen=True)
class Trace:
    """One continuation. context: ``[P]`` token ids. continuation: ``[N]``, N >= 1. ends: the tokens that end a text."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stream:
    """The traces of one file, in its order."""

    name: str
    traces: tuple[Trace, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all continuations."""
        return sum(len(trace.continuation) for trace in self.traces)


def read_stream(path: str | Path, tokenizer: Any, limit: int | None = None) -> Stream:
    """The traces of the first `limit` lines of a file. Raises `OptionError` for a missing file, a broken line, or one of no known form."""
    traces: list[Trace] = []
    for _, where, record in islice(read_records("traces", path), limit):
        traces.extend(_traces(record, tokenizer, where))
    if not traces:
        raise OptionError(f"traces={str(path)!r}: the file holds no trace")
    return Stream(Path(path).stem, tuple(traces))


def _traces(record: dict[str, Any], tokenizer: Any, where: str) -> Iterator[Trace]:
    chat = chat_of(record)
    if chat is not None:
        if not any(message["role"] == "assistant" for message in chat):
            raise OptionError(f"{where}: no message of the assistant, so nothing to replay")
        yield from _chat(chat, tokenizer, where)
        return
    question, prompt = record.get("question"), record.get("prompt")
    answers = record.get("solutions", [record.get("answer")])
    if isinstance(question, str) and isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers):
        for answer in answers:
            yield from _chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenizer, where)
        return
    completion = record.get("canonical_solution", record.get("completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        written, ends = _ended(tokenizer(completion, add_special_tokens=False).input_ids, tokenizer)
        yield Trace(tuple(tokenizer(prompt).input_ids), tuple(written), ends)
        return
    raise OptionError(
        f"{where}: no usable 'messages', 'question' with 'solutions' or 'answer', or 'prompt' with 'canonical_solution' or 'completion' "
        f"among {', '.join(sorted(record))}"
    )


def _chat(messages: Sequence[dict[str, str]], tokenizer: Any, where: str) -> Iterator[Trace]:
    """A trace for each assistant message."""
    turns = _rendered(messages, tokenizer, where) if getattr(tokenizer, "chat_template", None) else _joined(messages, tokenizer)
    context: list[int] = []
    for before, written, after, ends in turns:
        context += before
        if written:
            yield Trace(tuple(context), tuple(written), ends)
        context += [*written, *after]


_Turn = tuple[list[int], list[int], list[int], tuple[int, ...]]
"""Of a message: tokens before what the assistant writes, what it writes (of other roles nothing), tokens after it, and its end token."""


def _rendered(messages: Sequence[dict[str, str]], tokenizer: Any, where: str) -> Iterator[_Turn]:
    """Messages as the chat template writes them. What it adds for one message is what it writes more than for those before.

    The last special token that it adds for an assistant message ends the turn. Raises `OptionError` for a template that refuses the
    messages, or writes earlier ones differently when more follow.
    """
    from jinja2 import TemplateError

    def render(count: int, prompt: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(list(messages[:count]), add_generation_prompt=prompt, tokenize=False))
        except (TemplateError, ValueError) as e:
            raise OptionError(f"{where}: the tokenizer's chat template refuses the messages ({e}): give another --model") from e

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)  # the template writes its own

    special = set(tokenizer.all_special_ids)
    old = ""
    for count, message in enumerate(messages, start=1):
        asks = message["role"] == "assistant"
        start = render(count - 1, prompt=True) if asks and count > 1 else old
        new = render(count)
        if not (start.startswith(old) and new.startswith(start)):
            raise OptionError(
                f"{where}: the tokenizer's chat template writes what comes before message {count} differently once it is there: "
                "give another --model"
            )
        before, body = encode(start[len(old) :]), encode(new[len(start) :])
        old = new
        if not asks:
            yield [*before, *body], [], [], ()
            continue
        end = next((i for i in reversed(range(len(body))) if body[i] in special), None)
        cut = len(body) if end is None else end + 1
        yield before, body[:cut], body[cut:], () if end is None else (body[end],)


def _joined(messages: Sequence[dict[str, str]], tokenizer: Any) -> Iterator[_Turn]:
    """Messages as plain text, with an empty line between them."""
    for i, message in enumerate(messages):
        gap = "\n\n" if i > 0 else ""
        if message["role"] != "assistant":
            yield list(tokenizer(gap + message["content"], add_special_tokens=i == 0).input_ids), [], [], ()
        else:
            written, ends = _ended(tokenizer(message["content"], add_special_tokens=False).input_ids, tokenizer)
            yield list(tokenizer(gap, add_special_tokens=i == 0).input_ids), written, [], ends


def _ended(tokens: Sequence[int], tokenizer: Any) -> tuple[list[int], tuple[int, ...]]:
    """A text with the end token after it, and that; the text alone where the tokenizer has none."""
    end = getattr(tokenizer, "eos_token_id", None)
    return ([*tokens], ()) if end is None else ([*tokens, end], (end,))
