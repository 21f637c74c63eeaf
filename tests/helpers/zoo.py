"""A tiny random model and inputs for nearly every model type of transformers.

Room   model type -> Entry; Entry.build() -> (model in eval mode, its inputs). No download.
How    The default config is shrunk by the names of its fields (SMALL), recursively, and overridden
       where a family has relations that names do not tell (OVERRIDES). Inputs follow from the names
       of the model's forward arguments (INPUTS).
Beware a type that cannot be built so is in CANNOT with its reason, never silently missing.
"""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

VOCAB, DIM, HEADS, LAYERS, SEQ = 99, 32, 4, 3, 9
IMAGE, IMAGE_TOKENS = 61, 3


def _names(text: str) -> list[str]:
    return text.split()


# First pattern that matches a field's whole name gives its value; a field that is None or a flag is
# left alone. `...` keeps the default.
SMALL: list[tuple[str, Any]] = [
    (r"chunk_size_feed_forward", ...),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id", 2),
    (r".*_vocab_size|vocab_size|vocab_size_.*", VOCAB),
    (r"num_feat_extract_layers|max_window_layers|num_conv_.*|first_k_dense_replace", ...),
    (r"num_key_value_heads|.*_kv_heads|num_kv_heads|multi_query_group_num", 2),
    (r"(linear_)?(num_)?(key|value)_heads|linear_num_(key|value)_heads", 4),
    (r"mamba_(n|num)_heads|mamba_heads", 8),
    (r"(.*_)?(num|n)_(.*_)?heads?|.*attention_heads|.*_heads", HEADS),
    (r"head_dim|.*_head_dim|d_kv|kv_channels|d_head|attention_head_dim|mamba_d_head|.*dim_head", 8),
    (r"rotary_dim", 4),
    (r"partial_rotary_factor", ...),
    (r"(.*_)?num_(.*_)?layers|n_layers?|depth|.*_layers|.*_depth|num_blocks", LAYERS),
    (r"moe_intermediate_size|.*expert.*intermediate.*|moe_.*_size", 16),
    (r".*intermediate.*|.*ffn.*|d_ff|n_inner|mlp_dim|.*feed_?forward.*", DIM),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|n_experts|.*_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|.*_top_?k_experts|top_k_experts", 2),
    (r"n_group|topk_group|n_groups|mamba_n_groups|n_shared_experts", 1),
    (r"(q|kv|o)_lora_rank", 16),
    (r"state_size|mamba_d_state|ssm_state_size|time_step_rank|mamba_dt_rank", 8),
    (r".*chunk_size", 16),
    (
        r"hidden_size|d_model|n_embd|(.*_)?embed_dim|(.*_)?hidden_(size|dim)|.*(proj|projection)_dim",
        DIM,
    ),
    (r"emb_dim|model_dim|dim|embedding_(size|dim)|out_hidden_size|projection_size|width", DIM),
    (r"pooler_output_size|lora_size|latent_dim|latent_size|codebook_dim", DIM),
    (r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|context_length", 64),
    (r"max_source_positions", 16),
    (r"max_target_positions", 64),
    (r"sliding_window|attention_window|sliding_window_size|attention_chunk_size", 8),
    (r"num_mel_bins", 16),
    (r"codebook_size", 64),
]
# Fields of a special token other than the three above get ids of their own at the vocabulary's end.
_SPECIAL = re.compile(r".*_token_(id|index)|(image|video|audio)_token_.*|mask_index|.*_index")


def shrink(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    """A config of the same class with small sizes; `changes` go on top, nested for sub-configs."""
    fields: dict[str, Any] = {}
    depth = next((d for n in ("num_hidden_layers", "n_layer") if (d := _get(config, n))), None)
    staged = isinstance(_get(config, "depths"), list | tuple)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            nested = changes.get(name, {})
            fields[name] = shrink(value, nested) if isinstance(nested, dict) else nested
        elif isinstance(value, bool) or value is None or name.startswith("_"):
            continue
        elif isinstance(value, int):
            if staged and re.search(r"layers|stages|blocks|heads|dim|size", name):
                continue
            if (small := _small(name, value)) is not ...:
                fields[name] = min(small, value) if small < 3 else small
        elif name == "depths":
            fields[name] = type(value)([1] * len(value))
        elif isinstance(value, list | tuple) and len(value) == depth and not staged:
            fields[name] = type(value)(_variety(list(value)))
        elif name in ("rope_parameters", "rope_scaling") and "mrope_section" in value:
            fields[name] = {**value, "mrope_section": [2, 1, 1]}
    if _get(config, "num_key_value_heads") == _get(config, "num_attention_heads") is not None:
        fields["num_key_value_heads"] = HEADS
    plain = {k: v for k, v in changes.items() if not (isinstance(v, dict) and k in fields)}
    return type(config)(**{**fields, **plain})


def _get(thing: Any, name: str) -> Any:
    try:
        return getattr(thing, name)
    except Exception:
        return None


def _variety(values: list[Any]) -> list[Any]:
    """LAYERS of the values, with as many different ones as there are."""
    kinds = [v for i, v in enumerate(values) if v not in values[:i]][:LAYERS]
    return (kinds + values[:1] * LAYERS)[:LAYERS]


def _small(name: str, value: int) -> Any:
    for pattern, small in SMALL:
        if re.fullmatch(pattern, name):
            return small
    if _SPECIAL.fullmatch(name) and value > 2:
        return VOCAB - 1 - sum(map(ord, name)) % 30
    return ...


def model_class(model_type: str) -> type[PreTrainedModel] | None:
    """The class with a language model's head if there is one, else the base model, else any."""
    composite = "text_config" in (CONFIG_MAPPING[model_type].sub_configs or {})
    last = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    order = [
        {model_type: CLASSES.get(model_type)},
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        {} if composite else last,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
        *(getattr(auto, name) for name in _AUTO_MAPPINGS),
    ]
    for mapping in order:
        if (name := mapping.get(model_type)) is not None:
            name = name if isinstance(name, str) else name[0]
            if inspect.isclass(cls := getattr(transformers, name, None)):
                return cls
    return None


_AUTO_MAPPINGS = sorted(
    name for name in vars(auto) if re.fullmatch(r"MODEL_(.*_)?MAPPING_NAMES", name)
)
# Every type that some auto class builds; the rest occur only within other configs.
OWN_MODEL = sorted(
    {t for name in _AUTO_MAPPINGS for t in getattr(auto, name)} & set(CONFIG_MAPPING)
)

CLASSES = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "moonshine_streaming": "MoonshineStreamingForConditionalGeneration",
    "reformer": "ReformerModelWithLMHead",
}


def ids(rows: int = 2, columns: int = SEQ) -> torch.Tensor:
    return torch.randint(3, 60, (rows, columns))


def pixels(config: PreTrainedConfig, *, video: bool = False) -> torch.Tensor:
    vision = _get(config, "vision_config") or _get(config, "backbone_config") or config
    size = _get(vision, "image_size") or _get(config, "image_size") or 64
    size = size if isinstance(size, list | tuple) else [size, size]
    channels = _get(vision, "num_channels") or _get(vision, "in_channels") or 3
    channels = channels if isinstance(channels, int) else 3
    frames = [_get(vision, "num_frames") or 4] if video else []
    return torch.randn(2, *frames, channels, *size)


def inputs_for(model: PreTrainedModel) -> dict[str, Any]:
    config, main = model.config, model.main_input_name
    signature = inspect.signature(model.forward).parameters
    needed = {
        n
        for n, p in signature.items()
        if p.default is inspect._empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    mels = (
        _get(config, "num_mel_bins") or _get(_get(config, "encoder_config"), "num_mel_bins") or 16
    )
    if main in ("input_ids", "decoder_input_ids"):
        inputs: dict[str, Any] = {"input_ids": ids()}
    elif main == "pixel_values":
        inputs = {main: pixels(config)}
    elif main in ("pixel_values_videos",):
        inputs = {main: pixels(config, video=True)}
    elif main == "input_values":
        inputs = {main: torch.randn(2, 1600)}
    elif main == "input_features":
        inputs = {main: torch.randn(2, mels, 2 * (_get(config, "max_source_positions") or 16))}
    else:
        inputs = {}
    if "input_ids" in signature and _get(config, "text_config") is not None:
        inputs.setdefault("input_ids", ids())
    if "pixel_values" in signature and (
        "pixel_values" in needed or not (model.can_generate() or config.model_type in TEXT_ALONE)
    ):
        inputs.setdefault("pixel_values", pixels(config))
    if "bbox" in signature:
        inputs["bbox"] = torch.tensor([0, 0, 2, 2]).expand(2, SEQ, 4)  # left, top, right, bottom
    if "grid_thw" in needed:
        inputs.pop("pixel_values", None)
        patch = _get(config, "patch_size") ** 2 * (
            _get(config, "in_channels")
            or _get(config, "in_chans")
            or _get(config, "num_channels")
            or 3
        )
        patch *= _get(config, "temporal_patch_size") or 1
        name = next(n for n in signature if n in ("hidden_states", "pixel_values"))
        inputs[name] = torch.randn(16, patch)
        inputs["grid_thw"] = torch.tensor([[1, 4, 4]])
    if config.is_encoder_decoder and "decoder_input_ids" in signature:
        inputs["decoder_input_ids"] = ids(columns=5)
    return {**inputs, **{k: v() for k, v in INPUTS.get(config.model_type, {}).items()}}


# Multimodal base models that need pictures only where the text has their tokens.
TEXT_ALONE = {"modernvbert", "ultravbert", "embedding_gemma2", "flava", "colmodernvbert"}


def _randn(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape)


_PAST = {
    "past_values": _randn(2, 10),
    "past_time_features": _randn(2, 10, 1),
    "past_observed_mask": lambda: torch.ones(2, 10),
    "future_values": _randn(2, 4),
    "future_time_features": _randn(2, 4, 1),
}
_VIDEO = {"pixel_values": _randn(1, 8, 3, 224, 224)}
INPUTS: dict[str, dict[str, Callable[[], Any]]] = {
    "audio-spectrogram-transformer": {"input_values": _randn(2, 1024, 16)},
    "timesformer": _VIDEO,
    "videomae": {"pixel_values": _randn(1, 16, 3, 224, 224)},
    "vivit": {"pixel_values": _randn(1, 32, 3, 224, 224)},
    "xclip": _VIDEO,
    "mimi": {"input_values": _randn(2, 1, 1600)},
    "dac": {"input_values": _randn(2, 1, 1600)},
    "timesfm": {
        "past_values": _randn(2, 64),
        "past_values_padding": lambda: torch.zeros(2, 64),
        "freq": lambda: torch.zeros(2, 1, dtype=torch.long),
    },
    "timesfm2_5": {"past_values": _randn(2, 64)},
    "autoformer": _PAST,
    "informer": _PAST,
    "time_series_transformer": _PAST,
    "patchtst": {"past_values": _randn(2, 32, 1)},
    "patchtsmixer": {"past_values": _randn(2, 32, 1)},
    "perceiver": {"inputs": _randn(2, SEQ, DIM)},
    "pix2struct": {
        # the first two numbers of a patch are its row and column
        "flattened_patches": lambda: torch.cat([torch.ones(2, 16, 2), torch.randn(2, 16, 768)], -1),
        "attention_mask": lambda: torch.ones(2, 16),
    },
    "wav2vec2-bert": {"input_features": _randn(2, 16, 160)},
    "decision_transformer": {
        "states": _randn(2, 5, 17),
        "actions": _randn(2, 5, 4),
        "rewards": _randn(2, 5, 1),
        "returns_to_go": _randn(2, 5, 1),
        "timesteps": lambda: torch.arange(5).expand(2, 5),
        "attention_mask": lambda: torch.ones(2, 5),
    },
    "idefics": {
        "pixel_values": _randn(2, 1, 3, 224, 224),
        "image_attention_mask": lambda: torch.ones(2, SEQ, 1, dtype=torch.long),
        "attention_mask": lambda: torch.ones(2, SEQ, dtype=torch.long),
    },
    "musicgen": {"decoder_input_ids": lambda: ids(8, 5)},
    "musicgen_melody": {"decoder_input_ids": lambda: ids(8, 5)},
    "udop": {"bbox": lambda: torch.rand(2, SEQ, 4)},
    "qwen3_asr_encoder": {"input_features_mask": lambda: torch.ones(2, 32, dtype=torch.long)},
    "audioflamingo3_encoder": {"input_features_mask": lambda: torch.ones(2, 32, dtype=torch.long)},
    "textnet": {"pixel_values": _randn(2, 3, 64, 64)},
    "mobilevitv2": {"pixel_values": _randn(2, 3, 64, 64)},
    "swin2sr": {"pixel_values": _randn(2, 3, 16, 16)},
    "speech_to_text": {"input_features": _randn(2, 16, 80)},
    "dia": {"decoder_input_ids": lambda: torch.randint(3, 60, (2, 5, 9))},
    "speech-encoder-decoder": {"input_values": _randn(2, 1600)},
    "blip_2_qformer": {
        "query_embeds": _randn(2, 5, DIM),
        "encoder_hidden_states": _randn(2, 5, DIM),
    },
    "siglip2_vision_model": {
        "pixel_values": _randn(2, 16, 768),
        "pixel_attention_mask": lambda: torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": lambda: torch.tensor([[4, 4], [4, 4]]),
    },
    "siglip2": {
        "pixel_values": _randn(2, 16, 768),
        "pixel_attention_mask": lambda: torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": lambda: torch.tensor([[4, 4], [4, 4]]),
    },
    "fun_asr_nano_encoder": {"input_features_mask": lambda: torch.ones(2, 32, dtype=torch.long)},
    "vision-encoder-decoder": {"pixel_values": _randn(2, 3, 224, 224)},
    "pe_audio_encoder": {"input_values": _randn(2, 1, 1600)},
    "univnet": {"input_features": _randn(2, 10, 100)},
    "tvp": {"pixel_values": _randn(1, 2, 3, 448, 448)},
    "xcodec": {"input_values": _randn(2, 1, 1600)},
    "encodec": {"input_values": _randn(2, 1, 1600)},
    "clvp": {"input_features": _randn(2, 80, 30)},
}
for _type in _names(
    """
    parakeet_ctc parakeet_encoder parakeet_rnnt parakeet_tdt canary cohere_asr
    nemotron_asr_streaming nemotron_asr_streaming_encoder nemotron3_5_asr
    nemotron3_diarization_audio nemotron3_diarization nemotron3_5_transcribe_asr_audio
    lasr_ctc lasr_encoder gemma4_audio
    """
):
    INPUTS[_type] = {"input_features": _randn(2, 64, 16)}


def with_image(token: int = IMAGE) -> torch.Tensor:
    """Text with IMAGE_TOKENS places for an image, where no padding of up to three tokens falls."""
    text = ids()
    text[:, 3 : 3 + IMAGE_TOKENS] = token
    return text


_BLIP = {"pixel_values": _randn(2, 3, 16, 16), "input_ids": with_image}
_QFORMER = {"qformer_input_ids": lambda: ids(columns=4)}
INPUTS |= {
    "blip-2": _BLIP,
    "instructblip": _BLIP | _QFORMER,
    "instructblipvideo": _BLIP
    | {"pixel_values": _randn(2, 1, 3, 16, 16), "qformer_input_ids": lambda: ids(columns=4)},
    "kosmos-2": {
        "input_ids": with_image,
        "pixel_values": _randn(2, 3, 16, 16),
        "image_embeds_position_mask": lambda: (with_image() == IMAGE).long(),
    },
}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
_SAM = {"image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [2]}
_HD = {"head_dim": 8}
_XDROPE = {
    "rope_parameters": {
        "rope_type": "xdrope",
        "rope_theta": 1e4,
        "alpha": 1.0,
        "factor": 1.0,
        "xdrope_section": [1, 1, 1, 1],
    }
}
_PERIOD = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
_SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
}
_NO_SHARED = {"num_kv_shared_layers": 0}
_EYE = {"vision_config": {"image_size": 16, "patch_size": 8}}
_PLACES = {"image_token_index": IMAGE, "num_query_tokens": IMAGE_TOKENS, **_EYE}
_ONE_PATCH = {"vision_config": {"image_size": 16, "patch_size": 16}}
_CODES = 64  # of the tiny audio codec
_CODED = {
    "decoder": {"vocab_size": _CODES, "pad_token_id": _CODES, "bos_token_id": _CODES},
    "audio_encoder": {"codebook_size": _CODES},
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "blip-2": _PLACES,
    "instructblip": _PLACES,
    "instructblipvideo": {**_PLACES, "video_token_index": IMAGE},
    "kosmos-2": {"latent_query_num": IMAGE_TOKENS, **_EYE},
    "llava": _ONE_PATCH,
    "gemma3": {**_ONE_PATCH, "mm_tokens_per_image": 1},
    "paligemma": _ONE_PATCH,
    "musicgen": _CODED,
    "musicgen_melody": _CODED,
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "patchtst": {"context_length": 32, "patch_length": 4, "patch_stride": 4},
    "patchtsmixer": {"context_length": 32},
    "jamba": _PERIOD,
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": [
            "linear_attention",
            "linear_attention",
            "hybrid",
            "linear_attention",
            "hybrid",
        ],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": [
            "linear_attention",
            "linear_attention",
            "hybrid",
            "linear_attention",
            "hybrid",
        ],
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "bailing_hybrid": {
        "head_dim": 8,
        "qk_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "num_experts": 4,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "nemotron": {"num_key_value_heads": 2},
    "hunyuan_v1_dense": _HD,
    "hunyuan_v1_moe": _HD,
    "hunyuan_vl_text": _HD | _XDROPE,
    "hunyuan_vl": {"text_config": _HD | _XDROPE},
    "ministral": _HD,
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "local"],
        "num_buckets": 4,
        "feed_forward_size": 32,
    },
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 3},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "mobilebert": {
        "embedding_size": 32,
        "hidden_size": 32,
        "intra_bottleneck_size": 32,
        "true_hidden_size": 32,
    },
    "lilt": {"hidden_size": 48, "max_2d_position_embeddings": 1024},
    "bros": {"dim_bbox": 8, "hidden_size": 32},
    "xlstm": {
        "num_heads": 4,
        "qk_dim_factor": 0.5,
        "v_dim_factor": 1.0,
        "mode": "inference",
        "chunk_size": 16,
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
    },
    "mistral4": {
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "longcat_flash": {
        "qk_head_dim": 16,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
        }
    },
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "qwen4_exp_text": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "mimi": {"upsample_groups": DIM},
    "mimi_decoder": {"upsample_groups": DIM},
    "csm": {"codec_config": {"upsample_groups": DIM}},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": DIM}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16}},
    "granite_speech5_encoder": {"context_size": 16},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1]}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, **_NO_SHARED}},
    "depth_anything": {"neck_hidden_sizes": [8, 8, 8, 8]},
    "neomme": {"head_dim": 16, "hidden_size": 64},
    "pixtral": {"image_size": 64, "patch_size": 16},
    "moonshine_streaming": {
        "num_key_value_heads": HEADS,
        "encoder_config": {"num_key_value_heads": HEADS},
    },
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 768}},
    "pp_formulanet": {"vision_config": {"image_size": 64, "window_size": 2}},
    "sam_vision_model": _SAM,
    "sam_hq_vision_model": _SAM,
    "sapiens2": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4, "num_attention_heads": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "muse_spark": {"audio_config": {"out_hidden_size": DIM}},
    "ernie4_5_vl_moe": {"text_config": {"moe_num_experts": 4}},
}
for _type in _names(
    """
    qwen2_5_vl_text qwen2_vl_text glm4v_text glm_image_text glm_ocr_text
    """
):
    OVERRIDES[_type] = _MROPE
