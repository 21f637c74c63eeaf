"""The primitives in C++, for float32 on a CPU: tensors in, tensors out, computed by `kernels.cpp`.

Why    For these, torch has no operator, or several that each go through memory once more. Without
       them a training step takes 1.4 times as long (`python -m tests.bench.cpu train`): relu_topk
       takes 2.5 times as long, row_dots 1.6, gather_sum and scatter_sum 1.2, and for 32 tokens
       expert_products 2.6 (`python -m tests.bench.tricks native`). Products of many rows are left
       to the CPU's own library, as nothing is faster.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae.errors import BackendError
from hf_switch_sae.ops import eager
from hf_switch_sae.ops.native.build import native_library
from hf_switch_sae.ops.routing import no_feature

__all__ = [
    "adam_rows",
    "decode_token",
    "encode_token",
    "expert_products",
    "gather_sum",
    "relu_topk",
    "row_dots",
    "scatter_sum",
    "why_not",
]

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors that own their memory; a subclass, such as a sharded tensor, may have none."""
_FEW = 24  # tokens of an expert up to which its products are computed here
_P, _I, _F, _T = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "expert_products": (_P, _P, _P, _P, _P, _I, _I, _I, _I, _P, _T),
    "relu_topk": (_P, _I, _I, _I, _P, _P, _T),
    "gather_sum": (_P, _P, _P, _I, _I, _I, _I, _P, _T),
    "row_dots": (_P, _P, _P, _I, _I, _I, _I, _P, _T),
    "scatter_sum": (_P, _P, _P, _I, _I, _I, _I, _P, _T),
    "adam_rows": (_P, _P, _P, _P, _I, _I, _T, *[_F] * 7, _T),
    "encode_token": (_P, _P, _P, _P, _T),
    "decode_token": (_P, _P, _P, _I, _P),
}
_CHECKED = ("gather_sum", "row_dots", "scatter_sum", "decode_token")
_IN_RANGE = -(2**63)  # what these return if all ids are in range
_NO_MEMORY = _IN_RANGE + 1


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels can't compute `dtype` on `device`, as one sentence; None if they can."""
    if device.type != "cpu":
        return f"the native kernels need a CPU, and this is {device}."
    if dtype != torch.float32:
        return f"the native kernels compute float32, not {dtype}."
    found = native_library()
    return found if isinstance(found, str) else None


