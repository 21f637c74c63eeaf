"""Keeps the memory of a large CPU weight's gradient from one training step to the next.

How    PyTorch gives the memory of a freed gradient of 75 MB back to the system, and the next step
       must fault it in again, page by page, which takes longer than the sums that fill it. So this
       memory is kept as long as the weight lives, in pages of 2 MiB, and used again when nobody
       else refers to it. And the C library is told once to keep the blocks that a step frees.
Why    Without kept gradients, a training step of 4096 tokens with 24,576 features of width 768
       takes 1.35 times as long; without kept blocks, 1.15 times (`python -m tests.bench.tricks
       memory`, one thread). Without large pages a step on two threads takes 1.04 times as long: the
       fastest of six processes with and without, in turns.
Beware Somebody may keep an old gradient: `p.grad` summed over two steps, a list of gradients, or a
       gradient's storage alone. Only reference counts tell, those of the storage and of its Python
       object; then the next gradient gets new memory.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_HUGE_PAGE = 2 * 2**20
_WORTH_IT = 4 * _HUGE_PAGE  # smaller tensors are left to the C library
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
            _advise_huge_pages(storage)
            _kept[weight] = storage
        strides = torch.empty(weight.shape, device="meta").stride()
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


def _advise_huge_pages(storage: torch.UntypedStorage) -> None:
    """Ask for pages of 2 MiB: 512 times fewer to fault in than pages of 4 KiB."""
    if _madvise is not None:
        start = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (storage.data_ptr() + len(storage)) // _HUGE_PAGE * _HUGE_PAGE
        _madvise(start, end - start, mmap.MADV_HUGEPAGE)  # advice, which the system may ignore


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast("Callable[[int, int, int], int] | None", madvise)


_madvise = _find_madvise()
