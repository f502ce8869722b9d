"""THE table of problems that every engine goes through.

Layer problems are small nets built around one layer, option or size; model problems are
the paper's architectures, small. Everything is seeded and float64, and weights are
scaled so that signals neither vanish nor saturate.
"""

from __future__ import annotations

from layer_problems import LAYER
from problem import Problem, direction, per_task
from torch import nn

from fastmaml import models

__all__ = ["BY_NAME", "LAYER", "MODEL", "PROBLEMS", "Problem", "direction", "per_task"]


def _all_but_head(model: nn.Module) -> set[str]:
    names = [n for n, _ in model.named_parameters()]
    return set(names[:-2])


MODEL = [
    Problem("sinusoid", models.sinusoid_mlp, (1,), 1, samples=10, inner_lr=0.01),
    Problem(
        "sinusoid-head-adapted",
        models.sinusoid_mlp,
        (1,),
        1,
        not_adapted=_all_but_head,
        inner_lr=0.01,
    ),
    Problem(
        "omniglot-conv",
        lambda: models.omniglot_conv(5, channels=8),
        (1, 28, 28),
        5,
        loss="cross_entropy",
        reduction="sum_over_ways",
        not_adapted=models.batch_norm_parameters,
    ),
    Problem(
        "omniglot-fc",
        lambda: models.omniglot_fc(5, inputs=49, hidden=(33, 17, 9, 8)),
        (1, 7, 7),
        5,
        loss="cross_entropy",
        not_adapted=models.batch_norm_parameters,
        inner_lr=0.02,
    ),
    Problem(
        "mini-imagenet-conv",
        lambda: models.mini_imagenet_conv(5, channels=3),
        (3, 84, 84),
        5,
        loss="cross_entropy",
        not_adapted=models.batch_norm_parameters,
        inner_lr=0.01,
    ),
    Problem(
        "policy",
        lambda: models.gaussian_policy_mlp(20, 6, hidden=(17, 9)),
        (20,),
        12,
        loss="policy_gradient",
        samples=13,
        inner_lr=0.01,
    ),
]

PROBLEMS = [*LAYER, *MODEL]
BY_NAME = {problem.name: problem for problem in PROBLEMS}
assert len(BY_NAME) == len(PROBLEMS), "problem names must be unique"
