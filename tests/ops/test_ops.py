"""The kernels: every backend computes what `ops/reference.py` defines, values and gradients."""

import gc
import inspect
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_switch_sae import SwitchSAE, SwitchSAEConfig, ops
from hf_switch_sae.errors import BackendError
from hf_switch_sae.ops import backends, eager, memory, reference, routed
from hf_switch_sae.ops.native import kernels as native
from hf_switch_sae.ops.triton import kernels as triton_kernels


@dataclass(frozen=True)
class Case:
    """Sizes and rules: n tokens, width d, E experts of m features, t of them a token, k kept."""

    n: int = 23
    d: int = 48
    E: int = 5
    m: int = 8
    t: int = 1
    k: int | None = 3
    bias: bool = True
    shift: float = 0.0
    gated: bool = True
    centered: bool = False
    in_order: bool = False
    threshold: float | None = None
    batch_topk: bool = False
    counted: float | None = None
    """The share of tokens that batch_topk is over; all of them by default."""
    experts: tuple[int, ...] | None = None
    """The experts that tokens may go to; all by default."""

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        allowed = torch.tensor(self.experts or range(self.E))
        order = torch.rand(self.n, len(allowed), generator=generator).argsort(1)[:, : self.t]
        inputs = {
            "x": draw(self.n, self.d),
            "W_enc": draw(self.E, self.m, self.d) / self.d**0.5,
            "b_enc": 0.3 * draw(self.E, self.m) + self.shift if self.bias else None,
            "gates": draw(self.n, self.t).sigmoid() if self.gated else None,
            "center": 0.5 * draw(self.d) if self.centered else None,
        }
        leaves = {
            name: None
            if value is None
            else value.to(
                torch.float32 if name == "gates" and dtype != torch.float64 else dtype
            ).requires_grad_()
            for name, value in inputs.items()
        }
        limit = None if self.threshold is None else torch.full((self.E, self.m), self.threshold)
        counted = None
        if self.counted is not None:
            counted = torch.rand(self.n, generator=generator) < self.counted
        return {
            **leaves,
            "expert_ids": allowed[order].sort(0).values if self.in_order else allowed[order],
            "k": self.k,
            "threshold": None if limit is None else limit.to(dtype),
            "batch_topk": self.batch_topk,
            "in_order": self.in_order,
            "counted": counted,
        }


CASES = {
    "switch": Case(),
    "odd_width": Case(d=37, E=3, m=7),
    "centered": Case(centered=True),
    "in_order": Case(in_order=True, centered=True),
    "in_order_one_row": Case(in_order=True, n=1),
    "wide_experts": Case(m=64, k=4, in_order=True),
    "many_experts": Case(E=512, m=3, k=2, centered=True),
    "no_bias_no_gates": Case(bias=False, gated=False),
    "an_expert_nobody_visits": Case(experts=(0, 2, 4)),
    "all_tokens_on_one_expert": Case(experts=(3,)),
    "fewer_than_k_positives": Case(shift=-1.5, k=6),
    "nothing_positive": Case(shift=-50.0),
    "one_row": Case(n=1),
    "one_row_two_experts": Case(n=1, t=2, k=5, centered=True),
    "one_expert": Case(E=1, gated=False, centered=True),
    "k_is_all_of_an_expert": Case(k=8),
    "k_is_one": Case(k=1),
    "two_experts": Case(t=2, k=4),
    "three_experts_k_over_one": Case(t=3, k=11),
    "three_experts_few_positives": Case(t=3, k=11, shift=-1.5),
    "every_expert": Case(t=5, k=9),
    "relu": Case(k=None),
    "relu_two_experts": Case(k=None, t=2),
    "relu_in_order": Case(k=None, in_order=True),
    "threshold": Case(k=None, threshold=0.3),
    "threshold_and_k": Case(k=2, threshold=0.3, t=2),
    "batch_topk": Case(batch_topk=True),
    "batch_topk_two_experts": Case(batch_topk=True, t=2),
    "batch_topk_more_than_there_is": Case(batch_topk=True, shift=-1.5, k=7),
    "batch_topk_in_order": Case(batch_topk=True, in_order=True, k=1, m=32),
    "batch_topk_one_row": Case(batch_topk=True, n=1),
    "batch_topk_of_some": Case(batch_topk=True, counted=0.5, shift=0.5),
    "batch_topk_two_experts_of_some": Case(batch_topk=True, t=2, counted=0.5),
    "batch_topk_of_none": Case(batch_topk=True, counted=0.0),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
PRIMITIVES = ("expert_products", "relu_topk", "gather_sum", "row_dots", "scatter_sum", "why_not")
BOTH = pytest.mark.parametrize("computation", [reference, ops], ids=["reference", "routed"])
WHY_NOT_NATIVE = native.why_not(torch.device("cpu"), torch.float32)
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(WHY_NOT_NATIVE is not None, reason=str(WHY_NOT_NATIVE))
)
BACKEND = pytest.mark.parametrize("backend", ["eager"], indirect=True)
FLOAT32 = pytest.mark.parametrize("backend", ["eager", NATIVE], indirect=True)
"""Those that a CPU has in float32."""
FEW_CASES = (
    "fewer_than_k_positives",
    "switch",
    "in_order",
    "an_expert_nobody_visits",
    "one_row",
    "two_experts",
    "batch_topk",
)


