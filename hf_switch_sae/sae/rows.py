"""Rows of weights, a feature each: walked in blocks, whole or sharded, and kept at length 1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_switch_sae.errors import ConfigError
from hf_switch_sae.ops.precision import wide_dtype

_CACHED_BYTES = 2 * 2**20  # of each weight in a block: about a core's second-level cache


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of several tensors [..., d], a block at a time, as views [rows, d].

    On a CPU a block fits its cache; elsewhere it is everything. A single row, or a tensor that is
    not contiguous, comes whole. Of a sharded one, this process's part.

    Raises:
        ConfigError: it is sharded within rows.
    """
    tensors = tuple(held_here(t, whole_rows=True) for t in tensors)
    # strided rows would be copied by flatten, and what is written to a copy is lost
    if tensors[0].ndim < 2 or not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    rows = [t.flatten(0, -2) for t in tensors]
    num, d = rows[0].shape
    block = max(1, _CACHED_BYTES // max(1, d * rows[0].element_size()))
    # a GPU has no use for blocks: one launch takes all rows
    if rows[0].device.type != "cpu":
        block = max(1, num)
    yield from zip(*(torch.split(r, block) for r in rows), strict=True)


def held_here(weight: Tensor, whole_rows: bool = False) -> Tensor:
    """The part of a weight [..., d], sharded over processes (FSDP2), that is this process's.

    Raises:
        ConfigError: with `whole_rows`: its rows are cut, so that their lengths can't be kept here.
    """
    if not isinstance(weight, DTensor):
        return weight
    if whole_rows and any(place.is_shard(dim=weight.ndim - 1) for place in weight.placements):
        raise ConfigError(
            "a decoder is sharded within its rows, which are to keep length 1: shard experts or "
            "features."
        )
    return weight.to_local()


def project_rows(grads: Tensor, rows: Tensor) -> None:
    """Remove in place each gradient's part along its row; both [..., d], rows of length 1."""
    grads.addcmul_(rows, (grads * rows).sum(-1, keepdim=True), value=-1)


def normalize_rows(rows: Tensor) -> None:
    """Scale rows [..., d] in place to length 1, measured in at least float32; rows of 0 stay."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide_dtype(rows))
    rows.div_(length.clamp_min_(1e-12))
