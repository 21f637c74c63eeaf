"""Parts of a forward that run again in backward: gradient checkpointing -> which first run it is.

Room   What ran under `torch.utils.checkpoint` runs once more in backward, without the models around
       it, so nothing tells whose its tokens are. Its first run is found again by what checkpoint
       keeps: the function that it runs, and the storage of that function's tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

_MODULE = "torch.utils.checkpoint"
_Kept = TypeVar("_Kept")
_Key = tuple[int, ...]


@dataclass
class _Entry(Generic[_Kept]):
    """One run that may be run again."""

    value: _Kept
    alive: Any
    """Weak reference to its function; None if that never dies."""
    done: bool = False
    """Whether backward has come to it."""


class FirstRuns(Generic[_Kept]):
    """What is kept of runs under checkpoint, for as long as they may be run again.

    Args:
        either: what to keep instead of two that can't be told apart.
    """

    def __init__(self, either: Callable[[_Kept, _Kept], _Kept]) -> None:
        self._either = either
        self._kept: dict[_Key, _Entry[_Kept]] = {}

    def keep(self, value: _Kept) -> bool:
        """Keep a value for the run under way, if it is under checkpoint; returns whether it is."""
        regions = _first_runs()
        for function, key in regions:
            before, kept = self._kept.pop(key, None), value  # so that the newest are last
            if before is not None and before.value is not value and not before.done:
                # both may come up in backward, and nothing would tell them apart
                kept = self._either(before.value, value)
            forget = None if isinstance(function, nn.Module) else self._forget(key)
            try:
                alive = weakref.ref(function, forget) if forget else None
            except TypeError:
                alive = None
            self._kept[key] = _Entry(kept, alive)
        # of functions that never die, such as modules, only so many runs can wait for backward
        while len(self._kept) > 4096:
            self._kept.pop(next(iter(self._kept)))
        return bool(regions)

    def find(self) -> _Kept | None:
        """What was kept of the run that the one under way repeats; None if nothing was."""
        function, key = _repeated()
        kept = None if key is None else self._kept.get(key)
        # where tensors were stored elsewhere meanwhile, a function that runs once is enough
        if kept is None and key is not None and isinstance(function, partial):
            others = [each for (own, *_), each in self._kept.items() if own == key[0]]
            kept = others[0] if len(others) == 1 else None
        if kept is None:
            return None
        self.note_backward(kept.value)
        return kept.value

    def note_backward(self, value: _Kept) -> None:
        """Backward has come to the run that a value was kept for."""
        for entry in tuple(self._kept.values()):
            entry.done = entry.done or entry.value is value

    def waiting(self) -> list[_Kept]:
        """What is kept of runs that backward has not come to, and still can."""
        entries = tuple(self._kept.values())
        return [each.value for each in entries if each.alive is not None and not each.done]

    def _forget(self, key: _Key) -> Any:
        kept = self._kept
        return lambda _: kept.pop(key, None)


def in_backward() -> bool:
    """Whether this thread computes gradients just now."""
    return torch._C._current_graph_task_id() != -1


def repeats() -> bool:
    """Whether what runs in this thread is a second run, in backward."""
    return in_backward() and _repeated()[1] is not None


def _first_runs() -> list[tuple[Any, _Key]]:
    """The checkpointed regions around the run under way, innermost first."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "checkpoint" and _is_torchs(frame):
            values = frame.f_locals
            function = values.get("function")
            tensors = (*values.get("args", ()), *values.get("kwargs", {}).values())
            found.append((function, _key(function, tensors)))
        frame = frame.f_back
    return found


def _repeated() -> tuple[Any, _Key | None]:
    """The function of the checkpointed region that is run again, and its key."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "recompute_fn" and _is_torchs(frame):
            values = frame.f_locals
            function = values.get("fn")
            tensors = (*values.get("args", ()), *values.get("kwargs", {}).values())
            return function, _key(function, tensors)
        if name == "backward" and _is_torchs(frame) and "detached_inputs" in frame.f_locals:
            values = frame.f_locals
            function = values["ctx"].run_function
            return function, _key(function, values["detached_inputs"])
        frame = frame.f_back
    return None, None


def _is_torchs(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == _MODULE


def _key(function: Any, args: tuple[Any, ...]) -> _Key:
    return (id(function), *(x.data_ptr() for x in args if isinstance(x, Tensor)))