@pytest.fixture
def backend(request):
    """The routed computation over one backend's primitives."""
    with ops.use_backend(request.param):
        yield ops


def encode(backend: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    acts, ids = backend.routed_encode(**inputs)
    return acts, ids


def dense(acts: Tensor, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    num_features = inputs["W_enc"].shape[0] * inputs["W_enc"].shape[1]
    return acts.new_zeros(len(acts), num_features).scatter_add(1, ids, acts)


def gradients(value: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of a random weighted sum of `value`, for every input that has one."""
    leaves = {name: v for name, v in inputs.items() if torch.is_tensor(v) and v.requires_grad}
    generator = torch.Generator().manual_seed(11)
    weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    grads = torch.autograd.grad((value * weights).sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def assert_same_encode(backend: Any, case: Case, dtype: torch.dtype, **tolerance: float) -> None:
    inputs = case.tensors(dtype)
    acts, ids = encode(backend, inputs)
    wanted_acts, wanted_ids = encode(reference, inputs)
    value, wanted = dense(acts, ids, inputs), dense(wanted_acts, wanted_ids, inputs)

    assert acts.shape == wanted_acts.shape
    torch.testing.assert_close(value, wanted, **tolerance)
    if case.n:
        torch.testing.assert_close(gradients(value, inputs), gradients(wanted, inputs), **tolerance)


def test_the_routed_computation_has_the_signatures_of_its_definition():
    for name in ("route", "routed_encode", "sparse_decode"):
        mine, theirs = getattr(ops, name), getattr(reference, name)
        assert inspect.signature(mine) == inspect.signature(theirs)


def test_every_backend_has_the_primitives_and_signatures_of_the_reference():
    for name in PRIMITIVES:
        for backend in ops.BACKENDS.values():
            mine, theirs = getattr(backend, name), getattr(reference, name)
            assert inspect.signature(mine) == inspect.signature(theirs)


# ---------------------------------------------------------------- encode


@FLOAT32
@CASE
@pytest.mark.parametrize("workspace", [None, 100], ids=["one_chunk", "split_chunks"])
def test_encode_agrees_with_reference(monkeypatch, backend, case, workspace):
    if workspace:
        monkeypatch.setattr(routed, "CPU_WORKSPACE_BYTES", workspace)
        monkeypatch.setattr(native, "_FEW", 1)  # the CPU's own library takes the rest
    assert_same_encode(backend, case, torch.float32, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "reference"], indirect=True)
@pytest.mark.parametrize("name", FEW_CASES)
@pytest.mark.skipif(triton_kernels.triton is None, reason="Triton is not installed")
def test_the_other_backends_primitives_serve_the_routed_computation_as_well(backend, name):
    case = replace(CASES[name], n=min(CASES[name].n, 9), d=19)
    assert_same_encode(backend, case, torch.float32, atol=1e-5, rtol=1e-5)
    inputs = {"acts": torch.rand(5, 3), "W_dec": torch.randn(12, 19)}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    ids = torch.randint(12, (5, 3))
    y = backend.sparse_decode(inputs["acts"], ids, inputs["W_dec"])
    wanted = reference.sparse_decode(inputs["acts"], ids, inputs["W_dec"])
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradients(y, inputs), gradients(wanted, inputs), atol=1e-5, rtol=1e-5
    )


@BACKEND
@CASE
def test_encode_agrees_with_reference_to_the_last_digits_of_float64(backend, case):
    assert_same_encode(backend, case, torch.float64, atol=1e-12, rtol=1e-12)


@BACKEND
@CASE
def test_encode_in_bfloat16_is_the_formula_up_to_rounding(backend, case):
    """Ties are common in bfloat16, so the formula is taken at the features that were chosen."""
    inputs = case.tensors(torch.bfloat16)
    acts, ids = encode(backend, inputs)
    wanted_acts, _ = encode(reference, inputs)
    assert acts.dtype == torch.bfloat16
    if not case.batch_topk:  # where ties at the border are all kept
        torch.testing.assert_close(
            acts.sort(1).values, wanted_acts.sort(1).values, atol=0.02, rtol=0.02
        )

    exact = {
        name: value.detach().float().requires_grad_()
        if torch.is_tensor(value) and value.requires_grad
        else value
        for name, value in inputs.items()
    }
    chosen = (acts > 0).float()
    z = exact["x"]
    if exact["center"] is not None:
        z = z - (exact["center"] - exact["center"].detach())
    pre = torch.einsum("nd,nkd->nk", z, exact["W_enc"].reshape(-1, case.d)[ids])
    if exact["b_enc"] is not None:
        pre = pre + exact["b_enc"].flatten()[ids]
    slot = (ids[..., None] // case.m == inputs["expert_ids"][:, None]).float()
    gate = 1.0 if exact["gates"] is None else torch.einsum("nkt,nt->nk", slot, exact["gates"])
    formula = chosen * gate * pre
    torch.testing.assert_close(acts.float(), formula, atol=0.02, rtol=0.02)
    mine, wanted = gradients(acts, inputs), gradients(formula, exact)
    for name, grad in mine.items():
        torch.testing.assert_close(grad.float(), wanted[name], atol=0.06, rtol=0.03, msg=name)


@given(data=st.data())
def test_encode_agrees_with_reference_at_any_size(data):
    E = data.draw(st.integers(1, 6), "E")
    t = data.draw(st.integers(1, E), "t")
    m = data.draw(st.integers(1, 9), "m")
    case = Case(
        n=data.draw(st.integers(0, 12), "n"),
        d=data.draw(st.integers(1, 11), "d"),
        E=E,
        m=m,
        t=t,
        k=data.draw(st.none() | st.integers(1, t * m), "k"),
        bias=data.draw(st.booleans(), "bias"),
        gated=data.draw(st.booleans(), "gated"),
        shift=data.draw(st.sampled_from([0.0, -0.5, -5.0]), "shift"),
        threshold=data.draw(st.none() | st.just(0.4), "threshold"),
    )
    if case.k is not None and data.draw(st.booleans(), "batch_topk"):
        case = replace(case, batch_topk=True)
    assert_same_encode(ops, case, torch.float64, atol=1e-11, rtol=1e-11)


@BOTH
@CASE
def test_every_slot_names_a_feature_of_the_tokens_own_experts(computation, case):
    inputs = case.tensors()
    acts, ids = encode(computation, inputs)
    own = (ids[..., None] // case.m == inputs["expert_ids"][:, None]).any(-1)
    assert own.all()
    assert (acts >= 0).all()
    for row_acts, row_ids in zip(acts, ids, strict=True):
        active = row_ids[row_acts > 0].tolist()
        assert len(set(active)) == len(active)


@FLOAT32
def test_an_empty_slot_gets_no_gradient(backend):
    inputs = replace(CASES["nothing_positive"], gated=True).tensors()
    acts, _ = encode(backend, inputs)
    for name, grad in gradients(acts, inputs).items():
        assert not grad.any(), name


@FLOAT32
@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("t", [1, 2])
def test_no_tokens_encode_to_no_rows(backend, k, t):
    inputs = Case(n=0, k=k, t=t).tensors()
    acts, ids = encode(backend, inputs)
    wanted, _ = encode(reference, inputs)
    assert acts.shape == ids.shape == wanted.shape
    y = backend.sparse_decode(acts, ids, torch.randn(40, 48, requires_grad=True))
    assert y.shape == (0, 48)


@FLOAT32
def test_encode_of_strided_rows_is_encode_of_their_copy(backend):
    inputs = Case().tensors()
    x = torch.randn(48, 46).T[::2]
    strided = encode(backend, {**inputs, "x": x})
    torch.testing.assert_close(strided, encode(backend, {**inputs, "x": x.contiguous()}))


@FLOAT32
def test_each_token_is_encoded_alone_as_in_the_batch(backend):
    inputs = Case(t=2).tensors()
    acts, ids = encode(backend, inputs)
    whole = dense(acts, ids, inputs)
    for row in range(3):
        one = {
            name: inputs[name][row : row + 1] if name in ("x", "expert_ids", "gates") else value
            for name, value in inputs.items()
        }
        torch.testing.assert_close(dense(*encode(backend, one), one)[0], whole[row])


class Largest(TorchDispatchMode):
    """Records the largest number of elements any operator returned, views of parameters aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(value):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["topk", "two_experts", "batch_topk", "relu"])
def test_nothing_as_large_as_tokens_times_features_is_ever_laid_out(monkeypatch, dtype, rule):
    monkeypatch.setattr(routed, "CPU_WORKSPACE_BYTES", 4096)
    monkeypatch.setattr(eager, "CHUNK_BYTES", 4096)
    case = Case(n=256, d=8, E=16, m=32, k=None if rule == "relu" else 4, shift=-2.0)
    case = replace(case, t=2 if rule == "two_experts" else 1, batch_topk=rule == "batch_topk")
    inputs = case.tensors(dtype)
    W_dec = torch.randn(case.E, case.m, case.d, dtype=dtype, requires_grad=True)
    with Largest() as seen:
        acts, ids = encode(ops, inputs)
        ops.sparse_decode(acts, ids, W_dec).float().square().sum().backward()
    with Largest() as dense_seen:
        encode(reference, inputs)

    everything = case.n * case.E * case.m
    assert seen.numel <= max(case.E * case.m * case.d, case.n * case.m * case.t)
    assert dense_seen.numel >= everything  # the recorder does see it where it happens


def test_the_tokens_of_one_expert_are_taken_in_chunks_of_the_workspace(monkeypatch):
    inputs = Case(n=256, d=4, E=1, m=64, k=2, gated=False).tensors()
    whole = dense(*encode(ops, inputs), inputs)
    monkeypatch.setattr(routed, "CPU_WORKSPACE_BYTES", 32 * 64 * 4)
    with Largest() as seen:
        acts, ids = encode(ops, inputs)
    assert seen.numel <= 32 * 64  # 32 tokens' pre-activations; all would be 256 * 64
    torch.testing.assert_close(dense(acts, ids, inputs), whole)


@BOTH
@pytest.mark.parametrize("gate", [1.0, 0.5])
def test_an_activation_must_exceed_its_threshold_router_weight_included(computation, gate):
    acts, ids = computation.routed_encode(
        x=torch.tensor([[4.0, 4.0, 4.0]]),
        W_enc=torch.eye(3)[None],
        b_enc=None,
        expert_ids=torch.tensor([[0]]),
        gates=torch.tensor([[gate]]),
        k=None,
        threshold=4.0 * gate * torch.tensor([[0.99, 1.0, 1.01]]),
    )
    assert ids[acts > 0].tolist() == [0]


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param("eager", torch.float64, id="fp64"),
        pytest.param("eager", torch.float32, id="fp32"),
        pytest.param(*NATIVE.values, torch.float32, marks=NATIVE.marks, id="native"),
    ],
    indirect=["backend"],
)
@pytest.mark.parametrize("shape", ["rows", "experts"])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "gather"])
@pytest.mark.parametrize("d", [37, 48, 129], ids="d{}".format)
def test_decode_agrees_with_reference(monkeypatch, backend, dtype, shape, sampled, d):
    if not sampled:
        monkeypatch.setattr(eager, "_SAMPLED", ())
        monkeypatch.setattr(eager, "CHUNK_BYTES", 1000)
    acts = torch.randn(11, 4, dtype=dtype)  # of any sign: edits decode differences
    acts[2], acts[5, 1:] = 0.0, 0.0
    ids = torch.randint(24, (11, 4))
    ids[3] = 7  # one feature in several slots: differences of edited features have such rows
    W_dec = torch.randn((24, d) if shape == "rows" else (4, 6, d), dtype=dtype)
    inputs = {"acts": acts.requires_grad_(), "W_dec": W_dec.requires_grad_()}

    y = backend.sparse_decode(acts, ids, W_dec)

    wanted = reference.sparse_decode(acts, ids, W_dec)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(y, wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        gradients(y, inputs), gradients(wanted, inputs), atol=tolerance, rtol=tolerance
    )


