"""One SAE at one place of a model: reads the stream that comes by, and says what to add to it.

Beware The stream is copied when it comes by (models add to it in place) and encoded when `features`
       is read, so that showing costs a running `generate` next to nothing. With gradients on,
       features are differentiable.
"""

from __future__ import annotations

import math
from contextlib import nullcontext, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_switch_sae.edits.deltas import PreparedEdits
from hf_switch_sae.errors import EditError, HookpointError, NonFiniteError, WidthError
from hf_switch_sae.features import SparseFeatures
from hf_switch_sae.lm.hookpoints import Hookpoint
from hf_switch_sae.lm.positions import Tokens
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sessions.record_live import LiveRecorder


class Passed:
    """One residual stream [B, T, d] that came by, as it arrived; encoded when first asked."""

    def __init__(self, sae: SwitchSAE, stream: Tensor, tokens: Tokens) -> None:
        # a graph that nobody can use would only hold memory
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

    def shown(self) -> SparseFeatures:
        """The same with the tokens' positions, where they are known."""
        found = self.features()
        with suppress(EditError):
            return replace(found, positions=self.tokens.position.to(found.device))
        return found


class Tap:
    """One SAE at one hookpoint of the model or part of one that it was attached through."""

    def __init__(self, root: nn.Module, sae: SwitchSAE, place: Hookpoint, splice: bool) -> None:
        self.root, self.sae, self.place, self.splice = root, sae, place, splice
        self.width: int = sae.config.hidden_size
        self.edits = PreparedEdits(sae, ())
        self.last: Passed | None = None
        self.recorder: LiveRecorder | None = None

    def note(self, passed: Passed) -> None:
        """Show this pass from now on."""
        self.last = passed

    def record_last(self, token_ids: Tensor | None) -> None:
        """Hand the pass that just came by to the recorder, if there is one."""
        if self.recorder is not None and self.last is not None:
            passed = self.last
            with torch.no_grad():  # else checkpointing would count what it saves for gradients
                features = passed.features().detach()
            self.recorder.add(features, passed.tokens, token_ids)

    def change(
        self, x: Tensor, tokens: Tokens, edits: PreparedEdits | None
    ) -> tuple[tuple[Tensor, Tensor | None] | None, Passed]:
        """What to change in a stream x [B, T, d], and what came by.

        Args:
            x: the stream.
            tokens: whose its tokens are.
            edits: the live ones; None if nothing is to be changed.

        Returns:
            None, or (delta, which broadcasts to [B, T, d]; edited [B, T] bool, None if all are).
        """
        self._check(x, tokens)
        passed = Passed(self.sae, x, tokens)
        if edits is None or not (edits or self.splice):
            return None, passed
        features = passed.features() if self.splice or edits.needs_features else None
        change = edits.delta(features, tokens) if edits else None
        if not self.splice:
            return change, passed
        assert features is not None
        # padding and outliers are no input of the SAE, so they pass unspliced
        inputs = tokens.real & ~self.sae.is_outlier(x)
        # in float32: the difference of two near bfloat16 numbers would be noise
        spliced = self.sae.decode(features, x).float() - x.to(self.sae.device).float()
        spliced = spliced.where(inputs.to(spliced.device)[..., None], 0)
        if change is None:
            return (spliced, inputs), passed
        delta, edited = change
        return (delta.float() + spliced, None if edited is None else edited | inputs), passed

    def last_passed(self) -> Passed:
        """The last stream, or HookpointError if there was none."""
        if self.last is None:
            raise HookpointError(
                f"no forward pass has reached {self.place.name} since the SAE was attached, or the "
                "last one did not: run the model first (in this thread, unless the session was "
                "opened in the main one)."
            )
        return self.last

    def _check(self, x: Tensor, tokens: Tokens) -> None:
        if x.shape[-1] != self.width:
            raise WidthError(
                f"the residual stream at {self.place.name} is {x.shape[-1]} wide; "
                f"the SAE reads {self.width}."
            )
        # the sum is one operator, but it may overflow although every number is finite
        if not math.isfinite(x.sum().item()) and not torch.isfinite(x).all():
            # what stands in padding is nobody's number
            wrong = (~torch.isfinite(x)).any(-1) & tokens.real
            if wrong.any():
                row, at = (int(i) for i in wrong.nonzero()[0])
                with suppress(EditError):  # the column has to do where the position is not known
                    at = int(tokens.position[row, at])
                raise NonFiniteError(
                    f"the residual stream at {self.place.name} holds NaN or infinity, first in "
                    f"row {row}, position {at}: the model's own numbers broke "
                    "before the SAE saw them (dtype?)."
                )


def check_splices(taps: list[Tap], new: Tap) -> None:
    """EditError if two SAEs would both replace one residual stream."""
    if new.splice and any(tap.splice for tap in taps):
        raise EditError(
            f"{new.place.name} is spliced already: "
            "only one SAE can replace the residual stream there."
        )
