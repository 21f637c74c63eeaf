"""Figures of a finished SAE on held-out text: each against its definition, whatever the batches."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import activations, tiny
from helpers.trained import launch
from torch import nn

from hf_switch_sae import (
    AttachError,
    BaseModelError,
    ConfigError,
    HookpointError,
    SwitchSAE,
    TextError,
    TrainingError,
    WidthError,
    hook_residual,
)
from hf_switch_sae.text.contexts import Marks, Packer
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.training import evaluate

KEYS = {"fvu", "mse", "cosine", "l0", "dead_share", "expert_load", "routing_entropy", "tokens"}
KEYS |= {"fvu_all_tokens", "outlier_tokens"}
CE = {"ce_clean", "ce_spliced", "ce_ablated", "ce_zero", "kl", "ce_tokens"}
CE |= {"ce_recovered", "ce_recovered_zero"}
BESIDE = {"measured_on", "density"}


@pytest.fixture
def lm() -> nn.Module:
    return make_lm()


def make_lm() -> nn.Module:
    """Of predictions that depend on the stream, so that ablation costs something."""
    found = tiny.llama()
    with torch.no_grad():
        found.lm_head.weight.mul_(30)
    return found


def outlying(sae: SwitchSAE, norms: torch.Tensor, share: float = 0.9) -> SwitchSAE:
    """With a bound that some tokens are over."""
    sae.outlier_norm.fill_(float(norms.quantile(share)))
    return sae


def contexts(windows: bool) -> list[list[int]]:
    packer = Packer(read_documents(activations.DOCUMENTS), None, 16, Marks(), windows)
    return [each.tokens for each in packer.contexts(epochs=1)]


def stream_of(lm: nn.Module, tokens: list[int]) -> torch.Tensor:
    return activations.plain_rows(lm, [tokens], skip_first=False)


@torch.no_grad()
def definition(lm: nn.Module, sae: SwitchSAE, texts: list[list[int]], first: int) -> dict:
    """In float64, one context after the other: what each figure means."""
    ce = {"clean": [], "spliced": [], "ablated": [], "zero": []}
    kept, fired = [], torch.zeros(64).double()
    streams = [stream_of(lm, tokens) for tokens in texts]
    reads = [~sae.is_outlier(stream) for stream in streams]
    kept = torch.cat([s[first:][r[first:]] for s, r in zip(streams, reads, strict=True)])
    features = sae.encode(kept)
    fired.index_add_(0, features.ids.flatten(), (features.acts > 0).double().flatten())
    x_hat = sae.decode(features).double()
    error = (kept.double() - x_hat).square().sum()
    whole = torch.cat([s[first:] for s in streams]).double()
    whole_hat = sae.decode(sae.encode(whole.float())).double()
    mean, kl = kept.double().mean(0), []
    chosen = (features.ids[:, 0] // sae.config.features_per_expert).bincount(minlength=4).double()
    for tokens, stream, read in zip(texts, streams, reads, strict=True):
        new = {"clean": stream, "spliced": sae.decode(sae.encode(stream)), "ablated": mean.float()}
        new["zero"] = torch.zeros(stream.shape[1])
        log = {}
        for name, put in new.items():
            put = torch.where(read[:, None], put, stream)
            with hook_residual(lm, 2, lambda _, put=put: put[None]):
                log[name] = lm(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        at = [i for i in range(first, len(tokens) - 1) if read[i]]
        for name in new:
            ce[name] += [-log[name][i, tokens[i + 1]] for i in at]
        clean, spliced = log["clean"], log["spliced"]
        kl += [(clean[i].exp() * (clean[i] - spliced[i])).sum() for i in at]
    ce = {name: torch.stack(values).mean() for name, values in ce.items()}
    share = chosen / chosen.sum()
    return {
        "mse": (kept.double() - x_hat).square().mean(),
        "cosine": torch.stack(
            [a @ b / a.norm() / b.norm() for a, b in zip(kept.double(), x_hat, strict=True)]
        ).mean(),
        "routing_entropy": -(share * share.log()).nansum() / torch.tensor(4.0).log(),
        "fvu_all_tokens": (whole - whole_hat).square().sum()
        / (whole - whole.mean(0)).square().sum(),
        "outlier_tokens": len(whole) - len(kept),
        "ce_zero": ce["zero"],
        "ce_recovered_zero": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
        "density": (fired / len(kept)).tolist(),
        "fvu": error / (kept.double() - mean).square().sum(),
        "l0": fired.sum() / len(kept),
        "dead_share": (fired == 0).double().mean(),
        "expert_load": chosen.max() / chosen.mean(),
        "tokens": len(kept),
        "ce_clean": ce["clean"],
        "ce_spliced": ce["spliced"],
        "ce_ablated": ce["ablated"],
        "ce_recovered": (ce["ablated"] - ce["spliced"]) / (ce["ablated"] - ce["clean"]),
        "kl": torch.stack(kl).mean(),
        "ce_tokens": len(kl),
    }


def measured(lm, sae, documents=activations.DOCUMENTS, **changes):
    options = {
        name: changes.pop(name)
        for name in ("max_tokens", "allow_mismatch", "alone", "progress") & changes.keys()
    }
    return evaluate(sae, lm, documents, settings=activations.settings(**changes), **options)


@pytest.mark.parametrize("tokens_per_pass", [16, 80, 4096])
@pytest.mark.parametrize("packing", ["packed", "windows"])
@pytest.mark.parametrize("outliers", [False, True])
def test_every_figure_is_its_definition_whatever_the_passes(lm, packing, tokens_per_pass, outliers):
    sae = tiny.sae_for(lm)
    texts = contexts(packing == "windows")
    if outliers:
        outlying(sae, torch.cat([stream_of(lm, tokens) for tokens in texts]).norm(dim=-1))
    found = measured(lm, sae, packing=packing, tokens_per_pass=tokens_per_pass, skip_special=False)
    expected = definition(lm, sae, texts, first=int(packing == "packed"))
    assert found.keys() == expected.keys() | BESIDE == KEYS | CE | BESIDE
    assert_histogram(found["density"], expected.pop("density"))
    assert found["tokens"] == expected["tokens"]
    assert found["ce_tokens"] == expected["ce_tokens"]
    for name, without in (("ce_recovered", "ce_ablated"), ("ce_recovered_zero", "ce_zero")):
        ratio, span = float(expected.pop(name)), found[without] - found["ce_clean"]
        # of small differences of figures that are right to 1e-6, as is tested below
        allowed = 2e-6 * found[without] * (1 + abs(ratio)) / abs(span)
        assert found[name] == pytest.approx(ratio, abs=allowed)
        assert found[name] == (found[without] - found["ce_spliced"]) / span
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6, abs=1e-6), name
    assert outliers == (found["measured_on"]["outlier_norm"] is not None)
    assert outliers == (found["outlier_tokens"] > 0)


def assert_histogram(found, rates: list[float]):
    """Each feature counted in the bin of log10 of its rate, or among those of never."""
    edges, counts = found["log10_edges"], [0] * len(found["counts"])
    assert (edges[0], edges[-1], len(edges)) == (-6, 0, len(counts) + 1)
    for rate in rates:
        if rate > 0:
            log = torch.tensor(rate).double().log10()
            counts[max(i for i, edge in enumerate(edges[:-1]) if log >= edge)] += 1
    assert found["counts"] == counts
    assert found["never"] == sum(rate == 0 for rate in rates)
    assert sum(counts) + found["never"] == len(rates)


def test_several_saes_share_the_model_as_it_is_and_their_tokens(lm):
    one, other = tiny.sae_for(lm), tiny.sae_for(lm, seed=7, num_experts=1, k=6)
    texts = contexts(False)
    outlying(one, torch.cat([stream_of(lm, tokens) for tokens in texts]).norm(dim=-1))
    passes = []
    lm.register_forward_hook(lambda *_: passes.append(1))
    both = measured(lm, {"one": one, "other": other}, skip_special=False)
    together = len(passes)
    assert both["one"] == measured(lm, one, skip_special=False)
    alone = len(passes) - together
    assert together < 1.5 * alone  # one more pass spliced, of six
    other.outlier_norm.copy_(one.outlier_norm)
    expected = measured(lm, other, skip_special=False)
    assert both["other"]["outlier_tokens"] == both["one"]["outlier_tokens"] > 0
    for name in (KEYS | CE) - {"expert_load", "routing_entropy", "fvu_all_tokens"}:
        if "spliced" not in name and "recovered" not in name and name != "kl":
            assert both["other"][name] == pytest.approx(expected[name], rel=1e-6), name


def test_several_saes_are_of_one_place_and_at_least_one(lm):
    with pytest.raises(
        ConfigError, match=r"one place, not a at layers.2.resid_post, b at layers.1"
    ):
        measured(lm, {"a": tiny.sae_for(lm), "b": tiny.sae_for(lm, 1)})
    with pytest.raises(ConfigError, match="no SAE to measure"):
        measured(lm, {})


def test_so_many_tokens_are_whole_contexts_whatever_the_passes(lm):
    sae = tiny.sae_for(lm)
    some = [measured(lm, sae, max_tokens=100, tokens_per_pass=n) for n in (16, 64, 4096)]
    assert [each["measured_on"]["contexts"] for each in some] == [6, 6, 6]
    for each in some[1:]:
        for name in KEYS | CE:
            assert each[name] == pytest.approx(some[0][name], rel=1e-5), name
    assert some[0]["tokens"] == 6 * 15


@pytest.mark.parametrize("progress", [True, False, None])
def test_how_far_it_is_can_be_seen(lm, capsys, progress):
    measured(lm, tiny.sae_for(lm), max_tokens=100, progress=progress)
    shown = capsys.readouterr().err
    assert ("96/100" in shown) == bool(progress)  # here stderr is no terminal


def measure_with_others(folder: str, options: dict) -> None:
    """One process of several: writes what it found."""
    torch.set_num_threads(1)
    state, lm = Accelerator(cpu=True), make_lm()
    if options.get("alone") and not state.is_main_process:
        return
    found = measured(lm, outlying_somewhat(lm), **options)
    name = "result.json" if state.is_main_process else "other.json"
    (Path(folder) / name).write_text(json.dumps(found))


def outlying_somewhat(lm: nn.Module) -> SwitchSAE:
    norms = torch.cat([stream_of(lm, tokens) for tokens in contexts(False)]).norm(dim=-1)
    return outlying(tiny.sae_for(lm), norms)


@pytest.mark.parametrize("options", [{}, {"max_tokens": 16}], ids=["shared", "none_for_the_second"])
def test_two_processes_have_the_figures_of_one(lm, tmp_path, options):
    expected = measured(lm, outlying_somewhat(lm), **options)
    found = launch(tmp_path, options, 2, measure_with_others)
    assert found == json.loads((tmp_path / "other.json").read_text())
    for name in BESIDE:
        assert found[name] == expected[name], name
    for name in KEYS | CE:
        exact = 1e-5 if "recovered" in name else 1e-6  # a ratio of small differences
        assert found[name] == pytest.approx(expected[name], rel=exact, abs=1e-6), name


def test_one_process_of_two_can_measure_alone(lm, tmp_path):
    found = launch(tmp_path, {"alone": True}, 2, measure_with_others)
    assert found == measured(lm, outlying_somewhat(lm))


def test_what_it_was_measured_on_is_said_and_json(lm):
    on = json.loads(json.dumps(measured(lm, tiny.sae_for(lm))))["measured_on"]
    assert on["context"] == 16
    assert on["hookpoint"] == "layers.2.resid_post"
    assert on["skip_first"] is True
    assert on["dataset"]["kind"] == "list"


def test_predictions_are_measured_of_causal_models_with_a_head_alone():
    bare = tiny.llama("LlamaModel")
    assert not CE & measured(bare, tiny.sae_for(bare)).keys()
    encoder = tiny.bert()
    assert not CE & measured(encoder, tiny.sae_for(encoder)).keys()


def test_model_and_sae_are_left_as_they_were(lm):
    sae = tiny.sae_for(lm).train()
    before, state = tiny.traces(lm), {k: v.clone() for k, v in sae.state_dict().items()}
    measured(lm, sae)
    assert tiny.traces(lm) == before
    assert sae.training
    torch.testing.assert_close(sae.state_dict(), state, rtol=0, atol=0)


def test_what_does_not_fit_is_told_before_the_run(lm):
    sae = tiny.sae_for(lm)
    with pytest.raises(BaseModelError, match="differ"):
        measured(tiny.llama(seed=4), sae)
    assert measured(tiny.llama(seed=4), sae, allow_mismatch=True)["tokens"]
    with pytest.raises(TextError, match="empty"):
        measured(lm, sae, documents=[])
    with pytest.raises(TextError, match="fewer than one context of 16"):
        measured(lm, sae, documents=[[5, 6, 7]])
    with pytest.raises(TextError, match="beyond the"):
        measured(lm, sae, documents=[[5] * 15 + [10_000]])
    with pytest.raises(TrainingError, match="max_tokens=15 is less than one context of 16"):
        measured(lm, sae, max_tokens=15)
    with pytest.raises(AttachError, match="training mode"):
        measured(tiny.llama().train(), sae)
    sae.config.hookpoint = "layers.9.resid_post"
    with pytest.raises(HookpointError, match="9"):
        measured(lm, sae)
    sae.config.hookpoint = None
    with pytest.raises(ConfigError, match="no hookpoint"):
        measured(lm, sae)
    narrow = tiny.sae_for(tiny.llama(hidden_size=16, head_dim=4))
    with pytest.raises(WidthError, match="hidden_size=16"):
        measured(lm, narrow, allow_mismatch=True)