@BACKEND
def test_decode_in_bfloat16_agrees_with_float32_up_to_rounding(backend):
    acts, ids = torch.rand(9, 4).bfloat16(), torch.randint(24, (9, 4))
    W_dec = torch.randn(24, 48).bfloat16()
    low = {"acts": acts.requires_grad_(), "W_dec": W_dec.requires_grad_()}
    high = {name: value.detach().float().requires_grad_() for name, value in low.items()}

    y = backend.sparse_decode(acts, ids, W_dec)

    wanted = reference.sparse_decode(high["acts"], ids, high["W_dec"])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, atol=0.05, rtol=0.02)
    mine, exact = gradients(y, low), gradients(wanted, high)
    for name, grad in mine.items():
        torch.testing.assert_close(grad.float(), exact[name], atol=0.15, rtol=0.03)


@BACKEND
def test_gradients_agree_with_finite_differences(backend):
    inputs = Case(n=4, d=5, E=3, m=4, k=2, t=2).tensors(torch.float64)
    W_dec = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    rest = {name: inputs[name] for name in ("expert_ids", "k", "threshold", "batch_topk")}

    def autoencode(x, W_enc, b_enc, gates, W_dec):
        acts, ids = backend.routed_encode(x, W_enc, b_enc, gates=gates, **rest)
        return backend.sparse_decode(acts, ids, W_dec)

    leaves = (inputs["x"], inputs["W_enc"], inputs["b_enc"], inputs["gates"], W_dec)
    assert torch.autograd.gradcheck(autoencode, leaves, eps=1e-7, atol=1e-6)


