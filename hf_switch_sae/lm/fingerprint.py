"""Which language model an SAE belongs to: a model -> its fingerprint; two of them -> yes or no.

A fingerprint is the architecture's sizes and a few sampled weights with their names. It survives
dtype, path, wrappers and task heads, so a local copy is recognized; a fine-tune changes at least
some of the samples, so it is told apart.

How    A weight is known by its name within the base model. The same text model has other names
       before its blocks alone, inside a multimodal model, and in a user's own module; so where
       these differ, names are compared from the list of blocks on.
Beware The residual stream's width is not always the config's hidden_size (see `streams`);
       `attach` checks it again on the tensors. Weights that are quantized, sharded away or on
       `meta` can't be sampled and are left out (see `weights`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_switch_sae.errors import BaseModelError, HookpointError
from hf_switch_sae.lm.config import config_of, text_config
from hf_switch_sae.lm.hookpoints import ResidualBlocks, find_residual_blocks, language_model
from hf_switch_sae.lm.weights import Weight, holds_quantized, plain_name, readable_weights

_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
_MAX_WEIGHTS = 48
# bfloat16 rounds by up to 2**-9 of a value; two different roundings of it can differ by twice that.
_TOLERANCE = 2**-8
_IN_LIST = re.compile(r"(.+?)\.(\d+)\.")


def fingerprint(lm: nn.Module) -> dict[str, Any]:
    """What identifies a language model: its sizes, whether it is quantized, and sampled weights.

    Returns:
        A JSON-able dict: model_type, hidden_size, num_hidden_layers, vocab_size (None where the
        config has none), quantized, and weights {parameter name within the base model: 8 evenly
        spaced entries}.
    """
    model = language_model(lm)
    config = text_config(model)
    weights = _sampled(readable_weights(_base_of(model)))
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
    name = _name(language_model(lm))
    fields: dict[str, Any] = {"base_model": name or None, "base_model_fingerprint": known}
    if known["hidden_size"] is not None:
        fields["hidden_size"] = known["hidden_size"]
    return fields


def check_base_model(
    lm: nn.Module,
    name: str | None,
    expected: dict[str, Any] | None,
    module: nn.Module | None = None,
) -> None:
    """Raise unless `lm` is the language model an SAE was trained on, as far as that is known.

    Args:
        lm: the model, wrapped or not.
        name: the Hub id in the SAE's config, or None.
        expected: the fingerprint in the SAE's config, or None. It decides where weights can be
            compared; the name decides where they can't, or where one of the two models is
            quantized.
        module: the one that the SAE reads, in case `lm` holds several models.

    Raises:
        BaseModelError: naming what differs.
    """
    if name is None and expected is None:
        return
    model = language_model(lm, module)
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
        if found := _IN_LIST.match(name):
            lasts[found[1]] = max(int(found[2]), lasts.get(found[1], 0))
    fitting = [path for path, last in lasts.items() if len(lasts) == 1 or last + 1 == number]
    return f"{fitting[0]}.{layer}" if len(fitting) == 1 else None


def _difference(model: nn.Module, expected: dict[str, Any]) -> str | None:
    """What tells model from fingerprint: "" if nothing, None if no weight could be compared."""
    # sizes first: they need no weight, and say more
    blocks = _text_blocks(model)
    # of a module of the user's own, the text model's config may be known to its blocks alone
    owners = [model] if blocks is None else [model, blocks.owner]
    told = [_other_size(text_config(owner), expected) for owner in owners]
    if all(told):
        return told[0]
    weights = {weight.name: weight for weight in readable_weights(_base_of(model))}
    found = [
        _Compared.of(weights, expected.get("weights", {}), here, there)
        for here, there in _prefixes(_path_in_base(model, blocks), weights, expected)
    ]
    # one reading of the names under which all agrees is enough: no other model's numbers do
    best = min(found, key=lambda each: (not each.inside, len(each.moved) > 0, -each.inside))
    if best.moved:
        count = f"{len(best.moved)} of {best.entries} sampled weights"
        return f"{count} differ, the first in {best.moved[0]} (a fine-tune?)"
    return "" if best.inside else None


def _other_size(config: Any, expected: dict[str, Any]) -> str:
    for size in _SIZES:
        here, there = _get(config, size), expected.get(size)
        if here is not None and there is not None and here != there:
            return f"{size} is {here} here and {there} there"
    return ""


@dataclass(frozen=True)
class _Compared:
    """A model's weights beside a fingerprint's, under one reading of their names."""

    entries: int
    """How many entries were compared."""
    inside: int
    """How many of them are the text model's."""
    moved: list[str]
    """The name of each entry that differs."""

    @classmethod
    def of(
        cls, weights: dict[str, Weight], expected: dict[str, list[float]], here: str, there: str
    ) -> _Compared:
        """Compare, where names that begin with `there` in the fingerprint begin with `here` in
        the model, and are the text model's; the others are the same in both."""
        entries, inside, moved = 0, 0, list[str]()
        for name, values in expected.items():
            is_inside = name.startswith(there)
            weight = weights.get(here + name.removeprefix(there) if is_inside else name)
            if weight is None:
                continue
            found = weight.entries()
            known = torch.tensor(values, dtype=torch.float32, device="cpu")
            entries += len(known)
            inside += len(known) * is_inside
            if found.shape != known.shape:
                moved += [name] * len(known)
                continue
            # a copy in another dtype rounds each entry
            slack = _TOLERANCE * known.abs() + 1e-6 * known.abs().max()
            moved += [name] * int(((found - known).abs() > slack).sum())
        return cls(entries, inside, moved)


