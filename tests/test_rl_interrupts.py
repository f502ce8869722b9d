"""Runs that end early leave no threads of the simulator and no processes behind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import start

from fastmaml import cli
from fastmaml.recipes.reinforcement import RLExperiment
from fastmaml.train.logging import read_metrics

pytest.importorskip("mujoco.batch", reason="needs the extra fastmaml[rl]")
if not Path("/proc/self/task").is_dir():
    pytest.skip("needs /proc", allow_module_level=True)

THREADS = 3
WORDS = (
    *("--meta-batch", 4, "--episodes", 3, "--horizon", 20, "--hidden", 8),
    *("--validation-tasks", 2, "--test-tasks", 0, "--no-plots", "--no-tensorboard"),
    *("--threads", THREADS),
)


def _threads() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/task"))


def _train(out: Path, *words: object) -> int:
    arguments = ("train", "cheetah-vel", "--out", out, *WORDS, *words)
    return cli.main(list(map(str, arguments)))


@pytest.fixture
def usual(tmp_path: Path) -> int:
    """Threads after a whole run: torch's and the engine's, which stay."""
    assert _train(tmp_path / "whole", "--iterations", 1) == 0
    return _threads()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Environments made, held so that only closing them ends their threads."""
    held: list[Any] = []
    make = RLExperiment.make_rows

    def holding(self: RLExperiment, *arguments: Any) -> Any:
        held.append(make(self, *arguments))
        return held[-1]

    monkeypatch.setattr(RLExperiment, "make_rows", holding)
    return held


def test_an_interrupt_in_a_rollout_ends_the_simulators_threads(
    usual: int, kept: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmaml.rl.envs.half_cheetah import HalfCheetahVelVector as Vector

    step, seen = Vector.step, []

    def interrupted(self: Any, actions: np.ndarray) -> Any:
        seen.append(_threads())
        if len(seen) == 30:  # in the second rollout
            raise KeyboardInterrupt
        return step(self, actions)

    monkeypatch.setattr(Vector, "step", interrupted)
    assert _train(tmp_path / "run", "--iterations", 5) == 130
    assert max(seen) > usual, "the simulator had no threads of its own"
    assert _threads() == usual and len(kept) == 2


def test_a_run_that_is_refused_ends_the_simulators_threads(
    usual: int, kept: list[Any], tmp_path: Path
) -> None:
    words = ("--inner-loss", "dice", "--fisher-subsample", 0.5)
    assert _train(tmp_path / "run", "--iterations", 1, *words) == 2
    assert _threads() == usual
    whole, other = tmp_path / "whole", tmp_path / "other"
    assert _train(other, "--iterations", 1, "--hidden", 4) == 0
    for name in ("last.pt", "best.pt"):
        shutil.copy(other / name, whole / name)
    assert cli.main(["evaluate", str(whole), "--tasks", "2"]) == 2
    assert _threads() == usual and len(kept) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    words = ("--iterations", 100_000, "--checkpoint-every", 1000)
    process = start("train", "cheetah-vel", "--out", run, *WORDS, *words, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not read_metrics(run):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    pid = process.pid
    assert len(os.listdir(f"/proc/{pid}/task")) > THREADS
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    process.send_signal(number)
    process.communicate(timeout=60)
    expected = -signal.SIGKILL if number == signal.SIGKILL else 130
    assert process.returncode == expected
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
