"""Whose each token of a residual stream is: the calls under way -> `Tokens`.

Room   For each of the B x T tokens: the row of the user it belongs to, its absolute position,
       whether it was given or generated, and whether it is real. All that is scoped asks here, and
       nobody else infers any of it. What can't be known raises `EditError`, which says why.
       Positions count real tokens from 0 in each text, so padding, caching and the number of tokens
       in a step do not move them. Padding has position -1 and is never edited. Columns count what
       the batch holds, padding included; only a mask [rows, columns] is given in them.
How    Most steps never ask, and each tensor operator costs about as much as a good part of the SAE
       itself. So `Tokens` works out each of its answers when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hf_switch_sae.lm.columns import Columns
from hf_switch_sae.lm.generation import Requests, Run, virtual_tokens
from hf_switch_sae.lm.masks import UnknownMask
from hf_switch_sae.lm.packing import unknown


class Tokens(Columns):
    """Rows, positions and parts of the tokens of one residual stream, on its device.

    Args:
        x: [B, T * lanes, d], the stream; only shape and device are read.
        calls: what the models around the stack are being called with, outermost first; empty if
            nobody called the one that owns it.
        decoding: whether `generate` extends this stack's sequence (an encoder's is all prompt).
        facts: what the models' configs say of the stream.
        lanes: vectors that one token has, one after another.
        block: the attention mask that arrives at the block, if one does.
        why: why nothing can be told of these tokens; "" if it can.
    """

    @classmethod
    def at(cls, position: Tensor, prompt: Tensor, row: Tensor) -> Tokens:
        """Tokens whose answers are given: position and prompt [B, T], row [B]."""
        tokens = cls(position[..., None], ())
        column = torch.arange(position.shape[1], device=position.device).expand_as(position)
        given = {"position": position, "column": column, "prompt": prompt, "all_real": False}
        given |= {"row": row[:, None].expand_as(position), "num_rows": int(row.max()) + 1}
        tokens.__dict__.update(given, real=position >= 0, batch_row=given["row"], prompt_columns=0)
        return tokens

    @cached_property
    def position(self) -> Tensor:
        """[B, T] int64, absolute; -1 for padding."""
        call = self._known("positions")
        if self._spans is not None:
            return self._for_lanes(self._in_span(call))
        mask = self._mask
        if isinstance(mask, UnknownMask):
            raise unknown("positions", mask.why)
        if call.length not in (0, self._length) and mask is None and not self._facts.text_last:
            why = f"the stream has {self._length} columns, the text {call.length} tokens"
            raise unknown("positions", why)
        columns = self._past_columns + torch.arange(self._length, device=self._device)
        before = self._mask_before
        # columns of padding before this call are no positions
        padding = None if before is None else before.padding().to(self._device)
        if padding is not None and len(padding) not in (1, self._batch) and bool(padding.any()):
            raise unknown("positions", "the rows of the cache are others than its mask was of")
        if padding is not None and len(padding) in (1, self._batch):
            columns = columns - padding[:, None]
        # what stands in a cache may have been padded: then ids know better than columns
        known = padding is not None or not self._past_columns
        position = columns.expand(self._shape) if known else self._given(columns)
        if mask is None:
            position = torch.where(self.real[:, :: self._lanes], position, -1)
        if mask is not None:
            real = mask.read().to(self._device)
            # a real token's position is how many real ones stand before it
            counted = real.long().cumsum(-1)[:, -self._length :] - 1
            if mask.width == self._end:
                position = counted
            elif self._given_ids is None and padding is None:
                if call.past is None or (call.has_cache and call.growth is None):
                    why = "the mask covers this call alone, and nobody saw what is in the cache"
                    raise unknown("positions", why)
                position = counted + self._past_columns
            position = torch.where(real[:, -self._length :], position, -1)
        return self._for_lanes(position)

    @cached_property
    def column(self) -> Tensor:
        """[B, T] int64: each token's column in the batch as it was given; negative before it."""
        call, run = self._known("a mask [rows, columns]"), self.run
        if isinstance(run, Requests) or call.length not in (0, self._length):
            why = "the columns of this stream are not those of the batch that was given"
            raise unknown("a mask [rows, columns]", why)
        first = self._past_columns - virtual_tokens()
        columns = first + torch.arange(self._length, device=self._device)
        return self._for_lanes(columns.expand(self._shape))

    @cached_property
    def prompt(self) -> Tensor:
        """[B, T] bool: given by the user, not generated."""
        self._known("prompt and generated")
        self._check_padding("prompt and generated")
        run = self.run
        if isinstance(run, Requests):
            self._check_shared("prompt and generated", run)
            prompts = self._ints([*run.prompts, 0])
            return self.position < prompts[self._for_lanes(self._span)]
        appended, length = self._appended(), self._text_length
        if 0 < appended < length != self._length:
            raise unknown("prompt and generated", "the stream's columns are not the text's tokens")
        columns = torch.arange(self._length, device=self._device)
        split = 0 if appended >= length else self._length - appended
        return self._for_lanes((columns < split).expand(self._shape))

    @cached_property
    def row(self) -> Tensor:
        """[B, T] int64: the user's row; of packed texts, their number; -1 for nobody's."""
        self._known("rows")
        self._check_padding("rows")
        run = self.run
        if isinstance(run, Requests):
            self._check_shared("rows", run)
            numbers = run.numbers()
            if numbers is None:
                raise unknown("rows", f"requests have names of their own: {', '.join(run.ids)}")
            return self._ints([*numbers, -1])[self._for_lanes(self._span)]
        if self._spans is not None:
            return self._for_lanes(self._span)
        return self._rows(run).expand(self._batch, self._length * self._lanes)

    @cached_property
    def num_rows(self) -> int | None:
        """How many rows the user gave; None where they come and go."""
        self._known("rows")
        run = self.run
        if isinstance(run, Requests):
            return None
        if self._spans is not None:
            return len(self._spans)
        if run is not None and run.numbers is not None:
            return run.total
        return int(self._rows(run).max()) + 1 if self._batch else 0

    @property
    def num_batch_rows(self) -> int | None:
        """How many rows `batch_row` counts; None where they come and go."""
        return self._batch if self._call is not None and self._spans is not None else self.num_rows

    @cached_property
    def batch_row(self) -> Tensor:
        """[B, T] int64: the row of the batch that was given, which packed texts share."""
        packed = self._spans is not None
        if not packed:
            return self.row
        rows = torch.arange(self._batch, device=self._device)[:, None]
        return rows.expand(self._batch, self._length * self._lanes)

    @cached_property
    def all_real(self) -> bool:
        """Whether no token is padding. False also where finding out would cost more than `real`."""
        mask = self._mask
        if isinstance(mask, UnknownMask):
            return True
        if mask is None:
            if self._is_packed:
                return bool((self._span >= 0).all())
            ids = self._given_ids
            if ids is None or ids.device.type != "cpu" or not ids.numel():
                return ids is None
            return int(ids if ids.numel() == 1 else ids.min()) >= 0
        if mask.width != self._end or mask.flat is None or mask.flat.device.type != "cpu":
            return False
        mostly = bool(mask.flat.all())  # one operator, where a part takes three
        return mostly or bool(mask.flat[:, -self._length :].all())

    def all_are(self, part: Literal["prompt", "generated"]) -> bool:
        """Whether all tokens belong to a part. False also where only `prompt` can tell."""
        if "prompt" in self.__dict__ or isinstance(self.run, Requests):
            return False
        self._check_padding("prompt and generated")
        appended = self._appended()
        return appended == 0 if part == "prompt" else appended >= self._text_length

    @cached_property
    def prompt_columns(self) -> int:
        """How many columns the prompt has, as far as it has come by."""
        call, run = self._known("a mask [rows, columns]"), self.run
        if isinstance(run, Run) and run.length is not None and run.generated is not None:
            return min(run.length - max(run.generated, 0), self._end - virtual_tokens())
        if call.growth is not None and self._past_columns >= call.growth.prompt:
            return call.growth.prompt - virtual_tokens()
        return self._end - self._appended() - virtual_tokens()

    def texts(self) -> list[tuple[Hashable, int, int, int]]:
        """Which text each stretch of tokens belongs to: (name, batch row, start, stop).

        A name stays the same over the calls that go on with a text; None is a text of this call
        alone.

        Raises:
            EditError: some of a text was computed for another one.
        """
        self._known("record")
        run = self.run
        if isinstance(run, Requests):
            self._check_shared("record", run, children=True)
        if self._spans is None:
            return [(row, row, 0, self._length) for row in range(self._batch)]
        named = run.ids if isinstance(run, Requests) else [None] * len(self._spans)
        return [(name, *span) for name, span in zip(named, self._spans, strict=True)]

    def _rows(self, run: Run | None) -> Tensor:
        outer, owner = self._calls[0], self._calls[-1]
        # an encoder reads what the user gave; a tower reads images, of which a row may have several
        is_inner = not self._decoding and not outer.reads_for_decoder
        is_tower = is_inner and outer.length and not owner.length
        if is_tower:
            raise unknown("rows", "this stack reads other inputs than the rows of text")
        if run is None:
            given = owner.batch if outer.is_pair else outer.batch
            if given not in (self._batch, self._batch * self._facts.codebooks):
                why = f"the stream has {self._batch} rows, the model was given {given}"
                raise unknown("rows", why)
            return torch.arange(self._batch, device=self._device)[:, None]
        numbers = run.row_of(self._batch)
        if numbers is None:
            why = f"{run.name} runs {self._batch} rows at once, and which they are it does not tell"
            raise unknown("rows", why)
        return self._ints(numbers)[:, None]
