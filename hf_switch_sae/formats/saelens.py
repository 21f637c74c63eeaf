"""SAELens: `cfg.json` and `sae_weights.safetensors`, read and written.

    pre = (s * x - b_dec * apply_b_dec_to_input) @ W_enc + b_enc          W_enc [d, F], W_dec [F, d]
    acts = rule(pre);  x_hat = (acts @ W_dec + b_dec) / s

Rules: standard relu; topk; jumprelu, relu(pre) * (pre > threshold); batchtopk, the same with one
`topk_threshold`; gated. A gated SAE is a JumpReLU one exactly, as both its paths share W_enc:
(W x + b_gate > 0) * relu(e^r W x + b_mag) has weights e^r W and threshold b_mag - e^r b_gate.

With normalize_activations layer_norm or constant_norm_rescale x is the normalized token, and x_hat
is brought back to its mean and size.

Beware Before SAELens 6.0 the config is flat and uses other names. With `expected_average_only_in`,
       the file tells neither the scale s nor whether it was folded into the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.checkpoint import Checkpoint, Given, OneExpert, integer, origin_fields
from hf_switch_sae.formats.dense import (
    DenseWeights,
    keep_above,
    keep_topk,
    normed_by_hand,
    write_checkpoint,
)
from hf_switch_sae.formats.hookpoint_names import (
    from_module_path,
    from_transformer_lens,
    to_transformer_lens,
)
from hf_switch_sae.hub.source import Source
from hf_switch_sae.hub.tensors import Tensors
from hf_switch_sae.lm.fingerprint import block_path
from hf_switch_sae.lm.names import layer_of
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.model import SwitchSAE

NAME = "saelens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_OLD_NAMES = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
}
"""Kind of SAE that can be read -> our activation."""
_NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
"""Their `normalize_activations` -> our `input_norm`."""


def recognizes(source: Source) -> bool:
    """Told by its files."""
    return {CONFIG, WEIGHTS} <= set(source.files)


def read(source: Source, given: Given) -> Checkpoint:
    """Take over an SAE.

    Raises:
        ConversionError: a kind or a normalization that a SwitchSAE can't compute, or a missing
            parameter.
    """
    cfg = {_OLD_NAMES.get(name, name): value for name, value in source.json(CONFIG).items()}
    metadata = source.section(CONFIG, "metadata") or cfg
    tensors = source.tensors(WEIGHTS)
    kind, k = _kind(cfg, source, given)

    # the tensors, in SAELens' own orientation
    d = integer(cfg.get("d_in"), "d_in", source.where)
    W_enc = tensors.take("W_enc", d, integer(cfg.get("d_sae"), "d_sae", source.where))
    d, F = W_enc.shape
    W_dec, b_dec = tensors.take("W_dec", F, d), tensors.take("b_dec", d)
    scale, norm = _scale(cfg, source, given)

    # files from before 6.0 may not tell whether b_dec is subtracted; SAELens then did so
    subtract = bool(cfg.get("apply_b_dec_to_input", True))
    by_norm = bool(cfg.get("rescale_acts_by_decoder_norm", False))
    weights, rule = _rule(kind, tensors, F, k, W_enc, W_dec if by_norm else None)
    _refuse_finetuned(tensors, source)
    tensors.finish()
    enc, dec = W_enc.float(), W_dec.float()

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        h, size, shift = normed_by_hand(x, norm)
        acts = rule((scale * h - b_dec.float() * subtract) @ enc)
        kept = acts / dec.norm(dim=1) if by_norm else acts
        return acts, (kept @ dec + b_dec.float()) / scale * size + shift

    # at the ends of a block, TransformerLens' name is exact; within a block, the module's path is
    their_name = metadata.get("hook_name")
    place = from_transformer_lens(their_name)
    if place is None and metadata.get("hf_hook_name"):
        place = from_module_path(metadata["hf_hook_name"])
    origin = {"hook_name": their_name, "architecture": kind}
    model = metadata.get("model_name")
    about = origin_fields(source, given, NAME, place, their_name, model, **origin)
    # acts divided by a row's norm, times the row: acts times a row of length 1
    ours = OneExpert(
        weights.get("W_enc", W_enc.T),
        dec / dec.norm(dim=1, keepdim=True) if by_norm else W_dec,
        weights["b_enc"],
        b_dec,
        _ACTIVATIONS[kind],
        subtracts=subtract,
        k=k,
        threshold=weights.get("threshold"),
        input_scale=scale,
        input_norm=norm,
    )
    return ours.checkpoint(NAME, about, formula)


def write(sae: SwitchSAE, folder: Path) -> tuple[str, ...]:
    """Write what `SAE.load_from_disk(folder)` reads; returns what a user should know.

    A batch_topk SAE is written as a jumprelu one, as SAELens itself does.

    Raises:
        ConversionError: several experts, or a k beside a threshold rule.
    """
    dense, c = DenseWeights.of(sae, NAME, any_input_norm=True), sae.config
    tensors = {
        "W_enc": dense.W_enc.T,
        "b_enc": dense.b_enc,
        "W_dec": dense.W_dec,
        "b_dec": dense.b_dec,
    }
    if dense.threshold is not None:
        tensors["threshold"] = dense.threshold
    kind = {"relu": "standard", "topk": "topk"}.get(c.activation, "jumprelu")
    metadata = {
        "model_name": c.base_model,
        "hook_name": to_transformer_lens(c.hookpoint),
        "hf_hook_name": _module_of(c),
        "hf_revision": c.base_model_revision,
    }
    cfg: dict[str, Any] = {
        "architecture": kind,
        "d_in": c.hidden_size,
        "d_sae": c.num_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": dense.subtracts,
        "normalize_activations": {ours: theirs for theirs, ours in _NORMS.items()}[c.input_norm],
        "reshape_activations": "none",
        "metadata": {name: value for name, value in metadata.items() if value is not None},
    }
    if kind == "topk":
        cfg |= {"k": c.k, "rescale_acts_by_decoder_norm": False}
    write_checkpoint(folder, {WEIGHTS: tensors, CONFIG: cfg})
    return dense.notes


def _kind(cfg: dict[str, Any], source: Source, given: Given) -> tuple[str, int | None]:
    kind, k = cfg.get("architecture", "standard"), cfg.get("k")
    if cfg.get("activation_fn") == "topk":  # pre-6.0: a standard SAE with another activation
        kind, k = "topk", (cfg.get("activation_fn_kwargs") or {}).get("k", k)
    elif kind == "standard" and cfg.get("activation_fn", "relu") != "relu":
        raise ConversionError(f"{source.where} has activation_fn={cfg['activation_fn']!r}.")
    if kind not in _ACTIVATIONS:
        raise ConversionError(
            f"{source.where} is a {kind!r} of SAELens; only {', '.join(_ACTIVATIONS)} can be taken "
            "over."
        )
    if kind not in ("topk", "batchtopk"):
        return kind, None
    return kind, given.settle("k", integer(k, "k", source.where), source)


def _scale(cfg: dict[str, Any], source: Source, given: Given) -> tuple[float, str]:
    """Our input_scale and input_norm."""
    how = cfg.get("normalize_activations") or "none"
    how = "expected_average_only_in" if how is True else how  # early versions wrote a bool
    if how in _NORMS:
        return float(given.input_scale or 1.0), _NORMS[how]
    if how != "expected_average_only_in":
        raise ConversionError(
            f"{source.where} has normalize_activations={how!r}, which a SwitchSAE does not "
            "compute; it can't be taken over."
        )
    if given.input_scale is None:
        raise ConversionError(
            f"{source.where} was trained on scaled activations and does not tell the scale: pass "
            "input_scale=sqrt(d_in) / mean norm, or input_scale=1 if it is folded in already."
        )
    return float(given.input_scale), "none"


def _rule(
    kind: str, tensors: Tensors, F: int, k: int | None, W_enc: Tensor, by_norm_of: Tensor | None
) -> tuple[dict[str, Tensor], Any]:
    """The weights of ours that a kind of SAE has, and its own rule from x @ W_enc to acts.

    Args:
        by_norm_of: W_dec [F, d], if activations are scaled by its norms; else None.
    """
    if kind == "gated":
        gate, mag, r = (tensors.take(name, F) for name in ("b_gate", "b_mag", "r_mag"))
        # the formula keeps both paths: folded as ours are, it would not check the folding
        return gated(
            W_enc.T, gate, mag, r
        ), lambda xW: (xW + gate.float() > 0) * (r.float().exp() * xW + mag.float()).relu()
    b_enc = tensors.take("b_enc", F)
    # to scale what goes into the rule by the norms is to scale encoder rows and biases by them
    norm = None if by_norm_of is None else by_norm_of.float().norm(dim=1)
    ours = {"b_enc": b_enc}
    if norm is not None:
        ours = {"b_enc": b_enc.float() * norm, "W_enc": W_enc.T.float() * norm[:, None]}

    def pre(xW: Tensor) -> Tensor:
        return (xW + b_enc.float()) * (1.0 if norm is None else norm)

    if kind == "standard":
        return ours, lambda xW: pre(xW).relu()
    if kind == "topk":
        # `_kind` has settled k; the 1 is for the type checker
        return ours, lambda xW: keep_topk(pre(xW), k or 1)
    if kind == "batchtopk":
        one = tensors.number("topk_threshold")
        if one is None:
            raise ConversionError(f"{tensors.where} has no topk_threshold, which batchtopk needs.")
        threshold = torch.full((F,), one, dtype=torch.float32, device="cpu")
    elif "log_threshold" in tensors:
        threshold = tensors.take("log_threshold", F).float().exp()
    else:
        threshold = tensors.take("threshold", F).float()
    return {**ours, "threshold": threshold}, lambda xW: keep_above(pre(xW), threshold)


def gated(W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> dict[str, Tensor]:
    """W_enc [F, d], b_enc [F] and threshold [F] of the JumpReLU SAE that equals a gated one."""
    # e^r > 0, so the gate's condition may be multiplied by it: e^r W x > -e^r b_gate
    size = r_mag.float().exp()
    return {
        "W_enc": W_enc.float() * size[:, None],
        "b_enc": b_mag.float(),
        "threshold": b_mag.float() - size * b_gate.float(),
    }


def _refuse_finetuned(tensors: Tensors, source: Source) -> None:
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = tensors.plain(name)
        if factor is not None and bool((factor != 1).any()):
            raise ConversionError(
                f"{source.where} has a {name} other than 1, which SAELens no longer applies: "
                "it can't be told which of the two is meant."
            )


def _module_of(config: SwitchSAEConfig) -> str | None:
    """The module of the language model whose output the SAE reads; None if that is not known.

    None also if the SAE reads a module's input, as SAELens has no such name for it.
    """
    hookpoint, fingerprint = config.hookpoint or "", config.base_model_fingerprint or {}
    if not hookpoint.endswith(".resid_post"):
        return None
    layer = layer_of(hookpoint)
    if layer is None:
        return hookpoint.removesuffix(".resid_post")
    block, kind = block_path(fingerprint, layer[0]), str(fingerprint.get("model_type"))
    if block is None or kind not in CONFIG_MAPPING:
        return None
    # the fingerprint's path is within the base model, and SAELens starts at the whole one
    lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[kind], None)
    return None if lm is None else f"{lm.base_model_prefix}.{block}"
