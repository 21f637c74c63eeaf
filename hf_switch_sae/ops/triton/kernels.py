"""The five primitives in Triton: what the routed encode, the sparse decode and their backward need.

Room   `expert_products` and `relu_topk` are here, the other three in `rows`. Letters as in
       `reference`, and p (token, expert) pairs sorted by expert.
How    What limits each on an H100 (3.35 TB/s, L2 about 5.5 TB/s, about 600 TFLOP/s in bfloat16) at
       8192 tokens, d = 768, E = 16, m = 1536, k = 32, in bfloat16:
           expert_products  FLOP: 2 p m d = 19 GFLOP, 32 us; its 75 MB would take 23 us
           relu_topk        bytes: p m, 25 MB, 8 us; then the rounds of the search, in registers
           gather_sum       L2 bytes: n k d, 403 MB, 73 us; tokens sorted by expert keep W in L2
           row_dots         L2 bytes: the same 73 us
           scatter_sum      L2 bytes: the same 73 us, then 38 MB of W to write; and the sort
       Measured there by `python tests/bench/gpu.py`, against torch's operators on the same GPU:
       63 us against 1583, 95 against 216, 66 against 458, 71 against 336, 80 against 627.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.ops.triton.adam import adam_rows
from hf_switch_sae.ops.triton.launch import INTERPRETED, TINY, jit, launch, tl, triton, tuned
from hf_switch_sae.ops.triton.rows import gather_sum, row_dots, scatter_sum

__all__ = [
    "adam_rows",
    "expert_products",
    "gather_sum",
    "relu_topk",
    "row_dots",
    "scatter_sum",
    "why_not",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROW = 8192
"""The longest row that a program of relu_topk holds in registers; a longer one takes rounds."""

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages. Tiles of 64 or more tokens run on the tensor
# cores of a warp group (wgmma). float32 has only the ordinary cores, and less room for its tiles.
TILES_16BIT = [
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (64, 256, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (32, 128, 64, 4, 4),
    (16, 128, 128, 4, 4),
]
TILES_32BIT = [
    (128, 128, 16, 8, 3),
    (128, 64, 16, 4, 3),
    (64, 64, 16, 4, 3),
    (32, 64, 32, 4, 3),
    (16, 64, 32, 4, 3),
]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels can't compute `dtype` on `device`, as one sentence; None if they can."""
    if triton is None:
        return "Triton is not installed (pip install triton)."
    if dtype not in DTYPES:
        return f"the Triton kernels compute float32, bfloat16 and float16, not {dtype}."
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, and this is {device}."
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"Triton needs compute capability 8.0 or newer, and {device} has {major}.{minor}."
    if not any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))):
        return "Triton needs a C compiler: install gcc or clang, or set CC."
    return None


def _worth_it(configs: list[Any], arguments: dict[str, Any], **named: Any) -> list[Any]:
    """The tiles for this dtype that are no taller than an expert's usual share of tokens.

    Triton passes the kernel's positional arguments as a dict, and the others by name.
    """
    tiles = TILES_32BIT if arguments["x_ptr"].element_size() == 4 else TILES_16BIT
    wanted = {tile[:3] for tile in tiles if tile[0] <= named["share"]}
    return [c for c in configs if tuple(c.kwargs[f"BLOCK_{axis}"] for axis in "MNK") in wanted]


# ---------------------------------------------------------------- encode


