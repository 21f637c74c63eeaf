"""The kernels in C++: what only they do, and how they come to be on a machine."""

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from helpers.saes import make, rows

from hf_switch_sae import SparseFeatures, SwitchSAEAdam, explain_backends, ops
from hf_switch_sae.errors import BackendError, FeatureIdError
from hf_switch_sae.ops import backends, eager, reference
from hf_switch_sae.ops.native import build as native_build
from hf_switch_sae.ops.native import kernels as native

WHY_NOT = native.why_not(torch.device("cpu"), torch.float32)
NATIVE = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="no g++ here"
)
def test_where_there_is_a_compiler_the_kernels_compile():
    assert WHY_NOT is None


def rows_to_choose_from() -> dict[str, torch.Tensor]:
    """Pre-activations [12, 300] of many kinds."""
    x = torch.randn(12, 300)
    rare = torch.where(torch.rand(12, 300) < 0.02, x.abs(), -x.abs())
    spiked = x.clone()
    spiked[:, 7] = torch.inf
    spiked[:, 8] = torch.nan
    spiked[:, 9] = -torch.inf
    spiked[:, 10] = 1e30
    return {
        "random": x,
        "ties": (2 * x).round(),
        "all_alike": torch.ones(12, 300),
        "few_positive": rare,
        "none_positive": -x.abs(),
        "inf_and_nan": spiked,
        "tiny": 1e-42 * x,
        "far_apart": (10 * x).exp(),
    }


@NATIVE
@pytest.mark.parametrize("k", [1, 5, 32, 299, 300])
@pytest.mark.parametrize("kind", rows_to_choose_from())
def test_the_largest_are_those_of_the_definition_ties_included(kind, k):
    pre = rows_to_choose_from()[kind]
    acts, ids = native.relu_topk(pre, k)
    wanted_acts, wanted_ids = reference.relu_topk(pre, k)
    torch.testing.assert_close(acts.sort(1).values, wanted_acts.sort(1).values, atol=0, rtol=0)
    assert ((ids >= 0) & (ids < 300)).all()
    for row in range(len(pre)):
        mine = ids[row][acts[row] > 0].tolist()
        assert sorted(mine) == sorted(wanted_ids[row][wanted_acts[row] > 0].tolist())


@NATIVE
@pytest.mark.parametrize("few", [0, 3, 100], ids="few_{}".format)
@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "in_order"])
@pytest.mark.parametrize("m", [5, 64, 67], ids="m{}".format)
@pytest.mark.parametrize("d", [16, 21, 80], ids="d{}".format)
def test_products_agree_with_the_definition_whoever_takes_them(monkeypatch, few, gathered, m, d):
    monkeypatch.setattr(native, "_FEW", few)
    offsets = torch.tensor([0, 1, 1, 3, 10, 14])
    x, W, bias = torch.randn(14, d), torch.randn(5, m, d), torch.randn(5, m)
    picked = torch.randint(14, (14,)) if gathered else None
    for b in (bias, None):
        mine = native.expert_products(x, picked, W, b, offsets)
        wanted = reference.expert_products(x, picked, W, b, offsets)
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


@NATIVE
@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("d", [1, 37, 64])
def test_steps_of_adam_are_those_of_the_definition(unit_rows, d):
    torch.manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(3, 7, d), dim=-1)
    mine = [weight, torch.zeros_like(weight), torch.zeros_like(weight)]
    theirs = [tensor.double() for tensor in mine]
    for step in range(1, 5):
        grad = torch.randn_like(weight)
        rest = {"unit_rows": unit_rows, "scale": 0.3, "lr": 0.01, "betas": (0.9, 0.999)}
        for (w, m, v), g in ((mine, grad), (theirs, grad.double())):
            adam = native if w is weight else reference
            adam.adam_rows(w, g, m, v, float(step), **rest, eps=1e-8)
    torch.testing.assert_close(mine, [t.float() for t in theirs], atol=1e-6, rtol=1e-4)


