"""Running the command line as a user does, in its own process, or quicker in this."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from fastmaml import _native, cli

TINY = {
    "sinusoid": ["--test-tasks", "20", "--validation-tasks", "10", "--no-tensorboard"],
    "glyphs": [
        *("--test-tasks", "6", "--validation-tasks", "4", "--no-tensorboard"),
        *("--characters", "60", "--channels", "4", "--meta-batch", "2"),
    ],
    "navigation": [
        *("--test-tasks", "4", "--validation-tasks", "3", "--no-tensorboard"),
        *("--meta-batch", "3", "--episodes", "4", "--horizon", "20"),
        *("--hidden", "8", "8", "--test-episodes", "4"),
    ],
}


def environment() -> dict[str, str]:
    """One thread, no window, and the package this process uses."""
    return os.environ | {
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def arguments(*words: object) -> list[str]:
    """The words of a process that runs ``fastmaml`` with these."""
    return [sys.executable, "-m", "fastmaml", *map(str, words)]


def fastmaml(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        arguments(*words),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def inside(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process: for what it does, not for how it starts or ends.

    A process of its own would import torch first, for longer than most tests take.
    """
    given = [str(word) for word in words]
    out, errors = io.StringIO(), io.StringIO()
    here, torchs = Path.cwd(), torch.get_num_threads()
    core = _native.core() if _native.unavailable() is None else None
    engines = core.num_threads() if core else 0
    os.chdir(cwd)
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            code = cli.main(given)
    finally:
        os.chdir(here)
        torch.set_num_threads(torchs)
        if core:
            core.set_num_threads(engines)
    return subprocess.CompletedProcess(given, code, out.getvalue(), errors.getvalue())


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """Starts a command and returns at once."""
    return subprocess.Popen(
        arguments(*words),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(experiment: str, out: Path, *words: object) -> list[Any]:
    """The words of a tiny run."""
    return ["train", experiment, "--out", out, *TINY[experiment], *words]
