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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hf_switch_sae.errors import StoreError
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.store.files import read_footer, read_row_groups, reading, write_parquet

FOLDER = "tokens"
ROW_GROUP = 4096
_NAME = re.compile(r"tokens-(\d{12})-(\d{12})\.parquet")
_ENCODINGS = {
    "document": "DELTA_BINARY_PACKED",
    "position": "DELTA_BINARY_PACKED",
    "ids.list.element": "BYTE_STREAM_SPLIT",
    "acts.list.element": "PLAIN",  # split bytes take a sixth less, but duckdb can't read them
}
_MAX_ACT = float(np.finfo(np.float16).max)

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Layout:
    """How an SAE's feature ids are written: width of the dictionary, and what an id counts."""

    num_features: int
    num_experts: int
    num_experts_per_token: int

    @property
    def is_local(self) -> bool:
        """Whether ids count within the token's one expert, which has a column of its own."""
        return self.num_experts > 1 and self.num_experts_per_token == 1

    @property
    def features_per_expert(self) -> int:
        """Features an expert has."""
        return self.num_features // self.num_experts

    @property
    def schema(self) -> pa.Schema:
        """Columns of a token shard."""
        width = self.features_per_expert if self.is_local else self.num_features
        ids = pa.uint16() if width <= 1 << 16 else pa.uint32()
        expert = [("expert", pa.uint16())] if self.is_local else []
        return pa.schema(
            [
                ("document", pa.int64()),
                ("position", pa.int32()),
                ("token", pa.int32()),
                *expert,
                # an inner name that pyarrow, datasets and duckdb agree on
                ("ids", pa.list_(pa.field("element", ids))),
                ("acts", pa.list_(pa.field("element", pa.float16()))),
            ]
        )


@dataclass(frozen=True)
class TokenRows:
    """Tokens with their active features, strongest first, as they lie in a shard.

    Args:
        document, position, token: [n] integers.
        offsets: [n + 1]; token i has the postings offsets[i] to offsets[i + 1].
        ids: [postings] int64, counted over all experts.
        acts: [postings] float16, > 0.
        expert: [n], the router's choice, or None where it says nothing.
    """

    document: Array
    position: Array
    token: Array
    offsets: Array
    ids: Array
    acts: Array
    expert: Array | None = None

    def __len__(self) -> int:
        return len(self.document)

    @classmethod
    def of(
        cls,
        features: SparseFeatures,
        document: Array,
        position: Array,
        token: Array,
        layout: Layout,
    ) -> TokenRows:
        """Rows of features [n] on any device.

        Raises:
            StoreError: an act above 65504, which float16 can't hold.
        """
        acts, slots = features.acts.detach().float().sort(dim=-1, descending=True, stable=True)
        ids = features.ids.gather(-1, slots).cpu().numpy()
        kept = acts.cpu().numpy()
        if kept.size and kept.max() > _MAX_ACT:
            row = int(kept.max(-1).argmax())
            raise StoreError(
                f"feature {ids[row, 0]} has an act of {kept[row, 0]:g} at token {token[row]}, and "
                f"a store keeps acts as float16, up to {_MAX_ACT:g}. Is the token an outlier (see "
                "SwitchSAE.outlier_norm)?"
            )
        half = kept.astype(np.float16)
        active = half > 0
        offsets = np.zeros(len(half) + 1, np.int64)
        np.cumsum(active.sum(-1), out=offsets[1:])
        expert = ids[:, 0] // layout.features_per_expert if layout.is_local else None
        return cls(document, position, token, offsets, ids[active], half[active], expert)

    @classmethod
    def empty(cls, layout: Layout) -> TokenRows:
        """No rows."""
        none = np.zeros(0, np.int64)
        expert = none if layout.is_local else None
        return cls(none, none, none, np.zeros(1, np.int64), none, none.astype(np.float16), expert)

    @classmethod
    def cat(cls, parts: list[TokenRows]) -> TokenRows:
        """Join rows of one layout, at least one part."""
        starts = np.cumsum([0, *(len(part.ids) for part in parts)])
        offsets = [part.offsets[:-1] + at for part, at in zip(parts, starts, strict=False)]
        expert = [part.expert for part in parts if part.expert is not None]
        return cls(
            np.concatenate([part.document for part in parts]),
            np.concatenate([part.position for part in parts]),
            np.concatenate([part.token for part in parts]),
            np.concatenate([*offsets, starts[-1:]]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.acts for part in parts]),
            np.concatenate(expert) if expert else None,
        )

    def take(self, rows: Array) -> TokenRows:
        """The named rows, [m] ints, in that order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        postings = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenRows(
            self.document[rows],
            self.position[rows],
            self.token[rows],
            offsets,
            self.ids[postings],
            self.acts[postings],
            None if self.expert is None else self.expert[rows],
        )

    def features(self, num_features: int, k: int = 1) -> SparseFeatures:
        """The same as SparseFeatures [n], acts in float16, with at least k slots a token."""
        lengths = np.diff(self.offsets)
        width = max(k, int(lengths.max(initial=0)))
        acts = np.zeros((len(self), width), np.float16)
        ids = np.zeros((len(self), width), np.int64)
        filled = np.arange(width) < lengths[:, None]
        acts[filled], ids[filled] = self.acts, self.ids
        return SparseFeatures(torch.from_numpy(acts), torch.from_numpy(ids), num_features)

    def table(self, layout: Layout) -> pa.Table:
        """The same as a table of the layout's schema."""
        schema = layout.schema
        ids = self.ids
        columns: dict[str, Any] = {
            "document": self.document,
            "position": self.position,
            "token": self.token,
        }
        if layout.is_local:
            assert self.expert is not None
            columns["expert"] = self.expert
            ids = ids - np.repeat(self.expert * layout.features_per_expert, np.diff(self.offsets))
        arrays = {
            name: pa.array(column.astype(schema.field(name).type.to_pandas_dtype()))
            for name, column in columns.items()
        }
        offsets = pa.array(self.offsets.astype(np.int32))
        for name, values in (("ids", ids), ("acts", self.acts)):
            kind = schema.field(name).type
            dtype = kind.value_type.to_pandas_dtype()
            arrays[name] = pa.ListArray.from_arrays(
                offsets, pa.array(values.astype(dtype)), type=kind
            )
        return pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema)

    @classmethod
    def of_table(cls, table: pa.Table, layout: Layout) -> TokenRows:
        """What `table` wrote."""
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        ids, acts = columns["ids"], columns["acts"]
        expert = columns["expert"].to_numpy().astype(np.int64) if layout.is_local else None
        offsets = ids.offsets.to_numpy().astype(np.int64)
        values = ids.values.to_numpy().astype(np.int64)[offsets[0] : offsets[-1]]
        half = acts.values.to_numpy()[acts.offsets[0].as_py() : acts.offsets[-1].as_py()]
        offsets = offsets - offsets[0]
        if expert is not None:
            values = values + np.repeat(expert * layout.features_per_expert, np.diff(offsets))
        document, position, token = (
            columns[name].to_numpy() for name in ("document", "position", "token")
        )
        return cls(document, position, token, offsets, values, half, expert)


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
