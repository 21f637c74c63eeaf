"""The losses that only training asks for: some of them try other experts or features.

Written for a code in the order of experts (`encoded.py`), with the SAE that made it; the formulas
are those of `losses.py`.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from hf_switch_sae.config import SwitchSAEConfig
from hf_switch_sae.encoded import Encoded, as_ordered
from hf_switch_sae.experts import Experts
from hf_switch_sae.losses import fvu_of, l1_loss_of, router_best_expert_loss_of
from hf_switch_sae.precision import wide, wide_dtype
from hf_switch_sae.statistics import count_since_fired


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
