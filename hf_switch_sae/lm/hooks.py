"""The only file that registers hooks on a language model.

Beware transformers records hidden states through hooks of its own: ours are prepended, or their
       edit would be missing there. Dynamo does not look for new hooks on code it has compiled:
       adding one resets it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from hf_switch_sae.lm.hookpoints import Hookpoint, resolve
from hf_switch_sae.lm.streams import (
    read_residual,
    read_residual_input,
    replace_residual,
    replace_residual_input,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ResidualHandle:
    """Removes a hook that `hook_residual` placed."""

    def __init__(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._handle = handle

    def remove(self) -> None:
        """Remove the hook; doing it twice does nothing."""
        self._handle.remove()

    def __enter__(self) -> ResidualHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hook_residual(
    model: nn.Module, at: int | str, fn: Callable[[Tensor], Tensor | None], *, last: bool = False
) -> ResidualHandle:
    """Call `fn` on the residual stream at a place, each time it comes by; for your own probes.

    Args:
        model: any Hugging Face transformer, wrapped or not.
        at: a layer, a hookpoint (`layers.7.resid_post`, `layers.7.resid_pre`) or a module path.
        fn: gets the residual stream, mostly [batch, seq, hidden_size] (see `find_residual_blocks`
            for the exceptions); returns the tensor to go on with, or None to leave it as it is.
        last: after all other hooks there, those of sessions included, instead of before them.

    Returns:
        A handle with `remove()`, also a context manager.

    Raises:
        HookpointError: no such place.
    """
    place = resolve(model, at)
    forget_compiled_code()
    return hook_place(place, fn, last)


def hook_place(
    place: Hookpoint, fn: Callable[[Tensor], Tensor | None], last: bool = False
) -> ResidualHandle:
    """As `hook_residual`, at a place that is found already; compiled code is not forgotten."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = fn(read_residual_input(args, kwargs))
        return None if new is None else replace_residual_input(args, kwargs, new)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = fn(read_residual(output))
        return None if new is None else replace_residual(output, new)

    if place.site == "resid_pre":
        return ResidualHandle(
            place.module.register_forward_pre_hook(before, prepend=not last, with_kwargs=True)
        )
    return ResidualHandle(place.module.register_forward_hook(after, prepend=not last))


def watch_calls(
    module: nn.Module,
    before: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[nn.Module, tuple[Any, ...], Any], None],
) -> Callable[[], None]:
    """Call functions around each forward of a module, for what it was called with.

    Args:
        module: any.
        before: gets module, args, kwargs, before other hooks do.
        after: gets module, args, output; also where the forward raised.

    Returns:
        A function that takes both hooks off.
    """
    handles = (
        module.register_forward_pre_hook(untraced(before), prepend=True, with_kwargs=True),
        module.register_forward_hook(untraced(after), always_call=True),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def forget_compiled_code() -> None:
    """Make Dynamo trace compiled code again: it does not guard on hooks, so it misses new ones."""
    if "torch._dynamo" in sys.modules and any(torch._dynamo.utils.counters["frames"].values()):
        torch.compiler.reset()


def untraced(fn: _Function) -> _Function:
    """`fn`, which torch.compile calls as it is."""
    return cast(_Function, torch.compiler.disable(fn))  # type: ignore[no-untyped-call]
