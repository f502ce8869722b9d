"""Linear layers: sizes around vector widths, rows that end in a few columns."""

from __future__ import annotations

from problem import Builder, Problem
from torch import nn


def mlp(*sizes: int, bias: bool = True) -> Builder:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return build


_WIDTHS = (1, 3, 7, 8, 9, 15, 16, 17, 33, 65)
LINEAR = [
    Problem("linear-alone", mlp(5, 3), (5,), 3),
    Problem("linear-alone-no-bias", mlp(3, 1, bias=False), (3,), 1, samples=4),
    Problem("linear-one-sample", mlp(4, 5, 2), (4,), 2, samples=1),
    *(
        Problem(f"linear-{a}to{b}", mlp(a, b, 2), (a,), 2, samples=3 + a % 5)
        for a, b in zip(_WIDTHS, _WIDTHS[1:], strict=False)
    ),
    *(
        Problem(f"linear-{a}to{b}-no-bias", mlp(a, b, 3, bias=False), (a,), 3)
        for a, b in ((65, 1), (17, 16), (8, 33), (9, 7))
    ),
    # what is left of a row behind whole vectors, in tiles of any number of rows
    *(
        Problem(f"linear-{a}to{b}-n{n}", mlp(a, b, 6), (a,), 6, samples=n)
        for a, b, n in (
            (4, 20, 1),
            (20, 36, 5),
            (36, 100, 9),
            (100, 4, 8),
            (18, 34, 6),
            (10, 19, 4),
            (35, 6, 2),
            (70, 27, 13),
            (6, 45, 14),
            (66, 40, 25),
            (97, 15, 12),
        )
    ),
    Problem("linear-five-deep", mlp(3, 9, 8, 7, 5, 2), (3,), 2, samples=7),
    Problem("linear-many-samples", mlp(3, 9, 1), (3,), 1, samples=37),
]
