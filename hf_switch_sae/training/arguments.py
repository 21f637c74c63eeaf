"""What a training run can be told: `transformers.TrainingArguments` and what an SAE needs besides.

`SwitchSAETrainingArguments.preset("published", ...)` is the recipe of Mudide et al. 2024 as their
code runs it (arXiv:2410.08201), without its defects: biases of their own, and no inert AuxK.
`SAE_PRESETS` says what the SAE itself is in each recipe. What they rest on is in
tests/bench/ABLATIONS.md.
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
"""Name -> fields of `SwitchSAEConfig` for an SAE that is trained so; its own defaults are the
published ones, as an SAE needs a calibration before `batch_topk` means anything."""

# what TrainingArguments has for models of text and can mean nothing here: name -> what it must be
_WITHOUT_MEANING: dict[str, Any] = {
    "weight_decay": 0.0,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "dataloader_num_workers": 0,
    "auto_find_batch_size": False,
    "activation_checkpointing": False,
    "deepspeed": None,
    "optim_args": None,
    "optim_target_modules": None,
    "include_num_input_tokens_seen": "no",
}


@dataclass
class SwitchSAETrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for an SAE; batch sizes count tokens.

    Args:
        loss: "relative" (fvu + balance, both free of scale, weighted by the SAE's config) or
            "published" (squared error summed over the width, plus load_balance_alpha * hidden_size
            * balance; the coefficients in the config are not used).
        load_balance_alpha: of the published loss.
        start: where a fresh SAE begins. "data": rows scaled to a mean square of 1, biases their
            mean, the router towards their clusters, features at single rows. "geometric_median":
            rows as they are, biases their geometric median. "none": as it is. The outlier norm is
            that of the activations in any case.
        start_rows: rows to measure that on.
        learning_rate: of all SAEs; None: for each by the law.
        learning_rate_law: "steps": what short runs found, see `rate_by_steps`. "published":
            2e-4 / sqrt(num_features / 2**14), meant for 100,000 steps.
        learning_rate_factor: times the law.
        decay_share: share of the steps, the last, over which the learning rate falls to 0.
        num_train_tokens: stop after so many tokens, of all processes together; instead of epochs
            and `max_steps`.
        calibration_rows: rows to measure features' strengths on at the end of the run; 0: none.
        save_dtype: of what `save_model` writes: float32, bfloat16 or float16. Checkpoints are as
            they are trained.

    Raises:
        ConfigError: values that contradict each other, or mean nothing for an SAE.
    """

    output_dir: str | None = field(default="sae", metadata={"help": "Where to write it."})
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
        default=0.05, metadata={"help": "Steps (below 1: share of them) of linear warm-up."}
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
    load_balance_alpha: float = field(default=3.0, metadata={"help": "Of the published loss."})
    start: str = field(default="data", metadata={"help": "data, geometric_median or none."})
    start_rows: int = field(default=16384, metadata={"help": "Rows to measure the start on."})
    learning_rate_law: str = field(default="steps", metadata={"help": "steps or published."})
    learning_rate_factor: float = field(default=1.0, metadata={"help": "Times the law."})
    decay_share: float = field(default=0.3, metadata={"help": "Share of the steps of decay."})
    num_train_tokens: int | None = field(default=None, metadata={"help": "Stop after so many."})
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
        """Arguments of a named recipe, and changes to it.

        Args:
            name: "default", or "published": the recipe of the paper's code.
            changes: fields.

        Raises:
            ConfigError: there is no such recipe.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    def rate_for(self, config: SwitchSAEConfig, steps: int) -> float:
        """The learning rate of an SAE of this configuration in a run of so many steps."""
        if self.learning_rate is not None:
            return float(self.learning_rate)
        if self.learning_rate_law == "published":
            law = 2e-4 / float((config.num_features / 2**14) ** 0.5)
        else:
            law = rate_by_steps(config.num_features, steps)
        return float(self.learning_rate_factor) * law


def rate_by_steps(num_features: int, steps: int) -> float:
    """The learning rate for a run of so many steps, of an SAE whose loss is free of scale.

    Follows the best rates of short runs (195 to 1,953 steps of 512 tokens, 1,536 and 6,144
    features, tests/bench/ABLATIONS.md): longer runs and wider SAEs want less; beyond that it is an
    extrapolation. It is never above 0.006, over which no run was better.
    """
    law = 2.6e-3 * (num_features / 6144) ** -0.27 * (max(1, steps) / 1000) ** -0.35
    return float(min(law, 6e-3))


def read_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields in a .yaml, .yml or .json file.

    Raises:
        ConfigError: there is no such file, or it does not hold names and values.
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
    """The fields that are an SAE's own, and not every configuration's."""
    own = set(SwitchSAEConfig.__annotations__) - {"model_type", "attribute_map"}
    return own | set(SwitchSAEConfig.attribute_map)


def nearest(name: str, names: set[str]) -> str:
    """A hint for a name that is none of these."""
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return f"did you mean --{near[0]}?" if near else "see hf-switch-sae train --help."
