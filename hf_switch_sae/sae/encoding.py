"""Tokens -> their code: normalized, routed, sorted by expert, encoded.

Room   hidden_states [..., d] -> `Encoded`, what decoding and losses go on from. With `sort` its
       tokens are in the order of experts, where each has one: then an expert's rows are contiguous.
Beware Two orders of tokens meet here. What has `in_order` in its name, or no place of its own, is
       in the order of experts; `router`, `counted` and `unit` are as the tokens came.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_switch_sae import ops
from hf_switch_sae.errors import ConfigError, WidthError
from hf_switch_sae.ops.precision import wide
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.experts import Experts, Routed, Router, Rule
from hf_switch_sae.sae.input_norm import Unit, normalized


class EncodingSAE(Protocol):
    """What encoding needs of a SwitchSAE."""

    config: SwitchSAEConfig
    training: bool
    experts: Experts
    router: Router
    b_router: torch.nn.Parameter
    b_dec: torch.nn.Parameter
    input_scale: Tensor
    threshold: Tensor
    outlier_norm: Tensor

    def is_outlier(self, hidden_states: Tensor) -> Tensor:
        """[...] bool of [..., d]."""


class Encoded(NamedTuple):
    """n tokens and their code, in the order of experts where that helps."""

    z: Tensor
    """[n, d], in order, outliers replaced, less the bias, which is detached from the graph."""
    bias: Tensor
    """[d], `b_dec` in the LM's own units."""
    acts: Tensor
    """[n, slots], in order."""
    ids: Tensor
    """[n, slots], in order."""
    order: Tensor | None
    """[n] int64, the token at each place; None: as they came."""
    inverse: Tensor | None
    """[n] int64, the place of each token; None likewise."""
    router: tuple[Tensor, Tensor, Tensor] | None
    """logits and probs [n, E], expert ids [n, t], as the tokens came; None with one expert."""
    counted: Tensor | None
    """[n] bool, as the tokens came: which count in the losses; None for all."""
    counted_in_order: Tensor | None
    """The same, in order."""
    tokens: Routed
    """What the experts were given, in order."""
    rule: Rule
    """What they kept of it."""
    unit: Unit | None
    """Of each token, as they came: x and acts are in it; None without input_norm."""


def encode_tokens(
    sae: EncodingSAE, hidden_states: Tensor, sort: bool = False, mask: Tensor | None = None
) -> Encoded:
    """The code of hidden_states [..., d].

    Args:
        sae: the SAE; its mode decides how a batch_topk SAE selects.
        hidden_states: floating, in the LM's own units.
        sort: put tokens in the order of experts, where each has one.
        mask: [...] bool, the tokens that batch_topk takes its activations of in training.

    Raises:
        WidthError: the last dimension is not the SAE's width.
        ConfigError: a batch_topk SAE without a threshold, outside training.
    """
    check_width(hidden_states, len(sae.b_dec))
    x, config = rows_of(sae, hidden_states), sae.config
    bias, unit = bias_of(sae), None
    fixed, centered = bias.detach(), config.subtract_b_dec
    # outliers are told by their norm in the LM's units, so before any normalization
    outlier = outliers_among(sae, x)
    mask = None if mask is None else mask.reshape(-1).to(x.device)
    if config.input_norm != "none":
        x, unit = normalized(x, config.input_norm)
    counted = counted_in_order = counted_of(outlier, mask)
    if outlier is not None:  # encoded as nothing: it may be infinite
        x = x.where(~outlier[:, None], fixed.to(x.dtype) if centered else 0)
    # the router sees the residual as it is, the encoder what `subtract_b_dec` says
    router, expert_ids, gates = _route(sae, x)
    order, inverse = _orders(sae, expert_ids) if sort else (None, None)
    if order is not None:
        # index_select, as the gradient of indexing would sort what lies in order already
        x, expert_ids = x.index_select(0, order), expert_ids.index_select(0, order)
        gates = None if gates is None else gates.index_select(0, order)
        counted_in_order = None if counted is None else counted.index_select(0, order)
    # less a constant: the bias gets its gradient as `center`, by column sums, without one for z
    ours = order is not None and centered and not x.requires_grad and x.dtype == fixed.dtype
    z = x.sub_(fixed) if ours else x - fixed
    # with an untouched residual (subtract_b_dec=False) z is only the target of the error
    tokens = Routed(
        x=z if centered else x,
        expert_ids=expert_ids,
        gates=gates,
        input_scale=sae.input_scale,
        center=bias if centered else None,
        in_order=order is not None,
    )
    rule = _rule(sae, counted_in_order)
    acts, ids = sae.experts.encode(tokens, rule)
    if outlier is not None:  # a bias may still have made it active
        acts = acts.where(~(outlier if order is None else outlier[order])[:, None], 0)
    return Encoded(
        z, bias, acts, ids, order, inverse, router, counted, counted_in_order, tokens, rule, unit
    )


