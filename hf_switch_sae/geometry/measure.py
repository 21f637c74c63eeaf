"""An SAE's weights -> how its features lie to each other.

Room   `measure_geometry` -> a `Geometry`, saved as geometry.json (the figures) and geometry.parquet
       (one row per feature: its nearest neighbor, its cosines, its place on the maps).
How    A feature's nearest neighbor is the other feature whose decoder row has the largest cosine
       with its own. A feature is a duplicate if that cosine is above the threshold: *within* if
       such a feature is in its own expert, *between* if one is in another; it can be both. A
       weighted share counts each feature as often as it fires.
       The null is the same measurement on random unit vectors: as many, as wide, and cut into as
       many experts. Whatever is not above the null is no structure.
Beware A feature has num_features - features_per_expert candidates in other experts, and only
       features_per_expert - 1 in its own. So don't compare the shares within and between with each
       other, but each with its null.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.geometry.cosines import (
    COLUMNS,
    ROWS,
    nearest_by_expert,
    random_unit_rows,
    unit_rows,
    unit_rows_of,
)
from hf_switch_sae.geometry.result import _MOST_EXPERTS_WRITTEN, Geometry
from hf_switch_sae.geometry.tsne import FeatureMaps, draw_maps
from hf_switch_sae.sae.model import SwitchSAE

THRESHOLDS = tuple(step / 50 for step in range(51))
"""Where the curve of duplicates is taken: 0, 0.02, ... 1."""
_NULL_ROWS = 4096  # random rows whose neighbors are searched
_BINS = 80  # of the router's histogram
_KINDS = ("any", "within", "between")


@torch.no_grad()
def measure_geometry(
    sae: SwitchSAE,
    *,
    threshold: float = 0.9,
    listed_pairs: int = 100,
    maps: bool = True,
    map_features: int = 4096,
    perplexity: float = 50.0,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Geometry:
    """Measure how an SAE's features lie to each other; `Geometry` says what the figures mean.

    Time grows with the square of the number of features, memory only in proportion to it.

    Args:
        sae: of any number of experts; shares of activations need its statistics (`calibrate`).
        threshold: the cosine above which two features are duplicates.
        listed_pairs: the most pairs to list.
        maps: whether to draw t-SNE maps (needs the extra `viz`).
        map_features: the most features to draw; if there are more, a seeded sample.
        perplexity: of t-SNE; it is lowered if there are few features.
        seed: of the random vectors, the sample and t-SNE.
        device: where to compute; by default the SAE's.

    Raises:
        SwitchSAEError: a single feature, a threshold outside 0 to 1, or openTSNE is missing.
    """
    config = sae.config
    if config.num_features < 2:
        raise SwitchSAEError("an SAE of one feature has no geometry: it has no neighbor.")
    if not 0 < threshold < 1:
        raise SwitchSAEError(f"threshold={threshold} is no cosine between 0 and 1.")
    device = sae.device if device is None else device
    encoder, decoder = sae.W_enc.flatten(0, 1), sae.W_dec.flatten(0, 1)
    shape = (config.num_experts, config.features_per_expert)
    # the maps come first, as openTSNE may be missing
    drawn = None
    if maps:
        drawn = draw_maps(encoder, decoder, shape[1], map_features, perplexity, seed)
    # each feature's nearest neighbors, and the same for random vectors
    columns = unit_rows_of(decoder, device)
    own = torch.arange(config.num_features, device="cpu")
    found = _neighbors(columns, own, columns, shape, device)
    count = min(config.num_features, _NULL_ROWS)
    null = _null(config.num_features, config.hidden_size, count, shape, seed, device)
    rate = sae.feature_rate.cpu() if int(sae.statistics_tokens) else None
    alignment, router = _router_alignment(sae, encoder, device)
    return Geometry(
        sae=_about(sae),
        seed=seed,
        nearest=_nearest(found, null, shape),
        duplicates=_duplicates(found, null, rate, threshold),
        pairs=_pairs(found, unit_rows_of(encoder, device), rate, shape[1], threshold, listed_pairs),
        similarity=_similarity(found, null, shape),
        router=router,
        clusters=None if drawn is None else drawn.to_dict(),
        table=_table(found, shape[1], alignment, rate) | _map_columns(drawn, config.num_features),
    )


@dataclass(frozen=True)
class _Neighbors:
    """The nearest neighbors of n rows."""

    values: dict[str, Tensor]
    """For each kind the largest cosine, [n] float32; -inf if there is no candidate."""
    ids: Tensor
    """[n] int64, the nearest feature of all."""
    to_experts: Tensor
    """[E, E] float64: the largest cosine with expert b, summed over the rows of expert a."""
    counts: Tensor
    """[E] int64, the rows of each expert."""


def _neighbors(
    rows: Callable[[int, int], Tensor],
    own: Tensor,
    columns: Callable[[int, int], Tensor],
    shape: tuple[int, int],
    device: torch.device | str,
    block: int = ROWS,
    most: int = COLUMNS,
) -> _Neighbors:
    """Nearest neighbors of rows; `own` [n] says which feature each row is."""
    num_experts, m = shape
    parts: dict[str, list[Tensor]] = {name: [] for name in (*_KINDS, "ids")}
    sums = torch.zeros(num_experts, num_experts, dtype=torch.float64, device="cpu")
    for first in range(0, len(own), block):
        last = min(first + block, len(own))
        mine = own[first:last].to(device)
        best, ids = nearest_by_expert(rows(first, last), mine, columns, num_experts, m, most)
        # `best` has one cosine for each row and expert
        expert = mine // m
        sums.index_add_(0, expert.cpu(), best.double().cpu())
        value, at = best.max(1)
        parts["any"].append(value.cpu())
        parts["ids"].append(ids.gather(1, at[:, None])[:, 0].cpu())
        parts["within"].append(best.gather(1, expert[:, None])[:, 0].cpu())
        # in place: nobody needs the own expert's cosine any more
        parts["between"].append(best.scatter_(1, expert[:, None], -torch.inf).amax(1).cpu())
    joined = {name: torch.cat(part) for name, part in parts.items()}
    counts = torch.bincount(own // m, minlength=num_experts)
    return _Neighbors({kind: joined[kind] for kind in _KINDS}, joined["ids"], sums, counts)


def _null(
    num_features: int,
    hidden_size: int,
    count: int,
    shape: tuple[int, int],
    seed: int,
    device: torch.device | str,
) -> _Neighbors:
    """The same for `count` random rows among `num_features` random columns."""
    # The rows stand for evenly spread features, but are drawn anew instead of being those columns:
    # the distribution is the same, and the columns are made only once.
    own = torch.arange(count, device="cpu") * num_features // count
    # another seed for the columns, or some of them could be these rows
    drawn = random_unit_rows(count, hidden_size, seed, device)(0, count)
    columns = random_unit_rows(num_features, hidden_size, seed + 1, device)
    # random columns come only once, so all rows are one block, and it must be narrower
    most = max(ROWS * COLUMNS // count, 1)
    return _neighbors(
        lambda first, last: drawn[first:last], own, columns, shape, device, count, most
    )


def _about(sae: SwitchSAE) -> dict[str, Any]:
    """`Geometry.sae`."""
    names = ("hookpoint", "hidden_size", "num_features", "num_experts", "k", "activation")
    return {name: getattr(sae.config, name) for name in names} | {
        "features_per_expert": sae.config.features_per_expert,
        "statistics_tokens": int(sae.statistics_tokens),
    }


def _nearest(found: _Neighbors, null: _Neighbors, shape: tuple[int, int]) -> dict[str, Any]:
    """`Geometry.nearest`."""
    num_experts, m = shape
    figures: dict[str, Any] = {}
    for kind in _KINDS:
        values = found.values[kind].double()
        if values.isinf().any():  # one expert has no other, one feature no other in its own
            figures[kind] = None
            continue
        cuts = [float(_quantile(values, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
        figures[kind] = {
            "mean": float(values.mean()),
            "quantiles": dict(zip(("5%", "25%", "50%", "75%", "95%"), cuts, strict=True)),
            "null_mean": float(null.values[kind].double().mean()),
        }
    own = torch.arange(len(found.ids), device="cpu") // m
    figures["in_own_expert"] = float((found.ids // m == own).double().mean())
    figures["chance"] = (m - 1) / (num_experts * m - 1)
    return figures


def _quantile(values: Tensor, q: float) -> Tensor:
    """Like torch.quantile, which takes at most 16M values."""
    ordered, place = values.sort().values, q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _duplicates(
    found: _Neighbors, null: _Neighbors, rate: Tensor | None, threshold: float
) -> dict[str, Any]:
    """`Geometry.duplicates`."""
    figures: dict[str, Any] = {"threshold": threshold}
    # if nothing has ever fired, there is nothing to weight by
    weight = None if rate is None or not rate.any() else rate
    curve: dict[str, Any] = {"thresholds": list(THRESHOLDS)}
    for kind in _KINDS:
        if found.values[kind].isinf().any():
            figures[kind] = curve[kind] = None
            continue
        # at the threshold asked for, and along the curve
        values = found.values[kind]
        each = [
            {
                "share": _share(values, at),
                "of_activations": None if weight is None else _share(values, at, weight),
                "null": _share(null.values[kind], at),
            }
            for at in (threshold, *THRESHOLDS)
        ]
        figures[kind] = each[0]
        curve[kind] = {name: [one[name] for one in each[1:]] for name in each[0]}
        if weight is None:
            curve[kind]["of_activations"] = None
    return {**figures, "null_rows": len(null.ids), "curve": curve}


def _share(cosines: Tensor, threshold: float, weight: Tensor | None = None) -> float:
    """The share of cosines above a threshold, counted by weight; nan without any."""
    above = cosines.double() > threshold
    if weight is None:
        return float(above.double().mean())
    return float((above * weight.double()).sum() / weight.double().sum())


def _pairs(
    found: _Neighbors,
    encoder: Callable[[int, int], Tensor],
    rate: Tensor | None,
    features_per_expert: int,
    threshold: float,
    most: int,
) -> dict[str, Any]:
    """`Geometry.pairs`."""
    # two features that are each other's nearest are one pair
    near = (found.values["any"].double() > threshold).nonzero()[:, 0]
    both = torch.stack([near, found.ids[near]], 1).sort(1).values
    both, which = torch.unique(both, dim=0, return_inverse=True)
    nearest = found.values["any"][near]
    cosine = nearest.new_full((len(both),), -torch.inf).scatter_reduce_(0, which, nearest, "amax")
    order = cosine.argsort(descending=True, stable=True)[:most]
    listed = []
    for (first, second), value in zip(both[order].tolist(), cosine[order].tolist(), strict=True):
        rows = [encoder(feature, feature + 1)[0] for feature in (first, second)]
        listed.append(
            {
                "features": [first, second],
                "experts": [first // features_per_expert, second // features_per_expert],
                "cosine": value,
                "encoder_cosine": float(rows[0] @ rows[1]),
                "rates": None if rate is None else [float(rate[first]), float(rate[second])],
            }
        )
    return {"threshold": threshold, "count": len(both), "listed": listed}


def _similarity(found: _Neighbors, null: _Neighbors, shape: tuple[int, int]) -> dict[str, Any]:
    """`Geometry.similarity`."""
    figures: dict[str, Any] = {}
    for name, each in (("found", found), ("null", null)):
        figures[name] = _own_and_other(each, shape)
    matrix = found.to_experts / found.counts[:, None]
    # JSON has no infinity
    experts = [[None if value == -torch.inf else value for value in row] for row in matrix.tolist()]
    return {"experts": experts, **figures["found"], "null": figures["null"]}


def _own_and_other(each: _Neighbors, shape: tuple[int, int]) -> dict[str, float | None]:
    """Mean largest cosine with the own expert, and with the others; None if there is none."""
    num_experts, m = shape
    total = int(each.counts.sum())
    own = each.to_experts.diagonal().sum() / total
    # experts of one feature have -inf on the diagonal, which must not reach the sum
    rest = each.to_experts.clone().fill_diagonal_(0).sum()
    return {
        "own": float(own) if m > 1 else None,
        "other": float(rest / (total * (num_experts - 1))) if num_experts > 1 else None,
    }


def _router_alignment(
    sae: SwitchSAE, encoder: Tensor, device: torch.device | str
) -> tuple[Tensor, dict[str, Any] | None]:
    """Own minus others for each feature, [F] (nan with one expert), and `Geometry.router`."""
    count, m = sae.config.num_experts, sae.config.features_per_expert
    if count == 1:
        return _no_values(len(encoder)), None
    # cosines of all encoder rows with all router rows, in blocks
    router, rows = unit_rows(sae.router.weight, device), unit_rows_of(encoder, device)
    own, others, right = [], [], []
    for first in range(0, len(encoder), ROWS):
        last = min(first + ROWS, len(encoder))
        cosines = (rows(first, last) @ router.T).double()
        expert = torch.arange(first, last, device=cosines.device)[:, None] // m
        mine = cosines.gather(1, expert)
        own.append(mine[:, 0].cpu())
        others.append(((cosines.sum(1, keepdim=True) - mine) / (count - 1))[:, 0].cpu())
        right.append((cosines.argmax(1) == expert[:, 0]).cpu())
    # figures over all features
    mine, rest = torch.cat(own), torch.cat(others)
    gap = mine - rest
    edges = torch.linspace(-1, 1, _BINS + 1, dtype=torch.float64, device="cpu")
    figures = {
        "own": float(mine.mean()),
        "others": float(rest.mean()),
        "difference": float(gap.mean()),
        "own_is_nearest": float(torch.cat(right).double().mean()),
        "chance": 1 / count,
        "by_expert": gap.view(count, m).mean(1).tolist()
        if count <= _MOST_EXPERTS_WRITTEN
        else None,
        "histogram": {
            "edges": edges.tolist(),
            **{
                name: torch.histogram(values, edges).hist.long().tolist()
                for name, values in (("own", mine), ("others", rest))
            },
        },
    }
    return gap.float(), figures


def _table(
    found: _Neighbors, features_per_expert: int, alignment: Tensor, rate: Tensor | None
) -> dict[str, Tensor]:
    """`Geometry.table`, without the places on the maps."""
    num_features = len(found.ids)
    features = torch.arange(num_features, dtype=torch.int32, device="cpu")
    return {
        "expert": features // features_per_expert,
        "nearest": found.ids.to(torch.int32),
        "cosine": found.values["any"],
        "within": found.values["within"],
        "between": found.values["between"],
        "alignment": alignment,
        "rate": _no_values(num_features) if rate is None else rate,
    }


def _map_columns(drawn: FeatureMaps | None, num_features: int) -> dict[str, Tensor]:
    if drawn is None:
        return {}
    found = {}
    for name, points in (("encoder", drawn.encoder), ("decoder", drawn.decoder)):
        for axis, values in zip("xy", points.T, strict=True):
            column = _no_values(num_features)
            column[drawn.features] = values.float()
            found[f"{name}_{axis}"] = column
    return found


def _no_values(count: int) -> Tensor:
    return torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")
