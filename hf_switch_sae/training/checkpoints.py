"""Checkpoints that are there whole or not at all, and are checked before they are trusted.

    output_dir
    ├── checkpoint-200/
    │   ├── layers.15.resid_post/       the SAE, as from_pretrained takes it
    │   ├── optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json, training_args.bin
    │   ├── process_0.pt                each process's data cursor and sums since the last log
    │   └── checksums.json              size and CRC-32 of every other file
    └── .partial-checkpoint-300/        being written; renamed once all of it is on the disk

Beware `files.written_beside` would not do here: several processes write into one partial folder,
       so all of them must know its name, and a checkpoint that is there already is replaced.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from hf_switch_sae.errors import TrainingError
from hf_switch_sae.files import sync, write_json
from hf_switch_sae.hub.layout import CHECKPOINT

CHECKSUMS = "checksums.json"
_PARTIAL, _REPLACED = ".partial-", ".replaced-"


def folder_of(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return output_dir / f"checkpoint-{step}"


def partial_of(folder: Path) -> Path:
    """Where a folder is written before it is renamed."""
    return folder.with_name(f"{_PARTIAL}{folder.name}")


def begin(folder: Path) -> Path:
    """An empty partial folder, to be filled and then renamed to `folder`."""
    partial = partial_of(folder)
    # files of a save that was killed must not end up among the new ones
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def seal(partial: Path) -> None:
    """Write the checksum of every file, and bring all of it to the disk."""
    found = {}
    for path in _files(partial):
        found[path.relative_to(partial).as_posix()] = [path.stat().st_size, _crc32(path)]
        sync(path)
    # after all files are on the disk, since it vouches for them
    write_json(partial / CHECKSUMS, found, indent=1)
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync(folder)


def put_in_place(partial: Path, folder: Path) -> None:
    """Rename a partial folder to `folder`; a folder that is there already is removed."""
    # a rename can't replace a full folder, so the old one steps aside, and is put back by
    # `remove_leftovers` if this process is killed in between
    replaced = folder.with_name(f"{_REPLACED}{folder.name}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def move_files(partial: Path, folder: Path) -> None:
    """Rename files one by one into a folder; other files that it holds stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in _files(partial):
        # before the rename, or a power cut could leave the new name with half of the content
        sync(path)
        path.replace(folder / path.name)
    sync(folder)
    shutil.rmtree(partial, ignore_errors=True)


def checkpoints_in(output_dir: Path) -> list[Path]:
    """All checkpoints, good or not, ordered by step, the newest last."""
    found = [path for path in output_dir.glob("*") if CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if every byte is as it was written."""
    try:
        noted = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        for name, (size, crc) in noted.items():
            path = checkpoint / name
            # the size first: a file that was cut off need not be read
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if _crc32(path) != crc:
                return f"the checksum of {name} is wrong"
    except FileNotFoundError as err:
        return f"{Path(str(err.filename)).name} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as err:
        return f"{CHECKSUMS} can't be read ({err})"
    return None


def newest_good(output_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint without a fault; None if there are no checkpoints.

    Args:
        output_dir: the run's folder.
        warn: called with a sentence on each checkpoint that was passed over.

    Raises:
        TrainingError: there are checkpoints, and all of them have a fault.
    """
    faults: list[str] = []
    for checkpoint in reversed(checkpoints_in(output_dir)):
        fault = fault_of(checkpoint)
        if fault is None:
            # only now, as without a good one the error below says the same
            for each in faults:
                warn(f"{each}; going on from {checkpoint.name} instead.")
            return checkpoint
        faults.append(f"{checkpoint} is damaged: {fault}")
    if faults:
        raise TrainingError(
            "no checkpoint to go on from: " + "; ".join(faults) + ". Delete them to begin anew."
        )
    return None


def rotate(output_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete the oldest checkpoints beyond a limit, but never the newest, nor any of `keep`."""
    if limit is None or limit <= 0:
        return
    found = checkpoints_in(output_dir)
    kept = {path.resolve() for path in [*keep, *found[-1:]]}
    # the best and the newest stay even if the limit is 1
    surplus = len(found) - max(limit, len(kept))
    for checkpoint in found:
        if surplus > 0 and checkpoint.resolve() not in kept:
            # renamed first, so that no half-deleted folder has a checkpoint's name
            gone = checkpoint.with_name(f"{_REPLACED}{checkpoint.name}")
            shutil.rmtree(gone, ignore_errors=True)
            checkpoint.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            surplus -= 1


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run was writing or deleting; put back what it was replacing."""
    # both are there and the checkpoint is not: killed between the two renames of `put_in_place`
    for path in output_dir.glob(f"{_REPLACED}*"):
        folder = path.with_name(path.name.removeprefix(_REPLACED))
        if partial_of(folder).exists() and not folder.exists():
            path.rename(folder)
    for prefix in (_PARTIAL, _REPLACED):
        for path in output_dir.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def no_room(folder: Path, err: BaseException, last_good: Path | None) -> TrainingError:
    """The error to raise for a checkpoint, or finished SAEs, that could not be written."""
    kept = f"{last_good} is whole: " if last_good else "There is none before it: "
    free = ""
    with contextlib.suppress(OSError):
        free = f", {shutil.disk_usage(folder.parent).free:,} bytes are free"
    return TrainingError(
        f"{folder} can't be written ({err}{free}). {kept}make room, or lower save_total_limit, and "
        "run the same with resume_from_checkpoint=True."
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        # in parts, as a checkpoint may not fit into memory beside the run
        while block := file.read(1 << 22):
            found = zlib.crc32(block, found)
    return found