# ---------------------------------------------------------------- route and selection


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_router_ties_go_to_the_lowest_index(computation, dtype, t):
    route = computation.route
    x = torch.ones(3, 6, dtype=dtype)
    weight, bias = torch.zeros(5, 6), torch.zeros(5)

    _, probs, expert_ids = route(x, weight, bias, t)
    assert expert_ids.tolist() == [list(range(t))] * 3
    torch.testing.assert_close(probs, torch.full((3, 5), 0.2))

    bias[2:4] = 1.0  # two best of five: the lower first, then the other, then expert 0
    assert route(x, weight, bias, t)[2].tolist() == [[2, 3, 0][:t]] * 3


@BACKEND
@pytest.mark.parametrize("t", [1, 2, 4])
def test_route_agrees_with_reference(backend, t):
    leaves = {
        "x": torch.randn(19, 37).requires_grad_(),
        "weight": torch.randn(4, 37).requires_grad_(),
        "bias": torch.randn(4).requires_grad_(),
    }
    logits, probs, expert_ids = backend.route(**leaves, num_experts_per_token=t)
    wanted = reference.route(**leaves, num_experts_per_token=t)

    torch.testing.assert_close((logits, probs, expert_ids), wanted)
    both = torch.cat([logits, probs], 1)
    torch.testing.assert_close(
        gradients(both, leaves), gradients(torch.cat(wanted[:2], 1), leaves), atol=1e-5, rtol=1e-5
    )


