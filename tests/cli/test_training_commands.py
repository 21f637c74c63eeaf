"""`hf-switch-sae train` and `calibrate`: from nothing to a saved SAE, and errors before a step."""

import json
import pathlib

import pytest
import torch
from helpers import activations, tiny
from helpers.trained import launch
from typer.testing import CliRunner

from hf_switch_sae import (
    BaseModelError,
    ConfigError,
    HookpointError,
    SwitchSAE,
    SwitchSAEError,
    TextError,
    TrainingError,
    fingerprint,
    residuals,
)
from hf_switch_sae.cli.app import app
from hf_switch_sae.cli.options import pairs_of, typed
from hf_switch_sae.lm import loading as language_model

PLACE = "layers.1.resid_post"
RECIPE = {
    "activation": "batch_topk",
    "apply_router_probs": False,
    "router_best_expert_loss_coef": 0.1,
    "router_best_expert_temperature": 0.02,
}
SENTENCE = " ".join(activations.WORDS[3:])


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A tiny language model and its tokenizer in a folder, and some text."""
    folder = tmp_path_factory.mktemp("lm")
    vocabulary = len(activations.WORDS)
    tiny.llama(vocab_size=vocabulary).save_pretrained(folder)
    activations.tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    words = activations.WORDS[3:]
    order = torch.randint(len(words), (60, 30), generator=torch.Generator().manual_seed(1))
    lines = [json.dumps({"text": " ".join(words[at] for at in line)}) for line in order.tolist()]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def run(*words, code=0):
    """Run a command; what it printed. Errors of this package are raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def train(lm, out, *words, layer=1, data=None):
    where = ["--layer", layer] if layer is not None else []
    return run(
        "train", lm, data or lm / "text.jsonl", *where, "--output_dir", out, "--use_cpu",
        "--num_features", 32, "--num_experts", 4, "--k=2", "--context", 16, "--tokens-per-pass", 64,
        "--per_device_train_batch_size", 64, "--num_train_tokens", 640, "--disable_tqdm",
        "--logging_steps", 2, "--save_strategy", "no", "--start_rows", 256,
        "--calibration_rows", 256, "--buffer_bytes", 65536, *words,
    )  # fmt: skip


def test_one_command_goes_from_nothing_to_an_sae_that_attaches(lm, tmp_path):
    said = train(lm, tmp_path, "--eval-dataset", lm / "text.jsonl", "--save_dtype=bfloat16")
    assert '"fvu"' in said
    sae = SwitchSAE.from_pretrained(tmp_path, subfolder=PLACE)
    assert sae.dtype == torch.bfloat16
    assert int(sae.statistics_tokens) > 0
    assert 1 < float(sae.outlier_norm) < float("inf")
    assert set(sae.config.metrics) >= {"fvu", "l0", "dead_share", "tokens"}
    notes = json.loads((tmp_path / PLACE / "training.json").read_text())
    assert {name: getattr(sae.config, name) for name in RECIPE} == RECIPE
    assert notes["policy"]["skip_first"] is True
    assert notes["policy"]["outlier_norm"][PLACE] == pytest.approx(float(sae.outlier_norm))
    assert notes["tokens"] == 640
    assert str(tmp_path) not in json.dumps(notes)
    whole = tiny.llama(vocab_size=len(activations.WORDS))
    whole.load_state_dict(type(whole).from_pretrained(lm).state_dict())
    with sae.float().attach(whole) as session:  # its fingerprint is the whole model's
        whole(torch.tensor([[3, 4, 5]]))
        assert session.features.shape == (1, 3)


def train_with_others(folder, options):
    """One process of several."""
    out = pathlib.Path(folder)
    said = train(pathlib.Path(options["lm"]), out / "out", "--eval_dataset", options["held_out"])
    if '"fvu"' in said:  # what the first process says
        (out / "result.json").write_text((out / "out" / PLACE / "metrics.json").read_text())


def test_the_first_of_two_processes_measures_all_of_the_held_out_text(lm, tmp_path):
    held_out = lm / "text.jsonl"
    stored = launch(tmp_path, {"lm": str(lm), "held_out": str(held_out)}, 2, train_with_others)
    place = tmp_path / "out" / PLACE
    run("eval", place, lm, held_out, "--context", 16, "--tokens-per-pass", 64, "--write")
    assert json.loads((place / "metrics.json").read_text()) == stored


