"""What an evaluation returns: metrics after every inner step, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmaml.engines.base import StepMetrics

DIVERGED = 1000.0
"""An inner loop that multiplies the loss, or 1 where it is less, by more than this
does not learn."""


@dataclass
class Evaluation:
    """Query metrics after 0..K inner steps, over T tasks.

    Attributes:
        loss: [K+1] mean over tasks.
        loss_interval: [K+1] half the width of the 95% interval over tasks,
            1.96 sd / sqrt(T).
        accuracy: [K+1] in [0, 1]; ``None`` for losses without classes.
        accuracy_interval: [K+1] likewise.
        per_task_loss: [T, K+1].
        per_task_accuracy: [T, K+1], or ``None``.
        tasks: T.
        queries: query samples a task, Q.
        transductive: whether the queries of a task passed together, so that batch
            statistics mix them; ``False`` means one query at a time.
    """

    loss: Tensor
    loss_interval: Tensor
    accuracy: Tensor | None
    accuracy_interval: Tensor | None
    per_task_loss: Tensor
    per_task_accuracy: Tensor | None
    tasks: int
    queries: int
    transductive: bool

    @classmethod
    def of(cls, metrics: StepMetrics, queries: int, transductive: bool) -> Evaluation:
        """Means and intervals of an engine's metrics."""
        loss, loss_interval = _mean(metrics.loss)
        scored = metrics.accuracy is not None
        accuracy, interval = _mean(metrics.accuracy) if scored else (None, None)  # type: ignore[arg-type]
        return cls(
            loss=loss,
            loss_interval=loss_interval,
            accuracy=accuracy,
            accuracy_interval=interval,
            per_task_loss=metrics.loss,
            per_task_accuracy=metrics.accuracy,
            tasks=len(metrics.loss),
            queries=queries,
            transductive=transductive,
        )

    def __str__(self) -> str:
        """A table with one row a step, below the counts that give it meaning."""
        mode = "transductive" if self.transductive else "inductive"
        head = f"{self.tasks} tasks, {self.queries} queries each, {mode}, mean ± 95%"
        rows = [
            head,
            "steps  loss" + " " * 17 + "accuracy" * (self.accuracy is not None),
        ]
        for k in range(len(self.loss)):
            row = f"{k:5d}  {interval_of(self.loss[k], self.loss_interval[k], 4)}"
            if self.accuracy is not None and self.accuracy_interval is not None:
                percent = 100 * self.accuracy[k], 100 * self.accuracy_interval[k]
                row = f"{row:<28}{percent[0]:.2f}% ± {percent[1]:.2f}"
            rows.append(row)
        rows += filter(None, [divergence(self.loss.tolist())])
        return "\n".join(row.rstrip() for row in rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        return {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }


def interval_of(mean: Any, interval: Any, digits: int = 2) -> str:
    """``mean ± interval`` in a few characters, whatever their size.

    Args:
        mean: a number; ``None`` for one that was not finite.
        interval: likewise.
        digits: of a usual number behind the point; large ones have one and an exponent.
    """
    if mean is None or not math.isfinite(mean):
        return "diverged"
    return f"{_short(mean, digits)} ± {_short(interval, digits)}"


def _short(value: Any, digits: int) -> str:
    if value is None or not math.isfinite(value):
        return "inf"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def divergence(loss: Sequence[float | None]) -> str | None:
    """Says that an inner loop diverged, and after how many steps; ``None`` if not.

    Args:
        loss: means after 0..K steps; ``None`` for one that was not finite.
    """
    finite = [value is not None and math.isfinite(value) for value in loss]
    if not finite[0]:
        return "diverged: the loss is not finite even before adapting"
    bound = DIVERGED * max(loss[0] or 0.0, 1.0)
    for steps, value in enumerate(loss):
        after = f"diverged: after {steps} inner step{'s' * (steps > 1)} the loss is"
        if value is None or not finite[steps]:
            return f"{after} not finite"
        if value > bound:
            return f"{after} over {DIVERGED:g} times that before adapting"
    return None


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    spread = values.std(0, unbiased=False)
    return values.mean(0), 1.96 * spread / len(values) ** 0.5
