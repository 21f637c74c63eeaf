"""Every number of `geometry` against its definition over all pairs, in float64."""

import json
import sys

import numpy
import pytest
import torch
from helpers.saes import make
from torch.utils._python_dispatch import TorchDispatchMode

from hf_switch_sae import SwitchSAEError
from hf_switch_sae.geometry.cosines import (
    COLUMNS,
    ROWS,
    nearest_by_expert,
    random_unit_rows,
    unit_rows,
    unit_rows_of,
)
from hf_switch_sae.geometry.measure import THRESHOLDS, measure_geometry
from hf_switch_sae.geometry.result import Geometry
from hf_switch_sae.geometry.tsne import draw_maps, neighbor_purity, sample_features

E, M, D = 4, 6, 16
F = E * M


def calibrated(kind="switch", **fields):
    sae = make(kind, **fields)
    generator = torch.Generator().manual_seed(1)
    sae.feature_rate.copy_(torch.rand(sae.config.num_features, generator=generator))
    sae.statistics_tokens.fill_(1000)
    return sae


def cosines(rows, columns):
    """[n, n], float64, nothing on the diagonal where both are the same."""
    rows, columns = rows.flatten(0, -2).double(), columns.flatten(0, -2).double()
    return (rows / rows.norm(dim=1, keepdim=True)) @ (columns / columns.norm(dim=1, keepdim=True)).T


def of_all_pairs(weight, experts):
    """Nearest cosine of all, within and between, from the whole matrix."""
    found = cosines(weight, weight).fill_diagonal_(-torch.inf)
    expert = torch.arange(len(found)) // (len(found) // experts)
    same = expert[:, None] == expert
    return {
        "any": found.amax(1),
        "within": found.where(same, -torch.inf).amax(1),
        "between": found.where(~same, -torch.inf).amax(1),
    }, found


@pytest.mark.parametrize("most", [5, 6, 13, 1000])
def test_blocks_find_what_the_whole_matrix_has(most):
    rows = torch.randn(F, D, generator=torch.Generator().manual_seed(2))
    _, whole = of_all_pairs(rows, E)

    found, ids = nearest_by_expert(
        unit_rows(rows), torch.arange(F), unit_rows_of(rows), E, M, most=most
    )

    expected = whole.view(F, E, M).max(-1)
    torch.testing.assert_close(found.double(), expected.values, atol=1e-6, rtol=0)
    assert torch.equal(ids, expected.indices + M * torch.arange(E))


@pytest.mark.parametrize("block", [7, 2048])
def test_neighbors_and_shares_are_those_of_the_whole_matrix(block, monkeypatch):
    monkeypatch.setattr("hf_switch_sae.geometry.measure._neighbors.__defaults__", (block, 8192))
    sae = calibrated()
    expected, whole = of_all_pairs(sae.W_dec.detach(), E)

    found = measure_geometry(sae, threshold=0.4, maps=False)

    assert torch.equal(found.table["nearest"].long(), whole.argmax(1))
    for kind, column in (("any", "cosine"), ("within", "within"), ("between", "between")):
        values, rate = expected[kind], sae.feature_rate.double()
        torch.testing.assert_close(found.table[column].double(), values, atol=1e-6, rtol=0)
        assert found.nearest[kind]["mean"] == pytest.approx(float(values.mean()), abs=1e-6)
        quantiles = list(found.nearest[kind]["quantiles"].values())
        wanted = values.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double())
        assert quantiles == pytest.approx(wanted.tolist(), abs=1e-6)
        told, curve = found.duplicates[kind], found.duplicates["curve"][kind]
        assert told["share"] == pytest.approx(float((values > 0.4).double().mean()))
        weighted = float((rate * (values > 0.4)).sum() / rate.sum())
        assert told["of_activations"] == pytest.approx(weighted)
        shares = [float((values > at).double().mean()) for at in THRESHOLDS]
        assert curve["share"] == pytest.approx(shares)
        weights = [float((rate * (values > at)).sum() / rate.sum()) for at in THRESHOLDS]
        assert curve["of_activations"] == pytest.approx(weights)
    expert = torch.arange(F) // M
    share = (expert == expert[whole.argmax(1)]).double().mean()
    assert found.nearest["in_own_expert"] == pytest.approx(float(share))
    assert found.nearest["chance"] == pytest.approx((M - 1) / (F - 1))


def test_experts_are_as_similar_as_the_mean_of_the_largest_cosines():
    sae = calibrated()
    _, whole = of_all_pairs(sae.W_dec.detach(), E)

    found = measure_geometry(sae, maps=False).similarity

    expected = whole.view(E, M, E, M).amax(-1).mean(1)
    assert numpy.array(found["experts"]) == pytest.approx(expected.numpy(), abs=1e-6)
    assert found["own"] == pytest.approx(float(expected.diagonal().mean()), abs=1e-6)
    rest = (expected.sum() - expected.diagonal().sum()) / (E * (E - 1))
    assert found["other"] == pytest.approx(float(rest), abs=1e-6)


