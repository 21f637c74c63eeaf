"""What to change in a token's features, as the user writes it, and as JSON.

Room   Edits are small frozen objects, checked when they are made. All of them read the features of
       the residual as it arrived, and their deltas add up (`deltas.py`). So edits combine, their
       order does not matter, and two that set one feature on one token contradict each other.
       Strengths have a unit: "max" (1.0 is the feature's own recorded maximum), "norm" (1.0 is the
       typical norm of the residual stream at this hookpoint) or "raw" (the LM's own units).
Beware Feature ids count over all experts. An edit may set a feature of an expert that the token is
       not routed to: its activation was 0, and decode is linear over the features of all experts.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hf_switch_sae.errors import EditError
from hf_switch_sae.features import SparseFeatures, holds_booleans

StrengthUnit = Literal["max", "norm", "raw"]
Positions: TypeAlias = (
    'Literal["all", "prompt", "generated"] | int | slice | Sequence[int]'
    " | Sequence[bool] | Sequence[Sequence[bool]] | Tensor"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Scope:
    """Which tokens an edit applies to; `Steer` says what the fields mean."""

    rows: int | Sequence[int] | None = None
    positions: Positions = "all"
    when: int | tuple[int, float] | None = None

    def __post_init__(self) -> None:
        if self.rows is not None:
            _set(self, "rows", _ints(self.rows, "rows"))
        _set(self, "positions", _checked_positions(self.positions))
        if self.when is not None:
            _set(self, "when", _checked_when(self.when))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able: the class under "edit", and every field that differs from its default."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        defaults = {f.name: f.default for f in fields(self)}
        kept = {name: value for name, value in given.items() if not _same(value, defaults[name])}
        return {
            "edit": type(self).__name__,
            **{name: _plain(value) for name, value in kept.items()},
        }

    def __eq__(self, other: object) -> bool:
        # not field by field, as tensors have no truth value when compared
        return isinstance(other, _Scope) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))


@dataclass(frozen=True, eq=False)
class _OfFeatures(_Scope):
    """An edit that names its features."""

    features: int | Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        # a feature that is named twice is edited once
        _set(self, "features", tuple(dict.fromkeys(_ints(self.features, "features"))))


@dataclass(frozen=True, eq=False)
class Steer(_OfFeatures):
    """Add each feature's decoder row, times `strength` in the given unit, to the residual.

    The SAE does not encode for it, unless `when` is given.

    Args:
        features: one id or several.
        strength: of any sign. A 0-d tensor may require grad: its gradient is the feature's
            attribution.
        unit: "max", "norm" or "raw".
        rows: batch rows as the user passed them, whatever beams or return sequences `generate`
            adds; None for all.
        positions: "all", "prompt", "generated" (what `generate` appends, or what a cache grows by
            in a loop of your own), absolute positions (an int, ints, a slice or a mask [positions]
            of booleans), which count real tokens from 0; or a mask [rows, columns] of the batch,
            padding included, such as `input_ids == token`. Padding is never edited.
        when: a feature that must be active on the token, or a pair of a feature and the activation
            that it must exceed, in raw units.

    Raises:
        EditError: a strength that is not finite, an unknown unit, a negative or malformed position.
    """

    strength: float | Tensor = 1.0
    unit: StrengthUnit = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "strength", _amount("strength", self.strength))
        _check_unit(self.unit)


@dataclass(frozen=True, eq=False)
class Scale(_OfFeatures):
    """Multiply each feature's activation by `factor`; other arguments and errors as for `Steer`."""

    factor: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "factor", _amount("factor", self.factor))


@dataclass(frozen=True, eq=False)
class Ablate(_OfFeatures):
    """Set each feature's activation to 0; arguments and errors as for `Steer`."""


@dataclass(frozen=True, eq=False)
class Clamp(_OfFeatures):
    """Set each feature's activation to `value` in the given unit; the rest as for `Steer`.

    Features that are not active on a token are set too, unless `when` asks for one of them.
    """

    value: float | Tensor = 0.0
    unit: StrengthUnit = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "value", _amount("value", self.value))
        _check_unit(self.unit)


