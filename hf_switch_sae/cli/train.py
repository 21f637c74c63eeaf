"""`hf-switch-sae train`: from a language model and text to a saved SAE, in one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_switch_sae.cli.language_model import load_lm
from hf_switch_sae.cli.options import pairs_of, run_arguments, split_options, typed
from hf_switch_sae.config import SwitchSAEConfig
from hf_switch_sae.errors import ConfigError
from hf_switch_sae.hookpoints import resolve
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.text import read_documents
from hf_switch_sae.training import (
    ActivationSettings,
    CachedActivations,
    SwitchSAETrainer,
    cache_activations,
)
from hf_switch_sae.training.arguments import PRESETS, read_options
from hf_switch_sae.training.cache import read_manifest

_OWN = {"layer", "config", "preset", "cache", "eval_dataset", "column", "split", "lm_dtype"}
_OWN |= {"device_map", "revision", "gguf_file", "cache_rows"}


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
    eval_dataset: Annotated[str | None, typer.Option(help="Held-out text, as DATASET.")] = None,
    column: Annotated[str | None, typer.Option(help="The column with the text.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hub data set.")] = None,
    lm_dtype: Annotated[str | None, typer.Option(help="Of the language model.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Where its weights go.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the language model.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file in LM's folder.")] = None,
) -> None:
    """Train an SAE, or one at each of several layers, and save it in --output_dir.

    LM and DATASET come first. Every field of transformers.TrainingArguments is an option
    (--output_dir, --num_train_tokens, --per_device_train_batch_size in tokens, --learning_rate,
    --report_to, --resume_from_checkpoint true, --push_to_hub, ...), and so is every one of
    SwitchSAEConfig (--num_features, --num_experts, --k, --activation, ...) and of
    ActivationSettings (--context, --boundary, --buffer_bytes, ...). Options of the command line go
    before those of --config.
    """
    if lm.startswith("--") or dataset.startswith("--"):
        raise ConfigError(
            "LM and DATASET come first: hf-switch-sae train LM DATASET --layer 15 ..."
        )
    here = {name: value for name, value in context.params.items() if name in _OWN}
    run_told, sae_told, rows_told, own = split_options(
        read_options(config) if config is not None else {}, _OWN
    )
    own |= {name: value for name, value in here.items() if value not in (None, [], ())}
    run_said, sae_said, rows_said, _ = split_options(pairs_of(context.args), _OWN)
    name = str(own.get("preset", "default"))
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
    args = run_arguments(PRESETS[name], run_told, run_said)
    settings = ActivationSettings(
        **{name: typed(name, value) for name, value in {**rows_told, **rows_said}.items()},
        seed=args.data_seed if args.data_seed is not None else args.seed,
    )
    sae_said = {name: typed(name, value) for name, value in {**sae_told, **sae_said}.items()}
    places = _places(own.get("layer"), sae_said.pop("hookpoint", None))
    SwitchSAEConfig(**sae_said)  # numbers that contradict each other are told before the LM loads
    model, tokenizer = load_lm(
        lm,
        str(own.get("lm_dtype", "auto")),
        own.get("device_map"),
        own.get("revision"),
        with_head=own.get("gguf_file") is not None,
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
    trainer = SwitchSAETrainer(
        saes,
        model,
        args,
        train_dataset=rows,
        eval_dataset=None if held_out is None else read_documents(held_out, **source),
        processing_class=tokenizer,
        activation_settings=settings,
    )
    trainer.train()
    if held_out is not None:
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        for at in names:
            print(f"{args.output_dir}/{at}: {trainer.state.num_input_tokens_seen:,} tokens")
        figures = trainer.held_out or {}
        print(json.dumps(figures or _last(trainer.state.log_history), indent=2))


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


def _last(history: list[dict[str, Any]]) -> dict[str, Any]:
    """What was logged last of the steps."""
    return next((entry for entry in reversed(history) if "loss" in entry), {})
