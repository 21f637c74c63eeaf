"""Attaching changes nothing by itself, leaves nothing behind, and fails before it has begun."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from helpers import tiny
from helpers.scopes import watched
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_switch_sae import (
    Ablate,
    AttachError,
    BaseModelError,
    Clamp,
    EditError,
    FeatureIdError,
    HookpointError,
    NonFiniteError,
    Patch,
    Scale,
    SparseFeatures,
    Steer,
    SwitchSAE,
    SwitchSAEConfig,
    SwitchSAEError,
    WidthError,
    attach,
    detach,
    hook_residual,
    status,
)
from hf_switch_sae.lm.calls import FLOW


def raw(feature: int = 5, strength: float = 12.0, **scope: Any) -> Steer:
    return Steer(feature, strength, unit="raw", **scope)


def inputs(kind: str, lm: nn.Module) -> dict[str, Tensor]:
    batch = tiny.padded(tiny.prompts(8, 5), "right" if kind in tiny.PAIRS else "left")
    if kind in tiny.PAIRS:
        batch["decoder_input_ids"] = torch.tensor([[2, 7, 8], [2, 9, 5]])
    return batch


def logits(lm: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return lm(**(batch or tiny.padded(tiny.prompts(8, 5)))).logits


@pytest.fixture
def lm() -> PreTrainedModel:
    return tiny.llama()


@pytest.fixture
def sae(lm: PreTrainedModel) -> SwitchSAE:
    return tiny.sae_for(lm)


# Identity and traces


@pytest.mark.parametrize("at", [1, 3, "layers.2.resid_pre"])
@pytest.mark.parametrize("kind", tiny.ALL)
def test_without_edits_the_model_computes_the_same_bits(kind, at):
    lm = tiny.ALL[kind]()
    batch, before = inputs(kind, lm), tiny.traces(lm)
    clean = logits(lm, batch)

    with tiny.sae_for(lm, at).attach(lm) as session:
        assert torch.equal(logits(lm, batch), clean)
        assert session.features.shape[0] == 2
        session.edit(raw())
        assert not torch.equal(logits(lm, batch), clean)
        session.edit()
        assert torch.equal(logits(lm, batch), clean)

    assert torch.equal(logits(lm, batch), clean)
    assert tiny.traces(lm) == before


@pytest.mark.parametrize("kind", [*tiny.LM, *tiny.RECURRENT, *tiny.PAIRS])
def test_without_edits_generate_says_the_same(kind):
    lm = tiny.ALL[kind]()
    batch, before = inputs(kind, lm), tiny.traces(lm)
    clean = lm.generate(**batch, max_new_tokens=6, do_sample=False)

    with tiny.sae_for(lm).attach(lm):
        assert torch.equal(lm.generate(**batch, max_new_tokens=6, do_sample=False), clean)

    assert tiny.traces(lm) == before


def test_features_are_those_of_the_stream_that_passed(lm, sae):
    stream: list[Tensor] = []
    with hook_residual(lm, 2, lambda x: stream.append(x)):
        logits(lm)
    with sae.attach(lm) as session:
        logits(lm)
        session.edit(raw())  # features are those before the edit
        logits(lm)
        features = session.features

    real = inputs("llama", lm)["attention_mask"].bool()
    assert not real.all()
    torch.testing.assert_close(features.to_dense()[real], sae.encode(stream[0]).to_dense()[real])
    assert float(features.acts[~real].abs().max()) == 0  # padding has no features


def test_features_are_of_the_stream_as_it_came_by_even_if_the_model_writes_into_it(lm, sae):
    def spoil(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(3.0)

    with sae.attach(lm) as session, torch.no_grad():
        logits(lm)
        want = session.features.to_dense()
        handle = lm.model.layers[3].register_forward_pre_hook(spoil)
        logits(lm)
        handle.remove()

    torch.testing.assert_close(session.features.to_dense(), want)


class Stop(Exception):
    """What a test's own code raises inside the model."""


def test_an_error_in_the_block_leaves_nothing(lm, sae):
    before, clean = tiny.traces(lm), logits(lm)

    def block() -> None:
        with sae.attach(lm) as session:
            session.edit(raw())
            raise Stop

    with pytest.raises(Stop):
        block()
    assert tiny.traces(lm) == before
    assert torch.equal(logits(lm), clean)


@pytest.mark.parametrize("place", ["embed_tokens", "layers.1", "layers.3", "norm"])
@pytest.mark.parametrize("runs", ["forward", "generate"])
def test_an_error_inside_the_model_leaves_positions_and_hooks_in_order(lm, sae, place, runs):
    def stop(*_: Any) -> None:
        raise Stop

    before, batch = tiny.traces(lm), tiny.padded(tiny.prompts(8, 5))
    with sae.attach(lm) as session:
        session.edit(raw(positions="prompt"), raw(7, positions=slice(2, 4)))
        want = logits(lm)
        handle = lm.model.get_submodule(place).register_forward_hook(stop)
        with pytest.raises(Stop):
            logits(lm) if runs == "forward" else lm.generate(**batch, max_new_tokens=3)
        assert FLOW.calls == []
        handle.remove()
        assert torch.equal(logits(lm), want)
    assert tiny.traces(lm) == before


