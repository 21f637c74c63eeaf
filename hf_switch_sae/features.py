"""The sparse code of tokens, and the only currency between the rooms.

A token's features are k pairs (act, id). Nothing here is as wide as the dictionary, except what
`to_dense()` returns.

Beware A slot whose act is 0 is padding: its id names some feature of the token's own expert, but
       means nothing. A feature is active only where its act is > 0.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.errors import FeatureIdError


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """Active features of tokens: feature `ids[..., j]` adds `acts[..., j]` along its decoder row.

    Args:
        acts: [..., k], floating, in the LM's own units, router weight included; 0: an empty slot.
        ids: [..., k], int64 in [0, num_features), counted over all experts; distinct within a token
            where acts > 0.
        num_features: width of the dictionary.
        positions: [...] int64, where each token stands in its text, counted in real tokens from 0;
            -1 for padding. None if that is not known; `Patch` then counts tokens from 0.

    Leading dimensions are whatever the tokens had, e.g. [batch, seq]; indexing works on them.
    """

    acts: Tensor
    ids: Tensor
    num_features: int
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.acts.shape != self.ids.shape or self.acts.ndim == 0:
            raise ValueError(
                f"acts {tuple(self.acts.shape)} and ids {tuple(self.ids.shape)} "
                "must have one shape [..., k]."
            )
        if self.positions is not None and self.positions.shape != self.shape:
            raise ValueError(
                f"positions {tuple(self.positions.shape)} must be those of the tokens "
                f"{tuple(self.shape)}."
            )
        # the first look decides nearly always, and costs a token nothing
        if self.ids.dtype is not torch.int64 and not _are_integers(self.ids):
            raise FeatureIdError(f"feature ids are integers, these are {self.ids.dtype}.")

    @property
    def k(self) -> int:
        """Slots per token."""
        return self.acts.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the tokens, without the slots."""
        return self.acts.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where both tensors lie."""
        return self.acts.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `acts`."""
        return self.acts.dtype

    def __len__(self) -> int:
        return self.acts.shape[0]

    def __getitem__(self, index: Any) -> SparseFeatures:
        """Index the token dimensions, e.g. `features[0, -1]`: the last token of the first row."""
        parts = index if isinstance(index, tuple) else (index,)
        index = parts if any(part is Ellipsis for part in parts) else (*parts, ...)
        # A trailing full slice keeps the slots out of reach, so k is never cut by accident.
        slots = (*index, slice(None))
        positions = None if self.positions is None else self.positions[index]
        return replace(self, acts=self.acts[slots], ids=self.ids[slots], positions=positions)

    def __repr__(self) -> str:
        return (
            f"SparseFeatures(tokens={list(self.shape)}, k={self.k}, "
            f"num_features={self.num_features}, dtype={self.dtype}, device={self.device})"
        )

    def to(self, *args: Any, **kwargs: Any) -> SparseFeatures:
        """Move both tensors; a dtype applies to `acts` only. Arguments as of `Tensor.to`."""
        acts = self.acts.to(*args, **kwargs)
        positions = None if self.positions is None else self.positions.to(acts.device)
        return replace(self, acts=acts, ids=self.ids.to(acts.device), positions=positions)

    def cpu(self) -> SparseFeatures:
        """The same on the CPU."""
        return self.to("cpu")

    def detach(self) -> SparseFeatures:
        """The same without gradient."""
        return replace(self, acts=self.acts.detach())

    def reshape(self, *shape: int) -> SparseFeatures:
        """The same with tokens in another shape, e.g. `features.reshape(-1)`: one row a token."""
        acts, ids = (x.reshape(*shape, self.k) for x in (self.acts, self.ids))
        positions = None if self.positions is None else self.positions.reshape(shape)
        return replace(self, acts=acts, ids=ids, positions=positions)

    @staticmethod
    def cat(parts: Sequence[SparseFeatures], dim: int = 0) -> SparseFeatures:
        """Join along a token dimension; parts with fewer slots are padded with empty ones.

        Raises:
            ValueError: no parts, or parts of dictionaries of different width.
        """
        if not parts:
            raise ValueError("nothing to join: give at least one SparseFeatures.")
        widths = {part.num_features for part in parts}
        if len(widths) > 1:
            raise ValueError(
                f"these features are of dictionaries of different width: {sorted(widths)}."
            )
        k = max(part.k for part in parts)
        tokens_dim = dim
        dim = dim if dim >= 0 else dim - 1  # a negative dim counts token dimensions, not slots
        acts = torch.cat(
            [torch.nn.functional.pad(part.acts, (0, k - part.k)) for part in parts], dim
        )
        # an empty slot repeats the token's first id, so that it still names its own expert
        ids = torch.cat(
            [torch.cat([p.ids, p.ids[..., :1].expand(*p.shape, k - p.k)], -1) for p in parts], dim
        )
        known = [part.positions for part in parts if part.positions is not None]
        positions = torch.cat(known, tokens_dim) if len(known) == len(parts) else None
        return SparseFeatures(acts, ids, widths.pop(), positions)

    def select(self, feature_ids: int | Sequence[int] | Tensor) -> Tensor:
        """Activations of the named features, [..., len(feature_ids)]; 0 where not active.

        An int selects one feature and drops the last dimension.

        Raises:
            FeatureIdError: an id outside 0 to num_features - 1, or a mask.
        """
        if not isinstance(feature_ids, Tensor) and hasattr(feature_ids, "__index__"):
            return self.select([feature_ids])[..., 0]  # type: ignore[list-item]
        wanted = _checked_ints(feature_ids, self.num_features)
        # one by one: comparing with all at once would make [..., k, n]
        columns = [torch.where(self.ids == feature, self.acts, 0).sum(-1) for feature in wanted]
        if len(columns) == 1:
            return columns[0][..., None]
        return torch.stack(columns, -1) if columns else self.acts.new_zeros(*self.shape, 0)

    def topk(self, n: int) -> SparseFeatures:
        """The n strongest features of each token, strongest first."""
        acts, slots = self.acts.topk(min(n, self.k), dim=-1)
        return replace(self, acts=acts, ids=self.ids.gather(-1, slots))

    def l0(self) -> Tensor:
        """Mean count of active features per token, a 0-d float tensor."""
        return (self.acts > 0).sum(-1).float().mean()

    def to_dense(self) -> Tensor:
        """[..., num_features] in the dtype of `acts`, laid out in full width; for small inputs."""
        dense = self.acts.new_zeros(*self.shape, self.num_features)
        # scatter_add, as empty slots may repeat the id of an active one
        return dense.scatter_add(-1, self.ids, self.acts)

    def to_csr(self) -> Tensor:
        """[num_tokens, num_features], torch sparse CSR, no empty slots, columns in rising order."""
        acts, ids = self.acts.reshape(-1, self.k), self.ids.reshape(-1, self.k)
        ids, order = ids.sort(dim=-1)
        acts = acts.gather(-1, order)
        active = acts > 0
        crow = torch.zeros(acts.shape[0] + 1, dtype=torch.int64, device=self.device)
        crow[1:] = active.sum(-1).cumsum(0)
        return torch.sparse_csr_tensor(
            crow,
            ids[active],
            acts[active],
            (acts.shape[0], self.num_features),
            device=self.device,
            check_invariants=True,
        )


