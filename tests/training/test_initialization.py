"""A router begins toward the clusters of its rows."""

import torch
from helpers.saes import D, E, config

from hf_switch_sae import SwitchSAE
from hf_switch_sae.training.initialization import directions_of, start_from


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


def test_features_begin_at_rows_of_their_own_expert_each_at_another():
    rows, _ = clustered(n=2000)
    for sae in (SwitchSAE(config()), SwitchSAE(config(num_experts=1))):
        experts = sae.config.num_experts
        start_from(sae, rows, None, "data")
        centered = rows * sae.input_scale - sae.b_dec
        chosen = torch.zeros(len(rows), dtype=torch.long)
        if experts > 1:
            chosen = sae(rows).router_logits.argmax(1)
        for expert, (encoder, decoder) in enumerate(zip(sae.W_enc, sae.W_dec, strict=True)):
            own = centered[chosen == expert]
            own = torch.nn.functional.normalize(own - own.mean(0), dim=-1)
            begin = (decoder @ own.T).max(1)
            torch.testing.assert_close(begin.values, torch.ones(len(decoder)))
            assert len(begin.indices.unique()) == len(decoder)
            length = encoder.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(encoder / length, decoder)
            torch.testing.assert_close(length, length.mean().expand_as(length))


def test_features_without_a_row_of_their_own_begin_where_they_were():
    sae, rows = SwitchSAE(config()), torch.randn(3 * E, D)
    before = sae.W_dec.detach().clone()
    start_from(sae, rows.repeat(50, 1), None, "data")  # the same few, over and over
    moved = (sae.W_dec != before).any(-1)
    assert 0 < moved.sum() <= 3 * E
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.W_dec.shape[:2]))
    same = (sae.W_dec.flatten(0, 1) @ sae.W_dec.flatten(0, 1).T).fill_diagonal_(0)
    assert same.max() < 0.9999
