"""Models and places that generate runs and the zoo, which has one of each type, leaves out.

Room   MORE, entries as in the zoo, and the class of each.
       `<type>:<class>`   encoder and decoder of a type whose decoder alone is in the zoo; or a
                          model without a forward, which the laws of the zoo could not call
       `<type>, <how>`    the model of the zoo with other inputs or options of generate
       `<type>, <where>`  the model of the zoo, hooked elsewhere
       `<entry>/encoder`  the encoder's stack of an entry that is hooked in its decoder
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from helpers import zoo

Built = tuple[PreTrainedModel, dict[str, Any]]

# Inputs where those of the zoo are for the other class of the type.
INPUTS: dict[str, dict[str, Callable[[], Any]]] = {
    "seamless_m4t": {"input_features": lambda: torch.randn(2, 16, 160)},
    "seamless_m4t_v2": {"input_features": lambda: torch.randn(2, 16, 160)},
}
OMNI = {
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
}
NO_FORWARD = {f"{kind}:{name}" for kind, name in OMNI.items()}
_AS_TEXT = {"generation_mode": "text", "max_new_tokens": None, "thinker_max_new_tokens": 3}
# Each batch is two: the rows, and the rows without what they are conditioned on.
GUIDED = {"musicgen, guided", "dia, guided"}
# Options of generate, as in the zoo.
GENERATE: dict[str, dict[str, Any]] = {
    **zoo.GENERATE,
    **dict.fromkeys(NO_FORWARD, _AS_TEXT),
    "musicgen, guided": {**zoo.GENERATE["musicgen"], "guidance_scale": 3.0},
    "dia, guided": {"guidance_scale": 3.0},
}


def _image(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """An image of one token, in pixels or in a grid of four patches."""
    text, vision = zoo.ids(), config.vision_config
    start = getattr(config, "vision_start_token_id", None)
    text[:, 3], text[:, 4] = start or 60, config.image_token_id
    inputs = {"input_ids": text, "pixel_values": zoo.pixels(config)}
    if hasattr(vision, "temporal_patch_size"):
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        inputs["pixel_values"] = torch.randn(2 * 4, size)
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]] * 2)
    name = "token_type_ids" if "gemma" in config.model_type else "mm_token_type_ids"
    if config.model_type != "llava":
        inputs[name] = (text == config.image_token_id).long()
    return inputs


# Inputs of the models of the zoo besides their own.
ALSO: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "musicgen, guided": lambda _: {},
    "dia, guided": lambda _: {},
    "git, with an image": lambda _: {"pixel_values": torch.randn(2, 3, 224, 224)},
    "visual_bert, with an image": lambda _: {"visual_embeds": torch.randn(2, 4, 512)},
    **{
        f"{kind}, with an image": _image
        for kind in ("gemma3", "glm4v", "llava", "paligemma", "qwen2_vl", "qwen3_5", "qwen3_vl")
    },
}


# Places that are no block, and lie in no stack of blocks.
OUTSIDE = {
    "llama, last norm": "model.norm",
    "qwen2_vl, last norm": "model.language_model.norm",
    "t5, last norm": "decoder.final_layer_norm",
    "t5, whole/encoder": "encoder",
}


def _pairs() -> Iterator[tuple[str, str]]:
    """Types whose decoder alone is in the zoo, and the class of encoder and decoder together."""
    for mapping in (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ):
        for kind, name in mapping.items():
            here = zoo.model_class(kind)
            name = name if isinstance(name, str) else name[0]
            if kind not in zoo.CANNOT and here is not None and here.__name__ != name:
                yield kind, name


def _build_pair(kind: str, name: str) -> Built:
    torch.manual_seed(0)
    config = zoo.shrink(CONFIG_MAPPING[kind](), zoo.OVERRIDES.get(kind, {}))
    config.is_encoder_decoder = True
    model = getattr(transformers, name)(config).eval().float()
    torch.manual_seed(1)
    inputs = zoo.inputs_for(model)
    return model, {**inputs, **{key: made() for key, made in INPUTS.get(kind, {}).items()}}


def _build_omni(kind: str, name: str) -> Built:
    """Its thinker alone: the talker and the vocoder are as large as ever, and not for text."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](enable_audio_output=False)
    thinker = f"{kind}_thinker"
    config.thinker_config = zoo.shrink(CONFIG_MAPPING[thinker](), zoo.OVERRIDES[thinker])
    model = getattr(transformers, name)(config).eval().float()
    model.speaker_map = {"Chelsie": {}}
    if not hasattr(model, "talker"):  # generating text reads one number of it
        object.__setattr__(model, "talker", SimpleNamespace(codec_pad_token=0))
    return model, {"input_ids": zoo.ids()}


def _build_also(name: str) -> Built:
    model, inputs = zoo.build(name.split(",")[0])
    return model, {**inputs, **ALSO[name](model.config)}


def _entry(kind: str, build: Callable[[], Built], at: str | None = None) -> zoo.Entry:
    return zoo.Entry(kind, "other", build, generates=True, core=False, at=at)


def class_of(kind: str) -> type[PreTrainedModel]:
    """The class of an entry of the zoo or of MORE."""
    kind, _, name = kind.removesuffix("/encoder").partition(":")
    found = getattr(transformers, name) if name else zoo.model_class(kind.split(",")[0])
    assert found is not None
    return found


# Entries whose encoder is no stack of its own, with text or sound.
ONLY_DECODERS = {"blip-2", "instructblip", "instructblipvideo", "pop2piano", "pp_formulanet"}
# Encoders with more than one stack.
ENCODERS = {"t5gemma2/encoder": "model.encoder.text_model"}


def _with_encoders(entries: list[zoo.Entry]) -> Iterator[zoo.Entry]:
    for entry in entries:
        cls = class_of(entry.model_type)
        is_pair = "decoder_attention_mask" in inspect.signature(cls.forward).parameters
        if is_pair and cls.can_generate() and entry.model_type not in ONLY_DECODERS:
            yield _entry(f"{entry.model_type}/encoder", entry.build)


_MODELS = [
    *(_entry(f"{k}:{name}", functools.partial(_build_pair, k, name)) for k, name in _pairs()),
    *(_entry(f"{k}:{name}", functools.partial(_build_omni, k, name)) for k, name in OMNI.items()),
    *(_entry(name, functools.partial(_build_also, name)) for name in ALSO),
]
MORE: list[zoo.Entry] = [
    *_MODELS,
    *_with_encoders([*zoo.ENTRIES, *_MODELS]),
    *(
        _entry(name, functools.partial(zoo.build, name.split(",")[0]), at)
        for name, at in OUTSIDE.items()
    ),
]
