"""Scopes where a stream's dimensions, or a mask's columns, could be taken for others.

Room   Sizes that collide (as many lanes as rows, as many rows as columns), tokens in one long row
       inside of experts, masks of every kind: an edit reaches the tokens it names, seen by plain
       hooks, or is refused before it reaches any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from helpers import tiny, zoo
from helpers.scopes import axes_sae, watched
from torch import Tensor, nn

from hf_switch_sae import EditError, Steer, SwitchSAEError, attach

SCOPES: dict[str, dict[str, Any]] = {
    "all": {},
    "rows": {"rows": 1},
    "positions": {"positions": [0, 2]},
    "slice": {"positions": slice(1, 5, 2)},
    "row and position": {"rows": 0, "positions": [0]},
    "prompt": {"positions": "prompt"},
    "generated": {"positions": "generated"},
}
ENTRIES = {entry.model_type: entry for entry in zoo.ENTRIES}


def batch(rows: int, columns: int, pads: list[int], side: str = "left") -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, 58, (rows, columns), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, slice(count) if side == "left" else slice(columns - count, None)] = 0
    return ids.masked_fill(mask == 0, 0), mask


def positions_of(mask: Tensor) -> Tensor:
    return torch.where(mask > 0, mask.long().cumsum(-1) - 1, -1)


def within(scope: dict[str, Any], at: Tensor, prompt: int | None = None) -> Tensor:
    """The tokens in scope, of positions [rows, columns] of which the first `prompt` are given."""
    inside, given = at >= 0, torch.arange(at.shape[1]) < (at.shape[1] if prompt is None else prompt)
    if "rows" in scope:
        inside = inside & (torch.arange(len(at)) == scope["rows"])[:, None]
    positions = scope.get("positions", "all")
    if positions in ("prompt", "generated"):
        return inside & (given if positions == "prompt" else ~given)
    if isinstance(positions, slice):
        positions = list(range(positions.start, positions.stop, positions.step))
    return inside if positions == "all" else inside & torch.isin(at, torch.tensor(positions))


def edited(
    lm: nn.Module, at: str, scope: dict[str, Any], call: Callable[[], Any], width: int = tiny.DIM
) -> list[Tensor]:
    """For each time the place ran, the tokens that were changed, in the stream's own shape.

    Raises:
        EditError: it was refused; a token was edited before that, if any, is an AssertionError.
    """
    module = lm.get_submodule(at)
    with torch.no_grad(), attach(lm, axes_sae(width), at=at, allow_mismatch=True) as session:
        session.edit(Steer([0, 3], 1.0, unit="raw", **scope))
        with watched(module) as changes:
            try:
                call()
            except EditError:
                assert not changes
                raise
    return [(change != 0).any(-1) for change in changes]


def gemma3n() -> nn.Module:
    return ENTRIES["gemma3n_text"].build()[0]


def deepseek_v4() -> nn.Module:
    return ENTRIES["deepseek_v4"].build()[0]


# Where a stream has several lanes, or its sequence first: the dimension of lanes, and the model.
LANES: dict[str, tuple[Callable[[], nn.Module], str, int | None]] = {
    "gemma3n": (gemma3n, "model.layers.1", 0),
    "deepseek_v4": (deepseek_v4, "model.layers.1", 2),
    "xlnet": (tiny.xlnet, "transformer.layer.1", None),
}
SIZES = [(4, 4, [0, 2, 1, 0]), (4, 5, [1, 0, 3, 0]), (2, 4, [1, 0]), (3, 3, [0, 1, 2])]
SIZES += [(1, 4, [2]), (4, 1, []), (1, 1, [])]


def by_lane(kind: str, tokens: Tensor) -> list[Tensor]:
    lanes = LANES[kind][2]
    return [tokens.transpose(0, 1)] if lanes is None else list(tokens.unbind(lanes))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]} rows of {size[1]}")
@pytest.mark.parametrize("kind", LANES)
def test_an_edit_reaches_its_tokens_where_sizes_collide(kind, size):
    lm, at = LANES[kind][0](), LANES[kind][1]
    ids, mask = batch(*size)
    for name, scope in SCOPES.items():
        if scope.get("rows", 0) >= len(ids):
            continue
        (tokens,) = edited(lm, at, scope, lambda: lm(input_ids=ids, attention_mask=mask))
        for lane in by_lane(kind, tokens):
            assert torch.equal(lane, within(scope, positions_of(mask))), name


@pytest.mark.parametrize("size", SIZES[:1] + SIZES[-2:], ids=lambda size: f"{size[0]} rows")
@pytest.mark.parametrize("kind", ["gemma3n", "deepseek_v4"])
def test_an_edit_in_generate_reaches_its_tokens_where_sizes_collide(kind, size):
    lm, at = LANES[kind][0](), LANES[kind][1]
    ids, mask = batch(*size)
    width = ids.shape[1]
    whole = positions_of(torch.cat([mask, torch.ones(len(ids), 2, dtype=mask.dtype)], 1))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    for name, scope in SCOPES.items():
        if scope.get("rows", 0) >= len(ids):
            continue
        steps = edited(
            lm, at, scope, lambda: lm.generate(input_ids=ids, attention_mask=mask, **options)
        )
        assert len(steps) == 3
        want = within(scope, whole, width).split([width, 1, 1], 1)
        for tokens, here in zip(steps, want, strict=True):
            for lane in by_lane(kind, tokens):
                assert torch.equal(lane, here), name


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_stream_with_its_sequence_first_may_have_as_many_rows_as_columns(half):
    lm = ENTRIES["fsmt"].build()[0]
    at = f"model.{half}.layers.1"
    width = lm.get_submodule(at).embed_dim
    ids, mask = batch(4, 4, [0, 2, 1, 0], "right")
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    given |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    for name in ("all", "rows", "positions", "slice"):
        (tokens,) = edited(lm, at, SCOPES[name], lambda: lm(**given), width)
        assert torch.equal(tokens.T, within(SCOPES[name], positions_of(mask))), name


# Experts.

MIXTURES = {
    "mixtral": "mlp",
    "qwen2_moe": "mlp",
    "olmoe": "mlp",
    "qwen3_moe": "mlp",
    "granitemoe": "block_sparse_moe",
    "glm4_moe": "mlp",
    "llama4_text": "feed_forward",
}
SHARED = {
    "qwen2_moe": "shared_expert",
    "glm4_moe": "shared_experts",
    "llama4_text": "shared_expert",
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_its_experts_and_its_shared_expert_keep_the_order_of_the_batch(kind):
    lm = ENTRIES[kind].build()[0]
    ids, mask = batch(3, 4, [0, 2, 1])
    inner = ["", ".experts" if kind != "llama4_text" else ""]
    inner += [f".{SHARED[kind]}"] if kind in SHARED else []
    for name in dict.fromkeys(inner):
        at = f"model.layers.1.{MIXTURES[kind]}{name}"
        for scope in ("all", "rows", "slice"):
            (tokens,) = edited(
                lm, at, SCOPES[scope], lambda: lm(input_ids=ids, attention_mask=mask)
            )
            want = within(SCOPES[scope], positions_of(mask))
            assert torch.equal(tokens.reshape(3, 4), want), (at, scope)


@pytest.mark.parametrize(
    ("kind", "inner", "each"),
    [
        ("mixtral", "mlp.experts.act_fn", 2),
        ("llama4_text", "feed_forward.experts", 2),
        ("jetmoe", "mlp.output_linear", 2),
        *(
            pytest.param(
                kind,
                inner,
                1,
            )
            for kind, inner in [("mixtral", "mlp.experts.act_fn"), ("jetmoe", "mlp.output_linear")]
        ),
    ],
)
def test_scopes_are_refused_where_tokens_stand_in_the_order_of_the_experts(kind, inner, each):
    config = ENTRIES[kind].build()[0].config
    config.num_experts_per_tok = each
    lm = zoo.model_class(kind)(config).eval()
    ids, mask = batch(3, 4, [0, 2, 1])
    for scope in ("rows", "slice"):
        with pytest.raises(EditError):
            edited(
                lm,
                f"model.layers.1.{inner}",
                SCOPES[scope],
                lambda: lm(input_ids=ids, attention_mask=mask),
            )


@pytest.mark.parametrize("at", ["decoder.block.1.layer.2", "encoder.block.1.layer.0"])
def test_a_sublayer_of_t5_gets_all_tokens(at):
    lm = tiny.t5()
    ids, mask = batch(3, 4, [0, 2, 1])
    given = {"input_ids": ids, "attention_mask": mask}
    given |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    for name in ("all", "rows", "positions"):
        (tokens,) = edited(lm, at, SCOPES[name], lambda: lm(**given))
        assert torch.equal(tokens, within(SCOPES[name], positions_of(mask))), name


# Masks of other kinds.

WIDTH = 6
CAUSAL = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()[None, None]
MIN = torch.finfo(torch.float32).min


def _square(mask: Tensor) -> Tensor:
    return CAUSAL & mask.bool()[:, None, None]


def _unattended(mask: Tensor) -> Tensor:
    """As SDPA needs it on some devices: a query that may look nowhere looks everywhere."""
    seen = _square(mask)
    return torch.where(seen | ~seen.any(-1, keepdim=True), 0.0, MIN)


MASKS: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda mask: mask.bool(),
    "float": lambda mask: mask.float(),
    "bfloat16": lambda mask: mask.bfloat16(),
    "uint8": lambda mask: mask.to(torch.uint8),
    "4-D bool": _square,
    "4-D bool, of each head": lambda mask: _square(mask).expand(-1, 4, -1, -1),
    "4-D float": lambda mask: torch.where(_square(mask), 0.0, MIN),
    "4-D float, less than infinite": lambda mask: torch.where(_square(mask), 0.0, -1e4),
}
NO_NAN: dict[str, Callable[[Tensor], Any]] = {
    "4-D bool, padding sees itself": lambda mask: _square(mask) | torch.eye(WIDTH).bool(),
    "4-D float, padding sees itself": lambda mask: torch.where(
        _square(mask) | torch.eye(WIDTH).bool(), 0.0, -torch.inf
    ),
    "4-D float, padding sees everything": _unattended,
}


def _assert_right(lm: nn.Module, call: Callable[[], Any], at: Tensor) -> None:
    for name in ("all", "rows", "positions", "slice"):
        (tokens,) = edited(lm, "model.layers.1", SCOPES[name], call)
        assert torch.equal(tokens, within(SCOPES[name], at)), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["by name", "by place"])
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_of_any_kind_tells_padding(kind, how, side):
    lm = tiny.llama()
    ids, mask = batch(3, WIDTH, [0, 2, 3], side)
    made = MASKS[kind](mask)
    call = (
        (lambda: lm(ids, made))
        if how == "by place"
        else (lambda: lm(input_ids=ids, attention_mask=made))
    )
    _assert_right(lm, call, positions_of(mask))


@pytest.mark.parametrize("kind", NO_NAN)
def test_a_mask_that_lets_padding_see_something_tells_padding_or_is_refused(kind):
    lm = tiny.llama()
    ids, mask = batch(3, WIDTH, [0, 2, 3])
    made = NO_NAN[kind](mask)
    for name in ("rows", "positions", "slice"):
        try:
            (tokens,) = edited(
                lm,
                "model.layers.1",
                SCOPES[name],
                lambda: lm(input_ids=ids, attention_mask=made),
            )
        except EditError:
            continue
        assert torch.equal(tokens, within(SCOPES[name], positions_of(mask))), name


@pytest.mark.parametrize("layer", [0, 1], ids=["sliding", "full"])
def test_masks_given_for_each_kind_of_attention_tell_padding(layer):
    lm = tiny.gemma3()
    ids, mask = batch(3, WIDTH, [0, 2, 3])
    sliding = _square(mask) & ~torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril(-3)
    given = {"sliding_attention": sliding, "full_attention": _square(mask)}
    for name in ("all", "rows", "positions", "slice"):
        (tokens,) = edited(
            lm,
            f"model.layers.{layer}",
            SCOPES[name],
            lambda: lm(input_ids=ids, attention_mask=given),
        )
        assert torch.equal(tokens, within(SCOPES[name], positions_of(mask))), name


@pytest.mark.parametrize("kind", ["longformer", "led", "big_bird", "longt5"])
@pytest.mark.parametrize("side", ["no mask", "no padding", "left", "right"])
def test_what_a_model_adds_to_fill_its_window_is_padding(kind, side):
    lm, inputs = ENTRIES[kind].build()
    ids, mask = batch(2, 10, {"left": [0, 4], "right": [0, 4]}.get(side, []), side)
    given = {**inputs, "input_ids": ids, "attention_mask": mask}
    if side == "no mask":
        del given["attention_mask"]
    ends = ("encoder.layers.1", "encoder.layer.1", "encoder.block.1")
    at = next(name for name, _ in lm.named_modules() if name.endswith(ends))
    for name in ("all", "rows", "positions", "slice"):
        (tokens,) = edited(lm, at, SCOPES[name], lambda: lm(**given))
        missing = tokens.shape[1] - mask.shape[1]
        real = nn.functional.pad(mask, (0, missing)) if missing > 0 else mask
        assert torch.equal(tokens, within(SCOPES[name], positions_of(real))), name


def test_a_mask_that_a_model_makes_from_the_ids_tells_padding():
    lm = ENTRIES["dpr"].build()[0]
    ids, mask = batch(2, 9, [0, 3])
    at = "question_encoder.bert_model.encoder.layer.1"
    for name in ("all", "rows", "positions", "slice"):
        (tokens,) = edited(lm, at, SCOPES[name], lambda: lm(input_ids=ids))
        assert torch.equal(tokens, within(SCOPES[name], positions_of(mask))), name


@pytest.mark.parametrize(
    "size",
    [24, 40, pytest.param(32)],
)
def test_stages_are_edited_along_their_channels_or_refused(size):
    fields = {"patch_size": 4, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}
    lm = tf.ConvNextModel(tf.ConvNextConfig(**fields)).eval()
    stage, sae = lm.encoder.stages[0], axes_sae(8)
    for scope in ({}, {"rows": 1}, {"positions": [0]}):
        with (
            torch.no_grad(),
            attach(lm, sae, at="encoder.stages.0", allow_mismatch=True) as session,
        ):
            session.edit(Steer(3, 1.0, unit="raw", **scope))
            with watched(stage) as changes:
                try:
                    lm(torch.randn(2, 3, size, size))
                except SwitchSAEError:
                    assert not changes
                    continue
        channels = (changes[0] != 0).flatten(2).any(-1).any(0)
        assert channels.nonzero().flatten().tolist() == [3], scope


def test_texts_that_only_a_mask_tells_apart_are_refused():
    lm, ids = tiny.llama(), batch(2, WIDTH, [])[0]
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()
    apart = causal & ((torch.arange(WIDTH) < 3)[:, None] == (torch.arange(WIDTH) < 3))
    with attach(lm, axes_sae(tiny.DIM), at=1, allow_mismatch=True) as session:
        for scope in ({"rows": 1}, {"positions": [0]}, {"positions": "prompt"}):
            session.edit(Steer(0, 1.0, unit="raw", **scope))
            with pytest.raises(EditError, match="may be of several texts"):
                lm(input_ids=ids, attention_mask=apart[None, None])
            lm(input_ids=ids, attention_mask=causal[None, None].expand(2, 1, -1, -1))
