"""The Switch SAE of the paper's own code: `ae.pt` and `config.json`; read and written.

    p = softmax(router.weight @ (x - b_router));  e = argmax p
    acts = topk_k( p_e * relu(encoder.weight @ (x - b_dec)) ), features of expert e only
    x_hat = acts @ decoder + b_dec                     encoder.weight, decoder [F, d]

Expert e owns features e * F/E to (e + 1) * F/E - 1. With `heaviside`, p_e is left out.

Beware The tensors tell neither k nor heaviside. Two variants compute what a SwitchSAE can't: the
       mixture of experts (`gate.*`, with a relu before the softmax), and the one with an expert
       that is always on, without a router row.

Source: Mudide et al. 2024, arXiv:2410.08201, github.com/amudide/switch_sae.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.checkpoint import Checkpoint, Given, integer, origin_fields
from hf_switch_sae.formats.dense import lost_bound, write_checkpoint
from hf_switch_sae.formats.dictionary_learning import CONFIG, WEIGHTS, place_of
from hf_switch_sae.hub.source import Source
from hf_switch_sae.lm.names import hookpoint_of, layer_of
from hf_switch_sae.sae.model import SwitchSAE

NAME = "switch_sae"


def recognizes(source: Source) -> bool:
    """Told by `ae.pt`, and a class of this code or a decoder that is a bare parameter."""
    if WEIGHTS not in source.files:
        return False
    kind = source.section(CONFIG, "trainer").get("dict_class")
    return (
        # the MoE is recognized so that `read` can refuse it by name
        kind in ("SwitchAutoEncoder", "MoEAutoEncoder")
        or "switch" in str(kind).lower()
        or (kind is None and "decoder" in source.names(WEIGHTS))  # theirs is decoder.weight
    )


def read(source: Source, given: Given) -> Checkpoint:
    """Take over a Switch SAE.

    Raises:
        ConversionError: one of its variants, or a missing parameter.
    """
    trainer = source.section(CONFIG, "trainer")
    tensors = source.tensors(WEIGHTS)
    _refuse_variants(trainer, set(tensors.held), source)

    # the tensors, and what they don't tell
    d = integer(trainer.get("activation_dim"), "activation_dim", source.where)
    F = integer(trainer.get("dict_size"), "dict_size", source.where)
    W_enc = tensors.take("encoder.weight", F, d)
    F, d = W_enc.shape
    W_dec, b_dec = tensors.take("decoder", F, d), tensors.take("b_dec", d)
    router, b_router = tensors.take("router.weight", None, d), tensors.take("b_router", d)
    tensors.finish()
    E = integer(trainer.get("experts"), "experts", source.where) or len(router)
    if len(router) != E or F % E:
        raise ConversionError(
            f"{source.where} has {E} experts, {len(router)} router rows and {F} features: every "
            "expert needs a row (one that is always on has none) and an equal share of features."
        )
    k = given.settle("k", integer(trainer.get("k"), "k", source.where), source)
    heaviside = given.settle("heaviside", trainer.get("heaviside"), source)

    # every expert encodes every token here; all but the chosen one have the weight 0
    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        probs = ((x - b_router.float()) @ router.float().T).softmax(-1)
        top, expert = probs.max(-1, keepdim=True)
        weight = torch.zeros_like(probs).scatter(
            -1, expert, torch.ones_like(top) if heaviside else top
        )
        acts = ((x - b_dec.float()) @ W_enc.float().T).relu() * weight.repeat_interleave(F // E, -1)
        values, ids = acts.topk(k)
        acts = torch.zeros_like(acts).scatter(-1, ids, values)
        return acts, acts @ W_dec.float() + b_dec.float()

    their_name, layer = trainer.get("submodule_name"), trainer.get("layer")
    place = place_of(trainer)
    # a config without a submodule's name may still have the layer
    if place is None and their_name is None and isinstance(layer, int):
        place = hookpoint_of(layer)  # what the paper's scripts hook: transformer.h[layer]
    config = {
        **{"hidden_size": d, "num_features": F, "num_experts": E, "k": k},
        "apply_router_probs": not heaviside,
        **origin_fields(source, given, NAME, place, their_name, trainer.get("lm_name")),
    }
    weights = {
        "W_enc": W_enc.reshape(E, F // E, d),
        "W_dec": W_dec.reshape(E, F // E, d),
        **{"b_dec": b_dec, "router.weight": router, "b_router": b_router},
    }
    return Checkpoint(NAME, config, weights, formula)


def write(sae: SwitchSAE, folder: Path) -> tuple[str, ...]:
    """Write `ae.pt` and `config.json` for `SwitchAutoEncoder`; returns what a user should know.

    Raises:
        ConversionError: the SAE has something that the paper's code does not compute.
    """
    # refuse what the format can't hold
    c = sae.config
    needs = {
        "activation": (c.activation, "topk"),
        "input_norm": (c.input_norm, "none"),
        "num_experts_per_token": (c.num_experts_per_token, 1),
        "encoder_bias": (c.encoder_bias, False),
        "subtract_b_dec": (c.subtract_b_dec, True),
    }
    for name, (has, want) in needs.items():
        if has != want:
            raise ConversionError(f"{NAME} computes {name}={want!r} only, and this has {has!r}.")
    if c.num_experts == 1:
        raise ConversionError(f"{NAME} needs a router, and this SAE has one expert.")

    # router and biases take the input scale in: softmax(W (s x - b)) = softmax(s W (x - b / s))
    s = sae.input_scale.float().cpu()
    with torch.no_grad():
        held = {
            "encoder.weight": sae.W_enc.float().cpu().reshape(c.num_features, -1),
            "decoder": sae.W_dec.float().cpu().reshape(c.num_features, -1),
            "router.weight": sae.router.weight.float().cpu() * s,
            "b_dec": sae.b_dec.float().cpu() / s,
            "b_router": sae.b_router.float().cpu() / s,
        }
    place = layer_of(c.hookpoint)
    trainer = {
        "trainer_class": "SwitchTrainer",
        "dict_class": "SwitchAutoEncoder",
        "activation_dim": c.hidden_size,
        "dict_size": c.num_features,
        "k": c.k,
        "experts": c.num_experts,
        "heaviside": not c.apply_router_probs,
        "lm_name": c.base_model,
        "layer": place[0] if place else None,
        "submodule_name": f"{place[1]}_layer_{place[0]}" if place else None,
    }
    told = {name: value for name, value in trainer.items() if value is not None}
    tensors = {name: value.detach().clone() for name, value in held.items()}
    write_checkpoint(folder, {WEIGHTS: tensors, CONFIG: {"trainer": told}})
    return lost_bound(sae, NAME)


def _refuse_variants(trainer: dict[str, Any], names: set[str], source: Source) -> None:
    kind = str(trainer.get("dict_class"))
    if "gate.weight" in names or "moe" in kind.lower():
        raise ConversionError(
            f"{source.where} is a mixture of experts of the paper's code: its gate takes a relu "
            "before the softmax over the chosen experts, which a SwitchSAE does not compute."
        )
    if "1on" in kind.lower() or "1on" in str(trainer.get("trainer_class")).lower():
        raise ConversionError(
            f"{source.where} has an expert that is always on, without a router row; in a SwitchSAE "
            "every expert is routed."
        )
