"""All losses of a forward pass: the formulas on plain tensors, and what each is given of a code.

Room   a code (`encoding.py`) and its reconstruction -> losses by name, 0-d, with gradient.
       FVU is in `fvu.py`. Some losses try other experts or features than the tokens had.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_switch_sae.ops.precision import wide, wide_dtype
from hf_switch_sae.sae.encoding import Encoded, EncodingSAE, as_ordered
from hf_switch_sae.sae.experts import Rule
from hf_switch_sae.sae.fvu import WholeBatch, fvu_of, times_chosen

_MEANS = ("router_z_loss", "router_best_expert_loss", "l1_loss", "auxk_loss")
"""Losses that are means over a part of a batch; the others get the sums of the whole batch."""


class TrainedSAE(EncodingSAE, Protocol):
    """What losses need of a SwitchSAE."""

    num_tokens_since_fired: Tensor

    def dead_features(self) -> Tensor:
        """[num_features] bool."""


class Losses(NamedTuple):
    """What a forward pass found."""

    loss: Tensor
    """0-d: all below, each times its coefficient."""
    fvu: Tensor
    """0-d."""
    others: dict[str, Tensor]
    """By their names in `SwitchSAEOutput`, 0-d; those that were not measured are left out."""
    reconstruction: Tensor
    """[n, d], as the tokens came, in the LM's units."""


def losses_of(
    sae: TrainedSAE, code: Encoded, hidden_states: Tensor, whole: WholeBatch | None
) -> Losses:
    """Reconstruct tokens and measure every loss that their SAE's config asks for.

    Args:
        sae: in training it measures the losses of training too.
        code: of hidden_states, sorted where that helps.
        hidden_states: [..., d].
        whole: the batch that these tokens are a part of; None: all of it.
    """
    config, router = sae.config, code.router
    y = sae.experts.decode(code.acts, code.ids, in_order=code.order is not None)
    fvu, reconstruction = _error(code, y, hidden_states, whole)
    losses: dict[str, Tensor] = {}
    if router is not None:
        logits, probs, expert_ids = router
        losses["router_aux_loss"] = balance_of(probs, expert_ids, code.counted, whole)
        if config.router_z_loss_coef:
            losses["router_z_loss"] = router_z_loss_of(logits, code.counted)
    y2 = None
    if sae.training:
        if router is not None and config.second_expert_loss_coef:
            y2 = _second_reconstruction(sae, code, router)
        losses |= _training_losses(sae, code, y, y2)
    if whole is not None:  # a mean over this part counts for its share of the whole
        tokens = len(code.z) if code.counted is None else code.counted.sum()
        share = tokens / whole.tokens
        losses |= {name: losses[name] * share for name in _MEANS if name in losses}
    if y2 is not None:
        losses["second_expert_loss"], _ = _error(code, y2, hidden_states, whole)
    # every coefficient is relative to FVU, so none depends on the LM's scale
    loss = config.fvu_loss_coef * fvu
    for name, value in losses.items():
        loss = loss + getattr(config, f"{name}_coef") * value
    return Losses(loss, fvu, losses, reconstruction)


def _error(
    code: Encoded, y: Tensor, hidden_states: Tensor, whole: WholeBatch | None
) -> tuple[Tensor, Tensor]:
    """FVU and reconstruction [n, d] of y [n, d], the decoded code in order, without `b_dec`."""
    add = torch.add if code.inverse is None else Tensor.add_
    reconstruction = add(as_ordered(y, code.inverse), code.bias.to(y.dtype))
    if code.unit is None:
        return fvu_of(code.z, y, code.counted_in_order, whole, code.bias), reconstruction
    # with a normalized input the error is that of the LM's own units
    reconstruction = code.unit.back(reconstruction)
    x = hidden_states.reshape_as(reconstruction).to(reconstruction.device)
    return fvu_of(x, reconstruction, code.counted, whole), reconstruction


# ---------------------------------------------------------------- in training


