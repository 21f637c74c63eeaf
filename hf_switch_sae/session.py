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
from torch import Tensor, nn

from hf_switch_sae.deltas import PreparedEdits
from hf_switch_sae.edits import Edit
from hf_switch_sae.errors import AttachError, EditError, HookpointError, NonFiniteError, WidthError
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.hookpoints import Hookpoint, resolve
from hf_switch_sae.live import LiveRecorder, recording
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.positions import Tokens
from hf_switch_sae.recipe import Recipe
from hf_switch_sae.store import FeatureStore

_OUTLIER_NORM = 6.0  # times the median: attention sinks, left out of preflight as of training


class Passed:
    """One residual stream [B, T, d] that came by, as it arrived; encoded when first asked."""

    def __init__(self, sae: SwitchSAE, stream: Tensor, tokens: Tokens) -> None:
        cut = stream.requires_grad and not torch.is_grad_enabled()
        self.stream = (stream.detach() if cut else stream).clone()
        self.tokens = tokens
        self._sae = sae
        self._features: SparseFeatures | None = None

    def features(self) -> SparseFeatures:
        """Features [B, T], none of padding; differentiable if stream and grad mode allow."""
        live = self.stream.requires_grad and torch.is_grad_enabled()
        found = self._features
        if found is None or (live and not found.acts.requires_grad):
            with torch.no_grad() if torch.is_grad_enabled() and not live else nullcontext():
                found = self._sae.encode(self.stream)
                if not self.tokens.all_real:
                    acts = found.acts.where(self.tokens.real.to(found.device)[..., None], 0)
                    found = SparseFeatures(acts, found.ids, found.num_features)
            self._features = found
        return found


class Tap:
    """One SAE at one hookpoint."""

    def __init__(self, sae: SwitchSAE, place: Hookpoint, splice: bool) -> None:
        self.sae, self.place, self.splice = sae, place, splice
        self.width: int = sae.config.hidden_size
        self.edits = PreparedEdits(sae, ())
        self.last: Passed | None = None
        self.recorder: LiveRecorder | None = None

    def record_last(self, token_ids: Tensor | None) -> None:
        """Hand the pass that just came by to the recorder, if there is one."""
        if self.recorder is not None and self.last is not None:
            passed = self.last
            self.recorder.add(passed.features().detach(), passed.tokens.position, token_ids)

    def pass_by(
        self, x: Tensor, tokens: Tokens, read_only: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Note a stream x [B, T, d]; None to leave it alone, or what to change.

        Returns:
            delta [B, T, d], or as it is broadcast to that, and edited [B, T] bool, or None for all.
        """
        self._check(x, tokens)
        passed = self.last = Passed(self.sae, x, tokens)
        edits = self.edits  # looked up once, as another thread may set new ones meanwhile
        if read_only or not (edits or self.splice):
            return None
        features = passed.features() if self.splice or edits.needs_features else None
        change = edits.delta(features, tokens) if edits else None
        if not self.splice:
            return change
        assert features is not None
        inputs = tokens.real & ~self.sae.is_outlier(x)
        spliced = self.sae.decode(features, x).float() - x.to(self.sae.device).float()
        spliced = spliced.where(inputs.to(spliced.device)[..., None], 0)
        if change is None:
            return spliced, inputs
        delta, edited = change
        return delta.float() + spliced, None if edited is None else edited | inputs

    def last_passed(self) -> Passed:
        """The last stream, or HookpointError if there was none."""
        if self.last is None:
            raise HookpointError(
                f"no forward pass has reached {self.place.name} since the SAE was attached: run "
                "the model first (in this thread, unless the session was opened in the main one)."
            )
        return self.last

    def _check(self, x: Tensor, tokens: Tokens) -> None:
        if x.shape[-1] != self.width:
            raise WidthError(
                f"the residual stream at {self.place.name} is {x.shape[-1]} wide; "
                f"the SAE reads {self.width}."
            )
        # a sum over all is one operator; it may overflow where every number is finite
        if not math.isfinite(x.sum().item()) and not torch.isfinite(x).all():
            wrong = (~torch.isfinite(x)).any(-1) & tokens.real
            if wrong.any():
                row, at = (int(i) for i in wrong.nonzero()[0])
                position = int(tokens.position[row, at])
                raise NonFiniteError(
                    f"the residual stream at {self.place.name} holds NaN or infinity, first in "
                    f"row {row}, position {position}: the model's own numbers broke "
                    "before the SAE saw them (dtype?)."
                )


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


@dataclass(frozen=True)
class Preflight:
    """Whether an SAE fits its place, by its error on live tokens; prints as one line."""

    hookpoint: str
    """Where the SAE is attached."""
    fvu: float
    """Error on these tokens: 0 is exact, 1 no better than the mean."""
    l0: float
    """Active features per token, on average."""
    tokens: int
    """How many tokens were measured, padding and outliers left out."""
    card_fvu: float | None
    """`fvu` in the metrics of the SAE's config; None if absent."""
    card_l0: float | None
    """`l0` in the metrics of the SAE's config; None if absent."""
    trained_at: str | None = None
    """The SAE's own hookpoint, where that is another place than this; else None."""

    @property
    def fits(self) -> bool | None:
        """None when the SAE's config has no figures to compare with; False at another place.

        FVU may be twice the card's plus 0.05, and L0 off by half: a short text differs from the
        card's corpus, a wrong layer, model or scale differs far more.
        """
        if self.trained_at is not None:
            return False
        if self.card_fvu is None:
            return None
        near = self.card_l0 is None or abs(self.l0 - self.card_l0) <= 0.5 * self.card_l0
        return self.fvu <= 2 * self.card_fvu + 0.05 and near

    def __str__(self) -> str:
        card = "" if self.card_fvu is None else f" (card: {self.card_fvu:.3f}"
        card += "" if not card else f", L0 {self.card_l0:.1f})" if self.card_l0 is not None else ")"
        verdict = {
            True: "fits",
            False: "DOES NOT FIT",
            None: "nothing on the card to compare with",
        }[self.fits]
        live = f"FVU {self.fvu:.3f}, L0 {self.l0:.1f} on {self.tokens} tokens"
        where = "" if self.trained_at is None else f", trained at {self.trained_at}"
        return f"{self.hookpoint}: {live}{card}: {verdict}{where}"


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


def _trained_elsewhere(lm: nn.Module, tap: Tap) -> str | None:
    """The SAE's own hookpoint, if that is another place of the model than the tap's."""
    own = tap.sae.config.hookpoint
    if own is None:
        return None
    try:
        place = resolve(lm, own)
    except HookpointError:
        return own
    return None if (place.module, place.site) == (tap.place.module, tap.place.site) else own


def check_splices(taps: list[Tap], new: Tap) -> None:
    """EditError if two SAEs would both replace one residual stream."""
    if new.splice and any(tap.splice for tap in taps):
        raise EditError(
            f"{new.place.name} is spliced already: "
            "only one SAE can replace the residual stream there."
        )
