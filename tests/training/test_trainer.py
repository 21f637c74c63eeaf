"""SwitchSAETrainer trains, and is a transformers.Trainer."""

import copy
import json
import math

import pytest
import torch
from helpers import trained
from helpers.trained import OTHER, PLACE, activations, history, rows, trainer
from transformers import TrainerCallback

from hf_switch_sae import (
    ConfigError,
    HookpointError,
    SwitchSAE,
    SwitchSAEConfig,
    SwitchSAETrainer,
    SwitchSAETrainingArguments,
    TrainingError,
    WidthError,
)
from hf_switch_sae.training import TensorActivations, calibrate
from hf_switch_sae.training.initialization import geometric_median


def test_it_learns_and_logs_what_one_looks_at(tmp_path):
    run = trainer(tmp_path, max_steps=60, eval_dataset=activations(256))
    run.train()
    logs = history(run)
    assert logs[-1]["fvu"] < 0.6 * logs[0]["fvu"]
    wanted = {"loss", "fvu", "l0", "dead_share", "balance", "expert_load", "router_entropy"}
    assert set(logs[0]) >= wanted | {"grad_norm", "learning_rate", "tokens", "step", "epoch"}
    assert "tokens_per_second" in run.state.log_history[0]
    assert logs[-1]["tokens"] == 60 * 64 == run.state.num_input_tokens_seen
    assert logs[-1]["l0"] <= 4
    assert 1 <= logs[-1]["expert_load"] <= 4
    assert 0 <= logs[-1]["router_entropy"] <= 1
    held_out = run.evaluate()
    assert 0 < held_out["eval_fvu"] < 1
    assert held_out["eval_tokens"] == 256
    x = rows(256)
    x = x[~run.sae.is_outlier(x)]
    with torch.no_grad():
        fvu = (x - run.sae.eval().decode(run.sae.encode(x))).square().sum()
    torch.testing.assert_close(held_out["eval_fvu"], float(fvu / (x - x.mean(0)).square().sum()))


def test_what_is_logged_is_the_mean_of_what_forward_says(tmp_path):
    run = trainer(tmp_path, max_steps=3, logging_steps=3, learning_rate=0.0)
    run.train()
    data = activations()
    outputs = [
        run.sae.train()(batch[PLACE]) for _, batch in zip(range(3), data.batches(64), strict=False)
    ]
    (logged,) = history(run)
    for name in ("loss", "fvu"):
        mean = sum(float(output[name].detach()) for output in outputs) / 3
        assert logged[name] == pytest.approx(mean, rel=1e-5)
    active = sum(int((output.features.acts > 0).sum()) for output in outputs)
    assert logged["l0"] == pytest.approx(active / 192)


def test_several_saes_over_one_pass_train_as_each_would_alone(tmp_path):
    config = SwitchSAEConfig(**trained.SAE)
    wide = SwitchSAEConfig(**{**trained.SAE, "num_features": 128, "hookpoint": OTHER})
    torch.manual_seed(1)
    saes = {"a": SwitchSAE(config), "b": SwitchSAE(wide), "c": SwitchSAE(config)}
    data = activations(hookpoints=(PLACE, OTHER))
    together = trainer(tmp_path, copy.deepcopy(saes), data, learning_rate=None)
    together.train()
    assert set(history(together)[-1]) >= {"a/fvu", "b/fvu", "c/fvu", "b/grad_norm", "loss"}
    for name, sae in saes.items():
        alone = trainer(tmp_path, sae, activations(hookpoints=(PLACE, OTHER)), learning_rate=None)
        alone.train()
        theirs = together.saes[name].state_dict()
        torch.testing.assert_close(alone.sae.state_dict(), theirs, rtol=0, atol=0)
        last = history(alone)[-1]
        assert history(together)[-1][f"{name}/fvu"] == last["fvu"]


def test_a_fresh_sae_starts_from_the_data_and_a_trained_one_from_where_it_is(tmp_path):
    run = trainer(tmp_path, max_steps=1, learning_rate=0.0, start_rows=1024)
    run.train()
    sae, x = run.sae, rows(1024)
    assert float(sae.outlier_norm) == pytest.approx(6 * float(x.norm(dim=-1).median()))
    x = x[~sae.is_outlier(x)] * sae.input_scale
    assert float(x.square().mean()) == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sae.b_router, sae.b_dec)
    assert sae.b_router.data_ptr() != sae.b_dec.data_ptr(), "tied biases are stepped twice"
    before = copy.deepcopy(sae.state_dict())
    again = trainer(tmp_path, sae, TensorActivations({PLACE: rows(1024, seed=3) * 5}), max_steps=1)
    again._start()
    torch.testing.assert_close(sae.state_dict(), before, rtol=0, atol=0)


