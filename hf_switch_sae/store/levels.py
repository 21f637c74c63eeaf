"""Which ranks of a feature the index keeps in exact order, and how the others lie in levels.

Room   a feature's count -> its pinned ranks and its levels; rows in exact order -> the order in
       which they are stored; ranks -> where they are stored.
Why    Sorted by act alone, row numbers jump about and don't compress. Sorted by row within levels
       of similar acts, only the small gaps between rows need to be written, and one act per level.
Format Ranks count from 0, the largest act; of equal acts the earlier row comes first. Pinned are
       the first 64 ranks, 16 around each quartile, and the last 16: they are stored first, ordered
       by rank. The levels follow, from rank 64 on: each has as many ranks as there are before it,
       but at least 64 and at most a quarter of all. A level's rows, without the pinned ones, are
       stored by row: rising in the first level, falling in the second, and so on, so that the gap
       from one level to the next is small too.
"""

from __future__ import annotations

import numpy as np

from hf_switch_sae.store.rows import Array

_TOP = 64
_AROUND = 8
_QUANTILES = (0.75, 0.5, 0.25, 0.0)
_SHARE = 4


def rank_at(quantile: float, count: int) -> int:
    """The rank of a quantile of a feature's acts: 0 is the weakest act, 1 the strongest."""
    return round((1 - quantile) * (count - 1))


def ranks_near(quantile: float, count: int, n: int) -> tuple[int, int]:
    """The n ranks nearest to a quantile of `count` acts, as start and stop."""
    start = max(0, min(rank_at(quantile, count) - n // 2, count - n))
    return start, start + n


class Levels:
    """How ranks `start` to `stop` of a feature with `count` tokens lie in one file."""

    def __init__(self, count: int, start: int = 0, stop: int | None = None) -> None:
        self.start, self.stop = start, count if stop is None else stop
        pinned = _pinned(count)
        self.pinned = pinned[(pinned >= self.start) & (pinned < self.stop)]
        """The pinned ranks, rising; they are stored first."""
        inner = [each for each in _edges(count) if self.start < each < self.stop]
        edges = np.array([self.start, *inner, self.stop], np.int64)
        # a level begins after all pinned rows and after the unpinned rows of lower rank
        begins = len(self.pinned) + edges - self.start - np.searchsorted(self.pinned, edges)
        filled = np.diff(begins) > 0
        self.edges = np.stack([edges[:-1], edges[1:]], 1)[filled]
        """[levels, 2]: a level's first rank and the one after its last, pinned ones included."""
        self.begins = np.stack([begins[:-1], begins[1:]], 1)[filled]
        """[levels, 2]: where a level's rows begin and end, counted from the first pinned row."""

    def members(self, level: int) -> Array:
        """The ranks of a level, rising, without the pinned ones."""
        ranks = np.arange(*self.edges[level])
        low, high = np.searchsorted(self.pinned, self.edges[level])
        return np.delete(ranks, self.pinned[low:high] - ranks[0])

    def stored_at(self, ranks: Array) -> Array:
        """Where to read tokens of about these ranks, [n].

        A pinned rank is found exactly; any other is answered by some token of the same level.
        """
        before = np.searchsorted(self.pinned, ranks)
        is_pinned = np.isin(ranks, self.pinned)
        return np.where(is_pinned, before, len(self.pinned) + ranks - self.start - before)

    def arrange(self, acts: Array, rows: Array) -> Array:
        """Bring acts and rows, [ranks] in exact order, into the order of storage, in place.

        An act that is not pinned becomes the smallest of its level.

        Returns:
            [ranks] bool: whether the act is the row's own.
        """
        # the pinned rows go first
        exact = np.zeros(len(rows), bool)
        exact[self.pinned - self.start] = True
        here = len(self.pinned)
        new_rows = np.concatenate([rows[exact], rows[~exact]])
        new_acts = np.concatenate([acts[exact], acts[~exact]])
        # then each level, by row: rising and falling in turn
        for level, (low, high) in enumerate(self.begins.tolist()):
            # a view: sorting it sorts new_rows
            some = new_rows[low:high]
            some.sort()
            if level % 2:
                some[:] = some[::-1].copy()
            # acts fall with rising rank, so the last is the smallest
            new_acts[low:high] = new_acts[high - 1]
        acts[:], rows[:] = new_acts, new_rows
        exact[:here], exact[here:] = True, False
        return exact


def _pinned(count: int) -> Array:
    ranks = {*range(min(_TOP, count))}
    for quantile in _QUANTILES:
        start, stop = ranks_near(quantile, count, 2 * _AROUND)
        ranks.update(range(start, min(count, stop)))
    return np.array(sorted(ranks), np.int64)


def _edges(count: int) -> list[int]:
    edges = [_TOP]
    while edges[-1] < count:
        edges.append(edges[-1] + max(_TOP, min(edges[-1], count // _SHARE)))
    return edges