def check_width(hidden_states: Tensor, width: int) -> None:
    """Raise WidthError unless hidden_states are [..., width]."""
    if hidden_states.shape[-1] != width:
        raise WidthError(
            f"the SAE reads a residual stream of width {width}; this one is "
            f"{hidden_states.shape[-1]} wide (shape {list(hidden_states.shape)})."
        )


def rows_of(sae: EncodingSAE, hidden_states: Tensor) -> Tensor:
    """[..., d] -> [n, d] where the SAE is."""
    return hidden_states.reshape(-1, len(sae.b_dec)).to(sae.b_dec.device)


def bias_of(sae: EncodingSAE) -> Tensor:
    """[d], `b_dec` in the LM's own units, float32."""
    return wide(sae.b_dec) / sae.input_scale


def gates_of(sae: EncodingSAE, probs: Tensor, expert_ids: Tensor) -> Tensor | None:
    """[n, t], what activations are multiplied by, of the router's probs [n, E]; None for 1."""
    if not sae.config.apply_router_probs:
        return None
    gates = probs.gather(1, expert_ids)
    return gates / gates.sum(1, keepdim=True) if sae.config.norm_topk_prob else gates


def _route(
    sae: EncodingSAE, x: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Tensor, Tensor | None]:
    """What the router says of x [n, d] (None with one expert), expert ids [n, t], gates."""
    if sae.config.num_experts == 1:
        return None, torch.zeros(len(x), 1, dtype=torch.int64, device=x.device), None
    t = sae.config.num_experts_per_token
    logits, probs, expert_ids = sae.router(x, sae.b_router, sae.input_scale, t)
    return (logits, probs, expert_ids), expert_ids, gates_of(sae, probs, expert_ids)


def _orders(sae: EncodingSAE, expert_ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The order of experts and its inverse, [n] int64; None where sorting does not help."""
    experts, t = sae.config.num_experts, sae.config.num_experts_per_token
    # with several experts a token, or several groups, no one order serves
    if experts == 1 or t > 1 or len(sae.experts) > 1 or len(expert_ids) < 2:
        return None, None
    order, _ = ops.sort_by_expert(expert_ids, experts)
    inverse = torch.empty_like(order)
    # cheaper than sorting the order
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse


def _rule(sae: EncodingSAE, counted_in_order: Tensor | None) -> Rule:
    """Which activations are kept now: batch_topk has one rule in training, another outside."""
    config = sae.config
    if config.activation != "batch_topk":
        return Rule(config.k, _threshold(sae) if config.activation == "jumprelu" else None)
    # in training the border lies where the batch puts it, so there is no threshold
    if sae.training:
        return Rule(config.k, None, batch_topk=True, counted=counted_in_order)
    message = (
        "this batch_topk SAE has no threshold yet, so it can't encode outside training: "
        "train it, or call calibrate() on batches of the residual stream."
    )
    known = sae.threshold[0] >= 0
    # a graph can't branch on a value, so it checks without waiting
    if torch.compiler.is_compiling():
        torch._assert_async(known, message)
    elif not known:
        raise ConfigError(message)
    return Rule(None, _threshold(sae))


def _threshold(sae: EncodingSAE) -> Tensor:
    """[E, m] in scaled units."""
    return sae.threshold.reshape(sae.config.num_experts, -1)


def outliers_among(sae: EncodingSAE, x: Tensor) -> Tensor | None:
    """[n] bool of x [n, d]; None where it costs nothing to see that there are none."""
    if torch.compiler.is_compiling():
        return sae.is_outlier(x)
    # without a bound there is nothing to compare: norms would read all of x once more
    if _is_infinite(sae.outlier_norm):
        return None
    found = sae.is_outlier(x)
    return found if x.device.type != "cpu" or found.any() else None


def as_ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows [n, ...] of the tokens as they came, in order; or, by `inverse`, the other way round."""
    return rows if order is None else rows.index_select(0, order)


_infinite = WeakTensorKeyDictionary()  # bound -> the version of it that was read, and the answer


def _is_infinite(bound: Tensor) -> bool:
    """Whether a bound [] is known to be infinite.

    Reading a value waits for its device. So off the CPU a bound is read once each time it was
    written (writes through `.data` go unseen), and never within a CUDA graph.
    """
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


def mask_of(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor | None:
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


def counted_of(outlier: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """[n] bool of the tokens that count, from outlier and mask [n] bool; None for all."""
    if outlier is None:
        return mask
    return ~outlier if mask is None else mask & ~outlier
