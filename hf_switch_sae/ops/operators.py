"""The routed encode and the sparse decode as operators of torch, with their gradients.

Each direction is a custom operator: opaque to `torch.compile`, which would otherwise trace the
backend's loops, and called directly where nothing is recorded, as decoding a single token costs
less than dispatching it. Forward-mode derivatives, which the operators don't have, come from the
definitions in `reference.py`.

Beware Indexing a parameter by expert under autograd would add a full-size gradient for every
       expert; weights are only indexed inside the operators, where a slice is a view and nothing is
       recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hf_switch_sae.ops import reference
from hf_switch_sae.ops.native.kernels import PLAIN
from hf_switch_sae.ops.precision import wide_dtype
from hf_switch_sae.ops.routed import (
    decode,
    decode_backward,
    encode_backward,
    encode_pairs,
    keep_largest,
)


def routed_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor | None,
    k: int | None,
    threshold: Tensor | None = None,
    batch_topk: bool = False,
    center: Tensor | None = None,
    in_order: bool = False,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.routed_encode`, computing only the experts that tokens visit.

    Under autocast the products are taken in its dtype; what is kept is in that of `W_enc`.

    Raises:
        ValueError: shapes that don't go together.
    """
    n, t = expert_ids.shape
    if x.shape != (n, W_enc.shape[2]):
        raise ValueError(f"x {[*x.shape]} is not [{n}, {W_enc.shape[2]}], n by width of W_enc.")
    if n == 0:
        slots = k if k is not None and not batch_topk else 1
        return W_enc.new_zeros(0, slots), expert_ids.new_zeros(0, slots)
    if has_tangent(x, center, W_enc, b_enc, gates):
        return reference.routed_encode(
            x, W_enc, b_enc, expert_ids, gates, k, threshold, batch_topk, center, in_order, counted
        )
    given = (
        *(x, center, W_enc, b_enc, expert_ids, gates, k, threshold, batch_topk, in_order, counted),
        _low(x, W_enc),
    )
    if _is_for_operator(x, center, W_enc, b_enc):
        acts, ids = _encode_op(*given)
    else:
        acts, ids = encode_pairs(*given)
    if gates is not None:
        acts = (acts * gates.reshape(n * t, 1)).to(acts.dtype)
    if t > 1:
        acts, ids = keep_largest(acts.reshape(n, -1), ids.reshape(n, -1), None if batch_topk else k)
    return acts, ids


def sparse_decode(acts: Tensor, ids: Tensor, W_dec: Tensor, in_order: bool = False) -> Tensor:
    """As `reference.sparse_decode`; under autocast W_dec's gradient may be summed from products in
    its dtype.

    Raises:
        ValueError: acts and ids of different shapes.
    """
    if acts.shape != ids.shape:
        raise ValueError(f"acts {[*acts.shape]} and ids {[*ids.shape]} must have one shape [n, k].")
    ids = ids.to(torch.int64)
    if has_tangent(acts, W_dec):
        return reference.sparse_decode(acts, ids, W_dec)
    if _is_for_operator(acts, W_dec):
        y: Tensor = _decode_op(acts, ids, W_dec, in_order, _low(acts, W_dec))
        return y
    return decode(acts, ids, W_dec, in_order, None)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of them has a forward-mode derivative, as in `torch.func.jvp`."""
    if forward_ad._current_level < 0:
        return False
    given = [x for x in tensors if x is not None]
    parts = map(forward_ad.unpack_dual, given)
    return any(part.tangent is not None for part in parts)


def _low(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What autocast takes products with a weight in on x's device, if it is on; never float64's."""
    device = x.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _is_for_operator(*tensors: Tensor | None) -> bool:
    """Whether torch has to see an operator: to record it, or to treat a tensor of another kind."""
    if torch.compiler.is_compiling():
        return True
    given = [x for x in tensors if x is not None]
    is_recorded = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return is_recorded or any(type(x) not in PLAIN for x in given)


