"""A configuration is checked when it is built, says what is wrong, and survives a config.json."""

import json
import pickle

import pytest
from transformers import AutoConfig, AutoModel

from hf_switch_sae import ConfigError, SwitchSAE, SwitchSAEConfig, SwitchSAEError


def tiny(**fields):
    return SwitchSAEConfig(
        **{"hidden_size": 16, "num_features": 32, "num_experts": 4, "k": 3, **fields}
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"num_features": -4}, "num_features=-4 must be at least 1"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"num_experts_per_token": 0}, "num_experts_per_token=0 must be at least 1"),
        ({"num_features": 30}, "not a multiple of num_experts=4; the nearest are 28 and 32"),
        ({"num_experts_per_token": 5}, "num_experts_per_token=5 is more than num_experts=4"),
        ({"k": 9}, "k=9 is outside 1 to 8"),
        ({"k": 0}, "k=0 is outside 1 to 8"),
        ({"k": 17, "num_experts_per_token": 2}, "k=17 is outside 1 to 16"),
        ({"k": None}, "activation='topk' needs k"),
        ({"k": None, "activation": "batch_topk"}, "activation='batch_topk' needs k"),
        ({"norm_topk_prob": True}, "needs num_experts_per_token >= 2"),
        ({"fvu_loss_coef": -1.0}, "fvu_loss_coef=-1.0 must not be negative"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1 must not be negative"),
        ({"activation": "gelu"}, "activation"),
        ({"k": "many"}, "'k' with value 'many'"),
        ({"num_experts": 2.5}, "'num_experts' expected int, got float"),
        ({"num_experts": True}, "'num_experts' expected int, got bool"),
        ({"encoder_bias": 1}, "'encoder_bias' expected bool, got int"),
        ({"hookpoint": 3}, "'hookpoint'"),
        ({"d_in": "wide"}, "d_in=wide contradicts hidden_size=16"),
        ({"d_sae": "wide"}, "d_sae=wide contradicts num_features=32"),
        ({"num_expert": 8}, "no field 'num_expert'; did you mean 'num_experts'"),
        ({"d_inn": 8}, "no field 'd_inn'; did you mean 'd_in'"),
        ({"zebra": 1}, "no field 'zebra'; if a newer version wrote it, update"),
    ],
    ids=str,
)
def test_a_contradiction_is_an_error_that_names_it(fields, message):
    with pytest.raises(ConfigError) as caught:
        tiny(**fields)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SwitchSAEError)


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 8},
        {"k": 16, "num_experts_per_token": 2, "norm_topk_prob": True},
        {"k": None, "activation": "relu"},
        {"k": None, "activation": "jumprelu"},
        {"k": 2, "activation": "jumprelu"},
        {"num_experts": 1, "k": 32},
        {"num_experts_per_token": 4},
        {"num_features": 4, "k": 1},
        {"initializer_range": 1, "fvu_loss_coef": 2, "router_aux_loss_coef": 0},
    ],
    ids=str,
)
def test_the_extremes_that_make_sense_are_allowed(fields):
    config = tiny(**fields)
    assert all(getattr(config, name) == value for name, value in fields.items())


def test_setting_a_field_of_the_wrong_type_later_is_an_error_too():
    config = tiny()
    with pytest.raises(ConfigError, match="'k'"):
        config.k = "many"
    assert config.k == 3
    config.metrics = {"fvu": 0.2}
    assert config.metrics == {"fvu": 0.2}


def test_the_names_of_the_field_are_aliases_in_both_directions():
    config = SwitchSAEConfig(d_in=24, d_sae=64, num_experts=8, k=4)
    assert (config.hidden_size, config.num_features) == (24, 64)
    assert (config.d_in, config.d_sae) == (24, 64)
    assert config.features_per_expert == 8
    assert "d_in" not in config.to_dict()


def test_the_defaults_are_a_valid_switch_sae_of_the_paper():
    config = SwitchSAEConfig()
    assert config.activation == "topk"
    assert (config.num_experts, config.num_experts_per_token) == (32, 1)
    assert not config.encoder_bias
    assert config.apply_router_probs
    assert config.subtract_b_dec


def test_every_field_survives_a_config_json(tmp_path):
    config = tiny(
        num_experts_per_token=2,
        norm_topk_prob=True,
        encoder_bias=True,
        subtract_b_dec=False,
        hookpoint="layers.7.resid_post",
        base_model="org/lm",
        base_model_revision="abc",
        base_model_fingerprint={"hidden_size": 16, "weights": {"w": [0.5, -1.0]}},
        metrics={"fvu": 0.2, "l0": 3.0},
        initializer_range=0.1,
    )
    config.save_pretrained(tmp_path)
    again = SwitchSAEConfig.from_pretrained(tmp_path)
    auto = AutoConfig.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())

    assert type(auto) is SwitchSAEConfig
    fields = set(SwitchSAEConfig.__annotations__)
    for other in (again, auto, pickle.loads(pickle.dumps(config))):
        assert {f: getattr(other, f) for f in fields} == {f: getattr(config, f) for f in fields}
    assert written["model_type"] == "switch_sae"
    assert written["hookpoint"] == "layers.7.resid_post"


def test_a_config_json_from_a_newer_version_is_refused_by_the_field_it_adds(tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantum_gate": 3}))
    with pytest.raises(ConfigError, match=r"quantum_gate.*update hf-switch-sae"):
        SwitchSAEConfig.from_pretrained(tmp_path)


def test_what_transformers_itself_writes_into_a_config_json_is_accepted(tmp_path):
    """After a load the config carries names of the host library, and is built from them again."""
    SwitchSAE(tiny()).save_pretrained(tmp_path / "once")
    model = AutoModel.from_pretrained(tmp_path / "once", attn_implementation="eager")
    model.save_pretrained(tmp_path / "twice")
    model.config.name_or_path = "org/somewhere"
    assert SwitchSAEConfig(**model.config.to_dict()).k == 3
    assert AutoConfig.from_pretrained(tmp_path / "twice").k == 3
    assert SwitchSAEConfig.from_dict({**tiny().to_dict(), "_commit_hash": "abc"}).k == 3


def test_a_contradiction_set_later_is_found_before_it_is_saved(tmp_path):
    config = tiny()
    config.k = 99
    with pytest.raises(ConfigError, match="k=99 is outside"):
        config.save_pretrained(tmp_path)


def test_from_pretrained_takes_fields_as_keywords_and_refuses_slips(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert SwitchSAEConfig.from_pretrained(tmp_path, k=2).k == 2
    with pytest.raises(ConfigError, match="k=9 is outside"):
        SwitchSAEConfig.from_pretrained(tmp_path, k=9)


def test_a_field_given_under_both_of_its_names_must_agree_with_itself():
    assert SwitchSAEConfig(hidden_size=64, d_in=64).hidden_size == 64
    with pytest.raises(ConfigError, match="d_in=32 contradicts hidden_size=64"):
        SwitchSAEConfig(hidden_size=64, d_in=32)


def test_an_alias_is_checked_for_its_type_too():
    with pytest.raises(ConfigError, match="'hidden_size' expected int, got str"):
        SwitchSAEConfig(d_in="wide")
