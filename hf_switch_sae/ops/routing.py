"""Tokens -> the order in which experts work: one stable sort, then contiguous rows for each expert.

A pair is one (token, expert) visit; with t experts per token there are n * t pairs, pair p
belonging to token p // t.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Visit(NamedTuple):
    """One expert's share of a batch."""

    expert: int
    pairs: Tensor
    """[n_e] int64, rising: the pairs that visit this expert."""


def visits(expert_ids: Tensor, num_experts: int) -> Iterator[Visit]:
    """Group (token, expert) pairs by expert; experts that nobody visits do not appear.

    Args:
        expert_ids: [n, t] int64 in [0, num_experts).
        num_experts: E.

    Yields:
        A `Visit` for each expert in rising order, its pairs in token order. One host sync in all.
    """
    flat = expert_ids.reshape(-1)
    if flat.numel() == 1:  # single-token decode: no sort, no counting
        yield Visit(int(flat), torch.zeros(1, dtype=torch.int64, device=flat.device))
        return
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield Visit(expert, order[start : start + count])
            start += count
