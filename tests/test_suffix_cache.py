"""The earlier outputs that a suffix drafter keeps: which it forgets first, what memory it gives back, and what it takes from a file."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from streams import Stream, long_streams
from suffix_oracle import Contexts, Twin
from suffix_reader import assert_cursors_are_places, assert_exact

from specfx.drafters import suffix_cache
from specfx.drafters._jit import view
from specfx.drafters.suffix import SuffixDrafter
from specfx.drafters.suffix_cache import OutputCache
from specfx.errors import SuffixCacheError
from specfx.options import SuffixOptions
from specfx.runtime.tree import DraftTree

VOCAB = 5000
OPTIONS = SuffixOptions(max_tree_depth=6, max_spec_factor=0, max_spec_offset=4)
"""Small trees, and drafts that no budget cuts short."""


def write(twin: Twin, seq: int, output: Stream, prompt: Stream = ()) -> None:  # type: ignore[assignment]
    """A request that comes, writes and goes."""
    twin.add(seq, prompt)
    twin.accept(seq, output)
    twin.remove(seq)


def kept(drafter: SuffixDrafter) -> list[Stream]:
    return [drafter.cache.output(serial) for serial in drafter.cache.serials]


def assert_sound(drafter: SuffixDrafter) -> None:
    """The tree is that of the outputs, the bounds hold, and every cursor that is moved along is a place in the tree."""
    cache = drafter.cache
    contexts = Contexts(cache.depth)
    for serial in cache.serials:
        contexts.extend(serial, cache.output(serial))
    assert_exact(cache.tree, contexts, stamped=False)
    assert cache.tokens == sum(map(len, kept(drafter))) <= max(cache.max_tokens, 0)
    assert not 0 <= cache.max_outputs < len(cache)
    assert_cursors_are_places(drafter)


# --- bounds -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [{"max_cached_requests": 0}, {"max_cached_tokens": 0}])
def test_without_a_cache_each_request_has_only_itself(bounds: dict[str, int]) -> None:
    twin = Twin(SuffixOptions(**bounds))
    write(twin, 0, [1, 2, 3] * 20)
    assert kept(twin.drafter) == []
    assert twin.drafter.cache.tree.states == 1
    twin.add(1, [1, 2])
    assert len(twin.propose([1], [9])[0]) == 0  # the first request is forgotten
    twin.accept(1, [3, 1, 2, 3, 1, 2])
    assert twin.propose([1], [9])[0].tokens[:3] == (3, 1, 2)  # its own text is known


def test_a_new_request_makes_the_oldest_output_go() -> None:
    twin = Twin(SuffixOptions(max_cached_requests=2))
    for seq, output in enumerate(([1] * 5, [2] * 5, [3] * 5)):
        write(twin, seq, output)
    assert kept(twin.drafter) == [[2] * 5, [3] * 5]
    assert twin.drafter.statistics().evicted == 1


def test_a_token_too_many_makes_the_oldest_output_go() -> None:
    twin = Twin(SuffixOptions(max_cached_tokens=20))
    write(twin, 0, [1] * 9)
    write(twin, 1, [2] * 9)
    twin.add(2, [])
    twin.accept(2, [3] * 2)
    assert kept(twin.drafter) == [[1] * 9, [2] * 9, [3] * 2]
    twin.accept(2, [3])
    assert kept(twin.drafter) == [[2] * 9, [3] * 3]


def test_an_output_that_others_were_drafted_from_outlives_newer_ones() -> None:
    """Each token that it foretold is a credit; a credit is half lost each time that it would have been its turn."""
    twin = Twin(SuffixOptions(max_cached_tokens=60))
    useful = list(range(100, 120))
    write(twin, 0, useful)
    write(twin, 1, list(range(200, 220)))
    write(twin, 2, [*useful[5:9], 7], prompt=useful[:5])  # four tokens foretold
    assert twin.drafter.cache.credit(twin.drafter.cache.serials[0]) == 4
    for seq in range(3, 6):
        write(twin, seq, list(range(100 * seq, 100 * seq + 20)))
        assert useful in kept(twin.drafter)
    for seq in range(6, 14):
        write(twin, seq, list(range(100 * seq, 100 * seq + 20)))
    assert useful not in kept(twin.drafter)


def test_a_text_that_knows_as_much_itself_gives_no_credit() -> None:
    twin = Twin(SuffixOptions())
    write(twin, 0, [1, 2, 3, 4, 5])
    twin.add(1, [1, 2, 3, 4, 5, 9])
    twin.accept(1, [1, 2, 3, 4])
    assert twin.drafter.cache.credit(twin.drafter.cache.serials[0]) == 0


def test_nothing_has_credit_for_what_it_foretold_itself() -> None:
    """The prompt knows too many followers of 1 to expect any, so only the output itself expects the second 5."""
    twin = Twin(SuffixOptions())
    twin.add(0, [token for i in range(70) for token in (1, 1000 + i)])
    twin.accept(0, [1, 5, 9, 1, 5])
    assert twin.drafter.cache.credit(twin.drafter.cache.serials[0]) == 0


def test_running_outputs_are_never_evicted() -> None:
    """When they alone fill the cache, what they write further is not recorded, and drafting goes on."""
    twin = Twin(SuffixOptions(max_cached_tokens=30, max_tree_depth=8))
    write(twin, 0, [9] * 10)
    for seq in (1, 2, 3):
        twin.add(seq, [])
        twin.accept(seq, [seq, 5, 6, 7, 8] * 2)
    assert kept(twin.drafter) == [[seq, 5, 6, 7, 8] * 2 for seq in (1, 2, 3)]
    assert twin.drafter.evict(0) == 0
    for seq in (1, 2, 3):
        twin.accept(seq, [seq, 5, 6])
        assert twin.propose([seq], [5])[0].tokens[:2] == (7, 8)
    assert len(kept(twin.drafter)) == 2  # one has stopped being recorded, and made room for the others
    assert_sound(twin.drafter)
    for seq in (1, 2, 3):
        twin.remove(seq, [4])
    write(twin, 4, [1, 2] * 15)
    assert kept(twin.drafter) == [[1, 2] * 15]


def test_more_than_the_whole_cache_at_once_is_not_recorded() -> None:
    twin = Twin(SuffixOptions(max_cached_tokens=30))
    twin.add(0, [])
    twin.accept(0, [1, 2, 3] * 11)
    assert kept(twin.drafter) == []
    assert twin.propose([0], [6])[0].tokens == (1, 2, 3, 1, 2, 3)


def test_a_request_that_wrote_nothing_leaves_nothing() -> None:
    twin = Twin(SuffixOptions())
    for seq in range(200):
        write(twin, seq, [], prompt=[1, 2])
    assert kept(twin.drafter) == []


def test_hundreds_of_outputs_keep_their_own_credit() -> None:
    """The ledger grows, whatever the numbers of those that survived."""
    cache = OutputCache(4, 10**6, -1)
    credits = {}
    rng = random.Random(0)
    for i in range(400):
        cursor = view(np.zeros(2, dtype=np.int32))
        serial, written = cache.start(cursor)
        assert serial not in credits
        written.append(i)
        cache.tokens += 1
        cache.tree.extend(cursor, np.array([i], dtype=np.int32), serial)
        half = len(cache._ledger) // 2
        assert cache._ledger[serial % half] == serial
        credits[serial] = cache._ledger[half + serial % half] = rng.randrange(3)
        cache.end(serial)
        if i % 3 == 2:
            assert cache._evict_one()
            credits = {serial: cache.credit(serial) for serial in cache.serials}
        assert {serial: cache.credit(serial) for serial in cache.serials} == credits
    assert len(cache) == 400 - 133


def test_outputs_that_stay_keep_their_credit_while_thousands_come_and_go() -> None:
    """Numbers are used up, places in the ledger are not: no newcomer gets the place of one that is still there."""
    cache = OutputCache(4, 10**6, -1)
    staying = [cache.start(view(np.zeros(2, dtype=np.int32)))[0] for _ in range(5)]
    half = len(cache._ledger) // 2
    cache._ledger[half + np.array(staying)] = range(1, 6)
    for _ in range(2000):
        cursor = view(np.zeros(2, dtype=np.int32))
        serial, written = cache.start(cursor)
        assert serial not in staying
        assert cache.credit(serial) == 0
        written.append(7)
        cache.tokens += 1
        cache.tree.extend(cursor, np.array([7], dtype=np.int32), serial)
        cache.end(serial)
        assert cache._evict_one()
        assert [cache.credit(s) for s in staying] == [1, 2, 3, 4, 5]
    assert cache.serials == staying
    assert len(cache._ledger) == 2 * half


# --- memory -----------------------------------------------------------------------------------------------------------------------


def test_evict_gives_memory_back_and_running_requests_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree is built anew around them; what they had matched is matched again from what they wrote."""
    monkeypatch.setattr(suffix_cache, "_COMPACT_FROM", 512)
    twin = Twin(SuffixOptions(max_tree_depth=4))
    rng = random.Random(0)
    text = [rng.randrange(50) for _ in range(2000)]
    for seq in range(5):
        write(twin, seq, text[400 * seq : 400 * seq + 400])
    twin.add(5, text[100:120])
    twin.accept(5, text[120:140])
    before = twin.drafter.statistics()
    tree = twin.drafter.cache.tree
    twin.evict(500)
    after = twin.drafter.statistics()
    assert (before.outputs, after.outputs, after.evicted) == (6, 2, 4)
    assert after.cache_bytes < before.cache_bytes / 3
    assert twin.drafter.cache.tree is not tree
    assert_sound(twin.drafter)
    known = next(output for output in kept(twin.drafter) if len(output) == 400)
    twin.accept(5, known[:20])
    assert twin.propose([5], [4])[0].tokens[:2] == tuple(known[20:22])
    twin.evict(0)
    assert kept(twin.drafter) == [text[120:140] + known[:20]]
    twin.accept(5, known[:20])
    assert_sound(twin.drafter)