@NATIVE
def test_a_step_is_noticed_by_a_graph_that_still_needs_the_weights():
    sae = make("switch").train()
    optimizer, output = SwitchSAEAdam(sae), sae(rows(5))
    output.loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


@NATIVE
def test_results_do_not_depend_on_the_number_of_threads():
    coefs, ids = torch.randn(9, 4), torch.randint(24, (9, 4))
    x, W = torch.randn(9, 16), torch.randn(24, 16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                (
                    native.gather_sum(coefs, ids, W),
                    native.row_dots(x, ids, W),
                    native.scatter_sum(coefs, ids, x, 24),
                    *native.relu_topk(x, 3),
                )
            )
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], atol=0, rtol=0)


@NATIVE
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("wrong", [-1, 24])
def test_a_feature_that_is_not_there_is_refused_and_nothing_is_read(tokens, wrong):
    sae = make("switch")
    F, d = sae.config.num_features, sae.config.hidden_size
    assert F == 24
    x = torch.randn(tokens, d)
    acts, ids = torch.ones(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int64)
    ids[-1, 1] = wrong
    features = SparseFeatures(acts, ids, F)
    calls = (
        lambda: sae.decode(features),
        lambda: sae.decode_delta(features),
        lambda: native.row_dots(x, ids, torch.randn(F, d)),
        lambda: native.scatter_sum(acts, ids, x, F),
    )
    for call in calls:
        with torch.no_grad(), pytest.raises(FeatureIdError, match=f"no feature {wrong}: there are"):
            call()
    acts[-1, 1] = 0  # an empty slot names nothing
    assert sae.decode(features).isfinite().all()


@NATIVE
def test_other_dtypes_are_refused_instead_of_read_as_float32():
    with pytest.raises(BackendError, match="computes float32"):
        native.relu_topk(torch.randn(3, 9, dtype=torch.float64), 2)


# ---------------------------------------------------------------- on a machine


@pytest.fixture
def fresh_machine(monkeypatch, tmp_path):
    """One on which nothing has been compiled; its cache is in `tmp_path`."""
    monkeypatch.setattr(native_build, "_found", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    backends._best_on_a_cpu.cache_clear()
    yield monkeypatch
    backends._best_on_a_cpu.cache_clear()


def compiler_that(does: str | bytes, folder) -> str:
    path = folder / "cxx"
    path.write_bytes(does if isinstance(does, bytes) else f"#!/bin/sh\n{does}\n".encode())
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (None, "need a C.. compiler, and CXX names '.*none', which is not there: install"),
        ("echo 'x.cpp:1: error: no OpenMP here' >&2; exit 1", "could not compile .* no OpenMP"),
        ("echo cxx 1.0", "could not be compiled and loaded"),
        (b"\x7fELF", "could not be compiled and loaded"),
        (b"", "could not be compiled and loaded"),
    ],
    ids=[
        *("no_compiler", "a_compiler_that_fails", "a_compiler_that_writes_nothing"),
        *("a_compiler_that_cannot_run", "a_command_that_is_none"),
    ],
)
def test_without_a_compiler_that_can_torchs_operators_compute(fresh_machine, tmp_path, does, said):
    if does is None:
        cxx = str(tmp_path / "none")
    elif does == b"":
        cxx = "g++ 'an open quote"
    else:
        cxx = compiler_that(does, tmp_path)
    fresh_machine.setenv("CXX", cxx)
    told = explain_backends("cpu")
    assert re.search(said, str(told["native"]))
    assert backends.backend_for(torch.device("cpu"), torch.float32) is eager
    assert make("switch")(rows(5)).loss.isfinite()
    with ops.use_backend("native"), pytest.raises(BackendError, match="declines"):
        make("switch")(rows(5))
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


@NATIVE
def test_what_is_compiled_is_kept_and_another_process_takes_it(fresh_machine, tmp_path):
    assert explain_backends("cpu")["native"] is None
    (kept,) = (tmp_path / "cache" / "hf_switch_sae").iterdir()
    changed = kept.stat().st_mtime_ns
    code = "import hf_switch_sae as h; print(h.explain_backends('cpu')['native'])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["None"]
    assert [kept] == list(kept.parent.iterdir())
    assert kept.stat().st_mtime_ns == changed


