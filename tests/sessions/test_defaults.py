"""Where torch makes new tensors, and of which dtype, changes nothing and breaks nothing.

A program may call `torch.set_default_device` or `torch.set_default_dtype`, or run its code within
`with torch.device(...)`. "meta" stands for any other device: what lands there has no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import saes, stores, tiny
from torch import Tensor

from hf_switch_sae import (
    Ablate,
    BackendError,
    Clamp,
    ConversionError,
    FeatureStore,
    Patch,
    Recipe,
    Scale,
    SparseFeatures,
    Steer,
    SwitchSAE,
    SwitchSAEAdam,
    export,
    export_recipe,
    fingerprint,
    ops,
    record,
    residuals,
)
from hf_switch_sae.activations.policy import TokenPolicy
from hf_switch_sae.activations.shuffle import order_of
from hf_switch_sae.edits.kinds import edit_from_dict
from hf_switch_sae.evaluation.heldout import RowSums
from hf_switch_sae.formats import EXPORTS
from hf_switch_sae.formats.parity import parity_with
from hf_switch_sae.geometry.measure import measure_geometry
from hf_switch_sae.geometry.result import Geometry
from hf_switch_sae.ops.native import kernels, token
from hf_switch_sae.sessions.provenance import weights_hash
from hf_switch_sae.text.documents import Document
from hf_switch_sae.text.windows import batches_of, windows_of
from hf_switch_sae.training.initialization import start_from
from hf_switch_sae.training.monitor import Monitor
from hf_switch_sae.training.saes import fired_of, measure_of


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "within another device": lambda: torch.device("meta"),
    "another default device": lambda: default_device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
}


def flat(value: Any) -> Any:
    """A result as something that compares bit for bit, dtypes and devices included."""
    if isinstance(value, SparseFeatures):
        value = (value.acts, value.ids)
    if isinstance(value, Tensor):
        value = value.detach()
        value = value.to_dense() if value.layout != torch.strided else value
        return str(value.dtype), str(value.device), repr(value.tolist())  # as text, nan is nan
    if isinstance(value, dict):
        return {str(key): flat(each) for key, each in value.items()}
    return [flat(each) for each in value] if isinstance(value, list | tuple) else repr(value)


class Case:
    """Everything that the user would have before, made with torch's own defaults."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.lm = tiny.llama()
        self.sae = tiny.sae_for(self.lm)
        self.folder.mkdir()
        self.other, self.measured = saes.make(kind), saes.make(kind)
        self.fresh = saes.make("switch")
        self.trained = saes.make(kind, auxk_loss_coef=0.1, dead_after_tokens=3).train()
        self.kinds = {name: saes.make(name) for name in ("plain_jumprelu", "plain_topk")}
        torch.manual_seed(2)
        self.x, self.ids = torch.randn(7, saes.D), torch.randint(4, 90, (2, 6))
        self.many = torch.randn(40, saes.D)
        self.source = self.sae.encode(torch.randn(6, 32))
        self.mask = torch.tensor([[True] * 5 + [False] * 2]).flatten()


def edits(case: Case) -> Any:
    for edit in (
        Steer([5, 7], 0.7),
        Steer(5, 1.0, unit="norm", positions="prompt"),
        Steer(5, 2.0, when=(3, 0.01)),
        Scale(3, 2.0, rows=[1]),
        Ablate([1, 2, 3], positions=[[True, False], [True, True]]),
        Clamp(9, 1.0, positions=[2, 4]),
        Clamp(9, 1.0, unit="raw", positions=slice(1, 5)),
        Patch(case.source, features=[4, 5]),
        edit_from_dict(json.loads(json.dumps(Patch(case.source).to_dict()))),
    ):
        with case.sae.attach(case.lm) as session:
            session.edit(edit)
            yield case.lm(case.ids).logits, session.features


def splice(case: Case) -> Any:
    with case.sae.attach(case.lm, splice=True) as session:
        yield case.lm(case.ids).logits
        yield str(session.preflight({"input_ids": case.ids}))


def identity(case: Case) -> Any:
    yield fingerprint(case.lm)
    yield weights_hash(case.sae)
    yield SwitchSAE.for_lm(case.lm, at=1).config.base_model_fingerprint
    with residuals(case.lm, [1]) as read:
        yield read(input_ids=case.ids)


def codes(case: Case) -> Any:
    sae = case.other
    for x in (case.x, case.x[:1], case.x[None, 3:4]):
        features = sae.encode(x)
        yield features, sae.decode(features, x), sae.decode_delta(features)
        yield features.select([0, 3]), features.to_csr(), features.to_dense(), features.l0()
        yield sae(x).fvu
    yield sae.decoder_rows([3, 1]), sae.batch_sums(case.x), sae.is_outlier(case.x)


def training(case: Case) -> Any:
    sae = case.trained
    optimizer = SwitchSAEAdam(sae, lr=1e-2)
    monitor = Monitor({"one": sae})
    for _ in range(3):
        optimizer.zero_grad()
        output = sae(case.many, attention_mask=torch.ones_like(case.many[:, 0]))
        output.loss.backward()
        yield output.loss, output.fvu, output.features, optimizer.step(), optimizer.grad_norm
        measured = measure_of(sae, case.many, output, output.loss)
        monitor.add([measured])
        yield measured, fired_of(sae, output)
    yield dict(sae.named_parameters()), dict(sae.named_buffers()), optimizer.state_dict()["state"]


