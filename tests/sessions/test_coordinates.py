"""Two coordinate systems: positions count a text's real tokens, a mask [rows, columns] the batch's.

Room   `session.features` know where their tokens stand, so a patch finds them again in any padding;
       `input_ids == token` marks the tokens it names, whatever generate does with the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.scopes import axes_sae, watched
from torch import Tensor, nn
from transformers import DynamicCache

from hf_switch_sae import EditError, Patch, Recipe, SparseFeatures, Steer, SwitchSAE, attach

BLOCKS = {
    "llama": "model.layers",
    "gemma3": "model.layers",
    "bloom": "transformer.h",
    "mamba": "backbone.layers",
    "xlnet": "transformer.layer",
    "lfm2": "model.layers",
    "t5": "decoder.block",
}
ROWS, COLUMNS = 3, 6
PADS = [0, 2, 3]


def batch(side: str) -> tuple[Tensor, Tensor]:
    rows = tiny.prompts(*(COLUMNS - pads for pads in PADS))
    given = tiny.padded(rows, side)
    return given["input_ids"], given["attention_mask"]


def place_of(kind: str, lm: nn.Module) -> tuple[str, nn.Module]:
    path = f"{BLOCKS[kind]}.1"
    return path, lm.get_submodule(path)


def read(lm: nn.Module, sae: SwitchSAE, at: str, ids: Tensor, mask: Tensor) -> SparseFeatures:
    with torch.no_grad(), attach(lm, sae, at=at, allow_mismatch=True) as session:
        lm(input_ids=ids, attention_mask=mask)
        return session.features


def change(
    kind: str, lm: nn.Module, sae: SwitchSAE, edit: Any, ids: Tensor, mask: Tensor
) -> Tensor:
    """What an edit adds to the stream [rows, columns, d] in a forward."""
    at, module = place_of(kind, lm)
    with torch.no_grad(), attach(lm, sae, at=at, allow_mismatch=True) as session:
        session.edit(edit)
        with watched(module) as changes:
            lm(input_ids=ids, attention_mask=mask)
    return changes[0].transpose(0, 1) if kind == "xlnet" else changes[0]


SAME: dict[str, Callable[[SparseFeatures], SparseFeatures]] = {
    "themselves": lambda f: f,
    "on the CPU": lambda f: f.cpu(),
    "detached": lambda f: f.detach(),
    "in float64": lambda f: f.to(torch.float64),
    "reshaped": lambda f: f.reshape(-1).reshape(ROWS, COLUMNS),
    "all of the strongest": lambda f: f.topk(f.k),
    "joined rows": lambda f: SparseFeatures.cat([f[:1], f[1:]]),
    "joined columns": lambda f: SparseFeatures.cat([f[:, :2], f[:, 2:]], dim=-1),
    "columns out of order": lambda f: SparseFeatures.cat([f[:, 2:], f[:, :2]], dim=1),
    "backwards": lambda f: f[:, torch.arange(COLUMNS - 1, -1, -1)],
    "some columns": lambda f: f[:, 1:5],
    "the last columns": lambda f: f[..., 2:],
    "chosen columns": lambda f: f[:, torch.tensor([True, False, True, True, False, True])],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "bloom", "mamba", "xlnet"])
def test_a_patch_with_features_of_the_same_batch_changes_nothing(kind, side):
    lm = tiny.ALL[kind]()
    sae, (ids, mask) = tiny.sae_for(lm, 1), batch(side)
    features = read(lm, sae, place_of(kind, lm)[0], ids, mask)

    for name, same in SAME.items():
        added = change(kind, lm, sae, Patch(same(features)), ids, mask)
        torch.testing.assert_close(added, torch.zeros_like(added), rtol=0, atol=5e-5, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "bloom", "mamba", "xlnet"])
def test_a_patch_of_another_row_goes_by_positions_and_not_by_columns(kind, side):
    lm = tiny.ALL[kind]()
    sae, (ids, mask) = tiny.sae_for(lm, 1), batch(side)
    features = read(lm, sae, place_of(kind, lm)[0], ids, mask)
    other = [2, 0, 1]

    added = change(kind, lm, sae, Patch(features[other]), ids, mask)

    dense = features.to_dense()
    want = torch.zeros_like(dense)
    lengths = [COLUMNS - pads for pads in PADS]
    starts = PADS if side == "left" else [0] * ROWS
    for row, source in enumerate(other):
        for at in range(min(lengths[row], lengths[source])):
            here, there = (row, starts[row] + at), (source, starts[source] + at)
            want[here] = dense[there] - dense[here]
    want = want @ sae.decoder_rows(torch.arange(dense.shape[-1]))
    torch.testing.assert_close(added, want.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "bloom", "mamba"])
def test_a_patch_goes_from_an_unpadded_run_into_a_padded_one_and_back(kind, side):
    lm = tiny.ALL[kind]()
    sae, (ids, mask) = tiny.sae_for(lm, 1), batch(side)
    at = place_of(kind, lm)[0]
    features = read(lm, sae, at, ids, mask)
    for row in range(ROWS):
        alone = ids[row][mask[row] > 0][None]
        ones = torch.ones_like(alone)

        into = change(kind, lm, sae, Patch(read(lm, sae, at, alone, ones), rows=row), ids, mask)
        back = change(kind, lm, sae, Patch(features[row]), alone, ones)

        torch.testing.assert_close(into, torch.zeros_like(into), rtol=0, atol=1e-3)
        torch.testing.assert_close(back, torch.zeros_like(back), rtol=0, atol=1e-3)


def test_features_of_generate_know_their_positions_in_each_row():
    lm, (ids, mask) = tiny.llama(), batch("left")
    sae, seen = tiny.sae_for(lm, 1), []
    with torch.no_grad(), attach(lm, sae, at=1) as session:
        session.edit()
        watch = lm.register_forward_hook(lambda *_: seen.append(session.features))
        out = lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        watch.remove()
    whole = torch.cat([mask, torch.ones(ROWS, 4, dtype=mask.dtype)], 1)

    assert [f.positions.tolist() for f in seen[1:]] == [
        [[COLUMNS - pads + step] for pads in PADS] for step in range(4)
    ]
    for source in (seen[2], SparseFeatures.cat(seen, dim=1)):
        added = change("llama", lm, sae, Patch(source), out[:, :-1], whole)
        torch.testing.assert_close(added, torch.zeros_like(added), rtol=0, atol=1e-3)


def test_a_saved_recipe_keeps_masks_and_positions(tmp_path):
    lm, (ids, mask) = tiny.llama(), batch("left")
    sae = tiny.sae_for(lm, 1)
    features = read(lm, sae, "model.layers.1", ids, mask)
    edits = (
        Patch(features[:, 2:5], rows=[0, 1]),
        Steer(5, 2.0, unit="raw", positions=ids == ids[2, 4]),
    )
    with torch.no_grad(), attach(lm, sae, at=1) as session:
        session.edit(*edits)
        session.recipe().save(tmp_path / "recipe.json")
        want = lm(input_ids=ids.roll(1, 0), attention_mask=mask.roll(1, 0)).logits
        loaded = Recipe.load(tmp_path / "recipe.json")
        session.edit(*loaded.edits)
        got = lm(input_ids=ids.roll(1, 0), attention_mask=mask.roll(1, 0)).logits

    assert loaded.edits == edits
    torch.testing.assert_close(got, want, rtol=0, atol=0)


# Masks [rows, columns] of the batch.


def steps_edited(
    kind: str, lm: nn.Module, positions: Any, call: Callable[[], Any], **scope: Any
) -> list[Tensor]:
    """For each time the place ran, which tokens [rows, columns] a steering edit changed."""
    at, module = place_of(kind, lm)
    edit = Steer(0, 1.0, unit="raw", positions=positions, **scope)
    with torch.no_grad(), attach(lm, axes_sae(tiny.DIM), at=at, allow_mismatch=True) as session:
        session.edit(edit)
        with watched(module) as changes:
            call()
    found = [change.abs().amax(-1) > 0.5 for change in changes]
    return [x.transpose(0, 1) for x in found] if kind == "xlnet" else found


def marked() -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask, and where one token of the last row stands, which another row has as well."""
    ids, mask = batch("left")
    token = ids[2, 4]
    ids[0, 1] = token
    return ids, mask, ids == token