def test_a_request_that_is_no_longer_recorded_survives_a_new_tree() -> None:
    """Its old place in the old tree means nothing in the new one."""
    drafter = SuffixDrafter(SuffixOptions(max_cached_tokens=6000, max_tree_depth=8), 15)
    rng = random.Random(0)
    drafter.add(0, [])
    drafter.add(1, [])
    drafter.accept(0, [rng.randrange(50) for _ in range(5980)])
    drafter.accept(1, list(range(100, 120)))
    drafter.accept(1, [5])  # there is no room for it
    drafter.remove(0)
    drafter.evict(1000)
    assert kept(drafter) == [list(range(100, 120))]
    assert_sound(drafter)
    drafter.evict(0)
    assert_sound(drafter)


def test_a_small_tree_is_not_built_anew() -> None:
    twin = Twin(SuffixOptions())
    write(twin, 0, [1, 2, 3])
    tree = twin.drafter.cache.tree
    twin.evict(0)
    assert twin.drafter.cache.tree is tree
    assert tree.states == 1


# --- files ------------------------------------------------------------------------------------------------------------------------


def filled(options: SuffixOptions | None = None) -> SuffixDrafter:
    """Some outputs, of which two have credit, one is still being written, and one hasn't begun."""
    drafter = SuffixDrafter(options or OPTIONS, 63, VOCAB)
    texts = list(long_streams(80).values())
    for seq, text in enumerate(texts):
        drafter.add(seq, text[:20])
        drafter.accept(seq, text[20:])
        drafter.remove(seq)
    drafter.add(100, texts[5][:10])
    drafter.accept(100, texts[5][10:60])
    drafter.add(101, [])
    return drafter


