"""Where a trainer's rows come from: one interface for live, cached and given activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hf_switch_sae.errors import StoreError


class Activations(ABC):
    """Shuffled rows of residual streams, in batches, with an exact cursor.

    Row i of every hookpoint is the same token's. Two objects made with the same arguments give the
    same batches, and so does one that was given another's state.
    """

    hookpoints: tuple[str, ...]
    """Names of the places."""
    hidden_size: dict[str, int]
    """Hookpoint -> d."""
    num_rows: int | None
    """Rows an epoch has; None if only reading tells."""

    @property
    @abstractmethod
    def policy(self) -> dict[str, Any]:
        """JSON-able: which tokens are kept (see `TokenPolicy`), and how text became contexts.

        `policy["outlier_norm"]` is {hookpoint: largest norm kept}, for the SAE's `outlier_norm`.
        """

    @abstractmethod
    def sample(self, rows: int) -> dict[str, Tensor]:
        """{hookpoint: [<= rows, d] float32}, kept rows only; the cursor stays where it is."""

    @abstractmethod
    def batches(
        self, batch_rows: int, rank: int = 0, world_size: int = 1, epochs: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's batches, from the cursor on, which moves as they are handed out.

        Args:
            batch_rows: rows a batch of this rank; all ranks together take `world_size` times that.
            rank, world_size: which of how many processes this is.
            epochs: stop when the data were gone through so often, counted from the very beginning
                and not from the cursor; never by default. Rows that don't fill a batch are carried
                into the next epoch, and left out after the last.

        Yields:
            {hookpoint: [batch_rows, d]} in the dtype and on the device that rows are kept in.

        Raises:
            StoreError: too few rows for a single batch, or a rank that the state is not of.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The cursor: after `load_state_dict` the batches that follow are the same, bit for bit.

        Plain numbers, texts and tensors. Of the live kind each rank has its own.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            StoreError: the state is of other activations.
        """

    @abstractmethod
    def estimate(self) -> dict[str, Any]:
        """JSON-able, to print before a run: rows and bytes of the buffer, and what fills it."""


def check_share(batch_rows: int, rank: int, world_size: int) -> None:
    """Raise StoreError unless the numbers make sense."""
    if batch_rows < 1:
        raise StoreError(f"batch_rows={batch_rows} is not at least 1.")
    if not 0 <= rank < world_size:
        raise StoreError(f"rank={rank} is not one of 0 to world_size - 1 = {world_size - 1}.")


def check_same(state: Mapping[str, Any], mine: Mapping[str, Any], what: str) -> None:
    """Raise StoreError if a state's identity is another, naming what differs."""
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
