"""The definitions: what every backend must compute, written to be read.

No speed, no options, autograd as it comes.

Letters: n tokens, d hidden size, E experts, m features per expert, F = E * m features, t experts
    per token, k slots.
Source: Mudide et al. 2024, arXiv:2410.08201, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route(
    x: Tensor, weight: Tensor, bias: Tensor, num_experts_per_token: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each token's experts by the router's logits, in float32 whatever the inputs are.

        logits[n] = weight @ x[n] + bias,   probs = softmax(logits),   expert_ids = the t largest

    Args:
        x: [n, d], residual stream in the LM's own units.
        weight: [E, d].
        bias: [E].
        num_experts_per_token: t, 1 to E.

    Returns:
        logits [n, E] float32, probs [n, E] float32, expert_ids [n, t] int64, best first; ties go to
        the lowest index on every device.
    """
    with torch.autocast(x.device.type, enabled=False):
        logits = x.float() @ weight.float().T + bias.float()
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return logits, logits.softmax(-1), order[:, :num_experts_per_token]


def routed_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor | None,
    k: int | None,
    threshold: Tensor | None = None,
    batch_topk: bool = False,
) -> tuple[Tensor, Tensor]:
    """Encode each token with its own experts and keep the active features.

        a[n, f] = gates[n, i] * relu(W_enc[f] @ x[n] + b_enc[f]),   f in expert expert_ids[n, i];
        0 elsewhere

    Kept are those above 0 and `threshold`; of these the k largest of the token, all of them when k
    is None, or with `batch_topk` the k * n largest of all tokens together.

    Args:
        x: [n, d], residual stream less `b_dec`, in the LM's own units.
        W_enc: [E, m, d].
        b_enc: [E, m] or None.
        expert_ids: [n, t], int64 in [0, E), distinct within a token.
        gates: [n, t], float32 >= 0, the router's weights; None for 1. Taken as given: its own
            gradient is returned.
        k: features kept per token, 1 to t * m, or None for all that are active.
        threshold: [E, m] or None; an activation must exceed it. A constant: gets no gradient.
        batch_topk: k * n over the batch instead of k per token; ties at the border are all kept.

    Returns:
        acts [n, s], >= 0, in no order, in the dtype of x; a slot of 0 is padding and gets no
        gradient.
        ids [n, s], int64, counted over all experts, all of the token's own experts.
        s is k; with k=None or batch_topk, the most features any token has (at least 1).

    Source: the experts E_i of Mudide et al. 2024, arXiv:2410.08201, weighted by the router.
    """
    n, (E, m, _) = x.shape[0], W_enc.shape
    gates = torch.ones_like(expert_ids, dtype=torch.float32) if gates is None else gates
    weight = gates.new_zeros(n, E).scatter(1, expert_ids, gates)
    mine = torch.zeros(n, E, dtype=torch.bool, device=x.device).scatter(1, expert_ids, True)
    pre = torch.einsum("nd,emd->nem", x, W_enc)
    if b_enc is not None:
        pre = pre + b_enc
    acts = (weight[..., None] * pre.relu()).to(x.dtype)
    keep = mine[..., None] & (acts > 0)
    if threshold is not None:
        keep = keep & (acts > threshold)
    acts, keep = acts.reshape(n, E * m), keep.reshape(n, E * m)
    if batch_topk and k is not None and n:
        wanted = min(k * n, acts.numel())
        border = torch.where(keep, acts, 0).flatten().topk(wanted).values[-1]
        keep = keep & (acts >= border)
    slots = k if k is not None and not batch_topk else max(1, int(keep.sum(1).max()) if n else 1)
    # Own features sort before foreign ones, so that padding ids are the token's own experts' too.
    own = mine.repeat_interleave(m, 1)
    rank = torch.where(keep, acts.detach(), torch.where(own, -1.0, -2.0))
    ids = rank.topk(slots, dim=1).indices
    return torch.where(keep, acts, 0).gather(1, ids), ids


def sparse_decode(acts: Tensor, ids: Tensor, W_dec: Tensor) -> Tensor:
    """y[n] = sum_j acts[n, j] * W_dec[ids[n, j]].

    Args:
        acts: [n, k]; a slot of 0 is padding and gets no gradient.
        ids: [n, k], int64 in [0, F).
        W_dec: [F, d], or [E, m, d] whose rows are counted through.

    Returns:
        [n, d]; `b_dec` is not added.
    """
    acts = torch.where(acts != 0, acts, 0)
    return torch.einsum("nk,nkd->nd", acts, W_dec.reshape(-1, W_dec.shape[-1])[ids])
