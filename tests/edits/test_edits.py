"""Edits as objects: what they accept, how they are written down, which contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_switch_sae import Ablate, Clamp, EditError, Patch, Recipe, Scale, SparseFeatures, Steer
from hf_switch_sae.edits.conflicts import check_conflicts
from hf_switch_sae.edits.deltas import PreparedEdits
from hf_switch_sae.edits.kinds import Edit, edit_from_dict
from hf_switch_sae.lm.positions import Tokens

SAE = tiny.sae_for(tiny.llama(), at=2, num_features=16, num_experts=2)


def tokens(batch: int = 2, length: int = 6, prompt: int = 4) -> Tokens:
    position = torch.arange(length).expand(batch, -1).clone()
    position[-1] -= 2  # the last row has two tokens of padding
    position[position < 0] = -1
    given = torch.arange(length).expand(batch, -1) < prompt
    return Tokens.at(position, given, torch.arange(batch))


# What is accepted

finite = st.floats(-1e6, 1e6, allow_nan=False)
feature_ids = st.lists(st.integers(0, 15), min_size=1, max_size=4)
positions = st.one_of(
    st.sampled_from(["all", "prompt", "generated"]),
    st.integers(0, 40),
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.builds(
        slice,
        st.none() | st.integers(0, 9),
        st.none() | st.integers(0, 40),
        st.none() | st.integers(1, 5),
    ),
    st.lists(st.booleans(), min_size=1, max_size=6).map(torch.tensor),
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=3).map(
        torch.tensor
    ),
)
scope = {
    "rows": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3),
    "positions": positions,
    "when": st.none() | st.integers(0, 15) | st.tuples(st.integers(0, 15), finite),
}
units = st.sampled_from(["max", "norm", "raw"])
amounts = st.one_of(finite, st.integers(-9, 9))


@st.composite
def sources(draw: Callable[..., Any]) -> SparseFeatures:
    shape = draw(st.sampled_from([(3, 2), (1, 3, 2), (2, 1, 4)]))
    size = int(np.prod(shape))
    acts = draw(st.lists(st.floats(0, 100, width=32), min_size=size, max_size=size))
    ids = draw(st.lists(st.integers(0, 15), min_size=size, max_size=size))
    return SparseFeatures(torch.tensor(acts).reshape(shape), torch.tensor(ids).reshape(shape), 16)


edits = st.one_of(
    st.builds(Steer, features=feature_ids, strength=amounts, unit=units, **scope),
    st.builds(Scale, features=feature_ids, factor=amounts, **scope),
    st.builds(Ablate, features=feature_ids, **scope),
    st.builds(Clamp, features=feature_ids, value=amounts, unit=units, **scope),
    st.builds(Patch, source=sources(), features=st.none() | feature_ids, **scope),
)


@given(edits)
def test_an_edit_read_back_from_json_is_the_edit_and_does_the_same(edit):
    again = edit_from_dict(json.loads(json.dumps(edit.to_dict())))

    assert again == edit
    assert hash(again) == hash(edit)
    assert type(again) is type(edit)
    features, where = random_features(), tokens(10, 6)
    for one, other in zip(delta(edit, features, where), delta(again, features, where), strict=True):
        assert isinstance(one, str) or torch.equal(one, other)


def random_features() -> SparseFeatures:
    generator = torch.Generator().manual_seed(4)
    acts = torch.rand(10, 6, 4, generator=generator)
    return SparseFeatures(acts, torch.randint(16, (10, 6, 4), generator=generator), 16)


def delta(edit: Edit, features: SparseFeatures, where: Tokens) -> tuple[Any, ...]:
    try:
        return PreparedEdits(SAE, [edit]).delta(features, where)
    except EditError as err:  # rows that this batch does not have
        return (str(err),)


@given(edits, edits)
def test_edits_are_equal_only_if_they_are_written_alike(one, other):
    assert (one == other) == (one.to_dict() == other.to_dict())


@given(st.lists(edits, max_size=3))
def test_a_recipe_is_the_same_after_saving(tmp_path_factory, some):
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    recipe = Recipe("org/sae", tuple(some), revision="abc", hookpoint="layers.2.resid_post")

    recipe.save(path)

    assert Recipe.load(path) == recipe
    assert recipe.diff(Recipe.load(path)) == []
    assert [file.name for file in path.parent.iterdir()] == ["recipe.json"]


def test_a_recipe_diff_names_what_is_only_here_and_only_there():
    one = Recipe("org/a", (Steer(1, 2.0), Ablate(3)))
    other = Recipe("org/b", (Ablate(3), Scale(4, 2.0)), hookpoint="layers.1.resid_post")
    assert one.diff(other) == [
        "- sae: org/a",
        '- {"edit": "Steer", "features": [1], "strength": 2.0}',
        "+ sae: org/b",
        "+ hookpoint: layers.1.resid_post",
        '+ {"edit": "Scale", "features": [4], "factor": 2.0}',
    ]


def test_a_session_gives_its_edits_as_a_recipe(tmp_path):
    lm = tiny.llama()
    with tiny.sae_for(lm).attach(lm) as session:
        session.edit(Steer(5, 2), Clamp([3], 1.0, positions="prompt"))
        session.recipe().save(tmp_path / "recipe.json")
        read = Recipe.load(tmp_path / "recipe.json")
        assert read.hookpoint == "layers.2.resid_post"
        live = lm(torch.tensor([[5, 6, 7]])).logits
        session.edit(*read.edits)
        assert torch.equal(lm(torch.tensor([[5, 6, 7]])).logits, live)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"sae": "a"}',
        '{"sae": "a", "edits": 3}',
        '{"sae": "a", "edits": ["Steer"]}',
        '{"sae": "a", "edits": [{"edit": "Steer"}]}',
        '{"sae": "a", "edits": [{"edit": "Zap", "features": 1}]}',
        '{"sae": "a", "edits": [{"edit": "Steer", "features": 1, "power": 2}]}',
        '{"sae": "a", "edits": [{"edit": "Steer", "features": 1, "positions": {"slice": [1]}}]}',
        '{"sae": "a", "edits": [{"edit": "Steer", "features": 1, "positions": {"mask": "x"}}]}',
        '{"sae": "a", "edits": [{"edit": "Patch", "source": {"acts": [[1.0]], "ids": [[1, 2]]}}]}',
        '{"sae": "a", "edits": [{"edit": "Patch", "source": 3}]}',
        '{"sae": "a", "edits": [], "color": "red"}',
    ],
)
def test_what_is_not_a_recipe_is_an_edit_error(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(EditError):
        Recipe.load(path)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "nan": (lambda: Steer(1, float("nan")), "strength must be a finite number; got nan"),
    "infinite": (lambda: Clamp(1, float("inf")), "value must be a finite number"),
    "text": (lambda: Scale(1, "2"), "factor must be a finite number; got '2'"),
    "wide tensor": (lambda: Steer(1, torch.ones(2)), r"one number; got a tensor of shape \[2\]"),
    "unit": (lambda: Steer(1, 2, unit="sigma"), "unit is 'max', 'norm' or 'raw'; got 'sigma'"),
    "no feature": (lambda: Steer([]), r"features takes an int or several; got \[\]"),
    "half a feature": (lambda: Ablate(1.5), "features takes an int or several; got 1.5"),
    "a flag": (lambda: Ablate(True), r"features .* of a mask, give mask.nonzero\(\); got True"),
    "more than 64 bits": (lambda: Steer(10**30), "counted in 64 bits; got 10+"),
    "a word": (lambda: Ablate("12"), "features takes an int or several; got '12'"),
    "negative position": (lambda: Steer(1, positions=-1), "positions count from 0; got -1"),
    "negative positions": (lambda: Steer(1, positions=[3, -2]), "positions count from 0; got -2"),
    "slice from the end": (lambda: Steer(1, positions=slice(-3, None)), "can't count from the end"),
    "slice backwards": (lambda: Steer(1, positions=slice(None, None, -1)), "can't count from the"),
    "named wrongly": (lambda: Steer(1, positions="prompts"), "got 'prompts'"),
    "3-D mask": (
        lambda: Steer(1, positions=torch.ones(1, 1, 1, dtype=torch.bool)),
        r"mask is \[positions\] or \[rows, columns\]; got \[1, 1, 1\]",
    ),
    "negative row": (lambda: Steer(1, rows=-1), "rows count from 0; got -1"),
    "when a word": (
        lambda: Steer(1, when="3"),
        "when is a feature, or .*got '3'|when takes an int",
    ),
    "when too long": (lambda: Steer(1, when=(1, 2, 3)), r"when is a feature, or .*got \(1, 2, 3\)"),
    "when nan": (lambda: Steer(1, when=(1, float("nan"))), "when is a feature, or"),
    "patch of a tensor": (lambda: Patch(torch.ones(3, 2)), "Patch takes the SparseFeatures"),
    "patch of one token": (
        lambda: Patch(SparseFeatures(torch.ones(2), torch.zeros(2, dtype=torch.int64), 16)),
        "Patch takes the SparseFeatures",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_edit_that_means_nothing_is_refused_when_it_is_built(case):
    build, message = WRONG[case]
    with pytest.raises(EditError, match=message):
        build()


def test_numbers_of_numpy_and_torch_are_numbers():
    want = Steer([1, 2], 3.0, rows=[1], positions=[4], when=(5, 1.0))
    got = Steer(
        np.array([1, 2]),
        np.float32(3),
        rows=np.int64(1),
        positions=torch.tensor([4]),
        when=[5, np.float64(1)],
    )
    assert got == want
    assert json.dumps(got.to_dict()) == json.dumps(want.to_dict())
    assert Steer(torch.tensor(3)) == Steer(np.int32(3)) == Steer(range(3, 4))


MASKS: dict[str, Callable[[list[Any]], Any]] = {
    "list": lambda mask: mask,
    "tuple": tuple,
    "numpy": np.array,
    "numpy's own truth values": lambda mask: list(np.array(mask)),
    "numpy objects": lambda mask: np.array(mask, object),
    "torch": torch.tensor,
    "tensors": lambda mask: [torch.tensor(each) for each in mask],
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    "mask", [[False, False, True], [True], [[True, False], [False, True], [True, True]]]
)
def test_positions_given_as_truth_values_are_a_mask(mask, kind):
    edit = Clamp(3, 2.0, positions=MASKS[kind](mask))

    assert isinstance(edit.positions, Tensor)
    assert edit.positions.dtype == torch.bool
    assert edit.positions.tolist() == mask
    assert edit == edit_from_dict(json.loads(json.dumps(edit.to_dict())))


def test_a_mask_edits_the_same_tokens_whatever_holds_it():
    mask = [False, False, True, True]
    wanted = change(Scale(3, 2.0, positions=[2, 3]))
    for kind, made in MASKS.items():
        assert torch.equal(change(Scale(3, 2.0, positions=made(mask))), wanted), kind


@pytest.mark.parametrize(
    "wrong",
    [
        [True, 2, False],
        (0, True),
        [torch.tensor(True), torch.tensor(3)],
        [[True, False], [1, 0]],
        [[True, False], [True]],
        [[[True]]],
        True,
        np.False_,
        slice(True, 4),
        slice(None, None, np.True_),
        slice(0.5, 2),
    ],
    ids=str,
)
def test_positions_that_are_neither_ints_nor_a_mask_are_refused(wrong):
    with pytest.raises(EditError, match="positions"):
        Scale(3, 2.0, positions=wrong)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    "build",
    [
        Ablate,
        lambda mask: Scale(mask, 2.0),
        lambda mask: Clamp(4, rows=mask),
        lambda mask: Steer(4, when=mask),
        lambda mask: Steer(4, when=(mask, 0.5)),
        lambda mask: Patch(code((3, 1.0)), features=mask),
    ],
    ids=["features", "features of Scale", "rows", "when", "when, a pair", "Patch"],
)
def test_truth_values_are_never_features_or_rows(build, kind):
    for mask in ([False, True, False, True], [True]):
        with pytest.raises(EditError, match="got"):
            build(MASKS[kind](mask))


@pytest.mark.parametrize("mixed", [[True, 3], (2, False), np.array([True, 5], object)], ids=str)
def test_a_truth_value_among_numbers_is_refused(mixed):
    for build in (Ablate, lambda value: Clamp(4, rows=value), lambda value: Steer(4, when=value)):
        with pytest.raises(EditError, match="got"):
            build(mixed)


def test_what_nonzero_gives_names_features_and_rows():
    mask = [False, True, False, True]
    for wanted in (torch.tensor(mask).nonzero(), np.array(mask).nonzero()):
        assert Ablate(wanted, rows=wanted) == Ablate([1, 3], rows=[1, 3])
    with pytest.raises(EditError, match="takes an int or several"):
        Ablate(torch.tensor([mask, mask]).nonzero())  # pairs of a row and a position


def test_an_edit_can_not_be_changed():
    with pytest.raises(AttributeError):
        Steer(1).strength = 2.0


# What they do

FULL = torch.arange(16)


def code(*pairs: tuple[int, float]) -> SparseFeatures:
    """Two rows of six tokens, all with these features."""
    padded = [*pairs, *[(0, 0.0)] * (4 - len(pairs))]
    ids = torch.tensor([pair[0] for pair in padded]).expand(2, 6, 4)
    return SparseFeatures(torch.tensor([pair[1] for pair in padded]).expand(2, 6, 4), ids, 16)


def change(*some: Edit, features: SparseFeatures | None = None) -> Tensor:
    """[2, 6, 16]: how much of each feature's decoder row was added."""
    found, _ = PreparedEdits(SAE, some).delta(features or code((3, 2.0), (9, 0.5)), tokens())
    rows = SAE.W_dec.detach().flatten(0, 1)
    return torch.linalg.lstsq(rows.T.expand(2, 6, -1, -1), found[..., None]).solution[..., 0]


