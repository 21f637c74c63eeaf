"""An edit in `generate` is the same edit computed without a cache, without padding and without us.

The oracle runs each row alone and anew for every token, with a plain torch hook that adds
(wanted - acts) @ W_dec, where `acts` are dense and `wanted` is written by hand next to each edit.
Where a row can't be run alone (beams, sampling), the same hook runs in `generate(use_cache=False)`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import tiny, zoo
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
)

from hf_switch_sae import (
    Ablate,
    Clamp,
    EditError,
    Patch,
    Scale,
    SparseFeatures,
    Steer,
    SwitchSAE,
    SwitchSAEConfig,
    attach,
    hook_residual,
)
from hf_switch_sae.edits.kinds import Edit

STEPS, F = 7, 16
SAE = {"num_features": F, "num_experts": 2, "k": 4}
Formula = Callable[[Tensor, int, int, SwitchSAE], Tensor]
"""(acts [T, F], prompt tokens, row, sae) -> the acts wanted; a token's position is its index."""


def dense_acts(sae: SwitchSAE, x: Tensor) -> Tensor:
    """x [T, d] -> [T, F], by the formula at the top of model.py with input_scale 1."""
    probs = ((x - sae.b_router) @ sae.router.weight.T).softmax(-1)
    expert = probs.argmax(-1)
    acts = ((x - sae.b_dec)[:, None] * sae.W_enc[expert]).sum(-1).relu()
    acts = acts * probs.gather(1, expert[:, None])
    top = acts.topk(sae.config.k)
    dense = torch.zeros(len(x), *sae.W_enc.shape[:2]).to(x)
    dense[torch.arange(len(x)), expert] = torch.zeros_like(acts).scatter(1, top.indices, top.values)
    return dense.flatten(1)


def edited(sae: SwitchSAE, x: Tensor, formula: Formula, prompt: int, row: int) -> Tensor:
    """x [T, d] of one row without padding -> the stream after the edit."""
    acts = dense_acts(sae, x)
    return x + (formula(acts.clone(), prompt, row, sae) - acts) @ sae.W_dec.flatten(0, 1)