def test_a_detached_session_says_so(lm, sae):
    session = sae.attach(lm)
    logits(lm)
    session.detach()
    session.detach()
    assert session.features.shape == (2, 8)  # what it saw can still be read
    with pytest.raises(AttachError, match="detached, so its edits would do nothing"):
        session.edit(raw())
    with pytest.raises(AttachError, match="attach again for a new one"):
        session.__enter__()
    assert "detached" in repr(session)


def test_features_before_any_forward_are_a_hookpoint_error(lm, sae):
    with (
        sae.attach(lm) as session,
        pytest.raises(HookpointError, match=r"no forward pass has reached layers.2.resid_post"),
    ):
        _ = session.features


def test_a_generate_of_the_users_own_stays_his(lm, sae):
    def mine(*args: Any, **kwargs: Any) -> Any:
        return type(lm).generate(lm, *args, **kwargs)

    lm.generate = mine
    with sae.attach(lm):
        assert lm.generate is mine
    assert lm.generate is mine


def test_sessions_may_be_closed_in_any_order(lm, sae):
    before, clean = tiny.traces(lm), logits(lm)
    first, second = sae.attach(lm), sae.attach(lm, at=1)
    first.edit(raw())
    first.detach()
    assert torch.equal(logits(lm), clean)
    second.edit(raw())
    assert not torch.equal(logits(lm), clean)
    second.detach()
    assert tiny.traces(lm) == before


def test_a_model_with_an_sae_attached_is_not_copied(lm, sae):
    with sae.attach(lm), pytest.raises(AttachError, match="detach it before you copy or pickle"):
        copy.deepcopy(lm)
    copy.deepcopy(lm)


# Several sessions, several places


def test_deltas_of_several_edits_add_up(lm, sae):
    streams: dict[str, Tensor] = {}

    def stream_of(*edits: Any) -> Tensor:
        session.edit(*edits)
        logits(lm)
        return streams["now"]

    with sae.attach(lm) as session:
        spy = lm.model.layers[3].register_forward_pre_hook(
            lambda _, args: streams.update(now=args[0])
        )
        clean = stream_of()
        one, two, three = raw(), Clamp(7, 3, unit="raw"), Scale([1, 2, 3], 2.0)
        parts = [stream_of(edit) - clean for edit in (one, two, three)]
        torch.testing.assert_close(stream_of(one, two, three) - clean, sum(parts))
        torch.testing.assert_close(stream_of(three, two, one), stream_of(one, two, three))
        spy.remove()


def test_nested_sessions_at_one_place_commute(lm, sae):
    other = tiny.sae_for(lm, seed=8)
    edits = {id(sae): Clamp([3, 5], 9, unit="raw"), id(other): Scale(range(64), -3)}
    seen = []
    for first, second in ((sae, other), (other, sae)):
        with first.attach(lm) as outer, second.attach(lm) as inner:
            outer.edit(edits[id(first)])
            inner.edit(edits[id(second)])
            seen.append(logits(lm))
    assert torch.equal(*seen)


def test_a_session_does_not_see_what_another_changes_at_its_place(lm, sae):
    with sae.attach(lm) as outer:
        logits(lm)
        clean = outer.features.to_dense()
        with sae.attach(lm) as inner:
            outer.edit(raw())
            logits(lm)
            assert torch.equal(inner.features.to_dense(), clean)


def test_two_places_at_once_equal_two_nested_sessions(lm):
    early, late = tiny.sae_for(lm, 1), tiny.sae_for(lm, 3, seed=5)
    with attach(lm, {1: early, "layers.3.resid_post": late}) as session:
        session.edit(raw(), at="layers.1.resid_post")
        session.edit(Clamp(3, 9, unit="raw"), at="layers.3.resid_post")
        together = logits(lm)
        assert set(session.features) == {"layers.1.resid_post", "layers.3.resid_post"}
        assert session.edits["layers.1.resid_post"] == (raw(),)
        with pytest.raises(HookpointError, match=r"at='layers.1.resid_post' or 'layers.3"):
            session.edit(raw())
    with early.attach(lm) as first, late.attach(lm) as second:
        first.edit(raw())
        second.edit(Clamp(3, 9, unit="raw"))
        assert torch.equal(logits(lm), together)


def test_a_mapping_of_one_sae_is_a_mapping_still(lm, tmp_path):
    sae, name = tiny.sae_for(lm, 2), "layers.2.resid_post"
    with attach(lm, sae) as alone:
        logits(lm)
        features = alone.features.to_dense()
    with attach(lm, {2: sae}) as session:
        session.edit(raw())  # there is one place, so it need not be named
        logits(lm)
        assert list(session.features) == [name]
        assert torch.equal(session.features[name].to_dense(), features)
        assert session.edits == {name: (raw(),)}
        with session.record(tmp_path) as stores:
            logits(lm)
        assert list(stores) == [name]
        assert stores[name].path == tmp_path / name