def expert_products(
    x: Tensor, rows: Tensor | None, W: Tensor, bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """As `reference.expert_products`; experts with many rows are left to the CPU's own library."""
    if W.dtype != x.dtype:
        return eager.expert_products(x, rows, W, bias, offsets)
    bias = None if bias is None else bias.to(x.dtype)
    (E, m, d), bounds = W.shape, offsets.tolist()
    pre = x.new_empty(bounds[-1], m)
    counts = [end - start for start, end in itertools.pairwise(bounds)]
    # one call for all experts with few rows, then one product for each of the others
    if min(counts) <= _FEW:
        _call(
            "expert_products", x, rows, W, bias, offsets, E, m, d, _FEW, pre,
            torch.get_num_threads(),
        )  # fmt: skip
    for expert, start in enumerate(bounds[:-1]):
        if counts[expert] > _FEW:
            own = slice(start, bounds[expert + 1])
            torch.mm(x[own if rows is None else rows[own]], W[expert].T, out=pre[own])
            if bias is not None:
                pre[own] += bias[expert]
    return pre


def relu_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `reference.relu_topk`, ties included."""
    p, m = pre.shape
    acts, ids = pre.new_empty(p, k), torch.empty(p, k, dtype=torch.int64, device=pre.device)
    _call("relu_topk", pre, p, m, k, acts, ids, torch.get_num_threads())
    return acts, ids


def gather_sum(coefs: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """As `reference.gather_sum`."""
    (n, k), d = ids.shape, W.shape[1]
    y = W.new_empty(n, d)
    threads = 1 if n == 1 else torch.get_num_threads()
    coefs, ids = coefs.to(W.dtype), ids.to(torch.int64)
    _check(_call("gather_sum", coefs, ids, W, n, k, len(W), d, y, threads), len(W))
    return y


def row_dots(g: Tensor, ids: Tensor, W: Tensor) -> Tensor:
    """As `reference.row_dots`."""
    (n, k), d = ids.shape, W.shape[1]
    c = W.new_empty(n, k)
    threads = torch.get_num_threads()
    _check(_call("row_dots", g.to(W.dtype), ids, W, n, k, len(W), d, c, threads), len(W))
    return c.to(g.dtype)


def scatter_sum(
    coefs: Tensor,
    ids: Tensor,
    x: Tensor,
    num_rows: int,
    out: Tensor | None = None,
    num_experts: int | None = None,
    low: torch.dtype | None = None,
) -> Tensor:
    """As `reference.scatter_sum`."""
    (n, k), d = ids.shape, x.shape[1]
    total = x.new_empty(num_rows, d) if out is None else out
    threads = torch.get_num_threads()
    _check(
        _call("scatter_sum", coefs.to(x.dtype), ids, x, n, k, num_rows, d, total, threads),
        num_rows,
    )
    return total


def adam_rows(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: float | Tensor,
    *,
    unit_rows: bool,
    scale: float | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """As `reference.adam_rows`."""
    (beta1, beta2), step, scale, lr = betas, float(step), float(scale), float(lr)
    rows, d = weight.numel() // weight.shape[-1], weight.shape[-1]
    rate, correction2 = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    _call(
        "adam_rows", weight, grad, mean, square, rows, d, unit_rows, scale, rate, 1 - beta1, beta2,
        1 - beta2, eps, correction2, torch.get_num_threads(),
    )  # fmt: skip
    # as after any in-place operator, so that a graph that has saved these notices
    torch.autograd.graph.increment_version((weight, mean, square))


def encode_token(*where: int) -> None:
    """One token's features; `token.TokenPlan` has checked that the kernel can read the memory.

    Args:
        where: addresses of the plan, the token, its acts and its ids; and the number of threads.
    """
    _kernels()["encode_token"](*where)


def decode_token(plan: int, acts: int, ids: int, slots: int, num_rows: int, y: int) -> None:
    """One token's reconstruction; the plan, acts, ids and y are addresses.

    Raises:
        FeatureIdError: an id of no feature.
    """
    _check(_kernels()["decode_token"](plan, acts, ids, slots, y), num_rows)


def _call(name: str, *arguments: Any) -> Any:
    """Call a kernel on tensors, numbers and None; tensors that it writes to must be contiguous.

    Raises:
        BackendError: tensors that it can't read.
    """
    # `held` keeps contiguous copies alive until the kernel has returned
    held = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    tensors = [a for a in held if isinstance(a, Tensor)]
    if any(t.dtype not in (torch.float32, torch.int64) or not t.is_cpu for t in tensors):
        raise BackendError(f"the native {name} computes float32 on a CPU, by ids in int64.")
    if strange := [type(t).__name__ for t in tensors if type(t) not in PLAIN]:
        raise BackendError(
            f"the native {name} reads a tensor's own memory, and a {strange[0]} may have none: "
            "gather a sharded SAE first, or call it as a module does, by forward."
        )
    return _kernels()[name](*(a.data_ptr() if isinstance(a, Tensor) else a for a in held))


def _check(wrong: int, num_rows: int) -> None:
    """Raise what a kernel's return value says: an id out of range is never read.

    Raises:
        FeatureIdError: an id was out of range.
        MemoryError: there was too little memory to work in.
    """
    if wrong == _NO_MEMORY:
        raise MemoryError("too little memory to sort activations by feature.")
    if wrong != _IN_RANGE:
        raise no_feature(wrong, num_rows)


@functools.cache
def _kernels() -> dict[str, Any]:
    """All kernels by name.

    Raises:
        BackendError: this machine can't compile them.
    """
    library = native_library()
    if isinstance(library, str):
        raise BackendError(library)
    found = {name: getattr(library, name) for name in _ARGUMENTS}
    for name, kernel in found.items():
        kernel.argtypes = _ARGUMENTS[name]
        kernel.restype = ctypes.c_int64 if name in _CHECKED else None
    return found
