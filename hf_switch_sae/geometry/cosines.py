"""Rows of a dictionary -> each row's nearest other row in every expert, block by block.

How    A block of rows is multiplied with a block of columns, and of the products only the largest
       in each expert is kept. Nothing is ever as large as [num_features, num_features].
Beware Cosines are taken in float32 whatever the dtype of the weights; a row of zeros has a cosine
       of 0 with every other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ROWS, COLUMNS = 2048, 8192
"""The largest block of cosines: 64 MiB."""


def unit_rows(rows: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Rows [n, d] scaled to length 1, in float32; rows of 0 stay 0."""
    wide = rows.to(device=device or rows.device, dtype=torch.float32)
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / length.clamp_min(1e-30)


def unit_rows_of(
    weight: Tensor, device: torch.device | str | None = None
) -> Callable[[int, int], Tensor]:
    """A function `(first, last) -> unit rows` of a weight [F, d]; each call makes them anew."""
    return lambda first, last: unit_rows(weight[first:last], device)


def random_unit_rows(
    num_features: int, hidden_size: int, seed: int, device: torch.device | str
) -> Callable[[int, int], Tensor]:
    """A function `(first, last) -> unit rows` drawn evenly from the sphere.

    Rows are drawn on the CPU, to be the same on every device, and must be asked for once, in order.
    """
    generator, drawn = torch.Generator().manual_seed(seed), 0

    def rows(first: int, last: int) -> Tensor:
        nonlocal drawn
        if first != drawn or last > num_features:
            raise ValueError(f"rows {first} to {last} are not the next after {drawn}.")
        drawn = last
        drawn_rows = torch.randn(
            last - first, hidden_size, generator=generator, dtype=torch.float32, device="cpu"
        )
        return unit_rows(drawn_rows, device)

    return rows


def nearest_by_expert(
    rows: Tensor,
    own: Tensor,
    columns: Callable[[int, int], Tensor],
    num_experts: int,
    features_per_expert: int,
    most: int = COLUMNS,
) -> tuple[Tensor, Tensor]:
    """The largest cosine of each row with the other features of each expert.

    Args:
        rows: [n, d], of length 1.
        own: [n] int64, the feature that each row is.
        columns: `(first, last) -> [last - first, d]` of length 1; called in order.
        num_experts: E.
        features_per_expert: m.
        most: how many columns to take at a time.

    Returns:
        cosines [n, E] float32 in -1 to 1, and ids [n, E] int64 of the features they belong to. If
        experts have one feature, a row's cosine with its own expert is -inf.
    """
    best = rows.new_full((len(rows), num_experts), -torch.inf)
    ids = torch.zeros_like(best, dtype=torch.int64)
    for first, last in _chunks(num_experts, features_per_expert, most):
        # rounding takes the cosine of equal rows over 1
        cosines = (rows @ columns(first, last).T).clamp_(-1, 1)
        # a row is not its own neighbor
        inside = ((own >= first) & (own < last)).nonzero()[:, 0]
        cosines[inside, own[inside] - first] = -torch.inf
        # the largest within each expert, or within the part of it that this block has
        width = min(features_per_expert, last - first)
        largest, at = cosines.view(len(rows), -1, width).max(-1)
        at += first + width * torch.arange(at.shape[1], device=at.device)
        experts = slice(first // features_per_expert, first // features_per_expert + at.shape[1])
        # a later part of an expert may have a larger one
        better = largest > best[:, experts]
        ids[:, experts] = torch.where(better, at, ids[:, experts])
        best[:, experts] = torch.where(better, largest, best[:, experts])
    return best, ids


def _chunks(num_experts: int, features_per_expert: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of features, in order: several whole experts each, or a part of one."""
    m = features_per_expert
    if m <= most:
        step = most // m * m
        for first in range(0, num_experts * m, step):
            yield first, min(first + step, num_experts * m)
        return
    for start in range(0, num_experts * m, m):
        for first in range(start, start + m, most):
            yield first, min(first + most, start + m)
