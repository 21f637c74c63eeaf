"""What `measure_geometry` finds: figures and a table of features, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor

from hf_switch_sae.errors import SwitchSAEError
from hf_switch_sae.files import rounded, write_json, written_beside
from hf_switch_sae.hub.layout import GEOMETRY, GEOMETRY_TABLE

_MOST_EXPERTS_WRITTEN = 256


@dataclass(frozen=True)
class Geometry:
    """How the features of one SAE lie; m features in each of E experts, F together."""

    sae: dict[str, Any]
    """hookpoint, hidden_size, num_features, num_experts, features_per_expert, k, activation, and
    statistics_tokens (0 if it was never calibrated)."""
    seed: int
    nearest: dict[str, Any]
    """For each kind (any, within, between): mean and quantiles of the nearest neighbor's cosine.
    `in_own_expert`: the share of features whose nearest neighbor is in their own expert; `chance`:
    the same share if neighbors were drawn at random."""
    duplicates: dict[str, Any]
    """`threshold`; for each kind the `share` above it, the same weighted by firing rate
    (`of_activations`; None without calibration) and for random vectors (`null`); `curve`: all of
    these at each of its `thresholds`."""
    pairs: dict[str, Any]
    """Pairs of a feature and its nearest neighbor above the threshold: their `count`, and the
    `listed` ones, highest cosine first. They are candidates to be merged."""
    similarity: dict[str, Any]
    """`experts` [E, E]: the largest decoder cosine of a feature of expert a with a feature of
    expert b (on the diagonal, with another of its own), as a mean over a's features. `own`,
    `other`: means of the diagonal and of the rest; `null`: the same for random vectors."""
    router: dict[str, Any] | None
    """Cosine of an encoder row with its own expert's router row (`own`), and the mean cosine with
    those of other experts (`others`); None with one expert."""
    clusters: dict[str, Any] | None
    """t-SNE of encoder and decoder rows, and how often neighbors share an expert; None without
    maps."""
    table: dict[str, Tensor] = field(repr=False)
    """[F] each: expert, nearest, cosine, within, between, alignment, rate, and the feature's place
    on the maps: encoder_x, encoder_y, decoder_x, decoder_y (nan if it is not drawn)."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the table."""
        similarity = dict(self.similarity)
        if self.sae["num_experts"] > _MOST_EXPERTS_WRITTEN:
            similarity["experts"] = None  # megabytes, and no picture shows it
        shown: dict[str, Any] = {"format": 1, "sae": self.sae, "seed": self.seed}
        for name in ("nearest", "duplicates", "pairs"):
            shown[name] = getattr(self, name)
        shown |= {"similarity": similarity, "router": self.router, "clusters": self.clusters}
        return rounded(shown)

    def save(self, folder: str | Path) -> list[Path]:
        """Write geometry.json and geometry.parquet; returns their paths."""
        files = [Path(folder) / GEOMETRY, Path(folder) / GEOMETRY_TABLE]
        columns = {name: values.cpu().numpy() for name, values in self.table.items()}
        with written_beside(files[1]) as beside:
            pyarrow.parquet.write_table(pyarrow.table(columns), beside, compression="zstd")
        write_json(files[0], self.to_dict(), indent=1)
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
        columns = {n: torch.from_numpy(read[n].to_numpy().copy()) for n in read.column_names}
        return cls(**held, table=columns)
