"""Figures of an agent: returns over the meta-iterations, paths before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmaml.recipes.navigation import Navigation
from fastmaml.recipes.reinforcement import TEST_SEED, RLExperiment, load_rl_run
from fastmaml.train.logging import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastmaml.rl.learner import MetaRL

COLOURS = ("#9a9a9a", "#4c9be8", "#1f5fbf", "#0b3d91", "#06204d")
GOAL, START = "#cf222e", "#555555"


def agent_figures(
    run_dir: str | Path, checkpoint: str = "best", seed: int = 0
) -> dict[str, Figure]:
    """Figures of a run, by name.

    Args:
        run_dir: the run's folder.
        checkpoint: ``best`` or ``last``.
        seed: which new tasks to show.

    Raises:
        UserError: there is no run.
    """
    tasks = 4
    experiment, learner, _, iteration = load_rl_run(run_dir, checkpoint, tasks)
    figures = {}
    rows = read_metrics(run_dir)
    if any(row["kind"] in ("train", "validation") for row in rows):
        figures["returns"] = returns_figure(rows, experiment)
    if isinstance(experiment, Navigation):
        figures["paths"] = paths_figure(experiment, learner, iteration, tasks, seed)
    learner.envs.close()
    return figures


def returns_figure(rows: list[dict[str, Any]], experiment: RLExperiment) -> Figure:
    """Returns over the meta-iterations, in training and on held-out tasks.

    Args:
        rows: of ``metrics.jsonl``.
        experiment: settings of the run.

    Source:
        Figures 4 and 5 of the paper.
    """
    figure = _figure(9, 4.8)
    axes = figure.subplots()
    steps = 0
    for kind, style in (("train", "-"), ("validation", "o--")):
        own = [row for row in rows if row["kind"] == kind]
        for k in range(len(own[0]["returns"]) if own else 0):
            what = "training tasks" if kind == "train" else "validation"
            axes.plot(
                [row["iteration"] for row in own],
                [row["returns"][k] for row in own],
                style,
                color=COLOURS[min(k, len(COLOURS) - 1)],
                linewidth=0.9,
                markersize=3,
                alpha=0.6 if kind == "train" else 1.0,
                label=f"{what}, {_after(k)}",
            )
            steps = max(steps, k)
    if experiment.comparable() and "paper, MAML" in experiment.published:
        for k, value in enumerate(experiment.published["paper, MAML"][: steps + 1]):
            axes.axhline(
                value,
                color=COLOURS[k],
                linestyle=":",
                linewidth=0.8,
                label="paper, MAML" if k == 0 else None,
            )
    axes.set_xlabel("meta-iterations")
    axes.set_ylabel("mean undiscounted return")
    axes.set_title(f"{experiment.name}, {experiment.preset}, {experiment.method}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def paths_figure(
    experiment: Navigation, learner: MetaRL, iteration: int, tasks: int, seed: int
) -> Figure:
    """Paths of the point on new goals, before and after each inner step.

    Args:
        experiment: settings of the run.
        learner: as trained, with room for ``tasks``.
        iteration: meta-iterations it was trained for.
        tasks: goals, a column each.
        seed: which goals.

    Source:
        Figure 4 of the paper.
    """
    drawn = TEST_SEED + 1000 + seed
    goals = learner.envs.sample_tasks(tasks, drawn)
    rates = experiment.rates_at_test()
    returns, found = learner.adapted_returns(goals, rates, seed=drawn)
    figure = _figure(3.1 * tasks, 3.6)
    panels = figure.subplots(1, tasks, squeeze=False)[0]
    for i, axes in enumerate(panels):
        for k, trajectories in enumerate(found):
            if 1 < k < len(found) - 1:
                continue
            seen = trajectories.observations[i].numpy()
            taken = trajectories.mask[i].numpy()
            for episode in range(min(3, len(seen))):
                path = seen[episode][taken[episode]]
                axes.plot(
                    path[:, 0],
                    path[:, 1],
                    color=COLOURS[min(k, len(COLOURS) - 1)],
                    linewidth=0.9,
                    label=_after(k) if episode == 0 else None,
                )
        axes.plot(*goals[i], "*", color=GOAL, markersize=13, label="goal")
        axes.plot(0, 0, "o", color=START, markersize=4, label="start")
        axes.set_title(f"{returns[i, 0]:.1f} → {returns[i, -1]:.1f}", fontsize=10)
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(
        f"2D navigation after {iteration:,} meta-iterations: new goals, return before "
        "→ after"
    )
    return figure


def _after(step: int) -> str:
    return "before adapting" if not step else f"after {step} step{'s' * (step > 1)}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
