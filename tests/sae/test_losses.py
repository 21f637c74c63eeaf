"""Every loss against its formula in float64: values, every gradient, and who gets none."""

import pytest
import torch
from helpers.saes import KINDS, D, E, K, M, config, make, regroup, rows, whole_gradients
from torch import Tensor

from hf_switch_sae import ConfigError, SwitchSAE
from hf_switch_sae.sae.calibration import count_since_fired
from hf_switch_sae.training.saes import SAEsTogether

EXACT = {"atol": 1e-9, "rtol": 1e-9}
DEAD_AFTER = 1000
# the features that are dead in the tests, expert by expert: some, all, none, one
DEAD = [0, 2, 3, *range(M, 2 * M), 3 * M + 1]
AUXK_KINDS = ["switch", "switch_with_bias", "no_router_weight", "two_experts", "jumprelu", "relu"]
AUXK_KINDS += ["batch_topk", "plain_topk", "two_experts_normed"]


def exact_sae(kind: str, groups=1, **fields) -> SwitchSAE:
    """In float64 and training; the features of DEAD have not fired for long."""
    sae = make(kind, dead_after_tokens=DEAD_AFTER, **fields).double().train()
    sae.num_tokens_since_fired[DEAD] = DEAD_AFTER
    return regroup(sae, groups) if groups != 1 else sae


def naive_auxk(sae: SwitchSAE, x: Tensor, k_aux: int) -> Tensor:
    """AuxK over all features of all experts, written out; only dead features' rows are variables.

    aux_hat[n] = sum over the k_aux largest dead f of the token's experts of
                 gate * relu(W_enc[f] @ (x - b_dec) + b_enc[f]) * W_dec[f]
    loss       = sum |r - aux_hat|^2 / sum |r - mean r|^2,   r = x - x_hat
    """
    c, s = sae.config, sae.input_scale
    output = sae(x)
    rest = (x - output.reconstruction).detach()
    visited, gates = torch.ones(len(x), c.num_experts), torch.ones(len(x), c.num_experts)
    if c.num_experts > 1:
        probs = output.router_logits.detach().softmax(-1)
        visited = torch.zeros_like(probs)
        visited.scatter_(1, probs.topk(c.num_experts_per_token).indices, 1.0)
        gates = probs if c.apply_router_probs else gates
        if c.norm_topk_prob:
            gates = gates / (gates * visited).sum(1, keepdim=True)
    u = x - sae.b_dec.detach() / s if c.subtract_b_dec else x
    pre = torch.einsum("nd,emd->nem", u, sae.W_enc)
    pre = pre if sae.b_enc is None else pre + sae.b_enc / s
    acts = ((gates * visited)[..., None] * pre.relu()).flatten(1)
    dead = torch.zeros(c.num_features, dtype=torch.bool)
    dead[DEAD] = True
    acts = acts.where(dead, 0)
    border = acts.topk(k_aux).values[:, -1:]
    acts = acts.where(acts >= border, 0)
    explained = acts @ sae.W_dec.flatten(0, 1)
    return (rest - explained).square().sum() / (rest - rest.mean(0)).square().sum()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", AUXK_KINDS)
@pytest.mark.parametrize("k_aux", [2, None])
def test_auxk_and_every_gradient_are_those_of_the_formula(kind, k_aux, groups):
    if "plain" in kind and groups > 1:
        pytest.skip("one expert is one group")
    fields = {"k_aux": k_aux, "fvu_loss_coef": 0, "router_aux_loss_coef": 0, "auxk_loss_coef": 0.3}
    sae, x = exact_sae(kind, **fields), rows().double()
    slots = min(k_aux or D // 2, M if "plain" not in kind else len(DEAD))
    wanted = naive_auxk(sae, x, slots)
    (0.3 * wanted).backward()
    expected = whole_gradients(sae)
    sae = exact_sae(kind, groups, **fields)

    output = sae(x)
    output.loss.backward()

    assert wanted > 0.1
    torch.testing.assert_close(output.auxk_loss, wanted.detach(), **EXACT)
    torch.testing.assert_close(output.loss, 0.3 * wanted.detach(), **EXACT)
    found = whole_gradients(sae)
    assert found["W_dec"].abs().max() > 1e-9
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)


