"""Evaluation on many tasks, in parts that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastmaml.engines.base import StepMetrics
from fastmaml.learners.base import Evaluation
from fastmaml.tasks.batch import TaskBatch


def evaluate_tasks(
    learner: Any,
    tasks: TaskBatch | Iterable[TaskBatch],
    *,
    steps: int | None = None,
    inductive: bool = False,
    chunk: int = 100,
) -> Evaluation:
    """Evaluates a learner on many tasks, part by part.

    Args:
        learner: anything with ``evaluate(tasks, steps=..., inductive=...)``.
        tasks: a batch, which is taken apart, or batches, as of
            ``TaskSampler.fixed_batches``.
        steps: inner steps; the learner's own number unless told.
        inductive: each query by itself, beside the support samples.
        chunk: tasks a batch is taken apart into.

    Returns:
        One evaluation of all tasks.

    Raises:
        ValueError: ``chunk`` is not positive, or there are no tasks.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if isinstance(tasks, TaskBatch):
        whole = tasks
        tasks = (whole[i : i + chunk] for i in range(0, len(whole), chunk))
    parts = [learner.evaluate(t, steps=steps, inductive=inductive) for t in tasks]
    if not parts:
        raise ValueError("tasks is empty: pass at least one batch")
    return merge(parts)


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of the tasks of several."""
    loss = torch.cat([part.per_task_loss for part in parts])
    scores = [p.per_task_accuracy for p in parts if p.per_task_accuracy is not None]
    metrics = StepMetrics(loss, torch.cat(scores) if scores else None)
    return Evaluation.of(metrics, parts[0].queries, parts[0].transductive)


def headline(found: Evaluation) -> float:
    """The number that tells which parameters are best.

    The accuracy after the last inner step, or else the mean of the losses after
    1..K steps, so that few tasks which late steps upset don't decide alone.
    """
    if found.accuracy is not None:
        return float(found.accuracy[-1])
    return float(found.loss[1:].mean() if len(found.loss) > 1 else found.loss[0])


def is_better(found: Evaluation, metric: float, best: float | None) -> bool:
    """Whether ``metric`` of ``found`` beats the best so far; NaN never does."""
    if not math.isfinite(metric) or best is None:
        return math.isfinite(metric)
    return metric > best if found.accuracy is not None else metric < best


def figures(found: Evaluation) -> dict[str, list[float | None]]:
    """Means after 0..K steps as JSON can hold them: ``None`` for NaN and infinity.

    More inner steps than in training may overflow on a task without any harm to the
    parameters, so this is no reason to stop.
    """
    row = {"loss": found.loss.tolist()}
    if found.accuracy is not None:
        row["accuracy"] = found.accuracy.tolist()
    return {k: [x if math.isfinite(x) else None for x in v] for k, v in row.items()}


def sentence(found: Evaluation) -> str:
    """An evaluation in a line."""
    loss = float(found.loss[-1])
    told = f"{loss:.4g}" if math.isfinite(loss) else "not finite (diverged)"
    line = f"validation loss {told}"
    if found.accuracy is not None:
        line += f", accuracy {found.accuracy[-1]:.2%}"
    return f"{line} after {len(found.loss) - 1} steps, {found.tasks} tasks"
