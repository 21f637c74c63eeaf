"""What is to be compared: words of a command line, or a named set -> the runs to train.

    num_experts=8 num_features=6144 k=32      an SAE; its own fields and those of its run
    --set switch --width 6144                 dense TopK, and Switch SAEs of its width or its FLOPs

All runs of a comparison share preset and tokens, except for what a run's own words say.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hf_switch_sae.errors import ConfigError
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.training.arguments import (
    PRESETS,
    SAE_PRESETS,
    SwitchSAETrainingArguments,
    nearest,
    sae_fields,
)

_OF_RUN = {each.name for each in fields(SwitchSAETrainingArguments) if each.init}
# what the comparison sets by itself, and a push, which would publish one SAE at a time
_OF_RUN -= {"output_dir", "seed", "data_seed", "resume_from_checkpoint", "push_to_hub"}
_WORDS = {"topk": "TopK", "batch_topk": "BatchTopK", "relu": "ReLU", "jumprelu": "JumpReLU"}
_L1 = (0.05, 0.1, 0.2)  # from many active features to few: none of them gives k


@dataclass(frozen=True)
class Planned:
    """A run that trains one SAE of a comparison."""

    name: str
    """Its folder's name."""
    sae: dict[str, Any]
    """Fields of `SwitchSAEConfig`."""
    run: dict[str, Any]
    """Fields of `SwitchSAETrainingArguments`, except the seed and the output folder."""
    seed: int

    def config(self, **known: Any) -> SwitchSAEConfig:
        """The SAE's config.

        Args:
            known: fields that its hookpoint decides; the run's own fields override them.

        Raises:
            ConfigError: the fields contradict each other.
        """
        try:
            return SwitchSAEConfig(**{**known, **self.sae})
        except ConfigError as err:
            raise ConfigError(f"the run {self.name}: {err}") from err


