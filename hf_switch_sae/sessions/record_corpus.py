"""Features of a whole corpus: language model + SAEs + documents -> a store for each SAE.

How    The documents are cut into shards of some `shard_tokens` tokens by their sizes alone. Each is
       computed as a whole and written as one file, so its rows depend neither on which process
       computes it nor on when: an interrupted recording goes on with the shards that are missing,
       and ranks take every world-size-th. Nothing is sent between ranks.
Beware A document is never split over shards, so memory is that of the longest document or of one
       shard, whichever is more. Batches are made within a shard. `shard_tokens` and `batch_tokens`
       change padding, which may change the last bit of an act: both are kept in the store, and
       compared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, overload

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hf_switch_sae.errors import StoreError, TextError
from hf_switch_sae.lm.config import check_in_eval, longest_context, without_cache
from hf_switch_sae.lm.hookpoints import unwrap
from hf_switch_sae.lm.residuals import input_device, partial_forward
from hf_switch_sae.processes import rank_and_world, shows_progress
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sessions.attach import ByPlace, attach
from hf_switch_sae.sessions.provenance import provenance_of
from hf_switch_sae.sessions.record_live import check_one_vector_a_token
from hf_switch_sae.sessions.session import Session
from hf_switch_sae.store import FeatureStore, TokenRows
from hf_switch_sae.text.documents import Document, Documents, read_documents
from hf_switch_sae.text.windows import Batch, batches_of, windows_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_CHARACTERS_A_TOKEN = 4  # roughly, in English; only the size of shards depends on it


@dataclass(frozen=True)
class _Settings:
    """How documents become rows; what a store keeps and compares."""

    context: int
    prefix: tuple[int, ...]
    add_special_tokens: bool
    skip_special_tokens: bool
    batch_tokens: int
    shard_tokens: int


class RecordOptions(TypedDict, total=False):
    """Keywords of `record`, which says what they mean."""

    tokenizer: Any
    at: int | str | None
    column: str
    split: str
    revision: str | None
    context: int
    prefix: Sequence[int]
    add_special_tokens: bool
    skip_special_tokens: bool
    batch_tokens: int
    shard_tokens: int
    max_documents: int | None
    max_tokens: int | None
    max_bytes: int | None
    lm_revision: str | None
    sae_revision: str | None
    allow_mismatch: bool
    progress: bool | None


@overload
def record(
    lm: nn.Module,
    saes: SwitchSAE,
    dataset: Any,
    store: str | os.PathLike[str],
    **options: Unpack[RecordOptions],
) -> FeatureStore: ...


@overload
def record(
    lm: nn.Module,
    saes: ByPlace,
    dataset: Any,
    store: str | os.PathLike[str],
    **options: Unpack[RecordOptions],
) -> dict[str, FeatureStore]: ...


def record(
    lm: nn.Module,
    saes: SwitchSAE | ByPlace,
    dataset: Any,
    store: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    at: int | str | None = None,
    column: str = "text",
    split: str = "train",
    revision: str | None = None,
    context: int = 512,
    prefix: Sequence[int] = (),
    add_special_tokens: bool = True,
    skip_special_tokens: bool = False,
    batch_tokens: int = 4096,
    shard_tokens: int = 1 << 17,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    max_bytes: int | None = None,
    lm_revision: str | None = None,
    sae_revision: str | None = None,
    allow_mismatch: bool = False,
    progress: bool | None = None,
) -> FeatureStore | dict[str, FeatureStore]:
    """Record which features are active, and how strongly, on every token of a corpus.

    The model is run up to the last hooked block, unedited: live edits of open sessions don't act,
    and their recordings don't see the corpus. After an interrupt or a kill the same call goes on
    where it stopped; so does a call with larger limits, or with more files after the first ones.
    Under `accelerate launch` or torchrun each process records its share into the same folder.

    Args:
        lm: the language model, in eval mode; on one device, or spread by a `device_map`.
        saes: an SAE, or {place: SAE}.
        dataset: files, a folder, a Hub data set, or texts, as `text.read_documents` takes them.
        store: folder of the store, new or to go on with; of a mapping each SAE gets the subfolder
            of its hookpoint's name.
        tokenizer: the model's; not needed for documents of token ids.
        at: the place of a single SAE; its own `config.hookpoint` by default.
        column, split, revision: of the data set.
        context: tokens the model sees at once; longer documents are cut, and start afresh.
        prefix: token ids before each window, seen by the model and not recorded: what the SAE was
            trained with, such as an end-of-text token.
        add_special_tokens: whether the tokenizer puts its own in each document.
        skip_special_tokens: leave special tokens out of the store; the model sees them.
        batch_tokens: tokens a forward pass, padding included.
        shard_tokens: tokens a file, roughly: what is lost at most by being killed.
        max_documents: stop after this many of the data set's documents.
        max_tokens: stop at the first file with which the store holds this many; each of several
            processes takes its share.
        max_bytes: stop before the files of tokens take more, each process its share.
        lm_revision, sae_revision: commits the models were loaded from, to note in a new store:
            transformers no longer tells an LM's; an SAE's is taken from its config by default.
        allow_mismatch: accept another language model than the SAE was trained on.
        progress: whether to show a bar on stderr; by default if that is a terminal.

    Returns:
        The store; of a mapping {hookpoint: store}. Call its `index()` when all processes are done.

    Raises:
        AttachError, HookpointError: the SAE does not fit, or the model is in training mode.
        TextError: nothing to read there, or texts without a tokenizer.
        StoreError: a store of something else, no room on the disk, or an act too large to keep.
        ConfigError: a launcher's environment that can't be.
    """
    root = unwrap(lm)
    check_in_eval(root)
    # documents, settings and places are checked before a store is made
    documents = read_documents(dataset, column=column, split=split, revision=revision)
    settings = _Settings(
        context,
        tuple(prefix),
        add_special_tokens,
        skip_special_tokens,
        batch_tokens,
        shard_tokens,
    )
    _check(root, settings)
    share = _Share.of_this_process()
    with ExitStack() as stack:
        session = stack.enter_context(
            attach(lm, saes, at, allow_mismatch=allow_mismatch, all_threads=False)
        )
        # after attach: the stopping hook has to come last at its place
        run = stack.enter_context(partial_forward(lm, session.hookpoints))
        stack.enter_context(session.without_edits())
        stores = {}
        for name, tap in session.taps.items():
            made = provenance_of(
                lm,
                tap.sae,
                name,
                lm_revision=lm_revision,
                sae_revision=sae_revision,
                tokenizer=tokenizer,
                dataset=documents.provenance,
                text={**vars(settings), "prefix": list(settings.prefix)},
            )
            folder = Path(store) / name if isinstance(saes, Mapping) else Path(store)
            stores[name] = FeatureStore.create(folder, made)
            stores[name].remove_leftovers()
        recorder = _Recorder(session, run, tokenizer, settings, stores, share)
        limits = _Limits(max_documents, max_tokens, max_bytes)
        recorder.record(documents, limits, progress)
    for each in stores.values():
        each.refresh()
    return stores if isinstance(saes, Mapping) else next(iter(stores.values()))


def _check(root: nn.Module, settings: _Settings) -> None:
    """TextError for lengths that can't be."""
    longest = longest_context(root)
    if longest is not None and settings.context + len(settings.prefix) > longest:
        raise TextError(
            f"context={settings.context} and {len(settings.prefix)} tokens before it are more than "
            f"the {longest} positions of {type(root).__name__}: give a smaller context."
        )
    for name in ("context", "batch_tokens", "shard_tokens"):
        if getattr(settings, name) < 1:
            raise TextError(f"{name}={getattr(settings, name)} is not at least 1.")


