"""A language model is known again by its weights: as a copy, in another dtype, under a wrapper."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from hf_switch_sae import BaseModelError, SwitchSAE, fingerprint
from hf_switch_sae.lm.fingerprint import base_model_fields, check_base_model

old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def lm() -> PreTrainedModel:
    return tiny.llama()


def accepts(sae: SwitchSAE, lm: nn.Module, **options: bool) -> None:
    with sae.attach(lm, **options) as session, torch.no_grad():
        lm(torch.tensor([[5, 6, 7]]))
        assert session.features.shape == (1, 3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "mamba", "gemma3"])
def test_a_fingerprint_is_json_of_a_few_numbers(kind):
    found = fingerprint(tiny.ALL[kind]())
    text = json.dumps(found)
    assert json.loads(text) == found
    assert len(text) < 5000
    assert found["hidden_size"] == 32
    assert found["model_type"] == ("gemma3_text" if kind == "gemma3" else kind)
    assert 4 <= len(found["weights"]) <= 48


@pytest.mark.parametrize("head", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "gemma3", "mamba"])
def test_a_saved_copy_is_recognized(tmp_path, kind, dtype, head):
    lm = tiny.ALL[kind]()
    sae = tiny.sae_for(lm)
    lm.save_pretrained(tmp_path / "elsewhere")
    accepts(sae, head.from_pretrained(tmp_path / "elsewhere", dtype=dtype))


def test_an_sae_of_a_bfloat16_model_fits_the_float32_one(tmp_path, lm):
    lm.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    accepts(tiny.sae_for(half), lm)


def test_a_fingerprint_is_of_numbers_wherever_new_tensors_go(lm):
    expected = fingerprint(lm)
    with torch.device("meta"):
        assert fingerprint(lm) == expected


def test_the_fingerprint_travels_with_the_sae(tmp_path, lm):
    tiny.sae_for(lm).save_pretrained(tmp_path)
    sae = SwitchSAE.from_pretrained(tmp_path)
    accepts(sae, lm)
    with pytest.raises(BaseModelError):
        sae.attach(tiny.llama(seed=3))


@old_name
def test_adapters_hide_no_model(lm):
    sae = tiny.sae_for(lm)
    clean = fingerprint(lm)
    wrapped = get_peft_model(lm, LoraConfig(target_modules="all-linear"))
    assert fingerprint(wrapped) == clean
    accepts(sae, wrapped)
    accepts(tiny.sae_for(wrapped), tiny.llama())


def test_wrappers_hide_no_model(lm):
    sae = tiny.sae_for(lm)
    assert fingerprint(torch.compile(lm, backend="eager")) == fingerprint(lm)
    sae.attach(torch.compile(lm, backend="eager")).detach()
    lm.model.layers[1] = torch.compile(lm.model.layers[1], backend="eager")
    assert fingerprint(lm) == fingerprint(tiny.llama())


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_is_recognized_and_another_is_not(tmp_path, lm, where):
    def offloaded(model: nn.Module) -> nn.Module:
        if where == "cpu":
            return cpu_offload(model, torch.device("cpu"))
        folder = tempfile.mkdtemp(dir=tmp_path)  # accelerate keeps what an old one holds
        return disk_offload(model, folder, torch.device("cpu"))

    sae = tiny.sae_for(lm)
    assert fingerprint(offloaded(tiny.llama())) == fingerprint(lm)
    accepts(sae, offloaded(tiny.llama()))
    with pytest.raises(BaseModelError, match="sampled weights differ"):
        sae.attach(offloaded(fine_tuned(tiny.llama())))


def fine_tuned(lm: PreTrainedModel) -> PreTrainedModel:
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    ids = torch.stack(tiny.prompts(16, 16))
    for _ in range(3):
        optimizer.zero_grad()
        lm(ids, labels=ids).loss.backward()
        optimizer.step()
    return lm.eval()


OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "fine-tune": (lambda: fine_tuned(tiny.llama()), r"of \d+ sampled weights differ.*fine-tune"),
    "other weights": (lambda: tiny.llama(seed=7), "sampled weights differ"),
    "other vocabulary": (lambda: tiny.llama(vocab_size=120), "vocab_size is 120 here and 99 there"),
    "other depth": (lambda: tiny.llama(num_hidden_layers=3), "num_hidden_layers is 3 here and 4"),
    "other type": (lambda: tiny.qwen3(), "model_type is qwen3 here and llama there"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_is_refused_unless_asked_for(lm, case):
    build, message = OTHERS[case]
    sae, other = tiny.sae_for(lm), build()
    before = tiny.traces(other)
    with pytest.raises(BaseModelError, match=message):
        sae.attach(other)
    assert tiny.traces(other) == before
    accepts(sae, other, allow_mismatch=True)


def test_one_layer_changed_is_another_model(lm):
    sae = tiny.sae_for(lm)
    with torch.no_grad():
        lm.model.layers[2].mlp.down_proj.weight.mul_(1.05)
        lm.model.layers[0].mlp.down_proj.weight.mul_(1.05)
        lm.model.layers[1].self_attn.q_proj.weight.mul_(1.05)
        lm.model.embed_tokens.weight.mul_(1.05)
    with pytest.raises(BaseModelError, match="sampled weights differ"):
        sae.attach(lm)


def test_without_weights_to_compare_the_name_decides(lm):
    expected = {**fingerprint(lm), "weights": {}}
    lm.config._name_or_path = "org/name"
    check_base_model(lm, "Org/Name", expected)
    check_base_model(lm, "org/name", None)
    check_base_model(lm, None, None)
    with pytest.raises(BaseModelError, match="trained on org/other, not on the model given"):
        check_base_model(lm, "org/other", expected)
    with pytest.raises(BaseModelError, match="there are no weights to compare"):
        check_base_model(lm, None, expected)


def test_the_name_does_not_excuse_other_weights(lm):
    expected = fingerprint(tiny.llama(seed=2))
    lm.config._name_or_path = "org/name"
    with pytest.raises(BaseModelError, match="sampled weights differ"):
        check_base_model(lm, "org/name", expected)
    check_base_model(lm, "org/name", {**expected, "quantized": True})


def test_a_folder_is_no_name(tmp_path, lm):
    lm.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert base_model_fields(loaded)["base_model"] is None
    loaded.config._name_or_path = "org/name"
    assert base_model_fields(loaded)["base_model"] == "org/name"


@pytest.mark.parametrize("layers", [4, 12, 24])
def test_every_kind_of_matrix_is_sampled_so_a_tuned_mlp_is_told_apart(layers):
    lm = tiny.llama(num_hidden_layers=layers)
    taken = fingerprint(lm)

    kinds = {re.sub(r"[0-9]+", "*", name) for name in taken["weights"]}
    assert {"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"} <= {
        name.split(".")[-2] for name in kinds
    }
    with torch.no_grad():
        for block in lm.model.layers:
            block.mlp.up_proj.weight.mul_(1.05)
    with pytest.raises(BaseModelError, match="up_proj"):
        check_base_model(lm, None, taken)
