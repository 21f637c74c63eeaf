"""What models are being called with: the forwards under way in this thread -> `Call`s.

Room   A hook on a block sees its stream alone. Mask, position ids, cache and token ids are
       arguments of the models around it, which are watched (`Watch`) and note them while they run.
How    One stack of calls a thread, as calls nest. What a cache began with and has grown by is kept
       with the cache object, weakly, so that decoding loops of any origin can be followed.
Beware torch does not call hooks after Ctrl-C, so a note may be left on the stack. A note counts
       only while the frame it was made in is on the Python stack.
"""

from __future__ import annotations

import inspect
import operator
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from hf_switch_sae.lm.masks import Mask, is_flat

_CACHES = (
    *("past_key_values", "past_key_value", "cache_params", "cache", "state", "mems"),
    "past_buckets_states",
)
_IDS = ("decoder_input_ids", "input_ids", "decoder_inputs_embeds", "inputs_embeds")
_SIGNALS = {"input_features", "input_values", "pixel_values"}
_SEAMS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")


@dataclass
class Growth:
    """One cache: how it began, and what has gone into it since."""

    prompt: int
    """Columns of the first forward."""
    seen: int = 0
    """Columns so far, for caches that don't know their length."""
    mask: Mask | None = None
    """The last mask of all columns until then, for models that get none once they have a cache."""
    covered: int = 0
    """Columns of which padding is known: those of the mask, and what came without any since."""


_GROWTHS: Any = WeakIdKeyDictionary()
_BEGUN: Any = WeakIdKeyDictionary()
"""Of each paged cache the requests that were seen from their beginning on."""


@dataclass(eq=False)
class Call:
    """One call of a model or block: its arguments that decide whose its tokens are."""

    module: nn.Module
    mask: Any = None
    """attention_mask as given: 2-D, 4-D, a dict of 4-D masks, or whatever else a kernel takes."""
    decoder_mask: Any = None
    is_pair: bool = False
    """Whether it takes masks of an encoder and of a decoder."""
    reads_for_decoder: bool = False
    """Whether it takes the ids of a decoder, so that what else it is given is the encoder's."""
    position_ids: Tensor | None = None
    seams: Tensor | None = None
    """[n + 1], where each of the texts begins that are packed into one row; None if none are."""
    has_cache: bool = False
    past: int | Tensor | None = None
    """Columns in the cache before this call; None if nobody can tell."""
    is_counted: bool = False
    """Whether the cache itself can't tell, so that `past` is what was seen to go into it."""
    batch: int | None = None
    length: int = 0
    """Columns of this call; 0 if it was given neither ids nor embeddings."""
    is_of_signal: bool = False
    """Whether it was given sound or pixels, to which nothing is appended."""
    token_ids: Tensor | None = None
    """[B, length] int64, if the call was given any."""
    differentiable: bool = False
    begins_cache: bool = False
    """Whether it was asked for a cache and given none."""
    frame: int | None = None
    """Identity of its Python frame; None in compiled code, which has none."""
    growth: Growth | None = None
    """Of its cache; None if it has none, or nobody saw how that began."""
    is_over: bool = False
    passed: set[int] = field(default_factory=set)
    """The places (by id) that the stream has passed by."""
    _cache: Any = None

    @classmethod
    def read(cls, module: nn.Module, arguments: Mapping[str, Any], names: frozenset[str]) -> Call:
        """From a forward's arguments by name, before it runs; `names` are those it can take."""
        # loops, as generators take twice as long and this runs at every token
        cache = tokens = seams = None
        for name in _CACHES:
            if (cache := arguments.get(name)) is not None:
                break
        for name in _IDS:
            value = arguments.get(name)
            if isinstance(value, Tensor) and value.ndim >= 2:
                tokens = value
                break
        for name in _SEAMS:
            value = arguments.get(name)
            if isinstance(value, Tensor) and value.ndim == 1:
                seams = value
                break
        first = tokens
        if tokens is None:  # features of sound, pixels
            tensors = (x for x in arguments.values() if isinstance(x, Tensor) and x.ndim >= 2)
            first = next(tensors, None)
        ids = arguments.get("position_ids")
        if isinstance(ids, Tensor) and ids.ndim == 3 and len(ids) == 4:
            ids = ids[0]  # of text, before those of time, height and width
        ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
        growth, past = _growth(cache), _length(cache)
        return cls(
            module,
            mask=arguments.get("attention_mask"),
            decoder_mask=arguments.get("decoder_attention_mask"),
            is_pair="decoder_attention_mask" in names,
            reads_for_decoder="decoder_input_ids" in names,
            # a batching server writes the next step into the same tensors
            position_ids=ids.clone() if ids is not None and seams is not None else ids,
            seams=seams.clone() if seams is not None else None,
            has_cache=cache is not None,
            past=growth.seen if past is None and growth is not None else past,
            batch=None if first is None else first.shape[0],
            length=0 if tokens is None else tokens.shape[1],
            is_of_signal=tokens is None and not _SIGNALS.isdisjoint(arguments),
            token_ids=None if tokens is None or tokens.is_floating_point() else tokens,
            differentiable=torch.is_grad_enabled(),
            is_counted=past is None,
            begins_cache=cache is None and arguments.get("use_cache") is True,
            frame=_frame_of(module),
            growth=growth,
            _cache=cache,
        )

    def has_begun(self, request: str, position: int, alone: bool) -> bool:
        """Whether a request in a paged cache was seen from its beginning on.

        Args:
            request: its name; those of further sequences of one request have a name after it.
            position: where it goes on now.
            alone: whether its own name counts only.
        """
        begun = _BEGUN.setdefault(self._cache, set())
        if not position:
            begun.add(request)
        return request in begun or (not alone and request.partition("__child")[0] in begun)

    def end(self, output: Any) -> None:
        """After the forward: note what has gone into the cache; hold on to it no longer."""
        cache, self._cache, self.is_over = self._cache, None, True
        if cache is None:  # it may have made one
            cache = getattr(output, "past_key_values", None) or getattr(
                output, "cache_params", None
            )
        if output is None or cache is None:
            return
        past, growth, length = int(self.past or 0), self.growth, self.length
        if not length:  # it was given neither ids nor embeddings, but the cache knows
            length = int(_length(cache) or 0) - past
        if length <= 0:
            return
        # one that was emptied, or cut back into its prompt, begins anew
        if growth is None or past < growth.prompt:
            if past and growth is None:
                return  # nobody saw how it began
            growth = Growth(past + length)
            with suppress(TypeError):  # nothing that can be followed
                _GROWTHS[_key(cache)] = growth
        growth.seen = past + length
        mask = self.mask
        if is_flat(mask) and mask.shape[1] == growth.seen:
            growth.mask, growth.covered = Mask(growth.seen, lambda: mask != 0), growth.seen
        elif mask is None and growth.covered == past:
            growth.covered = growth.seen


