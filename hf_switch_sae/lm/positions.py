"""Which row and position each token of a forward pass has: a model's call -> `Tokens`.

Room   A residual stream [B, T, d] does not say which of the user's rows a batch row came from
       (beams and return sequences multiply rows), nor where in the text its tokens stand (a KV
       cache hides what came before). Both follow from the call: its attention mask, position ids
       and cache, and what `generate` was given.
       Positions count real tokens from 0 in each row, so padding, caching and the number of tokens
       in a step do not move them. Padding has position -1 and is never edited.
How    Most steps never ask, and each tensor operator costs about as much as a good part of the SAE
       itself. So `Tokens` works out each of its answers when it is first asked for.
Beware A cache grows while the blocks run, so its length is read before the first block. A mask is
       read late: until then it must not change in the columns of its call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

_CACHES = ("past_key_values", "past_key_value", "cache_params", "cache", "state", "mems")


@dataclass
class Generation:
    """One call of `generate`: what it was given, and what has been seen of it."""

    rows: int | None = None
    """Rows the user gave; None if unknown."""
    columns: int | None = None
    """Columns of the prompt, padding included; None until the first forward tells."""
    drafted: bool = False
    """Whether the first forward may have drafted tokens after the prompt."""
    seen: int = 0
    """Columns run so far, for caches that don't know their length."""
    mask: _Mask | None = None
    """The last mask of all columns so far, for models that get no mask once they have a cache."""


@dataclass
class Call:
    """One call of the module that owns a stack of blocks: its arguments that decide positions."""

    mask: Any = None
    """attention_mask as given: 2-D, 4-D, a dict of 4-D masks, or whatever else a kernel takes."""
    decoder_mask: Any = None
    position_ids: Tensor | None = None
    has_cache: bool = False
    past: int | Tensor | None = None
    """Columns in the cache before this call; None if the cache can't tell."""
    length: int = 0
    """Columns of this call."""
    token_ids: Tensor | None = None
    """[B, length] int64, if the call was given any."""

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> Call:
        """From a forward's arguments by name, before it runs."""
        # the cache goes by many names
        cache = next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)
        ids = arguments.get("position_ids")
        inputs = (
            arguments.get(name) for name in ("decoder_input_ids", "input_ids", "inputs_embeds")
        )
        tokens = next(
            (value for value in inputs if isinstance(value, Tensor) and value.ndim >= 2), None
        )
        return cls(
            mask=arguments.get("attention_mask"),
            decoder_mask=arguments.get("decoder_attention_mask"),
            position_ids=ids if isinstance(ids, Tensor) and ids.ndim == 2 else None,
            has_cache=cache is not None,
            past=_length(cache),
            length=0 if tokens is None else tokens.shape[1],
            token_ids=None if tokens is None or tokens.is_floating_point() else tokens,
        )


class _Mask(NamedTuple):
    """Which of a call's columns hold real tokens."""

    width: int
    """How many columns it covers: those of the call, or those and all before them."""
    read: Callable[[], Tensor]
    """[B, width] bool."""

    def padding(self) -> Tensor:
        """[B] columns of padding."""
        return self.width - self.read().sum(-1)

    def now(self) -> _Mask:
        """The same, read now, so that nothing holds on to a large [B, heads, T, T] mask."""
        real = self.read().clone()
        return _Mask(self.width, lambda: real)


