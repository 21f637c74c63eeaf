"""The part of the trainer that saves and loads: checkpoints and finished SAEs."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_switch_sae.errors import NonFiniteError, SwitchSAEError, TrainingError
from hf_switch_sae.evaluation.calibrate import calibrate_on
from hf_switch_sae.files import rounded
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.training import checkpoints, sharded
from hf_switch_sae.training.notes import arguments_of, write_notes
from hf_switch_sae.training.stepping import Stepping

logger = logging.get_logger(__name__)

# these say where an SAE is from and how well it does, not which run it belongs to
_MAY_DIFFER = {"metrics", "source", "base_model", "base_model_revision"}
_MAY_DIFFER |= {"base_model_fingerprint"}


class Saving(sharded.Sharding, Stepping):
    """How `SwitchSAETrainer` saves and loads; `checkpoints` says how it lies on the disk."""

    held_out: dict[str, dict[str, float]] | None = None
    command: str | None = None
    """The command line that started the run, to note beside its SAEs."""

    # --- checkpoints ------------------------------------------------------------------------------

    def last_good_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; None if there is none."""
        try:
            return checkpoints.newest_good(Path(str(self.args.output_dir)), lambda _: None)
        except TrainingError:
            return None

    def _checkpoint_to_resume(self, wanted: Any) -> str | None:
        """The checkpoint that `resume_from_checkpoint` means, checked; None to begin anew."""
        folder = Path(str(self.args.output_dir))
        if self.is_world_process_zero():
            checkpoints.remove_leftovers(folder)
        # a command line and TrainingArguments give these as words
        if isinstance(wanted, str) and wanted.lower() in ("true", "false"):
            wanted = wanted.lower() == "true"
        if wanted is True:
            found = checkpoints.newest_good(folder, logger.warning)
            if found is None:
                logger.warning(f"{folder} has no checkpoint: the run begins.")
            return None if found is None else str(found)
        if not wanted:
            return None
        if not Path(wanted).is_dir():
            raise TrainingError(f"there is no checkpoint {wanted}; True takes the newest there is.")
        if fault := checkpoints.fault_of(Path(wanted)):
            raise TrainingError(
                f"{wanted} is damaged: {fault}. resume_from_checkpoint=True takes the newest that "
                "is whole."
            )
        return str(wanted)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As `Trainer._save_checkpoint`, but a folder with a checkpoint's name is always whole."""
        if trial is None:
            self.store_flos()
        folder = checkpoints.folder_of(Path(self._get_output_dir(trial)), self.state.global_step)
        partial = checkpoints.partial_of(folder)
        # before anything is written: a run can't go on from NaN
        self._check_finite()
        # three stages, each of them finished by all processes before the next begins: the first
        # process makes the folder, all write to it, the first puts it in its place
        try:
            self._on_all(lambda: self.args.should_save and checkpoints.begin(folder))
            self._on_all(lambda: self._write_checkpoint(partial, folder))
            self._on_all(lambda: self._finish(partial, folder))
        except Exception as err:
            # gives room back at once, as the disk may be full
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(err, SwitchSAEError):
                raise
            raise checkpoints.no_room(folder, err, self.last_good_checkpoint()) from err
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            # old ones go last, so that there is always one to go on from
            best = self.state.best_model_checkpoint
            keep = [Path(best)] if best else []
            checkpoints.rotate(folder.parent, self.args.save_total_limit, keep)

    def _write_checkpoint(self, partial: Path, folder: Path) -> None:
        """Write this process's part of a checkpoint."""
        self._write_saes(partial)
        # the best checkpoint may have been rotated away, or be this one, which is not there yet
        best = self.state.best_global_step
        if best is not None:
            path = checkpoints.folder_of(folder.parent, best)
            if path == folder or path.exists():
                self.state.best_model_checkpoint = str(path)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            own = {
                "activations": self.activations.state_dict(),
                "monitor": self._monitor.state_dict(),
            }
            torch.save(own, partial / f"process_{self.args.process_index}.pt")
        if self.args.should_save:
            self._note_callbacks()
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
            torch.save(self.args, partial / TRAINING_ARGS_NAME)

    def _finish(self, partial: Path, folder: Path) -> None:
        if self.args.should_save:
            checkpoints.seal(partial)
            checkpoints.put_in_place(partial, folder)

    def _note_callbacks(self) -> None:
        """Note the states of callbacks in the trainer's state, as `Trainer` does."""
        for each in [*self.callback_handler.callbacks, self.control]:
            if isinstance(each, ExportableState):
                noted: Any = self.state.stateful_callbacks
                name = type(each).__name__
                # callbacks of one class share a name, and the Trainer keeps a list for them
                if isinstance(noted[name], list):
                    noted[name].append(each.state())
                else:
                    noted[name] = each.state()

    def _number(self, value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(value, dtype=dtype, device=self.args.device)

    def _on_all(self, act: Callable[[], Any]) -> None:
        """Run on every process; if it fails on one, all of them raise instead of waiting for it."""
        failure: Exception | None = None
        try:
            act()
        except Exception as err:
            failure = err
        failed = self._added(self._number(float(failure is not None), torch.float32))
        if failure is not None:
            raise failure
        if failed > 0:
            raise TrainingError("another process could not write its part of the checkpoint.")

    def _check_finite(self) -> None:
        """Raise NonFiniteError on every process if a weight is NaN or infinite on any of them."""
        for name, sae in self.saes.items():
            # of a sharded weight, the part that lies here: the parts are added up below
            weights = [getattr(w, "to_local", lambda w=w: w)() for w in sae.parameters()]
            bad = sum(int((~weight.isfinite()).sum()) for weight in weights)
            if self._added(self._number(bad, torch.int64)):
                last = self.last_good_checkpoint()
                raise NonFiniteError(
                    f"{name} has weights that are NaN or infinite at step "
                    f"{self.state.global_step}; it is not saved. "
                    + (f"{last} is from before." if last else "There is no checkpoint before it.")
                    + " Lower the learning rate, or clip more (max_grad_norm)."
                )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        whole: dict[str, Tensor] = {}
        for name, sae in self.saes.items():
            folder = Path(resume_from_checkpoint) / name
            if not folder.is_dir():
                raise TrainingError(
                    f"{resume_from_checkpoint} has no SAE {name}: it is of another run."
                )
            with _no_bar():
                found = SwitchSAE.from_pretrained(folder, dtype=sae.dtype)
            _check_same_run(found, sae, resume_from_checkpoint)
            # sharded weights are loaded all at once, under the names they have in the whole model
            if self.is_fsdp_enabled:
                at = list(self.saes).index(name)
                whole |= {f"saes.{at}.{key}": value for key, value in found.state_dict().items()}
            else:
                sae.load_state_dict(found.state_dict())
        if whole:
            sharded.load_whole_state(self.model, whole)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        found = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        # sharding has replaced the parameters that the optimizer was made with
        if self.is_fsdp_enabled and self._own_optimizer is not None:
            self._own_optimizer.keep_unit_rows_of(list(self.saes.values()))
        if resume_from_checkpoint is not None and not self.args.ignore_data_skip:
            path = Path(resume_from_checkpoint) / f"process_{self.args.process_index}.pt"
            if not path.exists():
                raise TrainingError(
                    f"{path} is not there: the run was saved by fewer processes than the "
                    f"{self.args.world_size} of now, or with save_only_model. Go on with as many."
                )
            own = torch.load(path, map_location="cpu", weights_only=True)
            self.activations.load_state_dict(own["activations"])
            self._monitor.load_state_dict(own["monitor"])
        return found

    # --- finished SAEs ----------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save each SAE to the subfolder of its name, in `args.save_dtype`, with training.json.

        With `args.push_to_hub` they are published too.

        Raises:
            TrainingError: the disk is full, or can't be written.
        """
        folder = Path(str(output_dir or self.args.output_dir))
        dtype = getattr(torch, self.args.save_dtype)
        try:
            self._write_saes(folder, dtype, beside=True)
        except (OSError, SafetensorError) as err:
            # gives room back at once, as the disk may be full
            for name in self.saes:
                shutil.rmtree(checkpoints.partial_of(folder / name), ignore_errors=True)
            raise checkpoints.no_room(folder, err, self.last_good_checkpoint()) from err
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_saes(
        self, folder: Path, dtype: torch.dtype | None = None, beside: bool = False
    ) -> None:
        """Write every SAE and its notes; with `beside` a file appears only once all are written."""
        for name, sae in self._plain_saes().items():
            if not self.args.should_save:
                return
            if self.held_out is not None and name in self.held_out:
                sae.config.metrics = rounded(self.held_out[name])
            saved = sae  # training continues in its own dtype
            if dtype not in (None, sae.dtype):
                saved = copy.deepcopy(sae)
                nn.Module.to(saved, dtype)
            # file by file, so that metrics.json and figures of an earlier save stay beside them
            path = folder / name
            target = checkpoints.begin(path) if beside else path
            with _no_bar():
                saved.save_pretrained(target)
            write_notes(target, sae, self.activations, self._run_notes())
            if beside:
                checkpoints.move_files(target, path)

    def _run_notes(self) -> dict[str, Any]:
        return {
            **({"command": self.command} if self.command else {}),
            "arguments": arguments_of(self.args),
            "processes": self.args.world_size,
            "steps": self.state.global_step,
            "tokens": self.state.num_input_tokens_seen,
            "held_out": self.held_out,
            "log": self.state.log_history,
        }

    def _calibrate(self) -> None:
        """Measure the statistics that edits and cards need, at the end of the run."""
        if not self.args.calibration_rows:
            return
        rows = self.activations.sample(self.args.calibration_rows)
        with sharded.gathered(self.model):
            for sae in self.saes.values():
                calibrate_on(sae, rows[str(sae.config.hookpoint)])


@contextmanager
def _no_bar() -> Iterator[None]:
    """Hide the bars of loading and saving, which would cut through the run's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_same_run(found: SwitchSAE, sae: SwitchSAE, checkpoint: str) -> None:
    """Raise TrainingError if a checkpoint's SAE differs in its config from the one to train."""
    there, here = found.config.to_dict(), sae.config.to_dict()
    names = set(type(sae.config).__annotations__) - _MAY_DIFFER
    other = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(names)
        if there.get(name) != here.get(name)
    ]
    if other:
        raise TrainingError(
            f"{checkpoint} is of another run: {'; '.join(other)}. Go on with what it began with, "
            "or take another output_dir."
        )
