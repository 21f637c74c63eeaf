"""Builds the inverted index: from "which features has this token" to "where does a feature fire".

Room   shards -> index/<generation>/: postings-<n>.parquet, features.parquet, index.json.
How    An external sort in two steps, each within bounded memory. First runs: the postings of some
       shards, grouped by feature. Then parts: a range of features from all runs, sorted, and each
       feature's ranks arranged in levels. Every file appears whole, so a build that was killed
       continues where it stopped. index.json is written last; without it there is no index.
Beware A generation's name is a checksum of the shards' names and sizes, so that an index of other
       shards is never taken for this one.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_switch_sae.errors import StoreError
from hf_switch_sae.files import (
    disk_errors_as_store_errors,
    locked,
    remove_leftovers,
    write_json,
    written_whole,
)
from hf_switch_sae.store import postings
from hf_switch_sae.store.levels import Levels
from hf_switch_sae.store.parquet import check_body, read_footer, read_row_groups, write_parquet
from hf_switch_sae.store.postings import FEATURES, FOLDER, POSTINGS, ROW_GROUP, VERSION
from hf_switch_sae.store.rows import Array, TokenRows
from hf_switch_sae.store.shards import Location, ShardReader, TokenShard

_BYTES_A_POSTING = 64  # at the peak of either step, as measured
_MAX_SPAN = 1 << 16  # most features of one part: the sort key has 16 bits for them
_ENCODINGS = {
    "feature": "DELTA_BINARY_PACKED",
    "act": "PLAIN",
    "token_row": "DELTA_BINARY_PACKED",
}

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def generation(shards: list[TokenShard]) -> str:
    """The name of the index of these shards: 8 hex digits that depend on their names and sizes."""
    listing = "\n".join(f"{shard.path.name} {shard.size}" for shard in shards)
    return f"{zlib.crc32(listing.encode()):08x}"


def build(store: Path, reader: ShardReader, memory: int, progress: Progress) -> None:
    """Build the index of all shards, or continue a build that was interrupted.

    Args:
        store: the store's folder.
        reader: of its shards.
        memory: bytes to sort in, besides what Python and its packages take.
        progress: called after each file.

    Raises:
        StoreError: no room, a damaged shard, or another process builds it.
    """
    folder = store / FOLDER / generation(reader.shards)
    with locked(store / FOLDER / ".lock", wait=False):
        if not (folder / postings.LISTING).exists():
            # make room; a finished index of other shards stays until this one is done
            for other in (store / FOLDER).iterdir():
                if other.is_dir() and other != folder and not (other / postings.LISTING).exists():
                    shutil.rmtree(other)
            limit = max(ROW_GROUP, memory // _BYTES_A_POSTING)
            _remove_if_made_otherwise(folder, limit)
            remove_leftovers(folder)
            runs = _write_runs(folder, reader, limit, progress)
            _write_parts(folder, reader, runs, limit, progress)
        for other in (store / FOLDER).iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other)
        shutil.rmtree(folder / "runs", ignore_errors=True)


def remove(store: Path) -> None:
    """Remove every index of a store, finished or not.

    Raises:
        StoreError: a process is building one.
    """
    if (store / FOLDER).is_dir():
        with locked(store / FOLDER / ".lock", wait=False):
            for folder in (store / FOLDER).iterdir():
                if folder.is_dir():
                    # index.json first, so that half an index is never taken for a whole one
                    (folder / postings.LISTING).unlink(missing_ok=True)
                    shutil.rmtree(folder)


def _remove_if_made_otherwise(folder: Path, limit: int) -> None:
    """Remove what a build with another limit or version has left: its parts end elsewhere."""
    run = folder / "runs" / "run-000000.bin"
    if run.exists():
        with run.open("rb") as file:
            head = json.loads(file.readline())
            if (head.get("version"), head["limit"]) == (VERSION, limit):
                return
    if folder.exists():
        shutil.rmtree(folder)


# --- runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A file of the postings of some consecutive rows, grouped by feature, each group by row.

    It has a line of JSON; offsets int64 [F + 1]; sums float64 [F]; the bits of the float16 acts,
    uint16 [postings]; and the tokens' rows less `base`, uint32 [postings].
    """

    path: Path
    start: int
    """The byte at which the acts begin."""
    offsets: Array
    """Feature f has the postings offsets[f] to offsets[f + 1]."""
    sums: Array
    """Of each feature's acts."""
    base: int
    """The row, over all shards, of the run's first token."""
    stop: Location
    """Where the next run begins."""
    limit: int
    tokens: int
    version: int

    @classmethod
    def open(cls, path: Path, num_features: int) -> _Run:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            offsets = np.fromfile(file, np.int64, num_features + 1)
            sums = np.fromfile(file, np.float64, num_features)
            return cls(path, file.tell(), offsets, sums, **{**head, "stop": tuple(head["stop"])})

    def read(self, first: int, last: int) -> tuple[Array, Array, Array]:
        """Feature, bits of the act, and token row of each posting of features first to last."""
        low, high, total = (int(self.offsets[i]) for i in (first, last + 1, -1))
        with self.path.open("rb") as file:
            columns = []
            at = self.start
            for dtype in (np.uint16, np.uint32):
                size = np.dtype(dtype).itemsize
                file.seek(at + low * size)
                columns.append(np.fromfile(file, dtype, high - low))
                at += total * size
        feature = np.repeat(
            np.arange(first, last + 1), np.diff(self.offsets[first : last + 2])
        ).astype(np.uint32)
        bits, row = columns
        return feature, bits, row.astype(np.int64) + self.base