@dataclass(frozen=True, eq=False)
class Patch(_Scope):
    """Set activations to those of another run, position by position.

    Args:
        source: features [positions, k] or [rows, positions, k] of the other run, at their own
            positions if they know them (`session.features` do), else from position 0 on. A single
            row serves all rows; tokens at positions that it does not have are not edited.
        features: the features to set; None for all. Those not active in `source` are set to 0.

    Other arguments and errors as for `Steer`.
    """

    source: SparseFeatures
    features: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.source, SparseFeatures) or len(self.source.shape) not in (1, 2):
            raise EditError(
                "Patch takes the SparseFeatures of another run, "
                "[positions, k] or [rows, positions, k]."
            )
        if self.features is not None:
            _set(self, "features", tuple(dict.fromkeys(_ints(self.features, "features"))))


Edit: TypeAlias = Steer | Scale | Ablate | Clamp | Patch
EDITS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Steer, Scale, Ablate, Clamp, Patch)}


def edit_from_dict(data: dict[str, Any]) -> Edit:
    """The edit that `to_dict` wrote.

    Raises:
        EditError: an unknown edit, or arguments that it does not have.
    """
    # a copy, as it is taken apart
    data = dict(data) if isinstance(data, Mapping) else {"edit": None, "given": data}
    name = data.pop("edit", None)
    kind = EDITS.get(str(name))
    if kind is None:
        raise EditError(
            f"an edit is one of {sorted(EDITS)}, under the key 'edit'; got {name!r} with {data}."
        )
    for name, value in data.items():
        if isinstance(value, dict):
            data[name] = _from_plain(value)
    try:
        edit: Edit = kind(**data)
    except TypeError as err:
        raise EditError(f"{kind.__name__}: {err}") from None
    return edit


def _from_plain(value: dict[str, Any]) -> slice | Tensor | SparseFeatures:
    """The value of a field that `_plain` wrote as a dict."""
    try:
        if "slice" in value:
            start, stop, step = value["slice"]
            return slice(start, stop, step)
        if "mask" in value:
            return torch.tensor(value["mask"], dtype=torch.bool, device="cpu")
        acts = torch.tensor(value["acts"], dtype=torch.float32, device="cpu")
        ids = torch.tensor(value["ids"], dtype=torch.int64, device="cpu")
        at = value.get("positions")
        places = None if at is None else torch.tensor(at, dtype=torch.int64, device="cpu")
        return SparseFeatures(acts, ids, value["num_features"], places)
    except (KeyError, TypeError, ValueError) as err:
        raise EditError(f"{value} is no slice, mask or features ({err!r}).") from None


def _set(edit: _Scope, name: str, value: Any) -> None:
    object.__setattr__(edit, name, value)  # frozen for users, not while it is built


