"""Training: the loop, its checkpoints, its logs, and the evaluation of a run."""

from fastmaml.train.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from fastmaml.train.evaluate import evaluate_tasks
from fastmaml.train.logging import MetricsLog, read_metrics
from fastmaml.train.loop import DivergenceError, FitResult, fit

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DivergenceError",
    "FitResult",
    "MetricsLog",
    "evaluate_tasks",
    "fit",
    "load_checkpoint",
    "read_metrics",
    "save_checkpoint",
]
