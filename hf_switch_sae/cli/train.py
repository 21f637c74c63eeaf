"""`hf-switch-sae train`: from a language model and text to a saved SAE, in one command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_switch_sae.activations.cache_files import read_manifest
from hf_switch_sae.cli.options import pairs_of, run_arguments, short, split_options, typed
from hf_switch_sae.errors import ConfigError, TrainingError
from hf_switch_sae.evaluation.evaluate import write_metrics
from hf_switch_sae.hub.layout import NOTES
from hf_switch_sae.lm.hookpoints import resolve
from hf_switch_sae.lm.loading import has_head, load_lm
from hf_switch_sae.release.card import write_card
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.training import (
    ActivationSettings,
    CachedActivations,
    SwitchSAETrainer,
    SwitchSAETrainingArguments,
    cache_activations,
    evaluate,
)
from hf_switch_sae.training.arguments import PRESETS, SAE_PRESETS, read_options

_OWN = {"layer", "config", "preset", "cache", "eval_dataset", "column", "split", "lm_dtype"}
_OWN |= {"device_map", "revision", "gguf_file", "cache_rows", "eval_tokens"}
_NUMBERS = {"cache_rows", "eval_tokens"}


def train(
    context: typer.Context,
    lm: Annotated[str, typer.Argument(help="Hub id or folder of the language model.")],
    dataset: Annotated[
        str, typer.Argument(help="A .txt, .md, .jsonl or .parquet file, a folder, or a Hub id.")
    ],
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Layer, hookpoint or module path; several for an SAE at each."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A .yaml or .json file of options.")] = None,
    preset: Annotated[str | None, typer.Option(help="default, or published: the paper's.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of activations: filled first, then trained from.")
    ] = None,
    cache_rows: Annotated[int | None, typer.Option(help="Fill it to so many tokens.")] = None,
    eval_dataset: Annotated[
        str | None, typer.Option(help="Held-out text, as DATASET: metrics.json is measured on it.")
    ] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Of it, at most.")] = None,
    column: Annotated[str | None, typer.Option(help="The column with the text.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hub data set.")] = None,
    lm_dtype: Annotated[str | None, typer.Option(help="Of the language model.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Where its weights go.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the language model.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file in LM's folder.")] = None,
) -> None:
    """Train an SAE, or one at each of several layers, and save it in --output_dir.

    The folder is a release: config, weights and statistics of each SAE, training.json with the
    command and its log, metrics.json, a card. Where LM is a folder, --base_model says its Hub id.

    LM and DATASET come first. Options are also all fields of transformers.TrainingArguments
    (--output_dir, --num_train_tokens, --learning_rate, --resume_from_checkpoint true, ...), of
    SwitchSAEConfig (--num_features, --num_experts, --k, ...) and of ActivationSettings (--context,
    --buffer_bytes, ...). The command line goes before --config.
    """
    if lm.startswith("--") or dataset.startswith("--"):
        raise ConfigError(
            "LM and DATASET come first: hf-switch-sae train LM DATASET --layer 15 ..."
        )
    args, settings, sae_said, own = _told(context, config)
    _train(lm, dataset, args, settings, sae_said, own, _command(context, own))


def _train(
    lm: str,
    dataset: str,
    args: SwitchSAETrainingArguments,
    settings: ActivationSettings,
    sae_said: dict[str, Any],
    own: dict[str, Any],
    command: str,
) -> None:
    """From what was told to a release in `args.output_dir`."""
    most = own.get("eval_tokens")
    if most is not None and most < settings.context:
        raise ConfigError(f"--eval_tokens {most} is less than one context of {settings.context}.")
    _check_folder(args)
    places = _places(own.get("layer"), sae_said.pop("hookpoint", None))
    SwitchSAEConfig(**sae_said)  # numbers that contradict each other are told before the LM loads
    model, tokenizer = load_lm(
        lm,
        str(own.get("lm_dtype", "auto")),
        own.get("device_map"),
        own.get("revision"),
        with_head=_needs_head(lm, own),
        gguf_file=own.get("gguf_file"),
        places=places,
    )
    names = [resolve(model, at).name for at in places]
    source: dict[str, Any] = {
        "column": own.get("column") or "text",
        "split": own.get("split") or "train",
    }
    with args.main_process_first(local=False, desc="the activation cache"):
        rows = _rows(model, tokenizer, names, dataset, source, settings, own)
    saes = {at: _config(model, at, sae_said) for at in names}
    held_out = own.get("eval_dataset")
    held_out = None if held_out is None else read_documents(held_out, **source)
    trainer = SwitchSAETrainer(
        saes,
        model,
        args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        activation_settings=settings,
    )
    trainer.command = command
    trainer.train()
    trainer.save_model(_internal_call=True)  # pushed when all of it is there
    if trainer.is_world_process_zero():
        metrics = {
            name: _measured(trainer, name, (held_out, tokenizer, settings), most)
            for name in (trainer.saes if held_out is not None else ())
        }
        _release(trainer, metrics)


def _check_folder(args: SwitchSAETrainingArguments) -> None:
    """Raise where a run that begins anew would write over an SAE that is finished."""
    folder = Path(str(args.output_dir))
    done = sorted(
        file.parent
        for file in folder.glob(f"**/{NOTES}")
        if not any(part.startswith(PREFIX_CHECKPOINT_DIR) for part in file.parts)
    )
    if done and not args.resume_from_checkpoint:
        raise TrainingError(
            f"{done[0]} holds an SAE that a run has finished: choose another --output_dir, or "
            "remove it; --resume_from_checkpoint true trains it further."
        )


def _told(
    context: typer.Context, config: Path | None
) -> tuple[SwitchSAETrainingArguments, ActivationSettings, dict[str, Any], dict[str, Any]]:
    """The run's arguments, the rows' settings, the SAE's fields and the command's own options."""
    run, sae, rows, own = split_options(read_options(config) if config is not None else {}, _OWN)
    here = {name: value for name, value in context.params.items() if name in _OWN}
    own |= {name: value for name, value in here.items() if value not in (None, [], ())}
    run_said, sae_said, rows_said, own_said = split_options(pairs_of(context.args), _OWN)
    # those that were spelled with underscores
    own |= {name: _own_value(name, words) for name, words in own_said.items()}
    name = str(own.get("preset", "default"))
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
    args = run_arguments(PRESETS[name], run, run_said)
    settings = ActivationSettings(
        **{name: typed(name, value) for name, value in {**rows, **rows_said}.items()},
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    told = {name: typed(name, value) for name, value in {**sae, **sae_said}.items()}
    sae = {**SAE_PRESETS[name], **told}
    return args, settings, sae, own


def _own_value(name: str, words: list[str]) -> Any:
    """Of one of the command's own options, as typer would give it."""
    if name == "layer":
        return words
    value = typed(name, words)
    if name in _NUMBERS and not isinstance(value, int):
        raise ConfigError(f"--{name} takes a whole number, not {value!r}.")
    return value if name in _NUMBERS else " ".join(words)