def _training_losses(
    sae: TrainedSAE, code: Encoded, y: Tensor, y2: Tensor | None
) -> dict[str, Tensor]:
    """The losses of training, from y and y2 [n, d]: first and (None: not wanted) second choices."""
    config = sae.config
    found = {"auxk_loss": _auxk_loss(sae, code, y)}
    if config.l1_loss_coef:
        found["l1_loss"] = _l1_loss(sae, code)
    if code.router is not None and config.router_best_expert_loss_coef:
        best = _best_expert_loss(sae, code, code.router[0])
        if y2 is not None:
            best = best + _better_of_two_loss(sae, code, code.router[0], y, y2)
        found["router_best_expert_loss"] = best
    return found


def _second_reconstruction(
    sae: TrainedSAE, code: Encoded, router: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """[n, d], in order, without `b_dec`: each token by the router's second choice alone.

    With the weight that the first choice had, as a constant. A batch_topk SAE draws the border
    among the second choices' own activations.
    """
    if not len(code.z):
        return torch.zeros_like(code.z)
    logits, _, first = router
    second = logits.detach().scatter(1, first, -torch.inf).argmax(-1, keepdim=True)
    gates = code.tokens.gates
    tokens = code.tokens._replace(
        expert_ids=as_ordered(second, code.order),
        gates=None if gates is None else gates.detach(),
        in_order=False,
    )
    return sae.experts.decode(*sae.experts.encode(tokens, code.rule))


def _auxk_loss(sae: TrainedSAE, code: Encoded, y: Tensor) -> Tensor:
    """AuxK: how badly the dead features of the tokens' experts explain the error that is left.

    Dead as of before this batch. Only the dead features' own rows get a gradient.
    """
    none, config, tokens = code.z.new_zeros((), dtype=wide_dtype(y)), sae.config, code.tokens
    if not config.auxk_loss_coef or not len(code.z):
        return none
    dead = sae.dead_features().view(config.num_experts, -1)
    found = int(dead.sum(1).max())  # waits for the device: how many slots there are to be
    if not found:
        return none
    slots = min(config.k_aux or max(1, config.hidden_size // 2), found)
    gates = None if tokens.gates is None else tokens.gates.detach()
    tokens = tokens._replace(x=tokens.x.detach(), gates=gates, center=None)
    explained = sae.experts.reconstruct_with(dead, slots, tokens)
    rest = (code.z - y).detach()
    # with no error at all, as of a single token, there is nothing to explain
    return fvu_of(rest, explained, code.counted_in_order).nan_to_num(0.0, 0.0, 0.0)


def _l1_loss(sae: TrainedSAE, code: Encoded) -> Tensor:
    """How much is active: acts times the length of their decoder rows, in lengths of a token."""
    lengths = torch.cat([wide(g.W_dec).norm(dim=-1).flatten() for g in sae.experts])
    size = sae.input_scale / math.sqrt(len(sae.b_dec))
    return l1_loss_of(wide(code.acts) * size, lengths[code.ids], code.counted_in_order)


def _best_expert_loss(sae: TrainedSAE, code: Encoded, logits: Tensor) -> Tensor:
    """The router's error on every num_experts-th token, for which all experts are tried."""
    config = sae.config
    # one token in E, so that trying E experts costs as much as encoding the batch once
    tried = torch.arange(0, len(logits), config.num_experts, device=logits.device)
    if not len(tried):
        return logits.sum()
    at = tried if code.inverse is None else code.inverse[tried]
    gates = None
    # all experts are tried with the weight that the chosen one had
    if config.apply_router_probs and not config.norm_topk_prob:
        gates = logits.detach()[tried].softmax(-1).amax(-1, keepdim=True)
    k = None if config.k is None else min(config.k, config.features_per_expert)
    rule = Rule(k, code.rule.threshold)
    errors = sae.experts.errors_of_each(code.z[at], code.tokens.x[at], gates, sae.input_scale, rule)
    return router_best_expert_loss_of(
        logits[tried],
        wide(errors),
        config.router_best_expert_temperature,
        None if code.counted is None else code.counted[tried],
    )


def _better_of_two_loss(
    sae: TrainedSAE, code: Encoded, logits: Tensor, y: Tensor, y2: Tensor
) -> Tensor:
    """As `_best_expert_loss`, between each token's first two choices alone."""
    logits = as_ordered(logits, code.order)
    with torch.no_grad():
        errors = [(code.z - wide(found)).square().sum(-1) for found in (y, y2)]
    return router_best_expert_loss_of(
        logits.topk(2).values,
        torch.stack(errors, 1),
        sae.config.router_best_expert_temperature,
        code.counted_in_order,
    )


# ---------------------------------------------------------------- formulas


def balance_of(
    probs: Tensor, expert_ids: Tensor, counted: Tensor | None, whole: WholeBatch | None = None
) -> Tensor:
    """num_experts * sum_e f_e P_e over the tokens that count; 0-d, 1 at perfect balance.

    Args:
        probs: [n, E], the router's; differentiated.
        expert_ids: [n, t].
        counted: [n] bool, which tokens count; None for all.
        whole: the batch that these are a part of, whose f_e are the ones to balance.
    """
    (n, num_experts), t = probs.shape, expert_ids.shape[1]
    total = probs.sum(0) if counted is None else probs.where(counted[:, None], 0).sum(0)
    if whole is not None and whole.chosen is not None:
        return num_experts * (whole.chosen * total).sum() / (whole.tokens.square() * t)
    chosen = times_chosen(expert_ids, counted, num_experts, probs.dtype)
    tokens = max(n, 1) if counted is None else counted.sum().clamp_min(1).to(probs.dtype)
    return num_experts * (chosen * total).sum() / (tokens * tokens * t)


def router_z_loss_of(logits: Tensor, counted: Tensor | None) -> Tensor:
    """mean(logsumexp(logits) ** 2) over the tokens that count: keeps logits near 0; 0-d.

    Args:
        logits: [n, E]; differentiated.
        counted: [n] bool, which tokens count; None for all.
    """
    squares = logits.logsumexp(-1).square()
    if counted is None:
        return squares.sum() / max(1, len(squares))
    return squares.where(counted, 0).sum() / counted.sum().clamp_min(1)


def router_best_expert_loss_of(
    logits: Tensor, errors: Tensor, temperature: float, counted: Tensor | None
) -> Tensor:
    """Cross entropy of the router to the experts that reconstruct best, over counted tokens; 0-d.

        target[n, e] = softmax over e of -errors[n, e] / (temperature * mean over e of errors[n])

    Args:
        logits: [n, E], the router's; differentiated.
        errors: [n, E], the squared error of each token under each expert; a constant.
        temperature: how much better, as a share of the error, an expert must be to stand out.
        counted: [n] bool, which tokens count; None for all.
    """
    # relative to the token's error, so that hard tokens don't decide alone
    scale = temperature * errors.mean(1, keepdim=True)
    target = (-errors / scale.clamp_min(torch.finfo(errors.dtype).tiny)).softmax(-1).detach()
    entropy = -(target * logits.log_softmax(-1)).sum(1)
    if counted is None:
        return entropy.sum() / max(1, len(entropy))
    return entropy.where(counted, 0).sum() / counted.sum().clamp_min(1)


def l1_loss_of(acts: Tensor, lengths: Tensor, counted: Tensor | None) -> Tensor:
    """mean over the tokens that count of sum_j acts[n, j] * lengths[n, j]; 0-d.

    Args:
        acts: [n, slots], >= 0; differentiated.
        lengths: [n, slots], of the features' decoder rows; differentiated.
        counted: [n] bool, which tokens count; None for all.
    """
    sums = (acts * lengths).sum(1)
    if counted is None:
        return sums.sum() / max(1, len(sums))
    return sums.where(counted, 0).sum() / counted.sum().clamp_min(1)
