"""An index of version 1, which is read and no longer written.

Format postings: feature int32, act float16, document int64, position int32; by feature, then act
       descending, then document and position; all else as today (`postings`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_switch_sae.errors import StoreError
from hf_switch_sae.store.postings import ROW_GROUP, VERSION, Index, Place, read_listing
from hf_switch_sae.store.rows import Array
from hf_switch_sae.store.shards import ShardReader


class IndexV1(Index):
    """A finished index in which every rank has its own act and place."""

    version = 1
    schema = pa.schema(
        [
            ("feature", pa.int32()),
            ("act", pa.float16()),
            ("document", pa.int64()),
            ("position", pa.int32()),
        ]
    )

    def _read_shards(self, shards: list[Any]) -> None:
        pass  # places are found by document

    def ranked(self, feature: int, start: int, stop: int) -> tuple[Array, list[Place]]:
        """As of today's index."""
        acts, named = self._read_ranks(feature, start, stop)
        return acts, [self._reader.find(*each) for each in named]

    def _read_ranks(
        self, feature: int, start: int, stop: int
    ) -> tuple[Array, list[tuple[int, int]]]:
        """act, and (document, position)."""
        acts = [np.empty(0, np.float16)]
        named: list[tuple[int, int]] = []
        for part, levels in self._segments(feature, start, stop):
            begin = int(self.starts[feature]) - self._begins[part]
            low, high = max(start, levels.start), min(stop, levels.stop)
            table = self._read(part, begin + low, begin + high)
            if not (table["feature"].to_numpy() == feature).all():
                raise self._unfit("its features.parquet")
            acts.append(table["act"].to_numpy())
            columns = (table[name].to_pylist() for name in ("document", "position"))
            named += zip(*columns, strict=True)
        return np.concatenate(acts), named

    def spread(self, feature: int, ranks: Array) -> list[Place]:
        """Places of a feature's tokens of just these ranks, [n] rising."""
        places: list[Place] = []
        # a row group at a time
        at = int(self.starts[feature]) + ranks
        for block in np.split(ranks, np.flatnonzero(np.diff(at // ROW_GROUP)) + 1):
            if len(block):
                named = self._read_ranks(feature, int(block[0]), int(block[-1]) + 1)[1]
                places += [self._reader.find(*named[each]) for each in block - block[0]]
        return places


def open_index(folder: Path, reader: ShardReader) -> Index:
    """The index in a folder, of whichever version.

    Raises:
        StoreError: it is damaged, or of a later version.
    """
    version = read_listing(folder)["version"]
    for kind in (Index, IndexV1):
        if version == kind.version:
            return kind(folder, reader)
    raise StoreError(
        f"{folder} is an index of version {version}, and this package reads 1 to {VERSION}: "
        "delete it and call store.index() again."
    )
