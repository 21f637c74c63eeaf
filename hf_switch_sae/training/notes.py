"""How an SAE was trained, written beside it as training.json."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_switch_sae.activations.interface import Activations
from hf_switch_sae.files import write_json
from hf_switch_sae.hub.layout import NOTES
from hf_switch_sae.sae.model import SwitchSAE

# arguments that tell of a machine or an account (by prefix), and those that follow from others
_PRIVATE = ("output_dir", "logging_dir", "hub_", "push_", "local_rank", "use_cpu", "disable_tqdm")
_FOLLOWS = {"accelerator_config", "report_to", "run_name", "debug", "resume_from_checkpoint"}


def write_notes(
    folder: Path, sae: SwitchSAE, activations: Activations, run: dict[str, Any]
) -> None:
    """Write training.json for an SAE.

    Args:
        folder: the SAE's own.
        sae, activations: what was trained, and on what.
        run: what else to note: arguments, steps, tokens, log.
    """
    notes = {
        "hookpoint": sae.config.hookpoint,
        "base_model": sae.config.base_model,
        "policy": activations.policy,
        **run,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_json(folder / NOTES, notes, default=str)


def arguments_of(args: Any) -> dict[str, Any]:
    """A run's arguments that differ from their defaults, without folders, hosts and tokens."""
    # defaults are read off the fields, as making a second instance would reset the accelerator
    default = {
        each.name: each.default_factory() if callable(each.default_factory) else each.default
        for each in fields(args)
        if each.init
    }
    return {
        name: value
        for name, value in args.to_dict().items()
        if name in default and value != default[name] and name not in _FOLLOWS
        if not name.startswith(_PRIVATE)
    }
