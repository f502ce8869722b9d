"""The folder of a run: its name, and which settings of it may change."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from fastmaml.recipes.common import SETTINGS, UserError, load_experiment

LOCKED_OUT = {"iterations", "threads", "data", "download", "checkpoint_every", "out"}
LOCKED_OUT |= {"resume", "tensorboard", "progress", "plots", "test_tasks"}
"""Settings that may change on resuming; the rest would change the run's bits."""


def run_folder(experiment: Any) -> Path:
    """The folder of a run: a new one, or that of the run to go on with."""
    if experiment.resume is not None:
        _check_resumed(experiment)
        return Path(experiment.resume)
    if experiment.out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return Path("runs") / f"{experiment.name}-{stamp}"
    path = Path(experiment.out)
    if (path / SETTINGS).exists():
        raise UserError(
            f"--out {path} already holds a run: go on with it by --resume {path}, or "
            "choose another folder"
        )
    return path


def _check_resumed(experiment: Any) -> None:
    before = load_experiment(str(experiment.resume))
    if before.name != experiment.name:
        raise UserError(
            f"--resume {experiment.resume} is a run of {before.name}, not "
            f"{experiment.name}: fastmaml train {before.name} --resume ..."
        )
    free = LOCKED_OUT
    if getattr(before, "meta_lr_decay", "none") != "none":
        free = LOCKED_OUT - {"iterations"}  # the rate's course depends on them
    for field in dataclasses.fields(experiment):
        was, now = getattr(before, field.name), getattr(experiment, field.name)
        if was != now and field.name not in free:
            option = field.name.replace("_", "-")
            raise UserError(
                f"--{option} was {was} in {experiment.resume} and can't become {now}: "
                "a resumed run goes on as it began; start another run instead"
            )
