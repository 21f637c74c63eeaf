"""Rows straight from the language model, through a shuffle buffer of bounded memory.

How    The buffer is filled in generations: first the rows left over from the last one, then
       passes of the LM until it is full. The seed and the generation's number decide the order in
       which they are handed out. Nothing else is mixed in, so the cursor at which a generation's
       text begins and the rows carried into it are all that a resume needs.
Beware A resume computes the current generation again before its first batch. The rows are exactly
       the same, but it takes the LM's time for up to one buffer.
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
from hf_switch_sae.text.contexts import Context, Cursor


class LiveActivations(Activations):
    """Activations of a language model over text, computed as they are used.

    One pass of the language model serves several hookpoints. Each of several ranks reads its own
    share of the contexts, and how many rows it gets depends on its text, so let steps, not
    epochs, end such a run.

    Args:
        lm: in eval mode; on one device or spread by a `device_map`, quantized or not. Its device
            and dtype need not be the SAE's.
        hookpoints: layers, hookpoints or module paths.
        documents: anything that `text.read_documents` takes: files, a folder, a Hub id, a data
            set, a list.
        tokenizer: the model's; not needed for documents of token ids.
        settings: how text becomes rows.

    Raises:
        AttachError, HookpointError: the model is in training mode, or has no such hookpoint.
        TextError: the data set is empty, its texts are shorter than a context, or the tokenizer
            is another model's.
    """

    def __init__(
        self,
        lm: nn.Module,
        hookpoints: int | str | Sequence[int | str],
        documents: Any,
        tokenizer: Any = None,
        settings: ActivationSettings | None = None,
    ) -> None:
        self._harvest = harvest = Harvest(lm, hookpoints, documents, tokenizer, settings)
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
        # the cursor: a generation, where its text begins, how many of its rows are handed out
        self._generation, self._start, self._done = 0, Cursor(), 0
        self._carried: dict[str, Tensor] = {}
        # counts calls of batches() and load_state_dict(): each ends the iterators before it
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
        """See `Activations.state_dict`: numbers, and fewer rows than a batch."""
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
        # bounds and buffer decide which rows come and in which order, so they are the run's too
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
        """Rows of a full buffer; memory for one more pass of the LM is set aside."""
        device = next(iter(self._harvest.device.values()))
        given = self._settings.buffer_bytes
        room = (given or default_buffer_bytes(device)) // self._row_bytes()
        # the pass that fills the buffer may need room beyond it
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
        # the pass that fills the buffer may reach beyond its end
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
            # after a resume `_done` rows of this generation are skipped
            starts = range(self._done, count + 1, batch_rows)
            for start, stop in pairwise(starts):
                self._check_alone(iteration)
                index = order[start:stop]
                batch = {name: _gather(rows, index) for name, rows in buffer.items()}
                self._done, nothing_yet = stop, False
                if stop == starts[-1]:
                    # before the last batch is handed out, so that a state taken after it does not
                    # need this generation again
                    self._next_generation(buffer, order[stop:], end)
                yield batch
            if len(starts) < 2:  # not one batch: carry all rows, or the text has ended
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
        """Fill the buffer; returns its rows, the cursor after them, and whether the text ended."""
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
    readers: Mapping[str, tuple[str, int]],
    dataset: Any,
    lm: nn.Module | None,
    tokenizer: Any,
    settings: ActivationSettings | None,
) -> Activations:
    """Activations of a data set, or the data set itself if it is some; checked to fit the SAEs.

    Args:
        readers: name of each SAE -> (the hookpoint it reads, its hidden_size).
        dataset: anything that `text.read_documents` takes, or `Activations`.
        lm, tokenizer, settings: see `LiveActivations`; not used with `Activations`.

    Raises:
        TrainingError: there is nothing to train on, or there are texts but no language model.
        HookpointError, WidthError: the activations lack a hookpoint, or have another width.
        TextError: see `LiveActivations`.
    """
    if dataset is None:
        raise TrainingError("there is nothing to train on: give train_dataset, texts or rows.")
    if isinstance(dataset, Activations):
        found = dataset
    elif lm is None:
        raise TrainingError("texts need a language model to become rows: give lm.")
    else:
        hookpoints = list(dict.fromkeys(hookpoint for hookpoint, _ in readers.values()))
        found = LiveActivations(lm, hookpoints, dataset, tokenizer, settings)
    # activations that were made elsewhere may be of anything
    for name, (hookpoint, hidden_size) in readers.items():
        if hookpoint not in found.hookpoints:
            raise HookpointError(
                f"the SAE {name} reads {hookpoint}; the activations are of "
                f"{', '.join(found.hookpoints)}."
            )
        if found.hidden_size[hookpoint] != hidden_size:
            raise WidthError(
                f"the SAE {name} has hidden_size={hidden_size}, and the rows at {hookpoint} "
                f"are {found.hidden_size[hookpoint]} wide: set hidden_size, or use "
                "SwitchSAE.for_lm."
            )
    return found
