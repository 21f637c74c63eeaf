"""A session: what `attach` returns, and what a user reads and edits through.

Room   taps at hookpoints (`tap.py`) -> features of the last pass, live edits, recordings. Hooks are
       the board's (`board.py`), which every session of a model shares.
Beware Several threads may run one session: what a pass needs is in locals, and a tap keeps only the
       last pass.
"""

from __future__ import annotations

import abc
import itertools
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_switch_sae.edits.deltas import PreparedEdits
from hf_switch_sae.edits.kinds import Edit
from hf_switch_sae.edits.recipe import Recipe
from hf_switch_sae.errors import AttachError, HookpointError
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sessions.board import check_with_others, close_session, without_edits
from hf_switch_sae.sessions.preflight import Preflight, preflight_of
from hf_switch_sae.sessions.record_live import recording
from hf_switch_sae.sessions.tap import Tap
from hf_switch_sae.store import FeatureStore

if TYPE_CHECKING:
    from typing_extensions import Self

_NUMBERS = itertools.count()
"""Sessions are listed in the order they were opened."""


@dataclass(frozen=True)
class AttachedSAE:
    """One line of `status`: which SAE reads and writes where, and what it changes."""

    hookpoint: str
    """Where, e.g. `layers.7.resid_post`."""
    path: str
    """The same place as a module path in the unwrapped model."""
    sae: str
    """Hub id or folder it was loaded from; its size if it was built in memory."""
    edits: tuple[Edit, ...]
    """The live edits."""
    splice: bool
    """Whether the reconstruction replaces the residual stream."""
    thread: str
    """Which threads the session acts in: "all threads", or "thread " and a name."""

    def __str__(self) -> str:
        changes = ", ".join(repr(edit) for edit in self.edits) or "no edits"
        spliced = ", spliced" if self.splice else ""
        return f"{self.hookpoint} ({self.path}): {self.sae}{spliced}, {changes} [{self.thread}]"


