"""A scoped edit reaches exactly the tokens of its scope or is refused, in every model of the zoo.

Three sweeps over all types: generate, a padded forward, a padded generate. What has to be edited is
worked out from the inputs, the number of the step and the models' own code (`helpers.streams`).
What was edited is seen by plain torch hooks (`helpers.scopes`). A type whose scopes are refused, or
that can't be run, is in a table with the reason, and a reason that no longer holds fails too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

import pytest
import torch
from helpers import zoo, zoo_more
from helpers.scopes import Outcome, Place, first
from helpers.streams import PREFILLS, WIDTH_SECOND, Text, Tokens, readings
from torch import Tensor, nn

from hf_switch_sae import find_residual_blocks

# What models do that torch warns about; nothing of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning"),
]

STEPS = 3
SOUND = ("input_values", "input_features")
# {model type: {"<trial>/<scope>", with * for any: why it is refused}}
REFUSED: dict[str, dict[str, str]] = {
    "squeezebert": {"forward*": "its stream is [batch, d, seq], as wide as its text is long"},
    "canine": {
        "forward, *": "one vector stands for four characters, some of which may be padding",
    },
}
# {model type: {trial: why the model itself does not run it}}
_NO_BEAMS = {"padded generate, beams": "it generates greedily or by sampling only"}
_ONE_SEQUENCE = {"padded generate, samples": "it returns one sequence for each row only"}
_GREEDY = {
    "generate, no cache": "its decoder needs its cache",
    "padded generate, beams": "it generates greedily only",
    "padded generate, samples": "it generates greedily only",
}
UNSUPPORTED: dict[str, dict[str, str]] = {
    "csm": _NO_BEAMS,
    "dia": _NO_BEAMS | _ONE_SEQUENCE,
    "higgs_audio_v2": {
        **_NO_BEAMS,
        "generate, no cache": "its prompt and what it generates differ in shape",
        "padded generate, samples": "random weights give it probabilities that are no numbers",
    },
    "dia, guided": _NO_BEAMS | _ONE_SEQUENCE,
    "musicgen": _NO_BEAMS,
    "musicgen, guided": _NO_BEAMS,
    "musicgen_melody": _NO_BEAMS | _ONE_SEQUENCE,
    "nemotron3_5_asr": _GREEDY,
    "nemotron_asr_streaming": _GREEDY,
    "parakeet_rnnt": _GREEDY,
    "parakeet_tdt": _GREEDY,
    "qwen3_vl, with an image": dict.fromkeys(
        ["padded generate, beams", "padded generate, samples"],
        "transformers fails to repeat what its vision tower hands to several layers",
    ),
    "rwkv": {"padded generate, beams": "it can't reorder its state, which beams need"},
}
# generate runs the hooked stack once, as nothing is decoded with it
ONE_PASS: set[str] = {
    "lasr_ctc",
    "nemotron3_5_asr",
    "nemotron_asr_streaming",
    "parakeet_ctc",
    "parakeet_rnnt",
    "parakeet_tdt",
}
# The forward takes an attention_mask, but not one with a column for each token.
OTHER_MASK: dict[str, str] = {
    "audio-spectrogram-transformer": "a mask of patches, not of the sound",
    "blip_2_qformer": "a mask of queries, not of text",
    "moss_transcribe_diarize_audio": "a mask that is added to the scores of attention",
    "qwen2_audio_encoder": "a mask that is added to the scores of attention",
    "whisper:WhisperForConditionalGeneration/encoder": "a mask of what training may hide",
    "voxtral_encoder": "a mask that is added to the scores of attention",
}


@dataclass
class Case:
    """One model, built when first asked for."""

    entry: zoo.Entry

    @property
    def kind(self) -> str:
        return self.entry.model_type

    @cached_property
    def built(self) -> tuple[nn.Module, dict[str, Any]]:
        return self.entry.build()

    @property
    def model(self) -> nn.Module:
        return self.built[0]

    @property
    def is_encoder(self) -> bool:
        return self.kind.endswith("/encoder")

    @cached_property
    def is_decoder(self) -> bool:
        """Of an encoder-decoder, whose text the encoder reads."""
        return bool(self.model.config.is_encoder_decoder) and not self.is_encoder

    @property
    def path(self) -> str:
        """The middle block of the hooked stack, or a module outside of every stack."""
        at, stack = self.entry.at, self.entry.at
        if at is not None and type(self.model.get_submodule(at)) is not nn.ModuleList:
            return at
        if self.is_encoder:
            stack = encoder_of(self.model, self.kind)
        blocks = find_residual_blocks(self.model, at=stack)
        return blocks.paths[len(blocks) // 2]

    @cached_property
    def place(self) -> Place:
        model, inputs = self.built
        streams: list[Tensor] = []
        path = self.path
        module = model.get_submodule(path)
        with module.register_forward_hook(lambda _, __, out: streams.append(first(out))):
            run(self.kind, model, inputs)
        self.loops = 1 if self.kind in zoo_more.NO_FORWARD else len(streams)
        width = streams[0].shape[1 if self.kind in WIDTH_SECOND else -1]
        return Place(model, path, self.kind, width)


def encoder_of(model: nn.Module, kind: str) -> str:
    if (known := zoo_more.ENCODERS.get(kind)) is not None:
        return known
    encoder = model.get_encoder()
    return next(name for name, module in model.named_modules() if module is encoder)


def run(kind: str, model: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        if kind in zoo_more.NO_FORWARD:
            generate(model, kind, inputs)
        else:
            model(**inputs)


def generate(model: nn.Module, kind: str, inputs: dict[str, Any], **options: Any) -> None:
    fixed: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0}
    fixed |= {"do_sample": False, "num_beams": 1}
    if model.config.is_encoder_decoder:
        fixed["decoder_start_token_id"] = 1
    given = {**inputs, "decoder_input_ids": None, **fixed, **options}
    given |= zoo_more.GENERATE.get(base_of(kind), {})
    torch.manual_seed(2)
    model.generate(**{name: x for name, x in given.items() if x is not None})


@pytest.fixture(
    scope="module",
    params=[pytest.param(e, id=e.model_type) for e in [*zoo.ENTRIES, *zoo_more.MORE]],
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def base_of(kind: str) -> str:
    return kind.removesuffix("/encoder")


def check(case: Case, sweep: str, trials: dict[str, Callable[[], dict[str, Outcome]]]) -> None:
    """Compare what became of the scopes of each trial with the tables."""
    known, unsupported = REFUSED.get(case.kind, {}), UNSUPPORTED.get(base_of(case.kind), {})
    outcomes: dict[str, Outcome] = {}
    for trial, outcome in trials.items():
        if trial in unsupported:
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                outcome()
        else:
            outcomes |= {f"{trial}/{scope}": each for scope, each in outcome().items()}
    wrong = [f"{name}: {each.wrong}" for name, each in outcomes.items() if each.wrong]
    refused = {name: each.refusal for name, each in outcomes.items() if each.refusal}
    surprising = {
        name: error
        for name, error in refused.items()
        if not any(fnmatch(name, pattern) for pattern in known)
    }
    stale = [
        pattern
        for pattern in known
        if pattern.startswith(sweep) and not any(fnmatch(name, pattern) for name in refused)
    ]
    assert not wrong, "\n".join(["silently wrong:", *wrong])
    assert not surprising, f"refused, but not in REFUSED: {surprising}"
    assert not stale, f"in REFUSED, but not refused: {stale}"


def in_generate(case: Case, text: Text, scopes: list[str], inputs: dict[str, Any], **options: Any):
    """A trial of a call of generate."""

    def expected(index: int, stream: Tensor) -> list[Tokens]:
        step = max(0, index // case.loops + 1 - PREFILLS.get(case.kind, 1))
        return text.tokens(step, *stream.shape)

    def trial() -> dict[str, Outcome]:
        call = lambda: generate(case.model, case.kind, inputs, **options)  # noqa: E731
        text.columns = None
        outcomes = case.place.outcomes(scopes, call, expected)
        steps = STEPS - 1 + PREFILLS.get(case.kind, 1)
        steps = 1 if case.kind in ONE_PASS or case.is_encoder else steps
        for outcome in outcomes.values():
            assert outcome.refusal or outcome.runs == steps * case.loops
        return outcomes

    return trial


def test_prompt_and_generated_share_out_what_generate_runs(case):
    if not zoo_more.class_of(case.kind).can_generate():
        pytest.skip("this class does not generate")
    inputs, scopes = case.built[1], ["all", "prompt", "generated"]
    windows = case.kind in ("led/encoder", "pegasus_x/encoder")  # padded on the right inside
    width = inputs["input_ids"].shape[1] if windows else None
    text = Text(case.kind, torch.zeros(2, dtype=torch.long), width)
    trials = {
        "generate": in_generate(case, text, scopes, inputs),
        "generate, no cache": in_generate(case, text, scopes, inputs, use_cache=False),
    }
    check(case, "generate", trials)


def test_an_edit_in_a_padded_forward_reaches_the_real_tokens_only(case):
    if base_of(case.kind) in zoo_more.NO_FORWARD:
        pytest.skip("it has no forward")
    names = set(inspect.signature(zoo_more.class_of(case.kind).forward).parameters)
    if not names & {"attention_mask", "decoder_attention_mask"}:
        pytest.skip("its forward takes no mask")
    if (why := OTHER_MASK.get(case.kind)) is not None:
        pytest.skip(why)
    padded = Padded.of(case, names)
    if padded is None:
        pytest.skip("its mask is not one of text or sound")
    check(case, "forward", {name: padded.trial(*how) for name, how in padded.ways().items()})


def test_scopes_are_those_of_the_rows_in_a_padded_generate(case):
    if not zoo_more.class_of(case.kind).can_generate():
        pytest.skip("this class does not generate")
    inputs, pads = dict(case.built[1]), torch.zeros(2, dtype=torch.long)
    columns, is_text = None, "input_ids" in inputs
    if is_text:
        columns = inputs["input_ids"].shape[1]
        mask = padding([columns, columns - 3], columns, "left")
        inputs |= {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}
        pads = torch.tensor([0, 0 if case.is_decoder else 3])
    text = Text(case.kind, pads, columns if case.is_encoder and is_text else None)
    scopes = ["all", "prompt", "generated", "rows=1", "positions=[0, 2]", "positions=1:7:2"]
    modes = {
        "greedy": {},
        "beams": {"num_beams": 2},
        "samples": {"do_sample": True, "num_return_sequences": 2},
    }
    trials = {
        f"padded generate, {mode}": in_generate(case, text, scopes, inputs, **options)
        for mode, options in modes.items()
    }
    check(case, "padded", trials)


def padding(lengths: list[int], columns: int, side: str) -> Tensor:
    at, length = torch.arange(columns), torch.tensor(lengths)[:, None]
    return (at < length if side == "right" else at >= columns - length).long()


@dataclass
class Padded:
    """Three rows of text or sound, the second and third shorter, for the hooked stack."""

    case: Case
    inputs: dict[str, Any]
    tokens: str
    mask: str
    takes_positions: bool

    @classmethod
    def of(cls, case: Case, parameters: set[str]) -> Padded | None:
        inputs = {name: three(x) for name, x in case.built[1].items()}
        is_decoder = case.is_decoder and "decoder_attention_mask" in parameters
        order = ("decoder_input_ids",) if is_decoder else ()
        if case.is_decoder and not is_decoder:  # a transducer, hooked in its encoder
            order = ("input_features",)
        order = order or ("input_ids", *SOUND, "states")
        tokens = next((name for name in order if name in inputs), None)
        if tokens is None:
            return None
        mask = "decoder_attention_mask" if is_decoder else "attention_mask"
        return cls(case, inputs, tokens, mask, "position_ids" in parameters)

    @property
    def columns(self) -> int:
        return self.inputs[self.tokens].shape[1]

    def ways(self) -> dict[str, tuple[str, bool]]:
        is_text = self.tokens.endswith("ids")  # sound is padded on the right only
        sides = ("left", "right") if is_text else ("right",)
        ways = {f"forward, {side}": (side, False) for side in sides}
        if is_text and self.takes_positions:
            with_positions = {f"forward, {side}, positions": (side, True) for side in sides}
            ways |= {name: way for name, way in with_positions.items() if self.runs(*way)}
        return ways

    def runs(self, side: str, with_positions: bool) -> bool:
        """Some models take positions of another shape."""
        try:
            run(self.case.kind, self.case.model, self.given(side, with_positions))
        except (RuntimeError, IndexError, ValueError):
            return False
        return True

    def lengths(self) -> list[int]:
        short = self.columns // 2 if self.tokens in SOUND else self.columns * 2 // 3
        if self.case.kind.startswith("moonshine") and self.tokens in SOUND:
            short = self.columns // 8  # its frames are long
        return [self.columns, self.columns * 3 // 4 + 1, short]

    def given(self, side: str, with_positions: bool) -> dict[str, Any]:
        mask = padding(self.lengths(), self.columns, side)
        given = {**self.inputs, self.mask: mask}
        if self.tokens.endswith("ids") and self.inputs[self.tokens].shape == mask.shape:
            given[self.tokens] = self.inputs[self.tokens] * mask
        if with_positions:
            at = mask.cumsum(-1) - 1
            # as generate makes them: any number may stand in padding
            given["position_ids"] = at.masked_fill(mask == 0, 1) if side == "left" else at
        return given

    def trial(self, side: str, with_positions: bool) -> Callable[[], dict[str, Outcome]]:
        given, case = self.given(side, with_positions), self.case

        def expected(index: int, stream: Tensor) -> list[Tokens]:
            found = readings(case.kind, case.model, given[self.mask], stream.shape[1])
            return [Tokens(torch.arange(3), at, torch.ones_like(at).bool()) for at in found]

        def trial() -> dict[str, Outcome]:
            call = lambda: run(case.kind, case.model, given)  # noqa: E731
            outcomes = case.place.outcomes(["all", "positions=[0]", "rows=1"], call, expected)
            assert all(outcome.refusal or outcome.runs for outcome in outcomes.values())
            return outcomes

        return trial


def three(value: Any) -> Any:
    """Three rows of an input with two; codes of music come in rows of four codebooks."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] not in (2, 8):
        return value
    return torch.cat([value, value[: value.shape[0] // 2]])


def test_every_reason_is_that_of_a_type_in_the_sweeps():
    kinds = {entry.model_type for entry in [*zoo.ENTRIES, *zoo_more.MORE]}

    assert {
        *REFUSED,
        *UNSUPPORTED,
        *ONE_PASS,
        *OTHER_MASK,
    } <= kinds
    for table in (REFUSED, UNSUPPORTED):
        assert all(" " in reason for reasons in table.values() for reason in reasons.values())
