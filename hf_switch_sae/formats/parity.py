"""A conversion against the format's own arithmetic, on random vectors.

The vectors are Gaussian, and as long as it takes for features to fire: if nothing fired, any two
SAEs would agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_switch_sae.formats.checkpoint import Checkpoint, Formula
from hf_switch_sae.sae.model import SwitchSAE

# the formula's acts are dense: 32 rows of 100 000 features take 13 MB
_CHUNK = 32


@dataclass(frozen=True)
class Parity:
    """How far a converted SAE is from the formula of its format; prints as one line."""

    format: str
    vectors: int
    """How many were compared."""
    error: float
    """Largest difference between entries of the two reconstructions, in units of the largest entry.

    Of the vectors on which both have the same features active.
    """
    l0: float
    """Active features per vector, on average, by the formula."""
    other_features: int
    """Vectors on which the two do not have the same features active.

    There may be some: of a hundred thousand features, a few lie within rounding of their threshold.
    """

    @property
    def holds(self) -> bool:
        """Whether the two agree to 1e-5 of the largest entry, on at least 95 % of the vectors."""
        return self.error <= 1e-5 and self.other_features <= self.vectors / 20 and self.l0 > 0

    def __str__(self) -> str:
        verdict = "agrees" if self.holds else "DOES NOT AGREE"
        other = f", other features on {self.other_features}" if self.other_features else ""
        return (
            f"{self.format}: {verdict} with the format's formula on {self.vectors} random vectors: "
            f"error {self.error:.1e}, L0 {self.l0:.1f}{other}"
        )


@torch.no_grad()
def parity(sae: SwitchSAE, checkpoint: Checkpoint, vectors: int = 256) -> Parity:
    """Compare what `checkpoint.build()` gave with the format's formula on the file's own tensors.

    An SAE in another dtype is built again in float32 for this.
    """
    sae = sae if sae.dtype == torch.float32 else checkpoint.build(torch.float32)
    return parity_with(sae, checkpoint.formula, checkpoint.format, vectors)


@torch.no_grad()
def parity_with(sae: SwitchSAE, formula: Formula, format: str, vectors: int = 256) -> Parity:
    """Compare an SAE with any formula, x [n, d] -> dense acts [n, F], reconstruction [n, d]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        vectors, sae.config.hidden_size, generator=generator, dtype=torch.float32, device="cpu"
    )
    x = x * _scale(x[:_CHUNK], formula)
    worst = largest = active = 0.0
    other = 0
    for part in torch.split(x, _CHUNK):
        acts, wanted = formula(part)
        features = sae.encode(part)
        # a feature within rounding of its threshold changes the reconstruction by all it adds,
        # so such vectors are counted, and their reconstructions are not compared
        differ = ((features.to_dense() > 0) != (acts > 0)).any(1)
        off = (sae.decode(features, part) - wanted).abs().amax(1).where(~differ, 0.0)
        worst = max(worst, float(off.max()))
        largest = max(largest, float(wanted.abs().max()))
        active += float((acts > 0).sum())
        other += int(differ.sum())
    return Parity(format, vectors, worst / (largest or 1.0), active / vectors, other)


def _scale(x: torch.Tensor, formula: Formula) -> float:
    """The smallest power of 2, at least 1, at which vectors have one active feature on average."""
    # a power of 2 changes no digit of a float, so the vectors only get longer
    for power in range(16):
        if float((formula(x * 2.0**power)[0] > 0).sum()) >= len(x):
            return 2.0**power
    return 1.0
