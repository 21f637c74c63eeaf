"""Small SAEs of every kind for the tests, and what each of them must compute, written densely."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae import SwitchSAE, SwitchSAEConfig

D, E, M, K = 16, 4, 6, 3

KINDS: dict[str, dict[str, Any]] = {
    "switch": {},
    "switch_with_bias": {"encoder_bias": True},
    "k_is_all_of_an_expert": {"k": M},
    "no_router_weight": {"apply_router_probs": False, "encoder_bias": True},
    "two_experts": {"num_experts_per_token": 2, "encoder_bias": True},
    "two_experts_normed": {"num_experts_per_token": 2, "norm_topk_prob": True, "k": 8},
    "two_experts_unweighted": {"num_experts_per_token": 2, "apply_router_probs": False},
    "three_experts": {"num_experts_per_token": 3, "k": 2, "subtract_b_dec": False},
    "all_experts": {"num_experts_per_token": 4, "k": 10, "encoder_bias": True},
    "batch_topk": {"activation": "batch_topk", "encoder_bias": True},
    "batch_topk_two_experts": {"activation": "batch_topk", "num_experts_per_token": 2},
    "jumprelu": {"activation": "jumprelu", "k": None, "encoder_bias": True},
    "jumprelu_with_k": {"activation": "jumprelu", "num_experts_per_token": 2},
    "relu": {"activation": "relu", "k": None, "encoder_bias": True, "subtract_b_dec": False},
    "relu_with_k": {"activation": "relu"},
    "plain_topk": {"num_experts": 1, "encoder_bias": True},
    "plain_batch_topk": {"num_experts": 1, "activation": "batch_topk", "encoder_bias": True},
    "plain_jumprelu": {"num_experts": 1, "activation": "jumprelu", "k": None},
    "plain_relu": {"num_experts": 1, "activation": "relu", "k": None, "encoder_bias": True},
}
NORMED: dict[str, dict[str, Any]] = {
    "layer_norm": {"input_norm": "layer_norm", "encoder_bias": True},
    "layer_norm_two_experts": {"input_norm": "layer_norm", "num_experts_per_token": 2},
    "layer_norm_jumprelu": {"input_norm": "layer_norm", **KINDS["jumprelu"]},
    "plain_layer_norm": {"input_norm": "layer_norm", **KINDS["plain_topk"]},
    "constant_norm": {"input_norm": "constant_norm", "subtract_b_dec": False},
    "constant_norm_batch_topk": {"input_norm": "constant_norm", **KINDS["batch_topk"]},
}
"""Kinds whose acts and reconstruction depend on each token's own unit."""


def config(**fields: Any) -> SwitchSAEConfig:
    return SwitchSAEConfig(
        **{"hidden_size": D, "num_features": E * M, "num_experts": E, "k": K, **fields}
    )


def make(kind: str = "switch", groups: Any = 1, scale: float = 0.6, **fields: Any) -> SwitchSAE:
    """An SAE whose every parameter and buffer has a value of its own; the same for any `groups`."""
    torch.manual_seed(5)
    settings = config(**{**KINDS, **NORMED}[kind] | fields)
    sae = SwitchSAE(settings).eval()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape))
            if "W_" in name:
                parameter.div_(parameter.norm(dim=-1, keepdim=True))
            elif "router.weight" in name:
                parameter.mul_(0.3)
            else:
                parameter.mul_(0.4)
        sae.input_scale.fill_(scale)
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.copy_(0.1 + 0.3 * torch.rand(sae.threshold.shape))
    return sae if groups == 1 else regroup(sae, groups)


def regroup(sae: SwitchSAE, groups: Any) -> SwitchSAE:
    """The same SAE with its experts in another number of modules."""
    other = SwitchSAE(sae.config, expert_groups=groups).to(sae.dtype).train(sae.training)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc"):
            whole = getattr(sae, name)
            if whole is not None:
                for group, part in zip(other.experts, whole.chunk(len(other.experts)), strict=True):
                    getattr(group, name).copy_(part)
        rest = {k: v for k, v in sae.state_dict().items() if not k.startswith("experts.")}
        other.load_state_dict(rest, strict=False)
    return other


def rows(n: int = 21) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return 2.0 * torch.randn(n, D, generator=generator)


def whole_gradients(sae: SwitchSAE) -> dict[str, Tensor]:
    """Gradient of each parameter, those of the expert groups joined as in the checkpoint."""
    joined: dict[str, list[Tensor]] = {}
    for name, parameter in sae.named_parameters():
        plain = name.split(".")[-1] if name.startswith("experts.") else name
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        joined.setdefault(plain, []).append(grad)
    return {name: torch.cat(parts) for name, parts in joined.items()}


@dataclass
class Definition:
    acts: Tensor
    """[n, F], in the LM's own units."""
    reconstruction: Tensor
    fvu: Tensor
    balance: Tensor


def definition(sae: SwitchSAE, x: Tensor) -> Definition:
    """The header of `model.py` written out over all features, in scaled units until the end."""
    c, s, n = sae.config, sae.input_scale, len(x)
    raw, (x, size, shift) = x, _normed(x, c.input_norm)
    experts, gate = torch.zeros(n, c.num_experts), torch.ones(n, c.num_experts)
    balance = torch.zeros(())
    if c.num_experts > 1:
        logits = (s * x - sae.b_router) @ sae.router.weight.T
        probs = logits.softmax(-1)
        experts.scatter_(1, probs.topk(c.num_experts_per_token).indices, 1.0)
        if c.apply_router_probs:
            gate = probs
        if c.norm_topk_prob:
            gate = gate / (gate * experts).sum(1, keepdim=True)
        share = experts.mean(0) / c.num_experts_per_token
        balance = c.num_experts * (share * probs.mean(0)).sum()
    else:
        experts += 1
    u = s * x - sae.b_dec if c.subtract_b_dec else s * x
    pre = torch.einsum("nd,emd->nem", u, sae.W_enc)
    if sae.b_enc is not None:
        pre = pre + sae.b_enc
    acts = ((gate * experts)[..., None] * pre.relu()).reshape(n, -1)
    acts = acts * _kept(sae, acts.detach())
    x_hat = (acts @ sae.W_dec.reshape(-1, D) + sae.b_dec) / s * size + shift
    fvu = (raw - x_hat).square().sum() / (raw - raw.mean(0)).square().sum()
    return Definition(acts / s * size, x_hat, fvu, balance)


def _normed(x: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """(h, size, shift) with x = size * h + shift, but for layer_norm's 1e-5."""
    nothing = torch.zeros(len(x), 1)
    if norm == "none":
        return x, nothing + 1, nothing
    if norm == "constant_norm":
        size = (x.square().sum(1, keepdim=True) / D).sqrt()
        return x / size, size, nothing
    mean = x.sum(1, keepdim=True) / D
    size = ((x - mean).square().sum(1, keepdim=True) / (D - 1)).sqrt()
    return (x - mean) / (size + 1e-5), size, mean


def _kept(sae: SwitchSAE, acts: Tensor) -> Tensor:
    c = sae.config
    in_batch = c.activation == "batch_topk" and sae.training
    if in_batch:
        return acts >= acts.flatten().sort(descending=True).values[c.k * len(acts) - 1]
    if c.activation in ("jumprelu", "batch_topk"):
        acts = acts * (acts > sae.threshold)
    if c.activation == "batch_topk" or c.k is None:
        return acts > 0
    return (acts > 0) & (acts >= acts.sort(descending=True).values[:, c.k - 1 : c.k])
