"""One place of a model with everything that is attached there: its hook, and what it knows.

Room   One hook a place, shared by all sessions: each tap sees the residual stream as it arrived,
       and what the taps want added is added once. So the order in which sessions were opened does
       not matter, nor whether it was through the model or through a part of it.
       The models around a place are watched for what they are called with (`lm/calls.py`); from
       that `lm/positions.py` tells whose each token is.
Beware A checkpointed part of a forward runs again in backward: it is edited as it was the first
       time, and is neither shown nor recorded twice.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_switch_sae.edits.deltas import PreparedEdits
from hf_switch_sae.errors import EditError, HookpointError
from hf_switch_sae.lm.calls import FLOW, Call, Watch
from hf_switch_sae.lm.config import NO_FACTS, stream_facts
from hf_switch_sae.lm.generation import is_drafting, run_under_way
from hf_switch_sae.lm.hookpoints import Hookpoint, stacks_of
from hf_switch_sae.lm.hooks import attached_to, keep_hook, watch_calls
from hf_switch_sae.lm.positions import Tokens
from hf_switch_sae.lm.recomputation import FirstRuns, in_backward, repeats
from hf_switch_sae.lm.streams import Layout
from hf_switch_sae.sessions.tap import Tap

if TYPE_CHECKING:
    from hf_switch_sae.sessions.session import Session

_VERSION = [0]
"""Counts every session that opens or closes: which of them act may have changed."""
_ROUTERS = {"gate", "router"}
"""What the modules are called that send tokens to experts."""


def note_change() -> None:
    """A session opens or closes."""
    _VERSION[0] += 1


def places_of(root: nn.Module) -> list[Place]:
    """Every place at which something is attached, in a model or a part of one."""
    found = (keeper for module in root.modules() for keeper in attached_to(module))
    return [keeper for keeper in found if isinstance(keeper, Place)]


def sessions_of(root: nn.Module) -> list[Session]:
    """Every session with an SAE in a model or a part of one, in the order they were opened."""
    found = {session.number: session for p in places_of(root) for session, _ in p.taps}
    return [found[number] for number in sorted(found)]


def models_around(root: nn.Module, place: Hookpoint) -> tuple[nn.Module, ...]:
    """The models of transformers from a root to a place, outermost first; or else the root."""
    module, found = root, [root]
    for name in place.path.split(".") if place.path else ():
        module = module._modules[name]  # type: ignore[assignment]
        found.append(module)
    blocks = [] if place.blocks is None else [id(block) for block in place.blocks.blocks]
    inside = next((at for at, module in enumerate(found) if id(module) in blocks), len(found))
    models = [
        module
        for at, module in enumerate(found)
        # a block may be given the ids too, and is no model
        if isinstance(module, PreTrainedModel) or (at < inside and _reads_text(module))
    ]
    return tuple(models) or (root,)


def _reads_text(module: nn.Module) -> bool:
    """Whether a module is called as a model is, such as an encoder that `generate` runs alone."""
    return "input_ids" in inspect.signature(type(module).forward).parameters


@dataclass(frozen=True)
class _FirstRun:
    """How a stream was edited when it first came by, for when it is computed again."""

    tokens: Tokens | None = None
    expected: tuple[int | None, int] = (None, 0)
    edits: tuple[tuple[Tap, PreparedEdits], ...] = ()
    is_known: bool = True
    """False if it is one of two runs that can't be told apart."""

    def or_other(self, other: _FirstRun) -> _FirstRun:
        """What two runs over the same tensors have in common: that neither was edited."""
        return _FirstRun(is_known=not (self.edits or other.edits) and self.is_known)


