"""Draft trees of a next-n head: the walk inside the graph, the drafting in tensors, and the eager drafter, each against an oracle in
plain Python that knows no tensors, no pages and no KV."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_kernels import causal_run, mask_words, path_to
from test_mtp import VOCAB, random_head, tiny_target, true_hidden
from torch import Tensor

import specfx
from specfx.drafters.mtp import MtpDrafter, load_drafter
from specfx.drafters.mtp_files import DRAFT_VOCAB, read_draft_vocab, save_draft_vocab
from specfx.drafters.mtp_head import MtpHead, load_head, save_head
from specfx.drafters.mtp_tree import draft, trees
from specfx.errors import HeadError, OptionError
from specfx.kernels import cpu_build
from specfx.kernels.greedy_walk import greedy_walk, greedy_walk_reference
from specfx.options import MtpOptions
from specfx.runtime.tree import DraftTree, TreeShape

# --- the walk inside the graph --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """One call of the op. parents, tokens, chosen: of each row, by sequence. slots: where a sequence's rows lie, committed ones first."""

    parents: list[list[int]]
    tokens: list[list[int]]
    chosen: list[list[int]]
    lengths: list[int]
    slots: list[list[int]]
    arguments: tuple[Any, ...]

    def walked(self, s: int) -> list[int]:
        """By `DraftTree.walk`, or one by one where the rows are more than a tree holds."""
        parents, tokens, chosen = self.parents[s], self.tokens[s], self.chosen[s]
        if len(parents) <= 64:
            return DraftTree(tuple(tokens[1:]), tuple(p - 1 for p in parents[1:]), (1.0,) * (len(tokens) - 1)).walk(chosen)
        wrong = (row for row in range(1, len(tokens)) if tokens[row] != chosen[row - 1])
        return list(range(next(wrong, len(tokens))))