for _type in [
    "qwen2_5_vl",
    "qwen2_vl",
    "glm46v",
    "glm4v",
    "glm_ocr",
    "glmga",
    "paddleocr_vl",
    "qwen2_5_omni_thinker",
]:
    OVERRIDES[_type] = {"text_config": _MROPE}
# Generating reads this field, which the config of a thinker alone lacks.
OVERRIDES["qwen2_5_omni_thinker"]["vision_start_token_id"] = IMAGE + 1
OVERRIDES["qwen3_omni_moe_thinker"] = {"vision_start_token_id": IMAGE + 1}
OVERRIDES["glm4v_moe_text"] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "mrope_section": [2, 1, 1],
    }
}
OVERRIDES["glm4v_moe"] = {"text_config": OVERRIDES["glm4v_moe_text"]}
for _type in _names(
    """
    glm5_next cohere_compass qwen4_exp dots3_note
    """
):
    OVERRIDES[_type] = {"text_config": OVERRIDES[f"{_type}_text"]}
for _type in _names(
    """
    gemma3n_text gemma4_text gemma4_unified_text
    """
):
    OVERRIDES[_type] = _NO_SHARED
for _type in _names(
    """
    gemma4 gemma4_unified gemma4_unified_assistant
    """
):
    OVERRIDES[_type] = {"text_config": _NO_SHARED}