def test_auxk_moves_nothing_but_the_rows_of_dead_features():
    sae = exact_sae("switch_with_bias", fvu_loss_coef=0, router_aux_loss_coef=0, auxk_loss_coef=1.0)
    sae(rows().double()).loss.backward()
    gradients = whole_gradients(sae)
    for name in ("b_dec", "b_router", "router.weight"):
        assert not gradients[name].any(), name
    live = [f for f in range(E * M) if f not in DEAD]
    for name in ("W_enc", "W_dec", "b_enc"):
        by_feature = gradients[name].reshape(E * M, -1)
        assert not by_feature[live].any(), name
        assert by_feature[DEAD].any(), name


def test_auxk_is_added_to_the_loss_in_training_alone_and_only_where_features_are_dead():
    x = rows().double()
    sae = exact_sae("switch", auxk_loss_coef=0.5)
    output = sae(x)
    parts = output.fvu + 0.16 * output.router_aux_loss + 0.5 * output.auxk_loss
    torch.testing.assert_close(output.loss, parts, **EXACT)
    assert sae.eval()(x).auxk_loss == 0
    sae.train().num_tokens_since_fired.zero_()
    assert sae(x).auxk_loss == 0
    assert exact_sae("switch", auxk_loss_coef=0)(x).auxk_loss == 0
    assert torch.isfinite(exact_sae("switch", auxk_loss_coef=0.5)(x[:1]).auxk_loss)


def test_masked_tokens_and_outliers_take_no_part_in_auxk_and_in_the_count():
    x = rows().double()
    mask = torch.arange(len(x)) % 3 > 0
    alone, masked, over = (exact_sae("switch", auxk_loss_coef=0.5) for _ in range(3))
    wanted = alone(x[mask]).auxk_loss
    spoiled = x.where(mask[:, None], 77.0)
    torch.testing.assert_close(masked(spoiled, attention_mask=mask).auxk_loss, wanted, **EXACT)
    over.outlier_norm.fill_(100.0)
    torch.testing.assert_close(over(spoiled).auxk_loss, wanted, **EXACT)
    for other in (masked, over):
        assert torch.equal(other.num_tokens_since_fired, alone.num_tokens_since_fired)


# ---------------------------------------------------------------- which features are dead


@pytest.mark.parametrize("kind", KINDS)
def test_the_counter_counts_tokens_of_the_features_own_expert_since_it_fired(kind):
    sae = make(kind).train()
    wanted = torch.zeros(sae.config.num_features, dtype=torch.int64)
    for x in rows(60).split(12):
        output = sae(x)
        fired = (output.features.to_dense() > 0).any(0)
        seen = torch.full((sae.config.num_experts,), len(x))
        if output.router_logits is not None:
            own = output.router_logits.topk(sae.config.num_experts_per_token).indices
            seen = torch.bincount(own.flatten(), minlength=sae.config.num_experts)
        wanted += seen.repeat_interleave(sae.config.features_per_expert)
        wanted[fired] = 0
    assert torch.equal(sae.num_tokens_since_fired, wanted)
    assert wanted.any() or "all" in kind or "plain" in kind

    sae.eval()(rows(30))
    assert torch.equal(sae.num_tokens_since_fired, wanted), "evaluation is no training"


def test_an_empty_slot_is_no_firing():
    since = torch.full((2, 3), 5)
    acts = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    ids = torch.tensor([[1, 0], [2, 2]])
    count_since_fired(since, acts, ids, torch.zeros(2, 1, dtype=torch.int64), None)
    assert since.tolist() == [[7, 0, 7], [5, 5, 5]]


def test_dead_features_are_those_silent_for_dead_after_tokens():
    sae = make("switch", dead_after_tokens=10)
    sae.num_tokens_since_fired[:3] = torch.tensor([9, 10, 11])
    assert sae.dead_features().nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("fields", [{"dead_after_tokens": 0}, {"k_aux": 0}], ids=str)
def test_auxk_of_no_features_or_no_tokens_is_refused_with_the_switch_that_turns_it_off(fields):
    with pytest.raises(ConfigError, match="auxk_loss_coef=0 is what turns AuxK off"):
        config(**fields)
    with pytest.raises(ConfigError, match="router_best_expert_loss_coef=0 is what turns"):
        config(router_best_expert_temperature=0)


@pytest.mark.parametrize("name", ["router_z_loss_coef", "l1_loss_coef", "auxk_loss_coef"])
def test_a_negative_coefficient_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name}=-1 must not be negative"):
        config(**{name: -1})


