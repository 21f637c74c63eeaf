"""Encoder and decoder rows -> a picture of each by t-SNE, and how often neighbors share an expert.

How    Rows are scaled to length 1, so that their distance depends on their cosine alone.
Beware A picture alone proves nothing: t-SNE makes islands out of noise. So each comes with its
       purity: of a feature's nearest neighbors, the share that are in its own expert, measured
       among the rows and among the points drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.geometry.cosines import ROWS, unit_rows

NEIGHBORS = 10
"""How many nearest neighbors purity looks at."""
_EXACT = 20_000  # most rows whose neighbors t-SNE searches exactly


@dataclass(frozen=True)
class FeatureMaps:
    """t-SNE of n features."""

    features: Tensor = field(repr=False)
    """[n] int64, ascending."""
    encoder: Tensor = field(repr=False)
    """[n, 2]."""
    decoder: Tensor = field(repr=False)
    """[n, 2]."""
    perplexity: float
    neighbors: int
    purity: dict[str, dict[str, float]] | None
    """Of encoder and decoder, among `rows` and in the `picture`; None with one expert."""
    chance: float
    """The purity if features were assigned to experts at random."""

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
        features_per_expert: m; feature f belongs to expert f // m.
        most: how many features to draw; a seeded sample if there are more.
        perplexity: of t-SNE; at most a third of the features drawn.
        seed: of the sample and of t-SNE.

    Raises:
        SwitchSAEError: openTSNE is not installed, or there are too few features.
    """
    tsne = _tsne()
    # which features, and what fits their number
    features = sample_features(len(encoder), most, seed)
    if len(features) < 8:
        raise SwitchSAEError(f"{len(features)} features are too few for a map: draw 8 or more.")
    expert = features // features_per_expert
    perplexity = min(perplexity, (len(features) - 1) / 3)
    neighbors = min(NEIGHBORS, len(features) - 1)
    # one map of encoder rows, one of decoder rows
    points, purity = {}, {}
    for name, weight in (("encoder", encoder), ("decoder", decoder)):
        rows = unit_rows(weight[features.to(weight.device)].detach(), "cpu")
        placed = tsne(
            perplexity=perplexity,
            random_state=seed,
            n_jobs=1,  # sums in the same order, so that the picture is the same each time
            neighbors="exact" if len(rows) <= _EXACT else "auto",
        ).fit(rows.numpy())
        # three decimals are more than a picture shows
        exact = torch.tensor(placed.tolist(), dtype=torch.float64, device="cpu")
        points[name] = exact.mul(1e3).round().div(1e3)
        purity[name] = {
            "rows": neighbor_purity(rows, expert, neighbors),
            "picture": neighbor_purity(points[name], expert, neighbors),
        }
    # chance: two features drawn at random share an expert
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
    """All features, or a seeded sample of `most` of them: int64, rising."""
    if num_features <= most:
        return torch.arange(num_features, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_features, generator=generator, device="cpu")[:most].sort().values


def neighbor_purity(points: Tensor, labels: Tensor, neighbors: int) -> float:
    """The share of nearest neighbors, by distance, that have a point's label; a mean over points.

    For rows of length 1, nearest by distance is nearest by cosine.
    """
    points, same = points.double(), 0.0
    for first in range(0, len(points), ROWS):
        distance = torch.cdist(points[first : first + ROWS], points)
        # a point is not its own neighbor
        own = torch.arange(len(distance), device=distance.device)
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