@BOTH
def test_the_router_works_in_float32_under_autocast_and_on_low_precision_inputs(computation):
    route = computation.route
    x, weight, bias = torch.randn(64, 48).bfloat16(), torch.randn(8, 48), torch.randn(8)
    wanted = route(x.float(), weight, bias, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(route(x, weight, bias, 1), wanted, atol=0, rtol=0)


def test_the_bias_of_the_router_is_not_rounded_under_autocast_either():
    sae = SwitchSAE(SwitchSAEConfig(hidden_size=48, num_features=32, num_experts=4, k=2))
    with torch.no_grad():
        sae.b_router.normal_(std=10)
    x = torch.randn(64, 48)
    wanted = sae(x).router_logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sae(x).router_logits, wanted, atol=0, rtol=0)


@pytest.mark.parametrize("E", [1, 5, 127, 128, 300, 2**15 - 1, 2**15])
def test_pairs_are_sorted_by_expert_however_narrow_their_ids_are_made(E):
    expert_ids = torch.cat([torch.tensor([E - 1, 0]), torch.randint(E, (98,))]).view(50, 2)
    order, offsets = ops.sort_by_expert(expert_ids, E)
    flat = expert_ids.flatten()
    assert torch.equal(order, flat.sort(stable=True).indices)
    assert torch.equal(offsets.diff(), torch.bincount(flat, minlength=E))


