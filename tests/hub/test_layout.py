"""The names of a release's files."""

from hf_switch_sae.hub.layout import is_ours
from hf_switch_sae.sae.config import SwitchSAEConfig


def test_a_config_of_ours_is_told_from_another_projects():
    assert is_ours(SwitchSAEConfig(hidden_size=8, num_features=16, num_experts=2, k=2).to_dict())
    assert not is_ours({"model_type": "llama"})
    assert not is_ours({})