class Tokens:
    """Rows and positions of the B x T tokens of one residual stream, on its device.

    Args:
        x: [B, T, d], the stream; only shape and device are read.
        call: what the stack's owner was called with; None if somebody ran the blocks directly.
        generation: the `generate` call this forward belongs to, if any; its notes are brought up to
            date.
        decoding: whether `generate` extends this stack's sequence (an encoder's is all prompt).
        lanes: vectors that one token has, one after another; T counts them all.
    """

    def __init__(
        self,
        x: Tensor,
        call: Call | None,
        generation: Generation | None,
        decoding: bool,
        lanes: int = 1,
    ) -> None:
        self._batch, self._length, self._lanes = x.shape[0], x.shape[1] // lanes, lanes
        self._device, self._call = x.device, call or Call()
        self._past = _past(self._call, generation, self._length)
        self._mask = _mask(self._call, self._batch, self._past, self._length)
        self._rows = self._batch if generation is None else generation.rows or self._batch
        self._before: _Mask | None = None
        self._prompt_columns: int | None = None  # all are
        if generation is not None and decoding:
            self._before = generation.mask if self._past else None
            if self._mask is not None and self._mask.width == self._end:
                generation.mask = self._mask if _is_flat(self._call.mask) else self._mask.now()
            if generation.columns is None or not (generation.seen or generation.drafted):
                # PEFT may have put virtual tokens before what the user gave
                generation.columns = max(generation.columns or 0, self._end)
            self._prompt_columns = generation.columns

    @classmethod
    def at(cls, position: Tensor, prompt: Tensor, row: Tensor) -> Tokens:
        """Tokens whose answers are given: position and prompt [B, T], row [B]."""
        tokens = cls(position[..., None], None, None, True)
        tokens.__dict__.update(position=position, prompt=prompt, row=row, all_real=False)
        return tokens

    @cached_property
    def position(self) -> Tensor:
        """[B, T] int64, absolute; -1 for padding."""
        call, mask, columns = self._call, self._mask, self._columns
        padding = None if self._before is None else self._before.padding().to(self._device)
        # columns of padding before this call are no positions
        if padding is not None and len(padding) == self._batch:
            position = _given(call, columns - padding[:, None])
        else:
            position = _given(call, columns)
        if mask is not None:
            real = mask.read().to(self._device)
            # a real token's position is how many real ones stand before it
            counted = real.long().cumsum(-1)[:, -self._length :] - 1
            if mask.width == self._end and _is_flat(call.mask):
                position = counted
            elif call.position_ids is None and padding is None:
                # a 4-D mask tells what is real in this call, not how much of the past was
                position = counted + (0 if mask.width == self._end else self._past)
            position = torch.where(real[:, -self._length :], position, -1)
        return self._for_lanes(position)

    @cached_property
    def prompt(self) -> Tensor:
        """[B, T] bool: given by the user, not generated."""
        columns, given = self._columns, self._prompt_columns
        return self._for_lanes(
            torch.ones_like(columns, dtype=torch.bool) if given is None else columns < given
        )

    @cached_property
    def row(self) -> Tensor:
        """[B] int64: the user's row."""
        return torch.arange(self._batch, device=self._device) // max(1, self._batch // self._rows)

    @cached_property
    def real(self) -> Tensor:
        """[B, T] bool: not padding."""
        return self.position >= 0

    @cached_property
    def all_real(self) -> bool:
        """Whether no token is padding. False also where finding out would cost more than `real`."""
        call, mask = self._call, self._mask
        if mask is None:
            ids = call.position_ids
            if self._before is not None or ids is None:
                return self._before is None
            return ids.device.type == "cpu" and ids.numel() > 0 and int(ids.min()) >= 0
        if mask.width != self._end or not _is_flat(call.mask) or call.mask.device.type != "cpu":
            return False
        mostly = bool(call.mask.all())  # one operator, where a part takes three
        return mostly or bool(call.mask[:, self._past : self._end].all())

    def all_are(self, part: Literal["prompt", "generated"]) -> bool:
        """Whether all tokens belong to a part. False also where only `prompt` can tell."""
        if "prompt" in self.__dict__:  # given by `at`, or worked out already
            return False
        given = self._prompt_columns
        if part == "prompt":
            return given is None or self._end <= given
        return given is not None and self._past >= given

    @property
    def _end(self) -> int:
        """Columns up to the last of this call."""
        return self._past + self._length

    @property
    def _columns(self) -> Tensor:
        columns = torch.arange(self._past, self._end, device=self._device)
        return columns.expand(self._batch, self._length)

    def _for_lanes(self, tokens: Tensor) -> Tensor:
        return tokens if self._lanes == 1 else tokens.repeat_interleave(self._lanes, 1)


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _given(call: Call, default: Tensor) -> Tensor:
    ids = call.position_ids
    if ids is None or ids.shape[1] != default.shape[1] or ids.shape[0] not in (1, default.shape[0]):
        return default
    return ids.to(default.device).expand_as(default)


def _past(call: Call, generation: Generation | None, length: int) -> int:
    # what the cache says, else what the mask covers beyond this call, else what was seen
    if call.past is not None:
        return int(call.past)
    if _is_flat(call.mask) and call.mask.shape[1] > length:
        return int(call.mask.shape[1]) - length
    return generation.seen if call.has_cache and generation is not None else 0


def _mask(call: Call, batch: int, past: int, length: int) -> _Mask | None:
    """Of past + length columns, or of length; None if the call's mask does not tell."""
    mask = call.mask
    if isinstance(mask, Mapping):  # one 4-D mask for each kind of attention
        mask = mask.get(
            "full_attention", next((part for part in mask.values() if part is not None), None)
        )
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, batch):
        return None
    if mask.ndim == 2 and mask.shape[1] >= past + length:  # padded, of a static cache
        return _Mask(past + length, lambda: (mask[:, : past + length] != 0).expand(batch, -1))
    if mask.ndim == 2 and mask.shape[1] == length:
        return _Mask(length, lambda: (mask != 0).expand(batch, -1))
    if call.has_cache and call.past is None:
        return None  # a 4-D mask of a paged cache, with the requests' own blocks in no order
    if mask.ndim == 4 and mask.shape[-2] == length and mask.shape[-1] >= past + length:

        def read() -> Tensor:
            open_ = mask if mask.dtype == torch.bool else mask == 0
            # A real token always sees itself; padding is hidden from everyone, itself included.
            return open_[:, 0].diagonal(past, -2, -1)[:, :length].expand(batch, -1)

        return _Mask(length, read)
    return None


def _length(cache: Any) -> int | Tensor | None:
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except (AttributeError, TypeError, ValueError):  # tuples, and states without attention
        return None
    return length.clone() if isinstance(length, Tensor) else length
