"""Routed encode and sparse decode on any device: stock torch operators, hand-written backward.

Only routed experts are computed. The gradient of the pre-activations is k-sparse, and nothing of
size tokens x num_features is allocated: an expert's tokens are taken in chunks of at most
`WORKSPACE_BYTES`.

Everything rests on three sparse row operations (letters as in `reference`):
    gather_sum   y[n] = sum_j c[n, j] * W[ids[n, j]]        decode, and the gradient of x
    row_dots     c[n, j] = <g[n], W[ids[n, j]]>             the gradient of acts
    scatter_sum  W[f] = sum of c[n, j] * x[n] over ids[n, j] = f    the gradients of W_dec and W_enc

Beware Indexing a parameter by expert under autograd would add a full-size gradient for every
       expert; here weights are indexed only inside `autograd.Function.forward`, where a slice is a
       view and nothing is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_switch_sae.ops.routing import visits

WORKSPACE_BYTES = 256 * 2**20
"""Most bytes of pre-activations held at once (batch_topk in training: all routed experts')."""

# What embedding_bag itself runs for this gradient: a private name, so one day it may be gone and
# rows are gathered instead.
_ROW_DOTS = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)


def route(
    x: Tensor, weight: Tensor, bias: Tensor, num_experts_per_token: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.route`, without the full sort where one expert is asked for."""
    with torch.autocast(x.device.type, enabled=False):
        logits = torch.addmm(bias.float(), x.float(), weight.float().T)
    if num_experts_per_token > 1:
        expert_ids = logits.sort(dim=-1, descending=True, stable=True).indices[
            :, :num_experts_per_token
        ]
    else:
        # argmax promises no order among ties: take the lowest index that reaches the maximum
        reaches = logits == logits.amax(-1, keepdim=True)
        index = torch.arange(logits.shape[1], device=x.device)
        expert_ids = torch.where(reaches, index, logits.shape[1] - 1).amin(-1, keepdim=True)
    return logits, logits.softmax(-1), expert_ids


def routed_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    expert_ids: Tensor,
    gates: Tensor | None,
    k: int | None,
    threshold: Tensor | None = None,
    batch_topk: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `reference.routed_encode`, computing only the experts that tokens visit."""
    n, t = expert_ids.shape
    if n == 0:
        slots = k if k is not None and not batch_topk else 1
        return x.new_zeros(0, slots), expert_ids.new_zeros(0, slots)
    acts, ids = _EncodePairs.apply(  # type: ignore[no-untyped-call]
        x, W_enc, b_enc, expert_ids, gates, k, threshold, batch_topk
    )
    if gates is not None:
        acts = (acts * gates.reshape(n * t, 1)).to(x.dtype)
    if t > 1:
        acts, ids = keep_largest(acts.reshape(n, -1), ids.reshape(n, -1), None if batch_topk else k)
    return acts, ids


def keep_largest(
    acts: Tensor, ids: Tensor, k: int | None, batch_topk: bool = False
) -> tuple[Tensor, Tensor]:
    """Joint selection among candidates: each token's k largest slots; all active if k is None.

    Args:
        acts: [n, s], >= 0.
        ids: [n, s].
        k: slots kept per token, at most s.
        batch_topk: keep the k * n largest over all tokens instead, ties at the border included.

    Returns:
        acts, ids [n, k], or as wide as the fullest token needs when k is None or with `batch_topk`.
    """
    if batch_topk and k is not None and acts.numel():
        acts = torch.where(acts >= _border(acts.detach().flatten(), k * len(acts)), acts, 0)
    if k is None or batch_topk:
        slots = max(1, int((acts > 0).sum(1).max())) if len(acts) else 1
    else:
        slots = k
    if slots == acts.shape[1]:
        return acts, ids
    acts, slot = acts.topk(slots, dim=1)
    return acts, ids.gather(1, slot)


def _border(acts: Tensor, count: int) -> Tensor:
    """The count-th largest of all activations, 0-d; the smallest if there are fewer."""
    return acts.topk(min(count, acts.numel()), sorted=False).values.amin()


def sparse_decode(acts: Tensor, ids: Tensor, W_dec: Tensor) -> Tensor:
    """As `reference.sparse_decode`."""
    y: Tensor = _SparseDecode.apply(acts, ids, W_dec)  # type: ignore[no-untyped-call]
    return y


class _EncodePairs(torch.autograd.Function):
    """Ungated activations of each (token, expert) pair's kept features: acts, ids [n * t, s]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        expert_ids: Tensor,
        gates: Tensor | None,
        k: int | None,
        threshold: Tensor | None,
        batch_topk: bool,
    ) -> tuple[Tensor, Tensor]:
        n, t = expert_ids.shape
        m = W_enc.shape[1]
        flat_gates = None if gates is None else gates.detach().reshape(-1)
        select = _Selection(m, k, threshold, batch_topk, n)
        with torch.autocast(x.device.type, enabled=False):
            for expert, pairs in visits(expert_ids, W_enc.shape[0]):
                rows = max(1, WORKSPACE_BYTES // (m * x.element_size()))
                for chunk in torch.split(pairs, rows):
                    pre = x[chunk // t] @ W_enc[expert].T
                    if b_enc is not None:
                        pre += b_enc[expert]
                    select.add(
                        expert,
                        chunk,
                        pre.relu_(),
                        None if flat_gates is None else flat_gates[chunk],
                    )
        acts, ids = select.result(n * t)
        ctx.save_for_backward(x, W_enc, acts, ids)
        ctx.has_bias = b_enc is not None
        ctx.mark_non_differentiable(ids)
        return acts, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_acts: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, acts, ids = ctx.saved_tensors
        E, m, d = W_enc.shape
        n = x.shape[0]
        # a token's pairs are adjacent, so they become one wider row
        coefs = torch.where(acts > 0, d_acts, 0).to(x.dtype).reshape(n, -1)
        ids = ids.reshape(n, -1)
        d_x = gather_sum(coefs, ids, W_enc.reshape(-1, d)) if ctx.needs_input_grad[0] else None
        d_W = (
            scatter_sum(coefs, ids, x, E * m).reshape(E, m, d) if ctx.needs_input_grad[1] else None
        )
        d_b = None
        if ctx.has_bias and ctx.needs_input_grad[2]:
            # thousands of tokens may add to one bias: bfloat16 would stop counting after 256
            wide = torch.promote_types(x.dtype, torch.float32)
            total = torch.zeros(E * m, dtype=wide, device=x.device)
            total.index_add_(0, ids.flatten(), coefs.flatten().to(wide))
            d_b = total.to(W_enc.dtype).reshape(E, m)
        return d_x, d_W, d_b, None, None, None, None, None


class _Selection:
    """Collects the kept features of each pair; experts may come in any order and in chunks."""

    def __init__(
        self, m: int, k: int | None, threshold: Tensor | None, batch_topk: bool, n: int
    ) -> None:
        self.m, self.k, self.threshold, self.batch_topk, self.n = m, k, threshold, batch_topk, n
        self.parts: list[tuple[int, Tensor, Tensor, Tensor]] = []  # expert, pairs, acts, local ids
        # batch_topk: expert, pairs, acts and gates that wait for the border
        self.pending: list[tuple[int, Tensor, Tensor, Tensor | None]] = []

    def add(self, expert: int, pairs: Tensor, acts: Tensor, gates: Tensor | None) -> None:
        if self.threshold is not None:
            gated = acts if gates is None else (acts * gates[:, None]).to(acts.dtype)
            acts = torch.where(gated > self.threshold[expert], acts, 0)
        if self.batch_topk:
            self.pending.append((expert, pairs, acts, gates))
        else:
            self._keep(expert, pairs, acts, self.k)

    def _keep(self, expert: int, pairs: Tensor, acts: Tensor, k: int | None) -> None:
        slots = min(k, self.m) if k is not None else max(1, int((acts > 0).sum(1).max()))
        top, local = acts.topk(slots, dim=1, sorted=False)
        self.parts.append((expert, pairs, top, local))

    def result(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        if self.pending:
            self._apply_border()
        width = max(part[2].shape[1] for part in self.parts)
        first = self.parts[0][2]
        if len(self.parts) == 1 and first.shape[0] == 1:  # single token: nothing to put in order
            return first, self.parts[0][3] + self.parts[0][0] * self.m
        acts = first.new_zeros(num_pairs, width)
        ids = torch.empty(num_pairs, width, dtype=torch.int64, device=first.device)
        for expert, pairs, top, local in self.parts:
            short = width - top.shape[1]
            acts[pairs] = torch.nn.functional.pad(top, (0, short))
            ids[pairs] = torch.nn.functional.pad(local, (0, short)) + expert * self.m
        return acts, ids

    def _apply_border(self) -> None:
        """batch_topk: the border is the k * n-th largest gated activation of the whole batch."""
        assert self.k is not None
        gated = [
            acts if gates is None else (acts * gates[:, None]).to(acts.dtype)
            for _, _, acts, gates in self.pending
        ]
        border = _border(torch.cat([part.flatten() for part in gated]), self.k * self.n)
        for (expert, pairs, acts, _), value in zip(self.pending, gated, strict=True):
            self._keep(expert, pairs, torch.where(value >= border, acts, 0), None)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, ids: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(acts, ids, W_dec)
        return gather_sum(acts, ids, W_dec.reshape(-1, W_dec.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        acts, ids, W_dec = ctx.saved_tensors
        rows = W_dec.reshape(-1, W_dec.shape[-1])
        d_y = d_y.to(rows.dtype).contiguous()
        d_acts = (
            torch.where(acts != 0, row_dots(d_y, ids, rows), 0) if ctx.needs_input_grad[0] else None
        )
        d_W = (
            scatter_sum(acts, ids, d_y, rows.shape[0]).view_as(W_dec)
            if ctx.needs_input_grad[2]
            else None
        )
        return d_acts, None, d_W


def gather_sum(coefs: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """y[n] = sum_j coefs[n, j] * W[ids[n, j]]; coefs, ids [n, k], W [F, d] -> [n, d]."""
    return torch.nn.functional.embedding_bag(
        ids, W, per_sample_weights=coefs.to(W.dtype), mode="sum"
    )


def row_dots(g: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """c[n, j] = <g[n], W[ids[n, j]]>; g [n, d], ids [n, k], W [F, d] -> [n, k]."""
    if (
        g.device.type == "cpu"
        and g.dtype == W.dtype == torch.float32
        and _ROW_DOTS is not None
        and len(g)
    ):
        bags = torch.arange(len(g), device=g.device)
        offsets, bag_of = bags * ids.shape[1], bags.repeat_interleave(ids.shape[1])
        dots: Tensor = _ROW_DOTS(g.contiguous(), W.contiguous(), ids.flatten(), offsets, bag_of, 0)
        return dots.view_as(ids)
    # In chunks, as a gather holds k rows for each token.
    rows = max(1, WORKSPACE_BYTES // max(1, ids.shape[1] * W.shape[1] * W.element_size()))
    parts = [
        torch.einsum("nd,nkd->nk", g_part, W[id_part])
        for g_part, id_part in zip(torch.split(g, rows), torch.split(ids, rows), strict=True)
    ]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def scatter_sum(coefs: Tensor, ids: Tensor, x: Tensor, num_rows: int) -> Tensor:
    """W[f] = sum of coefs[n, j] * x[n] over ids[n, j] = f; [num_rows, d], in the dtype of x.

    A gather in the other direction: pairs sorted by feature, then one bag of tokens per feature.
    """
    k = ids.shape[1]
    flat, order = ids.flatten().sort(stable=True)
    offsets = torch.searchsorted(flat, torch.arange(num_rows, device=ids.device))
    return torch.nn.functional.embedding_bag(
        order // k, x, offsets, per_sample_weights=coefs.to(x.dtype).flatten()[order], mode="sum"
    )
