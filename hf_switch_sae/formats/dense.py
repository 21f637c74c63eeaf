"""What formats of dense SAEs share: rules for their formulas, and our weights in their layout.

How    A format without an input scale gets it folded into biases and thresholds, which changes
       neither activations nor reconstruction. A format that always, or never, subtracts `b_dec`
       before encoding gets the difference folded into the encoder's bias:
       W (x - b) + c = W x + (c - W b).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.sae.model import SwitchSAE


def keep_topk(pre: Tensor, k: int) -> Tensor:
    """relu(pre) [n, F], with all but the k largest of each row set to 0."""
    # relu first: a row with fewer than k positive values must keep no negative one
    acts = pre.relu()
    values, ids = acts.topk(k, dim=-1)
    return torch.zeros_like(acts).scatter(-1, ids, values)


def keep_above(pre: Tensor, threshold: Tensor) -> Tensor:
    """relu(pre) [n, F] where pre exceeds the threshold ([F] or 0-d), else 0."""
    # relu too: nothing keeps a threshold from being below 0
    return pre.relu() * (pre > threshold)


def lost_bound(sae: SwitchSAE, format: str) -> tuple[str, ...]:
    """A sentence on the SAE's `outlier_norm`, which no format can hold; () if it has none."""
    if not math.isfinite(sae.outlier_norm):
        return ()
    return (
        f"{format} has no bound on a token's norm: tokens over {float(sae.outlier_norm):g} "
        "are no input of this SAE, and will be one of the exported.",
    )


def normed_by_hand(x: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor | float]:
    """The normalized input h, and size and shift with x = size * h + shift; for formulas.

    Written as the other projects write it, on purpose not with `sae.input_norm`.
    """
    if how == "layer_norm":
        # not nn.LayerNorm: both OpenAI and SAELens divide by d - 1, add 1e-5 to the standard
        # deviation rather than the variance, and leave it out on the way back
        mean = x.mean(-1, keepdim=True)
        std = ((x - mean) ** 2).sum(-1, keepdim=True).div(x.shape[-1] - 1).sqrt()
        return (x - mean) / (std + 1e-5), std, mean
    if how == "constant_norm":
        factor = math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True)
        return x * factor, 1 / factor, 0.0
    return x, x.new_ones(len(x), 1), 0.0


@dataclass(frozen=True)
class DenseWeights:
    """The weights of an SAE of one expert, its input scale folded in; float32, on the CPU.

    W_enc, W_dec [F, d], b_enc, threshold [F], b_dec [d]; `subtracts` as the SAE has it.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    subtracts: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, sae: SwitchSAE, format: str, any_input_norm: bool = False) -> DenseWeights:
        """The weights of an SAE, for a format.

        Raises:
            ConversionError: the SAE has several experts, a k beside a threshold rule, or an
                input_norm where the format has none.
        """
        # refuse what the format can't hold
        c = sae.config
        if c.input_norm != "none" and not any_input_norm:
            raise ConversionError(
                f"{format} normalizes no input, so it can't hold an SAE with "
                f"input_norm={c.input_norm!r}; format='saelens' can."
            )
        if c.num_experts > 1:
            raise ConversionError(
                f"{format} has no router, so it can't hold an SAE of {c.num_experts} experts; "
                "format='switch_sae' can."
            )
        if c.activation in ("jumprelu", "relu") and c.k is not None:
            raise ConversionError(f"{format} has no {c.activation!r} that also keeps at most k.")

        # pre = W (s x) + b fires above t just when W x + b / s fires above t / s
        # acts then come out in the units of x, so W_dec stays, and only b_dec is divided as well
        s = sae.input_scale.float().cpu()
        with torch.no_grad():
            held = {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
            flat = {n: None if v is None else v.float().cpu().clone() for n, v in held.items()}
        threshold = sae.threshold.cpu() / s if c.activation in ("jumprelu", "batch_topk") else None
        if threshold is not None and bool((threshold < 0).any()) and c.activation == "batch_topk":
            raise ConversionError("this batch_topk SAE has no threshold yet: calibrate() it first.")
        notes = lost_bound(sae, format)
        W_enc, W_dec = flat["W_enc"], flat["W_dec"]
        none = torch.zeros(c.num_features, dtype=torch.float32, device="cpu")
        b_enc = none if flat["b_enc"] is None else flat["b_enc"][0] / s
        b_dec = flat["b_dec"]
        assert W_enc is not None
        assert W_dec is not None
        assert b_dec is not None
        return cls(W_enc[0], W_dec[0], b_enc, b_dec / s, threshold, c.subtract_b_dec, notes)

    def bias_when_subtracting(self) -> Tensor:
        """The encoder's bias [F] for a format that encodes x - b_dec."""
        return self.b_enc if self.subtracts else self.b_enc + self.W_enc @ self.b_dec

    def bias_when_not(self) -> Tensor:
        """The encoder's bias [F] for a format that encodes x as it is."""
        return self.b_enc - self.W_enc @ self.b_dec if self.subtracts else self.b_enc

    def one_threshold(self, format: str) -> Tensor:
        """The threshold, 0-d, for a format that has one for all features.

        Raises:
            ConversionError: the features' thresholds differ.
        """
        assert self.threshold is not None
        if bool((self.threshold != self.threshold[0]).any()):
            raise ConversionError(f"{format} has one threshold for all features; these differ.")
        return self.threshold[0]


def write_checkpoint(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write .safetensors, .pt and .json files into a new folder."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        file = folder / name
        if name.endswith(".safetensors"):
            # safetensors refuses a transposed view
            save_file({key: value.contiguous() for key, value in content.items()}, file)
        elif name.endswith(".pt"):
            torch.save(dict(content), file)
        else:
            file.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
