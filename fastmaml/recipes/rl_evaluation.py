"""``fastmaml evaluate`` for reinforcement learning: returns after 0, 1, ... steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmaml.learners.evaluation import interval_of
from fastmaml.recipes.common import UserError, load_experiment, user_errors
from fastmaml.recipes.reinforcement import (
    TEST_SEED,
    RLExperiment,
    load_rl_run,
)
from fastmaml.train.checkpoint import write_text_atomically

EVALUATION = "evaluation.json"
LABELS = {
    "maml": "MAML",
    "pretrained": "pretrained",
    "random": "random start",
    "oracle": "oracle",
}
"""Methods as tables and figures call them, in the order of the paper's."""


def evaluate_rl(
    run_dir: str | Path,
    *,
    tasks: int = 40,
    checkpoint: str = "best",
    steps: int | None = None,
    seed: int = 0,
    compare: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Evaluates a run on held-out tasks, prints the table, writes ``evaluation.json``.

    Args:
        run_dir: the run's folder.
        tasks: held-out tasks.
        checkpoint: ``best`` or ``last``.
        steps: inner steps; as in the run's settings unless told. Further steps have
            the last one's rate.
        seed: which tasks, and which draws.
        compare: folders of other runs, to be tried on the same tasks with as many
            episodes: the paper's baselines.

    Returns:
        What was written: the run's record, those of the others as ``compared``.

    Raises:
        UserError: there is no such run, or an option does not fit it.
    """
    if tasks < 2:
        raise UserError(f"--tasks must be at least 2 for an interval, got {tasks}")
    if steps is not None and steps < 0:
        raise UserError(f"--steps must be at least 0, got {steps}")
    experiment = load_experiment(run_dir)
    same_tasks([run_dir, *compare])
    trial = _Trial(tasks, checkpoint, steps, seed, experiment.test_episodes)
    if compare and trial.episodes is None:
        trial = dataclasses.replace(trial, episodes=experiment.episodes)
    record = _returns(run_dir, trial)
    others = [_returns(other, trial) | {"run": str(other)} for other in compare]
    if others:
        record["compared"] = others
    print(format_returns(experiment, record))
    text = json.dumps(record, indent=2) + "\n"
    write_text_atomically(Path(run_dir) / EVALUATION, text)
    return record


@dataclass(frozen=True)
class _Trial:
    """What runs are tried on."""

    tasks: int
    checkpoint: str
    steps: int | None
    seed: int
    episodes: int | None


def _returns(run_dir: str | Path, trial: _Trial) -> dict[str, Any]:
    """The record of one run."""
    tasks = trial.tasks
    experiment, learner, path, iteration = load_rl_run(
        run_dir, trial.checkpoint, tasks, episodes=trial.episodes
    )
    try:
        rates = experiment.rates_at_test()
        if trial.steps is not None and experiment.method != "oracle":
            if trial.steps and not rates:
                raise UserError(f"--steps {trial.steps}: {run_dir} has no test_rates")
            rates = (rates + rates[-1:] * trial.steps)[: trial.steps]
        with user_errors():
            drawn = TEST_SEED + trial.seed
            held_out = learner.envs.sample_tasks(tasks, drawn)
            returns, found = learner.adapted_returns(held_out, rates, seed=drawn)
    finally:
        learner.envs.close()
    return {
        "experiment": experiment.name,
        "preset": experiment.preset,
        "method": experiment.method,
        "checkpoint": path.name,
        "iteration": iteration,
        "seed": trial.seed,
        "tasks": tasks,
        "episodes": learner.envs.num_envs // tasks,
        "horizon": learner.envs.horizon,
        "rates": list(rates),
        "returns": returns.mean(0).tolist(),
        "interval": (1.96 * returns.std(0) / tasks**0.5).tolist(),
        "nonfinite_episodes": [t.failures for t in found],
        "task_parameters": held_out.tolist(),
        "task_returns": returns.tolist(),
    }


def same_tasks(runs: Sequence[str | Path]) -> None:
    """Refuses runs whose returns can't stand beside each other.

    Args:
        runs: their folders.

    Raises:
        UserError: a run is of another experiment, environment or horizon than the
            first, or of none of reinforcement learning.
    """
    told = [_told(run_dir) for run_dir in runs]
    for run_dir, other in zip(runs[1:], told[1:], strict=True):
        for what, value in other.items():
            if value != told[0][what]:
                raise UserError(
                    f"{run_dir} has {what} {value}, {runs[0]} {told[0][what]}: their "
                    "returns can't be compared; give runs of the same tasks"
                )


def _told(run_dir: str | Path) -> dict[str, Any]:
    experiment = load_experiment(run_dir)
    if not isinstance(experiment, RLExperiment):
        raise UserError(
            f"{run_dir} is a run of {experiment.name}, which has no agent: only runs "
            "of reinforcement learning can be compared"
        )
    environment = experiment.environment_settings()["preset"]
    return {
        "experiment": experiment.name,
        "environment": environment,
        "horizon": experiment.horizon or "of the environment",
    }


def format_returns(experiment: RLExperiment, record: dict[str, Any]) -> str:
    """The table of an ``evaluation.json``, beside the published figures."""
    rows = [record, *record.get("compared", ())]
    count = max(len(row["returns"]) for row in rows)
    head = "".join(f"{_after(k):>17}" for k in range(count))
    lines = [
        f"{experiment.name} {record['preset']}, {record['method']}: return after inner "
        f"steps, mean ± 95% over {record['tasks']} held-out tasks of "
        f"{record['episodes']} episodes",
        f"({record['checkpoint']} at iteration {record['iteration']:,}; inner rates "
        f"{', '.join(f'{r:g}' for r in record['rates']) or 'none'})",
        f"{'':24}{head}",
    ]
    named = names_of(rows)
    named[0] = "this run" if len(rows) == 1 else f"this run, {LABELS[record['method']]}"
    for name, row in zip(named, rows, strict=True):
        cells = (
            interval_of(mean, interval)
            for mean, interval in zip(row["returns"], row["interval"], strict=True)
        )
        lines.append(f"{name:24}" + "".join(f"{cell:>17}" for cell in cells))
    if experiment.comparable():
        for who, known in experiment.published.items():
            shown = (f"{value:.2f}       " for value in known[:count])
            lines.append(f"{who:24}" + "".join(f"{cell:>17}" for cell in shown))
    failures = sum(sum(row["nonfinite_episodes"]) for row in rows)
    if failures:
        lines.append(f"{failures} episodes ended because the simulator was not finite")
    return "\n".join(lines)


def names_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """What to call runs side by side: by method, and by folder where that repeats."""
    methods = [record["method"] for record in records]
    return [
        LABELS[method]
        if methods.count(method) == 1
        else f"{LABELS[method]}, {Path(record.get('run', '')).name}".rstrip(", ")
        for method, record in zip(methods, records, strict=True)
    ]


def _after(steps: int) -> str:
    return "before" if not steps else f"{steps} step" + "s" * (steps > 1)
