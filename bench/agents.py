"""The figure of recorded agents: a row of panels for each experiment.

Left, returns against the number of gradient steps, of all methods recorded or compared;
then a panel a run with its returns over the meta-iterations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench import stamps
from fastmaml.recipes import recipe
from fastmaml.rl.plot import METHODS, adaptation_panel, returns_panel

Run = Mapping[str, Any]

TITLES = {
    "navigation": "2D navigation",
    "cheetah-dir": "half-cheetah, forward/backward",
    "cheetah-vel": "half-cheetah, velocity",
    "ant-dir": "ant, forward/backward",
    "ant-vel": "ant, velocity",
    "ant-goal": "ant, goal",
}


def groups(runs: Mapping[str, Run]) -> dict[tuple[str, str, int], dict[str, Run]]:
    """Runs whose returns can stand beside each other, in the order of their methods.

    Args:
        runs: name -> what was recorded.

    Returns:
        (experiment, preset, horizon) -> name -> run.
    """
    methods = list(METHODS)
    ordered = sorted(
        runs.items(), key=lambda item: methods.index(item[1]["evaluation"]["method"])
    )
    found: dict[tuple[str, str, int], dict[str, Run]] = {}
    for key in sorted({_key(run) for run in runs.values()}, key=_place):
        found[key] = {name: run for name, run in ordered if _key(run) == key}
    return found


def records(group: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Evaluations of the runs of a group, then those they were compared to.

    A method that is recorded by itself is not shown again from a comparison.
    """
    own = [_record(run["evaluation"], name) for name, run in group.items()]
    seen = {record["method"] for record in own}
    for run in group.values():
        for other in run["evaluation"].get("compared", ()):
            if other["method"] not in seen:
                own.append(_record(other, other["run"]))
        seen |= {record["method"] for record in own}
    return own


def draw(runs: Mapping[str, Run], path: Path) -> Path:
    """Writes the figure, with the stamp of its runs.

    Args:
        runs: name -> what was recorded.
        path: of the PNG; its folder is made.
    """
    rows = groups(runs)
    curves = {key: _curves(group) for key, group in rows.items()}
    columns = 1 + max(map(len, curves.values()))
    figure, grid = plt.subplots(
        len(rows),
        columns,
        figsize=(4.3 * columns, 3.2 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for panels, (key, group) in zip(grid, rows.items(), strict=True):
        experiment, preset, horizon = key
        title = TITLES.get(experiment, experiment)
        if preset != "paper":
            title += f", {preset}"
        adaptation_panel(panels[0], records(group), _known(*key))
        panels[0].set_title(title, fontsize=10)
        _legend(panels[0])
        for axes, (name, rows_) in zip(panels[1:], curves[key].items(), strict=False):
            returns_panel(axes, rows_)
            axes.set_title(f"validation as {name} trains", fontsize=10)
            _legend(axes)
        for axes in panels[1 + len(curves[key]) :]:
            axes.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={stamps.KEY: stamps.stamp(runs)})
    plt.close(figure)
    return path


def _key(run: Run) -> tuple[str, str, int]:
    evaluation = run["evaluation"]
    preset = evaluation["preset"]
    same = "paper" if preset == "fast" else preset  # the paper's tasks
    return evaluation["experiment"], same, evaluation["horizon"]


def _place(key: tuple[str, str, int]) -> tuple[int, str, int]:
    names = list(TITLES)
    return names.index(key[0]) if key[0] in names else len(names), key[1], key[2]


def _record(evaluation: Run, name: str) -> dict[str, Any]:
    return {**evaluation, "interval": evaluation["returns_interval"], "run": name}


def _curves(group: Mapping[str, Run]) -> dict[str, list[dict[str, Any]]]:
    """Name of a run -> its validations, for the runs that have some."""
    return {
        name: [{"kind": "validation", **row} for row in run["curve"]]
        for name, run in group.items()
        if run.get("curve")
    }


def _legend(axes: Axes) -> None:
    """Below the panel, where it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        [label.removeprefix("held-out tasks, ") for label in labels],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=3,
        fontsize=7,
        frameon=False,
    )


def _known(experiment: str, preset: str, horizon: int) -> tuple[float, ...]:
    """The paper's returns, where they are in the same units."""
    kind = recipe(experiment)
    settings = kind.from_preset(preset)
    usual = 100 if experiment == "navigation" or preset == "gym" else 200
    if not settings.comparable() or horizon != usual:
        return ()
    return tuple(kind.published.get("paper, MAML", ()))
