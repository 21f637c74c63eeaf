"""What is attached to a model: sessions come on and go off, and are found by the model's modules.

Beware Nothing is kept on the model itself but hooks, and no list of models anywhere: a place
       (`place.py`) is found on the module that is hooked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hf_switch_sae.edits.conflicts import check_conflicts
from hf_switch_sae.edits.deltas import PreparedEdits
from hf_switch_sae.lm.calls import FLOW
from hf_switch_sae.lm.hookpoints import Hookpoint
from hf_switch_sae.lm.hooks import attached_to, forget_compiled_code
from hf_switch_sae.sessions.place import Place, note_change
from hf_switch_sae.sessions.tap import Tap, check_splices

if TYPE_CHECKING:
    from hf_switch_sae.sessions.session import Session

LOCK = threading.RLock()
"""Over all models: places come with their first session and go with the last."""


def open_session(session: Session) -> None:
    """Hook the places of a session.

    Raises:
        EditError: two splices at one place. Nothing was changed then.
    """
    # of two reconstructions neither could be the stream
    for tap in session.taps.values():
        place = _find(tap.place)
        check_splices([] if place is None else [other for _, other in place.taps], tap)
    forget_compiled_code()
    note_change()
    try:
        for tap in session.taps.values():
            (_find(tap.place) or Place(tap.place)).join(session, tap)
    except BaseException:
        close_session(session)
        raise


def close_session(session: Session) -> None:
    """Take a session off, and every hook that no other session needs."""
    with LOCK:
        note_change()
        for tap in session.taps.values():
            if (place := _find(tap.place)) is not None:
                place.leave(session)


def check_with_others(session: Session, tap: Tap, prepared: PreparedEdits) -> None:
    """Raise EditError if edits of a session contradict those of another one."""
    place = _find(tap.place)
    for other_session, other in () if place is None else place.taps:
        # sessions that never act in the same forward can't contradict each other
        together = other_session.thread is session.thread or (
            other_session.all_threads and session.all_threads
        )
        if other is not tap and other.sae is tap.sae and together:
            check_conflicts([*other.edits.edits, *prepared.edits])


@contextmanager
def without_edits() -> Iterator[None]:
    """While open, no session edits in this thread, and none records."""
    before, FLOW.muted = FLOW.muted, True
    try:
        yield
    finally:
        FLOW.muted = before


def _find(hookpoint: Hookpoint) -> Place | None:
    kept = (keeper for keeper in attached_to(hookpoint.module) if isinstance(keeper, Place))
    return next((place for place in kept if place.hookpoint.site == hookpoint.site), None)
