"""Gradient checkpointing under edits: backward runs parts again, and each is what it was before.

Room   One model, batch and choice of edits, with and without checkpointing: the gradients agree.
Beware Models are in float64 and without dropout, so that both ways compute nearly the same bits.
       A model may be checkpointed inside its blocks (where only what lies in a block runs again,
       hooks and all) or by the user's own code, around blocks or the whole model.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_switch_sae import Ablate, Clamp, EditError, Patch, Scale, Session, Steer, attach

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)
IDS = torch.stack(tiny.prompts(7, 7, 7))
MASK = torch.ones_like(IDS)
MASK[1, :3], MASK[2, :1] = 0, 0
SCOPES: dict[str, dict[str, Any]] = {
    "all": {},
    "rows": {"rows": [1, 2]},
    "positions": {"positions": [0, 2]},
    "slice": {"positions": slice(1, 6, 2)},
    "prompt": {"positions": "prompt"},
    "mask of positions": {"positions": [True, False, False, True]},
    "mask of the batch": {"positions": IDS.eq(IDS[2, 4]) | MASK.eq(0)},
    "when": {"when": (5, 0.01)},
}
PLACES = [
    ("gpt2", 2),
    ("gpt2", "layers.2.resid_pre"),
    ("gpt2", "transformer.h.2.mlp"),
    ("gemma3", 2),
    ("gemma3", "model.layers.2.self_attn"),
    ("gemma3", "model.layers.2.input_layernorm"),
    ("bert", 1),
    ("bert", "bert.encoder.layer.1.output"),
    ("t5", "decoder.block.2"),
    ("t5", "encoder.block.1"),
    ("mixtral", 2),
    ("mixtral", "model.layers.2.mlp"),
    ("mixtral", "model.layers.2.mlp.experts"),
]
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
Gradients = dict[str, Tensor]


def built(kind: str, reentrant: bool | None = None) -> nn.Module:
    """A tiny model that trains without dropout; None: without checkpointing."""
    if kind == "mixtral":  # its experts are not computed in float64
        fields = {**tiny._SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
        lm = tiny._build("MixtralForCausalLM", "MixtralConfig", **fields)
    else:
        lm = tiny.ALL[kind]().double()
    lm.train()
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return lm if reentrant is None else checkpointed(lm, reentrant)


def checkpointed(lm: nn.Module, reentrant: bool) -> nn.Module:
    lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    lm.enable_input_require_grads()
    return lm


def loss_of(lm: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if lm.config.is_encoder_decoder:
        given |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    if lm.config.model_type != "bert":
        given |= {"use_cache": False}
    logits = lm(**given).logits.log_softmax(-1)
    return logits.gather(-1, ids[..., None])[mask > 0].mean()


def gradients(lm: nn.Module) -> Gradients:
    return {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}


def assert_same(got: Gradients, want: Gradients) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-8, msg=name)


def attached(lm: nn.Module, at: int | str) -> Session:
    return attach(lm, tiny.sae_for(lm, 2), at=at, allow_mismatch=True)


def first() -> tuple[Any, ...]:
    scaled = Scale(list(range(64)), 3.0, positions=[0, 2])
    return scaled, Steer(7, 2.0, unit="raw", rows=1)


def second() -> tuple[Any, ...]:
    return (Clamp([3, 9], 2.0, unit="raw", positions=slice(1, 5)),)


@pytest.mark.filterwarnings("ignore:backward has not run yet:UserWarning")  # tested further below
@pytest.mark.parametrize(
    ("place", "scope"),
    [(p, s) for i, p in enumerate(PLACES) for j, s in enumerate(SCOPES) if (i + j) % 3 == 0],
    ids=str,
)
def test_gradients_of_edits_are_those_without_checkpointing(place, scope):
    lm, scoped = built(place[0]), SCOPES[scope]
    with torch.no_grad(), attached(lm, place[1]) as session:
        loss_of(lm)
        source = session.features[[1, 2, 0]]

    def run() -> Gradients:
        amount = torch.tensor(2.0, requires_grad=True)
        lm.zero_grad()
        with attached(lm, place[1]) as session:
            session.edit(
                Steer(7, amount, unit="raw", **scoped),
                Scale([5, 9, 13, 33], amount, **scoped),
                Clamp([6, 40], amount, unit="raw", **scoped),
                Ablate([10, 20, 30, 50], **scoped),
                Patch(source, features=[1, 2, 3, 8, 11, 41], **scoped),
            )
            loss_of(lm).backward()
        assert amount.grad is not None
        return {**gradients(lm), "the amount": amount.grad}

    want = run()

    assert want["the amount"] != 0 or scope == "when"
    for reentrant in (True, False):
        checkpointed(lm, reentrant)
        assert_same(run(), want)


def _two_forwards(session: Session, lm: nn.Module) -> None:
    session.edit(*first())
    loss = loss_of(lm)
    session.edit(*second())
    loss = loss + 2 * loss_of(lm, IDS.flip(1)) + 3 * loss_of(lm, IDS[:, :4], MASK.flip(1)[:, :4])
    loss.backward()


def _fewer_rows(session: Session, lm: nn.Module) -> None:
    session.edit(*first())
    three = loss_of(lm)
    session.edit(*second())
    two = loss_of(lm, IDS[:2], MASK[:2])
    session.edit()
    three.backward()
    two.backward()


def _one_input_thrice(session: Session, lm: nn.Module) -> None:
    session.edit(*first())
    loss = loss_of(lm)
    session.edit(*second())
    loss = loss - loss_of(lm)
    session.edit()
    (loss + 4 * loss_of(lm)).backward()


def _backward_twice(session: Session, lm: nn.Module) -> None:
    session.edit(*first())
    loss = loss_of(lm)
    loss.backward(retain_graph=True)
    session.edit(*second())
    loss.backward()


def _muted(session: Session, lm: nn.Module) -> None:
    session.edit(*first())
    with session.without_edits():
        unedited = loss_of(lm)
    loss = loss_of(lm) - 3 * unedited
    with session.without_edits():
        loss.backward()


STEPS = [_two_forwards, _fewer_rows, _one_input_thrice, _backward_twice, _muted]
INNER = [
    ("llama", "model.layers.2.mlp"),
    ("llama", "model.layers.1.self_attn"),
    ("gpt2", "layers.2.resid_pre"),
    ("gemma3", 1),
    ("t5", "decoder.block.2"),
]


@REENTRANT
@pytest.mark.parametrize("place", INNER, ids=str)
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: steps.__name__.strip("_"))
def test_each_forward_is_repeated_with_the_edits_it_ran_with(steps, place, reentrant):
    def run(reentrant: bool | None) -> Gradients:
        lm = built(place[0], reentrant)
        with attached(lm, place[1]) as session:
            steps(session, lm)
        return gradients(lm)

    assert_same(run(reentrant), run(None))


@REENTRANT
def test_edits_set_after_a_forward_do_not_act_in_its_backward(reentrant):
    def run(reentrant: bool | None) -> Gradients:
        lm = built("llama", reentrant)
        with attached(lm, "model.layers.2.self_attn") as session:
            loss = loss_of(lm)
            session.edit(*first())
            loss.backward()
        return gradients(lm)

    assert_same(run(reentrant), run(None))


@REENTRANT
def test_a_forward_is_recorded_once_and_its_features_stay(reentrant, tmp_path):
    lm = built("gpt2", reentrant)
    with attached(lm, "transformer.h.2.attn") as session, session.record(tmp_path) as store:
        session.edit(*first())
        other = loss_of(lm, IDS.flip(1))
        loss_of(lm).backward()
        before = session.features.acts.detach().clone()
        other.backward()
        del other
        torch.testing.assert_close(session.features.acts.detach(), before, rtol=0, atol=0)
    assert store.num_tokens == 2 * int(MASK.sum())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_detaching_before_backward_warns(kind):
    lm = built(kind, True)
    inner = {"llama": "model.layers.2.mlp", "t5": "encoder.block.1.layer.1.DenseReluDense"}
    session = attached(lm, inner[kind])
    session.edit(Steer(7, 2.0, unit="raw"))
    loss = loss_of(lm)

    with pytest.warns(UserWarning, match="backward has not run yet"):
        session.detach()

    assert loss.requires_grad


@pytest.mark.parametrize(
    ("reentrant", "scope"), [(True, {}), (False, {"when": (5, 0.01)})], ids=["loss kept", "when"]
)
def test_detaching_after_backward_does_not_warn(reentrant, scope):
    lm = built("llama", reentrant)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with attached(lm, "model.layers.2.mlp") as session:
            session.edit(Steer(5, 2.0, unit="raw", **scope))
            loss = loss_of(lm)
            loss.backward()
    assert loss.isfinite()


# Checkpoints of the user's own.

Way = Callable[[nn.Module, bool], None]


def _as(module: nn.Module, call: Callable[..., Any]) -> None:
    """Make a module's calls go through `call(its own call, *args, **kwargs)`."""
    kind = type(module)
    own = kind.__call__
    through = lambda self, *a, **k: call(functools.partial(own, self), *a, **k)  # noqa: E731
    module.__class__ = type(kind.__name__, (kind,), {"__call__": through})


