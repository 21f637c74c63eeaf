"""A language model is known inside whatever holds it, and another one in its place is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from helpers import tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_switch_sae import BaseModelError, SwitchSAE, fingerprint
from hf_switch_sae.activations.cache_files import lm_notes
from hf_switch_sae.lm.config import longest_context, vocabulary_size
from hf_switch_sae.lm.fingerprint import base_model_fields, check_base_model
from hf_switch_sae.lm.hookpoints import language_model
from hf_switch_sae.lm.residuals import input_device
from hf_switch_sae.sessions.provenance import provenance_of


class Holder(nn.Module):
    """A user's own module around a language model."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"policy": lm})

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner["policy"](ids)


class ValueModel(nn.Module):
    """A model with a head of its own, as for reinforcement learning; the head comes first."""

    def __init__(self, lm: tf.PreTrainedModel) -> None:
        super().__init__()
        self.v_head = nn.Sequential(nn.Linear(lm.config.hidden_size, 8), nn.Linear(8, 1))
        self.pretrained_model = lm

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.pretrained_model(ids, output_hidden_states=True).hidden_states[-1]
        return self.v_head(hidden)


class Scored(tf.PreTrainedModel):
    """A model of transformers around another, with a config that tells nothing of it."""

    config_class = type("ScoredConfig", (tf.PreTrainedConfig,), {"model_type": "scored"})

    def __init__(self, lm: tf.PreTrainedModel) -> None:
        super().__init__(self.config_class())
        self.backbone = lm
        self.score = nn.Linear(lm.config.hidden_size, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.backbone(ids, output_hidden_states=True).hidden_states[-1])


LORA = LoraConfig(target_modules=["q_proj", "c_proj", "query_key_value", "in_proj"])
HOLDERS: dict[str, Callable[[tf.PreTrainedModel], nn.Module]] = {
    "a module": Holder,
    "two modules": lambda lm: Holder(Holder(lm)),
    "value head": ValueModel,
    "model of transformers": Scored,
    "compiled inside": lambda lm: Holder(torch.compile(lm, backend="eager")),
    "adapted inside": lambda lm: Holder(get_peft_model(lm, LORA)),
    "a copy beside": lambda lm: nn.ModuleList([lm, nn.Linear(2, 2)]),
    "without its head": lambda lm: lm.base_model,
}
old_name = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out:UserWarning"
)


@old_name
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "mamba"])
def test_a_model_is_known_in_a_module_that_holds_it_and_another_is_not(kind, holder):
    build, around = tiny.ALL[kind], HOLDERS[holder]
    sae = tiny.sae_for(build())

    sae.attach(around(build()), at=2).detach()

    for other in (build(seed=8), tiny.qwen3()):
        with pytest.raises(BaseModelError):
            sae.attach(around(other), at=2)


@pytest.mark.parametrize("holder", ["a module", "value head", "a copy beside", "without its head"])
def test_an_sae_made_in_a_holder_is_the_one_made_for_the_model(holder):
    lm = tiny.llama()
    lm.config._name_or_path = "org/name"
    held = HOLDERS[holder](lm)

    config = SwitchSAE.for_lm(held, at=2, num_features=16, num_experts=2, k=4).config

    assert config.hidden_size == 32
    assert config.base_model == "org/name"
    assert config.base_model_fingerprint == fingerprint(lm) == fingerprint(held)
    plain = provenance_of(lm, tiny.sae_for(lm), "layers.2.resid_post")
    assert provenance_of(held, tiny.sae_for(lm), "layers.2.resid_post").lm == plain.lm


def test_what_a_config_tells_is_told_of_the_model_inside():
    lm, held = tiny.llama(max_position_embeddings=40), Holder(tiny.llama())
    assert longest_context(Holder(lm)) == longest_context(lm) == 40
    assert vocabulary_size(held) == 99
    held.first = nn.Linear(2, 2, device="meta")  # not where token ids go
    assert input_device(held).type == "cpu"
    assert lm_notes(held, None) == lm_notes(tiny.llama(), None)


def test_a_fingerprint_that_was_taken_of_a_holder_still_serves():
    lm = tiny.llama()
    taken = fingerprint(lm)
    weights = {f"inner.policy.model.{name}": each for name, each in taken["weights"].items()}
    old = {**dict.fromkeys(taken), "quantized": False, "weights": weights}

    check_base_model(lm, None, old)
    check_base_model(Holder(lm), None, old)
    with pytest.raises(BaseModelError, match=r"differ, the first in inner\.policy\.model"):
        check_base_model(Holder(tiny.llama(seed=8)), None, old)


