"""Figures: what is drawn, what is left out, nothing covered, the same bytes each time."""

import itertools
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
import torch
from helpers.saes import make
from matplotlib import pyplot
from matplotlib.text import Text

from hf_switch_sae import SwitchSAEError
from hf_switch_sae.geometry.measure import measure_geometry
from hf_switch_sae.plots import comparison as compared
from hf_switch_sae.plots import draw_comparison, draw_geometry, draw_sae, style
from hf_switch_sae.plots.sae import training_curves


def entry(label, family, experts, features, flops, fvu, l0=32.0, **more):
    return {
        "name": label,
        "label": label,
        "family": family,
        "num_experts": experts,
        "num_features": features,
        "k": None if family in ("relu", "jumprelu", "gated") else 64 if l0 > 50 else 32,
        "flops_per_token": {"total": flops},
        "fvu": fvu,
        "l0": l0,
        **more,
    }


SAES = [
    entry("Switch 8 x 3072", "switch", 8, 24576, 7.2e6, 0.121, ce_recovered=0.98),
    entry("Switch 8 x 384", "switch", 8, 3072, 9.6e5, 0.172, ce_recovered=0.96),
    entry("Switch 16 x 192", "switch", 16, 3072, 5.3e5, 0.180, ce_recovered=0.958),
    entry("TopK 3072", "topk", 1, 3072, 7.15e6, 0.152, ce_recovered=0.97),
    entry("TopK 3072, k 64", "topk", 1, 3072, 7.2e6, 0.118, 64.0, ce_recovered=0.983),
    entry("BatchTopK 3072", "batch_topk", 1, 3072, 7.1e6, 0.150, 33.0),
    entry("ReLU 3072", "relu", 1, 3072, 7.1e6, 0.26, 41.3, ce_recovered=0.91),
    entry("JumpReLU 3072", "jumprelu", 1, 3072, 7.1e6, 0.158, 36.0, ce_recovered=0.97),
    entry("Gated 3072", "gated", 1, 3072, 7.3e6, 0.17, 35.0),
]


def names(files):
    for file in files:
        assert file.stat().st_size > 1000
        if file.suffix == ".svg":
            ElementTree.parse(file)
    pairs = {file.stem: set() for file in files}
    for file in files:
        pairs[file.stem].add(file.suffix)
    assert all(kinds == {".svg", ".png"} for kinds in pairs.values())
    return list(pairs)


def test_a_comparison_is_drawn_and_ce_only_where_it_was_measured(tmp_path):
    said = []
    files = draw_comparison({"format": 1, "saes": SAES}, tmp_path / "a", said.append)
    assert names(files) == ["flops_fvu", "l0_fvu", "l0_ce_recovered"]
    assert not said
    without = [{n: v for n, v in each.items() if n != "ce_recovered"} for each in SAES]
    files = draw_comparison({"format": 1, "saes": without}, tmp_path / "b", said.append)
    assert names(files) == ["flops_fvu", "l0_fvu"]
    assert said == ["l0_ce_recovered is left out: the comparison has no CE recovered."]


@pytest.mark.parametrize("value", [{}, {"format": 2, "saes": SAES}, {"format": 1, "saes": []}])
def test_what_is_no_comparison_is_refused_and_nothing_written(tmp_path, value):
    with pytest.raises(SwitchSAEError, match="no comparison of format 1"):
        draw_comparison(value, tmp_path)
    assert not list(tmp_path.iterdir())


def drawn_texts(figure):
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    return axes, [(t.get_text(), Text.get_window_extent(t, renderer)) for t in axes.texts]


@pytest.mark.parametrize("many", [1, 2, len(SAES)])
def test_labels_cover_no_label_no_point_and_stay_inside(many):
    saes = SAES[:many]
    with style.look():
        for figure in (compared._costs(saes), compared._sparsity(saes, "fvu", "FVU")):
            axes, texts = drawn_texts(figure)
            assert [text for text, _ in texts] == [each["label"] for each in saes]
            frame = axes.get_window_extent()
            for (_, a), (_, b) in itertools.combinations(texts, 2):
                assert not a.overlaps(b)
            dots = [
                axes.transData.transform(point)
                for collection in axes.collections
                for point in collection.get_offsets()
            ]
            assert len(dots) == many
            for _, box in texts:
                assert frame.x0 <= box.x0
                assert box.x1 <= frame.x1
                assert frame.y0 <= box.y0
                assert box.y1 <= frame.y1
                assert not any(box.contains(*dot) for dot in dots)


def test_alike_points_have_labels_apart():
    saes = [{**SAES[0], "label": f"Switch {seed}"} for seed in range(4)]
    with style.look():
        _, texts = drawn_texts(compared._costs(saes))
    for (_, a), (_, b) in itertools.combinations(texts, 2):
        assert not a.overlaps(b)


def test_families_differ_in_marker_and_line_as_in_color():
    kinds = list(compared._FAMILIES.values())
    for part in range(4):
        assert len({str(kind[part]) for kind in kinds}) == len(kinds)


def test_the_pareto_front_is_of_those_that_no_other_beats():
    points = [(2.0, 3.0), (1.0, 5.0), (3.0, 3.0), (4.0, 1.0), (2.0, 4.0), (5.0, 2.0)]
    expected = [
        index
        for index, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]
    assert sorted(compared.pareto_front(points)) == sorted(expected)
    assert compared.pareto_front(points) == [1, 0, 3]


