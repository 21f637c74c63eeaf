"""Encoder and decoder rows -> a picture of each by t-SNE, and how far neighbors share an expert.

Rows are drawn at length 1, so that distance is a matter of their cosine. A picture alone proves
nothing: t-SNE makes islands of noise. So beside each stands the purity: of a feature's nearest
neighbors, the share that is of its own expert, among the rows themselves and among the points.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.geometry.cosines import ROWS, unit_rows

NEIGHBORS = 10
"""Whose experts purity looks at."""
_EXACT = 20_000


@dataclass(frozen=True)
class FeatureMaps:
    """t-SNE of some features; n of them."""

    features: Tensor = field(repr=False)
    """[n] int64, ascending."""
    encoder: Tensor = field(repr=False)
    """[n, 2]."""
    decoder: Tensor = field(repr=False)
    """[n, 2]."""
    perplexity: float
    neighbors: int
    purity: dict[str, dict[str, float]] | None
    """encoder and decoder: `rows`, `picture`; None of one expert."""
    chance: float
    """The purity of experts dealt out at random."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the points."""
        return {
            "features": len(self.features),
            "perplexity": self.perplexity,
            "neighbors": self.neighbors,
            "chance": self.chance,
            "purity": self.purity,
        }


def draw_maps(
    encoder: Tensor,
    decoder: Tensor,
    features_per_expert: int,
    most: int = 4096,
    perplexity: float = 50.0,
    seed: int = 0,
) -> FeatureMaps:
    """Place features on a plane by their encoder rows, and by their decoder rows.

    Args:
        encoder, decoder: [F, d].
        features_per_expert: m; feature f is of expert f // m.
        most: how many features to draw; a seeded sample where there are more.
        perplexity: of t-SNE; a third of the features at most.
        seed: of sample and t-SNE.

    Raises:
        SwitchSAEError: openTSNE is not installed, or there are too few features.
    """
    tsne = _tsne()
    features = sample_features(len(encoder), most, seed)
    if len(features) < 8:
        raise SwitchSAEError(f"{len(features)} features are too few for a map: draw 8 or more.")
    expert = features // features_per_expert
    perplexity = min(perplexity, (len(features) - 1) / 3)
    neighbors = min(NEIGHBORS, len(features) - 1)
    points, purity = {}, {}
    for name, weight in (("encoder", encoder), ("decoder", decoder)):
        rows = unit_rows(weight[features.to(weight.device)].detach(), "cpu")
        placed = tsne(
            perplexity=perplexity,
            random_state=seed,
            n_jobs=1,  # sums in one order: the same picture each time
            neighbors="exact" if len(rows) <= _EXACT else "auto",
        ).fit(rows.numpy())
        points[name] = torch.tensor(placed.tolist(), dtype=torch.float64).mul(1e3).round().div(1e3)
        purity[name] = {
            "rows": neighbor_purity(rows, expert, neighbors),
            "picture": neighbor_purity(points[name], expert, neighbors),
        }
    sizes = expert.bincount().double()
    chance = float((sizes * (sizes - 1)).sum() / (len(expert) * (len(expert) - 1)))
    several = len(encoder) > features_per_expert
    return FeatureMaps(
        features,
        points["encoder"],
        points["decoder"],
        perplexity,
        neighbors,
        purity if several else None,
        chance,
    )


def sample_features(num_features: int, most: int, seed: int) -> Tensor:
    """[min(num_features, most)] int64, ascending: all features, or a seeded sample."""
    if num_features <= most:
        return torch.arange(num_features)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_features, generator=generator)[:most].sort().values


def neighbor_purity(points: Tensor, labels: Tensor, neighbors: int) -> float:
    """Mean share of a point's nearest others, by distance, that have its own label.

    Of rows of length 1 the nearest by distance are the nearest by cosine.
    """
    points, same = points.double(), 0.0
    for first in range(0, len(points), ROWS):
        distance = torch.cdist(points[first : first + ROWS], points)
        own = torch.arange(len(distance))
        distance[own, own + first] = torch.inf
        nearest = distance.topk(neighbors, largest=False).indices
        same += float((labels[nearest] == labels[own + first, None]).sum())
    return same / (len(points) * neighbors)


def _tsne() -> Any:
    try:
        from openTSNE import TSNE
    except ImportError:
        raise SwitchSAEError(
            'maps need openTSNE: pip install "hf-switch-sae[viz]", or leave them out '
            "(maps=False, --no-maps)."
        ) from None
    return TSNE
