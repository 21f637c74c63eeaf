"""A saved SAE is the SAE: one layout whatever the groups, any dtype, shards, devices and disk."""

import json
import os
from typing import Any

import pytest
import torch
from helpers.saes import KINDS, D, E, M, config, make, regroup, rows
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel

from hf_switch_sae import ConfigError, SwitchSAE, SwitchSAEConfig

GROUPS = pytest.mark.parametrize("groups", [1, 2, "each"], ids="groups_{}".format)


def assert_same(sae: SwitchSAE, wanted: SwitchSAE) -> None:
    """All weights and buffers bit for bit, in the layout of the checkpoint."""
    for name in ("W_enc", "W_dec", "b_enc"):
        torch.testing.assert_close(getattr(sae, name), getattr(wanted, name), atol=0, rtol=0)
    rest = [
        {k: v for k, v in s.state_dict().items() if not k.startswith("experts.")}
        for s in (sae, wanted)
    ]
    torch.testing.assert_close(rest[0], rest[1], atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_is_loaded(tmp_path, kind):
    sae, x = make(kind), rows()
    sae.save_pretrained(tmp_path)
    loaded, info = SwitchSAE.from_pretrained(tmp_path, output_loading_info=True)
    assert_same(loaded, sae)
    assert not any(info.values()), info
    assert not loaded.training
    # up to rounding: a tensor mapped from a file lies at another alignment
    torch.testing.assert_close(loaded(x).reconstruction, sae(x).reconstruction)


def test_the_names_and_shapes_in_the_file_are_pinned(tmp_path):
    make("jumprelu").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    f32, F = torch.float32, E * M
    assert layout == {
        "W_enc": ((E, M, D), f32),
        "W_dec": ((E, M, D), f32),
        "b_enc": ((E, M), f32),
        "b_dec": ((D,), f32),
        "router.weight": ((E, D), f32),
        "b_router": ((D,), f32),
        "input_scale": ((), f32),
        "threshold": ((F,), f32),
        "feature_max": ((F,), f32),
        "feature_rate": ((F,), f32),
        "residual_norm": ((), f32),
        "outlier_norm": ((), f32),
        "statistics_tokens": ((), torch.int64),
        "num_tokens_since_fired": ((F,), torch.int64),
    }


@GROUPS
@pytest.mark.parametrize("kind", ["switch_with_bias", "plain_topk", "batch_topk"])
def test_the_file_does_not_depend_on_the_groups_in_memory(tmp_path, kind, groups):
    groups = 1 if "plain" in kind else groups
    sae = make(kind)
    sae.save_pretrained(tmp_path / "one")
    regroup(sae, groups).save_pretrained(tmp_path / "many")
    files = [tmp_path / name / "model.safetensors" for name in ("one", "many")]
    assert files[0].read_bytes() == files[1].read_bytes()

    loaded, info = SwitchSAE.from_pretrained(
        tmp_path / "one", expert_groups=groups, output_loading_info=True
    )
    assert len(loaded.experts) == {1: 1, 2: 2, "each": E}[groups]
    assert not any(info.values()), info
    assert_same(loaded, sae)


@GROUPS
def test_shards_are_joined(tmp_path, groups):
    sae = make("switch_with_bias")
    regroup(sae, groups).save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) >= {"W_enc", "W_dec", "b_enc"}
    for other in (1, 2, "each"):
        assert_same(SwitchSAE.from_pretrained(tmp_path, expert_groups=other), sae)


def test_many_saes_lie_side_by_side_in_one_folder(tmp_path):
    saes = {f"layers.{i}.resid_post": make(scale=0.1 * (i + 1)) for i in range(3)}
    for name, sae in saes.items():
        sae.save_pretrained(tmp_path / name)
    for name, sae in saes.items():
        assert_same(SwitchSAE.from_pretrained(tmp_path, subfolder=name), sae)
        assert_same(AutoModel.from_pretrained(tmp_path, subfolder=name), sae)


def test_the_auto_classes_know_the_model_and_pass_its_arguments_on(tmp_path):
    sae = make()
    sae.save_pretrained(tmp_path)
    auto = AutoModel.from_pretrained(tmp_path, expert_groups=2)
    assert type(auto) is SwitchSAE
    assert len(auto.experts) == 2
    assert type(AutoConfig.from_pretrained(tmp_path)) is SwitchSAEConfig
    assert type(AutoModel.from_config(sae.config)) is SwitchSAE
    assert_same(auto, sae)