def switch_set(
    width: int, experts: int = 8, k: int = 32, relu: bool = True
) -> list[dict[str, Any]]:
    """The paper's comparison, around a dense TopK SAE of some width.

    - dense SAEs of `width`, and of a half, a quarter and an eighth of it, which have the operations
      of the width-matched Switch SAEs
    - Switch SAEs of `width` (width-matched) with 2, 4, 8 and 16 experts and with `experts`
    - a Switch SAE of `experts` times `width` (FLOP-matched)
    - a dense SAE of `width` that takes the top k of each token, not of the batch
    - dense ReLU SAEs of `width`, with three weights of their L1 penalty

    Args:
        width: features of the dense SAE.
        experts: experts of the FLOP-matched SAE.
        k: active features per token.
        relu: whether to include the ReLU SAEs; the published loss has no such penalty.

    Returns:
        The fields of `SwitchSAEConfig` for each SAE.

    Raises:
        ConfigError: `width` can't be divided into `experts` experts of at least k features.
    """
    # experts must divide the width, and each must have k features to choose from
    sizes = sorted({2, 4, 8, 16, experts})
    matched = [e for e in sizes if width % e == 0 and width // e >= k]
    if experts not in matched:
        raise ConfigError(
            f"a width of {width} is not {experts} experts of at least k={k} features: give a "
            f"multiple of {experts} from {experts * k} on, or fewer experts."
        )
    # as wide as one expert of a width-matched SAE
    smaller = [width // share for share in sorted({2, 4, 8, experts}) if share in matched]
    dense = [{"num_experts": 1, "num_features": features, "k": k} for features in (width, *smaller)]
    switches = [{"num_experts": e, "num_features": width, "k": k} for e in matched]
    flops = {"num_experts": experts, "num_features": experts * width, "k": k}
    topk = {"num_experts": 1, "num_features": width, "k": k, "activation": "topk"}
    penalized = [
        {**topk, "activation": "relu", "k": None, "encoder_bias": True, "l1_loss_coef": weight}
        for weight in _L1
    ]
    return [*dense, *switches, flops, topk, *(penalized if relu else [])]


SETS: dict[str, Callable[..., list[dict[str, Any]]]] = {"switch": switch_set}
"""Name -> (width, experts, k, relu) -> fields of SAEs."""


def plan(
    wanted: Sequence[Mapping[str, Any] | str],
    sae: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    preset: str = "default",
) -> list[Planned]:
    """Plan the runs of a comparison.

    Args:
        wanted: for each SAE the fields of its config and its run, and maybe a `name`; or a string
            such as "num_experts=8 k=32".
        sae, run: fields for all SAEs and runs; those in `wanted` override them.
        seeds: each SAE is trained once with each seed.
        preset: key of `SAE_PRESETS`; all other fields override it.

    Raises:
        ConfigError: a field is unknown, fields contradict each other, or two runs would have one
            name.
    """
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; there are {', '.join(PRESETS)}.")
    found = []
    for each in wanted:
        own = fields_of(each) if isinstance(each, str) else dict(each)
        name = own.pop("name", None)
        own_sae, own_run = _split(own)
        of_sae = {**SAE_PRESETS[preset], **(sae or {}), **own_sae}
        of_run = {**PRESETS[preset], **(run or {}), **own_run}
        for seed in seeds:
            # made now only to be checked and named; the rows' own fields come later
            config = Planned(str(name or each), of_sae, of_run, seed).config()
            title = name or name_of(config)
            # no leading dot either: .runs has the runs that are not finished
            if not re.fullmatch(r"[\w.\-]+", str(title)) or str(title).startswith("."):
                raise ConfigError(f"name={title!r} is to be a folder's: letters, digits, - and _.")
            found.append(Planned(f"{title}-seed{seed}", of_sae, of_run, seed))
    # the same run asked for twice is trained once; different runs need different folders
    found = [each for at, each in enumerate(found) if each not in found[:at]]
    twice = [name for name, count in Counter(each.name for each in found).items() if count > 1]
    if twice:
        raise ConfigError(f"two runs would be named {twice[0]}: give one of them a name=...")
    return found


def fields_of(words: str) -> dict[str, Any]:
    """`num_experts=8 k=32` -> {"num_experts": 8, "k": 32}.

    Raises:
        ConfigError: a word is not name=value.
    """
    found: dict[str, Any] = {}
    for word in shlex.split(words):
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"{word!r} in {words!r} is not name=value, such as num_experts=8.")
        # people write --num-experts=8 here too
        found[name.lstrip("-").replace("-", "_")] = value_of(value)
    return found


def name_of(config: SwitchSAEConfig) -> str:
    """A short folder name that tells an SAE's kind and size."""
    size = f"{config.num_experts}x{config.features_per_expert}"
    words = [config.activation, str(config.num_features)]
    if config.num_experts > 1:
        words = ["switch", size] + (
            [config.activation] if config.activation != "batch_topk" else []
        )
    if config.k is not None:
        words.append(f"k{config.k}")
    if config.l1_loss_coef:
        words.append(f"l1_{config.l1_loss_coef:g}")
    return "-".join(words)


def label_of(config: SwitchSAEConfig) -> str:
    """An SAE's name in a legend."""
    if config.num_experts > 1:
        return f"Switch {config.num_experts} × {config.features_per_expert:,}"
    weight = f", L1 {config.l1_loss_coef:g}" if config.l1_loss_coef else ""
    return f"{_WORDS[config.activation]} {config.num_features:,}{weight}"


def _split(own: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    of_sae = sae_fields() - {"hookpoint"}  # which the rows decide
    for name in own:
        if name not in of_sae | _OF_RUN:
            raise ConfigError(
                f"there is no field {name} of an SAE or a run; {nearest(name, of_sae | _OF_RUN)}"
            )
    return (
        {name: value for name, value in own.items() if name in of_sae},
        {name: value for name, value in own.items() if name not in of_sae},
    )


def value_of(word: str) -> Any:
    """A value as it is written on a command line: a number, true, false, none, JSON or a text."""
    named = {"true": True, "false": False, "none": None, "null": None}
    if word.lower() in named:
        return named[word.lower()]
    # int before float, or k would be 32.0
    for kind in (int, float, json.loads):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
