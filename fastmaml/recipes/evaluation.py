"""``fastmaml evaluate``: the paper's row for a run, printed and written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastmaml.learners.base import Evaluation
from fastmaml.learners.evaluation import divergence, interval_of
from fastmaml.recipes.common import (
    Experiment,
    Subset,
    UserError,
    load_experiment,
    load_run,
    user_errors,
)
from fastmaml.recipes.images import ImageExperiment
from fastmaml.recipes.sinusoid import Sinusoid
from fastmaml.train.checkpoint import write_text_atomically
from fastmaml.train.evaluate import evaluate_tasks

EVALUATION = "evaluation.json"
SINUSOID_PAPER = {
    "paper, MAML": {1: 0.67, 5: 0.38, 10: 0.35},
    "paper, pretrained": {1: 2.41, 5: 2.23, 10: 2.19},
}


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on new tasks, as the paper does, and write evaluation.json."""

    run: Annotated[str, tyro.conf.Positional]
    """folder of the run"""
    tasks: int | None = None
    """test tasks; 600, in reinforcement learning 40, unless told"""
    steps: int | None = None
    """inner steps; as in the run's settings unless told"""
    inductive: bool = False
    """each query by itself, so that batch norm never sees the others"""
    subset: Subset = "test"
    """classes to take tasks from"""
    shots: tuple[int, ...] = ()
    """samples to adapt on (a class); as in the run's settings unless told"""
    queries: int | None = None
    """samples to judge on (a class); as in the run's settings unless told"""
    checkpoint: Literal["best", "last"] = "best"
    """the best on the validation tasks, or the last"""
    seed: int = 0
    """which test tasks"""
    compare: tuple[str, ...] = ()
    """folders of further runs of agents, such as the paper's baselines (pretrained,
    oracle, random start), to stand beside this one on the same tasks"""


def evaluate(options: Evaluate) -> dict[str, Any]:
    """Evaluates a run, prints the table, writes ``evaluation.json``.

    Returns:
        What was written.

    Raises:
        UserError: there is no such run, or an option does not fit it.
    """
    if not isinstance(load_experiment(options.run), Experiment):
        return _evaluate_agent(options)
    if options.compare:
        raise UserError(
            f"--compare is for runs of reinforcement learning, not for {options.run}"
        )
    experiment, learner, path, iteration = load_run(options.run, options.checkpoint)
    steps = experiment.test_steps if options.steps is None else options.steps
    rows = []
    with user_errors():
        for shots in _shots(experiment, options):
            found = _evaluate(experiment, learner, options, shots, steps)
            rows.append(_row(found, shots, options, experiment))
    record = {
        "experiment": experiment.name,
        "checkpoint": path.name,
        "iteration": iteration,
        "seed": options.seed,
        "rows": rows,
    }
    table = format_table(experiment, record)
    print(table)
    file = Path(options.run) / EVALUATION
    write_text_atomically(file, json.dumps(record, indent=2) + "\n")
    return record


def _evaluate_agent(options: Evaluate) -> dict[str, Any]:
    from fastmaml.recipes.rl_evaluation import evaluate_rl

    plain = Evaluate(options.run)
    for name in ("inductive", "subset", "shots", "queries"):
        if getattr(options, name) != getattr(plain, name):
            raise UserError(f"--{name} is for supervised runs, not for {options.run}")
    return evaluate_rl(
        options.run,
        tasks=40 if options.tasks is None else options.tasks,
        checkpoint=options.checkpoint,
        steps=options.steps,
        seed=options.seed,
        compare=options.compare,
    )


def _shots(experiment: Experiment, options: Evaluate) -> tuple[int, ...]:
    if options.shots:
        return options.shots
    if isinstance(experiment, Sinusoid):
        return experiment.test_shots
    assert isinstance(experiment, ImageExperiment)
    return (experiment.shots,)


def _evaluate(
    experiment: Experiment, learner: Any, options: Evaluate, shots: int, steps: int
) -> Evaluation:
    sampler = experiment.make_tasks(
        options.subset, shots=shots, queries=options.queries
    )
    parts = sampler.fixed_batches(
        600 if options.tasks is None else options.tasks,
        options.seed,
        batch=experiment.evaluation_chunk,
    )
    return evaluate_tasks(learner, parts, steps=steps, inductive=options.inductive)


