"""A single token by the native kernels: what the general computation makes of it, or not at all."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.saes import KINDS, NORMED, make
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from hf_switch_sae import SparseFeatures, SwitchSAE, ops
from hf_switch_sae.errors import FeatureIdError, WidthError
from hf_switch_sae.ops.native import kernels as native
from hf_switch_sae.ops.native import token
from hf_switch_sae.sae import model
from hf_switch_sae.sae.single_token import plan_of

WHY_NOT = native.why_not(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
TAKEN = ("switch", "switch_with_bias", "k_is_all_of_an_expert", "no_router_weight", "plain_topk")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def generally(compute, *given):
    """Without the path of a single token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "plan_of", lambda *of: None)
        return compute(*given)


def is_taken(sae: SwitchSAE, x: torch.Tensor) -> bool:
    return plan_of(sae, sae.config, x) is not None


def assert_as_in_general(sae: SwitchSAE, x: torch.Tensor) -> None:
    mine, wanted = sae.encode(x), generally(sae.encode, x)
    assert (mine.acts.dtype, mine.ids.dtype) == (wanted.acts.dtype, wanted.ids.dtype)
    assert mine.acts.shape == mine.ids.shape == (*x.shape[:-1], sae.config.k)
    loose = 1e-5 if sae.dtype == torch.float32 else 0.03
    close = {"atol": loose, "rtol": loose, "equal_nan": True}
    if sae.dtype == torch.float32:  # in others, ties are common
        torch.testing.assert_close(mine.to_dense(), wanted.to_dense(), **close)
    else:
        torch.testing.assert_close(mine.acts.sort().values, wanted.acts.sort().values, **close)
    m = sae.config.features_per_expert
    assert (mine.ids // m == wanted.ids.flatten()[0] // m).all()
    y, wanted = sae.decode(wanted), generally(sae.decode, wanted)
    assert y.dtype == wanted.dtype
    torch.testing.assert_close(y, wanted, **close)


@DTYPE
@pytest.mark.parametrize("centered", [True, False], ids=["centered", "as_it_is"])
@pytest.mark.parametrize("kind", TAKEN)
def test_it_is_encoded_and_decoded_as_in_general(kind, centered, dtype):
    sae = make(kind, subtract_b_dec=centered).to(dtype)
    for shape in ((16,), (1, 16), (1, 1, 16)):
        for x in torch.randn(20, *shape, dtype=dtype):
            assert is_taken(sae, x)
            assert_as_in_general(sae, x)
    assert_as_in_general(sae, torch.randn(1, 16, dtype=torch.float64))
    assert_as_in_general(sae, torch.randn(1, 32)[:, ::2])


@pytest.mark.parametrize("kind", sorted({*KINDS, *NORMED} - {*TAKEN}))
def test_other_rules_are_left_to_the_general_computation(kind):
    assert not is_taken(make(kind), torch.randn(1, 16))


@DTYPE
@pytest.mark.parametrize("of", ["nan", "inf", "outlier", "huge", "zero"])
def test_tokens_at_the_edge(of, dtype):
    sae = make("switch_with_bias").to(dtype)
    sae.outlier_norm.fill_(50.0)
    x = torch.randn(1, 16, dtype=dtype)
    tokens = {"nan": x * torch.nan, "inf": x * torch.inf, "outlier": x * 100, "zero": x * 0}
    x = tokens.get(of, torch.full_like(x, 3e38))
    acts = sae.encode(x).acts
    wanted = generally(sae.encode, x).acts
    close = {"atol": 0.02, "rtol": 0.02, "equal_nan": True}
    torch.testing.assert_close(acts.sort().values, wanted.sort().values, **close)
    if of in ("inf", "outlier", "huge"):
        assert not acts.any()


def test_of_equal_experts_it_goes_to_the_first():
    sae = make("switch")
    sae.router.weight.zero_()
    sae.router.weight[1:3] = 1.0
    x = torch.ones(1, 16) + sae.b_router / sae.input_scale
    assert (sae.encode(x).ids // sae.config.features_per_expert == 1).all()


def test_it_is_taken_only_where_nothing_else_is_asked_for():
    sae, x = make("switch"), torch.randn(1, 16)
    assert is_taken(sae, x)
    assert not is_taken(sae, torch.randn(2, 16))
    assert not is_taken(make("switch", groups=2), x)
    with torch.enable_grad():
        assert not is_taken(sae, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_taken(sae, x)
    with ops.use_backend("eager"):
        assert not is_taken(sae, x)
        assert_as_in_general(sae, x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not is_taken(sae, mode.from_tensor(x))
    assert not is_taken(sae.to(torch.float64), x)
    with pytest.raises(WidthError):
        make("switch").encode(torch.randn(1, 17))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, torch.randn_like(tensor)], -1)[..., 0]


@pytest.mark.parametrize(
    "name", ["b_dec", "b_router", "router.weight", "W_enc", "b_enc", "W_dec", "outlier_norm"]
)
@pytest.mark.parametrize("how", [strided, torch.Tensor.double], ids=["strided", "double"])
def test_weights_that_lie_otherwise_are_not_read_as_if_they_did_not(name, how):
    sae, x = make("switch_with_bias"), torch.randn(1, 16)
    module = sae.experts[0] if name in ("W_enc", "b_enc", "W_dec") else sae
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    tensor = getattr(module, last)
    if tensor.ndim == 0 and how is strided:
        return
    changed = how(tensor.detach().clone())
    if isinstance(tensor, nn.Parameter):
        setattr(module, last, nn.Parameter(changed))
    else:
        module._buffers[last] = changed
    assert not is_taken(sae, x)
    if how is strided:
        assert_as_in_general(sae, x)


def test_a_plan_follows_its_weights():
    sae, x = make("switch_with_bias"), torch.randn(1, 16)
    changes = (
        lambda: sae.experts[0].W_enc.mul_(-1),
        lambda: sae.b_dec.add_(1),
        lambda: sae.input_scale.fill_(2.0),
        lambda: setattr(sae.experts[0].W_dec, "data", torch.randn(4, 6, 16)),
        lambda: setattr(sae.experts[0].W_enc, "data", sae.experts[0].W_enc.data.roll(1)),
        lambda: setattr(sae.experts[0], "W_enc", nn.Parameter(torch.randn(4, 6, 16))),
        lambda: setattr(sae.config, "k", 5),
        lambda: setattr(sae.config, "apply_router_probs", False),
        lambda: setattr(sae.config, "subtract_b_dec", False),
        lambda: sae.load_state_dict({k: 0.5 * v for k, v in sae.state_dict().items()}),
        lambda: sae.to(torch.bfloat16),
        lambda: sae.to(torch.float32),
    )
    for change in (lambda: None, *changes):
        change()
        assert is_taken(sae, x)
        assert_as_in_general(sae, x)
    other = copy.deepcopy(sae)
    other.b_dec.zero_()
    assert_as_in_general(other, x)
    assert_as_in_general(sae, x)


def test_what_a_weight_is_without_being_elsewhere_is_seen():
    sae, x = make("switch", hidden_size=6), torch.randn(2, 6)
    assert is_taken(sae, x[:1])
    sae.experts[0].W_enc.data = sae.experts[0].W_enc.data.mT
    assert not is_taken(sae, x[:1])
    torch.testing.assert_close(sae.encode(x[:1]).to_dense(), sae.encode(x).to_dense()[:1])


def test_a_weight_that_is_made_anew_by_each_forward_is_left_to_it():
    sae, x = make("switch"), torch.randn(2, 16)
    prune.l1_unstructured(sae.experts[0], "W_enc", 0.5)
    assert not is_taken(sae, x[:1])
    torch.testing.assert_close(sae.encode(x[:1]).to_dense(), sae.encode(x).to_dense()[:1])


@pytest.mark.parametrize("name", ["b_enc", "b_dec"])
def test_a_pruned_bias_is_no_missing_one(name):
    sae, x = make("switch_with_bias"), torch.randn(2, 16)
    prune.l1_unstructured(sae if name == "b_dec" else sae.experts[0], name, 0.5)
    assert not is_taken(sae, x[:1])
    torch.testing.assert_close(sae.encode(x[:1]).to_dense(), sae.encode(x).to_dense()[:1])
    torch.testing.assert_close(sae.decode(sae.encode(x[:1])), sae.decode(sae.encode(x))[:1])


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("of", ["router", "experts.0"])
def test_hooks_see_a_single_token(of, kind):
    sae, seen = make("switch"), []
    register = getattr(sae.get_submodule(of), f"register_{kind}_hook")
    hook = register(lambda *given: seen.append(given))
    sae.encode(torch.randn(1, 16))
    assert len(seen) == 1
    hook.remove()
    assert is_taken(sae, torch.randn(1, 16))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own
def test_a_forward_mode_derivative_is_not_lost():
    sae, x = make("switch").requires_grad_(False), torch.randn(1, 16)
    _, slope = torch.func.jvp(lambda x: sae.decode(sae.encode(x)), (x,), (torch.ones(1, 16),))
    step = 1e-2
    rise = sae.decode(sae.encode(x + step)) - sae.decode(sae.encode(x - step))
    torch.testing.assert_close(slope, rise / (2 * step), atol=1e-3, rtol=1e-3)
    with forward_ad.dual_level():  # of a weight
        weight = sae.experts[0].W_dec.detach()
        sae.experts[0]._parameters["W_dec"] = forward_ad.make_dual(weight, weight)
        features = sae.encode(x)
        slope = forward_ad.unpack_dual(sae.decode(features)).tangent
        torch.testing.assert_close(slope, sae.decode_delta(features))


def test_a_plan_is_made_once_and_goes_with_the_sae():
    sae, x = make("switch"), torch.randn(1, 16)
    plan = plan_of(sae, sae.config, x)
    assert plan_of(sae, sae.config, torch.randn(16)) is plan
    before = len(token._plans)
    del sae
    assert len(token._plans) == before - 1


@pytest.mark.parametrize("wrong", [-1, 24])
def test_a_feature_that_is_not_there_is_refused(wrong):
    sae = make("switch")
    for ids in (torch.tensor([[0, wrong]]), torch.tensor([[0, wrong]], dtype=torch.int32)):
        with pytest.raises(FeatureIdError, match=f"no feature {wrong}: there are 0 to 23"):
            sae.decode(SparseFeatures(torch.ones(1, 2), ids, 24))
        assert sae.decode(SparseFeatures(torch.tensor([[1.0, 0.0]]), ids, 24)).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 16), (0,)])