def _write_runs(folder: Path, reader: ShardReader, limit: int, progress: Progress) -> list[_Run]:
    """Sort the shards' postings into runs of about `limit` each; runs that are there are kept."""
    num_features = reader.layout.num_features
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder / "runs")
    runs: list[_Run] = []
    cursor, end = (0, 0), (len(reader.shards), 0)
    # a cursor is the location of the next row
    while cursor < end:
        path = folder / "runs" / f"run-{len(runs):06}.bin"
        run = _Run.open(path, num_features) if path.exists() else None
        if run is None:
            blocks, cursor = _gather(reader, cursor, limit)
            head = {"base": sum(run.tokens for run in runs), "stop": cursor, "limit": limit}
            _write_run(path, blocks, head, num_features)
            del blocks
            run = _Run.open(path, num_features)
        runs.append(run)
        cursor = run.stop
        progress("sorting tokens", cursor[0], end[0])
    return runs


def _gather(reader: ShardReader, cursor: Location, limit: int) -> tuple[list[TokenRows], Location]:
    """Rows from a location on until they have `limit` postings, and the location after them."""
    blocks: list[TokenRows] = []
    gathered, (index, row) = 0, cursor
    while index < len(reader.shards) and gathered < limit:
        if row == 0:  # a damaged shard is noticed before it is indexed
            check_body(reader.shards[index].path)
        stop = min(row + 4 * 4096, reader.num_rows(index))
        if stop > row:
            blocks.append(reader.rows(index, row, stop))
            gathered += len(blocks[-1].ids)
        index, row = (index, stop) if stop < reader.num_rows(index) else (index + 1, 0)
    return blocks, (index, row)


