"""Which language model an SAE belongs to: a model -> its fingerprint; two of them -> yes or no.

A fingerprint is the architecture's sizes and a few sampled weights with their names. It survives
dtype, path, wrappers and task heads, so a local copy is recognized; a fine-tune changes at least
some of the samples, so it is told apart.

Beware The residual stream's width is not always the config's hidden_size (see `streams`);
       `attach` checks it again on the tensors. Weights that are quantized, sharded away or on
       `meta` can't be sampled and are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_switch_sae.errors import BaseModelError
from hf_switch_sae.lm.config import config_of, text_config
from hf_switch_sae.lm.hookpoints import unwrap

_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
_MAX_WEIGHTS, _NUM_ENTRIES = 48, 8
# bfloat16 rounds by up to 2**-9 of a value; two different roundings of it can differ by twice that.
_TOLERANCE = 2**-8


def fingerprint(lm: nn.Module) -> dict[str, Any]:
    """What identifies a language model: its sizes, whether it is quantized, and sampled weights.

    Returns:
        A JSON-able dict: model_type, hidden_size, num_hidden_layers, vocab_size (None where the
        config has none), quantized, and weights {parameter name within the base model: 8 evenly
        spaced entries}.
    """
    model = unwrap(lm)
    config = text_config(model)
    weights = _sampled(_readable_weights(model))
    return {
        **{name: _get(config, name) for name in _SIZES},
        "quantized": _is_quantized(model),
        "weights": {
            name: [float(f"{value:.5g}") for value in values] for name, values in weights.items()
        },
    }


def base_model_fields(lm: nn.Module) -> dict[str, Any]:
    """SwitchSAEConfig fields that a model determines: hidden_size, base_model, its fingerprint."""
    known = fingerprint(lm)
    name = _name(unwrap(lm))
    fields: dict[str, Any] = {"base_model": name or None, "base_model_fingerprint": known}
    if known["hidden_size"] is not None:
        fields["hidden_size"] = known["hidden_size"]
    return fields


def check_base_model(lm: nn.Module, name: str | None, expected: dict[str, Any] | None) -> None:
    """Raise unless `lm` is the language model an SAE was trained on, as far as that is known.

    Args:
        lm: the model, wrapped or not.
        name: the Hub id in the SAE's config, or None.
        expected: the fingerprint in the SAE's config, or None. It decides where weights can be
            compared; the name decides where they can't, or where one of the two models is
            quantized.

    Raises:
        BaseModelError: naming what differs.
    """
    if name is None and expected is None:
        return
    model = unwrap(lm)
    # weights decide where they can be compared; a name can be anybody's
    same_name = name is not None and _name(model).lower() == name.lower()
    difference = None if expected is None else _difference(model, expected)
    if difference == "":
        return
    quantized = _is_quantized(model) or bool(expected and expected.get("quantized"))
    if same_name and (difference is None or quantized):
        return
    raise BaseModelError(
        f"this SAE was trained on {name or 'another model'}, not on the model given "
        f"({_name(model) or type(model).__name__}): "
        f"{difference or 'the names differ, and there are no weights to compare'}. Load the SAE's "
        "own base model, or pass allow_mismatch=True if you mean to use it on this one."
    )


def block_path(known: dict[str, Any] | None, layer: int) -> str | None:
    """Where a block lies in its base model, e.g. `h.8`; None if a fingerprint does not tell.

    Of several lists of blocks it is the one that is as long as the config says, if only one is.
    """
    known = known or {}
    number, lasts = known.get("num_hidden_layers"), dict[str, int]()
    for name in known.get("weights", {}):
        if found := re.match(r"(.+?)\.(\d+)\.", name):
            lasts[found[1]] = max(int(found[2]), lasts.get(found[1], 0))
    fitting = [path for path, last in lasts.items() if len(lasts) == 1 or last + 1 == number]
    return f"{fitting[0]}.{layer}" if len(fitting) == 1 else None


def _difference(model: nn.Module, expected: dict[str, Any]) -> str | None:
    """What tells model from fingerprint: "" if nothing, None if no weight could be compared."""
    config = text_config(model)
    # sizes first: they need no weight, and say more
    for size in _SIZES:
        here, there = _get(config, size), expected.get(size)
        if here is not None and there is not None and here != there:
            return f"{size} is {here} here and {there} there"
    weights = {weight.name: weight for weight in _readable_weights(model)}
    compared, moved = 0, []
    for name, values in expected.get("weights", {}).items():
        if name in weights:
            here, there = weights[name].entries(), torch.tensor(values)
            # a copy in another dtype rounds each entry
            slack = _TOLERANCE * there.abs() + 1e-6 * there.abs().max()
            compared += len(there)
            moved += [name] * int(((here - there).abs() > slack).sum())
    if moved:
        count = f"{len(moved)} of {compared} sampled weights"
        return f"{count} differ, the first in {moved[0]} (a fine-tune?)"
    return "" if compared else None


@dataclass(frozen=True)
class _Weight:
    """A weight under a name that wrappers and adapters do not change."""

    name: str
    parameter: Tensor
    read: Callable[[], Tensor]
    """The weight with its numbers, wherever they lie: only a few weights are ever read."""

    def entries(self) -> Tensor:
        weight = self.read().detach()
        count = min(_NUM_ENTRIES, weight.numel())
        # Told its device, as a caller's `with torch.device("meta")` would make it there.
        at = torch.linspace(0, weight.numel() - 1, count, device="cpu").long()
        # Indexed dimension by dimension: a flat view would copy a weight that is not contiguous.
        index = torch.unravel_index(at.to(weight.device), weight.shape)
        return weight[index].float().cpu()


def _readable_weights(model: nn.Module) -> list[_Weight]:
    """Floating parameters of the base model (heads left out), sorted by name."""
    base = getattr(model, "base_model", model)
    found = []
    for name, weight in base.named_parameters():
        plain = re.sub(r"\.(base_layer|_orig_mod|_checkpoint_wrapped_module)(?=\.)", "", name)
        adapter = re.search(r"(^|\.)(lora_|modules_to_save|prompt_encoder|ia3_)", name)
        read = _reader(base, name, weight)
        if weight.is_floating_point() and weight.numel() and not adapter and read is not None:
            found.append(_Weight(plain, weight, read))
    return sorted(found, key=lambda weight: weight.name)


def _reader(base: nn.Module, name: str, weight: Tensor) -> Callable[[], Tensor] | None:
    """How to get at the numbers of a parameter; None for one on `meta` that nobody holds."""
    if weight.device.type != "meta":
        return lambda: weight
    path, _, leaf = name.rpartition(".")
    hook = getattr(base.get_submodule(path), "_hf_hook", None)  # accelerate's, for offloading
    for each in getattr(hook, "hooks", (hook,)):
        held = getattr(each, "weights_map", None)
        if held is not None:
            return lambda: torch.as_tensor(held[leaf])
    return None


def _sampled(weights: list[_Weight]) -> dict[str, list[float]]:
    """Entries of the first, middle and last matrix of each kind.

    A fine-tune may change only some kinds, so each is sampled. It mostly leaves norms alone, so
    only matrices are.
    """
    matrices = [weight for weight in weights if weight.parameter.ndim >= 2] or weights
    kinds: dict[str, list[_Weight]] = {}
    for weight in matrices:
        kinds.setdefault(re.sub(r"\d+", "*", weight.name), []).append(weight)
    chosen = [
        layers[at]
        for layers in kinds.values()
        for at in sorted({0, len(layers) // 2, -1 % len(layers)})
    ]
    step = -(-len(chosen) // _MAX_WEIGHTS)
    return {weight.name: weight.entries().tolist() for weight in chosen[::step]}


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a config with values per layer raises what it likes for such a name
        return None


def _is_quantized(model: nn.Module) -> bool:
    return _get(config_of(model), "quantization_config") is not None


def _name(model: nn.Module) -> str:
    """The Hub id a model was loaded from; "" for one built in memory or loaded from a folder."""
    name = str(_get(config_of(model), "_name_or_path") or "")
    return "" if Path(name).exists() else name
