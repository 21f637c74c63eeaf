"""From edits and a token's features to the delta that is added to its residual.

Room   new residual = residual + decode(edited features) - decode(features)
       The SAE's own error stays in the stream, so an edit changes what it names and nothing else.
Beware Decoder rows and calibrated amounts are looked up once, when the edits are prepared: if the
       SAE is trained further, its edits must be set again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_switch_sae.edits.conflicts import check_conflicts
from hf_switch_sae.edits.kinds import (
    EDITS,
    Clamp,
    Edit,
    Patch,
    Positions,
    Scale,
    Steer,
    StrengthUnit,
)
from hf_switch_sae.errors import EditError
from hf_switch_sae.features import SparseFeatures, check_feature_ids
from hf_switch_sae.lm.positions import Tokens
from hf_switch_sae.sae.model import SwitchSAE


class PreparedEdits:
    """Edits checked against one SAE; what does not depend on the tokens is already looked up.

    Raises:
        FeatureIdError: a feature outside the dictionary.
        EditError: a unit without its statistics, or edits that contradict each other.
    """

    def __init__(self, sae: SwitchSAE, edits: Sequence[Edit]) -> None:
        self.sae, self.edits = sae, tuple(edits)
        for edit in self.edits:
            if isinstance(edit, list | tuple):
                raise EditError("edits are given one by one: session.edit(*edits), not a list.")
            if not isinstance(edit, tuple(EDITS.values())):
                raise EditError(f"an edit is one of {sorted(EDITS)}; got {edit!r}.")
        check_conflicts(self.edits)
        self._prepared = [_PreparedEdit(sae, edit) for edit in self.edits]
        self.needs_features = any(each.needs_features for each in self._prepared)

    def __bool__(self) -> bool:
        return bool(self.edits)

    def delta(
        self, features: SparseFeatures | None, tokens: Tokens
    ) -> tuple[Tensor, Tensor | None]:
        """What to add to each token, and which tokens are edited at all.

        Args:
            features: of the residual as it arrived, tokens [B, T]; None if no edit needs them.
            tokens: where the B x T tokens stand.

        Returns:
            delta [B, T, hidden_size], or a shape that broadcasts to it, in the SAE's dtype and on
            its device; edited [B, T] bool on the tokens' device, or None if all are.
        """
        total: Tensor | None = None
        edited: Tensor | None = None
        everywhere = False
        for each in self._prepared:
            where = each.where(features, tokens)
            change = each.change(features, tokens)
            if where is None:
                everywhere = True
            else:
                edited = where if edited is None else edited | where
                # nothing is added to tokens out of scope
                change = change * where.to(change.device)[..., None]
            total = change if total is None else total + change
        assert total is not None, "no edits"
        return total, None if everywhere else edited


class _PreparedEdit:
    """One edit, with the decoder rows of its features and its amounts as numbers."""

    def __init__(self, sae: SwitchSAE, edit: Edit) -> None:
        self.sae, self.edit = sae, edit
        wanted = edit.features if edit.features is not None else ()
        self.ids = check_feature_ids(wanted, sae.config.num_features).to(sae.device)
        self._ids = tuple(self.ids.tolist())
        self.needs_features = edit.when is not None or not isinstance(edit, Steer)
        if edit.when is not None:
            check_feature_ids(self._when()[0], sae.config.num_features)
        if isinstance(edit, Patch) and edit.source.num_features != sae.config.num_features:
            raise EditError(
                f"the patch's features are of an SAE with {edit.source.num_features} features; "
                f"this one has {sae.config.num_features}."
            )
        # Not as inference tensors, even if the edit is set in inference mode: a later pass may need
        # their gradient.
        with torch.inference_mode(False), torch.no_grad():
            self.rows = sae.decoder_rows(self.ids)
            if isinstance(edit, Steer | Clamp):
                self.sizes = _sizes(sae, self.ids, self.rows, edit.unit)
            # a number is known now; a tensor may be trained, so it is read at each pass
            self._along = self._value = None
            if isinstance(edit, Steer) and not isinstance(edit.strength, Tensor):
                self._along = self._steered(edit.strength)
            if isinstance(edit, Clamp) and not isinstance(edit.value, Tensor):
                self._value = self._amounts(edit.value)

    def _when(self) -> tuple[int, float]:
        """The feature of `when`, and the activation that it must exceed."""
        when = self.edit.when
        return when if isinstance(when, tuple) else (when, 0.0)  # type: ignore[return-value]

    def _amounts(self, amount: float | Tensor) -> Tensor:
        """The amount for each feature, [len(ids)], in the LM's own units."""
        amount = amount.to(self.rows.device) if isinstance(amount, Tensor) else amount
        return (amount * self.sizes).to(self.rows.dtype)

    def where(self, features: SparseFeatures | None, tokens: Tokens) -> Tensor | None:
        """The tokens this edit applies to, [B, T] bool; None for all of them."""
        # padding is never edited
        edit, here = self.edit, None if tokens.all_real else tokens.real
        if (inside := _at_positions(edit.positions, tokens)) is not None:
            here = _both(here, inside)
        if edit.rows is not None:
            rows = torch.as_tensor(edit.rows, device=tokens.row.device)
            count, last = tokens.num_rows, int(rows.max())
            if count is not None and last >= count:  # a mistake, not an edit of nothing
                raise EditError(
                    f"{type(edit).__name__} names row {last}, but this batch has "
                    f"rows 0 to {count - 1}."
                )
            here = _both(here, torch.isin(tokens.row, rows))
        if edit.when is not None:
            assert features is not None
            feature, least = self._when()
            active = features.select(feature) > least
            here = _both(here, active if here is None else active.to(here.device))
        if isinstance(edit, Patch):
            here = _both(here, _aligned(edit.source, tokens) >= 0)
        return here

    def change(self, features: SparseFeatures | None, tokens: Tokens) -> Tensor:
        """What the edit adds if it applies, [B, T, d], or [1, 1, d] if that is the same for all."""
        edit = self.edit
        if isinstance(edit, Steer):
            return self._along if self._along is not None else self._steered(edit.strength)
        assert features is not None
        if isinstance(edit, Patch):
            # tokens that the source does not have get its first; `where` leaves them out
            at = _aligned(edit.source, tokens).clamp(min=0)
            source = edit.source.reshape(-1)[at.to(edit.source.device)]
            source = source.to(features.device, features.dtype)
            if edit.features is None:
                return self.sae.decode_delta(source) - self.sae.decode_delta(features)
            # the change of each activation, times the decoder rows
            wanted = source.select(self._ids) - features.select(self._ids)
        elif isinstance(edit, Clamp):
            value = self._value if self._value is not None else self._amounts(edit.value)
            wanted = value - features.select(self._ids)
        else:
            factor = edit.factor if isinstance(edit, Scale) else 0.0
            factor = factor.to(features.device) if isinstance(factor, Tensor) else factor
            wanted = (factor - 1) * features.select(self._ids)
        return wanted.to(self.rows.dtype) @ self.rows

    def _steered(self, strength: float | Tensor) -> Tensor:
        """The sum of the decoder rows, each times its amount, [1, 1, d]."""
        return (self._amounts(strength)[None, :, None] * self.rows).sum(1, keepdim=True)


