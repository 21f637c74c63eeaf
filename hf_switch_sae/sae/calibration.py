"""Statistics that calibrated edits and checks rest on, measured once or kept up in training.

Room   batches of the residual stream -> an SAE's buffers: how strongly and how often each feature
       fires, how long a token's residual is, and the threshold of a batch_topk SAE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.sae.encoding import Encoded, EncodingSAE, encode_tokens

_THRESHOLD_WEIGHT = 0.01  # of a batch of training in the running mean of batch_topk's threshold


class CalibratedSAE(EncodingSAE, Protocol):
    """What calibration needs of a SwitchSAE."""

    feature_max: Tensor
    feature_rate: Tensor
    residual_norm: Tensor
    statistics_tokens: Tensor
    num_tokens_since_fired: Tensor

    def encode(self, hidden_states: Tensor) -> SparseFeatures:
        """Features of [..., d]."""

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""


@torch.no_grad()
def calibrate(sae: CalibratedSAE, batches: Iterable[Tensor]) -> None:
    """What `SwitchSAE.calibrate` does; arguments and errors are its."""
    # attention sinks would set the maximum of every feature that they fire
    batches = (batch[~sae.is_outlier(batch)] for batch in batches)
    with _in_mode(sae, training=False), _threshold_restored_on_error(sae):
        # the threshold decides what is active, so it is settled before anything is counted
        if sae.config.activation == "batch_topk":
            batches = list(batches)
            _set_threshold(sae, batches)
        found = RunningStatistics(sae.config.num_features, sae.b_dec.device)
        for batch in batches:
            found.add(sae.encode(batch), batch)
        if not found.tokens:
            raise ValueError(
                "calibrate() got no tokens: give at least one batch of the residual stream."
            )
    # only now, so that an error on the way leaves the SAE as it was
    sae.feature_max.copy_(found.maximum)
    sae.feature_rate.copy_(found.rate())
    sae.residual_norm.copy_(found.median_norm())
    sae.statistics_tokens.fill_(found.tokens)


@torch.no_grad()
def update_statistics(sae: CalibratedSAE, code: Encoded) -> None:
    """Count which features fired in a batch of training; of batch_topk also move the threshold.

    The threshold is a running mean of the smallest activation kept, in scaled units.
    """
    acts = code.acts
    if not len(acts):
        return
    since = sae.num_tokens_since_fired.view(sae.config.num_experts, -1)
    count_since_fired(since, acts, code.ids, code.tokens.expert_ids, code.counted_in_order)
    if sae.config.activation != "batch_topk":
        return
    smallest = acts.where(acts > 0, torch.inf).amin().float() * sae.input_scale
    moved = sae.threshold.lerp(smallest, _THRESHOLD_WEIGHT)
    moved = torch.where(sae.threshold < 0, smallest, moved)  # below 0 it is not known yet
    sae.threshold.copy_(torch.where(smallest.isfinite(), moved, sae.threshold))


def _set_threshold(sae: CalibratedSAE, batches: Iterable[Tensor]) -> None:
    """batch_topk: the mean over batches of the smallest activation that training would keep."""
    borders = []
    with _in_mode(sae, training=True):
        for batch in batches:
            acts = encode_tokens(sae, batch).acts
            if (acts > 0).any():
                borders.append(acts[acts > 0].amin().float() * sae.input_scale)
    if borders:
        sae.threshold.fill_(torch.stack(borders).mean())


@contextmanager
def _threshold_restored_on_error(sae: CalibratedSAE) -> Iterator[None]:
    before = sae.threshold.clone() if sae.config.activation == "batch_topk" else None
    try:
        yield
    except BaseException:
        if before is not None:
            sae.threshold.copy_(before)
        raise


@contextmanager
def _in_mode(sae: CalibratedSAE, training: bool) -> Iterator[None]:
    """batch_topk has one rule in training and another outside: choose one for a while."""
    was_training = sae.training
    sae.train(training)
    try:
        yield
    finally:
        sae.train(was_training)


class RunningStatistics:
    """Statistics of the tokens added so far; 4 bytes a token are kept, for the median norm."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.tokens = 0
        self.maximum = torch.zeros(num_features, dtype=torch.float32, device=device)
        """[num_features], largest activation, in the LM's own units."""
        self._fired = torch.zeros(num_features, dtype=torch.int64, device=device)
        self._norms: list[Tensor] = []

    def add(self, features: SparseFeatures, hidden_states: Tensor) -> None:
        """Add tokens: features [...] of hidden_states [..., hidden_size]."""
        flat = features.reshape(-1).to(self.maximum.device, torch.float32)
        ids, acts = flat.ids.flatten(), flat.acts.flatten()
        self.maximum.scatter_reduce_(0, ids, acts, "amax")
        self._fired.index_add_(0, ids, (acts > 0).long())
        # on the CPU: a GPU's memory is for activations
        self._norms.append(hidden_states.float().norm(dim=-1).flatten().cpu())
        self.tokens += len(flat)

    def rate(self) -> Tensor:
        """[num_features], share of tokens on which each feature is active."""
        return self._fired.float() / self.tokens  # counts alone would take torch's default dtype

    def median_norm(self) -> Tensor:
        """0-d, median norm of the residual stream."""
        return torch.cat(self._norms).median()


@torch.no_grad()
def count_since_fired(
    since: Tensor, acts: Tensor, ids: Tensor, expert_ids: Tensor, counted: Tensor | None
) -> None:
    """Bring `since` up to date: how many tokens its expert has seen since a feature was active.

    Args:
        since: [E, m] int64, changed in place.
        acts, ids: [n, slots]; a slot of 0 is no firing.
        expert_ids: [n, t], in [0, E).
        counted: [n] bool, which tokens count; None for all.
    """
    seen = torch.ones_like(expert_ids)
    fired = (acts > 0).long()
    if counted is not None:
        seen, fired = seen * counted[:, None], fired * counted[:, None]
    visits = since.new_zeros(len(since)).index_add_(0, expert_ids.flatten(), seen.flatten())
    since += visits[:, None]
    firings = since.new_zeros(since.numel()).index_add_(0, ids.flatten(), fired.flatten())
    # a feature that fired starts again, after its expert's tokens were added
    since.masked_fill_(firings.view_as(since) > 0, 0)
