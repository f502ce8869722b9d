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


def check_folder(experiment: Any) -> None:
    """Refuses, before anything is built, a folder that a run can't go to.

    Raises:
        UserError: it holds another run, or none that goes on with these settings.
    """
    if experiment.resume is not None:
        _check_resumed(experiment)
    elif experiment.out is not None and (Path(experiment.out) / SETTINGS).exists():
        raise UserError(
            f"--out {experiment.out} already holds a run: go on with it by --resume "
            f"{experiment.out}, or choose another folder"
        )


def run_folder(experiment: Any) -> Path:
    """The folder of a run: of the run to go on with, the one told, or a new one."""
    told = experiment.out if experiment.resume is None else experiment.resume
    return new_folder(Path("runs"), experiment.name) if told is None else Path(told)


def new_folder(parent: Path, name: str) -> Path:
    """Makes ``parent/name-DATE-TIME``, with a number behind it where that is taken.

    Runs that start in the same second ask for the same name: whoever makes the folder
    has it, and the next takes the next number.
    """
    parent.mkdir(parents=True, exist_ok=True)
    stamped = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = parent / stamped, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = parent / f"{stamped}-{number}"


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
