"""SwitchSAE against its definition: every kind, in values, gradients, units and expert groups."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from helpers.saes import KINDS, D, E, K, M, config, definition, make, regroup, rows, whole_gradients
from transformers import LlamaConfig, LlamaForCausalLM

from hf_switch_sae import (
    ConfigError,
    FeatureIdError,
    HookpointError,
    SparseFeatures,
    SwitchSAE,
    SwitchSAEAdam,
    WidthError,
    use_backend,
)
from hf_switch_sae.sae import fvu as losses

KIND = pytest.mark.parametrize("kind", KINDS)
GROUPS = pytest.mark.parametrize("groups", [1, 2, "each"], ids="groups_{}".format)
MODE = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def in_groups(*kinds):
    """Each kind in 1, 2 and as many groups as experts, as far as it has experts."""
    pairs = [(kind, g) for kind in kinds for g in (1, 2, "each") if g == 1 or "plain" not in kind]
    return pytest.mark.parametrize(("kind", "groups"), pairs)


# ---------------------------------------------------------------- the definition


@in_groups(*KINDS)
@MODE
def test_values_and_every_gradient_are_those_of_the_definition(kind, groups, training):
    whole, x = make(kind).train(training), rows().requires_grad_()
    wanted = definition(whole, x)
    (wanted.fvu + 0.16 * wanted.balance).backward()
    wanted_x, x.grad = x.grad, None
    sae = regroup(whole, groups)

    output = sae(x)
    output.loss.backward()

    close = {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(output.features.to_dense(), wanted.acts, **close)
    torch.testing.assert_close(output.reconstruction, wanted.reconstruction, **close)
    torch.testing.assert_close(output.fvu, wanted.fvu)
    torch.testing.assert_close(output.router_aux_loss, wanted.balance)
    torch.testing.assert_close(output.loss, wanted.fvu + 0.16 * wanted.balance)
    torch.testing.assert_close(whole_gradients(sae), whole_gradients(whole), **close)
    torch.testing.assert_close(x.grad, wanted_x, **close)


@KIND
@MODE
def test_the_number_of_groups_changes_no_value_and_no_gradient(kind, training):
    x, results = rows(), []
    for groups in (1, "each") if "plain" in kind else (1, 2, "each"):
        sae = make(kind, groups).train(training)
        output = sae(x)
        output.loss.backward()
        results.append((output.features.to_dense(), output.reconstruction, whole_gradients(sae)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=1e-6)


@in_groups(*KINDS)
def test_ids_are_of_the_tokens_own_experts_and_acts_are_within_k(kind, groups):
    sae, x = make(kind, groups), rows()
    output = sae(x)
    if output.router_logits is not None:
        own = output.router_logits.topk(sae.config.num_experts_per_token).indices
        owner = output.features.ids // M
        assert (owner[..., None] == own[:, None]).any(-1).all()
    if sae.config.activation == "topk":
        assert output.features.k == sae.config.k
    if sae.config.k is not None and sae.config.activation != "batch_topk":
        assert ((output.features.acts > 0).sum(-1) <= sae.config.k).all()


# ---------------------------------------------------------------- units


@KIND
def test_input_scale_is_the_same_as_folding_it_into_the_weights(kind):
    sae, x = make(kind, scale=0.6), rows()
    folded = make(kind, scale=1.0)
    with torch.no_grad():
        folded.b_dec.div_(0.6)
        if folded.b_enc is not None:
            folded.b_enc.div_(0.6)
        if folded.config.num_experts > 1:
            folded.router.weight.mul_(0.6)
            folded.b_router.div_(0.6)
        if "threshold" in dict(folded.named_buffers()):
            folded.threshold.div_(0.6)
    torch.testing.assert_close(folded.encode(x).to_dense(), sae.encode(x).to_dense())
    torch.testing.assert_close(folded(x).reconstruction, sae(x).reconstruction)


@KIND
def test_acts_are_in_the_units_of_the_input(kind):
    sae, x = make(kind, scale=0.5), rows()
    other = make(kind, scale=0.05)
    torch.testing.assert_close(other.encode(10 * x).to_dense(), 10 * sae.encode(x).to_dense())
    torch.testing.assert_close(other(10 * x).reconstruction, 10 * sae(x).reconstruction)
    torch.testing.assert_close(other(10 * x).fvu, sae(x).fvu)


@GROUPS
def test_decode_is_linear_and_an_act_is_what_is_added_along_its_row(groups):
    sae, x = make("two_experts", groups), rows()
    features = sae.encode(x)
    dense = features.to_dense() @ sae.W_dec.reshape(-1, D)
    torch.testing.assert_close(sae.decode_delta(features), dense)
    torch.testing.assert_close(sae.decode(features), dense + sae.b_dec / sae.input_scale)

    mixed = SparseFeatures(-2.5 * features.acts, features.ids, E * M)
    torch.testing.assert_close(sae.decode_delta(mixed), -2.5 * dense)

    one = SparseFeatures(torch.tensor([[3.0, 0.0]]), torch.tensor([[17, 2]]), E * M)
    torch.testing.assert_close(sae.decode_delta(one)[0], 3.0 * sae.W_dec.reshape(-1, D)[17])
    torch.testing.assert_close(sae.decoder_rows([17, 2, 17])[1], sae.W_dec.reshape(-1, D)[2])
    torch.testing.assert_close(sae.decoder_rows(17), sae.decoder_rows([17]))
    nothing = SparseFeatures(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64), E * M)
    assert not sae.decode_delta(nothing).any()
    with pytest.raises(FeatureIdError, match="features 0 to 23"):
        sae.decoder_rows([24])


# ---------------------------------------------------------------- tokens


@in_groups(*KINDS)
def test_tokens_are_independent_of_their_shape_and_company(kind, groups):
    sae, x = make(kind, groups), rows(12)
    dense = sae.encode(x).to_dense()
    block = sae(x.reshape(3, 4, D))
    torch.testing.assert_close(block.features.to_dense().reshape(12, -1), dense)
    torch.testing.assert_close(block.reconstruction.reshape(12, D), sae(x).reconstruction)
    for row in (0, 5):
        torch.testing.assert_close(sae.encode(x[row]).to_dense(), dense[row])
    assert sae(x[0]).reconstruction.shape == (D,)


@in_groups(*KINDS)
@MODE
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_tokens_give_no_rows(kind, groups, training, shape):
    sae = make(kind, groups).train(training)
    output = sae(torch.zeros(*shape, D))
    assert output.reconstruction.shape == (*shape, D)
    assert output.features.shape == shape
    assert output.fvu.isnan()


@pytest.mark.parametrize("kind", ["switch", "two_experts", "relu", "plain_topk"])
def test_masked_tokens_take_no_part_in_the_loss(kind):
    sae, x = make(kind), rows(20).reshape(4, 5, D)
    mask = torch.rand(4, 5) > 0.4
    spoiled = torch.where(mask[..., None], x, 77.0)
    masked, alone = sae(spoiled, attention_mask=mask.long()), sae(x[mask])
    for name in ("loss", "fvu", "router_aux_loss"):
        torch.testing.assert_close(masked[name], alone[name])
    assert masked.reconstruction.shape == x.shape
    assert sae(x, attention_mask=torch.zeros(4, 5)).fvu.isnan()


@pytest.mark.parametrize("kind", ["switch", "two_experts", "plain_topk"])
@pytest.mark.parametrize("junk", [torch.inf, torch.nan])
def test_junk_in_a_masked_or_outlying_token_reaches_no_loss(kind, junk):
    sae, x = make(kind), rows(20)
    wanted = sae(x[1:]).loss
    x[0] = junk
    mask = torch.arange(20) > 0
    torch.testing.assert_close(sae(x, attention_mask=mask).loss, wanted)
    sae.outlier_norm.fill_(1e4)
    if junk == torch.inf:
        output = sae(x)
        torch.testing.assert_close(output.loss, wanted)
        assert not output.features[0].acts.any()


@pytest.mark.parametrize("kind", ["switch", "two_experts", "plain_relu"])
def test_tokens_over_the_outlier_norm_are_no_input(kind):
    sae, x = make(kind), rows(20)
    x[[3, 11]] *= 100
    usual = x[[row for row in range(20) if row not in (3, 11)]]
    alone = sae(usual)
    sae.outlier_norm.fill_(50.0)
    output = sae(x)

    assert sae.is_outlier(x).nonzero().flatten().tolist() == [3, 11]
    assert not output.features[[3, 11]].acts.any()
    torch.testing.assert_close(output.loss, alone.loss)
    torch.testing.assert_close(sae(usual).loss, alone.loss)


def test_a_stream_of_another_width_is_refused_with_both_widths():
    sae = make()
    for call in (sae, sae.encode):
        with pytest.raises(WidthError, match=r"of width 16; this one is 15 wide \(shape \[2, 15\]"):
            call(torch.zeros(2, 15))


def test_the_output_is_also_a_tuple_and_a_dict():
    sae, x = make(), rows()
    output = sae(x)
    plain = sae(x, return_dict=False)
    assert isinstance(plain, tuple)
    torch.testing.assert_close(plain[0], output["loss"])
    torch.testing.assert_close(plain[1], output[1])
    assert make("plain_topk")(x).router_logits is None


def test_input_of_low_precision_is_read_as_it_is_and_given_back_in_its_dtype():
    sae, x = make(), rows().bfloat16()
    output = sae(x)
    assert output.reconstruction.dtype == torch.bfloat16
    assert output.features.dtype == torch.float32
    torch.testing.assert_close(output.features.to_dense(), sae.encode(x.float()).to_dense())


# ---------------------------------------------------------------- start, statistics, training


@in_groups("switch", "two_experts", "plain_batch_topk")
def test_a_fresh_sae_has_unit_decoder_rows_along_its_encoder_and_zero_biases(kind, groups):
    sae = SwitchSAE(config(**KINDS[kind]), expert_groups=groups)
    bound = D**-0.5
    assert sae.W_enc.abs().max() <= bound
    assert float(sae.W_enc.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.W_dec.shape[:2]))
    torch.testing.assert_close(
        sae.W_dec, sae.W_enc / sae.W_enc.norm(dim=-1, keepdim=True), atol=1e-6, rtol=1e-6
    )
    buffers = dict(sae.named_buffers())
    assert buffers.pop("input_scale") == 1
    assert buffers.pop("outlier_norm") == torch.inf
    assert (buffers.pop("threshold", torch.tensor(-1.0)) == -1).all()
    zero = [p for n, p in sae.named_parameters() if n.split(".")[-1].startswith("b_")]
    assert not any(value.any() for value in [*zero, *buffers.values()])


def test_initializer_range_is_the_bound_of_the_start():
    sae = SwitchSAE(config(initializer_range=0.01))
    assert 0.009 < sae.W_enc.abs().max() <= 0.01
    assert 0.008 < sae.router.weight.abs().max() <= 0.01


@pytest.mark.parametrize("groups", [0, 3, 8, 1.0, "all"])
def test_groups_that_do_not_divide_the_experts_are_refused_with_those_that_do(groups):
    with pytest.raises(ConfigError, match=r"choose one of \[1, 2, 4\]"):
        SwitchSAE(config(), expert_groups=groups)


@in_groups("switch", "two_experts", "relu", "jumprelu", "plain_batch_topk")
def test_calibrate_measures_what_the_dense_matrix_shows(kind, groups):
    sae, x = make(kind, groups), rows(50)
    sae.calibrate(part.reshape(5, -1, D) for part in x.split(25))

    acts = definition(sae, x).acts  # after, as it may have set the threshold
    torch.testing.assert_close(sae.feature_max, acts.amax(0))
    torch.testing.assert_close(sae.feature_rate, (acts > 0).float().mean(0))
    torch.testing.assert_close(sae.residual_norm, x.norm(dim=-1).median())
    assert sae.statistics_tokens == 50


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["batch_topk", "plain_batch_topk"])
def test_calibrate_finds_the_threshold_at_which_k_features_are_active(kind, training):
    sae, x = SwitchSAE(config(**KINDS[kind])).train(training), rows(400)
    with pytest.raises(ConfigError, match="no threshold yet"):
        sae.eval().encode(x)
    sae.train(training).calibrate(x.split(100))

    assert sae.training == training
    sae.eval()
    assert sae.encode(x).l0() == pytest.approx(K, rel=0.05)
    assert sae.feature_rate.sum() == pytest.approx(float(sae.encode(x).l0()), rel=1e-4)


def test_calibrate_changes_nothing_when_a_batch_is_wrong_or_missing():
    for kind in ("switch", "batch_topk"):
        sae = make(kind)
        before = copy.deepcopy(sae.state_dict())
        with pytest.raises(WidthError):
            sae.calibrate([rows(), torch.zeros(3, D + 1)])
        with pytest.raises(ValueError, match="no tokens"):
            sae.calibrate([])
        torch.testing.assert_close(sae.state_dict(), before, atol=0, rtol=0)


@GROUPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_normalize_decoder_makes_rows_of_length_one_in_the_same_direction(groups, dtype):
    sae = make("switch", groups)
    with torch.no_grad():
        for group in sae.experts:
            group.W_dec.mul_(torch.rand(group.W_dec.shape[:2])[..., None] + 0.5)
        sae.experts[0].W_dec[0, 0] = 0.0  # a dead row stays finite
    sae.to(dtype)
    before = sae.W_dec.detach().float().clone()

    sae.normalize_decoder()

    after = sae.W_dec.float()
    wanted = torch.nn.functional.normalize(before, dim=-1)
    torch.testing.assert_close(
        after, wanted, atol=0.01 if dtype == torch.bfloat16 else 1e-6, rtol=0
    )


@GROUPS
def test_project_decoder_grad_leaves_no_gradient_along_a_row_and_the_rest_alone(groups):
    sae = make("switch", groups)
    sae.project_decoder_grad()  # no gradient yet: nothing to do
    sae(rows()).loss.backward()
    before = whole_gradients(sae)["W_dec"].clone()

    sae.project_decoder_grad()

    after = whole_gradients(sae)["W_dec"]
    along = (before * sae.W_dec).sum(-1, keepdim=True)
    assert along.abs().max() > 1e-3
    torch.testing.assert_close(after, before - along * sae.W_dec)
    assert (after * sae.W_dec).sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["switch", "two_experts", "plain_topk", "batch_topk"])
def test_a_hundred_steps_of_plain_pytorch_learn_a_sparse_code(kind):
    torch.manual_seed(1)
    truth = torch.nn.functional.normalize(torch.randn(24, D), dim=-1)
    codes = torch.rand(4096, 24) * (torch.rand(4096, 24) < 0.08)
    data = 10 * codes @ truth
    fields = {**KINDS[kind], "num_features": 64, "encoder_bias": False}
    sae = SwitchSAE(config(**fields)).train()
    sae.input_scale.fill_(float(D**0.5 / data.norm(dim=-1).mean()))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    first = float(sae(data[:512]).fvu.detach())
    for _ in range(100):
        loss = sae(data[torch.randint(4096, (512,))]).loss
        optimizer.zero_grad()
        loss.backward()
        sae.project_decoder_grad()
        optimizer.step()
        sae.normalize_decoder()
    sae.eval()  # batch_topk: with the threshold that training has left
    last = float(sae(data[:512]).fvu.detach())
    assert first > 0.5
    assert last < 0.5 * first
    assert last < 0.35


# ---------------------------------------------------------------- as a module


@KIND
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_shares_nothing(kind, way):
    sae, x = make(kind, "each"), rows()
    other = copy.deepcopy(sae) if way == "deepcopy" else pickle.loads(pickle.dumps(sae))
    torch.testing.assert_close(other(x).reconstruction, sae(x).reconstruction, atol=0, rtol=0)
    with torch.no_grad():
        other.b_dec.add_(1.0)
        other.experts[0].W_dec.zero_()
    assert not torch.equal(other(x).reconstruction, sae(x).reconstruction)
    torch.testing.assert_close(sae(x).reconstruction, definition(sae, x).reconstruction)


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half"])
@pytest.mark.parametrize("kind", ["switch_with_bias", "jumprelu", "plain_topk"])
def test_a_cast_leaves_router_and_statistics_in_float32_bit_for_bit(kind, cast):
    sae, x = make(kind, "each"), rows()
    sae.calibrate([x])
    sae(x).loss.backward()
    before, dtype = copy.deepcopy(sae.state_dict()), torch.bfloat16
    sae.to(dtype) if cast == "to" else getattr(sae, cast)()

    for name, value in sae.state_dict().items():
        if name.split(".")[-1] in ("W_enc", "W_dec", "b_enc", "b_dec"):
            assert value.dtype == (torch.float16 if cast == "half" else dtype)
        else:
            torch.testing.assert_close(value, before[name], atol=0, rtol=0)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in sae.parameters())
    assert sae(x).reconstruction.isfinite().all()
    assert sae.double().W_enc.dtype == torch.float64


def test_the_weights_are_parameters_with_one_group_and_joined_with_more():
    one, four = make("switch_with_bias"), make("switch_with_bias", "each")
    assert one.W_enc is one.experts[0].W_enc
    assert len(four.experts) == E
    for name in ("W_enc", "W_dec", "b_enc"):
        torch.testing.assert_close(getattr(four, name), getattr(one, name), atol=0, rtol=0)
    assert make("switch").b_enc is None
    assert one.W_enc.shape == (E, M, D)


def test_for_lm_fills_in_width_place_and_identity():
    lm = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=D,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=9,
        )
    )
    sae = SwitchSAE.for_lm(lm, 1, num_features=24, num_experts=E, k=K)
    assert sae.config.hidden_size == D
    assert sae.config.hookpoint == "layers.1.resid_post"
    assert sae.config.base_model_fingerprint["vocab_size"] == 9
    assert SwitchSAE.for_lm(lm, "layers.0.resid_pre", hookpoint="here").config.hookpoint == "here"
    with pytest.raises(HookpointError):
        SwitchSAE.for_lm(lm, 2)
    with pytest.raises(ConfigError, match="num_expert"):
        SwitchSAE.for_lm(lm, 1, num_expert=4)


def test_nan_in_masked_tokens_gives_the_gradients_of_the_other_tokens():
    sae, x = make("switch"), rows()
    mask = torch.ones(len(x))
    mask[1] = 0
    broken = x.clone()
    broken[1] = torch.nan

    sae(broken, attention_mask=mask).loss.backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    sae(x, attention_mask=mask).loss.backward()

    for name, p in sae.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_outliers_take_nothing_of_a_batch_topk_budget():
    sae, x = make("batch_topk").train(), rows()
    alone = int((sae.encode(x).acts > 0).sum())
    sae.outlier_norm.fill_(2 * float(x.norm(dim=-1).max()))

    both = sae.encode(torch.cat([x, 50 * x[:3]]))

    assert int((both.acts[-3:] > 0).sum()) == 0
    assert int((both.acts > 0).sum()) >= alone


def test_a_calibration_that_fails_leaves_the_threshold_as_it_was():
    sae, x = make("batch_topk"), rows()
    before = sae.threshold.clone()

    with pytest.raises(WidthError):
        sae.calibrate([x, x[:, :-1]])

    assert torch.equal(sae.threshold, before)
    assert int(sae.statistics_tokens) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of Inductor
@pytest.mark.parametrize("kind", ["switch", "plain_topk", "two_experts", "relu", "batch_topk"])
def test_a_compiled_sae_is_one_graph_with_the_same_loss_and_gradients(kind):
    torch.compiler.reset()
    sae, x = make(kind).train(), rows(37)
    wanted = sae(x)
    wanted.loss.backward()
    gradients = whole_gradients(sae)
    sae.zero_grad()
    compiled = torch.compile(sae, fullgraph=True)

    output = compiled(x)
    output.loss.backward()

    torch.testing.assert_close(output.loss, wanted.loss)
    torch.testing.assert_close(output.reconstruction, wanted.reconstruction)
    torch.testing.assert_close(whole_gradients(sae), gradients, atol=1e-5, rtol=1e-4)
    sae.eval()
    if kind == "batch_topk":
        sae.threshold.fill_(0.1)
    with torch.no_grad():
        for some in (x, x[:1]):
            torch.testing.assert_close(compiled(some).reconstruction, sae(some).reconstruction)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["switch", "switch_with_bias", "plain_topk", "no_router_weight"])
@pytest.mark.parametrize("outlier", [False, True], ids=["ordinary", "outlier"])
def test_a_token_alone_is_encoded_and_decoded_as_in_a_batch(kind, outlier):
    sae, x = make(kind), rows(6)
    if outlier:
        sae.outlier_norm.fill_(float(x.norm(dim=-1).median()))
    with torch.no_grad():
        together, output = sae.encode(x), sae(x)
        for row in range(6):
            alone = sae.encode(x[row])
            assert alone.shape == ()
            torch.testing.assert_close(alone.to_dense(), together[row].to_dense())
            torch.testing.assert_close(sae.decode(alone), output.reconstruction[row])
            torch.testing.assert_close(
                sae(x[None, [row]]).reconstruction[0], output.reconstruction[[row]]
            )


def test_the_fvu_is_its_formula_in_value_and_gradient():
    torch.manual_seed(0)
    for counted in (None, torch.rand(1500) > 0.3, torch.zeros(1500, dtype=torch.bool)):
        x = torch.randn(1500, 700, requires_grad=True)  # several blocks
        x_hat = torch.randn(1500, 700, requires_grad=True)
        bias = torch.randn(700, requires_grad=True)
        given = (x - bias.detach(), x_hat, counted, None, bias)  # a bias that x_hat is without
        mine, wanted = losses.fvu_of(*given), losses.fvu_formula(x, x_hat + bias, counted)
        torch.testing.assert_close(mine, wanted, equal_nan=True)
        torch.testing.assert_close(losses.fvu_formula(*given), wanted, equal_nan=True)
        if not mine.isnan():
            inputs = (x, x_hat, bias)
            theirs = torch.autograd.grad(wanted, inputs)
            torch.testing.assert_close(torch.autograd.grad(mine, inputs), theirs)
    for n in (0, 1):
        assert losses.fvu_of(torch.randn(n, 3), torch.randn(n, 3), None).isnan()
    one = torch.tensor([False, True, False])
    assert losses.fvu_of(torch.randn(3, 2), torch.randn(3, 2), one).isnan()


@pytest.mark.parametrize("kind", ["batch_topk", "batch_topk_two_experts", "plain_batch_topk"])
@pytest.mark.parametrize("groups", [1, 2])
def test_masked_tokens_take_nothing_of_a_batch_topk_budget(kind, groups):
    groups = 1 if kind.startswith("plain") else groups
    sae, alone = make(kind, groups).train(), make(kind, groups).train()
    x, mask = rows(20), torch.arange(20) % 3 > 0
    spoiled = torch.where(mask[:, None], x, 50 * x)
    masked, wanted = sae(spoiled, attention_mask=mask), alone(x[mask])
    torch.testing.assert_close(masked.loss, wanted.loss)
    torch.testing.assert_close(
        masked.features[mask].to_dense(), wanted.features.to_dense(), atol=1e-5, rtol=1e-5
    )
    assert not masked.features.acts[~mask].any()
    torch.testing.assert_close(sae.threshold, alone.threshold)
    torch.testing.assert_close(sae.num_tokens_since_fired, alone.num_tokens_since_fired)
    before = sae.threshold.clone()
    sae(x, attention_mask=torch.zeros(20))
    torch.testing.assert_close(sae.threshold, before, atol=0, rtol=0)


def test_parts_of_a_masked_batch_add_up_to_the_whole():
    sae, x, mask = make("switch"), rows(20), torch.arange(20) % 3 > 0
    halves = [slice(0, 9), slice(9, 20)]
    sums = sum(sae.batch_sums(x[half], mask[half]) for half in halves)
    whole = losses.WholeBatch.of(sums, D).to(torch.float32)
    shares = [sae(x[h], attention_mask=mask[h], whole_batch=whole).loss for h in halves]
    torch.testing.assert_close(sum(shares), sae(x, attention_mask=mask).loss)


@pytest.mark.parametrize("shape", [[1, 6], [5], [6, 1], [6, D]])
def test_a_mask_that_is_not_of_these_tokens_is_refused(shape):
    sae, before = make("plain_topk").train(), copy.deepcopy(make("plain_topk").state_dict())
    for use in (sae, sae.batch_sums):
        with pytest.raises(ValueError, match=r"hidden_states \[6, 16\] need one of \[6\]"):
            use(rows(6), attention_mask=torch.ones(shape))
    torch.testing.assert_close(sae.state_dict(), before)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_features_of_another_dictionary_are_refused(tokens):
    sae = make("switch")
    features = SparseFeatures(torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int64), 99)
    for use in (sae.decode, sae.decode_delta):
        with torch.no_grad(), pytest.raises(FeatureIdError, match="99 features, and this SAE has"):
            use(features)


def test_a_float64_sae_trains_in_float64():
    sae = make("switch").double().train()
    optimizer = SwitchSAEAdam(sae, lr=0.01)
    sae(rows().double()).loss.backward()
    optimizer.step()
    sae.normalize_decoder()
    lengths = sae.W_dec.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-15, rtol=0)


@pytest.mark.parametrize("wrong", [-1, E * M])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_ids_of_no_feature_are_refused(wrong, tokens, groups, dtype, backend):
    sae = make("switch", groups).to(dtype)
    ids = torch.full((tokens, 2), wrong)
    features = SparseFeatures(torch.ones(tokens, 2), ids, E * M)
    for use in (sae.decode, sae.decode_delta):
        with (
            torch.no_grad(),
            nullcontext() if backend is None else use_backend(backend),
            pytest.raises(FeatureIdError, match=f"no feature {wrong}: there are 0 to 23"),
        ):
            use(features)


def test_a_folder_that_is_not_there_is_said_to_be_no_folder():
    with pytest.raises(OSError, match="there is no folder /none/of/these"):
        SwitchSAE.from_pretrained("/none/of/these")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of Inductor
@pytest.mark.parametrize("grad", [True, False])
def test_encode_and_decode_compile_as_one_graph(grad):
    torch.compiler.reset()
    sae, x = make("switch"), rows(7)

    def there_and_back(x):
        features = sae.encode(x)
        return sae.decode(features), sae.decode_delta(features)

    with torch.set_grad_enabled(grad):
        found = torch.compile(there_and_back, fullgraph=True)(x)
        torch.testing.assert_close(found, there_and_back(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("kind", ["switch_with_bias", "plain_topk", "two_experts"])
def test_forward_mode_derivatives_of_the_loss_are_those_of_finite_differences(kind):
    sae, x = make(kind).double(), rows().double()
    along, step = torch.randn_like(x), 1e-6
    _, slope = torch.func.jvp(lambda x: sae(x).loss, (x,), (along,))
    rise = sae(x + step * along).loss - sae(x - step * along).loss
    torch.testing.assert_close(slope, rise / (2 * step), atol=1e-6, rtol=1e-6)
