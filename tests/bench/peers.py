"""The SAEs that ours are measured against, each with its own package's forward and update.

Each has the same width and k. A dense TopK SAE is another model than a Switch SAE: what is compared
is the compute of a call at equal width and k, not quality at equal compute. A package that is not
installed is left out (`make bench` installs them all).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[int, int, int], Any]


@dataclass(frozen=True)
class Peer:
    """One peer of given size: what it does with tokens [n, d]."""

    forward: Callable[[Tensor], Any]
    """Features and reconstruction, as in inference."""
    update: Callable[[Tensor], Any]
    """One training step, from forward to optimizer."""


def sparsify(d: int, num_features: int, k: int) -> Peer:
    """eai-sparsify's SparseCoder, with fused Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d, SparseCoderConfig(num_latents=num_features, k=k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def update(x: Tensor) -> None:
        optimizer.zero_grad()
        sae(x).fvu.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        sae.set_decoder_norm_to_unit_norm()

    def forward(x: Tensor) -> Tensor:
        found = sae.encode(x)
        return sae.decode(found.top_acts, found.top_indices)

    return Peer(forward, update)


def dictionary_learning(d: int, num_features: int, k: int) -> Peer:
    """dictionary_learning's AutoEncoderTopK and the update of its TopKTrainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(10_000, d, num_features, k, layer=0, lm_name="", device="cpu")
    trainer.ae.b_dec.data.zero_()
    return Peer(lambda x: trainer.ae.decode(trainer.ae.encode(x)), lambda x: trainer.update(1, x))


def saelens(d: int, num_features: int, k: int) -> Peer:
    """SAELens's TopK training SAE, with fused Adam."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=num_features, k=k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def update(x: Tensor) -> None:
        optimizer.zero_grad()
        sae.training_forward_pass(TrainStepInput(x, {}, None, 1, False)).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    return Peer(lambda x: sae.decode(sae.encode(x)), update)


def dense_masked(d: int, num_features: int, k: int) -> Peer:
    """A Switch SAE as its authors compute it: every expert, then a mask; Adam as they call it."""
    sae = _DenseMasked(d, num_features, k, num_experts=32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)

    def update(x: Tensor) -> None:
        optimizer.zero_grad()
        x_hat, probs, expert = sae(x)
        load = nn.functional.one_hot(expert, sae.num_experts).float().mean(0)
        balance = sae.num_experts * (load * probs.mean(0)).sum()
        ((x_hat - x).square().sum(-1).mean() + 3 * d * balance).backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        W, grad = sae.W_dec.data, sae.W_dec.grad
        grad -= (grad * W).sum(-1, keepdim=True) * W
        optimizer.step()
        W /= W.norm(dim=-1, keepdim=True)

    return Peer(lambda x: sae(x)[0], update)


class _DenseMasked(nn.Module):
    def __init__(self, d: int, num_features: int, k: int, num_experts: int) -> None:
        super().__init__()
        self.k, self.num_experts = k, num_experts
        self.W_enc = nn.Parameter(torch.randn(num_features, d) / d)
        self.W_dec = nn.Parameter(nn.functional.normalize(self.W_enc.detach().clone(), dim=-1))
        self.router = nn.Parameter(torch.randn(num_experts, d) / d)
        self.b_dec, self.b_router = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = ((x - self.b_router) @ self.router.T).softmax(-1)
        gate, expert = probs.max(-1)
        mask = torch.zeros_like(probs).scatter(1, expert[:, None], gate[:, None])
        pre = ((x - self.b_dec) @ self.W_enc.T).relu()
        masked = pre * mask.repeat_interleave(len(self.W_enc) // self.num_experts, 1)
        acts, ids = masked.topk(self.k, sorted=False)
        x_hat = nn.functional.embedding_bag(ids, self.W_dec, per_sample_weights=acts, mode="sum")
        return x_hat + self.b_dec, probs, expert


PEERS: dict[str, Make] = {
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "SAELens": saelens,
    "dense masked": dense_masked,
}


def installed(d: int, num_features: int, k: int) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that can be built here, and why the others can't."""
    found, missing = {}, {}
    for name, make in PEERS.items():
        try:
            found[name] = make(d, num_features, k)
        except ImportError as err:
            missing[name] = str(err)
    return found, missing