class Place:
    """The one hook at a place.

    It runs at every token, when the model's pass has emptied the CPU's caches. So what does not
    change from call to call is looked up once.
    """

    def __init__(self, hookpoint: Hookpoint) -> None:
        self.hookpoint = hookpoint
        self.taps: tuple[tuple[Session, Tap], ...] = ()  # replaced whole: other threads may read it
        self._models: tuple[nn.Module, ...] = ()
        self._facts = NO_FACTS
        self._is_only_stack = False
        self._watches: dict[int, Watch] = {}
        self._first_runs: FirstRuns[_FirstRun] = FirstRuns(_FirstRun.or_other)
        self._known: tuple[int, threading.Thread, list[Tap], bool] | None = None
        blocks = hookpoint.blocks
        self._decoding = blocks is None or blocks.decoding
        self._of_text = blocks is not None and blocks.decoding
        inner = hookpoint.path.removeprefix(blocks.paths[hookpoint.layer or 0]) if blocks else ""
        # experts in a list get some of the tokens, in an order of their own, or none
        self._in_list = any(part.isdigit() for part in inner.split("."))
        self._may_permute = _may_permute(hookpoint, inner)
        here = blocks is not None and hookpoint.module not in blocks.blocks
        self._block = blocks.blocks[hookpoint.layer or 0] if blocks and here else None
        parameters = inspect.signature(type(hookpoint.module).forward).parameters
        self._parameters = [name for name in parameters if name != "self"]
        self._take_off = keep_hook(hookpoint, self.pass_by, self)

    def join(self, session: Session, tap: Tap) -> None:
        """Show the stream to a session's tap too."""
        self.taps = (*self.taps, (session, tap))
        self._know_models()

    def leave(self, session: Session) -> None:
        """Show it to a session no longer, and go with the last."""
        left = [tap for other, tap in self.taps if other is session]
        waiting = [run for run in self._first_runs.waiting() if run.edits]
        if any(tap in left for run in waiting for tap, _ in run.edits):
            warnings.warn(
                f"backward has not run yet for a forward that was edited at {self.hookpoint.name}, "
                "and gradient checkpointing computes parts of it again then: without this session "
                "they would not be edited. Call backward before you detach.",
                stacklevel=4,
            )
        self.taps = tuple(pair for pair in self.taps if pair[0] is not session)
        self._known = None  # nor keep it alive
        if not self.taps:
            self._take_off()
        self._know_models()

    def _know_models(self) -> None:
        """Watch the models around this place, as far out as any session knows them."""
        chains = [models_around(tap.root, tap.place) for _, tap in self.taps]
        self._models = max(chains, key=len, default=())
        wanted = [*self._models, *([self._block] if self._block is not None and chains else [])]
        for module in wanted:
            if id(module) not in self._watches:
                watch = next((w for w in attached_to(module) if isinstance(w, Watch)), None)
                watch = watch or watch_calls(module)
                watch.users.add(self)
                self._watches[id(module)] = watch
        for key in [key for key in self._watches if all(id(m) != key for m in wanted)]:
            watch = self._watches.pop(key)
            watch.users.discard(self)
            if not watch.users:
                watch.take_off()
        for watch in self._watches.values():
            # innermost first, as it is the one that should have run the blocks
            users = list(watch.users)
            watch.ended = [user.check_passed for user in users if user.owner is watch.module]
            outer = [user for user in users if user._models[:1] == (watch.module,)]
            watch.ended += [user.forget_older for user in outer]
        self._facts = stream_facts(self._models)
        owner = self.owner
        stacks = [] if owner is None else stacks_of(self.taps[0][1].root, owner)
        self._is_only_stack = len(stacks) == 1
        if self.hookpoint.blocks is None:
            # a norm or a whole model beside the blocks belongs to the same sequence as they do
            self._decoding = not stacks or any(blocks.decoding for blocks in stacks)

    @property
    def owner(self) -> nn.Module | None:
        """The innermost model around this place: its forward runs the blocks."""
        return self._models[-1] if self._models else None

    def pass_by(
        self, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Show a stream to the taps here. Returns the new stream; None if nobody changes it."""
        again = in_backward()
        repeated = self._first_runs.find() if again else None
        taps = [tap for tap, _ in repeated.edits] if repeated else self._acting()
        calls = self._calls()
        for call in calls:
            call.passed.add(id(self))
        if not taps:
            if repeated is None:
                self._warn_if_nobody_acts()
            if repeated is None or repeated.is_known:
                if self._may_repeat(calls):  # in place of an older run over the same tensors
                    self._first_runs.keep(_FirstRun())
                return None
        if not stream.is_floating_point():
            raise HookpointError(
                f"what {self.hookpoint.path} returns is {stream.dtype}, not a residual stream."
            )
        has_edits = not FLOW.muted and any(tap.edits or tap.splice for tap in taps)
        if repeated is not None and repeated.tokens is not None:
            return self._repeat(stream, repeated, calls)
        if (repeated is not None and not repeated.is_known) or (
            again and has_edits and (not calls or repeats())
        ):
            raise EditError(
                f"backward computes {self.hookpoint.name} a second time, and which forward that "
                "belongs to can't be told: turn gradient checkpointing off, or take the edits off."
            )
        expected = self._expected(calls)
        layout = self._layout(stream, expected, taps[0].width)
        x = layout.rows
        tokens = self._tokens(x, layout, calls, args, kwargs)
        muted = FLOW.muted
        # read once, as another thread may set new ones meanwhile
        live = [(tap, None if muted else tap.edits) for tap in taps]
        # every tap sees the stream as it arrived, so sessions don't see each other's edits
        changes = []
        for tap, edits in live:
            change, passed = tap.change(x, tokens, edits)
            if change is not None and edits is not None:
                changes.append((tap, edits, change))
            if not again:
                tap.note(passed)
        for tap in taps if not (again or muted) else ():
            tap.record_last(_token_ids(calls, self._decoding))
        first, is_kept = _FirstRun(tokens, expected), False
        if not again and self._may_repeat(calls):
            first = replace(first, edits=tuple((tap, edits) for tap, edits, _ in changes))
            is_kept = self._first_runs.keep(first)
        if not changes:
            return None
        new = layout.restore(_changed(x, [change for *_, change in changes]))
        if is_kept and new.requires_grad:
            new.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self._first_runs.note_backward(first)
            )
        return new

    def _repeat(self, stream: Tensor, first: _FirstRun, calls: list[Call]) -> Tensor | None:
        """Edit a stream that is computed again as it was the first time."""
        layout = self._layout(stream, first.expected, first.edits[0][0].width)
        assert first.tokens is not None
        changes = [tap.change(layout.rows, first.tokens, edits)[0] for tap, edits in first.edits]
        self._first_runs.keep(first)  # a region within may run a third time
        wanted = [change for change in changes if change is not None]
        return layout.restore(_changed(layout.rows, wanted)) if wanted else None

    def _may_repeat(self, calls: list[Call]) -> bool:
        """Whether backward may compute a stream again."""
        # reentrant checkpoint turns gradients off for the first run
        trains = torch.is_grad_enabled() or self.hookpoint.module.training
        return trains or (bool(calls) and calls[-1].differentiable)

    def check_passed(self, call: Call, has_ended: bool) -> None:
        """After a forward of the owner: it must have come by, or its edits did nothing."""
        if id(self) in call.passed or self._in_list:
            return
        taps = self._acting()
        for tap in taps:
            tap.last = None  # not that of an older forward
        # a part that reads images or sound need not run for every step of text
        expected = (self._of_text or self._is_only_stack) and not FLOW.muted
        expected = expected and has_ended and self.hookpoint.blocks is not None
        if expected and any(tap.edits or tap.splice for tap in taps) and not is_drafting():
            raise HookpointError(
                f"the forward of {type(call.module).__name__} ended and did not call "
                f"{self.hookpoint.path}, so the edits at {self.hookpoint.name} did nothing: the "
                "layer was dropped, or something runs it in another way. Put the model in eval "
                "mode, or attach to a module that is called."
            )

    def forget_older(self, call: Call, _: bool) -> None:
        """After a forward of the whole model: what did not come by in it is not to be shown."""
        if id(self) not in call.passed and not self._in_list and run_under_way([call]) is None:
            for tap in self._acting():
                tap.last = None

    def _acting(self) -> list[Tap]:
        """Taps of the sessions that act in this thread."""
        version, thread, known = _VERSION[0], threading.current_thread(), self._known
        if known is not None and known[0] == version and known[1] is thread:
            return known[2]
        # a thread's own sessions hide those that act in all threads
        own = [tap for session, tap in self.taps if session.thread is thread]
        has_own = bool(own) or any(
            session.thread is thread for model in self._models[:1] for session in sessions_of(model)
        )
        taps = own if has_own else [tap for session, tap in self.taps if session.all_threads]
        self._known = version, thread, taps, has_own
        return taps

    def _warn_if_nobody_acts(self) -> None:
        # a thread with sessions of its own is not meant to be edited by others
        if FLOW.muted or (self._known and self._known[3]):
            return
        for session, tap in self.taps:
            if (tap.edits or tap.splice) and not session.has_warned:
                session.has_warned = True
                warnings.warn(
                    f"a forward in thread {threading.current_thread().name!r} passed by the edits "
                    f"at {self.hookpoint.name}, which act in thread {session.thread.name!r} alone: "
                    "it is not edited. Attach with all_threads=True, or in the thread that runs "
                    "the model.",
                    stacklevel=2,
                )

    def _calls(self) -> list[Call]:
        """What the models around are being called with, outermost first; none if not the owner."""
        return FLOW.calls_of(self._models)

    def _expected(self, calls: list[Call]) -> tuple[int | None, int]:
        """(rows, columns) of the call that owns the blocks; None and 0 where it does not tell."""
        owner = calls[-1] if calls else None
        # the decoder's arguments of a pair say nothing of its encoder's
        length = 0 if owner is None or (owner.is_pair and not self._decoding) else owner.length
        batch = (
            None if owner is None or owner.batch is None else owner.batch // self._facts.codebooks
        )
        return batch, length

    def _layout(self, stream: Tensor, expected: tuple[int | None, int], width: int) -> Layout:
        if (self._in_list or self._may_permute) and stream.ndim == 2:
            expected = None, 0
        return Layout(stream, width, self._of_text, expected, self._facts)

    def _tokens(
        self,
        x: Tensor,
        layout: Layout,
        calls: list[Call],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tokens:
        unknown = layout.unknown
        given = calls[-1].batch if calls else None
        if self._may_permute or (self._in_list and tuple(x.shape[:2]) != self._expected(calls)):
            unknown = f"{self.hookpoint.path} may get some of the tokens, in another order"
        elif given is not None and len(x) not in (given, given // self._facts.codebooks):
            unknown = unknown or f"the stream has {len(x)} rows, the model was given {given}"

        if self._block is None:
            named = dict(zip(self._parameters, args, strict=False))
            mask = kwargs.get("attention_mask", named.get("attention_mask"))
        else:
            call = FLOW.call_of(self._block)
            mask = None if call is None else call.mask
        facts, lanes = self._facts, layout.lanes
        return Tokens(x, calls, self._decoding, facts, lanes, mask, unknown)


def _changed(x: Tensor, changes: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The stream with all changes added. Tokens that none of them edits stay bit for bit."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    deltas = [delta.to(x.device, dtype) for delta, _ in changes]
    total = deltas[0]
    for delta in deltas[1:]:  # summed before the stream is added, so that their order is no matter
        total = total + delta
    new, edited = (x + total).to(x.dtype), None
    for _, where in changes:
        if where is None:
            return new
        edited = where if edited is None else edited | where
    assert edited is not None
    return torch.where(edited[..., None], new, x)


def _token_ids(calls: list[Call], decoding: bool) -> Tensor | None:
    """Of the innermost model that was given any: some embed them for the text model inside."""
    for call in reversed(calls) if decoding else calls[-1:]:
        if call.token_ids is not None:
            return call.token_ids
    return None


def _may_permute(hookpoint: Hookpoint, inner: str) -> bool:
    """Whether a module in a block may get tokens in an order of its own, as experts do."""
    if hookpoint.blocks is None or not inner:
        return False
    module, names = hookpoint.blocks.blocks[hookpoint.layer or 0], inner.strip(".").split(".")
    for at, name in enumerate(names):
        routes = not _ROUTERS.isdisjoint(module._modules)
        whole = name in _ROUTERS or name == "experts" or "shared" in name
        if (routes and not whole) or (
            "expert" in name and "shared" not in name and names[at + 1 :]
        ):
            return True
        module = module._modules[name]  # type: ignore[assignment]
    return False
