"""The numbers in a language model's weights, wherever they lie: on the CPU, on a disk, in shards.

Room   a base model -> its floating weights, under names that wrappers and adapters do not change.
       Nothing is read until it is asked for, and then a few entries of it.
Beware A weight may be a subclass of Tensor that has no such numbers: a quantized one is not the
       original's. Of one that is sharded other processes hold a part, and asking them would wait
       for ever unless all of them ask. Both are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_NUM_ENTRIES = 8
_PLAIN = (Tensor, nn.Parameter)
# modules around others: torch.compile's, FSDP's, checkpointing's, and PEFT's around a layer
_AROUND = {
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("base_layer", "original_module"),
}
_ADAPTERS = ("lora_", "modules_to_save", "prompt_encoder", "ia3_")


@dataclass(frozen=True)
class Weight:
    """A weight under a name that wrappers and adapters do not change."""

    name: str
    ndim: int
    read: Callable[[], Tensor]
    """The weight with its numbers, wherever they lie: only a few weights are ever read."""

    def entries(self) -> Tensor:
        """A few evenly spaced entries, float32 on the CPU."""
        weight = self.read().detach()
        count = min(_NUM_ENTRIES, weight.numel())
        # Told device and dtype, as a caller's defaults would place and round them otherwise.
        at = torch.linspace(0, weight.numel() - 1, count, dtype=torch.float32, device="cpu").long()
        # Indexed dimension by dimension: a flat view would copy a weight that is not contiguous.
        index = torch.unravel_index(at.to(weight.device), weight.shape)
        return weight[index].float().cpu()


def readable_weights(base: nn.Module) -> list[Weight]:
    """Floating parameters that can be read here, sorted by name."""
    found = []
    for name, weight in base.named_parameters():
        if any(part.startswith(_ADAPTERS) for part in name.split(".")):
            continue
        read = _reader(base, name, weight)
        if read is not None:
            found.append(Weight(plain_name(name), weight.ndim, read))
    return sorted(found, key=lambda weight: weight.name)


def plain_name(path: str) -> str:
    """A path without the modules that wrappers and adapters have put around others."""
    return ".".join(part for part in path.split(".") if part not in _AROUND)


def holds_quantized(base: nn.Module) -> bool:
    """Whether any weight is of a kind whose numbers are not those of the original model."""
    return any(map(_is_quantized, base.parameters()))


def _is_quantized(weight: Tensor) -> bool:
    weight = _here(weight)
    # all that quantizes packs into a byte or less, or into a tensor of its own kind
    return type(weight) not in _PLAIN or (weight.ndim >= 2 and weight.dtype.itemsize < 2)


def _reader(base: nn.Module, name: str, weight: Tensor) -> Callable[[], Tensor] | None:
    """How to get at the numbers of a parameter; None if they are not to be had."""
    path, _, leaf = name.rpartition(".")
    owner = base.get_submodule(path)
    whole = _whole(weight)
    if whole is None or not whole.is_floating_point() or not whole.numel():
        return None
    # FSDP1 cuts all that it holds into flat pieces, each under the name of a whole weight
    if getattr(owner, "_is_fsdp_managed_module", False) and whole.ndim < 2:
        return None
    if whole.device.type != "meta":
        return lambda: whole
    hook = getattr(owner, "_hf_hook", None)  # accelerate's, for offloading
    for each in getattr(hook, "hooks", (hook,)):
        held = getattr(each, "weights_map", None)
        if held is not None:
            return lambda: torch.as_tensor(held[leaf], device="cpu")
    return None


def _whole(weight: Tensor) -> Tensor | None:
    """The weight as a tensor that can be indexed, without a word to other processes, or None."""
    shared: Any = weight
    if _is_shared_out(weight):
        parts = zip(shared.placements, shared.device_mesh.shape, strict=True)
        if not all(placement.is_replicate() or size == 1 for placement, size in parts):
            return None
    held = _here(weight)
    readable = type(held) in _PLAIN and held.layout == torch.strided and held.dtype.itemsize >= 2
    return held if readable and held.shape == weight.shape else None


def _is_shared_out(weight: Tensor) -> bool:
    """Is it a DTensor? Not asked by its class, as some builds of torch have none."""
    return all(hasattr(weight, name) for name in ("to_local", "placements", "device_mesh"))


def _here(weight: Tensor) -> Tensor:
    """What this process holds of a weight; asks no other."""
    shared: Any = weight.detach() if _is_shared_out(weight) else None
    return weight if shared is None else shared.to_local()
