"""Figures of a run: learning curves, fitted sine waves, a sheet of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from fastmaml.recipes.common import Experiment, UserError, load_experiment, load_run
from fastmaml.recipes.images import ImageExperiment
from fastmaml.recipes.sinusoid import Sinusoid
from fastmaml.train.logging import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG = "#1a7f37", "#cf222e"
STEP_COLOURS = {0: "#9a9a9a", 1: "#4c9be8", 10: "#0b3d91"}


@dataclass(frozen=True)
class Plot:
    """Draw a run: its learning curve, and what it does with new tasks."""

    run: Annotated[str, tyro.conf.Positional]
    """folder of the run"""
    others: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """folders of runs to draw beside it: baselines of an agent, on the same tasks"""
    checkpoint: Literal["best", "last"] = "best"
    """the best on the validation tasks, or the last"""
    seed: int = 0
    """which new tasks to show"""


def plot_run(
    run_dir: str | Path,
    *,
    others: Sequence[str | Path] = (),
    checkpoint: str = "best",
    seed: int = 0,
) -> list[Path]:
    """Writes the PNGs of a run into its folder ``plots``.

    Args:
        run_dir: the run's folder.
        others: folders of an agent's baselines, drawn beside it.
        checkpoint: ``best`` or ``last``.
        seed: which new tasks to show.

    Returns:
        The files written.

    Raises:
        UserError: there is no run, runs don't fit each other, or matplotlib is not
            installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib") from error
    figures: dict[str, Figure]
    if not isinstance(load_experiment(run_dir), Experiment):
        from fastmaml.rl.plot import agent_figures

        figures = agent_figures([run_dir, *others], checkpoint, seed)
        return _written(figures, Path(run_dir) / "plots")
    if others:
        raise UserError(
            f"plot takes several runs of reinforcement learning; {run_dir} is a run of "
            f"{load_experiment(run_dir).name}: give it alone"
        )
    experiment, learner, _, iteration = load_run(run_dir, checkpoint)
    figures = {}
    rows = read_metrics(run_dir)
    if rows:
        loss = "mean-squared error"
        if isinstance(experiment, ImageExperiment):
            loss = f"cross-entropy, {experiment.reduction.replace('_', ' ')}"
        figures["learning_curve"] = learning_curve(rows, experiment.name, loss)
    if isinstance(experiment, Sinusoid):
        figures["sinusoid"] = sinusoid_figure(experiment, learner, iteration, seed)
    elif isinstance(experiment, ImageExperiment):
        figures["task"] = task_sheet(experiment, learner, iteration, seed)
    return _written(figures, Path(run_dir) / "plots")