# Options of generate that a type needs, over those for all; None leaves one out.
GENERATE: dict[str, dict[str, Any]] = {
    "blip": {"pad_token_id": None},  # passes it on itself
    "higgs_audio_v2": {"min_new_tokens": None},
    "musicgen": {"pad_token_id": _CODES},
    "musicgen_melody": {"pad_token_id": _CODES},
    "pop2piano": {"input_ids": None, "input_features": torch.randn(2, SEQ, DIM)},
}


def build(model_type: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[model_type](), OVERRIDES.get(model_type, {}))
    model = model_class(model_type)(config).eval().float()
    if model_type == "pop2piano":  # it comes with the checkpoint
        composers = {f"composer{i}": i for i in range(config.composer_vocab_size)}
        model.generation_config.composer_to_feature_token = composers
    torch.manual_seed(1)
    return model, inputs_for(model)


# ---- entries
# Where a type has no stack of blocks that is clearly the first, or none that can be hooked.
AT: dict[str, str] = {
    "glpn": "encoder.block",
    "poolformer": "encoder.block",
    "pvt": "encoder.block",
    "hrm_text": "model.L_module.layers",
    "videoprism_vision_model": "spatial_layers",
    "flaubert": "layer_norm2.1",
    "xlm": "transformer.layer_norm2.1",
    "squeezebert": "encoder.layers.1.output",
}