def make_walk(runs: Sequence[tuple[str, int, int]], page_size: int, mask: bool, right: float, seed: int) -> Walk:
    """runs: for each sequence "tree" or "chain", rows, committed tokens. right: how often a row's choice is one of its children."""
    rng = random.Random(seed)
    parents = [causal_run(n) if kind == "chain" else [-1, *(rng.randrange(row) for row in range(1, n))] for kind, n, _ in runs]
    tokens, chosen = [], []
    for own in parents:
        children = [[row for row, parent in enumerate(own) if parent == above] for above in range(len(own))]
        token = [rng.randrange(90) for _ in own]
        for brothers in children:
            for row, value in zip(brothers, rng.sample(range(90), len(brothers)), strict=True):
                token[row] = value
        tokens.append(token)
        chosen.append([token[rng.choice(c)] if c and rng.random() < right else rng.randrange(90, 99) for c in children])
    lengths = [length for _, _, length in runs]
    needs = [-(-(length + n) // page_size) for _, n, length in runs]
    pages = rng.sample(range(sum(needs) + 3), sum(needs))
    tables = [[pages.pop() for _ in range(need)] for need in needs]
    slots = [
        [table[i // page_size] * page_size + i % page_size for i in range(length + n)]
        for table, (_, n, length) in zip(tables, runs, strict=True)
    ]
    words = [w for own in parents for w in (mask_words(own) if len(own) <= 64 else [0x5A5A5A5A] * len(own))]
    starts = [0, *itertools.accumulate(map(len, parents))]
    arguments = (
        torch.tensor([[*itertools.chain(*tokens)]]),
        torch.tensor([*itertools.chain(*chosen)]),
        torch.tensor(words) if mask else None,
        torch.tensor([table + [0] * (max(needs) - len(table)) for table in tables], dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        page_size,
    )
    return Walk(parents, tokens, chosen, lengths, slots, arguments)


@st.composite
def walks(draw: st.DrawFn) -> Walk:
    mask = draw(st.booleans())
    kinds = st.sampled_from(["tree", "chain"]) if mask else st.just("chain")
    runs = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(kinds)
        rows = draw(st.one_of(st.integers(1, 20), st.integers(60, 64) if kind == "tree" else st.integers(60, 80)))
        runs.append((kind, rows, draw(st.integers(0, 70))))
    return make_walk(runs, draw(st.sampled_from([1, 4, 16, 64])), mask, draw(st.sampled_from([0.5, 0.95, 1.0])), draw(st.integers(0, 999)))


@settings(max_examples=150, deadline=None)
@given(walk=walks())
def test_greedy_walk_reference_walks_and_moves_as_simulated(walk: Walk) -> None:
    leaf, lengths, moves = greedy_walk_reference(*walk.arguments)
    starts, total = walk.arguments[5].tolist(), sum(map(len, walk.parents))
    assert (leaf.dtype, lengths.dtype, moves.dtype, moves.shape) == (torch.int64, torch.int32, torch.int64, (2, total))
    before = {slot: (s, i) for s, slots in enumerate(walk.slots) for i, slot in enumerate(slots)}
    content = dict(before)
    for source, target in moves.t().tolist():
        assert (source < 0) == (target < 0)
        if source >= 0:
            content[target] = content[source]
    for s, length in enumerate(walk.lengths):
        rows = walk.walked(s)
        assert leaf[s] == starts[s] + rows[-1]
        assert lengths[s] == length + len(rows)
        slots = walk.slots[s]
        assert [content[slot] for slot in slots[:length]] == [(s, i) for i in range(length)]
        assert [content[slot] for slot in slots[length : length + len(rows)]] == [(s, length + row) for row in rows]
        assert all(content[slot] == before[slot] for slot in slots[length + len(rows) :])  # nothing else is touched


@settings(max_examples=200, deadline=None)
@given(walk=walks())
def test_greedy_walk_kernel_agrees_with_the_reference(kernels: cpu_build.CpuKernels, walk: Walk) -> None:
    for ours, theirs in zip(greedy_walk(*walk.arguments), greedy_walk_reference(*walk.arguments), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_the_last_row_of_a_full_tree_is_walked_to(kernels: cpu_build.CpuKernels) -> None:
    """Row 63: the sign bit of a mask's word."""
    walk = make_walk([("tree", 64, 5), ("chain", 64, 0), ("chain", 65, 3)], 16, True, 1.0, 0)
    parents = walk.parents[0]
    path = path_to(parents, 63)[::-1]
    for above, row in itertools.pairwise(path):
        walk.arguments[1][above] = walk.tokens[0][row]
    for op in (greedy_walk_reference, greedy_walk):
        leaf, lengths, _ = op(*walk.arguments)
        assert leaf.tolist() == [63, 127, 192]
        assert lengths.tolist() == [5 + len(path), 64, 68]


# --- drafting in tensors --------------------------------------------------------------------------------------------------------

Path = tuple[int, ...]
Shares = Callable[[Path], Tensor]
"""Logarithms of the probabilities behind a path, ``[V]``."""

SHAPES = [TreeShape(*numbers) for numbers in itertools.product(range(1, 5), range(1, 5), range(2, 17))]


def grown(shares: Shares, ids: list[int] | None, shape: TreeShape) -> list[tuple[Path, float]]:
    """The tree that `draft` is to find, as paths with their scores: beams of `topk` paths, of all candidates the most probable."""
    frontier: list[tuple[Path, float]] = [((), 0.0)]
    candidates: list[tuple[Path, float]] = []
    for _ in range(shape.num_steps):
        level = []
        for path, score in frontier:
            row = shares(path).tolist()
            best = sorted(range(len(row)), key=lambda i: (-row[i], i))[: shape.topk]
            level += [((*path, i if ids is None else ids[i]), score + row[i]) for i in best]
        candidates += level
        frontier = sorted(level, key=lambda c: -c[1])[: shape.topk]
    return sorted(candidates, key=lambda c: -c[1])[: shape.num_draft_tokens - 1]


def paths_of(tokens: Sequence[int], parents: Sequence[int]) -> list[Path]:
    paths: list[Path] = []
    for token, parent in zip(tokens, parents, strict=True):
        assert -1 <= parent < len(paths)  # parents come before children
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == len(paths)  # siblings are distinct
    return paths


def assert_is_grown(tree: DraftTree, scores: Sequence[float], expected: list[tuple[Path, float]], tolerance: float = 1e-4) -> None:
    paths = paths_of(tree.tokens, tree.parents)
    assert set(paths) == {path for path, _ in expected}
    assert [dict(expected)[path] for path in paths] == pytest.approx(scores, abs=tolerance)
    assert all(score <= (scores[parent] if parent >= 0 else 0.0) for score, parent in zip(scores, tree.parents, strict=True))
    assert paths[0] == expected[0][0]  # the drafter is judged by its first node


class Toy:
    """A head whose hidden state is a number that stands for (sequence, layer, path): it can't but notice rows and masks that don't fit."""

    def __init__(self, vocab: int, seed: int, layers: int = 1) -> None:
        self.vocab, self.seed, self.layers = vocab, seed, layers
        self.known: list[tuple[int, int, Path]] = []
        self.rows: list[int] = []
        self.run: list[int] = []

    def number(self, s: int, layer: int, path: Path) -> int:
        self.known.append((s, layer, path))
        return len(self.known) - 1

    def hidden(self, sequences: int) -> list[Tensor]:
        return [torch.tensor([[[self.number(s, layer, ())]] for s in range(sequences)]) for layer in range(self.layers)]

    def share(self, s: int, path: Path) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, s, path)) % 2**40)
        return (2 * torch.randn(self.vocab, generator=generator)).log_softmax(-1)

    def step(self, layer: int, tokens: Tensor, hidden: Tensor, masks: Tensor) -> Tensor:
        self.rows.append(tokens.shape[1])
        self.run.append(layer)
        assert tokens.shape == masks.shape == hidden.shape[:2]
        out = []
        for s in range(tokens.shape[0]):
            row_tokens, words = tokens[s].tolist(), masks[s].tolist()
            out.append([])
            for row, word in enumerate(words):
                seen = [j for j in range(64) if word >> j & 1]
                assert seen[-1] == row
                assert all(words[j] & ~word == 0 for j in seen)  # what an ancestor sees
                path = tuple(row_tokens[j] for j in seen)
                feeding = layer if len(path) > layer and layer == self.layers - 1 else layer - 1
                assert self.known[hidden[s, row, 0]] == (s, feeding, path[:-1])  # its parent's hidden state
                out[-1].append([self.number(s, layer, path)])
        return torch.tensor(out)

    def logits(self, hidden: Tensor, layer: int) -> Tensor:
        """Log-probabilities and a constant of each row's own."""
        rows: list[list[Tensor]] = []
        for of_sequence in hidden.tolist():
            rows.append([])
            for (number,) in of_sequence:
                s, made_by, path = self.known[number]
                assert made_by == layer == min(len(path), self.layers - 1)
                rows[-1].append(self.share(s, path) + number % 7)
        return torch.stack([torch.stack(of_sequence) for of_sequence in rows])


@pytest.mark.parametrize("ids", [None, [2, 3, 5, 8, 13, 40, 41, 77, 90]], ids=["all tokens", "a draft vocabulary"])
@pytest.mark.parametrize(("steps", "layers"), [(steps, layers) for steps in range(1, 5) for layers in range(1, steps + 1)])
def test_a_tree_is_the_most_probable_candidates_of_a_beam(steps: int, layers: int, ids: list[int] | None) -> None:
    for number, shape in enumerate(s for s in SHAPES if s.num_steps == steps):
        toy = Toy(12 if ids is None else len(ids), number, layers)
        logits = [functools.partial(toy.logits, layer=layer) for layer in range(layers)]
        drafted = draft(toy.hidden(3), toy.step, logits, None if ids is None else torch.tensor(ids), shape)
        tokens, parents, scores = drafted
        assert tokens.shape == parents.shape == scores.shape == (3, shape.nodes)
        assert (tokens.dtype, parents.dtype, scores.dtype) == (torch.int64, torch.int64, torch.float32)
        assert toy.rows == [d * shape.topk for d in range(1, steps)]
        assert toy.run == [min(d, layers - 1) for d in range(1, steps)]
        assert shape.rows == (toy.rows[-1] if toy.rows else 0)
        for s, tree in enumerate(trees(drafted)):
            DraftTree(tree.tokens, tree.parents, tree.probs)  # keeps the rules
            assert_is_grown(tree, scores[s].tolist(), grown(lambda path, s=s, toy=toy: toy.share(s, path), ids, shape))
            assert tree.probs == pytest.approx([math.exp(score) for score in scores[s].tolist()], rel=1e-5)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.nodes >= s.num_steps and s.topk > 1], ids=str)
def test_in_a_tie_parents_come_before_children(shape: TreeShape) -> None:
    """A head that is certain: one path of tokens has a logarithm of exactly 0, all others are equally improbable."""

    def logits(hidden: Tensor) -> Tensor:
        out = torch.full((*hidden.shape[:2], 6), -1000.0)
        out[..., 4] = 1000.0
        return out

    def step(layer: int, tokens: Tensor, hidden: Tensor, masks: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 1)

    tokens, parents, scores = draft([torch.zeros(1, 1, 1)], step, [logits], None, shape)
    paths = paths_of(tokens[0].tolist(), parents[0].tolist())
    certain = [path for path, score in zip(paths, scores[0].tolist(), strict=True) if score == 0.0]
    assert certain == [(4,) * n for n in range(1, shape.num_steps + 1)]


def test_without_any_preference_a_tree_is_still_a_tree() -> None:
    """All candidates of a level are equal, and with one token in the vocabulary all of them are certain."""
    for shape in SHAPES:
        for vocab in (1, 9) if shape.topk == 1 else (9,):
            tokens, parents, scores = draft(
                [torch.zeros(2, 1, 1)],
                lambda layer, tokens, hidden, masks: torch.zeros(*tokens.shape, 1),
                [lambda hidden, vocab=vocab: torch.zeros(*hidden.shape[:2], vocab)],
                None,
                shape,
            )
            for s in range(2):
                paths = paths_of(tokens[s].tolist(), parents[s].tolist())
                assert scores[s].tolist() == pytest.approx([-len(path) * math.log(vocab) for path in paths], abs=1e-5)


# --- the eager drafter ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def shares_from_scratch(head: MtpHead, hidden: Tensor, known: list[int], path: Path) -> Tensor:
    """The head's layers over all pairs of `known` (``hidden [len(known) - 1, H]``) and, token by token, over those of `path`: no KV."""

    def over(layer: MtpHead, pairs: list[int], rows: Tensor) -> Tensor:
        i = torch.arange(len(pairs))
        mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - (layer.window or len(pairs)))
        return layer(torch.tensor([pairs]), rows[None], None, i[None], mask[None, None])[0]

    n, tokens, fed = len(known) - 1, [*known[1:], *path], hidden
    last = min(len(path), len(head.chain) - 1)
    for k, layer in enumerate(head.chain[: last + 1]):  # row t of layer k: what layer k - 1 made of row t, and the token k places on
        rows = fed if k == 0 else out  # noqa: F821
        out = over(layer, tokens[k : k + n], rows)
    for count in range(n + 1, n + 1 + len(path) - last):  # the last layer again, behind its own
        rows = torch.cat([rows, out[-1:]])
        out = over(layer, tokens[last : last + count], rows)
    logits = layer.logits(out[-1])
    return (logits if head.draft_ids is None else logits[head.draft_ids]).float().log_softmax(-1)


