"""A forward that stops at the last hooked block: the same stream, the rest never run, no trace."""

import threading

import peft
import pytest
import torch
from helpers import tiny
from torch import nn

from hf_switch_sae import AttachError, HookpointError, attach
from hf_switch_sae.lm.hooks import hook_residual
from hf_switch_sae.lm.residuals import partial_forward, residuals

INPUTS = tiny.padded(tiny.prompts(7, 4), side="right")


class Mine(Exception):
    pass


def bomb(lm: nn.Module, *paths: str) -> list[torch.utils.hooks.RemovableHandle]:
    def explode(*_):
        raise Mine

    return [lm.get_submodule(path).register_forward_pre_hook(explode) for path in paths]


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    pair = {"decoder_input_ids": INPUTS["input_ids"]} if kind in tiny.PAIRS else {}
    return {**INPUTS, **pair}


@pytest.mark.parametrize("kind", [*tiny.ALL, "whisper"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_the_stream_is_that_of_a_whole_forward(kind, site):
    lm = {**tiny.ALL, "whisper": tiny.whisper}[kind]()
    inputs = inputs_of(kind)
    if kind == "whisper":
        inputs = {
            "input_features": torch.randn(2, 8, 24),
            "decoder_input_ids": INPUTS["input_ids"],
        }
    whole: dict[str, torch.Tensor] = {}
    places = [f"layers.1.{site}", f"layers.2.{site}"]
    with torch.no_grad():
        handles = [
            hook_residual(lm, at, lambda x, at=at: whole.__setitem__(at, x.clone()))
            for at in places
        ]
        lm(**inputs)
        for handle in handles:
            handle.remove()
        with residuals(lm, places) as read:
            read(**inputs)
            found = read(**inputs)

    assert list(found) == list(whole)
    for at in places:
        torch.testing.assert_close(found[at], whole[at], rtol=0, atol=0)


def test_layers_after_the_last_place_and_the_head_are_never_computed():
    lm = tiny.llama()
    bomb(lm, "model.layers.3", "model.norm", "lm_head")

    with torch.no_grad(), residuals(lm, [0, 2]) as read:
        found = read(**INPUTS)

    assert list(found) == ["layers.0.resid_post", "layers.2.resid_post"]


def test_the_block_after_a_resid_pre_is_never_computed():
    lm = tiny.llama()
    with torch.no_grad(), residuals(lm, ["layers.2.resid_pre"]) as read:
        # in its parts, as a hook of the block's own would come before ours
        bomb(lm, "model.layers.2.self_attn")
        assert read(**INPUTS)["layers.2.resid_pre"].shape == (2, 7, tiny.DIM)


@pytest.mark.parametrize("at", ["layers.2.resid_pre", "layers.2.resid_post"])
def test_a_session_sees_the_stream_before_the_forward_stops(at):
    lm = tiny.llama()
    sae = tiny.sae_for(lm)
    with torch.no_grad(), partial_forward(lm, [at]) as early, attach(lm, sae, at=at) as session:
        lm(**INPUTS)
        whole = session.features
        early(**INPUTS)
        assert session.features is not whole
        assert torch.equal(session.features.acts, whole.acts)
    with torch.no_grad(), attach(lm, sae, at=at) as session, partial_forward(lm, [at]) as early:
        early(**INPUTS)
        assert torch.equal(session.features.acts, whole.acts)


@pytest.mark.parametrize("raised", ["nothing", "by the model", "by the caller"])
def test_no_trace_is_left_whatever_was_raised(raised):
    lm = tiny.llama()
    with torch.no_grad():
        before, traces = lm(**INPUTS).logits, tiny.traces(lm)
        try:
            with attach(lm, tiny.sae_for(lm), at=2), residuals(lm, [1, 2]) as read:
                read(**INPUTS)
                if raised == "by the caller":
                    raise Mine
                if raised == "by the model":
                    read(input_ids=torch.full((1, 3), tiny.VOCAB + 1))
        except (Mine, IndexError):
            pass
        assert tiny.traces(lm) == traces
        assert torch.equal(lm(**INPUTS).logits, before)


def test_an_error_of_the_model_is_the_callers_to_see_and_the_next_forward_works():
    lm = tiny.llama()
    with torch.no_grad(), residuals(lm, [2]) as read:
        [handle] = bomb(lm, "model.layers.1")
        with pytest.raises(Mine):
            read(**INPUTS)
        handle.remove()
        assert read(**INPUTS)["layers.2.resid_post"].isfinite().all()


def test_a_forward_of_the_users_own_is_not_stopped_here_or_in_another_thread():
    lm = tiny.llama()
    logits = []
    with torch.no_grad(), partial_forward(lm, [1]) as early:
        started, over = threading.Event(), threading.Event()

        def linger(*_):
            if threading.current_thread() is not threading.main_thread():
                started.set()
                over.wait(20)

        handle = lm.model.layers[0].register_forward_hook(linger)
        thread = threading.Thread(target=lambda: early(**INPUTS))
        thread.start()
        assert started.wait(20)
        logits.append(lm(**INPUTS).logits)
        over.set()
        thread.join()
        handle.remove()
    assert torch.equal(logits[0], lm(**INPUTS).logits)


def test_a_block_that_is_all_layers_is_read_after_its_last_run():
    import transformers as tf

    torch.manual_seed(0)
    config = tf.AlbertConfig(
        vocab_size=99, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4,
    )  # fmt: skip
    lm = tf.AlbertModel(config).eval()
    with torch.no_grad(), residuals(lm, ["encoder.albert_layer_groups.0"]) as read:
        found = read(**INPUTS)["layers.0.resid_post"]
        torch.testing.assert_close(found, lm(**INPUTS).last_hidden_state)


class Looping(nn.Module):
    """Not of transformers: it runs its blocks as often as it likes."""

    def __init__(self, loops: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
        self.loops, self.calls = loops, 0

    def forward(self, x):
        for _ in range(self.loops):
            for block in self.blocks:
                self.calls += block is self.blocks[2]
                x = block(x)
        return x


@pytest.mark.parametrize(("loops", "calls"), [(1, 1), (2, 4)])
def test_a_model_that_transformers_does_not_know_is_run_to_the_end_once_to_count(loops, calls):
    model = Looping(loops)
    want = []
    with hook_residual(model, "blocks.1", lambda x: want.append(x.clone())):
        model(torch.ones(2, 4))
    model.calls = 0
    with residuals(model, ["blocks.1"]) as read:
        for _ in range(2):
            (found,) = read(x=torch.ones(2, 4)).values()
            torch.testing.assert_close(found, want[-1])
    assert model.calls == calls


def test_a_place_that_is_not_passed_by_is_an_error_that_names_it():
    model = Looping(1)
    model.spare = nn.Sequential(nn.Linear(4, 4))
    missing = pytest.raises(HookpointError, match=r"did not pass by spare\.0")
    with residuals(model, ["blocks.1", "spare.0"]) as read, missing:
        read(x=torch.ones(2, 4))


def test_no_place_and_an_unknown_place_are_errors_before_anything_is_hooked():
    lm = tiny.llama()
    before = tiny.traces(lm)
    for places in ([], [1, 77]):
        with pytest.raises(HookpointError), residuals(lm, places):
            pass
    assert tiny.traces(lm) == before


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("wrapper", ["peft", "prompt", "compile", "data_parallel", "offload"])
def test_wrapped_models_stop_too_and_work_afterward(wrapper, tmp_path):
    lm = tiny.llama()
    with torch.no_grad(), residuals(lm, [2]) as read:
        want = read(**INPUTS)["layers.2.resid_post"]
    if wrapper == "peft":
        wrapped = peft.get_peft_model(lm, peft.LoraConfig(target_modules=["q_proj"]))
    elif wrapper == "prompt":
        tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        wrapped = peft.get_peft_model(lm, tuning)
    elif wrapper == "compile":
        wrapped = torch.compile(lm, backend="eager")
    elif wrapper == "data_parallel":
        wrapped = nn.DataParallel(lm)
    else:
        from accelerate import cpu_offload

        wrapped = cpu_offload(lm, torch.device("cpu"))
    wrapped.eval()
    with torch.no_grad():
        before = wrapped(**INPUTS).logits
        with residuals(wrapped, [2]) as read:
            for _ in range(2):
                found = read(**INPUTS)["layers.2.resid_post"]
        if wrapper == "prompt":
            assert found.shape == (2, 3 + 7, tiny.DIM)
        else:
            torch.testing.assert_close(found, want)
        assert torch.equal(wrapped(**INPUTS).logits, before)
    torch._dynamo.reset()


def test_weights_sharded_over_processes_are_refused():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    sharded = FullyShardedDataParallel(tiny.llama())
    with pytest.raises(AttachError, match="device_map"), residuals(sharded, [1]):
        pass
