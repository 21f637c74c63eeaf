"""Tokens -> their experts, and the order in which experts work: one range of rows for each expert.

A pair is one visit of a token to an expert. With t experts per token there are n * t pairs, and
pair p belongs to token p // t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_switch_sae.errors import FeatureIdError
from hf_switch_sae.ops.precision import wide


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, num_experts_per_token: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.route`; for one expert per token a maximum replaces the sort."""
    with torch.autocast(x.device.type, enabled=False):
        weight = wide(weight)
        x = x.to(weight.dtype)
        logits = x @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)
    if num_experts_per_token > 1:
        expert_ids = logits.sort(dim=-1, descending=True, stable=True).indices[
            :, :num_experts_per_token
        ]
    else:
        # max returns the first of several maxima, as documented; on a CPU argmax takes four times
        # as long
        expert_ids = logits.max(-1, keepdim=True).indices
    return logits, logits.softmax(-1), expert_ids


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The order in which experts work, computed without waiting for the device.

    Args:
        expert_ids: [n, t] int64 in [0, num_experts).
        num_experts: E.

    Returns:
        order [n * t] int64: pairs sorted by expert, and by token within each expert.
        offsets [E + 1] int64: expert e's pairs are order[offsets[e]:offsets[e + 1]].
    """
    experts, order = expert_ids.reshape(-1).to(narrowest(num_experts)).sort(stable=True)
    return order, expert_offsets(experts, num_experts)


def expert_offsets(experts: Tensor, num_experts: int) -> Tensor:
    """Where each expert's range of the rising experts [p] begins: [num_experts + 1] int64."""
    bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=experts.device)
    return torch.searchsorted(experts.contiguous(), bounds)


def check_ids(ids: Tensor, num_features: int) -> None:
    """Check that ids [...] are features; only on a CPU, as it would have to wait for other devices.

    Raises:
        FeatureIdError: one is outside 0 to num_features - 1.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= num_features:
        raise no_feature(low if low < 0 else high, num_features)


def no_feature(wrong: int, num_features: int) -> FeatureIdError:
    """The error for an id that is no feature."""
    return FeatureIdError(f"no feature {wrong}: there are 0 to {num_features - 1}.")


def narrowest(last: int) -> torch.dtype:
    """The narrowest integers that hold 0 to `last`: a radix sort makes one pass for each byte."""
    for dtype in (torch.int8, torch.int16, torch.int32):
        if last <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64
