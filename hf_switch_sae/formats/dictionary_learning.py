"""dictionary_learning: `ae.pt`, a state dict, and `config.json`; read and written.

    class                   encode                                       tensors
    AutoEncoder             relu(W (x - b_dec) + b_enc)                  encoder, decoder, bias
    AutoEncoderNew          relu(W x + b_enc)                            encoder, decoder
    GatedAutoEncoder        gated, of x - b_dec (see `saelens`)          encoder, decoder, r_mag
    JumpReluAutoEncoder     relu(pre) * (pre > threshold), of x          W_enc [d, F], W_dec [F, d]
    AutoEncoderTopK         the k largest relu(W (x - b_dec) + b_enc)    encoder, decoder, b_dec
    BatchTopKSAE            those over one threshold, of x - b_dec       encoder, decoder, b_dec
    MatryoshkaBatchTopKSAE  the same                                     W_enc [d, F], W_dec [F, d]

encoder.weight is [F, d] and decoder.weight [d, F], as `nn.Linear` has them.

Beware A threshold of -1 means that none was recorded. AutoEncoderTopK and BatchTopKSAE have the
       same tensors, so without config.json the user has to name the class.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.checkpoint import Checkpoint, Given, OneExpert, integer, origin_fields
from hf_switch_sae.formats.dense import DenseWeights, keep_above, keep_topk, write_checkpoint
from hf_switch_sae.formats.saelens import gated
from hf_switch_sae.hub.source import Source
from hf_switch_sae.hub.tensors import Tensors
from hf_switch_sae.lm.names import Site, hookpoint_of, layer_of
from hf_switch_sae.sae.model import SwitchSAE

NAME = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"
_WITH_LINEAR = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE")
_WITH_ROWS = ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
CLASSES = (*_WITH_LINEAR, *_WITH_ROWS, "GatedAutoEncoder")


def recognizes(source: Source) -> bool:
    """Told by its file; `switch_sae` and `scale_sae`, which have the same, are asked before it."""
    return WEIGHTS in source.files


def read(source: Source, given: Given) -> Checkpoint:
    """Take over a dictionary.

    Raises:
        ConversionError: another class, or a missing parameter.
    """
    trainer = source.section(CONFIG, "trainer")
    tensors = source.tensors(WEIGHTS)
    kind = given.settle("dict_class", trainer.get("dict_class") or _told_by(tensors), source)
    if kind not in CLASSES:
        raise ConversionError(f"{source.where} is a {kind}; known are {', '.join(CLASSES)}.")

    # the tensors, and the rule by which features stay
    d = integer(trainer.get("activation_dim"), "activation_dim", source.where)
    F = integer(trainer.get("dict_size"), "dict_size", source.where)
    W_enc, W_dec, b_enc, b_dec = _matrices(kind, tensors, F, d)
    F, d = W_enc.shape
    # SAELens' loader subtracts for AutoEncoderNew too; the class itself does not
    subtract = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    k = _k(kind, tensors, trainer, source, given)
    threshold = _threshold(kind, tensors, F, source, given)
    weights: dict[str, Tensor] = {"W_enc": W_enc}
    # a gated one is taken over as the JumpReLU one that equals it
    if kind == "GatedAutoEncoder":
        gate, mag, r = (tensors.take(name, F) for name in ("gate_bias", "mag_bias", "r_mag"))
        weights = gated(W_enc, gate, mag, r)
        b_enc, threshold = weights["b_enc"], weights["threshold"]
    # k and threshold may be stored twice, in the weights and in the config; `_k` has compared them
    by_k = _rule_of(kind) in ("topk", "batch_topk")
    tensors.finish(("k", "group_sizes", "threshold") if by_k else ())

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = (x - b_dec.float() * subtract) @ W_enc.float().T
        if kind == "GatedAutoEncoder":
            acts = (pre + gate.float() > 0) * (r.float().exp() * pre + mag.float()).relu()
        elif threshold is not None:
            acts = keep_above(pre + b_enc.float(), threshold)
        else:
            # relu has no k: the F largest are all there are
            acts = keep_topk(pre + b_enc.float(), k or F)
        return acts, acts @ W_dec.float().T + b_dec.float()

    their_name = trainer.get("submodule_name")
    origin = {"dict_class": kind, "submodule_name": their_name}
    place, model = place_of(trainer), trainer.get("lm_name")
    about = origin_fields(source, given, NAME, place, their_name, model, **origin)
    ours = OneExpert(
        weights["W_enc"],
        W_dec.T,
        b_enc,
        b_dec,
        _rule_of(kind),
        subtracts=subtract,
        k=k,
        threshold=threshold,
    )
    return ours.checkpoint(NAME, about, formula)


def write(sae: SwitchSAE, folder: Path) -> tuple[str, ...]:
    """Write `ae.pt` and `config.json`; returns what a user should know.

    relu becomes AutoEncoder, topk AutoEncoderTopK, batch_topk BatchTopKSAE and jumprelu
    JumpReluAutoEncoder.

    Raises:
        ConversionError: several experts, a k beside a threshold rule, or a batch_topk with
            thresholds that differ.
    """
    dense, c = DenseWeights.of(sae, NAME), sae.config
    kind = {
        "relu": "AutoEncoder",
        "topk": "AutoEncoderTopK",
        "batch_topk": "BatchTopKSAE",
        "jumprelu": "JumpReluAutoEncoder",
    }[c.activation]

    # the two layouts: W_enc [d, F] as rows, or an nn.Linear
    if kind == "JumpReluAutoEncoder":
        assert dense.threshold is not None
        tensors = {
            "W_enc": dense.W_enc.T.contiguous(),
            "b_enc": dense.bias_when_not(),
            "W_dec": dense.W_dec,
            "b_dec": dense.b_dec,
            "threshold": dense.threshold,
        }
    else:
        tensors = {
            "bias" if kind == "AutoEncoder" else "b_dec": dense.b_dec,
            "encoder.weight": dense.W_enc,
            "encoder.bias": dense.bias_when_subtracting(),
            "decoder.weight": dense.W_dec.T.contiguous(),
        }
        if kind != "AutoEncoder":
            # AutoEncoderTopK stores a threshold too, and -1 for none
            none = torch.tensor(-1.0, dtype=torch.float32, device="cpu")
            one = dense.one_threshold(NAME) if kind == "BatchTopKSAE" else none
            # their from_pretrained takes k from the state dict
            tensors |= {"k": torch.tensor(c.k, dtype=torch.int, device="cpu"), "threshold": one}
    place = layer_of(c.hookpoint)
    trainer = {
        "dict_class": kind,
        "activation_dim": c.hidden_size,
        "dict_size": c.num_features,
        "lm_name": c.base_model,
        "k": c.k,
        "layer": place[0] if place else None,
        "submodule_name": f"{place[1]}_layer_{place[0]}" if place else None,
    }
    told = {name: value for name, value in trainer.items() if value is not None}
    write_checkpoint(folder, {WEIGHTS: tensors, CONFIG: {"trainer": told}})
    return dense.notes


def place_of(trainer: dict[str, Any]) -> str | None:
    """The hookpoint in a trainer's config, `resid_post_layer_3`; None for any other name."""
    match = re.fullmatch(r"(resid_pre|resid_post)_layer_(\d+)", str(trainer.get("submodule_name")))
    return hookpoint_of(match[2], cast(Site, match[1])) if match else None


