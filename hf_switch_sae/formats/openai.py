"""OpenAI's sparse_autoencoder: SAEs of GPT-2 small, `<layer>.pt`.

    pre = encoder.weight @ (x - pre_bias) + latent_bias          encoder.weight [F, d]
    x_hat = decoder.weight @ acts + pre_bias                     decoder.weight [d, F]

acts is relu(pre) (v1, v4), or the k largest of them (v5). The TopK models read (x - mean) / (std +
1e-5) of every token in place of x, and return std * x_hat + mean.

Beware Only the name of its activation tells whether a model normalizes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.checkpoint import Checkpoint, Given, OneExpert, integer, origin_fields
from hf_switch_sae.formats.dense import keep_topk, normed_by_hand
from hf_switch_sae.formats.hookpoint_names import layer_in
from hf_switch_sae.hub.source import Source
from hf_switch_sae.hub.tensors import Tensors
from hf_switch_sae.lm.names import hookpoint_of

NAME = "openai"
# kept for training; what the SAE computes does not depend on them
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognizes(source: Source) -> bool:
    """Told by its one .pt file, with a `pre_bias` in it."""
    files = source.weight_files(".pt")
    return len(files) == 1 and "pre_bias" in source.names(files[0])


def read(source: Source, given: Given) -> Checkpoint:
    """Take over an autoencoder.

    Raises:
        ConversionError: another activation, or a missing parameter.
    """
    (file,) = source.weight_files(".pt")
    tensors = source.tensors(file)
    rule, k = _rule(tensors.plain("activation"), tensors, source, given)
    norm = "none" if rule == "relu" else "layer_norm"
    W_enc = tensors.take("encoder.weight", None, None)
    F, d = W_enc.shape
    W_dec, b_enc = tensors.take("decoder.weight", d, F), tensors.take("latent_bias", F)
    b_dec = tensors.take("pre_bias", d)
    tensors.finish(_STATISTICS)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        h, std, mean = normed_by_hand(x, norm)
        # the ReLU models have no k: all F are kept
        acts = keep_topk((h - b_dec.float()) @ W_enc.float().T + b_enc.float(), k or F)
        return acts, (acts @ W_dec.float().T + b_dec.float()) * std + mean

    layer = layer_in(file, r"^(\d+)\.pt$")
    # the other locations (resid_delta_*, mlp_post_act, resid_post_attn) lie within a block
    is_stream = "resid_post_mlp" in source.where
    place = hookpoint_of(layer) if is_stream and layer is not None else None
    model = "openai-community/gpt2" if "gpt2-small" in source.where else None
    about = origin_fields(source, given, NAME, place, f"{source.where}/{file}", model)
    ours = OneExpert(W_enc, W_dec.T, b_enc, b_dec, rule, subtracts=True, k=k, input_norm=norm)
    return ours.checkpoint(NAME, about, formula)


def _rule(
    activation: Any, tensors: Tensors, source: Source, given: Given
) -> tuple[str, int | None]:
    state = tensors.plain("activation_state_dict") or {}
    if not isinstance(state, dict):
        raise ConversionError(
            f"activation_state_dict in {source.where} is a {type(state).__name__}, not a dict."
        )
    if activation == "ReLU":
        return "relu", None
    # with another postact_fn, such as the identity, negative values would stay
    if activation != "TopK" or state.get("postact_fn", "ReLU") != "ReLU":
        raise ConversionError(
            f"{source.where} has the activation {activation!r} {state or ''}; ReLU and TopK with "
            "ReLU can be taken over."
        )
    return "topk", given.settle("k", integer(state.get("k"), "k", source.where), source)
