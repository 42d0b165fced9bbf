"""The earlier outputs that all requests draft from: one suffix tree, bounded, that can be saved and loaded.

An *output* is recorded while its request runs, token by token, and kept when it ends. When there are more than `max_tokens` tokens or
`max_outputs` outputs, the least useful ended one is taken out: the queue's first gets a second chance for half the credit that it has (a
generalised clock, Smith, 1978), and goes when it has none. Credit is one for each token of another request that the tree predicted from
this output where the request's own text did not know as much (`specfx.drafters.suffix_model`). Running requests are never taken out;
when they alone fill the cache, what they write further is not recorded.

On disk it is an ``npz`` file: tokens and credits of the outputs, what the model has learned, the size of the vocabulary, and a
checksum over all of it. The tree is grown anew from the tokens (0.2 microseconds each).
"""

from __future__ import annotations

import hashlib
import zipfile
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from specfx.cache import replacing
from specfx.drafters._jit import view
from specfx.drafters.suffix_model import MODEL
from specfx.drafters.suffix_tree import SuffixTree
from specfx.errors import SuffixCacheError

FORMAT = 1
_COMPACT_FROM = 4096
"""States below which a tree is not worth rebuilding."""


class OutputCache:
    """Outputs by serial number, oldest first, and the tree over them. Not thread-safe: the drafter's lock guards it.

    cursors: gives every cursor into the tree that running requests keep. rebuilt: called when the tree has been built anew, with the
    cursors of the running outputs at the right place and all others void.
    """

    def __init__(
        self,
        depth: int,
        max_tokens: int,
        max_outputs: int,
        cursors: Callable[[], Iterable[Any]] = tuple,
        rebuilt: Callable[[], None] = lambda: None,
    ) -> None:
        self.depth, self.max_tokens, self.max_outputs = depth, max_tokens, max_outputs
        self.tree = SuffixTree(depth)
        self.tokens = 0
        self.evicted = 0
        self._cursors, self._rebuilt = cursors, rebuilt
        self._outputs: dict[int, array[int]] = {}  # in the order of the queue
        self._running: dict[int, Any] = {}  # serial -> cursor at the output's end
        self._serial = 0
        self._make_ledger(64)

    def __len__(self) -> int:
        return len(self._outputs)

    def output(self, serial: int) -> list[int]:
        """The tokens of an output."""
        return self._outputs[serial].tolist()

    @property
    def serials(self) -> list[int]:
        """The recorded outputs, in the order of the queue."""
        return list(self._outputs)

    @property
    def nbytes(self) -> int:
        return self.tree.nbytes + 4 * self.tokens

    # Recording.

    def start(self, cursor: Any) -> tuple[int, array[int]]:
        """A new output, whose end in the tree `cursor` is. Returns its serial number (-1 if there is no place for it) and its tokens:
        the caller appends what is written to them, to `tokens` their number, and to the tree, after `make_room`."""
        written = array("i")
        while 0 <= self.max_outputs <= len(self._outputs):
            if not self._evict_one():
                return -1, written
        if self.max_tokens <= 0:
            return -1, written
        serial = self._new_serial()
        self._outputs[serial] = written
        self._running[serial] = cursor
        return serial, written

    def make_room(self, n: int) -> bool:
        """Evict until `n` more tokens fit. False if they can't, since all else is running."""
        while self.tokens + n > self.max_tokens:
            if not self._evict_one():
                return False
        return True

    def end(self, serial: int) -> None:
        """A running output has ended: from now on it may be evicted."""
        del self._running[serial]
        if not self._outputs[serial]:
            self._forget(serial)

    # Credit.

    def credit(self, serial: int) -> int:
        half = len(self._ledger) // 2
        return int(self._ledger[half + serial % half])

    def _make_ledger(self, half: int) -> None:
        """Room for `half` outputs. Those that are here keep places of their own if `half` is a multiple of what it was."""
        credits = {serial: self.credit(serial) for serial in self._outputs}
        self._ledger = np.zeros(2 * half, dtype=np.int32)
        self._ledger[:half] = -1
        for serial, credit in credits.items():
            self._ledger[serial % half] = serial
            self._ledger[half + serial % half] = credit
        self.ledger = view(self._ledger)

    def _new_serial(self) -> int:
        if 2 * len(self._outputs) >= len(self._ledger) // 2:
            self._make_ledger(len(self._ledger))
        half = len(self._ledger) // 2
        while self._ledger[self._serial % half] >= 0:  # taken by a survivor; at least half the places are free
            self._serial += 1
        serial = self._serial
        self._serial += 1
        if self._serial >= 2**30:  # start again: numbers only have to be unique among the outputs that are there
            self._serial = 0
        self._ledger[serial % half] = serial
        self._ledger[half + serial % half] = 0
        return serial

    # Eviction.

    def _evict_one(self) -> bool:
        """Take the least useful ended output out. False if all are running."""
        half = len(self._ledger) // 2
        if len(self._running) == len(self._outputs):
            return False
        while True:
            serial = next(iter(self._outputs))
            place = half + serial % half
            if serial in self._running or self._ledger[place] > 0:
                self._outputs[serial] = self._outputs.pop(serial)  # to the end of the queue
                if serial not in self._running:
                    self._ledger[place] //= 2
                continue
            tokens = np.frombuffer(self._outputs[serial], dtype=np.int32)
            self.tree.remove(tokens, self._cursors())
            del tokens
            self.tokens -= len(self._outputs[serial])
            self._forget(serial)
            self.evicted += 1
            return True

    def _forget(self, serial: int) -> None:
        del self._outputs[serial]
        self._ledger[serial % (len(self._ledger) // 2)] = -1

    def evict(self, max_tokens: int) -> int:
        """Evict until at most `max_tokens` tokens are left, or only running outputs, and give the memory back. Returns how many went."""
        before = self.evicted
        while self.tokens > max_tokens and self._evict_one():
            pass
        self._compact()
        return self.evicted - before

    def _compact(self) -> None:
        """Build the tree anew if most of its memory is unused."""
        states, top = self.tree.states, self.tree.top
        if top < _COMPACT_FROM or states * 2 > top:
            return
        self._build()

    def _build(self) -> None:
        self.tree = SuffixTree(self.depth, self.tokens)
        for serial, tokens in self._outputs.items():
            cursor = self._running.get(serial, view(np.zeros(2, dtype=np.int32)))
            cursor[0] = cursor[1] = 0
            self.tree.extend(cursor, np.frombuffer(tokens, dtype=np.int32), serial)
        self._rebuilt()

    # On disk.

    def save(self, path: str | Path, model: np.ndarray, vocab_size: int) -> None:
        """Write the outputs and what the `model` has learned to `path`, in one step: a crash leaves the old file or the new one.

        Raises `SuffixCacheError` if the file can't be written.
        """
        outputs = list(self._outputs.items())
        content = {
            "format": np.array([FORMAT, self.depth, vocab_size], dtype=np.int64),
            "tokens": np.concatenate([np.zeros(0, dtype=np.int32), *(np.frombuffer(t, dtype=np.int32) for _, t in outputs if t)]),
            "lengths": np.array([len(t) for _, t in outputs], dtype=np.int64),
            "credits": np.array([self.credit(s) for s, _ in outputs], dtype=np.int32),
            "model": model,
        }
        content["checksum"] = _checksum(content)
        path = Path(path)
        try:
            with replacing(path, ".part") as file:
                np.savez(file, **content)  # type: ignore[arg-type]
        except OSError as e:
            raise SuffixCacheError(f"can't write the suffix cache to {path}: {e}") from e

    def adopt(self, content: dict[str, np.ndarray]) -> None:
        """Take over the outputs that `read` gave, as ended ones, in place of those that are here. None may be running."""
        assert not self._running
        self._outputs, self.tokens = {}, 0
        self._make_ledger(64)
        end = 0
        for length, credit in zip(content["lengths"].tolist(), content["credits"].tolist(), strict=True):
            serial = self._new_serial()
            self._outputs[serial] = array("i", content["tokens"][end : end + length].tobytes())
            half = len(self._ledger) // 2
            self._ledger[half + serial % half] = credit
            end += length
        self.tokens = end
        self._build()
        while self.tokens > self.max_tokens or 0 <= self.max_outputs < len(self._outputs):
            self._evict_one()
        self._compact()


def _checksum(content: dict[str, np.ndarray]) -> np.ndarray:
    digest = hashlib.sha256()
    for name in sorted(content):
        array_ = content[name]
        digest.update(f"{name} {array_.dtype.str} {array_.shape} ".encode())
        digest.update(np.ascontiguousarray(array_).tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def read(path: str | Path, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays of a file of `OutputCache.save`, checked; "model" is what the drafter had learned, float64 ``[MODEL]``.

    Raises `SuffixCacheError` for a file that can't be read, is damaged, of another format or of another vocabulary.
    """
    expected = {"format": np.int64, "tokens": np.int32, "lengths": np.int64, "credits": np.int32, "model": np.float64, "checksum": np.uint8}
    try:
        with zipfile.ZipFile(path) as archive:  # np.load would take other kinds of file, too
            content = {name.removesuffix(".npy"): np.lib.format.read_array(archive.open(name)) for name in archive.namelist()}
    except Exception as e:  # what a damaged header may raise is not listed anywhere
        raise SuffixCacheError(f"can't read the suffix cache {path}: {type(e).__name__}: {e}") from e
    if {name: a.dtype for name, a in content.items()} != {name: np.dtype(t) for name, t in expected.items()}:
        raise SuffixCacheError(f"{path} is not a suffix cache of specfx: it holds {', '.join(sorted(content)) or 'nothing'}")
    header, tokens, lengths = content["format"], content["tokens"], content["lengths"]
    if header.shape != (3,) or header[0] != FORMAT:
        raise SuffixCacheError(f"{path} is of format {header.ravel().tolist()[:1]}, this specfx reads {FORMAT}: write it anew")
    checksum = content.pop("checksum")
    if not np.array_equal(checksum, _checksum(content)):
        raise SuffixCacheError(f"{path} is damaged: its checksum doesn't match")
    if header[2] != vocab_size:
        raise SuffixCacheError(f"{path} holds tokens of a vocabulary of {header[2]}, the model's has {vocab_size}: is it another model's?")
    sound = content["model"].shape == (MODEL,) and lengths.min(initial=0) >= 0 and lengths.sum() == tokens.size
    if not sound or content["credits"].shape != lengths.shape or (tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size):
        raise SuffixCacheError(f"{path} contradicts itself: write it anew")
    return content