def test_the_router_is_aligned_by_cosine_with_the_encoder_rows_of_its_expert():
    sae = calibrated()
    whole = cosines(sae.W_enc.detach(), sae.router.weight.detach())  # [F, E]
    expert = torch.arange(F) // M
    own = whole[torch.arange(F), expert]
    others = (whole.sum(1) - own) / (E - 1)

    found = measure_geometry(sae, maps=False)

    torch.testing.assert_close(found.table["alignment"].double(), own - others, atol=1e-6, rtol=0)
    assert found.router["own"] == pytest.approx(float(own.mean()), abs=1e-6)
    assert found.router["others"] == pytest.approx(float(others.mean()), abs=1e-6)
    right = float((whole.argmax(1) == expert).double().mean())
    assert found.router["own_is_nearest"] == pytest.approx(right)
    wanted = (own - others).view(E, M).mean(1).tolist()
    assert found.router["by_expert"] == pytest.approx(wanted, abs=1e-6)
    bars, edges = numpy.histogram(own, numpy.array(found.router["histogram"]["edges"]))
    assert found.router["histogram"]["own"] == bars.tolist()
    assert len(edges) == len(bars) + 1
    assert sum(found.router["histogram"]["others"]) == F


def test_planted_duplicates_are_found_counted_and_listed_highest_first():
    sae = calibrated()
    with torch.no_grad():
        rows = sae.W_dec.flatten(0, 1)
        rows[8] = 3.0 * rows[2]  # between, whatever the length
        rows[10] = rows[9] + 0.02 * torch.randn(D)  # within

    found = measure_geometry(sae, threshold=0.99, maps=False)

    assert found.pairs["count"] == 2
    first, second = found.pairs["listed"]
    assert (first["features"], first["experts"]) == ([2, 8], [0, 1])
    assert (second["features"], second["experts"]) == ([9, 10], [1, 1])
    assert first["cosine"] == pytest.approx(1, abs=1e-6)
    assert first["rates"] == pytest.approx(sae.feature_rate[[2, 8]].tolist())
    encoder = cosines(sae.W_enc.detach(), sae.W_enc.detach())
    assert first["encoder_cosine"] == pytest.approx(float(encoder[2, 8]), abs=1e-6)
    shares = {kind: found.duplicates[kind]["share"] for kind in ("any", "within", "between")}
    assert shares == pytest.approx({"any": 4 / F, "within": 2 / F, "between": 2 / F})


def test_no_more_pairs_are_listed_than_asked_for_and_all_are_counted():
    found = measure_geometry(calibrated(), threshold=0.1, listed_pairs=3, maps=False)
    assert len(found.pairs["listed"]) == 3
    assert found.pairs["count"] > 3
    cosine = [pair["cosine"] for pair in found.pairs["listed"]]
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[0] == pytest.approx(float(found.table["cosine"].max()))


@pytest.mark.parametrize("rows", [4096, 500])
def test_the_null_is_the_expected_largest_cosine_of_random_unit_vectors(rows, monkeypatch):
    """E[max of n] = integral of 1 - P(cosine < t)^n less 1, with P of a Beta distribution."""
    from scipy.stats import beta

    # of many features, only some are drawn
    monkeypatch.setattr("hf_switch_sae.geometry.measure._NULL_ROWS", rows)
    sae = make(num_features=2000, num_experts=4, k=3)

    found = measure_geometry(sae, maps=False)

    error = min(rows, 2000) ** -0.5  # a few times the spread of a mean of so many
    t = numpy.linspace(-1, 1, 20001)
    below = beta.cdf((1 + t) / 2, (D - 1) / 2, (D - 1) / 2)
    for kind, candidates in (("any", 1999), ("within", 499), ("between", 1500)):
        expected = 1 - numpy.trapezoid(below**candidates, t)
        assert found.nearest[kind]["null_mean"] == pytest.approx(expected, abs=0.2 * error), kind
        share = 1 - below[numpy.searchsorted(t, 0.74)] ** candidates
        at = THRESHOLDS.index(0.74)
        null = found.duplicates["curve"][kind]["null"][at]
        assert null == pytest.approx(share, abs=1.8 * error), kind
    assert found.similarity["null"]["own"] == pytest.approx(found.nearest["within"]["null_mean"])


def test_random_rows_are_drawn_evenly_and_alike_however_they_are_asked_for():
    whole = random_unit_rows(50, D, 3, "cpu")(0, 50)
    rows = random_unit_rows(50, D, 3, "cpu")
    assert torch.equal(torch.cat([rows(0, 16), rows(16, 32), rows(32, 50)]), whole)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(50))
    with pytest.raises(ValueError, match="not the next"):
        rows(0, 1)


