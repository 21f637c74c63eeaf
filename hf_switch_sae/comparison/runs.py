"""A planned run and a cache of activations -> a trained SAE in a folder of its own; resumable.

<folder>/<name>/            config.json, model.safetensors, training.json; run.json comes last
<folder>/.runs/<name>/      checkpoints of a run that is not finished
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_switch_sae.comparison.plan import Planned
from hf_switch_sae.errors import TrainingError
from hf_switch_sae.files import write_json
from hf_switch_sae.hub.layout import CONFIG
from hf_switch_sae.training import CachedActivations, SwitchSAETrainer, SwitchSAETrainingArguments
from hf_switch_sae.training.checkpoints import checkpoints_in
from hf_switch_sae.training.saes import check_loss

logger = logging.get_logger(__name__)

RUN = "run.json"
_RUNS = ".runs"


class Runs:
    """Trains those SAEs of a comparison that are not there yet, one after another.

    Args:
        planned: the runs.
        cache: a function from a seed to the rows, shuffled by it.
        known: fields of every SAE's config that the rows decide.
        folder: the comparison's folder.
        command: the command line to note beside each SAE.

    Raises:
        ConfigError: a run's arguments do not fit together.
        TrainingError: a folder holds another run's SAE, or there are fewer rows than a batch.
    """

    def __init__(
        self,
        planned: list[Planned],
        cache: Callable[[int], CachedActivations],
        known: dict[str, Any],
        folder: Path,
        command: str | None,
    ) -> None:
        self.planned, self.known = planned, known
        self._cache, self.folder, self.command = cache, folder, command
        rows = cache(0)
        # the order of rows differs between seeds, the rows themselves do not
        identity = rows.state_dict()["identity"]
        self._rows = {name: value for name, value in identity.items() if name != "seed"}
        for each in planned:
            args = self._arguments(each)
            check_loss(each.name, each.config(**known), args.loss)
            if rows.num_rows < args.train_batch_size * args.world_size:
                raise TrainingError(
                    f"the run {each.name}: {rows.num_rows:,} rows are fewer than a batch of "
                    f"{args.train_batch_size:,}: give a smaller per_device_train_batch_size, or a "
                    "larger cache."
                )
            for target in (folder / each.name, folder / _RUNS / each.name):
                self._check_same(each, target)

    def train(self) -> dict[str, Path]:
        """Train, and return name -> folder of every planned SAE."""
        found = {}
        for at, each in enumerate(self.planned):
            target = self.folder / each.name
            # written last, so the SAE beside it is complete
            if not (target / RUN).exists():
                logger.warning(f"[{at + 1}/{len(self.planned)}] {each.name}")
                self._train(each, target)
            found[each.name] = target
        runs = self.folder / _RUNS
        if runs.is_dir() and not any(runs.iterdir()):
            runs.rmdir()
        return found

    def _train(self, planned: Planned, target: Path) -> None:
        working = self.folder / _RUNS / planned.name
        working.mkdir(parents=True, exist_ok=True)
        # noted before the first checkpoint, so that no other run continues from it
        self._note(planned, working)
        config = planned.config(**self.known)
        trainer = SwitchSAETrainer(
            {planned.name: config},
            args=self._arguments(planned),
            train_dataset=self._cache(planned.seed),
        )
        trainer.command = self.command
        trainer.train(resume_from_checkpoint=bool(checkpoints_in(working)))
        trainer.save_model(str(self.folder), _internal_call=True)
        self._note(planned, target)
        # last: as long as it is there, `_check_same` takes a half-saved SAE for ours
        shutil.rmtree(working)

    def _arguments(self, planned: Planned) -> SwitchSAETrainingArguments:
        # the newest checkpoint is all that an interrupted run needs
        arguments = {"save_total_limit": 1, **planned.run}
        arguments["report_to"] = arguments.get("report_to") or "none"
        working = self.folder / _RUNS / planned.name
        return SwitchSAETrainingArguments(**arguments, output_dir=str(working), seed=planned.seed)

    def _note(self, planned: Planned, folder: Path) -> None:
        write_json(folder / RUN, self._identity(planned), indent=1)

    def _identity(self, planned: Planned) -> dict[str, Any]:
        """JSON-able: equal for two runs exactly if they train the same SAE."""
        fields = {"sae": planned.sae, "run": planned.run, "seed": planned.seed, "rows": self._rows}
        # as it reads back from run.json, where tuples have become lists
        found: dict[str, Any] = json.loads(json.dumps(fields, default=str))
        return found

    def _check_same(self, planned: Planned, target: Path) -> None:
        """Raise TrainingError if a folder is that of another run."""
        note = target / RUN
        # an SAE without a note: either its run was stopped while saving, or it is somebody else's
        if not note.exists():
            if (target / CONFIG).exists() and not (self.folder / _RUNS / target.name).exists():
                raise TrainingError(
                    f"{target} holds an SAE that no comparison trained: choose another folder, or "
                    "give the run another name=..."
                )
            return
        there, here = json.loads(note.read_text()), self._identity(planned)
        # how often something is logged or saved makes no other SAE
        other = [
            f"{name} was {there[part].get(name)!r} and is {here[part].get(name)!r}"
            for part in ("sae", "run")
            for name in sorted(there[part].keys() | here[part].keys())
            if there[part].get(name) != here[part].get(name)
            and name not in ("logging_steps", "disable_tqdm", "save_steps", "save_strategy")
        ]
        other += ["the rows are of another cache"] if there["rows"] != here["rows"] else []
        if other:
            raise TrainingError(
                f"{target} is of another run: {'; '.join(other)}. Choose another folder, remove "
                "it, or give the run another name=..."
            )