def test_the_end_of_a_run_is_calibrated_and_says_where_it_comes_from(tmp_path):
    run = trainer(tmp_path, eval_dataset=activations(256))
    run.train()
    run.evaluate()
    run.save_model()
    found = SwitchSAE.from_pretrained(tmp_path, subfolder=PLACE)
    assert int(found.statistics_tokens) == 256
    assert found.config.hookpoint == PLACE
    assert found.config.metrics["fvu"] == pytest.approx(run.held_out[PLACE]["fvu"], rel=1e-4)
    other = calibrate(
        SwitchSAE.from_pretrained(tmp_path, subfolder=PLACE), None, activations(), rows=256
    )
    torch.testing.assert_close(other.feature_max, found.feature_max)


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1},
        {"activation": "batch_topk"},
        {"num_experts_per_token": 2},
        {"bf16": True},
        {"encoder_bias": True},
        {"activation": "jumprelu", "k": None},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=str,
)
def test_every_kind_of_sae_learns(tmp_path, options):
    run = trainer(tmp_path, max_steps=40, **options, eval_dataset=activations(256))
    run.train()
    logs = history(run)
    assert logs[-1]["fvu"] < 0.9 * logs[0]["fvu"]
    assert run.evaluate()["eval_fvu"] < 1
    assert run.sae.dtype == torch.float32


def test_another_optimizer_keeps_the_rows_at_length_1(tmp_path):
    sae = SwitchSAE(SwitchSAEConfig(**trained.SAE))
    sgd = torch.optim.SGD(sae.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(sgd, 1.0)
    run = trainer(tmp_path, sae, optimizers=(sgd, schedule), max_steps=5)
    run.train()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(4, 16))


def test_callbacks_are_called_and_can_stop_the_run(tmp_path):
    seen = []

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((state.global_step, type(model).__name__))
            control.should_training_stop = state.global_step == 3

    run = trainer(tmp_path, callbacks=[Stop()])
    run.train()
    assert seen == [(1, "SAEsTogether"), (2, "SAEsTogether"), (3, "SAEsTogether")]


def test_tokens_say_when_to_stop_and_epochs_are_passes_over_the_rows(tmp_path):
    run = trainer(tmp_path, max_steps=-1, num_train_tokens=1000)
    run.train()
    assert run.state.global_step == 16
    run = trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    run.train()
    assert (run.state.global_step, run.state.epoch) == (32, 2)


