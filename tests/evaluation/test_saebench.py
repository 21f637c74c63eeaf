"""The adapter gives what our own encode and decode give, in the shape that SAEBench reads."""

from dataclasses import asdict

import pytest
import torch
from helpers.saes import KINDS, NORMED, D, make, rows

from hf_switch_sae import ConfigError
from hf_switch_sae.evaluation.saebench import SAEBenchAdapter

PLACE = {"hookpoint": "layers.7.resid_post", "base_model": "org/lm"}
EVERY_KIND = pytest.mark.parametrize("kind", list(KINDS))


@EVERY_KIND
def test_activations_and_reconstructions_are_our_own(kind):
    sae = make(kind, **PLACE)
    adapter, x = SAEBenchAdapter(sae), rows(12).view(3, 4, D)

    acts = adapter.encode(x)
    features = sae.encode(x)

    assert acts.shape == (3, 4, sae.config.num_features)
    assert torch.equal(acts, features.to_dense())
    torch.testing.assert_close(adapter.decode(acts), sae.decode(features))
    torch.testing.assert_close(adapter(x), sae(x).reconstruction)
    torch.testing.assert_close(adapter(x[0]), adapter(x)[0])


@pytest.mark.parametrize("kind", ["plain_topk", "plain_relu", "plain_jumprelu"])
def test_with_one_expert_the_dense_weights_are_the_encoder(kind):
    """As SAEBench's own classes compute it: (x - b_dec) @ W_enc + b_enc."""
    adapter, x = SAEBenchAdapter(make(kind, **PLACE)), rows()
    acts = adapter.encode(x)
    dense = torch.relu((x - adapter.b_dec) @ adapter.W_enc + adapter.b_enc)
    active = acts > 0
    assert active.any()
    torch.testing.assert_close(acts[active], dense[active])


def test_with_many_experts_a_tokens_features_are_of_its_own_expert():
    adapter = SAEBenchAdapter(make(**PLACE))
    experts = (adapter.encode(rows()) > 0).view(21, 4, 6).any(-1).sum(-1)
    assert (experts <= 1).all()


@EVERY_KIND
def test_it_has_the_shapes_and_fields_that_saebench_reads(kind):
    sae = make(kind, **PLACE)
    adapter = SAEBenchAdapter(sae, context_size=128)
    d_sae = sae.config.num_features
    assert adapter.W_enc.shape == (D, d_sae)
    assert adapter.W_dec.shape == (d_sae, D)
    assert adapter.b_enc.shape == (d_sae,)
    assert adapter.b_dec.shape == (D,)
    torch.testing.assert_close(adapter.W_enc[:, 1], sae.W_enc.flatten(0, 1)[1])
    cfg = asdict(adapter.cfg)  # SAEBench writes it so
    assert (cfg["d_in"], cfg["d_sae"], cfg["model_name"]) == (D, d_sae, "org/lm")
    assert (cfg["hook_layer"], cfg["hook_name"]) == (7, "blocks.7.hook_resid_post")
    assert (cfg["dtype"], cfg["device"]) == ("float32", "cpu")
    assert cfg["metadata"]["context_size"] == cfg["context_size"] == 128
    expected = sae.config.activation if sae.config.num_experts == 1 else "switch"
    assert cfg["architecture"].startswith(expected)


def test_it_passes_saebenchs_checks_of_a_decoder():
    """Rows of length 1; encode, decode and forward agree; a change of dtype and device is told."""
    adapter = SAEBenchAdapter(make(**PLACE))
    assert adapter.check_decoder_norms()
    norms = adapter.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0)
    with torch.no_grad():
        adapter.sae.experts[0].W_dec[0, 0] *= 1.5
    assert not adapter.check_decoder_norms()


def test_moving_it_moves_the_sae_and_tells_cfg():
    adapter = SAEBenchAdapter(make(**PLACE))
    assert adapter.to(dtype=torch.bfloat16, device="cpu") is adapter
    assert adapter.dtype == torch.bfloat16
    assert adapter.cfg.dtype == "bfloat16"
    assert adapter.check_decoder_norms()
    x = rows()
    assert adapter.encode(x).dtype == torch.bfloat16
    assert adapter.decode(adapter.encode(x)).dtype == torch.bfloat16
    assert adapter(x.to(torch.bfloat16)).isfinite().all()


def test_a_place_before_a_block_has_its_name_and_a_layer_can_be_given():
    before = make(hookpoint="layers.2.resid_pre", base_model="org/lm")
    assert SAEBenchAdapter(before).cfg.hook_name == "blocks.2.hook_resid_pre"
    given = SAEBenchAdapter(make(), model_name="pythia-70m-deduped", hook_layer=0)
    assert (given.cfg.hook_layer, given.cfg.hook_name) == (0, "blocks.0.hook_resid_post")
    assert given.cfg.model_name == given.cfg.metadata.model_name == "pythia-70m-deduped"


def test_it_is_measured_outside_of_training():
    sae = make("batch_topk", **PLACE).train()
    adapter, x = SAEBenchAdapter(sae), rows()
    alone = torch.cat([adapter.encode(row[None]) for row in x])
    torch.testing.assert_close(adapter.encode(x), alone)


@pytest.mark.parametrize("kind", list(NORMED))
def test_an_sae_whose_decode_needs_the_token_is_refused(kind):
    with pytest.raises(ConfigError, match="input_norm"):
        SAEBenchAdapter(make(kind, **PLACE))


def test_without_a_model_or_a_place_it_says_what_to_give():
    with pytest.raises(ConfigError, match="model_name"):
        SAEBenchAdapter(make(hookpoint=PLACE["hookpoint"]))
    with pytest.raises(ConfigError, match="hook_layer"):
        SAEBenchAdapter(make(base_model="org/lm"))
