"""Figures show what they claim; files are written where they should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastmaml.plot import (
    RIGHT,
    WRONG,
    learning_curve,
    plot_run,
    sinusoid_figure,
    task_sheet,
)
from fastmaml.recipes import recipe
from fastmaml.recipes.common import UserError, save_settings
from fastmaml.train import Checkpoint, save_checkpoint


def _rows(accuracy: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in (10, 20, 30):
        train = {"kind": "train", "iteration": i, "loss": 30.0 / i}
        check = {"kind": "validation", "iteration": i, "loss": [9.0, 4.0, 30.0 / i]}
        if accuracy:
            train["accuracy"], check["accuracy"] = i / 100, [0.2, 0.4, i / 100]
        rows += [train, check]
    return rows


def _lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def test_the_learning_curve_shows_training_and_validation() -> None:
    figure = learning_curve(_rows(False), "sinusoid", "mean-squared error")
    (axes,) = figure.axes
    lines = _lines(axes)
    assert lines["training tasks"].get_ydata() == pytest.approx([3.0, 1.5, 1.0])
    assert lines["validation, before adapting"].get_ydata() == pytest.approx([9.0] * 3)
    assert lines["validation, after 2 steps"].get_ydata() == pytest.approx(
        [3.0, 1.5, 1.0]
    )
    assert axes.get_xlabel() == "meta-steps"
    assert "mean-squared error" in axes.get_ylabel()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == list(lines)


def test_the_learning_curve_of_images_adds_the_accuracy_in_percent() -> None:
    figure = learning_curve(_rows(True), "glyphs", "cross-entropy")
    _, axes = figure.axes
    assert axes.get_ylabel() == "query accuracy (%)"
    ys = _lines(axes)["validation, after 2 steps"].get_ydata()
    assert ys == pytest.approx([10.0, 20.0, 30.0])


def test_a_spike_does_not_flatten_the_learning_curve() -> None:
    rows = _rows(False)
    assert learning_curve(rows, "", "").axes[0].get_title() == ""
    rows[-1]["loss"][2], rows[1]["loss"][1] = 1e14, None
    (axes,) = learning_curve(rows, "", "").axes
    assert axes.get_ylim()[1] == pytest.approx(27.0)
    assert axes.get_title() == "spikes above the axis are cut"


def test_the_papers_figure_shows_waves_points_and_steps() -> None:
    settings = recipe("sinusoid").from_preset("paper")
    learner = settings.build()
    figure = sinusoid_figure(settings, learner, 1000, tasks=2)
    assert len(figure.axes) == 4
    sampler = settings.make_tasks("test", shots=10)
    batch, amplitude, phase = sampler.fixed_with_parameters(2, 0)
    for panel, axes in enumerate(figure.axes):
        lines, task = _lines(axes), panel % 2
        points = 5 if panel < 2 else 10
        assert len(lines["support"].get_xdata()) == points
        x = torch.as_tensor(lines["true wave"].get_xdata())
        wave = amplitude[task] * torch.sin(x - phase[task])
        assert torch.allclose(torch.as_tensor(lines["true wave"].get_ydata()), wave)
        for steps, label in ((0, "before adapting"), (10, "after 10 steps")):
            support = batch.support_x[:, :points], batch.support_y[:, :points]
            adapted = learner.adapt(*support, steps=steps)
            y = learner.predict(adapted, x.expand(2, -1).unsqueeze(-1))[task, :, 0]
            drawn = torch.as_tensor(lines[label].get_ydata())
            assert torch.allclose(drawn, y, atol=1e-5)
    assert "after 1 step" in _lines(figure.axes[0])


def _glyphs() -> Any:
    settings = recipe("glyphs").from_preset("paper")
    return dataclasses.replace(settings, characters=60, channels=4, shots=2)


def test_the_sheet_colours_predictions_by_whether_they_are_right() -> None:
    settings = _glyphs()
    learner = settings.build()
    figure = task_sheet(settings, learner, 10, queries=2)
    assert len(figure.axes) == 5 * (2 + 2)
    batch = settings.make_tasks("test", queries=2).fixed(1, 0)
    adapted = learner.adapt(batch.support_x, batch.support_y, steps=3)
    guesses = learner.predict(adapted, batch.query_x).argmax(-1)[0].tolist()
    labels = batch.query_y[0].tolist()
    right = sum(a == b for a, b in zip(guesses, labels, strict=True))
    assert f"{right} of 10 right" in figure.get_suptitle()
    queries = figure.axes[10:]
    colours = [axes.title.get_color() for axes in queries]
    assert colours.count(RIGHT) == right and colours.count(WRONG) == 10 - right
    for i, (label, guess) in enumerate(zip(labels, guesses, strict=True)):
        axes = queries[(i % 2) * 5 + label]
        assert axes.get_title().startswith(str(guess))
        shown = torch.as_tensor(axes.get_images()[0].get_array())
        assert torch.allclose(shown, batch.query_x[0, i, 0])
    support = torch.as_tensor(figure.axes[5].get_images()[0].get_array())
    assert torch.allclose(support, batch.support_x[0, 1, 0])


def _run(folder: Path, settings: Any, rows: list[dict[str, Any]]) -> None:
    save_settings(settings, folder)
    state = settings.build().state_dict()
    save_checkpoint(folder / "last.pt", Checkpoint(iteration=30, learner=state))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)


def test_pngs_are_written_and_nothing_is_blank(tmp_path: Path) -> None:
    _run(tmp_path, _glyphs(), _rows(True))
    paths = plot_run(tmp_path)
    assert {p.name for p in paths} == {"learning_curve.png", "task.png"}
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) >= 600
            assert len(image.convert("L").getcolors()) > 20


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        plot_run(tmp_path)
