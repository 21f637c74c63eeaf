"""A router begins towards the clusters of its rows."""

import torch
from saes import D, E, config

from hf_switch_sae import SwitchSAE
from hf_switch_sae.training.clusters import directions_of
from hf_switch_sae.training.start import start_from


def clustered(n: int = 400, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    centers = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q[:E]
    labels = torch.arange(n) % E
    lengths = 0.5 + 2 * torch.rand(n, 1, generator=generator)
    return lengths * (centers[labels] + noise * torch.randn(n, D, generator=generator)), labels


def test_directions_are_of_length_1_and_split_the_rows_into_their_clusters():
    for seed in range(20):  # from some starts two clusters share a center: not from all
        rows, labels = clustered()
        found = directions_of(rows, E, seed)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(E))
        own = (rows @ found.T).argmax(1)
        if all(len(own[labels == e].unique()) == 1 for e in range(E)) and len(own.unique()) == E:
            break
    else:
        raise AssertionError("no start finds the clusters")
    assert torch.equal(directions_of(rows, E, seed), found)


def test_an_empty_cluster_leaves_a_finite_direction():
    rows = torch.ones(9, D)
    assert directions_of(rows, E).isfinite().all()


def test_a_fresh_sae_sends_clusters_to_different_experts_and_no_logit_is_extreme():
    rows, _ = clustered()
    sae = SwitchSAE(config())
    start_from(sae, rows + 5.0, None, "data")
    logits = sae(rows + 5.0).router_logits
    assert len(logits.argmax(1).unique()) >= E - 1
    assert 0.5 < logits.abs().max() < 16
    few = SwitchSAE(config())
    before = few.router.weight.clone()
    start_from(few, rows[: E - 1], None, "data")
    torch.testing.assert_close(few.router.weight, before, atol=0, rtol=0)  # too few to cluster
