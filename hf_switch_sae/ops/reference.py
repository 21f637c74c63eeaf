"""The definitions: what every backend must compute, written to be read.

They care neither for speed nor for memory, and leave gradients to autograd.

Letters: n tokens, d hidden size, E experts, m features per expert, F = E * m features, t experts
    per token, k slots.
Source: Mudide et al. 2024, arXiv:2410.08201, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_switch_sae.ops.precision import wide


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_experts_per_token: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose each token's experts by the router's logits.

        logits[n] = weight @ x[n] + bias,   probs = softmax(logits),   expert_ids = the t largest

    Args:
        x: [n, d], residual stream in the LM's own units.
        weight: [E, d].
        bias: [E], or None for 0.
        num_experts_per_token: t, 1 to E.

    Returns:
        logits, probs [n, E] float32, or float64 if `weight` is; expert_ids [n, t] int64, best
        first; ties go to the lowest index on every device.
    """
    with torch.autocast(x.device.type, enabled=False):
        weight = wide(weight)
        logits = x.to(weight.dtype) @ weight.T
        logits = logits if bias is None else logits + bias.to(logits.dtype)
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
    center: Tensor | None = None,
    in_order: bool = False,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode each token with its own experts and keep the active features.

        a[n, f] = gates[n, i] * relu(W_enc[f] @ (x[n] - center) + b_enc[f]),
        f in expert expert_ids[n, i]; 0 elsewhere

    Kept are those above 0 and `threshold`; of these the k largest of the token, all of them when k
    is None, or with `batch_topk` the k * n largest of all tokens together.

    Args:
        x: [n, d], floating, in the LM's own units, less `b_dec`.
        W_enc: [E, m, d].
        b_enc: [E, m] or None.
        expert_ids: [n, t], int64 in [0, E), distinct within a token.
        gates: [n, t], float32 >= 0, the router's weights; None for 1. Taken as given: its own
            gradient is returned.
        k: features kept per token, 1 to t * m, or None for all that are active.
        threshold: [E, m] or None; an activation must exceed it. It gets no gradient.
        batch_topk: keep k * n over the batch instead of k per token; ties at the border are kept.
        center: [d] or None, the `b_dec` already subtracted from x; it only gets its gradient.
        in_order: a promise that expert_ids [n, 1] rise, so that nothing has to be sorted.
        counted: [n] bool, the tokens that `batch_topk` is over, k for each; others keep nothing.
            None: all.

    Returns:
        acts [n, s], >= 0, in no order, in the dtype of W_enc; a slot of 0 is padding and gets no
        gradient.
        ids [n, s], int64, counted over all experts, all of the token's own experts.
        s is k; with k=None or batch_topk, the most features any token has (at least 1).

    Source: the experts E_i of Mudide et al. 2024, arXiv:2410.08201, weighted by the router.
    """
    n, (E, m, _) = x.shape[0], W_enc.shape
    gates = torch.ones_like(expert_ids, dtype=torch.float32) if gates is None else gates
    weight = gates.new_zeros(n, E).scatter(1, expert_ids, gates)
    mine = torch.zeros(n, E, dtype=torch.bool, device=x.device).scatter(1, expert_ids, True)
    z = (x if center is None else x - (center - center.detach())).to(W_enc.dtype)
    pre = torch.einsum("nd,emd->nem", z, W_enc)
    if b_enc is not None:
        pre = pre + b_enc
    acts = (weight[..., None] * pre.relu()).to(W_enc.dtype)
    keep = mine[..., None] & (acts > 0)
    if threshold is not None:
        keep = keep & (acts > threshold)
    acts, keep = acts.reshape(n, E * m), keep.reshape(n, E * m)
    if batch_topk and k is not None and n:
        counted = torch.ones(n, dtype=torch.bool, device=x.device) if counted is None else counted
        keep = keep & counted[:, None]
        wanted = min(k * int(counted.sum()), acts.numel())
        largest = torch.where(keep, acts, 0).flatten().sort(descending=True).values[:wanted]
        keep = keep & (acts >= largest[-1:].sum())  # 0 if no token counts
    slots = k if k is not None and not batch_topk else max(1, int(keep.sum(1).max()) if n else 1)
    # Features of the token's own experts sort before others, so that padding names one of them too.
    own = mine.repeat_interleave(m, 1)
    rank = torch.where(keep, acts.detach(), torch.where(own, acts.new_tensor(-1.0), -2.0))
    ids = rank.topk(slots, dim=1).indices
    return torch.where(keep, acts, 0).gather(1, ids), ids


def sparse_decode(acts: Tensor, ids: Tensor, W_dec: Tensor, in_order: bool = False) -> Tensor:
    """y[n] = sum_j acts[n, j] * W_dec[ids[n, j]].

    Args:
        acts: [n, k]; a slot of 0 is padding and gets no gradient.
        ids: [n, k], integers in [0, F).
        W_dec: [F, d], or [E, m, d] whose rows are counted through.
        in_order: a promise that a token's ids are all of one expert of W_dec [E, m, d], and that
            tokens are sorted by expert.

    Returns:
        [n, d]; `b_dec` is not added.
    """
    return gather_sum(acts, ids, W_dec.reshape(-1, W_dec.shape[-1]))


# ---------------------------------------------------------------- the primitives of the backends


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't compute there, in a sentence; always None: it can, slowly."""
    return None


