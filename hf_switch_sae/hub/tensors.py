"""A file of weights -> named tensors. No code in it is run, and no tensor is silently dropped.

Beware `.pt` is a pickle: it is read with weights_only=True, which runs no code, and `.npz` with
       allow_pickle=False. A tensor's name tells which way round it is, never its shape: a square
       matrix fits both ways.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_switch_sae.errors import ConversionError

_MOST_PICKLE = 2**24
"""Bytes of a pickle that is still taken apart for its strings."""


class Tensors:
    """The content of a file, by name. A reader takes each tensor once, then calls `finish`."""

    def __init__(self, held: Mapping[str, Any], where: str) -> None:
        self.held, self.where = dict(held), where
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of a name, which must have a shape; None in `shape` allows any size.

        Raises:
            ConversionError: it is missing, of another shape, not floating, or not finite.
        """
        value = self.held.get(name)
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"{self.where} has no tensor {name!r}; it has {_listing(self.held)}."
            )
        found = tuple(value.shape)
        fits = len(found) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, found, strict=True)
        )
        if not fits:
            turned = " Is it the other way round (transposed)?" if found[::-1] == shape else ""
            raise ConversionError(
                f"{name!r} in {self.where} is {list(found)}, and should be "
                f"{['any' if size is None else size for size in shape]}.{turned}"
            )
        if not value.is_floating_point():
            raise ConversionError(f"{name!r} in {self.where} is {value.dtype}, not floating.")
        if not bool(torch.isfinite(value).all()):
            raise ConversionError(f"{name!r} in {self.where} has entries that are not finite.")
        self._taken.add(name)
        # a pickled nn.Parameter still asks for gradients
        return value.detach()

    def number(self, name: str) -> float | None:
        """The number under a name, a scalar tensor or a plain one; None if there is nothing.

        Raises:
            ConversionError: there is something else.
        """
        if name not in self.held:
            return None
        value = self.held[name]
        self._taken.add(name)
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise ConversionError(f"{name!r} in {self.where} is no single number.")

    def plain(self, name: str) -> Any:
        """Whatever is stored under a name; None if nothing is."""
        self._taken.add(name)
        return self.held.get(name)

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Raise ConversionError if anything in the file was neither taken nor ignored."""
        left = self.held.keys() - self._taken - set(ignored)
        if left:
            raise ConversionError(
                f"{self.where} has more than its format knows: {_listing(left)}. Leaving them out "
                "would change what the SAE computes."
            )


def read_tensors(path: Path) -> dict[str, Any]:
    """The content of a .safetensors, .npz, .pt or .pth file, on the CPU.

    Raises:
        ConversionError: the file is damaged, holds code or something other than named tensors, or
            is of another kind.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            # numpy does not close a file that it could not read
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
        if path.suffix in (".pt", ".pth"):
            # to the CPU, as a file saved on a GPU would ask for one
            held = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise ConversionError(f"{path.name} is no .safetensors, .npz, .pt or .pth file.")
    except (ConversionError, MemoryError):
        # running out of memory says nothing about the file
        raise
    except (SafetensorError, BadZipFile, RuntimeError, EOFError, OSError) as err:
        raise ConversionError(f"{path.name} can't be read: {_first_line(err)}") from err
    except Exception as err:  # a damaged pickle may raise anything at all
        raise ConversionError(
            f"{path.name} holds more than plain tensors, numbers and strings (pickled code, or "
            f"damage), so it was not read and nothing was executed: {_first_line(err)}"
        ) from err
    if not isinstance(held, dict):
        raise ConversionError(f"{path.name} holds a {type(held).__name__}, not named tensors.")
    return held


def strings_in(file: BinaryIO) -> frozenset[str] | None:
    """The strings in a .pt file, among them the names of its tensors, without reading a tensor.

    Its pickle is taken apart, not run.

    Returns:
        None for a file from before torch 1.6, whose tensors are within the pickle, and for a
        damaged one; `read_tensors` tells which.
    """
    try:
        with ZipFile(file) as held:
            # the folder within is called what the file was called when it was saved
            (entry,) = [each for each in held.infolist() if each.filename.endswith("/data.pkl")]
            if entry.file_size > _MOST_PICKLE:
                return None
            steps = pickletools.genops(held.read(entry))
            return frozenset(value for _, value, _ in steps if isinstance(value, str))
    except (BadZipFile, ValueError, NotImplementedError, EOFError):
        return None


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]


def _listing(names: Collection[str]) -> str:
    shown = sorted(map(str, names))
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") if shown else "nothing"
