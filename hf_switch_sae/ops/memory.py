"""Where the gradient of a large CPU weight lies: in memory that the step before has used.

PyTorch gives a freed gradient of 75 MB back to the system, and the next step's has to be faulted in
page by page: that takes longer than the sums that fill it. So a weight's gradient memory is kept as
long as the weight lives, and handed out again when nobody else refers to it. What a step computes
in between stays with the C library, which is told once to keep blocks of that size.

Beware Somebody may hold on to an old gradient (`p.grad` of two steps summed, a list of them, its
       storage alone): only the counts of references to the storage and to Python's object of it
       say so, and then memory is new.
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
_WORTH_IT = 4 * _HUGE_PAGE  # smaller tensors stay in the C library's own hands
_LARGEST_LEARNT = 32 * 2**20 - 2**16  # by glibc, with room for what it adds
_kept = WeakTensorKeyDictionary()  # weight -> UntypedStorage
_lock = threading.Lock()  # two backward passes of one weight must not be given the same memory

# How many tensors share a storage, and 1 for ours; a private name: without it memory is always new.
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def gradient_of(weight: Tensor) -> Tensor | None:
    """Uninitialized memory for a weight's gradient, in its shape and dtype.

    None where there is nothing to gain: a small weight, or another device than the CPU.
    """
    size = weight.numel() * weight.element_size()
    if weight.device.type != "cpu" or size < _WORTH_IT or _use_count is None:
        release_gradient_of(weight)
        return None
    with _lock:
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
    """How many there are to a storage that `gradient_of` has found: Pythons count differently."""
    kept = {0: torch.UntypedStorage(0)}  # type: ignore[no-untyped-call]
    storage = kept[0]
    return _references(storage)


_UNHELD = _references_unheld()


def release_gradient_of(weight: Tensor) -> None:
    """Keep the memory of a weight's gradient no longer; one in use stays until it is freed."""
    with _lock:
        if weight in _kept:
            del _kept[weight]


def _keep_freed_blocks() -> None:
    """Have the C library keep what is freed after a step's activations, for the next step's.

    glibc learns from blocks that are freed: up to the size of the largest, and up to 32 MB, it
    keeps them, and twice that at the end of the heap (mallopt(3), M_MMAP_THRESHOLD). Nothing is
    written to the block, so it takes no memory; other libraries learn nothing from it.
    """
    torch.UntypedStorage(_LARGEST_LEARNT)  # type: ignore[no-untyped-call]


def _advise_huge_pages(storage: torch.UntypedStorage) -> None:
    """Ask for pages of 2 MiB, of which there are 500 times fewer to fault in."""
    if _madvise is not None:
        start = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (storage.data_ptr() + len(storage)) // _HUGE_PAGE * _HUGE_PAGE
        _madvise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: nothing is lost if not taken


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast("Callable[[int, int, int], int] | None", madvise)


_madvise = _find_madvise()
