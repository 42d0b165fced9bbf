"""How Inductor lowers `specfx::tree_attention_` on CUDA devices.

Where Inductor may measure (`max_autotune`) and the numbers of rows and sequences are fixed, the op becomes

1. `specfx::tree_append_`, which moves and appends, and
2. attention over the committed pages and over the new rows, taken from the op's inputs: the fastest of the Triton template below (one
   launch, a prefix in one part, with what follows fused into its epilogue) and of the plain kernels (also with the prefix in parts, which
   takes a second launch), each over the blocks, warps and stages of `candidates`.

The template does not append as the plain kernel does: Inductor has taken templates that write to their inputs only of late, and would
measure them on each other's leavings. Elsewhere the op stays one call, which chooses by rule from the sizes at hand: what is tuned for
one number of rows is wrong for another, and one artifact serves prompts and single tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from specfx import _compat
from specfx.kernels import triton_attend, triton_common
from specfx.kernels.tree_attention import MASK_BITS, tree_append_, tree_attention_
from specfx.kernels.triton_attention import logit_factors, tree_attend_triton
from specfx.kernels.triton_common import power_of_two
from specfx.kernels.triton_config import Config, candidates, default_config, device_properties

SPLITS = (1, 2, 4, 8, 16)
"""Parts of the prefix that are tried."""

NAMES = ("Q", "K", "V", "PAGE_TABLE", "LENGTHS", "ROW_STARTS", "K_PAGES", "V_PAGES")
OPTIONAL = ("TREE_MASK", "SINKS")


def functions() -> str:
    """A hash of what the template imports."""
    return hashlib.sha256("".join(map(inspect.getsource, (triton_attend, triton_common))).encode()).hexdigest()


def source(has_mask: bool, has_sinks: bool) -> str:
    """The template. A hash of the functions that it imports stands in the text, by which Inductor knows compiled and measured code."""
    names = [*NAMES, *itertools.compress(OPTIONAL, (has_mask, has_sinks))]
    strides = ", ".join(f'{{{{stride("{name}", {i})}}}}' for name in "QKV" for i in (0, 1))
    return f"""
{{{{def_kernel({", ".join(f'"{name}"' for name in names)})}}}}
    # functions: {functions()}
    block, group = tl.program_id(0), tl.program_id(1)
    sequence, row0, rows, length, first_query = find_block(block, LENGTHS, ROW_STARTS, SEQUENCES, SHARE, BLOCK_M)
    if first_query >= rows * SHARE:
        return
    row, at_row, head, live = block_rows(first_query, row0, rows, group, SHARE, BLOCK_M)
    acc, log = attend_rows(
        Q, K, V, {"TREE_MASK" if has_mask else "None"}, PAGE_TABLE + sequence.to(tl.int64) * {{{{stride("PAGE_TABLE", 0)}}}},
        K_PAGES, V_PAGES, {"SINKS" if has_sinks else "None"}, SCALE, CAP, WINDOW, SKIP,
        first_query, row0, rows, length, row, at_row, head, live, group, 0,
        {strides},
        GROUPS, SHARE, DK, DV, PAGE_SIZE, {has_mask}, WINDOW > 0, SKIP > 0, CAP != 0, {has_sinks}, False,
        BLOCK_M, BLOCK_N, BLOCK_DK, BLOCK_DV, 1,
    )
    idx_t = at_row[:, None]
    idx_h = head[:, None]
    idx_d = tl.arange(0, BLOCK_DV)[None, :]
    mask = live[:, None] & (idx_d < DV)
    {{{{store_output(("idx_t", "idx_h", "idx_d"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_DV"))}}}}

from specfx.kernels.triton_attend import attend_rows, block_rows, find_block
"""


def grid(rows: Any, sequences: Any, groups: Any, share: Any, meta: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (rows * share // meta["BLOCK_M"] + sequences, groups, 1)


@cache
def template(has_mask: bool, has_sinks: bool) -> Any:
    name = "_".join(["specfx_tree_attend", *itertools.compress(("masked", "sinks"), (has_mask, has_sinks))])
    return _compat.triton_template(name, grid, source(has_mask, has_sinks))


def specfx_tree_attend(*tensors: Tensor, has_mask: bool, has_sinks: bool, config: tuple[int, ...], **constants: Any) -> Tensor:
    """The plain kernels as a choice. tensors: in the order of the template; config: a `Config`."""
    q, k, v, page_table, lengths, row_starts, k_pages, v_pages, *more = tensors
    tree_mask = more[0] if has_mask else None
    sinks = more[-1] if has_sinks else None
    return tree_attend_triton(
        q, k, v, tree_mask, page_table, lengths, row_starts, k_pages, v_pages, sinks=sinks, config=Config(*config), **constants
    )


@cache
def plain() -> Any:
    return _compat.extern_choice(specfx_tree_attend)


def example(node: Any, name: str, rows: int, sequences: int, width: int, pages: int, page_size: int) -> Tensor:
    """An input to measure with, in the place of an IR node: sequences with equally many rows, each of them a chain, behind as long a
    prefix as `width` pages hold, in pages that are strewn over the pool."""
    starts = [s * rows // sequences for s in range(sequences + 1)]
    counts = [b - a for a, b in itertools.pairwise(starts)]
    strewn = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    made = {
        "PAGE_TABLE": strewn[torch.arange(sequences * width) % pages].view(sequences, width).int(),
        "LENGTHS": torch.full((sequences,), max(width * page_size - max(counts), 0), dtype=torch.int32),
        "ROW_STARTS": torch.tensor(starts, dtype=torch.int32),
        "TREE_MASK": torch.cat([(2 << torch.arange(n).clamp(max=MASK_BITS - 1)) - 1 for n in counts]),
    }
    return made[name].to(node.get_device())


EXAMPLES = ("PAGE_TABLE", "LENGTHS", "ROW_STARTS", "TREE_MASK")
"""The inputs that may not be random numbers."""


def lower(
    q: Any, k: Any, v: Any, tree_mask: Any, page_table: Any, lengths: Any, row_starts: Any, moves: Any, k_pages: Any, v_pages: Any,
    scale: float, window: int = 0, softcap: float = 0.0, sinks: Any = None, skip: int = 0,
) -> Any:  # fmt: skip
    """The op as IR, or None if it shall stay a call. Arguments are the op's, with IR nodes for tensors."""
    if not (_compat.tuning() and _compat.is_static(q) and _compat.is_static(lengths)):
        return None
    (rows, heads, dk), (sequences,) = _compat.hinted_sizes(q), _compat.hinted_sizes(lengths)
    (_, groups, dv), (pages, page_size, *_) = _compat.hinted_sizes(v), _compat.hinted_sizes(k_pages)
    width = _compat.hinted_sizes(page_table)[1]
    if rows == 0 or sequences == 0:
        return None
    _compat.emit_call(tree_append_, k, v, page_table, lengths, row_starts, moves, k_pages, v_pages)

    has_mask, has_sinks = tree_mask is not None, sinks is not None
    names = [*NAMES, *itertools.compress(OPTIONAL, (has_mask, has_sinks))]
    given = (q, k, v, page_table, lengths, row_starts, k_pages, v_pages, *(x for x in (tree_mask, sinks) if x is not None))
    inputs = [_compat.realized(x) for x in given]
    layout = _compat.contiguous_output(q, [rows, heads, dv])
    factor, cap = logit_factors(scale, softcap)
    constants: dict[str, Any] = {
        "GROUPS": groups,
        "SHARE": heads // groups,
        "DK": dk,
        "DV": dv,
        "PAGE_SIZE": page_size,
        "SEQUENCES": sequences,
    }
    constants |= {
        "SCALE": factor,
        "CAP": cap,
        "WINDOW": window,
        "SKIP": skip,
        "BLOCK_DK": power_of_two(dk, 16),
        "BLOCK_DV": power_of_two(dv, 16),
    }
    choices: list[Any] = []
    shape = (rows, sequences, groups, heads // groups)
    for config in tried(q.get_device(), shape, dk, dv, q.get_dtype(), width, page_size):
        if config.SPLITS == 1:
            template(has_mask, has_sinks).maybe_append_choice(
                choices, input_nodes=inputs, layout=layout, call_sizes=list(shape),
                num_warps=config.num_warps, num_stages=config.num_stages, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, **constants,
            )  # fmt: skip
        cut = (config.BLOCK_M, config.BLOCK_N, config.SPLITS, config.num_warps, config.num_stages)
        kept = {"scale": scale, "window": window, "softcap": softcap, "skip": skip}
        choices.append(plain().bind(inputs, layout, has_mask=has_mask, has_sinks=has_sinks, config=cut, **kept))
    sizes = {"rows": rows, "sequences": sequences, "width": width, "pages": pages, "page_size": page_size}
    made = {at: partial(example, name=name, **sizes) for at, name in enumerate(names) if name in EXAMPLES}
    return _compat.fastest(f"specfx_tree_attend_{functions()[:12]}", choices, inputs, layout, made)


def tried(
    device: torch.device, shape: tuple[int, int, int, int], dk: int, dv: int, dtype: torch.dtype, width: int, page_size: int
) -> list[Config]:
    """The configurations to measure: the default, which is the first, with its prefix in one part too; and those that fit into shared
    memory, with blocks about as large as the queries of a sequence, and the prefix in one part or in about as many as fill the GPU.

    shape: rows, sequences, groups, share. width: of the page table.
    """
    rows, sequences, groups, share = shape
    properties: Any = torch.cuda.get_device_properties(device)
    queries = -(-rows // sequences) * share
    fitting = candidates(dk, dv, dtype, properties.shared_memory_per_block_optin)
    sizes = sorted({c.BLOCK_M for c in fitting if power_of_two(queries, 16) >= c.BLOCK_M})[-2:]
    default = default_config(
        max(dk, dv), dtype, rows, sequences, page_size, groups=groups, share=share, pages=width, **device_properties(device)
    )
    configs = [default, dataclasses.replace(default, SPLITS=1)]
    for c in fitting:
        if c.BLOCK_M in sizes:
            programs = sequences * groups * -(-queries // c.BLOCK_M)
            splits = [s for s in SPLITS if width * page_size >= 2 * s * c.BLOCK_N and s * programs <= 2 * properties.multi_processor_count]
            configs += [dataclasses.replace(c, SPLITS=s) for s in sorted({1, *splits[-2:]})]
    return list(dict.fromkeys(configs))


@cache
def register() -> None:
    """Let Inductor lower the op so; again: nothing. On a CPU nothing changes."""
    plain()  # generated code calls it by name, also where it comes from a cache
    _compat.lower_on_cuda(tree_attention_, lower)
