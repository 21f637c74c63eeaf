"""Which primitives compute: chosen by where the tensors lie, overridable, and able to say why not.

A backend is a module with the five primitives that `reference.py` defines (`expert_products`,
`relu_topk`, `gather_sum`, `row_dots`, `scatter_sum`) and `why_not(device, dtype)`; and, if it has a
kernel for the optimizer, `adam_rows`. What else has kernels in one backend alone asks with `takes`
whether it is the one: the sums over rows in `deviations`, and a single token in `token`.
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
"""Best first: the first that does not decline is taken."""

_asked_for: dict[object, str] = {}  # by blocks of `use_backend` that run, the newest last


def backend_for(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The primitives that compute on a device in a dtype.

    Raises:
        BackendError: the one asked for with `use_backend` declines.
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
    """Whether that backend is the one to compute there; False too where the one asked for with
    `use_backend` declines."""
    try:
        return backend_for(device, dtype) is BACKENDS[name]
    except BackendError:
        return False


@functools.cache  # where a call may cost less than the question
def _best_on_a_cpu(dtype: torch.dtype) -> ModuleType:
    """Without Triton, whose interpreter is for tests."""
    return native if native.why_not(torch.device("cpu"), dtype) is None else eager


@functools.cache  # asked several times a step, and the answer takes looking for a compiler
def _best(device: torch.device, dtype: torch.dtype) -> ModuleType:
    return next(b for b in BACKENDS.values() if b.why_not(device, dtype) is None)


def explain_backends(
    device: str | torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, str | None]:
    """Why each backend declines to compute there, by name and best first; None: it would not.

    Of batches, and of what is trained: a single token in bfloat16 on a CPU, as in `generate`, is
    computed by the native kernels too.

    Raises:
        TypeError: `dtype` is none.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is one of torch's, such as torch.bfloat16; got {dtype!r}.")
    where = torch.device(device)
    return {name: backend.why_not(where, dtype) for name, backend in BACKENDS.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend while the block runs, in all threads: for tests and comparisons.

    Of several blocks that run at once, the one begun last decides.

    Args:
        name: "triton", "native", "eager" or "reference".

    Raises:
        BackendError: there is no such backend; or, when something is computed, it declines.
    """
    if name not in BACKENDS:
        raise BackendError(f"no backend {name!r}: there are {', '.join(map(repr, BACKENDS))}.")
    block = object()
    _asked_for[block] = name
    try:
        yield
    finally:
        del _asked_for[block]