@pytest.mark.parametrize("kind", ["switch", "two_experts"])
def test_the_z_loss_and_every_gradient_are_those_of_the_formula(kind):
    fields = {"fvu_loss_coef": 0, "router_aux_loss_coef": 0, "router_z_loss_coef": 0.7}
    sae, x = exact_sae(kind, **fields), rows().double().requires_grad_()
    logits = (sae.input_scale * x - sae.b_router) @ sae.router.weight.T
    wanted = 0.7 * logits.exp().sum(-1).log().square().mean()
    wanted.backward()
    expected, expected_x, x.grad = whole_gradients(sae), x.grad, None
    sae.zero_grad()

    output = sae(x)
    output.loss.backward()

    torch.testing.assert_close(output.loss, wanted.detach(), **EXACT)
    torch.testing.assert_close(output.router_z_loss, wanted.detach() / 0.7, **EXACT)
    torch.testing.assert_close(whole_gradients(sae), expected, **EXACT)
    torch.testing.assert_close(x.grad, expected_x, **EXACT)
    mask = torch.arange(len(x)) % 2 > 0
    alone = sae(x[mask]).router_z_loss
    torch.testing.assert_close(sae(x, attention_mask=mask).router_z_loss, alone, **EXACT)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "kind", ["switch", "switch_with_bias", "no_router_weight", "two_experts", "batch_topk", "relu"]
)
def test_the_best_expert_loss_and_its_gradient_are_those_of_the_formula(kind, groups):
    fields = {"fvu_loss_coef": 0, "router_aux_loss_coef": 0, "router_best_expert_loss_coef": 0.7}
    sae, x = exact_sae(kind, groups, **fields), rows(22).double()
    c, tried = sae.config, x[::E]
    logits = (sae.input_scale * tried - sae.b_router) @ sae.router.weight.T
    gate = logits.softmax(-1).amax(-1) if c.apply_router_probs else torch.ones(len(tried))
    errors, bias = torch.empty(len(tried), E, dtype=torch.float64), sae.b_dec / sae.input_scale
    for n, token in enumerate(tried):
        for e in range(E):
            pre = sae.W_enc[e] @ (token - bias if c.subtract_b_dec else token)
            pre = pre if sae.b_enc is None else pre + sae.b_enc[e] / sae.input_scale
            acts = gate[n] * pre.relu()
            if c.k is not None:
                acts = acts.where(acts >= acts.topk(min(c.k, M)).values[-1], 0)
            errors[n, e] = (token - bias - acts @ sae.W_dec[e]).square().sum()
    target = (-errors / (0.05 * errors.mean(1, keepdim=True))).softmax(-1).detach()
    wanted = -(target * logits.log_softmax(-1)).sum(1).mean()
    (0.7 * wanted).backward()
    expected = whole_gradients(sae)
    sae.zero_grad()

    output = sae(x)
    output.loss.backward()

    torch.testing.assert_close(output.router_best_expert_loss, wanted.detach(), **EXACT)
    found = whole_gradients(sae)
    assert found["router.weight"].any()
    torch.testing.assert_close(found, expected, **EXACT)
    assert not any(grad.any() for name, grad in found.items() if "router" not in name)
    assert sae.eval()(x).router_best_expert_loss == 0


def test_masked_tokens_are_not_tried():
    fields = {"router_best_expert_loss_coef": 1.0}
    sae, x = exact_sae("switch", **fields), rows(24).double()
    mask = torch.arange(24) % (2 * E) > 0  # of the tokens that are tried every other is masked
    alone = x.reshape(3, 2, E, D)[:, 1].reshape(-1, D)
    wanted = sae(alone).router_best_expert_loss
    spoiled = x.where(mask[:, None], 77.0)
    found = sae(spoiled, attention_mask=mask).router_best_expert_loss
    torch.testing.assert_close(found, wanted, **EXACT)


