"""Inductive evaluation on the native engine: one query at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmaml.engines.base import Params, Rates, StepMetrics
from fastmaml.losses import accuracy, resolve_loss
from fastmaml.tasks.batch import TaskBatch

if TYPE_CHECKING:
    from fastmaml.engines.native import NativeEngine


def evaluate_inductive(
    engine: NativeEngine, params: Params, rates: Rates, tasks: TaskBatch, steps: int
) -> StepMetrics:
    """As ``engine.evaluate(..., inductive=True)``."""
    rows = []
    theta: Params = params
    for k in range(steps + 1):
        if k > 0:
            step = Rates(rates.at(k - 1), rates.layout, False, rates.adapted)
            theta = engine.adapt(theta, step, tasks.support_x, tasks.support_y, steps=1)
        rows.append(_score(engine, _outputs(engine, theta, tasks), tasks))
    loss = torch.stack([loss for loss, _ in rows], 1)
    scores = torch.stack([score for _, score in rows], 1)
    return StepMetrics(loss, scores if engine._classes else None)


def _outputs(engine: NativeEngine, theta: Params, tasks: TaskBatch) -> Tensor:
    """Outputs [T, Q, ...], each query passing alone beside the support samples."""
    outputs = []
    for q in range(tasks.query_size):
        x = torch.cat([tasks.support_x, tasks.query_x[:, q : q + 1]], 1)
        outputs.append(engine.forward(theta, x)[:, -1:])
    return torch.cat(outputs, 1)


def _score(
    engine: NativeEngine, outputs: Tensor, tasks: TaskBatch
) -> tuple[Tensor, Tensor]:
    """Loss [T] and accuracy [T] (zero where there are no classes)."""
    spec = engine._program.loss
    loss = resolve_loss(spec.kind, spec.reduction)
    pairs = list(zip(outputs, tasks.query_y, strict=True))
    losses = torch.stack([loss.function(*pair) for pair in pairs])
    if not engine._classes:
        return losses, torch.zeros_like(losses)
    return losses, torch.stack([accuracy(*pair) for pair in pairs])