def several_layers(target: Any, layers: int = 1) -> MtpHead:
    head = random_head(target)
    for i in range(1, layers):
        head.further.append(random_head(target, seed=i))
    return head


CASES: dict[str, tuple[Any, ...]] = {
    "plain": (TreeShape(3, 4, 9), None, None),
    "chain": (TreeShape(4, 1, 5), None, None),
    "one step": (TreeShape(1, 5, 4), None, None),
    "window": (TreeShape(4, 2, 12), 3, None),
    "draft vocabulary": (TreeShape(3, 3, 12), None, list(range(1, VOCAB, 4))),
    "window and draft vocabulary": (TreeShape(3, 2, 7), 5, list(range(60, 20, -1))),
    "two layers": (TreeShape(4, 2, 12), None, None, 2),
    "three layers, window": (TreeShape(3, 3, 9), 4, None, 3),
    "three layers, a chain": (TreeShape(5, 1, 6), None, list(range(1, VOCAB, 2)), 3),
    "more layers than steps": (TreeShape(2, 2, 6), None, None, 3),
}


def within_depth(deepest: int, rng: random.Random) -> tuple[int, ...]:
    """Parents of nine nodes, none of them deeper than `deepest`."""
    parents, depths = list[int](), list[int]()
    for i in range(9):
        parent = rng.choice([p for p in range(-1, i) if p < 0 or depths[p] < deepest])
        parents.append(parent)
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return tuple(parents)


