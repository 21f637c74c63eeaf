"""Tokens on their way through an SAE: what encoding leaves for decoding and for the losses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_switch_sae.sae.input_norm import Unit


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


_infinite = WeakTensorKeyDictionary()  # bound -> the version of it that was read, and the answer


def _is_infinite(bound: Tensor) -> bool:
    """Whether a bound [] is known to be none; off the CPU it is read once for each time it was
    written (not through `.data`), as that waits for the device, and never within a CUDA graph."""
    if bound.device.type == "cpu":
        return math.isinf(bound)
    if bound.device.type == "meta" or bound.is_inference():  # which has no version
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    version, answer = _infinite.get(bound, (None, False))  # type: ignore[no-untyped-call]
    if version != bound._version:
        version, answer = bound._version, math.isinf(bound)
        _infinite[bound] = version, answer
    return bool(answer)


def _mask_of(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """attention_mask [...] as bool where hidden_states [..., hidden_size] are.

    Raises:
        ValueError: it is not of these tokens.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"the attention_mask {[*attention_mask.shape]} is not of these tokens: hidden_states "
            f"{[*hidden_states.shape]} need one of {[*hidden_states.shape[:-1]]}."
        )
    return attention_mask.to(hidden_states.device).bool()


def _counted(outlier: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """[n] bool of the tokens that count, from outlier and mask [n] bool; None for all."""
    if outlier is None:
        return mask
    return ~outlier if mask is None else mask & ~outlier
