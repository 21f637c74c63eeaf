"""What to change in a token's features: small frozen objects, and from them the delta to add to the
residual stream.

    new residual = residual + decode(edited features) - decode(features)

The SAE's own error stays in the stream, so an edit changes what it names and nothing else. Every
edit reads the features of the residual as it arrived, and their deltas add up; so order does not
matter, and two edits that set one feature on one token contradict each other.

Strengths have a unit: "max" (1.0 is the feature's own recorded maximum), "norm" (1.0 is the typical
norm of the residual stream at this place) or "raw" (the LM's own units).

Beware Feature ids count over all experts. Setting a feature of an expert that the token is not
       routed to is allowed: its activation was 0, and decode is linear over all of them.
"""

from __future__ import annotations

import json
import math
import operator
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hf_switch_sae.errors import EditError
from hf_switch_sae.features import SparseFeatures, check_feature_ids
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.positions import Tokens

Unit = Literal["max", "norm", "raw"]
Positions: TypeAlias = (
    'Literal["all", "prompt", "generated"] | int | slice | Sequence[int] | Tensor'
)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Scope:
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
        """JSON-able: the class under "edit", and every field that is not its default."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        defaults = {f.name: f.default for f in fields(self)}
        kept = {name: value for name, value in given.items() if not _same(value, defaults[name])}
        return {
            "edit": type(self).__name__,
            **{name: _plain(value) for name, value in kept.items()},
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Scope) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))


@dataclass(frozen=True, eq=False)
class _OfFeatures(_Scope):
    features: int | Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "features", tuple(dict.fromkeys(_ints(self.features, "features"))))


@dataclass(frozen=True, eq=False)
class Steer(_OfFeatures):
    """Add each feature's decoder row, `strength` times the unit, to the residual; needs no
    encoding.

    Args:
        features: one id or several.
        strength: any sign; a 0-d tensor may require grad (its gradient is the feature's
            attribution).
        unit: "max", "norm" or "raw".
        rows: batch rows as the user gave them, beams and return sequences not counted; None: all.
        positions: "all", "prompt", "generated" (what `generate` appends), absolute positions as an
            int, ints or a
            slice, or a bool mask over positions [positions] or [rows, positions]. Padding is never
            edited.
        when: a feature that must be active on the token, or (feature, least activation in raw
            units).

    Raises:
        EditError: a strength that is not finite, an unknown unit, a negative or malformed position.
    """

    strength: float | Tensor = 1.0
    unit: Unit = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "strength", _amount("strength", self.strength))
        _check_unit(self.unit)


@dataclass(frozen=True, eq=False)
class Scale(_OfFeatures):
    """Multiply each feature's activation by `factor`; scope arguments and errors as for `Steer`."""

    factor: float | Tensor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "factor", _amount("factor", self.factor))


@dataclass(frozen=True, eq=False)
class Ablate(_OfFeatures):
    """Set each feature's activation to 0: `Scale` with factor 0; scope arguments and errors as for
    `Steer`."""


@dataclass(frozen=True, eq=False)
class Clamp(_OfFeatures):
    """Set each feature's activation to `value` times the unit, active or not; scope and errors as
    for `Steer`."""

    value: float | Tensor = 0.0
    unit: Unit = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        _set(self, "value", _amount("value", self.value))
        _check_unit(self.unit)


@dataclass(frozen=True, eq=False)
class Patch(_Scope):
    """Set activations to those of another run, position by position.

    Args:
        source: features [positions, k] or [rows, positions, k] of the other run, from position 0
            on; tokens beyond its end are left alone. One row serves all rows.
        features: which to set; None: all of them, those that are not active in `source` to 0.

    Scope arguments and errors as for `Steer`.
    """

    source: SparseFeatures
    features: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.source, SparseFeatures) or len(self.source.shape) not in (1, 2):
            raise EditError(
                "Patch takes the SparseFeatures of another run, [positions, k] or [rows, "
                "positions, k]."
            )
        if self.features is not None:
            _set(self, "features", tuple(dict.fromkeys(_ints(self.features, "features"))))


