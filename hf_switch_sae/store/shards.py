"""Token shards: what tokens are and which features are active on them, in files of whole documents.

Room   rows of tokens <-> tokens/tokens-<first document>-<last document>.parquet.
Format one row a token, in order of (document, position):
           document int64    number in the data set, from 0
           position int32    token within the document, from 0
           token    int32    id in the language model's vocabulary
           expert   uint16   the router's choice; only with one expert a token, and with several
                             experts
           ids      list     strongest first: uint16 counted within the expert; counted over all
                             experts where there is no column `expert`; uint32 if too many
           acts     list     float16, > 0, as many as ids
       Empty slots are not stored. Row groups have 4096 rows, the last fewer.
Beware The name is all that tells which documents a shard holds: a shard stands for every document
       from first to last, those without any token included, so shards merge by being listed.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_switch_sae.errors import StoreError
from hf_switch_sae.store.parquet import read_footer, read_row_groups, reading, write_parquet
from hf_switch_sae.store.rows import Array, Layout, TokenRows

FOLDER = "tokens"
ROW_GROUP = 4096
_NAME = re.compile(r"tokens-(\d{12})-(\d{12})\.parquet")
_ENCODINGS = {
    "document": "DELTA_BINARY_PACKED",
    "position": "DELTA_BINARY_PACKED",
    "ids.list.element": "BYTE_STREAM_SPLIT",
    "acts.list.element": "PLAIN",  # split bytes take a sixth less, but duckdb can't read them
}


@dataclass(frozen=True)
class Shard:
    """One file of tokens, and the documents it stands for."""

    path: Path
    first: int
    last: int
    size: int


def list_shards(store: Path) -> list[Shard]:
    """Every shard of a store, in order of documents.

    Raises:
        StoreError: two shards hold the same document.
    """
    found = []
    folder = store / FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if name := _NAME.fullmatch(path.name):
            found.append(Shard(path, int(name[1]), int(name[2]), path.stat().st_size))
    found.sort(key=lambda shard: shard.first)
    for one, other in pairwise(found):
        if other.first <= one.last:
            raise StoreError(
                f"two shards of {store} hold document {other.first}: {one.path.name} and "
                f"{other.path.name}. Delete one of them; what only it held can be recorded again."
            )
    return found


def shard_path(store: Path, first: int, last: int) -> Path:
    """Where the tokens of documents first to last lie, if they lie in one file."""
    return store / FOLDER / f"tokens-{first:012}-{last:012}.parquet"


def write_shard(
    store: Path, first: int, last: int, rows: TokenRows, layout: Layout, room: int | None = None
) -> int | None:
    """Write the tokens of documents first to last, all of them; the file's size in bytes.

    None if it would have been larger than `room` bytes, and was not kept.

    Raises:
        StoreError: no room, or no permission.
    """
    order = np.lexsort((rows.position, rows.document))
    path = shard_path(store, first, last)
    dictionary = [name for name in ("token", "expert") if name in layout.schema.names]
    # tables of whole row groups, so that only a few lie in memory twice
    step = 16 * ROW_GROUP
    parts = (order[at : at + step] for at in range(0, len(order), step))
    tables = (rows.take(part).table(layout) for part in parts)
    return write_parquet(path, layout.schema, tables, ROW_GROUP, _ENCODINGS, dictionary, room)


class ShardReader:
    """Reads rows of a store's shards by number or by document and position."""

    def __init__(self, shards: list[Shard], layout: Layout) -> None:
        self.shards, self.layout = shards, layout
        self._firsts = [shard.first for shard in shards]
        # each cache is bounded, whatever the size of the store
        self.footer = lru_cache(maxsize=256)(self._footer)
        self._bounds = lru_cache(maxsize=4096)(self._read_bounds)
        self._places = lru_cache(maxsize=512)(self._read_places)

    def _footer(self, index: int) -> pq.FileMetaData:
        path = self.shards[index].path
        footer = read_footer(path)
        if not footer.schema.to_arrow_schema().equals(self.layout.schema):
            raise StoreError(
                f"{path} has other columns than this store's shards: it belongs to another store."
            )
        return footer

    def num_rows(self, index: int) -> int:
        """Tokens of a shard."""
        return int(self.footer(index).num_rows)

    def rows(self, index: int, start: int, stop: int) -> TokenRows:
        """Rows start to stop of a shard, whole."""
        table = self._table(index, start, stop, self.layout.schema.names)
        with reading(self.shards[index].path):
            return TokenRows.of_table(table, self.layout)

    def tokens(self, index: int, start: int, stop: int) -> tuple[Array, Array, Array]:
        """document, position and token of rows start to stop of a shard."""
        groups = range(start // ROW_GROUP, -(-stop // ROW_GROUP))
        parts = [self._places(index, group) for group in groups]
        at = groups.start * ROW_GROUP
        document, position, token = (
            np.concatenate([part[i] for part in parts])[start - at : stop - at] for i in range(3)
        )
        return document, position, token

    def acts_of(self, index: int, rows: Array, feature: int) -> Array:
        """A feature's acts, float16, on rows of a shard, rising; 0 where it is not active."""
        found = np.zeros(len(rows), np.float16)
        for group in np.unique(rows // ROW_GROUP).tolist():
            start = group * ROW_GROUP
            block = self.rows(index, start, min(start + ROW_GROUP, self.num_rows(index)))
            low, high = np.searchsorted(rows, [start, start + ROW_GROUP])
            active = np.flatnonzero(block.ids == feature)
            at = np.searchsorted(block.offsets, active, side="right") - 1
            acts = np.zeros(len(block), np.float16)
            acts[at] = block.acts[active]
            found[low:high] = acts[rows[low:high] - start]
        return found

    def shard_of(self, document: int) -> int | None:
        """The shard that stands for a document, or None."""
        index = bisect_right(self._firsts, document) - 1
        return index if index >= 0 and document <= self.shards[index].last else None

    def beginning_in(self, first: int, last: int) -> range:
        """The shards whose first document is one of first to last."""
        return range(bisect_left(self._firsts, first), bisect_right(self._firsts, last))

    def find(self, document: int, position: int) -> tuple[int, int]:
        """Shard and row of a token.

        Raises:
            StoreError: the token is not in the store.
        """
        index = self.shard_of(document)
        if index is not None:
            for group in self._groups_with(index, document, position):
                documents, positions, _ = self._places(index, group)
                low, high = np.searchsorted(documents, [document, document + 1])
                row = int(low + np.searchsorted(positions[low:high], position))
                if row < high and positions[row] == position:
                    return index, group * ROW_GROUP + row
        raise StoreError(
            f"document {document} has no token at position {position} in this store, which holds "
            + (
                f"documents {self._firsts[0]} to {self.shards[-1].last}."
                if self.shards
                else "nothing."
            )
        )

    def blocks(self, index: int, size: int = 16 * ROW_GROUP) -> Iterator[TokenRows]:
        """The rows of a shard from first to last, at most `size` at a time."""
        for start in range(0, self.num_rows(index), size):
            yield self.rows(index, start, min(start + size, self.num_rows(index)))

    def _table(self, index: int, start: int, stop: int, columns: Iterable[str]) -> pa.Table:
        groups = range(start // ROW_GROUP, -(-stop // ROW_GROUP))
        shard = self.shards[index]
        table = read_row_groups(shard.path, self.footer(index), list(groups), list(columns))
        return table.slice(start - groups.start * ROW_GROUP, stop - start)

    def _read_places(self, index: int, group: int) -> tuple[Array, Array, Array]:
        names = ["document", "position", "token"]
        shard = self.shards[index]
        table = read_row_groups(shard.path, self.footer(index), [group], names)
        return tuple(table[name].to_numpy() for name in names)

    def _groups_with(self, index: int, document: int, position: int) -> list[int]:
        """Row groups that may hold the token, by their statistics."""
        first, last, low, high = self._bounds(index)
        inside = (first <= document) & (document <= last) & (low <= position) & (position <= high)
        found: list[int] = np.flatnonzero(inside).tolist()
        return found

    def _read_bounds(self, index: int) -> Array:
        """[4, row groups]: smallest and largest document, smallest and largest position of each."""
        footer = self.footer(index)
        bounds = np.empty((4, footer.num_row_groups), np.int64)
        for group in range(footer.num_row_groups):
            columns = footer.row_group(group)
            for at in range(2):
                known = columns.column(at).statistics
                bounds[2 * at : 2 * at + 2, group] = known.min, known.max
        return bounds
