"""What an SAE is trained on, from plain tensors to 0-d tensors with gradient.

Weighted by which tokens count, never indexed by it: no shape depends on data, and nothing waits for
the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_switch_sae.precision import wide_dtype


def fvu_of(x: Tensor, x_hat: Tensor, counts: Tensor | None) -> Tensor:
    """Squared error over squared deviation from the mean, 0-d; nan under two tokens.

    In float32, or float64 where the rows are.

    Args:
        x, x_hat: [n, d], floating; both are differentiated.
        counts: [n] bool, which tokens count; None for all. Others may be nan or infinite.
    """
    if torch.compiler.is_compiling():  # which fuses the formula by itself
        return fvu_formula(x, x_hat, counts)
    fvu: Tensor = _Fvu.apply(x, x_hat, counts)  # type: ignore[no-untyped-call]
    return fvu


def fvu_formula(x: Tensor, x_hat: Tensor, counts: Tensor | None) -> Tensor:
    """What `fvu_of` computes, as it is written down."""
    x, x_hat = (part.to(wide_dtype(x, x_hat)) for part in (x, x_hat))
    where = x.new_ones(len(x), 1, dtype=torch.bool) if counts is None else counts[:, None]
    x, error, tokens = x.where(where, 0), (x - x_hat).where(where, 0), where.sum()
    deviation = (x - x.sum(0) / tokens).where(where, 0)
    fvu = error.square().sum() / deviation.square().sum()
    return fvu.where(tokens > 1, torch.nan)


class _Fvu(torch.autograd.Function):
    """In few passes over rows that stay in cache; no temporary is as large as the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor, counts: Tensor | None) -> Tensor:
        tokens = torch.full((), len(x), device=x.device) if counts is None else counts.sum()
        dtype = wide_dtype(x, x_hat)
        mean = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
        for rows in _blocks(x):
            mean += _counted(x[rows].to(dtype), rows, counts).sum(0)
        mean /= tokens
        error, deviation = mean.new_zeros(()), mean.new_zeros(())
        for rows in _blocks(x):
            part = x[rows].to(dtype)
            error += _counted(part - x_hat[rows], rows, counts).square_().sum()
            deviation += _counted(part - mean, rows, counts).square_().sum()
        fvu: Tensor = (error / deviation).where(tokens > 1, torch.nan)
        ctx.save_for_backward(x, x_hat, counts, mean, deviation, fvu)
        return fvu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, x_hat, counts, mean, deviation, fvu = ctx.saved_tensors
        need_x, need_x_hat, _ = ctx.needs_input_grad
        d_x = torch.empty_like(x) if need_x else None
        d_x_hat = torch.empty_like(x_hat) if need_x_hat else None
        scale = 2 * grad / deviation
        for rows in _blocks(x):
            d_error = _counted((x_hat[rows].to(mean.dtype) - x[rows]).mul_(scale), rows, counts)
            if d_x_hat is not None:
                d_x_hat[rows] = d_error
            if d_x is not None:  # the mean's own gradient is 0, as deviations add up to 0
                d_deviation = (x[rows].to(mean.dtype) - mean).mul_(scale * fvu)
                d_x[rows] = -d_error - _counted(d_deviation, rows, counts)
        return d_x, d_x_hat, None


def _blocks(x: Tensor) -> list[slice]:
    """The rows of x [n, d]: on a CPU as many at a time as stay in cache."""
    size = max(1, 2**18 // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _counted(part: Tensor, rows: slice, counts: Tensor | None) -> Tensor:
    """Rows [m, d] of at least float32, 0 where they do not count."""
    return part if counts is None else part.where(counts[rows, None], 0)


def balance_of(probs: Tensor, expert_ids: Tensor, counts: Tensor | None) -> Tensor:
    """num_experts * sum_e f_e P_e over the tokens that count; 0-d, 1 at perfect balance.

    Args:
        probs: [n, E], the router's; differentiated.
        expert_ids: [n, t].
        counts: [n] bool, which tokens count; None for all.
    """
    (n, num_experts), t = probs.shape, expert_ids.shape[1]
    weight = probs.new_ones(n) if counts is None else counts.to(probs.dtype)
    chosen = probs.new_zeros(num_experts)
    chosen.index_add_(0, expert_ids.flatten(), weight.repeat_interleave(t))
    total = probs.sum(0) if counts is None else probs.where(counts[:, None], 0).sum(0)
    tokens = weight.sum().clamp_min(1)
    return num_experts * (chosen * total).sum() / (tokens * tokens * t)


def router_z_loss_of(logits: Tensor, counts: Tensor | None) -> Tensor:
    """mean(logsumexp(logits) ** 2) over the tokens that count: keeps logits near 0; 0-d.

    Args:
        logits: [n, E]; differentiated.
        counts: [n] bool, which tokens count; None for all.
    """
    squares = logits.logsumexp(-1).square()
    if counts is None:
        return squares.sum() / max(1, len(squares))
    return squares.where(counts, 0).sum() / counts.sum().clamp_min(1)
