"""Token streams of all kinds, for property tests: random, periodic, constant, nested, edited, and real text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import strategies as st

Stream = list[int]

ROOT = Path(__file__).resolve().parent.parent

tokens = st.integers(0, 4)
random_streams = st.lists(tokens, max_size=40)
constant_streams = st.builds(lambda n: [7] * n, st.integers(0, 40))
periodic_streams = st.builds(
    lambda period, times, rest: period * times + rest,
    st.lists(tokens, min_size=1, max_size=7),
    st.integers(1, 5),
    st.lists(tokens, max_size=4),
)


@st.composite
def edited_streams(draw: st.DrawFn) -> Stream:
    """Repeats of repeats: each round appends a slice of what is there, sometimes with one token changed (an edit)."""
    stream = draw(st.lists(tokens, min_size=2, max_size=6))
    while len(stream) < 30:
        start = draw(st.integers(0, len(stream) - 1))
        piece = stream[start : start + draw(st.integers(1, 12))]
        if draw(st.booleans()):
            piece[draw(st.integers(0, len(piece) - 1))] = draw(tokens)
        stream = stream + piece
    return stream


streams = st.one_of(random_streams, constant_streams, periodic_streams, edited_streams())


def fibonacci(n: int) -> Stream:
    """The first `n` tokens of 0100101001001...: as many contexts of each length as a text without a period can do with."""
    a, b = [0], [0, 1]
    while len(b) < n:
        a, b = b, b + a
    return b[:n]


def thue_morse(n: int) -> Stream:
    """0110100110010110...: nothing in it comes three times in a row."""
    return [i.bit_count() % 2 for i in range(n)]


def blocks(n: int, period: int = 3, change: int = 7) -> Stream:
    """Repeated blocks in repeated blocks, with a token of its own at the end of each outer one."""
    stream: Stream = []
    while len(stream) < n:
        stream += ([*range(period)] * 3 + [50, 51]) * 2 + [100 + len(stream) % change]
    return stream[:n]


def words(path: str, n: int, start: int = 0) -> Stream:
    """The words, spaces and signs of a file of the repository, numbered as they come."""
    numbers: dict[str, int] = {}
    pieces = re.findall(r"\w+|\s+|[^\w\s]", (ROOT / path).read_text())
    return [numbers.setdefault(piece, len(numbers)) for piece in pieces][start : start + n]


def byte_stream(path: str, n: int) -> Stream:
    return list((ROOT / path).read_bytes()[:n])


def long_streams(n: int) -> dict[str, Stream]:
    """One stream of each kind that isn't random, of up to `n` tokens."""
    return {
        "constant": [7] * n,
        "periodic": ([1, 2, 3, 1, 2, 4, 5] * n)[:n],
        "fibonacci": fibonacci(n),
        "thue-morse": thue_morse(n),
        "blocks": blocks(n),
        "readme": words("README.md", n),
        "source": words("tests/suffix_oracle.py", n),
        "source bytes": byte_stream("tests/suffix_oracle.py", n),
        "conversations": words("examples/edit_and_extract.jsonl", n),
    }


def kinds(n: int) -> pytest.MarkDecorator:
    """A test for each of the `long_streams`."""
    made = long_streams(n)
    return pytest.mark.parametrize("stream", list(made.values()), ids=list(made))
