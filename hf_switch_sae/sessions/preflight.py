"""Whether an SAE and the place that it is attached to fit, measured on one forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from hf_switch_sae.errors import HookpointError
from hf_switch_sae.lm.hookpoints import resolve
from hf_switch_sae.sae.fvu import fvu_of
from hf_switch_sae.sessions.tap import Tap

_OUTLIER_NORM = 6.0  # times the median: attention sinks, left out of preflight as of training


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
        # a card may have no L0
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


def preflight_of(lm: nn.Module, tap: Tap) -> Preflight:
    """How well an SAE reconstructs the stream that just came by, beside its card's figures.

    Raises:
        ValueError: fewer than two tokens to measure on.
    """
    passed = tap.last_passed()
    x = passed.stream[passed.tokens.real].float()
    # what the SAE takes for outliers; of one that has no bound, those far over the median norm
    ordinary = ~tap.sae.is_outlier(x)
    if len(x) and not math.isfinite(tap.sae.outlier_norm):
        norms = x.norm(dim=-1)
        ordinary = norms <= _OUTLIER_NORM * norms.median()
    if int(ordinary.sum()) < 2:
        raise ValueError(
            "preflight needs at least two ordinary tokens; give it a few hundred of real text."
        )
    x = x[ordinary]
    features = tap.sae.encode(x)
    x_hat = tap.sae.decode(features, x).to(x.device).float()
    card = tap.sae.config.metrics or {}
    return Preflight(
        hookpoint=tap.place.name,
        fvu=float(fvu_of(x, x_hat, None)),
        l0=float(features.l0()),
        tokens=len(x),
        card_fvu=card.get("fvu"),
        card_l0=card.get("l0"),
        trained_at=_trained_elsewhere(lm, tap),
    )


def _trained_elsewhere(lm: nn.Module, tap: Tap) -> str | None:
    """The SAE's own hookpoint, if that is another place of the model than the tap's."""
    # two names may mean one place, so places are compared, not names
    own = tap.sae.config.hookpoint
    if own is None:
        return None
    try:
        place = resolve(lm, own)
    except HookpointError:
        return own
    return None if (place.module, place.site) == (tap.place.module, tap.place.site) else own
