"""What commands share: options of their own, and options that are fields of classes.

Room   The aliases below are the options that several commands have, each with its help text.
       `train` and `compare` also take every field of the classes they fill. typer knows none of
       these fields, so they are read from what follows the command.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from transformers import HfArgumentParser

from hf_switch_sae.comparison.plan import value_of
from hf_switch_sae.errors import ConfigError
from hf_switch_sae.training import ActivationSettings, SwitchSAETrainingArguments
from hf_switch_sae.training.arguments import nearest, sae_fields

# ---------------------------------------------------------------- options of several commands

SaeAddress = Annotated[str, typer.Argument(help="Hub id or folder of the SAE.")]
Subfolder = Annotated[str, typer.Option(help="Folder of the SAE within it.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]

LmAddress = Annotated[str, typer.Argument(help="Hub id or folder of the language model.")]
# apart from its alias, like COLUMN and SPLIT: `train` gives these no default
LM_DTYPE = typer.Option(help="Dtype of the language model.")
LmDtype = Annotated[str, LM_DTYPE]
DeviceMap = Annotated[str | None, typer.Option(help="Where the language model's weights go.")]
LmRevision = Annotated[str | None, typer.Option(help="Commit of the language model.")]
GgufFile = Annotated[str | None, typer.Option(help="A GGUF file in the language model's folder.")]
AllowMismatch = Annotated[
    bool, typer.Option(help="Accept another language model than the one the SAE was made for.")
]

Dataset = Annotated[
    str, typer.Argument(help="A .txt, .md, .jsonl or .parquet file, a folder, or a Hub id.")
]
COLUMN = typer.Option(help="The column with the text.")
Column = Annotated[str, COLUMN]
SPLIT = typer.Option(help="Split of a data set on the Hub.")
Split = Annotated[str, SPLIT]
ContextLength = Annotated[int, typer.Option(min=1, help="Tokens that the model sees at once.")]
Boundary = Annotated[
    str, typer.Option(help="Between documents: auto, bos, eos, none, or the text of a token.")
]
TokensPerPass = Annotated[
    int | None, typer.Option(min=1, help="Tokens in a forward pass of the model.")
]

Tokenizer = Annotated[
    str | None, typer.Option(help="Hub id or folder; by default the store's own.")
]
TokenizerGguf = Annotated[str | None, typer.Option(help="A GGUF file in the tokenizer's folder.")]

# ---------------------------------------------------------------- options that are fields

OF_ROWS = {each.name for each in fields(ActivationSettings)} - {"seed", "dtype"}
"""Fields of `ActivationSettings`; its seed and dtype are the run's."""
OF_RUN = {each.name for each in fields(SwitchSAETrainingArguments) if each.init}
"""Fields of the training arguments."""


def pairs_of(
    words: Sequence[str], first: str = "LM and DATASET come first, and two"
) -> dict[str, list[str]]:
    """`--a 1 --b=2 3 --c` -> {"a": ["1"], "b": ["2", "3"], "c": []}; dashes become underscores.

    Args:
        words: what follows a command.
        first: what a command takes before its options, for the error.

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
    """Sort options by whose they are: the run's, the SAE's, the rows', and the command's `own`.

    Raises:
        ConfigError: an option that is none of these; the error names the nearest.
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
    """The value of an option: words of the command line, or what a file has.

    Raises:
        ConfigError: there are several words.
    """
    if isinstance(words, str):  # YAML takes 1e-3 for a text
        words = [words]
    if not isinstance(words, list):
        return words
    if len(words) > 1:
        raise ConfigError(f"--{name} takes one value, not {' '.join(words)}.")
    return value_of(words[0] if words else "true")


class _Parser(HfArgumentParser):
    """A parser of a class's fields: it returns those that were typed, and raises ConfigError."""

    def add_argument(self, *names: Any, **how: Any) -> Any:
        # the default of a field would hide what the preset or the file has
        return super().add_argument(*names, **{**how, "default": argparse.SUPPRESS})

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage of all fields, and exit
        raise ConfigError(message)


def run_arguments(
    preset: Mapping[str, Any], in_file: Mapping[str, Any], on_line: Mapping[str, list[str]]
) -> SwitchSAETrainingArguments:
    """The arguments of a preset, changed by a file, and then by the command line.

    Args:
        preset, in_file: name -> value.
        on_line: name -> the words after it, as `pairs_of` returns them.

    Raises:
        ConfigError: a value that is not of the field's type, or that this machine can't do.
    """
    # a text in the file is parsed like a word; what was typed goes before it
    texts = {name: [value] for name, value in in_file.items() if isinstance(value, str)}
    words = [
        word
        for name, values in {**texts, **on_line}.items()
        # a bare --bf16 turns it on
        for word in (f"--{name}", *(values or ["true"]))
    ]
    parser = _Parser([SwitchSAETrainingArguments])  # type: ignore[list-item]
    given = vars(parser.parse_args(words))
    try:
        return SwitchSAETrainingArguments(**{**preset, **in_file, **given})
    except ValueError as err:  # such as --bf16 where there is no GPU
        raise ConfigError(str(err)) from err


def as_typed(context: typer.Context, leave_out: Container[str] = ()) -> str:
    """A command as it was typed, without what is the default and without this machine's folders.

    Args:
        context: of the command; words that it does not declare come last, as they are.
        leave_out: parameters that don't change what the command makes.
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
    """The last name of a path on this machine; anything else as it is."""
    return Path(word).name if Path(str(word)).is_absolute() else str(word)