@BACKEND
@CASE
def test_autocast_takes_products_in_its_dtype_and_keeps_results_in_that_of_the_weights(
    backend, case
):
    """What autocast computes is what inputs and encoder rounded to its dtype give."""
    if case.batch_topk or case.threshold is not None:
        pytest.skip("at a border, rounding decides what is kept")
    inputs = case.tensors()
    rounded = {
        name: value.bfloat16()
        if name in ("x", "W_enc", "b_enc", "center") and value is not None
        else value
        for name, value in inputs.items()
    }
    W_dec = torch.randn(case.E * case.m, case.d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        acts, ids = encode(backend, inputs)
        y = backend.sparse_decode(acts, ids, W_dec)

    wanted, _ = encode(backend, rounded)
    assert acts.dtype == y.dtype == torch.float32
    torch.testing.assert_close(
        acts.sort(1).values, wanted.float().sort(1).values, atol=0.02, rtol=0.02
    )
    torch.testing.assert_close(y, backend.sparse_decode(acts, ids, W_dec), atol=0, rtol=0)
    for name, grad in gradients(acts, inputs).items():
        assert grad.dtype == inputs[name].dtype
        assert grad.isfinite().all()


@given(n=st.integers(0, 6), slots=st.integers(1, 7), data=st.data())
def test_keep_largest_keeps_the_k_largest_and_their_ids(n, slots, data):
    k = data.draw(st.integers(1, slots))
    acts = torch.rand(n, slots) * (torch.rand(n, slots) > 0.4)
    ids = (
        torch.stack([torch.randperm(50)[:slots] for _ in range(n)]) if n else torch.zeros(0, slots)
    )
    ids = ids.long()

    kept, kept_ids = ops.keep_largest(acts, ids, k)
    everything, _ = ops.keep_largest(acts, ids, None)

    assert kept.shape == kept_ids.shape == (n, k)
    torch.testing.assert_close(
        kept.sort(1, descending=True).values, acts.sort(1, descending=True).values[:, :k]
    )
    for row in range(n):
        pairs = dict(zip(ids[row].tolist(), acts[row].tolist(), strict=True))
        for feature, act in zip(kept_ids[row].tolist(), kept[row].tolist(), strict=True):
            assert pairs[feature] == act
    torch.testing.assert_close(everything.sum(1), acts.sum(1))
    assert everything.shape[1] == max(1, int((acts > 0).sum(1).max()) if n else 1)


# ---------------------------------------------------------------- backends, compiling


def test_a_backend_says_why_it_declines_and_is_refused_when_asked_for_all_the_same():
    told = ops.explain_backends("cpu", torch.float64)
    assert list(told) == ["triton", "native", "eager", "reference"]
    assert told["eager"] is told["reference"] is None
    assert "not torch.float64" in told["native"]
    assert "float64" in told["triton"] or "not installed" in told["triton"]
    with pytest.raises(BackendError, match="there are 'triton', 'native', 'eager', 'ref"):
        ops.use_backend("cuda").__enter__()
    with ops.use_backend("triton"), pytest.raises(BackendError, match=r"'triton' .* declines"):
        encode(ops, Case().tensors(torch.float64))


def test_the_backend_is_the_best_a_cpu_has_and_what_was_before_after_a_block():
    cpu = torch.device("cpu")
    best = native if WHY_NOT_NATIVE is None else eager
    assert backends.backend_for(cpu, torch.float32) is best
    assert backends.backend_for(cpu, torch.bfloat16) is eager
    with ops.use_backend("reference"):
        assert backends.backend_for(cpu, torch.float32) is reference
        with ops.use_backend("eager"):
            assert backends.backend_for(cpu, torch.float32) is eager
        assert backends.backend_for(cpu, torch.float32) is reference
    assert backends.backend_for(cpu, torch.float32) is best


@pytest.mark.parametrize("name", ["switch", "in_order", "two_experts", "one_expert"])
def test_operators_pass_torchs_own_check_of_custom_operators(name):
    """Schema, fake tensors, autograd registration, and AOTAutograd with dynamic shapes."""
    case = CASES[name]
    inputs = case.tensors()
    order = ("x", "center", "W_enc", "b_enc", "expert_ids", "gates", "k", "threshold")
    rest = (inputs["batch_topk"], case.in_order, inputs["counted"], None)
    arguments = (*(inputs[key] for key in order), *rest)
    torch.library.opcheck(torch.ops.hf_switch_sae.routed_encode, arguments)
    acts, ids = encode(ops, inputs)
    W_dec = torch.randn(case.E * case.m, case.d, requires_grad=True)
    arguments = (acts.detach().requires_grad_(), ids, W_dec, False, None)
    torch.library.opcheck(torch.ops.hf_switch_sae.sparse_decode, arguments)


def test_under_deterministic_algorithms_nothing_raises_and_nothing_changes():
    case = CASES["two_experts"]
    inputs = case.tensors()
    wanted, ids = encode(ops, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        acts, again = encode(ops, inputs)
        y = ops.sparse_decode(acts, again, torch.ones(case.E * case.m, case.d, requires_grad=True))
        y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close((acts, again), (wanted, ids), atol=0, rtol=0)


@FLOAT32
def test_nan_is_never_an_active_feature(backend):
    inputs = Case(m=64, k=4).tensors()  # wide enough for the two stages of top-k
    with torch.no_grad():
        clean, _ = encode(ops, inputs)
        inputs["x"][3] = torch.nan
        acts, _ = encode(ops, inputs)
        assert not acts[3].any()
        others = torch.arange(len(acts)) != 3
        torch.testing.assert_close(acts[others], clean[others])


@pytest.mark.parametrize("of", [eager, reference, pytest.param(native, marks=NATIVE.marks)])
@pytest.mark.parametrize("m", [8, 2048], ids=["one_stage", "two_stages"])
def test_nan_takes_no_place_among_the_largest(of, m):
    pre = torch.randn(9, m)
    pre[::2, 3] = torch.nan
    wanted, _ = reference.relu_topk(pre.nan_to_num(-1.0), 4)
    acts, ids = of.relu_topk(pre, 4)
    torch.testing.assert_close(acts.sort(1, descending=True).values, wanted, atol=0, rtol=0)
    torch.testing.assert_close(torch.where(acts > 0, pre.gather(1, ids), 0), acts, atol=0, rtol=0)


@FLOAT32
def test_shapes_that_do_not_go_together_are_refused_before_anything_is_read(backend):
    W, ids = torch.randn(2, 8, 16), torch.zeros(3, 1, dtype=torch.int64)
    for x in (torch.randn(3, 8), torch.randn(4, 16), torch.randn(16)):
        with pytest.raises(ValueError, match="n by width of W_enc"):
            ops.routed_encode(x, W, None, ids, None, 2)
    with pytest.raises(ValueError, match="must have one shape"):
        ops.sparse_decode(torch.ones(3, 2), ids, W)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["switch", "centered", "two_experts", "threshold"])
def test_forward_mode_derivatives_are_those_of_finite_differences(name, trained):
    inputs = CASES[name].tensors(torch.float64)
    W_dec = torch.randn(40, 48, dtype=torch.float64, requires_grad=trained)
    leaves = {k: v.detach() for k, v in inputs.items() if torch.is_tensor(v)}
    rest = {**inputs, **{k: v.requires_grad_(trained and v.is_floating_point())
                         for k, v in leaves.items()}}  # fmt: skip
    x, along = inputs["x"].detach(), torch.randn(23, 48, dtype=torch.float64)
    gates = inputs["gates"].detach()

    def code(x, gates):
        acts, ids = ops.routed_encode(**{**rest, "x": x, "gates": gates})
        return ops.sparse_decode(acts, ids, W_dec)

    turn = torch.rand_like(gates)
    _, slope = torch.func.jvp(code, (x, gates), (along, turn))
    step = 1e-6
    with torch.no_grad():
        rise = code(x + step * along, gates + step * turn)
        wanted = (rise - code(x - step * along, gates - step * turn)) / (2 * step)
    torch.testing.assert_close(slope, wanted, atol=1e-5, rtol=1e-5)


def test_a_tensor_without_memory_of_its_own_is_left_to_torch():
    acts, ids, W = torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64), torch.randn(8, 16)
    with FakeTensorMode() as mode, torch.no_grad():
        fake = [mode.from_tensor(each) for each in (acts, ids, W)]
        assert ops.sparse_decode(*fake).shape == (3, 16)
        if WHY_NOT_NATIVE is None:
            with pytest.raises(BackendError, match="a FakeTensor may have none"):
                native.gather_sum(*fake)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "acts", "x"])
