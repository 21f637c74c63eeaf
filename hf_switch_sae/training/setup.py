"""What the trainer is given -> SAEs that fit their places, and the rows to train them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import set_seed

from hf_switch_sae.base_model import base_model_fields
from hf_switch_sae.config import SwitchSAEConfig
from hf_switch_sae.errors import ConfigError, HookpointError, TrainingError, WidthError
from hf_switch_sae.hookpoints import resolve
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.training.activations import Activations
from hf_switch_sae.training.harvest import ActivationSettings
from hf_switch_sae.training.live import LiveActivations

Given = SwitchSAEConfig | SwitchSAE


def build_saes(
    given: Given | Mapping[str, Given], lm: nn.Module | None, train_dataset: Any, seed: int
) -> dict[str, SwitchSAE]:
    """SAEs by name, in float32 or more, each knowing its place and its language model.

    Raises:
        ConfigError: a place is missing, or what is given is no SAE and no configuration.
        HookpointError: there is no such place.
    """
    several = given if isinstance(given, Mapping) else {"": given}
    if not several:
        raise ConfigError("there is no SAE to train: an empty dict was given.")
    set_seed(seed)
    saes: dict[str, SwitchSAE] = {}
    for name, each in several.items():
        if isinstance(each, SwitchSAEConfig):
            sae = SwitchSAE(_placed(each, lm, train_dataset))
        elif isinstance(each, SwitchSAE):
            _placed(each.config, lm, train_dataset)
            sae = each
            if each.dtype.itemsize < 4:
                nn.Module.float(each)
        else:
            raise ConfigError(
                f"an SAE to train is a SwitchSAEConfig or a SwitchSAE, not {type(each).__name__}."
            )
        if any(id(sae) == id(other) for other in saes.values()):
            raise ConfigError(f"the SAE {name!r} is there twice: give a copy.")
        saes[name or str(sae.config.hookpoint)] = sae
    return saes


def _placed(config: SwitchSAEConfig, lm: nn.Module | None, train_dataset: Any) -> SwitchSAEConfig:
    """The config with place and language model filled in."""
    if config.hookpoint is None:
        places: tuple[str, ...] = getattr(train_dataset, "hookpoints", ())
        if len(places) != 1:
            raise ConfigError(
                "the SAE's config has no hookpoint: give one, such as 'layers.7.resid_post'"
                + (f"; the activations have {', '.join(places)}." if places else ".")
            )
        config.hookpoint = str(places[0])
    if lm is not None:
        config.hookpoint = resolve(lm, config.hookpoint).name
        known = base_model_fields(lm)
        if config.base_model_fingerprint is None:
            config.base_model = config.base_model or known["base_model"]
            config.base_model_fingerprint = known["base_model_fingerprint"]
    return config


def activations_for(
    saes: Mapping[str, SwitchSAE],
    dataset: Any,
    lm: nn.Module | None,
    tokenizer: Any,
    settings: ActivationSettings | None,
) -> Activations:
    """The rows of a data set, or the activations that it is; checked to fit the SAEs.

    Raises:
        TrainingError: nothing to train on, or texts without a language model.
        HookpointError, WidthError: the activations are of other places, or of another width.
        TextError: see `LiveActivations`.
    """
    places = list(dict.fromkeys(str(sae.config.hookpoint) for sae in saes.values()))
    if dataset is None:
        raise TrainingError("there is nothing to train on: give train_dataset, texts or rows.")
    if isinstance(dataset, Activations):
        found = dataset
    elif lm is None:
        raise TrainingError("texts need a language model to become rows: give lm.")
    else:
        found = LiveActivations(lm, places, dataset, tokenizer, settings)
    for name, sae in saes.items():
        place = str(sae.config.hookpoint)
        if place not in found.hookpoints:
            raise HookpointError(
                f"the SAE {name} reads {place}; the activations are of "
                f"{', '.join(found.hookpoints)}."
            )
        if found.hidden_size[place] != sae.config.hidden_size:
            raise WidthError(
                f"the SAE {name} has hidden_size={sae.config.hidden_size}, and the rows at {place} "
                f"are {found.hidden_size[place]} wide: set hidden_size, or use SwitchSAE.for_lm."
            )
    return found
