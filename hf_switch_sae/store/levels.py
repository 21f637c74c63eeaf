"""Which ranks of a feature the index keeps in exact order, and how the others lie in levels.

Room   a feature's count -> its pinned ranks and its levels; rows in exact order -> as they are
       stored; ranks -> where they are stored.
Why    Sorted by act alone, each row number is news to the last one. Sorted by row within levels of
       similar acts, only the small gaps between them need be written, and one act a level.
Format Ranks count from 0, the largest act; of equal acts, the earlier row's. Pinned are the first
       64, and 16 around each quartile and at the end: stored first, by rank. Then the levels:
       from rank 64 on, each of as many ranks as are before it, but at most a quarter of all and at
       least 64. The pinned ranks left out, a level's rows are stored by row: rising in its first
       level, falling in the next, and so on, so that the gap between two levels is small too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_TOP = 64
_AROUND = 8
_QUANTILES = (0.75, 0.5, 0.25, 0.0)
_SHARE = 4


def rank_at(quantile: float, count: int) -> int:
    """The rank of a quantile of a feature's acts: 0 is the weakest act, 1 the strongest."""
    return round((1 - quantile) * (count - 1))


class Levels:
    """How ranks `start` to `stop` of a feature of `count` tokens lie in one file."""

    def __init__(self, count: int, start: int = 0, stop: int | None = None) -> None:
        self.start, self.stop = start, count if stop is None else stop
        pinned = _pinned(count)
        self.pinned = pinned[(pinned >= self.start) & (pinned < self.stop)]
        """Ranks, rising; the first that are stored."""
        inner = [each for each in _edges(count) if self.start < each < self.stop]
        edges = np.array([self.start, *inner, self.stop], np.int64)
        begins = len(self.pinned) + edges - self.start - np.searchsorted(self.pinned, edges)
        filled = np.diff(begins) > 0
        self.edges = np.stack([edges[:-1], edges[1:]], 1)[filled]
        """[levels, 2], first rank and the one after the last, pinned ones between them."""
        self.begins = np.stack([begins[:-1], begins[1:]], 1)[filled]
        """[levels, 2], where its rows begin and end in the file, from the first pinned one on."""

    def members(self, level: int) -> Array:
        """The ranks of a level, rising, those that are pinned left out."""
        ranks = np.arange(*self.edges[level])
        low, high = np.searchsorted(self.pinned, self.edges[level])
        return np.delete(ranks, self.pinned[low:high] - ranks[0])

    def stored_at(self, ranks: Array) -> Array:
        """Where tokens of about these ranks lie, [n]: just these if pinned, else of their level."""
        before = np.searchsorted(self.pinned, ranks)
        is_pinned = np.isin(ranks, self.pinned)
        return np.where(is_pinned, before, len(self.pinned) + ranks - self.start - before)

    def arrange(self, acts: Array, rows: Array) -> Array:
        """Put acts and rows, [ranks] in exact order, into the order they are stored in, in place.

        An act that is not pinned becomes the smallest of its level.

        Returns:
            [ranks] bool: whether the act there is that row's own.
        """
        exact = np.zeros(len(rows), bool)
        exact[self.pinned - self.start] = True
        here = len(self.pinned)
        new_rows = np.concatenate([rows[exact], rows[~exact]])
        new_acts = np.concatenate([acts[exact], acts[~exact]])
        for level, (low, high) in enumerate(self.begins.tolist()):
            some = new_rows[low:high]
            some.sort()
            if level % 2:
                some[:] = some[::-1].copy()
            new_acts[low:high] = new_acts[high - 1]
        acts[:], rows[:] = new_acts, new_rows
        exact[:here], exact[here:] = True, False
        return exact


def _pinned(count: int) -> Array:
    ranks = {*range(min(_TOP, count))}
    for quantile in _QUANTILES:
        start = max(0, min(rank_at(quantile, count) - _AROUND, count - 2 * _AROUND))
        ranks.update(range(start, min(count, start + 2 * _AROUND)))
    return np.array(sorted(ranks), np.int64)


def _edges(count: int) -> list[int]:
    edges = [_TOP]
    while edges[-1] < count:
        edges.append(edges[-1] + max(_TOP, min(edges[-1], count // _SHARE)))
    return edges