def _write_run(
    path: Path, blocks: list[TokenRows], head: dict[str, Any], num_features: int
) -> None:
    ids = np.concatenate([block.ids for block in blocks] or [np.empty(0, np.int64)])
    counts = np.bincount(ids, minlength=num_features)
    offsets = np.zeros(num_features + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    # sort feature and place together in 64 bits: several times faster than an argsort
    key = ids.astype(np.uint64) << np.uint64(32)
    key |= np.arange(len(ids), dtype=np.uint64)
    del ids
    key.sort()
    order = (key & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    del key
    # bring acts into that order and add them up by feature
    acts = np.concatenate([block.acts for block in blocks] or [np.empty(0, np.float16)])[order]
    sums = np.zeros(num_features)
    filled = counts > 0
    if filled.any():
        sums[filled] = np.add.reduceat(acts, offsets[:-1][filled], dtype=np.float64)
    # each posting's row, counted from the run's first
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks] or [counts[:0]])
    if len(lengths) >= 1 << 32:
        raise StoreError(f"{path}: too many tokens without features for one run.")
    row = np.repeat(np.arange(len(lengths), dtype=np.uint32), lengths)[order]
    head = {**head, "tokens": len(lengths), "version": VERSION}
    with written_whole(path) as file:
        file.write(f"{json.dumps(head)}\n".encode())
        for part in (offsets, sums, acts.view(np.uint16), row):
            file.write(part.tobytes())


# --- parts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PostingsRange:
    """Features first to last; for a feature too large for one file, only acts from low to high."""

    first: int
    last: int
    low: int = 0
    high: int = 0xFFFF
    """Bounds of the acts, as the bits of a float16: positive floats are ordered like their bits."""
    rank: int = 0
    """Rank of the first posting within the first feature."""


def _write_parts(
    folder: Path, reader: ShardReader, runs: list[_Run], limit: int, progress: Progress
) -> None:
    parts = _plan(runs, reader.layout.num_features, limit)
    counts, sums = _totals(runs, reader.layout.num_features)
    listed = []
    # one file for each range; those of an interrupted build are kept
    for number, part in enumerate(parts):
        path = folder / f"postings-{number:06}.parquet"
        if not path.exists():
            write_parquet(path, POSTINGS, _sorted(runs, part, counts), ROW_GROUP, _ENCODINGS, [])
        listed.append([path.name, read_footer(path).num_rows])
        progress("sorting features", number + 1, len(parts))
    if not (folder / postings.FEATURE_TABLE).exists():
        _write_features(folder, counts, sums, listed)
    index = {
        "version": VERSION,
        "num_tokens": sum(run.tokens for run in runs),
        "num_postings": int(counts.sum()),
        "shards": [
            [shard.path.name, shard.size, reader.num_rows(at)]
            for at, shard in enumerate(reader.shards)
        ],
        "parts": listed,
    }
    # last: only now there is an index
    with disk_errors_as_store_errors(folder / postings.LISTING):
        write_json(folder / postings.LISTING, index, indent=1)


def _totals(runs: list[_Run], num_features: int) -> tuple[Array, Array]:
    """Postings of each feature, and the sum of their acts."""
    counts, sums = np.zeros(num_features, np.int64), np.zeros(num_features)
    for run in runs:
        counts += np.diff(run.offsets)
        sums += run.sums
    return counts, sums


def _plan(runs: list[_Run], num_features: int, limit: int) -> list[_PostingsRange]:
    """Cut the features, and the acts of the largest of them, into parts of at most `limit`."""
    counts, _ = _totals(runs, num_features)
    parts: list[_PostingsRange] = []
    first, total = 0, 0
    for feature, count in enumerate(counts.tolist()):
        # the range before this feature is full
        if first < feature and (total + count > limit or feature - first == _MAX_SPAN):
            parts.append(_PostingsRange(first, feature - 1))
            first, total = feature, 0
        total += count
        if count > limit:  # then `first` is this feature: it is split by acts
            parts += _split(runs, feature, limit)
            first, total = feature + 1, 0
    if first < num_features:
        parts.append(_PostingsRange(first, num_features - 1))
    return parts