def _each_block(lm: nn.Module, reentrant: bool) -> None:
    def call(own: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda *a: own(*a, **kwargs), *args, use_reentrant=reentrant)

    for block in lm.model.layers:
        _as(block, call)


def _nested(lm: nn.Module, reentrant: bool) -> None:
    def call(own: Any, *args: Any, **kwargs: Any) -> Any:
        def outer(*args: Any) -> Any:
            return checkpoint(lambda *a: own(*a, **kwargs), *args, use_reentrant=reentrant)

        return checkpoint(outer, *args, use_reentrant=reentrant)

    for block in lm.model.layers:
        _as(block, call)


class _Again(nn.Module):
    """A module that lives as long as its block, for checkpoint(module, x)."""

    def __init__(self, own: Callable[..., Any]) -> None:
        super().__init__()
        self.own = own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


def _module_itself(lm: nn.Module, reentrant: bool) -> None:
    for layer in lm.model.layers:
        kept: list[_Again] = []

        def call(own: Any, x: Tensor, kept: list[_Again] = kept) -> Any:
            kept or kept.append(_Again(own))
            return checkpoint(kept[0], x, use_reentrant=reentrant)

        _as(layer.mlp, call)


def _whole(lm: nn.Module, reentrant: bool) -> None:
    def call(own: Any, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        inner = lambda x: own(inputs_embeds=x, **kwargs).logits  # noqa: E731
        return _Logits(checkpoint(inner, inputs_embeds, use_reentrant=reentrant))

    _as(lm, call)


class _Logits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def own_way(at: int | str, way: Way | None, reentrant: bool, steps: Any) -> Gradients:
    """Gradients of weights and embeddings with the user's way of checkpointing."""
    lm = built("llama")
    embedded = [lm.get_input_embeddings()(ids).detach().requires_grad_() for ids in (IDS, IDS + 1)]
    if way is not None:
        way(lm, reentrant)

    def loss(index: int, mask: Tensor = MASK) -> Tensor:
        out = lm(inputs_embeds=embedded[index], attention_mask=mask, use_cache=False).logits
        return out[mask > 0].pow(2).mean()

    with attached(lm, at) as session:
        steps(session, lm, loss)
    xs = {f"x{i}": x.grad for i, x in enumerate(embedded) if x.grad is not None}
    return {**gradients(lm), **xs}


def _changed_between(session: Session, lm: nn.Module, loss: Any) -> None:
    session.edit(*first())
    total = loss(0) + 2 * loss(1, MASK.flip(0))
    session.edit(*second())
    total.backward()


def _with_then_without(session: Session, lm: nn.Module, loss: Any) -> None:
    session.edit(*first())
    loss(0).backward()
    lm.zero_grad()
    session.edit()
    loss(1).backward()


def _one_input_two_masks(session: Session, lm: nn.Module, loss: Any) -> None:
    session.edit(*first())
    (loss(0) + 2 * loss(0, MASK.flip(0))).backward()


def own_cases() -> Iterator[Any]:
    mlp = "model.layers.2.mlp"
    for at in (2, "layers.2.resid_pre", mlp, "model.layers.1.self_attn"):
        for reentrant in (True, False):
            for steps in (_changed_between, _one_input_two_masks):
                yield at, _each_block, reentrant, steps
        yield at, _nested, False, _changed_between
        yield at, _nested, True, _changed_between
        yield at, _whole, True, _changed_between
        yield at, _whole, False, _changed_between
    for reentrant in (True, False):
        yield mlp, _module_itself, reentrant, _changed_between
    yield mlp, _module_itself, True, _with_then_without


@pytest.mark.parametrize(("at", "way", "reentrant", "steps"), list(own_cases()))
def test_checkpoints_of_the_users_own_repeat_the_edits(at, way, reentrant, steps):
    assert_same(own_way(at, way, reentrant, steps), own_way(at, None, reentrant, steps))


def test_a_mask_that_checkpoint_knows_nothing_of_is_taken_for_no_other():
    lm, masks = tiny.llama().double().train(), [torch.ones(2, 6), torch.ones(2, 6)]
    masks[1][1, :3] = 0
    block, x = lm.model.layers[0], torch.randn(2, 6, tiny.DIM, dtype=torch.float64)
    x.requires_grad_()
    call, arguments = type(block).__call__, {}

    def again(stream: Tensor) -> Any:  # lives on, and gets the mask from elsewhere
        return call(block, stream, **arguments)

    def checkpointed(_: Any, stream: Tensor, **given: Any) -> Any:
        arguments.update(given)
        return checkpoint(again, stream, use_reentrant=False)

    _as(block, checkpointed)
    with attach(lm, tiny.sae_for(lm, 0), at="layers.0.resid_pre", allow_mismatch=True) as session:
        session.edit(Scale(list(range(64)), 3.0))
        losses = [
            lm(inputs_embeds=x, attention_mask=mask, use_cache=False).logits.pow(2).mean()
            for mask in masks
        ]
        with pytest.raises(EditError, match="a second time"):
            losses[0].backward()
