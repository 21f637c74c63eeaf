"""A folder or a repository -> which SAEs are in it, without reading their weights.

How    Of a safetensors file, the header and the small tensors of statistics are read; of a .pt
       file, the names of its tensors. Other projects' checkpoints are named by their format.
Beware A .pt file from before torch 1.6 holds its tensors among their names, so it is read whole.
       The header is parsed here, as huggingface_hub's parsers (tried: one for a folder, one for the
       Hub) do not tell where the data begins, which we need to read the statistics, and raise
       TypeError or AttributeError for some damaged headers.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hf_switch_sae.errors import ConversionError
from hf_switch_sae.formats.registry import recognize
from hf_switch_sae.hub.layout import CONFIG, is_ours
from hf_switch_sae.hub.source import Source, listed_folders, open_source

_NUMBERS = ("input_scale", "residual_norm", "outlier_norm", "statistics_tokens")
_PER_FEATURE = ("feature_max", "feature_rate")
_DTYPES = {"F32": torch.float32, "I64": torch.int64}
# about what safetensors itself allows
_MOST_HEADER = 100 * 2**20


@dataclass(frozen=True)
class SAESummary:
    """What one SAE is; prints as a few lines."""

    path: str
    """Folder within the release; "" for the top folder."""
    format: str
    """`hf_switch_sae`, or the format of another project."""
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    """Name -> dtype and shape, as in the file."""
    statistics: dict[str, float] = field(default_factory=dict)
    """Scalars as stored, the share of dead features, and the largest `feature_max`."""

    def __str__(self) -> str:
        c = self.config
        if not c:
            return f"{self.path or '.'}: {self.format}"
        k = "" if c.get("k") is None else f", k = {c['k']}"
        norm = "" if c.get("input_norm", "none") == "none" else f", {c['input_norm']}"
        lines = [
            f"{self.path or '.'}: {c.get('num_features')} features in {c.get('num_experts')} "
            f"expert(s), {c.get('activation')}{k}{norm}, at {c.get('hookpoint')}",
            f"  base model: {c.get('base_model')} {c.get('base_model_revision') or ''}".rstrip(),
        ]
        source = dict(c.get("source") or {})
        origin = source.pop("taken_from", None)
        for title, held in (("from", source), ("taken from", origin)):
            if held:
                lines.append(f"  {title}: " + ", ".join(f"{n} {v}" for n, v in held.items()))
        if c.get("metrics"):
            lines.append("  metrics: " + ", ".join(f"{n} {v}" for n, v in c["metrics"].items()))
        if self.statistics:
            shown = (f"{name} {value:g}" for name, value in self.statistics.items())
            lines.append(f"  statistics: {', '.join(shown)}")
        return "\n".join(
            [*lines, *(f"  {n}: {dtype} {shape}" for n, (dtype, shape) in self.tensors.items())]
        )


@dataclass(frozen=True)
class Inspection:
    """The SAEs of a folder or a repository."""

    name: str
    revision: str | None
    """The commit; None for a local folder."""
    saes: tuple[SAESummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        at = f" at {self.revision}" if self.revision else ""
        return "\n".join([f"{self.name}{at}: {len(self.saes)} SAE(s)", *map(str, self.saes)])


def inspect(name: str | Path, subfolder: str = "", **where: Any) -> Inspection:
    """Config, shapes, statistics and provenance of the SAEs at an address.

    Args:
        name: a local folder or a Hub repository.
        subfolder: only what is in it.
        where: `revision`, `token`, `cache_dir`, `local_files_only`, as of `from_pretrained`.

    Raises:
        ConversionError: there is no such folder, nothing is in it, the path climbs out of it, or a
            file is damaged.
        HubError: the repository can't be read.
    """
    source = open_source(name, subfolder, **where)
    if not source.files:
        # the whole is listed again, as `source` knows only what is in the subfolder
        there = listed_folders(open_source(name, **where, whole=True)) if subfolder else ""
        raise ConversionError(
            f"there are no files in {source.where}"
            + (f"; there are weights in: {there}." if there else ".")
        )
    found = (_summary(source.within(folder)) for folder in source.folders())
    return Inspection(str(name), source.revision, tuple(s for s in found if s is not None))


def _summary(source: Source) -> SAESummary | None:
    path = source.subfolder
    config = source.json(CONFIG)
    if not is_ours(config):
        found = recognize(source)
        return None if found is None else SAESummary(path, found.NAME)
    # hundreds of sampled weights, which tell a reader nothing
    config.pop("base_model_fingerprint", None)
    tensors: dict[str, tuple[str, list[int]]] = {}
    numbers: dict[str, float] = {}
    for file in sorted(source.weight_files(".safetensors")):
        with source.opened(file) as stream:
            shapes, statistics = _read_header(stream, file)
        tensors |= shapes
        numbers |= statistics
    return SAESummary(path, "hf_switch_sae", config, tensors, numbers)


def _read_header(
    stream: BinaryIO, file: str
) -> tuple[dict[str, tuple[str, list[int]]], dict[str, float]]:
    """Name -> (dtype, shape) of each tensor in a safetensors file, and the statistics among them.

    Raises:
        ConversionError: it is no safetensors file, or a damaged one.
    """
    # eight bytes give the header's length; a false length must not make us read gigabytes
    try:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size)) if size <= _MOST_HEADER else None
    except (struct.error, ValueError) as err:
        raise ConversionError(f"{file} is no safetensors file: {err}") from None
    if not isinstance(header, dict):
        raise ConversionError(f"{file} is no safetensors file: it has no list of tensors.")
    header.pop("__metadata__", None)

    shapes = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
            raise ConversionError(f"{file} is no safetensors file: {name!r} has no shape or place.")
        shapes[name] = (str(entry["dtype"]), entry["shape"])

    # data_offsets count from the end of the header
    values = {
        name: _tensor(stream, 8 + size, header[name], f"{name!r} in {file}")
        for name in (*_NUMBERS, *_PER_FEATURE)
        if name in header and shapes[name][0] in _DTYPES
    }
    numbers = {name: float(values[name]) for name in _NUMBERS if name in values}
    # before calibration all rates are 0, and every feature would be called dead
    if numbers.get("statistics_tokens") and set(_PER_FEATURE) <= values.keys():
        numbers["dead_share"] = float((values["feature_rate"] == 0).float().mean())
        numbers["largest feature_max"] = float(values["feature_max"].max())
    return shapes, numbers


def _tensor(stream: BinaryIO, start: int, entry: dict[str, Any], what: str) -> torch.Tensor:
    try:
        first, last = entry["data_offsets"]
        stream.seek(start + first)
        # a bytearray, as torch warns of memory that can't be written to
        data = bytearray(stream.read(last - first))
        return torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, TypeError, RuntimeError) as err:  # cut short, or a shape that does not fit
        raise ConversionError(f"{what} is damaged, so that is no safetensors file: {err}") from None
