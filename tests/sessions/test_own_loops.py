"""Decoding loops of the user's own: a cache's first forward is prompt, what it grows by generated.

What ends halfway (Ctrl-C, an error) leaves nothing for the calls after it.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.runs import WIDTH, check, plain, refused, run, turn
from helpers.scopes import axes_sae, shown, watched
from helpers.streams import Tokens
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_switch_sae import EditError, Steer, attach, detach, find_residual_blocks

INPUTS = tiny.padded(tiny.prompts(6, 4))
IDS, MASK = INPUTS["input_ids"], INPUTS["attention_mask"]
STEPS = {"max_new_tokens": 3, "do_sample": False}
PATH = "model.layers.2"
PARTS = ("all", "prompt", "generated", "positions=[0, 2]", "positions=1:7:2")


def wider(mask: Tensor, by: int = 1) -> Tensor:
    return nn.functional.pad(mask, (0, by), value=1)


def loop(lm: Callable[..., Any], masked: str, cache: Any = None, name: str = "") -> None:
    """Three steps with the mask always, at the first or never."""
    name, given, mask = name or "past_key_values", IDS, MASK
    for step in range(3):
        also = {"attention_mask": mask} if masked == "always" or masked == f"at {step}" else {}
        out = lm(input_ids=given, use_cache=True, **also, **({name: cache} if cache else {}))
        cache = getattr(out, name)
        given = getattr(out, "logits", out[0][..., : tiny.VOCAB])[:, -1:].argmax(-1)
        mask = wider(mask)


@pytest.mark.parametrize("masked", ["always", "at 0"])
@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "gemma3", "mistral", "bloom", "jamba", "lfm2", "mamba", "mamba2"]
)
def test_what_a_cache_grows_by_is_generated(kind, masked):
    lm = tiny.ALL[kind]()
    name = "cache_params" if kind.startswith("mamba") else "past_key_values"
    path = find_residual_blocks(lm).paths[2]

    check(lm, path, lambda: loop(lm, masked, name=name), turn())


def test_a_loop_of_the_inner_model_is_followed_through_the_outer_one():
    lm = tiny.llama()

    check(lm, PATH, lambda: loop(lm.model, "always"), turn())
    check(lm.model, "layers.2", lambda: loop(lm, "never"), turn(pads=(0, 0)))
    static = StaticCache(config=lm.config, max_cache_len=32)
    check(lm, PATH, lambda: (static.reset(), loop(lm, "always", static)), turn())


def test_without_a_cache_everything_is_prompt():
    lm = tiny.llama()

    def call() -> None:
        for more in range(3):
            ids = nn.functional.pad(IDS, (0, more), value=7)
            lm(input_ids=ids, attention_mask=wider(MASK, more), use_cache=False)

    check(lm, PATH, call, [run(range(WIDTH + more), WIDTH + more) for more in range(3)])


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_the_halves_of_a_pair_are_followed_apart(kind, half):
    lm = tiny.PAIRS[kind]()
    stack = lm.get_encoder() if half == "encoder" else lm.get_decoder()
    block = (stack.block if kind == "t5" else stack.layers)[2]
    path = next(name for name, module in lm.named_modules() if module is block)

    def call() -> None:
        read = lm.get_encoder()(**INPUTS)
        cache, given = None, torch.tensor([[0, 5, 6], [0, 7, 8]])
        for _ in range(3):
            out = lm(
                encoder_outputs=read, attention_mask=MASK, decoder_input_ids=given,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)

    runs = [run(range(WIDTH), WIDTH)] if half == "encoder" else turn(3, (0, 0))
    check(lm, path, call, runs)


# What becomes of a cache: (the calls, their runs) each


def _reset(lm: PreTrainedModel) -> list[Tokens]:
    cache = DynamicCache()
    loop(lm, "always", cache)
    cache.reset()
    loop(lm, "never", cache)
    return [*turn(), *turn(pads=(0, 0))]


def _static_reset_to_a_shorter_text(lm: PreTrainedModel) -> list[Tokens]:
    cache = StaticCache(config=lm.config, max_cache_len=32)
    loop(lm, "always", cache)
    cache.reset()
    for columns in (4, 1):
        lm(input_ids=IDS[:, :columns], past_key_values=cache)
    return [*turn(), *turn(4, (0, 0), steps=2)]


def _cropped_into_the_prompt(lm: PreTrainedModel) -> list[Tokens]:
    cache = DynamicCache()
    lm(input_ids=IDS, past_key_values=cache)
    cache.crop(-2)
    for columns in (3, 1):
        lm(input_ids=IDS[:, :columns], past_key_values=cache)
    return [plain(2, WIDTH), *turn(7, (0, 0), steps=2, start=4)]


def _cropped_to_the_prompt(lm: PreTrainedModel) -> list[Tokens]:
    cache = DynamicCache()
    for columns in (WIDTH, 3):
        lm(input_ids=IDS[:, :columns], past_key_values=cache)
    cache.crop(-3)
    lm(input_ids=IDS[:, :2], past_key_values=cache)
    after = [run(range(6, 9), WIDTH, (0, 0)), run(range(6, 8), WIDTH, (0, 0))]
    return [plain(2, WIDTH), *after]


def _two_in_turn(lm: PreTrainedModel) -> list[Tokens]:
    caches, runs = {6: DynamicCache(), 3: DynamicCache()}, []
    for step in range(3):
        for width, cache in caches.items():
            lm(input_ids=IDS[:, :1] if step else IDS[:, :width], past_key_values=cache)
            runs.append(turn(width, (0, 0))[step])
    return runs


def _generate_then_a_forward(lm: PreTrainedModel) -> list[Tokens]:
    out = lm.generate(**INPUTS, **STEPS, return_dict_in_generate=True)
    cache = out.past_key_values
    lm(input_ids=IDS[:, :1], attention_mask=wider(MASK, 3), past_key_values=cache)
    return turn(steps=4)


def _a_forward_then_generate(lm: PreTrainedModel) -> list[Tokens]:
    cache = lm(**INPUTS, use_cache=True).past_key_values
    ids = nn.functional.pad(IDS, (0, 2), value=7)
    lm.generate(ids, attention_mask=wider(MASK, 2), past_key_values=cache, **STEPS)
    return [turn()[0], *turn(8, start=6)]


def _a_static_chat(lm: PreTrainedModel) -> list[Tokens]:
    cache = StaticCache(config=lm.config, max_cache_len=40)
    said = lm.generate(**INPUTS, past_key_values=cache, **STEPS)
    said, mask = nn.functional.pad(said, (0, 2), value=7), wider(MASK, 5)
    lm.generate(said, attention_mask=mask, past_key_values=cache, **STEPS)
    cache.reset()
    lm.generate(**INPUTS, past_key_values=cache, **STEPS)
    return [*turn(), *turn(11, start=8), *turn()]


def _a_prefix_copied_for_two_texts(lm: PreTrainedModel) -> list[Tokens]:
    prefix, runs = lm(**INPUTS, use_cache=True).past_key_values, [turn()[0]]
    for more in (3, 2):
        ids = nn.functional.pad(IDS, (0, more), value=7)
        lm.generate(ids, attention_mask=wider(MASK, more),
                    past_key_values=copy.deepcopy(prefix), **STEPS)  # fmt: skip
        runs += turn(WIDTH + more, start=WIDTH)
    return runs


FATES = [
    _reset, _static_reset_to_a_shorter_text, _cropped_into_the_prompt, _cropped_to_the_prompt,
    _two_in_turn, _generate_then_a_forward, _a_forward_then_generate, _a_static_chat,
    _a_prefix_copied_for_two_texts,
]  # fmt: skip


@pytest.mark.parametrize("fate", FATES, ids=lambda fate: fate.__name__.strip("_"))
def test_a_cache_is_followed_through(fate):
    lm = tiny.llama()
    with torch.no_grad():
        runs = fate(lm)

    check(lm, PATH, lambda: fate(lm), runs)


def test_padding_stays_padding_in_a_cache_that_was_cropped():
    lm = tiny.llama()

    def call() -> None:
        cache = lm(**INPUTS, use_cache=True).past_key_values
        cache.crop(-2)
        lm(input_ids=IDS[:, :1], past_key_values=cache)

    check(lm, PATH, call, [turn()[0], run(range(4, 5), 0)], ["positions=[0, 2]"])


@pytest.mark.parametrize("how", ["begun before", "copied", "rebuilt"])
def test_parts_are_refused_where_nobody_saw_how_a_cache_began(how):
    lm = tiny.llama()
    with torch.no_grad():
        before = lm(input_ids=IDS, use_cache=True).past_key_values

    def call() -> None:
        cache = before
        if how == "copied":
            cache = copy.deepcopy(before)
        if how == "rebuilt":
            cache = DynamicCache([(layer.keys, layer.values) for layer in before.layers])
        lm(input_ids=IDS[:, :2], past_key_values=copy.deepcopy(cache))

    refused(lm, PATH, call, ["prompt", "generated"])


# What ends halfway


class Halted(Exception):
    """An error that a hook of the test's raises."""


