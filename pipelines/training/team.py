"""Several processes on one run: the first runs the stages, the others help it train.

    torchrun --nproc-per-node 2 -m pipelines.run --stage all

The contract:
- Processes beyond the first read no table and write nothing. They wait for a training, do their
  part of it (see `cdp.training.distributed`), and wait again until the first one is done. When the
  first one fails it prints the reason; the others exit with code 1.
- A training lies in a folder that all processes can read, as JSON and .npy: nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.training.request import (
    TrainingRequest,
    name_arrays,
    read_face_sets,
    train_requested,
)

if TYPE_CHECKING:
    from cdp.recognizer.fit import FaceSet

FOLDER, REQUEST, NOTHING = "team", "request.json", ""


def run_as_team(device: str, lead: Callable[[], int]) -> int:
    """`lead` in the first process, help in the others; the exit code."""
    from cdp.training.distributed import broadcast_text, join_team

    with join_team() as team:
        if not team.leads:
            return help_training(device)
        code = lead()
        broadcast_text(NOTHING, team)
        return code


def share_training(place: Path, request: TrainingRequest, face_sets: Mapping[str, FaceSet]) -> None:
    """Start the training in the other processes, if there are any."""
    from cdp.training.distributed import broadcast_text, find_team

    team = find_team()
    if team.size == 1:
        return
    folder = place.resolve() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, values in name_arrays(face_sets).items():
        if isinstance(values, np.memmap) and values.filename is not None:
            files[name] = str(Path(values.filename).resolve())
        else:
            files[name] = str(folder / f"{name}.npy")
            np.save(files[name], values)
    text = json.dumps({"request": asdict(request), "files": files})
    (folder / REQUEST).write_text(text, encoding="utf-8")
    broadcast_text(str(folder), team)


def help_training(device: str) -> int:
    """Do this process's part of every training until the last; the exit code."""
    from cdp.training.distributed import broadcast_text, find_team

    while True:
        try:
            folder = broadcast_text(NOTHING, find_team())
        except RuntimeError:  # the first process has failed and printed the reason
            return 1
        if not folder:
            return 0
        shared = json.loads((Path(folder) / REQUEST).read_text(encoding="utf-8"))
        arrays = {name: np.load(path, mmap_mode="r") for name, path in shared["files"].items()}
        train_requested(TrainingRequest(**shared["request"]), read_face_sets(arrays), device)
