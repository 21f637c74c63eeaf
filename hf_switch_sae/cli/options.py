"""Options that are fields of classes: what follows a command -> names and values."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import typer
from transformers import HfArgumentParser

from hf_switch_sae.errors import ConfigError
from hf_switch_sae.training import ActivationSettings, SwitchSAETrainingArguments
from hf_switch_sae.training.arguments import nearest, sae_fields

OF_ROWS = {each.name for each in fields(ActivationSettings)} - {"seed", "dtype"}
OF_RUN = {each.name for each in fields(SwitchSAETrainingArguments) if each.init}


def pairs_of(
    words: Sequence[str], first: str = "LM and DATASET come first, and two"
) -> dict[str, list[str]]:
    """`--a 1 --b=2 3 --c` -> {"a": ["1"], "b": ["2", "3"], "c": []}; dashes become underscores.

    Raises:
        ConfigError: a word that belongs to no option.
    """
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if has_value else []
        elif name is None:
            raise ConfigError(f"{word!r} belongs to no option: {first}.")
        else:
            found[name].append(word)
    return found


def split_options(
    options: Mapping[str, Any], own: set[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """By whose they are: the run's arguments, the SAE's config, the rows' settings, and `own`.

    Raises:
        ConfigError: an option of none of them, naming the nearest.
    """
    groups: tuple[dict[str, Any], ...] = ({}, {}, {}, {})
    names = (OF_RUN, sae_fields(), OF_ROWS, own)
    for name, value in options.items():
        for group, known in zip(groups, names, strict=True):
            if name in known:
                group[name] = value
                break
        else:
            raise ConfigError(f"there is no option --{name}; {nearest(name, set().union(*names))}")
    return groups  # type: ignore[return-value]


def typed(name: str, words: Any) -> Any:
    """A value as it was written: a number, true, false, none, JSON or text.

    Raises:
        ConfigError: none, or several.
    """
    if isinstance(words, str):  # YAML takes 1e-3 for a text
        words = [words]
    if not isinstance(words, list):
        return words
    if len(words) > 1:
        raise ConfigError(f"--{name} takes one value, not {' '.join(words)}.")
    word = words[0] if words else "true"
    plain = {"true": True, "false": False, "none": None, "null": None}
    if word.lower() in plain:
        return plain[word.lower()]
    for kind in (int, float, json.loads):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def run_arguments(
    preset: Mapping[str, Any], told: Mapping[str, Any], spoken: Mapping[str, list[str]]
) -> SwitchSAETrainingArguments:
    """Arguments of a preset, changed by a file's values, and then by words of the command line.

    Raises:
        ConfigError: a word that is none of the field's type, or that this machine can't do.
    """
    texts = {name: [value] for name, value in told.items() if isinstance(value, str)}
    told = {name: value for name, value in told.items() if name not in {**texts, **spoken}}
    spoken = {**texts, **spoken}
    words = [
        word for name, values in spoken.items() for word in (f"--{name}", *(values or ["true"]))
    ]
    parser = HfArgumentParser([SwitchSAETrainingArguments], argument_default=argparse.SUPPRESS)  # type: ignore[list-item]
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what was said
    parser.error = _refuse  # type: ignore[method-assign]
    values = {**preset, **told, **vars(parser.parse_args(words))}
    try:
        return SwitchSAETrainingArguments(**values)
    except ValueError as err:  # as of --bf16 where there is no GPU
        raise ConfigError(str(err)) from err


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


def as_typed(context: typer.Context, leave_out: Container[str] = ()) -> str:
    """A command as it was typed, but for what is the default, and without this machine's folders.

    Args:
        context: of the command; words that it does not declare come last, as they are.
        leave_out: parameters that are no part of what the command makes.
    """
    words = [str(context.command.name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in leave_out or value in (None, [], (), parameter.default):
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            option = [] if parameter.param_type_name == "argument" else [parameter.opts[0]]
            words += [*option, short(each)]
    return shlex.join(["hf-switch-sae", *words, *context.args])


def short(word: Any) -> str:
    """A folder of this machine by its last name; anything else as it is."""
    return Path(word).name if Path(str(word)).is_absolute() else str(word)