def test_the_output_folder_is_a_release_and_eval_finds_its_figures_again(lm, tmp_path):
    out = tmp_path / "release"
    held_out = lm / "text.jsonl"
    more = ("--eval-dataset", held_out, "--eval_tokens", 400, "--base_model", "org/tiny")
    train(lm, out, *more, "--save_steps", 5, "--save_strategy=steps", "--save_dtype=bfloat16")
    place = out / PLACE
    stored = json.loads((place / "metrics.json").read_text())
    assert {"fvu", "l0", "dead_share", "ce_clean", "ce_spliced", "ce_ablated", "kl"} <= set(stored)
    assert stored["measured_on"]["dataset"]["files"][0]["name"] == "text.jsonl"
    assert json.loads((place / "config.json").read_text())["metrics"]["kl"] == stored["kl"]
    notes = json.loads((place / "training.json").read_text())
    assert notes["command"].startswith(f"hf-switch-sae train {lm.name} text.jsonl --layer 1")
    assert "--base_model org/tiny" in notes["command"]
    assert notes["log"][0]["step"] == 2
    card = (out / "README.md").read_text()
    assert f"| kl | {stored['kl']} |" in card
    assert notes["command"] in card
    assert "base_model: org/tiny" in card
    assert "25 contexts of 16 tokens of text.jsonl;\nleft out: the first token of" in card
    assert "checkpoint" not in card
    assert str(tmp_path) not in card + json.dumps(notes) + json.dumps(stored)

    words = ("--context", 16, "--max-tokens", 400, "--tokens-per-pass", 48)
    said = run("eval", out, lm, held_out, "--subfolder", PLACE, *words)
    for name, value in stored.items():
        assert name in ("measured_on", "density") or f"{name} {value}" in " ".join(said.split()), (
            name
        )
    before = (place / "metrics.json").read_bytes()
    run("eval", place, lm, held_out, *words, "--write")
    assert (place / "metrics.json").read_bytes() == before
    run("eval", place, lm, held_out, "--context", 16, "--write")
    assert json.loads((place / "metrics.json").read_text())["tokens"] > stored["tokens"]
    assert SwitchSAE.from_pretrained(place).config.metrics["tokens"] > stored["tokens"]


def test_eval_needs_a_folder_to_write_to_and_a_model_that_is_there(lm, tmp_path):
    with pytest.raises(SwitchSAEError, match="no folder here"):
        run("eval", "org/sae", lm, lm / "text.jsonl", "--write")
    train(lm, tmp_path)
    with pytest.raises(SwitchSAEError, match="no language model"):
        run("eval", tmp_path / PLACE, tmp_path / "nowhere", lm / "text.jsonl")
    assert not (tmp_path / PLACE / "metrics.json").exists()


def test_a_finished_sae_is_not_written_over(lm, tmp_path):
    out = tmp_path / "out"
    train(lm, out, "--save_steps", 5, "--save_strategy=steps")
    before = (out / PLACE / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="holds an SAE that a run has finished"):
        train(lm, out)
    assert (out / PLACE / "model.safetensors").read_bytes() == before
    train(lm, out, "--resume_from_checkpoint", "true", "--num_train_tokens", 960)
    assert json.loads((out / PLACE / "training.json").read_text())["tokens"] == 960


def test_a_file_of_options_and_options_that_go_before_it(lm, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "k: 3\nlearning-rate: 1e-3\nlayer: 2\nnum_train_tokens: 9999\npreset: published"
    )
    train(lm, tmp_path, "--config", file, "--num_experts", "2", layer=None)
    sae = SwitchSAE.from_pretrained(tmp_path, subfolder="layers.2.resid_post")
    assert (sae.config.k, sae.config.num_experts) == (2, 2)  # said, not told
    notes = json.loads((tmp_path / "layers.2.resid_post/training.json").read_text())
    assert notes["tokens"] == 640
    assert notes["arguments"]["learning_rate"] == 1e-3
    assert notes["arguments"]["loss"] == "published"
    assert (sae.config.activation, sae.config.apply_router_probs) == ("topk", True)


