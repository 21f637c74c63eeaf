"""The Triton kernels compute the primitives of `ops/reference.py`; here in Triton's interpreter."""

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import gpu
from torch import Tensor

from hf_switch_sae import SwitchSAE, SwitchSAEAdam, SwitchSAEConfig, ops
from hf_switch_sae.ops import reference
from hf_switch_sae.ops.triton import kernels as triton_kernels
from hf_switch_sae.ops.triton import rows as triton_rows
from hf_switch_sae.ops.triton import sums as triton_sums
from hf_switch_sae.sae import fvu as losses

pytestmark = pytest.mark.skipif(triton_kernels.triton is None, reason="Triton is not installed")

PRIMITIVES = ["expert_products", "relu_topk", "gather_sum", "row_dots", "scatter_sum"]
KERNELS = [*PRIMITIVES, "adam_rows"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPE = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def assert_exact_up_to_rounding(mine: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """`wanted` was computed in float64 from the same rounded inputs."""
    assert mine.dtype == dtype
    assert mine.is_contiguous()
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(
        mine.double(), wanted, atol=TOLERANCE[dtype] * scale, rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_has_the_signature_of_its_reference(name):
    mine, theirs = getattr(triton_kernels, name), getattr(reference, name)
    assert inspect.signature(mine) == inspect.signature(theirs)


# ---------------------------------------------------------------- encode

COUNTS = {
    "several_experts": [5, 19, 1],
    "empty_experts_at_start_middle_and_end": [0, 3, 0, 0, 20, 0],
    "all_pairs_on_one_of_four": [0, 0, 37, 0],
    "whole_blocks": [16, 32],
    "one_expert": [9],
    "one_pair": [0, 1, 0],
    "no_pairs": [0, 0],
}


@DTYPE
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_expert_products_agree_with_reference(dtype, counts):
    p, d, m = sum(counts), 37, 7
    x, rows = torch.randn(11, d).to(dtype), torch.randint(11, (p,))
    W, bias = torch.randn(len(counts), m, d).to(dtype), torch.randn(len(counts), m).to(dtype)
    offsets = torch.tensor([0, *counts]).cumsum(0)

    mine = triton_kernels.expert_products(x, rows, W, bias, offsets)

    wanted = reference.expert_products(x.double(), rows, W.double(), bias.double(), offsets)
    assert_exact_up_to_rounding(mine, wanted, dtype)


@pytest.mark.parametrize(("d", "m"), [(1, 1), (32, 16), (48, 40), (64, 33)])
@pytest.mark.parametrize("gathered", [True, False], ids=["rows", "in_place"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no_bias"])
def test_expert_products_agree_at_every_edge_of_a_tile(d, m, gathered, biased):
    counts = [18, 0, 16, 3, 1]  # five row blocks: the last group has one, not two
    p = sum(counts)
    x = torch.randn(p, d)
    rows = torch.randperm(p) if gathered else None
    W = torch.randn(5, m, d)
    bias = torch.randn(5, m) if biased else None
    offsets = torch.tensor([0, *counts]).cumsum(0)

    mine = triton_kernels.expert_products(x, rows, W, bias, offsets)

    torch.testing.assert_close(mine, reference.expert_products(x, rows, W, bias, offsets))


def test_expert_products_find_their_expert_among_512():
    counts = torch.randint(3, (512,)) * (torch.rand(512) < 0.05)
    counts[[0, 511]] = 2
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    x, W = torch.randn(int(offsets[-1]), 5), torch.randn(512, 3, 5)

    mine = triton_kernels.expert_products(x, None, W, None, offsets)

    torch.testing.assert_close(mine, reference.expert_products(x, None, W, None, offsets))


def test_expert_products_take_strided_rows_and_a_view_of_the_experts():
    x, W = torch.randn(20, 24).T[::2], torch.randn(8, 5, 20)[2:5]
    offsets = torch.tensor([0, 4, 4, 12])

    mine = triton_kernels.expert_products(x, None, W, None, offsets)

    torch.testing.assert_close(mine, reference.expert_products(x, None, W, None, offsets))


def assert_same_selection(pre: Tensor, k: int) -> None:
    """Selecting rounds nothing: the same acts at the same ids, exactly."""
    acts, ids = triton_kernels.relu_topk(pre, k)
    wanted_acts, wanted_ids = reference.relu_topk(pre, k)
    p, m = pre.shape
    assert acts.shape == ids.shape == (p, k)
    assert acts.dtype == pre.dtype
    assert ids.dtype == torch.int64
    assert bool(((ids >= 0) & (ids < m)).all())
    none = pre.new_zeros(p, m)
    # scatter_add: a feature selected twice would show
    mine = none.scatter_add(1, ids, acts)
    torch.testing.assert_close(mine, none.scatter_add(1, wanted_ids, wanted_acts), atol=0, rtol=0)
    assert bool(((acts > 0).sum(1) == (wanted_acts > 0).sum(1)).all())


@DTYPE
@pytest.mark.parametrize(("m", "k"), [(1, 1), (7, 1), (7, 7), (64, 5), (100, 33), (1000, 32)])
@pytest.mark.parametrize("shift", [0.0, -2.0, -50.0], ids=["half", "few", "none_positive"])
def test_relu_topk_agrees_with_reference(dtype, m, k, shift):
    assert_same_selection((torch.randn(4, m) + shift).to(dtype), k)


@DTYPE
@pytest.mark.parametrize("m", [50, 200])
def test_of_equal_activations_the_lowest_index_is_kept(dtype, m):
    pre = torch.randint(-1, 3, (6, m)).to(dtype)
    pre[0] = 1.0
    pre[1], pre[1, 9:29] = -1.0, 2.0
    pre[2], pre[2, m // 2 :] = 0.5, 1.0
    pre[3] = torch.linspace(1, 5, m)
    pre[3, -10:] = 6.0
    assert_same_selection(pre, 7)
    _, ids = triton_kernels.relu_topk(pre, 7)
    for row, first in ((0, 0), (1, 9), (2, m // 2), (3, m - 10)):
        assert ids[row].sort().values.tolist() == list(range(first, first + 7))


@DTYPE
def test_relu_topk_never_selects_nan_and_orders_extremes(dtype):
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    row = [float("nan"), top, float("inf"), -float("inf"), tiny, 0.0, -0.0, 1.0, -1.0]
    pre = torch.tensor([row]).to(dtype)
    if dtype != torch.bfloat16:  # of which the interpreter takes subnormal numbers for 0
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        least = torch.ones(1, 2, dtype=bits).view(dtype)  # the smallest above 0 that there is
        pre = torch.cat([pre, least], dim=1)
    for k in range(1, pre.shape[1] + 1):
        assert_same_selection(pre, k)


def test_relu_topk_tells_neighboring_floats_apart():
    one = torch.tensor(1.0)
    steps = [one]
    for _ in range(40):
        steps.append(steps[-1].nextafter(torch.tensor(2.0)))
    assert_same_selection(torch.stack(steps)[torch.randperm(41)][None], 20)


@pytest.mark.parametrize(("m", "k"), [(33, 3), (64, 8), (65, 20), (200, 2)])
def test_rows_too_long_for_one_program_are_selected_in_rounds(monkeypatch, m, k):
    monkeypatch.setattr(triton_kernels, "MAX_ROW", 32)
    assert_same_selection(torch.randn(3, m), k)
    assert_same_selection(torch.randint(-1, 3, (3, m)).float(), k)


def test_relu_topk_of_no_rows_is_empty():
    assert_same_selection(torch.randn(0, 6), 2)


# ---------------------------------------------------------------- rows of W


def sparse(n: int, k: int, F: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Coefficients of any sign with an empty row and a half empty one; a feature named twice."""
    coefs, ids = torch.randn(n, k).to(dtype), torch.randint(F, (n, k))
    if n > 3:
        coefs[2], coefs[3, k // 2 :] = 0.0, 0.0
        ids[1] = 5 % F
        ids[ids == 4] = 0  # feature 4 is nobody's
    return coefs, ids


SHAPES = pytest.mark.parametrize(
    ("n", "k", "F", "d"),
    [(6, 4, 9, 37), (5, 1, 3, 1), (1, 3, 8, 48), (3, 35, 40, 16), (4, 6, 7, 300), (0, 3, 4, 8)],
)


@DTYPE
@SHAPES
def test_gather_sum_agrees_with_reference(dtype, n, k, F, d):
    coefs, ids = sparse(n, k, F, dtype)
    W = torch.randn(F, d).to(dtype)

    mine = triton_kernels.gather_sum(coefs, ids, W)

    wanted = reference.gather_sum(coefs.double(), ids, W.double())
    assert_exact_up_to_rounding(mine, wanted, dtype)


@DTYPE
@SHAPES
def test_row_dots_agree_with_reference(dtype, n, k, F, d):
    _, ids = sparse(n, k, F, dtype)
    g, W = torch.randn(n, d).to(dtype), torch.randn(F, d).to(dtype)

    mine = triton_kernels.row_dots(g, ids, W)

    assert_exact_up_to_rounding(mine, reference.row_dots(g.double(), ids, W.double()), dtype)


@DTYPE
@SHAPES
def test_scatter_sum_agrees_with_reference(dtype, n, k, F, d):
    coefs, ids = sparse(n, k, F, dtype)
    x = torch.randn(n, d).to(dtype)

    mine = triton_kernels.scatter_sum(coefs, ids, x, F)

    wanted = reference.scatter_sum(coefs.double(), ids, x.double(), F)
    assert_exact_up_to_rounding(mine, wanted, dtype)


@pytest.mark.parametrize("n", [15, 16, 17, 70])
@pytest.mark.parametrize("window", [16, 32, 256])
def test_scatter_sum_of_a_feature_in_every_token_is_a_sum_over_windows(monkeypatch, n, window):
    monkeypatch.setattr(triton_rows, "WINDOW", window)
    coefs, ids = torch.randn(n, 3), torch.randint(2, 6, (n, 3))
    ids[:, 0], ids[:, 1] = 4, 0
    coefs[::3, 2] = 0
    x = torch.randn(n, 20)
    mine = triton_kernels.scatter_sum(coefs, ids, x, 6)
    wanted = reference.scatter_sum(coefs.double(), ids, x.double(), 6)
    assert_exact_up_to_rounding(mine, wanted, torch.float32)


def of_experts(counts, m, k, d):
    """coefs, ids, x of tokens in the order of experts; every third has a single used slot."""
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
    n = len(experts)
    coefs, ids = torch.randn(n, k), torch.rand(n, m).argsort(1)[:, :k] + m * experts
    coefs[::3, 1:] = 0
    # as `relu_topk` leaves them: names the feature that the used slot may have
    ids[::3, 1:] = m * experts[::3]
    ids[::6, 0] = m * experts[::6, 0]
    return coefs, ids, torch.randn(n, d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("m", "k", "d"), [(16, 2, 32), (33, 5, 37), (7, 7, 1)])
def test_sums_by_expert_are_products_of_16_bits(monkeypatch, dtype, counts, m, k, d):
    coefs, ids, x = of_experts(counts, m, k, d)
    coefs, x = coefs.to(dtype), x.to(dtype)
    called = []
    monkeypatch.setattr(triton_sums, "_spread", _Seen(triton_sums._spread, called))
    mine = triton_kernels.scatter_sum(coefs, ids, x, len(counts) * m, num_experts=len(counts))
    assert bool(called) == bool(sum(counts))
    wanted = reference.scatter_sum(coefs.double(), ids, x.double(), len(counts) * m)
    assert_exact_up_to_rounding(mine, wanted, dtype)


class _Seen:
    def __init__(self, kernel, called):
        self.kernel, self.called = kernel, called

    def __getitem__(self, grid):
        self.called.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize(("m", "k"), [(24, 3), (triton_sums.FEATURES_A_SLOT * 2 + 1, 2)])
def test_autocast_sums_by_expert_in_bfloat16_into_float32_where_that_is_faster(m, k):
    coefs, ids, x = of_experts([9, 0, 21], m, k, 20)
    out = torch.full((3 * m, 20), torch.nan)
    given = coefs, ids, x, 3 * m, out, 3
    assert triton_kernels.scatter_sum(*given, torch.bfloat16) is out
    rough = out.clone()
    exact = reference.scatter_sum(coefs.double(), ids, x.double(), 3 * m)
    torch.testing.assert_close(rough.double(), exact, atol=3e-2, rtol=3e-2)
    worth_it = triton_sums.worth_it(30, k, m, torch.bfloat16)
    assert worth_it == (m == 24)
    assert (distance(rough, exact) > 1e-4) == worth_it
    for low in (None, torch.float16):  # which has not the range of a gradient
        assert distance(triton_kernels.scatter_sum(*given, low), exact) < 1e-6


def distance(mine, exact):
    return float((mine.double() - exact).norm() / exact.norm())


def test_there_is_a_bound_to_the_memory_of_sums_by_expert():
    n = triton_sums.MOST_BYTES // (2 * 1024)
    assert triton_sums.worth_it(n, 32, 1024, torch.bfloat16)
    assert not triton_sums.worth_it(n + 1, 32, 1024, torch.bfloat16)
    assert not triton_sums.worth_it(1, 32, 1024, torch.float32)


# ---------------------------------------------------------------- the losses


ROWS_OF = pytest.mark.parametrize(("n", "d"), [(0, 5), (1, 1), (65, 37), (130, 300)], ids=str)


@DTYPE
@ROWS_OF
@pytest.mark.parametrize("some", [True, False], ids=["some_count", "all_count"])
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_sums_over_rows_agree_with_reference(backend, dtype, n, d, some):
    x, x_hat = (torch.randn(n, d).to(dtype) for _ in range(2))
    counted = torch.rand(n) < 0.7 if some else None
    mean, scales = torch.randn(d), (torch.tensor(-1.5), torch.tensor(torch.nan))
    if some:
        x[~counted] = torch.nan
    calls = {
        "column_sums": [(x, counted)],
        "squared_sums": [(x, h, m, counted) for h in (x_hat, None) for m in (mean, None)],
        "scaled_errors": [(x, x_hat, s, counted, want) for s in scales for want in (True, False)],
    }
    loose = 1e-4 if dtype == torch.float32 else TOLERANCE[dtype]
    for name, givens in calls.items():
        assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))
        for given in givens:
            with ops.use_backend(backend):
                mine = getattr(ops, name)(*given)
            wanted = getattr(reference, name)(*given)
            torch.testing.assert_close(mine, wanted, atol=20 * loose, rtol=loose, equal_nan=True)


def test_sums_over_rows_are_taken_whatever_backend_was_asked_for():
    x = torch.randn(5, 3, dtype=torch.float64)
    for name in ("triton", "native", "eager", "reference"):
        with ops.use_backend(name):
            assert torch.equal(ops.column_sums(x, None), x.sum(0))


@pytest.mark.parametrize("some", [True, False], ids=["some_count", "all_count"])
def test_fvu_and_its_gradients_are_those_of_the_formula(some):
    counted = torch.rand(70) < 0.7 if some else None
    x, x_hat = (torch.randn(70, 20, requires_grad=True) for _ in range(2))
    bias = torch.randn(20, requires_grad=True)
    wanted = losses.fvu_formula(x, x_hat, counted, None, bias)
    gradients = torch.autograd.grad(wanted, (x, x_hat, bias))
    with ops.use_backend("triton"):
        mine = losses.fvu_of(x, x_hat, counted, None, bias)
        torch.testing.assert_close(torch.autograd.grad(mine, (x, x_hat, bias)), gradients)
    torch.testing.assert_close(mine, wanted)


# ---------------------------------------------------------------- the optimizer


@DTYPE
@pytest.mark.parametrize("shape", [(3, 5, 48), (4, 1), (7,), (2, 1500)], ids=str)
@pytest.mark.parametrize("unit_rows", [True, False], ids=["unit_rows", "free"])
@pytest.mark.parametrize(
    ("step", "eps"), [(1, 1e-8), (7.0, 0.0), (torch.tensor(300.0), 1e-3), (1e6, 1e-8)], ids=str
)
def test_adam_agrees_with_reference(dtype, shape, unit_rows, step, eps):
    w, g, mean = (torch.randn(shape).to(dtype) for _ in range(3))
    square = torch.rand(shape).to(dtype)
    if unit_rows:
        w = (w / w.norm(dim=-1, keepdim=True)).to(dtype)
    wanted = [t.double() for t in (w, g, mean, square)]
    rule = {"unit_rows": unit_rows, "scale": torch.tensor(0.25), "betas": (0.9, 0.999), "eps": eps}
    version = w._version
    triton_kernels.adam_rows(w, g, mean, square, step, lr=0.01, **rule)
    assert w._version > version
    step = step.double() if isinstance(step, Tensor) else step
    reference.adam_rows(*wanted, step, lr=0.01, **rule)
    for mine, theirs in zip((w, mean, square), (wanted[0], *wanted[2:]), strict=True):
        assert_exact_up_to_rounding(mine, theirs, dtype)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.5), (0.999, 0.99999)], ids=str)
def test_adam_corrects_its_moments_to_all_digits_at_any_rate(betas):
    """And takes its learning rate from a tensor."""
    start = [torch.randn(2, 30), torch.randn(2, 30), torch.zeros(2, 30), torch.zeros(2, 30)]
    for step in (1, 2, 100, 250, 251, 10**5):
        mine, wanted = [t.clone() for t in start], [t.double() for t in start]
        rule = {"unit_rows": False, "scale": 1.0, "betas": betas, "eps": 1e-8}
        triton_kernels.adam_rows(*mine, step, lr=torch.tensor(0.5), **rule)
        reference.adam_rows(*wanted, step, lr=0.5, **rule)
        torch.testing.assert_close(mine[0].double(), wanted[0], atol=1e-6, rtol=1e-6)


def test_an_sae_trains_on_these_kernels_as_on_torchs_operators():
    """Whole steps, the optimizer's among them, in float32 and as under autocast."""
    for autocast, allowed in ((False, 1e-4), (True, 3e-2)):
        config = SwitchSAEConfig(hidden_size=24, num_features=48, num_experts=3, k=4)
        torch.manual_seed(0)
        mine = SwitchSAE(config).train()
        theirs, x = copy.deepcopy(mine), torch.randn(60, 24)
        for sae, backend in ((mine, "triton"), (theirs, "eager")):
            optimizer = SwitchSAEAdam(sae, lr=1e-3)
            with ops.use_backend(backend):
                for _ in range(2):
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = sae(x).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert distance(p.detach(), q.detach().double()) <= allowed, name


@pytest.mark.parametrize("num_rows", [2**15 - 1, 2**15, 2**15 + 1])
def test_scatter_sum_knows_its_features_at_the_edge_of_a_narrow_key(monkeypatch, num_rows):
    coefs, ids = torch.tensor([[2.0, 0.0]]), torch.tensor([[num_rows - 1, 0]])
    # only the pairs' places are looked at: 32768 interpreted programs would take too long
    seen = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda coefs, order, begins, *_, **__: seen.update(order=order, begins=begins)

    monkeypatch.setattr(triton_rows, "_scatter_sum", Kernel())
    triton_kernels.scatter_sum(coefs, ids, torch.ones(1, 1), num_rows)
    only = torch.zeros(num_rows, dtype=torch.int64)
    only[-1] = 1
    torch.testing.assert_close(seen["begins"].diff(), only)
    assert seen["order"][seen["begins"][num_rows - 1]] == 0


def test_a_slot_of_zero_reads_and_adds_nothing_whatever_its_row_holds():
    coefs, ids = torch.tensor([[1.0, 0.0, -0.0]]), torch.tensor([[1, 0, 0]])
    W = torch.tensor([[float("nan"), float("inf")], [3.0, 4.0]])
    assert triton_kernels.gather_sum(coefs, ids, W).tolist() == [[3.0, 4.0]]
    x = torch.tensor([[5.0, 6.0]])
    assert triton_kernels.scatter_sum(coefs, ids, x, 2).tolist() == [[0.0, 0.0], [5.0, 6.0]]
    nowhere = torch.tensor([[float("inf"), 1.0]])
    assert not triton_kernels.scatter_sum(0 * coefs, ids, nowhere, 2).any()


# ---------------------------------------------------------------- where it works


def test_it_works_for_three_dtypes_and_declines_float64_by_name():
    cpu = torch.device("cpu")
    assert [triton_kernels.why_not(cpu, dtype) for dtype in TOLERANCE] == [None] * 3
    assert "float64" in triton_kernels.why_not(cpu, torch.float64)


def test_outside_the_interpreter_it_declines_a_device_without_cuda(monkeypatch):
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    assert "cpu" in triton_kernels.why_not(torch.device("cpu"), torch.float32)


def test_on_a_gpu_it_declines_what_triton_cannot_do_there(monkeypatch):
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    capability = {"now": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability["now"])
    monkeypatch.setenv("CC", "cc")
    gpu = torch.device("cuda:0")
    assert triton_kernels.why_not(gpu, torch.bfloat16) is None
    capability["now"] = (7, 5)
    assert "has 7.5" in triton_kernels.why_not(gpu, torch.float16)
    capability["now"] = (9, 0)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "compiler" in triton_kernels.why_not(gpu, torch.bfloat16)


def test_the_tuner_tries_only_tiles_of_the_dtype_that_an_expert_fills():
    """Asked as Triton asks, in a process of its own, as this one interprets."""
    code = (
        "import torch; from hf_switch_sae.ops.triton import kernels\n"
        "tuner = kernels._expert_products\n"
        "for dtype in (torch.bfloat16, torch.float32):\n"
        "    tuner.nargs = {'x_ptr': torch.zeros(1, dtype=dtype)}\n"
        "    for share in (16, 128):\n"
        "        tried = tuner.prune_configs({'share': share, 'E': 2, 'm': 3, 'd': 4})\n"
        "        print(len(tried), max(config.kwargs['BLOCK_M'] for config in tried))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split("\n")[:4] == ["1 16", "6 128", "1 16", "5 128"]


def test_without_triton_the_module_imports_and_says_what_is_missing():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from hf_switch_sae.ops.triton import kernels\n"
        "print(kernels.why_not(torch.device('cuda'), torch.float32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "not installed" in done.stdout


def test_every_kernel_compiles_for_an_h100_and_products_use_its_tensor_cores():
    """The compiler needs no GPU; only the loads, stores and speed do. In a process of its own, as
    this one interprets."""
    script = Path(__file__).parents[1] / "helpers" / "triton_for_h100.py"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, env=env
    )
    kernels = json.loads(done.stdout)
    others = {"long_sums", "spread", "expert_sums", "adam_rows"}
    others |= {"column_sums", "squared_sums", "scaled_errors"}
    assert {name.split()[0] for name in kernels} == {*PRIMITIVES, *others}
    for name, kernel in kernels.items():
        assert kernel["shared"] <= 227 * 1024, name
        products = name.startswith(("expert_products bf16", "expert_sums"))
        assert kernel["wgmma"] == products, name
        assert not name.startswith("expert_sums") or kernel["shared"] > 2**17, "not pipelined"


# ---------------------------------------------------------------- the benchmark for a GPU


def test_the_gpu_benchmarks_comparisons_hold_in_the_interpreter():
    for what, error, allowed in gpu.check(torch.device("cpu")):
        assert error <= allowed, what


def test_the_gpu_benchmark_finds_a_wrong_kernel_and_a_wrong_gradient(monkeypatch):
    cpu, right = torch.device("cpu"), triton_kernels.row_dots
    monkeypatch.setattr(triton_kernels, "row_dots", lambda *args: 1.001 * right(*args))
    errors = gpu.kernel_errors(gpu.SMALL, torch.float32, cpu)
    assert [name for name, error in errors.items() if error > 1e-5] == ["row_dots"]

    forward = SwitchSAE.forward

    def slightly_off(self, x):
        output = forward(self, x)
        if self.b_dec.dtype == torch.float32:
            output.loss = output.loss + 1e-2 * self.W_enc.sum()
        return output

    monkeypatch.setattr(SwitchSAE, "forward", slightly_off)
    assert gpu.model_errors(cpu, autocast=False, n=64)["d experts.0.W_enc"] > 1e-4


def test_the_gpu_benchmark_times_every_primitive_and_the_step(monkeypatch):
    """All but the clock, which is CUDA's."""
    cpu = torch.device("cpu")

    def once(calls, rounds=1):
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 2.0)

    monkeypatch.setattr(gpu, "medians", once)
    monkeypatch.setattr(gpu, "GEMM", 8)
    monkeypatch.setattr(gpu, "COPIED", 64)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    rows = gpu.time_primitives(gpu.SMALL, torch.bfloat16, cpu) + gpu.time_steps(gpu.SMALL, cpu)[0]

    lines = gpu.table(rows, gpu.SMALL).splitlines()
    assert lines[0].startswith("**a GPU**")
    assert all(line.count("|") == 6 for line in lines[2:])
    for name in PRIMITIVES:
        assert any(line.startswith(f"| {name} bfloat16 | 2.000 |") for line in lines)
    assert any("training step" in line and "| 0.600 | 0.30 |" in line for line in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_and_model_are_right_on_a_real_gpu():
    """In a process of its own, as this one interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, gpu.__file__, "--check"], check=True, env=env)