def at(feature: int, amount: float, where: Tensor | None = None) -> Tensor:
    full = torch.zeros(2, 6, 16)
    full[..., feature] = amount
    real = tokens().real
    return full * (real if where is None else real & where)[..., None]


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want, atol=1e-4, rtol=1e-4)


def test_each_edit_adds_what_its_formula_says():
    same(change(Steer(5, 2.0, unit="raw")), at(5, 2.0))
    same(change(Scale(3, 4.0)), at(3, 6.0))
    same(change(Scale(4, 4.0)), at(3, 0.0))  # not active: nothing to scale
    same(change(Ablate([3, 4])), at(3, -2.0))
    same(change(Clamp([3], 5.0, unit="raw")), at(3, 3.0))
    same(change(Clamp(12, 5.0, unit="raw")), at(12, 5.0))  # of an expert that is not routed
    same(change(Clamp(5, 2.0)), at(5, 2.0 * float(SAE.feature_max[5])))
    same(change(Steer(5, 1.0, unit="raw"), Scale(3, 2.0)), at(5, 1.0) + at(3, 2.0))


def test_scopes_are_met_together():
    position = tokens().position
    prompt = tokens().prompt
    first = torch.tensor([[True], [False]])
    same(change(Scale(3, 2.0, rows=0)), at(3, 2.0, first))
    same(change(Scale(3, 2.0, positions="prompt")), at(3, 2.0, prompt))
    same(change(Scale(3, 2.0, positions="generated", rows=0)), at(3, 2.0, ~prompt & first))
    same(change(Scale(3, 2.0, positions=slice(1, 3))), at(3, 2.0, (position > 0) & (position < 3)))
    same(change(Scale(3, 2.0, when=9)), at(3, 2.0))
    same(change(Scale(3, 2.0, when=(9, 0.5))), at(3, 0.0))  # at least means above
    same(change(Scale(3, 2.0, when=4)), at(3, 0.0))
    # a mask without rows is in positions, one with rows in the batch's columns
    in_positions = torch.isin(position, torch.tensor([0, 2]))
    same(change(Scale(3, 2.0, positions=[True, False, True])), at(3, 2.0, in_positions))
    in_batch = torch.tensor([[1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]]).bool()
    same(change(Scale(3, 2.0, positions=in_batch)), at(3, 2.0, in_batch))


