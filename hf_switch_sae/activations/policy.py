"""Which tokens an SAE is trained on: not those whose residual is unlike all others.

    kept = not padding, not position 0, not a special token,
           norm <= 6 * the median norm at the hookpoint

The first position of a causal model, end-of-text tokens and the like are attention sinks. Their
residuals are a hundred times as long as others, so they would make up nearly all of the loss. The
bound on the norm goes into the SAE's `outlier_norm`: what training leaves out, use leaves out too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.errors import NonFiniteError


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens are kept.

    With several hookpoints a token is kept at all of them or at none, so that rows of one index
    belong to one token.
    """

    skip_first: bool
    """Leave out the first token of each context."""
    special_ids: tuple[int, ...]
    """Token ids to leave out."""
    outlier_factor: float | None
    """The largest norm kept, in multiples of the median norm; None keeps any norm."""
    outlier_norm: dict[str, float] = field(default_factory=dict)
    """Hookpoint -> the largest norm kept; empty until it is measured."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as the trainer logs and saves it."""
        return {
            "skip_first": self.skip_first,
            "special_ids": list(self.special_ids),
            "outlier_factor": self.outlier_factor,
            "outlier_norm": dict(self.outlier_norm),
        }

    def allows(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """[batch, seq] bool: tokens that position and id allow; mask is 0 on padding."""
        kept = mask.bool()
        if self.special_ids:
            # not by the mask: a special token in the middle is seen by the model, but not kept
            special = torch.tensor(self.special_ids, dtype=torch.int64, device=input_ids.device)
            kept = kept & ~torch.isin(input_ids, special)
        if self.skip_first:
            kept = kept.clone()  # it may still be the caller's mask
            kept[:, 0] = False
        return kept

    def rows(self, streams: dict[str, Tensor], allowed: Tensor) -> Tensor:
        """[kept] int64: flat indices of the tokens to keep, on the first stream's device.

        Args:
            streams: hookpoint -> [batch, seq, d].
            allowed: [batch, seq] bool, from `allows`.

        Raises:
            NonFiniteError: a token that would be kept is NaN or infinite.
        """
        device = next(iter(streams.values())).device
        allowed = allowed.to(device)
        # one flag for all streams, looked at once: each look at a value on a GPU waits for it
        kept, finite = allowed, torch.ones((), dtype=torch.bool, device=device)
        for name, stream in streams.items():
            norm = norms(stream).to(device)
            finite &= (norm.isfinite() | ~allowed).all()
            if name in self.outlier_norm:
                kept = kept & (norm <= self.outlier_norm[name])
        if not finite:
            raise NonFiniteError(
                f"NaN or infinity in the residual stream at {' or '.join(streams)}: is the "
                "language model's dtype too narrow (float16), or are its weights damaged?"
            )
        return kept.flatten().nonzero()[:, 0]


def norms(stream: Tensor) -> Tensor:
    """[...] float32: the length of each vector in [..., d]."""
    length: Tensor = torch.linalg.vector_norm(stream, dim=-1, dtype=torch.float32)
    return length
