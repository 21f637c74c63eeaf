"""What happens to a residual stream that comes by: shown as features, changed by the live edits.

A `Session` is what `attach` returns. It holds one `Tap` for each hookpoint; `attach` hands each tap
the stream as it arrived, and adds up what the taps of all sessions at that place want added.
Nothing is hooked here.

Beware The stream is copied when it comes by (models add to it in place) and encoded when `features`
       is read, so that showing costs a running `generate` next to nothing. With gradients on,
       features are differentiable. Several threads may run one session: what a pass needs is in
       locals, and the tap only keeps the last.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from hf_switch_sae.edits.deltas import PreparedEdits
from hf_switch_sae.edits.kinds import Edit
from hf_switch_sae.edits.recipe import Recipe
from hf_switch_sae.errors import AttachError, HookpointError
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sessions.preflight import _OUTLIER_NORM, Preflight, _trained_elsewhere
from hf_switch_sae.sessions.record_live import recording
from hf_switch_sae.sessions.tap import Tap
from hf_switch_sae.store import FeatureStore


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


class Session:
    """SAEs attached to a language model, from `attach` to `detach` or the end of the `with` block.

    A session acts in the thread that opened it. One opened in the main thread also acts in threads
    that have none of their own on this model (so a streaming `generate` in a worker thread is
    edited); `all_threads` decides otherwise.
    """

    def __init__(
        self,
        lm: nn.Module,
        taps: Mapping[str, Tap],
        all_threads: bool,
        detach: Callable[[Session], None],
    ):
        self.lm = lm
        self.thread = threading.current_thread()  # not its ident, which a later thread may get
        self.all_threads = all_threads
        self.attached = True
        self._taps = dict(taps)
        self._on_detach = detach

    def __enter__(self) -> Session:
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
    def features(self) -> SparseFeatures | dict[str, SparseFeatures]:
        """Features of the last forward pass, before edits; a dict by hookpoint if several.

        [batch, seq] tokens with k slots each, acts in the LM's own units. Under `generate` that is
        the last step: [rows * beams, 1] with a cache. With gradients on they are differentiable,
        and the stream's graph stays alive until the next forward.

        Raises:
            HookpointError: no forward pass has come by yet.
            ConfigError: a batch_topk SAE without a threshold.
        """
        if len(self._taps) == 1:
            return next(iter(self._taps.values())).last_passed().features()
        return {name: tap.last_passed().features() for name, tap in self._taps.items()}

    @property
    def edits(self) -> tuple[Edit, ...] | dict[str, tuple[Edit, ...]]:
        """The live edits; a dict by hookpoint if there are several."""
        found = {name: tap.edits.edits for name, tap in self._taps.items()}
        return next(iter(found.values())) if len(found) == 1 else found

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
        prepared = PreparedEdits(tap.sae, edits)
        self.check_with_others(tap, prepared)
        tap.edits = prepared

    def check_with_others(self, tap: Tap, prepared: PreparedEdits) -> None:
        """EditError if the edits contradict another session's; `attach` puts the check here."""

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

    def record(
        self,
        store: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        lm_revision: str | None = None,
        shard_tokens: int = 1 << 17,
    ) -> AbstractContextManager[FeatureStore | dict[str, FeatureStore]]:
        """Record the features of every forward pass, also within `generate`, while it is open.

            with session.record("folder") as store:
                lm.generate(**inputs)
            store.index()

        Each row of a forward is a document; what a KV cache goes on with belongs to the same one.
        Features are those before edits. Numbers of documents go on from those in the store.

        Args:
            store: folder of a store of sessions, or of a new one; with several hookpoints each gets
                the store in the subfolder of its name.
            tokenizer: that made the tokens, to note in a new store.
            lm_revision: commit the language model was loaded from, to note in a new store.
            shard_tokens: finished documents are written when they have so many tokens together.

        Returns:
            A context manager: of the FeatureStore, or of a dict of them by hookpoint.

        Raises:
            AttachError: the session is detached.
            StoreError: the folder is a store of something else or holds other things; within the
                block: no room on the disk.
        """
        if not self.attached:
            raise AttachError("this session is detached, so nothing would come by; attach again.")
        return recording(self.lm, self._taps, Path(store), tokenizer, lm_revision, shard_tokens)

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
        tap.last = None
        with self.without_edits():
            self.lm(**inputs)
        passed = tap.last_passed()
        x = passed.stream[passed.tokens.real].float()
        ordinary = ~tap.sae.is_outlier(x)
        if len(x) and not math.isfinite(tap.sae.outlier_norm):  # none recorded
            norms = x.norm(dim=-1)
            ordinary = norms <= _OUTLIER_NORM * norms.median()
        if int(ordinary.sum()) < 2:
            raise ValueError(
                "preflight needs at least two ordinary tokens; give it a few hundred of real text."
            )
        x = x[ordinary]
        features = tap.sae.encode(x)
        error = x - tap.sae.decode(features, x).to(x.device).float()
        fvu = error.square().sum() / (x - x.mean(0)).square().sum()
        card = tap.sae.config.metrics or {}
        return Preflight(
            hookpoint=tap.place.name,
            fvu=float(fvu),
            l0=float(features.l0()),
            tokens=len(x),
            card_fvu=card.get("fvu"),
            card_l0=card.get("l0"),
            trained_at=_trained_elsewhere(self.lm, tap),
        )

    def without_edits(self) -> AbstractContextManager[None]:
        """While open, no session edits in this thread; `attach` puts the switch here."""
        return nullcontext()

    def detach(self) -> None:
        """Remove this session's hooks: the model is what it was. Doing it twice does nothing."""
        if self.attached:
            self.attached = False
            self._on_detach(self)


def _name(sae: SwitchSAE) -> str:
    return sae.name_or_path or f"SwitchSAE({sae.config.num_features} features)"
