"""`hf-switch-sae train`: from a language model and text to a saved SAE, in one command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_switch_sae.cli.options import (
    COLUMN,
    LM_DTYPE,
    SPLIT,
    Dataset,
    DeviceMap,
    GgufFile,
    LmAddress,
    LmRevision,
    pairs_of,
    run_arguments,
    short,
    split_options,
    typed,
)
from hf_switch_sae.errors import ConfigError
from hf_switch_sae.lm.loading import has_head, load_lm
from hf_switch_sae.training import (
    ActivationSettings,
    SwitchSAETrainingArguments,
    TrainedRelease,
    train_release,
)
from hf_switch_sae.training.arguments import PRESETS, read_options
from hf_switch_sae.training.pipeline import check_before_loading

_OWN = {"layer", "config", "preset", "cache", "eval_dataset", "column", "split", "lm_dtype"}
_OWN |= {"device_map", "revision", "gguf_file", "cache_rows", "eval_tokens"}
_NUMBERS = {"cache_rows", "eval_tokens"}


def train(
    context: typer.Context,
    lm: LmAddress,
    dataset: Dataset,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Layer, hookpoint or module path; repeat it for an SAE at each."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A .yaml or .json file of options.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="The preset: default, or published (the paper's).")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of activations, which is filled first and then trained from."),
    ] = None,
    cache_rows: Annotated[
        int | None, typer.Option(help="Fill the cache to so many tokens.")
    ] = None,
    eval_dataset: Annotated[
        str | None, typer.Option(help="Held-out text, as DATASET, to measure metrics.json on.")
    ] = None,
    eval_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of the held-out text to use.")
    ] = None,
    column: Annotated[str | None, COLUMN] = None,
    split: Annotated[str | None, SPLIT] = None,
    lm_dtype: Annotated[str | None, LM_DTYPE] = None,
    device_map: DeviceMap = None,
    revision: LmRevision = None,
    gguf_file: GgufFile = None,
) -> None:
    """Train SAEs on a language model, one at each layer named.

    --output_dir becomes a release: config, weights and statistics of each SAE, training.json with
    the command and its log, metrics.json, and a card. If LM is a folder, --base_model gives its Hub
    id.

    LM and DATASET come first. The fields of these classes are options too:
    transformers.TrainingArguments (--output_dir, --num_train_tokens, --learning_rate,
    --resume_from_checkpoint true, ...), SwitchSAEConfig (--num_features, --num_experts, --k, ...)
    and ActivationSettings (--context, --buffer_bytes, ...). The command line overrides --config.
    """
    # unknown options are let through, so one before LM would be taken for it
    if lm.startswith("--") or dataset.startswith("--"):
        raise ConfigError(
            "LM and DATASET come first: hf-switch-sae train LM DATASET --layer 15 ..."
        )
    args, settings, sae, own = _options_of(context, config)
    release = _train(lm, dataset, args, settings, sae, own, _command(context, own))
    if args.process_index == 0:
        _show(release)


def _train(
    lm: str,
    dataset: str,
    args: SwitchSAETrainingArguments,
    settings: ActivationSettings,
    sae: dict[str, Any],
    own: dict[str, Any],
    command: str,
) -> TrainedRelease:
    """Load the language model, and train as the options say."""
    preset, eval_tokens = str(own.get("preset", "default")), own.get("eval_tokens")
    # taken out, as `train_release` gives each SAE its own
    hookpoints = _hookpoints(own.get("layer"), sae.pop("hookpoint", None))
    check_before_loading(args, settings, sae, preset, eval_tokens)  # loading may take minutes
    model, tokenizer = load_lm(
        lm,
        str(own.get("lm_dtype", "auto")),
        own.get("device_map"),
        own.get("revision"),
        with_head=_needs_head(lm, own),
        gguf_file=own.get("gguf_file"),
        places=hookpoints,
    )
    return train_release(
        model,
        tokenizer,
        dataset,
        hookpoints,
        args,
        sae,
        preset=preset,
        activation_settings=settings,
        column=own.get("column") or "text",
        split=own.get("split") or "train",
        cache=own.get("cache"),
        cache_rows=own.get("cache_rows"),
        lm_revision=own.get("revision"),
        eval_dataset=own.get("eval_dataset"),
        eval_tokens=eval_tokens,
        command=command,
    )


def _options_of(
    context: typer.Context, config: Path | None
) -> tuple[SwitchSAETrainingArguments, ActivationSettings, dict[str, Any], dict[str, Any]]:
    """The run's arguments, the rows' settings, the SAE's fields and the command's own options.

    The command line overrides --config, which overrides the preset.
    """
    run, sae, rows, own = split_options(read_options(config) if config is not None else {}, _OWN)
    here = {name: value for name, value in context.params.items() if name in _OWN}
    # an option that was not typed must not override the file
    own |= {name: value for name, value in here.items() if value not in (None, [], ())}
    run_typed, sae_typed, rows_typed, own_typed = split_options(pairs_of(context.args), _OWN)
    # typer knows its options by their dashes only; these were spelled with underscores
    own |= {name: _own_value(name, words) for name, words in own_typed.items()}
    name = str(own.get("preset", "default"))
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
    args = run_arguments(PRESETS[name], run, run_typed)
    settings = ActivationSettings(
        **{name: typed(name, value) for name, value in {**rows, **rows_typed}.items()},
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    sae = {name: typed(name, value) for name, value in {**sae, **sae_typed}.items()}
    return args, settings, sae, own


def _own_value(name: str, words: list[str]) -> Any:
    """The value of one of the command's own options, as typer would give it."""
    if name == "layer":
        return words
    value = typed(name, words)
    if name in _NUMBERS and not isinstance(value, int):
        raise ConfigError(f"--{name} takes a whole number, not {value!r}.")
    return value if name in _NUMBERS else " ".join(words)


