"""Training runs of tiny SAEs for the tests, in this process or in others.

Room   rows(), activations(), trainer(folder, **options) -> a SwitchSAETrainer over 16-wide rows;
       launch(...) -> the same run in other processes, which write what came of it as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import socket
from typing import Any

import torch
from torch import Tensor

from helpers import tiny
from hf_switch_sae import SwitchSAEConfig
from hf_switch_sae.training import (
    ActivationSettings,
    SwitchSAETrainer,
    SwitchSAETrainingArguments,
    TensorActivations,
)

PLACE, OTHER, D = "layers.1.resid_post", "layers.2.resid_post", 16
SAE = {"hidden_size": D, "num_features": 64, "num_experts": 4, "k": 4, "hookpoint": PLACE}
RUN = {
    "per_device_train_batch_size": 64,
    "max_steps": 24,
    "logging_steps": 4,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 0.01,
    "calibration_rows": 256,
    "start_rows": 512,
}
TIMES = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_loss"}
TIMES |= {"train_steps_per_second", "total_flos"}


def rows(count: int = 1024, seed: int = 0, width: int = D) -> Tensor:
    """Rows that a sparse code explains: few of 48 directions each, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(48, width, generator=torch.Generator().manual_seed(5))
    strengths = torch.rand(count, 48, generator=generator) * 4
    code = strengths * (torch.rand(count, 48, generator=generator) < 0.06)
    noise = 0.1 * torch.randn(count, width, generator=generator)
    return code @ directions + noise + 2


def activations(count: int = 1024, hookpoints: tuple[str, ...] = (PLACE,)) -> TensorActivations:
    """Rows at some hookpoints, with a bound on the norm as harvested ones have it."""
    tensors = {place: rows(count) * (at + 1) for at, place in enumerate(hookpoints)}
    bounds = {place: 6 * float(x.norm(dim=-1).median()) for place, x in tensors.items()}
    return TensorActivations(tensors, policy={"outlier_norm": bounds})


def trainer(
    folder: str | os.PathLike[str], sae: Any = None, data: Any = None, **options: Any
) -> SwitchSAETrainer:
    """A trainer of one SAE, or of what is given, with fields of the run or of the SAE changed;
    `live`: on a tiny language model's streams over random tokens."""
    live = options.pop("live", False)
    lm = tiny.llama(hidden_size=D) if live else None
    if live:
        data = [x.tolist() for x in tiny.prompts(*[20 + at % 7 for at in range(400)])]
        kept_rows = ActivationSettings(context=16, tokens_per_pass=64, buffer_bytes=1 << 16)
    of_sae = {name: options.pop(name) for name in list(options) if name in _SAE_FIELDS}
    kept = {n: options.pop(n) for n in ("callbacks", "eval_dataset", "optimizers") if n in options}
    preset = options.pop("preset", "default")
    args = SwitchSAETrainingArguments.preset(preset, output_dir=str(folder), **{**RUN, **options})
    given = SwitchSAEConfig(**{**SAE, **of_sae}) if sae is None else sae
    if live:
        kept["activation_settings"] = kept_rows
    return SwitchSAETrainer(given, lm, args, activations() if data is None else data, **kept)


_SAE_FIELDS = set(SwitchSAEConfig.__annotations__)


def history(run: SwitchSAETrainer | dict[str, Any]) -> list[dict[str, Any]]:
    """What a run logged at its steps, without times."""
    logged = run["log"] if isinstance(run, dict) else run.state.log_history
    return [
        {name: value for name, value in entry.items() if name not in TIMES}
        for entry in logged
        if "loss" in entry or "eval_loss" in entry
    ]


def launch(
    folder: pathlib.Path, options: dict[str, Any], processes: int = 1, run: Any = None
) -> dict[str, Any]:
    """Run `trainer(folder, **options)` in processes of its own, to its end; see `main`.

    Or what is given instead of `main`: a function that can be imported from the tests.
    """
    running = start(folder, options, processes, run)
    for each in running:
        each.join(200)
    said = {each.name: (folder / each.name).read_text()[-3000:] for each in running}
    assert all(each.exitcode == 0 for each in running), said
    return json.loads((folder / "result.json").read_text())


def start(
    folder: pathlib.Path, options: dict[str, Any], processes: int = 1, run: Any = None
) -> list[Any]:
    """Begin such a run; what the processes say lies in the folder, in files of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    common |= {"LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    common |= {"GLOO_SOCKET_IFNAME": "lo"}
    running = []
    for rank in range(processes):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        running.append(
            _FORKS.Process(
                target=_child,
                args=(run or main, str(folder), options, own),
                name=f"process-{rank}.txt",
            )
        )
        running[-1].start()
    return running


def _child(run: Any, folder: str, options: dict[str, Any], environment: dict[str, str]) -> None:
    (pathlib.Path(folder) / "began").touch()
    os.environ.update(environment)
    name = multiprocessing.current_process().name
    with (pathlib.Path(folder) / name).open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        run(folder, options)


# each run is forked from a server that has imported everything once and done nothing else; its
# path is not this process's before Python 3.13, only its environment is
_TESTS = pathlib.Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_TESTS.parent), str(_TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
)
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["helpers.trained"])


def main(folder: str, options: dict[str, Any]) -> None:
    """One process of a run; the first writes the log history to result.json in the folder."""
    torch.set_num_threads(1)
    resume = options.pop("resume", None)
    run = trainer(folder, **options)
    run.train(resume_from_checkpoint=resume)
    run.save_model()
    share = run.activations.state_dict().get("share")
    (pathlib.Path(folder) / f"share-{run.args.process_index}.json").write_text(json.dumps(share))
    if run.is_world_process_zero():
        path = pathlib.Path(folder) / "result.json"
        path.with_suffix(".tmp").write_text(json.dumps({"log": run.state.log_history}))
        path.with_suffix(".tmp").replace(path)
