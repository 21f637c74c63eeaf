"""`transformers.Trainer` for Switch SAEs: from text or rows to saved SAEs.

How    The model is `SAEsTogether`, the data loader hands out activations, the optimizer is
       `SwitchSAEAdam`. The loop, logging and callbacks are those of `Trainer`. The other parts:
       `stepping.py` (optimizer, schedule, a step), `saving.py`, `sharded.py`, `publishing.py`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_switch_sae.activations.interface import Activations
from hf_switch_sae.activations.live import activations_for
from hf_switch_sae.activations.settings import ActivationSettings
from hf_switch_sae.errors import TrainingError
from hf_switch_sae.evaluation.heldout import measure_held_out
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.training.arguments import SwitchSAETrainingArguments
from hf_switch_sae.training.callbacks import UnitRows
from hf_switch_sae.training.initialization import is_fresh, start_from
from hf_switch_sae.training.loader import Stream
from hf_switch_sae.training.monitor import Monitor
from hf_switch_sae.training.publishing import Publishing
from hf_switch_sae.training.saes import SAEOrConfig, SAEsTogether, build_saes, readers_of
from hf_switch_sae.training.sharded import gathered

logger = logging.get_logger(__name__)


class SwitchSAETrainer(Publishing):
    """Trains one Switch SAE, or several at once, on a language model's residual streams.

        trainer = SwitchSAETrainer(
            SwitchSAEConfig(hookpoint="layers.15.resid_post", ...),
            lm,
            SwitchSAETrainingArguments(output_dir="sae", num_train_tokens=10_000_000),
            train_dataset=texts,
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model()

    It is a `transformers.Trainer`: callbacks, `report_to`, `save_total_limit`, `push_to_hub`,
    `resume_from_checkpoint`, bf16, gradient accumulation, `torch_compile` and the rest work as
    there. Checkpoints and saved models have a subfolder for each SAE.

    Several processes (`accelerate launch`) and gradient accumulation give, up to rounding, the
    losses and gradients of one process with the whole batch: FVU divides by the variance of the
    whole batch, and the load is balanced over the whole batch. Two things differ: `batch_topk`
    chooses within each part, and AuxK is the mean of the parts' own terms, each over the variance
    of its own error.

    Args:
        sae: a SwitchSAEConfig or a SwitchSAE, or {name: either} to train several in one pass of
            the language model. The config's `hookpoint` says where it reads. An SAE that was
            trained before continues from there; a fresh one starts from the data (`args.start`).
            `SAE_PRESETS` has the fields of the presets.
        lm: the language model, in eval mode; None if `train_dataset` is `Activations`.
        args: the run's arguments; batch sizes count tokens.
        train_dataset: texts, files, a folder, a Hub id or a `datasets` data set, as
            `text.read_documents` takes them; or `Activations`, such as `CachedActivations(folder)`.
        eval_dataset: held-out rows or text, likewise.
        processing_class: the language model's tokenizer, if the data are texts.
        activation_settings: how text becomes rows.
        callbacks, optimizers: as for `transformers.Trainer`.

    Raises:
        ConfigError, HookpointError, WidthError, TextError, TrainingError: the arguments do not fit
            together. Raised before anything is computed.
    """

    args: SwitchSAETrainingArguments

    def __init__(
        self,
        sae: SAEOrConfig | Mapping[str, SAEOrConfig],
        lm: nn.Module | None = None,
        args: SwitchSAETrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        activation_settings: ActivationSettings | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        # a copy, because tokens are turned into steps in it
        args = copy.copy(args) if args is not None else SwitchSAETrainingArguments()
        saes = build_saes(sae, lm, train_dataset, args.seed)
        self.saes, self.lm, self._tokenizer = saes, lm, processing_class
        given = (lm, processing_class, activation_settings)
        self.activations = activations_for(readers_of(saes), train_dataset, *given)
        held_out = None
        if eval_dataset is not None:
            held_out = activations_for(readers_of(saes), eval_dataset, *given)
        # first, so that a run without an end fails before anything is set up
        self._set_end(args)

        together = SAEsTogether(saes, args.loss, args.load_balance_alpha)
        super().__init__(
            model=together,
            args=args,
            eval_dataset=held_out,
            callbacks=[*(callbacks or []), UnitRows(saes)],
            optimizers=optimizers,
        )
        self.train_dataset = self.activations
        self.processing_class = None  # the language model's, so it is not saved with the SAEs
        # the Trainer must neither rescale losses nor look for labels
        self.model_accepts_loss_kwargs, self.can_return_loss = False, True
        self._monitor = Monitor(saes)
        self._fresh = {name: is_fresh(each) for name, each in saes.items()}
        self._wholes = None
        self._sums, self._before, self._fired = [], [], []
        self._parts = 0
        self._clock = (time.monotonic(), 0)  # time and tokens at the last log

    @property
    def sae(self) -> SwitchSAE:
        """The SAE, or the first of several."""
        return next(iter(self.saes.values()))

    def _set_end(self, args: SwitchSAETrainingArguments) -> None:
        """Turn `num_train_tokens` into steps; TrainingError if nothing says when to stop."""
        # tokens per step, over all processes
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.num_train_tokens is not None:
            args.max_steps = max(1, math.ceil(args.num_train_tokens / batch))
        rows = self.activations.num_rows
        if args.max_steps <= 0 and rows is None:
            raise TrainingError(
                "how many rows the data set has is known only once it has been read, and the "
                "learning rate needs to know where the run ends: give num_train_tokens or "
                "max_steps, or harvest an activation cache first."
            )
        if rows is not None and rows < args.train_batch_size * args.world_size:
            raise TrainingError(
                f"there are {rows:,} rows and a batch takes {args.train_batch_size:,} of each of "
                f"{args.world_size} processes: give more text, or a smaller "
                "per_device_train_batch_size."
            )

    # --- the run ----------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train, and measure the SAEs' statistics at the end; see `Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint's folder. Or True for the newest undamaged one in
                `output_dir`, with a warning if there are newer ones; if there are none at all the
                run begins anew. By default `args.resume_from_checkpoint`.

        Raises:
            NonFiniteError: the loss is NaN or infinite; the last checkpoint is kept.
            TrainingError: a checkpoint is damaged or of another run, or the disk is full.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if self.is_world_process_zero():
            self._say(self._plan(checkpoint))
        if checkpoint is None:
            self._start()
        # one process removes leftovers and all look for checkpoints; both must be over
        self.accelerator.wait_for_everyone()
        result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        self._calibrate()
        return result

    def _start(self) -> None:
        """Fit fresh SAEs to the data, as `args.start` says."""
        fresh = {name: sae for name, sae in self.saes.items() if self._fresh[name]}
        if not fresh:
            return
        bounds = self.activations.policy["outlier_norm"]
        rows = self.activations.sample(self.args.start_rows) if self.args.start != "none" else {}
        for sae in fresh.values():
            hookpoint = str(sae.config.hookpoint)
            some = rows.get(hookpoint, torch.empty(0, dtype=torch.float32, device="cpu"))
            start_from(sae, some, bounds.get(hookpoint), self.args.start)

    def _plan(self, checkpoint: str | None) -> str:
        """What the run is about to do, in three lines."""
        args, batch = self.args, self.get_total_train_batch_size(self.args)
        steps, rates = self._planned_steps(), self.learning_rates
        sizes = ", ".join(
            f"{name} ({sae.config.num_experts} x {sae.config.features_per_expert:,} features, "
            f"k={sae.config.k}, lr {rates[name]:.2g})"
            for name, sae in self.saes.items()
        )
        estimate = ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
            for name, value in self.activations.estimate().items()
        )
        begun = f" from {checkpoint}" if checkpoint else ""
        return (
            f"training{begun}: {sizes}\n{steps:,} steps of {batch:,} tokens, "
            f"{steps * batch:,} tokens on {args.world_size} process(es)\nactivations: {estimate}"
        )

    def _run_notes(self) -> dict[str, Any]:
        return {**super()._run_notes(), "learning_rates": self.learning_rates}

    def _say(self, text: str) -> None:
        if not self.args.disable_tqdm:
            logger.warning(text)

    # --- data -------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """This process's rows, as batches."""
        rows = self.args.train_batch_size
        share = (self.args.process_index, self.args.world_size)
        self._stream = Stream(self.activations, rows, *share)
        return self._stream.loader()

    def num_examples(self, dataloader: Any) -> int:
        """Rows per epoch; 0 if that is not known."""
        return self.activations.num_rows or 0

    def _init_training_state(self, *args: Any) -> Any:
        epochs, steps = super()._init_training_state(*args)
        # steps that a resumed run has had: the Trainer skips them, see `loader`
        self._stream.to_skip = steps
        self._clock = (time.monotonic(), self.state.num_input_tokens_seen)
        return epochs, steps

    # --- a step -----------------------------------------------------------------------------------

    def _track_num_input_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        rows = len(next(iter(inputs.values())))
        # all processes draw equally many rows, so none has to be asked
        self.state.num_input_tokens_seen += rows * self.args.world_size

    def floating_point_ops(self, inputs: Mapping[str, Tensor]) -> int:
        """Operations of a step, forward and backward, by the routed experts and the router."""
        total = 0
        for sae in self.saes.values():
            c = sae.config
            second = c.num_experts > 1 and c.second_expert_loss_coef > 0
            visits = c.num_experts_per_token + second
            features = c.features_per_expert * visits + c.num_experts
            # 6 for each weight, as transformers estimates it; 2 for encoder and decoder
            total += 6 * len(inputs[str(c.hookpoint)]) * c.hidden_size * 2 * features
        return total

    # --- what is logged ---------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with fvu, l0, dead_share, expert_load, tokens and more at each step."""
        # an evaluation and the run's end are logged here too, and have no steps to report
        if "loss" in logs:
            found = self._monitor.take(self._added)
            own = self._own_optimizer
            norms = own.grad_norms if own is not None else []
            for name, norm in zip(self.saes, norms, strict=False):
                found["grad_norm" if len(self.saes) == 1 else f"{name}/grad_norm"] = float(norm)
            then, tokens = self._clock
            now, seen = time.monotonic(), self.state.num_input_tokens_seen
            self._clock = (now, seen)
            speed = (seen - tokens) / max(now - then, 1e-9)
            logs = {**logs, **found, "tokens": seen, "tokens_per_second": round(speed, 1)}
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the SAEs on held-out rows: `eval_fvu`, `eval_l0`, `eval_dead_share`, ...

        Args:
            eval_dataset: texts or `Activations`; by default the trainer's own.
            ignore_keys: not used, as there are no outputs to leave out.
            metric_key_prefix: what each name begins with.

        Returns:
            The figures of `measure_held_out`, by name, with the SAE's name if there are several.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(dataset, Activations):
            readers = readers_of(self.saes)
            dataset = activations_for(readers, dataset, self.lm, self._tokenizer, None)
        args = self.args
        # every process measures a share, with whole weights
        share = (args.eval_batch_size, args.process_index, args.world_size)
        with gathered(self.model):
            found = measure_held_out(self.saes, dataset, *share, self._added)
        self.held_out = found
        # names as `metric_for_best_model` wants them: eval_fvu, eval_<SAE>/fvu
        alone = len(found) == 1
        metrics = {
            f"{metric_key_prefix}_{figure}" if alone else f"{metric_key_prefix}_{name}/{figure}": v
            for name, figures in found.items()
            for figure, v in figures.items()
        }
        # what `load_best_model_at_end` goes by unless told otherwise
        metrics[f"{metric_key_prefix}_loss"] = sum(figures["fvu"] for figures in found.values())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