# Types of OWN_MODEL without an entry. Most of these reasons are limits of this zoo, not of hooking.
CANNOT: dict[str, str] = {
    "vits": "too slow: 90,000 samples through a vocoder of full size take seconds a forward",
    "blt": "too slow: 96M numbers of hash embeddings, and forward misses num_hidden_layers",
    "fastspeech2_conformer_with_hifigan": "its vocoder's 80 mel bins do not shrink with it",
    "lightglue": "inputs not written: pairs of images with a keypoint detector",
    "lxmert": "inputs not written: regions of images and their boxes",
    "nemotron3_5_transcribe_audio": "inputs not written: two audio towers with different features",
    "oneformer": "inputs not written: images with tokenized tasks",
    "vibevoice_acoustic_tokenizer": "too slow: a codec of full size takes seconds to build",
    "vibevoice_acoustic_tokenizer_decoder": "too slow: a codec of full size takes seconds to build",
    "vibevoice_acoustic_tokenizer_encoder": "too slow: a codec of full size takes seconds to build",
    "emu3": "too slow: an image tokenizer of 243M parameters takes seconds to build",
    "align": "tiny inputs rejected: mat1 and mat2 shapes cannot be multiplied (2x32 and 640x2)",
    "autoformer": "tiny inputs rejected: Sizes of tensors must match except in dimension 2.",
    "bark": "three models with no forward of their own; only generate runs them",
    "bridgetower": "shrunk config rejected: embed_dim and num_heads must be greater than 0, got",
    "bros": "tiny inputs rejected: shape '[1, 1, 1, 0]' is invalid for input of size 1",
    "chmv2": "tiny inputs rejected: 'NoneType' object is not iterable",
    "clap": "tiny inputs rejected: 'NoneType' object has no attribute 'transpose'",
    "clvp": "tiny inputs rejected: The size of tensor a (8) must match the size of tensor b (32)",
    "colpali": "tiny inputs rejected: The size of tensor a (16) must match the size of tensor b",
    "colqwen2": "tiny inputs rejected: 'NoneType' object has no attribute 'device'",
    "conditional_detr": "needs timm, which the tests do not",
    "d_fine": "shrunk config rejected: list index out of range",
    "dab-detr": "needs timm, which the tests do not",
    "deepseek_ocr2": "shrunk config rejected: 'NoneType' object is not subscriptable",
    "deformable_detr": "needs timm, which the tests do not",
    "deimv2": "tiny inputs rejected: list index out of range",
    "depth_anything": "tiny inputs rejected: The number of hidden states should be equal to the",
    "depth_pro": "shrunk config rejected: `config.image_model_config.image_size=224` should match",
    "detr": "needs timm, which the tests do not",
    "diffusion_gemma": "shrunk config rejected: empty(): argument 'size' (position 1) must be",
    "dinat": "needs natten, which the tests do not",
    "dots3_note": "shrunk config rejected: adapter_in_dim must match hidden_size",
    "edgetam": "needs PIL, which the tests do not",
    "edgetam_video": "runs on a video session, not on tensors",
    "edgetam_vision_model": "needs PIL, which the tests do not",
    "efficientloftr": "shrunk config rejected: hidden_size should be equal to the last value in",
    "efficientnet": "tiny inputs rejected: running_mean should contain 2560 elements not 32",
    "encodec": "convolutional codec without a list of blocks",
    "eomt": "needs scipy, which the tests do not",
    "eomt_dinov3": "needs scipy, which the tests do not",
    "ernie4_5_vl_moe": "shrunk config rejected: The expanded size of the tensor (4) must match",
    "fast_vlm": "needs PIL, which the tests do not",
    "fun_asr_nano_encoder": "tiny inputs rejected: The size of tensor a (32) must match the size",
    "gemma3n": "needs PIL, which the tests do not",
    "gemma3n_audio": "inputs not written: needs 'audio_mel' and 'audio_mel_mask'",
    "gemma3n_vision": "needs PIL, which the tests do not",
    "gemma4_assistant": "shrunk config rejected: hidden_size_per_layer_input must be 0, got 256",
    "gemma4_audio": "tiny inputs rejected: mat1 and mat2 shapes cannot be multiplied (32x128 and",
    "gemma4_unified_assistant": "shrunk config rejected: The set of layer types producing a cache",
    "gemma4_vision": "inputs not written: needs 'pixel_position_ids'",
    "glm_image": "tiny inputs rejected: 'NoneType' object is not subscriptable",
    "glm_image_vqmodel": "convolutional codec without a list of blocks",
    "gradium_phonon_tts": "shrunk config rejected: `flow_head_config.condition_dim` (768) must",
    "granite4_vision": "shrunk config rejected: object of type 'NoneType' has no len()",
    "granite_speech5_ctc": "tiny inputs rejected: mat1 and mat2 shapes cannot be multiplied",
    "granite_speech5_encoder": "tiny inputs rejected: mat1 and mat2 shapes cannot be multiplied",
    "grounding-dino": "tiny inputs rejected: selected index k out of range",
    "higgs_audio_v2_tokenizer": "needs torchaudio, which the tests do not",
    "inkling2_vision": "inputs not written: needs 'image_grid_thw'",
    "inkling_mm_model": "needs scipy, which the tests do not",
    "jev": "inputs not written: needs 'marks', 'num_options', and 'question_type_ids'",
    "kimi_k25_vision": "tiny inputs rejected: Expected 3D (unbatched) or 4D (batched) input to",
    "kyutai_speech_to_text": "tiny inputs rejected: The size of tensor a (9) must match the size",
    "layoutlmv2": "needs detectron2, which the tests do not",
    "layoutlmv3": "tiny inputs rejected: The size of tensor a (17) must match the size of tensor",
    "lw_detr": "tiny inputs rejected: torch.cat(): expected a non-empty list of Tensors",
    "mask2former": "tiny inputs rejected: The size of tensor a (4) must match the size of tensor",
    "mimi": "tiny inputs rejected: X1 and X2 must have the same number of columns. X1: 256 X2: 32",
    "mimi_decoder": "inputs not written: needs 'latents'",
    "mimi_encoder": "tiny inputs rejected: not enough values to unpack (expected 3, got 2)",
    "minicpm_ocr_vision": "tiny inputs rejected: 'NoneType' object has no attribute 'device'",
    "minicpmv4_7_vision": "tiny inputs rejected: 'NoneType' object has no attribute 'device'",
    "mm-grounding-dino": "tiny inputs rejected: selected index k out of range",
    "muse_glimmer_assistant": "inputs not written: needs 'noise_embeds' and",
    "muse_glimmer_vision": "tiny inputs rejected: mat1 and mat2 shapes cannot be multiplied",
    "muse_spark_audio": "tiny inputs rejected: `input_values` length 1600 is not a multiple of",
    "muse_spark_vision": "tiny inputs rejected: mat1 and mat2 shapes cannot be multiplied (16x588",
    "nemotron3_5_transcribe_word_timestamp": "inputs not written: needs 'inputs_embeds'",
    "nemotron_h_omni": "shrunk config rejected: `vision_config.video_temporal_patch_size` (None)",
    "neomme": "tiny inputs rejected: pixel_values has patch width 64 but the model expects 3072",
    "neucodec": "inputs not written: needs 'input_features'",
    "omdet-turbo": "needs timm, which the tests do not",
    "pe_audio": "inputs not written: needs 'input_values'",
    "pe_audio_video": "needs PIL, which the tests do not",
    "pe_audio_video_encoder": "needs PIL, which the tests do not",
    "pe_video": "needs PIL, which the tests do not",
    "pe_video_encoder": "needs PIL, which the tests do not",
    "perceiver": "too slow even when shrunk",
    "perception_lm": "needs PIL, which the tests do not",
    "pi0": "ambiguous: 3 stacks of blocks of PI0ForConditionalGeneration fit equally well: mo",
    "pocket_tts": "shrunk config rejected: `flow_head_config.condition_dim` (1024) must equal the",
    "pocket_tts_audio_tokenizer": "shrunk config rejected: in_channels must be divisible by groups",
    "pocket_tts_audio_tokenizer_decoder": "shrunk config rejected: in_channels must be divisible",
    "pocket_tts_audio_tokenizer_encoder": "tiny inputs rejected: not enough values to unpack",
    "pp_doclayout_v2": "tiny inputs rejected: list index out of range",
    "pp_doclayout_v3": "tiny inputs rejected: list index out of range",
    "pp_doclayout_v4": "tiny inputs rejected: list index out of range",
    "pp_ocrv5_mobile_det": "tiny inputs rejected: list index out of range",
    "pp_ocrv5_mobile_rec": "tiny inputs rejected: Given input size: (512x2x2). Calculated output",
    "pp_ocrv5_server_det": "shrunk config rejected: 'NoneType' object is not subscriptable",
    "pp_ocrv5_server_rec": "tiny inputs rejected: Given input size: (2048x2x2). Calculated output",
    "pp_ocrv6_medium_det": "shrunk config rejected: 'NoneType' object is not subscriptable",
    "pp_ocrv6_small_det": "tiny inputs rejected: Given groups=1, weight of size [96, 12, 1, 1],",
    "prompt_depth_anything": "tiny inputs rejected: The number of hidden states should be equal",
    "qwen2_5_omni": "tiny inputs rejected: _forward_unimplemented() got an unexpected keyword",
    "qwen3_asr_encoder": "tiny inputs rejected: Qwen3ASREncoder expects `padded_feature_length`",
    "qwen3_omni_moe": "shrunk config rejected: 'Qwen3OmniMoeTalkerTextConfig' object has no",
    "rf_detr": "tiny inputs rejected: selected index k out of range",
    "rt_detr": "tiny inputs rejected: list index out of range",
    "rt_detr_v2": "tiny inputs rejected: list index out of range",
    "sam": "tiny inputs rejected: The size of tensor a (256) must match the size of tensor b (32)",
    "sam2": "tiny inputs rejected: Given normalized_shape=[96], expected input with shape [*,",
    "sam2_hiera_det_model": "tiny inputs rejected: Given normalized_shape=[96], expected input",
    "sam2_video": "runs on a video session, not on tensors",
    "sam2_vision_model": "tiny inputs rejected: Given normalized_shape=[96], expected input with",
    "sam3_lite_text_text_model": "tiny inputs rejected: embedding(): argument 'indices' (position",
    "sam3_tracker_video": "runs on a video session, not on tensors",
    "sam3_video": "ambiguous: 4 stacks of blocks of Sam3VideoModel fit equally well:",
    "sam_hq": "tiny inputs rejected: Given transposed=1, weight of size [32, 8, 2, 2], expected",
    "sapiens2": "tiny inputs rejected: The size of tensor a (4) must match the size of tensor b",
    "seggpt": "inputs not written: needs 'prompt_pixel_values' and 'prompt_masks'",
    "slanet": "tiny inputs rejected: Given groups=1, weight of size [96, 64, 1, 1], expected",
    "superglue": "tiny inputs rejected: Input must be a 5D tensor of shape (batch_size, 2,",
    "t5gemma2_encoder": "shrunk config rejected: 'T5Gemma2TextConfig' object has no attribute",
    "table-transformer": "needs timm, which the tests do not",
    "timm_backbone": "needs timm, which the tests do not",
    "timm_wrapper": "needs PIL, which the tests do not",
    "tipsv2_dpt": "tiny inputs rejected: The number of hidden states should be equal to the",
    "tvp": "tiny inputs rejected: The size of tensor a (2) must match the size of tensor b (48)",
    "univnet": "tiny inputs rejected: Given groups=1, weight of size [64, 16, 5], expected",
    "upernet": "shrunk config rejected: list index out of range",
    "uvdoc": "tiny inputs rejected: Given groups=1, weight of size [128, 768, 1, 1], expected",
    "vibevoice": "too slow even when shrunk",
    "vibevoice_asr": "shrunk config rejected: `acoustic_tokenizer_chunk_size` must be a multiple",
    "video_llama_3_vision": "inputs not written: needs 'merge_sizes'",
    "videomt": "needs scipy, which the tests do not",
    "videoprism": "too slow even when shrunk",
    "vitmatte": "shrunk config rejected: can only concatenate list (not 'tuple') to list",
    "vitpose": "shrunk config rejected: Trying to create tensor with negative dimension -224:",
    "vitpose_backbone": "shrunk config rejected: Trying to create tensor with negative dimension",
    "voxtral_realtime": "tiny inputs rejected: You must specify exactly one of input_features or",
    "voxtral_realtime_text": "transformers does not export its class at the top level",
    "xcodec": "tiny inputs rejected: Sizes of tensors must match except in dimension 1. Expected",
    "xcodec2": "inputs not written: needs 'input_features'",
    "xlstm": "tiny inputs rejected: matC_old has wrong shape, got torch.Size([2, 4, 16, 16])",
    "zoedepth": "tiny inputs rejected: The number of hidden states should be equal to the number",
    "sam3": "too slow even when shrunk: a forward takes 3 s",
    "sam3_lite_text": "too slow even when shrunk: a forward takes 3 s",
}

