"""Which edits can't be live at once: those whose result would depend on their order."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_switch_sae.edits.kinds import Edit, Positions, Steer
from hf_switch_sae.errors import EditError


def check_conflicts(edits: Sequence[Edit]) -> None:
    """EditError if two edits may set the same feature on the same token; `Steer` only adds."""
    setting = [edit for edit in edits if not isinstance(edit, Steer)]
    for index, one in enumerate(setting):
        for other in setting[:index]:
            shared = _shared(one, other)
            if shared and _may_overlap(one, other):
                raise EditError(
                    f"{shared} set by both {type(other).__name__} and {type(one).__name__} "
                    "on tokens that may be the same. Keep one of them, "
                    "or give them different rows or positions."
                )


def _shared(one: Edit, other: Edit) -> str:
    """The features that both edits set, as the beginning of a sentence; "" if there are none."""
    # a patch without features sets all of them
    if one.features is None or other.features is None:
        return "features are"
    both = sorted(set(one.features) & set(other.features))  # type: ignore[arg-type]
    return (
        ""
        if not both
        else f"feature {both[0]} is"
        if len(both) == 1
        else f"features {both[0]}, {both[1]}, ... are"
    )


def _may_overlap(one: Edit, other: Edit) -> bool:
    """Whether some token may be in the scope of both, judged without the tokens."""
    if one.rows is not None and other.rows is not None and not set(one.rows) & set(other.rows):  # type: ignore[arg-type]
        return False
    if isinstance(one.positions, str) and isinstance(other.positions, str):
        return {one.positions, other.positions} != {"prompt", "generated"}
    # positions that can be listed are compared; masks and names may overlap with anything
    here, there = _listed(one.positions), _listed(other.positions)
    if isinstance(here, range) and isinstance(there, range):
        # two steps repeat together, so one period tells
        first = max(here.start, there.start)
        last = min(here.stop, there.stop, first + math.lcm(here.step, there.step))
        return any(at in here and at in there for at in range(first, last))
    if here is not None and there is not None:
        some, others = (there, here) if isinstance(here, range) else (here, there)
        return any(at in others for at in some)
    return True


def _listed(positions: Positions) -> range | tuple[int, ...] | None:
    """The positions as a container, if they are known without the tokens."""
    if isinstance(positions, slice):
        return range(
            positions.start or 0,
            # beyond any position that a model has
            2**31 if positions.stop is None else positions.stop,
            positions.step or 1,
        )
    return positions if isinstance(positions, tuple) else None
