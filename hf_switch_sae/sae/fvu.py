"""FVU, the reconstruction error that training minimizes, and what is known of a whole batch.

How    Tokens that don't count are masked, never taken out: no shape depends on data, so nothing
       waits for the device.
Beware FVU is no mean over tokens: the mean of two half batches' FVUs is not that of the whole.
       Where a batch is spread over processes or steps, each part is given the sums over the whole
       (`WholeBatch`), and its loss is its share. The shares add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_switch_sae import ops
from hf_switch_sae.ops.precision import wide_dtype


@dataclass(frozen=True)
class WholeBatch:
    """What the losses of a part must know of the batch that it is a part of."""

    tokens: Tensor
    """0-d, how many tokens count."""
    deviation: Tensor
    """0-d, the squared deviation from the mean of the whole."""
    chosen: Tensor | None
    """[E], how often each expert is chosen; None with one expert."""

    @classmethod
    def of(cls, sums: Tensor, hidden_size: int) -> WholeBatch:
        """From the `batch_sums` of all parts, added up."""
        tokens, squares, total = sums[0], sums[1], sums[2 : 2 + hidden_size]
        chosen = sums[2 + hidden_size :] if len(sums) > 2 + hidden_size else None
        return cls(tokens, squares - total.square().sum() / tokens, chosen)

    def to(self, dtype: torch.dtype) -> WholeBatch:
        """The same in another dtype."""
        chosen = None if self.chosen is None else self.chosen.to(dtype)
        return WholeBatch(self.tokens.to(dtype), self.deviation.to(dtype), chosen)


def batch_sums(
    x: Tensor, counted: Tensor | None, expert_ids: Tensor | None, num_experts: int
) -> Tensor:
    """What adds up over the parts of a batch: tokens, their squares, their sum, experts chosen.

    Args:
        x: [n, d]. Squares are taken of deviations from the part's mean, so that no digits are lost.
        counted: [n] bool, which tokens count; None for all.
        expert_ids: [n, t]; None with one expert.

    Returns:
        [2 + d] or, with several experts, [2 + d + E], float64.
    """
    # in float64 the square of the mean can be taken off again without losing digits
    widest = torch.float32 if x.device.type == "mps" else torch.float64
    if counted is None:
        tokens = torch.full((), len(x), dtype=torch.int64, device=x.device)
    else:
        tokens = counted.sum()
    mean = ops.column_sums(x, counted) / tokens.clamp_min(1)
    _, squares = ops.squared_sums(x, None, mean, counted)
    # only sums of a whole part go to float64: converting x would double the memory read
    tokens, mean = tokens.to(widest), mean.to(widest)
    head = torch.stack([tokens, squares.to(widest) + tokens * mean.square().sum()])
    parts = [head, tokens * mean]
    if expert_ids is not None:
        parts.append(times_chosen(expert_ids, counted, num_experts, torch.float32).to(widest))
    return torch.cat(parts)


def times_chosen(
    expert_ids: Tensor, counted: Tensor | None, num_experts: int, dtype: torch.dtype
) -> Tensor:
    """[num_experts]: on how many of the tokens that count each expert was chosen.

    Args:
        expert_ids: [n, t]; a token adds to each of its t experts.
        counted: [n] bool, which tokens count; None for all.
        num_experts: E.
        dtype: of the result.
    """
    n, t = expert_ids.shape
    weight = expert_ids.new_ones(n, dtype=dtype) if counted is None else counted.to(dtype)
    chosen = expert_ids.new_zeros(num_experts, dtype=dtype)
    return chosen.index_add_(0, expert_ids.flatten(), weight.repeat_interleave(t))


def fvu_of(
    x: Tensor,
    x_hat: Tensor,
    counted: Tensor | None,
    whole: WholeBatch | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Squared error over squared deviation from the mean, 0-d; nan under two tokens.

    In float32, or float64 where the rows are.

    Args:
        x, x_hat: [n, d], floating; both are differentiated.
        counted: [n] bool, which tokens count; None for all. Others may be nan or infinite.
        whole: the batch that these are a part of, whose deviation is the one to divide by, as a
            constant.
        bias: [d], a part of x_hat that was taken off x instead of being added to x_hat. The value
            is the same either way; passing it gives it its gradient.
    """
    # a compiler fuses the formula by itself
    if torch.compiler.is_compiling() or ops.has_tangent(x, x_hat, bias):
        return fvu_formula(x, x_hat, counted, whole, bias)
    known = None if whole is None else whole.deviation
    fvu: Tensor = _Fvu.apply(x, x_hat, counted, known, bias)  # type: ignore[no-untyped-call]
    return fvu


def fvu_formula(
    x: Tensor,
    x_hat: Tensor,
    counted: Tensor | None,
    whole: WholeBatch | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The definition of `fvu_of`, which autograd differentiates by itself."""
    x, x_hat = (part.to(wide_dtype(x, x_hat)) for part in (x, x_hat))
    x_hat = x_hat if bias is None else x_hat + (bias - bias.detach())
    where = x.new_ones(len(x), 1, dtype=torch.bool) if counted is None else counted[:, None]
    x, error, tokens = x.where(where, 0), (x - x_hat).where(where, 0), where.sum()
    if whole is not None:
        return error.square().sum() / whole.deviation
    deviation = (x - x.sum(0) / tokens).where(where, 0)
    fvu = error.square().sum() / deviation.square().sum()
    return fvu.where(tokens > 1, torch.nan)


class _Fvu(torch.autograd.Function):
    """`fvu_formula` in few passes over the rows; fewest in training, where x needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_hat: Tensor,
        counted: Tensor | None,
        known: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        mean, tokens = None, len(x) if counted is None else counted.sum()
        if known is None:
            mean = ops.column_sums(x, counted) / tokens
        error, deviation = ops.squared_sums(x, x_hat, mean, counted)
        fvu: Tensor = error / (deviation if known is None else known)
        if known is not None:
            deviation = known
        # on a device the count is not waited for: nan is chosen there
        elif isinstance(tokens, Tensor):
            fvu = fvu.where(tokens > 1, torch.nan)
        elif tokens <= 1:
            fvu = torch.full_like(fvu, torch.nan)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, x_hat, counted, mean, deviation, fvu)
        return fvu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_hat, counted, mean, deviation, fvu = ctx.saved_tensors
        need_x, need_x_hat, *_, need_bias = ctx.needs_input_grad
        # d fvu / d x_hat = -2 (x - x_hat) / deviation
        scale = 2 * grad / deviation
        d_x, d_x_hat, d_bias = None, None, None
        if need_x_hat or need_bias:
            d_x_hat, d_bias = ops.scaled_errors(x, x_hat, scale, counted, need_bias)
        if need_x:
            d_x, _ = ops.scaled_errors(x_hat, x, scale, counted, want_sums=False)
            if mean is not None:  # its own gradient is 0, as deviations from it add up to 0
                rows = mean.expand_as(x)
                d_x -= ops.scaled_errors(rows, x, scale * fvu, counted, want_sums=False)[0]
        return (
            d_x,
            d_x_hat if need_x_hat else None,
            None,
            None,
            None if d_bias is None else d_bias.to(ctx.bias_dtype),
        )
