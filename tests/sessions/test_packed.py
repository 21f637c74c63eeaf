"""Texts packed into one row are rows of their own, with positions of their own.

Room   Packed by position ids that begin anew, by `cu_seq_lens`, or by continuous batching. Position
       ids that mean something else are not taken for packing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stores, tiny, zoo
from helpers.runs import check, plain, refused
from helpers.scopes import axes_sae, shown, watched
from helpers.streams import Tokens, counted
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel

from hf_switch_sae import EditError, Steer, attach, find_residual_blocks

PATH = "model.layers.2"
TEXTS = tiny.prompts(3, 4, 2)
ROW = torch.cat(TEXTS)[None]
TWO = torch.cat([ROW, ROW.flip(1)])
KEPT = ("all", "prompt", "generated", "rows=1")


class Packed(Tokens):
    """Tokens whose `row` is [B, T]: the text of each, among those of the batch."""

    def within(self, scope: str, positions: object = None) -> Tensor:
        if scope == "rows=1":
            return (self.position >= 0) & (self.row == 1)
        return super().within(scope, positions)


def ids(*rows: Sequence[int]) -> Tensor:
    """Position ids of rows that hold texts of these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


def packed(position: Tensor, real: Tensor | None = None) -> Packed:
    """The tokens of texts that begin at position 0, in the order that the batch holds them."""
    begins = position == 0 if real is None else (position == 0) & real
    text = begins.flatten().cumsum(0).view_as(position) - 1
    at = position if real is None else position.where(real, -1)
    return Packed(text, at, torch.ones_like(position, dtype=torch.bool))


def seams(*edges: int) -> dict[str, Any]:
    cu = torch.tensor(edges, dtype=torch.int32)
    longest = int(cu.diff().max())
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, **lengths}


ONE_ROW = ids([3, 4, 2])
LEFT, RIGHT = (
    torch.tensor([[1, 1, 0, 1, 2, 3, 0, 1, 2]]),
    torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0]]),
)
AFTER, BEFORE = torch.arange(9)[None] > 1, torch.arange(9)[None] < 7
BATCHES: dict[str, tuple[dict[str, Any], Tokens]] = {
    "one row": ({"input_ids": ROW, "position_ids": ONE_ROW}, packed(ONE_ROW)),
    "two rows": (
        {"input_ids": TWO, "position_ids": ids([3, 4, 2], [5, 4])},
        packed(ids([3, 4, 2], [5, 4])),
    ),
    "two rows, one of them of one text": (
        {"input_ids": TWO, "position_ids": ids([9], [3, 6])},
        packed(ids([9], [3, 6])),
    ),
    "a mask of ones": (
        {"input_ids": ROW, "position_ids": ONE_ROW, "attention_mask": torch.ones_like(ROW)},
        packed(ONE_ROW),
    ),
    "padding on the left": (
        {"input_ids": ROW, "position_ids": LEFT, "attention_mask": AFTER.long()},
        packed(LEFT, AFTER),
    ),
    "padding on the right": (
        {"input_ids": ROW, "position_ids": RIGHT, "attention_mask": BEFORE.long()},
        packed(RIGHT, BEFORE),
    ),
    "seams": (
        {"input_ids": ROW, "position_ids": ONE_ROW, **seams(0, 3, 7, 9)},
        packed(ONE_ROW),
    ),
    "seams that leave padding": (
        {"input_ids": ROW, "position_ids": RIGHT, **seams(0, 3, 7)},
        packed(RIGHT, BEFORE),
    ),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_packed_texts_are_rows_with_positions_of_their_own(kind, batch):
    lm = tiny.LM[kind]()
    inputs, tokens = BATCHES[batch]

    check(lm, find_residual_blocks(lm).paths[2], lambda: lm(**inputs), [tokens])


@pytest.mark.parametrize("how", ["inner model", "embeddings", "by place", "attached inside"])
def test_packed_texts_are_found_however_the_model_is_called(how):
    lm = tiny.llama()
    call = {
        "inner model": lambda: lm.model(input_ids=ROW, position_ids=ONE_ROW),
        "embeddings": lambda: lm(
            inputs_embeds=lm.get_input_embeddings()(ROW), position_ids=ONE_ROW
        ),
    }.get(how, lambda: lm(ROW, None, ONE_ROW))
    root, path = (lm.model, "layers.2") if how == "attached inside" else (lm, PATH)

    check(root, path, call, [packed(ONE_ROW)])


@pytest.mark.parametrize(
    "position_ids",
    [True, pytest.param(False)],
)
def test_what_the_collator_of_transformers_packs_is_told_apart(position_ids):
    lm = tiny.llama()
    collator = DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_position_ids=position_ids
    )
    batch = collator([{"input_ids": text.tolist()} for text in TEXTS])

    check(lm, PATH, lambda: lm(**batch), [packed(ONE_ROW)])


