"""A run loses nothing: killed, cut off, out of disk or out of numbers, it goes on as if not."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from helpers.trained import PLACE, activations, history, launch, rows, start, trainer
from safetensors.torch import load_file

from hf_switch_sae import NonFiniteError, SwitchSAE, TrainingError
from hf_switch_sae.training import TensorActivations, checkpoints

SAVING = {"save_strategy": "steps", "save_steps": 5}


def tensors(folder):
    return load_file(folder / PLACE / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed: its log and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, **SAVING)
    run.train()
    run.save_model()
    return history(run), tensors(folder)


@pytest.mark.parametrize("step", [5, 15, 20])
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path, whole, step):
    trainer(tmp_path, **SAVING).train()
    run = trainer(tmp_path, **SAVING)
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    run.save_model()
    assert history(run) == whole[0]
    assert same(tensors(tmp_path), whole[1])


def test_over_epochs_and_accumulated_parts_too(tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 3}
    options |= {"save_strategy": "steps", "save_steps": 4}
    first = trainer(tmp_path, **options)
    first.train()
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert history(again) == history(first)
    assert same(again.sae.state_dict(), first.sae.state_dict())
    assert first.state.epoch == 3


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_as_if_never(tmp_path, whole):
    moments, pace = random.Random(7), 0.0
    on_the_way = kills = 0
    deadline = time.monotonic() + 250
    while kills < 10 and time.monotonic() < deadline:
        (tmp_path / "began").unlink(missing_ok=True)
        (running,) = start(tmp_path, {**SAVING, "resume": True})
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        if not pace:  # seconds to the first checkpoint, on this machine as busy as it is
            began = time.monotonic()
            while running.is_alive() and not checkpoints.checkpoints_in(tmp_path):
                time.sleep(0.01)
            pace = time.monotonic() - began
        running.join(moments.uniform(0.1, 2) * pace)
        if running.is_alive():
            os.kill(running.pid, signal.SIGKILL)
            kills += 1
        running.join()
        good = checkpoints.checkpoints_in(tmp_path)
        assert all(checkpoints.fault_of(each) is None for each in good)
        on_the_way += bool(good)
        if running.exitcode == 0 or len(good) > 3:  # near its end: go back to an early checkpoint
            for late in good[1:]:
                shutil.rmtree(late)
    assert kills == 10
    assert on_the_way > 3, "else it was killed before it had begun"
    result = launch(tmp_path, {**SAVING, "resume": True})
    assert history(result) == whole[0]
    assert same(tensors(tmp_path), whole[1])


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, whole, caplog):
    trainer(tmp_path, **SAVING).train()
    with (tmp_path / "checkpoint-20/optimizer.pt").open("r+b") as file:
        file.seek(500)
        file.write(b"\0\1\2\3")
    (tmp_path / "checkpoint-24").rename(tmp_path / "elsewhere")
    run = trainer(tmp_path, **SAVING)
    run.train(resume_from_checkpoint=True)
    assert "checkpoint-20 is damaged: the checksum of optimizer.pt is wrong" in caplog.text
    assert "going on from checkpoint-15" in caplog.text
    assert history(run) == whole[0]
    assert checkpoints.fault_of(tmp_path / "checkpoint-20") is None, "it was written anew"


@pytest.mark.parametrize("fault", ["cut", "missing", "no_list"])
def test_every_fault_is_found_and_said(tmp_path, fault):
    trainer(tmp_path, **SAVING, max_steps=5).train()
    path = tmp_path / f"checkpoint-5/{PLACE}/model.safetensors"
    if fault == "cut":
        os.truncate(path, 100)
    elif fault == "missing":
        path.unlink()
    else:
        (tmp_path / "checkpoint-5/checksums.json").unlink()
    with pytest.raises(TrainingError, match=r"no checkpoint to go on from: .*checkpoint-5 is dam"):
        trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    with pytest.raises(TrainingError, match="is damaged"):
        trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    with pytest.raises(TrainingError, match="there is no checkpoint nowhere"):
        trainer(tmp_path, **SAVING).train(resume_from_checkpoint="nowhere")


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer(tmp_path, **SAVING, max_steps=5).train()
    with pytest.raises(TrainingError, match="k is 4 there and 3 here"):
        trainer(tmp_path, k=3).train(resume_from_checkpoint=True)


def test_a_full_disk_is_said_and_the_last_checkpoint_kept(tmp_path, monkeypatch):
    run = trainer(tmp_path, **SAVING, save_total_limit=1)
    real = torch.save

    def full(value, path, *args, **kwargs):
        if run.state.global_step == 10 and "scheduler" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*checkpoint-5 is whole"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert checkpoints.fault_of(tmp_path / "checkpoint-5") is None


def test_a_full_disk_at_the_end_is_said_too_and_the_run_can_save_again(tmp_path, monkeypatch):
    run = trainer(tmp_path, **SAVING)
    run.train()

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "sync", full)
        with pytest.raises(TrainingError, match=r"No space left on device.*checkpoint-24 is whole"):
            run.save_model()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    run.save_model()
    assert tensors(tmp_path)


def test_cut_off_while_writing_there_is_no_checkpoint_of_that_name(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, **SAVING).train()
    assert not (tmp_path / "checkpoint-5").exists()
    run = trainer(tmp_path, **SAVING)
    run.train(resume_from_checkpoint=True)
    assert history(run) == whole[0]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_cut_off_while_replacing_a_checkpoint_it_comes_back(tmp_path):
    for name, text in ((".replaced-checkpoint-5", "old"), (".partial-checkpoint-5", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(text)
    checkpoints.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert (tmp_path / "checkpoint-5/text").read_text() == "old"


def test_rows_that_are_not_finite_stop_the_run_and_are_named(tmp_path):
    x = rows(1024)
    x[700] = torch.nan
    data = TensorActivations({PLACE: x})
    # where row 700 comes in the order of rows
    at = next(
        n for n, b in enumerate(TensorActivations({PLACE: x}).batches(64)) if b[PLACE].isnan().any()
    )
    run = trainer(tmp_path, data=data, **{**SAVING, "save_steps": 1}, start="none")
    message = rf"nan at step {at + 1} \(rows {at * 64:,} to .*1 at {PLACE}"
    with pytest.raises(NonFiniteError, match=message):
        run.train()
    if at:
        last = run.last_good_checkpoint()
        assert last.name == f"checkpoint-{at}"
        weights = SwitchSAE.from_pretrained(last, subfolder=PLACE).state_dict()
        assert all(t.isfinite().all() for n, t in weights.items() if n != "outlier_norm")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = trainer(tmp_path, **SAVING, learning_rate=1e38, warmup_steps=0, max_grad_norm=0)
    with pytest.raises(NonFiniteError, match=r"(Lower|lower) the learning rate"):
        run.train()
    assert checkpoints.checkpoints_in(tmp_path) == []


def test_old_checkpoints_go_and_the_best_stays(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "fvu"}
    options |= {"greater_is_better": False, "load_best_model_at_end": True, "save_total_limit": 2}
    run = trainer(tmp_path, **SAVING, **options, eval_dataset=activations(256))
    run.train()
    best = run.state.best_model_checkpoint
    names = {path.name for path in checkpoints.checkpoints_in(tmp_path)}
    assert os.path.basename(best) in names  # noqa: PTH119
    assert "checkpoint-24" in names
    assert len(names) == 2
    state = json.loads((tmp_path / "checkpoint-24/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
