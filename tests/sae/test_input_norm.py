"""An SAE with a normalized input computes what it says, and its acts mean what acts always mean."""

import pytest
import torch
from helpers import tiny
from helpers.saes import NORMED, D, definition, make, rows, whole_gradients

from hf_switch_sae import (
    Ablate,
    Clamp,
    ConfigError,
    ConversionError,
    Steer,
    SwitchSAE,
    SwitchSAEAdam,
    export,
    hook_residual,
)
from hf_switch_sae.sessions.provenance import weights_hash

KIND = pytest.mark.parametrize("kind", NORMED)


def stream() -> torch.Tensor:
    """Tokens of very different size, and off center."""
    x = rows()
    return x * torch.logspace(-2, 2, len(x))[:, None] + torch.linspace(-3, 3, len(x))[:, None]


@KIND
@pytest.mark.parametrize("groups", [1, 2])
def test_it_computes_its_definition(kind, groups):
    if groups == 2 and kind.startswith("plain"):
        pytest.skip("one expert")
    sae, x = make(kind, groups), stream()
    wanted = definition(make(kind), x)

    features, output = sae.encode(x), sae(x)

    assert (features.acts > 0).any(1).float().mean() > 0.5
    torch.testing.assert_close(features.to_dense(), wanted.acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.features.to_dense(), features.to_dense())
    for found in (sae.decode(features, x), output.reconstruction):
        torch.testing.assert_close(found, wanted.reconstruction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.fvu, wanted.fvu, rtol=1e-4, atol=1e-5)


@KIND
def test_one_token_alone_is_what_it_is_among_others(kind):
    sae, x = make(kind), stream()
    with torch.no_grad():
        together = sae.encode(x.reshape(3, 7, D))
        for row in range(len(x)):
            alone = sae.encode(x[row])
            torch.testing.assert_close(
                alone.to_dense(), together.to_dense().reshape(len(x), -1)[row]
            )
            torch.testing.assert_close(
                sae.decode(alone, x[row]), sae(x).reconstruction[row], rtol=1e-4, atol=1e-4
            )


@KIND
def test_gradients_are_those_of_the_definition(kind):
    ours, theirs = make(kind), make(kind)
    for sae in (ours, theirs):
        sae.train(kind != "constant_norm_batch_topk")
    x, y = stream().requires_grad_(), stream().requires_grad_()
    weight = torch.randn(len(x), D, generator=torch.Generator().manual_seed(2)) / x.detach().norm()

    output, wanted = ours(x), definition(theirs, y)
    acts = output.features.to_dense()
    ((weight * output.reconstruction).sum() + acts.sum() / 50 + output.fvu).backward()
    ((weight * wanted.reconstruction).sum() + wanted.acts.sum() / 50 + wanted.fvu).backward()

    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
    for name, grad in whole_gradients(ours).items():
        torch.testing.assert_close(
            grad, whole_gradients(theirs)[name], rtol=1e-3, atol=1e-3, msg=name
        )


def test_acts_grow_with_the_token_and_know_nothing_of_its_mean():
    x = rows()
    for kind, moved in (("layer_norm", 3 * x + 5), ("constant_norm", 3 * x)):
        sae = make(kind)
        torch.testing.assert_close(
            sae.encode(moved).to_dense(), 3 * sae.encode(x).to_dense(), rtol=1e-4, atol=1e-4
        )
        bigger, output = sae(moved).reconstruction, sae(x).reconstruction
        torch.testing.assert_close(bigger - moved, 3 * (output - x), rtol=1e-3, atol=1e-3, msg=kind)


@KIND
def test_an_act_is_what_is_added_along_its_row(kind):
    sae, x = make(kind), stream()
    features = sae.encode(x)
    delta = sae.decode_delta(features)
    dense = features.to_dense() @ sae.W_dec.reshape(-1, D)
    torch.testing.assert_close(delta, dense, rtol=1e-4, atol=1e-4)
    rest = sae.decode(features, x) - delta  # of no feature, whatever the features are
    none = type(features)(features.acts * 0, features.ids, features.num_features)
    torch.testing.assert_close(rest, sae.decode(none, x), rtol=1e-4, atol=1e-3)


