"""One token on a CPU: route, encode and keep the largest, in as few calls as there can be.

While a model generates, an SAE sees one token at a time. Its products take some 20 microseconds
then, and each operator call one or two: what counts is how many there are. No weight is copied; the
expert's rows are a view. Letters as in `reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_switch_sae.ops import native
from hf_switch_sae.ops.backends import backend_for
from hf_switch_sae.ops.eager import products
from hf_switch_sae.precision import wide

_ZERO, _CPU = torch.zeros(()), torch.device("cpu")


def encode_token(
    x: Tensor,
    b_dec: Tensor,
    scale: Tensor,
    outlier_norm: Tensor,
    router: tuple[Tensor, Tensor] | None,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    centered: bool,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.route` and `reference.routed_encode` of one token with one expert.

        logits = weight @ (scale * x - b_router)    acts = the k largest of
        p * relu(W_enc[e] @ (x - b_dec / scale) + b_enc[e] / scale)

    Args:
        x: [..., d] of one token, floating, in the LM's own units.
        b_dec: [d], in scaled units.
        scale, outlier_norm: [] float32; a token with a larger norm has no activation.
        router: weight [E, d] and b_router [d], float32; None for one expert.
        W_enc: [E, m, d].
        b_enc: [E, m] in scaled units, or None.
        k: features kept, 1 to m.
        centered: whether the experts see x less b_dec / scale.
        gated: whether activations are weighted by p, the router's probability.

    Returns:
        acts [..., k] in the dtype of W_enc, ids [..., k] int64.
    """
    if _is_native(b_dec, W_enc):
        return native.encode_token(
            x, b_dec, scale, outlier_norm, router, W_enc, b_enc, k, centered, gated
        )
    shape, x = (*x.shape[:-1], k), x.reshape(1, -1)
    outlier, expert, gate = x.float().norm() > outlier_norm, 0, None
    if router is not None:
        weight, b_router = router
        logits = torch.mm(x.to(weight.dtype) * scale - b_router, weight.T)
        expert = int(logits.argmax(1))  # the first of several maxima
        gate = logits.softmax(1)[:, expert] if gated else None
    x = x - wide(b_dec) / scale if centered else x
    pre = W_enc.new_empty(1, W_enc.shape[1])
    products(x.to(W_enc.dtype), W_enc[expert], pre)
    if b_enc is not None:
        pre += b_enc[expert] / scale
    acts, ids = pre.topk(k, sorted=False)
    acts = torch.fmax(acts, _ZERO)  # which takes 0 of 0 and nan
    if gate is not None:
        acts *= gate
    if outlier:
        acts.zero_()
    return acts.view(shape), ids.add_(expert * W_enc.shape[1]).view(shape)


def decode_token(acts: Tensor, ids: Tensor, W_dec: Tensor, b_dec: Tensor, scale: Tensor) -> Tensor:
    """As `reference.sparse_decode` of one token, plus b_dec / scale.

    Args:
        acts, ids: [..., k] of one token.
        W_dec: [E, m, d].
        b_dec: [d], in scaled units.
        scale: [] float32.

    Returns:
        [..., d] in the dtype of W_dec.
    """
    acts = acts if acts.dtype == W_dec.dtype else acts.to(W_dec.dtype)
    if _is_native(b_dec, W_dec):
        return native.decode_token(acts, ids, W_dec, b_dec, scale)
    rows = W_dec.view(-1, len(b_dec)).index_select(0, ids.reshape(-1))
    y = torch.mv(rows.T, acts.reshape(-1)).add_((wide(b_dec) / scale).to(rows.dtype))
    return y.view(*acts.shape[:-1], len(b_dec))


def _is_native(b_dec: Tensor, weight: Tensor) -> bool:
    return (
        backend_for(_CPU, torch.float32) is native
        and weight.dtype == b_dec.dtype
        and weight.dtype in native.TOKEN_DTYPES
        and weight.is_contiguous()
    )