def _split(runs: list[_Run], feature: int, limit: int) -> list[_PostingsRange]:
    """Cut one feature by its acts, largest first, into ranges of at most `limit` postings.

    Tokens with equal acts stay together, even if they are more than `limit`.
    """
    histogram = np.zeros(1 << 16, np.int64)
    for run in runs:
        histogram += np.bincount(run.read(feature, feature)[1], minlength=1 << 16)
    parts, high, total, rank = [], 0xFFFF, 0, 0
    for bits in np.flatnonzero(histogram)[::-1].tolist():
        if total and total + histogram[bits] > limit:
            parts.append(_PostingsRange(feature, feature, bits + 1, high, rank))
            high, total, rank = bits, 0, rank + total
        total += int(histogram[bits])
    return [*parts, _PostingsRange(feature, feature, 0, high, rank)]


def _sorted(runs: list[_Run], part: _PostingsRange, counts: Array) -> Iterator[pa.Table]:
    """The postings of a range, ordered as the format says, some row groups at a time."""
    # gather them from all runs
    pieces = []
    for run in runs:
        columns = run.read(part.first, part.last)
        if part.low or part.high < 0xFFFF:
            inside = (columns[1] >= part.low) & (columns[1] <= part.high)
            columns = tuple(column[inside] for column in columns)  # type: ignore[assignment]
        pieces.append(columns)
    feature, bits, row = (np.concatenate([piece[i] for piece in pieces]) for i in range(3))
    del pieces
    # sort by feature (16 bits), falling act (16 bits), and place (32 bits): the place breaks ties
    # by row, because runs are in the order of rows
    key = (feature - np.uint32(part.first)).astype(np.uint64) << np.uint64(48)
    key |= (np.uint16(0xFFFF) - bits).astype(np.uint64) << np.uint64(32)
    key |= np.arange(len(key), dtype=np.uint64)
    del feature, bits
    key.sort()
    # unpack the sorted key
    row = row[(key & np.uint64(0xFFFFFFFF)).astype(np.uint32)]
    bits = np.uint16(0xFFFF) - (key >> np.uint64(32)).astype(np.uint16)
    feature = (key >> np.uint64(48)).astype(np.int32) + part.first
    del key
    # arrange each feature's ranks in levels
    exact = np.ones(len(row), bool)
    here = np.bincount(feature - part.first, minlength=part.last - part.first + 1)
    stops = np.cumsum(here)
    for i in np.flatnonzero(here).tolist():
        segment = slice(int(stops[i] - here[i]), int(stops[i]))
        levels = Levels(int(counts[part.first + i]), part.rank, part.rank + int(here[i]))
        exact[segment] = levels.arrange(bits[segment], row[segment])
    for at in range(0, len(row), 16 * ROW_GROUP):
        some = slice(at, at + 16 * ROW_GROUP)
        table = {
            "feature": feature[some].astype(np.int32),
            "act": bits[some].view(np.float16),
            "exact": exact[some],
            "token_row": row[some],
        }
        yield pa.table({k: pa.array(v) for k, v in table.items()}, schema=POSTINGS)


def _write_features(folder: Path, counts: Array, sums: Array, parts: list[list[Any]]) -> None:
    """Write features.parquet; a feature's first posting has its largest act."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    largest = np.zeros(len(counts), np.float32)
    begin = 0
    for name, rows in parts:
        here = np.flatnonzero((starts[:-1] >= begin) & (starts[:-1] < begin + rows) & (counts > 0))
        path = folder / name
        footer = read_footer(path)
        groups = (starts[:-1][here] - begin) // ROW_GROUP
        for group in np.unique(groups).tolist():
            act = read_row_groups(path, footer, [group], ["act"])["act"].to_numpy()
            chosen = here[groups == group]
            largest[chosen] = act[starts[:-1][chosen] - begin - group * ROW_GROUP]
        begin += rows
    table = pa.table(
        {
            "feature": pa.array(np.arange(len(counts), dtype=np.int32)),
            "count": pa.array(counts),
            "max_act": pa.array(largest),
            "mean_act": pa.array((sums / np.maximum(counts, 1)).astype(np.float32)),
        },
        schema=FEATURES,
    )
    write_parquet(folder / postings.FEATURE_TABLE, FEATURES, [table], ROW_GROUP, {}, [])
