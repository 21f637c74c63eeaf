"""Features recorded while a session runs: pass by pass -> documents in a store.

How    A text that starts at position 0 is a new document. One that goes on, as under a KV cache,
       continues its document; one that goes back (rejected drafts) replaces what it had from there
       on. So plain forwards and `generate` are treated alike. Which text a token belongs to is the
       row's number, the request's name, or nothing else's where texts are packed into a row.
Beware A document is written when its text starts anew, or at the end of the recording: what a
       killed process had open is lost. Beam search moves texts from row to row, so it is refused
       at its first forward. A forward by `inputs_embeds` alone has token ids of -1.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hf_switch_sae.errors import AttachError, StoreError
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.lm.generation import Requests, Run
from hf_switch_sae.lm.positions import Tokens
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sessions.provenance import provenance_of
from hf_switch_sae.store import FeatureStore, TokenRows


class _Recordable(Protocol):
    sae: SwitchSAE
    recorder: Any


class LiveRecorder:
    """Joins what passes one hookpoint to documents, and writes them to a store.

    Args:
        store: a store of sessions, made with `dataset=None`.
        shard_tokens: finished documents are written once they have this many tokens together.
        ends: (pad, eos ids): padding that `generate` puts after the end of a text is left out.
    """

    def __init__(
        self, store: FeatureStore, shard_tokens: int, ends: tuple[int | None, set[int]]
    ) -> None:
        self._store, self._shard_tokens = store, shard_tokens
        self._pad, self._eos = ends
        self._open: dict[Hashable, _Text] = {}
        self._done: list[TokenRows] = []
        self._lock = threading.Lock()

    def add(self, features: SparseFeatures, tokens: Tokens, token: Tensor | None) -> None:
        """Note one pass.

        Args:
            features: [B, T], none of padding.
            tokens: whose the B x T tokens are.
            token: [B, T] int64 token ids, or None if they are not known; fewer columns, if the
                stream begins with virtual tokens.

        Raises:
            EditError: whose the tokens are can't be told.
            AttachError: beams.
            StoreError: several vectors a token, an act too large for a store, or no room.
        """
        run = tokens.run
        if isinstance(run, Run) and run.beams > 1:
            raise AttachError(
                f"generate with num_beams={run.beams} can't be recorded, as beams move from row to "
                "row: generate first, then record a plain forward of the texts."
            )
        # rows are put together on the CPU, where the store is written
        at = tokens.position.cpu()
        ids = _last_columns(token, at)
        layout, hookpoint = self._store.provenance.layout, self._store.provenance.hookpoint
        put_off = dict(zip(run.ids, run.put_off, strict=True)) if isinstance(run, Requests) else {}
        # several threads may generate on one model
        with self._lock:
            for text, row, start, stop in tokens.texts():
                check_one_vector_a_token(at[row : row + 1, start:stop], hookpoint)
                here = at[row, start:stop] >= 0
                if not here.any():
                    continue
                some = features[row, start:stop][here.to(features.device)]
                places = at[row, start:stop][here].numpy()
                words = ids[row, start:stop][here].numpy()
                new = TokenRows.of(some, np.zeros_like(places), places, words, layout)
                self._extend(text, new, put_off.get(str(text), False))
            if sum(map(len, self._done)) >= self._shard_tokens:
                self._write()

    def close(self) -> None:
        """Write what is open."""
        with self._lock:
            for name in list(self._open):
                self._finish(name)
            self._write()

    def _extend(self, name: Hashable, new: TokenRows, begins_again: bool) -> None:
        text, start = self._open.get(name), int(new.position[0])
        if text is None or start > text.length or (start == 0 and not begins_again):
            self._finish(name)
            text = self._open[name] = _Text()
        text.add(new)
        if name is None:  # packed: the next in the row is another one
            self._finish(name)

    def _finish(self, name: Hashable) -> None:
        if (text := self._open.pop(name, None)) is not None:
            rows = TokenRows.cat(text.parts)
            token = rows.token
            stop = len(token)
            # after its end a text is padded to the longest of its batch
            while (
                self._pad is not None
                and stop > 1
                and token[stop - 1] == self._pad
                and (token[stop - 2] == self._pad or int(token[stop - 2]) in self._eos)
            ):
                stop -= 1
            self._done.append(rows.take(np.arange(stop)))

    def _write(self) -> None:
        if self._done:
            self._store.append_documents(self._done)
            self._done = []


def check_one_vector_a_token(position: Tensor, hookpoint: str) -> None:
    """Raise StoreError where tokens [B, T] of a stream share a position."""
    if bool(((position[:, 1:] == position[:, :-1]) & (position[:, 1:] >= 0)).any()):
        raise StoreError(
            f"the stream at {hookpoint} has several vectors a token; a store has one row a token."
        )


def _last_columns(token: Tensor | None, position: Tensor) -> Tensor:
    """Token ids [B, T] of a stream that may begin with virtual tokens; -1 where not known."""
    missing = 0 if token is None else position.shape[1] - token.shape[1]
    if token is None or len(token) != len(position) or missing < 0:
        return torch.full_like(position, -1)
    return nn.functional.pad(token.cpu(), (missing, 0), value=-1)


class _Text:
    """One document so far."""

    def __init__(self) -> None:
        self.parts: list[TokenRows] = []
        self.length = 0

    def add(self, new: TokenRows) -> None:
        start = int(new.position[0])
        # drafts that were rejected: what stands from `start` on is replaced
        while self.parts and int(self.parts[-1].position[-1]) >= start:
            last = self.parts.pop()
            if (keep := int((last.position < start).sum())) > 0:
                self.parts.append(last.take(np.arange(keep)))
                break
        self.parts.append(new)
        self.length = int(new.position[-1]) + 1


@contextmanager
def recording(
    lm: nn.Module,
    taps: Mapping[str, _Recordable],
    folders: Mapping[str, Path],
    tokenizer: Any,
    lm_revision: str | None,
    shard_tokens: int,
) -> Iterator[dict[str, FeatureStore]]:
    """While open, every pass by the taps is recorded, each into the store at its folder.

    What `Session.record` does; options and errors are its.
    """
    stores: dict[str, FeatureStore] = {}
    for name, tap in taps.items():
        # before any store is made or changed
        if tap.recorder is not None:
            raise StoreError(f"{name} is being recorded already: one recording at a time.")
        provenance = provenance_of(lm, tap.sae, name, tokenizer=tokenizer, lm_revision=lm_revision)
        stores[name] = FeatureStore.create(folders[name], provenance)
    recorders = {n: LiveRecorder(store, shard_tokens, _ends(lm)) for n, store in stores.items()}
    for name, tap in taps.items():
        tap.recorder = recorders[name]
    try:
        yield stores
    finally:
        for tap in taps.values():
            tap.recorder = None
        with ExitStack() as closing:  # if one fails, the others still write what they have open
            for name, recorder in recorders.items():
                closing.callback(stores[name].refresh)
                closing.callback(recorder.close)


def _ends(lm: nn.Module) -> tuple[int | None, set[int]]:
    """The pad id and the end-of-text ids of a model's `generate`."""
    config: Any = getattr(lm, "generation_config", None) or getattr(lm, "config", None)
    eos = getattr(config, "eos_token_id", None)
    ends = set(eos) if isinstance(eos, list) else set() if eos is None else {int(eos)}
    pad = getattr(config, "pad_token_id", None)
    # generate falls back on the end of text where no padding is set
    return (next(iter(sorted(ends)), None) if pad is None else int(pad)), ends
