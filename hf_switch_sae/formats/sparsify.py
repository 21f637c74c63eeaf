"""EleutherAI sparsify: `<hookpoint>/cfg.json` and `sae.safetensors`, read and written.

    acts = topk_k relu((x - b_dec) @ encoder.weight.T + encoder.bias);  x_hat = acts @ W_dec + b_dec

encoder.weight and W_dec are both [F, d]. The folder's name is a module of the base model.

Beware A config with `transcode`, or weights with `W_skip`, are of a transcoder: it reads one place
       and writes another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.checkpoint import Checkpoint, Given, OneExpert, integer, origin_fields
from hf_switch_sae.formats.dense import DenseWeights, keep_topk, write_checkpoint
from hf_switch_sae.formats.hookpoint_names import from_base_module
from hf_switch_sae.hub.source import Source
from hf_switch_sae.sae.model import SwitchSAE

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def recognizes(source: Source) -> bool:
    """Told by its files."""
    return {CONFIG, WEIGHTS} <= set(source.files)


def read(source: Source, given: Given) -> Checkpoint:
    """Take over a SparseCoder.

    Raises:
        ConversionError: a transcoder, another activation, or a missing parameter.
    """
    cfg, tensors = source.json(CONFIG), source.tensors(WEIGHTS)
    # a key may be missing: `signed` is in old files only
    for name, wanted in {"activation": "topk", "transcode": False, "signed": False}.items():
        if cfg.get(name, wanted) != wanted:
            raise ConversionError(
                f"{source.where} has {name}={cfg[name]!r}, which a SwitchSAE can't compute; "
                f"only {name}={wanted!r} can be taken over."
            )
    if cfg.get("skip_connection") or "W_skip" in tensors:
        raise ConversionError(f"{source.where} has a skip connection (W_skip): it is a transcoder.")
    W_enc = tensors.take("encoder.weight", None, integer(cfg.get("d_in"), "d_in", source.where))
    F, d = W_enc.shape
    W_dec, b_enc = tensors.take("W_dec", F, d), tensors.take("encoder.bias", F)
    b_dec = tensors.take("b_dec", d)
    tensors.finish()
    k = given.settle("k", integer(cfg.get("k"), "k", source.where), source)

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = keep_topk((x - b_dec.float()) @ W_enc.float().T + b_enc.float(), k)
        return acts, acts @ W_dec.float() + b_dec.float()

    # in a release, config.json lies at the top, so a single hookpoint's folder has none
    place, model = from_base_module(source.folder_name), source.json("config.json").get("model")
    about = origin_fields(source, given, NAME, place, source.folder_name, model)
    ours = OneExpert(W_enc, W_dec, b_enc, b_dec, "topk", subtracts=True, k=k)
    return ours.checkpoint(NAME, about, formula)


def write(sae: SwitchSAE, folder: Path) -> tuple[str, ...]:
    """Write what `SparseCoder.load_from_disk(folder)` reads; returns what a user should know.

    Raises:
        ConversionError: an activation other than topk, or several experts.
    """
    dense = DenseWeights.of(sae, NAME)
    if sae.config.activation != "topk":
        raise ConversionError(f"{NAME} has only topk, not {sae.config.activation!r}.")
    tensors = {
        "encoder.weight": dense.W_enc,
        "encoder.bias": dense.bias_when_subtracting(),
        "W_dec": dense.W_dec,
        "b_dec": dense.b_dec,
    }
    # num_latents gives the width; beside it, expansion_factor is not used and need not be exact
    cfg: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, sae.config.num_features // sae.config.hidden_size),
        "normalize_decoder": bool(((dense.W_dec.norm(dim=1) - 1).abs() <= 1e-5).all()),
        "num_latents": sae.config.num_features,
        "k": sae.config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.config.hidden_size,
    }
    write_checkpoint(folder, {WEIGHTS: tensors, CONFIG: cfg})
    return dense.notes
