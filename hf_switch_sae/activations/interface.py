"""What a trainer takes its rows from: one interface for live, cached and given activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hf_switch_sae.errors import StoreError


class Activations(ABC):
    """Shuffled rows of residual streams, in batches, with an exact cursor.

    Row i belongs to the same token at every hookpoint. Two objects made with the same arguments
    give the same batches, and so does one that has loaded another's state.
    """

    hookpoints: tuple[str, ...]
    """Their names."""
    hidden_size: dict[str, int]
    """Hookpoint -> width of its rows."""
    num_rows: int | None
    """Rows per epoch; None if that is not known before the text has been read."""

    @property
    @abstractmethod
    def policy(self) -> dict[str, Any]:
        """JSON-able: which tokens are kept (see `TokenPolicy`), and how text became contexts.

        `policy["outlier_norm"]` is {hookpoint: largest norm kept}, for the SAE's `outlier_norm`.
        """

    @abstractmethod
    def sample(self, rows: int) -> dict[str, Tensor]:
        """{hookpoint: [<= rows, d] float32}, kept rows only; does not move the cursor."""

    @abstractmethod
    def batches(
        self, batch_rows: int, rank: int = 0, world_size: int = 1, epochs: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's batches, from the cursor on; each batch moves the cursor.

        Args:
            batch_rows: rows per batch of this rank; all ranks together take `world_size` times
                as many.
            rank, world_size: which of how many processes this is.
            epochs: stop after so many passes over the data, counted from the very beginning, not
                from the cursor; never by default. Rows that don't fill a batch are carried into
                the next epoch, and dropped after the last.

        Yields:
            {hookpoint: [batch_rows, d]} in the dtype and on the device that rows are kept in.

        Raises:
            StoreError: there are too few rows for a single batch, or the state that was loaded
                belongs to another rank.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The cursor: after `load_state_dict` the same batches follow, bit for bit.

        It holds plain numbers, texts and tensors. With live activations each rank has its own.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken.

        Raises:
            StoreError: the state was taken from other activations.
        """

    @abstractmethod
    def estimate(self) -> dict[str, Any]:
        """JSON-able, to print before a run: the buffer's rows and bytes, and what fills it."""


def check_share(batch_rows: int, rank: int, world_size: int) -> None:
    """Raise StoreError unless there is a batch, and the rank is one of `world_size`."""
    if batch_rows < 1:
        raise StoreError(f"batch_rows={batch_rows} is not at least 1.")
    if not 0 <= rank < world_size:
        raise StoreError(f"rank={rank} is not one of 0 to world_size - 1 = {world_size - 1}.")


def check_same(state: Mapping[str, Any], mine: Mapping[str, Any], what: str) -> None:
    """Raise StoreError if a state is of other rows than `mine`, naming what differs."""
    theirs = state.get("identity")
    if not isinstance(theirs, Mapping):
        raise StoreError(f"this is no state of {what}.")
    other = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    if other:
        raise StoreError(
            f"the saved cursor is of other {what}: {', '.join(other)} differ. Here "
            f"{ {name: mine.get(name) for name in other} }, saved "
            f"{ {name: theirs.get(name) for name in other} }. Go on with what the run began with, "
            "or begin a new run."
        )
