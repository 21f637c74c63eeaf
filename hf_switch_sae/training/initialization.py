"""Fits a fresh SAE to some rows: its scale, biases, router, features and bound on outliers.

Beware With a random router all experts see the same kind of tokens and learn the same features.
       If the router starts at clusters of the data, experts differ from the first step on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_switch_sae.errors import NonFiniteError
from hf_switch_sae.sae.model import SwitchSAE

_ROUNDS = 25  # of k-means
_ROUTER_GAIN = 4.0  # a typical token's router logits stay within plus and minus this


def is_fresh(sae: SwitchSAE) -> bool:
    """Whether an SAE was never fitted to anything: its biases are 0 and its scale is 1."""
    biases = [sae.b_dec] + ([sae.b_router] if sae.config.num_experts > 1 else [])
    untouched = not any(bool(bias.detach().any()) for bias in biases)
    return untouched and float(sae.input_scale) == 1.0 and int(sae.statistics_tokens) == 0


@torch.no_grad()
def start_from(sae: SwitchSAE, rows: Tensor, outlier_norm: float | None, how: str) -> None:
    """Fit a fresh SAE's scale, biases, router and features to rows [n, d], in the LM's own units.

    Args:
        sae: changed in place.
        rows: outliers among them are left out.
        outlier_norm: becomes the SAE's own; None means that no token is an outlier.
        how: "data", "geometric_median" or "none", see `SwitchSAETrainingArguments.start`.

    Raises:
        NonFiniteError: a row is NaN or infinite, or all rows are 0.
    """
    sae.outlier_norm.fill_(math.inf if outlier_norm is None else outlier_norm)
    if how == "none":
        return
    rows = rows.to(sae.device).float()
    rows = rows[~sae.is_outlier(rows)]
    mean_square = float(rows.square().sum(-1).mean())
    if not math.isfinite(mean_square) or mean_square == 0:
        raise NonFiniteError(
            f"the mean square of the {len(rows):,} rows to start from is {mean_square}: they hold "
            "nothing, NaN or infinity. Check the language model and the text."
        )
    if how == "data":
        sae.input_scale.fill_(math.sqrt(rows.shape[1] / mean_square))
        center = rows.mean(0)
    else:
        center = geometric_median(rows)
    center = center * sae.input_scale
    sae.b_dec.copy_(center)
    if sae.config.num_experts > 1:
        sae.b_router.copy_(center)  # copied, as the optimizer would step a shared bias twice
    if how == "data":
        _start_at_data(rows * sae.input_scale - center, sae)


def _start_at_data(centered: Tensor, sae: SwitchSAE) -> None:
    """Point the router at clusters of rows [n, d], then features at rows of their expert."""
    if 1 < sae.config.num_experts <= len(centered):
        directions = directions_of(centered, sae.config.num_experts)
        sae.router.weight.copy_(directions * (_ROUTER_GAIN / math.sqrt(centered.shape[1])))
    start_features_at(centered, sae)


@torch.no_grad()
def start_features_at(centered: Tensor, sae: SwitchSAE, seed: int = 0) -> None:
    """Point each feature at a row that its expert is chosen for.

    A feature's decoder row becomes a row of data, minus the mean of its expert's rows, at length 1.
    Its encoder row points the same way. If an expert has fewer rows than features, the features
    left over stay as they are: two features with the same start would stay equal.

    Args:
        centered: [n, d], in the SAE's scaled units and minus its bias.
        sae: changed in place; its router must be initialized already.
        seed: decides which rows are taken.
    """
    rows = torch.unique(centered, dim=0)
    rows = rows[_order(len(rows), seed).to(rows.device)]
    chosen = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    if sae.config.num_experts > 1:
        chosen = (rows @ sae.router.weight.to(rows.dtype).T).argmax(1)
    experts = ((enc, dec) for g in sae.experts for enc, dec in zip(g.W_enc, g.W_dec, strict=True))
    for expert, (encoder, decoder) in enumerate(experts):
        own = rows[chosen == expert]
        own = own - own.mean(0)
        # rows at the expert's mean have no direction
        own = normalize(own[own.norm(dim=-1) > 1e-3][: len(decoder)], dim=-1)
        encoder[: len(own)] = (own * encoder.norm(dim=-1).mean()).to(encoder)
        decoder[: len(own)] = own.to(decoder)


def geometric_median(rows: Tensor, steps: int = 100, tolerance: float = 1e-5) -> Tensor:
    """[d]: the point with the smallest sum of distances to rows [n, d], by Weiszfeld's method."""
    found = rows.mean(0)
    for _ in range(steps):
        # a row right at the median would get an infinite weight
        weight = 1 / (rows - found).norm(dim=-1).clamp_min(1e-12)
        moved: Tensor = (rows * weight[:, None]).sum(0) / weight.sum()
        if float((moved - found).norm()) < tolerance:
            return moved
        found = moved
    return found


def directions_of(rows: Tensor, count: int, seed: int = 0) -> Tensor:
    """[count, d] of length 1: centers of rows [n, d], n >= count, by spherical k-means.

    Args:
        rows: only their directions from the origin count, so center them first.
        count: the number of centers.
        seed: decides at which rows the centers begin.
    """
    order = _order(len(rows), seed)
    rows = normalize(rows, dim=-1)
    centers = rows[order[:count].to(rows.device)]
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centers).index_add_(0, (rows @ centers.T).argmax(1), rows)
        centers = normalize(sums + 1e-6 * centers, dim=-1)  # an empty cluster stays put
    return centers


def _order(count: int, seed: int) -> Tensor:
    """A random order, drawn on the CPU to be the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator, device="cpu")
