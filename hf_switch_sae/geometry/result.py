"""What `measure_geometry` found: geometry.json and a table of features, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.files import written_beside
from hf_switch_sae.hub.layout import GEOMETRY, GEOMETRY_TABLE

_MOST_EXPERTS_WRITTEN = 256


@dataclass(frozen=True)
class Geometry:
    """How the features of one SAE lie; m features in each of E experts, F together."""

    sae: dict[str, Any]
    """hookpoint, hidden_size, num_features, num_experts, features_per_expert, k, activation."""
    seed: int
    nearest: dict[str, Any]
    """Of each kind (any, within, between): mean and quantiles of the nearest neighbor's cosine;
    `in_own_expert`: share of features whose nearest neighbor is in their own, `chance` that of it
    among all others."""
    duplicates: dict[str, Any]
    """`threshold`; of each kind the `share` above it, `of_activations` the same weighted by firing
    rate (None without calibration), `null`; and `curve`: all of these at each of `thresholds`."""
    pairs: dict[str, Any]
    """`count` of pairs (a feature and its nearest neighbor) above the threshold, and the `listed`
    ones, highest cosine first: candidates to be merged."""
    similarity: dict[str, Any]
    """`experts` [E, E]: mean over the features of expert a of the largest decoder cosine with a
    feature of expert b, on the diagonal with another of its own; `own`, `other`: means of the
    diagonal and of the rest; `null`: the same of random vectors."""
    router: dict[str, Any] | None
    """Cosine of an encoder row with its own expert's router row (`own`) and the mean over the other
    experts' (`others`); None of one expert."""
    clusters: dict[str, Any] | None
    """t-SNE of encoder and decoder rows, and how far neighbors share an expert; None if not
    asked for."""
    table: dict[str, Tensor] = field(repr=False)
    """[F] each: expert, nearest, cosine, within, between, alignment, rate, and where a feature is
    on the maps encoder_x, encoder_y, decoder_x, decoder_y (nan where it is not)."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the table."""
        similarity = dict(self.similarity)
        if self.sae["num_experts"] > _MOST_EXPERTS_WRITTEN:
            similarity["experts"] = None  # megabytes, and no picture shows it
        shown: dict[str, Any] = {"format": 1, "sae": self.sae, "seed": self.seed}
        for name in ("nearest", "duplicates", "pairs"):
            shown[name] = getattr(self, name)
        shown |= {"similarity": similarity, "router": self.router, "clusters": self.clusters}
        return _rounded(shown)  # type: ignore[no-any-return]

    def save(self, folder: str | Path) -> list[Path]:
        """Write geometry.json and geometry.parquet; returns their paths."""
        files = [Path(folder) / GEOMETRY, Path(folder) / GEOMETRY_TABLE]
        columns = {name: values.cpu().numpy() for name, values in self.table.items()}
        with written_beside(files[1]) as beside:
            pyarrow.parquet.write_table(pyarrow.table(columns), beside, compression="zstd")
        with written_beside(files[0]) as beside:
            beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return files

    @classmethod
    def load(cls, folder: str | Path) -> Geometry:
        """What `save` wrote.

        Raises:
            SwitchSAEError: it is not there, or of another format.
        """
        file, table = Path(folder) / GEOMETRY, Path(folder) / GEOMETRY_TABLE
        if not (file.exists() and table.exists()):
            raise SwitchSAEError(
                f"there is no {GEOMETRY} with a {GEOMETRY_TABLE} in {folder}: "
                "write them with hf-switch-sae geometry."
            )
        held = json.loads(file.read_text(encoding="utf-8"))
        if held.pop("format", None) != 1:
            raise SwitchSAEError(f"{file} is not of format 1.")
        read = pyarrow.parquet.read_table(table)
        columns = {n: torch.tensor(read[n].to_numpy()) for n in read.column_names}
        return cls(**held, table=columns)


def _rounded(value: Any) -> Any:
    """Floats to five digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