def test_no_tokens_and_no_slots_are_no_single_token(shape):
    sae = make("switch")
    assert not is_taken(sae, torch.randn(shape))
    no_slots = SparseFeatures(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.int64), 24)
    assert not is_taken(sae, no_slots.acts)
    assert not is_taken(sae, no_slots.acts[:0])


def test_features_of_other_widths_and_dtypes_are_decoded():
    sae = make("switch")
    for slots in (1, 2, 7):
        ids = torch.randperm(24)[None, :slots]
        for features in (
            SparseFeatures(torch.randn(1, slots), ids, 24),
            SparseFeatures(torch.randn(1, slots, dtype=torch.float64), ids.int(), 24),
            SparseFeatures(torch.randn(1, 2 * slots)[:, ::2], ids, 24),
        ):
            wanted = generally(sae.decode, features)
            torch.testing.assert_close(sae.decode(features), wanted, atol=1e-5, rtol=1e-5)


def test_sharded_weights_are_left_to_their_own_hooks(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        for whole in (True, False):
            sae, x = make("switch"), torch.randn(1, 16)
            features = sae.encode(x)
            wanted = sae.decode(features)
            fully_shard(sae.experts[0])
            if whole:
                fully_shard(sae)
            assert not is_taken(sae, x)
            sae(torch.randn(5, 16))
            assert not is_taken(sae, x)
            torch.testing.assert_close(sae.decode(features), wanted, atol=1e-5, rtol=1e-5)
    finally:
        dist.destroy_process_group()
