"""Runs of agents beside each other: tables, figures, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import train
from PIL import Image

from fastmaml import cli
from fastmaml.recipes import recipe
from fastmaml.recipes.reinforcement import TEST_SEED, load_rl_run
from fastmaml.rl.plot import adaptation_figure, paths_figure, returns_figure
from fastmaml.train.logging import read_metrics

pytest.importorskip("gymnasium")

METHODS = ("maml", "pretrained", "random", "oracle")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny run of every method, without its evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        words = ("--iterations", 2, "--method", method, "--validate-every", 1)
        _ok(*train("navigation", folder / method, *words, *QUIET))
    words = ("--iterations", 1, "--reward", "paper", *QUIET)
    _ok(*train("navigation", folder / "squared", *words))
    _ok(*train("glyphs", folder / "glyphs", "--iterations", 2, *QUIET))
    return {path.name: path for path in folder.iterdir()}


QUIET = ("--test-tasks", 0, "--no-plots")


def _ok(*words: object) -> None:
    assert cli.main(list(map(str, words))) == 0


def _refused(capsys: Any, *words: object) -> str:
    assert cli.main(list(map(str, words))) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    return str(errors)


def _record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "evaluation.json").read_text()))


@pytest.fixture(scope="module")
def compared(runs: dict[str, Path]) -> dict[str, Any]:
    """The record of the run beside those of the baselines."""
    others = [runs[name] for name in METHODS[1:]]
    words = ("--tasks", 4, "--steps", 3)
    _ok("evaluate", runs["maml"], *words, "--compare", *others)
    return _record(runs["maml"])


def test_others_are_tried_on_the_same_tasks(
    runs: dict[str, Path], compared: dict[str, Any]
) -> None:
    others = compared["compared"]
    assert [row["method"] for row in others] == list(METHODS[1:])
    assert [len(row["returns"]) for row in (compared, *others)] == [4, 4, 4, 1]
    assert {row["tasks"] for row in others} == {compared["tasks"]} == {4}
    assert {row["episodes"] for row in others} == {compared["episodes"]}
    _, learner, *_ = load_rl_run(runs["pretrained"], "best", 4)
    tasks = learner.envs.sample_tasks(4, TEST_SEED)
    returns, _ = learner.adapted_returns(tasks, (0.1, 0.05, 0.05), seed=TEST_SEED)
    assert others[0]["returns"] == returns.mean(0).tolist()
    spread = 1.96 * returns.std(0) / 2
    assert others[0]["interval"] == pytest.approx(spread.tolist())
    assert others[0]["task_parameters"] == tasks.tolist()
    assert others[0]["task_returns"] == returns.tolist()
    assert others[0]["run"] == str(runs["pretrained"])
    assert not (runs["pretrained"] / "evaluation.json").exists()


def test_the_table_has_a_row_for_each(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    twin = runs["maml"].parent / "twin"
    if not twin.exists():
        shutil.copytree(runs["maml"], twin)
    capsys.readouterr()
    others = runs["oracle"], runs["random"], twin
    _ok("evaluate", runs["maml"], "--tasks", 3, "--compare", *others)
    record = _record(runs["maml"])
    lines = capsys.readouterr().out.splitlines()[3:]
    names = ["this run, MAML", "oracle", "random start", "MAML, twin"]
    assert [line[:24].strip() for line in lines] == names
    for line, row in zip(lines, [record, *record["compared"]], strict=True):
        for value, interval in zip(row["returns"], row["interval"], strict=True):
            assert f"{value:.2f} ± {interval:.2f}" in line
    assert record["compared"][2]["returns"] == record["returns"]


def test_runs_of_other_tasks_are_refused(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = ["evaluate", runs["maml"], "--tasks", 2, "--compare"]
    said = _refused(capsys, *before, runs["squared"])
    assert "has environment paper" in said and "give runs of the same tasks" in said
    assert "which has no agent" in _refused(capsys, *before, runs["glyphs"])
    assert "no run in nowhere" in _refused(capsys, *before, "nowhere")
    words = ("evaluate", runs["glyphs"], "--compare", runs["maml"])
    assert "--compare is for runs of reinforcement" in _refused(capsys, *words)
    words = ("plot", runs["glyphs"], runs["maml"])
    assert "several runs of reinforcement learning" in _refused(capsys, *words)
    assert "has environment" in _refused(capsys, "plot", runs["maml"], runs["squared"])
    words = ("evaluate", runs["maml"], "--steps", -1)
    assert "--steps must be at least 0, got -1" in _refused(capsys, *words)


def test_a_checkpoint_of_another_run_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, other in (("maml", "oracle"), ("maml", "glyphs"), ("glyphs", "maml")):
        run = tmp_path / f"{name}-{other}"
        shutil.copytree(runs[name], run)
        for file in ("last.pt", "best.pt"):
            shutil.copy(runs[other] / file, run / file)
        for words in (
            ("evaluate", run),
            ("train", "glyphs" if name == "glyphs" else "navigation", "--resume", run),
        ):
            said = _refused(capsys, *words)
            assert f"{run}" in said and "does not fit the settings of this run" in said
            assert "Expected a checkpoint that this run has written" in said


def test_plots_of_several_runs(runs: dict[str, Path], compared: dict[str, Any]) -> None:
    _ok("evaluate", runs["maml"], "--tasks", 4, "--compare", runs["pretrained"])
    _ok("plot", runs["maml"], runs["pretrained"])
    for name in ("returns", "adaptation", "paths"):
        with Image.open(runs["maml"] / "plots" / f"{name}.png") as image:
            assert min(image.size) >= 600 and len(image.getcolors(1 << 20) or ()) > 20


def test_plotting_asks_for_evaluations_that_are_not_there(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("plot", runs["pretrained"], runs["random"])
    said = _refused(capsys, *words)
    assert f"fastmaml evaluate {runs['pretrained']} --compare {runs['random']}" in said


def _lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def _band(axes: Any, i: int) -> tuple[float, float]:
    """Lowest and highest point of a band."""
    ys = axes.collections[i].get_paths()[0].vertices[:, 1]
    return float(ys.min()), float(ys.max())


def test_returns_against_inner_steps(compared: dict[str, Any]) -> None:
    records = [compared, *compared["compared"]]
    (axes,) = adaptation_figure(records, recipe("navigation")()).axes
    lines = _lines(axes)
    assert list(lines)[:4] == ["MAML", "pretrained", "random start", "oracle"]
    for i, (name, row) in enumerate(zip(lines, records, strict=False)):
        y = row["returns"] if len(row["returns"]) > 1 else row["returns"] * 2
        assert list(lines[name].get_ydata()) == y
        spread = row["interval"] * (2 if len(y) > len(row["returns"]) else 1)
        lower = min(a - b for a, b in zip(y, spread, strict=True))
        upper = max(a + b for a, b in zip(y, spread, strict=True))
        assert _band(axes, i) == pytest.approx((lower, upper))
    assert list(lines["oracle"].get_xdata()) == [0, 3]
    assert len({line.get_color() for line in lines.values()}) == 5
    assert list(lines["paper, MAML"].get_ydata()) == [-40.41, -11.68, -3.33, -3.23]
    squared = recipe("navigation")(reward="paper")
    assert "paper, MAML" not in _lines(adaptation_figure(records, squared).axes[0])


def test_returns_against_meta_iterations(runs: dict[str, Path]) -> None:
    rows = read_metrics(runs["maml"])
    (axes,) = returns_figure(rows, recipe("navigation")()).axes
    lines = _lines(axes)
    assert list(lines) == [
        "training tasks, before adapting",
        "training tasks, after 1 step",
        "held-out tasks, before adapting",
        "held-out tasks, after 1 step",
        "held-out tasks, after 4 steps",
    ]
    held_out = [row for row in rows if row["kind"] == "validation"]
    for step, label in ((0, "before adapting"), (4, "after 4 steps")):
        drawn = lines[f"held-out tasks, {label}"]
        assert list(drawn.get_ydata()) == [row["returns"][step] for row in held_out]
        assert list(drawn.get_xdata()) == [1, 2]
    first = [row["returns"][0] for row in held_out]
    spread = [row["interval"][0] for row in held_out]
    lower = min(a - b for a, b in zip(first, spread, strict=True))
    assert _band(axes, 0)[0] == pytest.approx(lower)
    for row in rows:  # runs of before have no intervals
        row.pop("interval", None)
    assert not returns_figure(rows, recipe("navigation")()).axes[0].collections


def test_paths_have_a_row_of_panels_for_each_run(runs: dict[str, Path]) -> None:
    figure = paths_figure([runs["maml"], runs["oracle"]], "last", 0, tasks=2)
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [
        "MAML, 2 meta-iterations",
        "oracle, 2 meta-iterations",
    ]
    _, learner, *_ = load_rl_run(runs["maml"], "last", 2)
    seed = TEST_SEED + 1000
    goals = learner.envs.sample_tasks(2, seed)
    rates = (0.1, 0.05, 0.05, 0.05)
    returns, found = learner.adapted_returns(goals, rates, seed=seed)
    for i, axes in enumerate(figure.axes[:2]):
        lines = _lines(axes)
        assert lines["goal"].get_xydata()[0] == pytest.approx(goals[i])
        path = torch.as_tensor(lines["after 4 steps"].get_xydata())
        seen = found[4].observations[i, 0][found[4].mask[i, 0]]
        assert torch.allclose(path, seen.double())
        last = f"{returns[i, 4]:.1f}".replace("-", "−")
        assert axes.get_title().endswith(f"→ {last}")
    # an oracle has no path after a step
    assert "after 1 step" not in _lines(figure.axes[2])