def naive_second(sae: SwitchSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """What each token's second choice of expert makes of x [n, D], and of the first, written out.

    Both [n, D], less b_dec; activations take the router's weight of the first choice, as a number.
    """
    c, s = sae.config, sae.input_scale
    logits = (s * x - sae.b_router) @ sae.router.weight.T
    both = logits.topk(2).indices.T
    gate = logits.softmax(-1).amax(-1, keepdim=True).detach() if c.apply_router_probs else 1.0
    u = x - sae.b_dec / s if c.subtract_b_dec else x
    found = []
    for ids in both:
        pre = torch.einsum("nd,nmd->nm", u, sae.W_enc[ids])
        pre = pre if sae.b_enc is None else pre + sae.b_enc[ids] / s
        acts = gate * pre.relu()
        if c.activation == "batch_topk":
            acts = acts.where(acts >= acts.flatten().topk(c.k * len(x)).values[-1], 0)
        elif c.activation == "jumprelu":
            acts = acts.where(acts > sae.threshold.view(E, M)[ids] / s, 0)
        elif c.k is not None:
            acts = acts.where(acts >= acts.topk(min(c.k, M)).values[:, -1:], 0)
        found.append(torch.einsum("nm,nmd->nd", acts, sae.W_dec[ids]))
    return found[1], found[0].detach()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "kind", ["switch", "switch_with_bias", "no_router_weight", "batch_topk", "relu", "jumprelu"]
)
def test_the_second_experts_loss_and_its_gradient_are_those_of_the_formula(kind, groups):
    fields = {"fvu_loss_coef": 0, "router_aux_loss_coef": 0, "second_expert_loss_coef": 0.7}
    sae, x = exact_sae(kind, groups, **fields), rows(22).double()
    error = x - naive_second(sae, x)[0] - sae.b_dec / sae.input_scale
    wanted = error.square().sum() / (x - x.mean(0)).square().sum()
    (0.7 * wanted).backward()
    expected = whole_gradients(sae)
    sae.zero_grad()

    output = sae(x)
    output.loss.backward()

    torch.testing.assert_close(output.second_expert_loss, wanted.detach(), **EXACT)
    found = whole_gradients(sae)
    torch.testing.assert_close(found, expected, **EXACT)
    assert found["W_enc"].any()
    assert not any(grad.any() for name, grad in found.items() if "router" in name)
    mask = torch.arange(len(x)) % 3 > 0
    if kind != "batch_topk":  # where masked tokens still are part of the batch
        alone = sae(x[mask]).second_expert_loss
        torch.testing.assert_close(sae(x, attention_mask=mask).second_expert_loss, alone, **EXACT)
    assert sae.eval()(x).second_expert_loss == 0


@pytest.mark.parametrize("kind", ["switch", "no_router_weight", "batch_topk"])
def test_the_router_learns_which_of_its_first_two_choices_was_better_on_every_token(kind):
    fields = {"fvu_loss_coef": 0, "router_aux_loss_coef": 0, "router_best_expert_loss_coef": 0.7}
    x = rows(22).double()
    alone = exact_sae(kind, **fields)(x).router_best_expert_loss
    sae = exact_sae(kind, second_expert_loss_coef=1e-12, **fields)
    second, first = naive_second(sae, x)
    logits = ((sae.input_scale * x - sae.b_router) @ sae.router.weight.T).topk(2).values
    known = [(x - sae.b_dec / sae.input_scale - y).square().sum(1) for y in (first, second)]
    errors = torch.stack(known, 1).detach()
    target = (-errors / (0.05 * errors.mean(1, keepdim=True))).softmax(-1)
    wanted = -(target * logits.log_softmax(-1)).sum(1).mean()

    output = sae(x)

    torch.testing.assert_close(output.router_best_expert_loss, alone + wanted, **EXACT)
    other = exact_sae(kind, **fields)
    (of_two,) = torch.autograd.grad(wanted, sae.router.weight)
    (of_all,) = torch.autograd.grad(other(x).router_best_expert_loss, other.router.weight)
    (found,) = torch.autograd.grad(output.router_best_expert_loss, sae.router.weight)
    torch.testing.assert_close(found, of_two + of_all, **EXACT)


@pytest.mark.parametrize("pair", [(i, j) for j in range(8) for i in range(j)])
def test_of_two_experts_that_the_router_holds_for_equal_the_second_is_the_other(pair):
    fields = {"num_features": 8 * M, "num_experts": 8, "second_expert_loss_coef": 0.3}
    sae, x = make("no_router_weight", **fields).double().train(), rows(200).double()
    first, other = pair  # the lower is taken, as of all maxima
    with torch.no_grad():
        sae.router.weight[other] = sae.router.weight[first]
        sae.W_dec[other] = 0
    logits = (sae.input_scale * x - sae.b_router) @ sae.router.weight.T
    x = x[logits.argmax(1) == first]
    assert len(x) > 5
    error = x - sae.b_dec / sae.input_scale
    wanted = error.square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(sae(x).second_expert_loss, wanted, **EXACT)


