"""Figures of held-out rows: in batches of any size, in one process or two, against float64."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import saes
from torch import Tensor

from hf_switch_sae import SwitchSAE
from hf_switch_sae.evaluation.heldout import RowSums, measure_held_out
from hf_switch_sae.training import TensorActivations

KINDS = ["switch", "plain_topk", "two_experts", "relu", "layer_norm"]
PLACE = "layers.0.resid_post"


def some_rows() -> Tensor:
    return saes.rows(96) + 0.5


def bounded(kind: str) -> SwitchSAE:
    """An SAE that takes some rows for outliers."""
    sae = saes.make(kind, hookpoint=PLACE)
    sae.outlier_norm.fill_(float(some_rows().norm(dim=-1).quantile(0.9)))
    return sae


@torch.no_grad()
def definition(sae: SwitchSAE, x: Tensor) -> dict[str, float]:
    """In float64, as each figure is said in words."""
    kept = x[x.norm(dim=-1) <= sae.outlier_norm]
    features = sae.encode(kept)
    y, y_of_all = (sae.decode(sae.encode(each), each).double() for each in (kept, x))
    kept, x = kept.double(), x.double()
    fired = (features.to_dense() > 0).double()
    found = {
        "fvu": (kept - y).square().sum() / (kept - kept.mean(0)).square().sum(),
        "fvu_all_tokens": (x - y_of_all).square().sum() / (x - x.mean(0)).square().sum(),
        "mse": (kept - y).square().mean(),
        "cosine": ((kept * y).sum(1) / kept.norm(dim=1) / y.norm(dim=1)).mean(),
        "l0": fired.sum(1).mean(),
        "dead_share": (fired.sum(0) == 0).double().mean(),
        "tokens": len(kept),
        "outlier_tokens": len(x) - len(kept),
    }
    if (experts := sae.config.num_experts) > 1:
        ids = sae(kept.float()).router_logits.topk(sae.config.num_experts_per_token).indices
        share = ids.flatten().bincount(minlength=experts).double() / ids.numel()
        found["expert_load"] = share.max() * experts
        found["routing_entropy"] = -(share * share.log()).nansum() / math.log(experts)
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("batch", [1, 7, 96])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_figure_is_its_definition_whatever_the_batches_and_processes(kind, batch):
    sae, x = bounded(kind), some_rows()
    ranks = [RowSums(sae), RowSums(sae)]
    for at, part in enumerate(x.split(batch)):
        ranks[at % 2 if batch < 96 else 0].add(part)
    if batch == 96:
        ranks = ranks[:1]

    found, density = figures(ranks)

    assert found == pytest.approx(definition(sae, x), rel=1e-6, abs=1e-6)
    kept = x[x.norm(dim=-1) <= sae.outlier_norm]
    rates = (sae.encode(kept).to_dense() > 0).double().mean(0)
    assert density["never"] == int((rates == 0).sum())
    edges, logs = density["log10_edges"], rates[rates > 0].log10()
    inside = [((logs >= a) & (logs < b)).sum() for a, b in pairwise(edges)]
    inside[-1] += (logs == 0).sum()  # the last has its end
    assert density["counts"] == [int(each) for each in inside]


def figures(ranks: list[RowSums]) -> tuple[dict[str, float], dict]:
    """As the first process has them when each adds up over all."""
    sent: list[list[Tensor]] = []
    for rank in ranks[1:]:
        said: list[Tensor] = []
        of_all(rank, lambda x, said=said: said.append(x) or x)
        sent.append(said)
    turns = iter(zip(*sent, strict=True)) if sent else iter(lambda: (), None)
    return of_all(ranks[0], lambda x: x + sum(next(turns)) if sent else x)


def of_all(rank: RowSums, reduce) -> tuple[dict[str, float], dict]:
    return {**rank.figures(reduce), **rank.figures_of_all(reduce)}, rank.density(reduce)


def test_rows_over_a_common_bound_are_left_out_and_batches_leave_none_over():
    sae, x = bounded("switch"), some_rows()
    bound = float(sae.outlier_norm)
    sae.outlier_norm.fill_(math.inf)
    sums: dict[str, RowSums] = {}
    rows = TensorActivations({PLACE: x})
    alone = (0, 1, lambda each: each)
    (found,) = measure_held_out({"a": sae}, rows, 40, *alone, sums, bound).values()
    sae.outlier_norm.fill_(bound)
    expected = definition(sae, x)
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
    assert (
        sums["a"].figures_of_all(lambda each: each)["outlier_tokens"] == found["tokens"] / 86 * 10
    )
