"""The only file that registers hooks on a language model.

Room   A hook of ours that stays on a model is an `Attached`: it knows what it belongs to, so what
       is on a model is found by looking at its modules, whichever of them it was attached through.
Beware transformers records hidden states through hooks of its own: ours are prepended, or their
       edit would be missing there. Dynamo does not look for new hooks on code it has compiled:
       adding one resets it. torch copies hooks with a module; ours refuse to be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from hf_switch_sae.errors import AttachError
from hf_switch_sae.lm.calls import FLOW, Watch
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


class Attached:
    """A hook that belongs to a place or a watch, and does not go with a copy of its module."""

    def __init__(self, fn: Callable[..., Any], keeper: Any) -> None:
        self.keeper, self._fn, self._untraced = keeper, fn, untraced(fn)

    def __call__(self, *args: Any) -> Any:
        # not traced, as what there is to do may differ at every call; where nobody traces, the
        # wrapper that keeps Dynamo out would take longer than some of the functions
        return self._untraced(*args) if torch.compiler.is_compiling() else self._fn(*args)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AttachError(
            "an SAE is attached to this model, and its hooks can't go with a copy: detach it "
            "before you copy or pickle the model."
        )


def attached_to(module: nn.Module) -> Iterator[Any]:
    """What has hooks of ours on a module: its places and its watch."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in tuple(hooks.values()):
            if isinstance(hook, Attached):
                yield hook.keeper


def keep_hook(
    place: Hookpoint,
    fn: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor | None],
    keeper: Any,
) -> Callable[[], None]:
    """As `hook_place`, with the module's arguments, kept by `keeper`; returns what takes it off."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = fn(read_residual_input(args, kwargs), args, kwargs)
        return None if new is None else replace_residual_input(args, kwargs, new)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        new = fn(read_residual(output), args, kwargs)
        return None if new is None else replace_residual(output, new)

    module = place.module
    if place.site == "resid_pre":
        hook = Attached(before, keeper)
        return module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove
    hook = Attached(after, keeper)
    return module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove


def watch_calls(module: nn.Module) -> Watch:
    """Note what a module is called with, while it runs; until the watch's `take_off` is called."""
    watch = Watch(module)
    before, after = Attached(watch.before, watch), Attached(watch.after, watch)
    handles = (
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    )

    def take_off() -> None:
        for handle in handles:
            handle.remove()
        FLOW.calls = [call for call in FLOW.calls if call.module is not module]

    watch.take_off = take_off
    return watch


def forget_compiled_code() -> None:
    """Make Dynamo trace compiled code again: it does not guard on hooks, so it misses new ones."""
    if "torch._dynamo" in sys.modules and any(torch._dynamo.utils.counters["frames"].values()):
        torch.compiler.reset()


def untraced(fn: _Function) -> _Function:
    """`fn`, which torch.compile calls as it is."""
    return cast(_Function, torch.compiler.disable(fn))  # type: ignore[no-untyped-call]
