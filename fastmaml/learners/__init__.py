"""Learners: each a choice of coefficients for the one driver."""

from fastmaml.learners.base import Evaluation, Learner
from fastmaml.learners.clone import TaskModel
from fastmaml.learners.maml import FOMAML, MAML

__all__ = ["FOMAML", "MAML", "Evaluation", "Learner", "TaskModel"]