def test_strides_do_not_matter_to_torch_compile(name):
    inputs = {"x": torch.randn(7, 16), "W_enc": torch.randn(2, 8, 16)}
    inputs |= {"W_dec": torch.randn(2, 8, 16), "acts": torch.rand(7, 3)}
    inputs[name] = inputs[name].mT.contiguous().mT
    leaves = {key: value.requires_grad_() for key, value in inputs.items()}
    experts, ids = torch.randint(2, (7, 1)), torch.randint(16, (7, 3))

    def total(x, W_enc, W_dec, acts):
        found, own = ops.routed_encode(x, W_enc, None, experts, None, 3)
        decoded = ops.sparse_decode(found, own, W_dec) + ops.sparse_decode(acts, ids, W_dec)
        return decoded.square().sum()

    wanted = torch.autograd.grad(total(**leaves), list(leaves.values()))
    found = torch.compile(total)(**leaves)
    torch.testing.assert_close(torch.autograd.grad(found, list(leaves.values())), wanted)


def test_autocast_leaves_float64_alone_as_torch_does():
    inputs = CASES["switch"].tensors(torch.float64)
    wanted, _ = encode(ops, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        acts, _ = encode(ops, inputs)
        grads = gradients(acts, inputs)
    torch.testing.assert_close(acts, wanted, atol=0, rtol=0)
    torch.testing.assert_close(grads, gradients(wanted, inputs), atol=0, rtol=0)


def test_blocks_of_use_backend_may_end_in_any_order():
    first, second = ops.use_backend("eager"), ops.use_backend("reference")
    cpu = torch.device("cpu")
    before = ops.backend_for(cpu, torch.float32)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ops.backend_for(cpu, torch.float32) is reference
    second.__exit__(None, None, None)
    assert ops.backend_for(cpu, torch.float32) is before


def test_backward_within_autocast_gives_the_gradients_of_backward_outside():
    inputs = CASES["centered"].tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        acts, _ = encode(ops, inputs)
        inside = gradients(acts, inputs)
        again, _ = encode(ops, inputs)
    torch.testing.assert_close(gradients(again, inputs), inside, atol=0, rtol=0)


@pytest.mark.parametrize("c", [1, 8, 15, 16, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_few_bits_are_rounded_once(c, dtype):
    z, W = torch.randn(c, 48).to(dtype), torch.randn(12, 48).to(dtype)
    out = torch.empty(c, 12, dtype=dtype)
    eager.products(z, W, out)
    exact = z.double() @ W.double().T
    assert ((out.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * 48**0.5).all()


# ---------------------------------------------------------------- memory of gradients


def large_gradient(W_dec: Tensor, acts: Tensor, ids: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(ops.sparse_decode(acts, ids, W_dec).square().sum(), W_dec)
    return grad


def test_a_gradient_takes_the_memory_of_the_one_before_but_never_of_one_in_use():
    W_dec = torch.randn(2048, 1100, requires_grad=True)  # 9 MB, over what is kept
    ids = torch.randint(2048, (5, 3))
    first = large_gradient(W_dec, torch.ones(5, 3), ids)
    wanted, place = first.clone(), first.data_ptr()

    second = large_gradient(W_dec, 2 * torch.ones(5, 3), ids)  # while the first is still held
    torch.testing.assert_close(first, wanted, atol=0, rtol=0)
    assert second.data_ptr() != place
    view, place = second[7], second.data_ptr()
    before = view.clone()
    del second

    third = large_gradient(W_dec, torch.ones(5, 3), ids)  # while a view of the second is held
    assert third.data_ptr() != place
    torch.testing.assert_close(view, before, atol=0, rtol=0)
    torch.testing.assert_close(third, wanted)
    place = third.data_ptr()
    del third

    assert large_gradient(W_dec, torch.ones(5, 3), ids).data_ptr() == place


def test_gradients_of_two_passes_add_up_in_place():
    W_dec = torch.randn(2048, 1100, requires_grad=True)
    acts, ids = torch.rand(5, 3), torch.randint(2048, (5, 3))
    for _ in range(3):
        ops.sparse_decode(acts, ids, W_dec).sum().backward()
    once = torch.autograd.grad(ops.sparse_decode(acts, ids, W_dec).sum(), W_dec)[0]
    torch.testing.assert_close(W_dec.grad, 3 * once)


def test_a_gradients_memory_is_not_used_again_while_somebody_has_its_storage():
    W_dec = torch.randn(2048, 1100, requires_grad=True)
    ids = torch.randint(2048, (5, 3))
    storage = large_gradient(W_dec, torch.ones(5, 3), ids).untyped_storage()
    again = large_gradient(W_dec, torch.ones(5, 3), ids)
    assert again.untyped_storage().data_ptr() != storage.data_ptr()


def test_the_memory_of_gradients_goes_with_the_weight():
    W_dec = torch.randn(2048, 1100, requires_grad=True)
    large_gradient(W_dec, torch.ones(5, 3), torch.randint(2048, (5, 3)))
    assert len(memory._kept) >= 1
    kept = len(memory._kept)
    del W_dec
    gc.collect()
    assert len(memory._kept) == kept - 1


_COUNT_FAULTS = """
import resource, statistics, torch
from hf_switch_sae import SwitchSAE, SwitchSAEAdam, SwitchSAEConfig

torch.manual_seed(0)
torch.set_num_threads(1)
config = SwitchSAEConfig(hidden_size=768, num_features=24576, num_experts=32, k=32)
sae, x, found = SwitchSAE(config).train(), torch.randn(2048, 768), []
optimizer = SwitchSAEAdam(sae)
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    sae(x).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(found[4:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_training_step_faults_in_no_memory_anew():
    """Its activations, 6 MB or 1500 pages each, lie where those of the step before lay."""
    command = [sys.executable, "-W", "ignore", "-c", _COUNT_FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200


def test_the_memory_of_gradients_is_given_back_on_demand():
    W_dec = torch.randn(2048, 1100, requires_grad=True)
    grad = large_gradient(W_dec, torch.ones(5, 3), torch.randint(2048, (5, 3)))
    wanted = grad.clone()
    assert W_dec in memory._kept
    ops.release_gradient_of(W_dec)
    ops.release_gradient_of(W_dec)  # again does nothing
    assert W_dec not in memory._kept
    torch.testing.assert_close(grad, wanted, atol=0, rtol=0)