def _checked_ints(feature_ids: Sequence[int] | Tensor, num_features: int) -> Sequence[int]:
    """Like `check_feature_ids`, but plain ints come back as they are: no tensor is made."""
    if isinstance(feature_ids, list | tuple) and all(
        type(feature) is int and 0 <= feature < num_features for feature in feature_ids
    ):
        return feature_ids
    ids: list[int] = check_feature_ids(feature_ids, num_features).tolist()
    return ids


def check_feature_ids(feature_ids: int | Sequence[int] | Tensor, num_features: int) -> Tensor:
    """The ids as int64 [n]; a FeatureIdError names the first that is no feature, and the range."""
    # rounding 2.7 to 2, or reading a mask as ids 0 and 1, would quietly name other features
    if holds_booleans(feature_ids):
        raise FeatureIdError(
            "feature ids are integers, these hold True or False; of a mask, give mask.nonzero()."
        )
    # told its device, as a caller's `with torch.device("meta")` would make it there
    device = feature_ids.device if isinstance(feature_ids, Tensor) else "cpu"
    try:
        given = torch.as_tensor(feature_ids, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise FeatureIdError(f"feature ids are integers; got {feature_ids!r}.") from None
    if given.numel() and not _are_integers(given):
        raise FeatureIdError(f"feature ids are integers, these are {given.dtype}.")
    ids = given.to(torch.int64).reshape(-1)
    wrong = ids[(ids < 0) | (ids >= num_features)]
    if len(wrong):
        raise FeatureIdError(
            f"no feature {int(wrong[0])}: this SAE has features 0 to {num_features - 1}."
        )
    return ids


def holds_booleans(value: Any) -> bool:
    """Whether a value is True or False, or holds one, however deep.

    To Python these are the integers 1 and 0, so a mask would pass for ids.
    """
    dtype = str(getattr(value, "dtype", "object"))  # of torch, numpy and their kin
    if dtype != "object":
        return "bool" in dtype
    if isinstance(value, Collection) and not isinstance(value, str | bytes | range):
        return any(map(holds_booleans, value))
    return isinstance(value, bool)


def _are_integers(values: Tensor) -> bool:
    dtype = values.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
