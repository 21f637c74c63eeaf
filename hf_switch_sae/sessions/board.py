"""All that is attached to one model, kept on the model itself.

One hook a place, shared by all sessions: each tap sees the residual stream as it arrived, and what
the taps want added is added once. So the order in which sessions were opened does not matter.
Beside the places, the module that owns the blocks gets a hook that notes its arguments (for
positions), and `generate` of this one model object is shadowed by a function that notes what it was
given. All of them go with the last session.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from hf_switch_sae.edits.conflicts import check_conflicts
from hf_switch_sae.edits.deltas import PreparedEdits
from hf_switch_sae.errors import AttachError, HookpointError
from hf_switch_sae.lm.config import is_encoder_decoder, is_sequence_first
from hf_switch_sae.lm.hookpoints import Hookpoint
from hf_switch_sae.lm.hooks import forget_compiled_code, hook_place, untraced
from hf_switch_sae.lm.positions import Call, Tokens
from hf_switch_sae.lm.streams import Layout
from hf_switch_sae.sessions.calls import Flow, generation_of, note_calls
from hf_switch_sae.sessions.tap import Tap, check_splices

if TYPE_CHECKING:
    from hf_switch_sae.sessions.session import Session

ATTRIBUTE = "_hf_switch_sae_board"
"""Where the model keeps it."""
LOCK = threading.RLock()
"""Over all models: a board comes with its first session and goes with the last."""


class Board:
    """All that is attached to one model: places, sessions, and each thread's call under way."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.sessions: tuple[Session, ...] = ()  # replaced whole: other threads may be reading it
        self.flow = Flow()
        self._places: dict[tuple[int, str], Place] = {}
        self._owners: dict[int, Callable[[], None]] = {}
        self._generate: Any = None

    def __reduce__(self) -> NoReturn:
        raise AttachError(
            "an SAE is attached to this model, and its hooks can't go with a copy: detach it "
            "before you copy or pickle the model."
        )

    @classmethod
    def of(cls, root: nn.Module) -> Board | None:
        """The board of an unwrapped model; None while nothing is attached to it."""
        return root.__dict__.get(ATTRIBUTE)

    def open(self, session: Session) -> None:
        """Hook the places of a session, and note it.

        Raises:
            EditError: two splices at one place. Nothing was changed then.
        """
        # of two reconstructions neither could be the stream
        for tap in session.taps.values():
            check_splices([other for _, other in self.taps_at(tap.place)], tap)
        forget_compiled_code()
        try:
            setattr(self.root, ATTRIBUTE, self)
            self._watch_generate()
            for tap in session.taps.values():
                self._watch_place(tap.place)
            self.sessions = (*self.sessions, session)
        except BaseException:
            self._release()
            raise

    def close(self, session: Session) -> None:
        """Take a session off, and every hook that no other session needs."""
        with LOCK:
            self.sessions = tuple(other for other in self.sessions if other is not session)
            self._release()

    def check_with_others(self, session: Session, tap: Tap, prepared: PreparedEdits) -> None:
        """Raise EditError if edits of a session contradict those of another one."""
        for other_session, other in self.taps_at(tap.place):
            # sessions that never act in the same forward can't contradict each other
            together = other_session.thread is session.thread or (
                other_session.all_threads and session.all_threads
            )
            if other is not tap and other.sae is tap.sae and together:
                check_conflicts([*other.edits.edits, *prepared.edits])

    @contextmanager
    def without_edits(self) -> Iterator[None]:
        """While open, no session edits in this thread, and none records."""
        self.flow.read_only = True
        try:
            yield
        finally:
            self.flow.read_only = False

    def _release(self) -> None:
        """Remove every hook that no session needs any more."""
        used = {_key(tap.place) for session in self.sessions for tap in session.taps.values()}
        for key in [key for key in self._places if key not in used]:
            self._places.pop(key).handle.remove()
        # a place that stays must not keep a closed session alive
        for place in self._places.values():
            place.forget()
        owners = {
            id(owner) for place in self._places.values() for owner in self._owners_of(place.place)
        }
        for owner in [owner for owner in self._owners if owner not in owners]:
            self._owners.pop(owner)()
        if not self.sessions:
            self._unwatch_generate()
            self.root.__dict__.pop(ATTRIBUTE, None)

    def _watch_place(self, place: Hookpoint) -> None:
        if _key(place) not in self._places:
            self._places[_key(place)] = Place(self, place)
        for owner in self._owners_of(place):
            if id(owner) not in self._owners:
                self._owners[id(owner)] = note_calls(owner, self.flow, owner is self.root)

    def _owners_of(self, place: Hookpoint) -> list[nn.Module]:
        owner = self.root if place.blocks is None else place.blocks.owner
        return [self.root] if owner is self.root else [self.root, owner]

    def _watch_generate(self) -> None:
        generate = getattr(self.root, "generate", None)
        if self._generate is not None or not callable(generate):
            return
        flow = self.flow

        @functools.wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if flow.generation is not None:  # a draft within the user's call, which is known
                return generate(*args, **kwargs)
            self._check_recording(args, kwargs)
            flow.generation = generation_of(self.root, args, kwargs)
            try:
                return generate(*args, **kwargs)
            finally:
                flow.generation = None

        self._generate = (watched, self.root.__dict__.get("generate"))
        self.root.__dict__["generate"] = watched

    def _check_recording(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise AttachError for beams while a session records: rows would swap their texts."""
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        config = given or getattr(self.root, "generation_config", None)
        beams = kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
        taps = [tap for session in self.sessions for tap in session.taps.values()]
        if beams > 1 and any(tap.recorder is not None for tap in taps):
            raise AttachError(
                f"generate with num_beams={beams} can't be recorded, as beams move from row to "
                "row: generate first, then record a plain forward of the texts."
            )

    def _unwatch_generate(self) -> None:
        if self._generate is None:
            return
        watched, before = self._generate
        # somebody else may have shadowed it since; theirs stays
        if self.root.__dict__.get("generate") is watched:
            del self.root.__dict__["generate"]
            if before is not None:
                self.root.__dict__["generate"] = before
        self._generate = None

    def taps_at(self, place: Hookpoint) -> list[tuple[Session, Tap]]:
        """Taps of all sessions at a place."""
        taps = ((session, tap) for session in self.sessions for tap in session.taps.values())
        return [(session, tap) for session, tap in taps if _key(tap.place) == _key(place)]


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


class Place:
    """The one hook at a place.

    It runs at every token, when the model's pass has emptied the CPU's caches. So what does not
    change from call to call is looked up once.
    """

    def __init__(self, board: Board, place: Hookpoint) -> None:
        self.place = place
        self._board, self._flow = board, board.flow
        root, blocks = board.root, place.blocks
        owner: Any = root if blocks is None else blocks.owner
        self._decoding = blocks is None or blocks.decoding
        self._of_text = blocks is not None and blocks.decoding
        self._sequence_first = is_sequence_first(owner)
        self._owner, self._root = id(owner), id(root)
        self._is_pair = is_encoder_decoder(root)
        self._known: tuple[tuple[Session, ...], threading.Thread, list[Tap]] | None = None
        # untraced: which taps there are, and what they change, may differ at every call
        self.handle = hook_place(place, untraced(self.pass_by))

    def pass_by(self, stream: Tensor) -> Tensor | None:
        """Show a stream to the taps here. Returns the new stream; None if nobody changes it."""
        taps = self._acting()
        if not taps:
            return None
        if not stream.is_floating_point():
            raise HookpointError(
                f"what {self.place.path} returns is {stream.dtype}, not a residual stream."
            )
        layout = Layout(stream, taps[0].width, self._sequence_first, self._of_text)
        x, flow = layout.rows, self._flow
        call = self._call() if layout.has_rows else None
        generation = None if call is None else flow.generation
        tokens = Tokens(x, call, generation, self._decoding, layout.lanes)
        # every tap sees the stream as it arrived, so sessions don't see each other's edits
        changes = [tap.pass_by(x, tokens, flow.read_only) for tap in taps]
        if not flow.read_only:
            for tap in taps:
                tap.record_last(None if call is None else call.token_ids)
        wanted = [change for change in changes if change is not None]
        return layout.restore(_changed(x, wanted)) if wanted else None

    def forget(self) -> None:
        """Hold on to no session that may have been closed."""
        self._known = None

    def _acting(self) -> list[Tap]:
        """Taps of the sessions that act in this thread."""
        sessions, thread = self._board.sessions, threading.current_thread()
        known = self._known
        if known is not None and known[0] is sessions and known[1] is thread:
            return known[2]
        # a thread's own sessions hide those that act in all threads
        own = tuple(session for session in sessions if session.thread is thread)
        acting = own or tuple(session for session in sessions if session.all_threads)
        here = _key(self.place)
        taps = [t for session in acting for t in session.taps.values() if _key(t.place) == here]
        self._known = sessions, thread, taps
        return taps

    def _call(self) -> Call | None:
        """The call of the blocks' owner, with the whole model's mask if its own is not 2-D."""
        calls = self._flow.calls
        call, outer = calls.get(self._owner), calls.get(self._root)
        if call is None or outer is None or not self._decoding:
            return call
        if call.token_ids is None:  # a multimodal model embeds them before its text model runs
            call = replace(call, token_ids=outer.token_ids)
        mask = outer.decoder_mask if self._is_pair else outer.mask
        if (
            isinstance(mask, Tensor)
            and mask.ndim == 2
            and not (isinstance(call.mask, Tensor) and call.mask.ndim == 2)
        ):
            return replace(call, mask=mask)
        return call


def _key(place: Hookpoint) -> tuple[int, str]:
    return id(place.module), place.site