@pytest.mark.parametrize("case", CASES)
def test_drafted_trees_equal_a_recomputation_from_scratch(case: str) -> None:
    shape, window, ids, *layers = CASES[case]
    target, rng = tiny_target(), random.Random(case)
    head = several_layers(target, *layers)
    head.chain[-1].window = window
    if ids is not None:
        head.restrict(torch.tensor(ids))
    drafter = MtpDrafter(head, shape)
    known = {seq: [rng.randrange(VOCAB) for _ in range(n)] for seq, n in ((0, 11), (1, 1))}
    for seq, prompt in known.items():
        drafter.add(seq, prompt)
    for turn, count in enumerate((1, 3, 1, 4)):
        for seq, tokens in known.items():
            tokens += [rng.randrange(VOCAB) for _ in range(count)]
            hidden = true_hidden(target, tokens[:-1])
            drafter.accept(seq, tokens[-count:], hidden[0 if turn == 0 else -count :])
        proposed = drafter.propose([1, 0], [63, 63])
        for seq, tree in zip([1, 0], proposed, strict=True):
            hidden, tokens = true_hidden(target, known[seq][:-1]), known[seq]

            def shares(path: Path, hidden: Tensor = hidden, tokens: list[int] = tokens) -> Tensor:
                return shares_from_scratch(head, hidden, tokens, path)

            ordered = None if ids is None else sorted(ids)
            assert len(tree) == shape.nodes
            scores = torch.tensor(tree.probs).log().tolist()
            assert_is_grown(tree, scores, grown(shares, ordered, shape), 2e-3)
            assert drafter.scores(seq, tree).tolist() == pytest.approx(scores, abs=2e-3)
            # A tree of somebody else's, with improbable tokens, deeper than the head drafts; and what is asked leaves no trace.
            allowed = ordered or list(range(VOCAB))
            deepest = 9 if len(head.chain) <= shape.num_steps else shape.num_steps
            parents = within_depth(deepest, rng)
            other = DraftTree(tuple(rng.sample(allowed, 9)), parents, (1.0,) * 9)
            expected = []
            for path, parent in zip(paths_of(other.tokens, parents), parents, strict=True):
                expected.append((expected[parent] if parent >= 0 else 0.0) + float(shares(path[:-1])[allowed.index(path[-1])]))
            assert drafter.scores(seq, other).tolist() == pytest.approx(expected, abs=2e-3)
            assert drafter.propose([seq], [63]) == [tree]
            assert drafter.propose([seq], [2]) == [tree.truncated(2)]


