"""Operations a token, against torch's own counter; parameters, against a model's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_switch_sae import ConfigError, SwitchSAE, SwitchSAEConfig, use_backend
from hf_switch_sae.ops import reference
from hf_switch_sae.sae.flops import flops_per_token, parameter_count

SIZES = {"hidden_size": 24, "num_features": 48, "k": 5}
KINDS = {
    "dense": {"num_experts": 1},
    "switch": {"num_experts": 4},
    "two_experts": {"num_experts": 6, "num_experts_per_token": 2},
    "with_bias": {"num_experts": 4, "encoder_bias": True},
    "batch_topk": {"num_experts": 3, "activation": "batch_topk"},
    "relu": {"num_experts": 2, "activation": "relu", "k": None, "encoder_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [2, 37])
def test_flops_are_those_that_torch_counts(kind, tokens):
    config = SwitchSAEConfig(**{**SIZES, **KINDS[kind]})
    torch.manual_seed(0)
    # in training a batch_topk SAE needs no threshold
    sae = SwitchSAE(config).train(config.activation == "batch_topk")
    x = torch.randn(tokens, config.hidden_size)
    with torch.no_grad(), use_backend("eager"), FlopCounterMode(display=False) as encoding:
        features = sae.encode(x)
    with torch.no_grad(), FlopCounterMode(display=False) as decoding:
        reference.sparse_decode(features.acts, features.ids, sae.W_dec)

    found = flops_per_token(config, features.k)

    assert tokens * (found.router + found.encoder) == encoding.get_total_flops()
    assert tokens * found.decoder == decoding.get_total_flops()
    assert found.total == found.router + found.encoder + found.decoder == found.to_dict()["total"]


def test_a_width_matched_switch_encodes_with_a_share_and_a_flop_matched_one_with_as_many():
    dense, width, flop = (
        flops_per_token(SwitchSAEConfig(hidden_size=8, num_features=f, num_experts=e, k=2))
        for f, e in ((64, 1), (64, 8), (512, 8))
    )
    assert 8 * width.encoder == dense.encoder == flop.encoder
    assert dense.router == 0
    assert dense.decoder == width.decoder == flop.decoder == 2 * 2 * 8


def test_without_k_the_number_of_active_features_has_to_be_said():
    config = SwitchSAEConfig(activation="relu", k=None)
    with pytest.raises(ConfigError, match="give active"):
        flops_per_token(config)
    assert flops_per_token(config, 12.5).decoder == 25 * config.hidden_size


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model(kind):
    config = SwitchSAEConfig(**{**SIZES, **KINDS[kind]})
    assert parameter_count(config) == sum(p.numel() for p in SwitchSAE(config).parameters())
