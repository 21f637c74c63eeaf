"""One token on a CPU: the routed encode in as few operator calls as there can be.

While a model generates, an SAE sees one token at a time. Its products take some 20 microseconds
then, and each operator call one or two: what counts is how many there are. No weight is copied; the
expert's rows are a view. Letters as in `reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_switch_sae.ops.eager import products

_ZERO = torch.zeros(())


def route_token(
    x: Tensor, weight: Tensor, b_router: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Route scale * x - b_router: x [1, d] -> logits, probs [1, E] float32, expert_ids [1, 1]."""
    logits = torch.mm(x.to(weight.dtype) * scale - b_router, weight.T)
    return logits, logits.softmax(1), logits.argmax(1, keepdim=True)  # the first of several maxima


def encode_token(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    expert: int,
    gate: Tensor | None,
    k: int,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `reference.routed_encode` of one token with one expert.

    Args:
        x: [1, d], floating, less `b_dec`.
        W_enc: [E, m, d].
        b_enc: [E, m] in scaled units, or None.
        expert: e.
        gate: [1] float32 or None for 1.
        k: features kept, 1 to m.
        scale: [], what `b_enc` is divided by.

    Returns:
        acts [1, k] in the dtype of W_enc, ids [1, k] int64.
    """
    pre = W_enc.new_empty(1, W_enc.shape[1])
    products(x.to(W_enc.dtype), W_enc[expert], pre)
    if b_enc is not None:
        pre += b_enc[expert] / scale
    acts, ids = pre.topk(k, sorted=False)
    acts = torch.fmax(acts, _ZERO)  # which takes 0 of 0 and nan
    if gate is not None:
        acts *= gate
    return acts, ids.add_(expert * W_enc.shape[1])
