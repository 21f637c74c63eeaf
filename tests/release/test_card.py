"""Cards tell what lies in a release, say what fails, and those of model_cards/ are up to date."""

import json
import pathlib
import re
import shutil
import sys

import pytest
import torch
from helpers.saes import D, make
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from hf_switch_sae import SwitchSAE, SwitchSAEError, plots
from hf_switch_sae.cli.app import app
from hf_switch_sae.hub.layout import saes_in
from hf_switch_sae.release.card import BEGIN, END, known_repo_id, render_card, write_card
from hf_switch_sae.release.facts import CAPTIONS, facts_of
from hf_switch_sae.release.push import files_to_push, save_all

CARDS = pathlib.Path(__file__).parents[2] / "model_cards"
RELEASES = sorted(path.parent for path in CARDS.glob("*/README.md"))
A, B = "layers.3.resid_post", "layers.7.resid_post"


def entry(name, experts, features, fvu, flops, **more):
    return {
        "name": name,
        "label": name.upper(),
        "family": "switch" if experts > 1 else "topk",
        "num_experts": experts,
        "num_features": features,
        "k": 32,
        "parameters": 1000 * features,
        "train_tokens": 5_000_000,
        "seed": 0,
        "flops_per_token": {"total": flops},
        "fvu": fvu,
        "l0": 32.0,
        "dead_share": 0.0125,
        "tokens": 65_530,
        **more,
    }


def pair(difference):
    return {
        "sae": "wide",
        "against": "dense",
        "fvu": 0.12,
        "against_fvu": 0.15,
        "relative_difference": difference,
        "flops_ratio": 1.02,
        "encoder_flops_ratio": 1.0,
        "parameters_ratio": 8.0,
        "l0": 32.0,
        "against_l0": 32.0,
    }


