"""A language model and text -> released SAEs: trained, measured, described, published.

Room   `train_release` joins what else is called one by one: a cache of activations if one is
       wanted, `SwitchSAETrainer`, `evaluate` on held-out text, the card, a push to the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_switch_sae.activations.cache_files import read_manifest
from hf_switch_sae.activations.cache_reader import CachedActivations
from hf_switch_sae.activations.cache_writer import cache_activations
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.errors import ConfigError, TrainingError
from hf_switch_sae.evaluation.evaluate import evaluate, write_metrics
from hf_switch_sae.hub.layout import NOTES, in_checkpoint
from hf_switch_sae.lm.hookpoints import resolve
from hf_switch_sae.release.card import write_card
from hf_switch_sae.sae.config import SwitchSAEConfig
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.text.documents import read_documents
from hf_switch_sae.training.arguments import SAE_PRESETS, SwitchSAETrainingArguments
from hf_switch_sae.training.trainer import SwitchSAETrainer


@dataclass(frozen=True)
class TrainedRelease:
    """What `train_release` has made."""

    folder: Path
    saes: tuple[str, ...]
    """The SAEs' subfolders, which are the names of their hookpoints."""
    tokens: int
    """How many tokens they were trained on."""
    log: list[dict[str, Any]]
    """What the trainer has logged."""
    metrics: dict[str, dict[str, Any]]
    """Subfolder -> content of its metrics.json; {} if there is no held-out text, and on all
    processes but the first."""


def train_release(
    lm: nn.Module,
    tokenizer: Any,
    dataset: Any,
    hookpoints: int | str | Sequence[int | str],
    args: SwitchSAETrainingArguments,
    sae: Mapping[str, Any] | None = None,
    *,
    preset: str = "default",
    activation_settings: ActivationSettings | None = None,
    column: str = "text",
    split: str = "train",
    cache: str | Path | None = None,
    cache_rows: int | None = None,
    lm_revision: str | None = None,
    eval_dataset: Any = None,
    eval_tokens: int | None = None,
    command: str | None = None,
) -> TrainedRelease:
    """Train an SAE at each hookpoint of a language model, and make a release of them.

        texts = [...]
        args = SwitchSAETrainingArguments(output_dir="my-saes", num_train_tokens=10_000_000)
        train_release(lm, tokenizer, texts, 15, args, {"num_features": 24_576, "k": 32})
        sae = SwitchSAE.from_pretrained("my-saes", subfolder="layers.15.resid_post")

    `args.output_dir` gets a subfolder for each SAE, with its config, weights and statistics,
    training.json (arguments and log) and, if there is held-out text, metrics.json; and README.md,
    the card. With `args.push_to_hub` the release is then published.

    Args:
        lm: the language model, in eval mode. With a head, `eval_dataset` also measures what its
            predictions lose.
        tokenizer: the model's.
        dataset: anything that `text.read_documents` takes.
        hookpoints: layers, hookpoints or module paths.
        args: the run's arguments. With `resume_from_checkpoint` an interrupted run continues.
        sae: fields of `SwitchSAEConfig` for every SAE, on top of the preset's; not `hookpoint`.
        preset: key of `SAE_PRESETS`; for "published" take `args` from
            `SwitchSAETrainingArguments.preset("published", ...)`.
        activation_settings: how text becomes rows; the default takes its seed from `args`.
        column, split: of the data sets, see `text.read_documents`.
        cache: folder of a cache to fill first and then train from; one that is complete is used
            as it is. Without it rows are computed while training.
        cache_rows: fill the cache to so many rows; by default with the whole text.
        lm_revision: the commit that `lm` was loaded from, to note in the cache.
        eval_dataset: held-out text, like `dataset`.
        eval_tokens: how many of its tokens to measure on, at most.
        command: the command line to note in training.json.

    Raises:
        TrainingError: `args.output_dir` holds a finished SAE, a checkpoint is damaged, or the disk
            is full.
        ConfigError, HookpointError, WidthError, TextError: the arguments do not fit together.
        StoreError, BaseModelError: the cache is damaged, or of other rows or another model.
        NonFiniteError: the loss is NaN or infinite.
        HubError: the Hub refuses, or can't be reached.
    """
    seed = args.seed if args.data_seed is None else args.data_seed
    settings = activation_settings or ActivationSettings(seed=seed)
    # the command line has checked this already; a call from Python has not
    check_before_loading(args, settings, sae, preset, eval_tokens)
    wanted = [hookpoints] if isinstance(hookpoints, int | str) else list(hookpoints)
    # the SAE's folder gets this name, however its place was written
    names = [resolve(lm, at).name for at in wanted]

    # of several processes, the first fills the cache, and the others then find it complete
    source: dict[str, Any] = {"column": column, "split": split}
    with args.main_process_first(local=False, desc="the activation cache"):
        if cache is None:
            rows: Any = read_documents(dataset, **source)
        else:
            data = (names, dataset, Path(cache), tokenizer, settings)
            rows = _from_cache(lm, *data, cache_rows, lm_revision, source)

    held_out = None if eval_dataset is None else read_documents(eval_dataset, **source)
    fields = {**SAE_PRESETS[preset], **(sae or {})}
    trainer = SwitchSAETrainer(
        {name: _config(lm, name, fields) for name in names},
        lm,
        args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        activation_settings=settings,
    )
    trainer.command = command
    trainer.train()

    # not pushed by save_model, but below, once card and metrics are there
    trainer.save_model(_internal_call=True)
    metrics = {}
    if trainer.is_world_process_zero():
        if held_out is not None:
            text = (held_out, tokenizer, settings)
            metrics = {name: _measured(trainer, name, text, eval_tokens) for name in trainer.saes}
        _publish(trainer)
    folder, state = Path(str(args.output_dir)), trainer.state
    return TrainedRelease(
        folder, tuple(trainer.saes), state.num_input_tokens_seen, state.log_history, metrics
    )