def test_a_second_expert_is_for_saes_of_one_expert_a_token():
    with pytest.raises(ConfigError, match="second_expert_loss_coef=0"):
        config(num_experts_per_token=2, second_expert_loss_coef=0.3)
    sae = make("plain_topk", second_expert_loss_coef=0.3).train()  # there is no other
    assert sae(rows(5)).second_expert_loss == 0
    none = make("batch_topk", second_expert_loss_coef=0.3).train()(rows(0))
    assert none.reconstruction.shape == (0, D)
    far = make("batch_topk", second_expert_loss_coef=0.3).train()
    far.b_enc.data.fill_(-1e3)  # nothing is active
    assert far(rows(5)).second_expert_loss.isfinite()


def test_the_published_loss_and_its_closed_form_gradients_are_ours_times_the_variance():
    """L = mean |x_hat - x|^2 + alpha * d * E * sum(f_e P_e), its gradients in closed form.

    With u = x - b_dec, S the support, y = sum over S of a_j w_j, G = 2 (g y + b_dec - x) / B:
    dw_j += g a_j G;  delta_j = g <G, w_j>;  dW_enc,j += delta_j u;
    db_dec = sum G - sum_j (sum delta_j) W_enc,j;  dg = <G, y>;
    dh_i = dg g (1[i = e] - p_i) + alpha d E / B * p_i (f_i - sum_e f_e p_e);
    dW_r = sum dh (x - b_r)^T;  db_r = -W_r^T sum dh.
    """
    x, alpha = rows(40).double(), 3.0
    B, variance = len(x), float((x - x.mean(0)).square().sum(1).mean())
    sae = make("switch", scale=1.0, router_aux_loss_coef=alpha * D / variance).double().train()

    output = sae(x)
    (variance * output.loss).backward()
    found = whole_gradients(sae)

    with torch.no_grad():
        p = ((x - sae.b_router) @ sae.router.weight.T).softmax(-1)
        e = p.argmax(1)
        g, token = p.gather(1, e[:, None]), torch.arange(B)
        u = x - sae.b_dec
        a, S = torch.einsum("nd,nmd->nm", u, sae.W_enc[e]).relu().topk(K)
        w, w_enc = sae.W_dec[e[:, None], S], sae.W_enc[e[:, None], S]
        y = torch.einsum("nk,nkd->nd", a, w)
        f = torch.bincount(e, minlength=E).double() / B
        loss = (g * y + sae.b_dec - x).square().sum(1).mean() + alpha * D * E * (
            f * p.mean(0)
        ).sum()
        G = 2 * (g * y + sae.b_dec - x) / B
        delta = g * torch.einsum("nd,nkd->nk", G, w) * (a > 0)
        dW_dec, dW_enc = torch.zeros_like(sae.W_dec), torch.zeros_like(sae.W_enc)
        dW_dec.index_put_((e[:, None], S), (g * a)[..., None] * G[:, None], accumulate=True)
        dW_enc.index_put_((e[:, None], S), delta[..., None] * u[:, None], accumulate=True)
        dg = (G * y).sum(1, keepdim=True)
        dh = -dg * g * p
        dh[token, e] += (dg * g)[:, 0]
        dh += alpha * D * E / B * p * (f - (f * p).sum(1, keepdim=True))
        wanted = {
            "W_enc": dW_enc,
            "W_dec": dW_dec,
            "b_dec": G.sum(0) - torch.einsum("nk,nkd->d", delta, w_enc),
            "router.weight": dh.T @ (x - sae.b_router),
            "b_router": -sae.router.weight.T @ dh.sum(0),
        }
    torch.testing.assert_close(variance * output.loss.detach(), loss, **EXACT)
    torch.testing.assert_close(found, wanted, **EXACT)


def test_float64_stays_float64_and_low_precision_keeps_its_router_in_float32():
    exact = make("switch_with_bias").double()
    output = exact(rows().double())
    for name in ("loss", "fvu", "router_aux_loss", "router_logits", "reconstruction"):
        assert output[name].dtype == torch.float64, name
    low = make("switch_with_bias").bfloat16()
    assert low.router.weight.dtype == low.input_scale.dtype == torch.float32
    assert low.W_enc.dtype == torch.bfloat16