def _told_by(tensors: Tensors) -> str | None:
    """The class, if the names of the tensors leave no doubt."""
    marks = {
        "bias": "AutoEncoder",
        "decoder.bias": "AutoEncoderNew",
        "r_mag": "GatedAutoEncoder",
        "group_sizes": "MatryoshkaBatchTopKSAE",
    }
    found = [kind for name, kind in marks.items() if name in tensors]
    # a Matryoshka SAE has W_enc too, but with a k
    if not found and "W_enc" in tensors and "k" not in tensors:
        found = ["JumpReluAutoEncoder"]
    return found[0] if len(found) == 1 else None


def _matrices(
    kind: str, tensors: Tensors, F: int | None, d: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc [F, d], W_dec [d, F], b_enc [F], b_dec [d]; b_enc is 0 for a gated one."""
    if kind in _WITH_ROWS:
        W_enc = tensors.take("W_enc", d, F).T
        F, d = W_enc.shape
        W_dec = tensors.take("W_dec", F, d).T
        return W_enc, W_dec, tensors.take("b_enc", F), tensors.take("b_dec", d)
    W_enc = tensors.take("encoder.weight", F, d)
    F, d = W_enc.shape
    bias = {
        "AutoEncoder": "bias",
        "AutoEncoderNew": "decoder.bias",
        "GatedAutoEncoder": "decoder_bias",
    }.get(kind, "b_dec")
    b_dec, W_dec = tensors.take(bias, d), tensors.take("decoder.weight", d, F)
    gated_one = kind == "GatedAutoEncoder"  # its encoder has two biases, which `read` takes
    none = torch.zeros(F, dtype=torch.float32, device="cpu")
    return W_enc, W_dec, none if gated_one else tensors.take("encoder.bias", F), b_dec


def _k(
    kind: str, tensors: Tensors, trainer: dict[str, Any], source: Source, given: Given
) -> int | None:
    if _rule_of(kind) not in ("topk", "batch_topk"):
        return None
    stored = integer(tensors.number("k"), "k", source.where)
    told = integer(trainer.get("k"), "k", source.where)
    if None not in (stored, told) and stored != told:
        raise ConversionError(f"{source.where}: k is {stored} in {WEIGHTS}, {told} in {CONFIG}.")
    settled: int = given.settle("k", told if stored is None else stored, source)
    return settled


def _threshold(kind: str, tensors: Tensors, F: int, source: Source, given: Given) -> Tensor | None:
    if kind == "JumpReluAutoEncoder":
        return tensors.take("threshold", F).float()
    if _rule_of(kind) != "batch_topk":
        return None
    stored = tensors.number("threshold")
    known = None if stored is None or stored < 0 else stored
    return torch.tensor(
        float(given.settle("threshold", known, source)), dtype=torch.float32, device="cpu"
    )


def _rule_of(kind: str) -> str:
    return {
        "AutoEncoder": "relu",
        "AutoEncoderNew": "relu",
        "AutoEncoderTopK": "topk",
        "BatchTopKSAE": "batch_topk",
        "MatryoshkaBatchTopKSAE": "batch_topk",
    }.get(kind, "jumprelu")