def drafts(drafter: SuffixDrafter, seq: int = 1000) -> list[dict[tuple[int, ...], float]]:
    """What is drafted for some prompts: path -> probability (which of two equals comes first isn't told by a file)."""
    found = []
    for stream in long_streams(80).values():
        drafter.add(seq, stream[:30])
        (tree,) = drafter.propose([seq], [63])
        assert len(tree) < 63
        paths = {path_of(tree, i): p for i, p in enumerate(tree.probs)}
        found.append(paths)
        drafter.remove(seq)
    return found


def path_of(tree: DraftTree, node: int) -> tuple[int, ...]:
    return () if node < 0 else (*path_of(tree, tree.parents[node]), tree.tokens[node])


def state(drafter: SuffixDrafter) -> tuple[Any, ...]:
    cache = drafter.cache
    return kept(drafter), [cache.credit(s) for s in cache.serials], drafter._model.tolist(), drafter.statistics(), cache.tree.states


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "outputs.cache"
    filled().save(path)
    return path


def test_a_saved_cache_drafts_as_before(tmp_path: Path) -> None:
    drafter, path = filled(), tmp_path / "outputs.cache"
    credits = [drafter.cache.credit(serial) for serial in drafter.cache.serials]
    assert sum(credit > 0 for credit in credits) >= 2
    drafter.save(path)
    assert os.listdir(tmp_path) == [path.name]
    loaded = SuffixDrafter(OPTIONS, 63, VOCAB)
    loaded.add(0, [])
    loaded.remove(0, [1, 2, 3, 4])  # goes when another cache is loaded
    loaded.load(path)
    drafter.remove(100)
    drafter.remove(101)
    texts = [text for text in kept(loaded) if text]
    assert texts == kept(drafter)
    assert [loaded.cache.credit(s) for s, text in zip(loaded.cache.serials, kept(loaded), strict=True) if text] == credits[: len(texts)]
    assert np.array_equal(loaded._model, drafter._model)
    assert_sound(loaded)
    assert drafts(loaded) == drafts(drafter) != [{}] * 9