@KIND
def test_without_the_stream_there_is_no_reconstruction(kind):
    sae = make(kind)
    with pytest.raises(ConfigError, match=r"decode\(features, hidden_states\)"):
        sae.decode(sae.encode(stream()))


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
def test_edits_and_splices_are_those_of_the_definition(norm):
    lm = tiny.llama()
    width = lm.config.hidden_size
    sae = SwitchSAE.for_lm(lm, at=1, num_features=64, num_experts=4, k=6, input_norm=norm).eval()
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * torch.randn(width))
    ids = torch.arange(1, 12)[None]
    row, other = sae.decoder_rows(5)[0], sae.decoder_rows(7)[0]

    def by_hand(x, edits=False, splice=False):
        h = x[0].float()
        mean = h.mean(1, keepdim=True) * (norm == "layer_norm")
        size = (h - mean).norm(dim=1, keepdim=True)
        size = size / (width - 1 if norm == "layer_norm" else width) ** 0.5
        h = (h - mean) / (size + 1e-5 * (norm == "layer_norm"))
        probs = (h @ sae.router.weight.T).softmax(1)
        acts = torch.einsum("nd,emd->nem", h - sae.b_dec, sae.W_enc).relu()
        mine = torch.zeros_like(probs).scatter(1, probs.argmax(1, keepdim=True), 1.0)
        acts = (acts * (mine * probs)[..., None]).flatten(1)
        acts = acts * (acts >= acts.sort(1, descending=True).values[:, 5:6]) * size
        new = x[0]
        if splice:
            new = acts @ sae.W_dec.reshape(-1, width) + size * sae.b_dec + mean
        if edits:
            new = new + 2.0 * row + (3.0 - acts[:, 7:8]) * other
            for each in range(40, 64):
                new = new - acts[:, each : each + 1] * sae.decoder_rows(each)
        return new[None]

    edits = (Steer(5, 2.0, unit="raw"), Clamp(7, 3.0, unit="raw"), Ablate(range(40, 64)))
    with torch.no_grad():
        for edited, splice in ((True, False), (False, True), (True, True)):
            with sae.attach(lm, splice=splice) as session:
                if edited:
                    session.edit(*edits)
                got = lm(input_ids=ids).logits
            with hook_residual(lm, 1, lambda x, e=edited, s=splice: by_hand(x, e, s)):
                want = lm(input_ids=ids).logits
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        with sae.attach(lm) as session:
            found = session.preflight({"input_ids": ids})
            streams = []
            with hook_residual(lm, 1, streams.append):
                lm(input_ids=ids)
        off = streams[0] - by_hand(streams[0], splice=True)
        around = streams[0] - streams[0].mean(1, keepdim=True)
        assert found.fvu == pytest.approx(float(off.square().sum() / around.square().sum()), 1e-3)


@KIND
def test_it_is_saved_with_its_norm_and_known_by_it(tmp_path, kind):
    sae, x = make(kind), stream()
    sae.save_pretrained(tmp_path)
    again = SwitchSAE.from_pretrained(tmp_path)
    torch.testing.assert_close(again(x).reconstruction, sae(x).reconstruction)
    assert weights_hash(again) == weights_hash(sae)
    sae.config.input_norm = "none"
    assert weights_hash(again) != weights_hash(sae)


def test_another_norm_is_no_configuration():
    with pytest.raises(ConfigError, match="input_norm"):
        make(input_norm="batch_norm")


@KIND
def test_nothing_and_outliers_stay_finite(kind):
    sae, x = make(kind), stream()
    sae.outlier_norm.fill_(float(x.norm(dim=1).sort().values[-3]))
    x = torch.cat([x, torch.zeros(2, D), torch.full((1, D), 1e-30)]).requires_grad_()
    output = sae(x)
    assert output.reconstruction.isfinite().all()
    output.loss.backward()
    assert x.grad.isfinite().all()
    assert not output.features.acts[sae.is_outlier(x)].any()
    assert int(sae.is_outlier(x).sum()) == 2


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_batch_topk"])
def test_it_learns_and_is_calibrated(kind):
    data = stream().repeat(8, 1) + 0.05 * torch.randn(168, D)
    sae = make(kind).train()
    optimizer = SwitchSAEAdam(sae, lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(sae(data).fvu)
        losses[-1].backward()
        optimizer.step()
        sae.normalize_decoder()
    assert losses[-1] < 0.7 * losses[0]
    sae.eval()
    sae.calibrate([data])
    features = sae.encode(data)
    torch.testing.assert_close(sae.feature_max, features.to_dense().amax(0))
    if "batch" in kind:
        assert features.l0() == pytest.approx(float(sae.train().encode(data).l0()), rel=0.05)


@pytest.mark.parametrize("format", ["sparsify", "dictionary_learning", "switch_sae"])
def test_a_format_without_a_norm_does_not_take_it(tmp_path, format):
    kind = "layer_norm" if format == "switch_sae" else "plain_layer_norm"
    sae = make(kind, encoder_bias=format != "switch_sae")
    with pytest.raises(ConversionError, match="input_norm"):
        export(sae, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
def test_saelens_takes_it(tmp_path, norm):
    sae = make("plain_topk", input_norm=norm, hookpoint="layers.2.resid_post")
    export(sae, tmp_path / "out", "saelens")
    back = SwitchSAE.from_pretrained(tmp_path / "out")
    assert back.config.input_norm == norm
    x = stream()
    torch.testing.assert_close(back(x).reconstruction, sae(x).reconstruction, rtol=1e-4, atol=1e-4)


def test_in_16_bits_it_is_near(tmp_path):
    sae, x = make("layer_norm"), rows()
    low = make("layer_norm").bfloat16()
    output = low(x.bfloat16())
    assert output.reconstruction.dtype == torch.bfloat16
    assert low.encode(x.bfloat16()).dtype == torch.bfloat16
    error = (output.reconstruction.float() - sae(x).reconstruction).norm() / x.norm()
    assert error < 0.15
