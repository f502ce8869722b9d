"""Engines: the arithmetic behind learners.

``functional`` runs any differentiable module on ``torch.func``; ``native`` runs
compiled programs in C++ and is imported only when used.
"""

from fastmaml.engines.base import (
    Engine,
    MetaGradient,
    Params,
    RateLayout,
    Rates,
    StepMetrics,
)
from fastmaml.engines.functional import FunctionalEngine

__all__ = [
    "Engine",
    "FunctionalEngine",
    "MetaGradient",
    "Params",
    "RateLayout",
    "Rates",
    "StepMetrics",
]