class Flow(threading.local):
    """This thread's calls under way, and whether no session edits in it just now."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.muted = False

    def call_of(self, module: nn.Module) -> Call | None:
        """The innermost call of a module under way; None if nobody is calling it."""
        return next((call for call in reversed(self.calls) if call.module is module), None)

    def calls_of(self, models: Sequence[nn.Module]) -> list[Call]:
        """The calls of a model and of those around it that led to it, outermost first.

        Args:
            models: each around the next; none is returned unless the last is being called.
        """
        calls, count = self.calls, len(models)
        # mostly they are the last that were noted, one within the other
        last = calls[-count:]
        if len(last) == count and all(map(operator.is_, (c.module for c in last), models)):
            rest = calls[:-count]
            nested = rest and any(call.module is models[-1] for call in rest)
            if not nested and _are_running(last):
                return last
        found: list[Call] = []
        wanted = list(models)
        for call in reversed(self.calls):
            if not wanted:
                break
            if any(call.module is model for model in wanted):
                while wanted.pop() is not call.module:  # one that was not called on the way
                    if not found:
                        return []
                found.append(call)
            elif any(call.module is other.module for other in found):
                break  # a forward within a forward: what is further out led to the other one
        if found and not _are_running(found):
            self.forget_ended()
            return self.calls_of(models)
        return found[::-1]

    def forget_ended(self) -> None:
        """Drop what an interrupt left."""
        self.calls = [call for call in self.calls if _are_running([call])]


FLOW = Flow()


class Watch:
    """Notes the calls of one module while they run; `lm/hooks.py` puts it on."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.users: set[Any] = set()
        self.take_off: Callable[[], None] = lambda: None
        self.ended: list[Callable[[Call, bool], None]] = []
        """Asked after each forward, with whether it ran to its end."""
        parameters = inspect.signature(type(module).forward).parameters
        # positional arguments get their names, so that either way of calling reads alike
        self._names = [name for name in parameters if name != "self"]
        self._all = frozenset(self._names)

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        call = Call.read(self.module, named, self._all)
        if FLOW.calls and FLOW.call_of(self.module) is not None:
            # the frame of one that was interrupted may have been where this one's is now
            same = [
                each for each in FLOW.calls if each.frame is not None and each.frame == call.frame
            ]
            FLOW.calls = [each for each in FLOW.calls if each not in same]
            FLOW.forget_ended()
        FLOW.calls.append(call)

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take the note away, with those that an interrupt left above it."""
        call = FLOW.call_of(self.module)
        if call is None:
            return
        del FLOW.calls[FLOW.calls.index(call) :]
        call.end(output)
        for ask in self.ended:
            ask(call, output is not None)  # of one that raised there is none


def _frame_of(module: nn.Module) -> int | None:
    """Identity of the frame in which a module is being called, from within one of its hooks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is module:
            return id(frame)
        frame = frame.f_back
    return None


def _are_running(calls: Sequence[Call]) -> bool:
    """Whether all calls are on the Python stack, above the frame that asks."""
    framed = [call for call in calls if call.frame is not None]
    wanted = {call.frame: call.module for call in framed}
    if len(wanted) < len(framed):
        return False
    frame: FrameType | None = sys._getframe(1)
    while wanted and frame is not None:
        # an ended frame's identity may have been given to another one
        if frame.f_code.co_name == "_wrapped_call_impl":
            module = wanted.pop(id(frame), None)
            if module is not None and frame.f_locals.get("self") is not module:
                return False
        frame = frame.f_back
    return not wanted


def _key(cache: Any) -> Any:
    """What identifies a cache over the calls that it is handed to."""
    while isinstance(cache, list | tuple) and cache:
        cache = cache[0]
    return cache


def _growth(cache: Any) -> Growth | None:
    try:
        return None if cache is None else _GROWTHS.get(_key(cache))
    except TypeError:  # what can't be referred to weakly
        return None


def _length(cache: Any) -> int | Tensor | None:
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
    except (AttributeError, TypeError, ValueError):  # tuples, and states without attention
        return None
    return length.clone() if isinstance(length, Tensor) else length