def test_padding_between_packed_texts_parts_them():
    lm = tiny.llama()
    real = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1]]).bool()
    position = torch.tensor([[0, 1, 2, 1, 1, 0, 1, 2, 3]])
    inputs = {"input_ids": ROW, "position_ids": position, "attention_mask": real.long()}

    check(lm, PATH, lambda: lm(**inputs), [packed(position, real)])


def test_a_multimodal_models_text_positions_part_its_texts():
    entry = next(entry for entry in zoo.ENTRIES if entry.model_type == "qwen2_vl")
    lm, _ = entry.build()
    text = torch.randint(4, 50, (1, 9))
    path = find_residual_blocks(lm).paths[1]

    check(lm, path, lambda: lm(input_ids=text, position_ids=ONE_ROW.expand(4, -1, -1)),
          [packed(ONE_ROW)])  # fmt: skip


@pytest.mark.parametrize("rows", [1, pytest.param(2)])
def test_a_mask_of_the_batch_is_read_by_its_own_rows_and_columns(rows):
    lm = tiny.llama()
    mask = torch.zeros(rows, 9, dtype=torch.bool)
    mask[0, 4] = mask[-1, 8] = True
    inputs: dict[str, Any] = {"input_ids": TWO[:rows]}
    if rows == 2:
        inputs["position_ids"] = ids([3, 4, 2], [5, 4])

    with torch.no_grad(), attach(lm, axes_sae(32), at=2) as session:
        session.edit(Steer(1, 1.0, unit="raw", positions=mask))
        with watched(lm.model.layers[2]) as changes:
            lm(**inputs)
    assert shown(changes[0].abs().sum(-1) > 0.5) == shown(mask)


# What is no packing


NO_PACKING: dict[str, tuple[Tensor, Tensor | None]] = {
    "all zeros": (torch.zeros(2, 9, dtype=torch.int64), None),
    "an offset": (torch.arange(5, 14).expand(2, -1), None),
    "an offset by row": (torch.stack([torch.arange(9), torch.arange(100, 109)]), None),
    "gaps": (torch.tensor([[0, 1, 2, 5, 6, 7, 10, 11, 12]]).expand(2, -1), None),
    "padding at 1": (
        torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5, 6], [*range(9)]]),
        torch.stack([torch.arange(9) > 1, torch.arange(9) > -1]),
    ),
    "padding at 0": (
        torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5, 6], [*range(9)]]),
        torch.stack([torch.arange(9) > 1, torch.arange(9) > -1]),
    ),
    "padding at 1 on the right": (
        torch.tensor([[0, 1, 2, 3, 4, 5, 6, 1, 1], [*range(9)]]),
        torch.stack([torch.arange(9) < 7, torch.arange(9) > -1]),
    ),
}


def _without_packing(how: str, scopes: Sequence[str], masked: bool) -> None:
    lm = tiny.llama()
    position, real = NO_PACKING[how]
    tokens = plain(2, 9)
    if real is not None:
        tokens = Tokens(torch.arange(2), counted(real), torch.ones(2, 9, dtype=torch.bool))
    elif masked:
        real = torch.ones(2, 9)
    also = {} if real is None else {"attention_mask": real.long()}

    check(lm, PATH, lambda: lm(input_ids=TWO, position_ids=position, **also), [tokens], scopes)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("how", NO_PACKING)