def test_a_cache_is_filled_and_trained_from_and_several_layers_at_once(lm, tmp_path):
    words = ("--cache", tmp_path / "cache", "--layer", 2)
    train(lm, tmp_path / "one", *words)
    assert (tmp_path / "cache/cache.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    train(lm, tmp_path / "two", *words)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert before == after
    for place in (PLACE, "layers.2.resid_post"):
        one, two = (
            SwitchSAE.from_pretrained(tmp_path / name, subfolder=place) for name in ("one", "two")
        )
        torch.testing.assert_close(one.W_enc, two.W_enc, rtol=0, atol=0)


def test_a_cache_of_another_model_is_refused(lm, tmp_path):
    train(lm, tmp_path / "one", "--cache", tmp_path / "cache")
    other = tmp_path / "other"
    tiny.llama(vocab_size=len(activations.WORDS), seed=5).save_pretrained(other)
    activations.tokenizer().save_pretrained(other)
    with pytest.raises(BaseModelError, match="activations of another language model"):
        train(other, tmp_path / "two", "--cache", tmp_path / "cache", data=lm / "text.jsonl")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--k", 40), ConfigError, r"k=40 is outside 1 to 8"),
        (("--num_feature", 64), ConfigError, "no option --num_feature; did you mean --num_feature"),
        (("--learning_rate", "fast"), ConfigError, "learning_rate.*invalid"),
        (("--layer", 9), HookpointError, "9"),
        (("--weight_decay", 0.1), ConfigError, "weight_decay=0.1 has no meaning"),
        (("--optim", "sgd"), ConfigError, "optim='sgd'"),
        (("--loss", "mse"), ConfigError, "loss='mse' is none of relative, published"),
        (("--preset", "papers"), ConfigError, "no preset 'papers'; there are default, published"),
        (("--eval_tokens", 8), ConfigError, "eval_tokens 8 is less than one context of 16"),
        (("--eval-dataset", "no.txt"), TextError, "there is no file"),
        (("--context", 1000), TextError, "more than the 256 positions"),
        (("--max_steps", 5), ConfigError, "both say when to stop"),
        (("--resume_from_checkpoint", "/nowhere"), TrainingError, "there is no checkpoint"),
    ],
)
def test_what_cannot_be_is_told_before_the_first_step(lm, tmp_path, words, error, message):
    with pytest.raises(error, match=message):
        train(lm, tmp_path / "out", *words)
    assert not list(tmp_path.glob("out/*"))


