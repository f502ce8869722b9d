"""Fast model-agnostic meta-learning: one engine, batches of tasks, exact gradients.

>>> learner = fastmaml.MAML(model, loss="cross_entropy", inner_lr=0.4)
>>> loss = learner.backward(tasks)
"""

from importlib.metadata import PackageNotFoundError, version

from fastmaml import optim
from fastmaml.compile import CompileReport, EngineReport, compile_module
from fastmaml.engines import Engine, FunctionalEngine, MetaGradient, Rates, StepMetrics
from fastmaml.learners import FOMAML, MAML, Evaluation, Learner, TaskModel
from fastmaml.tasks import Sinusoid, TaskBatch, TaskSampler
from fastmaml.threads import get_num_threads, set_num_threads

try:
    __version__ = version("fastmaml")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "unknown"

__all__ = [
    "FOMAML",
    "MAML",
    "CompileReport",
    "Engine",
    "EngineReport",
    "Evaluation",
    "FunctionalEngine",
    "Learner",
    "MetaGradient",
    "Rates",
    "Sinusoid",
    "StepMetrics",
    "TaskBatch",
    "TaskModel",
    "TaskSampler",
    "compile_module",
    "get_num_threads",
    "optim",
    "set_num_threads",
]
