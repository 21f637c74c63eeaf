"""A single token on a CPU, as in `generate`: whether the kernels' short way may be taken.

Room   an SAE and [..., x] -> a `TokenPlan` of the native kernels, or None for the general way.
Why    The general way takes 4.7 times as long for one token in float32, 7.5 times in bfloat16
       (`python -m tests.bench.tricks token`).
Beware The short way saves about as much as a few of torch's operators take, so asking for it may
       take no longer than one or two. That is why fields are read from `__dict__`, `_modules` and
       `_parameters` instead of through attributes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_switch_sae import ops
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.experts import ExpertGroup


def plan_of(sae: nn.Module, config: SwitchSAEConfig, of_tokens: Tensor) -> ops.TokenPlan | None:
    """How a CPU's kernels take [..., x] through a SwitchSAE; None for the general way.

    None if it is more than one token, or if torch must see what happens: a derivative, a hook, a
    weight that is computed anew at each use.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or type(of_tokens) not in ops.PLAIN
        or of_tokens.numel() != of_tokens.shape[-1]
        or not of_tokens.numel()
        or forward_ad._current_level >= 0
    ):
        return None
    # `vars(config)`, without the config's own attribute access on the way
    rules = cast(dict[str, Any], object.__getattribute__(config, "__dict__"))
    modules = sae._modules
    groups = cast(nn.Module, modules["experts"])._modules
    if (
        rules["activation"] != "topk"
        or rules["input_norm"] != "none"
        or rules["num_experts_per_token"] != 1
        or len(groups) != 1
        or "parametrizations" in modules
    ):
        return None
    # a hook has to see its module run
    group, router = cast(ExpertGroup, groups["0"]), modules.get("router")
    if _is_watched(group) or (router is not None and _is_watched(router)):
        return None
    own, buffers, experts = sae._parameters, sae._buffers, group._parameters
    W_enc, b_enc, W_dec = experts.get("W_enc"), experts.get("b_enc"), experts.get("W_dec")
    b_dec = own.get("b_dec")
    made_anew = W_enc is None or W_dec is None or b_dec is None  # by pruning, say
    if made_anew or (b_enc is None and rules["encoder_bias"]):
        return None
    # in the order of the kernels' plan (ops/native/token.py)
    weights = (
        buffers["input_scale"],
        buffers["outlier_norm"],
        None if router is None else router._parameters.get("weight"),
        own.get("b_router"),
        b_dec,
        W_enc,
        b_enc,
        W_dec,
    )
    chosen = rules["k"], rules["subtract_b_dec"], rules["apply_router_probs"]
    return ops.token_plan(group, weights, chosen)


def _is_watched(module: nn.Module) -> bool:
    """Whether something runs around its forward: a hook, accelerate's offload, a
    parametrization."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or "_hf_hook" in vars(module)
        or "parametrizations" in module._modules
    )