def test_loaded_outputs_are_used_and_evicted_like_others(saved: Path) -> None:
    twin = Twin(SuffixOptions(max_cached_tokens=300))
    filled(SuffixOptions(max_cached_tokens=300)).save(saved)
    twin.drafter.vocab_size = VOCAB
    twin.drafter.load(saved)
    oracle = twin.oracle  # is told what was in the file
    for i, serial in enumerate(twin.drafter.cache.serials):
        oracle.queue.append(i)
        oracle.credits[i] = twin.drafter.cache.credit(serial)
        oracle.world.extend(i, twin.drafter.cache.output(serial), i)
    oracle.model = type(oracle.model)(twin.drafter._model)
    for seq, text in enumerate(long_streams(120).values()):
        twin.add(seq, text[:50])
        twin.propose([seq], [9])
        twin.accept(seq, text[50:])
        twin.remove(seq)
    assert_sound(twin.drafter)


@pytest.mark.parametrize("bounds", [{"max_cached_tokens": 150}, {"max_cached_requests": 2}, {"max_cached_tokens": 0}])
def test_a_cache_larger_than_the_bounds_is_trimmed(bounds: dict[str, int], saved: Path) -> None:
    drafter = SuffixDrafter(SuffixOptions(**bounds), 63, VOCAB)
    drafter.load(saved)
    assert_sound(drafter)
    most = max(zip((filled().cache.credit(s) for s in filled().cache.serials), kept(filled()), strict=True))
    assert (most[1] in kept(drafter)) == (bounds != {"max_cached_tokens": 0})


def test_a_cache_can_be_given_as_an_option(saved: Path) -> None:
    drafter = SuffixDrafter(SuffixOptions(cache=saved), 63, VOCAB)
    assert [text for text in kept(drafter) if text] == kept(filled())[:-1]
    with pytest.raises(SuffixCacheError, match="vocabulary"):
        SuffixDrafter(SuffixOptions(cache=saved), 63, VOCAB + 1)


def test_an_empty_cache_can_be_saved(tmp_path: Path) -> None:
    SuffixDrafter(SuffixOptions(), 15, VOCAB).save(tmp_path / "empty")
    drafter = filled()
    drafter.remove(100)
    drafter.remove(101)
    drafter.load(tmp_path / "empty")
    assert kept(drafter) == []
    assert_sound(drafter)


def rewritten(**changes: Any) -> Callable[[Path], None]:
    """Changes arrays of a file, with a checksum that is right. None: the array is left out."""

    def rewrite(path: Path) -> None:
        with np.load(path) as file:
            content = {name: file[name] for name in file.files}
        content.update({name: change(content[name]) if callable(change) else change for name, change in changes.items()})
        content = {name: array for name, array in content.items() if array is not None}
        if "checksum" not in changes:
            del content["checksum"]
            content["checksum"] = suffix_cache._checksum(content)
        with open(path, "wb") as file:
            np.savez(file, **content)

    return rewrite


def truncated(part: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * part)])


def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "not an array")


def one_array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.arange(3))


def objects(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, tokens=np.array([{}, []], dtype=object))


