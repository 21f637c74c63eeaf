"""Weights that are no plain tensors: sharded, quantized, packed; what can be read of them is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from hf_switch_sae import BaseModelError, Steer, SwitchSAE, fingerprint
from hf_switch_sae.lm.residuals import residuals


class Packed(Tensor):
    """A weight as quantizers make them: 8-bit numbers inside, and no operator but a product."""

    packed: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.packed = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{func} of a packed weight")


class PackedLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(Packed(linear.weight.detach()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return x @ (weight.packed * weight.scale).to(x.dtype).T


def packed(lm: PreTrainedModel) -> PreTrainedModel:
    for module in list(lm.base_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.bias is None:
                setattr(module, name, PackedLinear(child))
    return lm


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def steers(sae: SwitchSAE, lm: PreTrainedModel, **options: bool) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = lm(ids).logits
        with sae.attach(lm, **options) as session:
            session.edit(Steer(3, 9.0, unit="raw"))
            assert not torch.equal(lm(ids).logits, before)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_a_model_of_packed_weights_is_recognized_by_those_that_are_not(kind):
    sae, lm = tiny.sae_for(tiny.ALL[kind]()), packed(tiny.ALL[kind]())

    found = fingerprint(lm)

    assert found["quantized"] is True
    assert list(found["weights"]) == ["embed_tokens.weight"]
    steers(sae, lm)
    steers(SwitchSAE.for_lm(lm, at=1, num_features=16, num_experts=2, k=4).eval(), lm)
    with pytest.raises(BaseModelError, match=r"sampled weights differ.*embed_tokens"):
        sae.attach(packed(tiny.ALL[kind](seed=4)))


def test_of_a_model_with_nothing_to_read_the_name_decides():
    plain, lm = tiny.llama(), packed(tiny.llama())
    lm.model.embed_tokens.to(torch.float8_e4m3fn)
    for norm in [module for module in lm.modules() if "Norm" in type(module).__name__]:
        norm.to(torch.float8_e4m3fn)
    plain.config._name_or_path = lm.config._name_or_path = "org/name"
    sae = tiny.sae_for(plain)

    assert fingerprint(lm)["weights"] == {}
    assert fingerprint(lm)["quantized"] is True
    sae.attach(lm).detach()
    lm.config._name_or_path = "org/other"
    with pytest.raises(BaseModelError, match="no weights to compare"):
        sae.attach(lm)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_of_a_byte_are_quantized_whatever_the_config_says(dtype):
    sae, lm = tiny.sae_for(tiny.llama()), tiny.llama()
    weight = nn.Parameter(lm.model.layers[0].mlp.up_proj.weight.to(dtype), requires_grad=False)
    lm.model.layers[0].mlp.up_proj.weight = weight

    found = fingerprint(lm)

    assert found["quantized"] is True
    assert "layers.0.mlp.up_proj.weight" not in found["weights"]
    sae.attach(lm).detach()


def test_a_model_on_meta_has_a_fingerprint_without_weights():
    with torch.device("meta"):
        lm = tiny.llama()
    assert fingerprint(lm)["weights"] == {}
    assert fingerprint(lm)["quantized"] is False


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_model_that_one_process_holds_in_shards_has_its_fingerprint(mesh, kind):
    plain = tiny.ALL[kind]()
    sae, expected, lm = tiny.sae_for(plain), fingerprint(plain), tiny.ALL[kind]()
    for block in lm.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(lm, mesh=mesh)

    assert fingerprint(lm) == expected
    steers(sae, lm)
    assert SwitchSAE.for_lm(lm, at=1).config.base_model_fingerprint == expected
    other = tiny.ALL[kind](seed=5)
    fully_shard(other, mesh=mesh)
    with pytest.raises(BaseModelError, match="sampled weights differ"):
        sae.attach(other)


def test_of_a_weight_that_other_processes_hold_nothing_is_asked():
    store = distributed.HashStore()
    # the second process is not there; what is asked of it is answered at once, with nonsense
    distributed.init_process_group("fake", store=store, rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        lm = tiny.llama()
        expected = fingerprint(lm)
        attention = [block.self_attn.q_proj for block in lm.model.layers]
        for linear, place in zip(
            attention, [Shard(0), Shard(1), Replicate(), Shard(0)], strict=True
        ):
            shared = distribute_tensor(linear.weight.detach(), mesh, [place])
            linear.weight = nn.Parameter(shared, requires_grad=False)

        found = fingerprint(lm)
    finally:
        distributed.destroy_process_group()
    left_out = {f"layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1, 3)}
    assert not left_out & found["weights"].keys()
    assert (
        found["weights"].items()
        <= {
            **expected["weights"],
            "layers.2.self_attn.q_proj.weight": found["weights"][
                "layers.2.self_attn.q_proj.weight"
            ],
        }.items()
    )
    assert found["quantized"] is False


def test_the_stream_of_a_model_of_packed_weights_is_read():
    lm = packed(tiny.llama())
    with torch.no_grad(), residuals(lm, [1]) as read:
        assert read(input_ids=torch.tensor([[4, 5]]))["layers.1.resid_post"].shape == (1, 2, 32)