OPTIONS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 2, "do_sample": False},
    "sequences of beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False, "do_sample": False},
}


@pytest.mark.parametrize(
    "tokens",
    [
        2,
        pytest.param(4),
    ],
)
@pytest.mark.parametrize("how", [how for how in OPTIONS if how != "no cache"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "lfm2", "t5"])
def test_a_mask_of_the_batch_marks_tokens_of_the_prompt_in_generate(kind, how, tokens):
    lm, (ids, mask, wanted) = tiny.ALL[kind](), marked()
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": tokens, **OPTIONS[how]}
    if kind == "t5":
        options |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}

    prompt, *later = steps_edited(
        kind, lm, wanted | (mask == 0), lambda: lm.generate(**options)
    )  # padding is marked as well, and is none the less no token

    assert torch.equal(prompt, wanted.repeat_interleave(len(prompt) // ROWS, 0))
    assert len(later) == tokens - 1
    assert not any(step.any() for step in later)


def test_a_mask_of_the_batch_marks_the_same_tokens_without_a_cache():
    lm, (ids, mask, wanted) = tiny.llama(), marked()
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4}

    steps = steps_edited(
        "llama", lm, wanted, lambda: lm.generate(**given, use_cache=False, do_sample=False)
    )

    assert [step.shape[1] for step in steps] == [6, 7, 8, 9]
    for step in steps:
        assert torch.equal(step[:, :COLUMNS], wanted)
        assert not step[:, COLUMNS:].any()


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize(
    "shape", [(ROWS, COLUMNS - 1), (ROWS, 1), (ROWS - 1, COLUMNS), (1, COLUMNS), (ROWS, 0)]
)
def test_a_mask_that_is_too_small_is_refused_before_anything_is_edited(shape, how):
    lm, (ids, mask, _) = tiny.llama(), marked()
    given = {"input_ids": ids, "attention_mask": mask}
    call = lm if how == "forward" else lambda **k: lm.generate(**k, max_new_tokens=3)
    wanted = torch.ones(shape, dtype=torch.bool)

    def run() -> None:
        session.edit(Steer(0, 1.0, unit="raw", positions=wanted))
        call(**given)

    session = attach(lm, axes_sae(tiny.DIM), at=1, allow_mismatch=True)
    with session, watched(lm.model.layers[1]) as changes, torch.no_grad(), pytest.raises(EditError):
        run()

    assert not changes


@pytest.mark.parametrize("form", ["tensor", "lists", "numpy", "more rows", "more columns"])
def test_a_mask_of_the_batch_may_be_written_in_any_form(form):
    lm, (ids, mask, wanted) = tiny.llama(), marked()
    given = {
        "tensor": wanted,
        "lists": wanted.tolist(),
        "numpy": wanted.numpy(),
        "more rows": torch.cat([wanted, torch.ones(2, COLUMNS, dtype=torch.bool)]),
        "more columns": torch.cat([wanted, torch.ones(ROWS, 2, dtype=torch.bool)], 1),
    }[form]

    (edited,) = steps_edited(
        "llama", lm, given, lambda: lm(input_ids=ids, attention_mask=mask), rows=[0, 2]
    )

    assert torch.equal(edited, wanted & torch.tensor([True, False, True])[:, None])


@pytest.mark.parametrize(("rows", "fits"), [(1, True), (2, False), (3, True), (4, True)])
def test_a_patch_of_too_few_rows_is_refused(rows, fits):
    lm, (ids, mask, _) = tiny.llama(), marked()
    sae = tiny.sae_for(lm, 1)
    features = read(lm, sae, "model.layers.1", ids, mask)
    source = SparseFeatures.cat([features, features])[:rows]
    if fits:
        assert change("llama", lm, sae, Patch(source), ids, mask).shape[0] == ROWS
    else:
        with pytest.raises(EditError, match="the patch has 2 rows, but this batch has 3"):
            change("llama", lm, sae, Patch(source), ids, mask)


def _rows_repeated(cache: DynamicCache) -> list[int]:
    cache.batch_repeat_interleave(2)
    return [2, 2, 5, 5]


def _one_row_left(cache: DynamicCache) -> list[int]:
    cache.batch_select_indices(torch.tensor([0]))
    return [2]


def _cropped(cache: DynamicCache) -> list[int]:
    cache.crop(-1)
    return [1, 4]


@pytest.mark.parametrize("changed", [_rows_repeated, _one_row_left, _cropped])
def test_positions_after_a_cache_was_changed_are_right_or_refused(changed):
    lm = tiny.llama()
    given, cache = tiny.padded(tiny.prompts(2, 5)), DynamicCache(config=lm.config)
    with torch.no_grad(), attach(lm, axes_sae(tiny.DIM), at=1, allow_mismatch=True) as session:
        lm(**given, past_key_values=cache)
        positions = changed(cache)
        session.edit(Steer(0, 1.0, unit="raw", positions=positions[0]))
        token = torch.full((len(positions), 1), 7)
        with watched(lm.model.layers[1]) as changes:
            try:
                lm(token, past_key_values=cache)
            except EditError:
                return
    edited = changes[0].abs().amax(-1) > 0.5
    assert edited[:, 0].tolist() == [at == positions[0] for at in positions]
