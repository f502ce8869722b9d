"""What the three experiments on images share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fastmaml.learners import MAML
from fastmaml.models import batch_norm_parameters
from fastmaml.recipes.common import Experiment, Subset
from fastmaml.tasks.few_shot import FewShotImages


@dataclass(frozen=True)
class ImageExperiment(Experiment):
    """Settings of N-way K-shot classification of images."""

    ways: int = 5
    """classes of a task"""
    shots: int = 1
    """images of a class to adapt on"""
    queries: int = 1
    """images of a class the adapted parameters are judged on, in training"""
    test_queries: int = 1
    """the same in validation and test"""
    adapt_batch_norm: bool = False
    """adapt the parameters of batch norm in the inner loop, as the paper does not"""
    reduction: Literal["mean", "sum_over_ways"] = "sum_over_ways"
    """inner and outer loss: mean, or the code's sum_over_ways, that is ways times it"""

    def rotations(self) -> tuple[int, ...]:
        """Turns in degrees that make further classes."""
        return (0,)

    def images(self, subset: Subset) -> Tensor:
        """Images of a subset, uint8 [classes, n, C, H, W]."""
        raise NotImplementedError

    def paper_row(self, shots: int) -> str | None:
        """The published accuracy in percent, ``None`` where there is none."""
        return None

    def make_tasks(
        self,
        subset: Subset = "train",
        *,
        shots: int | None = None,
        queries: int | None = None,
        seed: int = 0,
    ) -> FewShotImages:
        """Tasks of the classes of a subset."""
        default = self.queries if subset == "train" else self.test_queries
        return FewShotImages(
            self.images(subset),
            ways=self.ways,
            shots=self.shots if shots is None else shots,
            queries=default if queries is None else queries,
            rotations=self.rotations(),
            seed=seed,
            device=self.device,
        )

    def make_learner(self, model: nn.Module) -> MAML:
        """MAML on the cross-entropy, batch norm on batch statistics."""
        fixed = set() if self.adapt_batch_norm else batch_norm_parameters(model)
        names = [name for name, _ in model.named_parameters()]
        adapted = [name for name in names if name not in fixed] if fixed else None
        options: dict[str, Any] = self.learner_options()
        return MAML(
            model,
            loss="cross_entropy",
            reduction=self.reduction,
            adapted=adapted,
            batch_norm="batch",
            **options,
        )