@tuned(TILES_16BIT + TILES_32BIT, key=["share", "E", "m", "d"], prune=_worth_it)
@jit
def _expert_products(
    x_ptr,  # [n, d]
    rows_ptr,  # [p]
    w_ptr,  # [E, m, d]
    bias_ptr,  # [E, m]
    offsets_ptr,  # [E + 1]
    pre_ptr,  # [p, m], out
    share,  # a power of two near p / E: for the tuner alone
    E: tl.constexpr,
    m: tl.constexpr,
    d: tl.constexpr,
    EXPERTS: tl.constexpr,  # the power of two from E on
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Row blocks are numbered over all experts; the host knows only an upper bound of their number.
    experts = tl.arange(0, EXPERTS)
    begins = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(offsets_ptr + experts + 1, mask=experts < E, other=0)
    blocks = ((ends - begins + BLOCK_M - 1) // BLOCK_M).to(tl.int32)
    blocks_to = tl.cumsum(blocks, 0)
    row_blocks = tl.sum(blocks, 0)
    col_blocks: tl.constexpr = (m + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    if tile >= row_blocks * col_blocks:
        return
    # GROUP row blocks go through the features together, so that each block of W is read once
    group = tile // (GROUP * col_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    row_block = group * GROUP + tile % (GROUP * col_blocks) % height
    col_block = tile % (GROUP * col_blocks) // height

    # the expert of this row block, and the block's number within the expert
    before = blocks_to <= row_block  # empty experts included
    expert = tl.sum(before.to(tl.int32), 0).to(tl.int64)
    within = row_block - tl.sum(tl.where(before, blocks, 0), 0)
    end = tl.load(offsets_ptr + expert + 1)
    pairs = tl.load(offsets_ptr + expert) + within * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edges some valid row is computed but not stored: cheaper than masks in the loop.
    safe_pairs = tl.where(pairs < end, pairs, end - 1)
    tokens = tl.load(rows_ptr + safe_pairs) if HAS_ROWS else safe_pairs
    features = expert * m + tl.where(cols < m, cols, 0)

    # the product, a tile at a time
    depth = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + tokens[:, None] * d + depth[None, :]
    w_tile = w_ptr + features[:, None] * d + depth[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        if d % BLOCK_K == 0:
            x = tl.load(x_tile + start)
            w = tl.load(w_tile + start)
        else:
            x = tl.load(x_tile + start, mask=depth[None, :] < d - start, other=0.0)
            w = tl.load(w_tile + start, mask=depth[None, :] < d - start, other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + features)[None, :].to(tl.float32)
    place = pre_ptr + pairs[:, None] * m + cols[None, :]
    inside = (pairs < end)[:, None] & (cols < m)[None, :]
    tl.store(place, total.to(pre_ptr.dtype.element_ty), mask=inside)


def expert_products(
    x: Tensor, rows: Tensor | None, W: Tensor, bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """As `reference.expert_products`, summed in float32: one grouped GEMM, without a host sync."""
    p, (E, m, d) = len(x) if rows is None else len(rows), W.shape
    pre = x.new_empty(p, m)
    if pre.numel() == 0:
        return pre
    used = min(E, p)  # most experts with rows; each of them may have one row block that is not full

    def grid(meta: dict[str, int]) -> tuple[int]:
        row_blocks = (p - used) // meta["BLOCK_M"] + used
        return (row_blocks * triton.cdiv(m, meta["BLOCK_N"]),)

    launch(
        _expert_products,
        grid,
        x,
        x if rows is None else rows,
        W.to(x.dtype),
        x if bias is None else bias.to(x.dtype),
        offsets,
        pre,
        share=min(128, max(16, triton.next_power_of_2(p // E))),
        E=E,
        m=m,
        d=d,
        EXPERTS=triton.next_power_of_2(E),
        HAS_ROWS=rows is not None,
        HAS_BIAS=bias is not None,
        WIDEN=INTERPRETED,  # its dot takes bfloat16 for integers
        **(TINY if INTERPRETED else {}),
    )
    return pre


@jit
def _relu_topk(
    pre_ptr,  # [p, m]
    acts_ptr,  # [p, k], out
    ids_ptr,  # [p, k], out
    m: tl.constexpr,
    k: tl.constexpr,
    SHIFT: tl.constexpr,  # low bits that are 0 in every float32 made from the dtype of pre
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    pre = tl.load(pre_ptr + row * m + cols, mask=cols < m, other=0.0).to(tl.float32)
    # Positive floats are ordered like their bits; nan is not > 0, so its key is 0.
    keys = tl.where(pre > 0, pre, 0.0).to(tl.int32, bitcast=True) >> SHIFT

    # Bisect for the k-th largest key. Invariant: `count` >= k keys reach `low` (or fewer are
    # positive), and fewer than k reach `high`. Start: each of SLOTS >= k groups has a key that
    # reaches the smallest of the groups' maxima.
    maxima = tl.max(tl.reshape(keys, [BLOCK // SLOTS, SLOTS]), 0)
    low = tl.maximum(tl.min(maxima, 0), 1)
    high = tl.max(maxima, 0) + 1
    count = tl.sum((keys >= low).to(tl.int32), 0)
    while (count > k) & (high - low > 1):
        middle = low + (high - low) // 2
        reach = tl.sum((keys >= middle).to(tl.int32), 0)
        low = tl.where(reach >= k, middle, low)
        count = tl.where(reach >= k, reach, count)
        high = tl.where(reach >= k, high, middle)

    # One running sum counts both: keys above `low` in its high half, ties in its low half.
    above, ties = keys > low, keys == low
    both = above.to(tl.int32) * 65536 + ties.to(tl.int32)
    running, num_above = tl.cumsum(both, 0), tl.sum(above.to(tl.int32), 0)
    place = tl.where(above, (running >> 16) - 1, num_above + (running & 65535) - 1)
    keep = above | (ties & (place < k))
    acts = (keys << SHIFT).to(tl.float32, bitcast=True)
    tl.store(acts_ptr + row * k + place, acts.to(acts_ptr.dtype.element_ty), mask=keep)
    tl.store(ids_ptr + row * k + place, cols.to(tl.int64), mask=keep)

    # slots that no key fills are set to 0
    slots = tl.arange(0, SLOTS)
    empty = (slots >= tl.minimum(tl.sum(both, 0) & 65535, k - num_above) + num_above) & (slots < k)
    tl.store(acts_ptr + row * k + slots, tl.zeros([SLOTS], acts_ptr.dtype.element_ty), mask=empty)
    tl.store(ids_ptr + row * k + slots, tl.zeros([SLOTS], tl.int64), mask=empty)


_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def relu_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.relu_topk`: bisects the bits of the k-th largest, then makes one pass."""
    p, m = pre.shape
    if m > MAX_ROW:
        return _relu_topk_in_rounds(pre, k)
    acts = pre.new_empty(p, k)
    ids = torch.empty(p, k, dtype=torch.int64, device=pre.device)
    if p == 0:
        return acts, ids
    block = triton.next_power_of_2(m)
    launch(
        _relu_topk,
        (p,),
        pre,
        acts,
        ids,
        m=m,
        k=k,
        SHIFT=_SHIFT[pre.dtype],
        BLOCK=block,
        SLOTS=triton.next_power_of_2(k),
        num_warps=min(16, max(1, block // 512)),  # 16 keys a thread
    )
    return acts, ids


def _relu_topk_in_rounds(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each part of a row, then of all these; of equal ones the lowest index wins,
    because both steps keep the order of the row."""
    p, m = pre.shape
    parts = -(-m // MAX_ROW)
    width = -(-m // parts)
    if 2 * k > width:  # a part would keep more than half of itself
        acts, ids = torch.where(pre > 0, pre, 0).sort(dim=1, descending=True, stable=True)
        return acts[:, :k].contiguous(), ids[:, :k].contiguous()
    padded = torch.nn.functional.pad(pre, (0, parts * width - m))
    acts, ids = relu_topk(padded.reshape(p * parts, width), k)
    starts = width * torch.arange(parts, device=pre.device)[:, None]
    ids = (ids.reshape(p, parts, k) + starts).reshape(p, parts * k)
    acts, slots = relu_topk(acts.reshape(p, parts * k), k)
    return acts, ids.gather(1, slots)
