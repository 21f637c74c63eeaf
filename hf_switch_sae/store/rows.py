"""Rows of a store in memory, one for each token, and how their feature ids are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hf_switch_sae.errors import StoreError
from hf_switch_sae.features import SparseFeatures

_MAX_ACT = float(np.finfo(np.float16).max)

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class RowLayout:
    """The columns of a token shard: they depend on the SAE's width and experts."""

    num_features: int
    num_experts: int
    num_experts_per_token: int

    @property
    def is_local(self) -> bool:
        """Whether ids count within the token's only expert, which then has a column of its own."""
        return self.num_experts > 1 and self.num_experts_per_token == 1

    @property
    def features_per_expert(self) -> int:
        """Features of one expert."""
        return self.num_features // self.num_experts

    @property
    def schema(self) -> pa.Schema:
        """Columns of a token shard."""
        width = self.features_per_expert if self.is_local else self.num_features
        ids = pa.uint16() if width <= 1 << 16 else pa.uint32()
        expert = [("expert", pa.uint16())] if self.is_local else []
        return pa.schema(
            [
                ("document", pa.int64()),
                ("position", pa.int32()),
                ("token", pa.int32()),
                *expert,
                # the inner name that pyarrow, datasets and duckdb agree on
                ("ids", pa.list_(pa.field("element", ids))),
                ("acts", pa.list_(pa.field("element", pa.float16()))),
            ]
        )


@dataclass(frozen=True)
class TokenRows:
    """Tokens with their active features, strongest first.

    A posting is one active feature of one token; the postings of all tokens lie one after another.

    Args:
        document, position, token: [n] integers.
        offsets: [n + 1]; token i has the postings offsets[i] to offsets[i + 1].
        ids: [postings] int64, counted over all experts.
        acts: [postings] float16, > 0.
        expert: [n], the router's choice; None with several experts a token, or with only one.
    """

    document: Array
    position: Array
    token: Array
    offsets: Array
    ids: Array
    acts: Array
    expert: Array | None = None

    def __len__(self) -> int:
        return len(self.document)

    @classmethod
    def of(
        cls,
        features: SparseFeatures,
        document: Array,
        position: Array,
        token: Array,
        layout: RowLayout,
    ) -> TokenRows:
        """Rows of features [n], from any device.

        Raises:
            StoreError: an act above 65504, which float16 can't hold.
        """
        # strongest first; of equal acts the earlier slot
        acts, slots = features.acts.detach().float().sort(dim=-1, descending=True, stable=True)
        ids = features.ids.gather(-1, slots).cpu().numpy()
        kept = acts.cpu().numpy()
        if kept.size and kept.max() > _MAX_ACT:
            row = int(kept.max(-1).argmax())
            raise StoreError(
                f"feature {ids[row, 0]} has an act of {kept[row, 0]:g} at token {token[row]}, and "
                f"a store keeps acts as float16, up to {_MAX_ACT:g}. Is the token an outlier (see "
                "SwitchSAE.outlier_norm)?"
            )
        half = kept.astype(np.float16)
        active = half > 0  # in float16: a tiny act becomes 0 and is not stored
        offsets = np.zeros(len(half) + 1, np.int64)
        np.cumsum(active.sum(-1), out=offsets[1:])
        # a token's ids are all of one expert, so the first tells it
        expert = ids[:, 0] // layout.features_per_expert if layout.is_local else None
        return cls(document, position, token, offsets, ids[active], half[active], expert)

    @classmethod
    def empty(cls, layout: RowLayout) -> TokenRows:
        """No rows."""
        none = np.zeros(0, np.int64)
        expert = none if layout.is_local else None
        return cls(none, none, none, np.zeros(1, np.int64), none, none.astype(np.float16), expert)

    @classmethod
    def cat(cls, parts: list[TokenRows]) -> TokenRows:
        """Join rows of one layout, at least one part."""
        starts = np.cumsum([0, *(len(part.ids) for part in parts)])
        offsets = [part.offsets[:-1] + at for part, at in zip(parts, starts, strict=False)]
        expert = [part.expert for part in parts if part.expert is not None]
        return cls(
            np.concatenate([part.document for part in parts]),
            np.concatenate([part.position for part in parts]),
            np.concatenate([part.token for part in parts]),
            np.concatenate([*offsets, starts[-1:]]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.acts for part in parts]),
            np.concatenate(expert) if expert else None,
        )

    def take(self, rows: Array) -> TokenRows:
        """The rows of these numbers, [m] ints, in that order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # where each posting lies now: its row's old start, plus its place within the row
        postings = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenRows(
            self.document[rows],
            self.position[rows],
            self.token[rows],
            offsets,
            self.ids[postings],
            self.acts[postings],
            None if self.expert is None else self.expert[rows],
        )

    def features(self, num_features: int, k: int = 1) -> SparseFeatures:
        """As SparseFeatures [n], acts in float16, with at least k slots a token."""
        lengths = np.diff(self.offsets)
        width = max(k, int(lengths.max(initial=0)))
        acts = np.zeros((len(self), width), np.float16)
        ids = np.zeros((len(self), width), np.int64)
        # a mask is filled row by row, the order in which the postings lie
        filled = np.arange(width) < lengths[:, None]
        acts[filled], ids[filled] = self.acts, self.ids
        return SparseFeatures(torch.from_numpy(acts), torch.from_numpy(ids), num_features)

    def table(self, layout: RowLayout) -> pa.Table:
        """As a table of the layout's schema."""
        schema = layout.schema
        ids = self.ids
        columns: dict[str, Any] = {
            "document": self.document,
            "position": self.position,
            "token": self.token,
        }
        if layout.is_local:
            assert self.expert is not None
            columns["expert"] = self.expert
            # ids within the expert fit into 16 bits
            ids = ids - np.repeat(self.expert * layout.features_per_expert, np.diff(self.offsets))
        arrays = {
            name: pa.array(column.astype(schema.field(name).type.to_pandas_dtype()))
            for name, column in columns.items()
        }
        # a list's offsets have 32 bits in Arrow: enough, as shards are written in parts
        offsets = pa.array(self.offsets.astype(np.int32))
        for name, values in (("ids", ids), ("acts", self.acts)):
            kind = schema.field(name).type
            dtype = kind.value_type.to_pandas_dtype()
            arrays[name] = pa.ListArray.from_arrays(
                offsets, pa.array(values.astype(dtype)), type=kind
            )
        return pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema)

    @classmethod
    def of_table(cls, table: pa.Table, layout: RowLayout) -> TokenRows:
        """Rows of a table that `table` made, or of a slice of it."""
        columns = {name: table[name].combine_chunks() for name in table.column_names}
        ids, acts = columns["ids"], columns["acts"]
        expert = columns["expert"].to_numpy().astype(np.int64) if layout.is_local else None
        # a slice keeps its offsets into the whole table's values
        offsets = ids.offsets.to_numpy().astype(np.int64)
        values = ids.values.to_numpy().astype(np.int64)[offsets[0] : offsets[-1]]
        half = acts.values.to_numpy()[acts.offsets[0].as_py() : acts.offsets[-1].as_py()]
        offsets = offsets - offsets[0]
        if expert is not None:
            values = values + np.repeat(expert * layout.features_per_expert, np.diff(offsets))
        document, position, token = (
            columns[name].to_numpy() for name in ("document", "position", "token")
        )
        return cls(document, position, token, offsets, values, half, expert)
