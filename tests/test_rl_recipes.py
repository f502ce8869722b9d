"""Experiments of reinforcement learning, from the command line to their figures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import TINY, fastmaml, inside, train

from fastmaml import cli
from fastmaml.recipes import names, recipe
from fastmaml.recipes.common import UserError
from fastmaml.recipes.rl_evaluation import format_returns
from fastmaml.recipes.rl_settings import FAST
from fastmaml.train.logging import read_metrics

pytest.importorskip("gymnasium")

PAPER = [
    ("navigation", "paper", dict(meta_batch=20, inner_lr=0.1, episodes=20)),
    ("navigation", "code", dict(meta_batch=40, inner_lr=0.5)),
    ("navigation", "paper", dict(max_kl=0.01, test_episodes=40, reward="code")),
    ("cheetah-dir", "paper", dict(meta_batch=40, max_kl=0.02, episodes=20)),
    ("cheetah-vel", "paper", dict(max_kl=0.01, episodes=20)),
    ("cheetah-vel", "code", dict(episodes=10)),
    ("ant-dir", "paper", dict(episodes=40, hidden=(100, 100), activation="relu")),
    ("ant-vel", "paper", dict(episodes=20, gamma=0.99, gae_lambda=1.0)),
    ("ant-dir", "gym", dict(hidden=(64, 64), activation="tanh")),
    ("cheetah-dir", "paper", dict(cg_iterations=10, damping=1e-5, fisher_subsample=1)),
    ("ant-vel", "code", dict(preconditioner="none", search_subsample=1)),
    ("cheetah-dir", "fast", dict(max_kl=0.02, episodes=20, hidden=(100, 100), **FAST)),
]


@pytest.mark.parametrize(("name", "preset", "expected"), PAPER)
def test_presets_hold_the_papers_settings(
    name: str, preset: Any, expected: dict[str, Any]
) -> None:
    settings = recipe(name).from_preset(preset)
    assert {key: getattr(settings, key) for key in expected} == expected
    assert settings.iterations == 500 and settings.test_rates[:3] in (
        (0.1, 0.05, 0.05),
        (0.5, 0.25, 0.25),
    )
    if name != "navigation":
        family = "gym" if preset == "gym" else "finn2017"
        assert settings.environment_settings()["preset"] == family


@pytest.mark.parametrize("method", ["maml", "pretrained", "oracle", "random"])
def test_every_method_trains_evaluates_and_plots(method: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--iterations", 2, "--method", method)
    done = inside(*train("navigation", run, *words), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "evaluation.json").read_text())
    assert record["method"] == method and record["tasks"] == 4
    assert record["iteration"] == (0 if method == "random" else 2)
    assert len(record["returns"]) == (1 if method == "oracle" else 5)
    assert "-40.41" not in done.stdout, "returns of 20 steps are in other units"
    rows = [row for row in read_metrics(run) if row["kind"] == "train"]
    returns = [len(row["returns"]) for row in rows]
    assert returns == {"maml": [2, 2], "random": []}.get(method, [1, 1])
    pictures = {"returns.png", "adaptation.png", "paths.png"}
    pictures -= {"random": {"returns.png"}, "oracle": {"adaptation.png"}}.get(
        method, set()
    )
    assert {p.name for p in (run / "plots").iterdir()} == pictures
    again = inside("evaluate", run, "--tasks", 3, "--seed", 1, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    other = json.loads((run / "evaluation.json").read_text())
    assert other["tasks"] == 3 and other["returns"] != record["returns"]


@pytest.mark.parametrize(
    "words",
    [
        ("--outer", "vpg"),
        ("--outer", "ppo", "--inner-steps", 2),
        ("--inner-loss", "likelihood_ratio", "--fisher-subsample", 0.5),
        ("--inner-loss", "dice", "--search-subsample", 0.5),
        ("--engine", "functional", "--preset", "code"),
    ],
)
def test_options_reach_the_update(words: tuple[Any, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--iterations", 2, "--no-plots", *words)
    done = inside(*train("navigation", run, *more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_metrics(run) if row["kind"] == "train"]
    assert len(rows) == 2 and all(row["kl"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fisher-subsample", 0), "fisher_subsample must be in (0, 1], got 0"),
        (("--search-subsample", 1.5), "search_subsample must be in (0, 1], got 1.5"),
        (("--meta-batch", 0), "meta_batch must be at least 1, got 0"),
        (("--episodes", 0), "episodes must be at least 1, got 0"),
        (("--iterations", -1), "iterations must be at least 0, got -1"),
        (("--test-episodes", 0), "test_episodes must be at least 1, got 0"),
        (("--test-tasks", 1), "or 0 to leave the evaluation out, got 1"),
        (("--horizon", 0), "horizon must be at least 1, got 0"),
        (("--hidden", 8, 0), "hidden must be at least 1, got 0"),
        (("--ppo-epochs", 0), "ppo_epochs must be at least 1, got 0"),
        (("--cg-iterations", 0), "cg_iterations must be at least 1, got 0"),
        (("--preconditioner", "some"), "Expected one of ('none', 'kronecker')"),
        (("--inner-lr", "nan"), "inner_lr must be a finite number above 0, got nan"),
        (("--max-kl", -1), "max_kl must be a finite number above 0, got -1.0"),
        (("--meta-lr", 0), "meta_lr must be a finite number above 0, got 0.0"),
        (("--test-rates", 0.1, -1), "test_rates must be a finite number above 0"),
        (("--gamma", 2), "gamma must be a number in [0, 1], got 2.0"),
        (("--gae-lambda", -1), "gae_lambda must be a number in [0, 1], got -1.0"),
        (("--damping", -1), "damping must be 0 or more, got -1.0"),
        (("--inner-loss", "dice", "--fisher-subsample", 0.5), "must be 1 with inner_l"),
        (("--seed", -1), "seed must be in [0, 2^61), got -1"),
        (("--preset", "gym"), "Expected one of ('paper', 'code')"),
        (("--reward", "square"), "Expected one of ('code', 'paper')"),
        (("--resume", "nowhere"), "no run in nowhere"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_settings_without_sense_are_refused(
    words: tuple[Any, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "navigation", *TINY["navigation"], *words]
    assert cli.main(list(map(str, arguments))) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a run that never began left files"


def test_help_offers_the_presets_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in names():
        with pytest.raises(SystemExit):
            cli.main(["train", name, "--help"])
        offered = "--preset {" + ",".join(recipe(name).presets) + "}"
        assert offered in capsys.readouterr().out, name
    with pytest.raises(ValueError, match="preset must be one of paper, code for nav"):
        dataclasses.replace(recipe("navigation")(), preset="gym").check()


def test_supervised_options_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--iterations", 1, "--no-plots", "--test-tasks", 0)
    assert inside(*train("navigation", run, *words), cwd=tmp_path).returncode == 0
    for words in (("--inductive",), ("--shots", 5), ("--tasks", 1)):
        done = inside("evaluate", run, *words, cwd=tmp_path)
        assert done.returncode == 2 and words[0] in done.stderr


def test_a_locomotion_run(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    run = tmp_path / "run"
    words = (
        *("train", "cheetah-dir", "--out", run, "--iterations", 2, "--meta-batch", 2),
        *("--episodes", 2, "--horizon", 10, "--hidden", 8, "--validation-tasks", 0),
        *("--test-tasks", 3, "--no-tensorboard", "--threads", 1),
    )
    done = inside(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "evaluation.json").read_text())
    assert len(record["returns"]) == 4 and record["horizon"] == 10


def test_tables_stand_beside_the_papers_figures() -> None:
    record = {
        "preset": "paper",
        "method": "maml",
        "checkpoint": "best.pt",
        "iteration": 500,
        "tasks": 40,
        "episodes": 40,
        "rates": [0.1, 0.05],
        "returns": [-40.0, -10.0, -3.0],
        "interval": [1.0, 0.5, 0.25],
        "nonfinite_episodes": [0, 1, 0],
    }
    table = format_returns(recipe("navigation").from_preset("paper"), record)
    lines = table.splitlines()
    assert "-10.00 ± 0.50" in lines[3] and "-3.00 ± 0.25" in lines[3]
    assert lines[4].split()[2:] == ["-40.41", "-11.68", "-3.33"]
    assert lines[-1] == "1 episodes ended because the simulator was not finite"
    squared = recipe("navigation").from_preset("paper").__class__(reward="paper")
    assert "-40.41" not in format_returns(squared, record)


def test_an_agent_is_drawn_or_the_reason_given(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    run = tmp_path / "run"
    words = (
        *("train", "cheetah-dir", "--out", run, "--iterations", 1, "--meta-batch", 2),
        *("--episodes", 2, "--horizon", 12, "--hidden", 8, "--validation-tasks", 0),
        *("--test-tasks", 0, "--no-plots", "--no-tensorboard", "--threads", 1),
    )
    assert fastmaml(*words, cwd=tmp_path).returncode == 0
    done = fastmaml("render", run, "--steps", 1, cwd=tmp_path)
    if done.returncode:
        assert done.returncode == 2 and "nothing to draw with" in done.stderr
        pytest.skip(done.stderr.strip())
    from PIL import Image

    from fastmaml.rl.render import _ffmpeg

    words = ("--steps", 1, "--out", "agent.gif")
    done = fastmaml("render", run, *words, cwd=tmp_path)
    assert done.returncode == 0 and "wrote agent.gif" in done.stdout
    with Image.open(tmp_path / "agent.gif") as picture:
        assert picture.n_frames > 3 and picture.size[0] >= 240
        shown = np.asarray(picture.convert("L"))
        assert shown.std() > 10, "an empty picture"
    suffix = ".gif" if _ffmpeg() is None else ".mp4"
    assert (run / "plots" / f"agent{suffix}").stat().st_size > 5000


def test_frames_become_an_mp4(tmp_path: Path) -> None:
    from fastmaml.rl import render

    program = render._ffmpeg()
    if program is None:
        pytest.skip("no ffmpeg: pip install imageio-ffmpeg, or install ffmpeg")
    frames = [np.full((33, 47, 3), 20 * i, dtype=np.uint8) for i in range(12)]
    path = tmp_path / "agent.mp4"
    render._write(path, frames, 25.0)
    command = [program, "-i", str(path), "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    read = np.frombuffer(done.stdout, dtype=np.uint8).reshape(12, 34, 48)
    levels = read[:, 4:-4, 4:-4].mean((1, 2))
    assert np.abs(levels - 20 * np.arange(12)).max() < 6
    with pytest.raises(UserError, match="ffmpeg could not write"):
        render._write(tmp_path / "nowhere" / "agent.mp4", frames, 25.0)


def test_render_says_what_it_can_not_draw(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastmaml.rl import render

    monkeypatch.setattr(render, "_ffmpeg", lambda: None)
    for words, message in (
        (("--out", "agent.png"), "expected a .gif or .mp4 file"),
        (("--out", "agent.mp4"), "an mp4 needs ffmpeg; pip install imageio-ffmpeg"),
        (("--steps", "-1"), "--steps must be at least 0, got -1"),
        ((), "no run in"),
    ):
        assert cli.main(["render", str(tmp_path), *words]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("MUJOCO_GL", "nothing-of-that-name")
    with pytest.raises(UserError, match="nothing to draw with .nothing-of-that-name"):
        render._use_opengl()


def test_a_recorded_run_becomes_a_row(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    try:
        from bench.record_run import record
        from bench.results_table import row
    finally:
        sys.path.pop(0)
    run = tmp_path / "run"
    words = ("--iterations", 1, "--no-plots")
    assert inside(*train("navigation", run, *words), cwd=tmp_path).returncode == 0
    options = argparse.Namespace(
        experiment="2D navigation", command="c", published="p", steps=[0, 1]
    )
    found = record(run, options)
    assert [point["iteration"] for point in found["curve"]] == [1]
    returns = json.loads((run / "evaluation.json").read_text())["returns"]
    assert f"| {returns[0]:.2f} ± " in row(found)
    assert "4 tasks, 4 episodes each" in row(found)
