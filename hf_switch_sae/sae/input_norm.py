"""Residual stream -> the units in which an SAE with a normalized input reads each token.

    layer_norm       h = (x - mean) / (std + 1e-5)      x = std * h + mean
    constant_norm    h = x / size                       x = size * h,     size = |x| / sqrt(d)

std or size is one of the SAE's own units, measured in those of the language model: an activation
times it is again exactly what is added along its decoder row.

Beware std is the unbiased one, and the way back has no 1e-5, as in the training of released SAEs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from hf_switch_sae.ops.precision import wide

InputNorm = Literal["none", "layer_norm", "constant_norm"]
_EPSILON = 1e-5


class Unit(NamedTuple):
    """What each token was divided by, and what was taken away from it before; float32 or 64."""

    scale: Tensor
    """[..., 1]"""
    shift: Tensor
    """[..., 1]"""

    def back(self, h: Tensor) -> Tensor:
        """[..., d] in the language model's units, of [..., d] or [d] in the SAE's."""
        return self.scale * h + self.shift


def unit_of(x: Tensor, norm: InputNorm) -> Unit:
    """The unit of each token of x [..., d]; "none" has none."""
    x = wide(x)
    if norm == "layer_norm":
        return Unit(x.std(dim=-1, keepdim=True), x.mean(dim=-1, keepdim=True))
    size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return Unit(size, size.new_zeros(size.shape))


def normalized(x: Tensor, norm: InputNorm) -> tuple[Tensor, Unit]:
    """What the SAE reads of x [..., d], in the dtype of x, and each token's unit."""
    unit = unit_of(x, norm)
    # a token of nothing but zeros has no size
    divisor = unit.scale + _EPSILON if norm == "layer_norm" else unit.scale.clamp_min(1e-30)
    return ((wide(x) - unit.shift) / divisor).to(x.dtype), unit