def set_first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.concatenate([np.array([value], dtype=array.dtype), array[1:]])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("outputs of yesterday\n" * 99),
    "pickle": lambda path: path.write_bytes(pickle.dumps([1, 2])),
    "folder": replaced(lambda path: path.mkdir()),
    "zip of something else": replaced(zipped),
    "npy": replaced(one_array),
    "npz of objects": replaced(objects),
    **{f"truncated to {part}": truncated(part) for part in (0.001, 0.1, 0.5, 0.9, 0.999)},
    "other format": rewritten(format=set_first(suffix_cache.FORMAT + 1)),
    "format without parts": rewritten(format=np.array([], dtype=np.int64)),
    "format as a number": rewritten(format=np.array(1)),
    "other vocabulary": rewritten(format=lambda array: array + np.array([0, 0, 1])),
    "tokens of another type": rewritten(tokens=lambda array: array.astype(np.int64)),
    "no credits": rewritten(credits=None),
    "one array too many": rewritten(more=np.zeros(1)),
    "tokens outside the vocabulary": rewritten(tokens=set_first(VOCAB)),
    "negative tokens": rewritten(tokens=set_first(-1)),
    "lengths that don't add up": rewritten(lengths=set_first(1)),
    "negative lengths": rewritten(lengths=lambda array: np.concatenate([array, [1, -1]])),
    "too few credits": rewritten(credits=lambda array: array[1:]),
    "a smaller model": rewritten(model=lambda array: array[1:]),
    "another checksum": rewritten(checksum=lambda array: array ^ 1),
    "a model that was changed": rewritten(model=lambda array: array * 1.5, checksum=lambda array: array),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_file_that_is_no_sound_cache_is_refused_and_changes_nothing(damage: str, saved: Path) -> None:
    DAMAGES[damage](saved)
    drafter = filled()
    drafter.remove(100)
    drafter.remove(101)
    before = state(drafter)
    with pytest.raises(SuffixCacheError) as caught:
        drafter.load(saved)
    assert str(saved) in str(caught.value)
    assert state(drafter) == before
    assert_sound(drafter)


def test_another_vocabulary_is_named(saved: Path) -> None:
    with pytest.raises(SuffixCacheError, match=r"vocabulary of 5000, .* 151936"):
        SuffixDrafter(SuffixOptions(), 15, 151936).load(saved)


def test_a_flipped_bit_is_noticed_wherever_it_is(saved: Path) -> None:
    """Each byte of the headers, and many of the data: it is refused, or it was one that means nothing (as a date does)."""
    data = saved.read_bytes()
    with zipfile.ZipFile(saved) as file:
        starts = [info.header_offset for info in file.infolist()]
        arrays = {info.filename: file.read(info) for info in file.infolist()}
    headers = {i for start in starts for i in range(start, start + 190)} | set(range(len(data) - 600, len(data)))
    rng = random.Random(0)
    harmless = 0
    for at in sorted(headers | set(rng.sample(range(len(data)), 300))):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        saved.write_bytes(flipped)
        try:
            suffix_cache.read(saved, VOCAB)
        except SuffixCacheError:
            continue
        harmless += 1
        with zipfile.ZipFile(saved) as file:
            assert {name: file.read(name) for name in arrays} == arrays
    assert harmless < len(headers)


@pytest.mark.parametrize("bounds", [{}, {"max_cached_requests": 0}, {"max_cached_tokens": 3}])
def test_nothing_is_loaded_while_requests_run(bounds: dict[str, int], saved: Path) -> None:
    """Be they recorded or not."""
    drafter = SuffixDrafter(SuffixOptions(**bounds), 15, VOCAB)
    drafter.add(0, [1, 2, 3])
    drafter.accept(0, [1, 2, 3, 4])
    before = state(drafter)
    with pytest.raises(SuffixCacheError, match="1 requests are running"):
        drafter.load(saved)
    assert state(drafter) == before
    drafter.remove(0)
    drafter.load(saved)


def unwritable(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder").mkdir()
    return {"no such folder": tmp_path / "none" / "cache", "below a file": tmp_path / "file" / "cache", "a folder": tmp_path / "folder"}


@pytest.mark.parametrize("place", ["no such folder", "below a file", "a folder"])
def test_what_cannot_be_written_raises_and_leaves_nothing_behind(place: str, tmp_path: Path) -> None:
    path = unwritable(tmp_path)[place]
    with pytest.raises(SuffixCacheError, match="can't write") as caught:
        filled().save(path)
    assert str(path) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []


@pytest.mark.parametrize("failing", ["numpy.savez", "os.replace"])
def test_a_full_disk_leaves_the_old_file(failing: str, saved: Path) -> None:
    before = saved.read_bytes()
    with mock.patch(failing, side_effect=OSError(28, "No space left on device")), pytest.raises(SuffixCacheError, match="No space left"):
        filled().save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_saving_changes_nothing(tmp_path: Path) -> None:
    drafter = filled()
    before = state(drafter), drafter.cache.tree.arena.copy()
    drafter.save(tmp_path / "cache")
    assert state(drafter) == before[0]
    assert np.array_equal(drafter.cache.tree.arena, before[1])
    drafter.accept(101, [1, 2, 3])  # the outputs are still open
    assert kept(drafter)[-1] == [1, 2, 3]
