"""``fastmaml evaluate`` for reinforcement learning: returns after 0, 1, ... steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmaml.recipes.common import UserError, user_errors
from fastmaml.recipes.reinforcement import (
    TEST_SEED,
    RLExperiment,
    load_rl_run,
)
from fastmaml.train.checkpoint import write_text_atomically

EVALUATION = "evaluation.json"


def evaluate_rl(
    run_dir: str | Path,
    *,
    tasks: int = 40,
    checkpoint: str = "best",
    steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluates a run on held-out tasks, prints the table, writes ``evaluation.json``.

    Args:
        run_dir: the run's folder.
        tasks: held-out tasks.
        checkpoint: ``best`` or ``last``.
        steps: inner steps; as in the run's settings unless told. Further steps have
            the last one's rate.
        seed: which tasks, and which draws.

    Returns:
        What was written.

    Raises:
        UserError: there is no such run, or an option does not fit it.
    """
    if tasks < 2:
        raise UserError(f"--tasks must be at least 2 for an interval, got {tasks}")
    experiment, learner, path, iteration = load_rl_run(
        run_dir, checkpoint, tasks, episodes=_episodes(run_dir)
    )
    rates = experiment.rates_at_test()
    if steps is not None:
        if steps and not rates:
            raise UserError(f"--steps {steps}: an {experiment.method} takes no steps")
        rates = (rates + rates[-1:] * steps)[:steps]
    with user_errors():
        drawn = TEST_SEED + seed
        held_out = learner.envs.sample_tasks(tasks, drawn)
        returns, found = learner.adapted_returns(held_out, rates, seed=drawn)
    learner.envs.close()
    record = {
        "experiment": experiment.name,
        "preset": experiment.preset,
        "method": experiment.method,
        "checkpoint": path.name,
        "iteration": iteration,
        "seed": seed,
        "tasks": tasks,
        "episodes": learner.envs.num_envs // tasks,
        "horizon": learner.envs.horizon,
        "rates": list(rates),
        "returns": returns.mean(0).tolist(),
        "interval": (1.96 * returns.std(0) / tasks**0.5).tolist(),
        "nonfinite_episodes": [t.failures for t in found],
    }
    print(format_returns(experiment, record))
    text = json.dumps(record, indent=2) + "\n"
    write_text_atomically(Path(run_dir) / EVALUATION, text)
    return record


def _episodes(run_dir: str | Path) -> int | None:
    from fastmaml.recipes.common import load_experiment

    return getattr(load_experiment(run_dir), "test_episodes", None)


def format_returns(experiment: RLExperiment, record: dict[str, Any]) -> str:
    """The table of an ``evaluation.json``, beside the published figures."""
    count = len(record["returns"])
    head = "".join(f"{_after(k):>17}" for k in range(count))
    cells = (
        f"{mean:.2f} ± {interval:.2f}"
        for mean, interval in zip(record["returns"], record["interval"], strict=True)
    )
    lines = [
        f"{experiment.name} {record['preset']}, {record['method']}: return after inner "
        f"steps, mean ± 95% over {record['tasks']} held-out tasks of "
        f"{record['episodes']} episodes",
        f"({record['checkpoint']} at iteration {record['iteration']:,}; inner rates "
        f"{', '.join(f'{r:g}' for r in record['rates']) or 'none'})",
        f"{'':24}{head}",
        f"{'this run':24}" + "".join(f"{cell:>17}" for cell in cells),
    ]
    if experiment.comparable():
        for who, known in experiment.published.items():
            shown = (f"{value:.2f}       " for value in known[:count])
            lines.append(f"{who:24}" + "".join(f"{cell:>17}" for cell in shown))
    failures = sum(record["nonfinite_episodes"])
    if failures:
        lines.append(f"{failures} episodes ended because the simulator was not finite")
    return "\n".join(lines)


def _after(steps: int) -> str:
    return "before" if not steps else f"{steps} step" + "s" * (steps > 1)
