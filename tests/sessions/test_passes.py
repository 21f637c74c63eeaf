"""Passes that never come by the place of an SAE, and copies of a model that has one.

Room   A forward that leaves a block out says so if it was to be edited, and shows no features of an
       older one. What can't go with a copy is refused; what has nothing to do with it is copied.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import tiny
from helpers.scopes import axes_sae, watched
from torch import nn

from hf_switch_sae import AttachError, HookpointError, Session, Steer, attach, partial_forward

IDS = torch.stack(tiny.prompts(6, 6))
BLOCKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "mamba": "backbone.layers",
    "bert": "bert.encoder.layer",
    "t5": "decoder.block",
    "bart": "model.decoder.layers",
}


def attached(lm: nn.Module, at: str) -> Session:
    return attach(lm, axes_sae(tiny.DIM), at=at, allow_mismatch=True)


def forward(lm: nn.Module, columns: int = 6) -> Any:
    ids = IDS[:, :columns]
    return lm(ids, **({"decoder_input_ids": ids} if lm.config.is_encoder_decoder else {}))


def bypass(blocks: nn.ModuleList) -> None:
    """Make calls of the blocks run their forward alone, as fast paths do."""
    for block in blocks:
        kind = type(block)
        alone = lambda self, *args, **kwargs: self.forward(*args, **kwargs)  # noqa: E731
        block.__class__ = type(kind.__name__, (kind,), {"__call__": alone})


ENCODERS = [
    pytest.param(kind, blocks)
    for kind, blocks in (("t5", "encoder.block"), ("bart", "model.encoder.layers"))
]


@pytest.mark.parametrize("scope", [{}, {"rows": 1}, {"positions": "prompt"}], ids=str)
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize(("kind", "blocks"), [*BLOCKS.items(), *ENCODERS])
def test_an_edit_at_a_block_that_is_not_called_is_an_error(kind, blocks, site, scope):
    lm = tiny.ALL[kind]()
    bypass(lm.get_submodule(blocks))
    with torch.no_grad(), attached(lm, f"{blocks}.2.{site}") as session:
        forward(lm)  # reading goes on
        with pytest.raises(HookpointError):
            _ = session.features
        session.edit(Steer(0, 1.0, unit="raw", **scope))
        with pytest.raises(HookpointError, match="did not call"):
            forward(lm)


def _dropping(kind: str) -> tuple[nn.Module, str]:
    """A model in training mode that leaves blocks out by chance, and where to attach."""
    fields: dict[str, Any] = {"vocab_size": tiny.VOCAB, "dropout": 0.0, "attention_dropout": 0.0}
    if kind == "opt":
        fields |= {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "layerdrop": 0.5}
        fields |= {"num_hidden_layers": 4, "num_attention_heads": 4}
        lm = tf.OPTForCausalLM(tf.OPTConfig(**fields, max_position_embeddings=64))
        return lm.train(), "model.decoder.layers.2"
    for half in ("encoder", "decoder"):
        fields |= {f"{half}_layers": 4, f"{half}_attention_heads": 4, f"{half}_ffn_dim": 48}
        fields |= {f"{half}_layerdrop": 0.5}
    lm = tf.BartForConditionalGeneration(tf.BartConfig(d_model=32, **fields, pad_token_id=0))
    return lm.train(), f"model.{kind.removeprefix('bart ')}.layers.2"


DROPPING = ["opt", "bart decoder", "bart encoder"]


@pytest.mark.parametrize("kind", DROPPING)
def test_features_are_never_those_of_an_older_forward(kind):
    lm, at = _dropping(kind)
    ran = 0
    with torch.no_grad(), attached(lm, at) as session:
        for columns in [1, 2, 3, 4, 5, 6] * 3:
            with watched(lm.get_submodule(at)) as changes:
                forward(lm, columns)
            ran += len(changes)
            if changes:
                assert session.features.shape == (2, columns)
            else:
                with pytest.raises(HookpointError):
                    _ = session.features
    assert 0 < ran < 18


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize(
    "kind",
    [
        *DROPPING[:2],
        pytest.param("bart encoder"),
    ],
)
def test_a_block_that_is_dropped_is_edited_or_the_forward_says_so(kind, grad):
    lm, at = _dropping(kind)
    ran = 0
    with torch.set_grad_enabled(grad), attached(lm, at) as session:
        session.edit(Steer(0, 1.0, unit="raw"))
        for _ in range(18):
            with watched(lm.get_submodule(at)) as changes:
                try:
                    forward(lm)
                    assert changes
                except HookpointError:
                    assert not changes
            ran += len(changes)
    assert 0 < ran < 18


def test_a_draft_that_exits_early_need_not_come_by():
    lm = tiny.llama()
    with torch.no_grad(), attached(lm, "model.layers.3") as session:
        session.edit(Steer(0, 1.0, unit="raw", positions="generated"))
        options = {"assistant_early_exit": 2, "max_new_tokens": 5, "do_sample": False}
        out = lm.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **options)
    assert out.shape == (1, 11)


# Copies.

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda what: torch.save(what, io.BytesIO()),
}
WITH: dict[str, Callable[[nn.Module, nn.ModuleList], Any]] = {
    "the model": lambda lm, blocks: lm,
    "its inner model": lambda lm, blocks: lm.base_model,
    "the blocks": lambda lm, blocks: blocks,
    "the block": lambda lm, blocks: blocks[2],
    "some blocks": lambda lm, blocks: blocks[1:3],
    "a list": lambda lm, blocks: [blocks[0], blocks[2]],
    "a dict": lambda lm, blocks: {"block": blocks[2]},
    "a new module": lambda lm, blocks: nn.Sequential(blocks[0], blocks[2]),
}
WITHOUT: dict[str, Callable[[nn.Module, nn.ModuleList], Any]] = {
    "another block": lambda lm, blocks: blocks[1],
    "other blocks": lambda lm, blocks: blocks[:2],
    "a list of others": lambda lm, blocks: [blocks[0], blocks[3]],
    "the embeddings": lambda lm, blocks: lm.get_input_embeddings(),
    "weights": lambda lm, blocks: lm.state_dict(),
    "the config": lambda lm, blocks: lm.config,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_what_has_an_sae_attached_is_not_copied_and_what_has_none_is(kind, how):
    lm = tiny.ALL[kind]()
    blocks, before = lm.get_submodule(BLOCKS[kind]), tiny.traces(lm)
    with attached(lm, f"{BLOCKS[kind]}.2") as session:
        session.edit(Steer(0, 1.0, unit="raw"))
        for what in WITH.values():
            with pytest.raises(AttachError):
                COPIES[how](what(lm, blocks))
        for what in WITHOUT.values():
            COPIES[how](what(lm, blocks))
    assert tiny.traces(lm) == before
    COPIES[how](lm)


def test_a_shallow_copy_is_edited_while_it_is_the_model_and_clean_afterward():
    lm = tiny.llama()
    with torch.no_grad(), attached(lm, "model.layers.2") as session:
        session.edit(Steer(0, 1.0, unit="raw", rows=1))
        shallow = copy.copy(lm)
        with watched(lm.model.layers[2]) as changes:
            shallow(IDS)
        assert changes[0].any(-1).any(-1).tolist() == [False, True]
    with torch.no_grad(), watched(lm.model.layers[2]) as changes:
        shallow(IDS)
    assert not changes[0].any()
    assert tiny.traces(shallow) == tiny.traces(lm) == tiny.traces(tiny.llama())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_model_is_saved_while_an_sae_is_attached(kind, tmp_path):
    lm = tiny.ALL[kind]()
    with attached(lm, f"{BLOCKS[kind]}.2") as session:
        session.edit(Steer(0, 1.0, unit="raw"))
        lm.save_pretrained(tmp_path)
    again = type(lm).from_pretrained(tmp_path)
    for module in again.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with torch.no_grad():
        torch.testing.assert_close(forward(again).logits, forward(lm).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_forward_that_stops_before_a_place_leaves_no_features_there(kind):
    lm = tiny.ALL[kind]()
    with torch.no_grad(), attached(lm, f"{BLOCKS[kind]}.2") as session:
        forward(lm)
        with partial_forward(lm, [f"{BLOCKS[kind]}.1"]) as run:
            run(input_ids=IDS[:, :4])
        with pytest.raises(HookpointError):
            _ = session.features