def test_a_patch_reaches_as_far_as_its_source():
    short = code((3, 1.0))[0, :2]  # two positions, one row for all
    same(change(Patch(short, features=3)), at(3, -1.0, tokens().position < 2))
    whole = at(3, -1.0, tokens().position < 2) + at(9, -0.5, tokens().position < 2)
    same(change(Patch(short)), whole)


def test_edits_add_up_in_any_order():
    some = [Steer(5, 1.0, unit="raw"), Scale(3, 2.0), Clamp([8, 9], 1.0, unit="raw"), Ablate(1)]
    forward, backward = change(*some), change(*some[::-1])
    same(forward, backward.detach())
    same(forward, sum(change(edit) for edit in some).detach())


# What contradicts what

APART: list[tuple[Edit, Edit]] = [
    (Clamp(1, 1.0), Steer(1, 1.0)),
    (Clamp(1, 1.0), Scale(2, 1.0)),
    (Clamp(1, 1.0, rows=0), Ablate(1, rows=[1, 2])),
    (Clamp(1, 1.0, positions="prompt"), Ablate(1, positions="generated")),
    (Clamp(1, 1.0, positions=[1, 3]), Ablate(1, positions=[0, 2])),
    (Clamp(1, 1.0, positions=slice(0, 4)), Ablate(1, positions=slice(4, None))),
    (Clamp(1, 1.0, positions=slice(0, None, 2)), Ablate(1, positions=slice(1, 9, 2))),
    (Clamp(1, 1.0, positions=slice(3, 5)), Ablate(1, positions=2)),
    (Patch(code((1, 1.0)), features=[1]), Scale(2, 1.0)),
]
TOGETHER: list[tuple[Edit, Edit]] = [
    (Clamp(1, 1.0), Ablate([0, 1])),
    (Scale(1, 1.0), Scale(1, 1.0)),
    (Clamp(1, 1.0, rows=[0, 1]), Ablate(1, rows=1)),
    (Clamp(1, 1.0, positions="prompt"), Ablate(1, positions="all")),
    (Clamp(1, 1.0, positions="prompt"), Ablate(1, positions=[3])),
    (Clamp(1, 1.0, positions=[1, 3]), Ablate(1, positions=slice(3, None))),
    (Clamp(1, 1.0, positions=slice(0, None, 2)), Ablate(1, positions=slice(4, None))),
    (Clamp(1, 1.0, when=3), Ablate(1, when=4)),
    (Patch(code((1, 1.0))), Scale(2, 1.0)),
    (Patch(code((1, 1.0)), features=[1]), Scale(1, 1.0)),
    (Clamp(1, 1.0, positions=torch.tensor([True])), Ablate(1, positions=5)),
]


@pytest.mark.parametrize("pair", APART, ids=str)
def test_edits_of_other_features_or_tokens_go_together(pair):
    check_conflicts(pair)
    check_conflicts(pair[::-1])


@pytest.mark.parametrize("pair", TOGETHER, ids=str)
def test_two_edits_that_may_set_one_feature_on_one_token_contradict(pair):
    for order in (pair, pair[::-1]):
        with pytest.raises(EditError, match="set by both"):
            check_conflicts(order)


@given(st.lists(edits, min_size=2, max_size=4))
def test_a_contradiction_does_not_depend_on_the_order(some):
    def refused(order: list[Edit]) -> bool:
        try:
            check_conflicts(order)
        except EditError:
            return True
        return False

    assert refused(some) == refused(some[::-1])


def test_open_slices_that_never_meet_are_no_conflict_and_are_told_at_once():
    even, odd = slice(0, None, 2), slice(1, None, 2)
    check_conflicts([Scale(1, 2.0, positions=even), Ablate(1, positions=odd)])
    with pytest.raises(EditError, match="feature 1 is set by both"):
        check_conflicts([Scale(1, 2.0, positions=even), Ablate(1, positions=slice(999, None, 3))])