@NATIVE
def test_a_library_of_another_system_is_left_alone_and_one_made_here(fresh_machine, tmp_path):
    compiler = native_build._compiler()
    assert compiler is not None
    folder, written = tmp_path / "cache" / "hf_switch_sae", b"of another system"
    folder.mkdir(parents=True)
    checksum = hashlib.sha256(written).hexdigest()[:16]
    path = folder / f"native_{native_build._key(compiler)}_{checksum}.so"
    path.write_bytes(written)
    assert explain_backends("cpu")["native"] is None
    assert path.read_bytes() == written
    assert len(list(folder.iterdir())) == 2


@NATIVE
@pytest.mark.parametrize("bytes_left", [0, 100, 20000], ids="{}_bytes".format)
def test_a_library_that_was_cut_short_is_not_loaded(fresh_machine, tmp_path, bytes_left):
    assert explain_backends("cpu")["native"] is None
    (kept,) = (tmp_path / "cache" / "hf_switch_sae").iterdir()
    whole = kept.read_bytes()
    # not into the file itself, which is mapped
    (tmp_path / "short").write_bytes(whole[:bytes_left])
    (tmp_path / "short").replace(kept)
    code = "import hf_switch_sae as h; print(h.explain_backends('cpu')['native'])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert kept.stat().st_size == len(whole)


@NATIVE
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_where_nothing_can_be_kept_it_is_compiled_for_the_process(fresh_machine, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert explain_backends("cpu")["native"] is None


@NATIVE
def test_what_others_may_have_put_into_the_cache_is_not_run(fresh_machine, tmp_path):
    kept = tmp_path / "cache" / "hf_switch_sae"
    kept.mkdir(parents=True)
    kept.chmod(0o777)
    assert explain_backends("cpu")["native"] is None
    assert not list(kept.iterdir())


def test_a_library_is_of_its_compilers_flags():
    compiler = [sys.executable]
    assert native_build._key(compiler) != native_build._key([*compiler, "-O"])
    assert native_build._key(compiler) == native_build._key(compiler)


@NATIVE
def test_ids_of_any_integers_are_taken_in_both_directions():
    acts, W = torch.rand(3, 2, requires_grad=True), torch.randn(24, 16, requires_grad=True)
    grads = []
    for dtype in (torch.int64, torch.int32):
        ids = torch.arange(6).view(3, 2).to(dtype)
        grads.append(torch.autograd.grad(ops.sparse_decode(acts, ids, W).square().sum(), (acts, W)))
    torch.testing.assert_close(grads[1], grads[0], atol=0, rtol=0)


@NATIVE
def test_tensors_of_another_device_are_refused():
    with pytest.raises(BackendError, match="on a CPU"):
        native.relu_topk(torch.empty(3, 9, device="meta"), 2)


@NATIVE
def test_a_cache_that_is_a_file_is_no_cache(fresh_machine, tmp_path):
    (tmp_path / "cache").write_text("")
    assert explain_backends("cpu")["native"] is None
    assert (tmp_path / "cache").read_text() == ""


_TOO_LITTLE_MEMORY = """
import resource, torch
from hf_switch_sae.ops.native import kernels as native

n, k = 2**16, 64
coefs, ids, x = torch.ones(n, k), torch.zeros(n, k, dtype=torch.int64), torch.ones(n, 1)
native.scatter_sum(coefs[:1], ids[:1], x[:1], 8)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 16 * 2**20, resource.RLIM_INFINITY))
try:
    native.scatter_sum(coefs, ids, x, 8)
except MemoryError as err:
    print(err)
"""


@NATIVE
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc here")
def test_too_little_memory_is_an_error_and_not_the_end_of_the_process():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _TOO_LITTLE_MEMORY], capture_output=True, text=True
    )
    assert done.stdout.startswith("too little memory"), done.stderr