class Session(abc.ABC):
    """SAEs attached to a language model, from `attach` to `detach` or the end of the `with` block.

    Of one SAE (`attach(lm, sae)`) what it shows is one thing: `session.features` are features. Of a
    mapping (`attach(lm, {7: sae})`) it is a mapping by hookpoint, however many SAEs are in it.

    A session acts in the thread that opened it. One opened in the main thread also acts in threads
    that have none of their own on this model (so a streaming `generate` in a worker thread is
    edited); `all_threads` decides otherwise.
    """

    def __init__(self, lm: nn.Module, taps: Mapping[str, Tap], all_threads: bool) -> None:
        self.lm = lm
        self.number = next(_NUMBERS)
        self.thread = threading.current_thread()  # not its ident, which a later thread may get
        self.all_threads = all_threads
        self.attached = True
        self.has_warned = False
        self._taps = dict(taps)

    def __enter__(self) -> Self:
        if not self.attached:
            raise AttachError("this session is detached; attach again for a new one.")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"<Session {state} at {', '.join(self._taps)} of {type(self.lm).__name__}>"

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Where SAEs are attached."""
        return tuple(self._taps)

    @property
    def taps(self) -> Mapping[str, Tap]:
        """What is at each hookpoint; for `attach` and tools, not for users."""
        return self._taps

    @property
    @abc.abstractmethod
    def features(self) -> SparseFeatures | dict[str, SparseFeatures]:
        """Features of the last forward pass, before edits; of a mapping, by hookpoint.

        [batch, seq] tokens with k slots each, acts in the LM's own units. Under `generate` that is
        the last step: [rows * beams, 1] with a cache. With gradients on they are differentiable,
        and the stream's graph stays alive until the next forward.

        Raises:
            HookpointError: no forward pass has come by yet.
            ConfigError: a batch_topk SAE without a threshold.
        """

    @property
    @abc.abstractmethod
    def edits(self) -> tuple[Edit, ...] | dict[str, tuple[Edit, ...]]:
        """The live edits; of a mapping, by hookpoint."""

    def edit(self, *edits: Edit, at: str | None = None) -> None:
        """Make these the live edits at a hookpoint, in place of those before; none clears them.

        Takes effect at the next forward pass, so at the next token of a running `generate`.

        Args:
            edits: any number; their order does not matter.
            at: the hookpoint, needed only if the session has several.

        Raises:
            EditError: a malformed edit, a unit without statistics, or edits (here or in another
                session) that set the same feature on the same tokens.
            FeatureIdError: a feature outside the dictionary.
            AttachError: the session is detached.
        """
        if not self.attached:
            raise AttachError(
                "this session is detached, so its edits would do nothing; attach again."
            )
        tap = self._tap(at)
        # both may refuse; the live edits change only after them, in one assignment
        prepared = PreparedEdits(tap.sae, edits)
        check_with_others(self, tap, prepared)
        tap.edits = prepared

    def _tap(self, at: str | None) -> Tap:
        if at is None and len(self._taps) == 1:
            return next(iter(self._taps.values()))
        if at not in self._taps:
            raise HookpointError(
                f"name one of this session's hookpoints, at={' or '.join(map(repr, self._taps))}."
            )
        return self._taps[at]

    def recipe(self, at: str | None = None) -> Recipe:
        """The live edits at a hookpoint as a `Recipe`, to save or publish.

        Raises:
            HookpointError: several hookpoints and none named, or one that is not the session's.
        """
        tap = self._tap(at)
        return Recipe(sae=_name(tap.sae), edits=tap.edits.edits, hookpoint=tap.place.name)

    @abc.abstractmethod
    def record(
        self,
        store: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        lm_revision: str | None = None,
        shard_tokens: int = 1 << 17,
    ) -> AbstractContextManager[FeatureStore] | AbstractContextManager[dict[str, FeatureStore]]:
        """Record the features of every forward pass, also within `generate`, while it is open.

            with session.record("folder") as store:
                lm.generate(**inputs)
            store.index()

        Each row of a forward is a document; what a KV cache goes on with belongs to the same one.
        Features are those before edits. New documents are numbered after those in the store.

        Args:
            store: folder of a store of sessions, or of a new one; of a mapping each hookpoint gets
                the store in the subfolder of its name.
            tokenizer: that made the tokens, to note in a new store.
            lm_revision: commit the language model was loaded from, to note in a new store.
            shard_tokens: finished documents are written when they have so many tokens together.

        Returns:
            A context manager: of the FeatureStore; of a mapping, of the stores by hookpoint.

        Raises:
            AttachError: the session is detached.
            StoreError: the folder is a store of something else or holds other things; within the
                block: no room on the disk.
        """

    def _recording(
        self,
        folders: Mapping[str, Path],
        tokenizer: Any,
        lm_revision: str | None,
        shard_tokens: int,
    ) -> AbstractContextManager[dict[str, FeatureStore]]:
        if not self.attached:
            raise AttachError("this session is detached, so nothing would come by; attach again.")
        return recording(self.lm, self._taps, folders, tokenizer, lm_revision, shard_tokens)

    def status(self) -> list[AttachedSAE]:
        """One line for each hookpoint; `status(lm)` gives those of all sessions."""
        thread = "all threads" if self.all_threads else f"thread {self.thread.name}"
        return [
            AttachedSAE(name, tap.place.path, _name(tap.sae), tap.edits.edits, tap.splice, thread)
            for name, tap in self._taps.items()
        ]

    @torch.no_grad()
    def preflight(self, inputs: Mapping[str, Any], at: str | None = None) -> Preflight:
        """Run the model once, unedited, and compare FVU and L0 with the card's figures.

        No session edits in that run. Padding and outliers (above the SAE's `outlier_norm`; if it
        has none, of more than 6 times the median norm) are left out.

        Args:
            inputs: keyword arguments of the model's forward; a few hundred tokens of ordinary text.
            at: the hookpoint, needed only if the session has several.

        Raises:
            AttachError: the session is detached.
            HookpointError: several hookpoints and none named, or the forward did not pass by.
            ValueError: fewer than two tokens to measure on.
        """
        if not self.attached:
            raise AttachError("this session is detached, so nothing would come by; attach again.")
        if not isinstance(inputs, Mapping):
            raise TypeError(
                "preflight takes the model's inputs by name, as a tokenizer returns them with "
                f"return_tensors='pt'; got {type(inputs).__name__}."
            )
        tap = self._tap(at)
        # an older pass must not be taken for the one of these inputs
        tap.last = None
        with self.without_edits():
            self.lm(**inputs)
        return preflight_of(self.lm, tap)

    def without_edits(self) -> AbstractContextManager[None]:
        """While open, no session edits in this thread, and none records."""
        return without_edits()

    def detach(self) -> None:
        """Remove this session's hooks: the model is what it was. Doing it twice does nothing."""
        if self.attached:
            self.attached = False
            close_session(self)


class SessionOfOne(Session):
    """A session of one SAE; see `Session`."""

    @property
    def _only(self) -> Tap:
        return next(iter(self._taps.values()))

    @property
    def features(self) -> SparseFeatures:
        """[batch, seq]; see `Session.features`."""
        return self._only.last_passed().shown()

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The live edits."""
        return self._only.edits.edits

    def record(
        self,
        store: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        lm_revision: str | None = None,
        shard_tokens: int = 1 << 17,
    ) -> AbstractContextManager[FeatureStore]:
        """See `Session.record`."""
        name = self._only.place.name
        found = self._recording({name: Path(store)}, tokenizer, lm_revision, shard_tokens)
        return _one_of(found, name)


class SessionOfSeveral(Session):
    """A session of the SAEs of a mapping; see `Session`."""

    @property
    def features(self) -> dict[str, SparseFeatures]:
        """By hookpoint, [batch, seq] each; see `Session.features`."""
        return {name: tap.last_passed().shown() for name, tap in self._taps.items()}

    @property
    def edits(self) -> dict[str, tuple[Edit, ...]]:
        """The live edits by hookpoint."""
        return {name: tap.edits.edits for name, tap in self._taps.items()}

    def record(
        self,
        store: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        lm_revision: str | None = None,
        shard_tokens: int = 1 << 17,
    ) -> AbstractContextManager[dict[str, FeatureStore]]:
        """See `Session.record`."""
        folders = {name: Path(store) / name for name in self._taps}
        return self._recording(folders, tokenizer, lm_revision, shard_tokens)


def _name(sae: SwitchSAE) -> str:
    return sae.name_or_path or f"SwitchSAE({sae.config.num_features} features)"


@contextmanager
def _one_of(
    stores: AbstractContextManager[dict[str, FeatureStore]], name: str
) -> Iterator[FeatureStore]:
    with stores as found:
        yield found[name]
