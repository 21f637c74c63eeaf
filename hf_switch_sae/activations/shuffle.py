"""The order of rows: it depends on a seed alone, so it is the same on every machine and resume."""

from __future__ import annotations

import numpy as np
import psutil
import torch
from torch import Tensor

from hf_switch_sae.processes import processes_here

_SHARE, _MOST = 8, 2 << 30
_ROWS_ON_CPU, _ROWS_ELSEWHERE = 1 << 16, 1 << 19


def order_of(rows: int, *seed: int) -> Tensor:
    """[rows] int64: a permutation that depends only on `rows` and `seed` (numbers >= 0)."""
    # NumPy mixes several numbers into one well-spread state; torch takes 63 bits of it
    state = int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(state & (2**63 - 1))
    return torch.randperm(rows, generator=generator, device="cpu")


def default_buffer_bytes(device: torch.device) -> int:
    """An eighth of the device's free memory, rounded down to a power of two, at most 2 GiB.

    Several processes on one machine divide the main memory among them.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // processes_here()
    share = max(1 << 20, min(_MOST, free // _SHARE))
    return int(1 << (share.bit_length() - 1))


def default_buffer_rows(device: torch.device) -> int:
    """The most rows to compute before the first batch, unless `buffer_bytes` is given."""
    return _ROWS_ON_CPU if device.type == "cpu" else _ROWS_ELSEWHERE
