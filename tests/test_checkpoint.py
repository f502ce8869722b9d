"""Checkpoints are whole or absent, and a run that goes on ends in the same bits."""

from __future__ import annotations

import json
import pickle
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import inside, start, train

from fastmaml.train import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from fastmaml.train.checkpoint import random_state, set_random_state
from fastmaml.train.logging import TIMING_FIELDS, read_metrics


def _checkpoint(**changes: Any) -> Checkpoint:
    values = {"iteration": 7, "learner": {"weight": torch.arange(4.0)}}
    return Checkpoint(**(values | changes))


def test_round_trip_keeps_nested_tensors_numpy_and_numbers(tmp_path: Path) -> None:
    state = {
        "generator": {"state": 2**100 + 1, "key": np.arange(5, dtype=np.uint64)},
        "pair": (1, [None, True, 0.1]),
    }
    path = save_checkpoint(tmp_path / "a" / "last.pt", _checkpoint(sampler=state))
    loaded = load_checkpoint(path)
    assert loaded.iteration == 7
    assert torch.equal(loaded.learner["weight"], torch.arange(4.0))
    assert loaded.sampler["generator"]["state"] == 2**100 + 1
    key = loaded.sampler["generator"]["key"]
    assert key.dtype == np.uint64 and key.tolist() == [0, 1, 2, 3, 4]
    assert loaded.sampler["pair"] == (1, [None, True, 0.1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_parameters_are_not_written(tmp_path: Path, bad: float) -> None:
    path = save_checkpoint(tmp_path / "last.pt", _checkpoint())
    before = path.read_bytes()
    learner = {"model": {"bias": torch.tensor([0.0, bad])}}
    with pytest.raises(CheckpointError, match="'model.bias' holds NaN or infinity"):
        save_checkpoint(path, _checkpoint(learner=learner))
    assert path.read_bytes() == before


def test_a_failing_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(tmp_path / "last.pt", _checkpoint())
    before = path.read_bytes()

    def torn(value: object, file: Any) -> None:
        file.write(b"half of a check")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, _checkpoint(iteration=8))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_loading_explains_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "last.pt")
    whole = save_checkpoint(tmp_path / "last.pt", _checkpoint()).read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_checkpoint(tmp_path / "torn.pt")
    save_checkpoint(tmp_path / "new.pt", _checkpoint(format=99))
    with pytest.raises(CheckpointError, match="format 99, expected 1"):
        load_checkpoint(tmp_path / "new.pt")


class _Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("harm"),))  # type: ignore[return-value]


def test_no_code_of_a_file_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "iteration": _Harmful()}, "evil.pt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="can't be read"):
        load_checkpoint("evil.pt")
    assert not Path("harm").exists()


def test_random_generators_come_back(tmp_path: Path) -> None:
    def numbers() -> list[float]:
        return [random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]

    numbers()
    path = save_checkpoint(tmp_path / "x.pt", _checkpoint(random=random_state()))
    first = numbers()
    set_random_state(load_checkpoint(path).random)
    assert numbers() == first


def _comparable(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run)
    return [{k: v for k, v in r.items() if k not in TIMING_FIELDS} for r in rows]


def _same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same_bits, a, b))
    return bool(np.array_equal(a, b))


def _assert_same_run(a: Path, b: Path) -> None:
    for name in ("last.pt", "best.pt"):
        x, y = load_checkpoint(a / name), load_checkpoint(b / name)
        assert x.iteration == y.iteration
        assert _same_bits(x.learner, y.learner), f"parameters of {name} differ"
        assert _same_bits(x.optimizer, y.optimizer), f"optimizer of {name} differs"
        assert _same_bits(x.sampler, y.sampler), f"sampler of {name} differs"
        assert _same_bits(x.random, y.random), f"generators of {name} differ"
    assert _comparable(a) == _comparable(b)


CADENCE = ("--log-every", 7, "--validate-every", 50, "--checkpoint-every", 40)
QUIET = ("--test-tasks", 0, "--no-plots")


def _wait_for_iteration(run: Path, iteration: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while not any(row["iteration"] >= iteration for row in read_metrics(run)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("experiment", "iterations", "killed_at"),
    [
        ("sinusoid", 400, (90, 250)),
        ("glyphs", 60, (22,)),
        ("navigation", 60, (13, 40)),
        ("navigation --outer ppo", 30, (13,)),
    ],
)
def test_killed_and_resumed_ends_in_the_same_bits(
    tmp_path: Path, experiment: str, iterations: int, killed_at: tuple[int, ...]
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    experiment, *options = experiment.split()
    cadence: tuple[Any, ...] = (*CADENCE, "--learn-rates")
    if experiment == "glyphs":
        cadence = ("--log-every", 3, "--validate-every", 20, "--checkpoint-every", 8)
        cadence += ("--learn-rates",)
    elif experiment == "navigation":
        cadence = ("--validate-every", 9, "--checkpoint-every", 4, *options)
    words = ("--iterations", iterations, *cadence, *QUIET)
    done = inside(*train(experiment, straight, *words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = train(experiment, broken, *words)
    for iteration in killed_at:
        process = start(*command, cwd=tmp_path)
        _wait_for_iteration(broken, iteration, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        command = ["train", experiment, "--resume", broken]
    done = inside(*command, cwd=tmp_path)  # a process that has drawn other numbers
    assert done.returncode == 0, done.stderr
    _assert_same_run(straight, broken)


def test_resume_drops_rows_after_the_checkpoint_and_half_a_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--log-every", 5, "--checkpoint-every", 20, *QUIET)
    inside(*train("sinusoid", run, "--iterations", 40, *words), cwd=tmp_path)
    rows = _comparable(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "iteration": 45, "loss": 1.0}) + "\n")
        file.write('{"kind": "train", "iter')
    words = ("train", "sinusoid", "--resume", run, "--iterations", 50)
    more = inside(*words, cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    after = _comparable(run)
    assert after[: len(rows)] == rows
    train_rows = [r["iteration"] for r in after if r["kind"] == "train"]
    assert train_rows == list(range(5, 55, 5))
