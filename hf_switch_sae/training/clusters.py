"""Rows -> the directions around which they lie: where a router's experts begin.

Beware the experts of a router that starts at random see the same tokens, and what they then learn
       is each other's. Clusters differ from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

_ROUNDS = 25


def directions_of(rows: Tensor, count: int, seed: int = 0) -> Tensor:
    """[count, d] of length 1: the centers of rows [n, d], n >= count, by spherical k-means.

    Args:
        rows: taken relative to the origin, so center them first; their lengths play no part.
        count: how many centers.
        seed: of the rows that they begin at.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = normalize(rows, dim=-1)
    centers = rows[order[:count].to(rows.device)]
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centers).index_add_(0, (rows @ centers.T).argmax(1), rows)
        centers = normalize(sums + 1e-6 * centers, dim=-1)  # an empty one stays where it is
    return centers
