"""Activations -> a `DataLoader` for `transformers.Trainer`.

Beware A resumed `Trainer` skips the batches that the run has had by drawing them. Here the cursor
       already stands behind those, so as many empty batches are handed out to be skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hf_switch_sae.activations.interface import Activations


class Stream(IterableDataset):
    """This process's batches; each pass over it continues where the last one ended.

    Args:
        activations: the rows.
        batch_rows: rows per batch of this process.
        rank, world_size: which of how many processes this is.
    """

    def __init__(
        self, activations: Activations, batch_rows: int, rank: int, world_size: int
    ) -> None:
        self._activations, self._share = activations, (batch_rows, rank, world_size)
        self._batches: Iterator[dict[str, Tensor]] | None = None
        rows = activations.num_rows
        # the same on every process: one with a batch more would wait for the others forever
        self.length = None if rows is None else max(1, rows // (batch_rows * world_size))
        """Batches per epoch; None if that is not known."""
        self.to_skip = 0
        """How many empty batches to hand out first."""

    def __iter__(self) -> Iterator[dict[str, Tensor] | None]:
        if self._batches is None:
            self._batches = self._activations.batches(*self._share)
        drawn = 0
        while self.to_skip:
            self.to_skip, drawn = self.to_skip - 1, drawn + 1
            yield None
        while self.length is None or drawn < self.length:
            batch = next(self._batches, None)
            if batch is None:
                return
            drawn += 1
            yield batch

    def loader(self) -> DataLoader:
        """As a DataLoader, which has a length if the activations have one."""
        kind = _Measured if self.length is not None else DataLoader
        # the stream gives out batches, so the loader must neither batch nor collate
        return kind(self, batch_size=None, collate_fn=_as_is)


class _Measured(DataLoader):
    # `Trainer` plans epochs by a loader's length; the Stream has none if its rows are not counted
    def __len__(self) -> int:
        dataset: Any = self.dataset
        return int(dataset.length)


def _as_is(batch: Any) -> Any:
    return batch