def _prefixes(
    blocks: str | None, weights: Iterable[str], expected: dict[str, Any]
) -> list[tuple[str, str]]:
    """What may come before the text model's names, in the model and in the fingerprint.

    Args:
        blocks: the path of the text model's blocks, if known.
        weights: the names in the model.
        expected: the fingerprint.
    """
    known = _lists_of(expected.get("weights", {}))
    if blocks is None or blocks in known:  # a model of the same kind has the same names
        return [("", "")]
    # No list of the fingerprint is marked as the text model's, so each is tried, except those of
    # other parts that the model has too.
    tried = [_before(blocks, each) for each in known if each not in _lists_of(weights)]
    before = "".join(f"{part}." for part in blocks.split(".")[:-1])
    return [prefixes for prefixes in tried if prefixes is not None] or [(before, before)]


def _lists_of(names: Iterable[str]) -> list[str]:
    found = (_IN_LIST.match(name) for name in names)
    return list(dict.fromkeys(each[1] for each in found if each))


def _before(here: str, there: str) -> tuple[str, str] | None:
    """Two paths without the modules that they end in alike; None if they end in different ones."""
    ours, theirs = here.split("."), there.split(".")
    if ours[-1] != theirs[-1]:
        return None
    while ours and theirs and ours[-1] == theirs[-1]:
        del ours[-1], theirs[-1]
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def _text_blocks(model: nn.Module) -> ResidualBlocks | None:
    """The text model's blocks; None if nobody can tell which they are."""
    try:
        return find_residual_blocks(model)
    except HookpointError:
        return None


def _path_in_base(model: nn.Module, blocks: ResidualBlocks | None) -> str | None:
    base = _base_of(model)
    inside = next(name for name, module in model.named_modules() if module is base)
    start = f"{inside}." if inside else ""
    if blocks is None or not blocks.path.startswith(start):
        return None
    return plain_name(blocks.path.removeprefix(start))


def _base_of(model: nn.Module) -> nn.Module:
    """The model without its heads."""
    base: nn.Module = getattr(model, "base_model", model)
    return base


def _sampled(weights: list[Weight]) -> dict[str, list[float]]:
    """Entries of the first, middle and last matrix of each kind.

    A fine-tune may change only some kinds, so each is sampled. It mostly leaves norms alone, so
    only matrices are.
    """
    matrices = [weight for weight in weights if weight.ndim >= 2] or weights
    kinds: dict[str, list[Weight]] = {}
    for weight in matrices:
        kinds.setdefault(re.sub(r"\d+", "*", weight.name), []).append(weight)
    chosen = [
        layers[at]
        for layers in kinds.values()
        for at in sorted({0, len(layers) // 2, -1 % len(layers)})
    ]
    step = max(1, -(-len(chosen) // _MAX_WEIGHTS))  # nothing can be read of a model on `meta`
    return {weight.name: weight.entries().tolist() for weight in chosen[::step]}


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a config with values per layer raises what it likes for such a name
        return None


def _is_quantized(model: nn.Module) -> bool:
    in_config = _get(config_of(model), "quantization_config") is not None
    return in_config or holds_quantized(_base_of(model))


def _name(model: nn.Module) -> str:
    """The Hub id a model was loaded from; "" for one built in memory or loaded from a folder."""
    name = str(_get(config_of(model), "_name_or_path") or "")
    return "" if Path(name).exists() else name
