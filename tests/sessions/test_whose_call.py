"""Whose tokens a forward holds is told by the call it belongs to, whoever starts that call."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from helpers import texts, tiny, zoo, zoo_more
from helpers.runs import WIDTH, between_tokens, check, refused, run, turn
from helpers.scopes import axes_sae, shown, watched
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

from hf_switch_sae import Steer, attach, find_residual_blocks

INPUTS = tiny.padded(tiny.prompts(6, 4))
STEPS = {"max_new_tokens": 3, "do_sample": False}
PATH = "model.layers.2"


class ValueHead(nn.Module):
    """As in libraries for reinforcement learning."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.lm.generate(*args, **kwargs)


class Unpacking(LlamaForCausalLM):
    def generate(self, batch: dict[str, Tensor], **kwargs: Any) -> Any:
        return super().generate(**batch, **kwargs)


def _lora(lm: PreTrainedModel) -> nn.Module:
    return get_peft_model(lm, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))


def _kept(lm: PreTrainedModel) -> tuple[nn.Module, str, Callable[..., Any]]:
    return lm, PATH, lm.generate


def _unpacking(_: PreTrainedModel) -> tuple[nn.Module, str, Callable[..., Any]]:
    lm = Unpacking(tiny.llama().config).eval()
    return lm, PATH, lambda **options: lm.generate(INPUTS, **options)


CALLERS: dict[str, Callable[[PreTrainedModel], tuple[nn.Module, str, Callable[..., Any]]]] = {
    "a value head": lambda lm: (head := ValueHead(lm), f"lm.{PATH}", head.generate),
    "a subclass": _unpacking,
    "a partial, attached inside": lambda lm: (
        lm.model,
        "layers.2",
        functools.partial(lm.generate, use_cache=True),
    ),
    "a method kept": _kept,
    "the class": lambda lm: (lm, PATH, functools.partial(type(lm).generate, lm)),
    "the mixin": lambda lm: (lm.model, "layers.2", functools.partial(GenerationMixin.generate, lm)),
    "an adapter": lambda lm: ((adapted := _lora(lm)), f"base_model.model.{PATH}", adapted.generate),
    "an adapter, attached inside": lambda lm: (lm.model, "layers.2", _lora(lm).generate),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"do_sample": False}, 1),
        ({"num_beams": 2, "num_return_sequences": 2, "do_sample": False}, 2),
        ({"num_return_sequences": 3, "do_sample": True}, 3),
        ({"num_beams": 2, "cache_implementation": "static", "do_sample": False}, 2),
    ],
    ids=["greedy", "beams", "samples", "static beams"],
)
@pytest.mark.parametrize("caller", CALLERS)
def test_generate_is_found_whoever_starts_it(caller, options, copies):
    root, path, generate = CALLERS[caller](tiny.llama())
    given = {} if caller == "a subclass" else INPUTS

    check(root, path, lambda: generate(**given, max_new_tokens=3, **options), turn(copies=copies))


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "bloom", "mamba", "mamba2", "jamba", "lfm2"])
def test_beams_of_the_outer_model_are_known_inside_it(kind):
    lm = tiny.ALL[kind]()
    path = find_residual_blocks(lm.base_model).paths[2]

    check(lm.base_model, path, lambda: lm.generate(**INPUTS, **STEPS, num_beams=2), turn(copies=2))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_decoder_alone_knows_the_generate_of_its_pair(kind):
    lm = tiny.PAIRS[kind]()
    path = "block.2" if kind == "t5" else "layers.2"
    runs = turn(width=1, pads=(0, 0), copies=2)

    check(lm.get_decoder(), path, lambda: lm.generate(**INPUTS, **STEPS, num_beams=2), runs)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_alone_reads_nothing_but_prompt(kind):
    lm = tiny.PAIRS[kind]()
    path = "block.2" if kind == "t5" else "layers.2"
    runs = [run(range(WIDTH), WIDTH)]

    check(lm.get_encoder(), path, lambda: lm.generate(**INPUTS, **STEPS, num_beams=2), runs)


def test_whispers_generate_is_known_in_its_decoder():
    lm, sound = tiny.whisper(), torch.randn(2, 8, 24)
    call = functools.partial(lm.generate, input_features=sound, num_beams=2, **STEPS)

    check(lm.model.decoder, "layers.2", call, turn(1, (0, 0), copies=2))


