"""Sessions of one model know each other, through whichever module or thread they are opened."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.runs import check, turn
from helpers.scopes import axes_sae, shown, watched
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_switch_sae import Clamp, EditError, Session, Steer, attach, detach, record, status
from hf_switch_sae.edits.kinds import Edit

INPUTS = tiny.padded(tiny.prompts(6, 4))
STEPS = {"max_new_tokens": 3, "do_sample": False}
ROW = Steer(1, 8.0, unit="raw", rows=1)
FIRST = Steer(2, 3.0, unit="raw", positions=[0])
WHOLE = Steer(3, 5.0, unit="raw")


def at(root: nn.Module, place: int | str = 2, *edits: Edit, **options: Any) -> Session:
    session = attach(root, axes_sae(32), at=place, **options)
    session.edit(*edits)
    return session


def changed(lm: PreTrainedModel, call: Callable[[], Any] | None = None) -> list[str]:
    """Which tokens are edited at layer 2."""
    with torch.no_grad(), watched(lm.model.layers[2]) as changes:
        lm(**INPUTS) if call is None else call()
    return [shown(change.abs().sum(-1) > 0.5) for change in changes]


def logits(lm: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return lm(**INPUTS).logits


@pytest.fixture(params=["model first", "part first"])
def roots(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, list[nn.Module]]:
    lm = tiny.llama()
    return lm, [lm, lm.model] if request.param == "model first" else [lm.model, lm]


def test_status_and_detach_through_either_module_see_all_sessions(roots):
    lm, both = roots
    clean = logits(lm)
    for asked in (*both, lm.model.layers):
        sessions = [at(root, place, WHOLE) for root, place in zip(both, (2, 1), strict=True)]

        assert [line.edits for line in status(asked)] == [(WHOLE,)] * 2
        assert detach(asked) == 2
        assert not any(session.attached for session in sessions)
        assert torch.equal(logits(lm), clean)
        assert tiny.traces(lm) == tiny.traces(tiny.llama())


def test_the_order_of_opening_is_no_matter(roots):
    lm, both = roots
    found = []
    for one, other in permutations([(both[0], ROW), (both[1], FIRST)]):
        sessions = [at(one[0], 2, one[1]), at(other[0], 2, other[1])]
        found.append(logits(lm))
        assert changed(lm) == ["x..... ..xxxx"]
        for session in sessions:
            session.detach()

    assert torch.equal(*found)


@pytest.mark.parametrize("first", [0, 1])
def test_who_is_left_edits_on_alone_in_any_call(roots, first):
    lm, both = roots
    sessions = [at(both[0], 2, ROW), at(both[1], 2, FIRST)]
    sessions[first].detach()

    left, steps = ("x..... ..x...", ". .") if first == 0 else ("...... ..xxxx", ". x")
    assert changed(lm) == [left]
    assert changed(lm, lambda: lm.model(**INPUTS)) == [left]
    assert changed(lm, lambda: lm.generate(**INPUTS, **STEPS)) == [left, steps, steps]
    sessions[1 - first].detach()
    assert tiny.traces(lm) == tiny.traces(tiny.llama())


def test_a_part_knows_beams_after_the_models_session_is_gone():
    lm = tiny.llama()
    with at(lm.model, 1), at(lm, 2):
        pass  # both watch what they need, and stop

    check(lm.model, "layers.2", lambda: lm.generate(**INPUTS, **STEPS, num_beams=2),
          turn(copies=2))  # fmt: skip


def test_edits_that_contradict_each_other_are_found_through_both_modules(roots):
    _, both = roots
    sae = axes_sae(32)
    with attach(both[0], sae, at=2) as one, attach(both[1], sae, at=2) as other:
        one.edit(Clamp(1, 2.0, unit="raw"))
        with pytest.raises(EditError):
            other.edit(Clamp(1, 3.0, unit="raw"))
        assert other.edits == ()
        one.detach()
        other.edit(Clamp(1, 3.0, unit="raw"))


def test_a_second_splice_is_refused_through_both_modules(roots):
    lm, both = roots
    with at(both[0], splice=True):
        with pytest.raises(EditError, match="spliced already"):
            at(both[1], splice=True)
        assert len(status(lm)) == 1
    assert tiny.traces(lm) == tiny.traces(tiny.llama())


def test_without_edits_preflight_and_record_are_without_those_of_the_other_module(roots, tmp_path):
    lm, both = roots
    clean, sae = logits(lm), tiny.sae_for(lm, 2)
    texts = INPUTS["input_ids"][:1].tolist()

    def acts(folder: str) -> float:
        store = record(lm, sae, texts, tmp_path / folder, context=16)
        return float(store.around(0, 0, context=20).features.acts.float().sum())

    unedited = acts("unedited")
    with at(both[0], 1) as one, at(both[1]) as other:
        fvu = other.preflight(INPUTS).fvu
        one.edit(WHOLE)
        with other.without_edits():
            assert torch.equal(logits(lm), clean)
        assert other.preflight(INPUTS).fvu == fvu
        assert acts("edited") == unedited
        assert not torch.equal(logits(lm), clean)


def test_without_edits_of_a_session_in_a_block_is_without_those_of_other_blocks():
    lm = tiny.llama()
    clean = logits(lm)
    with at(lm, 2, WHOLE), at(lm.model.layers[3], "mlp") as other, other.without_edits():
        assert torch.equal(logits(lm), clean)


def test_both_sessions_record_and_neither_does_without_edits(roots, tmp_path):
    lm, both = roots
    with (
        at(both[0]) as one,
        at(both[1]) as other,
        one.record(tmp_path / "a") as first,
        other.record(tmp_path / "b") as second,
    ):
        lm.generate(**INPUTS, **STEPS)
        with other.without_edits():
            lm(**INPUTS)
    assert first.num_tokens == second.num_tokens == 10 + 2 * 2


def test_a_detached_session_is_forgotten_while_another_lives(roots):
    lm, both = roots
    session, other = at(both[0], 2, ROW), at(both[1])
    lm(**INPUTS)
    session.detach()
    session = weakref.ref(session)
    gc.collect()

    assert session() is None
    other.detach()


# Threads


def in_thread(act: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join(60)
    return found[0]


def warned(act: Callable[[], Any]) -> int:
    """How often edits that are passed by are warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return sum("passed by the edits" in str(each.message) for each in caught)


