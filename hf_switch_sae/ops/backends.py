"""Which backend computes: chosen by device and dtype, overridable, and able to say why not.

Room   A backend is a module with the five primitives that `reference.py` defines
       (`expert_products`, `relu_topk`, `gather_sum`, `row_dots`, `scatter_sum`), `why_not(device,
       dtype)`, and `adam_rows` if it has a kernel for the optimizer.
How    Other kernels exist in one backend only: sums over rows (`deviations`) in Triton, a single
       token (`native.token`) in C++. Their callers ask `takes` whether that backend is chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from hf_switch_sae.errors import BackendError
from hf_switch_sae.ops import eager, reference
from hf_switch_sae.ops.native import kernels as native
from hf_switch_sae.ops.triton import kernels as triton_kernels

BACKENDS: dict[str, ModuleType] = {
    "triton": triton_kernels,
    "native": native,
    "eager": eager,
    "reference": reference,
}
"""Best first: the first that does not decline computes."""

_asked_for: dict[object, str] = {}  # by the `use_backend` blocks now running, the newest last


def backend_for(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend that computes in a dtype on a device.

    Raises:
        BackendError: a backend was asked for with `use_backend`, and it declines.
    """
    if asked_for := (*_asked_for.values(),):
        name = asked_for[-1]
        reason = BACKENDS[name].why_not(device, dtype)
        if reason is not None:
            raise BackendError(f"the backend {name!r} was asked for and declines: {reason}")
        return BACKENDS[name]
    if device.type == "cpu":
        return _best_on_a_cpu(dtype)
    return _best(device, dtype)


def takes(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether that backend computes there; False also if one was asked for and declines."""
    try:
        return backend_for(device, dtype) is BACKENDS[name]
    except BackendError:
        return False


@functools.cache  # a call on a CPU may take less time than finding the answer
def _best_on_a_cpu(dtype: torch.dtype) -> ModuleType:
    """The best without Triton, whose interpreter is only for tests."""
    return native if native.why_not(torch.device("cpu"), dtype) is None else eager


@functools.cache  # asked several times a step, and the answer involves a search for a compiler
def _best(device: torch.device, dtype: torch.dtype) -> ModuleType:
    return next(b for b in BACKENDS.values() if b.why_not(device, dtype) is None)


def explain_backends(
    device: str | torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, str | None]:
    """Why each backend declines to compute there, best first; None if it does not decline.

    This is about batches and training: a single token in bfloat16 on a CPU, as in `generate`, is
    computed by the native kernels too.

    Raises:
        TypeError: `dtype` is not a torch.dtype.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is one of torch's, such as torch.bfloat16; got {dtype!r}.")
    where = torch.device(device)
    return {name: backend.why_not(where, dtype) for name, backend in BACKENDS.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend while the block runs, in all threads; for tests and comparisons.

    If several blocks run at once, the one begun last decides.

    Args:
        name: "triton", "native", "eager" or "reference".

    Raises:
        BackendError: there is no such backend, or it declines when something is computed.
    """
    if name not in BACKENDS:
        raise BackendError(f"no backend {name!r}: there are {', '.join(map(repr, BACKENDS))}.")
    block = object()
    _asked_for[block] = name
    try:
        yield
    finally:
        del _asked_for[block]