def _hookpoints(layers: Any, hookpoint: Any) -> list[int | str]:
    """The hookpoints asked for, layers as numbers."""
    asked = [*(layers if isinstance(layers, list | tuple) else [layers]), hookpoint]
    found = [at for at in asked if at is not None]
    if not found:
        raise ConfigError("where is the SAE to read? Give --layer 15, or --hookpoint.")
    return [int(at) if str(at).isdecimal() else str(at) for at in found]


def _needs_head(lm: str, own: dict[str, Any]) -> bool:
    """Whether predictions will be measured; a GGUF file is always loaded whole."""
    if own.get("gguf_file") is not None:
        return True
    return own.get("eval_dataset") is not None and has_head(lm, own.get("revision"))


def _command(context: typer.Context, own: dict[str, Any]) -> str:
    """The command line, without this machine's folders and what concerns an account on the Hub."""
    given = {name: context.params[name] for name in ("lm", "dataset")}
    words = ["hf-switch-sae", "train", *map(short, given.values())]
    options = {name: own[name] if isinstance(own[name], list) else [own[name]] for name in own}
    extra = {
        name: values
        for name, values in pairs_of(context.args).items()
        if name not in own and not name.startswith(("hub_", "push_"))
    }
    for name, values in {**options, **extra}.items():
        if name == "layer":
            words += [word for value in values for word in ("--layer", short(value))]
        else:
            words += [f"--{name}", *map(short, values)]
    return shlex.join(words)


def _show(release: TrainedRelease) -> None:
    """Print what there is, and the figures: those of held-out text, or else the last logged."""
    for name in release.saes:
        print(f"{release.folder}/{name}: {release.tokens:,} tokens")
    metrics = {
        # a histogram is to be read from metrics.json
        name: {figure: value for figure, value in figures.items() if figure != "density"}
        for name, figures in release.metrics.items()
    }
    measured = metrics or _last(release.log)
    if measured:  # a run shorter than --logging_steps logs none
        print(json.dumps(measured, indent=2))


def _last(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The last entry that was logged at a step."""
    return next((entry for entry in reversed(history) if "loss" in entry), {})
