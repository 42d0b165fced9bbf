"""How the attention kernel (`specfx.kernels.triton_attention`) is cut: what may be tried, and what is taken where nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specfx.kernels.triton_common import power_of_two


@dataclass(frozen=True)
class Config:
    """How `_attend` is cut. BLOCK_M: queries (rows times heads of a group) of a program, at least 16; BLOCK_N: keys at a time, at least
    16; both powers of two. SPLITS: parts of the prefix, each a program. num_warps, num_stages: Triton's."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    SPLITS: int = 1
    num_warps: int = 4
    num_stages: int = 2

    def shared_memory(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """An upper bound of the bytes of shared memory that a program takes."""
        dk, dv = power_of_two(key_dim, 16), power_of_two(value_dim, 16)
        queries, weights, keys = self.BLOCK_M * dk, self.BLOCK_M * self.BLOCK_N, self.BLOCK_N * (dk + dv)
        return dtype.itemsize * (queries + weights + max(1, self.num_stages) * keys) + 8 * self.BLOCK_N * self.num_stages + 1024


CONFIGS = tuple(
    Config(m, n, 1, warps, stages)
    for m, n, warps, stages in [
        (16, 32, 2, 3), (16, 64, 4, 3), (16, 128, 4, 2), (32, 32, 4, 3), (32, 64, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3),
        (64, 128, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (16, 16, 8, 1), (16, 16, 8, 2), (16, 32, 8, 1), (32, 32, 8, 1),
        (64, 16, 8, 2),
    ]
)  # fmt: skip
"""What an autotuner may try, with SPLITS of its own; see `candidates`."""


def candidates(key_dim: int, value_dim: int, dtype: torch.dtype, shared_memory: int) -> list[Config]:
    """Those of `CONFIGS` that fit into `shared_memory` bytes (a GPU's `shared_memory_per_block_optin`). float32, whose IEEE products
    don't run on tensor cores, takes the small ones: the others are slow to compile and spill."""
    most = 32 * 32 if dtype == torch.float32 else 128 * 128
    return [c for c in CONFIGS if most >= c.BLOCK_M * c.BLOCK_N and c.shared_memory(key_dim, value_dim, dtype) <= shared_memory]


def default_config(
    head_dim: int,
    dtype: torch.dtype,
    rows: int,
    sequences: int,
    page_size: int,
    *,
    groups: int = 1,
    share: int = 1,
    pages: int = 0,
    capability: int = 80,
    processors: int = 132,
) -> Config:
    """A configuration by rule of thumb, from what the host knows: blocks whose registers don't spill, otherwise not measured on a GPU.

    head_dim: the larger of keys' and values'. rows: of all sequences. groups: KV heads; share: query heads of each. pages: width of the
    page table, which bounds the prefix. capability: 80 for sm_80. The prefix is split to occupy all `processors` with one program each,
    as long as a part may have four blocks of keys.
    """
    width = power_of_two(head_dim, 16)
    queries = -(-rows // max(sequences, 1)) * share
    if dtype == torch.float32:
        block_m = min(power_of_two(queries, 16), 32 if width <= 64 else 16)
        block_n = 32 if width <= 64 else 16
        num_warps, num_stages = 8, 1 if width <= 128 else 2
    else:
        block_m = min(power_of_two(queries, 16), 128 if width <= 128 else 64)
        roomy = capability >= 90 or block_m <= 32  # from sm_90 on, products take their operands from shared memory
        block_n = 64 if width <= 64 else (64 if roomy else 32) if width <= 128 else (32 if roomy else 16)
        if block_m > 32 and page_size % block_n:  # keys of several pages: each has an address of its own
            block_n = max(block_n // 2, 16)
        num_warps, num_stages = 8 if block_m == 128 or block_m * width >= 64 * 256 else 4, 2
    programs = groups * sequences * -(-queries // block_m)
    splits = min(processors // max(programs, 1), pages * page_size // (4 * block_n), 16)
    return Config(block_m, block_n, 1 << max(splits, 1).bit_length() - 1, num_warps, num_stages)


def device_properties(device: torch.device) -> dict[str, int]:
    """The arguments of `default_config` that belong to the device."""
    if device.type != "cuda":
        return {"capability": 80, "processors": 1}
    properties = torch.cuda.get_device_properties(device)
    return {"capability": 10 * properties.major + properties.minor, "processors": properties.multi_processor_count}
