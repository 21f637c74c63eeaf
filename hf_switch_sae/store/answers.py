"""What a store answers with, and how answers about tokens are put together from their rows.

Room   ranks of a feature -> hits; locations (shard, row) -> companions; token ids -> locations;
       rows -> CSR.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_switch_sae.errors import StoreError
from hf_switch_sae.features import SparseFeatures, holds_booleans
from hf_switch_sae.store.postings import Index
from hf_switch_sae.store.rows import Array, TokenRows
from hf_switch_sae.store.shards import ROW_GROUP, Location, ShardReader


@dataclass(frozen=True)
class Hit:
    """One token on which a feature is active, with the tokens around it."""

    feature: int
    act: float
    """In the language model's own units, router weight included."""
    document: int
    """Number of the document in the data set, from 0."""
    position: int
    """Of the token in its document, from 0."""
    tokens: tuple[int, ...]
    """Ids of the token and those around it."""
    at: int
    """Index of the token itself in `tokens`."""


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of one document, with their features."""

    document: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    features: SparseFeatures
    """[len(tokens)], acts in float16, strongest first."""


@dataclass(frozen=True)
class Companion:
    """How often, and how strongly, a feature is active on some set of tokens."""

    feature: int
    share: float
    """Share of the tokens on which it is active, 0 to 1."""
    mean_act: float
    """Mean act over the tokens on which it is active."""


def hits(
    reader: ShardReader,
    index: Index,
    feature: int,
    ranks: tuple[int, int],
    context: int | tuple[int, int],
) -> list[Hit]:
    """A feature's tokens of ranks from and to, strongest first, with the tokens around them."""
    found = []
    for act, (shard, row) in zip(*index.ranked(feature, *ranks), strict=True):
        start, stop = window(reader, shard, row, context)
        documents, positions, tokens = reader.tokens(shard, start, stop)
        at = row - start
        document, position = int(documents[at]), int(positions[at])
        found.append(Hit(feature, float(act), document, position, tuple(tokens.tolist()), at))
    return found


def window(
    reader: ShardReader, shard: int, row: int, context: int | tuple[int, int]
) -> tuple[int, int]:
    """Rows of a shard around one of them, within its document: start and stop."""
    before, after = (context, context) if isinstance(context, int) else context
    start, stop = max(0, row - before), min(reader.num_rows(shard), row + after + 1)
    documents, _, _ = reader.tokens(shard, start, stop)
    # rows are ordered by document, so those of one lie together
    mine = np.flatnonzero(documents == documents[row - start])
    return start + int(mine[0]), start + int(mine[-1]) + 1


def companions(reader: ShardReader, locations: list[Location]) -> list[Companion]:
    """Features active on the tokens at these locations, the most frequent first."""
    width = reader.layout.num_features
    counts, sums = np.zeros(width, np.int64), np.zeros(width)
    # read each row group once
    groups: dict[tuple[int, int], list[int]] = {}
    for shard, row in locations:
        groups.setdefault((shard, row // ROW_GROUP), []).append(row)
    for (shard, group), rows in groups.items():
        start = group * ROW_GROUP
        stop = min(start + ROW_GROUP, reader.num_rows(shard))
        block = reader.rows(shard, start, stop).take(np.asarray(rows) - start)
        counts += np.bincount(block.ids, minlength=width)
        sums += np.bincount(block.ids, block.acts.astype(np.float64), width)
    # by falling count, then by falling sum of acts, then by id
    active = np.flatnonzero(counts)
    order = active[np.lexsort((active, -sums[active], -counts[active]))]
    return [
        Companion(int(id), float(counts[id] / len(locations)), float(sums[id] / counts[id]))
        for id in order
    ]


def token_ids(given: Iterable[Any]) -> Array:
    """A text's token ids, [n].

    Raises:
        StoreError: they are no integers, such as a mask.
    """
    given = list(given)
    ids = np.asarray(given)
    if holds_booleans(given) or (ids.size and ids.dtype.kind not in "iu"):
        raise StoreError(f"token ids are integers; got {given!r}.")
    return ids.astype(np.int64)


def occurrences(reader: ShardReader, text: Array, most: int) -> list[Location]:
    """Locations of the tokens of a text, [n] token ids, wherever they follow one another.

    The shards are searched in turn, within documents, until there are `most` or just over.
    """
    found: list[Location] = []
    last = len(text) - 1
    for shard in range(len(reader.shards)):
        count = reader.num_rows(shard) - last
        if count <= 0:  # a shard of documents without tokens, too
            continue
        document, position, token = reader.tokens(shard, 0, count + last)
        # rows where the text begins
        here = np.ones(count, bool)
        for i, each in enumerate(text):
            here &= token[i : i + count] == each
        here &= document[:count] == document[last:]
        # next to each other in the document too: special tokens may have been left out
        here &= position[last:] - position[:count] == last
        for row in np.flatnonzero(here).tolist():
            found += [(shard, row + i) for i in range(len(text))]
            if len(found) >= most:
                return found
    return found


def csr_of(parts: list[TokenRows], num_features: int) -> Tensor:
    """Rows as torch sparse CSR [tokens, num_features] in float16, columns in rising order."""
    if not parts:
        none = torch.zeros(0, num_features, dtype=torch.float16, device="cpu")
        return none.to_sparse_csr()
    rows = TokenRows.cat(parts)
    token = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
    # a row's features are strongest first, and CSR wants rising columns
    order = np.lexsort((rows.ids, token))
    return torch.sparse_csr_tensor(
        torch.from_numpy(rows.offsets),
        torch.from_numpy(rows.ids[order]),
        torch.from_numpy(rows.acts[order]),
        (len(rows), num_features),
        device="cpu",
        check_invariants=True,
    )