def test_the_drawn_front_is_of_saes_of_the_commonest_k_alone():
    cheap = entry("ReLU 64", "relu", 1, 64, 1e5, 0.05, 300.0)
    with style.look():
        (line,) = compared._costs([*SAES, cheap]).axes[0].lines
    assert line.get_label() == "Pareto front, k = 32"
    corners = set(map(tuple, line.get_xydata()))
    assert {(each["flops_per_token"]["total"], each["fvu"]) for each in SAES[:3]} <= corners
    assert min(y for _, y in corners) == 0.121  # not 0.118 of k = 64, nor the ReLU SAE's
    with style.look():
        assert not compared._costs([cheap]).axes[0].lines


def measured(kind="switch", **fields):
    sae = make(kind, **fields)
    sae.feature_rate.copy_(torch.linspace(0, 0.2, sae.config.num_features))
    sae.statistics_tokens.fill_(100)
    return sae


def test_geometry_is_drawn_whole_of_experts(tmp_path):
    said = []
    found = measure_geometry(measured(), map_features=24)
    files = draw_geometry(found, tmp_path, said.append)
    assert names(files) == ["maps", "duplicates", "similarity", "alignment"]
    assert not said


def test_of_one_expert_what_needs_a_router_is_left_out_and_said(tmp_path):
    said = []
    found = measure_geometry(make("plain_topk"), maps=False)
    assert names(draw_geometry(found, tmp_path, said.append)) == ["duplicates"]
    assert len(said) == 2
    assert "t-SNE" in said[0]
    assert "one expert" in said[1]


@pytest.mark.parametrize("experts", [17, 300])
def test_many_experts_have_a_scale_and_no_more_numbers_than_can_be_read(tmp_path, experts):
    said = []
    sae = make(num_features=2 * experts, num_experts=experts, k=1)
    found = measure_geometry(sae, map_features=40)
    drawn = names(draw_geometry(found, tmp_path, said.append))
    assert drawn == ["maps", "duplicates", "similarity", "alignment"]


LOG = [
    {"loss": 1.0, "fvu": 0.9, "dead_share": 0.0, "expert_load": 2.0, "tokens": 100, "step": 1},
    {"loss": 0.5, "fvu": 0.4, "dead_share": 0.1, "expert_load": 1.5, "tokens": 200, "step": 2},
    {"eval_fvu": 0.45, "eval_dead_share": 0.2, "step": 2},
    {"train_runtime": 3.0, "step": 2},
]


def test_an_sae_and_its_run_are_drawn(tmp_path):
    run = {"log": LOG, "tokens": 200, "steps": 2}
    rate = torch.linspace(0, 0.2, 24)
    assert names(draw_sae(4, tmp_path, rate=rate, run=run)) == ["load", "density", "training"]


@pytest.mark.parametrize("rate", [torch.zeros(8), torch.full((8,), 0.25)])
def test_features_that_all_fire_alike_or_never_are_drawn(tmp_path, rate):
    assert names(draw_sae(2, tmp_path, rate=rate)) == ["load", "density"]


def test_what_is_not_known_of_an_sae_is_left_out_and_said(tmp_path):
    said = []
    assert draw_sae(1, tmp_path, tell=said.append) == []
    assert [sentence.split()[0] for sentence in said] == ["load", "density", "training"]
    assert draw_sae(4, tmp_path, tell=said.append) == []
    assert "not calibrated" in said[3]
    assert not list(tmp_path.iterdir())


def test_curves_are_of_the_saes_own_place_over_tokens():
    place = "layers.1.resid_post"
    log = [
        {f"{place}/fvu": 0.5, "layers.2.resid_post/fvu": 9.0, "tokens": 10, "step": 1},
        {f"{place}/fvu": 0.4, "layers.2.resid_post/fvu": 9.0, "tokens": 20, "step": 2},
        {f"eval_{place}/fvu": 0.45, "step": 2},
    ]
    found = training_curves({"log": log, "tokens": 20, "steps": 2, "hookpoint": place})
    assert found == {"fvu": {"training": [(10, 0.5), (20, 0.4)], "held out": [(20.0, 0.45)]}}
    assert training_curves({"log": LOG[:1]}) == {}
    assert training_curves({}) == {}


def test_the_same_data_gives_the_same_bytes_and_leaves_others_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    found = measure_geometry(measured(), map_features=24)
    for part in ("a", "b"):
        draw_comparison({"format": 1, "saes": SAES}, tmp_path / part)
        draw_geometry(found, tmp_path / part)
        draw_sae(4, tmp_path / part, rate=torch.linspace(0, 0.2, 24), run={"log": LOG})
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 20
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert dict(matplotlib.rcParams) == before
    assert not pyplot.get_fignums()


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SwitchSAEError, match=r"pip install .hf-switch-sae\[viz\]."):
        draw_comparison({"format": 1, "saes": SAES}, tmp_path)


def test_a_map_of_one_expert_is_drawn(tmp_path):
    found = measure_geometry(make("plain_topk"), map_features=24)
    assert names(draw_geometry(found, tmp_path)) == ["maps", "duplicates"]
