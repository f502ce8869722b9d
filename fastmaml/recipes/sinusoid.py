"""Few-shot regression of sine waves (Finn et al. 2017, section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fastmaml import models
from fastmaml.learners import MAML
from fastmaml.recipes.common import Experiment, Preset, Subset, train
from fastmaml.tasks.batch import TaskBatch
from fastmaml.tasks.sinusoid import Sinusoid as Tasks


@dataclass(frozen=True)
class Sinusoid(Experiment):
    """Learn to fit a sine wave of unknown amplitude and phase from a few points."""

    iterations: int = 70_000
    """meta-steps"""
    meta_batch: int = 25
    """tasks in a meta-step"""
    inner_lr: float = 0.01
    """learning rate of the inner loop"""
    test_steps: int = 10
    """inner steps in validation and test"""
    validate_every: int = 200
    """meta-steps between validations; ten steps amplify the noise of a meta-step, so
    that the best of many parameters is well below their average"""
    validation_tasks: int = 600
    """fixed tasks to validate on"""
    support: int = 10
    """points to adapt on, in training"""
    queries: int = 10
    """points the adapted parameters are judged on, in training"""
    test_queries: int = 100
    """the same in validation and test, where more of them blur less"""
    test_shots: tuple[int, ...] = (5, 10, 20)
    """points to adapt on in the tests; the validation takes the smallest"""

    name: ClassVar[str] = "sinusoid"

    @classmethod
    def from_preset(cls, preset: Preset, **selected: Any) -> Sinusoid:
        """The code's usage lines have a tenth of the paper's inner rate."""
        return cls(preset=preset, inner_lr=0.01 if preset == "paper" else 0.001)

    def make_model(self) -> nn.Module:
        """Two hidden layers of 40."""
        return models.sinusoid_mlp()

    def make_tasks(
        self,
        subset: Subset = "train",
        *,
        shots: int | None = None,
        queries: int | None = None,
        seed: int = 0,
    ) -> Tasks:
        """Every subset has the same distribution; the seed tells them apart."""
        default = self.queries if subset == "train" else self.test_queries
        return Tasks(
            self.support if shots is None else shots,
            default if queries is None else queries,
            seed=seed,
            device=self.device,
        )

    def validation(self) -> TaskBatch:
        """Tasks with the fewest points, under another seed than those of the test."""
        sampler = self.make_tasks("val", shots=min(self.test_shots))
        return sampler.fixed(self.validation_tasks, seed=1)

    def make_learner(self, model: nn.Module) -> MAML:
        """MAML on the mean-squared error."""
        return MAML(model, loss="mse", **self.learner_options())


if __name__ == "__main__":
    import tyro

    raise SystemExit(train(tyro.cli(Sinusoid)))
