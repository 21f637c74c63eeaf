"""A judge that runs the model between two tokens is a call of its own; a draft is part of the call.

Judges are logits processors, stopping criteria, streamers; drafts come from an assistant, from the
first layers or from the text itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.runs import WIDTH, between_tokens, check, plain, run, seen_runs, turn
from helpers.streams import Tokens
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria

INPUTS = tiny.padded(tiny.prompts(6, 4))
SIDE = torch.stack(tiny.prompts(5, 5, 5, seed=8))
STEPS = {"max_new_tokens": 3, "do_sample": False}
PATH = "model.layers.2"
PARTS = ("all", "prompt", "generated", "positions=[0, 2]", "positions=1:7:2")


def _criterion(act: Callable[[], Any]) -> dict[str, Any]:
    class Judge(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            act()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    return {"stopping_criteria": [Judge()]}


def _function(act: Callable[[], Any]) -> dict[str, Any]:
    return {"logits_processor": [lambda input_ids, scores: (act(), scores)[1]]}


def _allowed(act: Callable[[], Any]) -> dict[str, Any]:
    allowed = list(range(tiny.VOCAB))
    return {"prefix_allowed_tokens_fn": lambda row, _: allowed if row else (act(), allowed)[1]}


JUDGES = {f.__name__.strip("_"): f for f in (between_tokens, _criterion, _function, _allowed)}


@pytest.mark.parametrize("asks", ["forward", "generate", "beams"])
@pytest.mark.parametrize("judge", JUDGES)
def test_a_judge_is_a_call_of_its_own(judge, asks):
    lm = tiny.llama()
    options = {"max_new_tokens": 2, "do_sample": False, "num_beams": 2 if asks == "beams" else 1}
    copies = options["num_beams"]
    aside = turn(5, (0,) * 3, copies, steps=2) if asks != "forward" else [plain(3, 5)]
    act = {"forward": lambda: lm(input_ids=SIDE)}.get(
        asks, lambda: lm.generate(input_ids=SIDE, **options)
    )

    check(
        lm, PATH, lambda: lm.generate(**INPUTS, **STEPS, **JUDGES[judge](act)),
        [tokens for own in turn() for tokens in (own, *aside)],
    )  # fmt: skip


def test_a_streamer_is_a_call_of_its_own():
    lm = tiny.llama()

    class Judge:
        def put(self, _: Tensor) -> None:
            lm(input_ids=SIDE)

        def end(self) -> None:
            lm.generate(input_ids=SIDE, **STEPS)

    first = {"input_ids": INPUTS["input_ids"][:1]}
    runs = [plain(3, 5)]  # it is handed the prompt
    for own in turn(pads=(0,)):
        runs += [own, plain(3, 5)]

    check(lm, PATH, lambda: lm.generate(**first, **STEPS, streamer=Judge()),
          [*runs, *turn(5, (0,) * 3)], PARTS)  # fmt: skip


# Drafts: they belong to the `generate` that they are for


def _draft(how: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Where the SAE is attached, and what to draft with."""
    lm, other = tiny.llama(), tiny.llama(seed=4)
    return {
        "assistant": (lm, {"assistant_model": other}),
        "in the assistant": (other, {"assistant_model": other}),
        "itself": (lm, {"assistant_model": lm}),
        "lookup": (lm, {"prompt_lookup_num_tokens": 3}),
        "early exit": (lm, {"assistant_early_exit": 3}),
        "early exit before the place": (lm, {"assistant_early_exit": 2}),
    }[how]


@pytest.mark.parametrize("inside", [False, True], ids=["model", "inner model"])
@pytest.mark.parametrize(
    "how",
    [
        "assistant",
        "in the assistant",
        "itself",
        "lookup",
        "early exit",
        "early exit before the place",
    ],
)
def test_drafts_count_on_in_the_text_they_are_for(how, inside):
    at, options = _draft(how)
    lm = at if how != "in the assistant" else tiny.llama()
    prompt = torch.cat([tiny.prompts(4)[0]] * 3)[None]
    root, path = (at.model, "layers.2") if inside else (at, PATH)

    def call() -> None:
        lm.generate(prompt, max_new_tokens=6, do_sample=False, **options)

    def check_one(scope: str) -> int:
        reached: list[Tokens] = []
        with seen_runs(at.model, 12) as runs:
            # a draft that exits early runs the model, and not this place
            block = at.model.layers[2]
            handle = block.register_forward_pre_hook(lambda *_: reached.append(runs[-1]))
            check(root, path, call, lambda index, _: [reached[index]], [scope])
            handle.remove()
        return len(reached)

    assert all(check_one(scope) > 3 for scope in PARTS[:4])


def test_an_assistants_encoder_and_decoder_know_the_pair_they_draft_for():
    lm, assistant = tiny.t5(), tiny.t5()
    ids = INPUTS["input_ids"][:1]

    def call() -> None:
        lm.generate(ids, assistant_model=assistant, max_new_tokens=6, do_sample=False)

    for scope in PARTS:
        with seen_runs(assistant.decoder, 1) as runs:
            check(assistant, "decoder.block.2", call, lambda i, _, r=runs: [r[i]], [scope])
    check(assistant, "encoder.block.2", call, [run(range(WIDTH), WIDTH, (0,))], PARTS)
