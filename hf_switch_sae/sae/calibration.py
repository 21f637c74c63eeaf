"""What calibrated edits and checks rest on, accumulated batch by batch.

How strongly and how often each feature fires, and how long a token's residual is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_switch_sae.features import SparseFeatures


class RunningStatistics:
    """Statistics of the tokens added so far; 4 bytes a token are kept, for the median norm."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.tokens = 0
        self.maximum = torch.zeros(num_features, device=device)
        """[num_features], largest activation, in the LM's own units."""
        self._fired = torch.zeros(num_features, dtype=torch.int64, device=device)
        self._norms: list[Tensor] = []

    def add(self, features: SparseFeatures, hidden_states: Tensor) -> None:
        """Add tokens: features [...] of hidden_states [..., hidden_size]."""
        flat = features.reshape(-1).to(self.maximum.device, torch.float32)
        ids, acts = flat.ids.flatten(), flat.acts.flatten()
        self.maximum.scatter_reduce_(0, ids, acts, "amax")
        self._fired.index_add_(0, ids, (acts > 0).long())
        self._norms.append(hidden_states.float().norm(dim=-1).flatten().cpu())
        self.tokens += len(flat)

    def rate(self) -> Tensor:
        """[num_features], share of tokens on which each feature is active."""
        return self._fired / self.tokens

    def median_norm(self) -> Tensor:
        """0-d, median norm of the residual stream."""
        return torch.cat(self._norms).median()
