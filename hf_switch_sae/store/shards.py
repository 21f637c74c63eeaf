"""Token shards: which tokens there are and which features are active on them, by whole documents.

Room   rows of tokens <-> tokens/tokens-<first document>-<last document>.parquet.
Format One row for each token, ordered by (document, position):
           document int64    number in the data set, from 0
           position int32    token within the document, from 0
           token    int32    id in the language model's vocabulary
           expert   uint16   the router's choice; only if the SAE has several experts and a token
                             visits one of them
           ids      list     strongest first, uint16 (uint32 if that is too narrow); counted within
                             the expert, or over all experts if there is no column `expert`
           acts     list     float16, > 0, as many as ids
       Empty slots are not stored. Row groups have 4096 rows, the last one fewer.
Beware Only the name says which documents a shard holds: all from first to last, including those
       without tokens. So stores merge by putting their shards into one folder.
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
from hf_switch_sae.features import holds_booleans
from hf_switch_sae.store.parquet import read_footer, read_row_groups, reading, write_parquet
from hf_switch_sae.store.rows import Array, RowLayout, TokenRows

FOLDER = "tokens"
ROW_GROUP = 4096
# 12 digits: sorted by name, as `load_dataset` takes them, shards are in order of documents
_NAME = re.compile(r"tokens-(\d{12})-(\d{12})\.parquet")
_ENCODINGS = {
    "document": "DELTA_BINARY_PACKED",
    "position": "DELTA_BINARY_PACKED",
    "ids.list.element": "BYTE_STREAM_SPLIT",
    "acts.list.element": "PLAIN",  # split bytes take a sixth less, but duckdb can't read them
}


Location = tuple[int, int]
"""A token's shard and row."""


@dataclass(frozen=True)
class TokenShard:
    """One file of tokens, and the documents it holds."""

    path: Path
    first: int
    last: int
    size: int
    """In bytes."""


def list_shards(store: Path) -> list[TokenShard]:
    """Every shard of a store, ordered by document.

    Raises:
        StoreError: two shards hold the same document.
    """
    found = []
    folder = store / FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if name := _NAME.fullmatch(path.name):
            found.append(TokenShard(path, int(name[1]), int(name[2]), path.stat().st_size))
    found.sort(key=lambda shard: shard.first)
    # if any two overlap, two neighbors do
    for one, other in pairwise(found):
        if other.first <= one.last:
            raise StoreError(
                f"two shards of {store} hold document {other.first}: {one.path.name} and "
                f"{other.path.name}. Delete one of them; what only it held can be recorded again."
            )
    return found


def shard_path(store: Path, first: int, last: int) -> Path:
    """The path of the shard that holds documents first to last."""
    return store / FOLDER / f"tokens-{first:012}-{last:012}.parquet"


def write_shard(
    store: Path, first: int, last: int, rows: TokenRows, layout: RowLayout, room: int | None = None
) -> int | None:
    """Write all tokens of documents first to last.

    Returns:
        The file's size in bytes; None if it would have been larger than `room`, and was not kept.

    Raises:
        StoreError: no room, or no permission.
    """
    order = np.lexsort((rows.position, rows.document))
    path = shard_path(store, first, last)
    dictionary = [name for name in ("token", "expert") if name in layout.schema.names]
    # a few row groups at a time, so that only those are in memory twice
    step = 16 * ROW_GROUP
    parts = (order[at : at + step] for at in range(0, len(order), step))
    tables = (rows.take(part).table(layout) for part in parts)
    return write_parquet(path, layout.schema, tables, ROW_GROUP, _ENCODINGS, dictionary, room)