def test_an_initial_sae_has_no_structure_above_its_null():
    found = measure_geometry(make(num_features=512, num_experts=4, k=3), maps=False)
    for kind in ("any", "within", "between"):
        assert found.nearest[kind]["mean"] == pytest.approx(
            found.nearest[kind]["null_mean"], abs=0.02
        )


def test_one_expert_has_no_between_no_router_and_no_purity():
    found = measure_geometry(make("plain_topk"), map_features=12)
    assert found.router is None
    assert found.nearest["between"] is None
    assert found.duplicates["between"] is None
    assert found.clusters["purity"] is None
    assert found.similarity["other"] is None
    assert found.duplicates["any"]["of_activations"] is None, "not calibrated"
    assert found.pairs["listed"] == [] or found.pairs["listed"][0]["rates"] is None


def test_one_feature_an_expert_has_no_within():
    found = measure_geometry(make(num_features=8, num_experts=8, k=1), maps=False)
    assert found.nearest["within"] is None
    assert found.similarity["experts"][0][0] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_nearest_in_reduced_precision_and_of_zero_rows_is_finite():
    sae = make().to(torch.bfloat16)
    with torch.no_grad():
        sae.experts[0].W_dec[0, 0] = 0
    found = measure_geometry(sae, maps=False)
    assert found.table["cosine"][0] == 0
    assert found.table["cosine"].abs().max() <= 1


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor made within has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.numbers = max(self.numbers, found.untyped_storage().nbytes() // 4)
        return found


def test_no_tensor_is_as_large_as_all_pairs():
    sae = make(hidden_size=4, num_features=12_000, num_experts=3, k=2)
    with Largest() as largest:
        measure_geometry(sae, maps=False)
    assert largest.numbers <= ROWS * COLUMNS < 12_000**2


def test_groups_of_experts_change_nothing():
    ours, theirs = (measure_geometry(make(groups=g), maps=False).to_dict() for g in (1, 2))
    assert ours == theirs


def test_it_is_saved_and_loaded_and_the_same_each_time(tmp_path):
    found = measure_geometry(calibrated(), map_features=16)
    files = found.save(tmp_path / "a")
    again = measure_geometry(calibrated(), map_features=16)
    again.save(tmp_path / "b")

    assert [file.name for file in files] == ["geometry.json", "geometry.parquet"]
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    held = json.loads(files[0].read_text())
    assert held["format"] == 1
    assert held == found.to_dict()
    loaded = Geometry.load(tmp_path / "a")
    assert loaded.to_dict() == held
    for name, values in found.table.items():
        torch.testing.assert_close(loaded.table[name], values, equal_nan=True)
    assert int(loaded.table["encoder_x"].isfinite().sum()) == 16
    with pytest.raises(SwitchSAEError, match="hf-switch-sae geometry"):
        Geometry.load(tmp_path)


@pytest.mark.parametrize("metric", ["rows", "points"])
def test_purity_is_the_share_of_neighbors_of_the_same_label(metric):
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(3)).double()
    if metric == "rows":
        points /= points.norm(dim=1, keepdim=True)
        near = (points @ points.T).fill_diagonal_(-torch.inf)
    else:
        near = -(points[:, None] - points).norm(dim=-1).fill_diagonal_(torch.inf)
    labels = torch.arange(40) // 10
    same = [
        float((labels[near[row].topk(7).indices] == labels[row]).double().mean())
        for row in range(40)
    ]
    assert neighbor_purity(points, labels, 7) == pytest.approx(sum(same) / 40)


def test_maps_keep_planted_clusters_together_and_chance_is_that_of_shuffled_labels():
    generator = torch.Generator().manual_seed(4)
    centers = torch.randn(E, 1, D, generator=generator)
    rows = (centers + 0.1 * torch.randn(E, 40, D, generator=generator)).flatten(0, 1)
    noise = torch.randn(E * 40, D, generator=generator)

    found = draw_maps(rows, noise, 40, most=100, seed=0)

    assert len(found.features) == 100
    assert found.purity["encoder"]["rows"] == 1
    assert found.purity["encoder"]["picture"] > 0.95
    assert found.purity["decoder"]["rows"] == pytest.approx(found.chance, abs=0.1)
    sizes = (found.features // 40).bincount()
    assert found.chance == pytest.approx(float((sizes * (sizes - 1)).sum()) / (100 * 99))


def test_the_sample_is_seeded_and_whole_where_it_can_be():
    assert torch.equal(sample_features(5, 9, 0), torch.arange(5))
    assert torch.equal(sample_features(1000, 9, 0), sample_features(1000, 9, 0))
    assert not torch.equal(sample_features(1000, 9, 0), sample_features(1000, 9, 1))


def test_without_opentsne_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(SwitchSAEError, match=r"pip install .hf-switch-sae\[viz\]."):
        measure_geometry(make())
    measure_geometry(make(), maps=False)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5])
def test_a_threshold_that_is_none_is_refused(threshold):
    with pytest.raises(SwitchSAEError, match="threshold"):
        measure_geometry(make(), threshold=threshold)
