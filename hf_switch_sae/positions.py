"""Where the tokens of one forward pass stand: a model's call -> rows and absolute positions.

A residual stream [B, T, d] does not say which of the user's rows a batch row came from (beams and
return sequences multiply them), nor where in the text its T tokens stand (a KV cache hides what
came before). Both follow from the call: attention mask, position ids, length of the cache, and what
`generate` was given.

Positions count real tokens from 0 in each row, so they do not depend on padding, caching or the
number of tokens a step has; padding stands at -1 and is never edited.

Beware A cache grows while the blocks run: its length is read before the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    padding: Tensor | None = None
    """[B] columns of padding so far, for models that get no mask once they have a cache."""


@dataclass
class Call:
    """What bears on positions in one call of the module that owns a stack of blocks."""

    mask: Any = None
    """attention_mask as given: 2-D, 4-D, a dict of 4-D ones, or what else a kernel takes."""
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


@dataclass(frozen=True)
class Tokens:
    """Rows and positions of the B x T tokens of one residual stream, on its device."""

    position: Tensor
    """[B, T] int64, absolute; -1 for padding."""
    prompt: Tensor
    """[B, T] bool: given by the user, not generated."""
    row: Tensor
    """[B] int64: the user's row."""

    @property
    def real(self) -> Tensor:
        """[B, T] bool: not padding."""
        return self.position >= 0

    def lanes(self, count: int) -> Tokens:
        """The same where each token has `count` vectors, one after another: [B, T * count]."""
        if count == 1:
            return self
        position = self.position.repeat_interleave(count, 1)
        return Tokens(position, self.prompt.repeat_interleave(count, 1), self.row)

    @classmethod
    def of(
        cls, x: Tensor, call: Call | None, generation: Generation | None, decoding: bool
    ) -> Tokens:
        """Place the tokens of a residual stream x [B, T, d].

        Args:
            x: the stream; only shape and device are read.
            call: what the stack's owner was called with, or None if the blocks were run by
                themselves.
            generation: the `generate` call this forward belongs to, if any.
            decoding: whether `generate` extends this stack's sequence (an encoder's is all prompt).
        """
        (batch, length), device = x.shape[:2], x.device
        call = call or Call()
        past = _past(call, generation, length)
        real = _real(call, batch, past, length)
        columns = past + torch.arange(length, device=device).expand(batch, length)
        known = None if generation is None or not decoding or not past else generation.padding
        if known is not None and len(known) == batch:
            position = _given(call, columns - known.to(device)[:, None])
        else:
            position = _given(call, columns)
        if real is not None:
            real = real.to(device)
            counted = real.long().cumsum(-1)[:, -length:] - 1
            if real.shape[1] == past + length and generation is not None and decoding:
                generation.padding = columns[:, -1] - counted[:, -1]
            if real.shape[1] == past + length and _is_flat(call.mask):
                position = counted
            elif call.position_ids is None and known is None:
                # a 4-D mask tells what is real in this call, not how much of the past was
                position = counted + (0 if real.shape[1] == past + length else past)
            position = torch.where(real[:, -length:], position, -1)
        if generation is None or not decoding:
            prompt = torch.ones_like(columns, dtype=torch.bool)
        else:
            if generation.columns is None or not (generation.seen or generation.drafted):
                # more than the user gave, if PEFT put virtual tokens in front
                generation.columns = max(generation.columns or 0, past + length)
            prompt = columns < generation.columns
        return cls(position, prompt, _rows(batch, generation, device))


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def _given(call: Call, default: Tensor) -> Tensor:
    ids = call.position_ids
    if ids is None or ids.shape[1] != default.shape[1] or ids.shape[0] not in (1, default.shape[0]):
        return default
    return ids.to(default.device).expand_as(default)


def _rows(batch: int, generation: Generation | None, device: torch.device) -> Tensor:
    rows = generation.rows if generation is not None and generation.rows else batch
    return torch.arange(batch, device=device) // max(1, batch // rows)


def _past(call: Call, generation: Generation | None, length: int) -> int:
    if call.past is not None:
        return int(call.past)
    if _is_flat(call.mask) and call.mask.shape[1] > length:
        return int(call.mask.shape[1]) - length
    return generation.seen if call.has_cache and generation is not None else 0


def _real(call: Call, batch: int, past: int, length: int) -> Tensor | None:
    """[B, W] bool, W = past + length or length; None if the mask does not tell."""
    mask = call.mask
    if isinstance(mask, Mapping):  # one 4-D mask for each kind of attention
        mask = mask.get(
            "full_attention", next((part for part in mask.values() if part is not None), None)
        )
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, batch):
        return None
    if mask.ndim == 2 and mask.shape[1] in (length, past + length):
        return (mask != 0).expand(batch, -1)
    if mask.ndim == 2 and mask.shape[1] > past + length:  # padded to the size of a static cache
        return (mask[:, : past + length] != 0).expand(batch, -1)
    if call.has_cache and call.past is None:
        return None  # a 4-D mask of a paged cache, with the requests' own blocks in no order
    if mask.ndim == 4 and mask.shape[-2] == length and mask.shape[-1] >= past + length:
        open_ = mask if mask.dtype == torch.bool else mask == 0
        # A real token always sees itself; padding is hidden from everyone, itself included.
        return open_[:, 0].diagonal(past, -2, -1)[:, :length].expand(batch, -1)
    return None


def _length(cache: Any) -> int | Tensor | None:
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except (AttributeError, TypeError, ValueError):  # tuples, and states without attention
        return None
    return length.clone() if isinstance(length, Tensor) else length
