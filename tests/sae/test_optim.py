"""SwitchSAEAdam is clip, projection, torch's Adam and normalization, one after another."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.saes import make, rows
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_switch_sae import BackendError, ConfigError, SwitchSAE, SwitchSAEAdam, use_backend
from hf_switch_sae.sae import rows as weight_rows


def train_both(kind, groups=1, max_grad_norm=0.05):
    """The same steps by `SwitchSAEAdam` and by the four calls it stands for."""
    mine: SwitchSAE = make(kind, groups).train()
    theirs = copy.deepcopy(mine)
    fused = SwitchSAEAdam(mine, lr=0.01, max_grad_norm=max_grad_norm)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.01)
    for step in range(4):
        x = rows(40) + step
        for sae in (mine, theirs):
            sae(x).loss.backward()
        fused.step()
        if max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
            torch.testing.assert_close(fused.grad_norm, norm, atol=1e-5, rtol=1e-4)
        theirs.project_decoder_grad()
        adam.step()
        theirs.normalize_decoder()
        fused.zero_grad()
        adam.zero_grad()
    return mine, theirs, fused, adam


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9, None])
@pytest.mark.parametrize("groups", [1, 2], ids="groups_{}".format)
@pytest.mark.parametrize("cached", [2**21, 100], ids=["one_block", "many_blocks"])
def test_a_step_is_clip_projection_adam_and_unit_rows(monkeypatch, cached, groups, max_grad_norm):
    monkeypatch.setattr(weight_rows, "_CACHED_BYTES", cached)
    mine, theirs, _, _ = train_both("switch_with_bias", groups, max_grad_norm=max_grad_norm)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine.W_dec.norm(dim=-1), torch.ones(mine.W_dec.shape[:2]))


def test_its_state_is_adams_both_ways():
    mine, theirs, fused, adam = train_both("switch")
    torch.testing.assert_close(
        fused.state_dict()["state"], adam.state_dict()["state"], atol=1e-6, rtol=1e-3
    )
    again = SwitchSAEAdam(theirs, lr=0.5, max_grad_norm=0.05)
    again.load_state_dict(adam.state_dict())
    assert again.param_groups[0]["lr"] == 0.01
    (theirs(rows(40)).loss + mine(rows(40)).loss).backward()
    again.step()
    fused.step()
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), atol=1e-4, rtol=1e-3)


def test_a_scheduler_and_a_closure_work_as_with_any_optimizer():
    sae, x = make("switch").train(), rows(40)
    optimizer = SwitchSAEAdam(sae, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure():
        optimizer.zero_grad()
        loss = sae(x).loss
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    before = copy.deepcopy(dict(sae.named_parameters()))
    assert optimizer.step(closure) < first
    # a learning rate of 0 changes nothing
    torch.testing.assert_close(dict(sae.named_parameters()), before)


def test_what_has_no_gradient_is_left_alone():
    sae = make("switch_with_bias").train()
    before = copy.deepcopy(sae.state_dict())
    SwitchSAEAdam(sae).step()
    torch.testing.assert_close(sae.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan")])
def test_a_norm_that_is_not_above_0_is_refused(wrong):
    with pytest.raises(ConfigError, match="must be above 0"):
        SwitchSAEAdam(make("switch"), max_grad_norm=wrong)


def test_a_bfloat16_sae_trains_and_keeps_unit_rows_up_to_rounding():
    sae = make("switch").to(torch.bfloat16).train()
    optimizer, before = SwitchSAEAdam(sae, lr=0.01), sae.W_dec.detach().clone()
    sae(rows(40)).loss.backward()
    optimizer.step()
    assert (sae.W_dec != before).any()
    torch.testing.assert_close(
        sae.W_dec.float().norm(dim=-1), torch.ones(sae.W_dec.shape[:2]), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_weight_decay_of_a_loaded_state_is_obeyed(kind):
    sae = make("switch").train()
    theirs = copy.deepcopy(sae)
    adam = kind(theirs.parameters(), lr=0.01, weight_decay=0.5)
    fused = SwitchSAEAdam(sae, max_grad_norm=None)
    fused.load_state_dict(adam.state_dict())
    for each in (sae, theirs):
        each(rows(40)).loss.backward()
    theirs.project_decoder_grad()
    adam.step()
    theirs.normalize_decoder()
    fused.step()
    torch.testing.assert_close(sae.state_dict(), theirs.state_dict(), atol=1e-5, rtol=1e-4)


def test_amsgrad_of_a_loaded_state_is_refused():
    sae = make("switch").train()
    fused = SwitchSAEAdam(sae)
    fused.load_state_dict(torch.optim.Adam(sae.parameters(), amsgrad=True).state_dict())
    with pytest.raises(ConfigError, match="has no amsgrad"):
        fused.step()


def test_a_copy_or_replaced_parameters_are_refused_before_anything_is_stepped():
    sae = make("switch").train()
    optimizer = SwitchSAEAdam(sae)
    with pytest.raises(ConfigError, match="does not hold its SAE's parameters"):
        copy.deepcopy(optimizer).step()
    optimizer.param_groups[0]["params"] = list(make("switch").parameters())
    with pytest.raises(ConfigError, match="does not hold its SAE's parameters"):
        optimizer.step()


@pytest.mark.parametrize("of", ["weight", "grad", "both", "weight_after_a_step"])
def test_weights_and_gradients_may_lie_in_any_order(of):
    def laid_out(tensor):
        return tensor.mT.contiguous().mT

    sae = make("switch").train()
    theirs = copy.deepcopy(sae)
    optimizers = [SwitchSAEAdam(each, lr=0.01, max_grad_norm=0.05) for each in (sae, theirs)]
    for step in range(3):
        if of != "grad" and step == int(of == "weight_after_a_step"):
            sae.experts[0].W_dec.data = laid_out(sae.experts[0].W_dec.data)
        for each, optimizer in zip((sae, theirs), optimizers, strict=True):

            def closure(each=each, optimizer=optimizer):
                optimizer.zero_grad()
                loss = each(rows(40)).loss
                loss.backward()
                if each is sae and of in ("grad", "both"):
                    for weight in (sae.experts[0].W_dec, sae.experts[0].W_enc):
                        weight.grad = laid_out(weight.grad)
                return loss

            optimizer.step(closure)
    torch.testing.assert_close(sae.state_dict(), theirs.state_dict(), atol=1e-6, rtol=1e-5)
    sae.zero_grad()
    sae(rows(40)).loss.backward()
    sae.project_decoder_grad()
    along = (sae.W_dec.grad * sae.W_dec).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-6, rtol=0)


def test_a_backend_that_declines_is_asked_before_anything_is_stepped():
    sae = make("switch").to(torch.bfloat16).train()
    optimizer, before = SwitchSAEAdam(sae), copy.deepcopy(sae.state_dict())
    sae(rows(40)).loss.backward()
    before = copy.deepcopy(sae.state_dict())
    with use_backend("native"), pytest.raises(BackendError, match="declines"):
        optimizer.step()
    torch.testing.assert_close(sae.state_dict(), before, atol=0, rtol=0)
    assert {int(state["step"]) for state in optimizer.state.values()} == {0}
    optimizer.step()


def test_a_wrapped_sae_is_taken_and_anything_else_refused():
    sae = make("switch").train()
    optimizer = SwitchSAEAdam(torch.compile(sae, backend="eager"))
    assert optimizer.param_groups[0]["params"] == list(sae.parameters())
    assert len(SwitchSAEAdam(torch.nn.ModuleList([sae, make("plain_topk")])).param_groups) == 2
    for wrong, said in (
        ([], "nothing"),
        (torch.nn.Linear(2, 2), "Linear"),
        ([sae, torch.nn.ReLU()], "SwitchSAE, ReLU"),
        (sae.parameters(), "this is Parameter, Parameter"),
    ):
        with pytest.raises(ConfigError, match=said):
            SwitchSAEAdam(wrong)
    with pytest.raises(ConfigError, match="2 rates for 1 SAEs"):
        SwitchSAEAdam([sae], lr=[0.1, 0.2])


@pytest.fixture
def one_of_two_processes():
    """As the first of two would be: what they would tell each other is not waited for."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_a_process_keeps_the_rows_it_holds_at_length_1(one_of_two_processes):
    sae = make("switch").train()
    fully_shard(sae)
    with torch.no_grad():
        sae.experts[0].W_dec.mul_(3)
    sae.normalize_decoder()
    rows = sae.experts[0].W_dec.to_local()
    assert rows.shape[0] == 2
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:2]))
    sae.experts[0].W_dec.grad = sae.experts[0].W_dec.detach().clone()
    sae.project_decoder_grad()
    found = sae.experts[0].W_dec.grad.to_local()
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-6, rtol=0)


def test_a_decoder_sharded_within_its_rows_is_refused(one_of_two_processes):
    sae = make("switch").train()
    fully_shard(sae, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    optimizer = SwitchSAEAdam(sae)
    for parameter in sae.parameters():
        parameter.grad = parameter.detach().clone()
    for use in (optimizer.step, sae.normalize_decoder, sae.project_decoder_grad):
        with pytest.raises(ConfigError, match="sharded within its rows"):
            use()
    assert not any(int(state["step"]) for state in optimizer.state.values())