Edit: TypeAlias = Steer | Scale | Ablate | Clamp | Patch
EDITS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Steer, Scale, Ablate, Clamp, Patch)}


def edit_from_dict(data: dict[str, Any]) -> Edit:
    """The edit that `to_dict` wrote.

    Raises:
        EditError: not the name of an edit, or arguments it does not have.
    """
    data = dict(data) if isinstance(data, Mapping) else {"edit": None, "given": data}
    kind = EDITS.get(data.pop("edit", ""))
    if kind is None:
        raise EditError(f"an edit is one of {sorted(EDITS)}, under the key 'edit'; got {data}.")
    for name, value in data.items():
        if isinstance(value, dict):
            data[name] = _from_plain(value)
    try:
        edit: Edit = kind(**data)
    except TypeError as err:
        raise EditError(f"{kind.__name__}: {err}") from None
    return edit


def _from_plain(value: dict[str, Any]) -> slice | Tensor | SparseFeatures:
    """A field that `_plain` wrote as a dict."""
    try:
        if "slice" in value:
            start, stop, step = value["slice"]
            return slice(start, stop, step)
        if "mask" in value:
            return torch.tensor(value["mask"], dtype=torch.bool)
        acts = torch.tensor(value["acts"], dtype=torch.float32)
        ids = torch.tensor(value["ids"], dtype=torch.int64)
        return SparseFeatures(acts, ids, value["num_features"])
    except (KeyError, TypeError, ValueError) as err:
        raise EditError(f"{value} is no slice, mask or features ({err!r}).") from None


