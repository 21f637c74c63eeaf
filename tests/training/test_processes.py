"""A batch spread over processes or steps trains as the whole would, to rounding."""

import pytest
import torch
from helpers.trained import PLACE, history, launch, trainer
from safetensors.torch import load_file

from hf_switch_sae.training import checkpoints

DEAD = {"dead_after_tokens": 40, "auxk_loss_coef": 0.0, "router_z_loss_coef": 0.01}
DEAD |= {"second_expert_loss_coef": 0.3}
FSDP = {"fsdp": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process, the whole batch at once."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, **DEAD)
    run.train()
    run.save_model()
    assert history(run)[-1]["dead_share"] > 0, "else nothing is counted that could differ"
    return history(run), load_file(folder / PLACE / "model.safetensors")


def assert_same(folder, result, whole):
    logs, weights = history(result), load_file(folder / PLACE / "model.safetensors")
    for entry, known in zip(logs, whole[0], strict=True):
        assert entry == pytest.approx(known, rel=2e-5, abs=1e-6)
    torch.testing.assert_close(weights, whole[1], rtol=1e-4, atol=2e-5)
    assert torch.equal(weights["num_tokens_since_fired"], whole[1]["num_tokens_since_fired"])


def test_accumulated_parts_are_the_whole(tmp_path, whole):
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
    run = trainer(tmp_path, **DEAD, **options)
    run.train()
    run.save_model()
    assert_same(tmp_path, {"log": run.state.log_history}, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 32},
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 32, **FSDP},
    ],
    ids=["ddp", "ddp_accumulated", "fsdp2"],
)
def test_two_processes_with_half_the_batch_are_one_with_the_whole(tmp_path, whole, options):
    result = launch(tmp_path, {**DEAD, **options}, processes=2)
    assert_same(tmp_path, result, whole)


@pytest.mark.parametrize("options", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_resume_as_if_never_stopped(tmp_path, whole, options):
    options = {**DEAD, **options, "per_device_train_batch_size": 32}
    options |= {"save_strategy": "steps", "save_steps": 10}
    launch(tmp_path, options, processes=2)
    (first, *_) = checkpoints.checkpoints_in(tmp_path)
    assert first.name == "checkpoint-10"
    shares = {path.name for path in first.glob("optimizer*")}
    assert shares == (
        {"optimizer_0.pt", "optimizer_1.pt"} if "fsdp" in options else {"optimizer.pt"}
    )
    result = launch(tmp_path, {**options, "resume": str(tmp_path / "checkpoint-10")}, processes=2)
    assert_same(tmp_path, result, whole)


def test_each_process_has_text_of_its_own(tmp_path):
    launch(tmp_path, {"live": True, "max_steps": 6, "per_device_train_batch_size": 32}, 2)
    shares = [(tmp_path / f"share-{rank}.json").read_text() for rank in range(2)]
    assert shares == ["[0, 2]", "[1, 2]"]
