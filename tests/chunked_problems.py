"""Problems whose samples are more than one chunk on the CPU."""

from __future__ import annotations

from problem import Problem
from torch import nn

from fastmaml.models import gaussian_policy_mlp

WIDE = 320  # hidden width at which 150 samples are more than one chunk


def mlp(*middle: nn.Module, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, WIDE),
        *middle,
        nn.Linear(WIDE, 20),
        nn.ReLU(),
        nn.Linear(20, outputs),
    )


CHUNKED = [
    Problem("relu", lambda: mlp(nn.ReLU()), (4,), 3, samples=150),
    Problem("tanh", lambda: mlp(nn.Tanh()), (4,), 3, samples=150),
    Problem("layer-norm", lambda: mlp(nn.LayerNorm(WIDE)), (4,), 3, samples=150),
    Problem(
        "classes",
        lambda: mlp(nn.ReLU(), outputs=5),
        (4,),
        5,
        loss="cross_entropy",
        samples=150,
    ),
    Problem(
        "policy",
        lambda: gaussian_policy_mlp(4, 2, (WIDE, 20)),
        (4,),
        4,
        loss="policy_gradient",
        samples=150,
        inner_lr=0.01,
    ),
]
