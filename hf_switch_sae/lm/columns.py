"""How the columns of one call lie: its cache, mask, position ids and packed texts -> `Columns`.

Room   What `positions.py` builds its answers on. Columns count what the batch holds, padding
       included, from the first that went into the cache.
Beware A cache grows while the blocks run, so its length is read before the first block. A mask is
       read late: until then it must not change in the columns of its call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.lm.calls import Call
from hf_switch_sae.lm.config import NO_FACTS, StreamFacts
from hf_switch_sae.lm.generation import Requests, Run, run_under_way
from hf_switch_sae.lm.masks import Mask, UnknownMask, mask_of
from hf_switch_sae.lm.packing import (
    Span,
    begun_anew,
    numbers_of,
    one_after_another,
    positions_in,
    tell_nothing,
    unknown,
)


class Columns:
    """What is known of the columns of one residual stream; `Tokens` says what it is given."""

    def __init__(
        self,
        x: Tensor,
        calls: Sequence[Call],
        decoding: bool = True,
        facts: StreamFacts = NO_FACTS,
        lanes: int = 1,
        block: Any = None,
        why: str = "",
    ) -> None:
        self._batch, self._length, self._lanes = x.shape[0], x.shape[1] // lanes, lanes
        self._device, self._calls, self._decoding = x.device, calls, decoding
        self._why, self._block, self._facts = why, block, facts
        if not calls:
            self._why = why or "the blocks were run without the model that owns them"
        self._call = calls[-1] if calls else None
        call = self._call
        if call is not None and (call.seams is not None or call.is_counted or facts.drops_mask):
            self.run  # noqa: B018 - asked for now, as it is gone when the forward is over

    @cached_property
    def real(self) -> Tensor:
        """[B, T] bool: not padding; all are where nobody can tell, as `position` then says."""
        mask, shape = self._mask, self._shape
        if self._is_packed:
            real = self._span >= 0
        elif mask is None or isinstance(mask, UnknownMask):
            real = torch.ones(shape, dtype=torch.bool, device=self._device)
            if (given := self._given_ids) is not None and not isinstance(mask, UnknownMask):
                real = (given >= 0).expand(shape)
        else:
            real = mask.read().to(self._device)[:, -self._length :]
        return self._for_lanes(real)

    @cached_property
    def run(self) -> Run | Requests | None:
        """The `generate` under way; None if there is none.

        Raises:
            EditError: the forward is over.
        """
        outer = self._calls[0] if self._calls else None
        if outer is not None and outer.is_over:
            raise unknown("rows and parts", "the forward is over")
        return run_under_way(self._calls)

    def _check_shared(self, asked: str, run: Requests, children: bool = False) -> None:
        """Raise where a request goes on with what was computed, and edited, for another one."""
        call, ids = self._known(asked), self._given_ids
        spans = [] if ids is None else list(zip(run.ids, self._spans or (), strict=True))
        shared = [
            name
            for name, (row, start, stop) in spans
            if start < stop and not call.has_begun(name, int(ids[row, start]), children)  # type: ignore[index]
        ]
        if shared:
            raise unknown(
                asked,
                f"{shared[0]} shares what another request has computed; with "
                "allow_block_sharing=False and one sequence a request it does not",
            )

    def _check_padding(self, asked: str) -> None:
        """Raise where a scope may reach padding; a single token is none."""
        if self._length > 1 and isinstance(self._mask, UnknownMask):
            raise unknown(asked, self._mask.why)

    def _known(self, asked: str) -> Call:
        if self._why or self._call is None:
            raise unknown(asked, self._why)
        return self._call

    def _appended(self) -> int:
        """How many of this call's tokens, the last ones, were generated."""
        call = self._known("prompt and generated")
        run, length = self.run, self._text_length
        if not self._decoding or (call.is_of_signal and not call.length):
            return 0
        if isinstance(run, Run) and run.generated is not None:
            return min(max(run.generated, 0) + self._facts.appends_column, length)
        growth = call.growth
        if growth is not None:
            past = self._past_columns
            # one that was emptied, or cut back into its prompt, begins anew
            return 0 if past < growth.prompt else min(past + length - growth.prompt, length)
        if call.has_cache and call.past is not None and not int(call.past):
            return 0
        if not call.has_cache and (run is None or call.begins_cache):
            return 0  # a plain forward, or the first of a loop of the user's
        why = "this forward goes on with a cache that was begun before the SAE was attached"
        if not call.has_cache and isinstance(run, Run):
            why = f"{run.name} decodes in a loop of its own, without a cache"
        raise unknown("prompt and generated", why)

    @property
    def _text_length(self) -> int:
        """Columns of this call's text, those before it included where the text comes last."""
        length = 0 if self._call is None or self._facts.text_last else self._call.length
        return length or self._length

    @cached_property
    def _past_columns(self) -> int:
        # what the cache says, else `generate`, else what the mask covers beyond this call
        call = self._call
        if call is None:
            return 0
        run = self.run if call.is_counted else None
        if isinstance(run, Run) and run.generated and run.length is not None:
            past = max(run.length + self._facts.appends_column - call.length, 0)
        elif call.past is not None:
            past = int(call.past)
        else:
            mask = call.mask
            wider = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > self._length
            past = mask.shape[1] - self._length if wider else 0
        # RWKV runs the last token of the past once more
        again = self._length - call.length if self._facts.text_last and call.length else 0
        return past - again if 0 < again <= past else past

    @property
    def _end(self) -> int:
        """Columns up to the last of this call."""
        return self._past_columns + self._length

    @property
    def _shape(self) -> tuple[int, int]:
        return self._batch, self._length

    @cached_property
    def _mask(self) -> Mask | UnknownMask | None:
        if self._why or self._call is None:
            return UnknownMask(self._why)
        if self._call.seams is not None:
            return None  # a mask of packed texts tells them apart, and hides no token from itself
        run = self.run if self._facts.drops_mask else None
        masked = self._block is not None or any(
            call.mask is not None or call.decoder_mask is not None for call in self._calls
        )
        if not masked and run is None:
            return None
        return mask_of(
            self._calls,
            self._decoding,
            self._batch,
            self._past_columns,
            self._length,
            self._block,
            self._facts,
            run.mask if isinstance(run, Run) else None,
        )

    @property
    def _mask_before(self) -> Mask | None:
        """The mask of what is in the cache, where this call's own does not cover it."""
        call = self._call
        growth = None if call is None else call.growth
        past = self._past_columns
        if growth is None or growth.mask is None or growth.covered < past:
            return None
        mask, read = growth.mask, growth.mask.read
        # a cache that was cut back has lost the last of its columns
        return mask if past >= mask.width else Mask(past, lambda: read()[:, :past])

    @property
    def _is_packed(self) -> bool:
        """Whether the call itself says where texts begin in a row."""
        return self._call is not None and self._call.seams is not None and self._spans is not None

    @cached_property
    def _given_ids(self) -> Tensor | None:
        call = self._call
        ids = None if call is None else call.position_ids
        if ids is None or ids.shape[1] != self._length or ids.shape[0] not in (1, self._batch):
            return None
        return ids.to(self._device)

    def _given(self, default: Tensor) -> Tensor:
        ids = self._given_ids
        ids = default if ids is None or tell_nothing(ids) else ids.long()
        return ids.expand(self._shape)

    @cached_property
    def _spans(self) -> list[Span] | None:
        """Texts packed into rows; None if every row is one text."""
        call, ids = self._call, self._given_ids
        if call is None:
            return None
        if call.seams is None:
            if ids is None or self._length == 1:
                return None
            real = self.real[:, :: self._lanes]
            return begun_anew(ids.expand(self._shape), real, self._mask is not None)
        run = self.run
        if isinstance(run, Requests):
            return one_after_another(list(accumulate(run.lengths, initial=0)), keep_empty=True)
        return one_after_another(call.seams.tolist()) if self._batch == 1 else None

    def _in_span(self, call: Call) -> Tensor:
        """[B, T] int64: positions within packed texts."""
        real, ids = self.real[:, :: self._lanes] & (self._span >= 0), self._given_ids
        if call.has_cache:  # the texts go on with what they have there
            if ids is None:
                raise unknown("positions", "packed texts go on with a cache, and no ids tell where")
            return torch.where(real, ids.long().expand(self._shape), -1)
        return positions_in(self._spans or (), self._span, real)

    @cached_property
    def _span(self) -> Tensor:
        """[B, T] int64: the number of each token's text among the packed ones; -1 in none."""
        return numbers_of(self._spans or (), self._shape, self._device)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _for_lanes(self, tokens: Tensor) -> Tensor:
        return tokens if self._lanes == 1 else tokens.repeat_interleave(self._lanes, 1)
