"""Llama Scope (OpenMOSS): JumpReLU SAEs of Llama 3.1, computed as the authors do.

Llama Scope of 2024: `hyperparams.json` and `checkpoints/final.safetensors`, with encoder.weight
[F, d] and decoder.weight [d, F], trained on activations scaled to a mean norm of sqrt(d). With
s = sqrt(d) / mean norm, and n the norms of the decoder's columns after scaling by s_in / s_out:

    pre = n * (encoder.weight @ x + encoder.bias / s_in);   acts = relu(pre) * (pre > theta)
    x_hat = decoder.weight * (s_in / s_out / n) @ acts + decoder.bias / s_out

Llama-Scope-R1-Distill: `config.json` and `sae_weights.safetensors`, with a threshold for each
feature. The files don't tell the scale, so it has to be given.

What Llamascopium writes today (`W_E`, `W_D`, a norm for each hookpoint) is refused by name.

Beware Other loaders leave n out. Other features then fire, unless the decoder's columns happen to
       have length 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.checkpoint import Checkpoint, Formula, Given, OneExpert, origin_fields
from hf_switch_sae.formats.dense import keep_above
from hf_switch_sae.formats.hookpoint_names import from_transformer_lens
from hf_switch_sae.hub.layout import LLAMA_SCOPE_WEIGHTS
from hf_switch_sae.hub.source import Source

NAME = "llama_scope"
CONFIG, WEIGHTS = "hyperparams.json", LLAMA_SCOPE_WEIGHTS
R1_CONFIG, R1_WEIGHTS = "config.json", "sae_weights.safetensors"


def recognizes(source: Source) -> bool:
    """Told by its files; R1-Distill has a config.json where SAELens has a cfg.json."""
    files = set(source.files)
    if {CONFIG, WEIGHTS} <= files:
        return True
    if R1_CONFIG not in files or "model.safetensors" in files:  # a transformers model
        return False
    return "hook_point_in" in source.json(R1_CONFIG)


def read(source: Source, given: Given) -> Checkpoint:
    """Take over one SAE.

    Raises:
        ConversionError: a transcoder, another activation, today's Llamascopium, or a missing
            parameter.
    """
    old = CONFIG in source.files
    config = source.json(CONFIG if old else R1_CONFIG)
    if not old and R1_WEIGHTS not in source.files:
        raise ConversionError(
            f"{source.where} is in the format of today's Llamascopium (W_E, W_D; "
            f"sae_type={config.get('sae_type')!r}), which can't be taken over: only Llama Scope "
            f"({WEIGHTS}) and Llama-Scope-R1-Distill ({R1_WEIGHTS}) are."
        )
    tensors = source.tensors(WEIGHTS if old else R1_WEIGHTS)
    _check(source, config)
    W_enc = tensors.take("encoder.weight", None, config.get("d_model"))
    F, d = W_enc.shape
    W_dec, b_enc = tensors.take("decoder.weight", d, F), tensors.take("encoder.bias", F)
    b_dec = tensors.take("decoder.bias", d)
    held = (W_enc, W_dec, b_enc, b_dec)
    if old:
        # in float32, as the file has bfloat16, which would round again at each scaling
        ours, formula = _with_norms(source, config, *(value.float() for value in held))
    else:
        threshold = tensors.take("log_jumprelu_threshold", F).float().exp()
        # never taken to be 1: a wrong scale gives other features, and no error
        scale = float(given.settle("input_scale", None, source))
        ours, formula = _with_scale(scale, threshold, *held)
    tensors.finish()
    their_name = config.get("hook_point_in")
    # hyperparams.json does not name the model; the release's folders do
    model = "meta-llama/Llama-3.1-8B" if "Llama3_1-8B-Base" in source.where else None
    place = from_transformer_lens(their_name)
    about = origin_fields(source, given, NAME, place, their_name, model, hook_name=their_name)
    return ours.checkpoint(NAME, about, formula)


def _check(source: Source, config: dict[str, Any]) -> None:
    reads, writes = config.get("hook_point_in"), config.get("hook_point_out")
    if reads != writes:
        raise ConversionError(
            f"{source.where} reads {reads} and writes {writes}: it is a transcoder, and a "
            "SwitchSAE reads and writes in one place."
        )
    wants = {"act_fn": "jumprelu", "apply_decoder_bias_to_pre_encoder": False}
    for name, want in wants.items():
        if config.get(name, want) != want:
            raise ConversionError(f"{source.where} has {name}={config[name]!r}, not {want!r}.")


# the two variants, each as our weights and its own formula


def _with_norms(
    source: Source,
    config: dict[str, Any],
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
) -> tuple[OneExpert, Formula]:
    norms = config.get("dataset_average_activation_norm")
    theta = config.get("jump_relu_threshold")
    how = config.get("norm_activation")
    if how != "dataset-wise" or not isinstance(norms, dict) or not {"in", "out"} <= norms.keys():
        raise ConversionError(
            f"{source.where} has norm_activation={how!r} with dataset_average_activation_norm="
            f"{norms!r}; only 'dataset-wise' with 'in' and 'out' can be taken over."
        )
    if not isinstance(theta, int | float):
        raise ConversionError(f"{source.where} has no jump_relu_threshold.")
    threshold = torch.tensor(float(theta), dtype=torch.float32, device="cpu")
    s_in, s_out = (math.sqrt(len(b_dec)) / norms[side] for side in ("in", "out"))
    norm = (W_dec * (s_in / s_out)).norm(dim=0)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = keep_above((x @ W_enc.T + b_enc / s_in) * norm, threshold)
        return acts, (acts / norm) @ W_dec.T * (s_in / s_out) + b_dec / s_out

    ours = OneExpert(
        W_enc * norm[:, None],
        (W_dec * (s_in / s_out) / norm).T,
        b_enc / s_in * norm,
        b_dec / s_out,
        "jumprelu",
        subtracts=False,
        threshold=threshold,
    )
    return ours, formula


def _with_scale(
    scale: float, threshold: Tensor, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor
) -> tuple[OneExpert, Formula]:
    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = keep_above(scale * x @ W_enc.float().T + b_enc.float(), threshold)
        return acts, (acts @ W_dec.float().T + b_dec.float()) / scale

    ours = OneExpert(
        W_enc,
        W_dec.T,
        b_enc,
        b_dec,
        "jumprelu",
        subtracts=False,
        threshold=threshold,
        input_scale=scale,
    )
    return ours, formula
