"""The five primitives in stock torch operators: on any device, in any dtype.

    expert_products   pre[i] = W[e] @ x[rows[i]] + bias[e]          rows in the order of experts
    relu_topk         the k largest of relu(pre)
    gather_sum        y[n] = sum_j c[n, j] * W[ids[n, j]]           decode, and the gradient of x
    row_dots          c[n, j] = <g[n], W[ids[n, j]]>                the gradient of acts
    scatter_sum       W[f] = sum of c[n, j] * x[n] over ids[n, j] = f    the gradients of weights

Measured on two CPU cores: a loop of matrix products is as fast as `grouped_mm`, and `embedding_bag`
is the fastest gather. What is computed in an unusual form says what that gains, as measured by
`python -m tests.bench.tricks eager`.
"""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor

from hf_switch_sae.ops.routing import check_ids

CHUNK_BYTES = 256 * 2**20
"""The most bytes of gathered rows to hold at once, where rows have to be gathered."""

_BLOCK_BYTES = 2 * 2**20  # of a gradient summed at a time: it stays in cache until it is copied

# Torch warns about the first CSR tensor. Only `row_dots` makes them, and its values are exact.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)

_SAMPLED = (torch.float32, torch.float64)  # dtypes of `sampled_addmm` on a CPU

_HARDWARE = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
_WITHOUT_HARDWARE = [
    dtype
    for dtype, known in _HARDWARE.items()
    if not getattr(torch.ops.mkldnn, known, lambda: True)()
]  # dtypes that this CPU multiplies one number at a time


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't compute there; always None: it can."""
    return None


