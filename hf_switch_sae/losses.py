"""What an SAE is trained on, from plain tensors to 0-d tensors with gradient.

Weighted by which tokens count, never indexed by it: no shape depends on data, and nothing waits for
the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fvu_of(x: Tensor, x_hat: Tensor, counts: Tensor) -> Tensor:
    """Squared error over squared deviation from the mean; x, x_hat [n, d], counts [n] bool -> 0-d.

    nan where fewer than two tokens count.
    """
    weight = counts.float()[:, None]
    # what does not count may be nan or infinite, as padding is in some models
    x, x_hat = x.where(counts[:, None], 0), x_hat.where(counts[:, None], 0)
    mean = (x * weight).sum(0) / weight.sum()
    error = ((x - x_hat).square() * weight).sum()
    return error / ((x - mean).square() * weight).sum().where(weight.sum() > 1, torch.nan)


def balance_of(logits: Tensor, expert_ids: Tensor, counts: Tensor) -> Tensor:
    """num_experts * sum_e f_e P_e over the tokens that count; 0-d, 1 at perfect balance.

    logits [n, E]; expert_ids [n, t]; counts [n] bool.
    """
    num_experts, weight = logits.shape[1], counts.float()
    chosen = torch.zeros(num_experts, device=logits.device)
    chosen.index_add_(0, expert_ids.flatten(), weight.repeat_interleave(expert_ids.shape[1]))
    probs = logits.softmax(-1).where(counts[:, None], 0).sum(0)
    tokens = weight.sum().clamp_min(1)
    return num_experts * (chosen * probs).sum() / (tokens * tokens * expert_ids.shape[1])