MODELS = {entry.model_type: entry for entry in [*zoo.ENTRIES, *zoo_more.MORE]}


@pytest.mark.parametrize(
    "kind",
    ["blip-2", "instructblip", "kosmos-2", "qwen2_vl, with an image", "llava, with an image"],
)
def test_an_inner_models_generate_counts_the_rows_of_the_outer_one(kind):
    lm, inputs = MODELS[kind].build()
    runs = turn(inputs["input_ids"].shape[1], (0, 0), copies=2)

    check(
        lm, find_residual_blocks(lm).paths[1], lambda: lm.generate(**inputs, **STEPS, num_beams=2),
        runs,
    )  # fmt: skip


def test_a_model_without_a_forward_knows_its_thinkers_generate():
    kind = "qwen2_5_omni:Qwen2_5OmniForConditionalGeneration"
    lm, inputs = MODELS[kind].build()
    options = {**STEPS, **zoo_more.GENERATE[kind]}
    runs = turn(inputs["input_ids"].shape[1], (0, 0))

    check(lm, find_residual_blocks(lm).paths[1], lambda: lm.generate(**inputs, **options), runs)


def test_texts_batched_by_a_pipeline_are_rows():
    tokenizer = texts.word_tokenizer()
    tokenizer.padding_side = "left"
    lm = tiny.llama(vocab_size=len(tokenizer))
    pipe = pipeline("text-generation", model=lm, tokenizer=tokenizer)
    words = ["the old ship", "old ship", "sea"]
    width = len(tokenizer(words[0])["input_ids"])

    check(lm, PATH, lambda: pipe(words, batch_size=3, **STEPS), turn(width, (0, 1, 2)))


class Chunking(ValueHead):
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        given = zip(input_ids[:, None], attention_mask[:, None], strict=True)
        return [self.lm.generate(ids, attention_mask=mask, **options) for ids, mask in given]


class ChunkingModel(LlamaForCausalLM):
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        given = zip(input_ids[:, None], attention_mask[:, None], strict=True)
        return [super(ChunkingModel, self).generate(ids, attention_mask=mask, **options)
                for ids, mask in given]  # fmt: skip


def loop(
    lm: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor, cache: Any = None
) -> Tensor:
    """Three steps of greedy decoding; returns the prompt and what was said."""
    said, given = input_ids, input_ids
    for _ in range(3):
        out = lm(
            input_ids=given, attention_mask=attention_mask, past_key_values=cache, use_cache=True
        )
        given, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
        said = torch.cat([said, given], 1)
    return said


class MicroBatches(LlamaForCausalLM):
    """With a loop of its own, and a local variable of a name that transformers uses too."""

    def generate(self, input_ids: Tensor, attention_mask: Tensor, batch_size: int = 1) -> Any:
        given = zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
        return [loop(self, ids, mask) for ids, mask in given]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("wrapper"),
        "model",
        pytest.param("loop"),
    ],
)
def test_a_row_is_refused_where_generate_takes_the_rows_one_by_one(how):
    config = tiny.llama().config
    lm: Any = {"wrapper": LlamaForCausalLM, "model": ChunkingModel, "loop": MicroBatches}[how]
    lm = lm(config).eval()
    root = Chunking(lm) if how == "wrapper" else lm
    options = {} if how == "loop" else STEPS

    with torch.no_grad(), attach(root, axes_sae(32), at=2) as session:
        session.edit(Steer(1, 1.0, unit="raw", rows=0))
        with watched(lm.model.layers[2]) as changes, pytest.raises(Exception, match="rows can't"):
            root.generate(**INPUTS, **options)
    assert changes == []


# Guidance and loops that the user hands to generate


def _guided(scopes: tuple[str, ...], **options: Any) -> None:
    lm = tiny.llama()
    runs = []
    for at, own in enumerate(turn()):
        runs += [own, run(range(at, at + 1), 1, (0, 0))]  # it begins with the prompt's last token
    check(lm, PATH, lambda: lm.generate(**INPUTS, **STEPS, guidance_scale=1.5, **options), runs,
          scopes)  # fmt: skip


