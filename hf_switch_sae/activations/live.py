"""Rows straight from the language model, through a shuffle buffer of bounded memory.

How    The buffer is filled in generations: the rows left over from the generation before, then
       passes of the LM until it is full; their order is drawn from the seed and the generation's
       number, and they are handed out. Nothing else is mixed in, so a generation is known by the
       cursor at which its text begins and by the rows carried into it.
Beware After a resume the generation at hand is computed again before the first batch comes: exact,
       for up to one buffer of LM time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae.activations.harvest import Harvest
from hf_switch_sae.activations.interface import Activations, check_same, check_share
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.activations.shuffle import default_buffer_bytes, default_buffer_rows, order_of
from hf_switch_sae.errors import HookpointError, StoreError, TextError, TrainingError, WidthError
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.text.contexts import Context, Cursor


class LiveActivations(Activations):
    """Activations of a language model over text, computed as they are used.

    With several places one pass of the language model serves them all. Under several ranks each
    reads its own share of the contexts, and how many rows it gets depends on its text: let the
    steps, not the epochs, end such a run.

    Args:
        lm: in eval mode; on one device or spread by a `device_map`, quantised or not; it may be
            another device and dtype than the SAE's.
        places: layers, hookpoints or module paths.
        documents: what `text.read_documents` takes: files, a folder, a Hub id, a data set, a list.
        tokenizer: the model's; not needed for documents of token ids.
        settings: how text becomes rows.

    Raises:
        AttachError, HookpointError: the model is in training mode, or has no such place.
        TextError: an empty data set, texts shorter than a context, a tokenizer of another model.
    """

    def __init__(
        self,
        lm: nn.Module,
        places: int | str | Sequence[int | str],
        documents: Any,
        tokenizer: Any = None,
        settings: ActivationSettings | None = None,
    ) -> None:
        self._harvest = harvest = Harvest(lm, places, documents, tokenizer, settings)
        self._settings = harvest.settings
        self.hookpoints, self.hidden_size = harvest.hookpoints, harvest.hidden_size
        self.num_rows = None
        kept_in = self._settings.dtype
        self._dtype = {
            name: getattr(torch, kept_in) if kept_in else dtype
            for name, dtype in harvest.dtype.items()
        }
        self._buffer_rows = self._rows_that_fit()
        self._share: tuple[int, int] | None = None
        self._generation, self._start, self._done = 0, Cursor(), 0
        self._carried: dict[str, Tensor] = {}
        self._iteration = 0

    @property
    def policy(self) -> dict[str, Any]:
        """See `Activations.policy`."""
        return self._harvest.policy_dict()

    def sample(self, rows: int) -> dict[str, Tensor]:
        """The data set's first rows; see `Activations.sample`."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.hookpoints}
        count = 0
        with closing(self._harvest.passes(self._harvest.contexts(epochs=1))) as passes:
            for each in passes:
                for name, some in each.rows.items():
                    found[name].append(some.float())
                count += len(each.token_ids)
                if count >= rows:
                    break
        return {name: torch.cat(some)[:rows] for name, some in found.items()}

    def batches(
        self, batch_rows: int, rank: int = 0, world_size: int = 1, epochs: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """See `Activations.batches`."""
        check_share(batch_rows, rank, world_size)
        if batch_rows > self._buffer_rows:
            raise StoreError(
                f"a batch of {batch_rows:,} rows does not fit the shuffle buffer of "
                f"{self._buffer_rows:,}: give more buffer_bytes, or a smaller batch."
            )
        if self._share not in (None, (rank, world_size)):
            raise StoreError(
                f"the saved cursor is that of rank {self._share}, and this is rank "
                f"{(rank, world_size)} (rank, of how many): live activations go on with as many "
                "processes as they began with; cached ones with any number."
            )
        self._share = (rank, world_size)
        self._iteration += 1
        return self._iterate(batch_rows, epochs, self._iteration)

    def state_dict(self) -> dict[str, Any]:
        """See `Activations.state_dict`: some numbers, and fewer rows than a batch."""
        return {
            "identity": self._identity(),
            "outlier_norm": dict(self._harvest.policy.outlier_norm),
            "buffer_rows": self._buffer_rows,
            "share": self._share and list(self._share),
            "generation": self._generation,
            "start": self._start.to_dict(),
            "done": self._done,
            "carried": dict(self._carried),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Activations.load_state_dict`."""
        check_same(state, self._identity(), "live activations")
        self._harvest.set_outlier_norm(state["outlier_norm"])
        self._buffer_rows = state["buffer_rows"]
        share = state["share"]
        self._share = None if share is None else (share[0], share[1])
        self._generation, self._done = state["generation"], state["done"]
        self._start = Cursor(**state["start"])
        self._carried = dict(state["carried"])
        self._iteration += 1

    def estimate(self) -> dict[str, Any]:
        """See `Activations.estimate`."""
        harvest, rows = self._harvest, self._buffer_rows + self._harvest.tokens_per_pass
        return {
            "buffer_rows": self._buffer_rows,
            "buffer_bytes": rows * self._row_bytes(),
            "tokens_before_first_batch": self._buffer_rows,
            "contexts_per_buffer": -(-self._buffer_rows // self._settings.context),
            "context": self._settings.context,
            "contexts_per_pass": harvest.contexts_per_pass,
            "tokens_per_pass": harvest.tokens_per_pass,
            "documents": harvest.documents.count,
        }

    # --- within -----------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {
            **self._harvest.identity(),
            "contexts_per_pass": self._harvest.contexts_per_pass,
            "dtype": {name: str(dtype) for name, dtype in self._dtype.items()},
            "seed": self._settings.seed,
        }

    def _row_bytes(self) -> int:
        return sum(width * self._dtype[name].itemsize for name, width in self.hidden_size.items())

    def _rows_that_fit(self) -> int:
        """Rows of a full buffer; a pass of the LM more has room."""
        device = next(iter(self._harvest.device.values()))
        given = self._settings.buffer_bytes
        room = (given or default_buffer_bytes(device)) // self._row_bytes()
        rows = room - self._harvest.tokens_per_pass
        if rows < 1:
            raise StoreError(
                f"buffer_bytes={given or default_buffer_bytes(device):,} holds {room:,} rows, no "
                f"more than one pass of the language model ({self._harvest.tokens_per_pass:,} "
                "tokens): give more, or fewer tokens_per_pass."
            )
        return rows if given else min(rows, default_buffer_rows(device))

    def _iterate(
        self, batch_rows: int, epochs: int | None, iteration: int
    ) -> Iterator[dict[str, Tensor]]:
        assert self._share is not None
        rank, world_size = self._share
        contexts = self._harvest.contexts(self._start, epochs, rank, world_size)
        capacity = self._buffer_rows + self._harvest.tokens_per_pass
        buffer = {
            name: torch.empty(
                capacity, width, dtype=self._dtype[name], device=self._harvest.device[name]
            )
            for name, width in self.hidden_size.items()
        }
        seed = (self._settings.seed, rank, world_size)
        nothing_yet = self._generation == 0 and self._done == 0
        has_ended = False
        while not has_ended:
            count, end, has_ended = self._fill(buffer, contexts)
            order = order_of(count, *seed, self._generation)
            starts = range(self._done, count + 1, batch_rows)
            for start, stop in pairwise(starts):
                self._check_alone(iteration)
                index = order[start:stop]
                batch = {name: _gather(rows, index) for name, rows in buffer.items()}
                self._done, nothing_yet = stop, False
                if stop == starts[-1]:  # before it is handed out: nothing of these is needed again
                    self._next_generation(buffer, order[stop:], end)
                yield batch
            if len(starts) < 2:
                self._check_alone(iteration)
                self._next_generation(buffer, order[self._done :], end)
        if nothing_yet:
            raise TextError(
                f"this rank's share of the text has {count} rows to train on, fewer than a batch "
                f"of {batch_rows}."
            )

    def _fill(
        self, buffer: dict[str, Tensor], contexts: Iterator[Context]
    ) -> tuple[int, Cursor, bool]:
        """Rows in the buffer, the cursor after them, and whether the text has ended."""
        filled = 0
        for name, rows in self._carried.items():
            filled = len(rows)
            buffer[name][:filled] = rows.to(buffer[name].device)
        end = self._start
        with closing(self._harvest.passes(contexts)) as passes:
            for found in passes:
                count = len(found.token_ids)
                for name, rows in found.rows.items():
                    buffer[name][filled : filled + count] = rows
                filled, end = filled + count, found.end
                if filled >= self._buffer_rows:
                    return filled, end, False
        return filled, end, True

    def _next_generation(self, buffer: dict[str, Tensor], left: Tensor, end: Cursor) -> None:
        self._carried = {name: _gather(rows, left).cpu() for name, rows in buffer.items()}
        self._generation, self._start, self._done = self._generation + 1, end, 0

    def _check_alone(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise StoreError(
                "these batches have been superseded: batches() or load_state_dict() was called "
                "after them, and there is one cursor only."
            )


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.to(rows.device))


def activations_for(
    saes: Mapping[str, SwitchSAE],
    dataset: Any,
    lm: nn.Module | None,
    tokenizer: Any,
    settings: ActivationSettings | None,
) -> Activations:
    """The rows of a data set, or the activations that it is; checked to fit the SAEs.

    Raises:
        TrainingError: nothing to train on, or texts without a language model.
        HookpointError, WidthError: the activations are of other places, or of another width.
        TextError: see `LiveActivations`.
    """
    places = list(dict.fromkeys(str(sae.config.hookpoint) for sae in saes.values()))
    if dataset is None:
        raise TrainingError("there is nothing to train on: give train_dataset, texts or rows.")
    if isinstance(dataset, Activations):
        found = dataset
    elif lm is None:
        raise TrainingError("texts need a language model to become rows: give lm.")
    else:
        found = LiveActivations(lm, places, dataset, tokenizer, settings)
    for name, sae in saes.items():
        place = str(sae.config.hookpoint)
        if place not in found.hookpoints:
            raise HookpointError(
                f"the SAE {name} reads {place}; the activations are of "
                f"{', '.join(found.hookpoints)}."
            )
        if found.hidden_size[place] != sae.config.hidden_size:
            raise WidthError(
                f"the SAE {name} has hidden_size={sae.config.hidden_size}, and the rows at {place} "
                f"are {found.hidden_size[place]} wide: set hidden_size, or use SwitchSAE.for_lm."
            )
    return found