def expert_products(
    x: Tensor, rows: Tensor | None, W: Tensor, bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """pre[i] = W[e] @ x[rows[i]] + bias[e], for the pairs offsets[e] <= i < offsets[e + 1].

    Args:
        x: [n, d].
        rows: [p] int64, the token of each pair, sorted by expert; None if pair i is token i.
        W: [E, m, d], converted to the dtype of x, as the bias is.
        bias: [E, m] or None.
        offsets: [E + 1] int64, from 0 to p, rising; an expert may have no pairs.

    Returns:
        [p, m] in the dtype of x.
    """
    x = x if rows is None else x[rows]
    experts = torch.searchsorted(offsets, torch.arange(len(x), device=x.device), right=True) - 1
    pre = torch.einsum("pd,pmd->pm", x, W[experts].to(x.dtype))
    return pre if bias is None else pre + bias[experts].to(x.dtype)


def relu_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(pre) in each row; of equal ones those of the lowest index.

    Args:
        pre: [p, m]; nan counts as 0.
        k: 1 to m.

    Returns:
        acts [p, k] in the dtype of pre, in no order; if fewer are positive, the rest are 0.
        ids [p, k] int64 in [0, m), distinct among the slots above 0.
    """
    acts, ids = torch.where(pre > 0, pre, 0).sort(dim=1, descending=True, stable=True)
    return acts[:, :k], ids[:, :k]


def gather_sum(coefs: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """y[n] = sum_j coefs[n, j] * W[ids[n, j]]; coefs, ids [n, k], W [F, d] -> [n, d] as W.

    A slot of 0 adds nothing, whatever its row holds.
    """
    rows = torch.where((coefs != 0)[..., None], W[ids], 0)
    return torch.einsum("nk,nkd->nd", coefs.to(W.dtype), rows)


def row_dots(g: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """c[n, j] = <g[n], W[ids[n, j]]>; g [n, d], ids [n, k], W [F, d] -> [n, k] as g."""
    return torch.einsum("nd,nkd->nk", g, W[ids].to(g.dtype))


def scatter_sum(
    coefs: Tensor,
    ids: Tensor,
    x: Tensor,
    num_rows: int,
    out: Tensor | None = None,
    num_experts: int | None = None,
    low: torch.dtype | None = None,
) -> Tensor:
    """W[f] = sum of coefs[n, j] * x[n] over ids[n, j] = f; -> [num_rows, d] as x.

    A feature that no token names gets 0; a slot of 0 adds nothing.

    Args:
        coefs, ids: [n, k].
        x: [n, d], finite.
        out: [num_rows, d], contiguous and in the dtype of x: where to write the result.
        num_experts: a promise that rows belong to this many experts, one after another, that a
            token's ids are all of one expert, and that tokens are sorted by expert.
        low: a dtype, such as autocast's, in which products may be taken; sums may not.
    """
    values = torch.where((coefs != 0)[..., None], coefs[..., None].to(x.dtype) * x[:, None], 0)
    total = x.new_zeros(num_rows, x.shape[1]).index_add(0, ids.flatten(), values.flatten(0, 1))
    return total if out is None else out.copy_(total)


# ---------------------------------------------------------------- the optimizer


def adam_rows(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: float | Tensor,
    *,
    unit_rows: bool,
    scale: float | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of Adam, in place, on rows that may have to keep length 1.

        g = scale * grad; with unit rows, minus its part along the row
        mean += (1 - beta1) * (g - mean)    square += (1 - beta2) * (g * g - square)
        weight -= lr * (mean / (1 - beta1**step)) / (sqrt(square / (1 - beta2**step)) + eps)

    Args:
        weight, grad, mean, square: [..., d]; all but grad are written.
        step: the number of this step, from 1. Like scale and lr, a number or a tensor [].
        unit_rows: whether rows have length 1. Then the gradient along a row is left out, and the
            row is scaled back to length 1.
        scale: a factor for the gradient, from clipping.

    Source: Kingma and Ba 2014, arXiv:1412.6980; unit rows as in `SwitchSAE.project_decoder_grad`.
    """
    g, (beta1, beta2) = scale * grad, betas
    if unit_rows:
        g = g - (g * weight).sum(-1, keepdim=True) * weight
    mean += (1 - beta1) * (g - mean)
    square += (1 - beta2) * (g.square() - square)
    weight -= lr * (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
    if unit_rows:
        weight /= weight.norm(dim=-1, keepdim=True).clamp_min(1e-12)


# ---------------------------------------------------------------- the losses


def column_sums(x: Tensor, counted: Tensor | None) -> Tensor:
    """sum_n x[n]: x [n, d] -> [d], over rows that count [n] bool, or over all; others may be nan.

    In float32, or in float64 if x is; so are the sums below.
    """
    return _counted(wide(x), counted).sum(0)


def squared_sums(
    x: Tensor, x_hat: Tensor | None, mean: Tensor | None, counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """sum |x - x_hat|^2 and sum |x - mean|^2, 0-d; 0 if x_hat or mean is None.

    x, x_hat [n, d], mean [d]; counted as above.
    """
    none = wide(x).new_zeros(())
    error = none if x_hat is None else _counted(wide(x) - wide(x_hat), counted).square().sum()
    deviation = none if mean is None else _counted(wide(x) - mean, counted).square().sum()
    return error, deviation


def scaled_errors(
    x: Tensor, x_hat: Tensor, scale: Tensor, counted: Tensor | None, want_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """scale [] * (x_hat - x), [n, d] in the dtype of x_hat, 0 in rows that do not count.

    And, if wanted, its column sums [d].
    """
    errors = _counted(scale * (wide(x_hat) - wide(x)), counted)
    return errors.to(x_hat.dtype), errors.sum(0) if want_sums else None


def _counted(rows: Tensor, counted: Tensor | None) -> Tensor:
    return rows if counted is None else torch.where(counted[:, None], rows, 0)