@GROUPS
@pytest.mark.parametrize("kind", ["switch_with_bias", "jumprelu", "batch_topk"])
def test_a_bfloat16_sae_keeps_router_and_statistics_in_float32(tmp_path, kind, groups):
    sae, x = make(kind), rows()
    sae.save_pretrained(tmp_path)
    low = SwitchSAE.from_pretrained(tmp_path, dtype=torch.bfloat16, expert_groups=groups)
    dtypes = {name.split(".")[-1]: value.dtype for name, value in low.state_dict().items()}
    halved = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert halved == {"W_enc", "W_dec", "b_enc", "b_dec"} & set(dtypes)
    torch.testing.assert_close(low(x).router_logits, sae(x).router_logits)
    torch.testing.assert_close(low.router.weight, sae.router.weight, atol=0, rtol=0)
    assert low.encode(x).dtype == torch.bfloat16
    close = {"atol": 0.15, "rtol": 0.05}
    torch.testing.assert_close(low(x).reconstruction, sae(x).reconstruction, **close)

    low.save_pretrained(tmp_path / "low")
    again = SwitchSAE.from_pretrained(tmp_path / "low")  # its own dtype is the default
    assert again.dtype == torch.bfloat16
    assert_same(again, low)


@pytest.mark.parametrize(
    ("memory", "places"),
    [
        ({"cpu": "1GB"}, {"cpu"}),
        ({"cpu": 3000}, {"cpu", "disk"}),
        ({"cpu": 1500}, {"disk"}),
    ],
    ids=["all_in_memory", "some_on_disk", "all_experts_on_disk"],
)
@pytest.mark.parametrize("kind", ["switch_with_bias", "two_experts", "jumprelu"])
@pytest.mark.filterwarnings(
    # accelerate's own words about what it has been asked to do
    "ignore:Some parameters are on the meta device",
    "ignore:Current model requires:UserWarning",
    "ignore:Attempting to save a model with offloaded modules",
)
def test_experts_may_lie_on_disk_and_nothing_is_different(tmp_path, kind, memory, places):
    sae, x = make(kind), rows()
    sae.calibrate([x])
    sae.save_pretrained(tmp_path / "sae")

    far = SwitchSAE.from_pretrained(
        tmp_path / "sae", device_map="auto", max_memory=memory, offload_folder=tmp_path / "off"
    )

    assert len(far.experts) == E
    lie = {"disk" if p.is_meta else "cpu" for p in far.experts.parameters()}
    assert lie == places
    torch.testing.assert_close(far.encode(x).to_dense(), sae.encode(x).to_dense())
    torch.testing.assert_close(far(x).reconstruction, sae(x).reconstruction)
    torch.testing.assert_close(far.decode(sae.encode(x)), sae.decode(sae.encode(x)))
    torch.testing.assert_close(far.decoder_rows([0, 23]), sae.decoder_rows([0, 23]))
    if "disk" in places:
        with pytest.raises(ConfigError, match="offloaded experts can't be changed"):
            far.normalize_decoder()
    assert lie == {"disk" if p.is_meta else "cpu" for p in far.experts.parameters()}
    for name in ("W_enc", "W_dec", "b_enc"):
        torch.testing.assert_close(getattr(far, name), getattr(sae, name), atol=0, rtol=0)

    far.save_pretrained(tmp_path / "again")
    assert_same(SwitchSAE.from_pretrained(tmp_path / "again"), sae)


class Allocated(TorchDispatchMode):
    """Bytes of real memory that operators returned and did not get from their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage()._cdata for a in args if torch.is_tensor(a)}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(value) and not value.is_meta:
                storage = value.untyped_storage()
                self.bytes += 0 if storage._cdata in known else storage.nbytes()
        return result


@GROUPS
def test_loading_allocates_no_weights_beside_those_of_the_file(monkeypatch, tmp_path, groups):
    monkeypatch.setitem(os.environ, "HF_DEACTIVATE_ASYNC_LOAD", "1")  # or threads escape the count
    settings = config(hidden_size=64, num_features=4096, encoder_bias=True)
    SwitchSAE(settings).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    with Allocated() as fresh:
        SwitchSAE(settings)
    assert fresh.bytes > size  # the count does see an initialization

    with Allocated() as loading:
        SwitchSAE.from_pretrained(tmp_path, expert_groups=groups)

    assert loading.bytes <= 1.2 * size


def test_from_pretrained_leaves_the_random_state_alone(tmp_path):
    make().save_pretrained(tmp_path)
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    SwitchSAE.from_pretrained(tmp_path)
    torch.testing.assert_close(torch.rand(2), wanted, atol=0, rtol=0)


def test_a_file_without_newer_statistics_still_loads_with_their_start_values(tmp_path):
    sae = make()
    state = {
        name.replace("experts.0.", ""): value
        for name, value in sae.state_dict().items()
        if name != "outlier_norm"
    }
    sae.save_pretrained(tmp_path, state_dict=state)
    loaded = SwitchSAE.from_pretrained(tmp_path)
    assert loaded.outlier_norm == torch.inf
    torch.testing.assert_close(loaded.W_enc, sae.W_enc, atol=0, rtol=0)


def test_a_wrong_subfolder_is_answered_with_those_there_are(tmp_path):
    make("switch").save_pretrained(tmp_path / "layers.3.resid_post")

    with pytest.raises(OSError, match=r"subfolder='layers\.4'.*there are: layers\.3\.resid_post"):
        SwitchSAE.from_pretrained(tmp_path, subfolder="layers.4")
    with pytest.raises(OSError, match=r"there are: layers\.3\.resid_post"):
        SwitchSAE.from_pretrained(str(tmp_path))
