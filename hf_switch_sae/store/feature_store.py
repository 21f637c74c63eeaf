"""A folder of recorded features: append, index, ask.

Room   a folder with store.json, tokens/ and index/ -> answers. Each answer reads a few row groups
       of Parquet; nothing as large as the store is ever in memory.
Beware Answers about a feature come from the index, which covers the shards it was built from: call
       `index()` again after recording more.
"""

from __future__ import annotations

import os
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
from hf_switch_sae.processes import shows_progress
from hf_switch_sae.store import answers, postings
from hf_switch_sae.store import index as indexing
from hf_switch_sae.store.answers import Companion, Hit, Passage
from hf_switch_sae.store.levels import ranks_near
from hf_switch_sae.store.parquet import check_body
from hf_switch_sae.store.postings import Index
from hf_switch_sae.store.provenance import Provenance
from hf_switch_sae.store.rows import Array, TokenRows
from hf_switch_sae.store.shards import (
    FOLDER,
    ShardReader,
    TokenShard,
    list_shards,
    shard_path,
    write_shard,
)


class FeatureStore:
    """Recorded features of a corpus, on disk: which feature fires where, and how strongly.

    Args:
        path: the folder, made by `record` or `FeatureStore.create`.
        tokenizer: needed for queries by text; called as transformers' tokenizers are.

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
        """Open the store at `path`, which must be of this provenance, or make it.

        Raises:
            StoreError: the folder is a store of something else, or holds other things.
        """
        provenance.create_or_extend(Path(path))
        return cls(path)

    def refresh(self) -> None:
        """Read the list of shards again, to see what other writers have added."""
        self._reader = ShardReader(list_shards(self.path), self.provenance.layout)
        self.__dict__.pop("_index", None)
        self.__dict__.pop("_starts", None)  # where cached_property keeps it

    def __repr__(self) -> str:
        shards = self.shards
        documents = f", documents {shards[0].first} to {shards[-1].last}" if shards else ""
        return f"<FeatureStore {self.path}: {len(shards)} shards{documents}>"

    @property
    def shards(self) -> list[TokenShard]:
        """The files of tokens, ordered by document."""
        return self._reader.shards

    @property
    def num_features(self) -> int:
        """Width of the dictionary."""
        return self.provenance.num_features

    @property
    def num_tokens(self) -> int:
        """How many tokens are recorded; the first call reads the shards' footers."""
        return int(self._starts[-1])

    def has_document(self, document: int) -> bool:
        """Whether a document is recorded; it may have no tokens."""
        return self._reader.shard_of(document) is not None

    def tokens_and_bytes(self, first: int, last: int) -> tuple[int, int]:
        """Tokens and bytes of the shards whose first document lies in first to last."""
        found = self._reader.beginning_in(first, last)
        tokens = sum(self._reader.num_rows(index) for index in found)
        return tokens, sum(self.shards[index].size for index in found)

    @property
    def is_indexed(self) -> bool:
        """Whether there is an index of exactly these shards."""
        return (self._index_folder / postings.LISTING).exists()

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
        return Index(self._index_folder, self._reader)

    def disk_usage(self) -> dict[str, int]:
        """Bytes on disk, of `tokens` and of `index`."""
        return {
            name: sum(path.stat().st_size for path in (self.path / name).rglob("*.*"))
            for name in (FOLDER, postings.FOLDER)
        }

    # --- writing ---------------------------------------------------------------------------------

    def append(self, first: int, last: int, rows: TokenRows, room: int | None = None) -> int | None:
        """Add all tokens of documents first to last.

        If these documents are there already, they are replaced, and the index built from them is
        removed first. Other writers may add other documents at the same time. Queries see new
        documents after `refresh()`.

        Args:
            first, last: numbers of documents, including those without any token.
            rows: their tokens, in any order.
            room: the most bytes that the file may take.

        Returns:
            The file's size in bytes; None if it would have been larger than `room`, and was not
            kept.

        Raises:
            StoreError: rows of other documents, no room, or a file to replace while a process
                builds the index from it; no tokens have changed then.
        """
        if len(rows) and not (rows.document.min() >= first and rows.document.max() <= last):
            raise StoreError(
                f"these rows are of documents {rows.document.min()} to {rows.document.max()}, "
                f"not of {first} to {last}."
            )
        if shard_path(self.path, first, last).exists():
            # an index knows its shards by name and size, which may both stay the same
            indexing.remove(self.path)
            self.__dict__.pop("_index", None)
        return write_shard(self.path, first, last, rows, self.provenance.layout, room)

    def append_documents(self, documents: Sequence[TokenRows]) -> range:
        """Add whole documents under the next free numbers, and return these numbers.

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
            shards = list_shards(self.path)  # anew: another process may have added some
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
        """Remove the unfinished files of processes of this machine that were killed."""
        for folder in (self.path, self.path / FOLDER):
            remove_leftovers(folder)

    def index(self, memory: int = 1 << 30, progress: bool | None = None) -> None:
        """Build the index that queries about a feature need, or continue an interrupted build.

        Args:
            memory: bytes to sort in, besides what Python and its packages take.
            progress: whether to show a bar on stderr; by default if that is a terminal.

        Raises:
            StoreError: nothing recorded, a damaged shard, no room (a build also needs it for all
                postings uncompressed), or another process builds it.
        """
        self.refresh()
        if not self.shards:
            raise StoreError(f"{self.path} holds no tokens yet, so there is nothing to index.")
        disable = not shows_progress(progress)
        with tqdm(disable=disable, unit="file") as bar:

            def show(what: str, done: int, of: int) -> None:
                bar.set_description(what)
                bar.total = of
                bar.update(done - bar.n)

            indexing.build(self.path, self._reader, memory, show)
        self.refresh()

    def verify(self) -> None:
        """Read every file from end to end and compare it with its checksums.

        Raises:
            StoreError: a file is damaged; the message names it.
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
            n: the most tokens to return.
            context: how many tokens to show on each side; a pair for before and after.

        Raises:
            FeatureIdError: no such feature.
            StoreError: no index of what is recorded, or a damaged file.
        """
        return answers.hits(self._reader, self._index, self._checked(feature), (0, n), context)

    def sample(
        self,
        feature: int,
        quantiles: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.0),
        n: int = 4,
        context: int | tuple[int, int] = 8,
    ) -> dict[float, list[Hit]]:
        """Tokens at quantiles of a feature's acts, over the tokens on which it is active.

        Args:
            feature: its id.
            quantiles: 0 (its weakest act) to 1 (its strongest).
            n: tokens for each quantile, those nearest to it in rank. Up to 16 at the default
                quantiles take milliseconds; anything else may read thousands of row groups.
            context: how many tokens to show on each side; a pair for before and after.

        Returns:
            {quantile: hits, strongest first}; no hits for a feature that is never active.

        Raises:
            ValueError: a quantile outside 0 to 1.
            FeatureIdError, StoreError: as for `top_tokens`.
        """
        if not all(0 <= quantile <= 1 for quantile in quantiles):
            raise ValueError(f"quantiles lie between 0 and 1, not {list(quantiles)}.")
        feature = self._checked(feature)
        count = int(self._index.counts[feature])
        return {
            float(quantile): answers.hits(
                self._reader, self._index, feature, ranks_near(quantile, count, n), context
            )
            for quantile in quantiles
        }

    def density(self) -> Tensor:
        """The share of tokens on which each feature is active, [num_features] float64.

        Raises:
            StoreError: no index of what is recorded.
        """
        return torch.from_numpy(self._index.counts / max(1, self._index.num_tokens))

    def max_acts(self) -> Tensor:
        """The largest act of each feature, [num_features] float32; 0 if it is never active.

        Raises:
            StoreError: no index of what is recorded.
        """
        return torch.from_numpy(self._index.max_act.copy())  # the caller may change it

    def coactivation(self, feature: int, n: int = 20, tokens: int = 256) -> list[Companion]:
        """The features that are most often active where this one is, most often first.

        Args:
            feature: its id.
            n: the most features to return.
            tokens: how many of the feature's tokens to look at: evenly over its acts (over the
                levels of the index, see `levels`), the same ones every time.

        Raises:
            FeatureIdError, StoreError: as for `top_tokens`.
        """
        feature = self._checked(feature)
        count = int(self._index.counts[feature])
        ranks = np.unique(np.linspace(0, count - 1, min(tokens, count)).astype(np.int64))
        found = answers.companions(self._reader, self._index.spread(feature, ranks))
        return [each for each in found if each.feature != feature][:n]

    # --- questions about tokens ------------------------------------------------------------------

    def around(self, document: int, position: int, context: int | tuple[int, int] = 8) -> Passage:
        """The tokens around one token, with their features.

        Args:
            document: its number.
            position: of the token in the document.
            context: how many tokens to show on each side; a pair for before and after.

        Raises:
            StoreError: no such token is recorded, or a damaged file.
        """
        shard, row = self._reader.find(document, position)
        start, stop = answers.window(self._reader, shard, row, context)
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

        The shards' tokens are searched in turn until the text has been found often enough.

        Args:
            text_or_tokens: token ids, or text for the store's tokenizer, with the space before it
                if it has one in the corpus.
            n: the most features to return.
            tokens: at how many tokens of the text's occurrences to look, at most.

        Raises:
            StoreError: text without a tokenizer, an empty text, no ids, or a damaged file.
        """
        if isinstance(text_or_tokens, str):
            if self.tokenizer is None:
                raise StoreError(
                    "to ask by text, open the store with its tokenizer: FeatureStore(path, "
                    f"tokenizer=...); it was made with {self.provenance.tokenizer}."
                )
            text_or_tokens = self.tokenizer(text_or_tokens, add_special_tokens=False)["input_ids"]
        wanted = answers.token_ids(text_or_tokens)
        if not len(wanted):
            raise StoreError("no tokens to look for: the text is empty.")
        locations = answers.occurrences(self._reader, wanted, tokens)
        return answers.companions(self._reader, locations)[:n]

    def to_csr(self, documents: range | None = None) -> Tensor:
        """Features of some documents, or of all, as torch sparse CSR [tokens, num_features].

        In float16; rows are ordered by document and position, columns rise. The result must fit
        into memory: it takes 10 bytes for each active feature of each token.

        Raises:
            StoreError: a damaged file.
        """
        return answers.csr_of(list(self.rows(documents)), self.num_features)

    def rows(self, documents: range | None = None) -> Iterator[TokenRows]:
        """The recorded tokens, ordered by document and position, some thousands at a time.

        Raises:
            StoreError: a damaged file, or documents with a step.
        """
        if documents is not None and documents.step != 1:
            raise StoreError(f"documents are a range without a step, not {documents}.")
        yield from self._reader.documents(documents)

    def _checked(self, feature: int) -> int:
        return int(check_feature_ids([feature], self.num_features)[0])
