"""A folder of recorded features: append, index, ask.

Room   a folder with store.json, tokens/ and index/ -> answers, each of them read from a few row
       groups of Parquet; nothing as large as the store is ever in memory.
Beware Answers about a feature come from the index, which is of the shards it was built from: after
       more has been recorded, call `index()` again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_switch_sae.errors import StoreError
from hf_switch_sae.features import check_feature_ids
from hf_switch_sae.files import locked, remove_leftovers
from hf_switch_sae.store import index as indexing
from hf_switch_sae.store import postings
from hf_switch_sae.store.answers import (
    Companion,
    Hit,
    Passage,
    companions,
    csr_of,
    hits,
    occurrences,
    window,
)
from hf_switch_sae.store.levels import rank_at
from hf_switch_sae.store.parquet import check_body
from hf_switch_sae.store.postings import Index
from hf_switch_sae.store.postings_v1 import open_index
from hf_switch_sae.store.provenance import Provenance
from hf_switch_sae.store.rows import Array, TokenRows
from hf_switch_sae.store.shards import (
    FOLDER,
    Shard,
    ShardReader,
    list_shards,
    shard_path,
    write_shard,
)


class FeatureStore:
    """Recorded features of a corpus, on disk: who fires where, and how strongly.

    Args:
        path: the folder, as `record` or `FeatureStore.create` made it.
        tokenizer: for queries by text; any callable of transformers' kind.

    Raises:
        StoreError: no store there, a damaged one, or one of another format version.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.provenance = Provenance.read(self.path)
        self.refresh()

    @classmethod
    def create(cls, path: str | os.PathLike[str], provenance: Provenance) -> FeatureStore:
        """Open the store of this at `path`, or make it.

        Raises:
            StoreError: the folder is a store of something else, or holds other things.
        """
        provenance.write(Path(path))
        return cls(path)

    def refresh(self) -> None:
        """See what other writers have added meanwhile."""
        self._reader = ShardReader(list_shards(self.path), self.provenance.layout)
        self.__dict__.pop("_index", None)
        self.__dict__.pop("_starts", None)

    def __repr__(self) -> str:
        shards = self.shards
        documents = f", documents {shards[0].first} to {shards[-1].last}" if shards else ""
        return f"<FeatureStore {self.path}: {len(shards)} shards{documents}>"

    @property
    def shards(self) -> list[Shard]:
        """The files of tokens, in order of documents."""
        return self._reader.shards

    @property
    def num_features(self) -> int:
        """Width of the dictionary."""
        return self.provenance.num_features

    @property
    def num_tokens(self) -> int:
        """Tokens recorded; read from the shards' footers the first time."""
        return int(self._starts[-1])

    def holds(self, document: int) -> bool:
        """Whether a shard stands for the document, which may have no tokens."""
        return self._reader.shard_of(document) is not None

    def held(self, first: int, last: int) -> tuple[int, int]:
        """Tokens and bytes of the shards that begin with one of documents first to last."""
        found = self._reader.beginning_in(first, last)
        tokens = sum(self._reader.num_rows(index) for index in found)
        return tokens, sum(self.shards[index].size for index in found)

    @property
    def is_indexed(self) -> bool:
        """Whether there is an index of just these shards."""
        return (self._index_folder / "index.json").exists()

    @cached_property
    def _starts(self) -> Array:
        rows = [self._reader.num_rows(index) for index in range(len(self.shards))]
        return np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)

    @property
    def _index_folder(self) -> Path:
        return self.path / postings.FOLDER / indexing.generation(self.shards)

    @cached_property
    def _index(self) -> Index:
        if not self.is_indexed:
            old = (self.path / postings.FOLDER).is_dir()
            raise StoreError(
                f"{self.path} has {'an index, but of other shards' if old else 'no index'}: "
                "call store.index() first, or run `hf-switch-sae record` as before."
            )
        return open_index(self._index_folder, self._reader)

    def disk_usage(self) -> dict[str, int]:
        """Bytes on disk: of `tokens`, and of `index`."""
        return {
            name: sum(path.stat().st_size for path in (self.path / name).rglob("*.*"))
            for name in (FOLDER, postings.FOLDER)
        }

    # --- writing ---------------------------------------------------------------------------------

    def append(self, first: int, last: int, rows: TokenRows, room: int | None = None) -> int | None:
        """Add the tokens of documents first to last, all of them.

        The same documents again replace what was there, and the index that was made of it is
        removed first. Other writers may add other documents at the same time. Queries see them
        after `refresh()`.

        Args:
            first, last: numbers of documents; those without any token count too.
            rows: their tokens, in any order.
            room: bytes that the file may take.

        Returns:
            The file's size in bytes, or None if it would have been larger than `room` and was not
            kept.

        Raises:
            StoreError: rows of other documents, no room, or a file to replace while a process
                builds the index of it; no tokens have changed then.
        """
        if len(rows) and not (rows.document.min() >= first and rows.document.max() <= last):
            raise StoreError(
                f"these rows are of documents {rows.document.min()} to {rows.document.max()}, "
                f"not of {first} to {last}."
            )
        if shard_path(self.path, first, last).exists():
            # an index's name tells shards by name and size, and the new one may have the same
            indexing.remove(self.path)
            self.__dict__.pop("_index", None)
        return write_shard(self.path, first, last, rows, self.provenance.layout, room)

    def append_documents(self, documents: Sequence[TokenRows]) -> range:
        """Add whole documents under the next free numbers; the numbers they got.

        Several processes of one machine may do so at the same time.

        Raises:
            StoreError: the store is of a data set, whose documents have numbers; or no room.
        """
        if self.provenance.dataset is not None:
            raise StoreError(
                f"{self.path} is of a data set, {self.provenance.dataset}: record sessions to a "
                "folder of their own."
            )
        with locked(self.path / ".lock", wait=True):
            shards = list_shards(self.path)
            first = shards[-1].last + 1 if shards else 0
            numbered = [
                replace(rows, document=np.full(len(rows), first + i, np.int64))
                for i, rows in enumerate(documents)
            ]
            numbers = range(first, first + len(numbered))
            if numbered:
                self.append(first, numbers[-1], TokenRows.cat(numbered))
        self.refresh()
        return numbers

    def remove_leftovers(self) -> None:
        """Remove unfinished files of writers of this machine that were killed."""
        for folder in (self.path, self.path / FOLDER):
            remove_leftovers(folder)

    def index(self, memory: int = 1 << 30, progress: bool | None = None) -> None:
        """Build the index that queries about a feature need; goes on where it was interrupted.

        Args:
            memory: bytes to sort in, besides what Python and its packages take.
            progress: whether to show a bar on stderr; by default if that is a terminal.

        Raises:
            StoreError: nothing recorded, a damaged shard, no room on the disk (while it is built,
                all postings lie there unsorted besides), or another process is at it.
        """
        self.refresh()
        if not self.shards:
            raise StoreError(f"{self.path} holds no tokens yet, so there is nothing to index.")
        disable = not (sys.stderr.isatty() if progress is None else progress)
        with tqdm(disable=disable, unit="file") as bar:

            def show(what: str, done: int, of: int) -> None:
                bar.set_description(what)
                bar.total = of
                bar.update(done - bar.n)

            indexing.build(self.path, self._reader, memory, show)
        self.refresh()

    def verify(self) -> None:
        """Read every file from end to end against its checksums.

        Raises:
            StoreError: naming the first that is damaged.
        """
        files = [shard.path for shard in self.shards]
        if self.is_indexed:
            files += sorted(self._index_folder.glob("*.parquet"))
        for path in files:
            check_body(path)

    # --- questions about a feature ---------------------------------------------------------------

    def top_tokens(
        self, feature: int, n: int = 20, context: int | tuple[int, int] = 8
    ) -> list[Hit]:
        """The tokens on which a feature is strongest, strongest first.

        Args:
            feature: its id.
            n: how many, at most.
            context: tokens to show before and after; a pair if they differ.

        Raises:
            FeatureIdError: no such feature.
            StoreError: no index of what is recorded, or a damaged file.
        """
        return hits(self._reader, self._index, self._checked(feature), (0, n), context)

    def sample(
        self,
        feature: int,
        quantiles: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0),
        n: int = 4,
        context: int | tuple[int, int] = 8,
    ) -> dict[float, list[Hit]]:
        """Tokens at quantiles of a feature's acts over the tokens on which it is active.

        Args:
            feature: its id.
            quantiles: 0 (its weakest act) to 1 (its strongest).
            n: tokens a quantile: those nearest to it in rank. Up to 16 at the quantiles named by
                default take milliseconds; others may take the reading of thousands of row groups.
            context: tokens to show before and after; a pair if they differ.

        Returns:
            {quantile: hits, strongest first}; no hits for a feature that is never active.

        Raises:
            ValueError: a quantile outside 0 to 1.
            FeatureIdError, StoreError: as of `top_tokens`.
        """
        if not all(0 <= quantile <= 1 for quantile in quantiles):
            raise ValueError(f"quantiles lie between 0 and 1, not {list(quantiles)}.")
        feature = self._checked(feature)
        count = int(self._index.counts[feature])
        found = {}
        for quantile in quantiles:
            start = rank_at(quantile, count) - n // 2
            start = max(0, min(start, count - n))
            found[float(quantile)] = hits(
                self._reader, self._index, feature, (start, start + n), context
            )
        return found

    def density(self) -> Tensor:
        """[num_features] float64: the share of tokens on which each feature is active.

        Raises:
            StoreError: no index of what is recorded.
        """
        return torch.from_numpy(self._index.counts / max(1, self._index.num_tokens))

    def max_acts(self) -> Tensor:
        """[num_features] float32: the largest act of each feature, 0 for one that is never active.

        Raises:
            StoreError: no index of what is recorded.
        """
        return torch.from_numpy(self._index.max_act.copy())

    def coactivation(self, feature: int, n: int = 20, tokens: int = 256) -> list[Companion]:
        """The features that are most often active where this one is, most often first.

        Args:
            feature: its id.
            n: how many, at most.
            tokens: of the feature's tokens, how many to look at: spread evenly over its acts (over
                the levels of the index, see `levels`), the same ones every time. All of them where
                it has fewer.

        Raises:
            FeatureIdError, StoreError: as of `top_tokens`.
        """
        feature = self._checked(feature)
        count = int(self._index.counts[feature])
        ranks = np.unique(np.linspace(0, count - 1, min(tokens, count)).astype(np.int64))
        found = companions(self._reader, self._index.spread(feature, ranks))
        return [each for each in found if each.feature != feature][:n]

    # --- questions about tokens ------------------------------------------------------------------

    def around(self, document: int, position: int, context: int | tuple[int, int] = 8) -> Passage:
        """The tokens around a place, with their features.

        Args:
            document: its number.
            position: of the token in it.
            context: tokens before and after; a pair if they differ.

        Raises:
            StoreError: no such token is recorded, or a damaged file.
        """
        shard, row = self._reader.find(document, position)
        start, stop = window(self._reader, shard, row, context)
        rows = self._reader.rows(shard, start, stop)
        return Passage(
            document,
            tuple(rows.position.tolist()),
            tuple(rows.token.tolist()),
            rows.features(self.num_features),
        )

    def features_of(
        self, text_or_tokens: str | Sequence[int], n: int = 20, tokens: int = 512
    ) -> list[Companion]:
        """The features that are most often active where a text occurs, most often first.

        Every shard's tokens are searched in turn until the text was found often enough.

        Args:
            text_or_tokens: token ids, or a text for the store's tokenizer: a piece of text that the
                corpus holds, with the space before it if it has one there.
            n: how many features, at most.
            tokens: at how many tokens of the text's occurrences to look, at most.

        Raises:
            StoreError: text without a tokenizer, an empty text, or a damaged file.
        """
        if isinstance(text_or_tokens, str):
            if self.tokenizer is None:
                raise StoreError(
                    "to ask by text, open the store with its tokenizer: FeatureStore(path, "
                    f"tokenizer=...); it was made with {self.provenance.tokenizer}."
                )
            encoded = self.tokenizer(text_or_tokens, add_special_tokens=False)
            text_or_tokens = encoded["input_ids"]
        wanted = np.asarray(list(text_or_tokens), np.int32)
        if not len(wanted):
            raise StoreError("no tokens to look for: the text is empty.")
        places: list[tuple[int, int]] = []
        for shard, row in occurrences(self._reader, wanted):
            places += [(shard, row + i) for i in range(len(wanted))]
            if len(places) >= tokens:
                break
        return companions(self._reader, places)[:n]

    def to_csr(self, documents: range | None = None) -> Tensor:
        """[tokens, num_features], torch sparse CSR, float16, of some documents or of all.

        Rows are in order of document and position, columns in rising order. It must fit into
        memory: 10 bytes for each active feature of each token.

        Raises:
            StoreError: a damaged file.
        """
        return csr_of(list(self.rows(documents)), self.num_features)

    def rows(self, documents: range | None = None) -> Iterator[TokenRows]:
        """The recorded tokens in order of document and position, some thousands at a time.

        Raises:
            StoreError: a damaged file, or documents with a step.
        """
        if documents is not None and documents.step != 1:
            raise StoreError(f"documents are a range without a step, not {documents}.")
        for index, shard in enumerate(self.shards):
            if documents is not None and (
                shard.last < documents.start or shard.first >= documents.stop
            ):
                continue
            for block in self._reader.blocks(index):
                if documents is None:
                    yield block
                    continue
                inside = (block.document >= documents.start) & (block.document < documents.stop)
                if inside.any():
                    yield block.take(np.flatnonzero(inside))

    # --- how -------------------------------------------------------------------------------------

    def _checked(self, feature: int) -> int:
        return int(check_feature_ids([feature], self.num_features)[0])