COMPARISON = {
    "format": 1,
    "measured_on": {"rows": 65536, "hookpoint": A},
    "command": "hf-switch-sae compare cache --held-out other --set paper",
    "saes": [entry("wide", 8, 24576, 0.12, 7.2e6), entry("dense", 1, 3072, 0.15, 7.1e6)],
    "comparisons": {
        "equal_tokens": [pair(-0.2)],
        "equal_flops": [pair(-0.2)],
        "equal_parameters": [],
        "equal_error": [{"sae": "wide", "fvu": 0.12, "flops": 7.2e6, "flops_saved": None}],
    },
    "claims": [
        {"claim": "wide is better", "holds": True, "sentence": "it is by 20%"},
        {"claim": "wide is cheaper", "holds": False, "sentence": "it costs 2% more"},
    ],
}
RUN = {
    "command": "hf-switch-sae train org/lm texts.parquet --layer 3",
    "hookpoint": A,
    "policy": {"context": 256, "skip_first": True},
    "steps": 2,
    "tokens": 8192,
    "versions": {"torch": "2.13"},
    "log": [{"fvu": 0.5, "tokens": 4096, "step": 1}, {"fvu": 0.25, "tokens": 8192, "step": 2}],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A release with all that a card tells of, its geometry and figures by command."""
    folder = tmp_path_factory.mktemp("whole") / "release"
    sae = make(hookpoint=A, base_model="org/lm", metrics={"fvu": 0.25, "l0": 3.0})
    sae.calibrate([torch.randn(200, D, generator=torch.Generator().manual_seed(0))])
    save_all({A: sae, B: make("plain_topk", hookpoint=B, base_model="org/lm")}, folder)
    (folder / A / "training.json").write_text(json.dumps(RUN))
    (folder / A / "features.json").write_text('{"0": [], "3": [".", "no"], "7": ["ships", "sea"]}')
    (folder / A / "comparison.json").write_text(json.dumps(COMPARISON))
    plots.draw_comparison(COMPARISON, folder / A)
    done = CliRunner().invoke(app, ["geometry", str(folder), "--subfolder", A])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def release(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "release")
    return tmp_path / "release"


def test_geometry_is_measured_where_nothing_can_be_drawn(release, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shutil.rmtree(release / A / "figures")
    words = ["geometry", str(release), "--subfolder", A, "--no-maps"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "no figures: figures need matplotlib" in done.stderr
    assert not (release / A / "figures").exists()


def images(card):
    return dict(re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", card))


@pytest.mark.parametrize("release", RELEASES, ids=[path.name for path in RELEASES])
def test_every_card_of_model_cards_is_the_one_that_its_files_give(release):
    card = (release / "README.md").read_text(encoding="utf-8")
    assert render_card(release, known_repo_id(release)) == card
    ModelCard(card).data.to_dict()
    for target in images(card).values():
        assert (release / target).is_file(), target


def test_model_cards_has_a_release():
    assert RELEASES


def test_geometry_writes_its_files_and_figures_and_prints_a_table(whole):
    there = {path.name for path in (whole / A / "figures").iterdir()}
    names = ("maps", "duplicates", "similarity", "alignment", "load", "density", "training")
    assert there == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert (whole / A / "geometry.json").exists()


def test_a_card_shows_every_figure_that_lies_there_and_says_what_it_is(release):
    card = render_card(release, "org/repo")
    shown = images(card)
    assert set(shown) == {CAPTIONS[name] for name in CAPTIONS if name != "l0_ce_recovered"}
    for target in shown.values():
        assert (release / target).is_file()
        assert not target.startswith("/")
    assert set(shown.values()) <= set(files_to_push(release))


def test_a_card_tells_of_every_file(release):
    card = render_card(release, "org/repo")
    geometry = json.loads((release / A / "geometry.json").read_text())
    for words in (
        'from_pretrained("org/lm")',
        f'SwitchSAE.from_pretrained("org/repo", subfolder="{A}")',
        "session.edit(Steer(7, 0.5))  # fires on: ships sea",
        f"## Beside other SAEs at {A}",
        "the same 65,530 held-out tokens",
        "| WIDE | 8 | 24,576 | 24,576,000 | 5,000,000 | 7,200,000 | 0.12 | 32 | 1.25 % |",
        "**Holds here**: wide is better. it is by 20%.",
        "**Does not hold here**: wide is cheaper. it costs 2% more.",
        "**Equal training tokens**",
        "**Equal operations per token**",
        "| WIDE | DENSE | 0.12 | 0.15 | -20.0 % | 32 | 32 | 1.02x | 1x | 8x |",
        "**Equal parameters**: no two of these SAEs can be compared this way.",
        COMPARISON["command"],
        "cosine above 0.9",
        f"by chance for {100 * geometry['nearest']['chance']:.3g} %",
        f"hf-switch-sae geometry org/repo --subfolder {A} --to FOLDER",
        "Measured on 200 tokens",
        f"## Training of {A}",
        "was trained on 8,192 tokens in 2 steps",
        "contexts of 256 tokens, without the first token of each",
        RUN["command"],
        "License: not stated",
        "arXiv:2410.08201",
    ):
        assert words in card, words
    assert "Equal error" not in card, "no dense SAE lies around that error"
    assert "\n\n\n" not in card
    assert "None" not in card


def test_a_comparison_over_all_saes_lies_in_the_release_itself(release):
    for name in ("comparison.json", "flops_fvu.png", "l0_fvu.png"):
        (release / A / name).rename(release / name)
    card = render_card(release, "org/repo")
    assert card.count("## Beside other SAEs") == 1
    assert "(flops_fvu.png)" in card


def test_a_release_that_is_one_sae_shows_its_files_too(whole, tmp_path):
    shutil.copytree(whole / A, tmp_path / "one")
    card = render_card(tmp_path / "one", "org/one")
    assert card.count("## Beside other SAEs") == 1
    assert "(figures/maps.png)" in card
    assert "(flops_fvu.png)" in card
    assert 'from_pretrained("org/one")' in card


def test_a_card_of_a_bare_sae_claims_nothing(tmp_path):
    save_all({A: make(hookpoint=A)}, tmp_path)
    card = render_card(tmp_path, "org/bare")
    assert "Not measured yet" in card
    for title in ("Beside other", "Geometry", "Calibration", "Training", "!["):
        assert title not in card
    assert "None" not in card.replace("| None |", "")


def test_a_file_of_another_format_is_an_error_that_names_it(release):
    (release / A / "geometry.json").write_text('{"format": 9}')
    with pytest.raises(SwitchSAEError, match=r"geometry\.json is of format 9"):
        render_card(release, "org/repo")


def test_statistics_are_those_of_the_checkpoint(release):
    found, sae = facts_of(release)[A].statistics, SwitchSAE.from_pretrained(release / A)
    fired = sae.feature_max[sae.feature_max > 0]
    assert found["residual_norm"] == pytest.approx(float(sae.residual_norm))
    assert found["median_max"] == pytest.approx(float(fired.median()))
    assert found["largest_max"] == pytest.approx(float(fired.max()))
    assert "outlier_norm" not in found, "there is no bound"
    assert facts_of(release)[B].statistics == {}, "not calibrated"
    assert list(saes_in(release)) == [A, B]


def card(*words):
    return CliRunner().invoke(app, ["card", *map(str, words)])


def test_the_command_renews_the_marked_part_and_keeps_names_and_words(release):
    done = card(release, "--repo-id", "org/repo", "--license", "apache-2.0")
    assert done.exit_code == 0, done.output
    readme = release / "README.md"
    first = readme.read_text()
    assert "license: apache-2.0" in first
    assert "License: apache-2.0" in first
    readme.write_text(first.replace(END, f"{END}\nMy words."))
    assert card(release).exit_code == 0
    again = readme.read_text()
    assert again == first.replace(END, f"{END}\nMy words."), "repo id and license as they were"
    assert known_repo_id(release) == "org/repo"
    (release / A / "geometry.json").unlink()
    card(release)
    assert "## Geometry" not in readme.read_text()
    assert "My words." in readme.read_text()


def test_the_command_leaves_a_persons_card_and_says_so(release):
    (release / "README.md").write_text("# Mine\n")
    done = card(release)
    assert (release / "README.md").read_text() == "# Mine\n"
    assert BEGIN in done.stderr


def test_a_damaged_file_leaves_the_card_as_it_was(release):
    write_card(release, "org/repo")
    before = (release / "README.md").read_text()
    (release / A / "metrics.json").write_text("{")
    done = card(release)
    assert isinstance(done.exception, SwitchSAEError)
    assert (release / "README.md").read_text() == before


def test_geometry_needs_a_folder_to_write_into(tmp_path):
    done = CliRunner().invoke(app, ["geometry", "org/none"])
    assert "--to" in str(done.exception)
    assert isinstance(card(tmp_path / "none").exception, SwitchSAEError)