@dataclass(frozen=True)
class _Limits:
    documents: int | None
    tokens: int | None
    bytes: int | None


@dataclass(frozen=True)
class _Share:
    """Which shards are this process's."""

    rank: int
    world: int

    @classmethod
    def of_this_process(cls) -> _Share:
        return cls(*rank_and_world())

    def of(self, limit: int | None) -> float:
        """This process's share of a limit; infinity if there is none."""
        return float("inf") if limit is None else limit / self.world


class _Recorder:
    """Records shards of documents, until the documents end or a limit is reached."""

    def __init__(
        self,
        session: Session,
        run: Any,
        tokenizer: Any,
        settings: _Settings,
        stores: dict[str, FeatureStore],
        share: _Share,
    ) -> None:
        self._session, self._run, self._share = session, run, share
        self._tokenizer, self._settings, self._stores = tokenizer, settings, stores
        root = unwrap(session.lm)
        self._device = input_device(root)
        self._options = without_cache(root)
        special = getattr(tokenizer, "all_special_ids", None) or []
        self._skipped = np.asarray(special if settings.skip_special_tokens else [], np.int64)

    def record(self, documents: Documents, limits: _Limits, progress: bool | None) -> None:
        """Record this process's share of the documents."""
        tokens, size, share = 0, 0, self._share
        disable = not shows_progress(progress)
        # for the bar alone; streams don't know their length
        total = documents.count
        if total is not None and limits.documents is not None:
            total = min(total, limits.documents)
        with tqdm(total=total, unit="doc", disable=disable or share.rank > 0) as bar:
            started, done = time.monotonic(), 0
            # shards depend on the documents alone, so that every run cuts them alike
            plan = _shards(documents, self._settings.shard_tokens, limits.documents)
            for number, shard in enumerate(plan):
                bar.update(len(shard))
                # shards are dealt out in turn, so ranks need not talk to each other
                if number % share.world != share.rank:
                    continue
                size += self._bytes_held(shard)
                # of a shard written in part, only what is missing is computed
                for lacking, run in groupby(shard, self._lacking):
                    piece = list(run)
                    held = self._tokens_held(piece)
                    if lacking:
                        if tokens >= share.of(limits.tokens):
                            return
                        written = self._record(piece, lacking, share.of(limits.bytes) - size)
                        if written is None:
                            return
                        size, done = size + written[1], done + written[0]
                        # documents that the first store lacked were not counted as held
                        held += written[0] if next(iter(self._stores)) in lacking else 0
                        speed = done / (time.monotonic() - started)
                        bar.set_postfix_str(f"{speed:,.0f} tokens/s")
                    tokens += held

    def _tokens_held(self, documents: list[Document]) -> int:
        """Tokens of the first store's files that begin with one of these documents."""
        store = next(iter(self._stores.values()))
        return store.tokens_and_bytes(documents[0].number, documents[-1].number)[0]

    def _bytes_held(self, documents: list[Document]) -> int:
        """Bytes of all stores' files that begin with one of these documents."""
        first, last = documents[0].number, documents[-1].number
        return sum(store.tokens_and_bytes(first, last)[1] for store in self._stores.values())

    def _lacking(self, document: Document) -> tuple[str, ...]:
        """The stores without a document: after a kill between two appends they differ."""
        return tuple(
            n for n, store in self._stores.items() if not store.has_document(document.number)
        )

    def _record(
        self, documents: list[Document], names: tuple[str, ...], room: float
    ) -> tuple[int, int] | None:
        """Compute and write one shard of these stores; tokens and bytes, or None if no `room`."""
        rows = self._compute(documents, names)
        count = total = 0
        for name in names:
            limit = None if room == float("inf") else int(room - total)
            first, last = documents[0].number, documents[-1].number
            size = self._stores[name].append(first, last, rows[name], limit)
            if size is None:
                return None
            total, count = total + size, len(rows[name])
        return count, total

    @torch.no_grad()
    def _compute(self, documents: list[Document], names: tuple[str, ...]) -> dict[str, TokenRows]:
        settings = self._settings
        windows = windows_of(
            documents, self._tokenizer, settings.context, settings.add_special_tokens
        )
        # padding is masked, so any id will do
        pad = getattr(self._tokenizer, "pad_token_id", None) or 0
        parts: dict[str, list[TokenRows]] = {name: [] for name in names}
        for batch in batches_of(windows, settings.batch_tokens, pad, settings.prefix):
            inputs = {name: tensor.to(self._device) for name, tensor in batch.inputs.items()}
            self._run(**inputs, **self._options)
            for name, found in self._rows(batch, names).items():
                parts[name].append(found)
        return {
            name: TokenRows.cat(found) if found else TokenRows.empty(self._layout(name))
            for name, found in parts.items()
        }

    def _rows(self, batch: Batch, names: tuple[str, ...]) -> dict[str, TokenRows]:
        token = batch.inputs["input_ids"].numpy()
        position, document = batch.position.numpy(), batch.document.numpy()
        # neither padding nor a prefix is a token of a document
        kept = (position >= 0) & ~np.isin(token, self._skipped)
        mask = torch.from_numpy(kept)
        rows = {}
        for name in names:
            tap = self._session.taps[name]
            features = tap.last_passed().features()
            if features.shape[0] != len(token) or features.shape[1] < token.shape[1]:
                raise StoreError(
                    f"the stream at {name} has {list(features.shape)} vectors for "
                    f"{list(token.shape)} tokens; a store has one row a token."
                )
            # a stream with several vectors a token has no row for each
            check_one_vector_a_token(tap.last_passed().tokens.position, name)
            # virtual tokens of a prompt-tuned model come first
            features = features[:, features.shape[1] - token.shape[1] :]
            found = features[mask.to(features.device)]
            rows[name] = TokenRows.of(
                found, document[kept], position[kept], token[kept], self._layout(name)
            )
        return rows

    def _layout(self, name: str) -> Any:
        return self._stores[name].provenance.layout


def _shards(
    documents: Iterable[Document], shard_tokens: int, max_documents: int | None
) -> Iterator[list[Document]]:
    """Consecutive documents, of some `shard_tokens` tokens together, by their sizes alone."""
    shard: list[Document] = []
    size = 0
    for document in documents:
        if max_documents is not None and document.number >= max_documents:
            break
        shard.append(document)
        size += document.size
        if size >= shard_tokens * _CHARACTERS_A_TOKEN:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard
