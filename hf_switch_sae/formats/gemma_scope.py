"""Gemma Scope 1 and 2: JumpReLU SAEs of Gemma 2 and Gemma 3.

    acts = relu(x W_enc + b_enc) * (x W_enc + b_enc > threshold);  x_hat = acts @ W_dec + b_dec

W_enc [d, F], W_dec [F, d]; nothing is subtracted. Gemma Scope 1 is `params.npz` without a config:
the address tells layer and site. Gemma Scope 2 is `params.safetensors`, its names in lower case,
and `config.json` tells the place.

Beware `att` reads what enters o_proj, not what attention adds to the stream. SAEs of the embedding
       were trained on it before Gemma multiplies it by sqrt(d), so that factor is folded in here.
       Transcoders read one place and write another, so they are refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.checkpoint import Checkpoint, Given, OneExpert, origin_fields
from hf_switch_sae.formats.dense import keep_above
from hf_switch_sae.formats.hookpoint_names import from_module_path, layer_in
from hf_switch_sae.hub.source import Source
from hf_switch_sae.lm.names import hookpoint_of

NAME = "gemma_scope"
ONE, TWO = "params.npz", "params.safetensors"
_RELEASE = re.compile(r".*(?:^|/)(gemma-scope[^/]*(?:/.*)?)$")
_EMBEDDING = re.compile(r"(?:^|/)embedding/width_")
_OTHER_KIND = re.compile(r"(?:^|[/_-])(transcoder|clt)s?(?:[/_-]|$)")


def recognizes(source: Source) -> bool:
    """Told by its files."""
    return bool({ONE, TWO} & set(source.files))


def read(source: Source, given: Given) -> Checkpoint:
    """Take over one SAE.

    Raises:
        ConversionError: a transcoder, or a missing parameter.
    """
    file = ONE if ONE in source.files else TWO
    config, tensors = source.json("config.json"), source.tensors(file)
    _refuse_transcoders(source, set(tensors.held), config)
    # Gemma Scope 1 writes W_enc, Gemma Scope 2 w_enc
    name = {wanted.lower(): wanted for wanted in tensors.held}
    W_enc = tensors.take(name.get("w_enc", "W_enc"), None, None)
    d, F = W_enc.shape
    W_dec = tensors.take(name.get("w_dec", "W_dec"), F, d)
    b_enc, b_dec = tensors.take("b_enc", F), tensors.take("b_dec", d)
    threshold = tensors.take("threshold", F).float()
    tensors.finish()
    scale = math.sqrt(d) if _EMBEDDING.search(_address(source)) else 1.0

    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = keep_above(x / scale @ W_enc.float() + b_enc.float(), threshold)
        return acts, (acts @ W_dec.float() + b_dec.float()) * scale

    # without a factor, the tensors are left in their own dtype, which `build` looks at
    ours = OneExpert(
        W_enc.T if scale == 1.0 else W_enc.T.float() / scale,
        W_dec if scale == 1.0 else W_dec.float() * scale,
        b_enc,
        b_dec if scale == 1.0 else b_dec.float() * scale,
        "jumprelu",
        subtracts=False,
        threshold=threshold,
    )
    their_name = config.get("hf_hook_point_in", _address(source))
    about = origin_fields(
        source, given, NAME, _place(source, config), their_name, _base_model(source, config)
    )
    return ours.checkpoint(NAME, about, formula)


def _address(source: Source) -> str:
    """The part of the address that the release gave it; a user's own folders tell nothing."""
    if source.hub is not None:
        return source.where
    release = _RELEASE.match(source.where)
    # without the release's name, at most layer_20/width_16k/average_l0_71 is the release's own
    return release[1] if release else "/".join(source.where.split("/")[-3:])


def _refuse_transcoders(source: Source, names: set[str], config: dict[str, Any]) -> None:
    match = _OTHER_KIND.search(_address(source).lower())
    kind = match[1] if match else None
    reads, writes = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if kind or "affine_skip_connection" in names or (writes is not None and writes != reads):
        raise ConversionError(
            f"{source.where} is a {kind or 'transcoder'}: it reads one place and writes another, "
            "and a SwitchSAE does both in one."
        )
    # Gemma Scope 1 has no config, and all of it is jump_relu
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ConversionError(f"{source.where} is a {config['architecture']!r}, not a jump_relu.")


def _place(source: Source, config: dict[str, Any]) -> str | None:
    if config.get("hf_hook_point_in"):
        return from_module_path(config["hf_hook_point_in"])
    address = _address(source)
    if _EMBEDDING.search(address):
        # the embedding as it enters block 0, after Gemma's factor: hence the scale in `read`
        return hookpoint_of(0, "resid_pre")
    layer = layer_in(address, r"layer_(\d+)")
    # Gemma Scope 1 has the site in the repository's name, -pt-res or -pt-res-canonical;
    # Gemma Scope 2 in a folder's
    site = re.search(r"-(res|mlp|att)(?:-[a-z]+)?(?:/|$)|(resid_post|attn_out|mlp_out)", address)
    if layer is None or site is None:
        return None
    block = f"model.layers.{layer}"
    return {
        "res": hookpoint_of(layer),
        # an SAE of what the MLP adds to the stream: Gemma 2 normalizes that first
        "mlp": f"{block}.post_feedforward_layernorm.resid_post",
        "att": f"{block}.self_attn.o_proj.resid_pre",
    }.get(site[1] or {"resid_post": "res", "attn_out": "att", "mlp_out": "mlp"}[site[2]])


def _base_model(source: Source, config: dict[str, Any]) -> str | None:
    if config.get("model_name"):
        name = str(config["model_name"])
        return name if "/" in name else f"google/{name}"
    match = re.search(r"gemma-scope-(\d+b)-(pt|it)-", _address(source))
    return f"google/gemma-2-{match[1]}{'-it' if match[2] == 'it' else ''}" if match else None