# ---------------------------------------------------------------- as operators of torch

_encode_op = torch.library.custom_op("hf_switch_sae::routed_encode", encode_pairs, mutates_args=())
_encode_backward_op = torch.library.custom_op(
    "hf_switch_sae::routed_encode_backward", encode_backward, mutates_args=()
)
_decode_op = torch.library.custom_op("hf_switch_sae::sparse_decode", decode, mutates_args=())
_decode_backward_op = torch.library.custom_op(
    "hf_switch_sae::sparse_decode_backward", decode_backward, mutates_args=()
)


@_encode_op.register_fake
def _(
    x: Tensor,
    center: Tensor | None,
    W_enc: Tensor,
    b_enc: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor | None,
    k: int | None,
    threshold: Tensor | None,
    batch_topk: bool,
    in_order: bool,
    counted: Tensor | None,
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    slots: int | torch.SymInt
    if k is None or batch_topk:  # as many as the fullest pair has, known when it runs
        slots = torch.library.get_ctx().new_dynamic_size(min=1)
    else:
        slots = min(k, W_enc.shape[1])
    pairs = expert_ids.numel()
    return W_enc.new_empty(pairs, slots), expert_ids.new_empty(pairs, slots)


@_encode_backward_op.register_fake
def _(
    d_acts: Tensor,
    acts: Tensor,
    ids: Tensor,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    need_b: bool,
    need_center: bool,
    in_order: bool,
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        W_enc.new_empty(W_enc.shape) if need_W else x.new_empty(0),
        W_enc.new_empty(W_enc.shape[:2]) if need_b or need_center else x.new_empty(0),
        x.new_empty(x.shape[1], dtype=wide_dtype(W_enc)) if need_center else x.new_empty(0),
    )


@_decode_op.register_fake
def _(acts: Tensor, ids: Tensor, W_dec: Tensor, in_order: bool, low: torch.dtype | None) -> Tensor:
    return W_dec.new_empty(len(acts), W_dec.shape[-1])


@_decode_backward_op.register_fake
def _(
    d_y: Tensor,
    acts: Tensor,
    ids: Tensor,
    W_dec: Tensor,
    need_acts: bool,
    need_W: bool,
    in_order: bool,
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return (
        acts.new_empty(acts.shape) if need_acts else d_y.new_empty(0, dtype=W_dec.dtype),
        W_dec.new_empty(W_dec.shape) if need_W else d_y.new_empty(0, dtype=W_dec.dtype),
    )


def _save_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, center, W_enc, _, expert_ids, *_, in_order, _, low = inputs
    ctx.in_order, ctx.low = in_order and expert_ids.shape[1] == 1, low
    ctx.center_dtype = None if center is None else center.dtype
    ctx.save_for_backward(x, W_enc, *output)


def _differentiate_encode(ctx: Any, d_acts: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, W_enc, acts, ids = ctx.saved_tensors
    need_x, need_center, need_W, need_b, *_ = ctx.needs_input_grad
    d_x, d_W, d_b, d_center = _encode_backward_op(
        d_acts, acts, ids, x, W_enc, need_x, need_W, need_b, need_center, ctx.in_order, ctx.low
    )
    return (
        d_x if need_x else None,
        d_center.to(ctx.center_dtype) if need_center else None,
        d_W if need_W else None,
        d_b if need_b else None,
        *[None] * 8,
    )


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.in_order, ctx.low = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_decode(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    need_acts, _, need_W, *_ = ctx.needs_input_grad
    needed = need_acts, need_W, ctx.in_order, ctx.low
    d_acts, d_W = _decode_backward_op(d_y, *ctx.saved_tensors, *needed)
    return d_acts if need_acts else None, None, d_W if need_W else None, None, None


_encode_op.register_autograd(_differentiate_encode, setup_context=_save_encode)
_decode_op.register_autograd(_differentiate_decode, setup_context=_save_decode)
