"""Routed encode and sparse decode and their backward, over a backend's primitives.

Only routed experts are computed. The gradient of the pre-activations is k-sparse, and nothing of
size tokens x num_features is allocated: pairs are taken in chunks whose pre-activations fit a
workspace. Written once for all backends (`backends.py`), without autograd (`operators.py`); letters
as in `reference.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from hf_switch_sae.ops.backends import backend_for
from hf_switch_sae.ops.memory import gradient_of
from hf_switch_sae.ops.precision import wide, wide_dtype
from hf_switch_sae.ops.routing import expert_offsets, sort_by_expert

_Compute = TypeVar("_Compute", bound=Callable[..., Any])

CPU_WORKSPACE_BYTES = 24 * 2**20
"""Most bytes of pre-activations held at once: about a CPU's last-level cache, and less than what
the C library would give back to the system after every use."""
GPU_WORKSPACE_BYTES = 512 * 2**20
"""The same on other devices, which want many tokens at once."""


def keep_largest(
    acts: Tensor,
    ids: Tensor,
    k: int | None,
    batch_topk: bool = False,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Joint selection among candidates: each token's k largest slots; all active if k is None.

    Args:
        acts: [n, s], >= 0.
        ids: [n, s].
        k: slots kept per token, at most s.
        batch_topk: keep the k * n largest over all tokens instead, ties at the border included.
        counted: [n] bool, the tokens that `batch_topk` is over; others keep nothing. None: all.

    Returns:
        acts, ids [n, k], or as wide as the fullest token needs when k is None or with `batch_topk`.
    """
    if batch_topk and k is not None and acts.numel():
        acts, num = _of_counted(acts, counted)
        acts = torch.where(acts >= _border(acts.detach(), k * num), acts, 0)
    if k is None or batch_topk:
        slots = max(1, int((acts > 0).sum(1).max())) if len(acts) else 1
    else:
        slots = k
    if slots == acts.shape[1]:
        return acts, ids
    acts, slot = acts.topk(slots, dim=1)
    return acts, ids.gather(1, slot)


def _of_counted(acts: Tensor, counted: Tensor | None) -> tuple[Tensor, int]:
    """acts [n, s], 0 for tokens that do not count, and how many do; counted [n] bool, None: all."""
    if counted is None:
        return acts, len(acts)
    return acts.where(counted[:, None], 0), int(counted.sum())


def _border(acts: Tensor, count: int) -> Tensor:
    """The count-th largest of all activations, 0-d; the smallest if there are fewer."""
    if not count:
        return acts.new_zeros(())
    return acts.flatten().topk(min(count, acts.numel()), sorted=False).values.amin()


# ---------------------------------------------------------------- encode


