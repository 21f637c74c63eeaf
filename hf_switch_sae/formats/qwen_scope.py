"""Qwen-Scope: TopK SAEs of Qwen3 and Qwen3.5, `layer<n>.sae.pt` with four tensors.

    acts = topk_k relu(W_enc @ x + b_enc);  x_hat = W_dec @ acts + b_dec

W_enc is [F, d], W_dec [d, F]; nothing is subtracted.

Beware Only the repository's name tells k, `...-L0_50`, and only the file's name the layer. All
       files lie in one folder, so a user names the file as `subfolder`, or passes `layer`.
"""

from __future__ import annotations

import re

from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.checkpoint import Checkpoint, Given, OneExpert, origin_fields
from hf_switch_sae.formats.dense import keep_topk
from hf_switch_sae.formats.hookpoint_names import layer_in
from hf_switch_sae.hub.source import Source
from hf_switch_sae.lm.names import hookpoint_of

NAME = "qwen_scope"


def recognizes(source: Source) -> bool:
    """Told by the names of its files."""
    return bool(source.weight_files(".sae.pt"))


def read(source: Source, given: Given) -> Checkpoint:
    """Take over one SAE.

    Raises:
        ConversionError: the files of several layers without `layer`, or a missing parameter.
    """
    files = source.weight_files(".sae.pt")
    # layer= chooses the file here; in other formats it only says where the SAE belongs
    if given.layer is not None:
        wanted = f"layer{given.layer}.sae.pt"
        if wanted not in files:
            raise ConversionError(
                f"{source.where} has no {wanted} for layer={given.layer}; it has "
                f"{', '.join(files[:6])}{', ...' if len(files) > 6 else ''}."
            )
        files = [wanted]
    if len(files) != 1:
        raise ConversionError(
            f"{source.where} has {len(files)} SAEs: pass layer=, or one of them as subfolder=: "
            f"{', '.join(files[:6])}{', ...' if len(files) > 6 else ''}."
        )
    tensors = source.tensors(files[0])
    W_enc = tensors.take("W_enc", None, None)
    F, d = W_enc.shape
    W_dec, b_enc = tensors.take("W_dec", d, F), tensors.take("b_enc", F)
    b_dec = tensors.take("b_dec", d)
    tensors.finish()
    # `layer_in` finds any number, here k
    k = given.settle("k", layer_in(source.where, r"-L0_(\d+)(?:/|$)"), source)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = keep_topk(x @ W_enc.float().T + b_enc.float(), k)
        return acts, acts @ W_dec.float().T + b_dec.float()

    layer = layer_in(files[0], r"^layer(\d+)\.sae\.pt$")
    model = re.search(r"SAE-Res-(.+?)-W\d+K", source.where)
    place = None if layer is None else hookpoint_of(layer)
    base_model = f"Qwen/{model[1]}" if model else None
    about = origin_fields(source, given, NAME, place, base_model=base_model)
    ours = OneExpert(W_enc, W_dec.T, b_enc, b_dec, "topk", subtracts=False, k=k)
    return ours.checkpoint(NAME, about, formula)