@contextmanager
def plain_hook(lm: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A torch hook of the test's own on the stream [B, T, d] that a block returns."""

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        return change(out) if isinstance(out, Tensor) else (change(out[0]), *out[1:])

    handle = lm.get_submodule(path).register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Expected:
    tokens: Tensor
    logits: Tensor


@torch.no_grad()
def alone(
    lm: nn.Module, sae: SwitchSAE, path: str, ids: Tensor, formula: Formula, row: int = 0
) -> Expected:
    """Greedy decoding of one row, all of it anew for each token."""
    prompt, logits = len(ids), []
    with plain_hook(lm, path, lambda x: edited(sae, x[0], formula, prompt, row)[None]):
        for _ in range(STEPS):
            logits.append(lm(input_ids=ids[None], use_cache=False).logits[0, -1])
            ids = torch.cat([ids, logits[-1].argmax()[None]])
    return Expected(ids[prompt:], torch.stack(logits))


def unedited(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    return acts


def check(
    lm: nn.Module,
    sae: SwitchSAE,
    rows: list[Tensor],
    edits: list[Edit],
    formula: Formula,
    *,
    at: str | None = None,
    moved_rows: set[int] | None = None,
    **options: Any,
) -> None:
    """Generate for the rows together, left padded, and compare with each of them alone."""
    path = at or sae.config.hookpoint.replace("layers", blocks_path(lm)).removesuffix(".resid_post")
    want = [alone(lm, sae, path, ids, formula, row) for row, ids in enumerate(rows)]
    plain = [alone(lm, sae, path, ids, unedited, row) for row, ids in enumerate(rows)]
    for row in moved_rows if moved_rows is not None else range(len(rows)):
        assert (want[row].logits - plain[row].logits).abs().max() > 0.05, "the edit does nothing"
    with sae.attach(lm, at=at) as session:
        session.edit(*edits)
        got = generate(lm, rows, **options)
    for row, expected in enumerate(want):
        assert got.sequences[row, -STEPS:].tolist() == expected.tokens.tolist()
        logits = torch.stack([step[row] for step in got.logits])
        torch.testing.assert_close(logits, expected.logits, atol=2e-4, rtol=1e-4)


def generate(lm: nn.Module, rows: list[Tensor], **options: Any) -> Any:
    fixed = {"max_new_tokens": STEPS, "do_sample": False}
    given = tiny.padded(rows) if "inputs_embeds" not in options else {}
    outputs = {"return_dict_in_generate": True, "output_logits": True}
    return lm.generate(**{**given, **fixed, **outputs, **options})


def blocks_path(lm: nn.Module) -> str:
    names = [name for name, module in lm.named_modules() if isinstance(module, nn.ModuleList)]
    return next(n for n in names if n.split(".")[-1] in ("layers", "h", "block", "layer"))


SOURCE = SparseFeatures(
    torch.rand(10, 4, generator=torch.Generator().manual_seed(7)) * 6,
    torch.stack(
        [torch.randperm(F, generator=torch.Generator().manual_seed(i))[:4] for i in range(10)]
    ),
    F,
)
MASK = torch.arange(14) % 4 == 1


def steer(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, 5] += 12
    return acts


def steer_max(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, 5] += 9 * sae.feature_max[5]
    acts[:, 12] += 9 * sae.feature_max[12]
    return acts


def steer_norm(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, 5] += 3 * sae.residual_norm / sae.W_dec.flatten(0, 1)[5].norm()
    return acts


def steer_when(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, 5] += 12 * (acts[:, 3] > 0.5)
    return acts


def steer_when_active(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, 5] += 12 * (acts[:, 3] > 0)
    return acts


def scale(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, :12] *= -4
    return acts


def ablate(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, ::2] = 0
    return acts


def clamp(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, 3] = acts[:, 11] = 8
    return acts


def patch(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:10] = SOURCE.to_dense()[: len(acts)]
    return acts


def patch_some(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:10, 4:9] = SOURCE.to_dense()[: len(acts), 4:9]
    return acts


def two_rows(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, {0: 5, 1: 9}[row]] += 12
    return acts


def one_row(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:, 5] += 12 * (row == 1)
    return acts


def on_prompt(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:prompt, 5] += 12
    return acts


def on_generated(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[prompt:, 5] += 12
    return acts


def on_slice(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[2:11:3, 5] += 12
    return acts


def on_ints(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    for at in (0, 4, 9):
        acts[at : at + 1, 5] += 12
    return acts


def on_mask(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    acts[:14][MASK[: len(acts)], 5] += 12
    return acts


def several(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
    wanted = acts.clone()
    wanted[:, 5] += 12
    wanted[:, 5] += 3
    wanted[:, 3] = 8
    wanted[prompt:, 8:] *= 2
    return wanted


def raw(feature: Any = 5, strength: float = 12.0, **scope: Any) -> Steer:
    return Steer(feature, strength, unit="raw", **scope)


CASES: dict[str, tuple[list[Edit], Formula]] = {
    "steer": ([raw()], steer),
    "steer in maxima": ([Steer([5, 12], 9)], steer_max),
    "steer in norms": ([Steer(5, 3, unit="norm")], steer_norm),
    "steer when above": ([raw(when=(3, 0.5))], steer_when),
    "steer when active": ([raw(when=3)], steer_when_active),
    "scale": ([Scale(range(12), -4)], scale),
    "ablate": ([Ablate(range(0, F, 2))], ablate),
    "clamp": ([Clamp([3, 11], 8, unit="raw")], clamp),
    "patch": ([Patch(SOURCE)], patch),
    "patch of some": ([Patch(SOURCE, features=range(4, 9))], patch_some),
    "rows": ([raw(5, rows=0), raw(9, rows=[1])], two_rows),
    "prompt": ([raw(positions="prompt")], on_prompt),
    "generated": ([raw(positions="generated")], on_generated),
    "slice": ([raw(positions=slice(2, 11, 3))], on_slice),
    "ints": ([raw(positions=[0, 4, 9])], on_ints),
    "mask": ([raw(positions=MASK)], on_mask),
    "several": (
        [
            Scale(range(8, F), 2, positions="generated"),
            raw(),
            Clamp(3, 8, unit="raw"),
            raw(strength=3),
        ],
        several,
    ),
}
POSITIONS = ("steer", "prompt", "generated", "slice", "clamp")


@pytest.mark.parametrize("case", CASES)
def test_every_edit_in_generate_is_the_edit_without_a_cache(case):
    lm = tiny.llama()
    edits, formula = CASES[case]

    check(lm, tiny.sae_for(lm, **SAE), tiny.prompts(8, 5), edits, formula)


CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "prefilled in chunks": {"prefill_chunk_size": 3},
    "static, prefilled in chunks": {"cache_implementation": "static", "prefill_chunk_size": 4},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", POSITIONS)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral", "gpt2"])
def test_every_cache_puts_edits_on_the_same_tokens(kind, case, cache):
    lm = tiny.LM[kind]()
    edits, formula = CASES[case]

    # longer than the sliding window, with three tokens of padding
    check(lm, tiny.sae_for(lm, **SAE), tiny.prompts(11, 8), edits, formula, **CACHES[cache])


@pytest.mark.parametrize("case", ["clamp", "generated", "slice", "rows"])
@pytest.mark.parametrize("kind", [*tiny.LM, *tiny.RECURRENT])
def test_every_decoder_is_edited_as_without_a_cache(kind, case):
    lm = tiny.ALL[kind]()
    edits, formula = CASES[case]

    check(lm, tiny.sae_for(lm, **SAE), tiny.prompts(9, 9), edits, formula)


@pytest.mark.parametrize("case", POSITIONS)
@pytest.mark.parametrize("kind", tiny.RECURRENT)
def test_recurrent_models_are_edited_past_left_padding(kind, case):
    lm = tiny.ALL[kind]()
    edits, formula = CASES[case]

    check(lm, tiny.sae_for(lm, **SAE), tiny.prompts(9, 6), edits, formula)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_what_goes_into_a_block_is_edited_like_what_comes_out(kind, site):
    lm = tiny.ALL[kind]()
    sae = tiny.sae_for(lm, f"layers.{2 if site == 'resid_pre' else 1}.{site}", **SAE)
    path = f"{blocks_path(lm)}.1"
    rows, (edits, formula) = tiny.prompts(8, 5), CASES["generated"]

    with sae.attach(lm) as session:
        session.edit(*edits)
        got = generate(lm, rows)

    for row, ids in enumerate(rows):
        want = alone(lm, sae, path, ids, formula, row)
        assert got.sequences[row, -STEPS:].tolist() == want.tokens.tolist()


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("case", ["prompt", "generated", "clamp"])
@pytest.mark.parametrize("drafts", ["weak assistant", "same model", "prompt lookup", "early exit"])
def test_drafted_tokens_are_edited_as_if_they_had_come_one_by_one(kind, case, drafts):
    lm = tiny.ALL[kind]()
    (start,) = tiny.prompts(4)
    rows = [torch.cat([start, start, start])]  # so that prompt lookup finds something
    options: dict[str, Any] = {
        "weak assistant": {"assistant_model": tiny.ALL[kind](seed=4)},
        "same model": {"assistant_model": tiny.ALL[kind]()},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "early exit": {"assistant_early_exit": 4},
    }[drafts]
    if drafts == "early exit" and kind == "bloom":
        pytest.skip("early exit needs num_hidden_layers to stop at")
    edits, formula = CASES[case]

    check(lm, tiny.sae_for(lm, **SAE), rows, edits, formula, **options)


def test_generate_from_embeddings_is_edited_like_generate_from_ids():
    lm = tiny.llama()
    rows = tiny.prompts(8, 5)
    batch = tiny.padded(rows)
    embeds = {
        "inputs_embeds": lm.get_input_embeddings()(batch["input_ids"]),
        "attention_mask": batch["attention_mask"],
    }

    check(lm, tiny.sae_for(lm, **SAE), rows, *CASES["generated"], **embeds)
    check(lm, tiny.sae_for(lm, **SAE), rows, *CASES["prompt"], **embeds)


def hooked_generate(
    lm: nn.Module, sae: SwitchSAE, rows: list[Tensor], formula: Formula, copies: int, **options: Any
) -> Any:
    """`generate` without a cache, the edit made by a plain hook; batch row b is row b // copies."""
    prompt = max(map(len, rows))

    def change(x: Tensor) -> Tensor:
        streams = []
        for index, stream in enumerate(x):
            row = index // copies
            start = prompt - len(rows[row])
            new = edited(sae, stream[start:], formula, len(rows[row]), row)
            streams.append(torch.cat([stream[:start], new]))
        return torch.stack(streams)

    with plain_hook(lm, f"{blocks_path(lm)}.2", change):
        torch.manual_seed(11)
        return generate(lm, rows, use_cache=False, **options)


@pytest.mark.parametrize("case", ["rows", "generated", "slice", "clamp"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "cache_implementation": "static"},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["beams", "beams, static", "samples", "sampled beams"],
)
def test_beams_and_samples_are_edited_as_the_row_they_come_from(options, case):
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    rows, (edits, formula) = tiny.prompts(8, 5), CASES[case]
    copies = options.get("num_beams") or options["num_return_sequences"]
    plain = {name: value for name, value in options.items() if name != "cache_implementation"}
    want = hooked_generate(lm, sae, rows, formula, copies, **plain)

    with sae.attach(lm) as session:
        session.edit(*edits)
        torch.manual_seed(11)
        got = generate(lm, rows, **options)

    assert got.sequences.tolist() == want.sequences.tolist()
    unsteered = hooked_generate(lm, sae, rows, unedited, copies, **plain)
    assert not torch.equal(want.logits[-1], unsteered.logits[-1])


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "max_cache_len": 48}])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "lfm2"])
def test_a_chat_goes_on_with_the_cache_of_its_first_turn(kind, cache):
    lm = tiny.ALL[kind]()
    sae = tiny.sae_for(lm, **SAE)
    (first, more) = tiny.prompts(8, 5)
    edits: list[Edit] = [raw(positions=slice(1, None, 2))]

    def formula(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
        acts[1::2, 5] += 12
        return acts

    with sae.attach(lm) as session:
        session.edit(*edits)
        turn = generate(lm, [first], **({} if not cache else {"cache_implementation": "static"}))
        chat = torch.cat([turn.sequences[0], more])
        again = {} if not cache else {"past_key_values": None}
        if not cache:
            again = {"past_key_values": turn.past_key_values}
        got = generate(lm, [chat], **again)

    want = alone(lm, sae, f"{blocks_path(lm)}.2", chat, formula)
    assert got.sequences[0, -STEPS:].tolist() == want.tokens.tolist()


def test_what_was_generated_in_an_earlier_turn_is_prompt_in_the_next():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    (first, more) = tiny.prompts(8, 5)

    with sae.attach(lm) as session:
        turn = generate(lm, [first])
        chat = torch.cat([turn.sequences[0], more])
        session.edit(raw(positions="generated"))
        got = generate(lm, [chat], past_key_values=turn.past_key_values)

    want = alone(lm, sae, "model.layers.2", chat, on_generated)
    assert got.sequences[0, -STEPS:].tolist() == want.tokens.tolist()


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "lfm2", "gemma3"])
def test_a_forward_with_a_cache_counts_positions_from_the_start_of_the_text(kind, masked):
    lm = tiny.ALL[kind]()
    sae = tiny.sae_for(lm, **SAE)
    rows = tiny.prompts(12, 9) if masked else tiny.prompts(12, 12)
    batch = tiny.padded(rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]

    with sae.attach(lm) as session, torch.no_grad():
        session.edit(raw(positions=slice(4, 10, 2)))
        parts: list[dict[str, Tensor]] = [{}, {}]
        if masked:
            parts = [{"attention_mask": mask[:, :8]}, {"attention_mask": mask}]
        if masked and kind != "bloom":  # which counts them itself
            at = (mask.cumsum(-1) - 1).clamp(min=0)
            parts[0]["position_ids"], parts[1]["position_ids"] = at[:, :8], at[:, 8:]
        start = lm(ids[:, :8], use_cache=True, **parts[0])
        end = lm(ids[:, 8:], past_key_values=start.past_key_values, **parts[1])

    def formula(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
        acts[4:10:2, 5] += 12
        return acts

    for row, text in enumerate(rows):
        with (
            plain_hook(
                lm, f"{blocks_path(lm)}.2", lambda x: edited(sae, x[0], formula, 0, 0)[None]
            ),
            torch.no_grad(),
        ):
            want = lm(text[None]).logits[0, -4:]
        torch.testing.assert_close(end.logits[row], want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["slice", "clamp", "steer"])
@pytest.mark.parametrize("kind", ["llama", "bloom", "gemma3", "bert", "xlnet"])
def test_padding_moves_no_edit_in_a_plain_forward(kind, case, side):
    lm = tiny.ALL[kind]()
    sae = tiny.sae_for(lm, **SAE)
    rows, (edits, formula) = tiny.prompts(9, 6), CASES[case]
    batch = tiny.padded(rows, side)
    if kind == "bert":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    path = {"bert": "bert.encoder.layer", "xlnet": "transformer.layer"}.get(kind) or blocks_path(lm)
    first = kind == "xlnet"  # its stream is [seq, batch, d]

    with sae.attach(lm) as session, torch.no_grad():
        session.edit(*edits)
        got = lm(**batch).logits

    def change(x: Tensor) -> Tensor:
        stream = x[:, 0] if first else x[0]
        new = edited(sae, stream, formula, 0, 0)
        return new[:, None] if first else new[None]

    for row, text in enumerate(rows):
        with plain_hook(lm, f"{path}.2", change), torch.no_grad():
            want = lm(text[None]).logits[0]
        here = got[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(here, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_itself_is_never_edited(side):
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    batch = tiny.padded(tiny.prompts(9, 6), side)
    streams = []

    with (
        torch.no_grad(),
        sae.attach(lm) as session,
        plain_hook(lm, "model.layers.3", lambda x: streams.append(x) or x),
        lm.model.layers[3].register_forward_pre_hook(lambda _, args: streams.append(args[0])),
    ):
        lm(**batch)
        session.edit(raw(), Clamp(3, 8, unit="raw"))
        lm(**batch)

    before, after = streams[0], streams[2]
    padding = batch["attention_mask"] == 0
    assert torch.equal(before[padding], after[padding])
    assert not torch.isclose(before[~padding], after[~padding]).all(-1).any()


@dataclass
class Pair:
    """An encoder-decoder model, run anew for each token with a plain hook on one half."""

    lm: nn.Module
    sae: SwitchSAE
    path: str
    formula: Formula

    @torch.no_grad()
    def alone(self, text: Tensor, start: Tensor) -> Expected:
        ids, logits, encoder = start, [], "encoder" in self.path
        prompt = len(text) if encoder else len(start)
        change = lambda x: edited(self.sae, x[0], self.formula, prompt, 0)[None]  # noqa: E731
        with plain_hook(self.lm, self.path, change):
            for _ in range(STEPS):
                given = {"input_ids": text[None], "decoder_input_ids": ids[None]}
                logits.append(self.lm(**given, use_cache=False).logits[0, -1])
                ids = torch.cat([ids, logits[-1].argmax()[None]])
        return Expected(ids[len(start) :], torch.stack(logits))


HALVES = {
    ("t5", "encoder"): "encoder.block.1",
    ("t5", "decoder"): "decoder.block.2",
    ("bart", "encoder"): "model.encoder.layers.1",
    ("bart", "decoder"): "model.decoder.layers.2",
}


@pytest.mark.parametrize("case", ["steer", "slice", "prompt", "generated", "clamp"])
@pytest.mark.parametrize(("kind", "half"), HALVES)
@pytest.mark.parametrize("start", ["start token", "prompt", "prompt without start token"])
def test_both_halves_of_an_encoder_decoder_are_edited(kind, half, case, start):
    lm, path = tiny.PAIRS[kind](), HALVES[kind, half]
    sae = tiny.sae_for(lm, path, **SAE)
    texts, (edits, formula) = tiny.prompts(9, 6), CASES[case]
    first = torch.tensor([lm.config.decoder_start_token_id])
    told = tiny.prompts(3, seed=9)[0]
    given = {"start token": None, "prompt": torch.cat([first, told])}.get(start, told)
    options = {} if given is None else {"decoder_input_ids": given.expand(2, -1)}
    begin = first if given is None else torch.cat([first, told])

    with sae.attach(lm) as session:
        session.edit(*edits)
        # BART counts positions from the left, padding included
        got = generate(lm, texts, **tiny.padded(texts, "right"), **options)

    for row, text in enumerate(texts):
        want = Pair(lm, sae, path, formula).alone(text, begin)
        assert got.sequences[row, -STEPS:].tolist() == want.tokens.tolist()
        logits = torch.stack([step[row] for step in got.logits])
        torch.testing.assert_close(logits, want.logits, atol=2e-3, rtol=1e-3)


def test_what_is_generated_in_the_decoder_is_not_told_by_the_encoder():
    lm, text = tiny.bart(), tiny.prompts(9)[0]
    path = HALVES["bart", "decoder"]
    read, write = tiny.sae_for(lm, HALVES["bart", "encoder"]), tiny.sae_for(lm, path, **SAE)
    edits, formula = CASES["generated"]

    with attach(lm, {HALVES["bart", "encoder"]: read, path: write}) as session:
        session.edit(*edits, at=session.hookpoints[1])
        got = generate(lm, [text])

    begin = torch.tensor([lm.config.decoder_start_token_id])
    want = Pair(lm, write, path, formula).alone(text, begin)
    clean = Pair(lm, write, path, unedited).alone(text, begin)
    assert not torch.allclose(want.logits[1:], clean.logits[1:], atol=0.05)
    logits = torch.stack([step[0] for step in got.logits])
    torch.testing.assert_close(logits, want.logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_beams_of_an_encoder_decoder_belong_to_their_row(half):
    lm = tiny.t5()
    sae = tiny.sae_for(lm, HALVES["t5", half], **SAE)
    texts = tiny.prompts(7, 7)
    fixed = {"num_beams": 3, "num_return_sequences": 3}

    with sae.attach(lm) as session:
        session.edit(raw(rows=1, strength=40.0))
        got = generate(lm, texts, **fixed).sequences
        session.edit(raw(strength=40.0))
        both = generate(lm, texts, **fixed).sequences
    none = generate(lm, texts, **fixed).sequences

    assert torch.equal(got[:3], none[:3])
    assert torch.equal(got[3:], both[3:])
    assert not torch.equal(got[3:], none[3:])


@pytest.mark.parametrize("drafts", ["same model", "prompt lookup"])
def test_drafts_of_an_encoder_decoder_are_generated_tokens(drafts):
    lm = tiny.bart()
    sae = tiny.sae_for(lm, HALVES["bart", "decoder"], **SAE)
    (text,) = tiny.prompts(7)
    options: dict[str, Any] = {
        "same model": {"assistant_model": tiny.bart()},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
    }[drafts]
    edits, formula = CASES["generated"]

    with sae.attach(lm) as session:
        session.edit(*edits)
        got = generate(lm, [text], **options)

    begin = torch.tensor([lm.config.decoder_start_token_id])
    want = Pair(lm, sae, HALVES["bart", "decoder"], formula).alone(text, begin)
    assert got.sequences[0, -STEPS:].tolist() == want.tokens.tolist()


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_whisper_is_edited_in_the_rows_asked_for(half):
    lm = tiny.whisper()
    sae = tiny.sae_for(lm, f"model.{half}.layers.1", **SAE)
    sound = torch.randn(2, 8, 24)
    fixed = {"max_new_tokens": 6, "do_sample": False}
    none = lm.generate(sound, **fixed)

    with sae.attach(lm) as session:
        session.edit(raw(rows=1, strength=60.0))
        got = lm.generate(sound, **fixed)

    assert torch.equal(got[0], none[0])
    assert not torch.equal(got[1], none[1])


@pytest.mark.parametrize("case", ["steer", "slice", "generated", "rows"])
def test_xlnet_is_edited_with_its_sequence_first(case):
    lm = tiny.xlnet()
    sae = tiny.sae_for(lm, **SAE)
    rows, (edits, _) = tiny.prompts(7, 7), CASES[case]
    none = generate(lm, rows).sequences

    with sae.attach(lm) as session:
        session.edit(*edits)
        got = generate(lm, rows).sequences
        if case != "rows":
            alone_too = [generate(lm, [row]).sequences[0].tolist() for row in rows]
            assert got.tolist() == alone_too

    assert not torch.equal(got, none)


class At(LogitsProcessor):
    """Calls what it is given after each step."""

    def __init__(self, after_step: Callable[[int], None]) -> None:
        self.after_step, self.step = after_step, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.after_step(self.step)
        self.step += 1
        return scores


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_an_edit_made_between_two_tokens_counts_from_the_next_on(cache):
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    rows = tiny.prompts(8, 5)
    before = [alone(lm, sae, "model.layers.2", ids, unedited) for ids in rows]

    def from_third_on(acts: Tensor, prompt: int, row: int, sae: SwitchSAE) -> Tensor:
        acts[prompt + 2 : prompt + 5, 5] += 12  # the tokens of steps 3, 4 and 5 pass by
        return acts

    with sae.attach(lm) as session:

        def between(step: int) -> None:
            if step == 2:
                session.edit(raw())
            if step == 5:
                session.edit()

        got = generate(lm, rows, logits_processor=LogitsProcessorList([At(between)]), **cache)

    for row, ids in enumerate(rows):
        want = alone(lm, sae, "model.layers.2", ids, from_third_on, row)
        assert got.sequences[row, -STEPS:].tolist() == want.tokens.tolist()
        assert want.tokens.tolist() != before[row].tokens.tolist()


def test_features_after_a_step_of_generate_are_those_of_its_last_token():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    rows = tiny.prompts(8, 8)
    with sae.attach(lm) as session:
        text = generate(lm, rows).sequences
        last = session.features
        lm(text[:, :-1])
        whole = session.features

    assert last.shape == (2, 1)
    torch.testing.assert_close(last.to_dense()[:, 0], whole.to_dense()[:, -1], atol=1e-4, rtol=1e-4)


def test_a_row_that_is_not_there_is_an_edit_error_and_generate_works_after():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    rows = tiny.prompts(6, 6)
    none = generate(lm, rows).sequences

    with sae.attach(lm) as session:
        session.edit(raw(rows=2))
        with pytest.raises(EditError, match="names row 2, but this batch has rows 0 to 1"):
            generate(lm, rows, num_beams=3)
        session.edit()
        assert torch.equal(generate(lm, rows).sequences, none)


def test_a_callback_that_runs_the_model_itself_disturbs_no_position():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    rows, (edits, formula) = tiny.prompts(8, 5), CASES["generated"]

    def aside(step: int) -> None:
        lm(torch.tensor([[7, 8, 9]]))

    with sae.attach(lm) as session:
        session.edit(*edits)
        got = generate(lm, rows, logits_processor=LogitsProcessorList([At(aside)]))

    for row, ids in enumerate(rows):
        want = alone(lm, sae, "model.layers.2", ids, formula, row)
        assert got.sequences[row, -STEPS:].tolist() == want.tokens.tolist()


def test_classifier_free_guidance_runs_with_an_edit():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    rows = tiny.prompts(6, 6)

    with sae.attach(lm) as session:
        session.edit(raw())
        got = generate(lm, rows, guidance_scale=1.5).sequences

    def change(x: Tensor) -> Tensor:
        return torch.stack([edited(sae, stream, steer, 0, 0) for stream in x])

    with plain_hook(lm, "model.layers.2", change):
        want = generate(lm, rows, guidance_scale=1.5, use_cache=False).sequences
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["steer", "slice", "clamp"])
def test_continuous_batching_is_edited_by_absolute_positions(case):
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    rows, (edits, formula) = tiny.prompts(8, 5), CASES[case]
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1)

    with sae.attach(lm) as session:
        session.edit(*edits)
        done = lm.generate_batch([row.tolist() for row in rows], generation_config=config)

    want = [alone(lm, sae, "model.layers.2", ids, formula).tokens.tolist() for ids in rows]
    assert sorted(out.generated_tokens for out in done.values()) == sorted(want)


# Threads

elsewhere = pytest.mark.filterwarnings("ignore:a forward in thread .* passed by:UserWarning")


def spoken(lm: nn.Module, ids: Tensor) -> list[int]:
    return generate(lm, [ids]).sequences[0, -STEPS:].tolist()


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """What the jobs return, run at the same time; raises what one of them raised."""
    results: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def run(index: int) -> None:
        barrier.wait(60)
        try:
            results[index] = jobs[index]()
        except Exception as err:
            results[index] = err

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@elsewhere
def test_threads_with_sessions_of_their_own_get_their_own_edits():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    (ids,) = tiny.prompts(8)

    def steered(feature: int) -> list[int]:
        with sae.attach(lm) as session:
            session.edit(raw(feature))
            return spoken(lm, ids)

    want = [steered(5), steered(9), spoken(lm, ids)]
    assert len({tuple(words) for words in want}) == 3
    for _ in range(20):
        got = together(lambda: steered(5), lambda: steered(9), lambda: spoken(lm, ids))
        assert got == want
    assert tiny.traces(lm) == tiny.traces(tiny.llama())


def test_one_session_edits_two_threads_at_once():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    rows, (edits, formula) = tiny.prompts(8, 5), CASES["scale"]
    want = [alone(lm, sae, "model.layers.2", ids, formula).tokens.tolist() for ids in rows]

    with sae.attach(lm) as session:
        session.edit(*edits)
        for _ in range(20):
            got = together(lambda: spoken(lm, rows[0]), lambda: spoken(lm, rows[1]))
            assert got == want


class Words:
    """As much of a tokenizer as a streamer needs."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{int(i)} " for i in ids)


def test_a_streamer_in_a_worker_thread_sees_the_main_threads_edits():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    (ids,) = tiny.prompts(8)
    want = alone(lm, sae, "model.layers.2", ids, steer).tokens.tolist()
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)

    with sae.attach(lm) as session:
        session.edit(raw())
        options = {"max_new_tokens": STEPS, "do_sample": False, "streamer": streamer}
        worker = threading.Thread(target=lm.generate, args=(ids[None],), kwargs=options)
        worker.start()
        said = "".join(streamer)
        worker.join(60)

    assert [int(word) for word in said.split()] == want


@elsewhere
def test_a_session_opened_in_a_worker_leaves_other_threads_alone():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    (ids,) = tiny.prompts(8)
    clean = lm(ids[None]).logits
    opened, done = threading.Event(), threading.Event()

    def work() -> None:
        with sae.attach(lm) as session:
            session.edit(raw())
            lm(ids[None])
            opened.set()
            done.wait(60)

    worker = threading.Thread(target=work)
    worker.start()
    opened.wait(60)
    try:
        assert torch.equal(lm(ids[None]).logits, clean)
    finally:
        done.set()
        worker.join(60)
    assert tiny.traces(lm) == tiny.traces(tiny.llama())


@elsewhere
def test_a_session_forgotten_by_a_dead_thread_acts_in_no_later_one():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    (ids,) = tiny.prompts(8)
    clean = lm(ids[None]).logits
    kept = []

    def forget() -> None:
        kept.append(sae.attach(lm))
        kept[0].edit(raw())

    together(forget)
    for _ in range(5):  # a new thread mostly gets the ident of the one before it
        assert torch.equal(together(lambda: lm(ids[None]).logits)[0], clean)
    kept[0].detach()


def test_an_error_in_one_thread_does_not_disturb_another():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    (ids,) = tiny.prompts(8)
    want = alone(lm, sae, "model.layers.2", ids, on_generated).tokens.tolist()

    def steered() -> list[int]:
        with sae.attach(lm) as session:
            session.edit(raw(positions="generated"))
            return spoken(lm, ids)

    def broken() -> None:
        with sae.attach(lm) as session:
            session.edit(raw(rows=3))
            with pytest.raises(EditError):
                spoken(lm, ids)

    for _ in range(10):
        assert together(steered, broken, steered)[::2] == [want, want]
    assert tiny.traces(lm) == tiny.traces(tiny.llama())


def test_attaching_in_four_threads_at_once_leaves_nothing():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    (ids,) = tiny.prompts(4)
    clean = lm(ids[None]).logits

    def loop() -> None:
        for turn in range(15):
            with sae.attach(lm, at=turn % 4, allow_mismatch=True) as session:
                session.edit(raw())
                assert not torch.equal(lm(ids[None]).logits, clean)

    together(loop, loop, loop, loop)
    assert tiny.traces(lm) == tiny.traces(tiny.llama())
    assert torch.equal(lm(ids[None]).logits, clean)


def test_edits_from_the_main_thread_while_a_worker_generates_break_nothing():
    lm = tiny.llama()
    sae = tiny.sae_for(lm, **SAE)
    (ids,) = tiny.prompts(8)
    stop = threading.Event()
    errors: list[Exception] = []

    def work() -> None:
        while not stop.is_set():
            try:
                spoken(lm, ids)
            except Exception as err:
                errors.append(err)

    with attach(lm, sae) as session:
        worker = threading.Thread(target=work)
        worker.start()
        for turn in range(400):
            session.edit(*([raw()], [Clamp(3, 8, unit="raw")], [])[turn % 3])
            if session.taps[session.hookpoints[0]].last is not None:
                assert session.features.num_features == F
        stop.set()
        worker.join(60)
    assert errors == []


def test_positions_count_tokens_where_each_has_several_lanes_in_the_stream():
    entry = next(entry for entry in zoo.ENTRIES if entry.model_type == "deepseek_v4")
    lm, inputs = entry.build()
    length, seen = inputs["input_ids"].shape[1], []
    with hook_residual(lm, 1, lambda stream: seen.append(stream.shape)):
        lm(**inputs)
    lanes = seen[0][2]
    sae = SwitchSAE(SwitchSAEConfig(hidden_size=seen[0][-1], num_features=16, num_experts=4, k=2))
    placed = []

    with sae.eval().attach(lm, at=1) as session:
        (tap,) = session.taps.values()
        note = lambda _: placed.append((tap.last.tokens.position, tap.last.tokens.prompt))  # noqa: E731
        with hook_residual(lm, 2, note):
            lm.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)

    assert lanes > 1
    assert placed[0][0][0].tolist() == [t for t in range(length) for _ in range(lanes)]
    assert [position[0].tolist() for position, _ in placed[1:]] == [
        [length] * lanes,
        [length + 1] * lanes,
    ]
    assert [bool(prompt.all()) for _, prompt in placed] == [True, False, False]


def test_a_probe_on_a_stream_without_rows_does_not_move_what_is_generated():
    lm = tiny.llama()
    inputs = tiny.padded(tiny.prompts(5))
    sae, probe = tiny.sae_for(lm), tiny.sae_for(lm)
    edit = Steer(5, 40.0, unit="raw", positions="generated")
    with sae.attach(lm, at=2) as session:
        session.edit(edit)
        alone = lm.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)

    class Reshape(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return inner(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    inner = torch.nn.Identity()
    lm.model.layers[1].mlp.down_proj = torch.nn.Sequential(
        lm.model.layers[1].mlp.down_proj, (shape := Reshape())
    )
    shape.inner = inner
    with (
        sae.attach(lm, at=2) as session,
        probe.attach(lm, at="model.layers.1.mlp.down_proj.1.inner"),
    ):
        session.edit(edit)
        probed = lm.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)

    assert torch.equal(alone, probed)
