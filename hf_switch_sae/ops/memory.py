"""Keeps the memory of a large CPU weight's gradient from one training step to the next.

How    PyTorch gives the memory of a freed gradient of 75 MB back to the system, and the next step
       must fault it in again, page by page, which takes longer than the sums that fill it. So this
       memory is kept as long as the weight lives, and used again when nobody else refers to it. And
       the C library is told once to keep the blocks that a step frees.
Why    Without kept gradients, a training step of 4096 tokens with 24,576 features of width 768
       takes 1.45 times as long; without kept blocks, 1.07 times (`python -m tests.bench.tricks
       memory`, two threads).
Beware Somebody may keep an old gradient: `p.grad` summed over two steps, a list of gradients, or a
       gradient's storage alone. Only reference counts tell, those of the storage and of its Python
       object; then the next gradient gets new memory.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_WORTH_IT = 8 * 2**20  # smaller tensors are left to the C library
_LARGEST_LEARNED = 32 * 2**20 - 2**16  # by glibc, with room for what it adds
_kept = WeakTensorKeyDictionary()  # weight -> UntypedStorage
_lock = threading.Lock()  # two backward passes of one weight must not be given the same memory

# How many tensors share a storage, plus 1 for `_kept`. The name is private to torch; if it is gone,
# no memory is kept.
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def gradient_of(weight: Tensor) -> Tensor | None:
    """Uninitialized memory for a weight's gradient, in its shape and dtype.

    None if there is nothing to gain: the weight is small, or not on the CPU.
    """
    size = weight.numel() * weight.element_size()
    if weight.device.type != "cpu" or size < _WORTH_IT or _use_count is None:
        release_gradient_of(weight)
        return None
    with _lock:
        # the memory of the step before is free if neither a tensor nor Python code refers to it
        storage = _kept.get(weight)  # type: ignore[no-untyped-call]
        is_free = storage is not None and _use_count(storage._cdata) <= 1
        if not is_free or len(storage) != size or _references(storage) > _UNHELD:
            _keep_freed_blocks()
            storage = torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
            _kept[weight] = storage
        strides = torch.empty(weight.shape, dtype=weight.dtype, device="meta").stride()
        return torch.empty(0, dtype=weight.dtype, device="cpu").set_(
            storage, 0, weight.shape, strides
        )


def _references(storage: torch.UntypedStorage) -> int:
    return sys.getrefcount(storage)


def _references_unheld() -> int:
    """The count for a storage that nobody else refers to, taken as `gradient_of` takes it.

    It is measured, because versions of Python count differently.
    """
    kept = {0: torch.UntypedStorage(0)}  # type: ignore[no-untyped-call]
    storage = kept[0]
    return _references(storage)


_UNHELD = _references_unheld()


def release_gradient_of(weight: Tensor) -> None:
    """Stop keeping the memory of a weight's gradient; while it is in use, it stays."""
    with _lock:
        if weight in _kept:
            del _kept[weight]


def _keep_freed_blocks() -> None:
    """Make the C library keep the memory of a step's activations for the next step.

    glibc adapts to the blocks that are freed: it keeps blocks up to the size of the largest so far,
    at most 32 MB, and twice that at the end of the heap (mallopt(3), M_MMAP_THRESHOLD). So one such
    block is allocated and freed. Nothing is written to it, so it takes no memory; other C libraries
    do nothing with it.
    """
    torch.UntypedStorage(_LARGEST_LEARNED)  # type: ignore[no-untyped-call]