def _both(some: Tensor | None, others: Tensor) -> Tensor:
    """The tokens in both masks; None is all tokens."""
    return others if some is None else some & others


def _sizes(sae: SwitchSAE, ids: Tensor, rows: Tensor, unit: StrengthUnit) -> Tensor:
    """The activation of each feature at strength 1, [len(ids)], in the LM's own units."""
    # how large an activation 1.0 stands for
    if unit == "raw":
        size = torch.ones(len(ids), dtype=torch.float32, device="cpu")
    elif int(sae.statistics_tokens.item()) == 0:
        raise EditError(
            f"unit={unit!r} needs the SAE's statistics, and it has none: call "
            "sae.calibrate(batches of the residual stream), or pass unit='raw'."
        )
    elif unit == "norm":
        size = sae.residual_norm / rows.float().norm(dim=-1)
    else:
        size = sae.feature_max.to(ids.device)[ids]
        silent = ids[size == 0]
        if len(silent):
            raise EditError(
                f"feature {int(silent[0])} was never active while the statistics were measured, "
                "so it has no maximum; pass unit='norm' or unit='raw'."
            )
    return size.to(rows.device, torch.promote_types(rows.dtype, torch.float32))


def _at_positions(positions: Positions, tokens: Tokens) -> Tensor | None:
    """The tokens at these positions, [B, T] bool; None for all of them."""
    if isinstance(positions, str):
        # usually a pass has prompt tokens only, or generated ones: then no mask is needed
        if positions == "all" or tokens.all_are(positions):
            return None
        return tokens.prompt if positions == "prompt" else ~tokens.prompt
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return _in_batch(positions, tokens)
    # only from here on: working positions out takes as long as the edit itself
    at = tokens.position
    if isinstance(positions, slice):
        start, step = positions.start or 0, positions.step or 1
        inside = (at >= start) & ((at - start) % step == 0)
        return inside if positions.stop is None else inside & (at < positions.stop)
    if isinstance(positions, Tensor):
        mask = positions.to(at.device)
        return (at >= 0) & (at < len(mask)) & mask[at.clamp(0, len(mask) - 1)]
    return torch.isin(at, torch.as_tensor(positions, device=at.device))