def test_a_splice_replaces_the_stream_by_its_reconstruction(lm, sae):
    with hook_residual(lm, 2, lambda x: sae(x).reconstruction):
        want = logits(lm, {"input_ids": tiny.prompts(8)[0][None]})
    with sae.attach(lm, splice=True):
        got = logits(lm, {"input_ids": tiny.prompts(8)[0][None]})
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_edits_act_on_top_of_a_splice(lm, sae):
    row = sae.decoder_rows(5)[0]
    with hook_residual(lm, 2, lambda x: sae(x).reconstruction + 12 * row):
        want = logits(lm, {"input_ids": tiny.prompts(8)[0][None]})
    with sae.attach(lm, splice=True) as session:
        session.edit(raw())
        got = logits(lm, {"input_ids": tiny.prompts(8)[0][None]})
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_two_splices_at_one_place_are_an_edit_error(lm, sae):
    before = tiny.traces(lm)
    with sae.attach(lm, splice=True):
        inside = tiny.traces(lm)
        with pytest.raises(EditError, match=r"layers.2.resid_post is spliced already"):
            sae.attach(lm, splice=True)
        assert tiny.traces(lm) == inside
    assert tiny.traces(lm) == before


def test_conflicting_edits_of_two_sessions_leave_those_before_live(lm, sae):
    with sae.attach(lm) as outer, sae.attach(lm) as inner:
        outer.edit(Clamp(5, 9, unit="raw"))
        inner.edit(Scale(6, 2))
        live = logits(lm)
        with pytest.raises(EditError, match="feature 5 is set by both Clamp and Ablate"):
            inner.edit(Ablate([4, 5]))
        assert inner.edits == (Scale(6, 2),)
        assert torch.equal(logits(lm), live)
        inner.edit(raw(5))  # adding never conflicts


def test_a_failed_edit_leaves_the_edits_before_live(lm, sae):
    with sae.attach(lm) as session:
        session.edit(raw())
        live = logits(lm)
        for wrong in (Steer(64), Clamp(3, 1, unit="raw", when=99), "steer"):
            with pytest.raises(SwitchSAEError):
                session.edit(wrong)
        with pytest.raises(EditError, match="set by both"):
            session.edit(Ablate(3), Ablate(3))
        assert session.edits == (raw(),)
        assert torch.equal(logits(lm), live)


# What is refused


def wrong_width(lm: nn.Module) -> SwitchSAE:
    return SwitchSAE(SwitchSAEConfig(hidden_size=16, num_features=8, num_experts=2, k=2))


def on_meta(lm: nn.Module) -> SwitchSAE:
    with torch.device("meta"):
        return tiny.SwitchSAE(SwitchSAEConfig(hidden_size=32, num_features=8, num_experts=2, k=2))


def training(lm: nn.Module) -> SwitchSAE:
    return tiny.sae_for(lm, activation="batch_topk").train()


def of_another_model(lm: nn.Module) -> SwitchSAE:
    return tiny.sae_for(tiny.llama(seed=4))


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any], type[Exception], str]] = {
    "width": (wrong_width, {"at": 2}, WidthError, "is 32 wide; the SAE reads 16"),
    "layer": (tiny.sae_for, {"at": 4}, HookpointError, "no block 4 in Llama.*blocks 0 to 3"),
    "negative layer": (tiny.sae_for, {"at": -1}, HookpointError, "no block -1"),
    "no place": (wrong_width, {}, HookpointError, "names no hookpoint: pass at="),
    "path": (tiny.sae_for, {"at": "model.layer.2"}, HookpointError, "no module 'model.layer.2'"),
    "meta": (on_meta, {"at": 2}, AttachError, "on the meta device: load it with from_pretrained"),
    "training": (training, {}, AttachError, r"training mode .* call sae.eval\(\) first"),
    "base model": (of_another_model, {}, BaseModelError, "sampled weights differ"),
    "not an SAE": (lambda lm: nn.Linear(2, 2), {"at": 2}, AttachError, "got Linear"),
    "empty": (lambda lm: {}, {}, AttachError, "the mapping is empty"),
    "at with a mapping": (lambda lm: {2: tiny.sae_for(lm)}, {"at": 2}, AttachError, "leave `at`"),
    "one place twice": (
        lambda lm: {2: tiny.sae_for(lm), "layers.2": tiny.sae_for(lm)},
        {},
        AttachError,
        "two SAEs are given for layers.2.resid_post",
    ),
    "second of two": (
        lambda lm: {1: tiny.sae_for(lm, 1), 2: wrong_width(lm)},
        {},
        WidthError,
        "at layers.2.resid_post is 32 wide",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_model_untouched(lm, case):
    build, options, error, message = REFUSED[case]
    saes, before, clean = build(lm), tiny.traces(lm), logits(lm)
    with pytest.raises(error, match=message) as raised:
        attach(lm, saes, **options)
    assert isinstance(raised.value, SwitchSAEError)
    assert tiny.traces(lm) == before
    assert torch.equal(logits(lm), clean)


def test_a_model_without_blocks_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(HookpointError, match="no residual blocks"):
        attach(model, wrong_width(model), at=0)
    assert tiny.traces(model) == tiny.traces(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "bloom", "mamba"])
def test_a_wrong_width_is_refused_before_the_model_runs_in_every_family(family):
    lm = getattr(tiny, family)()
    before = tiny.traces(lm)
    with pytest.raises(WidthError, match="wide; the SAE reads 16"):
        wrong_width(lm).attach(lm, at=1)
    assert tiny.traces(lm) == before


def test_a_width_known_only_when_the_model_runs_is_refused_there():
    lm = tiny.gpt2()
    before, clean = tiny.traces(lm), logits(lm)
    sae = wrong_width(lm)
    mlp = "transformer.h.2.mlp"  # no block, so its width is not that of the blocks' norms
    with sae.attach(lm, at=mlp), pytest.raises(WidthError, match="is 32 wide; the SAE"):
        logits(lm)
    assert tiny.traces(lm) == before
    assert torch.equal(logits(lm), clean)


def test_a_feature_outside_the_dictionary_is_named_with_the_range(lm, sae):
    with sae.attach(lm) as session:
        with pytest.raises(FeatureIdError, match="no feature 64: this SAE has features 0 to 63"):
            session.edit(raw(64))
        with pytest.raises(FeatureIdError, match="no feature -1"):
            session.edit(Ablate([3, -1]))
        with pytest.raises(FeatureIdError, match="no feature 70"):
            session.edit(raw(3, when=70))


def test_a_unit_without_statistics_is_an_edit_error(lm):
    sae = SwitchSAE.for_lm(lm, 2, num_features=64, num_experts=4, k=4).eval()
    with sae.attach(lm) as session:
        for edit in (Steer(1), Clamp(1, 1), Steer(1, unit="norm")):
            with pytest.raises(EditError, match="needs the SAE's statistics"):
                session.edit(edit)
        sae.statistics_tokens.fill_(9)
        with pytest.raises(EditError, match="feature 1 was never active while"):
            session.edit(Steer(1))


def test_a_patch_of_another_dictionary_is_an_edit_error(lm, sae):
    source = SparseFeatures(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64), 32)
    with (
        sae.attach(lm) as session,
        pytest.raises(EditError, match="an SAE with 32 features; this one has 64"),
    ):
        session.edit(Patch(source))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (raw(rows=2), "Steer names row 2, but this batch has rows 0 to 1"),
        (
            raw(positions=torch.ones(1, 8, dtype=torch.bool)),
            "mask has 1 rows, but this batch has 2",
        ),
        (
            Patch(
                SparseFeatures(torch.ones(3, 4, 2), torch.zeros(3, 4, 2, dtype=torch.int64), 64),
                rows=[0, 1],
            ),
            None,
        ),
    ],
    ids=["row", "mask", "patch with rows to spare"],
)
def test_rows_are_checked_against_the_batch(lm, sae, edit, message):
    before, clean = tiny.traces(lm), logits(lm)
    with sae.attach(lm) as session:
        session.edit(edit)
        if message is None:
            assert not torch.equal(logits(lm), clean)
        else:
            with pytest.raises(EditError, match=message):
                logits(lm)
    assert tiny.traces(lm) == before
    assert torch.equal(logits(lm), clean)