def calibration(case: Case) -> Any:
    sae = case.measured
    sae.calibrate([case.many, case.x])
    yield dict(sae.named_buffers())
    sums = RowSums(sae)
    sums.add(case.many)
    yield sums.figures(lambda total: total), sums.density(lambda total: total)
    for how in ("geometric_median", "data"):
        start_from(case.fresh, case.many, 100.0, how)
        yield dict(case.fresh.named_parameters())


def kernels_of_each_backend(case: Case) -> Any:
    for name in ("eager", "native", "reference"):
        if name == "native" and kernels.why_not(torch.device("cpu"), torch.float32):
            continue
        with ops.use_backend(name):
            x = case.many.clone().requires_grad_()
            output = case.other(x)
            output.loss.backward()
            yield output.reconstruction, output.features, x.grad


def recording(case: Case) -> Any:
    documents = [[5, 6, 7, 8], [9, 4, 3, 2, 1, 11], [5, 6]]
    store = record(case.lm, case.sae, documents, case.folder / "store", progress=False, context=8)
    store.index()
    store = FeatureStore(case.folder / "store")
    yield [stores.all_rows(store).features(64), store.density(), store.max_acts()]
    feature = int(store.max_acts().argmax())
    yield [store.top_tokens(feature), store.sample(feature), store.coactivation(feature)]
    yield [store.around(1, 2).features, store.features_of([5, 6]), store.to_csr()]
    yield store.to_csr(range(0))
    yield [vars(each) for each in batches_of(windows_of([Document(3, [5, 6, 7])], None, 2), 8)]


def figures(case: Case) -> Any:
    sae = case.other
    found = measure_geometry(sae, maps=False)
    yield {name: getattr(found, name) for name in ("nearest", "pairs", "router", "table")}
    found.save(case.folder)
    yield Geometry.load(case.folder).table
    yield (
        order_of(9, 1),
        TokenPolicy(True, (5, 7), None).allows(case.ids, torch.ones_like(case.ids)),
    )
    yield parity_with(sae, lambda x: (sae.encode(x).to_dense(), sae.decode(sae.encode(x), x)), "")


def exported(case: Case) -> Any:
    for format in EXPORTS:
        sae = case.kinds["plain_jumprelu" if "gemma" in format else "plain_topk"]
        try:
            export(sae, case.folder / format, format)
        except ConversionError as err:
            yield str(err)
            continue
        for file in sorted((case.folder / format).rglob("*.*")):
            yield file.name, file.read_bytes()
    for name in ("vector.pt", "vector.csv"):
        recipe = Recipe("org/name", (Steer(3, 0.5),), hookpoint="layers.2.resid_post")
        export_recipe(recipe, case.sae, case.folder / name, sparse_model="org/name")
        yield (case.folder / name).read_bytes()


PATHS = [
    *(edits, splice, identity, codes, training, calibration, kernels_of_each_backend),
    *(recording, figures, exported),
]
OF_KINDS = ["switch", "plain_batch_topk", "jumprelu", "two_experts", "layer_norm"]
ASKED = [
    *((path, "switch") for path in PATHS),
    *((path, kind) for path in (codes, training, calibration) for kind in OF_KINDS[1:]),
]


def results(path: Callable[[Case], Any], case: Case) -> Any:
    with torch.set_grad_enabled(path in (training, kernels_of_each_backend)):
        return [flat(each) for each in path(case)]


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize(
    ("path", "kind"), ASKED, ids=[f"{path.__name__}-{kind}" for path, kind in ASKED]
)
def test_torchs_defaults_change_no_bit_of(path, kind, name, tmp_path):
    wanted = results(path, Case(kind, tmp_path / "plain"))
    case = Case(kind, tmp_path / "other")

    with DEFAULTS[name]():
        found = results(path, case)

    assert found == wanted


@pytest.mark.skipif(kernels.why_not(torch.device("cpu"), torch.float32) is not None, reason="none")
@pytest.mark.parametrize("wrong", ["acts", "ids", "x"])
def test_no_address_of_another_device_reaches_the_kernels(wrong):
    sae = saes.make()
    weights = (
        *(sae.input_scale, sae.outlier_norm, sae.router.weight, sae.b_router, sae.b_dec),
        *(sae.W_enc, sae.b_enc, sae.W_dec),
    )
    plan = token.TokenPlan(weights, (saes.K, True, True))
    acts, ids = torch.rand(1, 3), torch.zeros(1, 3, dtype=torch.int64)
    x = torch.zeros(1, saes.D)
    given = {"acts": acts, "ids": ids, "x": x}
    given[wrong] = given[wrong].to("meta")
    compute = plan.encode if wrong == "x" else plan.decode
    with pytest.raises(BackendError, match="work in a CPU's memory"):
        compute(*([given["x"]] if wrong == "x" else [given["acts"], given["ids"]]))