def test_guidance_is_of_the_same_rows_with_positions_of_its_own():
    _guided(("all", "rows=1", "positions=[0]", "positions=[0, 2]", "positions=1:7:2"))


def test_what_guidance_reads_first_is_prompt():
    _guided(("prompt", "generated"))


class Sampling(LlamaForCausalLM):
    """Its `input_ids` stay the prompt, unlike those of the method that it replaces."""

    def _sample(self, input_ids: Tensor, *_: Any, **given: Any) -> Tensor:
        return loop(self, input_ids, given["attention_mask"], given["past_key_values"])


def _sample(model: PreTrainedModel, input_ids: Tensor, *_: Any, **given: Any) -> Tensor:
    return loop(model, input_ids, given["attention_mask"], given["past_key_values"])


def _by_cache(model: PreTrainedModel, input_ids: Tensor, *_: Any, **given: Any) -> Tensor:
    return loop(model, input_ids, given["attention_mask"], given["past_key_values"])


def _from_nothing(model: PreTrainedModel, input_ids: Tensor, *_: Any, **given: Any) -> Tensor:
    return loop(model, input_ids, given["attention_mask"])


@pytest.mark.parametrize(
    "how",
    [
        "with the cache of generate",
        pytest.param("with a cache of its own"),
        pytest.param("of a name of transformers"),
        pytest.param("overridden"),
    ],
)
def test_a_loop_handed_to_generate_generates_what_its_cache_grows_by(how):
    lm = Sampling(tiny.llama().config).eval() if how == "overridden" else tiny.llama()
    loops = {"with the cache of generate": _by_cache, "with a cache of its own": _from_nothing}
    options = {} if how == "overridden" else {"custom_generate": loops.get(how, _sample)}

    check(lm, PATH, lambda: lm.generate(**INPUTS, **STEPS, **options), turn())


def test_rows_that_a_loop_of_the_users_multiplies_or_splits_are_refused():
    lm = tiny.llama()

    def multiplied(model: PreTrainedModel, input_ids: Tensor, *_: Any, **given: Any) -> Any:
        return loop(model, input_ids.repeat(2, 1), given["attention_mask"].repeat(2, 1))

    def split(model: PreTrainedModel, input_ids: Tensor, *_: Any, **given: Any) -> Any:
        return [loop(model, ids[None], given["attention_mask"][:1]) for ids in input_ids]

    for custom in (multiplied, split):
        call = functools.partial(lm.generate, **INPUTS, **STEPS, custom_generate=custom)
        refused(lm, PATH, call, ["rows=1"])


# Sessions and edits that come and go within generate


@pytest.mark.parametrize("beams", [1, 2])
def test_a_session_opened_within_generate_knows_rows_and_parts(beams):
    lm, steps, changes = tiny.llama(), itertools.count(), []
    generated = Steer(1, 1.0, unit="raw", rows=1, positions="generated")

    with torch.no_grad(), ExitStack() as opened:

        def act() -> None:
            if next(steps) == 0:
                session = opened.enter_context(attach(lm, axes_sae(32), at=2))
                session.edit(generated, Steer(2, 1.0, unit="raw", positions="prompt"))
                changes.append(opened.enter_context(watched(lm.model.layers[2])))

        lm.generate(**INPUTS, **STEPS, num_beams=beams, **between_tokens(act))

    seen = [shown(change.abs().sum(-1) > 0.5) for change in changes[0]]
    assert seen == [" ".join("." * beams + "x" * beams)] * 2


def test_edits_changed_within_generate_keep_their_scopes():
    lm, steps = tiny.llama(), itertools.count()
    edits = [{"rows": 1, "positions": "generated"}, {"positions": [7]}, {"positions": "prompt"}]

    with torch.no_grad(), attach(lm, axes_sae(32), at=2) as session:

        def act() -> None:
            step = next(steps)
            edit = [Steer(1, 1.0, unit="raw", **edits[step])] if step < 3 else []
            session.edit(*edit)

        with watched(lm.model.layers[2]) as changes:
            lm.generate(**INPUTS, max_new_tokens=5, num_beams=2, **between_tokens(act))

    got = [shown(change.abs().sum(-1) > 0.5) for change in changes[1:]]
    assert got == [". . x x", "x x . .", ". . . .", ". . . ."]
