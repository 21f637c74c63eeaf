"""What the tokens of a model's stream are, told from its inputs alone: rows, positions, padding.

Room   (model type, mask, columns) -> for each reading that would be right, the tokens' positions.
How    Mostly column c of the stream is column c of the mask. The tables below say where it is not,
       by model type, from the models' own code. Nothing here asks the package.
Beware Where a stream has columns that no user gave (soft prompts, a decoder's condition), either
       they count as the first positions, or they are never edited: both readings are right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Streams that are not [B, T, d].
SEQUENCE_FIRST = {"xlnet", "fsmt", "fsmt/encoder"}
LANES_FIRST = {"gemma3n_text"}
LANES_LAST = {"deepseek_v4", "glm5_next", "glm5_next_text", "hy_v4"}
LANES_ONE_BY_ONE = {  # [B, lanes * T, d]: the text, then what each n-gram predicts
    "prophetnet": 3,
    "prophetnet:ProphetNetForConditionalGeneration": 3,
}
WIDTH_SECOND = {"squeezebert"}
# Columns before the text, and after it: a place for the next token, which nobody compares.
LEADING = {"cpmant": 32, "musicgen_melody": 244, "git, with an image": 197}
TRAILING = {"xlnet": 1, "xlm": 1}
# Times that generate runs the prompt.
PREFILLS = {"musicgen": 2, "musicgen, guided": 2}
# A batch is the rows, then the rows without what they are conditioned on.
GUIDED = {"musicgen, guided", "dia, guided", "dia, guided/encoder"}


def arranged(kind: str, stream: Tensor) -> Tensor:
    """A change to a stream as [B, T, d]; of a token's lanes the largest change."""
    if kind in SEQUENCE_FIRST:
        return stream.transpose(0, 1)
    if kind in LANES_FIRST:
        return stream.abs().amax(0)
    if kind in LANES_LAST:
        return stream.abs().amax(2)
    if kind in LANES_ONE_BY_ONE:
        return stream.unflatten(1, (LANES_ONE_BY_ONE[kind], -1)).abs().amax(1)
    return stream.movedim(1, -1) if kind in WIDTH_SECOND else stream


@dataclass
class Tokens:
    """What the test knows of the tokens of one stream."""

    row: Tensor
    """[B], as the user passed them."""
    position: Tensor
    """[B, T], counted in real tokens from 0; -1 is padding."""
    prompt: Tensor
    """[B, T] bool."""

    def within(self, scope: str, positions: object = None) -> Tensor:
        """[B, T] bool: the tokens that an edit with this scope has to change, and no others."""
        real = self.position >= 0
        if scope == "all":
            return real
        if scope in ("prompt", "generated"):
            return real & (self.prompt == (scope == "prompt"))
        if scope == "rows=1":
            return real & (self.row == 1)[:, None]
        if isinstance(positions, slice):
            positions = list(range(positions.start, positions.stop, positions.step))
        return torch.isin(self.position, torch.tensor(positions))


@dataclass
class Text:
    """The rows that a call was given: what the tokens of its streams are, step by step."""

    kind: str
    pads: Tensor
    """[rows] columns of left padding."""
    width: int | None = None
    """Columns of the text that an encoder reads; those after them are padding."""
    columns: int | None = None
    """Of the first stream, once it was seen."""

    def tokens(self, step: int, batch: int, width: int) -> list[Tokens]:
        """Readings of the stream [batch, width] at a step of generate, the prompt's being 0."""
        trailing, leading = TRAILING.get(self.kind, 0), LEADING.get(self.kind, 0)
        width -= trailing
        self.columns = self.columns or width
        end = self.columns + step
        column = torch.arange(end - width, end).expand(batch, width)
        half = batch // 2 if self.kind in GUIDED else batch
        row = torch.arange(batch) % half // max(1, half // len(self.pads))
        pads = self.pads[row][:, None]
        prompt = column < self.columns
        readings = []
        for counted in {leading, 0}:
            at = column - pads - (leading - counted)
            at = torch.where(column < leading + pads, -1, at)
            at = torch.where(column < counted, column, at)
            if self.width is not None:
                at = torch.where(column < leading + self.width, at, -1)
            readings.append(Tokens(row, at, prompt))
        return readings


