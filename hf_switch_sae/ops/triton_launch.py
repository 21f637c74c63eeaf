"""Triton where it is installed, and how its kernels are launched.

Beware TRITON_INTERPRET is read on import; with it kernels run on the CPU, slowly, for tests.
       The interpreter does not notice a load without a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # kernels stay functions that nobody calls: see `triton_kernels.why_not`
    triton = tl = None

__all__ = ["INTERPRETED", "jit", "launch", "tl", "triton"]

INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)

# From 3.10 on Triton multiplies and adds in one instruction only if told to.
_FUSED = {"enable_fp_fusion": True}


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`, or nothing without Triton."""
    return kernel if triton is None else triton.jit(kernel)


def launch(kernel: Any, grid: Any, *tensors: Tensor, **constants: Any) -> None:
    """Run a kernel on contiguous tensors, on their device, which need not be the current one."""
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        kernel[grid](*(tensor.contiguous() for tensor in tensors), **constants, **_FUSED)
