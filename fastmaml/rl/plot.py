"""Figures of agents: returns over meta-iterations and over inner steps, and paths."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmaml.recipes.common import UserError, load_experiment
from fastmaml.recipes.navigation import Navigation
from fastmaml.recipes.reinforcement import TEST_SEED, RLExperiment, load_rl_run
from fastmaml.recipes.rl_evaluation import EVALUATION, LABELS, names_of, same_tasks
from fastmaml.train.logging import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

BEFORE, FIRST, LAST = "#8a8a8a", "#4c9be8", "#0b3d91"
METHODS = {
    "maml": "#0b3d91",
    "pretrained": "#e07b00",
    "random": "#8a8a8a",
    "oracle": "#2a9d8f",
}
"""Colours of methods, told apart by lightness as well as by hue."""
FURTHER = ("#7b2cbf", "#c1121f", "#588157", "#000000")  # of methods that come again
GOAL, START, PAPER = "#cf222e", "#555555", "#000000"
RETURN = "mean undiscounted return"


def agent_figures(
    runs: Sequence[str | Path], checkpoint: str = "best", seed: int = 0
) -> dict[str, Figure]:
    """Figures of a run, and of others beside it, by name.

    Args:
        runs: the run's folder, and those of the others.
        checkpoint: ``best`` or ``last``.
        seed: which new tasks to show.

    Raises:
        UserError: there is no run, others are of other tasks, or were not evaluated.
    """
    same_tasks(runs)
    experiment = load_experiment(runs[0])
    figures = {}
    rows = read_metrics(runs[0])
    if any(row["kind"] in ("train", "validation") for row in rows):
        figures["returns"] = returns_figure(rows, experiment)
    records = _records(runs)
    if any(len(record["returns"]) > 1 for record in records):
        figures["adaptation"] = adaptation_figure(records, experiment)
    if isinstance(experiment, Navigation):
        figures["paths"] = paths_figure(runs, checkpoint, seed)
    return figures


def _records(runs: Sequence[str | Path]) -> Rows:
    """What runs were evaluated to, and those that the first one was compared to."""
    path = Path(runs[0]) / EVALUATION
    if not path.is_file():
        if len(runs) > 1:
            raise UserError(_unevaluated(runs[0], runs))
        return []
    first = json.loads(path.read_text()) | {"run": str(runs[0])}
    found: Rows = [first]
    compared = {Path(row["run"]).resolve(): row for row in first.get("compared", [])}
    for run in runs[1:]:
        beside = compared.pop(Path(run).resolve(), None)
        path = Path(run) / EVALUATION
        if beside is not None:  # on the same tasks as the first
            found.append(beside)
        elif path.is_file():
            found.append(json.loads(path.read_text()) | {"run": str(run)})
        else:
            raise UserError(_unevaluated(run, runs))
    return [*found, *compared.values()]


def _unevaluated(run: str | Path, runs: Sequence[str | Path]) -> str:
    others = " ".join(map(str, runs[1:]))
    return (
        f"{run} has no {EVALUATION}: run fastmaml evaluate {runs[0]} --compare "
        f"{others} first"
    )


def returns_figure(rows: Rows, experiment: RLExperiment) -> Figure:
    """Returns over the meta-iterations, in training and on held-out tasks.

    Args:
        rows: of ``metrics.jsonl``.
        experiment: settings of the run.
    """
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    returns_panel(axes, rows)
    axes.set_title(
        f"{experiment.name}, {experiment.preset}, {LABELS[experiment.method]}"
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def returns_panel(axes: Axes, rows: Rows) -> None:
    """Returns before adapting, after one inner step, and after the last.

    Bands are 95% intervals over the held-out tasks, where rows have them.

    Args:
        axes: to draw on.
        rows: with ``kind``, ``iteration`` and ``returns``.
    """
    from matplotlib.ticker import MaxNLocator

    for kind in ("train", "validation"):
        own = [row for row in rows if row["kind"] == kind]
        last = len(own[0]["returns"]) - 1 if own else -1
        for step in sorted({0, 1, last} & set(range(last + 1))):
            _course(axes, own, step, _step_colour(step))
    axes.set_xlabel("meta-iterations")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_ylabel(RETURN)
    _style(axes)


def _course(axes: Axes, rows: Rows, step: int, colour: str) -> None:
    x = [row["iteration"] for row in rows]
    y = [_number(row["returns"][step]) for row in rows]
    if rows[0]["kind"] == "train":
        label = f"training tasks, {_after(step)}"
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.45, label=label)
        return
    label = f"held-out tasks, {_after(step)}"
    marker = "o" if len(rows) < 40 else None
    axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, ms=3.5, label=label)
    if all("interval" in row for row in rows):
        spread = [_number(row["interval"][step]) for row in rows]
        _band(axes, x, y, spread, colour)


def adaptation_figure(
    records: Sequence[dict[str, Any]], experiment: RLExperiment
) -> Figure:
    """Returns on held-out tasks against the number of inner steps, a line a method.

    Args:
        records: of ``evaluation.json``, the run's own first.
        experiment: settings of the first.
    """
    figure = _figure(5.6, 4.2)
    axes = figure.subplots()
    known = experiment.published.get("paper, MAML", ())
    adaptation_panel(axes, records, known if experiment.comparable() else ())
    first = records[0]
    axes.set_title(
        f"{first['experiment']}, {first['preset']}: {first['tasks']} held-out tasks, "
        f"{first['episodes']} episodes each",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def adaptation_panel(
    axes: Axes, records: Sequence[dict[str, Any]], known: Sequence[float] = ()
) -> None:
    """Returns against the number of inner steps.

    Bands are 95% intervals over tasks; a method that takes no steps is a dashed line.

    Args:
        axes: to draw on.
        records: with ``method``, ``returns`` and ``interval``.
        known: the paper's returns after 0, 1, ... steps.

    Source:
        Figure 5 of the paper.
    """
    from matplotlib.ticker import MaxNLocator

    steps = max(len(record["returns"]) for record in records) - 1
    used = set()
    further = iter(FURTHER * len(records))
    for record, name in zip(records, names_of(records), strict=True):
        again = record["method"] in used
        colour = next(further) if again else METHODS[record["method"]]
        used.add(record["method"])
        _adapted(axes, record, name, colour, steps)
    if known:
        y = known[: steps + 1]
        axes.plot(range(len(y)), y, "x", color=PAPER, label="paper, MAML", zorder=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("number of gradient steps")
    axes.set_ylabel(RETURN)
    _style(axes)


def _adapted(
    axes: Axes, record: dict[str, Any], name: str, colour: str, steps: int
) -> None:
    y, spread = record["returns"], record["interval"]
    if len(y) == 1:  # the same however many steps the others take
        x = [0, max(steps, 1)]
        axes.plot(x, y * 2, "--", color=colour, linewidth=1.6, label=name)
        _band(axes, x, y * 2, spread * 2, colour)
        return
    x = list(range(len(y)))
    axes.plot(x, y, "o-", color=colour, linewidth=1.8, markersize=4, label=name)
    _band(axes, x, y, spread, colour)


def paths_figure(
    runs: Sequence[str | Path], checkpoint: str, seed: int, tasks: int = 4
) -> Figure:
    """Paths of the point on new goals, before and after adapting.

    Args:
        runs: folders, a row of panels each.
        checkpoint: ``best`` or ``last``.
        seed: which goals.
        tasks: goals, a column each.

    Source:
        Figure 4 of the paper.
    """
    drawn = TEST_SEED + 1000 + seed
    figure = _figure(2.7 * tasks, 2.9 * len(runs) + 0.8)
    panels = figure.subplots(len(runs), tasks, squeeze=False, sharex=True, sharey=True)
    told = [{"method": load_experiment(r).method, "run": str(r)} for r in runs]
    for run, name, row in zip(runs, names_of(told), panels, strict=True):
        experiment, learner, _, iteration = load_rl_run(run, checkpoint, tasks)
        goals = learner.envs.sample_tasks(tasks, drawn)
        rates = experiment.rates_at_test()
        returns, found = learner.adapted_returns(goals, rates, seed=drawn)
        learner.envs.close()
        for i, axes in enumerate(row):
            for k in sorted({0, 1, len(rates)} & set(range(len(rates) + 1))):
                _paths(axes, found[k], i, k)
            axes.plot(*goals[i], "*", color=GOAL, markersize=11, label="goal")
            axes.plot(0, 0, "o", color=START, markersize=4, label="start")
            axes.set_title(_returns_title(returns[i].tolist()), fontsize=9)
            axes.set_aspect("equal")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{name}, {iteration:,} meta-iterations", fontsize=9)
    for axes in panels.flat:  # room for the goals; paths before adapting may leave it
        axes.set_xlim(-0.85, 0.85)
        axes.set_ylim(-0.85, 0.85)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    figure.suptitle("2D navigation to new goals, and the return", fontsize=11)
    return figure


def _returns_title(returns: list[float]) -> str:
    chosen = [returns[k] for k in sorted({0, min(1, len(returns) - 1), -1}, key=_place)]
    if len(returns) <= 2:
        chosen = returns
    return " → ".join(f"{value:.1f}".replace("-", "−") for value in chosen)


def _place(index: int) -> float:
    return math.inf if index < 0 else index


def _paths(axes: Axes, trajectories: Any, task: int, step: int) -> None:
    seen = trajectories.observations[task, ..., :2].numpy()
    taken = trajectories.mask[task].numpy()
    for episode in range(min(3, len(seen))):
        path = seen[episode][taken[episode]]
        axes.plot(
            path[:, 0],
            path[:, 1],
            color=_step_colour(step),
            linewidth=0.8,
            alpha=0.9,
            label=_after(step) if episode == 0 else None,
        )


def _step_colour(step: int) -> str:
    return (BEFORE, FIRST, LAST)[min(step, 2)]


def _band(axes: Axes, x: Any, y: list[float], spread: list[float], colour: str) -> None:
    lower = [a - b for a, b in zip(y, spread, strict=True)]
    upper = [a + b for a, b in zip(y, spread, strict=True)]
    axes.fill_between(x, lower, upper, color=colour, alpha=0.15, linewidth=0)


def _number(value: float | None) -> float:
    """A figure of a row; ``None`` stands for one that was not finite."""
    return math.nan if value is None else value


def _after(step: int) -> str:
    return "before adapting" if not step else f"after {step} step{'s' * (step > 1)}"


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
