"""Small networks whose tasks a backend may do in one piece, and some others."""

from __future__ import annotations

from problem import Problem
from torch import nn


class Twice(nn.Sequential):
    """Two activations in a row."""

    def __init__(self) -> None:
        super().__init__(nn.Tanh(), nn.Sigmoid())


def chain(*widths: int, activation=nn.ReLU, bias: bool = True, end=None):
    """Builds linear layers with an activation between each two, and maybe a last."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b, bias=bias), activation()]
        return nn.Sequential(*layers[:-1], *([end()] if end else []))

    return build


def regression(name: str, *widths: int, samples: int = 10, **options) -> Problem:
    """Squared errors of a chain."""
    build = chain(*widths, **options)
    return Problem(name, build, widths[:1], widths[-1], samples=samples)


def classes(name: str, *widths: int, samples: int = 5, **options) -> Problem:
    """Cross-entropy of a chain."""
    return Problem(
        name,
        chain(*widths, **options),
        widths[:1],
        widths[-1],
        loss="cross_entropy",
        samples=samples,
    )


# widths and samples around the vectors, half vectors and tiles of every instruction set
RESIDENT = [
    regression("sinusoid", 1, 40, 40, 1),
    regression("one-layer", 3, 7),
    regression("no-bias", 2, 17, 9, 1, bias=False),
    regression("one-in-between", 3, 12, 1, 5, samples=3),
    regression("one-twice", 3, 33, 1, 1, samples=3),
    regression("whole-vectors", 16, 32, 64, 16, samples=12),
    regression("many-samples", 2, 24, 1, samples=67),
    regression("one-sample", 4, 41, 11, 2, samples=1),
    regression("deep", 3, 9, 8, 7, 6, 5, 4, 3, 2),
    classes("classes", 12, 31, 5),
    classes("classes-tanh", 12, 23, 13, 3, activation=nn.Tanh),
    regression("squashed-end", 2, 15, 6, end=nn.Sigmoid),
    regression("relu-end", 2, 15, 6, end=nn.ReLU),
    *(
        regression(kind.__name__, 2, 21, 18, 1, activation=kind, samples=7)
        for kind in (
            nn.Tanh,
            nn.Sigmoid,
            nn.SiLU,
            nn.GELU,
            nn.LeakyReLU,
            nn.ELU,
            nn.Softplus,
        )
    ),
    regression(
        "gelu-tanh", 2, 21, 1, activation=lambda: nn.GELU(approximate="tanh"), samples=7
    ),
]
SINUSOID, CLASSES = RESIDENT[0], RESIDENT[10]

NOT = [
    regression("too-deep", *[3] * 10),
    regression("wide", 400, 400, 3),
    regression("two-activations", 3, 4, 2, activation=Twice),
    Problem(
        "image",
        lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 2)),
        (1, 3, 3),
        2,
    ),
    regression("normed", 3, 8, 2, activation=lambda: nn.LayerNorm(8)),
]
# The CPU's vectors need an adjoint of the first stage's inputs there.
ONE_OUTPUT_FIRST = regression("one-output-first", 3, 1, 4)
# Few samples beside the widths: the CPU forms no product of the last step.
LOW_RANK = [
    regression("low-rank", 3, 48, 50, 2, samples=17, activation=nn.Softplus),
    regression("low-rank-relu", 2, 24, 41, 19, 1, samples=6),
    classes("low-rank-classes", 4, 40, 30, 3, activation=nn.Tanh),
]
POLICY = Problem(
    "policy-chain",
    chain(2, 19, 6, activation=nn.Tanh),
    (2,),
    6,
    loss="policy_gradient",
    samples=13,
)
