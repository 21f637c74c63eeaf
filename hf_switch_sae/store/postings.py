"""The finished index, as it lies on disk and as queries read it.

Room   a feature and a range of ranks -> acts, documents, positions, from a few row groups.
Format postings: feature int32, act float16, document int64, position int32; by feature, then act
       descending, then document and position; over all files, in the order of their names. Row
       groups have 65 536 rows.
       features: feature int32, count int64, max_act float32, mean_act float32; one row a feature.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from hf_switch_sae.errors import StoreError
from hf_switch_sae.store.files import read_footer, read_row_groups
from hf_switch_sae.store.shards import Array

FOLDER = "index"
VERSION = 1
ROW_GROUP = 65_536
POSTINGS = pa.schema(
    [
        ("feature", pa.int32()),
        ("act", pa.float16()),
        ("document", pa.int64()),
        ("position", pa.int32()),
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
    """A finished index: counts of all features in memory, postings read where they are asked for.

    Raises:
        StoreError: it is damaged, or of another version.
    """

    def __init__(self, folder: Path, num_features: int) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / "index.json").read_bytes())
            version, self.num_tokens = index["version"], int(index["num_tokens"])
            self.num_postings = int(index["num_postings"])
            parts = [(str(name), int(rows)) for name, rows in index["parts"]]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise StoreError(
                f"{folder / 'index.json'} is damaged ({err}): delete {folder} and call "
                "store.index() again."
            ) from err
        if version != VERSION:
            raise StoreError(
                f"{folder} is an index of version {version}, and this package reads {VERSION}: "
                "delete it and call store.index() again."
            )
        path = folder / "features.parquet"
        footer = read_footer(path)
        names = ["count", "max_act", "mean_act"]
        table = read_row_groups(path, footer, list(range(footer.num_row_groups)), names)
        self.counts, self.max_act, self.mean_act = (table[name].to_numpy() for name in names)
        if len(self.counts) != num_features or int(self.counts.sum()) != self.num_postings:
            raise StoreError(f"{path} does not fit its index: delete {folder} and build it again.")
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._parts = [name for name, _ in parts]
        self._begins = np.concatenate([[0], np.cumsum([rows for _, rows in parts])]).tolist()
        self._footer = lru_cache(maxsize=256)(lambda part: read_footer(folder / self._parts[part]))

    def read(self, feature: int, start: int, stop: int) -> tuple[Array, Array, Array]:
        """act, document, position of a feature's tokens of ranks start to stop, strongest first.

        Ranks beyond the feature's last are left out.
        """
        begin = int(self.starts[feature])
        low, high = begin + start, begin + min(stop, int(self.counts[feature]))
        tables = []
        while low < high:
            part = bisect_right(self._begins, low) - 1
            end = min(high, self._begins[part + 1])
            tables.append(self._read(part, low - self._begins[part], end - self._begins[part]))
            low = end
        table = pa.concat_tables(tables) if tables else POSTINGS.empty_table()
        if len(table) and not (table["feature"].to_numpy() == feature).all():
            raise StoreError(
                f"{self.folder} does not fit its features.parquet: delete it and call "
                "store.index() again."
            )
        names = ("act", "document", "position")
        return tuple(table[name].to_numpy() for name in names)

    def _read(self, part: int, start: int, stop: int) -> pa.Table:
        groups = range(start // ROW_GROUP, -(-stop // ROW_GROUP))
        path = self.folder / self._parts[part]
        table = read_row_groups(path, self._footer(part), list(groups), POSTINGS.names)
        return table.slice(start - groups.start * ROW_GROUP, stop - start)
