"""Comparisons: what is trained, that all is measured on the same rows, and what is said of it."""

import json
import sys

import pytest
import torch
from helpers import activations, tiny
from typer.testing import CliRunner

import hf_switch_sae
from hf_switch_sae import (
    ConfigError,
    HookpointError,
    SwitchSAE,
    SwitchSAEConfig,
    TrainingError,
    WidthError,
    compare,
    plots,
)
from hf_switch_sae.cli.app import app
from hf_switch_sae.comparison import plan, runs, switch_set
from hf_switch_sae.comparison.claims import claims_of, comparisons_of
from hf_switch_sae.sae.flops import flops_per_token, parameter_count
from hf_switch_sae.training import CachedActivations, cache_activations

PLACE = "layers.1.resid_post"
RUN = {
    "per_device_train_batch_size": 64,
    "num_train_tokens": 640,
    "use_cpu": True,
    "disable_tqdm": True,
    "calibration_rows": 128,
    "start_rows": 128,
    "save_strategy": "no",
}
SMALL = {"num_features": 32, "k": 4}
DENSE, SWITCH = {"num_experts": 1, **SMALL}, {"num_experts": 4, **SMALL}
FIGURES = {"fvu", "mse", "cosine", "l0", "dead_share", "density", "tokens"}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Activations of a tiny model over random tokens: `train`, `test`, and some that do not fit."""
    folder, lm = tmp_path_factory.mktemp("caches"), tiny.llama()
    settings = activations.settings()

    def made(name, seed, of=lm, hookpoints=(1,)):
        documents = [x.tolist() for x in tiny.prompts(*[40] * 60, seed=seed)]
        return cache_activations(of, hookpoints, documents[: 60 if name == "train" else 20],
                                 folder / name, settings=settings)  # fmt: skip

    made("train", 1)
    made("test", 2)
    made("elsewhere", 2, hookpoints=(2,))
    made("both", 2, hookpoints=(1, 2))
    made("other_lm", 2, of=tiny.llama(seed=4))
    return folder


def compared(caches, to, *told, train="train", test="test", saes=None, seeds=(0,), **options):
    run = {**RUN, **options.pop("run", {})}
    planned = plan(told, run=run, seeds=seeds)
    return compare(caches / train, caches / test, to, train=planned, saes=saes, **options)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}


# ---------------------------------------------------------------- what is planned


def test_words_are_fields_of_an_sae_and_its_run_over_those_of_all():
    words = "num_experts=8 num-features=64 k=4 learning_rate=1e-3 encoder_bias=true"
    (each,) = plan([words], {"k": 2, "num_features": 1}, {"num_train_tokens": 5}, seeds=(3,))
    assert each.name == "switch-8x8-k4-seed3"
    assert each.sae == {
        "activation": "batch_topk",
        "apply_router_probs": False,
        "router_best_expert_loss_coef": 0.1,
        "router_best_expert_temperature": 0.02,
        "num_experts": 8,
        "num_features": 64,
        "k": 4,
        "encoder_bias": True,
    }
    assert each.run == {"num_train_tokens": 5, "learning_rate": 1e-3}
    (published,) = plan([SWITCH], preset="published")
    assert (published.run["loss"], published.config().activation) == ("published", "topk")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["num_expert=8"], "no field num_expert.*did you mean --num_experts"),
        (["num_experts"], "not name=value"),
        (["num_experts=3 num_features=32"], "not a multiple"),
        (
            [{**SWITCH, "auxk_loss_coef": 0.1}, SWITCH],
            "two runs would be named switch-4x8-k4-seed0",
        ),
        (["name=../up"], "is to be a folder's"),
        (["output_dir=here"], "no field output_dir"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_words(told, message):
    with pytest.raises(ConfigError, match=message):
        plan(told)


def test_the_set_has_dense_saes_and_switch_ones_of_their_width_and_of_their_flops():
    configs = [each.config() for each in plan(switch_set(256, 8, 16), {"hidden_size": 16})]
    dense = [c for c in configs if c.num_experts == 1 and c.activation == "batch_topk"]
    assert [c.num_features for c in dense] == [256, 128, 64, 32]
    switches = [c for c in configs if c.num_experts > 1]
    assert [(c.num_experts, c.num_features) for c in switches] == [
        *((e, 256) for e in (2, 4, 8, 16)),
        (8, 8 * 256),
    ]
    encoder = {c.num_features: flops_per_token(c).encoder for c in dense}
    assert flops_per_token(switches[-1]).encoder == encoder[256]
    assert flops_per_token(switches[2]).encoder == encoder[32]
    others = [(c.activation, c.k) for c in configs if c not in dense + switches]
    assert others == [("topk", 16), *[("relu", None)] * 3]
    assert not any(c["activation"] == "relu" for c in switch_set(256, 8, 16, relu=False)[-1:])
    assert (
        len(plan(switch_set(256, 8, 16), {"activation": "topk"})) == len(configs) - 1
    )  # one twice
    with pytest.raises(ConfigError, match="multiple of 8 from 128 on"):
        switch_set(100, 8, 16)


# ---------------------------------------------------------------- what is trained and measured


@pytest.fixture(scope="module")
def done(caches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "out"
    relu = {**DENSE, "activation": "relu", "k": None, "encoder_bias": True, "l1_loss_coef": 0.1}
    found = compared(caches, folder, DENSE, SWITCH, relu, seeds=(0, 1), command="as typed")
    return folder, found


def test_the_file_says_what_was_measured_on_what(done, caches):
    folder, found = done
    assert found == json.loads((folder / "comparison.json").read_text())
    assert (found["format"], found["command"]) == (1, "as typed")
    on = found["measured_on"]
    assert on["hookpoint"] == PLACE
    assert (on["cache"], on["trained_on"]["cache"]) == ("test", "train")
    assert on["rows"] == CachedActivations(caches / "test").num_rows
    assert str(folder.parent) not in json.dumps(found)
    for entry in found["saes"]:
        config = SwitchSAE.from_pretrained(folder / entry["name"]).config
        assert entry.keys() >= FIGURES
        assert entry["train_tokens"] == 640
        assert entry["seed"] == int(entry["name"][-1])
        assert entry["parameters"] == parameter_count(config)
        assert config.base_model_fingerprint
        assert (entry["num_experts"] > 1) == ("routing_entropy" in entry)
    families = [entry["family"] for entry in found["saes"]]
    assert families == ["batch_topk"] * 2 + ["switch"] * 2 + ["relu"] * 2


@torch.no_grad()
def test_the_figures_are_those_of_the_saved_saes_on_all_rows(done, caches):
    folder, found = done
    rows = CachedActivations(caches / "test")
    (x,) = next(rows.batches(rows.num_rows)).values()
    for entry in found["saes"]:
        sae = SwitchSAE.from_pretrained(folder / entry["name"]).eval()
        kept = x[~sae.is_outlier(x)].float()
        error = (kept - sae.decode(sae.encode(kept))).double().square()
        deviation = (kept.double() - kept.double().mean(0)).square()
        assert entry["tokens"] == len(kept)
        assert entry["fvu"] == pytest.approx(float(error.sum() / deviation.sum()), rel=1e-6)
        assert entry["mse"] == pytest.approx(float(error.mean()), rel=1e-6)
        active = entry["k"] or entry["l0"]
        assert entry["flops_per_token"]["decoder"] == round(2 * active * sae.config.hidden_size)


def test_what_is_there_is_not_trained_again_and_what_is_new_is(done, caches):
    folder, found = done
    before = times(folder)
    again = compared(caches, folder, DENSE, SWITCH, seeds=(0, 1))
    assert times(folder) == before
    assert again["saes"] == found["saes"][:4]
    more = compared(caches, folder, DENSE, {**SWITCH, "num_experts": 2})
    assert len(more["saes"]) == 2
    assert times(folder).items() > before.items()
    assert not (folder / ".runs").exists()


def test_a_run_that_was_interrupted_goes_on_and_ends_as_if_it_had_not_been(
    caches, tmp_path, monkeypatch
):
    often = {"save_strategy": "steps", "save_steps": 2}
    compared(caches, tmp_path / "whole", SWITCH, run=often)
    step, count = runs.SwitchSAETrainer.training_step, []

    def breaking(self, *args, **kwargs):
        count.append(self.state.global_step)
        if len(count) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(runs.SwitchSAETrainer, "training_step", breaking)
    with pytest.raises(KeyboardInterrupt):
        compared(caches, tmp_path / "broken", DENSE, SWITCH, run={"max_steps": -1, **often})
    name = "batch_topk-32-k4-seed0"
    assert not (tmp_path / "broken" / name / "run.json").exists()
    assert [p.name for p in (tmp_path / "broken/.runs" / name).glob("checkpoint-*")] == [
        "checkpoint-4"
    ]
    compared(caches, tmp_path / "broken", DENSE, SWITCH, run={"max_steps": -1, **often})
    assert 4 in count[6:7]  # not from 0
    name = "switch-4x8-k4-seed0"
    one, two = (SwitchSAE.from_pretrained(tmp_path / at / name) for at in ("whole", "broken"))
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


def test_saes_that_are_there_are_measured_beside_those_that_are_trained(done, caches, tmp_path):
    folder, found = done
    name = found["saes"][2]["name"]
    loaded = SwitchSAE.from_pretrained(folder / name)
    also = tiny.sae_for(tiny.llama(), 1, k=8)
    beside = compared(caches, tmp_path, DENSE, saes={"mine": loaded, "random": also})
    trained, mine, random = beside["saes"]
    assert mine | {"name": name, "label": ""} == found["saes"][2] | {"label": ""}
    assert random["train_tokens"] is None
    assert random["fvu"] > trained["fvu"]
    assert (loaded.device.type, also.training) == ("cpu", False)
    pairs = beside["comparisons"]["equal_tokens"]
    assert [pair["sae"] for pair in pairs] == ["mine"]


def test_an_sae_with_a_narrower_bound_narrows_the_rows_of_all(caches, tmp_path):
    rows = CachedActivations(caches / "test").sample(10_000)[PLACE]
    narrow = tiny.sae_for(tiny.llama(), 1)
    narrow.outlier_norm.fill_(float(rows.norm(dim=-1).median()))
    wide = tiny.sae_for(tiny.llama(), 1, seed=3)
    found = compared(caches, tmp_path, saes={"narrow": narrow, "wide": wide})
    tokens = [each["tokens"] for each in found["saes"]]
    assert tokens[0] == tokens[1] == int((rows.norm(dim=-1) <= narrow.outlier_norm).sum())


# ---------------------------------------------------------------- what is refused


def test_what_does_not_fit_is_refused_before_the_first_run(done, caches, tmp_path):
    folder, _ = done
    with pytest.raises(ConfigError, match="nothing to compare"):
        compared(caches, tmp_path)
    with pytest.raises(TrainingError, match="what is trained on can't be held out"):
        compared(caches, tmp_path, DENSE, test="train")
    with pytest.raises(WidthError, match="same place"):
        compared(caches, tmp_path, DENSE, test="elsewhere")
    with pytest.raises(TrainingError, match="another language model"):
        compared(caches, tmp_path, DENSE, test="other_lm")
    with pytest.raises(HookpointError, match="choose one place"):
        compared(caches, tmp_path, DENSE, train="both", test="both")
    narrow = SwitchSAE(SwitchSAEConfig(hidden_size=16, num_features=8, num_experts=1, k=2))
    with pytest.raises(WidthError, match="hidden_size=16"):
        compared(caches, tmp_path, DENSE, saes={"narrow": narrow})
    with pytest.raises(HookpointError, match="; the rows are of"):
        compared(caches, tmp_path, DENSE, saes={"a": tiny.sae_for(tiny.llama(), 2)})
    same = {"batch_topk-32-k4-seed0": tiny.sae_for(tiny.llama(), 1)}
    with pytest.raises(ConfigError, match="both named"):
        compared(caches, tmp_path, DENSE, saes=same)
    with pytest.raises(TrainingError, match="fewer than a batch"):
        compared(caches, tmp_path, DENSE, {**SWITCH, "per_device_train_batch_size": 100_000})
    relu = {**DENSE, "activation": "relu", "k": None, "l1_loss_coef": 0.1}
    with pytest.raises(ConfigError, match="the published loss has no such part"):
        compared(caches, tmp_path, DENSE, {**relu, "loss": "published"})
    assert not list(tmp_path.iterdir())
    before = times(folder)
    with pytest.raises(TrainingError, match="num_train_tokens was 640 and is 1280"):
        compared(
            caches, folder, {**SWITCH, "num_experts": 8}, DENSE, run={"num_train_tokens": 1280}
        )
    assert times(folder) == before


def test_an_sae_that_no_comparison_trained_is_not_written_over(caches, tmp_path):
    theirs = tmp_path / "mine-seed0"
    tiny.sae_for(tiny.llama(), 1).save_pretrained(theirs)
    before = times(tmp_path)
    with pytest.raises(TrainingError, match="holds an SAE that no comparison trained"):
        compared(caches, tmp_path, DENSE, {**DENSE, "name": "mine"})
    assert times(tmp_path) == before


# ---------------------------------------------------------------- what is said


def entry(name, experts, features, fvu, seed=0, tokens=100, k=16, activation="batch_topk", l0=16.0):
    config = SwitchSAEConfig(
        hidden_size=64, num_experts=experts, num_features=features, k=k, activation=activation
    )
    return {
        "name": name,
        "label": name.upper(),
        "num_experts": experts,
        "num_features": features,
        "k": k,
        "activation": activation,
        "parameters": parameter_count(config),
        "flops_per_token": flops_per_token(config, l0).to_dict(),
        "train_tokens": tokens,
        "seed": seed,
        "fvu": fvu,
        "l0": l0,
    }


FEW = [
    entry("dense", 1, 1024, 0.20),
    entry("narrow", 1, 128, 0.40),
    entry("width", 8, 1024, 0.25),
    entry("flops", 8, 8192, 0.18),
]


def test_pairs_are_of_equal_tokens_flops_or_parameters():
    found = comparisons_of(FEW)
    of = {name: [(p["sae"], p["against"]) for p in found[name]] for name in list(found)[:3]}
    assert of["equal_tokens"] == [("narrow", "dense"), ("width", "dense"), ("flops", "dense")]
    assert of["equal_flops"] == [("width", "narrow"), ("flops", "dense")]
    assert of["equal_parameters"] == [("width", "dense")]
    (pair,) = found["equal_parameters"]
    assert pair["relative_difference"] == pytest.approx(0.25)
    assert pair["encoder_flops_ratio"] == 1 / 8
    assert 1 < pair["parameters_ratio"] < 1.01
    assert (pair["fvu"], pair["against_fvu"]) == (0.25, 0.20)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"tokens": 99}, {"tokens": None}, {"k": 8}, {"activation": "topk"}],
    ids=str,
)
def test_nothing_is_paired_that_differs_in_what_is_to_be_equal(change):
    found = comparisons_of([entry("dense", 1, 1024, 0.2), entry("width", 8, 1024, 0.25, **change)])
    assert not found["equal_flops"] + found["equal_parameters"] + found["equal_error"]
    also = change.keys() & {"k", "activation"}
    assert bool(found["equal_tokens"]) == bool(also)


def test_releases_of_which_it_is_not_known_are_not_of_equal_tokens():
    unknown = [{**each, "train_tokens": None} for each in FEW]
    assert not any(comparisons_of(unknown).values())


def test_at_equal_error_the_dense_flops_lie_on_a_line_in_the_logarithms():
    dense = [entry(str(features), 1, features, 0.0) for features in (64, 256, 1024)]
    for each in dense:
        each["fvu"] = 3 * each["flops_per_token"]["total"] ** -0.2
    sae = entry("switch", 8, 1024, 3 * 70_000.0**-0.2)
    (found,) = comparisons_of([*dense, sae])["equal_error"]
    assert found["dense_flops"] == pytest.approx(70_000)
    assert found["flops_saved"] == pytest.approx(70_000 / found["flops"])
    (beyond,) = comparisons_of([*dense, {**sae, "fvu": 1e-3}])["equal_error"]
    assert beyond["flops_saved"] is None


def test_a_claim_holds_if_every_pair_says_so():
    compared = comparisons_of(FEW)
    flops, parameters, error = claims_of(FEW, compared)
    assert (flops["holds"], parameters["holds"], error["holds"]) == (True, False, True)
    assert "FLOPS (seed 0) has FVU 0.1800, 10.0% lower than DENSE (0.2000)" in flops["sentence"]
    assert "25.0% higher than DENSE (0.2000), with 1/8 of the encoder" in parameters["sentence"]
    second = [{**each, "seed": 1, "name": f"{each['name']}-1"} for each in FEW]
    second[3]["fvu"] = 0.21
    both = [*FEW, *second]
    assert [each["holds"] for each in claims_of(both, comparisons_of(both))] == [False] * 3
    assert claims_of(FEW[:2], comparisons_of(FEW[:2])) == []


# ---------------------------------------------------------------- the command


def run(*words, stream="stdout"):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return getattr(result, stream)


def command(caches, to, *words, stream="stdout"):
    options = [word for name, value in RUN.items() for word in (f"--{name}", value)]
    where = (caches / "train", "--held-out", caches / "test", "--to", to)
    return run("compare", *where, *options, *words, stream=stream)


def test_the_command_trains_measures_draws_and_says_what_holds(caches, tmp_path, monkeypatch):
    drawn = []

    def draw_comparison(comparison, folder):
        drawn.append(comparison)
        return [folder / "flops_fvu.svg"]

    monkeypatch.setattr(plots, "draw_comparison", draw_comparison)
    release = tmp_path / "release"
    tiny.sae_for(tiny.llama(), 1).save_pretrained(release / "at")
    words = ("--train", "num_experts=4 num_features=64", "--sae", f"{release}:at", "--k", 4)
    said = command(caches, tmp_path / "out", *words, "--train", "num_experts=1 num_features=64",
                   "--seed", 0, 1)  # fmt: skip
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    names = [each["name"] for each in found["saes"]]
    expected = [
        f"{kind}-k4-seed{seed}" for kind in ("switch-4x16", "batch_topk-64") for seed in (0, 1)
    ]
    assert names == [*expected, "release-at"]
    assert all(name in said for name in names)
    assert "a Switch SAE has a lower error than a dense one of equal parameters" in said
    assert said.splitlines()[-1].endswith("flops_fvu.svg")
    assert drawn == [found]
    assert found["command"].startswith(
        "hf-switch-sae compare train --held-out test --to out --sae release:at --train"
    )
    assert "--num_train_tokens 640" in found["command"]
    assert str(tmp_path) not in found["command"] + json.dumps(found)
    assert "ce_clean" not in found["saes"][0]


def test_without_what_draws_there_is_one_line_and_everything_else(caches, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    dense = ("--train", "num_experts=1 num_features=32 k=4")
    said = command(caches, tmp_path, *dense, stream="stderr")
    assert "--sae" not in json.loads((tmp_path / "comparison.json").read_text())["command"]
    assert not (tmp_path / "figures").exists()
    assert 'no figures: figures need matplotlib: pip install "hf-switch-sae[viz]"' in said


def test_a_dry_run_names_the_runs_of_a_set_and_changes_nothing(caches, tmp_path):
    words = ("--set", "switch", "--width", 128, "--experts", 4, "--k", 8, "--dry-run")
    said = command(caches, tmp_path / "out", *words).splitlines()
    assert said[0] == "batch_topk-128-k8-seed0"
    assert "switch-4x128-k8-seed0" in said
    assert len(said) == 13
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "all", "--width", 8), "no set 'all'; there are switch"),
        (("--set", "switch"), "needs a --width"),
        (("--width", 8), "is of a set"),
        (("--train", "num_expert=2"), "did you mean"),
        (("--num_expert", 2), "did you mean --num_experts"),
        (("--context", 8), "the rows are the cache's"),
        (("--output_dir", "x"), "--output_dir has no meaning here"),
        (("--hookpoint", "layers.1.resid_post"), "--hookpoint has no meaning here"),
        (("--seed", "a"), "whole numbers"),
        (("--lm", "x"), "both --lm and --eval-dataset"),
        ((), "nothing to compare"),
    ],
)
def test_words_that_mean_nothing_are_refused(caches, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        command(caches, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_the_face_has_it():
    assert hf_switch_sae.compare is compare
