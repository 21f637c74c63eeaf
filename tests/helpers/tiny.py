"""Tiny random language models for tests of editing: one builder for each kind that differs.

Room   LM["llama"]() -> model in eval mode, vocabulary of 99, four blocks, residual width 32.
Beware weights are drawn wide (0.3), so that logits differ much from token to token and a wrong
       edit changes what is generated. Token 0 pads; no token ends a text.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from hf_switch_sae import SwitchSAE

VOCAB, DIM, LAYERS, WINDOW = 99, 32, 4, 6

Builder = Callable[..., tf.PreTrainedModel]
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    **_SPECIAL,
}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": DIM,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.3,
    **_SPECIAL,
}


def _build(model: str, config: str, seed: int = 0, **fields: Any) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    built = getattr(tf, model)(getattr(tf, config)(**fields)).eval()
    for name, weight in built.named_parameters():
        if weight.ndim < 2 and "norm" not in name and "bias" in name:
            nn.init.normal_(weight, std=0.1)  # zeros would hide a bias that is skipped
    return built


def llama(head: str = "LlamaForCausalLM", **changes: Any) -> tf.PreTrainedModel:
    return _build(head, "LlamaConfig", **{**_SIZES, **changes})


def mistral(**changes: Any) -> tf.PreTrainedModel:
    fields = {**_SIZES, "sliding_window": WINDOW, "head_dim": 8, **changes}
    return _build("MistralForCausalLM", "MistralConfig", **fields)


def gemma3(**changes: Any) -> tf.PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    fields = {"sliding_window": WINDOW, "head_dim": 8, "layer_types": kinds}
    return _build("Gemma3ForCausalLM", "Gemma3TextConfig", **{**_SIZES, **fields, **changes})


def qwen3(**changes: Any) -> tf.PreTrainedModel:
    return _build("Qwen3ForCausalLM", "Qwen3Config", **{**_SIZES, "head_dim": 8, **changes})


def gpt2(**changes: Any) -> tf.PreTrainedModel:
    return _build("GPT2LMHeadModel", "GPT2Config", **{**_GPT, **changes})


def gptj(**changes: Any) -> tf.PreTrainedModel:
    return _build("GPTJForCausalLM", "GPTJConfig", **{**_GPT, "rotary_dim": 4, **changes})


def gpt_neox(**changes: Any) -> tf.PreTrainedModel:
    return _build("GPTNeoXForCausalLM", "GPTNeoXConfig", **{**_SIZES, **changes})


def bloom(**changes: Any) -> tf.PreTrainedModel:
    fields = {"hidden_size": DIM, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCAB}
    fields = {**fields, "initializer_range": 0.3, **_SPECIAL}
    return _build("BloomForCausalLM", "BloomConfig", **{**fields, **changes})


def mamba(**changes: Any) -> tf.PreTrainedModel:
    fields = {**_SIZES, "state_size": 8, "num_hidden_layers": LAYERS}
    return _build("MambaForCausalLM", "MambaConfig", **{**fields, **changes})


def mamba2(**changes: Any) -> tf.PreTrainedModel:
    fields = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    return _build("Mamba2ForCausalLM", "Mamba2Config", **{**_SIZES, **fields, **changes})


def jamba(**changes: Any) -> tf.PreTrainedModel:
    fields = {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
    fields |= {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
    return _build("JambaForCausalLM", "JambaConfig", **{**_SIZES, **fields, **changes})


def lfm2(**changes: Any) -> tf.PreTrainedModel:
    kinds = ["conv", "full_attention"] * (LAYERS // 2)
    return _build("Lfm2ForCausalLM", "Lfm2Config", **{**_SIZES, "layer_types": kinds, **changes})


def t5(**changes: Any) -> tf.PreTrainedModel:
    fields = {"vocab_size": VOCAB, "d_model": DIM, "d_ff": 48, "d_kv": 8, "num_heads": 4}
    fields |= {"num_layers": LAYERS, "initializer_factor": 2.0, "decoder_start_token_id": 0}
    return _build(
        "T5ForConditionalGeneration", "T5Config", **{**fields, **_SPECIAL, "pad_token_id": 0}
    )


def bart(**changes: Any) -> tf.PreTrainedModel:
    fields: dict[str, Any] = {"vocab_size": VOCAB, "d_model": DIM, "init_std": 0.3}
    for half in ("encoder", "decoder"):
        fields |= {f"{half}_layers": LAYERS, f"{half}_attention_heads": 4, f"{half}_ffn_dim": 48}
    fields |= {"max_position_embeddings": 256, "decoder_start_token_id": 2, **_SPECIAL}
    fields |= {"forced_eos_token_id": None}
    return _build("BartForConditionalGeneration", "BartConfig", **{**fields, **changes})


def whisper(**changes: Any) -> tf.PreTrainedModel:
    fields: dict[str, Any] = {"vocab_size": VOCAB, "d_model": DIM, "num_mel_bins": 8}
    for half in ("encoder", "decoder"):
        fields |= {f"{half}_layers": LAYERS, f"{half}_attention_heads": 4, f"{half}_ffn_dim": 48}
    fields |= {"max_source_positions": 12, "max_target_positions": 64, "init_std": 0.3}
    fields |= {"decoder_start_token_id": 3, **_SPECIAL, "suppress_tokens": None}
    fields |= {"begin_suppress_tokens": None}
    return _build("WhisperForConditionalGeneration", "WhisperConfig", **{**fields, **changes})


def xlnet(**changes: Any) -> tf.PreTrainedModel:
    fields = {"vocab_size": VOCAB, "d_model": DIM, "n_layer": LAYERS, "n_head": 4, "d_inner": 48}
    fields |= {"initializer_range": 0.3, **_SPECIAL}
    return _build("XLNetLMHeadModel", "XLNetConfig", **{**fields, **changes})


def bert(**changes: Any) -> tf.PreTrainedModel:
    return _build("BertForMaskedLM", "BertConfig", **{**_SIZES, **changes})


LM: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (llama, mistral, gemma3, qwen3, gpt2, gptj, gpt_neox, bloom)
}
RECURRENT: dict[str, Builder] = {b.__name__: b for b in (mamba, mamba2, jamba, lfm2)}
PAIRS: dict[str, Builder] = {b.__name__: b for b in (t5, bart)}
OTHERS: dict[str, Builder] = {b.__name__: b for b in (bert, xlnet)}
ALL = {**LM, **RECURRENT, **PAIRS, **OTHERS}


def sae_for(lm: nn.Module, at: int | str = 2, seed: int = 1, **config: Any) -> SwitchSAE:
    """An SAE that fits a place of `lm`, with biases and statistics that are not trivial."""
    torch.manual_seed(seed)
    config = {"num_features": 64, "num_experts": 4, "k": 4, **config}
    sae = SwitchSAE.for_lm(lm, at, **config).eval()
    with torch.no_grad():
        sae.b_dec.normal_(std=0.2)
        sae.W_dec.mul_(torch.rand(*sae.W_dec.shape[:2], 1) + 0.5)
        if config["num_experts"] > 1:
            sae.b_router.normal_(std=0.2)
        sae.feature_max.copy_(torch.rand(config["num_features"]) + 0.5)
        sae.residual_norm.fill_(4.0)
        sae.statistics_tokens.fill_(1000)
    return sae


def prompts(*lengths: int, seed: int = 3) -> list[Tensor]:
    """Random token ids of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    """input_ids and attention_mask of the rows as one batch."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        at = slice(width - len(row), None) if side == "left" else slice(None, len(row))
        ids[index, at], mask[index, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask.long()}


def traces(lm: nn.Module) -> list[str]:
    """What attaching could have left on a model: hooks, instance attributes, compiled calls."""
    found = []
    for name, module in lm.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called"):
            found += [f"{name}.{kind}"] * len(getattr(module, kind))
        found += [f"{name}.{key}" for key in module.__dict__]
    return sorted(found)
