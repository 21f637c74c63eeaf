"""The sums over a batch's rows that the losses need, as `reference` defines them.

How    The Triton kernels compute them where they can (`triton.deviations`), else torch's operators.
       On a CPU these take as many rows at a time as fit into its cache, so that no temporary is as
       large as the batch: squared sums of 8192 x 768 take half the time (`python -m
       tests.bench.tricks eager`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_switch_sae.ops.backends import takes
from hf_switch_sae.ops.precision import wide_dtype
from hf_switch_sae.ops.triton import deviations as triton_deviations


def column_sums(x: Tensor, counted: Tensor | None) -> Tensor:
    """As `reference.column_sums`."""
    if _has_kernels(x):
        return triton_deviations.column_sums(x, counted)
    # at least in float32, whatever the dtype of x
    total = torch.zeros(x.shape[1], dtype=wide_dtype(x), device=x.device)
    for rows in _blocks(x):
        total += _counted(x[rows].to(total.dtype), rows, counted).sum(0)
    return total


def squared_sums(
    x: Tensor, x_hat: Tensor | None, mean: Tensor | None, counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.squared_sums`."""
    if _has_kernels(x, x_hat):
        return triton_deviations.squared_sums(x, x_hat, mean, counted)
    dtype = wide_dtype(x) if x_hat is None else wide_dtype(x, x_hat)
    error, deviation = (torch.zeros((), dtype=dtype, device=x.device) for _ in range(2))
    for rows in _blocks(x):
        part = x[rows].to(dtype)
        if x_hat is not None:
            error += _squares(_counted(part - x_hat[rows], rows, counted))
        if mean is not None:
            deviation += _squares(_counted(part - mean, rows, counted))
    return error, deviation


def scaled_errors(
    x: Tensor, x_hat: Tensor, scale: Tensor, counted: Tensor | None, want_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """As `reference.scaled_errors`."""
    if _has_kernels(x, x_hat):
        return triton_deviations.scaled_errors(x, x_hat, scale, counted, want_sums)
    dtype, errors = wide_dtype(x, x_hat), torch.empty_like(x_hat)
    sums = torch.zeros(x.shape[1], dtype=dtype, device=x.device) if want_sums else None
    for rows in _blocks(x):
        # compute in place if nothing has to be converted or masked
        place = errors[rows] if errors.dtype == dtype and counted is None else None
        part = torch.sub(x_hat[rows].to(dtype), x[rows], out=place).mul_(scale)
        part = _counted(part, rows, counted)
        if place is None:
            errors[rows] = part
        if sums is not None:
            sums += part.sum(0)
    return errors, sums


def _has_kernels(*parts: Tensor | None) -> bool:
    return all(takes("triton", part.device, part.dtype) for part in parts if part is not None)


def _blocks(x: Tensor) -> list[slice]:
    """Slices over the rows of x [n, d]: on a CPU, each fits into its cache."""
    size = max(1, 2**18 // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _squares(rows: Tensor) -> Tensor:
    """The sum of squares of rows [m, d], 0-d; on a CPU a dot product is twice as fast as a norm."""
    if rows.device.type == "cpu":
        flat = rows.flatten()
        return flat.dot(flat)
    norm: Tensor = torch.linalg.vector_norm(rows)
    return norm.square()


def _counted(part: Tensor, rows: slice, counted: Tensor | None) -> Tensor:
    """Rows [m, d] of at least float32, set to 0 where they do not count."""
    return part if counted is None else part.where(counted[rows, None], 0)