def test_edits_of_another_thread_are_warned_of_once():
    lm = tiny.llama()
    session = in_thread(lambda: at(lm, 2, WHOLE))

    assert warned(lambda: [lm(**INPUTS) for _ in range(3)]) == 1
    session.edit(ROW)
    assert warned(lambda: lm.generate(**INPUTS, **STEPS)) == 0
    session.detach()
    with in_thread(lambda: at(lm.model, 2, WHOLE)):  # another one, so once more
        assert warned(lambda: lm.generate(**INPUTS, **STEPS)) == 1


def test_edits_set_after_the_first_forward_are_warned_of_then():
    lm = tiny.llama()
    with in_thread(lambda: at(lm)) as session:
        assert warned(lambda: lm(**INPUTS)) == 0
        session.edit(WHOLE)
        assert warned(lambda: lm(**INPUTS)) == 1


def test_a_splice_of_another_thread_is_warned_of():
    lm = tiny.llama()
    with at(lm, splice=True, all_threads=False):
        assert warned(lambda: in_thread(lambda: lm(**INPUTS))) == 1


@pytest.mark.parametrize("root", ["model", "part"])
def test_nobody_is_warned_where_sessions_act_or_are_muted(root):
    lm = tiny.llama()
    module = lm if root == "model" else lm.model
    with at(module, 2, WHOLE):
        assert warned(lambda: in_thread(lambda: lm(**INPUTS))) == 0  # in all threads
    with in_thread(lambda: at(module, 2, WHOLE, all_threads=True)):
        assert warned(lambda: lm(**INPUTS)) == 0
    with at(module, 2, WHOLE), in_thread(lambda: at(lm, 2, ROW)):
        assert warned(lambda: lm(**INPUTS)) == 0
    with in_thread(lambda: at(module, 2, WHOLE)) as session, session.without_edits():
        assert warned(lambda: lm(**INPUTS)) == 0


def test_a_thread_whose_own_session_acts_elsewhere_is_not_warned():
    lm = tiny.llama()
    with in_thread(lambda: at(lm, 2, WHOLE)), at(lm, 1, WHOLE):
        assert warned(lambda: lm(**INPUTS)) == 0


def test_a_session_at_two_places_is_warned_of_once():
    lm = tiny.llama()

    def open_both() -> Session:
        session = attach(lm, {1: axes_sae(32), 2: axes_sae(32)})
        for place in session.hookpoints:
            session.edit(WHOLE, at=place)
        return session

    with in_thread(open_both):
        assert warned(lambda: lm(**INPUTS)) == 1


@pytest.mark.parametrize("opened", ["in the main thread", "in the thread itself"])
def test_a_thread_that_generates_knows_rows_and_parts(opened):
    lm = tiny.llama()

    def generate() -> None:
        lm.generate(**INPUTS, **STEPS, num_beams=2)

    if opened == "in the main thread":
        check(lm, "model.layers.2", lambda: in_thread(generate), turn(copies=2))
    else:
        in_thread(lambda: check(lm, "model.layers.2", generate, turn(copies=2)) or True)


def test_a_thread_without_a_session_is_edited_by_none_that_acts_elsewhere():
    lm = tiny.llama()
    clean = logits(lm)
    with at(lm, 2, WHOLE, all_threads=False):
        with pytest.warns(UserWarning, match="passed by the edits"):
            found = in_thread(lambda: logits(lm))
        assert torch.equal(found, clean)
        assert not torch.equal(logits(lm), clean)