# These run in every test run; the rest of ENTRIES is marked slow.
CORE: dict[str, str] = {
    "decoder": """llama gpt2 gemma gemma2 gemma3_text qwen2 qwen3 mistral phi phi3 opt olmo2
        gpt_neox bloom falcon mpt gptj gpt_neo codegen stablelm cohere openai-gpt xlnet
        deepseek_v2 smollm3""",
    "encoder": "bert roberta electra modernbert deberta-v2 albert distilbert funnel squeezebert",
    "encoder-decoder": "t5 bart mbart pegasus marian fsmt longt5 umt5",
    "vision": "vit dinov2 swin convnext hiera resnet pvt",
    "audio": "whisper wav2vec2 hubert speech_to_text",
    "multimodal": "clip llava qwen2_vl qwen3_vl gemma3 blip idefics3 paligemma",
    "mixture of experts": "mixtral qwen3_moe deepseek_v3 gpt_oss olmoe switch_transformers",
    "state space": "mamba mamba2 falcon_mamba rwkv",
    "hybrid": "jamba bamba zamba zamba2 nemotron_h qwen3_next granitemoehybrid falcon_h1",
    "lanes and loops": "hrm_text deepseek_v4 gemma3n_text qwen4_exp_text reformer",
    "other": "patchtst decision_transformer",
}
_FAMILIES = [
    ("multimodal", "IMAGE_TEXT_TO_TEXT"),
    ("decoder", "CAUSAL_LM"),
    ("encoder-decoder", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("audio", "SPEECH_SEQ_2_SEQ"),
    ("audio", "CTC"),
    ("encoder", "MASKED_LM"),
    ("vision", "IMAGE"),
]
_GENERATING = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ")


@dataclass(frozen=True)
class Entry:
    model_type: str
    family: str
    build: Callable[[], tuple[PreTrainedModel, dict[str, Any]]]
    generates: bool
    """Some class of this type has a head to decode with."""
    core: bool
    at: str | None = None
    """Stack or module to hook where the default one is ambiguous or cannot be hooked."""
    skip_reason: str | None = None


def _entry(model_type: str) -> Entry:
    def has(kind: str) -> bool:
        return model_type in getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")

    core = next((name for name, types in CORE.items() if model_type in types.split()), None)
    family = core or next((name for name, kind in _FAMILIES if has(kind)), "other")
    return Entry(
        model_type,
        family,
        functools.partial(build, model_type),
        generates=any(map(has, _GENERATING)),
        core=core is not None,
        at=AT.get(model_type),
        skip_reason=CANNOT.get(model_type),
    )


ENTRIES: list[Entry] = [_entry(model_type) for model_type in OWN_MODEL if model_type not in CANNOT]
