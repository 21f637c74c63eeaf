"""The primitives of the Triton backend that read single rows of W; letters as in `kernels`.

How    How many rows and columns a program takes at once is what was fastest on an H100 at d = 768
       and k = 32: for sums two rows, each whole if it is at most 1024 wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.ops.routing import narrowest
from hf_switch_sae.ops.triton.launch import jit, launch, tl, triton
from hf_switch_sae.ops.triton.sums import expert_sums, worth_it

WINDOW = 256
"""The most tokens of a feature that one program of scatter_sum adds up. The rest get programs of
their own: a feature that fires on every token would keep one program busy alone."""


@jit
def _gather_sum(
    coefs_ptr,  # [n, k]
    ids_ptr,  # [n, k]
    w_ptr,  # [F, d]
    y_ptr,  # [n, d], out
    k: tl.constexpr,
    d: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: row * d passes 2**31 at 1M tokens of width 4096
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        coefs = tl.load(coefs_ptr + row * k + slots, mask=slots < k, other=0.0).to(tl.float32)
        used = coefs != 0  # an empty slot reads nothing
        ids = tl.load(ids_ptr + row * k + slots, mask=used, other=0)
        inside = used[:, None] & (cols < d)[None, :]
        w = tl.load(w_ptr + ids[:, None] * d + cols[None, :], mask=inside, other=0.0)
        total += coefs[:, None] * w.to(tl.float32)
    tl.store(y_ptr + row * d + cols, tl.sum(total, 0).to(y_ptr.dtype.element_ty), mask=cols < d)


def gather_sum(coefs: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """As `reference.gather_sum`, summed in float32; rows of slots of 0 are not read."""
    (n, k), d = ids.shape, W.shape[1]
    y = W.new_empty(n, d)
    if y.numel() == 0:
        return y
    blocks = _whole_rows(d)
    grid = (n, triton.cdiv(d, blocks["BLOCK_D"]))
    launch(_gather_sum, grid, coefs, ids, W, y, k=k, d=d, **blocks)
    return y


@jit
def _row_dots(
    g_ptr,  # [n, d]
    ids_ptr,  # [n, k]
    w_ptr,  # [F, d]
    dots_ptr,  # [n, k], out
    k: tl.constexpr,
    d: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * k + slots, mask=slots < k, other=0)
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        g = tl.load(g_ptr + row * d + cols, mask=cols < d, other=0.0).to(tl.float32)
        inside = (slots < k)[:, None] & (cols < d)[None, :]
        w = tl.load(w_ptr + ids[:, None] * d + cols[None, :], mask=inside, other=0.0)
        total += g[None, :] * w.to(tl.float32)
    dots = tl.sum(total, 1).to(dots_ptr.dtype.element_ty)
    tl.store(dots_ptr + row * k + slots, dots, mask=slots < k)


def row_dots(g: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """As `reference.row_dots`, summed in float32."""
    (n, k), d = ids.shape, W.shape[1]
    dots = g.new_empty(n, k)
    if dots.numel() == 0:
        return dots
    two = triton.next_power_of_2
    blocks = {"BLOCK_K": min(16, two(k)), "BLOCK_D": min(256, two(d))}
    grid = (n, triton.cdiv(k, blocks["BLOCK_K"]))
    launch(_row_dots, grid, g, ids, W, dots, k=k, d=d, **blocks)
    return dots


@jit
def _sum_of_pairs(
    coefs_ptr,
    order_ptr,
    x_ptr,
    begin,
    end,
    cols,
    k: tl.constexpr,
    d: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of coefficient times token over places begin to end of `order`; see below."""
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        pairs = tl.load(order_ptr + places, mask=places < end, other=0)
        coefs = tl.load(coefs_ptr + pairs, mask=places < end, other=0.0).to(tl.float32)
        inside = (places < end)[:, None] & (cols < d)[None, :]
        x = tl.load(x_ptr + (pairs // k)[:, None] * d + cols[None, :], mask=inside, other=0.0)
        total += coefs[:, None] * x.to(tl.float32)
    return tl.sum(total, 0)


@jit
def _long_sums(
    coefs_ptr,  # [n * k]
    keys_ptr,  # [n * k], the feature of each pair, sorted; num_rows for an empty slot
    order_ptr,  # [n * k], pairs sorted by feature
    begins_ptr,  # [num_rows + 1], where each feature's pairs begin in `order`
    x_ptr,  # [n, d]
    parts_ptr,  # [places / WINDOW, d] float32, out: only what `_scatter_sum` reads
    num_rows,
    k: tl.constexpr,
    d: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A feature's first WINDOW pairs are left to `_scatter_sum`. So only the feature at the first
    # place of this window can have other pairs in it.
    window = tl.program_id(0).to(tl.int64)
    feature = tl.load(keys_ptr + window * WINDOW).to(tl.int64)
    if feature >= num_rows:
        return
    begin = tl.maximum(window * WINDOW, tl.load(begins_ptr + feature) + WINDOW)
    end = tl.minimum(window * WINDOW + WINDOW, tl.load(begins_ptr + feature + 1))
    if begin >= end:
        return
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = _sum_of_pairs(coefs_ptr, order_ptr, x_ptr, begin, end, cols, k, d, BLOCK_K, BLOCK_D)
    tl.store(parts_ptr + window * d + cols, sums, mask=cols < d)


@jit
def _scatter_sum(
    coefs_ptr,  # [n * k]
    order_ptr,  # [n * k], pairs sorted by feature
    begins_ptr,  # [num_rows + 1], where each feature's pairs begin in `order`
    x_ptr,  # [n, d]
    parts_ptr,  # [places / WINDOW, d] float32, of `_long_sums`
    w_ptr,  # [num_rows, d], out
    k: tl.constexpr,
    d: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    feature = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # the first WINDOW pairs, then the sums that `_long_sums` has made of the others
    begin, last = tl.load(begins_ptr + feature), tl.load(begins_ptr + feature + 1)
    end = tl.minimum(last, begin + WINDOW)
    sums = _sum_of_pairs(coefs_ptr, order_ptr, x_ptr, begin, end, cols, k, d, BLOCK_K, BLOCK_D)
    if end < last:
        for window in range(end // WINDOW, (last + WINDOW - 1) // WINDOW):
            sums += tl.load(parts_ptr + window * d + cols, mask=cols < d, other=0.0)
    tl.store(w_ptr + feature * d + cols, sums.to(w_ptr.dtype.element_ty), mask=cols < d)


def scatter_sum(
    coefs: Tensor,
    ids: Tensor,
    x: Tensor,
    num_rows: int,
    out: Tensor | None = None,
    num_experts: int | None = None,
    low: torch.dtype | None = None,
) -> Tensor:
    """As `reference.scatter_sum`, summed in float32, without atomics: the same bits every time."""
    (n, k), d = ids.shape, x.shape[1]
    W = x.new_empty(num_rows, d) if out is None else out
    if W.numel() == 0:
        return W
    # not in float16, which can't hold the smallest gradients
    dtype = low if low == torch.bfloat16 else x.dtype
    if num_experts is not None and worth_it(n, k, num_rows // num_experts, dtype):
        return expert_sums(coefs, ids, x.to(dtype), num_experts, W)
    # Empty slots may all name one feature: they get a key beyond all features, which nobody sums.
    keys = torch.where(coefs != 0, ids, num_rows).flatten().to(narrowest(num_rows))
    keys, order = keys.sort(stable=True)
    features = torch.arange(num_rows + 1, dtype=keys.dtype, device=x.device)
    begins = torch.searchsorted(keys, features)
    blocks = _whole_rows(d)
    cols = triton.cdiv(d, blocks["BLOCK_D"])
    constants: dict[str, Any] = {"k": max(k, 1), "d": d, "WINDOW": WINDOW, **blocks}
    windows = triton.cdiv(len(keys), WINDOW)
    parts = torch.empty(windows, d, dtype=torch.float32, device=x.device)
    if len(keys) > WINDOW:
        grid = (windows, cols)
        launch(
            _long_sums, grid, coefs, keys, order, begins, x, parts, num_rows=num_rows, **constants
        )
    launch(_scatter_sum, (num_rows, cols), coefs, order, begins, x, parts, W, **constants)
    return W


def _whole_rows(d: int) -> dict[str, int]:
    """A tile of two rows, with 32 numbers for each thread."""
    cols = min(1024, triton.next_power_of_2(d))
    return {"BLOCK_K": 2, "BLOCK_D": cols, "num_warps": max(1, cols // 512)}