def check_before_loading(
    args: SwitchSAETrainingArguments,
    settings: ActivationSettings,
    sae: Mapping[str, Any] | None,
    preset: str,
    eval_tokens: int | None,
) -> None:
    """Raise for whatever `train_release` would refuse without looking at the language model.

    Raises:
        ConfigError: the arguments do not fit together.
        TrainingError: `args.output_dir` holds a finished SAE, and the run would not resume.
    """
    if preset not in SAE_PRESETS:
        raise ConfigError(f"no preset {preset!r}; there are {', '.join(SAE_PRESETS)}.")
    if eval_tokens is not None and eval_tokens < settings.context:
        raise ConfigError(
            f"eval_tokens {eval_tokens} is less than one context of {settings.context}."
        )
    # built only to be checked: the model decides the width later
    SwitchSAEConfig(**{**SAE_PRESETS[preset], **(sae or {})})
    folder = Path(str(args.output_dir))
    done = [
        file.parent for file in sorted(folder.glob(f"**/{NOTES}")) if _is_finished(file, folder)
    ]
    if done and not args.resume_from_checkpoint:
        raise TrainingError(
            f"{done[0]} holds an SAE that a run has finished: choose another output_dir, or "
            "remove it; resume_from_checkpoint=True trains it further."
        )


def _is_finished(notes: Path, folder: Path) -> bool:
    """Whether an SAE's notes in a run's folder are those of a finished run."""
    # relative, as the run's folder itself may have a checkpoint's name
    place = notes.relative_to(folder)
    # checkpoints hold notes too; a name with a dot is of a save that was killed
    return not in_checkpoint(place) and not any(part.startswith(".") for part in place.parts)


def _from_cache(
    lm: nn.Module,
    hookpoints: list[str],
    dataset: Any,
    folder: Path,
    tokenizer: Any,
    settings: ActivationSettings,
    max_rows: int | None,
    lm_revision: str | None,
    source: dict[str, Any],
) -> CachedActivations:
    """The rows of a cache, which is filled first unless it is complete."""
    found = read_manifest(folder)
    # asked for a number of rows, a complete cache may have to continue
    if max_rows is not None or found is None or "complete" not in found:
        source = {**source, "lm_revision": lm_revision, "max_rows": max_rows}
        cache_activations(lm, hookpoints, dataset, folder, tokenizer, settings, **source)
    order = {"buffer_bytes": settings.buffer_bytes, "seed": settings.seed}
    return CachedActivations(folder, hookpoints, lm=lm, lm_revision=lm_revision, **order)  # type: ignore[arg-type]


def _config(lm: nn.Module, hookpoint: str, fields: Mapping[str, Any]) -> SwitchSAEConfig:
    """The config of an SAE for a hookpoint of the model."""
    with torch.device("meta"):  # only the config is wanted; weights are made later, from the seed
        return SwitchSAE.for_lm(lm, hookpoint, **fields).config


def _measured(
    trainer: SwitchSAETrainer,
    name: str,
    text: tuple[Any, Any, ActivationSettings],
    most: int | None,
) -> dict[str, Any]:
    """Measure an SAE as it was saved, in the dtype of its file, and write metrics.json."""
    assert trainer.lm is not None
    folder = Path(str(trainer.args.output_dir), name)
    sae = SwitchSAE.from_pretrained(folder)
    nn.Module.to(sae, trainer.saes[name].device)
    # alone, as only the first process comes here
    return write_metrics(folder, evaluate(sae, trainer.lm, *text, max_tokens=most, alone=True))


def _publish(trainer: SwitchSAETrainer) -> None:
    """Write the card beside the SAEs, and push them if the arguments say so."""
    folder = Path(str(trainer.args.output_dir))
    # resolved, because the folder "." has no name
    write_card(folder, trainer.args.hub_model_id or folder.resolve().name)
    if trainer.args.push_to_hub:
        trainer.push_release(folder, "Release")
