"""The finished index, as it lies on disk and as queries read it.

Room   a feature and a range of ranks -> acts and locations (shard, row), from a few row groups.
Format postings: feature int32; act float16; exact bool, whether the act is the token's own (if not,
       it is the smallest of its level); token_row int64, the token's row counted from 0 over all
       shards in order. Rows are ordered by feature over all files in the order of their names, and
       within a feature as `levels` says; if two files share a feature, each arranges its own part.
       Row groups have 65 536 rows.
       features: feature int32, count int64, max_act float32, mean_act float32; one row per feature.
       index.json: version, counts, [name, bytes, tokens] of the shards, [name, rows] of the files.
Beware Acts that are not exact are read from the shards, a whole level at a time.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from hf_switch_sae.errors import StoreError
from hf_switch_sae.store.levels import Levels
from hf_switch_sae.store.parquet import read_footer, read_row_groups
from hf_switch_sae.store.rows import Array
from hf_switch_sae.store.shards import Location, ShardReader

FOLDER = "index"
LISTING = "index.json"
FEATURE_TABLE = "features.parquet"
VERSION = 2
ROW_GROUP = 65_536
POSTINGS = pa.schema(
    [
        ("feature", pa.int32()),
        ("act", pa.float16()),
        ("exact", pa.bool_()),
        ("token_row", pa.int64()),
    ]
)
FEATURES = pa.schema(
    [
        ("feature", pa.int32()),
        ("count", pa.int64()),
        ("max_act", pa.float32()),
        ("mean_act", pa.float32()),
    ]
)


class Index:
    """A finished index: it holds the counts of all features, and reads postings when asked.

    Args:
        folder: of the index.
        reader: of the shards it was built from.

    Raises:
        StoreError: it is damaged, or of another version.
    """

    def __init__(self, folder: Path, reader: ShardReader) -> None:
        self.folder, self._reader = folder, reader
        try:
            index = json.loads((folder / LISTING).read_bytes())
            if (version := index["version"]) != VERSION:
                raise StoreError(
                    f"{folder} is an index of version {version}, and this package reads version "
                    f"{VERSION}: delete it and call store.index() again."
                )
            self.num_tokens = int(index["num_tokens"])
            self.num_postings = int(index["num_postings"])
            shard_rows = [rows for _, _, rows in index["shards"]]
            parts = [(str(name), int(rows)) for name, rows in index["parts"]]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise StoreError(
                f"{folder / LISTING} is damaged ({err}): delete {folder} and call "
                "store.index() again."
            ) from err
        self._shard_starts = np.concatenate([[0], np.cumsum(shard_rows)])
        # counts of all features stay in memory
        path = folder / FEATURE_TABLE
        footer = read_footer(path)
        names = ["count", "max_act", "mean_act"]
        table = read_row_groups(path, footer, list(range(footer.num_row_groups)), names)
        self.counts, self.max_act, self.mean_act = (table[name].to_numpy() for name in names)
        fits = len(self.counts) == reader.layout.num_features
        if not fits or int(self.counts.sum()) != self.num_postings:
            raise StoreError(f"{path} does not fit its index: delete {folder} and build it again.")
        # where each feature begins over all files, and each file over all postings
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._parts = [name for name, _ in parts]
        self._begins = np.concatenate([[0], np.cumsum([rows for _, rows in parts])]).tolist()
        self._footer = lru_cache(maxsize=256)(lambda part: read_footer(folder / self._parts[part]))

    def ranked(self, feature: int, start: int, stop: int) -> tuple[Array, list[Location]]:
        """Acts and locations of a feature's tokens of ranks start to stop, strongest first.

        Of equal acts the earlier token comes first. Ranks beyond the last are left out.
        """
        acts, rows = [np.empty(0, np.float16)], [np.empty(0, np.int64)]
        for part, levels in self._segments(feature, start, stop):
            low, high = max(start, levels.start), min(stop, levels.stop)
            found, order = [], []
            # pinned ranks are stored one after another, with their own acts
            pinned = levels.pinned[(levels.pinned >= low) & (levels.pinned < high)]
            if len(pinned):
                at = levels.stored_at(pinned)
                columns = self._rows(feature, part, levels, int(at[0]), int(at[-1]) + 1)
                found.append(columns)
                order.append(pinned)
            # of other ranks the whole level is read and sorted by the acts in the shards
            overlaps = (levels.edges[:, 0] < high) & (levels.edges[:, 1] > low)
            for level in np.flatnonzero(overlaps).tolist():
                members = levels.members(level)
                inside = (members >= low) & (members < high)
                if inside.any():
                    columns = self._level(feature, part, levels, level)
                    found.append((columns[0][inside], columns[1][inside]))
                    order.append(members[inside])
            by_rank = np.argsort(np.concatenate(order))
            acts.append(np.concatenate([each[0] for each in found])[by_rank])
            rows.append(np.concatenate([each[1] for each in found])[by_rank])
        return np.concatenate(acts), self._locations(np.concatenate(rows))

    def spread(self, feature: int, ranks: Array) -> list[Location]:
        """Locations of a feature's tokens of about these ranks, [n] rising.

        A rank that is not pinned stands for some token of its level: no shard is read for it.
        """
        rows = [np.empty(0, np.int64)]
        for part, levels in self._segments(feature, 0, int(self.counts[feature])):
            mine = ranks[(ranks >= levels.start) & (ranks < levels.stop)]
            at = np.sort(levels.stored_at(mine))
            # each row group is read once
            begin = self._begin(feature, part)
            for block in np.split(at, np.flatnonzero(np.diff((begin + at) // ROW_GROUP)) + 1):
                if len(block):
                    low, high = int(block[0]), int(block[-1]) + 1
                    rows.append(self._rows(feature, part, levels, low, high)[1][block - low])
        return self._locations(np.concatenate(rows))

    def _segments(self, feature: int, start: int, stop: int) -> Iterator[tuple[int, Levels]]:
        """The files that have some of these ranks, and how the feature lies in each."""
        begin, count = int(self.starts[feature]), int(self.counts[feature])
        low, high = begin + start, begin + min(stop, count)
        while low < high:
            part = bisect_right(self._begins, low) - 1
            first = max(begin, self._begins[part])
            last = min(begin + count, self._begins[part + 1])
            yield part, Levels(count, first - begin, last - begin)
            low = last

    def _begin(self, feature: int, part: int) -> int:
        """The row at which a feature begins in a file."""
        return max(0, int(self.starts[feature] - self._begins[part]))

    def _rows(
        self, feature: int, part: int, levels: Levels, start: int, stop: int
    ) -> tuple[Array, Array]:
        """Acts and token rows of a feature in a file, from `start` to `stop` as stored."""
        begin = self._begin(feature, part)
        table = self._read(part, begin + start, begin + stop)
        acts, rows, exact = (table[name].to_numpy() for name in ("act", "token_row", "exact"))
        # levels follow from the counts: with other counts, rows would be taken for other ranks
        pinned = np.arange(start, stop) < len(levels.pinned)
        if not (table["feature"].to_numpy() == feature).all() or (exact != pinned).any():
            raise self._unfit(f"its {FEATURE_TABLE}")
        return acts, rows

    def _level(self, feature: int, part: int, levels: Levels, level: int) -> tuple[Array, Array]:
        """Acts and token rows of a level, by act."""
        floors, rows = self._rows(feature, part, levels, *levels.begins[level].tolist())
        rows = np.sort(rows)  # so that each row group of a shard is read once
        acts = np.empty(len(rows), np.float16)
        for shard, inside in self._by_shard(rows):
            here = rows[inside] - self._shard_starts[shard]
            acts[inside] = self._reader.acts_of(shard, here, feature)
        # stored is the level's smallest act; any other means that the shards have changed
        if acts.min() != floors[0]:
            raise self._unfit("the shards")
        # of equal acts the earlier token first, as when ranks were given out
        order = np.lexsort((rows, -acts))
        return acts[order], rows[order]

    def _by_shard(self, rows: Array) -> Iterator[tuple[int, slice]]:
        """Each shard that some of the rows, rising, lie in, and the slice of them that does."""
        cuts = np.searchsorted(rows, self._shard_starts)
        for shard in np.flatnonzero(np.diff(cuts)).tolist():
            yield shard, slice(int(cuts[shard]), int(cuts[shard + 1]))

    def _locations(self, rows: Array) -> list[Location]:
        # from the right: a shard without tokens begins at the same row as the next one
        shards = np.searchsorted(self._shard_starts, rows, side="right") - 1
        within = rows - self._shard_starts[shards]
        return list(zip(shards.tolist(), within.tolist(), strict=True))

    def _read(self, part: int, start: int, stop: int) -> pa.Table:
        groups = range(start // ROW_GROUP, -(-stop // ROW_GROUP))
        path = self.folder / self._parts[part]
        table = read_row_groups(path, self._footer(part), list(groups), POSTINGS.names)
        return table.slice(start - groups.start * ROW_GROUP, stop - start)

    def _unfit(self, what: str) -> StoreError:
        return StoreError(
            f"{self.folder} does not fit {what}: delete it and call store.index() again."
        )
