"""The losses that only training asks for: some of them try other experts or features.

Written for a code in the order of experts (`encoded.py`), with the SAE that made it; the formulas
are those of `losses.py`.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from hf_switch_sae.ops.precision import wide, wide_dtype
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.encoding import Encoded, as_ordered
from hf_switch_sae.sae.experts import Experts
from hf_switch_sae.sae.fvu import WholeBatch, fvu_of


class TrainedSAE(Protocol):
    """What these losses need of a SwitchSAE."""

    config: SwitchSAEConfig
    experts: Experts
    b_dec: torch.nn.Parameter
    input_scale: Tensor
    num_tokens_since_fired: Tensor

    def dead_features(self) -> Tensor:
        """[num_features] bool."""


def training_losses(
    sae: TrainedSAE, code: Encoded, y: Tensor, y2: Tensor | None
) -> dict[str, Tensor]:
    """Losses that a part of a batch has a share of, by name.

    Args:
        y: [n, d], the reconstruction in order, without `b_dec`.
        y2: the same by the second choices, see `second_reconstruction`; None if not wanted.
    """
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


def count_features(sae: TrainedSAE, code: Encoded) -> None:
    """Add a batch to `num_tokens_since_fired`."""
    since = sae.num_tokens_since_fired.view(sae.config.num_experts, -1)
    count_since_fired(since, code.acts, code.ids, code.seen.expert_ids, code.counts_in_order)


def second_reconstruction(
    sae: TrainedSAE, code: Encoded, router: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """What each token's second choice alone makes of it, [n, d], in order, without `b_dec`.

    With the weight that the first choice had, as a constant; of batch_topk the border is that of
    the second choices' activations.
    """
    config, seen = sae.config, code.seen
    if not len(code.z):
        return torch.zeros_like(code.z)
    logits, _, first = router
    second = logits.detach().scatter(1, first, -torch.inf).argmax(-1, keepdim=True)
    in_batch = config.activation == "batch_topk"
    acts, ids = sae.experts.encode(
        seen.x,
        as_ordered(second, code.order),
        None if seen.gates is None else seen.gates.detach(),
        config.k,
        code.threshold,
        in_batch,
        code.bias if config.subtract_b_dec else None,
        sae.input_scale,
        counts=code.counts_in_order if in_batch else None,
    )
    return sae.experts.decode(acts, ids)


def _auxk_loss(sae: TrainedSAE, code: Encoded, y: Tensor) -> Tensor:
    """How badly the dead features of the tokens' experts explain what is left of the tokens.

    Dead before this batch is counted. Only their own rows get a gradient.
    """
    none, config, seen = code.z.new_zeros((), dtype=wide_dtype(y)), sae.config, code.seen
    if not config.auxk_loss_coef or not len(code.z):
        return none
    dead = sae.dead_features().view(config.num_experts, -1)
    found = int(dead.sum(1).max())  # waits for the device: how many slots there are to be
    if not found:
        return none
    explained = sae.experts.reconstruct_with(
        dead,
        min(config.k_aux or max(1, config.hidden_size // 2), found),
        seen.x.detach(),
        seen.expert_ids,
        None if seen.gates is None else seen.gates.detach(),
        sae.input_scale,
        in_order=code.order is not None,
    )
    rest = (code.z - y).detach()
    # an error of nothing at all, as of a single token, has no share
    return fvu_of(rest, explained, code.counts_in_order).nan_to_num(0.0, 0.0, 0.0)


def _l1_loss(sae: TrainedSAE, code: Encoded) -> Tensor:
    """How much is active, each feature as long as what it adds, in lengths of a token."""
    lengths = torch.cat([wide(g.W_dec).norm(dim=-1).flatten() for g in sae.experts])
    size = sae.input_scale / math.sqrt(len(sae.b_dec))
    return l1_loss_of(wide(code.acts) * size, lengths[code.ids], code.counts_in_order)


def _best_expert_loss(sae: TrainedSAE, code: Encoded, logits: Tensor) -> Tensor:
    """Where the router should have sent every num_experts-th token: all experts are tried."""
    config = sae.config
    tried = torch.arange(0, len(logits), config.num_experts, device=logits.device)
    if not len(tried):
        return logits.sum()
    places = tried if code.places is None else code.places[tried]
    gates = None
    if config.apply_router_probs and not config.norm_topk_prob:
        gates = logits.detach()[tried].softmax(-1).amax(-1, keepdim=True)
    errors = sae.experts.errors_of_each(
        code.z[places],
        code.seen.x[places],
        gates,
        None if config.k is None else min(config.k, config.features_per_expert),
        code.threshold,
        sae.input_scale,
    )
    return router_best_expert_loss_of(
        logits[tried],
        wide(errors),
        config.router_best_expert_temperature,
        None if code.counts is None else code.counts[tried],
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
        code.counts_in_order,
    )


def balance_of(
    probs: Tensor, expert_ids: Tensor, counts: Tensor | None, whole: WholeBatch | None = None
) -> Tensor:
    """num_experts * sum_e f_e P_e over the tokens that count; 0-d, 1 at perfect balance.

    Args:
        probs: [n, E], the router's; differentiated.
        expert_ids: [n, t].
        counts: [n] bool, which tokens count; None for all.
        whole: the batch that these are a part of, whose f_e are the ones to balance.
    """
    (n, num_experts), t = probs.shape, expert_ids.shape[1]
    if whole is not None and whole.chosen is not None:
        total = probs.sum(0) if counts is None else probs.where(counts[:, None], 0).sum(0)
        return num_experts * (whole.chosen * total).sum() / (whole.tokens.square() * t)
    weight = probs.new_ones(n) if counts is None else counts.to(probs.dtype)
    chosen = probs.new_zeros(num_experts)
    chosen.index_add_(0, expert_ids.flatten(), weight.repeat_interleave(t))
    total = probs.sum(0) if counts is None else probs.where(counts[:, None], 0).sum(0)
    tokens = weight.sum().clamp_min(1)
    return num_experts * (chosen * total).sum() / (tokens * tokens * t)


def router_z_loss_of(logits: Tensor, counts: Tensor | None) -> Tensor:
    """mean(logsumexp(logits) ** 2) over the tokens that count: keeps logits near 0; 0-d.

    Args:
        logits: [n, E]; differentiated.
        counts: [n] bool, which tokens count; None for all.
    """
    squares = logits.logsumexp(-1).square()
    if counts is None:
        return squares.sum() / max(1, len(squares))
    return squares.where(counts, 0).sum() / counts.sum().clamp_min(1)


def router_best_expert_loss_of(
    logits: Tensor, errors: Tensor, temperature: float, counts: Tensor | None
) -> Tensor:
    """Cross entropy of the router to the experts that reconstruct best, over counted tokens; 0-d.

        target[n, e] = softmax over e of -errors[n, e] / (temperature * mean over e of errors[n])

    Args:
        logits: [n, E], the router's; differentiated.
        errors: [n, E], the squared error of each token under each expert; a constant.
        temperature: how much better, as a share of the error, an expert must be to stand out.
        counts: [n] bool, which tokens count; None for all.
    """
    scale = temperature * errors.mean(1, keepdim=True)
    target = (-errors / scale.clamp_min(torch.finfo(errors.dtype).tiny)).softmax(-1).detach()
    entropy = -(target * logits.log_softmax(-1)).sum(1)
    if counts is None:
        return entropy.sum() / max(1, len(entropy))
    return entropy.where(counts, 0).sum() / counts.sum().clamp_min(1)


def l1_loss_of(acts: Tensor, lengths: Tensor, counts: Tensor | None) -> Tensor:
    """mean over the tokens that count of sum_j acts[n, j] * lengths[n, j]; 0-d.

    Args:
        acts: [n, slots], >= 0; differentiated.
        lengths: [n, slots], of the features' decoder rows; differentiated.
        counts: [n] bool, which tokens count; None for all.
    """
    sums = (acts * lengths).sum(1)
    if counts is None:
        return sums.sum() / max(1, len(sums))
    return sums.where(counts, 0).sum() / counts.sum().clamp_min(1)


@torch.no_grad()
def count_since_fired(
    since: Tensor, acts: Tensor, ids: Tensor, expert_ids: Tensor, counts: Tensor | None
) -> None:
    """Bring `since` up to date: how many tokens its expert has seen since a feature was active.

    Args:
        since: [E, m] int64, changed in place.
        acts, ids: [n, slots]; a slot of 0 is no firing.
        expert_ids: [n, t], in [0, E).
        counts: [n] bool, which tokens count; None for all.
    """
    seen = torch.ones_like(expert_ids)
    fired = (acts > 0).long()
    if counts is not None:
        seen, fired = seen * counts[:, None], fired * counts[:, None]
    visits = since.new_zeros(len(since)).index_add_(0, expert_ids.flatten(), seen.flatten())
    since += visits[:, None]
    firings = since.new_zeros(since.numel()).index_add_(0, ids.flatten(), fired.flatten())
    since.masked_fill_(firings.view_as(since) > 0, 0)