def expert_products(
    x: Tensor, rows: Tensor | None, W: Tensor, bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """As `reference.expert_products`; reading `offsets` waits for a device other than the CPU."""
    bounds, z = offsets.tolist(), x if rows is None else x[rows]
    pre = x.new_empty(bounds[-1], W.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        products(z[start:end], W[expert].to(x.dtype), pre[start:end])
        if bias is not None:
            pre[start:end] += bias[expert].to(x.dtype)
    return pre


def products(z: Tensor, W: Tensor, out: Tensor) -> None:
    """out = z @ W.T; z [c, d], W [m, d], out [c, m].

    With few rows of z, a product waits for W to come from memory, and the CPU's library then reads
    it with one thread. Other forms of the same product read it with all threads: up to 3 times as
    fast. Many rows in a dtype without hardware support go through float32: up to 7 times as fast.
    """
    (c, d), m = z.shape, len(W)
    if c >= 16 and z.device.type == "cpu" and z.dtype in _WITHOUT_HARDWARE:
        out.copy_(torch.mm(z.float(), W.float().T))
    elif z.device.type != "cpu" or z.dtype != torch.float32 or c > 64 or m % 4:
        torch.mm(z, W.T, out=out)
    elif c == 1:
        out.copy_(torch.bmm(W.view(2, -1, d), z.T.expand(2, d, 1)).view(1, m))
    elif c <= 8:
        out.copy_(torch.mm(W, z.T).T)
    else:
        parts = torch.bmm(z.expand(4, c, d), W.view(4, -1, d).transpose(1, 2))
        out.view(c, 4, -1).copy_(parts.transpose(0, 1))


def relu_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.relu_topk`, but of equal activations the device chooses which to keep.

    On a CPU, wide rows take two stages: the k largest lie in the k groups of features with the
    largest maxima, so only the features of these groups are candidates. Twice as fast for 1536
    features and k = 32.
    """
    p, m = pre.shape
    group = 8 if m >= 1024 else 4
    num_groups = m // group
    if pre.device.type != "cpu" or m % group or num_groups < 4 * k or not p:
        return _without_nan(pre, k, *pre.topk(k, dim=1, sorted=False))
    maxima = pre.view(p, group, num_groups).amax(1)  # feature f is in group f % num_groups
    groups = maxima.topk(k, dim=1, sorted=False).indices
    steps = torch.arange(0, m, num_groups, device=pre.device)
    candidates = (groups[:, None] + steps[:, None]).view(p, -1)
    acts, slots = pre.gather(1, candidates).topk(k, dim=1, sorted=False)
    return _without_nan(pre, k, acts, candidates.gather(1, slots))


def _without_nan(pre: Tensor, k: int, acts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest of pre, for rows with nan once more: topk takes nan for the largest."""
    if (damaged := acts.isnan().any(1)).any():
        again = pre[damaged]
        acts[damaged], ids[damaged] = relu_topk(torch.where(again > 0, again, 0), k)
    return acts.relu_(), ids


def gather_sum(coefs: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """As `reference.gather_sum`, except that 0 times a row that is not finite is nan.

    Raises:
        FeatureIdError: on a CPU, an id of no row.
    """
    if len(ids) == 1:  # embedding_bag takes 1.2 times as long, for its checks
        try:
            return torch.mm(coefs.to(W.dtype), W.index_select(0, ids.view(-1)))
        except IndexError:
            check_ids(ids, len(W))
            raise
    check_ids(ids, len(W))
    return torch.nn.functional.embedding_bag(
        ids, W, per_sample_weights=coefs.to(W.dtype), mode="sum"
    )


def row_dots(g: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """As `reference.row_dots`."""
    (n, k), num_rows = ids.shape, len(W)
    can = g.device.type == "cpu" and g.dtype == W.dtype and g.dtype in _SAMPLED
    if can and n and k <= num_rows:  # a CSR row can't have more entries than columns
        # a matrix product of which only these entries are computed: 13 times as fast as a gather
        starts, empty = torch.arange(0, n * k + 1, k, device=ids.device), g.new_zeros(n * k)
        wanted = torch.sparse_csr_tensor(
            starts,
            ids.flatten(),
            empty,
            (n, num_rows),
            device=ids.device,
            check_invariants=False,
        )
        dots: Tensor = torch.sparse.sampled_addmm(wanted, g, W.T, beta=0.0).values()
        return dots.view(n, k)
    # in chunks, because a gather holds k rows for each token
    rows = max(1, CHUNK_BYTES // max(1, k * W.shape[1] * W.element_size()))
    parts = [
        torch.einsum("nd,nkd->nk", g_part, W[id_part].to(g.dtype))
        for g_part, id_part in zip(torch.split(g, rows), torch.split(ids, rows), strict=True)
    ]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def scatter_sum(
    coefs: Tensor,
    ids: Tensor,
    x: Tensor,
    num_rows: int,
    out: Tensor | None = None,
    num_experts: int | None = None,
    low: torch.dtype | None = None,
) -> Tensor:
    """As `reference.scatter_sum`.

    Pairs are sorted by feature; then each feature's sum is a bag of tokens.
    """
    d = x.shape[1]
    # int32 halves the bytes to sort; ids are far below 2**31
    flat, order = ids.flatten().to(torch.int32).sort(stable=True)
    offsets = _starts(flat, num_rows)
    tokens, weights = order // ids.shape[1], coefs.to(x.dtype).flatten()[order]

    def bags(start: int, end: int, features: slice) -> Tensor:
        return torch.nn.functional.embedding_bag(
            tokens[start:end],
            x,
            offsets[features] - start,
            per_sample_weights=weights[start:end],
            mode="sum",
        )

    # In blocks of features if the result must be copied to `out`, or is large: a block stays in
    # cache until it is copied, which takes half the time.
    block = max(1, _BLOCK_BYTES // (d * x.element_size()))
    if out is None and (x.device.type != "cpu" or num_rows <= block):
        return bags(0, len(tokens), slice(0, num_rows))
    total = x.new_empty(num_rows, d) if out is None else out
    starts = [*offsets[:-1:block].tolist(), len(tokens)]
    for index, first in enumerate(range(0, num_rows, block)):
        features = slice(first, min(first + block, num_rows))
        start, end = starts[index], starts[index + 1]
        if start == end:
            total[features] = 0
        else:
            total[features] = bags(start, end, features)
    return total


def _starts(ids: Tensor, num_rows: int) -> Tensor:
    """Where each row's range of the rising ids [p] begins, and the end: [num_rows + 1] int64."""
    if ids.device.type != "cpu":  # counting would wait for the device
        return torch.searchsorted(
            ids, torch.arange(num_rows + 1, dtype=ids.dtype, device=ids.device)
        )
    return torch.nn.functional.pad(torch.bincount(ids, minlength=num_rows).cumsum(0), (1, 0))