def _in_batch(mask: Tensor, tokens: Tokens) -> Tensor:
    """The tokens that a mask [rows, columns] of the batch marks, padding columns included."""
    column, row, count = tokens.column, tokens.batch_row, tokens.num_batch_rows
    mask = mask.to(column.device)
    if count is None or len(mask) < count:
        raise EditError(f"the positions mask has {len(mask)} rows, but this batch has {count}.")
    wanted = tokens.prompt_columns
    # without padding columns are positions, and a mask may end early
    if mask.shape[1] < wanted and not (tokens.all_real or bool(tokens.real.all())):
        raise EditError(
            f"the positions mask has {mask.shape[1]} columns, but the padded batch has {wanted}: a "
            "mask [rows, columns] is that of the batch, padding included. For positions counted "
            "in real tokens give a mask [positions], or the positions."
        )
    width = mask.shape[1]
    inside = (column >= 0) & (column < width)
    return inside & mask[row.clamp(min=0), column.clamp(0, width - 1)]


def _aligned(source: SparseFeatures, tokens: Tokens) -> Tensor:
    """Which of the source's tokens stands at each row and position, [B, T]; -1 for none."""
    rows, length = (1, source.shape[0]) if len(source.shape) == 1 else source.shape
    position = tokens.position
    if rows == 1:
        row: Tensor | int = 0
    else:
        row, count = tokens.row, tokens.num_rows
        if count is None or count > rows:
            raise EditError(f"the patch has {rows} rows, but this batch has {count}.")
        row = row.clamp(min=0)
    if source.positions is None:
        return torch.where((position >= 0) & (position < length), row * length + position, -1)
    # where each position of each row stands among the source's tokens
    places = source.positions.to(position.device).reshape(rows, length)
    last = int(places.max()) if places.numel() else -1
    index = torch.arange(rows * length, device=position.device).reshape(rows, length)
    table = torch.full((rows, last + 2), -1, dtype=torch.int64, device=position.device)
    table.scatter_(1, places.where(places >= 0, last + 1), index)
    table[:, last + 1] = -1
    return table[row, position.where((position >= 0) & (position <= last), last + 1)]
