"""A language model run as far as its last hooked block, and no further.

Room   (model, places) -> a function that runs the model's forward up to the last of the places;
       `residuals` also hands out what came by there. Recording and training share it.
How    The last hook at each place notes that it was reached. Once all were, it raises an exception
       that the function catches. Sessions at the same places see the stream first.
Beware A block that runs several times in a forward is not done after the first time. Models that
       loop over their blocks (`_LOOPS`, found by the model zoo) are run to the end. So is the first
       forward of a model that transformers does not know, or to a place that is no block: it counts
       how often the place is passed.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from hf_switch_sae.errors import AttachError, HookpointError
from hf_switch_sae.lm.config import config_of
from hf_switch_sae.lm.hookpoints import Hookpoint, language_model, resolve, unwrap
from hf_switch_sae.lm.hooks import hook_residual, untraced

_LOOPS = {"albert", "hrm_text"}
_SHARDED = {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
_REPLICATED = {"DataParallel", "DistributedDataParallel"}


class _Reached(Exception):
    """All places were reached; caught by the `_PartialForward` that raised it."""


@contextmanager
def partial_forward(lm: nn.Module, places: Sequence[int | str]) -> Iterator[Callable[..., None]]:
    """While open, a function that runs `lm` up to the last of some places.

        with sae.attach(lm) as session, partial_forward(lm, session.hookpoints) as run:
            run(**inputs)
            session.features

    Args:
        lm: any Hugging Face transformer, wrapped or not. Of DataParallel and DistributedData-
            Parallel the module inside is run, so that ranks need not keep step.
        places: layers, hookpoints or module paths, as `attach` takes them; at least one.

    Yields:
        A function of the forward's keyword arguments, without a result. It may raise
        HookpointError: the forward ended and a place was not reached.

    Raises:
        HookpointError: no such place.
        AttachError: the weights are sharded over processes (FSDP, DeepSpeed): a forward that stops
            would leave them gathered, and each process waiting for the others.
    """
    forward = _PartialForward(lm, places)
    with ExitStack() as stack:
        for key, place in forward.places.items():
            probe = untraced(forward.probe(key))
            # last, so that sessions at the place have seen the stream
            stack.enter_context(
                hook_residual(forward.root, f"{place.path}.{place.site}", probe, last=True)
            )
        yield forward


@contextmanager
def residuals(
    lm: nn.Module, places: Sequence[int | str]
) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """While open, a function that runs `lm` up to the last of some places, and what came by there.

        with torch.no_grad(), residuals(lm, [15]) as read:
            read(**inputs)["layers.15.resid_post"]  # [batch, seq, hidden_size]

    Args, errors: as of `partial_forward`.

    Yields:
        A function of the forward's keyword arguments, to {hookpoint's name: residual stream}: a
        copy in the model's own layout (see `find_residual_blocks`) and dtype. A block that runs
        several times in a forward gives its last.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def note(stream: Tensor) -> None:
            found[name] = stream.clone()  # models add to the stream in place

        return untraced(note)

    with ExitStack() as stack:
        run = stack.enter_context(partial_forward(lm, places))
        for place in _resolved(unwrap(lm), places):
            at = f"{place.path}.{place.site}"
            stack.enter_context(hook_residual(unwrap(lm), at, keep(place.name)))

        def read(**inputs: Any) -> dict[str, Tensor]:
            found.clear()
            run(**inputs)
            return dict(found)

        yield read


def input_device(root: nn.Module) -> torch.device:
    """Where to put token ids. If the weights lie elsewhere, the model's own hooks move them."""
    embed: Any = getattr(language_model(root), "get_input_embeddings", lambda: None)()
    weight: Tensor | None = next(iter((embed or root).parameters()), None)
    if weight is None or weight.device.type == "meta":
        return torch.device("cpu")
    return weight.device


class _PartialForward:
    """What `partial_forward` yields."""

    def __init__(self, lm: nn.Module, places: Sequence[int | str]) -> None:
        self.root = unwrap(lm)
        self.places: dict[int, Hookpoint] = dict(enumerate(_resolved(self.root, places)))
        if not self.places:
            raise HookpointError("no place to run the model to: name at least one.")
        for module in (lm, *lm.modules()):
            if _SHARDED & {cls.__name__ for cls in type(module).__mro__}:
                raise AttachError(
                    f"a {type(module).__name__} shards its weights over processes, so its forward "
                    "can't stop on the way: load the model with device_map instead."
                )
        # a replica's own forward would wait for the other ranks
        is_replica = _REPLICATED & {cls.__name__ for cls in type(lm).__mro__}
        self._lm = cast(nn.Module, lm.module) if is_replica else lm
        self._loops = _loops(list(self.places.values()))
        # only our own forward is stopped, not one that another thread runs meanwhile
        self._running = threading.local()

    def __call__(self, **inputs: Any) -> None:
        seen: Counter[int] = Counter()
        stopping = self._loops is False
        self._running.call = (seen, stopping)
        if not stopping and "logits_to_keep" in inspect.signature(self.root.forward).parameters:
            inputs = {"logits_to_keep": 1, **inputs}  # nobody looks at the logits
        try:
            self._lm(**inputs)
        except _Reached as reached:
            if reached.args[0] is not self:
                raise
        finally:
            self._running.call = None
        # an encoder's block, say, with inputs for the decoder alone
        if missing := [place.name for key, place in self.places.items() if not seen[key]]:
            raise HookpointError(
                f"the forward of {type(self.root).__name__} did not pass by {', '.join(missing)} "
                "with these inputs."
            )
        # now it has been seen whether a block runs twice
        if self._loops is None:
            self._loops = any(count > 1 for count in seen.values())

    def probe(self, key: int) -> Callable[[Tensor], None]:
        """The last hook at a place."""

        def reached(_: Tensor) -> None:
            call = getattr(self._running, "call", None)
            if call is None:
                return
            seen, stopping = call
            seen[key] += 1
            if stopping and len(seen) == len(self.places):
                raise _Reached(self)

        return reached


def _resolved(root: nn.Module, places: Sequence[int | str]) -> list[Hookpoint]:
    found = {}
    for at in [places] if isinstance(places, str) else places:
        place = resolve(root, at)
        found[id(place.module), place.site] = place
    return list(found.values())


def _loops(places: list[Hookpoint]) -> bool | None:
    """Whether blocks run several times in a forward; None if only a forward can tell."""
    for place in places:
        blocks = place.blocks
        if blocks is None or not any(place.module is block for block in blocks.blocks):
            return None
        kind = getattr(config_of(blocks.owner), "model_type", None)
        if kind in _LOOPS or len(set(map(id, blocks.blocks))) < len(blocks):
            return True
        if kind not in CONFIG_MAPPING:
            return None
    return False