def counted(real: Tensor) -> Tensor:
    """[B, T] bool -> positions, -1 for padding."""
    return torch.where(real, real.long().cumsum(-1) - 1, -1)


def _with_prompt_slots(model: nn.Module, mask: Tensor, width: int) -> list[Tensor]:
    slots = torch.ones(len(mask), width - mask.shape[1], dtype=torch.bool)
    real = torch.cat([slots, mask], 1)
    return [counted(real), torch.cat([slots.long() - 2, counted(mask)], 1)]


def _molecules(model: nn.Module, mask: Tensor, width: int) -> list[Tensor]:
    rate = model.config.downsampling_rate
    return [counted(F.max_pool1d(mask[:, None].float(), rate, rate)[:, 0] > 0)]


def _squeezed(model: nn.Module, mask: Tensor, width: int) -> list[Tensor]:
    rate = model.config.squeeze_factor
    frames = model._get_feature_vector_attention_mask(width * rate, mask.long())
    return [counted(F.max_pool1d(frames[:, None].float(), rate, rate)[:, 0] > 0)]


def _text_and_patches(model: nn.Module, mask: Tensor, width: int) -> list[Tensor]:
    return [counted(F.pad(mask, (0, width - mask.shape[1]), value=True))]


def _padded_to_windows(model: nn.Module, mask: Tensor, width: int) -> list[Tensor]:
    return [counted(F.pad(mask, (0, width - mask.shape[1])))]


def _every_nth(model: nn.Module, mask: Tensor, width: int) -> list[Tensor]:
    return [counted(mask[:, :: mask.shape[1] // width])]


def _waves(model: nn.Module, mask: Tensor, width: int) -> list[Tensor]:
    return [counted(mask[:, :: 64 * 3 * 2][:, :width])]  # the strides of its convolutions


def _streamed_waves(model: nn.Module, mask: Tensor, width: int) -> list[Tensor]:
    with torch.no_grad():
        _, real = model.get_encoder().embedder(torch.zeros(mask.shape), padding_mask=mask.long())
    return [counted(real.bool())]


RULES: dict[str, Callable[[nn.Module, Tensor, int], list[Tensor]]] = {
    "cpmant": _with_prompt_slots,
    "git, with an image": _with_prompt_slots,
    "musicgen_melody": _with_prompt_slots,
    "nemotron3_5_transcribe_asr_audio": _every_nth,
    "nemotron3_diarization": _every_nth,
    "nemotron3_diarization_audio": _every_nth,
    "canine": _molecules,
    # states, actions and returns take turns
    "decision_transformer": lambda _, mask, __: [counted(mask.repeat_interleave(3, 1))],
    **dict.fromkeys(["longformer", "led/encoder", "pegasus_x/encoder"], _padded_to_windows),
    "moonshine/encoder": _waves,
    "moonshine_streaming/encoder": _streamed_waves,
    "sew": _squeezed,
    "sew-d": _squeezed,
    "vilt": _text_and_patches,
    "visual_bert, with an image": _text_and_patches,
}
_OF_SOUND = ("_get_feature_vector_attention_mask", "_get_output_attention_mask")


def readings(kind: str, model: nn.Module, mask: Tensor, width: int) -> list[Tensor]:
    """Positions [B, width] of a stream, from the mask of its inputs; [] if no rule is known.

    Then padding can't be known, so that only a refusal is right.
    """
    mask = mask.bool()
    if kind in RULES:
        return RULES[kind](model, mask, width)
    if mask.shape[1] == width:
        return [counted(mask)]
    for module in model.modules():
        for name in _OF_SOUND:
            if (rule := getattr(module, name, None)) is None:
                continue
            mask = mask.long()
            real = rule(width, mask) if "feature_vector" in name else rule(mask, width)
            return [counted(real.bool())]
    return []
