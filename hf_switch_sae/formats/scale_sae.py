"""Scale-SAE: an encoder module for each expert, whose rows are rebuilt from their mean.

    rows_e = M mean(W_e) + (1 + omega_e) (W_e - mean(W_e))          M = lp_transform_encoder.weight
    p = softmax(gate.weight @ (x - b_gate) + gate.bias);  S = the e largest of p
    acts = topk_k( softmax(p over S)_e * relu(rows_e @ (x - b_dec) + bias_e) );  x_hat as usual

The rebuilt rows take the place of the stored ones, and the gate's bias becomes a shift of b_gate.
With one expert per token, the second softmax is always 1; with several, the SAE is refused.

Beware `beta` and `lp_transform_decoder.weight` are stored, but no code uses them. The tensors tell
       neither k nor the number of experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.checkpoint import Checkpoint, Given, integer, origin_fields
from hf_switch_sae.formats.dense import keep_topk
from hf_switch_sae.formats.dictionary_learning import CLASSES
from hf_switch_sae.hub.source import Source
from hf_switch_sae.hub.tensors import Tensors
from hf_switch_sae.lm.names import hookpoint_of

NAME = "scale_sae"
CONFIG, WEIGHTS = "config.json", "ae.pt"
_UNUSED = ("beta", "lp_transform_decoder.weight")


def recognizes(source: Source) -> bool:
    """Told by `ae.pt` with expert modules in it."""
    if WEIGHTS not in source.files:
        return False
    # a config that names a class of dictionary_learning spares us a look into the weights
    known = source.section(CONFIG, "trainer").get("dict_class") in CLASSES
    return not known and any(n.startswith("expert_modules.") for n in source.names(WEIGHTS))


def read(source: Source, given: Given) -> Checkpoint:
    """Take over a Scale-SAE.

    Raises:
        ConversionError: several experts per token, a gate whose bias can't be folded, or a missing
            parameter.
    """
    trainer = source.section(CONFIG, "trainer")
    tensors = source.tensors(WEIGHTS)
    d = len(b_dec := tensors.take("b_dec", None))
    E = len(gate := tensors.take("gate.weight", None, d))
    gate_bias, b_gate = tensors.take("gate.bias", E), tensors.take("b_gate", d)
    rows, bias, W_dec = _experts(tensors, E, d)
    tensors.finish(_UNUSED)

    # what the tensors don't tell
    told = integer(trainer.get("e"), "e", source.where)
    if given.settle("experts_per_token", told, source) != 1:
        raise ConversionError(
            f"{source.where} encodes a token by {told or given.experts_per_token} experts, "
            "weighted by a softmax over their probabilities; a SwitchSAE weights by the "
            "probabilities themselves."
        )
    k = given.settle("k", integer(trainer.get("k"), "k", source.where), source)
    m = bias.shape[1]

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        probs = ((x - b_gate.float()) @ gate.float().T + gate_bias.float()).softmax(-1)
        chosen = torch.zeros_like(probs).scatter(-1, probs.argmax(-1, keepdim=True), 1.0)
        pre = torch.einsum("nd,emd->nem", x - b_dec.float(), rows) + bias
        acts = keep_topk((pre.relu() * chosen[..., None]).reshape(len(x), E * m), k)
        return acts, acts @ W_dec.float().reshape(E * m, d) + b_dec.float()

    layer = integer(trainer.get("layer"), "layer", source.where)
    place = None if layer is None else hookpoint_of(layer)
    their_name = trainer.get("submodule_name")
    config = {
        **{"hidden_size": d, "num_features": E * m, "num_experts": E, "k": k},
        **{"encoder_bias": True, "apply_router_probs": False},
        **origin_fields(source, given, NAME, place, their_name, trainer.get("lm_name")),
    }
    weights = {
        **{"W_enc": rows, "W_dec": W_dec, "b_enc": bias, "b_dec": b_dec},
        **{"router.weight": gate, "b_router": _shift(gate, gate_bias, b_gate, source)},
    }
    return Checkpoint(NAME, config, weights, formula)


def _experts(tensors: Tensors, E: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rebuilt encoder rows [E, m, d], their bias [E, m], decoder [E, m, d]."""
    omega = tensors.take("omega", E).float()
    low_pass = tensors.take("lp_transform_encoder.weight", d, d).float()
    rows, biases, decoders = [], [], []
    m: int | None = None
    for e in range(E):
        # the low pass keeps the rows' mean, and omega scales what differs from it
        W = tensors.take(f"expert_modules.{e}.encoder.weight", m, d).float()
        m = len(W)
        mean = W.mean(0)
        rows.append(low_pass @ mean + (1 + omega[e]) * (W - mean))
        biases.append(tensors.take(f"expert_modules.{e}.encoder.bias", m).float())
        decoders.append(tensors.take(f"expert_modules.{e}.decoder", m, d))
    return torch.stack(rows), torch.stack(biases), torch.stack(decoders)


def _shift(gate: Tensor, bias: Tensor, center: Tensor, source: Source) -> Tensor:
    """b_router [d], such that gate @ (x - b_router) = gate @ (x - center) + bias."""
    # gate @ offset = bias has a solution unless the gate's rows are dependent
    # gelsd finds the shortest offset, and takes dependent rows too
    wide, wanted = gate.double(), bias.double()
    offset = torch.linalg.lstsq(wide, wanted[:, None], driver="gelsd").solution[:, 0]
    if not torch.allclose(wide @ offset, wanted, atol=1e-6, rtol=1e-6):
        raise ConversionError(
            f"the gate of {source.where} has a bias that no shift of b_gate equals (its rows are "
            "dependent), and a SwitchSAE's router has no bias."
        )
    shifted: Tensor = (center.double() - offset).float()
    return shifted