def _places(layers: Any, hookpoint: Any) -> list[int | str]:
    """The places asked for, layers as numbers."""
    found = [*(layers if isinstance(layers, list | tuple) else [layers]), hookpoint]
    places = [at for at in found if at is not None]
    if not places:
        raise ConfigError("where is the SAE to read? Give --layer 15, or --hookpoint.")
    return [int(at) if str(at).isdecimal() else str(at) for at in places]


def _rows(
    model: torch.nn.Module,
    tokenizer: Any,
    names: list[str],
    dataset: str,
    source: dict[str, Any],
    settings: ActivationSettings,
    own: dict[str, Any],
) -> Any:
    """Documents, or the activations of a cache that has been filled with them."""
    if own.get("cache") is None:
        return read_documents(dataset, **source)
    folder, revision = Path(own["cache"]), own.get("revision")
    wanted = own.get("cache_rows")
    if wanted is not None or not _is_complete(folder):  # goes on where it was
        cache_activations(
            model,
            names,
            dataset,
            folder,
            tokenizer,
            settings,
            **source,
            lm_revision=revision,
            max_rows=wanted,
        )
    return CachedActivations(
        folder,
        names,
        lm=model,
        lm_revision=revision,
        buffer_bytes=settings.buffer_bytes,
        seed=settings.seed,
    )


def _is_complete(folder: Path) -> bool:
    found = read_manifest(folder)
    return found is not None and "complete" in found


def _config(model: torch.nn.Module, at: str, told: dict[str, Any]) -> SwitchSAEConfig:
    """The config of an SAE for a place of the model."""
    with torch.device("meta"):  # its weights are made later, from the seed
        return SwitchSAE.for_lm(model, at, **told).config


def _needs_head(lm: str, own: dict[str, Any]) -> bool:
    """Whether predictions will be measured; a GGUF file is always loaded whole."""
    if own.get("gguf_file") is not None:
        return True
    return own.get("eval_dataset") is not None and has_head(lm, own.get("revision"))


def _command(context: typer.Context, own: dict[str, Any]) -> str:
    """What was typed, without this machine's folders and what concerns an account on the Hub."""
    given = {name: context.params[name] for name in ("lm", "dataset")}
    words = ["hf-switch-sae", "train", *map(short, given.values())]
    told = {name: own[name] if isinstance(own[name], list) else [own[name]] for name in own}
    extra = {
        name: values
        for name, values in pairs_of(context.args).items()
        if name not in own and not name.startswith(("hub_", "push_"))
    }
    for name, values in {**told, **extra}.items():
        if name == "layer":
            words += [word for value in values for word in ("--layer", short(value))]
        else:
            words += [f"--{name}", *map(short, values)]
    return shlex.join(words)


def _measured(
    trainer: SwitchSAETrainer,
    name: str,
    text: tuple[Any, Any, ActivationSettings],
    most: int | None,
) -> dict[str, Any]:
    """metrics.json of an SAE as it was saved."""
    assert trainer.lm is not None
    folder = Path(str(trainer.args.output_dir), name)
    sae = SwitchSAE.from_pretrained(folder)
    torch.nn.Module.to(sae, trainer.saes[name].device)
    return write_metrics(folder, evaluate(sae, trainer.lm, *text, max_tokens=most, alone=True))


def _release(trainer: SwitchSAETrainer, metrics: dict[str, Any]) -> None:
    """Write the card beside the SAEs, publish them if asked to, and say what there is."""
    folder = Path(str(trainer.args.output_dir))
    write_card(folder, trainer.args.hub_model_id or folder.resolve().name)
    if trainer.args.push_to_hub:
        trainer.push_release(folder, "Release")
    for name in trainer.saes:
        print(f"{folder}/{name}: {trainer.state.num_input_tokens_seen:,} tokens")
    measured = metrics or _last(trainer.state.log_history)
    for figures in metrics.values():  # a histogram is to be read from metrics.json
        figures.pop("density", None)
    if measured:  # a run shorter than --logging_steps logs none
        print(json.dumps(measured, indent=2))


def _last(history: list[dict[str, Any]]) -> dict[str, Any]:
    """What was logged last of the steps."""
    return next((entry for entry in reversed(history) if "loss" in entry), {})
