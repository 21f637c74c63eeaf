"""The arguments of a training run: `transformers.TrainingArguments`, and what an SAE needs besides.

Room   `SwitchSAETrainingArguments.preset("published", ...)` is what the code of Mudide et al. 2024
       (arXiv:2410.08201) runs, without its defects: the router and the decoder have biases of their
       own, and AuxK has an effect. `SAE_PRESETS` has the fields of the SAE itself. The default
       preset rests on short runs, which `python -m tests.bench.ablations` repeats.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_switch_sae.errors import ConfigError
from hf_switch_sae.sae.config import SwitchSAEConfig

_PUBLISHED: dict[str, Any] = {
    "loss": "published",
    "start": "geometric_median",
    "learning_rate": None,
    "learning_rate_law": "published",
    "warmup_steps": 0,
    "decay_share": 0.2,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8192,
}
PRESETS: dict[str, dict[str, Any]] = {"default": {}, "published": _PUBLISHED}
"""Name -> fields of `SwitchSAETrainingArguments`."""
SAE_PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "activation": "batch_topk",
        "apply_router_probs": False,
        "router_best_expert_loss_coef": 0.1,
        "router_best_expert_temperature": 0.02,
    },
    "published": {},
}
"""Name -> fields of `SwitchSAEConfig` for an SAE that is trained so. The config's own defaults are
the published ones, because `batch_topk` means nothing in an SAE that has never been calibrated."""

# arguments for models of text, which mean nothing for an SAE -> the only value allowed
_WITHOUT_MEANING: dict[str, Any] = {
    "weight_decay": 0.0,  # `SwitchSAEAdam` takes none
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "dataloader_num_workers": 0,  # each worker would have a cursor that no checkpoint saves
    "auto_find_batch_size": False,
    "activation_checkpointing": False,
    "deepspeed": None,
    "optim_args": None,
    "optim_target_modules": None,
    "include_num_input_tokens_seen": "no",  # they always are, by `SwitchSAETrainer`
}


@dataclass
class SwitchSAETrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for an SAE; batch sizes count tokens.

    Args:
        loss: "relative" (fvu + balance, neither of which depends on the rows' scale, weighted by
            the SAE's config) or "published" (squared error summed over the width, plus
            load_balance_alpha * hidden_size * balance; the config's coefficients are not used).
        load_balance_alpha: weight of the balance term in the published loss.
        start: how a fresh SAE is fitted to the data. "data" scales rows to a mean square of 1, sets
            the biases to their mean, points the router at their clusters and each feature at a
            row. "geometric_median" leaves rows as they are and sets the biases to their geometric
            median. "none" does neither. All of them take over the activations' outlier norm.
        start_rows: how many rows `start` looks at.
        learning_rate: the same for all SAEs; None takes each SAE's from `learning_rate_law`.
        learning_rate_law: "steps", fitted to short runs, see `rate_by_steps`; or "published":
            2e-4 / sqrt(num_features / 2**14), meant for 100,000 steps.
        learning_rate_factor: multiplies the law.
        decay_share: the last share of the steps, over which the learning rate falls to 0.
        num_train_tokens: stop after so many tokens, counted over all processes; replaces epochs and
            `max_steps`.
        calibration_rows: rows on which features' strengths are measured at the end; 0 skips that.
        save_dtype: dtype that `save_model` writes: float32, bfloat16 or float16. Checkpoints keep
            the dtype of training.

    Raises:
        ConfigError: arguments contradict each other, or mean nothing for an SAE.
    """

    output_dir: str | None = field(default="sae", metadata={"help": "Folder to write to."})
    per_device_train_batch_size: int = field(
        default=512, metadata={"help": "Tokens a step, of each device."}
    )
    per_device_eval_batch_size: int = field(
        default=4096, metadata={"help": "Tokens a step in evaluation, of each device."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "None: by learning_rate_law, for each SAE."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="warmup_stable_decay", metadata={"help": "The schedule of the learning rate."}
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps."}
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not used: a loss that is not finite stops the run."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for parameters without a gradient."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Not needed: counters are reduced as they are counted."}
    )
    loss: str = field(default="relative", metadata={"help": "relative or published."})
    load_balance_alpha: float = field(
        default=3.0, metadata={"help": "Weight of balance in the published loss."}
    )
    start: str = field(default="data", metadata={"help": "data, geometric_median or none."})
    start_rows: int = field(default=16384, metadata={"help": "Rows that start looks at."})
    learning_rate_law: str = field(default="steps", metadata={"help": "steps or published."})
    learning_rate_factor: float = field(default=1.0, metadata={"help": "Multiplies the law."})
    decay_share: float = field(
        default=0.3, metadata={"help": "Last share of the steps, for decay."}
    )
    num_train_tokens: int | None = field(
        default=None, metadata={"help": "Stop after so many tokens."}
    )
    calibration_rows: int = field(default=65536, metadata={"help": "Rows to calibrate on."})
    save_dtype: str = field(
        default="float32", metadata={"help": "Of the saved SAE: float32, bfloat16 or float16."}
    )

    def __post_init__(self) -> None:
        self._check()
        if self.fsdp:
            given = self.fsdp_config if isinstance(self.fsdp_config, dict) else {}
            # an SAE's parts are called by functions, which hooks on their forward don't see
            self.fsdp_config = {"version": 2, "auto_wrap_policy": "NO_WRAP", **given}
            if (
                self.fsdp_config["version"] != 2
                or self.fsdp_config["auto_wrap_policy"] != "NO_WRAP"
            ):
                raise ConfigError("an SAE is sharded as a whole: fsdp version 2, policy NO_WRAP.")
        super().__post_init__()  # type: ignore[no-untyped-call]
        # after it, as it turns words into the values that are compared here
        for name, wanted in _WITHOUT_MEANING.items():
            if getattr(self, name) != wanted:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no meaning for an SAE: leave it out."
                )
        default = next(f.default for f in fields(TrainingArguments) if f.name == "optim")
        if self.optim != OptimizerNames(default):
            raise ConfigError(
                f"optim={OptimizerNames(self.optim).value!r}: an SAE is trained by SwitchSAEAdam, "
                "which keeps its decoder's rows at length 1. Pass another to the trainer as "
                "optimizers=(...)."
            )

    def _check(self) -> None:
        # before `TrainingArguments` sets up devices and folders
        for name, allowed in (
            ("loss", ("relative", "published")),
            ("start", ("data", "geometric_median", "none")),
            ("learning_rate_law", ("steps", "published")),
            ("save_dtype", ("float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}."
                )
        if not 0 <= self.decay_share <= 1:
            raise ConfigError(f"decay_share={self.decay_share} is not a share from 0 to 1.")
        if self.start_rows < 2 and self.start != "none":
            raise ConfigError(f"start_rows={self.start_rows} is under 2; start='none' needs none.")
        if self.num_train_tokens is not None and self.max_steps > 0:
            raise ConfigError(
                f"num_train_tokens={self.num_train_tokens} and max_steps={self.max_steps} both say "
                "when to stop: give one."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SwitchSAETrainingArguments:
        """The arguments of a preset, with changes.

        Args:
            name: "default", or "published" for what the paper's code does.
            changes: fields to set to other values.

        Raises:
            ConfigError: there is no such preset, arguments contradict each other, or mean nothing
                for an SAE.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    def rate_for(self, config: SwitchSAEConfig, steps: int) -> float:
        """The peak learning rate for an SAE of this config in a run of `steps` steps."""
        if self.learning_rate is not None:
            return float(self.learning_rate)
        if self.learning_rate_law == "published":
            law = 2e-4 / float((config.num_features / 2**14) ** 0.5)
        else:
            law = rate_by_steps(config.num_features, steps)
        return float(self.learning_rate_factor) * law


def rate_by_steps(num_features: int, steps: int) -> float:
    """The learning rate for a run of `steps` steps with the relative loss.

    Fitted to the best rates of short runs (195 to 1,953 steps of 512 tokens, 1,536 and 6,144
    features): longer runs and wider SAEs need lower rates. Beyond those sizes it extrapolates. It
    is never above 0.006, since no run was better above that.
    """
    # centered on 6,144 features and 1,000 steps, so 2.6e-3 is the rate there
    law = 2.6e-3 * (num_features / 6144) ** -0.27 * (max(1, steps) / 1000) ** -0.35
    return float(min(law, 6e-3))


def read_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Names and values from a .yaml, .yml or .json file; dashes in names become underscores.

    Raises:
        ConfigError: the file can't be read, or holds something else than names and values.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as err:
        raise ConfigError(f"{file} can't be read as a configuration: {err}") from err
    if not isinstance(found, Mapping):
        raise ConfigError(f"{file} holds no names with values, but {type(found).__name__}.")
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def sae_fields() -> set[str]:
    """The fields of `SwitchSAEConfig` that a config of any other model does not have."""
    own = set(SwitchSAEConfig.__annotations__) - {"model_type", "attribute_map"}
    return own | set(SwitchSAEConfig.attribute_map)


def nearest(name: str, names: set[str]) -> str:
    """A hint for a name that is not one of `names`."""
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return f"did you mean --{near[0]}?" if near else "see hf-switch-sae train --help."