# ---------------------------------------------------------------- how much is active

L1_KINDS = ["relu", "jumprelu", "plain_relu"]


def naive_l1(sae: SwitchSAE, x: Tensor) -> Tensor:
    """Mean over tokens of what all features add, each as long as it is, in lengths of a token."""
    c, s = sae.config, sae.input_scale
    u = x - sae.b_dec / s if c.subtract_b_dec else x
    acts = torch.einsum("nd,emd->nem", u, sae.W_enc)
    acts = (acts if sae.b_enc is None else acts + sae.b_enc / s).relu()
    if c.num_experts > 1:
        probs = ((s * x - sae.b_router) @ sae.router.weight.T).softmax(-1)
        top = torch.nn.functional.one_hot(probs.argmax(-1), c.num_experts)
        acts = acts * (probs * top)[..., None]
    if c.activation == "jumprelu":
        acts = acts.where(acts * s > sae.threshold.view(c.num_experts, -1), 0)
    return (acts * sae.W_dec.norm(dim=-1)).sum((1, 2)).mean() * s / D**0.5


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", L1_KINDS)
def test_the_l1_loss_and_every_gradient_are_those_of_the_formula(kind, groups):
    if "plain" in kind and groups > 1:
        pytest.skip("one expert is one group")
    fields = {"fvu_loss_coef": 0, "router_aux_loss_coef": 0, "l1_loss_coef": 0.7}

    def longer(sae: SwitchSAE) -> SwitchSAE:
        """Decoder rows of other lengths than 1."""
        with torch.no_grad():
            for at, group in enumerate(sae.experts):
                group.W_dec.mul_(2 + at / 3)
        return sae

    sae, x = longer(exact_sae(kind, 1, **fields)), rows().double().requires_grad_()
    if groups > 1:
        sae = longer(exact_sae(kind, groups, **fields))
    wanted = naive_l1(sae, x)
    (0.7 * wanted).backward()
    expected, expected_x, x.grad = whole_gradients(sae), x.grad, None
    sae.zero_grad()

    output = sae(x)
    output.loss.backward()

    assert wanted > 0.1
    torch.testing.assert_close(output.l1_loss, wanted.detach(), **EXACT)
    torch.testing.assert_close(output.loss, 0.7 * wanted.detach(), **EXACT)
    torch.testing.assert_close(whole_gradients(sae), expected, **EXACT)
    torch.testing.assert_close(x.grad, expected_x, **EXACT)
    mask = torch.arange(len(x)) % 2 > 0
    alone = sae(x[mask]).l1_loss
    torch.testing.assert_close(sae(x, attention_mask=mask).l1_loss, alone, **EXACT)


def test_the_l1_loss_does_not_depend_on_who_of_encoder_and_decoder_is_long_nor_on_the_scale():
    sae, x = exact_sae("plain_relu", l1_loss_coef=1.0, subtract_b_dec=True), rows().double()
    before = sae(x).l1_loss
    with torch.no_grad():
        sae.W_enc.mul_(3)
        sae.b_enc.mul_(3)
        sae.W_dec.div_(3)
    torch.testing.assert_close(sae(x).l1_loss, before, **EXACT)
    sae.input_scale.div_(10)
    torch.testing.assert_close(sae(10 * x).l1_loss, before, **EXACT)


def test_l1_is_added_in_training_alone_and_both_losses_matter():
    sae, x = exact_sae("plain_relu", l1_loss_coef=0.5), rows().double()
    output = sae(x)
    torch.testing.assert_close(output.loss, output.fvu + 0.5 * output.l1_loss, **EXACT)
    assert output.l1_loss > 0
    assert sae.eval()(x).l1_loss == 0
    assert exact_sae("plain_relu")(x).l1_loss == 0


def test_l1_is_refused_where_k_says_how_many_are_active_and_in_the_published_loss():
    for fields in ({"activation": "topk"}, {"activation": "relu", "k": 3}):
        with pytest.raises(ConfigError, match="makes fewer features active"):
            config(l1_loss_coef=0.1, **fields)
    sae = make("relu", l1_loss_coef=0.1)
    with pytest.raises(ConfigError, match="the published loss has no such part"):
        SAEsTogether({"one": sae}, "published", 3.0)
    SAEsTogether({"one": sae}, "relative", 3.0)
