"""OpenAI's sparse_autoencoder: `<layer>.pt`, of GPT-2 small.

    pre = encoder.weight @ (x - pre_bias) + latent_bias          encoder.weight [F, d]
    x_hat = decoder.weight @ relu(pre) + pre_bias                decoder.weight [d, F]

Beware Its TopK models normalise every token by its own mean and deviation and undo that on the
       output, so the bias that is added differs from token to token; a SwitchSAE has one `b_dec`.
"""

from __future__ import annotations

from torch import Tensor

from hf_switch_sae.convert.foreign import Foreign, Given, Plain, described
from hf_switch_sae.convert.places import layer_in
from hf_switch_sae.convert.source import Source
from hf_switch_sae.errors import ConversionError

NAME = "openai"
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognizes(source: Source) -> bool:
    """By the only .pt file, with a `pre_bias` in it."""
    files = source.weight_files(".pt")
    return len(files) == 1 and "pre_bias" in source.names(files[0])


def read(source: Source, given: Given) -> Foreign:
    """Take over a ReLU autoencoder; raises ConversionError for a TopK one, or what is missing."""
    (file,) = source.weight_files(".pt")
    tensors = source.tensors(file)
    activation = tensors.plain("activation")
    tensors.plain("activation_state_dict")
    if activation != "ReLU":
        raise ConversionError(
            f"{source.where} has the activation {activation!r}: OpenAI's TopK models normalise "
            "every token by its own mean and deviation, which fixed weights can't compute. Its "
            "ReLU models (v1, v4) can be taken over."
        )
    W_enc = tensors.take("encoder.weight", None, None)
    F, d = W_enc.shape
    W_dec, b_enc = tensors.take("decoder.weight", d, F), tensors.take("latent_bias", F)
    b_dec = tensors.take("pre_bias", d)
    tensors.finish(_STATISTICS)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = ((x - b_dec.float()) @ W_enc.float().T + b_enc.float()).relu()
        return acts, acts @ W_dec.float().T + b_dec.float()

    layer = layer_in(file, r"^(\d+)\.pt$")
    # its other locations (resid_delta_*, mlp_post_act, resid_post_attn) lie within a block
    known = layer is not None and "resid_post_mlp" in source.where
    place = f"layers.{layer}.resid_post" if known else None
    model = "openai-community/gpt2" if "gpt2-small" in source.where else None
    about = described(source, given, NAME, place, f"{source.where}/{file}", model)
    plain = Plain(W_enc, W_dec.T, b_enc, b_dec, "relu", subtracts=True)
    return plain.foreign(NAME, about, formula)