def _without_autocast(compute: _Compute) -> _Compute:
    """`compute`, whose first argument is a tensor, in the dtypes of its arguments."""

    @functools.wraps(compute)
    def computed(first: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return compute(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return compute(first, *rest)

    return cast(_Compute, computed)


@_without_autocast
def encode_pairs(
    x: Tensor,
    center: Tensor | None,
    W_enc: Tensor,
    b_enc: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor | None,
    k: int | None,
    threshold: Tensor | None,
    batch_topk: bool,
    in_order: bool,
    counted: Tensor | None,
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Each (token, expert) pair's kept features, ungated: acts, ids [n * t, s] in pair order."""
    visits = _Visits(x.to(low or W_enc.dtype), W_enc, b_enc, expert_ids, gates, threshold, in_order)
    if batch_topk:
        assert k is not None
        acts, ids = _select_in_batch(visits, k, counted)
    else:
        acts, ids = visits.joined(_select(visits, *chunk, k) for chunk in visits.chunks())
    return acts.to(W_enc.dtype), ids + visits.experts[:, None] * W_enc.shape[1]


_Pairs = slice | Tensor  # of pairs, as an index


class _Visits:
    """The (token, expert) pairs of a batch: in which order they are taken, and their products."""

    def __init__(
        self,
        z: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        expert_ids: Tensor,
        gates: Tensor | None,
        threshold: Tensor | None,
        in_order: bool,
    ) -> None:
        self.z, self.W_enc, self.b_enc, self.threshold = z, W_enc, b_enc, threshold
        self.backend: ModuleType = backend_for(z.device, z.dtype)
        self.experts, self.t = expert_ids.reshape(-1), expert_ids.shape[1]
        self.gates = None if gates is None else gates.reshape(-1, 1)
        self._order: Tensor | None = None  # pairs lie in the order of experts
        if in_order or len(W_enc) == 1:
            self._offsets = expert_offsets(self.experts, len(W_enc))
        else:
            self._order, self._offsets = sort_by_expert(expert_ids, len(W_enc))

    def chunks(self) -> Iterator[tuple[_Pairs, Tensor]]:
        """Pairs, and their pre-activations [pairs, m] in the dtype of z."""
        num, m = len(self.experts), self.W_enc.shape[1]
        space = CPU_WORKSPACE_BYTES if self.z.device.type == "cpu" else GPU_WORKSPACE_BYTES
        size = max(1, space // (m * self.z.element_size()))
        for start in range(0, num, size):
            end = min(start + size, num)
            if self._order is None:
                pairs: _Pairs = slice(start, end)
                z, rows = self.z[start:end], None
            else:
                pairs = self._order[start:end]
                z, rows = self.z, pairs // self.t
            offsets = (self._offsets - start).clamp(0, end - start)
            yield pairs, self.backend.expert_products(z, rows, self.W_enc, self.b_enc, offsets)

    def gated(self, acts: Tensor, pairs: _Pairs) -> Tensor:
        """Activations [pairs, s] times the router's weights."""
        return acts if self.gates is None else (acts * self.gates[pairs]).to(acts.dtype)

    def over_threshold(self, pre: Tensor, pairs: _Pairs) -> Tensor:
        """Pre-activations [pairs, m], 0 where they do not exceed the threshold once gated."""
        if self.threshold is None:
            return pre
        acts = pre.relu()
        passed = self.gated(acts, pairs) > self.threshold[self.experts[pairs]]
        return torch.where(passed, acts, 0)

    def joined(self, parts: Iterator[tuple[_Pairs, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Chunks of (pairs, acts, local ids) -> acts, local ids of all pairs, in their order."""
        found = list(parts)
        if len(found) == 1 and self._order is None:
            return found[0][1:]
        width = max(acts.shape[1] for _, acts, _ in found)
        all_acts = self.z.new_zeros(len(self.experts), width)
        all_ids = self.experts.new_zeros(len(self.experts), width)
        for pairs, acts, ids in found:
            short = width - acts.shape[1]
            all_acts[pairs] = torch.nn.functional.pad(acts, (0, short)) if short else acts
            all_ids[pairs] = torch.nn.functional.pad(ids, (0, short)) if short else ids
        return all_acts, all_ids


def _select(
    visits: _Visits, pairs: _Pairs, pre: Tensor, k: int | None
) -> tuple[_Pairs, Tensor, Tensor]:
    """Each pair's k largest activations over the threshold; all of them if k is None."""
    pre = visits.over_threshold(pre, pairs)
    slots = max(1, int((pre > 0).sum(1).max())) if k is None else min(k, pre.shape[1])
    acts, ids = visits.backend.relu_topk(pre, slots)
    return pairs, acts, ids


def _select_in_batch(visits: _Visits, k: int, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k largest gated activations for each token, of all together, ties at the border included.

    From each pair's largest few: exact as long as every pair has one that is not kept; else more
    are taken. So what is held at once is pairs x few, not pairs x m.

    Args:
        counted: [n] bool, which tokens these are; others get none. None: all.
    """
    m, everything = visits.W_enc.shape[1], slice(None)
    few = min(4 * k, m)
    of_pairs = None if counted is None else counted.repeat_interleave(visits.t)
    while True:
        acts, ids = visits.joined(_select(visits, *chunk, few) for chunk in visits.chunks())
        gated, num = _of_counted(visits.gated(acts, everything), of_pairs)
        kept = (gated >= _border(gated, k * num // visits.t)) & (gated > 0)
        if few == m or not kept.all(1).any():
            return keep_largest(torch.where(kept, acts, 0), ids, None)
        few = min(4 * few, m)


@_without_autocast
def encode_backward(
    d_acts: Tensor,
    acts: Tensor,
    ids: Tensor,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    need_b: bool,
    need_center: bool,
    in_order: bool,
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, W_enc, b_enc and center; an empty tensor for what is not needed."""
    E, m, d = W_enc.shape
    backend, rows = backend_for(x.device, W_enc.dtype), W_enc.reshape(-1, d)
    # an operator's results must not share memory, not even when there is none
    d_x, d_W, d_b, d_center = (x.new_empty(0) for _ in range(4))
    # a token's pairs are adjacent, so they become one wider row
    coefs = torch.ops.aten.threshold_backward(d_acts, acts, 0)  # where acts > 0, in one pass
    coefs = coefs.to(W_enc.dtype).reshape(len(x), -1)
    ids = ids.reshape(len(x), -1)
    if need_x:
        d_x = backend.gather_sum(coefs, ids, rows).to(x.dtype)
    if need_W:
        d_W = _weight_gradient(backend, coefs, ids, x.to(W_enc.dtype), W_enc, in_order, low)
    if need_b or need_center:
        # thousands of tokens may add to one bias: bfloat16 would stop counting after 256
        total = torch.zeros(E * m, dtype=wide_dtype(W_enc), device=x.device)
        total.index_add_(0, ids.flatten(), coefs.flatten().to(total.dtype))
        d_b = total.to(W_enc.dtype).reshape(E, m)
        if need_center:  # by column sums: no gradient of x is needed for it
            by_expert = torch.bmm(total.view(E, 1, m).to(W_enc.dtype), W_enc)
            d_center = -wide(by_expert[:, 0]).sum(0)
    return d_x, d_W, d_b, d_center


# ---------------------------------------------------------------- decode


@_without_autocast
def decode(
    acts: Tensor, ids: Tensor, W_dec: Tensor, in_order: bool, low: torch.dtype | None
) -> Tensor:
    """As `reference.sparse_decode`."""
    backend = backend_for(acts.device, W_dec.dtype)
    y: Tensor = backend.gather_sum(acts, ids, W_dec.reshape(-1, W_dec.shape[-1]))
    return y


@_without_autocast
def decode_backward(
    d_y: Tensor,
    acts: Tensor,
    ids: Tensor,
    W_dec: Tensor,
    need_acts: bool,
    need_W: bool,
    in_order: bool,
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of acts and W_dec; an empty tensor for what is not needed."""
    rows = W_dec.reshape(-1, W_dec.shape[-1])
    backend = backend_for(acts.device, W_dec.dtype)
    d_y = d_y.to(rows.dtype).contiguous()
    d_acts, d_W = d_y.new_empty(0), d_y.new_empty(0)
    if need_acts:
        d_acts = torch.where(acts != 0, backend.row_dots(d_y, ids, rows), 0)
        d_acts = d_acts.to(acts.dtype).contiguous()
    if need_W:
        d_W = _weight_gradient(backend, acts, ids, d_y, W_dec, in_order, low)
    return d_acts, d_W


def _weight_gradient(
    backend: ModuleType,
    coefs: Tensor,
    ids: Tensor,
    x: Tensor,
    weight: Tensor,
    in_order: bool,
    low: torch.dtype | None,
) -> Tensor:
    d = weight.shape[-1]
    E = len(weight) if in_order and weight.ndim == 3 else None
    grad = gradient_of(weight)
    out = None if grad is None else grad.view(-1, d)
    total: Tensor = backend.scatter_sum(coefs, ids, x, weight.numel() // d, out, E, low)
    return total.view(weight.shape) if grad is None else grad
