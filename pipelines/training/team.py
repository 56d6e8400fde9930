"""Several processes on one run: the first does all of it, the others help it train.

    torchrun --nproc-per-node 2 -m pipelines.run --stage all

The contract:
- Processes beyond the first read no table and write nothing. They wait for a training, do their
  part of it (see `cdp.training.distributed`), and wait again until the first one is done. When
  that one fails it says why; the others leave.
- What to train lies in a folder that all of them see, as JSON and .npy: nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.training.request import TrainingRequest

FOLDER, REQUEST, NOTHING = "team", "request.json", ""


def run_as_team(device: str, lead: Callable[[], int]) -> int:
    """`lead` in the first process, help in the others; the exit code."""
    from cdp.training.distributed import join_team, tell_team

    with join_team() as team:
        if not team.leads:
            return help_training(device)
        code = lead()
        tell_team(NOTHING, team)
        return code


def share_training(place: Path, request: TrainingRequest, arrays: Mapping[str, np.ndarray]) -> None:
    """Call the other processes, if there are any, to the training that begins now."""
    from cdp.training.distributed import find_team, tell_team

    team = find_team()
    if team.size == 1:
        return
    folder = place.resolve() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, values in arrays.items():
        if isinstance(values, np.memmap) and values.filename is not None:
            files[name] = str(Path(values.filename).resolve())
        else:
            files[name] = str(folder / f"{name}.npy")
            np.save(files[name], values)
    text = json.dumps({"request": asdict(request), "files": files})
    (folder / REQUEST).write_text(text, encoding="utf-8")
    tell_team(str(folder), team)


def help_training(device: str) -> int:
    """Do this process's part of every training, until there is none any more; the exit code."""
    from cdp.training.distributed import find_team, tell_team
    from pipelines.training.request import TrainingRequest, train_arrays

    while True:
        try:
            folder = tell_team(NOTHING, find_team())
        except RuntimeError:  # the first process is gone, and has said why
            return 1
        if not folder:
            return 0
        told = json.loads((Path(folder) / REQUEST).read_text(encoding="utf-8"))
        arrays = {name: np.load(path, mmap_mode="r") for name, path in told["files"].items()}
        train_arrays(TrainingRequest(**told["request"]), arrays, device)