def test_other_position_ids_are_not_taken_for_packing(how, masked):
    _without_packing(how, KEPT, masked)


@pytest.mark.parametrize(
    ("how", "masked"),
    [
        *((how, True) for how in NO_PACKING),
        ("all zeros", False),
        *(pytest.param(how, False) for how in ("an offset", "an offset by row", "gaps")),
    ],
)
def test_positions_count_tokens_whatever_position_ids_say(how, masked):
    _without_packing(how, ("positions=[0]", "positions=[0, 2]", "positions=1:7:2"), masked)


@pytest.mark.parametrize(
    "position",
    [[8, 7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 3, 4, 4, 5, 5], [0, 0, 1, 1, 2, 2, 3, 3, 4]],
    ids=["backwards", "a tree of drafts", "groups"],
)
def test_position_ids_of_no_known_kind_are_refused_and_edits_without_scopes_go_on(position):
    lm = tiny.llama()
    call = functools.partial(lm, input_ids=ROW, position_ids=torch.tensor([position]))

    refused(lm, PATH, call, ["rows=1", "positions=[0]", "positions=1:7:2"])
    check(lm, PATH, call, [plain(1, 9)], ["all", "prompt", "generated"])


def test_position_ids_that_may_be_of_padding_count_no_rows():
    lm = tiny.llama()
    position = NO_PACKING["padding at 0"][0]

    with attach(lm, axes_sae(32), at=2) as session:
        session.edit(Steer(0, 1.0, unit="raw", rows=1))
        with pytest.raises(EditError, match="neither count on nor begin anew"):
            lm(input_ids=TWO, position_ids=position)


# Recorded


def recorded(lm: PreTrainedModel, folder: Path, *calls: dict[str, Any]) -> list[list[int]]:
    """The token ids of each document, whose positions count from 0."""
    with (
        torch.no_grad(),
        attach(lm, axes_sae(32), at=2) as session,
        session.record(folder) as store,
    ):
        for inputs in calls:
            lm(**inputs)
    return stores.documents(store)


@pytest.mark.parametrize("batch", BATCHES)
def test_each_packed_text_is_recorded_once_as_a_document(batch, tmp_path):
    inputs, tokens = BATCHES[batch]
    real = tokens.position >= 0
    texts = tokens.row.where(real, -1)
    want = [inputs["input_ids"][texts == text].tolist() for text in range(int(texts.max()) + 1)]

    assert recorded(tiny.llama(), tmp_path / "s", inputs, inputs) == want * 2


def test_texts_told_apart_by_seams_alone_are_documents(tmp_path):
    found = recorded(tiny.llama(), tmp_path / "s", {"input_ids": ROW, **seams(0, 3, 7, 9)})

    assert found == [text.tolist() for text in TEXTS]


def test_packed_texts_of_one_token_are_recorded_by_their_seams(tmp_path):
    seams = torch.tensor([0, 1, 2, 9], dtype=torch.int32)
    packed = {"input_ids": ROW, "position_ids": ids([1, 1, 7]), "cu_seq_lens_q": seams}
    found = recorded(tiny.llama(), tmp_path / "s", packed)

    assert [len(text) for text in found] == [1, 1, 7]


def test_other_position_ids_make_no_documents(tmp_path):
    zeros = torch.zeros(1, 9, dtype=torch.int64)
    found = recorded(tiny.llama(), tmp_path / "s", {"input_ids": ROW, "position_ids": zeros})

    assert found == [ROW[0].tolist()]


def test_features_keep_their_positions_when_the_tensor_is_used_again():
    lm = tiny.llama()
    position = ONE_ROW.clone()

    with torch.no_grad(), attach(lm, axes_sae(32), at=2) as session:
        lm(input_ids=ROW, position_ids=position, **seams(0, 3, 7, 9))
        position.zero_()  # as a batching server writes its next step
        assert torch.equal(session.features.positions, ONE_ROW)