def test_nan_in_the_stream_is_named_with_its_place(lm, sae):
    batch = tiny.padded(tiny.prompts(8, 5))

    def spoil(row: int, column: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            return torch.where(mark, torch.nan, out)

        mark = torch.zeros(2, 8, 1, dtype=torch.bool)
        mark[row, column] = True
        return lm.model.layers[1].register_forward_hook(hook, prepend=True)

    with tiny.sae_for(lm, 1).attach(lm):
        handle = spoil(1, 4)
        with pytest.raises(
            NonFiniteError, match=r"layers.1.resid_post holds NaN.*row 1, position 1"
        ):
            logits(lm, batch)
        handle.remove()
        handle = spoil(1, 0)  # padding
        assert torch.isfinite(logits(lm, batch)[0]).all()
        handle.remove()


# Other ways to run a model


@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_model_and_sae_need_not_agree(dtype, sae_dtype):
    lm = tiny.llama()
    sae = tiny.sae_for(lm).to(sae_dtype)
    lm.to(dtype)
    clean = logits(lm)

    with sae.attach(lm, allow_mismatch=True) as session:
        assert torch.equal(logits(lm), clean)
        assert session.features.dtype == sae_dtype
        session.edit(Scale(range(64), 0.0), raw())
        row = sae.decoder_rows(5)[0]
        got = logits(lm)
        assert got.dtype == dtype

    def change(x: Tensor) -> Tensor:
        acts = sae.decode_delta(sae.encode(x)).to(x)
        return x - acts + 12 * row.to(x)

    with hook_residual(lm, 2, change):
        want = logits(lm)
    low = torch.bfloat16 in (dtype, sae_dtype) or torch.float16 in (dtype, sae_dtype)
    kept = tiny.padded(tiny.prompts(8, 5))["attention_mask"].bool()
    torch.testing.assert_close(got[kept], want[kept], atol=0.3 if low else 1e-4, rtol=0.1)


def test_an_sae_with_experts_on_disk_edits_the_same(lm, tmp_path):
    sae = tiny.sae_for(lm)
    sae.save_pretrained(tmp_path / "sae")
    where = {name: "cpu" for name, _ in sae.named_buffers()} | {"b_dec": "cpu", "b_router": "cpu"}
    where |= {"router": "cpu", "experts.0": "cpu", "experts.1": "disk"}
    where |= {"experts.2": "cpu", "experts.3": "disk"}
    spread = SwitchSAE.from_pretrained(
        tmp_path / "sae",
        expert_groups="each",
        device_map=where,
        offload_folder=str(tmp_path / "offload"),
    )
    seen = []
    for each in (sae, spread):
        with each.attach(lm) as session:
            session.edit(Scale(range(64), -2), raw(20), raw(40))
            seen.append(logits(lm))
    assert not torch.equal(seen[0], logits(lm))
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("order", ["attached first", "attached last"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk"])
def test_offloaded_models_are_edited_the_same(how, order, site, tmp_path):
    at = f"layers.2.{site}"
    plain = tiny.llama()
    with tiny.sae_for(plain, at).attach(plain) as session:
        session.edit(Clamp([3, 7], 9, unit="raw"))
        want = logits(plain)

    lm = tiny.llama()
    sae = tiny.sae_for(lm, at)

    def offload() -> None:
        if how == "cpu_offload":
            cpu_offload(lm, torch.device("cpu"))
        else:
            where = {"model.layers.2": "disk", "model.layers.0": "cpu", "model.layers.1": "cpu"}
            where |= {"model.layers.3": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu"}
            where |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
            dispatch_model(lm, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True)

    if order == "attached last":
        offload()
    with sae.attach(lm) as session:
        if order == "attached first":
            offload()
        session.edit(Clamp([3, 7], 9, unit="raw"))
        torch.testing.assert_close(logits(lm), want)
    assert not any("generate" in key or "switch" in key for key in tiny.traces(lm))


# peft 0.21 asks transformers 5.23 by a name of the past
old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def lora(lm: PreTrainedModel, task: TaskType | None = TaskType.CAUSAL_LM) -> Any:
    torch.manual_seed(2)
    wrapped = get_peft_model(lm, LoraConfig(task_type=task, target_modules=["q_proj", "v_proj"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return wrapped.eval()


@old_name
def test_a_lora_model_is_edited_through_its_wrapper(lm, sae):
    wrapped = lora(lm)
    batch, fixed = tiny.padded(tiny.prompts(8, 5)), {"max_new_tokens": 5, "do_sample": False}
    clean = logits(wrapped)
    wrapped.generate(**batch, **fixed)  # after which PEFT leaves an attribute of its own
    before = tiny.traces(wrapped)
    with sae.attach(wrapped) as session:
        assert torch.equal(logits(wrapped), clean)
        session.edit(raw(positions="generated", strength=30.0))
        assert torch.equal(logits(wrapped), clean)  # a plain forward is all prompt
        through = wrapped.generate(**batch, **fixed)
        assert torch.equal(through, lm.generate(**batch, **fixed))
    assert not torch.equal(through, wrapped.generate(**batch, **fixed))
    assert tiny.traces(wrapped) == before


@old_name
@pytest.mark.parametrize("task", [None, TaskType.FEATURE_EXTRACTION])
def test_padding_is_known_in_a_lora_model_without_a_head(task):
    lm = tiny.llama("LlamaModel")
    sae = tiny.sae_for(lm)
    batch = tiny.padded(tiny.prompts(8, 5))
    plain = copy.deepcopy(lm)
    wrapped = lora(lm, task)
    before = tiny.traces(wrapped)
    with wrapped.disable_adapter(), torch.no_grad():
        seen = []
        for model in (plain, wrapped):
            with sae.attach(model) as session:
                session.edit(raw(positions=slice(0, 3)))
                seen.append(model(**batch).last_hidden_state)
    torch.testing.assert_close(*seen)
    assert tiny.traces(wrapped) == before


@old_name
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_are_prompt(lm, sae, config):
    wrapped = get_peft_model(lm, config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)).eval()
    batch, fixed = tiny.padded(tiny.prompts(8, 5)), {"max_new_tokens": 5, "do_sample": False}
    clean = wrapped.generate(**batch, **fixed)
    with sae.attach(wrapped) as session:
        assert torch.equal(wrapped.generate(**batch, **fixed), clean)
        session.edit(raw(strength=30.0))
        assert not torch.equal(wrapped.generate(**batch, **fixed), clean)
        virtual = 3 if config is PromptTuningConfig else 0  # prefixes stand in the cache
        for part, counts in {"prompt": [8 + virtual, 0], "generated": [0, 1]}.items():
            session.edit(raw(strength=30.0, positions=part))
            with watched(lm.model.layers[2]) as changes:
                wrapped.generate(**batch, **{**fixed, "max_new_tokens": 2})
            assert [int((x[0].norm(dim=-1) > 1e-6).sum()) for x in changes] == counts


def test_ddp_in_one_process_is_edited(lm, sae, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(lm)
        clean = logits(wrapped)
        with sae.attach(wrapped) as session:
            assert torch.equal(logits(wrapped), clean)
            session.edit(raw())
            moved = logits(wrapped)
        with sae.attach(lm) as session:
            session.edit(raw())
            assert torch.equal(logits(lm), moved)
    finally:
        torch.distributed.destroy_process_group()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Toy(nn.Module):
    """As much of a language model as is hooked; it compiles in a tenth of a Llama's time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(99, 32), nn.Linear(32, 99)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SequenceClassifierOutput(logits=self.head(x))


def compiled(lm: nn.Module, how: str) -> nn.Module:
    torch.compiler.reset()
    if how == "in place":
        lm.compile(backend="eager")
        return lm
    return torch.compile(lm, backend=how)  # type: ignore[return-value]


KINDS = [
    pytest.param(kind, id=kind, marks=[] if kind == "toy" else [pytest.mark.slow])
    for kind in ("toy", "llama")
]


@pytest.mark.parametrize("how", ["eager", "aot_eager", "in place"])
@pytest.mark.parametrize("order", ["attached first", "compiled first"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_edited_live_and_let_go(kind, order, how):
    lm = Toy() if kind == "toy" else tiny.ALL[kind]()
    sae = tiny.sae_for(lm, 1, hidden_size=32)
    edits = Clamp(3, 9, unit="raw"), raw(7, positions=slice(1, 3))
    clean = logits(lm)
    with sae.attach(lm) as session:
        session.edit(raw())
        steered = logits(lm)
        session.edit(*edits)
        clamped = logits(lm)
    fast = compiled(lm, how)
    if order == "compiled first":
        torch.testing.assert_close(logits(fast), clean)
    for _ in range(2):
        with sae.attach(fast) as session:
            torch.testing.assert_close(logits(fast), clean)
            assert session.features.shape == (2, 8)
            session.edit(raw())
            torch.testing.assert_close(logits(fast), steered)
            session.edit(*edits)
            torch.testing.assert_close(logits(fast), clamped)
        torch.testing.assert_close(logits(fast), clean)
    torch.compiler.reset()


def test_a_second_place_in_a_compiled_model_is_seen():
    lm = Toy()
    sae = tiny.sae_for(lm, 1, hidden_size=32)
    fast = compiled(lm, "eager")
    with sae.attach(fast) as late:
        clean = logits(fast)
        with sae.attach(fast, at=0) as early:
            early.edit(raw())
            moved = logits(fast)
            assert not torch.equal(moved, clean)
            late.edit(raw(7))
            assert not torch.equal(logits(fast), moved)
    torch.testing.assert_close(logits(fast), clean)
    torch.compiler.reset()


@pytest.mark.slow
def test_generate_of_a_compiled_model_is_edited():
    lm = tiny.llama(num_hidden_layers=2)
    sae = tiny.sae_for(lm, 1)
    batch, fixed = tiny.padded(tiny.prompts(8, 5)), {"max_new_tokens": 4, "do_sample": False}
    with sae.attach(lm) as session:
        session.edit(raw(positions="generated", strength=30.0))
        want = lm.generate(**batch, **fixed)
    fast = compiled(lm, "in place")
    clean = fast.generate(**batch, **fixed)
    assert not torch.equal(clean, want)
    with sae.attach(fast) as session:
        session.edit(raw(positions="generated", strength=30.0))
        assert torch.equal(fast.generate(**batch, **fixed), want)
    assert torch.equal(fast.generate(**batch, **fixed), clean)
    torch.compiler.reset()


@pytest.mark.parametrize("asked", ["before", "after"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "t5"])
def test_hidden_states_show_the_edit(kind, asked):
    lm = tiny.ALL[kind]()
    sae, batch = tiny.sae_for(lm), inputs(kind, lm)

    def states() -> tuple[Tensor, ...]:
        with torch.no_grad():
            out = lm(**batch, output_hidden_states=True)
        return out.decoder_hidden_states if kind in tiny.PAIRS else out.hidden_states

    clean = states() if asked == "before" else None
    with sae.attach(lm) as session:
        session.edit(raw())
        got = states()
    clean = clean or states()
    delta = (got[3] - clean[3])[0]
    torch.testing.assert_close(
        delta, 12 * sae.decoder_rows(5).expand_as(delta), atol=1e-3, rtol=1e-3
    )
    assert torch.equal(got[2], clean[2])


# Gradients


def loss_of(lm: nn.Module, embeds: Tensor) -> Tensor:
    return lm(inputs_embeds=embeds).logits.square().mean()


def embeds_of(lm: nn.Module) -> Tensor:
    return lm.get_input_embeddings()(tiny.prompts(6)[0][None]).detach().requires_grad_()


def test_the_gradient_of_a_strength_is_the_slope_of_the_loss():
    lm = tiny.gpt2().double().requires_grad_(False)  # Llama's norms are float32 always
    sae = tiny.sae_for(lm).double()
    embeds = embeds_of(lm).detach().double()
    strength = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    with sae.attach(lm) as session:
        session.edit(Steer([5, 7], strength, unit="norm"))
        for _ in range(2):  # one edit serves many steps of a training of its strength
            strength.grad = None
            loss_of(lm, embeds).backward()

        def at(value: float) -> float:
            session.edit(Steer([5, 7], value, unit="norm"))
            return float(loss_of(lm, embeds).detach())

        slope = (at(1.5 + 1e-5) - at(1.5 - 1e-5)) / 2e-5
    assert float(strength.grad) == pytest.approx(slope, rel=1e-4)
    assert abs(slope) > 1e-4


def test_a_strength_in_training_is_live(lm, sae):
    strength = torch.tensor(0.0, requires_grad=True)
    clean = logits(lm)
    with sae.attach(lm) as session:
        session.edit(Steer(5, strength, unit="raw"))
        torch.testing.assert_close(logits(lm), clean)
        with torch.no_grad():
            strength.fill_(12.0)
        moved = logits(lm)
        session.edit(raw())
        torch.testing.assert_close(moved, logits(lm))


def dense_change(sae: SwitchSAE, name: str) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        features = sae.encode(x)
        acts = torch.zeros(*x.shape[:-1], 64).scatter_add(-1, features.ids, features.acts)
        wanted = acts.clone()
        if name == "scale":
            wanted = acts * torch.where(torch.arange(64) < 40, -3.0, 1.0)
        if name == "clamp":
            wanted = torch.where(torch.isin(torch.arange(64), torch.tensor([3, 7])), 9.0, acts)
        if name == "splice":
            return acts @ sae.W_dec.flatten(0, 1) + sae.b_dec
        return x + (wanted - acts) @ sae.W_dec.flatten(0, 1)

    return change


@pytest.mark.parametrize("name", ["scale", "clamp", "splice"])
def test_gradients_through_an_edit_are_those_of_its_formula(lm, sae, name):
    lm.requires_grad_(False)
    embeds = embeds_of(lm)
    with sae.attach(lm, splice=name == "splice") as session:
        edits = {"scale": [Scale(range(40), -3)], "clamp": [Clamp([3, 7], 9, unit="raw")]}
        session.edit(*edits.get(name, []))
        (got,) = torch.autograd.grad(loss_of(lm, embeds), embeds)
    with hook_residual(lm, 2, dense_change(sae, name)):
        (want,) = torch.autograd.grad(loss_of(lm, embeds), embeds)
    (clean,) = torch.autograd.grad(loss_of(lm, embeds), embeds)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)
    assert not torch.allclose(want, clean, rtol=1e-2)


def test_features_are_differentiable_where_gradients_are_on(lm, sae):
    embeds = embeds_of(lm)
    with sae.attach(lm) as session:
        lm(inputs_embeds=embeds)
        with torch.no_grad():
            assert not session.features.acts.requires_grad
        (got,) = torch.autograd.grad(session.features.acts.sum(), embeds)
    stream: list[Tensor] = []
    with hook_residual(lm, 2, lambda x: stream.append(x)):
        lm(inputs_embeds=embeds)
    (want,) = torch.autograd.grad(sae.encode(stream[0]).acts.sum(), embeds)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_features_can_be_read_in_and_out_of_a_mode_without_gradients(lm, sae, mode):
    with sae.attach(lm) as session:
        with mode():
            lm(**tiny.padded(tiny.prompts(8, 5)))
            inside = session.features.to_dense().clone()
        assert torch.equal(session.features.to_dense(), inside)
        with mode():
            lm(**tiny.padded(tiny.prompts(8, 5)))
        torch.testing.assert_close(session.features.to_dense(), inside)
        assert not session.features.acts.requires_grad


def test_an_edit_made_in_inference_mode_has_gradients_outside(lm, sae):
    strength = torch.tensor(2.0, requires_grad=True)
    with sae.attach(lm) as session:
        with torch.inference_mode():
            session.edit(Steer(5, strength, unit="raw"), Scale(range(40), -3))
            lm(**tiny.padded(tiny.prompts(8, 5)))
        loss_of(lm, embeds_of(lm)).backward()
    assert strength.grad is not None


# Preflight and status


def train_a_little(lm: nn.Module, sae: SwitchSAE, batch: dict[str, Tensor]) -> SwitchSAE:
    streams: list[Tensor] = []
    with torch.no_grad(), hook_residual(lm, sae.config.hookpoint, lambda x: streams.append(x)):
        lm(**batch)
    x = streams[0][batch["attention_mask"].bool()]
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        sae(x).loss.backward()
        optimizer.step()
        sae.normalize_decoder()
    out = sae.requires_grad_(False)(x)
    sae.config.metrics = {"fvu": float(out.fvu), "l0": float(out.features.l0())}
    return sae


def test_preflight_tells_the_right_layer_from_a_wrong_one(lm):
    batch = tiny.padded(tiny.prompts(*[24] * 15, 9))
    sae = tiny.sae_for(lm, 1, num_features=128, num_experts=2, k=12)
    sae = train_a_little(lm, sae, batch)
    with sae.attach(lm) as session:
        right = session.preflight(batch)
        session.edit(raw(strength=100.0))
        with sae.attach(lm, at=0) as other:
            other.edit(raw(strength=100.0))
            assert session.preflight(batch) == right  # all edits are off meanwhile
        assert not torch.equal(logits(lm), logits_without(lm, session))
    with sae.attach(lm, at=3) as session:
        wrong = session.preflight(batch)
    assert right.fits is True
    assert wrong.fits is False
    assert right.fvu == pytest.approx(sae.config.metrics["fvu"], rel=0.05)
    assert right.tokens <= int(batch["attention_mask"].sum())
    assert str(right).endswith(": fits")
    assert str(wrong).endswith(": DOES NOT FIT, trained at layers.1.resid_post")


def logits_without(lm: nn.Module, session: Any) -> Tensor:
    edits = session.edits
    session.edit()
    clean = logits(lm)
    session.edit(*edits)
    return clean


def test_preflight_without_figures_judges_nothing(lm, sae):
    with sae.attach(lm) as session:
        found = session.preflight(tiny.padded(tiny.prompts(8, 5)))
        assert found.fits is None
        assert "nothing on the card" in str(found)
        with pytest.raises(ValueError, match="at least two ordinary tokens"):
            session.preflight({"input_ids": torch.tensor([[5]])})


def test_status_lists_every_session_with_its_edits(lm, sae):
    assert status(lm) == []
    with sae.attach(lm) as outer, sae.attach(lm, at=1, splice=True) as inner:
        outer.edit(raw(), Ablate(3))
        lines = status(lm)
        assert [line.hookpoint for line in lines] == ["layers.2.resid_post", "layers.1.resid_post"]
        assert lines[0].edits == (raw(), Ablate(3))
        assert lines[0].path == "model.layers.2"
        assert lines[1].splice
        assert "Steer" in str(lines[0])
        assert "no edits" in str(lines[1])
        assert status(lm)[1:] == inner.status()
        assert "all threads" in str(lines[0])
    assert status(lm) == []


def test_detach_ends_every_session_of_a_model_and_of_no_other(lm, sae):
    other = tiny.llama()
    sae.attach(lm)
    sae.attach(lm, at=1)
    with tiny.sae_for(other).attach(other) as kept:
        assert detach(lm) == 2
        assert status(lm) == []
        assert detach(lm) == 0
        assert kept.attached
    assert not any(module._forward_hooks for module in lm.modules())


@pytest.mark.parametrize("at", [None, True, 1.5, [1]])
def test_what_is_no_model_or_no_place_is_said_to_be_none(lm, sae, at):
    for use in (sae.attach, detach, status):
        with pytest.raises(AttachError, match=r"is a torch.nn.Module; got None"):
            use(None)
    if at is not None:
        with pytest.raises(HookpointError, match="a place is a layer"):
            sae.attach(lm, at=at)
    assert status(lm) == []


# Memory


def test_nothing_is_kept_after_detach():
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    streams: list[Any] = []
    with sae.attach(lm) as session:
        session.edit(raw())
        lm(**tiny.padded(tiny.prompts(8, 5)))
        lm.generate(**tiny.padded(tiny.prompts(8, 5)), max_new_tokens=2)
        streams.append(weakref.ref(session.taps["layers.2.resid_post"].last.stream))
    refs = [weakref.ref(lm), weakref.ref(sae), weakref.ref(session)]
    del session
    gc.collect()
    assert streams[0]() is None
    assert refs[2]() is None
    del lm, sae
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_a_forgotten_session_is_collected_with_its_model():
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    session = sae.attach(lm)
    lm(**tiny.padded(tiny.prompts(8, 5)))
    refs = [weakref.ref(lm), weakref.ref(sae), weakref.ref(session)]
    del lm, sae, session
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_generate_holds_one_stream_however_long_it_runs(lm, sae):
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    counts = []
    with sae.attach(lm) as session:
        session.edit(Scale(range(64), -1))
        for steps in (8, 200):
            lm.generate(**tiny.padded(tiny.prompts(8, 5)), max_new_tokens=steps, do_sample=False)
            counts.append(alive())
    assert counts[1] <= counts[0]


def test_hook_residual_reads_changes_and_goes(lm):
    before, clean = tiny.traces(lm), logits(lm)
    with hook_residual(lm, 2, lambda x: None):
        assert torch.equal(logits(lm), clean)
    handle = hook_residual(lm, "layers.3.resid_pre", lambda x: x + 1)
    assert not torch.equal(logits(lm), clean)
    handle.remove()
    handle.remove()
    assert tiny.traces(lm) == before


def test_an_sae_saved_and_loaded_edits_the_same(lm, sae, tmp_path: Path):
    sae.save_pretrained(tmp_path)
    loaded = SwitchSAE.from_pretrained(tmp_path)
    seen = []
    for each in (sae, loaded):
        with each.attach(lm) as session:
            session.edit(Steer(5, 3), Clamp([7], 2, unit="norm"), Scale([1, 2], -3))
            seen.append(logits(lm))
    torch.testing.assert_close(*seen)  # weights that lie elsewhere may round another way


def test_a_splice_leaves_outliers_as_they_are(lm):
    sae = tiny.sae_for(lm)
    inputs = tiny.padded(tiny.prompts(5))
    seen: list[Tensor] = []
    with hook_residual(lm, 2, seen.append), torch.no_grad():
        lm(**inputs)
    norms = seen[0].norm(dim=-1)
    sae.outlier_norm.fill_(float(norms[0].sort().values[-2:].mean()))  # the longest one is over it
    spliced: list[Tensor] = []

    with sae.attach(lm, at=2, splice=True), torch.no_grad():
        lm(**inputs)
        with hook_residual(lm, "layers.3.resid_pre", spliced.append):
            lm(**inputs)

    outlier = sae.is_outlier(seen[0])
    assert int(outlier.sum()) == 1
    assert torch.equal(spliced[0][outlier], seen[0][outlier])
    assert not torch.isclose(spliced[0][~outlier], seen[0][~outlier]).all()


@pytest.mark.parametrize("what", ["x", [1], torch.nn.Linear(2, 2), None])
def test_what_is_no_sae_is_refused_by_name(lm, what):
    with pytest.raises(AttachError, match=f"got {type(what).__name__}"):
        attach(lm, what, at=1)
    with pytest.raises(AttachError, match=f"got {type(what).__name__}"):
        attach(lm, {1: what})


def test_preflight_and_edit_say_how_to_call_them(lm):
    with tiny.sae_for(lm).attach(lm, at=2) as session:
        with pytest.raises(TypeError, match=r"as a tokenizer returns them.*got str"):
            session.preflight("a text")
        with pytest.raises(EditError, match=r"session\.edit\(\*edits\)"):
            session.edit([raw(), raw(3)])


def test_preflight_of_a_detached_session_says_so(lm):
    session = tiny.sae_for(lm).attach(lm, at=2)
    session.detach()
    with pytest.raises(AttachError, match="detached"):
        session.preflight(tiny.padded(tiny.prompts(5)))
