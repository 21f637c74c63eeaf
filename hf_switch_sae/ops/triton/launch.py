"""Triton, if it is installed, and how its kernels are launched.

Beware TRITON_INTERPRET is read on import. With it kernels run on the CPU, slowly, for tests.
       The interpreter does not notice a load that lacks its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # then nobody calls the kernels: see `kernels.why_not`
    triton = tl = None

__all__ = ["INTERPRETED", "TINY", "jit", "launch", "tl", "triton", "tuned"]

INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)

TINY = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "GROUP": 2}
"""The tile of a product in the interpreter."""

# Since 3.10 Triton multiplies and adds in one instruction only if it is told to.
_FUSED = {"enable_fp_fusion": True}


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`; without Triton the function stays as it is."""
    return kernel if triton is None else triton.jit(kernel)


def tuned(
    tiles: Sequence[tuple[int, ...]], key: list[str], prune: Callable[..., list[Any]] | None = None
) -> Callable[[Any], Any]:
    """Choose a product's tile by measuring, once for each `key`; the interpreter takes `TINY`.

    Args:
        tiles: BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages of each.
        key: names of arguments whose values call for another tile.
        prune: chooses which tiles to try; Triton's early_config_prune.
    """
    if triton is None or INTERPRETED:
        return lambda kernel: kernel
    configs = [
        triton.Config(
            {"BLOCK_M": rows, "BLOCK_N": cols, "BLOCK_K": depth, "GROUP": 8},
            num_warps=warps,
            num_stages=stages,
        )
        for rows, cols, depth, warps, stages in tiles
    ]
    rules = {} if prune is None else {"early_config_prune": prune}
    tune: Callable[[Any], Any] = triton.autotune(configs, key=key, prune_configs_by=rules)
    return tune


def launch(kernel: Any, grid: Any, *tensors: Tensor, **constants: Any) -> None:
    """Run a kernel on contiguous tensors, on their device, which need not be the current one."""
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        kernel[grid](*(tensor.contiguous() for tensor in tensors), **constants, **_FUSED)
