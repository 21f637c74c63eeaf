"""From a language model and texts to a release, by one call, as in a notebook."""

import json

import pytest
import torch
from helpers import activations, tiny
from helpers.trained import PLACE

from hf_switch_sae import ConfigError, SwitchSAE, SwitchSAETrainingArguments, TrainingError
from hf_switch_sae.training import ActivationSettings, train_release
from hf_switch_sae.training.pipeline import check_before_loading

WORDS = activations.WORDS[3:]
SAE = {"num_features": 32, "num_experts": 4, "k": 2}
SETTINGS = ActivationSettings(context=16, tokens_per_pass=64, buffer_bytes=1 << 16)


def texts(seed):
    order = torch.randint(len(WORDS), (40, 30), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[at] for at in line) for line in order.tolist()]


def arguments(folder, **changes):
    run = {"per_device_train_batch_size": 64, "num_train_tokens": 640, "logging_steps": 2}
    run |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    run |= {"start_rows": 256, "calibration_rows": 256}
    return SwitchSAETrainingArguments(output_dir=str(folder), **{**run, **changes})


def release(folder, hookpoints=1, sae=SAE, args=None, **options):
    lm = tiny.llama(vocab_size=len(activations.WORDS))
    tokenizer = activations.tokenizer(bos_token="<s>", eos_token="</s>")
    options = {"activation_settings": SETTINGS, **options}
    args = args or arguments(folder)
    return lm, train_release(lm, tokenizer, texts(1), hookpoints, args, sae, **options)


def test_one_call_trains_measures_and_describes_saes_that_attach(tmp_path):
    lm, made = release(tmp_path / "out", [1, "layers.2.resid_post"], eval_dataset=texts(2))
    assert (made.folder, made.tokens) == (tmp_path / "out", 640)
    assert made.saes == (PLACE, "layers.2.resid_post")
    assert made.log[0]["step"] == 2
    for name in made.saes:
        sae = SwitchSAE.from_pretrained(made.folder, subfolder=name)
        assert (sae.config.k, sae.config.activation) == (2, "batch_topk")
        assert int(sae.statistics_tokens) > 0
        stored = json.loads((made.folder / name / "metrics.json").read_text())
        assert stored == made.metrics[name]
        assert 0 < stored["fvu"] < 1
        assert stored["ce_spliced"] > 0
        with sae.attach(lm) as session:
            lm(torch.tensor([[3, 4, 5]]))
            assert session.features.shape == (1, 3)
    assert str(made.metrics[PLACE]["fvu"]) in (made.folder / "README.md").read_text()


def test_a_cache_is_filled_once_and_gives_the_next_run_its_rows(tmp_path):
    options = {"cache": tmp_path / "cache", "preset": "published"}
    _, made = release(tmp_path / "one", **options)
    assert made.metrics == {}
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    _, again = release(tmp_path / "two", **options)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    one, two = (SwitchSAE.from_pretrained(each.folder, subfolder=PLACE) for each in (made, again))
    assert one.config.activation == "topk"
    torch.testing.assert_close(one.W_enc, two.W_enc, rtol=0, atol=0)


def test_a_finished_sae_is_kept_and_what_contradicts_itself_is_refused_first(tmp_path):
    release(tmp_path / "out")
    before = (tmp_path / "out" / PLACE / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="holds an SAE that a run has finished"):
        release(tmp_path / "out")
    assert (tmp_path / "out" / PLACE / "model.safetensors").read_bytes() == before
    for changes, message in (
        ({"eval_tokens": 3}, "eval_tokens 3 is less than one context of 16"),
        ({"preset": "papers"}, "no preset 'papers'; there are default, published"),
        ({"sae": {**SAE, "k": 40}}, "k=40 is outside 1 to 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            release(tmp_path / "other", **changes)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("output_dir", ["checkpoints/sae", "checkpoint-3/sae"])
def test_a_finished_sae_is_kept_whatever_the_folder_is_called(tmp_path, output_dir):
    finished_sae(tmp_path / output_dir / PLACE)
    with pytest.raises(TrainingError, match="holds an SAE that a run has finished"):
        check(tmp_path / output_dir)


@pytest.mark.parametrize(
    "place",
    ["checkpoint-8", ".partial-checkpoint-8", f".partial-{PLACE}", ".replaced-checkpoint-8"],
)
def test_what_a_killed_run_left_is_not_a_finished_sae(tmp_path, place):
    finished_sae(tmp_path / place / PLACE)
    check(tmp_path)


def finished_sae(folder):
    folder.mkdir(parents=True)
    (folder / "training.json").write_text("{}")


def check(folder):
    check_before_loading(arguments(folder), SETTINGS, SAE, "default", None)