def test_of_two_models_side_by_side_the_one_that_is_read_is_checked():
    first, second = tiny.llama(seed=3), tiny.llama(seed=4)
    both = nn.ModuleDict({"policy": first, "reference": second})
    assert language_model(both, second.model.layers[2]) is second
    expected = fingerprint(second)
    check_base_model(both, None, expected, second.model.layers[2])
    with pytest.raises(BaseModelError, match="sampled weights differ"):
        check_base_model(both, None, expected, first.model.layers[2])


SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava() -> tuple[nn.Module, nn.Module]:
    text = tf.LlamaConfig(**SIZES)
    vision = tf.CLIPVisionConfig(**CLIP)
    both = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
    return tf.LlavaForConditionalGeneration(both), tf.LlamaForCausalLM(text)


def gemma3() -> tuple[nn.Module, nn.Module]:
    text = tf.Gemma3TextConfig(**SIZES, head_dim=8)
    vision = tf.SiglipVisionConfig(**CLIP)
    both = tf.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4)
    return tf.Gemma3ForConditionalGeneration(both), tf.Gemma3ForCausalLM(text)


def qwen2_vl() -> tuple[nn.Module, nn.Module]:
    vision = {"embed_dim": 16, "depth": 3, "num_heads": 2, "hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**SIZES, "rope_parameters": rope}
    both = tf.Qwen2VLConfig(vision_config=vision, text_config=text)
    lm = tf.Qwen2VLForConditionalGeneration(both)
    return lm, tf.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel(both.text_config)


def blip2() -> tuple[nn.Module, nn.Module]:
    text = tf.OPTConfig(
        vocab_size=99,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        init_std=0.3,
    )
    sizes = {**CLIP, "encoder_hidden_size": 16}
    both = tf.Blip2Config(
        vision_config=CLIP, qformer_config=sizes, text_config=text.to_dict(), num_query_tokens=2
    )
    return tf.Blip2ForConditionalGeneration(both), tf.OPTForCausalLM(text)


MULTIMODAL = {"llava": llava, "gemma3": gemma3, "qwen2_vl": qwen2_vl, "blip2": blip2}


def made(kind: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """A multimodal model and, with equal weights, its text model alone."""
    torch.manual_seed(seed)
    both, text = MULTIMODAL[kind]()
    inner = both.language_model.model if kind == "blip2" else both.model.language_model
    text.base_model.load_state_dict(inner.state_dict())
    return both.eval(), text.eval()


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_model_is_known_by_its_text_model_and_the_other_way_round(kind):
    both, text = made(kind, seed=0)
    others = made(kind, seed=1)
    for made_for, used_on in ((text, both), (both, text), (both, both)):
        sae = SwitchSAE.for_lm(made_for, at=1, num_features=16, num_experts=2, k=4).eval()
        assert sae.config.hidden_size == 32
        sae.attach(used_on, at=1).detach()
        sae.attach(Holder(used_on), at=1).detach()
        for other in others:
            with pytest.raises(BaseModelError, match="sampled weights differ"):
                sae.attach(other, at=1)
            with pytest.raises(BaseModelError, match="sampled weights differ"):
                sae.attach(Holder(other), at=1)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_a_vision_tower_that_two_models_share_makes_them_not_one(kind):
    (one, _), (other, text) = made(kind, seed=0), made(kind, seed=1)
    other.model.vision_tower.load_state_dict(one.model.vision_tower.state_dict())
    fields = base_model_fields(one)

    with pytest.raises(BaseModelError, match=r"differ.*language_model|differ.*embed_tokens"):
        check_base_model(other, None, fields["base_model_fingerprint"])
    with pytest.raises(BaseModelError, match="sampled weights differ"):
        check_base_model(text, None, fields["base_model_fingerprint"])


def test_only_other_parts_in_common_is_nothing_to_compare():
    one, _ = made("llava", seed=0)
    taken = fingerprint(one)
    weights = {
        # the text model as it is called in another kind of model
        name.replace("language_model.layers", "writer.stack"): each
        for name, each in taken["weights"].items()
        if "embed_tokens" not in name
    }
    with pytest.raises(BaseModelError, match="no weights to compare"):
        check_base_model(one, None, {**taken, "weights": weights})


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_half_of_a_pair_is_the_pair(part):
    pair, other = tiny.t5(), tiny.t5()
    for weight in other.parameters():
        nn.init.normal_(weight, std=0.3)
    expected = fingerprint(pair)
    check_base_model(getattr(pair, part), None, expected)
    check_base_model(Holder(pair), None, expected)
    with pytest.raises(BaseModelError, match="sampled weights differ"):
        check_base_model(getattr(other, part), None, expected)
