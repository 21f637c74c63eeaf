"""What recorded features come from: models -> the identity that a store keeps.

Beware transformers 5 no longer notes the commit that a model was loaded from, so an LM's revision
       is known only if the caller gives it; an SAE's config notes its own. Weights identify both:
       an SAE's are hashed whole, an LM's by the samples of its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae.lm.config import config_of, name_without_path
from hf_switch_sae.lm.fingerprint import fingerprint
from hf_switch_sae.lm.hookpoints import language_model
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.store import Provenance
from hf_switch_sae.text.tokenizer import tokenizer_identity

_RULES = (
    "activation",
    "k",
    "num_experts",
    "num_experts_per_token",
    "subtract_b_dec",
    "apply_router_probs",
    "norm_topk_prob",
)


def provenance_of(
    lm: nn.Module,
    sae: SwitchSAE,
    hookpoint: str,
    *,
    lm_revision: str | None = None,
    sae_revision: str | None = None,
    tokenizer: Any = None,
    dataset: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> Provenance:
    """What a store of this SAE's features on this language model is made from.

    Args:
        lm: the language model, wrapped or not.
        sae: the SAE.
        hookpoint: where it reads.
        lm_revision, sae_revision: commits they were loaded from, if known; of an SAE its config's
            own by default.
        tokenizer: that made the tokens, or None.
        dataset: the documents' own provenance (`text.Documents`), or None.
        text: how they became tokens, JSON-able.
    """
    model = language_model(lm)
    config = sae.config
    return Provenance(
        num_features=config.num_features,
        num_experts=config.num_experts,
        num_experts_per_token=config.num_experts_per_token,
        k=config.k,
        hookpoint=hookpoint,
        sae={
            "name": name_without_path(sae.name_or_path),
            "revision": sae_revision or _pinned(sae),
            "weights": weights_hash(sae),
        },
        lm={
            "name": name_without_path(getattr(config_of(model), "_name_or_path", "")),
            "revision": lm_revision,
            "fingerprint": _sha256(json.dumps(fingerprint(model), sort_keys=True).encode()),
        },
        tokenizer=None if tokenizer is None else tokenizer_identity(tokenizer),
        dataset=dataset,
        text=text or {},
    )


def _pinned(sae: SwitchSAE) -> str | None:
    """The commit an SAE was loaded at, as its config notes it; of a copy elsewhere it says none."""
    source = sae.config.source or {}
    return source.get("revision") if source.get("repo") == sae.name_or_path else None


@torch.no_grad()
def weights_hash(sae: SwitchSAE) -> str:
    """SHA-256, in hex, of the rules, weights and dtype that decide an SAE's features.

    It does not depend on expert groups and devices; it does on dtype, as acts do.
    """
    # what encodes: two SAEs with equal hashes have equal features
    rules = {name: getattr(sae.config, name) for name in _RULES}
    if sae.config.input_norm != "none":  # left out otherwise, as hashes of before it was known
        rules["input_norm"] = sae.config.input_norm
    digest = hashlib.sha256(json.dumps(rules).encode())
    for name, tensor in _tensors(sae):
        # names and shapes too, so that no other split of the same bytes is equal
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole = tensor.detach().contiguous().reshape(-1)
        for at in range(0, whole.numel(), 1 << 24):  # on the CPU a piece at a time
            piece = whole[at : at + (1 << 24)].cpu()
            digest.update(piece.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(sae: SwitchSAE) -> Iterator[tuple[str, Tensor]]:
    yield "W_enc", sae.W_enc
    yield "W_dec", sae.W_dec
    if (b_enc := sae.b_enc) is not None:
        yield "b_enc", b_enc
    yield "b_dec", sae.b_dec
    if sae.config.num_experts > 1:
        yield "router.weight", sae.router.weight
        yield "b_router", sae.b_router
    yield "input_scale", sae.input_scale
    yield "outlier_norm", sae.outlier_norm
    if sae.config.activation in ("jumprelu", "batch_topk"):
        yield "threshold", sae.threshold


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