# --- options and the draft vocabulary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "max_nodes", "expected"),
    [
        ({}, 15, (3, 4, 8)),
        ({}, 4, (3, 4, 5)),
        ({"num_steps": 20}, 63, (20, 3, 8)),
        ({"num_steps": 63}, 63, (63, 1, 64)),
        ({"topk": 1}, 15, (3, 1, 4)),
        ({"topk": 1, "num_steps": 30}, 15, (30, 1, 16)),
        ({"topk": 8, "num_steps": 8, "num_draft_tokens": 64}, 63, (8, 8, 64)),
        ({"topk": 8, "num_steps": 8, "num_draft_tokens": 64}, 15, (8, 8, 16)),
        ({"num_draft_tokens": 3, "topk": 1}, 15, (3, 1, 3)),
        ({"num_draft_tokens": 2, "num_steps": 1}, 1, (1, 4, 2)),
    ],
)
def test_shapes_follow_the_options(options: dict[str, Any], max_nodes: int, expected: tuple[int, int, int]) -> None:
    shape = MtpOptions(**options).shape(max_nodes)
    assert shape == TreeShape(*expected)
    assert 1 <= shape.nodes <= max_nodes
    assert shape.rows < 64


def test_the_numbers_of_a_shape() -> None:
    chain, tree, flat = TreeShape(3, 1, 8), TreeShape(3, 4, 8), TreeShape(1, 4, 64)
    assert [s.candidates for s in (chain, tree, flat)] == [3, 4 + 2 * 16, 4]
    assert [s.nodes for s in (chain, tree, flat)] == [3, 7, 4]
    assert [s.rows for s in (chain, tree, flat)] == [2, 8, 0]


@pytest.mark.parametrize(
    "options",
    [
        *({"topk": topk} for topk in (0, -1, 65, 1.0, True, "4")),
        {"topk": 8, "num_steps": 9},
        *({"num_draft_tokens": n} for n in (0, 1, 65, 8.0, True)),
        *({"num_steps": n} for n in (0, 64, 2.0)),
    ],
    ids=str,
)
def test_shapes_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(OptionError, match=f"^{name}={value!r}: "):
        MtpOptions(**options)