class ShardReader:
    """Reads rows of a store's shards, by row number or by document and position.

    A shard is named by its index in `shards`.
    """

    def __init__(self, shards: list[TokenShard], layout: RowLayout) -> None:
        self.shards, self.layout = shards, layout
        self._firsts = [shard.first for shard in shards]
        # all caches are bounded, however large the store is
        self.footer = lru_cache(maxsize=256)(self._footer)
        self._bounds = lru_cache(maxsize=4096)(self._read_bounds)
        self._token_columns = lru_cache(maxsize=512)(self._read_token_columns)

    def _footer(self, index: int) -> pq.FileMetaData:
        path = self.shards[index].path
        footer = read_footer(path)
        if not footer.schema.to_arrow_schema().equals(self.layout.schema):
            raise StoreError(
                f"{path} has other columns than this store's shards: it belongs to another store."
            )
        return footer

    def num_rows(self, index: int) -> int:
        """How many tokens a shard holds."""
        return int(self.footer(index).num_rows)

    def rows(self, index: int, start: int, stop: int) -> TokenRows:
        """Rows start to stop of a shard, with their features."""
        table = self._table(index, start, stop, self.layout.schema.names)
        with reading(self.shards[index].path):
            return TokenRows.of_table(table, self.layout)

    def tokens(self, index: int, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Document, position and token id of rows start to stop of a shard, [stop - start] each."""
        groups = range(start // ROW_GROUP, -(-stop // ROW_GROUP))
        parts = [self._token_columns(index, group) for group in groups]
        at = groups.start * ROW_GROUP
        document, position, token = (
            np.concatenate([part[i] for part in parts])[start - at : stop - at] for i in range(3)
        )
        return document, position, token

    def acts_of(self, index: int, rows: Array, feature: int) -> Array:
        """A feature's acts on rows [n] of a shard, rising: [n] float16, 0 where not active."""
        found = np.zeros(len(rows), np.float16)
        # each row group is read once
        for group in np.unique(rows // ROW_GROUP).tolist():
            start = group * ROW_GROUP
            block = self.rows(index, start, min(start + ROW_GROUP, self.num_rows(index)))
            low, high = np.searchsorted(rows, [start, start + ROW_GROUP])
            # the postings of this feature, and the rows they belong to
            active = np.flatnonzero(block.ids == feature)
            at = np.searchsorted(block.offsets, active, side="right") - 1
            acts = np.zeros(len(block), np.float16)
            acts[at] = block.acts[active]
            found[low:high] = acts[rows[low:high] - start]
        return found

    def shard_of(self, document: int) -> int | None:
        """The shard that holds a document, or None."""
        index = bisect_right(self._firsts, document) - 1
        return index if index >= 0 and document <= self.shards[index].last else None

    def beginning_in(self, first: int, last: int) -> range:
        """The shards whose first document lies in first to last."""
        return range(bisect_left(self._firsts, first), bisect_right(self._firsts, last))

    def find(self, document: int, position: int) -> Location:
        """Where a token is stored.

        Raises:
            StoreError: the token is not in the store.
        """
        if holds_booleans((document, position)):
            raise StoreError(
                f"documents and positions are integers; got {document!r} and {position!r}."
            )
        index = self.shard_of(document)
        if index is not None:
            for group in self._groups_with(index, document, position):
                # within a row group, documents rise, and positions within each document
                documents, positions, _ = self._token_columns(index, group)
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
        """All rows of a shard in order, at most `size` at a time."""
        for start in range(0, self.num_rows(index), size):
            yield self.rows(index, start, min(start + size, self.num_rows(index)))

    def documents(self, wanted: range | None) -> Iterator[TokenRows]:
        """The rows of some documents (None: of all) in order, some thousands at a time."""
        for index, shard in enumerate(self.shards):
            if wanted is None:
                yield from self.blocks(index)
            elif shard.first < wanted.stop and shard.last >= wanted.start:
                for block in self.blocks(index):
                    inside = (block.document >= wanted.start) & (block.document < wanted.stop)
                    if inside.any():
                        yield block.take(np.flatnonzero(inside))

    def _table(self, index: int, start: int, stop: int, columns: Iterable[str]) -> pa.Table:
        groups = range(start // ROW_GROUP, -(-stop // ROW_GROUP))
        shard = self.shards[index]
        table = read_row_groups(shard.path, self.footer(index), list(groups), list(columns))
        return table.slice(start - groups.start * ROW_GROUP, stop - start)

    def _read_token_columns(self, index: int, group: int) -> tuple[Array, Array, Array]:
        names = ["document", "position", "token"]
        shard = self.shards[index]
        table = read_row_groups(shard.path, self.footer(index), [group], names)
        return tuple(table[name].to_numpy() for name in names)

    def _groups_with(self, index: int, document: int, position: int) -> list[int]:
        """The row groups that may hold a token, judged by their statistics."""
        first, last, low, high = self._bounds(index)
        inside = (first <= document) & (document <= last) & (low <= position) & (position <= high)
        found: list[int] = np.flatnonzero(inside).tolist()
        return found

    def _read_bounds(self, index: int) -> Array:
        """[4, row groups]: smallest and largest document, smallest and largest position of each."""
        footer = self.footer(index)
        bounds = np.empty((4, footer.num_row_groups), np.int64)
        # the columns document and position are the first two
        for group in range(footer.num_row_groups):
            columns = footer.row_group(group)
            for at in range(2):
                known = columns.column(at).statistics
                bounds[2 * at : 2 * at + 2, group] = known.min, known.max
        return bounds
