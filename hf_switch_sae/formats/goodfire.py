"""Goodfire: ReLU SAEs of Llama 3.1 8B and 3.3 70B, one `.pt` or `.pth` file each.

    acts = relu(encoder_linear.weight @ x + encoder_linear.bias)       encoder_linear.weight [F, d]
    x_hat = decoder_linear.weight @ acts + decoder_linear.bias         decoder_linear.weight [d, F]

Nothing is subtracted. The name tells the layer, `...-SAE-l19`, whose output the SAE reads.
"""

from __future__ import annotations

from torch import Tensor

from hf_switch_sae.formats.checkpoint import Checkpoint, Given, OneExpert, origin_fields
from hf_switch_sae.formats.hookpoint_names import layer_in
from hf_switch_sae.hub.source import Source
from hf_switch_sae.lm.names import hookpoint_of

NAME = "goodfire"


def recognizes(source: Source) -> bool:
    """Told by its one .pt or .pth file, with an `encoder_linear.weight` in it."""
    files = source.weight_files(".pt", ".pth")
    # only the names in it are read: its tensors are gigabytes, and may lie on the Hub
    return len(files) == 1 and "encoder_linear.weight" in source.names(files[0])


def read(source: Source, given: Given) -> Checkpoint:
    """Take over one SAE; raises ConversionError for a missing parameter."""
    (file,) = source.weight_files(".pt", ".pth")
    tensors = source.tensors(file)
    W_enc = tensors.take("encoder_linear.weight", None, None)
    F, d = W_enc.shape
    W_dec = tensors.take("decoder_linear.weight", d, F)
    b_enc, b_dec = tensors.take("encoder_linear.bias", F), tensors.take("decoder_linear.bias", d)
    tensors.finish()

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = (x @ W_enc.float().T + b_enc.float()).relu()
        return acts, acts @ W_dec.float().T + b_dec.float()

    # repository and file may both have the layer; if they differ, `layer_in` finds none
    layer = layer_in(f"{source.where}/{file}", r"-SAE-l(\d+)(?:\.pth?)?(?:/|$)")
    place = None if layer is None else hookpoint_of(layer)
    ours = OneExpert(W_enc, W_dec.T, b_enc, b_dec, "relu", subtracts=False)
    return ours.checkpoint(NAME, origin_fields(source, given, NAME, place), formula)