@pytest.fixture
def target() -> Any:
    return tiny_target()


def test_a_draft_vocabulary_is_taken_from_beside_the_head_or_from_where_it_is_said_to_be(target: Any, tmp_path: Any) -> None:
    file = save_head(random_head(target), tmp_path / "head")
    assert load_head(file, target, "auto").draft_ids is None  # there is none
    ids, others = torch.tensor([40, 3, 17]), torch.tensor([1, 2])
    assert save_draft_vocab(ids, tmp_path / "head") == tmp_path / "head" / DRAFT_VOCAB
    (tmp_path / "other").mkdir()
    elsewhere = save_draft_vocab(others, tmp_path / "other")
    assert torch.equal(read_draft_vocab(elsewhere), others)
    for head in (file, file.parent):
        assert load_head(head, target, None).draft_ids is None
        for said, expected in (("auto", ids), (elsewhere, others), (elsewhere.parent, others), (str(elsewhere), others)):
            loaded = load_head(head, target, said)
            assert torch.equal(loaded.draft_ids, expected.sort().values)
            hidden = torch.randn(1, 3, 32)
            torch.testing.assert_close(loaded.draft_logits(hidden), loaded.logits(hidden)[..., loaded.draft_ids])
            assert not any("draft" in name for name in loaded.state_dict())
    drafts = {name: load_drafter(MtpOptions(head=file, topk=2, min_token_prob=0, draft_vocab=name), 15, target) for name in ("auto", None)}
    for drafter in drafts.values():
        drafter.add(0, [1, 2])
        drafter.accept(0, [3], true_hidden(target, [1, 2]))
    assert set(drafts["auto"].propose([0], [15])[0].tokens) <= {40, 3, 17}
    assert not set(drafts[None].propose([0], [15])[0].tokens) <= {40, 3, 17}


BAD_VOCABULARIES = {
    "an id beyond the vocabulary": torch.tensor([1, VOCAB]),
    "a negative id": torch.tensor([-1, 3]),
    "an id twice": torch.tensor([4, 4]),
    "no id": torch.tensor([], dtype=torch.int64),
    "int32": torch.tensor([1, 2], dtype=torch.int32),
    "floating point": torch.tensor([1.0, 2.0]),
    "two dimensions": torch.tensor([[1, 2]]),
}


@pytest.mark.parametrize("case", BAD_VOCABULARIES)
def test_a_wrong_draft_vocabulary_is_refused(case: str, target: Any, tmp_path: Any) -> None:
    ids = BAD_VOCABULARIES[case]
    file = save_head(random_head(target), tmp_path)
    save_draft_vocab(ids, tmp_path)
    with pytest.raises(HeadError, match=rf"different int64 ids \[N\] below {VOCAB}, got {ids.dtype} .*{len(ids)}"):
        load_head(file, target, "auto")


def test_a_draft_vocabulary_smaller_than_topk_bounds_it(target: Any, tmp_path: Any) -> None:
    save_head(MtpHead.from_target(target), tmp_path)
    save_draft_vocab(torch.tensor([5, 6]), tmp_path)
    drafter = load_drafter(MtpOptions(head=tmp_path, min_token_prob=0), 15, target)
    assert drafter.shape.topk == 2
    drafter.add(0, [1, 2])
    drafter.accept(0, [3], torch.randn(2, drafter.head.hidden_size))
    assert {*drafter.propose([0], [15])[0].tokens} == {5, 6}


def test_an_unreadable_draft_vocabulary_is_named(target: Any, tmp_path: Any) -> None:
    file = save_head(random_head(target), tmp_path / "head")
    (tmp_path / "broken").write_bytes(b"not safetensors at all")
    save_file({"ids": torch.tensor([1])}, tmp_path / "misnamed")
    for said in (tmp_path / "nowhere", tmp_path, tmp_path / "broken", tmp_path / "misnamed"):
        with pytest.raises(HeadError, match=r"draft vocabulary .* can't be read.*specfx train mtp") as caught:
            load_head(file, target, said)
        assert str(said) in str(caught.value)
        with pytest.raises(HeadError):
            specfx.speculate(target, "mtp", head=file, draft_vocab=said)
    assert "generate" not in vars(target)
