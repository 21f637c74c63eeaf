"""Rows that already exist, in memory or on disk, shuffled exactly.

How    Rows lie in pieces (files, or one tensor). Each epoch puts the pieces in a new order and
       takes them in groups that fit the buffer; within a group all rows are permuted. If everything
       fits, that is one permutation of all rows. The cursor is a single number, the position in
       this endless sequence of rows, whatever the batch size and however many ranks share it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_switch_sae.activations.interface import Activations, check_same, check_share
from hf_switch_sae.activations.shuffle import order_of
from hf_switch_sae.errors import StoreError

_PIECES, _ROWS, _SAMPLE = 0, 1, 2  # mixed into the seed: each purpose gets an order of its own
_SAMPLED_PIECES = 16


class _Plan(NamedTuple):
    """The groups of an epoch."""

    epoch: int
    groups: list[list[int]]
    """The pieces in each group."""
    starts: list[int]
    """The epoch's row at which each group begins; one more entry, where the last group ends."""


class _Group(NamedTuple):
    """Rows that are in memory together."""

    epoch: int
    number: int
    pieces: list[int]
    rows: dict[str, Tensor]
    order: Tensor


class StoredActivations(Activations):
    """What cached and given activations share: the order of rows, and the cursor.

    Args:
        piece_rows: rows of each piece.
        buffer_rows: rows per group, at most; a larger piece is a group by itself.
        seed: decides the order of rows.
    """

    num_rows: int

    def __init__(self, piece_rows: Sequence[int], buffer_rows: int, seed: int) -> None:
        self._piece_rows, self._buffer_rows, self._seed = list(piece_rows), buffer_rows, seed
        self.num_rows = sum(self._piece_rows)
        self._done = 0
        self._iteration = 0
        self._plan: _Plan | None = None
        self._group: _Group | None = None
        self._memory: dict[str, Tensor] | None = None

    @abstractmethod
    def _load(
        self, pieces: Sequence[int], into: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """{hookpoint: [rows, d]} of some pieces, one after another.

        Written to the first rows of `into` if that is given, which comes from `_room`; otherwise to
        memory of their own.
        """

    def _room(self, rows: int) -> dict[str, Tensor] | None:
        """Memory for groups of up to `rows` rows, used again and again: fresh pages are slow."""
        return None

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """JSON-able: what tells these rows from others."""

    def sample(self, rows: int) -> dict[str, Tensor]:
        """Rows from all over the data, the same at every call; see `Activations.sample`."""
        # from many pieces, even if one holds enough rows: neighbors in the text are alike
        chosen: list[int] = []
        there = 0
        for piece in order_of(len(self._piece_rows), self._seed, _SAMPLE).tolist():
            if len(chosen) >= _SAMPLED_PIECES and there >= rows:
                break
            chosen.append(piece)
            there += self._piece_rows[piece]
        found: dict[str, list[Tensor]] = {name: [] for name in self.hookpoints}
        left = rows
        for piece in chosen:
            whole = self._piece_rows[piece]
            # each piece gives a share in proportion to its size
            some = min(left, math.ceil(rows * whole / there), whole)
            order = order_of(whole, self._seed, _SAMPLE, piece)[:some]
            for name, tensor in self._load([piece]).items():
                found[name].append(tensor[order.to(tensor.device)].float())
            left -= some
        return {name: torch.cat(some) for name, some in found.items()}

    def batches(
        self, batch_rows: int, rank: int = 0, world_size: int = 1, epochs: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """See `Activations.batches`. Each rank takes its slice of one batch, so two ranks with half
        the batch size see the same rows as one rank."""
        check_share(batch_rows, rank, world_size)
        step = batch_rows * world_size  # the cursor counts the rows of all ranks
        if self.num_rows * (epochs or 1) < step:
            raise StoreError(
                f"there are {self.num_rows:,} rows, fewer than a batch of {step:,}: take a smaller "
                "batch, or more text."
            )
        self._iteration += 1
        return self._iterate(batch_rows, rank, step, epochs, self._iteration)

    def state_dict(self) -> dict[str, Any]:
        """See `Activations.state_dict`; numbers only, the same for every rank."""
        return {
            "identity": {**self._identity(), "seed": self._seed},
            "buffer_rows": self._buffer_rows,
            "done": self._done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Activations.load_state_dict`."""
        check_same(state, {**self._identity(), "seed": self._seed}, "stored activations")
        self._buffer_rows, self._done = state["buffer_rows"], state["done"]
        self._iteration += 1
        self._plan = self._group = self._memory = None

    def estimate(self) -> dict[str, Any]:
        """See `Activations.estimate`."""
        return {
            "rows": self.num_rows,
            "buffer_rows": self._largest_group(),
            "groups_per_epoch": len(self._plan_of(0).groups),
        }

    # --- within -----------------------------------------------------------------------------------

    def _iterate(
        self, batch_rows: int, rank: int, step: int, epochs: int | None, iteration: int
    ) -> Iterator[dict[str, Tensor]]:
        end = None if epochs is None else self.num_rows * epochs
        while end is None or self._done + step <= end:
            if iteration != self._iteration:
                raise StoreError(
                    "these batches have been superseded: batches() or load_state_dict() was called "
                    "after them, and there is one cursor only."
                )
            batch = self._rows_from(self._done + rank * batch_rows, batch_rows)
            self._done += step  # before the yield: a state taken then is that of the next batch
            yield batch
        self._group = self._memory = None

    def _largest_group(self) -> int:
        return min(self.num_rows, max(self._buffer_rows, *self._piece_rows))

    def _rows_from(self, at: int, count: int) -> dict[str, Tensor]:
        """`count` rows of the endless sequence of epochs, beginning with row `at`."""
        parts: list[dict[str, Tensor]] = []
        while count:
            group, start = self._group_at(at)
            index = group.order[start : start + count]
            parts.append(
                {
                    name: rows.index_select(0, index.to(rows.device))
                    for name, rows in group.rows.items()
                }
            )
            at, count = at + len(index), count - len(index)
        return _joined(parts)

    def _group_at(self, at: int) -> tuple[_Group, int]:
        """The group that holds row `at` of all epochs, and that row's index in it."""
        epoch, within = divmod(at, self.num_rows)
        plan = self._plan_of(epoch)
        number = bisect_right(plan.starts, within) - 1
        group = self._group
        if group is None or (group.epoch, group.number) != (epoch, number):
            pieces = plan.groups[number]
            if group is not None and group.pieces == pieces:
                rows = group.rows  # a new epoch of data that fit the buffer: nothing to load
            else:
                group = self._group = None  # two groups at once would take twice the memory
                if self._memory is None:
                    self._memory = self._room(self._largest_group())
                rows = self._load(pieces, self._memory)
            count = plan.starts[number + 1] - plan.starts[number]
            order = order_of(count, self._seed, _ROWS, epoch, number)
            group = self._group = _Group(epoch, number, pieces, rows, order)
        return group, within - plan.starts[number]

    def _plan_of(self, epoch: int) -> _Plan:
        if self._plan is not None and self._plan.epoch == epoch:
            return self._plan
        groups: list[list[int]] = []
        starts = [0]
        # pieces in this epoch's order, each put into the last group if that has room
        for piece in order_of(len(self._piece_rows), self._seed, _PIECES, epoch).tolist():
            rows = self._piece_rows[piece]
            if groups and starts[-1] - starts[-2] + rows <= self._buffer_rows:
                groups[-1].append(piece)
                starts[-1] += rows
            else:
                groups.append([piece])
                starts.append(starts[-1] + rows)
        # sorted, so that a group of all pieces is the same in every epoch and need not be loaded
        # again; its rows are permuted anyway
        self._plan = _Plan(epoch, [sorted(group) for group in groups], starts)
        return self._plan


class TensorActivations(StoredActivations):
    """Activations in memory: {hookpoint: [rows, d]}, with equally many rows at each.

    Args:
        tensors: row i belongs to the same token at every hookpoint.
        policy: which tokens they are, if known; its `outlier_norm` goes into the SAE.
        seed: decides the order of rows.

    Raises:
        StoreError: there are no rows, or not equally many at each hookpoint.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        policy: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        # rows are drawn by index from all hookpoints at once
        counts = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise StoreError(f"activations need rows, equally many at each place: {counts}.")
        if any(t.ndim != 2 or not t.is_floating_point() for t in tensors.values()):
            raise StoreError("activations are floating tensors of [rows, d].")
        self._tensors = dict(tensors)
        self._policy = {"outlier_norm": {}, **(policy or {})}
        self.hookpoints = tuple(tensors)
        self.hidden_size = {name: tensor.shape[1] for name, tensor in tensors.items()}
        rows = next(iter(counts.values()))
        super().__init__([rows], rows, seed)  # one piece that fits: a permutation of all rows

    @property
    def policy(self) -> dict[str, Any]:
        """See `Activations.policy`."""
        return dict(self._policy)

    def _load(
        self, pieces: Sequence[int], into: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        return self._tensors

    def _identity(self) -> dict[str, Any]:
        return {
            "hidden_size": dict(self.hidden_size),
            "rows": self.num_rows,
            # a few numbers tell these tensors from others of the same shape
            "some": {
                name: [float(x) for x in tensor[[0, len(tensor) // 2, -1], 0].float()]
                for name, tensor in self._tensors.items()
            },
        }


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