def test_bad_data_is_told_too(lm, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(TextError, match="empty"):
        train(lm, tmp_path / "out", data=empty)
    short = tmp_path / "short.txt"
    short.write_text("the ship")
    with pytest.raises(TextError):
        train(lm, tmp_path / "out", data=short)
    with pytest.raises(TextError, match="empty"):
        train(lm, tmp_path / "out", "--eval_dataset", empty)
    with pytest.raises(TextError, match="fewer than one"):
        train(lm, tmp_path / "out", "--eval_dataset", short)
    other = tmp_path / "other"
    tiny.llama(vocab_size=5).save_pretrained(other)
    activations.tokenizer().save_pretrained(other)
    with pytest.raises(TextError, match="another model's tokenizer"):
        train(other, tmp_path / "out", data=lm / "text.jsonl")
    with pytest.raises(ConfigError, match="takes a whole number"):
        train(lm, tmp_path / "out", "--cache_rows", "many")
    with pytest.raises(ConfigError, match="where is the SAE to read"):
        train(lm, tmp_path / "out", layer=None)
    with pytest.raises(ConfigError, match="LM and DATASET come first"):
        run("train", "--k", 2, lm, lm / "text.jsonl")


def test_words_become_options():
    words = ["--a-b", "1e-3", "--c=x y", "--flag", "--list", "1", "-2"]
    found = pairs_of(words)
    assert found == {"a_b": ["1e-3"], "c": ["x y"], "flag": [], "list": ["1", "-2"]}
    assert [typed(name, found[name]) for name in ("a_b", "c", "flag")] == [0.001, "x y", True]
    with pytest.raises(ConfigError, match="takes one value"):
        typed("list", found["list"])


@pytest.mark.parametrize("builder", ["llama", "gemma3", "qwen3", "gpt2", "gpt_neox", "mamba"])
def test_blocks_after_the_place_are_not_loaded_and_the_stream_is_the_same(tmp_path, builder):
    whole = tiny.ALL[builder]()
    whole.save_pretrained(tmp_path)
    activations.tokenizer().save_pretrained(tmp_path)
    part, _ = language_model.load_lm(
        str(tmp_path), "float32", None, with_head=False, places=[0, "layers.1.resid_post"]
    )
    count = sum("layers.3." in name or "h.3." in name for name, _ in part.named_parameters())
    assert builder == "gpt2" or count == 0
    ids = torch.tensor([[3, 5, 7, 4]])
    with torch.no_grad(), residuals(whole, [1]) as there, residuals(part, [1]) as here:
        torch.testing.assert_close(
            list(here(input_ids=ids).values()), list(there(input_ids=ids).values())
        )
    known, found = fingerprint(whole), fingerprint(part)
    assert found["num_hidden_layers"] == known["num_hidden_layers"]


def test_how_many_blocks_a_place_takes():
    assert language_model.blocks_up_to([3, "layers.5.resid_pre"]) == 6
    assert language_model.blocks_up_to(["model.layers.2.mlp"]) is None


def test_calibrate_measures_any_sae_in_its_place_or_elsewhere(lm, tmp_path):
    model = tiny.llama(vocab_size=len(activations.WORDS))
    sae = SwitchSAE.for_lm(model, 1, num_features=32, num_experts=4, k=2)
    sae.config.base_model_fingerprint = None
    sae.save_pretrained(tmp_path / "sae")
    (tmp_path / "sae/features.json").write_text("{}")
    words = ("--rows", 200, "--context", 16)
    run(
        "calibrate", tmp_path / "sae", lm, lm / "text.jsonl", "--output-dir", tmp_path / "b", *words
    )
    said = run("calibrate", tmp_path / "sae", lm, lm / "text.jsonl", *words)
    assert "200 tokens" in said
    for folder in ("sae", "b"):
        found = SwitchSAE.from_pretrained(tmp_path / folder)
        assert int(found.statistics_tokens) == 200
        assert float(found.feature_max.max()) > 0
        assert float(found.outlier_norm) < float("inf")
    assert (tmp_path / "sae/features.json").exists()


def test_eval_of_several_saes_is_one_table_and_each_ones_own_figures(lm, tmp_path):
    for at, k in (("one", 2), ("two", 3)):
        train(lm, tmp_path / at, "--k", k)
    one, two = (tmp_path / at / PLACE for at in ("one", "two"))
    words = ("--context", 16, "--packing", "windows", "--no-skip-special")
    said = run("eval", one, lm, lm / "text.jsonl", "--also", f"{tmp_path}/two:{PLACE}", *words,
               "--write")  # fmt: skip
    stored = [json.loads((place / "metrics.json").read_text()) for place in (one, two)]
    assert [each["l0"] <= k for each, k in zip(stored, (2.5, 3.5), strict=True)] == [True, True]
    row = next(line for line in said.splitlines() if line.startswith("fvu "))
    assert row.split() == ["fvu", *(str(each["fvu"]) for each in stored)]
    on = stored[0]["measured_on"]
    assert (on["packing"], on["special_ids"]) == ("windows", [])
    assert json.loads((one / "config.json").read_text())["metrics"].keys().isdisjoint({"density"})
    assert sum(stored[1]["density"]["counts"]) + stored[1]["density"]["never"] == 32
    with pytest.raises(SwitchSAEError, match="given twice"):
        run("eval", one, lm, lm / "text.jsonl", "--also", one)
    with pytest.raises(TextError, match="packing='loose' is none of"):
        run("eval", one, lm, lm / "text.jsonl", "--packing", "loose")


def test_compare_measures_what_predictions_lose_on_text(lm, tmp_path):
    lines = (lm / "text.jsonl").read_text().splitlines()
    for name, some in (("train", lines[:40]), ("held_out", lines[40:])):
        text = tmp_path / f"{name}.jsonl"
        text.write_text("\n".join(some))
        run("cache", lm, text, "--to", tmp_path / name, "--layer", 1, "--context", 16)
    words = ("--lm", lm, "--eval-dataset", tmp_path / "held_out.jsonl", "--eval-context", 16)
    words += ("--use_cpu", "--disable_tqdm", "--num_train_tokens", 640, "--save_strategy", "no")
    words += ("--per_device_train_batch_size", 64, "--start_rows", 128, "--calibration_rows", 128)
    said = run("compare", tmp_path / "train", "--held-out", tmp_path / "held_out", "--to",
               tmp_path / "out", "--train", "num_experts=1 num_features=32 k=2",
               "--train", "num_experts=4 num_features=32 k=2", *words)  # fmt: skip
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    for entry in found["saes"]:
        place = tmp_path / "out" / entry["name"]
        run("eval", place, lm, tmp_path / "held_out.jsonl", "--context", 16, "--write")
        alone = json.loads((place / "metrics.json").read_text())
        for name in ("ce_clean", "ce_spliced", "ce_zero", "ce_ablated", "ce_recovered", "kl"):
            assert entry[name] == pytest.approx(alone[name], rel=1e-4), name
    assert found["measured_on"]["predictions"]["dataset"]["files"][0]["name"] == "held_out.jsonl"
    assert "ce_recovered" in said
    assert f"--lm {lm.name} --eval-dataset held_out.jsonl" in found["command"]
    assert str(tmp_path) not in json.dumps(found)
    with pytest.raises(ConfigError, match="less than one context of 16"):
        run("compare", tmp_path / "train", "--held-out", tmp_path / "held_out", "--to",
            tmp_path / "out2", *words, "--eval-tokens", 3)  # fmt: skip


def test_arguments_that_contradict_each_other_are_told_without_a_traceback(lm, tmp_path):
    with pytest.raises(ConfigError, match="strateg"):
        train(lm, tmp_path / "out", "--load_best_model_at_end", "--eval_strategy", "steps")
    assert not (tmp_path / "out").exists()