def halted(module: nn.Module, call: Callable[[], Any], error: type[BaseException]) -> None:
    """Run a call that ends with an error behind `module`, the second time that it runs."""
    times = []

    def halt(*_: Any) -> None:
        times.append(0)
        if len(times) == 2:
            raise error

    handle = module.register_forward_hook(halt)
    with pytest.raises(error):
        call()
    handle.remove()


@pytest.mark.parametrize("where", ["model.layers.3", "lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, Halted])
def test_what_comes_after_an_error_is_edited_as_if_nothing_had_been(error, where):
    lm = tiny.llama()

    def generate() -> None:
        lm.generate(**INPUTS, **STEPS, num_beams=2)

    def later() -> None:
        generate()
        lm(**INPUTS)

    with attach(lm, axes_sae(32), at=1):  # so that the first calls are noted
        halted(lm.get_submodule(where), generate, error)
        check(lm, PATH, later, [*turn(copies=2), turn()[0]])
        # blocks that are run by hand belong to no call
        angles = lm.model.rotary_emb(torch.zeros(2, 5, 32), torch.arange(5)[None])
        block = lm.model.layers[2]
        refused(lm, PATH, lambda: block(torch.zeros(2, 5, 32), position_embeddings=angles),
                ["rows=1", "prompt", "positions=[0]"])  # fmt: skip


@pytest.mark.parametrize("kind", ["inner model", "encoder"])
def test_a_mask_that_was_interrupted_pads_no_later_call(kind):
    lm = tiny.llama() if kind == "inner model" else tiny.t5()
    path = PATH if kind == "inner model" else "encoder.block.2"
    inner = lm.model if kind == "inner model" else lm.encoder
    last = lm.lm_head
    options = {} if kind == "inner model" else {"decoder_input_ids": IDS}

    with attach(lm, axes_sae(32), at=path):
        halted(last, lambda: [lm(**INPUTS, **options) for _ in range(2)], KeyboardInterrupt)
        check(lm, path, lambda: inner(input_ids=IDS), [plain(2, WIDTH)])


@pytest.mark.parametrize("then", ["detach", "forward"])
@pytest.mark.parametrize(
    "error",
    [
        Halted,
        pytest.param(KeyboardInterrupt),
    ],
)
def test_nothing_that_ended_halfway_is_kept(error, then):
    lm = tiny.llama()
    session: Any = attach(lm, axes_sae(32), at=2)
    given: dict[str, Any] = {"input_ids": IDS.clone(), "attention_mask": MASK.clone()}
    given["past_key_values"] = DynamicCache()
    kept = [weakref.ref(each) for each in given.values()]

    halted(lm.model.layers[3], lambda: (lm(**INPUTS), lm(**given)), error)
    given.clear()
    if then == "forward":
        lm(**INPUTS)
    else:
        session.detach()
        session = None  # it shows the last pass for as long as it lives
    gc.collect()

    assert [each() is not None for each in kept] == [False] * 3
    detach(lm)


# A forward within a forward


def aside(lm: PreTrainedModel, act: Callable[[], Any], call: Callable[[], Any]) -> None:
    """Run `act` within each forward of a call, before the blocks that the tests look at."""
    busy = []

    def within(*_: Any) -> None:
        if not busy:
            busy.append(0)
            act()
            busy.clear()

    handle = lm.model.layers[0].register_forward_hook(within)
    try:
        call()
    finally:
        handle.remove()


def test_a_forward_within_a_forward_is_a_call_of_its_own():
    lm, other = tiny.llama(), torch.stack(tiny.prompts(5, 5, 5))

    check(lm, PATH, lambda: aside(lm, lambda: lm(input_ids=other), lambda: lm(**INPUTS)),
          [plain(3, 5), turn()[0]])  # fmt: skip


def test_a_forward_of_the_inner_model_within_the_outer_one_has_no_padding():
    lm, other = tiny.llama(), torch.stack(tiny.prompts(6, 6))

    check(lm, PATH, lambda: aside(lm, lambda: lm.model(input_ids=other), lambda: lm(**INPUTS)),
          [plain(2, WIDTH), turn()[0]])  # fmt: skip


@pytest.mark.parametrize("scope", ["prompt", "rows=1"])
def test_a_forward_within_a_step_of_generate_generates_nothing(scope):
    lm, other = tiny.llama(), torch.stack(tiny.prompts(5, 5, 5))
    runs = [tokens for own in turn() for tokens in (plain(3, 5), own)]

    check(
        lm,
        PATH,
        lambda: aside(lm, lambda: lm(input_ids=other), lambda: lm.generate(**INPUTS, **STEPS)),
        runs,
        [scope],
    )


def test_an_edit_error_within_generate_leaves_the_next_one_right():
    lm = tiny.llama()
    with torch.no_grad(), attach(lm, axes_sae(32), at=2) as session:
        session.edit(Steer(1, 1.0, unit="raw", rows=5))
        with watched(lm.model.layers[2]) as changes, pytest.raises(EditError, match="names row 5"):
            lm.generate(**INPUTS, **STEPS, num_beams=2)
        assert changes == []
        session.edit(Steer(1, 1.0, unit="raw", rows=1, positions=[0]))
        with watched(lm.model.layers[2]) as changes:
            lm(**INPUTS)
    assert shown(changes[0].abs().sum(-1) > 0.5) == "...... ..x..."