def _row(
    found: Evaluation, shots: int, options: Evaluate, experiment: Experiment
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "shots": shots,
        "tasks": found.tasks,
        "queries": found.queries,
        "subset": options.subset,
        "transductive": found.transductive,
        "loss": _numbers(found.loss),
        "loss_interval": _numbers(found.loss_interval),
    }
    if isinstance(experiment, ImageExperiment):
        row["ways"] = experiment.ways
        row["accuracy"] = _numbers(found.accuracy)
        row["accuracy_interval"] = _numbers(found.accuracy_interval)
    return row


def _numbers(values: Any) -> list[float | None]:
    """As JSON can hold them: ``None`` for NaN and infinity."""
    numbers = map(float, values)
    return [value if math.isfinite(value) else None for value in numbers]


def format_table(experiment: Experiment, record: dict[str, Any]) -> str:
    """The table of an ``evaluation.json``, beside the paper's figures."""
    if isinstance(experiment, Sinusoid):
        return _sinusoid_table(record)
    assert isinstance(experiment, ImageExperiment)
    return _image_table(experiment, record)


def _origin(record: dict[str, Any]) -> str:
    return f"{record['checkpoint']} at iteration {record['iteration']:,}"


def _sinusoid_table(record: dict[str, Any]) -> str:
    rows = record["rows"]
    last = len(rows[0]["loss"]) - 1
    steps = [k for k in sorted({0, 1, 5, 10, last}) if k <= last]
    cells = [
        [interval_of(row["loss"][k], row["loss_interval"][k]) for k in steps]
        for row in rows
    ]
    width = max(15, 2 + max(len(cell) for line in cells for cell in line))
    head = "".join(f"{_after(k):>{width}}" for k in steps)
    lines = [
        f"sinusoid, mean-squared error after inner steps, mean ± 95% over "
        f"{rows[0]['tasks']} tasks of {rows[0]['queries']} queries",
        f"({_origin(record)})",
        f"{'':28}{head}",
    ]
    for row, line in zip(rows, cells, strict=True):
        name = f"{row['shots']}-shot, this run"
        lines.append(f"{name:28}" + "".join(f"{cell:>{width}}" for cell in line))
        if row["shots"] == 5:
            lines += [_paper_line(*known, steps, width) for known in _PAPER_ROWS]
    for row in rows:
        if said := divergence(row["loss"]):
            lines.append(f"{row['shots']}-shot {said}")
    return "\n".join(lines)


_PAPER_ROWS = tuple(SINUSOID_PAPER.items())


def _paper_line(who: str, known: dict[int, float], steps: list[int], width: int) -> str:
    cells = (f"{known[k]:.2f}       " if k in known else "" for k in steps)
    return f"{'5-shot, ' + who:28}" + "".join(f"{cell:>{width}}" for cell in cells)


def _after(steps: int) -> str:
    return "before" if not steps else f"{steps} step" + "s" * (steps > 1)


def _image_table(experiment: ImageExperiment, record: dict[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        mode = "transductive" if row["transductive"] else "inductive"
        per_class = row["queries"] // row["ways"]
        lines += [
            f"{experiment.name} {row['ways']}-way {row['shots']}-shot accuracy in %, "
            f"mean ± 95% over {row['tasks']} tasks ({row['subset']}),",
            f"{per_class} {'query' if per_class == 1 else 'queries'} per class, {mode} "
            f"({_origin(record)})",
        ]
        lines += [
            f"  {_after(k) + (' adapting' if not k else ''):18}"
            f"{100 * value:6.2f} ± {100 * interval:.2f}"
            for k, (value, interval) in enumerate(
                zip(row["accuracy"], row["accuracy_interval"], strict=True)
            )
        ]
        if said := divergence(row["loss"]):
            lines.append(f"  {said}")
        paper = experiment.paper_row(row["shots"])
        if paper is not None:
            lines.append(f"  {'paper':18} {paper}")
    return "\n".join(lines)
