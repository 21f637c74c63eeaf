"""Gradients of experts' weights on tensor cores: `scatter_sum` in 16 bits, expert by expert.

How    A token names k of its expert's m features. If its coefficients are laid out as a row of m,
       with zeros in between, an expert's sums are a matrix product of these rows with the tokens.
       That is m / k times the FLOP, but tensor cores do it in less time than it takes to fetch
       tokens row by row, and nothing has to be sorted. Letters as in `kernels`.
       On an H100 at the sizes given there: FLOP 2 n m d = 19 GFLOP, 32 us; bytes: coefficients
       written and read, 50 MB, and sums in float32, 75 MB, 42 us. Measured by
       `python tests/bench/gpu.py`: 80 us, against 135 us by rows.
Beware 0 times a token that is not finite is not 0: such a token makes all features of its expert
       nan, while the sum by rows would spoil only the token's own features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.ops.routing import expert_offsets
from hf_switch_sae.ops.triton.launch import INTERPRETED, TINY, jit, launch, tl, triton, tuned

FEATURES_A_SLOT = 128
"""m / k up to which products are faster than sums by rows."""
MOST_BYTES = 512 * 2**20
"""The most bytes that the coefficients, zeros included, may take."""

TILES = [
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 4),
    (64, 256, 64, 4, 4),
    (64, 128, 64, 4, 4),
]
"""Like `kernels.TILES_16BIT`, over features, width and tokens."""


def worth_it(n: int, k: int, m: int, dtype: torch.dtype) -> bool:
    """Whether `expert_sums` is faster than sums by rows, and its coefficients fit."""
    return dtype.itemsize == 2 and m <= FEATURES_A_SLOT * k and 2 * n * m <= MOST_BYTES


@jit
def _spread(
    coefs_ptr,  # [n * k]
    ids_ptr,  # [n * k]
    spread_ptr,  # [n, m], zeros
    slots,  # n * k
    k: tl.constexpr,
    m: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    coefs = tl.load(coefs_ptr + slot, mask=slot < slots, other=0.0)
    used = coefs != 0  # an empty slot may name the same feature as another slot
    ids = tl.load(ids_ptr + slot, mask=used, other=0)
    place = spread_ptr + slot // k * m + ids % m
    tl.store(place, coefs.to(spread_ptr.dtype.element_ty), mask=used)


@tuned(TILES, key=["E", "m", "d", "share"])
@jit
def _expert_sums(
    coefs_ptr,  # [n, m]
    x_ptr,  # [n, d]
    offsets_ptr,  # [E + 1]
    w_ptr,  # [E, m, d], out
    share,  # a power of two near n / E: for the tuner alone
    E: tl.constexpr,
    m: tl.constexpr,
    d: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # an expert's tiles follow one another, so that its tokens and coefficients stay in L2
    row_blocks: tl.constexpr = (m + BLOCK_M - 1) // BLOCK_M
    col_blocks: tl.constexpr = (d + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    expert = (tile // (row_blocks * col_blocks)).to(tl.int64)
    features = tile // col_blocks % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile % col_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    within_m, within_d = (features < m)[None, :], (cols < d)[None, :]
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        tokens = start + tl.arange(0, BLOCK_K)
        inside = (tokens < end)[:, None]
        c_mask = inside if m % BLOCK_M == 0 else inside & within_m
        x_mask = inside if d % BLOCK_N == 0 else inside & within_d
        c = tl.load(coefs_ptr + tokens[:, None] * m + features[None, :], c_mask, 0.0)
        x = tl.load(x_ptr + tokens[:, None] * d + cols[None, :], x_mask, 0.0)
        if WIDEN:
            c, x = c.to(tl.float32), x.to(tl.float32)
        total = tl.dot(tl.trans(c), x, total, input_precision="ieee")
    place = w_ptr + (expert * m + features)[:, None] * d + cols[None, :]
    inside = (features < m)[:, None] & (cols < d)[None, :]
    tl.store(place, total.to(w_ptr.dtype.element_ty), mask=inside)


def expert_sums(coefs: Tensor, ids: Tensor, x: Tensor, num_experts: int, out: Tensor) -> Tensor:
    """As `reference.scatter_sum` into `out` [E * m, d], with products in the dtype of x, 16 bits.

    A token's ids are all of one expert, and tokens are sorted by expert.
    """
    (n, k), d = ids.shape, x.shape[1]
    m = len(out) // num_experts
    if n == 0 or k == 0:
        return out.zero_()
    spread, slots = x.new_zeros(n, m), n * k
    launch(
        _spread, (triton.cdiv(slots, 1024),), coefs, ids, spread, slots=slots, k=k, m=m, BLOCK=1024
    )

    def grid(meta: dict[str, int]) -> tuple[int]:
        tiles = triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(d, meta["BLOCK_N"])
        return (num_experts * tiles,)

    constants: dict[str, Any] = {"E": num_experts, "m": m, "d": d, "WIDEN": INTERPRETED}
    launch(
        _expert_sums,
        grid,
        spread,
        x,
        expert_offsets(ids[:, 0] // m, num_experts),
        out,
        share=min(1024, max(16, triton.next_power_of_2(n // num_experts))),
        **constants,
        **(TINY if INTERPRETED else {}),
    )
    return out