class PreparedEdits:
    """Edits checked against one SAE, with everything that does not depend on the tokens looked up.

    Raises:
        FeatureIdError: a feature outside the dictionary.
        EditError: a unit without its statistics, or edits that contradict each other.
    """

    def __init__(self, sae: SwitchSAE, edits: Sequence[Edit]) -> None:
        self.sae, self.edits = sae, tuple(edits)
        for edit in self.edits:
            if not isinstance(edit, tuple(EDITS.values())):
                raise EditError(f"an edit is one of {sorted(EDITS)}; got {edit!r}.")
        check_conflicts(self.edits)
        self._parts = [_Part(sae, edit) for edit in self.edits]
        self.needs_features = any(part.needs_features for part in self._parts)

    def __bool__(self) -> bool:
        return bool(self.edits)

    def delta(self, features: SparseFeatures | None, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """What to add to each token, and which tokens are edited at all.

        Args:
            features: [B, T] features of the residual as it arrived; None if no edit needs them.
            tokens: where the B x T tokens stand.

        Returns:
            delta [B, T, hidden_size] in the SAE's dtype and device, and edited [B, T] bool on the
            tokens' device.
        """
        total: Tensor | None = None
        edited = torch.zeros_like(tokens.real)
        for part in self._parts:
            where = part.where(features, tokens)
            edited = edited | where
            change = part.change(features, tokens)
            change = change * where.to(change.device)[..., None]
            total = change if total is None else total + change
        assert total is not None, "no edits"
        return total, edited


class _Part:
    """One edit, prepared."""

    def __init__(self, sae: SwitchSAE, edit: Edit) -> None:
        self.sae, self.edit = sae, edit
        wanted = edit.features if edit.features is not None else ()
        self.ids = check_feature_ids(wanted, sae.config.num_features).to(sae.device)
        self.needs_features = edit.when is not None or not isinstance(edit, Steer)
        if edit.when is not None:
            check_feature_ids(self._when()[0], sae.config.num_features)
        if isinstance(edit, Patch) and edit.source.num_features != sae.config.num_features:
            raise EditError(
                f"the patch's features are of an SAE with {edit.source.num_features} features; "
                "this one has "
                f"{sae.config.num_features}."
            )
        # Never inference tensors, even if set there: a later pass may need their gradient.
        with torch.inference_mode(False), torch.no_grad():
            self.rows = sae.decoder_rows(self.ids)
            if isinstance(edit, Steer | Clamp):
                self.sizes = _sizes(sae, self.ids, self.rows, edit.unit)

    def _when(self) -> tuple[int, float]:
        when = self.edit.when
        return when if isinstance(when, tuple) else (when, 0.0)  # type: ignore[return-value]

    def _amounts(self, amount: float | Tensor) -> Tensor:
        """[len(ids)] in the LM's own units. Anew for each pass: a tensor may be in training."""
        amount = amount.to(self.rows.device) if isinstance(amount, Tensor) else amount
        return (amount * self.sizes).to(self.rows.dtype)

    def where(self, features: SparseFeatures | None, tokens: Tokens) -> Tensor:
        """[B, T] bool: the tokens this edit applies to."""
        here = tokens.real & _positions_mask(self.edit.positions, tokens)
        if self.edit.rows is not None:
            rows = torch.as_tensor(self.edit.rows, device=tokens.row.device)
            last = int(tokens.row.max()) if tokens.row.numel() else -1
            if int(rows.max()) > last:
                raise EditError(
                    f"{type(self.edit).__name__} names row {int(rows.max())}, but this batch has "
                    f"rows 0 to {last}."
                )
            here = here & torch.isin(tokens.row, rows)[:, None]
        if self.edit.when is not None:
            assert features is not None
            feature, least = self._when()
            here = here & (features.select(feature) > least).to(here.device)
        if isinstance(self.edit, Patch):
            here = here & (tokens.position < self.edit.source.shape[-1])
        return here

    def change(self, features: SparseFeatures | None, tokens: Tokens) -> Tensor:
        """[B, T, d] or [d], before the scope is applied."""
        edit = self.edit
        if isinstance(edit, Steer):
            return (
                (self._amounts(edit.strength)[:, None] * self.rows)
                .sum(0)[None, None]
                .expand(*tokens.position.shape, -1)
            )
        assert features is not None
        if isinstance(edit, Patch):
            source = _aligned(edit.source.to(features.device, features.dtype), tokens)
            if edit.features is None:
                return self.sae.decode_delta(source) - self.sae.decode_delta(features)
            wanted = source.select(self.ids) - features.select(self.ids)
        elif isinstance(edit, Clamp):
            wanted = self._amounts(edit.value) - features.select(self.ids)
        else:
            factor = edit.factor if isinstance(edit, Scale) else 0.0
            wanted = (factor - 1) * features.select(self.ids)
        return wanted.to(self.rows.dtype) @ self.rows


def _sizes(sae: SwitchSAE, ids: Tensor, rows: Tensor, unit: Unit) -> Tensor:
    """[len(ids)] activations of strength 1, in the LM's own units."""
    if unit == "raw":
        size = torch.ones(len(ids))
    elif int(sae.statistics_tokens.item()) == 0:
        raise EditError(
            f"unit={unit!r} needs the SAE's statistics, and it has none: call "
            "sae.calibrate(batches of the residual "
            "stream), or pass unit='raw'."
        )
    elif unit == "norm":
        size = sae.residual_norm / rows.float().norm(dim=-1)
    else:
        size = sae.feature_max.to(ids.device)[ids]
        silent = ids[size == 0]
        if len(silent):
            raise EditError(
                f"feature {int(silent[0])} was never active while the statistics were measured, "
                "so it has no maximum; "
                "pass unit='norm' or unit='raw'."
            )
    return size.to(rows.device, torch.promote_types(rows.dtype, torch.float32))


def _positions_mask(positions: Positions, tokens: Tokens) -> Tensor:
    at = tokens.position
    if isinstance(positions, str):
        everywhere = torch.ones_like(tokens.prompt)
        return {"all": everywhere, "prompt": tokens.prompt, "generated": ~tokens.prompt}[positions]
    if isinstance(positions, slice):
        start, step = positions.start or 0, positions.step or 1
        inside = (at >= start) & ((at - start) % step == 0)
        return inside if positions.stop is None else inside & (at < positions.stop)
    if isinstance(positions, Tensor):
        mask = positions.to(at.device)
        mask = mask[None].expand(int(tokens.row.max()) + 1, -1) if mask.ndim == 1 else mask
        if len(mask) <= int(tokens.row.max()):
            raise EditError(
                f"the positions mask has {len(mask)} rows, but this batch has "
                f"{int(tokens.row.max()) + 1}."
            )
        inside = (at >= 0) & (at < mask.shape[1])
        return inside & mask[tokens.row[:, None], at.clamp(0, mask.shape[1] - 1)]
    return torch.isin(at, torch.as_tensor(positions, device=at.device))


def _aligned(source: SparseFeatures, tokens: Tokens) -> SparseFeatures:
    """The source's features at each token's row and position, [B, T, k]; anything beyond its
    end."""
    source = source if len(source.shape) == 2 else source.reshape(1, -1)
    rows = tokens.row if source.shape[0] > 1 else torch.zeros_like(tokens.row)
    if int(rows.max()) >= source.shape[0]:
        raise EditError(
            f"the patch has {source.shape[0]} rows, but this batch has {int(rows.max()) + 1}."
        )
    at = tokens.position.clamp(0, source.shape[1] - 1).to(source.device)
    return source[rows.to(source.device)[:, None], at]


def check_conflicts(edits: Sequence[Edit]) -> None:
    """EditError if two edits set one feature on tokens that may be the same; adding (`Steer`) never
    conflicts."""
    setting = [edit for edit in edits if not isinstance(edit, Steer)]
    for index, one in enumerate(setting):
        for other in setting[:index]:
            shared = _shared(one, other)
            if shared and _may_overlap(one, other):
                raise EditError(
                    f"{shared} set by both {type(other).__name__} and {type(one).__name__} on "
                    "tokens that may be the "
                    "same. Keep one of them, or give them different rows or positions."
                )


def _shared(one: Edit, other: Edit) -> str:
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
    if one.rows is not None and other.rows is not None and not set(one.rows) & set(other.rows):  # type: ignore[arg-type]
        return False
    if {one.positions, other.positions} == {"prompt", "generated"} if _named(one, other) else False:
        return False
    here, there = _listed(one.positions), _listed(other.positions)
    if isinstance(here, range) and isinstance(there, range):
        longer, shorter = sorted((here, there), key=len, reverse=True)
        return any(at in longer for at in shorter)
    if here is not None and there is not None:
        return (
            any(at in there for at in here)
            if not isinstance(here, range)
            else any(at in here for at in there)
        )
    return True


def _named(one: Edit, other: Edit) -> bool:
    return isinstance(one.positions, str) and isinstance(other.positions, str)


def _listed(positions: Positions) -> range | tuple[int, ...] | None:
    """The positions as a container, where that is known without the tokens."""
    if isinstance(positions, slice):
        return range(
            positions.start or 0,
            2**31 if positions.stop is None else positions.stop,
            positions.step or 1,
        )
    return positions if isinstance(positions, tuple) else None


@dataclass(frozen=True)
class Recipe:
    """Edits with the SAE they are meant for: a JSON of a few lines, published next to the SAE.

    Args:
        sae: Hub id or folder of the SAE.
        edits: in any order.
        revision: commit of the SAE's repository.
        hookpoint: the place, if it is not the SAE's own.
    """

    sae: str
    edits: tuple[Edit, ...]
    revision: str | None = None
    hookpoint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without what is not set."""
        named = {"sae": self.sae, "revision": self.revision, "hookpoint": self.hookpoint}
        return {
            **{k: v for k, v in named.items() if v is not None},
            "edits": [edit.to_dict() for edit in self.edits],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON beside `path` and rename it into place."""
        path = Path(path)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            file.write(json.dumps(self.to_dict(), indent=2) + "\n")
        Path(file.name).replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read what `save` wrote.

        Raises:
            EditError: not a recipe, or an edit that is not one.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            edits = tuple(edit_from_dict(edit) for edit in data.pop("edits"))
            return cls(edits=edits, **data)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as err:
            raise EditError(
                f"{path} is not a recipe ({err}); it needs at least 'sae' and 'edits'."
            ) from None

    def diff(self, other: Recipe) -> list[str]:
        """What tells this recipe from another, one line each: "- " only here, "+ " only there."""
        here, there = _lines(self), _lines(other)
        return [f"- {line}" for line in here if line not in there] + [
            f"+ {line}" for line in there if line not in here
        ]


def _lines(recipe: Recipe) -> list[str]:
    data = recipe.to_dict()
    edits = data.pop("edits")
    return [f"{name}: {value}" for name, value in data.items()] + [
        json.dumps(edit) for edit in edits
    ]


def _set(edit: _Scope, name: str, value: Any) -> None:
    object.__setattr__(edit, name, value)  # frozen for users, not while it is built


def _ints(value: int | Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    items: Any = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(items, bool):
        with suppress(TypeError):  # not one, so several
            items = (operator.index(items),)
    try:
        ints = tuple(int(item) for item in items if int(item) == item)
    except (TypeError, ValueError):
        raise EditError(f"{name} takes an int or several; got {value!r}.") from None
    if len(ints) != len(items) or not ints:
        raise EditError(f"{name} takes an int or several; got {value!r}.")
    if name in ("rows", "positions") and min(ints) < 0:
        raise EditError(f"{name} count from 0; got {min(ints)}.")
    return ints


def _checked_positions(positions: Positions) -> Positions:
    if isinstance(positions, str):
        if positions not in ("all", "prompt", "generated"):
            raise EditError(
                "positions are 'all', 'prompt', 'generated', ints, a slice or a mask; got "
                f"{positions!r}."
            )
        return positions
    if isinstance(positions, slice):
        if min(positions.start or 0, positions.stop or 0, (positions.step or 1) - 1) < 0:
            raise EditError(
                "positions are absolute and count from 0, so a slice can't count from the end; "
                f"got {positions}."
            )
        return positions
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.ndim not in (1, 2):
            raise EditError(
                "a positions mask is [positions] or [rows, positions]; got "
                f"{list(positions.shape)}."
            )
        return positions
    return _ints(positions, "positions")


def _checked_when(when: Any) -> int | tuple[int, float]:
    feature, *least = when if isinstance(when, tuple | list) else (when,)
    numbers = len(least) <= 1 and all(isinstance(n, int | float) for n in least)
    if not numbers or not all(map(math.isfinite, least)):
        raise EditError(f"when is a feature, or (feature, least activation); got {when!r}.")
    (feature,) = _ints(feature, "when")
    return (feature, *least) if least else feature


def _amount(name: str, amount: Any) -> float | Tensor:
    if isinstance(amount, Tensor):
        if amount.numel() != 1:
            raise EditError(f"{name} is one number; got a tensor of shape {list(amount.shape)}.")
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
    return type(value) is type(default) and not isinstance(value, Tensor) and value == default


def _plain(value: Any) -> Any:
    """A field as JSON has it."""
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, SparseFeatures):
        return {
            "acts": value.acts.tolist(),
            "ids": value.ids.tolist(),
            "num_features": value.num_features,
        }
    if isinstance(value, Tensor):
        return {"mask": value.tolist()} if value.dtype == torch.bool else float(value.detach())
    return list(value) if isinstance(value, tuple) else value