def _written(figures: dict[str, Figure], folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    return [folder / f"{name}.png" for name in figures]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def learning_curve(rows: list[dict[str, Any]], title: str, loss: str) -> Figure:
    """Loss, and accuracy where there is one, over the meta-steps.

    Args:
        rows: of ``metrics.jsonl``.
        title: over the figure.
        loss: what the loss is, for the label of its axis.
    """
    train = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    accuracy = any("accuracy" in row for row in rows)
    figure = _figure(11 if accuracy else 7, 4.6)
    figure.suptitle(f"{title}: learning curve")
    axes = figure.subplots(1, 2 if accuracy else 1, squeeze=False)[0]
    _curve(axes[0], train, validation, "loss")
    axes[0].set_yscale("log")
    _plain_log_ticks(axes[0])
    axes[0].set_ylabel(f"query loss ({loss})")
    _cut_spikes(axes[0], train, validation)
    if accuracy:
        _curve(axes[1], train, validation, "accuracy")
        axes[1].set_ylabel("query accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    columns = len(labels) if accuracy else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def _curve(
    axes: Axes, train: list[dict[str, Any]], validation: list[dict[str, Any]], key: str
) -> None:
    scale = 100.0 if key == "accuracy" else 1.0
    rows = [row for row in train if key in row]
    axes.plot(
        [row["iteration"] for row in rows],
        [scale * row[key] for row in rows],
        color="#b8860b",
        linewidth=0.8,
        alpha=0.7,
        label="training tasks",
    )
    rows = [row for row in validation if key in row]
    last = len(rows[0][key]) - 1 if rows else 0
    for step in sorted({0, 1, last}) if rows else ():
        axes.plot(
            [row["iteration"] for row in rows],
            [scale * _number(row[key][min(step, last)]) for row in rows],
            color=STEP_COLOURS.get(step if step < 2 else 10),
            marker="o" if len(rows) < 30 else None,
            markersize=3,
            label=f"validation, {_after(step)}",
        )
    axes.set_xlabel("meta-steps")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.grid(alpha=0.3)


def _cut_spikes(
    axes: Axes, train: list[dict[str, Any]], validation: list[dict[str, Any]]
) -> None:
    """Keeps one task that overflowed in a late step from flattening all curves."""
    usual = [row["loss"] for row in train]
    usual += [_number(row["loss"][0]) for row in validation]
    usual = [value for value in usual if math.isfinite(value)]
    if usual and axes.get_ylim()[1] > 3 * max(usual):
        axes.set_ylim(top=3 * max(usual))
        axes.set_title("spikes above the axis are cut", fontsize=9)


def _number(value: float | None) -> float:
    """A figure of a row; ``None`` stands for one that was not finite."""
    return float("nan") if value is None else value


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _after(step: int) -> str:
    return "before adapting" if not step else f"after {step} step{'s' * (step > 1)}"


def sinusoid_figure(
    experiment: Sinusoid,
    learner: Any,
    iteration: int,
    seed: int = 0,
    *,
    shots: tuple[int, ...] = (5, 10),
    tasks: int = 3,
    steps: tuple[int, ...] = (0, 1, 10),
) -> Figure:
    """New waves before and after adapting to a few of their points.

    Args:
        experiment: settings of the run.
        learner: as trained.
        iteration: meta-steps it was trained for.
        seed: which waves.
        shots: numbers of points, a row of panels each.
        tasks: waves, a column each.
        steps: inner steps, a curve each.

    Source:
        Figure 2 of the paper.
    """
    figure = _figure(4 * tasks, 3.1 * len(shots) + 0.8)
    panels = figure.subplots(len(shots), tasks, sharex=True, sharey=True, squeeze=False)
    grid = torch.linspace(-5, 5, 201, device=experiment.device)
    sampler = experiment.make_tasks("test", shots=max(shots))
    batch, amplitude, phase = sampler.fixed_with_parameters(tasks, seed)
    inputs = grid.expand(tasks, -1).unsqueeze(-1).contiguous()
    truth = _array(amplitude[:, None] * torch.sin(grid - phase[:, None]))
    xs = _array(grid)
    for row, points in zip(panels, shots, strict=True):
        # the first of the same points, so that rows show the same waves
        support_x = batch.support_x[:, :points].contiguous()
        support_y = batch.support_y[:, :points].contiguous()
        curves = {}
        for k in steps:
            adapted = learner.adapt(support_x, support_y, steps=k)
            curves[k] = _array(learner.predict(adapted, inputs)[..., 0])
        for task, axes in enumerate(row):
            axes.plot(xs, truth[task], color=WRONG, label="true wave")
            for k, curve in curves.items():
                _wave(axes, xs, curve[task], k)
            style = {"color": "#6a0dad", "markersize": 8, "zorder": 5}
            x, y = _array(support_x[task]), _array(support_y[task])
            axes.plot(x, y, "^", label="support", **style)
            error = np.square(curves[steps[-1]][task] - truth[task]).mean()
            axes.set_title(
                f"{points} points; error {_after(steps[-1])}: {float(error):.2g}",
                fontsize=10,
            )
            axes.grid(alpha=0.3)
        row[0].set_ylabel("y")
    for axes in panels[-1]:
        axes.set_xlabel("x")
    figure.suptitle(
        f"sinusoid after {iteration:,} meta-steps: new tasks (error = mean square)"
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _wave(axes: Axes, x: np.ndarray, y: np.ndarray, step: int) -> None:
    axes.plot(
        x,
        y,
        color=STEP_COLOURS.get(step, "#555555"),
        linestyle=":" if step == 0 else "--" if step == 1 else "-",
        label=_after(step),
    )


def task_sheet(
    experiment: ImageExperiment,
    learner: Any,
    iteration: int,
    seed: int = 0,
    *,
    queries: int = 3,
) -> Figure:
    """A new task: its support images, and its queries with what was predicted.

    Args:
        experiment: settings of the run.
        learner: as trained.
        iteration: meta-steps it was trained for.
        seed: which task.
        queries: query images shown for each class.
    """
    sampler = experiment.make_tasks("test", queries=queries)
    batch = sampler.fixed(1, seed)
    adapted = learner.adapt(
        batch.support_x, batch.support_y, steps=experiment.test_steps
    )
    predicted = learner.predict(adapted, batch.query_x).argmax(-1)[0].tolist()
    labels = batch.query_y[0].tolist()
    ways, shots = experiment.ways, experiment.shots
    figure = _figure(1.25 * ways + 0.9, 1.45 * (shots + queries) + 0.9)
    panels = figure.subplots(shots + queries, ways, squeeze=False)
    for i, label in enumerate(batch.support_y[0].tolist()):
        _picture(panels[i % shots][label], batch.support_x[0, i], "#555555")
        if i % shots == 0:
            panels[0][label].set_title(f"class {label}", fontsize=10)
    for i, (label, guess) in enumerate(zip(labels, predicted, strict=True)):
        axes = panels[shots + i % queries][label]
        right = label == guess
        _picture(axes, batch.query_x[0, i], RIGHT if right else WRONG)
        text = f"{guess} ✓" if right else f"{guess} ✗ (is {label})"
        axes.set_title(text, fontsize=9, color=RIGHT if right else WRONG)
    for row, axes in enumerate(panels[:, 0]):
        axes.set_ylabel("support" if row < shots else "query", fontsize=10)
    correct = sum(p == t for p, t in zip(predicted, labels, strict=True))
    figure.suptitle(
        f"{experiment.name} {ways}-way {shots}-shot: {correct} of {len(labels)} right\n"
        f"(predicted class; {experiment.test_steps} inner steps, "
        f"{iteration:,} meta-steps)",
        fontsize=10,
    )
    return figure


def _picture(axes: Axes, image: Tensor, colour: str) -> None:
    picture = _array(image.permute(1, 2, 0).squeeze(-1).clamp(0, 1))
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5)
