"""What the forward pass of an SAE returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput

from hf_switch_sae.features import SparseFeatures


@dataclass
class SwitchSAEOutput(ModelOutput):
    """What `SwitchSAE.forward` returns; n is the number of tokens, [...] their shape."""

    loss: Tensor | None = None
    """0-d: the losses below, each times its coefficient in the config; over the mask's tokens.

    In training it is what to minimize; the last four are losses of training alone.
    """
    reconstruction: Tensor | None = None
    """[..., hidden_size], in the LM's own units and the dtype of the input."""
    features: SparseFeatures | None = None
    """acts and ids [..., slots]."""
    router_logits: Tensor | None = None
    """[n, num_experts] float32; None with one expert."""
    fvu: Tensor | None = None
    """0-d float32: squared error over squared deviation from the mean; nan under two tokens."""
    router_aux_loss: Tensor | None = None
    """0-d float32: num_experts * sum(f_e * P_e), 1 at perfect balance; 0 with one expert."""
    router_z_loss: Tensor | None = None
    """0-d float32: mean squared logsumexp of the router's logits; 0 if its coefficient is."""
    router_best_expert_loss: Tensor | None = None
    """0-d float32: the router's cross entropy to the experts that reconstruct best, measured on
    some of the tokens (and between its first two on all, if `second_expert_loss` is measured); 0 if
    its coefficient is, and outside training."""
    l1_loss: Tensor | None = None
    """0-d float32: how much is active, as a share of a token's length; 0 if its coefficient is, and
    outside training."""
    auxk_loss: Tensor | None = None
    """0-d float32: share of the error that dead features leave unexplained; 0 if none is dead, if
    its coefficient is, and outside training."""
    second_expert_loss: Tensor | None = None
    """0-d float32: the FVU, had each token gone to the router's second choice, with the weight of
    the first; 0 if its coefficient is, and outside training."""