def test_an_estimate_is_said_before_the_run(tmp_path, caplog):
    trainer(tmp_path, disable_tqdm=False, max_steps=2).train()
    assert "2 steps of 64 tokens, 128 tokens on 1 process" in caplog.text
    assert "buffer_rows 1,024" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hookpoint": OTHER}, HookpointError, "the activations are of layers.1.resid_post"),
        ({"hidden_size": 8, "k": 2}, WidthError, "rows at layers.1.resid_post are 16 wide"),
        (
            {"per_device_train_batch_size": 2000},
            TrainingError,
            "1,024 rows and a batch takes 2,000",
        ),
        ({"dataloader_num_workers": 2}, ConfigError, "dataloader_num_workers=2 has no meaning"),
        ({"decay_share": 2}, ConfigError, "decay_share=2"),
        ({"start_rows": 1}, ConfigError, "start_rows=1"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_does_not_fit_is_an_error_before_anything_runs(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path / "out", **options)


def test_more_that_does_not_fit(tmp_path):
    args = SwitchSAETrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    config = SwitchSAEConfig(**trained.SAE)
    with pytest.raises(TrainingError, match="nothing to train on"):
        SwitchSAETrainer(config, None, args)
    with pytest.raises(TrainingError, match="texts need a language model"):
        SwitchSAETrainer(config, None, args, ["a text"])
    with pytest.raises(ConfigError, match="not str"):
        SwitchSAETrainer("org/sae", None, args, activations())
    sae = SwitchSAE(config)
    with pytest.raises(ConfigError, match="is there twice"):
        SwitchSAETrainer({"a": sae, "b": sae}, None, args, activations())
    hookpoints = activations(hookpoints=(PLACE, OTHER))
    with pytest.raises(ConfigError, match="no hookpoint"):
        SwitchSAETrainer(SwitchSAEConfig(hidden_size=16), None, args, hookpoints)
    with pytest.raises(ConfigError, match="no preset 'paper'"):
        SwitchSAETrainingArguments.preset("paper")


def formulas(sae: SwitchSAE, x: torch.Tensor, alpha: float) -> tuple[float, dict]:
    """The paper's loss and its gradients as they are written down, by hand, in float64."""
    (d, experts, k), n = (x.shape[1], sae.config.num_experts, sae.config.k), len(x)
    b, b_r, W_r = sae.b_dec.detach(), sae.b_router.detach(), sae.router.weight.detach()
    W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
    p = ((x - b_r) @ W_r.T).softmax(-1)
    e = p.argmax(-1)
    f = torch.zeros(experts, dtype=x.dtype).index_add_(0, e, torch.ones(n, dtype=x.dtype)) / n
    grads = {name: torch.zeros_like(weight) for name, weight in sae.named_parameters()}
    loss, dh = 0.0, torch.zeros_like(p)
    for i in range(n):
        u, w, v, g = x[i] - b, W_dec[e[i]], W_enc[e[i]], p[i, e[i]]
        a = (v @ u).relu()
        support = a.topk(k).indices
        support = support[a[support] > 0]
        y = a[support] @ w[support]
        error = g * y + b - x[i]
        loss += float(error.square().sum()) / n
        G = 2 * error / n
        delta = g * (w[support] @ G)
        grads["experts.0.W_dec"][e[i], support] += g * a[support, None] * G
        grads["experts.0.W_enc"][e[i], support] += delta[:, None] * u
        grads["b_dec"] += G - delta @ v[support]
        dg = G @ y
        dh[i] = -dg * g * p[i]
        dh[i, e[i]] += dg * g
    dh += alpha * d * experts / n * p * (f - (p * f).sum(-1, keepdim=True))
    grads["router.weight"] = dh.T @ (x - b_r)
    grads["b_router"] = -W_r.T @ dh.sum(0)
    return loss + alpha * d * experts * float((f * p.mean(0)).sum()), grads


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "accumulated"])
def test_the_published_preset_has_the_published_loss_and_gradients(tmp_path, parts):
    torch.manual_seed(3)
    sae = SwitchSAE(SwitchSAEConfig(**trained.SAE)).double()
    data = TensorActivations({PLACE: rows().double()})
    options = {"learning_rate": None, "per_device_train_batch_size": 96 // parts}
    options |= {"preset": "published", "gradient_accumulation_steps": parts}
    run = trainer(tmp_path, sae, data, **options)
    run._start()
    center = geometric_median(data.sample(512)[PLACE])
    torch.testing.assert_close(sae.b_dec.detach(), center.double())
    assert float(sae.input_scale) == 1
    with torch.no_grad():
        sae.b_router += 0.3
    batches = iter(run.get_train_dataloader())
    found, _ = run.get_batch_samples(batches, parts, torch.device("cpu"))
    loss = sum(float(run.training_step(run.model, part)) for part in found)
    x = torch.cat([part[PLACE] for part in found])
    known, grads = formulas(sae, x, alpha=3.0)
    assert loss == pytest.approx(known, rel=1e-9)
    for name, weight in sae.named_parameters():
        scale = float(grads[name].abs().max())
        torch.testing.assert_close(weight.grad, grads[name], rtol=0, atol=1e-9 * scale, msg=name)


def test_the_published_steps_and_schedule(tmp_path):
    torch.manual_seed(3)
    sae = SwitchSAE(SwitchSAEConfig(**trained.SAE))
    plain = copy.deepcopy(sae)
    options = {"preset": "published", "learning_rate": None, "max_steps": 10, "logging_steps": 1}
    run = trainer(tmp_path, sae, TensorActivations({PLACE: rows()}), warmup_steps=0, **options)
    run._start()
    plain.load_state_dict(sae.state_dict())
    law = 2e-4 / math.sqrt(64 / 2**14)
    adam = torch.optim.Adam(plain.parameters(), lr=law, betas=(0.9, 0.999), eps=1e-8)
    batches = TensorActivations({PLACE: rows()}).batches(64)
    for step in range(10):
        x = next(batches)[PLACE]
        plain.normalize_decoder()
        output = plain.train()(x)
        variance = (x - x.mean(0)).square().sum() / len(x)
        (output.fvu * variance + 3 * 16 * output.router_aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain.project_decoder_grad()
        adam.param_groups[0]["lr"] = law * min(1, (10 - step) / 2)
        adam.step()
        adam.zero_grad()
    plain.normalize_decoder()
    run.train()
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(dict(sae.named_parameters())[name], weight, atol=2e-5, rtol=1e-4)
    rates = [entry["learning_rate"] for entry in history(run)]
    assert rates == pytest.approx([law] * 9 + [law / 2])


def test_learning_rates_follow_the_law_of_each_sae():
    args = SwitchSAETrainingArguments(use_cpu=True)
    narrow, wide = (SwitchSAEConfig(num_features=n, num_experts=1) for n in (6144, 4 * 6144))
    assert args.rate_for(narrow, 1000) == pytest.approx(2.6e-3)
    assert args.rate_for(narrow, 16_000) < args.rate_for(narrow, 1000)
    assert args.rate_for(wide, 1000) < args.rate_for(narrow, 1000)
    assert args.rate_for(narrow, 1) == 6e-3
    halved = SwitchSAETrainingArguments(use_cpu=True, learning_rate_factor=0.5)
    assert halved.rate_for(narrow, 1000) == pytest.approx(2.6e-3 / 2)
    published = SwitchSAETrainingArguments.preset("published", use_cpu=True)
    for steps in (1, 100_000):
        rate = published.rate_for(SwitchSAEConfig(num_features=24576, num_experts=16), steps)
        assert rate == pytest.approx(1.633e-4, rel=1e-3)


def test_the_rate_of_a_run_is_told_and_kept(tmp_path):
    run = trainer(tmp_path, learning_rate=None, max_steps=4)
    found = run.args.rate_for(run.sae.config, 4)
    assert run.learning_rates == {PLACE: found}
    assert f"lr {found:.2g}" in run._plan(None)
    run.train()
    run.save_model()
    notes = json.loads((tmp_path / PLACE / "training.json").read_text())
    assert notes["learning_rates"] == {PLACE: found}