def _ints(value: int | Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    """One integer or several as a tuple, or EditError naming the argument they were given for."""
    items: Any = list(value) if isinstance(value, Iterator) else _of_nonzero(value)
    # True is an integer to Python, but no feature or row
    if holds_booleans(items):
        raise EditError(
            f"{name} takes integers, not True and False; of a mask, give mask.nonzero(); "
            f"got {value!r}."
        )
    items = items.tolist() if isinstance(items, Tensor) else items
    with suppress(TypeError):  # not an integer, so several
        items = (operator.index(items),)
    try:
        items = tuple(items)
        # 2.0 is taken for 2, as it may come from JSON; 2.5 is left out and counted below
        ints = tuple(int(item) for item in items if int(item) == item)
    except (TypeError, ValueError):
        raise EditError(f"{name} takes an int or several; got {value!r}.") from None
    if len(ints) != len(items) or not ints:
        raise EditError(f"{name} takes an int or several; got {value!r}.")
    if max(map(abs, ints)) >= 2**63:
        raise EditError(f"{name} are counted in 64 bits; got {max(ints, key=abs)}.")
    if name in ("rows", "positions") and min(ints) < 0:
        raise EditError(f"{name} count from 0; got {min(ints)}.")
    return ints


def _of_nonzero(value: Any) -> Any:
    """The indices alone, where `mask.nonzero()` gave them: [n, 1], or numpy's tuple of one [n]."""
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == 1:
        return value[:, 0]
    is_tuple_of_one = isinstance(value, tuple) and len(value) == 1
    return value[0] if is_tuple_of_one and getattr(value[0], "ndim", 0) == 1 else value


def _checked_positions(positions: Positions) -> Positions:
    if isinstance(positions, str):
        if positions not in ("all", "prompt", "generated"):
            raise EditError(
                "positions are 'all', 'prompt', 'generated', ints, a slice or a mask; "
                f"got {positions!r}."
            )
        return positions
    if isinstance(positions, slice):
        bounds = (positions.start, positions.stop, positions.step)
        if holds_booleans(bounds) or not all(b is None or hasattr(b, "__index__") for b in bounds):
            raise EditError(f"a slice of positions has integers as bounds; got {positions}.")
        # None is a default that is fine, and a step of 0 is not
        if min(positions.start or 0, positions.stop or 0, (positions.step or 1) - 1) < 0:
            raise EditError(
                "positions are absolute and count from 0, so a slice can't count from the end; "
                f"got {positions}."
            )
        return positions
    # read once, if it can be read only once
    given: Any = list(positions) if isinstance(positions, Iterator) else positions
    if holds_booleans(given):
        mask = _mask(given)
        if mask.ndim not in (1, 2):
            raise EditError(
                f"a positions mask is [positions] or [rows, columns]; got {list(mask.shape)}."
            )
        return mask
    return _ints(given, "positions")


def _mask(value: Any) -> Tensor:
    """Booleans of any kind, however nested, as a bool tensor."""
    if isinstance(value, Tensor):
        return value
    try:
        mask = torch.as_tensor(_nested(value), device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise EditError(f"the rows of a positions mask are of one length; got {value!r}.") from None
    if mask.dtype != torch.bool:  # torch has made numbers of the booleans beside them
        raise EditError(f"positions are integers or a mask of booleans, not both; got {value!r}.")
    return mask


def _nested(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    is_flat = isinstance(value, str | bytes) or not isinstance(value, Iterable)
    return value if is_flat else [_nested(each) for each in value]


def _checked_when(when: Any) -> int | tuple[int, float]:
    # a feature, or a feature and at most one finite number
    feature, *least = when if isinstance(when, tuple | list) else (when,)
    numbers = len(least) <= 1 and all(isinstance(n, int | float) for n in least)
    numbers = numbers and not holds_booleans(least)
    if not numbers or not all(map(math.isfinite, least)):
        raise EditError(f"when is a feature, or (feature, least activation); got {when!r}.")
    (feature,) = _ints(feature, "when")
    return (feature, *least) if least else feature


def _amount(name: str, amount: Any) -> float | Tensor:
    if isinstance(amount, Tensor):
        if amount.numel() != 1:
            raise EditError(f"{name} is one number; got a tensor of shape {list(amount.shape)}.")
        if not bool(amount.isfinite()):
            raise EditError(f"{name} must be a finite number; got {amount!r}.")
        return amount
    try:
        finite = math.isfinite(amount)  # numpy's numbers too
    except TypeError:
        finite = False
    if not finite:
        raise EditError(f"{name} must be a finite number; got {amount!r}.")
    return amount if isinstance(amount, int) else float(amount)


def _check_unit(unit: str) -> None:
    if unit not in ("max", "norm", "raw"):
        raise EditError(f"unit is 'max', 'norm' or 'raw'; got {unit!r}.")


def _same(value: Any, default: Any) -> bool:
    """Whether a field has its default; a tensor never has, and 1 is not True."""
    return type(value) is type(default) and not isinstance(value, Tensor) and value == default


def _plain(value: Any) -> Any:
    """The value of a field as JSON-able."""
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, SparseFeatures):
        at = {} if value.positions is None else {"positions": value.positions.tolist()}
        return {
            "acts": value.acts.tolist(),
            "ids": value.ids.tolist(),
            "num_features": value.num_features,
            **at,
        }
    if isinstance(value, Tensor):
        # the only tensors left are masks of positions and single amounts
        return {"mask": value.tolist()} if value.dtype == torch.bool else float(value.detach())
    return list(value) if isinstance(value, tuple) else value
