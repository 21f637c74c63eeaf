"""Tokens on their way through an SAE: what encoding leaves for decoding and for the losses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hf_switch_sae.input_norm import Unit


class Seen(NamedTuple):
    """What experts see of the tokens, in their order, and which; arguments of `Experts.encode`."""

    x: Tensor
    """[n, d]"""
    expert_ids: Tensor
    """[n, t] int64."""
    gates: Tensor | None
    """[n, t] float32."""


class Encoded(NamedTuple):
    """n tokens, in the order of experts where that helps."""

    z: Tensor
    """[n, d], in order, outliers replaced, less the bias; of which no gradient goes through it."""
    bias: Tensor
    """[d], `b_dec` in the LM's own units."""
    acts: Tensor
    """[n, slots], in order."""
    ids: Tensor
    """[n, slots], in order."""
    order: Tensor | None
    """[n] int64, the token at each place; None: as they came."""
    places: Tensor | None
    """[n] int64, the place of each token; None likewise."""
    router: tuple[Tensor, Tensor, Tensor] | None
    """logits and probs [n, E], expert ids [n, t], as the tokens came; None with one expert."""
    counts: Tensor | None
    """[n] bool, as the tokens came: which count in the losses; None for all."""
    counts_in_order: Tensor | None
    """The same, in order."""
    threshold: Tensor | None
    """[E, m] in scaled units, what activations had to exceed; None for nothing."""
    seen: Seen
    """In order."""
    unit: Unit | None
    """Of each token, as they came: x and acts are in it; None without input_norm."""


def as_ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows [n, ...] of the tokens as they came, in order; or, by `places`, the other way round."""
    return rows if order is None else rows.index_select(0, order)
