"""What each default of the training recipe rests on: many short runs, and the table of them.

    python -m tests.bench.ablations harvest CACHE --model MINILM_FOLDER --corpus FOLDER
    python -m tests.bench.ablations all CACHE [--for SECONDS]
    python -m tests.bench.ablations run CACHE name=value ...
    python -m tests.bench.ablations write

`harvest` fills CACHE with the residual stream of all-MiniLM-L6-v2 after block 3, on the texts of
`train.parquet` and `validation.parquet` (column `text`) in FOLDER. `all` runs what of
`ablation_plan.py` has no line in `ablations.jsonl` yet, each in a process of its own; it can be
stopped, started again and run several times at once. `run` is a single one, and adds its line.
`write` makes ABLATIONS.md of the plan and the lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from .ablation_plan import PLAN, table
from .minilm import ROWS, VALIDATION_ROWS, harvest
from .recipes import Run, train

HERE = Path(__file__).parent
RESULTS = HERE / "ablations.jsonl"


def known() -> dict[Run, dict]:
    """What has been run -> its line; a setting that is not in a line had its present default."""
    if not RESULTS.exists():
        return {}
    lines = map(json.loads, RESULTS.read_text().splitlines())
    return {Run(**line["settings"]): line for line in lines}


def run_one(cache: Path, run: Run) -> None:
    torch.set_num_threads(1)
    line = {"settings": dataclasses.asdict(run), **train(run, cache), "machine": machine()}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line, flush=True)


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}; torch {torch.__version__}"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(': ')[2]}, {os.cpu_count()} threads; torch {torch.__version__}"
    return f"torch {torch.__version__}"


def run_all(cache: Path, seconds: float) -> None:
    """One process for each run; a file in the cache tells other drivers that it is taken."""
    began, env = time.time(), {**os.environ, "OMP_NUM_THREADS": "1"}
    for run in dict.fromkeys(run for part in PLAN for run in part.runs):
        if time.time() - began > seconds:
            return
        claim = cache / f"run {' '.join(run.words())}"
        if run in known():
            continue
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            command = [sys.executable, "-W", "ignore", "-m", "tests.bench.ablations"]
            subprocess.run([*command, "run", str(cache), *run.words()], check=True, env=env)
        finally:
            claim.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    filling = commands.add_parser("harvest")
    filling.add_argument("cache", type=Path)
    filling.add_argument("--model", type=Path, required=True)
    filling.add_argument("--corpus", type=Path, required=True)
    filling.add_argument("--shards", type=int, default=6, help=f"of {ROWS} rows")
    one = commands.add_parser("run")
    one.add_argument("cache", type=Path)
    one.add_argument("settings", nargs="*")
    every = commands.add_parser("all")
    every.add_argument("cache", type=Path)
    every.add_argument("--for", dest="seconds", type=float, default=float("inf"))
    commands.add_parser("write")
    args = parser.parse_args()
    if args.command == "harvest":
        for name, shards, rows in (
            ("validation", 1, VALIDATION_ROWS),
            ("train", args.shards, ROWS),
        ):
            texts = args.corpus / f"{name}.parquet"
            for line in harvest(args.model, texts, args.cache, name, shards, rows):
                print(line, flush=True)
    elif args.command == "run":
        run_one(args.cache, Run.parse(args.settings))
    elif args.command == "all":
        run_all(args.cache, args.seconds)
    else:
        (HERE / "ABLATIONS.md").write_text(table(known()))


if __name__ == "__main__":
    main()
